"""Keep a training job running: start it under torchrun, and start it again when it fails or hangs.

torchrun's own --max-restarts reuses the rendezvous of the ranks that died, and new ones often fail to meet.
Here every attempt is a torchrun of its own (--max-restarts 0) with a fresh rendezvous, which goes on from the
newest intact checkpoint. Every node of a job runs this with the same command; nodes agree through files
beside the run folder, on the file system they share:

    RUN.attempts/0003.json    how attempt 3 ended: exit code, reason, node, time

The first node whose part of an attempt ends writes its file, every other node ends its part too, and the
number of files is the number of the next attempt on all of them. For Linux: processes are found in /proc.
"""

import argparse
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from mocohub.files import read_json, write_json
from mocohub.pretrain.signals import RESUMABLE, StopRequest

logger = logging.getLogger(__name__)

# Exit codes after which nothing is started again.
_MEANING = {0: "done", 2: "unusable arguments or input", RESUMABLE: "stopped on request"}
_ATTEMPT = "MOCOHUB_ATTEMPT"  # environment variable that all processes of an attempt inherit
_POLL_S = 0.5
_LONGEST_BACKOFF_S = 300.0
_GRACE_S = 60.0  # how long the parts on other nodes may take to end like the first


def supervise(
    command: Sequence[str],
    run: str | Path,
    *,
    nproc_per_node: int = 1,
    nnodes: int = 1,
    node_rank: int = 0,
    rdzv_endpoint: str | None = None,
    max_restarts: int = 5,
    window_s: float = 3600,
    backoff_s: float = 10,
    start_timeout_s: float = 3600,
    hang_timeout_s: float = 1800,
    stop_timeout_s: float = 120,
) -> int:
    """Run a training command under torchrun until it is done, restarting it with `--resume auto`.

    A requested stop (signals.py) is passed on to the job; a second Ctrl-C kills it.

    Args:
        command: What torchrun shall start: `["-m", "mocohub", "pretrain", ...]`, or a script and its
            arguments. It takes `--resume auto`, and exits with 0 (done), 2 (unusable input), RESUMABLE
            (stopped on request) or another code (failed).
        run: The run folder the command writes to.
        nproc_per_node: Training processes on this node.
        nnodes: Nodes. Each must call this, and all must see the same `run`.
        node_rank: Of this node, 0 to nnodes - 1. Node 0 hosts the rendezvous.
        rdzv_endpoint: "host:port" of node 0, for more than one node.
        max_restarts: Restarts within any `window_s` before giving up.
        window_s: Seconds.
        backoff_s: Seconds before the first restart; twice as many before each further one in the window.
        start_timeout_s: Seconds until the first log line, heartbeat or checkpoint in `run`, after which the
            job counts as hung: it may list many images and compile first.
        hang_timeout_s: Likewise from one to the next. Must be longer than a kNN evaluation.
        stop_timeout_s: Seconds the processes get to save after a requested stop.

    Returns:
        The exit code: 0 done, 1 given up, 2 unusable input, RESUMABLE stopped on request.

    Raises:
        ValueError: If the facts about nodes cannot work.
    """
    if nnodes > 1 and rdzv_endpoint is None:
        raise ValueError(f"nnodes ({nnodes}) needs rdzv_endpoint, 'host:port' of node 0.")
    if min(nproc_per_node, nnodes) < 1 or not 0 <= node_rank < nnodes:
        raise ValueError(
            f"node_rank ({node_rank}) must be 0 to nnodes - 1 (nnodes is {nnodes}), and nproc_per_node "
            f"({nproc_per_node}) at least 1."
        )
    run = Path(run)
    attempts = run.with_name(f"{run.name}.attempts")
    attempts.mkdir(parents=True, exist_ok=True)
    first = _next_attempt(attempts)
    with StopRequest() as stop:
        while True:
            attempt = _next_attempt(attempts)
            rendezvous = ["--standalone"]
            if nnodes > 1:
                rendezvous = [f"--nnodes={nnodes}", f"--rdzv-id={run.name}-{attempt}", "--rdzv-backend=c10d"]
                rendezvous += [f"--rdzv-endpoint={rdzv_endpoint}"]
                rendezvous += [f"--rdzv-conf=is_host={node_rank == 0},join_timeout=600,read_timeout=600"]
            arguments = [*rendezvous, f"--nproc-per-node={nproc_per_node}", "--max-restarts=0"]
            arguments += [f"--shutdown-timeout={stop_timeout_s:.0f}"]
            arguments += command if attempt == first else _resumed(command)
            code, reason = _run_attempt(
                arguments,
                run,
                attempts / f"{attempt:04d}.json",
                stop,
                start_timeout_s=start_timeout_s,
                hang_timeout_s=hang_timeout_s,
                stop_timeout_s=stop_timeout_s,
            )
            end = _agree(attempts / f"{attempt:04d}.json", code, reason, node_rank)
            logger.info("Attempt %d: exit code %d (%s).", attempt, end["exit_code"], end["reason"])
            if end["exit_code"] in _MEANING:
                return end["exit_code"]
            ends = [read_json(attempts / f"{n:04d}.json") for n in range(first, attempt + 1)]
            failures = sum(end["time"] - other["time"] <= window_s for other in ends)
            if failures > max_restarts:
                logger.error("%d failures within %.0f s: giving up.", failures, window_s)
                return 1
            wait_s = min(backoff_s * 2 ** (failures - 1), _LONGEST_BACKOFF_S)
            logger.info("Restart %d of %d in %.0f s.", failures, max_restarts, wait_s)
            if _wait(wait_s, stop):
                return RESUMABLE


def _run_attempt(
    arguments: list[str],
    run: Path,
    ended: Path,
    stop: StopRequest,
    *,
    start_timeout_s: float,
    hang_timeout_s: float,
    stop_timeout_s: float,
) -> tuple[int, str]:
    """Run this node's part of an attempt; return its exit code and why it ended. No process is left over."""
    name = uuid.uuid4().hex
    command = [sys.executable, "-m", "mocohub.pretrain.supervise", *arguments]
    logger.info("torchrun %s", shlex.join(arguments))
    job = subprocess.Popen(command, env=os.environ | {_ATTEMPT: name}, start_new_session=True)
    progress, progress_at, patience_s = _progress(run), time.monotonic(), start_timeout_s
    stop_at = ended_at = None
    try:
        while job.poll() is None:
            time.sleep(_POLL_S)
            now = time.monotonic()
            if stop.requested and stop_at is None:
                stop_at = now
                job.send_signal(signal.SIGTERM)  # torchrun passes it to its processes
            if stop_at is not None and now - stop_at > stop_timeout_s + _GRACE_S:
                return RESUMABLE, f"did not stop within {stop_timeout_s + _GRACE_S:.0f} s and was killed"
            if ended_at is None and ended.is_file():
                ended_at = now
            if ended_at is not None:
                grace_s = _GRACE_S if read_json(ended)["exit_code"] in _MEANING else 0
                if now - ended_at > grace_s:
                    return 1, "ended on another node"
            if (seen := _progress(run)) != progress:
                progress, progress_at, patience_s = seen, now, hang_timeout_s
            if now - progress_at > patience_s:
                return 1, f"no progress for {patience_s:.0f} s"
    finally:
        _kill(name)
        job.wait()
    if stop.requested and job.returncode != 0:
        return RESUMABLE, f"stopped by {stop.signal.name}"
    return job.returncode, _MEANING.get(job.returncode, "a process failed")


def _next_attempt(attempts: Path) -> int:
    return len(list(attempts.glob("[0-9]*.json")))


def _agree(path: Path, code: int, reason: str, node_rank: int) -> dict:
    """Write how an attempt ended, unless another node has done so, and return what is written."""
    mine = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    write_json(mine, {"exit_code": code, "reason": reason, "node_rank": node_rank, "time": time.time()})
    try:
        os.link(mine, path)  # fails if it is there, on NFS too, and nobody reads half of it
    except FileExistsError:
        pass
    finally:
        mine.unlink()
    return read_json(path)


def _resumed(command: Sequence[str]) -> list[str]:
    """Return the command with `--resume auto` in place of what it says."""
    kept = [word for word in command if not word.startswith("--resume=")]
    if "--resume" in kept:
        del kept[kept.index("--resume") : kept.index("--resume") + 2]
    return [*kept, "--resume", "auto"]


def _progress(run: Path) -> tuple[int, ...]:
    """What changes while a run goes on: when its log, heartbeat and list of checkpoints last changed."""
    paths = (run / name for name in ("log.jsonl", "heartbeat", "checkpoints"))
    return tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in paths)


def _wait(seconds: float, stop: StopRequest) -> bool:
    """Wait, but not on after a requested stop; return whether there was one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stop.requested:
        time.sleep(min(_POLL_S, seconds))
    return stop.requested


def _kill(name: str) -> None:
    """Kill every process of an attempt, also those in sessions of their own, stopped ones and orphans."""
    marker = f"{_ATTEMPT}={name}".encode()
    for _ in range(100):  # until none is left: one may have started another meanwhile
        found = False
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
                    found = True
            except OSError:  # it ended, or belongs to somebody else
                continue
        if not found:
            return
        time.sleep(0.1)
    logger.error("Some processes of the last attempt cannot be killed (%s=%s).", _ATTEMPT, name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mocohub pretrain` under `supervise`: options of this, then the arguments of that."""
    parser = argparse.ArgumentParser(
        "supervise",
        usage="%(prog)s [options] RECIPE --data D --out RUN [arguments of `mocohub pretrain`]",
        description="Train under torchrun, and go on from the newest checkpoint after a failure.",
        allow_abbrev=False,
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, help="training processes on this node")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0, help="of this node; node 0 hosts the rendezvous")
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="of node 0, for more than one node")
    parser.add_argument("--max-restarts", type=int, default=5, help="within an hour, before giving up")
    parser.add_argument("--backoff-s", type=float, default=10, help="before the first restart; doubles")
    parser.add_argument("--start-timeout-s", type=float, default=3600, help="until the first log line")
    parser.add_argument("--hang-timeout-s", type=float, default=1800, help="without progress, then restart")
    parser.add_argument("--stop-timeout-s", type=float, default=120, help="to save, after a signal to stop")
    parser.add_argument("pretrain", nargs=argparse.REMAINDER)
    options = vars(parser.parse_args(arguments))
    pretrain = [word for word in options.pop("pretrain") if word != "--"]
    run = next((after for word, after in zip(pretrain, pretrain[1:], strict=False) if word == "--out"), None)
    run = next((word.removeprefix("--out=") for word in pretrain if word.startswith("--out=")), run)
    if run is None:
        parser.error("the arguments of `mocohub pretrain` must name the run: --out RUN")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s supervise: %(message)s")
    try:
        return supervise(["-m", "mocohub", "pretrain", *pretrain], run, **options)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        logger.error("interrupted: the job was killed; --resume auto continues it.")
        return 1


def _torchrun(arguments: list[str]) -> int:
    """Run torchrun in this process and return the exit code its processes agree on, which it hides itself."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(arguments)
    except ChildFailedError as error:
        logger.error("%s", error)
        codes = {failure.exitcode for failure in error.failures.values()}
        if 2 in codes:
            return 2
        # Those that had not quite ended yet were sent a SIGTERM.
        return RESUMABLE if RESUMABLE in codes and codes <= {RESUMABLE, -signal.SIGTERM} else 1
    except SignalException:  # after its processes have saved and ended
        return RESUMABLE
    return 0


if __name__ == "__main__":
    sys.exit(_torchrun(sys.argv[1:]))

"""Give every malicious input to every reader, in this process, and watch what happens.

    python -m helpers.malice_readers TASKS.json ANSWERS.json

TASKS.json: {"root", "model", "run", "attacks": [[name, path, [reader, ...]], ...]}. An audit hook of the
interpreter sees what Python code does: files opened for writing, programs started, connections, code compiled
from the payload, classes looked up by an unpickler. The canaries see the rest.
"""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 120  # of the clock: a machine may be busy. `seconds` are those of the processor
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_STARTING = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "subprocess.Popen",
    "pty.spawn",
)
_CHANGING = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.chmod",
    "os.truncate",
)


class Watch:
    """The audit hook, which cannot be removed: it reports only while `events` is a list."""

    def __init__(self, root: Path) -> None:
        self.root, self.work = str(root), str(root / "work")
        self.outside, self.canaries = str(root / "outside"), str(root / "canaries")
        self.port = urlsplit(os.environ["HF_ENDPOINT"]).port
        self.events: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.events is None:
            return
        events, self.events = self.events, None  # what this very function does is not reported
        try:
            if found := self._judge(event, args):
                events.append(f"{event}: {found}"[:300])
        finally:
            self.events = events

    def _judge(self, event: str, args: tuple[Any, ...]) -> str | None:
        if event in _STARTING or event == "pickle.find_class":
            return repr(args)
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            writes = isinstance(args[1], str) and set(args[1]) & set("wax+") or (args[2] or 0) & _WRITING
            if path.startswith(self.outside) or (writes and not self._may_write(path)):
                return path
        if event in _CHANGING:
            args = args[1:] if event == "os.symlink" else args  # what a link says is text
            paths = [
                os.path.abspath(os.fsdecode(a)) for a in args if isinstance(a, str | bytes | os.PathLike)
            ]
            return next((path for path in paths if not self._may_write(path)), None)
        if event == "socket.connect":
            return None if args[1] == ("127.0.0.1", self.port) else repr(args[1])
        if event == "import" and args[0].split(".")[0] in ("evil", "__torch__", "modeling"):
            return args[0]
        if event == "compile" and args[0] is not None and self._is_payload(args[0]):
            return repr(args[0])
        if event == "exec" and self._is_payload((args[0].co_consts, args[0].co_names)):
            return repr(args[0])
        return None

    def _is_payload(self, code: Any) -> bool:
        return self.canaries in repr(code)

    def _may_write(self, path: str) -> bool:
        return path.startswith(self.work) or path in ("/dev/null", "/dev/tty")


def fall_for_everything(path: Path) -> None:
    """A reader without care, to prove that the watch sees what it shall see."""
    root = path.parents[2]
    pickle.loads(path.read_bytes())
    (root / "outside" / "secret.txt").read_text()
    (root / "corpus" / "left").write_text("")
    (root / "corpus" / "left").unlink()
    subprocess.run(["true"], check=True)
    exec(f"{str(root / 'canaries')!r}")
    __import__("evil")
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1).close()


def readers(model: Path, work: Path) -> dict[str, Callable[[Path], Any]]:
    """Everything public that opens what others made."""
    from helpers.recipes import smallest
    from mocohub.cli.models import inspect
    from mocohub.features.extract import extract
    from mocohub.features.store import Features
    from mocohub.hub.convert import convert
    from mocohub.hub.encoders import read_encoder
    from mocohub.hub.export import export
    from mocohub.hub.load import load
    from mocohub.hub.publish import publish
    from mocohub.hub.verify import verify
    from mocohub.images import decode_image
    from mocohub.pretrain.build import build
    from mocohub.pretrain.checkpoint import restore
    from mocohub.pretrain.initial import find
    from mocohub.shard_reader import read_shard
    from mocohub.shards import list_shards
    from mocohub.sources import ImageList, list_images

    backbone, recipe = load(model), smallest()
    new = (work / f"out{n}" for n in range(10**9))

    def checked(path: Path) -> list[str]:
        checks = verify(path)
        bad = [str(check) for check in checks if not check.ok]
        if bad:
            raise ValueError(f"verify({str(path)!r}): {'; '.join(bad)}")
        return [str(check) for check in checks]

    def resumed(path: Path) -> Any:
        import torch

        return restore(path, build(recipe, torch.device("cpu"), num_images=8), recipe)

    def begun(path: Path) -> Any:
        import torch

        moco = build(recipe, torch.device("cpu"), num_images=8)
        return find(path).load(moco, ImageList("none", [], None, None, ""), restart=True)

    def streamed(path: Path) -> list[Any]:
        shards = list_shards(path)
        images = (image for url in shards.urls for image in read_shard(url))
        return [decode_image(image.data).size for image in images if image.data is not None]

    return {
        "load": load,
        "load by name": load,
        "read_encoder": read_encoder,
        "inspect": lambda path: inspect(str(path)),
        "convert": lambda path: convert(path, next(new), to="torchvision"),
        "export": lambda path: export(path, next(new), license="mit"),
        "verify": checked,
        "publish": lambda path: publish(path, "our-lab/victim"),
        "restore": resumed,
        "init": begun,
        "list_images": lambda path: [len(list_images(path))],
        "extract": lambda path: extract(backbone, str(path), out=next(new), num_workers=0, progress=False),
        "list_shards": streamed,
        "fall for everything": fall_for_everything,
        "features": lambda path: Features.open(path).values,
    }


class NoAnswer(BaseException):
    """A reader waits; no handler for errors shall catch this."""


def _too_long(*_: object) -> None:
    raise NoAnswer(f"no answer in {_TIMEOUT_S} s")


def attempt(read: Callable[[Any], Any], path: str | Path, watch: Watch, canaries: Path) -> dict[str, Any]:
    """One reader with one input."""
    start = time.process_time()
    answer: dict[str, Any] = {"outcome": "answered", "type": "", "message": "", "raised_in": ""}
    signal.setitimer(signal.ITIMER_REAL, _TIMEOUT_S, 1)
    watch.events = []
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read(path)
    except (Exception, NoAnswer) as error:
        watch.events, events = None, watch.events
        frame = traceback.extract_tb(error.__traceback__)[-1]
        answer = {"outcome": "refused", "type": type(error).__name__, "message": str(error)[:10_000]}
        answer["bases"] = [base.__name__ for base in type(error).__mro__]
        answer["raised_in"] = f"{frame.filename}:{frame.lineno}"
    else:
        watch.events, events = None, watch.events
    signal.setitimer(signal.ITIMER_REAL, 0)
    touched = sorted(os.listdir(canaries))
    for name in touched:
        (canaries / name).unlink()
    return answer | {"events": events, "canaries": touched, "seconds": time.process_time() - start}


def main() -> None:
    tasks, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    root = Path(tasks["root"])
    sys.path.append(str(root))  # where evil.py is
    table = readers(Path(tasks["model"]), root / "work")
    for name in ("load", "read_encoder", "export", "convert", "verify"):  # whatever they import lazily
        table[name](Path(tasks["model"]))
    signal.signal(signal.SIGALRM, _too_long)
    watch, answers = Watch(root), []
    for name, path, wanted in tasks["attacks"]:
        for reader in wanted:
            source = path if reader == "load by name" else Path(path)
            seen = attempt(table[reader], source, watch, root / "canaries")
            answers.append({"attack": name, "reader": reader, **seen})
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    # Where the system does not say it, ru_maxrss, which begins with what the parent held.
    peak_kb = int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out.write_text(json.dumps({"answers": answers, "peak_bytes": peak_kb * 1024}))


if __name__ == "__main__":
    main()

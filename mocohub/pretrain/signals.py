"""A request to stop, from a person or a scheduler, taken at the next step boundary.

    SIGTERM           SLURM at the end of its time or after scancel, Kubernetes, torchrun, kill
    SIGINT            Ctrl-C; a second one stops at once
    SIGHUP            the terminal was closed
    SIGUSR1           SLURM's early warning: sbatch --signal=B:USR1@120

Training then saves a checkpoint and exits with `RESUMABLE`, by which a scheduler or `supervise` can tell a
run to be continued (with --resume auto) from one that is done (0), has failed (1), or cannot start (2).
"""

import os
import signal
import threading
import time
from types import FrameType

# EX_TEMPFAIL of sysexits.h: "try again later". Shells use 126 and above, Python 1, argument parsers 2.
RESUMABLE = 75

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
# torchrun passes a Ctrl-C on to its processes, and so may the terminal: that is one wish, not two.
_SAME_WISH_S = 1.0


class StopRequest:
    """Remembers, inside its block, that one of `SIGNALS` arrived; a second SIGINT raises KeyboardInterrupt.

    with StopRequest() as stop:
        while not stop.requested: ...

    The handlers that were there before are put back at the end. Outside the main thread, where Python gives
    no signals, nothing is installed and nothing is ever requested.
    """

    def __init__(self) -> None:
        """Ask for nothing yet."""
        self.requested = False
        self.signal: signal.Signals | None = None  # the first that arrived
        self._interrupted_at: float | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif not under_torchrun or now - self._interrupted_at > _SAME_WISH_S:
                raise KeyboardInterrupt
        if not self.requested:
            self.requested, self.signal = True, signal.Signals(number)
            hint = " Ctrl-C again stops at once." if number == signal.SIGINT else ""
            # Not logging or print: a handler may run in the middle of either.
            os.write(2, f"\n{self.signal.name}: saving at the next step, then stopping.{hint}\n".encode())


def shield_worker(worker_id: int = 0, *, yields: bool = False) -> None:
    """Make a data-loading process deaf to `SIGNALS`: the `worker_init_fn` of training's loaders.

    Ctrl-C, SLURM and torchrun signal the whole group of processes. A worker that died of it would take its
    training process along before that has saved; workers end when the process that started them does.

    Args:
        worker_id: As torch's DataLoader gives it.
        yields: Whether to take only the processor time that the step leaves over. Where both run on the CPU,
            all threads of a step wait for the one that a worker has displaced.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if yields:
        os.nice(19)

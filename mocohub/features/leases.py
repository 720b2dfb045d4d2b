"""Which shards a process does: a share of them that is known from the start, or any that nobody has in hand.

A lease is a file beside the records of a plan, with the name of the process that has the shard. It counts
while it has been touched of late, and while that process lives if it is one of this machine.
"""

import os
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from mocohub.features.plan import Plan
from mocohub.files import publish

LEASE_TIMEOUT_S = 300.0
_BEAT_S = 15.0


class Leases:
    """Shards in hand, for workers that come and go: each shard has one worker as long as that is alive."""

    def __init__(self, plan: Plan) -> None:
        """Hold none yet."""
        self._plan = plan
        self._owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self._held: set[int] = set()
        self._last_beat = time.monotonic()

    def take(self, shard: int) -> bool:
        """Take a shard unless another worker that is alive has it; return whether this worker has it now."""
        if shard in self._held:
            return True
        lease = self._lease(shard)
        mine = self._plan.progress / f".{lease.name}.{secrets.token_hex(4)}.partial"
        mine.write_text(self._owner, encoding="utf-8")
        try:
            if not publish(mine, lease, keep=True):
                # Both times are the file system's, whatever the clocks of the machines say.
                age_s = mine.stat().st_mtime - lease.stat().st_mtime
                owner = lease.read_text(encoding="utf-8")
                if owner != self._owner:  # NFS may say that the name exists after it has given it
                    if age_s < LEASE_TIMEOUT_S and not _is_dead(owner):
                        return False
                    mine.replace(lease)
                    if lease.read_text(encoding="utf-8") != self._owner:
                        return False
        except FileNotFoundError:  # given back in this moment
            return False
        finally:
            mine.unlink(missing_ok=True)
        self._held.add(shard)
        if self._plan.is_done(shard):  # between the caller's look and this one
            self.give_back(shard)
            return False
        return True

    def beat(self) -> None:
        """Show that this worker is alive; call it often."""
        if time.monotonic() - self._last_beat > _BEAT_S:
            self._last_beat = time.monotonic()
            for shard in list(self._held):
                try:
                    os.utime(self._lease(shard))
                except FileNotFoundError:
                    pass  # taken from this worker, and done

    def give_back(self, shard: int) -> None:
        """Give back a shard, done or not."""
        self._held.discard(shard)
        self._lease(shard).unlink(missing_ok=True)

    def give_all_back(self) -> None:
        """Give back what is held, so that nobody has to wait for the time to run out."""
        for shard in list(self._held):
            self.give_back(shard)

    def _lease(self, shard: int) -> Path:
        return self._plan.progress / f"{shard:05d}.lease"


def _is_dead(owner: str) -> bool:
    """Whether a lease is that of a process of this machine that is no more."""
    host, pid, *_ = [*owner.split(), "", ""]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def share_of(shard: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return (i, N): do the shards i, i + N, i + 2N and so on; None: take them by lease.

    Args:
        shard: "i/N", "lease", or None to be told by torchrun (RANK, WORLD_SIZE) and by the task of a SLURM
            array (SLURM_ARRAY_TASK_ID and the like), and by both where each task runs torchrun.
        environ: Where these variables are looked up.

    Raises:
        ValueError: If it is none of these.
    """
    if shard == "lease":
        return None
    if shard is not None:
        i, slash, n = shard.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
            raise ValueError(
                f"shard is '{shard}', but must be 'i/N' with i from 0 to N - 1, such as '0/8', or 'lease'."
            )
        return int(i), int(n)
    i, n = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    if "SLURM_ARRAY_TASK_ID" in environ and "SLURM_ARRAY_TASK_COUNT" in environ:
        first, step = (
            int(environ.get(f"SLURM_ARRAY_TASK_{name}", d)) for name, d in (("MIN", 0), ("STEP", 1))
        )
        task = (int(environ["SLURM_ARRAY_TASK_ID"]) - first) // step
        i, n = task * n + i, int(environ["SLURM_ARRAY_TASK_COUNT"]) * n
    return i, n

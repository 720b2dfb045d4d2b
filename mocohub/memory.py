"""Memory of a CPU that is freed and asked for again, batch after batch."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of mallopt, in malloc.h
_num_users = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the process keep what `large_blocks_reused` frees, up to 2 GB; afterwards all is given back."""
    global _num_users
    libc = _glibc()
    if libc is None:
        yield
        return
    _num_users += 1
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # what glibc arrives at once a block of 32 MB has been freed
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _num_users -= 1
        if _num_users == 0:
            libc.mallopt(_TRIM_THRESHOLD, 64 << 20)  # likewise
            libc.malloc_trim(0)


@contextmanager
def large_blocks_reused() -> Iterator[None]:
    """Within `freed_memory_kept`, take large blocks from what is kept, where the C library is glibc.

    glibc takes large blocks anew from the system, page by page, and gives them back at once: 2 GB for a batch
    of 64 images at 224 px in a ResNet-50, up to a third of its time on a virtual machine. That suits images
    of all sizes, which are decoded between two passes, but not the passes. Who has tuned malloc by the
    environment is left alone.
    """
    libc = _glibc() if _num_users else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, 65536)


def _glibc() -> ctypes.CDLL | None:
    tuned = {"LD_PRELOAD", "GLIBC_TUNABLES"} & os.environ.keys()
    if (
        not sys.platform.startswith("linux")
        or tuned
        or any(name.startswith("MALLOC_") for name in os.environ)
    ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None

"""Memory that is freed and asked for again."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, resource
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # each core counts pages by itself
import torch
from mocohub.memory import freed_memory_kept, large_blocks_reused

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

faults()
start, plain = resident(), faults()
with freed_memory_kept():
    with freed_memory_kept(), large_blocks_reused():
        for _ in range(4):
            faults()  # the blocks find their places
    with large_blocks_reused():
        kept = faults()  # the end of the inner one must not have ended the outer one
more = resident() - start
blocks = [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(8)]
del blocks
print(plain, kept, more, resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("environ", [{}, {"MALLOC_ARENA_MAX": "2"}])
def test_freed_memory_is_used_again_and_given_back_in_the_end(environ, monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    plain, kept, more_mb, later_mb = map(int, run.stdout.split())
    if environ:  # somebody has tuned malloc
        assert kept > plain / 2
    else:
        assert kept < plain / 4
    assert more_mb < 32
    assert later_mb < 256  # of 512: nothing is kept any more, but for what fits into a gap

"""Ways to make a process fail at a chosen moment, for real: signals, full disks, and single file operations.

File operations are counted by a small C library in front of libc (LD_PRELOAD), so that those of Python, of
its standard library and of safetensors (Rust) are all seen. Rust opens and renames without libc in one place;
what lies between is reached by killing *after* the operations next to it.
"""

import ctypes
import functools
import itertools
import multiprocessing as mp
import os
import shutil
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILL_BEFORE, KILL_AFTER, KILL_AMID_WRITE, FAIL_ONCE, FAIL_FROM_THERE = range(5)

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long target, seen;
static int mode;
static long long space = -1;

void fault_arm(const char *where, long operation, int how) {
    strncpy(folder, where, sizeof folder - 1);
    target = operation; mode = how; seen = 0;
}
void fault_space(const char *where, long long bytes) {
    strncpy(folder, where, sizeof folder - 1);
    target = -1; space = bytes;
}
long fault_seen(void) { return seen; }

static int starts(const char *path) {
    size_t size = strlen(folder);
    return size && !strncmp(path, folder, size) && (path[size] == '/' || path[size] == 0);
}
static int fd_inside(int fd) {
    char link[64], path[PATH_MAX] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return folder[0] && readlink(link, path, sizeof path - 1) > 0 && starts(path);
}
static int inside(int at, const char *path) {
    return path[0] == '/' ? starts(path) : at != AT_FDCWD && fd_inside(at);
}
/* Returns whether the operation shall fail. */
static int before(void) {
    seen++;
    if (seen == target && mode == 0) kill(getpid(), SIGKILL);
    int fails = (seen == target && mode == 3) || (target > 0 && seen >= target && mode == 4);
    if (fails) errno = ENOSPC;
    return fails;
}
static void after(void) { if (seen == target && mode == 1) kill(getpid(), SIGKILL); }

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define COUNTED(yes, call) { if (!(yes)) return call; if (before()) return -1; \
    __typeof__(call) result = call; int kept = errno; after(); errno = kept; return result; }
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags) mode_t bits = 0; if ((flags) & (O_CREAT | O_TMPFILE)) \
    { va_list rest; va_start(rest, flags); bits = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) { MODE(flags) REAL(open);
    COUNTED(CHANGES(flags) && inside(AT_FDCWD, path), real(path, flags, bits)) }
int open64(const char *path, int flags, ...) { MODE(flags) REAL(open64);
    COUNTED(CHANGES(flags) && inside(AT_FDCWD, path), real(path, flags, bits)) }
int openat(int at, const char *path, int flags, ...) { MODE(flags) REAL(openat);
    COUNTED(CHANGES(flags) && inside(at, path), real(at, path, flags, bits)) }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) REAL(openat64);
    COUNTED(CHANGES(flags) && inside(at, path), real(at, path, flags, bits)) }
int mkdir(const char *path, mode_t bits) { REAL(mkdir); COUNTED(inside(AT_FDCWD, path), real(path, bits)) }
int rename(const char *a, const char *b) { REAL(rename); COUNTED(inside(AT_FDCWD, a), real(a, b)) }
int renameat(int p, const char *a, int q, const char *b) { REAL(renameat);
    COUNTED(inside(p, a), real(p, a, q, b)) }
int unlink(const char *path) { REAL(unlink); COUNTED(inside(AT_FDCWD, path), real(path)) }
int unlinkat(int at, const char *path, int flags) { REAL(unlinkat);
    COUNTED(inside(at, path), real(at, path, flags)) }
int rmdir(const char *path) { REAL(rmdir); COUNTED(inside(AT_FDCWD, path), real(path)) }
int chmod(const char *path, mode_t bits) { REAL(chmod); COUNTED(inside(AT_FDCWD, path), real(path, bits)) }
int fsync(int fd) { REAL(fsync); COUNTED(fd_inside(fd), real(fd)) }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); COUNTED(fd_inside(fd), real(fd, size)) }

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(write);
    if (!fd_inside(fd)) return real(fd, bytes, count);
    if (before()) return -1;
    if (seen == target && mode == 2) { real(fd, bytes, count / 2); kill(getpid(), SIGKILL); }
    if (space == 0) { errno = ENOSPC; return -1; }
    if (space > 0) { if ((long long)count > space) count = space; space -= count; }
    ssize_t result = real(fd, bytes, count);
    int kept = errno; after(); errno = kept;
    return result;
}
"""


def with_counted_file_operations(folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Call `function(*args)` in a process whose file operations can be made to fail; any failure raises here.

    Args:
        folder: Where the C library is built.
        function: Of a module, so that a new process can import it.
        args: Its arguments.
    """
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    (folder / "faults.c").write_text(_SOURCE)
    library = folder / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "faults.c", "-ldl"], check=True)
    process = mp.get_context("spawn").Process(target=function, args=args)
    os.environ["LD_PRELOAD"] = str(library)
    try:
        process.start()
    finally:
        del os.environ["LD_PRELOAD"]
    process.join()
    assert process.exitcode == 0


def in_fork(function: Callable[[], None], fault: Callable[[ctypes.CDLL], None]) -> int:
    """Arm a fault and call `function` in a forked process; return its exit code, -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            fault(ctypes.CDLL(None))
            function()
            os._exit(0)
        except BaseException:  # noqa: B036 (nothing of the parent may run in the child)
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_every_operation(
    mode: int,
    folder: Path,
    prepare: Callable[[], None],
    function: Callable[[], None],
    check: Callable[[int], None],
) -> int:
    """Call `function` with a fault at its first file operation in `folder`, then at its second, and so on.

    Args:
        mode: KILL_... or FAIL_...
        folder: Operations elsewhere are not counted.
        prepare: Called before each.
        function: Called in a process of its own, with the fault.
        check: Called after each with the exit code, -9 for a kill.

    Returns:
        The number of operations.
    """
    reached = folder.with_name(f"{folder.name}.reached")

    def counted() -> None:
        try:
            function()
        finally:
            reached.write_text(str(ctypes.CDLL(None).fault_seen()))

    for number in itertools.count(1):
        prepare()
        reached.unlink(missing_ok=True)
        code = in_fork(counted, functools.partial(_arm, folder, number, mode))
        if reached.is_file() and int(reached.read_text()) < number:
            return number - 1
        check(code)
    raise AssertionError


def _arm(folder: Path, number: int, mode: int, faults: ctypes.CDLL) -> None:
    faults.fault_arm(str(folder).encode(), ctypes.c_long(number), mode)


def fill_disk(folder: Path, num_bytes: int, faults: ctypes.CDLL) -> None:
    """Let writes in `folder` fail with "No space left on device" after so many bytes."""
    faults.fault_space(str(folder).encode(), ctypes.c_longlong(num_bytes))

"""Locks of files, between processes of one machine, and of several where their file system has such locks.

They are the system's own, which end with their process, however it ends: flock, or on Windows msvcrt's.
"""

import errno
import io
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO

from lib.system.process import check_stopped

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

PAUSE_S = 0.05  # between two attempts
TAKEN = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}  # what the systems say of a file that another one has locked


def lock(file: IO, wait: bool = False) -> bool:
    """Lock an open file, at whose start one is; False where another one has locked it, unless one is to wait (which
    Windows does not know). Raises OSError, also where its file system has no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # the first byte, whether there is one or not
    except OSError as error:
        if error.errno in TAKEN:
            return False
        raise
    return True


def hold(path: Path, wait_s: float) -> io.FileIO | None:
    """Lock the file `path`, which is made if need be, until `release`; None where another process still holds it after
    `wait_s` seconds. Processes that are forked meanwhile do not hold it.

    Raises Stopped, and OSError where the file cannot be made, or its file system has no locks.
    """
    end = time.monotonic() + wait_s
    while (file := _attempt(path)) is None and time.monotonic() < end:
        check_stopped()
        time.sleep(PAUSE_S)
    return file


def release(file: io.FileIO, delete: bool) -> None:
    """End what `hold` has begun, and delete the file: not where somebody may be waiting for it. In a forked process
    nothing is done."""
    if file.closed:
        return
    if delete and fcntl:  # before its end: whoever gets it after that sees that it is gone
        with suppress(OSError):
            os.unlink(file.name)
    with suppress(OSError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_UN)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
    file.close()
    if delete and not fcntl:  # Windows deletes no file that is open, in another process either
        with suppress(OSError):
            os.unlink(file.name)


def _attempt(path: Path) -> io.FileIO | None:
    """The file, if it could be locked at once, and is not one that has been deleted since it was opened."""
    file = io.FileIO(path, "r+", opener=_open)
    try:
        if not lock(file) or not os.fstat(file.fileno()).st_nlink:
            file.close()
            return None
    except OSError:
        file.close()
        raise
    if hasattr(os, "register_at_fork"):  # a forked process has the same open file, which would stay locked with it
        held = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: held() and held().close())
    return file


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)

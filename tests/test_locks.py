"""Locks of files within one process, and as Windows has them. tests/test_files.py has those between processes."""

import errno
import os
import signal
import time

import pytest

from lib.system import locks
from lib.system.locks import hold, release
from lib.system.process import Stopped, stoppable


class Msvcrt:
    """Windows' locks of the first byte, and that an open file cannot be deleted."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self, monkeypatch):
        self.locked = {}  # files by their numbers
        monkeypatch.setattr(locks, "fcntl", None)
        monkeypatch.setattr(locks, "msvcrt", self, raising=False)
        unlink = os.unlink

        def unlink_closed(path):
            if any(os.path.samestat(os.stat(path), os.fstat(number)) for number in self.opened(path)):
                raise PermissionError(errno.EACCES, "is open")
            unlink(path)

        monkeypatch.setattr(locks.os, "unlink", unlink_closed)

    @staticmethod
    def opened(path):
        """The numbers of the files that this process has open, which is all that there is here."""
        for number in map(int, os.listdir("/proc/self/fd")):
            try:
                os.fstat(number)
            except OSError:
                continue
            yield number

    def locking(self, number, kind, n_bytes):
        assert n_bytes == 1 and os.lseek(number, 0, os.SEEK_CUR) == 0
        key = os.fstat(number).st_ino
        if kind == self.LK_UNLCK:
            del self.locked[key]
        elif key in self.locked:
            raise OSError(errno.EACCES, "Permission denied")
        else:
            self.locked[key] = number


@pytest.fixture(params=["here", "Windows"])
def system(request, monkeypatch):
    if request.param == "Windows":
        if not os.path.isdir("/proc/self/fd"):
            pytest.skip("which files are open is read from /proc")
        Msvcrt(monkeypatch)
    return request.param


@pytest.mark.parametrize("delete", [False, True])
def test_of_two_one_gets_it_and_after_its_end_the_other(tmp_path, system, delete):
    path = tmp_path / "an älter Ordner.lock"
    first = hold(path, 0)
    start = time.monotonic()
    assert first and hold(path, 0) is None and hold(path, 0.2) is None
    assert 0.2 <= time.monotonic() - start < 5
    release(first, delete)
    assert path.exists() != delete
    second = hold(path, 0)
    assert second
    release(second, delete=True)
    assert not list(tmp_path.iterdir())
    release(second, delete=True)  # once more does nothing


def test_a_file_that_was_deleted_before_it_was_locked_is_not_it(tmp_path, monkeypatch):
    """Else two could hold the same name."""
    path, lock = tmp_path / "lock", locks.lock

    def deleted_then_locked(file):
        path.unlink()
        monkeypatch.setattr(locks, "lock", lock)
        return lock(file)

    monkeypatch.setattr(locks, "lock", deleted_then_locked)
    assert hold(path, 0) is None
    file = hold(path, 0)
    assert os.path.samestat(os.fstat(file.fileno()), path.stat())
    release(file, delete=True)


def test_who_waits_can_be_stopped(tmp_path):
    file = hold(tmp_path / "lock", 0)
    with stoppable(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        hold(tmp_path / "lock", 60)
    release(file, delete=True)


def test_what_cannot_be_a_lock_is_an_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("folder", "nowhere/lock", "link"):
        with pytest.raises(OSError):
            hold(tmp_path / name, 60)
    assert not (tmp_path / "elsewhere").exists()


def test_a_forked_process_holds_nothing(tmp_path):
    file = hold(tmp_path / "lock", 0)
    child = os.fork()
    if child == 0:
        release(file, delete=True)  # as its `with` statements do
        os._exit(0 if file.closed and hold(tmp_path / "lock", 0) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and (tmp_path / "lock").exists()
    release(file, delete=True)

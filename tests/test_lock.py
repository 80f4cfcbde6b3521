"""Locks of folders, between real processes."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import filelock._native._unix as native
import pytest

from lib.error import InputError
from lib.lock import locked, made

HOLD = """
import os, sys, time
from pathlib import Path
from lib.lock import made

with made(Path(sys.argv[1])):
    if "fork" in sys.argv and os.fork() == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(folder, *arguments, prefix=()):
    """A process that holds the lock of a folder until it gets a line."""
    root = Path(__file__).resolve().parents[1]
    command = [*prefix, sys.executable, "-c", HOLD, str(folder), *arguments]
    return subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_another_process_holds_is_refused(tmp_path):
    (tmp_path / "kept").touch()
    with hold(tmp_path) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=f"^{tmp_path}: another command is writing there; wait"), locked(tmp_path):
            pytest.fail("two hold it")
        other.communicate("end\n")
    with locked(tmp_path):
        assert names(tmp_path) == [".lock", "kept"]
    assert names(tmp_path) == ["kept"]


def test_who_may_wait_says_so_and_waits(tmp_path, capsys):
    with hold(tmp_path) as other:
        assert other.stdout.readline() == "held\n"
        ended = []

        def end():
            ended.append(True)
            print("end", file=other.stdin, flush=True)

        threading.Timer(1, end).start()
        with locked(tmp_path, wait=True):
            assert ended
            assert f"{tmp_path}: another process works there; waiting for its end" in capsys.readouterr().out


def test_a_killed_process_holds_nothing_and_neither_do_those_that_it_forked(tmp_path):
    with hold(tmp_path, "fork") as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
        other.wait()
        with locked(tmp_path):
            assert names(tmp_path) == [".lock"]


def test_a_container_holds_it_too(tmp_path):
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("only root can give a process numbers of its own")
    with hold(tmp_path, prefix=prefix) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another command"), locked(tmp_path):
            pytest.fail("two hold it")
        other.communicate("end\n")


def test_a_folder_that_was_made_and_stays_empty_goes_again(tmp_path):
    with made(tmp_path / "a" / "b"):
        assert names(tmp_path / "a" / "b") == [".lock"]
    assert not names(tmp_path)
    with pytest.raises(InputError, match="bad"), made(tmp_path / "a"):
        raise InputError("bad")
    assert not names(tmp_path)
    with made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    with made(tmp_path / "a" / "b"), made(tmp_path / "a" / "c"):
        pass
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "a" / "b") == ["file"]
    (tmp_path / "empty").mkdir()
    with made(tmp_path / "empty"):
        pass
    assert names(tmp_path / "empty") == []


def test_of_those_that_make_a_folder_at_once_one_gets_it(tmp_path):
    others = [hold(tmp_path / "new") for _ in range(3)]
    outputs = [other.stdout.readline() for other in others]  # what the losers print is their end
    assert sorted(outputs) == ["", "", "held\n"]
    for other in others:
        other.communicate("end\n")
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_and_said(tmp_path, monkeypatch, capsys, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(native.fcntl, "flock", fail)
    with locked(tmp_path):
        assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().out

"""Texts, whole files, temporary ones, and locks of folders between real processes."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import wait_until

from lib.system import files, locks
from lib.system.error import InputError
from lib.system.files import locked, made, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_left_out(tmp_path, encoding):
    (tmp_path / "f").write_text("Größe\n1\t2\n", encoding=encoding)
    assert read_text(tmp_path / "f") == "Größe\n1\t2\n"


@pytest.mark.parametrize("data", [b"\xff\xfea", b"a\xff", b"\xef\xbb\xbf\xe4"])
def test_what_is_no_text(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError):
        read_text(tmp_path / "f")
    assert "\ufffd" in read_text(tmp_path / "f", errors="replace")


WRITE = """
import sys
from pathlib import Path
from lib.system.files import write_atomically

def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    temporary.write_text("whole")

write_atomically(Path(sys.argv[1]), write)
"""


@pytest.fixture(params=["here", "in a container"])
def writer(request, tmp_path):
    """A process that has half of the file "output" written, and writes on when it gets a line."""
    apart = request.param != "here"  # with process numbers of its own, which are others here, or nobody's
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] if apart else []
    if apart and (not shutil.which("unshare") or subprocess.run([*prefix, "true"], check=False).returncode):
        pytest.skip("only root can give a process numbers of its own")
    root = Path(__file__).resolve().parents[1]
    command = [*prefix, sys.executable, "-c", WRITE, str(tmp_path / "output")]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_a_file_that_is_being_written_is_not_swept_away(writer, tmp_path):
    (left,) = tmp_path.iterdir()
    files.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [left]
    writer.communicate("go on\n")
    assert writer.returncode == 0
    assert (tmp_path / "output").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_swept_away(writer, tmp_path):
    writer.kill()
    writer.communicate()
    for name in (".a.12.tmp", ".tmp", "c.1.tmp", ".d.txt"):  # the first one by an older version
        (tmp_path / name).write_text("")
    (tmp_path / ".e.1.tmp").mkdir()

    def swept():
        files.sweep(tmp_path)
        return sorted(p.name for p in tmp_path.iterdir()) == [".d.txt", ".e.1.tmp", ".tmp", "c.1.tmp"]

    wait_until(swept)  # in a container the process ends soon after its parent


def test_a_file_that_was_swept_away_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    """A sweep can come between the making of a file and its lock."""
    lock, swept = locks.fcntl.flock, []

    def sweep_then_lock(file, operation):
        if not swept:
            swept.append(True)
            files.sweep(tmp_path)
            assert not list(tmp_path.iterdir())
        lock(file, operation)

    monkeypatch.setattr(locks.fcntl, "flock", sweep_then_lock)
    files.write_text(tmp_path / "file", "text")
    assert swept and [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "text"


def test_a_file_that_came_up_meanwhile_is_not_replaced_unasked(tmp_path):
    def write(temporary):
        temporary.write_text("mine")
        (tmp_path / "file").write_text("another's")

    with pytest.raises(InputError, match="file: exists already"):
        files.write_atomically(tmp_path / "file", write, replace=False)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "another's"}
    files.write_json(tmp_path / "other", 1, replace=False)
    assert (tmp_path / "other").read_text() == "1\n"


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(InputError, match="file: cannot be written .disk full"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(InputError, match=f"{name}: is no ordinary file"):
            files.write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"] and not (tmp_path / "pipe").is_file()


HOLD = """
import os, sys, time
from pathlib import Path
from lib.system.files import made

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

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    with locked(tmp_path):
        assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().out

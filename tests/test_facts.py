"""What a run tells of itself."""

import shutil
import subprocess

import pytest
import torch

from lib.system.facts import facts, git_revision


def git(folder, *argv):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository with a commit, which holds a folder that is not its own."""
    folder = tmp_path / "a repository"
    (folder / "copy" / "lib").mkdir(parents=True)
    (folder / "file").write_text("text")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


@pytest.mark.skipif(not shutil.which("git"), reason="git is not here")
def test_the_revision_is_that_of_the_projects_own_repository(repository, tmp_path, monkeypatch):
    revision = git(repository, "rev-parse", "HEAD")
    assert len(revision) == 40 and git_revision(repository) == revision
    (tmp_path / "link").symlink_to(repository)
    assert git_revision(tmp_path / "link") == revision
    assert git_revision(repository / "copy") is None  # somebody else's
    assert git_revision(tmp_path) is None
    git(repository / "copy", "init")
    assert git_revision(repository / "copy") is None  # without a commit
    git(repository, "worktree", "add", str(tmp_path / "worktree"))
    assert git_revision(tmp_path / "worktree") == revision
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))  # as git sets it for its hooks
    assert git_revision(tmp_path) is None


@pytest.mark.parametrize("there", [None, "#!/bin/sh\necho fatal >&2; exit 128\n", "no program"])
def test_without_git_there_is_no_revision(tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "git").write_text(there)
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts()["git_revision"] is None


def test_a_script_from_standard_input_is_named_in_its_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["-", "--data", "a b"])
    monkeypatch.setattr("sys.executable", "/bin/python3")
    assert facts(script="train.py")["command"] == "python3 train.py --data 'a b'"
    assert facts()["command"] == "python3 - --data 'a b'"
    monkeypatch.setattr("sys.argv", ["/there/train.py", "--data", "a"])
    assert facts(script="train.py")["command"] == "python3 /there/train.py --data a"


def test_a_run_explains_itself(monkeypatch):
    found = facts()
    assert found["versions"]["torch"] == torch.__version__
    assert set(found) == {"command", "versions", "machine", "git_revision"}
    assert facts(torch.device("cpu")) == found
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert facts(torch.device("cuda:1"))["machine"] == found["machine"] + ", GPU 1"

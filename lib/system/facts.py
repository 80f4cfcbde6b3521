"""What a run must tell of itself, to be repeated."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lib.system import distributed

if TYPE_CHECKING:
    import torch


def git_revision(project: Path) -> str | None:
    """The commit that the project in this folder is at. None where it is no repository of its own (it may lie in
    somebody else's, or among the files of a package), or there is no git that could tell."""
    command = ["git", "-C", str(project), "rev-parse", "--show-toplevel", "HEAD"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # of another one
    try:
        found = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, env=environment, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    folder, revision = os.fsdecode(found.stdout).strip().rsplit("\n", 1)
    return revision if Path(folder).resolve() == project.resolve() else None


def facts(device: "torch.device | None" = None, script: str | None = None) -> dict:
    """What a run must tell of itself: command, versions, machine (with the GPU, if `device` is one), git revision.

    `script` is the file of the command, where Python reads it from standard input and the command does not name it.
    """
    import torch  # not for `git_revision`

    packages = ("torch", "torchio", "nibabel", "numpy", "scipy", "SimpleITK")
    name, *arguments = sys.argv
    processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    gpu = f", {torch.cuda.get_device_name(device)}" if device and device.type == "cuda" else ""
    return {
        "command": shlex.join([Path(sys.executable).name, script if script and name == "-" else name, *arguments]),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}{processes}",
        "git_revision": git_revision(Path(__file__).parents[2]),
    }

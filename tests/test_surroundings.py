"""Whole commands where something is missing around them: streams, git, a file of the script, docstrings, the right to
write into the project. tests/test_screen.py has every way in which a stream can fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from niftis import write_patients

import train
from lib.models import Sauron

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--device", "cpu", "--epochs", "1"]


def shell(command, *argv, cwd=ROOT, **environment):
    """Run a line of a shell, in which $P is python and "$@" stands for `argv`; all parts of a pipe must succeed."""
    argv = ["bash", "-c", f"set -o pipefail; {command}", "bash", *map(str, argv)]
    environment = {**os.environ, "P": sys.executable, **environment}
    result = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not any(word in result.stderr for word in ("Traceback", "Exception ignored", "Broken pipe")), result.stderr
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny ACDC of four patients, predictions of two, and a model."""
    folder = tmp_path_factory.mktemp("place")
    write_patients(folder / "data", (2, 4, 5, 6))  # 2 is a test patient
    (folder / "pred").mkdir()
    for name in ("patient002", "patient004"):
        truth = folder / "data" / name / f"{name}_frame01_gt.nii.gz"
        shutil.copy(truth, folder / "pred" / f"{name}_frame01.nii.gz")
    torch.save(Sauron(1, 4, 4, 3).state_dict(), folder / "model")
    return folder


def training(place, output):
    folders = ["--data_path", place / "data", "--cache_path", place / "cache", "--output", output]
    return ["--data", "acdc", *folders, *SMALL]


def evaluation(place, output):
    return ["--data", "acdc", "--pred", place / "pred", "--gt", place / "data", "--output", output]


def run_of(output):
    return output / "unnamed" / "acdc" / "1"


@pytest.mark.parametrize(
    "command",
    [
        '$P evaluate.py "$@" --num_workers 1 <&- >&- 2>&-',
        '$P evaluate.py "$@" --num_workers 1 | true',
        'PYTHONUNBUFFERED=1 $P evaluate.py "$@" --num_workers 2 2>&1 | true',
        '$P - "$@" --num_workers 2 < evaluate.py',
        '$P "$NO_GUARD" "$@" --num_workers 2',
    ],
)
def test_evaluation_writes_its_results(place, tmp_path, command):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport evaluate\nevaluate.main(sys.argv[1:])\n")
    result = shell(command, *evaluation(place, tmp_path / "results.json"), NO_GUARD=str(script))
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "results.json").read_text())["average"]["dice"] == [1, 1, 1, 1]


def test_a_training_without_git_whose_reader_leaves(place, tmp_path):
    command = 'PATH=/nowhere PYTHONUNBUFFERED=1 $P train.py "$@" --num_workers 1 2>&1 | head -1'
    result = shell(command, *training(place, tmp_path))
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    assert (run_of(tmp_path) / "models" / "model-1").exists() and (run_of(tmp_path) / "report.html").exists()
    assert "report: " in (run_of(tmp_path) / "log.txt").read_text()
    assert json.loads((run_of(tmp_path) / "config.json").read_text())["git_revision"] is None


def test_a_prediction_with_all_streams_closed(place, tmp_path):
    argv = ["--data", "acdc", "--model_state", place / "model", "--original", place / "data", "--output", tmp_path]
    argv += ["--patch_size", "32", "32", "--no_tta"]
    assert shell('$P predict.py "$@" <&- >&- 2>&-', *argv).returncode == 0
    assert (tmp_path / "patient002_frame01.nii.gz").exists()


def test_bad_input_ends_as_ever_where_nobody_sees_it():
    assert shell("$P evaluate.py --nonsense >&- 2>&-").returncode == 2


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv, which takes root's rights away, is not here")
def test_a_training_in_a_read_only_project_in_anothers_repository(place, tmp_path):
    """From standard input; what it writes lies elsewhere."""
    project = tmp_path / "repository" / "project"
    shutil.copytree(ROOT / "lib", project / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", project)
    if shutil.which("git"):
        author = "-c user.name=a -c user.email=a@b -c commit.gpgsign=false"
        shell(f"git init && git {author} commit --allow-empty -m first", cwd=project.parent)
    shell("chmod -R a-w .", cwd=project)
    command = 'setpriv --bounding-set=-all $P - "$@" --num_workers 2 < train.py 2>&-'
    argv = training(place, tmp_path / "runs")
    assert shell("setpriv --bounding-set=-all touch new", cwd=project).returncode != 0
    result = shell(command, *argv, cwd=project, HOME=str(project))
    shell("chmod -R u+w .", cwd=project)
    assert result.returncode == 0, result.stdout
    run = run_of(tmp_path / "runs")
    assert (run / "models" / "model-1").exists() and (run / "report.html").exists()
    config = json.loads((run / "config.json").read_text())
    assert config["git_revision"] is None
    assert config["command"].split()[1:] == ["train.py", *map(str, argv), "--num_workers", "2"]


def test_what_fails_before_the_first_epoch_leaves_no_run_folder(place, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        train.main([*map(str, training(place, tmp_path)), "--num_workers", "0"])
    assert list(tmp_path.iterdir()) == []


def test_every_module_runs_without_docstrings():
    commands = [path.stem for path in (ROOT / "lib" / "experiments").glob("*.py") if "def main(" in path.read_text()]
    names = ["train", "predict", "evaluate", *(f"lib.experiments.{name}" for name in sorted(commands))]
    code = f"""
import importlib
for name in {names}:
    module = importlib.import_module(name)
    try:
        module.main(["--help"])
    except SystemExit as error:
        print("ended", error.code, module.__doc__)
"""
    result = shell('$P -OO -c "$1"', code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines().count("ended 0 None") == len(names) == 10

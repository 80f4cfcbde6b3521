"""Real processes that are killed, stopped and starved; what they leave behind is whole, and they continue as if nothing
had happened. `python -m pytest -m slow` makes the kills many."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from niftis import write_patients
from processes import PATIENCE, Fault, Script, wait_until

import predict
import train
from lib.data import DATASETS
from lib.data.loading import Loader
from lib.record import mixed_jobs

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training and a prediction that nothing disturbs, and the seconds that their parts take."""
    folder = tmp_path_factory.mktemp("whole")
    cases = DATASETS["acdc"].split_cases("0.5:0.5", 42)
    write_patients(folder / "data", cases["train"][:4] + cases["validation"][:2] + cases["test"][:3])

    def train_argv(output, *more):
        data = [
            "--data",
            "acdc",
            "--data_path",
            folder / "data",
            "--cache_path",
            output / "cache",
            "--split",
            "0.5:0.5",
        ]
        network = ["--fms_init", 4, "--levels", 3, "--patch_size", 16, 16, "--batch_size", 2, "--val_interval", 1]
        pruning = ["--rho", 1, "--tau_max", 0.3, "--kappa", 1, "--device", "cpu", "--epochs", EPOCHS]
        return [*data, *network, *pruning, "--output", output, "--num_workers", 0, *more]

    def predict_argv(output, *more):
        model = folder / "unnamed" / "acdc" / "1" / "models" / f"model-{EPOCHS}"
        argv = ["--data", "acdc", "--original", folder / "data", "--model_state", model, "--device", "cpu"]
        return [*argv, "--output", output, *more]

    times = folder / "times"
    assert Script("train", train_argv(folder), folder / "log", times=times).end() == 0, (folder / "log").read_text()
    assert Script("predict", predict_argv(folder / "out"), folder / "log", times=times).end() == 0
    seconds = {}
    for line in times.read_text().splitlines():
        target, value = line.split()
        seconds[target] = max(seconds.get(target, 0), float(value))
    run = folder / "unnamed" / "acdc" / "1"
    assert json.loads((run / "history.json").read_text())["filters"][-1] < 92  # some were pruned
    return SimpleNamespace(folder=folder, train=train_argv, predict=predict_argv, seconds=seconds, run=run)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(run, epoch=EPOCHS):
    return torch.load(run / "models" / f"model-{epoch}", weights_only=True)


def assert_same_run(run, whole):
    a, b = weights(whole.run), weights(run)
    assert list(a) == list(b) and all(value.equal(b[key]) for key, value in a.items())
    assert (run / "out_filters").read_text() == (whole.run / "out_filters").read_text()
    histories = (json.loads((r / "history.json").read_text()) for r in (run, whole.run))
    assert len({json.dumps({k: v for k, v in h.items() if k != "seconds"}) for h in histories}) == 1
    best = (torch.load(r / "models" / "model-best", weights_only=True) for r in (run, whole.run))
    assert all(x.equal(y) for x, y in zip(*(b.values() for b in best), strict=True))
    assert not list(run.rglob("*.tmp"))


def continue_training(output, whole, number=1):
    """Go on as a user would; returns the run."""
    run = output / "unnamed" / "acdc" / "1"
    argv = ["--resume", run] if (run / "config.json").exists() else whole.train(output)
    script = Script("train", argv, output / f"log{number}")
    assert script.end() == 0, script.text
    assert "Traceback" not in script.text
    return run


def is_running_in(folder):
    """Whether a process has a file of the folder open, or its name on the command line."""
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(file).startswith(f"{folder}/") for file in process.iterdir()):
                return True
        except OSError:
            continue
    return False


def kill_training(tmp_path, whole, target, seed):
    rng = random.Random(f"{target} {seed}")
    nth = 1 if target == "prepare" else rng.randint(1, EPOCHS - 1)
    fault = Fault(target, nth, rng.uniform(0, whole.seconds[target]))
    killed = Script("train", whole.train(tmp_path, "--num_workers", rng.choice([0, 2])), tmp_path / "log", fault)
    assert killed.end() == -signal.SIGKILL, killed.text
    assert_same_run(continue_training(tmp_path, whole), whole)
    assert not list((tmp_path / "cache").glob("*/.*-*"))


def kill_prediction(tmp_path, whole, target, seed):
    rng = random.Random(f"{target} {seed}")
    fault = Fault(target, rng.randint(1, 2), rng.uniform(0, whole.seconds[target]))
    assert Script("predict", whole.predict(tmp_path / "out"), tmp_path / "log", fault).end() == -signal.SIGKILL
    assert_prediction_continues(tmp_path, whole)


def assert_prediction_continues(tmp_path, whole):
    script = Script("predict", whole.predict(tmp_path / "out", "--skip_existing"), tmp_path / "log")
    assert script.end() == 0, script.text
    assert contents(tmp_path / "out") == contents(whole.folder / "out")


@pytest.mark.parametrize(("target", "seed"), [("prepare", 0), ("epoch", 0), ("epoch", 1), ("checkpoint", 0)])
def test_a_killed_training_continues_bit_for_bit(tmp_path, whole, target, seed):
    kill_training(tmp_path, whole, target, seed)


@pytest.mark.parametrize("target", ["prediction", "writing"])
def test_a_killed_prediction_is_finished(tmp_path, whole, target):
    kill_prediction(tmp_path, whole, target, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "seed"),
    [("prepare", s) for s in range(10, 16)]
    + [("epoch", s) for s in range(10, 24)]
    + [("checkpoint", s) for s in range(10, 26)],
)
def test_many_killed_trainings(tmp_path, whole, target, seed):
    kill_training(tmp_path, whole, target, seed)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "seed"), [(t, s) for t in ("prediction", "writing") for s in range(10, 15)])
def test_many_killed_predictions(tmp_path, whole, target, seed):
    kill_prediction(tmp_path, whole, target, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_training_that_is_killed_again_and_again(tmp_path, whole, seed):
    rng = random.Random(seed)
    argv, run = whole.train(tmp_path), tmp_path / "unnamed" / "acdc" / "1"
    for kill in range(4):
        target = rng.choice(["epoch", "checkpoint"])
        fault = Fault(target, 1, rng.uniform(0, whole.seconds[target]))
        script = Script("train", argv, tmp_path / f"log{kill}", fault)
        assert script.end() == -signal.SIGKILL, script.text
        argv = ["--resume", run]
    assert_same_run(continue_training(tmp_path, whole, 9), whole)


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)])
def test_a_signal_ends_a_training_that_continues_bit_for_bit(tmp_path, whole, number, code, workers):
    fault = Fault("epoch", 2, whole.seconds["epoch"] / 2, number)
    script = Script("train", whole.train(tmp_path, "--num_workers", workers), tmp_path / "log", fault)
    assert script.end() == code, script.text
    run = tmp_path / "unnamed" / "acdc" / "1"
    assert f"stopped by {number.name}; to continue: python train.py --resume {run}" in script.text
    assert "Traceback" not in script.text
    assert_same_run(continue_training(tmp_path, whole), whole)


def test_a_signal_to_all_processes_ends_the_preprocessing(tmp_path, whole):
    """As a terminal, torchrun or a batch system sends it: the processes that preprocess end at once."""
    fault = Fault("prepare", 1, whole.seconds["prepare"] / 2, signal.SIGTERM, group=True)
    script = Script("train", whole.train(tmp_path), tmp_path / "log", fault, prepare=os.setsid)
    assert script.end() == 143, script.text
    assert script.text.splitlines()[-1].endswith("stopped by SIGTERM") and "Traceback" not in script.text
    assert_same_run(continue_training(tmp_path, whole), whole)


def test_a_signal_ends_a_prediction_that_can_be_finished(tmp_path, whole):
    fault = Fault("prediction", 2, 0, signal.SIGTERM)
    script = Script("predict", whole.predict(tmp_path / "out"), tmp_path / "log", fault)
    assert script.end() == 143, script.text
    assert "stopped by SIGTERM; what is written is whole; go on with --skip_existing" in script.text
    assert "Traceback" not in script.text
    assert_prediction_continues(tmp_path, whole)


def test_ctrl_c_in_a_shell_ends_the_worker_processes_too(tmp_path, whole):
    argv = [sys.executable, ROOT / "train.py", *whole.train(tmp_path, "--num_workers", 2, "--epochs", 1000)]
    with open(tmp_path / "log", "w") as log:
        shell = subprocess.Popen([*map(str, argv)], stdout=log, stderr=log, start_new_session=True)
    run = tmp_path / "unnamed" / "acdc" / "1"
    wait_until(lambda: (run / "models" / "state-1").exists() or shell.poll() is not None)
    assert shell.poll() is None, (tmp_path / "log").read_text()
    os.killpg(shell.pid, signal.SIGINT)  # a terminal sends it to all processes of the foreground
    assert shell.wait(PATIENCE) == 130
    text = (tmp_path / "log").read_text()
    assert f"python train.py --resume {run}" in text
    assert "Traceback" not in text
    wait_until(lambda: not is_running_in(tmp_path))


def test_a_process_that_preprocesses_ends_with_the_one_that_started_it(tmp_path, whole):
    fault = Fault("prepare", 1, whole.seconds["prepare"] / 2)
    assert Script("train", whole.train(tmp_path), tmp_path / "log", fault).end() == -signal.SIGKILL
    wait_until(lambda: not is_running_in(tmp_path))


def assert_stopped_in_one_line(script, run, epoch, reason):
    assert script.end() == 2, script.text
    assert "Traceback" not in script.text
    assert reason in script.text.splitlines()[-1] and str(run) in script.text.splitlines()[-1]
    assert not list(run.rglob("*.tmp"))
    assert len(weights(run, epoch)) == len(weights(run, epoch))


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, whole):
    fault = Fault("checkpoint", 3, action="limit")
    script = Script("train", whole.train(tmp_path), tmp_path / "log", fault)
    run = tmp_path / "unnamed" / "acdc" / "1"
    assert_stopped_in_one_line(script, run, 2, "cannot be written (File too large)")
    assert_same_run(continue_training(tmp_path, whole), whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a file system can only be mounted by root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("target", ["epoch", "checkpoint"])
def test_a_small_disk_that_fills_up(small_disk, tmp_path, whole, target):
    fault = Fault(target, 3, action="full", path=small_disk / "filler")
    script = Script("train", whole.train(small_disk), tmp_path / "log", fault)
    run = small_disk / "unnamed" / "acdc" / "1"
    assert_stopped_in_one_line(script, run, 2, "No space left on device")
    (small_disk / "filler").unlink()
    assert_same_run(continue_training(small_disk, whole), whole)


def test_a_read_only_folder(small_disk, whole, capsys):
    output = small_disk / "out"
    output.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for main, argv in ((train.main, whole.train(output)), (predict.main, whole.predict(output / "p"))):
        capsys.readouterr()
        assert main([*map(str, argv)]) == 2
        assert str(small_disk) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damaged", ["model", "state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, whole, damaged):
    killed = Script("train", whole.train(tmp_path), tmp_path / "log", Fault("epoch", 4))
    assert killed.end() == -signal.SIGKILL
    run = tmp_path / "unnamed" / "acdc" / "1"
    path = run / "models" / f"{damaged}-3"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused = Script("predict", whole.predict(tmp_path / "out", "--model_state", path), tmp_path / "log")
    if damaged == "model":
        assert refused.end() == 2
        assert f"the newest good one is {run}/models/model-2" in refused.text
    assert not (tmp_path / "out").exists() or refused.end() == 2
    assert_same_run(continue_training(tmp_path, whole), whole)
    assert "model or state of epoch 3 is damaged; continuing after epoch 2" in (tmp_path / "log1").read_text()


def test_a_second_process_on_one_run_folder_is_refused(tmp_path, whole):
    go = tmp_path / "go"
    first = Script("train", whole.train(tmp_path), tmp_path / "log", Fault("epoch", 2, action="wait", path=go))
    first.wait_for("epoch 1/4 |")
    run = tmp_path / "unnamed" / "acdc" / "1"
    second = Script("train", ["--resume", run], tmp_path / "log2")
    assert second.end() == 2
    assert f"{run}: another command is writing there; wait for its end" in second.text.splitlines()[-1]
    assert "Traceback" not in second.text
    go.touch()
    assert first.end() == 0
    assert_same_run(run, whole)


def test_a_killed_training_with_workers_leaves_no_lock(tmp_path, whole):
    """The workers, which live on for a moment, do not hold it."""
    fault = Fault("epoch", 2, whole.seconds["epoch"] / 2)
    killed = Script("train", whole.train(tmp_path, "--num_workers", 2), tmp_path / "log", fault)
    assert killed.end() == -signal.SIGKILL, killed.text
    assert_same_run(continue_training(tmp_path, whole), whole)


def test_a_second_prediction_into_one_folder_is_refused(tmp_path, whole):
    go, out = tmp_path / "go", tmp_path / "out"
    first = Script("predict", whole.predict(out), tmp_path / "log", Fault("prediction", 2, action="wait", path=go))
    wait_until(lambda: list(out.glob("*.nii.gz")) or not first.process.is_alive())
    other = ["--model_state", whole.run / "models" / f"model-{EPOCHS - 1}"]
    for flag in ("--skip_existing", "--overwrite"):
        second = Script("predict", whole.predict(out, *other, flag), tmp_path / "log2")
        assert second.end() == 2
        assert f"{out}: another command is writing there; wait for its end" in second.text.splitlines()[-1]
    go.touch()
    assert first.end() == 0, first.text
    assert contents(out) == contents(whole.folder / "out")


def test_of_two_predictions_that_start_at_once_one_works(tmp_path, whole):
    models = [whole.run / "models" / f"model-{epoch}" for epoch in (EPOCHS, EPOCHS - 1)]
    argv = [whole.predict(tmp_path / "new" / "out", "--model_state", model) for model in models]
    scripts = [Script("predict", argv[i], tmp_path / f"log{i}") for i in range(2)]
    codes = [script.end() for script in scripts]
    assert sorted(codes) == [0, 2], [script.text for script in scripts]
    model = models[codes.index(0)]
    assert json.loads((tmp_path / "new" / "out" / "model.json").read_text())["model"] == str(model)
    assert mixed_jobs(tmp_path / "new" / "out", contents(whole.folder / "out")) is None
    assert len(contents(tmp_path / "new" / "out")) == len(contents(whole.folder / "out"))


def test_two_processes_that_start_at_once_share_the_cache_and_take_two_run_folders(tmp_path, whole):
    scripts = [Script("train", whole.train(tmp_path), tmp_path / f"log{i}") for i in range(2)]
    assert [script.end() for script in scripts] == [0, 0]
    for number in ("1", "2"):
        assert_same_run(tmp_path / "unnamed" / "acdc" / number, whole)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_workers_does_not_change_the_weights(tmp_path, whole, workers):
    script = Script("train", whole.train(tmp_path, "--num_workers", workers), tmp_path / "log")
    assert script.end() == 0
    assert_same_run(tmp_path / "unnamed" / "acdc" / "1", whole)


# Files that would run code


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    """A file that is there if a payload ran."""
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it does what it should
    marker.unlink()
    yield marker
    assert not marker.exists()


@pytest.mark.parametrize("write", [lambda p, x: p.write_bytes(pickle.dumps(x)), lambda p, x: torch.save({"a": x}, p)])
def test_a_malicious_model_or_history_runs_nothing(tmp_path, whole, marker, write, capsys):
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    (run / "config.json").write_text((whole.run / "config.json").read_text())
    write(run / "models" / "model-2", Payload(marker))
    write(run / "models" / "state-2", Payload(marker))
    good, bad = whole.run / "models" / "model-3", run / "models" / "model-2"
    for main, argv in [
        (predict.main, whole.predict(tmp_path / "out", "--model_state", bad)),
        (train.main, whole.train(tmp_path, "--model_state", bad)),
        (train.main, ["--resume", run]),
        (train.main, ["--data", "acdc", "--epoch_start", 2, "--model_state", good, "--history", run]),
        (train.main, whole.train(tmp_path, "--in_filters", bad, "--out_filters", bad)),
    ]:
        assert main([*map(str, argv)]) == 2
        assert str(run) in capsys.readouterr().err.splitlines()[-1]


def test_a_malicious_cache_runs_nothing_and_is_made_anew(tmp_path, whole, marker):
    data = {"data_path": whole.folder / "data", "cache_path": tmp_path / "cache", "split": "0.5:0.5"}
    Loader(DATASETS["acdc"], **data).prepare()
    image = next(tmp_path.glob("cache/*/*/image.npy"))
    before = image.read_bytes()
    np.save(image, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    Loader(DATASETS["acdc"], **data).prepare()
    assert image.read_bytes() == before

"""What train.py's work is made of; whole trainings are in tests/test_cli.py and many others."""

import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lib.build import build_model
from lib.models import Sauron, load_model
from lib.settings import Settings
from lib.system.error import InputError
from lib.training import Task, beginning, choose_precision, expectation, introduction, read_task, train
from lib.utils import parseArguments

SMALL = ["--data", "phantom", "--fms_init", "2", "--levels", "3", "--patch_size", "16", "16", "--device", "cpu"]


@pytest.mark.parametrize("flags", [[], ["--model", "nnunet"], ["--imp_fun", "random"], ["--lambda", "0"]], ids=str)
def test_a_long_training_is_told_what_a_smaller_network_takes(flags):
    settings = Settings.of(vars(parseArguments([*SMALL, "--fms_init", "16", *flags])))
    (line, whole) = expectation(settings, build_model(settings), n_batches=10**7, epochs=60, new=True)
    assert "; with --fms_init 8 about " in line and whole.startswith("60 epochs: about ")
    (line, _) = expectation(settings, build_model(replace(settings, fms_init=18)), n_batches=10**7, epochs=60, new=True)
    assert "--fms_init" not in line  # widths of filter files or of weights
    (line, _) = expectation(settings, build_model(settings), n_batches=10**7, epochs=60, new=False)
    assert "--fms_init" not in line  # a run that goes on


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


def argv(place, *more):
    places = ["--data_path", place / "data", "--cache_path", place / "cache", "--output", place / "runs"]
    return [*SMALL, *map(str, places), "--num_workers", "0", *more]


def task(**changes):
    settings = Settings.of({"data": "phantom"})
    made = Task(settings, torch.device("cpu"), None, {}, 0, None, None, False, None, False)
    return replace(made, **changes)


def test_a_training_ends_with_its_state_and_goes_on_to_the_same_bits(place):
    with ExitStack() as held:
        whole = train(argv(place, "--epochs", "2"), held)
    assert whole.epoch == 2 and len(whole.rows) == 2 and whole.rule.measures
    with ExitStack() as held:
        first = train(argv(place, "--epochs", "2", "--exp_name", "halves", "--val_interval", "1"), held)
    run = first.folder
    for name in ("model-2", "state-2", "SHA256SUMS"):
        (run / "models" / name).unlink()  # as if it had been stopped after epoch 1
    with ExitStack() as held:
        second = train(["--resume", str(run)], held)
    assert second.epoch == 2 and [row["epoch"] for row in second.rows] == [1, 2]
    for key, value in load_model(whole.folder / "models" / "model-2").state_dict().items():
        assert value.equal(second.model.state_dict()[key])
    config = json.loads((run / "config.json").read_text())
    assert [times["after_epoch"] for times in config["continued"]] == [1]


def test_a_finished_run_needs_more_epochs(place):
    with ExitStack() as held, pytest.raises(InputError, match="--epochs 2: epoch 2 is finished"):
        read_task(parseArguments(["--resume", str(place / "runs" / "unnamed" / "phantom" / "1")]), held)


def test_a_new_task(place):
    with ExitStack() as held:
        new = read_task(parseArguments(argv(place, "--epochs", "3")), held)
    assert (new.run, new.epoch, new.source, new.progress, new.history) == (None, 0, None, None, None)
    assert new.settings.epochs == 3 and not new.resumes and not new.accepts_changes


def test_the_precision_is_timed_for_a_new_run_on_the_cpu_alone(monkeypatch):
    timed = []
    monkeypatch.setattr("lib.training.faster_precision", lambda *_: timed.append(1) or ("bfloat16", "a line"))
    data = SimpleNamespace(batch_size=1, patch_size=(8, 8))
    model = Sauron(1, 2, 2, 3)

    def chosen(amp, **changes):
        made = task(settings=Settings.of({"data": "phantom", "amp": amp} | changes.pop("settings", {})), **changes)
        settings, note = choose_precision(made, model, None, data)
        return settings.precision, note

    assert chosen(False) == ("float32", [])
    assert chosen(True, run="a run of the time before it was noted") == ("bfloat16", [])
    assert chosen(True, settings={"precision": "float32"}) == ("float32", [])
    assert not timed
    assert chosen(True) == ("bfloat16", ["a line"]) and len(timed) == 1


def test_what_the_log_says_at_the_start(tmp_path):
    data = SimpleNamespace(ids={"train": ["a", "b"], "validation": []}, n_missing=3, notes=["a note"])
    missing = "phantom: 3 subjects are not on disk; the split is that of the whole data set"
    assert introduction(task(), data, "here") == [
        "run folder: here",
        "phantom: 2 train, 0 validation",
        missing,
        "a note",
    ]
    data.n_missing = 0
    assert len(introduction(task(), data, "here")) == 3
    for epoch in (3, 4):
        for kind in ("model", "state"):
            (tmp_path / "models").mkdir(exist_ok=True)
            (tmp_path / "models" / f"{kind}-{epoch}").touch()
    assert beginning(task(), None, tmp_path) == ["sauron on cpu: weights new"]
    first, damaged = beginning(task(epoch=3, source="model-3", resumes=True), None, tmp_path)
    assert first == "sauron on cpu: weights of model-3"
    assert damaged == "model or state of epoch 4 is damaged; continuing after epoch 3, the newest good one"

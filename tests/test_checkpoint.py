import json

import pytest
import torch

from lib import checkpoint
from lib.checkpoint import TrainingState
from lib.error import InputError
from lib.models import Sauron
from lib.pruning import Threshold


def make_state(folder, epoch=3):
    (folder / "models").mkdir(parents=True, exist_ok=True)
    model = Sauron(1, 2, 2, 3)
    model.initialize()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(1, 1, 8, 8))[0].mean().backward()
    optimizer.step()
    rows = [{"epoch": 1, "train_loss": 0.5, "in_filters": {"b": 1, "a": 2}, "out_filters": {"b": 3, "a": 4}}]
    return TrainingState(model, optimizer, folder, print, epoch, rows, thresholds={"a": Threshold(2, 1, 0, 4)})


def test_round_trip_of_everything(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    drawn = torch.rand(3)
    other = make_state(tmp_path / "other", epoch=0)
    other.model.initialize(model_state=tmp_path / "models" / "model-3")
    checkpoint.restore(other, checkpoint.read_training(tmp_path / "models" / "state-3"))
    assert torch.rand(3).equal(drawn)  # the random state is that of the moment of saving
    assert (other.epoch, other.rows, other.thresholds) == (3, state.rows, state.thresholds)
    for a, b in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert a.equal(b)
        assert state.optimizer.state[a]["exp_avg"].equal(other.optimizer.state[b]["exp_avg"])


def test_only_the_newest_pair_and_the_best_model_stay(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    checkpoint.save_model(tmp_path / "models" / "model-best", state.model)
    state.epoch = 4
    checkpoint.save(state)
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["model-4", "model-best", "state-4"]
    assert checkpoint.newest_epoch(tmp_path) == 4


def test_a_model_without_its_state_does_not_count(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    checkpoint.save_model(tmp_path / "models" / "model-4", state.model)  # stopped between the two files
    assert checkpoint.newest_epoch(tmp_path) == 3
    with pytest.raises(InputError, match="no finished epoch"):
        checkpoint.newest_epoch(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    checkpoint.write_text(path, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_broken_state_files_are_refused(tmp_path):
    (tmp_path / "state-1").write_bytes(b"PK\x03\x04 garbage")
    torch.save({"something": 1}, tmp_path / "state-2")
    for name in ("state-1", "state-2", "state-3"):
        with pytest.raises(InputError, match=name):
            checkpoint.read_training(tmp_path / name)


def test_history_and_filter_files(tmp_path):
    state = make_state(tmp_path)
    state.validation = {"1": {"loss": 0.25, "dice": {"patient001_frame01": [1.0, None]}}}
    checkpoint.save_history(state)
    checkpoint.save_filters(state)
    assert json.loads((tmp_path / "history.json").read_text()) == {"epoch": [1], "train_loss": [0.5]}
    assert json.loads((tmp_path / "validation_scores.json").read_text())["1"]["loss"] == 0.25
    assert (tmp_path / "in_filters").read_text() == "a\tb\n2\t1\n"
    assert (tmp_path / "out_filters").read_text() == "a\tb\n4\t3\n"


def test_run_folders_are_numbered(tmp_path):
    config = {"output": str(tmp_path), "exp_name": "e", "data": "d"}
    assert [checkpoint.new_run_folder(config).name for _ in range(3)] == ["1", "2", "3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        checkpoint.new_run_folder(config | {"output": str(tmp_path / "file")})

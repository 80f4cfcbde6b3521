from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchio as tio

from lib.callback import (
    _end_epoch_log,
    _end_epoch_measure,
    _end_epoch_prune,
    _end_epoch_save_all_FMs,
    _end_epoch_save_best,
    callbacks,
    fixed_image,
    tensorboard,
)
from lib.checkpoint import TrainingState
from lib.error import InputError
from lib.models import Sauron, summary
from lib.models.BaseModel import read_state

BOUNDS = {"between": (0, 100), "min_filters": 1, "max_prune_fraction": 1.0}
RULE = {"tau_max": 0.3, "kappa": 15, "rho": 1, "mu": 0.02, **BOUNDS}
BUDGET = {"max_flops": None, "max_ms": None, "patch_size": (8, 8), **BOUNDS, "between": (0, 10)}


@pytest.fixture
def state(tmp_path):
    (tmp_path / "models").mkdir()
    torch.manual_seed(0)
    model = Sauron(1, 3, 4, 3)
    model.initialize()
    lines = []
    state = TrainingState(model, torch.optim.Adam(model.parameters()), tmp_path, lines.append, epoch=1)
    state.lines = lines
    state.unpruned = summary(model, (8, 8))
    state.rows = [row(1.0, 1.0)]
    state.delta_prune = {
        block.name: (torch.ones(block.out_filters).index_fill(0, torch.tensor(0), 0), 0)
        for block in model.blocks()
        if not block.head
    }
    return state


def row(train_loss, val_loss, dice=(0.9, 0.5, None)):
    return {"train_loss": train_loss, "val_loss": val_loss, "val_dice": list(dice), "seconds": 2.0, "lr": 0.1}


def test_nothing_goes_while_all_distances_are_large(state):
    _end_epoch_prune(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    assert state.rows[-1]["filters"] == state.unpruned["filters"]
    assert set(state.rows[-1]["tau"].values()) == {0.001}


def test_filters_closer_than_tau_go_and_the_reference_stays(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.tensor([0.0009, 0.0, 0.0011, 0.5]), 1)
    kept = state.model.encoder[1].seq[0].weight[1:].clone()
    _end_epoch_prune(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    assert state.rows[-1]["out_filters"]["enc_ConvBlock_2"] == 3
    assert state.rows[-1]["in_filters"]["enc_ConvBlock_3"] == 3
    assert state.model.encoder[1].seq[0].weight.equal(kept)
    threshold = state.thresholds["enc_ConvBlock_2"]
    assert (threshold.lost, threshold.filters_before) == (1, 4)


def test_nothing_goes_outside_the_given_epochs(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    for between, left in (((1, 9), 4), ((0, 0.9), 4), ((0, 1), 1)):
        _end_epoch_prune(state, **RULE | {"between": between})
        assert state.model.encoder[1].seq[0].out_channels == left
        assert set(state.rows[-1]["tau"].values()) == {0.001}


def test_a_block_that_lost_filters_waits_while_the_others_rise(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.tensor([0.0, 0.0, 1.0, 1.0]), 1)
    _end_epoch_prune(state, **RULE)
    state.rows.append(row(1.0, 1.0))  # settled: rho = 1
    state.delta_prune["enc_ConvBlock_2"] = (torch.ones(3), 0)
    _end_epoch_prune(state, **RULE)
    assert state.rows[-1]["tau"]["enc_ConvBlock_2"] == 0.001
    assert state.rows[-1]["tau"]["enc_ConvBlock_1"] == pytest.approx(0.001 + 0.299 / 15)
    assert state.rows[-1]["patience"]["enc_ConvBlock_1"] == 1


def test_without_a_validation_set_the_training_loss_decides(state):
    state.validates = False
    state.rows = [row(1.0, None), row(1.0, None)]
    _end_epoch_prune(state, **RULE)
    assert state.rows[-1]["tau"]["enc_ConvBlock_1"] > 0.001


def test_a_block_of_one_filter_is_left_alone(state):
    model = Sauron(1, 3, 4, 3, filters={"out": {"enc_ConvBlock_2": 1}})
    state.model, state.optimizer = model, torch.optim.Adam(model.parameters())
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(1), 0)
    _end_epoch_prune(state, **RULE)
    assert model.encoder[1].seq[0].out_channels == 1


def test_the_best_model_is_that_of_the_lowest_validation_loss(state):
    best = state.folder / "models" / "model-best"
    _end_epoch_save_best(state)
    first = best.read_bytes()
    torch.nn.init.zeros_(state.model.encoder[0].seq[0].weight)
    for loss in (1.5, 1.0, None):  # worse, equal, not validated; Dice does not count
        state.rows.append(row(1, loss, dice=(1.0, 0.9, 0.9)))
        _end_epoch_save_best(state)
    assert best.read_bytes() == first
    state.rows.append(row(1, 0.75, dice=(0.9, 0.1, 0.1)))
    _end_epoch_save_best(state)
    assert best.read_bytes() != first
    assert state.best_loss == 0.75


def test_the_best_model_is_written_before_the_pruning(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    with tensorboard(state.folder, 0) as writer:
        every = callbacks(patch_size=(8, 8), epochs=1, class_names=("a", "b", "c"), writer=writer, pruning=RULE)
        for callback in every:
            callback(state)
    widths = [
        len(read_state(state.folder / "models" / name)["encoder.1.seq.0.weight"]) for name in ("model-best", "model-1")
    ]
    assert widths == [4, 1]


def test_feature_maps_of_the_network_as_it_is_go_to_one_file_per_block(state):
    image = torch.randn(1, 1, 8, 8)
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    _end_epoch_prune(state, **RULE)
    _end_epoch_save_all_FMs(state, image, every=2)
    assert not (state.folder / "fms").exists()  # epoch 1
    state.epoch = 2
    _end_epoch_save_all_FMs(state, image, every=2)
    folder = state.folder / "fms" / "epoch-0002"
    blocks = {block.name: block.out_filters for block in state.model.blocks()}
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.npy" for name in blocks)
    found = {name: np.load(folder / f"{name}.npy") for name in blocks}
    assert {name: len(maps) for name, maps in found.items()} == blocks
    assert blocks["enc_ConvBlock_2"] == 1
    assert found["enc_ConvBlock_3"].shape == (8, 4, 4)
    with torch.no_grad():
        expected = state.model.feature_maps(image)
        for name, maps in expected:
            assert found[name].dtype == np.float16
            assert found[name] == pytest.approx(maps[0].numpy(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("patch_size", "expected"), [((3, 4), np.s_[1:4, 0:4, 2]), ((3, 2, 2), np.s_[1:4, 1:3, 1:3]), ((3, 6), None)]
)
def test_the_fixed_image_is_the_middle_of_the_first_validation_volume(patch_size, expected):
    volume = torch.randn(1, 5, 4, 5 if len(patch_size) == 2 else 4)
    subject = tio.Subject(image=tio.ScalarImage(tensor=volume))
    data = SimpleNamespace(ids={"validation": ["v"]}, patch_size=patch_size, get=lambda _: [subject])
    image = fixed_image(data)
    assert image.shape == (1, 1, *patch_size)
    if expected:
        assert image[0, 0].equal(volume[0][expected])
    else:
        assert image[0, 0].equal(torch.nn.functional.pad(volume[0, 1:4, :, 2], (1, 1)))
    data.ids["validation"] = []
    with pytest.raises(InputError, match="--save_fms"):
        fixed_image(data)


def test_the_line_of_an_epoch(state):
    _end_epoch_prune(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    _end_epoch_log(state, epochs=61)
    assert state.lines == [
        "epoch 1/61 | loss 1.0000 | val 1.0000 | Dice 0.500 - | filters 100.0% | parameters 100.0% | FLOPs 100.0% "
        "| tau 0.001 | 2.0 s | ETA 0:02:00"
    ]

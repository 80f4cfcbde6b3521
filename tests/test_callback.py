from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchio as tio
from epoch import made_up_state, row

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
from lib.models.BaseModel import read_state
from lib.pruning.rules import Bounds, BudgetRule, PaperRule
from lib.system.error import InputError

BOUNDS = Bounds(between=(0, 100), min_filters=1)


@pytest.fixture
def state(tmp_path):
    return made_up_state(tmp_path, PaperRule(0.3, 15, 1, 0.02, BOUNDS))


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
        every = callbacks(patch_size=(8, 8), epochs=1, class_names=("a", "b", "c"), writer=writer)
        for callback in every:
            callback(state)
    widths = [
        len(read_state(state.folder / "models" / name)["encoder.1.seq.0.weight"]) for name in ("model-best", "model-1")
    ]
    assert widths == [4, 1]


def test_feature_maps_of_the_network_as_it_is_go_to_one_file_per_block(state):
    image = torch.randn(1, 1, 8, 8)
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    _end_epoch_prune(state)
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


def test_from_the_budget_on_the_best_model_is_one_that_fits(state):
    every = partial(callbacks, patch_size=(8, 8), epochs=9, class_names=("a", "b", "c"))
    flops = state.unpruned["flops"]
    state.rule = BudgetRule(0.5 * flops, None, Bounds(between=(0, 1), min_filters=1), (8, 8), flops)
    with tensorboard(state.folder, 0) as writer:
        state.delta_prune = {name: (delta / 2, r) for name, (delta, r) in state.delta_prune.items()}
        for callback in every(writer=writer):
            callback(state)
        assert state.rule.done == 1 and state.best_loss == float("inf")
        best = state.folder / "models" / "model-best"
        assert len(read_state(best)["encoder.5.seq.0.weight"]) == 16  # as it was scored, before the pruning
        state.epoch = 2
        state.rows.append(row(2.0, 2.0) | {"epoch": 2})  # worse than the unpruned one
        for callback in every(writer=writer):
            callback(state)
    assert state.best_loss == 2.0
    small = read_state(best)
    assert all(value.equal(small[key]) for key, value in state.model.state_dict().items())


def test_the_milliseconds_in_the_line_of_an_epoch(state):
    flops = state.unpruned["flops"]
    state.rule = BudgetRule(1.0, None, Bounds(between=(0, 10), min_filters=1), (8, 8), flops)
    _end_epoch_prune(state)
    _end_epoch_measure(state, (8, 8))
    state.rows[-1]["ms"] = 1.234
    _end_epoch_log(state, epochs=2)
    assert "| tau 0.101 | 1.23 ms | 2.0 s |" in state.lines[-1]


def test_the_line_of_an_epoch(state):
    _end_epoch_prune(state)
    _end_epoch_measure(state, (8, 8))
    _end_epoch_log(state, epochs=61)
    assert state.lines == [
        "epoch 1/61 | loss 1.0000 | val 1.0000 | Dice 0.500 - | filters 100.0% | parameters 100.0% | FLOPs 100.0% "
        "| tau 0.001 | 2.0 s | ETA 0:02:00"
    ]

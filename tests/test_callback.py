from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchio as tio

import lib.callback
from lib import checkpoint
from lib.callback import (
    _end_epoch_log,
    _end_epoch_measure,
    _end_epoch_prune,
    _end_epoch_prune_to_budget,
    _end_epoch_save_all_FMs,
    _end_epoch_save_best,
    callbacks,
    fixed_image,
    tensorboard,
)
from lib.checkpoint import TrainingState
from lib.models import Sauron
from lib.models.BaseModel import read_state
from lib.models.size import count_filters, resized, summary
from lib.pruning import budget_tau, prune
from lib.system.error import InputError

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
    state.rows = [row(1.0, 1.0) | {"epoch": 1}]
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


@pytest.mark.parametrize(("min_filters", "fraction", "left"), [(2, 1.0, 2), (1, 0.5, 2), (1, 0.3, 3), (9, 1.0, 4)])
def test_a_block_keeps_some_filters(state, min_filters, fraction, left):
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    _end_epoch_prune(state, **RULE | {"min_filters": min_filters, "max_prune_fraction": fraction})
    assert state.model.encoder[1].seq[0].out_channels == left


@pytest.mark.parametrize(("min_filters", "feeds_a_head"), [(1, 1), (2, 3)])  # 1: the published rule
def test_a_block_that_feeds_a_head_keeps_as_many_filters_as_there_are_classes(state, min_filters, feeds_a_head):
    for name, (delta, r) in state.delta_prune.items():
        state.delta_prune[name] = (torch.zeros_like(delta), r)
    _end_epoch_prune(state, **RULE | {"min_filters": min_filters})
    out = count_filters(state.model)["out"]
    assert (out.pop("dec_ConvBlock_4"), out.pop("dec_Sequential_1")) == (feeds_a_head, 3)
    assert set(out.values()) == {min_filters}


# To a budget


@pytest.fixture
def start(state):
    state.epoch, state.rows = 0, []
    return state


def go_on(state, until, **settings):
    """Epochs that prune to a budget, until one of them or (None) until it is met; every block draws its distances."""
    while not state.budget_met if until is None else state.epoch < until:
        state.epoch += 1
        state.rows.append(row(1.0, 1.0) | {"epoch": state.epoch})
        generator = torch.Generator().manual_seed(state.epoch)
        state.delta_prune = {}
        for block in state.model.blocks():
            if not block.head and not state.budget_met:  # fit measures nothing any more
                delta = torch.rand(block.out_filters, generator=generator)
                delta[1 % block.out_filters] = 0
                state.delta_prune[block.name] = (delta, 1 % block.out_filters)
        _end_epoch_prune_to_budget(state, **BUDGET | settings)
        _end_epoch_measure(state, (8, 8))


def widths(row):
    return {name: n for name, n in row["out_filters"].items() if "Sequential" not in name}


def test_on_the_way_to_a_budget_all_thresholds_climb_evenly_past_tau_max(start):
    go_on(start, 12, max_flops=1.0, between=(2, 10))
    for row_ in start.rows:
        assert set(row_["tau"]) == set(widths(row_)) and row_["budget_met"] is False and row_["ms"] is None
        (threshold,) = set(row_["tau"].values())
        assert threshold == budget_tau(row_["epoch"], (2, 10))
    filters = [row_["filters"] for row_ in start.rows]
    assert filters[:2] == [92, 92]  # nothing goes before the first moment ...
    assert sorted(filters[1:10], reverse=True) == filters[1:10] and filters[2] < 92
    assert filters[9:] == [12, 12, 12]  # ... or after the second one: 12 blocks, 1 filter each
    assert set(start.rows[9]["tau"].values()) == {1.0}


def test_an_epoch_deletes_the_nearest_filters_and_no_more_than_needed(start, monkeypatch):
    keeps = []
    monkeypatch.setattr(lib.callback, "prune", lambda *args: keeps.append(args[-1]) or prune(*args))
    limit = 0.5 * start.unpruned["flops"]
    go_on(start, None, max_flops=limit, min_filters=2)
    before, after = (widths(row_) for row_ in start.rows[-2:])
    gone = []
    for name, indices in keeps[-1].items():
        delta, r = start.delta_prune[name]
        assert r in indices
        gone += [(delta[c].item(), name) for c in range(len(delta)) if c not in indices]
    stayed = []
    for name, n in before.items():
        delta, r = start.delta_prune[name]
        assert after[name] == n - sum(other == name for _, other in gone)
        floor = 3 if name == "dec_ConvBlock_4" else 2
        indices = keeps[-1].get(name, torch.arange(n)).tolist()
        stayed += [delta[c].item() for c in indices if c != r and after[name] > floor]
    assert max(gone)[0] < min(stayed)  # the smallest delta_prune first
    assert max(gone)[0] < start.rows[-1]["tau"]["enc_ConvBlock_1"]
    assert start.rows[-1]["flops"] <= limit
    _, last = max(gone)
    assert summary(resized(start.model, after | {last: after[last] + 1}), (8, 8))["flops"] > limit
    assert start.lines == [
        f"budget met after epoch {start.epoch}: {start.rows[-1]['flops']:,} FLOPs "
        f"({100 * start.rows[-1]['flops'] / start.unpruned['flops']:.1f}%); nothing more is pruned"
    ]


def test_a_network_that_fits_already_loses_nothing(start):
    go_on(start, None, max_flops=float(start.unpruned["flops"]))
    assert start.epoch == 1 and start.rows[0]["filters"] == 92


def test_once_met_nothing_is_pruned_any_more_not_even_after_a_resume(start):
    settings = {"max_flops": 0.5 * start.unpruned["flops"]}
    go_on(start, None, **settings)
    met = start.epoch
    assert met < 9
    checkpoint.save(start)
    again = TrainingState(start.model, start.optimizer, start.folder, start.lines.append, unpruned=start.unpruned)
    checkpoint.restore(again, checkpoint.read_training(start.folder / "models" / f"state-{met}"))
    for state in (start, again):
        go_on(state, met + 2, **settings | {"max_flops": 1.0})
        assert [widths(r) for r in state.rows[met - 1 :]] == [widths(state.rows[met - 1])] * 3
        assert [r["budget_met"] for r in state.rows] == [False] * (met - 1) + [True] * 3
        assert [r["tau"] for r in state.rows[met - 1 :]] == [state.rows[met - 1]["tau"]] * 3
    assert len(start.lines) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"min_filters": 3}, "every block has as few filters as --min_filters 3 allows"),
        ({"max_prune_fraction": 0.1}, "--prune_between ended before the thresholds, or --max_prune_fraction, let"),
        ({"between": (8, 9)}, "every block has as few filters as --min_filters 1 allows"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_was_reached_and_why(start, settings, reason):
    go_on(start, 12, max_flops=1.0, **settings)
    (line,) = start.lines
    last = 9 if "between" in settings else 10
    flops = start.rows[-1]["flops"]
    reached = f"{flops:,} FLOPs ({100 * flops / start.unpruned['flops']:.1f}%) after epoch {last}, the last that prunes"
    assert line.startswith(f"budget not met: {reached}; {reason}")


def test_a_limit_of_milliseconds_is_measured_once_for_each_network(start, monkeypatch):
    """A clock that never says the same twice: what it said first decides."""
    measured = []

    def milliseconds(model, patch_size):
        assert next(model.parameters()).device.type == "cpu" and patch_size == (8, 8)
        out = tuple(count_filters(model)["out"].values())
        measured.append((start.epoch, out))
        return sum(out) / 10 + 0.001 * len(measured)

    monkeypatch.setattr(lib.callback, "milliseconds", milliseconds)
    random_state = torch.get_rng_state()
    go_on(start, None, max_ms=6.0)
    assert torch.get_rng_state().equal(random_state)
    assert len(measured) == len(set(measured))
    times = [row_["ms"] for row_ in start.rows]
    assert all(ms > 6 for ms in times[:-1]) and 5.8 < times[-1] <= 6
    assert f", {times[-1]:.2f} ms per patch; nothing more" in start.lines[-1]
    go_on(start, start.epoch + 1, max_ms=6.0)
    assert start.rows[-1]["ms"] is None


def test_both_limits_must_be_met(start, monkeypatch):
    monkeypatch.setattr(lib.callback, "milliseconds", lambda model, _: count_filters(model)["out"]["enc_ConvBlock_6"])
    limit = 0.9 * start.unpruned["flops"]
    go_on(start, None, max_flops=limit, max_ms=5)
    assert start.rows[-1]["ms"] == 5 and start.rows[-1]["flops"] <= limit


def test_from_the_budget_on_the_best_model_is_one_that_fits(state):
    every = partial(callbacks, patch_size=(8, 8), epochs=9, class_names=("a", "b", "c"))
    pruning = BUDGET | {"max_flops": 0.5 * state.unpruned["flops"], "between": (0, 1)}
    del pruning["patch_size"]
    with tensorboard(state.folder, 0) as writer:
        state.delta_prune = {name: (delta / 2, r) for name, (delta, r) in state.delta_prune.items()}
        for callback in every(writer=writer, pruning=pruning):
            callback(state)
        assert state.budget_met and state.best_loss == float("inf")
        best = state.folder / "models" / "model-best"
        assert len(read_state(best)["encoder.5.seq.0.weight"]) == 16  # as it was scored, before the pruning
        state.epoch = 2
        state.rows.append(row(2.0, 2.0) | {"epoch": 2})  # worse than the unpruned one
        for callback in every(writer=writer, pruning=pruning):
            callback(state)
    assert state.best_loss == 2.0
    small = read_state(best)
    assert all(value.equal(small[key]) for key, value in state.model.state_dict().items())


def test_the_milliseconds_in_the_line_of_an_epoch(start):
    go_on(start, 1, max_flops=1.0)
    start.rows[-1]["ms"] = 1.234
    _end_epoch_log(start, epochs=2)
    assert "| tau 0.101 | 1.23 ms | 2.0 s |" in start.lines[-1]


def test_the_line_of_an_epoch(state):
    _end_epoch_prune(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    _end_epoch_log(state, epochs=61)
    assert state.lines == [
        "epoch 1/61 | loss 1.0000 | val 1.0000 | Dice 0.500 - | filters 100.0% | parameters 100.0% | FLOPs 100.0% "
        "| tau 0.001 | 2.0 s | ETA 0:02:00"
    ]

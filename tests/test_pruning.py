import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.loss import DS_CrossEntropyDiceLoss
from lib.models import Sauron, load_model
from lib.models.size import count_filters
from lib.pruning import (
    Threshold,
    budget_tau,
    deletable,
    fewest_filters,
    fewest_that_fit,
    kept,
    prune,
    raise_threshold,
    tau,
    training_settled,
)

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
}


def make(dim, optimizer="adam", dtype=torch.float64):
    model = Sauron(1, 3, 4, 4, dim=dim).to(dtype)
    model.initialize()
    return model, OPTIMIZERS[optimizer](model.parameters())


def batch(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (16, 16) if dim == "2D" else (16, 16, 16)
    x = torch.randn(1, 1, *size, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (1, *size), generator=generator)


def zero_deleted(model, keep):
    """Hooks that zero the deleted maps after each block: the literal meaning of deletion for every consumer."""
    hooks = []
    for block in model.blocks():
        if block.name in keep:
            mask = torch.zeros(block.out_filters, dtype=torch.float64)
            mask[keep[block.name]] = 1
            module = next(m for m in [*model.encoder, *model.decoder] if block.conv in m.modules())

            def hook(_module, _inputs, output, mask=mask):
                return output * mask.reshape(1, -1, *[1] * (output.ndim - 2))

            hooks.append(module.register_forward_hook(hook))
    return hooks


def random_keep(model, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for block in model.blocks():
        if not block.head and torch.rand(1, generator=generator) < 0.8:
            kept = torch.rand(block.out_filters, generator=generator) < 0.7
            kept[0] = True
            keep[block.name] = kept.nonzero().flatten()
    return keep


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = DS_CrossEntropyDiceLoss()(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("dim", ["2D", "3D"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruning_equals_zeroed_maps_now_and_after_the_next_steps(dim, optimizer):
    torch.manual_seed(0)
    model, optim = make(dim, optimizer)
    for round_ in range(3):
        for i in range(2):
            step(model, optim, *batch(dim, 10 * round_ + i))
        reference = copy.deepcopy(model)
        ref_optim = OPTIMIZERS[optimizer](reference.parameters())
        ref_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
        keep = random_keep(model, round_)
        hooks = zero_deleted(reference, keep)
        prune(model, optim, keep)

        x, y = batch(dim, 99)
        for a, b in zip(model(x), reference(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        # the next two optimizer steps equal as well: the moments were cut along with the weights
        for i in range(2):
            x, y = batch(dim, 100 + i)
            a, b = step(model, optim, x, y), step(reference, ref_optim, x, y)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_every_consumer_and_parameter_group_follows(tmp_path, dim):
    model, _ = make(dim)
    encoder, rest = list(model.encoder.parameters()), [*model.decoder.parameters(), *model.last.parameters()]
    optim = torch.optim.Adam([{"params": encoder, "lr": 0.5}, {"params": rest, "lr": 0.25, "weight_decay": 0.125}])
    step(model, optim, *batch(dim, 0))
    up = f"dec_ConvTranspose{dim.lower()}_3"
    prune(model, optim, {"enc_ConvBlock_2": torch.tensor([1, 3]), up: torch.tensor([0])})
    counted = count_filters(model)
    assert counted["out"]["enc_ConvBlock_2"] == 2
    assert counted["in"]["enc_ConvBlock_3"] == 2  # a skip feeds two consumers: the next level ...
    assert counted["in"]["dec_ConvBlock_5"] == 2 + 1  # ... and the decoder, before the maps that come up
    assert counted["in"][up] == 8
    names = {id(p) for p in model.parameters()}
    for group, lr, size in zip(optim.param_groups, (0.5, 0.25), (len(encoder), len(rest)), strict=True):
        assert group["lr"] == lr
        assert len(group["params"]) == size
    assert {id(p) for group in optim.param_groups for p in group["params"]} == names
    assert {id(p) for p in optim.state} == names
    for p, values in optim.state.items():
        assert values["exp_avg"].shape == values["exp_avg_sq"].shape == p.shape
        assert values["step"] == 1
    torch.save(model.state_dict(), tmp_path / "model-1")
    x = batch(dim, 1)[0].float()
    torch.testing.assert_close(load_model(tmp_path / "model-1")(x)[0], model.float()(x)[0])


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_parts_that_nothing_feeds_stay_the_same_objects(dim):
    model, optim = make(dim)
    untouched = model.encoder[0].seq[0].weight
    prune(model, optim, {"dec_ConvBlock_6": torch.tensor([0, 2])})
    assert model.encoder[0].seq[0].weight is untouched
    assert model.last[1][0].weight.shape == (3, 2, *[1] * int(dim[0]))


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12),
    st.floats(0, 1),
    st.integers(1, 14),
    st.floats(0.01, 1),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_the_nearest_filters_go_within_the_bounds(delta, threshold, at_least, fraction, data):
    r = data.draw(st.integers(0, len(delta) - 1))
    gone = deletable(torch.tensor(delta), r, threshold, at_least, fraction)
    below = sorted(d for c, d in enumerate(delta) if c != r and d < threshold)
    assert [delta[c] for c in gone] == below[: len(gone)] and len(set(gone)) == len(gone)
    stay = kept(len(delta), gone).tolist()
    assert r in stay and sorted(stay + gone) == list(range(len(delta)))
    assert len(stay) >= min(at_least, len(delta))
    assert len(gone) <= fraction * len(delta) + 1e-6
    if at_least == fraction == 1:
        assert len(gone) == len(below)


@pytest.mark.parametrize(
    ("threshold", "at_least", "fraction", "gone"),
    [
        (0.5, 1, 1.0, [4, 2, 1]),  # all below the threshold, the smallest first, the reference 3 never
        (0.2, 1, 1.0, [4]),  # 0.2 is not below 0.2
        (0.9, 3, 1.0, [4, 2]),  # three of five stay
        (0.9, 6, 1.0, []),  # fewer than the floor already
        (0.9, 1, 0.4, [4, 2]),  # 40% of five are two
        (0.9, 1, 0.39, [4]),
        (0.9, 1, 0.19, []),  # less than one
        (1.1, 1, 1.0, [4, 2, 1, 0]),
    ],
)
def test_deletable_by_hand(threshold, at_least, fraction, gone):
    delta = torch.tensor([0.9, 0.3, 0.2, 0.0, 0.1])
    assert deletable(delta, 3, threshold, at_least, fraction) == gone


def test_the_fraction_is_not_cut_by_round_off():
    assert len(deletable(torch.zeros(100), 0, 1.0, 1, 0.29)) == 29  # 0.29 * 100 is 28.999999999999996


def test_thresholds_climb_to_one_at_an_even_pace():
    assert [budget_tau(epoch, (2, 6)) for epoch in (0, 2)] == [0.001, 0.001]
    climbing = [budget_tau(epoch, (2, 6)) for epoch in (3, 4, 5)]
    assert climbing == pytest.approx([0.25075, 0.5005, 0.75025])
    assert [budget_tau(epoch, (2, 6)) for epoch in (6, 7)] == [1, 1]
    assert budget_tau(3, (0.6, 3.6)) == pytest.approx(0.001 + 0.999 * 0.8)  # the moments need not be whole epochs


@pytest.mark.parametrize(("min_filters", "feeds_a_head"), [(2, 5), (7, 7)])
def test_blocks_that_feed_a_head_keep_as_many_filters_as_there_are_classes(min_filters, feeds_a_head):
    fewest = fewest_filters(Sauron(1, 5, 8, 4), min_filters)
    assert len(fewest) == 8 + 3 + 6  # no heads
    feeders = {"dec_ConvBlock_4", "dec_ConvBlock_6"}  # the last block of every stage but the deepest
    assert {name for name, n in fewest.items() if n == feeds_a_head} >= feeders
    assert {fewest[name] for name in set(fewest) - feeders} == {min_filters}
    assert set(fewest_filters(Sauron(1, 5, 8, 4), 1).values()) == {1}  # the published rule


@given(
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1),
    st.integers(0, 900),
    st.data(),
)
@settings(max_examples=100, deadline=None)
def test_the_shortest_beginning_that_fits(blocks, limit, data):
    """The cost is that of all filters that are left, so it falls with each deleted one, as FLOPs do."""
    widths = {name: n for name, (n, _) in blocks.items()}
    filters = [(name, c) for name, n in widths.items() for c in range(n)]
    ranked = data.draw(st.permutations(filters))[: data.draw(st.integers(0, len(filters)))]

    def cost(widths):
        return sum(n * blocks[name][1] for name, n in widths.items())

    def without(gone):
        return cost({name: n - sum(other == name for other, _ in gone) for name, n in widths.items()})

    gone = fewest_that_fit(ranked, widths, lambda widths: cost(widths) <= limit)
    assert gone == ranked[: len(gone)]
    assert without(gone) <= limit or gone == ranked
    assert not gone or without(gone[:-1]) > limit


def test_the_network_is_measured_a_few_times_only():
    measured = []
    ranked = [("a", c) for c in range(100)]
    gone = fewest_that_fit(ranked, {"a": 128}, lambda widths: measured.append(widths["a"]) or widths["a"] <= 67)
    assert gone == ranked[:61]
    assert len(measured) <= 7


def test_tau_takes_sixteen_equidistant_values():
    values = [tau(Threshold(step=i), 0.3, 15) for i in range(16)]
    assert values == pytest.approx(torch.linspace(0.001, 0.3, 16).tolist())
    assert (values[0], values[15]) == (0.001, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("train", "validation", "settled"),
    [
        ([5, 4, 3, 2, 1], [3, 3, 3], False),  # the training loss still falls
        ([5, 4, 3, 4], [3, 2, 2.5], True),  # within [3, 5]; the validation loss did not improve
        ([5, 4, 3, 4], [3, 2, 2], True),  # equal to the best is no improvement
        ([5, 4, 3, 4], [3, 2.5, 2], False),  # the validation loss improved
        ([5, 4, 3, 5], [3, 2, 2.5], False),  # the window is the rho = 2 losses before: [3, 4] does not hold 5
        ([5, 4, 4], [3, 3], False),  # fewer than rho + 1 validation losses
        ([5, 4, 4], None, True),  # no validation set: the training losses decide
        ([4, 4], None, False),
    ],
)
def test_training_settled(train, validation, settled):
    assert training_settled(train, validation, rho=2) is settled


def test_threshold_rises_when_settled_then_waits_rho_epochs():
    t = Threshold()
    steps = []
    for _ in range(8):
        raise_threshold(t, True, kappa=2, rho=2, mu=0.02)
        steps.append(t.step)
    assert steps == [1, 1, 1, 2, 2, 2, 2, 2]  # up, patience 2 counts down to 0, up, and kappa is the end
    t = Threshold(lost=2, filters_before=100)  # 2 = ceil(2% of 100): lost too many the epoch before
    raise_threshold(t, True, kappa=2, rho=2, mu=0.02)
    assert t.step == 0
    t = Threshold(lost=1, filters_before=100)
    raise_threshold(t, True, kappa=2, rho=2, mu=0.02)
    assert t.step == 1
    raise_threshold(t, False, kappa=2, rho=2, mu=0.02)
    assert (t.step, t.patience) == (1, 1)

"""The paper's rule, the way to a budget, and filters at random, as they choose at the end of an epoch."""

import pytest
import torch
from epoch import made_up_state, row

import lib.callback
from lib import checkpoint
from lib.callback import _end_epoch_measure, _end_epoch_prune
from lib.checkpoint import TrainingState
from lib.models import Sauron
from lib.models.size import count_filters, resized, summary
from lib.pruning import rules
from lib.pruning.rules import (
    Bounds,
    BudgetRule,
    PaperRule,
    RandomRule,
    Threshold,
    budget_tau,
    dealt,
    raise_threshold,
    tau,
    training_settled,
)
from lib.pruning.surgery import prune

BOUNDS = {"between": (0, 100), "min_filters": 1, "max_prune_fraction": 1.0}
RULE = {"tau_max": 0.3, "kappa": 15, "rho": 1, "mu": 0.02, **BOUNDS}
BUDGET = {"max_flops": None, "max_ms": None, "patch_size": (8, 8), **BOUNDS, "between": (0, 10)}


@pytest.fixture
def state(tmp_path):
    return made_up_state(tmp_path)


def by_the_papers_rule(state, tau_max, kappa, rho, mu, validates=True, **bounds):
    """The end of an epoch; the thresholds are those of the epoch before."""
    rule = PaperRule(tau_max, kappa, rho, mu, Bounds(**bounds), validates)
    rule.load_state_dict(state.rule.state_dict(), [])
    state.rule = rule
    _end_epoch_prune(state)


def to_a_budget(state, max_flops, max_ms, patch_size, **bounds):
    """The end of an epoch; what was met stays met."""
    rule = BudgetRule(max_flops, max_ms, Bounds(**bounds), patch_size, state.unpruned["flops"])
    rule.load_state_dict({}, state.rows[:-1])
    state.rule = rule
    _end_epoch_prune(state)


def test_thresholds_climb_to_one_at_an_even_pace():
    assert [budget_tau(epoch, (2, 6)) for epoch in (0, 2)] == [0.001, 0.001]
    climbing = [budget_tau(epoch, (2, 6)) for epoch in (3, 4, 5)]
    assert climbing == pytest.approx([0.25075, 0.5005, 0.75025])
    assert [budget_tau(epoch, (2, 6)) for epoch in (6, 7)] == [1, 1]
    assert budget_tau(3, (0.6, 3.6)) == pytest.approx(0.001 + 0.999 * 0.8)  # the moments need not be whole epochs


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


def test_nothing_goes_while_all_distances_are_large(state):
    by_the_papers_rule(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    assert state.rows[-1]["filters"] == state.unpruned["filters"]
    assert set(state.rows[-1]["tau"].values()) == {0.001}


def test_filters_closer_than_tau_go_and_the_reference_stays(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.tensor([0.0009, 0.0, 0.0011, 0.5]), 1)
    kept = state.model.encoder[1].seq[0].weight[1:].clone()
    by_the_papers_rule(state, **RULE)
    _end_epoch_measure(state, (8, 8))
    assert state.rows[-1]["out_filters"]["enc_ConvBlock_2"] == 3
    assert state.rows[-1]["in_filters"]["enc_ConvBlock_3"] == 3
    assert state.model.encoder[1].seq[0].weight.equal(kept)
    threshold = state.rule.thresholds["enc_ConvBlock_2"]
    assert (threshold.lost, threshold.filters_before) == (1, 4)


def test_nothing_goes_outside_the_given_epochs(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    for between, left in (((1, 9), 4), ((0, 0.9), 4), ((0, 1), 1)):
        by_the_papers_rule(state, **RULE | {"between": between})
        assert state.model.encoder[1].seq[0].out_channels == left
        assert set(state.rows[-1]["tau"].values()) == {0.001}


def test_a_block_that_lost_filters_waits_while_the_others_rise(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.tensor([0.0, 0.0, 1.0, 1.0]), 1)
    by_the_papers_rule(state, **RULE)
    state.rows.append(row(1.0, 1.0))  # settled: rho = 1
    state.delta_prune["enc_ConvBlock_2"] = (torch.ones(3), 0)
    by_the_papers_rule(state, **RULE)
    assert state.rows[-1]["tau"]["enc_ConvBlock_2"] == 0.001
    assert state.rows[-1]["tau"]["enc_ConvBlock_1"] == pytest.approx(0.001 + 0.299 / 15)
    assert state.rows[-1]["patience"]["enc_ConvBlock_1"] == 1


def test_without_a_validation_set_the_training_loss_decides(state):
    state.rows = [row(1.0, None), row(1.0, None)]
    by_the_papers_rule(state, **RULE, validates=False)
    assert state.rows[-1]["tau"]["enc_ConvBlock_1"] > 0.001


def test_a_block_of_one_filter_is_left_alone(state):
    model = Sauron(1, 3, 4, 3, filters={"out": {"enc_ConvBlock_2": 1}})
    state.model, state.optimizer = model, torch.optim.Adam(model.parameters())
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(1), 0)
    by_the_papers_rule(state, **RULE)
    assert model.encoder[1].seq[0].out_channels == 1


@pytest.mark.parametrize(("min_filters", "fraction", "left"), [(2, 1.0, 2), (1, 0.5, 2), (1, 0.3, 3), (9, 1.0, 4)])
def test_a_block_keeps_some_filters(state, min_filters, fraction, left):
    state.delta_prune["enc_ConvBlock_2"] = (torch.zeros(4), 1)
    by_the_papers_rule(state, **RULE | {"min_filters": min_filters, "max_prune_fraction": fraction})
    assert state.model.encoder[1].seq[0].out_channels == left


@pytest.mark.parametrize(("min_filters", "feeds_a_head"), [(1, 1), (2, 3)])  # 1: the published rule
def test_a_block_that_feeds_a_head_keeps_as_many_filters_as_there_are_classes(state, min_filters, feeds_a_head):
    for name, (delta, r) in state.delta_prune.items():
        state.delta_prune[name] = (torch.zeros_like(delta), r)
    by_the_papers_rule(state, **RULE | {"min_filters": min_filters})
    out = count_filters(state.model)["out"]
    assert (out.pop("dec_ConvBlock_4"), out.pop("dec_Sequential_1")) == (feeds_a_head, 3)
    assert set(out.values()) == {min_filters}


@pytest.fixture
def start(state):
    state.epoch, state.rows = 0, []
    return state


def go_on(state, until, **settings):
    """Epochs that prune to a budget, until one of them or (None) until it is met; every block draws its distances."""
    while not state.rule.done if until is None else state.epoch < until:
        state.epoch += 1
        state.rows.append(row(1.0, 1.0) | {"epoch": state.epoch})
        generator = torch.Generator().manual_seed(state.epoch)
        state.delta_prune = {}
        for block in state.model.blocks():
            if not block.head and not state.rule.done:  # fit measures nothing any more
                delta = torch.rand(block.out_filters, generator=generator)
                delta[1 % block.out_filters] = 0
                state.delta_prune[block.name] = (delta, 1 % block.out_filters)
        to_a_budget(state, **BUDGET | settings)
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
        ({"max_prune_fraction": 0.1}, "every block has as few filters as --min_filters 1 allows"),
        ({"between": (8, 9)}, "every block has as few filters as --min_filters 1 allows"),
    ],
)
def test_a_budget_that_cannot_be_met_says_what_was_reached_and_why(start, settings, reason):
    go_on(start, 12, max_flops=1.0, **settings)
    line, next_line = start.lines
    last = 9 if "between" in settings else 10
    assert next_line == "the training goes on with this network as if the budget were met"
    assert [r["pruning_over"] for r in start.rows] == [r["epoch"] >= last for r in start.rows]
    assert start.rule.done == last and not any(r["budget_met"] for r in start.rows)
    flops = start.rows[-1]["flops"]
    reached = f"{flops:,} FLOPs ({100 * flops / start.unpruned['flops']:.1f}%) after epoch {last}, the last that prunes"
    assert line.startswith(f"budget not met: {reached}; {reason}")


def test_a_budget_that_the_largest_threshold_cannot_meet(start):
    """Maps that are all as far from the reference as can be: none is below the threshold."""
    start.rule = BudgetRule(1.0, None, Bounds((0, 1), 2, 0.15), (8, 8), start.unpruned["flops"])
    start.epoch, start.rows = 1, [row(1.0, 1.0) | {"epoch": 1}]
    start.delta_prune = {name: (torch.ones(len(delta)), 0) for name, (delta, _) in start.delta_prune.items()}
    _end_epoch_prune(start)
    assert start.rule.done == 1 and count_filters(start.model)["out"]["enc_ConvBlock_1"] == 4
    line, _ = start.lines  # the second one is that the training goes on
    assert line.endswith("the last that prunes; --prune_between ended before the thresholds let enough go")


@pytest.mark.parametrize(("multiple", "limit"), [(1, 0.25), (2, 0.18)])
def test_the_last_epoch_takes_a_larger_share_of_a_block_where_the_budget_needs_it(start, multiple, limit):
    unpruned = widths({"out_filters": count_filters(start.model)["out"]})
    limit, share = limit * start.unpruned["flops"], 0.1
    go_on(start, 12, max_flops=limit, between=(0, 3), max_prune_fraction=share, multiple=multiple, min_filters=2)
    met, *notes = start.lines
    assert start.rule.done == 3 and start.rows[-1]["flops"] <= limit and met.startswith("budget met after epoch 3: ")

    history = [widths(row_) for row_ in start.rows[:3]]
    for before, after in zip([unpruned, *history[:1]], history[:2], strict=True):
        assert all(n - after[name] <= max(multiple, share * n) for name, n in before.items())

    def most_gone(share):  # at the largest threshold all but the reference may go
        floor = {"dec_ConvBlock_4": -(-3 // multiple) * multiple}
        left = {}
        for name, n in history[1].items():
            most = max(multiple, int(share * n + 1e-9) // multiple * multiple)
            left[name] = n - min(most, n - floor.get(name, 2))
        return summary(resized(start.model, left), (8, 8))["flops"]

    (note,) = notes
    least = next(i for i in range(1, 20) if most_gone(share + 0.05 * i) <= limit)
    text = f"epoch 3, the last that prunes, was let take {100 * (share + 0.05 * least):.0f}% of a block, not 10%"
    assert note == f"{text} as --max_prune_fraction says; a later end of --prune_between, or more --epochs, spreads it"
    assert all(n - history[2][name] <= max(multiple, (share + 0.05 * least) * n) for name, n in history[1].items())


@pytest.mark.parametrize(("multiple", "share"), [(2, 0.4), (4, 0.7)])
@pytest.mark.parametrize("at_random", [False, True])
def test_on_the_way_to_a_budget_widths_stay_multiples(start, multiple, share, at_random):
    flops = start.unpruned["flops"]
    rule = BudgetRule(share * flops, None, Bounds((0, 10), 2, 0.3, multiple), (8, 8), flops)
    start.rule = RandomRule(rule) if at_random else rule
    torch.manual_seed(0)
    while not start.rule.done:
        start.epoch += 1
        start.rows.append(row(1.0, 1.0) | {"epoch": start.epoch})
        out = count_filters(start.model)["out"]
        start.delta_prune = {
            name: (torch.rand(out[name]).index_fill(0, torch.tensor(0), 0), 0) for name in start.delta_prune
        }
        _end_epoch_prune(start)
        _end_epoch_measure(start, (8, 8))
    before = start.unpruned["filters"]
    for row_ in start.rows:
        assert all(n % multiple == 0 for n in widths(row_).values())
        before, lost = row_["filters"], before - row_["filters"]
        assert lost % multiple == 0
    assert start.rows[-1]["budget_met"] and start.rows[-1]["flops"] <= share * flops
    assert start.rows[-2]["flops"] > share * flops


def test_a_budget_that_groups_cannot_meet(start):
    go_on(start, 12, max_flops=1.0, multiple=8)
    assert {name: n for name, n in widths(start.rows[-1]).items() if n != 8} == {
        name: 4 for name, n in widths(start.rows[0]).items() if n == 4
    }  # narrower than a group: never pruned
    reason = "every block has as few filters as --min_filters 1 allows with --width_multiple 8"
    assert start.lines[0].endswith(f"the last that prunes; {reason}")


def test_the_papers_rule_deletes_whole_groups(state):
    state.delta_prune["enc_ConvBlock_2"] = (torch.tensor([0.0004, 0.0003, 0.0, 0.5]), 2)
    state.delta_prune["enc_ConvBlock_4"] = (torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0001]), 0)
    state.delta_prune["enc_ConvBlock_3"] = (torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.0002, 0.0003, 0.0001]), 0)
    by_the_papers_rule(state, **RULE | {"multiple": 2})
    out = count_filters(state.model)["out"]
    assert [out[f"enc_ConvBlock_{i}"] for i in (2, 3, 4)] == [2, 6, 8]
    assert (state.rule.thresholds["enc_ConvBlock_3"].lost, state.rule.thresholds["enc_ConvBlock_4"].lost) == (2, 0)


def test_a_run_of_the_time_before_its_end_was_noted_ends_with_its_next_epoch(start):
    """It stopped after the last epoch that prunes, without its budget."""
    go_on(start, 10, max_flops=1.0)
    for row_ in start.rows:
        del row_["pruning_over"]
    start.rule = BudgetRule(1.0, None, Bounds((0, 10), 1), (8, 8), start.unpruned["flops"])
    start.rule.load_state_dict({}, start.rows)
    assert start.rule.done == 0
    go_on(start, 12, max_flops=1.0)
    assert start.rule.done == 11 and start.rows[-1]["filters"] == start.rows[9]["filters"]
    assert start.lines[2:] == ["budget not met: --prune_between ended before epoch 11; nothing more is pruned"]


@pytest.mark.parametrize("at_random", [False, True])
def test_the_last_epoch_takes_more_for_a_budget_in_milliseconds_too(start, monkeypatch, at_random):
    monkeypatch.setattr(rules, "milliseconds", lambda model, _: sum(count_filters(model)["out"].values()) / 10)
    rule = BudgetRule(None, 6.0, Bounds((0, 2), 2, 0.1), (8, 8), start.unpruned["flops"])
    start.rule = RandomRule(rule) if at_random else rule
    for epoch in (1, 2):
        start.epoch = epoch
        start.rows.append(row(1.0, 1.0) | {"epoch": epoch})
        out = count_filters(start.model)["out"]
        start.delta_prune = {name: (torch.linspace(0, 0.99, out[name]), 0) for name in start.delta_prune}
        _end_epoch_prune(start)
        _end_epoch_measure(start, (8, 8))
    met, note = start.lines
    assert start.rule.done == 2 and met.startswith("budget met after epoch 2: ")
    assert 5.8 < start.rows[-1]["ms"] <= 6 and "of a block, not 10% as --max_prune_fraction says" in note


def test_a_limit_of_milliseconds_is_measured_once_for_each_network(start, monkeypatch):
    """A clock that never says the same twice: what it said first decides."""
    measured = []

    def milliseconds(model, patch_size):
        assert next(model.parameters()).device.type == "cpu" and patch_size == (8, 8)
        out = tuple(count_filters(model)["out"].values())
        measured.append((start.epoch, out))
        return sum(out) / 10 + 0.001 * len(measured)

    monkeypatch.setattr(rules, "milliseconds", milliseconds)
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
    monkeypatch.setattr(rules, "milliseconds", lambda model, _: count_filters(model)["out"]["enc_ConvBlock_6"])
    limit = 0.9 * start.unpruned["flops"]
    go_on(start, None, max_flops=limit, max_ms=5)
    assert start.rows[-1]["ms"] == 5 and start.rows[-1]["flops"] <= limit


# At random


def test_values_are_dealt_in_every_order():
    values = torch.tensor([0.5, 0.0, 1.0])
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        delta, r = dealt(values, 1)
        assert sorted(delta.tolist()) == [0, 0.5, 1] and delta[r] == 0
        torch.manual_seed(seed)
        again, r_again = dealt(values, 1)
        assert again.equal(delta) and r_again == r
        seen.add(tuple(delta.tolist()))
    assert len(seen) == 6
    assert dealt(torch.zeros(1), 0) == (torch.zeros(1), 0)


def test_as_many_filters_go_at_random_as_by_their_distances(state):
    generator = torch.Generator().manual_seed(0)
    for name, (delta, r) in state.delta_prune.items():
        values = 0.0005 + 0.001 * torch.rand(len(delta), generator=generator)
        state.delta_prune[name] = (values.index_fill(0, torch.tensor(r), 0), r)
    stays = {}
    for kind in ("distances", "random"):
        rule = PaperRule(0.3, 15, 1, 0.02, Bounds(**BOUNDS))
        rule = RandomRule(rule) if kind == "random" else rule
        torch.manual_seed(1)
        stays[kind] = rule.choose(state.epoch, state.model, state.rows, state.delta_prune)
        assert set(rule.row()["tau"].values()) == {0.001}
        assert rule.state_dict()["enc_ConvBlock_2"]["lost"] == 4 - len(stays[kind].get("enc_ConvBlock_2", range(4)))
    assert {name: len(kept) for name, kept in stays["random"].items()} == {
        name: len(kept) for name, kept in stays["distances"].items()
    }
    assert any(not stays["random"][name].equal(kept) for name, kept in stays["distances"].items())


def test_a_random_rule_is_done_when_its_own_rule_is(start):
    flops = start.unpruned["flops"]
    start.rule = RandomRule(BudgetRule(0.5 * flops, None, Bounds((0, 10), 1), (8, 8), flops))
    while not start.rule.done:
        start.epoch += 1
        start.rows.append(row(1.0, 1.0) | {"epoch": start.epoch})
        widths = count_filters(start.model)["out"]
        start.delta_prune = {name: (torch.linspace(0, 1, widths[name]), 0) for name in start.delta_prune}
        _end_epoch_prune(start)
        _end_epoch_measure(start, (8, 8))
    assert start.rows[-1]["flops"] <= 0.5 * flops and start.rows[-1]["budget_met"]
    assert start.lines == [*start.rule.notes] and "budget met" in start.lines[0]
    again = RandomRule(BudgetRule(0.5 * flops, None, Bounds((0, 10), 1), (8, 8), flops))
    again.load_state_dict(start.rule.state_dict(), start.rows)
    assert again.done == start.epoch

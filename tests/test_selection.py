import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models import Sauron
from lib.pruning.selection import deletable, fewest_filters, fewest_that_fit, kept, next_group, ranking


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
    assert len(gone) <= max(1, fraction * len(delta) + 1e-6)
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
        (0.9, 1, 0.19, [4]),  # one may always go ...
        (0.9, 5, 0.19, []),  # ... but not below the floor ...
        (0.1, 1, 0.19, []),  # ... or from above the threshold
        (1.1, 1, 1.0, [4, 2, 1, 0]),
    ],
)
def test_deletable_by_hand(threshold, at_least, fraction, gone):
    delta = torch.tensor([0.9, 0.3, 0.2, 0.0, 0.1])
    assert deletable(delta, 3, threshold, at_least, fraction) == gone


def test_the_fraction_is_not_cut_by_round_off():
    assert len(deletable(torch.zeros(100), 0, 1.0, 1, 0.29)) == 29  # 0.29 * 100 is 28.999999999999996


@pytest.mark.parametrize("n", [4, 6, 32])
def test_a_fraction_slows_a_block_down_but_does_not_keep_it_from_its_floor(n):
    widths = [n]
    while gone := deletable(torch.zeros(widths[-1]), 0, 1.0, 2, 0.15):
        widths.append(widths[-1] - len(gone))
    assert widths[-1] == 2 and widths[-5:] == ([6, 5, 4, 3, 2] if n > 4 else [4, 3, 2])


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


# In groups


@pytest.mark.parametrize(
    ("n", "below", "at_least", "fraction", "multiple", "gone"),
    [
        (16, 15, 1, 1.0, 8, 8),
        (16, 8, 1, 1.0, 8, 8),
        (16, 7, 1, 1.0, 8, 0),  # not a whole group lies below the threshold
        (32, 23, 1, 1.0, 8, 16),
        (32, 31, 9, 1.0, 8, 16),  # 9 must stay, so 16 do
        (32, 31, 8, 1.0, 8, 24),
        (32, 31, 1, 0.15, 8, 8),  # 4 might go; one group always may
        (64, 63, 1, 0.3, 8, 16),  # of 19
        (8, 7, 1, 1.0, 8, 0),  # the last group stays
        (5, 4, 1, 1.0, 8, 0),  # narrower than a group
        (13, 12, 1, 1.0, 8, 5),  # no multiple yet: the first group makes it one ...
        (13, 4, 1, 1.0, 8, 0),  # ... or nothing does
        (13, 12, 9, 1.0, 8, 0),  # ... or the floor is in the way
        (21, 20, 1, 1.0, 8, 13),
        (21, 12, 1, 1.0, 8, 5),
        (21, 20, 1, 0.1, 8, 5),
        (7, 6, 1, 1.0, 3, 4),
        (9, 5, 2, 1.0, 1, 5),
    ],
)
def test_filters_go_in_groups(n, below, at_least, fraction, multiple, gone):
    delta = torch.linspace(1, 0, n)  # the last filter is the reference, and those before it are the nearest
    threshold = float(delta[n - 1 - below]) + 1e-6
    expected = list(range(n - 2, n - 2 - gone, -1))
    assert deletable(delta, n - 1, threshold, at_least, fraction, multiple) == expected


@given(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=40),
    st.sampled_from([0.0, 0.3, 0.6, 1.1]),
    st.integers(1, 14),
    st.floats(0.01, 1),
    st.integers(1, 9),
    st.data(),
)
@settings(max_examples=200, deadline=None)
def test_groups_are_whole_and_one_at_a_time_is_as_it_was(delta, threshold, at_least, fraction, multiple, data):
    n, r, values = len(delta), data.draw(st.integers(0, len(delta) - 1)), torch.tensor(delta)
    single = deletable(values, r, threshold, at_least, fraction)
    gone = deletable(values, r, threshold, at_least, fraction, multiple)
    assert deletable(values, r, threshold, at_least, fraction, 1) == single
    group = next_group(n, multiple)
    assert gone == [] or (n - len(gone)) % multiple == 0
    assert n - len(gone) >= min(n, at_least)
    free = deletable(values, r, threshold, at_least)  # without a share
    assert gone == free[: len(gone)] and len(gone) <= max(group, fraction * n + 1e-6)
    assert len(gone) + next_group(n - len(gone), multiple) > len(single)  # another group could not have gone
    assert gone or len(free) < group


def test_groups_are_ranked_by_their_last_filter():
    measured = {
        "a": (torch.tensor([0.1, 0.6, 0.2, 0.3, 0.0, 0.9]), 4),
        "b": (torch.tensor([0.4, 0.4, 0.5, 0.0, 0.4, 0.4, 0.7]), 3),
    }
    candidates = {"a": [0, 2, 3, 1], "b": [0, 1, 4, 5, 2]}
    single = [("a", 0), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 4), ("b", 5), ("b", 2), ("a", 1)]
    assert ranking(candidates, measured) == single
    # a goes two by two, at 0.2 and 0.6; b has seven: the first goes alone at 0.4, two more at 0.4, and two at 0.5
    pairs = [("a", 0), ("a", 2), ("b", 0), ("b", 1), ("b", 4), ("b", 5), ("b", 2), ("a", 3), ("a", 1)]
    assert ranking(candidates, measured, 2) == pairs


def test_no_group_is_torn_by_equal_distances():
    measured = {"a": (torch.tensor([0.2, 0.2, 0.2, 0.1, 0.0, 0.9]), 4), "b": (torch.tensor([0.2, 0.0, 0.2, 0.9]), 1)}
    ranked = ranking({"a": [3, 0, 1, 2], "b": [0, 2]}, measured, 2)
    assert ranked == [("a", 3), ("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 2)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 80), st.data())
@settings(max_examples=100, deadline=None)
def test_the_shortest_beginning_of_whole_groups(sizes, multiple, limit, data):
    widths = {f"block {i}": n for i, n in enumerate(sizes)}
    level = st.sampled_from([0.0, 0.25, 0.5])
    measured = {
        name: (torch.tensor(data.draw(st.lists(level, min_size=n, max_size=n))), 0) for name, n in widths.items()
    }
    candidates = {name: deletable(*values, 1.0, 1, 1.0, multiple) for name, values in measured.items()}
    ranked = ranking(candidates, measured, multiple)
    assert sorted(ranked) == sorted((name, c) for name, gone in candidates.items() for c in gone)
    for name, gone in candidates.items():
        assert [c for other, c in ranked if other == name] == gone  # the smallest first

    def without(gone):
        return {name: n - sum(other == name for other, _ in gone) for name, n in widths.items()}

    def is_whole(gone):
        return all(n == widths[name] or n % multiple == 0 for name, n in without(gone).items())

    def fits(widths):
        return sum(widths.values()) <= limit

    gone = fewest_that_fit(ranked, widths, fits, multiple)
    assert gone == ranked[: len(gone)] and is_whole(gone)
    assert fits(without(gone)) or gone == ranked
    shorter = [n for n in range(len(gone)) if is_whole(ranked[:n])]
    assert not any(fits(without(ranked[:n])) for n in shorter)
    assert len(gone) - max(shorter, default=0) <= multiple  # the last group

"""Intervals over trainings and cases: by hand, by properties, and as SciPy's bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.experiments.intervals import (
    N_RESAMPLES,
    case_differences,
    case_means,
    format_difference,
    mean_difference,
    resampled_means,
    two_level,
)

RNG = np.random.default_rng(1)
FORTY = {f"s{i}": float(value) for i, value in enumerate(RNG.normal(0.88, 0.03, 40))}


def named(*values):
    return {f"s{i}": value for i, value in enumerate(values)}


def test_a_case_is_the_mean_of_its_known_subjects():
    values = {"a_1": 0.5, "a_2": 0.75, "b_1": None, "b_2": 1.0, "c_1": None}
    assert case_means(values, lambda subject: subject[0]) == {"a": 0.625, "b": 1.0}
    assert case_differences({"a": 0.75, "b": 0.5}, {"b": 0.25, "c": 1.0}) == {"b": 0.25}


def test_the_t_interval_by_hand():
    """Mean 2, standard deviation 1, so 2 -+ 4.302653 / sqrt(3): the table's quantile of two degrees of freedom."""
    found = mean_difference([1.0, 2.0, 3.0])
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 2.484138, "high": 2 + 2.484138, "n": 3}, abs=1e-6)
    assert mean_difference([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert format_difference({"mean": -0.00123, "low": -0.002, "high": 0.0011}, 4) == "-0.0012 [-0.0020, +0.0011]"


def test_each_training_weighs_the_same():
    """(0.5 + 1) / 2, though the first has three cases and the second one."""
    found = two_level([named(0.25, 0.5, 0.75), {"t0": 1.0}], ["0", "1"])
    assert (found["mean"], found["n"], found["cases"]) == (0.75, 2, 4)


def test_all_resamples_of_two_cases_of_one_training():
    """Of the cases 0 and 1 a resample has the mean 0, 0.5 or 1, a quarter, a half and a quarter of them."""
    means, counts = np.unique(resampled_means([named(0.0, 1.0)], ["0"]), return_counts=True)
    assert means.tolist() == [0, 0.5, 1]
    assert counts / N_RESAMPLES == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    found = two_level([named(0.0, 1.0)], ["0"])
    assert (found["mean"], found["low"], found["high"]) == (0.5, 0, 1)
    assert found["t"] == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_all_resamples_of_two_trainings_without_spread_of_cases():
    """Both may be drawn, or one of them twice: only the trainings vary."""
    means, counts = np.unique(resampled_means([named(0.0, 0.0), named(1.0, 1.0)], ["0", "0"]), return_counts=True)
    assert means.tolist() == [0, 0.5, 1]
    assert counts / N_RESAMPLES == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_other_seeds_are_no_other_cases():
    """Four trainings that agree about each case say no more of the cases than one does."""
    one = two_level([FORTY], ["0"])
    four = two_level([FORTY] * 4, ["0"] * 4)
    assert four["cases"] == 40
    assert four["high"] - four["low"] == pytest.approx(one["high"] - one["low"], rel=0.05)
    others = [{f"{fold}_{case}": value for case, value in FORTY.items()} for fold in range(4)]
    folds = two_level(others, list("0123"))
    assert folds["cases"] == 160
    assert folds["high"] - folds["low"] < 0.75 * (one["high"] - one["low"])


def test_one_training_is_the_plain_bootstrap_of_its_cases():
    found = two_level([FORTY], ["0"])
    expected = stats.bootstrap(
        ([*FORTY.values()],), np.mean, n_resamples=50_000, method="percentile", random_state=np.random.default_rng(3)
    ).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=3e-4)


def test_a_constant_moves_the_interval_by_itself():
    other = {case: value + 0.01 * i for i, (case, value) in enumerate(FORTY.items())}
    found = two_level([FORTY, other], ["0", "1"])
    moved = two_level([{c: v + 0.25 for c, v in values.items()} for values in (FORTY, other)], ["0", "1"])
    for end in ("mean", "low", "high"):
        assert moved[end] == pytest.approx(found[end] + 0.25)
        assert moved["t"][end] == pytest.approx(found["t"][end] + 0.25)


def test_no_difference_has_no_interval_around_it():
    found = two_level([named(0.0, 0.0, 0.0)] * 3, ["0", "0", "1"])
    assert (found["mean"], found["low"], found["high"]) == (0, 0, 0)
    assert (found["t"]["low"], found["t"]["high"]) == (0, 0)


def test_what_has_no_value_does_not_count():
    """A case that only one training has, a training without a case, and nothing at all."""
    found = two_level([named(0.5, 0.5), {"s0": 0.5}, {}], ["0", "0", "1"])
    assert (found["mean"], found["low"], found["high"], found["n"], found["cases"]) == (0.5, 0.5, 0.5, 2, 2)
    assert two_level([], []) == two_level([{}], ["0"])
    assert two_level([], [])["mean"] is None
    assert two_level([{"a": 0.5}], ["0"])["low"] is None


def test_it_covers_the_truth_as_often_as_it_says():
    """30 trainings of other folds, a true mean of 0: about 95 of 100 intervals have it."""
    rng = np.random.default_rng(5)
    n_covered = 0
    for _ in range(40):
        level = rng.normal(0, 0.01, 30)
        trainings = [dict(enumerate(mean + rng.normal(0, 0.02, 20))) for mean in level]
        found = two_level(trainings, list(range(30)))
        n_covered += found["low"] <= 0 <= found["high"]
    assert n_covered >= 35


TRAININGS = st.lists(  # (values by case, fold) of each
    st.tuples(st.dictionaries(st.integers(0, 5), st.floats(-1, 1, width=16), min_size=1), st.sampled_from("01")),
    min_size=1,
    max_size=4,
)
quick = settings(max_examples=40, deadline=None)


def interval(trainings, change=lambda value: value, name=lambda case: case):
    """`two_level` of values that are changed, of cases that are named otherwise."""
    values = [{name(case): change(value) for case, value in cases.items()} for cases, _ in trainings]
    found = two_level(values, [fold for _, fold in trainings])
    return [found["mean"], found["low"], found["high"], found["t"]["low"], found["t"]["high"]]


def near(expected):
    return [pytest.approx(value, abs=1e-9) if value is not None else None for value in expected]


@quick
@given(TRAININGS)
def test_properties_of_all_intervals(trainings):
    """What is added to every value is added to all; values of the other sign mirror it; names of cases do not matter.
    The bootstrap does not leave the range of the values, and the order of the trainings leaves mean and Student's."""
    mean, low, high, t_low, t_high = found = interval(trainings)
    assert interval(trainings, lambda value: value + 2) == near([v if v is None else v + 2 for v in found])
    mirrored = [v if v is None else -v for v in (mean, high, low, t_high, t_low)]
    assert interval(trainings, lambda value: -value) == near(mirrored)
    assert interval(trainings, name=str) == near(found)
    assert interval(trainings, lambda _: 0) == [0, *(end if end is None else 0 for end in found[1:])]
    other = interval(trainings[::-1])
    assert [other[i] for i in (0, 3, 4)] == near([mean, t_low, t_high])
    values = [value for cases, _ in trainings for value in cases.values()]
    if low is not None:
        assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9

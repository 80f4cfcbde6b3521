"""Means and differences of trainings with 95% intervals, over trainings and subjects.

A *training* is a pair of fold and seed. A *case* is what counts once within it: a patient, of whom there may be several
images (the two frames of ACDC).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t as student_t

N_RESAMPLES = 10_000
SEED = 20260
LEVEL = 95  # percent


def case_means(values: Mapping[str, float | None], case_of: Callable) -> dict[int | str, float]:
    """{case: the mean over its subjects}, of a value by subject. A value that is None does not count; a case without
    any is left out."""
    cases: dict[int | str, list[float]] = {}
    for subject, value in values.items():
        if value is not None:
            cases.setdefault(case_of(subject), []).append(value)
    return {case: fmean(known) for case, known in cases.items()}


def case_differences(ours: Mapping, theirs: Mapping) -> dict[int | str, float]:
    """{case: by how much the value of `ours` is larger}, of the cases that both have a value of."""
    return {case: ours[case] - theirs[case] for case in ours if case in theirs}


def mean_difference(values: list[float]) -> dict[str, float | int | None]:
    """{"mean", "low", "high", "n"}: the mean of the `n` differences and its 95% interval (Student's t; null for less
    than two)."""
    if len(values) < 2:
        return {"mean": fmean(values) if values else None, "low": None, "high": None, "n": len(values)}
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": fmean(values), "low": fmean(values) - half, "high": fmean(values) + half, "n": len(values)}


def format_difference(found: dict, digits: int = 3) -> str:
    if found["low"] is None:
        return "-" if found["mean"] is None else f"{found['mean']:+.{digits}f}"
    return f"{found['mean']:+.{digits}f} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def resampled_means(
    trainings: Sequence[Mapping[int | str, float]], folds: Sequence[object], n_resamples: int = N_RESAMPLES
) -> np.ndarray:
    """(n_resamples,): the means of a two-level bootstrap of values by case in each training.

    Each resample draws as many trainings as there are, with replacement, and of each fold as many cases as it has, with
    replacement. Its mean is the mean over the drawn trainings of the mean over the drawn cases of their fold, so each
    training weighs the same, whatever its number of cases. Trainings of one fold see the same drawn cases: other seeds
    are no other patients, so cases vary no less for being trained on more often (a pigeonhole bootstrap, Owen 2007,
    which errs on the wide side). With one training this is the plain bootstrap of its cases. A case that a training has
    no value of does not count there. The seed is fixed: the same values give the same means.
    """
    rng, n = np.random.default_rng(SEED), len(trainings)
    drawn = rng.integers(n, size=(n_resamples, n))
    means = np.empty(drawn.shape)
    for fold in dict.fromkeys(folds):
        members = [i for i in range(n) if folds[i] == fold]
        cases = list(dict.fromkeys(case for i in members for case in trainings[i]))
        times = rng.multinomial(len(cases), [1 / len(cases)] * len(cases), size=n_resamples)  # how often each is drawn
        values = np.array([[trainings[i].get(case, math.nan) for i in members] for case in cases])
        with np.errstate(invalid="ignore"):  # NaN where a training has a value of none of those that are drawn
            means[:, members] = times @ np.nan_to_num(values) / (times @ np.isfinite(values))
    return np.take_along_axis(means, drawn, axis=1).mean(axis=1)


def two_level(trainings: Sequence[Mapping[int | str, float]], folds: Sequence[object]) -> dict:
    """The mean of values by case in each training, and two 95% intervals of it; `folds` has that of each training.

    {"mean": the mean over the trainings of the mean over their cases, "low", "high": the 2.5th and 97.5th percentile of
    `resampled_means`, "n": the number of trainings, "cases": of different cases in all of them, "t": `mean_difference`
    of the trainings' means}. Trainings without a value are left out. Null where there is nothing to compute an interval
    of.

    A percentile interval over few trainings (less than about ten) is too narrow: n trainings that are resampled vary by
    (n - 1) / n of the variance between them, and it takes no account of how little n of them say about it. "t" does,
    at the price of being wide; it takes trainings as independent, which those of one fold are not quite, since they
    share its cases. With one training the interval is of the cases alone, and says nothing of what another seed would
    give.
    """
    known = [(values, fold) for values, fold in zip(trainings, folds, strict=True) if values]
    n_cases = len({(fold, case) for values, fold in known for case in values})
    t = mean_difference([fmean(values.values()) for values, _ in known])
    low = high = None
    if n_cases > 1:
        means = resampled_means(*zip(*known, strict=True))
        low, high = map(float, np.nanpercentile(means, (50 - LEVEL / 2, 50 + LEVEL / 2)))
    return {"mean": t["mean"], "low": low, "high": high, "n": len(known), "cases": n_cases, "t": t}

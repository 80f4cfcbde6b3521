"""What planning needs to know of the training images, as nnU-Net measures it. Nothing here needs torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

N_DRAWS = 10**8  # of intensities from all cases together, per channel
SEED = 1234  # of the draws from each case
PIECE = 2**20  # draws at once


@dataclass(frozen=True)
class Fingerprint:
    """By case, ascending by id, and in nnU-Net's axis order (the last stored axis first): the shape after the crop to
    nonzero, and the spacing in mm. relative_size: the median share of voxels that the crop leaves. intensities: of the
    foreground, by channel: "mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"."""

    shapes: tuple[tuple[int, int, int], ...]
    spacings: tuple[tuple[float, float, float], ...]
    relative_size: float
    intensities: tuple[dict[str, float], ...]


class Draws(NamedTuple):
    """A sample of intensities: its different values, ascending (float32), and how often each was drawn (int64)."""

    values: np.ndarray
    counts: np.ndarray


class Measured(NamedTuple):
    """One case, as `Fingerprint` has it, and a sample of its foreground for each channel (empty: no foreground)."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    relative_size: float
    draws: tuple[Draws, ...]


def draws_per_case(n_cases: int) -> int:
    """How many intensities each case gives, so that all count alike."""
    return N_DRAWS // n_cases


def measure(
    channels: Sequence[np.ndarray], foreground: np.ndarray, spacing_mm: tuple[float, float, float], n_draws: int
) -> Measured:
    """Measure one case: arrays (X, Y, Z) and voxel size as they are stored.

    The draws are nnU-Net's, to the last voxel: with replacement, from the voxels in the order of the file, by one
    generator for all channels.
    """
    channels, foreground = [channel.T for channel in channels], foreground.T
    box = nonzero_box(channels)
    shape = tuple(side.stop - side.start for side in box)
    inside, random = foreground[box], np.random.RandomState(SEED)  # noqa: NPY002 (nnU-Net's)
    draws = tuple(draw(channel[box][inside], n_draws, random) for channel in channels)
    return Measured(shape, tuple(spacing_mm[::-1]), float(np.prod(shape) / foreground.size), draws)


def nonzero_box(channels: Sequence[np.ndarray]) -> tuple[slice, slice, slice]:
    """The smallest box around the voxels that are not 0 in some channel; the whole image where all are 0.

    Holes of the mask lie within it, so they need not be filled to find it.
    """
    axes = range(channels[0].ndim)
    used = [np.zeros(size, bool) for size in channels[0].shape]
    for channel in channels:
        nonzero = channel != 0
        for axis in axes:
            used[axis] |= nonzero.any(axis=tuple(other for other in axes if other != axis))
    places = [np.flatnonzero(one) if one.any() else np.array([0, len(one) - 1]) for one in used]
    return tuple(slice(int(place[0]), int(place[-1]) + 1) for place in places)


def draw(intensities: np.ndarray, n: int, random: np.random.RandomState) -> Draws:
    """What `random.choice(intensities, n)` draws, as float32, without the order; nothing from nothing."""
    if not len(intensities):
        return Draws(np.zeros(0, np.float32), np.zeros(0, np.int64))
    times = np.zeros(len(intensities), np.int64)
    for start in range(0, n, PIECE):
        times += np.bincount(random.randint(0, len(times), min(PIECE, n - start)), minlength=len(times))
    drawn = times > 0
    return _merged(intensities[drawn].astype(np.float32), times[drawn])


def fingerprint(cases: Sequence[Measured]) -> Fingerprint:
    """Of all training cases by id, in one order of axes. Raises ValueError if none has foreground."""
    by_channel = zip(*(case.draws for case in cases), strict=True)
    return Fingerprint(
        tuple(case.shape for case in cases),
        tuple(case.spacing for case in cases),
        float(np.median([case.relative_size for case in cases])),
        tuple(statistics(draws) for draws in by_channel),
    )


def statistics(draws: Sequence[Draws]) -> dict[str, float]:
    """The statistics of all draws together: see `Fingerprint.intensities`. Raises ValueError if there are none."""
    values, counts = _merged(*(np.concatenate(part) for part in zip(*draws, strict=True)))
    if not len(values):
        raise ValueError("no foreground")
    exact = values.astype(np.float64)
    mean = np.average(exact, weights=counts)
    std = np.sqrt(np.average((exact - mean) ** 2, weights=counts))
    low, median, high = _percentiles(exact, counts, (0.5, 50.0, 99.5))
    return {
        "mean": float(mean),
        "median": median,
        "std": float(std),
        "min": float(values[0]),
        "max": float(values[-1]),
        "percentile_00_5": low,
        "percentile_99_5": high,
    }


def _percentiles(values: np.ndarray, counts: np.ndarray, percentages: Sequence[float]) -> list[float]:
    """As `np.percentile` of each of the ascending values so many times."""
    ends = np.cumsum(counts)
    places = (ends[-1] - 1) * np.array(percentages) / 100
    whole = np.floor(places)
    below, above = (
        values[np.searchsorted(ends, whole + more, side="right").clip(max=len(ends) - 1)] for more in (0, 1)
    )
    return (below + (above - below) * (places - whole)).tolist()


def _merged(values: np.ndarray, counts: np.ndarray) -> Draws:
    """Equal values as one."""
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    first = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    return Draws(values[first], np.add.reduceat(counts, first) if len(first) else counts)

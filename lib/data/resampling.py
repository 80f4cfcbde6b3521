"""How nnU-Net resamples images, labels and what a network predicts. Axes in any order; without torch and scipy.

Grids share the borders of their volume, not the centres of their first voxels. Where the voxels are much longer along
one axis, the planes across it are resampled one by one, and the nearest of them are taken along it.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

ANISOTROPIC = 3  # longest side of a voxel / shortest: above it one axis is set apart
LEAST = np.finfo(np.float32).tiny  # probability whose logarithm is taken for that of 0
POLE = math.sqrt(3) - 2  # of the filter that makes a cubic spline meet the voxels
MARGIN = 2  # voxels beyond an end whose B-splines reach in
PIECE = 2**19  # voxels at once, which stay in the processor's cache


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """The number of voxels per axis after resampling from `spacing` to `target` (mm), at least one."""
    return tuple(max(1, round(float(old / new * n))) for n, old, new in zip(shape, spacing, target, strict=True))


def separate_axis(spacing: Sequence[float], target: Sequence[float]) -> int | None:
    """The axis that is set apart in resampling from `spacing` to `target` (mm), by the first of the two that is
    anisotropic; None where neither is, or two axes share its longest side."""
    for sides in (spacing, target):
        if max(sides) / min(sides) > ANISOTROPIC:
            longest = [axis for axis, side in enumerate(sides) if max(sides) / side == 1]
            return longest[0] if len(longest) == 1 else None
    return None


def resample_image(channel: np.ndarray, shape: tuple[int, ...], separate: int | None) -> np.ndarray:
    """A channel to `shape`, of its type: cubic, within its lowest and highest intensity; see `separate_axis`."""
    return _resample(channel, shape, separate, _cubic)


def resample_label(label: np.ndarray, shape: tuple[int, ...], separate: int | None) -> np.ndarray:
    """Integers of any kind to `shape`, of their type: see `_most_likely` and `separate_axis`."""
    return _resample(label, shape, separate, _most_likely)


def resample_probabilities(
    slabs: Iterable[np.ndarray],
    axis: int,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    separate: int | None,
    n: int,
) -> Iterator[tuple[slice, np.ndarray]]:
    """Probabilities (K, ...) of a volume from the first to the second of `shapes`, without ever holding all of them.

    slabs: consecutive along `axis` of the volume. Yields the same, at most `n` slices each, with the slice of the axis.
    Their logarithms are interpolated linearly, which gives what the network's outputs before the softmax would give.
    Where the shape stays the slabs come as they are.
    """
    old, new = shapes
    if old == new:
        start = 0
        for slab in slabs:
            yield slice(start, start := start + slab.shape[axis + 1]), slab
        return
    lines = [_neighbours(*sizes, at == separate) for at, sizes in enumerate(zip(old, new, strict=True))]
    shrinking_first = sorted(range(len(new)), key=lambda at: new[at] / old[at])
    lower, upper, weight = lines[axis]
    planes = (np.log(np.maximum(plane, LEAST)) for slab in slabs for plane in np.moveaxis(slab, axis + 1, 0))
    held, first = [], 0  # planes across the axis, from the one of this number on
    for start in range(0, new[axis], n):
        chosen = slice(start, min(start + n, new[axis]))
        while first + len(held) <= upper[chosen][-1]:
            held.append(next(planes))
        del held[: lower[start] - first]
        first = lower[start]
        lines[axis] = lower[chosen] - first, upper[chosen] - first, weight if weight is None else weight[chosen]
        values = np.stack(held[: lines[axis][1][-1] + 1], axis + 1)
        for at in shrinking_first:
            values = _along(values, at + 1, *lines[at])
        yield chosen, _softmax(values)


def _resample(array: np.ndarray, shape: tuple[int, ...], separate: int | None, resize: Callable) -> np.ndarray:
    """`resize(array, shape)`, or that of each plane across the axis `separate`; the array itself where it has the
    shape."""
    if array.shape == shape:
        return array
    if separate is None:
        return resize(array, shape)
    result = np.empty(shape, array.dtype)
    planes, wanted = (np.moveaxis(volume, separate, 0) for volume in (array, result))
    made = None
    for plane, number in zip(wanted, _nearest(len(planes), len(wanted)), strict=True):
        if number != made:
            nearest, made = planes[number], number
            nearest = nearest if nearest.shape == plane.shape else resize(nearest, plane.shape)
        plane[...] = nearest
    return result


def _cubic(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Cubic spline interpolation in double precision, without smoothing, axis by axis; clipped to the range of the
    array, of its type. Beyond its border the array goes on with its outermost voxels. The shapes differ."""
    values = np.ascontiguousarray(array)
    for axis in sorted(range(array.ndim), key=lambda at: shape[at] / array.shape[at]):  # the most shrinking one first
        if shape[axis] != array.shape[axis]:
            values = _spline_along(values, axis, shape[axis])
    values.clip(array.min(), array.max(), out=values)
    return values.astype(array.dtype, copy=False)


def _spline_along(values: np.ndarray, axis: int, new: int) -> np.ndarray:
    """The cubic spline along an axis at `new` places, in double precision. Both arrays are in C's order.

    All is done voxel by voxel, without a library for matrices: these use as many threads as there are cores in each of
    many processes, and round by their number.
    """
    before, old, after = math.prod(values.shape[:axis]), values.shape[axis], math.prod(values.shape[axis + 1 :])
    source, result = values.reshape(before, old, after), np.empty((before, new, after))
    first, weights = _b_splines(old, new)
    longer = max(old, new)
    n = min(after, max(1, PIECE // longer))
    planes = max(1, PIECE // (longer * n))
    for part in itertools.product(range(0, before, planes), range(0, after, n)):
        box = slice(part[0], part[0] + planes), slice(None), slice(part[1], part[1] + n)
        coefficients = _coefficients(source[box].swapaxes(0, 1))
        target = result[box].swapaxes(0, 1)
        target[...] = sum(coefficients[first + i] * weight for i, weight in enumerate(weights))
    return result.reshape(*values.shape[:axis], new, *values.shape[axis + 1 :])


def _b_splines(old: int, new: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """For each of `new` places along an axis the first of the four `_coefficients` whose B-splines are not 0 there, and
    the four B-splines there, each as (new, 1, 1)."""
    places = _places(old, new)
    before = np.floor(places)
    t = (places - before)[:, None, None]
    four = [(1 - t) ** 3, 4 - 3 * t**2 * (2 - t), 4 - 3 * (1 - t) ** 2 * (1 + t), t**3]
    return before.astype(int) - 1 + MARGIN, [values / 6 for values in four]


def _coefficients(lines: np.ndarray) -> np.ndarray:
    """What to multiply the B-splines with, so that their sum meets the voxels along the first axis: those filtered by
    sqrt(3) * POLE**|distance|, in one pass there and one back. `MARGIN` voxels more at both ends."""
    result = np.empty((len(lines) + 2 * MARGIN, *lines.shape[1:]))
    result[MARGIN:-MARGIN] = lines
    result[:MARGIN], result[-MARGIN:] = lines[0], lines[-1]
    rows, step = [*result], np.empty(lines.shape[1:])
    rows[0] /= 1 - POLE  # the sum over the equal voxels from here on outwards
    for one, following in itertools.pairwise(rows):
        following += np.multiply(one, POLE, out=step)
    rows[-1] += lines[-1].astype(np.float64) * (POLE / (1 - POLE))  # those at the other end
    rows[-1] /= 1 - POLE**2
    for one, following in itertools.pairwise(reversed(rows)):
        following += np.multiply(one, POLE, out=step)
    result *= -6 * POLE
    return result


def _most_likely(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each voxel gets the label whose mask, interpolated linearly, is largest there. Among several it is that of the
    nearest voxel, or the smallest if that is none of them."""
    sizes = list(zip(label.shape, shape, strict=True))
    result = label[np.ix_(*(_nearest(*size) for size in sizes))]
    axes = [_corners(*size) for size in sizes]
    n = max(1, PIECE // math.prod(shape[1:]))
    for start in range(0, shape[0], n):
        chosen = slice(start, start + n)
        first, *others = axes
        slab = [tuple(side[chosen] for side in part) for part in first], *others
        part = result[chosen]
        mixed = np.nonzero(_differ(label, [voxels for voxels, _ in slab]))
        if len(mixed[0]):
            part[mixed] = _vote(label, part[mixed], slab, mixed)
    return result


def _differ(label: np.ndarray, corners: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Which voxels of a grid do not have the same label at all of their corners."""
    least = most = label
    for axis, (lower, upper) in enumerate(corners):
        least = np.minimum(least.take(lower, axis), least.take(upper, axis))
        most = np.maximum(most.take(lower, axis), most.take(upper, axis))
    return least != most


def _vote(label: np.ndarray, nearest: np.ndarray, axes: Sequence[tuple], places: tuple[np.ndarray, ...]) -> np.ndarray:
    """What `_most_likely` says of single voxels at the `places` of a grid with these `_corners`, of the label `nearest`
    to each. Sums and products are in the order of scipy.ndimage.zoom, so that ties are the same to the last bit."""
    corners = []
    for corner in itertools.product((0, 1), repeat=label.ndim):
        at = tuple(voxels[side][place] for (voxels, _), side, place in zip(axes, corner, places, strict=True))
        weight = math.prod(weights[side][place] for (_, weights), side, place in zip(axes, corner, places, strict=True))
        corners.append((label[at], weight))

    def score(value: np.ndarray) -> np.ndarray:
        return sum((found == value) * weight for found, weight in corners)

    chosen, best = nearest.copy(), score(nearest)
    for value in np.unique([found for found, _ in corners]):
        better = (now := score(value)) > best
        chosen[better], best[better] = value, now[better]
    return chosen


def _corners(old: int, new: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """For each of `new` voxels of an axis the two of `old` ones that it lies between, and their weights. Beyond the
    outermost voxel both are this one."""
    places = _places(old, new)
    lower = np.floor(places)
    weight = 1 - (places - lower)
    lower = lower.astype(int)
    return (lower.clip(0, old - 1), (lower + 1).clip(0, old - 1)), (weight, 1 - weight)


def _places(old: int, new: int) -> np.ndarray:
    """Where the voxels of an axis of `new` voxels lie among those of `old` ones."""
    return (old / new) * (np.arange(new) + 0.5) - 0.5  # in this very order: halves below depend on it


def _nearest(old: int, new: int) -> np.ndarray:
    """The nearest of `old` voxels to each of `new` ones; of two the later."""
    return np.floor(_places(old, new) + 0.5).astype(int).clip(0, old - 1)


def _neighbours(old: int, new: int, nearest: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """For each of `new` voxels of an axis the two of `old` ones that it lies between, and the second one's weight;
    None where that is not needed: the axis stays, or the nearest is taken."""
    if nearest or old == new:
        return _nearest(old, new), _nearest(old, new), None
    places = _places(old, new).clip(0, old - 1)
    lower = np.floor(places).astype(int)
    return lower, np.minimum(lower + 1, old - 1), (places - lower).astype(np.float32)


def _along(values: np.ndarray, axis: int, lower: np.ndarray, upper: np.ndarray, weight: np.ndarray | None):
    """Linear interpolation along an axis, in the type of the values."""
    result = values.take(lower, axis)
    if weight is not None:
        more = values.take(upper, axis) - result
        more *= np.expand_dims(weight, [other for other in range(values.ndim) if other != axis])
        result += more
    return result


def _softmax(values: np.ndarray) -> np.ndarray:
    """Over the first axis, in place."""
    values -= values.max(0)
    np.exp(values, out=values)
    values /= values.sum(0)
    return values

"""How nnU-Net resamples images, labels and what a network predicts. Axes in any order; without torch.

Grids share the borders of their volume, not the centres of their first voxels. Where the voxels are much longer along
one axis, the planes across it are resampled one by one, and the nearest of them are taken along it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from scipy import ndimage

ANISOTROPIC = 3  # longest side of a voxel / shortest: above it one axis is set apart
LEAST = np.finfo(np.float32).tiny  # probability whose logarithm is taken for that of 0


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
    return _resample(channel, shape, separate, lambda array, size: _zoom(array, size, 3))


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


def _zoom(array: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    """Spline interpolation in double precision, without smoothing; clipped to the range of the array, of its type
    (boolean arrays become double)."""
    factors = [new / old for old, new in zip(array.shape, shape, strict=True)]
    zoomed = ndimage.zoom(array.astype(np.float64, order="C"), factors, order=order, mode="nearest", grid_mode=True)
    zoomed.clip(array.min(), array.max(), out=zoomed)
    return zoomed if array.dtype == bool else zoomed.astype(array.dtype, copy=False)


def _most_likely(label: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Each voxel gets the label whose mask, interpolated linearly, is largest there. Among several it is that of the
    nearest voxel, or the smallest if that is none of them."""
    value, *others = np.unique(label)
    result = np.full(shape, value)
    if not others:
        return result
    nearest = _zoom(label, shape, 0)
    best, nearest_is_best = _zoom(label == value, shape, 1), nearest == value
    for value in others:
        score = _zoom(label == value, shape, 1)
        better = score > best
        nearest_is_best &= ~better
        nearest_is_best |= (nearest == value) & (score >= best)
        result[better] = value
        np.maximum(best, score, out=best)
    return np.where(nearest_is_best, nearest, result)


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

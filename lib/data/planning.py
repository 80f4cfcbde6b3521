"""nnU-Net's experiment planning: from the fingerprint of a data set to the plan of a training. Nothing here needs torch.

Axes are in nnU-Net's order: the last stored axis first, and "transposed": then the axis of the largest voxels first.
The functions up to `low_resolution` do literally what nnU-Net does; `plan` adds what is our own.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lib.data.fingerprint import Fingerprint
from lib.data.normalization import SCHEMES, Normalization
from lib.system.error import InputError

Rows = tuple[tuple[int, ...], ...]  # a number per axis for each level

LEVELS_AT_LEAST = 3  # of lib/models/nnUNet.py
FAR_COARSER = 3  # an axis whose voxels are more than so many times larger is one of slices
MASK_BELOW = 0.75  # z-score over the nonzero voxels where the crop leaves less than this share


class Reference(NamedTuple):
    """What nnU-Net takes as given, by the number of axes."""

    extent: int  # voxels along each axis of the first patch, were they of one size
    values: float  # the estimate that fits 8 GB
    batch: int  # with this batch
    fms_max: int


REFERENCES = {2: Reference(2048, 85e6, 12, 512), 3: Reference(256, 560e6, 2, 320)}


@dataclass(frozen=True)
class Topology:
    """The levels of a network: the step down to each, its convolutions, and the patch padded to what these divide."""

    patch: tuple[int, ...]
    strides: Rows
    kernels: Rows

    @property
    def divisor(self) -> tuple[int, ...]:
        return tuple(map(math.prod, zip(*self.strides, strict=True)))


@dataclass(frozen=True)
class Configuration:
    """A network and its batch for one spacing. median: the shape of the median image at this spacing. hold, cover: the
    batches that the memory holds, and that covers 5% of all voxels."""

    spacing: tuple[float, ...]
    median: tuple[float, ...]
    topology: Topology
    widths: tuple[int, ...]
    estimate: int
    hold: int
    cover: int

    @property
    def batch(self) -> int:
        return max(min(self.hold, self.cover), 2)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a training is to do, transposed. In 2D patch_size, median_shape, strides and kernels lack axis 0, and its
    spacing is None: it stays as it is. reasons: (line, value, reason) for `table`."""

    dim: str
    transpose: tuple[int, int, int]  # nnU-Net's transpose_forward
    spacing: tuple[float | None, float, float]  # mm
    median_shape: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    strides: Rows
    kernels: Rows
    fms_init: int
    fms_max: int
    widths: tuple[int, ...]
    normalizations: tuple[Normalization, ...]
    crop: bool
    batch_dice: bool
    lowres: Configuration | None  # what nnU-Net would train as well; for the record
    estimate: int  # nnU-Net's, of the feature values of a patch
    memory_gb: float  # of the GPU, for the batch
    patches_per_volume: int  # in an epoch
    reasons: tuple[tuple[str, str, str], ...]

    @property
    def levels(self) -> int:
        return len(self.strides)


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The spacing in mm to resample to, for spacings and shapes of (cases, 3): the median; along an axis of few and
    thick slices their 10th percentile, but not less than that of the other axes."""
    target, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [axis for axis in range(3) if axis != worst]
    if target[worst] > FAR_COARSER * max(target[others]) and FAR_COARSER * shape[worst] < min(shape[others]):
        thin = np.percentile(spacings[:, worst], 10)
        target[worst] = thin if thin >= max(target[others]) else max(target[others]) + 1e-5
    return target


def transposition(target: Sequence[float]) -> tuple[int, ...]:
    """The order of axes: that of the largest target spacing first."""
    worst = int(np.argmax(target))
    return (worst, *(axis for axis in range(3) if axis != worst))


def new_shape(shape: Sequence[int], old: Sequence[float], new: Sequence[float]) -> tuple[int, ...]:
    """The shape after resampling from the spacing `old` to `new`."""
    return tuple(int(round(a / b * n)) for n, a, b in zip(shape, old, new, strict=True))


def topology(
    spacing: Sequence[float],
    patch: Sequence[float],
    *,
    least: int = 1,
    most: int = 10**6,
    strides: Rows | None = None,
) -> Topology:
    """The levels for a patch. Our own: at least and at most so many (fewer than `least` where no axis has more than
    two voxels left), or those with the given strides."""
    spacing, size, kernel = list(spacing), list(patch), [1] * len(patch)
    rows, kernels = [(1,) * len(patch)], []
    while len(rows) < (len(strides) if strides else most):
        stride = strides[len(rows)] if strides else _stride(spacing, size, len(rows) < least)
        if stride is None:
            break
        finest = min(spacing)
        kernel = [3 if k == 3 or mm / finest < 2 else 1 for k, mm in zip(kernel, spacing, strict=True)]
        rows.append(stride)
        kernels.append(tuple(kernel))
        spacing = [mm * s for mm, s in zip(spacing, stride, strict=True)]
        size = [math.ceil(n / s) if s > 1 else n for n, s in zip(size, stride, strict=True)]
    kernels.append((3,) * len(patch))
    divisor = map(math.prod, zip(*rows, strict=True))
    padded = tuple(math.ceil(n / d) * d for n, d in zip(patch, divisor, strict=True))
    return Topology(padded, tuple(rows), tuple(kernels))


def _stride(spacing: Sequence[float], size: Sequence[float], forced: bool) -> tuple[int, ...] | None:
    """The step to the next level: 2 along the finest of the axes that are long enough; None if there are none.
    Where it is forced, two voxels need to be left, not four."""
    for long, long_alone in ((8, 12), (3, 3)) if forced else ((8, 12),):
        axes = [axis for axis, n in enumerate(size) if n >= long]
        finest = min((spacing[axis] for axis in axes), default=0)
        axes = [axis for axis in axes if spacing[axis] / finest < 2]
        if len(axes) > 1 or (axes and size[axes[0]] >= long_alone):
            return tuple(2 if axis in axes else 1 for axis in range(len(size)))
    return None


def estimated(net: Topology, widths: Sequence[int], n_labels: int) -> int:
    """nnU-Net's measure of memory: the values of all feature maps of a patch. The decoder's level has two convolutions
    and the way up, the encoder's two convolutions."""
    sizes, size = [], net.patch
    for stride in net.strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        sizes.append(math.prod(size))
    values = [width * voxels for width, voxels in zip(widths, sizes, strict=True)]
    return sum(2 * n for n in values) + sum(3 * n for n in values[:-1]) + n_labels * sizes[0]


def configuration(
    spacing: Sequence[float],
    median: Sequence[float],
    voxels: float,
    n_labels: int,
    memory_gb: float = 8.0,
    *,
    patch: tuple[int, ...] | None = None,
    least: int = 1,
    most: int = 10**6,
    strides: Rows | None = None,
    fms_init: int = 32,
    fms_max: int | None = None,
) -> Configuration:
    """nnU-Net's network for the median image of this shape, transposed; two axes for 2D. voxels: of all training cases.

    Our own: a given patch, numbers of levels as for `topology`, given strides, and widths. Raises InputError where the
    memory holds no patch at all.
    """
    reference = REFERENCES[len(spacing)]
    target = reference.values * memory_gb / 8

    def widths_of(net: Topology) -> tuple[int, ...]:
        return tuple(min(fms_init * 2**level, fms_max or reference.fms_max) for level in range(len(net.strides)))

    def net_of(patch: Sequence[float]) -> Topology:
        return topology(spacing, patch, most=most, strides=strides)

    if patch:
        net = net_of(patch)
    else:
        fine = 1 / np.array(spacing, float)
        axes = len(fine)
        first = [round(n) for n in (fine * (reference.extent**axes / np.prod(fine)) ** (1 / axes)).tolist()]
        net = net_of([min(n, m) for n, m in zip(first, median, strict=True)])
        while estimated(net, widths_of(net), n_labels) / reference.batch * 2 > target:
            axis = _longest(net, median)
            if axis is None:
                raise InputError(f"--memory_gb {memory_gb:g}: holds no patch at all; give more")
            net = net_of(_shortened(net.patch, axis, net_of(_shortened(net.patch, axis, net.divisor[axis])).divisor[axis]))
    if len(net.strides) < least:
        patch = patch or net.patch
        if least == LEVELS_AT_LEAST and max(patch) < 5 and patch is net.patch:  # two halvings leave one voxel
            patch = tuple(8 if n == max(patch) else n for n in patch)
        net = topology(spacing, patch, least=least, most=least)
    widths = widths_of(net)
    estimate = estimated(net, widths, n_labels)
    return Configuration(
        tuple(map(float, spacing)),
        tuple(map(float, median)),
        net,
        widths,
        estimate,
        round(target / estimate * reference.batch),
        round(voxels * 0.05 / math.prod(net.patch)),
    )


def _longest(net: Topology, median: Sequence[float]) -> int | None:
    """The axis that the patch covers most of, of those where it can be shorter; the last of equal ones."""
    axes = [axis for axis, n in enumerate(net.patch) if n > net.divisor[axis]]
    return max(axes, key=lambda axis: (net.patch[axis] / median[axis], axis), default=None)


def _shortened(patch: tuple[int, ...], axis: int, n: int) -> tuple[int, ...]:
    return (*patch[:axis], patch[axis] - n, *patch[axis + 1 :])


def low_resolution(full: Configuration, n_training: int, n_labels: int, memory_gb: float = 8.0) -> Configuration | None:
    """nnU-Net's 3d_lowres, which it trains as well where a patch sees less than a quarter of the median image; None
    where there is none, or it would not be half the size."""
    spacing, low, median = np.array(full.spacing), None, np.array(full.median)
    patch = full.topology.patch
    while math.prod(patch) / np.prod(median) < 0.25:
        fine = max(spacing) / spacing > 2
        spacing = np.where(fine if fine.any() else True, spacing * 1.03, spacing)
        median = np.array(full.spacing) / spacing * full.median
        shape = [round(n) for n in median.tolist()]
        low = configuration(spacing, shape, float(np.prod(median)) * n_training, n_labels, memory_gb)
        patch = low.topology.patch
    return low if low and np.prod(full.median) / np.prod(median) >= 2 else None

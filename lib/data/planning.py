"""nnU-Net's experiment planning: from the fingerprint of a data set to the plan of a training. It needs no torch.

Axes are in nnU-Net's order: the last stored axis first, and "transposed": then the axis of the largest voxels first.
The functions up to `low_resolution` do literally what nnU-Net does; `plan` adds what is our own.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from lib.data.fingerprint import Fingerprint
from lib.data.normalization import SCHEMES, Normalization, scheme_of
from lib.system.error import InputError

Rows = tuple[tuple[int, ...], ...]  # a number per axis for each level

LEVELS_AT_LEAST = 3  # of lib/models/nnUNet.py
LEVELS_AT_MOST = 10**6  # nnU-Net has no limit
FMS_INIT = 32
FAR_COARSER = 3  # an axis whose voxels are more than so many times larger is one of slices
FEW_SLICES = 10  # and where the other axes have more than so many times as many voxels, a 2D network does
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
    """A network and its batch for one spacing. median: the shape of the median image at this spacing. estimate: of the
    feature values of a patch. hold, cover: the batch that the memory holds, and the one that covers 5% of all voxels.
    shallow: the number of levels before it was raised to the least."""

    spacing: tuple[float, ...]
    median: tuple[float, ...]
    topology: Topology
    widths: tuple[int, ...]
    estimate: int
    hold: int
    cover: int
    shallow: int

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
    most: int = LEVELS_AT_MOST,
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
    most: int = LEVELS_AT_MOST,
    strides: Rows | None = None,
    fms_init: int = FMS_INIT,
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
        first = [max(1, round(n)) for n in (fine * (reference.extent**axes / np.prod(fine)) ** (1 / axes)).tolist()]
        net = net_of([min(n, m) for n, m in zip(first, median, strict=True)])
        while estimated(net, widths_of(net), n_labels) / reference.batch * 2 > target:
            axis = _longest(net, median)
            if axis is None:
                raise InputError(f"--gpu_memory {memory_gb:g}: holds no patch at all; give more")
            smaller = net_of(_shortened(net.patch, axis, net.divisor[axis]))
            net = net_of(_shortened(net.patch, axis, smaller.divisor[axis]))
    shallow = len(net.strides)
    if shallow < least:
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
        shallow,
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
        shape = [max(1, round(n)) for n in median.tolist()]
        low = configuration(spacing, shape, float(np.prod(median)) * n_training, n_labels, memory_gb)
        patch = low.topology.patch
    return low if low and np.prod(full.median) / np.prod(median) >= 2 else None


def plan(
    fingerprint: Fingerprint,
    channels: Sequence[str],
    n_labels: int,
    n_training: int,
    *,
    given: Mapping[str, object] = MappingProxyType({}),
    memory_gb: float = 8.0,
) -> Plan:
    """The plan for channels of these names, so many entries of `labels` in dataset.json, and training cases.

    given: what flags set, by their names without "--": "dim", "spacing" (mm by axis, not transposed; 0 or None: as
    planned), "axes" (transpose_forward), "patch_size", "batch_size", "levels", "strides", "kernels" (a row per level),
    "fms_init", "fms_max", "normalization" (a scheme per channel), "crop". What follows from these follows. None: not
    given. Raises InputError where they contradict the data or one another.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not 0 < memory_gb < math.inf:
        raise InputError(f"--gpu_memory {memory_gb:g}: give a number above 0")
    spacings, shapes = np.array(fingerprint.spacings, float), np.array(fingerprint.shapes)
    planned = target_spacing(spacings, shapes)
    wanted = _wanted(given.get("spacing"))
    target = np.where(wanted, wanted, planned)
    transpose, why_order = _order(target, given.get("axes"))
    order = list(transpose)
    resampled = [new_shape(shape, old, target) for shape, old in zip(shapes.tolist(), spacings, strict=True)]
    median, spacing = np.median(resampled, axis=0)[order], target[order]
    if min(median) < 1:
        raise InputError(f"--spacing {_row(target)}: leaves no voxel of the median image; give smaller voxels")
    slices = float(np.median(shapes[:, transpose[0]]))  # as they are, without resampling
    dim, why_dim = _dim(spacing, median, slices, given)
    why_spacing = _why_spacing(dim, np.median(spacings, axis=0)[order], planned[order], wanted[order])
    axes = int(dim[0])
    voxels = float(np.prod(median)) * n_training
    net = _network(spacing[-axes:], median[-axes:], voxels, n_labels, memory_gb, given)
    low = low_resolution(net, n_training, n_labels, memory_gb) if dim == "3D" else None
    normalizations, normalization_rows = _normalizations(fingerprint, channels, given)

    patch, batch = net.topology.patch, given.get("batch_size", net.batch)
    reference = REFERENCES[axes]
    memory = 8 * net.estimate / reference.values * batch / reference.batch
    volume = median if dim == "3D" else [slices, *median[1:]]
    patches = max(1, round(math.prod(volume) / math.prod(patch)))
    crop = bool(given.get("crop", True))

    rows = [
        ("dim", dim, why_dim),
        ("axis order", _row(transpose), why_order),
        ("spacing", f"{_size(spacing[-axes:])} mm", why_spacing),
        *_thick_slices(dim, spacings[:, order], spacing),
        *normalization_rows,
        (
            "crop",
            "to what is not 0" if crop else "no",
            "--no_crop" if "crop" in given else f"leaves {fingerprint.relative_size:.0%} of the voxels (median)",
        ),
        *_network_rows(net, given, memory_gb),
        *([_lowres_row(net, low)] if dim == "3D" else []),
        (
            "GPU memory",
            f"about {memory:.1f} GB",
            f"nnU-Net's estimate, of {net.estimate:,} feature values a patch"
            + (f"; more than --gpu_memory {memory_gb:g}" if memory > 1.2 * memory_gb else ""),
        ),
        ("patches of an epoch", f"{patches} a volume", f"what covers the median volume of {_size(volume)} voxels once"),
    ]
    return Plan(
        dim=dim,
        transpose=transpose,
        spacing=(None if dim == "2D" else float(spacing[0]), float(spacing[1]), float(spacing[2])),
        median_shape=net.median,
        patch_size=patch,
        batch_size=batch,
        strides=net.topology.strides,
        kernels=net.topology.kernels,
        fms_init=given.get("fms_init", FMS_INIT),
        fms_max=given.get("fms_max", reference.fms_max),
        widths=net.widths,
        normalizations=normalizations,
        crop=crop,
        batch_dice=dim == "2D" or low is not None,
        lowres=low,
        estimate=net.estimate,
        memory_gb=memory,
        patches_per_volume=patches,
        reasons=tuple(rows),
    )


def table(plan: Plan) -> str:
    """The plan as a table of names, values and reasons, for a terminal of 120 columns."""
    columns = (20, 40, 54)
    lines = []
    for row in (("", "value", "reason"), *plan.reasons):
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, columns, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append(" | ".join(f"{part:<{n}}" for part, n in zip(parts, columns, strict=True)).rstrip())
    return "\n".join(lines)


def _wanted(given: Sequence[float | None] | None) -> np.ndarray:
    """The spacing that is given, 0 where it is not."""
    wanted = [mm or 0.0 for mm in (given or (0, 0, 0))]
    if len(wanted) != 3 or not all(0 <= mm < math.inf for mm in wanted):
        raise InputError(f"--spacing {_row(given)}: give mm along three axes (z, y, x), 0 for an axis as planned")
    return np.array(wanted)


def _why_spacing(dim: str, median: np.ndarray, planned: np.ndarray, wanted: np.ndarray) -> str:
    """Why the network's axes have the spacing that is `wanted`, or else `planned`; all of them transposed."""
    median, planned, wanted = (spacing[-int(dim[0]) :] for spacing in (median, planned, wanted))
    why, thick = "the median", planned != median
    if thick.any():
        others = max(median[~thick])
        why += f"; one axis is {max(median) / others:.1f} times coarser, so there the 10th percentile"
        why += ", but no finer than the others" if planned[thick][0] == others + 1e-5 else ""
    if all(wanted):
        why = "--spacing"
    elif any(wanted):
        why = f"--spacing, where it is not 0; else {why}"
    return why + ("; slices stay as thick as they are" if dim == "2D" else "")


def _order(target: np.ndarray, given: Sequence[int] | None) -> tuple[tuple[int, int, int], str]:
    """The order of axes, and why."""
    if given is not None:
        if sorted(given) != [0, 1, 2]:
            raise InputError(f"--axes {_row(given)}: give each of 0, 1 and 2 once, such as 0 1 2")
        return tuple(given), "--axes; axes count from the last stored one"
    order = transposition(target)
    moved = "the coarsest axis first" if order[0] else "the coarsest axis is first already"
    return order, f"{moved}; axes count from the last stored one" if len(set(target)) > 1 else "all axes are alike"


def _dim(spacing: np.ndarray, median: np.ndarray, slices: float, given: Mapping) -> tuple[str, str]:
    """ "2D" or "3D", and why."""
    numbers = {"dim": int(given["dim"][0])} if "dim" in given else {}
    numbers |= {name: len(given[name]) for name in ("patch_size",) if name in given}
    numbers |= {name: len(given[name][0]) for name in ("strides", "kernels") if given.get(name)}
    for name, axes in numbers.items():
        first = next(iter(numbers))
        if axes not in REFERENCES or axes != numbers[first]:
            other = f" as --{first} has" if first != name else ""
            raise InputError(f"--{name}: has {axes} axes; give 2 (2D) or 3 (3D){other}")
    if median[0] == 1:
        if any(axes == 3 for axes in numbers.values()):
            raise InputError(f"--{next(iter(numbers))}: the images have one slice, so there is no 3D network; give 2D")
        return "2D", "the images have one slice"
    if numbers:
        return f"{next(iter(numbers.values()))}D", f"--{next(iter(numbers))}"
    coarser, in_plane = spacing[0] / max(spacing[1:]), min(median[1:])
    if coarser > FAR_COARSER and in_plane > FEW_SLICES * slices:
        return "2D", (
            f"voxels are {coarser:.1f} times as long across the slices, and there are few: {slices:g}, of {in_plane:g} "
            "voxels a side or more; a 2D network costs far less there"
        )
    if coarser > FAR_COARSER:
        return "3D", f"there are {slices:g} slices, not less than a tenth of the voxels along the other axes"
    return "3D", f"no axis is more than {FAR_COARSER} times coarser than the others"


def _network(
    spacing: np.ndarray, median: np.ndarray, voxels: float, n_labels: int, memory_gb: float, given: Mapping
) -> Configuration:
    """nnU-Net's network, of three levels at least, with what is given. Raises InputError where that does not fit."""
    patch, strides, kernels, levels = (given.get(name) for name in ("patch_size", "strides", "kernels", "levels"))
    axes = len(spacing)
    patch = patch and tuple(patch)
    if patch and min(patch) < 1:
        raise InputError(f"--patch_size {_row(patch)}: give whole numbers above 0")
    strides, kernels = (rows and tuple(map(tuple, rows)) for rows in (strides, kernels))
    if levels is not None and levels < LEVELS_AT_LEAST:
        raise InputError(f"--levels {levels}: give at least {LEVELS_AT_LEAST}")
    if strides and levels not in (None, len(strides)):
        raise InputError(f"--strides: {len(strides)} rows for --levels {levels}; give one row for each level")
    if strides and len(strides) < LEVELS_AT_LEAST:
        raise InputError(f"--strides: {len(strides)} rows; give one for each of at least {LEVELS_AT_LEAST} levels")
    for name, rows in (("strides", strides), ("kernels", kernels)):
        if rows and not all(len(row) == axes and min(row) >= 1 for row in rows):
            raise InputError(f"--{name}: give {axes} whole numbers above 0 for each level")
    if strides and max(strides[0]) > 1:
        raise InputError(
            f"--strides: starts with {_row(strides[0])}; the first level has the size of the patch: give 1s"
        )
    if kernels and any(n % 2 == 0 for row in kernels for n in row):
        raise InputError("--kernels: give odd numbers, such as 1 or 3")

    def fitted(patch: tuple[int, ...] | None) -> Configuration:
        return configuration(
            spacing,
            median,
            voxels,
            n_labels,
            memory_gb,
            patch=patch,
            least=1 if strides else levels or LEVELS_AT_LEAST,
            most=levels or LEVELS_AT_MOST,
            strides=strides,
            fms_init=given.get("fms_init", FMS_INIT),
            fms_max=given.get("fms_max"),
        )

    full = fitted(patch)
    net = full.topology
    if patch and len(net.strides) < LEVELS_AT_LEAST:
        raise InputError(f"--patch_size {_row(patch)}: too small for {LEVELS_AT_LEAST} levels; give 8 along an axis")
    if levels and len(net.strides) < levels:
        room = max(LEVELS_AT_LEAST, len(net.strides))
        raise InputError(
            f"--levels {levels}: a patch of {_size(net.patch)} voxels has room for {room}; give at most as many, or a "
            "larger --patch_size"
        )
    if patch and patch != net.patch:
        sizes = [size for size in (_below(patch, fitted), _above(net.patch, fitted)) if size]
        raise InputError(
            f"--patch_size {_row(patch)}: no multiple of {_row(net.divisor)}, which the levels divide it by; give "
            + " or ".join(map(_row, sizes))
        )
    if net.patch == net.divisor:
        raise InputError("--strides: leave one voxel of the patch at the deepest level; give smaller ones")
    if kernels and len(kernels) != len(net.strides):
        raise InputError(f"--kernels: {len(kernels)} rows for {len(net.strides)} levels; give one row for each level")
    return replace(full, topology=replace(net, kernels=kernels)) if kernels else full


def _above(patch: tuple[int, ...], fitted: Callable[[tuple[int, ...]], Configuration]) -> tuple[int, ...]:
    """The smallest patch from here on that stays as it is: a padded one may have room for more levels."""
    while (padded := fitted(patch).topology.patch) != patch:
        patch = padded
    return patch


def _below(patch: tuple[int, ...], fitted: Callable[[tuple[int, ...]], Configuration]) -> tuple[int, ...] | None:
    """The next smaller patch that needs no padding, if there is one."""
    while min(patch) > 0:
        net = fitted(patch).topology
        if net.patch == patch:
            return patch if len(net.strides) >= LEVELS_AT_LEAST else None
        patch = tuple(n // d * d for n, d in zip(patch, net.divisor, strict=True))
    return None


def _normalizations(
    fingerprint: Fingerprint, channels: Sequence[str], given: Mapping
) -> tuple[tuple[Normalization, ...], list[tuple[str, str, str]]]:
    """For each channel its normalization, and its line of the table."""
    schemes = given.get("normalization")
    if schemes is not None and (len(schemes) != len(channels) or not set(schemes) <= set(SCHEMES)):
        raise InputError(
            f"--normalization {_row(schemes)}: give one of {', '.join(SCHEMES)} for each of {len(channels)} channels"
        )
    crop, share = given.get("crop", True), fingerprint.relative_size
    found, rows = [], []
    for i, channel in enumerate(channels):
        named = channel.casefold() in SCHEMES
        scheme = schemes[i] if schemes else scheme_of(channel)
        why = "--normalization" if schemes else "the channel's name" if named else "as for any channel of another name"
        shown = f"{channel}: {scheme}"
        one = Normalization(scheme)
        if scheme == "ct":
            numbers = fingerprint.intensities[i]
            low, high, mean, std = (numbers[key] for key in ("percentile_00_5", "percentile_99_5", "mean", "std"))
            one = Normalization(scheme, low=low, high=high, mean=mean, std=std)
            shown += f", clip to [{low:.5g}, {high:.5g}], (x - {mean:.5g}) / {std:.5g}"
            why += "; percentiles 0.5 and 99.5, mean and standard deviation of the foreground"
        elif scheme == "zscore":
            one = Normalization(scheme, masked=bool(crop and share < MASK_BELOW))
            shown += " of voxels that are not 0" if one.masked else ""
            if one.masked:
                why += f"; not over the background, as the crop leaves less than {MASK_BELOW:.0%}"
        found.append(one)
        rows.append(("normalization", shown, why))
    return tuple(found), rows


def _thick_slices(dim: str, spacings: np.ndarray, target: np.ndarray) -> list[tuple[str, str, str]]:
    """A line for the table where slices far apart are resampled; spacings and target are transposed."""
    far = spacings[:, 0] > FAR_COARSER * np.max(spacings[:, 1:], axis=1)
    far &= ~np.isclose(spacings[:, 0], target[0], rtol=1e-3)
    if dim == "2D" or not far.any():
        return []
    apart = np.median(spacings[far, 0])
    why = f"in {far.sum()} of {len(far)} cases each is taken from the nearest one, so some come twice or not at all"
    return [("thick slices", f"{apart:.6g} mm apart become {target[0]:.6g} mm", f"{why}; --spacing sets another size")]


def _network_rows(net: Configuration, given: Mapping, memory_gb: float) -> list[tuple[str, str, str]]:
    """The lines of the table from the patch to the batch. A line that a flag has set says so."""
    shape, levels, divisor = net.topology.patch, len(net.topology.strides), _size(net.topology.divisor)
    if all(n >= m for n, m in zip(shape, net.median, strict=True)):
        why_patch = f"the median shape of {_size(net.median)}, padded to a multiple of {divisor}"
    else:
        why_patch = (
            f"what --gpu_memory {memory_gb:g} holds of the median shape of {_size(net.median)}: a multiple of "
            f"{divisor}, about as long in mm along each axis"
        )
    why_levels = "the patch is halved as long as 4 voxels are left"
    if net.shallow < levels:
        why_levels = f"nnU-Net's plan has {net.shallow}, this network needs {levels}; the patch is padded for them"
    why_strides = "2 along the axes that are less than twice as coarse as the finest, while they are long enough"
    why_kernels = "3, once an axis is less than twice as coarse as the finest"
    why_widths = f"{net.widths[0]}, twice as many with each level, at most {REFERENCES[len(net.spacing)].fms_max}"
    why_batch = f"of {net.hold} that --gpu_memory {memory_gb:g} holds and {net.cover} that cover 5% of all voxels the "
    why_batch += "fewer" if min(net.hold, net.cover) >= 2 else "fewer, but at least 2"
    batch = given.get("batch_size", net.batch)

    def why(reason: str, *names: str) -> str:
        return " and ".join(f"--{name}" for name in names if name in given) or reason

    return [
        ("patch", f"{_size(shape)} voxels", why(why_patch, "patch_size")),
        ("levels", str(levels), why(why_levels, "levels", "strides")),
        ("strides", _rows(net.topology.strides), why(why_strides, "strides")),
        ("kernels", _rows(net.topology.kernels), why(why_kernels, "kernels")),
        ("widths", _row(net.widths), why(why_widths, "fms_init", "fms_max")),
        ("batch", f"{batch} patches", why(why_batch, "batch_size")),
    ]


def _lowres_row(net: Configuration, low: Configuration | None) -> tuple[str, str, str]:
    """The line of the table on nnU-Net's second 3D network."""
    share = f"a patch sees {min(1, math.prod(net.topology.patch) / math.prod(net.median)):.0%} of the median volume"
    if low is None:
        return "low resolution", "none", share
    size, mm = _size(low.topology.patch), _size(low.spacing)
    return "low resolution", "not used here", f"{share}, so nnU-Net also trains with voxels of {mm} mm, patch {size}"


def _row(numbers: Iterable) -> str:
    return " ".join(f"{n:g}" if isinstance(n, int | float) else str(n) for n in numbers)


def _rows(rows: Rows) -> str:
    return " ".join("".join(map(str, row)) for row in rows)


def _size(numbers: Iterable[float]) -> str:
    return " x ".join(f"{n:.6g}" for n in numbers)

"""nnU-Net's experiment planning: from the fingerprint of a data set to the plan of a training. Without torch.

Axes are in nnU-Net's order: the last stored axis first, and "transposed": then the axis of the largest voxels first.
The functions up to `low_resolution` do literally what nnU-Net does; `plan` adds what is our own.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lib.data.fingerprint import Fingerprint
from lib.data.normalization import Normalization, scheme_of
from lib.system.error import InputError

Rows = tuple[tuple[int, ...], ...]  # a number per axis for each level

LEVELS_AT_LEAST = 3  # of lib/models/nnUNet.py
FAR_COARSER = 3  # an axis whose voxels are more than so many times larger is one of slices
FEW_SLICES = 6  # an axis with less than this part of the voxels of the others: slices are taken one by one
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
                raise InputError(f"--gpu_memory {memory_gb:g}: holds no patch at all; give more")
            net = net_of(
                _shortened(net.patch, axis, net_of(_shortened(net.patch, axis, net.divisor[axis])).divisor[axis])
            )
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


def plan(
    fingerprint: Fingerprint,
    channels: Sequence[str],
    n_labels: int,
    n_training: int,
    *,
    given: Mapping[str, Any] | None = None,
    memory_gb: float = 8.0,
) -> Plan:
    """What to train on images of this fingerprint. n_labels: with background and "ignore".

    given: what flags have set: dim, axes, spacing (mm, the last stored axis first; 0: as planned), patch_size, levels,
    strides, kernels, fms_init, fms_max, batch_size, normalization (a scheme for each channel), crop. What comes later
    in nnU-Net's order follows from them. Raises InputError where they do not fit one another, or the images.
    """
    given = dict(given or {})
    shapes, spacings = np.array(fingerprint.shapes), np.array(fingerprint.spacings, float)
    rows = _Rows(given)

    planned = target_spacing(spacings, shapes)
    target = [mm or own for mm, own in zip(given.get("spacing") or (0, 0, 0), planned.tolist(), strict=True)]
    order = tuple(given.get("axes") or transposition(target))
    if sorted(order) != [0, 1, 2]:
        raise InputError(f"--axes {' '.join(map(str, order))}: give 0, 1 and 2 in some order")
    resampled = np.array([new_shape(n, mm, target) for n, mm in zip(shapes, spacings, strict=True)])[:, list(order)]
    spacing = tuple(target[axis] for axis in order)
    median = tuple(np.median(resampled, axis=0).tolist())
    dim, why = _dim(spacing, median)
    if given.get("dim") == "3D" and median[0] == 1:
        raise InputError("--dim 3D: the images are single slices; leave it out, or give --dim 2D")
    dim = given.get("dim") or dim
    first = 1 if dim == "2D" else 0
    rows.add("dim", dim, why)
    rows.add(
        "axes", " ".join(map(str, order)), "0 is the last stored axis; the one with the largest voxels comes first"
    )
    kept = (None if dim == "2D" else spacing[0], *spacing[1:])
    rows.add("spacing", _spacing_text(kept), _spacing_reason(spacings[:, list(order)], spacing, dim, planned, order))

    crop = given.get("crop", True)
    normalizations, lines = _normalizations(fingerprint, channels, given.get("normalization"), crop)
    for name, text, reason in lines:
        rows.add("normalization", text, reason, f"channel {name}")
    share = f"a crop to what is not 0 leaves {fingerprint.relative_size:.0%} of a median image"
    rows.add("no_crop", "to nonzero" if crop else "none", share, "crop")

    voxels = float(np.prod(median)) * n_training
    net = {"least": LEVELS_AT_LEAST, "fms_init": given.get("fms_init") or 32, "fms_max": given.get("fms_max")}
    if given.get("levels"):
        net |= {"least": given["levels"], "most": given["levels"]}
    if given.get("strides"):
        net |= {"least": 1, "strides": tuple(map(tuple, given["strides"]))}
    patch = tuple(given["patch_size"]) if given.get("patch_size") else None
    for key, sizes in (("patch_size", [patch] if patch else []), ("strides", net.get("strides", ()))):
        if any(len(size) != 3 - first for size in sizes):
            raise InputError(
                f"--{key}: a {dim} network needs {3 - first} numbers on each level; mend it, or give --dim"
            )
    chosen = configuration(spacing[first:], median[first:], voxels, n_labels, memory_gb, patch=patch, **net)
    usual = configuration(spacing[first:], median[first:], voxels, n_labels, memory_gb)
    topo = _checked(chosen.topology, patch, given)
    kernels = tuple(map(tuple, given["kernels"])) if given.get("kernels") else topo.kernels
    if [*map(len, kernels)] != [3 - first] * len(topo.strides):
        raise InputError(f"--kernels: give {3 - first} digits for each of {len(topo.strides)} levels")
    low = low_resolution(chosen, n_training, n_labels, memory_gb) if dim == "3D" and not patch else None
    batch = given.get("batch_size") or chosen.batch

    memory = f"{memory_gb:g} GB by nnU-Net's estimate"
    shape = _sizes(median[first:])
    rows.add(
        "patch_size",
        _sizes(topo.patch),
        f"the median image is {shape}; what fits {memory}, in multiples of the strides",
    )
    raised = len(usual.topology.strides) < LEVELS_AT_LEAST and not (given.get("levels") or given.get("strides"))
    why = "halve while 8 voxels are left, the finest axes first"
    if raised:
        why = f"nnU-Net would take {len(usual.topology.strides)}; this network needs {LEVELS_AT_LEAST}"
    rows.add("levels", str(len(topo.strides)), why)
    rows.add(
        "strides", _words(topo.strides), "step from level to level, by axis; an axis twice as coarse as another waits"
    )
    rows.add("kernels", _words(kernels), "1 along an axis whose voxels are still twice as large as the smallest")
    rows.add(
        "fms_init",
        _sizes(chosen.widths, " "),
        f"filters by level: twice as many on each, {chosen.widths[-1]} at the end",
        "filters",
    )
    why = f"{memory} would hold {chosen.hold}, 5% of all training voxels are {chosen.cover} patches; at least 2"
    rows.add("batch_size", str(batch), why, "batch")
    if low:
        rows.add(
            "",
            _sizes(low.topology.patch),
            f"nnU-Net would train at {_spacing_text(low.spacing)}, too; not done here",
            "low resolution",
        )
    per_volume = max(1, round(float(np.prod(median)) / math.prod(topo.patch)))
    rows.add(
        "",
        str(per_volume),
        "as many as fit into the median image; each time it is augmented anew",
        "patches of a volume",
    )
    reference = REFERENCES[len(topo.patch)]
    needed = 8 * chosen.estimate * batch / (reference.values * reference.batch)
    rows.add("", f"{needed:.1f} GB", "nnU-Net's estimate for this batch on a GPU", "GPU memory")
    return Plan(
        dim=dim,
        transpose=order,
        spacing=kept,
        median_shape=median[first:],
        patch_size=topo.patch,
        batch_size=batch,
        strides=topo.strides,
        kernels=kernels,
        fms_init=net["fms_init"],
        fms_max=net["fms_max"] or reference.fms_max,
        widths=chosen.widths,
        normalizations=normalizations,
        crop=crop,
        batch_dice=dim == "2D" or low is not None,
        lowres=low,
        estimate=chosen.estimate,
        memory_gb=needed,
        patches_per_volume=per_volume,
        reasons=tuple(rows.rows),
    )


class _Rows:
    """The rows of the table; one that a flag has set says so."""

    def __init__(self, given: Mapping[str, Any]):
        self.given, self.rows = given, []

    def add(self, flag: str, value: str, reason: str, name: str = "") -> None:
        key = "crop" if flag == "no_crop" else flag
        set_by_flag = self.given.get(key) is not None and not (key == "spacing" and not any(self.given[key]))
        self.rows.append((name or flag, value, f"--{flag}" if set_by_flag else reason))


def _dim(spacing: Sequence[float], median: Sequence[float]) -> tuple[str, str]:
    """2D or 3D, and why."""
    if median[0] == 1:
        return "2D", "the images are single slices"
    ratio = spacing[0] / min(spacing[1:])
    if spacing[0] > FAR_COARSER * max(spacing[1:]) and FEW_SLICES * median[0] < min(median[1:]):
        return "2D", (
            f"voxels are {ratio:.1f} times as long along axis 0, of {median[0]:g} slices: neighbours tell little, "
            "and a 2D network is far cheaper; --dim 3D is the other one"
        )
    if ratio > FAR_COARSER:
        return (
            "3D",
            f"voxels are {ratio:.1f} times as long along axis 0, but it has {median[0]:g} slices; --dim 2D is cheaper",
        )
    return "3D", "the voxels are about as long as wide; --dim 2D is cheaper"


def _spacing_reason(
    spacings: np.ndarray, spacing: Sequence[float], dim: str, planned: np.ndarray, order: Sequence[int]
) -> str:
    """spacings: of the cases, transposed as `spacing`; planned: the target by stored axis."""
    if dim == "2D":
        return "mm, the median; slices stay where they are"
    median = np.median(spacings, axis=0)
    if median[0] != planned[order[0]]:
        ratio = median[0] / max(spacing[1:])
        return (
            f"mm, the median; axis 0 is {ratio:.1f} times coarser ({median[0]:g} mm), so the 10th percentile there; "
            "thick slices are made of their nearest neighbours, --spacing sets another"
        )
    return "mm, the median"


def _normalizations(
    fingerprint: Fingerprint, channels: Sequence[str], given: Sequence[str] | None, crop: bool
) -> tuple[tuple[Normalization, ...], list[tuple[str, str, str]]]:
    """By channel, and (channel, value, reason) for the table. Raises InputError."""
    if given and len(given) not in (1, len(channels)):
        raise InputError(f"--normalization: give one scheme, or one for each of {len(channels)} channels")
    schemes = [*given] * (len(channels) // len(given)) if given else [*map(scheme_of, channels)]
    masked = crop and fingerprint.relative_size < MASK_BELOW
    found, lines = [], []
    for channel, scheme, numbers in zip(channels, schemes, fingerprint.intensities, strict=True):
        reason = f'by its name, "{channel}"'
        if scheme == "ct":
            keys = {"low": "percentile_00_5", "high": "percentile_99_5", "mean": "mean", "std": "std"}
            one = Normalization(scheme, **{key: float(numbers[name]) for key, name in keys.items()})
            text = f"ct: [{one.low:g}, {one.high:g}] - {one.mean:g}, / {one.std:g}"
            reason += "; percentiles 0.5 and 99.5, mean and deviation of the training foreground"
        else:
            one = Normalization(scheme, masked=masked and scheme == "zscore")
            text = scheme + " of what is not 0" * one.masked
            if one.masked:
                reason += f"; the crop leaves {fingerprint.relative_size:.0%}, less than {MASK_BELOW:.0%}"
        found.append(one)
        lines.append((channel, text, reason))
    return tuple(found), lines


def _checked(found: Topology, patch: tuple[int, ...] | None, given: Mapping[str, Any]) -> Topology:
    """Raise InputError unless the network has the levels and the patch that were asked for."""
    if given.get("strides") and given.get("levels") not in (None, len(given["strides"])):
        raise InputError(f"--levels {given['levels']}: --strides has {len(given['strides'])}; leave one of them out")
    if not given.get("strides") and given.get("levels") not in (None, len(found.strides)):
        raise InputError(
            f"--levels {given['levels']}: a patch of {_sizes(found.patch)} can be halved to {len(found.strides)} "
            "levels; give that, or a larger --patch_size"
        )
    if patch and found.patch != patch:
        raise InputError(
            f"--patch_size {_sizes(patch, ' ')}: must be a multiple of {_sizes(found.divisor)} with "
            f"{len(found.strides)} levels; {_sizes(found.patch, ' ')} is"
        )
    return found


def _sizes(numbers: Sequence[float], by: str = " x ") -> str:
    return by.join(f"{n:g}" for n in numbers)


def _spacing_text(spacing: Sequence[float | None]) -> str:
    return " x ".join("-" if mm is None else f"{mm:.5g}" for mm in spacing) + " mm"


def _words(rows: Rows) -> str:
    return " ".join("".join(map(str, row)) for row in rows)


def table(plan: Plan, width: int = 120) -> str:
    """The plan, a line for each decision and its reason, for a screen of `width` columns."""
    names, values = (max(len(row[i]) for row in plan.reasons) for i in (0, 1))
    values = min(values, 40)
    lines = []
    for name, value, reason in plan.reasons:
        right = textwrap.wrap(reason, width - names - values - 6) or [""]
        middle = textwrap.wrap(value, values) or [""]
        for i in range(max(len(right), len(middle))):
            cells = [name if i == 0 else "", *(column[i] if i < len(column) else "" for column in (middle, right))]
            lines.append(f"{cells[0]:<{names}} | {cells[1]:<{values}} | {cells[2]}".rstrip())
    return "\n".join(lines)

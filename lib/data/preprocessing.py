"""From a NIfTI file to the volume that the network sees, and from its output back to the file's own grid."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor

from lib.data.BaseDataset import Preprocessing
from lib.data.geometry import Geometry, Volume, aligned, axes_of, oriented
from lib.data.images import read_channels_of, read_image
from lib.data.normalization import nonzero, normalize
from lib.data.resampling import new_shape, resample_image, resample_label, resample_probabilities, separate_axis
from lib.system.error import InputError
from lib.system.files import joint_digest

LARGEST = 1000  # times the voxels of the file: a preprocessed volume


class Grid(NamedTuple):
    """Where the voxels of a volume are: its spatial shape, and the affine (4x4) from voxels to its own frame (mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


class Preprocessed(NamedTuple):
    """tensor: (C, X', Y', Z') float32; affine: 4x4, voxel to the own frame (mm), padding included;
    padding: voxels added before and after each axis (x0, x1, y0, y1, z0, z1); label: (X', Y', Z') of its own type.

    box: what the crop to nonzero left of the volume, None in a preprocessing without `normalizations`; separate: the
    axis that is set apart on the way back from it, see `lib.data.resampling.separate_axis`."""

    tensor: Tensor
    affine: np.ndarray
    padding: tuple[int, ...] = (0,) * 6
    label: Tensor | None = None
    box: tuple[slice, slice, slice] | None = None
    separate: int | None = None


def read_channels(paths: Path | Sequence[Path], preprocessing: Preprocessing) -> tuple[tio.ScalarImage, Volume]:
    """An image, of one file or one for each channel, as (C, X, Y, Z) float32 in its own frame: see `in_own_frame`. Also
    the first file, without voxels, with the number of bytes of all files and their `joint_digest`. Where there are
    `normalizations` a file may hold several channels.

    Raises InputError as `lib.data.images.read_image`, or if the files do not share one grid, the channels are not those
    that are normalized, or resampling would make the image absurdly large.
    """
    read = read_channels_of if preprocessing.normalizations else lambda path: [read_image(path)]
    first, *others = [paths] if isinstance(paths, str | Path) else paths
    volumes = read(first)
    first = replace(volumes[0], array=None)
    check_size(first.path, first.geometry, preprocessing)
    n_bytes, sums = first.n_bytes, [first.sha256]
    for path in others:
        channels = read(path)
        n_bytes, sums = n_bytes + channels[0].n_bytes, [*sums, channels[0].sha256]
        volumes += [aligned(channel, first, preprocessing.by_index) for channel in channels]
    _check_channels(volumes, preprocessing)
    first = replace(first, n_bytes=n_bytes, sha256=joint_digest(sums))
    images = [in_own_frame(volumes.pop(0), preprocessing.orientation, tio.ScalarImage) for _ in range(len(volumes))]
    if len(images) == 1:
        return images[0], first
    return tio.ScalarImage(tensor=torch.cat([image.data for image in images]), affine=images[0].affine), first


def _check_channels(volumes: list[Volume], preprocessing: Preprocessing) -> None:
    """Raise InputError unless the channels are as many as the normalizations, if any, and each in its range."""
    schemes = [normalization.scheme for normalization in preprocessing.normalizations]
    if schemes and len(volumes) != len(schemes):
        raise InputError(
            f"{volumes[0].path}: this image has {len(volumes)} channels, but {len(schemes)} are needed; give all of "
            "them, and no other"
        )
    for volume, scheme in zip(volumes, schemes, strict=False):
        low, high = volume.array.min(), volume.array.max()
        if scheme == "rgb_to_0_1" and not 0 <= low <= high <= 255:
            raise InputError(
                f"{volume.path}: its intensities are {low:g} to {high:g}, but those of an RGB channel are 0 to "
                "255; replace this image, or name the channel otherwise in dataset.json"
            )


def in_own_frame(volume: Volume, orientation: str, kind: type[tio.Image]) -> tio.Image:
    """A volume for torchio, (1, X, Y, Z) with its axes as `orientation` says, in a frame of its own: the first voxel is
    the origin, and the axes of the array are those of the frame.

    What is computed there depends on the voxels and their size alone, to the last bit: not on where in the scanner they
    are, nor on the order in which the file stores them.
    """
    volume = oriented(volume, orientation)
    return kind(tensor=torch.from_numpy(volume.array)[None], affine=np.diag([*volume.geometry.spacing_mm, 1.0]))


def zscore(tensor: Tensor) -> Tensor:
    """(x - mean) / population standard deviation, of each channel (C, ...) as a whole, as float32; zeros where it is
    constant.

    The sums are numpy's: in double precision, and the same whatever the number of threads.
    """
    if len(tensor) > 1:
        return torch.cat([zscore(channel) for channel in tensor.split(1)])
    array = tensor.numpy()
    mean, std = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    if array.min() == array.max():
        return torch.zeros(tensor.shape)
    return torch.from_numpy((array - mean) / std).float()


def preprocess(image: tio.ScalarImage, preprocessing: Preprocessing) -> Preprocessed:
    """The network's input: `standardize`, and the z-score whatever `preprocessing.zscore` says."""
    there = standardize(image, preprocessing)
    return there if preprocessing.normalizations else there._replace(tensor=zscore(there.tensor))


def standardize(
    image: tio.ScalarImage, preprocessing: Preprocessing, label: tio.LabelMap | None = None
) -> Preprocessed:
    """What is cached of an image in its own frame and, if it is given, its label: resampled (linearly), clipped,
    shifted and scaled, padded, and z-scored if asked for; or, where there are `normalizations`, as `_as_in_nnunet`."""
    if preprocessing.normalizations:
        return _as_in_nnunet(image, preprocessing, label)
    grid = _grid(image, preprocessing.spacing_mm)
    tensor = tio.Resample(tuple(grid))(image).data
    if preprocessing.clip is not None:
        tensor = tensor.clamp(*preprocessing.clip)
    if preprocessing.scale is not None:
        tensor = (tensor - preprocessing.shift) / preprocessing.scale
    there = _pad(tensor, grid.affine, preprocessing.min_size)
    tensor = zscore(there.tensor) if preprocessing.zscore else there.tensor.float()
    return there._replace(tensor=tensor, label=None if label is None else standardize_label(label, preprocessing))


def standardize_label(label: tio.LabelMap, preprocessing: Preprocessing) -> Tensor:
    """(X', Y', Z'), of the label's type: nearest neighbours on the very grid that `standardize` gives an image of the
    same grid, if there are no `normalizations`."""
    grid, dtype = _grid(label, preprocessing.spacing_mm), label.data.dtype
    return _pad(tio.Resample(tuple(grid))(label).data, grid.affine, preprocessing.min_size).tensor[0].to(dtype)


def _as_in_nnunet(
    image: tio.ScalarImage, preprocessing: Preprocessing, label: tio.LabelMap | None = None
) -> Preprocessed:
    """Crop to nonzero, normalize, resample.

    "Inside" are the nonzero mask and all foreground of the label, if there is one. A masked z-score is over the inside;
    and the outside, although it becomes background in the end, competes as a label of its own in resampling.
    """
    channels, old_mm = image.numpy(), np.diag(image.affine)[:3].tolist()
    new_mm = _wanted_mm(old_mm, preprocessing.spacing_mm)
    inside, box = nonzero(channels)
    if not preprocessing.crop:
        box = tuple(slice(0, size) for size in inside.shape)
    inside, channels = inside[box], channels[:, *box]
    if label is not None:
        label = label.numpy()[0][box]
        inside = inside | (label != 0)
    shape, separate = new_shape(inside.shape, old_mm, new_mm), separate_axis(old_mm, new_mm)
    tensor = np.empty((len(channels), *shape), np.float32)
    for target, channel, normalization in zip(tensor, channels, preprocessing.normalizations, strict=True):
        target[...] = resample_image(normalize(channel, normalization, inside), shape, separate)
    if label is not None:
        outside_apart = np.where(inside, label.astype(np.int16), -1)
        label = resample_label(outside_apart, shape, separate).clip(0).astype(label.dtype)
        label = torch.from_numpy(np.ascontiguousarray(label))
    ratio = np.array(inside.shape) / shape
    voxels = np.diag([*ratio, 1.0])  # from those of the result to those of the image
    voxels[:3, 3] = [side.start for side in box] + (ratio - 1) / 2
    back = separate_axis(new_mm, old_mm)
    return Preprocessed(torch.from_numpy(tensor), image.affine @ voxels, label=label, box=box, separate=back)


def to_original_grid(
    slabs: Iterable[tuple[slice, Tensor]], axis: int, there: Preprocessed, grid: Grid, slab_voxels: int = 2**24
) -> Iterator[tuple[slice, Tensor]]:
    """Bring probabilities on the preprocessed grid back to `grid`, that of the image before `standardize` (X, Y, Z).

    slabs: (K, X', Y', Z') float32, slab by slab along one of the three axes: its slice of the axis, and what lies in
    it; each begins where the one before ends. Yields the same of the original grid, along the same axis.

    Where there was a crop, a few slabs are all that is in memory. They are resampled as `resample_probabilities` says;
    outside of the crop all is background. Otherwise the slabs are collected first, the padding is taken off, and they
    are resampled linearly; voxels of the original beyond the outermost preprocessed ones get the nearest value.

    A slab has at most `slab_voxels` voxels (where there was a crop: of all classes together), or one slice.
    """
    if there.box is not None:
        return _from_crop(slabs, axis, there, grid, slab_voxels)
    return _from_whole(torch.cat([slab for _, slab in slabs], axis + 1), axis, there, grid, slab_voxels)


def _from_whole(
    probabilities: Tensor, axis: int, there: Preprocessed, grid: Grid, slab_voxels: int
) -> Iterator[tuple[slice, Tensor]]:
    x0, x1, y0, y1, z0, z1 = there.padding
    _, x, y, z = probabilities.shape
    cropped = probabilities[:, x0 : x - x1, y0 : y - y1, z0 : z - z1].float()
    bordered = F.pad(cropped[None], (1,) * 6, mode="replicate")[0]
    affine = _shifted(there.affine, (x0 - 1, y0 - 1, z0 - 1))
    classes = [tio.ScalarImage(tensor=volume[None], affine=affine) for volume in bordered]
    for slab in _slabs(0, grid.shape[axis], _n_slices(grid.shape, axis, slab_voxels)):
        shape, start = list(grid.shape), [0, 0, 0]
        shape[axis], start[axis] = slab.stop - slab.start, slab.start
        back = tio.Resample((tuple(shape), _shifted(grid.affine, start)))
        yield slab, torch.cat([back(volume).data for volume in classes])


def _from_crop(
    slabs: Iterable[tuple[slice, Tensor]], axis: int, there: Preprocessed, grid: Grid, slab_voxels: int
) -> Iterator[tuple[slice, Tensor]]:
    parts = (slab.numpy() for _, slab in slabs)
    first = next(parts)
    box, shape, most = list(there.box), list(grid.shape), slab_voxels // len(first)
    start, stop = box[axis].start, box[axis].stop
    shapes = tuple(there.tensor.shape[1:]), tuple(side.stop - side.start for side in box)
    n = _n_slices(grid.shape, axis, most)
    inside = resample_probabilities(chain([first], parts), axis, shapes, there.separate, n)
    inside = ((slice(start + slab.start, start + slab.stop), part) for slab, part in inside)
    before, after = ([(slab, None) for slab in _slabs(*ends, n)] for ends in ((0, start), (stop, shape[axis])))
    box[axis] = slice(None)
    for slab, part in chain(before, inside, after):
        shape[axis] = slab.stop - slab.start
        result = torch.zeros(len(first), *shape)
        result[0] = 1
        if part is not None:
            result[:, *box] = torch.from_numpy(part)
        yield slab, result


def _n_slices(shape: tuple[int, ...], axis: int, most_voxels: int) -> int:
    """How many slices across an axis have at most so many voxels; one at least."""
    return max(1, most_voxels // (math.prod(shape) // shape[axis]))


def _slabs(start: int, stop: int, n: int) -> list[slice]:
    """`n` numbers each, from `start` to `stop`."""
    return [slice(first, min(first + n, stop)) for first in range(start, stop, n)]


def crop_or_pad(tensor: Tensor, shape: tuple[int | None, ...], crop: bool = True) -> Tensor:
    """Crop or pad the last axes of (..., *spatial) centrally to `shape` (None: leave the axis), with zeros.

    An odd voxel more is cropped or added at the start, as in torchio. Without `crop` axes that are longer stay.
    """
    pads = []
    for size, wanted in zip(tensor.shape[-len(shape) :], shape, strict=True):
        more = 0 if wanted is None or (wanted < size and not crop) else wanted - size
        start = int(np.sign(more)) * ((abs(more) + 1) // 2)
        pads = [start, more - start, *pads]  # F.pad begins with the last axis
    return F.pad(tensor, pads)


def _grid(image: tio.Image, spacing_mm: tuple[float | None, ...]) -> Grid:
    """The grid of the image resampled to `spacing_mm`: the same centre, and no larger than the original.

    torchio's own rule, but for its rounding, which can lose a slice of an axis that should stay as it is.
    """
    old_mm, size = np.array(image.spacing), np.array(image.spatial_shape)
    new_size, new_mm = _resampled(size, old_mm, spacing_mm)
    affine = image.affine.copy()
    affine[:3, :3] *= new_mm / old_mm
    affine[:3, 3] += image.affine[:3, :3] @ ((size - 1) / 2) - affine[:3, :3] @ ((new_size - 1) / 2)
    return Grid(tuple(new_size.tolist()), affine)


def _resampled(size: np.ndarray, old_mm: np.ndarray, spacing_mm: tuple[float | None, ...]) -> tuple:
    """The number of voxels and their size in mm, each (3,), after resampling to `spacing_mm`."""
    new_mm = np.array(_wanted_mm(old_mm, spacing_mm))
    new_size = np.where(size == 1, 1, np.floor(size * old_mm / new_mm + 1e-6)).astype(int)
    return np.maximum(new_size, 1), new_mm


def _wanted_mm(old_mm: Sequence[float], spacing_mm: tuple[float | None, ...]) -> list[float]:
    """The size of the voxels after resampling to `spacing_mm`."""
    return [old if new is None else new for old, new in zip(old_mm, spacing_mm, strict=True)]


def preprocessed_shape(geometry: Geometry, preprocessing: Preprocessing) -> tuple[int, ...]:
    """The shape (X', Y', Z') that `standardize` gives a volume of this geometry; with a crop, the largest possible."""
    axes = axes_of(geometry, preprocessing.orientation)
    shape, spacing_mm = (np.array(sizes)[axes] for sizes in (geometry.shape, geometry.spacing_mm))
    if preprocessing.normalizations:
        return new_shape(shape, spacing_mm, _wanted_mm(spacing_mm, preprocessing.spacing_mm))
    size, _ = _resampled(shape, spacing_mm, preprocessing.spacing_mm)
    return tuple(np.maximum(size, preprocessing.min_size or 1).tolist())


def check_size(path: Path, geometry: Geometry, preprocessing: Preprocessing) -> None:
    """Raise InputError where resampling would make a volume absurdly large, before there is too little memory."""
    new, old = (math.prod(shape) for shape in (preprocessed_shape(geometry, preprocessing), geometry.shape))
    if new > LARGEST * max(old, math.prod(preprocessing.min_size or (1,))):
        sizes = " x ".join(f"{mm:g}" for mm in geometry.spacing_mm)
        raise InputError(
            f"{path}: its voxels of {sizes} mm would become {new / old:.0f} times as many; mend the voxel size, or its "
            "unit, in the header"
        )


def _pad(tensor: Tensor, affine: np.ndarray, min_size: tuple[int, ...] | None) -> Preprocessed:
    """Pad (C, X, Y, Z) centrally with zeros to at least `min_size`."""
    if min_size is None:
        return Preprocessed(tensor, affine)
    missing = [max(0, wanted - size) for wanted, size in zip(min_size, tensor.shape[1:], strict=True)]
    before = [(n + 1) // 2 for n in missing]
    padding = tuple(n for start, total in zip(before, missing, strict=True) for n in (start, total - start))
    return Preprocessed(crop_or_pad(tensor, min_size, crop=False), _shifted(affine, [-n for n in before]), padding)


def _shifted(affine: np.ndarray, voxels) -> np.ndarray:
    """The affine of a grid whose first voxel is the voxel `voxels` of the given one."""
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ np.asarray(voxels, float)
    return shifted

"""From an image's file to the volume that the network sees, and from its output back to the file's own grid.

Nothing here needs torch: exported models are applied without it. SimpleITK is imported where it is needed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.BaseDataset import Preprocessing
from lib.data.dicom import Slices
from lib.data.geometry import Geometry, Volume, aligned, axes_of, oriented
from lib.data.images import read_channels_of, read_image
from lib.data.normalization import nonzero, normalize
from lib.data.resampling import new_shape, resample_image, resample_label, resample_probabilities, separate_axis
from lib.system.error import InputError
from lib.system.files import joint_digest

LARGEST = 1000  # times the voxels of the file: a preprocessed volume


class Image(NamedTuple):
    """An image or label map in a frame of its own. array: (C, X, Y, Z), of a label map (1, X, Y, Z); affine: 4x4, from
    voxels to that frame (mm)."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z)."""
        return self.array.shape[1:]

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,)."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(0))


class Grid(NamedTuple):
    """Where the voxels of a volume are: its spatial shape, and the affine (4x4) from voxels to its own frame (mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


class Preprocessed(NamedTuple):
    """array: (C, X', Y', Z') float32; affine: 4x4, voxel to the own frame (mm), padding included;
    padding: voxels added before and after each axis (x0, x1, y0, y1, z0, z1); label: (X', Y', Z') of its own type.

    box: what the crop to nonzero left of the volume, None in a preprocessing without `normalizations`; separate: the
    axis that is set apart on the way back from it, see `lib.data.resampling.separate_axis`."""

    array: np.ndarray
    affine: np.ndarray
    padding: tuple[int, ...] = (0,) * 6
    label: np.ndarray | None = None
    box: tuple[slice, slice, slice] | None = None
    separate: int | None = None


def read_channels(paths: Path | Slices | Sequence[Path], preprocessing: Preprocessing) -> tuple[Image, Volume]:
    """An image, of one file, one for each channel, or a DICOM series, as (C, X, Y, Z) float32 in its own frame: see
    `in_own_frame`. Also the first file, without voxels, with the number of bytes of all files and their `joint_digest`.
    Where there are `normalizations` a file may hold several channels.

    Raises InputError as `lib.data.images.read_image`, or if the files do not share one grid, the channels are not those
    that are normalized, or resampling would make the image absurdly large.
    """
    read = read_channels_of if preprocessing.normalizations else lambda path: [read_image(path)]
    first, *others = [paths] if isinstance(paths, str | Path | Slices) else paths
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
    images = [in_own_frame(volumes.pop(0), preprocessing.orientation) for _ in range(len(volumes))]
    if len(images) == 1:
        return images[0], first
    return Image(np.concatenate([image.array for image in images]), images[0].affine), first


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


def in_own_frame(volume: Volume, orientation: str) -> Image:
    """A volume with its axes as `orientation` says, in a frame of its own: the first voxel is the origin, and the axes
    of the array are those of the frame.

    What is computed there depends on the voxels and their size alone, to the last bit: not on where in the scanner they
    are, nor on the order in which the file stores them.
    """
    volume = oriented(volume, orientation)
    return Image(volume.array[None], np.diag([*volume.geometry.spacing_mm, 1.0]))


def unpadded(array, padding: Sequence[int]):
    """The part of (..., X, Y, Z), an array or a tensor, that is not `padding` (x0, x1, y0, y1, z0, z1). A view."""
    ends = zip(padding[::2], padding[1::2], array.shape[-3:], strict=True)
    return array[(..., *(slice(before, size - after) for before, after, size in ends))]


def zscore(array: np.ndarray, padding: Sequence[int] = (0,) * 6) -> np.ndarray:
    """(x - mean) / population standard deviation, of each channel of (C, ...) as a whole, as float32; zeros where it is
    constant. The sums are taken in double precision. `padding` of (C, X, Y, Z) does not count and is 0, the mean."""
    if any(padding):
        whole = np.zeros(array.shape, np.float32)
        unpadded(whole, padding)[...] = zscore(unpadded(array, padding))
        return whole
    if len(array) > 1:
        return np.concatenate([zscore(channel[None]) for channel in array])
    mean, std = float(array.mean(dtype=np.float64)), float(array.std(dtype=np.float64))
    if array.min() == array.max():
        return np.zeros(array.shape, np.float32)
    return ((array - mean) / std).astype(np.float32, copy=False)


def preprocess(image: Image, preprocessing: Preprocessing) -> Preprocessed:
    """The network's input: `standardize`, and the z-score whatever `preprocessing.zscore` says."""
    there = standardize(image, preprocessing)
    return there if preprocessing.normalizations else _zscored(there, preprocessing)


def _zscored(there: Preprocessed, preprocessing: Preprocessing) -> Preprocessed:
    padding = (0,) * 6 if preprocessing.padding_counts else there.padding
    return there._replace(array=zscore(there.array, padding))


def standardize(image: Image, preprocessing: Preprocessing, label: Image | None = None) -> Preprocessed:
    """What is cached of an image in its own frame and, if it is given, its label: resampled (linearly), clipped,
    shifted and scaled, z-scored if asked for, and padded; or, where there are `normalizations`, as `_as_in_nnunet`."""
    if preprocessing.normalizations:
        return _as_in_nnunet(image, preprocessing, label)
    grid = _grid(image, preprocessing.spacing_mm)
    array = _resampled_to(image, grid, "linear")
    if preprocessing.clip is not None:
        array = array.clip(*preprocessing.clip)
    if preprocessing.scale is not None:
        array = (array - preprocessing.shift) / preprocessing.scale
    there = _pad(array, grid.affine, preprocessing.min_size)
    there = there._replace(array=there.array.astype(np.float32, copy=False))
    there = _zscored(there, preprocessing) if preprocessing.zscore else there
    return there._replace(label=None if label is None else standardize_label(label, preprocessing))


def standardize_label(label: Image, preprocessing: Preprocessing) -> np.ndarray:
    """(X', Y', Z'), of the label's type: nearest neighbours on the very grid that `standardize` gives an image of the
    same grid, if there are no `normalizations`."""
    grid = _grid(label, preprocessing.spacing_mm)
    return _pad(_resampled_to(label, grid, "nearest"), grid.affine, preprocessing.min_size).array[0]


def _as_in_nnunet(image: Image, preprocessing: Preprocessing, label: Image | None = None) -> Preprocessed:
    """Crop to nonzero, normalize, resample.

    "Inside" are the nonzero mask and all foreground of the label, if there is one. A masked z-score is over the inside;
    and the outside, although it becomes background in the end, competes as a label of its own in resampling.
    """
    channels, old_mm = image.array, np.diag(image.affine)[:3].tolist()
    new_mm = _wanted_mm(old_mm, preprocessing.spacing_mm)
    inside, box = nonzero(channels)
    if not preprocessing.crop:
        box = tuple(slice(0, size) for size in inside.shape)
    inside, channels = inside[box], channels[:, *box]
    if label is not None:
        label = label.array[0][box]
        inside = inside | (label != 0)
    shape, separate = new_shape(inside.shape, old_mm, new_mm), separate_axis(old_mm, new_mm)
    array = np.empty((len(channels), *shape), np.float32)
    for target, channel, normalization in zip(array, channels, preprocessing.normalizations, strict=True):
        target[...] = resample_image(normalize(channel, normalization, inside), shape, separate)
    if label is not None:
        outside_apart = np.where(inside, label.astype(np.int16), -1)
        label = np.ascontiguousarray(resample_label(outside_apart, shape, separate).clip(0).astype(label.dtype))
    ratio = np.array(inside.shape) / shape
    voxels = np.diag([*ratio, 1.0])  # from those of the result to those of the image
    voxels[:3, 3] = [side.start for side in box] + (ratio - 1) / 2
    back = separate_axis(new_mm, old_mm)
    return Preprocessed(array, image.affine @ voxels, label=label, box=box, separate=back)


def to_original_grid(
    slabs: Iterable[tuple[slice, np.ndarray]], axis: int, there: Preprocessed, grid: Grid, slab_voxels: int = 2**24
) -> Iterator[tuple[slice, np.ndarray]]:
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
    return _from_whole(np.concatenate([slab for _, slab in slabs], axis + 1), axis, there, grid, slab_voxels)


def _from_whole(
    probabilities: np.ndarray, axis: int, there: Preprocessed, grid: Grid, slab_voxels: int
) -> Iterator[tuple[slice, np.ndarray]]:
    x0, x1, y0, y1, z0, z1 = there.padding
    _, x, y, z = probabilities.shape
    cropped = probabilities[:, x0 : x - x1, y0 : y - y1, z0 : z - z1].astype(np.float32, copy=False)
    affine = _shifted(there.affine, (x0 - 1, y0 - 1, z0 - 1))
    classes = [_to_itk(np.pad(volume, 1, "edge"), affine) for volume in cropped]
    for slab in _slabs(0, grid.shape[axis], _n_slices(grid.shape, axis, slab_voxels)):
        shape, start = list(grid.shape), [0, 0, 0]
        shape[axis], start[axis] = slab.stop - slab.start, slab.start
        part = Grid(tuple(shape), _shifted(grid.affine, start))
        yield slab, _stacked([_on_grid(volume, part, "linear") for volume in classes])


def _from_crop(
    slabs: Iterable[tuple[slice, np.ndarray]], axis: int, there: Preprocessed, grid: Grid, slab_voxels: int
) -> Iterator[tuple[slice, np.ndarray]]:
    parts = (slab for _, slab in slabs)
    first = next(parts)
    box, shape, most = list(there.box), list(grid.shape), slab_voxels // len(first)
    start, stop = box[axis].start, box[axis].stop
    shapes = there.array.shape[1:], tuple(side.stop - side.start for side in box)
    n = _n_slices(grid.shape, axis, most)
    inside = resample_probabilities(chain([first], parts), axis, shapes, there.separate, n)
    inside = ((slice(start + slab.start, start + slab.stop), part) for slab, part in inside)
    before, after = ([(slab, None) for slab in _slabs(*ends, n)] for ends in ((0, start), (stop, shape[axis])))
    box[axis] = slice(None)
    for slab, part in chain(before, inside, after):
        shape[axis] = slab.stop - slab.start
        result = np.zeros((len(first), *shape), np.float32)
        result[0] = 1
        if part is not None:
            result[:, *box] = part
        yield slab, result


def _n_slices(shape: tuple[int, ...], axis: int, most_voxels: int) -> int:
    """How many slices across an axis have at most so many voxels; one at least."""
    return max(1, most_voxels // (math.prod(shape) // shape[axis]))


def _slabs(start: int, stop: int, n: int) -> list[slice]:
    """`n` numbers each, from `start` to `stop`."""
    return [slice(first, min(first + n, stop)) for first in range(start, stop, n)]


def margins(size: Sequence[int], wanted: Sequence[int | None], crop: bool = True) -> list[tuple[int, int]]:
    """How many voxels to add before and after each axis, so that it has the size `wanted` and its centre stays; below 0
    to take away. None: the axis stays; without `crop` also one that is longer.

    An odd voxel more is added or taken away at the start, as in torchio.
    """
    result = []
    for old, new in zip(size, wanted, strict=True):
        more = 0 if new is None or (new < old and not crop) else new - old
        start = int(np.sign(more)) * ((abs(more) + 1) // 2)
        result.append((start, more - start))
    return result


def crop_or_pad(array: np.ndarray, shape: tuple[int | None, ...], crop: bool = True) -> np.ndarray:
    """Crop or pad the last axes of (..., *spatial) centrally to `shape`, with zeros: see `margins`."""
    leading = array.ndim - len(shape)
    around = margins(array.shape[leading:], shape, crop)
    inner = [slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(around, array.shape[leading:], strict=True)]
    array = array[(..., *inner)]
    if all(a <= 0 and b <= 0 for a, b in around):
        return array
    before = [max(a, 0) for a, _ in around]
    after = [max(b, 0) for _, b in around]
    sizes = array.shape[leading:]
    padded = np.zeros((*array.shape[:leading], *map(sum, zip(before, sizes, after, strict=True))), array.dtype)
    padded[(..., *(slice(a, a + n) for a, n in zip(before, sizes, strict=True)))] = array
    return padded


# --- resampling by ITK ------------------------------------------------------------------------------------------------


def _resampled_to(image: Image, grid: Grid, interpolation: str) -> np.ndarray:
    """The channels of an image on a grid of its frame, (C, *shape of the grid), of the image's type."""
    return _stacked([_on_grid(_to_itk(channel, image.affine), grid, interpolation) for channel in image.array])


def _stacked(volumes: list[np.ndarray]) -> np.ndarray:
    """Volumes (X, Y, Z) in Fortran's order as (C, X, Y, Z), each of them still in this order."""
    return np.stack([volume.T for volume in volumes]).transpose(0, 3, 2, 1)


def _to_itk(array: np.ndarray, affine: np.ndarray):
    """A volume (X, Y, Z) as an image of SimpleITK, whose world is LPS."""
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.transpose())
    for put, values in zip((image.SetOrigin, image.SetSpacing, image.SetDirection), _in_lps(affine), strict=True):
        put(values)
    return image


def _on_grid(image, grid: Grid, interpolation: str) -> np.ndarray:
    """An image of SimpleITK on a grid of its world, (X, Y, Z) in Fortran's order; 0 beyond the image."""
    import SimpleITK as sitk

    origin, spacing, direction = _in_lps(grid.affine)
    how = {"linear": sitk.sitkLinear, "nearest": sitk.sitkNearestNeighbor}[interpolation]
    size = [int(n) for n in grid.shape]
    resampled = sitk.Resample(image, size, sitk.Transform(), how, origin, spacing, direction, 0.0)
    return sitk.GetArrayFromImage(resampled).transpose()


def _in_lps(affine: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """Origin, voxel size and directions of an affine, as SimpleITK takes them."""
    matrix = affine[:3, :3]
    spacing = np.sqrt((matrix**2).sum(0))
    flip = np.diag([-1.0, -1.0, 1.0])
    return (flip @ affine[:3, 3]).tolist(), spacing.tolist(), (flip @ (matrix / spacing)).ravel().tolist()


# --- grids ------------------------------------------------------------------------------------------------------------


def _grid(image: Image, spacing_mm: tuple[float | None, ...]) -> Grid:
    """The grid of the image resampled to `spacing_mm`: the same centre, and no larger than the original.

    torchio's own rule, but for its rounding, which can lose a slice of an axis that should stay as it is.
    """
    old_mm, size = image.spacing_mm, np.array(image.shape)
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


def _pad(array: np.ndarray, affine: np.ndarray, min_size: tuple[int, ...] | None) -> Preprocessed:
    """Pad (C, X, Y, Z) centrally with zeros to at least `min_size`."""
    if min_size is None:
        return Preprocessed(array, affine)
    around = margins(array.shape[1:], min_size, crop=False)
    padding = tuple(n for both in around for n in both)
    return Preprocessed(crop_or_pad(array, min_size, crop=False), _shifted(affine, [-a for a, _ in around]), padding)


def _shifted(affine: np.ndarray, voxels) -> np.ndarray:
    """The affine of a grid whose first voxel is the voxel `voxels` of the given one."""
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ np.asarray(voxels, float)
    return shifted

"""From a NIfTI file to the volume that the network sees, and from its output back to the file's own grid."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor

from lib.data.BaseDataset import Preprocessing
from lib.data.geometry import Geometry, Volume, aligned, axes_of, oriented
from lib.data.images import read_image
from lib.system.error import InputError
from lib.system.files import joint_digest

LARGEST = 1000  # times the voxels of the file: a preprocessed volume


class Grid(NamedTuple):
    """Where the voxels of a volume are: its spatial shape, and the affine (4x4) from voxels to its own frame (mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


class Preprocessed(NamedTuple):
    """tensor: (C, X', Y', Z') float32; affine: 4x4, voxel to the own frame (mm), padding included;
    padding: voxels added before and after each axis (x0, x1, y0, y1, z0, z1)."""

    tensor: Tensor
    affine: np.ndarray
    padding: tuple[int, ...]


def read_channels(paths: Path | Sequence[Path], preprocessing: Preprocessing) -> tuple[tio.ScalarImage, Volume]:
    """An image, of one file or one for each channel, as (C, X, Y, Z) float32 in its own frame: see `in_own_frame`. Also
    the first file, without voxels, with the number of bytes of all files and their `joint_digest`.

    Raises InputError as `lib.data.images.read_image`, or if the files do not share one grid, or resampling would make
    the image absurdly large.
    """
    first, *others = [paths] if isinstance(paths, str | Path) else paths
    volumes = [first := read_image(first)]
    check_size(first.path, first.geometry, preprocessing)
    volumes += [aligned(read_image(path), first) for path in others]
    n_bytes, sums = sum(volume.n_bytes for volume in volumes), [volume.sha256 for volume in volumes]
    first = replace(first, array=None, n_bytes=n_bytes, sha256=joint_digest(sums))
    images = [in_own_frame(volumes.pop(0), preprocessing.orientation, tio.ScalarImage) for _ in sums]
    if len(images) == 1:
        return images[0], first
    return tio.ScalarImage(tensor=torch.cat([image.data for image in images]), affine=images[0].affine), first


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
    tensor, affine, padding = standardize(image, preprocessing)
    return Preprocessed(zscore(tensor), affine, padding)


def standardize(image: tio.ScalarImage, preprocessing: Preprocessing) -> Preprocessed:
    """Resample (linearly), clip, shift and scale, pad, and z-score if asked for: what is cached."""
    grid = _grid(image, preprocessing.spacing_mm)
    tensor = tio.Resample(tuple(grid))(image).data
    if preprocessing.clip is not None:
        tensor = tensor.clamp(*preprocessing.clip)
    if preprocessing.scale is not None:
        tensor = (tensor - preprocessing.shift) / preprocessing.scale
    tensor, affine, padding = _pad(tensor, grid.affine, preprocessing.min_size)
    return Preprocessed(zscore(tensor) if preprocessing.zscore else tensor.float(), affine, padding)


def standardize_label(label: tio.LabelMap, preprocessing: Preprocessing) -> Tensor:
    """(X', Y', Z'), of the label's type: nearest neighbours on the very grid that `standardize` gives an image of the
    same grid."""
    grid, dtype = _grid(label, preprocessing.spacing_mm), label.data.dtype
    return _pad(tio.Resample(tuple(grid))(label).data, grid.affine, preprocessing.min_size).tensor[0].to(dtype)


def to_original_grid(
    probabilities: Tensor, affine: np.ndarray, padding: tuple[int, ...], grid: Grid, slab_voxels: int = 2**24
) -> Iterator[tuple[slice, Tensor]]:
    """Bring (K, X', Y', Z') on the preprocessed grid back to `grid`, that of the image before `standardize` (X, Y, Z).

    Takes the padding off and resamples linearly; voxels of the original beyond the outermost
    preprocessed ones get the nearest value. Yields, slab by slab along the first axis, its slice and its probabilities
    (K, n, Y, Z) float32, so that no volume of the original's size is needed per class. A slab has at most `slab_voxels`
    voxels, or one slice.
    """
    x0, x1, y0, y1, z0, z1 = padding
    _, x, y, z = probabilities.shape
    cropped = probabilities[:, x0 : x - x1, y0 : y - y1, z0 : z - z1].float()
    bordered = F.pad(cropped[None], (1,) * 6, mode="replicate")[0]
    affine = _shifted(affine, (x0 - 1, y0 - 1, z0 - 1))
    classes = [tio.ScalarImage(tensor=volume[None], affine=affine) for volume in bordered]
    size, *plane = grid.shape
    n = max(1, slab_voxels // math.prod(plane))
    for start in range(0, size, n):
        slab = slice(start, min(start + n, size))
        back = tio.Resample(((slab.stop - start, *plane), _shifted(grid.affine, (start, 0, 0))))
        yield slab, torch.cat([back(volume).data for volume in classes])


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
    new_mm = np.array([old if new is None else new for old, new in zip(old_mm, spacing_mm, strict=True)])
    new_size = np.where(size == 1, 1, np.floor(size * old_mm / new_mm + 1e-6)).astype(int)
    return np.maximum(new_size, 1), new_mm


def preprocessed_shape(geometry: Geometry, preprocessing: Preprocessing) -> tuple[int, ...]:
    """The shape (X', Y', Z') that `standardize` gives a volume of this geometry."""
    axes = axes_of(geometry, preprocessing.orientation)
    shape, spacing_mm = (np.array(sizes)[axes] for sizes in (geometry.shape, geometry.spacing_mm))
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
        return Preprocessed(tensor, affine, (0,) * 6)
    missing = [max(0, wanted - size) for wanted, size in zip(min_size, tensor.shape[1:], strict=True)]
    before = [(n + 1) // 2 for n in missing]
    padding = tuple(n for start, total in zip(before, missing, strict=True) for n in (start, total - start))
    return Preprocessed(crop_or_pad(tensor, min_size, crop=False), _shifted(affine, [-n for n in before]), padding)


def _shifted(affine: np.ndarray, voxels) -> np.ndarray:
    """The affine of a grid whose first voxel is the voxel `voxels` of the given one."""
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ np.asarray(voxels, float)
    return shifted

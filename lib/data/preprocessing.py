"""From a NIfTI file to the volume that the network sees, and from its output back to the file's own grid."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor

from lib.error import InputError


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every volume of a data set, in this order; axes are those of the stored array.

    spacing_mm: the voxel size to resample to, None for an axis that stays as it is.
    clip: lowest and highest intensity, or None. shift, scale: intensities become (x - shift) / scale; None: they stay.
    min_size: voxels per axis to which smaller volumes are padded centrally with zeros, or None.
    zscore: whether the z-score is taken here, before the augmentation (which always ends with one).
    """

    spacing_mm: tuple[float | None, float | None, float | None]
    clip: tuple[float, float] | None = None
    shift: float = 0.0
    scale: float | None = None
    min_size: tuple[int, int, int] | None = None
    zscore: bool = True


class Grid(NamedTuple):
    """Where the voxels of a volume are: its spatial shape, and the affine (4x4) from voxels to the world (RAS+ mm)."""

    shape: tuple[int, int, int]
    affine: np.ndarray


class Preprocessed(NamedTuple):
    """tensor: (1, X', Y', Z') float32; affine: 4x4, voxel to world (RAS+ mm) of this tensor, padding included;
    padding: voxels added before and after each axis (x0, x1, y0, y1, z0, z1)."""

    tensor: Tensor
    affine: np.ndarray
    padding: tuple[int, ...]


def read_image(path: str | Path) -> tio.ScalarImage:
    """A NIfTI file as (1, X, Y, Z) float32 in its own array order and affine, never reoriented.

    Raises InputError for a file that is no 3D NIfTI (a 4D one whose last axis is 1 is accepted), is cut off, has
    voxels that are no finite real numbers or all the same, or a spacing or affine that no volume has.
    """
    image = _read(path)
    if image.data.min() == image.data.max():
        raise InputError(f"{path}: all voxels are {image.data.min():g}; replace this image")
    return image


def _read(path: str | Path) -> tio.ScalarImage:
    """An image or a label, as `read_image`."""
    try:
        nifti = nib.load(path)
        dtype, spacing_mm = nifti.get_data_dtype(), stored_spacing(nifti)
        real = dtype.kind in "buif"
        array = np.asarray(nifti.dataobj, dtype=np.float32) if real else None
        affine = np.asarray(nifti.affine, dtype=float)
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as a NIfTI image ({reason})") from error
    if not real:
        raise InputError(f"{path}: its voxels are {dtype}, not real numbers; convert it to a grey-scale image")
    if not all(0 < size < np.inf for size in spacing_mm):
        raise InputError(f"{path}: the voxel size is {spacing_mm} mm; mend the header")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 or array.size == 0:
        raise InputError(f"{path}: must be one 3D volume, but its shape is {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: has NaN or infinite voxels; replace them")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine matrix is not finite or not invertible; mend the header")
    return tio.ScalarImage(tensor=torch.from_numpy(array)[None], affine=affine)


def stored_spacing(nifti: nib.spatialimages.SpatialImage) -> tuple[float, ...]:
    """Voxel size in mm of the three axes as it is in the file; nibabel turns a negative one into a positive one."""
    header = nifti.header
    if "pixdim" not in header:
        return tuple(float(size) for size in header.get_zooms()[:3])
    file_map = nifti.file_map["header" if nifti.file_map.get("header") else "image"]
    with file_map.get_prepare_fileobj("rb") as file:
        stored = type(header).from_fileobj(file, check=False)
    return tuple(float(size) for size in stored["pixdim"][1 : 1 + min(3, nifti.ndim)])


def read_label(path: str | Path, n_classes: int, merged_labels: dict[int, int] | None = None) -> tio.LabelMap:
    """A label file as a tio.LabelMap (1, X, Y, Z) uint8, in which the keys of `merged_labels` became their values.

    Raises InputError as `read_image`, or for values other than the classes' and these keys.
    """
    image = _read(path)
    label, merged_labels = image.data.byte(), merged_labels or {}
    changed = image.data[image.data != label][:1]  # by the rounding to bytes
    for value in (*changed.tolist(), *label.flatten().bincount().nonzero().flatten().tolist()):
        if value not in range(n_classes) and value not in merged_labels:
            raise InputError(
                f"{path}: has the label {value:g} in {int((image.data == value).sum())} voxels, but the labels of "
                f"this data set are the whole numbers 0 to {n_classes - 1}; correct them"
            )
    for value, counts_as in merged_labels.items():
        label[label == value] = counts_as
    return tio.LabelMap(tensor=label, affine=image.affine)


def zscore(tensor: Tensor) -> Tensor:
    """(x - mean) / population standard deviation of the whole volume (any shape) as float32; zeros if it is constant.

    The sums are numpy's: in double precision, and the same whatever the number of threads.
    """
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
    """Resample (linearly, in world space), clip, shift and scale, pad, and z-score if asked for: what is cached."""
    grid = _grid(image, preprocessing.spacing_mm)
    tensor = tio.Resample(tuple(grid))(image).data
    if preprocessing.clip is not None:
        tensor = tensor.clamp(*preprocessing.clip)
    if preprocessing.scale is not None:
        tensor = (tensor - preprocessing.shift) / preprocessing.scale
    tensor, affine, padding = _pad(tensor, grid.affine, preprocessing.min_size)
    return Preprocessed(zscore(tensor) if preprocessing.zscore else tensor.float(), affine, padding)


def standardize_label(label: tio.LabelMap, preprocessing: Preprocessing) -> Tensor:
    """(X', Y', Z') uint8: nearest neighbours on the very grid that `standardize` gives an image of the same grid."""
    grid = _grid(label, preprocessing.spacing_mm)
    return _pad(tio.Resample(tuple(grid))(label).data, grid.affine, preprocessing.min_size).tensor[0].byte()


def to_original_grid(
    probabilities: Tensor, affine: np.ndarray, padding: tuple[int, ...], grid: Grid, slab_voxels: int = 2**24
) -> Iterator[tuple[slice, Tensor]]:
    """Bring (K, X', Y', Z') on the preprocessed grid back to `grid`, that of the image as it was read (X, Y, Z).

    Takes the padding off and resamples linearly in world space; voxels of the original beyond the outermost
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


def preprocessed_shape(
    shape: tuple[int, ...], spacing_mm: tuple[float, ...], preprocessing: Preprocessing
) -> tuple[int, ...]:
    """The shape (X', Y', Z') that `standardize` gives a volume of this shape and voxel size."""
    size, _ = _resampled(np.array(shape), np.array(spacing_mm), preprocessing.spacing_mm)
    return tuple(np.maximum(size, preprocessing.min_size or 1).tolist())


def _pad(tensor: Tensor, affine: np.ndarray, min_size: tuple[int, ...] | None) -> Preprocessed:
    """Pad (1, X, Y, Z) centrally with zeros to at least `min_size`."""
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

"""The one reader and writer of images and labels, of any file type.

Training, prediction, evaluation and the experiments read every image and label here, and so by the same rules. Neither
this module nor what it imports needs torch, so that processes that evaluate start fast and stay small.
"""

import os
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data import dicom, itk, nifti, pictures
from lib.data.dicom import Slices
from lib.data.geometry import Geometry, Header, PlainHeader, Volume, of_header
from lib.data.nifti import PIECE
from lib.system.error import InputError
from lib.system.files import final_name

NIFTI = (".nii.gz", ".nii")
SUFFIXES = (*NIFTI, *itk.READERS, *pictures.FORMATS)
TRUTH, PROBABILITIES = "_gt", "_probabilities"  # ends of the names of files that are neither images nor predictions
LARGEST = {".bmp": 255, ".gipl": 65535} | dict.fromkeys((".png", ".tif", ".tiff"), 65535)  # label that a type holds
LABEL_TOLERANCE = 0.001  # a scaled or float value so near to a whole number is this label


def read(path: str | Path) -> Volume:
    """The voxels of a file in their stored order and type. Raises InputError if they cannot be read, or are not one
    volume of one channel; see `lib.data.nifti.read`, `lib.data.itk.read_channels`, `lib.data.pictures.read_channels`.
    """
    reader = _reader(path)
    if reader is nifti:
        return nifti.read(path)
    volume, *more = reader.read_channels(path)
    if more:
        raise InputError(f"{path}: must be one volume of one channel, but it has {1 + len(more)} channels")
    return volume


def read_geometry(path: str | Path) -> Geometry:
    """The geometry of a file, without its voxels. Raises InputError as `read`, for what the header shows."""
    return _reader(path).read_geometry(path)


def read_image(path: str | Path | Slices) -> Volume:
    """`read` as float32, also of a DICOM series. Raises InputError as well for voxels that are not finite, or all the
    same."""
    return _as_image(dicom.read(path) if isinstance(path, Slices) else read(path))


def read_channels_of(path: str | Path | Slices) -> list[Volume]:
    """As `read_image`, each of the channels that a file holds: those of (X, Y, Z, channel) in NIfTI, components of
    voxels, colours. All have the number of bytes and the SHA-256 of the file."""
    if isinstance(path, Slices):
        return [read_image(path)]
    return [_as_image(volume) for volume in _reader(path).read_channels(path)]


def n_channels(path: str | Path) -> int:
    """How many volumes `read_channels_of` gives, by the header alone. Raises InputError as `read_geometry`."""
    return _reader(path).n_channels(path)


def _reader(path: str | Path):
    """The module that knows files of this name; NIfTI's says what is wrong with the others."""
    suffix = _suffix(Path(path).name)
    return itk if suffix in itk.READERS else pictures if suffix in pictures.FORMATS else nifti


def _as_image(volume: Volume) -> Volume:
    """The volume as float32. Raises InputError for voxels that are not finite, or all the same."""
    array, path = volume.array.astype(np.float32, copy=False), volume.path
    if not np.isfinite(array).all():
        raise InputError(f"{path}: has NaN or infinite voxels; replace them")
    if array.min() == array.max():
        raise InputError(f"{path}: all voxels are {array.min():g}; replace this image")
    return replace(volume, array=array)


# --- labels -----------------------------------------------------------------------------------------------------------


def label_type(n_classes: int) -> np.dtype:
    """The type of labels in memory, cache and predictions: uint8, or int16 where there are more than 256 classes."""
    return np.dtype(np.uint8 if n_classes <= 256 else np.int16)


def read_label(
    path: str | Path,
    n_classes: int,
    merged_labels: dict[int, int] | None = None,
    values: Collection[int] = (),
    ignore: int | None = None,
) -> Volume:
    """`read` as labels of `label_type`: what lies within 0.001 of a label is this label.

    values: what stands in the file for each class; none: 0, 1, 2, ... The keys of `merged_labels` become their values,
    and `ignore` becomes n_classes. A colour image is read if it is grey in truth. Raises InputError as `read`, or for
    other values than these.
    """
    volume = _read_grey(path)
    becomes = dict(zip(values or range(n_classes), range(n_classes), strict=True)) | (merged_labels or {})
    if ignore is not None:
        becomes[ignore] = n_classes
    array, allowed = volume.array, np.array(sorted(becomes))
    known = ", ".join(map(str, values)) if values else f"the whole numbers 0 to {n_classes - 1}"
    known += f", and {ignore} to be ignored" if ignore is not None else ""
    if array.dtype.kind == "f":
        array = _whole_numbers(path, array, allowed, known)
    if array.min() < 0 or array.max() > allowed[-1] or len(allowed) <= allowed[-1]:
        _check_labels(path, array, ~np.isin(array, allowed), known)
    dtype = label_type(n_classes if ignore is None else n_classes + 1)
    if any(value != becomes[value] for value in allowed if value <= array.max()):
        counts_as = np.zeros(allowed[-1] + 1, dtype)
        counts_as[list(becomes)] = list(becomes.values())
        array = counts_as[array]
    return replace(volume, array=array.astype(dtype, copy=False))


def _read_grey(path: str | Path) -> Volume:
    """`read`, where of a colour image all colours are the same; its opacity does not count. Raises InputError."""
    if _reader(path) is not pictures:
        return read(path)
    volumes = pictures.read_channels(path)
    first, *others = volumes[:-1] if len(volumes) in (2, 4) else volumes
    if any((first.array != other.array).any() for other in others):
        raise InputError(f"{path}: is a colour image; store labels as grey values 0, 1, 2, ...")
    return first


def _whole_numbers(path: str | Path, array: np.ndarray, allowed: np.ndarray, known: str) -> np.ndarray:
    """Labels that are stored as floats, or scaled, as integers."""
    labels = np.empty(array.shape, np.int16 if allowed[-1] < 2**15 else np.int32, order="F")
    values, whole = array.reshape(-1, order="F"), labels.reshape(-1, order="F")
    with np.errstate(invalid="ignore"):  # NaN is not near to anything
        for start in range(0, len(values), PIECE):
            part = values[start : start + PIECE]
            nearest = np.rint(part)
            if not ((np.abs(part - nearest) <= LABEL_TOLERANCE) & np.isin(nearest, allowed)).all():
                near = np.abs(array - np.rint(array)) <= LABEL_TOLERANCE
                _check_labels(path, array, ~(near & np.isin(np.rint(array), allowed)), known)
            whole[start : start + PIECE] = nearest
    return labels


def _check_labels(path: str | Path, array: np.ndarray, bad: np.ndarray, known: str) -> None:
    """Raise the InputError that names what is no label, with all its digits, and how often it is there, if any is; then
    all values, and the likely cause. `known` are the labels in words."""
    if not bad.any():
        return
    values, counts = np.unique(array[bad], return_counts=True)
    named = [f"{value} in {n} voxels" for value, n in zip(values[:3].tolist(), counts[:3].tolist(), strict=True)]
    more = f" and {len(values) - 3} other values" if len(values) > 3 else ""
    found = np.unique(array).tolist()
    listed = ", ".join(f"{value:g}" for value in found[:10]) + ", ..." * (len(found) > 10)
    scaled = "; a mask that was scaled to 0 ... 255?" if found[0] == 0 and found[-1] in (254, 255, 65535) else ""
    raise InputError(
        f"{path}: has the label {', '.join(named)}{more}, but the labels of this data set are {known}; correct them "
        f"(its values are {listed}{scaled})"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: Path, array: np.ndarray, header: Header, values: Collection[int] = ()) -> None:
    """Write labels as a file of the type that its name ends in, under the geometry that the header of an image gives,
    whatever the image's own type. Equal arrays give equal bytes.

    array: (X, Y, Z); NIfTI files take probabilities (X, Y, Z, n) as well. values: what to write for each class, in the
    smallest unsigned type; none: the array as it is. A temporary file of `write_atomically` is of the type that it will
    be. Raises OSError, or InputError where the type cannot hold these labels.
    """
    if values:
        array = np.array(values, np.min_scalar_type(max(values)))[array]
    suffix = _suffix(final_name(path))
    if suffix in pictures.FORMATS and array.shape[2] > 1:
        raise InputError(f"{path}: {suffix} files cannot hold {array.shape[2]} slices; give another file_ending")
    if suffix in LARGEST and array.max() > LARGEST[suffix]:
        raise InputError(f"{path}: {suffix} files cannot hold the label {array.max()}; give another file_ending")
    plain = isinstance(header, PlainHeader)
    if suffix in pictures.FORMATS:
        pictures.write(path, array, suffix)
    elif suffix in itk.READERS:
        header = header if plain else PlainHeader(of_header(path, header, header.get_data_shape()[:3]))
        itk.write(path, array, header, suffix)
    else:
        nifti.write(path, array, nifti.header_of(header.geometry) if plain else header, compress=suffix != ".nii")


# --- names ------------------------------------------------------------------------------------------------------------


def stem(path: Path, suffixes: Collection[str] = SUFFIXES) -> str | None:
    """The name without its ending; None for files of none of these endings, and for hidden ones."""
    suffix = _suffix(path.name, suffixes)
    return None if suffix is None or path.name.startswith(".") else path.name.removesuffix(suffix)


def _suffix(name: str, suffixes: Collection[str] = SUFFIXES) -> str | None:
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def only(case: str, candidates: Iterable[Path]) -> Path | None:
    """The one file of the candidates that is there, None if none is; a link that leads nowhere is there, and an error
    to its reader. Raises InputError if there are two."""
    there = list({path.resolve(): path for path in candidates if os.path.lexists(path)}.values())
    if len(there) > 1:
        raise InputError(f"{case}: both {there[0]} and {there[1]} are there; take away the one that is not meant")
    return there[0] if there else None

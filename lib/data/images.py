"""The one reader and writer of images and labels, of any file type.

Training, prediction, evaluation and the experiments read every image and label here, and so by the same rules. Neither
this module nor what it imports needs torch, so that processes that evaluate start fast and stay small.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.data import nifti
from lib.data.geometry import Geometry, Volume
from lib.data.nifti import PIECE
from lib.system.error import InputError

SUFFIXES = (".nii.gz", ".nii")
TRUTH, PROBABILITIES = "_gt", "_probabilities"  # ends of the names of files that are neither images nor predictions
LABEL_TOLERANCE = 0.001  # a scaled or float value so near to a whole number is this label


def read(path: str | Path) -> Volume:
    """As `lib.data.nifti.read`: the voxels of a file in their stored order and type. Raises InputError."""
    return nifti.read(path)


def read_geometry(path: str | Path) -> Geometry:
    """The geometry of a file, without its voxels. Raises InputError as `read`, for what the header shows."""
    return nifti.read_geometry(path)


def read_image(path: str | Path) -> Volume:
    """`read` as float32. Raises InputError as well for voxels that are not finite, or all the same."""
    volume = read(path)
    array = volume.array.astype(np.float32, copy=False)
    if not np.isfinite(array).all():
        raise InputError(f"{path}: has NaN or infinite voxels; replace them")
    if array.min() == array.max():
        raise InputError(f"{path}: all voxels are {array.min():g}; replace this image")
    return replace(volume, array=array)


def label_type(n_classes: int) -> np.dtype:
    """The type of labels in memory, cache and predictions: uint8, or int16 where there are more than 256 classes."""
    return np.dtype(np.uint8 if n_classes <= 256 else np.int16)


def read_label(path: str | Path, n_classes: int, merged_labels: dict[int, int] | None = None) -> Volume:
    """`read` as labels of `label_type`: what lies within 0.001 of a label is this label, and the keys of
    `merged_labels` become their values.

    Raises InputError as `read`, or for other values than the labels 0 to n_classes - 1 and these keys.
    """
    volume, merged_labels = read(path), merged_labels or {}
    array, allowed = volume.array, np.array(sorted({*range(n_classes), *merged_labels}))
    if array.dtype.kind == "f":
        array = _whole_numbers(path, array, allowed, n_classes)
    if array.min() < 0 or array.max() > allowed[-1] or len(allowed) <= allowed[-1]:
        _check_labels(path, array, ~np.isin(array, allowed), n_classes)
    dtype = label_type(n_classes)
    if merged_labels and array.max() >= n_classes:
        counts_as = np.arange(allowed[-1] + 1)
        counts_as[list(merged_labels)] = list(merged_labels.values())
        array = counts_as.astype(dtype)[array]
    return replace(volume, array=array.astype(dtype, copy=False))


def _whole_numbers(path: str | Path, array: np.ndarray, allowed: np.ndarray, n_classes: int) -> np.ndarray:
    """Labels that are stored as floats, or scaled, as integers."""
    labels = np.empty(array.shape, np.int16 if allowed[-1] < 2**15 else np.int32, order="F")
    values, whole = array.reshape(-1, order="F"), labels.reshape(-1, order="F")
    with np.errstate(invalid="ignore"):  # NaN is not near to anything
        for start in range(0, len(values), PIECE):
            part = values[start : start + PIECE]
            nearest = np.rint(part)
            if not ((np.abs(part - nearest) <= LABEL_TOLERANCE) & np.isin(nearest, allowed)).all():
                near = np.abs(array - np.rint(array)) <= LABEL_TOLERANCE
                _check_labels(path, array, ~(near & np.isin(np.rint(array), allowed)), n_classes)
            whole[start : start + PIECE] = nearest
    return labels


def _check_labels(path: str | Path, array: np.ndarray, bad: np.ndarray, n_classes: int) -> None:
    """Raise the InputError that names what is no label, with all its digits, and how often it is there, if any is."""
    if not bad.any():
        return
    values, counts = np.unique(array[bad], return_counts=True)
    named = [f"{value} in {n} voxels" for value, n in zip(values[:3].tolist(), counts[:3].tolist(), strict=True)]
    more = f" and {len(values) - 3} other values" if len(values) > 3 else ""
    raise InputError(
        f"{path}: has the label {', '.join(named)}{more}, but the labels of this data set are the whole numbers "
        f"0 to {n_classes - 1}; correct them"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


# --- names ------------------------------------------------------------------------------------------------------------


def stem(path: Path) -> str | None:
    """The name without .nii.gz or .nii; None for other files, and for hidden ones."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
    return None if suffix is None or path.name.startswith(".") else path.name.removesuffix(suffix)


def only(case: str, candidates: Iterable[Path]) -> Path | None:
    """The one file of the candidates that is there, None if none is; a link that leads nowhere is there, and an error
    to its reader. Raises InputError if there are two."""
    there = list({path.resolve(): path for path in candidates if os.path.lexists(path)}.values())
    if len(there) > 1:
        raise InputError(f"{case}: both {there[0]} and {there[1]} are there; take away the one that is not meant")
    return there[0] if there else None

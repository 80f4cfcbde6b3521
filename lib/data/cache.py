"""Preprocessed volumes on disk, uncompressed; a folder per subject, which appears complete or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torchio as tio

from lib.data.preprocessing import (
    Preprocessing,
    preprocessed_shape,
    read_image,
    read_label,
    standardize,
    standardize_label,
)
from lib.error import InputError
from lib.lock import locked

VERSION = 2  # raise it whenever the same parameters give other voxels or other files


@dataclass(frozen=True)
class SubjectFiles:
    """One image and, where it has one, its ground truth."""

    id: str
    image: Path
    label: Path | None


def is_fresh(files: SubjectFiles, folder: Path) -> bool:
    """Whether `folder` holds, whole, what `store` made from these very files, unchanged since (path, size, time)."""
    names = ["image.npy"] + ["label.npy"] * (files.label is not None)
    try:
        whole = all(np.load(folder / name, mmap_mode="r", allow_pickle=False).size for name in names)
        return whole and json.loads((folder / "meta.json").read_text())["sources"] == _sources(files)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return False


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Make the cache's folder and hold its lock, so that two runs do not fill it at once; clear it of what a killed
    run has left. Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):
            for left in folder.glob(".*-*"):
                shutil.rmtree(left, ignore_errors=True)
            yield
    except OSError as error:
        raise InputError(f"--cache_path: {folder} cannot be written ({error.strerror}); give another one") from error


def stored_bytes(files: SubjectFiles, preprocessing: Preprocessing) -> int:
    """How much `store` will write for a subject, by the image's header; 0 if that is broken: `store` says why."""
    try:
        header = nib.load(files.image)
        shape = preprocessed_shape(header.shape[:3], nib.affines.voxel_sizes(header.affine), preprocessing)
        return math.prod(shape) * (5 if files.label is not None else 4)
    except Exception:  # nibabel, gzip and zlib raise a dozen types for broken files
        return 0


def store(
    files: SubjectFiles,
    folder: Path,
    preprocessing: Preprocessing,
    n_classes: int,
    merged_labels: dict[int, int],
    label_takes_grid: bool,
) -> None:
    """Preprocess one subject into `folder`: image.npy (1, X, Y, Z) float32, label.npy (X, Y, Z) uint8, and meta.json
    with affine, padding, sources and notes.

    See BaseDataset for `merged_labels` and `label_takes_grid`. Raises InputError if a file is broken, the label does
    not fit the image, or the folder cannot be written.
    """
    sources = _sources(files)
    image = read_image(files.image)
    arrays, notes = {}, []
    if files.label is not None:
        label = read_label(files.label, n_classes, merged_labels)
        if label.shape != image.shape:
            shapes = f"its shape {label.spatial_shape} is not the image's {image.spatial_shape}"
            raise InputError(f"{files.label}: {shapes}; replace the one that is wrong")
        if not np.allclose(label.affine, image.affine, rtol=1e-4, atol=1e-3):
            if not label_takes_grid:
                raise InputError(f"{files.label}: its affine is not that of {files.image}; mend the one that is wrong")
            notes.append(f"{files.label}: its affine is not that of {files.image}; the image's is taken")
        label.affine = image.affine
        arrays["label.npy"] = standardize_label(label, preprocessing).numpy()
    tensor, affine, padding = standardize(image, preprocessing)
    arrays["image.npy"] = tensor.numpy()
    meta = {"affine": affine.tolist(), "padding": padding, "sources": sources, "notes": notes}
    try:
        _write(folder, arrays, meta)
    except OSError as error:
        raise InputError(
            f"--cache_path: {folder} cannot be written ({error.strerror or error}); give another one"
        ) from error


def load(folder: Path) -> tio.Subject:
    """The subject with "image" (1, X, Y, Z) float32, "label" (1, X, Y, Z) uint8 if there is one, and "id".

    The voxels are mapped from the files, copy-on-write: what is changed stays in memory. Raises InputError if the
    files were damaged.
    """
    try:
        affine = np.array(json.loads((folder / "meta.json").read_text())["affine"])
        image = tio.ScalarImage(tensor=torch.from_numpy(_array(folder / "image.npy")), affine=affine)
        subject = tio.Subject(image=image, id=folder.name)
        if (folder / "label.npy").exists():
            label = torch.from_numpy(_array(folder / "label.npy"))[None]
            subject.add_image(tio.LabelMap(tensor=label, affine=affine), "label")
    except Exception as error:  # numpy, json and torchio raise a dozen types for damaged files
        raise InputError(
            f"{folder}: is damaged ({type(error).__name__}); delete this folder, it is made anew"
        ) from error
    return subject


def _array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="c", allow_pickle=False)


def notes(folder: Path) -> list[str]:
    """What `store` found worth a line in the log."""
    return json.loads((folder / "meta.json").read_text())["notes"]


def n_slices(folder: Path) -> int:
    """The size of the volume's last axis, without reading the volume."""
    return np.load(folder / "image.npy", mmap_mode="r").shape[-1]


def _sources(files: SubjectFiles) -> list[list]:
    paths = [path.resolve() for path in (files.image, files.label) if path is not None]
    try:
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _write(folder: Path, arrays: dict[str, np.ndarray], meta: dict) -> None:
    """Write into a temporary folder beside `folder`, then take its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / folder.name
        new.mkdir()
        for name, array in arrays.items():
            np.save(new / name, array)
        (new / "meta.json").write_text(json.dumps(meta))
        with suppress(FileNotFoundError):
            os.rename(folder, Path(temporary) / "old")
        try:
            os.rename(new, folder)
        except OSError:  # another run has just finished the same subject
            if not (folder / "meta.json").exists():
                raise

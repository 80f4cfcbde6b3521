"""Preprocessed volumes on disk, uncompressed; a folder per subject, which appears complete or not at all."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torchio as tio

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.data.geometry import Volume, aligned, in_order
from lib.data.images import label_type, read_geometry
from lib.data.preprocessing import check_size, in_own_frame, preprocessed_shape, read_channels, standardize
from lib.system.error import InputError
from lib.system.files import digest, file_digest, joint_digest, locked

VERSION = 3  # raise it whenever the same parameters give other voxels or other files


def identify(files: SubjectFiles) -> dict[str, str]:
    """What the subject's files hold: {"image": `joint_digest` of its channels, "label": SHA-256 where there is one}.

    Raises InputError.
    """
    try:
        sources = {"image": joint_digest([file_digest(path) for path in files.images])}
        return sources | ({"label": file_digest(files.label)} if files.label else {})
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error


def entry(subject: str, sources: dict[str, str]) -> str:
    """The name of a subject's folder: other files, other folder. So data sets of the same names share a cache, and
    what a training has mapped into memory is never replaced."""
    return f"{subject}-{digest(json.dumps(sources, sort_keys=True).encode())[:16]}"


def is_fresh(sources: dict[str, str], folder: Path) -> bool:
    """Whether `folder` holds, whole, what `store` made from files of this content."""
    try:
        whole = all(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).size for name in sources)
        return whole and json.loads((folder / "meta.json").read_text())["sources"] == sources
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


def stored_bytes(files: SubjectFiles, dataset: BaseDataset) -> int:
    """How much `store` will write for a subject, by the image's header; with a crop, at most. Raises InputError if the
    header is broken."""
    geometry = read_geometry(files.image)
    check_size(files.image, geometry, dataset.preprocessing)
    shape = preprocessed_shape(geometry, dataset.preprocessing)
    per_label = label_type(dataset.n_classes + (dataset.ignore is not None)).itemsize if files.label else 0
    return math.prod(shape) * (4 * dataset.modalities + per_label)


def store(
    files: SubjectFiles,
    sources: dict[str, str],
    folder: Path,
    preprocessing: Preprocessing,
    read_truth: Callable[[Path], Volume],
) -> None:
    """Preprocess one subject into `folder`: image.npy (C, X, Y, Z) float32, label.npy (X, Y, Z) of the type of
    `read_truth`, and meta.json with id, padding, sources (those of `identify`) and two affines (4x4) of the
    preprocessed voxels: to the volume's own frame, and to the world (RAS+ mm).

    Raises InputError if a file is broken, is not what `sources` says, the channels or the label do not share one grid,
    or the folder cannot be written.
    """
    (own, image), label = read_channels(files.images, preprocessing), None
    _check_unchanged(image, sources["image"])
    if files.label is not None:
        label = read_truth(files.label)
        _check_unchanged(label, sources["label"])
        label = in_own_frame(aligned(label, image, preprocessing.by_index), preprocessing.orientation)
    there = standardize(own, preprocessing, label)
    arrays = {"image.npy": there.array} | ({} if label is None else {"label.npy": there.label})
    world = in_order(image.geometry, preprocessing.orientation).affine @ np.linalg.inv(own.affine) @ there.affine
    meta = {"id": files.id, "padding": there.padding, "sources": sources}
    meta |= {"affine": there.affine.tolist(), "world": world.tolist()}
    try:
        _write(folder, arrays, meta)
    except OSError as error:
        raise InputError(
            f"--cache_path: {folder} cannot be written ({error.strerror or error}); give another one"
        ) from error


def _check_unchanged(volume: Volume, sha256: str) -> None:
    if volume.sha256 != sha256:
        raise InputError(f"{volume.path}: changed while it was read; start again when nothing writes to it")


def load(folder: Path, affine: str = "affine") -> tio.Subject:
    """The subject with "image" (C, X, Y, Z) float32, "label" (1, X, Y, Z) if there is one, and "id", under one of
    the affines of `store`: "affine" or "world".

    The voxels are mapped from the files, copy-on-write: what is changed stays in memory. Raises InputError if the
    files were damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        affine = np.array(meta[affine])
        image = tio.ScalarImage(tensor=torch.from_numpy(_array(folder / "image.npy")), affine=affine)
        subject = tio.Subject(image=image, id=meta["id"])
        if (folder / "label.npy").exists():
            label = torch.from_numpy(_array(folder / "label.npy"))[None]
            subject.add_image(tio.LabelMap(tensor=label, affine=affine), "label")
    except Exception as error:  # numpy, json and torchio raise a dozen types for damaged files
        raise _damaged(folder, error) from error
    return subject


def padding(folder: Path) -> tuple[int, ...]:
    """How many voxels of the volume were added before and after each axis (x0, x1, y0, y1, z0, z1). Raises InputError
    if the file was damaged."""
    try:
        x0, x1, y0, y1, z0, z1 = map(int, json.loads((folder / "meta.json").read_text())["padding"])
        return x0, x1, y0, y1, z0, z1
    except Exception as error:  # as in `load`
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder}: is damaged ({type(error).__name__}); delete this folder, it is made anew")


def _array(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="c", allow_pickle=False)


def n_slices(folder: Path) -> int:
    """The size of the volume's last axis, without reading the volume. Raises InputError if the file was damaged."""
    try:
        return _array(folder / "image.npy").shape[-1]
    except Exception as error:  # as in `load`
        raise _damaged(folder, error) from error


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

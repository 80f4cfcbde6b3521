"""DICOM series: which there are in a folder, whether their slices are complete, and their voxels.

Whoever wants an image asks `lib.data.images`. The reader is SimpleITK's (GDCM); a header may say anything, so all that
is used of it is checked.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from lib.data.geometry import Geometry, PlainHeader, Volume
from lib.data.itk import LPS, reason_of, simple_itk
from lib.system.error import InputError
from lib.system.files import file_digest, joint_digest

MAGIC = b"DICM"  # from byte 128 on
UNEVEN = 0.01  # share of the distance of two slices, or mm if that is more, by which distances may differ
SAME_DIRECTION = 1e-4  # by which directions may differ, which are rounded in headers
SERIES_UID, SERIES_NUMBER, DESCRIPTION, INSTANCE = "0020|000e", "0020|0011", "0008|103e", "0020|0013"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
FRAMES, PHOTOMETRIC, BITS = "0028|0008", "0028|0004", "0028|0100"
COMPRESSED = re.compile(rb"1\.2\.840\.10008\.1\.2\.(4\.|5|1\.99)")  # transfer syntaxes


@dataclass(frozen=True)
class Slice:
    """What the header of a file says: numbers of the DICOM standard, in its world (LPS, mm)."""

    path: Path
    uid: str  # of the series
    title: str  # number and description of the series
    instance: str
    shape: tuple[int, int]  # columns, rows
    spacing_mm: tuple[float, float] | None  # of the columns, of the rows
    position: np.ndarray | None  # (3,)
    directions: np.ndarray | None  # (3, 3): along a row, along a column, across

    @property
    def height(self) -> float:
        """Where it lies along its normal (mm)."""
        return float(self.position @ self.directions[:, 2])


class Slices(tuple):
    """The files of a series that is complete, in the order of its slices: the `Images` of one case. It holds paths."""

    geometry: Geometry

    @classmethod
    def of(cls, slices: list[Slice], folder: Path) -> Self:
        """The slices of one series in the order in which they lie. Raises InputError that says what is wrong, and with
        which files of the `folder`."""
        slices = _sorted(slices, folder)
        step = _check_distances(slices, folder)
        made = cls(one.path for one in slices)
        (nx, ny), (dx, dy), first = slices[0].shape, slices[0].spacing_mm, slices[0]
        made.geometry = Geometry(
            (nx, ny, len(slices)), (dx, dy, step), LPS[:, None] * first.directions, LPS * first.position
        )
        return made


def series_in(folder: Path) -> tuple[dict[str, Slices], list[str]]:
    """The series in a folder and those below it, by a name for each; and lines that say what is left out.

    One series is called as the folder is; several as the folders in which they lie, or, where these are the same ones,
    by their number and description, too. Among several, what is no volume is left out: a single slice, a localizer.
    Raises InputError for a series that is not complete, or which cannot be used.
    """
    slices, others = [], []
    for path in _files(folder):
        try:
            slices.append(_read_header(path))
        except RuntimeError:  # a report, a plan, a list of files, ...
            others.append(path)
    if others and not slices:
        raise InputError(f"--input {folder}: its DICOM files hold no image ({_some(others)}); give a series of images")
    notes = [f"{folder}: leaves out {_some(others)}, which hold no images"] if others and slices else []
    by_uid: dict[str, list[Slice]] = {}
    for one in slices:
        by_uid.setdefault(one.uid, []).append(one)
    volumes = {uid: found for uid, found in by_uid.items() if len(by_uid) == 1 or not (why := _no_volume(found))}
    for uid, found in by_uid.items():
        if uid not in volumes and (why := _no_volume(found)):
            notes.append(f"{folder}: leaves out the series {found[0].title!r} ({found[0].path.parent}): it is {why}")
    if slices and not volumes:
        raise InputError(f"--input {folder}: holds no volume: {'; '.join(notes)}")
    names = _names(volumes, folder)
    return {names[uid]: Slices.of(found, folder) for uid, found in volumes.items()}, notes


def read(slices: Slices) -> Volume:
    """The voxels of a series as float32, in the scale that each file says of its own. The path is that of the first
    slice; number of bytes and `joint_digest` are those of all files.

    Raises InputError if a file cannot be read.
    """
    array = np.empty(slices.geometry.shape, np.float32, order="F")
    for k, path in enumerate(slices):
        try:
            image = simple_itk().ReadImage(str(path), imageIO="GDCMImageIO")
            voxels = simple_itk().GetArrayFromImage(image)
        except RuntimeError as error:
            raise InputError(
                f"{path}: its voxels cannot be read ({reason_of(error)}); restore this file, or convert the series"
            ) from error
        if voxels.shape != (1, *array.shape[1::-1]):
            raise InputError(f"{path}: changed while it was read; start again when nothing writes to it")
        array[:, :, k] = voxels[0].T
    try:
        n_bytes, sha256 = sum(path.stat().st_size for path in slices), joint_digest(map(file_digest, slices))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); restore this file") from error
    return Volume(slices[0], array, slices.geometry, PlainHeader(slices.geometry), n_bytes, sha256)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM files do."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == MAGIC
    except OSError:
        return False


# --- files and headers ------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """The DICOM files in a folder and those below it, but for hidden ones, in the order of their names."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file() and is_dicom(path)]


def _read_header(path: Path) -> Slice:
    """Raises RuntimeError if a file holds no image, and InputError if it is not one grey slice."""
    itk = simple_itk()
    reader = itk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()

    def said(tag: str) -> str:
        # GDCM gives bytes of any alphabet, which need not be UTF-8
        text = reader.GetMetaData(tag) if reader.HasMetaDataKey(tag) else ""
        return text.encode("utf-8", "replace").decode("utf-8", "replace").strip(" \0")

    if said(FRAMES) not in ("", "1"):
        raise InputError(f"{path}: is DICOM of {said(FRAMES)} frames in one file; convert it to NIfTI first")
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: is a colour image; give a series of grey ones")
    _check_whole(path, math.prod(reader.GetSize()[:2]) * int(said(BITS) or 8) // 8)
    if said(PHOTOMETRIC) == "MONOCHROME1":  # ITK turns it around, other programs do not
        raise InputError(f"{path}: is stored as a negative (MONOCHROME1); convert the series to NIfTI first")
    numbers = {tag: _numbers(said(tag), n) for tag, n in ((POSITION, 3), (ORIENTATION, 6), (PIXEL_SPACING, 2))}
    axes = numbers[ORIENTATION]
    spacing = numbers[PIXEL_SPACING]  # of the rows, of the columns
    title = " ".join(part for part in (said(SERIES_NUMBER), said(DESCRIPTION)) if part)
    return Slice(
        path,
        said(SERIES_UID),
        title or "without a name",
        said(INSTANCE),
        tuple(reader.GetSize()[:2]),
        None if spacing is None else (float(spacing[1]), float(spacing[0])),
        numbers[POSITION],
        None if axes is None else np.column_stack([axes[:3], axes[3:], np.cross(axes[:3], axes[3:])]),
    )


def _check_whole(path: Path, n_bytes: int) -> None:
    """Raise InputError if a file is too small for the voxels of its slice, which GDCM does not always see."""
    with open(path, "rb") as file:
        compressed = COMPRESSED.search(file.read(4096))
    if not compressed and path.stat().st_size < n_bytes:
        raise InputError(f"{path}: is cut off; restore this file, or export the series again")


def _numbers(text: str, n: int) -> np.ndarray | None:
    """The `n` finite numbers that a text such as "1.5\\2" holds; None if it does not."""
    try:
        numbers = np.array([float(part) for part in text.split("\\")])
    except ValueError:
        return None
    return numbers if len(numbers) == n and np.isfinite(numbers).all() else None


# --- one series -------------------------------------------------------------------------------------------------------


def _no_volume(slices: list[Slice]) -> str:
    """Why the slices of a series cannot be a volume, if they plainly are none; else nothing."""
    if len(slices) == 1:
        return "a single slice"
    known = [one.directions for one in slices if one.directions is not None]
    if any(not np.allclose(other, known[0], atol=0.1) for other in known):
        return "a localizer, with slices in several directions"
    return "" if known else "without positions in space"


def _sorted(slices: list[Slice], folder: Path) -> list[Slice]:
    """The slices in the order in which they lie. Raises InputError if they have no place, or not the same grid."""
    first = slices[0]
    for one in slices:
        if one.position is None or one.directions is None or one.spacing_mm is None or min(one.spacing_mm) <= 0:
            raise InputError(
                f"{one.path}: does not say where it lies (position, orientation, spacing); convert it first"
            )
        if not np.allclose(one.directions.T @ one.directions, np.eye(3), atol=1e-3):
            raise InputError(f"{one.path}: its rows and columns are not at right angles; mend its orientation")
        pairs = {
            "size": (one.shape, first.shape),
            "voxel size": (one.spacing_mm, first.spacing_mm),
            "orientation": (one.directions.round(6).tolist(), first.directions.round(6).tolist()),
        }
        for what, (here, there) in pairs.items():
            if not np.allclose(here, there, rtol=SAME_DIRECTION, atol=SAME_DIRECTION):
                raise InputError(
                    f"{one.path}: its {what} is not that of {first.path}; give a folder of one series, with one grid"
                )
    if len(slices) == 1:
        raise InputError(f"{folder}: holds a single slice ({first.path.name}); give a series of two at least")
    return sorted(slices, key=lambda one: (one.height, str(one.path)))


def _check_distances(slices: list[Slice], folder: Path) -> float:
    """The distance of the slices (mm). Raises InputError unless they are evenly spaced, complete, and one above the
    other; it names the slice that is missing, or there twice."""
    heights = np.array([one.height for one in slices])
    gaps = np.diff(heights)
    for gap, one, other in zip(gaps, slices, slices[1:], strict=False):
        if gap < UNEVEN:
            raise InputError(
                f"{folder}: two slices lie at {one.height:.2f} mm, {one.path.name} and {other.path.name}; give one "
                "point in time, or one echo, alone"
            )
    counts = Counter(np.round(gaps, 2).tolist())
    usual = max(counts, key=lambda gap: (counts[gap], -gap))  # of most pairs, or the smaller one
    step = float(np.median(gaps[np.abs(gaps - usual) <= max(UNEVEN, UNEVEN * usual)]))
    allowed = max(UNEVEN, UNEVEN * step)
    wrong = [i for i, gap in enumerate(gaps) if abs(gap - step) > allowed]
    if wrong:
        i = wrong[0]
        one, other, n = slices[i], slices[i + 1], round(gaps[i] / step) - 1
        between = f"between {_place(one)} and {_place(other)}"
        more = f" (and so in {len(wrong) - 1} more places)" if len(wrong) > 1 else ""
        if n > 0 and abs(gaps[i] - (n + 1) * step) <= (n + 1) * allowed:
            what = "a slice is missing" if n == 1 else f"{n} slices are missing"
            raise InputError(
                f"{folder}: {what} {between}{more}: slices lie {step:g} mm apart, these {gaps[i]:.2f} mm; export the "
                "whole series"
            )
        raise InputError(
            f"{folder}: its slices are not evenly spaced: {step:g} mm, but {gaps[i]:.2f} mm {between}{more}; resample "
            "the series first"
        )
    travelled = slices[-1].position - slices[0].position
    across = travelled - (heights[-1] - heights[0]) * slices[0].directions[:, 2]
    if (shift := float(np.linalg.norm(across)) / len(gaps)) > allowed:
        angle = math.degrees(math.atan2(shift, step))
        raise InputError(
            f"{folder}: its slices are sheared by {angle:.1f} degrees (a tilted gantry); resample it first"
        )
    return float(heights[-1] - heights[0]) / len(gaps)


def _place(one: Slice) -> str:
    number = f", instance {one.instance}" if one.instance else ""
    return f"{one.path.name} ({one.height:.2f} mm{number})"


# --- names ------------------------------------------------------------------------------------------------------------


def _names(series: dict[str, list[Slice]], folder: Path) -> dict[str, str]:
    """A name for each series by its UID: a good file name on every system, the same whatever the order of files."""
    top = folder.resolve()
    places = {uid: os.path.commonpath([one.path.parent.resolve() for one in found]) for uid, found in series.items()}
    parts = {uid: [top.name, *Path(place).relative_to(top).parts] for uid, place in places.items()}
    names = {uid: "_".join(part[1:] or part) if len(series) > 1 else top.name for uid, part in parts.items()}
    for more in (lambda uid: min(one.title for one in series[uid]), lambda uid: uid):
        taken = Counter(_safe(name).casefold() for name in names.values())
        names = {uid: f"{n}_{more(uid)}" if taken[_safe(n).casefold()] > 1 else n for uid, n in names.items()}
    return {uid: _safe(name) for uid, name in names.items()}


def _safe(name: str) -> str:
    kept = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*\s]+', "_", name).strip("._ ")
    return kept[:150] or "series"


def _some(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")

"""Where the voxels of a volume are: spacing, directions and origin, and the order and directions of its axes.

What a NIfTI header says is read as ITK's reader reads it. Nothing here needs torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from lib.system.error import InputError

# Two grids are one where no corner of the volume lies further away than this share of the smallest voxel. Programs
# round the numbers of a header to float32 or to a few digits, which moves corners by a thousandth of a voxel at most;
# and voxels that overlap by 99% are the same voxels for every metric.
GRID_TOLERANCE = 0.01
FLAT = 999  # the size of a flat image's third axis, in its largest voxel sizes: nnU-Net's
UNITS_MM = {1: 1000.0, 3: 0.001}  # of xyzt_units: metres, microns; all others count as millimetres


class Geometry(NamedTuple):
    """Where the voxels of a volume are: its shape, and what leads from voxels (i, j, k) to the world (RAS+, mm)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    directions: np.ndarray  # (3, 3), orthonormal: the columns are the directions of the three axes
    origin_mm: np.ndarray  # (3,): the centre of the first voxel

    @property
    def affine(self) -> np.ndarray:
        """The affine (4, 4) from voxels to the world."""
        return from_matvec(self.directions * self.spacing_mm, self.origin_mm)


@dataclass(frozen=True)
class PlainHeader:
    """What a file that is no NIfTI file says of its voxels. n_axes: those that it stores; a flat image has 2."""

    geometry: Geometry
    n_axes: int = 3


Header = nib.Nifti1Header | PlainHeader  # what it takes to write a prediction under the geometry of its image


@dataclass(frozen=True)
class Volume:
    """A volume and its file. array: (X, Y, Z); header: as stored, nothing mended; n_bytes, sha256: of the file."""

    path: Path
    array: np.ndarray
    geometry: Geometry
    header: Header
    n_bytes: int
    sha256: str


def is_flat(geometry: Geometry) -> bool:
    """Whether this is a flat image, whose voxels have no volume."""
    return geometry.shape[2] == 1 and geometry.spacing_mm[2] == FLAT * max(geometry.spacing_mm[:2])


def codes(geometry: Geometry) -> str:
    """Where the stored axes lead to, such as "LPS": each to the nearest direction of the world."""
    return "".join(nib.aff2axcodes(from_matvec(geometry.directions)))


# --- what a header says -----------------------------------------------------------------------------------------------


def of_header(path: str | Path, header: nib.Nifti1Header, shape: tuple[int, int, int]) -> Geometry:
    """What ITK's reader makes of a header as it is stored. Raises InputError.

    The voxel size is always pixdim's. Directions and origin are those of the sform, its columns divided by their
    lengths, if they are orthonormal and there is no qform, or the sform's code is 1, or both are the same; else the
    qform's. Without either the axes of the array run to the left, to posterior and to superior from the origin.
    """
    unit, pixdim = unit_mm(header), np.array(header["pixdim"][1:4], float)
    if not all(0 < size < math.inf for size in pixdim):
        raise InputError(f"{path}: the voxel size is {tuple((pixdim * unit).tolist())} mm; mend the header")
    sform, qform = _sform(header), _qform(header)
    if sform and qform and int(header["sform_code"]) != 1:
        other = np.column_stack([qform[0] * pixdim, qform[1]])
        sform = sform if np.allclose(sform_matrix(header), other, rtol=0, atol=1e-4) else None
    without = (np.diag([-1.0, -1.0, 1.0]), np.zeros(3)) if int(header["sform_code"]) <= 0 else None
    chosen = sform or qform or without
    if chosen is None or not all(np.isfinite(part).all() for part in chosen):
        raise InputError(f"{path}: its affine is not finite, or its axes are not at right angles; mend the header")
    return Geometry(shape, tuple((pixdim * unit).tolist()), chosen[0], chosen[1] * unit)


def unit_mm(header: nib.Nifti1Header) -> float:
    """Millimetres of the unit in which a header gives lengths."""
    return UNITS_MM.get(int(header["xyzt_units"]) & 7, 1.0)


def sform_matrix(header: nib.Nifti1Header) -> np.ndarray:
    return np.array([header[row] for row in ("srow_x", "srow_y", "srow_z")], float)


def _sform(header: nib.Nifti1Header) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions (3, 3) and origin (3,) of the sform; None if it has no code, or its axes are not at right angles."""
    matrix = sform_matrix(header)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        directions = matrix[:, :3] / np.linalg.norm(matrix[:, :3], axis=0)
        orthonormal = np.allclose(directions @ directions.T, np.eye(3), rtol=0, atol=1e-4)
    return (directions, matrix[:, 3]) if orthonormal and int(header["sform_code"]) > 0 else None


def _qform(header: nib.Nifti1Header) -> tuple[np.ndarray, np.ndarray] | None:
    """Directions (3, 3) and origin (3,) of the qform, the NIfTI standard's "method 2"; None if it has no code."""
    b, c, d = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    rest = 1 - (b * b + c * c + d * d)
    a = math.sqrt(rest) if rest >= 1e-7 else 0.0  # less is a half turn, but for rounding
    directions = nib.quaternions.quat2mat([a, b, c, d])
    if float(header["pixdim"][0]) < 0:
        directions[:, 2] *= -1
    origin = np.array([header[f"qoffset_{letter}"] for letter in "xyz"], float)
    return (directions, origin) if int(header["qform_code"]) > 0 else None


def in_words(spacing_mm: Iterable[float]) -> str:
    return " x ".join(f"{mm:.6g}" for mm in spacing_mm)


# --- order and directions of the axes ---------------------------------------------------------------------------------


def aligned(volume: Volume, to: Volume, by_index: bool = False) -> Volume:
    """The volume with its axes in the order and directions of those of `to`, if both lie at one place in the world.
    by_index: whatever their headers say of that, voxels of one index belong together, where the shapes are the same.

    Raises InputError, with the names of both files, if they do not.
    """
    if by_index and volume.geometry.shape == to.geometry.shape:
        return replace(volume, geometry=to.geometry)
    relative = np.linalg.inv(to.geometry.directions) @ volume.geometry.directions
    turned = _reoriented(volume, io_orientation(from_matvec(relative)))
    here, there = turned.geometry, to.geometry
    if volume.geometry.shape != there.shape and here.shape != there.shape:
        raise InputError(
            f"{volume.path}: its shape {volume.geometry.shape} is not {there.shape}, that of {to.path}; replace the "
            "one that is wrong"
        )
    distance = apart_mm(here, there)
    if here.shape != there.shape or distance > GRID_TOLERANCE * min(there.spacing_mm):
        axes = [codes(one.geometry) for one in (volume, to)]
        raise InputError(
            f"{volume.path}: lies elsewhere in the world than {to.path} (by up to {distance:.3g} mm; voxels of "
            f"{in_words(here.spacing_mm)} and {in_words(there.spacing_mm)} mm, axes {axes[0]} and {axes[1]}); mend "
            "the header that is wrong"
        )
    return replace(turned, geometry=there)


def apart_mm(here: Geometry, there: Geometry) -> float:
    """How far two grids of one shape lie apart in the world: the largest distance of two corners."""
    corners = np.stack(np.meshgrid(*[(-0.5, size - 0.5) for size in there.shape])).reshape(3, -1)
    moved = (here.affine - there.affine)[:3]
    return float(np.linalg.norm(moved[:, :3] @ corners + moved[:, 3:], axis=0).max())


def oriented(volume: Volume, codes: str) -> Volume:
    """The volume with its axes permuted and flipped so that they come nearest to `codes`, such as "RAS", "LPS", "IPL".

    Every voxel stays at its place in the world. The array is in Fortran's order, as files are stored.
    """
    return _reoriented(volume, _orientation(volume.geometry, codes))


def in_stored_order(array: np.ndarray, geometry: Geometry, codes: str) -> np.ndarray:
    """An array (X', Y', Z', ...) with the axes of `oriented` back in the order and directions of `geometry`."""
    start = io_orientation(from_matvec(geometry.directions))
    return np.asfortranarray(apply_orientation(array, ornt_transform(axcodes2ornt(codes), start)))


def in_order(geometry: Geometry, codes: str) -> Geometry:
    """The geometry of what `oriented` makes of a volume."""
    return _turned(geometry, _orientation(geometry, codes))


def axes_of(geometry: Geometry, codes: str) -> list[int]:
    """Which stored axis each axis of `oriented` is."""
    return np.argsort(_orientation(geometry, codes)[:, 0]).tolist()


def _orientation(geometry: Geometry, codes: str) -> np.ndarray:
    """nibabel's table (3, 2) that takes the axes of `geometry` to `codes`."""
    return ornt_transform(io_orientation(from_matvec(geometry.directions)), axcodes2ornt(codes))


def _reoriented(volume: Volume, orientation: np.ndarray) -> Volume:
    """The volume after the permutation and flips of nibabel's table (3, 2)."""
    geometry = _turned(volume.geometry, orientation)
    if geometry is volume.geometry:
        return volume
    array = apply_orientation(volume.array, orientation).copy(order="F")  # torch takes no strides below 0
    return replace(volume, array=array, geometry=geometry)


def _turned(geometry: Geometry, orientation: np.ndarray) -> Geometry:
    """As `_reoriented`; the very same object where nothing turns."""
    shape, spacing_mm, directions, origin_mm = geometry
    axes, flips = orientation[:, 0].astype(int), orientation[:, 1]
    if (axes == np.arange(3)).all() and (flips == 1).all():
        return geometry
    to_last_voxel = (np.array(shape) - 1) * spacing_mm * (flips < 0)
    order = np.argsort(axes)
    return Geometry(
        tuple(shape[axis] for axis in order),
        tuple(spacing_mm[axis] for axis in order),
        (directions * flips)[:, order],
        origin_mm + directions @ to_last_voxel,
    )

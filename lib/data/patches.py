"""Slices (2D) and patches (3D) of volumes. A patch size has two or three numbers, and that decides which is meant."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.data.preprocessing import margins

Start = tuple[int, int, int]


def fit(volume: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """(..., X, Y, Z) whose slices have the patch's size (2D: cropped or padded centrally), or which is not smaller
    than the patch on any axis (3D: padded centrally), with zeros."""
    return _to_size(volume, (*patch_size, None)) if len(patch_size) == 2 else padded(volume, patch_size)


def field_of_view(volume: Tensor, field: tuple[int, ...], patch_size: tuple[int, ...]) -> Tensor:
    """(..., X, Y, Z) for training: as `fit`, but slices (2D) larger than the patch keep their central `field`."""
    if len(patch_size) == 2:
        size = volume.shape[-3:-1]
        volume = _to_size(volume, (*map(min, size, field), None))
    return padded(volume, patch_size)


def padded(volume: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """(..., X, Y, Z) which is not smaller than the patch on any axis: padded centrally, with zeros."""
    return _to_size(volume, (*patch_size, None)[:3], crop=False)


def _to_size(volume: Tensor, shape: tuple[int | None, ...], crop: bool = True) -> Tensor:
    """`lib.data.preprocessing.crop_or_pad` for a tensor."""
    return repadded(volume, [n for both in margins(volume.shape[-3:], shape, crop) for n in both])


def repadded(volume: Tensor, padding: Sequence[int]) -> Tensor:
    """(..., X, Y, Z) with so many zeros before and after each axis (x0, x1, y0, y1, z0, z1); below 0 it is cropped."""
    x0, x1, y0, y1, z0, z1 = padding
    return F.pad(volume, (z0, z1, y0, y1, x0, x1))  # F.pad begins with the last axis


def centred_or_random_starts(shape: tuple[int, ...], patch_size: tuple[int, ...], n: int) -> list[Start]:
    """As `random_starts` for a slice (2D), with the patch in its centre in half of the cases."""
    starts = random_starts(shape, patch_size, n)
    centre = [(size - patch + 1) // 2 for size, patch in zip(shape, patch_size, strict=False)]
    return [(*centre, start[2]) if torch.rand(()) < 0.5 else start for start in starts]


def random_starts(shape: tuple[int, ...], patch_size: tuple[int, ...], n: int) -> list[Start]:
    """n first voxels, each uniform among all where the patch lies in the volume; from torch's global generator."""
    last = [size - patch for size, patch in zip(shape, _whole(patch_size), strict=True)]
    return [tuple(int(torch.randint(most + 1, ())) for most in last) for _ in range(n)]


def chosen_starts(
    label: np.ndarray, patch_size: tuple[int, ...], n_classes: int, ignore: bool, foreground: Sequence[bool]
) -> list[Start]:
    """First voxels of random patches of a label map (X, Y, Z), one for each of `foreground`; from torch's generator.

    Where that is True the patch lies around a voxel of a class other than 0, first the class and then the voxel drawn
    uniformly among what is there. All other patches lie anywhere; with an `ignore` label (n_classes) they lie around
    any voxel that does not have it. Where no such voxel is there, a patch lies anywhere.
    """
    counts = np.stack([np.bincount(plane.ravel(), minlength=n_classes + 1) for plane in label])
    present = np.flatnonzero(counts[:, 1:n_classes].any(0)) + 1
    starts = []
    for shows in foreground:
        classes = range(n_classes) if ignore else range(0)
        if shows and len(present):
            class_ = int(present[torch.randint(len(present), ())])
            classes = range(class_, class_ + 1)
        if counts[:, classes].any():
            voxel = _random_voxel(label, counts[:, classes].sum(1), classes)
            starts.append(_start_around(voxel, label.shape, patch_size))
        else:
            starts += random_starts(label.shape, patch_size, 1)
    return starts


def _random_voxel(label: np.ndarray, counts: np.ndarray, classes: range) -> Start:
    """One of the voxels that have these labels, each equally likely; `counts` of them are in each plane (Y, Z)."""
    ends = counts.cumsum()
    number = int(torch.randint(int(ends[-1]), ()))
    x = int(np.searchsorted(ends, number, side="right"))
    inside = np.flatnonzero((label[x] >= classes.start) & (label[x] < classes.stop))
    y, z = np.unravel_index(inside[number - (ends[x] - counts[x])], label[x].shape)
    return x, int(y), int(z)


def _start_around(voxel: Start, shape: tuple[int, ...], patch_size: tuple[int, ...]) -> Start:
    """The patch has the voxel in its middle, or as near to it as it can while it lies in the volume."""
    sizes = zip(voxel, shape, _whole(patch_size), strict=True)
    return tuple(min(max(0, at - patch // 2), size - patch) for at, size, patch in sizes)


def grid_starts(shape: tuple[int, ...], patch_size: tuple[int, ...]) -> list[Start]:
    """First voxels of the fewest evenly spread patches that cover the volume; in 2D they cover every slice."""
    axes = []
    for size, patch in zip(shape, _whole(patch_size), strict=True):
        axes.append(np.linspace(0, size - patch, -(-size // patch)).round().astype(int).tolist())
    return list(itertools.product(*axes))


def cut(volume: Tensor, patch_size: tuple[int, ...], starts: list[Start]) -> Tensor:
    """(..., X, Y, Z), fitted -> (N, ..., *patch_size)."""
    px, py, pz = _whole(patch_size)
    patches = torch.stack([volume[..., x : x + px, y : y + py, z : z + pz] for x, y, z in starts])
    return patches[..., 0] if len(patch_size) == 2 else patches


def _whole(patch_size: tuple[int, ...]) -> Start:
    return (*patch_size, 1)[:3]

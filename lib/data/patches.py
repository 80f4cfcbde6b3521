"""Slices (2D) and patches (3D) of volumes. A patch size has two or three numbers, and that decides which is meant."""

import itertools

import numpy as np
import torch
from torch import Tensor

from lib.data.preprocessing import crop_or_pad

Start = tuple[int, int, int]


def fit(volume: Tensor, patch_size: tuple[int, ...]) -> Tensor:
    """(..., X, Y, Z) whose slices have the patch's size (2D: cropped or padded centrally), or which is not smaller
    than the patch on any axis (3D: padded centrally), with zeros."""
    if len(patch_size) == 2:
        return crop_or_pad(volume, (*patch_size, None))
    return crop_or_pad(volume, patch_size, crop=False)


def field_of_view(volume: Tensor, field: tuple[int, ...], patch_size: tuple[int, ...]) -> Tensor:
    """(..., X, Y, Z) for training: as `fit`, but slices (2D) larger than the patch keep their central `field`."""
    if len(patch_size) == 2:
        size = volume.shape[-3:-1]
        volume = crop_or_pad(volume, (*map(min, size, field), None))
    return crop_or_pad(volume, (*patch_size, None)[:3], crop=False)


def centred_or_random_starts(shape: tuple[int, ...], patch_size: tuple[int, ...], n: int) -> list[Start]:
    """As `random_starts` for a slice (2D), with the patch in its centre in half of the cases."""
    starts = random_starts(shape, patch_size, n)
    centre = [(size - patch + 1) // 2 for size, patch in zip(shape, patch_size, strict=False)]
    return [(*centre, start[2]) if torch.rand(()) < 0.5 else start for start in starts]


def random_starts(shape: tuple[int, ...], patch_size: tuple[int, ...], n: int) -> list[Start]:
    """n first voxels, each uniform among all where the patch lies in the volume; from torch's global generator."""
    last = [size - patch for size, patch in zip(shape, _whole(patch_size), strict=True)]
    return [tuple(int(torch.randint(most + 1, ())) for most in last) for _ in range(n)]


def grid_starts(shape: tuple[int, ...], patch_size: tuple[int, ...]) -> list[Start]:
    """First voxels of the fewest evenly spread patches that cover the volume; in 2D every slice."""
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

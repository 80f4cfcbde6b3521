"""Sliding windows, mirroring, and the way back to the original grid (paper section 4.2, "prediction")."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from lib.data import nifti
from lib.data.geometry import in_stored_order
from lib.data.preprocessing import (
    Grid,
    Preprocessing,
    crop_or_pad,
    preprocess,
    read_channels,
    to_original_grid,
)
from lib.record import as_source
from lib.system.files import file_digest, write_atomically
from lib.system.process import check_stopped


class Prediction(NamedTuple):
    labels: np.ndarray  # (X, Y, Z) of `nifti.label_type`, in the order of the file
    probabilities: np.ndarray | None  # (X, Y, Z, n_classes) float32, likewise
    header: nib.Nifti1Header  # of the image
    source: dict  # what says which file the image was: as `lib.record.source_identity`


def axis_windows(size: int, patch: int) -> list[tuple[slice, Tensor]]:
    """The windows of one axis of `size` >= `patch` voxels, at least half overlapping: voxels and weights (patch,).

    The weights are Gaussian (sigma = patch / 8) and divided so that they sum to 1 at every voxel; their products over
    the axes then do so too, and a single window needs no weights: it gets ones.
    """
    steps = math.ceil((size - patch) / max(patch // 2, 1))
    starts = [round(i * (size - patch) / steps) for i in range(steps + 1)] if steps else [0]
    sides = [slice(start, start + patch) for start in starts]
    offset = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    gaussian = torch.exp(-0.5 * (offset / (patch / 8)) ** 2)
    total = torch.zeros(size, dtype=torch.float64)
    for side in sides:
        total[side] += gaussian
    return [(side, (gaussian / total[side]).float()) for side in sides]


def default_batch_size(dim: str, device: torch.device) -> int:
    """How many patches to compute at once: on the CPU more than two gain nothing and need memory."""
    return 2 if dim == "3D" or device.type == "cpu" else 8


@torch.inference_mode()
def predict_volume(
    model: nn.Module,
    volume: Tensor,
    patch_size: tuple[int, ...],
    tta: bool = True,
    batch_size: int = 8,
    amp: bool = False,
) -> Tensor:
    """Probabilities (n_classes, X, Y, Z), float32 on the CPU, of a preprocessed volume (modalities, X, Y, Z).

    A patch of two sizes takes the slices along the last axis one by one, a patch of three the volume. Windows of the
    patch overlap by half under Gaussian weights; axes smaller than it are padded centrally with zeros. `tta` averages
    over all mirrorings of the spatial axes (4 in 2D, 8 in 3D). `batch_size` patches, over slices, windows and
    mirrorings, go through the model at once, on the device that it is on; with `amp` in bfloat16 where that is safe.
    """
    flat = len(patch_size) == 2
    items = volume.movedim(3, 0) if flat else volume[None]  # (N, modalities, *spatial)
    size = items.shape[2:]
    items = crop_or_pad(items, patch_size, crop=False)
    result = torch.zeros(len(items), model.n_classes, *items.shape[2:])

    n_axes = len(patch_size) if tta else 0
    mirrorings = [m for n in range(n_axes + 1) for m in itertools.combinations(range(2, items.ndim), n)]
    sides = [axis_windows(n, patch) for n, patch in zip(items.shape[2:], patch_size, strict=True)]
    windows = list(itertools.product(range(len(items)), *sides))
    per_batch = max(1, batch_size // len(mirrorings))
    for i in range(0, len(windows), per_batch):
        check_stopped()
        batch = windows[i : i + per_batch]
        boxes = [(n, slice(None), *(side for side, _ in window)) for n, *window in batch]
        patches = torch.stack([items[box] for box in boxes])
        outputs = predict_patches(model, patches, mirrorings, batch_size, amp).cpu()
        for box, output, (_, *window) in zip(boxes, outputs, batch, strict=True):
            result[box] += output * reduce(lambda a, b: a[..., None] * b, [weights for _, weights in window])

    result = crop_or_pad(result, size)
    return result.movedim(0, 3) if flat else result[0]


def predict_patches(
    model: nn.Module, patches: Tensor, mirrorings: list[tuple[int, ...]], batch_size: int, amp: bool = False
) -> Tensor:
    """Mean over the mirrorings (each the axes that it flips) of the model's output for patches (B, C, *patch)."""
    patches = patches.to(next(model.parameters(), patches).device)
    mirrored = torch.cat([patches.flip(axes) for axes in mirrorings])
    with torch.autocast(patches.device.type, torch.bfloat16, enabled=amp):
        outputs = torch.cat([model(part)[0].float() for part in mirrored.split(batch_size)])
    outputs = outputs.unflatten(0, (len(mirrorings), -1))  # (mirrorings, B, n_classes, *patch)
    return sum(output.flip(axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)


def trial_prediction(model: nn.Module, batch_size: int, patch_size: tuple[int, ...]) -> Callable[[bool], object]:
    """What takes the time of a prediction: the model on one batch of empty patches, as a function of `amp`."""
    patches = torch.zeros(batch_size, model.modalities, *patch_size)
    return torch.inference_mode()(lambda amp: predict_patches(model, patches, [()], batch_size, amp))


def predict_file(
    model: nn.Module,
    path: str | Path | Sequence[Path],
    preprocessing: Preprocessing,
    patch_size: tuple[int, ...],
    tta: bool = True,
    batch_size: int = 8,
    probabilities: bool = False,
    amp: bool = False,
) -> Prediction:
    """Labels and, if asked for, probabilities of a NIfTI file (or one for each channel), on its very grid, and what
    `save` needs.

    Labels need one byte per voxel of the original and some for the image itself; probabilities four for each class.
    Raises InputError if the file cannot be used.
    """
    image, original = read_channels(path, preprocessing)
    grid = Grid(image.spatial_shape, image.affine)
    volume, affine, padding = preprocess(image, preprocessing)
    del image  # the largest array of all
    predicted = predict_volume(model, volume, patch_size, tta, batch_size, amp)
    labels = np.empty(grid.shape, nifti.label_type(len(predicted)), order="F")  # NIfTI's order
    kept = np.empty((*grid.shape, len(predicted)), np.float32, order="F") if probabilities else None
    for slab, part in to_original_grid(predicted, affine, padding, grid):
        labels[slab] = part.numpy().argmax(0)  # several times faster than torch's
        if kept is not None:
            kept[slab] = part.movedim(0, -1)
    source = as_source(original.path, original.n_bytes, original.sha256)
    stored = partial(in_stored_order, geometry=original.geometry, codes=preprocessing.orientation)
    return Prediction(stored(labels), None if kept is None else stored(kept), original.header, source)


def save(
    array: np.ndarray, header: nib.Nifti1Header, path: Path, announce: Callable[[str], None] | None = None
) -> None:
    """Write labels or probabilities as .nii.gz, whole or not at all; the same array gives the same bytes. `announce` is
    told the SHA-256 of the file before it takes its place."""

    def write(temporary: Path) -> None:
        nifti.write(temporary, array, header)
        if announce:
            announce(file_digest(temporary))

    write_atomically(path, write)

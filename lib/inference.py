"""Sliding windows, mirroring, and the way back to the original grid (paper section 4.2, "prediction")."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from lib import published
from lib.data import images
from lib.data.geometry import Header, in_stored_order
from lib.data.preprocessing import (
    Grid,
    Preprocessing,
    crop_or_pad,
    preprocess,
    read_channels,
    to_original_grid,
)
from lib.models import load_model
from lib.record import as_source
from lib.settings import Settings
from lib.system.device import device_of, find_device
from lib.system.error import InputError
from lib.system.files import file_digest, is_listed, write_atomically
from lib.system.process import check_stopped


class Prediction(NamedTuple):
    labels: np.ndarray  # (X, Y, Z) of `images.label_type`, in the order of the file
    probabilities: np.ndarray | None  # (X, Y, Z, n_classes) float32, likewise
    header: Header  # of the image
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


@dataclass(frozen=True)
class Predictor:
    """A network and how it is applied: `Predictor.load("RUN/models/model-E").file("image.nii.gz").labels`.

    model: in eval mode, on its device. patch_size: of a window; two numbers take the slices along the last axis one by
    one, three the volume. mirror: average over all mirrorings of the spatial axes (4 in 2D, 8 in 3D). batch_size:
    patches computed at once, over slices, windows and mirrorings; None: 8 in 2D, and 2 in 3D or on the CPU, where more
    gain nothing and need memory. amp: compute in bfloat16 where that is safe. preprocessing: of a file; `volume` needs
    none.
    """

    model: nn.Module
    patch_size: tuple[int, ...]
    mirror: bool = True
    batch_size: int | None = None
    amp: bool = False
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        if self.batch_size is None:
            small = len(self.patch_size) == 3 or device_of(self.model).type == "cpu"
            object.__setattr__(self, "batch_size", 2 if small else 8)

    @classmethod
    def load(cls, model_state: str | Path, device: str = "auto", **how: Any) -> Self:
        """The predictor of a model in its run folder, with the patch and the preprocessing of its training; `how` are
        other fields. Raises InputError if there is no such model, or its run is not known."""
        settings = settings_of_model(Path(model_state))
        if settings is None:
            raise InputError(f"{model_state}: its run is not known; name RUN/models/model-E, or make a Predictor(...)")
        usual = {"patch_size": settings.patch_size, "preprocessing": settings.dataset.preprocessing}
        return cls(load_model(model_state, find_device(device)), **usual | how)

    @torch.inference_mode()
    def volume(self, volume: Tensor) -> Tensor:
        """Probabilities (n_classes, X, Y, Z), float32 on the CPU, of a preprocessed volume (modalities, X, Y, Z).

        Windows of the patch overlap by half under Gaussian weights; axes smaller than it are padded centrally with
        zeros.
        """
        flat = len(self.patch_size) == 2
        items = volume.movedim(3, 0) if flat else volume[None]  # (N, modalities, *spatial)
        size = items.shape[2:]
        items = crop_or_pad(items, self.patch_size, crop=False)
        result = torch.zeros(len(items), self.model.n_classes, *items.shape[2:])

        n_axes = len(self.patch_size) if self.mirror else 0
        mirrorings = [m for n in range(n_axes + 1) for m in itertools.combinations(range(2, items.ndim), n)]
        sides = [axis_windows(n, patch) for n, patch in zip(items.shape[2:], self.patch_size, strict=True)]
        windows = list(itertools.product(range(len(items)), *sides))
        per_batch = max(1, self.batch_size // len(mirrorings))
        for i in range(0, len(windows), per_batch):
            check_stopped()
            batch = windows[i : i + per_batch]
            boxes = [(n, slice(None), *(side for side, _ in window)) for n, *window in batch]
            outputs = self._patches(torch.stack([items[box] for box in boxes]), mirrorings, self.amp).cpu()
            for box, output, (_, *window) in zip(boxes, outputs, batch, strict=True):
                result[box] += output * reduce(lambda a, b: a[..., None] * b, [weights for _, weights in window])

        result = crop_or_pad(result, size)
        return result.movedim(0, 3) if flat else result[0]

    def _patches(self, patches: Tensor, mirrorings: list[tuple[int, ...]], amp: bool) -> Tensor:
        """Mean over the mirrorings (each the axes that it flips) of the model's output for patches (B, C, *patch)."""
        patches = patches.to(device_of(self.model))
        mirrored = torch.cat([patches.flip(axes) for axes in mirrorings])
        with torch.autocast(patches.device.type, torch.bfloat16, enabled=amp):
            outputs = torch.cat([self.model(part)[0].float() for part in mirrored.split(self.batch_size)])
        outputs = outputs.unflatten(0, (len(mirrorings), -1))  # (mirrorings, B, n_classes, *patch)
        return sum(output.flip(axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)

    def trial(self) -> Callable[[bool], object]:
        """What takes the time of a prediction: the model on one batch of empty patches, as a function of `amp`."""
        patches = torch.zeros(self.batch_size, self.model.modalities, *self.patch_size)
        return torch.inference_mode()(partial(self._patches, patches, [()]))

    def file(self, path: str | Path | Sequence[Path], probabilities: bool = False) -> Prediction:
        """Labels and, if asked for, probabilities of a NIfTI file (or one for each channel), on its very grid, and what
        `save` needs.

        Labels need one byte per voxel of the original and some for the image itself; probabilities four for each class.
        Raises InputError if the file cannot be used.
        """
        if self.preprocessing is None:
            raise ValueError("a predictor of files needs their preprocessing")
        image, original = read_channels(path, self.preprocessing)
        grid = Grid(image.spatial_shape, image.affine)
        there = preprocess(image, self.preprocessing)
        del image  # the largest array of all
        predicted = self.volume(there.tensor)
        labels = np.empty(grid.shape, images.label_type(len(predicted)), order="F")  # NIfTI's order
        kept = np.empty((*grid.shape, len(predicted)), np.float32, order="F") if probabilities else None
        for slab, part in to_original_grid([(slice(0, predicted.shape[1]), predicted)], 0, there, grid):
            labels[slab] = part.numpy().argmax(0)  # several times faster than torch's
            if kept is not None:
                kept[slab] = part.movedim(0, -1)
        source = as_source(original.path, original.n_bytes, original.sha256)
        stored = partial(in_stored_order, geometry=original.geometry, codes=self.preprocessing.orientation)
        return Prediction(stored(labels), None if kept is None else stored(kept), original.header, source)


def settings_of_model(path: Path) -> Settings | None:
    """The settings of the run that a model RUN/models/model-E belongs to; None where none of ours is known."""
    path = path.resolve()
    run = path.parent.parent
    if path.parent.name != "models" or not (run / "config.json").exists() or not is_listed(path):
        return None
    return Settings.read(run)[0] if published.read_config(run) is None else None


def save(array: np.ndarray, header: Header, path: Path, announce: Callable[[str], None] | None = None) -> None:
    """Write labels or probabilities as the ending of `path` says, whole or not at all; the same array gives the same
    bytes. `announce` is told the SHA-256 of the file before it takes its place."""

    def write(temporary: Path) -> None:
        images.write(temporary, array, header)
        if announce:
            announce(file_digest(temporary))

    write_atomically(path, write)

"""Sliding windows, mirroring, and the way back to the original grid (paper section 4.2, "prediction")."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
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


def axis_windows(size: int, patch: int, step: float = 0.5) -> list[tuple[slice, Tensor]]:
    """The windows of one axis of `size` >= `patch` voxels: voxels and weights (patch,). The next window begins after at
    most `step` of the patch (of an odd one: of the even number below it).

    The weights are Gaussian (sigma = patch / 8) and divided so that they sum to 1 at every voxel; their products over
    the axes then do so too, and a single window needs no weights: it gets ones.
    """
    steps = math.ceil((size - patch) / max(step * (patch - patch % 2), 1))
    starts = [round(i * (size - patch) / steps) for i in range(steps + 1)] if steps else [0]
    sides = [slice(start, start + patch) for start in starts]
    offset = torch.arange(patch, dtype=torch.float64) - (patch - 1) / 2
    gaussian = torch.exp(-0.5 * (offset / (patch / 8)) ** 2)
    total = torch.zeros(size, dtype=torch.float64)
    for side in sides:
        total[side] += gaussian
    return [(side, (gaussian / total[side]).float()) for side in sides]


def slab_axis(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """The axis along which a volume is predicted slab by slab: the last one in 2D, slice by slice. In 3D the first one,
    in whose order the sums are as ever, unless slabs along another one need less than half the memory."""
    if len(patch_size) == 2:
        return 2
    shares = [min(1.0, patch / n) for n, patch in zip(size, patch_size, strict=True)]
    smallest = shares.index(min(shares))
    return smallest if 2 * shares[smallest] < shares[0] else 0


def mean_of_models(probabilities: Sequence[Tensor]) -> Tensor:
    """What several models (each (K, ...)) say together: the softmax of the mean of their logits, up to a constant their
    log-probabilities. One model says what it says."""
    if len(probabilities) == 1:
        return probabilities[0]
    tiny = torch.finfo(torch.float32).tiny
    return (sum(one.clamp_min(tiny).log_() for one in probabilities) / len(probabilities)).softmax(0)


@dataclass(frozen=True)
class Predictor:
    """A network and how it is applied: `Predictor.load("RUN/models/model-E").file("image.nii.gz").labels`.

    models: one or several, in eval mode, on one device; several say together what `mean_of_models` says. patch_size: of
    a window; two numbers take the slices along the last axis one by one, three the volume. mirror: average over all
    mirrorings of the spatial axes (4 in 2D, 8 in 3D). batch_size: patches computed at once, over slices, windows and
    mirrorings; None: 8 in 2D, and 2 in 3D or on the CPU, where more gain nothing and need memory. amp: compute in
    bfloat16 where that is safe. preprocessing: of a file; `volume` and `slabs` need none. step_size: see
    `axis_windows`. postprocess: what is done to the labels of a file, on its own grid.
    """

    models: nn.Module | tuple[nn.Module, ...]
    patch_size: tuple[int, ...]
    mirror: bool = True
    batch_size: int | None = None
    amp: bool = False
    preprocessing: Preprocessing | None = None
    step_size: float = 0.5
    postprocess: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.models, nn.Module):
            object.__setattr__(self, "models", (self.models,))
        if self.batch_size is None:
            small = len(self.patch_size) == 3 or device_of(self.models[0]).type == "cpu"
            object.__setattr__(self, "batch_size", 2 if small else 8)

    @classmethod
    def load(cls, model_state: str | Path | Sequence[str | Path], device: str = "auto", **how: Any) -> Self:
        """The predictor of one model, or several, each in its run folder, with the patch and the preprocessing of their
        training; `how` are other fields.

        Raises InputError if there is no such model, its run is not known, or the runs do not agree in these.
        """
        paths = [Path(path) for path in ([model_state] if isinstance(model_state, str | Path) else model_state)]
        settings = agreed_settings(paths)
        for path, known in settings.items():
            if known is None:
                raise InputError(f"{path}: its run is not known; name RUN/models/model-E, or make a Predictor(...)")
        first = settings[paths[0]]
        usual = {"patch_size": first.patch_size, "preprocessing": first.dataset.preprocessing}
        return cls(tuple(load_model(path, find_device(device)) for path in paths), **usual | how)

    def volume(self, volume: Tensor, advance: Callable[[float], object] = lambda share: None) -> Tensor:
        """Probabilities (n_classes, X, Y, Z), float32 on the CPU, of a preprocessed volume (modalities, X, Y, Z): all
        `slabs` in one."""
        axis = slab_axis(volume.shape[1:], self.patch_size)
        result = torch.empty(self.models[0].n_classes, *volume.shape[1:])
        for slab, part in self.slabs(volume, advance):
            result.narrow(axis + 1, slab.start, slab.stop - slab.start).copy_(part)
        return result

    @torch.inference_mode()
    def slabs(
        self, volume: Tensor, advance: Callable[[float], object] = lambda share: None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The probabilities of a preprocessed volume (modalities, X, Y, Z) slab by slab along its `slab_axis`, without
        gaps: the slab's voxels there, and (n_classes, ...) float32 on the CPU. No more than a patch's width of them is
        in memory at once. `advance` is told of each batch which share of the volume it is.

        Windows of the patch overlap (by half, for a `step_size` of 0.5) under Gaussian weights; axes smaller than it
        are padded centrally with zeros.
        """
        size = volume.shape[1:]
        axis = slab_axis(size, self.patch_size)
        padded = crop_or_pad(volume, (*self.patch_size, 1)[:3], crop=False)
        streams = [self._slabs(model, padded, axis, advance) for model in self.models]
        for parts in zip(*streams, strict=True):
            begin, part = parts[0][0], mean_of_models([part for _, part in parts])
            end = min(begin + part.shape[axis + 1], size[axis])
            yield slice(begin, end), crop_or_pad(part, (*size[:axis], end - begin, *size[axis + 1 :]))

    def _slabs(
        self, model: nn.Module, volume: Tensor, axis: int, advance: Callable[[float], object]
    ) -> Iterator[tuple[int, Tensor]]:
        """As `slabs`, of one model and a volume no smaller than a patch: where each slab begins, and its values."""
        patch = (*self.patch_size, 1)[:3]
        sides = [axis_windows(n, p, self.step_size) for n, p in zip(volume.shape[1:], patch, strict=True)]
        windows = sorted(itertools.product(*sides), key=lambda window: window[axis][0].start)
        n_axes = len(self.patch_size) if self.mirror else 0
        mirrorings = [m for n in range(n_axes + 1) for m in itertools.combinations(range(2, 2 + n_axes), n)]
        per_batch = max(1, self.batch_size // len(mirrorings))
        extent = [*volume.shape[1:]]
        extent[axis] = patch[axis]
        begin, sums = 0, torch.zeros(model.n_classes, *extent)  # of the windows at `begin` and those before
        for i in range(0, len(windows), per_batch):
            check_stopped()
            batch = windows[i : i + per_batch]
            patches = torch.stack([volume[(slice(None), *(side for side, _ in window))] for window in batch])
            patches = patches.reshape(*patches.shape[:2], *self.patch_size).contiguous()
            outputs = self._patches(model, patches, mirrorings, self.amp).cpu()
            for output, window in zip(outputs, batch, strict=True):
                if done := window[axis][0].start - begin:  # no later window reaches what lies before
                    yield begin, sums.narrow(axis + 1, 0, done)
                    left = sums.narrow(axis + 1, done, patch[axis] - done)
                    begin += done
                    sums = torch.cat([left, torch.zeros_like(sums.narrow(axis + 1, 0, done))], axis + 1)
                box = [side for side, _ in window]
                box[axis] = slice(None)
                weights = reduce(lambda a, b: a[..., None] * b, [weights for _, weights in window])
                sums[(slice(None), *box)] += output.reshape(-1, *patch) * weights
            advance(len(batch) / len(windows) / len(self.models))
        yield begin, sums

    def _patches(self, model: nn.Module, patches: Tensor, mirrorings: list[tuple[int, ...]], amp: bool) -> Tensor:
        """Mean over the mirrorings (each the axes that it flips) of the model's output for patches (B, C, *patch)."""
        patches = patches.to(device_of(model))
        mirrored = torch.cat([patches.flip(axes) for axes in mirrorings])
        with torch.autocast(patches.device.type, torch.bfloat16, enabled=amp):
            outputs = torch.cat([model(part)[0].float() for part in mirrored.split(self.batch_size)])
        outputs = outputs.unflatten(0, (len(mirrorings), -1))  # (mirrorings, B, n_classes, *patch)
        return sum(output.flip(axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)

    def trial(self) -> Callable[[bool], object]:
        """What takes the time of a prediction: the model on one batch of empty patches, as a function of `amp`."""
        model = self.models[0]
        patches = torch.zeros(self.batch_size, model.modalities, *self.patch_size)
        return torch.inference_mode()(partial(self._patches, model, patches, [()]))

    def file(
        self,
        path: str | Path | Sequence[Path],
        probabilities: bool = False,
        advance: Callable[[float], object] = lambda share: None,
    ) -> Prediction:
        """Labels and, if asked for, probabilities of an image of one file (or one for each channel), on its very grid,
        and what `save` needs. `advance`: see `slabs`.

        Labels need one byte per voxel of the original and some for the image itself; probabilities four for each class.
        Raises InputError if the file cannot be used.
        """
        if self.preprocessing is None:
            raise ValueError("a predictor of files needs their preprocessing")
        image, original = read_channels(path, self.preprocessing)
        grid = Grid(image.spatial_shape, image.affine)
        there = preprocess(image, self.preprocessing)
        del image  # the largest array of all
        axis, n_classes = slab_axis(there.tensor.shape[1:], self.patch_size), self.models[0].n_classes
        labels = np.empty(grid.shape, images.label_type(n_classes), order="F")  # NIfTI's order
        kept = np.empty((*grid.shape, n_classes), np.float32, order="F") if probabilities else None
        for slab, part in to_original_grid(self.slabs(there.tensor, advance), axis, there, grid):
            place = (slice(None),) * axis + (slab,)
            labels[place] = part.numpy().argmax(0)  # several times faster than torch's
            if kept is not None:
                kept[place] = part.movedim(0, -1)
        source = as_source(original.path, original.n_bytes, original.sha256)
        stored = partial(in_stored_order, geometry=original.geometry, codes=self.preprocessing.orientation)
        labels = stored(labels)
        if self.postprocess:
            labels = self.postprocess(labels)
        return Prediction(labels, None if kept is None else stored(kept), original.header, source)


def agreed_settings(paths: Sequence[Path], but: Sequence[str] = ()) -> dict[Path, Settings | None]:
    """`settings_of_model` of each model. Raises InputError if the runs of two have not the same data set,
    preprocessing and patch, those named in `but` aside."""
    settings = {path: settings_of_model(path) for path in paths}
    known = [(path, one) for path, one in settings.items() if one]
    for path, one in known[1:]:
        first = known[0][1]
        pairs = {
            "data set": (one.dataset.name, first.dataset.name),
            "preprocessing": (one.dataset.preprocessing, first.dataset.preprocessing),
            "patch_size": (one.patch_size, first.patch_size),
        }
        for what, (here, there) in pairs.items():
            if here != there and what not in but:
                raise InputError(
                    f"{path}: its run has another {what} than that of {known[0][0]}; give models that share it"
                )
    return settings


def settings_of_model(path: Path) -> Settings | None:
    """The settings of the run that a model RUN/models/model-E belongs to; None where none of ours is known."""
    path = path.resolve()
    run = path.parent.parent
    if path.parent.name != "models" or not (run / "config.json").exists() or not is_listed(path):
        return None
    return Settings.read(run)[0] if published.read_config(run) is None else None


def save(
    array: np.ndarray,
    header: Header,
    path: Path,
    announce: Callable[[str], None] | None = None,
    values: Collection[int] = (),
) -> None:
    """Write labels or probabilities as `lib.data.images.write`, whole or not at all; the same array gives the same
    bytes. `announce` is told the SHA-256 of the file before it takes its place."""

    def write(temporary: Path) -> None:
        images.write(temporary, array, header, values)
        if announce:
            announce(file_digest(temporary))

    write_atomically(path, write)

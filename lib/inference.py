"""Sliding windows, mirroring, and the way back to the original grid (paper section 4.2, "prediction").

Torch is imported with the models that need it: not for exported ones."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

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
from lib.network import Network
from lib.record import as_source
from lib.system.error import InputError
from lib.system.files import file_digest, write_atomically
from lib.system.process import check_stopped

EXPORTED = ".onnx"  # the ending of an exported model's file; any other file is a model of torch


class Prediction(NamedTuple):
    labels: np.ndarray  # (X, Y, Z) of `images.label_type`, in the order of the file
    probabilities: np.ndarray | None  # (X, Y, Z, n_classes) float32, likewise
    header: Header  # of the image
    source: dict  # what says which file the image was: as `lib.record.source_identity`


def axis_windows(size: int, patch: int, step: float = 0.5) -> list[tuple[slice, np.ndarray]]:
    """The windows of one axis of `size` >= `patch` voxels: voxels and weights (patch,). The next window begins after at
    most `step` of the patch (of an odd one: of the even number below it).

    The weights are Gaussian (sigma = patch / 8) and divided so that they sum to 1 at every voxel; their products over
    the axes then do so too, and a single window needs no weights: it gets ones.
    """
    steps = math.ceil((size - patch) / max(step * (patch - patch % 2), 1))
    starts = [round(i * (size - patch) / steps) for i in range(steps + 1)] if steps else [0]
    sides = [slice(start, start + patch) for start in starts]
    gaussian = np.exp(-0.5 * ((np.arange(patch) - (patch - 1) / 2) / (patch / 8)) ** 2)
    total = np.zeros(size)
    for side in sides:
        total[side] += gaussian
    return [(side, (gaussian / total[side]).astype(np.float32)) for side in sides]


def slab_axis(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """The axis along which a volume is predicted slab by slab: the last one in 2D, slice by slice. In 3D the first one,
    in whose order the sums are as ever, unless slabs along another one need less than half the memory."""
    if len(patch_size) == 2:
        return 2
    shares = [min(1.0, patch / n) for n, patch in zip(size, patch_size, strict=True)]
    smallest = shares.index(min(shares))
    return smallest if 2 * shares[smallest] < shares[0] else 0


def mean_of_models(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """What several models (each (K, ...)) say together: the softmax of the mean of their logits, up to a constant their
    log-probabilities. One model says what it says."""
    if len(probabilities) == 1:
        return probabilities[0]
    tiny = np.finfo(np.float32).tiny
    logits = sum(np.log(np.maximum(one, tiny)) for one in probabilities) / np.float32(len(probabilities))
    np.exp(logits - logits.max(0), out=logits)
    logits /= logits.sum(0)
    return logits


def most_probable(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Put the class of the highest probability (n_classes, ...) into `labels`; of several the first. Class by class,
    which is several times as fast as argmax over the first axis."""
    labels[...], highest = 0, probabilities[0].copy()
    for class_, probability in enumerate(probabilities[1:], start=1):
        np.putmask(labels, probability > highest, class_)
        np.maximum(highest, probability, out=highest)


def as_network(model: Any) -> Network:
    """A model of torch as a network; a network as it is."""
    if isinstance(model, Network):
        return model
    from lib.torch_network import TorchNetwork

    return TorchNetwork(model)


def opened(models: Sequence[str | Path], device: str = "auto", runtime: str = "auto") -> dict[str, Any]:
    """The fields of a `Predictor` that files of models tell: the networks, patch_size, preprocessing, postprocess.

    Raises InputError if there is no such model, it is not known how its images are preprocessed, or the models do not
    agree in these.
    """
    paths = [Path(path) for path in models]
    if all_exported(paths):
        from lib.exported import open_models
    else:
        from lib.runs import open_models
    return open_models(paths, device, runtime)


def all_exported(paths: Sequence[Path]) -> bool:
    """Whether these are exported models, or else none is. Raises InputError for some of both."""
    exported = [path for path in paths if path.suffix.lower() == EXPORTED]
    if exported and len(exported) < len(paths):
        raise InputError(f"{exported[0]}: an exported model cannot be averaged with others; export all of them")
    return bool(exported)


@dataclass(frozen=True)
class Predictor:
    """A network and how it is applied: `Predictor("OUT.onnx").file("image.nii.gz").labels`.

    models: one or several, which say together what `mean_of_models` says: networks, models of torch (in eval mode, on
    one device), or files, RUN/models/model-E or OUT.onnx; these also tell patch_size, preprocessing and postprocess,
    unless they are given. patch_size: of a window; two numbers take the slices along the last axis one by one, three
    the volume. mirror: average over all mirrorings of the spatial axes (4 in 2D, 8 in 3D). batch_size: patches computed
    at once, over slices, windows and mirrorings; None: as many as the network likes. preprocessing: of a file; `volume`
    and `slabs` need none. step_size: see `axis_windows`. postprocess: what is done to the labels of a file, on its own
    grid.

    Raises InputError as `opened`.
    """

    models: Any
    patch_size: tuple[int, ...] | None = None
    mirror: bool = True
    batch_size: int | None = None
    preprocessing: Preprocessing | None = None
    step_size: float = 0.5
    postprocess: Callable[[np.ndarray], np.ndarray] | None = None

    def __post_init__(self) -> None:
        models = tuple(self.models) if isinstance(self.models, list | tuple) else (self.models,)
        fields = {"models": models}
        if all(isinstance(model, str | Path) for model in models):
            fields = opened(models)
            given = {name: getattr(self, name) for name in fields if name != "models"}
            fields |= {name: value for name, value in given.items() if value is not None}
        fields["models"] = tuple(map(as_network, fields["models"]))
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        if self.patch_size is None:
            raise ValueError("a predictor of a network needs its patch_size")
        if self.batch_size is None:
            object.__setattr__(self, "batch_size", self.models[0].usual_batch(self.patch_size))

    @classmethod
    def load(
        cls, models: str | Path | Sequence[str | Path], device: str = "auto", runtime: str = "auto", **how: Any
    ) -> Self:
        """As `Predictor(models, **how)` for files, on a device (see predict.py), and exported ones by a runtime."""
        return cls(**opened([models] if isinstance(models, str | Path) else models, device, runtime) | how)

    def volume(self, volume: np.ndarray, advance: Callable[[float], object] = lambda share: None) -> np.ndarray:
        """Probabilities (n_classes, X, Y, Z) float32 of a preprocessed volume (modalities, X, Y, Z): all
        `slabs` in one."""
        axis = slab_axis(volume.shape[1:], self.patch_size)
        result = np.empty((self.models[0].n_classes, *volume.shape[1:]), np.float32)
        for slab, part in self.slabs(volume, advance):
            result[_across(axis + 1, slab)] = part
        return result

    def slabs(
        self, volume: np.ndarray, advance: Callable[[float], object] = lambda share: None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The probabilities of a preprocessed volume (modalities, X, Y, Z) slab by slab along its `slab_axis`, without
        gaps: the slab's voxels there, and (n_classes, ...) float32. No more than a patch's width of them is
        in memory at once. `advance` is told of each batch which share of the volume it is.

        Windows of the patch overlap (by half, for a `step_size` of 0.5) under Gaussian weights; axes smaller than it
        are padded centrally with zeros.
        """
        volume = np.asarray(volume, np.float32)
        size = volume.shape[1:]
        axis = slab_axis(size, self.patch_size)
        padded = crop_or_pad(volume, (*self.patch_size, 1)[:3], crop=False)
        streams = [self._slabs(model, padded, axis, advance) for model in self.models]
        for parts in zip(*streams, strict=True):
            begin, part = parts[0][0], mean_of_models([part for _, part in parts])
            end = min(begin + part.shape[axis + 1], size[axis])
            yield slice(begin, end), crop_or_pad(part, (*size[:axis], end - begin, *size[axis + 1 :]))

    def _slabs(
        self, network: Network, volume: np.ndarray, axis: int, advance: Callable[[float], object]
    ) -> Iterator[tuple[int, np.ndarray]]:
        """As `slabs`, of one network and a volume no smaller than a patch: where each slab begins, and its values."""
        patch = (*self.patch_size, 1)[:3]
        sides = [axis_windows(n, p, self.step_size) for n, p in zip(volume.shape[1:], patch, strict=True)]
        windows = sorted(itertools.product(*sides), key=lambda window: window[axis][0].start)
        n_axes = len(self.patch_size) if self.mirror else 0
        mirrorings = [m for n in range(n_axes + 1) for m in itertools.combinations(range(2, 2 + n_axes), n)]
        per_batch = max(1, self.batch_size // len(mirrorings))
        extent = [*volume.shape[1:]]
        extent[axis] = patch[axis]
        begin, sums = 0, np.zeros((network.n_classes, *extent), np.float32)  # of the windows at `begin` and before
        for i in range(0, len(windows), per_batch):
            check_stopped()
            batch = windows[i : i + per_batch]
            patches = np.stack([volume[(slice(None), *(side for side, _ in window))] for window in batch])
            patches = patches.reshape(*patches.shape[:2], *self.patch_size)
            outputs = network.mean(patches, mirrorings, self.batch_size)
            for output, window in zip(outputs, batch, strict=True):
                if done := window[axis][0].start - begin:  # no later window reaches what lies before
                    yield begin, sums[_across(axis + 1, slice(done))]
                    begin, left = begin + done, sums[_across(axis + 1, slice(done, None))]
                    sums = np.zeros_like(sums)
                    sums[_across(axis + 1, slice(patch[axis] - done))] = left
                box = [side for side, _ in window]
                box[axis] = slice(None)
                weights = reduce(lambda a, b: a[..., None] * b, [weights for _, weights in window])
                sums[(slice(None), *box)] += output.reshape(-1, *patch) * weights
            advance(len(batch) / len(windows) / len(self.models))
        yield begin, sums

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
        grid = Grid(image.shape, image.affine)
        there = preprocess(image, self.preprocessing)
        del image  # the largest array of all
        axis, n_classes = slab_axis(there.array.shape[1:], self.patch_size), self.models[0].n_classes
        labels = np.empty(grid.shape, images.label_type(n_classes), order="F")  # NIfTI's order
        kept = np.empty((*grid.shape, n_classes), np.float32, order="F") if probabilities else None
        for slab, part in to_original_grid(self.slabs(there.array, advance), axis, there, grid):
            most_probable(part, labels[_across(axis, slab)])
            if kept is not None:
                kept[_across(axis, slab)] = np.moveaxis(part, 0, -1)
        source = as_source(original.path, original.n_bytes, original.sha256)
        stored = partial(in_stored_order, geometry=original.geometry, codes=self.preprocessing.orientation)
        labels = stored(labels)
        if self.postprocess:
            labels = self.postprocess(labels)
        return Prediction(labels, None if kept is None else stored(kept), original.header, source)


def _across(axis: int, part: slice) -> tuple[slice, ...]:
    """The index of a part of this axis, and of all of those before it."""
    return (slice(None),) * axis + (part,)


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

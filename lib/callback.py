"""What happens at the end of an epoch. Every callback takes the training's state; their order is that of the list."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lib import checkpoint
from lib.checkpoint import TrainingState
from lib.data import patches
from lib.data.loading import Loader
from lib.models.size import count_filters, summary
from lib.pruning.surgery import prune
from lib.system import distributed
from lib.system.device import device_of
from lib.system.error import InputError

Callback = Callable[[TrainingState], None]


def _end_epoch_save_best(state: TrainingState) -> None:
    """models/model-best: the model of the lowest validation loss so far, before this epoch's pruning."""
    loss = state.rows[-1]["val_loss"]
    if loss is not None and loss < state.best_loss:
        state.best_loss = loss
        checkpoint.save_model(state.folder / "models" / "model-best", state.model)


def _end_epoch_prune(state: TrainingState) -> None:
    """Delete the filters that the rule chooses (paper section 3.3). Once it is done, models/model-best is the best of
    the networks that are not pruned any more."""
    rule, done = state.rule, state.rule.done
    stays = rule.choose(state.epoch, state.model, state.rows, state.delta_prune)
    if stays:
        prune(state.model, state.optimizer, stays)
    state.rows[-1] |= rule.row()
    if rule.done != done:
        state.best_loss = math.inf
    for line in rule.notes:
        state.log(line)


def _end_epoch_measure(state: TrainingState, patch_size: tuple[int, ...]) -> None:
    """Add the network's size to the epoch's row of the history."""
    counted = count_filters(state.model)
    state.rows[-1] |= summary(state.model, patch_size)
    state.rows[-1] |= {"in_filters": counted["in"], "out_filters": counted["out"]}


def fixed_image(data: Loader) -> Tensor:
    """The image whose feature maps are saved, (1, C, *patch_size): the middle slice (3D: patch) of the first
    validation volume, cropped or padded centrally. Raises InputError if there is no validation set."""
    if not data.ids["validation"]:
        raise InputError("--save_fms: there is no validation image; give --split a second share, such as 0.9:0.1")
    volume = patches.fit(data.get("validation")[0].image.data, data.patch_size)
    size = (*data.patch_size, 1)[:3]
    start = tuple((n - p) // 2 for n, p in zip(volume.shape[1:], size, strict=True))
    return patches.cut(volume, data.patch_size, [start])


@torch.no_grad()
def _end_epoch_save_all_FMs(state: TrainingState, image: Tensor, every: int) -> None:  # noqa: N802 (the published name)
    """fms/epoch-E/BLOCK.npy: the maps that every block, heads included, makes of `image`, (C, *spatial) float16, in
    every `every`-th epoch (paper section 4.2)."""
    if state.epoch % every:
        return
    folder = state.folder / "fms" / f"epoch-{state.epoch:04}"
    folder.mkdir(parents=True, exist_ok=True)
    image = image.to(device_of(state.model))
    n_bytes = 0
    for name, maps in state.model.eval().forward_saveFMs(image).items():
        array = maps[0].clamp(-65504, 65504).half().cpu().numpy()  # the largest float16
        checkpoint.write_atomically(folder / f"{name}.npy", partial(_save_array, array))
        n_bytes += array.nbytes
    if state.epoch == every:
        state.log(f"feature maps: {n_bytes / 1e6:.1f} MB per saved epoch, in {folder.parent}")


def _save_array(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:  # np.save would append .npy to the name
        np.save(file, array)


def _end_epoch_save_history(state: TrainingState) -> None:
    checkpoint.save_history(state)


def _end_epoch_save_filters(state: TrainingState) -> None:
    checkpoint.save_filters(state)


@contextmanager
def tensorboard(folder: Path, epoch: int) -> Iterator[SummaryWriter]:
    """A writer that continues after `epoch`. Every epoch's end flushes it, so nothing is lost where closing fails."""
    writer = SummaryWriter(folder, purge_step=epoch + 1)
    try:
        yield writer
    finally:
        with suppress(OSError):
            writer.close()


def _end_epoch_tensorboard(state: TrainingState, writer: SummaryWriter, class_names: tuple[str, ...]) -> None:
    try:
        _write_scalars(state, writer, class_names)
    except OSError as error:
        raise InputError(f"{state.folder}: the events cannot be written ({error.strerror or error})") from error


def _write_scalars(state: TrainingState, writer: SummaryWriter, class_names: tuple[str, ...]) -> None:
    row = state.rows[-1]
    for key in ("train_loss", "val_loss", "lr", "seconds", "parameters", "flops", "filters"):
        if row[key] is not None:
            writer.add_scalar(key, row[key], state.epoch)
    for name, dice in zip(class_names, row["val_dice"] or [], strict=False):
        if dice is not None:
            writer.add_scalar(f"dice/{name}", dice, state.epoch)
    for name, value in row.get("tau", {}).items():
        writer.add_scalar(f"tau/{name}", value, state.epoch)
        writer.add_scalar(f"filters/{name}", row["out_filters"][name], state.epoch)
    writer.flush()


def _end_epoch_save_model(state: TrainingState) -> None:
    checkpoint.save(state)


def _end_epoch_log(state: TrainingState, epochs: int) -> None:
    """One line: losses, Dice per foreground class, what is left of the network, the largest tau, seconds and ETA."""
    row = state.rows[-1]
    parts = [f"epoch {state.epoch}/{epochs}", f"loss {row['train_loss']:.4f}"]
    if row["val_loss"] is not None:
        dice = " ".join("-" if d is None else f"{d:.3f}" for d in row["val_dice"][1:])
        parts += [f"val {row['val_loss']:.4f}", f"Dice {dice}"]
    for name, key in (("filters", "filters"), ("parameters", "parameters"), ("FLOPs", "flops")):
        parts.append(f"{name} {100 * row[key] / state.unpruned[key]:.1f}%")
    if row.get("tau"):
        parts.append(f"tau {max(row['tau'].values()):.3f}")
    if row.get("ms") is not None:
        parts.append(f"{row['ms']:.2f} ms")
    recent = [r["seconds"] for r in state.rows[-5:] if r["seconds"] is not None]  # a published run has none
    left = round((epochs - state.epoch) * sum(recent) / len(recent))
    parts += [f"{row['seconds']:.1f} s", f"ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}"]
    state.log(" | ".join(parts))


def callbacks(
    *,
    patch_size: tuple[int, ...],
    epochs: int,
    class_names: tuple[str, ...],
    writer: SummaryWriter | None,
    save_fms: dict | None = None,
) -> list[Callback]:
    """The published order: prune, histories, filter files, model. `save_fms` holds the arguments of its callback; None
    leaves it out. All ranks prune and measure; the main one writes, and it alone has a `writer`."""
    return [
        distributed.main_only(_end_epoch_save_best),
        _end_epoch_prune,
        partial(_end_epoch_measure, patch_size=patch_size),
        *([distributed.main_only(partial(_end_epoch_save_all_FMs, **save_fms))] if save_fms else []),
        distributed.main_only(_end_epoch_save_history),
        distributed.main_only(_end_epoch_save_filters),
        distributed.main_only(partial(_end_epoch_tensorboard, writer=writer, class_names=class_names)),
        distributed.main_only(_end_epoch_save_model),
        distributed.main_only(partial(_end_epoch_log, epochs=epochs)),
    ]

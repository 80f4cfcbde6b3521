"""What happens at the end of an epoch. Every callback takes the training's state; their order is that of the list."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lib import checkpoint
from lib.checkpoint import TrainingState
from lib.data import patches
from lib.data.BaseDataset import BaseDataset
from lib.models.size import count_filters, milliseconds, resized, summary
from lib.pruning import (
    Threshold,
    budget_tau,
    deletable,
    fewest_filters,
    fewest_that_fit,
    kept,
    prune,
    raise_threshold,
    tau,
    training_settled,
)
from lib.system import distributed
from lib.system.error import InputError

Callback = Callable[[TrainingState], None]


def _end_epoch_save_best(state: TrainingState) -> None:
    """models/model-best: the model of the lowest validation loss so far, before this epoch's pruning."""
    loss = state.rows[-1]["val_loss"]
    if loss is not None and loss < state.best_loss:
        state.best_loss = loss
        checkpoint.save_model(state.folder / "models" / "model-best", state.model)


def _end_epoch_prune(
    state: TrainingState,
    tau_max: float,
    kappa: int,
    rho: int,
    mu: float,
    between: tuple[float, float],
    min_filters: int,
    max_prune_fraction: float,
) -> None:
    """Raise the thresholds where training has settled, then delete the filters below them (paper section 3.3).

    Nothing rises or goes before or after the epochs `between` (first excluded, last included). `min_filters` and
    `max_prune_fraction` are those of `fewest_filters` and `deletable`.
    """
    train_losses = [row["train_loss"] for row in state.rows]
    validated = [row["val_loss"] for row in state.rows if row["val_loss"] is not None]
    settled = training_settled(train_losses, validated if state.validates else None, rho)
    active = between[0] < state.epoch <= between[1]
    keep, fewest = {}, fewest_filters(state.model, min_filters)
    for block in state.model.blocks():
        if block.head:
            continue
        threshold = state.thresholds.setdefault(block.name, Threshold())
        if not active:
            continue
        raise_threshold(threshold, settled, kappa, rho, mu)
        threshold.lost, threshold.filters_before = 0, block.out_filters
        if block.out_filters > 1:
            delta, r = state.delta_prune[block.name]
            gone = deletable(delta, r, tau(threshold, tau_max, kappa), fewest[block.name], max_prune_fraction)
            threshold.lost = len(gone)
            if gone:
                keep[block.name] = kept(block.out_filters, gone)
    if keep:
        prune(state.model, state.optimizer, keep)
    state.rows[-1]["tau"] = {name: tau(threshold, tau_max, kappa) for name, threshold in state.thresholds.items()}
    state.rows[-1]["patience"] = {name: threshold.patience for name, threshold in state.thresholds.items()}


def _end_epoch_prune_to_budget(
    state: TrainingState,
    max_flops: float | None,
    max_ms: float | None,
    between: tuple[float, float],
    min_filters: int,
    max_prune_fraction: float,
    patch_size: tuple[int, ...],
) -> None:
    """Between two moments of the run let the threshold of all blocks climb at an even pace, and delete the filters
    below it; the moment that the network fits, pruning stops for good.

    An epoch deletes the filters with the smallest delta_prune first, and no more than are needed to fit. From the next
    epoch on models/model-best is the best of those that fit.
    max_flops: of one patch; max_ms: milliseconds for one patch on the run's device; None: no such limit.
    """
    row = state.rows[-1]
    row |= {"budget_met": state.budget_met, "ms": None}
    climbs = between[0] < state.epoch <= between[1] and not state.budget_met
    if climbs or len(state.rows) == 1:
        threshold = budget_tau(state.epoch, between)
        row["tau"] = {block.name: threshold for block in state.model.blocks() if not block.head}
    else:
        row["tau"] = state.rows[-2]["tau"]
    if not climbs:
        return

    device = next(state.model.parameters()).device
    widths = {block.name: block.out_filters for block in state.model.blocks() if not block.head}

    @cache
    def measured(widths: tuple[tuple[str, int], ...]) -> dict[str, float]:
        """Once for each network: a second look at the clock might decide otherwise."""
        widths = dict(widths)
        flops = summary(resized(state.model, widths), patch_size)["flops"]
        if not max_ms:
            return {"flops": flops, "ms": None}
        ms = milliseconds(resized(state.model, widths, device), patch_size) if distributed.is_main() else None
        return {"flops": flops, "ms": distributed.broadcast_from_main(ms)}  # one clock decides for all ranks

    def size(widths: dict[str, int]) -> dict[str, float]:
        return measured(tuple(widths.items()))

    def fits(size: dict[str, float]) -> bool:
        return (not max_flops or size["flops"] <= max_flops) and (not max_ms or size["ms"] <= max_ms)

    fewest, candidates = fewest_filters(state.model, min_filters), []
    for name in widths:
        delta, r = state.delta_prune[name]
        gone = deletable(delta, r, threshold, fewest[name], max_prune_fraction)
        candidates += [(delta[c].item(), name, c) for c in gone]
    ranked = [(name, c) for _, name, c in sorted(candidates)]
    gone = fewest_that_fit(ranked, widths, lambda widths: fits(size(widths)))
    keep = {name: kept(widths[name], [c for other, c in gone if other == name]) for name in {name for name, _ in gone}}
    if keep:
        prune(state.model, state.optimizer, keep)
    left = widths | {name: len(indices) for name, indices in keep.items()}
    reached = size(left)
    row |= {"budget_met": fits(reached), "ms": reached["ms"]}
    text = f"{reached['flops']:,} FLOPs ({100 * reached['flops'] / state.unpruned['flops']:.1f}%)"
    text += f", {reached['ms']:.2f} ms per patch" if max_ms else ""
    if row["budget_met"]:
        state.best_loss = math.inf
        state.log(f"budget met after epoch {state.epoch}: {text}; nothing more is pruned")
    elif state.epoch + 1 > between[1]:
        reason = (
            f"every block has as few filters as --min_filters {min_filters} allows"
            + " (those that feed a head: at least the number of classes)" * (min_filters > 1)
            if all(n <= fewest[name] for name, n in left.items())
            else "--prune_between ended before the thresholds, or --max_prune_fraction, let enough filters go"
        )
        state.log(f"budget not met: {text} after epoch {state.epoch}, the last that prunes; {reason}")


def _end_epoch_measure(state: TrainingState, patch_size: tuple[int, ...]) -> None:
    """Add the network's size to the epoch's row of the history."""
    counted = count_filters(state.model)
    state.rows[-1] |= summary(state.model, patch_size)
    state.rows[-1] |= {"in_filters": counted["in"], "out_filters": counted["out"]}


def fixed_image(data: BaseDataset) -> Tensor:
    """The image whose feature maps are saved, (1, 1, *patch_size): the middle slice (3D: patch) of the first
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
    image = image.to(next(state.model.parameters()).device)
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
    pruning: dict | None,
    save_fms: dict | None = None,
) -> list[Callback]:
    """The published order: prune, histories, filter files, model. `pruning` and `save_fms` hold the arguments of their
    callbacks; None leaves them out. A pruning with "max_flops" is one to a budget. Of several ranks all prune and
    measure, and the main one writes; only it has a `writer`."""
    if pruning and "max_flops" in pruning:
        pruning = [partial(_end_epoch_prune_to_budget, patch_size=patch_size, **pruning)]
    else:
        pruning = [partial(_end_epoch_prune, **pruning)] if pruning else []
    return [
        _main_only(_end_epoch_save_best),
        *pruning,
        partial(_end_epoch_measure, patch_size=patch_size),
        *([_main_only(partial(_end_epoch_save_all_FMs, **save_fms))] if save_fms else []),
        _main_only(_end_epoch_save_history),
        _main_only(_end_epoch_save_filters),
        _main_only(partial(_end_epoch_tensorboard, writer=writer, class_names=class_names)),
        _main_only(_end_epoch_save_model),
        _main_only(partial(_end_epoch_log, epochs=epochs)),
    ]


def _main_only(callback: Callback) -> Callback:
    return callback if distributed.is_main() else _do_nothing


def _do_nothing(_: TrainingState) -> None:
    pass

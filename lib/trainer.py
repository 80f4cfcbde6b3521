"""The training loop: train, validate, and what the callbacks do at the end of each epoch."""

import time
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.callback import Callback
from lib.checkpoint import TrainingState
from lib.data.BaseDataset import BaseDataset
from lib.error import InputError
from lib.models.Sauron import Measured
from lib.stop import check_stopped


def poly_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch counted from 1: lr * (1 - e / epochs)^0.9, e the number of finished epochs."""
    return lr * (1 - (epoch - 1) / epochs) ** 0.9


def build_optimizer(config: dict, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run's settings."""
    if config["optim"] == "adam":
        return torch.optim.Adam(model.parameters(), lr=config["lr"], weight_decay=config["wd"])
    return torch.optim.SGD(
        model.parameters(),
        lr=config["lr"],
        weight_decay=config["wd"],
        momentum=config["momentum"],
        nesterov=config["nesterov"],
    )


def fit(
    state: TrainingState,
    criterion: nn.Module,
    data: BaseDataset,
    callbacks: Sequence[Callback],
    *,
    epochs: int,
    lr: float,
    val_interval: int,
    prune: bool,
    device: torch.device,
    amp: bool = False,
) -> None:
    """Train from the epoch after `state.epoch` to `epochs`; `prune` measures delta_prune in each epoch's last batch,
    `amp` lets the network compute in bfloat16 where that is safe."""
    while state.epoch < epochs:
        start = time.perf_counter()
        epoch = state.epoch + 1
        for group in state.optimizer.param_groups:
            group["lr"] = poly_lr(lr, epoch, epochs)
        row = {"epoch": epoch, "lr": poly_lr(lr, epoch, epochs), "val_loss": None, "val_dice": None}
        row["train_loss"] = train_epoch(state, criterion, data, epoch, epochs, prune, device, amp)
        if state.validates and epoch % val_interval == 0:
            row["val_loss"], row["val_dice"], scores = validate(state.model, criterion, data, device, amp)
            state.validation[str(epoch)] = {"loss": row["val_loss"], "dice": scores}
        row["seconds"] = time.perf_counter() - start
        state.epoch = epoch
        state.rows.append(row)
        for callback in callbacks:
            callback(state)


def train_epoch(
    state: TrainingState,
    criterion: nn.Module,
    data: BaseDataset,
    epoch: int,
    epochs: int,
    prune: bool,
    device: torch.device,
    amp: bool = False,
) -> float:
    """One pass over the training set; returns the mean loss and leaves delta_prune of the last batch in the state."""
    state.model.train()
    total, n_batches = 0.0, data.n_train_batches()
    with tqdm(total=n_batches, desc=f"epoch {epoch}/{epochs}", unit="batch", leave=False) as bar:
        for i, batch in enumerate(data.train_batches(epoch)):
            images, labels = (to_device(batch[key], device) for key in ("image", "label"))
            loss, measured = compute_loss(state.model, criterion, images, labels, prune and i == n_batches - 1, amp)
            if not torch.isfinite(loss):
                subjects = ", ".join(sorted(set(batch["id"])))
                _stop(state, f"the loss is {loss.item()} in epoch {epoch}, on images of {subjects}")
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            state.optimizer.step()
            total += loss.item()
            bar.set_postfix(loss=f"{total / (i + 1):.4f}", refresh=False)
            bar.update()
            check_stopped()
    if not all(torch.isfinite(parameter).all() for parameter in state.model.parameters()):
        _stop(state, f"the last step of epoch {epoch} left weights that are not finite")
    state.delta_prune = measured.delta_prune
    return total / n_batches


def _stop(state: TrainingState, what: str) -> NoReturn:
    """Raise the InputError that says what is not finite, and what is kept."""
    kept = f"the model of epoch {state.epoch} is kept in {state.folder}" if state.rows else "no epoch was finished"
    raise InputError(f"{what}; {kept}: look at the images, or try a smaller --lr")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On a GPU through pinned memory, so that the copy does not wait for what the GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def compute_loss(
    model: nn.Module,
    criterion: nn.Module,
    images: Tensor,
    labels: Tensor,
    delta_prune: bool = False,
    amp: bool = False,
) -> tuple[Tensor, Measured]:
    """The loss of a batch, and what the model measured: its outputs, and delta_prune by block where asked for.

    A compiled model measures delta_prune uncompiled: one batch in an epoch is not worth it.
    """
    stance = torch.compiler.set_stance("force_eager" if delta_prune else "default")
    with stance, torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        if criterion.uses_distances or delta_prune:
            measured = model(images, delta_opt=criterion.uses_distances, delta_prune=delta_prune)
        else:
            measured = Measured(model(images), {}, {})
    outputs = [output.float() for output in measured.outputs] if amp else measured.outputs
    distances = [measured.delta_opt] if criterion.uses_distances else []
    return criterion(outputs, labels, *distances), measured


@torch.no_grad()
def validate(
    model: nn.Module, criterion: nn.Module, data: BaseDataset, device: torch.device, amp: bool = False
) -> tuple[float, list[float | None], dict[str, list[float | None]]]:
    """Mean loss over the patches, mean Dice per class over the subjects that have it, and Dice by subject and class."""
    model.eval()
    total, n_patches, scores = 0.0, 0, {}
    for volume in tqdm(data.validation_volumes(), desc="validation", unit="volume", leave=False):
        counts = torch.zeros(3, data.n_classes, dtype=torch.int64)
        for images, labels in zip(
            volume["image"].split(data.batch_size), volume["label"].split(data.batch_size), strict=True
        ):
            images, labels = to_device(images, device), to_device(labels, device)
            check_stopped()
            loss, measured = compute_loss(model, criterion, images, labels, amp=amp)
            if not torch.isfinite(loss):
                raise InputError(f"the validation loss is {loss.item()} on {volume['id']}; look at this image")
            total += loss.item() * len(images)
            n_patches += len(images)
            counts += overlap(measured.outputs[0].argmax(1), labels, data.n_classes).cpu()
        scores[volume["id"]] = [2 * tp / (p + t) if p + t else None for tp, p, t in counts.T.tolist()]
    by_class = [[d for d in dice if d is not None] for dice in zip(*scores.values(), strict=True)]
    return total / n_patches, [sum(dice) / len(dice) if dice else None for dice in by_class], scores


def overlap(prediction: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """(3, n_classes) voxel counts: predicted and true, predicted, true."""
    return torch.stack(
        [
            torch.bincount(labels.flatten(), minlength=n_classes)
            for labels in (truth[prediction == truth], prediction, truth)
        ]
    )

"""The training loop: train, validate, and what the callbacks do at the end of each epoch."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.callback import Callback
from lib.checkpoint import TrainingState
from lib.data.loading import Loader
from lib.loss import DS_CrossEntropyDiceLoss
from lib.models.Sauron import Measured
from lib.system import distributed
from lib.system.device import device_of
from lib.system.error import InputError
from lib.system.process import check_stopped

FEW_BATCHES = 10  # in an epoch


def poly_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch counted from 1: lr * (1 - e / epochs)^0.9, e the number of finished epochs."""
    return lr * (1 - (epoch - 1) / epochs) ** 0.9


def fit(
    state: TrainingState,
    criterion: nn.Module,
    data: Loader,
    callbacks: Sequence[Callback],
    *,
    epochs: int,
    lr: float,
    val_interval: int,
    device: torch.device,
    amp: bool = False,
) -> None:
    """Train from the epoch after `state.epoch` to `epochs`; `amp` lets the network compute in bfloat16 where that is
    safe. All ranks call each callback, with equal states; where one rank fails or is stopped, all end.

    Once the rule that prunes is done (with a budget: when it is met, and at the latest when --prune_between ends),
    nothing is left for the distance term to prepare: the segmentation loss alone trains the small network, and the
    learning rate starts anew for the epochs that are left.
    """
    while state.epoch < epochs:
        done = state.rule.done
        if done:
            criterion = DS_CrossEntropyDiceLoss(criterion.ignore)
        start = time.perf_counter()
        epoch = state.epoch + 1
        rate = poly_lr(lr, epoch - done, epochs - done)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        row = {"epoch": epoch, "lr": rate, "val_loss": None, "val_dice": None}
        row["train_loss"] = train_epoch(
            state, criterion, data, epoch, epochs, state.rule.measures and not done, device, amp
        )
        if state.validates and epoch % val_interval == 0:
            row["val_loss"], row["val_dice"], scores = validate(state.model, criterion, data, device, amp)
            state.validation[str(epoch)] = {"loss": row["val_loss"], "dice": scores}
        row["seconds"] = distributed.broadcast_from_main(time.perf_counter() - start)
        state.epoch = epoch
        state.rows.append(row)
        for callback in callbacks:
            with distributed.agreed():
                callback(state)


def train_epoch(
    state: TrainingState,
    criterion: nn.Module,
    data: Loader,
    epoch: int,
    epochs: int,
    prune: bool,
    device: torch.device,
    amp: bool = False,
) -> float:
    """One pass over the training set; returns the mean loss and leaves delta_prune of the last batch in the state.

    Each rank computes its part of the batch. Losses and distances are means over patches, so their means over the
    ranks, weighted by the parts, are those of the whole batch, and so are the gradients.
    """
    state.model.train()
    step = Step(distributed.parallel(state.model), criterion, amp)
    with distributed.agreed():
        n_batches = data.n_train_batches()
    total = 0.0
    with tqdm(
        total=n_batches, desc=f"epoch {epoch}/{epochs}", unit="batch", leave=False, disable=not distributed.is_main()
    ) as bar:
        for i, batch in enumerate(data.train_batches(epoch)):
            images, labels = (to_device(batch[key], device) for key in ("image", "label"))
            share = len(images) / len(batch["id"])
            if not share:  # the last batch had less patches than there are ranks: one that does not count
                images, labels = (tensor.new_zeros(1, *tensor.shape[1:]) for tensor in (images, labels))
            is_last = i == n_batches - 1
            plain = is_last or n_batches < FEW_BATCHES  # the recording would take longer than it saves
            loss, delta_prune = step(images, labels, share * distributed.world_size(), prune and is_last, plain)
            total += _finite(state, epoch, loss, share, batch["id"])
            state.optimizer.step()
            bar.set_postfix(loss=f"{total / (i + 1):.4f}", refresh=False)
            bar.update()
            with distributed.agreed():
                check_stopped()
    if not all(torch.isfinite(parameter).all() for parameter in state.model.parameters()):
        _stop(state, f"the last step of epoch {epoch} left weights that are not finite")
    distributed.check_same("the reference maps", [r for _, r in delta_prune.values()])
    state.delta_prune = {name: (distributed.total(d * share), r) for name, (d, r) in delta_prune.items()}
    return total / n_batches


def _finite(state: TrainingState, epoch: int, loss: Tensor, share: float, ids: Sequence[str]) -> float:
    """The loss of a batch, of which this rank had a share. Raises InputError where it is not finite."""
    value = distributed.total(torch.tensor(loss.item() * share, dtype=torch.float64)).item()
    if not math.isfinite(value):
        _stop(state, f"the loss is {value} in epoch {epoch}, on images of {', '.join(sorted(set(ids)))}")
    return value


def _stop(state: TrainingState, what: str) -> NoReturn:
    """Raise the InputError that says what is not finite, and what is kept."""
    kept = f"the model of epoch {state.epoch} is kept in {state.folder}" if state.rows else "no epoch was finished"
    with distributed.agreed():
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


class Step:
    """Loss and gradients of one batch after another, of a network whose filters stay the same.

    On a GPU all that a step computes is recorded once, as a CUDA graph, and replayed for every further batch: Python
    takes several times as long to start the kernels of a small network as they take to run. Gradients then stay where
    they were recorded. What the graph was not recorded for is computed as on any other device, and ends it.
    """

    def __init__(self, network: nn.Module, criterion: nn.Module, amp: bool):
        self.network, self.criterion, self.amp = network, criterion, amp
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, weight: float = 1.0, delta_prune: bool = False, plain: bool = False
    ) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        """The loss, and the model's delta_prune where asked for; the gradients are those of `weight` times the loss.
        plain: not from a graph."""
        if plain or delta_prune or images.device.type != "cuda" or distributed.world_size() > 1:
            self.graph = None
            self.network.zero_grad(set_to_none=True)
            loss, measured = compute_loss(self.network, self.criterion, images, labels, delta_prune, self.amp)
            (loss * weight).backward()  # the mean over the ranks follows
            return loss.detach(), measured.delta_prune  # nothing that keeps this step's autograd graph alive
        if self.graph is None:
            self._record(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.loss.clone(), {}

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Three steps that warm up, as torch asks for, and one that is recorded."""
        self.images, self.labels = images.clone(), labels.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        self.network.zero_grad(set_to_none=True)  # so that the graph writes new ones, and does not add to these
        with torch.cuda.graph(self.graph):
            self.loss = self._step()

    def _step(self) -> Tensor:
        self.network.zero_grad(set_to_none=True)
        loss, _ = compute_loss(self.network, self.criterion, self.images, self.labels, amp=self.amp)
        loss.backward()
        return loss.detach()


def trial_step(
    model: nn.Module, criterion: nn.Module, batch_size: int, patch_size: tuple[int, ...]
) -> Callable[[bool], None]:
    """What takes the time of a training step, of a copy of the model on a made-up batch (the part of this
    rank): the function takes `amp`, and changes nothing that a training uses. Its first call records (see `Step`)."""
    model, share = copy.deepcopy(model).train(), distributed.share(batch_size)
    shape = (share.stop - share.start, model.modalities, *patch_size)
    device = device_of(model)
    images = torch.randn(shape, generator=torch.Generator()).to(device)
    labels = (images[:, 0] > 0).long()
    steps = {amp: Step(model, criterion, amp) for amp in (False, True)}

    def step(amp: bool) -> None:
        steps[amp](images, labels)
        model.zero_grad(set_to_none=True)

    return step


@torch.no_grad()
def validate(
    model: nn.Module, criterion: nn.Module, data: Loader, device: torch.device, amp: bool = False
) -> tuple[float, list[float | None], dict[str, list[float | None]]]:
    """Mean loss over the patches, mean Dice per class over the subjects that have it, and Dice by subject and class.

    The ranks take turns at the volumes; the result is the same, and all have it.
    """
    model.eval()
    total, n_patches, scores = 0.0, 0, {}
    volumes = iter(
        tqdm(
            data.validation_volumes(), desc="validation", unit="volume", leave=False, disable=not distributed.is_main()
        )
    )
    while True:
        with distributed.agreed():
            volume = next(volumes, None)
            measured = volume and _validate_volume(model, criterion, volume, data, device, amp)
        round_ = [one for one in distributed.gather(measured) if one]
        if not round_:
            break
        for one in round_:
            scores[one["id"]] = one["dice"]
            for loss, n in one["losses"]:
                total += loss * n
                n_patches += n
    by_class = [[d for d in dice if d is not None] for dice in zip(*scores.values(), strict=True)]
    return total / n_patches, [sum(dice) / len(dice) if dice else None for dice in by_class], scores


def _validate_volume(
    model: nn.Module, criterion: nn.Module, volume: dict, data: Loader, device: torch.device, amp: bool
) -> dict:
    """{"id", "dice": by class, "losses": (loss, number of patches) of each part of the volume}."""
    losses, counts = [], torch.zeros(3, data.dataset.n_classes, dtype=torch.int64)
    for images, labels in zip(
        volume["image"].split(data.batch_size), volume["label"].split(data.batch_size), strict=True
    ):
        images, labels = to_device(images, device), to_device(labels, device)
        check_stopped()
        loss, measured = compute_loss(model, criterion, images, labels, amp=amp)
        if not torch.isfinite(loss):
            raise InputError(f"the validation loss is {loss.item()} on {volume['id']}; look at this image")
        losses.append((loss.item(), len(images)))
        counts += overlap(measured.outputs[0].argmax(1), labels, data.dataset.n_classes).cpu()
    dice = [2 * tp / (p + t) if p + t else None for tp, p, t in counts.T.tolist()]
    return {"id": volume["id"], "dice": dice, "losses": losses}


def overlap(prediction: Tensor, truth: Tensor, n_classes: int) -> Tensor:
    """(3, n_classes) voxel counts: predicted and true, predicted, true. Voxels whose truth is no class do not count."""
    counted = truth < n_classes
    prediction, truth = prediction[counted], truth[counted]
    return torch.stack(
        [
            torch.bincount(labels.flatten(), minlength=n_classes)
            for labels in (truth[prediction == truth], prediction, truth)
        ]
    )

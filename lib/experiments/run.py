"""What a run folder says, read and checked in one place."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lib.build import build_unpruned
from lib.models.size import summary
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.files import read_text

PER_EPOCH = ("epoch", "train_loss", "val_loss", "val_dice", "seconds", "parameters", "flops", "filters")


@dataclass(frozen=True)
class Run:
    """What the files of a run say; blocks are those that can be pruned, in the order of the forward pass."""

    folder: Path
    settings: Settings
    facts: dict  # what else config.json says: command, machine, versions, ...
    history: dict[str, list]  # of history.json: a value per epoch
    scores: dict[str, list[float | None]]  # of the newest validation: Dice per class, by subject; may be empty
    scores_epoch: int | None  # of that validation
    widths: dict[str, int]  # filters of each block without pruning
    filters: np.ndarray  # (blocks, epochs)
    tau: np.ndarray  # (blocks, epochs): the thresholds, NaN where not known; (blocks, 0) without pruning
    unpruned: dict[str, int]  # parameters, flops and filters of the network without pruning

    @property
    def classes(self) -> tuple[str, ...]:
        return self.settings.dataset.class_names

    @property
    def met(self) -> int | None:
        """The epoch at whose end the network fitted its budget; None if it did not, or there is none."""
        met = zip(self.history["epoch"], self.history.get("budget_met", []), strict=False)
        return next((epoch for epoch, yes in met if yes), None)

    @property
    def best(self) -> int | None:
        """The epoch of models/model-best: that of the lowest validation loss, the first of equals; of those after the
        budget was met, if one of them was validated. None without a validation."""
        validated = zip(self.history["epoch"], self.history["val_loss"], self.history["val_dice"], strict=True)
        losses = {e: v for e, v, dice in validated if dice is not None}  # a published run's epochs have no Dice here
        fit = {e: v for e, v in losses.items() if self.met is not None and e > self.met} or losses
        return min(fit, key=fit.get, default=None)


def read_run(folder: Path) -> Run:
    """Read a run folder with at least one finished epoch. Raises InputError if it is none, or a file is broken."""
    settings, facts = Settings.read(folder)
    if not (folder / "history.json").exists():
        raise InputError(f"{folder}: has no finished epoch (no history.json), so there is nothing to report yet")
    file = folder / "config.json"
    try:
        with torch.device("meta"):
            model = build_unpruned(settings)
        widths = {block.name: block.out_filters for block in model.blocks() if not block.head}
        unpruned = summary(model, settings.patch_size)
        file = folder / "history.json"
        history = json.loads(read_text(file))
        n_classes = settings.n_classes
        _check_history(history, n_classes)
        n = len(history["epoch"])
        tau = [[row[name] for row in history.get("tau", [])] for name in widths]
        if not all(value is None or _is_number(value) for values in tau for value in values):
            raise ValueError("a threshold is no number")
        tau = np.array(tau, dtype=float)
        file = folder / "out_filters"
        names, *lines = (line.split("\t") for line in read_text(file).splitlines())
        filters = np.array([[int(line[names.index(name)]) for line in lines[:n]] for name in widths])
        file = folder / "validation_scores.json"
        validated = json.loads(read_text(file))
        newest = max(map(int, validated), default=None)
        scores = validated[str(newest)]["dice"] if validated else {}
        for dice in scores.values():
            _check_dice(dice, n_classes)
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{file}: is broken ({type(error).__name__}: {error}); mend it or train again") from error
    return Run(folder, settings, facts, history, scores, newest, widths, filters, tau, unpruned)


def _check_history(history: dict[str, list], n_classes: int) -> None:
    """Raise ValueError (or TypeError) unless the quantities have one value of their kind per epoch."""
    n = len(history["epoch"])
    if n == 0 or any(len(history[key]) != n for key in PER_EPOCH):
        raise ValueError("not one value per epoch")
    for key in ("epoch", "parameters", "flops", "filters"):
        if not all(type(value) is int and 0 < value < 2**53 for value in history[key]):
            raise ValueError(f"{key} is no whole number")
    for key in ("train_loss", "seconds", "val_loss"):
        if not all(_is_number(value) or (value is None and key != "train_loss") for value in history[key]):
            raise ValueError(f"{key} is no number")
    if all(value is None for value in history["seconds"]):
        raise ValueError("no epoch has its seconds")
    if any(loss is None for loss, dice in zip(history["val_loss"], history["val_dice"], strict=True) if dice):
        raise ValueError("val_dice without val_loss")
    for dice in history["val_dice"]:
        if dice is not None:
            _check_dice(dice, n_classes)
    if not all(type(value) is bool for value in history.get("budget_met", [])):
        raise ValueError("budget_met is neither true nor false")
    ms = history.get("ms", [])
    if len(ms) not in (0, n) or not all(value is None or _is_number(value) for value in ms):
        raise ValueError("ms is no number")


def _check_dice(dice: list[float | None], n_classes: int) -> None:
    if len(dice) != n_classes or not all(value is None or _is_number(value) for value in dice):
        raise ValueError("Dice is not one number per class")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15


def mean_foreground(dice: list[float | None] | None) -> float | None:
    """The mean of what is known of the classes but the background."""
    known = [d for d in (dice or [None])[1:] if d is not None]
    return sum(known) / len(known) if known else None

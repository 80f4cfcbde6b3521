"""A run folder, read and checked in one place: all commands of lib.experiments ask `Run` about it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lib.build import build_dataset, build_unpruned
from lib.checkpoint import newest_epoch
from lib.data.loading import Loader
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.files import read_text

PER_EPOCH = ("epoch", "train_loss", "val_loss", "val_dice", "seconds", "parameters", "flops", "filters")


class Run:
    """What the files of a run say. Each is read when it is first asked for, which raises InputError if it is missing or
    broken. Blocks are those that can be pruned, in the order of the forward pass."""

    def __init__(self, folder: Path):
        """Raises InputError if this is no run folder."""
        self.folder = folder
        self.settings, self.facts = Settings.read(folder)  # facts: command, machine, versions, ...

    @property
    def name(self) -> str:
        """Of the folder, whatever path leads to it."""
        return self.folder.resolve().name

    @property
    def lambda_(self) -> float:
        """The weight of the distances in the loss; 0 where they are no part of it."""
        return self.settings.lambda_ if self.settings.loss.endswith("_Distance") else 0

    @property
    def classes(self) -> tuple[str, ...]:
        return self.settings.dataset.class_names

    @cached_property
    def history(self) -> dict[str, list]:
        """history.json: a value per epoch, of at least one epoch."""
        file = self.folder / "history.json"
        if not file.exists():
            raise InputError(
                f"{self.folder}: has no finished epoch (no history.json), so there is nothing to report yet"
            )
        with _reading(file):
            history = json.loads(read_text(file))
            _check_history(history, self.settings.n_classes)
            return history

    @cached_property
    def _network(self) -> nnUNet:
        """Without pruning, and without values of its weights."""
        with _reading(self.folder / "config.json"), torch.device("meta"):
            return build_unpruned(self.settings)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Filters of each block without pruning."""
        return {block.name: block.out_filters for block in self._network.blocks() if not block.head}

    @cached_property
    def unpruned(self) -> dict[str, int]:
        """Parameters, flops and filters of the network without pruning."""
        return summary(self._network, self.settings.patch_size)

    @cached_property
    def tau(self) -> np.ndarray:
        """(blocks, epochs): the thresholds, NaN where not known; (blocks, 0) without pruning."""
        with _reading(self.folder / "history.json"):
            tau = [[row[name] for row in self.history.get("tau", [])] for name in self.widths]
            if not all(value is None or _is_number(value) for values in tau for value in values):
                raise ValueError("a threshold is no number")
            return np.array(tau, dtype=float)

    @cached_property
    def filters(self) -> np.ndarray:
        """(blocks, epochs)"""
        file, n = self.folder / "out_filters", len(self.history["epoch"])
        with _reading(file):
            names, *lines = (line.split("\t") for line in read_text(file).splitlines())
            return np.array([[int(line[names.index(name)]) for line in lines[:n]] for name in self.widths])

    @cached_property
    def _validation(self) -> tuple[int | None, dict[str, list[float | None]]]:
        """The epoch of the newest validation, and its Dice."""
        file = self.folder / "validation_scores.json"
        with _reading(file):
            validated = json.loads(read_text(file))
            epoch = max(map(int, validated), default=None)
            scores = validated[str(epoch)]["dice"] if validated else {}
            for dice in scores.values():
                _check_dice(dice, self.settings.n_classes)
            return epoch, scores

    @property
    def scores(self) -> dict[str, list[float | None]]:
        """Of the newest validation: Dice per class, by subject; empty without a validation."""
        return self._validation[1]

    @property
    def scores_epoch(self) -> int | None:
        return self._validation[0]

    @cached_property
    def validation(self) -> dict | None:
        """validation.json: the whole validation volumes as a model of this run segments them; None if it is not
        there."""
        file = self.folder / "validation.json"
        if not file.exists():
            return None
        with _reading(file):
            found = json.loads(read_text(file))
            _check_validation(found, self.settings.n_classes)
            return found

    @property
    def met(self) -> int | None:
        """The epoch at whose end the network fitted its budget; None if it did not, or there is none."""
        return self._first("budget_met")

    @property
    def over(self) -> int | None:
        """The epoch at whose end the pruning to a budget was over, met or not; None if it is not, or there is none."""
        return self._first("pruning_over") or self.met

    def _first(self, what: str) -> int | None:
        """The first epoch of which the history says so."""
        said = zip(self.history["epoch"], self.history.get(what, []), strict=False)
        return next((epoch for epoch, yes in said if yes), None)

    @property
    def best(self) -> int | None:
        """The epoch of models/model-best: the first of the lowest validation loss. Where epochs were validated after
        the pruning to a budget was over, it is one of them. None without a validation."""
        validated = zip(self.history["epoch"], self.history["val_loss"], self.history["val_dice"], strict=True)
        losses = {e: v for e, v, dice in validated if dice is not None}  # a published run's epochs have no Dice here
        final = {e: v for e, v in losses.items() if self.over is not None and e > self.over} or losses
        return min(final, key=final.get, default=None)

    @property
    def newest_model(self) -> Path:
        """The file. Raises InputError if there is none."""
        epoch = newest_epoch(self.folder)
        if epoch is None:
            raise InputError(
                f"{self.folder}: has no model (models/model-E) yet; give it an epoch, with train.py --resume"
            )
        return self.folder / "models" / f"model-{epoch}"

    @property
    def saved_maps(self) -> dict[int, Path]:
        """The folders of saved feature maps by epoch, oldest first; empty without --save_fms."""
        return {int(path.name.removeprefix("epoch-")): path for path in sorted(self.folder.glob("fms/epoch-*"))}

    def data(self, data_path: str | None = None, cache_path: str | None = None, write: bool = True) -> Loader:
        """The data set with the split of the training; the paths are those of the training by default.

        Raises InputError if it is not there; without `write` also where a built-in data set would be written anew.
        """
        data_path = data_path or self.settings.data_path
        places = self.settings.dataset.folders(data_path)
        if not write and not any(map(Path.is_dir, places)):
            raise InputError(f"the data are not in {places[0]} any more; name their folder with --data_path")
        cache_path = cache_path or self.settings.cache_path
        return build_dataset(replace(self.settings, data_path=data_path, cache_path=cache_path))


def read_run(folder: Path) -> Run:
    """All that a run with a finished epoch says. Raises InputError if it has none, or a file is broken."""
    run = Run(folder)
    for name in ("history", "unpruned", "tau", "filters", "scores", "validation"):
        getattr(run, name)
    return run


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise InputError where the content of `file` is not as expected."""
    try:
        yield
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise InputError(f"{file}: is broken ({type(error).__name__}: {error}); mend it or train again") from error


def _check_history(history: dict[str, list], n_classes: int) -> None:
    """Raise ValueError (or TypeError) unless the quantities have one value of their kind per epoch."""
    n, ms = len(history["epoch"]), history.get("ms", [])
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
    for key in ("budget_met", "pruning_over"):
        if not all(type(value) is bool for value in history.get(key, [])):
            raise ValueError(f"{key} is neither true nor false")
    if len(ms) not in (0, n) or not all(value is None or _is_number(value) for value in ms):
        raise ValueError("ms is no number")


def _check_validation(found: dict, n_classes: int) -> None:
    """Raise an error of `_reading` unless all that is shown of it is as lib.validation writes it."""
    if not isinstance(found["model"], str):
        raise ValueError("the model is no text")
    if not all(step == "foreground" or (type(step) is int and 0 < step < n_classes) for step in found["steps"]):
        raise ValueError("a step is neither the foreground nor a class")
    if not all(isinstance(reason["why"], str) and type(reason["kept"]) is bool for reason in found["reasons"]):
        raise ValueError("a reason is no text")
    before, after = (found[when]["subjects"] for when in ("before", "after"))
    if not before or before.keys() != after.keys():
        raise ValueError("not the same subjects before and after")
    averages = (found[when]["average"] for when in ("before", "after"))
    for metrics in (*before.values(), *after.values(), *averages):
        for metric in ("dice", "HD95", "surface_dice"):
            _check_dice(metrics[metric], n_classes)


def _check_dice(dice: list[float | None], n_classes: int) -> None:
    if len(dice) != n_classes or not all(value is None or _is_number(value) for value in dice):
        raise ValueError("Dice is not one number per class")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15

"""One place that writes and reads a run's state. Every file is written to a temporary name and then renamed."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.optim import Optimizer

from lib.error import InputError
from lib.filters import format_filters
from lib.models.nnUNet import nnUNet
from lib.pruning import Threshold

STATE = re.compile(r"state-(\d+)")


@dataclass
class TrainingState:
    """All that changes during a training, handed to every callback."""

    model: nnUNet
    optimizer: Optimizer
    folder: Path
    log: Callable[[str], None]
    epoch: int = 0  # the newest finished one, counted from 1
    rows: list[dict] = field(default_factory=list)  # the history: one JSON-able row per epoch
    validation: dict[str, dict] = field(default_factory=dict)  # by epoch: {"loss", "dice": {subject: [per class]}}
    thresholds: dict[str, Threshold] = field(default_factory=dict)  # by prunable block
    delta_prune: dict = field(default_factory=dict)  # of the epoch's last training batch; not saved
    unpruned: dict[str, int] = field(default_factory=dict)  # parameters, flops, filters without any pruning; not saved
    best_dice: float = -1.0
    validates: bool = True  # whether there is a validation set


def new_run_folder(config: dict) -> Path:
    """Make <output>/<exp_name>/<data>/<id>, id the next free number.

    Raises InputError if it cannot be made.
    """
    parent = Path(config["output"], config["exp_name"], config["data"])
    run_id = 1
    while True:
        try:
            (parent / str(run_id) / "models").mkdir(parents=True)
            return parent / str(run_id)
        except FileExistsError:
            run_id += 1
        except OSError as error:
            raise InputError(f"--output {config['output']}: cannot be written to ({error.strerror})") from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a temporary file beside `path`, make it durable, and rename it: whole or not there at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_model(path: Path, model: nnUNet) -> None:
    """A plain state_dict on the CPU, as the published repository writes it."""
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def save(state: TrainingState) -> None:
    """Write models/model-E and models/state-E, then delete those of earlier epochs: the newest pair is always whole."""
    models = state.folder / "models"
    content = {
        "epoch": state.epoch,
        "optimizer": state.optimizer.state_dict(),
        "rows": state.rows,
        "validation": state.validation,
        "thresholds": {name: asdict(threshold) for name, threshold in state.thresholds.items()},
        "best_dice": state.best_dice,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    save_model(models / f"model-{state.epoch}", state.model)
    write_atomically(models / f"state-{state.epoch}", lambda temporary: torch.save(content, temporary))
    for path in models.iterdir():
        match = re.fullmatch(r"(?:model|state)-(\d+)", path.name)
        if match and int(match[1]) != state.epoch:
            path.unlink()


def newest_epoch(folder: Path) -> int:
    """The newest epoch that a run can continue after. Raises InputError if the folder holds none."""
    models = folder / "models"
    found = [int(m[1]) for m in map(STATE.fullmatch, os.listdir(models)) if m] if models.is_dir() else []
    epochs = [epoch for epoch in found if (models / f"model-{epoch}").exists()]
    if not epochs:
        raise InputError(f"{folder}: no finished epoch to continue after (no models/state-E); name a run folder")
    return max(epochs)


def read_training(path: Path) -> dict:
    """Read models/state-E. Raises InputError if it is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or "optimizer" not in content:
            raise ValueError("not the state of a training")
    except Exception as error:  # torch.load raises nearly anything on a broken file
        raise InputError(f"{path}: cannot be read ({type(error).__name__}); the run cannot continue from it") from error
    return content


def restore(state: TrainingState, content: dict) -> None:
    """Put what `save` wrote back into a state whose model has the saved widths; random states included."""
    state.optimizer.load_state_dict(content["optimizer"])
    state.epoch, state.rows, state.validation = content["epoch"], content["rows"], content["validation"]
    state.thresholds = {name: Threshold(**values) for name, values in content["thresholds"].items()}
    state.best_dice = content["best_dice"]
    torch.set_rng_state(content["rng"])
    if content["rng_cuda"] and torch.cuda.device_count() == len(content["rng_cuda"]):
        torch.cuda.set_rng_state_all(content["rng_cuda"])


def save_history(state: TrainingState) -> None:
    """history.json (a list of values per quantity, one per epoch) and validation_scores.json."""
    history = {
        key: [row[key] for row in state.rows] for key in state.rows[0] if key not in ("in_filters", "out_filters")
    }
    write_json(state.folder / "history.json", history)
    write_json(state.folder / "validation_scores.json", state.validation)


def save_filters(state: TrainingState) -> None:
    """in_filters and out_filters: one row per finished epoch."""
    for name in ("in_filters", "out_filters"):
        write_text(state.folder / name, format_filters([row[name] for row in state.rows]))

"""One place that writes and reads a run's state. Every file is written to a temporary name and then renamed."""

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch.optim import Optimizer

from lib.models.filters import format_filters
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, resized, summary
from lib.pruning.rules import FIRST_TAU, Rule
from lib.published import History
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.files import (
    SUMS,
    digest,
    format_sums,
    is_good,
    read_checked,
    read_sums,
    read_text,
    sweep,
    write_atomically,
    write_json,
    write_text,
)
from lib.system.log import no_log

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

STATE_TYPES = {
    "epoch": int,
    "optimizer": dict,
    "rows": list,
    "validation": dict,
    "thresholds": dict,
    "best_loss": float,
    "rng": torch.Tensor,
    "rng_cuda": list,
}
SUBJECTS = "subjects.json"  # what a run trains and validates with
SAVED = re.compile(r"(?:model|state)-(\d+)")


@dataclass
class TrainingState:
    """All that changes during a training, handed to every callback."""

    model: nnUNet
    optimizer: Optimizer
    folder: Path
    log: Callable[[str], None] = no_log
    epoch: int = 0  # the newest finished one, counted from 1
    rows: list[dict] = field(default_factory=list)  # the history: one JSON-able row per epoch
    validation: dict[str, dict] = field(default_factory=dict)  # by epoch: {"loss", "dice": {subject: [per class]}}
    rule: Rule = field(default_factory=Rule)  # that prunes
    delta_prune: dict = field(default_factory=dict)  # of the epoch's last training batch; not saved
    unpruned: dict[str, int] = field(default_factory=dict)  # parameters, flops, filters without any pruning; not saved
    best_loss: float = math.inf  # on the validation set: that of models/model-best
    validates: bool = True  # whether there is a validation set


def new_run_folder(settings: Settings) -> Path:
    """Make <output>/<exp_name>/<data>/<id>, id the next free number.

    Raises InputError if it cannot be made.
    """
    parent = Path(settings.output, settings.exp_name, settings.data)
    run_id = 1
    while True:
        try:
            (parent / str(run_id) / "models").mkdir(parents=True)
            return parent / str(run_id)
        except FileExistsError:
            run_id += 1
        except OSError as error:
            raise InputError(f"--output {settings.output}: cannot be written to ({error.strerror})") from error


def begin(folder: Path, settings: Settings, about: dict, earlier: dict, epoch: int | None, content: dict) -> None:
    """Clear a run folder of what killed processes have left, and write config.json: the settings, and what is to be
    known `about` the run; and subjects.json: the `content` of its data. `epoch` is the one after which an earlier run
    goes on, of which `earlier` is known; None for a new run."""
    for place in (folder, folder / "models"):
        sweep(place)
    if epoch is not None:
        about = earlier | {"continued": [*earlier.get("continued", []), {"after_epoch": epoch} | about]}
    write_json(folder / "config.json", settings.as_dict() | about)
    write_json(folder / SUBJECTS, content)


def changed_subjects(folder: Path, content: dict[str, dict[str, dict[str, str]]]) -> dict[str, str]:
    """Which subjects a run did not train or validate with as they are now, and what is the matter with each.

    `content` is that of Loader.content. None is named for a run of the time before it was noted. Raises InputError
    if the note is broken.
    """
    path, changed = folder / SUBJECTS, {}
    if not path.exists():
        return changed
    try:
        before = json.loads(read_text(path))
        for part, now in content.items():
            for subject in sorted({*now, *before[part]}):
                old, new = before[part].get(subject), now.get(subject)
                if old is None or new is None:
                    changed[subject] = f"is {'not in' if new is None else 'new in'} the {part} set"
                elif old != new:
                    names = {"image": "image", "label": "ground truth"}
                    which = " and ".join(name for key, name in names.items() if old.get(key) != new.get(key))
                    changed[subject] = f"has another {which}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: is broken ({error!r}); restore it, or delete it to go on unchecked") from error
    return changed


def check_subjects(folder: Path, content: dict[str, dict[str, dict[str, str]]], accept: bool) -> dict[str, str]:
    """`changed_subjects`. Raises InputError if there are some, unless one may `accept` that."""
    changed = changed_subjects(folder, content)
    if changed and not accept:
        (subject, what), *others = changed.items()
        more = f", and {len(others)} more subjects have changed" if others else ""
        raise InputError(
            f"--resume {folder}: {subject} {what} since the run was last trained{more}; restore the data, or give "
            "--accept_changed_data to go on with what is there"
        )
    return changed


def starting_point(
    settings: Settings, run: Path | None, epoch: int | None, model_state: str | None
) -> tuple[int, Path | None, dict | None]:
    """The finished epoch after which to start, the model to start from, and what models/state-E holds.

    `run` goes on after `epoch`, from `model_state` or its own model; without an epoch all begins as the settings say.
    """
    if epoch is None:
        return settings.epoch_start, settings.model_state and Path(settings.model_state), None
    source = Path(model_state or run / "models" / f"model-{epoch}")
    return epoch, source, read_training(run / "models" / f"state-{epoch}")


def save_checked(folder: Path, contents: dict[str, object], obsolete: Iterable[Path] = ()) -> None:
    """torch.save `contents` by file name, with their checksums, then delete what is `obsolete`.

    While a file is replaced both its sums are listed: at every instant it has one of them.
    """
    files = {}
    for name, content in contents.items():
        torch.save(content, buffer := io.BytesIO())
        files[name] = buffer.getvalue()
    sums, new = read_sums(folder), {name: [digest(data)] for name, data in files.items()}
    both = sums | {name: sums.get(name, []) + new[name] for name in new}
    write_text(folder / SUMS, format_sums(both))
    for name, data in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=data))
    for path in obsolete:
        path.unlink()
    present = {name: sums for name, sums in (both | new).items() if (folder / name).exists()}
    write_text(folder / SUMS, format_sums(present))


def state_dict(model: nnUNet) -> dict[str, torch.Tensor]:
    """A plain state_dict on the CPU, as the published repository writes it."""
    return {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}


def save_model(path: Path, model: nnUNet) -> None:
    save_checked(path.parent, {path.name: state_dict(model)})


def save(state: TrainingState) -> None:
    """Write models/model-E and models/state-E; of the others only the newest earlier pair stays."""
    models = state.folder / "models"
    content = {
        "epoch": state.epoch,
        "optimizer": state.optimizer.state_dict(),
        "rows": state.rows,
        "validation": state.validation,
        "thresholds": state.rule.state_dict(),
        "best_loss": state.best_loss,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    previous = max((epoch for epoch in saved_epochs(state.folder) if epoch < state.epoch), default=None)
    numbered = {path: int(m[1]) for path in models.iterdir() if (m := SAVED.fullmatch(path.name))}
    save_checked(
        models,
        {f"model-{state.epoch}": state_dict(state.model), f"state-{state.epoch}": content},
        obsolete=[path for path, epoch in numbered.items() if epoch not in (state.epoch, previous)],
    )


def saved_epochs(folder: Path) -> list[int]:
    """The epochs of which a run folder has both the model and the state, oldest first."""
    models = folder / "models"
    names = set(os.listdir(models)) if models.is_dir() else set()
    epochs = {int(match[1]) for match in map(SAVED.fullmatch, names) if match}
    return sorted(epoch for epoch in epochs if {f"model-{epoch}", f"state-{epoch}"} <= names)


def newest_epoch(folder: Path) -> int | None:
    """The newest saved epoch whose two files are as they were written; None if there is none (so far).

    Raises InputError if all that is there is damaged.
    """
    epochs = saved_epochs(folder)
    for epoch in reversed(epochs):
        if all(is_good(folder / "models" / f"{kind}-{epoch}") for kind in ("model", "state")):
            return epoch
    if epochs:
        raise InputError(f"{folder}: model or state of epoch {epochs[-1]} is damaged, and there is no other")
    return None


def read_training(path: Path) -> dict:
    """Read models/state-E. Raises InputError if it is none."""
    try:
        data = read_checked(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a run folder that has it") from error
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        for key, kind in STATE_TYPES.items():
            if not isinstance(content[key], kind):
                raise TypeError(f"{key} is {content[key]!r}")
        if not all(row.keys() >= content["rows"][0].keys() for row in content["rows"]):
            raise ValueError("not one value per epoch")
    except Exception as error:  # torch.load raises nearly anything on a broken file
        raise InputError(f"{path}: is no state of a training ({type(error).__name__}); give another run") from error
    return content


def restore(state: TrainingState, content: dict) -> None:
    """Put what `save` wrote back into a state whose model has the saved widths; random states included.

    Raises InputError if the optimizer's state is not that of this model, or the others are not what `save` writes.
    """
    try:
        state.optimizer.load_state_dict(content["optimizer"])
        state.rule.load_state_dict(content["thresholds"], content["rows"])
        torch.set_rng_state(content["rng"])
        if content["rng_cuda"] and torch.cuda.device_count() == len(content["rng_cuda"]):
            torch.cuda.set_rng_state_all(content["rng_cuda"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"state-{content['epoch']}: is not of this model; give those of one epoch") from error
    for parameter, values in state.optimizer.state.items():
        if any(value.ndim and value.shape != parameter.shape for value in values.values() if torch.is_tensor(value)):
            raise InputError(f"state-{content['epoch']}: does not fit the widths of the model; give those of one epoch")
    state.epoch, state.rows, state.validation = content["epoch"], content["rows"], content["validation"]
    state.best_loss = content["best_loss"]


def restore_published(state: TrainingState, history: History, patch_size: tuple[int, ...]) -> None:
    """Give a state whose model is that of `history.epoch` the rows of `history`, and its rule the thresholds; what is
    not known of an epoch is None."""
    blocks = [block.name for block in state.model.blocks() if not block.head]
    taus = {name: history.taus.get(name, FIRST_TAU) for name in blocks}
    patiences = {name: history.patiences.get(name, 0) for name in blocks}
    state.rule.take_over(taus, patiences, history.widths)
    newest = state.rule.row()
    unknown = {key: dict.fromkeys(value) if isinstance(value, dict) else value for key, value in newest.items()}

    @cache
    def measured(widths: tuple[tuple[str, int], ...]) -> dict:
        network = resized(state.model, dict(widths))
        counted = count_filters(network)
        return summary(network, patch_size) | {"in_filters": counted["in"], "out_filters": counted["out"]}

    first = history.epoch - len(history.train_losses) + 1
    for epoch, (loss, widths) in enumerate(zip(history.train_losses, history.widths, strict=True), first):
        row = {"epoch": epoch, "lr": None, "val_loss": history.val_losses.get(epoch), "val_dice": None}
        row |= {"train_loss": loss, "seconds": None} | (newest if epoch == history.epoch else unknown)
        state.rows.append(row | measured(tuple(widths.items())))


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

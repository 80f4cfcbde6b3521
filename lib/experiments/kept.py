"""What is kept of a training when its run folder is gone: a small JSON file, made of the run and read again here."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lib.data.BaseDataset import BaseDataset
from lib.evaluation import RESERVED, averages
from lib.experiments.run import Run, read_run
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.files import file_digest, read_text

ROWS = {  # in the order of the table: the row's name, and its title there
    "unpruned": "unpruned",
    "sauron": "Sauron",
    "scratch": "Sauron's widths, from scratch",
    "flat": "flat U-Net, from scratch",
    "random": "random filters, otherwise Sauron",
    "torch-pruning": "torch-pruning, equal steps",
    "torch-pruning-time": "torch-pruning, equal time",
    "nnunetv2": "nnunetv2",
}
PEERS = tuple(row for row in ROWS if row not in ("unpruned", "sauron"))
WITHOUT_BUDGET = ("unpruned", "nnunetv2")
OF_A_MACHINE = ("data_path", "cache_path", "output", "definition")  # settings that are not kept
HISTORY = {  # what is kept of it, and with how many digits
    "epoch": 0,
    "lr": 3,
    "train_loss": 5,
    "val_loss": 5,
    "val_dice": 4,
    "flops": 0,
    "parameters": 0,
    "filters": 0,
    "seconds": 6,
    "ms": 4,
}
METRICS = ("dice", "HD95", "surface_dice")
SIZES = ("parameters", "flops", "filters")
MS = {"torch_ms": "torch, ms", "openvino_ms": "OpenVINO, ms"}  # what may be measured, and its column
LINE = 110  # characters of what stands in one line
PATH = re.compile(r"/|~|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\")  # how a path that leads out of the checkout begins


# --- writing ----------------------------------------------------------------------------------------------------------


def keep_run(
    folder: Path,
    row: str,
    budget: str | None = None,
    seed: int | None = None,
    seconds: float = 0,
    first: Path | None = None,
    **more: Any,
) -> dict:
    """What is kept of a run. `budget` and `seed` are those of the run by default.

    `first` is the run that went before it (what is pruned between the two): its seed, epochs and seconds count.
    `seconds` come to those of the epochs. `more` stands in the content as it is. Raises InputError unless the run is
    finished, and is one of this row.
    """
    run = finished(folder)
    budget = _check_row(run, row, budget)
    if row.startswith("torch-pruning") and first is None and not seconds:
        raise InputError(f"--row {row}: needs --first, the run that was pruned, or --seconds, those before this run")
    history, before = run.history, finished(first) if first else None
    if before:
        for what in ("data", "fold", "patch_size"):
            ours, theirs = (getattr(one.settings, what) for one in (run, before))
            if ours != theirs:
                raise InputError(f"--first {first}: its {what} is {theirs}, not {ours}; name the run that was pruned")
        seed = before.settings.seed_train if seed is None else seed
        history = joined(before.history, history)
    known = [value for value in history["seconds"] if value is not None]
    if len(known) < len(history["seconds"]):
        raise InputError(f"{folder}: the seconds of some epochs are not known (history.json)")
    return {
        "row": row,
        "budget": budget,
        "budget_met": run.met is not None if run.settings.has_budget else None,
        "fold": run.settings.fold,
        "seed": run.settings.seed_train if seed is None else seed,
        "device": "; ".join(dict.fromkeys(machine for one in (before, run) if one for machine in _machines(one))),
        "precision": run.settings.precision or "float32",
        "seconds": round(sum(known) + seconds, 1),
        **more,
        "commands": [command for one in (before, run) if one for command in commands(one)],
        "config": _config(run),
        "size": {key: [run.unpruned[key], run.history[key][-1]] for key in SIZES},
        "history": {key: rounded(history[key], digits) for key, digits in HISTORY.items() if _is_known(history, key)},
        "validation": _validation(run.validation),
    }


def keep_scores(
    path: Path,
    row: str,
    budget: str | None,
    dataset: BaseDataset,
    fold: str | None,
    seed: int,
    seconds: float,
    size: dict[str, list[float | None]],
    **more: Any,
) -> dict:
    """The same of a training without a run folder, such as another program's, whose predictions evaluate.py has
    compared (its results.json): there is no history, and no post-processing of ours. `size`: parameters and flops,
    before pruning (None: not known) and now. Raises InputError if the file is another one, or `budget` does not go with
    the row."""
    if (budget is None) != (row in WITHOUT_BUDGET):
        what = "has no budget; leave --budget out" if budget else "needs --budget, that of Sauron"
        raise InputError(f"--row {row}: {what}")
    try:
        results = json.loads(read_text(path))
        subjects = {subject: results[subject] for subject in results if subject not in RESERVED}
        ours = [{metric: found[metric] for metric in METRICS} for found in subjects.values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--scores {path}: is no file that evaluate.py has written ({error})") from error
    if not ours or any(len(values) != dataset.n_classes for found in ours for values in found.values()):
        raise InputError(f"--scores {path}: has not the {dataset.n_classes} classes of {dataset.name}, or no subject")
    return {
        "row": row,
        "budget": budget,
        "budget_met": None,
        "fold": fold,
        "seed": seed,
        "device": None,
        "precision": None,
        "seconds": seconds,
        **more,
        "commands": [],
        "config": {"data": dataset.name},
        "size": size,
        "history": {},
        "validation": {
            "classes": list(dataset.class_names[1:]),
            "average": {"before": _foreground(averages(subjects)["average"])},
            "subjects": {"before": {subject: _foreground(found) for subject, found in subjects.items()}},
        },
    }


def finished(folder: Path) -> Run:
    """A run of which all epochs are done, and whose newest model is validated; else InputError."""
    run = read_run(folder)
    epoch, epochs = run.history["epoch"][-1], run.settings.epochs
    if epoch < epochs:
        raise InputError(f"{folder}: not finished: epoch {epoch} of {epochs}; go on with train.py --resume {folder}")
    mend = f"; do it with python -m lib.validation {folder}"
    if run.validation is None:
        raise InputError(f"{folder}: not validated (no validation.json){mend}")
    name = run.validation["model"]
    model = folder / "models" / name
    other = model.exists() and file_digest(model) != run.validation.get("sha256")
    if name != f"model-{epoch}" or other:
        what = f"another {name}" if other else name
        raise InputError(f"{folder}: validation.json is of {what}, and the newest model is model-{epoch}{mend}")
    return run


def _check_row(run: Run, row: str, budget: str | None) -> str | None:
    """The budget of the row. Raises InputError where the run cannot be one of this row."""
    settings = run.settings
    own = settings.max_flops if settings.max_flops != "none" else None
    if own is None and settings.max_ms is not None:
        own = f"{settings.max_ms:g} ms"
    wanted = {"sauron": (True, False), "random": (True, True)}.get(row, (False, False))
    is_random = settings.prunes and settings.imp_fun == "random"
    if (settings.prunes, is_random) != wanted or row == "nnunetv2":
        found = f"is pruned{' at random' * is_random} while it trains" if settings.prunes else "is not pruned"
        raise InputError(f"--row {row}: {run.folder} {found}, or is no run of ours; name another row")
    if (settings.model == "flat") > (row == "flat"):
        raise InputError(f"--row {row}: {run.folder} is of --model flat; name the row flat")
    if row in WITHOUT_BUDGET and (budget or run.history["flops"][-1] != run.unpruned["flops"]):
        raise InputError(f"--row {row}: has no budget, and all FLOPs of its network; {run.folder} is another row")
    if own and budget and own != budget:
        raise InputError(f"--budget {budget}: {run.folder} has a budget of {own}; leave the flag out")
    if not own and not budget and row not in (*WITHOUT_BUDGET, "sauron"):
        raise InputError(f"--row {row}: needs --budget, that of Sauron which it is compared with")
    if row in ("scratch", "flat") and run.history["flops"][-1] >= run.unpruned["flops"]:
        raise InputError(f"--row {row}: {run.folder} has all FLOPs of its network; it is the row unpruned")
    return own or budget


def commands(run: Run) -> list[str]:
    """The command lines of a run, each after the epoch that it began at, without paths of the machine."""
    parts = [(run.facts.get("command", ""), "")]
    parts += [(part["command"], f" # after epoch {part['after_epoch']}") for part in run.facts.get("continued", [])]
    return [without_paths(command) + end for command, end in parts]


def without_paths(command: str) -> str:
    """A command line of whose paths that lead out of the checkout only the last part is left."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that does not end
        words = command.split()
    return shlex.join(map(last_part, words))


def last_part(word: str) -> str:
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (re.split(r"[/\\]", value.rstrip("/\\"))[-1] if PATH.match(value) else value)


def _machines(run: Run) -> list[str]:
    return [part["machine"] for part in (run.facts, *run.facts.get("continued", [])) if "machine" in part]


def _config(run: Run) -> dict:
    """The settings that say how it was trained; those of pruning where it is pruned. And on what."""
    groups = {f.name: f.metadata["group"] for f in fields(Settings)}
    kept = {}
    for key, value in run.settings.as_dict().items():
        unused = groups[key] == "pruning" and not run.settings.prunes and key != "max_flops"
        if value is not None and key not in OF_A_MACHINE and not unused:
            kept[key] = last_part(value) if isinstance(value, str) else value
    return kept | {key: run.facts[key] for key in ("versions", "machine", "git_revision") if run.facts.get(key)}


def joined(first: Mapping[str, list], second: Mapping[str, list]) -> dict[str, list]:
    """One history of two trainings, the epochs counted on; what only one of them has is left out."""
    joined = {key: [*first[key], *second[key]] for key in first if key in second}
    last = first["epoch"][-1]
    return joined | {"epoch": [*first["epoch"], *(last + epoch for epoch in second["epoch"])]}


def _is_known(history: Mapping[str, list], key: str) -> bool:
    return any(value is not None for value in history.get(key, []))


def _validation(found: dict) -> dict:
    when = ("before", "after")
    return {
        **{key: found[key] for key in ("model", "sha256") if key in found},
        "classes": found["classes"][1:],
        "steps": found["steps"],
        "average": {key: _foreground(found[key]["average"]) for key in when},
        "subjects": {key: {s: _foreground(m) for s, m in found[key]["subjects"].items()} for key in when},
    }


def _foreground(metrics: Mapping[str, list]) -> dict[str, list]:
    """The metrics that are kept, without the background."""
    return {metric: rounded(metrics[metric][1:], 5) for metric in METRICS}


def rounded(value: Any, digits: int) -> Any:
    """Numbers of so many significant digits, in lists of any depth; whole ones and None as they are."""
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def format_kept(content: object, depth: int = 0) -> str:
    """JSON in which what is short, and each list of numbers, has one line."""
    text = json.dumps(content, allow_nan=False, ensure_ascii=False)
    flat = isinstance(content, list) and not any(isinstance(item, (list, dict)) for item in content)
    if flat or not isinstance(content, (list, dict)) or len(text) + depth <= LINE:
        return text
    opening, closing = text[0], text[-1]
    if isinstance(content, dict):
        items = [f"{json.dumps(key, ensure_ascii=False)}: {format_kept(v, depth + 1)}" for key, v in content.items()]
    else:
        items = [format_kept(item, depth + 1) for item in content]
    return opening + "\n" + ",\n".join(" " * (depth + 1) + item for item in items) + "\n" + " " * depth + closing


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A file that was kept. scores: {"before": {subject: {metric: [a value per class]}}, "after": ...}, of the classes
    without background; "after" is missing for another program's. ms: by runtime, where measured."""

    path: Path
    row: str
    budget: str | None
    budget_met: bool | None
    fold: str | None
    seed: int
    data: str
    classes: tuple[str, ...]
    patch_size: tuple[int, ...] | None
    size: dict[str, list]
    seconds: float | None
    place: str | None
    history: dict[str, list]
    scores: dict[str, dict]
    ms: dict[str, float]

    @property
    def key(self) -> tuple[str | None, int]:
        """Fold and seed, by which rows are paired."""
        return self.fold, self.seed

    @property
    def title(self) -> str:
        return ROWS[self.row] + (f", {self.budget}" if self.budget else "")


def read_kept(path: Path) -> Training:
    """Raises InputError if this is no file of `keep_run` or `keep_scores`."""
    try:
        content = json.loads(read_text(path))
        validation, size = content["validation"], content["size"]
        classes = tuple(validation["classes"])
        if content["row"] not in ROWS:
            raise ValueError(f"row {content['row']!r} is unknown (known: {', '.join(ROWS)})")
        for when, subjects in validation["subjects"].items():
            for subject, metrics in subjects.items():
                if any(len(metrics[metric]) != len(classes) for metric in METRICS):
                    raise ValueError(f"{subject} has not a value per class, {when} post-processing")
        if not validation["subjects"]["before"]:
            raise ValueError("no subjects")
        if not all(size[key][1] > 0 for key in ("parameters", "flops")):
            raise ValueError("no size")
        place = f"{content['device']}, {content['precision']}" if content["device"] else None
        patch_size = content["config"].get("patch_size")
        return Training(
            **{key: content[key] for key in ("row", "budget", "budget_met", "fold", "seed", "seconds", "history")},
            path=path,
            data=content["config"]["data"],
            classes=classes,
            patch_size=tuple(patch_size) if patch_size else None,
            size=size,
            place=place,
            scores=validation["subjects"],
            ms={key: content[key] for key in MS if content.get(key) is not None},
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: is no file of lib.experiments.results keep ({type(error).__name__}: {error}); make it again"
        ) from error

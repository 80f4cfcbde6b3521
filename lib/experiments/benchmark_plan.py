"""What a benchmark does, and what its folder has of it already."""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lib.build import build_dataset
from lib.checkpoint import newest_epoch
from lib.data import DATASETS
from lib.data.loading import Loader
from lib.experiments import benchmark_networks as networks
from lib.experiments.benchmark_rows import (
    HALF,
    KINDS,
    NNUNET,
    ROWS,
    SAURON,
    WITHOUT_BUDGET,
    kind_of,
    row_of,
    rows_to_train,
)
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.settings import Settings
from lib.system.device import find_device
from lib.system.error import InputError
from lib.system.files import read_text, write_json
from lib.training import plan_own_data
from lib.utils import parseArguments, settings_of

OWN = (  # flags of train.py that the rows set themselves
    *("exp_name", "output", "seed_train", "epochs", "model", "no_prune"),
    *("in_filters", "out_filters", "epoch_start", "model_state", "history", "resume"),
)
# what rows that prune nothing have of flags that they may not have
UNPRUNED = {"recipe": "none", "width_multiple": 1, "max_flops": "none"}
FREE = {  # may change between two calls
    *("exp_name", "output", "seed_train", "data_path", "cache_path", "num_workers", "device"),
}


@dataclass(frozen=True)
class Task:
    """A row with one seed, and where the folder of the benchmark has what belongs to it."""

    output: Path
    key: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.key}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.output / "runs" / self.name

    @property
    def needs(self) -> list["Task"]:
        return [replace(self, key=key) for key in row_of(self.key).needs]

    @property
    def is_pruned(self) -> bool:
        """Whether this is what torch-pruning leaves, fine-tuned: `needs` are Sauron and what is pruned."""
        return HALF in row_of(self.key).needs

    @property
    def pruning(self) -> Path:
        """Of a pruned row: where Sauron's FLOPs and the seconds of the pruning are kept."""
        return self.output / "pruned" / f"{self.name}.json"

    def run(self) -> tuple[Path | None, int]:
        """The newest run with a finished epoch, and this epoch; None and 0 if there is none."""
        runs = [run for run in self.folder.glob("*/*") if any((run / "models").glob("state-*"))]
        run = max(runs, key=lambda run: int(run.name), default=None)
        return run, (newest_epoch(run) or 0) if run else 0

    def model(self) -> Path:
        """The newest model, once it has been trained."""
        run, epoch = self.run()
        return run / "models" / f"model-{epoch}"


@dataclass(frozen=True)
class Plan:
    """What to do, checked."""

    output: Path
    rows: tuple[str, ...]  # keys of what is to be trained
    seeds: tuple[int, ...]
    folds: dict[int, str]  # of own data, by seed where they are given
    flags: tuple[str, ...]  # of train.py, for all rows, but --data
    settings: Settings  # of the first row
    partitions: tuple[str, ...]  # what is predicted
    tta: bool  # whether predictions average over mirrorings
    data: Loader  # of the first fold
    device: torch.device
    given_data: str  # as --data says it

    @property
    def is_own(self) -> bool:
        """Whether the data are a folder in nnU-Net's raw format, whose results are train.py's own validation."""
        return self.settings.definition is not None

    def task(self, key: str, seed: int) -> Task:
        return Task(self.output, key, seed)

    def epochs(self, task: Task) -> int:
        """Of the task's own training: those of every row in all, or its half of them."""
        epochs = self.settings.epochs
        return epochs // 2 if task.key == HALF else epochs - epochs // 2 if task.is_pruned else epochs

    def flops(self, model: nnUNet) -> int:
        """Of one patch."""
        return summary(model, self.data.patch_size)["flops"]


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises InputError where a training would, and where a flag after -- is the benchmark's own."""
    flags = [*args.flags]
    given = parseArguments(["--data", args.data, *flags])
    for key in (*OWN, *(["max_flops"] if args.budgets else []), *(["fold"] if args.folds else [])):
        if getattr(given, key) is not None:
            raise InputError(f"--{key} after --: the benchmark sets it for each row; leave it out")
    if given.imp_fun == "random":
        raise InputError("--imp_fun random after --: is the row sauron-random; leave it out")
    if given.max_ms is not None:
        raise InputError("--max_ms after --: rows are compared at equal FLOPs, not times; leave it out, give --budgets")
    if args.budgets and WITHOUT_BUDGET in (args.rows or ()):
        raise InputError(f"--rows {WITHOUT_BUDGET}: has no budget; leave it or --budgets out")
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    rows, seeds = rows_to_train(args.rows or ROWS, args.budgets), tuple(dict.fromkeys(args.seeds))
    folds = folds_by_seed(args, seeds)
    own = plan_own_data(given)
    definition = own and own["definition"]
    first = ["--data", args.data, *(["--fold", folds[seeds[0]]] if folds else []), *flags]
    settings, *_ = [
        settings_of(parseArguments(flags_of(row, first)), definition=definition)[1] for row in (SAURON, *rows)
    ]
    output = args.output or Path("out", "benchmark", settings.data)
    check_pruned_rows([Task(output, row, seed) for row, seed in product(rows, seeds)], settings.epochs)
    device = find_device(settings.device)
    data = build_dataset(settings)
    if own and (args.no_tta or set(args.partitions or ()) - {"validation"}):
        flag = "--no_tta" if args.no_tta else "--partitions test"
        raise InputError(
            f"{flag}: of own data, what counts is train.py's own validation, with mirrorings; leave it out"
        )
    partitions = tuple(dict.fromkeys(args.partitions or ["validation" if own else choose_partition(data)]))
    for partition in partitions:
        if not data.files(partition) or not all(file.label for file in data.files(partition)):
            raise InputError(f"--partitions {partition}: some of these images have no ground truth; name another")
    what = settings, partitions, not args.no_tta, data, device, args.data
    return Plan(output, rows, seeds, folds, tuple(flags), *what)


def flags_of(key: str, flags: Iterable[str]) -> list[str]:
    """The flags of train.py for a row, with `flags` for all rows before them."""
    flags = [*flags, *row_of(key).flags]
    if row_of(key).flags == NNUNET:
        given = vars(parseArguments(["--data", "phantom", *flags]))
        flags += [f"--{name}={value}" for name, value in UNPRUNED.items() if given[name] is not None]
    return flags


def folds_by_seed(args: argparse.Namespace, seeds: tuple[int, ...]) -> dict[int, str]:
    """--folds by seed; empty where they are not given. Raises InputError where they do not go with the rest."""
    if not args.folds:
        return {}
    if args.data in DATASETS:
        raise InputError(f"--folds: is for a folder in nnU-Net's raw format; leave it out with {args.data}")
    if "all" in args.folds:
        raise InputError("--folds all: leaves no validation set to compare on; give numbers")
    if len(args.folds) != len(seeds):
        raise InputError(f"--folds: give one for each of the {len(seeds)} seeds, not {len(args.folds)}")
    return dict(zip(seeds, args.folds, strict=True))


def check_pruned_rows(tasks: list[Task], epochs: int) -> None:
    """Raise InputError where a row of torch-pruning has no two halves, or is still to be pruned and the library is not
    installed."""
    pruned, kinds = [task for task in tasks if task.is_pruned], {kind_of(task.key) for task in tasks}
    others = [kind for kind in ROWS if kind in kinds - {kind_of(task.key) for task in pruned}]
    others = f"leave it out with --rows {' '.join(others)}"
    if pruned and epochs < 2:
        raise InputError(
            f"--epochs {epochs}: nnunet-pruned needs one before and one after it is pruned; give 2, or {others}"
        )
    if networks.torch_pruning is None and any(task.run()[0] is None for task in pruned):
        raise InputError(
            f"torch-pruning is missing, which nnunet-pruned needs: pip install {networks.TORCH_PRUNING}, or {others}"
        )


def choose_partition(data: Loader) -> str:
    """ "test"; "validation" where the test set has no ground truth. Raises InputError if neither has any."""
    for partition in ("test", "validation"):
        files = data.files(partition)
        if files and all(file.label for file in files):
            return partition
    raise InputError(
        f"--data {data.dataset.name}: no test or validation images with ground truth; add some, or change --split"
    )


def read_json(path: Path) -> Any:
    """Raises InputError if a file in the folder is broken, or is not there any more."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be used ({error}); restore it, or give another --output") from error


def check_settings(plan: Plan) -> None:
    """Write the settings into the folder. Raises InputError if what is there was made with others."""
    path = plan.output / "settings.json"
    settings = {key: value for key, value in plan.settings.as_dict().items() if key not in FREE}
    settings |= {"partitions": list(plan.partitions), "no_tta": not plan.tta}
    settings = json.loads(json.dumps(settings))  # as it is read again
    try:
        if not path.exists():
            plan.output.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--output {plan.output}: cannot be used ({error}); give another folder") from error
    for key, value in settings.items():
        if key != "fold" and before.get(key, value) != value:
            flag = f"--{key.rstrip('_')}"
            raise InputError(f"{flag} {value}: {plan.output} has {before[key]}; keep it, or give another --output")


def parse_name(output: Path, name: str) -> Task | None:
    """What a file or folder that is named "key-seed" belongs to; None if it has another name."""
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return Task(output, match[1], int(match[2])) if match and kind_of(match[1]) in KINDS else None


def check_runs(plan: Plan) -> None:
    """Raise InputError where a run in the folder was trained in another way than its row is now: torch-pruning's was
    once fine-tuned for all epochs, beside those that came before."""
    for folder in (plan.output / "runs").glob("*"):
        task = parse_name(plan.output, folder.name)
        run, _ = task.run() if task else (None, 0)
        if run is None:
            continue
        settings, reason = Settings.read(run)[0], ""
        epochs, fold = settings.epochs, plan.folds.get(task.seed, plan.settings.fold)
        if task.seed in plan.seeds and settings.fold != fold:
            raise InputError(
                f"--folds: {folder} was trained on fold {settings.fold}, not {fold}; give it, or another seed"
            )
        if epochs != plan.epochs(task):
            reason = f"for {epochs} epochs, not {plan.epochs(task)}"
        elif task.is_pruned and not task.pruning.exists():
            reason = "without keeping the seconds of the pruning"
        if reason:
            raise InputError(
                f"{folder}: an earlier version trained this {reason}; delete the folder, or give another --output"
            )


def finished_rows(plan: Plan) -> dict[str, list[int]]:
    """{key: seeds} of what has been evaluated in the folder and trained, with what it needs, in the table's order."""
    found: dict[str, list[int]] = {}
    files = (plan.output / "results").glob("*.json")
    for task in filter(None, (parse_name(plan.output, path.stem) for path in files)):
        if all(one.run()[1] >= plan.epochs(one) for one in (task, *task.needs)):
            found.setdefault(task.key, []).append(task.seed)
    kinds = list(ROWS)
    keys = sorted(found, key=lambda key: (key.partition("@")[2], kinds.index(kind_of(key))))
    return {key: sorted(found[key]) for key in keys}

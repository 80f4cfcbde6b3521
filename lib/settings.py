"""All settings of a training. A new one is one field of `Settings`: its flag, --help, config.json, the checks on
reading that file, and what --resume may change follow from the field. A field without a default has that of each data
set; the usual one stands in `PUBLISHED` of lib/data/BaseDataset.py."""

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from lib import published
from lib.data import DATASETS, raw
from lib.data.BaseDataset import BaseDataset
from lib.data.definition import as_dict, of_dict
from lib.data.normalization import SCHEMES
from lib.data.own_data import MEMORY_GB
from lib.distance import DISTANCES, IMPORTANCES
from lib.loss import LOSSES
from lib.models import MODELS
from lib.system.cli import boolean, flops_limit, number, one_of, percent, share_of
from lib.system.error import InputError
from lib.system.files import read_text
from lib.system.options import Options, noted, setting

BUDGET_MOMENTS = ("10%", "60%")  # --prune_between with a budget
RECIPES = {  # flags of pruning, for those that are not given; .readme/runs/README.md says how they were found
    "none": "",
    "small": "--max_flops 20% --prune_between 5% 40% --min_filters 8 --max_prune_fraction 0.15 --width_multiple 8",
}


def data_argument(text: str) -> str:
    """An argparse type: the name of a data set, or else the path of a folder in nnU-Net's raw format."""
    if text.lower() not in {name.lower() for name in DATASETS} and Path(text).exists():
        try:
            return str(raw.raw_folder(text))
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if "/" in text:
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder; give one with dataset.json, or a name")
    return one_of(DATASETS)["type"](text)


def digits(text: str) -> str:
    """An argparse type: a number below 10 for each of two or three axes, such as 122, which stays text."""
    if not (text.isascii() and text.isdigit() and len(text) in (2, 3) and "0" not in text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a digit from 1 to 9 for each axis, such as 122")
    return text


def fold_argument(text: str) -> str:
    """An argparse type: "all", or the number of a fold, which stays text."""
    if text != "all" and not (text.isascii() and text.isdigit() and len(text) < 5):
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold nor all")
    return text


def _dataset_of(values: Mapping[str, Any]) -> BaseDataset:
    return of_dict(values["definition"]) if values.get("definition") else DATASETS[values["data"]]


def _loss(values: dict) -> str:
    distances = values["model"] == "sauron" and values["lambda_"] > 0
    return "DS_CrossEntropyDiceLoss_Distance" if distances else "DS_CrossEntropyDiceLoss"


def _budget(values: dict) -> str:
    """What a data set chooses, unless something else is chosen that does not go with it."""
    other = values["model"] != "sauron" or values["no_prune"] or values["max_ms"] is not None
    return "none" if other else _dataset_of(values).defaults["max_flops"]


def _moments(values: dict) -> tuple[str, str]:
    budget = values["max_flops"] != "none" or values["max_ms"] is not None
    return BUDGET_MOMENTS if budget else _dataset_of(values).defaults["prune_between"]


def _default_of(dataset: BaseDataset, name: str) -> object:
    return getattr(dataset, name) if name in ("patch_size", "dim") else dataset.defaults[name]


OWN = ("axes", "spacing", "normalization", "no_crop", "gpu_memory", "fold", "allow_mismatch")  # for own data alone
SWITCH = {"action": "store_true"}
positive, maps, seed, fraction = (
    number(int, 1, 10**6),
    number(int, 1, 480),
    number(int, 0, 2**63 - 1),
    number(float, 0, 1),
)


@dataclass(frozen=True, kw_only=True)
class Settings(Options):
    """What a network is trained with. `of` and `read` make them; shares and limits stay the text that was given."""

    data: str = setting(
        "data",
        f"data set: {', '.join(sorted(DATASETS))}, or a folder in nnU-Net's raw format (with dataset.json)",
        shown="none; needed, but with --resume",
        type=data_argument,
        metavar="NAME|FOLDER",
    )
    data_path: str | None = setting(
        "data", "folder of the data set", None, shown="$SAURON_DATA/<data>, else data/<data>", resume="changes"
    )
    cache_path: str = setting("data", "folder for preprocessed volumes", "data/preprocessed", resume="changes")
    split: str = setting("data", "training:validation shares of what is no test set, such as 0.9:0.1 or 1:0")
    seed_data: int = setting("data", "seed of the split", type=seed)
    fold: str | None = setting(
        "data",
        "own data: the fold to validate with, of splits_final.json or else of nnU-Net's five; all: no validation",
        lambda values: "0" if values.get("definition") else None,
        shown="0 for own data",
        type=fold_argument,
    )
    allow_mismatch: bool = setting(
        "data",
        "own data: accept files whose origins or directions differ within a case, as nnU-Net does",
        False,
        shown="refuse",
        **SWITCH,
    )
    num_workers: int = setting(
        "data",
        "processes that load data (for each process of torchrun), 0 for none; results do not depend on it",
        lambda _: min(4, (os.cpu_count() or 1) - 1),
        shown="cores - 1, at most 4",
        resume="changes",
        type=number(int, 0, 256),
    )

    dim: str = setting(
        "plan of own data", "2D (slices) or 3D", shown="{chosen}; own data: by the voxels", **one_of(("2D", "3D"))
    )
    axes: tuple[int, ...] | None = setting(
        "plan of own data",
        "order of the axes, as nnU-Net's transpose_forward; 0 is the last stored axis",
        None,
        shown="the coarsest one first",
        type=number(int, 0, 2),
        nargs=3,
        metavar="AXIS",
    )
    spacing: tuple[float, ...] | None = setting(
        "plan of own data",
        "voxel size to resample to in mm, the last stored axis first; 0: as planned",
        None,
        shown="nnU-Net's target spacing",
        type=number(float, 0, 1e4),
        nargs=3,
        metavar="MM",
    )
    normalization: tuple[str, ...] | None = setting(
        "plan of own data",
        f"of each channel: {', '.join(SCHEMES)}",
        None,
        shown="by the channel's name",
        nargs="+",
        **one_of(SCHEMES),
    )
    no_crop: bool = setting("plan of own data", "keep what is 0 around an image", False, shown="crop it away", **SWITCH)
    gpu_memory: float = setting(
        "plan of own data",
        "memory in GB that patch and batch are planned for, by nnU-Net's estimate",
        MEMORY_GB,
        type=number(float, 0.1, 1e4),
        metavar="GB",
    )

    exp_name: str = setting("run", "name of the experiment", "unnamed")
    output: str = setting("run", "folder of the runs", "runs")
    device: str = setting(
        "run", "auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one", "auto", resume="changes"
    )
    seed_train: int = setting("run", "seed of weights, augmentation and pruning", type=seed)
    save_fms: bool = setting(
        "run",
        "save the feature maps of one validation image in RUN/fms, for lib.experiments.clusterability",
        False,
        shown="do not",
        **SWITCH,
    )
    save_fms_every: int = setting("run", "save them in every n-th epoch", 1, type=positive, metavar="N")
    amp: bool = setting(
        "run",
        "let the network compute in bfloat16 where that is safe and, on the CPU, faster; not for 3D on the CPU",
        False,
        shown="float32 throughout",
        **SWITCH,
    )
    compile: bool = setting(
        "run",
        "let torch compile the network, at first and after each pruning, which takes a minute; on the CPU a training "
        "is slower with it",
        False,
        shown="do not",
        resume="changes",
        **SWITCH,
    )

    model: str = setting(
        "network",
        "sauron, nnunet or flat; nnunet measures no distances and is never pruned; flat is an nnunet with one width in "
        "every block, the largest that --max_flops allows, or else --fms_init",
        "sauron",
        **one_of(MODELS),
    )
    fms_init: int = setting("network", "filters of the first level; each level doubles them, up to 480", type=maps)
    fms_max: int = setting("network", "filters of a level at most", type=number(int, 1, 4096))
    levels: int = setting("network", "levels of the network, at least 3", type=number(int, 3, 12))
    patch_size: tuple[int, ...] = setting(
        "network",
        "size of the training patch in voxels, a multiple of 2^(levels - 1), or of the product of the strides",
        type=number(int, 1, 2**14),
        nargs="+",
    )
    strides: tuple[str, ...] | None = setting(
        "network",
        "steps from each level to the next, a digit per axis, such as 111 122 222; the first one is 1",
        shown="2 between all levels; own data: as planned",
        type=digits,
        nargs="+",
    )
    kernels: tuple[str, ...] | None = setting(
        "network",
        "size of each level's convolutions, likewise, such as 133 333 333",
        shown="3; own data: as planned",
        type=digits,
        nargs="+",
    )
    in_filters: str | None = setting(
        "network", "file with the input channels of each block: start with the widths of its last row", None
    )
    out_filters: str | None = setting("network", "file with the filters of each block, likewise", None)

    loss: str = setting(
        "training",
        "loss function",
        _loss,
        shown="DS_CrossEntropyDiceLoss_Distance; for nnunet, flat or --lambda 0 DS_CrossEntropyDiceLoss",
        **one_of(LOSSES),
    )
    epochs: int = setting("training", "number of epochs", resume="changes", type=positive)
    steps: int | None = setting(
        "training", "batches of an epoch", shown="each volume once; own data: 250", type=positive
    )
    foreground: float = setting(
        "training",
        "share of the patches that are drawn around foreground",
        shown="{chosen}; own data: 0.33",
        type=fraction,
    )
    batch_size: int = setting("training", "patches per step, of all processes together", type=positive)
    val_interval: int = setting("training", "validate every so many epochs", type=positive)
    optim: str = setting("training", "optimizer", **one_of(["adam", "sgd"]))
    lr: float = setting(
        "training",
        "learning rate of the first epoch; it falls to 0 as lr * (1 - e / epochs)^0.9, and once more after a budget is "
        "met",
        type=number(float, 0, 10, open_low=True),
    )
    wd: float = setting("training", "weight decay", type=fraction)
    momentum: float = setting("training", "momentum of sgd", type=fraction)
    nesterov: bool = setting("training", "True or False: Nesterov momentum for sgd", type=boolean)

    recipe: str = setting(
        "pruning",
        "what is measured to give small networks that segment well, for flags that are not given: "
        + "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items() if flags),
        "none",
        **one_of(RECIPES),
    )
    lambda_: float = setting(
        "pruning",
        "weight of the distance term of the loss",
        flag="--lambda",
        type=number(float, 0, 1e6),
        metavar="LAMBDA",
    )
    dist_fun: str = setting("pruning", "delta_opt, the distance in the loss", "euc_norm", **one_of(DISTANCES))
    imp_fun: str = setting(
        "pruning",
        "delta_prune, the distance that is compared with the thresholds; random deals its values to the filters of a "
        "block at random",
        "euc_rand",
        **one_of([*IMPORTANCES, "random"]),
    )
    no_prune: bool = setting("pruning", "train with the distance term, delete nothing", False, shown="prune", **SWITCH)
    max_flops: str = setting(
        "pruning",
        "budget: prune until this share of the unpruned network's FLOPs (20%), or this number (2G), is left; none: by "
        "the paper's rule; for a flat network: have so many from the start",
        _budget,
        shown="{chosen}; none with another --model, --no_prune or --max_ms",
        type=flops_limit,
        metavar="LIMIT",
    )
    max_ms: float | None = setting(
        "pruning",
        "budget: prune until one patch takes so many milliseconds (median, on the device of the run)",
        None,
        type=number(float, 0, 1e9, open_low=True),
        metavar="N",
    )
    min_filters: int = setting(
        "pruning",
        "a block keeps so many filters at least (one that feeds a head: as many as there are classes, too; but with 1, "
        "as published, one filter stays anywhere)",
        type=maps,
    )
    max_prune_fraction: float | None = setting(
        "pruning",
        "a block loses at most this share of its filters in an epoch (but always one; the last epoch that prunes takes "
        "more where a budget needs it)",
        None,
        type=number(float, 0, 1, open_low=True),
        metavar="SHARE",
    )
    width_multiple: int = setting(
        "pruning",
        "prune so that each block keeps a multiple of so many filters, such as the 8 that a CPU computes at once: they "
        "go in groups, of which one may always go (a block with fewer keeps all); a flat network has such a width",
        1,
        type=maps,
        metavar="N",
    )
    tau_max: float = setting("pruning", "largest threshold, without a budget", type=number(float, 0.001, 1))
    kappa: int = setting("pruning", "number of steps from 0.001 to tau_max", type=positive)
    rho: int = setting(
        "pruning", "patience: epochs between two steps, and losses that are looked back at", type=positive
    )
    mu: float = setting("pruning", "a block that lost this share of its filters waits", type=fraction)
    prune_between: tuple[str, str] = setting(
        "pruning",
        "prune only between these two moments, in percent of the epochs; on the way to a budget the thresholds climb "
        "from one to the other",
        _moments,
        shown="{chosen}; with a budget " + " ".join(BUDGET_MOMENTS),
        type=percent,
        nargs=2,
        metavar=("FROM", "TO"),
    )

    epoch_start: int = setting(
        "continue",
        "continue after this epoch; 1 without --model_state is a fresh start, as published",
        0,
        resume="started",
        type=number(int, 0, 10**6),
    )
    model_state: str | None = setting("continue", "saved model (models/model-E) to start from", None, resume="started")
    history: str | None = setting(
        "continue",
        "run folder that holds the optimizer, thresholds, histories and random states of that epoch; from a run of the "
        "published code, which has thresholds and histories alone, a new run goes on",
        None,
        resume="started",
        metavar="RUN",
    )

    definition: dict | None = noted(None)  # of own data: `lib.data.definition.as_dict`
    modalities: int = noted(lambda values: _dataset_of(values).modalities)
    n_classes: int = noted(lambda values: _dataset_of(values).n_classes)
    precision: str | None = noted(None)  # what --amp came to: "float32" or "bfloat16"
    padding_counts: bool = noted(False)  # see `Preprocessing`: in runs of the time when it did

    parser_texts = {
        "prog": "train.py",
        "description": "Train a Sauron (or nnUNet) segmentation network, pruning its filters on the way.",
        "epilog": "Defaults that a data set chooses are listed with its name.",
    }

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The settings of a new run; of own data with its "definition". Raises InputError where they do not fit one
        another."""
        given = {**given, "data": _dataset_of(given).name}
        if given.get("epoch_start") == 1 and given.get("model_state") is None:
            given["epoch_start"] = 0  # as published, where a fresh start is told so
        recipe = vars(cls.parser().parse_args(RECIPES[given.get("recipe") or "none"].split()))
        if given.get("max_ms") is not None:  # the one budget instead of the other
            recipe["max_flops"] = None
        return super().of(recipe | {name: value for name, value in given.items() if value is not None})

    def continued(self, given: Mapping[str, Any], run: object) -> Self:
        """As `Options.continued`; a data set is the same by any of its names."""
        if not given.get("data"):
            return super().continued(given, run)
        if given["data"] in DATASETS:
            return super().continued({**given, "data": DATASETS[given["data"]].name}, run)
        folder = given.get("data_path") or given["data"]  # own data that may have moved
        return super().continued({**given, "data": Path(given["data"]).name, "data_path": folder}, run)

    @classmethod
    def chosen(cls, name: str, values: Mapping[str, Any]) -> object:
        return _default_of(_dataset_of(values), name)

    @classmethod
    def chosen_text(cls, name: str) -> str:
        """The default that each data set has; one alone where all have the same."""
        values: dict[str, list[str]] = {}
        for key, dataset in DATASETS.items():
            if key == dataset.name:
                value = _default_of(dataset, name)
                values.setdefault(" ".join(map(str, value)) if isinstance(value, tuple) else str(value), []).append(key)
        if len(values) == 1:
            return next(iter(values))
        return ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items())

    @classmethod
    def read(cls, run: Path) -> tuple[Self, dict]:
        """The settings in config.json of a run folder, and the facts that stand there too; settings that it lacks have
        their defaults.

        Raises InputError if there is none, it is a published one, or a setting is not what its flag would accept.
        """
        if published.read_config(run):
            raise InputError(
                f"{run}: is a run of the published code; go on with it by --history, --model_state and --epoch_start"
            )
        try:
            config = json.loads(read_text(run / "config.json"))
            if not isinstance(config, dict) or not isinstance(config.get("data"), str):
                raise ValueError("not the settings of a training")
            config.setdefault("max_flops", "none")  # a run of the time before there were budgets
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{run}: is no run folder (config.json: {error}); name <output>/<exp_name>/<data>/<id>"
            ) from error
        try:
            definition = config.get("definition")
            if definition is not None:
                definition = as_dict(of_dict(definition))
            given = vars(cls.parser().parse_args(cls.flags(config | ({"data": None} if definition else {}))))
            known = {"precision": config.get("precision"), "definition": definition}
            padded = definition is None and _dataset_of(given).preprocessing.min_size is not None
            known["padding_counts"] = config.get("padding_counts", padded)
            settings = cls.of(given | known)
            if type(settings.padding_counts) is not bool:
                raise InputError(f"padding_counts is {settings.padding_counts!r}")
            if settings.precision not in (None, "float32", "bfloat16"):
                raise InputError(f"precision is {settings.precision!r}")
            for name, value in settings.as_dict().items():
                if name in config and config[name] != value:
                    raise InputError(f"{name} is {config[name]!r}")
            facts = {key: value for key, value in config.items() if key not in settings.as_dict()}
            _check_facts(facts)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{run / 'config.json'}: is damaged ({error}); name another run") from error
        return settings, facts

    def of_all_ranks(self) -> dict:
        """What the processes of a training must agree on: all but where each finds its data and what it computes on."""
        free = {f.name for f in fields(self) if f.metadata["resume"] == "changes" and f.name != "epochs"}
        return {key: value for key, value in self.as_dict().items() if key not in free}

    @cached_property
    def dataset(self) -> BaseDataset:
        dataset = _dataset_of({"data": self.data, "definition": self.definition})
        if not self.padding_counts:
            return dataset
        return replace(dataset, preprocessing=replace(dataset.preprocessing, padding_counts=True))

    @property
    def has_budget(self) -> bool:
        """Whether it is pruned until it fits one; a flat network fits its own from the start."""
        return self.prunes and (self.max_flops != "none" or self.max_ms is not None)

    @property
    def prunes(self) -> bool:
        return self.model == "sauron" and not self.no_prune

    def __post_init__(self) -> None:
        """Raise InputError where settings do not fit one another."""
        if Path(self.exp_name).name != self.exp_name or self.exp_name in ("", ".."):
            raise InputError(f"--exp_name {self.exp_name}: must be the name of one folder; say where with --output")
        first, last = self.prune_between
        if share_of(first) >= share_of(last):
            raise InputError(f"--prune_between {first} {last}: the first moment must come before the second")
        what = f"--model {self.model}" if self.model != "sauron" else "--no_prune"
        if not self.prunes and self.recipe != "none":
            raise InputError(f"--recipe {self.recipe}: nothing is pruned with {what}; leave one of them out")
        if not self.prunes and (self.max_ms or self.max_flops != "none" and self.model != "flat"):
            flag = "--max_ms" if self.max_ms else "--max_flops"
            raise InputError(f"{flag}: nothing is pruned with {what}; leave one of them out")
        if not self.prunes and self.width_multiple > 1 and self.model != "flat":
            raise InputError(f"--width_multiple {self.width_multiple}: no width is chosen with {what}; leave it out")
        if self.model == "flat" and (self.in_filters or self.out_filters):
            flag = "--out_filters" if self.out_filters else "--in_filters"
            raise InputError(f"{flag}: --model flat has one width in every block; leave one of them out")
        if self.model != "sauron" and self.loss == "DS_CrossEntropyDiceLoss_Distance":
            raise InputError("--loss DS_CrossEntropyDiceLoss_Distance measures distances: it needs --model sauron")
        self._check_data()
        self._check_patch()
        if self.optim == "sgd" and self.nesterov and self.momentum == 0:
            raise InputError("--nesterov True needs a --momentum above 0")
        if self.epoch_start and not self.model_state:
            raise InputError("--epoch_start needs --model_state: the model of that epoch")

    def _check_patch(self) -> None:
        """Raise InputError unless patch, levels, strides and kernels fit one another."""
        n_axes = 2 if self.dim == "2D" else 3
        if len(self.patch_size) != n_axes:
            raise InputError(f"--patch_size needs {n_axes} numbers for {self.data}, not {len(self.patch_size)}")
        for key, rows in (("strides", self.strides), ("kernels", self.kernels)):
            if rows and [*map(len, rows)] != [n_axes] * self.levels:
                raise InputError(
                    f"--{key} {' '.join(rows)}: --levels {self.levels} needs {self.levels} words of {n_axes} digits"
                )
        if self.strides and set(self.strides[0]) != {"1"}:
            raise InputError(
                f"--strides {' '.join(self.strides)}: the first level has the image's size: {'1' * n_axes}"
            )
        if even := [word for word in self.kernels or () if set(word) & set("2468")]:
            raise InputError(f"--kernels {even[0]}: the size of a convolution must be odd")
        text = " ".join(map(str, self.patch_size))
        for size, factor in zip(self.patch_size, self.divisor, strict=True):
            if size % factor or size < 2 * factor and (size, factor) != (1, 1):
                by = f"--strides {' '.join(self.strides)}" if self.strides else f"--levels {self.levels}"
                axis = f"{size} must" if self.strides else "each axis must"
                raise InputError(
                    f"--patch_size {text}: with {by} {axis} be a multiple of {factor} and at least {2 * factor}"
                    + ("" if self.strides else f", {size} is not")
                )

    def _check_data(self) -> None:
        """Raise InputError where a setting does not go with the data set."""
        if self.dim != self.dataset.dim:
            raise InputError(f"--dim {self.dim}: {self.data} is {self.dataset.dim}; leave it out")
        own = {f.name: f for f in fields(self) if f.name in OWN}
        for name, f in own.items():
            default = None if name == "fold" else f.metadata["default"]
            if self.definition is None and getattr(self, name) != default:
                raise InputError(f"--{name}: is for a folder in nnU-Net's raw format; leave it out with {self.data}")

    @property
    def divisor(self) -> tuple[int, ...]:
        """By axis: what the patch must be a multiple of."""
        if not self.strides:
            return (2 ** (self.levels - 1),) * len(self.patch_size)
        return tuple(math.prod(map(int, axis)) for axis in zip(*self.strides, strict=True))


def _check_facts(facts: dict) -> None:
    """Raise InputError where what was noted of a run, then or when it was continued, has another type."""
    continued = facts.get("continued", [])
    if not isinstance(continued, list) or not all(isinstance(times, dict) for times in continued):
        raise InputError(f"continued is {continued!r}")
    if not all({"command", "after_epoch"} <= set(times) for times in continued):
        raise InputError("continued lacks a command or an epoch")
    for written in (facts, *continued):
        for key, kind in (("command", str), ("machine", str), ("git_revision", str | None), ("versions", dict)):
            if key in written and not isinstance(written[key], kind):
                raise InputError(f"{key} is {written[key]!r}")

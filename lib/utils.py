"""What the scripts share: arguments and their checks, the device, and the facts that make a run repeatable."""

import argparse
import json
import math
import os
import shlex
from pathlib import Path

import torch

from lib import published
from lib.data import DATASETS
from lib.distance import DISTANCES, IMPORTANCES
from lib.loss import LOSSES
from lib.models import MODELS
from lib.system import distributed
from lib.system.cli import Parser, boolean, number, one_of
from lib.system.error import InputError
from lib.system.files import read_text

# Settings that a run may change when it is continued; all others stay what they were.
CHANGEABLE = {"epochs", "device", "num_workers", "data_path", "cache_path", "compile"}
# Flags that say where to start or continue; they are no settings of a run.
STARTING = {"epoch_start", "model_state", "history", "resume", "accept_changed_data"}
BUDGET_MOMENTS = ("10%", "60%")  # --prune_between with a budget


def percent(text: str) -> str:
    """An argparse type: a share such as 80%, which stays text; `share_of` has its value."""
    try:
        valid = text.endswith("%") and 0 <= share_of(text) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0% and 100%")
    return text


def share_of(text: str) -> float:
    """0.8 for "80%"."""
    return float(text.removesuffix("%")) / 100


def flops_limit(text: str) -> str:
    """An argparse type: "none", a share of the unpruned network (20%) or a number (2G), which stays text;
    `flops_of` has its value."""
    try:
        valid = text == "none" or 0 < flops_of(text, 1) < math.inf and not (text.endswith("%") and share_of(text) > 1)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 20%, nor a number such as 2G, nor none")
    return text


def flops_of(text: str, unpruned: float) -> float | None:
    """FLOPs of a limit: 2e9 for "2G", a fifth of `unpruned` for "20%", None for "none"."""
    if text == "none":
        return None
    if text.endswith("%"):
        return share_of(text) * unpruned
    factor = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:])
    return float(text[:-1]) * factor if factor else float(text)


def pruning_arguments(config: dict, unpruned_flops: int) -> dict | None:
    """The arguments of the callback that prunes by the paper's rule, or to a budget; None where nothing is pruned."""
    if config["model"] == "nnunet" or config["no_prune"]:
        return None
    first, last = (share_of(moment) * config["epochs"] for moment in config["prune_between"])
    arguments = {
        "between": (first, last),
        "min_filters": config["min_filters"],
        "max_prune_fraction": config["max_prune_fraction"] or 1.0,
    }
    if has_budget(config):
        budget = {"max_flops": flops_of(config["max_flops"], unpruned_flops), "max_ms": config["max_ms"]}
        whole = math.floor(round(first, 6)), math.ceil(round(last, 6))  # the last one is to see the largest threshold
        return arguments | budget | {"between": whole}
    return arguments | {key: config[key] for key in ("tau_max", "kappa", "rho", "mu")}


def has_budget(config: dict) -> bool:
    return config["max_flops"] != "none" or config["max_ms"] is not None


def defaults_text(key: str) -> str:
    """The default of a setting that data sets choose, for --help."""
    values: dict[str, list[str]] = {}
    for name, dataset in DATASETS.items():
        if name == dataset.name:
            value = dataset.patch_size if key == "patch_size" else dataset.defaults[key]
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            values.setdefault(text.replace("%", "%%"), []).append(name)
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items())


def parseArguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of train.py. A flag that was not given is None: `make_config` fills it in.

    Raises InputError for a wrong one.
    """
    args = _parser().parse_args(argv)
    if args.data is None and args.resume is None:
        raise InputError("--data is needed: one of " + ", ".join(sorted(DATASETS)))
    if args.accept_changed_data and not (args.resume or args.history):
        raise InputError("--accept_changed_data: has a meaning only with --resume or --history; leave it out")
    if args.history and not (args.model_state and args.epoch_start):
        raise InputError("--history needs --model_state and --epoch_start: the model, and the epoch it was saved after")
    return args


def _parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train a Sauron (or nnUNet) segmentation network, pruning its filters on the way.",
        epilog="Defaults that a data set chooses are listed with its name.",
    )
    positive, maps, seed = number(int, 1, 10**6), number(int, 1, 480), number(int, 0, 2**63 - 1)
    fraction = number(float, 0, 1)

    def add(group: argparse._ArgumentGroup, flag: str, text: str, default: str | None = None, **kwargs) -> None:
        key = kwargs.get("dest", flag.lstrip("-"))
        group.add_argument(
            flag, help=f"{text} (default: {defaults_text(key) if default is None else default})", **kwargs
        )

    data = parser.add_argument_group("data")
    names = sorted(DATASETS)
    data.add_argument(
        "--data", required=False, **one_of(names), help=f"data set: {', '.join(names)} (needed, but with --resume)"
    )
    add(data, "--data_path", "folder of the data set", "$SAURON_DATA/<data>, else data/<data>")
    add(data, "--cache_path", "folder for preprocessed volumes", "data/preprocessed")
    add(data, "--split", "training:validation shares of what is no test set, such as 0.9:0.1 or 1:0")
    add(data, "--seed_data", "seed of the split", type=seed)
    add(
        data,
        "--num_workers",
        "processes that load data (for each process of torchrun), 0 for none; results do not depend on it",
        "cores - 1, at most 4",
        type=number(int, 0, 256),
    )

    run = parser.add_argument_group("run")
    add(run, "--exp_name", "name of the experiment", "unnamed")
    add(run, "--output", "folder of the runs", "runs")
    add(run, "--device", "auto, cpu, cuda, cuda:N or mps; auto takes a GPU if there is one", "auto")
    add(run, "--seed_train", "seed of weights, augmentation and pruning", type=seed)

    run.add_argument(
        "--save_fms",
        action="store_true",
        default=None,
        help="save the feature maps of one validation image in RUN/fms, for lib.experiments.clusterability "
        "(default: do not)",
    )
    add(run, "--save_fms_every", "save them in every n-th epoch", "1", type=positive, metavar="N")

    run.add_argument(
        "--amp",
        action="store_true",
        default=None,
        help="let the network compute in bfloat16 where that is safe and, on the CPU, faster; not for 3D on the CPU "
        "(default: float32 throughout)",
    )
    run.add_argument(
        "--compile",
        action="store_true",
        default=None,
        help="let torch compile the network, at first and after each pruning, which takes a minute; on the CPU a "
        "training is slower with it (default: do not)",
    )

    network = parser.add_argument_group("network")
    add(
        network,
        "--model",
        "sauron or nnunet; nnunet measures no distances and is never pruned",
        "sauron",
        **one_of(MODELS),
    )
    add(
        network,
        "--fms_init",
        "filters of the first level; each level doubles them, up to 480",
        type=maps,
    )
    add(network, "--levels", "levels of the network, at least 3", type=number(int, 3, 12))
    add(
        network,
        "--patch_size",
        "size of the training patch in voxels, a multiple of 2^(levels - 1)",
        type=number(int, 1, 2**14),
        nargs="+",
    )
    add(
        network,
        "--in_filters",
        "file with the input channels of each block: start with the widths of its last row",
        "none",
    )
    add(network, "--out_filters", "file with the filters of each block, likewise", "none")

    training = parser.add_argument_group("training")
    add(
        training,
        "--loss",
        "loss function",
        "DS_CrossEntropyDiceLoss_Distance; for nnunet or --lambda 0 DS_CrossEntropyDiceLoss",
        **one_of(LOSSES),
    )
    add(training, "--epochs", "number of epochs", type=positive)
    add(training, "--batch_size", "patches per step, of all processes together", type=positive)
    add(training, "--val_interval", "validate every so many epochs", type=positive)
    add(training, "--optim", "optimizer", **one_of(["adam", "sgd"]))
    add(
        training,
        "--lr",
        "learning rate of the first epoch; it falls to 0 as lr * (1 - e / epochs)^0.9, and once more after a budget is "
        "met",
        type=number(float, 0, 10, open_low=True),
    )
    add(training, "--wd", "weight decay", type=fraction)
    add(training, "--momentum", "momentum of sgd", type=fraction)
    add(training, "--nesterov", "True or False: Nesterov momentum for sgd", type=boolean)

    pruning = parser.add_argument_group("pruning")
    add(
        pruning,
        "--lambda",
        "weight of the distance term of the loss",
        dest="lambda_",
        type=number(float, 0, 1e6),
        metavar="LAMBDA",
    )
    add(pruning, "--dist_fun", "delta_opt, the distance in the loss", "euc_norm", **one_of(DISTANCES))
    add(
        pruning,
        "--imp_fun",
        "delta_prune, the distance that is compared with the thresholds; random deals its values to the filters of a "
        "block at random",
        "euc_rand",
        **one_of(IMPORTANCES),
    )
    pruning.add_argument(
        "--no_prune",
        action="store_true",
        default=None,
        help="train with the distance term, delete nothing (default: prune)",
    )
    add(
        pruning,
        "--max_flops",
        "budget: prune until this share of the unpruned network's FLOPs (20%%), or this number (2G), is left; none: "
        "by the paper's rule",
        type=flops_limit,
        metavar="LIMIT",
    )
    add(
        pruning,
        "--max_ms",
        "budget: prune until one patch takes so many milliseconds (median, on the device of the run)",
        "none",
        type=number(float, 0, 1e9, open_low=True),
        metavar="N",
    )
    add(
        pruning,
        "--min_filters",
        "a block keeps so many filters at least (one that feeds a head: as many as there are classes, too; but with 1, "
        "as published, one filter stays anywhere)",
        type=maps,
    )
    add(
        pruning,
        "--max_prune_fraction",
        "a block loses at most this share of its filters in an epoch",
        "none",
        type=number(float, 0, 1, open_low=True),
        metavar="SHARE",
    )
    add(pruning, "--tau_max", "largest threshold, without a budget", type=number(float, 0.001, 1))
    add(pruning, "--kappa", "number of steps from 0.001 to tau_max", type=positive)
    add(pruning, "--rho", "patience: epochs between two steps, and losses that are looked back at", type=positive)
    add(pruning, "--mu", "a block that lost this share of its filters waits", type=fraction)

    add(
        pruning,
        "--prune_between",
        "prune only between these two moments, in percent of the epochs; on the way to a budget the thresholds climb "
        "from one to the other",
        defaults_text("prune_between") + "; with a budget " + " ".join(BUDGET_MOMENTS).replace("%", "%%"),
        type=percent,
        nargs=2,
        metavar=("FROM", "TO"),
    )

    start = parser.add_argument_group("continue")
    add(
        start,
        "--resume",
        "run folder to continue after its last finished epoch, with its own settings",
        "none",
        metavar="RUN",
    )
    start.add_argument(
        "--accept_changed_data",
        action="store_true",
        default=None,
        help="go on although training or validation subjects are not those of the run any more (default: refuse)",
    )
    add(
        start,
        "--epoch_start",
        "continue after this epoch; 1 without --model_state is a fresh start, as published",
        "0",
        type=number(int, 0, 10**6),
    )
    add(start, "--model_state", "saved model (models/model-E) to start from", "none")
    add(
        start,
        "--history",
        "run folder that holds the optimizer, thresholds, histories and random states of that epoch; from a run of the "
        "published code, which has thresholds and histories alone, a new run goes on",
        "none",
        metavar="RUN",
    )
    return parser


def make_config(args: argparse.Namespace) -> dict:
    """All settings of a new run: what was given, else the data set's and the published defaults. JSON-able.

    Raises InputError where settings do not fit one another.
    """
    given = {key: value for key, value in vars(args).items() if value is not None}
    if given.get("epoch_start") == 1 and "model_state" not in given:
        given["epoch_start"] = 0  # as published, where a fresh start is told so
    dataset = DATASETS[given["data"]]
    config = {
        "cache_path": "data/preprocessed",
        "data_path": None,
        "exp_name": "unnamed",
        "output": "runs",
        "device": "auto",
        "num_workers": min(4, (os.cpu_count() or 1) - 1),
        "model": "sauron",
        "dist_fun": "euc_norm",
        "imp_fun": "euc_rand",
        "no_prune": False,
        "max_ms": None,
        "max_prune_fraction": None,
        "amp": False,
        "compile": False,
        "save_fms": False,
        "save_fms_every": 1,
        "in_filters": None,
        "out_filters": None,
        "patch_size": dataset.patch_size,
        **dataset.defaults,
        "epoch_start": 0,
        "model_state": None,
        **given,
        "data": dataset.name,
        "modalities": dataset.modalities,
        "n_classes": dataset.n_classes,
        "dim": dataset.dim,
    }
    if config["model"] == "nnunet" or config["no_prune"] or config["max_ms"] is not None:
        config["max_flops"] = given.get("max_flops", "none")  # what a data set chooses gives way
    if has_budget(config) and "prune_between" not in given:
        config["prune_between"] = BUDGET_MOMENTS
    for key in ("patch_size", "prune_between"):
        config[key] = list(config[key])
    distances = config["model"] == "sauron" and config["lambda_"] > 0
    config.setdefault("loss", "DS_CrossEntropyDiceLoss_Distance" if distances else "DS_CrossEntropyDiceLoss")
    check_config(config)
    return config


def check_config(config: dict) -> None:
    """Raise InputError where settings do not fit one another."""
    if Path(config["exp_name"]).name != config["exp_name"] or config["exp_name"] in ("", ".."):
        raise InputError(f"--exp_name {config['exp_name']}: must be the name of one folder; say where with --output")
    first, last = config["prune_between"]
    if share_of(first) >= share_of(last):
        raise InputError(f"--prune_between {first} {last}: the first moment must come before the second")
    if has_budget(config) and (config["model"] == "nnunet" or config["no_prune"]):
        flag = "--max_ms" if config["max_ms"] else "--max_flops"
        what = "--no_prune" if config["no_prune"] else "--model nnunet"
        raise InputError(f"{flag}: nothing is pruned with {what}; leave one of them out")
    if config["model"] == "nnunet" and config["loss"] == "DS_CrossEntropyDiceLoss_Distance":
        raise InputError("--loss DS_CrossEntropyDiceLoss_Distance measures distances: it needs --model sauron")
    n_axes = 2 if config["dim"] == "2D" else 3
    factor = 2 ** (config["levels"] - 1)
    patch = config["patch_size"]
    if len(patch) != n_axes:
        raise InputError(f"--patch_size needs {n_axes} numbers for {config['data']}, not {len(patch)}")
    for size in patch:
        if size % factor or size < 2 * factor:
            raise InputError(
                f"--patch_size {' '.join(map(str, patch))}: with --levels {config['levels']} each axis must be a "
                f"multiple of {factor} and at least {2 * factor}, {size} is not"
            )
    if config["optim"] == "sgd" and config["nesterov"] and config["momentum"] == 0:
        raise InputError("--nesterov True needs a --momentum above 0")
    if config["epoch_start"] and not config["model_state"]:
        raise InputError("--epoch_start needs --model_state: the model of that epoch")


def check_amp(config: dict, device: torch.device) -> None:
    """Raise InputError where --amp would spoil a training: on the CPU, torch's bfloat16 gradients of 3D convolutions
    are not to be relied on where maps are a few voxels thin."""
    if config["amp"] and config["dim"] == "3D" and device.type == "cpu":
        raise InputError(
            "--amp: gradients of 3D networks in bfloat16 are unsafe on the CPU; leave it out, or use a GPU"
        )


def continued_config(args: argparse.Namespace, saved: dict, run: Path) -> dict:
    """The settings of a run that is continued: its own, but for those that may change. Raises InputError on others."""
    config = dict(saved)
    for key, value in vars(args).items():
        if value is None or key in STARTING:
            continue
        if key == "data":
            value = DATASETS[value].name
        if key in CHANGEABLE:
            config[key] = value
        elif value != saved.get(key):
            flag = "--lambda" if key == "lambda_" else f"--{key}"
            raise InputError(
                f"{flag} {value}: the run {run} has {saved.get(key)}; leave the flag out, or start a new run"
            )
    return config


def settings_of(args: argparse.Namespace) -> tuple[Path | None, dict]:
    """The run folder that is continued, None for a new run, and all settings of the training. What goes on from a
    published run is a new run.

    Raises InputError where settings do not fit one another, the earlier run, or the number of processes.
    """
    run = Path(args.resume or args.history) if args.resume or args.history else None
    if run and not args.resume and published.read_config(run) is not None:
        run, config = None, make_config(with_published(args, run))
    else:
        config = continued_config(args, read_config(run), run) if run else make_config(args)
    for key in ("tau_max", "kappa", "rho", "mu"):
        if has_budget(config) and getattr(args, key) is not None:
            raise InputError(f"--{key}: has no meaning with a budget; leave it out, or give --max_flops none")
    if config["batch_size"] < distributed.world_size():
        raise InputError(
            f"--batch_size {config['batch_size']}: is divided among {distributed.world_size()} processes; each needs a "
            "patch"
        )
    return run, config


def with_published(args: argparse.Namespace, run: Path) -> argparse.Namespace:
    """`args`, and what the published run folder `run` says of settings that they do not give.

    Raises InputError if it is a run of another data set, or says what no flag accepts.
    """
    data = (published.read_config(run) or {}).get("data")
    if data and DATASETS.get(data["name"]) is not DATASETS[args.data]:
        raise InputError(f"--data {args.data}: the run {run} has {data['name'][:40]!r}; give its data set")
    said = published.settings(run, Path(args.model_state))
    try:
        said = parseArguments(
            _flags({"data": args.data} | {key: said[key] for key in said if getattr(args, key) is None})
        )
    except InputError as error:
        raise InputError(f"{run / 'config.json'}: {error}; give this flag yourself") from error
    return argparse.Namespace(**vars(said) | {key: value for key, value in vars(args).items() if value is not None})


def read_config(run: Path) -> dict:
    """config.json of a run folder; settings that it lacks have their defaults.

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
        settings = make_config(parseArguments(_flags(config)))
        for key, value in settings.items():
            if key in config and config[key] != value:
                raise InputError(f"{key} is {config[key]!r}")
        _check_facts(config)
    except InputError as error:
        raise InputError(f"{run / 'config.json'}: is damaged ({error}); name another run") from error
    return config | settings


def _check_facts(config: dict) -> None:
    """Raise InputError where what `facts` wrote, then or when the run was continued, has another type."""
    continued = config.get("continued", [])
    if not isinstance(continued, list) or not all(isinstance(times, dict) for times in continued):
        raise InputError(f"continued is {continued!r}")
    if not all({"command", "after_epoch"} <= set(times) for times in continued):
        raise InputError("continued lacks a command or an epoch")
    if config.get("precision", "float32") not in ("float32", "bfloat16"):
        raise InputError(f"precision is {config['precision']!r}")
    for written in (config, *continued):
        for key, kind in (("command", str), ("machine", str), ("git_revision", str | None), ("versions", dict)):
            if key in written and not isinstance(written[key], kind):
                raise InputError(f"{key} is {written[key]!r}")


def _flags(config: dict) -> list[str]:
    """The command line that gives the settings of a config.json."""
    argv = ["--data", config["data"]]
    for action in _parser()._actions:
        key, value = action.dest, config.get(action.dest)
        if value is None or value is False or key in ("data", "help", "resume", "history"):
            argv += [f"{action.option_strings[0]}=False"] * (value is False and action.nargs != 0)
        elif action.nargs == 0:
            argv.append(action.option_strings[0])
        elif isinstance(value, list):
            argv += [action.option_strings[0], *map(str, value)]
        else:
            argv.append(f"{action.option_strings[0]}={value}")
    if any("\0" in part for part in argv):
        raise InputError("a setting holds a null character")
    return argv


def resume_command(run: Path) -> str:
    """The command line that continues a run as it was started."""
    n = distributed.world_size()
    script = "python" if n == 1 else f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return f"{script} train.py --resume {shlex.quote(str(run))}"

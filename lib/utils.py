"""The command line of a training: which run it names, and with which settings."""

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib import published
from lib.data import DATASETS, raw
from lib.data.BaseDataset import BaseDataset
from lib.settings import Settings, data_argument
from lib.system import distributed
from lib.system.error import InputError


def parseArguments(argv: list[str] | None = None, kind: type[Settings] = Settings) -> argparse.Namespace:
    """The arguments of train.py. A flag that was not given is None: `Settings.of` fills it in.

    Raises InputError for a wrong one.
    """
    parser = kind.parser()
    group = parser.add_argument_group("resume")
    group.add_argument(
        "--resume",
        metavar="RUN",
        help="run folder to continue after its last finished epoch, with its own settings (default: none)",
    )
    group.add_argument(
        "--accept_changed_data",
        action="store_true",
        default=None,
        help="go on although training or validation subjects are not those of the run any more (default: refuse)",
    )
    export_help = "at the end, export the model to RUN/model.onnx, as python -m lib.export does (default: do not)"
    parser.add_argument_group("export").add_argument("--export", action="store_true", help=export_help)
    plan_help = "print the plan of own data and what this machine can do with it, and train nothing (default: train)"
    parser.add_argument_group("instead of a training").add_argument("--plan_only", action="store_true", help=plan_help)
    args = parser.parse_args(argv)
    if args.data is None and args.resume is None:
        raise InputError("--data is needed: one of " + ", ".join(sorted(DATASETS)))
    if args.accept_changed_data and not (args.resume or args.history):
        raise InputError("--accept_changed_data: has a meaning only with --resume or --history; leave it out")
    if args.history and not (args.model_state and args.epoch_start):
        raise InputError("--history needs --model_state and --epoch_start: the model, and the epoch it was saved after")
    return args


def settings_of(
    args: argparse.Namespace, kind: type[Settings] = Settings, definition: dict | None = None
) -> tuple[Path | None, Settings, dict]:
    """The run folder that is continued, None for a new run; all settings of the training; and the facts that the
    earlier run noted. What goes on from a published run is a new run. `definition`: of own data, as it was planned.

    Raises InputError where settings do not fit one another, the earlier run, or the number of processes.
    """
    given = vars(args) | {"definition": definition}
    if definition:
        given["data_path"] = args.data
    run, facts = Path(args.resume or args.history) if args.resume or args.history else None, {}
    if run and not args.resume and published.read_config(run) is not None:
        given, run = with_published(given, run, kind), None
    if run:
        settings, facts = kind.read(run)
        settings = settings.continued(given, run)
    else:
        settings = kind.of(given)
    for key in ("tau_max", "kappa", "rho", "mu"):
        if settings.has_budget and getattr(args, key) is not None:
            raise InputError(f"--{key}: has no meaning with a budget; leave it out, or give --max_flops none")
    if settings.batch_size < distributed.world_size():
        raise InputError(
            f"--batch_size {settings.batch_size}: is divided among {distributed.world_size()} processes; each needs a "
            "patch"
        )
    return run, settings, facts


def dataset_of(text: str) -> BaseDataset:
    """The data set that --data of predict.py and evaluate.py names: a known one, a folder in nnU-Net's raw format
    (whose plan is not known), or that of a run folder.

    Raises InputError if it is none of these.
    """
    run = Path(text)
    if text.lower() not in DATASETS and (run / "config.json").is_file():
        return Settings.read(run)[0].dataset
    try:
        name = data_argument(text)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"--data: {error}") from error
    return DATASETS[name] if name in DATASETS else raw.read_dataset(Path(name))


def with_published(given: Mapping[str, Any], run: Path, kind: type[Settings] = Settings) -> dict[str, Any]:
    """What is given, and what the published run folder `run` says of the other settings.

    Raises InputError if it is a run of another data set, or says what no flag accepts.
    """
    data = (published.read_config(run) or {}).get("data")
    if data and DATASETS.get(data["name"]) is not DATASETS.get(given["data"]):
        raise InputError(f"--data {given['data']}: the run {run} has {data['name'][:40]!r}; give its data set")
    said = {key: v for key, v in published.settings(run, Path(given["model_state"])).items() if given.get(key) is None}
    try:
        said = vars(parseArguments(kind.flags({"data": given["data"]} | said), kind))
    except InputError as error:
        raise InputError(f"{run / 'config.json'}: {error}; give this flag yourself") from error
    return {**said, **{key: value for key, value in given.items() if value is not None}}


def resume_command(run: Path) -> str:
    """The command line that continues a run as it was started."""
    n = distributed.world_size()
    script = "python" if n == 1 else f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
    return f"{script} train.py --resume {shlex.quote(str(run))}"

#!/usr/bin/env python3
"""Train a network: python train.py --data phantom"""

import shlex
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from lib import checkpoint
from lib.callback import callbacks, fixed_image, tensorboard
from lib.checkpoint import TrainingState
from lib.data import DATASETS
from lib.error import InputError
from lib.experiments.report import report_training
from lib.lock import locked
from lib.log import Log
from lib.loss import LOSSES
from lib.models import build_model, compile_model, summary
from lib.models.BaseModel import read_state
from lib.stop import Stopped
from lib.trainer import build_optimizer, fit
from lib.utils import (
    continued_config,
    facts,
    find_device,
    make_config,
    parseArguments,
    read_config,
    run_script,
    share_of,
)


def train(argv: list[str] | None, held: ExitStack) -> None:
    """Train as `argv` says; `held` keeps the lock of the run folder."""
    args = parseArguments(argv)
    if args.history and not (args.model_state and args.epoch_start):
        raise InputError("--history needs --model_state and --epoch_start: the model, and the epoch it was saved after")
    run = Path(args.resume or args.history) if args.resume or args.history else None
    if run:
        config = continued_config(args, read_config(run), run)
        held.enter_context(locked(run))
        epoch = checkpoint.newest_epoch(run) if args.resume else args.epoch_start
    else:
        config, epoch = make_config(args), None
    if epoch is None:  # from the beginning
        epoch, source, progress = config["epoch_start"], config["model_state"] and Path(config["model_state"]), None
    else:
        source = Path(args.model_state or run / "models" / f"model-{epoch}")
        progress = checkpoint.read_training(run / "models" / f"state-{epoch}")
    if epoch >= config["epochs"]:
        raise InputError(f"--epochs {config['epochs']}: epoch {epoch} is finished; give a larger number to go on")
    device = find_device(config["device"])
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)

    torch.manual_seed(config["seed_train"])
    weights = read_state(source) if source else None
    unpruned = config | {"in_filters": None, "out_filters": None}
    model = build_model(config if progress is None else unpruned, weights, source)
    data = DATASETS[config["data"]](
        data_path=config["data_path"],
        cache_path=config["cache_path"],
        split=config["split"],
        seed_data=config["seed_data"],
        patch_size=tuple(config["patch_size"]),
        batch_size=config["batch_size"],
        num_workers=config["num_workers"],
        seed_train=config["seed_train"],
    )
    data.prepare()
    save_fms = {"image": fixed_image(data), "every": config["save_fms_every"]} if config["save_fms"] else None
    model.initialize(device=device, model_state=source, isSauron=config["model"] == "sauron")
    if config["compile"]:
        compile_model(model, device)

    folder = run or checkpoint.new_run_folder(config)
    if run is None:
        held.enter_context(locked(folder))
    log = Log(folder / "log.txt")
    for place in (folder, folder / "models"):
        checkpoint.sweep(place)
    if run is None:
        checkpoint.write_json(folder / "config.json", config | facts())
    else:
        continued = [*config.get("continued", []), {"after_epoch": epoch} | facts()]
        checkpoint.write_json(folder / "config.json", config | {"continued": continued})
    log(f"run folder: {folder}")
    log(f"{config['data']}: " + ", ".join(f"{len(ids)} {name}" for name, ids in data.ids.items()))
    if data.n_missing:
        log(f"{config['data']}: {data.n_missing} subjects are not on disk; the split is that of the whole data set")
    log(f"{config['model']} on {device}: weights " + (f"of {source}" if source else "new"))
    for damaged in (later for later in checkpoint.saved_epochs(folder) if later > epoch and args.resume):
        log(f"model or state of epoch {damaged} is damaged; continuing after epoch {epoch}, the newest good one")

    state = TrainingState(
        model, build_optimizer(config, model), folder, log, epoch, validates=bool(data.ids["validation"])
    )
    patch_size = tuple(config["patch_size"])
    state.unpruned = summary(build_model(unpruned), patch_size)
    if progress is not None:
        checkpoint.restore(state, progress)
    pruning = None
    if config["model"] == "sauron" and not config["no_prune"]:
        pruning = {key: config[key] for key in ("tau_max", "kappa", "rho", "mu")}
        pruning["between"] = tuple(share_of(moment) * config["epochs"] for moment in config["prune_between"])
        if not state.validates:
            log("no validation set: thresholds rise by the training loss alone")
    loss = LOSSES[config["loss"]]
    criterion = loss(config["lambda_"]) if loss.uses_distances else loss()
    try:
        with tensorboard(folder, epoch) as writer:
            fit(
                state,
                criterion,
                data,
                callbacks(
                    patch_size=patch_size,
                    epochs=config["epochs"],
                    class_names=data.class_names,
                    writer=writer,
                    pruning=pruning,
                    save_fms=save_fms,
                ),
                epochs=config["epochs"],
                lr=config["lr"],
                val_interval=config["val_interval"],
                prune=pruning is not None,
                device=device,
                amp=config.get("amp", False),
            )
    except Stopped as stopped:
        log(f"{stopped}; to continue: python train.py --resume {shlex.quote(str(folder))}")
        raise
    for key, before in state.unpruned.items():
        now = state.rows[-1][key]
        log(f"{key:<10} {before:>15,} -> {now:>15,} ({100 * now / before:.1f}%)")
    report_training(folder, device, log)


def main(argv: list[str] | None = None) -> int:
    """Train as `argv` says; returns the exit code of `run_script`."""
    with ExitStack() as held:
        return run_script(partial(train, argv, held))


if __name__ == "__main__":
    sys.exit(main())

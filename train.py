#!/usr/bin/env python3
"""Train a network: python train.py --data phantom"""

import argparse
import os
import shlex
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import torch

from lib import checkpoint, distributed
from lib.callback import callbacks, fixed_image, tensorboard
from lib.checkpoint import TrainingState
from lib.data import DATASETS
from lib.error import InputError
from lib.experiments.report import report_training
from lib.lock import locked
from lib.log import Log, no_log
from lib.loss import LOSSES
from lib.models import build_model, compile_model, summary
from lib.models.BaseModel import read_state
from lib.stop import Stopped
from lib.trainer import build_optimizer, fit
from lib.utils import (
    CHANGEABLE,
    LOST,
    continued_config,
    facts,
    find_device,
    make_config,
    parseArguments,
    pruning_arguments,
    read_config,
    run_script,
)


def train(argv: list[str] | None, held: ExitStack) -> None:
    """Train as `argv` says; `held` keeps the process group and the lock of the run folder."""
    held.enter_context(distributed.process_group())
    with distributed.agreed():
        args = parseArguments(argv)
        if args.history and not (args.model_state and args.epoch_start):
            raise InputError(
                "--history needs --model_state and --epoch_start: the model, and the epoch it was saved after"
            )
        run = Path(args.resume or args.history) if args.resume or args.history else None
        config = continued_config(args, read_config(run), run) if run else make_config(args)
        if config["batch_size"] < distributed.world_size():
            raise InputError(
                f"--batch_size {config['batch_size']}: is divided among {distributed.world_size()} processes; each "
                "needs a patch"
            )
        device = find_device(config["device"])
        if run and distributed.is_main():
            held.enter_context(locked(run))
    shared = {key: value for key, value in config.items() if key not in CHANGEABLE or key == "epochs"}
    distributed.check_same("the settings", shared)

    with distributed.agreed():
        epoch, source, progress = _starting_point(args, config, run)
        if epoch >= config["epochs"]:
            raise InputError(f"--epochs {config['epochs']}: epoch {epoch} is finished; give a larger number to go on")
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
        if distributed.local_rank() == 0:
            data.prepare()
    distributed.check_same("the subjects on disk", data.ids)
    with distributed.agreed():
        data.prepare()  # the other ranks find all that they need in the cache
        save_fms = {"image": fixed_image(data), "every": config["save_fms_every"]} if config["save_fms"] else None
        model.initialize(device=device, model_state=source, isSauron=config["model"] == "sauron")
        if config["compile"]:
            compile_model(model, device)

    with distributed.agreed():
        folder = _open_run_folder(run, config, epoch, facts(device), held) if distributed.is_main() else None
    folder = Path(distributed.broadcast_from_main(str(folder)))
    log = Log(folder / "log.txt") if distributed.is_main() else no_log
    log(f"run folder: {folder}")
    for note in data.notes:
        log(note)
    log(f"{config['data']}: " + ", ".join(f"{len(ids)} {name}" for name, ids in data.ids.items()))
    if data.n_missing:
        log(f"{config['data']}: {data.n_missing} subjects are not on disk; the split is that of the whole data set")
    for note in data.notes:
        log(note)
    processes = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    log(f"{config['model']} on {device}{processes}: weights " + (f"of {source}" if source else "new"))
    for damaged in (later for later in checkpoint.saved_epochs(folder) if later > epoch and args.resume):
        log(f"model or state of epoch {damaged} is damaged; continuing after epoch {epoch}, the newest good one")

    state = TrainingState(
        model, build_optimizer(config, model), folder, log, epoch, validates=bool(data.ids["validation"])
    )
    patch_size = tuple(config["patch_size"])
    state.unpruned = summary(build_model(unpruned), patch_size)
    if progress is not None:
        with distributed.agreed():
            checkpoint.restore(state, progress)
    pruning = None
    if config["model"] == "sauron" and not config["no_prune"]:
        pruning = pruning_arguments(config, state.unpruned["flops"])
        if not state.validates and "tau_max" in pruning:
            log("no validation set: thresholds rise by the training loss alone")
    loss = LOSSES[config["loss"]]
    criterion = loss(config["lambda_"]) if loss.uses_distances else loss()
    try:
        with tensorboard(folder, epoch) if distributed.is_main() else nullcontext() as writer:
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
        log(f"{stopped}; to continue: {_command()} --resume {shlex.quote(str(folder))}")
        distributed.broadcast_from_main(None)  # torchrun ends all when one has ended: let the line be written first
        raise
    except RuntimeError as error:
        if distributed.is_lost(error):
            log(f"{LOST}; to continue: {_command()} --resume {shlex.quote(str(folder))}")
        raise
    if distributed.is_main():
        for key, before in state.unpruned.items():
            now = state.rows[-1][key]
            log(f"{key:<10} {before:>15,} -> {now:>15,} ({100 * now / before:.1f}%)")
        report_training(folder, device, log)


def _starting_point(args: argparse.Namespace, config: dict, run: Path | None) -> tuple[int, Path | None, dict | None]:
    """The finished epoch after which to start, the model to start from, and what models/state-E holds."""
    epoch = checkpoint.newest_epoch(run) if args.resume else args.epoch_start if run else None
    if epoch is None:  # from the beginning
        return config["epoch_start"], config["model_state"] and Path(config["model_state"]), None
    source = Path(args.model_state or run / "models" / f"model-{epoch}")
    return epoch, source, checkpoint.read_training(run / "models" / f"state-{epoch}")


def _open_run_folder(run: Path | None, config: dict, epoch: int, about: dict, held: ExitStack) -> Path:
    """Make the run folder where `run` is none to continue, clear it of what was left there, and write config.json."""
    folder = run or checkpoint.new_run_folder(config)
    if run is None:
        held.enter_context(locked(folder))
    for place in (folder, folder / "models"):
        checkpoint.sweep(place)
    if run is None:
        checkpoint.write_json(folder / "config.json", config | about)
    else:
        continued = [*config.get("continued", []), {"after_epoch": epoch} | about]
        checkpoint.write_json(folder / "config.json", config | {"continued": continued})
    return folder


def _command() -> str:
    if distributed.world_size() == 1:
        return "python train.py"
    return f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']} train.py"


def main(argv: list[str] | None = None) -> int:
    """Train as `argv` says; returns the exit code of `run_script`."""
    with ExitStack() as held:
        return run_script(partial(train, argv, held))


if __name__ == "__main__":
    sys.exit(main())

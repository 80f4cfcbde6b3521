#!/usr/bin/env python3
"""Train a network: python train.py --data phantom"""

import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from lib import checkpoint, published
from lib.system import distributed  # before torch: see lib/__init__.py

# isort: split
import torch

from lib.build import (
    build_dataset,
    build_loss,
    build_model,
    build_optimizer,
    build_rule,
    build_unpruned,
    check_amp,
)
from lib.callback import callbacks, fixed_image, tensorboard
from lib.checkpoint import TrainingState
from lib.experiments.report import report_training
from lib.models import compile_model
from lib.models.BaseModel import read_state
from lib.models.size import summary
from lib.system.cli import LOST, run_script
from lib.system.device import faster_precision, find_device
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import locked
from lib.system.log import Log, no_log
from lib.system.process import Stopped, keep_freed_memory
from lib.trainer import fit, trial_step
from lib.utils import parseArguments, resume_command, settings_of


def train(argv: list[str] | None, held: ExitStack) -> None:
    """Train as `argv` says; `held` keeps the process group and the lock of the run folder."""
    held.enter_context(distributed.process_group())
    with distributed.agreed():
        args = parseArguments(argv)
        run, settings, earlier = settings_of(args)
        device = find_device(settings.device)
        check_amp(settings, device)
        if run and distributed.is_main():
            held.enter_context(locked(run))
    distributed.check_same("the settings", settings.of_all_ranks())

    with distributed.agreed():
        epoch = checkpoint.newest_epoch(run) if args.resume else args.epoch_start if run else None
        epoch, source, progress = checkpoint.starting_point(settings, run, epoch, args.model_state)
        if epoch >= settings.epochs:
            raise InputError(f"--epochs {settings.epochs}: epoch {epoch} is finished; give a larger number to go on")
        if device.type == "cpu":
            keep_freed_memory()
            torch.use_deterministic_algorithms(True)
        torch.manual_seed(settings.seed_train)
        weights = read_state(source) if source else None
        model = (
            build_model(settings, weights, source) if progress is None else build_unpruned(settings, weights, source)
        )
        history = published.read_history(Path(args.history), epoch, model) if args.history and run is None else None
        data = build_dataset(settings)
        if distributed.local_rank() == 0:
            data.prepare()
    distributed.check_same("the subjects on disk", data.ids)
    with distributed.agreed():
        data.prepare()  # the other ranks find all that they need in the cache
        content, changed = data.content(), {}
    distributed.check_same("the content of the data", content)
    with distributed.agreed():
        if run and distributed.is_main():
            changed = checkpoint.check_subjects(run, content, bool(args.accept_changed_data))
        save_fms = {"image": fixed_image(data), "every": settings.save_fms_every} if settings.save_fms else None
        model.initialize(device=device, model_state=source, isSauron=settings.model == "sauron")
        if settings.compile:
            compile_model(model, device)

    criterion, note = build_loss(settings), None
    if settings.precision is None:  # one that is continued keeps to its own, whatever the machine
        precision = "bfloat16" if settings.amp else "float32"
        if settings.amp and device.type == "cpu" and run is None:
            choice = faster_precision("a training step", trial_step(model, criterion, data.batch_size, data.patch_size))
            precision, note = distributed.broadcast_from_main(choice)  # one clock decides for all ranks
        settings = replace(settings, precision=precision)

    with distributed.agreed():
        folder = None
        if distributed.is_main():
            about = facts(device, "train.py") | ({"accepted_changed_data": sorted(changed)} if changed else {})
            folder = run or checkpoint.new_run_folder(settings)
            if run is None:
                held.enter_context(locked(folder))
            checkpoint.begin(folder, settings, about, earlier, epoch if run else None, content)
    folder = Path(distributed.broadcast_from_main(str(folder)))
    log = Log(folder / "log.txt") if distributed.is_main() else no_log
    log(f"run folder: {folder}")
    log(f"{settings.data}: " + ", ".join(f"{len(ids)} {name}" for name, ids in data.ids.items()))
    if data.n_missing:
        log(f"{settings.data}: {data.n_missing} subjects are not on disk; the split is that of the whole data set")
    accepted = [f"{subject} {what}: accepted" for subject, what in changed.items()]
    for text in [*data.notes, *accepted, *([note] if note else [])]:
        log(text)
    processes = f" in {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
    log(f"{settings.model} on {device}{processes}: weights " + (f"of {source}" if source else "new"))
    for note in history.notes if history else ():
        log(note)
    for damaged in (later for later in checkpoint.saved_epochs(folder) if later > epoch and args.resume):
        log(f"model or state of epoch {damaged} is damaged; continuing after epoch {epoch}, the newest good one")

    state = TrainingState(
        model, build_optimizer(settings, model), folder, log, epoch, validates=bool(data.ids["validation"])
    )
    state.unpruned = summary(build_unpruned(settings), data.patch_size)
    state.rule = build_rule(settings, state.unpruned["flops"], state.validates)
    if progress is not None:
        with distributed.agreed():
            checkpoint.restore(state, progress)
    if history:
        checkpoint.restore_published(state, history, data.patch_size)
    if settings.prunes and not settings.has_budget and not state.validates:
        log("no validation set: thresholds rise by the training loss alone")
    try:
        with tensorboard(folder, epoch) if distributed.is_main() else nullcontext() as writer:
            fit(
                state,
                criterion,
                data,
                callbacks(
                    patch_size=data.patch_size,
                    epochs=settings.epochs,
                    class_names=data.dataset.class_names,
                    writer=writer,
                    save_fms=save_fms,
                ),
                epochs=settings.epochs,
                lr=settings.lr,
                val_interval=settings.val_interval,
                device=device,
                amp=settings.precision == "bfloat16",
            )
    except Stopped as stopped:
        log(f"{stopped}; to continue: {resume_command(folder)}")
        distributed.broadcast_from_main(None)  # torchrun ends all when one has ended: let the line be written first
        raise
    except RuntimeError as error:
        if distributed.is_lost(error):
            log(f"{LOST}; to continue: {resume_command(folder)}")
        raise
    if distributed.is_main():
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

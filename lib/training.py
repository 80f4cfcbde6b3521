"""From the arguments of train.py to a trained run folder."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lib import checkpoint, published
from lib.build import build_dataset, build_loss, build_model, build_optimizer, build_rule, build_unpruned, check_amp
from lib.callback import callbacks, fixed_image, tensorboard
from lib.checkpoint import TrainingState
from lib.data import DATASETS, own_data, planning
from lib.data.definition import as_dict
from lib.data.loading import Loader
from lib.forecast import forecast
from lib.models import compile_model
from lib.models.BaseModel import read_state
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.settings import Settings
from lib.system import distributed
from lib.system.device import faster_precision, find_device
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import locked
from lib.system.log import Log, no_log
from lib.system.process import Stopped, keep_freed_memory
from lib.trainer import fit, trial_step
from lib.utils import parseArguments, resume_command, settings_of


@dataclass(frozen=True)
class Task:
    """What there is to do. `run` is the run folder that goes on, None for a new run, and `earlier` its facts; the
    training starts after `epoch`, with the weights of `source` and, of a run of ours, the state `progress`."""

    settings: Settings
    device: torch.device
    run: Path | None
    earlier: dict
    epoch: int
    source: Path | None
    progress: dict | None
    resumes: bool
    history: Path | None  # a run of the published code
    accepts_changes: bool
    notes: Sequence[str] = ()  # about own data: the plan, and what the checks found


def train(argv: list[str] | None, held: ExitStack) -> TrainingState | None:
    """Train as `argv` says; `held` keeps the process group and the lock of the run folder. None where only the plan is
    asked for."""
    held.enter_context(distributed.process_group())
    args = distributed.together(parseArguments, argv)
    own = distributed.broadcast_from_main(distributed.together(plan_own_data, args))
    task = distributed.together(read_task, args, held, own)
    distributed.check_same("the settings", task.settings.of_all_ranks())
    if args.plan_only:
        show_plan(task)
        return None
    model, history, data = distributed.together(load, task)
    content = prepare(data)
    changed, save_fms = distributed.together(start, task, model, data, content)
    criterion = build_loss(task.settings)
    settings, note = choose_precision(task, model, criterion, data)
    folder = distributed.together(open_run, replace(task, settings=settings), content, changed, held)
    folder = Path(distributed.broadcast_from_main(str(folder)))
    state = TrainingState(model, build_optimizer(settings, model), folder, epoch=task.epoch)
    state.log = Log(folder / "log.txt") if distributed.is_main() else no_log
    state.validates = bool(data.ids["validation"])
    state.unpruned = summary(build_unpruned(settings), data.patch_size)
    state.rule = build_rule(settings, state.unpruned["flops"], state.validates)
    for line in (*introduction(task, data, folder), *changed.values(), *note, *beginning(task, history, folder)):
        state.log(line)
    if task.progress is not None:
        distributed.together(checkpoint.restore, state, task.progress)
    if history:
        checkpoint.restore_published(state, history, data.patch_size)
    if settings.prunes and not settings.has_budget and not state.validates:
        state.log("no validation set: thresholds rise by the training loss alone")
    n_batches = data.n_train_batches()
    if distributed.is_main():
        for line in expectation(settings, model, n_batches, settings.epochs - state.epoch, is_new(task)):
            state.log(line)
    run_epochs(state, settings, task.device, criterion, data, save_fms)
    for key, before in state.unpruned.items():
        now = state.rows[-1][key]
        state.log(f"{key:<10} {before:>15,} -> {now:>15,} ({100 * now / before:.1f}%)")
    return state


def plan_own_data(args: argparse.Namespace) -> dict | None:
    """Check and plan a folder in nnU-Net's raw format, on the rank that writes: its "definition" and lines for the log.
    None for other data, and for a run that goes on, which has its plan. Raises InputError."""
    if args.data is None or args.data in DATASETS or args.resume or args.history or not distributed.is_main():
        return None
    if args.data_path:
        raise InputError(f"--data_path {args.data_path}: --data is the folder already; leave --data_path out")
    if args.split or args.seed_data is not None:
        raise InputError("--split, --seed_data: own data have folds; give --fold, or write a splits_final.json")
    cache_path = Path(args.cache_path or Settings.default("cache_path"))
    own = own_data.plan_folder(Path(args.data), vars(args), cache_path)
    return {"definition": as_dict(own.dataset), "notes": [*own.notes, planning.table(own.plan)]}


def show_plan(task: Task) -> None:
    """Print the plan, and what this machine can do with it."""
    settings = task.settings
    data = build_dataset(settings)
    model = build_model(settings).to(task.device)
    for line in (*task.notes, *expectation(settings, model, data.n_train_batches(), settings.epochs, is_new(task))):
        print(line)


def is_new(task: Task) -> bool:
    """Whether the flags decide what network it is, and not weights that are there."""
    return task.run is None and task.source is None


def expectation(settings: Settings, model: nnUNet, n_batches: int, epochs: int, new: bool) -> list[str]:
    """Lines for the log about the width of a flat network, and the time and memory that so many epochs take here. new:
    whether flags can still change the network."""
    flat = settings.model == "flat"
    width = [f"flat: {model.blocks()[0].out_filters} filters in every block but the heads"] if flat else []
    what = model, build_loss(settings), settings.batch_size, settings.patch_size, n_batches, epochs

    def smaller(fms_init: int) -> nnUNet:
        return build_model(replace(settings, fms_init=fms_init, in_filters=None, out_filters=None))

    given = flat or not new or model.blocks()[0].out_filters != settings.fms_init  # widths that no --fms_init changes
    return [*width, *forecast(*what, None if given else smaller, settings.precision == "bfloat16")]


def read_task(args: argparse.Namespace, held: ExitStack, own: dict | None = None) -> Task:
    """What the arguments ask for; `own`: see `plan_own_data`. Raises InputError where that makes no sense, or the run
    is in use or damaged."""
    run, settings, earlier = settings_of(args, definition=own and own["definition"])
    device = find_device(settings.device)
    check_amp(settings, device)
    if run and distributed.is_main():
        held.enter_context(locked(run))
    epoch = checkpoint.newest_epoch(run) if args.resume else args.epoch_start if run else None
    epoch, source, progress = checkpoint.starting_point(settings, run, epoch, args.model_state)
    if epoch >= settings.epochs:
        raise InputError(f"--epochs {settings.epochs}: epoch {epoch} is finished; give a larger number to go on")
    history = Path(args.history) if args.history and run is None else None
    resumes, accepts = bool(args.resume), bool(args.accept_changed_data)
    notes = own["notes"] if own else []
    return Task(settings, device, run, earlier, epoch, source, progress, resumes, history, accepts, notes)


def load(task: Task) -> tuple[nnUNet, published.History | None, Loader]:
    """The network, what is known of a published run, and the data set, which the first rank of a machine prepares."""
    settings = task.settings
    if task.device.type == "cpu":
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(settings.seed_train)
    weights = read_state(task.source) if task.source else None
    started = task.progress is not None  # and so has its widths from the weights, no more from files
    own = replace(settings, in_filters=None, out_filters=None) if started else settings
    model = build_model(own, weights, task.source or "")
    history = published.read_history(task.history, task.epoch, model) if task.history else None
    data = build_dataset(settings)
    if distributed.local_rank() == 0:
        data.prepare()
    return model, history, data


def prepare(data: Loader) -> dict:
    """Prepare the data on all ranks; what the files hold."""
    distributed.check_same("the subjects on disk", data.ids)
    distributed.together(data.prepare)  # the other ranks find all that they need in the cache
    content = data.content()
    distributed.check_same("the content of the data", content)
    return content


def start(task: Task, model: nnUNet, data: Loader, content: dict) -> tuple[dict[str, str], dict | None]:
    """Start the weights; a line for the log about each subject that has changed since the run was last trained, and
    the arguments for saving feature maps."""
    changed, settings = {}, task.settings
    if task.run and distributed.is_main():
        changed = checkpoint.check_subjects(task.run, content, task.accepts_changes)
    save_fms = {"image": fixed_image(data), "every": settings.save_fms_every} if settings.save_fms else None
    model.initialize(device=task.device, model_state=task.source, isSauron=settings.model == "sauron")
    if settings.compile:
        compile_model(model, task.device)
    return {subject: f"{subject} {what}: accepted" for subject, what in changed.items()}, save_fms


def choose_precision(task: Task, model: nnUNet, criterion: nn.Module, data: Loader) -> tuple[Settings, list[str]]:
    """The settings with the precision that --amp comes to, and lines for the log about it."""
    settings = task.settings
    if settings.precision is not None:  # one that is continued keeps to its own, whatever the machine
        return settings, []
    if not settings.amp or task.device.type != "cpu" or task.run:
        return replace(settings, precision="bfloat16" if settings.amp else "float32"), []
    choice = faster_precision("a training step", trial_step(model, criterion, data.batch_size, data.patch_size))
    precision, note = distributed.broadcast_from_main(choice)  # one clock decides for all ranks
    return replace(settings, precision=precision), [note]


def open_run(task: Task, content: dict, changed: dict[str, str], held: ExitStack) -> Path | None:
    """The run folder with its config.json and subjects.json; None but on the rank that writes."""
    if not distributed.is_main():
        return None
    about = facts(task.device, "train.py") | ({"accepted_changed_data": sorted(changed)} if changed else {})
    folder = task.run or checkpoint.new_run_folder(task.settings)
    if task.run is None:
        held.enter_context(locked(folder))
    checkpoint.begin(folder, task.settings, about, task.earlier, task.epoch if task.run else None, content)
    return folder


def introduction(task: Task, data: Loader, folder: Path) -> list[str]:
    """Lines for the log about the run folder and the data."""
    name, parts = task.settings.data, ", ".join(f"{len(ids)} {part}" for part, ids in data.ids.items())
    missing = f"{name}: {data.n_missing} subjects are not on disk; the split is that of the whole data set"
    lines = [f"run folder: {folder}", f"{name}: {parts}", *[missing] * (data.n_missing > 0)]
    return [*lines, *task.notes, *data.notes]


def beginning(task: Task, history: published.History | None, folder: Path) -> list[str]:
    """Lines for the log about where the training starts."""
    n = distributed.world_size()
    weights = f"of {task.source}" if task.source else "new"
    lines = [f"{task.settings.model} on {task.device}{f' in {n} processes' * (n > 1)}: weights {weights}"]
    lines += history.notes if history else []
    for damaged in (later for later in checkpoint.saved_epochs(folder) if later > task.epoch and task.resumes):
        lines.append(
            f"model or state of epoch {damaged} is damaged; continuing after epoch {task.epoch}, the newest good one"
        )
    return lines


def run_epochs(
    state: TrainingState,
    settings: Settings,
    device: torch.device,
    criterion: nn.Module,
    data: Loader,
    save_fms: dict | None,
) -> None:
    """Train to the last epoch. Where that is stopped, the log says how to go on."""
    try:
        with tensorboard(state.folder, state.epoch) if distributed.is_main() else nullcontext() as writer:
            every = callbacks(
                patch_size=data.patch_size,
                epochs=settings.epochs,
                class_names=data.dataset.class_names,
                writer=writer,
                save_fms=save_fms,
            )
            fit(
                state,
                criterion,
                data,
                every,
                epochs=settings.epochs,
                lr=settings.lr,
                val_interval=settings.val_interval,
                device=device,
                amp=settings.precision == "bfloat16",
            )
    except Stopped as stopped:
        state.log(f"{stopped}; to continue: {resume_command(state.folder)}")
        distributed.broadcast_from_main(None)  # torchrun ends all when one has ended: let the line be written first
        raise
    except RuntimeError as error:
        if distributed.is_lost(error):
            state.log(f"{distributed.LOST}; to continue: {resume_command(state.folder)}")
        raise

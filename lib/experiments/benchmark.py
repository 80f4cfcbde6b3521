"""The paper's benchmark (section 4.1) as one command: `python -m lib.experiments.benchmark --data phantom`.

For every seed it trains, predicts and evaluates the rows that are asked for. Then it times all networks and writes
table.md, table.json, runs.json and figures. The same command continues where it was interrupted. All of it runs in this
process, through the `main` of the three scripts: every training seeds itself, so the rows leave no trace in one
another's random states, and torch is imported once instead of fifteen times a seed. With --jobs, trainings run in
processes of their own beside one another.
"""

import argparse
import os
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
from tqdm import tqdm

import evaluate
import predict
import train
from lib.checkpoint import save_model
from lib.data import DATASETS
from lib.evaluation import RESERVED
from lib.experiments import benchmark_networks as networks
from lib.experiments.benchmark_plan import (
    Plan,
    Task,
    check_runs,
    check_settings,
    finished_rows,
    flags_of,
    make_plan,
    read_json,
)
from lib.experiments.benchmark_rows import HALF, REFERENCE, ROWS, SAURON, WITHOUT_BUDGET, kind_of, row_of
from lib.experiments.benchmark_runs import write_runs
from lib.experiments.benchmark_table import make_row, over_seeds, paired_differences, write_table
from lib.experiments.patch_time import patch_milliseconds
from lib.inference import Predictor
from lib.models import load_model
from lib.models.filters import format_filters
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, summary
from lib.settings import Settings, fold_argument
from lib.system.cli import Parser, flops_limit, number, one_of, run_script
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import file_digest, made, write_json, write_text
from lib.system.process import check_stopped, n_cores
from lib.validation import command as validation_command

OTHER_PATCHES = 10**6  # added to the seed of the second half, which would see the patches of the first one again
TIMED = 5  # images, for the seconds of inference


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lib.experiments.benchmark",
        usage="%(prog)s --data D [--rows ROW ...] [--seeds 1 2 3] [--folds 0 1 2] [--epochs N] [--budgets 20%% 50%%] "
        "[--jobs N] [--output FOLDER] [-- flags of train.py]",
        description="Train, predict and evaluate Sauron, its baselines and nnUNet; one table as Markdown and JSON, "
        "and figures of Dice against FLOPs and by epoch. What is finished in the folder is never trained again, and is "
        "in the table: the same command with another --device after -- times all of it there.",
    )
    add = parser.add_argument
    known = ", ".join(DATASETS)
    add("--data", required=True, help=f"data set ({known}), or a folder in nnU-Net's raw format (required)")
    add("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
    folds_help = "of own data, one for each seed: every training has a seed and a fold of its own (default: fold 0)"
    add("--folds", type=fold_argument, nargs="+", default=[], metavar="FOLD", help=folds_help)
    add("--epochs", type=number(int, 1), help="of every row (default: the data set's)")
    add(
        "--rows",
        **one_of(ROWS),
        nargs="+",
        help=f"what is trained; nnunet, and what these rows need, come too (default: all, but {WITHOUT_BUDGET} with "
        "--budgets); only nnunet-pruned needs torch-pruning",
    )
    add(
        "--budgets",
        type=flops_limit,
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="--max_flops of Sauron, such as 20%% 50%%: for each of them all rows, beside nnUNet (default: the data "
        "set's own pruning)",
    )
    add(
        "--partitions",
        **one_of(("test", "validation")),
        nargs="+",
        help="what is predicted and evaluated (default: test, or validation where the test set has no ground truth)",
    )
    add("--no_tta", action="store_true", help="do not average over mirrorings (default: average over all)")
    add(
        "--jobs",
        type=number(int, 1),
        default=1,
        help="trainings beside one another, each in a process of its own; they share the device (default: 1)",
    )
    add("--output", type=Path, help="folder of all that is made (default: out/benchmark/<data>)")
    add("flags", nargs="*", help="after --: flags of train.py for all rows, such as -- --fms_init 16")
    return parser.parse_args(argv)


def call(script: ModuleType, argv: list[str]) -> None:
    """Run one of the scripts as from a shell: the command line that it records is its own."""
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *argv]
    try:
        code = script.main(argv)
    finally:
        sys.argv = before
    if code:
        raise InputError(f"{script.__name__}.py stopped (see the line above); mend it and give the same command again")


def train_row(plan: Plan, task: Task) -> None:
    """Train a row to its end, unless it has been. The rows that it needs have been trained."""
    run, epoch = task.run()
    if epoch >= plan.epochs(task):
        return
    argv = [*flags_of(task.key, plan.flags), "--epochs", str(plan.epochs(task)), "--device", str(plan.device)]
    argv += ["--seed_train", str(task.seed + OTHER_PATCHES if task.is_pruned else task.seed)]
    argv += ["--output", str(plan.output / "runs"), "--exp_name", task.name]
    argv += ["--fold", plan.folds[task.seed]] if plan.folds else []
    if run:
        call(train, [*argv, "--resume", str(run)])
    else:
        call(train, ["--data", plan.given_data, *argv, *starting_network(plan, task)])


def train_rows(plan: Plan, tasks: list[Task], jobs: int) -> None:
    """Train rows in `jobs` processes beside one another, each as soon as there is what it needs; what they print goes
    to logs/NAME.txt. A signal stops them all. Raises InputError at the end where some have failed; those that need them
    were left out."""
    (plan.output / "logs").mkdir(exist_ok=True)
    tasks = [task for task in tasks if task.run()[1] < plan.epochs(task)]
    waiting, running, failed, start = list(tasks), {}, [], time.perf_counter()
    try:
        while waiting or running:
            check_stopped()
            missing = {*waiting, *running, *failed}
            for task in [task for task in waiting if missing.isdisjoint(task.needs)][: jobs - len(running)]:
                waiting.remove(task)
                running[task] = started(plan, task, max(1, n_cores() // jobs))
            if not running:
                break
            wait([process.sentinel for process in running.values()], timeout=1)
            for task in [task for task, process in running.items() if process.exitcode is not None]:
                code = running.pop(task).exitcode
                check_stopped()  # a signal to the whole process group ends the trainings, too
                failed += [task] if code else []
                left, minutes = len(waiting) + len(running), (time.perf_counter() - start) / 60
                done, state = len(tasks) - left, f"failed (exit code {code})" if code else "trained"
                eta = f"about {left * minutes / done:.0f} min left"
                print(f"{task.name} {state}; {done} of {len(tasks)} in {minutes:.1f} min, {eta}", flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    if failed:
        names = ", ".join(f"logs/{task.name}.txt" for task in failed)
        raise InputError(
            f"{plan.output}: {len(failed)} trainings failed, see {names}; mend it and give the command again"
        )


def started(plan: Plan, task: Task, threads: int) -> SpawnProcess:
    """`train_row` in a process of its own, with so many threads unless OMP_NUM_THREADS says otherwise."""
    process = get_context("spawn").Process(target=train_quietly, args=(plan, task))
    given = "OMP_NUM_THREADS" in os.environ
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        process.start()
    finally:
        if not given:
            del os.environ["OMP_NUM_THREADS"]
    return process


def train_quietly(plan: Plan, task: Task) -> None:
    with open(plan.output / "logs" / f"{task.name}.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        sys.exit(run_script(lambda: train_row(plan, task)))


def starting_network(plan: Plan, task: Task) -> list[str]:
    """The flags of train.py for the network that a row starts from, which is made here if need be."""
    if not task.needs:
        return []
    sauron, patch_size = task.needs[0], plan.data.patch_size
    if kind_of(task.key) == "nnunet-widths":
        run, _ = sauron.run()
        return ["--in_filters", str(run / "in_filters"), "--out_filters", str(run / "out_filters")]
    network = load_model(sauron.model())
    flops = plan.flops(network)
    file = plan.output / ("pruned" if task.is_pruned else "flat") / task.name
    file.parent.mkdir(exist_ok=True)
    if not task.is_pruned:
        write_text(file, format_filters([count_filters(networks.flat(network, flops, patch_size))["out"]]))
        return ["--out_filters", str(file)]
    start = time.perf_counter()
    model = load_model(task.needs[1].model())
    networks.prune_by_magnitude(model, flops, patch_size)
    save_model(file, model)
    write_json(task.pruning, {"flops": flops, "seconds": time.perf_counter() - start})
    return ["--model_state", str(file)]


def check_likeness(plan: Plan, task: Task) -> None:
    """Raise InputError where a row was made like another network of Sauron than the one that is there."""
    if not task.needs:
        return
    model, sauron = (load_model(one.model()) for one in (task, task.needs[0]))
    expected = plan.flops(sauron)
    if task.is_pruned:
        flops = read_json(task.pruning)["flops"]
    else:
        if kind_of(task.key) == "nnunet-flat":
            expected = plan.flops(networks.flat(sauron, expected, plan.data.patch_size))
        flops = plan.flops(model)
    if flops != expected:
        raise InputError(
            f"{task.folder}: was made like another network than that of {task.needs[0].name} ({flops:,} FLOPs, not "
            f"{expected:,}); delete this folder, and give the same command again"
        )


def training_seconds(task: Task) -> float:
    """Of all epochs that the row is made of, and of its pruning."""
    seconds = 0.0
    if task.is_pruned:
        seconds = training_seconds(task.needs[1]) + read_json(task.pruning)["seconds"]
    return seconds + sum(read_json(task.run()[0] / "history.json")["seconds"])


def trained_on(task: Task) -> str:
    """The devices, machines and precision of all epochs that the row is made of."""
    places = [trained_on(task.needs[1])] if task.is_pruned else []
    settings, about = Settings.read(task.run()[0])
    machines = dict.fromkeys(part.get("machine", "?") for part in (about, *about.get("continued", [])))
    machines = [f"{settings.device}, {machine}" for machine in machines] if len(machines) == 1 else machines
    places += [f"{machine}, {settings.precision or 'float32'}" for machine in machines]
    return "; ".join(dict.fromkeys(places))


def evaluate_row(plan: Plan, task: Task) -> dict:
    """What evaluate.py says of the row's newest model: before, or now.

    Predictions and results count as its own if the sum beside them, written before the first of them, is the model's.
    """
    model, name = task.model(), task.name
    results, predictions = plan.output / "results" / f"{name}.json", plan.output / "predictions" / name
    made_from, digest = results.with_suffix(".sha256"), file_digest(model)
    if not made_from.exists() or made_from.read_text().strip() != digest:
        results.unlink(missing_ok=True)
        if predictions.exists():
            print(f"{predictions}: not known to be of {model}; made again", flush=True)
            shutil.rmtree(predictions)
        results.parent.mkdir(exist_ok=True)
        write_text(made_from, digest + "\n")
    data_path = plan.settings.data_path
    if not results.exists() and plan.is_own:
        write_json(results, validated(model))
    elif not results.exists():
        argv = ["--data", plan.data.dataset.name, "--output", str(predictions), "--skip_existing"]
        argv += ["--model_state", str(model), "--device", str(plan.device)]
        argv += [*([] if plan.tta else ["--no_tta"]), *(["--original", data_path] if data_path else [])]
        for partition in plan.partitions:
            call(predict, [*argv, "--partition", partition])
        argv = ["--data", plan.data.dataset.name, "--pred", str(predictions), "--output", str(results)]
        argv += ["--num_workers", str(max(1, plan.settings.num_workers))]
        call(evaluate, [*argv, *(["--gt", data_path] if data_path else [])])
    return read_json(results)


def validated(model: Path) -> dict:
    """What train.py found of a model on whole validation volumes, before any post-processing, as evaluate.py says it.
    Raises InputError where it is not there, or of another model."""
    file = model.parent.parent / "validation.json"
    found = read_json(file) if file.exists() else {}
    if found.get("sha256") != file_digest(model):
        raise InputError(f"{file}: is not of {model.name}; to validate it: {validation_command(model.parent.parent)}")
    return found["before"]["subjects"] | {"average": found["before"]["average"]}


def inference_seconds(
    models: list[nnUNet], volumes: list[np.ndarray], patch_size: tuple[int, ...], tta: bool = True
) -> list[float]:
    """Median seconds of `Predictor.volume` over the volumes (modalities, X, Y, Z), by model; `tta`: all mirrorings.

    Each volume goes through all models one after another, so that other load on the machine meets all of them.
    """
    predictors = [Predictor(model, patch_size, mirror=tta) for model in models]
    warm_up = np.zeros((len(volumes[0]), *patch_size, 1)[:4], np.float32)
    for predictor in predictors:
        predictor.volume(warm_up)
    seconds = [[] for _ in models]
    for volume in tqdm(volumes, desc="inference time", unit="volume"):
        for predictor, values in zip(predictors, seconds, strict=True):
            start = time.perf_counter()
            predictor.volume(volume)
            values.append(time.perf_counter() - start)
    return [median(values) for values in seconds]


def make_rows(plan: Plan, volumes: list[np.ndarray]) -> dict[str, dict]:
    """The rows of the table by key: of all that is finished in the folder, timed on these volumes."""
    found, sizes, models = finished_rows(plan), {}, []
    tasks = [plan.task(key, seed) for key, seeds in found.items() for seed in seeds]
    results = {key: {seed: evaluate_row(plan, plan.task(key, seed)) for seed in seeds} for key, seeds in found.items()}
    for task in tasks:
        check_likeness(plan, task)
        models.append(load_model(task.model(), plan.device))
        sizes[task] = summary(models[-1], plan.data.patch_size) | {"bytes": task.model().stat().st_size}
        del sizes[task]["filters"]
        sizes[task]["training_seconds"] = training_seconds(task)
    for task, seconds in zip(tasks, inference_seconds(models, volumes, plan.data.patch_size, plan.tta), strict=True):
        sizes[task]["inference_seconds"] = seconds
    for task, times in zip(tasks, patch_milliseconds(models, plan.data.patch_size), strict=True):
        sizes[task] |= {f"{runtime}_ms": ms for runtime, ms in times.items()}
    rows, dataset = {}, plan.data.dataset
    folds = {task.seed: Settings.read(task.run()[0])[0].fold for task in tasks}
    for key, seeds in found.items():
        own = [plan.task(key, seed) for seed in seeds]
        row = make_row(row_of(key).title, results[key], [sizes[t] for t in own], results[REFERENCE], dataset, folds)
        row["trained_on"] = [trained_on(task) for task in own]
        sauron = "@".join([SAURON, *key.split("@")[1:]])
        if sauron in found and key not in (sauron, REFERENCE):
            differences = paired_differences(results[sauron], results[key], dataset.case_of)
            row["sauron_minus_this"] = over_seeds(differences, folds)
        rows[key] = row
    return rows


def run_plan(plan: Plan, jobs: int) -> None:
    """Do what is not done yet, and write the table."""
    check_settings(plan)
    check_runs(plan)
    tasks = [plan.task(row, seed) for seed, row in product(plan.seeds, plan.rows)]
    if jobs > 1:
        train_rows(plan, tasks, jobs)
    for i, task in enumerate(tasks, 1):
        print(f"row {i} of {len(tasks)}: {row_of(task.key).title}, seed {task.seed}", flush=True)
        train_row(plan, task)
        if task.key != HALF:
            evaluate_row(plan, task)
    volumes = plan.data.get(plan.partitions[0])
    volumes = [volumes[i]["image"].data.numpy() for i in range(min(TIMED, len(volumes)))]
    rows = make_rows(plan, volumes)

    about, dataset, epochs = facts(plan.device), plan.data.dataset, plan.settings.epochs
    files = [plan.output / "results" / f"{key}-{seed}.json" for key, row in rows.items() for seed in row["seeds"]]
    images = {subject for file in files for subject in read_json(file) if subject not in RESERVED}
    said = {"data": dataset.name, "subjects": len(images), "partition": " and ".join(plan.partitions)}
    said |= {"patients": len(set(map(dataset.case_of, images))), "epochs": epochs, "lr": plan.settings.lr}
    said |= {"half": epochs // 2, "rest": epochs - epochs // 2, "patch": " x ".join(map(str, plan.data.patch_size))}
    said |= {"place": f"{plan.device}, {about['machine']}", "n_timed": len(volumes)}
    said |= {"mirrored": "all mirrorings" if plan.tta else "no mirrorings"}
    about |= {"data": dataset.name, "partitions": plan.partitions, "seeds": plan.seeds}
    about |= {"inference_on": said["place"], "subjects": len(images), "settings": plan.settings.as_dict()}
    write_table(plan.output, rows, said, about)
    write_runs(plan.output, rows, dataset)


def benchmark(args: argparse.Namespace) -> None:
    plan = make_plan(args)
    with made(plan.output):
        run_plan(plan, args.jobs)


def main(argv: list[str] | None = None) -> int:
    """Run or continue the benchmark; returns the exit code: 0, or 2 after one line about bad input."""
    return run_script(lambda: benchmark(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""The paper's benchmark (section 4.1) as one command: `python -m lib.experiments.benchmark --data phantom`.

For every seed it trains, predicts and evaluates the rows of `ROWS`; then it times all networks and writes table.md and
table.json. The same command continues where it was interrupted. All of it runs in this process, through the `main` of
the three scripts: every training seeds itself, so the rows leave no trace in one another's random states, and torch is
imported once instead of fifteen times a seed.
"""

import argparse
import json
import re
import sys
import textwrap
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from types import ModuleType

import matplotlib
import torch
from scipy.stats import t as student_t
from scipy.stats import wilcoxon
from torch import Tensor
from tqdm import tqdm

import evaluate
import predict
import train
from lib.checkpoint import newest_epoch, save_model, write_json, write_text
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset, case_number
from lib.error import InputError
from lib.evaluation import RESERVED
from lib.experiments.figures import COLOURS, STYLE, new_figure, save_figure
from lib.inference import default_batch_size, predict_volume
from lib.models import load_model, resized, summary
from lib.models.nnUNet import nnUNet
from lib.utils import (
    Parser,
    facts,
    find_device,
    flops_limit,
    make_config,
    number,
    one_of,
    parseArguments,
    run_script,
)

try:
    import torch_pruning
except ImportError:  # nothing else in the project needs it
    torch_pruning = None

TORCH_PRUNING = "torch-pruning==1.6.1"
NNUNET = ("--model", "nnunet")
ROWS = ("sauron", "sauron-lambda0", "nnunet", "nnunet-widths", "nnunet-pruned")  # without --budgets
HALF = "nnunet-half"  # trained for half of the epochs, to be pruned and fine-tuned in the other half
REFERENCE = "nnunet"  # what the p-values and percentages compare with
OWN = (  # flags of train.py that the rows set themselves
    *("exp_name", "output", "seed_train", "epochs", "model", "no_prune"),
    *("in_filters", "out_filters", "epoch_start", "model_state", "history", "resume"),
)
FREE = {"exp_name", "output", "seed_train", "data_path", "cache_path", "num_workers"}  # may change between two calls
NOTES = """
{data}: {subjects} {partition} images of {patients} patients, {epochs} epochs, on {where}. Means over the seeds, ±
standard deviation where there are several. Percentages refer to {reference}. HD95 averages over the images that have
one. FLOPs are torch's count for one patch of {patch}. Training is the row's own: a row of given widths takes them from
Sauron's training, and a pruned one its weights from an nnUNet. torch-pruning: magnitude importance (squared L2 norm,
averaged over the layers of a group, divided by its mean), global ranking, at least one filter per block, heads kept;
{pruned}. Inference is the network on a preprocessed volume, {mirrored}: median over {timed} images, all rows one after
another in one process. p: Wilcoxon signed-rank test against {reference} on the images' mean foreground Dice, averaged
over the seeds. The difference of the mean foreground Dice is that to {reference} of the same seeds, paired by patient,
with the 95% interval of its mean (Student's t).
"""
TIMED = 5  # images, for the seconds of inference


@dataclass(frozen=True)
class Row:
    """A network of the table, by its key: a name of ROWS, or "name@limit" with a budget ("20pct" for 20%)."""

    title: str
    flags: tuple[str, ...]  # of train.py
    epochs: int
    like: str | None = None  # the row whose final widths, or FLOPs, it has
    pruned: str | None = None  # the row that torch-pruning prunes


def make_row_plan(key: str, epochs: int) -> Row:
    """What there is to train for a row."""
    name, _, limit = key.partition("@")
    sauron, limit = f"sauron@{limit}" if limit else "sauron", limit.replace("pct", "%")
    at = f" ({limit})" if limit else ""
    if name == "nnunet-pruned":
        half = epochs // 2 if limit else 0
        title = f"nnUNet, torch-pruning to Sauron's FLOPs{at}, fine-tuned"
        return Row(title, NNUNET, epochs - half, like=sauron, pruned=HALF if limit else "nnunet")
    if name == "nnunet-widths":
        return Row(f"nnUNet of Sauron's widths{at}, from scratch", NNUNET, epochs, like=sauron)
    if name == HALF:
        return Row("nnUNet, half of the epochs", NNUNET, epochs // 2)
    if name == "nnunet":
        return Row("nnUNet", NNUNET, epochs)
    if name == "sauron-lambda0":
        return Row("Sauron (lambda = 0)", ("--lambda", "0"), epochs)
    return Row(f"Sauron, budget {limit}", ("--max_flops", limit), epochs) if limit else Row("Sauron", (), epochs)


def rows_with_budgets(budgets: list[str]) -> tuple[str, ...]:
    """The keys of what is trained with --budgets, in an order in which each finds what it needs."""
    limits = [budget.replace("%", "pct") for budget in budgets]
    kinds = ("sauron", "nnunet-widths", "nnunet-pruned")
    return ("nnunet", HALF, *(f"{kind}@{limit}" for limit in limits for kind in kinds))


@dataclass(frozen=True)
class Plan:
    """What to do, checked."""

    output: Path
    rows: tuple[str, ...]  # keys
    seeds: tuple[int, ...]
    flags: tuple[str, ...]  # of train.py, for all rows
    config: dict  # the settings of the first row
    partitions: tuple[str, ...]  # what is predicted
    tta: bool  # whether predictions average over mirrorings
    data: BaseDataset

    def row(self, key: str) -> Row:
        return make_row_plan(key, self.config["epochs"])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lib.experiments.benchmark",
        usage="%(prog)s --data D [--seeds 1 2 3] [--epochs N] [--budgets 20%% 50%%] [--output FOLDER] [-- flags of "
        "train.py]",
        description="Train, predict and evaluate Sauron, its baselines and nnUNet; one table as Markdown and JSON, and "
        "a figure of Dice against FLOPs. What is finished in the folder is never trained again, and is in the table.",
    )
    add = parser.add_argument
    add("--data", required=True, **one_of(DATASETS), help="data set (required)")
    add("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
    add("--epochs", type=number(int, 1), help="of every training (default: the data set's)")
    add(
        "--budgets",
        type=flops_limit,
        nargs="+",
        default=[],
        metavar="LIMIT",
        help="--max_flops of Sauron, such as 20%% 50%%: for each it, nnUNet of the same widths and torch-pruning at "
        "the same FLOPs, all for the same number of epochs, beside nnUNet (default: the data set's own pruning)",
    )
    add(
        "--partitions",
        **one_of(("test", "validation")),
        nargs="+",
        help="what is predicted and evaluated (default: test, or validation where the test set has no ground truth)",
    )
    add("--no_tta", action="store_true", help="do not average over mirrorings (default: average over all)")
    add("--output", type=Path, help="folder of all that is made (default: out/benchmark/<data>)")
    add("flags", nargs="*", help="after --: flags of train.py for all rows, such as -- --fms_init 16")
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises InputError where a training would, and where a flag after -- is the benchmark's own."""
    flags = ["--data", args.data, *args.flags]
    given = parseArguments(flags)
    for key in (*OWN, *(["max_flops"] if args.budgets else [])):
        if getattr(given, key) is not None:
            raise InputError(f"--{key} after --: the benchmark sets it for each row; leave it out")
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    rows = rows_with_budgets(args.budgets) if args.budgets else ROWS
    config, *_ = [make_config(parseArguments([*flags, *make_row_plan(row, 2).flags])) for row in ("sauron", *rows)]
    if args.budgets and config["epochs"] < 2:
        raise InputError("--epochs 1: torch-pruning needs an epoch before and one after the pruning; give 2 or more")
    find_device(config["device"])
    keys = ("data_path", "cache_path", "split", "seed_data", "patch_size", "num_workers")
    data = DATASETS[config["data"]](**{key: config[key] for key in keys})
    output = args.output or Path("out", "benchmark", data.name)
    partitions = tuple(dict.fromkeys(args.partitions or [choose_partition(data)]))
    for partition in partitions:
        if not all(file.label for file in data.files(partition)):
            raise InputError(f"--partitions {partition}: some of these images have no ground truth; name another")
    seeds = tuple(dict.fromkeys(args.seeds))
    return Plan(output, rows, seeds, tuple(flags), config, partitions, not args.no_tta, data)


def choose_partition(data: BaseDataset) -> str:
    """ "test"; "validation" where the test set has no ground truth. Raises InputError if neither has any."""
    for partition in ("test", "validation"):
        files = data.files(partition)
        if files and all(file.label for file in files):
            return partition
    raise InputError(f"--data {data.name}: no test or validation images with ground truth; add some, or change --split")


def check_settings(plan: Plan) -> None:
    """Write the settings into the folder. Raises InputError if what is there was made with others."""
    path = plan.output / "settings.json"
    settings = {key: value for key, value in plan.config.items() if key not in FREE}
    settings |= {"partitions": list(plan.partitions), "no_tta": not plan.tta}
    try:
        if not path.exists():
            plan.output.mkdir(parents=True, exist_ok=True)
            write_json(path, settings)
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"--output {plan.output}: cannot be used ({error}); give another folder") from error
    for key, value in settings.items():
        if before.get(key, value) != value:
            flag = f"--{key.rstrip('_')}"
            raise InputError(f"{flag} {value}: {plan.output} has {before[key]}; keep it, or give another --output")


def call(script: ModuleType, argv: list[str]) -> None:
    """Run one of the scripts as from a shell: the command line that it records is its own."""
    before, sys.argv = sys.argv, [f"{script.__name__}.py", *argv]
    try:
        code = script.main(argv)
    finally:
        sys.argv = before
    if code:
        raise InputError(f"{script.__name__}.py stopped (see the line above); mend it and give the same command again")


def find_run(plan: Plan, row: str, seed: int) -> tuple[Path | None, int]:
    """The row's newest run with a finished epoch, and this epoch; None and 0 if there is none."""
    folder = plan.output / "runs" / f"{row}-{seed}" / plan.data.name
    runs = [run for run in folder.glob("*") if any((run / "models").glob("state-*"))]
    run = max(runs, key=lambda run: int(run.name), default=None)
    return run, (newest_epoch(run) or 0) if run else 0


def find_model(plan: Plan, row: str, seed: int) -> Path:
    """The newest model of a row that has been trained."""
    run, epoch = find_run(plan, row, seed)
    return run / "models" / f"model-{epoch}"


def train_row(plan: Plan, row: str, seed: int) -> Path:
    """The run folder of a row, trained to its end: before, or now. The rows above it have been trained."""
    run, epoch = find_run(plan, row, seed)
    what = plan.row(row)
    if epoch >= what.epochs:
        return run
    argv = [*plan.flags, *what.flags, "--epochs", str(what.epochs), "--seed_train", str(seed)]
    argv += ["--output", str(plan.output / "runs"), "--exp_name", f"{row}-{seed}"]
    if run:
        argv += ["--resume", str(run)]
    elif what.pruned:
        like, model = (load_model(find_model(plan, other, seed)) for other in (what.like, what.pruned))
        prune_by_magnitude(model, summary(like, plan.data.patch_size)["flops"], plan.data.patch_size)
        pruned = plan.output / "pruned" / f"{row}-{seed}"
        pruned.parent.mkdir(exist_ok=True)
        save_model(pruned, model)
        argv += ["--model_state", str(pruned)]
    elif what.like:
        like, _ = find_run(plan, what.like, seed)
        argv += ["--in_filters", str(like / "in_filters"), "--out_filters", str(like / "out_filters")]
    call(train, argv)
    return find_run(plan, row, seed)[0]


def prune_by_magnitude(model: nnUNet, flops: int, patch_size: tuple[int, ...]) -> None:
    """Prune `model` in place with torch-pruning, to the number of filters whose FLOPs are nearest to `flops`.

    Importance is the library's `MagnitudeImportance` with its defaults: the squared L2 norm of a filter and of its
    channels in every consumer, averaged over these layers and divided by the block's mean. The filters of all blocks
    are ranked together and the least important go, but the best of each block; heads and inputs are not pruned.
    """
    blocks = {block.name: block for block in model.blocks() if not block.head}
    widths = {name: block.out_filters for name, block in blocks.items()}
    example = torch.zeros(1, model.modalities, *[2**model.levels] * len(patch_size))
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)

    def group(name: str, filters: list[int]):
        return graph.get_pruning_group(blocks[name].conv, torch_pruning.prune_conv_out_channels, filters)

    importance, ranking = torch_pruning.importance.MagnitudeImportance(), []
    for name, width in widths.items():
        scores = importance(group(name, list(range(width)))).tolist()
        ranking += sorted((score, name, c) for c, score in enumerate(scores))[:-1]
    ranking.sort()

    def flops_without(n: int) -> int:
        gone = Counter(name for _, name, _ in ranking[:n])
        out = {name: width - gone[name] for name, width in widths.items()}
        return summary(resized(model, out), patch_size)["flops"]

    n = bisect_left(range(len(ranking)), -flops, key=lambda n: -flops_without(n))  # the first that is small enough
    n = min((max(n - 1, 0), n), key=lambda n: abs(flops_without(n) - flops))
    for name in widths:
        if filters := [c for _, other, c in ranking[:n] if other == name]:
            group(name, filters).prune()


def evaluate_row(plan: Plan, row: str, seed: int) -> dict:
    """What evaluate.py says of the row's newest model: before, or now."""
    results, predictions = plan.output / "results" / f"{row}-{seed}.json", plan.output / "predictions" / f"{row}-{seed}"
    data_path = plan.config["data_path"]
    if not results.exists():
        argv = ["--data", plan.data.name, "--output", str(predictions), "--skip_existing"]
        argv += ["--model_state", str(find_model(plan, row, seed)), "--device", plan.config["device"]]
        argv += [*([] if plan.tta else ["--no_tta"]), *(["--original", data_path] if data_path else [])]
        for partition in plan.partitions:
            call(predict, [*argv, "--partition", partition])
        argv = ["--data", plan.data.name, "--pred", str(predictions), "--output", str(results)]
        argv += ["--num_workers", str(max(1, plan.config["num_workers"]))]
        call(evaluate, [*argv, *(["--gt", data_path] if data_path else [])])
    return json.loads(results.read_text())


def inference_seconds(
    models: list[nnUNet], volumes: list[Tensor], patch_size: tuple[int, ...], tta: bool = True
) -> list[float]:
    """Median seconds of `predict_volume`, with `tta` all mirrorings, over the volumes (modalities, X, Y, Z), by model.

    Each volume goes through all models one after another, so that other load on the machine meets all of them.
    """
    batch_size = default_batch_size(f"{len(patch_size)}D", next(models[0].parameters()).device)  # as predict.py
    warm_up = torch.zeros(len(volumes[0]), *patch_size, *[1] * (3 - len(patch_size)))
    for model in models:
        predict_volume(model, warm_up, patch_size, tta, batch_size=batch_size)
    seconds = [[] for _ in models]
    for volume in tqdm(volumes, desc="inference time", unit="volume"):
        for model, values in zip(models, seconds, strict=True):
            start = time.perf_counter()
            predict_volume(model, volume, patch_size, tta, batch_size=batch_size)
            values.append(time.perf_counter() - start)
    return [median(values) for values in seconds]


def spread(values) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that exist; null where there are too few."""
    known = [value for value in values if value is not None]
    return {"mean": fmean(known) if known else None, "sd": stdev(known) if len(known) > 1 else None}


def subject_dice(results: list[dict]) -> dict[str, float | None]:
    """{subject: mean Dice over the foreground classes that have one, averaged over the seeds' results}."""
    subjects = [subject for subject in results[0] if subject not in RESERVED]
    return {s: spread(spread(seed[s]["dice"][1:])["mean"] for seed in results)["mean"] for s in subjects}


def wilcoxon_p(dice: dict[str, float | None], reference: dict[str, float | None]) -> float | None:
    """p of the two-sided signed-rank test over the subjects that have both values; None if no two values differ."""
    pairs = [(value, reference[subject]) for subject, value in dice.items()]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return float(wilcoxon(differences).pvalue) if any(differences) else None


def patient_dice(results: list[dict]) -> dict[int, float]:
    """{number of the patient: mean Dice of its images, as `subject_dice`}."""
    patients: dict[int, list[float]] = {}
    for subject, dice in subject_dice(results).items():
        if dice is not None:
            patients.setdefault(case_number(subject), []).append(dice)
    return {patient: fmean(values) for patient, values in patients.items()}


def difference(results: list[dict], reference: list[dict]) -> dict[str, float | int | None]:
    """{"mean", "low", "high", "n"}: by how much the Dice of `results` is larger, paired by patient, and the 95%
    interval of this mean (Student's t; null for less than two patients)."""
    ours, theirs = patient_dice(results), patient_dice(reference)
    values = [ours[patient] - theirs[patient] for patient in ours if patient in theirs]
    if len(values) < 2:
        return {"mean": fmean(values) if values else None, "low": None, "high": None, "n": len(values)}
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": fmean(values), "low": fmean(values) - half, "high": fmean(values) + half, "n": len(values)}


def format_difference(found: dict) -> str:
    if found["low"] is None:
        return "-" if found["mean"] is None else f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def make_row(title: str, results: list[dict], sizes: list[dict], reference: list[dict], class_names) -> dict:
    """One row of the table, JSON-able. By seed: the `results` of evaluate.py, and `sizes` (parameters, flops, ...);
    `reference` holds the results that the p-value compares with."""
    row: dict = {"row": title, "by_seed": {key: [seed[key] for seed in sizes] for key in sizes[0]}}
    row |= {key: spread(values) for key, values in row["by_seed"].items()}
    for metric in ("dice", "HD95"):
        averages = row["by_seed"][metric] = [seed["average"][metric][1:] for seed in results]
        row[metric] = {name: spread(v) for name, v in zip(class_names[1:], zip(*averages, strict=True), strict=True)}
        row[metric]["mean foreground"] = spread(spread(values)["mean"] for values in averages)
    row["wilcoxon_p"] = wilcoxon_p(subject_dice(results), subject_dice(reference))
    row["difference"] = difference(results, reference)
    return row


def format_table(rows: list[dict], reference: dict) -> str:
    """The Markdown table of `make_row`'s rows; percentages refer to `reference`, one of them."""

    def cell(value: dict, digits: int, unit: float = 1) -> str:
        numbers = [f"{value[key] / unit:.{digits}f}" for key in ("mean", "sd") if value[key] is not None]
        return " ± ".join(numbers) or "-"

    names, p = list(rows[0]["dice"]), "Wilcoxon p"
    head = ["", *(f"Dice {name}" for name in names), *(f"HD95 {name}, mm" for name in names), "parameters, M"]
    lines = [[*head, "FLOPs, G", "file, MB", "training, min", "inference, s per volume", p, "Dice difference"]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        line = [cell(row["dice"][name], 3) for name in names] + [cell(row["HD95"][name], 2) for name in names]
        for key, unit in (("parameters", 1e6), ("flops", 1e9)):
            line.append(f"{cell(row[key], 3, unit)} ({row[key]['mean'] / reference[key]['mean']:.0%})")
        line += [cell(row["bytes"], 2, 1e6), cell(row["training_seconds"], 1, 60), cell(row["inference_seconds"], 3)]
        p = row["wilcoxon_p"]
        line += ["-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}", format_difference(row["difference"])]
        lines.append([row["row"], *line])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: dict[str, dict], path: Path) -> None:
    """The mean foreground Dice against the share of the FLOPs that is left: a large mark for each row, small ones for
    its seeds, a line through the rows of one kind, and a dashed one at the reference."""
    reference, kinds = rows[REFERENCE], {}
    for key, row in rows.items():
        kinds.setdefault(key.partition("@")[0], []).append(row)
    names = {"sauron": "Sauron", "sauron-lambda0": "Sauron (lambda = 0)", "nnunet-widths": "its widths, from scratch"}
    names |= {"nnunet-pruned": "torch-pruning, fine-tuned"}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 4)
        axes = figure.add_subplot()
        level = reference["dice"]["mean foreground"]["mean"]
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label="nnUNet, unpruned")
        axes.axhspan(level - 0.01, level, color="black", alpha=0.08, linewidth=0, label="0.01 below it")
        for (kind, name), colour, marker in zip(names.items(), COLOURS, "os^D", strict=False):
            points = []
            for row in kinds.get(kind, []):
                share = 100 * row["flops"]["mean"] / reference["flops"]["mean"]
                points.append((share, row["dice"]["mean foreground"]["mean"]))
                seeds = [fmean(dice) for dice in row["by_seed"]["dice"] if None not in dice]
                axes.plot([share] * len(seeds), seeds, marker, color=colour, markersize=3, alpha=0.6)
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=colour, markersize=8, label=name)
        axes.set(xlabel="FLOPs left, %", ylabel="mean foreground Dice", title="Dice against FLOPs", xlim=(0, 100))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, path, dpi=150)


def finished_rows(plan: Plan) -> dict[str, list[int]]:
    """{key: seeds} of what has been evaluated in the folder, in the order of the table."""
    found: dict[str, list[int]] = {}
    for path in (plan.output / "results").glob("*.json"):
        match = re.fullmatch(r"(.+)-(\d+)", path.stem)
        if match and match[1].partition("@")[0] in ROWS:
            found.setdefault(match[1], []).append(int(match[2]))

    def place(key: str) -> tuple[str, int]:
        kind, _, limit = key.partition("@")
        return limit, ROWS.index(kind)

    order = sorted(found, key=place)
    return {key: sorted(found[key]) for key in order}


def benchmark(args: argparse.Namespace) -> None:
    if torch_pruning is None:
        raise InputError(f"torch-pruning is missing, which the last row needs: pip install {TORCH_PRUNING}")
    plan = make_plan(args)
    check_settings(plan)
    patch_size, device = plan.data.patch_size, find_device(plan.config["device"])
    tasks = list(product(plan.seeds, plan.rows))
    for i, (seed, row) in enumerate(tasks, 1):
        print(f"row {i} of {len(tasks)}: {plan.row(row).title}, seed {seed}", flush=True)
        train_row(plan, row, seed)
        if row != HALF:
            evaluate_row(plan, row, seed)

    found = finished_rows(plan)
    tasks, sizes, models = [(row, seed) for row, seeds in found.items() for seed in seeds], {}, []
    results = {task: evaluate_row(plan, *task) for task in tasks}
    for row, seed in tasks:
        path = find_model(plan, row, seed)
        models.append(load_model(path, device))
        size = {key: value for key, value in summary(models[-1], patch_size).items() if key != "filters"}
        runs = [find_run(plan, one, seed)[0] for one in (row, HALF if plan.row(row).pruned == HALF else None) if one]
        seconds = sum(sum(json.loads((run / "history.json").read_text())["seconds"]) for run in runs)
        sizes[row, seed] = size | {"bytes": path.stat().st_size, "training_seconds": seconds}
    images = [subject for part in plan.partitions for subject in plan.data.ids[part]]
    volumes = plan.data.get(plan.partitions[0])
    volumes = [volumes[i]["image"].data for i in range(min(TIMED, len(volumes)))]
    for task, seconds in zip(tasks, inference_seconds(models, volumes, patch_size, plan.tta), strict=True):
        sizes[task]["inference_seconds"] = seconds

    rows = {}
    for row, seeds in found.items():
        same = [seed for seed in seeds if seed in found[REFERENCE]]
        rows[row] = make_row(
            plan.row(row).title,
            [results[row, seed] for seed in seeds],
            [sizes[row, seed] for seed in seeds],
            [results[REFERENCE, seed] for seed in same],
            plan.data.class_names,
        )
        rows[row]["seeds"] = seeds
    for row in rows:
        if plan.row(row).like in rows:
            ours, seeds = plan.row(row).like, [seed for seed in found[row] if seed in found[plan.row(row).like]]
            sides = [[results[key, seed] for seed in seeds] for key in (ours, row)]
            rows[row]["sauron_minus_this"] = difference(*sides)
    write_table(plan, rows, device, len(images), len(volumes))


def write_table(plan: Plan, rows: dict[str, dict], device: torch.device, n_images: int, n_timed: int) -> None:
    """table.md, table.json and dice_flops.png."""
    about = {"data": plan.data.name, "partitions": plan.partitions, "subjects": n_images, "seeds": plan.seeds} | facts()
    about["where"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {about['machine']}"
    write_json(plan.output / "table.json", about | {"settings": plan.config, "rows": list(rows.values())})
    patients = {case_number(subject) for part in plan.partitions for subject in plan.data.ids[part]}
    notes = NOTES.format(
        **about,
        partition=" and ".join(plan.partitions),
        patients=len(patients),
        epochs=plan.config["epochs"],
        patch=" x ".join(map(str, plan.data.patch_size)),
        reference=rows[REFERENCE]["row"],
        pruned="pruned after half of the epochs and fine-tuned for the other half, where Sauron has a budget",
        mirrored="all mirrorings" if plan.tta else "no mirrorings",
        timed=n_timed,
    )
    text = f"{format_table(list(rows.values()), rows[REFERENCE])}\n{textwrap.fill(notes.strip(), 120)}\n"
    for row in rows.values():
        if "sauron_minus_this" in row:
            found = row["sauron_minus_this"]
            text += f"\n- Sauron minus {row['row']}: {format_difference(found)}, {found['n']} patients"
    text += "\n" if text[-1] != "\n" else ""
    write_text(plan.output / "table.md", text)
    draw(rows, plan.output / "dice_flops.png")
    print(f"{text}\nwritten: table.md, table.json and dice_flops.png in {plan.output}")


def main(argv: list[str] | None = None) -> int:
    """Run or continue the benchmark; returns the exit code: 0, or 2 after one line about bad input."""
    return run_script(lambda: benchmark(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""The paper's benchmark (section 4.1) as one command: `python -m lib.experiments.benchmark --data phantom`.

For every seed it trains, predicts and evaluates the rows of `ROWS`; then it times all networks and writes table.md and
table.json. The same command continues where it was interrupted. All of it runs in this process, through the `main` of
the three scripts: every training seeds itself, so the rows leave no trace in one another's random states, and torch is
imported once instead of fifteen times a seed.
"""

import argparse
import json
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

import torch
from scipy.stats import wilcoxon
from torch import Tensor
from tqdm import tqdm

import evaluate
import predict
import train
from lib.checkpoint import newest_epoch, save_model, write_json, write_text
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.error import InputError
from lib.evaluation import RESERVED
from lib.inference import predict_volume
from lib.models import load_model, summary
from lib.models.nnUNet import nnUNet
from lib.utils import facts, find_device, make_config, number, parseArguments, run_script

try:
    import torch_pruning
except ImportError:  # nothing else in the project needs it
    torch_pruning = None

TORCH_PRUNING = "torch-pruning==1.6.1"
ROWS = {  # what the row is called, and its flags for train.py
    "sauron": ("Sauron", []),
    "sauron-lambda0": ("Sauron (lambda = 0)", ["--lambda", "0"]),
    "nnunet": ("nnUNet", ["--model", "nnunet"]),
    "nnunet-widths": ("nnUNet of Sauron's widths, from scratch", ["--model", "nnunet"]),
    "nnunet-pruned": ("nnUNet, torch-pruning to Sauron's FLOPs, fine-tuned", ["--model", "nnunet"]),
}
REFERENCE = "nnunet"  # what the p-values and percentages compare with
OWN = (  # flags of train.py that the rows set themselves
    *("exp_name", "output", "seed_train", "epochs", "model", "no_prune"),
    *("in_filters", "out_filters", "epoch_start", "model_state", "history", "resume"),
)
FREE = {"exp_name", "output", "seed_train", "data_path", "cache_path", "num_workers"}  # may change between two calls
NOTES = """
{data}: {subjects} {partition} images, {epochs} epochs, seeds {seeds} (mean ± standard deviation where there are
several), on {where}. Percentages refer to {reference}. HD95 averages over the images that have one. FLOPs are torch's
count for one patch of {patch}. Training is the row's own: the widths of the fourth row come from Sauron's training, the
weights of the last one from {reference}'s. torch-pruning: magnitude importance (squared L2 norm, averaged over the
layers of a group, divided by its mean), global ranking, at least one filter per block, heads kept. Inference is the
network on a preprocessed volume with all mirrorings: median over the images, all rows one after another in one process.
p: Wilcoxon signed-rank test against {reference} on the images' mean foreground Dice, averaged over the seeds.
"""


@dataclass(frozen=True)
class Plan:
    """What to do, checked."""

    output: Path
    seeds: tuple[int, ...]
    flags: tuple[str, ...]  # of train.py, for all rows
    config: dict  # the settings of the first row
    partition: str  # what is predicted
    data: BaseDataset


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lib.experiments.benchmark",
        usage="%(prog)s --data D [--seeds 1 2 3] [--epochs N] [--output FOLDER] [-- flags of train.py]",
        description="Train, predict and evaluate Sauron, its baselines and nnUNet; one table as Markdown and JSON.",
    )
    add = parser.add_argument
    add("--data", required=True, choices=sorted(DATASETS), help="data set (required)")
    add("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
    add("--epochs", type=number(int, 1), help="of every training (default: the data set's)")
    add("--output", type=Path, help="folder of all that is made (default: out/benchmark/<data>)")
    add("flags", nargs="*", help="after --: flags of train.py for all rows, such as -- --fms_init 16")
    return parser.parse_args(argv)


def make_plan(args: argparse.Namespace) -> Plan:
    """Raises InputError where a training would, and where a flag after -- is the benchmark's own."""
    flags = ["--data", args.data, *args.flags]
    given = parseArguments(flags)
    for key in OWN:
        if getattr(given, key) is not None:
            raise InputError(f"--{key} after --: the benchmark sets it for each row; leave it out")
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    config, *_ = [make_config(parseArguments([*flags, *own])) for _, own in ROWS.values()]
    find_device(config["device"])
    keys = ("data_path", "cache_path", "split", "seed_data", "patch_size", "num_workers")
    data = DATASETS[config["data"]](**{key: config[key] for key in keys})
    output = args.output or Path("out", "benchmark", data.name)
    return Plan(output, tuple(dict.fromkeys(args.seeds)), tuple(flags), config, choose_partition(data), data)


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
    if epoch >= plan.config["epochs"]:
        return run
    argv = [*plan.flags, *ROWS[row][1], "--seed_train", str(seed)]
    argv += ["--output", str(plan.output / "runs"), "--exp_name", f"{row}-{seed}"]
    if run:
        argv += ["--resume", str(run)]
    elif row == "nnunet-widths":
        sauron, _ = find_run(plan, "sauron", seed)
        argv += ["--in_filters", str(sauron / "in_filters"), "--out_filters", str(sauron / "out_filters")]
    elif row == "nnunet-pruned":
        sauron, model = (load_model(find_model(plan, other, seed)) for other in ("sauron", "nnunet"))
        prune_by_magnitude(model, summary(sauron, plan.data.patch_size)["flops"], plan.data.patch_size)
        pruned = plan.output / "pruned" / f"model-{seed}"
        pruned.parent.mkdir(exist_ok=True)
        save_model(pruned, model)
        argv += ["--model_state", str(pruned)]
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
        with torch.device("meta"):
            network = nnUNet(model.modalities, model.n_classes, 1, model.levels, dim=model.dim, filters={"out": out})
        return summary(network, patch_size)["flops"]

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
        argv = ["--data", plan.data.name, "--output", str(predictions), "--partition", plan.partition]
        argv += ["--model_state", str(find_model(plan, row, seed)), "--device", plan.config["device"]]
        call(predict, [*argv, "--skip_existing", *(["--original", data_path] if data_path else [])])
        argv = ["--data", plan.data.name, "--pred", str(predictions), "--output", str(results)]
        argv += ["--num_workers", str(max(1, plan.config["num_workers"]))]
        call(evaluate, [*argv, *(["--gt", data_path] if data_path else [])])
    return json.loads(results.read_text())


def inference_seconds(models: list[nnUNet], volumes: list[Tensor], patch_size: tuple[int, ...]) -> list[float]:
    """Median seconds of `predict_volume`, all mirrorings, over the volumes (modalities, X, Y, Z), by model.

    Each volume goes through all models one after another, so that other load on the machine meets all of them.
    """
    batch_size = 8 if len(patch_size) == 2 else 2  # as predict.py
    warm_up = torch.zeros(len(volumes[0]), *patch_size, *[1] * (3 - len(patch_size)))
    for model in models:
        predict_volume(model, warm_up, patch_size, batch_size=batch_size)
    seconds = [[] for _ in models]
    for volume in tqdm(volumes, desc="inference time", unit="volume"):
        for model, values in zip(models, seconds, strict=True):
            start = time.perf_counter()
            predict_volume(model, volume, patch_size, batch_size=batch_size)
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
    return row


def format_table(rows: list[dict], reference: dict) -> str:
    """The Markdown table of `make_row`'s rows; percentages refer to `reference`, one of them."""

    def cell(value: dict, digits: int, unit: float = 1) -> str:
        numbers = [f"{value[key] / unit:.{digits}f}" for key in ("mean", "sd") if value[key] is not None]
        return " ± ".join(numbers) or "-"

    names, p = list(rows[0]["dice"]), "Wilcoxon p"
    head = ["", *(f"Dice {name}" for name in names), *(f"HD95 {name}, mm" for name in names), "parameters, M"]
    lines = [[*head, "FLOPs, G", "file, MB", "training, min", "inference, s per volume", p]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        line = [cell(row["dice"][name], 3) for name in names] + [cell(row["HD95"][name], 2) for name in names]
        for key, unit in (("parameters", 1e6), ("flops", 1e9)):
            line.append(f"{cell(row[key], 3, unit)} ({row[key]['mean'] / reference[key]['mean']:.0%})")
        line += [cell(row["bytes"], 2, 1e6), cell(row["training_seconds"], 1, 60), cell(row["inference_seconds"], 3)]
        p = row["wilcoxon_p"]
        lines.append([row["row"], *line, "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def benchmark(args: argparse.Namespace) -> None:
    if torch_pruning is None:
        raise InputError(f"torch-pruning is missing, which the last row needs: pip install {TORCH_PRUNING}")
    plan = make_plan(args)
    check_settings(plan)
    patch_size, device = plan.data.patch_size, find_device(plan.config["device"])
    tasks, results, sizes, models = list(product(plan.seeds, ROWS)), {}, {}, []
    for i, (seed, row) in enumerate(tasks, 1):
        print(f"row {i} of {len(tasks)}: {ROWS[row][0]}, seed {seed}", flush=True)
        run = train_row(plan, row, seed)
        results.setdefault(row, []).append(evaluate_row(plan, row, seed))
        path = find_model(plan, row, seed)
        models.append(load_model(path, device))
        size = {key: value for key, value in summary(models[-1], patch_size).items() if key != "filters"}
        seconds = sum(json.loads((run / "history.json").read_text())["seconds"])
        sizes.setdefault(row, []).append(size | {"bytes": path.stat().st_size, "training_seconds": seconds})
    volumes = [subject["image"].data for subject in plan.data.get(plan.partition)]
    for (seed, row), seconds in zip(tasks, inference_seconds(models, volumes, patch_size), strict=True):
        sizes[row][plan.seeds.index(seed)]["inference_seconds"] = seconds

    class_names = plan.data.class_names
    rows = {row: make_row(ROWS[row][0], results[row], sizes[row], results[REFERENCE], class_names) for row in ROWS}
    about = {
        "data": plan.data.name,
        "partition": plan.partition,
        "subjects": len(volumes),
        "seeds": plan.seeds,
    } | facts()
    about["where"] = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {about['machine']}"
    write_json(plan.output / "table.json", about | {"settings": plan.config, "rows": list(rows.values())})
    words = {
        "epochs": plan.config["epochs"],
        "patch": " x ".join(map(str, patch_size)),
        "reference": ROWS[REFERENCE][0],
    }
    text = format_table(list(rows.values()), rows[REFERENCE])
    notes = NOTES.format(**about | words | {"seeds": " ".join(map(str, plan.seeds))})
    text += f"\n{textwrap.fill(notes.strip(), 120)}\n"
    write_text(plan.output / "table.md", text)
    print(f"{text}\nwritten: {plan.output / 'table.md'}, {plan.output / 'table.json'}")


def main(argv: list[str] | None = None) -> int:
    """Run or continue the benchmark; returns the exit code: 0, or 2 after one line about bad input."""
    return run_script(lambda: benchmark(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""The paper's benchmark (section 4.1) as one command: `python -m lib.experiments.benchmark --data phantom`.

For every seed it trains, predicts and evaluates the rows that are asked for; then it times all networks and writes
table.md, table.json and a figure. The same command continues where it was interrupted. All of it runs in this process,
through the `main` of the three scripts: every training seeds itself, so the rows leave no trace in one another's
random states, and torch is imported once instead of fifteen times a seed.
"""

import argparse
import json
import re
import shutil
import sys
import textwrap
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
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
from lib.build import build_dataset
from lib.checkpoint import newest_epoch, save_model
from lib.data import DATASETS
from lib.data.BaseDataset import case_number
from lib.data.loading import Loader
from lib.evaluation import RESERVED
from lib.experiments.figures import COLOURS, STYLE, new_figure, save_figure
from lib.inference import default_batch_size, predict_volume
from lib.models import load_model
from lib.models.filters import format_filters
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, resized, summary
from lib.settings import Settings
from lib.system.cli import Parser, flops_limit, number, one_of, run_script
from lib.system.device import find_device
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import file_digest, made, write_json, write_text
from lib.utils import parseArguments

try:
    import torch_pruning
except ImportError:  # nothing else in the project needs it
    torch_pruning = None

TORCH_PRUNING = "torch-pruning==1.6.1"
NNUNET = ("--model", "nnunet")
REFERENCE = "nnunet"  # what the p-values and percentages compare with
HALF = "nnunet-half"  # trained for half of the epochs, to be pruned and fine-tuned in the other half
WITHOUT_BUDGET = "sauron-lambda0"  # the row that --budgets leave out
ROWS = (  # in the order of the table, which is one in which each finds what it needs
    *("sauron", WITHOUT_BUDGET, "sauron-random"),
    *(REFERENCE, "nnunet-widths", "nnunet-flat", "nnunet-pruned"),
)
OTHER_PATCHES = 10**6  # added to the seed of the second half, which would see the patches of the first one again
OWN = (  # flags of train.py that the rows set themselves
    *("exp_name", "output", "seed_train", "epochs", "model", "no_prune"),
    *("in_filters", "out_filters", "epoch_start", "model_state", "history", "resume"),
)
FREE = {  # may change between two calls
    *("exp_name", "output", "seed_train", "data_path", "cache_path", "num_workers", "device"),
}
NOTES = {  # "" is about the whole table, the others about their rows
    "": """
{data}: {subjects} {partition} images of {patients} patients. Every row is trained for {epochs} epochs in all, so for
as many optimizer steps; the learning rate falls from {lr:g} to 0 as (1 - e / epochs)^0.9. Means over the seeds, ±
standard deviation where there are several. Percentages refer to {reference}. HD95 averages over the images that have
one. FLOPs are torch's count for one patch of {patch}. p: Wilcoxon signed-rank test against {reference} over the
patients: the mean foreground Dice of each one's images, averaged over the seeds that both rows have. The difference of
the mean foreground Dice is that to {reference}, of the same seeds and paired by patient too, with the 95% interval of
its mean (Student's t). Training is the time of the epochs with their validation, without Sauron's deletions in between.
""",
    "sauron": """
Sauron: pruned while it trains. Where it has a budget, it trains on with the segmentation loss alone once it fits, and
the learning rate falls from {lr:g} to 0 once more.
""",
    "sauron-lambda0": "Sauron (lambda = 0): as Sauron, but without the distance term of the loss.",
    "sauron-random": """
random filters: as Sauron, with the same loss, schedule and budget, but each time the values of delta_prune are dealt
to the filters of their block at random: as many go as by these values, and chance says which.
""",
    "nnunet-widths": """
nnUNet of Sauron's widths: new weights in a network of the widths that Sauron of the same seed ends with. Sauron's
training is not in its time.
""",
    "nnunet-flat": """
flat U-Net: new weights in a network whose blocks, but for the heads, all have one width: the one whose FLOPs are
nearest to those that Sauron of the same seed ends with (compare Lean U-Net, arXiv 2512.03834). Sauron's training is
not in its time.
""",
    "nnunet-pruned": """
torch-pruning: an nnUNet is trained for {half} of the {epochs} epochs, pruned, and fine-tuned for the other {rest} on
other patches, with a new optimizer; the learning rate falls from {lr:g} to 0 in either training. Its time is that of
both and of the pruning; Sauron's training is not in it. The number of filters is the one whose FLOPs are nearest to
those that Sauron of the same seed ends with; magnitude importance (squared L2 norm, averaged over the layers of a
group, divided by its mean), global ranking, at least one filter per block, heads kept.
""",
}
TIMED = 5  # images, for the seconds of inference


@dataclass(frozen=True)
class Row:
    """A network of the table, by its key: a name of ROWS, or "name@limit" with a budget ("20pct" for 20%)."""

    title: str
    flags: tuple[str, ...]  # of train.py
    epochs: int
    needs: tuple[str, ...] = ()  # the rows that are trained before it: the Sauron that it resembles, and what is pruned


def make_row_plan(key: str, epochs: int) -> Row:
    """What there is to train for a row, of as many `epochs` in all as every other."""
    kind, _, limit = key.partition("@")
    sauron, limit = f"sauron@{limit}" if limit else "sauron", limit.replace("pct", "%")
    at, budget = (f" ({limit})", ("--max_flops", limit)) if limit else ("", ())
    half, pruned = epochs // 2, f"nnUNet, torch-pruning to Sauron's FLOPs{at}, fine-tuned"
    return {
        "sauron": Row(f"Sauron, budget {limit}" if limit else "Sauron", budget, epochs),
        "sauron-lambda0": Row("Sauron (lambda = 0)", ("--lambda", "0"), epochs),
        "sauron-random": Row(f"random filters{at}, otherwise Sauron", (*budget, "--imp_fun", "random"), epochs),
        "nnunet": Row("nnUNet", NNUNET, epochs),
        "nnunet-widths": Row(f"nnUNet of Sauron's widths{at}, from scratch", NNUNET, epochs, (sauron,)),
        "nnunet-flat": Row(f"flat U-Net of Sauron's FLOPs{at}, from scratch", NNUNET, epochs, (sauron,)),
        "nnunet-half": Row("nnUNet, half of the epochs", NNUNET, half),
        "nnunet-pruned": Row(pruned, NNUNET, epochs - half, (sauron, HALF)),
    }[kind]


def kind_of(key: str) -> str:
    """The name of ROWS, or HALF, in a row's key."""
    return key.partition("@")[0]


def rows_to_train(kinds: tuple[str, ...], budgets: list[str]) -> tuple[str, ...]:
    """The keys of the rows of these kinds, of the reference and of all that they need, in an order in which each finds
    what it needs."""
    keys = [*ROWS[:-1], HALF, ROWS[-1]]
    if budgets:
        limits = dict.fromkeys(budget.replace("%", "pct") for budget in budgets)
        limited = [kind for kind in ROWS if kind not in (REFERENCE, WITHOUT_BUDGET)]
        keys = [REFERENCE, HALF, *(f"{kind}@{limit}" for limit in limits for kind in limited)]
    wanted = {REFERENCE, *(key for key in keys if kind_of(key) in kinds)}
    wanted |= {need for key in wanted for need in make_row_plan(key, 2).needs}
    return tuple(key for key in keys if key in wanted)


@dataclass(frozen=True)
class Plan:
    """What to do, checked."""

    output: Path
    rows: tuple[str, ...]  # keys of what is to be trained
    seeds: tuple[int, ...]
    flags: tuple[str, ...]  # of train.py, for all rows
    settings: Settings  # of the first row
    partitions: tuple[str, ...]  # what is predicted
    tta: bool  # whether predictions average over mirrorings
    data: Loader
    device: torch.device

    def row(self, key: str) -> Row:
        return make_row_plan(key, self.settings.epochs)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lib.experiments.benchmark",
        usage="%(prog)s --data D [--rows ROW ...] [--seeds 1 2 3] [--epochs N] [--budgets 20%% 50%%] [--output FOLDER] "
        "[-- flags of train.py]",
        description="Train, predict and evaluate Sauron, its baselines and nnUNet; one table as Markdown and JSON, and "
        "a figure of Dice against FLOPs. What is finished in the folder is never trained again, and is in the table: "
        "the same command with another --device after -- times all of it there.",
    )
    add = parser.add_argument
    add("--data", required=True, **one_of(DATASETS), help="data set (required)")
    add("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3], help="of the trainings (default: 1 2 3)")
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
    if given.imp_fun == "random":
        raise InputError("--imp_fun random after --: is the row sauron-random; leave it out")
    if args.budgets and WITHOUT_BUDGET in (args.rows or ()):
        raise InputError(f"--rows {WITHOUT_BUDGET}: has no budget; leave it or --budgets out")
    flags += ["--epochs", str(args.epochs)] if args.epochs else []
    seeds = tuple(dict.fromkeys(args.seeds))
    rows = rows_to_train(args.rows or ROWS, args.budgets)
    settings, *_ = [
        Settings.of(vars(parseArguments([*flags, *make_row_plan(row, 2).flags]))) for row in ("sauron", *rows)
    ]
    output = args.output or Path("out", "benchmark", settings.data)
    check_pruned_rows(output, rows, seeds, settings.epochs)
    device = find_device(settings.device)
    data = build_dataset(settings)
    partitions = tuple(dict.fromkeys(args.partitions or [choose_partition(data)]))
    for partition in partitions:
        if not all(file.label for file in data.files(partition)):
            raise InputError(f"--partitions {partition}: some of these images have no ground truth; name another")
    return Plan(output, rows, seeds, tuple(flags), settings, partitions, not args.no_tta, data, device)


def check_pruned_rows(output: Path, rows: tuple[str, ...], seeds: tuple[int, ...], epochs: int) -> None:
    """Raise InputError where a row of torch-pruning has no two halves, or is still to be pruned and the library is not
    installed."""
    pruned = [row for row in rows if HALF in make_row_plan(row, epochs).needs]
    others = [kind for kind in ROWS[:-1] if kind in map(kind_of, rows)]
    others = f"leave it out with --rows {' '.join(others)}"
    if pruned and epochs < 2:
        raise InputError(
            f"--epochs {epochs}: nnunet-pruned needs one before and one after it is pruned; give 2, or {others}"
        )
    if torch_pruning is None and any(find_run(output, row, seed)[0] is None for row, seed in product(pruned, seeds)):
        raise InputError(
            f"torch-pruning is missing, which nnunet-pruned needs: pip install {TORCH_PRUNING}, or {others}"
        )


def choose_partition(data: Loader) -> str:
    """ "test"; "validation" where the test set has no ground truth. Raises InputError if neither has any."""
    for partition in ("test", "validation"):
        files = data.files(partition)
        if files and all(file.label for file in files):
            return partition
    raise InputError(
        f"--data {data.dataset.name}: no test or validation images with ground truth; add some, or change --split"
    )


def check_settings(plan: Plan) -> None:
    """Write the settings into the folder. Raises InputError if what is there was made with others."""
    path = plan.output / "settings.json"
    settings = {key: value for key, value in plan.settings.as_dict().items() if key not in FREE}
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


def find_run(output: Path, row: str, seed: int) -> tuple[Path | None, int]:
    """The row's newest run with a finished epoch, and this epoch; None and 0 if there is none."""
    folder = output / "runs" / f"{row}-{seed}"
    runs = [run for run in folder.glob("*/*") if any((run / "models").glob("state-*"))]
    run = max(runs, key=lambda run: int(run.name), default=None)
    return run, (newest_epoch(run) or 0) if run else 0


def find_model(plan: Plan, row: str, seed: int) -> Path:
    """The newest model of a row that has been trained."""
    run, epoch = find_run(plan.output, row, seed)
    return run / "models" / f"model-{epoch}"


def parse_name(name: str) -> tuple[str, int] | None:
    """The key and the seed of a file or folder that is named "key-seed"; None if it is not."""
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return (match[1], int(match[2])) if match and kind_of(match[1]) in (*ROWS, HALF) else None


def check_runs(plan: Plan) -> None:
    """Raise InputError where a run in the folder was trained in another way than its row is now: torch-pruning's was
    once fine-tuned for all epochs, beside those that came before."""
    for folder in (plan.output / "runs").glob("*"):
        task = parse_name(folder.name)
        run, _ = find_run(plan.output, *task) if task else (None, 0)
        if run is None:
            continue
        row, epochs = plan.row(task[0]), Settings.read(run)[0].epochs
        reason = f"for {epochs} epochs, not {row.epochs}" if epochs != row.epochs else ""
        if HALF in row.needs and not pruned_file(plan, *task).exists():
            reason = reason or "without keeping the seconds of the pruning"
        if reason:
            raise InputError(
                f"{folder}: an earlier version trained this {reason}; delete the folder, or give another --output"
            )


def train_row(plan: Plan, row: str, seed: int) -> None:
    """Train a row to its end, unless it has been. The rows that it needs have been trained."""
    run, epoch = find_run(plan.output, row, seed)
    what = plan.row(row)
    if epoch >= what.epochs:
        return
    argv = [*plan.flags, *what.flags, "--epochs", str(what.epochs), "--device", str(plan.device)]
    argv += ["--seed_train", str(seed + OTHER_PATCHES if HALF in what.needs else seed)]
    argv += ["--output", str(plan.output / "runs"), "--exp_name", f"{row}-{seed}"]
    call(train, [*argv, *(["--resume", str(run)] if run else starting_network(plan, row, seed))])


def starting_network(plan: Plan, row: str, seed: int) -> list[str]:
    """The flags of train.py for the network that a row starts from, which is made here if need be."""
    needs, patch_size = plan.row(row).needs, plan.data.patch_size
    if not needs:
        return []
    if kind_of(row) == "nnunet-widths":
        sauron, _ = find_run(plan.output, needs[0], seed)
        return ["--in_filters", str(sauron / "in_filters"), "--out_filters", str(sauron / "out_filters")]
    sauron = load_model(find_model(plan, needs[0], seed))
    flops = summary(sauron, patch_size)["flops"]
    if kind_of(row) == "nnunet-flat":
        file = plan.output / "flat" / f"{row}-{seed}"
        file.parent.mkdir(exist_ok=True)
        write_text(file, format_filters([count_filters(flat(sauron, flops, patch_size))["out"]]))
        return ["--out_filters", str(file)]
    start = time.perf_counter()
    model = load_model(find_model(plan, HALF, seed))
    prune_by_magnitude(model, flops, patch_size)
    file = plan.output / "pruned" / f"{row}-{seed}"
    file.parent.mkdir(exist_ok=True)
    save_model(file, model)
    write_json(pruned_file(plan, row, seed), {"flops": flops, "seconds": time.perf_counter() - start})
    return ["--model_state", str(file)]


def pruned_file(plan: Plan, row: str, seed: int) -> Path:
    """Of a row of torch-pruning: where Sauron's FLOPs and the seconds of the pruning are kept."""
    return plan.output / "pruned" / f"{row}-{seed}.json"


def check_likeness(plan: Plan, row: str, seed: int) -> None:
    """Raise InputError where a row was made like another network of Sauron than the one that is there."""
    needs, patch_size = plan.row(row).needs, plan.data.patch_size
    if not needs:
        return
    model, sauron = (load_model(find_model(plan, key, seed)) for key in (row, needs[0]))
    flops = expected = summary(sauron, patch_size)["flops"]
    if HALF in needs:
        flops = json.loads(pruned_file(plan, row, seed).read_text())["flops"]
    else:
        alike = flat(sauron, expected, patch_size) if kind_of(row) == "nnunet-flat" else sauron
        flops, expected = (summary(network, patch_size)["flops"] for network in (model, alike))
    if flops != expected:
        raise InputError(
            f"{plan.output / 'runs' / f'{row}-{seed}'}: was made like another network than that of {needs[0]}-{seed} "
            f"({flops:,} FLOPs, not {expected:,}); delete this folder, and give the same command again"
        )


def training_seconds(plan: Plan, row: str, seed: int) -> float:
    """Of all epochs that the row is made of, and of its pruning."""
    seconds = 0.0
    if HALF in plan.row(row).needs:
        seconds = training_seconds(plan, HALF, seed) + json.loads(pruned_file(plan, row, seed).read_text())["seconds"]
    run, _ = find_run(plan.output, row, seed)
    return seconds + sum(json.loads((run / "history.json").read_text())["seconds"])


def trained_on(plan: Plan, row: str, seed: int) -> str:
    """The devices, machines and precision of all epochs that the row is made of."""
    places = [trained_on(plan, HALF, seed)] if HALF in plan.row(row).needs else []
    settings, about = Settings.read(find_run(plan.output, row, seed)[0])
    machines = dict.fromkeys(part.get("machine", "?") for part in (about, *about.get("continued", [])))
    machines = [f"{settings.device}, {machine}" for machine in machines] if len(machines) == 1 else machines
    places += [f"{machine}, {settings.precision or 'float32'}" for machine in machines]
    return "; ".join(dict.fromkeys(places))


def nearest(sizes: range, flops_of: Callable[[int], int], flops: int) -> int:
    """The size whose FLOPs, which grow with it, are nearest to `flops`."""
    i = bisect_left(sizes, flops, key=flops_of)  # of the first that has so many
    return min(sizes[max(i - 1, 0) : i + 1], key=lambda size: abs(flops_of(size) - flops))


def flat(model: nnUNet, flops: int, patch_size: tuple[int, ...]) -> nnUNet:
    """A network as `model`, without weights, whose blocks but the heads have one width: that of the nearest FLOPs."""
    names = [block.name for block in model.blocks() if not block.head]

    def of_width(width: int) -> nnUNet:
        return resized(model, dict.fromkeys(names, width))

    return of_width(nearest(range(1, 481), lambda width: summary(of_width(width), patch_size)["flops"], flops))


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

    def flops_with(n: int) -> int:
        gone = Counter(name for _, name, _ in ranking[: len(ranking) - n])
        out = {name: width - gone[name] for name, width in widths.items()}
        return summary(resized(model, out), patch_size)["flops"]

    n = len(ranking) - nearest(range(len(ranking) + 1), flops_with, flops)
    for name in widths:
        if filters := [c for _, other, c in ranking[:n] if other == name]:
            group(name, filters).prune()


def evaluate_row(plan: Plan, row: str, seed: int) -> dict:
    """What evaluate.py says of the row's newest model: before, or now.

    Predictions and results count as its own if the sum beside them, written before the first of them, is the model's.
    """
    model, name = find_model(plan, row, seed), f"{row}-{seed}"
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
    if not results.exists():
        argv = ["--data", plan.data.dataset.name, "--output", str(predictions), "--skip_existing"]
        argv += ["--model_state", str(model), "--device", str(plan.device)]
        argv += [*([] if plan.tta else ["--no_tta"]), *(["--original", data_path] if data_path else [])]
        for partition in plan.partitions:
            call(predict, [*argv, "--partition", partition])
        argv = ["--data", plan.data.dataset.name, "--pred", str(predictions), "--output", str(results)]
        argv += ["--num_workers", str(max(1, plan.settings.num_workers))]
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


def patient_dice(results: list[dict]) -> dict[int, float]:
    """{number of the patient: mean Dice of its images, as `subject_dice`}."""
    patients: dict[int, list[float]] = {}
    for subject, dice in subject_dice(results).items():
        if dice is not None:
            patients.setdefault(case_number(subject), []).append(dice)
    return {patient: fmean(values) for patient, values in patients.items()}


def paired_differences(results: dict[int, dict], reference: dict[int, dict]) -> list[float]:
    """By how much the Dice of each patient is larger in `results`: both are by seed, and their common seeds count."""
    seeds = [seed for seed in results if seed in reference]
    if not seeds:
        return []
    ours, theirs = (patient_dice([side[seed] for seed in seeds]) for side in (results, reference))
    return [ours[patient] - theirs[patient] for patient in ours if patient in theirs]


def wilcoxon_p(differences: list[float]) -> float | None:
    """p of the two-sided signed-rank test; None if there is no difference."""
    return float(wilcoxon(differences).pvalue) if any(differences) else None


def mean_difference(values: list[float]) -> dict[str, float | int | None]:
    """{"mean", "low", "high", "n"}: the mean of the `n` differences and its 95% interval (Student's t; null for less
    than two)."""
    if len(values) < 2:
        return {"mean": fmean(values) if values else None, "low": None, "high": None, "n": len(values)}
    half = float(student_t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": fmean(values), "low": fmean(values) - half, "high": fmean(values) + half, "n": len(values)}


def format_difference(found: dict) -> str:
    if found["low"] is None:
        return "-" if found["mean"] is None else f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def make_row(
    title: str, results: dict[int, dict], sizes: list[dict], reference: dict[int, dict], class_names: tuple[str, ...]
) -> dict:
    """One row of the table, JSON-able: the `results` of evaluate.py by seed, and in the order of the seeds `sizes`
    (parameters, flops, ...); `reference` holds the results, by seed, that the row is compared with."""
    row: dict = {"row": title, "seeds": list(results)}
    row["by_seed"] = {key: [seed[key] for seed in sizes] for key in sizes[0]}
    row |= {key: spread(values) for key, values in row["by_seed"].items()}
    for metric in ("dice", "HD95"):
        averages = row["by_seed"][metric] = [seed["average"][metric][1:] for seed in results.values()]
        row[metric] = {name: spread(v) for name, v in zip(class_names[1:], zip(*averages, strict=True), strict=True)}
        row[metric]["mean foreground"] = spread(spread(values)["mean"] for values in averages)
    differences = paired_differences(results, reference)
    return row | {"wilcoxon_p": wilcoxon_p(differences), "difference": mean_difference(differences)}


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
        kinds.setdefault(kind_of(key), []).append(row)
    names = {"sauron": "Sauron", "sauron-lambda0": "Sauron (lambda = 0)", "sauron-random": "random filters"}
    names |= {"nnunet-widths": "Sauron's widths, from scratch", "nnunet-flat": "flat U-Net, from scratch"}
    names |= {"nnunet-pruned": "torch-pruning, fine-tuned"}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 4)
        axes = figure.add_subplot()
        level = reference["dice"]["mean foreground"]["mean"]
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label="nnUNet, unpruned")
        axes.axhspan(level - 0.01, level, color="black", alpha=0.08, linewidth=0, label="0.01 below it")
        for (kind, name), colour, marker in zip(names.items(), COLOURS, "o^vsDP", strict=True):
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
    """{key: seeds} of what has been evaluated in the folder and trained, with what it needs, in the table's order."""
    found: dict[str, list[int]] = {}
    for row, seed in filter(None, (parse_name(path.stem) for path in (plan.output / "results").glob("*.json"))):
        if all(find_run(plan.output, one, seed)[1] >= plan.row(one).epochs for one in (row, *plan.row(row).needs)):
            found.setdefault(row, []).append(seed)

    def place(key: str) -> tuple[str, int]:
        kind, _, limit = key.partition("@")
        return limit, ROWS.index(kind)

    return {key: sorted(found[key]) for key in sorted(found, key=place)}


def benchmark(args: argparse.Namespace) -> None:
    plan = make_plan(args)
    with made(plan.output):
        run_plan(plan)


def run_plan(plan: Plan) -> None:
    """Do what is not done yet, and write the table."""
    check_settings(plan)
    check_runs(plan)
    tasks = list(product(plan.seeds, plan.rows))
    for i, (seed, row) in enumerate(tasks, 1):
        print(f"row {i} of {len(tasks)}: {plan.row(row).title}, seed {seed}", flush=True)
        train_row(plan, row, seed)
        if row != HALF:
            evaluate_row(plan, row, seed)

    found = finished_rows(plan)
    tasks, sizes, models = [(row, seed) for row, seeds in found.items() for seed in seeds], {}, []
    results = {row: {seed: evaluate_row(plan, row, seed) for seed in seeds} for row, seeds in found.items()}
    for row, seed in tasks:
        path = find_model(plan, row, seed)
        check_likeness(plan, row, seed)
        models.append(load_model(path, plan.device))
        sizes[row, seed] = summary(models[-1], plan.data.patch_size) | {"bytes": path.stat().st_size}
        del sizes[row, seed]["filters"]
        sizes[row, seed]["training_seconds"] = training_seconds(plan, row, seed)
    volumes = plan.data.get(plan.partitions[0])
    volumes = [volumes[i]["image"].data for i in range(min(TIMED, len(volumes)))]
    for task, seconds in zip(tasks, inference_seconds(models, volumes, plan.data.patch_size, plan.tta), strict=True):
        sizes[task]["inference_seconds"] = seconds

    rows = {}
    for row, seeds in found.items():
        of_seeds = [sizes[row, seed] for seed in seeds]
        rows[row] = make_row(
            plan.row(row).title, results[row], of_seeds, results[REFERENCE], plan.data.dataset.class_names
        )
        rows[row]["trained_on"] = [trained_on(plan, row, seed) for seed in seeds]
        ours = "@".join(["sauron", *row.split("@")[1:]])
        if ours in rows and row not in (ours, REFERENCE):
            rows[row]["sauron_minus_this"] = mean_difference(paired_differences(results[ours], results[row]))
    write_table(plan, rows, len(volumes))


def format_notes(plan: Plan, rows: dict[str, dict], place: str, n_timed: int) -> list[str]:
    """What stands below the table: how each row was made, and where. `place` is where inference was timed."""
    images = [subject for part in plan.partitions for subject in plan.data.ids[part]]
    about = {
        "data": plan.data.dataset.name,
        "subjects": len(images),
        "partition": " and ".join(plan.partitions),
        "patients": len({case_number(subject) for subject in images}),
        "epochs": plan.settings.epochs,
        "lr": plan.settings.lr,
        "half": plan.row(HALF).epochs,
        "rest": plan.row("nnunet-pruned").epochs,
        "patch": " x ".join(map(str, plan.data.patch_size)),
        "reference": rows[REFERENCE]["row"],
    }
    notes = [NOTES[kind].format(**about) for kind in NOTES if kind in ("", *map(kind_of, rows))]
    places: dict[str, list[str]] = {}
    for row in rows.values():
        for seed, trained in zip(row["seeds"], row["trained_on"], strict=True):
            places.setdefault(trained, []).append(f"{row['row']}, seed {seed}")
    if len(places) > 1:
        notes.append(
            "The rows were trained on different devices, or in different precision: their times cannot be compared."
        )
        notes += [f"Trained on {trained}: {'; '.join(titles)}." for trained, titles in places.items()]
    else:
        notes += [f"Trained on {trained}." for trained in places]
    mirrored = "all mirrorings" if plan.tta else "no mirrorings"
    notes.append(
        f"Inference was timed on {place}: the network on a preprocessed volume, {mirrored}, median over {n_timed} "
        "images, all rows one after another in one process."
    )
    for row in rows.values():
        if found := row.get("sauron_minus_this"):
            notes.append(f"Sauron minus {row['row']}: {format_difference(found)}, {found['n']} patients")
    return notes


def write_table(plan: Plan, rows: dict[str, dict], n_timed: int) -> None:
    """table.md, table.json and dice_flops.png."""
    about = facts(plan.device)
    place = f"{plan.device}, {about['machine']}"
    about |= {"data": plan.data.dataset.name, "partitions": plan.partitions, "seeds": plan.seeds, "inference_on": place}
    about["subjects"] = sum(len(plan.data.ids[part]) for part in plan.partitions)
    write_json(plan.output / "table.json", about | {"settings": plan.settings.as_dict(), "rows": list(rows.values())})
    wrapped = {"width": 120, "initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
    notes = [textwrap.fill(note.strip(), **wrapped) for note in format_notes(plan, rows, place, n_timed)]
    text = f"{format_table(list(rows.values()), rows[REFERENCE])}\n" + "".join(f"{note}\n" for note in notes)
    write_text(plan.output / "table.md", text)
    draw(rows, plan.output / "dice_flops.png")
    print(f"{text}\nwritten: table.md, table.json and dice_flops.png in {plan.output}")


def main(argv: list[str] | None = None) -> int:
    """Run or continue the benchmark; returns the exit code: 0, or 2 after one line about bad input."""
    return run_script(lambda: benchmark(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

"""Finished trainings in one table and one figure, in two steps.

`python -m lib.experiments.results keep RUN FILE.json --row ROW` makes a small JSON file of a training, which can be
committed. `python -m lib.experiments.results table FOLDER ... --output FOLDER` makes of such files results.md,
results.json, dice_flops.png and curves.png. `lib.experiments.results_table` says what is computed.
"""

import argparse
import sys
from pathlib import Path

from lib.data import DATASETS
from lib.evaluation import find_dataset
from lib.experiments.figures import make_output
from lib.experiments.kept import MS, ROWS, format_kept, keep_run, keep_scores, read_kept
from lib.experiments.results_figures import draw_curves, draw_dice_flops
from lib.experiments.results_table import format_results, make_results, read_folders
from lib.settings import fold_argument
from lib.system.cli import Parser, flops_limit, number, one_of, run_script
from lib.system.error import InputError
from lib.system.files import check_writable, write_json, write_text

NAMES = ("results.md", "results.json", "dice_flops.png")
ONLY_SCORES = ("data", "fold", "flops", "parameters", "whole_flops", "whole_parameters")
ONLY_RUNS = ("first",)
positive = number(float, 0, 1e18, open_low=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m lib.experiments.results", description="Finished trainings in one table and one figure.")
    commands = parser.add_subparsers(dest="step", required=True, metavar="{keep,table}")
    keep = commands.add_parser("keep", help="make a small JSON file of a training")
    add = keep.add_argument
    add("paths", type=Path, nargs="+", metavar="RUN FILE", help="run folder, if not --scores, and the file to write")
    add("--row", required=True, **one_of(ROWS), help="of the table (required)")
    add("--note", help="what to know about this training")
    add("--budget", type=flops_limit, help="that of Sauron which it is compared with (default: the run's own)")
    add("--seed", type=number(int, 0), help="by which rows are paired (default: the run's, or that of --first)")
    add("--seconds", type=positive, help="of training: beside those of the runs' epochs, or of --scores all")
    add("--first", type=Path, metavar="RUN", help="the run before this one, which torch-pruning has pruned")
    add("--overwrite", action="store_true", help="replace an existing file (default: refuse)")
    for key in MS:
        runtime = "torch" if key == "torch_ms" else "OpenVINO"
        add(f"--{key}", type=positive, help=f"measured milliseconds of a patch in {runtime} (default: not known)")
    scores = keep.add_argument_group("of nnunetv2, and others that have no run folder")
    scores.add_argument("--scores", type=Path, metavar="FILE", help="what evaluate.py has written of its predictions")
    scores.add_argument("--data", help="whose classes these are, as for evaluate.py")
    scores.add_argument("--fold", type=fold_argument, help="the fold of the training")
    scores.add_argument("--flops", type=positive, help="of one patch")
    scores.add_argument("--parameters", type=positive, help="of the network")
    whole = "of the network before pruning, which percentages refer to (default: not known)"
    scores.add_argument("--whole_flops", type=positive, help=whole)
    scores.add_argument("--whole_parameters", type=positive, help=whole)
    table = commands.add_parser("table", help="make the table and the figures")
    add = table.add_argument
    add("folders", type=Path, nargs="+", metavar="FOLDER", help="of the JSON files of keep")
    add("--output", type=Path, required=True, help="folder of all that is made (required)")
    add("--postprocessed", action="store_true", help="scores after post-processing (default: before)")
    return parser.parse_args(argv)


def keep(args: argparse.Namespace) -> None:
    *runs, file = args.paths
    if len(runs) != (0 if args.scores else 1):
        raise InputError("keep: give RUN and FILE.json, or --scores and FILE.json alone")
    if file.suffix != ".json":
        raise InputError(f"{file}: is no name of a .json file; give the run first, and then the file to write")
    if file.exists() and not args.overwrite:
        raise InputError(f"{file}: exists already; give --overwrite or another name")
    check_writable(file, "FILE")
    more = {"note": args.note} if args.note else {}
    more |= {key: getattr(args, key) for key in MS if getattr(args, key) is not None}
    if unused := [key for key in (ONLY_RUNS if args.scores else ONLY_SCORES) if getattr(args, key) is not None]:
        raise InputError(f"--{unused[0]}: goes only with{'out' * bool(args.scores)} --scores; leave it out")
    if args.scores:
        needed = ("data", "seed", "seconds", "flops", "parameters")
        if missing := [key for key in needed if getattr(args, key) is None]:
            raise InputError(f"--scores: needs --{missing[0]}")
        dataset = find_dataset(args.data)[0]
        own = dataset.name not in DATASETS
        if own == (args.fold is None):  # a row without a fold would not be paired, without a word
            raise InputError(f"--fold: {'is needed with' if own else 'is for own data; leave it out with'} {args.data}")
        size = {key: [getattr(args, f"whole_{key}"), getattr(args, key)] for key in ("parameters", "flops")}
        what = args.row, args.budget, dataset, args.fold, args.seed, args.seconds, size
        content = keep_scores(args.scores, *what, **more)
    else:
        content = keep_run(runs[0], args.row, args.budget, args.seed, args.seconds or 0, args.first, **more)
    write_text(file, format_kept(content) + "\n", replace=args.overwrite)
    training = read_kept(file)
    print(f"{file}: {training.title}, fold {training.fold}, seed {training.seed}")


def table(args: argparse.Namespace) -> None:
    trainings = read_folders(args.folders)
    results = make_results(trainings, "after" if args.postprocessed else "before")
    text = format_results(results)
    output = make_output(args.output)
    if output.resolve() in [folder.resolve() for folder in args.folders]:
        raise InputError(f"--output {output}: holds what is read; give another folder")
    write_json(output / "results.json", results)
    write_text(output / "results.md", text)
    draw_dice_flops(results, output / "dice_flops.png")
    draw_curves(trainings, output / "curves.png")
    names = [name for name in (*NAMES, "curves.png") if (output / name).exists()]
    print(f"{text}\nwritten: {', '.join(names)} in {output}")


def main(argv: list[str] | None = None) -> int:
    """Keep a training, or make the table; returns the exit code of `run_script`."""

    def run() -> None:
        args = parse_arguments(argv)
        {"keep": keep, "table": table}[args.step](args)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

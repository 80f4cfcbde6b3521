#!/usr/bin/env python3
"""Compare predictions with the ground truth: python evaluate.py --data acdc --pred out/predictions"""

import os
import sys
from pathlib import Path

from lib.data import DATASETS
from lib.data.nifti import scale_note
from lib.evaluation import Rules, evaluate, find_pairs, format_table, read_model_summary
from lib.metric import TOLERANCE_MM
from lib.record import foreign_files, mixed_jobs
from lib.system.cli import Parser, number, one_of, run_script
from lib.system.error import InputError
from lib.system.files import check_writable, write_json


def main(argv: list[str] | None = None) -> int:
    """Evaluate as `argv` says; returns the exit code of `run_script`."""
    parser = Parser(prog="evaluate.py", description="Compare predictions with the ground truth.")
    add = parser.add_argument
    add("--data", required=True, **one_of(DATASETS), help="the data set whose classes these are (required)")
    add("--pred", required=True, type=Path, help="folder of the predictions, <id>.nii.gz (required)")
    add("--gt", type=Path, help="folder of the ground truth, as the data set's or flat (default: the data set's own)")
    add("--output", type=Path, default=Path("results.json"), help="the JSON file to write (default: results.json)")
    add("--tolerance", type=number(float, 0, 1e6), default=TOLERANCE_MM, help="of the surface Dice, mm (default: 1.64)")
    add("--num_workers", type=number(int, 1, 1024), default=os.cpu_count(), help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace an existing --output (default: refuse)")

    def run() -> None:
        args = parser.parse_args(argv)
        if args.output.exists() and not args.overwrite:
            raise InputError(f"--output {args.output}: exists already; give --overwrite or another --output")
        check_writable(args.output, "--output")
        dataset = DATASETS[args.data]
        folders = dataset.folders(args.gt)
        found = find_pairs(args.pred, next(filter(Path.is_dir, folders), folders[0]), dataset.find)
        rules = Rules(dataset.n_classes, args.tolerance, dataset.merged_labels, dataset.regions)
        summary = read_model_summary(args.pred)
        names = [prediction.name for prediction, _ in found.pairs.values()]
        if mixed := mixed_jobs(args.pred, names):
            raise InputError(f"--pred {args.pred}: {mixed}; finish with predict.py --skip_existing, or --overwrite all")
        results = evaluate(found.pairs, rules, args.num_workers)
        try:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.output, results, replace=args.overwrite)
        except OSError as error:
            raise InputError(f"--output {args.output}: cannot be written ({error.strerror})") from error
        print(format_table(results, dataset.class_names, summary))
        note = scale_note(path for pair in found.pairs.values() for path in pair)
        for line in [*found.notes(), *foreign_files(args.pred, names), *([note] if note else [])]:
            print(line)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

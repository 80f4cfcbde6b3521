#!/usr/bin/env python3
"""Compare predictions with the ground truth: python evaluate.py --data acdc --pred out/predictions"""

import json
import os
import sys
from functools import partial
from pathlib import Path

from lib.data import DATASETS
from lib.data.nifti import scale_note
from lib.evaluation import (
    Rules,
    empty_truths,
    evaluate,
    find_dataset,
    find_own_pairs,
    find_pairs,
    format_table,
    nnunet_summary,
    read_model_summary,
    write_results,
)
from lib.metric import TOLERANCE_MM
from lib.record import foreign_files, mixed_jobs
from lib.system.cli import Parser, number, run_script
from lib.system.error import InputError
from lib.system.files import check_writable, write_json, write_text


def main(argv: list[str] | None = None) -> int:
    """Evaluate as `argv` says; returns the exit code of `run_script`."""
    parser = Parser(prog="evaluate.py", description="Compare predictions with the ground truth.")
    add = parser.add_argument
    add(
        "--data",
        required=True,
        help=f"whose classes these are: {', '.join(sorted(DATASETS))}, a folder in nnU-Net's raw format, or a run "
        "folder (required)",
    )
    add(
        "--pred",
        required=True,
        type=Path,
        help="folder of the predictions, <id>.nii.gz or of another ending (required)",
    )
    add("--gt", type=Path, help="folder of the ground truth, as the data set's or flat (default: the data set's own)")
    add("--summary", type=Path, metavar="FILE", help="write nnU-Net's summary.json to this file, too (default: do not)")
    add("--output", type=Path, default=Path("results.json"), help="the JSON file to write (default: results.json)")
    add("--tolerance", type=number(float, 0, 1e6), default=TOLERANCE_MM, help="of the surface Dice, mm (default: 1.64)")
    add("--num_workers", type=number(int, 1, 1024), default=os.cpu_count(), help="processes (default: one per core)")
    add("--overwrite", action="store_true", help="replace an existing --output and --summary (default: refuse)")

    def run() -> None:
        args = parser.parse_args(argv)
        outputs = {"--output": args.output} | ({"--summary": args.summary} if args.summary else {})
        for flag, path in outputs.items():
            if path.exists() and not args.overwrite:
                raise InputError(f"{flag} {path}: exists already; give --overwrite or another {flag}")
            check_writable(path, flag)
        if args.summary and args.summary.absolute() == args.output.absolute():
            raise InputError(f"--summary {args.summary}: is --output, too; give another file")
        dataset, folder = find_dataset(args.data)
        folders = dataset.folders(args.gt or folder)
        truths = next(filter(Path.is_dir, folders), folders[0])
        if dataset in DATASETS.values():
            found = find_pairs(args.pred, truths, dataset.truths_in)
        else:
            found = find_own_pairs(args.pred, truths, dataset)
        rules = Rules.of(dataset, args.tolerance)
        summary = read_model_summary(args.pred)
        names = [prediction.name for prediction, _ in found.pairs.values()]
        if mixed := mixed_jobs(args.pred, names):
            raise InputError(f"--pred {args.pred}: {mixed}; finish with predict.py --skip_existing, or --overwrite all")
        results = evaluate(found.pairs, rules, args.num_workers)
        write_results("--output", args.output, partial(write_json, content=results, replace=args.overwrite))
        if args.summary:
            text = json.dumps(nnunet_summary(results, found.pairs, dataset.values), indent=4, sort_keys=True)
            write_results("--summary", args.summary, partial(write_text, text=text, replace=args.overwrite))
        print(format_table(results, dataset.class_names, summary))
        for line in empty_truths(results, found.pairs, dataset.class_names):
            print(line)
        note = scale_note(path for pair in found.pairs.values() for path in pair)
        for line in [*found.notes(), *foreign_files(args.pred, names), *([note] if note else [])]:
            print(line)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

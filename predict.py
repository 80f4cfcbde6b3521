"""Predict labels with a trained model: one <id>.nii.gz per image, on the very grid of the original."""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lib.amp import faster_precision
from lib.checkpoint import sweep, write_json
from lib.data import DATASETS
from lib.error import InputError
from lib.inference import default_batch_size, predict_file, save, trial_prediction
from lib.memory import keep_freed_memory
from lib.models import compile_model, load_model
from lib.prediction import (
    challenge_names,
    check_model,
    check_same_model,
    choose_images,
    describe,
    input_images,
    outputs_of,
    partition_images,
)
from lib.stop import check_stopped
from lib.utils import Parser, find_device, number, one_of, read_config, run_script


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="predict.py", description="Predict labels with a trained model, one file per image.")
    add = parser.add_argument
    add("--data", required=True, **one_of(DATASETS), help="the data set whose preprocessing is used (required)")
    add("--output", required=True, type=Path, help="folder of the predictions (required)")
    add("--model_state", required=True, type=Path, help="a saved model, RUN/models/model-E (required)")
    add("--original", type=Path, help="folder of the data set (default: the data set's own folder)")
    add("--in_filters", type=Path, help="filter file to check the model against (default: none)")
    add("--out_filters", type=Path, help="filter file to check the model against (default: none)")
    add(
        "--input",
        type=Path,
        help="an image, a folder of *.nii.gz and *.nii, or one laid out as the data set or one of its subjects, to "
        "predict all of it instead of a partition; --original and --partition then have no meaning (default: none)",
    )
    add("--partition", **one_of(("train", "validation", "test")), default="test", help="which subjects (default: test)")
    add("--no_tta", action="store_true", help="do not average over mirrorings (default: average over all)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the fastest there is)")
    batch_help = "patches computed at once (default: 8 in 2D, 2 on the CPU; 2 in 3D)"
    add("--batch_size", type=number(int, 1, 10**6), help=batch_help)
    amp_help = "compute in bfloat16 where that is safe and, on the CPU, faster (default: float32 throughout)"
    add("--amp", action="store_true", help=amp_help)
    compile_help = (
        "let torch compile the network first, which takes a minute and pays for many images (default: do not)"
    )
    add("--compile", action="store_true", help=compile_help)
    add("--probabilities", action="store_true", help="also write <id>_probabilities.nii.gz (default: labels only)")
    add(
        "--challenge_names",
        action="store_true",
        help="name predictions as the challenge wants: prediction_NNNNN.nii.gz for kits (default: <id>.nii.gz)",
    )
    add(
        "--patch_size",
        type=number(int, 1, 2**14),
        nargs="+",
        metavar="N",
        help="size of a window, 2 or 3 numbers (default: that of the training, from RUN/config.json; without this "
        "file the data set's)",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--skip_existing", action="store_true", help="finish an interrupted prediction (default: refuse)"
    )
    existing.add_argument("--overwrite", action="store_true", help="replace existing predictions (default: refuse)")
    return parser.parse_args(argv)


def run_config(model_state: Path) -> dict:
    """The settings of the run that a model RUN/models/model-E belongs to; empty where there are none."""
    folder = model_state.resolve().parent
    in_run = folder.name == "models" and (folder.parent / "config.json").exists()
    return read_config(folder.parent) if in_run else {}


def find_images(args: argparse.Namespace, config: dict) -> dict[str, Path]:
    """What to predict, by the name of the prediction. Raises InputError if there is nothing."""
    dataset = DATASETS[args.data]
    if args.input is None:
        settings = {key: config[key] for key in ("split", "seed_data") if key in config}
        images = partition_images(dataset(data_path=args.original, **settings), args.partition)
    else:
        images = input_images(args.input, dataset)
    return challenge_names(images, dataset) if args.challenge_names else images


def check_output(folder: Path) -> None:
    """Raise InputError unless `folder` can be made, or written to."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output {folder}: cannot be made or written ({there} is no folder, or read-only)")


def make_output(folder: Path) -> None:
    """Make the folder of the predictions, or clear it of what a killed process left. Raises InputError if neither."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made a folder ({error.strerror})") from error


def predict(args: argparse.Namespace) -> None:
    config = run_config(args.model_state)
    dataset = DATASETS[args.data]
    patch_size = tuple(args.patch_size or config.get("patch_size") or dataset.patch_size)
    check_output(args.output)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    model = load_model(args.model_state, device, args.in_filters, args.out_filters)
    check_model(model, args.model_state, dataset, patch_size)
    images = find_images(args, config)
    images = choose_images(images, args.output, args.probabilities, args.skip_existing, args.overwrite)
    if args.skip_existing:
        check_same_model(args.output, args.model_state)
    batch_size = args.batch_size or default_batch_size(model.dim, device)
    amp = args.amp
    if amp and images and device.type == "cpu":
        chosen, note = faster_precision("a batch", trial_prediction(model, batch_size, patch_size))
        amp = chosen == "bfloat16"
        tqdm.write(note)
    if args.compile:
        compile_model(model, device)

    description = describe(model, args.model_state, dataset, patch_size, config)
    for i, (subject, path) in enumerate(tqdm(images.items(), desc="predict", unit="image")):
        check_stopped()
        prediction = predict_file(
            model, path, dataset.preprocessing, patch_size, not args.no_tta, batch_size, args.probabilities, amp
        )
        if i == 0:  # a first image that is bad leaves nothing behind
            make_output(args.output)
            write_json(args.output / "model.json", description)
        *probabilities, labels = outputs_of(subject, args.output, args.probabilities)
        for output in probabilities:
            save(prediction.probabilities, output)
        save(prediction.labels, labels)


def main(argv: list[str] | None = None) -> int:
    """Predict as `argv` says; returns the exit code of `run_script`."""
    return run_script(lambda: predict(parse_arguments(argv)), "what is written is whole; go on with --skip_existing")


if __name__ == "__main__":
    sys.exit(main())

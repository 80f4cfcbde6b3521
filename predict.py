"""Predict labels with a trained model: one <id>.nii.gz per image, on the very grid of the original."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from lib import published
from lib.data import DATASETS
from lib.data.nifti import scale_note
from lib.inference import default_batch_size, predict_file
from lib.models import compile_model, load_model
from lib.prediction import (
    Images,
    begin,
    challenge_names,
    check_model,
    choose_images,
    describe,
    describe_job,
    drop_probabilities,
    input_images,
    outputs_of,
    partition_images,
    precision_of,
    put,
)
from lib.record import identified, read_record
from lib.settings import Settings
from lib.system.cli import Parser, number, one_of, run_script
from lib.system.device import find_device
from lib.system.files import is_listed, made
from lib.system.process import check_stopped, keep_freed_memory


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


def run_settings(model_state: Path) -> Settings | None:
    """The settings of the run that a model RUN/models/model-E belongs to; None where none of ours is known."""
    path = model_state.resolve()
    run = path.parent.parent
    if path.parent.name != "models" or not (run / "config.json").exists() or not is_listed(path):
        return None
    return Settings.read(run)[0] if published.read_config(run) is None else None


def find_images(args: argparse.Namespace, settings: Settings | None) -> dict[str, Images]:
    """What to predict, by the name of the prediction. Raises InputError if there is nothing."""
    dataset = DATASETS[args.data]
    if args.input is None:
        images = partition_images(dataset, args.original, args.partition, settings, args.model_state)
    else:
        images = input_images(args.input, dataset)
    for subject, files in images.items():
        dataset.check_channels(subject, files)
    return challenge_names(images, dataset) if args.challenge_names else images


def predict(args: argparse.Namespace) -> None:
    settings = run_settings(args.model_state)
    dataset, tta = DATASETS[args.data], not args.no_tta
    patch_size = tuple(args.patch_size or (settings or dataset).patch_size)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    with identified(args.model_state) as source:
        model = load_model(args.model_state, device, args.in_filters, args.out_filters)
    check_model(model, args.model_state, dataset, patch_size)
    images = find_images(args, settings)
    record = read_record(args.output)
    batch_size = args.batch_size or default_batch_size(model.dim, device)
    precision, note = precision_of(args.amp, args.overwrite, record, model, batch_size, patch_size)
    job = describe_job(source, dataset, patch_size, tta, args.amp, precision)
    images = choose_images(images, record, job, args.probabilities, args.skip_existing, args.overwrite)
    if note:
        tqdm.write(note)
    if args.compile:
        compile_model(model, device)

    start = partial(
        begin, record, job, images, args.probabilities, describe(model, source, dataset, patch_size, settings)
    )
    noted = None  # the first image whose header disagrees with itself
    for i, (subject, files) in enumerate(tqdm(images.items(), desc="predict", unit="image")):
        check_stopped()
        prediction = predict_file(
            model,
            files,
            dataset.preprocessing,
            patch_size,
            tta,
            batch_size,
            args.probabilities,
            precision == "bfloat16",
        )
        if i == 0:  # a first image that is bad leaves nothing behind
            start()
        if not noted and (noted := scale_note(files)):
            tqdm.write(noted)
        if not args.probabilities:
            drop_probabilities(subject, record, args.overwrite)
        *probabilities, labels = outputs_of(subject, args.output, args.probabilities)
        for output in probabilities:
            put(prediction.probabilities, prediction, output, record)
        put(prediction.labels, prediction, labels, record)
    if not images:
        start()
    record.write()


def run(argv: list[str] | None) -> None:
    args = parse_arguments(argv)
    with made(args.output):
        predict(args)


def main(argv: list[str] | None = None) -> int:
    """Predict as `argv` says; returns the exit code of `run_script`."""
    return run_script(lambda: run(argv), "what is written is whole; go on with --skip_existing, or do it again")


if __name__ == "__main__":
    sys.exit(main())

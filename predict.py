"""Predict labels with a trained model: one <id>.nii.gz per image, on the very grid of the original."""

import argparse
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from lib.checkpoint import sweep, write_json
from lib.data import DATASETS
from lib.error import InputError
from lib.inference import predict_file, save
from lib.models import load_model, summary
from lib.models.nnUNet import nnUNet
from lib.stop import check_stopped
from lib.utils import Parser, find_device, number, one_of, read_config, run_script

SUFFIXES = (".nii.gz", ".nii")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="predict.py", description=__doc__)
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
        help="an image, or a folder of *.nii.gz and *.nii, to predict instead of the data set; --original and "
        "--partition then have no meaning (default: none)",
    )
    add("--partition", **one_of(("train", "validation", "test")), default="test", help="which subjects (default: test)")
    add("--no_tta", action="store_true", help="do not average over mirrorings (default: average over all)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto, the fastest there is)")
    add("--batch_size", type=number(int, 1, 10**6), help="patches computed at once (default: 8 in 2D, 2 in 3D)")
    add("--probabilities", action="store_true", help="also write <id>_probabilities.nii.gz (default: labels only)")
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


def check_model(model: nnUNet, patch_size: tuple[int, ...], args: argparse.Namespace) -> None:
    """Raise InputError unless the model, the data set and the patch belong together."""
    dataset = DATASETS[args.data]
    needs = {"dim": dataset.dim, "n_classes": len(dataset.class_names), "modalities": dataset.modalities}
    for what, needed in needs.items():
        found = getattr(model, what)
        if found != needed:
            raise InputError(f"{args.model_state}: {what} is {found}, --data {args.data} needs {needed}")
    factor = 2 ** (model.levels - 1)
    if len(patch_size) != int(model.dim[0]) or any(n % factor or n < 2 * factor for n in patch_size):
        raise InputError(
            f"--patch_size {' '.join(map(str, patch_size))}: this model needs {model.dim[0]} numbers, each a multiple "
            f"of {factor} and at least {2 * factor}"
        )


def find_images(args: argparse.Namespace, config: dict) -> dict[str, Path]:
    """What to predict, by id. Raises InputError if there is nothing."""
    if args.input is None:
        settings = {key: config[key] for key in ("split", "seed_data") if key in config}
        files = DATASETS[args.data](data_path=args.original, **settings).files(args.partition)
        images = {file.id: file.image for file in files}
        where = f"--partition {args.partition} of {args.data}"
    else:
        where = f"--input {args.input}"
        if not args.input.exists():
            raise InputError(f"{where}: no such file or folder")
        paths = sorted(args.input.iterdir()) if args.input.is_dir() else [args.input]
        images = {}
        for path in paths:
            suffix = next((s for s in SUFFIXES if path.name.endswith(s) and not path.name.startswith(".")), None)
            if suffix and images.setdefault(path.name.removesuffix(suffix), path) != path:
                raise InputError(f"{path}: another image of the same name is there; rename one of them")
    if not images:
        raise InputError(f"{where}: there is no image (.nii.gz or .nii) to predict")
    return images


def outputs_of(subject: str, args: argparse.Namespace) -> list[Path]:
    """The files of one image, the labels last: where they are, the others are too."""
    names = [f"{subject}_probabilities.nii.gz"] * args.probabilities + [f"{subject}.nii.gz"]
    return [args.output / name for name in names]


def check_same_model(args: argparse.Namespace) -> None:
    """Raise InputError if the predictions that are there come from another model."""
    try:
        other = json.loads((args.output / "model.json").read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not known
    if other != str(args.model_state.resolve()):
        raise InputError(f"{args.output}: holds predictions of {other}; give --overwrite or another --output")


def choose_images(images: dict[str, Path], args: argparse.Namespace) -> dict[str, Path]:
    """The images still to be predicted. Raises InputError rather than replace anything unasked."""
    originals = {path.resolve() for path in images.values()}
    outputs = {subject: outputs_of(subject, args) for subject in images}
    for path in (path for paths in outputs.values() for path in paths):
        if path.resolve() in originals:
            raise InputError(f"{path}: would replace an image that is to be predicted; give another --output")
        if path.exists() and not (args.skip_existing or args.overwrite):
            raise InputError(f"{path}: exists already; give --skip_existing, --overwrite or another --output")
    if args.skip_existing:
        check_same_model(args)
        return {s: path for s, path in images.items() if not all(output.exists() for output in outputs[s])}
    return images


def describe(model: nnUNet, patch_size: tuple[int, ...], args: argparse.Namespace, config: dict) -> dict:
    """What model.json says: the model, and its size before and after pruning (null where the former is unknown)."""
    defaults = DATASETS[args.data].defaults
    now, unpruned = summary(model, patch_size), {}
    if model.levels == config.get("levels", defaults["levels"]):
        fms_init = config.get("fms_init", defaults["fms_init"])
        unpruned = summary(nnUNet(model.modalities, model.n_classes, fms_init, model.levels, dim=model.dim), patch_size)
    sizes = {key: {"unpruned": unpruned.get(key), "now": now[key]} for key in ("parameters", "flops", "filters")}
    return {"model": str(args.model_state.resolve()), "data": DATASETS[args.data].name, **sizes}


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
    model = load_model(args.model_state, find_device(args.device), args.in_filters, args.out_filters)
    check_model(model, patch_size, args)
    images = choose_images(find_images(args, config), args)
    batch_size = args.batch_size or (8 if model.dim == "2D" else 2)

    description = describe(model, patch_size, args, config)
    for i, (subject, path) in enumerate(tqdm(images.items(), desc="predict", unit="image")):
        check_stopped()
        prediction = predict_file(model, path, dataset.preprocessing, patch_size, not args.no_tta, batch_size)
        if i == 0:  # a first image that is bad leaves nothing behind
            make_output(args.output)
            write_json(args.output / "model.json", description)
        *probabilities, labels = outputs_of(subject, args)
        for output in probabilities:
            save(prediction.probabilities, output)
        save(prediction.labels, labels)


def main(argv: list[str] | None = None) -> int:
    """Predict as `argv` says; returns the exit code of `run_script`."""
    return run_script(lambda: predict(parse_arguments(argv)), "what is written is whole; go on with --skip_existing")


if __name__ == "__main__":
    sys.exit(main())

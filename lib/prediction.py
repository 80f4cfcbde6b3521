"""What to predict, under which names, and with which model; and the folder that the predictions are written into."""

import argparse
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.data.images import NIFTI, PROBABILITIES, TRUTH, stem
from lib.data.nifti import scale_note
from lib.inference import Prediction, Predictor, save, settings_of_model
from lib.models import compile_model, load_model
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.record import Record, check_others, identified, is_done, read_record
from lib.settings import Settings
from lib.system.device import device_of, faster_precision, find_device
from lib.system.error import InputError
from lib.system.files import sweep, write_json
from lib.system.process import check_stopped, keep_freed_memory

Images = tuple[Path, ...]  # the files of one image, one for each channel
DEFAULT_SPLIT = {"split": "0.9:0.1", "seed_data": 42}  # as in training
METHOD = 1  # raise it whenever the same job gives other predictions of the same image


def predict(args: argparse.Namespace) -> None:
    """What predict.py does with its arguments, in a folder that it alone writes to."""
    settings, dataset = settings_of_model(args.model_state), DATASETS[args.data]
    patch_size = tuple(args.patch_size or (settings or dataset).patch_size)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    with identified(args.model_state) as source:
        model = load_model(args.model_state, device, args.in_filters, args.out_filters)
    check_model(model, args.model_state, dataset, patch_size)
    images = find_images(args, dataset, settings)
    record = read_record(args.output)
    predictor = Predictor(model, patch_size, not args.no_tta, args.batch_size, preprocessing=dataset.preprocessing)
    precision, note = precision_of(predictor, args.amp, args.overwrite, record)
    predictor = replace(predictor, amp=precision == "bfloat16")
    job = describe_job(source, dataset, predictor, args.amp, precision)
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
        prediction = predictor.file(files, args.probabilities)
        if i == 0:  # a first image that is bad leaves nothing behind
            start()
        if not noted and (noted := scale_note(files)):
            tqdm.write(noted)
        if not args.probabilities:
            drop_probabilities(subject, record, args.overwrite)
        *others, labels = outputs_of(subject, args.output, args.probabilities)
        for output in others:
            put(prediction.probabilities, prediction, output, record)
        put(prediction.labels, prediction, labels, record)
    if not images:
        start()
    record.write()


def find_images(args: argparse.Namespace, dataset: BaseDataset, settings: Settings | None) -> dict[str, Images]:
    """What to predict, by the name of the prediction. Raises InputError if there is nothing."""
    if args.input is None:
        images = partition_images(dataset, args.original, args.partition, settings, args.model_state)
    else:
        images = input_images(args.input, dataset)
    for subject, files in images.items():
        dataset.check_channels(subject, files)
    return challenge_names(images, dataset) if args.challenge_names else images


def check_model(model: nnUNet, source: Path, dataset: BaseDataset, patch_size: tuple[int, ...]) -> None:
    """Raise InputError unless the model (of the file `source`), the data set and the patch belong together."""
    for what in ("dim", "n_classes", "modalities"):
        found, needed = getattr(model, what), getattr(dataset, what)
        if found != needed:
            raise InputError(f"{source}: {what} is {found}, --data {dataset.name} needs {needed}")
    divisor = model.divisor
    if len(patch_size) != len(divisor) or any(n % d or n < 2 * d for n, d in zip(patch_size, divisor, strict=True)):
        least, twice = (" x ".join(map(str, dict.fromkeys(k * d for d in divisor))) for k in (1, 2))
        raise InputError(
            f"--patch_size {' '.join(map(str, patch_size))}: this model needs {len(divisor)} numbers, each a multiple "
            f"of {least} and at least {twice}"
        )


def partition_images(
    dataset: BaseDataset, folder: Path | None, partition: str, settings: Settings | None, source: Path
) -> dict[str, Images]:
    """The images of "train", "validation" or "test" in the data set's `folder`, by id; `settings` are those of the run
    of the model `source`.

    Raises InputError if there are none. Without a run it is not known what the model was trained on: the test set is
    then that of the default seed, which a line says, and the others are refused.
    """
    if settings is None and partition != "test":
        raise InputError(
            f"--partition {partition}: the run of {source}, and so its split, is not known; give the model inside its "
            "run folder, or --input"
        )
    split = {key: getattr(settings, key, default) for key, default in DEFAULT_SPLIT.items()}
    if settings is None:
        tqdm.write(f"the run of {source} is not known: predicting the test set of seed {split['seed_data']}")
    images = {file.id: file.images for file in dataset.partitions(folder, **split)[partition]}
    if not images:
        raise InputError(f"--partition {partition} of {dataset.name}: there is no image on disk to predict")
    return images


def input_images(source: Path, dataset: BaseDataset) -> dict[str, Images]:
    """The image `source`, or those in this folder, by name. One of the data set's own images is called by its id, and
    of a folder in the data set's layout, or of one of its subjects, only these are taken. Of a folder the ground truths
    and probabilities are left out, and a line says so.

    Raises InputError if there are none, or two have one name.
    """
    if not source.exists():
        raise InputError(f"--input {source}: no such file or folder")
    source = source.absolute()  # for its parents
    place = source if source.is_dir() else source.parent
    near = [file for file in dataset.find(place.parent) if source in (*file.images, file.image.parent)]
    if dataset.modalities > 1:  # no single file is an image
        near = near or [file for file in dataset.find(place) if source in (place, *file.images)]
    if near:
        return {file.id: file.images for file in near}
    images, left_out = {}, 0
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        name = stem(path, NIFTI)
        if name is None:
            continue
        if source.is_dir() and name.lower().endswith((TRUTH, PROBABILITIES)):
            left_out += 1
        elif images.setdefault(name, (path,)) != (path,):
            raise InputError(f"{path}: another image of the same name is there; rename one of them")
    if source.is_dir():
        images = images or {file.id: file.images for file in dataset.find(source)}
    what = f"{left_out} file{'s' * (left_out > 1)} *{TRUTH} or *{PROBABILITIES}, which are no images"
    if not images:
        raise InputError(
            f"--input {source}: there is no image (.nii.gz or .nii) to predict" + (f", only {what}" if left_out else "")
        )
    if left_out:
        tqdm.write(f"--input {source}: leaves out {what}")
    return images


def challenge_names(images: dict[str, Images], dataset: BaseDataset) -> dict[str, Images]:
    """The same images by the names that the challenge wants for their predictions.

    Raises InputError if the data set has no such names, or an id has not exactly one number, and one of its own.
    """
    if dataset.challenge_name is None:
        raise InputError(f"--challenge_names: there are none for --data {dataset.name}; leave this flag out")
    renamed = {}
    for subject, paths in images.items():
        numbers = re.findall(r"\d+", subject)
        name = dataset.challenge_name.format(case=int(numbers[0])) if len(numbers) == 1 else None
        if name is None or name in renamed:
            raise InputError(f"{paths[0]}: --challenge_names needs one number in each name, and no number twice")
        renamed[name] = paths
    return renamed


def outputs_of(subject: str, folder: Path, probabilities: bool) -> list[Path]:
    """The files of one image, the labels last: where they are, the others are too."""
    names = [f"{subject}{PROBABILITIES}.nii.gz"] * probabilities + [f"{subject}.nii.gz"]
    return [folder / name for name in names]


def choose_images(
    images: dict[str, Images], record: Record, job: dict, probabilities: bool, skip_existing: bool, overwrite: bool
) -> dict[str, Images]:
    """The images still to be predicted into the folder of `record`.

    Raises InputError rather than replace anything unasked, or leave there what `job` would not have made.
    """
    files = [path for paths in images.values() for path in paths]
    originals = {path.resolve() for path in files}
    outputs = {subject: outputs_of(subject, record.folder, probabilities) for subject in images}
    for path in (path for paths in outputs.values() for path in paths):
        if path.resolve() in originals:
            raise InputError(f"{path}: would replace an image that is to be predicted; give another --output")
        if path.exists() and not (skip_existing or overwrite):
            raise InputError(f"{path}: exists already; give --skip_existing, --overwrite or another --output")
    if any(path.parent.resolve() == record.folder.resolve() for path in files):
        raise InputError(f"--output {record.folder}: is the folder of the images; give another --output")
    if not overwrite:
        check_others(record, job)
    if skip_existing:
        return {subject: own for subject, own in images.items() if not is_done(record, job, own, outputs[subject])}
    return images


def begin(record: Record, job: dict, images: dict[str, Images], probabilities: bool, description: dict) -> None:
    """Clear the folder of what killed processes left, describe the model in it, and note what is overwritten."""
    sweep(record.folder)
    outputs = [output for subject in images for output in outputs_of(subject, record.folder, probabilities)]
    record.begin(job, [output.name for output in outputs if output.exists()])
    write_json(record.folder / "model.json", description)


def drop_probabilities(subject: str, record: Record, overwrite: bool) -> None:
    """Delete the probabilities that lie beside labels that are now replaced without any, if they are to be overwritten
    or another job's. Raises OSError."""
    path, _ = outputs_of(subject, record.folder, probabilities=True)
    if path.exists():
        entry = record.entry(path.name)
        if overwrite or (entry and entry["job"] != record.job):
            path.unlink()


def put(array: np.ndarray, prediction: Prediction, output: Path, record: Record) -> None:
    """Write labels or probabilities of a prediction; whenever the process ends, the record knows what stands there."""
    save(array, prediction.header, output, partial(record.announce, output.name, prediction.source))
    record.replaced(output.name)


def precision_of(predictor: Predictor, amp: bool, overwrite: bool, record: Record) -> tuple[str, str | None]:
    """float32 or bfloat16, in which is to be predicted, and a line for the screen if a timed batch decided it.

    Unless it is to `overwrite` what is there, a prediction keeps to the precision in which the folder was begun.
    """
    if not amp or device_of(predictor.model).type != "cpu":
        return "bfloat16" if amp else "float32", None
    if not overwrite and record.jobs.get(record.job, {}).get("amp"):
        return record.jobs[record.job]["precision"], None
    return faster_precision("a batch", predictor.trial())


def describe_job(source: dict, dataset: BaseDataset, predictor: Predictor, amp: bool, precision: str) -> dict:
    """All but the image that a prediction depends on, as it is written to the record; `source` is the model."""
    return {
        "method": METHOD,
        "model": {"path": source["path"], "sha256": source["sha256"]},
        "data": dataset.name,
        "preprocessing": dataset.preprocessing.as_dict(),
        "patch_size": list(predictor.patch_size),
        "tta": predictor.mirror,
        "amp": amp,
        "precision": precision,
    }


def describe(
    model: nnUNet, source: dict, dataset: BaseDataset, patch_size: tuple[int, ...], settings: Settings | None
) -> dict:
    """What model.json says: the model, and its size before and after pruning (null where the former is unknown).

    `source` is the model's file. `settings` are those of its run; without them those of the data set count.
    """
    now, unpruned = summary(model, patch_size), {}
    levels, fms_init = (getattr(settings, key, dataset.defaults[key]) for key in ("levels", "fms_init"))
    if model.levels == levels:
        like = {"dim": model.dim, "strides": model.strides, "kernels": model.kernels}
        unpruned = summary(nnUNet(model.modalities, model.n_classes, fms_init, model.levels, **like), patch_size)
    sizes = {key: {"unpruned": unpruned.get(key), "now": now[key]} for key in ("parameters", "flops", "filters")}
    return {"model": source["path"], "sha256": source["sha256"], "data": dataset.name, **sizes}

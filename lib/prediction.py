"""What to predict, under which names, and with which models; and the folder that the predictions are written into."""

import argparse
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lib import postprocessing
from lib.data.BaseDataset import BaseDataset
from lib.data.dicom import Slices, is_dicom, series_in
from lib.data.images import NIFTI, PROBABILITIES, SUFFIXES, TRUTH, n_channels, stem
from lib.data.nifti import scale_note
from lib.inference import Prediction, Predictor, all_exported, save
from lib.record import Record, check_others, is_done, read_record
from lib.system.error import InputError
from lib.system.files import sweep, write_json
from lib.system.process import check_stopped

if TYPE_CHECKING:
    from lib.exported import ExportedModels
    from lib.runs import RunModels

Images = tuple[Path, ...]  # the files of one image, one for each channel
METHOD = 1  # raise it whenever the same job gives other predictions of the same image
BAR = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # an image counts while it is predicted


def predict(args: argparse.Namespace) -> None:
    """What predict.py does with its arguments, in a folder that it alone writes to."""
    models = find_models(args)
    dataset = models.dataset
    images = find_images(args, models)
    record = read_record(args.output)
    models, precision = models.settled(record)
    predictor = Predictor(
        models.networks,
        models.patch_size,
        not args.no_tta,
        args.batch_size,
        preprocessing=dataset.preprocessing,
        step_size=args.step_size,
        postprocess=postprocessing.applying(models.steps),
    )
    job = describe_job(models.source, dataset, predictor, precision, models.steps)
    outputs = {
        subject: outputs_of(subject, args.output, args.probabilities, ending_of(files, dataset))
        for subject, files in images.items()
    }
    images = choose_images(images, outputs, record, job, args.skip_existing, args.overwrite)
    for line in models.notes:
        tqdm.write(line)
    models.prepare()
    replaced = [output for subject in images for output in outputs[subject]]
    start = partial(begin, record, job, replaced, describe(models))
    noted = None  # the first image whose header disagrees with itself
    with tqdm(total=len(images), desc="predict", unit="image", bar_format=BAR) as bar:
        for i, (subject, files) in enumerate(images.items()):
            check_stopped()
            prediction = predictor.file(files, args.probabilities, partial(advance, bar, i + 1))
            if i == 0:  # a first image that is bad leaves nothing behind
                start()
            if not noted and (noted := scale_note(file for file in files if file.name.endswith(NIFTI))):
                tqdm.write(noted)
            if not args.probabilities:
                drop_probabilities(subject, record, args.overwrite)
            *others, labels = outputs[subject]
            for output in others:
                put(prediction.probabilities, prediction, output, record)
            put(prediction.labels, prediction, labels, record, dataset.values)
            bar.update(i + 1 - bar.n)
    if not images:
        start()
    record.write()


def advance(bar: tqdm, most: int, share: float) -> None:
    """Show that so much more of an image is done, `most` images in all: shares add up to 1 but for rounding."""
    bar.update(max(0.0, min(share, most - bar.n)))


def find_models(args: argparse.Namespace) -> "RunModels | ExportedModels":
    """The models to predict with. Torch is loaded with those that need it alone. Raises InputError."""
    if len(args.model_state) != len({path.resolve() for path in args.model_state}):
        raise InputError(f"--model_state {' '.join(map(str, args.model_state))}: names a model twice; name it once")
    if all_exported(args.model_state):
        from lib.exported import ExportedModels

        return ExportedModels.of(args)
    from lib.runs import RunModels

    return RunModels.of(args)


def find_images(args: argparse.Namespace, models: "RunModels | ExportedModels") -> dict[str, Images]:
    """What to predict, by the name of the prediction. Raises InputError if there is nothing."""
    images = models.images() if args.input is None else input_images(args.input, models.dataset)
    for subject, files in images.items():
        models.dataset.check_channels(subject, files)
    return challenge_names(images, models.dataset) if args.challenge_names else images


def input_images(source: Path, dataset: BaseDataset) -> dict[str, Images]:
    """The image `source`, or those in this folder, by name. One of the data set's own images is called by its id, and
    of a folder in the data set's layout, or of one of its subjects, only these are taken. Own data, and what has
    several channels, may be named as nnU-Net does: see `cases_in`. Of a folder the ground truths and probabilities are
    left out, and a line says so. A folder without any of these may hold DICOM: see `lib.data.dicom.series_in`.

    Raises InputError if there are none, two have one name, or channels are not those of the data set.
    """
    if not source.exists():
        raise InputError(f"--input {source}: no such file or folder")
    source = source.absolute()  # for its parents
    place = source if source.is_dir() else source.parent
    own = bool(dataset.preprocessing.normalizations)
    if not own:
        near = [file for file in dataset.find(place.parent) if source in (*file.images, file.image.parent)]
        if dataset.modalities > 1:  # no single file is an image
            near = near or [file for file in dataset.find(place) if source in (place, *file.images)]
        if near:
            return {file.id: file.images for file in near}
    suffixes = suffixes_in(source, dataset) if own else NIFTI
    named = {path: stem(path, suffixes) for path in sorted(place.iterdir())}
    named = {path: name for path, name in named.items() if name}
    if source.is_dir():
        left_out = [path for path, name in named.items() if name.lower().endswith((TRUTH, PROBABILITIES))]
        named = {path: name for path, name in named.items() if path not in left_out}
    else:
        left_out = []
    if own or dataset.modalities > 1:
        images = cases_in(source, named, dataset)
    else:
        images = {}
        for path, name in named.items():
            if source in (place, path) and images.setdefault(name, (path,)) != (path,):
                raise InputError(f"{path}: another image of the same name is there; rename one of them")
    if source.is_dir():
        images = images or {file.id: file.images for file in dataset.find(source)}
        if not images:
            images, notes = series_in(source)
            for line in notes:
                tqdm.write(line)
        elif slices := [path for path in source.iterdir() if is_dicom(path)]:
            tqdm.write(f"--input {source}: leaves out {len(slices)} files of DICOM, since there are other images")
    elif is_dicom(source):
        raise InputError(f"--input {source}: is one slice of DICOM; give the folder of the series")
    what = f"{len(left_out)} file{'s' * (len(left_out) > 1)} *{TRUTH} or *{PROBABILITIES}, which are no images"
    if not images:
        types = " or ".join(suffixes if own else NIFTI)
        raise InputError(
            f"--input {source}: there is no image ({types}, or a DICOM series) to predict"
            + (f", only {what}" if left_out else "")
        )
    if left_out:
        tqdm.write(f"--input {source}: leaves out {what}")
    return images


def suffixes_in(source: Path, dataset: BaseDataset) -> tuple[str, ...]:
    """The endings of own images: that of the file `source`; in a folder the data set's own one, or where no file has
    it, any that can be read."""
    if source.is_file():
        return tuple(suffix for suffix in SUFFIXES if source.name.endswith(suffix))[:1]
    own = any(stem(path, (dataset.file_ending,)) for path in source.iterdir())
    return (dataset.file_ending,) if own else SUFFIXES


def cases_in(source: Path, named: dict[Path, str], dataset: BaseDataset) -> dict[str, Images]:
    """The images among files and their names without ending, by case: CASE_0000, CASE_0001, ... are its channels; one
    that holds all of them may also be called CASE. Where there is one channel, and no name ends in _0000, no number is
    one of a channel. Of a file `source` its case alone.

    Raises InputError that names each case whose channels are not those of the data set.
    """
    n = dataset.modalities
    numbered = n > 1 or any(name.endswith("_0000") for name in named.values())
    cases: dict[str, list[tuple[int | None, Path]]] = {}
    for path, name in named.items():
        match = re.fullmatch(r"(.+)_(\d{4})", name) if numbered else None
        case, number = (match[1], int(match[2])) if match else (name, None)
        cases.setdefault(case, []).append((number, path))
    if source.is_file():
        cases = {case: files for case, files in cases.items() if source in (path for _, path in files)}
    images, wrong = {}, []
    for case, files in cases.items():
        numbers = [number for number, _ in files]
        names = ", ".join(path.name for _, path in files)
        if len(files) > 1 and (None in numbers or len(set(numbers)) < len(files)):
            wrong.append(f"{case}: {names} cannot all be meant")
        elif numbers not in ([None], [*range(n)]) and not (numbers == [0] and n_channels(files[0][1]) == n):
            absent = [f"{channel:04}" for channel in range(n) if channel not in numbers]
            extra = [f"{number:04}" for number in numbers if number >= n]
            said = [f"has no {', '.join(absent)}"] * bool(absent) + [f"has {', '.join(extra)}"] * bool(extra)
            wrong.append(f"{case} {' but '.join(said)}")
        images[case] = tuple(path for _, path in files)
    if wrong:
        needed = ", ".join(f"_{channel:04} ({name})" for channel, name in enumerate(dataset.channels))
        raise InputError(
            f"--input {source}: {len(wrong)} of {len(cases)} images have other channels than {needed}: "
            f"{'; '.join(wrong)}"
        )
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


def ending_of(files: Images, dataset: BaseDataset) -> str:
    """Of the prediction of an image: that of the data set, or NIfTI's where it comes as DICOM."""
    return NIFTI[0] if isinstance(files, Slices) and dataset.file_ending not in NIFTI else dataset.file_ending


def outputs_of(subject: str, folder: Path, probabilities: bool, ending: str) -> list[Path]:
    """The files of one image, the labels last: where they are, the others are too."""
    names = [f"{subject}{PROBABILITIES}.nii.gz"] * probabilities + [f"{subject}{ending}"]
    return [folder / name for name in names]


def choose_images(
    images: dict[str, Images],
    outputs: dict[str, list[Path]],
    record: Record,
    job: dict,
    skip_existing: bool,
    overwrite: bool,
) -> dict[str, Images]:
    """The images still to be predicted into the folder of `record`; each has `outputs`.

    Raises InputError rather than replace anything unasked, or leave there what `job` would not have made.
    """
    files = [path for paths in images.values() for path in paths]
    originals = {path.resolve() for path in files}
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


def begin(record: Record, job: dict, outputs: Sequence[Path], description: dict) -> None:
    """Clear the folder of what killed processes left, describe the model in it, and note what is overwritten."""
    sweep(record.folder)
    record.begin(job, [output.name for output in outputs if output.exists()])
    write_json(record.folder / "model.json", description)


def drop_probabilities(subject: str, record: Record, overwrite: bool) -> None:
    """Delete the probabilities that lie beside labels that are now replaced without any, if they are to be overwritten
    or another job's. Raises OSError."""
    path = record.folder / f"{subject}{PROBABILITIES}.nii.gz"
    if path.exists():
        entry = record.entry(path.name)
        if overwrite or (entry and entry["job"] != record.job):
            path.unlink()


def put(array: np.ndarray, prediction: Prediction, output: Path, record: Record, values: Sequence[int] = ()) -> None:
    """Write labels, each class by its value, or probabilities of a prediction; whenever the process ends, the record
    knows what stands there."""
    save(array, prediction.header, output, partial(record.announce, output.name, prediction.source), values)
    record.replaced(output.name)


def describe_job(source: dict, dataset: BaseDataset, predictor: Predictor, precision: dict, steps: Sequence) -> dict:
    """All but the image that a prediction depends on, as it is written to the record; `source` are the models,
    `precision` says how they are computed, `steps` are the post-processing. What is newer than the first records stands
    there only where it says something."""
    job = {
        "method": METHOD,
        "model": source,
        "data": dataset.name,
        "preprocessing": dataset.preprocessing.as_dict(),
        "patch_size": list(predictor.patch_size),
        "tta": predictor.mirror,
        **precision,
    }
    if dataset.values:
        job["values"] = list(dataset.values)
    if predictor.step_size != 0.5:
        job["step_size"] = predictor.step_size
    if steps:
        job["postprocessing"] = list(steps)
    return job


def describe(models: "RunModels | ExportedModels") -> dict:
    """What model.json says: the model, and its size before and after pruning (null where the former is not known); of
    several models the sums, and each for itself."""
    each, source = models.sizes(), models.source
    sizes = {key: {when: _sum(one[key][when] for one in each) for when in size} for key, size in each[0].items()}
    described = {"model": source["path"], "sha256": source["sha256"], "data": models.dataset.name, **sizes}
    if "models" in source:
        described["models"] = [
            {"model": file["path"], "sha256": file["sha256"], **size}
            for file, size in zip(source["models"], each, strict=True)
        ]
    return described


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None if one is not known."""
    known = [*numbers]
    return None if None in known else sum(known)

"""What to predict, under which names, and with which models; and the folder that the predictions are written into."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib import postprocessing
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.data.images import NIFTI, PROBABILITIES, SUFFIXES, TRUTH, n_channels, stem
from lib.data.nifti import scale_note
from lib.inference import Prediction, Predictor, agreed_settings, save
from lib.models import compile_model, load_model
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.record import Record, check_others, identified, is_done, read_record
from lib.settings import Settings
from lib.system.device import device_of, faster_precision, find_device
from lib.system.error import InputError
from lib.system.files import joint_digest, sweep, write_json
from lib.system.process import check_stopped, keep_freed_memory
from lib.utils import dataset_of

Images = tuple[Path, ...]  # the files of one image, one for each channel
Runs = dict[Path, Settings | None]  # the settings of the run of each model, None where it is not known
DEFAULT_SPLIT = {"split": "0.9:0.1", "seed_data": 42}  # as in training
METHOD = 1  # raise it whenever the same job gives other predictions of the same image
BAR = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"  # an image counts while it is predicted


def predict(args: argparse.Namespace) -> None:
    """What predict.py does with its arguments, in a folder that it alone writes to."""
    runs = agreed_settings(args.model_state, but=("patch_size",) if args.patch_size else ())
    dataset = dataset_of_models(args.data, runs)
    patch_size = tuple(args.patch_size or (_first(runs) or dataset).patch_size)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    models, source = load_models(args, device)
    for model, path in zip(models, args.model_state, strict=True):
        check_model(model, path, dataset, patch_size)
    images = find_images(args, dataset, runs)
    record = read_record(args.output)
    steps, notes = steps_of(args.model_state) if not args.no_postprocessing else ((), [])
    predictor = Predictor(
        models,
        patch_size,
        not args.no_tta,
        args.batch_size,
        preprocessing=dataset.preprocessing,
        step_size=args.step_size,
        postprocess=partial(postprocessing.apply, steps=steps) if steps else None,
    )
    precision, note = precision_of(predictor, args.amp, args.overwrite, record)
    predictor = replace(predictor, amp=precision == "bfloat16")
    job = describe_job(source, dataset, predictor, args.amp, precision, steps)
    ending = dataset.file_ending
    outputs = {subject: outputs_of(subject, args.output, args.probabilities, ending) for subject in images}
    images = choose_images(images, outputs, record, job, args.skip_existing, args.overwrite)
    for line in [*notes, note]:
        if line:
            tqdm.write(line)
    if args.compile:
        for model in models:
            compile_model(model, device)
    description = describe(models, source, dataset, patch_size, list(runs.values()))
    start = partial(begin, record, job, [output for subject in images for output in outputs[subject]], description)
    noted = None  # the first image whose header disagrees with itself
    with tqdm(total=len(images), desc="predict", unit="image", bar_format=BAR) as bar:
        for i, (subject, files) in enumerate(images.items()):
            check_stopped()
            prediction = predictor.file(files, args.probabilities, bar.update)
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


def _first(runs: Runs) -> Settings | None:
    """The settings of the first run that is known."""
    return next((settings for settings in runs.values() if settings), None)


def dataset_of_models(data: str | None, runs: Runs) -> BaseDataset:
    """The data set of the models' runs. `data`: what is given as --data, which is needed where no run is known.

    Raises InputError if it is neither given nor known, or what is given is not what is known.
    """
    known = [(path, settings) for path, settings in runs.items() if settings]
    if data is None and not known:
        raise InputError(f"--data is needed: the run of {next(iter(runs))}, which would tell it, is not known")
    if data is None:
        return known[0][1].dataset
    given = dataset_of(data)
    if known:
        path, settings = known[0]
        if given.name != settings.dataset.name:
            raise InputError(f"--data {data}: the run of {path} has {settings.dataset.name}; leave --data out")
        return settings.dataset
    if given.name not in DATASETS and not given.preprocessing.normalizations:
        raise InputError(
            f"--data {data}: says nothing of the preprocessing of {next(iter(runs))}, whose run is not known; name "
            "RUN/models/model-E as --model_state, or RUN as --data"
        )
    return given


def load_models(args: argparse.Namespace, device: torch.device) -> tuple[tuple[nnUNet, ...], dict]:
    """All models, and what the record says of their files: of several the path of the first, the `joint_digest`, and
    each for itself. Raises InputError."""
    if len(args.model_state) != len({path.resolve() for path in args.model_state}):
        raise InputError(f"--model_state {' '.join(map(str, args.model_state))}: names a model twice; name it once")
    if len(args.model_state) > 1 and (args.in_filters or args.out_filters):
        flag = "--in_filters" if args.in_filters else "--out_filters"
        raise InputError(f"{flag}: is of one model; leave it out with several --model_state")
    models, sources = [], []
    for path in args.model_state:
        with identified(path) as found:
            models.append(load_model(path, device, args.in_filters, args.out_filters))
        sources.append({key: found[key] for key in ("path", "sha256")})
    if len(sources) == 1:
        return tuple(models), sources[0]
    joint = joint_digest(source["sha256"] for source in sources)
    return tuple(models), {"path": sources[0]["path"], "sha256": joint, "models": sources}


def steps_of(paths: Sequence[Path]) -> tuple[tuple, list[str]]:
    """The post-processing that was decided in the runs of all models alike, and lines for the screen. Raises
    InputError."""
    found = [postprocessing.read_steps(path) for path in paths]
    notes = [note for _, note in found if note]
    decided = {steps or () for steps, _ in found}
    if len(decided) == 1:
        return decided.pop(), notes
    return (), [*notes, "the runs of the models decided for different post-processing: none is applied"]


def find_images(args: argparse.Namespace, dataset: BaseDataset, runs: Runs) -> dict[str, Images]:
    """What to predict, by the name of the prediction. Raises InputError if there is nothing."""
    if args.input is None:
        folder = args.original or own_folder(args.data, dataset, _first(runs))
        images = partition_images(dataset, folder, args.partition, runs)
    else:
        images = input_images(args.input, dataset)
    for subject, files in images.items():
        dataset.check_channels(subject, files)
    return challenge_names(images, dataset) if args.challenge_names else images


def own_folder(data: str | None, dataset: BaseDataset, settings: Settings | None) -> Path | None:
    """Where own data are: in the folder that was given as --data, or else where the run had them; None for others."""
    if not dataset.preprocessing.normalizations:
        return None
    if data and Path(data, "dataset.json").is_file():
        return Path(data)
    return Path(settings.data_path) if settings and settings.data_path else None


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


def partition_images(dataset: BaseDataset, folder: Path | None, partition: str, runs: Runs) -> dict[str, Images]:
    """The images of "train", "validation" or "test" in the data set's `folder`, by id, as the runs of the models have
    divided them.

    Raises InputError if there are none, or the runs do not agree. Without a run it is not known what the model was
    trained on: the test set is then that of the default seed, which a line says, and the others are refused.
    """
    if partition != "test":
        for path, settings in runs.items():
            if settings is None:
                raise InputError(
                    f"--partition {partition}: the run of {path}, and so its split, is not known; give the model "
                    "inside its run folder, or --input"
                )
    split = agreed_split(runs, partition)
    if not _first(runs):
        if dataset.preprocessing.normalizations:
            split["fold"] = "all"  # which has the same test set as any
        else:
            tqdm.write(
                f"the run of {next(iter(runs))} is not known: predicting the test set of seed {split['seed_data']}"
            )
    images = {file.id: file.images for file in dataset.partitions(folder, **split)[partition]}
    if not images:
        raise InputError(
            f"--partition {partition} of {dataset.name}: there is no image on disk to predict; give another "
            "--partition, or --input"
        )
    return images


def agreed_split(runs: Runs, partition: str) -> dict[str, str | int]:
    """How the runs divide the data set; of what is not known the default. Raises InputError if two have not the same
    `partition`."""
    found = {}
    for path, settings in runs.items():
        if settings:
            fold = {"fold": settings.fold} if getattr(settings, "fold", None) is not None else {}
            found[path] = {key: getattr(settings, key) for key in DEFAULT_SPLIT} | fold
    decisive = ("seed_data",) if partition == "test" else ("split", "seed_data", "fold")
    first, *others = [*found.items()] or [(None, DEFAULT_SPLIT.copy())]
    for path, split in others:
        if any(split.get(key) != first[1].get(key) for key in decisive):
            raise InputError(
                f"--partition {partition}: that of the run of {path} is not that of {first[0]}; give one model, or "
                "--input"
            )
    return first[1]


def input_images(source: Path, dataset: BaseDataset) -> dict[str, Images]:
    """The image `source`, or those in this folder, by name. One of the data set's own images is called by its id, and
    of a folder in the data set's layout, or of one of its subjects, only these are taken. Own data, and what has
    several channels, may be named as nnU-Net does: see `cases_in`. Of a folder the ground truths and probabilities are
    left out, and a line says so.

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
    what = f"{len(left_out)} file{'s' * (len(left_out) > 1)} *{TRUTH} or *{PROBABILITIES}, which are no images"
    if not images:
        types = " or ".join(suffixes if own else NIFTI)
        raise InputError(
            f"--input {source}: there is no image ({types}) to predict" + (f", only {what}" if left_out else "")
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


def precision_of(predictor: Predictor, amp: bool, overwrite: bool, record: Record) -> tuple[str, str | None]:
    """float32 or bfloat16, in which is to be predicted, and a line for the screen if a timed batch decided it.

    Unless it is to `overwrite` what is there, a prediction keeps to the precision in which the folder was begun.
    """
    if not amp or device_of(predictor.models[0]).type != "cpu":
        return "bfloat16" if amp else "float32", None
    if not overwrite and record.jobs.get(record.job, {}).get("amp"):
        return record.jobs[record.job]["precision"], None
    return faster_precision("a batch", predictor.trial())


def describe_job(
    source: dict, dataset: BaseDataset, predictor: Predictor, amp: bool, precision: str, steps: Sequence
) -> dict:
    """All but the image that a prediction depends on, as it is written to the record; `source` are the models, `steps`
    the post-processing. What is newer than the first records stands there only where it says something."""
    job = {
        "method": METHOD,
        "model": source,
        "data": dataset.name,
        "preprocessing": dataset.preprocessing.as_dict(),
        "patch_size": list(predictor.patch_size),
        "tta": predictor.mirror,
        "amp": amp,
        "precision": precision,
    }
    if dataset.values:
        job["values"] = list(dataset.values)
    if predictor.step_size != 0.5:
        job["step_size"] = predictor.step_size
    if steps:
        job["postprocessing"] = list(steps)
    return job


def describe(
    models: Sequence[nnUNet],
    source: dict,
    dataset: BaseDataset,
    patch_size: tuple[int, ...],
    settings: Sequence[Settings | None],
) -> dict:
    """What model.json says: the model, and its size before and after pruning (null where the former is unknown); of
    several models the sums, and each for itself.

    `source` are the models' files. `settings` are those of their runs; without them those of the data set count.
    """
    each = [sizes_of(model, dataset, patch_size, one) for model, one in zip(models, settings, strict=True)]
    sizes = {key: {when: _sum(one[key][when] for one in each) for when in size} for key, size in each[0].items()}
    described = {"model": source["path"], "sha256": source["sha256"], "data": dataset.name, **sizes}
    if "models" in source:
        described["models"] = [
            {"model": file["path"], "sha256": file["sha256"], **size}
            for file, size in zip(source["models"], each, strict=True)
        ]
    return described


def sizes_of(
    model: nnUNet, dataset: BaseDataset, patch_size: tuple[int, ...], settings: Settings | None
) -> dict[str, dict[str, int | None]]:
    """{"parameters", "flops", "filters": {"unpruned": n or None, "now": n}}."""
    now, unpruned = summary(model, patch_size), {}
    keys = ("levels", "fms_init", "fms_max")
    planned = {key: getattr(settings, key, dataset.defaults[key]) for key in keys}
    if model.levels == planned["levels"]:
        like = {"dim": model.dim, "strides": model.strides, "kernels": model.kernels}
        unpruned = summary(nnUNet(model.modalities, model.n_classes, **planned, **like), patch_size)
    return {key: {"unpruned": unpruned.get(key), "now": now[key]} for key in ("parameters", "flops", "filters")}


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None if one is not known."""
    known = [*numbers]
    return None if None in known else sum(known)

"""What to predict, under which names, and with which model: everything that predict.py checks before it starts."""

import json
import re
from pathlib import Path

from lib.data.BaseDataset import BaseDataset
from lib.error import InputError
from lib.models import summary
from lib.models.nnUNet import nnUNet

SUFFIXES = (".nii.gz", ".nii")


def check_model(model: nnUNet, source: Path, dataset: type[BaseDataset], patch_size: tuple[int, ...]) -> None:
    """Raise InputError unless the model (of the file `source`), the data set and the patch belong together."""
    for what in ("dim", "n_classes", "modalities"):
        found, needed = getattr(model, what), getattr(dataset, what)
        if found != needed:
            raise InputError(f"{source}: {what} is {found}, --data {dataset.name} needs {needed}")
    factor = 2 ** (model.levels - 1)
    if len(patch_size) != int(model.dim[0]) or any(n % factor or n < 2 * factor for n in patch_size):
        raise InputError(
            f"--patch_size {' '.join(map(str, patch_size))}: this model needs {model.dim[0]} numbers, each a multiple "
            f"of {factor} and at least {2 * factor}"
        )


def partition_images(dataset: BaseDataset, partition: str) -> dict[str, Path]:
    """The images of "train", "validation" or "test", by id. Raises InputError if there are none."""
    images = {file.id: file.image for file in dataset.files(partition)}
    if not images:
        raise InputError(f"--partition {partition} of {dataset.name}: there is no image on disk to predict")
    return images


def input_images(source: Path, dataset: type[BaseDataset]) -> dict[str, Path]:
    """The image `source`, or those in this folder, by name. One of the data set's own images is called by its id, and
    of a folder in the data set's layout, or of one of its subjects, only these are taken.

    Raises InputError if there are none, or two have one name.
    """
    if not source.exists():
        raise InputError(f"--input {source}: no such file or folder")
    source = source.absolute()  # for its parents
    place = source if source.is_dir() else source.parent
    own = {file.id: file.image for file in dataset.find(place.parent) if source in (file.image, file.image.parent)}
    if own:
        return own
    images = {}
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        suffix = next((s for s in SUFFIXES if path.name.endswith(s) and not path.name.startswith(".")), None)
        if suffix and images.setdefault(path.name.removesuffix(suffix), path) != path:
            raise InputError(f"{path}: another image of the same name is there; rename one of them")
    if source.is_dir():
        images = images or {file.id: file.image for file in dataset.find(source)}
    if not images:
        raise InputError(f"--input {source}: there is no image (.nii.gz or .nii) to predict")
    return images


def challenge_names(images: dict[str, Path], dataset: type[BaseDataset]) -> dict[str, Path]:
    """The same images by the names that the challenge wants for their predictions.

    Raises InputError if the data set has no such names, or an id has not exactly one number, and one of its own.
    """
    if dataset.challenge_name is None:
        raise InputError(f"--challenge_names: there are none for --data {dataset.name}; leave this flag out")
    renamed = {}
    for subject, path in images.items():
        numbers = re.findall(r"\d+", subject)
        name = dataset.challenge_name.format(case=int(numbers[0])) if len(numbers) == 1 else None
        if name is None or name in renamed:
            raise InputError(f"{path}: --challenge_names needs one number in each name, and no number twice")
        renamed[name] = path
    return renamed


def outputs_of(subject: str, folder: Path, probabilities: bool) -> list[Path]:
    """The files of one image, the labels last: where they are, the others are too."""
    names = [f"{subject}_probabilities.nii.gz"] * probabilities + [f"{subject}.nii.gz"]
    return [folder / name for name in names]


def check_same_model(folder: Path, source: Path) -> None:
    """Raise InputError if the predictions in `folder` come from another model than that of the file `source`."""
    try:
        other = json.loads((folder / "model.json").read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # not known
    if other != str(source.resolve()):
        raise InputError(f"{folder}: holds predictions of {other}; give --overwrite or another --output")


def choose_images(
    images: dict[str, Path], folder: Path, probabilities: bool, skip_existing: bool, overwrite: bool
) -> dict[str, Path]:
    """The images still to be predicted into `folder`. Raises InputError rather than replace anything unasked."""
    originals = {path.resolve() for path in images.values()}
    outputs = {subject: outputs_of(subject, folder, probabilities) for subject in images}
    for path in (path for paths in outputs.values() for path in paths):
        if path.resolve() in originals:
            raise InputError(f"{path}: would replace an image that is to be predicted; give another --output")
        if path.exists() and not (skip_existing or overwrite):
            raise InputError(f"{path}: exists already; give --skip_existing, --overwrite or another --output")
    if skip_existing:
        return {s: path for s, path in images.items() if not all(output.exists() for output in outputs[s])}
    return images


def describe(
    model: nnUNet, source: Path, dataset: type[BaseDataset], patch_size: tuple[int, ...], config: dict
) -> dict:
    """What model.json says: the model, and its size before and after pruning (null where the former is unknown).

    `config` has the settings of the model's run; where they are missing, those of the data set count.
    """
    now, unpruned = summary(model, patch_size), {}
    if model.levels == config.get("levels", dataset.defaults["levels"]):
        fms_init = config.get("fms_init", dataset.defaults["fms_init"])
        unpruned = summary(nnUNet(model.modalities, model.n_classes, fms_init, model.levels, dim=model.dim), patch_size)
    sizes = {key: {"unpruned": unpruned.get(key), "now": now[key]} for key in ("parameters", "flops", "filters")}
    return {"model": str(source.resolve()), "data": dataset.name, **sizes}

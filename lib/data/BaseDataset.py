"""What a data set is: a definition, made of data and one function that finds its files. Nothing here needs torch.

A data set of one's own is one instance:

    BaseDataset(name="mine", class_names=("background", "thing"), find=find_files, preprocessing=Preprocessing(...))
"""

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from lib.data import splits
from lib.data.dicom import Slices
from lib.data.images import NIFTI, n_channels, only
from lib.data.normalization import Normalization
from lib.system.error import InputError

PUBLISHED = {  # settings of a training, as they were published (for ACDC)
    "fms_init": 48,
    "levels": 7,
    "epochs": 500,
    "batch_size": 10,
    "lr": 1e-3,
    "wd": 1e-5,
    "optim": "adam",
    "momentum": 0.99,
    "nesterov": True,
    "val_interval": 2,
    "split": "0.9:0.1",
    "seed_train": 42,
    "seed_data": 42,
    "lambda_": 0.5,
    "tau_max": 0.3,
    "kappa": 15,
    "rho": 5,
    "mu": 0.02,
    "max_flops": "none",
    "min_filters": 2,
    "prune_between": ("0%", "100%"),
    "fms_max": 480,
    "strides": None,
    "kernels": None,
    "steps": None,
    "foreground": 0.0,
}

NEWER = ("normalizations", "crop", "by_index", "padding_counts")  # fields of a preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """What is done to every volume of a data set, in this order.

    spacing_mm: the voxel size to resample to, None for an axis that stays as it is.
    clip: lowest and highest intensity, or None. shift, scale: intensities become (x - shift) / scale; None: they stay.
    min_size: voxels per axis to which smaller volumes are padded centrally, or None. No z-score is over what is padded,
    which is 0, the mean, in the end.
    zscore: whether the z-score is taken here, before the augmentation (which always ends with one).
    padding_counts: whether every z-score is over the padding, too, as in models that were exported when it still was.
    orientation: where the axes that all this speaks of lead to: "RAS" is right, anterior, superior. The axes of a file
    are permuted and flipped to come nearest to it; what is predicted goes back onto the file's own grid.

    Where `normalizations` are given, one for each channel, nnU-Net's way is taken instead: crop to the voxels that are
    not 0 (if `crop`), normalize, resample (cubic); and no z-score follows, now or later. by_index: the files of a case
    lie on the grid of the first one, whatever their own headers say of origin and directions.
    """

    spacing_mm: tuple[float | None, float | None, float | None]
    clip: tuple[float, float] | None = None
    shift: float = 0.0
    scale: float | None = None
    min_size: tuple[int, int, int] | None = None
    zscore: bool = True
    orientation: str = "RAS"
    normalizations: tuple[Normalization, ...] = ()
    crop: bool = False
    by_index: bool = False
    padding_counts: bool = False

    def as_dict(self) -> dict:
        """As JSON has it; fields that are newer than the first caches only where they say something."""
        fields = json.loads(json.dumps(asdict(self)))
        says = {"padding_counts": self.min_size is not None}
        return {key: value for key, value in fields.items() if value or key not in NEWER or says.get(key)}

    @classmethod
    def of_dict(cls, fields: dict) -> Self:
        """What `as_dict` gave, here or before there was `padding_counts`. Raises KeyError, TypeError or ValueError for
        anything else."""
        fields = {"padding_counts": fields.get("min_size") is not None} | fields
        normalizations = tuple(Normalization(**one) for one in fields.get("normalizations", ()))
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**tuples | {"normalizations": normalizations})


@dataclass(frozen=True)
class SubjectFiles:
    """One image (a file for each channel, or one that holds all) and, where it has one, its ground truth."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None

    @property
    def image(self) -> Path:
        """The first channel, which stands for the image in messages."""
        return self.images[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class BaseDataset:
    """The definition of a data set. What is not given is as for ACDC, or means "none"."""

    name: str  # of --data, the cache and the run folders
    class_names: tuple[str, ...]  # by label; the first is the background
    find: Callable[[Path], list[SubjectFiles]]  # the subjects under one folder by id, ascending; none: no such folder
    preprocessing: Preprocessing
    defaults: dict = field(default_factory=dict)  # settings of a training; those not given are the `PUBLISHED` ones
    patch_size: tuple[int, ...] = (320, 320)  # two numbers: slices along the last axis (2D); three: volumes (3D)
    channels: tuple[str, ...] = ("image",)  # what each file of an image shows
    cases: Sequence[int] | None = None  # the numbers that the split shuffles, on disk or not; None: the ids on disk
    test_share: float = 0.2  # the part of the shuffled cases that is the test set
    test_cases: Sequence[int] = ()  # the numbers of more test cases; they need no ground truth
    aliases: tuple[str, ...] = ()  # more names for --data
    folder: str | None = None  # under $SAURON_DATA and data/; None: the name
    layout: str = "images"  # of the files, for the message that they are missing
    how_to_get: str = "Get the images."  # a sentence for the same message
    patches_per_volume: int | None = None  # in an epoch; None: as many as there are slices
    values: tuple[int, ...] = ()  # of the classes in files of labels; none: 0, 1, 2, ...
    ignore: int | None = None  # the value of voxels in truths that do not count; in memory it is n_classes
    file_ending: str = ".nii.gz"  # of predictions
    find_test: Callable[[Path], list[SubjectFiles]] | None = None  # as `find`, for a test set that lies apart
    find_truths: Callable[[Path], list[tuple[str, Path]]] | None = None  # see `truths_in`; None: what `find` finds
    folds: tuple[dict[str, tuple[str, ...]], ...] = ()  # ids by "train" and "val"; none: --split divides the cases
    merged_labels: dict[int, int] = field(default_factory=dict)  # other values of truths, and the labels they count as
    licence: str = ""  # under which its images are given
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)  # unions of labels that are evaluated, too
    challenge_name: str | None = None  # how the challenge wants the prediction of a {case} to be named
    write: Callable[[Path, int], None] | None = None  # writes a built-in one of so many cases, where it is not yet

    def __post_init__(self):
        object.__setattr__(self, "defaults", PUBLISHED | self.defaults)

    @property
    def n_classes(self) -> int:
        """The number of classes, background included."""
        return len(self.class_names)

    @property
    def modalities(self) -> int:
        """The number of channels."""
        return len(self.channels)

    @property
    def dim(self) -> str:
        """ "2D" (slices along the last axis) or "3D"."""
        return f"{len(self.patch_size)}D"

    def case_of(self, id_: str) -> int | str:
        """The case (the patient) of a subject: the first number in its id, or the id where `cases` is None."""
        return id_ if self.cases is None else case_number(id_)

    def split_cases(self, split: str, seed_data: int, found: Iterable[str] = ()) -> dict[str, list]:
        """{"train", "validation", "test": cases}, whether or not they are on disk; `found` are the ids on disk, which
        are the cases where the data set names none.

        The cases are shuffled; the first `test_share` of them is the test set, the next int(a * rest) train. The
        `test_cases` follow in the test set. Raises InputError for a wrong split.
        """
        share = train_share(split)
        shuffled = sorted(found) if self.cases is None else list(self.cases)
        random.Random(seed_data).shuffle(shuffled)
        n_test = round(len(shuffled) * self.test_share)
        test, rest = shuffled[:n_test], shuffled[n_test:]
        n_train = int(len(rest) * share)
        return {"train": rest[:n_train], "validation": rest[n_train:], "test": [*test, *self.test_cases]}

    def partitions(
        self, data_path: str | Path | None, split: str, seed_data: int, fold: str | None = None
    ) -> dict[str, list[SubjectFiles]]:
        """{"train", "validation", "test": what is on disk of them}. With a `fold` ("0", ..., or "all", which trains on
        all and validates with none) it decides what trains and validates, instead of the split; see
        `lib.data.splits.fold_of`.

        Raises InputError as `files_in`, or for a wrong split or fold.
        """
        train_share(split)  # before anything is written
        found = self.files_in(data_path)
        if fold is not None:
            train, validation = splits.fold_of(self.folds, fold, [file.id for file in found])
            parts = {"train": train, "validation": () if fold == splits.ALL else validation}
            tests = self.find_test(self.folders(data_path)[0]) if self.find_test else []
            return {part: [file for file in found if file.id in ids] for part, ids in parts.items()} | {"test": tests}
        cases = self.split_cases(split, seed_data, [file.id for file in found])
        return {part: [file for file in found if self.case_of(file.id) in cases[part]] for part in cases}

    def folders(self, data_path: str | Path | None = None) -> list[Path]:
        """Where the data may be: in `data_path`, or else $SAURON_DATA/<folder> and data/<folder>. A built-in data set
        is written into the latter."""
        if data_path:
            return [Path(data_path)]
        places = [os.environ["SAURON_DATA"]] if os.environ.get("SAURON_DATA") and not self.write else []
        return [Path(place) / (self.folder or self.name) for place in (*places, "data")]

    def files_in(self, data_path: str | Path | None = None) -> list[SubjectFiles]:
        """The files in the first of `folders` that has some; a built-in data set is written before.

        Raises InputError if there are none, or an image lacks a channel.
        """
        folders = self.folders(data_path)
        if self.write:
            self.write(folders[0], len(self.cases))
        for files in map(self.find, folders):
            for file in files:
                self.check_channels(file.id, file.images)
            if files:
                return files
        raise InputError(
            f"--data {self.name}: found no {self.layout} in {' or '.join(map(str, folders))}. {self.how_to_get} "
            f"Then give FOLDER with --data_path (predict.py: --original), or name it {self.folder or self.name} and "
            "set SAURON_DATA to the folder it is in"
        )

    def truths_in(self, folder: Path) -> list[tuple[str, Path]]:
        """The ids of the subjects under a folder that have a ground truth, and this; with `find_truths` also of those
        whose images are not there. An id comes as often as files claim to be its truth."""
        if self.find_truths:
            return self.find_truths(folder)
        return [(file.id, file.label) for file in self.find(folder) if file.label]

    def check_channels(self, subject: str, images: Sequence[Path]) -> None:
        """Raise InputError unless there is a file for each channel of a subject's image, or one that holds all."""
        if isinstance(images, Slices):
            if self.modalities > 1:
                raise InputError(
                    f"{images[0].parent}: is a DICOM series of one channel, but {self.modalities} are needed"
                )
            return
        if len(images) == 1 and self.modalities > 1 and n_channels(images[0]) == self.modalities:
            return
        if len(images) != self.modalities:
            raise InputError(
                f"{images[0] if images else subject}: this image has {len(images)} of {self.modalities} channels; "
                f"--data {self.name} needs a file for each of: {', '.join(self.channels)}"
            )


def case_number(id_: str) -> int:
    """The first number in an id."""
    return int(re.search(r"\d+", id_).group())


def subject_files(subject: str, folder: Path, images: Iterable[str], labels: Iterable[str]) -> SubjectFiles:
    """The files of a subject of one channel in `folder`, by the names that they may have, .nii.gz or .nii.

    Raises InputError if two files claim to be the image, or the ground truth.
    """
    image, label = (
        only(subject, (folder / f"{name}{suffix}" for name in names for suffix in NIFTI)) for names in (images, labels)
    )
    return SubjectFiles(subject, (image,) if image else (), label)


def all_found(layouts: Iterable[list[SubjectFiles]]) -> list[SubjectFiles]:
    """What is found in all layouts, by id in ascending order. Raises InputError if two of them have one subject."""
    found: dict[str, SubjectFiles] = {}
    for file in (file for files in layouts for file in files):
        only(file.id, (found.setdefault(file.id, file).image, file.image))
    return [found[id_] for id_ in sorted(found)]


def train_share(split: str) -> float:
    """a of "a:b". Raises InputError unless a + b = 1 with neither negative."""
    try:
        train, validation = (float(share) for share in split.split(":"))
    except ValueError:
        train = validation = -1.0
    if not (min(train, validation) >= 0 and abs(train + validation - 1) <= 1e-9):
        raise InputError(f"--split {split}: give two shares that add up to 1, such as 0.9:0.1")
    return train

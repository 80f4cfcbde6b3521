"""What all data sets share: where the files are, the split, preprocessing into the cache, batches."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import ClassVar

import numpy as np
import SimpleITK as sitk
import torch
import torchio as tio
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lib.data import cache, nifti, patches
from lib.data.augmentation import augmentation
from lib.data.cache import SubjectFiles
from lib.data.preprocessing import Preprocessing, zscore
from lib.system import distributed
from lib.system.error import InputError
from lib.system.process import check_stopped, worker_pool

QUEUE = 16  # volumes whose patches are mixed with one another


class BaseDataset:
    """A data set is data: a subclass fills in the attributes below, and tells in `find` what its files are called.

    data_path: the folder of the data; by default $SAURON_DATA/<folder>, else data/<folder>.
    cache_path: where preprocessed volumes are kept.
    split: "a:b", the shares of the cases outside the test set to train on and to validate with; seed_data: the
    split's seed.
    patch_size, batch_size: those of the class if None.
    num_workers: processes that augment; the batches are the same whatever it is. seed_train: of all that is random.

    Raises InputError where no image is found, or an argument is wrong.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    folder: ClassVar[str]  # under $SAURON_DATA and data/
    layout: ClassVar[str]  # of the files, for the message that they are missing
    how_to_get: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]  # by label; the first is the background
    n_classes: ClassVar[int]  # their number, background included: filled in for the subclass
    modalities: ClassVar[int] = 1
    dim: ClassVar[str]  # "2D" (slices along the last axis) or "3D"
    preprocessing: ClassVar[Preprocessing]
    patch_size: tuple[int, ...]
    cases: ClassVar[Sequence[int]]  # the numbers that the split shuffles, on disk or not
    test_share: ClassVar[float]  # the part of the shuffled cases that is the test set
    test_cases: ClassVar[Sequence[int]] = ()  # the numbers of more test cases; they need no ground truth
    patches_per_volume: ClassVar[int | None] = None  # in an epoch; None: as many as there are slices
    merged_labels: ClassVar[dict[int, int]] = {}  # other values in ground truth files, and the labels they count as
    regions: ClassVar[dict[str, tuple[int, ...]]] = {}  # unions of labels that are evaluated, too
    challenge_name: ClassVar[str | None] = None  # how the challenge wants the prediction of a {case} to be named
    defaults: ClassVar[dict]  # of the training's settings
    sources: dict[str, dict[str, str]]  # what the files of the prepared subjects hold: see cache.identify
    notes: list[str]  # what `prepare` found worth a line in the log

    def __init__(
        self,
        data_path: str | Path | None = None,
        cache_path: str | Path = "data/preprocessed",
        split: str = "0.9:0.1",
        seed_data: int = 42,
        patch_size: tuple[int, ...] | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed_train: int = 42,
    ):
        self.patch_size = self.patch_size if patch_size is None else tuple(patch_size)
        self.batch_size = self.defaults["batch_size"] if batch_size is None else batch_size
        self.num_workers, self.seed_train = num_workers, seed_train
        if len(self.patch_size) != int(self.dim[0]) or min(self.patch_size) < 1:
            raise InputError(f"--patch_size {self.patch_size}: {self.name} needs {self.dim[0]} positive numbers")
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")
        cases = self.split_cases(split, seed_data)
        found = self._find(data_path)
        self._files = {part: [file for file in found if case_number(file.id) in cases[part]] for part in cases}
        self.ids = {part: [file.id for file in files] for part, files in self._files.items()}
        self.n_missing = len(set(self.cases) - {case_number(file.id) for file in found})  # test_cases not counted
        labels = self.n_classes, sorted(self.merged_labels.items())
        parameters = json.dumps([cache.VERSION, asdict(self.preprocessing), labels])
        self.cache = Path(cache_path) / f"{self.name}-{hashlib.sha256(parameters.encode()).hexdigest()[:10]}"
        self.sources, self._prepared = {}, set()
        self.notes = []

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "class_names"):
            cls.n_classes = len(cls.class_names)

    @classmethod
    def find(cls, root: Path) -> list[SubjectFiles]:
        """The images under one folder by id, in ascending order; none if it is no folder of this data set."""
        raise NotImplementedError

    @classmethod
    def split_cases(cls, split: str, seed_data: int) -> dict[str, list[int]]:
        """{"train", "validation", "test": the numbers of the cases}, whether or not they are on disk.

        `cases` are shuffled; the first `test_share` of them is the test set, the next int(a * rest) train. The
        `test_cases` follow in the test set.
        """
        train_share = _train_share(split)
        shuffled = list(cls.cases)
        random.Random(seed_data).shuffle(shuffled)
        n_test = round(len(shuffled) * cls.test_share)
        test, rest = shuffled[:n_test], shuffled[n_test:]
        n_train = int(len(rest) * train_share)
        return {"train": rest[:n_train], "validation": rest[n_train:], "test": [*test, *cls.test_cases]}

    def files(self, partition: str) -> list[SubjectFiles]:
        """What is on disk of "train", "validation" or "test"."""
        return self._files[partition]

    def prepare(self, partitions: Iterable[str] = ("train", "validation")) -> None:
        """Preprocess what the cache does not hold of these very files, on all cores and with a progress bar.

        Says before how much will be written. Adds to `sources` and `notes`. Raises InputError if a training or
        validation image has no ground truth, there is nothing to train on, a file is broken, or the disk has too little
        space.
        """
        files = [file for part in partitions for file in self._files[part] if file.id not in self._prepared]
        supervised = {file.id for part in ("train", "validation") for file in self._files[part]}
        for file in files:
            if file.label is None and file.id in supervised:
                raise InputError(
                    f"{file.image}: has no ground truth beside it, which training and validation need; add it, or take "
                    "this image away"
                )
        if "train" in partitions and not self._files["train"]:
            raise InputError(f"--data {self.name}: none of the training cases is on disk; add some, or change --split")
        self._identify(files)
        note = nifti.scale_note(path for file in files for path in (file.image, file.label) if path)
        if not all(self._is_fresh(file) for file in files):
            with cache.opened(self.cache):
                if stale := [file for file in files if not self._is_fresh(file)]:
                    self._fill_cache(stale)
        self._prepared.update(file.id for file in files)
        self.notes += [note] if note and not self.notes else []

    def _identify(self, files: list[SubjectFiles]) -> None:
        """Find out what the files hold. That reads them all, at the speed of the disk or of SHA-256."""
        with ThreadPoolExecutor(_n_cores()) as pool:
            found = tqdm(pool.map(cache.identify, files), f"reading {self.name}", len(files), leave=False, delay=2)
            for file, sources in zip(files, found, strict=True):
                check_stopped()
                self.sources[file.id] = sources

    def content(self, partitions: Iterable[str] = ("train", "validation")) -> dict[str, dict[str, dict[str, str]]]:
        """{partition: {subject: SHA-256 of its image and label}}, see `cache.identify`; the partitions are prepared."""
        return {part: {id_: self.sources[id_] for id_ in self.ids[part]} for part in partitions}

    def entry(self, subject: str) -> Path:
        """The cache's folder of a prepared subject."""
        return self.cache / cache.entry(subject, self.sources[subject])

    def _is_fresh(self, file: SubjectFiles) -> bool:
        return cache.is_fresh(self.sources[file.id], self.entry(file.id))

    def _fill_cache(self, stale: list[SubjectFiles]) -> None:
        needed = sum(cache.stored_bytes(file, self.preprocessing) for file in stale)
        free = shutil.disk_usage(self.cache).free
        what = f"{len(stale)} preprocessed volumes need {_in_words(needed)} in {self.cache}, {_in_words(free)} are free"
        if needed > free:
            raise InputError(f"--cache_path: {what}; make room, or give another folder")
        print(what, flush=True)
        store = partial(
            cache.store,
            preprocessing=self.preprocessing,
            n_classes=self.n_classes,
            merged_labels=self.merged_labels,
        )
        with worker_pool(max(1, min(_n_cores(), len(stale))), _use_one_thread) as pool:
            sources, folders = zip(*((self.sources[file.id], self.entry(file.id)) for file in stale), strict=True)
            done = pool.map(store, stale, sources, folders)
            for _ in tqdm(done, f"preprocessing {self.name}", len(stale), unit="volume"):
                check_stopped()

    def get(self, partition: str) -> "Volumes":
        """The whole volumes of "train", "validation" or "test", preprocessed and z-scored: see `Volumes`."""
        self.prepare([partition])
        return Volumes([self.entry(id_) for id_ in self.ids[partition]])

    def n_train_batches(self) -> int:
        """How many batches `train_batches` yields, the same in every epoch."""
        self.prepare(["train"])
        folders = [self.entry(id_) for id_ in self.ids["train"]]
        return ceil(sum(self.patches_per_volume or cache.n_slices(folder) for folder in folders) / self.batch_size)

    def train_batches(self, epoch: int) -> Iterator[dict]:
        """{"image": (B, 1, *patch_size) float32, "label": (B, *patch_size) int64, "id": [B ids]}, B = batch_size but in
        the last batch, which may be smaller.

        Of several ranks each has its share of every batch's images and labels, and all ids; it loads and augments its
        share of the volumes, whose patches all ranks get. So batches do not depend on the number of ranks.

        Each training volume is augmented whole and gives as many random slices as it has (2D; cropped or padded
        centrally to the class's own patch; a smaller patch lies in its centre or, in half of the cases, anywhere) or
        `patches_per_volume` random patches (3D). Volumes come in random order and patches are mixed within every
        `QUEUE` volumes. All of it follows from (seed_train, epoch).
        """
        self.prepare(["train"])
        generator = torch.Generator().manual_seed(_seed(self.seed_train, epoch))
        volumes = _AugmentedPatches(self, epoch)
        order = torch.randperm(len(volumes), generator=generator).tolist()
        loaded = iter(
            DataLoader(
                volumes,
                batch_size=None,
                sampler=order[distributed.rank() :: distributed.world_size()],
                num_workers=self.num_workers,
                collate_fn=_unchanged,
                worker_init_fn=_start_loader,
                generator=torch.Generator(),  # not the global one: whether there are workers must leave no trace
                prefetch_factor=ceil(QUEUE / self.num_workers) if self.num_workers else None,
            )
        )
        image, label, ids = np.empty((0, 1, *self.patch_size), "f4"), np.empty((0, *self.patch_size), "u1"), []
        for start in range(0, len(order), QUEUE):
            queue = self._queue(loaded, range(start, min(start + QUEUE, len(order))))
            image = np.concatenate([image, *(volume["image"] for volume in queue)])
            label = np.concatenate([label, *(volume["label"] for volume in queue)])
            ids = ids + [volume["id"] for volume in queue for _ in volume["image"]]
            mixed = torch.randperm(len(ids), generator=generator).tolist()
            n_full = len(ids) // self.batch_size * self.batch_size
            for first in range(0, n_full, self.batch_size):
                yield _batch(image, label, ids, mixed[first : first + self.batch_size])
            rest = mixed[n_full:]
            image, label, ids = image[rest], label[rest], [ids[i] for i in rest]
        if ids:
            yield _batch(image, label, ids, list(range(len(ids))))

    def _queue(self, loaded: Iterator[dict], positions: range) -> list[dict]:
        """The volumes at these positions of the epoch's order. The ranks take turns at loading them."""
        turns = [position % distributed.world_size() for position in positions]
        with distributed.agreed():
            own = _next(loaded, turns.count(distributed.rank()))
        if distributed.world_size() == 1:
            return own
        heads = distributed.gather([(volume["id"], len(volume["image"])) for volume in own])
        queue = []
        for turn in turns:
            id_, n = heads[turn].pop(0)
            if turn == distributed.rank():
                volume = own.pop(0)
            else:
                volume = {"image": np.empty((n, 1, *self.patch_size), "f4")}
                volume |= {"label": np.empty((n, *self.patch_size), "u1"), "id": id_}
            for key in ("image", "label"):
                distributed.broadcast(torch.from_numpy(volume[key]), turn)
            queue.append(volume)
        return queue

    def validation_volumes(self) -> Iterator[dict]:
        """{"image": (N, 1, *patch_size) float32, "label": (N, *patch_size) int64, "id"} of each validation volume; of
        several ranks, each has those of its turn.

        2D: all slices, cropped or padded centrally; 3D: the fewest evenly spread patches that cover the volume.
        """
        volumes = self.get("validation")
        for index in range(distributed.rank(), len(volumes), distributed.world_size()):
            subject = volumes[index]
            image, label = (patches.fit(subject[key].data, self.patch_size) for key in ("image", "label"))
            starts = patches.grid_starts(image.shape[1:], self.patch_size)
            image, label = (patches.cut(volume, self.patch_size, starts) for volume in (image, label[0]))
            yield {"image": image, "label": label.long(), "id": subject["id"]}

    def _find(self, data_path: str | Path | None) -> list[SubjectFiles]:
        """The files under `data_path`, or else under the first default folder that has some."""
        roots = [Path(data_path)] if data_path else [Path("data") / self.folder]
        if not data_path and os.environ.get("SAURON_DATA"):
            roots.insert(0, Path(os.environ["SAURON_DATA"]) / self.folder)
        for root in roots:
            if files := self.find(root):
                return files
        raise InputError(
            f"--data {self.name}: found no {self.layout} in {' or '.join(map(str, roots))}. {self.how_to_get} "
            f"Then give FOLDER with --data_path (predict.py: --original), or name it {self.folder} and set SAURON_DATA "
            "to the folder it is in"
        )


class Volumes(Dataset):
    """A list of tio.Subject: "image" (1, X, Y, Z) float32, "label" (1, X, Y, Z) uint8 if there is one, and "id"."""

    def __init__(self, folders: list[Path]):
        self.folders = folders

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tio.Subject:
        subject = cache.load(self.folders[index], "world")
        subject.image.set_data(zscore(subject.image.data))
        return subject


class _AugmentedPatches(Dataset):
    """By training volume: {"image": (n, 1, *patch_size) float32, "label": (n, *patch_size) uint8, "id"}.

    These are numpy arrays, which go from process to process through a pipe and need no shared memory.
    """

    def __init__(self, dataset: BaseDataset, epoch: int):
        self.folders = [dataset.entry(id_) for id_ in dataset.ids["train"]]
        self.patch_size, self.n = dataset.patch_size, dataset.patches_per_volume
        self.field = tuple(map(max, dataset.patch_size, type(dataset).patch_size))
        self.seeds = [_seed(dataset.seed_train, epoch, index) for index in range(len(self.folders))]
        self.augmentation = augmentation(dataset.dim)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> dict:
        subject = cache.load(self.folders[index])
        for image in subject.get_images(intensity_only=False):
            image.affine = np.diag([*image.spacing, 1])  # torchio turns about world axes, we about the array's
        with _seeded(self.seeds[index]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The maximum displacement is larger", RuntimeWarning)
            subject = self.augmentation(subject)
            image, label = (
                patches.field_of_view(subject[key].data, self.field, self.patch_size) for key in ("image", "label")
            )
            draw = patches.centred_or_random_starts if len(self.patch_size) == 2 else patches.random_starts
            starts = draw(image.shape[1:], self.patch_size, self.n or image.shape[-1])
        image, label = (patches.cut(volume, self.patch_size, starts) for volume in (image, label[0].byte()))
        return {"image": image.numpy(), "label": label.numpy(), "id": subject["id"]}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it torch's generator (all of torchio's chance) starts from `seed`; one thread, since the last bit of
    some results depends on how a tensor is divided among threads."""
    n_threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)


def _batch(image: np.ndarray, label: np.ndarray, ids: list[str], chosen: list[int]) -> dict:
    own = chosen[distributed.share(len(chosen))]
    images: Tensor = torch.from_numpy(image[own])
    return {"image": images, "label": torch.from_numpy(label[own]).long(), "id": [ids[i] for i in chosen]}


def _unchanged(item: dict) -> dict:
    return item


def _next(loaded: Iterator[dict], n: int) -> list[dict]:
    """The next `n` volumes (fewer at the end). Raises InputError for what went wrong in a process that loads them."""
    try:
        return list(islice(loaded, n))
    except InputError as error:  # torch hands it on with the traceback of the process in front
        raise InputError(str(error).splitlines()[-1].removeprefix("lib.system.error.InputError: ")) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a process that loads data was killed (out of memory?); try fewer --num_workers") from error


def _start_loader(_worker: int) -> None:
    """In a process that loads data, which torch ends: leave the signals to the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _use_one_thread()


def _use_one_thread() -> None:
    """In a process of many: torch and SimpleITK (which resamples for torchio) get one thread each."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _seed(*numbers: int) -> int:
    """One seed from several numbers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)[0])


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def case_number(id_: str) -> int:
    """The number of the patient: the first one in the id."""
    return int(re.search(r"\d+", id_).group())


def _train_share(split: str) -> float:
    """a of "a:b". Raises InputError unless a + b = 1 with neither negative."""
    try:
        train, validation = (float(share) for share in split.split(":"))
    except ValueError:
        train = validation = -1.0
    if not (min(train, validation) >= 0 and abs(train + validation - 1) <= 1e-9):
        raise InputError(f"--split {split}: give two shares that add up to 1, such as 0.9:0.1")
    return train

"""From a data set's files to batches: preprocessing into the cache, then patches, by worker processes and ranks."""

import hashlib
import itertools
import json
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.data import cache, images, nifti, patches, schedule
from lib.data.BaseDataset import BaseDataset, SubjectFiles
from lib.data.volumes import AugmentedPatches, Volumes
from lib.system import distributed
from lib.system.error import InputError
from lib.system.process import check_stopped, n_cores, worker_pool

QUEUE = 16  # volumes whose patches are mixed with one another


class Loader:
    """Loads a data set from one folder, in one split.

    data_path: the folder of the data; by default one of `BaseDataset.folders`.
    cache_path: where preprocessed volumes are kept.
    split: "a:b", the shares of the cases outside the test set to train on and to validate with; seed_data: the
    split's seed; fold: see `BaseDataset.partitions`.
    patch_size, batch_size: those of the data set if None.
    num_workers: processes that augment; the batches are the same whatever it is. seed_train: of all that is random.
    steps: the batches of an epoch; None: as many as it takes to see every training volume once.
    foreground: the share of a batch's patches that must show foreground. With one, and where the data set is normalized
    as by nnU-Net, patches lie anywhere in the volume, and validation covers whole slices; else as published.

    Raises InputError where no image is found, or an argument is wrong.
    """

    sources: dict[str, dict[str, str]]  # what the files of the prepared subjects hold: see cache.identify
    notes: list[str]  # what `prepare` found worth a line in the log

    def __init__(
        self,
        dataset: BaseDataset,
        data_path: str | Path | None = None,
        cache_path: str | Path = "data/preprocessed",
        split: str = "0.9:0.1",
        seed_data: int = 42,
        patch_size: tuple[int, ...] | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed_train: int = 42,
        fold: str | None = None,
        steps: int | None = None,
        foreground: float = 0.0,
    ):
        self.dataset = dataset
        self.patch_size = dataset.patch_size if patch_size is None else tuple(patch_size)
        self.batch_size = dataset.defaults["batch_size"] if batch_size is None else batch_size
        self.num_workers, self.seed_train = num_workers, seed_train
        self.steps, self.foreground = steps, foreground
        self.anywhere = foreground > 0 or bool(dataset.preprocessing.normalizations)
        if len(self.patch_size) != len(dataset.patch_size) or min(self.patch_size) < 1:
            raise InputError(f"--patch_size {self.patch_size}: {dataset.name} needs {dataset.dim[0]} positive numbers")
        if self.batch_size < 1:
            raise InputError(f"--batch_size {self.batch_size}: must be at least 1")
        if steps is not None and steps < 1:
            raise InputError(f"--steps {steps}: must be at least 1")
        if not 0 <= foreground <= 1:
            raise InputError(f"--foreground {foreground}: must be a share from 0 to 1")
        self._files = dataset.partitions(data_path, split, seed_data, fold)
        self.ids = {part: [file.id for file in files] for part, files in self._files.items()}
        found = {dataset.case_of(id_) for ids in self.ids.values() for id_ in ids}
        self.n_missing = len(set(dataset.cases or ()) - found)  # test_cases not counted
        labels = [dataset.n_classes, sorted(dataset.merged_labels.items())]
        if dataset.values or dataset.ignore is not None:
            labels += [dataset.values, dataset.ignore]
        parameters = json.dumps([cache.VERSION, dataset.preprocessing.as_dict(), labels])
        self.cache = Path(cache_path) / f"{dataset.name}-{hashlib.sha256(parameters.encode()).hexdigest()[:10]}"
        self.sources, self._prepared = {}, set()
        self.notes = []

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
            raise InputError(
                f"--data {self.dataset.name}: none of the training cases is on disk; add some, or change --split"
            )
        self._identify(files)
        note = nifti.scale_note(path for file in files for path in (*file.images, file.label) if path)
        if not all(self._is_fresh(file) for file in files):
            with cache.opened(self.cache):
                if stale := [file for file in files if not self._is_fresh(file)]:
                    self._fill_cache(stale)
        self._prepared.update(file.id for file in files)
        self.notes += [note] if note and not self.notes else []

    def _identify(self, files: list[SubjectFiles]) -> None:
        """Find out what the files hold. That reads them all, at the speed of the disk or of SHA-256."""
        with ThreadPoolExecutor(n_cores()) as pool:
            found = tqdm(
                pool.map(cache.identify, files), f"reading {self.dataset.name}", len(files), leave=False, delay=2
            )
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
        needed = sum(cache.stored_bytes(file, self.dataset) for file in stale)
        free = shutil.disk_usage(self.cache).free
        what = f"{len(stale)} preprocessed volumes need {_in_words(needed)} in {self.cache}, {_in_words(free)} are free"
        if needed > free:
            raise InputError(f"--cache_path: {what}; make room, or give another folder")
        print(what, flush=True)
        store = partial(
            cache.store,
            preprocessing=self.dataset.preprocessing,
            read_truth=partial(
                images.read_label,
                n_classes=self.dataset.n_classes,
                merged_labels=self.dataset.merged_labels,
                values=self.dataset.values,
                ignore=self.dataset.ignore,
            ),
        )
        with worker_pool(max(1, min(n_cores(), len(stale))), _use_one_thread) as pool:
            sources, folders = zip(*((self.sources[file.id], self.entry(file.id)) for file in stale), strict=True)
            done = pool.map(store, stale, sources, folders)
            for _ in tqdm(done, f"preprocessing {self.dataset.name}", len(stale), unit="volume"):
                check_stopped()

    def get(self, partition: str) -> Volumes:
        """The whole volumes of "train", "validation" or "test", as a network sees them: see `Volumes`."""
        self.prepare([partition])
        final_zscore = not self.dataset.preprocessing.normalizations
        counts = self.dataset.preprocessing.padding_counts
        return Volumes([self.entry(id_) for id_ in self.ids[partition]], final_zscore, counts)

    def n_train_batches(self) -> int:
        """How many batches `train_batches` yields, the same in every epoch."""
        return ceil(sum(self._sizes()) / self.batch_size) if self.steps is None else self.steps

    def _sizes(self) -> list[int]:
        """How many patches each training volume gives when it is augmented."""
        self.prepare(["train"])
        n = self.dataset.patches_per_volume
        return [n or cache.n_slices(self.entry(id_)) for id_ in self.ids["train"]]

    def epoch(self, number: int) -> tuple[AugmentedPatches, list[list[int]]]:
        """The patches of an epoch by visit of a training volume, and those of each batch by number: the first visit has
        the first numbers."""
        generator = torch.Generator().manual_seed(_seed(self.seed_train, number))
        sizes, folders = self._sizes(), [self.entry(id_) for id_ in self.ids["train"]]
        n_patches = self.steps and self.steps * self.batch_size
        visits = schedule.visits(sizes, n_patches, generator)
        sizes = [sizes[volume] for volume in visits]
        batches = schedule.batches(sizes, self.batch_size, QUEUE, generator)[: self.steps]
        foreground = None
        if self.anywhere:
            shows = iter(schedule.foreground(batches, self.foreground, sum(sizes)))
            foreground = [list(islice(shows, n)) for n in sizes]
        of = visits if self.steps is None else range(len(visits))
        seeds = [_seed(self.seed_train, number, i) for i in of]
        folders = [folders[volume] for volume in visits]
        return AugmentedPatches(folders, self.dataset, self.patch_size, seeds, foreground), batches

    def train_batches(self, epoch: int) -> Iterator[dict]:
        """{"image": (B, C, *patch_size) float32, "label": (B, *patch_size) int64, "id": [B ids]}, B = batch_size but in
        the last batch, which may be smaller.

        Each rank gets its part of a batch's images and labels, and all ids. It augments its part of the volumes, whose
        patches go to all ranks: batches do not depend on the number of ranks.

        Each training volume is augmented whole and gives as many random slices as it has (2D; cropped or padded
        centrally to the data set's own patch; a smaller patch lies in its centre or, in half of the cases, anywhere) or
        `patches_per_volume` random patches (3D). Volumes come in random order and patches are mixed within every
        `QUEUE` volumes. With `steps`, more such orders follow, or the last volumes do not come. Where patches lie
        `anywhere`, slices are not cropped, and in each batch the last ones show foreground: see `schedule.foreground`
        and `patches.chosen_starts`. All of it follows from (seed_train, epoch).
        """
        volumes, batches = distributed.together(self.epoch, epoch)
        loaded = iter(
            DataLoader(
                volumes,
                batch_size=None,
                sampler=range(distributed.rank(), len(volumes), distributed.world_size()),
                num_workers=self.num_workers,
                collate_fn=_unchanged,
                worker_init_fn=_start_loader,
                generator=torch.Generator(),  # not the global one: whether there are workers must leave no trace
                prefetch_factor=ceil(QUEUE / self.num_workers) if self.num_workers else None,
            )
        )
        queues = (range(len(volumes))[start : start + QUEUE] for start in range(0, len(volumes), QUEUE))
        held, numbers = {}, itertools.count()
        for batch in batches:
            while not all(number in held for number in batch):
                for volume in self._queue(loaded, next(queues)):
                    for image, label in zip(volume["image"], volume["label"], strict=True):
                        held[next(numbers)] = (image, label, volume["id"])
            yield self._batch([held.pop(number) for number in batch])

    def _batch(self, chosen: list[tuple[np.ndarray, np.ndarray, str]]) -> dict:
        """Of patches (image, label, id): this rank's part of the images and labels, and all ids."""
        own = chosen[distributed.share(len(chosen))]
        image, label = self._empty(len(own))
        for i, patch in enumerate(own):
            image[i], label[i], _ = patch
        return {
            "image": torch.from_numpy(image),
            "label": torch.from_numpy(label).long(),
            "id": [id_ for _, _, id_ in chosen],
        }

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
                volume = dict(zip(("image", "label", "id"), (*self._empty(n), id_), strict=True))
            for key in ("image", "label"):
                distributed.broadcast(torch.from_numpy(volume[key]).view(torch.uint8), turn)  # which any backend takes
            queue.append(volume)
        return queue

    def _empty(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Room for the images and labels of `n` patches."""
        image = np.empty((n, self.dataset.modalities, *self.patch_size), np.float32)
        n_labels = self.dataset.n_classes + (self.dataset.ignore is not None)
        return image, np.empty((n, *self.patch_size), images.label_type(n_labels))

    def validation_volumes(self) -> Iterator[dict]:
        """{"image": (N, C, *patch_size) float32, "label": (N, *patch_size) int64, "id"} of each validation volume; the
        ranks take turns.

        2D: all slices, cropped or padded centrally; 3D, and where patches lie `anywhere`: the fewest evenly spread
        patches that cover the volume.
        """
        fit = patches.padded if self.anywhere else patches.fit
        volumes = self.get("validation")
        for index in range(distributed.rank(), len(volumes), distributed.world_size()):
            subject = volumes[index]
            image, label = (fit(subject[key].data, self.patch_size) for key in ("image", "label"))
            starts = patches.grid_starts(image.shape[1:], self.patch_size)
            image, label = (patches.cut(volume, self.patch_size, starts) for volume in (image, label[0]))
            yield {"image": image, "label": label.long(), "id": subject["id"]}


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


def _seed(*numbers: int) -> int:
    """One seed from several numbers, unrelated for neighbouring ones."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1)[0])


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"

"""Preprocessed subjects as data sets for torch: whole volumes, and the augmented patches of training volumes."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torchio as tio
from torch.utils.data import Dataset

from lib.data import cache, patches
from lib.data.augmentation import augmentation, augmentation_of_plan
from lib.data.BaseDataset import BaseDataset
from lib.data.preprocessing import unpadded, zscore


class Volumes(Dataset):
    """A list of tio.Subject: "image" (C, X, Y, Z) float32, z-scored if `final_zscore`, "label" (1, X, Y, Z) if there is
    one, and "id". The padding of a volume is not z-scored, it is 0, but where `padding_counts`."""

    def __init__(self, folders: list[Path], final_zscore: bool = True, padding_counts: bool = False):
        self.folders, self.final_zscore, self.padding_counts = folders, final_zscore, padding_counts

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tio.Subject:
        folder = self.folders[index]
        subject = cache.load(folder, "world")
        if self.final_zscore:
            padding = (0,) * 6 if self.padding_counts else cache.padding(folder)
            subject.image.set_data(torch.from_numpy(zscore(subject.image.data.numpy(), padding)))
        return subject


class AugmentedPatches(Dataset):
    """By training volume: {"image": (n, C, *patch_size) float32, "label": (n, *patch_size) of the cache's type, "id"}.

    These are numpy arrays, which go from process to process through a pipe and need no shared memory. What is random
    at an index follows from its seed. `foreground` says of the patches of each volume which must show foreground, and
    then they lie anywhere in it: see `patches.chosen_starts`. None: as published. A volume is augmented without its
    padding, which would count in the z-score at the end; then it is padded again, with zeros. Where `padding_counts`
    (see `Preprocessing`), the padding is a part of the volume.
    """

    def __init__(
        self,
        folders: list[Path],
        dataset: BaseDataset,
        patch_size: tuple[int, ...],
        seeds: Sequence[int],
        foreground: Sequence[Sequence[bool]] | None = None,
    ):
        self.folders, self.patch_size, self.seeds, self.foreground = folders, patch_size, seeds, foreground
        self.n, self.n_classes, self.ignore = dataset.patches_per_volume, dataset.n_classes, dataset.ignore is not None
        self.padding_counts = dataset.preprocessing.padding_counts
        self.field = tuple(map(max, patch_size, dataset.patch_size))
        if not dataset.preprocessing.normalizations:
            self.augmentation = augmentation(dataset.dim)
        elif dataset.dim == "2D":
            self.augmentation = augmentation(dataset.dim, final_zscore=False)
        else:
            self.augmentation = augmentation_of_plan(self.patch_size)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> dict:
        subject = cache.load(self.folders[index])
        padding = (0,) * 6 if self.padding_counts else cache.padding(self.folders[index])
        label_type = subject.label.data.dtype
        for image in subject.get_images(intensity_only=False):
            image.affine = np.diag([*image.spacing, 1])  # torchio turns about world axes, we about the array's
            image.set_data(unpadded(image.data, padding))
        with _seeded(self.seeds[index]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The maximum displacement is larger", RuntimeWarning)
            subject = self.augmentation(subject)
            image, label = (patches.repadded(one.data, padding) for one in (subject.image, subject.label))
            label = label[0].to(label_type)
            if self.foreground is None:
                image, label = (patches.field_of_view(one, self.field, self.patch_size) for one in (image, label))
                draw = patches.centred_or_random_starts if len(self.patch_size) == 2 else patches.random_starts
                starts = draw(label.shape, self.patch_size, self.n or label.shape[-1])
            else:
                image, label = (patches.padded(one, self.patch_size) for one in (image, label))
                classes = self.n_classes, self.ignore
                starts = patches.chosen_starts(label.numpy(), self.patch_size, *classes, self.foreground[index])
        image, label = (patches.cut(volume, self.patch_size, starts) for volume in (image, label))
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

"""Two tiny data sets of ten noisy cases, 3D and 2D."""

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.data.normalization import Normalization


def find(root):
    """case_NN/image.nii.gz and label.nii.gz, (slices, rows, columns)."""
    images = sorted(root.glob("case_*/image.nii.gz"))
    labels = [path.with_name("label.nii.gz") for path in images]
    return [
        SubjectFiles(image.parent.name, (image,), label if label.is_file() else None)
        for image, label in zip(images, labels, strict=True)
    ]


Tiny3D = BaseDataset(
    name="tiny",
    layout="case_NN/image.nii.gz",
    how_to_get="Ask its author.",
    class_names=("background", "thing"),
    find=find,
    preprocessing=Preprocessing((3.0, 2.0, 2.0), (-79, 304), 101, 76.9, (8, 16, 16), zscore=False),
    patch_size=(8, 16, 16),
    patches_per_volume=2,
    cases=range(10),
    test_share=0.2,
    defaults={"batch_size": 3},
)

# The same files as slices along the last axis
Tiny2D = replace(
    Tiny3D, name="tiny2", preprocessing=Preprocessing((2.0, 2.0, None)), patch_size=(16, 12), patches_per_volume=None
)

# The same files, preprocessed as nnU-Net does; the value 2 of truths does not count
Own = replace(
    Tiny3D,
    name="own",
    preprocessing=Preprocessing((2.0, 2.0, 2.0), normalizations=(Normalization("zscore"),), crop=True),
    ignore=2,
)


def write_case(root: Path, case: int, shape=(9, 14, 11), spacing=(3.0, 2.0, 2.0), label=True, **changes):
    rng = np.random.default_rng(case)
    folder = root / f"case_{case:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    truth = np.zeros(shape, np.uint8)
    truth[2:6, 4:9, 3:8] = 1
    image = (rng.normal(0, 60, shape) + 120 * truth).astype(np.float32)
    image[: changes.get("zeros", 0)] = image[:, :, : changes.get("zeros", 0)] = 0
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii.gz")
    if label:
        truth = changes.get("truth", truth)
        nib.save(nib.Nifti1Image(truth, changes.get("affine", affine)), folder / "label.nii.gz")


def write_cases(root):
    """All ten, of different sizes; returns `root`."""
    for case in range(10):
        write_case(root, case, shape=(9 + case % 3, 14, 11 + case % 2))
    return root

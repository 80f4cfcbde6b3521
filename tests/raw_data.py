"""Small data sets in nnU-Net's raw format, for the tests: synthetic ones, and the shared ACDC patients."""

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from lib.data import raw
from lib.system.error import InputError

ACDC = Path(__file__).resolve().parents[2] / "shared" / "acdc" / "training"
HIPPOCAMPUS = Path(__file__).resolve().parents[2] / "shared" / "Task04_Hippocampus"
VALUES = (0, 1, 4)
NAMES = ("background", "kidney", "tumor")
CHANNELS = ("T2", "ADC")
V2 = {
    "channel_names": {"0": "T2"},
    "labels": {"background": 0, "tumor": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
DIRECTIONS = {"v2": False, "v1": True, "decathlon": True}  # layouts, and whether their labels are values first


def blobs(case, shape, empty=False, ignore=None):
    """An image (C, *shape) float32 of two noisy channels, and its labels 0, 1, 4 (uint8): two ellipsoids, of which the
    first is bright in the first channel and the second in the second one."""
    rng = np.random.default_rng(case)
    size = np.array(shape)
    places = np.indices(shape).astype(float)
    truth = np.zeros(shape, np.uint8)
    for value, share in ((1, 0.3), (4, 0.7)):
        centre = size * share + rng.uniform(-0.08, 0.08, len(shape)) * size
        radius = np.maximum(size * rng.uniform(0.17, 0.22), 1)
        away = sum(((p - c) / r) ** 2 for p, c, r in zip(places, centre, radius, strict=True))
        truth[away <= 1] = value
    if empty:
        truth[:] = 0
    image = np.stack([100 + 80 * (truth == 1), 200 + 100 * (truth == 4)]) + rng.normal(0, 8, (2, *shape))
    if ignore is not None:
        truth[..., -1] = ignore
    return image.astype(np.float32), truth


def write_file(path, array, spacing):
    """An image or label (x, y[, z]) of any file type; (x, y, z, channel) as NIfTI. Flat types get whole numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        image = nib.Nifti1Image(array, np.diag([*spacing[:3], *[1.0] * (4 - len(spacing[:3]))]))
        image.header.set_xyzt_units("mm")
        nib.save(image, path)
        return
    if path.suffix in (".png", ".bmp", ".tif", ".tiff"):
        array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing([float(size) for size in spacing[: array.ndim]])
    sitk.WriteImage(image, str(path))


def write_raw(
    folder, n=6, shape=(24, 28, 12), layout="v2", ending=".nii.gz", spacing=(1.0, 1.0, 4.0), tests=0, channels=2,
    ignore=None, empty=True, **changes,
):  # fmt: skip
    """Write cases c00, c01, ... with 1 or 2 `channels` and labels 0, 1, 4 in a `layout` of DIRECTIONS; returns
    `folder`.

    shape: in the order of the file, with two numbers for the flat types (.png, ...). ignore: the value of the label
    "ignore", which the last slice then has. empty: the last case has an empty mask. tests: so many cases t00, t01, ...
    in imagesTs. changes: of the keys in dataset.json; None leaves a key out.
    """
    folder = Path(folder)
    for where, prefix, number in (("imagesTr", "c", n), ("imagesTs", "t", tests)):
        for case in range(number):
            seed = case + 1000 * (prefix == "t")
            image, truth = blobs(seed, shape, empty and prefix == "c" and case == n - 1, ignore)
            name, image = f"{prefix}{case:02d}", image[:channels]
            if layout == "decathlon":
                array = image[0] if channels == 1 else np.moveaxis(image, 0, -1)
                write_file(folder / where / f"{name}{ending}", array, spacing)
            else:
                for channel, array in enumerate(image):
                    write_file(folder / where / f"{name}_{channel:04d}{ending}", array, spacing)
            if prefix == "c":
                write_file(folder / "labelsTr" / f"{name}{ending}", truth, spacing)
    labels = dict(zip(NAMES, VALUES, strict=True)) | ({} if ignore is None else {"ignore": ignore})
    names = {str(i): name for i, name in enumerate(CHANNELS[:channels])}
    fields = {"numTraining": n, "licence": "CC0"}
    if DIRECTIONS[layout]:
        listed = [f"c{case:02d}{ending}" for case in range(n)]
        fields |= {
            "modality": names,
            "labels": {str(value): name for name, value in labels.items()},
            "numTest": tests,
            "tensorImageSize": "3D" if channels == 1 else "4D",
            "training": [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"} for name in listed],
            "test": [f"./imagesTs/t{case:02d}{ending}" for case in range(tests)],
        }
    else:
        fields |= {"channel_names": names, "labels": labels, "file_ending": ending}
    write_json(folder, **fields | changes)
    return folder


def write_json(folder, **fields):
    """A dataset.json with these keys; None leaves one out."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in fields.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept, indent=1))


def acdc_folds(patients):
    """nnU-Net's folds of ACDC, by patient: the patients who validate."""
    patients = sorted(patients)
    np.random.RandomState(1234).shuffle(patients)
    return [sorted(patients[fold::5]) for fold in range(5)]


def write_acdc(folder, n=None):
    """The shared ACDC patients (the first n) as links in nnU-Net's format, with folds by patient; returns
    `folder`/Dataset027_ACDC."""
    folder = Path(folder) / "Dataset027_ACDC"
    places = sorted(ACDC.glob("patient*"))[:n]
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    truths = [path for place in places for path in sorted(place.glob("*_gt.nii.gz"))]
    ids = [path.name.removesuffix("_gt.nii.gz") for path in truths]
    for id_, truth in zip(ids, truths, strict=True):
        os.symlink(truth.with_name(f"{id_}.nii.gz"), folder / "imagesTr" / f"{id_}_0000.nii.gz")
        os.symlink(truth, folder / "labelsTr" / f"{id_}.nii.gz")
    write_json(
        folder,
        channel_names={"0": "cineMRI"},
        labels={"background": 0, "RV": 1, "MLV": 2, "LVC": 3},
        numTraining=len(ids),
        file_ending=".nii.gz",
    )
    splits = []
    for patients in acdc_folds(place.name for place in places):
        val = [id_ for id_ in ids if id_.split("_")[0] in patients]
        splits.append({"train": [id_ for id_ in ids if id_ not in val], "val": val})
    (folder / "splits_final.json").write_text(json.dumps(splits, indent=1))
    return folder


# --- names without content


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def two_cases(folder, channels=1):
    """Names alone of cases a and b, in version 2's layout."""
    touch(folder, *(f"imagesTr/{id_}_{c:04d}.nii.gz" for id_ in "ab" for c in range(channels)))
    touch(folder, "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")


def read_as(folder, **fields):
    """The definition of a folder whose dataset.json is V2 with these changes."""
    write_json(folder, **V2 | fields)
    return raw.read_dataset(folder)


def error(call, *args, **fields):
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        call(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)

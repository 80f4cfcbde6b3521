from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from niftis import write_patients

from lib.data import DATASETS
from lib.data.ACDCDataset import ACDCDataset
from lib.data.loading import Loader
from lib.system.error import InputError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "acdc"
TEST = [2, 10, 11, 16, 38, 42, 43, 46, 49, 51, 56, 57, 66, 71, 73, 74, 77, 79, 92, 93]


def touch(*paths: Path):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_names():
    assert DATASETS["acdc"] is DATASETS["acdc17"] is ACDCDataset


def test_the_published_split():
    parts = ACDCDataset.split_cases("0.9:0.1", 42)
    assert sorted(parts["test"]) == TEST
    assert len(parts["train"]) == 72 and len(parts["validation"]) == 8
    parts = ACDCDataset.split_cases("1:0", 42)
    assert sorted(parts["test"]) == TEST and len(parts["train"]) == 80 and parts["validation"] == []


@pytest.mark.parametrize("subfolder", ["", "training"])
def test_two_frames_of_each_patient_that_is_there(tmp_path, subfolder):
    for patient in ("patient001", "patient002"):
        names = ("4d.nii.gz", "frame01.nii.gz", "frame01_gt.nii.gz", "frame12.nii.gz", "frame12_gt.nii.gz")
        touch(*(tmp_path / subfolder / patient / f"{patient}_{name}" for name in names))
    touch(tmp_path / subfolder / "patient001" / "Info.cfg", tmp_path / "MANDATORY_CITATION.md")
    (tmp_path / subfolder / "patient002" / "patient002_frame12_gt.nii.gz").unlink()
    data = Loader(ACDCDataset, tmp_path)
    assert data.ids["test"] == ["patient002_frame01", "patient002_frame12"] and data.n_missing == 98
    assert data.ids["train"] + data.ids["validation"] == ["patient001_frame01", "patient001_frame12"]
    first, second = data.files("test")
    assert first.image.name == "patient002_frame01.nii.gz" and first.label.name == "patient002_frame01_gt.nii.gz"
    assert second.label is None


def test_a_truth_of_either_suffix_and_no_doubles(tmp_path):
    folder = tmp_path / "training" / "patient001"
    touch(folder / "patient001_frame01.nii.gz", folder / "patient001_frame01_gt.nii", folder / "patient001_4d.nii")
    touch(folder / "patient001_frame09.nii", folder / "patient001_frame09_gt.nii.gz")
    found = ACDCDataset.find(tmp_path)
    assert [(file.image.name, file.label.name) for file in found] == [
        ("patient001_frame01.nii.gz", "patient001_frame01_gt.nii"),
        ("patient001_frame09.nii", "patient001_frame09_gt.nii.gz"),
    ]
    for double in ("patient001_frame01.nii", "patient001_frame09_gt.nii"):
        touch(folder / double)
        with pytest.raises(InputError, match=rf"^patient001_frame0\d: both .*{double}.* are there"):
            ACDCDataset.find(tmp_path)
        (folder / double).unlink()
    touch(tmp_path / "patient001" / "patient001_frame01.nii.gz")  # beside training/, too
    with pytest.raises(InputError, match="^patient001_frame01: both"):
        ACDCDataset.find(tmp_path)


def test_copies_elsewhere_are_no_doubles_and_nothing_vanishes(tmp_path):
    for place in ("patient001", "patient001_old", "patient099"):
        touch(tmp_path / "training" / place / "patient001_frame01.nii.gz")
    touch(tmp_path / "patient002" / "patient002_frame01.nii.gz")  # beside training/
    found = ACDCDataset.find(tmp_path)
    assert [(file.id, file.image.parent.name) for file in found] == [
        ("patient001_frame01", "patient001"),
        ("patient002_frame01", "patient002"),
    ]
    (tmp_path / "training" / "training").symlink_to(tmp_path / "training")
    assert len(ACDCDataset.find(tmp_path / "training")) == 1


@pytest.mark.parametrize("name", ["patient001_frame01.nii.gz", "patient001_frame01_gt.nii.gz"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, name):
    folder = tmp_path / "patient001"
    write_patients(tmp_path, [1])
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "gone")
    data = Loader(ACDCDataset, tmp_path, tmp_path / "cache", split="1:0")
    with pytest.raises(InputError, match=f"{name}: cannot be read"):
        data.prepare()


def test_an_absurd_voxel_size_is_refused_before_there_is_too_little_memory(tmp_path):
    write_patients(tmp_path, [1])
    path = tmp_path / "patient001" / "patient001_frame01.nii.gz"
    image = nib.load(path)
    image.header.set_xyzt_units("meter")
    nib.save(image, path)
    with pytest.raises(InputError, match=r"frame01\.nii\.gz: its voxels of 1250 x 1250 x 10000 mm would become"):
        Loader(ACDCDataset, tmp_path, tmp_path / "cache", split="1:0").prepare()


def test_the_challenges_testing_folder_is_never_trained_on(tmp_path):
    for place, patient in (("training", "patient001"), ("testing", "patient101"), ("training", "patient150")):
        touch(*(tmp_path / place / patient / f"{patient}_frame01{end}.nii.gz" for end in ("", "_gt")))
    data = Loader(ACDCDataset, tmp_path)
    assert sum(data.ids.values(), []) == ["patient001_frame01"]
    assert [file.id for file in ACDCDataset.find(tmp_path / "testing")] == ["patient101_frame01"]
    with pytest.raises(InputError, match="none of the training cases"):
        Loader(ACDCDataset, tmp_path / "testing").prepare()


def test_without_the_data_it_tells_how_to_get_them(tmp_path):
    with pytest.raises(InputError) as error:
        Loader(ACDCDataset, tmp_path)
    message = str(error.value)
    for text in (str(tmp_path), "creatis.insa-lyon.fr", "training", "patientNNN", "--data_path", "SAURON_DATA"):
        assert text in message
    assert "\n" not in message


def test_a_volume_is_resampled_in_plane_and_zscored(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "training" / "patient001"
    folder.mkdir(parents=True)
    for name, array in (
        ("frame01", rng.normal(100, 20, (40, 30, 5)).astype(np.int16)),
        ("frame01_gt", rng.integers(0, 4, (40, 30, 5), np.uint8)),
    ):
        nib.save(nib.Nifti1Image(array, np.diag([-1.5, -1.5, 9, 1])), folder / f"patient001_{name}.nii.gz")
    data = Loader(ACDCDataset, tmp_path, tmp_path / "cache")
    (subject,) = data.get("train" if data.ids["train"] else "validation")
    assert subject.image.shape == (1, 48, 36, 5) and np.allclose(subject.image.spacing, (1.25, 1.25, 9))
    assert subject.image.orientation == ("L", "P", "S")
    stored = np.load(data.entry("patient001_frame01") / "image.npy")
    assert abs(stored.mean()) < 1e-5 and stored.std() == pytest.approx(1, abs=1e-4)


def test_real_patients(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("the shared ACDC patients are not beside this checkout")
    data = Loader(ACDCDataset, SHARED, tmp_path)
    assert data.n_missing == 40 and sum(map(len, data.ids.values())) == 120
    assert sorted({int(id_[7:10]) for id_ in data.ids["test"]}) == [2, 10, 11, 38, 66, 92]
    volumes = list(data.validation_volumes())
    assert [volume["id"] for volume in volumes] == data.ids["validation"]
    for volume in volumes:
        assert volume["image"].shape[1:] == (1, 320, 320) and set(volume["label"].unique().tolist()) == {0, 1, 2, 3}
        inside = volume["image"][:, 0][volume["label"] == 3]
        assert torch.isfinite(inside).all() and inside.mean() > 0.5  # blood is bright

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from lib.data.phantom import write_phantom, write_phantom3d
from lib.system.error import InputError

N_PATIENTS = 8
RV, MYOCARDIUM, LV = 1, 2, 3


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "deeper" / "phantom"
    write_phantom(folder, seed=0, n_patients=N_PATIENTS)
    return folder


@pytest.fixture(scope="module")
def volumes(phantom):
    """(image, label) of nibabel in the order of patients and frames: end-diastole, end-systole, ..."""
    labels = sorted(phantom.glob("training/*/*_gt.nii.gz"))
    return [(nib.load(str(path).replace("_gt", "")), nib.load(path)) for path in labels]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_laid_out_like_acdc(phantom):
    assert sorted(p.name for p in phantom.iterdir()) == ["phantom.json", "training"]
    assert sorted(p.name for p in (phantom / "training").iterdir()) == [f"patient{n:03d}" for n in range(1, 9)]
    systoles = set()
    for patient in (phantom / "training").iterdir():
        first, first_gt, second, second_gt = sorted(p.name for p in patient.iterdir())
        assert (first, first_gt) == (f"{patient.name}_frame01.nii.gz", f"{patient.name}_frame01_gt.nii.gz")
        assert second_gt == second.replace(".nii.gz", "_gt.nii.gz")
        systoles.add(second.removeprefix(f"{patient.name}_frame"))
    assert len(systoles) > 1


def test_it_leaves_nothing_but_the_data_set_behind(phantom):
    assert [p.name for p in phantom.parent.iterdir()] == ["phantom"]
    assert json.loads((phantom / "phantom.json").read_text()) == {"seed": 0, "n_patients": 8, "version": 1}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """[(image, label)] of six cases of the three-dimensional phantom, as nibabel reads them."""
    folder = tmp_path_factory.mktemp("phantom3d") / "data"
    write_phantom3d(folder, seed=0, n_cases=6)
    assert (folder / "phantom.json").is_file()
    names = ("imaging.nii.gz", "segmentation.nii.gz")
    return [tuple(nib.load(folder / f"case_{case:05d}" / name) for name in names) for case in range(6)]


def test_abdomens_have_the_axes_labels_and_intensities_of_kits(cases):
    tumors = 0
    for image, label in cases:
        assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
        assert nib.aff2axcodes(image.affine) == ("I", "P", "L")
        assert 24 <= image.shape[0] <= 32 and all(40 <= n <= 48 for n in image.shape[1:])
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        image, label = np.asarray(image.dataobj), np.asarray(label.dataobj)
        tumors += (label == 2).any()
        assert set(np.unique(label)) <= {0, 1, 2}
        left, right = np.array_split(label, 2, axis=2)
        assert (left == 1).sum() > 200 and (right == 1).sum() > 200
        assert 130 < np.median(image[label == 1]) < 190 and np.median(image[0, :3]) < -900
    assert 0 < tumors < 6


def test_no_threshold_finds_the_kidneys(cases):
    for image, label in cases:
        image, kidney = np.asarray(image.dataobj), np.asarray(label.dataobj) > 0
        dice = [2 * (kidney & (image > t)).sum() / (kidney.sum() + (image > t).sum()) for t in range(0, 250, 5)]
        assert max(dice) < 0.75


def test_the_3d_phantom_is_written_once_and_always_alike(tmp_path):
    for name in ("a", "b"):
        write_phantom3d(tmp_path / name, n_cases=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(InputError, match="delete or rename"):
        write_phantom3d(tmp_path / "a", n_cases=2)
    with pytest.raises(InputError, match="delete or rename"):
        write_phantom(tmp_path / "a", n_patients=1)


def test_the_same_seed_gives_the_same_bytes_and_another_one_does_not(phantom, tmp_path):
    write_phantom(tmp_path / "again", seed=0, n_patients=2)
    write_phantom(tmp_path / "other", seed=1, n_patients=2)
    first, again, other = (contents(f / "training") for f in (phantom, tmp_path / "again", tmp_path / "other"))
    assert len(again) == 8
    assert all(first[name] == data for name, data in again.items())
    assert not set(first.values()) & set(other.values())


def test_a_finished_phantom_is_left_alone(phantom):
    before = {path: path.stat().st_mtime_ns for path in phantom.rglob("*")}
    write_phantom(phantom, seed=0, n_patients=N_PATIENTS)
    assert {path: path.stat().st_mtime_ns for path in phantom.rglob("*")} == before


def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "phantom"
    write_phantom(folder, n_patients=1)
    for wrong in ({"seed": 1, "n_patients": 1}, {"seed": 0, "n_patients": 2}):
        with pytest.raises(InputError, match="delete or rename"):
            write_phantom(folder, **wrong)
    next(folder.rglob("*_gt.nii.gz")).unlink()
    with pytest.raises(InputError, match="delete or rename"):
        write_phantom(folder, n_patients=1)
    (folder / "phantom.json").unlink()
    before = contents(folder)
    with pytest.raises(InputError, match="delete or rename"):
        write_phantom(folder, n_patients=1)
    assert contents(folder) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/phantom"):
        write_phantom(tmp_path / "file" / "phantom", n_patients=1)


def test_an_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    saved = []

    def interrupt(image, path):
        saved.append(path)
        if len(saved) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(nib, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "phantom", n_patients=3)
    assert list(tmp_path.iterdir()) == []


def test_labels_are_those_of_acdc_on_the_grid_of_the_image(volumes):
    for image, label in volumes:
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        assert set(np.unique(np.asarray(label.dataobj))) == {0, RV, MYOCARDIUM, LV}
        assert image.shape == label.shape and np.array_equal(image.affine, label.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_xyzt_units()[0] == "mm"
        assert (int(image.header["qform_code"]), int(image.header["sform_code"])) == (1, 1)


def test_shape_and_spacing_vary_within_their_limits(volumes):
    shapes = {image.shape for image, _ in volumes}
    spacings = {image.header.get_zooms() for image, _ in volumes}
    assert len(shapes) > 4 and len(spacings) == N_PATIENTS  # the two frames of a patient share theirs
    for x, y, z in shapes:
        assert 64 <= x <= 80 and 64 <= y <= 80 and 6 <= z <= 10
    for x, y, z in spacings:
        assert 2.2 <= x == y <= 2.8 and 7 <= z <= 10


def test_myocardium_encloses_the_lv_and_is_thick_enough_to_see(volumes):
    for image, label in volumes:
        label = np.asarray(label.dataobj)
        for k in range(label.shape[2]):
            lv = label[..., k] == LV
            around = label[..., k][binary_dilation(lv, np.ones((3, 3))) & ~lv]
            assert set(around) <= {MYOCARDIUM}
        middle = label[..., np.argmax((label == LV).sum((0, 1)))]
        row = middle[:, int(np.mean(np.nonzero(middle == LV)[1]))]
        assert (row == MYOCARDIUM).sum() * image.header.get_zooms()[0] >= 2 * 3 * 2.5  # both walls


def test_systole_has_a_smaller_cavity_and_a_thicker_wall(volumes):
    for diastole, systole in zip(volumes[::2], volumes[1::2], strict=True):
        cavities, walls = [], []
        for _, label in (diastole, systole):
            label = np.asarray(label.dataobj)
            middle = label[..., np.argmax((label == LV).sum((0, 1)))]
            cavity, ventricle = (middle == LV).sum(), (middle >= MYOCARDIUM).sum()
            cavities.append((label == LV).sum())
            walls.append(np.sqrt(ventricle) - np.sqrt(cavity))  # radii up to a factor
        assert cavities[1] < 0.75 * cavities[0] and walls[1] > 1.1 * walls[0]


def test_classes_are_missing_in_some_slices(volumes):
    slices = [np.asarray(label.dataobj)[..., k] for _, label in volumes for k in range(label.shape[2])]
    present = [set(np.unique(s)) - {0} for s in slices]
    assert set() in present  # above the valve plane or beyond the apex
    assert {MYOCARDIUM, LV} in present or {MYOCARDIUM} in present  # the apex has no RV
    assert {RV, MYOCARDIUM, LV} in present
    assert any(not np.asarray(label.dataobj)[..., 0].any() for _, label in volumes)
    assert any(np.asarray(label.dataobj)[..., 0].any() for _, label in volumes)


def test_no_threshold_finds_the_blood_pool(volumes):
    """Distractors are as bright: the best threshold of each volume, ground truth known, stays far from the truth."""
    for image, label in volumes:
        image, blood = np.asarray(image.dataobj), np.isin(np.asarray(label.dataobj), (RV, LV))
        assert (image[~blood] > np.median(image[blood])).sum() > 0.3 * blood.sum()
        dice = [2 * (blood & (image > t)).sum() / (blood.sum() + (image > t).sum()) for t in range(0, image.max(), 5)]
        assert max(dice) < 0.75

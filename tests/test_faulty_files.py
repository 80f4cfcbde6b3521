"""Files as people have them, made by the shared script from real ones: unusual and sound, or broken."""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import predict
import train
from lib.data.ACDCDataset import ACDCDataset
from lib.data.images import read_geometry, read_image, read_label
from lib.data.KiTSDataset import KiTSDataset
from lib.data.loading import Loader
from lib.models.nnUNet import nnUNet
from lib.system.error import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "tools" / "faulty.py"
pytestmark = pytest.mark.skipif(
    not SCRIPT.is_file(), reason="the script that makes faulty files (../shared) is not here"
)
MM = (1.5625, 1.5625, 10.0)
SPLIT = {"split": "1:0"}  # patients 4 to 7 train, patient 2 is a test patient
SMALL = ["--fms_init", "2", "--levels", "3", "--epochs", "1", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name): the folder with what the script writes, once for all tests. Nothing may be changed there."""
    spec = importlib.util.spec_from_file_location("faulty", SCRIPT)
    faulty = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(faulty)
    made = {}

    def inputs(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            faulty.INPUTS[name](made[name])
        return made[name]

    return inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Untrained networks by the data set's name."""
    folder = tmp_path_factory.mktemp("models")
    for name, n_classes, dim in (("acdc", 4, "2D"), ("kits", 3, "3D")):
        torch.manual_seed(0)
        network = nnUNet(1, n_classes, 2, 3, dim=dim)
        network.initialize()
        torch.save(network.state_dict(), folder / name)
    return folder


def volumes(dataset, folder, cache, partition="train", **settings):
    """{id: subject} of a partition."""
    data = Loader(dataset, folder, cache, **SPLIT | settings)
    return {subject["id"]: subject for subject in data.get(partition)}


def results_of(tmp_path, data, pred, gt):
    arguments = ["--data", data, "--pred", str(pred), "--gt", str(gt), "--num_workers", "1"]
    assert evaluate.main([*arguments, "--output", str(tmp_path / "results.json")]) == 0
    return json.loads((tmp_path / "results.json").read_text())


def refusal(capsys, script, *argv):
    """The one line of a script that refuses its input."""
    capsys.readouterr()
    assert script.main(list(map(str, argv))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1]
    return lines[-1]


# ---- geometry


def test_the_challenges_own_header_is_read_at_the_scale_of_pixdim(make, tmp_path, models, capsys):
    """An sform of unit scale: the voxels for the network, and the prediction, are those of a header that agrees."""
    folder = make("acdc_unit_sform")
    data = Loader(ACDCDataset, folder, tmp_path / "cache", **SPLIT)
    data.prepare()
    shapes = {id_: np.load(data.entry(id_) / "image.npy", mmap_mode="r").shape[1:] for id_ in data.ids["train"]}
    assert shapes["patient005_frame01"] == (320, 270, 10) and shapes["patient004_frame01"][:2] == (290, 320)
    assert len(data.notes) == 1  # not one for each file
    assert "1.5625 x 1.5625 x 10 mm by pixdim, 1 x 1 x 1 mm by the sform" in data.notes[0]
    sound = tmp_path / "sound" / "patient005_frame01.nii.gz"
    sound.parent.mkdir()
    original = folder / "training" / "patient005" / sound.name
    image = nib.load(original)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([-1.5625, -1.5625, 10, 1])), sound)
    arguments = [
        "--data",
        "acdc",
        "--model_state",
        models / "acdc",
        "--no_tta",
        "--device",
        "cpu",
        "--patch_size",
        64,
        64,
    ]
    for source, output in ((original, "a"), (sound, "b")):
        argv = [*arguments, "--input", source, "--output", tmp_path / output]
        assert predict.main(list(map(str, argv))) == 0
    a, b = (nib.load(tmp_path / output / sound.name) for output in "ab")
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    assert len(np.unique(np.asarray(a.dataobj))) > 1
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units", "quatern_d"):
        np.testing.assert_array_equal(a.header[field], image.header[field])


RIGHT, LEFT = "-x -y z", "x y z"
HEADERS = {  # spacing, directions, origin
    "unit_sform": (MM, RIGHT, (5, 6, 7)),
    "unit_sform_code_2": (MM, RIGHT, (0, 0, 0)),
    "both": (MM, RIGHT, (5, 6, 7)),
    "sform_only": (MM, RIGHT, (5, 6, 7)),
    "qform_only": (MM, RIGHT, (5, 6, 7)),
    "neither": (MM, RIGHT, (0, 0, 0)),
    "sform_code_1_other_qform": (MM, RIGHT, (5, 6, 7)),
    "sform_code_2_other_qform": (MM, LEFT, (1, 2, 3)),
    "pixdim_ones": ((1, 1, 1), RIGHT, (5, 6, 7)),
    "sheared": None,
    "sheared_with_qform": (MM, RIGHT, (5, 6, 7)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(make, name):
    path = make("acdc_headers") / f"{name}.nii.gz"
    if HEADERS[name] is None:
        with pytest.raises(InputError, match=r"sheared\.nii\.gz: .*right angles"):
            read_image(path)
        return
    spacing_mm, directions, origin_mm = HEADERS[name]
    found = read_geometry(path)
    assert found.spacing_mm == spacing_mm
    np.testing.assert_allclose(found.directions, np.diag([-1, -1, 1] if directions == RIGHT else [1, 1, 1]), atol=1e-6)
    np.testing.assert_allclose(found.origin_mm, origin_mm, atol=1e-6)


@pytest.mark.parametrize("units", ["acdc_metres", "acdc_microns"])
def test_units(make, tmp_path, units):
    folder = make(units)
    subjects = volumes(ACDCDataset, folder, tmp_path / "cache")
    assert {subject.image.shape[1:] for subject in subjects.values()} == {(120, 120, 3)}
    truth = next(folder.rglob("patient005_frame01_gt.nii.gz"))
    label = nib.load(truth)
    (tmp_path / "pred").mkdir()
    shifted = np.roll(np.asarray(label.dataobj), 2, 0)
    nib.save(nib.Nifti1Image(shifted, label.affine, label.header), tmp_path / "pred" / "patient005_frame01.nii.gz")
    distances = results_of(tmp_path, "acdc", tmp_path / "pred", folder)["patient005_frame01"]["HD"]
    assert distances[1:] == pytest.approx([3.125] * 3, rel=1e-5)


# ---- integrity and labels


@pytest.mark.parametrize("damage", ["gz_payload", "gz_checksum", "gz_length", "gz_no_trailer", "gz_garbage"])
def test_damaged_files_are_refused_everywhere(make, tmp_path, models, capsys, damage):
    folder = make(damage)
    for kind, suffix in (("image", ""), ("label", "_gt")):
        name = f"patient005_frame01{suffix}.nii.gz"
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            volumes(ACDCDataset, folder / kind, tmp_path / "cache")
    image = folder / "image" / "training" / "patient005" / "patient005_frame01.nii.gz"
    arguments = ["--data", "acdc", "--model_state", models / "acdc", "--device", "cpu", "--patch_size", 64, 64]
    line = refusal(capsys, predict, *arguments, "--input", image, "--output", tmp_path / "out")
    assert f"{image}: cannot be read" in line and not (tmp_path / "out").exists()
    (tmp_path / "pred").mkdir()
    shutil.copy(image.parent / "patient005_frame01_gt.nii.gz", tmp_path / "pred" / "patient005_frame01.nii.gz")
    arguments = ["--data", "acdc", "--pred", tmp_path / "pred", "--gt", folder / "label", "--num_workers", 1]
    line = refusal(capsys, evaluate, *arguments, "--output", tmp_path / "r.json")
    assert "patient005_frame01_gt.nii.gz: cannot be read" in line and not (tmp_path / "r.json").exists()


def test_labels_that_are_not_quite_whole(make, tmp_path):
    folder = make("label_slope")
    scaled = next(folder.rglob("patient005_frame01_gt.nii.gz"))
    raw = gzip.decompress(scaled.read_bytes())
    (tmp_path / "pred").mkdir()
    whole = tmp_path / "pred" / "patient005_frame01.nii.gz"
    whole.write_bytes(gzip.compress(raw[:112] + np.float32(1).tobytes() + raw[116:]))
    np.testing.assert_array_equal(read_label(scaled, 4).array, read_label(whole, 4).array)
    assert results_of(tmp_path, "acdc", tmp_path / "pred", folder)["average"]["dice"] == [1, 1, 1, 1]
    assert len(volumes(ACDCDataset, folder, tmp_path / "cache")) == 8


def test_more_axes_of_size_one(make, tmp_path, models):
    folder = make("volumes_5d")
    assert {s.image.shape[1:] for s in volumes(ACDCDataset, folder, tmp_path / "cache").values()} == {(120, 120, 3)}
    image = next(folder.rglob("patient005_frame01.nii.gz"))
    arguments = ["--data", "acdc", "--model_state", models / "acdc", "--device", "cpu", "--patch_size", 64, 64]
    argv = [*arguments, "--no_tta", "--input", image, "--output", tmp_path / "pred"]
    assert predict.main(list(map(str, argv))) == 0
    assert nib.load(tmp_path / "pred" / image.name).shape == nib.load(image).shape == (96, 96, 3, 1, 1)
    assert results_of(tmp_path, "acdc", tmp_path / "pred", folder)["n"]["TP"] == [1, 1, 1, 1]


def test_one_tolerance_for_training_and_evaluation(make, tmp_path):
    folder = make("truth_off_grid")
    assert len(volumes(ACDCDataset, folder, tmp_path / "cache")) == 8
    image, truth = (next(folder.rglob(f"patient005_frame01{end}.nii.gz")) for end in ("", "_gt"))
    (tmp_path / "pred").mkdir()
    labels = nib.Nifti1Image(np.asarray(nib.load(truth).dataobj), nib.load(image).affine)
    nib.save(labels, tmp_path / "pred" / image.name)
    assert results_of(tmp_path, "acdc", tmp_path / "pred", folder)["average"]["dice"] == [1, 1, 1, 1]


# ---- orientation


def test_kits_in_another_order_is_the_same_volume_and_prediction(make, tmp_path, models):
    shutil.copytree(make("kits_ras") / "case_00010", tmp_path / "ras" / "case_00010")
    folder = tmp_path / "ras"
    challenge = tmp_path / "challenge"
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt("IPL"))
        (challenge / path.parent.name).mkdir(parents=True, exist_ok=True)
        nib.save(image.as_reoriented(turn), challenge / path.parent.name / path.name)
    one, other = (volumes(KiTSDataset, source, tmp_path / "cache") for source in (folder, challenge))
    assert one["case_00010"].image.shape == (1, 80, 239, 239)
    for id_ in one:
        assert torch.equal(one[id_].image.data, other[id_].image.data)
        assert torch.equal(one[id_].label.data, other[id_].label.data)
    arguments = ["--data", "kits", "--model_state", models / "kits", "--no_tta", "--device", "cpu"]
    arguments += ["--patch_size", 80, 160, 160]
    for source in (folder, challenge):
        argv = [*arguments, "--input", source / "case_00010", "--output", tmp_path / source.name / "pred"]
        assert predict.main(list(map(str, argv))) == 0
        prediction = nib.load(tmp_path / source.name / "pred" / "case_00010.nii.gz")
        original = nib.load(source / "case_00010" / "imaging.nii.gz")
        assert prediction.shape == original.shape and np.array_equal(prediction.affine, original.affine)
    a, b = (nib.load(tmp_path / name / "pred" / "case_00010.nii.gz") for name in (folder.name, "challenge"))
    b = nib.as_closest_canonical(b)
    np.testing.assert_array_equal(np.asarray(a.dataobj), np.asarray(b.dataobj))
    assert len(np.unique(np.asarray(a.dataobj))) > 1


def test_truths_that_are_stored_from_right_to_left(make, tmp_path):
    folder = make("kits_mirrored_truth")
    data = Loader(KiTSDataset, folder, tmp_path / "cache", **SPLIT)
    files = {file.id: file for file in data.files("train")}
    straight = nib.load(files["case_00010"].label).as_reoriented([[0, 1], [1, 1], [2, -1]])
    (tmp_path / "pred").mkdir()
    nib.save(straight, tmp_path / "pred" / "case_00010.nii.gz")
    results = results_of(tmp_path, "kits", tmp_path / "pred", folder)
    assert results["case_00010"]["dice"] == [1, 1, 1]
    (tmp_path / "straight" / "case_00010").mkdir(parents=True)
    shutil.copy(files["case_00010"].image, tmp_path / "straight" / "case_00010" / "imaging.nii.gz")
    nib.save(straight, tmp_path / "straight" / "case_00010" / "segmentation.nii.gz")
    one, other = (volumes(KiTSDataset, f, tmp_path / "cache")["case_00010"] for f in (folder, tmp_path / "straight"))
    assert torch.equal(one.label.data, other.label.data) and one.label.data.max() == 2


# ---- the same name


@pytest.mark.parametrize("name", ["two_sets", "same_size_and_time"])
def test_data_sets_of_the_same_names_share_a_cache(make, tmp_path, name):
    """b/ is copied over a/, times and all: all its truths are empty. What a/ had is there again when it comes back."""
    place, cache = tmp_path / "data", tmp_path / "cache"
    foreground, mapped = [], []
    for source in "aba":
        shutil.copytree(make(name) / source, place, dirs_exist_ok=True)  # copy2: keeps the times
        mapped.append(volumes(ACDCDataset, place, cache).values())
        foreground.append(sum(int(subject.label.data.bool().sum()) for subject in mapped[-1]))
    assert foreground[0] == foreground[2] > 0 and foreground[1] == 0
    # what a training has mapped stays what it was
    assert sum(int(subject.label.data.bool().sum()) for subject in mapped[0]) == foreground[0]


def test_a_training_is_not_continued_on_other_data(make, tmp_path, capsys):
    place, sets = tmp_path / "data", make("two_sets")
    shutil.copytree(sets / "a", place)
    arguments = [
        "--data",
        "acdc",
        "--data_path",
        place,
        "--cache_path",
        tmp_path / "cache",
        "--output",
        tmp_path / "runs",
    ]
    assert train.main([*map(str, arguments), *SMALL, "--patch_size", "16", "16"]) == 0
    run = tmp_path / "runs" / "unnamed" / "acdc" / "1"
    resume = ["--resume", run, "--epochs", 2]
    shutil.copytree(sets / "b", place, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    line = refusal(capsys, train, *resume)
    assert "patient00" in line and "ground truth" in line and "--accept_changed_data" in line and "7 more" in line
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.copytree(sets / "a", place, dirs_exist_ok=True)
    for path in place.rglob("*.nii.gz"):
        path.touch()
    place.rename(tmp_path / "moved")  # touched and moved is not changed
    assert train.main([*map(str, resume), "--data_path", str(tmp_path / "moved")]) == 0
    shutil.copy(
        sets / "b" / "training" / "patient005" / "patient005_frame01_gt.nii.gz", tmp_path / "moved/training/patient005"
    )
    assert "patient005_frame01 has another ground truth" in refusal(capsys, train, "--resume", run, "--epochs", 3)
    assert train.main(["--resume", str(run), "--epochs", "3", "--accept_changed_data"]) == 0
    assert "patient005_frame01 has another ground truth: accepted" in (run / "log.txt").read_text()
    assert json.loads((run / "config.json").read_text())["continued"][-1]["accepted_changed_data"] == [
        "patient005_frame01"
    ]
    shutil.rmtree(tmp_path / "moved" / "training" / "patient006")
    assert "patient006_frame01 is not in the train" in refusal(capsys, train, "--resume", run, "--epochs", 4)


# ---- doubles and strays


def test_nii_beside_nii_gz(make, tmp_path, capsys):
    line = refusal(capsys, train, "--data", "kits", "--data_path", make("kits_nii_beside_gz"), *SMALL)
    assert "case_00010: both " in line and "imaging.nii.gz" in line and "imaging.nii are" in line


def test_a_truth_of_the_other_suffix(make, tmp_path):
    files = {file.id: file for file in Loader(ACDCDataset, make("acdc_nii_truth"), **SPLIT).files("train")}
    assert files["patient005_frame01"].label.name == "patient005_frame01_gt.nii"
    assert volumes(ACDCDataset, make("acdc_nii_truth"), tmp_path)["patient005_frame01"].label.data.max() == 3


def test_one_case_under_two_names(make, tmp_path, capsys):
    folder = make("two_names")
    arguments = ["--data", "kits", "--pred", folder / "pred", "--gt", folder / "gt", "--output", tmp_path / "r.json"]
    line = refusal(capsys, evaluate, *arguments)
    assert "/case_00010.nii.gz" in line and "/prediction_00010.nii.gz" in line and not (tmp_path / "r.json").exists()


def test_a_truth_without_a_prediction_is_counted_and_named(make, tmp_path, capsys):
    folder = make("missing_prediction")
    results = results_of(tmp_path, "kits", folder / "pred", folder / "gt")
    assert results["n"]["dice"] == [2, 2, 2]
    assert "1 of 3 ground truths have no prediction and do not count: case_00010" in capsys.readouterr().out


@pytest.mark.parametrize("patch_size", [("64", "64"), ("16", "16")])
def test_images_of_one_row_train(make, tmp_path, patch_size):
    arguments = ["--data", "acdc", "--data_path", make("one_row"), "--cache_path", tmp_path / "cache"]
    arguments += ["--output", tmp_path / "runs", "--patch_size", *patch_size, *SMALL]
    assert train.main(list(map(str, arguments))) == 0

"""Own data from the raw folder to the results, as a user types it."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from raw_data import ACDC, write_acdc, write_raw

import evaluate
import predict
import train
from lib.data import images, own_data
from lib.settings import Settings

SMALL = "--fms_init 6 --batch_size 2 --steps 8 --lr 0.01 --num_workers 0 --seed_train 1"


def run(script, text, capfd):
    code = script.main(text.split())
    out, err = capfd.readouterr()
    return SimpleNamespace(code=code, out=out, err=err, error=err.strip().splitlines()[-1] if err.strip() else "")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of two channels, labels 0, 1, 4, thick slices and an empty mask; trained in 3D, two levels pruned."""
    folder = tmp_path_factory.mktemp("own")
    data = write_raw(folder / "Dataset007_Blobs", n=6, tests=2, licence="CC0")
    argv = (
        f"--data {data} --dim 3D {SMALL} --epochs 4 --max_flops 50% --prune_between 0% 60% --cache_path {folder}/cache"
    )
    assert train.main([*argv.split(), "--output", f"{folder}/runs", "--exp_name", "first"]) == 0
    return SimpleNamespace(
        folder=folder, data=data, run=folder / "runs" / "first" / "Dataset007_Blobs" / "1", argv=argv
    )


def test_the_run_holds_plan_and_folds(trained):
    settings, _ = Settings.read(trained.run)
    dataset = settings.dataset
    assert (dataset.values, dataset.channels, dataset.modalities) == (
        (0, 1, 4),
        ("MRI", "CT"),
        2,
    ) or dataset.modalities == 2
    assert (settings.dim, settings.fold, settings.steps, settings.foreground) == ("3D", "0", 8, 0.33)
    assert settings.strides[0] == "111" and settings.strides[1] == "122" and settings.kernels[0] == "133"
    assert settings.data_path == str(trained.data) and len(dataset.folds) == 5
    log = (trained.run / "log.txt").read_text()
    assert "an epoch takes about" in log and "spacing" in log and "budget met" in log
    assert json.loads((trained.run / "subjects.json").read_text()).keys() == {"train", "validation"}


def test_the_validation_is_that_of_predict_and_evaluate(trained, tmp_path, capfd):
    model = next(trained.run.glob("models/model-4"))
    out = tmp_path / "out"
    text = f"--model_state {model} --partition validation --output {out} --device cpu --batch_size 2"
    assert run(predict, text, capfd).code == 0
    expected = json.loads((trained.run / "validation.json").read_text())["after"]["subjects"]
    argv = f"--data {trained.run} --pred {out} --output {tmp_path / 'r.json'} --summary {tmp_path / 's.json'}"
    assert run(evaluate, f"{argv} --num_workers 1", capfd).code == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert {id_: found[id_]["dice"] for id_ in expected} == {id_: one["dice"] for id_, one in expected.items()}
    summary = json.loads((tmp_path / "s.json").read_text())
    assert set(summary["mean"]) == {"1", "4"}


def test_predictions_have_the_values_and_the_grid_of_the_files(trained, tmp_path, capfd):
    model = trained.run / "models" / "model-4"
    assert run(predict, f"--model_state {model} --output {tmp_path / 'a'} --no_postprocessing", capfd).code == 0
    names = sorted(path.name for path in (tmp_path / "a").glob("*.nii.gz"))
    assert names == ["t00.nii.gz", "t01.nii.gz"]  # imagesTs
    image = nib.load(trained.data / "imagesTs" / "t00_0000.nii.gz")
    labels = nib.load(tmp_path / "a" / names[0])
    np.testing.assert_array_equal(labels.affine, image.affine)
    assert labels.shape == image.shape and set(np.unique(labels.dataobj)) <= {0, 1, 4}
    folder = trained.data / "imagesTs"
    assert (
        run(
            predict, f"--model_state {model} --input {folder} --output {tmp_path / 'b'} --no_postprocessing", capfd
        ).code
        == 0
    )
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_channel_is_named_before_anything_is_written(trained, tmp_path, capfd):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("t00_0000.nii.gz", "t00_0001.nii.gz", "t01_0000.nii.gz"):
        (folder / name).write_bytes((trained.data / "imagesTs" / name).read_bytes())
    ended = run(
        predict, f"--model_state {trained.run}/models/model-4 --input {folder} --output {tmp_path / 'out'}", capfd
    )
    assert ended.code == 2 and "t01" in ended.err and not (tmp_path / "out").exists()


def test_a_run_goes_on(trained, tmp_path, capfd):
    text = f"--data {trained.data} --dim 3D {SMALL} --max_flops none --cache_path {trained.folder}/cache"
    text += f" --output {tmp_path}"
    assert run(train, f"{text} --epochs 1", capfd).code == 0
    folder = tmp_path / "unnamed" / "Dataset007_Blobs" / "1"
    assert run(train, f"--resume {folder} --epochs 2", capfd).code == 0
    assert json.loads((folder / "history.json").read_text())["epoch"] == [1, 2]
    ended = run(train, f"--resume {folder} --epochs 3 --data {trained.data} --fold 1", capfd)
    assert ended.code == 2 and "--fold 1: the run" in ended.err


def test_slices_are_trained_too_and_folds_are_averaged(trained, tmp_path, capfd):
    models = []
    for fold in ("0", "1"):
        text = f"--data {trained.data} --dim 2D {SMALL} --epochs 1 --max_flops none --fold {fold} --exp_name f{fold}"
        assert run(train, f"{text} --cache_path {trained.folder}/cache --output {tmp_path / 'runs'}", capfd).code == 0
        models.append(str(tmp_path / "runs" / f"f{fold}" / "Dataset007_Blobs" / "1" / "models" / "model-1"))
    ended = run(predict, f"--model_state {' '.join(models)} --output {tmp_path / 'out'}", capfd)
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "out").glob("t*.nii.gz"))) == 2


def test_plan_only_prints_the_plan_and_trains_nothing(trained, tmp_path, capfd):
    text = f"--data {trained.data} --plan_only --fms_init 6 --batch_size 2 --output {tmp_path / 'runs'}"
    ended = run(train, f"{text} --cache_path {tmp_path / 'cache'} --spacing 0 2 2", capfd)
    assert ended.code == 0 and not (tmp_path / "runs").exists()
    lines = {line.split("|")[0].strip(): line for line in ended.out.splitlines() if "|" in line}
    assert "--spacing" in lines["spacing"] and "--batch_size" in lines["batch"] and "an epoch takes about" in ended.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--split 0.5:0.5", "own data have folds"),
        ("--fold 7x", "is neither the number of a fold nor all"),
        ("--strides 11 22 22 --dim 3D", "--strides"),
        ("--data_path elsewhere", "--data is the folder already"),
        ("--patch_size 12 25 24 --dim 3D --epochs 1", "--patch_size 12 25 24"),
    ],
)
def test_flags_that_make_no_sense_are_named(trained, tmp_path, capfd, flags, message):
    ended = run(train, f"--data {trained.data} --output {tmp_path / 'runs'} --cache_path {tmp_path} {flags}", capfd)
    assert ended.code == 2 and message in ended.err and not (tmp_path / "runs").exists()


def test_flags_of_own_data_are_refused_for_known_ones(tmp_path, capfd):
    for flags in ("--spacing 1 1 1", "--fold 0", "--no_crop", "--axes 0 1 2"):
        ended = run(train, f"--data phantom --output {tmp_path / 'runs'} {flags}", capfd)
        assert ended.code == 2 and "is for a folder in nnU-Net's raw format" in ended.err
    ended = run(train, f"--data phantom --output {tmp_path / 'runs'} --dim 3D", capfd)
    assert ended.code == 2 and "--dim 3D: phantom is 2D" in ended.err


@pytest.mark.parametrize(
    ("data", "message"),
    [("no/such", "no/such: there is no such folder"), (".", "has no dataset.json"), ("acd", "did you mean acdc?")],
)
def test_what_is_no_data_set_is_told(tmp_path, monkeypatch, capfd, data, message):
    monkeypatch.chdir(tmp_path)
    ended = run(train, f"--data {data}", capfd)
    assert ended.code == 2 and message in ended.err


def test_all_problems_are_listed_at_once(tmp_path, capfd):
    data = write_raw(tmp_path / "Dataset008_Bad", n=5)
    (data / "imagesTr" / "c01_0001.nii.gz").unlink()
    (data / "labelsTr" / "c02.nii.gz").unlink()
    ended = run(train, f"--data {data} --output {tmp_path / 'runs'} --cache_path {tmp_path / 'cache'}", capfd)
    assert ended.code == 2 and "c01" in ended.err and "c02" in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "runs").exists()


def test_axes_of_a_plan_are_those_of_the_volumes():
    axes = SimpleNamespace(transpose=(2, 0, 1), dim="3D", spacing=(4, 1, 1), normalizations=(), crop=True)
    rest = {"patch_size": (8, 8, 8), "levels": 3, "fms_init": 8, "fms_max": 8, "batch_size": 2, "patches_per_volume": 1}
    plan = SimpleNamespace(**vars(axes), **rest, strides=[(1, 1, 1)] * 3, kernels=[(3, 3, 3)] * 3)
    dataset = own_data.planned(Settings.of({"data": "phantom"}).dataset, plan, "LPS")
    assert dataset.preprocessing.orientation == "LSP"  # SPL is the reverse of LPS, and its last axis comes first
    assert dataset.preprocessing.spacing_mm == (4, 1, 1)
    plan.dim, plan.spacing, plan.patch_size = "2D", (None, 1, 2), (8, 8)
    dataset = own_data.planned(Settings.of({"data": "phantom"}).dataset, plan, "LPS")
    assert dataset.preprocessing.orientation == "SPL" and dataset.preprocessing.spacing_mm == (1, 2, None)
    assert dataset.dim == "2D"


def test_labels_that_lie_elsewhere_are_refused_or_accepted_by_a_flag(tmp_path, capfd):
    data = write_raw(tmp_path / "Dataset009_Moved", n=5)
    path = data / "labelsTr" / "c00.nii.gz"
    label = nib.load(path)
    affine = label.affine.copy()
    affine[0, 3] += 3
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), affine), path)
    text = f"--data {data} {SMALL} --dim 3D --epochs 1 --max_flops none"
    text += f" --cache_path {tmp_path / 'cache'} --output {tmp_path}"
    ended = run(train, text, capfd)
    assert ended.code == 2 and "c00" in ended.err and "--allow_mismatch" in ended.err
    assert run(train, f"{text} --allow_mismatch --fold 0", capfd).code == 0
    scores = json.loads((tmp_path / "unnamed" / data.name / "1" / "validation.json").read_text())
    assert scores["after"]["subjects"]


@pytest.mark.skipif(not ACDC.is_dir(), reason="needs the shared ACDC patients")
def test_real_acdc_in_this_format(tmp_path, capfd):
    data = write_acdc(tmp_path, 5)  # five patients, two frames each; a fold each
    text = f"--data {data} --fms_init 4 --batch_size 2 --steps 2 --epochs 1 --patch_size 64 64 --levels 4"
    text += f" --num_workers 0 --output {tmp_path / 'runs'} --cache_path {tmp_path / 'cache'}"
    ended = run(train, text, capfd)
    assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "unnamed" / data.name / "1"
    settings, _ = Settings.read(folder)
    assert settings.dim == "2D" and settings.dataset.preprocessing.spacing_mm == (1.5625, 1.5625, None)
    subjects = json.loads((folder / "subjects.json").read_text())
    patients = [{id_.split("_")[0] for id_ in subjects[part]} for part in ("train", "validation")]
    assert len(patients[0]) == 4 and len(patients[1]) == 1 and not patients[0] & patients[1]
    assert set(json.loads((folder / "validation.json").read_text())["after"]["subjects"]) == set(subjects["validation"])


def test_pictures_are_slices(tmp_path, capfd):
    data = write_raw(tmp_path / "Dataset010_Pictures", n=6, shape=(40, 48), ending=".png", channels=1, tests=1)
    text = f"--data {data} --fms_init 4 --batch_size 2 --steps 4 --epochs 1 --max_flops none --num_workers 0"
    ended = run(train, f"{text} --cache_path {tmp_path / 'cache'} --output {tmp_path / 'runs'}", capfd)
    assert ended.code == 0, ended.err
    model = tmp_path / "runs" / "unnamed" / data.name / "1" / "models" / "model-1"
    assert Settings.read(model.parent.parent)[0].dim == "2D"
    ended = run(predict, f"--model_state {model} --output {tmp_path / 'out'}", capfd)
    assert ended.code == 0, ended.err
    labels = images.read(tmp_path / "out" / "t00.png").array
    assert labels.shape[:2] == (40, 48) and set(np.unique(labels)) <= {0, 1, 4}


def test_ignored_voxels_and_a_turned_case(tmp_path, capfd):
    """A case that is stored in another orientation is named, and comes back onto its own grid."""
    data = write_raw(tmp_path / "Dataset011_Turned", n=6, ignore=5, empty=False)
    for path in data.glob("*Tr/c00*.nii.gz"):
        image = nib.load(path)
        turned = image.as_reoriented(nib.orientations.axcodes2ornt(("P", "R", "S")))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), path)
    text = f"--data {data} {SMALL} --dim 3D --epochs 1 --max_flops none --cache_path {tmp_path / 'cache'}"
    ended = run(train, f"{text} --output {tmp_path / 'runs'}", capfd)
    assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "unnamed" / data.name / "1"
    assert "c00" in (folder / "log.txt").read_text() and Settings.read(folder)[0].dataset.ignore == 5
    model, out = folder / "models" / "model-1", tmp_path / "out"
    assert run(predict, f"--model_state {model} --input {data / 'imagesTr'} --output {out}", capfd).code == 0
    for id_ in ("c00", "c01"):
        image, labels = nib.load(data / "imagesTr" / f"{id_}_0000.nii.gz"), nib.load(out / f"{id_}.nii.gz")
        assert labels.shape == image.shape
        np.testing.assert_array_equal(labels.affine, image.affine)
        assert set(np.unique(labels.dataobj)) <= {0, 1, 4}

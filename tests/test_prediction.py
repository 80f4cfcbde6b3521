"""predict.py: what is predicted, under which names, and what is refused."""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from niftis import assert_same_grid, oblique, oriented, write_image

import lib.prediction
import lib.runs
import predict
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.data.normalization import Normalization
from lib.data.preprocessing import Preprocessing
from lib.evaluation import read_model_summary
from lib.inference import Predictor
from lib.models import load_model
from lib.models.nnUNet import nnUNet
from lib.postprocessing import keep_largest
from lib.prediction import input_images
from lib.record import mixed_jobs
from lib.runs import partition_images
from lib.system.error import InputError

RECORDS = ["model.json", "predictions.json"]
KEEP = Preprocessing(spacing_mm=(None, None, None))


class Toy:
    """A data set of three images, with what predict.py needs of a BaseDataset."""

    name, n_classes, modalities, dim, challenge_name = "toy", 2, 1, "2D", "toy-{case:03d}"
    patch_size, preprocessing, values, file_ending = (16, 16), KEEP, (), ".nii.gz"
    defaults = DATASETS["acdc"].defaults | {"fms_init": 4, "levels": 3}

    @staticmethod
    def check_channels(subject, files):
        assert len(files) == 1

    @staticmethod
    def find(root):
        flat = [
            SimpleNamespace(id=path.name.split(".")[0], images=(path,), image=path)
            for path in sorted(root.glob("case*.nii*"))
        ]
        nested = [
            SimpleNamespace(id=path.parent.name, images=(path,), image=path)
            for path in sorted(root.glob("case*/image.nii"))
        ]
        return flat or nested

    @classmethod
    def partitions(cls, data_path, split, seed_data):
        found = cls.find(Path(data_path))
        return {"test": found, "train": found[:seed_data], "validation": []}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Three images, a run with a model of fewer filters than it began with, and a function that runs predict.py."""
    monkeypatch.setitem(DATASETS, "toy", Toy)
    (tmp_path / "data").mkdir()
    for name, affine in (("case1.nii.gz", oblique()), ("case2.nii", oriented("LPS")), ("case3.nii.gz", np.eye(4))):
        write_image(tmp_path / "data" / name, affine)
    models = tmp_path / "run" / "models"
    models.mkdir(parents=True)
    torch.manual_seed(0)
    model = nnUNet(1, 2, 4, 3, filters={"out": {"enc_ConvBlock_1": 2}})
    model.initialize()
    torch.save(model.state_dict(), models / "model-1")
    config = {"data": "toy", "patch_size": [8, 16], "fms_init": 4, "levels": 3, "split": "1:0", "seed_data": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    arguments = ["--data", "toy", "--model_state", str(models / "model-1"), "--output", str(tmp_path / "out")]

    def run(*more, source=("--original", str(tmp_path / "data"))):
        return predict.main([*arguments, "--device", "cpu", *source, *map(str, more)])

    return SimpleNamespace(run=run, out=tmp_path / "out", data=tmp_path / "data", model=models / "model-1")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_refused(capsys, code, *words):
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and all(str(word) in error[0] for word in words), error


def test_predict_writes_labels_probabilities_and_the_size_of_the_model(toy):
    assert toy.run("--probabilities") == 0
    suffixes = (".nii.gz", "_probabilities.nii.gz")
    assert names(toy.out) == sorted([f"case{i}{suffix}" for i in (1, 2, 3) for suffix in suffixes] + RECORDS)
    for name in names(toy.data):
        output = toy.out / f"{name.split('.')[0]}.nii.gz"
        assert_same_grid(output, toy.data / name)
        probabilities = np.asarray(nib.load(toy.out / f"{name.split('.')[0]}_probabilities.nii.gz").dataobj)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(-1), np.asarray(nib.load(output).dataobj))
    # the run's own patch, not the data set's
    expected = Predictor(load_model(toy.model), (8, 16), preprocessing=KEEP).file(toy.data / "case1.nii.gz", True)
    written = nib.load(toy.out / "case1_probabilities.nii.gz")
    np.testing.assert_allclose(np.asarray(written.dataobj), expected.probabilities, atol=1e-6)

    content = json.loads((toy.out / "model.json").read_text())
    assert content["model"] == str(toy.model) and content["data"] == "toy"
    # 2 of 4 filters gone: 2 x (9 + 1) weights of their own, 2 x 9 x 4 inputs of the next block
    assert content["parameters"]["unpruned"] - content["parameters"]["now"] == 2 * 10 + 2 * 9 * 4
    # per pixel and filter 2 FLOPs x 9 weights here, and x 4 filters in the next block
    assert content["flops"]["unpruned"] - content["flops"]["now"] == 8 * 16 * 2 * 2 * (9 + 9 * 4)
    assert content["filters"]["unpruned"] - content["filters"]["now"] == 2


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def predictions(folder):
    return {path.name: path.read_bytes() for path in folder.glob("case*")}


@pytest.fixture
def other(toy, tmp_path):
    """Another model in the same run, and its predictions of the three images."""
    torch.manual_seed(1)
    model = nnUNet(1, 2, 4, 3)
    model.initialize()
    path = toy.model.with_name("model-2")
    torch.save(model.state_dict(), path)
    assert toy.run("--model_state", path, "--output", tmp_path / "others") == 0
    folder = tmp_path / "others"
    return SimpleNamespace(model=path, predictions=predictions(folder), contents=contents(folder))


def test_an_interrupted_prediction_is_finished(toy, capsys):
    assert toy.run() == 0
    whole = contents(toy.out)
    (toy.out / "case2.nii.gz").unlink()
    kept = (toy.out / "case1.nii.gz").stat().st_mtime_ns
    assert toy.run("--skip_existing") == 0
    assert contents(toy.out) == whole
    assert (toy.out / "case1.nii.gz").stat().st_mtime_ns == kept
    capsys.readouterr()
    assert_refused(capsys, toy.run(), toy.out / "case1.nii.gz", "--skip_existing", "--overwrite")
    (toy.out / "case1.nii.gz").write_bytes(b"by hand")
    (toy.out / "case3.nii.gz").unlink()
    assert_refused(capsys, toy.run("--skip_existing"), toy.out / "case1.nii.gz", "--overwrite")
    assert (toy.out / "case1.nii.gz").read_bytes() == b"by hand"
    assert toy.run("--overwrite") == 0
    assert contents(toy.out) == whole


def test_labels_without_probabilities_are_completed(toy):
    assert toy.run() == 0
    assert toy.run("--skip_existing", "--probabilities") == 0
    assert len(predictions(toy.out)) == 6
    (toy.out / "case2_probabilities.nii.gz").write_bytes(b"by hand")
    assert toy.run("--skip_existing", "--probabilities") == 2


def die(*_):
    raise KeyboardInterrupt


def stop_at_the_third(toy, monkeypatch, how):
    """Have what comes next end in this way when it is at the third image; returns what mends it."""
    if how == "signal":
        calls = iter(range(100))
        monkeypatch.setattr(lib.prediction, "check_stopped", lambda: next(calls) == 2 and sys.exit(143))
    elif how == "damaged image":
        good = (toy.data / "case3.nii.gz").read_bytes()
        (toy.data / "case3.nii.gz").write_bytes(good[:100])
        return lambda: (toy.data / "case3.nii.gz").write_bytes(good)
    elif how == "killed before the rename":
        replace = os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: die() if Path(b).name == "case3.nii.gz" else replace(a, b))
    else:
        put = lib.prediction.save
        monkeypatch.setattr(
            lib.prediction, "save", lambda *given: (put(*given), die() if "case3" in given[2].name else 0)
        )
    return monkeypatch.undo


@pytest.mark.parametrize("how", ["signal", "damaged image", "killed before the rename", "killed after the rename"])
def test_a_stopped_overwrite_is_finished_with_one_model(toy, other, how, capsys):
    assert toy.run() == 0
    before = predictions(toy.out)
    assert all(before[name] != content for name, content in other.predictions.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "toy", Toy)
        mend = stop_at_the_third(toy, patch, how)
        try:
            assert toy.run("--overwrite", "--model_state", other.model) == 2
        except (KeyboardInterrupt, SystemExit):
            assert how != "damaged image"
        mend()
    assert predictions(toy.out)["case2.nii.gz"] == other.predictions["case2.nii.gz"]
    if how != "killed after the rename":
        assert predictions(toy.out)["case3.nii.gz"] == before["case3.nii.gz"]
        assert "model" in mixed_jobs(toy.out, before)
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing"), toy.out, "model-2", "--overwrite")
    assert toy.run("--skip_existing", "--model_state", other.model) == 0
    assert contents(toy.out) == other.contents  # the records, too
    assert mixed_jobs(toy.out, before) is None
    (toy.out / "case1.nii.gz").write_bytes(before["case1.nii.gz"])  # the overwriting has ended
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing", "--model_state", other.model), toy.out / "case1.nii.gz")


def test_a_stopped_overwrite_replaces_only_what_it_was_to_replace(toy, other, capsys):
    assert toy.run() == 0
    before = predictions(toy.out)
    one = ("--input", str(toy.data / "case1.nii.gz"))
    assert toy.run("--overwrite", "--model_state", other.model, source=one) == 0
    now = before | {"case1.nii.gz": other.predictions["case1.nii.gz"]}
    assert predictions(toy.out) == now
    assert "case1.nii.gz" in mixed_jobs(toy.out, now) and mixed_jobs(toy.out, ["case1.nii.gz"]) is None
    capsys.readouterr()
    code = toy.run("--skip_existing", "--model_state", other.model)
    assert_refused(capsys, code, toy.out / "case2.nii.gz", "model-1", "--overwrite")
    assert predictions(toy.out) == now
    assert toy.run("--skip_existing", "--model_state", other.model, source=one) == 0


def test_what_is_as_it_was_is_continued_wherever_it_lies(toy, tmp_path):
    assert toy.run("--no_tta") == 0
    whole = predictions(toy.out)
    (toy.out / "case2.nii.gz").unlink()
    moved = shutil.copytree(toy.data, tmp_path / "moved")  # with other times
    (tmp_path / "models").mkdir()
    model = shutil.copy(toy.model, tmp_path / "models" / "copy")
    argv = ["--skip_existing", "--no_tta", "--model_state", model, "--patch_size", 8, 16, "--batch_size", 1]
    assert toy.run(*argv, source=("--input", str(moved))) == 0
    assert predictions(toy.out) == whole
    assert mixed_jobs(toy.out, whole) is None


CHANGES = {
    "another model": (["--model_state", "{}/model-2"], ["model-1"]),
    "another model at the same place": ([], ["model was another one"]),
    "--patch_size": (["--patch_size", 16, 16], ["--patch_size was 8 16"]),
    "--no_tta": (["--no_tta"], ["--no_tta was not given"]),
    "--amp": (["--amp"], ["--amp was not given"]),
    "another image": ([], ["case1.nii.gz: is not the image that"]),
    "other preprocessing": ([], ["preprocessing was another one"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_made_from_something_else_is_not_continued(toy, other, change, capsys, monkeypatch):
    argv, words = CHANGES[change]
    assert toy.run() == 0
    for case in (2, 3):
        (toy.out / f"case{case}.nii.gz").unlink()
    if change == "another model at the same place":
        toy.model.write_bytes(other.model.read_bytes())
    elif change == "another image":  # of the same size, too
        write_image(toy.data / "case1.nii.gz", oblique(), dtype=np.uint16)
    elif change == "other preprocessing":
        monkeypatch.setattr(Toy, "preprocessing", Preprocessing(spacing_mm=(1.5, None, None)))
    argv = [str(part).format(toy.model.parent) for part in argv]
    before = contents(toy.out)
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing", *argv), *words, "--overwrite", "--output")
    assert contents(toy.out) == before
    if change != "another image":  # nor is the folder filled up with it
        assert_refused(capsys, toy.run(*argv, "--input", toy.data / "case2.nii", source=()), *words, "--overwrite")
        assert contents(toy.out) == before
    assert toy.run("--overwrite", *argv) == 0
    assert toy.run("--skip_existing", *argv) == 0


def test_predictions_of_an_older_version_are_not_continued(toy, capsys):
    assert toy.run() == 0
    (toy.out / "predictions.json").unlink()
    (toy.out / "case2.nii.gz").unlink()
    before = contents(toy.out)
    for argv in (["--skip_existing"], ["--input", toy.data / "case2.nii"]):
        capsys.readouterr()
        assert_refused(capsys, toy.run(*argv), toy.out, "predictions.json", "--overwrite", "--output")
        assert contents(toy.out) == before
    assert toy.run("--overwrite") == 0
    assert toy.run("--skip_existing") == 0


def test_when_all_predictions_are_deleted_another_model_can_follow(toy, other):
    assert toy.run() == 0
    for path in toy.out.glob("case*"):
        path.unlink()
    assert toy.run("--model_state", other.model) == 0
    assert predictions(toy.out) == other.predictions


def test_a_model_that_changes_while_it_is_read_is_not_used(toy, capsys, monkeypatch):
    def read_and_change(*args, **kwargs):
        result = load_model(*args, **kwargs)
        toy.model.write_bytes(toy.model.read_bytes() + bytes(8))
        return result

    monkeypatch.setattr(lib.runs, "load_model", read_and_change)
    code = toy.run()
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and f"{toy.model}: changed while it was read" in error
    assert not toy.out.exists()


def test_the_record_names_what_was_predicted_from_though_it_changes_meanwhile(toy, monkeypatch):
    image = toy.data / "case1.nii.gz"
    before = hashlib.sha256(image.read_bytes()).hexdigest()

    predict_file = Predictor.file

    def predict_and_change(*args):
        prediction = predict_file(*args)
        image.write_bytes(image.read_bytes() + bytes(8))
        return prediction

    monkeypatch.setattr(Predictor, "file", predict_and_change)
    assert toy.run("--input", image, source=()) == 0
    record = json.loads((toy.out / "predictions.json").read_text())
    assert record["files"]["case1.nii.gz"][0]["input"]["sha256"] == before


def test_a_damaged_record_is_refused(toy, capsys):
    assert toy.run() == 0
    good = json.loads((toy.out / "predictions.json").read_text())
    (toy.out / "case2.nii.gz").unlink()
    for bad in (
        b"",
        b"[]",
        b"{}",
        json.dumps(good | {"version": 2}).encode(),
        json.dumps(good | {"jobs": {}}).encode(),
    ):
        (toy.out / "predictions.json").write_bytes(bad)
        capsys.readouterr()
        assert_refused(capsys, toy.run("--skip_existing"), toy.out / "predictions.json")
        assert not (toy.out / "case2.nii.gz").exists()


def test_the_folder_of_the_images_is_no_output(toy, capsys):
    before = contents(toy.data)
    for source in (toy.data, toy.data / "case2.nii"):
        code = toy.run("--skip_existing", "--output", toy.data, source=("--input", str(source)))
        assert_refused(capsys, code, "--output")
    assert contents(toy.data) == before


def test_truths_and_probabilities_among_the_images_are_left_out(toy, capsys):
    for name in ("case1_gt.nii.gz", "case2_GT.nii", "case3_gt.nii", "case3_probabilities.nii.gz"):
        write_image(toy.data / name, oblique())
    assert toy.run(source=("--input", str(toy.data))) == 0
    assert names(toy.out) == ["case1.nii.gz", "case2.nii.gz", "case3.nii.gz", *RECORDS]
    assert capsys.readouterr().out.count(f"--input {toy.data}: leaves out 4 files *_gt or *_probabilities") == 1
    assert toy.run("--skip_existing", source=("--input", str(toy.data / "case1_gt.nii.gz"))) == 0
    assert "case1_gt.nii.gz" in names(toy.out)


def test_a_folder_of_truths_alone_is_refused(toy, tmp_path, capsys):
    (tmp_path / "truths").mkdir()
    write_image(tmp_path / "truths" / "a_gt.nii.gz", oblique())
    assert_refused(capsys, toy.run(source=("--input", str(tmp_path / "truths"))), "no image", "only 1 file *_gt")
    assert not toy.out.exists()


@pytest.mark.parametrize("where", ["alone", "in another run"])
def test_a_model_that_was_copied_out_of_its_run_has_no_partitions(toy, tmp_path, capsys, where):
    model = tmp_path / "elsewhere" / "models" / "model-7"
    model.parent.mkdir(parents=True)
    shutil.copy(toy.model, model)
    if where == "in another run":
        shutil.copy(toy.model.parent.parent / "config.json", tmp_path / "elsewhere")
        (model.parent / "SHA256SUMS").write_text(f"{'0' * 64}  model-1\n")
    for partition in ("train", "validation"):
        code = toy.run("--model_state", model, "--partition", partition)
        assert_refused(capsys, code, f"--partition {partition}", model, "--input")
        assert not toy.out.exists()
    assert toy.run("--model_state", model) == 0
    assert f"the run of {model} is not known: predicting the test set of seed 42" in capsys.readouterr().out
    job = next(iter(json.loads((toy.out / "predictions.json").read_text())["jobs"].values()))
    assert job["patch_size"] == [16, 16]  # the data set's, not that of config.json
    (model.parent / "SHA256SUMS").write_text(f"{hashlib.sha256(model.read_bytes()).hexdigest()}  model-7\n")
    shutil.copy(toy.model.parent.parent / "config.json", tmp_path / "elsewhere")
    assert toy.run("--model_state", model, "--partition", "train", "--output", tmp_path / "b") == 0


def test_input_takes_a_file_or_a_folder(toy, capsys):
    assert toy.run(source=("--input", str(toy.data / "case2.nii"))) == 0
    assert names(toy.out) == ["case2.nii.gz", *RECORDS]
    (toy.data / "notes.txt").touch()
    (toy.data / "._case1.nii.gz").touch()  # what macOS leaves behind
    assert toy.run("--skip_existing", "--batch_size", 1, source=("--input", str(toy.data))) == 0
    assert names(toy.out) == ["case1.nii.gz", "case2.nii.gz", "case3.nii.gz", *RECORDS]
    capsys.readouterr()
    kept = (toy.data / "case1.nii.gz").read_bytes()
    code = toy.run("--overwrite", "--output", toy.data, source=("--input", str(toy.data)))
    assert_refused(capsys, code, "case1.nii.gz", "--output")
    assert (toy.data / "case1.nii.gz").read_bytes() == kept


def test_input_in_the_data_sets_layout_is_named_by_its_ids(toy, tmp_path):
    for case in ("case7", "case8"):
        (tmp_path / "nested" / case).mkdir(parents=True)
        write_image(tmp_path / "nested" / case / "image.nii", oblique())
    assert toy.run(source=("--input", str(tmp_path / "nested" / "case7" / "image.nii"))) == 0
    assert names(toy.out) == ["case7.nii.gz", *RECORDS]
    assert toy.run("--skip_existing", source=("--input", str(tmp_path / "nested"))) == 0
    assert names(toy.out) == ["case7.nii.gz", "case8.nii.gz", *RECORDS]


@pytest.mark.parametrize("inside", [False, True])
def test_input_takes_the_images_of_one_subject_and_not_its_labels(toy, tmp_path, monkeypatch, inside):
    subject = tmp_path / "nested" / "case7"
    subject.mkdir(parents=True)
    for name in ("image.nii", "label.nii"):
        write_image(subject / name, oblique())
    monkeypatch.chdir(subject)
    for source in (".", "image.nii") if inside else (subject, "../case7"):
        assert toy.run("--overwrite", source=("--input", str(source))) == 0
        assert names(toy.out) == ["case7.nii.gz", *RECORDS]


def test_challenge_names(toy, capsys, monkeypatch):
    assert toy.run("--challenge_names", "--probabilities") == 0
    predictions = [f"toy-00{case}{suffix}.nii.gz" for case in (1, 2, 3) for suffix in ("", "_probabilities")]
    assert names(toy.out) == [*RECORDS, *predictions]
    write_image(toy.data / "case2_again.nii", oblique())
    capsys.readouterr()
    assert_refused(capsys, toy.run("--challenge_names", "--overwrite"), "case2_again.nii", "--challenge_names")
    monkeypatch.setattr(Toy, "challenge_name", None)
    assert_refused(capsys, toy.run("--challenge_names", "--overwrite"), "--challenge_names", "toy")


def test_the_partition_is_that_of_the_run(toy):
    assert toy.run("--partition", "train") == 0  # seed_data 2 of config.json: the toy's first two
    assert names(toy.out) == ["case1.nii.gz", "case2.nii.gz", *RECORDS]


def test_bad_input_is_refused_in_one_line_before_anything_is_written(toy, capsys, tmp_path):
    def refused(*words, arguments, **kwargs):
        assert_refused(capsys, toy.run(*arguments, **kwargs), *words)
        assert not toy.out.exists()

    refused("--partition validation", arguments=["--partition", "validation"])
    refused("nowhere", arguments=[], source=("--input", "nowhere"))
    refused("--patch_size 8", "2 numbers", arguments=["--patch_size", 8])
    refused("multiple of 4", arguments=["--patch_size", 18, 16])
    refused("--device cuda:99", arguments=["--device", "cuda:99"])
    refused("no such file", arguments=["--model_state", tmp_path / "model-9"])
    (tmp_path / "in_filters").write_text("enc_ConvBlock_1\n7\n")
    refused("in_filters", arguments=["--in_filters", tmp_path / "in_filters"])
    torch.save(nnUNet(1, 4, 2, 3).state_dict(), tmp_path / "model")
    refused("n_classes is 4", arguments=["--model_state", tmp_path / "model"])
    (toy.data / "case2.nii.gz").touch()
    refused("same name", arguments=[], source=("--input", str(toy.data)))
    (tmp_path / "file").touch()
    refused("--output", arguments=["--output", tmp_path / "file"])


def test_without_a_run_the_data_sets_own_settings_count(toy, tmp_path):
    torch.save(nnUNet(1, 2, 2, 4).state_dict(), tmp_path / "model")
    assert toy.run("--model_state", tmp_path / "model", "--input", toy.data / "case2.nii", source=()) == 0
    content = json.loads((toy.out / "model.json").read_text())
    assert content["flops"]["unpruned"] is None and content["flops"]["now"] > 0  # 4 levels, the data set has 3


def test_a_byte_order_mark_in_the_records_changes_nothing(toy):
    from lib.record import mixed_jobs

    assert toy.run() == 0
    for name in RECORDS:
        (toy.out / name).write_text((toy.out / name).read_text(), encoding="utf-8-sig")
    assert mixed_jobs(toy.out, ["case1.nii.gz"]) is None and toy.run("--skip_existing") == 0
    model = json.loads((toy.out / "model.json").read_text(encoding="utf-8-sig")) | {"sha256": "another"}
    (toy.out / "model.json").write_text(json.dumps(model), encoding="utf-8-sig")
    assert "another model" in mixed_jobs(toy.out, ["case1.nii.gz"])


def test_no_probabilities_of_another_model_stay_beside_new_labels(toy, other):
    assert toy.run("--probabilities") == 0
    assert toy.run("--model_state", other.model, "--overwrite") == 0
    assert names(toy.out) == sorted([f"case{i}.nii.gz" for i in (1, 2, 3)] + RECORDS)
    assert predictions(toy.out) == other.predictions


def test_predictions_that_are_not_as_they_were_made_are_named(toy, other):
    from lib.record import foreign_files

    assert toy.run() == 0
    files = [f"case{i}.nii.gz" for i in (1, 2, 3)]
    assert foreign_files(toy.out, files) == [] == foreign_files(toy.data, files)
    (toy.out / "case2.nii.gz").write_bytes(other.predictions["case2.nii.gz"])
    (line,) = foreign_files(toy.out, files)
    assert line.endswith("elsewhere: case2.nii.gz")


def test_the_run_tells_the_data_set(toy, tmp_path, capsys):
    model = ["--model_state", str(toy.model), "--original", str(toy.data), "--device", "cpu"]
    assert predict.main([*model, "--output", str(toy.out)]) == 0
    assert toy.run("--output", tmp_path / "named") == 0
    assert contents(toy.out) == contents(tmp_path / "named")
    capsys.readouterr()
    code = predict.main([*model, "--output", str(tmp_path / "b"), "--data", "phantom"])
    assert_refused(capsys, code, "--data phantom", toy.model, "has toy")
    bare = shutil.copy(toy.model, tmp_path / "model")
    code = predict.main([*model, "--output", str(tmp_path / "b"), "--model_state", str(bare)])
    assert_refused(capsys, code, "--data is needed", bare)
    assert not (tmp_path / "b").exists()


def test_several_models_are_averaged_and_described(toy, other, tmp_path, capsys):
    def run(*more, models=(toy.model, other.model), **kwargs):
        return toy.run("--model_state", *models, *more, **kwargs)

    assert run("--probabilities") == 0
    models = tuple(map(load_model, (toy.model, other.model)))
    expected = Predictor(models, (8, 16), preprocessing=KEEP).file(toy.data / "case1.nii.gz", True)
    found = np.asarray(nib.load(toy.out / "case1_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(nib.load(toy.out / "case1.nii.gz").dataobj), expected.labels)

    described = json.loads((toy.out / "model.json").read_text())
    assert [one["model"] for one in described["models"]] == [str(toy.model), str(other.model)]
    for size in ("parameters", "flops", "filters"):
        for when in ("unpruned", "now"):
            assert described[size][when] == sum(one[size][when] for one in described["models"])
    assert read_model_summary(toy.out)["parameters"] == described["parameters"]
    (job,) = json.loads((toy.out / "predictions.json").read_text())["jobs"].values()
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (toy.model, other.model)]
    assert [one["sha256"] for one in job["model"]["models"]] == sums
    assert job["model"]["sha256"] == described["sha256"] not in sums
    assert mixed_jobs(toy.out, ["case1.nii.gz"]) is None

    (toy.out / "case2.nii.gz").unlink()
    assert run("--skip_existing", "--probabilities") == 0
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing"), f"the models were {toy.model} {other.model}", "--overwrite")
    assert_refused(capsys, run(models=(toy.model, toy.model)), "--model_state", "twice")
    (tmp_path / "filters").write_text("enc_ConvBlock_1\n2\n")
    assert_refused(capsys, run("--out_filters", tmp_path / "filters"), "--out_filters", "one model")
    assert_refused(capsys, run("--skip_existing", models=(other.model,)), "the models were")


def test_models_of_an_ensemble_belong_together(toy, tmp_path, capsys):
    config = json.loads((toy.model.parent.parent / "config.json").read_text())
    models = {}
    for name, change in {
        "patch": {"patch_size": [16, 16]},
        "data": {"data": "phantom"},
        "seed": {"seed_data": 1},
    }.items():
        models[name] = tmp_path / name / "models" / "model-1"
        models[name].parent.mkdir(parents=True)
        shutil.copy(toy.model, models[name])
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))

    def refused(name, *words, arguments=()):
        assert_refused(capsys, toy.run("--model_state", toy.model, models[name], *arguments), models[name], *words)
        assert not toy.out.exists()

    refused("patch", "another patch_size")
    refused("data", "another data set")
    refused("seed", "--partition test", "one model")
    both = ["--model_state", toy.model, models["patch"], "--patch_size", 8, 16]
    assert toy.run(*both, "--partition", "train") == 0
    source = ("--input", str(toy.data))
    assert toy.run("--model_state", toy.model, models["seed"], "--output", tmp_path / "b", source=source) == 0


def test_the_step_stands_in_the_record_only_where_it_is_another(toy, capsys):
    assert toy.run("--step_size", 0.5, "--probabilities") == 0
    (job,) = json.loads((toy.out / "predictions.json").read_text())["jobs"].values()
    keys = {"method", "model", "data", "preprocessing", "patch_size", "tta", "amp", "precision"}
    assert set(job) == keys and set(job["model"]) == {"path", "sha256"}
    assert toy.run("--skip_existing") == 0
    capsys.readouterr()
    code = toy.run("--skip_existing", "--step_size", 0.25)
    assert_refused(capsys, code, "--step_size was 0.5", "--overwrite")
    before = predictions(toy.out)
    assert toy.run("--overwrite", "--step_size", 0.25, "--probabilities") == 0
    assert predictions(toy.out) != before
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing"), "--step_size was 0.25")
    for bad in (0, 1.5):
        assert_refused(capsys, toy.run("--step_size", bad), "--step_size", bad)


def test_the_post_processing_of_the_run_is_applied_unless_it_is_unwanted(toy, other, tmp_path, capsys):
    state = torch.load(toy.model)
    state["last.0.0.bias"][1] = 0.2  # hundreds of islands
    torch.save(state, toy.model)
    decided = {
        "model": "model-1",
        "sha256": hashlib.sha256(toy.model.read_bytes()).hexdigest(),
        "steps": ["foreground"],
    }
    noise = np.random.default_rng(0).normal(size=(64, 64, 3))
    nib.save(nib.Nifti1Image(noise, np.eye(4)), toy.data / "case3.nii.gz")
    assert toy.run("--output", tmp_path / "plain") == 0
    (toy.model.parent.parent / "postprocessing.json").write_text(json.dumps(decided))
    assert toy.run() == 0
    for name in ("case1.nii.gz", "case2.nii.gz", "case3.nii.gz"):
        before, after = (np.asarray(nib.load(folder / name).dataobj) for folder in (tmp_path / "plain", toy.out))
        np.testing.assert_array_equal(after, keep_largest(before, "foreground"))
    assert 0 < (after > 0).sum() < (before > 0).sum()
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing", "--no_postprocessing"), "--no_postprocessing was not given")
    code = toy.run("--skip_existing", "--output", tmp_path / "plain")
    assert_refused(capsys, code, "--no_postprocessing was given")
    assert toy.run("--skip_existing", "--no_postprocessing", "--output", tmp_path / "plain") == 0
    assert toy.run("--model_state", toy.model, other.model, "--output", tmp_path / "both") == 0
    assert "different post-processing: none is applied" in capsys.readouterr().out


Own = BaseDataset(
    name="own",
    class_names=("background", "thing"),
    find=lambda root: [],
    preprocessing=Preprocessing(
        (None, None, None), zscore=False, normalizations=(Normalization("zscore"),) * 2, crop=True
    ),
    patch_size=(8, 16),
    channels=("T2", "ADC"),
    values=(0, 7),
    file_ending=".nrrd",
    defaults={"fms_init": 4, "levels": 3},
)
One = replace(
    Own, channels=("T2",), preprocessing=replace(Own.preprocessing, normalizations=(Normalization("zscore"),))
)


def folder_of(folder, *files):
    for name in files:
        write_image(folder / name, oblique())
    return folder


def named(images):
    return {case: [path.name for path in files] for case, files in images.items()}


def test_own_images_are_grouped_by_case(tmp_path):
    folder = folder_of(tmp_path, *(f"{case}_000{i}.nii.gz" for case in ("a", "b_0001") for i in (0, 1)))
    for name in ("._a_0000.nii.gz", ".hidden_0000.nii.gz", "notes.txt"):
        (folder / name).touch()
    own = replace(Own, file_ending=".nii.gz")
    both = {case: [f"{case}_0000.nii.gz", f"{case}_0001.nii.gz"] for case in ("a", "b_0001")}
    assert named(input_images(folder, own)) == both
    assert named(input_images(folder, Own)) == both  # there is none of its own ending
    assert named(input_images(folder / "a_0001.nii.gz", own)) == {"a": both["a"]}
    write_image(folder / "preview.nii", oblique())
    assert named(input_images(folder, own)) == both  # it has another ending


def test_own_images_of_one_channel_need_no_number(tmp_path):
    folder = folder_of(tmp_path, "a.nii.gz", "scan_2021.nii.gz")
    one = replace(One, file_ending=".nii.gz")
    assert named(input_images(folder, one)) == {"a": ["a.nii.gz"], "scan_2021": ["scan_2021.nii.gz"]}
    (tmp_path / "sub").mkdir()
    numbered = folder_of(tmp_path / "sub", "x_0000.nii.gz", "y.nii.gz")
    assert named(input_images(numbered, one)) == {"x": ["x_0000.nii.gz"], "y": ["y.nii.gz"]}
    assert named(input_images(numbered / "x_0000.nii.gz", one)) == {"x": ["x_0000.nii.gz"]}


def test_a_file_may_hold_all_channels(tmp_path):
    for name in ("a_0000.nii.gz", "b.nii.gz"):
        nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(8, 9, 3, 2)), np.eye(4)), tmp_path / name)
    own = replace(Own, file_ending=".nii.gz")
    assert named(input_images(tmp_path, own)) == {"a": ["a_0000.nii.gz"], "b": ["b.nii.gz"]}


def test_all_own_images_with_wrong_channels_are_named_in_one_line(tmp_path):
    files = [
        "a_0000",
        "b_0001",
        "c_0000",
        "c_0001",
        "c_0002",
        "d_0000",
        "d_0007",
        "e_0000",
        "e_0001",
        "e",
        "f_0000",
        "f_0001",
    ]
    folder = folder_of(tmp_path, *(f"{name}.nii.gz" for name in files))
    with pytest.raises(InputError) as error:
        input_images(folder, replace(Own, file_ending=".nii.gz"))
    line = str(error.value)
    assert line.startswith(f"--input {folder}: 5 of 6 images") and "\n" not in line
    for words in ("a has no 0001", "b has no 0000", "c has 0002", "d has no 0001 but has 0007", "e: e.nii.gz, e_0000"):
        assert words in line
    assert "_0000 (T2), _0001 (ADC)" in line and "f has" not in line


def test_images_of_a_known_data_set_are_named_as_ever(tmp_path):
    folder = folder_of(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz")
    (folder / "photo.png").touch()
    assert list(input_images(folder, DATASETS["phantom"])) == ["a_0000", "a_0001"]


def test_own_predictions_have_the_values_and_the_ending_of_the_data_set(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "own", Own)
    (toy.data / "images").mkdir()
    folder = folder_of(toy.data / "images", "a_0000.nii.gz")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(12, 9, 4)), oblique()), folder / "a_0001.nii.gz")
    torch.manual_seed(0)
    model = nnUNet(2, 2, 4, 3)
    model.initialize()
    torch.save(model.state_dict(), tmp_path / "model")
    argv = ["--data", "own", "--model_state", tmp_path / "model", "--input", folder, "--probabilities"]
    assert toy.run(*argv, source=()) == 0
    assert names(toy.out) == ["a.nrrd", "a_probabilities.nii.gz", *RECORDS]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(toy.out / "a.nrrd")).T
    probabilities = np.asarray(nib.load(toy.out / "a_probabilities.nii.gz").dataobj)
    np.testing.assert_array_equal(labels, 7 * probabilities.argmax(-1))
    assert set(np.unique(labels)) == {0, 7}
    (job,) = json.loads((toy.out / "predictions.json").read_text())["jobs"].values()
    assert job["values"] == [0, 7]
    assert toy.run(*argv, "--skip_existing", source=()) == 0
    (folder / "a_0001.nii.gz").unlink()
    capsys.readouterr()
    assert_refused(capsys, toy.run(*argv, "--overwrite", source=()), "a has no 0001", "_0001 (ADC)")


def test_the_fold_of_the_run_divides_own_data(tmp_path):
    asked = []

    class Folds:
        name, preprocessing = "own", One.preprocessing

        @staticmethod
        def partitions(folder, **how):
            asked.append(how)
            return {
                part: [SimpleNamespace(id="a", images=(tmp_path / "a",))] for part in ("train", "validation", "test")
            }

    def run(fold):
        return SimpleNamespace(split="0.9:0.1", seed_data=42, fold=fold)

    def images(partition, *runs):
        return partition_images(Folds, None, partition, {tmp_path / f"model-{i}": one for i, one in enumerate(runs)})

    assert list(images("validation", run("3"))) == ["a"]
    assert list(images("test", run("1"), run("2"))) == ["a"]
    assert list(images("test", None)) == ["a"]
    same = {"split": "0.9:0.1", "seed_data": 42}
    assert asked == [same | {"fold": "3"}, same | {"fold": "1"}, same | {"fold": "all"}]
    with pytest.raises(InputError, match="--partition validation: that of the run of .*model-1 is not that of"):
        images("validation", run("1"), run("2"))


def test_the_bar_moves_within_an_image(toy, monkeypatch, capsys):
    shares, predict_file = [], Predictor.file

    def file(self, path, probabilities, advance):
        return predict_file(self, path, probabilities, lambda share: (shares.append(share), advance(share)))

    monkeypatch.setattr(Predictor, "file", file)
    assert toy.run() == 0
    assert len(shares) > 3 * 4 and sum(shares) == pytest.approx(3)
    assert "3.0/3 " in capsys.readouterr().err

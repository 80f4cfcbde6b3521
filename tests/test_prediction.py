"""predict.py: what is predicted, under which names, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from niftis import assert_same_grid, oblique, oriented, write_image

import predict
from lib.data import DATASETS
from lib.data.preprocessing import Preprocessing
from lib.inference import predict_file
from lib.models import load_model
from lib.models.nnUNet import nnUNet

RECORDS = ["model.json", "predictions.json"]
KEEP = Preprocessing(spacing_mm=(None, None, None))


class Toy:
    """A data set of three images, with what predict.py needs of one."""

    name, n_classes, modalities, dim, challenge_name = "toy", 2, 1, "2D", "toy-{case:03d}"
    patch_size, preprocessing = (16, 16), KEEP
    defaults = DATASETS["acdc"].defaults | {"fms_init": 4, "levels": 3}

    def __init__(self, data_path=None, split="0.9:0.1", seed_data=42):
        self.folder, self.split, self.seed_data = Path(data_path), split, seed_data

    @staticmethod
    def find(root):
        flat = [SimpleNamespace(id=path.name.split(".")[0], image=path) for path in sorted(root.glob("case*.nii*"))]
        nested = [SimpleNamespace(id=path.parent.name, image=path) for path in sorted(root.glob("case*/image.nii"))]
        return flat or nested

    def files(self, partition):
        found = self.find(self.folder)
        return {"test": found, "train": found[: self.seed_data], "validation": []}[partition]


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
    _, expected = predict_file(load_model(toy.model), toy.data / "case1.nii.gz", KEEP, (8, 16), probabilities=True)
    written = nib.load(toy.out / "case1_probabilities.nii.gz")
    np.testing.assert_allclose(np.asarray(written.dataobj), np.asarray(expected.dataobj), atol=1e-6)

    content = json.loads((toy.out / "model.json").read_text())
    assert content["model"] == str(toy.model) and content["data"] == "toy"
    # 2 of 4 filters gone: 2 x (9 + 1) weights of their own, 2 x 9 x 4 inputs of the next block
    assert content["parameters"]["unpruned"] - content["parameters"]["now"] == 2 * 10 + 2 * 9 * 4
    # per pixel and filter 2 FLOPs x 9 weights here, and x 4 filters in the next block
    assert content["flops"]["unpruned"] - content["flops"]["now"] == 8 * 16 * 2 * 2 * (9 + 9 * 4)
    assert content["filters"]["unpruned"] - content["filters"]["now"] == 2


def test_an_interrupted_prediction_is_finished(toy, capsys):
    assert toy.run() == 0
    whole = {name: (toy.out / name).read_bytes() for name in names(toy.out)}
    (toy.out / "case2.nii.gz").unlink()
    (toy.out / "case1.nii.gz").write_bytes(b"kept")
    assert toy.run("--skip_existing") == 0
    assert {n: (toy.out / n).read_bytes() for n in names(toy.out)} == whole | {"case1.nii.gz": b"kept"}
    capsys.readouterr()
    assert_refused(capsys, toy.run(), toy.out / "case1.nii.gz", "--skip_existing", "--overwrite")
    assert toy.run("--overwrite") == 0
    assert {n: (toy.out / n).read_bytes() for n in names(toy.out)} == whole


def test_predictions_of_another_model_are_not_continued(toy, capsys):
    assert toy.run() == 0
    other = toy.model.with_name("model-2")
    other.write_bytes(toy.model.read_bytes())
    capsys.readouterr()
    assert_refused(capsys, toy.run("--skip_existing", "--model_state", other), "model-1")


def test_input_takes_a_file_or_a_folder(toy, capsys):
    assert toy.run(source=("--input", str(toy.data / "case2.nii"))) == 0
    assert names(toy.out) == ["case2.nii.gz", *RECORDS]
    (toy.data / "notes.txt").touch()
    (toy.data / "._case1.nii.gz").touch()  # what macOS leaves behind
    assert toy.run("--skip_existing", "--no_tta", "--batch_size", 1, source=("--input", str(toy.data))) == 0
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

"""Exported models in use: by predict.py, by Predictor, and where neither torch nor torchio is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import exported
import nibabel as nib
import numpy as np
import pytest
from niftis import assert_same_grid
from test_dicom import write_series

import predict
from lib.data import DATASETS
from lib.data.BaseDataset import Preprocessing
from lib.inference import Predictor
from lib.onnx_file import read_onnx_file
from lib.runtimes import RUNTIMES
from lib.system.error import InputError
from lib.torch_network import TorchNetwork

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("numpy", "SimpleITK", "nibabel", "openvino", "tqdm", "isal")  # as the README has it
LPS = {"spacing_mm": [2.0, 1.5, None], "orientation": "LPS", "zscore": True}


def write_image(path, seed=0, shape=(30, 41, 5)):
    affine = np.array([[-1.4, 0, 0.2, 20], [0, -1.6, 0.1, -30], [0.2, 0.1, 6.0, 5], [0, 0, 0, 1]])
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * [1.4, 1.6, 6.0]
    array = np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def toy(tmp_path):
    """A folder with model.onnx, its network in torch, and two images."""

    class Toy:
        path, images, out = tmp_path / "mödel 1.onnx", tmp_path / "my images", tmp_path / "out"
        model = exported.write_exported(tmp_path / "mödel 1.onnx", "2D", preprocessing=LPS, postprocessing=None)

        def run(self, *argv, source=None, model=None):
            given = ["--model_state", model or self.path, "--input", source or self.images, "--output", self.out]
            return predict.main([*map(str, [*given, *argv])])

    Toy.images.mkdir()
    for i in (1, 2):
        write_image(Toy.images / f"case {i}.nii.gz", i)
    return Toy()


def test_a_file_of_before_gets_the_labels_it_was_made_with(tmp_path):
    """Zeros that were padded counted in its z-score; a file of now says that they do not."""
    image, before = write_image(tmp_path / "a.nii.gz"), LPS | {"min_size": [40, 48, 8]}
    found = {}
    for name, preprocessing in (("before", before), ("now", before | {"padding_counts": False})):
        path = tmp_path / f"{name}.onnx"
        model = exported.write_exported(path, "2D", preprocessing=preprocessing, postprocessing=None)
        recipe = Preprocessing.of_dict(before | {"padding_counts": name == "before"})
        expected = Predictor(TorchNetwork(model), exported.PATCHES["2D"], preprocessing=recipe).file(image, True)
        found[name] = Predictor(path).file(image, True)
        np.testing.assert_allclose(found[name].probabilities, expected.probabilities, atol=1e-4)
    assert not np.allclose(found["before"].probabilities, found["now"].probabilities, atol=1e-3)


def test_the_networks_that_ship_pad_nothing_before_a_zscore():
    """So what they were trained on is what they see."""
    for path in sorted((ROOT / "lib" / "pretrained").glob("*.onnx")):
        preprocessing = read_onnx_file(path).dataset.preprocessing
        assert preprocessing.min_size is None and not preprocessing.padding_counts


def refused(capsys, code, *words):
    error = capsys.readouterr().err
    line = error.splitlines()[-1]
    assert code == 2 and error.count("error: ") == 1 and all(str(word) in line for word in words), error


@pytest.mark.parametrize("runtime", ["auto", *RUNTIMES])
def test_predict_needs_the_file_alone_and_gives_torchs_labels(toy, runtime):
    assert toy.run("--runtime", runtime, "--probabilities") == 0
    file = read_onnx_file(toy.path)
    how = {"preprocessing": file.dataset.preprocessing}
    by_torch = Predictor(TorchNetwork(toy.model), file.patch_size, **how)
    for i in (1, 2):
        image, output = toy.images / f"case {i}.nii.gz", toy.out / f"case {i}.nii.gz"
        expected = by_torch.file(image, probabilities=True)
        labels = np.asarray(nib.load(output).dataobj)
        assert_same_grid(output, image)
        values = 2 * expected.labels  # which the file says
        assert (labels == values).mean() > 0.9999 and len(np.unique(labels)) > 1
        maps = np.asarray(nib.load(toy.out / f"case {i}_probabilities.nii.gz").dataobj)
        np.testing.assert_allclose(maps, expected.probabilities, atol=1e-4)
    said = json.loads((toy.out / "model.json").read_text())
    assert said["model"] == str(toy.path.resolve()) and said["flops"]["now"] > 0 and said["flops"]["unpruned"] is None
    (job,) = json.loads((toy.out / "predictions.json").read_text())["jobs"].values()
    assert job["runtime"] == ("openvino" if runtime == "auto" else runtime) and job["precision"] == "float32"


def test_three_lines_of_python_give_the_labels_of_predict(toy):
    assert toy.run() == 0
    labels = Predictor(str(toy.path)).file(toy.images / "case 1.nii.gz").labels
    np.testing.assert_array_equal(2 * labels, np.asarray(nib.load(toy.out / "case 1.nii.gz").dataobj))
    loaded = Predictor.load(toy.path, runtime="onnxruntime", mirror=False)
    assert loaded.models[0].runtime == "onnxruntime" and not loaded.mirror and loaded.patch_size == (16, 24)


def test_post_processing_is_that_of_the_file(toy, tmp_path):
    seed, path = 10, tmp_path / "post.onnx"  # of a network that marks many small places
    exported.write_exported(toy.path, "2D", seed, preprocessing=LPS, postprocessing=None)
    assert toy.run() == 0
    steps = {"steps": ["foreground"], "reasons": []}
    exported.write_exported(path, "2D", seed, preprocessing=LPS, postprocessing=steps)
    before = np.asarray(nib.load(toy.out / "case 1.nii.gz").dataobj)
    toy.out = tmp_path / "post"
    assert toy.run(model=path) == 0
    after = np.asarray(nib.load(toy.out / "case 1.nii.gz").dataobj)
    assert 0 < np.count_nonzero(after) < np.count_nonzero(before)
    np.testing.assert_array_equal(2 * Predictor(path).file(toy.images / "case 1.nii.gz").labels, after)
    toy.out = tmp_path / "without"
    assert toy.run("--no_postprocessing", model=path) == 0
    np.testing.assert_array_equal(np.asarray(nib.load(toy.out / "case 1.nii.gz").dataobj), before)


def test_several_models_are_averaged_and_must_agree(toy, tmp_path, capsys):
    other = tmp_path / "other.onnx"
    model = exported.write_exported(other, "2D", 1, preprocessing=LPS, postprocessing=None)
    given = ["--model_state", toy.path, other, "--input", toy.images, "--output", toy.out, "--probabilities"]
    assert predict.main([*map(str, given)]) == 0
    capsys.readouterr()
    file = read_onnx_file(other)
    both = Predictor((toy.model.eval(), model.eval()), file.patch_size, preprocessing=file.dataset.preprocessing)
    expected = both.file(toy.images / "case 1.nii.gz", probabilities=True).probabilities
    found = np.asarray(nib.load(toy.out / "case 1_probabilities.nii.gz").dataobj)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert len(json.loads((toy.out / "model.json").read_text())["models"]) == 2

    exported.write_exported(other, "2D", 1, preprocessing=LPS | {"orientation": "RAS"}, postprocessing=None)
    refused(capsys, predict.main([*map(str, given)]), other, "has another preprocessing than", toy.path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "acdc"], ["--data: has no meaning with an exported model"]),
        (["--in_filters", "x"], ["--in_filters: has no meaning"]),
        (["--amp"], ["--amp: has no meaning"]),
        (["--compile"], ["--compile: has no meaning"]),
        (["--runtime", "torch"], ["'torch' is unknown", "openvino"]),
        (["--patch_size", "15", "24"], ["--patch_size 15 24: this model needs 2 numbers, each a multiple of 4"]),
        (["--device", "mps"], ["--device mps"]),
    ],
)
def test_flags_that_have_no_meaning_are_refused(toy, capsys, argv, words):
    refused(capsys, toy.run(*argv), *words)
    assert not toy.out.exists()


def test_an_input_is_needed_and_models_of_torch_have_no_runtime(toy, tmp_path, capsys):
    argv = ["--model_state", str(toy.path), "--output", str(toy.out)]
    refused(capsys, predict.main(argv), toy.path, "give --input")
    refused(capsys, predict.main([*argv, "--partition", "train", "--input", str(toy.images)]), "--partition")
    (tmp_path / "model-1").write_bytes(b"")
    argv = ["--model_state", str(tmp_path / "model-1"), "--output", str(toy.out), "--input", str(toy.images)]
    refused(capsys, predict.main([*argv, "--runtime", "openvino"]), "--runtime openvino: runs exported models")
    refused(capsys, predict.main([*argv[:2], str(toy.path), *argv[2:]]), toy.path, "cannot be averaged")


def test_what_another_runtime_began_is_not_finished(toy, capsys):
    assert toy.run("--runtime", "openvino") == 0
    capsys.readouterr()
    (toy.out / "case 2.nii.gz").unlink()
    refused(capsys, toy.run("--runtime", "onnxruntime", "--skip_existing"), "runtime")
    assert toy.run("--runtime", "openvino", "--skip_existing") == 0
    assert (toy.out / "case 2.nii.gz").exists()


def test_a_broken_file_is_one_line_and_leaves_nothing(toy, tmp_path, capsys):
    data = toy.path.read_bytes()
    for name, content in (("cut.onnx", data[:5000]), ("empty.onnx", b""), ("text.onnx", b"hello" * 100)):
        (tmp_path / name).write_bytes(content)
        refused(capsys, toy.run(model=tmp_path / name), name, "python -m lib.export")
    refused(capsys, toy.run(model=tmp_path / "gone.onnx"), "gone.onnx", "no such file")
    assert not toy.out.exists()
    with pytest.raises(InputError, match="text.onnx"):
        Predictor(tmp_path / "text.onnx")


def test_dicom_series_are_predicted_on_their_own_grid(toy, tmp_path, capsys):
    rng = np.random.default_rng(0)
    study = tmp_path / "Größe 3" / "study"
    for name, uid in (("T1", "1.2.1"), ("T2", "1.2.2")):
        write_series(tmp_path / "x" / name, rng.integers(0, 900, (30, 41, 5)).astype(np.int16), "oblique", uid=uid)
    study.parent.mkdir()
    shutil.move(tmp_path / "x", study)
    assert toy.run(source=study) == 0
    assert sorted(path.name for path in toy.out.glob("*.nii.gz")) == ["T1.nii.gz", "T2.nii.gz"]
    labels = nib.load(toy.out / "T1.nii.gz")
    assert labels.shape == (30, 41, 5) and int(labels.header["sform_code"]) == 1
    np.testing.assert_allclose(np.linalg.norm(labels.affine[:3, :3], axis=0), (0.8, 1.1, 2.5), atol=1e-4)
    assert toy.run("--skip_existing", source=study) == 0
    capsys.readouterr()

    next((study / "T2").iterdir()).write_bytes(bytes(128) + b"DICM" + b"x" * 100)
    toy.out = tmp_path / "other"
    refused(capsys, toy.run(source=study), "missing")
    one = next((study / "T1").iterdir())
    refused(capsys, toy.run(source=one), one, "is one slice of DICOM; give the folder of the series")
    assert not toy.out.exists()


def test_a_folder_in_the_layout_of_a_known_data_set_is_understood(toy, tmp_path):
    patient = tmp_path / "patient101"
    patient.mkdir()
    names = ("patient101_frame01", "patient101_frame01_gt", "patient101_4d")
    for name in names:
        write_image(patient / f"{name}.nii.gz")
    classes = ("background", "RV cavity", "myocardium", "LV cavity")
    said = {
        "data": {"name": "acdc", "licence": ""},
        "channels": ["image"],
        "labels": [{"name": name, "value": i} for i, name in enumerate(classes)],
    }
    exported.write_exported(toy.path, "2D", preprocessing=LPS, postprocessing=None, **said)
    assert toy.run(source=patient) == 0
    assert [path.name for path in toy.out.glob("*.nii.gz")] == ["patient101_frame01.nii.gz"]


def test_the_model_that_comes_with_the_program_segments_phantoms(tmp_path):
    """Of a case that it was not trained on."""
    file = read_onnx_file(ROOT / "lib" / "pretrained" / "phantom.onnx")
    assert file.metadata["validation"]["after"]["mean_foreground_dice"] > 0.95 and len(file.data) < 2**20
    assert file.metadata["flops"]["after"] <= 0.25 * file.metadata["flops"]["before"]
    partitions = DATASETS["phantom"].partitions(tmp_path / "data", "0.9:0.1", 42)
    case = partitions["test"][0]
    argv = ["--model_state", file.path, "--input", case.image, "--output", tmp_path / "out"]
    assert predict.main([*map(str, argv)]) == 0
    labels = np.asarray(nib.load(tmp_path / "out" / case.image.name).dataobj)
    truth = np.asarray(nib.load(case.label).dataobj)
    for k in (1, 2, 3):
        ours, true = labels == k, truth == k
        assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.9


HIPPOCAMPUS = ROOT.parent / "shared" / "Task04_Hippocampus"


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampi (../shared/Task04_Hippocampus) are not here")
def test_the_model_that_comes_with_the_program_segments_hippocampi(tmp_path):
    """Of two cases of its validation set."""
    file = read_onnx_file(ROOT / "lib" / "pretrained" / "hippocampus.onnx")
    said = file.metadata
    assert len(file.data) <= 5e6 and said["flops"]["after"] <= 0.2 * said["flops"]["before"]
    assert said["data"] == {"name": "Task04_Hippocampus", "licence": "CC-BY-SA 4.0"}
    predictor = Predictor(file.path)
    for case in ("hippocampus_006", "hippocampus_008"):
        labels = predictor.file(HIPPOCAMPUS / "imagesTr" / f"{case}.nii.gz").labels
        truth = np.asarray(nib.load(HIPPOCAMPUS / "labelsTr" / f"{case}.nii.gz").dataobj)
        for k in (1, 2):
            ours, true = labels == k, truth == k
            assert 2 * (ours & true).sum() / (ours.sum() + true.sum()) > 0.8


BLOCKED = """
import sys
for name in ("torch", "torchio", "scipy", "filelock", "PIL", "onnx", "onnxruntime", "medpy", "matplotlib"):
    sys.modules[name] = None
import predict
from lib.data import DATASETS
from lib.data.BaseDataset import Preprocessing
sys.exit(predict.main(sys.argv[1:]))
"""


def test_a_prediction_imports_no_torch(toy):
    """Though it is installed; own data, too, which are cropped, resampled with splines, and post-processed."""
    own = {
        "spacing_mm": [2.0, 1.2, 1.5],
        "orientation": "SPL",
        "normalizations": [{"scheme": "zscore", "masked": True}] * 2,
        "crop": True,
    }
    steps = {"steps": ["foreground", 1], "reasons": []}
    exported.write_exported(toy.path, "3D", preprocessing=own, postprocessing=steps)
    for i in (1, 2):
        (toy.images / f"case {i}.nii.gz").unlink()
    for channel in (0, 1):
        write_image(toy.images / f"case_000{channel}.nii.gz", channel, (14, 20, 18))
    argv = ["--model_state", toy.path, "--input", toy.images, "--output", toy.out]
    ran = subprocess.run([sys.executable, "-c", BLOCKED, *map(str, argv)], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    assert_same_grid(toy.out / "case.nii.gz", toy.images / "case_0000.nii.gz")


def pins():
    """What requirements.txt says of the packages that a prediction needs."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    found = {re.split("==", line)[0]: line for line in lines if "==" in line}
    return [found[name] for name in NEEDED]


def test_a_pc_without_torch_predicts(toy, tmp_path):
    """In an environment with what the README names, and nothing else."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins()]
    installed = subprocess.run([*map(str, install)], capture_output=True, text=True)
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"the packages cannot be installed here: {installed.stderr.strip().splitlines()[-1][:200]}")
    assert installed.returncode == 0, installed.stderr
    listed = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, text=True).stdout.lower()
    assert "openvino" in listed and "torch" not in listed and "scipy" not in listed
    argv = ["predict.py", "--model_state", toy.path, "--input", toy.images, "--output", toy.out]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run([str(python), *map(str, argv)], cwd=ROOT, capture_output=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    there = {path.name: path.read_bytes() for path in toy.out.glob("case*")}
    assert toy.run("--overwrite") == 0
    assert there == {path.name: path.read_bytes() for path in toy.out.glob("case*")} and len(there) == 2

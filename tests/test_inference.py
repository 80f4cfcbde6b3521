"""Sliding windows, mirroring, the original grid, and predict.py around them."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from torch import nn

import predict
from lib.data import DATASETS
from lib.data.preprocessing import Preprocessing
from lib.inference import axis_windows, predict_file, predict_volume, save
from lib.models import load_model
from lib.models.nnUNet import nnUNet

PATCHES = {"2D": (8, 12), "3D": (4, 8, 6)}
KEEP = Preprocessing(spacing_mm=(None, None, None), clip=None, shift=None, scale=None, min_size=None, zscore=True)
RESAMPLE = Preprocessing(spacing_mm=(1.25, 1.25, None), clip=None, shift=None, scale=None, min_size=None, zscore=True)


class Pointwise(nn.Module):
    """Looks at single voxels: windows and mirrorings must not change a thing. Class 1 where the value is above 0."""

    n_classes = 2

    def forward(self, x):
        return [torch.cat([-x, x], dim=1).softmax(1)]


class Neighbours(nn.Module):
    """Looks at 5 voxels along each axis, none alike: borders, windows and mirrorings all show."""

    n_classes = 3

    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(0)
        conv = nn.Conv2d if dim == "2D" else nn.Conv3d
        self.conv = conv(2, 3, 5, padding=2)

    def forward(self, x):
        return [self.conv(x).softmax(1), "a coarser head, not used"]


@given(size=st.integers(1, 200), patch=st.integers(1, 64))
def test_windows_cover_every_voxel_and_their_weights_sum_to_one(size, patch):
    size = max(size, patch)
    windows = axis_windows(size, patch)
    total = np.zeros(size)
    for side, weights in windows:
        total[side] += weights.numpy()
    starts = [side.start for side, _ in windows]
    assert starts[0] == 0 and starts[-1] == size - patch
    assert all(0 < b - a <= max(patch // 2, 1) for a, b in itertools.pairwise(starts))
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_windows_in_numbers():
    (first, left), (second, right) = axis_windows(6, 4)
    assert (first, second) == (slice(0, 4), slice(2, 6))
    # sigma 0.5, offsets 0.5 and 1.5: exp(-1/2) / (exp(-1/2) + exp(-9/2)) = 1 / (1 + exp(-4))
    np.testing.assert_allclose(left, [1, 1, 0.98201379, 0.01798621], rtol=1e-6)
    np.testing.assert_allclose(right, [0.01798621, 0.98201379, 1, 1], rtol=1e-6)
    assert [side.start for side, _ in axis_windows(9, 4)] == [0, 2, 3, 5]
    assert axis_windows(4, 4)[0][1].tolist() == [1, 1, 1, 1]


SIZES = st.tuples(st.integers(1, 27), st.integers(1, 27), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(size=SIZES, dim=st.sampled_from(["2D", "3D"]), tta=st.booleans(), batch_size=st.integers(1, 20))
def test_any_size_equals_the_direct_computation(size, dim, tta, batch_size):
    volume = torch.randn(1, *size)
    result = predict_volume(Pointwise(), volume, PATCHES[dim], tta, batch_size)
    assert result.dtype == torch.float32 and result.device.type == "cpu"
    torch.testing.assert_close(result, torch.cat([-volume, volume]).softmax(0), atol=1e-6, rtol=0)


def slow_prediction(model, volume, patch, mirrorings):
    """The definition, word by word, for one item (C, *spatial): weighted sum over windows, divided by the weights."""
    size = volume.shape[1:]
    padded = np.zeros((len(volume), *(max(n, p) for n, p in zip(size, patch, strict=True))), np.float32)
    before = [(max(p - n, 0) + 1) // 2 for n, p in zip(size, patch, strict=True)]
    inner = tuple(slice(b, b + n) for b, n in zip(before, size, strict=True))
    padded[(slice(None), *inner)] = volume
    grids = np.meshgrid(*(np.arange(p) - (p - 1) / 2 for p in patch), indexing="ij")
    gaussian = np.exp(-0.5 * sum((g / (p / 8)) ** 2 for g, p in zip(grids, patch, strict=True)))
    total, weights = np.zeros((model.n_classes, *padded.shape[1:])), np.zeros(padded.shape[1:])
    sides = [[side for side, _ in axis_windows(n, p)] for n, p in zip(padded.shape[1:], patch, strict=True)]
    for box in itertools.product(*sides):
        window = torch.from_numpy(padded[(slice(None), *box)][None])
        for axes in mirrorings:
            output = model(window.flip(axes))[0].flip(axes)[0]
            total[(slice(None), *box)] += gaussian * output.numpy() / len(mirrorings)
        weights[box] += gaussian
    return (total / weights)[(slice(None), *inner)]


FLIPS_2D = [(), (2,), (3,), (2, 3)]
FLIPS_3D = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]


@pytest.mark.parametrize("tta", [True, False])
@pytest.mark.parametrize("size", [(8, 12, 1), (5, 31, 2), (19, 7, 3)])  # one window; smaller and larger than the patch
@torch.no_grad()
def test_2d_is_the_weighted_mean_over_windows_and_four_mirrorings(size, tta):
    model, volume = Neighbours("2D"), torch.randn(2, *size)
    result = predict_volume(model, volume, PATCHES["2D"], tta, batch_size=3)
    for z in range(size[2]):
        expected = slow_prediction(model, volume[..., z], PATCHES["2D"], FLIPS_2D if tta else [()])
        np.testing.assert_allclose(result[..., z], expected, atol=1e-6)


@pytest.mark.parametrize("tta", [True, False])
@pytest.mark.parametrize("size", [(4, 8, 6), (3, 17, 5), (9, 6, 13)])
@torch.no_grad()
def test_3d_is_the_weighted_mean_over_windows_and_eight_mirrorings(size, tta):
    model, volume = Neighbours("3D"), torch.randn(2, *size)
    result = predict_volume(model, volume, PATCHES["3D"], tta, batch_size=12)
    expected = slow_prediction(model, volume, PATCHES["3D"], FLIPS_3D if tta else [()])
    np.testing.assert_allclose(result, expected, atol=1e-6)


def oriented(codes):
    """An affine of the orientation, spacing 1.5625 x 1.5625 x 10 mm along the array's axes."""
    base = nib.affines.from_matvec(np.diag([1.5625, 1.5625, 10]), [-40, 22.5, 7])
    to_codes = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    affine = base @ inv_ornt_aff(to_codes, (12, 9, 4))
    return affine[:, :] @ np.diag([*(np.array([1.5625, 1.5625, 10]) / nib.affines.voxel_sizes(affine)), 1])


def oblique():
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
    return nib.affines.from_matvec(turn @ np.diag([-1.5625, 1.5625, 10]), [11, -3, 50])


def write_image(path, affine, dtype=np.int16, shape=(12, 9, 4), image_class=nib.Nifti1Image):
    """Two halves of a box, 100 and 900, with a little noise; odd codes and units."""
    data = np.random.default_rng(3).integers(95, 105, shape)
    data[shape[0] // 2 :] += 800
    image = image_class(data.astype(dtype), affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 900
    image.set_sform(affine, code="mni")
    image.set_qform(affine, code="scanner")
    nib.save(image, path)
    return data > 500


def assert_same_grid(path, original_path, shape=None):
    image, original = nib.load(path), nib.load(original_path)
    assert image.shape == (shape or original.shape)
    np.testing.assert_array_equal(image.affine, original.affine)
    for form in ("get_qform", "get_sform"):
        for a, b in zip(getattr(image, form)(coded=True), getattr(original, form)(coded=True), strict=True):
            np.testing.assert_array_equal(a, b)
    assert image.header.get_zooms()[:3] == original.header.get_zooms()[:3]
    assert image.header.get_xyzt_units() == original.header.get_xyzt_units()
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(original.affine)
    assert image.dataobj.slope == 1 and image.dataobj.inter == 0 and image.header["cal_max"] == 0


AFFINES = {codes: oriented(codes) for codes in ("RAS", "LPS", "PIL", "SRA")} | {"oblique": oblique()}


@pytest.mark.parametrize("preprocessing", [KEEP, RESAMPLE], ids=["keep", "resample"])
@pytest.mark.parametrize("name", AFFINES)
def test_the_prediction_lies_on_the_very_grid_of_the_original(tmp_path, name, preprocessing):
    path, output = tmp_path / "image.nii.gz", tmp_path / "out.nii.gz"
    truth = write_image(path, AFFINES[name])
    prediction = predict_file(Pointwise(), path, preprocessing, (8, 8))
    save(prediction.labels, output)
    assert_same_grid(output, path)
    labels = nib.load(output)
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(labels.dataobj), truth)
    save(prediction.probabilities, output)
    assert_same_grid(output, path, (12, 9, 4, 2))
    probabilities = np.asarray(nib.load(output).dataobj)
    assert probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities.argmax(-1), truth)


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_shapes_scaling_and_disagreeing_forms_are_kept(tmp_path, image_class):
    path, output = tmp_path / "image.nii", tmp_path / "out.nii.gz"
    write_image(tmp_path / "first.nii", oblique(), shape=(12, 9, 4, 1), image_class=image_class)
    image = nib.load(tmp_path / "first.nii")
    truth = np.asarray(image.dataobj) > 500
    image.set_sform(None, code=0)  # only the qform counts
    image.header.set_slope_inter(2, -50)
    nib.save(image, path)
    save(predict_file(Pointwise(), path, KEEP, (8, 8, 4)).labels, output)
    assert_same_grid(output, path)
    np.testing.assert_array_equal(np.asarray(nib.load(output).dataobj), truth)


def test_the_same_prediction_gives_the_same_bytes_and_no_other_file(tmp_path):
    write_image(tmp_path / "image.nii", oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        save(predict_file(Pointwise(), tmp_path / "image.nii", KEEP, (8, 8)).labels, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "image.nii"]


# predict.py


class Toy:
    """A data set of three images, with what predict.py needs of one."""

    name, class_names, n_classes, modalities, dim = "toy", ("background", "bright"), 2, 1, "2D"
    patch_size, preprocessing = (16, 16), KEEP
    defaults = DATASETS["acdc"].defaults | {"fms_init": 4, "levels": 3}

    def __init__(self, data_path=None, split="0.9:0.1", seed_data=42):
        self.folder, self.split, self.seed_data = Path(data_path), split, seed_data

    def files(self, partition):
        found = sorted(self.folder.glob("case*.nii*"))
        chosen = {"test": found, "train": found[: self.seed_data], "validation": []}[partition]
        return [SimpleNamespace(id=path.name.split(".")[0], image=path, label=None) for path in chosen]


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
    assert names(toy.out) == sorted([f"case{i}{suffix}" for i in (1, 2, 3) for suffix in suffixes] + ["model.json"])
    for name in names(toy.data):
        output = toy.out / f"{name.split('.')[0]}.nii.gz"
        assert_same_grid(output, toy.data / name)
        probabilities = np.asarray(nib.load(toy.out / f"{name.split('.')[0]}_probabilities.nii.gz").dataobj)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(probabilities.argmax(-1), np.asarray(nib.load(output).dataobj))
    # the run's own patch, not the data set's
    expected = predict_file(load_model(toy.model), toy.data / "case1.nii.gz", KEEP, (8, 16)).probabilities
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
    assert names(toy.out) == ["case2.nii.gz", "model.json"]
    (toy.data / "notes.txt").touch()
    (toy.data / "._case1.nii.gz").touch()  # what macOS leaves behind
    assert toy.run("--skip_existing", "--no_tta", "--batch_size", 1, source=("--input", str(toy.data))) == 0
    assert names(toy.out) == ["case1.nii.gz", "case2.nii.gz", "case3.nii.gz", "model.json"]
    capsys.readouterr()
    kept = (toy.data / "case1.nii.gz").read_bytes()
    code = toy.run("--overwrite", "--output", toy.data, source=("--input", str(toy.data)))
    assert_refused(capsys, code, "case1.nii.gz", "--output")
    assert (toy.data / "case1.nii.gz").read_bytes() == kept


def test_the_partition_is_that_of_the_run(toy):
    assert toy.run("--partition", "train") == 0  # seed_data 2 of config.json: the toy's first two
    assert names(toy.out) == ["case1.nii.gz", "case2.nii.gz", "model.json"]


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

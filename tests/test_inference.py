"""Sliding windows, mirroring and the original grid."""

import itertools
import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import assert_same_grid, oblique, oriented, write_image
from torch import nn

from lib.checkpoint import save_model
from lib.data.preprocessing import Preprocessing
from lib.inference import Predictor, axis_windows, save
from lib.models import Sauron, nnUNet
from lib.settings import Settings
from lib.system.error import InputError

PATCHES = {"2D": (8, 12), "3D": (4, 8, 6)}
KEEP = Preprocessing(spacing_mm=(None, None, None), clip=None, shift=None, scale=None, min_size=None, zscore=True)
RESAMPLE = Preprocessing(spacing_mm=(1.25, 1.25, None), clip=None, shift=None, scale=None, min_size=None, zscore=True)
# like KiTS: clipped and scaled, thin volumes padded; the 0 of the padding is the middle between the two halves
PAD = Preprocessing(spacing_mm=(1.3, 1.3, 7), clip=(0, 2000), shift=500, scale=77, min_size=(16, 10, 12), zscore=False)


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
    result = Predictor(Pointwise(), PATCHES[dim], tta, batch_size).volume(volume)
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
    result = Predictor(model, PATCHES["2D"], tta, batch_size=3).volume(volume)
    for z in range(size[2]):
        expected = slow_prediction(model, volume[..., z], PATCHES["2D"], FLIPS_2D if tta else [()])
        np.testing.assert_allclose(result[..., z], expected, atol=1e-6)


@pytest.mark.parametrize("tta", [True, False])
@pytest.mark.parametrize("size", [(4, 8, 6), (3, 17, 5), (9, 6, 13)])
@torch.no_grad()
def test_3d_is_the_weighted_mean_over_windows_and_eight_mirrorings(size, tta):
    model, volume = Neighbours("3D"), torch.randn(2, *size)
    result = Predictor(model, PATCHES["3D"], tta, batch_size=12).volume(volume)
    expected = slow_prediction(model, volume, PATCHES["3D"], FLIPS_3D if tta else [()])
    np.testing.assert_allclose(result, expected, atol=1e-6)


AFFINES = {codes: oriented(codes) for codes in ("RAS", "LPS", "PIL", "SRA")} | {"oblique": oblique()}


@pytest.mark.parametrize(
    ("preprocessing", "patch_size"),
    [(KEEP, (8, 8)), (RESAMPLE, (8, 8)), (PAD, (16, 8, 12))],
    ids=["keep", "resample", "3D"],
)
@pytest.mark.parametrize("shape", [(12, 9, 4), (1, 12, 9), (21, 11, 1), (12, 9, 4, 1)], ids=str)
@pytest.mark.parametrize("name", AFFINES)
def test_the_prediction_lies_on_the_very_grid_of_the_original(tmp_path, name, shape, preprocessing, patch_size):
    path, output = tmp_path / "image.nii.gz", tmp_path / "out.nii.gz"
    truth = write_image(path, AFFINES[name], shape=shape)
    preprocessing = replace(preprocessing, orientation="".join(nib.aff2axcodes(AFFINES[name])))
    predictor = Predictor(Pointwise(), patch_size, preprocessing=preprocessing)
    prediction = predictor.file(path, probabilities=True)
    save(prediction.labels, prediction.header, output)
    assert_same_grid(output, path)
    labels = nib.load(output)
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(labels.dataobj), truth)
    save(prediction.probabilities, prediction.header, output)
    assert_same_grid(output, path, (*shape[:3], 2))
    probabilities = np.asarray(nib.load(output).dataobj)
    assert probabilities.dtype == np.float32
    np.testing.assert_array_equal(probabilities.argmax(-1).reshape(shape), truth)
    assert predictor.file(path).probabilities is None


@pytest.mark.parametrize("image_class", [nib.Nifti1Image, nib.Nifti2Image])
def test_shapes_scaling_and_disagreeing_forms_are_kept(tmp_path, image_class):
    path, output = tmp_path / "image.nii", tmp_path / "out.nii.gz"
    write_image(tmp_path / "first.nii", oblique(), shape=(12, 9, 4, 1), image_class=image_class)
    image = nib.load(tmp_path / "first.nii")
    truth = np.asarray(image.dataobj) > 500
    image.set_sform(None, code=0)  # only the qform counts
    image.header.set_slope_inter(2, -50)
    nib.save(image, path)
    prediction = Predictor(Pointwise(), (8, 8, 4), preprocessing=KEEP).file(path)
    save(prediction.labels, prediction.header, output)
    assert_same_grid(output, path)
    np.testing.assert_array_equal(np.asarray(nib.load(output).dataobj), truth)


def test_the_same_prediction_gives_the_same_bytes_and_no_other_file(tmp_path):
    write_image(tmp_path / "image.nii", oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        prediction = Predictor(Pointwise(), (8, 8), preprocessing=KEEP).file(tmp_path / "image.nii")
        save(prediction.labels, prediction.header, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "image.nii"]


def test_amp_is_near_to_float32():
    torch.manual_seed(0)
    model = nnUNet(1, 3, 4, 3).eval()
    model.initialize()
    volume = torch.randn(1, 20, 24, 3)
    plain, fast = (Predictor(model, (16, 16), amp=amp).volume(volume) for amp in (False, True))
    assert fast.dtype == torch.float32 and not torch.equal(plain, fast)
    torch.testing.assert_close(fast, plain, rtol=0, atol=0.05)


def test_a_predictor_of_a_run_needs_three_lines(tmp_path):
    """The patch and the preprocessing are those of the run."""
    settings = Settings.of({"data": "phantom", "patch_size": (16, 16)})
    model = Sauron(1, 4, 2, 3)
    model.initialize()
    (tmp_path / "models").mkdir()
    save_model(tmp_path / "models" / "model-3", model)
    with pytest.raises(InputError, match="model-3: its run is not known"):
        Predictor.load(tmp_path / "models" / "model-3")
    (tmp_path / "config.json").write_text(json.dumps(settings.as_dict()))
    image = nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 24, 3)), np.diag([2.5, 2.5, 8, 1]))
    nib.save(image, tmp_path / "image.nii.gz")

    predictor = Predictor.load(tmp_path / "models" / "model-3", device="cpu", mirror=False)
    assert (predictor.patch_size, predictor.batch_size, predictor.mirror) == ((16, 16), 2, False)
    labels = predictor.file(tmp_path / "image.nii.gz").labels
    assert labels.shape == (20, 24, 3) and labels.dtype == np.uint8
    with pytest.raises(ValueError, match="needs their preprocessing"):
        Predictor(model, (16, 16)).file(tmp_path / "image.nii.gz")

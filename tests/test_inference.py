"""Sliding windows, mirroring and the original grid."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import reduce
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import assert_same_grid, oblique, oriented, write_image
from torch import nn

from lib.checkpoint import save_model
from lib.data.preprocessing import Preprocessing, crop_or_pad
from lib.inference import Predictor, axis_windows, save, slab_axis
from lib.models import Sauron, nnUNet
from lib.settings import Settings
from lib.system.error import InputError
from lib.torch_network import TorchNetwork

ROOT = Path(__file__).resolve().parents[1]
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
        total[side] += weights
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


def starts(size, patch, step=0.5):
    return [side.start for side, _ in axis_windows(size, patch, step)]


def test_windows_begin_where_nnunets_do():
    assert starts(110, 64) == [0, 23, 46]
    assert starts(129, 128) == [0, 1]
    sides = [starts(size, patch) for size, patch in zip((100, 300, 512), (40, 224, 224), strict=True)]
    assert sides == [[0, 20, 40, 60], [0, 76], [0, 96, 192, 288]]


@given(size=st.integers(1, 200), half=st.integers(1, 32), step=st.sampled_from([0.1, 0.25, 1 / 3, 0.7, 1.0]))
def test_windows_begin_after_the_given_share_of_the_patch(size, half, step):
    patch = 2 * half
    size = max(size, patch)
    total = np.zeros(size)
    for side, weights in axis_windows(size, patch, step):
        total[side] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    if step * patch >= 1:
        assert len(starts(size, patch, step)) == math.ceil((size - patch) / (step * patch)) + 1


SIZES = st.tuples(st.integers(1, 27), st.integers(1, 27), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(size=SIZES, dim=st.sampled_from(["2D", "3D"]), tta=st.booleans(), batch_size=st.integers(1, 20))
def test_any_size_equals_the_direct_computation(size, dim, tta, batch_size):
    volume = torch.randn(1, *size)
    result = Predictor(Pointwise(), PATCHES[dim], tta, batch_size).volume(volume.numpy())
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, torch.cat([-volume, volume]).softmax(0), atol=1e-6)


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
    result = Predictor(model, PATCHES["2D"], tta, batch_size=3).volume(volume.numpy())
    for z in range(size[2]):
        expected = slow_prediction(model, volume[..., z], PATCHES["2D"], FLIPS_2D if tta else [()])
        np.testing.assert_allclose(result[..., z], expected, atol=1e-6)


@pytest.mark.parametrize("tta", [True, False])
@pytest.mark.parametrize("size", [(4, 8, 6), (3, 17, 5), (9, 6, 13)])
@torch.no_grad()
def test_3d_is_the_weighted_mean_over_windows_and_eight_mirrorings(size, tta):
    model, volume = Neighbours("3D"), torch.randn(2, *size)
    result = Predictor(model, PATCHES["3D"], tta, batch_size=12).volume(volume.numpy())
    expected = slow_prediction(model, volume, PATCHES["3D"], FLIPS_3D if tta else [()])
    np.testing.assert_allclose(result, expected, atol=1e-6)


def volume_at_once(predictor, volume):
    """The same with all probabilities in memory: windows in the order of the axes, batch by batch."""
    model, volume = predictor.models[0].model, torch.from_numpy(volume)
    flat = len(predictor.patch_size) == 2
    items = volume.movedim(3, 0) if flat else volume[None]
    size = items.shape[2:]
    items = torch.from_numpy(crop_or_pad(items.numpy(), predictor.patch_size, crop=False))
    result = torch.zeros(len(items), model.n_classes, *items.shape[2:])
    n_axes = len(predictor.patch_size) if predictor.mirror else 0
    mirrorings = [m for n in range(n_axes + 1) for m in itertools.combinations(range(2, items.ndim), n)]
    sides = [axis_windows(n, patch) for n, patch in zip(items.shape[2:], predictor.patch_size, strict=True)]
    windows = list(itertools.product(range(len(items)), *sides))
    per_batch = max(1, predictor.batch_size // len(mirrorings))
    for i in range(0, len(windows), per_batch):
        batch = windows[i : i + per_batch]
        boxes = [(n, slice(None), *(side for side, _ in window)) for n, *window in batch]
        patches = torch.stack([items[box] for box in boxes])
        mirrored = torch.cat([patches.flip(axes) for axes in mirrorings])
        outputs = torch.cat([model(part)[0].float() for part in mirrored.split(predictor.batch_size)])
        outputs = outputs.unflatten(0, (len(mirrorings), -1))
        outputs = sum(output.flip(axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)
        for box, output, (_, *window) in zip(boxes, outputs, batch, strict=True):
            result[box] += output * reduce(
                lambda a, b: a[..., None] * b, [torch.from_numpy(weights) for _, weights in window]
            )
    result = crop_or_pad(result.numpy(), size)
    return np.moveaxis(result, 0, 3) if flat else result[0]


@pytest.mark.parametrize(("tta", "batch_size"), [(True, None), (True, 20), (False, 1), (False, 5)])
@pytest.mark.parametrize(
    ("dim", "size"),
    [("2D", (8, 12, 1)), ("2D", (5, 31, 7)), ("2D", (19, 7, 3)), ("3D", (13, 17, 5)), ("3D", (3, 17, 7))],
)
@torch.no_grad()
def test_slabs_have_the_numbers_of_the_volume_at_once_to_the_bit(dim, size, tta, batch_size):
    predictor = Predictor(Neighbours(dim), PATCHES[dim], tta, batch_size)
    volume = torch.randn(2, *size).numpy()
    np.testing.assert_array_equal(predictor.volume(volume), volume_at_once(predictor, volume))


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(*[st.integers(1, 40)] * 3), dim=st.sampled_from(["2D", "3D"]))
@torch.no_grad()
def test_slabs_follow_one_another_along_one_axis(size, dim):
    predictor = Predictor(Neighbours(dim), PATCHES[dim], mirror=False)
    volume, axis = torch.randn(2, *size).numpy(), slab_axis(size, PATCHES[dim])
    slices, parts = zip(*predictor.slabs(volume), strict=True)
    assert slices[0].start == 0 and slices[-1].stop == size[axis]
    assert all(a.stop == b.start for a, b in itertools.pairwise(slices))
    widths = [part.shape[axis + 1] for part in parts]
    assert widths == [slab.stop - slab.start for slab in slices] and max(widths) <= (*PATCHES[dim], 1)[axis]
    np.testing.assert_allclose(np.concatenate(parts, axis + 1), volume_at_once(predictor, volume), atol=1e-6)


def test_the_axis_of_the_slabs():
    assert slab_axis((500, 20, 3), (8, 8)) == 2
    assert slab_axis((20, 24, 28), (10, 10, 10)) == 0  # the others need not much less
    assert slab_axis((10, 20, 90), (10, 10, 10)) == 2
    assert slab_axis((5, 45, 20), (10, 10, 10)) == 1


MEMORY = """
import resource
import numpy as np
import torch
from lib.inference import Predictor

class Many(torch.nn.Module):
    n_classes = 100
    def forward(self, x):
        return [x.expand(-1, 100, *x.shape[2:]) / 100]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

predictor = Predictor(Many(), (16, 16, 16), mirror=False)
for slab in predictor.slabs(np.zeros((1, 24, 24, 40), np.float32)):
    pass
before = peak()
volume = np.zeros((1, *SHAPE), np.float32)
n = sum(part.shape[AXIS + 1] for _, part in predictor.slabs(volume))
assert n == 2000
print((peak() - before) * 1024, 100 * volume.size * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has another unit elsewhere")
@pytest.mark.parametrize(("shape", "axis"), [((2000, 24, 24), 0), ((24, 24, 2000), 2)])
def test_a_long_volume_with_many_classes_is_never_in_memory_as_a_whole(shape, axis):
    code = MEMORY.replace("SHAPE", str(shape)).replace("AXIS", str(axis))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    more, whole = map(int, ran.stdout.split())
    assert whole == 460_800_000 and more < whole / 8


class Saying(nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, *probabilities):
        super().__init__()
        self.probabilities, self.n_classes = torch.tensor(probabilities), len(probabilities)

    def forward(self, x):
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return [self.probabilities.reshape(shape).expand(len(x), -1, *x.shape[2:])]


def test_several_models_say_the_softmax_of_their_mean_logits():
    models = Saying(0.7, 0.2, 0.1), Saying(0.1, 0.8, 0.1)
    found = Predictor(models, (8, 12)).volume(torch.randn(1, 9, 20, 2).numpy())
    # sqrt(0.07), sqrt(0.16), sqrt(0.01), divided by their sum
    expected = np.array([0.264575, 0.4, 0.1]) / 0.764575
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None, None], (3, 9, 20, 2)), atol=1e-6)
    sure = Predictor((Saying(1.0, 0.0), Saying(0.0, 1.0), Saying(0.0, 1.0)), (8, 12)).volume(
        np.zeros((1, 8, 12, 1), np.float32)
    )
    assert np.isfinite(sure).all() and (sure.argmax(0) == 1).all()


@torch.no_grad()
def test_several_models_are_averaged_after_their_windows_and_mirrorings():
    models = [Neighbours("3D"), Neighbours("3D")]
    nn.init.normal_(models[1].conv.weight)
    volume = torch.randn(2, 9, 8, 13).numpy()
    each = [Predictor(model, PATCHES["3D"]).volume(volume) for model in models]
    np.testing.assert_array_equal(Predictor((models[0],), PATCHES["3D"]).volume(volume), each[0])
    both, shares = [], []
    for _, part in Predictor(tuple(models), PATCHES["3D"]).slabs(volume, shares.append):
        both.append(part)
    expected = sum(torch.from_numpy(one).log() for one in each).div(2).softmax(0)
    np.testing.assert_allclose(np.concatenate(both, 1), expected, atol=1e-6)
    assert len(shares) == 2 * 4 * 4 and sum(shares) == pytest.approx(1)


def test_the_labels_of_a_file_are_postprocessed_in_its_own_order(tmp_path):
    path = tmp_path / "image.nii.gz"
    truth = write_image(path, AFFINES["SRA"], shape=(12, 9, 4))
    given = []
    post = lambda labels: given.append(labels) or np.zeros_like(labels)  # noqa: E731
    prediction = Predictor(Pointwise(), (8, 8), preprocessing=KEEP, postprocess=post).file(path)
    np.testing.assert_array_equal(given[0], truth)
    assert not prediction.labels.any()


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
    volume = torch.randn(1, 20, 24, 3).numpy()
    plain, fast = (Predictor(TorchNetwork(model, amp), (16, 16)).volume(volume) for amp in (False, True))
    assert fast.dtype == np.float32 and not np.array_equal(plain, fast)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=0.05)


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


def test_models_of_an_ensemble_share_patch_and_preprocessing(tmp_path):
    paths = []
    for i, setting in enumerate(({"patch_size": (16, 16)}, {"patch_size": (16, 16)}, {"patch_size": (32, 16)})):
        model = Sauron(1, 4, 2, 3)
        model.initialize()
        (tmp_path / str(i) / "models").mkdir(parents=True)
        paths.append(tmp_path / str(i) / "models" / "model-3")
        save_model(paths[-1], model)
        config = Settings.of({"data": "phantom", **setting}).as_dict()
        (tmp_path / str(i) / "config.json").write_text(json.dumps(config))
    predictor = Predictor.load(paths[:2], device="cpu", step_size=0.25)
    assert len(predictor.models) == 2 and predictor.patch_size == (16, 16) and predictor.step_size == 0.25
    with pytest.raises(InputError, match=f"^{paths[2]}: its run has another patch_size than that of {paths[0]}"):
        Predictor.load(paths, device="cpu")

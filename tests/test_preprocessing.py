from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import oblique

from lib.data import images
from lib.data.images import read_geometry, read_label
from lib.data.normalization import Normalization
from lib.data.preprocessing import (
    Grid,
    Image,
    Preprocessing,
    check_size,
    crop_or_pad,
    in_own_frame,
    preprocess,
    preprocessed_shape,
    read_channels,
    standardize,
    standardize_label,
    to_original_grid,
    zscore,
)
from lib.data.resampling import resample_image, resample_label
from lib.system.error import InputError

ACDC = Path(__file__).resolve().parents[1].parent / "shared" / "acdc" / "training"
OBLIQUE = np.array([[0.0, -1.4, 0.3, 20], [1.6, 0.0, 0.1, -30], [0.2, 0.1, 8.0, 5], [0, 0, 0, 1]])


def write(path, array, affine=None):
    nib.save(nib.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine), path)
    return path


def read_image(path, orientation):
    return read_channels(path, Preprocessing((None,) * 3, orientation=orientation))[0]


def whole(slabs):
    """All slabs in one, which must follow one another without gaps."""
    slices, parts = zip(*slabs, strict=True)
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    return np.concatenate(parts, 1)


def one_slab(probabilities):
    return [(slice(0, probabilities.shape[1]), probabilities)]


def world_ramp(shape, affine):
    """An image whose value at each voxel is a linear function of where the voxel lies in the world."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return (points @ [0.5, -1.0, 0.25] + 3).astype(np.float32)[None]


def test_an_image_comes_in_the_order_asked_for_and_in_a_frame_of_its_own(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    write(tmp_path / "a.nii.gz", array, np.diag([-1.5, -2.0, 5.0, 1.0]))  # LPS
    for orientation, expected in (("LPS", array), ("RAS", array[::-1, ::-1]), ("SPL", array.transpose())):
        image = read_image(tmp_path / "a.nii.gz", orientation)
        assert image.array.dtype == np.float32
        np.testing.assert_array_equal(image.array[0], expected)
        assert image.spacing_mm.tolist() == ([5.0, 2.0, 1.5] if orientation == "SPL" else [1.5, 2.0, 5.0])
        np.testing.assert_array_equal(image.affine, np.diag([*image.spacing_mm, 1]))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "IPL", "SAR"])
def test_what_the_network_sees_does_not_depend_on_the_order_of_the_file(tmp_path, codes):
    """To the last bit: an oblique volume as stored, and in another order of its axes."""
    rng = np.random.default_rng(0)
    image = nib.Nifti1Image(rng.normal(0, 100, (19, 24, 9)).astype(np.float32), oblique())
    start = nib.io_orientation(image.affine)
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes)))
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(turned, tmp_path / "b.nii.gz")
    recipe = Preprocessing((2.1, 1.3, 7.0), min_size=(20, 9, 12), orientation="IPL")
    one, other = (preprocess(read_image(tmp_path / name, "IPL"), recipe) for name in ("a.nii.gz", "b.nii.gz"))
    assert np.array_equal(one.array, other.array) and one.padding == other.padding
    assert preprocessed_shape(read_geometry(tmp_path / "b.nii.gz"), recipe) == one.array.shape[1:]


def test_zscore_by_hand():
    assert zscore(np.array([[1.0, 3.0]])).tolist() == [[-1.0, 1.0]]
    assert zscore(np.full((1, 2, 2, 2), 0.1)).tolist() == np.zeros((1, 2, 2, 2)).tolist()
    two = zscore(np.array([[1.0, 3.0], [5.0, 5.0]], np.float32))
    assert two.dtype == np.float32 and two.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@settings(deadline=None)
@given(st.floats(0.01, 1e4), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_zscore_ignores_scale_and_shift(scale, shift, seed):
    x = np.random.default_rng(seed).normal(size=(1, 6, 5, 4))
    np.testing.assert_allclose(zscore(x * scale + shift), zscore(x), atol=1e-5)
    assert abs(float(zscore(x).mean())) < 1e-6 and float(zscore(x).std()) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6)),
    st.tuples(st.floats(0.5, 3), st.floats(0.5, 3), st.one_of(st.none(), st.floats(2, 9))),
)
def test_resampled_voxels_stay_where_they_are_in_the_world(shape, spacing_mm):
    """Linear interpolation keeps a linear function: each voxel still tells its own place, padding set apart."""
    image = Image(world_ramp(shape, OBLIQUE), OBLIQUE)
    plain = standardize(image, Preprocessing(spacing_mm, zscore=False))
    margin = [int(np.ceil(old / (new or old))) for old, new in zip(image.spacing_mm, spacing_mm, strict=True)]
    inside = tuple(slice(n, -n) for n in margin)
    expected = world_ramp(plain.array.shape[1:], plain.affine)[0]
    assert np.allclose(plain.array[0][inside], expected[inside], atol=1e-3)
    padded = standardize(image, Preprocessing(spacing_mm, min_size=(9, 10, 7), zscore=False))
    x0, _, y0, _, z0, _ = padded.padding
    assert all(n >= least for n, least in zip(padded.array.shape[1:], (9, 10, 7), strict=True))
    assert np.allclose(padded.affine @ [x0, y0, z0, 1], plain.affine[:, 3])
    back = padded.array[0, x0:, y0:, z0:][tuple(slice(n) for n in plain.array.shape[1:])]
    assert np.array_equal(back, plain.array[0])


@pytest.mark.parametrize("shape", [(40, 36, 5), (33, 35, 1)])
def test_agrees_with_torchio(shape):
    image = tio.ScalarImage(tensor=torch.randn(2, *shape), affine=OBLIQUE)
    ours = standardize(Image(image.numpy(), image.affine), Preprocessing((1.25, 1.25, None), zscore=False))
    theirs = tio.Resample((1.25, 1.25, float(image.spacing[2])))(image)
    assert np.allclose(ours.array, theirs.data, atol=1e-4) and np.allclose(ours.affine, theirs.affine)


@pytest.mark.parametrize("n", range(1, 50, 6))
def test_an_axis_that_stays_keeps_every_slice_exactly(n):
    image = Image(np.arange(4 * n, dtype=np.float32).reshape(1, 2, 2, n), np.diag([1, 1, 1 / n / 3, 1]))
    assert np.allclose(standardize(image, Preprocessing((None,) * 3, zscore=False)).array, image.array, atol=1e-4)


def test_clip_shift_scale_and_padding_by_hand():
    image = Image(np.array([-500, 101, 178], np.float32).reshape(1, 1, 1, 3), np.eye(4))
    fixed = Preprocessing((None,) * 3, clip=(-79, 304), shift=101, scale=77, min_size=(2, 1, 4), zscore=False)
    result = standardize(image, fixed)
    assert result.padding == (1, 0, 0, 0, 1, 0)
    assert np.allclose(result.array[0, :, 0], [[0, 0, 0, 0], [0, -180 / 77, 0, 1]])
    assert np.allclose(result.affine[:3, 3], [-1, 0, -1])
    network_input = preprocess(image, fixed)
    own = np.array([-180 / 77, 0, 1])  # the voxels that the image has; what is padded is their mean
    assert np.allclose(network_input.array[0, 1, 0, 1:], (own - own.mean()) / own.std(), atol=1e-6)
    assert not network_input.array[0, 0].any() and network_input.array[0, 1, 0, 0] == 0
    assert network_input.padding == result.padding


@pytest.mark.parametrize("early", [False, True])
def test_what_is_padded_does_not_count_in_the_zscore_by_hand(early):
    """Each channel for itself: 2, 4, 4, 4, 5, 5, 7, 9 have the mean 5 and the deviation 2."""
    one = np.array([2, 4, 4, 4, 5, 5, 7, 9], np.float32).reshape(1, 2, 2, 2)
    image = Image(np.concatenate([one, 7 - 3 * one]), np.eye(4))
    recipe = Preprocessing((None,) * 3, min_size=(4, 2, 5), zscore=early)
    there = preprocess(image, recipe)
    assert there.padding == (1, 1, 0, 0, 2, 1) and there.array.shape == (2, 4, 2, 5)
    expected = np.array([-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2])
    inner = there.array[:, 1:3, :, 2:4]
    assert np.allclose(inner.reshape(2, 8), [expected, -expected], atol=1e-6)
    inner[...] = 0
    assert not there.array.any()


@pytest.mark.parametrize("early", [False, True])
def test_models_of_before_count_what_is_padded(early):
    image = Image(np.array([2, 4, 6], np.float32).reshape(1, 1, 1, 3), np.eye(4))
    recipe = Preprocessing((None,) * 3, min_size=(1, 1, 4), zscore=early, padding_counts=True)
    there = preprocess(image, recipe)
    assert np.allclose(there.array.ravel(), np.array([-3, -1, 1, 3]) / np.sqrt(5), atol=1e-6)
    assert np.isclose(there.array.mean(), 0, atol=1e-6) and there.padding == (0, 0, 0, 0, 1, 0)


def test_labels_share_the_grid_of_their_image_and_stay_labels():
    label = np.random.default_rng(0).integers(0, 4, (1, 30, 28, 6), np.uint8)
    recipe = Preprocessing((1.1, 1.9, None), min_size=(40, 40, 8))
    result = standardize_label(Image(label, OBLIQUE), recipe)
    image = standardize(Image(label.astype(np.float32), OBLIQUE), recipe)
    assert result.dtype == np.uint8 and result.shape == image.array.shape[1:]
    assert set(np.unique(result).tolist()) == {0, 1, 2, 3}


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 17), st.integers(3, 17), st.integers(1, 6)), st.floats(0.6, 4), st.sampled_from([1, 200])
)
def test_probabilities_come_back_on_the_original_grid(shape, spacing_mm, slab_voxels):
    """A constant stays one up to the borders, and a linear function stays linear inside."""
    reference = Image(world_ramp(shape, OBLIQUE), OBLIQUE)
    there = standardize(reference, Preprocessing((spacing_mm, spacing_mm, None), min_size=(9, 9, 4), zscore=False))
    both = np.concatenate([there.array, np.ones_like(there.array)])
    grid = Grid(reference.shape, reference.affine)
    ramp, one = whole(to_original_grid(one_slab(both), 0, there, grid, slab_voxels))
    assert ramp.shape == shape and np.allclose(one, 1)
    margin = int(np.ceil(spacing_mm / 1.4)) + 1
    inside = tuple(slice(margin, -margin) for _ in range(2))
    assert np.allclose(ramp[inside], reference.array[0][inside], atol=1e-3)


def test_real_labels_survive_the_round_trip():
    if not ACDC.is_dir():
        pytest.skip("the shared ACDC patients are not beside this checkout")
    path = ACDC / "patient002" / "patient002_frame01_gt.nii.gz"
    label, recipe = in_own_frame(read_label(path, 4), "LPS"), Preprocessing((1.25, 1.25, None))
    there = standardize_label(label, recipe)
    grid = standardize(read_image(path, "LPS"), recipe)
    one_hot = one_hot_of(there, 4)
    original = Grid(label.shape, label.affine)
    back = whole(to_original_grid(one_slab(one_hot), 0, grid, original)).argmax(0)
    for k in range(1, 4):
        ours, truth = back == k, label.array[0] == k
        assert 2 * (ours & truth).sum() / (ours.sum() + truth.sum()) > 0.99


@pytest.mark.parametrize(
    ("shape", "crop", "expected"),
    [
        ((5,), True, [0, 1, 2, 3, 0]),
        ((6,), True, [0, 0, 1, 2, 3, 0]),
        ((2,), True, [2, 3]),
        ((1,), True, [2]),
        ((2,), False, [1, 2, 3]),
        ((None,), True, [1, 2, 3]),
    ],
)
def test_crop_or_pad_by_hand(shape, crop, expected):
    assert crop_or_pad(np.array([[1, 2, 3]]), shape, crop).tolist() == [expected]


@settings(deadline=None)
@given(*[st.tuples(*[st.integers(1, 9)] * 3)] * 2)
def test_crop_or_pad_agrees_with_torchio(size, wanted):
    volume = np.arange(1, 1 + int(np.prod(size))).reshape(1, *size)
    np.testing.assert_array_equal(crop_or_pad(volume, wanted), tio.CropOrPad(wanted)(torch.from_numpy(volume)))


# ---- nnU-Net's way

PLAIN, ZSCORE = Normalization("nonorm"), Normalization("zscore")


def own(array, spacing):
    """A volume (X, Y, Z), or channels of one, in its own frame."""
    return Image(array if array.ndim == 4 else array[None], np.diag([*spacing, 1.0]))


def body(shape=(12, 15, 11), n_channels=1, seed=0):
    """Noise about 50 in the middle of zeros, and what its crop leaves; a label of classes 0, 1, 2 in it."""
    rng, box = np.random.default_rng(seed), (slice(2, shape[0] - 1), slice(3, shape[1] - 3), slice(0, shape[2] - 2))
    channels = np.zeros((n_channels, *shape), np.float32)
    channels[:, *box] = rng.normal(50, 5, channels[:, *box].shape)
    label = np.zeros(shape, np.uint8)
    label[box][2:5, 2:7, 1:6] = 1
    label[box][4:7, 3:5, 2:8] = 2
    return channels, label, box


def one_hot_of(label, n_classes=3):
    return np.stack([label == k for k in range(n_classes)]).astype(np.float32)


def slabs_of(probabilities, axis, n):
    size = probabilities.shape[axis + 1]
    return (
        (slice(i, min(i + n, size)), probabilities[(slice(None),) * (axis + 1) + (slice(i, i + n),)])
        for i in range(0, size, n)
    )


def joined(slabs, axis):
    slices, parts = zip(*slabs, strict=True)
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    assert all(part.shape[axis + 1] == s.stop - s.start for s, part in zip(slices, parts, strict=True))
    return np.concatenate(parts, axis + 1)


def test_crop_then_normalize_then_resample():
    channels, label, box = body(n_channels=2)
    recipe = Preprocessing((1.5, None, 2.0), normalizations=(ZSCORE, PLAIN), crop=True)
    there = standardize(own(channels, (1.0, 1.2, 2.5)), recipe, own(label, (1.0, 1.2, 2.5)))
    cropped = channels[:, *box]
    assert cropped.shape[1:] == (9, 9, 9) and there.box == box and there.padding == (0,) * 6
    first = (cropped[0] - cropped[0].mean()) / cropped[0].std()
    for result, expected in zip(there.array, (first, cropped[1]), strict=True):
        np.testing.assert_allclose(result, resample_image(expected, (6, 9, 11), None), atol=1e-4)
    assert there.label.dtype == np.uint8
    np.testing.assert_array_equal(there.label, resample_label(label[box], (6, 9, 11), None))
    again = preprocess(own(channels, (1.0, 1.2, 2.5)), recipe)
    assert np.array_equal(again.array, there.array) and again.label is None  # no z-score follows


def test_a_crop_only_if_asked_for():
    channels, _, _ = body()
    there = standardize(own(channels, (1, 1, 1)), Preprocessing((None,) * 3, normalizations=(PLAIN,)))
    np.testing.assert_array_equal(there.array, channels)
    assert there.box == tuple(slice(0, n) for n in channels.shape[1:])


def test_a_masked_zscore_is_over_the_nonzero_mask_and_the_foreground():
    """In training a label outside of the mask counts; in a prediction the mask is all that is known."""
    array, label = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
    array[0, 0, 0], array[0, 3, 3], label[0, 1, 1] = 3, 5, 1
    recipe = Preprocessing((None,) * 3, normalizations=(Normalization("zscore", masked=True),), crop=True)
    known = standardize(own(array, (1, 1, 1)), recipe, own(label, (1, 1, 1))).array[0, 0]
    std = np.std([3, 5, 0])
    assert known[0, 0] == pytest.approx((3 - 8 / 3) / std) and known[1, 1] == pytest.approx(-8 / 3 / std)
    unknown = preprocess(own(array, (1, 1, 1)), recipe).array[0, 0]
    assert unknown[0, 0] == -1 and unknown[3, 3] == 1 and unknown[1, 1] == 0 == known[2, 2]


def test_the_outside_competes_when_labels_are_resampled():
    """The score of 1 is 0.4, more than those of the background inside and outside, but less than their sum."""
    array = np.ones((1, 1, 5), np.float32)
    array[0, 0, 1:3] = 0
    array = np.concatenate([array, np.ones((1, 1, 5), np.float32)], 1)
    label = np.zeros(array.shape, np.uint8)
    label[0, 0, 3:] = label[0, 1, 2:] = 1
    recipe = Preprocessing((None, 2.0, 1.0), normalizations=(PLAIN,), crop=True)
    there = standardize(own(array, (1, 1, 1)), recipe, own(label, (1, 1, 1)))
    assert there.label[0].tolist() == [[0, 0, 1, 1, 1]] and there.label.dtype == np.uint8


def test_labels_keep_what_does_not_count():
    channels, label, box = body()
    label[5:8, 6:9, 3:6] = 3
    recipe = Preprocessing((1.4, 0.8, 1.0), normalizations=(ZSCORE,), crop=True)
    there = standardize(own(channels, (1, 1, 1)), recipe, own(label.astype(np.int16), (1, 1, 1)))
    assert there.label.dtype == np.int16 and set(np.unique(there.label).tolist()) == {0, 1, 2, 3}


def test_the_affine_leads_to_the_places_of_the_voxels():
    """In a crop of which each voxel tells its own place along each axis."""
    places = np.stack(np.meshgrid(*map(np.arange, (24, 30, 20)), indexing="ij")) * [[[[1.0]]], [[[1.5]]], [[[2.5]]]]
    places[:, :3] = places[:, :, :, 17:] = 0
    places[0, 3:, :, :17] += 100  # none of the others is 0
    recipe = Preprocessing((0.9, 2.0, 2.2), normalizations=(PLAIN,) * 3, crop=True)
    there = standardize(own(places.astype(np.float32), (1.0, 1.5, 2.5)), recipe)
    assert there.array.shape[1:] == (23, 22, 19)
    index = np.stack(np.meshgrid(*map(np.arange, there.array.shape[1:]), indexing="ij"), -1)
    expected = index @ there.affine[:3, :3].T + there.affine[:3, 3] + [100, 0, 0]
    inside = np.s_[6:-6, 6:-6, 6:-6]  # at the borders the nearest voxel goes on
    found = there.array.transpose(1, 2, 3, 0)
    np.testing.assert_allclose(found[inside], expected[inside], atol=0.02)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slab_voxels", [1, 700, 2**24])
def test_labels_come_back_exactly_where_nothing_is_resampled(axis, slab_voxels):
    channels, label, box = body()
    image = own(channels, (1, 1, 3))
    recipe = Preprocessing((None,) * 3, normalizations=(ZSCORE,), crop=True)
    there = standardize(image, recipe, own(label, (1, 1, 3)))
    grid = Grid(image.shape, image.affine)
    back = joined(to_original_grid(slabs_of(one_hot_of(there.label), axis, 2), axis, there, grid, slab_voxels), axis)
    assert back.dtype == np.float32
    assert np.array_equal(back, one_hot_of(label))  # outside of the crop: background, and nothing else


@pytest.mark.parametrize(
    ("old_mm", "new_mm"),
    [((1, 1, 1), (1.3, 0.8, 1.1)), ((1, 1, 4), (1.2, 1.3, 4)), ((1, 4, 1), (0.8, 3, 1.1)), ((2, 2, 2), (1, 1, None))],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_streaming_is_the_whole_computation(old_mm, new_mm, axis):
    """And what comes back is the label that went there, but for its borders."""
    channels, label, box = body((40, 44, 36))
    label = np.kron(body((10, 11, 9))[1], np.ones((4, 4, 4), np.uint8)) * (channels[0] != 0)
    image = own(channels, old_mm)
    there = standardize(image, Preprocessing(new_mm, normalizations=(ZSCORE,), crop=True), own(label, old_mm))
    grid, one_hot = Grid(image.shape, image.affine), one_hot_of(there.label)
    whole_volume = joined(to_original_grid([(slice(0, one_hot.shape[1]), one_hot)], 0, there, grid), 0)
    for n, slab_voxels in ((1, 1), (3, 30_000), (50, 5000)):
        streamed = joined(to_original_grid(slabs_of(one_hot, axis, n), axis, there, grid, slab_voxels), axis)
        assert np.array_equal(streamed, whole_volume)
    assert np.allclose(whole_volume.sum(0), 1, atol=1e-5)
    back = whole_volume.argmax(0)
    for k in (1, 2):
        assert 2 * ((back == k) & (label == k)).sum() / ((back == k).sum() + (label == k).sum()) > 0.9


def test_slabs_are_read_only_when_they_are_needed():
    channels, _, box = body((60, 20, 20))
    image = own(channels, (1, 1, 1))
    there = standardize(image, Preprocessing((2.0, 1.0, 1.0), normalizations=(ZSCORE,), crop=True))
    read = []

    def source():
        for where, slab in slabs_of(np.full((2, *there.array.shape[1:]), 0.5, np.float32), 0, 2):
            read.append(where.stop)
            yield where, slab

    grid = Grid(image.shape, image.affine)
    for slab, _ in to_original_grid(source(), 0, there, grid, 5 * 2 * 400):
        assert slab.stop - slab.start <= 5 and read[-1] <= max(2, (slab.stop - box[0].start) / 2 + 4)
    assert slab.stop == 60 and read[-1] == there.array.shape[1]


def test_published_data_sets_come_back_along_any_axis():
    rng = np.random.default_rng(0)
    image = Image(rng.random((1, 13, 11, 7), np.float32), OBLIQUE)
    there = standardize(image, Preprocessing((2.0, 1.0, None), min_size=(9, 30, 4)))
    probabilities, grid = rng.random((3, *there.array.shape[1:]), np.float32), Grid(image.shape, image.affine)
    expected = whole(to_original_grid(one_slab(probabilities), 0, there, grid))
    for axis in range(3):
        assert np.array_equal(
            joined(to_original_grid(slabs_of(probabilities, axis, 2), axis, there, grid), axis), expected
        )
        some = joined(to_original_grid(slabs_of(probabilities, axis, 3), axis, there, grid, 100), axis)
        assert np.allclose(some, expected, atol=1e-6)


def test_the_shape_is_known_beforehand(tmp_path):
    array = np.random.default_rng(0).normal(9, 1, (12, 10, 8)).astype(np.float32)
    path = write(tmp_path / "a.nii.gz", array, np.diag([-1.0, -2.0, 3.0, 1.0]))
    recipe = Preprocessing((2.5, 1.5, None), orientation="SPL", normalizations=(ZSCORE,), crop=True)
    assert preprocessed_shape(read_geometry(path), recipe) == (10, 13, 12)
    assert preprocess(read_image(path, "SPL"), recipe).array.shape == (1, 10, 13, 12)
    with pytest.raises(InputError, match="a.nii.gz: its voxels of 1 x 2 x 3 mm would become"):
        check_size(path, read_geometry(path), Preprocessing((0.01,) * 3, normalizations=(ZSCORE,)))


def test_channels_are_those_that_are_normalized(tmp_path, monkeypatch):
    array = np.random.default_rng(0).integers(0, 256, (6, 5, 4)).astype(np.float32)
    path, other = write(tmp_path / "a.nii.gz", array), write(tmp_path / "b.nii.gz", array + 1)
    one, two = (Preprocessing((None,) * 3, normalizations=(Normalization("rgb_to_0_1"),) * n) for n in (1, 2))
    assert read_channels([path], one)[0].array.shape == (1, 6, 5, 4)
    with pytest.raises(InputError, match="a.nii.gz: this image has 1 channels, but 2 are needed"):
        read_channels([path], two)
    with pytest.raises(InputError, match="a.nii.gz: this image has 2 channels, but 1 are needed"):
        read_channels([path, other], one)
    with pytest.raises(InputError, match="b.nii.gz: its intensities are 1 to 256, but"):
        read_channels([path, other], two)
    both = [images.read_image(path), images.read_image(path)]
    monkeypatch.setattr("lib.data.preprocessing.read_channels_of", lambda path: list(both))
    image, file = read_channels(path, two)
    assert image.array.shape == (2, 6, 5, 4) and file.n_bytes == path.stat().st_size
    assert file.sha256 == both[0].sha256

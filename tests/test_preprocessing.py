from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import oblique

from lib.data.images import read_geometry, read_label
from lib.data.preprocessing import (
    Grid,
    Preprocessing,
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
    return torch.cat(parts, dim=1)


def one_slab(probabilities):
    return [(slice(0, probabilities.shape[1]), probabilities)]


def world_ramp(shape, affine):
    """An image whose value at each voxel is a linear function of where the voxel lies in the world."""
    points = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return torch.tensor(points @ [0.5, -1.0, 0.25] + 3, dtype=torch.float32)[None]


def test_an_image_comes_in_the_order_asked_for_and_in_a_frame_of_its_own(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    write(tmp_path / "a.nii.gz", array, np.diag([-1.5, -2.0, 5.0, 1.0]))  # LPS
    for orientation, expected in (("LPS", array), ("RAS", array[::-1, ::-1]), ("SPL", array.transpose())):
        image = read_image(tmp_path / "a.nii.gz", orientation)
        assert image.data.dtype == torch.float32
        np.testing.assert_array_equal(image.data[0], expected)
        assert image.spacing == ((5.0, 2.0, 1.5) if orientation == "SPL" else (1.5, 2.0, 5.0))
        np.testing.assert_array_equal(image.affine, np.diag([*image.spacing, 1]))


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
    assert torch.equal(one.tensor, other.tensor) and one.padding == other.padding
    assert preprocessed_shape(read_geometry(tmp_path / "b.nii.gz"), recipe) == one.tensor.shape[1:]


def test_zscore_by_hand():
    assert zscore(torch.tensor([[1.0, 3.0]])).tolist() == [[-1.0, 1.0]]
    assert zscore(torch.full((1, 2, 2, 2), 0.1)).tolist() == torch.zeros(1, 2, 2, 2).tolist()


@settings(deadline=None)
@given(st.floats(0.01, 1e4), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_zscore_ignores_scale_and_shift(scale, shift, seed):
    x = torch.randn(1, 6, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(zscore(x * scale + shift), zscore(x), atol=1e-5)
    assert abs(float(zscore(x).mean())) < 1e-6 and float(zscore(x).std(correction=0)) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 6)),
    st.tuples(st.floats(0.5, 3), st.floats(0.5, 3), st.one_of(st.none(), st.floats(2, 9))),
)
def test_resampled_voxels_stay_where_they_are_in_the_world(shape, spacing_mm):
    """Linear interpolation keeps a linear function: each voxel still tells its own place, padding set apart."""
    image = tio.ScalarImage(tensor=world_ramp(shape, OBLIQUE), affine=OBLIQUE)
    plain = standardize(image, Preprocessing(spacing_mm, zscore=False))
    margin = [int(np.ceil(old / (new or old))) for old, new in zip(image.spacing, spacing_mm, strict=True)]
    inside = tuple(slice(n, -n) for n in margin)
    expected = world_ramp(plain.tensor.shape[1:], plain.affine)[0]
    assert torch.allclose(plain.tensor[0][inside], expected[inside], atol=1e-3)
    padded = standardize(image, Preprocessing(spacing_mm, min_size=(9, 10, 7), zscore=False))
    x0, _, y0, _, z0, _ = padded.padding
    assert all(n >= least for n, least in zip(padded.tensor.shape[1:], (9, 10, 7), strict=True))
    assert np.allclose(padded.affine @ [x0, y0, z0, 1], plain.affine[:, 3])
    back = padded.tensor[0, x0:, y0:, z0:][tuple(slice(n) for n in plain.tensor.shape[1:])]
    assert torch.equal(back, plain.tensor[0])


@pytest.mark.parametrize("shape", [(40, 36, 5), (33, 35, 1)])
def test_agrees_with_torchio(shape):
    image = tio.ScalarImage(tensor=torch.randn(1, *shape), affine=OBLIQUE)
    ours = standardize(image, Preprocessing((1.25, 1.25, None), zscore=False))
    theirs = tio.Resample((1.25, 1.25, float(image.spacing[2])))(image)
    assert torch.allclose(ours.tensor, theirs.data, atol=1e-4) and np.allclose(ours.affine, theirs.affine)


@pytest.mark.parametrize("n", range(1, 50, 6))
def test_an_axis_that_stays_keeps_every_slice_exactly(n):
    image = tio.ScalarImage(tensor=torch.arange(4.0 * n).reshape(1, 2, 2, n), affine=np.diag([1, 1, 1 / n / 3, 1]))
    assert torch.allclose(standardize(image, Preprocessing((None,) * 3, zscore=False)).tensor, image.data, atol=1e-4)


def test_clip_shift_scale_and_padding_by_hand():
    image = tio.ScalarImage(tensor=torch.tensor([-500.0, 101.0, 178.0]).reshape(1, 1, 1, 3))
    fixed = Preprocessing((None,) * 3, clip=(-79, 304), shift=101, scale=77, min_size=(2, 1, 4), zscore=False)
    result = standardize(image, fixed)
    assert result.padding == (1, 0, 0, 0, 1, 0)
    assert torch.allclose(result.tensor[0, :, 0], torch.tensor([[0, 0, 0, 0], [0, -180 / 77, 0, 1]]))
    assert np.allclose(result.affine[:3, 3], [-1, 0, -1])
    network_input = preprocess(image, fixed)
    assert torch.allclose(network_input.tensor, zscore(result.tensor)) and network_input.padding == result.padding


def test_labels_share_the_grid_of_their_image_and_stay_labels():
    label = torch.randint(0, 4, (1, 30, 28, 6), generator=torch.Generator().manual_seed(0)).byte()
    recipe = Preprocessing((1.1, 1.9, None), min_size=(40, 40, 8))
    result = standardize_label(tio.LabelMap(tensor=label, affine=OBLIQUE), recipe)
    image = standardize(tio.ScalarImage(tensor=label.float(), affine=OBLIQUE), recipe)
    assert result.dtype == torch.uint8 and result.shape == image.tensor.shape[1:]
    assert set(result.unique().tolist()) == {0, 1, 2, 3}


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 17), st.integers(3, 17), st.integers(1, 6)), st.floats(0.6, 4), st.sampled_from([1, 200])
)
def test_probabilities_come_back_on_the_original_grid(shape, spacing_mm, slab_voxels):
    """A constant stays one up to the borders, and a linear function stays linear inside."""
    reference = tio.ScalarImage(tensor=world_ramp(shape, OBLIQUE), affine=OBLIQUE)
    there = standardize(reference, Preprocessing((spacing_mm, spacing_mm, None), min_size=(9, 9, 4), zscore=False))
    both = torch.cat([there.tensor, torch.ones_like(there.tensor)])
    grid = Grid(reference.spatial_shape, reference.affine)
    ramp, one = whole(to_original_grid(one_slab(both), 0, there, grid, slab_voxels))
    assert ramp.shape == shape and torch.allclose(one, torch.ones(shape))
    margin = int(np.ceil(spacing_mm / 1.4)) + 1
    inside = tuple(slice(margin, -margin) for _ in range(2))
    assert torch.allclose(ramp[inside], reference.data[0][inside], atol=1e-3)


def test_real_labels_survive_the_round_trip():
    if not ACDC.is_dir():
        pytest.skip("the shared ACDC patients are not beside this checkout")
    path = ACDC / "patient002" / "patient002_frame01_gt.nii.gz"
    label, recipe = in_own_frame(read_label(path, 4), "LPS", tio.LabelMap), Preprocessing((1.25, 1.25, None))
    there = standardize_label(label, recipe)
    grid = standardize(read_image(path, "LPS"), recipe)
    one_hot = torch.nn.functional.one_hot(there.long(), 4).permute(3, 0, 1, 2)
    original = Grid(label.spatial_shape, label.affine)
    back = whole(to_original_grid(one_slab(one_hot), 0, grid, original)).argmax(0)
    for k in range(1, 4):
        ours, truth = back == k, label.data[0] == k
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
    assert crop_or_pad(torch.tensor([[1, 2, 3]]), shape, crop).tolist() == [expected]


@settings(deadline=None)
@given(*[st.tuples(*[st.integers(1, 9)] * 3)] * 2)
def test_crop_or_pad_agrees_with_torchio(size, wanted):
    volume = torch.arange(1, 1 + int(np.prod(size))).reshape(1, *size)
    assert torch.equal(crop_or_pad(volume, wanted), tio.CropOrPad(wanted)(volume))

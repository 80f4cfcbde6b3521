"""The one reader and writer: labels, images of any type, what is written and named."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import SHAPE, VOXELS, oblique, oriented, write
from PIL import Image

from lib.data import images
from lib.data.geometry import codes
from lib.system.error import InputError
from lib.system.files import write_atomically


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_are_finite_and_not_all_the_same(tmp_path, value):
    array = VOXELS.astype(np.float32)
    array[1, 2, 0] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        images.read_image(write(tmp_path / "a.nii", array))
    with pytest.raises(InputError, match="all voxels are 7"):
        images.read_image(write(tmp_path / "a.nii", np.full(SHAPE, 7, np.uint8)))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("suffix", ["mha", "nrrd", "tif"])
def test_images_of_other_types_are_finite_and_not_all_the_same(tmp_path, suffix, value):
    path = tmp_path / f"a.{suffix}"
    array = VOXELS[..., :1].astype(np.float32)
    for wrong, message in ((value, "NaN or infinite"), (0, "all voxels are 0")):
        array[1, 2, 0] = wrong
        picture = sitk.GetImageFromArray(array[..., 0].T if suffix == "tif" else array.T)
        sitk.WriteImage(picture, path)
        with pytest.raises(InputError, match=rf"a\.{suffix}: .*{message}"):
            images.read_image(path)
        array[:] = 0


def test_reading_loads_no_torch_and_nothing_that_other_types_need():
    late = {"torch", "torchio", "SimpleITK", "PIL"}
    code = f"import sys, lib.data.nifti, lib.evaluation; sys.exit(bool({late} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- one volume in files of several types


@settings(deadline=None, max_examples=40)
@given(
    orientation=st.sampled_from(["RAS", "LPS", "SPL", "AIR"]) | st.none(),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64]),
    suffix=st.sampled_from([".mha", ".nrrd", ".gipl", ".nii.gz", ".nii"]),
)
def test_one_volume_is_the_same_in_every_type(tmp_path_factory, orientation, dtype, suffix):
    """nibabel writes it, SimpleITK writes it again, and both see what is read."""
    folder = tmp_path_factory.getbasetemp()
    original, path = folder / "original.nii.gz", folder / f"as_{suffix[1:]}{suffix}"  # ITK mixes a.nii with a.nii.gz
    affine = oblique() if orientation is None else oriented(orientation)
    if suffix == ".gipl":  # which stores no directions, and no long integers
        dtype = np.int16 if dtype == np.int32 else dtype
        affine = np.diag([-1.5, -1.25, 4, 1])
    nib.save(nib.Nifti1Image(VOXELS.astype(dtype), affine), original)
    sitk.WriteImage(sitk.ReadImage(original), path)
    ours, first = images.read(path), images.read(original)
    assert ours.array.dtype == first.array.dtype == dtype and ours.array.flags.f_contiguous
    np.testing.assert_array_equal(ours.array, nib.load(original).dataobj)
    np.testing.assert_array_equal(ours.array.T, sitk.GetArrayFromImage(sitk.ReadImage(path)))
    np.testing.assert_allclose(ours.geometry.affine, affine, atol=1e-4)
    assert ours.geometry.shape == SHAPE == images.read_geometry(path).shape and images.n_channels(path) == 1
    assert codes(ours.geometry) == codes(first.geometry) == "".join(nib.aff2axcodes(affine))
    assert ours.n_bytes == path.stat().st_size and ours.sha256 != first.sha256


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".nii.gz", ".nii", ".gipl"])
@pytest.mark.parametrize("image", [".mha", ".nrrd", ".nii"])
def test_labels_are_written_where_the_image_is(tmp_path, image, suffix):
    affine = np.diag([-1.5, -1.25, 4, 1]) if suffix == ".gipl" else oblique()
    nib.save(nib.Nifti1Image(VOXELS, affine), tmp_path / "start.nii")
    sitk.WriteImage(sitk.ReadImage(tmp_path / "start.nii"), tmp_path / f"image{image}")
    source = images.read_image(tmp_path / f"image{image}")
    path, again = tmp_path / f"labels{suffix}", tmp_path / f"again{suffix}"
    images.write(path, LABELS.astype(np.uint8), source.header)
    write_atomically(again, lambda temporary: images.write(temporary, LABELS.astype(np.uint8), source.header))
    assert path.read_bytes() == again.read_bytes()
    labels = images.read_label(path, 4)
    np.testing.assert_array_equal(labels.array, LABELS)
    np.testing.assert_allclose(labels.geometry.affine, source.geometry.affine, atol=1e-4)
    written = sitk.ReadImage(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written).T, LABELS)
    for ask in ("GetSpacing", "GetOrigin", "GetDirection"):
        expected = getattr(sitk.ReadImage(source.path), ask)()
        np.testing.assert_allclose(getattr(written, ask)(), expected, atol=1e-4)


def test_a_nii_file_is_not_compressed(tmp_path):
    header = images.read(write(tmp_path / "a.nii.gz")).header
    images.write(tmp_path / "b.nii", VOXELS, header)
    images.write(tmp_path / "b.nii.gz", VOXELS, header)
    assert (tmp_path / "b.nii").read_bytes()[352:] == VOXELS.tobytes(order="F")
    assert (tmp_path / "b.nii.gz").read_bytes()[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("values", "dtype"), [((0, 1, 4, 2), np.uint8), ((0, 255, 85, 170), np.uint8), ((0, 300, 1, 65535), np.uint16)]
)
@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".png", ".tif"])
def test_labels_are_written_with_the_values_of_the_data_set(tmp_path, suffix, values, dtype):
    labels, path = LABELS[..., :1].astype(np.uint8), tmp_path / f"labels{suffix}"
    header = images.read(write(tmp_path / "a.nii", VOXELS[..., :1])).header
    images.write(path, labels, header, values)
    assert images.read(path).array.dtype == dtype
    np.testing.assert_array_equal(images.read(path).array, np.array(values)[labels])
    np.testing.assert_array_equal(images.read_label(path, 4, values=values).array, labels)


@pytest.mark.parametrize(("suffix", "label"), [(".bmp", 256), (".png", 65536), (".tif", 65536), (".gipl", 65536)])
def test_a_label_that_a_type_cannot_hold_is_refused(tmp_path, suffix, label):
    header = images.read(write(tmp_path / "a.nii", VOXELS[..., :1])).header
    with pytest.raises(InputError, match=rf"b\{suffix}: \{suffix} files cannot hold the label {label}; "):
        images.write(tmp_path / f"b{suffix}", LABELS[..., :1] % 2, header, (0, label))
    if suffix != ".gipl":
        with pytest.raises(InputError, match="cannot hold 3 slices"):
            images.write(tmp_path / f"b{suffix}", LABELS.astype(np.uint8), header)


# ---- channels


def test_a_file_gives_all_its_channels(tmp_path):
    array = np.random.default_rng(0).normal(size=(5, 4, 3, 2)).astype(np.float32)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    for suffix in (".mha", ".nrrd"):
        sitk.WriteImage(
            sitk.GetImageFromArray(np.moveaxis(array.T, 0, -1), isVector=True), tmp_path / f"vector{suffix}"
        )
        sitk.WriteImage(sitk.GetImageFromArray(array.T, isVector=False), tmp_path / f"fourth{suffix}")
    for name in ("a.nii.gz", "vector.mha", "fourth.mha", "vector.nrrd", "fourth.nrrd"):
        path = tmp_path / name
        channels = images.read_channels_of(path)
        assert len(channels) == images.n_channels(path) == 2 and len({v.sha256 for v in channels}) == 1
        for i, volume in enumerate(channels):
            assert volume.array.dtype == np.float32 and volume.geometry.shape == SHAPE
            np.testing.assert_array_equal(volume.array, array[..., i])
            images.write(tmp_path / "labels.nii", LABELS.astype(np.uint8), volume.header)
            np.testing.assert_array_equal(images.read_label(tmp_path / "labels.nii", 4).array, LABELS)
        with pytest.raises(InputError, match=f"{name}: must be one"):
            images.read(path)
    array[0, 0, 0, 1] = np.nan
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"a\.nii\.gz: has NaN"):
        images.read_channels_of(tmp_path / "a.nii.gz")


# ---- labels

LABELS = np.arange(60).reshape(SHAPE) % 4


@pytest.mark.parametrize(("slope", "inter"), [(0.99999, 0), (1.0001, 0), (1, 0.0009), (0.5, 0)])
def test_what_lies_near_a_label_is_this_label(tmp_path, slope, inter):
    stored = (LABELS * (2 if slope == 0.5 else 1)).astype(np.uint8)
    volume = images.read_label(write(tmp_path / "a.nii.gz", stored, scl_slope=slope, scl_inter=inter), 4)
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, LABELS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.int8])
def test_labels_of_any_type(tmp_path, dtype):
    values = LABELS.astype(dtype) + (np.float32(1e-7) if np.dtype(dtype).kind == "f" else 0)
    np.testing.assert_array_equal(images.read_label(write(tmp_path / "a.nii", values.astype(dtype)), 4).array, LABELS)


@pytest.mark.parametrize(
    ("value", "dtype", "named"),
    [
        (4, np.uint8, "4"),
        (-1, np.int16, "-1"),
        (256, np.int32, "256"),
        (1.5, np.float32, "1.5"),
        (1.002, np.float64, "1.002"),
        (0.9985, np.float64, "0.9985"),
        (3.9999, np.float64, "3.9999"),
        (-0.4, np.float32, "-0.4000000059604645"),
        (np.nan, np.float32, "nan"),
        (np.inf, np.float64, "inf"),
        (1e30, np.float32, "1.0000000150474662e+30"),
    ],
)
def test_other_values_are_named_with_all_their_digits(tmp_path, value, dtype, named):
    values = LABELS.astype(dtype)
    values[0, 0, :2] = value
    with pytest.raises(InputError) as error:
        images.read_label(write(tmp_path / "a.nii.gz", values), 4)
    path = tmp_path / "a.nii.gz"
    assert str(error.value).startswith(
        f"{path}: has the label {named} in 2 voxels, but the labels of this data set are"
    )


def test_some_labels_count_as_others(tmp_path):
    path = write(tmp_path / "a.nii", LABELS.astype(np.uint8))
    np.testing.assert_array_equal(images.read_label(path, 3, {3: 1}).array, np.where(LABELS == 3, 1, LABELS))
    np.testing.assert_array_equal(images.read_label(path, 2, {2: 0, 3: 1}).array, LABELS % 2)
    with pytest.raises(InputError, match="label 2 in 15 voxels"):
        images.read_label(path, 2, {3: 1})


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_more_labels_than_a_byte_holds(tmp_path, dtype):
    path = write(tmp_path / "a.nii.gz", np.resize([0, 255, 256, 300], SHAPE).astype(dtype))
    for n_classes, merged, kind, expected in [
        (301, {}, np.int16, [0, 255, 256, 300]),
        (256, {256: 1, 300: 2}, np.uint8, [0, 255, 1, 2]),
    ]:
        labels = images.read_label(path, n_classes, merged).array
        assert labels.dtype == kind == images.label_type(n_classes) and labels.flags.f_contiguous
        np.testing.assert_array_equal(labels, np.resize(expected, SHAPE))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_values_become_classes(tmp_path, dtype):
    values = (0, 4, 1)
    stored = np.array([0, 4, 1, 7])[LABELS]
    path = write(tmp_path / "a.nii", stored.astype(dtype))
    labels = images.read_label(path, 3, values=values, ignore=7).array
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(images.read_label(path, 3, {7: 2}, values).array, np.where(LABELS == 3, 2, LABELS))
    with pytest.raises(InputError) as error:
        images.read_label(path, 3, values=values)
    expected = f"{path}: has the label {dtype(7).item()} in 15 voxels, but the labels of this data set are 0, 4, 1; "
    assert str(error.value) == expected + "correct them (its values are 0, 1, 4, 7)"


def test_values_between_those_declared_are_no_labels(tmp_path):
    path = write(tmp_path / "a.nii", LABELS.astype(np.uint8))
    with pytest.raises(
        InputError, match=r"label 2 in 15 voxels, 3 in 15 voxels, but .* are 0, 1, 4; .*\(its values are"
    ):
        images.read_label(path, 3, values=(0, 1, 4))


def test_the_ignored_label_needs_room(tmp_path):
    path = write(tmp_path / "a.nii", np.resize([0, 255, 256], SHAPE).astype(np.int16))
    labels = images.read_label(path, 256, ignore=256).array
    assert labels.dtype == np.int16 and labels.max() == 256
    with pytest.raises(InputError, match="the whole numbers 0 to 254, and 256 to be ignored; correct"):
        images.read_label(path, 255, ignore=256)


@pytest.mark.parametrize(
    ("stored", "cause"),
    [
        ([0, 255], "values are 0, 255; a mask that was scaled to 0 ... 255?"),
        (range(255), r"values are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...; a mask that was scaled"),
        ([0, 14.2], r"values are 0, 14.2\)"),
    ],
)
def test_the_likely_cause_of_wrong_labels_is_named(tmp_path, stored, cause):
    stored = np.resize(list(stored), (16, 16, 2))
    path = write(tmp_path / "a.nii", stored.astype(np.float32), dim=[3, 16, 16, 2, 1, 1, 1, 1])
    with pytest.raises(InputError, match=cause):
        images.read_label(path, 2)


def test_colours_are_labels_only_if_they_are_grey(tmp_path):
    grey = (LABELS[..., 0].T % 3).astype(np.uint8)
    for n in (2, 3, 4):
        colours = np.stack([grey] * n, -1)
        if n != 3:
            colours[..., -1] = 255
        Image.fromarray(colours).save(tmp_path / "a.png")
        np.testing.assert_array_equal(images.read_label(tmp_path / "a.png", 3).array[..., 0].T, grey)
    Image.fromarray(np.stack([grey, grey, 2 - grey], -1)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: is a colour image; store labels as grey values"):
        images.read_label(tmp_path / "a.png", 3)


# ---- names


def test_two_files_that_claim_to_be_one_thing_are_refused(tmp_path):
    assert images.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"]) is None
    (tmp_path / "a.nii").touch()
    assert images.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"]) == tmp_path / "a.nii"
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"^case: both .*a\.nii\.gz and .*a\.nii are there"):
        images.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"])


def test_names_without_their_endings(tmp_path):
    for suffix in images.SUFFIXES:
        assert images.stem(tmp_path / f"case.1{suffix}") == "case.1"
        assert images.stem(tmp_path / f".case{suffix}") is None
    assert images.stem(tmp_path / "case.txt") is images.stem(tmp_path / "case") is None
    assert images.stem(tmp_path / "case.png", images.NIFTI) is None

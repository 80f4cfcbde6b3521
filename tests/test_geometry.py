"""Where voxels are: geometry against SimpleITK, the order and directions of the axes, one grid or two."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.affines import from_matvec
from niftis import MM, SHAPE, VOXELS, by_itk, headers, oblique, oriented, write

from lib.data import geometry, nifti
from lib.system.error import InputError

sitk.ProcessObject.SetGlobalWarningDisplay(False)


# ---- what a header says


def differ_by_turns_alone(fields):
    """Whether two forms have one origin, and axes along the same lines. ITK compares singular vectors then, whose signs
    are chance, and may take them for the same; that is where we differ: they are not."""
    image = nib.Nifti1Image(VOXELS, None)
    for field, value in fields.items():
        image.header[field] = value
    forms = image.header.get_qform(), image.header.get_sform()
    if fields["qform_code"] <= 0 or fields["sform_code"] <= 1 or not np.allclose(*(form[:3, 3] for form in forms)):
        return False
    axes = [form[:3, :3] / np.maximum(np.linalg.norm(form[:3, :3], axis=0), 1e-9) for form in forms]
    return not np.allclose(*axes, atol=1e-3) and np.allclose(np.sort(np.abs(axes[0].T @ axes[1])), [0, 0, 1], atol=1e-3)


@settings(deadline=None, max_examples=300)
@given(headers())
def test_the_geometry_of_any_header_is_itks(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "header.nii"
    assume(not differ_by_turns_alone(fields))
    expected = by_itk(write(path, **fields))
    if expected is None:
        with pytest.raises(InputError, match=r"header\.nii: .*right angles"):
            nifti.read_geometry(path)
        return
    found = nifti.read_geometry(path)
    assert found.shape == SHAPE
    np.testing.assert_allclose(found.spacing_mm, expected[0], rtol=1e-6)
    np.testing.assert_allclose(found.directions, expected[1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.origin_mm, expected[2], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, 1, 1), (1, np.nan, 1), (1, 1, np.inf)], ids=str)
def test_a_voxel_size_that_no_volume_has_is_refused(tmp_path, sizes):
    path = write(tmp_path / "a.nii", pixdim=[1, *sizes, 0, 0, 0, 0])
    for reader in (nifti.read, nifti.read_geometry):
        with pytest.raises(InputError, match=r"a\.nii: the voxel size is .*mend the header"):
            reader(path)


@pytest.mark.parametrize(("units", "factor"), [(1, 1000), (2, 1), (3, 0.001), (0, 1)])
def test_lengths_are_in_millimetres(tmp_path, units, factor):
    sform = {"srow_x": [-2, 0, 0, 5], "srow_y": [0, -2, 0, 6], "srow_z": [0, 0, 4, 7]}
    path = write(tmp_path / "a.nii.gz", pixdim=[1, 2, 2, 4, 0, 0, 0, 0], xyzt_units=units, **sform)
    found = nifti.read_geometry(path)
    assert found.spacing_mm == (2 * factor, 2 * factor, 4 * factor)
    np.testing.assert_allclose(found.affine[:3], np.array([[-2, 0, 0, 5], [0, -2, 0, 6], [0, 0, 4, 7]]) * factor)


# ---- order and directions of the axes

CODES = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]


def volume_of(tmp_path, affine, array=VOXELS, name="a.nii"):
    path = tmp_path / name
    nib.save(nib.Nifti1Image(array, affine), path)
    return nifti.read(path)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("codes", CODES)
def test_every_order_becomes_the_same_volume_and_goes_back(tmp_path, codes):
    reference = volume_of(tmp_path, oblique())
    image = nib.load(reference.path)
    start = nib.io_orientation(image.affine)
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes)))
    nib.save(turned, tmp_path / "b.nii")
    stored = nifti.read(tmp_path / "b.nii")
    for wanted in ("RAS", "LPS", "IPL"):
        ours, expected = geometry.oriented(stored, wanted), geometry.oriented(reference, wanted)
        np.testing.assert_array_equal(ours.array, expected.array)
        assert ours.array.flags.f_contiguous and ours.geometry.spacing_mm == expected.geometry.spacing_mm
        np.testing.assert_allclose(ours.geometry.affine, expected.geometry.affine, atol=1e-4)
        assert "".join(nib.aff2axcodes(ours.geometry.affine)) == wanted
        np.testing.assert_array_equal(geometry.in_stored_order(ours.array, stored.geometry, wanted), stored.array)
        more = np.stack([ours.array, -ours.array], -1)
        np.testing.assert_array_equal(geometry.in_stored_order(more, stored.geometry, wanted)[..., 1], -stored.array)
        assert_same(geometry.in_order(stored.geometry, wanted), ours.geometry)
        assert [stored.array.shape[axis] for axis in geometry.axes_of(stored.geometry, wanted)] == list(
            ours.array.shape
        )


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.floats(-3, 3)] * 3), st.sampled_from(CODES))
def test_a_voxel_keeps_its_place_in_the_world(angles, codes):
    turn = nib.eulerangles.euler2mat(*angles)
    place = geometry.Geometry(SHAPE, (1.0, 2.0, 3.0), turn, np.array([5.0, -7.0, 11.0]))
    volume = geometry.Volume("a.nii", VOXELS, place, None, 0, "")
    turned = geometry.oriented(volume, codes)
    for value in (0, 17, 59):
        before, after = (np.argwhere(v.array == value)[0] for v in (volume, turned))
        places = [nib.affines.apply_affine(v.geometry.affine, k) for v, k in ((volume, before), (turned, after))]
        np.testing.assert_allclose(*places, atol=1e-9)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIL", "SRA"])
def test_a_truth_in_another_order_is_brought_to_its_image(tmp_path, codes):
    image = volume_of(tmp_path, oriented("IPL"))
    other = nib.load(image.path)
    start = nib.io_orientation(other.affine)
    other = other.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes)))
    nib.save(other, tmp_path / "b.nii")
    np.testing.assert_array_equal(geometry.aligned(nifti.read(tmp_path / "b.nii"), image).array, VOXELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (from_matvec(np.eye(3), [0.0005, 0, 0]), None),
        (from_matvec(np.eye(3), [0, -0.015, 0]), None),  # just below a hundredth of a voxel
        (from_matvec(np.eye(3), [0, 0.017, 0]), "elsewhere in the world"),
        (from_matvec(np.eye(3), [0, 0, 10]), "by up to 10 mm"),
        (np.diag([1.01, 1, 1, 1]), "elsewhere in the world"),
        (from_matvec(nib.eulerangles.euler2mat(0.1)), "elsewhere in the world"),
    ],
)
def test_a_truth_that_lies_elsewhere_is_refused(tmp_path, change, message):
    image, other = volume_of(tmp_path, np.diag([*MM, 1])), volume_of(tmp_path, change @ np.diag([*MM, 1]), name="b.nii")
    if message is None:
        assert geometry.aligned(other, image).geometry is image.geometry
        return
    with pytest.raises(InputError, match=rf"b\.nii: .*{message}.*mend the header") as error:
        geometry.aligned(other, image)
    assert str(image.path) in str(error.value)


def test_a_truth_of_another_shape_is_refused(tmp_path):
    image, other = volume_of(tmp_path, np.eye(4)), volume_of(tmp_path, np.eye(4), VOXELS[:, :, :2], "b.nii")
    with pytest.raises(InputError, match=r"b\.nii: its shape \(5, 4, 2\) is not \(5, 4, 3\), that of .*a\.nii"):
        geometry.aligned(other, image)

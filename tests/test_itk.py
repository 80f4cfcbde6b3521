"""Files of ITK: integrity, headers, and what is no volume."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from niftis import LPS

from lib.data import images, itk
from lib.data.geometry import Geometry, PlainHeader
from lib.system.error import InputError

sitk.ProcessObject.SetGlobalWarningDisplay(False)
ARRAY = np.random.default_rng(0).integers(0, 4, (3, 4, 5)).astype(np.uint8)  # (z, y, x)


def write(path, array=ARRAY, compress=False, spacing=(1.5, 1.25, 4.0), vector=False):
    image = sitk.GetImageFromArray(np.asarray(array), isVector=vector)
    image.SetSpacing(spacing[: image.GetDimension()])
    sitk.WriteImage(image, path, useCompression=compress)
    return path


def assert_refused(path, capfd, words="cannot be read as an image"):
    for reader in (images.read_image, lambda path: images.read_label(path, 4)):
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(error.value).startswith(f"{path}: {words}") and "\n" not in str(error.value)
        assert "0x" not in str(error.value) and ".cxx" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # ITK's own lines


# ---- integrity


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".gipl"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, suffix, compress, capfd):
    path = write(tmp_path / f"a{suffix}", compress=compress)
    whole = path.read_bytes()
    for n in (*range(0, len(whole) - 1, 7), len(whole) - 1):
        path.write_bytes(whole[:n])
        assert_refused(path, capfd)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_compressed_voxels_that_are_damaged_are_refused(tmp_path, suffix, capfd):
    path = write(tmp_path / f"a{suffix}", compress=True)
    whole = path.read_bytes()
    for place in (len(whole) - 2, len(whole) - 20):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        assert_refused(path, capfd)
    start = itk.HEADERS[suffix].match(whole).end()
    for n in (59, 61):
        voxels = (gzip if suffix == ".nrrd" else zlib).compress(bytes(n))
        header = whole[:start].replace(b"CompressedDataSize = %d" % (len(whole) - start), b"CompressedDataSize = 9")
        path.write_bytes(header + voxels)
        assert_refused(path, capfd)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_header_may_promise_no_more_than_its_file_can_hold(tmp_path, suffix, capfd):
    path = write(tmp_path / f"a{suffix}", compress=True)
    path.write_bytes(path.read_bytes().replace(b"5 4 3", b"50000 40000 30000"))
    assert_refused(path, capfd, "cannot be read as an image (its 60000000000000 bytes of voxels cannot be in")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd", ".gipl"])
def test_what_is_another_type_or_not_there(tmp_path, suffix, capfd):
    path = tmp_path / f"a{suffix}"
    for content in (b"", b"some text\n\n", gzip.compress(b"a"), bytes(348), b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        assert_refused(path, capfd)
    path.unlink()
    with pytest.raises(InputError, match=r"a\..*: cannot be read \(No such file or directory\)"):
        images.read(path)
    with pytest.raises(InputError, match=r"a\..*: cannot be read \(No such file or directory\)"):
        images.read_geometry(path)


def test_voxels_in_another_file_are_refused(tmp_path, capfd):
    for suffix, old, new in (
        (".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = other.raw"),
        (".nrrd", b"\n\n", b"\ndata file: other.raw\n\n"),
    ):
        path = write(tmp_path / f"a{suffix}")
        (tmp_path / "other.raw").write_bytes(ARRAY.tobytes())
        path.write_bytes(path.read_bytes().replace(old, new))
        assert_refused(path, capfd)


@pytest.mark.parametrize(
    ("suffix", "old", "new"),
    [
        (".mha", b"TransformMatrix = 1 0 0 0", b"TransformMatrix = 1 0 0 0.5"),
        (".mha", b"ElementSpacing = 1.5", b"ElementSpacing = 0"),
        (".nrrd", b"(1.5,0,0) (0,1.25,0)", b"(1.5,0,0) (0.5,1.25,0)"),
        (".nrrd", b"origin: (0,0,0)", b"origin: (0,inf,0)"),
    ],
)
def test_what_has_no_sound_geometry_is_refused(tmp_path, suffix, old, new):
    path = write(tmp_path / f"a{suffix}")
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    for reader in (images.read, images.read_geometry):
        with pytest.raises(InputError, match=rf"a\{suffix}: (its affine|the voxel size|cannot be read)"):
            reader(path)


def test_what_is_not_one_volume_for_each_channel(tmp_path):
    path = write(tmp_path / "a.nrrd", np.zeros((2, 3, 4, 5, 2)), vector=True, spacing=(1,) * 4)
    with pytest.raises(InputError, match=r"a\.nrrd: must be one volume, or one for each channel, but its shape is"):
        images.n_channels(path)
    path = write(tmp_path / "b.nrrd", np.zeros((3, 4, 5), np.complex64))
    with pytest.raises(InputError, match=r"b\.nrrd: its voxels are complex.*, not real numbers"):
        images.read(path)


# ---- geometry


@settings(deadline=None, max_examples=40)
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.01, 30)] * 3),
    origin_mm=st.tuples(*[st.floats(-500, 500)] * 3),
    suffix=st.sampled_from([".mha", ".nrrd"]),
)
def test_any_geometry_goes_into_a_file_and_comes_back(tmp_path_factory, angles, spacing_mm, origin_mm, suffix):
    path = tmp_path_factory.getbasetemp() / f"a{suffix}"
    turn = sitk.Euler3DTransform((0, 0, 0), *angles).GetMatrix()
    place = Geometry((5, 4, 3), spacing_mm, np.reshape(turn, (3, 3)), np.array(origin_mm))
    images.write(path, ARRAY.T, PlainHeader(place))
    found = images.read(path)
    np.testing.assert_array_equal(found.array, ARRAY.T)
    np.testing.assert_allclose(found.geometry.affine, place.affine, rtol=0, atol=1e-9)
    image = sitk.ReadImage(path)
    for index in ((0, 0, 0), (4, 3, 2)):
        world = LPS @ image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(world, (place.affine @ [*index, 1])[:3], atol=1e-6)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_flat_image_is_one_thick_slice_and_stays_flat(tmp_path, suffix):
    image = sitk.GetImageFromArray(ARRAY[0])
    image.SetSpacing((0.5, 0.25))
    image.SetOrigin((3, 4))
    image.SetDirection((0, 1, -1, 0))
    sitk.WriteImage(image, tmp_path / f"a{suffix}")
    volume = images.read(tmp_path / f"a{suffix}")
    assert volume.geometry.shape == (5, 4, 1) and volume.geometry.spacing_mm == (0.5, 0.25, 499.5)
    np.testing.assert_array_equal(volume.geometry.origin_mm, [-3, -4, 0])
    images.write(tmp_path / f"b{suffix}", volume.array, volume.header)
    again = sitk.ReadImage(tmp_path / f"b{suffix}")
    assert again.GetSize() == (5, 4) and again.GetSpacing() == (0.5, 0.25) and again.GetOrigin() == (3, 4)
    assert again.GetDirection() == image.GetDirection()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), ARRAY[0])

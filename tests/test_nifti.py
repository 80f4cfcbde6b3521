"""NIfTI files: integrity, voxels as nibabel has them, and what is written."""

import gzip
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from niftis import SHAPE, VOXELS, by_itk, headers, write

from lib.data import images, nifti
from lib.system.error import InputError

sitk.ProcessObject.SetGlobalWarningDisplay(False)
LABELS = np.arange(60).reshape(SHAPE) % 4


# ---- integrity


def trailer(raw):
    return struct.pack("<II", zlib.crc32(raw), len(raw))


DAMAGES = {
    "other voxels": lambda raw, gz: gzip.compress(raw[:400] + bytes([raw[400] ^ 1]) + raw[401:])[:-8] + trailer(raw),
    "other checksum": lambda raw, gz: gz[:-8] + bytes([gz[-8] ^ 255]) + gz[-7:],
    "other length": lambda raw, gz: gz[:-4] + struct.pack("<I", len(raw) + 1),
    "no trailer": lambda raw, gz: gz[:-8],
    "half a trailer": lambda raw, gz: gz[:-3],
    "cut": lambda raw, gz: gz[: len(gz) // 2],
    "cut before it was compressed": lambda raw, gz: gzip.compress(raw[:-1]),
    "text behind": lambda raw, gz: gz + b"these bytes belong to no gzip stream",
    "one byte behind": lambda raw, gz: gz + b"\x1f",
    "half a member behind": lambda raw, gz: gz + gz[:20],
    "text behind zeros": lambda raw, gz: gz + bytes(9) + b"text",
    "voxels behind": lambda raw, gz: gzip.compress(raw + b"\1\2"),
    "a member with voxels behind": lambda raw, gz: gz + gzip.compress(b"\1\2"),
    "empty": lambda raw, gz: b"",
    "not compressed": lambda raw, gz: raw,
    "a header alone": lambda raw, gz: gzip.compress(raw[:348]),
    "half a header": lambda raw, gz: gzip.compress(raw[:100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file(tmp_path, damage):
    path = write(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8))
    gz = path.read_bytes()
    path.write_bytes(DAMAGES[damage](gzip.decompress(gz), gz))
    for reader in (images.read_image, lambda path: images.read_label(path, 4)):
        with pytest.raises(InputError) as error:
            reader(path)
        assert str(error.value).startswith(f"{path}: cannot be read") and "\n" not in str(error.value)


def test_uncompressed_files_that_are_too_short_or_too_long(tmp_path):
    whole = write(tmp_path / "a.nii").read_bytes()
    for content in (whole[:-1], whole + b"\0\0x", whole[:350], b""):
        (tmp_path / "b.nii").write_bytes(content)
        with pytest.raises(InputError, match=r"b\.nii: cannot be read"):
            nifti.read(tmp_path / "b.nii")
    (tmp_path / "b.nii").write_bytes(whole + bytes(160))
    np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii").array, VOXELS)


@pytest.mark.parametrize("layout", ["members", "zeros", "member of nothing"])
def test_gzip_files_that_are_unusual_and_sound(tmp_path, layout):
    path = write(tmp_path / "a.nii.gz")
    raw, gz = gzip.decompress(path.read_bytes()), path.read_bytes()
    content = {
        "members": gzip.compress(raw[:200]) + gzip.compress(raw[200:401]) + gzip.compress(raw[401:]),
        "zeros": gz + bytes(512),
        "member of nothing": gz + gzip.compress(b""),
    }
    path.write_bytes(content[layout])
    np.testing.assert_array_equal(nifti.read(path).array, VOXELS)


def test_a_header_may_promise_no_more_than_its_file_can_hold(tmp_path):
    path = write(tmp_path / "a.nii.gz", dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    with pytest.raises(InputError, match="cannot be in"):
        nifti.read(path)
    for offset in (-1, 100, 352.5, np.nan, 1e30):
        with pytest.raises(InputError, match="voxels begin"):
            nifti.read(write(path, vox_offset=offset))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2), (4, 5, 6, 1, 3)])
def test_what_is_not_one_volume(tmp_path, shape):
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)
    with pytest.raises(InputError, match=r"must be one 3D volume, but its shape is \("):
        nifti.read(path)


def test_a_fourth_axis_holds_the_channels(tmp_path):
    array = np.arange(120, dtype=">i2").reshape(4, 5, 6, 1)
    array = np.concatenate([array, -array], 3)
    for shape in ((4, 5, 6, 2), (4, 5, 6, 1, 2)):
        image = nib.Nifti1Image(array.reshape(shape), np.diag([1.5, 2, 3, 1]))
        image.header.set_slope_inter(0.5, 3)
        path = tmp_path / "a.nii.gz"
        nib.save(image, path)
        expected = nib.load(path).get_fdata().reshape(4, 5, 6, 2)
        channels = nifti.read_channels(path)
        assert nifti.n_channels(path) == len(channels) == 2 and nifti.read_geometry(path).shape == (4, 5, 6)
        for i, volume in enumerate(channels):
            np.testing.assert_allclose(volume.array, expected[..., i])
            assert volume.header.get_data_shape() == volume.geometry.shape == (4, 5, 6)
            assert volume.array.flags.f_contiguous
    alone = write(tmp_path / "b.nii")
    assert nifti.n_channels(alone) == len(nifti.read_channels(alone)) == 1


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 6, 2, 3)])
def test_what_is_not_one_volume_for_each_channel(tmp_path, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), tmp_path / "a.nii.gz")
    for reader in (nifti.read_channels, nifti.n_channels, nifti.read_geometry):
        with pytest.raises(InputError, match=r"must be one 3D volume, but its shape is \("):
            reader(tmp_path / "a.nii.gz")


def test_voxels_that_are_no_real_numbers(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.complex64), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(InputError, match="complex64, not real numbers"):
        nifti.read(tmp_path / "a.nii")


# ---- voxels


@pytest.mark.parametrize("more_axes", [(), (1,), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f8", ">f4", "u1"])
def test_voxels_are_read_as_nibabel_reads_them(tmp_path, more_axes, kind, dtype):
    header = kind.header_class(endianness=dtype[0] if dtype[0] in "<>" else "<")
    header.set_data_dtype(dtype)
    array = VOXELS.astype(dtype).reshape(*SHAPE, *more_axes)
    for path in (tmp_path / "a.nii", tmp_path / "a.nii.gz"):
        nib.save(kind(array, np.eye(4), header), path)
        volume = nifti.read(path)
        assert volume.array.dtype == np.dtype(dtype).newbyteorder("=") and volume.array.shape == SHAPE
        np.testing.assert_array_equal(volume.array, np.asarray(nib.load(path).dataobj).reshape(SHAPE))


def test_scaled_intensities_are_those_of_nibabel(tmp_path):
    path = write(tmp_path / "a.nii.gz", scl_slope=0.37, scl_inter=-1024)
    expected = nib.load(path).get_fdata(dtype=np.float32)
    volume = images.read_image(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(images.read_image(write(path, scl_slope=0, scl_inter=5)).array, VOXELS)  # no scaling


# ---- writing


@settings(deadline=None, max_examples=60)
@given(headers())
def test_what_is_written_keeps_the_header(tmp_path_factory, fields):
    folder = tmp_path_factory.getbasetemp()
    assume(by_itk(write(folder / "original.nii", **fields)) is not None)
    original = nifti.read(folder / "original.nii")
    nifti.write(folder / "labels.nii.gz", LABELS.astype(np.uint8), original.header)
    nifti.write(folder / "probabilities.nii.gz", np.ones((*SHAPE, 4), np.float32), original.header)
    for name in ("labels", "probabilities"):
        stored = nib.Nifti1Header(gzip.decompress((folder / f"{name}.nii.gz").read_bytes())[:348], check=False)
        for field in nifti.GEOMETRY:
            np.testing.assert_array_equal(stored[field], original.header[field])
    np.testing.assert_array_equal(images.read_label(folder / "labels.nii.gz", 4).array, LABELS)


def test_extensions_and_codes_that_nibabel_does_not_know_are_kept(tmp_path):
    image = nib.Nifti1Image(VOXELS, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"from a scanner"))
    nib.save(image, tmp_path / "a.nii")
    original = nifti.read(tmp_path / "a.nii")
    np.testing.assert_array_equal(original.array, VOXELS)
    original.header["sform_code"] = 7
    nifti.write(tmp_path / "b.nii.gz", original.array, original.header)
    written = nifti.read(tmp_path / "b.nii.gz")
    assert written.header["sform_code"] == 7 and written.header.extensions[0].get_content() == b"from a scanner"
    np.testing.assert_array_equal(written.array, VOXELS)


# ---- for the log


def test_the_log_names_a_disagreement_on_the_voxel_size_once(tmp_path):
    agree = write(tmp_path / "agree.nii")
    unit = {"srow_x": [-1, 0, 0, 0], "srow_y": [0, -1, 0, 0], "srow_z": [0, 0, 1, 0]}
    first, second = (write(tmp_path / name, **unit) for name in ("a.nii.gz", "b.nii.gz"))
    assert nifti.scale_note([agree]) is None
    assert nifti.scale_note([first]) == (
        f"{first}: the voxel size is 1.5625 x 1.5625 x 10 mm by pixdim, 1 x 1 x 1 mm by the sform; pixdim's is taken"
    )
    assert nifti.scale_note([agree, first, second]).startswith(f"{first} (and 1 more files): ")
    assert nifti.scale_note([write(tmp_path / "c.nii", **unit, sform_code=0, qform_code=1)]) is None

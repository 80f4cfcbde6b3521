"""The one reader and writer: geometry against SimpleITK, integrity, labels, orientation, what is written."""

import gzip
import itertools
import struct
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nibabel.affines import from_matvec
from niftis import oblique, oriented

from lib.data import nifti
from lib.system.error import InputError

sitk.ProcessObject.SetGlobalWarningDisplay(False)
LPS = np.diag([-1.0, -1.0, 1.0])  # ITK's world, in nibabel's
SHAPE = (5, 4, 3)
VOXELS = np.arange(60, dtype=np.int16).reshape(SHAPE)
MM = (1.5625, 1.5625, 10.0)


def write(path, array=VOXELS, affine=None, **fields):
    """A file with these fields in its header, whatever they are."""
    array = np.asarray(array)
    image = nib.Nifti1Image(array, np.diag([*MM, 1.0]) if affine is None else affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm")
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw), mtime=0) if path.suffix == ".gz" else bytes(raw))
    return path


# ---- geometry


def by_itk(path):
    """Spacing, directions and origin in RAS as SimpleITK reads them; None if it refuses."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    directions = LPS @ np.reshape(reader.GetDirection(), (3, 3))
    return np.array(reader.GetSpacing()), directions, LPS @ reader.GetOrigin()


@st.composite
def headers(draw):
    """Fields of a header: forms with any code, scales that agree or not, flips, permutations, oblique directions."""
    numbers = st.floats(-200, 200, width=32)

    def directions():
        flips = np.array(draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3)))
        straight = np.eye(3)[list(draw(st.permutations(range(3))))] * flips
        angles = draw(st.sampled_from([(0, 0, 0), (0.1, -0.2, 0.05)])) or draw(st.tuples(*[st.floats(-3, 3)] * 3))
        return nib.eulerangles.euler2mat(*angles) @ straight

    sizes = st.tuples(*[st.sampled_from([0.5, 1.0, 1.5625, 3.22, 10.0])] * 3)
    pixdim, turn, origin = np.array(draw(sizes)), directions(), draw(st.tuples(*[numbers] * 3))
    qform = from_matvec(turn * pixdim, origin)
    sform = qform.copy()
    other = draw(st.sampled_from(["same", "scale", "turn", "origin", "shear", "zero", "unit"]))
    if other in ("scale", "unit"):
        sform[:3, :3] = turn * (draw(sizes) if other == "scale" else 1)
    elif other == "turn":
        sform[:3, :3] = directions() * pixdim
    elif other == "origin":
        sform[:3, 3] = draw(st.tuples(*[numbers] * 3))
    elif other == "shear":
        sform[:3, 0] += 0.3 * sform[:3, 1]
    elif other == "zero":
        sform[:3, draw(st.integers(0, 2))] = 0
    header = nib.Nifti1Header()
    header.set_data_shape(SHAPE)
    header["pixdim"][1:4] = pixdim
    header.set_qform(qform, 1)
    fields = {name: header[name] for name in nifti.GEOMETRY}
    fields |= dict(zip(("srow_x", "srow_y", "srow_z"), sform[:3], strict=True))
    fields["qform_code"], fields["sform_code"] = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    fields["pixdim"][1:4] = pixdim
    return fields | {"xyzt_units": draw(st.sampled_from([0, 1, 2, 3, 10]))}


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
    for reader in (nifti.read_image, lambda path: nifti.read_label(path, 4)):
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
    volume = nifti.read_image(path)
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(nifti.read_image(write(path, scl_slope=0, scl_inter=5)).array, VOXELS)  # no scaling


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_are_finite_and_not_all_the_same(tmp_path, value):
    array = VOXELS.astype(np.float32)
    array[1, 2, 0] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        nifti.read_image(write(tmp_path / "a.nii", array))
    with pytest.raises(InputError, match="all voxels are 7"):
        nifti.read_image(write(tmp_path / "a.nii", np.full(SHAPE, 7, np.uint8)))


def test_reading_loads_no_torch():
    code = "import sys, lib.data.nifti, lib.evaluation; sys.exit('torch' in sys.modules or 'torchio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- labels

LABELS = np.arange(60).reshape(SHAPE) % 4


@pytest.mark.parametrize(("slope", "inter"), [(0.99999, 0), (1.0001, 0), (1, 0.0009), (0.5, 0)])
def test_what_lies_near_a_label_is_this_label(tmp_path, slope, inter):
    stored = (LABELS * (2 if slope == 0.5 else 1)).astype(np.uint8)
    volume = nifti.read_label(write(tmp_path / "a.nii.gz", stored, scl_slope=slope, scl_inter=inter), 4)
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, LABELS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.int8])
def test_labels_of_any_type(tmp_path, dtype):
    values = LABELS.astype(dtype) + (np.float32(1e-7) if np.dtype(dtype).kind == "f" else 0)
    np.testing.assert_array_equal(nifti.read_label(write(tmp_path / "a.nii", values.astype(dtype)), 4).array, LABELS)


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
        nifti.read_label(write(tmp_path / "a.nii.gz", values), 4)
    path = tmp_path / "a.nii.gz"
    assert str(error.value).startswith(
        f"{path}: has the label {named} in 2 voxels, but the labels of this data set are"
    )


def test_some_labels_count_as_others(tmp_path):
    path = write(tmp_path / "a.nii", LABELS.astype(np.uint8))
    np.testing.assert_array_equal(nifti.read_label(path, 3, {3: 1}).array, np.where(LABELS == 3, 1, LABELS))
    np.testing.assert_array_equal(nifti.read_label(path, 2, {2: 0, 3: 1}).array, LABELS % 2)
    with pytest.raises(InputError, match="label 2 in 15 voxels"):
        nifti.read_label(path, 2, {3: 1})


# ---- order and directions of the axes

CODES = ["".join(c) for axes in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*axes)]


def volume_of(tmp_path, affine, array=VOXELS, name="a.nii"):
    path = tmp_path / name
    nib.save(nib.Nifti1Image(array, affine), path)
    return nifti.read(path)


@pytest.mark.parametrize("codes", CODES)
def test_every_order_becomes_the_same_volume_and_goes_back(tmp_path, codes):
    reference = volume_of(tmp_path, oblique())
    image = nib.load(reference.path)
    start = nib.io_orientation(image.affine)
    turned = image.as_reoriented(nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes)))
    nib.save(turned, tmp_path / "b.nii")
    stored = nifti.read(tmp_path / "b.nii")
    for wanted in ("RAS", "LPS", "IPL"):
        ours, expected = nifti.oriented(stored, wanted), nifti.oriented(reference, wanted)
        np.testing.assert_array_equal(ours.array, expected.array)
        assert ours.array.flags.f_contiguous and ours.geometry.spacing_mm == expected.geometry.spacing_mm
        np.testing.assert_allclose(ours.geometry.affine, expected.geometry.affine, atol=1e-4)
        assert "".join(nib.aff2axcodes(ours.geometry.affine)) == wanted
        np.testing.assert_array_equal(nifti.in_stored_order(ours.array, stored.geometry, wanted), stored.array)
        more = np.stack([ours.array, -ours.array], -1)
        np.testing.assert_array_equal(nifti.in_stored_order(more, stored.geometry, wanted)[..., 1], -stored.array)
        assert [stored.array.shape[axis] for axis in nifti.axes_of(stored.geometry, wanted)] == list(ours.array.shape)


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.floats(-3, 3)] * 3), st.sampled_from(CODES))
def test_a_voxel_keeps_its_place_in_the_world(angles, codes):
    turn = nib.eulerangles.euler2mat(*angles)
    geometry = nifti.Geometry(SHAPE, (1.0, 2.0, 3.0), turn, np.array([5.0, -7.0, 11.0]))
    volume = nifti.Volume("a.nii", VOXELS, geometry, None, 0, "")
    turned = nifti.oriented(volume, codes)
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
    np.testing.assert_array_equal(nifti.aligned(nifti.read(tmp_path / "b.nii"), image).array, VOXELS)


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
        assert nifti.aligned(other, image).geometry is image.geometry
        return
    with pytest.raises(InputError, match=rf"b\.nii: .*{message}.*mend the header") as error:
        nifti.aligned(other, image)
    assert str(image.path) in str(error.value)


def test_a_truth_of_another_shape_is_refused(tmp_path):
    image, other = volume_of(tmp_path, np.eye(4)), volume_of(tmp_path, np.eye(4), VOXELS[:, :, :2], "b.nii")
    with pytest.raises(InputError, match=r"b\.nii: its shape \(5, 4, 2\) is not \(5, 4, 3\), that of .*a\.nii"):
        nifti.aligned(other, image)


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
    np.testing.assert_array_equal(nifti.read_label(folder / "labels.nii.gz", 4).array, LABELS)


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


# ---- names


def test_two_files_that_claim_to_be_one_thing_are_refused(tmp_path):
    assert nifti.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"]) is None
    (tmp_path / "a.nii").touch()
    assert nifti.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"]) == tmp_path / "a.nii"
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(InputError, match=r"^case: both .*a\.nii\.gz and .*a\.nii are there"):
        nifti.only("case", [tmp_path / "a.nii.gz", tmp_path / "a.nii"])

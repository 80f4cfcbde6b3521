"""Small NIfTI files with all that a header may hold, for the tests."""

import gzip

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import strategies as st
from nibabel.affines import from_matvec
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from lib.data.nifti import GEOMETRY

LPS = np.diag([-1.0, -1.0, 1.0])  # ITK's world, in nibabel's
SHAPE = (5, 4, 3)
VOXELS = np.arange(60, dtype=np.int16).reshape(SHAPE)
MM = (1.5625, 1.5625, 10.0)


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
    """Two halves of a box along its longest axis, 100 and 900, with a little noise; odd codes and units."""
    data = np.random.default_rng(3).integers(95, 105, shape)
    longest = int(np.argmax(shape))
    np.moveaxis(data, longest, 0)[shape[longest] // 2 :] += 800
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


def write_patients(folder, patients):
    """A tiny ACDC: one frame each of 20 x 20 x 2 voxels, three rectangles."""
    for patient in patients:
        rng = np.random.default_rng(patient)
        label = np.zeros((20, 20, 2), np.uint8)
        for value, (x, y) in enumerate(rng.integers(2, 12, (3, 2)), start=1):
            label[x : x + 6, y : y + 6] = value
        place = folder / f"patient{patient:03}"
        place.mkdir(parents=True)
        for array, end in ((label * 50 + rng.normal(0, 5, label.shape).astype("f4"), ""), (label, "_gt")):
            nib.save(
                nib.Nifti1Image(array, np.diag([-1.25, -1.25, 10, 1])), place / f"{place.name}_frame01{end}.nii.gz"
            )


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
    fields = {name: header[name] for name in GEOMETRY}
    fields |= dict(zip(("srow_x", "srow_y", "srow_z"), sform[:3], strict=True))
    fields["qform_code"], fields["sform_code"] = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    fields["pixdim"][1:4] = pixdim
    return fields | {"xyzt_units": draw(st.sampled_from([0, 1, 2, 3, 10]))}

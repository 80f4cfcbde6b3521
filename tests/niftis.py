"""Small NIfTI files with all that a header may hold, for the tests."""

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform


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

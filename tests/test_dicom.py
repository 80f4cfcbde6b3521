"""DICOM series, which these tests write themselves: where their voxels are, and what makes them no volume."""

import locale
import os
import random
import shutil
import struct
from contextlib import contextmanager

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation

from lib.data import dicom, images
from lib.data.BaseDataset import Preprocessing
from lib.data.dicom import Slices, is_dicom, series_in
from lib.data.preprocessing import read_channels
from lib.record import source_identity
from lib.system.error import InputError

SHAPE, SPACING, ORIGIN = (7, 6, 5), (0.8, 1.1, 2.5), (-31.5, 12.25, 140.0)  # columns, rows, slices; LPS
DIRECTIONS = {
    "axial": np.eye(3),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float).T @ np.eye(3),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], float),
    "oblique": Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix(),
}


def voxels(seed=0, low=-900):
    return np.random.default_rng(seed).integers(low, 1500, SHAPE).astype(np.int16)


@contextmanager
def kept_locale():
    """GDCM, where it writes, leaves another locale behind, in which Python reads text of its children as ASCII."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def write_series(folder, array=None, directions="axial", uid="1.2.3.4", number="3", description="T1 axial", **how):
    """A series of one file for each slice, under names that say nothing; the files in the order of the slices.

    how: `skip` slices, `heights` (mm) instead of even ones, `shear` (mm) of each in a row's direction, `spacing` within
    the slices, `prefix` of the names."""
    folder.mkdir(parents=True, exist_ok=True)
    array = voxels() if array is None else array
    matrix = DIRECTIONS[directions] if isinstance(directions, str) else directions
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    names = [f"{how.get('prefix', 'IM')}{i:04d}" for i in range(array.shape[2])]
    random.Random(5).shuffle(names)
    files = []
    for k, name in enumerate(names):
        if k in how.get("skip", ()):
            continue
        height = how["heights"][k] if "heights" in how else k * SPACING[2]
        position = np.array(ORIGIN) + height * matrix[:, 2] + k * how.get("shear", 0.0) * matrix[:, 0]
        image = sitk.GetImageFromArray(np.ascontiguousarray(array[:, :, k].T)[None])
        image.SetSpacing((*how.get("spacing", SPACING[:2]), 1.0))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",  # CT
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0008|0018": f"{uid}.{k + 1}",
            "0020|0011": number,
            "0008|103e": description,
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{x:.6f}" for x in position),
            "0020|0037": "\\".join(f"{x:.6f}" for x in matrix[:, :2].T.ravel()),
        }
        for tag, value in tags.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{name}.dcm"))
        with kept_locale():
            writer.Execute(image)
        files.append(folder / f"{name}.dcm")
    return files


def scale(path, slope, intercept):
    """Say what the voxels of a file are to be multiplied by, and what is added then: SimpleITK writes 1 and 0."""
    data = path.read_bytes()
    pixels = data.index(b"\xe0\x7f\x10\x00")
    before = data.find(b"\x28\x00\x52\x10")
    elements = b""
    for tag, value in ((0x1052, intercept), (0x1053, slope)):
        text = f"{value:.6f}".encode()
        text += b" " * (len(text) % 2)
        elements += struct.pack("<HHI", 0x28, tag, len(text)) + text
    path.write_bytes(data[: pixels if before < 0 else before] + elements + data[pixels:])


def ending_taken_away(files):
    return [path.rename(path.with_suffix("")) for path in files]


def refused(folder, *words):
    with pytest.raises(InputError) as caught:
        series_in(folder)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_voxels_are_where_they_were_in_the_world(tmp_path, directions):
    array = voxels()
    files = ending_taken_away(write_series(tmp_path / "study", array, directions))
    found, notes = series_in(tmp_path / "study")
    assert list(found) == ["study"] and notes == []
    assert list(found["study"]) == files  # in the order of the slices, whatever their names
    volume = images.read_image(found["study"])
    np.testing.assert_array_equal(volume.array, array)
    assert volume.array.dtype == np.float32
    matrix = DIRECTIONS[directions]
    for index in ((0, 0, 0), (6, 0, 0), (0, 5, 0), (3, 2, 4)):
        lps = np.array(ORIGIN) + matrix @ (np.array(index) * SPACING)
        np.testing.assert_allclose((volume.geometry.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-4)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_agrees_with_itks_own_reader_of_series(tmp_path, directions):
    write_series(tmp_path, voxels(), directions)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    theirs = reader.Execute()
    (slices,) = series_in(tmp_path)[0].values()
    ours = images.read_image(slices)
    np.testing.assert_array_equal(ours.array, sitk.GetArrayFromImage(theirs).T)
    for index in ((0, 0, 0), (6, 5, 4)):
        lps = np.array(theirs.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((ours.geometry.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-3)


def test_a_prediction_is_nifti_on_the_grid_of_the_series(tmp_path):
    write_series(tmp_path / "a", directions="oblique")
    (slices,) = series_in(tmp_path / "a")[0].values()
    volume = images.read_image(slices)
    images.write(tmp_path / "out.nii.gz", np.asfortranarray(np.ones(SHAPE, np.uint8)), volume.header)
    written = nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_allclose(written.affine, volume.geometry.affine, atol=1e-4)
    assert written.shape == SHAPE and int(written.header["sform_code"]) == int(written.header["qform_code"]) == 1


def test_each_slice_has_its_own_scale(tmp_path):
    array, slopes = voxels(), [0.5, 1, 2, 0.125, 8]
    for path, slope in zip(write_series(tmp_path, array), slopes, strict=True):
        scale(path, slope, -3)
    (slices,) = series_in(tmp_path)[0].values()
    np.testing.assert_array_equal(images.read_image(slices).array, array * np.array(slopes, np.float32) - 3)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16])
def test_types_of_voxels(tmp_path, kind):
    array = voxels(low=0).clip(0, 255).astype(kind) if kind == np.uint8 else voxels(low=0).astype(kind) * 20
    write_series(tmp_path, array)
    (slices,) = series_in(tmp_path)[0].values()
    np.testing.assert_array_equal(images.read_image(slices).array, array)


def test_several_series_of_one_folder_are_told_apart_and_so_are_those_of_several(tmp_path):
    first, second = voxels(1), voxels(2)
    write_series(tmp_path / "mixed", first, uid="1.2.1", number="3", description="T1", prefix="A")
    write_series(tmp_path / "mixed", second, uid="1.2.2", number="4", description="T2 / fat:sat", prefix="B")
    found, _ = series_in(tmp_path / "mixed")
    assert set(found) == {"mixed_3_T1", "mixed_4_T2_fat_sat"}
    np.testing.assert_array_equal(images.read_image(found["mixed_3_T1"]).array, first)
    np.testing.assert_array_equal(images.read_image(found["mixed_4_T2_fat_sat"]).array, second)

    write_series(tmp_path / "study" / "pat 1" / "SE0", first, uid="1.2.1")
    write_series(tmp_path / "study" / "pät 2" / "SE0", second, uid="1.2.2")
    found, _ = series_in(tmp_path / "study")
    assert set(found) == {"pat_1_SE0", "pät_2_SE0"}
    np.testing.assert_array_equal(images.read_image(found["pät_2_SE0"]).array, second)

    write_series(tmp_path / "same", first, uid="1.2.1", prefix="A")
    write_series(tmp_path / "same", second, uid="1.2.2", prefix="B")
    assert set(series_in(tmp_path / "same")[0]) == {"same_3_T1_axial_1.2.1", "same_3_T1_axial_1.2.2"}


def test_a_path_may_have_spaces_and_letters_of_any_alphabet(tmp_path):
    array, place = voxels(), tmp_path / "Röntgen 画像 (neu)"
    write_series(tmp_path / "plain", array)
    shutil.move(tmp_path / "plain", place)
    found, _ = series_in(place)
    assert list(found) == ["Röntgen_画像_(neu)"]
    np.testing.assert_array_equal(images.read_image(found["Röntgen_画像_(neu)"]).array, array)


def test_what_is_no_volume_is_left_out_and_named(tmp_path):
    write_series(tmp_path / "study", uid="1.2.1", prefix="A")
    write_series(tmp_path / "study", voxels()[:, :, :1], uid="1.2.2", description="Scout", prefix="B")
    localizer = {"uid": "1.2.3", "description": "3-plane"}
    write_series(tmp_path / "study", voxels()[:, :, :2], prefix="C", **localizer)
    write_series(tmp_path / "study", voxels()[:, :, :2], "sagittal", prefix="D", **localizer)
    (tmp_path / "study" / "notes.txt").write_text("no DICOM at all")
    (tmp_path / "study" / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(200))
    found, notes = series_in(tmp_path / "study")
    assert list(found) == ["study"]
    assert len(notes) == 3 and "leaves out DICOMDIR" in notes[0]
    assert any("'3 Scout'" in line and "a single slice" in line for line in notes)
    assert any("'3 3-plane'" in line and "a localizer" in line for line in notes)


def test_dicom_without_any_image_is_refused(tmp_path):
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(200))
    refused(tmp_path, str(tmp_path), "DICOMDIR", "no image")


def test_a_folder_without_dicom_has_no_series(tmp_path):
    (tmp_path / "image.nii.gz").write_bytes(b"x" * 500)
    (tmp_path / ".hidden").mkdir()
    write_series(tmp_path / ".hidden")
    assert series_in(tmp_path) == ({}, [])
    assert not is_dicom(tmp_path / "image.nii.gz") and not is_dicom(tmp_path / "gone")


@pytest.mark.parametrize(("skip", "what"), [((2,), "a slice is missing"), ((2, 3), "2 slices are missing")])
def test_a_missing_slice_is_named(tmp_path, skip, what):
    array = np.concatenate([voxels(), voxels(1)], 2)
    files = write_series(tmp_path, array, skip=skip)
    mm = [140 + 2.5 * k for k in (1, 1 + 1 + len(skip))]
    names = [
        f"{files[1].name} ({mm[0]:.2f} mm, instance 2)",
        f"{files[2].name} ({mm[1]:.2f} mm, instance {3 + len(skip)})",
    ]
    refused(
        tmp_path, str(tmp_path), what, f"between {names[0]} and {names[1]}", "2.5 mm apart", "export the whole series"
    )


def test_a_slice_that_is_there_twice_is_named(tmp_path):
    files = write_series(tmp_path)
    again = tmp_path / "again.dcm"
    shutil.copy(files[3], again)
    refused(tmp_path, "two slices lie at 147.50 mm", files[3].name, "again.dcm", "one point in time")


def test_uneven_and_sheared_slices_are_refused(tmp_path):
    write_series(tmp_path / "uneven", heights=[0, 2.5, 5, 8.7, 11.2])
    refused(tmp_path / "uneven", "not evenly spaced: 2.5 mm, but 3.70 mm between")
    write_series(tmp_path / "tilted", shear=0.5)
    refused(tmp_path / "tilted", "sheared by 11.3 degrees (a tilted gantry)")
    write_series(tmp_path / "rounded", heights=[0, 2.501, 4.999, 7.5, 10.0])
    assert len(series_in(tmp_path / "rounded")[0]) == 1


def add(folder, **how):
    """One more slice, added.dcm, above the others."""
    one = write_series(folder / "x", voxels()[:, :, :1], heights=[12.5], prefix="Z", **how)[0]
    shutil.move(one, folder / "added.dcm")
    return folder / "added.dcm"


def test_slices_of_another_grid_are_refused(tmp_path):
    for name, how, what in (
        ("a", {"spacing": (0.8, 1.2)}, "its voxel size is not that of"),
        ("b", {"directions": Rotation.from_euler("z", 2, degrees=True).as_matrix()}, "its orientation is not that of"),
    ):
        write_series(tmp_path / name)
        add(tmp_path / name, **how)
        refused(tmp_path / name, what, "give a folder of one series")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b"-31.5\\12.25\\", b"-31.5+12.25\\", "does not say where it lies"),
        (b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\0\\0", "not at right angles"),
    ],
)
def test_a_slice_without_its_place_is_refused(tmp_path, old, new, what):
    write_series(tmp_path)
    path = add(tmp_path)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    refused(tmp_path, "added.dcm", what)


def test_slices_of_another_size_are_refused(tmp_path):
    write_series(tmp_path)
    added = write_series(tmp_path / "x", voxels()[:5, :, :1], heights=[12.5], prefix="Z")[0]
    shutil.move(added, tmp_path / "added.dcm")
    refused(tmp_path, "its size is not that of")


def test_what_is_no_grey_slice_is_refused(tmp_path):
    write_series(tmp_path / "one", voxels()[:, :, :1])
    refused(tmp_path / "one", "a single slice")
    colours = sitk.Image([6, 7, 1], sitk.sitkVectorUInt8, 3)
    (tmp_path / "rgb").mkdir()
    with kept_locale():
        sitk.WriteImage(colours, str(tmp_path / "rgb" / "a.dcm"))
    refused(tmp_path / "rgb", "a.dcm: is a colour image")
    (tmp_path / "frames").mkdir()
    with kept_locale():
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7), np.uint8)), str(tmp_path / "frames" / "a.dcm"))
    refused(tmp_path / "frames", "a.dcm: is DICOM of 5 frames in one file")


def test_a_negative_is_refused(tmp_path):
    write_series(tmp_path)
    path = add(tmp_path)
    data = path.read_bytes()
    assert b"MONOCHROME2" in data
    path.write_bytes(data.replace(b"MONOCHROME2", b"MONOCHROME1"))
    refused(tmp_path, "added.dcm", "MONOCHROME1")


def test_a_file_with_too_few_voxels_is_named(tmp_path):
    """Its header is whole, and says so few."""
    array = np.random.default_rng(0).integers(0, 900, (40, 50, 5)).astype(np.int16)
    files = write_series(tmp_path, array)
    data = files[2].read_bytes()
    pixels = data.index(b"\xe0\x7f\x10\x00")
    files[2].write_bytes(data[:pixels] + b"\xe0\x7f\x10\x00" + struct.pack("<I", 2) + b"ab")
    refused(tmp_path, f"{files[2].name}: is cut off")


def test_a_file_that_is_cut_off_is_named(tmp_path, capfd):
    files = write_series(tmp_path)
    (slices,) = series_in(tmp_path)[0].values()
    data = files[2].read_bytes()
    files[2].write_bytes(data[: len(data) - 40])
    with pytest.raises(InputError, match=f"{files[2].name}: its voxels cannot be read") as caught:
        images.read_image(slices)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")


def test_reading_leaves_the_locale_as_it_is(tmp_path):
    write_series(tmp_path)
    before = locale.setlocale(locale.LC_ALL)
    (slices,) = series_in(tmp_path)[0].values()
    images.read_image(slices)
    assert locale.setlocale(locale.LC_ALL) == before


def test_a_series_is_preprocessed_as_the_same_volume_in_nifti(tmp_path):
    write_series(tmp_path / "a", directions="oblique")
    (slices,) = series_in(tmp_path / "a")[0].values()
    volume = images.read_image(slices)
    nib.save(nib.Nifti1Image(volume.array, volume.geometry.affine), tmp_path / "a.nii.gz")
    recipe = Preprocessing((1.0, 1.0, None), orientation="RAS")
    (ours, file), (theirs, _) = (read_channels(paths, recipe) for paths in (slices, [tmp_path / "a.nii.gz"]))
    np.testing.assert_array_equal(ours.array, theirs.array)
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)
    assert source_identity(*slices)["sha256"] == file.sha256 and file.n_bytes == sum(map(os.path.getsize, slices))


def test_the_slices_of_a_case_are_paths(tmp_path):
    files = write_series(tmp_path)
    (slices,) = series_in(tmp_path)[0].values()
    assert isinstance(slices, Slices) and slices == tuple(files) and slices[0].parent == tmp_path
    assert dicom.read(slices).path == files[0]

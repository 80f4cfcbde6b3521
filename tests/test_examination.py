"""The examination of one's own data: every fault is named before any work, and the fingerprint is right and kept."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image

from lib.data import fingerprint as fingerprints
from lib.data import raw
from lib.data.examination import examine
from lib.data.fingerprint import draws_per_case, fingerprint, measure
from lib.system.error import InputError

HIPPOCAMPI = Path(__file__).resolve().parents[2] / "shared" / "Task04_Hippocampus"
SHAPE = (7, 6, 5)
AFFINE = np.diag([-1.0, -2.0, 3.0, 1.0])
IDS = ("a", "b", "c")


def image_of(case, channel=0):
    """(7, 6, 5) int16, 0 at a border of one voxel."""
    image = np.zeros(SHAPE, np.int16)
    image[1:-1, 1:-1, 1:-1] = np.random.default_rng([ord(case), channel]).integers(1, 500, (5, 4, 3))
    return image


def label_of(_case):
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 2:4, 2], label[2:5, 2:4, 3] = 1, 2
    return label


def write_image(folder, case, array=None, affine=AFFINE, channel=0, ending=".nii.gz"):
    array = image_of(case, channel) if array is None else array
    nib.save(nib.Nifti1Image(array, affine), folder / "imagesTr" / f"{case}_{channel:04d}{ending}")


def write_label(folder, case, array=None, affine=AFFINE):
    nib.save(
        nib.Nifti1Image(label_of(case) if array is None else array, affine), folder / "labelsTr" / f"{case}.nii.gz"
    )


def write_json(folder, n=3, channels=("MRI",), ending=".nii.gz", **labels):
    fields = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {"background": 0, "one": 1, "two": 2} | labels,
        "numTraining": n,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(fields))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three sound cases of one channel. Few intensities are drawn, which is fast."""
    monkeypatch.setattr(fingerprints, "N_DRAWS", 10**5)
    folder = tmp_path / "Dataset001_Mine"
    for place in ("imagesTr", "labelsTr"):
        (folder / place).mkdir(parents=True)
    for case in IDS:
        write_image(folder, case)
        write_label(folder, case)
    write_json(folder)
    return folder


def examined(folder, **options):
    return examine(raw.read_dataset(folder), folder, folder.parent / "cache", **options)


def problems(folder, **options):
    """The lines behind the headline; nothing was written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as error:
        examined(folder, **options)
    headline, *lines = str(error.value).split("\n  ")
    assert headline == f"{folder}: {len(lines)} problem{'s' * (len(lines) > 1)}:"
    assert not (folder.parent / "cache").exists() and sorted(folder.rglob("*")) == before
    return lines


def test_a_sound_data_set(folder):
    found = examined(folder)
    assert (found.n_training, found.orientation, found.turned, found.notes) == (3, "LPS", (), [])
    cases = [measure([image_of(c)], label_of(c) > 0, (1.0, 2.0, 3.0), draws_per_case(3)) for c in IDS]
    assert found.fingerprint == fingerprint(cases)
    assert found.fingerprint.shapes == ((3, 4, 5),) * 3 and found.fingerprint.spacings == ((3.0, 2.0, 1.0),) * 3
    assert found.fingerprint.relative_size == 60 / 210


def test_kept_by_content(folder, capsys):
    def said():
        return capsys.readouterr().err

    first = examined(folder)
    assert "examining Dataset001_Mine" in said()
    (path,) = (folder.parent / "cache").iterdir()
    before = path.stat().st_mtime_ns
    assert examined(folder) == first and said() == "" and path.stat().st_mtime_ns == before
    write_image(folder, "b", image_of("x"))
    second = examined(folder)
    assert second != first and "1/1" in said()
    assert second.fingerprint.shapes == first.fingerprint.shapes
    write_json(folder, three=3)
    assert examined(folder).notes == ["no case has a voxel of three"] and "3/3" in said()
    write_json(folder)
    path.write_bytes(path.read_bytes()[:-100])
    assert examined(folder) == second and "3/3" in said()
    assert examined(folder) == second and said() == ""


def test_a_file_that_became_unsound_is_not_taken_from_the_cache(folder):
    examined(folder)
    write_label(folder, "c", label_of("c") * 127)
    with pytest.raises(InputError, match=r"labelsTr/c.nii.gz: has the values 0 .*, 127 \(6 voxels\), 254 \(6 voxels\)"):
        examined(folder)


def test_all_problems_at_once(folder):
    write_image(folder, "a", image_of("a").astype(np.float32) * np.nan)
    (folder / "labelsTr" / "b.nii.gz").unlink()
    path = folder / "imagesTr" / "c_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-30])
    write_label(folder, "c", label_of("c") * 5)
    write_image(folder, "d", np.zeros(SHAPE, np.int16))
    write_label(folder, "d")
    listed, *lines = problems(folder)
    wrong_number, *lines = lines
    assert listed.startswith("case b has no label") and wrong_number.startswith('"numTraining" is 3, but there are 4')
    assert [line.split(": ")[0] for line in lines] == [
        "imagesTr/a_0000.nii.gz",
        "imagesTr/c_0000.nii.gz",
        "labelsTr/c.nii.gz",
        "imagesTr/d_0000.nii.gz",
    ]
    nan, cut_off, values, constant = lines
    assert "NaN" in nan and "cannot be read" in cut_off and "all voxels are 0" in constant
    assert "0 (198 voxels), 5 (6 voxels), 10 (6 voxels), but the labels are 0, 1, 2; correct" in values


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            (label_of("a") > 0) * np.uint8(255),
            "0 (198 voxels), 255 (12 voxels), but the labels are 0, 1, 2; a black-and",
        ),
        (label_of("a") * 0.5, "0.5 (6 voxels), 1 (6 voxels), but the labels are 0, 1, 2; values between labels"),
        (label_of("a") + np.float32(0.01), "0.01 (198 voxels), 1.01 (6 voxels), 2.01 (6 voxels), but"),
        (
            np.arange(210, dtype=np.uint8).reshape(SHAPE),
            "19 (1 voxels) and 190 more, but the labels are 0, 1, 2; so many",
        ),
        (label_of("a").astype(np.int16) * -1, "has the values -2 (6 voxels), -1 (6 voxels), 0 (198 voxels), but"),
        (np.where(label_of("a"), np.float32(np.inf), 0), "has NaN or infinite voxels"),
        (label_of("a")[:6], "its shape (6, 6, 5) is not (7, 6, 5), that of imagesTr/a_0000.nii.gz"),
        (label_of("a")[..., None].repeat(2, -1), "labelsTr/a.nii.gz"),
    ],
)
def test_what_no_label_file_may_be(folder, label, message):
    write_label(folder, "a", label)
    (line,) = problems(folder)
    assert line.startswith("labelsTr/a.nii.gz: ") and message in line


def test_scaled_labels_that_are_whole_numbers_are_read(folder):
    write_label(folder, "a", label_of("a").astype(np.float32) + np.float32(1e-6))
    assert examined(folder).notes == []


@pytest.mark.parametrize(("off", "n"), [(1e-6, 0), (1e-4, 1)])
def test_voxel_sizes_must_be_equal(folder, off, n):
    write_label(folder, "b", affine=AFFINE * np.array([1 + off, 1, 1, 1]))
    if not n:
        assert examined(folder).n_training == 3
        return
    (line,) = problems(folder, allow_mismatch=True)
    assert line.startswith("labelsTr/b.nii.gz: its voxels of 1.0001") and "imagesTr/b_0000.nii.gz" in line


def test_other_places_are_refused_unless_they_are_allowed(folder):
    moved, flipped = AFFINE.copy(), AFFINE @ np.diag([-1, 1, 1, 1])
    moved[2, 3] = 1.0
    write_label(folder, "a", affine=moved)
    write_label(folder, "c", affine=flipped)
    first, second = problems(folder)
    assert first.startswith("labelsTr/a.nii.gz: lies elsewhere than the image, by up to 1 mm") and "RPS" in second
    assert "--allow_mismatch" in first and "origin (0, 0, 1) mm" in first
    found = examined(folder, allow_mismatch=True)
    note = "--allow_mismatch: 2 files lie elsewhere than their image: labelsTr/a.nii.gz, labelsTr/c.nii.gz"
    assert found.notes == [note] and found.turned == ()
    with pytest.raises(InputError, match=r"2 problems"):  # although the cases are kept
        examined(folder)


def test_channels_must_fit_one_another(folder):
    write_json(folder, channels=("T2", "ADC"))
    for case in IDS:
        write_image(folder, case, channel=1)
    assert len(examined(folder).fingerprint.intensities) == 2
    (folder.parent / "cache" / "Dataset001_Mine-examination.npz").unlink()
    (folder.parent / "cache").rmdir()
    write_image(folder, "a", image_of("a")[:-1], channel=1)
    write_image(folder, "b", affine=AFFINE * np.array([1.5, 1, 1, 1]), channel=1)
    moved = AFFINE.copy()
    moved[0, 3] = 9
    write_image(folder, "c", affine=moved, channel=1)
    shape, spacing, place = problems(folder)
    assert shape.startswith("imagesTr/a_0001.nii.gz: its shape") and spacing.startswith(
        "imagesTr/b_0001.nii.gz: its vox"
    )
    assert place.startswith("imagesTr/c_0001.nii.gz: lies elsewhere")


def test_one_file_may_hold_all_channels_and_must_hold_each(folder):
    write_json(folder, channels=("T2", "ADC"))
    for case in IDS:
        write_image(folder, case, np.stack([image_of(case), image_of(case, 1)], -1))
    statistics = examined(folder).fingerprint.intensities
    assert len(statistics) == 2 and statistics[0] != statistics[1]
    (folder.parent / "cache" / "Dataset001_Mine-examination.npz").unlink()
    (folder.parent / "cache").rmdir()
    write_image(folder, "b")
    assert problems(folder) == ["imagesTr/b_0000.nii.gz: has 1 channel, but dataset.json names 2: T2, ADC"]


def test_colour_images(folder):
    for path in folder.rglob("*.nii.gz"):
        path.unlink()
    write_json(folder, channels=("R", "G", "B"), ending=".png")
    for case in IDS:
        rgb = np.random.default_rng(ord(case)).integers(1, 255, (8, 10, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(folder / "imagesTr" / f"{case}_0000.png")
        Image.fromarray(np.eye(8, 10, dtype=np.uint8)).save(folder / "labelsTr" / f"{case}.png")
    found = examined(folder)
    assert found.fingerprint.shapes == ((1, 8, 10),) * 3 and found.fingerprint.spacings == ((999.0, 1.0, 1.0),) * 3
    assert len(found.fingerprint.intensities) == 3 and found.notes[-1] == "no case has a voxel of two"


def test_cases_that_are_stored_otherwise_are_turned(folder):
    straight = examined(folder)
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt("SRP"))
    image, label = (nib.Nifti1Image(f("b"), AFFINE).as_reoriented(turn) for f in (image_of, label_of))
    write_image(folder, "b", np.asarray(image.dataobj), image.affine)
    write_label(folder, "b", np.asarray(label.dataobj), label.affine)
    found = examined(folder)
    assert (found.orientation, found.turned) == ("LPS", ("b",))
    assert found.notes == ["1 of 3 cases are not stored as LPS, and are turned: b (SRP)"]
    assert found.fingerprint.shapes == straight.fingerprint.shapes
    assert found.fingerprint.spacings == straight.fingerprint.spacings


def test_what_is_to_be_ignored_is_no_foreground(folder):
    before = examined(folder)
    write_json(folder, ignore=3)
    label = label_of("a")
    label[3:5, 1:5, 1:4] = 3
    for case in IDS:
        write_label(folder, case, label)
    found = examined(folder)
    assert found.notes == [] and found.fingerprint.intensities != before.fingerprint.intensities
    foreground = (label > 0) & (label < 3)
    cases = [measure([image_of(c)], foreground, (1.0, 2.0, 3.0), draws_per_case(3)) for c in IDS]
    assert found.fingerprint == fingerprint(cases)


def test_empty_masks_and_absent_classes_are_noted(folder):
    write_label(folder, "b", label_of("b") * 0)
    write_json(folder, rare=3)
    assert examined(folder).notes == ["1 of 3 cases have nothing but background: b", "no case has a voxel of rare"]


def test_a_data_set_without_any_foreground_is_refused(folder):
    for case in IDS:
        write_label(folder, case, label_of(case) * 0)
    (line,) = problems(folder)
    assert line.startswith("no case has a voxel of any class but the background")


def test_one_image_under_two_names(folder):
    """Compressed once more a file has other bytes, but the same voxels."""
    path = folder / "imagesTr" / "a_0000.nii.gz"
    content = gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=1, mtime=7)
    (folder / "imagesTr" / "c_0000.nii.gz").write_bytes(content)
    (line,) = problems(folder)
    assert line.startswith("cases a, c hold the same image")


def test_no_more_lines_than_one_can_read(folder):
    for number in range(60):
        write_image(folder, f"x{number}", np.ones(SHAPE, np.int16))
        write_label(folder, f"x{number}")
    write_json(folder, 63)
    with pytest.raises(InputError) as error:
        examined(folder)
    lines = str(error.value).splitlines()
    assert lines[0].endswith(": 60 problems:") and len(lines) == 52 and lines[-1] == "  and 10 more"


def test_the_listing_is_heard_where_there_is_no_case_at_all(folder):
    for path in (folder / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "_000")))
    (line,) = problems(folder)
    assert "a_000.nii.gz" in line and "_0000.nii.gz" in line


def test_a_cache_that_cannot_be_written(folder):
    (folder.parent / "cache").write_text("in the way")
    with pytest.raises(InputError, match="--cache_path"):
        examined(folder)


def test_no_torch():
    code = "import sys, lib.data.examination; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.skipif(not HIPPOCAMPI.is_dir(), reason="the hippocampi (../shared) are not here")
def test_the_hippocampi(tmp_path):
    found = examine(raw.read_dataset(HIPPOCAMPI), HIPPOCAMPI, tmp_path)
    assert (found.n_training, found.orientation, found.turned, found.notes) == (200, "RAS", (), [])
    assert found.fingerprint.intensities[0]["mean"] == pytest.approx(22131.045, rel=1e-6)
    assert found.fingerprint.shapes[0] == (35, 51, 35)
    assert examine(raw.read_dataset(HIPPOCAMPI), HIPPOCAMPI, tmp_path) == found

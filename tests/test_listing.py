import json

import pytest
from raw_data import read_as, touch, two_cases, write_json, write_raw

from lib.data import raw
from lib.data.listing import listing


def problems(folder, **fields):
    return listing(read_as(folder, **fields), folder).problems


def test_hidden_files_are_skipped_and_counted(tmp_path):
    two_cases(tmp_path)
    touch(tmp_path, "imagesTr/._a_0000.nii.gz", "imagesTr/.DS_Store", "labelsTr/._a.nii.gz", "imagesTr/readme.nii.gz")
    (tmp_path / "imagesTr" / "folder_0000.nii.gz").mkdir()
    assert listing(read_as(tmp_path), tmp_path)[2:] == (
        [],
        [
            "imagesTr: skipped 2 hidden files (names that begin with a dot)",
            "imagesTr: left 1 other files aside (readme.nii.gz); expected NAME_0000.nii.gz",
            "labelsTr: skipped 1 hidden files (names that begin with a dot)",
        ],
    )


@pytest.mark.parametrize(
    "names, there",
    [
        ("a_000.nii.gz b_000.nii.gz c_000.nii.gz", "the files there are a_000.nii.gz, b_000.nii.gz, c_000.nii.gz"),
        ("a_0000.NII.GZ b c d", "the files there are a_0000.NII.GZ, b, c and 1 more"),
        (".hidden_0000.nii.gz", "it is empty"),
        ("a\n_0000.nii.gz", r"the files there are 'a\n_0000.nii.gz'"),
    ],
)
def test_no_image_found(tmp_path, names, there):
    touch(tmp_path, *(f"imagesTr/{name}" for name in names.split(" ")), "labelsTr/a.nii.gz")
    assert problems(tmp_path) == [f"{tmp_path / 'imagesTr'}: found no image: {there}, expected NAME_0000.nii.gz"]


def test_no_folder_of_images(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path}: has no folder imagesTr; put the images there as NAME_0000.nii.gz"]
    assert read_as(tmp_path).find(tmp_path) == []


def test_all_problems_at_once(tmp_path):
    two_cases(tmp_path, channels=2)
    touch(tmp_path, "imagesTr/c_0000.nii.gz", "imagesTr/c_0007.nii.gz", "labelsTr/c.nii.gz", "labelsTr/d.nii.gz")
    touch(tmp_path, "imagesTr/a_0002.nii.gz", "imagesTr/b_0001.nii", "imagesTs/t_0001.nii.gz")
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    dataset = read_as(tmp_path, channel_names={"0": "T2", "1": "ADC"}, numTraining=4)
    cases, tests, wrong, notes = listing(dataset, tmp_path)
    assert wrong == [
        "case a has channels 0000 0001 0002, needs 0000 0001 (T2, ADC)",
        "case c has channels 0000 0007, needs 0000 0001 (T2, ADC)",
        "case b has no label: labelsTr/b.nii.gz is not there",
        "labelsTr/d.nii.gz has no image: imagesTr/d_0000.nii.gz is not there",
        "imagesTr: both b_0001.nii.gz and b_0001.nii are there; take away the one that is not meant",
        '"numTraining" is 4, but there are 3 cases; correct it in dataset.json, or complete the files',
    ]
    assert [case.id for case in cases] == ["a", "b", "c"] and cases[1].label is None and len(tests) == 1
    assert "imagesTs: case t has channels 0001, needs 0000 0001 (T2, ADC); it cannot be predicted" in notes


def test_one_line_where_all_cases_have_the_same_wrong_channels(tmp_path):
    two_cases(tmp_path, channels=2)
    assert problems(tmp_path) == ["all 2 cases have channels 0000 0001, each needs 0000 (T2)"]


def test_one_file_may_hold_all_channels(tmp_path):
    two_cases(tmp_path)
    dataset = read_as(tmp_path, channel_names={"0": "R", "1": "G", "2": "B"})
    found = listing(dataset, tmp_path)
    assert found.problems == [] and found.notes == ["imagesTr: each case has one file, which must hold all 3 channels"]
    touch(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/a_0002.nii.gz")
    assert listing(dataset, tmp_path).problems == ["case b has channels 0000, needs 0000 0001 0002 (R, G, B)"]


def test_no_labels_at_all(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz")
    line = f"{tmp_path / 'labelsTr'}: no case has a label: there is no such folder, expected a.nii.gz"
    assert problems(tmp_path) == [line]
    touch(tmp_path, "labelsTr/a.nii")
    assert problems(tmp_path) == [line.replace("there is no such folder", "the files there are a.nii")]


def test_the_number_of_cases(tmp_path):
    two_cases(tmp_path)
    assert problems(tmp_path, numTraining=None) == problems(tmp_path, numTraining="2") == []
    for wrong in (3, "three", True, [2]):
        (line,) = problems(tmp_path, numTraining=wrong)
        assert line.startswith(f'"numTraining" is {wrong!r}, but there are 2 cases')


def test_the_training_list_against_the_folder(tmp_path):
    folder = write_raw(tmp_path / "Task01_X", n=3, layout="v1", channels=1, shape=(6, 6, 4))
    listed = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in ("c00", "c00", "c07")]
    content = json.loads((folder / "dataset.json").read_text())
    write_json(folder, **content | {"training": [*listed, "nonsense", {"label": 3}]})
    dataset = raw.read_dataset(folder)
    mend = 'correct "training" in dataset.json, or the files'
    assert listing(dataset, folder).problems == [
        f'"training" names c00 twice; {mend}',
        f'"training" names c07, which imagesTr does not have; {mend}',
        f'"training" does not name c01, c02, which imagesTr has; {mend}',
    ]


def test_the_sidecars_of_tiffs_are_no_strangers(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.tif", "labelsTr/a.tif", "imagesTr/a.json", "labelsTr/a.json", "imagesTr/notes.txt")
    dataset = read_as(tmp_path, file_ending=".tif", numTraining=1)
    assert listing(dataset, tmp_path)[2:] == (
        [],
        ["imagesTr: left 1 other files aside (notes.txt); expected NAME_0000.tif"],
    )

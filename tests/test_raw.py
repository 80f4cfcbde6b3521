import codecs
import json
import os
import pickle
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from raw_data import ACDC, DIRECTIONS, HIPPOCAMPUS, write_acdc, write_json, write_raw

from lib.data import raw
from lib.data.BaseDataset import Preprocessing
from lib.data.normalization import Normalization
from lib.system.error import InputError
from lib.system.files import LARGEST_JSON

V2 = {
    "channel_names": {"0": "T2"},
    "labels": {"background": 0, "tumor": 1},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def two_cases(folder, channels=1):
    """Names alone of cases a and b, in version 2's layout."""
    touch(folder, *(f"imagesTr/{id_}_{c:04d}.nii.gz" for id_ in "ab" for c in range(channels)))
    touch(folder, "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")


def read(folder, **fields):
    write_json(folder, **V2 | fields)
    return raw.read_dataset(folder)


def problems(folder, **fields):
    return raw.listing(read(folder, **fields), folder).problems


def error(call, *args, **fields):
    """The one line of an InputError."""
    with pytest.raises(InputError) as caught:
        call(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- layouts


@pytest.mark.parametrize("layout", DIRECTIONS)
def test_a_data_set_in_each_layout(tmp_path, layout):
    folder = write_raw(tmp_path / "Dataset001_Mine", layout=layout, tests=2, n=4)
    dataset = raw.read_dataset(folder)
    assert (dataset.name, dataset.class_names) == ("Dataset001_Mine", ("background", "kidney", "tumor"))
    assert (dataset.values, dataset.ignore, dataset.channels) == ((0, 1, 4), None, ("T2", "ADC"))
    assert (dataset.file_ending, dataset.licence, raw.n_labels(dataset)) == (".nii.gz", "CC0", 3)
    assert dataset.preprocessing == Preprocessing((None, None, None)) and len(dataset.patch_size) == 3
    cases, tests, wrong, notes = raw.listing(dataset, folder)
    assert [case.id for case in cases] == ["c00", "c01", "c02", "c03"] and wrong == []
    assert [case.label.name for case in cases][:2] == ["c00.nii.gz", "c01.nii.gz"]
    assert [case.id for case in tests] == ["t00", "t01"] and not any(case.label for case in tests)
    ends = [""] if layout == "decathlon" else ["_0000", "_0001"]
    assert [path.name for path in cases[1].images] == [f"c01{end}.nii.gz" for end in ends]
    assert [path.name for path in tests[0].images] == [f"t00{end}.nii.gz" for end in ends]
    assert notes[0] == "labels 0 1 4 count as classes 0 1 2 inside; predictions have 0 1 4 again"
    assert dataset.find(folder) == cases and dataset.find_test(folder) == tests


def test_what_the_tests_write_can_be_learned(tmp_path):
    write_raw(tmp_path / "two", n=2)
    first, second = (np.asarray(nib.load(tmp_path / "two" / "imagesTr" / f"c00_000{c}.nii.gz").dataobj) for c in (0, 1))
    image = nib.load(tmp_path / "two" / "labelsTr" / "c00.nii.gz")
    truth = np.asarray(image.dataobj)
    assert image.header.get_zooms() == (1, 1, 4) and set(np.unique(truth)) == {0, 1, 4}
    assert first[truth == 1].mean() > first[truth != 1].mean() + 60 < 80 + first[truth != 1].mean()
    assert second[truth == 4].mean() > second[truth != 4].mean() + 60
    assert not np.asarray(nib.load(tmp_path / "two" / "labelsTr" / "c01.nii.gz").dataobj).any()
    write_raw(tmp_path / "four", n=1, layout="decathlon")
    assert nib.load(tmp_path / "four" / "imagesTr" / "c00.nii.gz").shape == (24, 28, 12, 2)


@pytest.mark.parametrize("ending", [".nii", ".mha", ".nrrd", ".png", ".bmp", ".tif"])
def test_other_file_endings(tmp_path, ending):
    shape = (24, 28) if ending in (".png", ".bmp", ".tif") else (24, 28, 12)
    folder = write_raw(tmp_path / "mine", n=2, ending=ending, shape=shape, tests=1)
    dataset = raw.read_dataset(folder)
    found = raw.listing(dataset, folder)
    assert dataset.file_ending == ending and (len(found.cases), len(found.tests), found.problems) == (2, 1, [])


def test_the_sidecars_of_tiffs_are_no_strangers(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.tif", "labelsTr/a.tif", "imagesTr/a.json", "labelsTr/a.json", "imagesTr/notes.txt")
    dataset = read(tmp_path, file_ending=".tif", numTraining=1)
    assert raw.listing(dataset, tmp_path)[2:] == (
        [],
        ["imagesTr: left 1 other files aside (notes.txt); expected NAME_0000.tif"],
    )


def test_the_hippocampus():
    if not HIPPOCAMPUS.is_dir():
        pytest.skip("the shared hippocampus (../shared/Task04_Hippocampus) is not here")
    dataset = raw.read_dataset(HIPPOCAMPUS)
    cases, tests, wrong, notes = raw.listing(dataset, HIPPOCAMPUS)
    assert (dataset.class_names, dataset.values) == (("background", "Anterior", "Posterior"), ())
    assert (dataset.channels, dataset.licence, raw.n_labels(dataset)) == (("MRI",), "CC-BY-SA 4.0", 3)
    assert (len(cases), tests, wrong, notes) == (200, [], [], [])
    assert cases[0].id == "hippocampus_001" and cases[0].images[0].name == cases[0].label.name


def test_acdc_in_this_format(tmp_path):
    if not ACDC.is_dir():
        pytest.skip("the shared ACDC patients (../shared/acdc) are not here")
    folder = write_acdc(tmp_path, n=6)
    found = raw.listing(raw.read_dataset(folder), folder)
    assert len(found.cases) == 12 and found.problems == found.notes == []
    assert found.cases[0].image.resolve().name == "patient002_frame01.nii.gz"


def test_plain_names_in_version_2_and_version_1_without_a_list(tmp_path):
    touch(tmp_path / "v2", "imagesTr/a.nii.gz", "imagesTr/b.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    assert problems(tmp_path / "v2") == []
    old = {
        "channel_names": None,
        "file_ending": None,
        "modality": {"0": "MRI"},
        "labels": {"0": "Background", "1": "x"},
    }
    two_cases(tmp_path / "v1")
    assert problems(tmp_path / "v1", **old) == []
    assert [case.id for case in raw.read_dataset(tmp_path / "v1").find(tmp_path / "v1")] == ["a", "b"]
    # Names of the Decathlon that look like channels are none, as the labels have them too
    touch(tmp_path / "msd", *(f"{place}/x_000{i}.nii.gz" for place in ("imagesTr", "labelsTr") for i in range(2)))
    assert problems(tmp_path / "msd", **old) == []


def test_uncompressed_files_in_the_old_formats(tmp_path):
    folder = write_raw(tmp_path / "Task01_X", n=2, layout="decathlon", ending=".nii", channels=1)
    dataset = raw.read_dataset(folder)
    assert dataset.file_ending == ".nii" and raw.listing(dataset, folder).problems == []


def test_the_table_of_version_2(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "free name.nii.gz"
    touch(
        tmp_path, "elsewhere/free name.nii.gz", "mine/x/t2.nii.gz", "mine/x/truth.nii.gz", "mine/imagesTs/t_0000.nii.gz"
    )
    table = {
        "case_9": {"images": ["x/t2.nii.gz", str(elsewhere)], "label": "x/truth.nii.gz"},
        "case_10": {"images": [str(elsewhere), "x/missing.nii.gz"], "label": "x/none.nii.gz"},
        "case_11": {"images": [str(elsewhere)]},
    }
    folder = tmp_path / "mine"
    dataset = read(folder, dataset=table, channel_names={"0": "T2", "1": "ADC"}, numTraining=3)
    cases, tests, wrong, _ = raw.listing(dataset, folder)
    assert [case.id for case in cases] == ["case_10", "case_11", "case_9"] and [case.id for case in tests] == ["t"]
    assert cases[2].images == (folder / "x" / "t2.nii.gz", elsewhere)
    assert [case.label for case in cases] == [None, None, folder / "x" / "truth.nii.gz"]
    assert wrong == [
        "case case_11 has channels 0000, needs 0000 0001 (T2, ADC)",
        f"case case_10: {folder / 'x' / 'missing.nii.gz'} is not there",
        "case case_10: its label is not there; correct the table in dataset.json",
        "case case_11: its label is not there; correct the table in dataset.json",
        f"case case_11: has {elsewhere}, which case case_10 has too",
        f"case case_9: has {elsewhere}, which case case_10 has too",
    ]
    assert dataset.find(tmp_path / "nowhere") == []
    write_json(tmp_path / "other", **V2)
    assert 'no usable table "dataset"' in error(dataset.find, tmp_path / "other")


@pytest.mark.parametrize(
    "table, part",
    [
        ([], "is no table of cases"),
        ({}, "is no table of cases"),
        ({"../a": {"images": ["a"]}}, "cannot be the name of a file"),
        (
            {"a": {"images": [], "label": "b"}},
            'the case "a" of "dataset" does not name its files; write it as {"a": {'.replace('{"a"', '"a"', 1),
        ),
        ({"a": {"images": "x"}}, "does not name its files"),
        ({"a": {"images": [1]}}, "does not name its files"),
        ({"a": ["x"]}, "does not name its files"),
    ],
)
def test_a_wrong_table(tmp_path, table, part):
    assert part in error(read, tmp_path, dataset=table)


def test_a_list_of_tests_without_their_folder(tmp_path):
    two_cases(tmp_path)
    touch(tmp_path, "testing/z_0000.nii.gz", "testing/y_0000.nii.gz", "testing/x_0000.nii.gz")
    dataset = read(tmp_path, test=["./testing/z.nii.gz", {"image": "./testing/x.nii.gz"}, 3, None, "./gone/w.nii.gz"])
    assert [case.id for case in dataset.find_test(tmp_path)] == ["x", "z"]
    assert read(tmp_path, test=7).find_test(tmp_path) == []


# --- dataset.json


def test_the_folder_or_its_file(tmp_path):
    two_cases(tmp_path / "mine")
    dataset = read(tmp_path / "mine")
    assert raw.read_dataset(tmp_path / "mine" / "dataset.json").name == dataset.name == "mine"
    assert raw.raw_folder(tmp_path / "mine" / "dataset.json") == tmp_path / "mine"
    assert "there is no such folder" in error(raw.read_dataset, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    line = error(raw.read_dataset, tmp_path / "empty")
    assert "has no dataset.json" in line and "imagesTr and labelsTr" in line
    assert f"did you mean {tmp_path / 'mine'}?" in error(raw.read_dataset, tmp_path)


@pytest.mark.parametrize(
    "content, part",
    [
        (b"", "JSON"),
        (b"{'labels': 1}", "JSON"),
        (b"[]", "should begin with {"),
        (b'{"labels": \xff}', "no text"),
        (b"[" * 100_000, "too deep"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b" " * (LARGEST_JSON + 1), "it has 50 MiB"),
    ],
)
def test_a_broken_json(tmp_path, content, part):
    (tmp_path / "dataset.json").write_bytes(content)
    line = error(raw.read_dataset, tmp_path)
    assert line.startswith(str(tmp_path / "dataset.json")) and part in line and "mend this file" in line


def test_a_byte_order_mark(tmp_path):
    (tmp_path / "dataset.json").write_bytes(codecs.BOM_UTF8 + json.dumps(V2).encode())
    assert raw.read_dataset(tmp_path).channels == ("T2",)


@pytest.mark.parametrize(
    "labels, names, values, ignore",
    [
        ({"background": 0, "a": 1}, ("background", "a"), (), None),
        ({"b": 2, "a": 1, "background": 0}, ("background", "a", "b"), (), None),
        ({"a": 1, "Background": 0}, ("Background", "a"), (), None),
        ({"0": "background", "2": "b", "1": "a"}, ("background", "a", "b"), (), None),
        ({"background": "0", "a": "3"}, ("background", "a"), (0, 3), None),
        ({"background": [0], "a": ["4"], "b": 1}, ("background", "b", "a"), (0, 1, 4), None),
        ({"background": 0, "a": 1, "ignore": 2}, ("background", "a"), (), 2),
        ({"background": 0, "a": 2, "ignore": 255}, ("background", "a"), (0, 2), 255),
        ({"0": "background", "1": "a", "3": "ignore"}, ("background", "a"), (), 3),
        ({"0": 0, "1": 1}, ("0", "1"), (), None),
        ({"background": 0, "a": 255}, ("background", "a"), (0, 255), None),
    ],
)
def test_labels(tmp_path, labels, names, values, ignore):
    dataset = read(tmp_path, labels=labels)
    assert (dataset.class_names, dataset.values, dataset.ignore) == (names, values, ignore)
    assert raw.n_labels(dataset) == len(labels)


@pytest.mark.parametrize(
    "labels, part",
    [
        (None, 'has no "labels"; write for instance "labels": {"background": 0, "tumor": 1}'),
        ([], "no table"),
        ({}, "no table"),
        ({"background": 0}, "nothing but the background"),
        ({"background": 0, "ignore": 1}, "nothing but the background"),
        ({"a": 1, "b": 2}, 'no label has the value 0, the background; add "background": 0'),
        ({"0": "background", "1": "a", "2": "a"}, "same name"),
        ({"0": "background", "00": "a"}, "both have the value 0"),
        ({"background": 0, "a": 1, "b": 1}, "'a' and 'b' both have the value 1"),
        ({"background": 0, "a": 1, "ignore": 1}, "both have the value 1"),
        ({"background": 0, "whole": [1, 2], "core": [2]}, "regions (overlapping labels) are not supported yet"),
        ({"background": 0, "a": []}, "'a' has the value []"),
        ({"background": 0, "a": [[1]]}, "'a' has the value [[1]]"),
        ({"background": 0, "a": True}, "'a' has the value True"),
        ({"background": 0, "a": 1.5}, "'a' has the value 1.5"),
        ({"background": 0, "a": -1}, "'a' has the value -1"),
        ({"background": 0, "a": 10**6}, "'a' has the value 1000000"),
        ({"background": 0, "a": None}, "'a' has the value None"),
        ({"background": 0, "a": "one"}, "'a' has the value 'one'"),
        ({"background": 0, "a\n": 1}, "the name of a label"),
        ({"background": 0, "": 1}, "the name of a label"),
        ({"0": "background", "1": 7, "2": "b"}, "the name of a label is 7"),
        ({"background": 0, "a": 1, "ignore": "2"}, "\"ignore\" is '2'"),
        ({"background": 0, "a": 1, "ignore": True}, '"ignore" is True'),
        ({"background": 0, "a": 1, "ignore": [2]}, '"ignore" is [2]'),
    ],
)
def test_wrong_labels(tmp_path, labels, part):
    line = error(read, tmp_path, labels=labels)
    assert line.startswith(str(tmp_path / "dataset.json")) and part in line


def test_plain_labels_need_no_order_of_regions(tmp_path):
    assert read(tmp_path, regions_class_order=[1]).n_classes == 2


def test_channels_in_the_order_of_their_numbers(tmp_path):
    names = {str(i): f"c{i}" for i in (10, 2, 0, 1, *range(3, 10))}
    assert read(tmp_path, channel_names=names).channels == tuple(f"c{i}" for i in range(11))
    assert read(tmp_path, channel_names={"0001": "ADC", "0000": "T2"}).channels == ("T2", "ADC")
    assert read(tmp_path, channel_names=None, modality={"0": "CT"}).channels == ("CT",)


@pytest.mark.parametrize(
    "names, part",
    [
        (None, 'has no "channel_names"; write for instance "channel_names": {"0": "T2", "1": "ADC"}'),
        ({}, "no table"),
        (["T2"], "no table"),
        ({"T2": 0}, "the wrong way round"),
        ({"1": "T2", "2": "ADC"}, "numbered 1 2; number them 0 1, like the files"),
        ({"0": "T2", "00": "ADC"}, "numbered 0 00"),
        ({"x": "T2"}, "numbered x"),
        ({"0": ""}, "give each a name"),
        ({"0": 3}, "give each a name"),
    ],
)
def test_wrong_channels_in_the_json(tmp_path, names, part):
    assert part in error(read, tmp_path, channel_names=names)


@pytest.mark.parametrize(
    "ending, part",
    [
        (None, 'has no "file_ending"; add "file_ending": ".nii.gz"'),
        ("nii.gz", 'lacks its dot; write "file_ending": ".nii.gz"'),
        (".NII.GZ", "'.NII.GZ'; what can be read is .nii.gz .nii .mha"),
        (".dcm", "'.dcm'; what can be read"),
        (["x"], "['x']; what can be read"),
    ],
)
def test_wrong_file_endings(tmp_path, ending, part):
    assert part in error(read, tmp_path, file_ending=ending)


def test_a_missing_file_ending_is_told_by_what_is_there(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.mha")
    assert 'add "file_ending": ".mha"' in error(read, tmp_path, file_ending=None)


# --- the listing


def test_hidden_files_are_skipped_and_counted(tmp_path):
    two_cases(tmp_path)
    touch(tmp_path, "imagesTr/._a_0000.nii.gz", "imagesTr/.DS_Store", "labelsTr/._a.nii.gz", "imagesTr/readme.nii.gz")
    (tmp_path / "imagesTr" / "folder_0000.nii.gz").mkdir()
    assert raw.listing(read(tmp_path), tmp_path)[2:] == (
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
        (["a_000.nii.gz", "b_000.nii.gz", "c_000.nii.gz", "d_000.nii.gz"],
         "the first files there are a_000.nii.gz, b_000.nii.gz, c_000.nii.gz"),
        (["a_0000.NII.GZ"], "the first files there are a_0000.NII.GZ"),
        ([".hidden_0000.nii.gz"], "it is empty"),
    ],
)  # fmt: skip
def test_no_image_found(tmp_path, names, there):
    touch(tmp_path, *(f"imagesTr/{name}" for name in names), "labelsTr/a.nii.gz")
    assert problems(tmp_path) == [f"{tmp_path / 'imagesTr'}: found no image: {there}, expected NAME_0000.nii.gz"]


def test_no_folder_of_images(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path}: has no folder imagesTr; put the images there as NAME_0000.nii.gz"]
    assert read(tmp_path).find(tmp_path) == []


def test_all_problems_at_once(tmp_path):
    two_cases(tmp_path, channels=2)
    touch(tmp_path, "imagesTr/c_0000.nii.gz", "imagesTr/c_0007.nii.gz", "labelsTr/c.nii.gz", "labelsTr/d.nii.gz")
    touch(tmp_path, "imagesTr/a_0002.nii.gz", "imagesTr/b_0001.nii", "imagesTs/t_0001.nii.gz")
    (tmp_path / "labelsTr" / "b.nii.gz").unlink()
    dataset = read(tmp_path, channel_names={"0": "T2", "1": "ADC"}, numTraining=4)
    cases, tests, wrong, notes = raw.listing(dataset, tmp_path)
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
    dataset = read(tmp_path, channel_names={"0": "R", "1": "G", "2": "B"})
    found = raw.listing(dataset, tmp_path)
    assert found.problems == [] and found.notes == ["imagesTr: each case has one file, which must hold all 3 channels"]
    touch(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/a_0002.nii.gz")
    assert raw.listing(dataset, tmp_path).problems == ["case b has channels 0000, needs 0000 0001 0002 (R, G, B)"]


def test_no_labels_at_all(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz")
    line = f"{tmp_path / 'labelsTr'}: no case has a label: there is no such folder, expected a.nii.gz"
    assert problems(tmp_path) == [line]
    touch(tmp_path, "labelsTr/a.nii")
    assert problems(tmp_path) == [line.replace("there is no such folder", "the first files there are a.nii")]


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
    assert raw.listing(dataset, folder).problems == [
        f'"training" names c00 twice; {mend}',
        f'"training" names c07, which imagesTr does not have; {mend}',
        f'"training" does not name c01, c02, which imagesTr has; {mend}',
    ]


def test_a_folder_that_may_not_be_read(tmp_path):
    two_cases(tmp_path)
    dataset = read(tmp_path)
    (tmp_path / "imagesTr").chmod(0)
    try:
        if os.access(tmp_path / "imagesTr", os.R_OK):
            pytest.skip("this user may read everything")
        assert "mend its permissions" in error(dataset.find, tmp_path)
    finally:
        (tmp_path / "imagesTr").chmod(0o700)


def test_ids_sort_as_text_and_a_link_that_leads_nowhere_is_there(tmp_path):
    touch(
        tmp_path, *(f"{place}.nii.gz" for i in (9, 10) for place in (f"imagesTr/case_{i}_0000", f"labelsTr/case_{i}"))
    )
    touch(tmp_path, "labelsTr/B.nii.gz")
    (tmp_path / "imagesTr" / "B_0000.nii.gz").symlink_to("nowhere")
    assert [case.id for case in read(tmp_path).find(tmp_path)] == ["B", "case_10", "case_9"]


# --- the JSON form


def planned(folder):
    """A definition with all that a plan may add."""
    return replace(
        raw.read_dataset(folder),
        preprocessing=Preprocessing(
            (4.0, 1.0, 1.0),
            orientation="SPL",
            normalizations=(Normalization("zscore", masked=True), Normalization("ct", low=-5.5, high=9.25, std=2.0)),
            crop=True,
        ),
        patch_size=(12, 28, 24),
        defaults={"batch_size": 2, "strides": ((1, 2, 2), (2, 2, 2)), "levels": 3, "foreground": 0.33},
        folds=({"train": ("c00", "c01"), "val": ("c02",)},),
        patches_per_volume=2,
        merged_labels={3: 1},
    )


@pytest.mark.parametrize("layout", DIRECTIONS)
def test_the_json_form_gives_the_definition_back(tmp_path, layout):
    folder = write_raw(tmp_path / "mine", n=3, layout=layout, ignore=7, tests=1, shape=(8, 8, 4))
    dataset = planned(folder)
    written = raw.as_dict(dataset)
    again = raw.of_dict(json.loads(json.dumps(written, allow_nan=False)))
    assert raw.as_dict(again) == written
    assert again.find(folder) == dataset.find(folder) and again.find_test(folder) == dataset.find_test(folder)
    for name in (*raw.KEPT, "preprocessing", "merged_labels", "file_ending", "layout"):
        assert getattr(again, name) == getattr(dataset, name), name
    assert again.ignore == 7 and again.values == (0, 1, 4) and again.defaults["strides"] == ((1, 2, 2), (2, 2, 2))
    found = pickle.loads(pickle.dumps(again.find))
    shutil.move(folder, tmp_path / "moved")
    assert len(found(tmp_path / "moved")) == 3


def test_a_table_is_read_again_from_its_folder(tmp_path):
    touch(tmp_path, "x.nii.gz", "y.nii.gz")
    dataset = read(tmp_path, dataset={"a": {"images": ["x.nii.gz"], "label": "y.nii.gz"}}, numTraining=1)
    assert raw.of_dict(raw.as_dict(dataset)).find(tmp_path) == dataset.find(tmp_path) != []


DAMAGE = {
    "name": ["", "..", "a/b", "a\\b", ".hidden", 3, "x" * 300, "a\n", None],
    "class_names": [[], ["background"], "ab", ["a", "a", "b"], ["a", 3, "b"], ["a", "b"], None],
    "values": [[0, 4, 1], [1, 2, 3], [0, 1], [0, 1, 1], [0, 1, 10**9], [0, 1, True], [0, 1, 7], None, "014"],
    "ignore": [4, -1, "7", True, 1.5, 10**9],
    "channels": [[], "T2", ["T2"], [1, 2], ["x"] * 5000],
    "file_ending": ["nii.gz", ".exe", None, 3, []],
    "naming": ["other", None, [], 3],
    "patch_size": [[], [8], [8, 8, 8, 8], [0, 8, 8], [10**9, 8, 8], [8.5, 8, 8], "888", None],
    "defaults": [
        [],
        None,
        {"evil": 1},
        {"lr": float("nan")},
        {"lr": {}},
        {"strides": [[[[1]]]]},
        {"split": "x" * 9999},
    ],
    "folds": [None, {}, [[]], [{"train": ["a"]}], [{"train": ["a"], "val": "b"}], [{"train": ["../a"], "val": []}]],
    "patches_per_volume": [0, -1, 1.5, 10**9, "2"],
    "licence": [None, 3, "x" * 1000],
    "merged_labels": [None, [], {"x": 1}, {"3": "1"}, {"3": -1}, {"-3": 1}],
    "preprocessing": [
        None,
        [],
        {},
        *(
            {"spacing_mm": [1, 1, 1]} | wrong
            for wrong in (
                {"spacing_mm": [1, 1]},
                {"spacing_mm": [0, 1, 1]},
                {"spacing_mm": [1e30, 1, 1]},
                {"spacing_mm": ["1", 1, 1]},
                {"orientation": "RAR"},
                {"orientation": "RA"},
                {"orientation": "ras"},
                {"orientation": 3},
                {"clip": [0]},
                {"scale": 0},
                {"shift": float("inf")},
                {"min_size": [10**9, 1, 1]},
                {"zscore": 1},
                {"crop": "yes"},
                {"evil": 1},
                {"normalizations": [{"scheme": "zscore"}]},
                {"normalizations": [{"scheme": "evil"}, {"scheme": "ct"}]},
                {"normalizations": [{"scheme": "ct"}, {}]},
                {"normalizations": [{"scheme": "ct"}, {"scheme": "ct", "evil": 1}]},
                {"normalizations": [{"scheme": "ct"}, {"scheme": "ct", "std": "1"}]},
                {"normalizations": [{"scheme": "ct"}, {"scheme": ["ct"]}]},
                {"normalizations": 3},
            )
        ),
    ],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_definition(tmp_path, name):
    folder = write_raw(tmp_path / "mine", n=1, ignore=7, shape=(8, 8, 4))
    written = raw.as_dict(planned(folder))
    assert raw.of_dict(written)
    for wrong in DAMAGE[name]:
        with pytest.raises((KeyError, TypeError, ValueError)):
            print(wrong, raw.of_dict(written | {name: wrong}))
    with pytest.raises((KeyError, TypeError, ValueError)):
        raw.of_dict({key: value for key, value in written.items() if key != name})


def test_what_is_no_definition():
    for wrong in (None, [], "x", {}, {"name": "a", "evil": 1}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            raw.of_dict(wrong)

import codecs
import json
import os

import nibabel as nib
import numpy as np
import pytest
from raw_data import (
    ACDC,
    DIRECTIONS,
    HIPPOCAMPUS,
    V2,
    error,
    read_as,
    touch,
    two_cases,
    write_acdc,
    write_json,
    write_raw,
)

from lib.data import raw
from lib.data.BaseDataset import Preprocessing
from lib.data.listing import listing
from lib.system.files import LARGEST_JSON


def problems(folder, **fields):
    return listing(read_as(folder, **fields), folder).problems


# --- layouts


@pytest.mark.parametrize("layout", DIRECTIONS)
def test_a_data_set_in_each_layout(tmp_path, layout):
    folder = write_raw(tmp_path / "Dataset001_Mine", layout=layout, tests=2, n=4)
    dataset = raw.read_dataset(folder)
    assert (dataset.name, dataset.class_names) == ("Dataset001_Mine", ("background", "kidney", "tumor"))
    assert (dataset.values, dataset.ignore, dataset.channels) == ((0, 1, 4), None, ("T2", "ADC"))
    assert (dataset.file_ending, dataset.licence, raw.n_labels(dataset)) == (".nii.gz", "CC0", 3)
    assert dataset.preprocessing == Preprocessing((None, None, None)) and len(dataset.patch_size) == 3
    cases, tests, wrong, notes = listing(dataset, folder)
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
    found = listing(dataset, folder)
    assert dataset.file_ending == ending and (len(found.cases), len(found.tests), found.problems) == (2, 1, [])


def test_the_hippocampus():
    if not HIPPOCAMPUS.is_dir():
        pytest.skip("the shared hippocampus (../shared/Task04_Hippocampus) is not here")
    dataset = raw.read_dataset(HIPPOCAMPUS)
    cases, tests, wrong, notes = listing(dataset, HIPPOCAMPUS)
    assert (dataset.class_names, dataset.values) == (("background", "Anterior", "Posterior"), ())
    assert (dataset.channels, dataset.licence, raw.n_labels(dataset)) == (("MRI",), "CC-BY-SA 4.0", 3)
    assert (len(cases), tests, wrong, notes) == (200, [], [], [])
    assert cases[0].id == "hippocampus_001" and cases[0].images[0].name == cases[0].label.name


def test_acdc_in_this_format(tmp_path):
    if not ACDC.is_dir():
        pytest.skip("the shared ACDC patients (../shared/acdc) are not here")
    folder = write_acdc(tmp_path, n=6)
    found = listing(raw.read_dataset(folder), folder)
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
    assert dataset.file_ending == ".nii" and listing(dataset, folder).problems == []


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
    dataset = read_as(folder, dataset=table, channel_names={"0": "T2", "1": "ADC"}, numTraining=3)
    cases, tests, wrong, _ = listing(dataset, folder)
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
    assert part in error(read_as, tmp_path, dataset=table)


def test_a_list_of_tests_without_their_folder(tmp_path):
    two_cases(tmp_path)
    touch(tmp_path, "testing/z_0000.nii.gz", "testing/y_0000.nii.gz", "testing/x_0000.nii.gz")
    dataset = read_as(
        tmp_path, test=["./testing/z.nii.gz", {"image": "./testing/x.nii.gz"}, 3, None, "./gone/w.nii.gz"]
    )
    assert [case.id for case in dataset.find_test(tmp_path)] == ["x", "z"]
    assert read_as(tmp_path, test=7).find_test(tmp_path) == []


# --- dataset.json


def test_the_folder_or_its_file(tmp_path):
    two_cases(tmp_path / "mine")
    dataset = read_as(tmp_path / "mine")
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
    dataset = read_as(tmp_path, labels=labels)
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
    line = error(read_as, tmp_path, labels=labels)
    assert line.startswith(str(tmp_path / "dataset.json")) and part in line


def test_plain_labels_need_no_order_of_regions(tmp_path):
    assert read_as(tmp_path, regions_class_order=[1]).n_classes == 2


def test_channels_in_the_order_of_their_numbers(tmp_path):
    names = {str(i): f"c{i}" for i in (10, 2, 0, 1, *range(3, 10))}
    assert read_as(tmp_path, channel_names=names).channels == tuple(f"c{i}" for i in range(11))
    assert read_as(tmp_path, channel_names={"0001": "ADC", "0000": "T2"}).channels == ("T2", "ADC")
    assert read_as(tmp_path, channel_names=None, modality={"0": "CT"}).channels == ("CT",)


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
    assert part in error(read_as, tmp_path, channel_names=names)


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
    assert part in error(read_as, tmp_path, file_ending=ending)


def test_a_missing_file_ending_is_told_by_what_is_there(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.mha")
    assert 'add "file_ending": ".mha"' in error(read_as, tmp_path, file_ending=None)


# --- files


def test_a_folder_that_may_not_be_read(tmp_path):
    two_cases(tmp_path)
    dataset = read_as(tmp_path)
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
    assert [case.id for case in read_as(tmp_path).find(tmp_path)] == ["B", "case_10", "case_9"]

import hashlib
import json

import pytest
from raw_data import ACDC, HIPPOCAMPUS, acdc_folds, write_acdc

from lib.data import raw
from lib.data.splits import five_folds, fold_of, folds_of, read_splits, shared_patients
from lib.system.error import InputError

TWELVE = [f"c{i:02d}" for i in range(12)]


def hippocampus():
    if not HIPPOCAMPUS.is_dir():
        pytest.skip("the shared hippocampus (../shared/Task04_Hippocampus) is not here")
    return [case.id for case in raw.read_dataset(HIPPOCAMPUS).find(HIPPOCAMPUS)]


def error(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder, splits):
    (folder / "splits_final.json").write_text(json.dumps(splits))


# --- nnU-Net's folds


def test_twelve_cases():
    folds = five_folds(reversed(TWELVE))
    assert (
        " | ".join(" ".join(fold["val"]) for fold in folds) == "c00 c03 c08 | c07 c10 c11 | c06 c09 | c01 c04 | c02 c05"
    )
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == TWELVE and list(fold["train"]) == sorted(fold["train"])


def test_ids_sort_as_text():
    (first, *_) = five_folds(["case_9", "case_10", "B", "a", "case_1"])
    assert first["train"] == tuple(sorted(first["train"])) and sorted(["case_9", "case_10"])[0] == "case_10"


def test_the_hippocampus():
    ids = hippocampus()
    folds = five_folds(ids)
    for fold, first, last, sum_ in (
        (0, "023 038 039 042 052", 393, "b807038c7175a3d7"),
        (1, "006 008 035 041 049", 389, "1658ab8409433b88"),
        (2, "007 014 017 020 037", 368, "2c7d5cc303fd23ae"),
        (3, "001 011 026 036 045", 383, "a9045d54f68da972"),
        (4, "004 015 025 048 057", 394, "d8dc0a0cd3db3761"),
    ):
        val = folds[fold]["val"]
        assert (len(folds[fold]["train"]), len(val)) == (160, 40)
        assert " ".join(id_.removeprefix("hippocampus_") for id_ in val[:5]) == first and val[-1].endswith(str(last))
        assert hashlib.sha256("\n".join(val).encode()).hexdigest()[:16] == sum_
        assert fold_of(folds, str(fold), ids) == (folds[fold]["train"], val)
    train, val = fold_of(folds, "5", ids)
    assert [id_.removeprefix("hippocampus_") for id_ in val[:5]] == ["004", "015", "039", "077", "092"]
    assert len(val) == 40 and sorted(train + val) == ids
    assert shared_patients(*fold_of(folds, "0", ids)) == []


def test_all_cases():
    assert fold_of((), "all", ["b", "a"]) == (("a", "b"), ("a", "b"))


def test_too_few_cases(tmp_path):
    assert folds_of(tmp_path, TWELVE[:4]) == ()
    for line in (error(five_folds, TWELVE[:4]), error(fold_of, (), "0", TWELVE[:4])):
        assert (
            line.startswith("--fold: 5 folds need 5 cases at least, there are 4; give --fold all")
            and "splits_final.json" in line
        )
    assert folds_of(tmp_path, TWELVE[:5])[0]["val"] and len(folds_of(tmp_path, TWELVE)) == 5


@pytest.mark.parametrize("fold", ["x", "-1", "", "1.0", "ALL", "9999999", "9" * 5000, "²"])
def test_no_fold(fold):
    line = error(fold_of, five_folds(TWELVE), fold, TWELVE)
    assert line.startswith(f"--fold {fold}: ") and "from 0 to 4, or all" in line


# --- splits_final.json


def test_splits_of_ones_own(tmp_path):
    assert read_splits(tmp_path, TWELVE) is None
    write(tmp_path, [{"train": ["c03", "c01"], "val": ["c02"], "test": ["x"]}, {"train": ["c02"], "val": ["c01"]}])
    folds = folds_of(tmp_path, TWELVE)
    assert folds == ({"train": ("c01", "c03"), "val": ("c02",)}, {"train": ("c02",), "val": ("c01",)})
    assert fold_of(folds, "1", TWELVE) == (("c02",), ("c01",))
    assert len(fold_of(folds, "2", TWELVE)[0]) == 9  # beyond the list: 80% of all cases
    assert folds_of(tmp_path, TWELVE[:4]) == folds


@pytest.mark.parametrize(
    "splits, part",
    [
        ({}, "should begin with ["),
        ([], "has no fold"),
        ([[]], 'fold 0 is not written as {"train": ["case_1", ...], "val": ["case_2", ...]}'),
        ([{"train": ["c00"]}], "fold 0 is not written"),
        ([{"train": ["c00"], "val": "c01"}], "fold 0 is not written"),
        ([{"train": ["c00"], "val": [1]}], "fold 0 is not written"),
        ([{"train": ["c00"], "val": ["c01"]}, {"train": [], "val": ["c01"]}], 'fold 1: the list "train" is empty'),
        ([{"train": ["c00"], "val": []}], 'the list "val" is empty'),
        (
            [{"train": ["c00"], "val": ["c01_0000.nii.gz"]}],
            'fold 0: "val" names c01_0000.nii.gz, which the data set does not have; it has c00, c01, c02 and 9 more: '
            "names without channel and file ending",
        ),
        ([{"train": ["c00", "c00"], "val": ["c01"]}], 'fold 0: "train" names c00 twice'),
        ([{"train": ["c00", "c01", "c02"], "val": ["c01", "c02"]}], "fold 0: c01, c02 both train and validate"),
    ],
)
def test_wrong_splits(tmp_path, splits, part):
    write(tmp_path, splits)
    line = error(folds_of, tmp_path, TWELVE)
    assert line.startswith(str(tmp_path / "splits_final.json")) and part in line


def test_broken_splits(tmp_path):
    (tmp_path / "splits_final.json").write_text("[")
    assert "cannot be read as JSON" in error(read_splits, tmp_path, TWELVE)


def test_acdc_by_patient(tmp_path):
    assert (
        " ".join(map(str, acdc_folds(range(1, 101))[0])) == "5 7 10 20 22 27 32 34 41 46 47 51 53 59 68 69 73 75 77 88"
    )
    if not ACDC.is_dir():
        pytest.skip("the shared ACDC patients (../shared/acdc) are not here")
    folder = write_acdc(tmp_path)
    ids = [case.id for case in raw.read_dataset(folder).find(folder)]
    folds = folds_of(folder, ids)
    assert len(ids) == 120 and len(folds) == 5 and sorted(sum((fold["val"] for fold in folds), ())) == ids
    assert all(shared_patients(*fold_of(folds, str(fold), ids)) == [] for fold in range(5))
    assert "patient005" in shared_patients(*fold_of(five_folds(ids), "0", ids))


# --- patients on both sides


@pytest.mark.parametrize(
    "train, val, shared",
    [
        ("patient001_frame01 patient002_frame01 patient002_frame09", "patient001_frame12", ["patient001"]),
        ("patient001_frame01 patient001_frame12", "patient002_frame01 patient002_frame09", []),
        ("a_scan1 b_scan1 b_scan2", "a_scan2", ["a"]),
        ("sub-01_ses-1_run-1 sub-02_ses-1_run-1", "sub-01_ses-2_run-1", ["sub-01"]),
        ("BraTS_GLI_001_000 BraTS_GLI_002_000", "BraTS_GLI_001_001", ["BraTS_GLI_001"]),
        ("BraTS_001 BraTS_002", "BraTS_003", []),
        ("LUNG1-001 LUNG1-002", "LUNG1-003", []),
        ("siteA_001 siteB_001", "siteA_002 siteB_002", []),
        ("siteA_case1 siteB_case1", "siteA_case2", []),
        ("c00 c01", "c02", []),
        ("", "", []),
    ],
)
def test_patients_on_both_sides(train, val, shared):
    assert shared_patients(train.split(), val.split()) == shared


def test_large_groups_are_no_patients():
    ids = [f"2020_{i:03d}" for i in range(40)] + [f"2021_{i:03d}" for i in range(40)]
    assert shared_patients(ids[::2], ids[1::2]) == []

import json
import pickle
import shutil
from dataclasses import replace

import pytest
from raw_data import DIRECTIONS, read_as, touch, write_raw

from lib.data import raw
from lib.data.BaseDataset import Preprocessing
from lib.data.definition import KEPT, as_dict, of_dict
from lib.data.normalization import Normalization


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
    written = as_dict(dataset)
    again = of_dict(json.loads(json.dumps(written, allow_nan=False)))
    assert as_dict(again) == written
    assert again.find(folder) == dataset.find(folder) and again.find_test(folder) == dataset.find_test(folder)
    for name in (*KEPT, "preprocessing", "merged_labels", "file_ending", "layout"):
        assert getattr(again, name) == getattr(dataset, name), name
    assert again.ignore == 7 and again.values == (0, 1, 4) and again.defaults["strides"] == ((1, 2, 2), (2, 2, 2))
    found = pickle.loads(pickle.dumps(again.find))
    shutil.move(folder, tmp_path / "moved")
    assert len(found(tmp_path / "moved")) == 3


def test_a_table_is_read_again_from_its_folder(tmp_path):
    touch(tmp_path, "x.nii.gz", "y.nii.gz")
    dataset = read_as(tmp_path, dataset={"a": {"images": ["x.nii.gz"], "label": "y.nii.gz"}}, numTraining=1)
    assert of_dict(as_dict(dataset)).find(tmp_path) == dataset.find(tmp_path) != []


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
    written = as_dict(planned(folder))
    assert of_dict(written)
    for wrong in DAMAGE[name]:
        with pytest.raises((KeyError, TypeError, ValueError)):
            print(wrong, of_dict(written | {name: wrong}))
    with pytest.raises((KeyError, TypeError, ValueError)):
        of_dict({key: value for key, value in written.items() if key != name})


def test_what_is_no_definition():
    for wrong in (None, [], "x", {}, {"name": "a", "evil": 1}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            of_dict(wrong)

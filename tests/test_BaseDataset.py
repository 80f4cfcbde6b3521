"""A definition: what it derives, its split, where it looks for its files."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny3D, write_case

from lib.data.BaseDataset import PUBLISHED, BaseDataset, Preprocessing, subject_files
from lib.data.loading import Loader
from lib.system.error import InputError


def test_little_is_needed_of_a_definition():
    data = BaseDataset(
        name="mine",
        class_names=("background", "thing"),
        find=lambda root: [],
        preprocessing=Preprocessing((1.0, 1.0, None)),
        defaults={"epochs": 9},
    )
    assert (data.n_classes, data.modalities, data.dim, data.test_cases) == (2, 1, "2D", ())
    assert data.defaults == PUBLISHED | {"epochs": 9} and data.folders("there") == [Path("there")]
    assert replace(data, patch_size=(8, 8, 8)).dim == "3D"


def test_a_subject_without_an_image_is_named(tmp_path):
    def find_hearts(root):
        return [subject_files(place.name, place, ["image"], ["label"]) for place in sorted(root.glob("heart_*"))]

    data = replace(Tiny3D, name="hearts", find=find_hearts)
    for name in ("heart_1/image.nii.gz", "heart_1/label.nii", "heart_2/label.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match="^heart_2: this image has 0 of 1 channels; --data hearts needs a file for each"
    ):
        data.files_in(tmp_path)
    (tmp_path / "heart_2" / "image.nii").touch()
    first, second = data.files_in(tmp_path)
    assert first.label.name == "label.nii" and second.image.name == "image.nii"


def test_cases_without_numbers_are_the_ids_on_disk():
    data = replace(Tiny3D, cases=None)
    parts = data.split_cases("0.5:0.5", 1, ["c", "a", "e2", "b", "d1"])
    assert sorted(sum(parts.values(), [])) == ["a", "b", "c", "d1", "e2"] and len(parts["test"]) == 1
    assert parts == data.split_cases("0.5:0.5", 1, ["a", "b", "c", "d1", "e2"]) and data.case_of("e2") == "e2"


def test_the_registry_loads_no_torch():
    code = "import sys, lib.data; sys.exit('torch' in sys.modules or not lib.data.DATASETS)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_what_was_written_before_the_padding_ceased_to_count_is_read_so():
    small = Preprocessing((1.0, 1.0, None), min_size=(4, 5, 6))
    assert small.as_dict()["padding_counts"] is False and Preprocessing.of_dict(small.as_dict()) == small
    before = {key: value for key, value in small.as_dict().items() if key != "padding_counts"}
    assert Preprocessing.of_dict(before) == replace(small, padding_counts=True)
    never_padded = Preprocessing((1.0, 1.0, None))
    assert "padding_counts" not in never_padded.as_dict()
    assert Preprocessing.of_dict(never_padded.as_dict()) == never_padded


# ---- the split


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_every_case_is_in_one_partition(share, seed):
    parts = Tiny3D.split_cases(f"{share}:{1 - share}", seed)
    assert sorted(sum(parts.values(), [])) == list(range(10))
    assert len(parts["test"]) == 2 and len(parts["train"]) == int(8 * share)
    assert parts["test"] == Tiny3D.split_cases("1:0", seed)["test"]  # which does not depend on the shares


@pytest.mark.parametrize("split", ["0.9", "0.9:0.2", "1.1:-0.1", "a:b", "nan:nan", "0.5:0.3:0.2", ""])
def test_a_wrong_split(split, tmp_path):
    with pytest.raises(InputError, match="--split"):
        Loader(Tiny3D, tmp_path, split=split)


# ---- the files


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SAURON_DATA", str(tmp_path))
    with pytest.raises(InputError) as error:
        Loader(Tiny3D)
    for text in (str(tmp_path / "tiny"), str(Path("data") / "tiny"), "case_NN", "Ask its author", "--data_path"):
        assert text in str(error.value)
    with pytest.raises(InputError, match="nowhere"):
        Loader(Tiny3D, tmp_path / "nowhere")


def test_sauron_data_is_where_data_sets_are_looked_for(tmp_path, monkeypatch):
    write_case(tmp_path / "tiny", 3)
    monkeypatch.setenv("SAURON_DATA", str(tmp_path))
    dataset = Loader(Tiny3D)
    assert sum(dataset.ids.values(), []) == ["case_03"] and dataset.n_missing == 9

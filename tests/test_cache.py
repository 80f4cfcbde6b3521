"""The cache: made once, made anew where something changed, and never changed by who reads it."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nibabel.affines import from_matvec
from tiny import Own, Tiny2D, Tiny3D, write_case, write_cases

from lib.data import cache
from lib.data.BaseDataset import Preprocessing
from lib.data.loading import Loader
from lib.system.error import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def snapshot(root):
    return {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def test_preprocessed_once_and_again_when_something_changes(tmp_path, capsys):
    source, cache_path = tmp_path / "data", tmp_path / "cache"
    for case in range(10):
        write_case(source, case)
    before = snapshot(source)
    dataset = Loader(Tiny3D, source, cache_path, "0.5:0.5")
    dataset.prepare()
    first = snapshot(cache_path)
    assert snapshot(source) == before
    subjects = [*dataset.ids["train"], *dataset.ids["validation"]]
    assert {path.name for path in dataset.cache.iterdir()} == {*(dataset.entry(id_).name for id_ in subjects), ".lock"}
    assert {path.name for path in first} == {"image.npy", "label.npy", "meta.json", ".lock"}
    meta = json.loads((dataset.entry(dataset.ids["train"][0]) / "meta.json").read_text())
    assert set(meta) == {"id", "affine", "world", "padding", "sources"} and meta["id"] == dataset.ids["train"][0]
    assert "preprocessing tiny" in capsys.readouterr().err

    Loader(Tiny3D, source, cache_path, "0.5:0.5").prepare()
    assert snapshot(cache_path) == first and capsys.readouterr().err == ""

    changed, interrupted = dataset.ids["train"][:2]
    write_case(source, int(changed[-2:]), shape=(10, 14, 11))
    (dataset.entry(interrupted) / "meta.json").unlink()
    again = Loader(Tiny3D, source, cache_path, "0.5:0.5")
    again.prepare()
    files = snapshot(cache_path).items()
    redone = {path.parent for path, time in files if first.get(path) != time and path.name != ".lock"}
    assert redone == {again.entry(changed), dataset.entry(interrupted)}

    other = replace(Tiny3D, preprocessing=Preprocessing((3.0, 2.0, 2.5)))
    assert Loader(other, source, cache_path).cache != dataset.cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": False}, "ground truth"),
        ({"truth": np.zeros((9, 14, 12), np.uint8)}, "shape"),
        ({"truth": np.full((9, 14, 11), 2, np.uint8)}, "label 2"),
        ({"affine": np.diag([3.0, 2.0, 2.1, 1.0])}, "elsewhere in the world"),
    ],
)
def test_a_label_that_does_not_fit_is_named(tmp_path, changes, message):
    for case in range(10):
        write_case(tmp_path / "data", case, **(changes if case == 4 else {}))
    dataset = Loader(Tiny3D, tmp_path / "data", tmp_path / "cache")
    assert "case_04" in dataset.ids["train"]
    with pytest.raises(InputError, match=message) as error:
        dataset.prepare()
    assert "case_04" in str(error.value) and "\n" not in str(error.value)
    assert not list(dataset.cache.glob("*case_04*"))


@pytest.mark.parametrize("kind", [Tiny2D, Tiny3D])
def test_the_size_is_announced_before_it_is_written(folder, tmp_path, kind, capsys, monkeypatch):
    """What the headers foretell is what is written, but for a few bytes about each array; a full disk is noticed."""
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7000))
    with pytest.raises(InputError, match=r"--cache_path: 8 preprocessed volumes need .* 0.0 MB are free"):
        Loader(kind, folder, tmp_path).prepare()
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    dataset = Loader(kind, folder, tmp_path)
    foretold = {file.id: cache.stored_bytes(file, kind) for file in dataset.files("train")}
    dataset.prepare()
    announced, _, _ = capsys.readouterr().out.partition("\n")
    assert f"8 preprocessed volumes need 0.1 MB in {dataset.cache}, " in announced and announced.endswith(" are free")
    for subject, n_bytes in foretold.items():
        arrays = [np.load(path, mmap_mode="r") for path in dataset.entry(subject).glob("*.npy")]
        assert sum(array.nbytes for array in arrays) == n_bytes


def test_volumes_are_mapped_and_never_changed_on_disk(folder, cache_path):
    dataset = Loader(Tiny3D, folder, cache_path)
    dataset.prepare()
    path = dataset.entry(dataset.ids["train"][0]) / "image.npy"
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that cannot be written
        subject = cache.load(path.parent)
    assert str(path) in Path("/proc/self/maps").read_text() or not Path("/proc/self/maps").exists()
    assert np.array_equal(subject.image.data, np.load(path))
    subject.image.data.zero_()
    assert path.read_bytes() == before


def test_a_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--cache_path"):
        Loader(Tiny3D, folder, tmp_path / "file").prepare()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A loader of the tiny cases with nnU-Net's preprocessing. In the first case two slices on two sides are 0."""
    root = tmp_path_factory.mktemp("own")
    for case in range(10):
        truth = np.zeros((9, 14, 11), np.uint8)
        truth[2:6, 4:9, 3:8], truth[6, 4:9, 3:8] = 1, 2
        write_case(root / "data", case, truth=truth, zeros=2 if case == 0 else 0)
    return Loader(Own, root / "data", root / "cache", "0.5:0.5")


def test_own_data_are_cropped_and_keep_what_does_not_count(own):
    foretold = {file.id: cache.stored_bytes(file, Own) for part in own.ids for file in own.files(part)}
    own.prepare(("train", "validation", "test"))
    for part in own.ids:
        for id_ in own.ids[part]:
            image, label = (np.load(own.entry(id_) / f"{name}.npy") for name in ("image", "label"))
            cropped = id_ == "case_00"
            assert image.shape == (1, *((10, 14, 9) if cropped else (14, 14, 11)))
            assert label.shape == image.shape[1:] and label.dtype == np.uint8 and set(np.unique(label)) == {0, 1, 2}
            assert image.nbytes + label.nbytes <= foretold[id_]
            assert (image.nbytes + label.nbytes == foretold[id_]) != cropped
            assert abs(float(image.mean())) < 0.1  # z-scored before it was resampled
    subject, volume = cache.load(own.entry(own.ids["validation"][0])), own.get("validation")[0]
    assert np.array_equal(volume.image.data, subject.image.data)  # and never again
    (batch, *_) = own.train_batches(1)
    assert batch["label"].max() <= 2


def test_what_labels_mean_is_part_of_the_caches_name(own, tmp_path):
    names = {
        Loader(replace(Own, **changes), own.files("train")[0].image.parents[1], tmp_path, "0.5:0.5").cache.name
        for changes in ({}, {"ignore": None}, {"values": (0, 2)}, {"merged_labels": {7: 1}})
    }
    assert len(names) == 4


def test_the_world_of_a_crop_is_that_of_its_file(own):
    """Of 9 slices of 3 mm two have gone, and the others have become ten."""
    own.prepare(("train", "validation", "test"))
    own_frame, world = (cache.load(own.entry("case_00"), name).image for name in ("affine", "world"))
    assert own_frame.spacing == pytest.approx((2.1, 2, 2))
    start = [2 * 3 - 1.5 + 1.05, 0, 2 * 2]
    np.testing.assert_allclose(world.affine, from_matvec(np.diag([2.1, 2, 2]), start))
    np.testing.assert_allclose(world.affine, own_frame.affine)  # the file's axes and origin are those of the world

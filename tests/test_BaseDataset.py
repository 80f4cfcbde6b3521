import importlib
import json
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import cache, patches
from lib.data.BaseDataset import BaseDataset
from lib.data.cache import SubjectFiles
from lib.data.preprocessing import Preprocessing
from lib.system.error import InputError

module = importlib.import_module("lib.data.BaseDataset")  # lib.data's attribute of that name is the class
pytestmark = pytest.mark.filterwarnings("ignore:The maximum displacement")


class Tiny3D(BaseDataset):
    """case_NN/image.nii.gz and label.nii.gz, (slices, rows, columns)."""

    name = "tiny"
    folder = "tiny"
    layout = "case_NN/image.nii.gz"
    how_to_get = "Ask its author."
    class_names = ("background", "thing")
    dim = "3D"
    preprocessing = Preprocessing((3.0, 2.0, 2.0), (-79, 304), 101, 76.9, (8, 16, 16), zscore=False)
    patch_size = (8, 16, 16)
    patches_per_volume = 2
    cases = range(10)
    test_share = 0.2
    defaults = {"batch_size": 3}

    @classmethod
    def find(cls, root):
        images = sorted(root.glob("case_*/image.nii.gz"))
        labels = [path.with_name("label.nii.gz") for path in images]
        return [
            SubjectFiles(image.parent.name, image, label if label.is_file() else None)
            for image, label in zip(images, labels, strict=True)
        ]


class Tiny2D(Tiny3D):
    """The same files as slices along the last axis."""

    name = "tiny2"
    dim = "2D"
    preprocessing = Preprocessing((2.0, 2.0, None))
    patch_size = (16, 12)
    patches_per_volume = None


def write_case(root: Path, case: int, shape=(9, 14, 11), spacing=(3.0, 2.0, 2.0), label=True, **changes):
    rng = np.random.default_rng(case)
    folder = root / f"case_{case:02d}"
    folder.mkdir(parents=True, exist_ok=True)
    truth = np.zeros(shape, np.uint8)
    truth[2:6, 4:9, 3:8] = 1
    image = (rng.normal(0, 60, shape) + 120 * truth).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    nib.save(nib.Nifti1Image(image, affine), folder / "image.nii.gz")
    if label:
        truth = changes.get("truth", truth)
        nib.save(nib.Nifti1Image(truth, changes.get("affine", affine)), folder / "label.nii.gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    for case in range(10):
        write_case(root, case, shape=(9 + case % 3, 14, 11 + case % 2))
    return root


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def unchanged(monkeypatch):
    """No augmentation: patches can be found again in their volume."""
    monkeypatch.setattr(module, "augmentation", lambda dim: tio.Compose([]))


# ---- the split


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(0, 10**6))
def test_every_case_is_in_one_partition(share, seed):
    parts = Tiny3D.split_cases(f"{share}:{1 - share}", seed)
    assert sorted(sum(parts.values(), [])) == list(range(10))
    assert len(parts["test"]) == 2 and len(parts["train"]) == int(8 * share)
    assert parts["test"] == Tiny3D.split_cases("1:0", seed)["test"]  # which does not depend on the shares


@pytest.mark.parametrize("split", ["0.9", "0.9:0.2", "1.1:-0.1", "a:b", "nan:nan", "0.5:0.3:0.2", ""])
def test_a_wrong_split(split, folder):
    with pytest.raises(InputError, match="--split"):
        Tiny3D(folder, split=split)


@pytest.mark.parametrize("patch_size", [(16, 16), (8, 16, 0)])
def test_a_wrong_patch_size(patch_size, folder):
    with pytest.raises(InputError, match="--patch_size"):
        Tiny3D(folder, patch_size=patch_size)


def test_missing_data_says_where_it_looked_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SAURON_DATA", str(tmp_path))
    with pytest.raises(InputError) as error:
        Tiny3D()
    for text in (str(tmp_path / "tiny"), str(Path("data") / "tiny"), "case_NN", "Ask its author", "--data_path"):
        assert text in str(error.value)
    with pytest.raises(InputError, match="nowhere"):
        Tiny3D(tmp_path / "nowhere")


def test_sauron_data_is_where_data_sets_are_looked_for(tmp_path, monkeypatch):
    write_case(tmp_path / "tiny", 3)
    monkeypatch.setenv("SAURON_DATA", str(tmp_path))
    dataset = Tiny3D()
    assert sum(dataset.ids.values(), []) == ["case_03"] and dataset.n_missing == 9


# ---- the cache


def snapshot(root):
    return {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}


def test_preprocessed_once_and_again_when_something_changes(tmp_path, capsys):
    source, cache_path = tmp_path / "data", tmp_path / "cache"
    for case in range(10):
        write_case(source, case)
    before = snapshot(source)
    dataset = Tiny3D(source, cache_path, "0.5:0.5")
    dataset.prepare()
    first = snapshot(cache_path)
    assert snapshot(source) == before
    subjects = [*dataset.ids["train"], *dataset.ids["validation"]]
    assert {path.name for path in dataset.cache.iterdir()} == {*(dataset.entry(id_).name for id_ in subjects), ".lock"}
    assert {path.name for path in first} == {"image.npy", "label.npy", "meta.json", ".lock"}
    meta = json.loads((dataset.entry(dataset.ids["train"][0]) / "meta.json").read_text())
    assert set(meta) == {"id", "affine", "world", "padding", "sources"} and meta["id"] == dataset.ids["train"][0]
    assert "preprocessing tiny" in capsys.readouterr().err

    Tiny3D(source, cache_path, "0.5:0.5").prepare()
    assert snapshot(cache_path) == first and capsys.readouterr().err == ""

    changed, interrupted = dataset.ids["train"][:2]
    write_case(source, int(changed[-2:]), shape=(10, 14, 11))
    (dataset.entry(interrupted) / "meta.json").unlink()
    again = Tiny3D(source, cache_path, "0.5:0.5")
    again.prepare()
    files = snapshot(cache_path).items()
    redone = {path.parent for path, time in files if first.get(path) != time and path.name != ".lock"}
    assert redone == {again.entry(changed), dataset.entry(interrupted)}

    class Other(Tiny3D):
        preprocessing = Preprocessing((3.0, 2.0, 2.5))

    assert Other(source, cache_path).cache != dataset.cache


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
    dataset = Tiny3D(tmp_path / "data", tmp_path / "cache")
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
        kind(folder, tmp_path).prepare()
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    dataset = kind(folder, tmp_path)
    foretold = {file.id: cache.stored_bytes(file, kind.preprocessing) for file in dataset.files("train")}
    dataset.prepare()
    announced, _, _ = capsys.readouterr().out.partition("\n")
    assert f"8 preprocessed volumes need 0.1 MB in {dataset.cache}, " in announced and announced.endswith(" are free")
    for subject, n_bytes in foretold.items():
        arrays = [np.load(path, mmap_mode="r") for path in dataset.entry(subject).glob("*.npy")]
        assert sum(array.nbytes for array in arrays) == n_bytes


def test_volumes_are_mapped_and_never_changed_on_disk(folder, cache_path):
    dataset = Tiny3D(folder, cache_path)
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
        Tiny3D(folder, tmp_path / "file").prepare()


def test_only_test_cases_on_disk(tmp_path):
    case = Tiny3D.split_cases("0.9:0.1", 42)["test"][0]
    write_case(tmp_path / "data", case, label=False)
    dataset = Tiny3D(tmp_path / "data", tmp_path / "cache")
    assert [set(dict(subject)) for subject in dataset.get("test")] == [{"image", "id"}]
    with pytest.raises(InputError, match="none of the training cases"):
        dataset.n_train_batches()


def test_whole_volumes_come_preprocessed_and_zscored(folder, cache_path):
    for dataset in (Tiny3D(folder, cache_path), Tiny2D(folder, cache_path)):
        volumes = dataset.get("validation")
        assert [subject["id"] for subject in volumes] == dataset.ids["validation"] and len(volumes) == 1
        for subject in volumes:
            image, label = subject.image.data, subject.label.data
            assert image.dtype == torch.float32 and label.dtype == torch.uint8 and image.shape == label.shape
            assert abs(float(image.mean())) < 1e-6 and float(image.std(correction=0)) == pytest.approx(1, abs=1e-5)
            assert np.array_equal(subject.image.affine, subject.label.affine)


# ---- patches

SIZES = st.tuples(*[st.integers(1, 12)] * 3)


@settings(deadline=None)
@given(SIZES, st.one_of(st.tuples(*[st.integers(1, 12)] * 2), SIZES), st.integers(0, 99))
def test_patches_lie_in_the_volume_and_the_grid_covers_it(size, patch_size, seed):
    volume = patches.fit(torch.ones(1, *size), patch_size)
    grid = patches.grid_starts(volume.shape[1:], patch_size)
    assert patches.cut(volume, patch_size, grid).shape == (len(grid), 1, *patch_size)
    whole = (*patch_size, 1)[:3]
    for start in grid:
        volume[(0, *map(slice, start, np.add(start, whole)))] = 0
    assert not volume.any()
    if len(patch_size) == 2:
        assert grid == [(0, 0, z) for z in range(size[2])]
    torch.manual_seed(seed)
    for start in patches.random_starts(volume.shape[1:], patch_size, 4):
        assert all(0 <= s <= n - p for s, n, p in zip(start, volume.shape[1:], whole, strict=True))


def test_random_patches_are_uniform():
    torch.manual_seed(0)
    starts = np.array(patches.random_starts((8, 5, 7), (8, 4, 4), 2000))
    assert (starts[:, 0] == 0).all()
    for axis, n in ((1, 2), (2, 4)):
        assert np.abs(np.bincount(starts[:, axis], minlength=n) / 2000 - 1 / n).max() < 0.05


# ---- batches


@pytest.mark.parametrize(("dataset", "per_volume"), [(Tiny2D, [11, 12]), (Tiny3D, [2, 2])])
def test_an_epoch(dataset, per_volume, folder, cache_path):
    data = dataset(folder, cache_path)
    batches = list(data.train_batches(0))
    sizes = [len(batch["id"]) for batch in batches]
    assert len(batches) == data.n_train_batches()
    assert all(size == 3 for size in sizes[:-1]) and 1 <= sizes[-1] <= 3
    ids = sum((batch["id"] for batch in batches), [])
    assert {id_: ids.count(id_) for id_ in ids} == {id_: per_volume[int(id_[-2:]) % 2] for id_ in data.ids["train"]}
    for batch, size in zip(batches, sizes, strict=True):
        assert batch["image"].shape == (size, 1, *data.patch_size) and batch["image"].dtype == torch.float32
        assert batch["label"].shape == (size, *data.patch_size) and batch["label"].dtype == torch.int64
    assert set(torch.cat([batch["label"] for batch in batches]).unique().tolist()) == {0, 1}


@pytest.mark.parametrize("dataset", [Tiny2D, Tiny3D])
def test_batches_follow_from_seed_and_epoch_alone(dataset, folder, cache_path, monkeypatch):
    monkeypatch.setattr(module, "QUEUE", 3)  # so that several queues pass

    def epoch(number=0, **settings):
        state = torch.get_rng_state()
        batches = list(dataset(folder, cache_path, **settings).train_batches(number))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # the next one starts from another state of the global generator
        return batches

    def same(a, b):
        return [batch["id"] for batch in a] == [batch["id"] for batch in b] and all(
            torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "label")
        )

    batches = epoch()
    assert same(batches, epoch(num_workers=2)) and same(batches, epoch(num_workers=1))
    assert not same(batches, epoch(1)) and not same(batches, epoch(seed_train=43))


def test_training_slices_are_slices_of_the_volume(folder, cache_path, unchanged):
    """Without augmentation each one is, image and label alike, one of its volume's, centrally cropped and padded."""
    data = Tiny2D(folder, cache_path)
    slices = {
        subject["id"]: [
            (patches.fit(subject.image.data, (16, 12))[0, ..., z], patches.fit(subject.label.data, (16, 12))[0, ..., z])
            for z in range(subject.image.shape[-1])
        ]
        for subject in data.get("train")
    }
    drawn = set()
    for batch in data.train_batches(0):
        for image, label, id_ in zip(batch["image"], batch["label"], batch["id"], strict=True):
            match = [z for z, pair in enumerate(slices[id_]) if torch.allclose(image[0], pair[0], atol=1e-5)]
            assert len(match) == 1 and torch.equal(label, slices[id_][match[0]][1].long())
            drawn.add((id_, match[0]))
    assert len(drawn) > 40  # of 80 or so: with replacement


@pytest.mark.parametrize("dataset", [Tiny2D, Tiny3D])
def test_an_image_that_is_its_own_label_stays_so_on_the_way_into_a_batch(dataset, tmp_path, monkeypatch):
    """Resampled, augmented, cut: but for the borders, where one is interpolated and the other takes the nearest, each
    voxel of the image still tells its label; moved by two voxels, more of them do not."""
    monkeypatch.setattr(dataset, "patch_size", (32, 28) if dataset is Tiny2D else (16, 32, 28))
    truth = np.zeros((24, 36, 30), np.uint8)
    truth[5:15, 6:22, 8:25] = 1
    for case in range(10):
        folder = tmp_path / f"case_{case:02d}"
        folder.mkdir()
        affine = np.diag([2.4, 1.7, 1.7, 1.0])
        nib.save(nib.Nifti1Image(200 * truth.astype("f4"), affine), folder / "image.nii.gz")
        nib.save(nib.Nifti1Image(truth, affine), folder / "label.nii.gz")
    data = dataset(tmp_path, tmp_path / "cache", batch_size=8)
    images, labels = [], []
    for batch in [*data.train_batches(0), *data.train_batches(1), *data.validation_volumes()]:
        images += batch["image"][:, 0].unbind()
        labels += batch["label"].unbind()
    image, label = torch.stack(images), torch.stack(labels)
    middle = (image[label == 0].median() + image[label == 1].median()) / 2
    agreement = ((image > middle) == (label == 1)).float().mean()
    assert 0.05 < (label == 1).float().mean() < 0.9 and agreement > 0.95
    for axis in range(1, label.ndim):
        for shift in (-2, 2):
            assert ((image > middle) == (label.roll(shift, axis) == 1)).float().mean() < agreement - 0.02


def test_validation_is_every_slice_or_a_grid_that_covers(folder, cache_path):
    data = Tiny2D(folder, cache_path, "0.5:0.5")
    volumes = list(data.validation_volumes())
    assert [volume["id"] for volume in volumes] == data.ids["validation"]
    for volume, subject in zip(volumes, data.get("validation"), strict=True):
        n = subject.image.shape[-1]
        assert volume["image"].shape == (n, 1, 16, 12) and volume["label"].shape == (n, 16, 12)
        assert volume["image"].dtype == torch.float32 and volume["label"].dtype == torch.int64
        expected = patches.fit(subject.label.data, (16, 12))[0].permute(2, 0, 1)
        assert torch.equal(volume["label"], expected.long())
    data = Tiny3D(folder, cache_path, "0.5:0.5", patch_size=(4, 8, 16))
    for volume, subject in zip(data.validation_volumes(), data.get("validation"), strict=True):
        x, y, z = subject.image.shape[1:]
        assert volume["image"].shape == (-(-x // 4) * -(-y // 8) * -(-z // 16), 1, 4, 8, 16)
        assert torch.equal(volume["image"][0, 0], subject.image.data[0, :4, :8, :16])
        assert torch.equal(volume["label"][-1], subject.label.data[0, -4:, -8:, -16:].long())


def test_a_patch_smaller_than_the_slice_also_sees_what_lies_around_the_centre():
    volume = torch.arange(400 * 300 * 2).reshape(1, 400, 300, 2)
    seen = patches.field_of_view(volume, (320, 320), (64, 64))
    assert seen.shape == (1, 320, 300, 2)
    assert seen[0, 0, 0, 0] == volume[0, 40, 0, 0]  # the central 320 rows
    torch.manual_seed(0)
    starts = patches.centred_or_random_starts((320, 300, 2), (64, 64), 400)
    centred = [start for start in starts if start[:2] == (128, 118)]
    assert 150 < len(centred) < 250
    assert {start[2] for start in starts} == {0, 1}
    assert min(s[0] for s in starts) < 20
    assert max(s[0] for s in starts) > 236
    # the class's own patch takes each slice as `fit` does: there is nothing to choose
    assert set(patches.centred_or_random_starts((320, 320, 1), (320, 320), 9)) == {(0, 0, 0)}
    for shape in ((400, 300, 2), (319, 450, 1), (20, 321, 3)):
        volume = torch.rand(1, *shape)
        assert patches.field_of_view(volume, (320, 320), (320, 320)).equal(patches.fit(volume, (320, 320)))

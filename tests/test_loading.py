"""From a prepared data set to volumes and batches."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from tiny import Tiny2D, Tiny3D, write_case, write_cases

from lib.data import cache, loading, patches, volumes
from lib.data.augmentation import augmentation
from lib.data.loading import Loader
from lib.data.preprocessing import preprocess, read_channels, unpadded
from lib.system.error import InputError

pytestmark = pytest.mark.filterwarnings("ignore:The maximum displacement")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def unchanged(monkeypatch):
    """No augmentation: patches can be found again in their volume."""
    monkeypatch.setattr(volumes, "augmentation", lambda dim: tio.Compose([]))


@pytest.mark.parametrize("patch_size", [(16, 16), (8, 16, 0)])
def test_a_wrong_patch_size(patch_size, folder):
    with pytest.raises(InputError, match="--patch_size"):
        Loader(Tiny3D, folder, patch_size=patch_size)


# ---- volumes


def test_only_test_cases_on_disk(tmp_path):
    case = Tiny3D.split_cases("0.9:0.1", 42)["test"][0]
    write_case(tmp_path / "data", case, label=False)
    dataset = Loader(Tiny3D, tmp_path / "data", tmp_path / "cache")
    assert [set(dict(subject)) for subject in dataset.get("test")] == [{"image", "id"}]
    with pytest.raises(InputError, match="none of the training cases"):
        dataset.n_train_batches()


def test_whole_volumes_come_preprocessed_and_zscored(folder, cache_path):
    for data in (Loader(Tiny3D, folder, cache_path), Loader(Tiny2D, folder, cache_path)):
        volumes = data.get("validation")
        assert [subject["id"] for subject in volumes] == data.ids["validation"] and len(volumes) == 1
        for subject in volumes:
            image, label = subject.image.data, subject.label.data
            assert image.dtype == torch.float32 and label.dtype == torch.uint8 and image.shape == label.shape
            own = unpadded(image, cache.padding(data.entry(subject["id"])))
            assert abs(float(own.mean())) < 1e-6 and float(own.std(correction=0)) == pytest.approx(1, abs=1e-5)
            assert image.count_nonzero() == own.count_nonzero() == own.numel()  # what is padded is the mean
            assert np.array_equal(subject.image.affine, subject.label.affine)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_training_validation_and_prediction_see_the_same_padded_volume(folder, tmp_path, monkeypatch, early, counts):
    """A patch as large as the padded volume, which only the z-score at the end of the augmentation changes."""
    whole = (12, 16, 18)
    preprocessing = replace(Tiny3D.preprocessing, min_size=whole, zscore=early, padding_counts=counts)
    dataset = replace(Tiny3D, preprocessing=preprocessing, patch_size=whole)
    monkeypatch.setattr(volumes, "augmentation", lambda dim: tio.Compose([augmentation(dim).transforms[-1]]))
    data = Loader(dataset, folder, tmp_path)
    seen = {subject["id"]: subject for subject in data.get("train")}
    n_seen = 0
    for batch in data.train_batches(0):
        for id_, image, label in zip(batch["id"], batch["image"], batch["label"], strict=True):
            np.testing.assert_allclose(image, seen[id_].image.data, atol=1e-6)
            np.testing.assert_array_equal(label, seen[id_].label.data[0])
            n_seen += 1
    assert n_seen == 2 * len(seen) > 0
    for file in data.files("train"):
        there = preprocess(read_channels(file.images, preprocessing)[0], preprocessing)
        own = unpadded(there.array, there.padding)
        assert there.array.shape == (1, *whole) and own.shape[2] == 14 and own.size < there.array.size
        own = there.array if counts else own
        assert abs(own.mean()) < 1e-6 and own.std() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(there.array, seen[file.id].image.data, atol=1e-6)


def test_no_augmentation_lets_the_padding_count(folder, tmp_path):
    """Whatever was drawn, the image's own voxels end with mean 0, and what was padded with 0."""
    whole = (12, 20, 18)
    preprocessing = replace(Tiny3D.preprocessing, min_size=whole)
    data = Loader(replace(Tiny3D, preprocessing=preprocessing, patch_size=whole), folder, tmp_path)
    for epoch in range(3):
        for batch in data.train_batches(epoch):
            for id_, image, label in zip(batch["id"], batch["image"], batch["label"], strict=True):
                padding = cache.padding(data.entry(id_))
                own = unpadded(image, padding)
                assert abs(float(own.mean())) < 1e-5 and float(own.std(correction=0)) == pytest.approx(1, abs=1e-4)
                assert image.count_nonzero() == own.count_nonzero()
                assert label.count_nonzero() == unpadded(label, padding).count_nonzero()


# ---- batches


@pytest.mark.parametrize(("dataset", "per_volume"), [(Tiny2D, [11, 12]), (Tiny3D, [2, 2])])
def test_an_epoch(dataset, per_volume, folder, cache_path):
    data = Loader(dataset, folder, cache_path)
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
    monkeypatch.setattr(loading, "QUEUE", 3)  # so that several queues pass

    def epoch(number=0, **settings):
        state = torch.get_rng_state()
        batches = list(Loader(dataset, folder, cache_path, **settings).train_batches(number))
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
    data = Loader(Tiny2D, folder, cache_path)
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
def test_an_image_that_is_its_own_label_stays_so_on_the_way_into_a_batch(dataset, tmp_path):
    """Resampled, augmented, cut: but for the borders, where one is interpolated and the other takes the nearest, each
    voxel of the image still tells its label; moved by two voxels, more of them do not."""
    dataset = replace(dataset, patch_size=(32, 28) if dataset is Tiny2D else (16, 32, 28))
    truth = np.zeros((24, 36, 30), np.uint8)
    truth[5:15, 6:22, 8:25] = 1
    for case in range(10):
        folder = tmp_path / f"case_{case:02d}"
        folder.mkdir()
        affine = np.diag([2.4, 1.7, 1.7, 1.0])
        nib.save(nib.Nifti1Image(200 * truth.astype("f4"), affine), folder / "image.nii.gz")
        nib.save(nib.Nifti1Image(truth, affine), folder / "label.nii.gz")
    data = Loader(dataset, tmp_path, tmp_path / "cache", batch_size=8)
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


# ---- steps, foreground


def same(a, b):
    return [batch["id"] for batch in a] == [batch["id"] for batch in b] and all(
        torch.equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "label")
    )


@pytest.mark.parametrize("dataset", [Tiny2D, Tiny3D])
@pytest.mark.parametrize("steps", [1, 4, 40])
def test_an_epoch_of_so_many_batches(dataset, steps, folder, cache_path):
    """Whole ones, whether that takes some of the volumes or all of them several times."""
    data = Loader(dataset, folder, cache_path, steps=steps)
    batches = list(data.train_batches(0))
    assert len(batches) == steps == data.n_train_batches()
    assert all(len(batch["id"]) == len(batch["image"]) == 3 for batch in batches)
    visits, numbers = data.epoch(0)
    folders = [folder.name for folder in visits.folders]
    for start in range(0, len(folders), 7):
        assert len(set(folders[start : start + 7])) == len(folders[start : start + 7])
    assert len(set(visits.seeds)) == len(folders)
    assert len({number for batch in numbers for number in batch}) == 3 * steps
    assert not same(batches, list(data.train_batches(1)))


def test_visits_of_one_volume_augment_it_anew(folder, cache_path):
    volumes, _ = Loader(Tiny3D, folder, cache_path, patch_size=(16, 16, 16), steps=40).epoch(0)
    first = volumes.folders[0]
    images = [volumes[i]["image"] for i, folder in enumerate(volumes.folders) if folder == first]
    assert len(images) > 5 and len({image.tobytes() for image in images}) == len(images)


@pytest.mark.parametrize("dataset", [Tiny2D, Tiny3D])
def test_batches_with_steps_and_foreground_follow_from_seed_and_epoch_alone(dataset, folder, cache_path, monkeypatch):
    monkeypatch.setattr(loading, "QUEUE", 3)
    settings = {"steps": 11, "foreground": 0.33}

    def epoch(number=0, **more):
        state = torch.get_rng_state()
        batches = list(Loader(dataset, folder, cache_path, **settings, **more).train_batches(number))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        return batches

    batches = epoch()
    assert same(batches, epoch(num_workers=2)) and not same(batches, epoch(seed_train=43))
    parts = []
    for rank in range(2):  # each has its part of what one process has, though it loads all volumes here
        monkeypatch.setattr(
            loading.distributed, "share", lambda n, rank=rank: slice(n * rank // 2, n * (rank + 1) // 2)
        )
        parts.append(epoch())
    for batch, *own in zip(batches, *parts, strict=True):
        assert batch["image"].equal(torch.cat([part["image"] for part in own]))
        assert all(part["id"] == batch["id"] for part in own)


@pytest.mark.parametrize("dataset", [Tiny2D, Tiny3D])
def test_every_batch_holds_its_share_of_foreground(dataset, tmp_path, unchanged):
    """Little of the volumes is foreground, and one of them has none at all."""
    truth = np.zeros((40, 40, 40), np.uint8)
    truth[30:32, 3:5, 30:32] = 1
    for case in range(10):
        write_case(tmp_path, case, truth.shape, (3.0, 2.0, 2.0), truth=truth * (case != 5))
    small = (5, 4) if dataset is Tiny2D else (2, 5, 4)
    data = Loader(dataset, tmp_path, tmp_path / "cache", patch_size=small, batch_size=6, steps=30, foreground=0.33)
    batches = list(data.train_batches(0))
    shown = torch.stack([batch["label"].flatten(1).any(1) for batch in batches])
    with_some = torch.tensor([[id_ != "case_05" for id_ in batch["id"]] for batch in batches])
    assert shown.shape == (30, 6) and with_some.float().mean() > 0.7
    assert (shown[:, 4:] == with_some[:, 4:]).all()  # round(6 * 0.67) = 4
    assert shown[:, :4].float().mean() < 0.1


def test_slices_of_an_own_data_set_are_neither_cropped_nor_shown_from_the_centre_alone(tmp_path, unchanged):
    """Neither to its patch in training nor in validation, whose patches cover every slice."""
    truth = np.zeros((40, 36, 3), np.uint8)
    for case in range(10):
        write_case(tmp_path, case, truth.shape, (2.0, 2.0, 2.0), truth=truth)
    dataset = replace(Tiny2D, patch_size=(16, 12))
    data = Loader(dataset, tmp_path, tmp_path / "cache", steps=60, foreground=0.33)
    whole = {subject["id"]: subject.image.data[0].numpy() for subject in data.get("train")}
    starts = []
    for batch in data.train_batches(0):
        for image, id_ in zip(batch["image"][:, 0].numpy(), batch["id"], strict=True):
            at = np.argwhere(np.isclose(whole[id_], image[0, 0], atol=1e-4))
            (start,) = [
                (x, y, z)
                for x, y, z in at
                if x <= 24 and y <= 24 and np.allclose(whole[id_][x : x + 16, y : y + 12, z], image, atol=1e-4)
            ]
            starts.append(start)
    starts = np.array(starts)
    assert (starts[:, :2].min(0) < 3).all() and starts[:, 0].max() > 21 and starts[:, 1].max() > 21
    assert (starts[:, :2] == [12, 12]).all(1).mean() < 0.1
    (volume,) = data.validation_volumes()
    assert volume["image"].shape == (3 * 3 * 3, 1, 16, 12)
    (subject,) = data.get("validation")
    assert volume["image"][-1, 0].equal(subject.image.data[0, 24:, 24:, 2])


@pytest.mark.parametrize(("wrong", "flag"), [({"steps": 0}, "--steps"), ({"foreground": 1.5}, "--foreground")])
def test_wrong_steps_and_foreground(wrong, flag, folder):
    with pytest.raises(InputError, match=flag):
        Loader(Tiny3D, folder, **wrong)


def test_validation_is_every_slice_or_a_grid_that_covers(folder, cache_path):
    data = Loader(Tiny2D, folder, cache_path, "0.5:0.5")
    volumes = list(data.validation_volumes())
    assert [volume["id"] for volume in volumes] == data.ids["validation"]
    for volume, subject in zip(volumes, data.get("validation"), strict=True):
        n = subject.image.shape[-1]
        assert volume["image"].shape == (n, 1, 16, 12) and volume["label"].shape == (n, 16, 12)
        assert volume["image"].dtype == torch.float32 and volume["label"].dtype == torch.int64
        expected = patches.fit(subject.label.data, (16, 12))[0].permute(2, 0, 1)
        assert torch.equal(volume["label"], expected.long())
    data = Loader(Tiny3D, folder, cache_path, "0.5:0.5", patch_size=(4, 8, 16))
    for volume, subject in zip(data.validation_volumes(), data.get("validation"), strict=True):
        x, y, z = subject.image.shape[1:]
        assert volume["image"].shape == (-(-x // 4) * -(-y // 8) * -(-z // 16), 1, 4, 8, 16)
        assert torch.equal(volume["image"][0, 0], subject.image.data[0, :4, :8, :16])
        assert torch.equal(volume["label"][-1], subject.label.data[0, -4:, -8:, -16:].long())

"""Images of several channels, and more labels than a byte holds: a made-up data set on its way to batches and back."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from niftis import oblique

import evaluate
import predict
import train
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.data.loading import Loader
from lib.data.preprocessing import read_channels, standardize, zscore
from lib.inference import Predictor
from lib.system.error import InputError

SHAPE = (16, 20, 6)


def find(root):
    """ID_t2.nii.gz, ID_adc.nii.gz and ID_truth.nii.gz, side by side."""
    ids = [path.name.removesuffix("_t2.nii.gz") for path in sorted(root.glob("*_t2.nii.gz"))]
    channels = {id_: tuple(p for c in ("t2", "adc") if (p := root / f"{id_}_{c}.nii.gz").exists()) for id_ in ids}
    return [SubjectFiles(id_, channels[id_], root / f"{id_}_truth.nii.gz") for id_ in ids]


Prostate = BaseDataset(
    name="prostate",
    class_names=("background", *(f"part {n}" for n in range(1, 301))),
    find=find,
    preprocessing=Preprocessing(spacing_mm=(1.5, 1.5, None), orientation="LPS"),
    channels=("T2", "ADC"),
    patch_size=(16, 16),
    defaults={"batch_size": 4, "fms_init": 4, "levels": 3},
)


def save(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, oblique() if affine is None else affine), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five subjects whose ids have no numbers; the second channel is the first one's mirror image, a thousandfold."""
    root = tmp_path_factory.mktemp("prostate")
    for i, name in enumerate(("ann", "bob", "cem", "dan", "eve")):
        t2 = np.random.default_rng(i).normal(50, 9, SHAPE).astype(np.float32)
        save(root / f"{name}_t2.nii.gz", t2)
        save(root / f"{name}_adc.nii.gz", 1000 * t2[::-1])
        save(root / f"{name}_truth.nii.gz", np.resize(np.arange(301, dtype=np.int16), SHAPE))
    return root


@pytest.fixture(scope="module")
def loader(folder, tmp_path_factory):
    data = Loader(Prostate, folder, tmp_path_factory.mktemp("cache"), split="0.75:0.25")
    data.prepare(("train", "validation", "test"))
    return data


def test_ids_without_numbers_are_split_too(loader):
    assert {part: len(ids) for part, ids in loader.ids.items()} == {"train": 3, "validation": 1, "test": 1}
    assert sorted(sum(loader.ids.values(), [])) == ["ann", "bob", "cem", "dan", "eve"] and loader.n_missing == 0
    assert (Prostate.modalities, Prostate.n_classes, Prostate.dim) == (2, 301, "2D")


def test_the_cache_holds_each_channel_as_it_would_be_alone_and_every_label(folder, loader):
    for part in loader.ids:
        for file in loader.files(part):
            image, label = (np.load(loader.entry(file.id) / f"{name}.npy") for name in ("image", "label"))
            alone = [
                standardize(read_channels(path, Prostate.preprocessing)[0], Prostate.preprocessing)
                for path in file.images
            ]
            np.testing.assert_array_equal(image, np.concatenate([one.array for one in alone]))
            assert image.dtype == np.float32 and label.dtype == np.int16 and label.shape == image.shape[1:]
            assert label.max() > 256


def test_channels_and_labels_come_into_batches(loader):
    batches = list(loader.train_batches(1))
    assert len(batches) == loader.n_train_batches()
    for batch in batches:
        assert batch["image"].shape[1:] == (2, 16, 16) and batch["label"].shape[1:] == (16, 16)
    assert max(int(batch["label"].max()) for batch in batches) > 256
    (volume,) = loader.validation_volumes()
    assert volume["image"].shape[1:] == (2, 16, 16) and volume["label"].max() > 256
    (subject,) = loader.get("validation")
    for channel in subject.image.data:
        assert abs(float(channel.mean())) < 1e-5 and float(channel.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_channels_are_moved_together(folder, loader):
    """Two equal channels stay so through flips, rotations, ...; only gamma is drawn for each."""
    twice = replace(
        Prostate, name="twice", find=lambda root: [replace(f, images=(f.images[0],) * 2) for f in find(root)]
    )
    data = Loader(twice, folder, loader.cache.parent, split="0.75:0.25")
    images = torch.cat([batch["image"] for epoch in range(6) for batch in data.train_batches(epoch)])
    equal = (images[:, 0] == images[:, 1]).flatten(1).all(1)
    assert 0.4 < equal.double().mean() < 1  # gamma is drawn for three volumes in ten


def test_the_cache_is_that_of_both_files(folder, loader, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    changed = tmp_path / "ann_adc.nii.gz"
    changed.unlink()
    save(changed, np.random.default_rng(9).normal(0, 1, SHAPE).astype(np.float32))
    again = Loader(Prostate, tmp_path, loader.cache.parent, split="0.75:0.25")
    again.prepare(("train", "validation", "test"))
    assert {id_ for id_ in again.sources if again.sources[id_] != loader.sources[id_]} == {"ann"}


@pytest.mark.parametrize(
    ("affine", "shape", "message"),
    [(np.diag([2, 2, 2, 1.0]), SHAPE, "lies elsewhere in the world than"), (None, (16, 20, 5), "its shape")],
)
def test_channels_must_share_one_grid(folder, tmp_path, affine, shape, message):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    wrong = tmp_path / "ann_adc.nii.gz"
    wrong.unlink()
    save(wrong, np.random.default_rng(0).normal(0, 1, shape).astype(np.float32), affine)
    data = Loader(Prostate, tmp_path, tmp_path / "cache")
    with pytest.raises(InputError, match=message) as error:
        data.prepare(("train", "validation", "test"))
    assert str(wrong) in str(error.value) and str(tmp_path / "ann_t2.nii.gz") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_channel_that_is_missing_is_named(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bob_adc.nii.gz").unlink()
    with pytest.raises(
        InputError, match=r"bob_t2\.nii\.gz: this image has 1 of 2 channels; .* a file for each of: T2, ADC"
    ):
        Loader(Prostate, tmp_path)


class Copy(torch.nn.Module):
    """The class 260 where the second channel is bright."""

    modalities, n_classes = 2, 301

    def forward(self, x):
        scores = torch.zeros(len(x), self.n_classes, *x.shape[2:])
        scores[:, 260] = (x[:, 1] > 0).float()
        return [scores]


def test_inference_reads_all_channels(folder):
    paths = tuple(folder / f"ann_{name}.nii.gz" for name in ("t2", "adc"))
    keep = Preprocessing((None,) * 3, orientation="".join(nib.aff2axcodes(oblique())))
    prediction = Predictor(Copy(), (16, 16), mirror=False, preprocessing=keep).file(paths)
    bright = zscore(np.asarray(nib.load(paths[1]).dataobj)[None])[0] > 0
    assert prediction.labels.dtype == np.int16
    np.testing.assert_array_equal(prediction.labels == 260, bright)
    assert prediction.source["path"] == str(paths[0])


def test_train_predict_and_evaluate(folder, tmp_path, monkeypatch, capsys):
    """The scripts need no more than the definition; what one changed channel makes old is refused."""
    monkeypatch.setitem(DATASETS, "prostate", replace(Prostate, class_names=Prostate.class_names[:4]))
    data = tmp_path / "data"
    data.mkdir()
    for path in folder.iterdir():
        image = nib.load(path)
        save(data / path.name, np.asarray(image.dataobj) % 4 if "truth" in path.name else np.asarray(image.dataobj))
    options = ["--data_path", data, "--cache_path", tmp_path / "cache", "--output", tmp_path / "runs"]
    options += ["--epochs", 1, "--num_workers", 0, "--device", "cpu", "--split", "0.75:0.25"]
    assert train.main(["--data", "prostate", *map(str, options)]) == 0
    model = tmp_path / "runs" / "unnamed" / "prostate" / "1" / "models" / "model-1"
    argv = ["--data", "prostate", "--model_state", str(model), "--device", "cpu", "--output", str(tmp_path / "out")]
    for source in (["--input", data], ["--original", data, "--skip_existing"], ["--input", data, "--skip_existing"]):
        assert predict.main([*argv, *map(str, source)]) == 0
    names = ["ann", "bob", "cem", "dan", "eve"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [f"{name}.nii.gz" for name in names]
    results = ["--data", "prostate", "--pred", str(tmp_path / "out"), "--gt", str(data), "--num_workers", "1"]
    (tmp_path / "out" / "eve.nii.gz").unlink()
    assert evaluate.main([*results, "--output", str(tmp_path / "results.json")]) == 0
    assert "1 of 5 ground truths have no prediction and do not count: eve" in capsys.readouterr().out
    save(data / "bob_adc.nii.gz", np.random.default_rng(7).normal(0, 1, SHAPE).astype(np.float32))
    assert predict.main([*argv, "--input", str(data), "--skip_existing"]) == 2
    assert "bob_t2.nii.gz: is not the image that" in capsys.readouterr().err
    assert predict.main([*argv, "--input", str(data / "bob_adc.nii.gz"), "--overwrite"]) == 0
    lonely = tmp_path / "lonely.nii.gz"
    save(lonely, np.random.default_rng(7).normal(0, 1, SHAPE).astype(np.float32))
    assert predict.main([*argv, "--input", str(lonely), "--overwrite"]) == 2
    assert "lonely.nii.gz: this image has 1 of 2 channels" in capsys.readouterr().err

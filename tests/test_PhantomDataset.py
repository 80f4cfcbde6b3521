from dataclasses import replace

import pytest

from lib.data import DATASETS
from lib.data.ACDCDataset import ACDCDataset
from lib.data.loading import Loader
from lib.data.PhantomDataset import PhantomDataset
from lib.system.error import InputError

Small = replace(PhantomDataset, cases=range(1, 6))


def test_it_is_a_data_set_like_the_others():
    assert DATASETS["phantom"] is PhantomDataset and PhantomDataset.class_names == ACDCDataset.class_names
    parts = PhantomDataset.split_cases("0.9:0.1", 42)
    assert sorted(sum(parts.values(), [])) == list(range(1, 31)) and len(parts["test"]) == 6
    assert len(parts["train"]) == 21 and set(PhantomDataset.defaults) == set(ACDCDataset.defaults)


def test_it_writes_itself_once_where_it_is_told(tmp_path):
    data = Loader(Small, tmp_path / "made", tmp_path / "cache")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")}
    assert sum(map(len, data.ids.values())) == 10 and data.n_missing == 0
    assert len(data.ids["test"]) == 2 and (tmp_path / "made" / "training" / "patient005").is_dir()
    Loader(Small, tmp_path / "made", tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")} == written

    batch = next(data.train_batches(0))
    assert batch["image"].shape == (data.batch_size, 1, 64, 64) and batch["label"].max() <= 3
    volume = next(data.validation_volumes())
    assert set(volume["label"].unique().tolist()) == {0, 1, 2, 3}


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAURON_DATA", str(tmp_path / "elsewhere"))
    data = Loader(Small)
    assert (tmp_path / "data" / "phantom" / "training").is_dir() and not (tmp_path / "elsewhere").exists()
    assert data.files("train")[0].image.is_file()


def test_it_never_writes_among_other_files(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match=str(tmp_path)):
        Loader(Small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

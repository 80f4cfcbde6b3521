import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchio as tio

import train
from lib.data import DATASETS
from lib.data.BaseDataset import SubjectFiles
from lib.data.loading import Loader
from lib.experiments.feature_maps import agreement, cut_patch, draw_block, find_subject, main, picture, ranking
from lib.system.error import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the phantom, its cache and a run of one epoch (run)."""
    folder = tmp_path_factory.mktemp("feature_maps")
    small = ["--fms_init", "2", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0", "--device", "cpu"]
    paths = ["--data_path", str(folder / "data"), "--cache_path", str(folder / "cache"), "--output", str(folder)]
    argv = ["--data", "phantom", *paths, *small, "--epochs", "1", "--save_fms", "--exp_name", "e"]
    assert train.main(argv) == 0
    (folder / "e" / "phantom" / "1").rename(folder / "run")
    return folder


def test_agreement_finds_the_threshold_and_the_side():
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 0, 0, 0], [0, 0, 0, 0]])
    bright = (labels == 1) * 3.0 + torch.arange(16).view(4, 4) / 16  # above 3: class 1
    dark = -((labels == 2) * 5.0)
    maps = torch.stack([bright, dark, torch.ones(4, 4)])
    dice = agreement(maps, labels, 4)
    assert dice[0, 1] == 1
    assert dice[1, 2] == 1
    # a constant map can only be everything: 2 n / (16 + n)
    assert dice[2].tolist() == pytest.approx([22 / 27, 8 / 20, 2 / 17, 0])
    assert ranking(dice) == [(0, 1), (2, 1), (1, 2)]


def test_a_coarse_map_stands_for_the_labels_it_covers():
    labels = torch.zeros(4, 4, dtype=torch.int64)
    labels[0:2, 0:3] = 1
    dice = agreement(torch.tensor([[[1.0, 0.5], [0.0, 0.0]]]), labels, 2)
    assert dice[0, 1] == pytest.approx(2 * 6 / (8 + 6))  # both upper voxels: 6 of their 8 labels


def subject(shape, patient="s"):
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    return tio.Subject(
        image=tio.ScalarImage(tensor=torch.rand(1, *shape)), label=tio.LabelMap(tensor=label), id=patient
    )


def test_the_slice_with_most_foreground_is_shown():
    flat, deep = subject((6, 4, 5)), subject((20, 6, 4))
    flat.label.data[0, :, :, 3] = 1
    image, labels, k, place = cut_patch(flat, (4, 4), None)
    assert (image.shape, labels.shape, k, place) == ((1, 1, 4, 4), (4, 4), 3, 0)
    assert image[0, 0].equal(flat.image.data[0, 1:5, :, 3])
    for most, start in ((9, 5), (1, 0), (19, 12)):
        deep.label.data.zero_()[0, most] = 1
        image, labels, k, place = cut_patch(deep, (8, 4, 4), None)
        assert (k, place) == (most, most - start)
        assert image[0, 0].equal(deep.image.data[0, start : start + 8, 1:5])
        assert labels[place].all()
        assert np.array_equal(picture(labels, place, 8), labels[place])
        assert np.array_equal(picture(labels[::2], place, 8), labels[place - place % 2])
    wide = subject((8, 20, 20))
    wide.label.data[0, 3, 15, 1] = wide.label.data[0, 3, 18, 2] = 1
    image, *_ = cut_patch(wide, (8, 4, 4), None)  # only rows 15-18 and columns 0-3 or 1-4 hold both
    assert image[0, 0].equal(wide.image.data[0, :, 15:19, 1:5])
    image, *_ = cut_patch(wide, (8, 4, 4), 0)  # no foreground
    assert image[0, 0].equal(wide.image.data[0, :, 8:12, 8:12])


def test_maps_of_a_volume_can_be_drawn():
    maps = [np.random.default_rng(c).random((6, 4)) for c in range(7)]
    inputs = {"image": maps[0], "truth": maps[0] > 0.5, "prediction": maps[0] > 0.6}
    figure = draw_block("b", maps, torch.rand(7, 3), inputs, ("background", "a", "b"), "t")
    figure.canvas.draw()
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert sorted(text.split(":")[0] for text in texts) == list("1234567")


def test_a_run_from_beginning_to_end(folder):
    run = folder / "run"
    assert main(["--run", str(run)]) == 0
    content = json.loads((run / "feature_maps" / "feature_maps.json").read_text())
    data = Loader(DATASETS["phantom"], data_path=folder / "data", cache_path=folder / "cache")
    assert content["subject"] == data.ids["test"][0]
    labels = data.get("test")[0]["label"].data[0]
    assert content["slice"] == int((labels > 0).flatten(0, 1).sum(0).argmax())
    assert len(content["blocks"]) == 6 + 2 * 3
    figures = {path.stem for path in (run / "feature_maps").glob("*.png")}
    assert figures == set(content["blocks"]) | {"agreement"}
    for name, maps in content["blocks"].items():
        fms = np.load(run / "fms" / "epoch-0001" / f"{name}.npy")
        assert sorted(row["map"] for row in maps) == list(range(1, len(fms) + 1))
        for a, b in zip(maps, maps[1:], strict=False):
            assert a["class"] != b["class"] or a["dice"][a["class"]] >= b["dice"][b["class"]]


class Some:
    """Three test, one validation and one training subject; only "a" and "b" lack a ground truth."""

    dataset = SimpleNamespace(name="some")

    def files(self, partition):
        ids = {"test": "abc", "validation": "d", "train": "e"}[partition]
        return [SubjectFiles(id_, (Path("i"),), None if id_ in "ab" else Path("l")) for id_ in ids]

    def get(self, partition):
        return [file.id for file in self.files(partition)]


def test_which_subject_is_shown():
    assert find_subject(Some(), None) == "c"
    assert find_subject(Some(), "e") == "e"
    with pytest.raises(InputError, match="--subject a: has no ground truth"):
        find_subject(Some(), "a")
    with pytest.raises(InputError, match="--subject f: is not in some; ids are such as c"):
        find_subject(Some(), "f")


class Unlabelled(Some):
    def files(self, partition):
        return [file for file in super().files(partition) if file.id != "c"]


def test_without_test_labels_the_first_validation_subject_is_shown():
    assert find_subject(Unlabelled(), None) == "d"


def test_no_validation_image_to_save_maps_of(folder, capsys):
    paths = ["--data_path", str(folder / "data"), "--cache_path", str(folder / "cache"), "--output", str(folder / "o")]
    assert train.main(["--data", "phantom", *paths, "--save_fms", "--split", "1:0", "--device", "cpu"]) == 2
    assert "--save_fms: there is no validation image" in capsys.readouterr().err
    assert not (folder / "o").exists()


def test_bad_input_is_named_in_one_line(folder, tmp_path, capsys):
    run, new = str(folder / "run"), folder / "new"
    new.mkdir()
    shutil.copy(folder / "run" / "config.json", new)
    for argv, message in [
        (["--run", str(tmp_path)], "is no run folder"),
        (["--run", str(new)], "has no model"),
        ([], "the following arguments are required: --run"),
        (["--run", run, "--subject", "patient999_frame01"], "--subject patient999_frame01: is not in phantom"),
        (["--run", run, "--slice", "99"], "--slice 99: "),
    ]:
        assert main([*argv, "--output", str(tmp_path / "o")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []

"""KiTS: split, layouts, labels, and the way from training to the challenge's figures on a small 3D phantom."""

import json
import random
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import lib.pruning.rules
import predict
import train
from lib.data import DATASETS
from lib.data.KiTSDataset import KiTS23Dataset, KiTSDataset
from lib.data.loading import Loader
from lib.data.PhantomDataset import Phantom3DDataset
from lib.data.preprocessing import Grid, Image, Preprocessing, standardize, to_original_grid
from lib.models.nnUNet import nnUNet
from lib.system.error import InputError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "kits19"
VALIDATION = [6, 7, 8, 24, 25, 28, 30, 38, 58, 60, 62, 65, 74, 112, 145, 157, 169, 179, 194, 195, 206]
IPL = np.array([[0, 0, -2.0, 0], [0, -2.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1]])
SHAPE = (9, 24, 20)


# KiTS without the padding to 80 x 160 x 160 voxels
Small = replace(
    KiTSDataset,
    preprocessing=Preprocessing((4.0, 2.0, 2.0), (-79, 304), 101, 76.9, zscore=False, orientation="IPL"),
    patch_size=(8, 16, 16),
)


def write_case(folder: Path, case: int, label_name="segmentation", label_affine=IPL, truth=None) -> Path:
    """Noise with a bright block, which is a kidney with a tumor; no label without `label_name`."""
    folder = folder / f"case_{case:05d}"
    folder.mkdir(parents=True)
    if truth is None:
        truth = np.zeros(SHAPE, np.uint8)
        truth[2:7, 5:15, 4:12] = 1
        truth[3:5, 6:9, 5:8] = 2
    image = np.random.default_rng(case).normal(0, 30, SHAPE) + 100 * (truth > 0)
    nib.save(nib.Nifti1Image(image.astype(np.int16), IPL), folder / "imaging.nii.gz")
    if label_name:
        nib.save(nib.Nifti1Image(truth, label_affine), folder / f"{label_name}.nii.gz")
    return folder


def test_names():
    assert DATASETS["kits"] is DATASETS["kits19"] is KiTSDataset
    assert DATASETS["phantom3d"] is Phantom3DDataset


def test_the_split_is_that_of_its_definition():
    ids = [case for case in range(210) if case not in (15, 23, 37, 68, 125, 133)]
    assert len(ids) == 204
    random.seed(42)
    random.shuffle(ids)
    # the first int(204 * 0.9) = 183 train
    assert KiTSDataset.split_cases("0.9:0.1", 42) == {
        "train": ids[:183],
        "validation": ids[183:],
        "test": list(range(210, 300)),
    }
    assert ids[:10] == [50, 82, 5, 13, 40, 165, 196, 136, 73, 170]
    assert sorted(ids[183:]) == VALIDATION
    assert KiTSDataset.split_cases("1:0", 42)["train"] == ids


@pytest.mark.parametrize(
    ("subfolder", "label_name"),
    [("", "segmentation"), ("data", "segmentation"), ("data", "aggregated_MAJ_seg"), ("dataset", "segmentation")],
)
def test_every_layout(tmp_path, subfolder, label_name):
    for case in (15, 0, 7):
        write_case(tmp_path / subfolder, case, label_name)
    write_case(tmp_path / subfolder, 210, label_name=None)
    write_case(tmp_path / subfolder, 588, label_name)  # KiTS23's own
    (tmp_path / subfolder / "case_00001").mkdir()  # a label without its image, as KiTS19's repository comes
    (tmp_path / subfolder / "case_00001" / "segmentation.nii.gz").touch()
    data = Loader(Small, tmp_path)
    assert data.ids == {"train": ["case_00000"], "validation": ["case_00007"], "test": ["case_00210"]}
    assert data.n_missing == 202  # of the 204; the test cases need not be there
    assert [file.label and file.label.name for part in data.ids for file in data.files(part)] == [
        f"{label_name}.nii.gz",
        f"{label_name}.nii.gz",
        None,
    ]


def test_without_the_data_it_tells_how_to_get_them(tmp_path):
    with pytest.raises(InputError) as error:
        Loader(KiTSDataset, tmp_path)
    for text in (str(tmp_path), "github.com/neheller/kits19", "case_NNNNN", "imaging.nii.gz", "--data_path"):
        assert text in str(error.value)


def test_a_training_case_without_ground_truth_is_named(tmp_path):
    write_case(tmp_path, 0, label_name=None)
    with pytest.raises(InputError, match="case_00000.*ground truth"):
        Loader(Small, tmp_path, tmp_path / "cache").prepare()


def test_preprocessing_is_the_published_one(tmp_path):
    write_case(tmp_path, 0)
    data = Loader(KiTSDataset, tmp_path, tmp_path / "cache")
    data.prepare()
    image = np.load(data.entry("case_00000") / "image.npy")[0]
    label = np.load(data.entry("case_00000") / "label.npy")
    meta = json.loads((data.entry("case_00000") / "meta.json").read_text())
    assert image.shape == label.shape == (80, 160, 160)
    # 9 x 4 / 3.22 = 11.2 slices and 24 x 2 / 1.62 = 29.6, 20 x 2 / 1.62 = 24.7 pixels: the rest is padding
    assert meta["padding"] == [35, 34, 66, 65, 68, 68]
    assert image.min() >= np.float32((-79 - 101) / 76.9) and image.max() <= np.float32((304 - 101) / 76.9)
    assert not image[:35].any() and not image[:, :, -68:].any() and image[35, 66:-65, 68:-68].all()
    assert set(np.unique(label)) == {0, 1, 2}


def test_a_cyst_counts_as_kidney(tmp_path):
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:5, 4:12, 4:12], truth[2:5, 12:16, 4:12], truth[6:8, 4:9, 3:9] = 1, 3, 2
    write_case(tmp_path, 0, truth=truth)
    (subject,) = Loader(Small, tmp_path, tmp_path / "cache").get("train")
    np.testing.assert_array_equal(subject.label.data[0], np.where(truth == 3, 1, truth))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "IPL", "PSR"])
def test_the_order_of_the_axes_is_found_from_the_affine(tmp_path, codes):
    """As the challenge stores it, in RAS, ...: the same voxels in the cache, and a truth in yet another order."""
    write_case(tmp_path / "a", 0)
    for name, wanted in (("imaging", codes), ("segmentation", "RPI")):
        image = nib.load(tmp_path / "a" / "case_00000" / f"{name}.nii.gz")
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(wanted))
        (tmp_path / "b" / "case_00000").mkdir(parents=True, exist_ok=True)
        nib.save(image.as_reoriented(turn), tmp_path / "b" / "case_00000" / f"{name}.nii.gz")
    ((one,), (other,)) = (Loader(Small, tmp_path / name, tmp_path / "cache").get("train") for name in "ab")
    assert torch.equal(one.image.data, other.image.data) and torch.equal(one.label.data, other.label.data)
    assert one.image.orientation == other.image.orientation == ("I", "P", "L")
    np.testing.assert_allclose(one.image.affine, other.image.affine, atol=1e-4)


def test_a_truth_that_lies_elsewhere_is_refused(tmp_path):
    folder = write_case(tmp_path, 0, label_affine=np.eye(4))
    with pytest.raises(InputError, match=r"segmentation\.nii\.gz: lies elsewhere in the world.*RAS and IPL") as error:
        Loader(Small, tmp_path, tmp_path / "cache").prepare()
    assert str(folder / "imaging.nii.gz") in str(error.value)


@pytest.mark.parametrize(
    "names",
    [("imaging.nii", "imaging.nii.gz"), ("segmentation.nii.gz", "segmentation.nii"),
     ("segmentation.nii.gz", "aggregated_MAJ_seg.nii.gz")],
)  # fmt: skip
def test_two_files_that_claim_to_be_one_thing_are_refused(tmp_path, names):
    folder = write_case(tmp_path, 0)
    for name in names:
        (folder / name).touch()
    with pytest.raises(InputError, match="^case_00000: both ") as error:
        Loader(Small, tmp_path)
    assert all(str(folder / name) in str(error.value) for name in names)


def test_a_case_in_two_folders_is_refused(tmp_path):
    for place in ("data", "dataset"):
        write_case(tmp_path / place, 0)
    write_case(tmp_path / "data", 7)
    with pytest.raises(InputError, match="^case_00000: both .*data/case_00000.* and .*dataset/case_00000"):
        Loader(Small, tmp_path)


ROUND_TRIP = {  # Dice of kidney and tumor that resampling there and back keeps
    4: (0.9971, 0.9941),
    7: (0.9965, 0.9944),
    10: (0.9902, 0.9832),
    12: (0.9918, 0.9947),
    21: (0.9938, 0.9926),
    23: (0.9931, 0.9576),
    41: (0.9897, 0.9746),
    68: (0.9750, 0.9583),  # slices of 0.5 mm: one of 3.22 mm holds six of them
}


@pytest.mark.parametrize("case", sorted(ROUND_TRIP))
def test_real_labels_survive_the_round_trip(case):
    """Of the box that holds the foreground, with a margin of 8 voxels; each class there and back as a probability.

    With nearest neighbours on the way there, as for the labels of the training, kidneys keep 0.977 to 0.985, but 0.967
    in case 68. Whole volumes keep the same to 0.001 (tumors: 0.009).
    """
    if not SHARED.is_dir():
        pytest.skip("the shared KiTS19 labels are not beside this checkout")
    label = nib.load(SHARED / f"case_{case:05d}" / "segmentation.nii.gz")
    labels = np.asarray(label.dataobj)
    box = [np.flatnonzero(labels.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    crop = tuple(slice(max(line[0] - 8, 0), line[-1] + 9) for line in box)
    truth = labels[crop].astype(np.uint8)
    grid = Grid(truth.shape, label.affine)
    recipe = Preprocessing(KiTSDataset.preprocessing.spacing_mm, min_size=(80, 160, 160), zscore=False)
    masks = [Image((truth == k)[None].astype(np.float32), grid.affine) for k in range(3)]
    there = [standardize(mask, recipe) for mask in masks]
    probabilities = np.concatenate([volume.array for volume in there])
    slabs = to_original_grid([(slice(0, probabilities.shape[1]), probabilities)], 0, there[0], grid)
    back = np.concatenate([slab.argmax(0) for _, slab in slabs])
    dice = [2 * float(((back == k) & (truth == k)).sum() / ((back == k).sum() + (truth == k).sum())) for k in (1, 2)]
    assert dice == pytest.approx(ROUND_TRIP[case], abs=5e-4) and dice[0] >= 0.97


# ---- prediction and evaluation


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained network that predicts every class somewhere."""
    torch.manual_seed(0)
    network = nnUNet(1, 3, 4, 3, dim="3D")
    network.initialize()
    path = tmp_path_factory.mktemp("model") / "model-1"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_unlabelled_cases_are_predicted_under_the_challenges_names(tmp_path, model, monkeypatch, subfolder):
    monkeypatch.setitem(DATASETS, "kits", Small)
    write_case(tmp_path / "kits" / subfolder, 0)
    for case in (210, 299):
        write_case(tmp_path / "kits" / subfolder, case, label_name=None)
    arguments = ["--data", "kits", "--model_state", str(model), "--device", "cpu"]
    for flags, name in (([], "case_00{}.nii.gz"), (["--challenge_names"], "prediction_00{}.nii.gz")):
        output = tmp_path / name[:4]
        assert predict.main([*arguments, *flags, "--original", str(tmp_path / "kits"), "--output", str(output)]) == 0
        assert sorted(path.name for path in output.glob("*.nii.gz")) == [name.format(210), name.format(299)]
        labels = nib.load(output / name.format(299))
        assert labels.shape == SHAPE and np.array_equal(labels.affine, IPL)


def test_evaluation_pairs_the_challenges_names_and_adds_its_two_figures(tmp_path, capsys):
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:6, 5:15, 4:8], truth[2:6, 5:10, 8:12], truth[2:6, 10:15, 8:12] = 1, 2, 3  # 160, 80 tumor and 80 cyst
    write_case(tmp_path / "gt" / "data", 10, truth=truth)
    (tmp_path / "pred").mkdir()
    predicted = np.where(truth == 3, 1, truth)
    predicted[2:6, 5:10, 8:10] = 1  # half of the tumor
    nib.save(nib.Nifti1Image(predicted, IPL), tmp_path / "pred" / "prediction_00010.nii.gz")
    output = tmp_path / "results.json"
    arguments = ["--data", "kits", "--pred", str(tmp_path / "pred"), "--gt", str(tmp_path / "gt")]
    assert evaluate.main([*arguments, "--output", str(output), "--num_workers", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.split("challenge")[1].split()[:6] == ["kidney", "and", "tumor", "1.0000", "(", "1)"]
    results = json.loads(output.read_text())
    found = results["prediction_00010"]
    assert found["dice"][1:] == pytest.approx([2 * 240 / (240 + 280), 2 * 40 / (40 + 80)])
    assert found["HD"][2] == 4.0  # two voxels of 2 mm, as the prediction's affine says
    assert set(found["challenge"]) == {"kidney_and_tumor", "tumor"}
    whole, tumor = found["challenge"]["kidney_and_tumor"], found["challenge"]["tumor"]
    assert whole == {"dice": 1, "HD": 0, "HD95": 0, "ASSD": 0, "surface_dice": 1, "TP": 320, "FP": 0, "FN": 0} | {
        "TN": 9 * 24 * 20 - 320
    }
    assert tumor == {metric: values[2] for metric, values in found.items() if metric != "challenge"}
    assert results["average"]["challenge"] == found["challenge"]
    assert results["n"]["challenge"]["tumor"] == dict.fromkeys(tumor, 1)


# ---- KiTS23


def test_kits23_is_the_public_training_set_with_a_fifth_to_test():
    assert DATASETS["kits23"] is KiTS23Dataset and KiTS23Dataset.preprocessing == KiTSDataset.preprocessing
    parts = KiTS23Dataset.split_cases("0.9:0.1", 42)
    assert sorted(sum(parts.values(), [])) == [*range(300), *range(400, 589)]
    assert [len(parts[part]) for part in ("train", "validation", "test")] == [351, 40, 98]
    with pytest.raises(InputError, match="found no .dataset/.case_NNNNN.*github.com/neheller/kits23"):
        Loader(KiTS23Dataset, "nowhere")


def test_kits23_from_training_to_the_challenges_regions(tmp_path, monkeypatch, capsys):
    small = replace(KiTS23Dataset, preprocessing=Small.preprocessing, patch_size=Small.patch_size)
    monkeypatch.setitem(DATASETS, "kits23", small)
    truth = np.zeros(SHAPE, np.uint8)
    truth[2:7, 5:15, 4:12], truth[3:5, 6:9, 5:8], truth[3:5, 10:14, 5:8] = 1, 2, 3
    split = small.split_cases("0.5:0.5", 42)
    case, *_ = split["test"]
    for number in (*split["train"][:2], split["validation"][0], case):
        write_case(tmp_path / "kits23" / "dataset", number, truth=truth)
    write_case(tmp_path / "kits23" / "dataset", 350, label_name=None)  # there is no such case
    monkeypatch.setenv("SAURON_DATA", str(tmp_path))
    data = ["--data", "kits23", "--device", "cpu"]
    options = [*data, "--split", "0.5:0.5", "--cache_path", tmp_path / "cache", "--output", tmp_path / "runs"]
    options += ["--epochs", 1, "--fms_init", 4, "--levels", 3, "--num_workers", 0]
    assert train.main([*map(str, options)]) == 0
    run = tmp_path / "runs" / "unnamed" / "kits23" / "1"
    argv = [*data, "--model_state", run / "models" / "model-1", "--output", tmp_path / "out"]
    assert predict.main([*map(str, argv)]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == [f"case_{case:05d}.nii.gz"]
    nib.save(nib.Nifti1Image(np.where(truth == 3, 2, truth), IPL), tmp_path / "out" / f"case_{case:05d}.nii.gz")
    capsys.readouterr()
    argv = ["--data", "kits23", "--pred", tmp_path / "out", "--output", tmp_path / "r.json", "--num_workers", 1]
    assert evaluate.main([*map(str, argv)]) == 0
    found = json.loads((tmp_path / "r.json").read_text())[f"case_{case:05d}"]
    assert set(found["challenge"]) == {"kidney_and_masses", "masses", "tumor"} and found["dice"][3] == 0
    tumor, cyst = 2 * 3 * 3, 2 * 4 * 3  # voxels
    dice = {region: values["dice"] for region, values in found["challenge"].items()}
    assert dice == pytest.approx({"kidney_and_masses": 1, "masses": 1, "tumor": 2 * tumor / (tumor + tumor + cyst)})
    table = capsys.readouterr().out
    assert all(text in table for text in ("cyst", "challenge", "kidney and masses"))


# ---- end to end


def test_from_training_to_evaluation_in_three_dimensions(tmp_path, monkeypatch, capsys):
    """Train for two epochs with pruning, once in one go and once interrupted; predict and evaluate the test set."""
    monkeypatch.setattr(lib.pruning.rules, "training_settled", lambda *_: True)  # so that thresholds rise at once
    data = ["--data", "phantom3d", "--data_path", str(tmp_path / "phantom3d"), "--cache_path", str(tmp_path / "cache")]
    small = ["--fms_init", "4", "--rho", "1", "--tau_max", "0.4", "--kappa", "1", "--prune_between", "0%", "100%"]
    options = [*data, *small, "--num_workers", "0", "--device", "cpu"]
    assert train.main([*options, "--epochs", "2", "--output", str(tmp_path / "runs")]) == 0
    run = tmp_path / "runs" / "unnamed" / "phantom3d" / "1"
    history = json.loads((run / "history.json").read_text())
    assert history["filters"][-1] < history["filters"][0]

    from lib import checkpoint

    save = checkpoint.save

    def save_then_die(state):
        save(state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train.main([*options, "--epochs", "2", "--output", str(tmp_path / "killed")])
    again = tmp_path / "killed" / "unnamed" / "phantom3d" / "1"
    assert train.main(["--resume", str(again)]) == 0
    whole, continued = (torch.load(r / "models" / "model-2", weights_only=True) for r in (run, again))
    assert all(value.equal(continued[key]) for key, value in whole.items())

    output = tmp_path / "predictions"
    source = ["--data", "phantom3d", "--original", str(tmp_path / "phantom3d"), "--device", "cpu"]
    assert predict.main([*source, "--model_state", str(run / "models" / "model-2"), "--output", str(output)]) == 0
    predictions = sorted(output.glob("*.nii.gz"))
    assert [path.name.removesuffix(".nii.gz") for path in predictions] == sorted(
        f"case_{case:05d}" for case in Phantom3DDataset.split_cases("0.9:0.1", 42)["test"]
    )
    for path in predictions:
        original = nib.load(tmp_path / "phantom3d" / path.name.removesuffix(".nii.gz") / "imaging.nii.gz")
        labels = nib.load(path)
        assert labels.shape == original.shape and np.array_equal(labels.affine, original.affine)
    capsys.readouterr()
    arguments = ["--pred", str(output), "--gt", str(tmp_path / "phantom3d"), "--output", str(tmp_path / "r.json")]
    assert evaluate.main(["--data", "phantom3d", *arguments, "--num_workers", "1"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["n"]["dice"] == [3, 3, 3]
    table = capsys.readouterr().out
    assert all(text in table for text in ("FLOPs", "kidney", "tumor", "challenge", "kidney and tumor"))

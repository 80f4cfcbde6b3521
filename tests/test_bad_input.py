"""Bad input ends a script with exit code 2 and one line that names the file or flag; nothing is written."""

import gzip
import json
import shutil
import struct

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import predict
import train
from lib import checkpoint
from lib.data.images import read_geometry, read_image, read_label
from lib.evaluation import read_model_summary
from lib.models import load_model
from lib.models.BaseModel import read_state
from lib.models.filters import read_filters
from lib.models.nnUNet import nnUNet
from lib.record import mixed_jobs, read_record
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.files import read_sums

SMALL = ["--fms_init", "4", "--levels", "3", "--patch_size", "16", "16", "--num_workers", "0", "--device", "cpu"]
PATIENTS = (1, 3, 2)  # with --split 0.9:0.1 and seed 42 two to train on, and one of the test set


def write(path, array, affine=None, **header):
    image = nib.Nifti1Image(array, np.diag([1.25, 1.25, 10, 1.0]) if affine is None else affine)
    nib.save(image, path)
    return image


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data/, model, in_filters, out_filters, predictions/ and truth/."""
    folder = tmp_path_factory.mktemp("bad")
    for patient in PATIENTS:
        home = folder / "data" / f"patient{patient:03}"
        home.mkdir(parents=True)
        rng = np.random.default_rng(patient)
        write(home / f"{home.name}_frame01.nii.gz", rng.normal(size=(16, 16, 2)).astype("f4"))
        write(home / f"{home.name}_frame01_gt.nii.gz", rng.integers(0, 4, (16, 16, 2)).astype("u1"))
    torch.manual_seed(0)
    torch.save(nnUNet(1, 4, 4, 3).state_dict(), folder / "model")
    torch.save(nnUNet(2, 4, 4, 3).state_dict(), folder / "model_2_channels")
    torch.save(nnUNet(1, 3, 4, 3).state_dict(), folder / "model_3_classes")
    torch.save(nnUNet(1, 4, 4, 3, dim="3D").state_dict(), folder / "model_3d")
    torch.save({"a": 1}, folder / "model_of_something")
    (folder / "filters").write_text("enc_ConvBlock_1\tb\n4\t5\n")
    (folder / "no_filters").write_text("a\tb\n1\tx\n")
    (folder / "file").write_text("some text")
    (folder / "empty").mkdir()
    for name in ("pred", "truth"):
        (folder / name).mkdir()
        write(folder / name / "a.nii.gz", np.ones((4, 4, 2), np.uint8))
    (folder / "pred_alone").mkdir()
    write(folder / "pred_alone" / "b.nii.gz", np.ones((4, 4, 2), np.uint8))
    (folder / "done").mkdir()
    for name in ("patient002_frame01", "image"):
        write(folder / "done" / f"{name}.nii.gz", np.ones((16, 16, 2), np.uint8))
    (folder / "results.json").write_text("{}")
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text("{}")
    return folder


def script(name, place, out):
    return {
        "train": (
            train.main,
            ["--data", "acdc", "--data_path", place / "data", "--cache_path", out / "cache", "--output", out / "runs"]
            + [*SMALL, "--epochs", "1"],
        ),
        "predict": (
            predict.main,
            ["--data", "acdc", "--original", place / "data", "--model_state", place / "model", "--output", out / "p"]
            + ["--patch_size", "16", "16", "--device", "cpu"],
        ),
        "evaluate": (
            evaluate.main,
            ["--data", "acdc", "--pred", place / "pred", "--gt", place / "truth", "--output", out / "r.json"]
            + ["--num_workers", "1"],
        ),
    }[name]


def assert_refused(code, capsys, words):
    text = capsys.readouterr().err
    lines = [line for line in text.split("\n") if line.strip() and "\r" not in line]
    assert code == 2, text
    assert "Traceback" not in text
    assert len(lines) == 1 and ": error: " in lines[0], text
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def written(folder):
    """All that is there, but for preprocessed volumes: those that are whole may stay."""
    return [path for path in folder.rglob("*") if "cache" not in path.relative_to(folder).parts]


def numeric(name, *flags_and_values):
    for flag, *values in flags_and_values:
        for value in values:
            yield name, [flag, value], [flag]


# (script, what is added to its arguments, what the line says); {} is the folder of `place`
FLAGS = [
    *numeric(
        "train",
        ("--epochs", "0", "-1", "nan", "1e9", "9999999999"),
        ("--batch_size", "0", "-1", "nan", "9" * 30),
        ("--val_interval", "0", "-1", "nan", "9" * 30),
        ("--lr", "0", "-1", "nan", "inf", "1e9"),
        ("--wd", "-1", "nan", "inf", "2"),
        ("--momentum", "-1", "nan", "2"),
        ("--lambda", "-1", "nan", "inf", "1e300"),
        ("--tau_max", "0", "-1", "nan", "2"),
        ("--kappa", "0", "-1", "nan", "9" * 30),
        ("--rho", "0", "-1", "nan", "9" * 30),
        ("--mu", "-1", "nan", "2"),
        ("--fms_init", "0", "-4", "nan", "9" * 30),
        ("--levels", "0", "2", "-1", "nan", "99"),
        ("--num_workers", "-1", "nan", "100000"),
        ("--seed_train", "-1", "nan", "9" * 30),
        ("--seed_data", "-1", "nan", "9" * 30),
        ("--epoch_start", "-1", "nan", "9" * 30),
        ("--prune_between", "x", "nan%", "101%"),
        ("--max_flops", "x", "0%", "120%", "-1G", "nan"),
        ("--max_ms", "0", "-1", "nan", "inf"),
        ("--min_filters", "0", "-1", "nan", "9" * 30),
        ("--max_prune_fraction", "0", "-1", "nan", "2"),
    ),
    *numeric("predict", ("--batch_size", "0", "-1", "nan", "9" * 30)),
    *numeric("evaluate", ("--tolerance", "-1", "nan", "inf"), ("--num_workers", "0", "-1", "nan", "9" * 30)),
    ("train", ["--patch_size", "0", "16"], ["--patch_size"]),
    ("train", ["--patch_size", "99999999", "16"], ["--patch_size"]),
    ("train", ["--patch_size", "18", "16"], ["--patch_size", "multiple of 4", "18"]),
    ("train", ["--patch_size", "4", "16"], ["--patch_size", "at least 8"]),
    ("train", ["--patch_size", "16", "16", "16"], ["--patch_size", "2 numbers"]),
    ("predict", ["--patch_size", "18", "16"], ["--patch_size", "multiple of 4"]),
    ("predict", ["--patch_size", "4", "16"], ["--patch_size", "at least 8"]),
    ("predict", ["--patch_size", "16"], ["--patch_size", "2 numbers"]),
    ("train", ["--split", "0.5:0.6"], ["--split 0.5:0.6"]),
    ("train", ["--split", "1"], ["--split 1"]),
    ("train", ["--split", "a:b"], ["--split a:b"]),
    ("train", ["--split", "nan:nan"], ["--split nan:nan"]),
    ("train", ["--split", "-1:2"], ["--split"]),
    ("train", ["--split", "0:1"], ["--split", "training cases"]),
    ("train", ["--data", "acdcc"], ["--data", "did you mean acdc?"]),
    ("train", ["--model", "suaron"], ["--model", "did you mean sauron?"]),
    ("train", ["--loss", "DS_CrossEntropyDiceLos"], ["--loss", "did you mean DS_CrossEntropyDiceLoss?"]),
    ("train", ["--dist_fun", "euc_nrom"], ["--dist_fun", "did you mean euc_norm?"]),
    ("train", ["--imp_fun", "euc_rnd"], ["--imp_fun", "did you mean euc_rand?"]),
    ("train", ["--optim", "adamw"], ["--optim", "did you mean adam?"]),
    ("train", ["--nesterov", "maybe"], ["--nesterov"]),
    ("train", ["--device", "gpu"], ["--device gpu"]),
    ("train", ["--bach_size", "3"], ["--bach_size", "did you mean --batch_size?"]),
    ("train", ["--exp_name", "../elsewhere"], ["--exp_name"]),
    ("predict", ["--data", "phantm"], ["--data", "did you mean phantom?"]),
    ("predict", ["--partition", "tests"], ["--partition", "did you mean test?"]),
    ("predict", ["--overwrit", "--skip_exist"], ["not allowed with"]),
    ("evaluate", ["--data", "acd"], ["--data", "did you mean acdc?"]),
    # folders and files that are not there, or not what they should be
    ("train", ["--data_path", "{}/nowhere"], ["--data acdc", "{}/nowhere"]),
    ("train", ["--data_path", "{}/empty"], ["--data acdc", "{}/empty"]),
    ("train", ["--data_path", "{}/file"], ["--data acdc", "{}/file"]),
    ("train", ["--cache_path", "{}/file"], ["--cache_path", "{}/file"]),
    ("train", ["--output", "{}/file"], ["--output {}/file"]),
    ("train", ["--resume", "{}/nowhere"], ["{}/nowhere"]),
    ("train", ["--resume", "{}/run"], ["{}/run"]),
    ("train", ["--history", "{}/run"], ["--history"]),
    ("predict", ["--original", "{}/empty"], ["{}/empty"]),
    ("predict", ["--input", "{}/nowhere"], ["--input {}/nowhere"]),
    ("predict", ["--input", "{}/empty"], ["--input {}/empty"]),
    ("predict", ["--input", "{}/file"], ["--input {}/file"]),
    ("predict", ["--output", "{}/file"], ["--output {}/file"]),
    ("predict", ["--output", "{}/file/sub"], ["--output {}/file/sub"]),
    ("predict", ["--output", "{}/done"], ["{}/done/patient002_frame01.nii.gz", "--overwrite"]),
    ("evaluate", ["--pred", "{}/nowhere"], ["--pred {}/nowhere"]),
    ("evaluate", ["--pred", "{}/empty"], ["--pred {}/empty"]),
    ("evaluate", ["--gt", "{}/nowhere"], ["--gt {}/nowhere"]),
    ("evaluate", ["--gt", "{}/empty"], ["a.nii.gz", "{}/empty"]),
    ("evaluate", ["--pred", "{}/pred_alone"], ["b.nii.gz", "no ground truth"]),
    ("evaluate", ["--output", "{}/results.json"], ["--output {}/results.json", "--overwrite"]),
    ("evaluate", ["--output", "{}/file/results.json"], ["--output {}/file/results.json"]),
    # models, filter files and data sets that do not fit one another
    ("predict", ["--model_state", "{}/nowhere"], ["{}/nowhere"]),
    ("predict", ["--model_state", "{}/file"], ["{}/file"]),
    ("predict", ["--model_state", "{}/empty"], ["{}/empty"]),
    ("predict", ["--model_state", "{}/model_of_something"], ["{}/model_of_something"]),
    ("predict", ["--model_state", "{}/model_2_channels"], ["modalities is 2", "needs 1"]),
    ("predict", ["--model_state", "{}/model_3_classes"], ["n_classes is 3", "needs 4"]),
    ("predict", ["--model_state", "{}/model_3d"], ["dim is 3D", "needs 2D"]),
    ("predict", ["--in_filters", "{}/filters"], ["{}/filters", "enc_ConvBlock_1 has 4", "1 in {}/model"]),
    ("predict", ["--out_filters", "{}/filters"], ["{}/filters", "enc_ConvBlock_2 has no filters"]),
    ("predict", ["--out_filters", "{}/no_filters"], ["{}/no_filters"]),
    ("predict", ["--out_filters", "{}/nowhere"], ["{}/nowhere"]),
    ("train", ["--model_state", "{}/nowhere"], ["{}/nowhere"]),
    ("train", ["--model_state", "{}/file"], ["{}/file"]),
    ("train", ["--model_state", "{}/model", "--levels", "4", "--patch_size", "16", "16"], ["{}/model", "missing"]),
    ("train", ["--model_state", "{}/model_2_channels"], ["encoder.0.seq.0.weight", "(4, 2, 3, 3)", "(4, 1, 3, 3)"]),
    ("train", ["--model_state", "{}/model_3d"], ["encoder.0.seq.0.weight", "(4, 1, 3, 3, 3)"]),
    ("train", ["--in_filters", "{}/filters"], ["--in_filters needs --out_filters"]),
    ("train", ["--out_filters", "{}/no_filters"], ["{}/no_filters"]),
    ("train", ["--out_filters", "{}/filters"], ["{}/filters"]),
    ("train", ["--epoch_start", "2"], ["--epoch_start needs --model_state"]),
]


@pytest.mark.parametrize(("name", "more", "words"), FLAGS)
def test_bad_flags(place, tmp_path, capsys, name, more, words):
    main, argv = script(name, place, tmp_path)
    before = sorted(place.rglob("*"))
    code = main([str(part) for part in argv] + [part.replace("{}", str(place)) for part in more])
    assert_refused(code, capsys, [word.replace("{}", str(place)) for word in words])
    assert written(tmp_path) == []
    assert sorted(place.rglob("*")) == before


def patched(path, offset, format_, value):
    """Overwrite a field of the header."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into(format_, data, offset, value)
    path.write_bytes(gzip.compress(bytes(data)))


def with_voxel(path, value):
    image = nib.load(path)
    array = np.asarray(image.dataobj).copy()
    array[:3, 0, 0] = value
    write(path, array)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
IMAGES = {  # what happens to an image, and what is said of it
    "cut": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "cannot be read"),
    "corrupt gzip": (lambda p: p.write_bytes(p.read_bytes()[:200] + b"x" * 300), "cannot be read"),
    "no gzip": (lambda p: p.write_bytes(b"x" * 1000), "cannot be read"),
    "empty": (lambda p: p.write_bytes(b""), "cannot be read"),
    "text": (lambda p: p.write_bytes(gzip.compress(b"some text" * 100)), "cannot be read"),
    "NaN": (lambda p: with_voxel(p, np.nan), "NaN or infinite"),
    "infinite": (lambda p: with_voxel(p, np.inf), "NaN or infinite"),
    "constant": (lambda p: write(p, np.full((16, 16, 2), 7, "f4")), "all voxels are 7"),
    "zero spacing": (lambda p: patched(p, 80, "<f", 0.0), "voxel size"),
    "negative spacing": (lambda p: patched(p, 84, "<f", -1.25), "voxel size"),
    "NaN spacing": (lambda p: patched(p, 88, "<f", np.nan), "voxel size"),
    "two volumes": (lambda p: write(p, np.ones((16, 16, 2, 2), "f4")), "(16, 16, 2, 2)"),
    "two dimensions": (lambda p: write(p, np.ones((16, 16), "f4")), "(16, 16)"),
    "no voxels": (lambda p: write(p, np.zeros((0, 16, 2), "f4")), ""),
    "complex": (lambda p: write(p, np.ones((16, 16, 2), "c8")), "complex64"),
    "RGB": (lambda p: write(p, np.zeros((16, 16, 2), RGB)), "not real numbers"),
    "flat affine": (lambda p: patched(p, 280, "<f", 0.0), "affine"),
}
LABELS = {
    "another shape": (lambda p: write(p, np.zeros((16, 15, 2), "u1")), "its shape (16, 15, 2) is not (16, 16, 2)"),
    "another affine": (lambda p: write(p, np.zeros((16, 16, 2), "u1"), np.eye(4)), "elsewhere in the world"),
    "a label too high": (lambda p: with_voxel(p, 4), "label 4 in 3 voxels"),
    "a negative label": (lambda p: write(p, np.full((16, 16, 2), -1, "i2")), "label -1 in 512 voxels"),
    "a fraction": (lambda p: write(p, np.full((16, 16, 2), 0.5, "f4")), "label 0.5 in 512 voxels"),
    "NaN": (lambda p: write(p, np.full((16, 16, 2), np.nan, "f4")), "NaN"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:50]), "cannot be read"),
    "missing": (lambda p: p.unlink(), "no ground truth"),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["train", "predict"])
def test_bad_images(place, tmp_path, capsys, name, kind):
    spoil, words = IMAGES[kind]
    shutil.copytree(place / "data", tmp_path / "in")
    path = next((tmp_path / "in" / ("patient001" if name == "train" else "patient002")).glob("*01.nii.gz"))
    spoil(path)
    main, argv = script(name, place, tmp_path / "out")
    assert_refused(
        main([*map(str, argv), "--data_path" if name == "train" else "--original", str(tmp_path / "in")]),
        capsys,
        [path, words],
    )
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize("kind", LABELS)
def test_bad_labels(place, tmp_path, capsys, kind):
    spoil, words = LABELS[kind]
    shutil.copytree(place / "data", tmp_path / "in")
    path = next((tmp_path / "in" / "patient001").glob("*_gt.nii.gz"))
    spoil(path)
    main, argv = script("train", place, tmp_path / "out")
    named = str(path).replace("_gt", "") if kind == "missing" else path
    assert_refused(main([*map(str, argv), "--data_path", str(tmp_path / "in")]), capsys, [named, words])
    assert written(tmp_path / "out") == []


PAIRS = {
    "another shape": (np.zeros((4, 4, 3), "u1"), None, "(4, 4, 3)"),
    "another affine": (np.zeros((4, 4, 2), "u1"), np.eye(4), "elsewhere in the world"),
    "a label too high": (np.full((4, 4, 2), 9, "u1"), None, "9 in 32 voxels"),
    "a fraction": (np.full((4, 4, 2), 0.5, "f4"), None, "0.5 in 32 voxels"),
    "NaN": (np.full((4, 4, 2), np.nan, "f4"), None, "nan in 32 voxels"),
    "complex": (np.ones((4, 4, 2), "c8"), None, "complex64"),
    "two volumes": (np.zeros((4, 4, 2, 2), "u1"), None, "(4, 4, 2, 2)"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_bad_predictions(place, tmp_path, capsys, kind):
    array, affine, words = PAIRS[kind]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.nii.gz", array, affine)
    main, argv = script("evaluate", place, tmp_path / "out")
    assert_refused(main([*map(str, argv), "--pred", str(tmp_path / "in")]), capsys, ["a.nii.gz", words])
    assert written(tmp_path / "out") == []


def numeric_flags(parser):
    """The flags that take numbers: their type was made by `number`."""
    return [
        action.option_strings[0] for action in parser._actions if "number." in getattr(action.type, "__qualname__", "")
    ]


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "1e", ""])
@pytest.mark.parametrize("flag", numeric_flags(Settings.parser()))
def test_every_numeric_flag_of_a_training_refuses_what_is_no_sensible_number(capsys, flag, value):
    assert_refused(train.main(["--data", "acdc", flag, value]), capsys, [flag])


def test_the_table_is_long_and_good_input_is_accepted(place, tmp_path):
    assert len(FLAGS) + 2 * len(IMAGES) + len(LABELS) + len(PAIRS) >= 60
    for name in ("train", "predict", "evaluate"):
        main, argv = script(name, place, tmp_path)
        assert main([*map(str, argv)]) == 0


def test_bfloat16_is_refused_for_3d_trainings_on_the_cpu(tmp_path, capsys):
    argv = ["--data", "phantom3d", "--data_path", tmp_path / "data", "--output", tmp_path / "runs", "--device", "cpu"]
    assert_refused(train.main([*map(str, argv), "--amp"]), capsys, ["--amp", "3D", "leave it out"])
    assert not list(tmp_path.iterdir())


def test_a_setting_of_another_type_does_not_resume(place, tmp_path, capsys):
    main, argv = script("train", place, tmp_path)
    assert main([*map(str, argv)]) == 0
    run = tmp_path / "runs" / "unnamed" / "acdc" / "1"
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"batch_size": [1]}))
    capsys.readouterr()
    assert_refused(main(["--resume", str(run), "--epochs", "2"]), capsys, [run / "config.json", "batch_size"])


# Random bytes: InputError or a result, nothing else

FUZZ = settings(max_examples=40)
READERS = {
    "image.nii": [read_image, lambda path: read_label(path, 4), read_geometry],
    "image.nii.gz": [read_image, lambda path: read_label(path, 4), read_geometry],
    "model-1": [read_state],
    "state-1": [checkpoint.read_training],
    "filters": [read_filters],
    "config.json": [lambda path: Settings.read(path.parent)],
    "model.json": [lambda path: read_model_summary(path.parent)],
    "predictions.json": [lambda path: read_record(path.parent), lambda path: mixed_jobs(path.parent, ["image.nii"])],
    "SHA256SUMS": [lambda path: read_sums(path.parent)],
}


def read_all(path):
    for read in READERS[path.name]:
        try:
            read(path)
        except InputError as error:
            assert "\n" not in str(error)
            assert path.name.split(".")[0] in str(error) or str(path.parent) in str(error)


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(data=st.binary(max_size=600))
def test_random_bytes(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    read_all(tmp_path / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["image.nii", "image.nii.gz", "model-1", "state-1"])
@FUZZ
@given(data=st.data())
def test_a_good_file_with_some_other_bytes(tmp_path, place, name, data):
    if name.startswith("image"):
        good = gzip.decompress(next(place.glob("data/*/*01.nii.gz")).read_bytes())[:1500]
    else:
        good = (place / "model").read_bytes()
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 600) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))
    read_all(tmp_path / name)


CHANGES = {
    "complex": lambda t: t.to(torch.complex64),
    "whole": lambda t: t.to(torch.int64),
    "sparse": lambda t: t.to_sparse(),
    "without data": lambda t: t.to("meta"),
    "NaN": lambda t: t + torch.nan,
    "infinite": lambda t: t + torch.inf,
    "a number": lambda t: t.sum(),
    "flat": lambda t: t.flatten(),
    "cut": lambda t: t[:1],
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("kind", [*CHANGES, "missing", "other key"])
def test_a_model_with_some_other_tensor(tmp_path, place, kind):
    state = torch.load(place / "model", weights_only=True)
    for key, tensor in state.items():
        if kind == "cut" and tensor.shape[0] == 1 or kind == "flat" and tensor.ndim == 1:
            continue
        changed = {name: value for name, value in state.items() if name != key}
        if kind == "other key":
            changed |= {key: tensor} | dict.fromkeys((3, "", key + "x", (key,)), tensor)
        elif kind != "missing":
            changed[key] = CHANGES[kind](tensor)
        torch.save(changed, tmp_path / "model")
        with pytest.raises(InputError, match=str(tmp_path / "model")) as refused:
            load_model(tmp_path / "model")
        assert "\n" not in str(refused.value)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)


@pytest.mark.parametrize("name", ["config.json", "model.json", "predictions.json"])
@FUZZ
@given(
    content=st.dictionaries(
        st.sampled_from(["data", "lr", "epochs", "patch_size", "exp_name", "flops", "job", "jobs", "pending", "files"]),
        VALUES,
    )
)
def test_random_json(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps({"data": "acdc", "version": 1} | content))
    read_all(tmp_path / name)

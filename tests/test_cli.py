"""The three scripts as a user runs them, on a small phantom and on real patients."""

import json
import os
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import evaluate
import lib.data.nifti
import lib.pruning.rules
import predict
import train
from lib.models import Sauron, load_model
from lib.models.filters import read_filters
from lib.models.size import count_filters, summary

ROOT = Path(__file__).resolve().parents[1]
ACDC = ROOT.parent / "shared" / "acdc" / "training"
SMALL = ["--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0", "--device", "cpu"]
SMALL += ["--min_filters", "2"]
needs_acdc = pytest.mark.skipif(not ACDC.is_dir(), reason="the real ACDC patients (../shared/acdc) are not here")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """Folder with the phantom; its cache is shared by the tests of this module."""
    return tmp_path_factory.mktemp("phantom") / "data"


def arguments(phantom, output):
    return ["--data", "phantom", "--data_path", str(phantom), "--cache_path", str(phantom.parent / "cache")] + [
        *("--output", str(output)),
        *SMALL,
    ]


PRUNE = ["--max_flops", "none", "--rho", "1", "--tau_max", "0.5", "--kappa", "1"]


@pytest.fixture(scope="module", autouse=True)
def thresholds_rise_at_once():
    """Let training count as settled from the first epoch on, so that the tests below run on pruned networks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.pruning.rules, "training_settled", lambda *_: True)
        yield


@pytest.fixture(scope="module")
def pruned(phantom, tmp_path_factory):
    """A finished run of 4 epochs with pruning, whose model is exported."""
    output = tmp_path_factory.mktemp("runs")
    assert train.main([*arguments(phantom, output), *PRUNE, "--epochs", "4", "--export"]) == 0
    return output / "unnamed" / "phantom" / "1"


def weights(run, epoch):
    return torch.load(run / "models" / f"model-{epoch}", weights_only=True)


def test_a_run_leaves_everything(pruned):
    assert sorted(p.name for p in (pruned / "models").iterdir()) == [
        *("SHA256SUMS", "model-3", "model-4", "model-best", "state-3", "state-4")
    ]
    config = json.loads((pruned / "config.json").read_text())
    assert (config["data"], config["epochs"], config["fms_init"], config["seed_train"]) == ("phantom", 4, 4, 42)
    assert {"command", "versions", "machine", "git_revision"} <= set(config)
    history = json.loads((pruned / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3, 4]
    assert all(len(values) == 4 for values in history.values())
    assert history["filters"][-1] < history["filters"][0]
    scores = json.loads((pruned / "validation_scores.json").read_text())
    assert list(scores) == ["1", "2", "3", "4"]
    assert len(scores["4"]["dice"]) == 6
    for key in ("in", "out"):
        assert len((pruned / f"{key}_filters").read_text().splitlines()) == 1 + 4
        model = load_model(pruned / "models" / "model-4")
        assert read_filters(pruned / f"{key}_filters") == count_filters(model)[key]
    assert list(pruned.glob("events.out.tfevents.*"))
    log = (pruned / "log.txt").read_text()
    assert "epoch 4/4 | loss " in log


def test_an_exported_model_predicts_what_its_run_predicts(phantom, pruned, tmp_path):
    """The file alone, for an image of the data set, with the post-processing that the training has chosen."""
    assert "model.onnx" in (pruned / "log.txt").read_text().splitlines()[-1]
    image = next(path for path in sorted(phantom.rglob("*.nii.gz")) if not path.name.endswith("_gt.nii.gz"))
    labels = {}
    for name, model in (("torch", pruned / "models" / "model-4"), ("exported", pruned / "model.onnx")):
        argv = ["--model_state", model, "--input", image, "--output", tmp_path / name]
        assert predict.main([*map(str, argv)]) == 0
        labels[name] = np.asarray(nib.load(tmp_path / name / image.name).dataobj)
    assert (labels["torch"] == labels["exported"]).mean() >= 0.9999
    sizes = [json.loads((tmp_path / name / "model.json").read_text()) for name in labels]
    assert all(sizes[0][key] == sizes[1][key] for key in ("data", "parameters", "flops", "filters"))


@pytest.mark.parametrize("way", ["resume", "long"])
def test_a_killed_training_continues_bit_for_bit(phantom, pruned, tmp_path, way, monkeypatch):
    from lib import checkpoint

    save = checkpoint.save

    def save_then_die(state):
        save(state)
        if state.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train.main([*arguments(phantom, tmp_path), *PRUNE, "--epochs", "4"])
    monkeypatch.undo()
    run = tmp_path / "unnamed" / "phantom" / "1"
    if way == "resume":
        argv = ["--resume", str(run)]
    else:
        state = ["--epoch_start", "2", "--model_state", str(run / "models" / "model-2"), "--history", str(run)]
        seeds = ["--seed_train", "42", "--seed_data", "42", "--split", "0.9:0.1"]
        argv = ["--data", "phantom", "--epochs", "4", *seeds, *state]
    assert train.main(argv) == 0
    whole, again = weights(pruned, 4), weights(run, 4)
    assert list(whole) == list(again)
    assert all(value.equal(again[key]) for key, value in whole.items())
    assert (run / "out_filters").read_text() == (pruned / "out_filters").read_text()
    a, b = (json.loads((r / "history.json").read_text()) for r in (pruned, run))
    assert all(a[key] == b[key] for key in a if key != "seconds")


def test_a_training_to_a_budget_that_dies_after_every_epoch(phantom, tmp_path, monkeypatch):
    """Bit for bit that of one that was never stopped, before and after the budget is met."""
    from lib import checkpoint

    budget = ["--max_flops", "50%", "--prune_between", "0%", "75%", "--epochs", "4"]
    assert train.main([*arguments(phantom, tmp_path), *budget]) == 0
    run = tmp_path / "unnamed" / "phantom" / "1"
    history = json.loads((run / "history.json").read_text())
    assert history["budget_met"] == sorted(history["budget_met"])
    met = history["budget_met"].index(True)
    assert 0 < met < 3
    log = (run / "log.txt").read_text()
    assert f"budget met after epoch {met + 1}: {history['flops'][-1]:,} FLOPs (" in log
    unpruned = Sauron(1, 4, 4, 3)
    whole = summary(unpruned, (32, 32))["flops"]
    assert all(flops > whole / 2 for flops in history["flops"][:met])
    assert whole * 0.4 < history["flops"][met] <= whole / 2
    assert len(set(history["filters"][met:])) == 1
    small = load_model(run / "models" / "model-4")
    for key in ("in", "out"):
        rows = (run / f"{key}_filters").read_text().splitlines()
        assert len(rows) == 1 + 4 and len(set(rows[1 + met :])) == 1
        assert read_filters(run / f"{key}_filters") == count_filters(small)[key]
    assert count_filters(load_model(run / "models" / "model-best")) == count_filters(small)
    assert f"50% of the FLOPs: met after epoch {met + 1}<" in (run / "report.html").read_text()

    save = checkpoint.save

    def save_then_die(state):
        save(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_then_die)
    again = tmp_path / "unnamed" / "phantom" / "2"
    for epoch in range(4):
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", str(again)] if epoch else [*arguments(phantom, tmp_path), *budget])
    for name in ("model-4", "model-best"):
        a, b = (torch.load(r / "models" / name, weights_only=True) for r in (run, again))
        assert list(a) == list(b) and all(value.equal(b[key]) for key, value in a.items())
    assert (again / "out_filters").read_text() == (run / "out_filters").read_text()
    other = json.loads((again / "history.json").read_text())
    assert all(history[key] == other[key] for key in history if key != "seconds")


def test_bad_starts_change_nothing(phantom, pruned, tmp_path, capsys):
    before = sorted(pruned.rglob("*"))
    model = str(pruned / "models" / "model-4")
    for argv, message in [
        (["--resume", str(pruned)], "epoch 4 is finished"),
        (["--resume", str(tmp_path)], "is no run folder"),
        (["--resume", str(pruned), "--epochs", "9", "--fms_init", "8"], "--fms_init 8: the run"),
        (["--data", "phantom", "--history", str(pruned)], "--history needs --model_state"),
        ([*arguments(phantom, tmp_path), "--model_state", model, "--levels", "4"], "is missing"),
        ([*arguments(phantom, tmp_path), "--in_filters", str(pruned / "in_filters")], "needs --out_filters"),
        ([*arguments(phantom, tmp_path), "--split", "0.5:0.6"], "split"),
        (["--data", "acdc", "--data_path", str(tmp_path), "--output", str(tmp_path / "runs")], "SAURON_DATA"),
    ]:
        assert train.main(argv) == 2, argv
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error, (argv, error)
    assert sorted(pruned.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_training_starts_from_pruned_weights_or_widths(phantom, pruned, tmp_path):
    base = [*arguments(phantom, tmp_path), "--epochs", "1", "--no_prune"]
    filters = ["--in_filters", str(pruned / "in_filters"), "--out_filters", str(pruned / "out_filters")]
    assert train.main([*base, "--model_state", str(pruned / "models" / "model-4"), *filters]) == 0
    assert train.main([*base, "--model", "nnunet", *filters]) == 0
    widths = count_filters(load_model(pruned / "models" / "model-4"))
    for run in ("1", "2"):
        folder = tmp_path / "unnamed" / "phantom" / run
        assert count_filters(load_model(folder / "models" / "model-1")) == widths


def test_a_flat_network_is_trained_continued_reported_and_exported(phantom, pruned, tmp_path, capsys):
    base = [*arguments(phantom, tmp_path), "--model", "flat", "--max_flops", "40%"]
    assert train.main([*base, "--epochs", "1"]) == 0
    run = tmp_path / "unnamed" / "phantom" / "1"
    assert train.main(["--resume", str(run), "--epochs", "2", "--export"]) == 0
    log, history = (run / "log.txt").read_text(), json.loads((run / "history.json").read_text())
    model = load_model(run / "models" / "model-2")
    (width,) = {block.out_filters for block in model.blocks() if not block.head}
    assert f"flat: {width} filters in every block but the heads" in log
    whole = summary(Sauron(1, 4, 4, 3), (32, 32))["flops"]  # as the flags say, and not flat
    flops = summary(model, (32, 32))["flops"]
    assert history["flops"] == [flops, flops] and flops <= 0.4 * whole
    assert f"{whole:,} -> {flops:>15,} ({100 * flops / whole:.1f}%)" in log
    assert f"{whole:,} → {flops:,}" in unescape((run / "report.html").read_text())
    assert "openvino: labels equal in" in log or "onnxruntime: labels equal in" in log  # export
    output, argv = tmp_path / "predictions", ["--data", "phantom", "--model_state", str(run / "models" / "model-2")]
    assert predict.main([*argv, "--original", str(phantom), "--output", str(output), "--device", "cpu"]) == 0
    assert len([*output.glob("*.nii.gz")]) == 12
    capsys.readouterr()
    other = ["--model_state", str(pruned / "models" / "model-4"), "--epochs", "1"]
    assert train.main([*base, *other]) == 2
    assert "the network needs" in capsys.readouterr().err
    assert not (run.parent / "2").exists()


def test_without_a_validation_set(phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.data.nifti, "scale_note", lambda paths: "a note on a header" if list(paths) else None)
    assert train.main([*arguments(phantom, tmp_path), "--split", "1:0", "--epochs", "3", *PRUNE]) == 0
    run = tmp_path / "unnamed" / "phantom" / "1"
    log = (run / "log.txt").read_text()
    assert "no validation set" in log
    assert log.count("a note on a header") == 1
    assert json.loads((run / "validation_scores.json").read_text()) == {}
    assert not (run / "models" / "model-best").exists()


def test_predict_then_evaluate(phantom, pruned, tmp_path, capsys):
    model = ["--data", "phantom", "--model_state", str(pruned / "models" / "model-4"), "--original", str(phantom)]
    filters = ["--in_filters", str(pruned / "in_filters"), "--out_filters", str(pruned / "out_filters")]
    output = tmp_path / "predictions"
    assert predict.main([*model, *filters, "--output", str(output), "--device", "cpu"]) == 0
    predictions = sorted(output.glob("*.nii.gz"))
    assert len(predictions) == 12  # 6 test patients, 2 frames each
    for path in predictions:
        original = nib.load(next(phantom.rglob(path.name)))
        found = nib.load(path)
        assert found.shape == original.shape
        assert found.get_data_dtype() == np.uint8
        assert np.array_equal(found.affine, original.affine)
    results = tmp_path / "results.json"
    argv = ["--data", "phantom", "--pred", str(output), "--gt", str(phantom), "--output", str(results)]
    capsys.readouterr()
    assert evaluate.main([*argv, "--num_workers", "1"]) == 0
    table = capsys.readouterr().out
    for word in ("parameters", "FLOPs", "filters", "LV cavity", "HD95"):
        assert word in table
    content = json.loads(results.read_text())
    assert set(content) == {path.name.removesuffix(".nii.gz") for path in predictions} | {"average", "n"}
    first = content[predictions[0].name.removesuffix(".nii.gz")]
    assert set(first) == {"dice", "HD", "HD95", "ASSD", "surface_dice", "TP", "TN", "FP", "FN"}
    assert all(len(values) == 4 for values in first.values())
    assert evaluate.main([*argv, "--num_workers", "1"]) == 2  # results are not overwritten unasked
    assert predict.main([*model, "--output", str(output)]) == 2


@needs_acdc
def test_real_patients(tmp_path):
    """Two of the six test patients and three others: trained for one epoch, predicted on the very grid, evaluated."""
    data = tmp_path / "acdc"
    for patient in (2, 10, 4, 9, 12):
        shutil.copytree(ACDC / f"patient{patient:03}", data / "training" / f"patient{patient:03}")
    base = ["--data", "acdc17", "--data_path", str(data), "--cache_path", str(tmp_path / "cache")]
    assert train.main([*base, *SMALL, "--output", str(tmp_path / "runs"), "--epochs", "1", "--split", "0.5:0.5"]) == 0
    run = tmp_path / "runs" / "unnamed" / "acdc" / "1"
    assert "95 subjects are not on disk" in (run / "log.txt").read_text()
    model = [
        "--model_state",
        str(run / "models" / "model-1"),
        "--original",
        str(data),
        "--output",
        str(tmp_path / "out"),
    ]
    assert predict.main(["--data", "acdc", *model, "--no_tta", "--device", "cpu"]) == 0
    found = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert [name.split("_")[0] for name in found] == ["patient002"] * 2 + ["patient010"] * 2
    argv = ["--data", "acdc", "--pred", str(tmp_path / "out"), "--gt", str(data), "--output", str(tmp_path / "r.json")]
    assert evaluate.main([*argv, "--num_workers", "1"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["n"]["dice"][3] == 4


@needs_acdc
def test_the_python_interface_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (ROOT / ".readme" / "python.md").read_text().split("```python\n")[1].split("```")[0]
    model = Sauron(1, 4, 2, 7)
    model.initialize()
    torch.save(model.state_dict(), "model-500")
    for text, ours in (
        ("/path/to/acdc", str(ACDC)),
        ("runs/unnamed/acdc/1/models/model-500", "model-500"),
        ('"fms_init": 48', '"fms_init": 2'),
    ):
        assert code.count(text) == 1
        code = code.replace(text, ours)
    names = {}
    exec(code, names)
    assert [tuple(output.shape) for output in names["outputs"]] == [(1, 4, 320 >> k, 320 >> k) for k in range(5)]
    assert list(names["feature_maps"]) == [block.name for block in names["model"].blocks()]
    assert count_filters(names["small"]) == count_filters(model)


@pytest.mark.parametrize("script", ["train.py", "predict.py", "evaluate.py"])
def test_help_and_wrong_arguments_from_a_shell(script, tmp_path):
    def shell(*argv):
        return subprocess.run(
            [sys.executable, ROOT / script, *argv], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
        )

    assert shell("--help").returncode == 0
    bad = shell("--nonsense")
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert list(tmp_path.iterdir()) == []

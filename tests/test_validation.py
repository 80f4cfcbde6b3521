import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import tiny
import torch

import evaluate
import lib.validation
import predict
from lib.data.BaseDataset import SubjectFiles
from lib.evaluation import Rules, validate_pair
from lib.inference import Prediction
from lib.postprocessing import changes, read_steps
from lib.settings import Settings
from lib.system.error import InputError
from lib.system.process import Stopped
from lib.training import train
from lib.validation import main, predict_all, summary, validate_run, worst_first

CPU = torch.device("cpu")
SMALL = ["--data", "phantom", "--fms_init", "2", "--levels", "3", "--patch_size", "16", "16", "--device", "cpu"]
SMALL += ["--num_workers", "0", "--epochs", "1", "--split", "0.96:0.04"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one epoch with two validation subjects, not yet validated."""
    return trained_in(tmp_path_factory.mktemp("validation"))


def trained_in(place, *more):
    places = ["--data_path", place / "data", "--cache_path", place / "cache", "--output", place / "runs"]
    with ExitStack() as held:
        return train([*SMALL, *map(str, places), *more], held).folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, with its data where they were."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def predicted(monkeypatch):
    """Let the network predict the truth, with two voxels of class 1 far away in the first subject."""
    done = []

    def as_truth(_predictor, paths, **_):
        image = nib.load(paths[0])
        label = np.asarray(nib.load(str(paths[0]).replace(".nii.gz", "_gt.nii.gz")).dataobj).astype(np.uint8)
        if not done:
            label[0, 0, 0] = label[0, 1, 0] = 1
        done.append(paths)
        return Prediction(label, None, image.header, {})

    monkeypatch.setattr("lib.inference.Predictor.file", as_truth)
    return done


def read(path):
    return json.loads(path.read_text())


def test_it_agrees_with_predict_and_evaluate(run, trained, tmp_path, monkeypatch):
    lines = []
    validate_run(run, CPU, lines.append)
    found, data = read(run / "validation.json"), Settings.read(run)[0].data_path
    subjects = list(found["before"]["subjects"])
    files = sorted((run / "validation").iterdir())
    assert [path.name for path in files] == [f"{subject}.nii.gz" for subject in subjects] and len(subjects) == 2

    model, output = trained / "models" / "model-1", tmp_path / "predictions"
    argv = ["--data", "phantom", "--original", data, "--model_state", model, "--partition", "validation"]
    assert predict.main([*map(str, argv), "--output", str(output), "--device", "cpu"]) == 0
    for path in files:
        assert np.array_equal(nib.load(path).dataobj, nib.load(output / path.name).dataobj)
        assert path.read_bytes() == (output / path.name).read_bytes()

    monkeypatch.chdir(tmp_path)
    for name, predictions in (("theirs", output), ("ours", run / "validation")):
        argv = ["--data", "phantom", "--gt", data, "--pred", str(predictions), "--output", f"{name}.json"]
        assert evaluate.main([*argv, "--num_workers", "1"]) == 0
    results = read(tmp_path / "theirs.json")
    assert results == read(tmp_path / "ours.json")
    assert {key: found["before"][key] for key in ("average", "n")} == {
        key: results.pop(key) for key in ("average", "n")
    }
    assert found["before"]["subjects"] == results

    assert found["model"] == "model-1" and found["classes"][0] == "background"
    steps, note = read_steps(run / "models" / "model-1")
    assert list(steps) == found["steps"] and note is None
    assert read(run / "postprocessing.json")["sha256"] == found["sha256"]
    assert lines[0] == f"validation: model-1 predicts 2 whole volumes into {run / 'validation'}"
    assert lines[-1].startswith(f"worst cases: {worst_first(found['after']['subjects'])[0][0]} ")


def test_a_post_processing_that_helps_is_kept_and_measured(run, predicted):
    lines = []
    validate_run(run, CPU, lines.append)
    found = read(run / "validation.json")
    first, second = found["before"]["subjects"]
    assert found["steps"] == read(run / "postprocessing.json")["steps"] == ["foreground"]
    before, after = found["before"]["subjects"][first], found["after"]["subjects"][first]
    assert (before["FP"][1], after["FP"][1]) == (2, 0) and before["dice"][1] < after["dice"][1] == 1
    assert before["HD"][1] > after["HD"][1] == 0
    assert found["before"]["subjects"][second] == found["after"]["subjects"][second]
    assert found["after"]["average"]["dice"] == [1] * 4 and found["after"]["n"]["HD95"] == [0, 2, 2, 2]
    assert np.asarray(nib.load(run / "validation" / f"{first}.nii.gz").dataobj)[0, 0, 0] == 1  # as it was predicted
    assert lines[1].startswith("validation: RV cavity: Dice 0.99") and " -> 1.0000, HD95 0.00 -> 0.00 mm" in lines[1]
    assert lines[4].startswith("validation: mean: Dice 0.99")
    assert lines[5].startswith("post-processing: largest component of the foreground alone: kept (mean Dice 0.99")
    assert lines[6] == f"worst cases: {first} 1.0000, {second} 1.0000"


def test_only_what_a_step_changes_is_compared_again(run, predicted, monkeypatch):
    compared = []
    pair = lib.validation.evaluate_pair
    monkeypatch.setattr(lib.validation, "evaluate_pair", lambda *paths: compared.append(paths[0].name) or pair(*paths))
    validate_run(run, CPU, lambda _: None)
    assert compared == [f"{min(read(run / 'validation.json')['before']['subjects'])}.nii.gz"]


def test_many_voxels_are_compared_by_several_processes_to_the_same_numbers(run, predicted, monkeypatch):
    validate_run(run, CPU, lambda _: None)
    alone = (run / "validation.json").read_text()
    monkeypatch.setattr(lib.validation, "MANY_VOXELS", 0)
    predicted.clear()
    validate_run(run, CPU, lambda _: None)
    assert (run / "validation.json").read_text() == alone


def test_without_a_validation_set_a_line_says_so_and_nothing_is_written(tmp_path):
    run, lines = trained_in(tmp_path, "--split", "1:0"), []
    before = sorted(run.rglob("*"))
    validate_run(run, CPU, lines.append)
    assert lines == ["no validation set: the model is not validated, and no post-processing chosen"]
    assert sorted(run.rglob("*")) == before


def test_a_stop_is_mended_by_the_command(run, monkeypatch, capsys):
    assert main([str(run), "--device", "cpu"]) == 0
    before, decision = (run / "validation.json").read_bytes(), (run / "postprocessing.json").read_bytes()

    def stop():
        raise Stopped(15)

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(lib.validation, "check_stopped", stop)
        with pytest.raises(Stopped):
            validate_run(run, CPU, lines.append)
    assert lines[-1] == f"stopped by SIGTERM; to validate: python -m lib.validation {run}"
    assert not (run / "validation.json").exists()  # nothing speaks of predictions that are not there
    (run / "validation" / ".left.nii.gz.0123456789abcdef.tmp").touch()
    assert main([str(run), "--device", "cpu"]) == 0
    assert (run / "validation.json").read_bytes() == before
    assert (run / "postprocessing.json").read_bytes() == decision
    assert not list((run / "validation").glob(".*")) and not (run / ".lock").exists()
    assert "worst cases: " in (run / "log.txt").read_text() and "worst cases: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda run: shutil.rmtree(run / "models"), "has no model (models/model-E) yet"),
        (lambda run: (run / "config.json").unlink(), "is no run folder"),
        (lambda run: (run / "validation").write_text("a file"), "validation"),
    ],
)
def test_what_cannot_be_validated_is_refused_in_one_line(run, capsys, breaks, message):
    breaks(run)
    assert main([str(run), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1 and "Traceback" not in error
    assert not (run / "validation.json").exists()


def test_a_missing_truth_is_one_line(run, capsys, monkeypatch):
    file = SubjectFiles("a", (run / "a.nii.gz",))
    monkeypatch.setattr(lib.validation, "build_dataset", lambda _: SimpleNamespace(files={"validation": [file]}.get))
    assert main([str(run), "--device", "cpu"]) == 2
    assert f"{run / 'a.nii.gz'}: has no ground truth beside it" in capsys.readouterr().err


def test_another_commands_run_is_left_alone(run, capsys):
    with lib.validation.locked(run):
        assert main([str(run), "--device", "cpu"]) == 2
    assert "another command is writing there" in capsys.readouterr().err


def test_the_lines_of_unknown_values():
    metrics = {"dice": [1.0, None], "HD95": [None, None], "surface_dice": [None, 0.25]}
    part = {"average": metrics, "n": {}, "subjects": {"a": metrics}}
    content = {"classes": ["background", "thing"], "steps": [], "reasons": [], "before": part, "after": part}
    assert summary(content) == [
        "validation: thing: Dice -, HD95 - mm, surface Dice 0.2500",
        "post-processing: none, since no step raises the Dice",
        "worst cases: none known",
    ]


def test_the_worst_come_first():
    dice = {"a": [1, 0.5, 0.7], "b": [1, None, None], "c": [1, 0.2, None], "d": [1, 0.6, 0.6]}
    assert [subject for subject, _ in worst_first({s: {"dice": d} for s, d in dice.items()})] == ["c", "a", "d"]


def test_errors_are_told_apart_from_bad_input(run, monkeypatch):
    def full(*_, **__):
        raise InputError("no space")

    lines = []
    monkeypatch.setattr(lib.validation, "save", full)
    with pytest.raises(InputError, match="no space"):
        validate_run(run, CPU, lines.append)
    assert lines[-1] == f"not validated; to do it again: python -m lib.validation {run}"


def test_own_values_and_endings_are_written_and_ignored_voxels_do_not_count(tmp_path):
    dataset = replace(tiny.Tiny3D, values=(0, 7), ignore=9, file_ending=".nii")
    tiny.write_case(tmp_path, 1)
    (file,) = dataset.find(tmp_path)
    truth = nib.load(file.label)
    labels = np.asarray(truth.dataobj).astype(np.uint8)
    labels[0, 0, :2] = 1  # predicted far away, where nobody knows
    predictor = SimpleNamespace(file=lambda _, **__: Prediction(labels, None, truth.header, {}))
    pairs, n_voxels = predict_all(predictor, [file], tmp_path / "out", dataset)
    path = tmp_path / "out" / "case_01.nii"
    assert pairs == {"case_01": (path, file.label)} and n_voxels == labels.size
    assert np.unique(nib.load(path).dataobj).tolist() == [0, 7]

    stored = 7 * np.asarray(truth.dataobj)
    stored[0, 0, :2] = 9
    nib.save(nib.Nifti1Image(stored, truth.affine), file.label)
    metrics, counts = validate_pair(*pairs["case_01"], Rules(2, values=dataset.values, ignore=dataset.ignore))
    assert (metrics["dice"], metrics["FP"], metrics["HD"][1]) == ([1, 1], [0, 0], 0)
    assert counts[:, :, 0, 1:].max() == 0 and not changes(counts, ("foreground", 1))

"""From runs to the table: what is kept of a training, and what is made of what was kept."""

import json
import math
import shutil
from pathlib import Path

import matplotlib.image
import pytest

import train
from lib.experiments.kept import format_kept, read_kept, without_paths
from lib.experiments.results import main
from lib.experiments.results_table import format_results, make_results, read_folders
from lib.system.error import InputError

SMALL = ["--data", "phantom", "--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0"]
NAMES = ["RV cavity", "myocardium", "LV cavity"]
RUNS = Path(__file__).resolve().parents[1] / ".readme" / "runs"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch, unpruned."""
    folder = tmp_path_factory.mktemp("trained")
    places = ["--data_path", str(folder / "data"), "--cache_path", str(folder / "cache"), "--output", str(folder)]
    assert train.main([*SMALL, *places, "--model", "nnunet", "--epochs", "1", "--device", "cpu"]) == 0
    return folder / "unnamed" / "phantom" / "1"


@pytest.fixture
def copied(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    return run


def keep(run, file, row="unpruned", *flags):
    return main(["keep", str(run), str(file), "--row", row, *flags])


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def kept(folder, row, dice, budget=None, fold="0", seed=1, flops=1000, data="hippocampus", **more):
    """Write a file as `keep` does; `dice`: {subject: [Dice of two classes]}."""
    folder.mkdir(exist_ok=True)
    metrics = {subject: {"dice": d, "HD95": [2.0, None], "surface_dice": [1.0, 1.0]} for subject, d in dice.items()}
    content = {
        "row": row,
        "budget": budget,
        "budget_met": None,
        "fold": fold,
        "seed": seed,
        "device": "a PC",
        "precision": "float32",
        "seconds": 120.0,
        "config": {"data": data, "patch_size": [8, 8, 8]},
        "size": {"parameters": [50, flops // 20], "flops": [1000, flops]},
        "history": {"epoch": [1, 2], "val_dice": [[0.9, 0.5, 0.5], [0.9, 0.75, 0.5]]},
        "validation": {"classes": ["a", "b"], "subjects": {"before": metrics, "after": metrics}},
    }
    path = folder / f"{row}-{budget}-{fold}-{seed}.json".replace("%", "pct")
    path.write_text(format_kept(content | more))
    return path


def same(value, n=4):
    return {f"s{i}": [value, value] for i in range(n)}


# --- keep -------------------------------------------------------------------------------------------------------------


def test_what_is_kept_of_a_run(trained, tmp_path, capsys):
    file = tmp_path / "one.json"
    assert keep(trained, file, "unpruned", "--torch_ms", "3.5", "--note", "a first one") == 0
    content, run = json.loads(file.read_text()), json.loads((trained / "validation.json").read_text())
    history = json.loads((trained / "history.json").read_text())
    config = json.loads((trained / "config.json").read_text())
    assert (content["row"], content["budget"], content["fold"], content["seed"]) == (
        "unpruned",
        None,
        None,
        config["seed_train"],
    )
    assert (content["torch_ms"], content["note"], content["precision"]) == (3.5, "a first one", "float32")
    assert content["device"] == config["machine"]
    assert content["seconds"] == pytest.approx(sum(history["seconds"]), abs=0.06)
    assert content["size"]["flops"] == history["flops"] * 2 and content["size"]["parameters"][0] > 1000
    assert content["validation"]["classes"] == NAMES
    for when in ("before", "after"):
        for subject, metrics in content["validation"]["subjects"][when].items():
            for metric, values in metrics.items():
                expected = run[when]["subjects"][subject][metric][1:]
                assert values == pytest.approx(expected, rel=1e-4)
    assert content["history"]["epoch"] == [1] and len(content["history"]["val_dice"][0]) == 4
    assert "data_path" not in content["config"] and str(trained.parents[2]) not in file.read_text()
    assert capsys.readouterr().out == f"{file}: unpruned, fold None, seed {config['seed_train']}\n"
    assert read_kept(file).scores["before"].keys() == run["before"]["subjects"].keys()


def test_a_file_is_not_lost(trained, tmp_path, capsys):
    file = tmp_path / "one.json"
    file.write_text("mine")
    assert keep(trained, file) == 2 and file.read_text() == "mine"
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert keep(trained, file, "unpruned", "--overwrite") == 0 and file.read_text() != "mine"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: change(run / "config.json", epochs=2), "not finished: epoch 1 of 2"),
        (lambda run: (run / "validation.json").unlink(), "not validated (no validation.json)"),
        (
            lambda run: change(run / "validation.json", model="model-0"),
            "is of model-0, and the newest model is model-1",
        ),
        (lambda run: change(run / "validation.json", sha256="0"), "is of another model-1"),
    ],
)
def test_only_finished_runs_are_kept(copied, tmp_path, capsys, spoil, message):
    spoil(copied)
    assert keep(copied, tmp_path / "one.json") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "one.json").exists()


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ("sauron", [], "is not pruned"),
        ("random", ["--budget", "20%"], "is not pruned"),
        ("nnunetv2", [], "is no run of ours"),
        ("scratch", [], "--row scratch: needs --budget"),
        ("scratch", ["--budget", "20%"], "has all FLOPs of its network; it is the row unpruned"),
        ("flat", ["--budget", "20%"], "it is the row unpruned"),
        ("unpruned", ["--budget", "20%"], "has no budget"),
        ("torch-pruning", ["--budget", "20%"], "needs --first"),
        ("unpruned", ["--flops", "3"], "--flops: goes only with --scores"),
        ("upruned", [], "did you mean unpruned?"),
    ],
)
def test_a_run_is_not_taken_for_another_row(trained, tmp_path, capsys, row, flags, message):
    assert keep(trained, tmp_path / "one.json", row, *flags) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_pruned_network_is_not_the_unpruned_one(copied, tmp_path, capsys):
    history = json.loads((copied / "history.json").read_text())
    change(copied / "history.json", flops=[history["flops"][0] // 2])
    assert keep(copied, tmp_path / "one.json") == 2
    assert "is another row" in capsys.readouterr().err
    assert keep(copied, tmp_path / "one.json", "scratch", "--budget", "50%") == 0
    assert read_kept(tmp_path / "one.json").title == "Sauron's widths, from scratch, 50%"


def test_sauron_has_its_own_budget(copied, tmp_path, capsys):
    """The files of a run that pruned, as they would be."""
    change(copied / "config.json", model="sauron", loss="DS_CrossEntropyDiceLoss_Distance", max_flops="20%")
    change(copied / "config.json", prune_between=["10%", "60%"])
    change(copied / "history.json", budget_met=[True])
    assert keep(copied, tmp_path / "one.json", "sauron", "--budget", "30%") == 2
    assert "has a budget of 20%" in capsys.readouterr().err
    assert keep(copied, tmp_path / "one.json", "sauron") == 0
    content = json.loads((tmp_path / "one.json").read_text())
    assert (content["budget"], content["budget_met"], content["config"]["max_flops"]) == ("20%", True, "20%")
    change(copied / "history.json", budget_met=[False])
    assert keep(copied, tmp_path / "one.json", "sauron", "--overwrite") == 0
    text = " ".join(format_results(make_results([read_kept(tmp_path / "one.json")])).split())
    assert "The budget was not met: one.json." in text and "share of the network before pruning" in text


def test_torch_pruning_is_two_trainings(trained, copied, tmp_path):
    change(copied / "config.json", seed_train=10**6)
    flags = ["--budget", "20%", "--first", str(trained), "--seconds", "5"]
    assert keep(copied, tmp_path / "one.json", "torch-pruning", *flags) == 0
    content = json.loads((tmp_path / "one.json").read_text())
    seconds = json.loads((trained / "history.json").read_text())["seconds"][0]
    assert content["seconds"] == pytest.approx(2 * seconds + 5, abs=0.06)
    assert content["seed"] == json.loads((trained / "config.json").read_text())["seed_train"] != 10**6
    assert content["history"]["epoch"] == [1, 2] and len(content["commands"]) == 2


@pytest.fixture
def own(tmp_path):
    """A folder in nnU-Net's raw format, as far as its classes are read."""
    folder = tmp_path / "Dataset007_Own"
    (folder / "imagesTr").mkdir(parents=True)
    told = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "numTraining": 1}
    (folder / "dataset.json").write_text(json.dumps(told | {"file_ending": ".nii.gz"}))
    return folder


def test_scores_of_another_program(tmp_path, capsys):
    metrics = {"dice": [1.0, 0.5, 0.25, 0.75], "HD95": [None, 1.0, None, 2.0], "surface_dice": [None, 0.5, 0.5, 0.5]}
    scores, file = tmp_path / "results.json", tmp_path / "one.json"
    scores.write_text(json.dumps({"patient001_frame01": metrics, "average": metrics, "n": {}}))
    flags = ["keep", "--scores", str(scores), str(file), "--row", "nnunetv2", "--data", "acdc", "--seconds", "60"]
    flags += ["--flops", "2e9"]
    assert main([*flags, "--parameters", "3e6"]) == 2
    assert "--scores: needs --seed" in capsys.readouterr().err and not file.exists()
    assert main([*flags, "--parameters", "3e6", "--seed", "4"]) == 0
    found = read_kept(file)
    assert (found.row, found.key, found.seconds, found.size["flops"]) == ("nnunetv2", (None, 4), 60, [None, 2e9])
    assert found.scores["before"]["patient001_frame01"]["dice"] == [0.5, 0.25, 0.75]
    with pytest.raises(InputError, match="one.json: has no scores after post-processing"):
        make_results([found], "after")
    flags[flags.index("nnunetv2")] = "flat"
    assert main([*flags, "--parameters", "3e6", "--seed", "4", "--overwrite"]) == 2
    assert "--row flat: needs --budget" in capsys.readouterr().err
    assert main([*flags, "--parameters", "3e6", "--seed", "4", "--overwrite", "--budget", "20%"]) == 0
    assert (read_kept(file).row, read_kept(file).budget) == ("flat", "20%")
    scores.write_text(json.dumps({"patient001_frame01": {"dice": [1.0, 0.5], "HD95": [], "surface_dice": []}}))
    assert main([*flags, "--parameters", "3e6", "--seed", "4", "--overwrite", "--budget", "20%"]) == 2
    assert "has not the 4 classes of acdc" in capsys.readouterr().err.lower()


def test_scores_are_paired_by_the_fold_that_own_data_has(own, tmp_path, capsys):
    """A row without it would not be paired with the others, and a row of a built-in data set has none."""
    metrics = {"dice": [1.0, 0.5], "HD95": [None, 1.0], "surface_dice": [None, 0.5]}
    scores, file = tmp_path / "results.json", tmp_path / "one.json"
    scores.write_text(json.dumps({"a": metrics, "average": metrics, "n": {}}))
    flags = ["keep", "--scores", str(scores), str(file), "--row", "nnunetv2", "--seconds", "60", "--seed", "1"]
    flags += ["--flops", "2e9", "--parameters", "3e6", "--data"]
    assert main([*flags, str(own)]) == 2
    assert "--fold: is needed with" in capsys.readouterr().err
    assert main([*flags, "acdc", "--fold", "2"]) == 2
    assert "--fold: is for own data" in capsys.readouterr().err
    assert main([*flags, str(own), "--fold", "2"]) == 0 and read_kept(file).key == ("2", 1)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/python /home/me/train.py --data data/Task04", "python train.py --data data/Task04"),
        ("python train.py --output=/big/runs/ --split 0.9:0.1", "python train.py --output=runs --split 0.9:0.1"),
        ("python train.py --data_path '/my data/x y' --lr 1e-3", "python train.py --data_path 'x y' --lr 1e-3"),
        (r"python train.py --data 'C:\Users\me\data' ../shared/b ~/c", "python train.py --data data b c"),
        ("python 'train.py /a/b", """python ''"'"'train.py' b"""),
    ],
)
def test_no_paths_of_a_machine(command, expected):
    assert without_paths(command) == expected


def test_the_form_of_the_file():
    long = {f"key{i}": [0.5] * 3 for i in range(8)}
    text = format_kept({"a": [1, 2] * 60, "b": long, "c": {"d": None}})
    assert json.loads(text) == {"a": [1, 2] * 60, "b": long, "c": {"d": None}}
    assert len(text.splitlines()) == 1 + 1 + (1 + 8 + 1) + 1 + 1
    with pytest.raises(ValueError):
        format_kept([math.nan])


# --- table ------------------------------------------------------------------------------------------------------------


def test_the_table_by_hand(tmp_path, capsys):
    """Two seeds: Sauron is 0.25 and 0 below unpruned; the flat network has one seed, in which Sauron is 0.125 above."""
    folder, out = tmp_path / "kept", tmp_path / "out"
    for seed, whole, small in ((1, 1.0, 0.75), (2, 0.75, 0.75)):
        kept(folder, "unpruned", same(whole), seed=seed)
        kept(folder, "sauron", same(small), "20%", seed=seed, flops=200)
    kept(folder, "flat", same(0.625), "20%", seed=2, flops=180)
    kept(folder, "scratch", same(0.5), "10%", seed=2, flops=100)  # of another budget
    assert main(["table", str(folder), "--output", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert [(row["row"], row["budget"]) for row in results["rows"]] == [
        ("unpruned", None),
        ("sauron", "20%"),
        ("flat", "20%"),
        ("scratch", "10%"),
    ]
    unpruned, sauron, flat, _ = results["rows"]
    assert unpruned["dice"]["mean"]["mean"] == 0.875 and unpruned["minus_unpruned"] is None
    assert (sauron["flops_share"], sauron["parameters_share"], sauron["minutes"]) == (0.2, 0.2, 2)
    assert sauron["dice"]["a"]["by_training"] == [0.75, 0.75]
    assert (sauron["HD95"]["a"]["mean"], sauron["HD95"]["b"]["mean"], sauron["HD95"]["mean"]["mean"]) == (2, None, 2)
    found = sauron["minus_unpruned"]
    assert (found["mean"], found["low"], found["high"], found["n"]) == (-0.125, -0.25, 0, 2)
    half = 12.706205 * 0.25 / 2  # t of one degree of freedom, times sd / sqrt(2)
    assert (found["t"]["low"], found["t"]["high"]) == pytest.approx((-0.125 - half, -0.125 + half), abs=1e-5)
    assert flat["minus_unpruned"]["pairs"] == [["0", 2]] and flat["minus_unpruned"]["mean"] == -0.125
    assert [(one["row"], one["mean"], one["n"]) for one in results["sauron_minus"]] == [("flat", 0.125, 1)]
    text = (out / "results.md").read_text()
    assert text in capsys.readouterr().out
    assert (
        "| Sauron, 20% | 2 (2 seeds, 1 fold) | 0.750 | 0.750 | 0.750 [0.750, 0.750] | 2.00 | "
        "-0.1250 [-0.2500, +0.0000] (2) | [-1.7133, +1.4633] | 20.0% | 20.0% | 2.0 |\n"
    ) in text
    assert "| flat U-Net, from scratch, 20% | one seed |" in text
    assert "| flat U-Net, from scratch, 20% | +0.1250 [+0.1250, +0.1250] (one seed) | - |\n" in text
    assert 'One training alone ("one seed")' in text and "ms |" not in text
    for name in ("dice_flops.png", "curves.png"):
        assert matplotlib.image.imread(out / name).shape[1] > 400


def test_equal_rows_have_no_difference(tmp_path):
    dice = {f"s{i}": [0.5 + 0.1 * i, 0.25] for i in range(4)}
    trainings = [
        kept(tmp_path, row, dice, budget, seed=s)
        for row, budget in (("unpruned", None), ("sauron", "20%"))
        for s in (1, 2)
    ]
    row = make_results([read_kept(path) for path in trainings])["rows"][1]
    assert (row["minus_unpruned"]["mean"], row["minus_unpruned"]["low"], row["minus_unpruned"]["high"]) == (0, 0, 0)


def test_only_the_same_fold_and_seed_are_compared(tmp_path):
    kept(tmp_path, "unpruned", same(0.5), fold="0", seed=1)
    kept(tmp_path, "sauron", same(0.25), "20%", fold="0", seed=2)
    kept(tmp_path, "sauron", {"t0": [0.25, 0.25]}, "20%", fold="1", seed=1)
    row = make_results(read_folders([tmp_path]))["rows"][1]
    assert row["minus_unpruned"]["n"] == 0 and row["minus_unpruned"]["mean"] is None


def test_the_frames_of_a_patient_are_one_patient(tmp_path):
    dice = {"patient001_frame01": [1.0, 0.5], "patient001_frame12": [0.5, None], "patient002_frame01": [0.0, 0.5]}
    kept(tmp_path, "unpruned", dice, data="acdc")
    results = make_results(read_folders([tmp_path]))
    assert (results["subjects"], results["cases"]) == (3, 2)
    found = results["rows"][0]["dice"]
    assert (found["mean"]["mean"], found["mean"]["cases"]) == ((0.625 + 0.25) / 2, 2)  # (0.75 + 0.5) / 2, and 0.25
    assert (found["a"]["mean"], found["b"]["mean"]) == (0.375, 0.5)


def test_nnunetv2_is_a_peer_of_every_budget(tmp_path):
    kept(tmp_path, "nnunetv2", same(0.5))
    for budget in ("20%", "50%"):
        kept(tmp_path, "sauron", same(0.75), budget, torch_ms=2.0)
    results = make_results(read_folders([tmp_path]))
    assert [(one["budget"], one["row"], one["mean"]) for one in results["sauron_minus"]] == [
        ("50%", "nnunetv2", 0.25),
        ("20%", "nnunetv2", 0.25),
    ]
    text = format_results(results)
    assert "| nnunetv2 (Sauron, 50%) | +0.2500" in text and "| torch, ms |" in text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"data": "heart"}, "data heart, and .* has hippocampus; they are not of one table"),
        ({"config": {"data": "hippocampus", "patch_size": [4, 4, 4]}}, "patch size"),
        ({"dice": same(0.5, n=3)}, "both are of fold 0, with other subjects"),
        ({"row": "unpruned", "budget": None, "device": "b"}, "both are unpruned, fold 0, seed 1; take one away"),
        ({"row": "x"}, "row 'x' is unknown"),
    ],
)
def test_what_is_not_of_one_table(tmp_path, other, message):
    kept(tmp_path / "a", "unpruned", same(0.5))
    given = {"row": "sauron", "dice": same(0.5), "budget": "20%"} | other
    kept(tmp_path / "b", **given)
    with pytest.raises(InputError, match=message):
        read_folders([tmp_path / "a", tmp_path / "b"])


def test_a_folder_without_files_and_an_output_that_is_read(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["table", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert "no JSON files there" in capsys.readouterr().err
    kept(tmp_path / "kept", "unpruned", same(0.5))
    assert main(["table", str(tmp_path / "kept"), "--output", str(tmp_path / "kept")]) == 2
    assert "holds what is read" in capsys.readouterr().err
    assert len(list((tmp_path / "kept").iterdir())) == 1 and not (tmp_path / "out").exists()


def test_the_committed_trainings_are_of_one_table():
    results = make_results(read_folders([RUNS]))
    assert [(row["row"], row["budget"]) for row in results["rows"]] == [
        ("unpruned", None),
        ("sauron", "20%"),
        ("sauron", "10%"),
    ]
    for row in results["rows"]:
        average = json.loads((RUNS / row["trainings"][0]["file"]).read_text())["validation"]["average"]["before"]
        assert [row["dice"][name]["mean"] for name in results["classes"]] == pytest.approx(average["dice"], abs=2e-5)
        assert row["HD95"]["mean"]["mean"] == pytest.approx(sum(average["HD95"]) / 2, abs=5e-5)  # of 5 digits


def test_percentages_refer_to_the_network_before_pruning(tmp_path, capsys):
    """Of a training without a run folder they are known where they are given; else there is nothing to draw."""
    metrics = {"dice": [1.0, 0.5, 0.25, 0.75], "HD95": [None, 1.0, 2.0, 3.0], "surface_dice": [None, 0.5, 0.5, 0.5]}
    scores, folder = tmp_path / "results.json", tmp_path / "kept"
    folder.mkdir()
    scores.write_text(json.dumps({"patient001_frame01": metrics, "average": metrics, "n": {}}))
    flags = ["keep", "--scores", str(scores), str(folder / "one.json"), "--row", "sauron", "--budget", "20%"]
    flags += ["--data", "acdc", "--seconds", "60", "--seed", "1", "--flops", "2e9", "--parameters", "3e6"]
    assert main(flags) == 0
    table = ["table", str(folder), "--output", str(tmp_path / "out")]
    assert main(table) == 2
    assert "no FLOPs before pruning are known" in capsys.readouterr().err
    assert main([*flags, "--whole_flops", "1e10", "--overwrite"]) == 0
    assert main(table) == 0
    row = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]
    assert row["flops_share"] == pytest.approx(0.2) and not row["parameters_share"]
    assert (tmp_path / "out" / "dice_flops.png").stat().st_size > 1000

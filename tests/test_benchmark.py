"""The benchmark from the command line, on a small phantom."""

import json
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from raw_data import write_raw

import train
from lib import checkpoint
from lib.data import DATASETS
from lib.experiments import benchmark
from lib.experiments import benchmark_networks as networks
from lib.experiments.intervals import two_level
from lib.models import load_model, nnUNet
from lib.models.size import summary
from lib.system.error import InputError

needs_torch_pruning = pytest.mark.skipif(
    networks.torch_pruning is None, reason=f"needs pip install {networks.TORCH_PRUNING}"
)
ROWS = [
    "Sauron",
    "Sauron (lambda = 0)",
    "random filters, otherwise Sauron",
    "nnUNet",
    "nnUNet of Sauron's widths, from scratch",
    "flat U-Net of Sauron's FLOPs, from scratch",
    "nnUNet, torch-pruning to Sauron's FLOPs, fine-tuned",
]
KEYS = ["sauron", "sauron-lambda0", "sauron-random", "nnunet", "nnunet-widths", "nnunet-flat", "nnunet-pruned"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a benchmark on 10 patients (4 test images), of an odd number of epochs."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "phantom", replace(DATASETS["phantom"], cases=range(1, 11)))
        patch.setattr(benchmark, "TIMED", 1)
        patch.setattr(train, "report_training", lambda *_: None)  # has tests of its own
        small = ["--fms_init", "4", "--levels", "3", "--patch_size", "64", "64", "--num_workers", "0"]
        small += ["--min_filters", "2"]
        pruning = ["--max_prune_fraction", "0.6", "--device", "cpu"]
        paths = ["--data_path", str(folder / "phantom"), "--cache_path", str(folder / "cache")]
        own = ["--data", "phantom", "--epochs", "3", "--seeds", "1", "--no_tta", "--output", str(folder / "out")]
        yield [*own, "--", *small, *pruning, *paths]


@pytest.fixture(scope="module")
def finished(arguments):
    """Folder of a benchmark that was killed in the second row, then continued; and what it trained in each call."""
    calls, save, main = [[], []], checkpoint.save, train.main

    def save_then_die(state):
        save(state)
        if "lambda0" in str(state.folder):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "main", lambda argv: calls[0].append(argv) or main(argv))
        patch.setattr(checkpoint, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(arguments)
        patch.setattr(checkpoint, "save", save)
        patch.setattr(train, "main", lambda argv: calls[1].append(argv) or main(argv))
        assert benchmark.main(arguments) == 0
    return SimpleNamespace(folder=Path(arguments[arguments.index("--output") + 1]), calls=calls)


def run_of(finished, row):
    return finished.folder / "runs" / f"{row}-1" / "phantom" / "1"


@contextmanager
def other_config(run, **settings):
    """The run's config.json with other settings for a while."""
    path = run / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | settings))
    try:
        yield
    finally:
        path.write_text(before)


@needs_torch_pruning
def test_the_table_has_every_row(finished):
    table = json.loads((finished.folder / "table.json").read_text())
    assert [row["row"] for row in table["rows"]] == ROWS
    assert (table["partitions"], table["subjects"], table["seeds"]) == (["test"], 4, [1])
    assert (table["settings"]["epochs"], table["settings"]["fms_init"]) == (3, 4)
    rows = dict(zip(KEYS, table["rows"], strict=True))
    target, whole = rows["sauron"]["flops"]["mean"], rows["nnunet"]
    assert target < 0.9 * whole["flops"]["mean"]
    for key in ("flops", "parameters"):
        assert rows["nnunet-widths"][key] == rows["sauron"][key]
    assert rows["nnunet-pruned"]["flops"]["mean"] == pytest.approx(target, rel=0.1)  # a filter of so few is 10% of it
    for row in table["rows"]:
        assert set(row["dice"]) == {"RV cavity", "myocardium", "LV cavity", "mean foreground"}
        assert row["bytes"]["mean"] > 0 and row["training_seconds"]["mean"] > 0 and row["inference_seconds"]["mean"] > 0
        assert row["torch_ms"]["mean"] > 0 and ("openvino_ms" in row) == (find_spec("openvino") is not None)
        assert ("sauron_minus_this" in row) == (row not in (rows["sauron"], whole))
    assert whole["wilcoxon_p"] is None
    lines = (finished.folder / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:9]] == [f"| {row}" for row in ROWS]
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:9])
    notes = " ".join(line.strip() for line in lines[10:])
    assert "4 test images of 2 patients. Every row is trained for 3 epochs in all" in notes
    assert "trained for 1 of the 3 epochs, pruned, and fine-tuned for the other 2" in notes
    assert "Trained on cpu, " in notes and "Inference was timed on cpu, " in notes and "different devices" not in notes


@needs_torch_pruning
def test_every_training_is_kept_without_paths(finished):
    """What was pruned between two halves has the history of both."""
    text = (finished.folder / "runs.json").read_text()
    assert str(finished.folder.parent) not in text and "/" not in text
    runs = json.loads(text)
    assert runs["data"] == "phantom" and runs["classes"] == ["background", "RV cavity", "myocardium", "LV cavity"]
    assert runs["patients"] == {subject: int(subject[7:10]) for subject in runs["patients"]}
    assert [training["row"] for training in runs["trainings"]] == ROWS
    table = json.loads((finished.folder / "table.json").read_text())
    for training, row in zip(runs["trainings"], table["rows"], strict=True):
        assert (training["seed"], training["fold"]) == (1, None)
        assert training["flops"] == row["flops"]["mean"] and training["parameters"] == row["parameters"]["mean"]
        assert training["seconds"] == pytest.approx(row["training_seconds"]["mean"], rel=1e-4)
        assert training["history"]["epoch"] == [1, 2, 3] and len(training["history"]["val_dice"][2]) == 4
        assert training["subjects"].keys() == runs["patients"].keys()
    flags = {training["key"]: training["settings"] for training in runs["trainings"]}
    assert [flags[key]["imp_fun"] for key in KEYS[:3]] == ["euc_rand", "euc_rand", "random"]
    assert (flags["sauron-lambda0"]["lambda_"], flags["nnunet-pruned"]["epochs"]) == (0, 2)
    assert not {"seed_train", "exp_name", "fold", "output", "fms_init"} & set(flags["nnunet"])
    for name in ("dice_flops.png", "curves.png"):
        assert (finished.folder / name).stat().st_size > 10_000


@needs_torch_pruning
def test_every_row_has_as_many_steps_and_all_of_its_time(finished):
    def steps(row, epoch):
        state = torch.load(run_of(finished, row) / "models" / f"state-{epoch}", weights_only=True)
        (n,) = {int(values["step"]) for values in state["optimizer"]["state"].values()}
        return n

    whole = steps("nnunet", 3)
    assert whole > 3
    assert {steps(row, 3) for row in KEYS[:-1]} == {whole}
    assert steps("nnunet-half", 1) + steps("nnunet-pruned", 2) == whole

    seconds = json.loads((finished.folder / "pruned" / "nnunet-pruned-1.json").read_text())["seconds"]
    assert seconds > 0
    for row in ("nnunet-half", "nnunet-pruned"):
        history = json.loads((run_of(finished, row) / "history.json").read_text())
        seconds += sum(history["seconds"])
        assert history["lr"][0] == 0.003  # the learning rate starts anew in the second half
    table = json.loads((finished.folder / "table.json").read_text())
    assert table["rows"][-1]["training_seconds"]["mean"] == pytest.approx(seconds)
    config = json.loads((run_of(finished, "nnunet-pruned") / "config.json").read_text())
    assert config["seed_train"] == 1_000_001  # other patches than those of the first half


@needs_torch_pruning
def test_random_filters_and_the_flat_network(finished):
    config = json.loads((run_of(finished, "sauron-random") / "config.json").read_text())
    sauron = json.loads((run_of(finished, "sauron") / "config.json").read_text())
    assert {key for key in config if config[key] != sauron[key]} == {"imp_fun", "exp_name", "command"}
    assert config["imp_fun"] == "random"
    flops = json.loads((run_of(finished, "sauron") / "history.json").read_text())["flops"][-1]
    model = load_model(run_of(finished, "nnunet-flat") / "models" / "model-3")
    (width,) = {block.out_filters for block in model.blocks() if not block.head}
    assert [block.out_filters for block in model.blocks() if block.head] == [4]
    names = [block.name for block in model.blocks() if not block.head]

    def off(width):
        flat = nnUNet(1, 4, 1, 3, filters={"out": dict.fromkeys(names, width)})
        return abs(summary(flat, (64, 64))["flops"] - flops)

    assert width == min(range(1, 20), key=off)


@needs_torch_pruning
def test_it_continues_where_it_was_interrupted(finished):
    first, second = finished.calls
    assert len(first) == 2 and len(second) == 7
    assert "--resume" in second[0] and not any("--resume" in argv for argv in [*first, *second[1:]])
    history = json.loads((run_of(finished, "sauron-lambda0") / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3]


@needs_torch_pruning
def test_what_is_finished_is_timed_on_another_device(finished, arguments, monkeypatch):
    before = json.loads((finished.folder / "table.json").read_text())["rows"]
    for script in (benchmark.train, benchmark.predict, benchmark.evaluate):
        monkeypatch.setattr(script, "main", lambda argv: pytest.fail(f"done already: {argv}"))
    monkeypatch.setattr(networks, "torch_pruning", None)  # which has done its part
    with other_config(run_of(finished, "nnunet-half"), device="cuda", machine="x86_64, 3 cores, 3 threads, A-GPU"):
        assert benchmark.main([*arguments, "--device", "cpu:0"]) == 0
    table = json.loads((finished.folder / "table.json").read_text())
    assert table["inference_on"].startswith("cpu:0, ")
    for now, then in zip(table["rows"], before, strict=True):
        assert (now["dice"], now["training_seconds"]) == (then["dice"], then["training_seconds"])
    assert table["rows"][-1]["trained_on"][0].startswith("cuda, x86_64, 3 cores, 3 threads, A-GPU, float32; cpu, ")
    lines = (finished.folder / "table.md").read_text().splitlines()
    assert any("Inference was timed on cpu:0, " in line for line in lines)
    assert any("trained on different devices" in line for line in lines)
    (line,) = [line for line in lines if line.startswith("- Trained on cuda")]
    assert "A-GPU, float32; cpu, " in line


@needs_torch_pruning
def test_results_are_those_of_the_present_model(finished, arguments):
    plan = benchmark.make_plan(benchmark.parse_arguments(arguments))
    results, stray = finished.folder / "results" / "nnunet-1.json", finished.folder / "predictions" / "nnunet-1" / "x"
    expected = json.loads(results.read_text())
    made_from = results.with_suffix(".sha256")
    for spoil in (lambda: made_from.write_text("0" * 64), made_from.unlink):
        spoil()
        results.write_text('{"of": "another model"}')
        stray.write_text("of another model")
        assert benchmark.evaluate_row(plan, plan.task("nnunet", 1)) == expected
        assert json.loads(results.read_text()) == expected and not stray.exists()
    results.write_text('{"of": "this model"}')
    assert benchmark.evaluate_row(plan, plan.task("nnunet", 1)) == {"of": "this model"}
    results.write_text(json.dumps(expected))


@needs_torch_pruning
def test_a_broken_file_is_named_in_one_line(finished, arguments, capsys):
    for file in (finished.folder / "results" / "sauron-1.json", finished.folder / "pruned" / "nnunet-pruned-1.json"):
        content = file.read_text()
        file.write_text(content[:-5])
        try:
            assert benchmark.main(arguments) == 2
        finally:
            file.write_text(content)
        assert f"error: {file}: cannot be used (" in capsys.readouterr().err.splitlines()[-1]


@needs_torch_pruning
def test_rows_of_the_earlier_scheme_are_refused(finished, arguments, capsys):
    record = finished.folder / "pruned" / "nnunet-pruned-1.json"
    with other_config(run_of(finished, "nnunet-pruned"), epochs=3):
        assert benchmark.main(arguments) == 2
        assert "nnunet-pruned-1: an earlier version" in capsys.readouterr().err.splitlines()[-1]
        assert benchmark.main(["--rows", "nnunet", *arguments]) == 2  # the old row would be in the table too
    moved = record.rename(record.with_suffix(".away"))
    assert benchmark.main(arguments) == 2
    assert "nnunet-pruned-1: an earlier version" in capsys.readouterr().err.splitlines()[-1]
    moved.rename(record)


@needs_torch_pruning
@pytest.mark.parametrize("row", ["nnunet-widths", "nnunet-flat", "nnunet-pruned"])
def test_rows_like_another_network_of_sauron_are_refused(finished, arguments, row, capsys):
    plan = benchmark.make_plan(benchmark.parse_arguments(arguments))
    benchmark.check_likeness(plan, plan.task(row, 1))
    models = run_of(finished, "sauron") / "models"
    saved = {name: (models / name).read_bytes() for name in ("model-3", "SHA256SUMS")}
    checkpoint.save_model(models / "model-3", nnUNet(1, 4, 8, 3))
    try:
        with pytest.raises(InputError, match=f"{row}-1: was made like another network than that of sauron-1"):
            benchmark.check_likeness(plan, plan.task(row, 1))
    finally:
        for name, data in saved.items():
            (models / name).write_bytes(data)


@needs_torch_pruning
def test_every_training_names_its_own_command(finished):
    config = json.loads((run_of(finished, "nnunet") / "config.json").read_text())
    assert "train.py --data phantom" in config["command"]
    assert "--model nnunet --epochs 3 --device cpu --seed_train 1" in config["command"]


@needs_torch_pruning
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fms_init", "8"], "--fms_init 8: "),
        (["--lambda", "0.1"], "--lambda 0.1: "),
        (["--seed_train", "3"], "--seed_train after --"),
        (["--model", "nnunet"], "--model after --"),
        (["--imp_fun", "random"], "--imp_fun random after --"),
        (["--max_ms", "3"], "--max_ms after --"),
        (["--loss", "DS_CrossEntropyDiceLoss_Distance"], "--model sauron"),
        (["--levels", "9"], "--patch_size"),
    ],
)
def test_other_settings_are_refused(finished, arguments, more, message, capsys):
    before = sorted(finished.folder.rglob("*"))
    assert benchmark.main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(finished.folder.rglob("*")) == before


def test_without_torch_pruning_nothing_starts_but_what_does_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(networks, "torch_pruning", None)
    for rows, others in (([], " ".join(KEYS[:-1])), (["--rows", "nnunet-pruned"], "sauron nnunet")):
        assert benchmark.main(["--data", "phantom", "--output", str(tmp_path / "out"), *rows]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "pip install torch-pruning" in error
        assert error.strip().endswith(f"--rows {others}")
    assert list(tmp_path.iterdir()) == []


def test_one_epoch_has_no_two_halves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for budgets in ([], ["--budgets", "50%"]):
        assert benchmark.main(["--data", "phantom", "--epochs", "1", *budgets]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--epochs 1: nnunet-pruned" in error and "--rows sauron" in error
    assert benchmark.main(["--data", "phantom", "--rows", "sauron-lambda0", "--budgets", "50%"]) == 2
    assert "--rows sauron-lambda0: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_torch_pruning
def test_budgets_share_the_epochs_and_a_second_call_adds_to_the_table(arguments, tmp_path, monkeypatch):
    cut = arguments.index("--")
    argv = ["--data", "phantom", "--epochs", "3", "--seeds", "1", "--output", str(tmp_path / "out")]
    argv += ["--partitions", "test", "validation"]
    small = [*arguments[cut:], "--prune_between", "0%", "50%", "--min_filters", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(networks, "torch_pruning", None)
        assert benchmark.main([*argv, "--rows", "nnunet-flat", "--budgets", "70%", *small]) == 0
    assert benchmark.main([*argv, "--rows", "nnunet-pruned", "sauron-random", "--budgets", "90%", *small]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["row"]: row for row in table["rows"]}
    assert list(rows) == [
        "nnUNet",
        "Sauron, budget 70%",
        "flat U-Net of Sauron's FLOPs (70%), from scratch",
        "Sauron, budget 90%",
        "random filters (90%), otherwise Sauron",
        "nnUNet, torch-pruning to Sauron's FLOPs (90%), fine-tuned",
    ]
    whole, sauron70, _, sauron90, chance, pruned = (row["flops"]["mean"] for row in rows.values())
    assert sauron70 <= 0.7 * whole and max(sauron90, chance) <= 0.9 * whole
    assert pruned == pytest.approx(sauron90, rel=0.1)
    assert ["sauron_minus_this" in row for row in rows.values()] == [False, False, True, False, True, True]
    runs = tmp_path / "out" / "runs"
    epochs = {path.parts[-4]: json.loads(path.read_text())["epochs"] for path in runs.glob("*/phantom/1/config.json")}
    assert (epochs["nnunet-half-1"], epochs["nnunet-pruned@90pct-1"]) == (1, 2)
    assert {epochs[row] for row in ("nnunet-1", "sauron@70pct-1", "sauron-random@90pct-1", "nnunet-flat@70pct-1")} == {
        3
    }
    assert len(list((tmp_path / "out" / "predictions" / "nnunet-1").glob("*.nii.gz"))) == table["subjects"]
    assert (tmp_path / "out" / "dice_flops.png").stat().st_size > 10_000


OWN = [
    *("--rows", "sauron", "nnunet-widths", "--budgets", "60%", "--seeds", "1", "2", "--folds", "0", "1"),
    *("--jobs", "3", "--epochs", "2"),
]
OWN_FLAGS = [
    *("--fms_init", "4", "--levels", "3", "--steps", "2", "--min_filters", "2", "--max_prune_fraction", "0.6"),
    *("--dim", "2D", "--patch_size", "24", "24", "--device", "cpu", "--num_workers", "0"),
]


def mean_dice(training):
    """{subject: mean Dice of the foreground classes}, where all of them have one."""
    return {subject: sum(found["dice"][1:]) / len(found["dice"][1:]) for subject, found in training["subjects"].items()}


def test_own_data_are_compared_fold_by_fold(tmp_path, capsys):
    """Three trainings at a time, in processes of their own; the second call finds all of them."""
    data = write_raw(tmp_path / "Dataset007_Blobs", n=5, shape=(24, 28, 4), empty=False)
    output = tmp_path / "out"
    arguments = ["--data", str(data), "--output", str(output), *OWN]
    flags = ["--", *OWN_FLAGS, "--cache_path", str(tmp_path / "cache")]
    assert benchmark.main([*arguments, *flags]) == 0
    printed = capsys.readouterr().out
    assert "6 of 6 in" in printed and "epoch 2/2" in (output / "logs" / "sauron@60pct-2.txt").read_text()
    table = json.loads((output / "table.json").read_text())
    assert [(row["row"], row["seeds"]) for row in table["rows"]] == [
        ("nnUNet", [1, 2]),
        ("Sauron, budget 60%", [1, 2]),
        ("nnUNet of Sauron's widths (60%), from scratch", [1, 2]),
    ]
    scores = {}
    for seed, fold in ((1, "0"), (2, "1")):
        (run,) = (output / "runs" / f"sauron@60pct-{seed}").glob("*/*")
        assert json.loads((run / "config.json").read_text())["fold"] == fold
        scores |= json.loads((run / "validation.json").read_text())["before"]["subjects"]
    assert len(scores) == table["subjects"] == 2  # one of five in each fold
    found = table["rows"][1]["dice"]["mean foreground"]["mean"]
    assert found == pytest.approx(sum(sum(metrics["dice"][1:]) / 2 for metrics in scores.values()) / 2)
    difference = table["rows"][1]["difference"]
    assert (difference["n"], difference["cases"]) == (2, 2)
    runs = json.loads((output / "runs.json").read_text())
    by_key = {(run["key"], run["seed"]): run for run in runs["trainings"]}
    assert [by_key["nnunet", seed]["fold"] for seed in (1, 2)] == ["0", "1"]
    again = []
    for seed in (1, 2):
        dice = [mean_dice(by_key[key, seed]) for key in ("sauron@60pct", "nnunet")]
        again.append({runs["patients"][subject]: dice[0][subject] - dice[1][subject] for subject in dice[0]})
    again = two_level(again, ["0", "1"])
    for end in ("mean", "low", "high"):
        assert again[end] == pytest.approx(difference[end], abs=2e-5)
        assert again["t"][end] == pytest.approx(difference["t"][end], abs=2e-4)
    flops = [row["flops"]["mean"] for row in table["rows"]]
    assert flops[1] == flops[2] < flops[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.train, "main", lambda argv: pytest.fail(f"done already: {argv}"))
        assert benchmark.main([*arguments, *flags]) == 0
        other = [*arguments[: arguments.index("--folds")], "--folds", "0", "2", *arguments[arguments.index("--jobs") :]]
        assert benchmark.main([*other, *flags]) == 2
    assert "was trained on fold 1, not 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--folds", "0"], "--folds: give one for each of the 2 seeds, not 1"),
        (["--no_tta"], "--no_tta: of own data"),
        (["--partitions", "test"], "--partitions test: of own data"),
        (["--", "--fold", "1"], "--fold after --: the benchmark sets it"),
        (["--data", "phantom"], "--folds: is for a folder in nnU-Net's raw format"),
    ],
)
def test_what_does_not_go_with_own_data(tmp_path, capsys, changed, message):
    data = write_raw(tmp_path / "Dataset007_Blobs", n=5, shape=(24, 28, 4), empty=False)
    arguments = ["--data", str(data), "--output", str(tmp_path / "out"), *OWN, *changed]
    assert benchmark.main([*arguments, *([] if "--" in changed else ["--"]), *OWN_FLAGS]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_training_that_fails_is_named_and_those_that_need_it_are_left_out(tmp_path, capsys):
    data = write_raw(tmp_path / "Dataset007_Blobs", n=5, shape=(24, 28, 4), empty=False)
    output = tmp_path / "out"
    (output / "runs").mkdir(parents=True)
    (output / "runs" / "sauron@60pct-1").write_text("where its folder should be")
    arguments = ["--data", str(data), "--output", str(output), *OWN, "--seeds", "1", "--folds", "0"]
    assert benchmark.main([*arguments, "--", *OWN_FLAGS, "--cache_path", str(tmp_path / "cache")]) == 2
    printed = capsys.readouterr()
    assert "1 trainings failed, see logs/sauron@60pct-1.txt" in printed.err
    assert "cannot be written to" in (output / "logs" / "sauron@60pct-1.txt").read_text()
    assert [path.name for path in sorted((output / "runs").iterdir())] == ["nnunet-1", "sauron@60pct-1"]

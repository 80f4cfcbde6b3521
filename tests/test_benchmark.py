"""The benchmark from the command line, on a small phantom, and the arithmetic of its table."""

import copy
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from lib import checkpoint
from lib.data import DATASETS
from lib.error import InputError
from lib.experiments import benchmark
from lib.models import load_model, nnUNet, summary
from lib.pruning import prune

needs_torch_pruning = pytest.mark.skipif(
    benchmark.torch_pruning is None, reason=f"needs pip install {benchmark.TORCH_PRUNING}"
)
ROWS = [
    "Sauron",
    "Sauron (lambda = 0)",
    "nnUNet",
    "nnUNet of Sauron's widths, from scratch",
    "nnUNet, torch-pruning to Sauron's FLOPs, fine-tuned",
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Of a benchmark on 10 patients (4 test images)."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DATASETS["phantom"], "cases", range(1, 11))
        small = ["--fms_init", "4", "--levels", "3", "--patch_size", "32", "32", "--num_workers", "0"]
        small += ["--min_filters", "2"]
        pruning = ["--max_prune_fraction", "0.6", "--device", "cpu"]
        paths = ["--data_path", str(folder / "phantom"), "--cache_path", str(folder / "cache")]
        own = ["--data", "phantom", "--epochs", "2", "--seeds", "1", "--output", str(folder / "out")]
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


@needs_torch_pruning
def test_the_table_has_every_row(finished):
    table = json.loads((finished.folder / "table.json").read_text())
    assert [row["row"] for row in table["rows"]] == ROWS
    assert (table["partitions"], table["subjects"], table["seeds"]) == (["test"], 4, [1])
    assert (table["settings"]["epochs"], table["settings"]["fms_init"]) == (2, 4)
    sauron, _, whole, widths, pruned = table["rows"]
    target = sauron["flops"]["mean"]
    assert target < 0.9 * whole["flops"]["mean"]
    assert widths["flops"] == sauron["flops"]
    assert widths["parameters"] == sauron["parameters"]
    assert pruned["flops"]["mean"] == pytest.approx(target, rel=0.1)  # a filter of so small a network is 10% of it
    for row in table["rows"]:
        assert set(row["dice"]) == {"RV cavity", "myocardium", "LV cavity", "mean foreground"}
        assert row["bytes"]["mean"] > 0 and row["training_seconds"]["mean"] > 0 and row["inference_seconds"]["mean"] > 0
    assert whole["wilcoxon_p"] is None
    lines = (finished.folder / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [f"| {row}" for row in ROWS]
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:7])
    assert "4 test images of 2 patients, 2 epochs" in lines[8]


@needs_torch_pruning
def test_it_continues_where_it_was_interrupted(finished, arguments, monkeypatch):
    first, second = finished.calls
    assert len(first) == 2 and len(second) == 4
    assert "--resume" in second[0] and not any("--resume" in argv for argv in [*first, *second[1:]])
    history = json.loads((finished.folder / "runs" / "sauron-lambda0-1" / "phantom" / "1" / "history.json").read_text())
    assert history["epoch"] == [1, 2]
    before = json.loads((finished.folder / "table.json").read_text())["rows"]
    for script in (benchmark.train, benchmark.predict, benchmark.evaluate):
        monkeypatch.setattr(script, "main", lambda argv: pytest.fail(f"done already: {argv}"))
    assert benchmark.main(arguments) == 0
    after = json.loads((finished.folder / "table.json").read_text())["rows"]
    assert [row["dice"] for row in after] == [row["dice"] for row in before]


@needs_torch_pruning
def test_every_training_names_its_own_command(finished):
    config = json.loads((finished.folder / "runs" / "nnunet-1" / "phantom" / "1" / "config.json").read_text())
    assert "train.py --data phantom" in config["command"]
    assert "--model nnunet --epochs 2 --seed_train 1" in config["command"]


@needs_torch_pruning
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fms_init", "8"], "--fms_init 8: "),
        (["--lambda", "0.1"], "--lambda 0.1: "),
        (["--seed_train", "3"], "--seed_train after --"),
        (["--model", "nnunet"], "--model after --"),
        (["--loss", "DS_CrossEntropyDiceLoss_Distance"], "--model sauron"),
        (["--levels", "9"], "--patch_size"),
    ],
)
def test_other_settings_are_refused(finished, arguments, more, message, capsys):
    before = sorted(finished.folder.rglob("*"))
    assert benchmark.main([*arguments, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert sorted(finished.folder.rglob("*")) == before


def test_without_torch_pruning_nothing_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "torch_pruning", None)
    assert benchmark.main(["--data", "phantom", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install torch-pruning" in error
    assert list(tmp_path.iterdir()) == []


def literal_keep(model, n):
    """{block: filters that stay} when the n least important go: the formula of the docstring, written out."""
    blocks, scores = model.blocks(), defaultdict(list)
    widths = {"image": model.modalities} | {block.name: block.out_filters for block in blocks}
    for block in blocks:
        weight = block.conv.weight.detach()
        if block.transposed:
            weight = weight.transpose(0, 1)
        if not block.head:
            scores[block.name].append(weight.pow(2).flatten(1).sum(1))
        offset = 0
        for parent in block.parents:
            part = weight[:, offset : offset + widths[parent]].transpose(0, 1)
            scores[parent].append(part.pow(2).flatten(1).sum(1))
            offset += widths[parent]
    del scores["image"]
    ranking = []
    for name, layers in scores.items():
        score = torch.stack(layers).mean(0)
        ranking += sorted((s, name, c) for c, s in enumerate((score / score.mean()).tolist()))[:-1]
    gone = {(name, c) for _, name, c in sorted(ranking)[:n]}
    return {name: torch.tensor([c for c in range(widths[name]) if (name, c) not in gone]) for name in scores}


@needs_torch_pruning
@pytest.mark.parametrize(("dim", "patch_size"), [("2D", (64, 64)), ("3D", (16, 32, 16))])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.15])
def test_magnitude_pruning_hits_the_flops(dim, patch_size, share, tmp_path):
    torch.manual_seed(3)
    model = nnUNet(1, 4, 12, 4, dim=dim)
    model.initialize()
    before, copied = summary(model, patch_size), copy.deepcopy(model)
    target = int(share * before["flops"])
    benchmark.prune_by_magnitude(model, target, patch_size)
    checkpoint.save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    after = summary(loaded, patch_size)
    assert after["flops"] == pytest.approx(target, rel=0.02)
    assert (loaded.n_classes, loaded.modalities, loaded.levels) == (4, 1, 4)
    # our own surgery on the filters that the formula chooses gives the same weights
    prune(copied, None, literal_keep(copied, before["filters"] - after["filters"]))
    expected, found = copied.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(value.equal(found[key]) for key, value in expected.items())


@needs_torch_pruning
def test_magnitude_pruning_keeps_a_filter_in_every_block():
    model = nnUNet(1, 4, 4, 3)
    model.initialize()
    benchmark.prune_by_magnitude(model, 0, (32, 32))
    assert [block.out_filters for block in model.blocks() if not block.head] == [1] * 12
    assert model(torch.zeros(1, 1, 32, 32))[0].shape == (1, 4, 32, 32)


def test_mean_and_standard_deviation():
    assert benchmark.spread([0.8, 0.9, 1.0]) == pytest.approx({"mean": 0.9, "sd": 0.1})
    assert benchmark.spread([2.0, None]) == {"mean": 2.0, "sd": None}
    assert benchmark.spread([None]) == {"mean": None, "sd": None}


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 32),  # of 32 signs, these and their mirror image are the most extreme
        ([1, 2, 3, -4], 2 * 7 / 16),  # 7 of 16 have a negative rank sum of at most 4
        ([0, 0], None),
        ([], None),
    ],
)
def test_wilcoxon_by_hand(differences, p):
    reference = {f"s{i}": float(i) for i in range(len(differences))} | {"a": 1.0, "b": None}
    dice = {f"s{i}": i + float(d) for i, d in enumerate(differences)} | {"a": None, "b": 0.5}
    assert benchmark.wilcoxon_p(dice, reference) == (None if p is None else pytest.approx(p))


def results(*dice):
    """As evaluate.py: Dice of two foreground classes by subject, and averages made up for the test."""
    subjects = {f"s{i}": {"dice": [1.0, *values]} for i, values in enumerate(dice)}
    return subjects | {"average": {"dice": [1.0, *dice[0]], "HD95": [None, 3.0, None]}, "n": {}}


def test_a_row_by_hand():
    seeds = [results([0.8, 0.6], [0.5, None]), results([0.6, 0.2], [None, None])]
    assert benchmark.subject_dice(seeds) == pytest.approx({"s0": (0.7 + 0.4) / 2, "s1": 0.5})
    sizes = [
        {"parameters": 2e6, "flops": 4e9, "bytes": 8e6, "training_seconds": 90.0, "inference_seconds": 0.5},
        {"parameters": 1e6, "flops": 2e9, "bytes": 4e6, "training_seconds": 30.0, "inference_seconds": 0.1},
    ]
    row = benchmark.make_row("ours", seeds, sizes, seeds, ("background", "a", "b"))
    assert row["dice"]["a"] == pytest.approx({"mean": 0.7, "sd": 0.02**0.5})
    assert row["dice"]["mean foreground"] == pytest.approx({"mean": 0.55, "sd": 0.045**0.5})
    assert row["HD95"]["a"] == {"mean": 3.0, "sd": 0.0}
    assert row["HD95"]["b"] == {"mean": None, "sd": None}
    assert row["training_seconds"] == pytest.approx({"mean": 60.0, "sd": 1800**0.5})
    assert row["by_seed"]["flops"] == [4e9, 2e9]
    line = benchmark.format_table([row], row | {"flops": {"mean": 12e9}}).splitlines()[2]
    assert line == (
        "| ours | 0.700 ± 0.141 | 0.400 ± 0.283 | 0.550 ± 0.212 | 3.00 ± 0.00 | - | 3.00 ± 0.00 | "
        "1.500 ± 0.707 (100%) | 3.000 ± 1.414 (25%) | 6.00 ± 2.83 | 1.0 ± 0.7 | 0.300 ± 0.283 | - | "
        "+0.000 [+0.000, +0.000] |"
    )


def test_differences_are_paired_by_patient():
    def of(*dice):  # two patients of two images each
        names = ("p1_a", "p1_b", "p2_a", "p2_b")
        return [{name: {"dice": [1.0, d]} for name, d in zip(names, dice, strict=True)}]

    found = benchmark.difference(of(0.8, 0.6, 0.5, 0.7), of(0.6, 0.6, 0.4, None))
    # patients: 0.7 - 0.6 and 0.6 - 0.4; t(0.975, 1) = 12.706, sd = 0.0707, so 12.706 * 0.05
    assert found == pytest.approx({"mean": 0.15, "low": 0.15 - 0.6353, "high": 0.15 + 0.6353, "n": 2}, abs=1e-4)
    assert benchmark.format_difference(found) == "+0.150 [-0.485, +0.785]"
    assert benchmark.format_difference(benchmark.difference(of(1, 1, None, None), of(0.5, 1, 1, 1))) == "+0.250"


@needs_torch_pruning
def test_budgets_share_the_epochs_and_a_second_call_adds_to_the_table(arguments, tmp_path):
    out = ["--output", str(tmp_path / "out"), "--epochs", "3"]
    cut = arguments.index("--")
    argv = [*arguments[:cut], *out, "--partitions", "test", "validation", "--no_tta", "--budgets"]
    small = [*arguments[cut:], "--prune_between", "0%", "50%", "--min_filters", "1"]
    assert benchmark.main([*argv, "70%", *small]) == 0
    assert benchmark.main([*argv, "90%", *small]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {row["row"]: row for row in table["rows"]}
    kinds = ("Sauron, budget {}", "nnUNet of Sauron's widths ({}), from scratch")
    kinds += ("nnUNet, torch-pruning to Sauron's FLOPs ({}), fine-tuned",)
    assert list(rows) == ["nnUNet", *(kind.format(limit) for limit in ("70%", "90%") for kind in kinds)]
    whole = rows["nnUNet"]["flops"]["mean"]
    for limit, share in (("70%", 0.7), ("90%", 0.9)):
        sauron, widths, pruned = (rows[kind.format(limit)] for kind in kinds)
        assert sauron["flops"]["mean"] <= share * whole
        assert widths["flops"] == sauron["flops"]
        assert "sauron_minus_this" in widths and "sauron_minus_this" in pruned
    runs = tmp_path / "out" / "runs"
    epochs = {path.parts[-4]: json.loads(path.read_text())["epochs"] for path in runs.glob("*/phantom/1/config.json")}
    assert epochs["nnunet-half-1"] + epochs["nnunet-pruned@70pct-1"] == 3
    assert epochs["nnunet-1"] == epochs["sauron@70pct-1"] == epochs["nnunet-widths@70pct-1"] == 3
    assert len(list((tmp_path / "out" / "predictions" / "nnunet-1").glob("*.nii.gz"))) == table["subjects"]
    assert (tmp_path / "out" / "dice_flops.png").stat().st_size > 10_000


def test_the_partition_is_one_with_ground_truth():
    def data(**files):
        labels = {part: [SimpleNamespace(label=label) for label in files.get(part, [])] for part in DATA}
        return SimpleNamespace(name="kits", files=labels.get)

    DATA = ("test", "validation")  # noqa: N806
    assert benchmark.choose_partition(data(test=["a"], validation=["b"])) == "test"
    assert benchmark.choose_partition(data(test=[None], validation=["b"])) == "validation"
    with pytest.raises(InputError, match="--split"):
        benchmark.choose_partition(data(test=[None]))

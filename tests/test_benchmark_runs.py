"""How the rows of the benchmark come into its figure; what is kept of trainings is tested in test_benchmark.py."""

import pytest

from lib.experiments import benchmark_runs
from lib.experiments.benchmark_rows import ROWS


def marks(rows):
    """{key: its mark}: each row has its place as its Dice."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_runs.dice_figures, "draw_dice_flops", lambda marks, *_: found.extend(marks))
        benchmark_runs.draw_dice_flops(rows, "title", None)
    return {key: mark for key in rows for mark in found if mark.dice is rows[key]["dice_by_patient"]}


def row(flops, dice=0.5):
    return {"row": "a row", "flops": {"mean": flops}, "dice_by_patient": {"mean": dice}, "difference": {"mean": 0.0}}


def test_every_row_has_a_look_of_its_own():
    assert benchmark_runs.LOOKS.keys() == ROWS.keys()
    assert len(set(benchmark_runs.LOOKS.values())) == len(ROWS)


def test_rows_of_saurons_flops_stand_beside_it():
    """With a budget also random filters, whose FLOPs are otherwise their own."""
    keys = ["nnunet", "sauron", "sauron-lambda0", "sauron-random", "nnunet-widths", "nnunet-flat", "nnunet-pruned"]
    found = marks({key: row(800.0 if key == "nnunet" else 200.0) for key in keys})
    assert {key: mark.budget for key, mark in found.items()} == {
        "nnunet": None,
        "sauron": "",
        "sauron-lambda0": None,
        "sauron-random": None,
        "nnunet-widths": "",
        "nnunet-flat": "",
        "nnunet-pruned": "",
    }
    assert (found["nnunet"].share, found["sauron"].share) == (1, 0.25)
    assert found["nnunet"].difference is None and found["sauron"].difference == {"mean": 0.0}
    limited = marks({key: row(800.0) for key in ("nnunet", "sauron@20pct", "sauron-random@20pct", "sauron@2G")})
    assert [mark.budget for mark in limited.values()] == [None, "20pct", "20pct", "2G"]
    assert limited["sauron@20pct"].label == "Sauron" and limited["sauron-random@20pct"].label == "random filters"


def test_a_row_without_a_dice_is_not_drawn():
    assert list(marks({"nnunet": row(8.0), "sauron": row(2.0, dice=None)})) == ["nnunet"]

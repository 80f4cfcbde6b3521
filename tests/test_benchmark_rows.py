"""Which rows are trained, in which order, and what their keys stand for."""

import pytest

from lib.experiments.benchmark_rows import HALF, NNUNET, ROWS, row_of, rows_to_train

KEYS = ["sauron", "sauron-lambda0", "sauron-random", "nnunet", "nnunet-widths", "nnunet-flat", "nnunet-pruned"]


@pytest.mark.parametrize(
    ("kinds", "budgets", "expected"),
    [
        (ROWS, [], [*KEYS[:-1], "nnunet-half", KEYS[-1]]),
        (["nnunet"], [], ["nnunet"]),
        (["sauron-random"], [], ["sauron-random", "nnunet"]),
        (["nnunet-flat"], [], ["sauron", "nnunet", "nnunet-flat"]),
        (["nnunet-pruned"], [], ["sauron", "nnunet", "nnunet-half", "nnunet-pruned"]),
        (["nnunet-widths"], ["20%", "20%", "2G"], "nnunet sauron@20pct nnunet-widths@20pct sauron@2G nnunet-widths@2G"),
        (
            ROWS,
            ["20%"],
            "nnunet nnunet-half sauron@20pct sauron-random@20pct nnunet-widths@20pct nnunet-flat@20pct "
            "nnunet-pruned@20pct",
        ),
    ],
)
def test_rows_bring_what_they_need(kinds, budgets, expected):
    expected = expected.split() if isinstance(expected, str) else expected
    assert list(rows_to_train(kinds, budgets)) == expected


def test_a_budget_is_in_title_flags_and_needs():
    assert row_of("sauron").title == "Sauron" and row_of("sauron").flags == ()
    limited = row_of("sauron-random@20pct")
    assert limited.title == "random filters (20%), otherwise Sauron"
    assert limited.flags == ("--max_flops", "20%", "--imp_fun", "random")
    pruned = row_of("nnunet-pruned@2G")
    assert pruned.title == "nnUNet, torch-pruning to Sauron's FLOPs (2G), fine-tuned"
    assert (pruned.flags, pruned.needs) == (NNUNET, ("sauron@2G", HALF))

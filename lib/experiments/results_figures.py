"""The figures of kept trainings: Dice against FLOPs, and whether the validation Dice still rises."""

from collections.abc import Sequence
from pathlib import Path

from lib.experiments import dice_figures
from lib.experiments.dice_figures import Mark, validation_curve
from lib.experiments.figures import COLOURS
from lib.experiments.kept import ROWS, Training
from lib.experiments.results_table import grouped
from lib.system.error import InputError

LOOKS = dict(zip(ROWS, zip(("#000000", *COLOURS, "#777777"), "so^DvPXh", strict=True), strict=True))  # colour, marker


def draw_dice_flops(results: dict, path: Path) -> None:
    """`dice_figures.draw_dice_flops` of the rows. Raises InputError where of no row it is known which share of the
    FLOPs is left."""
    marks = [
        Mark(ROWS[row["row"]], LOOKS[row["row"]], row["flops_share"], row["budget"], dice, row["minus_unpruned"])
        for row in results["rows"]
        if row["flops_share"] and (dice := row["dice"]["mean"])["mean"] is not None
    ]
    if not marks:
        raise InputError("no FLOPs before pruning are known: add an unpruned training, or keep with --whole_flops")
    dice_figures.draw_dice_flops(marks, f"Dice against FLOPs, {results['data']}", "unpruned", path)


def draw_curves(trainings: Sequence[Training], path: Path) -> None:
    """`dice_figures.draw_curves`: a panel for each row and budget."""
    rows = [
        (group[0].title, LOOKS[row][0], [validation_curve(training.history) for training in group])
        for (row, _), group in grouped(trainings).items()
    ]
    dice_figures.draw_curves(rows, ROWS["unpruned"], path)

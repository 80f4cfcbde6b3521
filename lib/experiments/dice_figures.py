"""The two figures of finished trainings: Dice against FLOPs, and whether the validation Dice still rises."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lib.evaluation import mean_foreground
from lib.experiments.figures import STYLE, new_figure, save_figure

ASIDE = 1.05  # rows of one budget stand side by side: by this factor
TICKS = (1, 2, 3, 5, 7, 10, 20, 30, 50, 70, 100, 200)
DPI = 150
WARM_UP = 0.1  # share of the epochs that does not say where the axis of the Dice begins
Curve = tuple[list[int], list[float]]  # epochs, and the Dice of each


@dataclass(frozen=True)
class Mark:
    """A row of trainings in `draw_dice_flops`. budget: rows of the same one stand side by side (None: alone). dice and
    difference: `intervals.two_level`, of which dice has "by_training" too, a mean or None for each."""

    label: str
    look: tuple[str, str]  # colour, and matplotlib's marker
    share: float  # of the FLOPs that is left
    budget: str | None
    dice: dict
    difference: dict | None  # to the reference


def draw_dice_flops(marks: Sequence[Mark], title: str, reference: str, path: Path) -> None:
    """Above, each row's mean Dice against its FLOPs; below, its paired difference to the reference, which leaves out
    how much the cases differ from one another. Bars: two-level bootstrap intervals. Small marks: trainings."""
    has_difference = any(mark.difference for mark in marks)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 6.4 if has_difference else 4)
        panels = figure.subplots(1 + has_difference, 1, sharex=True, squeeze=False)[:, 0]
        for mark, x in zip(marks, _places(marks), strict=True):
            _interval(panels[0], mark, x, mark.dice)
            trainings = [value for value in mark.dice["by_training"] if value is not None]
            if len(trainings) > 1:
                panels[0].plot([x] * len(trainings), trainings, ".", color=mark.look[0], markersize=4, alpha=0.6)
            if mark.difference and mark.difference["mean"] is not None:
                _interval(panels[1], mark, x, mark.difference)
        panels[0].set(ylabel="mean foreground Dice", title=title)
        if has_difference:
            panels[1].axhline(0, color="black", linewidth=1, linestyle="--")
            panels[1].set(ylabel=f"Dice minus {reference} (paired)")
        _percent_axis(panels[-1], [100 * mark.share for mark in marks])
        for axes in panels:
            axes.grid(alpha=0.3)
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=8)
        save_figure(figure, path, dpi=DPI)


def _places(marks: Sequence[Mark]) -> list[float]:
    """Where each stands on the axis, percent: its FLOPs, beside those of the same budget."""
    places = []
    for mark in marks:
        beside = [one for one in marks if mark.budget is not None and one.budget == mark.budget]
        step = beside.index(mark) - (len(beside) - 1) / 2 if beside else 0
        places.append(100 * mark.share * ASIDE**step)
    return places


def _interval(axes: Axes, mark: Mark, x: float, found: dict) -> None:
    """A row's mean, with its interval."""
    colour, marker = mark.look
    low, high = (found["mean"] if found[end] is None else found[end] for end in ("low", "high"))
    axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
    axes.plot(x, found["mean"], marker, color=colour, markersize=8, markeredgecolor="white", label=mark.label)


def _percent_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 1.35, max(*shares, 100) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel("FLOPs (log scale; rows of one budget stand side by side)")


def validation_curve(history: Mapping[str, list]) -> Curve:
    """The epochs that were validated, and their mean foreground Dice."""
    pairs = zip(history["epoch"], history["val_dice"], strict=True) if "val_dice" in history else ()
    known = [(epoch, mean) for epoch, dice in pairs if (mean := mean_foreground(dice)) is not None]
    return [epoch for epoch, _ in known], [mean for _, mean in known]


def draw_curves(rows: Sequence[tuple[str, str, list[Curve]]], reference: str, path: Path) -> None:
    """The mean foreground Dice of validation by epoch: a panel for each row (title, colour, a curve of each training).
    Those of the row with the title `reference` are grey behind all. Curves and rows without a validation are left out;
    nothing is drawn where none is left, and a figure of before goes."""
    rows = [(title, colour, [curve for curve in curves if curve[0]]) for title, colour, curves in rows]
    rows = [row for row in rows if row[2]]
    if not rows:
        path.unlink(missing_ok=True)
        return
    behind = [curve for title, _, curves in rows if title == reference for curve in curves]
    n_columns = min(3, len(rows))
    n_lines = -(-len(rows) // n_columns)
    late = [
        dice
        for _, _, curves in rows
        for epochs, values in curves
        for epoch, dice in zip(epochs, values, strict=True)
        if epoch > WARM_UP * epochs[-1]
    ]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.6 * n_columns + 0.4, 2.2 * n_lines + 0.4)
        panels = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (title, colour, curves) in zip(panels, rows, strict=False):
            for curve in behind if title != reference else []:
                axes.plot(*curve, color="#BBBBBB", linewidth=0.8)
            for curve in curves:  # a dot where there is no line yet
                axes.plot(*curve, "." if len(curve[0]) == 1 else "-", color=colour, linewidth=1)
            axes.set_title(textwrap.fill(title, 26))
            axes.grid(alpha=0.3)
        for axes in panels[len(rows) :]:
            axes.set_axis_off()
        panels[0].set_ylim(min(late) - 0.005, max(late) + 0.005)
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel("mean foreground Dice of validation", fontsize=9)
        save_figure(figure, path, dpi=DPI)

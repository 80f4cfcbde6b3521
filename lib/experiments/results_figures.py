"""The figures of kept trainings: Dice against FLOPs, and whether the validation Dice still rises."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lib.evaluation import mean_foreground
from lib.experiments.figures import COLOURS, STYLE, new_figure, save_figure
from lib.experiments.kept import ROWS, Training
from lib.experiments.results_table import grouped
from lib.system.error import InputError

LOOKS = dict(zip(ROWS, zip(("#000000", *COLOURS, "#777777"), "so^DvPXh", strict=True), strict=True))  # colour, marker
ASIDE = 1.05  # rows of one budget stand side by side: by this factor
TICKS = (1, 2, 5, 10, 20, 50, 100, 200)
DPI = 150
WARM_UP = 0.1  # share of the epochs that does not say where the axis of the Dice begins


def draw_dice_flops(results: dict, path: Path) -> None:
    """Above, each row's mean Dice against its FLOPs; below, its paired difference to unpruned, which leaves out how
    much the cases differ from one another. Bars: two-level bootstrap intervals. Small marks: trainings. Raises
    InputError where of no row it is known which share of the FLOPs is left."""
    rows = [row for row in results["rows"] if row["flops_share"] and row["dice"]["mean"]["mean"] is not None]
    if not rows:
        raise InputError("no FLOPs before pruning are known: add an unpruned training, or keep with --whole_flops")
    has_difference = any(row["minus_unpruned"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 6.4 if has_difference else 4)
        panels = figure.subplots(1 + has_difference, 1, sharex=True, squeeze=False)[:, 0]
        for row, x in zip(rows, _places(rows), strict=True):
            found = row["dice"]["mean"]
            _mark(panels[0], row, x, found)
            trainings = [value for value in found["by_training"] if value is not None]
            if len(trainings) > 1:
                panels[0].plot(
                    [x] * len(trainings), trainings, ".", color=LOOKS[row["row"]][0], markersize=4, alpha=0.6
                )
            if row["minus_unpruned"] and row["minus_unpruned"]["mean"] is not None:
                _mark(panels[1], row, x, row["minus_unpruned"])
        panels[0].set(ylabel="mean foreground Dice", title=f"Dice against FLOPs, {results['data']}")
        if has_difference:
            panels[1].axhline(0, color="black", linewidth=1, linestyle="--")
            panels[1].set(ylabel="Dice minus unpruned (paired)")
        _percent_axis(panels[-1], rows)
        for axes in panels:
            axes.grid(alpha=0.3)
        handles, labels = panels[0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, fontsize=8)
        save_figure(figure, path, dpi=DPI)


def _places(rows: Sequence[dict]) -> list[float]:
    """Where each row stands on the axis, percent: its FLOPs, beside those of the same budget."""
    places = []
    for row in rows:
        beside = [one for one in rows if one["budget"] and one["budget"] == row["budget"]]
        step = beside.index(row) - (len(beside) - 1) / 2 if beside else 0
        places.append(100 * row["flops_share"] * ASIDE**step)
    return places


def _mark(axes: Axes, row: dict, x: float, found: dict) -> None:
    """A row's mean, with its interval."""
    colour, marker = LOOKS[row["row"]]
    low, high = (found["mean"] if found[end] is None else found[end] for end in ("low", "high"))
    axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
    axes.plot(x, found["mean"], marker, color=colour, markersize=8, markeredgecolor="white", label=ROWS[row["row"]])


def _percent_axis(axes: Axes, rows: Sequence[dict]) -> None:
    shares = [100 * row["flops_share"] for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(shares) / 1.35, max(*shares, 100) * 1.35)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.set_xlabel("FLOPs (log scale; rows of one budget stand side by side)")


def draw_curves(trainings: Sequence[Training], path: Path) -> None:
    """The mean foreground Dice of validation by epoch: a panel for each row and budget, a line for each training; the
    unpruned ones are grey behind all. Rows without a history are left out."""
    curves = {key: [(t, _curve(t)) for t in group] for key, group in grouped(trainings).items()}
    curves = {key: known for key, all_ in curves.items() if (known := [(t, c) for t, c in all_ if c[0]])}
    if not curves:
        return
    n_columns = min(3, len(curves))
    n_rows = -(-len(curves) // n_columns)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(2.6 * n_columns + 0.4, 2.2 * n_rows + 0.4)
        panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
        late = [
            dice
            for group in curves.values()
            for _, (epochs, values) in group
            for epoch, dice in zip(epochs, values, strict=True)
            if epoch > WARM_UP * epochs[-1]
        ]
        for axes, ((row, _), group) in zip(panels, curves.items(), strict=False):
            if row != "unpruned":
                for _, curve in curves.get(("unpruned", None), []):
                    axes.plot(*curve, color="#BBBBBB", linewidth=0.8)
            for _, curve in group:
                axes.plot(*curve, color=LOOKS[row][0], linewidth=1)
            axes.set_title(
                group[0][0].title.replace(", ", ",\n", 1) if len(group[0][0].title) > 26 else group[0][0].title
            )
            axes.grid(alpha=0.3)
        for axes in panels[len(curves) :]:
            axes.set_axis_off()
        panels[0].set_ylim(min(late) - 0.005, max(late) + 0.005)
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel("mean foreground Dice of validation", fontsize=9)
        save_figure(figure, path, dpi=DPI)


def _curve(training: Training) -> tuple[list[int], list[float]]:
    """The epochs that were validated, and their mean foreground Dice."""
    pairs = zip(training.history.get("epoch", []), training.history.get("val_dice", []), strict=True)
    known = [(epoch, mean) for epoch, dice in pairs if (mean := mean_foreground(dice)) is not None]
    return [epoch for epoch, _ in known], [mean for _, mean in known]

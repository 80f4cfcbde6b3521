"""The figures of clusterability, drawn from its results."""

from functools import partial

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lib.experiments.figures import COLOURS, new_figure

# by key: the title of its panels, what its axis shows, the limits of it, and whether small values mean clustered
MEASURES = {
    "dip": ("Hartigan's dip of the distances", "dip (no unit)", (0, None), False),
    "dip_p": ("p-value of the dip", "p (0 to 1)", (0, 1), True),
    "hopkins": ("Hopkins statistic", "H (0 to 1)", (0, 1), False),
    "silhouette": ("Mean silhouette of the best k", "silhouette (up to 1)", (0, 1), False),
    "clusters": ("Number of clusters", "k", (1, None), False),
    "distance": ("Mean distance to map 1", "distance of maps in [0, 1]", (0, None), True),
}
NO_STRUCTURE = 0.25  # Kaufman and Rousseeuw (1990): a mean silhouette up to this shows no substantial structure
WHOLE = partial(MaxNLocator, integer=True, min_n_ticks=1)  # ticks at whole numbers only
LINES = {"dip_p": 0.05, "hopkins": 0.5, "silhouette": NO_STRUCTURE}  # on the other side of these: clusters
LINES_TEXT = f"dotted: p = 0.05; H of evenly spread points; largest silhouette without structure ({NO_STRUCTURE})"


def array_of(result: dict, key: str) -> np.ndarray:
    """(layers, epochs), NaN where there is no value."""
    return np.array(result[key], float)


def mean_of(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are there; NaN where none is."""
    return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _panels(figure: Figure, results: list[dict]):
    """One axis per measure, labelled: yields (axis, key)."""
    axes = figure.subplots(2, 3, sharex=True)
    epochs = [epoch for result in results for epoch in result["epochs"]]
    for axis, (key, (title, label, limits, _)) in zip(axes.flat, MEASURES.items(), strict=True):
        axis.set(title=title, ylabel=label, xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if key in LINES:
            axis.axhline(LINES[key], color="black", linestyle=":", linewidth=1)
        yield axis, key
        axis.set_ylim(*limits)
        if key == "clusters":
            axis.set_ylim(1, max(2.1, axis.get_ylim()[1]))
            axis.yaxis.set_major_locator(WHOLE())
        axis.xaxis.set_major_locator(WHOLE())
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.supxlabel(LINES_TEXT, fontsize=8)


def draw_curves(result: dict) -> Figure:
    """Every measure over the epochs: a thin line per layer, coloured by its place in the network, and their mean."""
    figure = new_figure(10, 5.5)
    n = len(result["layers"])
    colours = matplotlib.colormaps["viridis"]
    for axis, key in _panels(figure, [result]):
        values = array_of(result, key)
        for i, line in enumerate(values):
            axis.plot(result["epochs"], line, color=colours(i / (n - 1)), linewidth=0.8, marker=".", markersize=3)
        axis.plot(
            result["epochs"],
            mean_of(values),
            color="black",
            linewidth=2.5,
            marker="o",
            markersize=3,
            label="mean",
        )
    axis.legend(frameon=False)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, n - 1), colours)
    bar = figure.colorbar(scale, ax=figure.axes, shrink=0.8, pad=0.02)
    ticks = sorted({0, _deepest(result), n - 1})
    bar.set_ticks(ticks, labels=[result["layers"][i].replace("_", "\n", 1) for i in ticks])
    figure.suptitle(f"Feature maps of {result['label']}: one line per layer", fontweight="bold")
    return figure


def _deepest(result: dict) -> int:
    return sum(layer.startswith("enc") for layer in result["layers"]) - 1


def draw_heatmaps(result: dict) -> Figure:
    """Layers x epochs, one heat map per measure; grey where there is no value."""
    n, epochs = len(result["layers"]), np.array(result["epochs"])
    half = (epochs[1] - epochs[0]) / 2 if len(epochs) > 1 else 0.5
    edges = np.concatenate([[epochs[0] - half], (epochs[1:] + epochs[:-1]) / 2, [epochs[-1] + half]])
    figure = new_figure(11, 2.2 + 0.32 * n)
    axes = figure.subplots(2, 3, sharex=True, sharey=True)
    for axis, (key, (title, label, (low, high), small)) in zip(axes.flat, MEASURES.items(), strict=True):
        colours = matplotlib.colormaps["viridis_r" if small else "viridis"].with_extremes(bad="#DDDDDD")
        values = np.ma.masked_invalid(array_of(result, key))
        image = axis.pcolormesh(edges, np.arange(n + 1) - 0.5, values, cmap=colours, vmin=low, vmax=high)
        figure.colorbar(image, ax=axis, pad=0.02, label=label, ticks=WHOLE() if key == "clusters" else None)
        axis.axhline(_deepest(result) + 0.5, color="white", linewidth=1.5)
        axis.set_title(title)
        axis.xaxis.set_major_locator(WHOLE())
    axes[0, 0].set_yticks(range(n), labels=result["layers"])
    axes[0, 0].invert_yaxis()
    for axis in axes[:, 0]:
        axis.tick_params("y", labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
    figure.suptitle(
        f"Feature maps of {result['label']}: the brighter, the more clustered (the more clusters)", fontweight="bold"
    )
    return figure


def draw_comparison(results: list[dict]) -> Figure:
    """Every measure over the epochs: the mean over the layers of each run, in a band of their middle half (but k)."""
    figure = new_figure(10, 5.5)
    for axis, key in _panels(figure, results):
        for result, colour in zip(results, COLOURS, strict=False):
            values = array_of(result, key)
            some = np.isfinite(values).any(0)
            low, high = np.nanquantile(values[:, some], (0.25, 0.75), axis=0)
            epochs = np.array(result["epochs"])
            if key != "clusters":  # whole numbers: a band would say nothing
                axis.fill_between(epochs[some], low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(
                epochs,
                mean_of(values),
                color=colour,
                linewidth=2,
                marker="o",
                markersize=3,
                label=result["label"],
            )
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.supxlabel(f"lines: mean over the layers; bands: their middle half; {LINES_TEXT}", fontsize=8)
    return figure

"""The figures of a report, drawn from a `Run`."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib import postprocessing
from lib.data import images
from lib.data.geometry import Volume, aligned, axes_of, oriented
from lib.evaluation import mean_foreground
from lib.experiments.feature_maps import cut_patch, picture
from lib.experiments.figures import class_colours, new_figure
from lib.experiments.run import Run
from lib.models import load_model
from lib.system.cli import flops_of
from lib.system.error import InputError
from lib.validation import worst_first

LINES = ("-", "--", ":")
WHOLE = {"integer": True, "steps": (1, 2, 5, 10), "min_n_ticks": 1, "nbins": 6}  # ticks of epochs
WINDOW = (0.5, 99.5)  # percentiles of the intensities from black to white
N_WORST = 6  # cases of the validation that are shown
SMALL, DPI = (4.9, 3.3), 150  # inches of a figure that has another one beside it


def new_axes(title: str, ylabel: str) -> tuple[Figure, Axes]:
    """A small figure with something over epochs."""
    figure = new_figure(*SMALL)
    axis = figure.subplots()
    axis.set(title=title, xlabel="epoch", ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(**WHOLE))
    axis.grid(color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def draw_curves(run: Run, title: str, ylabel: str, curves: dict[str, list[float | None]], top: float | None) -> Figure:
    """Curves over epochs, through the values that are there; few of them are marked, so that a single one is seen. One
    that is called mean is black and thick."""
    (figure, axis), colours = new_axes(title, ylabel), class_colours(len(curves) + 1)
    for k, (label, values) in enumerate(curves.items()):
        known = [(epoch, v) for epoch, v in zip(run.history["epoch"], values, strict=True) if v is not None]
        if known:
            marker = "o" if len(known) < 30 else None
            style = {"color": colours[k], "linestyle": LINES[k % len(LINES)], "marker": marker, "markersize": 3}
            style |= {"color": "black", "linestyle": "-", "linewidth": 2} if label == "mean" else {}
            axis.plot(*zip(*known, strict=True), label=label, clip_on=False, zorder=3, **style)  # a Dice of 0 is seen
    if top:
        axis.set_ylim(0, top)
    return figure


def mark_pruning(run: Run, figure: Figure) -> Figure:
    """The epochs that ended with fewer filters in grey."""
    epochs, filters = run.history["epoch"], run.history["filters"]
    fewer = [e for e, before, now in zip(epochs[1:], filters, filters[1:], strict=False) if now < before]
    style = {"color": "#e2e2e2", "linewidth": 0, "antialiased": False, "zorder": 0}
    for epoch in fewer:
        label = "filters deleted" if epoch == fewer[0] else None
        figure.axes[0].axvspan(epoch - 0.5, epoch + 0.5, label=label, **style)
    return figure


def add_legend(figure: Figure) -> Figure:
    """Below the axes, where no curve runs through it."""
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_loss(run: Run) -> Figure:
    curves = {"training": run.history["train_loss"], "validation": run.history["val_loss"]}
    return add_legend(mark_pruning(run, draw_curves(run, "Loss", "loss (no unit)", curves, None)))


def draw_dice(run: Run) -> Figure:
    """Raises InputError if there is nothing to draw."""
    if not any(run.history["val_dice"]):
        raise InputError("no epoch was validated")
    curves = {c: [d and d[k] for d in run.history["val_dice"]] for k, c in enumerate(run.classes) if k > 0}
    curves["mean"] = [mean_foreground(dice) for dice in run.history["val_dice"]]
    figure = mark_pruning(run, draw_curves(run, "Dice on the validation set", "Dice (0 to 1)", curves, 1))
    mean = dict(zip(run.history["epoch"], curves["mean"], strict=True)).get(run.best)
    if mean is not None:
        style = {"color": "black", "linestyle": "none", "marker": "*", "markersize": 9, "clip_on": False, "zorder": 4}
        figure.axes[0].plot(run.best, mean, label=f"model-best (epoch {run.best})", **style)
    return add_legend(figure)


def draw_size(run: Run) -> Figure:
    """What is left; with a budget its limit, and the epoch in which it was met. Beside it milliseconds, if measured."""
    left = {key: [100 * value / before for value in run.history[key]] for key, before in run.unpruned.items()}
    curves = {f"{key.replace('flops', 'FLOPs')}: {values[-1]:.1f}%": values for key, values in left.items()}
    top = max(105, *map(max, left.values()))  # a flat network may have more filters
    figure = draw_curves(run, "Size of the network", "left of the unpruned network (%)", curves, top)
    axis, style = figure.axes[0], {"color": "#666666", "linewidth": 1}
    limit = flops_of(run.settings.max_flops, run.unpruned["flops"])
    if limit:
        share = 100 * limit / run.unpruned["flops"]
        axis.axhline(share, label=f"FLOPs allowed: {share:.1f}%", linestyle="--", **style)
    if run.met is not None:
        axis.axvline(run.met, label=f"budget met (epoch {run.met})", linestyle="-.", **style)
    ms = [(e, v) for e, v in zip(run.history["epoch"], run.history.get("ms", []), strict=False) if v is not None]
    if ms:
        right = axis.twinx()
        label = f"{ms[-1][1]:.2f} ms (right)"
        right.plot(*zip(*ms, strict=True), label=label, color="black", marker="x", linestyle="none", clip_on=False)
        right.set(ylabel="time for one patch (ms)", ylim=(0, 1.05 * max(v for _, v in ms)))
        if run.settings.max_ms:
            style |= {"color": "black", "linestyle": (0, (1, 3))}
            right.axhline(run.settings.max_ms, label=f"{run.settings.max_ms:g} ms allowed", **style)
            right.set_ylim(0, 1.05 * max(run.settings.max_ms, right.get_ylim()[1]))
    return add_legend(figure)


def draw_time(run: Run) -> Figure:
    """The time of an epoch over the FLOPs of the network that it trained: that of the epoch before."""
    figure, axis = new_axes("Time", "time of an epoch (s)")
    epochs, flops, seconds = (np.array(run.history[key]) for key in ("epoch", "flops", "seconds"))
    unit, name = (1e9, "GFLOPs") if flops[0] >= 1e9 else (1e6, "MFLOPs")
    flops = np.concatenate([flops[:1], flops[:-1]]) / unit
    validated = np.array([loss is not None for loss in run.history["val_loss"]])
    known = np.array([value is not None for value in run.history["seconds"]])  # not of a published run's epochs
    epochs, flops, seconds, validated = epochs[known], flops[known], seconds[known].astype(float), validated[known]
    for these, marker, label in ((validated, "o", "with validation"), (~validated, "^", "training only")):
        if these.any():
            points = axis.scatter(flops[these], seconds[these], 16, epochs[these], marker=marker, label=label)
            points.set_clim(epochs[0], max(epochs[-1], epochs[0] + 1))
    axis.set(xlabel=f"computation for one patch ({name})", xlim=(0, None), ylim=(0, 1.05 * seconds.max()))
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=WHOLE["steps"]))
    figure.colorbar(points, label="epoch", ticks=MaxNLocator(**WHOLE))
    return add_legend(figure) if len(set(validated)) == 2 else figure


def draw_filters(run: Run) -> Figure:
    """Blocks x epochs: the filters that are left, and beside them the thresholds."""
    n, first, widths = len(run.widths), run.history["epoch"][0], list(run.widths.values())
    left = 100 * run.filters / np.array(widths)[:, None]
    maps = [(left, "Filters left", "of the unpruned block (%)", "cividis", max(100, left.max()))]
    if run.tau.size:
        largest = 1 if run.settings.has_budget else run.settings.tau_max
        maps.append((run.tau, "Thresholds", r"threshold $\tau$ of $\delta_{prune}$", "viridis", largest))
    figure = new_figure(10, 1 + 0.2 * n)
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, (values, title, label, colours, largest) in zip(axes, maps, strict=True):
        style = {"cmap": colours, "vmin": 0, "vmax": largest, "aspect": "auto", "interpolation": "nearest"}
        image = axis.imshow(values, extent=(first - 0.5, first + values.shape[1] - 0.5, n - 0.5, -0.5), **style)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(**WHOLE))
        figure.colorbar(image, ax=axis, label=label)
    axes[0].set_yticks(range(n), labels=run.widths)
    for i, (now, before) in enumerate(zip(run.filters[:, -1], widths, strict=True)):
        axes[0].text(1.01, i, f"{now} of {before}", va="center", fontsize=7, transform=axes[0].get_yaxis_transform())
    return figure


@torch.no_grad()
def draw_examples(run: Run, data_path: str | None, cache_path: str | None, device: torch.device) -> Figure:
    """The best, median and worst subject of the newest validation, as the newest model segments them now.

    Raises InputError where there is no validation, data or model.
    """
    ranked = sorted((m, subject) for subject, dice in run.scores.items() if (m := mean_foreground(dice)) is not None)
    if not ranked:
        raise InputError("no subject was validated")
    chosen = {}
    for rank, i in (("best", -1), ("median", len(ranked) // 2), ("worst", 0)):
        chosen.setdefault(ranked[i], rank)
    data = run.data(data_path, cache_path, write=False)
    ids = data.ids["validation"]
    if missing := [subject for _, subject in chosen if subject not in ids]:
        raise InputError(f"{missing[0]} is not among the data any more")
    volumes = data.get("validation")
    model = load_model(run.newest_model, device)

    n_classes = len(run.classes)
    figure = new_figure(8.4, 2.75 * len(chosen) + 0.3)
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for row, ((mean, subject), rank) in zip(axes, chosen.items(), strict=True):
        image, truth, k, place = cut_patch(volumes[ids.index(subject)], data.patch_size, None)
        predicted = model(image.to(device))[0][0].argmax(0).cpu()
        background, truth, predicted = (picture(m, place, len(truth)) for m in (image[0, 0], truth, predicted))
        low, high = np.percentile(background, WINDOW)
        row[0].imshow(background, cmap="gray", vmin=low, vmax=high)
        draw_maps(row[1:], background, truth, predicted, n_classes)
        row[0].set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{rank}: Dice {mean:.3f}\n{subject}\nslice {k}")
    for axis, title in zip(axes[0], ("image", "truth", "prediction, truth in outline"), strict=True):
        axis.set_title(title)
    return add_classes(figure, run.classes)


def draw_maps(
    axes: Sequence[Axes], background: np.ndarray, truth: np.ndarray, predicted: np.ndarray, n_classes: int, **how: float
) -> None:
    """The truth, and beside it the prediction with the truth in outline, over a grey image; all (rows, columns). What
    the truth ignores is white. `how` is for imshow."""
    low, high = np.percentile(background, WINDOW)
    colours = ListedColormap([*class_colours(n_classes), "white"])
    for axis, labels in zip(axes, (truth, predicted), strict=True):
        axis.imshow(background, cmap="gray", vmin=low, vmax=high, **how)
        masked = np.ma.masked_equal(labels, 0)
        axis.imshow(masked, colours, vmin=1, vmax=n_classes, alpha=0.6, interpolation="nearest", **how)
        axis.set(xticks=[], yticks=[])
    for label in np.unique(truth[(truth > 0) & (truth < n_classes)]):
        axes[1].contour(truth == label, levels=[0.5], colors="white", linewidths=1)


def add_classes(figure: Figure, classes: Sequence[str]) -> Figure:
    """The colours of the classes, below the axes."""
    handles = [Patch(color=c, label=name) for c, name in zip(class_colours(len(classes)), classes[1:], strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
    return figure


def draw_validation(run: Run, data_path: str | None) -> Figure:
    """The worst cases of the whole validation volumes and the median one, after the post-processing.

    Raises InputError where there is no validation, or a file of it is gone.
    """
    ranked = worst_first(run.validation["after"]["subjects"]) if run.validation else []
    if not ranked:
        raise InputError("no case has a Dice")
    median, dataset, n_classes = len(ranked) // 2, run.settings.dataset, len(run.classes)
    chosen = sorted({*range(min(N_WORST, len(ranked))), median})
    files = {file.id: file for file in run.data(data_path, write=False).files("validation")}
    if missing := [ranked[i][0] for i in chosen if ranked[i][0] not in files]:
        raise InputError(f"{missing[0]} is not among the data any more")
    n_rows = ceil(len(chosen) / 2)
    n_columns = 4 if len(chosen) > 1 else 2
    figure = new_figure(2.5 * n_columns, 2.75 * n_rows + 0.5)
    axes = figure.subplots(n_rows, n_columns, squeeze=False).reshape(-1, 2)
    for pair, i in zip(axes, chosen, strict=False):
        (subject, mean), file = ranked[i], files[ranked[i][0]]
        image = images.read_channels_of(file.images[0])[0]
        path = run.folder / "validation" / f"{subject}{dataset.file_ending}"
        predicted = aligned(images.read_label(path, n_classes, values=dataset.values), image)
        truth = images.read_label(file.label, n_classes, dataset.merged_labels, dataset.values, dataset.ignore)
        truth = aligned(truth, image, dataset.preprocessing.by_index)
        predicted = replace(predicted, array=postprocessing.apply(predicted.array, run.validation["steps"]))
        k, aspect, planes = largest_slice(image, truth, predicted, n_classes)
        draw_maps(pair, *planes, n_classes, aspect=aspect)
        place = f"{i + 1} of {len(ranked)}" + ", median" * (i == median)
        name = subject if len(subject) < 26 else f"{subject[:10]} ... {subject[-10:]}"
        pair[0].set_title(f"{name}\nDice {mean:.3f} ({place})", loc="left", parse_math=False)
        pair[1].set_title(f"prediction\nslice {k}", loc="left", fontweight="normal")
    for axis in axes[len(chosen) :].flat:
        axis.set_axis_off()
    return add_classes(figure, run.classes)


def largest_slice(
    image: Volume, truth: Volume, predicted: Volume, n_classes: int
) -> tuple[int, float, tuple[np.ndarray, ...]]:
    """The slice through the largest area of the truth (or of the prediction, where there is no truth): its number, the
    height of its pixels in widths, and the image, truth and prediction there as rows of pixels.

    All volumes are on one grid. Slices go along its axis of the largest voxels. Right is the patient's left, and down
    is posterior, or inferior. The picture shows what was found and half as much around it.
    """
    spacing_mm = image.geometry.spacing_mm
    axis = max(range(3), key=lambda a: (spacing_mm[a], a))
    others = tuple(a for a in range(3) if a != axis)
    areas = [((v.array > 0) & (v.array < n_classes)).sum(others) for v in (truth, predicted)]
    k = int((areas[0] if areas[0].any() else areas[1]).argmax())
    where = axes_of(image.geometry, "LPS").index(axis)
    planes = []
    for volume in (image, truth, predicted):
        array = volume.array.take([k], axis)
        turned = oriented(replace(volume, array=array, geometry=image.geometry._replace(shape=array.shape)), "LPS")
        plane = turned.array.take(0, where).T
        planes.append(plane if where == 2 else plane[::-1])
    shown = (planes[1] > 0) | (planes[2] > 0)
    box = tuple(_with_margin(np.flatnonzero(shown.any(1 - a)), shown.shape[a]) for a in (0, 1))
    columns, rows = (mm for a, mm in enumerate(turned.geometry.spacing_mm) if a != where)
    return k, rows / columns, tuple(plane[box] for plane in planes)


def _with_margin(found: np.ndarray, size: int) -> slice:
    """From the first to the last of these indices, half as many around them, and 32 at least; all where there is
    none."""
    if not len(found):
        return slice(0, size)
    first, last = found[[0, -1]]
    margin = max((last - first + 1) // 2, (32 - (last - first)) // 2)
    return slice(max(0, first - margin), last + 1 + margin)

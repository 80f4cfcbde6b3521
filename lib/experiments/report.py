"""A run on one page: `python -m lib.experiments.report RUN` writes RUN/report.html and RUN/figures/*.png.

The page holds its figures itself and needs no network. train.py writes it at the end; called by hand it also shows a
training that was interrupted or is still running.
"""

import base64
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lib.build import build_dataset
from lib.data.loading import Loader
from lib.experiments.feature_maps import cut_patch, newest_model, picture
from lib.experiments.figures import COLOURS, STYLE, new_figure, save_figure
from lib.experiments.run import Run, mean_foreground, read_run
from lib.models import load_model
from lib.settings import Settings
from lib.system.cli import Parser, flops_of, run_script
from lib.system.device import find_device
from lib.system.error import InputError
from lib.system.files import write_text

LINES = ("-", "--", ":")
WHOLE = {"integer": True, "steps": (1, 2, 5, 10), "min_n_ticks": 1, "nbins": 6}  # ticks of epochs
SMALL, DPI = (4.9, 3.3), 150  # inches of a figure that has another one beside it
HTML = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ccc; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem; }}
figure {{ margin: 0 0 1rem; }}
img {{ width: 100%; }}
figcaption {{ color: #444; font-size: .9rem; }}
th, td {{ text-align: left; vertical-align: top; padding: 0 1.5rem .2rem 0; overflow-wrap: anywhere; }}
th {{ font-weight: normal; color: #444; min-width: 8rem; }}
.settings {{ columns: 26rem; font-size: .9rem; }}
pre {{ background: #f3f3f3; padding: .7rem 1rem; white-space: pre-wrap; overflow-x: auto; font-size: .85rem; }}
pre span {{ white-space: nowrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def command(settings: Settings) -> str:
    """The command line that trains with these settings, each of them spelled out."""
    return shlex.join(["python", "train.py", *settings.flags(settings.as_dict())])


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
    figure, axis = new_axes(title, ylabel)
    for k, (label, values) in enumerate(curves.items()):
        known = [(epoch, v) for epoch, v in zip(run.history["epoch"], values, strict=True) if v is not None]
        if known:
            marker = "o" if len(known) < 30 else None
            style = {"color": COLOURS[k], "linestyle": LINES[k % len(LINES)], "marker": marker, "markersize": 3}
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
    figure = draw_curves(run, "Size of the network", "left of the unpruned network (%)", curves, 105)
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
    maps = [(left, "Filters left", "of the unpruned block (%)", "cividis", 100)]
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


def find_data(settings: Settings, data_path: str | None, cache_path: str | None) -> Loader:
    """The data set of a run, with its split. Raises InputError if it is not there any more."""
    data_path = data_path or settings.data_path
    places = settings.dataset.folders(data_path)
    if not any(map(Path.is_dir, places)):  # asked here because some data sets would write themselves
        raise InputError(f"the data are not in {places[0]} any more; name their folder with --data_path")
    return build_dataset(replace(settings, data_path=data_path, cache_path=cache_path or settings.cache_path))


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
    data = find_data(run.settings, data_path, cache_path)
    ids = data.ids["validation"]
    if missing := [subject for _, subject in chosen if subject not in ids]:
        raise InputError(f"{missing[0]} is not among the data any more")
    volumes = data.get("validation")
    model = load_model(newest_model(run.folder), device)

    n_classes = len(run.classes)
    figure = new_figure(8.4, 2.75 * len(chosen) + 0.3)
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for row, ((mean, subject), rank) in zip(axes, chosen.items(), strict=True):
        image, truth, k, place = cut_patch(volumes[ids.index(subject)], data.patch_size, None)
        predicted = model(image.to(device))[0][0].argmax(0).cpu()
        background, truth, predicted = (picture(m, place, len(truth)) for m in (image[0, 0], truth, predicted))
        low, high = np.percentile(background, (0.5, 99.5))
        for axis, labels in zip(row, (None, truth, predicted), strict=True):
            axis.imshow(background, cmap="gray", vmin=low, vmax=high)
            axis.set(xticks=[], yticks=[])
            if labels is not None:
                masked, colours = np.ma.masked_equal(labels, 0), ListedColormap(COLOURS[: n_classes - 1])
                axis.imshow(masked, colours, vmin=1, vmax=n_classes - 1, alpha=0.6, interpolation="nearest")
        for label in np.unique(truth)[1:]:
            row[2].contour(truth == label, levels=[0.5], colors="white", linewidths=1)
        row[0].set_ylabel(f"{rank}: Dice {mean:.3f}\n{subject}\nslice {k}")
    for axis, title in zip(axes[0], ("image", "truth", "prediction, truth in outline"), strict=True):
        axis.set_title(title)
    handles = [Patch(color=COLOURS[k], label=name) for k, name in enumerate(run.classes[1:])]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def overview(run: Run) -> dict[str, str]:
    """What the run has come to."""
    settings, history, epoch = run.settings, run.history, run.history["epoch"][-1]
    finished = epoch >= settings.epochs
    patch = " x ".join(map(str, settings.patch_size))
    rows = {
        "state": f"{'finished' if finished else 'not finished'}: epoch {epoch} of {settings.epochs}",
        "network": f"{settings.model} on {settings.data}, patches of {patch} voxels",
    }
    validated = [
        (mean, e, dice)
        for e, dice in zip(history["epoch"], history["val_dice"], strict=True)
        if (mean := mean_foreground(dice)) is not None
    ]
    if validated:
        best = [scores for scores in validated if scores[1] == run.best]
        scores = {"newest Dice": validated[-1]} | ({"Dice of model-best": best[0]} if best else {})
        for name, (mean, e, dice) in scores.items():
            known = [f"{c} {d:.3f}" for c, d in zip(run.classes[1:], dice[1:], strict=True) if d is not None]
            rows[name] = f"{mean:.3f} on average in epoch {e} ({', '.join(known)})"
    for key, before in run.unpruned.items():
        now = history[key][-1]
        rows["FLOPs for one patch" if key == "flops" else key] = f"{before:,} → {now:,} ({100 * now / before:.1f}%)"
    if settings.has_budget:
        limits = [settings.max_flops + " of the FLOPs" * settings.max_flops.endswith("%")]
        limits = limits if settings.max_flops != "none" else []
        limits += [f"{settings.max_ms:g} ms per patch"] if settings.max_ms else []
        rows["budget"] = ", ".join(limits) + (f": met after epoch {run.met}" if run.met is not None else ": not met")
    known = [value for value in history["seconds"] if value is not None]
    seconds = round(sum(known))
    rows["time"] = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} h for training and validation"
    rows["time"] += f", {median(known):.1f} s for the median epoch"
    if len(known) < len(history["seconds"]):
        rows["time"] += f" (known of {len(known)} of {len(history['seconds'])} epochs)"
    return rows | {"machine": run.facts.get("machine", "unknown")}


def table(rows: dict[str, object]) -> str:
    """Names and values, escaped; a list as its words."""
    values = {key: " ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in rows.items()}
    cells = (f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(cells)}</table>"


def subject_table(run: Run) -> str:
    """The Dice of every subject of the newest validation, best first; to be unfolded. Empty without a validation."""
    if not run.scores:
        return ""
    means = {subject: mean_foreground(dice) for subject, dice in run.scores.items()}
    ranked = sorted(means, key=lambda subject: -1 if means[subject] is None else means[subject], reverse=True)
    rows = [["", *run.classes[1:], "mean"]]
    for subject in ranked:
        values = [*run.scores[subject][1:], means[subject]]
        rows.append([subject, *("-" if value is None else f"{value:.3f}" for value in values)])
    cells = (f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(v)}</td>" for v in values) for name, *values in rows)
    title = f"Dice of every validation subject in epoch {run.scores_epoch}, best first"
    return f"<details><summary>{title}</summary><table><tr>{'</tr><tr>'.join(cells)}</tr></table></details>"


def shell(*lines: str) -> str:
    """Command lines, escaped, and broken only between words."""
    return "<pre>" + "\n".join(re.sub(r"\S+", r"<span>\g<0></span>", escape(line)) for line in lines) + "</pre>"


def page(run: Run, figures: dict[str, str], lacks: list[str]) -> str:
    """The page, from its figures as HTML by name, and sentences on what is missing."""
    settings, facts = run.settings, run.facts
    wide = [html for name, html in figures.items() if name in ("filters", "examples")]
    small = [html for html in figures.values() if html not in wide]
    typed = [facts.get("command", "unknown")]
    typed += [f"{c['command']}  # after epoch {c['after_epoch']}" for c in facts.get("continued", [])]
    go_on = shlex.join(["python", "train.py", "--resume", str(run.folder)])
    values = {key.rstrip("_"): value for key, value in settings.as_dict().items()}
    values |= {"git revision": facts.get("git_revision") or "unknown"} | facts.get("versions", {})
    body = [
        table(overview(run)),
        "<h2>Training</h2>",
        f'<div class="figures">{"".join(small)}</div>',
        *wide,
        subject_table(run),
        *(f"<p>{escape(text)}</p>" for text in lacks),
        "<h2>Repeat it</h2>",
        f"<p>With every setting spelled out:</p>{shell(command(settings))}",
        f"<p>As it was typed:</p>{shell(*typed)}",
        *([f"<p>To continue it:</p>{shell(go_on)}"] if run.history["epoch"][-1] < settings.epochs else []),
        "<h2>Settings</h2>",
        f'<div class="settings">{table(values)}</div>',
    ]
    title = f"{settings.exp_name} / {settings.data} / {run.folder.resolve().name}"
    html = HTML.format(title=escape(title), body="\n".join(body))
    return html.encode("ascii", "xmlcharrefreplace").decode()  # readable whatever the encoding of files is here


def report(folder: Path, data_path: str | None = None, cache_path: str | None = None, device: str = "auto") -> Path:
    """Write report.html and figures/*.png of a run folder; return the page. The paths are the run's own by default.

    Raises InputError if the run has no finished epoch, a file of it is broken, or it cannot be written to.
    """
    run, lacks, html = read_run(folder), [], {}
    device = find_device(device)
    loss = run.settings.loss
    if loss.endswith("_Distance"):
        loss += f" (lambda = {run.settings.lambda_:g}" + (f", 0 after epoch {run.met})" if run.met else ")")
    figures: dict[str, tuple[Callable[[Run], Figure], str]] = {
        "loss": (draw_loss, f"{loss}: summed over the heads, mean over the patches."),
        "dice": (draw_dice, "Each class, and their mean, over the validation subjects; before the epoch's pruning."),
        "size": (draw_size, "After the pruning of the epoch; FLOPs for one patch."),
        "time": (draw_time, "Each epoch by the size of the network that it trained."),
        "filters": (draw_filters, "Rows are the blocks in the order of the forward pass, heads left out."),
        "examples": (
            partial(draw_examples, data_path=data_path, cache_path=cache_path, device=device),
            "The slice with most foreground, counted from 0. The Dice is that of the whole volume in the validation of "
            f"epoch {run.scores_epoch}, the prediction that of the newest model, after all pruning.",
        ),
    }
    try:
        (folder / "figures").mkdir(exist_ok=True)
        for name, (draw, caption) in figures.items():
            path = folder / "figures" / f"{name}.png"
            path.unlink(missing_ok=True)
            try:
                with matplotlib.rc_context(STYLE):
                    save_figure(draw(run), path, DPI)
            except (InputError, OSError, RuntimeError) as error:  # the data may be gone, the device full
                lacks.append(f"Not drawn: {name}, because {error}.")
                continue
            content = base64.b64encode(path.read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{content}" alt="{name}">'
            html[name] = f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
        write_text(folder / "report.html", page(run, html, lacks))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read or written ({error.strerror})") from error
    return folder / "report.html"


def report_training(folder: Path, device: torch.device, log: Callable[[str], None]) -> None:
    """The report of a training that has just ended: whatever goes wrong is one line in its log."""
    try:
        log(f"report: {report(folder, device=str(device))}")
    except Exception as error:
        log(f"no report: {type(error).__name__}: {' '.join(str(error).split())}")


def main(argv: list[str] | None = None) -> int:
    """Report what `argv` names; returns the exit code: 0, or 2 after one line about bad input."""
    parser = Parser(
        "python -m lib.experiments.report", description="A run on one page: RUN/report.html and RUN/figures/*.png."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run folder, of a training that is finished, interrupted or running")
    add("--data_path", help="folder of the data set, for the examples (default: that of the training)")
    add("--cache_path", help="folder for preprocessed volumes (default: that of the training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps, for the examples (default: auto)")

    def run() -> None:
        args = parser.parse_args(argv)
        print(f"written: {report(args.run, args.data_path, args.cache_path, args.device)}")

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

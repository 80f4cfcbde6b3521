"""A run on one page: `python -m lib.experiments.report RUN` writes RUN/report.html and RUN/figures/*.png.

The page holds its figures itself and needs no network. train.py writes it at the end; called by hand it also shows a
training that was interrupted or is still running.
"""

import base64
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from statistics import median

import matplotlib
import torch
from matplotlib.figure import Figure

from lib.evaluation import mean_foreground
from lib.experiments.figures import STYLE, save_figure
from lib.experiments.report_figures import (
    DPI,
    N_WORST,
    draw_dice,
    draw_examples,
    draw_filters,
    draw_loss,
    draw_size,
    draw_time,
    draw_validation,
)
from lib.experiments.run import Run, read_run
from lib.settings import Settings
from lib.system.cli import Parser, run_script
from lib.system.device import find_device
from lib.system.error import InputError
from lib.system.files import write_text
from lib.validation import COLUMNS, worst_first

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
    title = f"Dice of every validation subject in epoch {run.scores_epoch}, best first"
    return f"<details><summary>{title}</summary>{grid(rows)}</details>"


def grid(rows: list[list[str]]) -> str:
    """A table whose rows begin with a name, escaped."""
    cells = (f"<th>{escape(name)}</th>" + "".join(f"<td>{escape(v)}</td>" for v in values) for name, *values in rows)
    return f"<table><tr>{'</tr><tr>'.join(cells)}</tr></table>"


def validation_section(run: Run, figure: str) -> list[str]:
    """What the whole validation volumes say: averages by class, before and after the post-processing, and every case,
    worst first. Nothing where there is no validation.json."""
    found = run.validation
    if not found:
        return []
    averages, subjects = [found[when]["average"] for when in ("before", "after")], found["after"]["subjects"]
    rows = [["", *(f"{name} ({unit.strip()})" if unit else name for name, _, unit in COLUMNS.values())]]
    for k, name in enumerate(run.classes[1:], start=1):
        rows.append([name, *(changed([average[m][k] for average in averages], m) for m in COLUMNS)])
    if len(run.classes) > 2:
        rows.append(["mean", *(changed([mean_foreground(average[m]) for average in averages], m) for m in COLUMNS)])
    cases = [["", *(f"Dice {name}" for name in run.classes[1:]), *(f"mean {name}" for name, *_ in COLUMNS.values())]]
    ranked = [subject for subject, _ in worst_first(subjects)]
    for subject in [*ranked, *(subject for subject in subjects if subject not in ranked)]:
        values = [(value, "dice") for value in subjects[subject]["dice"][1:]]
        values += [(mean_foreground(subjects[subject][m]), m) for m in COLUMNS]
        cases.append([subject, *(changed([value], m) for value, m in values)])
    after = ", after the post-processing" if found["steps"] else ""
    unfolded = " open" * (len(subjects) <= 20)
    return [
        "<h2>Validation</h2>",
        f"<p>{escape(found['model'])} on {len(subjects)} whole volumes of the validation set, as predict.py predicts "
        "and evaluate.py compares them" + (", before → after the post-processing" if after else "") + ".</p>",
        grid(rows),
        *(f"<p>Post-processing: {escape(reason['why'])}.</p>" for reason in found["reasons"] if reason["kept"]),
        f"<details{unfolded}><summary>Every case{after}, worst first</summary>{grid(cases)}</details>",
        figure,
    ]


def changed(values: list[float | None], metric: str) -> str:
    """A value, or two that differ in what is shown of them: "0.800 → 0.900"."""
    digits = 2 if metric == "HD95" else 3
    shown = dict.fromkeys("-" if value is None else f"{value:.{digits}f}" for value in values)
    return " → ".join(shown)


def shell(*lines: str) -> str:
    """Command lines, escaped, and broken only between words."""
    return "<pre>" + "\n".join(re.sub(r"\S+", r"<span>\g<0></span>", escape(line)) for line in lines) + "</pre>"


def page(run: Run, figures: dict[str, str], lacks: list[str]) -> str:
    """The page, from its figures as HTML by name, and sentences on what is missing."""
    settings, facts = run.settings, run.facts
    wide = [html for name, html in figures.items() if name in ("filters", "examples")]
    small = [html for name, html in figures.items() if html not in wide and name != "validation"]
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
        *validation_section(run, figures.get("validation", "")),
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
        loss += f" (lambda = {run.settings.lambda_:g}" + (f", 0 after epoch {run.over})" if run.over else ")")
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
    if run.validation:
        figures["validation"] = (
            partial(draw_validation, data_path=data_path),
            f"The {N_WORST} worst cases and the median one: in the slice with most of the truth (counted from 0 in the "
            "file) the truth, and the prediction with the truth in outline. The patient's left is on the right; the "
            "Dice is that of the whole volume.",
        )
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

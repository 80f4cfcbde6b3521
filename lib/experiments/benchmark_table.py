"""The statistics of the benchmark, its table as Markdown and JSON, and its figure. Patients are what is compared."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from scipy.stats import wilcoxon

from lib.data.BaseDataset import BaseDataset
from lib.evaluation import RESERVED
from lib.experiments.benchmark_rows import NOTES, REFERENCE, ROWS, kind_of
from lib.experiments.figures import COLOURS, STYLE, new_figure, save_figure
from lib.experiments.intervals import format_difference, mean_difference
from lib.system.files import write_json, write_text

INFERENCE_NOTE = (
    "Inference was timed on {place}: the network on a preprocessed volume, {mirrored}, median over {n_timed} images, "
    "all rows one after another in one process."
)
PATCH_NOTE = (
    "ms: a forward pass of one patch, median of several; all networks took turns, with the same threads: in torch on "
    "{place}{openvino}."
)
MS = {"torch_ms": "torch, ms", "openvino_ms": "OpenVINO, ms"}  # columns of what was measured
OTHER_PLACES = "The rows were trained on different devices, or in different precision: their times cannot be compared."


def spread(values) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that exist; null where there are too few."""
    known = [value for value in values if value is not None]
    return {"mean": fmean(known) if known else None, "sd": stdev(known) if len(known) > 1 else None}


def subject_dice(results: list[dict]) -> dict[str, float | None]:
    """{subject: mean Dice over the foreground classes that have one, averaged over the results, by seed, that have the
    subject}: with folds, each seed has its own."""
    subjects = dict.fromkeys(subject for seed in results for subject in seed if subject not in RESERVED)
    means = {s: [spread(seed[s]["dice"][1:])["mean"] for seed in results if s in seed] for s in subjects}
    return {subject: spread(values)["mean"] for subject, values in means.items()}


def patient_dice(results: list[dict], patient_of: Callable) -> dict[int | str, float]:
    """{patient: mean Dice of its images, as `subject_dice`}; `patient_of` tells the patient of a subject."""
    patients: dict[int | str, list[float]] = {}
    for subject, dice in subject_dice(results).items():
        if dice is not None:
            patients.setdefault(patient_of(subject), []).append(dice)
    return {patient: fmean(values) for patient, values in patients.items()}


def paired_differences(results: dict[int, dict], reference: dict[int, dict], patient_of: Callable) -> list[float]:
    """By how much the Dice of each patient is larger in `results`: both are by seed, and their common seeds count."""
    seeds = [seed for seed in results if seed in reference]
    if not seeds:
        return []
    ours, theirs = (patient_dice([side[seed] for seed in seeds], patient_of) for side in (results, reference))
    return [ours[patient] - theirs[patient] for patient in ours if patient in theirs]


def wilcoxon_p(differences: list[float]) -> float | None:
    """p of the two-sided signed-rank test; None if there is no difference."""
    return float(wilcoxon(differences).pvalue) if any(differences) else None


def make_row(
    title: str, results: dict[int, dict], sizes: list[dict], reference: dict[int, dict], dataset: BaseDataset
) -> dict:
    """One row of the table, JSON-able: the `results` of evaluate.py by seed, and in the order of the seeds `sizes`
    (parameters, flops, ...); `reference` holds the results, by seed, that the row is compared with."""
    row: dict = {"row": title, "seeds": list(results)}
    row["by_seed"] = {key: [seed[key] for seed in sizes] for key in sizes[0]}
    row |= {key: spread(values) for key, values in row["by_seed"].items()}
    for metric in ("dice", "HD95"):
        averages = row["by_seed"][metric] = [seed["average"][metric][1:] for seed in results.values()]
        by_class = zip(dataset.class_names[1:], zip(*averages, strict=True), strict=True)
        row[metric] = {name: spread(values) for name, values in by_class}
        row[metric]["mean foreground"] = spread(spread(values)["mean"] for values in averages)
    differences = paired_differences(results, reference, dataset.case_of)
    return row | {"wilcoxon_p": wilcoxon_p(differences), "difference": mean_difference(differences)}


def format_table(rows: list[dict], reference: dict) -> str:
    """The Markdown table of `make_row`'s rows; percentages refer to `reference`, one of them."""

    def cell(value: dict, digits: int, unit: float = 1) -> str:
        numbers = [f"{value[key] / unit:.{digits}f}" for key in ("mean", "sd") if value[key] is not None]
        return " ± ".join(numbers) or "-"

    def share(row: dict, key: str, unit: float) -> str:
        return f"{cell(row[key], 3, unit)} ({row[key]['mean'] / reference[key]['mean']:.0%})"

    names, runtimes = list(rows[0]["dice"]), [key for key in MS if key in rows[0]]
    head = ["", *(f"Dice {name}" for name in names), *(f"HD95 {name}, mm" for name in names), "parameters, M"]
    lines = [[*head, "FLOPs, G", *map(MS.get, runtimes), "file, MB", "training, min", "inference, s per volume"]]
    lines[0] += ["Wilcoxon p", "Dice difference"]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        line = [row["row"], *(cell(row["dice"][name], 3) for name in names)]
        line += [cell(row["HD95"][name], 2) for name in names]
        line += [share(row, "parameters", 1e6), share(row, "flops", 1e9), *(share(row, key, 1) for key in runtimes)]
        line += [cell(row["bytes"], 2, 1e6)]
        line += [cell(row["training_seconds"], 1, 60), cell(row["inference_seconds"], 3)]
        p = row["wilcoxon_p"]
        line += ["-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}", format_difference(row["difference"])]
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_notes(rows: dict[str, dict], about: dict) -> list[str]:
    """What stands below the table: how each row was made, and where; `about` fills the notes' gaps."""
    about = about | {"reference": rows[REFERENCE]["row"]}
    notes = [note.format(**about) for kind, note in NOTES.items() if kind in ("", *map(kind_of, rows))]
    places: dict[str, list[str]] = {}
    for row in rows.values():
        for seed, trained in zip(row["seeds"], row["trained_on"], strict=True):
            places.setdefault(trained, []).append(f"{row['row']}, seed {seed}")
    if len(places) > 1:
        notes.append(OTHER_PLACES)
        notes += [f"Trained on {trained}: {'; '.join(titles)}." for trained, titles in places.items()]
    else:
        notes += [f"Trained on {trained}." for trained in places]
    notes.append(INFERENCE_NOTE.format(**about))
    measured = [key for key in MS if key in rows[REFERENCE]]
    openvino = ", in OpenVINO on its CPU" if "openvino_ms" in measured else ""
    notes += [PATCH_NOTE.format(openvino=openvino, **about)] if measured else []
    for row in rows.values():
        if found := row.get("sauron_minus_this"):
            notes.append(f"Sauron minus {row['row']}: {format_difference(found)}, {found['n']} patients")
    return notes


def draw(rows: dict[str, dict], path: Path) -> None:
    """The mean foreground Dice against the share of the FLOPs that is left: a large mark for each row, small ones for
    its seeds, a line through the rows of one kind, and a dashed one at the reference."""
    reference, others = rows[REFERENCE], [kind for kind in ROWS if kind != REFERENCE]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 4)
        axes = figure.add_subplot()
        level = reference["dice"]["mean foreground"]["mean"]
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label=ROWS[REFERENCE].label)
        axes.axhspan(level - 0.01, level, color="black", alpha=0.08, linewidth=0, label="0.01 below it")
        for kind, colour, marker in zip(others, COLOURS, "o^vsDP", strict=True):
            points, name = [], ROWS[kind].label
            for row in (row for key, row in rows.items() if kind_of(key) == kind):
                share = 100 * row["flops"]["mean"] / reference["flops"]["mean"]
                points.append((share, row["dice"]["mean foreground"]["mean"]))
                seeds = [fmean(dice) for dice in row["by_seed"]["dice"] if None not in dice]
                axes.plot([share] * len(seeds), seeds, marker, color=colour, markersize=3, alpha=0.6)
            if points:
                axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=colour, markersize=8, label=name)
        axes.set(xlabel="FLOPs left, %", ylabel="mean foreground Dice", title="Dice against FLOPs", xlim=(0, 100))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save_figure(figure, path, dpi=150)


def write_table(output: Path, rows: dict[str, dict], about: dict, facts: dict) -> None:
    """table.md, table.json (`facts` and the rows) and dice_flops.png."""
    write_json(output / "table.json", facts | {"rows": list(rows.values())})
    wrapped = {"width": 120, "initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
    notes = [textwrap.fill(note.strip(), **wrapped) for note in format_notes(rows, about)]
    text = f"{format_table(list(rows.values()), rows[REFERENCE])}\n" + "".join(f"{note}\n" for note in notes)
    write_text(output / "table.md", text)
    draw(rows, output / "dice_flops.png")
    print(f"{text}\nwritten: table.md, table.json and dice_flops.png in {output}")

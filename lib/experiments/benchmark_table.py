"""The statistics of the benchmark, and its table as Markdown and JSON. Patients are compared, seed by seed."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import wilcoxon

from lib.data.BaseDataset import BaseDataset
from lib.evaluation import RESERVED, mean_foreground
from lib.experiments.benchmark_rows import NOTES, REFERENCE, kind_of
from lib.experiments.intervals import (
    LEVEL,
    N_RESAMPLES,
    case_differences,
    case_means,
    format_difference,
    two_level,
)
from lib.experiments.kept import MS
from lib.system.files import write_json, write_text

INFERENCE_NOTE = (
    "Inference was timed on {place}: the network on a preprocessed volume, {mirrored}, median over {n_timed} images, "
    "all rows one after another in one process."
)
PATCH_NOTE = (
    "ms: a forward pass of one patch, median of several; all networks took turns, with the same threads: in torch on "
    "{place}{openvino}."
)
OTHER_PLACES = "The rows were trained on different devices, or in different precision: their times cannot be compared."


def spread(values) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that exist; null where there are too few."""
    known = [value for value in values if value is not None]
    return {"mean": fmean(known) if known else None, "sd": stdev(known) if len(known) > 1 else None}


def patient_dice(results: dict, patient_of: Callable) -> dict[int | str, float]:
    """{patient: mean over its images of the mean Dice over the foreground classes that have one}, of the results of one
    seed; `patient_of` tells the patient of an image."""
    images = {image: mean_foreground(found["dice"]) for image, found in results.items() if image not in RESERVED}
    return case_means(images, patient_of)


def paired_differences(
    results: dict[int, dict], reference: dict[int, dict], patient_of: Callable
) -> dict[int, dict[int | str, float]]:
    """{seed: {patient: by how much its Dice is larger in `results`}}: both are by seed, and their common seeds and
    patients count."""
    return {
        seed: case_differences(patient_dice(found, patient_of), patient_dice(reference[seed], patient_of))
        for seed, found in results.items()
        if seed in reference
    }


def over_seeds(by_seed: dict[int, dict[int | str, float]], folds: dict[int, str | None]) -> dict:
    """`two_level` of values by patient of each seed; `folds` has that of each seed, and maybe more."""
    return two_level([*by_seed.values()], [folds[seed] for seed in by_seed])


def patient_means(by_seed: dict[int, dict[int | str, float]]) -> list[float]:
    """Of each patient the mean over the seeds that have it."""
    patients = dict.fromkeys(patient for values in by_seed.values() for patient in values)
    return [fmean(values[patient] for values in by_seed.values() if patient in values) for patient in patients]


def wilcoxon_p(differences: list[float]) -> float | None:
    """p of the two-sided signed-rank test; None if there is no difference."""
    return float(wilcoxon(differences).pvalue) if any(differences) else None


def make_row(
    title: str,
    results: dict[int, dict],
    sizes: list[dict],
    reference: dict[int, dict],
    dataset: BaseDataset,
    folds: dict[int, str | None],
) -> dict:
    """One row of the table, JSON-able: the `results` of evaluate.py by seed, and in the order of the seeds `sizes`
    (parameters, flops, ...); `reference` holds the results, by seed, that the row is compared with, and `folds` what
    each seed was validated on: None or the same fold where all seeds have the same patients."""
    row: dict = {"row": title, "seeds": list(results)}
    row["by_seed"] = {key: [seed[key] for seed in sizes] for key in sizes[0]}
    row |= {key: spread(values) for key, values in row["by_seed"].items()}
    for metric in ("dice", "HD95"):
        averages = row["by_seed"][metric] = [seed["average"][metric][1:] for seed in results.values()]
        by_class = zip(dataset.class_names[1:], zip(*averages, strict=True), strict=True)
        row[metric] = {name: spread(values) for name, values in by_class}
        row[metric]["mean foreground"] = spread(spread(values)["mean"] for values in averages)
    by_patient = {seed: patient_dice(found, dataset.case_of) for seed, found in results.items()}
    row["dice_by_patient"] = over_seeds(by_patient, folds)
    row["dice_by_patient"]["by_training"] = [spread(values.values())["mean"] for values in by_patient.values()]
    differences = paired_differences(results, reference, dataset.case_of)
    return row | {"wilcoxon_p": wilcoxon_p(patient_means(differences)), "difference": over_seeds(differences, folds)}


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
        found = row["difference"]
        one_seed = " (one seed)" if found["n"] == 1 and found["low"] is not None else ""
        line += ["-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}", format_difference(found) + one_seed]
        lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_notes(rows: dict[str, dict], about: dict) -> list[str]:
    """What stands below the table: how each row was made, and where; `about` fills the notes' gaps."""
    about = about | {"reference": rows[REFERENCE]["row"], "level": LEVEL, "resamples": N_RESAMPLES}
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
    for key, row in rows.items():
        if key != REFERENCE and row["difference"]["n"] > 1:
            notes.append(f"{row['row']} minus {about['reference']}: {describe(row['difference'])}")
        if found := row.get("sauron_minus_this"):
            notes.append(f"Sauron minus {row['row']}: {describe(found)}")
    return notes


def describe(found: dict) -> str:
    """A difference of `two_level` in words; with several seeds, Student's interval over their means, too."""
    seeds = "one seed" if found["n"] == 1 else f"{found['n']} seeds"
    text = f"{format_difference(found)}, {found['cases']} patients, {seeds}"
    t = found["t"]
    if t["low"] is None:
        return text
    return f"{text}; Student's t over the seeds' means: [{t['low']:+.3f}, {t['high']:+.3f}]"


def write_table(output: Path, rows: dict[str, dict], about: dict, facts: dict) -> None:
    """table.md and table.json (`facts` and the rows)."""
    write_json(output / "table.json", facts | {"rows": list(rows.values())})
    wrapped = {"width": 120, "initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
    notes = [textwrap.fill(note.strip(), **wrapped) for note in format_notes(rows, about)]
    text = f"{format_table(list(rows.values()), rows[REFERENCE])}\n" + "".join(f"{note}\n" for note in notes)
    write_text(output / "table.md", text)
    print(f"{text}\nwritten: table.md and table.json in {output}")

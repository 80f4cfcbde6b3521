"""Kept trainings as one table, with what it compares and how.

Trainings are grouped by row and budget. A *training* is a pair of fold and seed, which pairs the rows: two are compared
where both have the same fold and seed, case by case (`case_of` of a built-in data set, so the two frames of an ACDC
patient are one case; else the subject). Whatever is averaged goes the same way: of a subject the mean over the
foreground classes that have a value, of a case the mean over its subjects, of a training the mean over its cases, of a
row the mean over its trainings. Where every value is there, that of a training is evaluate.py's average.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from lib.data import DATASETS
from lib.evaluation import mean_foreground
from lib.experiments.intervals import LEVEL, N_RESAMPLES, case_differences, case_means, format_difference, two_level
from lib.experiments.kept import MS, PEERS, ROWS, WITHOUT_BUDGET, Training, read_kept
from lib.system.cli import flops_of
from lib.system.error import InputError

NOTES = (
    "{data}, whole volumes of the validation sets, {when} post-processing; {subjects} subjects of {cases} cases.",
    "A training is a pair of fold and seed, and each weighs the same. Dice and HD95 (mm): means over its cases, then "
    "over trainings. In brackets: {level}% intervals of a two-level bootstrap ({resamples:,} resamples, percentiles): "
    "trainings are drawn with replacement, and so are the cases of each fold, the same for all its trainings.",
    "Differences are of the mean foreground Dice, paired: over the trainings of the same fold and seed, whose number "
    "stands behind them, case by case. Those resample likewise.",
    'Over few trainings such intervals are too narrow. "t" is Student\'s interval of the mean difference over '
    "trainings, which is wide where they are few.",
    "FLOPs (of one patch) and parameters: share of {reference}. Minutes are of all epochs with their validation.",
)
ONE = 'One training alone ("one seed"): the interval is over its cases, and does not say what another seed would give.'
PLACES = "Trained on different machines, or in different precision: their minutes cannot be compared. {places}."
MISSED = "The budget was not met: {files}."


def read_folders(folders: Sequence[Path]) -> list[Training]:
    """All kept trainings of the folders. Raises InputError where they are not of one table: of another data set, or
    classes, or patch; one fold with other subjects; the same training of a row twice."""
    paths = []
    for folder in folders:
        found = sorted(folder.glob("*.json"))
        if not found:
            raise InputError(f"{folder}: no JSON files there; make them with lib.experiments.results keep")
        paths += found
    trainings = [read_kept(path) for path in dict.fromkeys(path.resolve() for path in paths)]
    first = trainings[0]
    for training in trainings:
        for what in ("data", "classes", "patch_size"):
            ours, theirs = getattr(first, what), getattr(training, what)
            if ours != theirs and (what != "patch_size" or None not in (ours, theirs)):
                raise InputError(
                    f"{training.path}: {what.replace('_', ' ')} {theirs}, and {first.path} has {ours}; they are not of "
                    "one table, so give a folder for each"
                )
        if training.patch_size and not first.patch_size:
            first = training
    by_fold: dict[str | None, Training] = {}
    seen: dict[tuple, Training] = {}
    for training in trainings:
        other = by_fold.setdefault(training.fold, training)
        if training.scores["before"].keys() != other.scores["before"].keys():
            raise InputError(f"{training.path} and {other.path}: both are of fold {training.fold}, with other subjects")
        key = training.row, training.budget, *training.key
        if key in seen:
            what = f"{training.title}, fold {training.fold}, seed {training.seed}"
            raise InputError(f"{training.path} and {seen[key].path}: both are {what}; take one away")
        seen[key] = training
    return trainings


def grouped(trainings: Sequence[Training]) -> dict[tuple[str, str | None], list[Training]]:
    """The trainings of each row and budget, in the order of the table: larger budgets first."""
    groups: dict[tuple[str, str | None], list[Training]] = {}
    for training in sorted(trainings, key=_place):
        groups.setdefault((training.row, training.budget), []).append(training)
    return groups


def _place(training: Training) -> tuple:
    budget = training.budget or "none"
    share = 1e18 if budget == "none" else float(budget[:-3]) if budget.endswith(" ms") else flops_of(budget, 1.0)
    rows = list(ROWS)
    return training.row != rows[0], -share, rows.index(training.row), str(training.fold), training.seed


def make_results(trainings: Sequence[Training], when: str = "before") -> dict:
    """The numbers of the table, JSON-able: {"rows": ..., "sauron_minus": ..., and what they are of}.

    when: the scores "before" or "after" post-processing. Raises InputError where one has not been scored so.
    """
    for training in trainings:
        if when not in training.scores:
            raise InputError(f"{training.path}: has no scores {when} post-processing; leave --postprocessed out")
    data = trainings[0].data
    case_of = DATASETS[data].case_of if data in DATASETS else str
    groups = grouped(trainings)
    reference = groups.get(("unpruned", None), [])
    subjects = {subject for training in trainings for subject in training.scores[when]}
    rows = [_row(group, reference, case_of, when) for group in groups.values()]
    sauron_minus = []
    for (row, budget), ours in groups.items():
        peers = [key for key in groups if key[0] in PEERS and (key[1] == budget or key[0] in WITHOUT_BUDGET)]
        for key in peers if row == "sauron" else []:
            found = difference(ours, groups[key], case_of, when)
            sauron_minus.append({"budget": budget, "row": key[0], "title": groups[key][0].title} | found)
    about = {"data": data, "classes": list(trainings[0].classes), "when": when, "subjects": len(subjects)}
    about |= {"cases": len(set(map(case_of, subjects))), "resamples": N_RESAMPLES, "level": LEVEL}
    return about | {"rows": rows, "sauron_minus": sauron_minus}


def scores_of(training: Training, case_of: Callable, when: str, metric: str, k: int | None = None) -> dict:
    """The metric by case: of class k, or the mean of the classes that have a value."""
    found = {subject: values[metric] for subject, values in training.scores[when].items()}
    if k is None:
        return case_means({subject: mean_foreground([None, *values]) for subject, values in found.items()}, case_of)
    return case_means({subject: values[k] for subject, values in found.items()}, case_of)


def difference(ours: Sequence[Training], theirs: Sequence[Training], case_of: Callable, when: str) -> dict:
    """`two_level` of by how much the mean foreground Dice is larger in `ours`, over what both have trained: the same
    fold and seed, which stand in "pairs"."""
    others = {training.key: training for training in theirs}
    pairs = [(training, others[training.key]) for training in ours if training.key in others]
    values = [case_differences(*(scores_of(one, case_of, when, "dice") for one in pair)) for pair in pairs]
    folds = [training.fold for training, _ in pairs]
    return two_level(values, folds) | {"pairs": [list(training.key) for training, _ in pairs]}


def _row(group: list[Training], reference: list[Training], case_of: Callable, when: str) -> dict:
    first = group[0]
    row: dict = {"row": first.row, "budget": first.budget, "title": first.title}
    row["trainings"] = [
        {"fold": t.fold, "seed": t.seed, "file": t.path.name, "place": t.place, "budget_met": t.budget_met}
        for t in group
    ]
    names = {name: k for k, name in enumerate(first.classes)} | {"mean": None}
    for metric in ("dice", "HD95"):
        by_class = {}
        for name, k in names.items():
            values = [scores_of(training, case_of, when, metric, k) for training in group]
            by_class[name] = two_level(values, [training.fold for training in group])
            by_class[name]["by_training"] = [fmean(v.values()) if v else None for v in values]
        row[metric] = by_class
    for key in ("parameters", "flops"):
        row[key] = fmean(t.size[key][1] for t in group)
        whole = [t.size[key][1] for t in reference] or [t.size[key][0] for t in group if t.size[key][0]]
        row[f"{key}_share"] = row[key] / fmean(whole) if whole else None
    seconds = [t.seconds for t in group if t.seconds is not None]
    row["minutes"] = fmean(seconds) / 60 if seconds else None
    for key in MS:
        row[key] = fmean(t.ms[key] for t in group) if all(key in t.ms for t in group) else None
    is_reference = first.row == "unpruned"
    row["minus_unpruned"] = None if is_reference or not reference else difference(group, reference, case_of, when)
    return row


# --- Markdown ---------------------------------------------------------------------------------------------------------


def format_results(results: dict) -> str:
    """The table, Sauron's differences to its peers, and what there is to know about both, as Markdown."""
    rows, names = results["rows"], results["classes"]
    runtimes = [key for key in MS if any(row[key] is not None for row in rows)]
    head = ["", "trainings", *(f"Dice {name}" for name in names), "Dice mean", "HD95 mean, mm"]
    head += ["Dice minus unpruned", "t", "FLOPs", "parameters", "training, min", *map(MS.get, runtimes)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        n = len(row["trainings"])
        line = [row["title"], "one seed" if n == 1 else _seeds_and_folds(row["trainings"])]
        line += [_number(row["dice"][name]["mean"], 3) for name in names]
        line += [_level(row["dice"]["mean"]), _number(row["HD95"]["mean"]["mean"], 2)]
        line += _difference(row["minus_unpruned"])
        line += [_share(row[f"{key}_share"]) for key in ("flops", "parameters")]
        line += [_number(row["minutes"], 1), *(_number(row[key], 1) for key in runtimes)]
        lines.append(line)
    text = _table(lines)
    if results["sauron_minus"]:
        lines = [["Sauron minus", "Dice", "t"], ["---", "---:", "---:"]]
        for found in results["sauron_minus"]:
            at = f" (Sauron, {found['budget']})" if found["budget"] and found["row"] in WITHOUT_BUDGET else ""
            lines.append([found["title"] + at, *_difference(found)])
        text += "\n" + _table(lines)
    wrapped = {"width": 120, "initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
    return text + "\n" + "".join(textwrap.fill(note, **wrapped) + "\n" for note in _notes(results))


def _notes(results: dict) -> list[str]:
    rows = results["rows"]
    has_reference = any(row["row"] == "unpruned" for row in rows)
    reference = ROWS["unpruned"] if has_reference else "the network before pruning"
    notes = [note.format(reference=reference, **results) for note in NOTES]
    differences = [*(row["minus_unpruned"] for row in rows), *results["sauron_minus"]]
    if any(len(row["trainings"]) == 1 for row in rows) or any(found and found["n"] == 1 for found in differences):
        notes.append(ONE)
    trained = [(row, training) for row in rows for training in row["trainings"]]
    places: dict[str, list[str]] = {}
    for row, training in trained:
        if training["place"]:
            places.setdefault(training["place"], []).append(row["title"])
    if len(places) > 1:
        listed = (f"{place}: {', '.join(dict.fromkeys(titles))}" for place, titles in places.items())
        notes.append(PLACES.format(places=". ".join(listed)))
    elif places:
        notes.append(f"Trained on {next(iter(places))}.")
    if missed := [training["file"] for _, training in trained if training["budget_met"] is False]:
        notes.append(MISSED.format(files=", ".join(missed)))
    return notes


def _seeds_and_folds(trainings: list[dict]) -> str:
    """Such as "6 (3 seeds, 2 folds)"."""
    counts = {key: len({training[key] for training in trainings}) for key in ("seed", "fold")}
    parts = [f"{n} {key}{'s' * (n > 1)}" for key, n in counts.items()]
    return f"{len(trainings)} ({', '.join(parts)})"


def _difference(found: dict | None) -> list[str]:
    """Two cells: the difference with its interval and the number of pairs, and the t-interval."""
    if found is None or found["mean"] is None:
        return ["-", "-"]
    n = "one seed" if found["n"] == 1 else f"{found['n']}"
    t = found["t"]
    return [f"{format_difference(found, 4)} ({n})", "-" if t["low"] is None else f"[{t['low']:+.4f}, {t['high']:+.4f}]"]


def _level(found: dict) -> str:
    if found["low"] is None:
        return _number(found["mean"], 3)
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

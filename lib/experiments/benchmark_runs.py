"""What a reader needs to compute the benchmark's intervals again, runs.json, and the figures of its trainings."""

from pathlib import Path

from lib.data.BaseDataset import BaseDataset
from lib.evaluation import RESERVED
from lib.experiments import dice_figures
from lib.experiments.benchmark_plan import FREE, Task, read_json
from lib.experiments.benchmark_rows import REFERENCE, ROWS, SAURON, WITHOUT_BUDGET, kind_of, row_of
from lib.experiments.dice_figures import Mark, validation_curve
from lib.experiments.figures import COLOURS
from lib.experiments.kept import OF_A_MACHINE, format_kept, joined, last_part, rounded
from lib.experiments.run import Run
from lib.system.files import write_text

ORDER = (REFERENCE, SAURON, "nnunet-widths", "nnunet-flat", "sauron-random", "nnunet-pruned", WITHOUT_BUDGET)
LOOKS = dict(zip(ORDER, zip(("#000000", *COLOURS), "so^DvPX", strict=True), strict=True))  # colour, marker
HISTORY = ("epoch", "lr", "train_loss", "val_loss", "val_dice", "flops")
DIGITS = 5


def make_runs(output: Path, rows: dict[str, dict]) -> list[dict]:
    """What is kept of each training of the table's `rows` (by key), JSON-able, without paths of the machine. "settings"
    are those in which the trainings differ, beside seed and fold. Scores, and val_dice of each epoch, have a value per
    class, the background's first. What was trained in two halves has the history of both, its epochs counted on."""
    trainings, settings = [], []
    for key, row in rows.items():
        for i, seed in enumerate(row["seeds"]):
            task = Task(output, key, seed)
            run = Run(task.run()[0])
            history = run.history
            if task.is_pruned:
                history = joined(Run(task.needs[1].run()[0]).history, history)
            results = read_json(output / "results" / f"{task.name}.json")
            settings.append(run.settings.as_dict())
            trainings.append(
                {
                    "key": key,
                    "row": row["row"],
                    "seed": seed,
                    "fold": run.settings.fold,
                    "seconds": rounded(row["by_seed"]["training_seconds"][i], DIGITS),
                    "parameters": row["by_seed"]["parameters"][i],
                    "flops": row["by_seed"]["flops"][i],
                    "history": {name: rounded(history[name], DIGITS) for name in HISTORY if name in history},
                    "subjects": {
                        subject: {metric: rounded(found[metric], DIGITS) for metric in ("dice", "HD95")}
                        for subject, found in results.items()
                        if subject not in RESERVED
                    },
                }
            )
    free = {*FREE, *OF_A_MACHINE, "fold"}
    differ = [name for name in settings[0] if name not in free and any(s[name] != settings[0][name] for s in settings)]
    for training, values in zip(trainings, settings, strict=True):
        own = {name: values[name] for name in differ}
        training["settings"] = {n: last_part(value) if isinstance(value, str) else value for n, value in own.items()}
    return trainings


def write_runs(output: Path, rows: dict[str, dict], dataset: BaseDataset) -> None:
    """runs.json, dice_flops.png, and curves.png where a training was validated; `rows` are the table's, by key."""
    runs = make_runs(output, rows)
    subjects = dict.fromkeys(subject for run in runs for subject in run["subjects"])
    about = {"data": dataset.name, "classes": list(dataset.class_names)}
    about["patients"] = {subject: dataset.case_of(subject) for subject in subjects}
    write_text(output / "runs.json", format_kept(about | {"trainings": runs}) + "\n")
    draw_dice_flops(rows, f"Dice against FLOPs, {dataset.name}", output / "dice_flops.png")
    curves = [
        (row["row"], LOOKS[kind_of(key)][0], [validation_curve(run["history"]) for run in runs if run["key"] == key])
        for key, row in rows.items()
    ]
    dice_figures.draw_curves(curves, rows[REFERENCE]["row"], output / "curves.png")
    print(f"written: runs.json and figures in {output}")


def draw_dice_flops(rows: dict[str, dict], title: str, path: Path) -> None:
    """`dice_figures.draw_dice_flops` of the rows that have a Dice. Those that are made to have Sauron's FLOPs stand
    beside it."""
    reference, marks = rows[REFERENCE], []
    for key, row in rows.items():
        kind, _, budget = key.partition("@")
        is_beside = budget or SAURON in (kind, *row_of(key).needs)
        share = row["flops"]["mean"] / reference["flops"]["mean"]
        difference = None if row is reference else row["difference"]
        if row["dice_by_patient"]["mean"] is not None:
            place = share, budget if is_beside else None
            marks.append(Mark(ROWS[kind].label, LOOKS[kind], *place, row["dice_by_patient"], difference))
    if marks:
        dice_figures.draw_dice_flops(marks, title, reference["row"], path)

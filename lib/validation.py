"""What a training has come to: its newest model on whole validation volumes, as predict.py and evaluate.py would have
it, and the post-processing that helps there. train.py does this at its end; `python -m lib.validation RUN` does it
again, which finishes one that was stopped.

RUN/validation/ gets the predictions, before any post-processing; RUN/validation.json their agreement with the truth,
before and after it; RUN/postprocessing.json what predict.py is to do.
"""

import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lib import checkpoint
from lib.build import build_dataset
from lib.data.BaseDataset import BaseDataset, SubjectFiles
from lib.evaluation import Rules, averages, each_pair, evaluate_pair, mean_foreground, validate_pair
from lib.inference import Predictor, save
from lib.models import load_model
from lib.postprocessing import changes, decide, write_decision
from lib.prediction import BAR, advance
from lib.settings import Settings
from lib.system.cli import Parser, run_script
from lib.system.device import find_device
from lib.system.error import InputError
from lib.system.files import file_digest, locked, sweep, write_json
from lib.system.log import Log
from lib.system.process import Stopped, check_stopped, keep_freed_memory, n_cores

FEW_VOXELS = 2**16  # in a batch
FOLDER = "validation"  # of the predictions
NAME = "validation.json"
MANY_VOXELS = 2 * 10**7  # in all volumes: so many are compared by several processes, which take seconds to start
COLUMNS = {"dice": ("Dice", 4, ""), "HD95": ("HD95", 2, " mm"), "surface_dice": ("surface Dice", 4, "")}  # of the log


def validate_run(folder: Path, device: torch.device, log: Callable[[str], None], data_path: str | None = None) -> None:
    """Validate the newest model of a run folder, and choose its post-processing; of a run without a validation set only
    say that it has none. `data_path` is that of the training by default.

    What is there of an earlier validation is replaced. Raises InputError if the model, the data or a file is not as it
    should be, and Stopped; a line in the log then says how to do it again.
    """
    settings, _ = Settings.read(folder)
    files = build_dataset(replace(settings, data_path=data_path or settings.data_path)).files("validation")
    if not files:
        log("no validation set: the model is not validated, and no post-processing chosen")
        return
    try:
        _validate(folder, settings, files, device, log)
    except Stopped as stopped:
        log(f"{stopped}; to validate: {command(folder)}")
        raise
    except (InputError, OSError):
        log(f"not validated; to do it again: {command(folder)}")
        raise


def _validate(
    folder: Path, settings: Settings, files: list[SubjectFiles], device: torch.device, log: Callable[[str], None]
) -> None:
    epoch, dataset = checkpoint.newest_epoch(folder), settings.dataset
    if epoch is None:
        raise InputError(f"{folder}: has no model (models/model-E) yet; give it an epoch, with train.py --resume")
    if missing := [file for file in files if file.label is None]:
        raise InputError(f"{missing[0].image}: has no ground truth beside it; add it, or take this image away")
    model, n = folder / "models" / f"model-{epoch}", len(files)
    log(f"validation: {model.name} predicts {n} whole volume{'s' * (n > 1)} into {folder / FOLDER}")
    (folder / NAME).unlink(missing_ok=True)  # it speaks of the predictions that are now replaced
    predictor = Predictor(
        load_model(model, device),
        settings.patch_size,
        # a training step with as many patches needs far more memory; small ones are not worth a call each
        batch_size=max(settings.batch_size, FEW_VOXELS // math.prod(settings.patch_size)),
        preprocessing=dataset.preprocessing,
    )
    pairs, n_voxels = predict_all(predictor, files, folder / FOLDER, dataset)
    rules = Rules.of(dataset)
    n_workers = n_cores() if n_voxels > MANY_VOXELS else 1
    compared = each_pair(validate_pair, pairs, n_workers, rules)
    decision = decide([counts for _, counts in compared.values()], dataset.class_names)
    before = {subject: metrics for subject, (metrics, _) in compared.items()}
    changed = {id_: pairs[id_] for id_, (_, counts) in compared.items() if changes(counts, decision.steps)}
    after = before | (each_pair(evaluate_pair, changed, n_workers, rules, decision.steps) if changed else {})
    content = {
        "model": model.name,
        "sha256": file_digest(model),
        "tolerance_mm": rules.tolerance_mm,
        "classes": list(dataset.class_names),
        "steps": list(decision.steps),
        "reasons": decision.reasons,
        "before": averages(before) | {"subjects": before},
        "after": averages(after) | {"subjects": after},
    }
    write_decision(model, decision)
    write_json(folder / NAME, content)
    for line in summary(content):
        log(line)


def predict_all(
    predictor: Predictor, files: list[SubjectFiles], output: Path, dataset: BaseDataset
) -> tuple[dict[str, tuple[Path, Path]], int]:
    """Predict the subjects into the folder `output`: (prediction, truth) by subject, and the number of all voxels."""
    output.mkdir(exist_ok=True)
    sweep(output)
    pairs, n_voxels = {}, 0
    with tqdm(total=len(files), desc="validation", unit="volume", bar_format=BAR) as bar:
        for i, file in enumerate(files, start=1):
            check_stopped()
            prediction = predictor.file(file.images, advance=partial(advance, bar, i))
            path = output / f"{file.id}{dataset.file_ending}"
            save(prediction.labels, prediction.header, path, values=dataset.values)
            pairs[file.id] = path, file.label
            n_voxels += prediction.labels.size
            bar.update(i - bar.n)
    return pairs, n_voxels


def summary(content: dict) -> list[str]:
    """Lines for the log: the averages by class, twice where a post-processing is kept, and the worst cases."""
    before, after = (content[when]["average"] for when in ("before", "after"))
    rows = {name: k for k, name in enumerate(content["classes"]) if k > 0}
    values = {name: {m: (before[m][k], after[m][k]) for m in COLUMNS} for name, k in rows.items()}
    if len(rows) > 1:
        values["mean"] = {m: (mean_foreground(before[m]), mean_foreground(after[m])) for m in COLUMNS}
    lines = [f"validation: {name}: {_cells(by_metric, bool(content['steps']))}" for name, by_metric in values.items()]
    kept = [reason["why"] for reason in content["reasons"] if reason["kept"]]
    lines += [f"post-processing: {why}" for why in kept] or ["post-processing: none, since no step raises the Dice"]
    worst = worst_first(content["after"]["subjects"])
    return [*lines, f"worst cases: {', '.join(f'{subject} {mean:.4f}' for subject, mean in worst[:3]) or 'none known'}"]


def _cells(by_metric: dict[str, tuple[float | None, float | None]], both: bool) -> str:
    """The values before a post-processing by metric, or `both`: "Dice 0.8000 -> 0.9000, ..."."""
    cells = []
    for metric, values in by_metric.items():
        name, digits, unit = COLUMNS[metric]
        shown = ["-" if value is None else f"{value:.{digits}f}" for value in values[: 1 + both]]
        cells.append(f"{name} {' -> '.join(shown)}{unit}")
    return ", ".join(cells)


def worst_first(subjects: dict[str, dict]) -> list[tuple[str, float]]:
    """The subjects that have a mean foreground Dice, with it, lowest first."""
    means = {subject: mean_foreground(metrics["dice"]) for subject, metrics in subjects.items()}
    known = [(subject, mean) for subject, mean in means.items() if mean is not None]
    return sorted(known, key=lambda pair: (pair[1], pair[0]))


def command(folder: Path) -> str:
    """The command line that validates a run."""
    return f"python -m lib.validation {shlex.quote(str(folder))}"


def main(argv: list[str] | None = None) -> int:
    """Validate the run that `argv` names; returns the exit code of `run_script`."""
    parser = Parser("python -m lib.validation", description="Validate the newest model of a run on whole volumes.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--data_path", help="folder of the data set (default: that of the training)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")

    def run() -> None:
        args = parser.parse_args(argv)
        device = find_device(args.device)
        Settings.read(args.run)  # before anything is locked or written there
        if device.type == "cpu":
            keep_freed_memory()
        with locked(args.run):
            validate_run(args.run, device, Log(args.run / "log.txt"), args.data_path)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

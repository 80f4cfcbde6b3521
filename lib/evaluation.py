"""Evaluation of predicted label maps: pairing with the ground truth, metrics in parallel, averages and a table.

Neither this module nor what it imports needs torch, so that worker processes start fast and stay small.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, Self, TypeVar

import numpy as np
from tqdm import tqdm

from lib import postprocessing
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.data.geometry import aligned, is_flat
from lib.data.images import NIFTI, PROBABILITIES, TRUTH, only, read_geometry, read_label, stem
from lib.metric import DISTANCES, TOLERANCE_MM, label_metrics, region_metrics
from lib.postprocessing import Step
from lib.system.cli import nearest
from lib.system.error import InputError
from lib.system.files import file_digest, read_text
from lib.system.process import check_stopped, worker_pool

TRUTHS = ("labelsTr", "labelsTs", ".")  # where a folder in nnU-Net's raw format keeps them, or any folder
RESERVED = ("average", "n")  # keys of the results that are no subjects
Result = TypeVar("Result")
SIZES = {"parameters": "parameters", "flops": "FLOPs", "filters": "filters"}  # in model.json, and on the screen


def find_dataset(data: str) -> tuple[BaseDataset, Path | None]:
    """The data set that --data names, and the folder of own data, if it is known: a built-in data set by its name, a
    folder in nnU-Net's raw format, or a run folder, whose data set it is.

    Raises InputError.
    """
    known = {name.lower(): dataset for name, dataset in DATASETS.items()}
    folder = Path(data)
    if data.lower() in known:
        return known[data.lower()], None
    if (folder / "config.json").is_file():
        from lib.settings import Settings

        settings = Settings.read(folder)[0]
        if settings.definition is None:  # its labels are those of every run of this data set
            return DATASETS[settings.data], None
        return settings.dataset, Path(settings.data_path) if settings.data_path else None
    if (folder / "dataset.json").is_file():
        from lib.data import raw

        return raw.read_dataset(folder), folder
    raise InputError(
        f"--data {data}: is no data set{nearest(data, known)} (known: {', '.join(sorted(DATASETS))}), no folder with "
        "dataset.json, and no run folder"
    )


def write_results(flag: str, path: Path, to: Callable[[Path], None]) -> None:
    """Write a file of results, and the folders that it is in. Raises InputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to(path)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class Rules:
    """How label maps are read and compared.

    merged_labels: other values that files may have, and the labels they count as. regions: unions of labels that are
    evaluated as one, by name. tolerance_mm: of the surface Dice. values: what stands in the files for each class; none:
    0, 1, 2, ... ignore: what stands in truths where voxels do not count. by_index: see `lib.data.geometry.aligned`.
    """

    n_classes: int
    tolerance_mm: float = TOLERANCE_MM
    merged_labels: dict[int, int] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    values: tuple[int, ...] = ()
    ignore: int | None = None
    by_index: bool = False

    @classmethod
    def of(cls, dataset: BaseDataset, tolerance_mm: float = TOLERANCE_MM) -> Self:
        """Those of a data set."""
        labels = dataset.merged_labels, dataset.regions, dataset.values, dataset.ignore
        return cls(dataset.n_classes, tolerance_mm, *labels, dataset.preprocessing.by_index)


class Pairs(NamedTuple):
    """What is compared, and what is not: the log must name it.

    pairs: {subject: (prediction, ground truth)}, sorted. alone: the subjects of the ground truths that have no
    prediction. left_out: files of the predictions' folder that are ground truths by their names.
    """

    pairs: dict[str, tuple[Path, Path]]
    alone: list[str]
    left_out: list[Path]

    def notes(self) -> list[str]:
        """Lines for the screen."""
        lines = []
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} files *{TRUTH}, which are ground truths by their names")
        if self.alone:
            n = len(self.alone) + len(self.pairs)
            names = ", ".join(self.alone)
            lines.append(f"{len(self.alone)} of {n} ground truths have no prediction and do not count: {names}")
        return lines


def find_pairs(predictions: Path, truths: Path, truths_in: Callable[[Path], list[tuple[str, Path]]]) -> Pairs:
    """The predictions `<subject>.nii.gz` (or .nii) in a folder, each with its ground truth.

    `<subject>_probabilities` is no prediction of labels and is passed over; so is `<subject>_gt`. The ground truth is
    looked for under the folder `truths` as the data set lays its truths out, see `BaseDataset.truths_in`, and in this
    folder itself as `<subject>_gt`; where there is neither, it may be the file `<subject>` in this folder. A prediction
    may also be called `prediction_NNNNN`, as the KiTS challenge wants it, and is then looked for as `case_NNNNN`.

    Raises InputError if there is no prediction, one has no ground truth, or two files claim to be the same thing.
    """
    predictions, truths = Path(predictions).resolve(), Path(truths).resolve()
    named = _named(predictions, NIFTI)
    left_out = [path for path, name in named.items() if name.lower().endswith(TRUTH)]
    files = {path: name for path, name in named.items() if path not in left_out and not name.endswith(PROBABILITIES)}
    _check_there(predictions, files, truths, "<subject>.nii.gz")
    listed: dict[str, list[Path]] = {}
    for id_, path in truths_in(truths):
        listed.setdefault(id_, []).append(path)
    pairs: dict[str, tuple[Path, Path]] = {}
    cases: dict[str, Path] = {}
    flat = {name for path, name in _named(truths, NIFTI).items() if path not in files}
    marked = {name for name in flat if name.lower().endswith(TRUTH)}  # beside them, others are images
    for path, name in files.items():
        case = _case(name)
        if cases.setdefault(case, path) != path:
            raise InputError(f"--pred: {case}: both {cases[case]} and {path} are there; take away the one not meant")
        places = [*listed.get(case, ()), *(truths / f"{case}{TRUTH}{suffix}" for suffix in NIFTI)]
        beside = [truths / f"{case}{suffix}" for suffix in NIFTI if not marked]
        truth = _only_truth(case, places, path) or _only_truth(case, beside, path)
        if truth is None:
            where = f", and for one of the {len(listed)} truths as the data set lays them out" if listed else ""
            raise InputError(
                f"{path}: no ground truth of this name in {truths} (--gt); looked for {case}{TRUTH}.nii.gz, "
                f"{case}.nii.gz{where}"
            )
        pairs[name] = path, truth
    all_truths = ({name[: -len(TRUTH)] for name in marked} | listed.keys()) or flat
    all_truths = {_case(name) for name in all_truths if not name.endswith(PROBABILITIES)}
    return Pairs(pairs, sorted(all_truths - cases.keys()), left_out)


def _only_truth(case: str, places: Iterable[Path], prediction: Path) -> Path | None:
    """The one file of these that is there, and not the prediction itself. Raises InputError if there are two."""
    return only(f"--gt: {case}", (one for one in places if prediction not in (one, one.resolve())))


def find_own_pairs(predictions: Path, truths: Path, dataset: BaseDataset) -> Pairs:
    """As `find_pairs`, of a data set in nnU-Net's raw format: the predictions `<id><file_ending>`.

    The ground truth is where the data set's `find` says; unless that is another place, the file of the same name in
    `truths`/labelsTr, labelsTs or `truths` itself.
    """
    predictions, truths = Path(predictions).resolve(), Path(truths).resolve()
    ending = dataset.file_ending
    files = {path: name for path, name in _named(predictions, [ending]).items() if not name.endswith(PROBABILITIES)}
    _check_there(predictions, files, truths, f"<id>{ending}")
    listed = {id_: label.resolve() for id_, label in dataset.truths_in(truths)}
    pairs: dict[str, tuple[Path, Path]] = {}
    for path, name in files.items():
        places = [truths / folder / f"{name}{ending}" for folder in TRUTHS]
        if (label := listed.get(name)) and label not in [place.resolve() for place in places]:
            places = [label]
        truth = _only_truth(name, places, path)
        if truth is None:
            raise InputError(
                f"{path}: no ground truth of this name in {truths} (--gt); looked for labelsTr/{name}{ending} and "
                f"{name}{ending}"
            )
        pairs[name] = path, truth
    names = {label: name for name, label in listed.items()}
    beside = (_named(folder, [ending]) for folder in {truth.parent for _, truth in pairs.values()})
    alone = {names.get(path.resolve(), name) for found in beside for path, name in found.items() if path not in files}
    return Pairs(pairs, sorted(alone - pairs.keys()), [])


def _named(folder: Path, suffixes: Collection[str]) -> dict[Path, str]:
    """The files in a folder with one of these endings, sorted, and their names without it."""
    names = {path: stem(path, suffixes) for path in sorted(folder.glob("*"))}
    return {path: name for path, name in names.items() if name}


def _check_there(predictions: Path, files: dict[Path, str], truths: Path, pattern: str) -> None:
    """Raise InputError unless there are predictions, whose names the results can have, and a folder of truths."""
    if not predictions.is_dir():
        raise InputError(f"--pred {predictions}: no such folder; give the one that holds the predictions")
    if not files:
        raise InputError(f"--pred {predictions}: no predictions {pattern} there; predict first")
    if not truths.is_dir():
        raise InputError(f"--gt {truths}: no such folder; give the one that holds the ground truth")
    for path in (path for path, name in files.items() if name in RESERVED):
        raise InputError(f"{path}: the results use this name for something else; rename the file")


def _case(subject: str) -> str:
    return re.sub(r"^prediction_(?=\d{5}$)", "case_", subject)


def evaluate_pair(prediction: Path, truth: Path, rules: Rules, steps: tuple[Step, ...] = ()) -> dict[str, list]:
    """`lib.metric.label_metrics` of two files, with the spacing of `truth`; of the prediction after these steps of the
    post-processing.

    Where `rules` have regions there is one key more, "challenge": {region: {metric: value}}, each region evaluated as
    one mask. Voxels that the truth says to ignore count as none of TP, TN, FP and FN; for the surfaces they are
    background in both. Raises InputError if a file is no label map, or the two do not lie at one place in the world;
    the order of their axes does not matter.
    """
    predicted, true, spacing_mm = _read_pair(prediction, truth, rules)
    return _compare(postprocessing.apply(predicted, steps), true, spacing_mm, rules)


def validate_pair(prediction: Path, truth: Path, rules: Rules) -> tuple[dict[str, list], np.ndarray]:
    """`evaluate_pair`, and what the choice of a post-processing needs to know: `lib.postprocessing.count`."""
    predicted, true, spacing_mm = _read_pair(prediction, truth, rules)
    return _compare(predicted, true, spacing_mm, rules), postprocessing.count(predicted, true, rules.n_classes)


def _read_pair(prediction: Path, truth: Path, rules: Rules) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Both label maps, in the order of the axes of `truth`, and its spacing; what is to be ignored is n_classes."""
    predicted = read_label(prediction, rules.n_classes, rules.merged_labels, rules.values)
    true = read_label(truth, rules.n_classes, rules.merged_labels, rules.values, rules.ignore)
    return aligned(predicted, true, rules.by_index).array, true.array, true.geometry.spacing_mm


def _compare(predicted: np.ndarray, true: np.ndarray, spacing_mm: tuple[float, ...], rules: Rules) -> dict[str, list]:
    ignored = true == rules.n_classes
    if n_ignored := int(np.count_nonzero(ignored)):
        predicted, true = (np.where(ignored, labels.dtype.type(0), labels) for labels in (predicted, true))
    by_class = label_metrics(predicted, true, spacing_mm, rules.n_classes, rules.tolerance_mm, n_ignored)
    if not rules.regions:
        return by_class
    challenge = {}
    for region, labels in rules.regions.items():
        if len(labels) == 1:
            challenge[region] = {metric: values[labels[0]] for metric, values in by_class.items()}
        else:
            challenge[region] = region_metrics(predicted, true, labels, spacing_mm, rules.tolerance_mm, n_ignored)
    return {**by_class, "challenge": challenge}


def evaluate(pairs: dict[str, tuple[Path, Path]], rules: Rules, num_workers: int = 1) -> dict[str, dict]:
    """Results of pairs as `find_pairs` finds them: {subject: {metric: [a value per class]}, "average": ..., "n": ...}.

    All have "challenge" where `evaluate_pair` gives it. Raises InputError as `evaluate_pair` and `each_pair` do.
    """
    before = {path: file_digest(path) for path, _ in pairs.values()}
    subjects = each_pair(evaluate_pair, pairs, num_workers, rules)
    for path, digest in before.items():
        if not path.exists() or file_digest(path) != digest:
            raise InputError(f"{path}: changed while it was evaluated; evaluate again when nothing writes there")
    return subjects | averages(subjects)


def each_pair(
    work: Callable[..., Result], pairs: dict[str, tuple[Path, Path]], num_workers: int, *more: object
) -> dict[str, Result]:
    """What `work(prediction, truth, *more)` makes of each pair of files, by subject, with a progress bar.

    `num_workers` processes share the work; they are started afresh ("spawn"), which is safe whatever the calling
    process has imported. Raises InputError if one is killed.
    """
    num_workers = min(num_workers, len(pairs))
    arguments = (*zip(*pairs.values(), strict=True), *map(repeat, more))
    if num_workers <= 1:
        done = _with_progress(map(work, *arguments), len(pairs))
    else:
        with worker_pool(num_workers, method="spawn") as pool:
            done = _with_progress(pool.map(work, *arguments), len(pairs))
    return dict(zip(pairs, done, strict=True))


def averages(subjects: dict[str, dict]) -> dict[str, dict]:
    """{"average": the mean of each value over the subjects that have one, "n": how many these are}."""
    values = list(subjects.values())
    return {"average": _mean(values), "n": _count(values)}


def mean_foreground(dice: list[float | None] | None) -> float | None:
    """The mean of what is known of the classes but the background."""
    known = [d for d in (dice or [None])[1:] if d is not None]
    return sum(known) / len(known) if known else None


def _mean(values):
    """Of numbers or None the mean of the numbers (None if there is none); of lists or dicts alike that of each item."""
    return _reduced(values, lambda known: fmean(known) if known else None)


def _count(values):
    """As `_mean`, but how many numbers there are."""
    return _reduced(values, len)


def _reduced(values, reduce):
    first = values[0]
    if isinstance(first, dict):
        return {key: _reduced([value[key] for value in values], reduce) for key in first}
    if isinstance(first, list):
        return [_reduced(column, reduce) for column in zip(*values, strict=True)]
    return reduce([value for value in values if value is not None])


def _with_progress(results, total: int) -> list:
    done = []
    for result in tqdm(results, total=total, desc="evaluate", unit="subject"):
        check_stopped()
        done.append(result)
    return done


def read_model_summary(folder: Path) -> dict | None:
    """What predict.py says of the model in `folder`/model.json (None where there is no such file).

    {"parameters": {"unpruned": n, "now": n}, "flops": {...}, "filters": {...}, ...}, "unpruned" None where it is not
    known. Raises InputError if it is anything else.
    """
    path = Path(folder) / "model.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(read_text(path))
        for size in SIZES:
            now, unpruned = summary[size]["now"], summary[size]["unpruned"]
            if not all(type(number) is int and 0 <= number < 2**63 for number in (now, unpruned or 0)):
                raise ValueError(f"{size} is no whole number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); predict again or delete it") from error
    return summary


def _share_left(size: dict) -> float | None:
    return size["now"] / size["unpruned"] if size["unpruned"] else None


def format_table(results, class_names, summary: dict | None = None) -> str:
    """The averages per class for the screen; the model's size first, if `read_model_summary` gave a `summary`."""
    lines = []
    if summary:
        lines.append(f"{'model':<12}{'before pruning':>20}{'after pruning':>20}{'left':>9}")
        for size, name in SIZES.items():
            before, after, left = summary[size]["unpruned"], summary[size]["now"], _share_left(summary[size])
            known = ("-", "-") if left is None else (f"{before:,}", f"{left:.1%}")
            lines.append(f"{name:<12}{known[0]:>20}{after:>20,}{known[1]:>9}")
        lines.append("")
    columns = ("dice", "surface_dice", *DISTANCES)
    average, n = results["average"], results["n"]

    def row(name: str, cells) -> str:
        return f"{name:<16}" + "".join(f"{cell:>14}" for cell in cells)

    def means(average: dict, n: dict) -> list[str]:
        return ["-" if average[m] is None else f"{average[m]:.4f} ({n[m]:>3})" for m in columns]

    lines.append(row("average", ("Dice", "surface Dice", *(f"{metric} mm" for metric in DISTANCES))))
    for label, name in enumerate(class_names):
        lines.append(row(name, means(*({m: values[m][label] for m in columns} for values in (average, n)))))
    foreground = [_mean(average[metric][1:]) for metric in columns]
    lines.append(row("mean foreground", ("-" if mean is None else f"{mean:.4f}      " for mean in foreground)))
    if "challenge" in average:
        lines.append("challenge")
        for region, values in average["challenge"].items():
            lines.append(row(region.replace("_", " "), means(values, n["challenge"][region])))
    lines.append(f"(in brackets: subjects that have a value, of {len(results) - len(RESERVED)})")
    return "\n".join(lines)


def empty_truths(results: Mapping, pairs: Mapping[str, tuple[Path, Path]], class_names: Sequence[str]) -> list[str]:
    """A line for the screen for each class that was predicted where the truth has none of it: where, and how much.

    Raises InputError for a truth whose header cannot be read.
    """
    lines = []
    for label, name in enumerate(class_names[1:], start=1):
        counts = {subject: [results[subject][count][label] for count in ("TP", "FN", "FP")] for subject in pairs}
        wrong = {subject: fp for subject, (tp, fn, fp) in counts.items() if tp + fn == 0}
        found = {subject: fp for subject, fp in wrong.items() if fp}
        if found:
            amounts = [f"{subject} ({_amount(fp, pairs[subject][1])})" for subject, fp in found.items()]
            of = f"{len(found)} of the {len(wrong)} ground truths without {name}"
            lines.append(f"{of}: some was predicted, so their Dice is 0: {', '.join(amounts)}")
    return lines


def _amount(n_voxels: int, truth: Path) -> str:
    geometry = read_geometry(truth)
    if is_flat(geometry):
        return f"{n_voxels} pixels"
    return f"{n_voxels * math.prod(geometry.spacing_mm) / 1000:.3g} ml"


# --- nnU-Net's table --------------------------------------------------------------------------------------------------


def nnunet_summary(results: Mapping, pairs: Mapping[str, tuple[Path, Path]], values: Sequence[int] = ()) -> dict:
    """What nnU-Net writes into summary.json, of the results of `evaluate`: classes by their values in files, without
    the background.

    Dice and IoU are NaN where a class is in neither file, a mean over cases leaves NaN out, and the mean over classes
    does not.
    """
    cases = []
    for subject, (prediction, truth) in pairs.items():
        counts = zip(*(results[subject][count] for count in ("TP", "FP", "FN", "TN")), strict=True)
        by_class = [_nnunet_metrics(*count) for count in counts]
        metrics = {str(value): by_class[label] for label, value in enumerate(values or range(len(by_class))) if label}
        cases.append({"metrics": metrics, "prediction_file": str(prediction), "reference_file": str(truth)})
    by_case = [case["metrics"] for case in cases]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of nothing but NaN
        mean = {
            value: {name: float(np.nanmean([metrics[value][name] for metrics in by_case])) for name in names}
            for value, names in by_case[0].items()
        }
    names = next(iter(mean.values()))
    foreground = {name: float(np.mean([metrics[name] for metrics in mean.values()])) for name in names}
    return {"foreground_mean": foreground, "mean": mean, "metric_per_case": cases}


def _nnunet_metrics(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    either = tp + fp + fn
    dice, iou = (2 * tp / (tp + either), tp / either) if either else (math.nan, math.nan)
    counts = {"TP": tp, "FP": fp, "FN": fn, "TN": tn, "n_pred": tp + fp, "n_ref": tp + fn}
    return {"Dice": dice, "IoU": iou} | counts

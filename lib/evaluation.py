"""Evaluation of predicted label maps: pairing with the ground truth, metrics in parallel, averages and a table.

Neither this module nor what it imports needs torch, so that worker processes start fast and stay small.
"""

import json
import math
import re
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from statistics import fmean

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.filebasedimages import SerializableImage
from tqdm import tqdm

from lib.error import InputError
from lib.metric import DISTANCES, TOLERANCE_MM, label_metrics, region_metrics
from lib.stop import check_stopped
from lib.text import read_text
from lib.workers import worker_pool

SUFFIX = ".nii.gz"
PROBABILITIES = f"_probabilities{SUFFIX}"
FOLDERS = ("training", "data", "dataset")  # where ACDC, KiTS19 and KiTS21, and KiTS23 keep their subjects
RESERVED = ("average", "n")  # keys of the results that are no subjects
SIZES = {"parameters": "parameters", "flops": "FLOPs", "filters": "filters"}  # in model.json, and on the screen


@dataclass(frozen=True)
class Rules:
    """How label maps are read and compared.

    merged_labels: other values that files may have, and the labels they count as. label_takes_grid: whether a ground
    truth of the prediction's shape takes its affine and spacing, that is the image's, if they differ. regions: unions
    of labels that are evaluated as one, by name. tolerance_mm: of the surface Dice.
    """

    n_classes: int
    tolerance_mm: float = TOLERANCE_MM
    merged_labels: dict[int, int] = field(default_factory=dict)
    label_takes_grid: bool = False
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)


def find_pairs(predictions: Path, truths: Path) -> dict[str, tuple[Path, Path]]:
    """{subject: (prediction, ground truth)} for every `<subject>.nii.gz` in the folder `predictions`, sorted.

    `<subject>_probabilities.nii.gz` is no prediction of labels and is passed over. The ground truth is looked for in
    the folder `truths` itself, as `<subject>_gt.nii.gz` or `<subject>.nii.gz`, and, there or in one of FOLDERS, in the
    data sets' layouts: `patientNNN/patientNNN_frameFF_gt.nii.gz`, `case_NNNNN/segmentation.nii.gz` and
    `case_NNNNN/aggregated_MAJ_seg.nii.gz`; as .nii too. A prediction may also be called `prediction_NNNNN`, as the
    KiTS challenge wants it, and is then looked for as `case_NNNNN`.

    Raises InputError if there is no prediction, or one without ground truth.
    """
    predictions, truths = Path(predictions).resolve(), Path(truths).resolve()
    files = [file for file in sorted(predictions.glob(f"[!.]*{SUFFIX}")) if not file.name.endswith(PROBABILITIES)]
    if not files:
        raise InputError(f"--pred {predictions}: no {SUFFIX} files there; predict first")
    if not truths.is_dir():
        raise InputError(f"--gt {truths}: no such folder; give the one that holds the ground truth")
    return {file.name.removesuffix(SUFFIX): (file, _find_truth(file, truths)) for file in files}


def _find_truth(prediction: Path, truths: Path) -> Path:
    """The file with the ground truth of one prediction; InputError if there is none."""
    subject = prediction.name.removesuffix(SUFFIX)
    if subject in RESERVED:
        raise InputError(f"{prediction}: the results use this name for something else; rename the file")
    case = re.sub(r"^prediction_(?=\d{5}$)", "case_", subject)
    flat = [f"{case}_gt{SUFFIX}", f"{case}{SUFFIX}"]
    nested = [f"{case.split('_')[0]}/{case}_gt{SUFFIX}"]
    nested += [f"{case}/{name}{SUFFIX}" for name in ("segmentation", "aggregated_MAJ_seg")]
    for name in flat + nested + [f"{folder}/{name}" for folder in FOLDERS for name in nested]:
        for path in (truths / name, truths / name.removesuffix(".gz")):
            if path.is_file() and path != prediction:
                return path
    raise InputError(
        f"{prediction}: no ground truth of this name in {truths} (--gt); looked for {flat[0]}, {nested[0]}, ..."
    )


def read_labels(
    path: Path, n_classes: int, merged_labels: dict[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """A label map as it is stored: labels (X, Y, Z) in the type of the file, affine (4, 4), spacing in mm.

    Only the keys of `merged_labels` are replaced by their values.

    Raises InputError if the file is no NIfTI image, is not 3D (more axes of size 1 do not count), has no sound spacing,
    or holds anything but the integers 0 to n_classes - 1.
    """
    try:
        image = nib.load(path)
        labels = _read_voxels(path, image)
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as a NIfTI image ({reason})") from error
    while labels.ndim > 3 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    spacing_mm = tuple(float(size) for size in image.header.get_zooms()[:3])
    if labels.ndim != 3 or not labels.size or labels.dtype.kind not in "buif":
        raise InputError(f"{path}: {image.shape} voxels of {labels.dtype} are no label map; give a 3D one")
    if not all(0 < size < math.inf for size in spacing_mm):
        raise InputError(f"{path}: the voxel size is {spacing_mm} mm; correct the header")
    if merged_labels and labels.max() >= n_classes:
        for value, counts_as in merged_labels.items():
            labels = np.where(labels == value, counts_as, labels)
    in_range = labels.min() >= 0 and labels.max() < n_classes
    if not in_range or (labels.dtype.kind == "f" and (labels != np.rint(labels)).any()):
        _refuse_labels(path, labels, n_classes)
    return labels, image.affine, spacing_mm


def _read_voxels(path: Path, image) -> np.ndarray:
    """The array of a file that nibabel has opened as `image`, in the type that it is stored in."""
    stored = image.dataobj
    if Path(path).suffix != ".gz" or not isinstance(image, SerializableImage) or (stored.slope, stored.inter) != (1, 0):
        return np.asarray(stored)
    labels = np.empty(stored.shape, stored.dtype, order="F")
    left = memoryview(labels.reshape(-1, order="F").view(np.uint8))
    with igzip.open(path) as stream:  # decompresses three times faster than what nibabel uses
        stream.read(stored.offset)
        while left:  # in pieces that stay in the processor's cache
            piece = stream.read(min(len(left), 2**20))
            if not piece:
                raise EOFError("it ends too early")
            left[: len(piece)] = piece
            left = left[len(piece) :]
    return labels


def _refuse_labels(path: Path, labels: np.ndarray, n_classes: int) -> None:
    """Raise the InputError that names what in `labels` is no label, and how often it is there."""
    values, counts = np.unique(labels, return_counts=True)
    bad = ~np.isin(values, np.arange(n_classes))
    named = [f"{value} in {n} voxels" for value, n in zip(values[bad][:3], counts[bad][:3], strict=True)]
    more = f" and {bad.sum() - 3} other values" if bad.sum() > 3 else ""
    raise InputError(
        f"{path}: labels must be integers from 0 to {n_classes - 1}, but it holds {', '.join(named)}{more}"
    )


def evaluate_pair(prediction: Path, truth: Path, rules: Rules) -> dict[str, list]:
    """`lib.metric.label_metrics` of two files, with the spacing of `truth`.

    Where `rules` have regions there is one key more, "challenge": {region: {metric: value}}, each region evaluated as
    one mask. Raises InputError as `read_labels` does, and if the two are not on the same grid (shape, affine; but see
    `Rules.label_takes_grid`).
    """
    predicted, predicted_affine, image_spacing_mm = read_labels(prediction, rules.n_classes, rules.merged_labels)
    true, true_affine, spacing_mm = read_labels(truth, rules.n_classes, rules.merged_labels)
    if predicted.shape != true.shape:
        raise InputError(f"{prediction}: has {predicted.shape} voxels, its ground truth {truth} has {true.shape}")
    if not np.allclose(predicted_affine, true_affine, rtol=1e-5, atol=1e-4):
        if not rules.label_takes_grid:
            raise InputError(
                f"{prediction}: its affine differs from that of its ground truth {truth}; bring both to one grid"
            )
        tqdm.write(f"{truth}: its affine is not that of the image; that of {prediction} is taken")
        spacing_mm = image_spacing_mm
    by_class = label_metrics(predicted, true, spacing_mm, rules.n_classes, rules.tolerance_mm)
    if not rules.regions:
        return by_class
    challenge = {}
    for region, labels in rules.regions.items():
        if len(labels) == 1:
            challenge[region] = {metric: values[labels[0]] for metric, values in by_class.items()}
        else:
            challenge[region] = region_metrics(predicted, true, labels, spacing_mm, rules.tolerance_mm)
    return {**by_class, "challenge": challenge}


def evaluate(pairs, rules: Rules, num_workers: int = 1) -> dict[str, dict]:
    """Results of the pairs of `find_pairs`: {subject: {metric: one value per class}, ..., "average": ..., "n": ...}.

    Each average is over the subjects that have a value; "n" says how many these are. All have "challenge" where
    `evaluate_pair` gives it. `num_workers` processes share the work; they are started afresh ("spawn"), which is safe
    whatever the calling process has imported. Raises InputError as `evaluate_pair` does.
    """
    arguments = (*zip(*pairs.values(), strict=True), repeat(rules))
    num_workers = min(num_workers, len(pairs))
    if num_workers == 1:
        subjects = _with_progress(map(evaluate_pair, *arguments), len(pairs))
    else:
        with worker_pool(num_workers, method="spawn") as pool:
            subjects = _with_progress(pool.map(evaluate_pair, *arguments), len(pairs))
    average, n = _mean(subjects), _count(subjects)
    return {**dict(zip(pairs, subjects, strict=True)), "average": average, "n": n}


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

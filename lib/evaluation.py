"""Evaluation of predicted label maps: pairing with the ground truth, metrics in parallel, averages and a table.

Neither this module nor what it imports needs torch, so that worker processes start fast and stay small.
"""

import json
import math
from itertools import repeat
from pathlib import Path
from statistics import fmean

import nibabel as nib
import numpy as np
from tqdm import tqdm

from lib.error import InputError
from lib.metric import DISTANCES, METRICS, TOLERANCE_MM, label_metrics
from lib.stop import check_stopped
from lib.workers import worker_pool

SUFFIX = ".nii.gz"
PROBABILITIES = f"_probabilities{SUFFIX}"
RESERVED = ("average", "n")  # keys of the results that are no subjects
SIZES = {"parameters": "parameters", "flops": "FLOPs", "filters": "filters"}  # in model.json, and on the screen


def find_pairs(predictions: Path, truths: Path) -> dict[str, tuple[Path, Path]]:
    """{subject: (prediction, ground truth)} for every `<subject>.nii.gz` in the folder `predictions`, sorted.

    `<subject>_probabilities.nii.gz` is no prediction of labels and is passed over. The ground truth is looked for in
    the folder `truths` itself, as `<subject>_gt.nii.gz` or `<subject>.nii.gz`, and, there or in its `training/`, in the
    data sets' layouts: `patientNNN/patientNNN_frameFF_gt.nii.gz` and `case_NNNNN/segmentation.nii.gz`.

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
    flat = [f"{subject}_gt{SUFFIX}", f"{subject}{SUFFIX}"]
    nested = [f"{subject.split('_')[0]}/{subject}_gt{SUFFIX}", f"{subject}/segmentation{SUFFIX}"]
    for name in flat + nested + [f"training/{name}" for name in nested]:
        if (truths / name).is_file() and truths / name != prediction:
            return truths / name
    raise InputError(
        f"{prediction}: no ground truth of this name in {truths} (--gt); looked for {flat[0]}, {nested[0]}, ..."
    )


def read_labels(path: Path, n_classes: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """A label map as it is stored: labels (X, Y, Z) in the type of the file, affine (4, 4), spacing in mm.

    Raises InputError if the file is no NIfTI image, is not 3D (more axes of size 1 do not count), has no sound spacing,
    or holds anything but the integers 0 to n_classes - 1.
    """
    try:
        image = nib.load(path)
        labels = np.asarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for broken files
        raise InputError(
            f"{path}: cannot be read as a NIfTI image ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    while labels.ndim > 3 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    spacing_mm = tuple(float(size) for size in image.header.get_zooms()[:3])
    if labels.ndim != 3 or not labels.size or labels.dtype.kind not in "buif":
        raise InputError(f"{path}: {image.shape} voxels of {labels.dtype} are no label map; give a 3D one")
    if not all(0 < size < math.inf for size in spacing_mm):
        raise InputError(f"{path}: the voxel size is {spacing_mm} mm; correct the header")
    in_range = labels.min() >= 0 and labels.max() < n_classes
    if not in_range or (labels.dtype.kind == "f" and (labels != np.rint(labels)).any()):
        _refuse_labels(path, labels, n_classes)
    return labels, image.affine, spacing_mm


def _refuse_labels(path: Path, labels: np.ndarray, n_classes: int) -> None:
    """Raise the InputError that names what in `labels` is no label, and how often it is there."""
    values, counts = np.unique(labels, return_counts=True)
    bad = ~np.isin(values, np.arange(n_classes))
    named = [f"{value} in {n} voxels" for value, n in zip(values[bad][:3], counts[bad][:3], strict=True)]
    more = f" and {bad.sum() - 3} other values" if bad.sum() > 3 else ""
    raise InputError(
        f"{path}: labels must be integers from 0 to {n_classes - 1}, but it holds {', '.join(named)}{more}"
    )


def evaluate_pair(prediction: Path, truth: Path, n_classes: int, tolerance_mm: float) -> dict[str, list]:
    """`lib.metric.label_metrics` of two files, with the spacing of `truth`.

    Raises InputError as `read_labels` does, and if the two are not on the same grid (shape, affine).
    """
    predicted, predicted_affine, _ = read_labels(prediction, n_classes)
    true, true_affine, spacing_mm = read_labels(truth, n_classes)
    if predicted.shape != true.shape:
        raise InputError(f"{prediction}: has {predicted.shape} voxels, its ground truth {truth} has {true.shape}")
    if not np.allclose(predicted_affine, true_affine, rtol=1e-5, atol=1e-4):
        raise InputError(
            f"{prediction}: its affine differs from that of its ground truth {truth}; bring both to one grid"
        )
    return label_metrics(predicted, true, spacing_mm, n_classes, tolerance_mm)


def evaluate(pairs, n_classes: int, tolerance_mm: float = TOLERANCE_MM, num_workers: int = 1) -> dict[str, dict]:
    """Results of the pairs of `find_pairs`: {subject: {metric: one value per class}, ..., "average": ..., "n": ...}.

    Each average is over the subjects that have a value; "n" says how many these are. `num_workers` processes share the
    work; they are started afresh ("spawn"), which is safe whatever the calling process has imported. Raises InputError
    as `evaluate_pair` does.
    """
    arguments = (*zip(*pairs.values(), strict=True), repeat(n_classes), repeat(tolerance_mm))
    num_workers = min(num_workers, len(pairs))
    if num_workers == 1:
        metrics = _with_progress(map(evaluate_pair, *arguments), len(pairs))
    else:
        with worker_pool(num_workers, method="spawn") as pool:
            metrics = _with_progress(pool.map(evaluate_pair, *arguments), len(pairs))
    average, n = {}, {}
    for metric in METRICS:
        columns = zip(*(subject[metric] for subject in metrics), strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        average[metric] = [fmean(values) if values else None for values in known]
        n[metric] = [len(values) for values in known]
    return {**dict(zip(pairs, metrics, strict=True)), "average": average, "n": n}


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
        summary = json.loads(path.read_text())
        for size in SIZES:
            _share_left(summary[size])
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    heads = ("Dice", "surface Dice", *(f"{metric} mm" for metric in DISTANCES))
    lines.append(f"{'average':<16}" + "".join(f"{head:>14}" for head in heads))
    for label, name in enumerate(class_names):
        cells = [results["average"][metric][label] for metric in columns]
        counts = [results["n"][metric][label] for metric in columns]
        shown = ("-" if cell is None else f"{cell:.4f} ({n:>3})" for cell, n in zip(cells, counts, strict=True))
        lines.append(f"{name:<16}" + "".join(f"{cell:>14}" for cell in shown))
    foreground = [[mean for mean in results["average"][metric][1:] if mean is not None] for metric in columns]
    shown = (f"{fmean(means):.4f}      " if means else "-" for means in foreground)
    lines.append(f"{'mean foreground':<16}" + "".join(f"{cell:>14}" for cell in shown))
    lines.append(f"(in brackets: subjects that have a value, of {len(results) - len(RESERVED)})")
    return "\n".join(lines)

"""nnU-Net's post-processing: of the whole foreground, or of a class, only the largest component stays, where that
raises the Dice of the validation cases. It needs neither torch nor scipy.

A step is "foreground" or the index of a class; steps are done in their order. RUN/postprocessing.json holds what was
decided for one model: {"model", "sha256", "steps", "reasons"}.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.data.components import box_of, components
from lib.system.error import InputError
from lib.system.files import file_digest, read_text, write_json

NAME = "postprocessing.json"
FOREGROUND = "foreground"

Step = str | int


class Decision(NamedTuple):
    """steps: those that are kept. reasons: for each step that was tried {"step", "kept", "dice": [before, after],
    "why"}; the Dice is the mean over the cases of what the step is about, None where there is no such mean."""

    steps: tuple[Step, ...]
    reasons: list[dict]


def keep_largest(labels: np.ndarray, which: Step) -> np.ndarray:
    """The label map (X, Y, Z) with the largest component of a class, or of "foreground", alone; the rest of it becomes
    background. Voxels that share a corner are connected; of components of one size all stay. The very same array where
    nothing goes."""
    mask = labels != 0 if which == FOREGROUND else labels == which
    largest = _largest(mask)
    return labels if largest is mask else np.where(mask & ~largest, labels.dtype.type(0), labels)


def apply(labels: np.ndarray, steps: Iterable[Step]) -> np.ndarray:
    """The label map after all steps; the very same array where nothing goes."""
    for step in steps:
        labels = keep_largest(labels, step)
    return labels


def applying(steps: Sequence[Step]) -> Callable[[np.ndarray], np.ndarray] | None:
    """`apply` with these steps, as a function of the label map; None where there are none."""
    return partial(apply, steps=steps) if steps else None


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest components of a mask; the very same array where that is all of it."""
    box = box_of(mask)
    if box is None:
        return mask
    numbers = components(mask[box], corners=True)
    sizes = np.bincount(numbers.reshape(-1, order="A"))[1:]
    if (sizes == sizes.max()).all():
        return mask
    largest = np.zeros_like(mask)
    largest[box] = np.concatenate([[False], sizes == sizes.max()])[numbers]
    return largest


# --- the decision -----------------------------------------------------------------------------------------------------


def count(predicted: np.ndarray, truth: np.ndarray, n_classes: int) -> np.ndarray:
    """What `decide` needs to know of a case: (2, 2, n_classes - 1, 3) numbers of true positive, false positive and
    false negative voxels by class, without and with the step "foreground", and after each of them without and with the
    class's own step.

    Voxels whose `truth` is `n_classes` do not count. No class's step changes another class, so these are all that any
    choice of steps can come to.
    """
    box = box_of((predicted != 0) | (truth != 0)) or (slice(0, 1),) * predicted.ndim
    predicted, truth = predicted[box], truth[box]
    counted, counts = truth != n_classes, np.zeros((2, 2, n_classes - 1, 3), np.int64)
    whole = keep_largest(predicted, FOREGROUND)
    for labels, by_step in ((predicted, counts[0]), (whole, counts[1])):
        for c in range(1, n_classes):
            mask, true = labels == c, truth == c
            for of_class, numbers in ((mask, by_step[0]), (_largest(mask), by_step[1])):
                tp = np.count_nonzero(of_class & true)
                fp = np.count_nonzero(of_class & counted) - tp
                numbers[c - 1] = tp, fp, np.count_nonzero(true) - tp
        if whole is predicted:
            counts[1] = counts[0]
            break
    return counts


def decide(counts: Sequence[np.ndarray], class_names: Sequence[str]) -> Decision:
    """nnU-Net's choice of steps by what `count` says of at least one case; `class_names` begin with the background.

    "foreground" is kept if the mean Dice of the classes is then higher, and that of no class lower; then the step of
    each class, if its own is. A class's mean is over the cases where it is, in the truth or the prediction; a class
    that is in none has no mean, nor have the classes together, and what has no mean is no higher.
    """
    tp, fp, fn = np.moveaxis(np.stack(counts), -1, 0)  # each (cases, 2, 2, classes)
    known = (2 * tp + fp + fn) > 0
    dice = 2 * tp / np.where(known, 2 * tp + fp + fn, 1)
    with np.errstate(invalid="ignore"):
        means = dice.sum(0, where=known) / known.sum(0)
    before, after = means[0, 0], means[1, 0]
    lower = [class_names[c] for c in np.flatnonzero(after < before) + 1]
    tried = [(FOREGROUND, FOREGROUND, before.mean(), after.mean(), lower)]
    now = means[int(_is_kept(*tried[0]))]
    if len(class_names) > 2:
        tried += [(c, class_names[c], now[0, c - 1], now[1, c - 1], []) for c in range(1, len(class_names))]
    return Decision(tuple(one[0] for one in tried if _is_kept(*one)), [_reason(*one) for one in tried])


def changes(counts: np.ndarray, steps: Sequence[Step]) -> bool:
    """Whether the steps change anything that counts in the case of these `count`."""
    of_foreground = counts[int(FOREGROUND in steps)]
    then = [of_foreground[int(c in steps), c - 1] for c in range(1, counts.shape[2] + 1)]
    return not np.array_equal(then, counts[0, 0])


def _is_kept(_step: Step, _name: str, before: float, after: float, lower: list[str]) -> bool:
    return bool(after > before) and not lower


def _reason(step: Step, name: str, before: float, after: float, lower: list[str]) -> dict:
    kept = _is_kept(step, name, before, after, lower)
    change = f"mean Dice {before:.4f} -> {after:.4f}"
    if np.isnan(before) or np.isnan(after):
        change = "no mean Dice, because a class is in no case"
    elif lower and after > before:
        change += f", but lower for {', '.join(lower)}"
    what = "the foreground" if step == FOREGROUND else name
    why = f"largest component of {what} alone: {'kept' if kept else 'not kept'} ({change})"
    return {
        "step": step,
        "kept": kept,
        "dice": [None if np.isnan(d) else float(d) for d in (before, after)],
        "why": why,
    }


# --- beside the model -------------------------------------------------------------------------------------------------


def write_decision(model: Path, decision: Decision) -> None:
    """Write RUN/postprocessing.json for RUN/models/model-E. Raises InputError."""
    content = {"model": model.name, "sha256": file_digest(model)} | decision._asdict()
    write_json(model.parent.parent / NAME, content)


def read_steps(model: Path) -> tuple[tuple[Step, ...] | None, str | None]:
    """The steps that were decided for this very file RUN/models/model-E, and a line for the screen where there are some
    that were decided for another model. The steps are None where nothing was decided for this one.

    Raises InputError if postprocessing.json is damaged.
    """
    model = Path(model).resolve()
    path = model.parent.parent / NAME
    if model.parent.name != "models" or not path.exists():
        return None, None
    try:
        content = json.loads(read_text(path))
        steps, name, sha256 = content["steps"], content["model"], content["sha256"]
        if not isinstance(steps, list) or not all(map(_is_step, steps)) or len(steps) != len(set(steps)):
            raise ValueError(f"steps are {str(steps)[:60]}")
        if not (isinstance(name, str) and isinstance(sha256, str)):
            raise ValueError("the model is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: is broken ({type(error).__name__}: {reason}); restore or delete it") from error
    if sha256 == file_digest(model):
        return tuple(steps), None
    which = f"another {name}" if name == model.name else name
    return None, f"{path}: decided for {which}, not applied to {model.name}" if steps else None


def _is_step(step: object) -> bool:
    return step == FOREGROUND or (type(step) is int and 0 < step < 2**15)

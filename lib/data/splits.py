"""Which cases train and which validate, by nnU-Net's rules: splits_final.json, or five folds. Without torch."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lib.system.error import InputError
from lib.system.files import read_json

SPLITS = "splits_final.json"
N_FOLDS = 5
SEED = 12345
ALL = "all"
LARGEST_FOLD = 10**6
MOST_SCANS = 10  # of one patient; larger groups of ids are rather sites or years
SUBJECT = re.compile("(case|id|pat|patient|pt|sub|subj|subject)s?[0-9]*", re.IGNORECASE)  # what follows is no scan

Fold = dict[str, tuple[str, ...]]  # ids by "train" and "val", each ascending


def folds_of(folder: Path, ids: Sequence[str]) -> tuple[Fold, ...]:
    """The folds of a raw folder with these cases: those of its `splits_final.json`, else `five_folds`; none where there
    are too few cases. Raises InputError as `read_splits`."""
    return read_splits(folder, ids) or (five_folds(ids) if len(ids) >= N_FOLDS else ())


def five_folds(ids: Iterable[str]) -> tuple[Fold, ...]:
    """Each case validates in one of five folds and trains in the others. Raises InputError if there are fewer than five
    cases."""
    ids = sorted(ids)
    if len(ids) < N_FOLDS:
        raise _too_few(ids)
    shuffled = np.arange(len(ids))
    np.random.RandomState(SEED).shuffle(shuffled)
    return tuple(_fold(ids, part.tolist()) for part in np.array_split(shuffled, N_FOLDS))


def fold_of(folds: Sequence[Fold], fold: str, ids: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ids that train, and those that validate, of the cases `ids`. "all": every case does both. A number beyond the
    folds: 80% of the cases, drawn at random, train.

    Raises InputError for a number where there are no folds, and for what is neither.
    """
    ids = sorted(ids)
    if fold == ALL:
        return tuple(ids), tuple(ids)
    if not re.fullmatch("[0-9]{1,7}", fold) or int(fold) > LARGEST_FOLD:
        raise InputError(f"--fold {fold}: is no fold; give a number from 0 to {max(len(folds), 1) - 1}, or {ALL}")
    if not folds:
        raise _too_few(ids)
    if int(fold) < len(folds):
        chosen = folds[int(fold)]
    else:
        generator = np.random.RandomState(SEED + int(fold))
        train = set(generator.choice(len(ids), int(len(ids) * 0.8), replace=False).tolist())
        chosen = _fold(ids, [i for i in range(len(ids)) if i not in train])
    return chosen["train"], chosen["val"]


def _fold(ids: list[str], validation: Iterable[int]) -> Fold:
    """The fold in which the ids at these places validate."""
    val = {ids[i] for i in validation}
    return {"train": tuple(id_ for id_ in ids if id_ not in val), "val": tuple(sorted(val))}


def _too_few(ids: Sequence[str]) -> InputError:
    return InputError(
        f"--fold: {N_FOLDS} folds need {N_FOLDS} cases at least, there are {len(ids)}; give --fold {ALL}, or write "
        f"your own folds into {SPLITS} beside dataset.json"
    )


def read_splits(folder: Path, ids: Iterable[str]) -> tuple[Fold, ...] | None:
    """The folds that `splits_final.json` in the raw folder gives for the cases `ids`; None: it is not there.

    Raises InputError where it cannot be read, names cases that are not there or one twice, has an empty list, or a
    case that both trains and validates.
    """
    path, ids = Path(folder) / SPLITS, set(ids)
    if not path.exists():
        return None
    written = read_json(path, list)
    folds = tuple(_read_fold(f"{path}: fold {i}", fold, ids) for i, fold in enumerate(written))
    if not folds:
        raise InputError(f"{path}: has no fold; take it away, and the cases are divided into {N_FOLDS}")
    return folds


def _read_fold(where: str, fold: object, ids: set[str]) -> Fold:
    lists = [fold.get(part) if isinstance(fold, dict) else None for part in ("train", "val")]
    if not all(isinstance(part, list) and all(isinstance(id_, str) for id_ in part) for part in lists):
        raise InputError(f'{where} is not written as {{"train": ["case_1", ...], "val": ["case_2", ...]}}; correct it')
    for name, part in zip(("train", "val"), lists, strict=True):
        if not part:
            raise InputError(f'{where}: the list "{name}" is empty; put cases into it (--fold {ALL} trains on all)')
        if unknown := sorted(set(part) - ids):
            raise InputError(
                f'{where}: "{name}" names {_some(unknown)}, which the data set does not have; it has '
                f"{_some(sorted(ids))}: names without channel and file ending"
            )
        if len(set(part)) < len(part):
            raise InputError(f'{where}: "{name}" names {_some(sorted({i for i in part if part.count(i) > 1}))} twice')
    train, val = map(set, lists)
    if both := sorted(train & val):
        raise InputError(
            f"{where}: {_some(both)} both train and validate, which makes the validation flattering; take them out of "
            "one of the lists"
        )
    return {"train": tuple(sorted(train)), "val": tuple(sorted(val))}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def shared_patients(train: Iterable[str], val: Iterable[str]) -> list[str]:
    """The patients that seem to have scans on both sides: what ids have in common up to a separator, such as patient001
    of patient001_frame01 and patient001_frame12.

    What begins the ids of the whole data set is no patient, and neither is a site or a year, which have more cases.
    """
    train, val = set(train), set(val)
    ids = train | val
    for depth in range(1, 6):
        groups: dict[str, set[str]] = {}
        rests = []
        for id_ in ids:
            parts = re.split("([-_. ])", id_)  # with the separators
            if len(parts) > 2 * depth:
                groups.setdefault("".join(parts[: 2 * depth - 1]), set()).add(id_)
                rests.append(parts[2 * depth])
        if _are_patients(groups, rests):
            return sorted(name for name, members in groups.items() if members & train and members & val)
    return []


def _are_patients(groups: dict[str, set[str]], rests: list[str]) -> bool:
    """Whether groups of ids by their beginning are patients with several scans. rests: the part after the beginning."""
    if len(groups) < 2 or all(len(members) == 1 for members in groups.values()):
        return False
    sizes = sorted(len(members) for members in groups.values())
    numbered = all(re.search("[0-9]", name) for name in groups)  # patient001_1, but siteA_001
    scans = all(rest[:1].isalpha() and not SUBJECT.fullmatch(rest) for rest in rests)  # a_scan1, but siteA_case1
    return sizes[len(sizes) // 2] <= MOST_SCANS and (numbered or scans)

"""What is wrong with a data set, all of it and before any work, and its fingerprint: one pass over the files.

All cores share the cases. What is found is kept by the files' content, so that a second start only compares checksums.
Neither this module nor what it imports needs torch: the processes start fast and stay small.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import axcodes2ornt
from tqdm import tqdm

from lib.data import raw
from lib.data.BaseDataset import BaseDataset, SubjectFiles
from lib.data.fingerprint import Draws, Fingerprint, Measured, draws_per_case, fingerprint, measure
from lib.data.geometry import GRID_TOLERANCE, Volume, apart_mm, codes
from lib.data.images import LABEL_TOLERANCE, read, read_channels_of, read_label
from lib.data.listing import listing
from lib.system.error import InputError
from lib.system.files import check_writable, digest, file_digest, write_atomically
from lib.system.process import check_stopped, n_cores, worker_pool

VERSION = 1  # raise it whenever the same files would be examined otherwise
MOST_LINES = 50  # of problems
MOST_NAMES = 20  # of cases, or values, in a line
BLACK_AND_WHITE = {0, 255}


class Examination(NamedTuple):
    """What is known of a data set that is in order. orientation: the stored axes of most cases, such as "LPS"; turned:
    the ids of the others, whose shape and spacing in the fingerprint are those after turning. notes: lines for the log.
    """

    fingerprint: Fingerprint
    n_training: int
    orientation: str
    turned: tuple[str, ...]
    notes: list[str]


class Rules(NamedTuple):
    """What a case must be like: see `BaseDataset`. n_draws: intensities that each case gives to the fingerprint."""

    channels: tuple[str, ...]
    n_classes: int
    values: tuple[int, ...]
    ignore: int | None
    n_draws: int


class Examined(NamedTuple):
    """One case. key: of its files and the rules. codes: of its stored axes. image: the checksum of its voxels. voxels:
    how many each class has. mismatches: what lies elsewhere, as the number of the file (the label's is the last) and
    words. Where there are problems (as lines), the rest is missing."""

    problems: list[str]
    key: str = ""
    codes: str = ""
    image: str = ""
    voxels: list[int] = []
    mismatches: list[tuple[int, str]] = []
    measured: Measured | None = None


def examine(dataset: BaseDataset, folder: Path, cache_path: Path, allow_mismatch: bool = False) -> Examination:
    """Examine all training cases of a raw folder, with a progress bar.

    allow_mismatch: files whose origin or directions are not their image's are taken as they are stored, with a note.
    Where all is in order, what was found is kept in `cache_path`. Raises InputError with a line for each problem, or
    where the cache cannot be written.
    """
    folder = raw.raw_folder(folder)
    cases, _, problems, notes = listing(dataset, folder)
    path = Path(cache_path) / f"{dataset.name}-examination.npz"
    check_writable(path, "--cache_path")
    kept = _load(path)
    found = _examine_all(dataset, cases, kept)
    ids, results = list(found), list(found.values())
    problems = problems + [line for one in results for line in one.problems] + _duplicates(found)
    mismatches = [
        ([*case.images, case.label][number], words)
        for case, one in zip(cases, results, strict=True)
        for number, words in one.mismatches
    ]
    if mismatches and allow_mismatch:
        names = _some([str(name).removeprefix(f"{folder}/") for name, _ in mismatches])
        notes = [*notes, f"--allow_mismatch: {len(mismatches)} files lie elsewhere than their image: {names}"]
    else:
        mend = "mend the header that is wrong, or give --allow_mismatch to take the voxels as they are stored"
        problems += [f"{name}: {words}; {mend}" for name, words in mismatches]
    if not problems and not any(len(draws.values) for one in results for draws in one.measured.draws):
        problems = ["no case has a voxel of any class but the background where its image is not 0; check the labels"]
    if problems:
        raise InputError(_listed(folder, problems))
    if any(one is not kept.get(id_) for id_, one in found.items()):
        _save(path, found)
    orientation = Counter(one.codes for one in results).most_common(1)[0][0]
    measured = fingerprint([_turned(one.measured, one.codes, orientation) for one in results])
    turned = tuple(id_ for id_, one in found.items() if one.codes != orientation)
    if turned:
        names = _some([f"{id_} ({found[id_].codes})" for id_ in turned])
        notes = [*notes, f"{len(turned)} of {len(ids)} cases are not stored as {orientation}, and are turned: {names}"]
    return Examination(measured, len(ids), orientation, turned, notes + _label_notes(dataset, found))


def _examine_all(dataset: BaseDataset, cases: list[SubjectFiles], kept: dict[str, Examined]) -> dict[str, Examined]:
    """By id, what was kept of these very files; of the others what `examine_case` says."""
    n_draws = draws_per_case(max(1, len(cases)))
    rules = Rules(dataset.channels, dataset.n_classes, dataset.values, dataset.ignore, n_draws)
    known = [case for case in cases if case.id in kept]
    with ThreadPoolExecutor(n_cores()) as pool:
        keys = tqdm(
            pool.map(partial(_key_of, rules=rules), known), f"reading {dataset.name}", len(known), leave=False, delay=2
        )
        found = {}
        for case, key in zip(known, keys, strict=True):
            check_stopped()
            found |= {case.id: kept[case.id]} if key == kept[case.id].key else {}
    if stale := [case for case in cases if case.id not in found]:
        with worker_pool(min(n_cores(), len(stale))) as pool:
            done = pool.map(partial(examine_case, rules=rules), stale)
            for case, one in zip(stale, tqdm(done, f"examining {dataset.name}", len(stale), unit="case"), strict=True):
                check_stopped()
                found[case.id] = one
    return {case.id: found[case.id] for case in cases}


# --- one case ---------------------------------------------------------------------------------------------------------


def examine_case(files: SubjectFiles, rules: Rules) -> Examined:
    """Read the files of one case, each once, check and measure them. What the names show is not looked at again."""
    problems, sums, channels, numbers = [], [], [], []
    for number, path in enumerate(files.images):
        try:
            volumes = read_channels_of(path)
        except InputError as error:
            problems.append(str(error))
        else:
            sums.append(volumes[0].sha256)
            channels += volumes
            numbers += [number] * len(volumes)
    label = None
    try:
        label = (
            read_label(files.label, rules.n_classes, values=rules.values, ignore=rules.ignore) if files.label else None
        )
    except InputError as error:
        problems.append(_wrong_values(files.label, rules) or str(error))
    if not problems and len(channels) != len(rules.channels):
        has = "channel" if len(channels) == 1 else "channels"
        problems.append(
            f"{files.image}: has {len(channels)} {has}, but dataset.json names {len(rules.channels)}: "
            f"{_some(rules.channels)}"
        )
    if not channels:
        return Examined(problems)
    others = list(zip(numbers[1:], channels[1:], strict=True)) + ([(len(files.images), label)] if label else [])
    problems += [line for _, other in others if (line := _wrong_grid(other, channels[0]))]
    mismatches = {number: words for number, other in others if (words := _mismatch(other, channels[0]))}
    if problems or label is None:
        return Examined(problems, mismatches=sorted(mismatches.items()))
    voxels = sum(np.bincount(plane.ravel(), minlength=rules.n_classes + 1) for plane in label.array.T)
    foreground = (label.array > 0) & (label.array < rules.n_classes)  # what is to be ignored is n_classes
    geometry, arrays = channels[0].geometry, [channel.array for channel in channels]
    return Examined(
        [],
        _key([*sums, label.sha256], rules),
        codes(geometry),
        _checksum(arrays),
        voxels[: rules.n_classes].tolist(),
        sorted(mismatches.items()),
        measure(arrays, foreground, geometry.spacing_mm, rules.n_draws),
    )


def _key(sums: Sequence[str], rules: Rules) -> str:
    return digest(json.dumps([VERSION, rules, sums]).encode())


def _key_of(files: SubjectFiles, rules: Rules) -> str | None:
    """What `examine_case` would give as the key; None where a file cannot be read."""
    try:
        return _key([file_digest(path) for path in (*files.images, files.label)], rules)
    except (OSError, TypeError):  # there is no label
        return None


def _checksum(arrays: Sequence[np.ndarray]) -> str:
    """Of voxels: a file that was compressed once more has other bytes, but these."""
    sha256 = hashlib.sha256()
    for array in arrays:
        sha256.update(repr(array.shape).encode())
        sha256.update(np.ascontiguousarray(array.T))
    return sha256.hexdigest()


def _wrong_grid(volume: Volume, first: Volume) -> str | None:
    """In which way the shape or the voxel size is not that of the image's first channel."""
    here, there = volume.geometry, first.geometry
    if here.shape != there.shape:
        return (
            f"{volume.path}: its shape {here.shape} is not {there.shape}, that of {first.path}; replace the wrong one"
        )
    if not np.allclose(here.spacing_mm, there.spacing_mm):
        sizes = [" x ".join(f"{mm:.9g}" for mm in one.spacing_mm) for one in (here, there)]
        return (
            f"{volume.path}: its voxels of {sizes[0]} mm are not those of {first.path}, {sizes[1]} mm; mend the header"
        )
    return None


def _mismatch(volume: Volume, first: Volume) -> str | None:
    """In which way a volume of the same shape and voxel size lies elsewhere in the world, without names."""
    here, there = volume.geometry, first.geometry
    if here.shape != there.shape or not np.allclose(here.spacing_mm, there.spacing_mm):
        return None
    if (distance := apart_mm(here, there)) <= GRID_TOLERANCE * min(there.spacing_mm):
        return None
    places = [f"axes {codes(one)}, origin {_in_words(one.origin_mm)} mm" for one in (here, there)]
    return f"lies elsewhere than the image, by up to {distance:.3g} mm ({places[0]}; the image has {places[1]})"


def _in_words(numbers: Sequence[float]) -> str:
    return f"({', '.join(f'{number:.6g}' for number in numbers)})"


def _wrong_values(path: Path, rules: Rules) -> str | None:
    """A line about the values of a label file that dataset.json lacks, with the likely cause; None if there are none,
    or it cannot be read."""
    try:
        array = read(path).array
    except InputError:
        return None
    if not np.isfinite(array).all():
        return f"{path}: has NaN or infinite voxels; replace them"
    values, counts = np.unique(array, return_counts=True)
    known = np.array([*(rules.values or range(rules.n_classes)), *([] if rules.ignore is None else [rules.ignore])])
    wrong = values[np.abs(values[:, None].astype(float) - known).min(axis=1) > LABEL_TOLERANCE].tolist()
    if not wrong:
        return None
    if any(value != round(value) for value in wrong):
        cause = "values between labels come of interpolation or smoothing: make the mask anew with nearest neighbours"
    elif set(values.tolist()) <= BLACK_AND_WHITE:
        cause = "a black-and-white mask: write 1 for 255"
    elif len(wrong) > 8 and wrong[0] >= 0 and wrong[-1] <= 255:
        cause = "so many come of a mask with smoothed edges, or saved as JPEG: export it without both"
    else:
        cause = "correct the file, or add the label to dataset.json"
    there = _some(
        [f"{round(value, 6):.9g} ({n} voxels)" for value, n in zip(values.tolist(), counts.tolist(), strict=True)]
    )
    return f"{path}: has the values {there}, but the labels are {_some(known.tolist())}; {cause}"


# --- all cases --------------------------------------------------------------------------------------------------------


def _listed(folder: Path, problems: Sequence[str]) -> str:
    """A headline and the first problems, with paths under the folder."""
    lines = [line.replace(f"{folder}/", "") for line in problems[:MOST_LINES]]
    lines += [f"and {len(problems) - MOST_LINES} more"] if len(problems) > MOST_LINES else []
    return "\n  ".join([f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}:", *lines])


def _duplicates(found: dict[str, Examined]) -> list[str]:
    """A line for each image that several cases have."""
    having: dict[str, list[str]] = {}
    for id_, one in found.items():
        if one.image:
            having.setdefault(one.image, []).append(id_)
    return [
        f"cases {_some(ids)} hold the same image, so that one may train and another validate; take away all but one"
        for ids in having.values()
        if len(ids) > 1
    ]


def _turned(measured: Measured, own: str, orientation: str) -> Measured:
    """A case whose stored axes are `own`, with its shape and spacing in the order of `orientation`."""
    kinds, wanted = (axcodes2ornt(axes[::-1])[:, 0].tolist() for axes in (own, orientation))
    order = [kinds.index(kind) for kind in wanted]
    shape, spacing = (tuple(sizes[axis] for axis in order) for sizes in (measured.shape, measured.spacing))
    return measured._replace(shape=shape, spacing=spacing)


def _label_notes(dataset: BaseDataset, found: dict[str, Examined]) -> list[str]:
    """Which cases have no foreground, and which classes occur in no case."""
    notes = []
    if empty := [id_ for id_, one in found.items() if not sum(one.voxels[1:])]:
        notes.append(f"{len(empty)} of {len(found)} cases have nothing but background: {_some(empty)}")
    voxels = np.sum([one.voxels for one in found.values()], axis=0)
    if absent := [name for name, n in zip(dataset.class_names, voxels, strict=True) if not n]:
        notes.append(f"no case has a voxel of {_some(absent)}")
    return notes


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(map(str, names[:MOST_NAMES])) + more


# --- what is kept -----------------------------------------------------------------------------------------------------


def _save(path: Path, found: dict[str, Examined]) -> None:
    """Write cases without problems, by id. Raises InputError."""
    draws = [one for case in found.values() for one in case.measured.draws]
    fields = {id_: one._replace(measured=one.measured._replace(draws=())) for id_, one in found.items()}
    fields = json.dumps({id_: [*one[:-1], one.measured] for id_, one in fields.items()})
    arrays = {
        "cases": np.array(fields),
        "sizes": np.array([len(one.values) for one in draws]),
        "values": np.concatenate([one.values for one in draws]),
        "counts": np.concatenate([one.counts for one in draws]),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--cache_path: {path.parent} cannot be made ({error.strerror}); give another one") from error
    write_atomically(path, write)


def _load(path: Path) -> dict[str, Examined]:
    """What `_save` wrote; nothing where the file is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            cases = json.loads(str(arrays["cases"]))
            ends = np.cumsum(arrays["sizes"])[:-1]
            draws = list(map(Draws, np.split(arrays["values"], ends), np.split(arrays["counts"], ends)))
        n = len(draws) // len(cases)
        found = {}
        for index, (id_, (*fields, (shape, spacing, relative_size, _))) in enumerate(cases.items()):
            own = tuple(draws[index * n : (index + 1) * n])
            found[id_] = Examined(*fields, Measured(tuple(shape), tuple(spacing), relative_size, own))
        return found
    except Exception:  # numpy, zipfile and json raise a dozen types for damaged files
        return {}

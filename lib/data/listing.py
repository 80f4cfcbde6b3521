"""What a folder in nnU-Net's raw format holds, and all that is wrong with its names. Nothing here needs torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.data.BaseDataset import BaseDataset, SubjectFiles
from lib.data.images import SUFFIXES
from lib.data.raw import (
    IMAGES,
    LABELS,
    PLAIN,
    TABLE,
    TESTS,
    Layout,
    Scan,
    names_in,
    raw_folder,
    read_json,
    scan_folder,
    some,
    training_ids,
    whole,
)


class Listing(NamedTuple):
    """What a raw folder holds: the training cases and the test cases by id, ascending, and, as lines, what makes a
    training impossible and what one should know."""

    cases: list[SubjectFiles]
    tests: list[SubjectFiles]
    problems: list[str]
    notes: list[str]


def listing(dataset: BaseDataset, folder: str | Path) -> Listing:
    """What a raw folder holds, without a look into its images, and all that is wrong with its names.

    Where each case has one file only, this file must hold all channels: whoever reads it must see to that. Raises
    InputError where dataset.json or a folder cannot be read.
    """
    folder = raw_folder(folder)
    fields, layout = read_json(folder / "dataset.json"), dataset.find.args[0]
    cases, tests = dataset.find(folder), dataset.find_test(folder)
    scans = {
        IMAGES: scan_folder(folder / IMAGES, layout),
        LABELS: scan_folder(folder / LABELS, layout._replace(naming=PLAIN)),
        TESTS: scan_folder(folder / TESTS, layout),
    }
    if layout.naming == TABLE:
        del scans[IMAGES], scans[LABELS]
    elif not cases:
        return Listing([], tests, [_nothing_found(folder, layout)], _notes(dataset, layout, scans))
    problems = _wrong_channels(dataset, layout, cases)
    if layout.naming == TABLE:
        problems += _missing_in_table(cases)
    else:
        problems += _unmatched(folder, layout, cases, scans[LABELS])
        problems += [line for place in (IMAGES, LABELS) for line in _doubles(place, scans[place], layout)]
        problems += _against_training_list(fields, layout, [case.id for case in cases])
    given = fields.get("numTraining")
    if "numTraining" in fields and whole(given) != len(cases):
        problems.append(
            f'"numTraining" is {given!r:.80}, but there are {len(cases)} cases; correct it in dataset.json, or '
            "complete the files"
        )
    notes = [f"{TESTS}: {line}; it cannot be predicted" for line in _wrong_channels(dataset, layout, tests)]
    return Listing(cases, tests, problems, _notes(dataset, layout, scans) + notes)


def _nothing_found(folder: Path, layout: Layout) -> str:
    if not (folder / IMAGES).is_dir():
        return f"{folder}: has no folder {IMAGES}; put the images there as {layout.expected}"
    names, _ = names_in(folder / IMAGES)
    there = f"the files there are {some(names)}" if names else "it is empty"
    return f"{folder / IMAGES}: found no image: {there}, expected {layout.expected}"


def _wrong_channels(dataset: BaseDataset, layout: Layout, cases: list[SubjectFiles]) -> list[str]:
    """A line for each case with other channels than the data set's; one for all where all have the same ones."""
    if layout.naming == PLAIN:
        return []
    needed = tuple(range(dataset.modalities))
    numbers = {case.id: _numbers(case, layout) for case in cases}
    if all(has == (0,) for has in numbers.values()):
        return []  # then one file holds all channels
    wrong = {id_: has for id_, has in numbers.items() if has != needed}
    needs = f"needs {_joined(needed)} ({', '.join(dataset.channels)})"
    if len(cases) > 1 and len(wrong) == len(cases) and len(set(wrong.values())) == 1:
        return [f"all {len(cases)} cases have channels {_joined(next(iter(wrong.values())))}, each {needs}"]
    return [f"case {id_} has channels {_joined(has)}, {needs}" for id_, has in wrong.items()]


def _numbers(case: SubjectFiles, layout: Layout) -> tuple[int, ...]:
    """The numbers of the channels that a case has: those in the names, in a table the places in the list."""
    if layout.naming == TABLE:
        return tuple(range(len(case.images)))
    return tuple(int(path.name.removesuffix(layout.file_ending)[-4:]) for path in case.images)


def _joined(numbers: Sequence[int]) -> str:
    return " ".join(f"{number:04d}" for number in numbers[:9]) + (" ..." if len(numbers) > 9 else "")


def _missing_in_table(cases: list[SubjectFiles]) -> list[str]:
    lines = [f"case {case.id}: {path} is not there" for case in cases for path in case.images if not path.exists()]
    lines += [
        f"case {case.id}: its label is not there; correct the table in dataset.json" for case in cases if not case.label
    ]
    seen: dict[Path, str] = {}
    for case in cases:
        for path in case.images:
            if (first := seen.setdefault(path.resolve(), case.id)) != case.id:
                lines.append(f"case {case.id}: has {path}, which case {first} has too")
    return lines


def _unmatched(folder: Path, layout: Layout, cases: list[SubjectFiles], labels: Scan) -> list[str]:
    """A line for each image without label, and each label without image; one where there is no label at all."""
    ending = layout.file_ending
    if not labels.found:
        there = f"the files there are {some(labels.others)}" if labels.others else "it is empty"
        there = there if (folder / LABELS).is_dir() else "there is no such folder"
        return [f"{folder / LABELS}: no case has a label: {there}, expected {cases[0].id}{ending}"]
    lines = [
        f"case {case.id} has no label: {LABELS}/{case.id}{ending} is not there" for case in cases if not case.label
    ]
    extra = sorted(set(labels.found) - {case.id for case in cases})
    image = layout.expected.removeprefix("NAME")
    return lines + [f"{LABELS}/{id_}{ending} has no image: {IMAGES}/{id_}{image} is not there" for id_ in extra]


def _doubles(place: str, scan: Scan, layout: Layout) -> list[str]:
    """A line for each file that is there once more with another ending."""
    found = {path.name for files in scan.found.values() for path in files.values()}
    ends = {name: next((end for end in SUFFIXES if name.endswith(end)), None) for name in scan.others}
    twins = {name: name.removesuffix(end) + layout.file_ending for name, end in ends.items() if end}
    return [
        f"{place}: both {twin} and {name} are there; take away the one that is not meant"
        for name, twin in twins.items()
        if twin in found
    ]


def _against_training_list(fields: dict, layout: Layout, ids: list[str]) -> list[str]:
    """What the list "training" of the old formats says otherwise than the folder."""
    listed = training_ids(fields, layout.file_ending)
    mend = 'correct "training" in dataset.json, or the files'
    lines = []
    if doubles := sorted({id_ for id_ in listed if listed.count(id_) > 1} if len(set(listed)) < len(listed) else ()):
        lines.append(f'"training" names {some(doubles)} twice; {mend}')
    if absent := sorted(set(listed) - set(ids)):
        lines.append(f'"training" names {some(absent)}, which {IMAGES} does not have; {mend}')
    if listed and (unlisted := sorted(set(ids) - set(listed))):
        lines.append(f'"training" does not name {some(unlisted)}, which {IMAGES} has; {mend}')
    return lines


def _notes(dataset: BaseDataset, layout: Layout, scans: dict[str, Scan]) -> list[str]:
    notes = []
    if dataset.values:
        given, inside = (" ".join(map(str, numbers)) for numbers in (dataset.values, range(dataset.n_classes)))
        notes.append(f"labels {given} count as classes {inside} inside; predictions have {given} again")
    if dataset.modalities > 1 and IMAGES in scans and all(set(has) == {0} for has in scans[IMAGES].found.values()):
        notes.append(f"{IMAGES}: each case has one file, which must hold all {dataset.modalities} channels")
    for place, scan in scans.items():
        if scan.n_hidden:
            notes.append(f"{place}: skipped {scan.n_hidden} hidden files (names that begin with a dot)")
        if strangers := [name for name in scan.others if not _is_sidecar(name, layout)]:
            expected = f"NAME{layout.file_ending}" if place == LABELS else layout.expected
            notes.append(f"{place}: left {len(strangers)} other files aside ({some(strangers)}); expected {expected}")
    return notes


def _is_sidecar(name: str, layout: Layout) -> bool:
    """Whether a file gives the spacing of a TIFF."""
    return layout.file_ending in (".tif", ".tiff") and name.endswith(".json")

"""Data sets in nnU-Net's raw format: a folder with dataset.json, imagesTr, labelsTr and, for a test set, imagesTs.

Version 2, version 1 and the Medical Segmentation Decathlon are read. Nothing here needs torch.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lib.data.BaseDataset import PUBLISHED, BaseDataset, Preprocessing, SubjectFiles
from lib.data.normalization import SCHEMES
from lib.system.error import InputError
from lib.system.files import read_json

ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd", ".gipl", ".png", ".bmp", ".tif", ".tiff")
IMAGES, LABELS, TESTS = "imagesTr", "labelsTr", "imagesTs"
NUMBERED, PLAIN, TABLE = "numbered", "plain", "table"
LARGEST_VALUE = 2**16 - 1  # of a label
EXAMPLE = "a folder in nnU-Net's raw format has dataset.json and, beside it, imagesTr and labelsTr"


class Layout(NamedTuple):
    """How the files of a case are named. naming: NUMBERED is ID_0000, ID_0001, ... for the channels, PLAIN is ID for
    one file that holds all, TABLE is by the "dataset" of dataset.json (and in imagesTs as NUMBERED)."""

    naming: str
    file_ending: str

    @property
    def expected(self) -> str:
        return f"NAME{'' if self.naming == PLAIN else '_0000'}{self.file_ending}"


class Listing(NamedTuple):
    """What a raw folder holds: the training cases and the test cases by id, ascending, and, as lines, what makes a
    training impossible and what one should know."""

    cases: list[SubjectFiles]
    tests: list[SubjectFiles]
    problems: list[str]
    notes: list[str]


class Scan(NamedTuple):
    """One folder. found: the files by id and number of the channel (0 where names have none); others: the names of
    further files; n_hidden: how many names that begin with a dot were passed over."""

    found: dict[str, dict[int, Path]]
    others: Sequence[str] = ()
    n_hidden: int = 0


# --- dataset.json -----------------------------------------------------------------------------------------------------


def raw_folder(path: str | Path) -> Path:
    """The folder that holds dataset.json; `path` is this folder, or the file itself. Raises InputError."""
    path = Path(os.path.abspath(path))
    folder = path.parent if path.name == "dataset.json" and not path.is_dir() else path
    if (folder / "dataset.json").is_file():
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; {EXAMPLE}")
    inside = next((place.parent for place in sorted(folder.glob("*/dataset.json"))), None)
    raise InputError(f"{folder}: has no dataset.json" + (f", did you mean {inside}?" if inside else f"; {EXAMPLE}"))


def read_dataset(folder: str | Path) -> BaseDataset:
    """The definition that dataset.json gives. What a plan decides is still missing: the preprocessing, the size of the
    patch and the folds.

    Raises InputError where the file is missing, broken, or says what is not supported.
    """
    folder = raw_folder(folder)
    fields = read_json(folder / "dataset.json")
    try:
        _check(_is_file_name(folder.name), "the name of its folder names the data set; give the folder a printable one")
        channels = _channels(fields)
        labels, ignore = _labels(fields)
        layout = _layout(fields, folder)
        licence = fields.get("licence", fields.get("license", ""))
    except ValueError as error:
        raise InputError(f"{folder / 'dataset.json'}: {error}") from error
    values = tuple(sorted(labels))
    return BaseDataset(
        name=folder.name,
        class_names=tuple(labels[value] for value in values),
        values=() if values == tuple(range(len(values))) else values,
        ignore=ignore,
        channels=channels,
        preprocessing=Preprocessing((None, None, None)),
        patch_size=(1, 1, 1),
        licence=licence if _is_text(licence) else "",
        **_found_by(layout),
    )


def n_labels(dataset: BaseDataset) -> int:
    """The number of labels that dataset.json names, with the background and "ignore"."""
    return dataset.n_classes + (dataset.ignore is not None)


def _found_by(layout: Layout) -> dict[str, Any]:
    """The fields of a definition that follow from the layout."""
    return {
        "find": partial(find_cases, layout),
        "find_test": partial(find_tests, layout),
        "file_ending": layout.file_ending,
        "layout": f"{IMAGES}/{layout.expected}",
        "test_share": 0.0,
    }


def _check(condition: object, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def _is_file_name(value: object) -> bool:
    return _is_text(value) and not value.startswith(".") and not {"/", "\\"} & set(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _whole(value: object) -> int | None:
    """The number 0, 1, 2, ... that an int or a text is; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return int(value)
    return value if _is_int(value, 0, 10**9) else None


def _channels(fields: dict) -> tuple[str, ...]:
    """The names of the channels, in the order of their numbers. Raises ValueError."""
    key = "channel_names" if "channel_names" in fields else "modality"
    names, mend = fields.get(key), 'write for instance "channel_names": {"0": "T2", "1": "ADC"}'
    _check(key in fields, f'has no "channel_names"; {mend}')
    _check(isinstance(names, dict) and names, f'"{key}" is no table of channels by number; {mend}')
    numbers = [_whole(number) for number in names]
    if None in numbers and None not in map(_whole, names.values()):
        raise ValueError(f'"{key}" is the wrong way round; {mend}, numbers first')
    _check(
        None not in numbers and sorted(numbers) == list(range(len(names))),
        f'the channels of "{key}" are numbered {" ".join(list(names)[:9])}; number them '
        f"{' '.join(map(str, range(min(len(names), 9))))}, like the files",
    )
    by_number = dict(zip(numbers, names.values(), strict=True))
    channels = tuple(by_number[number] for number in range(len(names)))
    _check(all(map(_is_text, channels)), f'"{key}" names a channel {channels!r:.80}; give each a name; {mend}')
    return channels


def _labels(fields: dict) -> tuple[dict[int, str], int | None]:
    """The names by value, and the value of "ignore". Raises ValueError.

    They may be given as names with their values or, as in version 1, as values with their names.
    """
    labels, mend = fields.get("labels"), 'write for instance "labels": {"background": 0, "tumor": 1}'
    _check("labels" in fields, f'has no "labels"; {mend}')
    _check(isinstance(labels, dict) and labels, f'"labels" is no table of values by name; {mend}')
    values_first = None not in map(_whole, labels) and any(
        isinstance(name, str) and _whole(name) is None for name in labels.values()
    )
    pairs = [(name, int(value)) for value, name in labels.items()] if values_first else list(labels.items())
    by_value: dict[int, str] = {}
    for name, given in pairs:
        _check(_is_text(name), f"the name of a label is {name!r:.80}; give a short text")
        value = _label_value(name, given)
        _check(
            value not in by_value,
            f"the labels {by_value.get(value)!r} and {name!r} both have the value {value}; {mend}",
        )
        by_value[value] = name
    _check(len(set(by_value.values())) == len(by_value), f"two labels have the same name; {mend}")
    ignore = next((value for value, name in by_value.items() if name == "ignore"), None)
    names = {value: name for value, name in by_value.items() if name != "ignore"}
    _check(0 in names, 'no label has the value 0, the background; add "background": 0 to "labels"')
    _check(len(names) > 1, f'"labels" has nothing but the background; {mend}')
    return names, ignore


def _label_value(name: str, given: object) -> int:
    """The value of a label, from what stands behind its name. Raises ValueError."""
    if name == "ignore":
        _check(_is_int(given, 0, LARGEST_VALUE), f'"ignore" is {given!r:.80}; give a whole number without quotes')
        return given
    if isinstance(given, list) and len(given) > 1:
        raise ValueError(
            f"the label {name!r} is a list of values: regions (overlapping labels) are not supported yet; give each "
            "label one value of its own"
        )
    value = _whole(given[0] if isinstance(given, list) and given else given)
    _check(
        value is not None and value <= LARGEST_VALUE,
        f"the label {name!r} has the value {given!r:.80}; give a whole number from 0 to {LARGEST_VALUE}",
    )
    return value


def _layout(fields: dict, folder: Path) -> Layout:
    """How the files are named, by dataset.json and by what is there. Raises ValueError."""
    is_old = "channel_names" not in fields and "file_ending" not in fields
    names = _names(folder / IMAGES)[0]
    by_there = next((end for end in ENDINGS if any(name.endswith(end) for name in names)), ENDINGS[0])
    if is_old:
        ending = by_there if by_there == ".nii" else ".nii.gz"
    else:
        ending = fields.get("file_ending")
        _check("file_ending" in fields, f'has no "file_ending"; add "file_ending": "{by_there}"')
        if isinstance(ending, str) and f".{ending}" in ENDINGS:
            raise ValueError(f'"file_ending" lacks its dot; write "file_ending": ".{ending}"')
        _check(ending in ENDINGS, f'"file_ending" is {ending!r:.80}; what can be read is {" ".join(ENDINGS)}')
    if "dataset" in fields:
        _table(fields)
        return Layout(TABLE, ending)
    images = {name.removesuffix(ending) for name in names if name.endswith(ending)}
    labels = {name.removesuffix(ending) for name in _names(folder / LABELS)[0]} | set(_training_ids(fields, ending))
    if any(f"{label}_0000" in images for label in labels):
        return Layout(NUMBERED, ending)
    is_plain = images & labels or (is_old and not any(image.endswith("_0000") for image in images))
    return Layout(PLAIN if is_plain else NUMBERED, ending)


def _training_ids(fields: dict, ending: str) -> list[str]:
    """The cases that the list "training" of the old formats names, by the names of their labels."""
    entries = fields.get("training")
    entries = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    paths = (one.get("label", one.get("image")) for one in entries)
    return [re.split(r"[/\\]", path)[-1].removesuffix(ending) for path in paths if isinstance(path, str)]


def _table(fields: dict) -> dict[str, tuple[list[str], str | None]]:
    """The files of the training cases by id, where dataset.json lists them: images, and label. Raises ValueError."""
    table = fields["dataset"]
    _check(
        isinstance(table, dict) and table, '"dataset" is no table of cases; leave it out to have the folders searched'
    )
    files = {}
    for id_, entry in table.items():
        example = f'"{id_}": {{"images": ["{IMAGES}/a_0000.nii.gz"], "label": "{LABELS}/a.nii.gz"}}'
        _check(_is_file_name(id_), f'the case {id_!r:.80} of "dataset" cannot be the name of a file; rename it')
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        paths = [*images, *([] if label is None else [label])] if isinstance(images, list) and images else [None]
        _check(
            all(isinstance(path, str) and path and "\0" not in path for path in paths),
            f'the case "{id_}" of "dataset" does not name its files; write it as {example}',
        )
        files[id_] = (images, label)
    return files


# --- files ------------------------------------------------------------------------------------------------------------


def find_cases(layout: Layout, root: Path) -> list[SubjectFiles]:
    """The training cases under a raw folder, their images in the order of the channels; none: no such folder. A label
    that is not there is None. Raises InputError."""
    root = Path(root)
    if layout.naming == TABLE:
        if not (root / "dataset.json").is_file():
            return []
        return _cases_of_table(root, read_json(root / "dataset.json"))
    return _cases(_scan(root / IMAGES, layout), _scan(root / LABELS, layout._replace(naming=PLAIN)))


def find_tests(layout: Layout, root: Path) -> list[SubjectFiles]:
    """The test cases under a raw folder, without labels: those in imagesTs or, where there is no such folder, those
    that the list "test" of dataset.json names. Raises InputError."""
    root = Path(root)
    if (root / TESTS).is_dir() or not (root / "dataset.json").is_file():
        return _cases(_scan(root / TESTS, layout))
    listed = read_json(root / "dataset.json").get("test")
    entries = (
        [one.get("image") if isinstance(one, dict) else one for one in listed if one]
        if isinstance(listed, list)
        else []
    )
    paths = [root / one for one in entries if isinstance(one, str) and "\0" not in one]
    scans = {path.parent: _scan(path.parent, layout).found for path in paths}
    ids = {path: path.name.removesuffix(layout.file_ending) for path in paths}
    found = {id_: scans[path.parent][id_] for path, id_ in ids.items() if id_ in scans[path.parent]}
    return _cases(Scan(found))


def _cases(images: Scan, labels: Scan | None = None) -> list[SubjectFiles]:
    label_of = {id_: files[0] for id_, files in labels.found.items()} if labels else {}
    return [
        SubjectFiles(id_, tuple(files[number] for number in sorted(files)), label_of.get(id_))
        for id_, files in sorted(images.found.items())
    ]


def _cases_of_table(root: Path, fields: dict) -> list[SubjectFiles]:
    try:
        table = _table(fields)
    except (KeyError, ValueError) as error:
        raise InputError(f'{root / "dataset.json"}: has no usable table "dataset" ({error})') from error
    labels = {
        id_: root / label if label and os.path.lexists(root / label) else None for id_, (_, label) in table.items()
    }
    return [SubjectFiles(id_, tuple(root / image for image in table[id_][0]), labels[id_]) for id_ in sorted(table)]


def _names(folder: Path) -> tuple[list[str], int]:
    """The names of the files in a folder, in ascending order, and how many more begin with a dot (as the "._NAME" that
    macOS puts into archives). Links that lead nowhere count; no such folder has none. Raises InputError."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); mend its permissions") from error
    visible = [name for name in names if not name.startswith(".")]
    return visible, len(names) - len(visible)


def _scan(folder: Path, layout: Layout) -> Scan:
    number = "" if layout.naming == PLAIN else "_([0-9]{4})"
    pattern = re.compile(f"(.+?){number}{re.escape(layout.file_ending)}", re.DOTALL)
    names, n_hidden = _names(folder)
    found: dict[str, dict[int, Path]] = {}
    others = []
    for name in names:
        if match := pattern.fullmatch(name):
            id_, *digits = match.groups()
            found.setdefault(id_, {})[int(digits[0]) if digits else 0] = folder / name
        else:
            others.append(name)
    return Scan(found, others, n_hidden)


def listing(dataset: BaseDataset, folder: str | Path) -> Listing:
    """What a raw folder holds, without a look into its images, and all that is wrong with its names.

    Where each case has one file only, this file must hold all channels: whoever reads it must see to that. Raises
    InputError where dataset.json or a folder cannot be read.
    """
    folder = raw_folder(folder)
    fields, layout = read_json(folder / "dataset.json"), dataset.find.args[0]
    cases, tests = dataset.find(folder), dataset.find_test(folder)
    scans = {
        IMAGES: _scan(folder / IMAGES, layout),
        LABELS: _scan(folder / LABELS, layout._replace(naming=PLAIN)),
        TESTS: _scan(folder / TESTS, layout),
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
    if "numTraining" in fields and _whole(given) != len(cases):
        problems.append(
            f'"numTraining" is {given!r:.80}, but there are {len(cases)} cases; correct it in dataset.json, or '
            "complete the files"
        )
    notes = [f"{TESTS}: {line}; it cannot be predicted" for line in _wrong_channels(dataset, layout, tests)]
    return Listing(cases, tests, problems, _notes(dataset, layout, scans) + notes)


def _some(names: Iterable[object], n: int = 3) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _nothing_found(folder: Path, layout: Layout) -> str:
    if not (folder / IMAGES).is_dir():
        return f"{folder}: has no folder {IMAGES}; put the images there as {layout.expected}"
    names, _ = _names(folder / IMAGES)
    there = f"the first files there are {', '.join(names[:3])}" if names else "it is empty"
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
        there = f"the first files there are {', '.join(labels.others[:3])}" if labels.others else "it is empty"
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
    ends = {name: next((end for end in ENDINGS if name.endswith(end)), None) for name in scan.others}
    twins = {name: name.removesuffix(end) + layout.file_ending for name, end in ends.items() if end}
    return [
        f"{place}: both {twin} and {name} are there; take away the one that is not meant"
        for name, twin in twins.items()
        if twin in found
    ]


def _against_training_list(fields: dict, layout: Layout, ids: list[str]) -> list[str]:
    """What the list "training" of the old formats says otherwise than the folder."""
    listed = _training_ids(fields, layout.file_ending)
    mend = 'correct "training" in dataset.json, or the files'
    lines = []
    if doubles := sorted({id_ for id_ in listed if listed.count(id_) > 1} if len(set(listed)) < len(listed) else ()):
        lines.append(f'"training" names {_some(doubles)} twice; {mend}')
    if absent := sorted(set(listed) - set(ids)):
        lines.append(f'"training" names {_some(absent)}, which {IMAGES} does not have; {mend}')
    if listed and (unlisted := sorted(set(ids) - set(listed))):
        lines.append(f'"training" does not name {_some(unlisted)}, which {IMAGES} has; {mend}')
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
            notes.append(f"{place}: left {len(strangers)} other files aside ({_some(strangers)}); expected {expected}")
    return notes


def _is_sidecar(name: str, layout: Layout) -> bool:
    """Whether a file gives the spacing of a TIFF."""
    return layout.file_ending in (".tif", ".tiff") and name.endswith(".json")


# --- the definition as JSON -------------------------------------------------------------------------------------------

KEPT = (  # fields that are written as they are
    "name",
    "class_names",
    "values",
    "ignore",
    "channels",
    "patch_size",
    "defaults",
    "folds",
    "patches_per_volume",
    "licence",
)


def as_dict(dataset: BaseDataset) -> dict:
    """A definition that `read_dataset` gave, with what a plan has added, as JSON has it."""
    fields = {name: getattr(dataset, name) for name in KEPT} | dataset.find.args[0]._asdict()
    fields |= {"preprocessing": dataset.preprocessing.as_dict(), "merged_labels": dataset.merged_labels}
    return json.loads(json.dumps(fields, allow_nan=False))


def of_dict(fields: dict) -> BaseDataset:
    """What `as_dict` gave. Raises KeyError, TypeError or ValueError for anything else, or what makes no sense."""
    _check(isinstance(fields, dict), f"the definition of a data set is {fields!r:.80}")
    _check(set(fields) <= set(VALID), f"unknown: {_some(map(str, set(fields) - set(VALID)))}")
    for name, is_valid in VALID.items():
        _check(is_valid(fields[name]), f"{name} is {fields[name]!r:.80}")
    names, channels = fields["class_names"], fields["channels"]
    values = [*(fields["values"] or range(len(names))), fields["ignore"]]
    _check(len(set(values)) == len(values) == len(names) + 1 == len(set(names)) + 1, "the labels are not distinct")
    preprocessing = Preprocessing.of_dict(fields["preprocessing"])
    _check(len(preprocessing.normalizations) in (0, len(channels)), "not a normalization for each channel")
    given = {name: _tuples(fields[name]) for name in KEPT}
    given["defaults"] = {name: _tuples(value) for name, value in fields["defaults"].items()}
    given["folds"] = tuple({part: tuple(ids) for part, ids in fold.items()} for fold in fields["folds"])
    merged = {int(value): label for value, label in fields["merged_labels"].items()}
    layout = Layout(fields["naming"], fields["file_ending"])
    return BaseDataset(**given, preprocessing=preprocessing, merged_labels=merged, **_found_by(layout))


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# What each field may be: the file may come from a stranger.


def _list_of(is_valid: Callable[[Any], bool], low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(is_valid, value))


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_size(value: object) -> bool:
    return _is_int(value, 1, 2**14)


def _is_length(value: object) -> bool:
    return _is_number(value) and 1e-6 < value < 1e6


def _is_value(value: object) -> bool:
    return _is_int(value, 0, LARGEST_VALUE)


def _are_values(value: object) -> bool:
    """Whether these are the values of classes: ascending, from the background's."""
    return _list_of(_is_value, 0, LARGEST_VALUE + 1)(value) and value == sorted({0, *value} if value else ())


def _is_setting(value: object, depth: int = 3) -> bool:
    """Whether this may be the default of a setting: a number, a text, or short lists of them."""
    if isinstance(value, list):
        return depth > 0 and len(value) <= 100 and all(_is_setting(one, depth - 1) for one in value)
    return value is None or _is_bool(value) or _is_number(value) or (isinstance(value, str) and len(value) < 1000)


def _are_defaults(value: object) -> bool:
    return isinstance(value, dict) and set(value) <= set(PUBLISHED) and all(map(_is_setting, value.values()))


def _is_fold(value: object) -> bool:
    are_ids = _list_of(_is_file_name, 0, 10**6)
    return isinstance(value, dict) and set(value) == {"train", "val"} and all(map(are_ids, value.values()))


def _is_merged(value: object) -> bool:
    return isinstance(value, dict) and all(_is_value(_whole(old)) and _is_value(new) for old, new in value.items())


def _is_orientation(value: object) -> bool:
    return isinstance(value, str) and sorted(value.translate(str.maketrans("RPS", "LAI"))) == ["A", "I", "L"]


def _is_normalization(value: object) -> bool:
    return isinstance(value, dict) and all(
        one in SCHEMES if name == "scheme" else _is_bool(one) if name == "masked" else _is_number(one)
        for name, one in value.items()
    )


def _is_preprocessing(value: object) -> bool:
    valid = {
        "spacing_mm": _list_of(_or_none(_is_length), 3, 3),
        "clip": _or_none(_list_of(_is_number, 2, 2)),
        "shift": _is_number,
        "scale": _or_none(lambda one: _is_number(one) and one != 0),
        "min_size": _or_none(_list_of(_is_size, 3, 3)),
        "zscore": _is_bool,
        "orientation": _is_orientation,
        "normalizations": _list_of(_is_normalization, 0, 1000),
        "crop": _is_bool,
    }
    return isinstance(value, dict) and set(value) <= set(valid) and all(valid[name](value[name]) for name in value)


VALID = {
    "name": _is_file_name,
    "class_names": _list_of(_is_text, 2, LARGEST_VALUE + 1),
    "values": _are_values,
    "ignore": _or_none(_is_value),
    "channels": _list_of(_is_text, 1, 1000),
    "patch_size": _list_of(_is_size, 2, 3),
    "defaults": _are_defaults,
    "folds": _list_of(_is_fold, 0, 1000),
    "patches_per_volume": _or_none(lambda value: _is_int(value, 1, 10**6)),
    "licence": lambda value: value == "" or _is_text(value),
    "preprocessing": _is_preprocessing,
    "merged_labels": _is_merged,
    "naming": lambda value: value in (NUMBERED, PLAIN, TABLE),
    "file_ending": lambda value: value in ENDINGS,
}

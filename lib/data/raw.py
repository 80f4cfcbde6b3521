"""Data sets in nnU-Net's raw format: a folder with dataset.json, imagesTr, labelsTr and, for a test set, imagesTs.

Version 2, version 1 and the Medical Segmentation Decathlon are read. Nothing here needs torch.
"""

import os
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.data.images import SUFFIXES
from lib.system.error import InputError
from lib.system.files import read_json

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
        check(is_file_name(folder.name), "the name of its folder names the data set; give the folder a printable one")
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
        licence=licence if is_text(licence) else "",
        **found_by(layout),
    )


def n_labels(dataset: BaseDataset) -> int:
    """The number of labels that dataset.json names, with the background and "ignore"."""
    return dataset.n_classes + (dataset.ignore is not None)


def found_by(layout: Layout) -> dict[str, Any]:
    """The fields of a definition that follow from the layout."""
    return {
        "find": partial(find_cases, layout),
        "find_test": partial(find_tests, layout),
        "file_ending": layout.file_ending,
        "layout": f"{IMAGES}/{layout.expected}",
        "test_share": 0.0,
    }


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are, for messages."""
    names = [name if name.isprintable() else ascii(name) for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check(condition: object, text: str) -> None:
    if not condition:
        raise ValueError(text)


def is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()


def is_file_name(value: object) -> bool:
    return is_text(value) and not value.startswith(".") and not {"/", "\\"} & set(value)


def is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def whole(value: object) -> int | None:
    """The number 0, 1, 2, ... that an int or a text is; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return int(value)
    return value if is_int(value, 0, 10**9) else None


def _channels(fields: dict) -> tuple[str, ...]:
    """The names of the channels, in the order of their numbers. Raises ValueError."""
    key = "channel_names" if "channel_names" in fields else "modality"
    names, mend = fields.get(key), 'write for instance "channel_names": {"0": "T2", "1": "ADC"}'
    check(key in fields, f'has no "channel_names"; {mend}')
    check(isinstance(names, dict) and names, f'"{key}" is no table of channels by number; {mend}')
    numbers = [whole(number) for number in names]
    if None in numbers and None not in map(whole, names.values()):
        raise ValueError(f'"{key}" is the wrong way round; {mend}, numbers first')
    check(
        None not in numbers and sorted(numbers) == list(range(len(names))),
        f'the channels of "{key}" are numbered {" ".join(list(names)[:9])}; number them '
        f"{' '.join(map(str, range(min(len(names), 9))))}, like the files",
    )
    by_number = dict(zip(numbers, names.values(), strict=True))
    channels = tuple(by_number[number] for number in range(len(names)))
    check(all(map(is_text, channels)), f'"{key}" names a channel {channels!r:.80}; give each a name; {mend}')
    return channels


def _labels(fields: dict) -> tuple[dict[int, str], int | None]:
    """The names by value, and the value of "ignore". Raises ValueError.

    They may be given as names with their values or, as in version 1, as values with their names.
    """
    labels, mend = fields.get("labels"), 'write for instance "labels": {"background": 0, "tumor": 1}'
    check("labels" in fields, f'has no "labels"; {mend}')
    check(isinstance(labels, dict) and labels, f'"labels" is no table of values by name; {mend}')
    values_first = None not in map(whole, labels) and any(
        isinstance(name, str) and whole(name) is None for name in labels.values()
    )
    pairs = [(name, int(value)) for value, name in labels.items()] if values_first else list(labels.items())
    by_value: dict[int, str] = {}
    for name, given in pairs:
        check(is_text(name), f"the name of a label is {name!r:.80}; give a short text")
        value = _label_value(name, given)
        check(
            value not in by_value,
            f"the labels {by_value.get(value)!r} and {name!r} both have the value {value}; {mend}",
        )
        by_value[value] = name
    check(len(set(by_value.values())) == len(by_value), f"two labels have the same name; {mend}")
    ignore = next((value for value, name in by_value.items() if name == "ignore"), None)
    names = {value: name for value, name in by_value.items() if name != "ignore"}
    check(0 in names, 'no label has the value 0, the background; add "background": 0 to "labels"')
    check(len(names) > 1, f'"labels" has nothing but the background; {mend}')
    return names, ignore


def _label_value(name: str, given: object) -> int:
    """The value of a label, from what stands behind its name. Raises ValueError."""
    if name == "ignore":
        check(is_int(given, 0, LARGEST_VALUE), f'"ignore" is {given!r:.80}; give a whole number without quotes')
        return given
    if isinstance(given, list) and len(given) > 1:
        raise ValueError(
            f"the label {name!r} is a list of values: regions (overlapping labels) are not supported yet; give each "
            "label one value of its own"
        )
    value = whole(given[0] if isinstance(given, list) and given else given)
    check(
        value is not None and value <= LARGEST_VALUE,
        f"the label {name!r} has the value {given!r:.80}; give a whole number from 0 to {LARGEST_VALUE}",
    )
    return value


def _layout(fields: dict, folder: Path) -> Layout:
    """How the files are named, by dataset.json and by what is there. Raises ValueError."""
    is_old = "channel_names" not in fields and "file_ending" not in fields
    names = names_in(folder / IMAGES)[0]
    by_there = next((end for end in SUFFIXES if any(name.endswith(end) for name in names)), SUFFIXES[0])
    if is_old:
        ending = by_there if by_there == ".nii" else ".nii.gz"
    else:
        ending = fields.get("file_ending")
        check("file_ending" in fields, f'has no "file_ending"; add "file_ending": "{by_there}"')
        if isinstance(ending, str) and f".{ending}" in SUFFIXES:
            raise ValueError(f'"file_ending" lacks its dot; write "file_ending": ".{ending}"')
        check(ending in SUFFIXES, f'"file_ending" is {ending!r:.80}; what can be read is {" ".join(SUFFIXES)}')
    if "dataset" in fields:
        _table(fields)
        return Layout(TABLE, ending)
    images = {name.removesuffix(ending) for name in names if name.endswith(ending)}
    labels = {name.removesuffix(ending) for name in names_in(folder / LABELS)[0]} | set(training_ids(fields, ending))
    if any(f"{label}_0000" in images for label in labels):
        return Layout(NUMBERED, ending)
    is_plain = images & labels or (is_old and not any(image.endswith("_0000") for image in images))
    return Layout(PLAIN if is_plain else NUMBERED, ending)


def training_ids(fields: dict, ending: str) -> list[str]:
    """The cases that the list "training" of the old formats names, by the names of their labels."""
    entries = fields.get("training")
    entries = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    paths = (one.get("label", one.get("image")) for one in entries)
    return [re.split(r"[/\\]", path)[-1].removesuffix(ending) for path in paths if isinstance(path, str)]


def _table(fields: dict) -> dict[str, tuple[list[str], str | None]]:
    """The files of the training cases by id, where dataset.json lists them: images, and label. Raises ValueError."""
    table = fields["dataset"]
    check(
        isinstance(table, dict) and table, '"dataset" is no table of cases; leave it out to have the folders searched'
    )
    files = {}
    for id_, entry in table.items():
        example = f'"{id_}": {{"images": ["{IMAGES}/a_0000.nii.gz"], "label": "{LABELS}/a.nii.gz"}}'
        check(is_file_name(id_), f'the case {id_!r:.80} of "dataset" cannot be the name of a file; rename it')
        images, label = (entry.get("images"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        paths = [*images, *([] if label is None else [label])] if isinstance(images, list) and images else [None]
        check(
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
    return _cases(scan_folder(root / IMAGES, layout), scan_folder(root / LABELS, layout._replace(naming=PLAIN)))


def find_tests(layout: Layout, root: Path) -> list[SubjectFiles]:
    """The test cases under a raw folder, without labels: those in imagesTs or, where there is no such folder, those
    that the list "test" of dataset.json names. Raises InputError."""
    root = Path(root)
    if (root / TESTS).is_dir() or not (root / "dataset.json").is_file():
        return _cases(scan_folder(root / TESTS, layout))
    listed = read_json(root / "dataset.json").get("test")
    entries = (
        [one.get("image") if isinstance(one, dict) else one for one in listed if one]
        if isinstance(listed, list)
        else []
    )
    paths = [root / one for one in entries if isinstance(one, str) and "\0" not in one]
    scans = {path.parent: scan_folder(path.parent, layout).found for path in paths}
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


def names_in(folder: Path) -> tuple[list[str], int]:
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


def scan_folder(folder: Path, layout: Layout) -> Scan:
    number = "" if layout.naming == PLAIN else "_([0-9]{4})"
    pattern = re.compile(f"(.+?){number}{re.escape(layout.file_ending)}")
    names, n_hidden = names_in(folder)
    found: dict[str, dict[int, Path]] = {}
    others = []
    for name in names:
        match = pattern.fullmatch(name)
        if match and is_file_name(match[1]):
            id_, *digits = match.groups()
            found.setdefault(id_, {})[int(digits[0]) if digits else 0] = folder / name
        else:
            others.append(name)
    return Scan(found, others, n_hidden)

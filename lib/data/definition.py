"""The definition of a data set in nnU-Net's raw format as JSON, with what a plan has added. Without torch."""

import json
import math
from collections.abc import Callable
from typing import Any

from lib.data.BaseDataset import PUBLISHED, BaseDataset, Preprocessing
from lib.data.images import SUFFIXES
from lib.data.normalization import SCHEMES
from lib.data.raw import (
    LARGEST_VALUE,
    NUMBERED,
    PLAIN,
    TABLE,
    Layout,
    check,
    found_by,
    is_file_name,
    is_int,
    is_text,
    some,
    whole,
)

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
    check(isinstance(fields, dict), f"the definition of a data set is {fields!r:.80}")
    check(set(fields) <= set(VALID), f"unknown: {some(map(str, set(fields) - set(VALID)))}")
    for name, is_valid in VALID.items():
        check(is_valid(fields[name]), f"{name} is {fields[name]!r:.80}")
    names, channels = fields["class_names"], fields["channels"]
    values = [*(fields["values"] or range(len(names))), fields["ignore"]]
    check(len(set(values)) == len(values) == len(names) + 1 == len(set(names)) + 1, "the labels are not distinct")
    preprocessing = Preprocessing.of_dict(fields["preprocessing"])
    check(len(preprocessing.normalizations) in (0, len(channels)), "not a normalization for each channel")
    given = {name: _tuples(fields[name]) for name in KEPT}
    given["defaults"] = {name: _tuples(value) for name, value in fields["defaults"].items()}
    given["folds"] = tuple({part: tuple(ids) for part, ids in fold.items()} for fold in fields["folds"])
    merged = {int(value): label for value, label in fields["merged_labels"].items()}
    layout = Layout(fields["naming"], fields["file_ending"])
    return BaseDataset(**given, preprocessing=preprocessing, merged_labels=merged, **found_by(layout))


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# What each field may be: the file may come from a stranger.


def _list_of(is_valid: Callable[[Any], bool], low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(is_valid, value))


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_size(value: object) -> bool:
    return is_int(value, 1, 2**14)


def _is_length(value: object) -> bool:
    return _is_number(value) and 1e-6 < value < 1e6


def _is_value(value: object) -> bool:
    return is_int(value, 0, LARGEST_VALUE)


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
    are_ids = _list_of(is_file_name, 0, 10**6)
    return isinstance(value, dict) and set(value) == {"train", "val"} and all(map(are_ids, value.values()))


def _is_merged(value: object) -> bool:
    return isinstance(value, dict) and all(_is_value(whole(old)) and _is_value(new) for old, new in value.items())


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
        "by_index": _is_bool,
        "padding_counts": _is_bool,
    }
    return isinstance(value, dict) and set(value) <= set(valid) and all(valid[name](value[name]) for name in value)


VALID = {
    "name": is_file_name,
    "class_names": _list_of(is_text, 2, LARGEST_VALUE + 1),
    "values": _are_values,
    "ignore": _or_none(_is_value),
    "channels": _list_of(is_text, 1, 1000),
    "patch_size": _list_of(_is_size, 2, 3),
    "defaults": _are_defaults,
    "folds": _list_of(_is_fold, 0, 1000),
    "patches_per_volume": _or_none(lambda value: is_int(value, 1, 10**6)),
    "licence": lambda value: value == "" or is_text(value),
    "preprocessing": _is_preprocessing,
    "merged_labels": _is_merged,
    "naming": lambda value: value in (NUMBERED, PLAIN, TABLE),
    "file_ending": lambda value: value in SUFFIXES,
}

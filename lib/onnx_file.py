"""What a file OUT.onnx of `python -m lib.export` holds, read with care: it may come from a stranger. Without torch, and
without onnx.

The file is data: a chain of known layers with their weights, and in its properties, as JSON, what a prediction needs to
know. All of it is checked before anything is made of it.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.data.BaseDataset import BaseDataset, Preprocessing, SubjectFiles
from lib.data.definition import VALID
from lib.data.raw import check, is_file_name, is_int, is_text
from lib.postprocessing import FOREGROUND, Step
from lib.system.error import InputError
from lib.system.files import digest, joint_digest

FORMAT = 1  # of the metadata
KEY, SUM, NOTICE = "sauron", "sauron_sha256", "notice"  # properties of the file
RESEARCH = "For research use only: no medical device, not validated for clinical use."
IMAGE, PROBABILITIES = "image", "probabilities"  # input and output of the graph
OPSET, IR_VERSION = 17, 8
KINDS = {"f": 1, "i": 2, "ints": 7}  # of attributes, as their type says
EPSILON, SLOPE = 1e-5, 0.01  # of the instance norm, and of the leaky ReLU
DIMS = ("batch", "axis_1", "axis_2", "axis_3")  # names of the sizes that are free; the channels lie behind the first
LARGEST = 2**31 - 1  # bytes of a file
MOST_PARTS = 10**6  # of the whole file
MOST_TENSORS = 1000
WIDEST = 2**16  # maps
LONGEST = 99  # of a kernel or stride
LARGEST_PATCH = 2**28  # voxels
MEND = "give a file that `python -m lib.export` wrote"


# --- the wire format --------------------------------------------------------------------------------------------------
#
# What the messages of onnx.proto hold, by the number of the field: its name and kind. A kind is one of the words below,
# or the fields of a message in turn; [kind] may come several times. What is only named here is not in our files.

INT, FLOAT, TEXT, BYTES, ABSENT = "int", "float", "text", "bytes", "absent"
WIRE = {INT: 0, FLOAT: 5}  # the type on the wire; 2 (with a length) for all others

ENTRY = {1: ("key", TEXT), 2: ("value", TEXT)}
TENSOR = {
    1: ("dims", [INT]),
    2: ("data_type", INT),
    **dict.fromkeys((4, 5, 6, 7, 10, 11), ("values that are not raw", ABSENT)),
    8: ("name", TEXT),
    9: ("raw_data", BYTES),
    13: ("external_data", [ENTRY]),
    14: ("data_location", INT),
}
ATTRIBUTE = {
    1: ("name", TEXT),
    2: ("f", FLOAT),
    3: ("i", INT),
    **dict.fromkeys((6, 11), ("a subgraph", ABSENT)),
    8: ("ints", [INT]),
    20: ("type", INT),
}
NODE = {
    1: ("input", [TEXT]),
    2: ("output", [TEXT]),
    3: ("name", TEXT),
    4: ("op_type", TEXT),
    5: ("attribute", [ATTRIBUTE]),
    7: ("domain", TEXT),
}
SHAPE = {1: ("dim", [{1: ("dim_value", INT), 2: ("dim_param", TEXT)}])}
VALUE = {1: ("name", TEXT), 2: ("type", {1: ("tensor_type", {1: ("elem_type", INT), 2: ("shape", SHAPE)})})}
GRAPH = {
    1: ("node", [NODE]),
    2: ("name", TEXT),
    5: ("initializer", [TENSOR]),
    11: ("input", [VALUE]),
    12: ("output", [VALUE]),
    15: ("sparse weights", ABSENT),
}
MODEL = {
    1: ("ir_version", INT),
    2: ("producer_name", TEXT),
    3: ("producer_version", TEXT),
    4: ("domain", TEXT),
    5: ("model_version", INT),
    6: ("doc_string", TEXT),
    7: ("graph", BYTES),  # read when the rest is known to be right
    8: ("opset_import", [{1: ("domain", TEXT), 2: ("version", INT)}]),
    14: ("metadata_props", [ENTRY]),
    20: ("training information", ABSENT),
    25: ("functions", ABSENT),
    26: ("devices", ABSENT),
}


class _Reader:
    """Reads messages, `MOST_PARTS` parts in all. Raises ValueError for what is none."""

    def __init__(self) -> None:
        self.parts = 0

    def message(self, data: memoryview, kinds: dict[int, tuple[str, Any]], what: str) -> dict[str, Any]:
        """The fields of a message by name; of those that may come several times a list, of the others None where they
        are missing. `what` it is, for messages."""
        found = {name: [] if isinstance(kind, list) else None for name, kind in kinds.values() if kind != ABSENT}
        at = 0
        while at < len(data):
            key, at = self._varint(data, at)
            number, wire = key >> 3, key & 7
            name, kind = kinds.get(number, (None, None))
            check(name, f"is no ONNX file, a damaged one, or of another kind (part {number} of the {what})")
            check(kind != ABSENT, f"holds {name}, which no exported model has")
            several = isinstance(kind, list)
            kind = kind[0] if several else kind
            packed = several and kind == INT and wire == 2
            check(packed or wire == (WIRE.get(kind, 2) if isinstance(kind, str) else 2), f"is damaged ({what}: {name})")
            if packed:
                part, at = self._delimited(data, at)
                inner = 0
                while inner < len(part):
                    value, inner = self._varint(part, inner)
                    found[name].append(_signed(value))
                continue
            value, at = self._value(data, at, kind, name)
            check(several or found[name] is None, f"is damaged ({what}: {name} is there twice)")
            if several:
                found[name].append(value)
            else:
                found[name] = value
        return found

    def _value(self, data: memoryview, at: int, kind: Any, name: str) -> tuple[Any, int]:
        if kind == INT:
            value, at = self._varint(data, at)
            return _signed(value), at
        if kind == FLOAT:
            check(at + 4 <= len(data), f"is damaged or not whole ({name})")
            return struct.unpack_from("<f", data, at)[0], at + 4
        part, at = self._delimited(data, at)
        if kind == BYTES:
            return part, at
        if kind == TEXT:
            check(len(part) < 2**24, f"is damaged ({name} has {len(part)} bytes)")
            return str(part, "utf-8"), at
        return self.message(part, kind, name), at

    def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
        self.parts += 1
        check(self.parts <= MOST_PARTS, f"has more than {MOST_PARTS} parts")
        value = 0
        for shift in range(0, 64, 7):
            check(at < len(data), "is no ONNX file, or not a whole one")
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value & (2**64 - 1), at
        raise ValueError("is no ONNX file, or a damaged one")

    def _delimited(self, data: memoryview, at: int) -> tuple[memoryview, int]:
        length, at = self._varint(data, at)
        check(length <= len(data) - at, "is no ONNX file, or not a whole one")
        return data[at : at + length], at + length


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# --- the network ------------------------------------------------------------------------------------------------------


PLAIN, FLAT, SHAPE_OF, LINES, MEANS = "plain", "flat", "shape", "lines", "means"
FLATTEN = (0, 0, -1)  # the shape that makes plain maps flat, as ONNX has it: keep two axes, and join the others


class Maps(NamedTuple):
    """What a layer gives. n: maps; scale: by axis, which part of the image's size theirs is (2: half of it). form:
    PLAIN (B, n, *spatial), FLAT (B, n, voxels), or only the SHAPE_OF plain ones, their means along the last axis, LINES
    (B, n, ..., 1), or along all, MEANS (B, n, 1, ...)."""

    n: int
    scale: tuple[int, ...]
    form: str = PLAIN


class Graph(NamedTuple):
    """What a network is. filters: (in, out) by the name of the convolution."""

    modalities: int
    n_classes: int
    divisor: tuple[int, ...]
    filters: dict[str, tuple[int, int]]


def _read_graph(graph: dict) -> Graph:
    """Go through a network layer by layer. Raises ValueError unless it is one that we export: from an image to softmax
    maps of its very size."""
    check(len(graph["initializer"]) <= MOST_TENSORS, f"has {len(graph['initializer'])} tensors of weights")
    tensors = {tensor["name"]: _shape_of(tensor) for tensor in graph["initializer"]}
    check(len(tensors) == len(graph["initializer"]), "has two tensors of one name")
    check(IMAGE not in tensors, "is broken: its input is a tensor of weights")
    modalities, n_axes = _read_end(graph["input"], IMAGE, "input")
    maps, filters, scales = {IMAGE: Maps(modalities, (1,) * n_axes)}, {}, []
    for node in graph["node"]:
        op, name = node["op_type"], node["name"] or "a layer without a name"
        check(not node["domain"], f"has the operator {op!s:.60} of another domain, {node['domain']!s:.60}")
        check(op in LAYERS, f"has the operator {op!s:.60}, which no exported model has ({', '.join(sorted(LAYERS))})")
        attributes = {one["name"]: one for one in node["attribute"]}
        (target,) = node["output"] if len(node["output"]) == 1 else (None,)
        check(target and target not in (*maps, *tensors), f"is broken: {name} has no output of its own")
        inputs = [key for key in node["input"] if key in maps]
        weights = [key for key in node["input"] if key in tensors]
        check(inputs and node["input"] == [*inputs, *weights], f"is broken: {name} has an input that nothing gives")
        check(len(attributes) == len(node["attribute"]), f"is broken: {name} has an attribute twice")
        try:
            forms = [maps[key].form for key in inputs]
            check(forms in FORMS.get(op, [[PLAIN] * len(inputs)]), "the form of its input")
            shapes = [tensors[key] for key in weights]
            maps[target] = LAYERS[op]([maps[key] for key in inputs], shapes, attributes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"has a layer that no exported model has ({op} {name}: {error})") from error
        check(maps[target].n <= WIDEST, f"is absurd: {name} has {maps[target].n} maps")
        scales.append(maps[target].scale)
        if op in ("Conv", "ConvTranspose"):
            check(name not in filters, f"is broken: two convolutions are called {name}")
            filters[name] = sum(maps[key].n for key in inputs), maps[target].n
    n_classes, n_out = _read_end(graph["output"], PROBABILITIES, "output")
    last = maps.get(PROBABILITIES)
    check(last == Maps(n_classes, (1,) * n_axes) and n_out == n_axes, "is broken: its output has not the image's size")
    check(graph["node"][-1]["op_type"] == "Softmax", "is broken: its last layer is no softmax")
    divisor = tuple(math.lcm(*axis) for axis in zip(*scales, strict=True))
    return Graph(modalities, n_classes, divisor, filters)


def _shape_of(tensor: dict) -> tuple[int, ...]:
    """The shape of a tensor of weights; of the one tensor that is itself a shape, `FLATTEN`. Raises ValueError unless
    weights are finite float32, and in the file."""
    name, dims = tensor["name"], tensor["dims"]
    where = ", ".join(entry["value"] or "" for entry in tensor["external_data"] if entry["key"] == "location")
    outside = tensor["external_data"] or tensor["data_location"]
    check(not outside, f"keeps weights in another file ({where!s:.60}), which is never read")
    check(name, "is broken: a tensor of weights has no name")
    if tensor["data_type"] == 7 and tensor["raw_data"] == struct.pack("<3q", *FLATTEN) and dims == [3]:
        return FLATTEN
    check(tensor["data_type"] == 1, f"has weights that are no float32 ({name:.60})")
    check(1 <= len(dims) <= 5 and all(1 <= n <= WIDEST for n in dims), f"has weights of an absurd size ({name:.60})")
    raw = tensor["raw_data"]
    n_bytes = 0 if raw is None else len(raw)
    check(4 * math.prod(dims) == n_bytes, f"is broken: {name:.60} has {n_bytes} bytes for {math.prod(dims)} numbers")
    check(np.isfinite(np.frombuffer(raw, "<f4")).all(), f"has weights that are not finite ({name:.60})")
    return tuple(dims)


def _read_end(values: list[dict], name: str, which: str) -> tuple[int, int]:
    """The number of channels of the one input (output), and of its spatial axes. Raises ValueError unless it is (B, C,
    spatial...) float32 with free sizes."""
    wrong = f"has not one {which} {name!r}, (batch, channels, 2 or 3 axes) of float32 with free sizes"
    check(len(values) == 1 and values[0]["name"] == name, wrong)
    tensor = (values[0]["type"] or {}).get("tensor_type") or {}
    dims = (tensor.get("shape") or {"dim": []})["dim"]
    names = [dim["dim_param"] for dim in dims]
    check(tensor.get("elem_type") == 1 and len(dims) in (4, 5), wrong)
    check(names == [DIMS[0], None, *DIMS[1 : len(dims) - 1]], wrong)
    check(all((dim["dim_value"] is None) == bool(dim["dim_param"]) for dim in dims), wrong)
    check(1 <= dims[1]["dim_value"] <= WIDEST, wrong)
    return dims[1]["dim_value"], len(dims) - 2


# One layer of each kind: what it gives for the maps of its inputs, the shapes of its weights, and its attributes. They
# raise KeyError, TypeError or ValueError for a layer that is not as `lib.export` writes it.


def _conv(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    (x,), (weight, bias) = inputs, weights
    kernel, strides = weight[2:], _ints(attributes, "strides")
    check(weight[1] == x.n and bias == weight[:1] and len(kernel) == len(x.scale) == len(strides), "its weights")
    check(all(k % 2 and k <= LONGEST for k in kernel), "its kernel")
    pads = tuple(k // 2 for k in kernel)
    given = {"kernel_shape": kernel, "pads": (*pads, *pads), "strides": strides}
    check(all(_ints(attributes, name) == value for name, value in given.items()), "its size")
    check(set(attributes) == set(given) and all(1 <= s <= LONGEST for s in strides), "its attributes")
    scale = tuple(a * b for a, b in zip(x.scale, strides, strict=True))
    check(max(scale) <= 2**14, "its strides")
    return Maps(weight[0], scale)


def _conv_transpose(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    (x,), (weight, bias) = inputs, weights
    kernel, strides = weight[2:], _ints(attributes, "strides")
    check(weight[0] == x.n and bias == weight[1:2] and len(kernel) == len(x.scale), "its weights")
    check(kernel == strides == _ints(attributes, "kernel_shape"), "its size")
    check(set(attributes) == {"kernel_shape", "strides"}, "its attributes")
    check(all(1 <= s <= LONGEST and n % s == 0 for n, s in zip(x.scale, strides, strict=True)), "its strides")
    return Maps(weight[1], tuple(n // s for n, s in zip(x.scale, strides, strict=True)))


def _instance_norm(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    (x,) = inputs
    check(weights == [(x.n,)] * 2, "its weights")
    check(
        set(attributes) == {"epsilon"} and _attribute(attributes, "epsilon", "f") == np.float32(EPSILON), "its epsilon"
    )
    return x


def _leaky_relu(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    check(not weights, "its weights")
    check(set(attributes) == {"alpha"} and _attribute(attributes, "alpha", "f") == np.float32(SLOPE), "its alpha")
    return inputs[0]


def _softmax(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    check(not weights and set(attributes) == {"axis"} and _attribute(attributes, "axis", "i") == 1, "its axis")
    return inputs[0]


def _concat(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    check(not weights and set(attributes) == {"axis"} and _attribute(attributes, "axis", "i") == 1, "its axis")
    check(len({maps.scale for maps in inputs}) == 1, "its sizes")
    return Maps(sum(maps.n for maps in inputs), inputs[0].scale)


def _attribute(attributes: dict, name: str, kind: str) -> Any:
    """The value of an attribute of the `kind` "f", "i" or "ints". Raises KeyError, or ValueError for another kind."""
    one = attributes[name]
    others = [one[key] for key in KINDS if key != kind]
    check(one["type"] == KINDS[kind] and one[kind] is not None and not any(others), f"its {name}")
    return one[kind]


def _shape(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    check(not weights and not attributes, "its attributes")
    return inputs[0]._replace(form=SHAPE_OF)


def _reshape(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    """Make plain maps flat, or flat ones plain again."""
    x, *shapes = inputs
    check(not attributes, "its attributes")
    if not shapes:
        check(weights == [FLATTEN], "its shape")
        return x._replace(form=FLAT)
    check(not weights and shapes == [x._replace(form=SHAPE_OF)], "its shape")
    return x._replace(form=PLAIN)


def _reduce_mean(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    """Along the last axis, and then along the others."""
    (x,) = inputs
    axes = tuple(range(2, 2 + len(x.scale)))
    check(not weights and set(attributes) == {"axes", "keepdims"}, "its attributes")
    check(_attribute(attributes, "keepdims", "i") == 1, "its keepdims")
    check(_ints(attributes, "axes") == (axes[-1:] if x.form == PLAIN else axes[:-1]), "its axes")
    return x._replace(form=LINES if x.form == PLAIN else MEANS)


def _by_voxel(inputs: list[Maps], weights: list[tuple[int, ...]], attributes: dict) -> Maps:
    """Maps of one size voxel by voxel, or with their means, or with one number."""
    check(not attributes and weights in ([], [(1,)]), "its attributes, or weights")
    check(len({maps[:2] for maps in inputs}) == 1, "its sizes")
    return inputs[0]


def _ints(attributes: dict, name: str) -> tuple[int, ...]:
    return tuple(_attribute(attributes, name, "ints"))


LAYERS: dict[str, Callable[[list[Maps], list[tuple[int, ...]], dict], Maps]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "InstanceNormalization": _instance_norm,
    "LeakyRelu": _leaky_relu,
    "Softmax": _softmax,
    "Concat": _concat,
    "Shape": _shape,
    "Reshape": _reshape,
    "ReduceMean": _reduce_mean,
    **dict.fromkeys(("Add", "Mul", "Reciprocal", "Sqrt", "Sub"), _by_voxel),
}
FORMS = {  # of the inputs; of the other layers' all are plain
    "InstanceNormalization": [[FLAT]],
    "Reshape": [[PLAIN], [FLAT, SHAPE_OF]],
    "ReduceMean": [[PLAIN], [LINES]],
    "Sub": [[PLAIN, MEANS]],
    "Mul": [[PLAIN, PLAIN], [PLAIN, MEANS]],
    **dict.fromkeys(("Add", "Reciprocal", "Sqrt"), [[MEANS]]),
}


# --- the metadata -----------------------------------------------------------------------------------------------------


def axes_text(orientation: str, dim: str) -> str:
    """A sentence that says what the axes of the input are."""
    axes = ", ".join(f"axis {i} towards {LETTERS[letter]}" for i, letter in enumerate(orientation, start=1))
    text = f"(batch, channel, spatial axes). Of a volume in the orientation {orientation}: {axes}"
    return text + ("; slices along axis 3, each with axes 1 and 2." if dim == "2D" else ".")


LETTERS = {"R": "right", "L": "left", "A": "anterior", "P": "posterior", "S": "superior", "I": "inferior"}


def _is_line(value: object, longest: int = 1000) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _is_real(value: object, high: float) -> bool:
    """Whether this is None or a number from 0 to `high`."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_count(value: object) -> bool:
    return is_int(value, 1, 2**62)


def _is_object(valid: dict[str, Callable[[Any], bool]]) -> Callable[[Any], bool]:
    """Whether a value is an object that has just these keys, each valid."""
    return lambda value: (
        isinstance(value, dict)
        and set(value) == set(valid)
        and all(is_valid(value[name]) for name, is_valid in valid.items())
    )


def _are(is_valid: Callable[[Any], bool], low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and low <= len(value) <= high and all(map(is_valid, value))


def _or_null(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _is_table(is_valid: Callable[[Any], bool], low: int = 1) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and low <= len(value) <= 1000
        and all(map(is_text, value))
        and all(map(is_valid, value.values()))
    )


def _is_step(value: object) -> bool:
    return value == FOREGROUND or is_int(value, 1, 2**16)


def _are_steps(value: object) -> bool:
    return _are(_is_step, 0, 1000)(value) and len(value) == len(set(value))


_REASON = {
    "step": _is_step,
    "kept": lambda value: isinstance(value, bool),
    "dice": _are(lambda value: _is_real(value, 1), 2, 2),
    "why": _is_line,
}
_CHANGE = {"before": _or_null(_is_count), "after": _is_count}
_SCORES = {
    "dice": _are(lambda value: _is_real(value, 1), 2, 2**16),
    "HD95_mm": _are(lambda value: _is_real(value, 1e6), 2, 2**16),
    "mean_foreground_dice": lambda value: _is_real(value, 1),
    "mean_foreground_HD95_mm": lambda value: _is_real(value, 1e6),
}
METADATA = {  # what each field may be
    "format": lambda value: is_int(value, FORMAT, FORMAT),
    "notice": lambda value: value == RESEARCH,
    "made_by": _is_object(
        {
            "command": _is_line,
            "date": lambda value: _is_line(value, 40),
            "git_revision": _or_null(lambda value: _is_line(value, 64)),
            "versions": _is_table(lambda value: _is_line(value, 100)),
        }
    ),
    "model": _is_object({"name": is_file_name, "sha256": _is_digest}),
    "data": _is_object({"name": VALID["name"], "licence": VALID["licence"]}),
    "channels": VALID["channels"],
    "labels": _are(_is_object({"name": is_text, "value": lambda value: is_int(value, 0, 2**16 - 1)}), 2, 2**16),
    "file_ending": VALID["file_ending"],
    "preprocessing": VALID["preprocessing"],
    "dim": lambda value: value in ("2D", "3D"),
    "patch_size": VALID["patch_size"],
    "divisor": _are(_is_count, 2, 3),
    "axes": _is_line,
    "mirroring": _is_object({"axes": lambda value: value in ([2, 3], [2, 3, 4])}),  # all are averaged over
    "step_size": lambda value: value == 0.5,
    "postprocessing": _or_null(_is_object({"steps": _are_steps, "reasons": _are(_is_object(_REASON), 0, 1000)})),
    "filters": _is_object({"in": _is_table(_is_count), "out": _is_table(_is_count)}),
    "parameters": _is_object(_CHANGE),
    "flops": _is_object(_CHANGE),
    "n_filters": _is_object(_CHANGE),
    "validation": _or_null(_is_object({"n": _is_count, "before": _is_object(_SCORES), "after": _is_object(_SCORES)})),
}


def _read_metadata(text: str) -> dict:
    """The metadata of a file. Raises ValueError unless each field is what `lib.export` writes."""
    try:
        metadata = json.loads(text)
        check(isinstance(metadata, dict) and "format" in metadata, "it says no format")
        written = metadata["format"]
        if is_int(written, 0, 10**9) and written != FORMAT:
            raise _OtherFormatError(f"has metadata of format {written}, this version of Sauron reads format {FORMAT}")
        check(json.dumps(metadata) == text, "it is not in the form in which it is written")
        for name in (*METADATA, *metadata):
            check(name in metadata, f"{name!r:.40} is missing")
            check(name in METADATA, f"{name!r:.40} is unknown")
            check(METADATA[name](metadata[name]), f"{name} is {metadata[name]!r:.80}")
    except _OtherFormatError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "too deep" if isinstance(error, RecursionError) else error
        raise ValueError(f"has broken metadata: {reason}") from error
    return metadata


class _OtherFormatError(ValueError):
    """Of another version."""


def _check_fit(metadata: dict, graph: Graph) -> None:
    """Raise ValueError unless the metadata speak of this network, and do not contradict themselves."""
    names = [label["name"] for label in metadata["labels"]]
    values = [label["value"] for label in metadata["labels"]]
    n_axes, patch_size = len(graph.divisor), metadata["patch_size"]
    preprocessing = metadata["preprocessing"]
    try:
        Preprocessing.of_dict(preprocessing)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its preprocessing lacks a field ({error})") from error
    check(len(set(names)) == len(names) and VALID["values"](values), f"its labels are {metadata['labels']!r:.80}")
    n_schemes = len(preprocessing.get("normalizations", ()))
    check(n_schemes in (0, len(metadata["channels"])), "it has not a normalization for each channel")
    pairs = {
        "channels": (len(metadata["channels"]), graph.modalities),
        "labels": (len(names), graph.n_classes),
        "dim": (metadata["dim"], f"{n_axes}D"),
        "divisor": (tuple(metadata["divisor"]), graph.divisor),
        "patch_size": (len(patch_size), n_axes),
        "mirroring": (metadata["mirroring"]["axes"], [*range(2, 2 + n_axes)]),
    }
    for name, (said, found) in pairs.items():
        check(said == found, f"its {name} say {said}, but the network {found}")
    fits = all(n % d == 0 and n >= d for n, d in zip(patch_size, graph.divisor, strict=True))
    check(fits, f"its patch_size {patch_size} is no multiple of {graph.divisor}")
    for name in (patch_size, preprocessing.get("min_size") or ()):
        check(math.prod(name) <= LARGEST_PATCH, f"it is absurd: a volume of {' x '.join(map(str, name))} voxels")
    for name, (n_in, n_out) in graph.filters.items():
        said = metadata["filters"]["in"].get(name), metadata["filters"]["out"].get(name)
        check(said == (n_in, n_out), f"its filters of {name:.60} are {said}, but those of the network {(n_in, n_out)}")
    steps = (metadata["postprocessing"] or {"steps": []})["steps"]
    check(
        all(step == FOREGROUND or step < len(names) for step in steps),
        f"its postprocessing has the steps {steps!s:.80}",
    )
    for scores in (metadata["validation"][when] for when in ("before", "after") if metadata["validation"]):
        check(len(scores["dice"]) == len(scores["HD95_mm"]) == len(names), "its validation is of other classes")


# --- the file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxFile:
    """An exported model that has been checked: what was read is what is run. metadata: as `METADATA`."""

    path: Path
    data: bytes
    sha256: str
    metadata: dict
    graph: Graph

    @property
    def modalities(self) -> int:
        return self.graph.modalities

    @property
    def n_classes(self) -> int:
        return self.graph.n_classes

    @property
    def dim(self) -> str:
        """ "2D" or "3D"."""
        return self.metadata["dim"]

    @property
    def divisor(self) -> tuple[int, ...]:
        """By axis: what the size of a patch must be a multiple of."""
        return self.graph.divisor

    @property
    def patch_size(self) -> tuple[int, ...]:
        return tuple(self.metadata["patch_size"])

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of the post-processing."""
        return tuple((self.metadata["postprocessing"] or {"steps": ()})["steps"])

    @cached_property
    def dataset(self) -> BaseDataset:
        """The data set that the model was trained on, as far as a prediction needs it: it knows no files."""
        fields, labels = self.metadata, self.metadata["labels"]
        values = tuple(label["value"] for label in labels)
        return BaseDataset(
            name=fields["data"]["name"],
            class_names=tuple(label["name"] for label in labels),
            find=no_files,
            preprocessing=Preprocessing.of_dict(fields["preprocessing"]),
            patch_size=self.patch_size,
            channels=tuple(fields["channels"]),
            values=() if values == (*range(len(values)),) else values,
            file_ending=fields["file_ending"],
            licence=fields["data"]["licence"],
        )


def no_files(_folder: Path) -> Sequence[SubjectFiles]:
    """The subjects that the data set of an exported model finds."""
    return []


def read_onnx_file(path: str | Path) -> OnnxFile:
    """Read and check an exported model.

    Raises InputError if there is no such file, or it is anything but one that `lib.export` wrote, damaged or changed.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is no ordinary file; {MEND}")
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: is absurdly large ({size / 2**30:.1f} GiB); {MEND}")
        data = path.read_bytes()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: cannot be read ({reason}); {MEND}") from error
    try:
        return _parsed(path, data)
    except _OtherFormatError as error:
        raise InputError(f"{path}: {error}; take the Sauron that wrote it, or export the model again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no ONNX file, or a damaged one (no text); {MEND}") from error
    except ValueError as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}; {MEND}") from error


def _parsed(path: Path, data: bytes) -> OnnxFile:
    """Raises ValueError if these are not the bytes of an exported model."""
    reader = _Reader()
    check(data, "is empty")
    model = reader.message(memoryview(data), MODEL, "model")
    check(model["graph"] is not None and model["ir_version"], "is no ONNX file, or not a whole one")
    properties = {entry["key"]: entry["value"] for entry in model["metadata_props"]}
    check(len(properties) == len(model["metadata_props"]), "has a property twice")
    ours = properties.get(KEY) and properties.get(SUM)
    check(ours, "is an ONNX file, but not one that `python -m lib.export` wrote")
    opsets = {one["domain"] or "": one["version"] for one in model["opset_import"]}
    only = len(model["opset_import"]) == 1 and opsets == {"": OPSET} and model["ir_version"] == IR_VERSION
    said = ", ".join(f"{name or 'ONNX'} {version}" for name, version in opsets.items())
    check(only, f"is of opset {said:.60} (IR {model['ir_version']}), not of ONNX {OPSET} (IR {IR_VERSION})")
    metadata = _read_metadata(properties[KEY])
    graph = _read_graph(reader.message(model["graph"], GRAPH, "graph"))
    try:
        _check_fit(metadata, graph)
    except ValueError as error:
        raise ValueError(f"has broken metadata: {error}") from error
    right = content_digest(model["graph"], properties[KEY])
    check(properties[SUM] == right, "is damaged or was changed since it was written: its checksum is another one")
    return OnnxFile(path, data, digest(data), metadata, graph)


def content_digest(graph: bytes | memoryview, metadata: str) -> str:
    """What tells whether network or metadata have changed: the SHA-256 of both."""
    return joint_digest([digest(graph), digest(metadata.encode())])

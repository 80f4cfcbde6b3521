"""What an exported model's file is, and what it must not be."""

import copy
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import exported
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lib.data.BaseDataset import Preprocessing
from lib.models.size import count_filters
from lib.onnx_file import KEY, LARGEST, SUM, axes_text, content_digest, read_onnx_file
from lib.system.error import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["2D", "3D"])
def dim(request):
    return request.param


def written(path, made):
    """Write the model with the checksum of what it holds now, as a stranger would who wants to be believed."""
    properties = {entry.key: entry for entry in made.metadata_props}
    if SUM in properties:
        properties[SUM].value = content_digest(made.graph.SerializeToString(), properties[KEY].value)
    path.write_bytes(made.SerializeToString())
    return path


def refused(path, *words):
    """It is refused in one line that names the file, says what is wrong and how to mend it."""
    with pytest.raises(InputError) as caught:
        read_onnx_file(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < len(str(path)) + 500
    assert "; give a file that `python -m lib.export` wrote" in line or "; take the Sauron that wrote it" in line
    for word in words:
        assert word in line
    return line


def test_what_is_written_is_read(tmp_path, dim):
    path = tmp_path / "Bär 1.onnx"
    model = exported.write_exported(path, dim)
    file, patch_size = read_onnx_file(path), exported.PATCHES[dim]
    assert (file.path, file.data) == (path, path.read_bytes())
    assert (file.modalities, file.n_classes, file.dim) == (model.modalities, model.n_classes, dim)
    assert file.divisor == model.divisor == {"2D": (4, 4), "3D": (2, 8, 4)}[dim]
    assert file.patch_size == patch_size
    assert file.steps == ("foreground", 1)
    assert file.metadata == exported.metadata_of(model, patch_size)
    filters = count_filters(model)
    found = file.graph.filters
    assert all((filters["in"][name], filters["out"][name]) == both for name, both in found.items())
    coarse = {block.name for block in model.blocks() if block.head} - {f"dec_Sequential_{model.levels - 2}"}
    assert set(found) == {*filters["out"]} - coarse

    dataset = file.dataset
    assert (dataset.name, dataset.licence, dataset.file_ending) == ("tiny", "CC BY 4.0", ".nii.gz")
    assert dataset.class_names[:2] == ("class 0", "class 1") and dataset.values[:3] == (0, 2, 4)
    assert dataset.preprocessing == Preprocessing((1.5, 1.0, None), orientation="SPL")
    assert (dataset.modalities, dataset.n_classes, dataset.dim) == (model.modalities, model.n_classes, dim)
    assert dataset.patch_size == patch_size and dataset.find(tmp_path) == []


def test_values_that_are_the_classes_numbers_need_not_be_named(tmp_path):
    labels = [{"name": name, "value": i} for i, name in enumerate("abcd")]
    exported.write_exported(tmp_path / "a.onnx", labels=labels, postprocessing=None, validation=None)
    file = read_onnx_file(tmp_path / "a.onnx")
    assert file.dataset.values == () and file.steps == ()


def test_it_agrees_with_onnx(tmp_path, dim):
    path = tmp_path / "a.onnx"
    exported.write_exported(path, dim)
    theirs, ours = onnx.load(path), read_onnx_file(path)
    onnx.checker.check_model(theirs, full_check=True)
    weights = {tensor.name: list(tensor.dims) for tensor in theirs.graph.initializer}
    convolutions = {node.name: weights[node.input[1]] for node in theirs.graph.node if node.name in ours.graph.filters}
    for name, (n_in, n_out) in ours.graph.filters.items():
        transposed = "Transpose" in name
        assert convolutions[name][:2] == ([n_in, n_out] if transposed else [n_out, n_in])
    assert {entry.key for entry in theirs.metadata_props} == {"sauron", "sauron_sha256", "notice"}
    assert "no medical device" in next(entry.value for entry in theirs.metadata_props if entry.key == "notice")


def test_it_needs_neither_torch_nor_onnx(tmp_path):
    exported.write_exported(tmp_path / "a.onnx")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchio', 'onnx', 'onnxruntime', 'openvino']))\n"
        "from lib.onnx_file import read_onnx_file; print(read_onnx_file(sys.argv[1]).dataset.name)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "a.onnx")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == ("tiny\n", "")


# --- files that are something else ------------------------------------------------------------------------------------


def test_what_is_no_onnx_file(tmp_path):
    path = tmp_path / "a.onnx"
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "no ONNX file")
    path.write_text("a text")
    refused(path, "no ONNX file")
    refused(tmp_path, "no ordinary file")
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(LARGEST + 1)  # takes no place on the disk
    refused(path, "absurdly large")


def test_a_fifo_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no FIFOs")
    os.mkfifo(tmp_path / "a.onnx")
    refused(tmp_path / "a.onnx", "no ordinary file")


def test_a_file_that_was_cut_or_changed(tmp_path):
    path = tmp_path / "a.onnx"
    exported.write_exported(path)
    data = path.read_bytes()
    for length in (1, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)
    made = onnx.load_from_string(data)
    weight = made.graph.initializer[0]
    changed = numpy_helper.to_array(weight).copy()
    changed.flat[0] += 0.25
    weight.raw_data = changed.tobytes()
    path.write_bytes(made.SerializeToString())
    refused(path, "its checksum is another one")
    path.write_bytes(data.replace(b'"class 1"', b'"class 9"'))
    refused(path, "its checksum is another one")


def test_an_onnx_file_of_another_origin(tmp_path):
    made, _ = exported.exported("2D")
    del made.metadata_props[:]
    refused(written(tmp_path / "a.onnx", made), "an ONNX file, but not one that `python -m lib.export` wrote")


# --- networks that are something else ---------------------------------------------------------------------------------


def _node(made, op):
    return next(node for node in made.graph.node if node.op_type == op)


def _external(made):
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _attribute(op, name, *values):
    def change(made):
        node = _node(made, op)
        kept = [one for one in node.attribute if one.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, *values)])

    return change


def _subgraph(made):
    _node(made, "Conv").attribute.append(helper.make_attribute("body", made.graph))


def _functions(made):
    made.functions.append(helper.make_function("x", "f", [], [], [], [helper.make_opsetid("", 17)]))


def _set(part, name, value):
    """Set a field of a part of the model."""
    return lambda made: setattr(part(made), name, value)


def _dims(made):
    made.graph.initializer[0].dims[0] = 2**40


def _many(made):
    for i in range(1001):
        made.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), f"w{i}"))


def _not_finite(made):
    tensor = made.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), tensor.name))


def _half(made):
    tensor = made.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def _typed_values(made):
    tensor = made.graph.initializer[0]
    tensor.float_data.extend(numpy_helper.to_array(tensor).ravel())


def _doubling(made):
    """Forty times the maps beside themselves."""
    first = made.graph.node[0]
    name = "image"
    for i in range(40):
        made.graph.node.insert(0, helper.make_node("Concat", [name, name], [f"d{i}"], f"d{i}", axis=1))
    nodes = [*made.graph.node[:40][::-1], *made.graph.node[40:]]
    for i, node in enumerate(nodes[1:40]):
        node.input[:] = [f"d{i}"] * 2
    first.input[0] = "d39"
    del made.graph.node[:]
    made.graph.node.extend(nodes)


def _without_bias(made):
    del _node(made, "Conv").input[2:]


def _swapped(made):
    """Weights of the right shape in another layer's place are seen by the checksum alone; of another shape here."""
    first, second = [node for node in made.graph.node if node.op_type == "Conv"][:2]
    first.input[1], second.input[1] = second.input[1], first.input[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_external, ["keeps weights in another file (../../etc/passwd)", "never read"]),
        (_set(lambda made: made.graph.node[0], "op_type", "Loop"), ["has the operator Loop", "Conv"]),
        (_set(lambda made: made.graph.node[0], "domain", "evil.ops"), ["of another domain, evil.ops"]),
        (_subgraph, ["holds a subgraph"]),
        (_functions, ["holds functions"]),
        (_set(lambda made: made.opset_import[0], "version", 21), ["opset ONNX 21", "not of ONNX 17"]),
        (lambda made: made.opset_import.add(domain="evil", version=1), ["opset", "evil 1"]),
        (_set(lambda made: made, "ir_version", 99), ["IR 99"]),
        (_dims, ["absurd size"]),
        (_many, ["tensors of weights"]),
        (_not_finite, ["not finite"]),
        (_half, ["no float32"]),
        (_typed_values, ["values that are not raw"]),
        (_set(lambda made: made.graph.initializer[0], "raw_data", b"1234"), ["4 bytes for"]),
        (_set(lambda made: made.graph.initializer[1], "name", "enc_ConvBlock_1/weight"), ["two tensors of one name"]),
        (_doubling, ["is absurd", "maps"]),
        (_set(lambda made: made.graph.input[0], "name", "x"), ["not one input 'image'"]),
        (_set(lambda made: made.graph.output[0], "name", "x"), ["not one output 'probabilities'"]),
        (_set(lambda made: made.graph.input[0].type.tensor_type, "elem_type", 10), ["float32 with free sizes"]),
        (_set(lambda made: made.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 64), ["free sizes"]),
        (
            _set(lambda made: made.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 3),
            ["enc_ConvBlock_1", "its weights"],
        ),
        (_set(lambda made: made.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 3), ["output"]),
        (lambda made: made.graph.node.pop(), ["output"]),
        (lambda made: made.graph.node.pop(0), ["an input that nothing gives"]),
        (lambda made: made.graph.input.append(made.graph.input[0]), ["not one input"]),
        (_attribute("Conv", "pads", [0, 0, 0, 0]), ["Conv", "its size"]),
        (_attribute("Conv", "strides", [3, 3]), ["has not the image's size"]),
        (_attribute("Conv", "dilations", [2, 2]), ["Conv", "its attributes"]),
        (_attribute("Conv", "group", 1), ["Conv", "its attributes"]),
        (_attribute("ConvTranspose", "strides", [1, 1]), ["ConvTranspose", "its size"]),
        (_attribute("LeakyRelu", "alpha", 0.5), ["its alpha"]),
        (_attribute("Softmax", "axis", 2), ["its axis"]),
        (_attribute("Concat", "axis", 2), ["its axis"]),
        (_without_bias, ["Conv"]),
        (_swapped, ["its weights"]),
    ],
)
def test_another_network_is_refused(tmp_path, change, words):
    made, _ = exported.exported("2D")
    change(made)
    refused(written(tmp_path / "a.onnx", made), *words)


def _first_mean(made):
    """The variance is taken for the mean, which is not known yet."""
    first = _node(made, "Sub")
    first.input[1] = next(node.output[0] for node in made.graph.node if node.op_type == "Sqrt")


@pytest.mark.parametrize(
    ("dim", "change", "words"),
    [
        ("3D", _attribute("InstanceNormalization", "epsilon", 0.1), ["its epsilon"]),
        ("3D", _attribute("InstanceNormalization", "epsilon", 1), ["its epsilon"]),
        ("3D", _attribute("Shape", "start", 1), ["its attributes"]),
        ("2D", _attribute("ReduceMean", "axes", [1]), ["its axes"]),
        ("2D", _attribute("ReduceMean", "keepdims", 0), ["its keepdims"]),
        ("2D", lambda made: _node(made, "Sub").input.reverse(), ["the form of its input"]),
        ("2D", lambda made: _node(made, "Add").input.append("epsilon"), ["its attributes, or weights"]),
        ("2D", _first_mean, ["an input that nothing gives"]),
    ],
)
def test_another_norm_is_refused(tmp_path, dim, change, words):
    made, _ = exported.exported(dim)
    change(made)
    refused(written(tmp_path / "a.onnx", made), *words)


# --- metadata that are something else ---------------------------------------------------------------------------------


def _with(**changes):
    return lambda metadata: metadata.update(changes)


def _at(*keys, value):
    def change(metadata):
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata[keys[-1]] = value

    return change


DAMAGE = {
    "notice": ["", "A medical device.", None],
    "made_by": [None, {}, {"command": "x"}],
    "model": [None, {"name": "../m", "sha256": "0" * 64}, {"name": "m", "sha256": "x" * 64}, {"name": "m"}],
    "data": ["tiny", {"name": "../x", "licence": ""}, {"name": "x", "licence": 3}],
    "channels": [[], ["a", "b"], [1], "a", None],
    "labels": [[], [{"name": "a", "value": 0}], "abcd", [{"name": "a", "value": i} for i in range(4)]],
    "file_ending": [".exe", None, "nii.gz"],
    "preprocessing": [None, {}, {"spacing_mm": [1, 1]}, {"spacing_mm": [1, 1, 0]}, {"spacing_mm": [1, 1, 1], "x": 1}],
    "dim": ["3D", "4D", 2],
    "patch_size": [[], [16], [16, 24, 8], [16.0, 24], [-16, 24], [15, 24], [2**14 * 2, 24], [10**9, 4]],
    "divisor": [[2, 2], [4], [4, 4, 4], "44", [0, 4]],
    "axes": [None, "", "x" * 2000],
    "mirroring": [True, {}, {"axes": []}, {"axes": [2]}, {"axes": [2, 3, 4]}, {"axes": [0, 1]}, {"axes": "23"}],
    "step_size": [0, 1.5, -1, "0.5", True, None],
    "postprocessing": [[], {"steps": [9], "reasons": []}, {"steps": ["all"], "reasons": []}, {"steps": [1, 1]}],
    "filters": [None, {}, {"in": {}, "out": {}}, {"in": {"a": 1}, "out": {"a": 1}}],
    "parameters": [None, {"before": 3}, {"before": None, "after": -1}, {"before": None, "after": 1.5}],
    "flops": [{"before": "2", "after": 1}],
    "n_filters": [3],
    "validation": [{}, {"n": 0}, {"n": 1, "before": {}, "after": {}}],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_broken_metadata_are_one_line(tmp_path, name):
    for value in DAMAGE[name]:
        made, _ = exported.exported("2D", **{name: value})
        refused(written(tmp_path / "a.onnx", made), "has broken metadata", name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with(format=2), ["format 2", "reads format 1", "take the Sauron that wrote it"]),
        (_with(format="1"), ["broken metadata", "format is '1'"]),
        (_with(format=True), ["broken metadata", "format is True"]),
        (_with(extra=1), ["'extra' is unknown"]),
        (lambda metadata: metadata.pop("axes"), ["'axes' is missing"]),
        (_at("filters", "out", "enc_ConvBlock_1", value=5), ["filters of enc_ConvBlock_1", "5"]),
        (_at("validation", "after", "dice", value=[1, 1]), ["validation is of other classes"]),
        (_at("validation", "after", "dice", 1, value=float("nan")), ["validation"]),
        (_at("preprocessing", "min_size", value=[16000] * 3), ["absurd"]),
        (_at("preprocessing", "normalizations", value=[{"scheme": "ct"}] * 2), ["normalization for each channel"]),
        (_at("patch_size", value=[16384, 16388]), ["broken metadata", "patch_size"]),
        (_at("postprocessing", "steps", value=["foreground", 4]), ["postprocessing"]),
        (_at("made_by", "command", value="two\nlines"), ["made_by"]),
    ],
)
def test_metadata_that_contradict_themselves_or_the_network(tmp_path, change, words):
    made, model = exported.exported("2D")
    metadata = copy.deepcopy(exported.metadata_of(model, exported.PATCHES["2D"]))
    change(metadata)
    next(entry for entry in made.metadata_props if entry.key == KEY).value = json.dumps(metadata)
    refused(written(tmp_path / "a.onnx", made), *words)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"format": 1, "format": 1}', '{"format": 1}', "9" * 10_000]
)
def test_metadata_that_are_no_json_of_ours(tmp_path, text):
    made, _ = exported.exported("2D")
    next(entry for entry in made.metadata_props if entry.key == KEY).value = text
    refused(written(tmp_path / "a.onnx", made))


def test_a_property_twice(tmp_path):
    made, _ = exported.exported("2D")
    made.metadata_props.append(made.metadata_props[0])
    refused(written(tmp_path / "a.onnx", made), "a property twice")


# --- bytes that are anything ------------------------------------------------------------------------------------------


def test_two_graphs_are_not_merged(tmp_path):
    """As protobuf would, so that what is run were not what was checked."""
    made, _ = exported.exported("2D")
    data = made.SerializeToString()
    more = onnx.ModelProto(graph=helper.make_graph([helper.make_node("Loop", [], [])], "g", [], []))
    (tmp_path / "a.onnx").write_bytes(data + more.SerializeToString())
    refused(tmp_path / "a.onnx", "graph is there twice")


def test_endless_numbers_and_parts(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x08" + b"\xff" * 20)
    refused(path, "damaged")
    path.write_bytes(b"\x42\x00" * 1_000_000)  # a million empty opsets
    refused(path, "has more than 1000000 parts")


def test_a_length_that_is_not_there_takes_no_memory(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x3a" + b"\xff" * 8 + b"\x01")  # a graph of 2**63 bytes
    tracemalloc.start()
    refused(path, "not a whole one")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def changed(data, rng):
    """The bytes with up to three others in their place, and sometimes cut."""
    broken = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        broken[rng.integers(len(broken))] = rng.integers(256)
    if rng.integers(5) == 0:
        del broken[rng.integers(1, len(broken)) :]
    return bytes(broken)


def test_changed_bytes_are_refused(tmp_path):
    path, rng = tmp_path / "a.onnx", np.random.default_rng(0)
    made, _ = exported.exported("2D")
    data, n_refused = made.SerializeToString(), 0
    for _ in range(400):
        broken = changed(data, rng)
        path.write_bytes(broken)
        try:
            read_onnx_file(path)
        except InputError as error:
            assert "\n" not in str(error)
            n_refused += 1
            continue
        theirs = onnx.load_from_string(broken)  # then it is the producer's name, say
        assert theirs.graph == made.graph and theirs.metadata_props[:2] == made.metadata_props[:2]
    assert n_refused > 350


def assembled(made, graph, text):
    """A file of these bytes and this text, with their checksum."""
    rest = onnx.ModelProto()
    rest.CopyFrom(made)
    rest.ClearField("graph")
    rest.metadata_props[0].value, rest.metadata_props[1].value = text, content_digest(graph, text)
    length, rounds = len(graph), b""
    while length >= 128:
        rounds, length = rounds + bytes([length & 127 | 128]), length >> 7
    return rest.SerializeToString() + b"\x3a" + rounds + bytes([length]) + graph


def test_changed_bytes_with_their_checksum_are_a_model_or_refused(tmp_path):
    """Layers, weights and metadata as a stranger may write them: never another exception."""
    path, rng = tmp_path / "a.onnx", np.random.default_rng(1)
    made, _ = exported.exported("2D")
    graph, text = made.graph.SerializeToString(), made.metadata_props[0].value
    assert assembled(made, graph, text) != made.SerializeToString()  # the order of the parts is another
    path.write_bytes(assembled(made, graph, text))
    assert read_onnx_file(path).n_classes == 4
    layers = len(graph) - graph[::-1].index(b"network"[::-1])  # before the weights
    n_read = 0
    for i in range(600):
        if i % 3 == 0:
            broken = assembled(made, graph, changed(text.encode(), rng).decode(errors="replace"))
        elif i % 3 == 1:
            broken = assembled(made, changed(graph[:layers], rng) + graph[layers:], text)
        else:
            broken = assembled(made, changed(graph, rng), text)
        path.write_bytes(broken)
        try:
            file = read_onnx_file(path)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        n_read += 1
        assert file.n_classes == len(file.dataset.class_names)
    assert 0 < n_read < 400


def test_the_axes_in_words():
    assert axes_text("LPS", "2D") == (
        "(batch, channel, spatial axes). Of a volume in the orientation LPS: axis 1 towards left, axis 2 towards "
        "posterior, axis 3 towards superior; slices along axis 3, each with axes 1 and 2."
    )
    assert axes_text("SRA", "3D").endswith("axis 1 towards superior, axis 2 towards right, axis 3 towards anterior.")

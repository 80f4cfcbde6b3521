"""A trained network as one file that other programs run: `python -m lib.export RUN/models/model-E OUT.onnx`.

The file holds the network (ONNX) and, as JSON in its properties, all that a prediction needs to know; see
`lib.onnx_file`. It is checked before it gets its name: torch and every runtime that is installed must agree on a whole
validation volume.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lib import postprocessing, validation
from lib.build import build_dataset
from lib.checkpoint import newest_epoch
from lib.data.preprocessing import preprocess, read_channels
from lib.evaluation import mean_foreground
from lib.inference import Predictor
from lib.models import load_model
from lib.models.BaseModel import IMAGE as NETWORK_INPUT
from lib.models.BaseModel import Block
from lib.models.layers import ConvBlock, InstanceNorm
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters
from lib.network import Network
from lib.onnx_file import (
    DIMS,
    EPSILON,
    FLATTEN,
    FORMAT,
    IMAGE,
    IR_VERSION,
    KEY,
    NOTICE,
    OPSET,
    PROBABILITIES,
    RESEARCH,
    SLOPE,
    SUM,
    axes_text,
    content_digest,
    read_onnx_file,
)
from lib.runs import settings_of_model, sizes_of
from lib.runtimes import installed_runtimes, open_network
from lib.settings import Settings
from lib.system.cli import Parser, run_script
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import check_writable, file_digest, read_json, write_atomically
from lib.system.process import keep_freed_memory
from lib.torch_network import TorchNetwork

LABELS = 0.9999  # the share of the voxels whose labels agree, at least
SOFTMAX = 1e-4  # how far softmax maps lie apart, at most
ROUNDS = 5  # of the timing


# --- the network ------------------------------------------------------------------------------------------------------


def to_graph(model: nnUNet) -> onnx.GraphProto:
    """The network down to the head of full resolution, whose softmax maps are the output. Each convolution is called as
    its block is in filter files."""
    blocks = {block.name: block for block in model.blocks()}
    head = next(name for name in reversed(blocks) if blocks[name].head)
    needed, open_ = set(), [head]
    while open_:
        name = open_.pop()
        if name in blocks and name not in needed:
            needed.add(name)
            open_ += blocks[name].parents
    n_axes = len(model.divisor)
    graph = _Graph(n_axes, [], {})
    maps = {NETWORK_INPUT: IMAGE}
    for name, block in blocks.items():
        if name in needed:
            maps[name] = graph.add(
                block, [maps[parent] for parent in block.parents], PROBABILITIES if name == head else name
            )
    tensors = [numpy_helper.from_array(array, name) for name, array in graph.tensors.items()]
    ends = {IMAGE: model.modalities, PROBABILITIES: model.n_classes}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [DIMS[0], n, *DIMS[1 : n_axes + 1]])
        for name, n in ends.items()
    }
    return helper.make_graph(graph.nodes, "network", [values[IMAGE]], [values[PROBABILITIES]], tensors)


@dataclass
class _Graph:
    """Nodes and weights as they are added."""

    n_axes: int
    nodes: list[onnx.NodeProto]
    tensors: dict[str, np.ndarray]

    def add(self, block: Block, inputs: list[str], output: str) -> str:
        """The layers of a block, of which the last gives `output`; returns this."""
        x, layers = inputs[0], list(_layers(block.module))
        if len(inputs) > 1:
            x = self._node("Concat", inputs, f"{block.name}/input", f"{block.name}/concat", axis=1)
        for i, layer in enumerate(layers):
            target = output if i == len(layers) - 1 else f"{block.name}/{i}"
            x = self._layer(layer, x, target, block.name)
        return x

    def _layer(self, layer: nn.Module, x: str, target: str, name: str) -> str:
        if isinstance(layer, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            weights = [
                self._tensor(f"{name}/{key}", value.detach().cpu().numpy())
                for key, value in (("weight", layer.weight), ("bias", layer.bias))
            ]
            sizes = {"kernel_shape": layer.kernel_size, "strides": layer.stride}
            if not layer.transposed:
                sizes["pads"] = (*layer.padding, *layer.padding)
            op = "ConvTranspose" if layer.transposed else "Conv"
            return self._node(op, [x, *weights], target, name, **sizes)
        if isinstance(layer, InstanceNorm):
            return self._norm(x, target, name)
        if isinstance(layer, nn.LeakyReLU) and layer.negative_slope == SLOPE:
            return self._node("LeakyRelu", [x], target, f"{name}/relu", alpha=SLOPE)
        if isinstance(layer, nn.Softmax) and layer.dim == 1:
            return self._node("Softmax", [x], target, f"{name}/softmax", axis=1)
        raise TypeError(f"{name}: no rule to export {layer}")

    def _norm(self, x: str, target: str, name: str) -> str:
        """The instance norm, so that runtimes sum each map in many parts. Of whole maps OpenVINO sums all voxels one
        after the other in float32, and softmax maps came out up to 9e-4 away from torch's, instead of 7e-5.

        Flat maps are the fastest way to that in 3D; in 2D, where maps of many filters lie in memory otherwise, means of
        lines, and then of these.
        """
        return self._norm_by_lines(x, target, name) if self.n_axes == 2 else self._norm_of_flat(x, target, name)

    def _norm_of_flat(self, x: str, target: str, name: str) -> str:
        n = self.tensors[f"{name}/bias"].size
        same = [self._tensor(f"ones/{n}", np.ones(n)), self._tensor(f"zeros/{n}", np.zeros(n))]
        self.tensors["flat"] = np.array(FLATTEN, "<i8")
        flat = self._node("Reshape", [x, "flat"], f"{name}/flat", f"{name}/flatten")
        flat = self._node("InstanceNormalization", [flat, *same], f"{name}/normal", f"{name}/norm", epsilon=EPSILON)
        shape = self._node("Shape", [x], f"{name}/shape", f"{name}/shape_of")
        return self._node("Reshape", [flat, shape], target, f"{name}/back")

    def _norm_by_lines(self, x: str, target: str, name: str) -> str:
        epsilon = self._tensor("epsilon", np.array([EPSILON]))
        centred = self._node("Sub", [x, self._mean(x, f"{name}/mean")], f"{name}/centred", f"{name}/sub")
        square = self._node("Mul", [centred, centred], f"{name}/square", f"{name}/squared")
        variance = self._mean(square, f"{name}/variance")
        variance = self._node("Add", [variance, epsilon], f"{name}/positive", f"{name}/add")
        deviation = self._node("Sqrt", [variance], f"{name}/deviation", f"{name}/sqrt")
        factor = self._node("Reciprocal", [deviation], f"{name}/factor", f"{name}/reciprocal")
        return self._node("Mul", [centred, factor], target, f"{name}/norm")

    def _mean(self, x: str, name: str) -> str:
        """Of each map: of the last axis, and then of the others."""
        *others, last = range(2, 2 + self.n_axes)
        lines = self._node("ReduceMean", [x], f"{name}/lines", f"{name}/of_lines", axes=[last], keepdims=1)
        return self._node("ReduceMean", [lines], name, f"{name}/of_all", axes=others, keepdims=1)

    def _tensor(self, name: str, array: np.ndarray) -> str:
        self.tensors[name] = np.ascontiguousarray(array, "<f4")
        return name

    def _node(self, op: str, inputs: list[str], output: str, name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name, **attributes))
        return output


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a block, in the order in which they are computed."""
    if isinstance(module, ConvBlock):
        yield from module.seq
    elif isinstance(module, nn.Sequential):
        yield from module
    else:
        yield module


def to_onnx(model: nnUNet, metadata: dict) -> onnx.ModelProto:
    """The network with its metadata. The same for the same arguments, to the byte."""
    graph = to_graph(model)
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="Sauron",
    )
    text = json.dumps(metadata)
    total = content_digest(made.graph.SerializeToString(deterministic=True), text)
    helper.set_model_props(made, {KEY: text, SUM: total, NOTICE: RESEARCH})
    return made


# --- the metadata -----------------------------------------------------------------------------------------------------


def describe(path: Path, model: nnUNet, settings: Settings, output: str) -> dict:
    """The metadata of a model RUN/models/model-E: see `lib.onnx_file.METADATA`. Of the machine and the patients that it
    was trained on they say nothing. Raises InputError where a file of the run is damaged."""
    dataset, sha256 = settings.dataset, file_digest(path)
    known, n_axes = facts(), len(settings.patch_size)
    sizes = sizes_of(model, dataset, settings.patch_size, settings)
    before_after = {key: {"before": size["unpruned"], "after": size["now"]} for key, size in sizes.items()}
    values = dataset.values or range(dataset.n_classes)
    return {
        "format": FORMAT,
        "notice": RESEARCH,
        "made_by": {
            "command": shlex.join(["python", "-m", "lib.export", path.name, output]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_revision": known["git_revision"],
            "versions": known["versions"] | {"onnx": version("onnx")},
        },
        "model": {"name": path.name, "sha256": sha256},
        "data": {"name": dataset.name, "licence": dataset.licence},
        "channels": list(dataset.channels),
        "labels": [{"name": n, "value": v} for n, v in zip(dataset.class_names, values, strict=True)],
        "file_ending": dataset.file_ending,
        "preprocessing": dataset.preprocessing.as_dict(),
        "dim": model.dim,
        "patch_size": list(settings.patch_size),
        "divisor": list(model.divisor),
        "axes": axes_text(dataset.preprocessing.orientation, model.dim),
        "mirroring": {"axes": [*range(2, 2 + n_axes)]},
        "step_size": 0.5,
        "postprocessing": _postprocessing(path),
        "filters": count_filters(model),
        "parameters": before_after["parameters"],
        "flops": before_after["flops"],
        "n_filters": before_after["filters"],
        "validation": _validation(path.parent.parent / validation.NAME, sha256),
    }


def _postprocessing(path: Path) -> dict | None:
    """What was decided for this very model. Raises InputError."""
    steps, _ = postprocessing.read_steps(path)
    if steps is None:
        return None
    reasons = read_json(path.resolve().parent.parent / postprocessing.NAME).get("reasons", [])
    return {"steps": list(steps), "reasons": reasons}


def _validation(path: Path, sha256: str) -> dict | None:
    """The means of validation.json, if it is of the model with this sum. Raises InputError if it is damaged."""
    if not path.exists():
        return None
    content = read_json(path)
    try:
        if content["sha256"] != sha256:
            return None
        scores = {when: _scores(content[when]["average"]) for when in ("before", "after")}
        return {"n": len(content["before"]["subjects"]), **scores}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error!r}); validate the run again, or delete it") from error


def _scores(average: dict) -> dict:
    return {
        "dice": average["dice"],
        "HD95_mm": average["HD95"],
        "mean_foreground_dice": mean_foreground(average["dice"]),
        "mean_foreground_HD95_mm": mean_foreground(average["HD95"]),
    }


# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How a network agrees with torch's. labels: share of the voxels that have the same; softmax: the largest
    difference."""

    labels: float
    softmax: float

    @property
    def is_good(self) -> bool:
        return self.labels >= LABELS and self.softmax <= SOFTMAX  # NaN is not

    def __str__(self) -> str:
        return f"labels equal in {100 * self.labels:.4f}% of the voxels, softmax within {self.softmax:.1e}"


def agreement(networks: dict[str, Network], volume: np.ndarray, patch_size: tuple[int, ...]) -> dict[str, Agreement]:
    """How each network, by name, agrees with the first one on a preprocessed volume (C, X, Y, Z), without mirroring."""
    found, first = {}, None
    for name, network in networks.items():
        maps = Predictor(network, patch_size, mirror=False).volume(volume)
        first = maps if first is None else first
        same = float(np.mean(maps.argmax(0) == first.argmax(0)))
        found[name] = Agreement(same, float(np.abs(maps - first).max()))
    return found


def milliseconds(networks: dict[str, Network], patch_size: tuple[int, ...]) -> dict[str, float]:
    """The median time of a patch, in a batch as usual, by the network's name. They take turns, `ROUNDS` times after
    one more: what else the machine does slows all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(ROUNDS + 1):
        for name, network in networks.items():
            n = network.usual_batch(patch_size)
            patches = np.zeros((n, network.modalities, *patch_size), np.float32)
            start = time.perf_counter()
            network(patches)
            times[name].append(1000 * (time.perf_counter() - start) / n)
    return {name: median(values[1:]) for name, values in times.items()}


def check(path: Path, name: Path, model: nnUNet, volume: np.ndarray, log: Callable[[str], None]) -> None:
    """Compare the exported model in the file `path`, which is to be called `name`, with torch's in every runtime that
    is installed, and say how fast each is. Raises InputError where they do not agree."""
    file = read_onnx_file(path)
    networks: dict[str, Network] = {"torch": TorchNetwork(model)}
    networks |= {runtime: open_network(file, runtime, device="cpu") for runtime in installed_runtimes()}
    if len(networks) == 1:
        raise InputError(f"{name}: no runtime is installed that could check it; run `pip install openvino`")
    for runtime, one in agreement(networks, volume, file.patch_size).items():
        if not one.is_good:
            raise InputError(
                f"{name}: {runtime} does not agree with torch ({one}); not written, try another version of {runtime}"
            )
        if runtime != "torch":
            log(f"{runtime}: {one}")
    times = milliseconds(networks, file.patch_size)
    for runtime, ms in times.items():
        ratio = f", {times['torch'] / ms:.2f} times as fast as torch" if runtime != "torch" else ""
        log(f"{runtime}: {ms:.1f} ms per patch{ratio}")


def volume_of(settings: Settings, data_path: str | None) -> tuple[np.ndarray, str]:
    """A preprocessed volume (C, X, Y, Z) to check with, and what it is: the first validation image that is on disk, or
    else noise, somewhat larger than a patch. Raises InputError if the image is broken, or the data asked for are not
    there."""
    dataset = settings.dataset
    try:
        files = build_dataset(replace(settings, data_path=data_path or settings.data_path)).files("validation")
        why = "the run has no validation set"
    except InputError as error:  # the data need not be on this machine
        if data_path:
            raise
        files, why = [], str(error)
    if files:
        image, _ = read_channels(files[0].images, dataset.preprocessing)
        return preprocess(image, dataset.preprocessing).array, f"the validation image {files[0].id}"
    size = [n + n // 2 for n in settings.patch_size] + [3] * (len(settings.patch_size) == 2)
    noise = np.random.default_rng(0).standard_normal((settings.modalities, *size), np.float32)
    return noise, f"a volume of noise ({why})"


def export(
    model: Path, output: Path, data_path: str | None, log: Callable[[str], None], overwrite: bool = False
) -> None:
    """Write the model RUN/models/model-E to `output`, and check it first. data_path: folder of the data set, by default
    that of the training.

    Raises InputError if the model or its run is not known, `output` is there and not to be overwritten or cannot be
    written, or the exported model is not what it should be; then nothing is written.
    """
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; give --overwrite or another name")
    check_writable(output, "OUT.onnx")
    if output.suffix != ".onnx":
        raise InputError(f"{output}: is not called .onnx; give a name that ends so")
    network, settings = load_model(model), settings_of_model(model)
    if settings is None:
        raise InputError(f"{model}: its run is not known; name RUN/models/model-E of a training")
    volume, what = volume_of(settings, data_path)
    made = to_onnx(network, describe(model, network, settings, output.name))
    onnx.checker.check_model(made, full_check=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(made.SerializeToString(deterministic=True))
        log(f"export: {model.name} is checked on {what}")
        check(temporary, output, network, volume, log)

    write_atomically(output, write, replace=overwrite)
    log(f"export: {output} ({output.stat().st_size / 2**20:.1f} MiB); {RESEARCH}")


def export_newest(run: Path, log: Callable[[str], None]) -> None:
    """Export the newest model of a run to RUN/model.onnx, which is replaced. Raises InputError, after a line in the log
    that says how to do it again."""
    model, output = run / "models" / f"model-{newest_epoch(run)}", run / "model.onnx"
    try:
        export(model, output, None, log, overwrite=True)
    except InputError:
        log(f"not exported; to do it again: {shlex.join(['python', '-m', 'lib.export', str(model), str(output)])}")
        raise


def main(argv: list[str] | None = None) -> int:
    """Export the model that `argv` names; returns the exit code of `run_script`."""
    parser = Parser(
        "python -m lib.export",
        description="Write a trained model as one ONNX file that says how it is used, and check it.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN/models/model-E", help="a saved model in its run folder (required)")
    add("output", type=Path, metavar="OUT.onnx", help="the file to write (required)")
    add("--data_path", help="folder of the data set, to check with (default: that of the training)")
    add("--overwrite", action="store_true", help="replace the file if it is there (default: refuse)")

    def run() -> None:
        args = parser.parse_args(argv)
        keep_freed_memory()
        export(args.model, args.output, args.data_path, print, args.overwrite)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

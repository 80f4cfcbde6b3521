"""A trained model as one file that runs without torch: `python -m lib.export RUN/models/model-E OUT.onnx`.

The file holds the network up to its softmax maps at full resolution, and says all that its use needs; `lib.onnx_file`
reads it. It is put in its place when torch and the runtimes have agreed on a whole validation volume.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lib.build import build_dataset
from lib.checkpoint import newest_epoch
from lib.data.preprocessing import preprocess, read_channels
from lib.evaluation import mean_foreground
from lib.inference import Predictor, most_probable
from lib.models import load_model
from lib.models.BaseModel import CONVOLUTIONS, IMAGE, Block
from lib.models.layers import InstanceNorm
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters
from lib.network import Network
from lib.onnx_file import (
    DIMS,
    EPSILON,
    FORMAT,
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
from lib.postprocessing import NAME as POSTPROCESSING
from lib.postprocessing import read_steps
from lib.runs import settings_of_model, sizes_of
from lib.runtimes import installed, open_network
from lib.settings import Settings
from lib.system.cli import Parser, run_script
from lib.system.error import InputError
from lib.system.facts import facts
from lib.system.files import check_writable, file_digest, read_json, write_atomically
from lib.system.process import keep_freed_memory
from lib.torch_network import TorchNetwork
from lib.validation import NAME as VALIDATION

LABELS_AGREE, SOFTMAX_DIFFERS = 0.9999, 1e-4  # at least, and at most
ROUNDS = 7  # of a patch that is timed


def export(model: Path, output: Path, log: Callable[[str], None], data_path: str | None = None, **given: bool) -> None:
    """Export RUN/models/model-E to `output`, which exists only if the runtimes that are installed here agree with
    torch. `data_path` is that of the training by default; `given` is `replace` of `write_atomically`.

    Raises InputError if the model, its run or its data are not as they should be, or a runtime does not agree.
    """
    settings = settings_of_model(model)
    if settings is None:
        raise InputError(f"{model}: its run is not known, which says how it is used; name RUN/models/model-E")
    if output.suffix.lower() != ".onnx":
        raise InputError(f"{output}: must end in .onnx; give another name")
    network = load_model(model)
    data = to_onnx(network, describe(model, network, settings))

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        check_runtimes(temporary, network, settings, log, data_path)

    write_atomically(output, write, **given)
    log(f"exported: {output} ({len(data) / 2**20:.2f} MiB). {RESEARCH}")


def export_newest(run: Path, log: Callable[[str], None]) -> None:
    """Export the newest model of a run to RUN/model.onnx, which is replaced. Raises InputError, after a line in the log
    that says how to do it again."""
    model, output = run / "models" / f"model-{newest_epoch(run)}", run / "model.onnx"
    try:
        export(model, output, log)
    except InputError:
        log(f"not exported; to do it again: python -m lib.export {shlex.quote(str(model))} {shlex.quote(str(output))}")
        raise


# --- the graph --------------------------------------------------------------------------------------------------------


def to_onnx(model: nnUNet, metadata: dict) -> bytes:
    """A network with its metadata as the bytes of an ONNX file; the same ones for the same arguments."""
    nodes, tensors = [], {}
    kept = _ancestors(model)
    outputs = {IMAGE: IMAGE}  # of each block, by name
    for block in model.blocks():
        if block.name in kept:
            outputs[block.name] = _add_block(block, [outputs[parent] for parent in block.parents], nodes, tensors)
    nodes[-1].output[0] = PROBABILITIES
    free = DIMS[: 1 + int(model.dim[0])]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [free[0], channels, *free[1:]])
        for name, channels in ((IMAGE, model.modalities), (PROBABILITIES, model.n_classes))
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "sauron", ends[:1], ends[1:], weights)
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="Sauron")
    found.ir_version = IR_VERSION
    text = json.dumps(metadata)
    sum_ = content_digest(found.graph.SerializeToString(deterministic=True), text)
    helper.set_model_props(found, {NOTICE: RESEARCH, KEY: text, SUM: sum_})
    onnx.checker.check_model(found, full_check=True)
    return found.SerializeToString(deterministic=True)


def _ancestors(model: nnUNet) -> set[str]:
    """The names of the head at full resolution, which comes last, and of all blocks that it needs."""
    kept = {model.blocks()[-1].name}
    for block in reversed(model.blocks()):
        if block.name in kept:
            kept.update(block.parents)
    return kept


def _add_block(block: Block, inputs: list[str], nodes: list, tensors: dict[str, np.ndarray]) -> str:
    """Append the layers of a block to the nodes and their weights to the tensors; the name of its output."""
    last = inputs[0]
    if len(inputs) > 1:
        last = f"{block.name}.maps"
        nodes.append(helper.make_node("Concat", inputs, [last], f"{block.name}.concat", axis=1))
    for layer in (module for module in block.module.modules() if not [*module.children()]):
        operator, attributes, weights = _layer(layer, block.out_filters)
        convolves = isinstance(layer, CONVOLUTIONS)
        name = block.name if convolves else f"{block.name}.{operator}"
        names = [f"{name}.{key}" for key in weights]
        tensors.update(zip(names, weights.values(), strict=True))
        nodes.append(helper.make_node(operator, [last, *names], [f"{name}.out"], name, **attributes))
        last = f"{name}.out"
    return last


def _layer(layer: nn.Module, n: int) -> tuple[str, dict, dict[str, np.ndarray]]:
    """Operator, attributes and weights of a layer of `n` filters. Raises ValueError for one that is not known."""
    if isinstance(layer, CONVOLUTIONS):
        weights = {key: getattr(layer, key).detach().cpu().numpy() for key in ("weight", "bias")}
        attributes = {"kernel_shape": layer.kernel_size, "strides": layer.stride}
        if layer.transposed:
            return "ConvTranspose", attributes, weights
        return "Conv", attributes | {"pads": (*layer.padding, *layer.padding)}, weights
    if isinstance(layer, InstanceNorm):
        same = {"scale": np.ones(n, np.float32), "shift": np.zeros(n, np.float32)}
        return "InstanceNormalization", {"epsilon": EPSILON}, same
    if isinstance(layer, nn.LeakyReLU) and layer.negative_slope == SLOPE:
        return "LeakyRelu", {"alpha": SLOPE}, {}
    if isinstance(layer, nn.Softmax) and layer.dim == 1:
        return "Softmax", {"axis": 1}, {}
    raise ValueError(f"{layer} cannot be exported")


# --- what the file says -----------------------------------------------------------------------------------------------


def describe(model: Path, network: nnUNet, settings: Settings) -> dict:
    """The metadata of an exported model, of the form that `lib.onnx_file.METADATA` has. No subject is named."""
    dataset, about = settings.dataset, facts()
    sizes = sizes_of(network, dataset, settings.patch_size, settings)
    changes = {key: {"before": size["unpruned"], "after": size["now"]} for key, size in sizes.items()}
    kept = _ancestors(network)
    filters = {
        way: {name: n for name, n in counted.items() if name in kept} for way, counted in count_filters(network).items()
    }
    values = dataset.values or range(dataset.n_classes)
    labels = [{"name": name, "value": int(value)} for name, value in zip(dataset.class_names, values, strict=True)]
    return {
        "format": FORMAT,
        "notice": RESEARCH,
        "made_by": {
            "command": "python -m lib.export",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "git_revision": about["git_revision"],
            "versions": about["versions"] | {"onnx": onnx.__version__},
        },
        "model": {"name": model.name, "sha256": file_digest(model)},
        "data": {"name": dataset.name, "licence": dataset.licence},
        "channels": list(dataset.channels),
        "labels": labels,
        "file_ending": dataset.file_ending,
        "preprocessing": dataset.preprocessing.as_dict(),
        "dim": network.dim,
        "patch_size": list(settings.patch_size),
        "divisor": list(network.divisor),
        "axes": axes_text(dataset.preprocessing.orientation, network.dim),
        "mirroring": {"axes": [*range(2, 2 + int(network.dim[0]))]},
        "step_size": 0.5,
        "postprocessing": _postprocessing(model),
        "filters": filters,
        "parameters": changes["parameters"],
        "flops": changes["flops"],
        "n_filters": changes["filters"],
        "validation": _validation(model),
    }


def _postprocessing(model: Path) -> dict | None:
    """What was decided for this very model, if anything was."""
    steps, _ = read_steps(model)
    if steps is None:
        return None
    return {"steps": list(steps), "reasons": read_json(model.resolve().parent.parent / POSTPROCESSING)["reasons"]}


def _validation(model: Path) -> dict | None:
    """The averages of this very model over whole validation volumes, if it was validated."""
    path = model.resolve().parent.parent / VALIDATION
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("sha256") != file_digest(model):
        return None
    scores = {when: _scores(content[when]["average"]) for when in ("before", "after")}
    return {"n": len(content["after"]["subjects"]), **scores}


def _scores(average: dict) -> dict:
    dice, hd95 = average["dice"], average["HD95"]
    means = {"mean_foreground_dice": mean_foreground(dice), "mean_foreground_HD95_mm": mean_foreground(hd95)}
    return {"dice": dice, "HD95_mm": hd95, **means}


# --- the check --------------------------------------------------------------------------------------------------------


def check_runtimes(
    path: Path, model: nnUNet, settings: Settings, log: Callable[[str], None], data_path: str | None
) -> None:
    """Compare all runtimes that are installed here with torch, on a whole validation volume where one is on disk, and
    tell how long each takes. Raises InputError if one does not agree."""
    file = read_onnx_file(path)
    volume, what = _volume(settings, data_path)
    networks: dict[str, Network] = {"torch": TorchNetwork(model)}
    networks |= {name: open_network(file, name, "cpu") for name in installed()}
    expected, labels = None, None
    for name, network in networks.items():
        found = Predictor(network, settings.patch_size, mirror=False).volume(volume)
        if expected is None:
            expected, labels = found, _labels(found)
            continue
        agree, differs = float((_labels(found) == labels).mean()), float(np.abs(found - expected).max())
        said = f"{name}: {100 * agree:.4f}% of the labels as torch's, softmax within {differs:.1e}, on {what}"
        log(said)
        if agree < LABELS_AGREE or not differs <= SOFTMAX_DIFFERS:
            raise InputError(f"{said}; {100 * LABELS_AGREE}% and {SOFTMAX_DIFFERS} are wanted, so nothing is exported")
    times = milliseconds(networks, settings.patch_size)
    for name, taken in times.items():
        faster = f", {times['torch'] / taken:.2f} times as fast as torch" if name != "torch" else ""
        log(f"{name}: {taken:.1f} ms for a patch{faster}")


def _volume(settings: Settings, data_path: str | None) -> tuple[np.ndarray, str]:
    """A preprocessed volume (C, X, Y, Z), and what it is: the first one of the validation set, or else noise."""
    recipe = settings.dataset.preprocessing
    try:
        files = build_dataset(replace(settings, data_path=data_path or settings.data_path)).files("validation")
    except InputError as error:
        if data_path:
            raise
        files, why = [], str(error).split(";")[0]
    else:
        why = "there is no validation set"
    if files:
        return preprocess(read_channels(files[0].images, recipe)[0], recipe).array, f"validation volume {files[0].id}"
    size = tuple(n + n // 2 for n in settings.patch_size)
    noise = np.random.default_rng(0).normal(size=(settings.modalities, *size, 4)[:4]).astype(np.float32)
    return noise, f"noise, since {why}"


def _labels(probabilities: np.ndarray) -> np.ndarray:
    labels = np.empty(probabilities.shape[1:], np.uint16)
    most_probable(probabilities, labels)
    return labels


def milliseconds(networks: Mapping[str, Network], patch_size: Iterable[int]) -> dict[str, float]:
    """Median time of one patch by network; they take turns, and the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(1 + ROUNDS):
        for name, network in networks.items():
            patch = np.zeros((1, network.modalities, *patch_size), np.float32)
            start = time.perf_counter()
            network(patch)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(taken[1:]) for name, taken in times.items()}


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Export as `argv` says; returns the exit code of `run_script`."""
    parser = Parser(
        "python -m lib.export",
        description="Export a trained model as one ONNX file, which predict.py runs without torch, and check it.",
    )
    add = parser.add_argument
    add("model", type=Path, metavar="RUN/models/model-E", help="the model, in its run folder")
    add("output", type=Path, metavar="OUT.onnx", help="the file to write")
    add("--data_path", help="folder of the data set, for the check (default: that of the training)")
    add("--overwrite", action="store_true", help="replace an existing file (default: refuse)")

    def run() -> None:
        args = parser.parse_args(argv)
        if args.output.exists() and not args.overwrite:
            raise InputError(f"{args.output}: exists already; give --overwrite or another name")
        check_writable(args.output, "OUT.onnx")
        keep_freed_memory()
        torch.use_deterministic_algorithms(True)
        args.output.absolute().parent.mkdir(parents=True, exist_ok=True)
        export(args.model, args.output, print, args.data_path, replace=args.overwrite)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

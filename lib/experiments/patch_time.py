"""How long networks take for one patch, in torch and in OpenVINO: FLOPs are not time."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import numpy as np

from lib.export import to_onnx
from lib.models.nnUNet import nnUNet
from lib.runtimes import OPENERS, usual_threads
from lib.torch_network import TorchNetwork

WARM_UP, ROUNDS = 2, 9


def patch_milliseconds(models: list[nnUNet], patch_size: tuple[int, ...]) -> list[dict[str, float]]:
    """{"torch": ms, "openvino": ms} of each model in eval mode: the median time of a forward pass of one patch in torch
    on the model's device, and in OpenVINO on the CPU if it is installed, with as many threads as torch has by default.

    All of them take turns, so that other load on the machine meets all.
    """
    sides = [_sides(model) for model in models]
    times = [{name: [] for name in of_model} for of_model in sides]
    patches = np.zeros((1, models[0].modalities, *patch_size), np.float32)
    for _ in range(WARM_UP + ROUNDS):
        for of_model, milliseconds in zip(sides, times, strict=True):
            for name, compute in of_model.items():
                start = time.perf_counter()
                compute(patches)
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    return [{name: median(values[WARM_UP:]) for name, values in milliseconds.items()} for milliseconds in times]


def _sides(model: nnUNet) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What computes the softmax maps of patches (B, modalities, *patch), by its name."""
    sides = {"torch": TorchNetwork(model)}
    if find_spec("openvino"):
        sides["openvino"] = OPENERS["openvino"](to_onnx(model, {}).SerializeToString(), usual_threads(), "cpu")
    return sides

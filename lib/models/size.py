"""How large a network is, and how long it takes."""

import time
from statistics import median

import torch
from torch.utils.flop_counter import conv_flop_count

from lib.models.nnUNet import IMAGE, nnUNet
from lib.system.device import device_of


def count_filters(model: nnUNet) -> dict[str, dict[str, int]]:
    """{"in": {name: n}, "out": {name: n}}: the row of this model in the two filter files."""
    return {
        "in": {block.name: block.in_filters for block in model.blocks()},
        "out": {block.name: block.out_filters for block in model.blocks()},
    }


def summary(model: nnUNet, patch_size: tuple[int, ...]) -> dict[str, int]:
    """{"parameters", "flops", "filters"}: torch's count of FLOPs (2 per multiply-add) for one patch; filters that
    can be pruned, so heads not counted.

    It is the sum of FlopCounterMode's formula over the convolutions: the mode itself, and meta tensors, would first
    load torch's compiler, for a second.
    """
    flops, sizes = 0, {IMAGE: patch_size}
    for block in model.blocks():
        before, strides = sizes[block.parents[0]], block.conv.stride
        after = [n * s if block.transposed else n // s for n, s in zip(before, strides, strict=True)]
        shapes = (1, block.in_filters, *before), block.conv.weight.shape, (1, block.out_filters, *after)
        flops += conv_flop_count(*shapes, transposed=block.transposed)
        sizes[block.name] = after
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": flops,
        "filters": sum(block.out_filters for block in model.blocks() if not block.head),
    }


def resized(model: nnUNet, widths: dict[str, int], device: str | torch.device = "meta") -> nnUNet:
    """A network as `model`, with `widths` filters by block; its weights mean nothing (on "meta" it has none)."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        shape = {"dim": model.dim, "strides": model.strides, "kernels": model.kernels}
        return nnUNet(model.modalities, model.n_classes, 1, model.levels, filters={"out": widths}, **shape).eval()


@torch.inference_mode()
def milliseconds(model: nnUNet, patch_size: tuple[int, ...], n: int = 9) -> float:
    """Median time of a forward pass of one patch on the model's device, over `n` passes after two more."""
    device = device_of(model)
    x, times = torch.zeros(1, model.modalities, *patch_size, device=device), []
    for _ in range(n + 2):
        start = time.perf_counter()
        nnUNet.forward(model, x)
        if device.type in ("cuda", "mps"):
            getattr(torch, device.type).synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[2:])

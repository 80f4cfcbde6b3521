"""The surgery that deletes filters from a network and its optimizer (paper section 3.2). No I/O; knows no data set."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lib.models.nnUNet import IMAGE, Block, nnUNet


def prune(model: nnUNet, optimizer: Optimizer | None, keep: dict[str, Tensor]) -> None:
    """Keep only the filters `keep[name]` (indices) of each block named; the other blocks keep all of theirs.

    The block's own convolution, the matching input channels of every consumer and the optimizer's state go together,
    so the network computes what it would if the deleted maps were zero at every consumer.
    """
    table = model.blocks()
    widths = {IMAGE: model.modalities} | {block.name: block.out_filters for block in table}
    replaced = {}
    for block in table:
        inputs, offset = [], 0
        for parent in block.parents:
            kept = keep.get(parent)
            inputs.append(torch.arange(widths[parent]) + offset if kept is None else kept.cpu() + offset)
            offset += widths[parent]
        outputs = keep.get(block.name)
        if outputs is not None or any(parent in keep for parent in block.parents):
            replaced |= _cut(block, torch.cat(inputs), torch.arange(block.out_filters) if outputs is None else outputs)
    if optimizer is not None:
        _replace_in_optimizer(optimizer, replaced)


def _cut(block: Block, inputs: Tensor, outputs: Tensor) -> dict[nn.Parameter, tuple[nn.Parameter, list]]:
    """Slice one convolution; returns {old parameter: (new parameter, its (axis, indices) pairs)}."""
    conv, device = block.conv, block.conv.weight.device
    inputs, outputs = inputs.to(device), outputs.to(device)
    out_axis, in_axis = (1, 0) if block.transposed else (0, 1)
    cuts = {"weight": [(out_axis, outputs), (in_axis, inputs)], "bias": [(0, outputs)]}
    replaced = {}
    for name, cut in cuts.items():
        old = getattr(conv, name)
        new = nn.Parameter(_select(old.detach(), cut), requires_grad=old.requires_grad)
        setattr(conv, name, new)
        replaced[old] = (new, cut)
    conv.in_channels, conv.out_channels = len(inputs), len(outputs)
    return replaced


def _select(tensor: Tensor, cut: list[tuple[int, Tensor]]) -> Tensor:
    for axis, indices in cut:
        tensor = tensor.index_select(axis, indices)
    return tensor.clone(memory_format=torch.contiguous_format)


def _replace_in_optimizer(optimizer: Optimizer, replaced: dict) -> None:
    """Swap the parameters in their groups; state of their own shape (Adam's moments, SGD's momentum) is cut too."""
    for group in optimizer.param_groups:
        group["params"] = [replaced[p][0] if p in replaced else p for p in group["params"]]
    for old, (new, cut) in replaced.items():
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[new] = {
                key: _select(value, cut) if isinstance(value, Tensor) and value.shape == old.shape else value
                for key, value in state.items()
            }

"""Which filters go, and the surgery that deletes them (paper sections 3.2 and 3.3). No I/O; knows no data set."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lib.models.nnUNet import IMAGE, Block, nnUNet

FIRST_TAU = 0.001


@dataclass
class Threshold:
    """A block's threshold, and what it must remember to raise it."""

    step: float = 0  # tau is the step-th of kappa + 1 equidistant values (a published run's may lie between two)
    patience: int = 0
    lost: int = 0  # filters that went at the end of the epoch before ...
    filters_before: int = 1  # ... of so many


def tau(threshold: Threshold, tau_max: float, kappa: int) -> float:
    """The step-th value of linspace(0.001, tau_max, kappa + 1)."""
    return FIRST_TAU + (tau_max - FIRST_TAU) * threshold.step / kappa


def step_of(value: float, tau_max: float, kappa: int) -> float:
    """The step at which a threshold has this value: a whole one if it is among the kappa + 1 values."""
    step = (value - FIRST_TAU) / (tau_max - FIRST_TAU) * kappa if tau_max > FIRST_TAU else 0.0
    return round(step) if abs(step - round(step)) < 1e-6 else step


def training_settled(train_losses: list[float], validation_losses: list[float] | None, rho: int) -> bool:
    """The two conditions on the losses (oldest first); without a validation set (None) only the first one."""
    if len(train_losses) < rho + 1 or (validation_losses is not None and len(validation_losses) < rho + 1):
        return False
    *_, newest = train_losses
    window = train_losses[-rho - 1 : -1]
    if not min(window) <= newest <= max(window):
        return False
    return validation_losses is None or validation_losses[-1] >= min(validation_losses[:-1])


def raise_threshold(threshold: Threshold, settled: bool, kappa: int, rho: int, mu: float) -> None:
    """One epoch's step of a block's threshold: count patience down, or take the next value."""
    if threshold.patience > 0:
        threshold.patience -= 1
    elif settled and threshold.lost < math.ceil(mu * threshold.filters_before) and threshold.step < kappa:
        threshold.step = math.floor(threshold.step) + 1
        threshold.patience = rho


def budget_tau(epoch: int, between: tuple[float, float]) -> float:
    """The threshold of all blocks on the way to a budget: from 0.001 at the first of the two moments (in epochs) it
    climbs at an even pace to 1, the largest delta_prune, at the second one."""
    first, last = between
    return FIRST_TAU + (1 - FIRST_TAU) * min(max((epoch - first) / (last - first), 0.0), 1.0)


def fewest_filters(model: nnUNet, min_filters: int) -> dict[str, int]:
    """How many filters every prunable block keeps at least: `min_filters`, and as many as there are classes where it
    feeds a head, which is a linear combination of its maps. A `min_filters` of 1 is the published rule: 1 anywhere."""
    table = model.blocks()
    feeders = {parent for block in table if block.head and min_filters > 1 for parent in block.parents}
    return {
        block.name: max(min_filters, model.n_classes) if block.name in feeders else min_filters
        for block in table
        if not block.head
    }


def deletable(delta_prune: Tensor, r: int, threshold: float, at_least: int, fraction: float = 1.0) -> list[int]:
    """The filters of a block that may go, the smallest delta_prune first: all below the threshold but r, as long as
    `at_least` filters stay and no more than `fraction` of them go."""
    n = len(delta_prune)
    most = max(0, min(n - at_least, math.floor(fraction * n + 1e-9)))
    values = delta_prune.tolist()
    return [c for c in sorted(range(n), key=values.__getitem__) if c != r and values[c] < threshold][:most]


def fewest_that_fit(
    ranked: list[tuple[str, int]], widths: dict[str, int], fits: Callable[[dict[str, int]], bool]
) -> list[tuple[str, int]]:
    """The shortest beginning of `ranked`, (block, filter) each, without which a network of these widths `fits`; all of
    it if it never does."""

    def enough(n: int) -> bool:
        gone = Counter(name for name, _ in ranked[:n])
        return fits({name: width - gone[name] for name, width in widths.items()})

    return ranked[: bisect_left(range(len(ranked)), True, key=enough)]


def kept(n_filters: int, gone: list[int]) -> Tensor:
    """Indices of the filters that stay."""
    return torch.tensor(sorted(set(range(n_filters)) - set(gone)))


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

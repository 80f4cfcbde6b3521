"""The networks of the benchmark's rows that are made like a pruned Sauron: of one width, or pruned by torch-pruning."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch

from lib.models.flat import flops_of_width, of_width
from lib.models.nnUNet import nnUNet
from lib.models.size import resized, summary

try:
    import torch_pruning
except ImportError:  # nothing else in the project needs it
    torch_pruning = None

TORCH_PRUNING = "torch-pruning==1.6.1"


def nearest(sizes: range, flops_of: Callable[[int], int], flops: int) -> int:
    """The size whose FLOPs, which grow with it, are nearest to `flops`."""
    i = bisect_left(sizes, flops, key=flops_of)  # of the first that has so many
    return min(sizes[max(i - 1, 0) : i + 1], key=lambda size: abs(flops_of(size) - flops))


def flat(model: nnUNet, flops: int, patch_size: tuple[int, ...]) -> nnUNet:
    """A network as `model`, without weights, whose blocks but the heads have one width: that of the nearest FLOPs."""
    return of_width(model, nearest(range(1, 481), lambda width: flops_of_width(model, width, patch_size), flops))


def prune_by_magnitude(model: nnUNet, flops: int, patch_size: tuple[int, ...]) -> None:
    """Prune `model` in place with torch-pruning, to the number of filters whose FLOPs are nearest to `flops`.

    Importance is the library's `MagnitudeImportance` with its defaults: the squared L2 norm of a filter and of its
    channels in every consumer, averaged over these layers and divided by the block's mean. The filters of all blocks
    are ranked together and the least important go, but the best of each block; heads and inputs are not pruned.
    """
    blocks = {block.name: block for block in model.blocks() if not block.head}
    widths = {name: block.out_filters for name, block in blocks.items()}
    example = torch.zeros(1, model.modalities, *(2 * n for n in model.divisor))
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)

    def group(name: str, filters: list[int]):
        return graph.get_pruning_group(blocks[name].conv, torch_pruning.prune_conv_out_channels, filters)

    importance, ranking = torch_pruning.importance.MagnitudeImportance(), []
    for name, width in widths.items():
        scores = importance(group(name, list(range(width)))).tolist()
        ranking += sorted((score, name, c) for c, score in enumerate(scores))[:-1]
    ranking.sort()

    def flops_with(n: int) -> int:
        gone = Counter(name for _, name, _ in ranking[: len(ranking) - n])
        out = {name: width - gone[name] for name, width in widths.items()}
        return summary(resized(model, out), patch_size)["flops"]

    n = len(ranking) - nearest(range(len(ranking) + 1), flops_with, flops)
    for name in widths:
        if filters := [c for _, other, c in ranking[:n] if other == name]:
            group(name, filters).prune()

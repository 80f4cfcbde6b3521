"""Which filters of a network may go."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from lib.models.nnUNet import nnUNet


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
    `at_least` filters stay and no more than `fraction` of them go. One may always go: a small block would else keep
    more than `at_least` for good."""
    n = len(delta_prune)
    most = max(0, min(n - at_least, max(1, math.floor(fraction * n + 1e-9))))
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

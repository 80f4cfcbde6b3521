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


def next_group(n_filters: int, multiple: int) -> int:
    """How many filters of a block go at once, so that as many stay as are a multiple of `multiple`."""
    return n_filters % multiple or multiple


def deletable(
    delta_prune: Tensor, r: int, threshold: float, at_least: int, fraction: float = 1.0, multiple: int = 1
) -> list[int]:
    """The filters of a block that may go, the smallest delta_prune first: all below the threshold but r, as long as
    `at_least` filters stay and no more than `fraction` of them go, in groups of which each leaves a multiple of
    `multiple` filters. One group may always go: a small block would else keep more than `at_least` for good."""
    n = len(delta_prune)
    most = max(0, min(n - at_least, max(next_group(n, multiple), math.floor(fraction * n + 1e-9))))
    values = delta_prune.tolist()
    gone = [c for c in sorted(range(n), key=values.__getitem__) if c != r and values[c] < threshold][:most]
    return gone[: max(0, len(gone) - (len(gone) - n) % multiple)]


def ranking(candidates: dict[str, list[int]], measured: dict[str, tuple[Tensor, int]], multiple: int = 1) -> list:
    """(block, filter) of all `candidates`, which `deletable` chose: group by group, in the order in which a rising
    threshold would pass the last filter of each."""
    keys = []
    for name, gone in candidates.items():
        delta, _ = measured[name]
        for i, c in enumerate(gone):
            last = gone[i + (len(delta) - 1 - i) % multiple]  # of its group
            keys.append((delta[last].item(), name, i, c))
    return [(name, c) for _, name, _, c in sorted(keys)]


def fewest_that_fit(
    ranked: list[tuple[str, int]],
    widths: dict[str, int],
    fits: Callable[[dict[str, int]], bool],
    multiple: int = 1,
) -> list[tuple[str, int]]:
    """The shortest beginning of `ranked`, (block, filter) each, without which a network of these widths `fits`; all of
    it if it never does. With a `multiple` it ends where a group of `ranking` does."""
    left, ends = Counter(widths), [0]
    for n, (name, _) in enumerate(ranked, 1):
        left[name] -= 1
        if left[name] % multiple == 0:
            ends.append(n)

    def enough(n: int) -> bool:
        gone = Counter(name for name, _ in ranked[:n])
        return fits({name: width - gone[name] for name, width in widths.items()})

    return ranked[: ends[bisect_left(ends[:-1], True, key=enough)]]


def kept(n_filters: int, gone: list[int]) -> Tensor:
    """Indices of the filters that stay."""
    return torch.tensor(sorted(set(range(n_filters)) - set(gone)))

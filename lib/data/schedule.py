"""Which patches an epoch shows, and in which batches. It is decided with numbers alone, before anything is loaded."""

from collections.abc import Sequence

import torch


def visits(sizes: Sequence[int], n_patches: int | None, generator: torch.Generator) -> list[int]:
    """The volumes, by number, in the order in which they are augmented; volume i gives sizes[i] patches each time.

    They come in random permutations, one after another, until there are `n_patches`; None: in one permutation.
    """
    order = torch.randperm(len(sizes), generator=generator).tolist()
    n = sum(sizes)
    while n_patches is not None and n < n_patches:
        order += torch.randperm(len(sizes), generator=generator).tolist()
        n += sum(sizes)
    while n_patches is not None and n - sizes[order[-1]] >= n_patches:
        n -= sizes[order.pop()]
    return order


def batches(sizes: Sequence[int], batch_size: int, queue: int, generator: torch.Generator) -> list[list[int]]:
    """The patches of each batch, by number; visit i gives the next sizes[i] numbers. The last batch may be smaller.

    Patches are mixed within every `queue` visits, with those that were left over before.
    """
    made, left, first = [], [], 0
    for start in range(0, len(sizes), queue):
        n = sum(sizes[start : start + queue])
        held = [*left, *range(first, first + n)]
        first += n
        mixed = [held[i] for i in torch.randperm(len(held), generator=generator).tolist()]
        n_full = len(mixed) // batch_size * batch_size
        made += [mixed[i : i + batch_size] for i in range(0, n_full, batch_size)]
        left = mixed[n_full:]
    return [*made, left] if left else made


def foreground(batches: Sequence[Sequence[int]], share: float, n_patches: int) -> list[bool]:
    """Which of the patches must show foreground: nnU-Net's rule, in every batch those from the place
    round((1 - share) * its size) on."""
    shows = [False] * n_patches
    for batch in batches:
        for number in batch[round(len(batch) * (1 - share)) :]:
            shows[number] = True
    return shows

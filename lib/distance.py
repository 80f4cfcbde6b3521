"""Distances between the feature maps of one block (paper section 3.1; Sauron's delta_opt and delta_prune).

Every function takes the block's output `h` of shape (B, C, *spatial) and compares average-pooled maps: `sf` is window
and stride of the pooling. Pooling is linear, so it may come before the min-max normalisation: no normalised map of
full size is ever made.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_RANGE = 1e-6  # a map that varies less is constant: it normalises to zeros, and gets no gradient


def _pool(h: Tensor, sf: int) -> Tensor:
    window = [min(sf, size) for size in h.shape[2:]]
    return (F.avg_pool2d if h.ndim == 4 else F.avg_pool3d)(h, window)


def _rms(difference: Tensor) -> Tensor:
    """Root mean square over the spatial axes, (B, C, *spatial) -> (B, C); its gradient at exactly 0 is 0, not NaN."""
    mean_square = difference.square().flatten(2).mean(2)
    positive = mean_square > 0
    return torch.where(positive, mean_square.where(positive, 1.0).sqrt(), 0.0)


def euc_norm(h: Tensor, sf: int = 2) -> Tensor:
    """delta_opt: distance of every map to the first one, each map scaled to [0, 1] per image and channel.

    (B, C, *spatial) -> (B, C - 1): `rms(pool(n_1) - pool(n_c))` for c = 2..C, n the min-max normalised maps.
    """
    spatial = tuple(range(2, h.ndim))
    low, high = h.amin(spatial, keepdim=True), h.amax(spatial, keepdim=True)
    varies = high - low > SMALLEST_RANGE
    scale = torch.where(varies, 1 / (high - low).where(varies, 1.0), 0.0)
    n = (_pool(h, sf) - low) * scale
    return _rms(n[:, :1] - n[:, 1:])


def euc_norm_nonorm(h: Tensor, sf: int = 2) -> Tensor:
    """As `euc_norm` without the min-max normalisation."""
    pooled = _pool(h, sf)
    return _rms(pooled[:, :1] - pooled[:, 1:])


def euc_norm_deltaprunenorm(h: Tensor, sf: int = 2) -> Tensor:
    """As `euc_norm_nonorm`, then divided per image by its largest distance, as delta_prune is."""
    return _over_largest(euc_norm_nonorm(h, sf))


def _over_largest(distance: Tensor) -> Tensor:
    """(B, C) -> (B, C) in [0, 1]; where all distances are 0 they stay 0."""
    if distance.shape[1] == 0:
        return distance
    largest = distance.amax(1, keepdim=True)
    return distance / largest.where(largest > 0, 1.0)


@torch.no_grad()
def euc_rand(h: Tensor, sf: int = 2) -> tuple[Tensor, int]:
    """delta_prune: distance of every map to a randomly chosen one, relative to the largest, averaged over the batch.

    (B, C, *spatial) -> ((C,) in [0, 1], r), 0 for r itself. r comes from torch's CPU generator, one for the batch.
    """
    r = int(torch.randint(h.shape[1], (1,)))
    pooled = _pool(h.float(), sf)
    return _over_largest(_rms(pooled[:, r : r + 1] - pooled)).mean(0), r


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "euc_norm": euc_norm,
    "euc_norm_nonorm": euc_norm_nonorm,
    "euc_norm_deltaprunenorm": euc_norm_deltaprunenorm,
}
IMPORTANCES: dict[str, Callable[..., tuple[Tensor, int]]] = {"euc_rand": euc_rand}

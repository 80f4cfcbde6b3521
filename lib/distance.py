"""Distances between the feature maps of one block (paper section 3.1; Sauron's delta_opt and delta_prune).

Every function takes the block's output `h` of shape (B, C, *spatial) and compares average-pooled maps: `sf` is window
and stride of the pooling. Pooling is linear, so it may come before the min-max normalisation: no normalised map of
full size is ever made.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_RANGE = 1e-6  # a map that varies less is constant: it normalises to zeros, and gets no gradient


def _pool(h: Tensor, sf: int) -> Tensor:
    """Average pooling with window and stride `sf` (an axis shorter than that is averaged whole), at least float32."""
    window = [min(sf, size) for size in h.shape[2:]]
    if h.device.type != "cpu":
        return _at_least_float32((F.avg_pool2d if h.ndim == 4 else F.avg_pool3d)(h, window))
    for axis, w in enumerate(window, 2):  # axis by axis: on the CPU a seventh of the time of torch's pooling
        n = h.shape[axis] // w
        first, *rest = h.narrow(axis, 0, n * w).unflatten(axis, (n, w)).unbind(axis + 1)
        h = sum(rest, first)
    return _at_least_float32(h) / math.prod(window)


def _at_least_float32(h: Tensor) -> Tensor:
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _unpool(g: Tensor, size: torch.Size, sf: int) -> Tensor:
    """The backward pass of `_pool` but for its factor: each value of `g` at every voxel of its window, else zeros."""
    window = [min(sf, n) for n in size]
    used = [n - n % w for n, w in zip(size, window, strict=True)]
    spread = g.new_zeros(*g.shape[:2], *size) if used != list(size) else g.new_empty(*g.shape[:2], *size)
    for offset in itertools.product(*map(range, window)):
        spread[(..., *(slice(o, end, w) for o, end, w in zip(offset, used, window, strict=True)))] = g
    return spread


def _rms(difference: Tensor) -> Tensor:
    """Root mean square over the spatial axes, (B, C, *spatial) -> (B, C); its gradient at exactly 0 is 0, not NaN."""
    mean_square = difference.square().flatten(2).mean(2)
    positive = mean_square > 0
    return torch.where(positive, mean_square.where(positive, 1.0).sqrt(), 0.0)


class _EucNorm(torch.autograd.Function):
    """`euc_norm` with a backward pass by hand: it keeps only pooled maps, and touches the full size once.

    n = (p - low) / (high - low), p the pooled map of N pixels, low and high the extremes of the map itself; with
    d_c = n_c - n_1, delta_c^2 = sum(d_c^2) / N. The gradient of n is g_c = w_c d_c, w_c = grad_c / (N delta_c), and
    g_1 = -sum_c g_c. It reaches h through p, and through the two voxels that hold the extremes:
    by_high = -sum(g n) / (high - low) and by_low = -sum(g) / (high - low) - by_high, where
    sum(g_c n_c) = w_c (sum(d_c^2) + sum(d_c n_1)).
    """

    @staticmethod
    def forward(ctx, h: Tensor, sf: int) -> Tensor:
        size, dtype = h.shape[2:], h.dtype
        if h.device.type == "cpu":
            h = _at_least_float32(h)
        low, high = _extremes(h.flatten(2))
        spread = high.values - low.values
        varies = spread > SMALLEST_RANGE
        scale = torch.where(varies, 1 / spread.where(varies, 1.0), 0.0)
        p = _pool(h, sf).flatten(2)
        n = p.sub_(low.values[..., None]).mul_(scale[..., None])
        d = n - n[:, :1]
        delta = torch.linalg.vector_norm(d, dim=2) / math.sqrt(d.shape[2])
        ctx.save_for_backward(d, n[:, 0].clone(), delta, scale, low.indices, high.indices)
        ctx.size, ctx.sf, ctx.dtype = size, sf, dtype
        return delta[:, 1:]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        d, first, delta, scale, i_low, i_high = ctx.saved_tensors
        n_pixels = d.shape[2]
        w = F.pad(grad, (1, 0)) / delta.where(delta > 0, 1.0) / n_pixels
        w = torch.where(delta > 0, w, 0.0)
        sum_dn, sum_d = (d * first[:, None]).sum(2), d.sum(2)
        sum_gn, sum_g = w * (n_pixels * delta.square() + sum_dn), w * sum_d
        sum_gn[:, 0], sum_g[:, 0] = -(w * sum_dn).sum(1), -sum_g.sum(1)
        by_high = -scale * sum_gn
        by_low = -scale * sum_g - by_high

        window = [min(ctx.sf, size) for size in ctx.size]
        scale = scale / math.prod(window)
        g = d * (w * scale)[..., None]
        g[:, 0] = -scale[:, :1] * (w[:, None] @ d)[:, 0]
        pooled_size = [size // side for size, side in zip(ctx.size, window, strict=True)]
        h = _unpool(g.to(ctx.dtype).unflatten(2, pooled_size), ctx.size, ctx.sf)
        for indices, values in ((i_low, by_low), (i_high, by_high)):
            h.flatten(2).scatter_add_(2, indices[..., None], values[..., None].to(ctx.dtype))
        return h, None


class _Extreme(NamedTuple):
    values: Tensor
    indices: Tensor


def _extremes(flat: Tensor) -> tuple[_Extreme, _Extreme]:
    """Smallest and largest value of each map, and where they are: (B, C, N) -> two times ((B, C), (B, C))."""
    if flat.device.type != "cpu":
        return tuple(_Extreme(_at_least_float32(e.values), e.indices) for e in (flat.min(2), flat.max(2)))
    array = flat.detach().numpy()  # numpy finds them ten times faster
    indices = [torch.from_numpy(find(array, axis=2)) for find in (np.argmin, np.argmax)]
    return tuple(_Extreme(flat.gather(2, i[..., None])[..., 0], i) for i in indices)


def euc_norm(h: Tensor, sf: int = 2) -> Tensor:
    """delta_opt: distance of every map to the first one, each map scaled to [0, 1] per image and channel.

    (B, C, *spatial) -> (B, C - 1): `rms(pool(n_1) - pool(n_c))` for c = 2..C, n the min-max normalised maps.
    """
    return _EucNorm.apply(h, sf)


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
    pooled = _pool(h, sf)
    return _over_largest(_rms(pooled[:, r : r + 1] - pooled)).mean(0), r


DISTANCES: dict[str, Callable[..., Tensor]] = {
    "euc_norm": euc_norm,
    "euc_norm_nonorm": euc_norm_nonorm,
    "euc_norm_deltaprunenorm": euc_norm_deltaprunenorm,
}
IMPORTANCES: dict[str, Callable[..., tuple[Tensor, int]]] = {"euc_rand": euc_rand}

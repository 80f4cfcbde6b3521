"""The layers that the network is made of."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOGETHER = 16  # filters: what a CPU of today computes at once
SLOW = 20480  # channels x planes x rows: a single patch of at most so many is left to slow_conv3d by torch


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over all spatial axes of each image and channel of (B, C, *spatial).

    On the CPU a group norm of one channel per group is several times as fast as torch's instance norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, x.shape[1]) if x.device.type == "cpu" else F.instance_norm(x)


class Conv2d(nn.Conv2d):
    """A convolution that takes and gives maps as they are usually stored, but may compute with the channels last.

    With few filters this makes the backward pass on the CPU two to four times as fast (see `_channels_last`).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not _channels_last(self, TOGETHER - 1):
            return super().forward(x)
        x = _Stored.apply(x, torch.channels_last, torch.contiguous_format)
        return _Stored.apply(super().forward(x), torch.contiguous_format, torch.channels_last)


class Conv3d(nn.Conv3d):
    """A convolution that may compute with the channels last, as `Conv2d` does.

    For a single small patch torch would choose a method that is three to fifteen times as slow. So in its inference
    mode oneDNN is called by its name, and in training the patch is computed as a batch of two, its halves. (torch's
    counter of FLOPs does not see the one, and counts twice what the halves share; outside of both it is right.)
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if len(x) != 1:
            return self._by(F.conv3d, x, self.padding)
        if self._is_for_onednn(x):
            return self._by(_by_onednn, x, self.padding)
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self._by_halves(x) if trains and math.prod(x.shape[1:4]) <= SLOW else super().forward(x)

    def _is_for_onednn(self, x: Tensor) -> bool:
        """Whether oneDNN takes this patch by its name, which torch's compiler cannot be told."""
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return False
        plain = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return plain and torch.backends.mkldnn.is_available()

    def _by_halves(self, x: Tensor) -> Tensor:
        """The planes of its first axis in two parts, with what each needs of the other: of an odd number, the second
        part computes one again, which is left out."""
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        x = F.pad(x, (0, 0, 0, 0, padding, padding))
        n = (x.shape[2] - kernel) // stride + 1
        half = math.ceil(n / 2)
        planes = (half - 1) * stride + kernel
        both = torch.cat([x.narrow(2, first * stride, planes) for first in (0, n - half)])
        first, second = self._by(F.conv3d, both, (0, *self.padding[1:])).split(1)
        return torch.cat([first, second[:, :, 2 * half - n :]], 2)

    def _by(self, function: Callable[..., Tensor], x: Tensor, padding: tuple[int, ...]) -> Tensor:
        how = (self.weight, self.bias, self.stride, padding, self.dilation, self.groups)
        if not _channels_last(self, TOGETHER):
            return function(x, *how)
        x = _Stored.apply(x, torch.channels_last_3d, torch.contiguous_format)
        return _Stored.apply(function(x, *how), torch.contiguous_format, torch.channels_last_3d)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: tuple, *how: object) -> Tensor:
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, *how)


def _channels_last(conv: nn.Module, few: int) -> bool:
    """Whether a convolution is faster with the channels last: one that trains with at most `few` filters, or one whose
    filters are padded to groups of `TOGETHER` that are mostly empty (17 are padded to 32)."""
    n_in, n_out = conv.in_channels, conv.out_channels
    padded_in, padded_out = (TOGETHER * math.ceil(n / TOGETHER) for n in (n_in, n_out))
    if not torch.is_grad_enabled():
        return TOGETHER < n_in <= 0.75 * padded_in
    return min(n_in, n_out) <= few or n_in * n_out <= 0.6 * padded_in * padded_out


class _Stored(torch.autograd.Function):
    """The same tensor in another memory format, and its gradient in a format of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, memory_format: torch.memory_format, of_gradient: torch.memory_format) -> Tensor:
        ctx.memory_format = of_gradient
        return x.contiguous(memory_format=memory_format)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.contiguous(memory_format=ctx.memory_format), None, None


class ConvBlock(nn.Module):
    """Convolution -> InstanceNorm -> LeakyReLU(0.01); kernel (odd) and stride have a number per axis.

    The padding is half the kernel: with a stride of 1 the maps keep their size.
    """

    def __init__(self, in_filters: int, out_filters: int, kernel: tuple[int, ...], stride: int | tuple[int, ...] = 1):
        super().__init__()
        conv = Conv2d if len(kernel) == 2 else Conv3d
        self.seq = nn.Sequential(
            conv(in_filters, out_filters, kernel, stride, padding=tuple(k // 2 for k in kernel)),
            InstanceNorm(),
            nn.LeakyReLU(0.01, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)

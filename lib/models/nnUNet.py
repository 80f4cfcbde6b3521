"""The nnU-Net-like network that Sauron starts from (paper section 4.1)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.BaseModel import BaseModel

IMAGE = "image"  # the parent of the first block
FEW = 16  # filters: what a CPU of today computes at once


@dataclass(frozen=True)
class Block:
    """One convolution of the network: its name in filter files, and the blocks whose outputs it eats, in order."""

    name: str
    conv: nn.Module
    parents: tuple[str, ...]
    transposed: bool = False
    head: bool = False

    @property
    def in_filters(self) -> int:
        return self.conv.in_channels

    @property
    def out_filters(self) -> int:
        return self.conv.out_channels


class InstanceNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) over all spatial axes of each image and channel of (B, C, *spatial).

    On the CPU a group norm of one channel per group is several times as fast as torch's instance norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, x.shape[1]) if x.device.type == "cpu" else F.instance_norm(x)


class Conv2d(nn.Conv2d):
    """A convolution that takes and gives maps as they are usually stored, but may compute with the channels last.

    For the few filters of a pruned network this makes the backward pass on the CPU two to four times as fast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled() or min(self.in_channels, self.out_channels) >= FEW:
            return super().forward(x)
        x = _Stored.apply(x, torch.channels_last, torch.contiguous_format)
        return _Stored.apply(super().forward(x), torch.contiguous_format, torch.channels_last)


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
    """Convolution 3x3(x3) -> InstanceNorm -> LeakyReLU(0.01)."""

    def __init__(self, in_filters: int, out_filters: int, dim: str, stride: int = 1):
        super().__init__()
        conv = Conv2d if dim == "2D" else nn.Conv3d
        self.seq = nn.Sequential(
            conv(in_filters, out_filters, 3, stride=stride, padding=1),
            InstanceNorm(),
            nn.LeakyReLU(0.01, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class nnUNet(BaseModel):
    """U-Net with strided convolutions, transposed convolutions and deep supervision.

    Level i = 0..levels-1 has min(fms_init * 2**i, fms_max) filters; `filters` = {"in": {name: n}, "out": {name: n}}
    (filter files; "out" is enough) overrides these widths; {} counts as None. Called with (B, modalities, *spatial), or
    a list of this one tensor as published, it returns the softmax maps (B, n_classes, *spatial / 2**k) of its
    levels - 2 heads, from full resolution (k = 0) downwards. Each spatial size must be a multiple of 2**(levels - 1).

    `normLayer` belongs to the published interface, where nothing depends on it either: the norm is the instance norm.
    """

    def __init__(
        self,
        modalities: int,
        n_classes: int,
        fms_init: int = 48,
        levels: int = 5,
        normLayer: object = None,  # noqa: N803 (the published name)
        fms_max: int = 480,
        dim: str = "2D",
        filters: dict[str, dict[str, int]] | None = None,
    ):
        super().__init__()
        if dim not in ("2D", "3D") or levels < 3:
            raise ValueError(f"dim must be '2D' or '3D' and levels at least 3, not {dim!r} and {levels}")
        self.modalities, self.n_classes, self.levels, self.dim = modalities, n_classes, levels, dim
        transposed, conv = (nn.ConvTranspose2d, nn.Conv2d) if dim == "2D" else (nn.ConvTranspose3d, nn.Conv3d)
        widths = [min(fms_init * 2**i, fms_max) for i in range(levels)]
        given = filters["out"] if filters else {}
        out = {IMAGE: modalities}  # the number of maps that each block gives, by name

        def width(name: str, default: int) -> int:
            out[name] = int(given.get(name, default))  # filter files read by pandas give numpy's numbers
            return out[name]

        # Encoder: two blocks a level, the first of each level but the top one halves the size.
        self.encoder = nn.ModuleList()
        names = [f"enc_ConvBlock_{k + 1}" for k in range(2 * levels)]
        for k, (parent, name) in enumerate(zip([IMAGE, *names], names, strict=False)):
            stride = 2 if k % 2 == 0 and k > 0 else 1
            self.encoder.append(ConvBlock(out[parent], width(name, widths[k // 2]), dim, stride))

        # Decoder: from the deepest stage up; a ConvBlock eats [skip, up], in this order.
        self.decoder, self.last = nn.ModuleList(), nn.ModuleList()
        below = names[-1]
        for stage, level in enumerate(range(levels - 2, -1, -1)):
            up, first, second = self._stage_names(stage)
            self.decoder.append(transposed(out[below], width(up, widths[level]), 2, stride=2))
            skip = out[f"enc_ConvBlock_{2 * level + 2}"]
            self.decoder.append(ConvBlock(skip + out[up], width(first, widths[level]), dim))
            self.decoder.append(ConvBlock(out[first], width(second, widths[level]), dim))
            if stage > 0:
                self.last.append(nn.Sequential(conv(out[second], n_classes, 1), nn.Softmax(dim=1)))
            below = second

    def _stage_names(self, stage: int) -> tuple[str, str, str]:
        up = f"dec_ConvTranspose{self.dim.lower()}_{stage + 1}"
        return up, f"dec_ConvBlock_{2 * stage + 1}", f"dec_ConvBlock_{2 * stage + 2}"

    def blocks(self) -> list[Block]:
        """Every convolution in the order of the forward pass: the one table that pruning and filter files use."""
        table, below = [], IMAGE
        for k, block in enumerate(self.encoder):
            table.append(Block(f"enc_ConvBlock_{k + 1}", block.seq[0], (below,)))
            below = table[-1].name
        for stage in range(self.levels - 1):
            up, first, second = self._stage_names(stage)
            skip = f"enc_ConvBlock_{2 * (self.levels - 1 - stage)}"
            table.append(Block(up, self.decoder[3 * stage], (below,), transposed=True))
            for i, (name, parents) in enumerate([(first, (skip, up)), (second, (first,))]):
                table.append(Block(name, self.decoder[3 * stage + 1 + i].seq[0], parents))
            if stage > 0:
                table.append(Block(f"dec_Sequential_{stage}", self.last[stage - 1][0], (second,), head=True))
            below = second
        return table

    def feature_maps(self, x: Tensor | list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The forward pass, block by block: yields (name, output); heads give their softmax maps."""
        if isinstance(x, list | tuple):
            if len(x) != 1:
                raise ValueError(f"the network takes one tensor, not a list of {len(x)}")
            x = x[0]
        factor = 2 ** (self.levels - 1)
        if any(size % factor for size in x.shape[2:]):
            raise ValueError(f"spatial size {tuple(x.shape[2:])} is not a multiple of {factor} on every axis")
        skips = []
        for k, block in enumerate(self.encoder):
            x = block(x)
            yield f"enc_ConvBlock_{k + 1}", x
            if k % 2 == 1:
                skips.append(x)
        skips.pop()  # the bottleneck is no skip
        for stage in range(self.levels - 1):
            up, first, second = self._stage_names(stage)
            x = self.decoder[3 * stage](x)
            yield up, x
            x = self.decoder[3 * stage + 1](torch.cat([skips.pop(), x], dim=1))
            yield first, x
            x = self.decoder[3 * stage + 2](x)
            yield second, x
            if stage > 0:
                yield f"dec_Sequential_{stage}", self.last[stage - 1](x)

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        heads = [output for name, output in self.feature_maps(x) if name.startswith("dec_Sequential")]
        return heads[::-1]

    def forward_saveFMs(self, x: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """All feature maps of a batch, (B, C, *spatial) by the block's name; the heads' softmax maps are the last."""
        return dict(self.feature_maps(x))

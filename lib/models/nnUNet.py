"""The nnU-Net-like network that Sauron starts from (paper section 4.1)."""

import math
from collections.abc import Callable, Iterator, Sequence
from operator import index

from torch import Tensor, nn

from lib.models.BaseModel import IMAGE, BaseModel, Block
from lib.models.layers import ConvBlock

PerLevel = Sequence[Sequence[int]]  # a number per axis for each level


class nnUNet(BaseModel):
    """U-Net with strided convolutions, transposed convolutions and deep supervision.

    Level i = 0..levels-1 has min(fms_init * 2**i, fms_max) filters; `filters` = {"in": {name: n}, "out": {name: n}}
    (filter files; "out" is enough) overrides these widths; {} counts as None. `strides` and `kernels` hold a number per
    axis for each level, as nnU-Net's plans do: the step from the level above to this one (1 at the first; None: 2 at
    all others), and the size of this level's convolutions (odd; None: 3).

    Called with (B, modalities, *spatial), or a list of this one tensor as published, it returns the softmax maps
    (B, n_classes, ...) of its levels - 2 heads, from full resolution downwards, each at the size of its level. Each
    spatial size must be a multiple of `divisor`.

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
        strides: PerLevel | None = None,
        kernels: PerLevel | None = None,
    ):
        super().__init__()
        if dim not in ("2D", "3D") or levels < 3:
            raise ValueError(f"dim must be '2D' or '3D' and levels at least 3, not {dim!r} and {levels}")
        self.modalities, self.n_classes, self.levels, self.dim = modalities, n_classes, levels, dim
        transposed, conv = (nn.ConvTranspose2d, nn.Conv2d) if dim == "2D" else (nn.ConvTranspose3d, nn.Conv3d)
        axes = int(dim[0])
        self.strides = _per_level("strides", strides, [[1] * axes] + [[2] * axes] * (levels - 1))
        self.kernels = _per_level("kernels", kernels, [[3] * axes] * levels)
        if max(self.strides[0]) > 1:
            raise ValueError(f"the first level's strides must be 1, as it has the image's size, not {self.strides[0]}")
        if any(k % 2 == 0 for kernel in self.kernels for k in kernel):
            raise ValueError(f"kernels must be odd, not {self.kernels}")
        given = filters["out"] if filters else {}
        out = {IMAGE: modalities}  # the number of maps that each block gives, by name

        def add(part: nn.ModuleList, name: str, parents: list[str], level: int, layer: Callable, *args) -> str:
            """One more block, `layer(maps of its parents, its filters, *args)`; returns its name."""
            # filter files read by pandas give numpy's numbers
            out[name] = int(given.get(name, min(fms_init * 2**level, fms_max)))
            self.add(part, Block(name, layer(sum(out[p] for p in parents), out[name], *args), tuple(parents)))
            return name

        # The order of the parts is that of the parameters.
        self.encoder, self.decoder, self.last = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()

        # Encoder: two blocks a level; the first one comes down from the level above.
        x, skips = IMAGE, []
        for level, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            x = add(self.encoder, f"enc_ConvBlock_{2 * level + 1}", [x], level, ConvBlock, kernel, stride)
            x = add(self.encoder, f"enc_ConvBlock_{2 * level + 2}", [x], level, ConvBlock, kernel)
            skips.append(x)

        # Decoder: from the level above the deepest up; the kernel of the way up is the stride of the way down.
        for stage, level in enumerate(range(levels - 2, -1, -1), 1):
            kernel, stride = self.kernels[level], self.strides[level + 1]
            x = add(self.decoder, f"dec_ConvTranspose{dim.lower()}_{stage}", [x], level, transposed, stride, stride)
            x = add(self.decoder, f"dec_ConvBlock_{2 * stage - 1}", [skips[level], x], level, ConvBlock, kernel)
            x = add(self.decoder, f"dec_ConvBlock_{2 * stage}", [x], level, ConvBlock, kernel)
            if stage > 1:
                head = nn.Sequential(conv(out[x], n_classes, 1), nn.Softmax(dim=1))
                self.add(self.last, Block(f"dec_Sequential_{stage - 1}", head, (x,), head=True))

    @property
    def divisor(self) -> tuple[int, ...]:
        """By axis: what the spatial size must be a multiple of, so that the way up ends at the sizes of the skips."""
        return tuple(map(math.prod, zip(*self.strides, strict=True)))

    def run(self, x: Tensor | list[Tensor]) -> Iterator[tuple[Block, Tensor]]:
        if isinstance(x, list | tuple):
            if len(x) != 1:
                raise ValueError(f"the network takes one tensor, not a list of {len(x)}")
            x = x[0]
        size, divisor = tuple(x.shape[2:]), self.divisor
        if len(size) != len(divisor) or any(n % d for n, d in zip(size, divisor, strict=True)):
            raise ValueError(f"spatial size {size} is not a multiple of {' x '.join(map(str, divisor))}")
        return super().run(x)

    def forward(self, x: Tensor | list[Tensor]) -> list[Tensor]:
        return [output for block, output in self.run(x) if block.head][::-1]


def _per_level(what: str, given: PerLevel | None, default: PerLevel) -> tuple[tuple[int, ...], ...]:
    """`given`, or else `default`. Raises ValueError unless it has as many numbers, and whole ones above 0."""
    try:
        rows = tuple(tuple(map(index, row)) for row in (default if given is None else given))
    except TypeError:
        rows = ()
    levels, axes = len(default), len(default[0])
    if [len(row) for row in rows] != [axes] * levels or min(map(min, rows)) < 1:
        raise ValueError(f"{what} must hold {axes} whole numbers above 0 for each of {levels} levels, not {given}")
    return rows

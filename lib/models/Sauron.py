"""Sauron: the network that measures the distances between its feature maps while it computes them."""

from typing import NamedTuple

from torch import Tensor

from lib.distance import DISTANCES, IMPORTANCES
from lib.models.nnUNet import nnUNet


class Measured(NamedTuple):
    outputs: list[Tensor]
    delta_opt: dict[str, Tensor]  # (B, C - 1) by prunable block
    delta_prune: dict[str, tuple[Tensor, int]]  # ((C,), r) by prunable block


class Sauron(nnUNet):
    """nnUNet with the same keys and widths, plus the two distances of the paper.

    dist_fun: name of delta_opt in lib.distance.DISTANCES; imp_fun: of delta_prune in IMPORTANCES; sf: their pooling.
    """

    def __init__(self, *args, dist_fun: str = "euc_norm", imp_fun: str = "euc_rand", sf: int = 2, **kwargs):
        super().__init__(*args, **kwargs)
        self.dist_fun, self.imp_fun, self.sf = DISTANCES[dist_fun], IMPORTANCES[imp_fun], sf

    def forward(
        self, x: Tensor | list[Tensor], delta_opt: bool = False, delta_prune: bool = False
    ) -> list[Tensor] | Measured:
        """The heads' softmax maps as nnUNet returns them; `Measured` where a distance is asked for."""
        if not (delta_opt or delta_prune):
            return super().forward(x)
        measured = Measured([], {}, {})
        for block, h in self.run(x):
            if block.head:
                measured.outputs.insert(0, h)
                continue
            if delta_opt:
                measured.delta_opt[block.name] = self.dist_fun(h, self.sf)
            if delta_prune:
                measured.delta_prune[block.name] = self.imp_fun(h, self.sf)
        return measured

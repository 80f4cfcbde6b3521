"""What `speed` compares with: the formulas as they are published, and the tools that others use for the same work."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchio as tio
from medpy.metric import binary
from torch import Tensor, nn

from lib.data.augmentation import augmentation
from lib.data.nifti import read_geometry, voxels_by_nibabel
from lib.models.layers import ConvBlock
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Measured, Sauron


class LiteralSauron(Sauron):
    """Sauron by the formulas of the paper, with both distances in every forward pass, asked for or not."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dist_fun, self.imp_fun = literal_delta_opt, literal_delta_prune

    def forward(self, x: Tensor, delta_opt: bool = False, delta_prune: bool = False) -> list[Tensor] | Measured:
        measured = super().forward(x, delta_opt=True, delta_prune=True)
        return measured if delta_opt or delta_prune else measured.outputs


def literal_delta_opt(h: Tensor, sf: int) -> Tensor:
    """As `lib.distance.euc_norm`, with maps of full size at every step: (B, C, *spatial) -> (B, C - 1)."""
    spatial = tuple(range(2, h.ndim))
    low, high = h.amin(spatial, keepdim=True), h.amax(spatial, keepdim=True)
    pooled = _pool((h - low) / (high - low), sf)
    return (pooled[:, :1] - pooled[:, 1:]).square().mean(spatial).sqrt()


def literal_delta_prune(h: Tensor, sf: int) -> tuple[Tensor, int]:
    """As `lib.distance.euc_rand`: (B, C, *spatial) -> ((C,), r)."""
    r, pooled = int(torch.randint(h.shape[1], (1,))), _pool(h, sf)
    distance = (pooled[:, r : r + 1] - pooled).square().mean(tuple(range(2, h.ndim))).sqrt()
    return (distance / distance.amax(1, keepdim=True)).mean(0), r


def _pool(h: Tensor, sf: int) -> Tensor:
    return (F.avg_pool2d if h.ndim == 4 else F.avg_pool3d)(h, sf)


def with_torchs_norm(model: nnUNet) -> nnUNet:
    """`model` with torch's own instance norm, as the published network has it."""
    norm = nn.InstanceNorm2d if model.dim == "2D" else nn.InstanceNorm3d
    for module in model.modules():
        if isinstance(module, ConvBlock):
            module.seq[1] = norm(module.seq[0].out_channels)
    return model


def convolutions_alone(model: nnUNet, images: Tensor) -> Callable[[], None]:
    """The forward and backward pass of the network's convolutions and nothing else."""
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            del module[1:]

    def run() -> None:
        outputs = model(images)
        torch.autograd.backward(outputs, outputs)

    return run


def torchio_chain(dim: str) -> tio.Compose:
    """The augmentation with torchio's own elastic deformation."""
    chain = augmentation(dim)
    elastic = tio.RandomElasticDeformation(7, max_displacement=7.5, locked_borders=2, p=0.3, copy=False)
    chain.transforms = [elastic if t.name == elastic.name else t for t in chain.transforms]
    return chain


def medpy_metrics(prediction: Path, truth: Path) -> list[list[float]]:
    """[[Dice, HD, HD95] of each foreground class], on whole volumes of floats."""
    p, t = (voxels_by_nibabel(path).astype(float) for path in (prediction, truth))
    spacing_mm = read_geometry(truth).spacing_mm
    results = []
    for label in range(1, int(t.max()) + 1):
        masks = p == label, t == label
        results.append([binary.dc(*masks), binary.hd(*masks, spacing_mm), binary.hd95(*masks, spacing_mm)])
    return results

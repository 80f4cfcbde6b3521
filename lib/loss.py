"""The losses (paper section 3.1). Models give softmax maps, data sets integer labels; both meet here."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


def cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over the voxels of -log p(true class); probabilities (B, K, *spatial), labels (B, *spatial) int64."""
    true = probabilities.gather(1, labels.unsqueeze(1))
    return -true.clamp_min(torch.finfo(true.dtype).tiny).log().mean()


def dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 - mean over batch and classes (background too) of 2 sum(p y) / (sum(p) + sum(y) + eps), sums over space."""
    one_hot = torch.zeros_like(probabilities).scatter_(1, labels.unsqueeze(1), 1)
    intersection = (probabilities * one_hot).flatten(2).sum(2)
    total = (probabilities + one_hot).flatten(2).sum(2)
    return 1 - (2 * intersection / (total + EPS)).mean()


def resize_labels(labels: Tensor, size: torch.Size) -> Tensor:
    """Nearest neighbour, (B, *spatial) -> (B, *size): halving keeps every second voxel of each axis."""
    if labels.shape[1:] == size:
        return labels
    return F.interpolate(labels.unsqueeze(1).float(), size=tuple(size)).squeeze(1).long()


class DS_CrossEntropyDiceLoss(nn.Module):
    """Deep supervision: the sum over the heads of cross-entropy + Dice loss, each at its head's own size."""

    uses_distances = False

    def forward(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """outputs: softmax maps (B, K, *spatial), one per head; labels (B, *spatial) int64 at full resolution."""
        targets = [resize_labels(labels, p.shape[2:]) for p in outputs]
        return sum(cross_entropy(p, y) + dice_loss(p, y) for p, y in zip(outputs, targets, strict=True))


class DS_CrossEntropyDiceLoss_Distance(DS_CrossEntropyDiceLoss):
    """Segmentation loss + lambda * mean over the prunable blocks of the mean of delta_opt."""

    uses_distances = True

    def __init__(self, lambda_: float = 0.5):
        super().__init__()
        self.lambda_ = lambda_

    def forward(self, outputs: list[Tensor], labels: Tensor, delta_opt: dict[str, Tensor]) -> Tensor:
        """delta_opt: (B, C - 1) for each prunable block; a block with a single filter counts as 0."""
        segmentation = super().forward(outputs, labels)
        distances = [delta.mean() if delta.numel() else delta.sum() for delta in delta_opt.values()]
        return segmentation + self.lambda_ * torch.stack(distances).mean()


LOSSES = {loss.__name__: loss for loss in (DS_CrossEntropyDiceLoss_Distance, DS_CrossEntropyDiceLoss)}

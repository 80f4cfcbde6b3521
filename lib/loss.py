"""The losses (paper section 3.1). Models give softmax maps, data sets integer labels; both meet here.

Voxels that are to be ignored have the label K, the number of classes. `ignore` says whether there may be any: they are
masked out of the sums of the cross-entropy and the Dice loss, and of the numbers of voxels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-8


def cross_entropy(probabilities: Tensor, labels: Tensor, ignore: bool = False) -> Tensor:
    """Mean over the voxels of -log p(true class); probabilities (B, K, *spatial), labels (B, *spatial) int64."""
    labels, counts = _counted(labels, probabilities.shape[1]) if ignore else (labels, None)
    true = probabilities.gather(1, labels.unsqueeze(1))
    logs = true.clamp_min(torch.finfo(true.dtype).tiny).log()
    return -logs.mean() if counts is None else -(logs * counts.unsqueeze(1)).sum() / counts.sum().clamp_min(1)


def dice_loss(probabilities: Tensor, labels: Tensor, ignore: bool = False) -> Tensor:
    """1 - mean over batch and classes (background too) of 2 sum(p y) / (sum(p) + sum(y) + eps), sums over space."""
    labels, counts = _counted(labels, probabilities.shape[1]) if ignore else (labels, None)
    one_hot = torch.zeros_like(probabilities).scatter_(1, labels.unsqueeze(1), 1)
    if counts is not None:
        probabilities, one_hot = probabilities * counts.unsqueeze(1), one_hot * counts.unsqueeze(1)
    intersection = (probabilities * one_hot).flatten(2).sum(2)
    total = (probabilities + one_hot).flatten(2).sum(2)
    return 1 - (2 * intersection / (total + EPS)).mean()


def _counted(labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Labels that are all classes (what is ignored becomes class 0), and whether each voxel counts."""
    counts = labels < n_classes
    return labels.where(counts, 0), counts


def resize_labels(labels: Tensor, size: torch.Size) -> Tensor:
    """Nearest neighbour, (B, *spatial) -> (B, *size): halving keeps every second voxel of each axis."""
    if labels.shape[1:] == size:
        return labels
    return F.interpolate(labels.unsqueeze(1).float(), size=tuple(size)).squeeze(1).long()


class DS_CrossEntropyDiceLoss(nn.Module):
    """Deep supervision: the sum over the heads of cross-entropy + Dice loss, each at its head's own size."""

    uses_distances = False

    def __init__(self, ignore: bool = False):
        super().__init__()
        self.ignore = ignore

    def forward(self, outputs: list[Tensor], labels: Tensor) -> Tensor:
        """outputs: softmax maps (B, K, *spatial), one per head; labels (B, *spatial) int64 at full resolution."""
        targets = [resize_labels(labels, p.shape[2:]) for p in outputs]
        heads = zip(outputs, targets, strict=True)
        return sum(cross_entropy(p, y, self.ignore) + dice_loss(p, y, self.ignore) for p, y in heads)


class DS_CrossEntropyDiceLoss_Distance(DS_CrossEntropyDiceLoss):
    """Segmentation loss + lambda * mean over the prunable blocks of the mean of delta_opt."""

    uses_distances = True

    def __init__(self, lambda_: float = 0.5, ignore: bool = False):
        super().__init__(ignore)
        self.lambda_ = lambda_

    def forward(self, outputs: list[Tensor], labels: Tensor, delta_opt: dict[str, Tensor]) -> Tensor:
        """delta_opt: (B, C - 1) for each prunable block; a block with a single filter counts as 0."""
        segmentation = super().forward(outputs, labels)
        distances = [delta.mean() if delta.numel() else delta.sum() for delta in delta_opt.values()]
        return segmentation + self.lambda_ * torch.stack(distances).mean()


LOSSES = {loss.__name__: loss for loss in (DS_CrossEntropyDiceLoss_Distance, DS_CrossEntropyDiceLoss)}

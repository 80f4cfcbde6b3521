"""The flat U-Net: one width in every block but the heads (compare Lean U-Net, arXiv 2512.03834)."""

from bisect import bisect_right

from lib.models.nnUNet import nnUNet
from lib.models.size import resized, summary


def of_width(model: nnUNet, width: int) -> nnUNet:
    """A network as `model`, without weights, whose blocks but the heads have `width` filters each."""
    return resized(model, {block.name: width for block in model.blocks() if not block.head})


def flops_of_width(model: nnUNet, width: int, patch_size: tuple[int, ...]) -> int:
    return summary(of_width(model, width), patch_size)["flops"]


def widest(model: nnUNet, widths: range, max_flops: float, patch_size: tuple[int, ...]) -> int | None:
    """The largest of the `widths`, in rising order, whose flat network has at most `max_flops` for one patch; None if
    all have more."""
    n = bisect_right(widths, max_flops, key=lambda width: flops_of_width(model, width, patch_size))
    return widths[n - 1] if n else None

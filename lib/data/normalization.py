"""How nnU-Net crops an image to what is not 0, and normalizes the intensities of a channel. Without torch."""

from dataclasses import dataclass

SCHEMES = ("ct", "nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")


@dataclass(frozen=True)
class Normalization:
    """What is done to a channel. masked: z-score over the voxels of the nonzero mask, the others stay untouched. The
    numbers are those of the training set's foreground, which "ct" alone needs."""

    scheme: str  # one of SCHEMES
    masked: bool = False
    low: float = 0.0  # percentile 0.5
    high: float = 0.0  # percentile 99.5
    mean: float = 0.0
    std: float = 1.0

"""How nnU-Net crops an image to what is not 0, and normalizes the intensities of a channel. Without torch and scipy."""

from dataclasses import dataclass

import numpy as np

from lib.data.components import box_of, components

SCHEMES = ("ct", "nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1")
SMALLEST = 1e-8  # what intensities are divided by at least


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


def scheme_of(channel_name: str) -> str:
    """One of `SCHEMES`: the one that the whole name is, in upper or lower case; "zscore" for any other name."""
    name = channel_name.casefold()
    return name if name in SCHEMES else "zscore"


def nonzero(channels: np.ndarray) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """Where any channel of (C, X, Y, Z) is not 0, holes filled, as a mask (X, Y, Z); and the smallest box around it,
    which is the whole volume where all is 0.

    A hole is what no path over the faces of zero voxels joins to the border of the volume.
    """
    mask = (channels != 0).any(0)
    box = box_of(mask) or tuple(slice(0, size) for size in mask.shape)
    inner = mask[box]  # holes lie within the box, and their counterparts reach its faces
    holes = components(~inner, corners=False)
    hole = np.ones(holes.max() + 1, bool)
    hole[0] = False  # the mask itself
    for axis in range(3):
        hole[holes.take([0, -1], axis)] = False
    inner |= hole[holes]
    return mask, box


def normalize(channel: np.ndarray, normalization: Normalization, mask: np.ndarray) -> np.ndarray:
    """A channel (X, Y, Z), normalized, as float32. mask: the voxels that a masked z-score knows and changes.

    The sums are taken in double precision, so they do not depend on the order of the axes.
    """
    array = channel.astype(np.float32)
    match normalization.scheme:
        case "ct":
            array.clip(normalization.low, normalization.high, out=array)
            array -= np.float32(normalization.mean)
            array /= np.float32(max(normalization.std, SMALLEST))
        case "zscore" if normalization.masked:
            array[mask] = _zscore(array[mask])
        case "zscore":
            array = _zscore(array)
        case "rescale_to_0_1":
            array -= array.min()
            array /= max(array.max(), np.float32(SMALLEST))
        case "rgb_to_0_1":
            array /= np.float32(255)
    return array


def _zscore(array: np.ndarray) -> np.ndarray:
    mean, std = (np.float32(measure(array, dtype=np.float64)) for measure in (np.mean, np.std))
    return (array - mean) / max(std, np.float32(SMALLEST))

"""What planning needs to know of the training images, as nnU-Net measures it. Nothing here needs torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fingerprint:
    """By case, ascending by id, and in nnU-Net's axis order (the last stored axis first): the shape after the crop to
    nonzero, and the spacing in mm. relative_size: the median share of voxels that the crop leaves. intensities: of the
    foreground, by channel: "mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5"."""

    shapes: tuple[tuple[int, int, int], ...]
    spacings: tuple[tuple[float, float, float], ...]
    relative_size: float
    intensities: tuple[dict[str, float], ...]

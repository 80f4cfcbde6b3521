"""The random changes that every training volume goes through (torchio's terms and random numbers)."""

import torchio as tio

from lib.data.preprocessing import zscore


def augmentation(dim: str) -> tio.Compose:
    """Changes a tio.Subject with "image" and "label" in place, drawing from torch's global generator, in this order:

    1. RandomAffine, scaling 0.85..1.25 independently on the two in-plane axes, p = 0.2
    2. RandomAffine, rotation -180..180 degrees about the slice axis, p = 0.2
    3. RandomGamma, log_gamma -0.3..0.5 (of negative values the magnitude changes and the sign stays), p = 0.3
    4. RandomFlip of each axis, p = 0.5 each; in 2D of the two in-plane axes only
    5. RandomElasticDeformation, 7 control points, 2 locked borders, up to 7.5 mm, p = 0.3
    6. z-score of the whole volume

    The slice axis is the third one in 2D (ACDC) and the first one in 3D (KiTS: slices, rows, columns). torchio rotates
    about *world* axes: give the subject a diagonal affine, so that these are the array's. Images are interpolated
    linearly and what comes from outside is their minimum; labels by nearest neighbour, outside is background.
    """
    keep, scale, turn, still = (1, 1), (0.85, 1.25), (-180, 180), (0, 0)
    if dim == "2D":
        scales, degrees, flipped = (*scale, *scale, *keep), (*still, *still, *turn), (0, 1)
    else:
        scales, degrees, flipped = (*keep, *scale, *scale), (*turn, *still, *still), (0, 1, 2)
    return tio.Compose(
        [
            tio.RandomAffine(scales=scales, degrees=0, p=0.2, copy=False),
            tio.RandomAffine(scales=keep, degrees=degrees, p=0.2, copy=False),
            tio.RandomGamma(log_gamma=(-0.3, 0.5), p=0.3, copy=False),
            tio.RandomFlip(axes=flipped, flip_probability=0.5, copy=False),
            tio.RandomElasticDeformation(
                num_control_points=7, locked_borders=2, max_displacement=7.5, p=0.3, copy=False
            ),
            tio.Lambda(zscore, types_to_apply=[tio.INTENSITY], copy=False),
        ],
        copy=False,
    )

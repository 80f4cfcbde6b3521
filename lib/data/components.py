"""Where the true voxels of a mask are: the box around them, and the parts that hang together.

SimpleITK is imported where it is needed, as in `lib.data.itk`.
"""

import numpy as np


def box_of(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds a mask; None where it is empty."""
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(inside):
            return None
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


def components(mask: np.ndarray, corners: bool) -> np.ndarray:
    """The parts of a mask (X, Y, Z), numbered from 1, in its shape; 0 is outside. Voxels are of one part that share a
    face, or with `corners` a corner at least."""
    import SimpleITK as sitk

    turned = mask.strides[0] < mask.strides[-1]  # Fortran's order, which would be copied slowly
    inside = (mask.T if turned else mask).view(np.uint8)
    numbers = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(inside), corners))
    return numbers.T if turned else numbers

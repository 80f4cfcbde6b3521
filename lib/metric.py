"""Agreement of two label maps: overlap, surface distances and surface Dice, as pure functions of arrays.

The distances are those of `medpy.metric.binary` (`hd`, `hd95`, `assd` with connectivity 1), the surface Dice is that of
DeepMind's surface-distance (Nikolov et al., JMIR 2021). Everything happens inside the box that holds both foregrounds,
and nearest neighbours are looked up only where the two surfaces differ; neither changes a result.

Masks are handled as flat arrays in Fortran order, the order of NIfTI files, with one voxel of background on every side:
the neighbours of flat index i along an axis are i - step and i + step, and nothing wraps around.
"""

import itertools

import numpy as np
from scipy.spatial import cKDTree
from surface_distance.lookup_tables import (
    ENCODE_NEIGHBOURHOOD_3D_KERNEL,
    create_table_neighbour_code_to_surface_area,
)

OVERLAPS = ("TP", "TN", "FP", "FN")  # in voxels
DISTANCES = ("HD", "HD95", "ASSD")  # in mm
METRICS = ("dice", *DISTANCES, "surface_dice", *OVERLAPS)
TOLERANCE_MM = 1.64


def label_metrics(
    prediction, truth, spacing_mm, n_classes: int, tolerance_mm: float = TOLERANCE_MM, n_ignored: int = 0
) -> dict[str, list]:
    """All METRICS of two label maps: {metric: [one value per class]}, background (class 0) first.

    `prediction` and `truth` are (X, Y, Z) with labels 0 to n_classes - 1 in any numeric type, `spacing_mm` has the size
    of a voxel along each axis. The background has no distances and no surface Dice (None): they say nothing and cost
    most. What `mask_metrics` says of empty masks holds for a class that is missing. `n_ignored` voxels that are
    background in both count as none of OVERLAPS.
    """
    box = _joint_box(prediction, truth)
    p, t = prediction[box], truth[box]
    background = {**dict.fromkeys(METRICS), **_overlap(p != 0, t != 0)}
    outside = prediction.size - p.size - n_ignored
    background["TP"], background["TN"] = background["TN"] + outside, background["TP"]
    background["FP"], background["FN"] = background["FN"], background["FP"]
    background["dice"] = _dice(background)
    classes = [background]
    for label in range(1, n_classes):
        values = _mask_metrics(p == label, t == label, spacing_mm, tolerance_mm)
        values["TN"] += outside
        classes.append(values)
    return {metric: [values[metric] for values in classes] for metric in METRICS}


def mask_metrics(prediction, truth, spacing_mm, tolerance_mm: float = TOLERANCE_MM) -> dict[str, float | int | None]:
    """All METRICS of two masks (X, Y, Z) bool; `spacing_mm` has the size of a voxel along each axis.

    dice: 2 TP / (2 TP + FP + FN). HD, HD95, ASSD: maximum, 95th percentile and mean of the distances in mm from each
    surface voxel of either mask to the nearest surface voxel of the other. surface_dice: share of both surfaces' area
    that lies within `tolerance_mm` of the other surface. One empty mask: the distances are None, dice and surface_dice
    0. Two: all five are None.
    """
    box = _joint_box(prediction, truth)
    p, t = prediction[box], truth[box]
    values = _mask_metrics(p, t, spacing_mm, tolerance_mm)
    values["TN"] += prediction.size - p.size
    return values


def region_metrics(
    prediction, truth, labels, spacing_mm, tolerance_mm: float = TOLERANCE_MM, n_ignored: int = 0
) -> dict[str, float | int | None]:
    """`mask_metrics` of the voxels that have one of the `labels` (0 is none of them), from label maps (X, Y, Z);
    `n_ignored` as in `label_metrics`."""
    box = _joint_box(prediction, truth)
    p, t = (np.isin(array[box], labels) for array in (prediction, truth))
    values = mask_metrics(p, t, spacing_mm, tolerance_mm)
    values["TN"] += prediction.size - p.size - n_ignored
    return values


def _mask_metrics(prediction, truth, spacing_mm, tolerance_mm) -> dict[str, float | int | None]:
    """`mask_metrics` of masks that are cropped already."""
    values = {**dict.fromkeys(METRICS), **_overlap(prediction, truth)}
    values["dice"] = _dice(values)
    if values["dice"] is None:
        return values
    shape = tuple(n + 2 for n in prediction.shape)
    steps = (1, shape[0], shape[0] * shape[1])
    masks = [_flat_with_border(mask, shape) for mask in (prediction, truth)]
    surfaces = [_surface(mask, steps) for mask in masks]
    if all(surface.size for surface in surfaces):
        distances = _distances_both_ways(*surfaces, shape, spacing_mm)
        values["HD"] = float(distances.max())
        values["HD95"] = float(np.percentile(distances, 95))
        values["ASSD"] = float(distances.mean())
    surfels = [_surfels(mask, surface, steps) for mask, surface in zip(masks, surfaces, strict=True)]
    areas = create_table_neighbour_code_to_surface_area(spacing_mm)[np.concatenate([codes for _, codes in surfels])]
    distances = _distances_both_ways(*(corners for corners, _ in surfels), shape, spacing_mm, tolerance_mm)
    values["surface_dice"] = float(areas[distances <= tolerance_mm].sum() / areas.sum())
    return values


def _joint_box(a, b) -> tuple[slice, slice, slice]:
    """The smallest box with every non-zero voxel of two arrays (X, Y, Z); empty where there is none."""
    planes = (a.max(axis=2) != 0) | (b.max(axis=2) != 0)  # the slowest axis of a NIfTI file goes first
    occupied = (planes.any(axis=1), planes.any(axis=0), (a.max(axis=(0, 1)) != 0) | (b.max(axis=(0, 1)) != 0))
    ends = [np.flatnonzero(line)[[0, -1]] if line.any() else (0, -1) for line in occupied]
    return tuple(slice(first, last + 1) for first, last in ends)


def _overlap(prediction, truth) -> dict[str, int]:
    """The numbers of voxels in OVERLAPS of two masks of one shape."""
    tp = int(np.count_nonzero(prediction & truth))
    fp, fn = int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(truth)) - tp
    return {"TP": tp, "TN": truth.size - tp - fp - fn, "FP": fp, "FN": fn}


def _dice(overlap) -> float | None:
    """Dice from the numbers of voxels, None where both masks are empty."""
    both = 2 * overlap["TP"] + overlap["FP"] + overlap["FN"]
    return 2 * overlap["TP"] / both if both else None


def _flat_with_border(mask, shape) -> np.ndarray:
    """`mask` (X, Y, Z) with one voxel of background on every side (`shape`), flat in Fortran order."""
    padded = np.zeros(shape, bool, order="F")
    padded[1:-1, 1:-1, 1:-1] = mask
    return padded.ravel(order="F")


def _surface(mask, steps) -> np.ndarray:
    """Flat indices, ascending, of the voxels of `mask` with one of their 6 neighbours outside of it."""
    inside = np.flatnonzero(mask)
    interior = np.ones(inside.size, bool)
    for step in steps:
        interior &= mask[inside - step]
        interior &= mask[inside + step]
    return inside[~interior]


def _surfels(mask, surface, steps) -> tuple[np.ndarray, np.ndarray]:
    """Where the surface passes between voxels: corners (flat indices) and a code (uint8) of the 8 voxels that meet.

    Corner i is the one that voxel i shares with voxel i - sum(steps). If the 8 are partly inside and partly outside of
    `mask`, one of those inside has a neighbour outside: the corners of the surface voxels are all there are.
    """
    cube = [int(np.dot(corner, steps)) for corner in itertools.product((0, 1), repeat=3)]
    touched = np.zeros(mask.size, bool)
    for offset in cube:
        touched[surface + offset] = True
    corners = np.flatnonzero(touched)
    codes = np.zeros(corners.size, np.uint8)
    for offset, bit in zip(cube, ENCODE_NEIGHBOURHOOD_3D_KERNEL.ravel(), strict=True):
        codes += mask[corners + (offset - sum(steps))] * np.uint8(bit)
    mixed = codes != 255  # 0 cannot be: one of the voxels is inside
    return corners[mixed], codes[mixed]


def _distances_both_ways(a, b, shape, spacing_mm, at_most_mm=np.inf) -> np.ndarray:
    """(len(a) + len(b),) distances in mm from each point (flat index) of `a` to the nearest of `b`, then of `b` to `a`.

    What is farther than `at_most_mm` may be given as infinite, which saves time.
    """
    distances = []
    for points, targets in ((a, b), (b, a)):
        distance = np.zeros(points.size)
        shared = np.zeros(np.prod(shape), bool)
        shared[targets] = True
        apart = np.flatnonzero(~shared[points])
        distance[apart] = _nearest(points[apart], targets, shape, spacing_mm, at_most_mm)
        distances.append(distance)
    return np.concatenate(distances)


def _nearest(points, targets, shape, spacing_mm, at_most_mm) -> np.ndarray:
    """Distance in mm from each point to the nearest target; computed like a distance transform's, to the last bit."""
    distances = np.full(points.size, np.inf)
    if points.size and targets.size:
        points, targets = (np.stack(np.unravel_index(flat, shape, order="F"), axis=1) for flat in (points, targets))
        tree = cKDTree(targets * np.asarray(spacing_mm), leafsize=32, compact_nodes=False, balanced_tree=False)
        _, nearest = tree.query(points * np.asarray(spacing_mm), distance_upper_bound=at_most_mm * (1 + 1e-9) + 1e-9)
        near = nearest < len(targets)
        between_mm = (points[near] - targets[nearest[near]]) * np.asarray(spacing_mm)
        distances[near] = np.sqrt((between_mm**2).sum(axis=1))
    return distances

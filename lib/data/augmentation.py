"""The random changes that every training volume goes through (torchio's terms and random numbers)."""

import math

import torch
import torch.nn.functional as F
import torchio as tio
from torch import Tensor

from lib.data.preprocessing import zscore

FLAT = 3  # a patch whose longest axis has more than so many times the voxels of its shortest one turns in-plane only


class RandomFlip(tio.RandomFlip):
    """torchio's, drawn alike; an axis of size 1 stays, which torchio would give a stride that torch does not take."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        axes = tuple(axis for axis in self.axes if subject.spatial_shape[axis] > 1)
        if not axes:
            return subject
        return tio.RandomFlip(axes, self.flip_probability, **self._get_base_args()).apply_transform(subject)


class RandomElasticDeformation(tio.RandomElasticDeformation):
    """torchio's deformation, drawn and computed alike but many times faster. For volumes with a diagonal affine."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        points = self.get_params(self.num_control_points, self.max_displacement, self.num_locked_borders)
        settings = {
            key: getattr(self, key) for key in ("max_displacement", "image_interpolation", "label_interpolation")
        }
        return ElasticDeformation(points, **settings, **self._get_base_args())(subject)


class ElasticDeformation(tio.ElasticDeformation):
    """The deformation with given control points (7, 7, 7, 3), in mm along ITK's axes, as torchio takes them."""

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        subject.check_consistent_spatial_shape()
        grid = elastic_grid(torch.as_tensor(self.control_points), subject.spatial_shape, subject.spacing)
        inside = (grid.abs() <= 1).all(-1)
        for image in self.get_images(subject):
            is_label = isinstance(image, tio.LabelMap)
            mode = self.label_interpolation if is_label else self.image_interpolation
            image.set_data(resample(image.data, grid, inside, mode))
        return subject


def elastic_grid(control_points: Tensor, shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> Tensor:
    """Where each voxel of a volume (X, Y, Z) gets its value from: (X, Y, Z, 3), as `grid_sample` takes it.

    `control_points` (N, N, N, 3) are the displacements in mm of a cubic B-spline over the volume, in ITK's frame: its
    first two axes run against those of an array with a diagonal affine. A B-spline whose control points lie on a
    straight line is that line; so the identity is added to them instead of to every voxel.
    """
    n = len(control_points)
    points = control_points.flip(0, 1) * control_points.new_tensor([-1, -1, 1])
    for axis, size in enumerate(shape):
        if size == 1:
            points[..., axis] = 0  # as in torchio: a single slice stays in its plane
    points = points * (2 / (torch.tensor(shape) * torch.tensor(spacing_mm)))  # the volume spans [-1, 1]
    lines = [(2 * _control_points(size, n) + 1) / size - 1 for size in shape]
    points = (points + torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)).float()
    wx, wy, wz = (_bspline_weights(size, n) for size in shape)
    grid = torch.einsum("zk,ijkd->ijzd", wz, points.flip(-1))
    grid = torch.einsum("yj,ijzd->iyzd", wy, grid)
    return torch.einsum("xi,iyzd->xyzd", wx, grid)


def _control_points(size: int, n: int) -> Tensor:
    """Where ITK puts `n` control points along an axis, in voxels: the domain is 1/8 voxel larger on either side than
    the volume, and one control point lies outside of it."""
    return torch.arange(-1, n - 1, dtype=torch.float64) * (size + 0.25) / (n - 3) - 0.625


def _bspline_weights(size: int, n: int) -> Tensor:
    """(size, n): the weight of each of `n` control points of a cubic B-spline at each voxel of an axis."""
    points = _control_points(size, n)
    t = ((torch.arange(size)[:, None] - points) / (points[1] - points[0])).abs()
    near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6
    return torch.where(t < 1, near, far).float()


def resample(volume: Tensor, grid: Tensor, inside: Tensor, interpolation: str) -> Tensor:
    """(C, X, Y, Z) at the points of `grid` (X, Y, Z, 3), "linear" or "nearest", float32; not `inside`: the channel's
    minimum."""
    mode = {"linear": "bilinear", "nearest": "nearest"}[interpolation]
    result = F.grid_sample(volume[None].float(), grid[None], mode, padding_mode="border", align_corners=False)[0]
    return result.where(inside, volume.amin((1, 2, 3), keepdim=True).float())


def zscored(tensor: Tensor) -> Tensor:
    """`lib.data.preprocessing.zscore` of (C, X, Y, Z)."""
    return torch.from_numpy(zscore(tensor.numpy()))


class RandomTurn(tio.transforms.augmentation.RandomTransform, tio.SpatialTransform):
    """Turns a volume about its centre and scales it, each with probability 0.2, and both in one interpolation.

    degrees: the largest angle about each axis. scaled: whether an axis is scaled; all that are by one factor, whose
    logarithm is uniform from log(0.7) to log(1.4). What comes from outside is 0, in images as in labels: as where a
    volume is padded to the patch. For volumes with a diagonal affine.
    """

    def __init__(self, degrees: tuple[float, float, float], scaled: tuple[bool, bool, bool], **kwargs):
        super().__init__(**kwargs)
        self.degrees, self.scaled = degrees, scaled

    def apply_transform(self, subject: tio.Subject) -> tio.Subject:
        turns, scales = (torch.rand(2) < 0.2).tolist()
        degrees = [self.sample_uniform(-most, most) if turns and most else 0.0 for most in self.degrees]
        factor = math.exp(self.sample_uniform(math.log(0.7), math.log(1.4))) if scales else 1.0
        if turns or scales:
            turn(subject, degrees, [factor if scaled else 1.0 for scaled in self.scaled])
        return subject


def turn(subject: tio.Subject, degrees: list[float], factors: list[float]) -> None:
    """Scale the volumes of a subject along their axes and turn them about the first, then the second, then the third
    one, in mm about the centre, in place."""
    matrix = torch.diag(1 / torch.tensor(factors))
    for axis, angle in enumerate(degrees):  # the inverse of it all: from each voxel to where its value comes from
        matrix = matrix @ _rotation(axis, -angle)
    subject.check_consistent_spatial_shape()
    half = torch.tensor(subject.spatial_shape) * torch.tensor(subject.spacing, dtype=torch.float32) / 2
    theta = F.pad((matrix * half / half[:, None]).flip(0, 1), (0, 1))  # grid_sample begins with the last axis
    grid = F.affine_grid(theta[None], [1, 1, *subject.spatial_shape], align_corners=False)
    for image in subject.get_images(intensity_only=False):
        mode = "nearest" if isinstance(image, tio.LabelMap) else "bilinear"
        image.set_data(F.grid_sample(image.data[None].float(), grid, mode, "zeros", align_corners=False)[0])


def _rotation(axis: int, degrees: float) -> Tensor:
    """(3, 3): the rotation about an axis that takes the next axis towards the one after it."""
    matrix, angle = torch.eye(3), math.radians(degrees)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[j, i], matrix[i, j] = math.sin(angle), -math.sin(angle)
    return matrix


def augmentation_of_plan(patch_size: tuple[int, int, int]) -> tio.Compose:
    """As `augmentation`, but for 3D data that were planned by nnU-Net's rules, with its turns and scales:

    1. RandomTurn up to 30 degrees about every axis, scaled alike along all; with a `FLAT` patch up to 180 degrees about
       its first axis, which is not scaled
    2. RandomGamma as there
    3. RandomFlip of each axis, p = 0.5 each

    Nothing is bent, and no z-score follows.
    """
    flat = max(patch_size) / min(patch_size) > FLAT
    degrees, scaled = ((180, 0, 0), (False, True, True)) if flat else ((30, 30, 30), (True, True, True))
    transforms = [
        RandomTurn(degrees, scaled, copy=False),
        tio.RandomGamma(log_gamma=(-0.3, 0.5), p=0.3, copy=False),
        RandomFlip(axes=(0, 1, 2), flip_probability=0.5, copy=False),
    ]
    return tio.Compose(transforms, copy=False)


def augmentation(dim: str, final_zscore: bool = True) -> tio.Compose:
    """As published: changes a tio.Subject with "image" and "label" in place, drawing from torch's global generator:

    1. RandomAffine, scaling 0.85..1.25 independently on the two in-plane axes, p = 0.2
    2. RandomAffine, rotation -180..180 degrees about the slice axis, p = 0.2
    3. RandomGamma, log_gamma -0.3..0.5 (of negative values the magnitude changes and the sign stays), p = 0.3
    4. RandomFlip of each axis, p = 0.5 each; in 2D of the two in-plane axes only
    5. RandomElasticDeformation, 7 control points, 2 locked borders, up to 7.5 mm, p = 0.3
    6. z-score of the whole volume, if `final_zscore`

    The slice axis is the third one in 2D (ACDC) and the first one in 3D (KiTS: slices, rows, columns). torchio rotates
    about *world* axes: give the subject a diagonal affine, so that these are the array's. Images are interpolated
    linearly and what comes from outside is their minimum; labels by nearest neighbour, outside is background.
    """
    keep, scale, turn, still = (1, 1), (0.85, 1.25), (-180, 180), (0, 0)
    if dim == "2D":
        scales, degrees, flipped = (*scale, *scale, *keep), (*still, *still, *turn), (0, 1)
    else:
        scales, degrees, flipped = (*keep, *scale, *scale), (*turn, *still, *still), (0, 1, 2)
    transforms = [
        tio.RandomAffine(scales=scales, degrees=0, p=0.2, copy=False),
        tio.RandomAffine(scales=keep, degrees=degrees, p=0.2, copy=False),
        tio.RandomGamma(log_gamma=(-0.3, 0.5), p=0.3, copy=False),
        RandomFlip(axes=flipped, flip_probability=0.5, copy=False),
        RandomElasticDeformation(num_control_points=7, locked_borders=2, max_displacement=7.5, p=0.3, copy=False),
    ]
    if final_zscore:
        transforms.append(tio.Lambda(zscored, types_to_apply=[tio.INTENSITY], copy=False))
    return tio.Compose(transforms, copy=False)

"""Synthetic data sets: short-axis cine MRI laid out and labelled like ACDC (Bernard et al., IEEE TMI 2018), and small
abdominal CT laid out and labelled like KiTS (Heller et al., arXiv 1904.00445).

scipy is imported where they are drawn: who reads other images does without it."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.data.nifti import create
from lib.system.error import InputError

_VERSION, _VERSION_3D = 1, 1  # of the images: raise it whenever the same seed gives other voxels
_AIR, _LUNG, _MUSCLE, _LIVER, _MYOCARDIUM, _FAT, _BLOOD = 0.02, 0.08, 0.3, 0.4, 0.36, 0.9, 1.0  # brightness


def write_phantom(folder: Path, n_patients: int = 30, seed: int = 0) -> None:
    """Write the phantom to `folder`, or do nothing if just this phantom is there already.

    Each patient has two frames, end-diastole (frame01) and end-systole (frame07 to 14):
    `training/patientNNN/patientNNN_frameFF.nii.gz` (int16) and `..._gt.nii.gz` (uint8: 0 background, 1 RV cavity,
    2 myocardium, 3 LV cavity). `phantom.json` holds the seed, the number of patients and the version. The same
    arguments give the same bytes; patient n depends on the seed and n only. The folder gets its name once complete.

    Raises InputError if `folder` holds anything else or cannot be written.
    """

    def write(new: Path) -> None:
        for patient in range(1, n_patients + 1):
            _write_patient(new / "training" / f"patient{patient:03d}", np.random.default_rng([seed, patient]))

    _write_once(Path(folder), {"seed": seed, "n_patients": n_patients, "version": _VERSION}, 4 * n_patients, write)


def write_phantom3d(folder: Path, n_cases: int = 15, seed: int = 0) -> None:
    """Write the three-dimensional phantom to `folder`, or do nothing if just this phantom is there already.

    `case_NNNNN/imaging.nii.gz` (int16, about Hounsfield units) and `segmentation.nii.gz` (uint8: 0 background,
    1 kidney, 2 tumor), numbered from 0, with axes (slices, rows, columns) towards inferior, posterior and left as in
    KiTS. `phantom.json` and all else are as `write_phantom` says.
    """

    def write(new: Path) -> None:
        for case in range(n_cases):
            _write_case(new / f"case_{case:05d}", np.random.default_rng([seed, case]))

    _write_once(Path(folder), {"seed": seed, "n_cases": n_cases, "version": _VERSION_3D}, 2 * n_cases, write)


def _write_once(folder: Path, description: dict, n_files: int, write: Callable[[Path], None]) -> None:
    """Have `write` fill `folder` with `n_files` images, unless phantom.json there says that this is done."""
    marker = json.dumps(description) + "\n"
    try:
        if folder.exists():
            _check_complete(folder, marker, n_files)
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            new = Path(temporary) / folder.name
            write(new)
            (new / "phantom.json").write_text(marker, newline="\n")
            try:
                os.rename(new, folder)
            except OSError:  # another process may have been faster
                _check_complete(folder, marker, n_files)
    except OSError as error:
        raise InputError(f"{folder}: the phantom cannot be written or read there ({error.strerror})") from error


def _check_complete(folder: Path, marker: str, n_files: int) -> None:
    """Raise InputError unless `folder` holds the finished phantom that `marker` describes."""
    written = folder / "phantom.json"
    same = written.is_file() and written.read_bytes() == marker.encode()
    if not same or len(list(folder.rglob("*.nii.gz"))) != n_files:
        raise InputError(f"{folder}: holds something else than the phantom asked for; delete or rename this folder")


def _write_patient(folder: Path, rng: np.random.Generator) -> None:
    """Write the two frames of one patient drawn from `rng`."""
    folder.mkdir(parents=True)
    n_slices = int(rng.integers(6, 11))
    shape = (*(int(n) for n in rng.integers(64, 81, 2)), n_slices)
    in_plane_mm = rng.uniform(2.2, 2.8)
    spacing_mm = np.round([in_plane_mm, in_plane_mm, np.clip(rng.uniform(60, 80) / n_slices, 7, 10)], 3)
    affine = np.diag([*spacing_mm, 1.0])  # RAS
    affine[:3, 3] = np.round(rng.uniform(-60, 60, 3), 2)
    anatomy_seed, *noise_seeds = (int(s) for s in rng.integers(2**32, size=3))
    frames = 1, int(rng.integers(7, 15))
    for frame, systole, noise_seed in zip(frames, (False, True), noise_seeds, strict=True):
        image, label = _draw(shape, in_plane_mm, np.random.default_rng(anatomy_seed), systole)
        image = _scan(image, np.random.default_rng(noise_seed))
        for array, end in ((image, ""), (label, "_gt")):
            create(folder / f"{folder.name}_frame{frame:02d}{end}.nii.gz", array, affine)


def _write_case(folder: Path, rng: np.random.Generator) -> None:
    """Write one case of the three-dimensional phantom drawn from `rng`."""
    folder.mkdir(parents=True)
    shape = (int(rng.integers(24, 33)), *(int(n) for n in rng.integers(40, 49, 2)))
    slice_mm, pixel_mm = np.round([rng.uniform(4.5, 6.0), rng.uniform(6.2, 7.2)], 3)
    affine = np.array([[0, 0, -pixel_mm, 0], [0, -pixel_mm, 0, 0], [-slice_mm, 0, 0, 0], [0, 0, 0, 1]])
    affine[:3, 3] = np.round(rng.uniform(-60, 60, 3), 2)
    image, label = _draw_abdomen(shape, (slice_mm, pixel_mm, pixel_mm), rng)
    create(folder / "imaging.nii.gz", image, affine)
    create(folder / "segmentation.nii.gz", label, affine)


class _Canvas:
    """Slices to paint on, from the back to the front: image (X, Y, Z), millimetres x and y from its middle.

    Every length below may be one number or an array (Z,) of one number per slice.
    """

    def __init__(self, shape, pixel_mm: float):
        self.image, self.pixel_mm = np.full(shape, _AIR), pixel_mm
        x, y = (pixel_mm * (np.arange(n) - (n - 1) / 2) for n in shape[:2])
        self.x, self.y = x[:, None, None], y[None, :, None]

    def ellipse(self, centre, axes, turn=0.0, ripple: float = 0.0, phase: float = 0.0):
        """Approximate signed distance (X, Y, Z) to an ellipse that ripples in three waves; negative inside."""
        dx, dy = self.x - centre[0], self.y - centre[1]
        u, v = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
        a, b = (np.maximum(axis, 1e-3) for axis in axes)
        radius = 1 + ripple * np.cos(3 * np.arctan2(dy, dx) + phase)
        distance = (np.hypot(u / a, v / b) - radius) * np.sqrt(a * b) * np.ones(self.image.shape)
        return np.where(np.minimum(*axes) > 0, distance, np.inf)  # an axis of 0 makes an empty ellipse

    def paint(self, outside, value) -> None:
        """Cover what lies inside; at its border pixels are mixed (partial volume)."""
        cover = np.clip(0.5 - outside / (1.2 * self.pixel_mm), 0, 1)
        self.image += cover * (value - self.image)


def _draw(shape, pixel_mm: float, rng: np.random.Generator, systole: bool):
    """Brightness (X, Y, Z) and label (X, Y, Z) uint8 of one frame; slice 0 is the most basal one.

    It draws the same numbers from `rng` in both frames, so that they share one anatomy.
    """
    canvas, n_slices = _Canvas(shape, pixel_mm), shape[2]

    # The long axis: t is 0 at the valve plane, which comes down in systole, and 1 at the apex.
    above, beyond = rng.uniform(0.0, 1.3), rng.uniform(-0.7, 0.7)  # slices that leave the heart at either end
    t = (np.arange(n_slices) + 0.5 - above) / (n_slices - above - beyond)
    t = (t - 0.14) / 0.86 if systole else t
    ventricle = (t >= 0) & (t < 1)
    along = np.clip(t, 0, 1)

    # The left ventricle: two ellipses that taper off; its centre follows the tilt of the axis and the breath-holds.
    centre = rng.uniform(-10, 10, (2, 1)) + rng.uniform(-15, 15, (2, 1)) * (t - 0.5) + rng.normal(0, 0.8, (2, n_slices))
    turn, size = rng.uniform(-0.5, 0.5), rng.uniform(0.88, 1.12)
    cavity, wall, rv_width = size * rng.uniform(23, 28), rng.uniform(9, 11.5), size * rng.uniform(20, 27)
    squeeze = rng.uniform(0.62, 0.75)
    if systole:
        cavity, wall, rv_width = cavity * squeeze, wall * 1.3, rv_width * 0.8
    taper = np.sqrt(1 - along**2.5)
    epi = (cavity + wall) * taper * ventricle
    endo = np.where(t < 0.95, epi - wall * (0.6 + 0.4 * taper), 0) * ventricle
    squash, shape_of_lv = rng.uniform(0.92, 1.0), (turn, rng.normal(0, 0.02), rng.uniform(0, 6.3))
    outside_epi = canvas.ellipse(centre, (epi * squash, epi / squash), *shape_of_lv)
    outside_endo = canvas.ellipse(centre, (endo * squash, endo / squash), *shape_of_lv)

    # The right ventricle: an ellipse shifted to the septal side behind the left one, which leaves a crescent of it.
    width = rv_width * np.sqrt(np.clip(1 - (along / 0.85) ** 3, 0, 1)) * ventricle
    half, height = 0.5 * (epi + width), epi * rng.uniform(0.95, 1.1) * (width > 4)
    septal = np.array([-np.cos(turn), -np.sin(turn)])[:, None]
    outside_rv = canvas.ellipse(centre + septal * (epi + width - half), (half, height), turn)

    _paint_chest(canvas, centre, epi, rng)
    for dx, dy, radius in ((4, -6, 24), (-24, 8, 18), (-4, 22, 13)):  # atria and great vessels: bright, without a label
        at = centre + np.array([[dx], [dy]]) + rng.normal(0, 3, (2, 1))
        for grow, value in ((2.5, _MYOCARDIUM), (0, _BLOOD)):
            radii = (size * radius + grow) * (t < 0)
            canvas.paint(canvas.ellipse(at, (radii, 0.85 * radii), turn), value)
    canvas.paint(outside_rv - 3, _MYOCARDIUM)  # the RV's thin wall has no label
    canvas.paint(outside_rv, 0.93 * _BLOOD)
    canvas.paint(outside_epi, _MYOCARDIUM)
    canvas.paint(outside_endo, _BLOOD)
    for angle in turn + rng.uniform(-0.4, 0.4, 2) + (1.0, 4.6):  # papillary muscles: dark, yet part of the cavity
        at = centre + 0.68 * endo * np.array([[np.cos(angle)], [np.sin(angle)]])
        radius = 0.16 * endo * (t > 0.25)
        canvas.paint(canvas.ellipse(at, (radius, radius)), 0.5)

    label = np.zeros(shape, np.uint8)
    for value, outside in enumerate((outside_rv, outside_epi, outside_endo), start=1):
        label[outside < 0] = value
    return canvas.image, label


def _paint_chest(canvas: _Canvas, heart, epi, rng: np.random.Generator) -> None:
    """Paint all that surrounds the heart; some of it is as bright as the blood in it.

    heart: (2, Z) the centre of the left ventricle in mm; epi: (Z,) its outer radius in mm.
    """
    middle, lean = np.array([rng.uniform(-12, 12), rng.uniform(-12, 4)]), rng.uniform(-0.35, 0.35)
    axes, ripple = np.array([rng.uniform(94, 114), rng.uniform(74, 86)]), (rng.normal(0, 0.02), rng.uniform(0, 6.3))
    fat, muscle = rng.uniform(8, 14), rng.uniform(5, 9)
    uneven = np.array([rng.uniform(-5, 5), rng.uniform(-6, 2)])  # makes the fat thicker on one side
    inside_fat = canvas.ellipse(middle + uneven, axes - fat, lean, *ripple)
    canvas.paint(canvas.ellipse(middle, axes, lean, *ripple), _FAT)
    canvas.paint(inside_fat, _MUSCLE)
    canvas.paint(inside_fat + muscle, _LUNG)

    def organ(centre, axes, value):
        outside = canvas.ellipse(centre, axes, rng.uniform(-0.6, 0.6), rng.normal(0, 0.06), rng.uniform(0, 6.3))
        canvas.paint(np.maximum(outside, inside_fat), value)

    drift = np.linspace(-6, 6, epi.size) * rng.choice([-1, 1])  # the organs change from slice to slice, too
    organ((drift - 35, 1.5 * drift + rng.uniform(-61, -49)), (58, 32), _LIVER)
    for _ in range(rng.integers(3, 7)):  # vessels of the liver
        organ((drift + rng.uniform(-75, 0), rng.uniform(-70, -42)), rng.uniform(2.5, 6, 2), _BLOOD)
    stomach = drift + rng.uniform(30, 50), rng.uniform(-62, -48)
    organ(stomach, rng.uniform(13, 20, 2), rng.choice([_MUSCLE, _BLOOD]))
    aorta = drift / 3 + rng.uniform(5, 22), rng.uniform(-64, -54)
    organ(aorta, (12.5, 12.5), _MUSCLE)
    organ(aorta, (10.5, 10.5), _BLOOD)
    for _ in range(rng.integers(4, 10)):  # vessels of the lung
        organ((rng.uniform(20, 80) - drift, rng.uniform(-30, 45)), rng.uniform(1.5, 3.5, 2), _FAT)
    for _ in range(2):  # fat on the heart
        angle = rng.uniform(-2.5, 2.5)
        organ(heart + (epi + 5) * np.array([[np.cos(angle)], [np.sin(angle)]]), rng.uniform(6, 14, 2), _FAT)


def _scan(image, rng: np.random.Generator):
    """The image (X, Y, Z) int16 that the scanner makes: tissue texture, bias field of the coil, Rician noise, gain."""
    from scipy.ndimage import gaussian_filter, zoom

    texture = gaussian_filter(rng.normal(size=image.shape), (1.2, 1.2, 0.5))
    image = image * (1 + 0.1 * texture / texture.std())
    coarse = rng.normal(0, 0.25, (4, 4, 2))
    bias = zoom(coarse, np.divide(image.shape, coarse.shape), order=3, mode="nearest", grid_mode=True)
    chest = np.linspace(-0.2, 0.3, image.shape[1])[None, :, None]  # the coil lies in front
    image = image * np.exp(bias + chest)
    sigma = rng.uniform(0.03, 0.06)
    image = np.hypot(image + rng.normal(0, sigma, image.shape), rng.normal(0, sigma, image.shape))
    return np.round(image * rng.uniform(120, 250)).astype(np.int16)


def _draw_abdomen(shape, spacing_mm, rng: np.random.Generator):
    """Image (X, Y, Z) int16 and label (X, Y, Z) uint8: two kidneys, a tumor on one of them or none, and organs, bowel
    and vessels of which some are as bright as the kidneys. Axes run to inferior, posterior and left."""
    from scipy.ndimage import gaussian_filter

    mm = np.meshgrid(*(s * (np.arange(n) - (n - 1) / 2) for n, s in zip(shape, spacing_mm, strict=True)), indexing="ij")
    image, label = np.full(shape, -1000.0), np.zeros(shape, np.uint8)

    def paint(centre, radii, value, turn=0.0, label_value=None) -> None:
        """An ellipsoid, turned in the coronal plane; at its border voxels are mixed (partial volume)."""
        dx, dy, dz = (axis - c for axis, c in zip(mm, centre, strict=True))
        u, v = np.cos(turn) * dx + np.sin(turn) * dz, np.cos(turn) * dz - np.sin(turn) * dx
        away = np.sqrt((u / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (v / radii[2]) ** 2) - 1
        outside = away * np.mean(radii[1:])  # about the distance to the surface
        image[:] += np.clip(0.5 - outside / spacing_mm[1], 0, 1) * (value - image)
        if label_value is not None:
            label[outside < 0] = label_value

    endless = 1e6  # a radius that makes a cylinder
    body, fat = np.array([rng.uniform(92, 104), rng.uniform(122, 132)]), rng.uniform(8, 16)
    paint((0, 0, 0), (endless, *body), -95)
    paint((0, rng.uniform(-3, 3), 0), (endless, *(body - fat)), 45)
    spine = rng.uniform(44, 54)
    paint((0, spine, 0), (endless, 20, 22), 260)
    paint((0, spine - 30, rng.uniform(4, 12)), (endless, 10, 10), rng.uniform(140, 180))  # the aorta
    paint((0, spine - 28, rng.uniform(-24, -14)), (endless, 11, 13), rng.uniform(110, 150))  # the vena cava
    paint((rng.uniform(-70, -50), -15, rng.uniform(-62, -52)), (60, 62, 52), rng.uniform(100, 125))  # the liver
    paint((rng.uniform(-65, -45), 25, rng.uniform(78, 88)), (38, 30, 22), rng.uniform(100, 125))  # the spleen
    for _ in range(rng.integers(4, 8)):  # bowel with contrast medium
        centre = rng.uniform(-20, 70), rng.uniform(-65, -20), rng.uniform(-70, 80)
        paint(centre, rng.uniform(9, 20, 3), rng.uniform(120, 190), rng.uniform(0, 3))

    kidneys = []
    for side in (-1, 1):
        centre = np.array([rng.uniform(-12, 22), rng.uniform(22, 36), side * rng.uniform(58, 68)])
        radii = np.array([rng.uniform(48, 58), rng.uniform(22, 27), rng.uniform(24, 30)])
        paint(centre, radii, rng.uniform(150, 180), side * rng.uniform(0.1, 0.35), 1)
        paint(centre - [0, 4, side * 14], 0.3 * radii, 30)  # the sinus: dark, yet part of the kidney
        kidneys.append((centre, radii))
    centre, radii = kidneys[rng.integers(2)]
    direction = rng.normal(size=3)
    at = centre + 0.9 * radii * direction / np.linalg.norm(direction)
    radius, value = rng.uniform(16, 28), rng.uniform(80, 105)
    if rng.random() < 0.75:
        paint(at, np.full(3, radius), value, label_value=2)

    noise = gaussian_filter(rng.normal(size=shape), 0.6)
    image += rng.uniform(15, 25) * noise / noise.std()
    return np.round(image).astype(np.int16), label

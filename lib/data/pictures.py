"""Flat images (.png, .bmp, .tif): their voxels and integrity. Whoever wants an image or labels asks `lib.data.images`.

Pillow reads them. It is imported where it is needed: processes that read NIfTI files alone start faster without it, and
do not even need it installed.
"""

import hashlib
import io
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lib.data.geometry import FLAT, Geometry, PlainHeader, Volume
from lib.data.nifti import unreadable
from lib.system.error import InputError
from lib.system.files import final_name

FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}  # in Pillow
SPACING_MM = (1.0, 1.0, float(FLAT))  # of all flat images
GREY = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")  # of Pillow's modes


def read_channels(path: str | Path) -> list[Volume]:
    """The voxels of a file as (X, Y, 1) in their stored type, a volume for each channel: colours, and opacity where it
    is stored. A palette counts as the colours that it stands for.

    Raises InputError if it is no such file of one image, or is cut off or damaged.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        with _opened(path, content) as image:
            image.verify()  # the checksums of .png; the image must be opened anew then
        with _opened(path, content) as image:
            n = _check_mode(path, image, content)
            if image.mode == "P":
                image = image.convert("RGB" if n == 3 else "RGBA")
            array = np.asarray(image)
    except InputError:
        raise
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise unreadable(path, error, "an image") from error
    array = array.astype(np.uint8) if array.dtype == bool else array
    geometry = _geometry(image)
    known = Volume(path, None, geometry, PlainHeader(geometry, 2), len(content), hashlib.sha256(content).hexdigest())
    channels = np.moveaxis(np.atleast_3d(array), 2, 0)
    return [replace(known, array=np.asfortranarray(channel.T)[..., None]) for channel in channels]


def read_geometry(path: str | Path) -> Geometry:
    """The geometry of a file, without its voxels. Raises InputError as `read_channels`, for what the header shows."""
    return _header_of(Path(path))[0]


def n_channels(path: str | Path) -> int:
    """How many volumes `read_channels` gives, by the header alone. Raises InputError."""
    return _header_of(Path(path))[1]


def write(path: Path, array: np.ndarray, suffix: str) -> None:
    """Write labels (X, Y, 1) as a file of the type `suffix`, without loss. Equal arrays give equal bytes. Raises
    OSError, or InputError where Pillow is missing."""
    pillow = _pillow(path.with_name(final_name(path)))
    array = array[..., 0].T.astype(np.uint8 if array.max() <= 255 else np.uint16)
    compression = {"compression": "tiff_adobe_deflate"} if FORMATS[suffix] == "TIFF" else {}
    pillow.fromarray(array).save(path, FORMATS[suffix], **compression)


def _pillow(path: Path) -> ModuleType:
    """Pillow's module of images. Raises InputError, which names the file that needs it, where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{path}: {path.suffix} files need Pillow; pip install pillow") from None
    return Image


def _opened(path: Path, content: bytes) -> Any:
    """Pillow's image of what a file holds, of which it has read the header."""
    kind, pillow = FORMATS[path.suffix], _pillow(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd fields, and of sizes that are large
            return pillow.open(io.BytesIO(content), formats=[kind])
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"it is no {kind} file, or its header is damaged") from error


def _header_of(path: Path) -> tuple[Geometry, int]:
    """The geometry and the number of channels of a file. Raises InputError."""
    try:
        content = path.read_bytes()
        with _opened(path, content) as image:
            return _geometry(image), _check_mode(path, image, content)
    except InputError:
        raise
    except Exception as error:  # as in `read_channels`
        raise unreadable(path, error, "an image") from error


def _geometry(image: Any) -> Geometry:
    return Geometry((*image.size, 1), SPACING_MM, np.diag([-1.0, -1.0, 1.0]), np.zeros(3))


def _check_mode(path: Path, image: Any, content: bytes) -> int:
    """The number of channels. Raises InputError for what is not one image, or what Pillow would read with a loss."""
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: holds {image.n_frames} images; convert it to .nii.gz or .mha")
    if image.mode == "P":
        return 4 if "transparency" in image.info else 3
    bands = 1 if image.mode in GREY else len(image.getbands())
    deep = image.format == "PNG" and bands > 1 and content[24] > 8  # bits, in the first chunk
    if deep or image.mode not in (*GREY, "LA", "RGB", "RGBA"):
        kind = "16 bits a colour" if deep else f"of the kind {image.mode}"
        raise InputError(f"{path}: is {kind}; convert it to grey values, or to RGB of 8 bits")
    return bands

"""Files of ITK (.mha, .nrrd, .gipl): their headers, voxels and integrity. Whoever wants an image or labels asks
`lib.data.images`.

SimpleITK is imported where it is needed: processes that read NIfTI files alone start faster without it.
"""

import hashlib
import math
import re
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import from_matvec

from lib.data.geometry import FLAT, Geometry, PlainHeader, Volume
from lib.data.nifti import EXPANSION, PIECE, unreadable
from lib.system.error import InputError

READERS = {".mha": "MetaImageIO", ".nrrd": "NrrdImageIO", ".gipl": "GiplImageIO"}  # in SimpleITK
LPS = np.array([-1.0, -1.0, 1.0])  # ITK's world, in RAS
HEAD = 2**20  # bytes, which no header exceeds
ELSEWHERE = re.compile(rb"^data ?file:", re.IGNORECASE | re.MULTILINE)
HEADERS = {  # from the start of a file up to its voxels
    ".mha": re.compile(rb"\s*\w+\s*=.*?\nElementDataFile\s*=\s*LOCAL[ \t]*\r?\n", re.DOTALL),
    ".nrrd": re.compile(rb"NRRD000\d\r?\n.*?\r?\n\r?\n", re.DOTALL),
    ".gipl": re.compile(rb".{256}", re.DOTALL),
}
COMPRESSED = re.compile(rb"^(CompressedData\s*=\s*True|encoding:\s*gz(ip)?)\s*$", re.IGNORECASE | re.MULTILINE)
TEXT = re.compile(rb"^(BinaryData\s*=\s*False|encoding:\s*(ascii|text|txt|hex))\s*$", re.IGNORECASE | re.MULTILINE)


def read_channels(path: str | Path) -> list[Volume]:
    """The voxels of a file in their stored order and type: a volume for each component of a voxel, or for each step
    along a fourth axis.

    Raises InputError if it is no such file of two to four axes, holds its voxels in another file, is cut off or
    damaged, has voxels that are no real numbers, or has no sound voxel size or directions.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        reader, header, n_channels = _header(path, content)
        _check_whole(path, content, _n_bytes(reader))
        array = simple_itk().GetArrayFromImage(reader.Execute())
    except InputError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # SimpleITK raises a few types
        raise unreadable(path, ValueError(reason_of(error)), "an image") from error
    channels = np.moveaxis(array, -1, 0) if reader.GetNumberOfComponents() > 1 else array
    channels = channels.reshape(n_channels, *reversed(header.geometry.shape))
    known = Volume(path, None, header.geometry, header, len(content), hashlib.sha256(content).hexdigest())
    return [replace(known, array=np.asfortranarray(channel.T)) for channel in channels]


def read_geometry(path: str | Path) -> Geometry:
    """The geometry of a file, without its voxels. Raises InputError as `read_channels`, for what the header shows."""
    return _header_of(Path(path))[1].geometry


def n_channels(path: str | Path) -> int:
    """How many volumes `read_channels` gives, by the header alone. Raises InputError."""
    return _header_of(Path(path))[2]


def write(path: Path, array: np.ndarray, header: PlainHeader, suffix: str) -> None:
    """Write an array (X, Y, Z) as a file of the type `suffix`, compressed where the type knows how. Equal arrays give
    equal bytes. Raises OSError."""
    itk, n = simple_itk(), header.n_axes
    _, spacing_mm, directions, origin_mm = header.geometry
    image = itk.GetImageFromArray(np.ascontiguousarray(array.T if n == 3 else array[..., 0].T))
    image.SetSpacing(spacing_mm[:n])
    image.SetDirection((LPS[:, None] * directions)[:n, :n].ravel().tolist())
    image.SetOrigin((LPS * origin_mm)[:n].tolist())
    with tempfile.TemporaryDirectory() as folder:  # ITK goes by the file's name
        name = Path(folder, f"labels{suffix}")
        try:
            itk.WriteImage(image, str(name), useCompression=True, imageIO=READERS[suffix])
        except RuntimeError as error:
            raise OSError(reason_of(error)) from error
        path.write_bytes(name.read_bytes())


def simple_itk() -> Any:
    """SimpleITK, which then prints no warnings of its own."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _header_of(path: Path) -> tuple[Any, PlainHeader, int]:
    """As `_header`, of a file. Raises InputError."""
    try:
        with open(path, "rb") as file:
            return _header(path, file.read(HEAD))
    except InputError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # as in `read_channels`
        raise unreadable(path, ValueError(reason_of(error)), "an image") from error


def _header(path: Path, head: bytes) -> tuple[Any, PlainHeader, int]:
    """SimpleITK's reader of the file that begins with `head`, what its header says, and how many channels it has."""
    begin = HEADERS[path.suffix].match(head[:HEAD])
    if not begin or ELSEWHERE.search(begin[0]):  # ITK's own readers say so in many lines
        raise ValueError(f"it has no {path.suffix} header, or its voxels are in another file")
    itk = simple_itk()
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(READERS[path.suffix])
    reader.ReadImageInformation()
    shape = reader.GetSize()
    spatial, *more = shape[:3], *shape[3:], reader.GetNumberOfComponents()
    more = [size for size in more if size > 1]
    if len(spatial) < 2 or len(more) > 1 or min(shape) < 1:
        raise InputError(f"{path}: must be one volume, or one for each channel, but its shape is {tuple(shape)}")
    voxels = itk.GetPixelIDValueAsString(reader.GetPixelID())
    if "complex" in voxels or not re.search(r"\d+-bit", voxels):
        raise InputError(f"{path}: its voxels are {voxels}, not real numbers; convert it to a grey-scale image")
    n = len(spatial)
    directions = np.reshape(reader.GetDirection(), (len(shape), len(shape)))[:n, :n]
    spacing_mm, origin = reader.GetSpacing()[:n], reader.GetOrigin()[:n]
    if n == 2:
        directions, origin = from_matvec(directions), (*origin, 0.0)
        spatial, spacing_mm = (*spatial, 1), (*spacing_mm, FLAT * max(spacing_mm))
    if not all(0 < size < math.inf for size in spacing_mm):
        raise InputError(f"{path}: the voxel size is {tuple(spacing_mm)} mm; mend the header")
    if not (np.isfinite(origin).all() and np.allclose(directions @ directions.T, np.eye(3), rtol=0, atol=1e-4)):
        raise InputError(f"{path}: its affine is not finite, or its axes are not at right angles; mend the header")
    geometry = Geometry(tuple(spatial), tuple(spacing_mm), LPS[:, None] * directions, LPS * origin)
    return reader, PlainHeader(geometry, n), (more or [1])[0]


def _n_bytes(reader: Any) -> int:
    """The bytes of a file's voxels, uncompressed."""
    bits = int(re.search(r"(\d+)-bit", simple_itk().GetPixelIDValueAsString(reader.GetPixelID()))[1])
    return math.prod(reader.GetSize()) * reader.GetNumberOfComponents() * bits // 8


def _check_whole(path: Path, content: bytes, n_bytes: int) -> None:
    """Raise ValueError or zlib.error unless a file holds all its voxels, whole: ITK's readers do not always tell."""
    if n_bytes > EXPANSION * len(content):
        raise ValueError(f"its {n_bytes} bytes of voxels cannot be in {len(content)}")
    header = HEADERS[path.suffix].match(content)[0]
    stored = memoryview(content)[len(header) :]
    if path.suffix == ".gipl" or not (TEXT.search(header) or COMPRESSED.search(header)):
        if len(stored) < n_bytes:
            raise ValueError("it ends too early")
    elif COMPRESSED.search(header):
        stream, found, rest = zlib.decompressobj(zlib.MAX_WBITS | 32), 0, stored  # zlib's or gzip's format
        while rest and not stream.eof and found <= n_bytes:
            found += len(stream.decompress(rest, PIECE))
            rest = stream.unconsumed_tail
        if found != n_bytes or not stream.eof:
            raise ValueError("it ends too early" if found <= n_bytes else "it has too many voxels")


def reason_of(error: Exception) -> str:
    """What an error says, in one line; of what SimpleITK says, which begins with its own source files, the end."""
    text = " ".join(str(error).split()).rpartition("ERROR: ")[2]
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", text) or type(error).__name__

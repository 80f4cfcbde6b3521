"""NIfTI files (.nii, .nii.gz): their headers, voxels and integrity. Whoever wants an image or labels asks
`lib.data.images`."""

import gzip
import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.volumeutils import apply_read_scaling

from lib.data.geometry import Geometry, Volume, in_words, of_header, sform_matrix, unit_mm
from lib.system.error import InputError

SCALE_TOLERANCE = 0.01  # sform and pixdim may differ by this share on the voxel size without a word
GEOMETRY = ("pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d")  # fields of a header
GEOMETRY += ("qoffset_x", "qoffset_y", "qoffset_z", "sform_code", "srow_x", "srow_y", "srow_z")
EXPANSION = 1100  # no gzip stream becomes more than 1032 times as long
PIECE = 2**20  # bytes or voxels at once, which stay in the processor's cache


def read(path: str | Path) -> Volume:
    """The voxels of a file in their stored order and type, scaled only where the header asks for it.

    Raises InputError if the file is no NIfTI file of one 3D volume (more axes of size 1 do not count), is cut off or
    damaged (a wrong gzip checksum, other bytes after its end), has voxels that are no real numbers, or has no sound
    voxel size or directions.
    """
    return _read(Path(path), _spatial_shape)


def read_channels(path: str | Path) -> list[Volume]:
    """As `read`, of a file (X, Y, Z, channel): a volume for each channel, under a header of three axes."""
    whole = _read(Path(path), _shape_with_channels)
    if whole.array.ndim == 3:
        return [whole]
    header = whole.header.copy()
    header.set_data_shape(whole.geometry.shape)
    return [replace(whole, array=whole.array[..., i], header=header) for i in range(whole.array.shape[3])]


def _read(path: Path, shape_of: Callable[[Path, nib.Nifti1Header], tuple[int, ...]]) -> Volume:
    """`read`, of the axes that `shape_of` finds in a header."""
    try:
        content = path.read_bytes()
        with _opened(path, io.BytesIO(content)) as stream:
            header = _read_header(stream)
            shape, dtype = shape_of(path, header), header.get_data_dtype()
            if dtype.kind not in "buif":
                raise InputError(f"{path}: its voxels are {dtype}, not real numbers; convert it to a grey-scale image")
            array = _read_voxels(stream, dtype, shape, len(content))
            _check_end(stream)
        slope, inter = header.get_slope_inter()
        if slope is not None and (slope, inter) != (1, 0):
            array = apply_read_scaling(array, slope, inter)
        geometry = of_header(path, header, shape[:3])
        return Volume(path, array, geometry, header, len(content), hashlib.sha256(content).hexdigest())
    except InputError:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise a dozen types for broken files
        raise unreadable(path, error) from error


def read_geometry(path: str | Path) -> Geometry:
    """The geometry of a file, without its voxels. Raises InputError as `read_channels`, for what the header shows."""
    header = _header_of(Path(path))
    return of_header(path, header, _shape_with_channels(path, header)[:3])


def n_channels(path: str | Path) -> int:
    """How many volumes `read_channels` gives, by the header alone. Raises InputError."""
    return (*_shape_with_channels(path, _header_of(Path(path))), 1)[3]


def write(path: Path, array: np.ndarray, original: nib.Nifti1Header, compress: bool = True) -> None:
    """Write an array as .nii.gz, or else .nii, under the header of a file: both affines, their codes, pixdim and units
    to the bit.

    array: (X, Y, Z), which gets the stored shape (more axes of size 1), or (X, Y, Z, n); unscaled. Equal arrays give
    equal bytes. Raises OSError.
    """
    header = original.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # the display range of the original's intensities
    if array.ndim == 3:
        array = array.reshape(original.get_data_shape(), order="F")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind(array, None, header)
    for field in GEOMETRY:  # nibabel mends some of them
        image.header[field] = original[field]
    with open(path, "wb") as file:
        if not compress:
            image.to_stream(file)
            return
        with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream:
            image.to_stream(stream)


def create(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write a file that has no original: sform and qform are `affine` (RAS+, mm)."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, path)


def header_of(geometry: Geometry) -> nib.Nifti1Header:
    """A header that says where these voxels are: by its sform and its qform, in mm."""
    header = nib.Nifti1Header()
    header.set_data_shape(geometry.shape)
    header.set_xyzt_units("mm")
    header.set_qform(geometry.affine, 1)
    header.set_sform(geometry.affine, 1)
    return header


# --- for the log, and to measure against ------------------------------------------------------------------------------


def scale_note(paths: Iterable[Path]) -> str | None:
    """One line for the log if sform and pixdim of some files disagree on the voxel size: the first one, with both.

    Files of other types have one voxel size. Raises InputError for a file whose header cannot be read.
    """
    found = []
    for path in (path for path in paths if str(path).endswith((".nii", ".nii.gz"))):
        header = _header_of(Path(path))
        lengths = np.linalg.norm(sform_matrix(header)[:, :3], axis=0)
        pixdim = np.array(header["pixdim"][1:4], float)
        if int(header["sform_code"]) > 0 and not np.allclose(lengths, pixdim, rtol=SCALE_TOLERANCE, atol=0):
            found.append((path, *(in_words(sizes * unit_mm(header)) for sizes in (pixdim, lengths))))
    if not found:
        return None
    path, by_pixdim, by_sform = found[0]
    where = f"{path} (and {len(found) - 1} more files)" if len(found) > 1 else path
    return f"{where}: the voxel size is {by_pixdim} mm by pixdim, {by_sform} mm by the sform; pixdim's is taken"


def voxels_by_nibabel(path: str | Path) -> np.ndarray:
    """What nibabel itself reads, unchecked: to measure against."""
    return np.asarray(nib.load(path).dataobj)


# --- the parts of reading ---------------------------------------------------------------------------------------------


def _opened(path: Path, file: io.BufferedIOBase) -> io.BufferedIOBase:
    """A stream of what a file holds, decompressed where its name ends in .gz; isal checks the sums at the end."""
    return igzip.open(file) if path.name.endswith(".gz") else file


def unreadable(path: str | Path, error: Exception, kind: str = "a NIfTI image") -> InputError:
    """The error in one line, of whatever was raised while a file was read."""
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path}: cannot be read ({error.strerror})")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{path}: cannot be read as {kind} ({reason}); restore it from where it came")


def _header_of(path: Path) -> nib.Nifti1Header:
    """As `_read_header`, of a file. Raises InputError."""
    try:
        with open(path, "rb") as file, _opened(path, file) as stream:
            return _read_header(stream)
    except Exception as error:  # as in `read`
        raise unreadable(path, error) from error


def _read_header(stream: io.BufferedIOBase) -> nib.Nifti1Header:
    """The header as it is stored, its extensions included; the stream is then at the first voxel."""
    block, kind = stream.read(nib.Nifti1Header.single_vox_offset), nib.Nifti1Header
    if not kind.may_contain_header(block):
        block, kind = block + stream.read(nib.Nifti2Header.single_vox_offset - len(block)), nib.Nifti2Header
    if not kind.may_contain_header(block):
        raise ValueError("it has no NIfTI header")
    header = kind(block[: kind.sizeof_hdr], check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise ValueError("it has no voxels: they are in another file")
    offset = float(header["vox_offset"]) or kind.single_vox_offset
    if not kind.single_vox_offset <= offset < 2**31 or offset != int(offset):
        raise ValueError(f"its voxels begin at byte {offset:g}")
    block += stream.read(int(offset) - len(block))
    if len(block) < offset:
        raise EOFError("it ends within its header")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd extensions
        kind.from_fileobj(io.BytesIO(block))  # raises where nibabel's checks find what cannot be mended
        return kind.from_fileobj(io.BytesIO(block), check=False)


def _spatial_shape(path: str | Path, header: nib.Nifti1Header) -> tuple[int, int, int]:
    shape = tuple(int(size) for size in header.get_data_shape())
    if len(shape) < 3 or min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise InputError(f"{path}: must be one 3D volume, but its shape is {shape}")
    return shape[:3]


def _shape_with_channels(path: str | Path, header: nib.Nifti1Header) -> tuple[int, ...]:
    """(X, Y, Z), or (X, Y, Z, C) where one more axis has more than one voxel. Raises InputError."""
    shape = tuple(int(size) for size in header.get_data_shape())
    more = [size for size in shape[3:] if size > 1]
    return (*shape[:3], *more) if len(more) == 1 and min(shape) >= 1 else _spatial_shape(path, header)


def _read_voxels(stream: io.BufferedIOBase, dtype: np.dtype, shape: tuple[int, ...], n_stored: int) -> np.ndarray:
    """(X, Y, Z, ...) in Fortran's order and the machine's byte order, from a file of `n_stored` bytes."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes > EXPANSION * n_stored:
        raise EOFError(f"its {n_bytes} bytes of voxels cannot be in {n_stored}")
    array = np.empty(shape, dtype, order="F")
    left = memoryview(array.reshape(-1, order="F").view(np.uint8))
    while left:
        n = stream.readinto(left[:PIECE])
        if not n:
            raise EOFError("it ends too early")
        left = left[n:]
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _check_end(stream: io.BufferedIOBase) -> None:
    """Read on to the end, where the checksum is checked. Zeros may follow the last voxel, nothing else."""
    try:
        while piece := stream.read(PIECE):
            if piece.strip(b"\0"):
                raise ValueError("other bytes follow its last voxel")
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):
            raise
        raise ValueError("other bytes follow its end") from error
    except EOFError as error:
        raise EOFError("its end is cut off, or other bytes follow it") from error

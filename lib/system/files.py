"""Files that stay whole: read as text, written at once or not at all, checked by their sums, locked by folder."""

import codecs
import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from lib.system.error import InputError
from lib.system.locks import fcntl, hold, lock, release

TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]+\.tmp")
SUMS = "SHA256SUMS"
LARGEST_JSON = 50 * 2**20  # bytes of what others have written; a table of 100,000 cases has a third of it
MOMENT_S = 0.2  # that another command may take to end
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file without the byte-order mark that some editors put in front (of UTF-8, or of UTF-16).

    Raises OSError, or ValueError if it is no text; with `errors` "replace" bytes that are none become U+FFFD.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig", errors)
    except UnicodeDecodeError as error:  # whose own words hold the whole file
        raise ValueError(f"no text: byte {error.start} is {data[error.start]:#04x}") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """A JSON file whose content is of `kind`. Raises InputError, also where an object has one key twice."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size / 2**20:.0f} MiB")
        content = json.loads(read_text(path), object_pairs_hook=_without_doubles)
        if not isinstance(content, kind):
            raise ValueError("it should begin with " + ("{" if kind is dict else "["))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or ("too deep" if isinstance(error, RecursionError) else error)
        raise InputError(f"{path}: cannot be read as JSON ({reason}); mend this file") from error
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return fields


def write_atomically(path: Path, write: Callable[[Path], None], replace: bool = True) -> None:
    """Have `write` fill a temporary file beside `path`, make it durable, and rename it: whole or not there at all.

    Raises InputError, which names the path and the reason, if that fails; without `replace` also where `path` exists,
    and always where it is no ordinary file (a folder, a device).
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no ordinary file; give another name")
    try:
        with closing(_open_temporary(path)) as held:
            temporary = Path(held.name)
            try:
                write(temporary)
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                if not replace:
                    path.touch(exist_ok=False)  # of two processes one succeeds
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise InputError(f"{path}: exists already; give --overwrite or another --output") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def final_name(path: Path) -> str:
    """The name that a temporary file of `write_atomically` will get; of any other file the one that it has."""
    temporary = TEMPORARY.fullmatch(path.name)
    return temporary[1] if temporary else path.name


def check_writable(path: Path, flag: str) -> None:
    """Raise InputError where it is plain, before any work, that a file cannot be written to `path`."""
    there = next(place for place in path.absolute().parents if place.exists())
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {path}: is no ordinary file; give another name")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: cannot be written ({there} is no folder, or read-only); give another place")


def _open_temporary(path: Path) -> BinaryIO:
    """Make a hidden file beside `path`, and lock it, which tells `sweep` that it is in use: process numbers do not, in
    another container."""
    while True:
        file = open(path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp"), "xb")  # noqa: SIM115 (the caller does)
        if fcntl is None:
            file.close()  # Windows renames no open file
            return file
        with suppress(OSError):  # a file system without locks, where `sweep` gets none either
            lock(file, wait=True)
        if os.path.exists(file.name):
            return file
        file.close()  # `sweep` had it before it was locked


def sweep(folder: Path) -> None:
    """Delete the temporary files that killed processes have left: those that nobody has locked."""
    for path in folder.iterdir() if fcntl is not None else ():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError), open(path, "rb+") as file:
                if lock(file):
                    path.unlink()


def write_text(path: Path, text: str, **replace: bool) -> None:
    """UTF-8 with \\n, as `read_text` reads it, whatever the system's own way."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"), **replace)


def write_json(path: Path, content: object, **replace: bool) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", **replace)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def joint_digest(sums: Iterable[str]) -> str:
    """What tells files from others, of their SHA-256: that of the only one, or that of all sums."""
    first, *others = sums
    return digest("".join([first, *others]).encode()) if others else first


def file_digest(path: Path) -> str:
    """The SHA-256 sum of a file: what says that two files have the same content. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, list[str]]:
    """The sums of a folder by file name: two while a file is being replaced, none for a file from elsewhere."""
    sums: dict[str, list[str]] = {}
    try:
        lines = read_text(folder / SUMS, errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        if match := re.fullmatch(r"([0-9a-f]{64})  ([^\s/]+)", line):
            sums.setdefault(match[2], []).append(match[1])
    return sums


def format_sums(sums: dict[str, list[str]]) -> str:
    return "".join(f"{sum_}  {name}\n" for name in sorted(sums) for sum_ in dict.fromkeys(sums[name]))


def is_listed(path: Path) -> bool:
    """Whether a file has a sum, or there are none in its folder: not where it was put among files of another origin."""
    return not (path.parent / SUMS).exists() or path.name in read_sums(path.parent)


def is_good(path: Path) -> bool:
    """Whether the file can be read and has its sum, if there is one."""
    try:
        return _matches(path, path.read_bytes())
    except OSError:
        return False


def read_checked(path: Path) -> bytes:
    """The bytes of a file. Raises OSError, or InputError if they are not those that were written (torch.load would
    accept flipped ones), naming the newest file of its kind that is good."""
    data = path.read_bytes()
    if not _matches(path, data):
        raise InputError(f"{path}: is damaged, its checksum in {SUMS} is another one; {_advice(path)}")
    return data


def _matches(path: Path, data: bytes) -> bool:
    sums = read_sums(path.parent).get(path.name)
    return not sums or digest(data) in sums


def _advice(path: Path) -> str:
    kind = path.name.split("-")[0]
    numbered = [(int(m[1]), p) for p in path.parent.iterdir() if (m := re.fullmatch(rf"{kind}-(\d+)", p.name))]
    good = next((p for _, p in sorted(numbered, reverse=True) if p != path and is_good(p)), None)
    return f"the newest good one is {good}" if good else "there is no other good one beside it"


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`/.lock. Where another process holds it, say so and wait for its end, or else raise InputError.

    Processes that are forked meanwhile do not hold it. A file system without locks is worked on without, after a line
    that says so. Raises OSError where the lock cannot be made.
    """
    path = folder / ".lock"
    file = None
    try:
        if (file := hold(path, MOMENT_S)) is None:
            if not wait:
                raise InputError(
                    f"{folder}: another command is writing there; wait for its end, or take another folder"
                )
            tqdm.write(f"{folder}: another process works there; waiting for its end")
            file = hold(path, math.inf)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        tqdm.write(f"{folder}: its file system has no locks; see to it that no other command writes there")
    try:
        yield
    finally:
        if file:
            release(file, delete=not wait)  # or others may be waiting for it
        elif not wait:
            with suppress(OSError):
                path.unlink()


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and hold its lock; in the end take away again what was made and stayed empty.

    Raises InputError where it cannot be made, or another process holds it.
    """
    with ExitStack() as held:
        try:
            with _in_turn(next(place for place in folder.parents if place.exists())):
                held.callback(_remove_empty, [place for place in (folder, *folder.parents) if not place.exists()])
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder))
        except OSError as error:
            raise InputError(
                f"--output {folder}: cannot be made or written ({error.strerror}); give another"
            ) from error
        yield


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Processes that make a folder in this one do so one after another, so that who made it also gets its lock, and
    takes it away again. Where folders cannot be locked (Windows, some file systems) they do so at once."""
    with ExitStack() as held:
        if fcntl:
            with suppress(OSError):
                number = os.open(folder, os.O_RDONLY)
                held.callback(os.close, number)
                fcntl.flock(number, fcntl.LOCK_EX)
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()

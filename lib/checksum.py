"""SHA-256 sums of saved models and states, kept beside them in SHA256SUMS (`sha256sum -c` reads it too)."""

import hashlib
import re
from pathlib import Path

from lib.error import InputError
from lib.text import read_text

SUMS = "SHA256SUMS"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


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

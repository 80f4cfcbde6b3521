"""Filter files: how many input (output) channels the convolution of every block has, one row per finished epoch."""

from pathlib import Path

from lib.system.error import InputError
from lib.system.files import read_text


def format_filters(rows: list[dict[str, int]]) -> str:
    """Tab-separated text: a header with the names of all blocks sorted as strings, then one row per epoch."""
    names = sorted(rows[0])
    lines = [names, *([str(row[name]) for name in names] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def read_filters(path: str | Path) -> dict[str, int]:
    """The last row of a filter file, by the block's name. Raises InputError if the file is none."""
    try:
        lines = [line.rstrip().split("\t") for line in read_text(path).splitlines() if line.strip()]
        names, last = lines[0], [int(count) for count in lines[-1]]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: no filter file (tab-separated, a header and a row per epoch): {error}") from error
    if len(names) != len(last) or len(lines) < 2 or min(last) < 1:
        raise InputError(f"{path}: the last row must have one positive number for each of its {len(names)} names")
    return dict(zip(names, last, strict=True))


def check_filters(given: dict[str, int], counted: dict[str, int], file: str | Path, model: str | Path) -> None:
    """Raise InputError unless a filter file's last row describes the model, naming the first block that differs."""
    for name in [*counted, *given]:
        if given.get(name) != counted.get(name):
            raise InputError(
                f"{file}: {name} has {given.get(name, 'no')} filters in its last row, {counted.get(name, 'no')} in "
                f"{model}; give the filter files of the same run and epoch, or leave them out"
            )

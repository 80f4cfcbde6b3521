"""What the experiments' figures share: colours that colour-blind people can tell apart, and how a file is written."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from lib.system.error import InputError
from lib.system.files import write_atomically

# Okabe and Ito (2008), without black and yellow
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}


def class_colours(n_classes: int) -> list[str]:
    """A colour for each class but the background; they come again where there are more classes than colours."""
    return [COLOURS[k % len(COLOURS)] for k in range(n_classes - 1)]


def new_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that lays itself out; it belongs to no window and needs no closing."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a PNG whole or not at all."""
    write_atomically(path, partial(figure.savefig, format="png", dpi=dpi))


def make_output(folder: Path) -> Path:
    """Make the folder of an experiment's results. Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made a folder ({error.strerror}); give another one") from error
    return folder

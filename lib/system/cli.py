"""Command lines: arguments that say what is wrong with them, and how a script ends. Without torch."""

import argparse
import difflib
import logging
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from lib.system import distributed
from lib.system.error import InputError
from lib.system.process import Stopped, stoppable
from lib.system.screen import kept_screen


class Parser(argparse.ArgumentParser):
    """Raises InputError, which `run_script` prints, and suggests the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]}: unknown argument{nearest(unknown[0], self._option_string_actions)}; see --help")
        return parsed


def nearest(name: str, known: Iterable[str]) -> str:
    """The suggestion of the known name that is most like `name`, to be put behind it; empty if none is."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {found[0]}?" if found else ""


def one_of(names: Iterable[str]) -> dict:
    """The keywords of an argparse argument that takes one of `names`, in upper or lower case. They are looked up when
    the argument is read."""

    def parse(text: str) -> str:
        found = {name.lower(): name for name in names}.get(text.lower())
        if found is None:
            known = sorted(names)
            raise argparse.ArgumentTypeError(f"{text!r} is unknown{nearest(text, known)} (known: {', '.join(known)})")
        return found

    return {"type": parse, "metavar": f"{{{','.join(sorted(names))}}}"}


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` in [low, high], or (low, high]."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and not (open_low and value == low)):
            bounds = f"{'above' if open_low else 'at least'} {low}" + (
                f" and at most {high}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number {bounds}")
        return value

    return parse


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def percent(text: str) -> str:
    """An argparse type: a share such as 80%, which stays text; `share_of` has its value."""
    try:
        valid = text.endswith("%") and 0 <= share_of(text) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0% and 100%")
    return text


def share_of(text: str) -> float:
    """0.8 for "80%"."""
    return float(text.removesuffix("%")) / 100


def flops_limit(text: str) -> str:
    """An argparse type: "none", a share of the unpruned network (20%) or a number (2G), which stays text;
    `flops_of` has its value."""
    try:
        valid = text == "none" or 0 < flops_of(text, 1) < math.inf and not (text.endswith("%") and share_of(text) > 1)
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share such as 20%, nor a number such as 2G, nor none")
    return text


def flops_of(text: str, unpruned: float) -> float | None:
    """FLOPs of a limit: 2e9 for "2G", a fifth of `unpruned` for "20%", None for "none"."""
    if text == "none":
        return None
    if text.endswith("%"):
        return share_of(text) * unpruned
    factor = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1:])
    return float(text[:-1]) * factor if factor else float(text)


def run_script(main: Callable[[], None], after_stop: str = "") -> int:
    """Run a script's work and return its exit code: 0; 2 after one line on the screen where the input was bad, or a
    file cannot be read or written; 143 after SIGTERM and 130 after Ctrl-C (`after_stop` says how to go
    on); 1 where another process of the same training is no more. What ends all ranks, one of them says. Nothing of it
    depends on what becomes of the screen."""
    name = Path(sys.argv[0]).name
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # we say ourselves what a broken header has
    with kept_screen(name), stoppable():
        try:
            main()
            return 0
        except Stopped as error:
            if distributed.is_main():
                print(f"{name}: {error}{after_stop and '; '}{after_stop}", file=sys.stderr)
            return 128 + error.number
        except distributed.Elsewhere:
            return 2
        except InputError as error:
            line = str(error)
        except OSError as error:
            line = f"{error.filename or 'a file'}: {error.strerror or error}; mend this and start again"
        except (MemoryError, RuntimeError) as error:
            if distributed.is_lost(error):
                print(
                    f"{name}: error: rank {distributed.rank()}: {distributed.LOST}; go on with --resume RUN",
                    file=sys.stderr,
                )
                return 1
            if not _is_out_of_memory(error):
                raise
            line = "not enough memory; try a smaller --batch_size or --patch_size"
        print(f"{name}: error: {line}", file=sys.stderr)
        return 2


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # its own kind of error comes only where it has been loaded
    kinds = (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)
    return isinstance(error, kinds) or "memory" in str(error)

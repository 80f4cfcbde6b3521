"""Standard input, output and error: whatever becomes of the screen, the work goes on."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def open_missing() -> None:
    """Open the null device in the place of the standard streams that are closed.

    The next file to be opened would get their number, and with it what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            null = io.FileIO(os.devnull, "r+")
            setattr(sys, name, io.TextIOWrapper(null, "utf-8", "surrogateescape", write_through=True))


class _Screen(io.FileIO):
    """A stream that takes everything: what cannot be written is lost. `failure` is the first reason, but not that
    the reader has left, who wants no more."""

    failure: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            pass
        except OSError as error:
            self.failure = self.failure or error
        return memoryview(data).nbytes


def keep_screen() -> None:
    """From now on nothing that is printed raises OSError: the reader of a pipe may leave, a disk be full, a terminal
    be gone. Nor UnicodeError: for letters that the stream's encoding lacks it gets escapes. Streams that are no plain
    files (a notebook's, a test's) stay what they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper or type(_raw(stream)) is not io.FileIO:
            continue
        with suppress(OSError):
            stream.flush()
        raw = _Screen(stream.fileno(), "w", closefd=False)
        buffer = raw if stream.buffer is _raw(stream) else io.BufferedWriter(raw)  # the former with python -u
        errors = "backslashreplace" if stream.errors == "strict" else stream.errors
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, errors, **how))


def _raw(stream: io.TextIOWrapper) -> io.RawIOBase:
    """The file below the buffer, if there is one."""
    return getattr(stream.buffer, "raw", stream.buffer)


@contextmanager
def kept_screen(name: str) -> Iterator[None]:
    """Within it as `keep_screen` says, then as before. Where what the script `name` has printed is not whole, though
    somebody wants it, standard error says so."""
    before = sys.stdout, sys.stderr
    keep_screen()
    try:
        yield
    finally:
        if sys.stdout is not before[0]:
            sys.stdout.flush()
            if failure := _raw(sys.stdout).failure:
                print(f"{name}: what was printed is not whole ({failure.strerror}); all else is", file=sys.stderr)
        if sys.stderr is not before[1]:
            sys.stderr.flush()
        sys.stdout, sys.stderr = before

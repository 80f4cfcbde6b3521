"""One process at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock; where another process holds it, say so and wait for its end.

    The system takes the lock back when the process ends, however it ends; its child processes do not hold it.
    """
    with open(folder / ".lock", "a") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tqdm.write(f"{folder}: another process works there (it holds {file.name}); waiting for its end")
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield

"""One command at a time in a folder, also between containers: the system takes a lock back however its holder ends."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from lib.error import InputError
from lib.stop import check_stopped

MOMENT_S = 0.2  # that another command may take to end
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold `folder`/.lock. Where another process holds it, say so and wait for its end, or else raise InputError.

    Processes that are forked meanwhile do not hold it. A file system without locks is worked on without, after a line
    that says so. Raises OSError where the lock cannot be made.
    """
    path = folder / ".lock"
    lock = FileLock(path, fallback_to_soft=False)  # a soft one goes by process numbers
    try:
        lock.acquire(timeout=MOMENT_S)
    except Timeout:
        if not wait:
            raise InputError(
                f"{folder}: another command is writing there; wait for its end, or take another folder"
            ) from None
        tqdm.write(f"{folder}: another process works there; waiting for its end")
        lock.acquire(cancel_check=check_stopped)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        tqdm.write(f"{folder}: its file system has no locks; see to it that no other command writes there")
    try:
        yield
    finally:
        if not wait:
            with suppress(OSError):  # Windows, where it goes with its release
                path.unlink(missing_ok=True)  # nobody waits for it
        lock.release()


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make `folder` if need be, and hold its lock; in the end take away again what was made and stayed empty.

    Raises InputError where it cannot be made, or another process holds it.
    """
    with ExitStack() as held:
        try:
            held.callback(_remove_empty, [place for place in (folder, *folder.parents) if not place.exists()])
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
        except OSError as error:
            raise InputError(
                f"--output {folder}: cannot be made or written ({error.strerror}); give another"
            ) from error
        yield


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()

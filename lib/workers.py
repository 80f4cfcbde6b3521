"""Processes that share the work, and that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from lib.error import InputError
from lib.stop import check_stopped


def start_worker(initialize: Callable[[], None] | None = None) -> None:
    """What a worker process does first: leave Ctrl-C to its parent, and end when the parent is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initialize:
        initialize()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def worker_pool(
    n: int, initialize: Callable[[], None] | None = None, method: str | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `n` processes, started by `method` ("spawn", ...; None: the system's usual one).

    An exception, a signal's too, drops the work that has not begun. Raises InputError if a worker is killed.
    """
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(n, context, initializer=start_worker, initargs=(initialize,))
    try:
        yield pool
    except BrokenProcessPool as error:
        check_stopped()  # a signal to the whole process group ends the workers at once
        raise InputError(f"one of {n} processes was killed (out of memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)

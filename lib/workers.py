"""Processes that share the work, and that end with the process that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType

from lib.error import InputError
from lib.screen import keep_screen
from lib.stop import check_stopped


def start_worker(initialize: Callable[[], None] | None = None) -> None:
    """What a worker process does first: leave Ctrl-C to its parent, end when the parent is no more, and work on
    whatever becomes of the screen."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_screen()
    if initialize:
        initialize()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class _FreshProcess(SpawnProcess):
    """A process that does not import the script of its parent, as "spawn" does: this need not be a file (it may be read
    from standard input), and a user's own script may start its work wherever it is imported."""

    @staticmethod
    def _Popen(process: SpawnProcess):  # noqa: N802 (its name in multiprocessing)
        script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = script


class _FreshContext(SpawnContext):
    Process = _FreshProcess


@contextmanager
def worker_pool(
    n: int, initialize: Callable[[], None] | None = None, method: str | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `n` processes, started by `method` ("spawn", ...; None: the system's usual one).

    What they do must be a function of a module, not of the script. An exception, a signal's too, drops the work that
    has not begun. Raises InputError if a worker is killed.
    """
    context = multiprocessing.get_context(method)
    context = _FreshContext() if context.get_start_method() == "spawn" else context
    pool = ProcessPoolExecutor(n, context, initializer=start_worker, initargs=(initialize,))
    try:
        yield pool
    except BrokenProcessPool as error:
        check_stopped()  # a signal to the whole process group ends the workers at once
        raise InputError(f"one of {n} processes was killed (out of memory?)") from error
    finally:
        pool.shutdown(cancel_futures=True)

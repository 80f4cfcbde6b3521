"""What a process does of itself: it ends when it is asked to, keeps its memory, and shares work with others."""

import ctypes
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

from lib.system.error import InputError
from lib.system.screen import keep_screen

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
SS_DISABLE = 2  # of signal.h


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class _Handler:
    """Notes the first signal, for `check_stopped`: an exception that comes just anywhere can get lost in a destructor
    or leave a library in disorder. Only who asks twice gets that."""

    number: int | None = None

    def __call__(self, number: int, _frame) -> None:
        if self.number is not None:
            raise Stopped(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it SIGTERM and Ctrl-C make `check_stopped` raise Stopped (in the main thread, which alone gets them)."""
    handler, main = _Handler(), threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT) if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def check_stopped() -> None:
    """To be called between two steps of work. Raises Stopped if a signal came that asks for it."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, _Handler) and handler.number is not None:
        raise Stopped(handler.number)


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory for what is allocated next; whether this is done (elsewhere nothing is).

    By default every large tensor on the CPU lies in fresh pages, which the kernel must first clear: much of the time
    of a forward pass of maps that are soon freed again.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


class _SignalStack(ctypes.Structure):
    """stack_t of signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """What runs in it may set another stack for signals, and leave it behind: afterwards this thread has its own again.

    A library that frees such a stack while it is in use leaves a process that the next signal with a handler, be it
    Ctrl-C, kills. Does nothing but on Linux.
    """
    if sys.platform != "linux":
        yield
        return
    sigaltstack, before = ctypes.CDLL(None).sigaltstack, _SignalStack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if sigaltstack(ctypes.byref(before), None):  # too small for what the processor must save from now on: have none
            sigaltstack(ctypes.byref(_SignalStack(flags=SS_DISABLE)), None)


def n_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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

"""Ctrl-C and SIGTERM: the work ends after the step that it is at."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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

"""The scripts as real processes, which a test can kill, stop or starve at any instant."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")  # its children need not import torch anew
CONTEXT.set_forkserver_preload(["train", "predict", "torch._inductor"])
TARGETS = {
    "prepare": ("lib.data.loading", "Loader.prepare"),
    "epoch": ("lib.trainer", "train_epoch"),
    "validation": ("lib.trainer", "validate"),
    "checkpoint": ("lib.checkpoint", "save"),
    "prediction": ("lib.inference", "Predictor.file"),
    "writing": ("lib.prediction", "save"),
}


PATIENCE = 300  # seconds: no test waits for so long but on a machine that is busy with other things


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@dataclass
class Fault:
    """At the `nth` call of `target`: a signal to the process itself (`group`: to all of its group) after `delay`
    seconds, or at the call's end if that comes first; or `limit` (no file may grow any more), `full` (the disk that
    holds the file `path` fills up), `wait` (until the file `path` is there) or `delete` (it)."""

    target: str
    nth: int = 1
    delay: float = 0.0
    action: int | str = signal.SIGKILL
    path: Path | None = None
    group: bool = False
    timer: threading.Timer | None = None

    def happen(self) -> None:
        if self.action == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        elif self.action == "full":
            with open(self.path, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        elif self.action == "wait":
            while not self.path.exists():
                time.sleep(0.01)
        elif self.action == "delete":
            self.path.unlink()
        else:
            self.timer = threading.Timer(self.delay, self.send)
            self.timer.start()

    def end(self) -> None:
        if self.timer and not self.timer.finished.is_set():
            self.timer.cancel()
            self.send()

    def send(self) -> None:
        (os.killpg if self.group else os.kill)(os.getpid(), self.action)


def _patch(target: str, before=None, after=None) -> None:
    """Call `before()` before each call of the target, and `after(seconds)` after it."""
    module, path = TARGETS[target]
    owner = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    function = getattr(owner, name)

    def patched(*args, **kwargs):
        if before:
            before()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if after:
            after(time.perf_counter() - start)
        return result

    setattr(owner, name, patched)


def _main(
    script: str,
    argv: list[str],
    output: Path,
    fault: Fault | None,
    times: Path | None,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    with open(output, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # as in a script that a shell starts
    import torch

    import lib.callback

    torch.set_num_threads(1)
    lib.pruning.rules.training_settled = lambda *_: True  # prune from the first epoch on
    if prepare:
        prepare()
    if fault:
        calls = iter(range(1, 10**6))
        _patch(fault.target, lambda: fault.happen() if next(calls) == fault.nth else None, lambda _: fault.end())
    if times:
        log = times.open("a", buffering=1)
        for target in TARGETS:
            _patch(target, after=lambda seconds, target=target: log.write(f"{target} {seconds}\n"))
    code = importlib.import_module(script).main(argv)
    sys.stdout.flush()
    sys.exit(code)


class Script:
    """A running script; `fault` is what happens to it, `times` a file for the seconds that each target takes;
    `environment` holds more variables, `prepare` is called first."""

    def __init__(
        self,
        script: str,
        argv: list,
        output: Path,
        fault: Fault | None = None,
        times: Path | None = None,
        environment: dict[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.output = output
        args = (script, [*map(str, argv)], output, fault, times, environment or {}, prepare)
        self.process = CONTEXT.Process(target=_main, args=args)
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def end(self) -> int:
        """Wait for the end; the exit code, or minus the signal."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running: {self.text}"
        return self.process.exitcode

    def wait_for(self, text: str) -> None:
        wait_until(lambda: text in self.text or not self.process.is_alive())
        assert text in self.text, f"no {text!r} in {self.text}"

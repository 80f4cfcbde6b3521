#!/usr/bin/env python3
"""Train a network: python train.py --data phantom"""

import sys
from contextlib import ExitStack
from functools import partial

from lib.experiments.report import report_training
from lib.export import export_newest
from lib.system import distributed
from lib.system.cli import run_script
from lib.system.device import device_of
from lib.training import train
from lib.utils import parseArguments
from lib.validation import validate_run


def run(argv: list[str] | None, held: ExitStack) -> None:
    """Train as `argv` says, validate the model on whole volumes, write the report of the run, and export the model if
    that is asked for."""
    state = train(argv, held)
    if state and distributed.is_main():
        device = device_of(state.model)
        validate_run(state.folder, device, state.log)
        report_training(state.folder, device, state.log)
        if parseArguments(argv).export:
            export_newest(state.folder, state.log)


def main(argv: list[str] | None = None) -> int:
    """As `run`; returns the exit code of `run_script`, which still needs to know of the other processes."""
    with ExitStack() as held:
        return run_script(partial(run, argv, held))


if __name__ == "__main__":
    sys.exit(main())

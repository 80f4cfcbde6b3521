"""train.py in float64, pruning from the first epoch on: what tests/test_distributed.py has torchrun start.

FAULT="RANK EPOCH SIGNAL" sends the signal to that rank when its epoch begins; ROWS is the folder for each rank's
history.
"""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import torch

import lib.build
import lib.callback
import lib.pruning.rules
import lib.trainer
import lib.training
import train
from lib.system import distributed


def in_float64() -> None:
    to_device, build_model, summary = lib.trainer.to_device, lib.build.build_model, lib.callback.summary

    def to_device_in_float64(tensor, device):
        return to_device(tensor.double() if tensor.is_floating_point() else tensor, device)

    lib.trainer.to_device = to_device_in_float64
    lib.build.build_model = lib.training.build_model = lambda *args: build_model(*args).double()
    lib.training.forecast = lambda *_: []  # its made-up batch is float32
    for module in (lib.training, lib.callback):
        module.summary = lambda model, patch_size: summary(copy.deepcopy(model).float(), patch_size)


def with_fault(rank: int, epoch: int, number: int) -> None:
    train_epoch = lib.trainer.train_epoch

    def faulty(state, *args, **kwargs):
        if distributed.rank() == rank and state.epoch + 1 == epoch:
            os.kill(os.getpid(), number)
        return train_epoch(state, *args, **kwargs)

    lib.trainer.train_epoch = faulty


def with_rows(folder: Path) -> None:
    fit = lib.training.fit

    def recorded(state, *args, **kwargs):
        fit(state, *args, **kwargs)
        (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps([state.rows, state.validation]))

    lib.training.fit = recorded


if __name__ == "__main__":
    torch.set_num_threads(1)
    lib.pruning.rules.training_settled = lambda *_: True
    in_float64()
    if fault := os.environ.get("FAULT"):
        rank, epoch, name = fault.split()
        with_fault(int(rank), int(epoch), signal.Signals[name])
    with_rows(Path(os.environ["ROWS"]))
    sys.exit(train.main(sys.argv[1:]))

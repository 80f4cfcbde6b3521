"""The device that is computed on, and what --amp comes to there: bfloat16 takes several times as long as float32 on a
CPU that has no instructions for it."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lib.system import distributed
from lib.system.error import InputError

ROUNDS, ENOUGH_S = 6, 2.0


def find_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Each rank takes a GPU of its own.

    Raises InputError for a device that is not here.
    """
    alone = distributed.world_size() == 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu"
    if not alone and name == "cuda" and 0 < torch.cuda.device_count() <= distributed.local_rank():
        raise InputError(f"--device cuda: {torch.cuda.device_count()} GPUs here; start as many processes on a machine")
    if not alone and name not in ("cuda", "cpu"):
        raise InputError(f"--device {name}: each process takes a GPU of its own; give cuda, or cpu")
    if not alone and name == "cuda":
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if not alone and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: not available here; use cpu, or auto") from error
    return device


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a network are; the CPU for one without any."""
    return next(model.parameters(), torch.empty(0)).device


def seconds_of(step: Callable[[bool], object]) -> tuple[float, float]:
    """How long `step(False)` and `step(True)` take: medians over some rounds, in which they take turns.

    The first round warms up, and does not count unless it is the only one that `ENOUGH_S` seconds leave time for.
    """
    times, start = [], time.perf_counter()
    while not times or (len(times) < ROUNDS and time.perf_counter() - start < ENOUGH_S):
        moments = [time.perf_counter()]
        for amp in (False, True):
            step(amp)
            moments.append(time.perf_counter())
        times.append((moments[1] - moments[0], moments[2] - moments[1]))
    float32, bfloat16 = zip(*(times[1:] or times), strict=True)
    return median(float32), median(bfloat16)


def faster_precision(what: str, step: Callable[[bool], object]) -> tuple[str, str]:
    """Of bfloat16, in which `step(True)` computes, and float32, in which `step(False)` does, the one that takes less
    time here, and a line for the log; `what` is the step's name. Random states are left as they were."""
    with torch.random.fork_rng(devices=[]):
        float32, bfloat16 = seconds_of(step)
    chosen = "bfloat16" if bfloat16 < float32 else "float32"
    times = f"{1000 * bfloat16:.1f} ms in bfloat16, {1000 * float32:.1f} ms in float32"
    return chosen, f"--amp: {what} takes {times}; {chosen} is used"

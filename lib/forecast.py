"""How long a training will take on this machine, and how much memory, by a training step that is timed beforehand."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn

from lib.models.nnUNet import nnUNet
from lib.system.device import device_of
from lib.trainer import trial_step

ROUNDS, ENOUGH_S = 3, 5.0
FEW = 2  # patches in a batch
LONG_S = 3600.0  # a training for which a smaller network is worth a thought
FEWEST = 8  # filters of the first level of that network


def forecast(
    model: nnUNet,
    criterion: nn.Module,
    batch_size: int,
    patch_size: tuple[int, ...],
    n_batches: int,
    epochs: int,
    smaller: Callable[[int], nnUNet] | None = None,
    amp: bool = False,
) -> list[str]:
    """Lines for the log: how long an epoch of `n_batches` and all `epochs` take, and the memory for that.

    smaller: makes the network with so many filters in its first level. Where the training is long, it is asked for one
    with half as many, which is measured as well. Leaves random states and weights as they are.
    """
    device = device_of(model)
    with torch.random.fork_rng(devices=[]):
        seconds, n_bytes = _measured(model, criterion, batch_size, patch_size, amp)
        epoch, other = n_batches * seconds, ""
        fewer = model.blocks()[0].out_filters // 2
        if smaller is not None and epochs * epoch > LONG_S and fewer >= FEWEST:
            less, _ = _measured(smaller(fewer).to(device), criterion, batch_size, patch_size, amp)
            other = f"with --fms_init {fewer} about {_duration(n_batches * less)}; "
    memory = (
        f"memory about {_size(n_bytes)} more than now" if device.type == "cpu" else f"GPU memory about {_size(n_bytes)}"
    )
    return [
        f"an epoch takes about {_duration(epoch)} here; {other}{memory}",
        f"{epochs} epochs: about {_duration(epochs * epoch)} (the steps alone, without loading and validation)",
    ]


def _measured(
    model: nnUNet, criterion: nn.Module, batch_size: int, patch_size: tuple[int, ...], amp: bool
) -> tuple[float, float]:
    """The seconds of a training step, the median after a first one that warms up, unless that took too long already;
    and the bytes of memory that it needs. On the CPU a large batch is not computed whole: its patches take as long as
    those of a small one, and as much memory, each."""
    device = device_of(model)
    n_timed = min(batch_size, FEW) if device.type == "cpu" else batch_size
    step, times_more = trial_step(model, criterion, n_timed, patch_size), batch_size / n_timed
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, start = [], time.perf_counter()
    with _kept_for_backward() as kept:
        times.append(_timed(step, amp, device))
    while len(times) <= ROUNDS and time.perf_counter() - start < ENOUGH_S:
        times.append(_timed(step, amp, device))
    # An optimizer keeps up to two more numbers for each weight. What was measured has a copy of the weights as well.
    if device.type == "cuda":
        n_bytes = torch.cuda.max_memory_allocated(device) + 4 * n_parameters
    else:  # the largest maps have a gradient and one on the way
        n_bytes = times_more * (sum(kept.values()) + 2 * max(kept.values())) + 16 * n_parameters
    return times_more * median(times[1:] or times), n_bytes


def _timed(step: Callable[[bool], None], amp: bool, device: torch.device) -> float:
    start = time.perf_counter()
    step(amp)
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter() - start


@contextmanager
def _kept_for_backward() -> Iterator[dict[int, int]]:
    """The bytes of all that the forward pass keeps for the backward pass, by address: tensors may share memory."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def _duration(seconds: float) -> str:
    """In two digits, and the unit that suits them."""
    for size, unit, most in ((1, "s", 90), (60, "min", 90 * 60), (3600, "h", 48 * 3600)):
        if seconds < most:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds / 86400)} days"


def _size(n_bytes: float) -> str:
    return f"{_short(n_bytes / 1e9)} GB" if n_bytes >= 1e9 else f"{_short(n_bytes / 1e6)} MB"


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 99.5 else f"{number:.0f}"

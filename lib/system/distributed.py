"""One training in several processes, as torchrun starts them: `torchrun --nproc_per_node=N train.py ...`.

Each process is a rank, counted from 0, and only the first one writes. All ranks run the same program and must come to
every function of this module equally often, since they wait for one another there. Whatever a decision rests on is made
equal on all ranks first, to the last bit, so that they decide the same without talking about it. Nothing is pickled:
values travel as JSON, arrays as tensors. Without torchrun there is one rank, and all is left as it is.

torch is imported where there are several: a command that predicts without it asks here, too, which rank it is.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from lib.system.error import InputError
from lib.system.process import Stopped

if TYPE_CHECKING:
    from torch import Tensor, nn

LOST = "another process of this training has ended, or cannot be reached"
PATIENCE = timedelta(hours=2)  # the first rank may have to preprocess a data set, or wait for a lock


Result = TypeVar("Result")


class Elsewhere(InputError):
    """Another rank has failed, and says why."""


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has: gloo on the CPU, NCCL for what is on a GPU.

    Raises InputError if they cannot be found.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    import torch
    import torch.distributed as dist

    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the other processes cannot be found ({reason}); start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _joined() -> ModuleType | None:
    """torch.distributed, if this process has joined others, which only torch does."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    dist = _joined()
    return dist.get_rank() if dist else 0


def world_size() -> int:
    dist = _joined()
    return dist.get_world_size() if dist else 1


def is_main() -> bool:
    """Whether this is the rank that writes."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process among those of its machine: which GPU it takes; 0 fills the machine's cache."""
    return int(os.environ["LOCAL_RANK"]) if _joined() else 0


def share(n: int) -> slice:
    """Which of a batch's `n` patches are this rank's: the ranks' numbers of patches differ by one at most."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def parallel(model: "nn.Module") -> "nn.Module":
    """`model` with a backward pass that averages the gradients over the ranks, who start from the first one's weights.

    It must be made anew where parameters were replaced.
    """
    if world_size() == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)


def total(tensor: "Tensor") -> "Tensor":
    """The sum over the ranks, added in their order."""
    if world_size() == 1:
        return tensor
    import torch
    import torch.distributed as dist

    own = tensor.detach().cpu().contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return sum(parts[1:], parts[0]).to(tensor.device)


def gather(value: object) -> list:
    """The JSON-able `value` of every rank, in their order."""
    if world_size() == 1:
        return [value]
    import torch
    import torch.distributed as dist

    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    padded = own.new_zeros(int(max(sizes)))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[:size].numpy())) for part, size in zip(parts, sizes, strict=True)]


def broadcast_from_main(value: object) -> object:
    """The first rank's JSON-able `value`: what others give does not matter. For clocks, and what only one can know."""
    return gather(value if is_main() else None)[0] if world_size() > 1 else value


def broadcast(tensor: "Tensor", source: int) -> "Tensor":
    """Overwrite a CPU tensor with that of the rank `source`, which has its shape and type."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast(tensor, source)
    return tensor


def check_same(what: str, value: object) -> None:
    """Raise InputError on all ranks unless the JSON-able `value` is the same on all."""
    first, *others = gather(value)
    for number, other in enumerate(others, start=1):
        if other != first:
            with agreed():
                raise InputError(f"{what}: not the same for the processes 0 and {number}; start all in the same way")


@contextmanager
def agreed() -> Iterator[None]:
    """What ends the work within on one rank ends it on all: InputError or OSError, which one rank tells, or Stopped.

    Within it no rank may wait for another, but for nested calls that all of them come to or none.
    """
    own = None
    try:
        yield
    except (InputError, OSError, Stopped) as error:
        if world_size() == 1:
            raise
        own = error
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    signal = own.number if isinstance(own, Stopped) else 0
    failed = own is not None and not signal
    state = torch.tensor([rank() if failed else world_size(), -signal])
    dist.all_reduce(state, dist.ReduceOp.MIN)
    teller, signal = state.tolist()
    if teller < world_size():
        raise own if rank() == teller else Elsewhere(f"the process {teller} has failed")
    if signal:
        raise Stopped(-signal)


def together(work: Callable[..., Result], *args: object) -> Result:
    """What `work(*args)` returns, on all ranks; it is done within `agreed`."""
    with agreed():
        return work(*args)


def main_only(work: Callable[..., None]) -> Callable[..., None]:
    """`work` on the rank that writes, nothing on the others."""
    return work if is_main() else lambda *_: None


def is_lost(error: Exception) -> bool:
    """Whether the error says that another rank has ended, or cannot be reached any more."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    dist = _joined()
    if not dist or world_size() == 1:
        return False
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)

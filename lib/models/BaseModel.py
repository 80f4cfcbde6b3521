"""What every model can do: run its table of blocks, start its weights, or load them."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.system.error import InputError
from lib.system.files import read_checked

IMAGE = "image"  # the parent of the first block
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a saved model (a plain `state_dict`) onto the CPU, without running any code that it may hold.

    Raises InputError if it cannot be read, is no model, holds NaN or infinite weights, or the checksum beside it (if
    any) is another one.
    """
    try:
        data = read_checked(Path(path))
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load raises nearly anything on a file that is no model
        reason = "no such file" if not Path(path).exists() else type(error).__name__
        raise InputError(f"{path}: cannot be read as a saved model ({reason}); give a file models/model-E") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: is no saved model (a state_dict of tensors); give a file models/model-E")
    for key, value in state.items():
        ordinary = value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not ordinary or not value.isfinite().all():
            raise InputError(f"{path}: {key} does not hold finite real numbers; give another file models/model-E")
    return state


@dataclass(frozen=True)
class Block:
    """One row of the table that is the network: a module with one convolution, its name in filter files, and the blocks
    whose maps it eats, in order."""

    name: str
    module: nn.Module
    parents: tuple[str, ...]
    head: bool = False

    @property
    def conv(self) -> nn.Module:
        return next(module for module in self.module.modules() if isinstance(module, CONVOLUTIONS))

    @property
    def transposed(self) -> bool:
        return self.conv.transposed

    @property
    def in_filters(self) -> int:
        return self.conv.in_channels

    @property
    def out_filters(self) -> int:
        return self.conv.out_channels


class BaseModel(nn.Module):
    """A network that is a table of blocks: what is added to it runs, is pruned, is counted, and has a name in files."""

    def __init__(self):
        super().__init__()
        self.table: list[Block] = []

    def add(self, part: nn.ModuleList, block: Block) -> None:
        """Append a block to the table, and its module to the part whose name its parameters' keys begin with."""
        part.append(block.module)
        self.table.append(block)

    def blocks(self) -> list[Block]:
        """Every convolution in the order of the forward pass, heads included."""
        return self.table

    def run(self, x: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """The forward pass, block by block: yields (block, output). No map outlives the last block that eats it."""
        maps, last = {IMAGE: x}, {parent: block.name for block in self.table for parent in block.parents}
        for block in self.table:
            inputs = [maps.pop(p) if last[p] == block.name else maps[p] for p in block.parents]
            x = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
            del inputs
            x = block.module(x)
            if block.name in last:
                maps[block.name] = x
            yield block, x

    def feature_maps(self, x: Tensor | list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The forward pass, block by block: yields (name, output); heads give their softmax maps."""
        return ((block.name, output) for block, output in self.run(x))

    def forward_saveFMs(self, x: Tensor | list[Tensor]) -> dict[str, Tensor]:
        """All feature maps of a batch, (B, C, *spatial) by the block's name; the heads' are their softmax maps."""
        return dict(self.feature_maps(x))

    def initialize(
        self,
        device: str | torch.device = "cpu",
        model_state: str | Path | None = None,
        log: Callable[[str], None] | None = None,
        isSauron: bool = False,  # noqa: N803 (the published name)
    ) -> None:
        """Start the weights (He normal; biases 0) or load them from `model_state`, and move the model to `device`.

        `isSauron` belongs to the published interface: the keys of nnUNet and Sauron are the same here, so a file of
        either fits both and nothing depends on it. Raises InputError if the file does not fit this model.
        """
        if model_state:
            self.load(read_state(model_state), model_state)
        else:
            for module in self.modules():
                if isinstance(module, CONVOLUTIONS):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)
        self.to(device)
        if log is not None:
            origin = f"weights of {model_state}" if model_state else "new weights"
            log(f"{type(self).__name__}: {sum(p.numel() for p in self.parameters()):,} parameters, {origin}")

    def load(self, state: dict[str, Tensor], source: str | Path) -> None:
        """Load a `state_dict`; `source` names it in the InputError that says which tensor does not fit."""
        own = self.state_dict()
        for key in [*own, *state]:
            if key not in state or key not in own:
                raise InputError(f"{source}: {key} is {'missing' if key in own else 'unknown'}: not this network")
            if own[key].shape != state[key].shape:
                raise InputError(
                    f"{source}: {key} has shape {tuple(state[key].shape)}, the network needs {tuple(own[key].shape)}"
                )
        self.load_state_dict(state)

"""What every model can do: start its weights, or load them."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lib.system.error import InputError
from lib.system.files import read_checked


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
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
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"{path}: is no saved model (a state_dict of tensors); give a file models/model-E")
    for key, value in state.items():
        ordinary = value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(key, str) or not ordinary or not value.isfinite().all():
            raise InputError(f"{path}: {key} does not hold finite real numbers; give another file models/model-E")
    return state


class BaseModel(nn.Module):
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
                if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    nn.init.zeros_(module.bias)
        self.to(device)
        if log is not None:
            origin = f"weights of {model_state}" if model_state else "new weights"
            log(f"{type(self).__name__}: {sum(p.numel() for p in self.parameters()):,} parameters, {origin}")

    def load(self, state: dict[str, torch.Tensor], source: str | Path) -> None:
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

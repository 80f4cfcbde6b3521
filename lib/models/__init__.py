"""The models, and how to get one back from a file."""

from pathlib import Path

import torch
from torch import nn

from lib.models.BaseModel import read_state
from lib.models.filters import read_filters
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.models.size import count_filters
from lib.system.error import InputError

MODELS = {"sauron": Sauron, "nnunet": nnUNet}


def architecture(state: dict[str, torch.Tensor], source: str | Path) -> dict:
    """The arguments of nnUNet, read off the shapes of a `state_dict`. Raises InputError naming `source`."""
    try:
        first, last = state["encoder.0.seq.0.weight"], state["last.0.0.weight"]
        levels = sum(key.startswith("encoder.") and key.endswith(".weight") for key in state) // 2
        dim, n_classes = {4: "2D", 5: "3D"}[first.ndim], len(last)
        out = {f"enc_ConvBlock_{k + 1}": len(state[f"encoder.{k}.seq.0.weight"]) for k in range(2 * levels)}
        for stage in range(levels - 1):
            out[f"dec_ConvTranspose{dim.lower()}_{stage + 1}"] = state[f"decoder.{3 * stage}.weight"].shape[1]
            for i in (1, 2):
                out[f"dec_ConvBlock_{2 * stage + i}"] = len(state[f"decoder.{3 * stage + i}.seq.0.weight"])
        if levels < 3:
            raise IndexError(f"{levels} levels; the third")
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{source}: is no model of nnUNet or Sauron ({error} is missing)") from error
    return {
        "modalities": first.shape[1],
        "n_classes": n_classes,
        "fms_init": out["enc_ConvBlock_1"],
        "levels": levels,
        "dim": dim,
        "filters": {"out": out},
    }


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    in_filters: str | Path | None = None,
    out_filters: str | Path | None = None,
) -> nnUNet:
    """A saved model in eval mode, its widths read from the file. Raises InputError if something does not fit.

    Filter files are not needed; where given, their last row is checked against the model.
    """
    state = read_state(path)
    model = nnUNet(**architecture(state, path))
    model.load(state, path)
    counted = count_filters(model)
    for direction, file in (("in", in_filters), ("out", out_filters)):
        if file:
            check_filters(read_filters(file), counted[direction], file, path)
    return model.to(device).eval()


def check_filters(given: dict[str, int], counted: dict[str, int], file: str | Path, model: str | Path) -> None:
    """Raise InputError unless a filter file's last row describes the model, naming the first block that differs."""
    for name in [*counted, *given]:
        if given.get(name) != counted.get(name):
            raise InputError(
                f"{file}: {name} has {given.get(name, 'no')} filters in its last row, {counted.get(name, 'no')} in "
                f"{model}; give the filter files of the same run and epoch, or leave them out"
            )


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Let torch compile the forward pass of `model` at its first call, and again whenever its filters have changed.

    Keys, parameters and `model.forward` stay what they are; results agree to rounding. Raises InputError where
    nothing can be compiled for `device`.
    """
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # torch raises a dozen types where a compiler or its headers are missing
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"--compile: does not work here ({reason}); install a C++ compiler or leave it out") from error
    model.compile(recompile_limit=1000)  # torch gives up after 8

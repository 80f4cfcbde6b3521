"""The models, and how to get one back from a file."""

from pathlib import Path

import torch
from torch import nn

from lib.models.BaseModel import read_state
from lib.models.filters import check_filters, read_filters
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.models.size import count_filters
from lib.system.error import InputError

MODELS = {"sauron": Sauron, "nnunet": nnUNet, "flat": nnUNet}  # a flat one is an nnUNet of other widths


def architecture(state: dict[str, torch.Tensor], source: str | Path) -> dict:
    """The arguments of nnUNet, read off the shapes of a `state_dict`: a transposed convolution's kernel is its stride.

    Raises InputError naming `source`.
    """
    try:
        first, n_classes = state["encoder.0.seq.0.weight"], len(state["last.0.0.weight"])
        levels = sum(key.startswith("encoder.") and key.endswith(".weight") for key in state) // 2
        dim = {4: "2D", 5: "3D"}[first.ndim]
        with torch.device("meta"):
            network = nnUNet(1, 1, 1, levels, dim=dim)  # for its table alone
        keys = {module: f"{name}.weight" for name, module in network.named_modules()}
        shapes = {block: state[keys[block.conv]].shape for block in network.blocks()}
        widths = {block.name: shape[1 if block.transposed else 0] for block, shape in shapes.items() if not block.head}
        ups = [shape[2:] for block, shape in shapes.items() if block.transposed]  # from the deepest stage
        arguments = {
            "modalities": first.shape[1],
            "n_classes": n_classes,
            "fms_init": len(first),
            "levels": levels,
            "dim": dim,
            "filters": {"out": widths},
            "strides": [(1,) * len(ups[0]), *map(tuple, reversed(ups))],
            # the encoder comes first, two blocks a level
            "kernels": [tuple(shape[2:]) for shape in list(shapes.values())[: 2 * levels : 2]],
        }
        with torch.device("meta"):
            nnUNet(**arguments)  # raises ValueError where there is no such network
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{source}: is no model of nnUNet or Sauron ({reason})") from error
    return arguments


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

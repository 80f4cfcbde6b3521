"""Tiny networks, and exported models made of them without a training."""

import copy

import torch

from lib.export import to_onnx
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, summary
from lib.onnx_file import RESEARCH, axes_text

NETWORKS = {  # 2D; several channels, flat kernels and strides, pruned widths
    "2D": {"modalities": 1, "n_classes": 4, "fms_init": 4, "levels": 3, "dim": "2D"},
    "3D": {
        "modalities": 2,
        "n_classes": 3,
        "levels": 4,
        "dim": "3D",
        "kernels": [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)],
        "strides": [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 1)],
    },
}
PATCHES = {"2D": (16, 24), "3D": (4, 16, 8)}


def network(dim, seed=0):
    """A network with random weights; in 3D each block has a width of its own."""
    arguments = NETWORKS[dim]
    torch.manual_seed(seed)
    if dim == "3D":
        names = [block.name for block in nnUNet(1, 1, 1, arguments["levels"], dim=dim).blocks() if not block.head]
        arguments = arguments | {"filters": {"out": {name: 2 + i % 5 for i, name in enumerate(names)}}}
    model = nnUNet(**arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def metadata_of(model, patch_size, /, **changes):
    sizes = summary(model, patch_size)
    change = {key: {"before": None, "after": sizes[key]} for key in sizes}
    classes = model.n_classes
    scores = {
        "dice": [0.9] * classes,
        "HD95_mm": [None] + [1.5] * (classes - 1),
        "mean_foreground_dice": 0.9,
        "mean_foreground_HD95_mm": 1.5,
    }
    return {
        "format": 1,
        "notice": RESEARCH,
        "made_by": {
            "command": "python -m lib.export model-1 out.onnx",
            "date": "2026-01-02T03:04:05+00:00",
            "git_revision": None,
            "versions": {"python": "3.11"},
        },
        "model": {"name": "model-1", "sha256": "0" * 64},
        "data": {"name": "tiny", "licence": "CC BY 4.0"},
        "channels": [f"T{i}" for i in range(model.modalities)],
        "labels": [{"name": f"class {i}", "value": 2 * i} for i in range(classes)],
        "file_ending": ".nii.gz",
        "preprocessing": {"spacing_mm": [1.5, 1.0, None], "orientation": "SPL", "zscore": True},
        "dim": model.dim,
        "patch_size": list(patch_size),
        "divisor": list(model.divisor),
        "axes": axes_text("SPL", model.dim),
        "mirroring": {"axes": [*range(2, 2 + len(patch_size))]},
        "step_size": 0.5,
        "postprocessing": {
            "steps": ["foreground", 1],
            "reasons": [{"step": "foreground", "kept": True, "dice": [0.8, 0.9], "why": "it helps"}],
        },
        "filters": count_filters(model),
        "parameters": change["parameters"],
        "flops": change["flops"],
        "n_filters": change["filters"],
        "validation": {"n": 2, "before": scores, "after": copy.deepcopy(scores)},
        **changes,
    }


def exported(dim, seed=0, /, **changes):
    """An exported model as onnx has it, and the network."""
    model = network(dim, seed)
    return to_onnx(model, metadata_of(model, PATCHES[dim], **changes)), model


def write_exported(path, dim="2D", seed=0, /, **changes):
    """Write an exported model to `path`; returns the network."""
    made, model = exported(dim, seed, **changes)
    path.write_bytes(made.SerializeToString())
    return model

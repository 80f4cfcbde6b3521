"""Run folders without a training, and models that are exported from them."""

import json
from dataclasses import replace

import torch

from lib.build import build_unpruned
from lib.checkpoint import save_model
from lib.data import raw
from lib.data.BaseDataset import Preprocessing
from lib.data.definition import as_dict
from lib.data.normalization import Normalization
from lib.data.splits import five_folds
from lib.export import export
from lib.models.size import count_filters, resized
from lib.settings import Settings

SMALL = {"data": "phantom", "fms_init": 4, "levels": 3, "patch_size": (16, 24)}


def make_run(folder, seed=0, pruned=True, **given):
    """A run folder with one model of random weights, model-1, some of whose filters are gone; returns its path."""
    settings = Settings.of(SMALL | given)
    torch.manual_seed(seed)
    model = build_unpruned(settings)
    if pruned:
        widths = count_filters(model)["out"]
        heads = {block.name for block in model.blocks() if block.head}
        fewer = {name: n - (n > 3 and i % 3) for i, (name, n) in enumerate(widths.items()) if name not in heads}
        model = resized(model, fewer, "cpu")
    model.initialize()
    with torch.no_grad():
        for block in model.blocks():
            block.conv.bias.normal_(std=0.2)  # as after a training
    (folder / "models").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings.as_dict()))
    save_model(folder / "models" / "model-1", model)
    return folder / "models" / "model-1"


def own_settings(raw_folder, **changes):
    """Of data in nnU-Net's raw format with the channels T2 and ADC, 3D: normalized, cropped, resampled, anisotropic."""
    dataset = replace(
        raw.read_dataset(raw_folder),
        preprocessing=Preprocessing(
            (4.0, 1.2, 1.0), orientation="SPL", normalizations=(Normalization("zscore"),) * 2, crop=True
        ),
        patch_size=(4, 16, 12),
        folds=five_folds(file.id for file in raw.read_dataset(raw_folder).find(raw_folder)),
    )
    dataset = replace(dataset, **changes)
    shape = {"levels": 3, "strides": ("111", "122", "222"), "kernels": ("133", "333", "333")}
    return {"definition": as_dict(dataset), "patch_size": dataset.patch_size, "data_path": str(raw_folder), **shape}


def exported(folder, name="model.onnx", **given):
    """The file of such a model."""
    output = folder / name
    export(make_run(folder / f"run of {name}", **given), output, lambda line: None)
    return output

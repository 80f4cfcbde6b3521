"""Exported models (OUT.onnx): what `lib.export` has written says all that their use needs. Without torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lib import postprocessing
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.network import check_patch_size
from lib.onnx_file import OnnxFile, read_onnx_file
from lib.record import Record, joint_source
from lib.runtimes import OnnxNetwork, open_network
from lib.system.error import InputError

MEANINGLESS = (  # flags of predict.py that are about models of torch and their runs
    "data",
    "original",
    "in_filters",
    "out_filters",
    "amp",
    "compile",
)


@dataclass(frozen=True)
class ExportedModels:
    """The exported models that the arguments of predict.py name."""

    files: tuple[OnnxFile, ...]
    dataset: BaseDataset
    patch_size: tuple[int, ...]
    networks: tuple[OnnxNetwork, ...]
    source: dict  # what the record says of their files
    steps: tuple = ()  # of the post-processing
    notes: list[str] = field(default_factory=list)  # lines for the screen

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ExportedModels":
        """Raises InputError where the models are not to be used so."""
        if args.input is None:
            raise InputError(f"{args.model_state[0]}: an exported model knows no data set on disk; give --input")
        if args.partition != "test":
            raise InputError(f"--partition {args.partition}: an exported model knows none; leave it out")
        for flag in MEANINGLESS:
            if getattr(args, flag):
                raise InputError(f"--{flag}: has no meaning with an exported model, which says it itself; leave it out")
        files = read_agreed(args.model_state)
        first = files[0]
        patch_size = tuple(args.patch_size or first.patch_size)
        for file in files:
            check_patch_size(patch_size, file.divisor)
        networks = tuple(open_network(file, args.runtime, device=args.device) for file in files)
        sources = [{"path": str(file.path.resolve()), "sha256": file.sha256} for file in files]
        steps, notes = ((), []) if args.no_postprocessing else agreed_steps(files)
        return cls(files, dataset_of(first), patch_size, networks, joint_source(sources), steps, notes)

    def settled(self, record: Record) -> tuple["ExportedModels", dict]:
        """These models, and what the record is to say of their precision."""
        return self, {"amp": False, "precision": "float32", "runtime": self.networks[0].runtime}

    def prepare(self) -> None:
        """Nothing is left to be done."""

    def sizes(self) -> list[dict]:
        """{"parameters", "flops", "filters": {"unpruned": n or None, "now": n}} of each model, as its file says."""
        keys = {"parameters": "parameters", "flops": "flops", "filters": "n_filters"}
        said = [{key: file.metadata[name] for key, name in keys.items()} for file in self.files]
        return [{key: {"unpruned": n["before"], "now": n["after"]} for key, n in one.items()} for one in said]


def open_models(paths: Sequence[Path], device: str, runtime: str) -> dict[str, Any]:
    """See `lib.inference.opened`."""
    files = read_agreed(paths)
    steps, _ = agreed_steps(files)
    return {
        "models": tuple(open_network(file, runtime, device=device) for file in files),
        "patch_size": files[0].patch_size,
        "preprocessing": files[0].dataset.preprocessing,
        "postprocess": postprocessing.applying(steps),
    }


def read_agreed(paths: Sequence[Path]) -> list[OnnxFile]:
    """The files of exported models. Raises InputError if one is none, or two have not the same images, labels and
    patch."""
    files = [read_onnx_file(path) for path in paths]
    for what in ("channels", "class_names", "values", "preprocessing", "patch_size", "file_ending"):
        for file in files[1:]:
            if getattr(file.dataset, what) != getattr(files[0].dataset, what):
                raise InputError(f"{file.path}: has another {what} than {files[0].path}; give models that share it")
    return files


def dataset_of(file: OnnxFile) -> BaseDataset:
    """The data set that a model was trained on, as far as its file tells it; one of ours also knows how folders of its
    images are laid out, and how its challenge wants predictions to be named."""
    said = file.dataset
    ours = DATASETS.get(said.name)
    if ours is None or (ours.class_names, ours.channels) != (said.class_names, said.channels):
        return said
    return replace(said, find=ours.find, challenge_name=ours.challenge_name)


def agreed_steps(files: Sequence[OnnxFile]) -> tuple[tuple, list[str]]:
    """The post-processing that was decided for all of the models alike, and lines for the screen."""
    decided = {file.steps for file in files}
    if len(decided) == 1:
        return decided.pop(), []
    return (), ["the models come with different post-processing: none is applied"]

"""Models of torch and what their run folders say: the data set, its split, the patch, the post-processing, the size."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib import postprocessing, published
from lib.data import DATASETS
from lib.data.BaseDataset import BaseDataset
from lib.models import compile_model, load_model
from lib.models.nnUNet import nnUNet
from lib.models.size import summary
from lib.network import check_patch_size
from lib.record import Record, identified, joint_source
from lib.settings import Settings
from lib.system.device import device_of, faster_precision, find_device
from lib.system.error import InputError
from lib.system.files import is_listed
from lib.system.process import keep_freed_memory
from lib.torch_network import TorchNetwork
from lib.utils import dataset_of

Images = tuple[Path, ...]  # the files of one image, one for each channel
Runs = dict[Path, Settings | None]  # the settings of the run of each model, None where it is not known
DEFAULT_SPLIT = {"split": "0.9:0.1", "seed_data": 42}  # as in training


@dataclass(frozen=True)
class RunModels:
    """The models that the arguments of predict.py name."""

    args: argparse.Namespace
    runs: Runs
    dataset: BaseDataset
    patch_size: tuple[int, ...]
    networks: tuple[TorchNetwork, ...]
    source: dict  # what the record says of their files
    steps: tuple = ()  # of the post-processing
    notes: list[str] = field(default_factory=list)  # lines for the screen

    @classmethod
    def of(cls, args: argparse.Namespace) -> "RunModels":
        """Raises InputError where the models are not to be used so."""
        if args.runtime != "auto":
            raise InputError(f"--runtime {args.runtime}: runs exported models (OUT.onnx) only; leave it out")
        runs = agreed_settings(args.model_state, but=("patch_size",) if args.patch_size else ())
        dataset = dataset_of_models(args.data, runs)
        patch_size = tuple(args.patch_size or (_first(runs) or dataset).patch_size)
        device = find_device(args.device)
        if device.type == "cpu":
            keep_freed_memory()
        models, source = load_models(args, device)
        for model, path in zip(models, args.model_state, strict=True):
            check_model(model, path, dataset, patch_size)
        return cls(args, runs, dataset, patch_size, tuple(map(TorchNetwork, models)), source)

    def images(self) -> dict[str, Images]:
        """Those of --partition, by the name of the prediction. Raises InputError if there are none."""
        folder = self.args.original or own_folder(self.args.data, self.dataset, _first(self.runs))
        return partition_images(self.dataset, folder, self.args.partition, self.runs)

    def settled(self, record: Record) -> tuple["RunModels", dict]:
        """With the post-processing, and the precision in which to predict into the folder of `record`; and what the
        record is to say of the precision."""
        steps, notes = steps_of(self.args.model_state) if not self.args.no_postprocessing else ((), [])
        precision, note = self._precision(record)
        networks = tuple(replace(network, amp=precision == "bfloat16") for network in self.networks)
        settled = replace(self, networks=networks, steps=steps, notes=[*notes, *[note] * bool(note)])
        return settled, {"amp": self.args.amp, "precision": precision}

    def _precision(self, record: Record) -> tuple[str, str | None]:
        """float32 or bfloat16, and a line for the screen if a timed batch decided it. Unless it is to overwrite what is
        there, a prediction keeps to the precision in which the folder was begun."""
        args, network = self.args, self.networks[0]
        if not args.amp or device_of(network.model).type != "cpu":
            return "bfloat16" if args.amp else "float32", None
        if not args.overwrite and record.jobs.get(record.job, {}).get("amp"):
            return record.jobs[record.job]["precision"], None
        return faster_precision(
            "a batch", network.trial(self.patch_size, args.batch_size or network.usual_batch(self.patch_size))
        )

    def prepare(self) -> None:
        """What takes long and is done when all else is known to be right."""
        if self.args.compile:
            for network in self.networks:
                compile_model(network.model, device_of(network.model))

    def sizes(self) -> list[dict]:
        """`sizes_of` each model. Where its run is not known, the widths of the data set count as unpruned."""
        known = zip(self.networks, self.runs.values(), strict=True)
        return [sizes_of(network.model, self.dataset, self.patch_size, settings) for network, settings in known]


def open_models(paths: Sequence[Path], device: str, runtime: str) -> dict[str, Any]:
    """See `lib.inference.opened`."""
    if runtime != "auto":
        raise InputError(f"{paths[0]}: runtime {runtime!r} runs exported models (OUT.onnx) only")
    settings = agreed_settings(paths)
    for path, known in settings.items():
        if known is None:
            raise InputError(f"{path}: its run is not known; name RUN/models/model-E, or make a Predictor(...)")
    first, (steps, _) = settings[paths[0]], steps_of(paths)
    return {
        "models": tuple(TorchNetwork(load_model(path, find_device(device))) for path in paths),
        "patch_size": first.patch_size,
        "preprocessing": first.dataset.preprocessing,
        "postprocess": postprocessing.applying(steps),
    }


def agreed_settings(paths: Sequence[Path], but: Sequence[str] = ()) -> dict[Path, Settings | None]:
    """`settings_of_model` of each model. Raises InputError if the runs of two have not the same data set,
    preprocessing and patch, those named in `but` aside."""
    settings = {path: settings_of_model(path) for path in paths}
    known = [(path, one) for path, one in settings.items() if one]
    for path, one in known[1:]:
        first = known[0][1]
        pairs = {
            "data set": (one.dataset.name, first.dataset.name),
            "preprocessing": (one.dataset.preprocessing, first.dataset.preprocessing),
            "patch_size": (one.patch_size, first.patch_size),
        }
        for what, (here, there) in pairs.items():
            if here != there and what not in but:
                raise InputError(
                    f"{path}: its run has another {what} than that of {known[0][0]}; give models that share it"
                )
    return settings


def settings_of_model(path: Path) -> Settings | None:
    """The settings of the run that a model RUN/models/model-E belongs to; None where none of ours is known."""
    path = path.resolve()
    run = path.parent.parent
    if path.parent.name != "models" or not (run / "config.json").exists() or not is_listed(path):
        return None
    return Settings.read(run)[0] if published.read_config(run) is None else None


def _first(runs: Runs) -> Settings | None:
    """The settings of the first run that is known."""
    return next((settings for settings in runs.values() if settings), None)


def dataset_of_models(data: str | None, runs: Runs) -> BaseDataset:
    """The data set of the models' runs. `data`: what is given as --data, which is needed where no run is known.

    Raises InputError if it is neither given nor known, or what is given is not what is known.
    """
    known = [(path, settings) for path, settings in runs.items() if settings]
    if data is None and not known:
        raise InputError(f"--data is needed: the run of {next(iter(runs))}, which would tell it, is not known")
    if data is None:
        return known[0][1].dataset
    given = dataset_of(data)
    if known:
        path, settings = known[0]
        if given.name != settings.dataset.name:
            raise InputError(f"--data {data}: the run of {path} has {settings.dataset.name}; leave --data out")
        return settings.dataset
    if given.name not in DATASETS and not given.preprocessing.normalizations:
        raise InputError(
            f"--data {data}: says nothing of the preprocessing of {next(iter(runs))}, whose run is not known; name "
            "RUN/models/model-E as --model_state, or RUN as --data"
        )
    return given


def load_models(args: argparse.Namespace, device: torch.device) -> tuple[tuple[nnUNet, ...], dict]:
    """All models, and what the record says of their files. Raises InputError."""
    if len(args.model_state) > 1 and (args.in_filters or args.out_filters):
        flag = "--in_filters" if args.in_filters else "--out_filters"
        raise InputError(f"{flag}: is of one model; leave it out with several --model_state")
    models, sources = [], []
    for path in args.model_state:
        with identified(path) as found:
            models.append(load_model(path, device, args.in_filters, args.out_filters))
        sources.append({key: found[key] for key in ("path", "sha256")})
    return tuple(models), joint_source(sources)


def steps_of(paths: Sequence[Path]) -> tuple[tuple, list[str]]:
    """The post-processing that was decided in the runs of all models alike, and lines for the screen. Raises
    InputError."""
    found = [postprocessing.read_steps(path) for path in paths]
    notes = [note for _, note in found if note]
    decided = {steps or () for steps, _ in found}
    if len(decided) == 1:
        return decided.pop(), notes
    return (), [*notes, "the runs of the models decided for different post-processing: none is applied"]


def own_folder(data: str | None, dataset: BaseDataset, settings: Settings | None) -> Path | None:
    """Where own data are: in the folder that was given as --data, or else where the run had them; None for others."""
    if not dataset.preprocessing.normalizations:
        return None
    if data and Path(data, "dataset.json").is_file():
        return Path(data)
    return Path(settings.data_path) if settings and settings.data_path else None


def check_model(model: nnUNet, source: Path, dataset: BaseDataset, patch_size: tuple[int, ...]) -> None:
    """Raise InputError unless the model (of the file `source`), the data set and the patch belong together."""
    for what in ("dim", "n_classes", "modalities"):
        found, needed = getattr(model, what), getattr(dataset, what)
        if found != needed:
            raise InputError(f"{source}: {what} is {found}, --data {dataset.name} needs {needed}")
    check_patch_size(patch_size, model.divisor)


def partition_images(dataset: BaseDataset, folder: Path | None, partition: str, runs: Runs) -> dict[str, Images]:
    """The images of "train", "validation" or "test" in the data set's `folder`, by id, as the runs of the models have
    divided them.

    Raises InputError if there are none, or the runs do not agree. Without a run it is not known what the model was
    trained on: the test set is then that of the default seed, which a line says, and the others are refused.
    """
    if partition != "test":
        for path, settings in runs.items():
            if settings is None:
                raise InputError(
                    f"--partition {partition}: the run of {path}, and so its split, is not known; give the model "
                    "inside its run folder, or --input"
                )
    split = agreed_split(runs, partition)
    if not _first(runs):
        if dataset.preprocessing.normalizations:
            split["fold"] = "all"  # which has the same test set as any
        else:
            tqdm.write(
                f"the run of {next(iter(runs))} is not known: predicting the test set of seed {split['seed_data']}"
            )
    images = {file.id: file.images for file in dataset.partitions(folder, **split)[partition]}
    if not images:
        raise InputError(
            f"--partition {partition} of {dataset.name}: there is no image on disk to predict; give another "
            "--partition, or --input"
        )
    return images


def agreed_split(runs: Runs, partition: str) -> dict[str, str | int]:
    """How the runs divide the data set; of what is not known the default. Raises InputError if two have not the same
    `partition`."""
    found = {}
    for path, settings in runs.items():
        if settings:
            fold = {"fold": settings.fold} if getattr(settings, "fold", None) is not None else {}
            found[path] = {key: getattr(settings, key) for key in DEFAULT_SPLIT} | fold
    decisive = ("seed_data",) if partition == "test" else ("split", "seed_data", "fold")
    first, *others = [*found.items()] or [(None, DEFAULT_SPLIT.copy())]
    for path, split in others:
        if any(split.get(key) != first[1].get(key) for key in decisive):
            raise InputError(
                f"--partition {partition}: that of the run of {path} is not that of {first[0]}; give one model, or "
                "--input"
            )
    return first[1]


def sizes_of(
    model: nnUNet, dataset: BaseDataset, patch_size: tuple[int, ...], settings: Settings | None
) -> dict[str, dict[str, int | None]]:
    """{"parameters", "flops", "filters": {"unpruned": n or None, "now": n}}."""
    now, unpruned = summary(model, patch_size), {}
    keys = ("levels", "fms_init", "fms_max")
    planned = {key: getattr(settings, key, dataset.defaults[key]) for key in keys}
    if model.levels == planned["levels"]:
        like = {"dim": model.dim, "strides": model.strides, "kernels": model.kernels}
        unpruned = summary(nnUNet(model.modalities, model.n_classes, **planned, **like), patch_size)
    return {key: {"unpruned": unpruned.get(key), "now": now[key]} for key in ("parameters", "flops", "filters")}

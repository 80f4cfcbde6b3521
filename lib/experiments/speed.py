"""How fast the parts are, as ratios of two things that are measured in turn: `python -m lib.experiments.speed`."""

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from lib.checkpoint import TrainingState, save_model
from lib.data import DATASETS
from lib.data.loading import Loader
from lib.data.nifti import read, voxels_by_nibabel, write
from lib.data.preprocessing import preprocess, read_channels
from lib.evaluation import Rules, evaluate_pair
from lib.experiments import baselines
from lib.experiments import speed_parts as parts
from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.onnx_file import read_onnx_file
from lib.runtimes import installed_runtimes, open_network
from lib.settings import Settings
from lib.system.cli import Parser, number, run_script
from lib.system.device import find_device
from lib.system.process import keep_freed_memory, n_cores
from lib.torch_network import TorchNetwork
from lib.trainer import compute_loss, train_epoch

ABOUT = """\
How fast the parts are, as ratios of two things that are measured in turn. Every line gives the median and the range
over the repeats. CPU seconds are counted where there is one thread, the wall clock's elsewhere, and by busy.
"""
TEXTS = {
    "step": "a training step of Sauron, and of Sauron as its formulas are written, over that of nnUNet",
    "rate": "the FLOPs per second of a training step's convolutions, whole step counted, over those of a large sgemm",
    "epoch": "an epoch with a tenth of the FLOPs over one with all of them, and the share of it spent waiting for data",
    "data": "augmented patches from torchio's own chain over ours",
    "predict": "predict.py with a tenth of the FLOPs over all of them; our way to predict over a loop of one patch at "
    "a time",
    "runtimes": "torch over each runtime of exported models: the forward pass of the whole network and of one with a "
    "tenth of the FLOPs, and predict.py for an image of the test set",
    "evaluate": "metrics by medpy on the whole volumes over ours, and ours over reading the files; peak memory",
    "busy": "a training step whose threads wait for one another as OpenMP lets them by default over one whose threads "
    "wait as ours do (see lib/__init__.py), on the quiet machine, and beside as many busy "
    "processes as there are cores",
}  # by command; no docstrings, which -OO takes away


def load(args: argparse.Namespace, **settings) -> Loader:
    return Loader(DATASETS[args.data], args.data_path, args.cache_path, patch_size=args.patch_size, **settings)


def step(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    batch, distances = parts.made_up_batch(args), DS_CrossEntropyDiceLoss_Distance()
    losses, gradients = [], []  # of the convolutions' weights: those of most biases are 0 but for rounding
    for kind in (Sauron, baselines.LiteralSauron):
        model = parts.build(kind, args)
        loss, _ = compute_loss(model, distances, *batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.ndim > 1])
    largest = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))
    print(f"loss: ours {losses[0]:.7f}, literal {losses[1]:.7f}; ", end="")
    print(f"largest relative difference of a gradient: {largest:.1e}")

    sides = {
        "nnUNet": parts.training_step(parts.build(nnUNet, args), DS_CrossEntropyDiceLoss(), *batch),
        "Sauron": parts.training_step(parts.build(Sauron, args), distances, *batch),
        "literal Sauron": parts.training_step(parts.build(baselines.LiteralSauron, args), distances, *batch),
        "convolutions alone": baselines.convolutions_alone(parts.build(nnUNet, args), batch[0]),
    }
    sides = {name: parts.timed(side, args.device) for name, side in sides.items()}
    seconds = parts.interleave(sides, args.repeats, warm_up=1)
    parts.show_ratios(seconds, "Sauron / nnUNet", "literal Sauron / nnUNet")
    parts.show_ratios(seconds, "convolutions alone / nnUNet", "convolutions alone / Sauron")
    parts.show_ms("Sauron", seconds["Sauron"])


def rate(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    batch, model = parts.made_up_batch(args), parts.build(nnUNet, args)
    multiply, matrix_flops = parts.multiplication(args.matrix, args.device)
    flops = {"a step": parts.step_flops(model, batch[0]), "sgemm": matrix_flops}
    sides = {"a step": parts.training_step(model, DS_CrossEntropyDiceLoss(), *batch), "sgemm": multiply}
    sides = {name: parts.timed(side, args.device) for name, side in sides.items()}
    seconds = parts.interleave(sides, args.repeats, warm_up=1)
    rates = {name: [flops[name] / 1e9 / s for s in times] for name, times in seconds.items()}
    parts.show_ratios(rates, "a step / sgemm")  # of FLOPs per second: the share of sgemm's rate
    for name, values in rates.items():
        parts.show(f"{name}, GFLOPs per second", values)
    parts.show_ms("a step", seconds["a step"])


def epoch(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    data = load(args, batch_size=args.batch_size, num_workers=args.num_workers)
    n = min(args.batches or sys.maxsize, data.n_train_batches())
    large = parts.build(Sauron, args)
    networks = {"whole network": large, "small network": parts.cut_down(large, args)}
    criterion, numbers = DS_CrossEntropyDiceLoss_Distance(), itertools.count(1)

    def train(model: nnUNet) -> tuple[float, list[float]]:
        """The seconds of an epoch, and those of its waits."""
        state = TrainingState(model, torch.optim.Adam(model.parameters(), lr=1e-4), Path(), print)
        watched, start = parts.Watched(data, n), time.perf_counter()
        train_epoch(state, criterion, watched, next(numbers), 0, True, args.device)
        return time.perf_counter() - start, watched.waits

    taken = parts.interleave({name: partial(train, model) for name, model in networks.items()}, args.repeats)
    print(f"{n} batches of {args.batch_size}, {args.num_workers} worker processes (wall clock)")
    seconds = {name: [whole for whole, _ in times] for name, times in taken.items()}
    parts.show_ratios(seconds, "small network / whole network")
    for name, times in taken.items():
        parts.show(f"waiting for data, {name}", [100 * sum(waits) / whole for whole, waits in times], "%")
        rest = [100 * sum(waits[1:]) / (whole - waits[0]) for whole, waits in times]
        parts.show(f"waiting for data, {name}, after the first batch", rest, "%")


def data(args: argparse.Namespace) -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    loader = load(args)
    loader.prepare(["train"])
    n, n_patches, difference = min(args.volumes, len(loader.ids["train"])), 0, 0.0
    seconds: dict[str, list[float]] = {"torchio's chain": [], "ours": []}
    for repeat in range(args.repeats):  # every repeat draws anew, the same for both sides
        volumes, images = {name: loader.epoch(repeat)[0] for name in seconds}, {name: [] for name in seconds}
        volumes["torchio's chain"].augmentation = baselines.torchio_chain(loader.dataset.dim)

        def augment(name: str, items: Iterator[dict], images: dict = images) -> None:
            images[name].append(next(items)["image"])

        sides = {name: partial(augment, name, map(side.__getitem__, range(n))) for name, side in volumes.items()}
        sides = {name: parts.timed(side, args.device) for name, side in sides.items()}
        for name, times in parts.interleave(sides, n).items():
            seconds[name].append(sum(times))
        difference = max(difference, *(np.abs(a - b).max() for a, b in zip(*images.values(), strict=True)))
        n_patches += sum(map(len, images["ours"]))
    print(f"{n_patches} patches of {loader.patch_size}; largest difference of a voxel: {difference:.1e}")
    parts.show_ratios(seconds, "torchio's chain / ours")
    parts.show("ours, patches per second", [n_patches / args.repeats / s for s in seconds["ours"]])


def predict(args: argparse.Namespace) -> None:
    large = parts.build(nnUNet, args).eval()
    small, loader = parts.cut_down(large, args), load(args)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for file in loader.files("test")[: args.images]:
            (images / file.image.name).symlink_to(file.image.resolve())
        sides = {}
        for name, model in (("small", small), ("whole", large)):
            save_model(Path(folder, name), model)
            argv = ["--data", args.data, "--input", images, "--output", Path(folder, f"out-{name}"), "--overwrite"]
            argv += ["--model_state", Path(folder, name), "--device", str(args.device)]
            argv = [sys.executable, parts.ROOT / "predict.py", *argv, "--patch_size", *map(str, args.patch_size)]
            command = partial(subprocess.run, argv, check=True, capture_output=True)
            sides[f"predict.py, {name} network"] = parts.timed(command, args.device)
        parts.show_ratios(parts.interleave(sides, args.repeats), " / ".join(sides))
        paths = sorted(path.resolve() for path in images.iterdir())
    recipe = loader.dataset.preprocessing
    volumes = [preprocess(read_channels(path, recipe)[0], recipe).array for path in paths]
    with ExitStack() as stack:  # how memory is allocated belongs to the process
        spawn, sides = multiprocessing.get_context("spawn"), {}
        for side in parts.PREDICTIONS:
            pool = stack.enter_context(ProcessPoolExecutor(1, spawn))
            sides[side] = lambda pool=pool, side=side: pool.submit(parts.timed_prediction, side, args, volumes).result()
        given = parts.interleave(sides, args.repeats)
    labels = [times[-1][1] for times in given.values()]
    print(f"voxels whose label differs: {max(int((labels[0] != o).sum()) for o in labels)} of {len(labels[0])}")
    seconds = {side: [taken for taken, _ in times] for side, times in given.items()}
    parts.show_ratios(seconds, *(f"ours / {other}" for other in parts.PREDICTIONS if other != "ours"))


def runtimes(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as predict.py
    loader = load(args)
    image = loader.files("test")[0].image
    large = parts.build(nnUNet, args).eval()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("whole", large), ("small", parts.cut_down(large, args))):
            path = parts.as_run(Path(folder, name), model, args)
            exported = Path(folder, f"{name}.onnx")
            exported.write_bytes(parts.exported(path, model).SerializeToString())
            file, batch = read_onnx_file(exported), parts.made_up_batch(args)[0].numpy()
            networks = {"torch": TorchNetwork(model)}
            networks |= {name: open_network(file, name, args.threads, "cpu") for name in installed_runtimes()}
            maps = {key: network(batch) for key, network in networks.items()}
            apart = max(float(np.abs(one - maps["torch"]).max()) for one in maps.values())
            print(f"{name} network, {args.batch_size} patches of {args.patch_size}: softmax maps within {apart:.1e}")
            sides = {
                key: parts.timed(partial(network, batch), args.device, wall_clock=True)
                for key, network in networks.items()
            }
            seconds = parts.interleave(sides, args.repeats, warm_up=2)
            parts.show_ratios(seconds, *(f"torch / {key}" for key in networks if key != "torch"))
            for key, times in seconds.items():
                parts.show_ms(f"{key}, a patch", [s / len(batch) for s in times])
            argv = [sys.executable, parts.ROOT / "predict.py", "--input", image, "--overwrite", "--output"]
            commands = {
                key: [*argv, Path(folder, f"{name}-{key}"), "--model_state", state]
                for key, state in (("torch", path), ("exported", exported))
            }
            sides = {
                f"predict.py, {key}": parts.timed(
                    partial(subprocess.run, command, check=True, capture_output=True), args.device, wall_clock=True
                )
                for key, command in commands.items()
            }
            seconds = parts.interleave(sides, args.repeats, warm_up=1)
            parts.show_ratios(seconds, " / ".join(sides))
            for key, times in seconds.items():
                parts.show(key, times, " s")


def evaluate(args: argparse.Namespace) -> None:
    truth = args.label or Loader(DATASETS["phantom"], args.data_path, args.cache_path).files("test")[0].label
    with tempfile.TemporaryDirectory() as folder:
        prediction, original = Path(folder, "prediction.nii.gz"), read(truth)
        labels, pair = original.array, (prediction, truth)
        n_classes, volume = int(labels.max()) + 1, labels.nbytes / 2**20
        write(prediction, np.roll(labels, (1, 1, 1), (0, 1, 2)), original.header)
        peak = parts.peak_mib(*pair, n_classes)
        print(f"{labels.shape} voxels of {labels.dtype}")
        print(f"peak memory: {peak:.0f} MiB, which is ", end="")
        print(f"{peak - 3 * volume:.0f} MiB + 3 label volumes of {volume:.0f} MiB")
        del labels, original
        sides = {
            "medpy": lambda: baselines.medpy_metrics(*pair),
            "ours": lambda: evaluate_pair(*pair, Rules(n_classes)),
            "reading with nibabel": lambda: [voxels_by_nibabel(path) for path in pair],
        }
        if args.no_medpy:
            del sides["medpy"]
        else:
            found, expected = sides["ours"](), sides["medpy"]()
            ours = np.array([found[metric][1:] for metric in ("dice", "HD", "HD95")]).T
            print(f"largest difference from medpy: {np.abs(ours - expected).max():.1e}")
        sides = {name: parts.timed(side, args.device) for name, side in sides.items()}
        seconds = parts.interleave(sides, args.repeats, warm_up=int(args.no_medpy))
        parts.show_ratios(seconds, *([] if args.no_medpy else ["medpy / ours"]), "ours / reading with nibabel")
        parts.show_ms("ours", seconds["ours"])


def busy(args: argparse.Namespace) -> None:
    parts.build(Sauron, args)  # a size that fits no network is refused here, and not in a process of its own
    policies = {
        "OpenMP's own waiting": {},
        "ours": {key: os.environ[key] for key in parts.WAITING if key in os.environ},
    }
    ours = " ".join(f"{key}={value}" for key, value in policies["ours"].items())
    print(f"{args.threads} threads, {n_cores()} cores; ours: {ours}")
    for where, n in (("quiet", 0), ("busy", n_cores())):
        sides = {f"{where}, {name}": partial(parts.in_new_process, policy, args) for name, policy in policies.items()}
        with parts.busy_processes(n):
            seconds = parts.interleave(sides, args.repeats)
        parts.show_ratios(seconds, " / ".join(sides))
        parts.show_ms(f"{where}, ours", seconds[f"{where}, ours"])


POSITIVE = number(int, 1)
FLAGS = {  # those of train.py among them
    "repeats": {"type": POSITIVE, "help": "how often each side is measured"},
    "threads": {"type": POSITIVE, "help": "of torch and ITK"},
    **{f.name: {"help": f.metadata["text"], **f.metadata["argument"]} for f in fields(Settings) if f.metadata["group"]},
    "batches": {"type": POSITIVE, "help": "of an epoch; None: all of it"},
    "volumes": {"type": POSITIVE, "help": "in each repeat"},
    "images": {"type": POSITIVE, "help": "of the test set"},
    "label": {"type": Path, "help": "a label file; None: one of the phantom's"},
    "no_medpy": {"action": "store_true", "help": "it takes minutes, and gigabytes"},
    "matrix": {"type": POSITIVE, "help": "rows and columns of the matrices that sgemm multiplies"},
    "steps": {"type": POSITIVE, "help": "that a process times"},
}
SMALL = {"patch_size": (96, 96), "fms_init": 16, "levels": 5, "batch_size": 6}
LARGE = {"patch_size": (128, 128), "fms_init": 32, "levels": 5, "batch_size": 10}
COMMANDS = {  # their flags with the defaults, beside those of all
    step: {"repeats": 10, **SMALL},
    rate: {"repeats": 10, **SMALL, "matrix": 2048},
    epoch: {"repeats": 3, **LARGE, "batches": None, "num_workers": 1},
    data: {"repeats": 5, "volumes": 10},
    predict: {"repeats": 3, "fms_init": 16, "levels": 5, "images": 1},
    runtimes: {"repeats": 5, "fms_init": 16, "levels": 5, "batch_size": 4, "threads": n_cores()},
    evaluate: {"repeats": 3, "label": None, "no_medpy": False},
    busy: {"repeats": 5, **SMALL, "threads": n_cores(), "steps": 10},
}
OF_ALL = {"threads": 1, "device": "cpu", "data": "phantom", "data_path": None, "cache_path": "data/preprocessed"}
OF_ALL |= {"patch_size": None}


def measure(argv: list[str] | None) -> None:
    parser = Parser(
        "python -m lib.experiments.speed",
        description=ABOUT,
        epilog="`python -m lib.experiments.speed step --help` lists the arguments of step, and so on.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for run, own in COMMANDS.items():
        about = {"help": TEXTS[run.__name__], "description": TEXTS[run.__name__]}
        command = commands.add_parser(run.__name__, **about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        defaults = {**OF_ALL, **own}
        for flag in sorted(defaults, key=list(FLAGS).index):
            command.add_argument(f"--{flag}", default=defaults[flag], **FLAGS[flag])
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    args.patch_size = tuple(args.patch_size or DATASETS[args.data].patch_size)
    torch.set_num_threads(args.threads)
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    """Measure as `argv` says; returns the exit code: 0, or 2 after one line about bad input."""
    return run_script(lambda: measure(argv))


if __name__ == "__main__":
    sys.exit(main())

"""How fast the parts are, as ratios of two things measured in turn: `python -m lib.experiments.speed step`.

Every line gives the median and the range over the repeats. CPU seconds are counted where there is one thread, the wall
clock's elsewhere, and by busy. `COMMANDS` says what there is to measure.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from lib.checkpoint import TrainingState, save_model
from lib.data import DATASETS
from lib.data.loading import Loader, _n_cores
from lib.data.nifti import read, voxels_by_nibabel, write
from lib.data.preprocessing import preprocess, read_channels
from lib.evaluation import Rules, evaluate_pair
from lib.experiments import baselines
from lib.inference import default_batch_size, predict_volume
from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.models.size import summary
from lib.pruning.surgery import prune
from lib.settings import Settings
from lib.system.cli import Parser, number, one_of, run_script
from lib.system.device import find_device
from lib.system.process import keep_freed_memory
from lib.trainer import compute_loss, train_epoch

ROOT = Path(__file__).resolve().parents[2]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how threads of OpenMP wait
SHARE = 0.1  # of the FLOPs that a pruned network keeps


def interleave(sides: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 0) -> dict[str, list]:
    """{name: [what the side gave in each repeat]}: the sides take turns, and the first rounds do not count."""
    given = {name: [] for name in sides}
    for _ in range(warm_up + repeats):
        for name, side in sides.items():
            given[name].append(side())
    return {name: values[warm_up:] for name, values in given.items()}


def timed(side: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """`side` as a function that gives the seconds it took: CPU seconds of this process and its finished children where
    there is one thread, the wall clock's elsewhere."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if device.type == "cpu" and torch.get_num_threads() == 1:
            children = resource.getrusage(resource.RUSAGE_CHILDREN)
            return time.process_time() + children.ru_utime + children.ru_stime
        return time.perf_counter()

    def run() -> float:
        start = clock()
        side()
        return clock() - start

    return run


def show(what: str, values: list[float], unit: str = "") -> None:
    print(f"{what:<58}{median(values):>9.3f}{unit}  ({min(values):.3f} - {max(values):.3f})", flush=True)


def show_ratios(seconds: dict[str, list[float]], *ratios: str) -> None:
    """A line for each "one side / another"."""
    for ratio in ratios:
        show(ratio, [a / b for a, b in zip(*map(seconds.__getitem__, ratio.split(" / ")), strict=True)])


def show_ms(what: str, seconds: list[float]) -> None:
    show(what, [1000 * s for s in seconds], " ms")


def build(kind: type[nnUNet], args: argparse.Namespace) -> nnUNet:
    """A network of the flags' size, with the same random weights whatever its kind. Raises InputError where a training
    would."""
    settings = Settings.of({key: getattr(args, key) for key in ("data", "fms_init", "levels", "patch_size")})
    torch.manual_seed(0)
    model = kind(settings.modalities, settings.n_classes, settings.fms_init, settings.levels, dim=settings.dim)
    model.initialize(device=args.device)
    return model


def cut_down(model: nnUNet, args: argparse.Namespace) -> nnUNet:
    """A copy with the same share of every block's filters, the largest that keeps at most `SHARE` of the FLOPs."""
    whole, left, percent, small = summary(model, args.patch_size)["flops"], 1.0, 100, model
    while left > SHARE and percent > 1:
        percent, small = percent - 1, copy.deepcopy(model)
        blocks = [block for block in small.blocks() if not block.head]
        prune(small, None, {b.name: torch.arange(max(1, b.out_filters * percent // 100)) for b in blocks})
        left = summary(small, args.patch_size)["flops"] / whole
    print(f"small network: {percent}% of the filters, {100 * left:.1f}% of the FLOPs")
    return small


def load(args: argparse.Namespace, **settings) -> Loader:
    return Loader(DATASETS[args.data], args.data_path, args.cache_path, patch_size=args.patch_size, **settings)


def made_up_batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    dataset = DATASETS[args.data]
    torch.manual_seed(1)
    images = torch.randn(args.batch_size, dataset.modalities, *args.patch_size, device=args.device)
    return images, torch.randint(dataset.n_classes, (args.batch_size, *args.patch_size), device=args.device)


def training_step(model: nnUNet, criterion: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)

    def run() -> None:
        loss, _ = compute_loss(model, criterion, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def step(args: argparse.Namespace) -> None:
    """A training step of Sauron, and of Sauron as its formulas are written, over that of nnUNet."""
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    batch, distances = made_up_batch(args), DS_CrossEntropyDiceLoss_Distance()
    losses, gradients = [], []  # of the convolutions' weights: those of most biases are 0 but for rounding
    for kind in (Sauron, baselines.LiteralSauron):
        model = build(kind, args)
        loss, _ = compute_loss(model, distances, *batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad for p in model.parameters() if p.ndim > 1])
    largest = max(float((a - b).norm() / b.norm()) for a, b in zip(*gradients, strict=True))
    print(f"loss: ours {losses[0]:.7f}, literal {losses[1]:.7f}; ", end="")
    print(f"largest relative difference of a gradient: {largest:.1e}")

    sides = {
        "nnUNet": training_step(build(nnUNet, args), DS_CrossEntropyDiceLoss(), *batch),
        "Sauron": training_step(build(Sauron, args), distances, *batch),
        "literal Sauron": training_step(build(baselines.LiteralSauron, args), distances, *batch),
        "convolutions alone": baselines.convolutions_alone(build(nnUNet, args), batch[0]),
    }
    seconds = interleave({name: timed(side, args.device) for name, side in sides.items()}, args.repeats, warm_up=1)
    show_ratios(seconds, "Sauron / nnUNet", "literal Sauron / nnUNet")
    show_ratios(seconds, "convolutions alone / nnUNet", "convolutions alone / Sauron")
    show_ms("Sauron", seconds["Sauron"])


class Watched:
    """The first `n` batches of each epoch of a `Loader`; `waits` are the seconds until each of them came."""

    def __init__(self, data: Loader, n: int):
        self.data, self.n, self.waits = data, n, []

    def n_train_batches(self) -> int:
        return self.n

    def train_batches(self, epoch: int) -> Iterator[dict]:
        batches = self.data.train_batches(epoch)
        for _ in range(self.n):
            start = time.perf_counter()
            batch = next(batches)
            self.waits.append(time.perf_counter() - start)
            yield batch


def epoch(args: argparse.Namespace) -> None:
    """An epoch with a tenth of the FLOPs over one with all of them, and the share of it spent waiting for data."""
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    data = load(args, batch_size=args.batch_size, num_workers=args.num_workers)
    n = min(args.batches or sys.maxsize, data.n_train_batches())
    large = build(Sauron, args)
    networks = {"whole network": large, "small network": cut_down(large, args)}
    criterion, numbers = DS_CrossEntropyDiceLoss_Distance(), itertools.count(1)

    def train(model: nnUNet) -> tuple[float, list[float]]:
        """The seconds of an epoch, and those of its waits."""
        state = TrainingState(model, torch.optim.Adam(model.parameters(), lr=1e-4), Path(), print)
        watched, start = Watched(data, n), time.perf_counter()
        train_epoch(state, criterion, watched, next(numbers), 0, True, args.device)
        return time.perf_counter() - start, watched.waits

    taken = interleave({name: partial(train, model) for name, model in networks.items()}, args.repeats)
    print(f"{n} batches of {args.batch_size}, {args.num_workers} worker processes (wall clock)")
    seconds = {name: [whole for whole, _ in times] for name, times in taken.items()}
    show_ratios(seconds, "small network / whole network")
    for name, times in taken.items():
        show(f"waiting for data, {name}", [100 * sum(waits) / whole for whole, waits in times], "%")
        rest = [100 * sum(waits[1:]) / (whole - waits[0]) for whole, waits in times]
        show(f"waiting for data, {name}, after the first batch", rest, "%")


def data(args: argparse.Namespace) -> None:
    """Augmented patches from torchio's own chain over ours."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    loader = load(args)
    loader.prepare(["train"])
    n, n_patches, difference = min(args.volumes, len(loader.ids["train"])), 0, 0.0
    seconds: dict[str, list[float]] = {"torchio's chain": [], "ours": []}
    for repeat in range(args.repeats):  # every repeat draws anew, the same for both sides
        volumes, images = {name: loader.augmented(repeat) for name in seconds}, {name: [] for name in seconds}
        volumes["torchio's chain"].augmentation = baselines.torchio_chain(loader.dataset.dim)

        def augment(name: str, items: Iterator[dict], images: dict = images) -> None:
            images[name].append(next(items)["image"])

        sides = {name: partial(augment, name, map(side.__getitem__, range(n))) for name, side in volumes.items()}
        for name, times in interleave({name: timed(side, args.device) for name, side in sides.items()}, n).items():
            seconds[name].append(sum(times))
        difference = max(difference, *(np.abs(a - b).max() for a, b in zip(*images.values(), strict=True)))
        n_patches += sum(map(len, images["ours"]))
    print(f"{n_patches} patches of {loader.patch_size}; largest difference of a voxel: {difference:.1e}")
    show_ratios(seconds, "torchio's chain / ours")
    show("ours, patches per second", [n_patches / args.repeats / s for s in seconds["ours"]])


PREDICTIONS = {  # the network of each way to predict
    "ours": nnUNet,
    "one patch at a time": nnUNet,
    "one patch at a time, literal Sauron": baselines.LiteralSauron,
}


def timed_prediction(side: str, args: argparse.Namespace, volumes: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds, and the labels of all voxels of preprocessed volumes (1, X, Y, Z); for a process of its own."""
    torch.set_num_threads(args.threads)
    ours, model, labels = side == "ours", build(PREDICTIONS[side], args), []
    if ours and args.device.type == "cpu":
        keep_freed_memory()
    model = (model if ours else baselines.with_torchs_norm(model)).eval()
    batch_size = default_batch_size(model.dim, args.device) if ours else 1

    def predict_all() -> None:
        for volume in map(torch.from_numpy, volumes):
            labels.append(predict_volume(model, volume, args.patch_size, True, batch_size).argmax(0).flatten())

    return timed(predict_all, args.device)(), torch.cat(labels).byte().numpy()


def predict(args: argparse.Namespace) -> None:
    """predict.py with a tenth of the FLOPs over all of them; our way to predict over a loop of one patch at a time."""
    large = build(nnUNet, args).eval()
    small, loader = cut_down(large, args), load(args)
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
            argv = [sys.executable, ROOT / "predict.py", *argv, "--patch_size", *map(str, args.patch_size)]
            command = partial(subprocess.run, argv, check=True, capture_output=True)
            sides[f"predict.py, {name} network"] = timed(command, args.device)
        show_ratios(interleave(sides, args.repeats), " / ".join(sides))
        paths = sorted(path.resolve() for path in images.iterdir())
    recipe = loader.dataset.preprocessing
    volumes = [preprocess(read_channels(path, recipe)[0], recipe)[0].numpy() for path in paths]
    with ExitStack() as stack:  # how memory is allocated belongs to the process
        spawn, sides = multiprocessing.get_context("spawn"), {}
        for side in PREDICTIONS:
            pool = stack.enter_context(ProcessPoolExecutor(1, spawn))
            sides[side] = lambda pool=pool, side=side: pool.submit(timed_prediction, side, args, volumes).result()
        given = interleave(sides, args.repeats)
    labels = [times[-1][1] for times in given.values()]
    print(f"voxels whose label differs: {max(int((labels[0] != o).sum()) for o in labels)} of {len(labels[0])}")
    seconds = {side: [taken for taken, _ in times] for side, times in given.items()}
    show_ratios(seconds, *(f"ours / {other}" for other in PREDICTIONS if other != "ours"))


def peak_mib(prediction: Path, truth: Path, n_classes: int) -> float:
    """The most memory that our evaluation of a pair takes, in a process of its own."""
    code = (
        "import sys; from lib.evaluation import Rules, evaluate_pair;"
        "evaluate_pair(sys.argv[1], sys.argv[2], Rules(int(sys.argv[3])));"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )  # getrusage would tell the peak of this process too
    argv = [sys.executable, "-c", code, prediction, truth, str(n_classes)]
    return int(subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024


def evaluate(args: argparse.Namespace) -> None:
    """Metrics by medpy on the whole volumes over ours, and ours over reading the files; peak memory."""
    truth = args.label or Loader(DATASETS["phantom"], args.data_path, args.cache_path).files("test")[0].label
    with tempfile.TemporaryDirectory() as folder:
        prediction, original = Path(folder, "prediction.nii.gz"), read(truth)
        labels, pair = original.array, (prediction, truth)
        n_classes, volume = int(labels.max()) + 1, labels.nbytes / 2**20
        write(prediction, np.roll(labels, (1, 1, 1), (0, 1, 2)), original.header)
        peak = peak_mib(*pair, n_classes)
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
        sides = {name: timed(side, args.device) for name, side in sides.items()}
        seconds = interleave(sides, args.repeats, warm_up=int(args.no_medpy))
        show_ratios(seconds, *([] if args.no_medpy else ["medpy / ours"]), "ours / reading with nibabel")
        show_ms("ours", seconds["ours"])


def timed_steps(args: argparse.Namespace) -> float:
    """Seconds of a training step of Sauron, by the wall clock: the median of `args.steps`, after two more."""
    torch.set_num_threads(args.threads)
    run, moments = training_step(build(Sauron, args), DS_CrossEntropyDiceLoss_Distance(), *made_up_batch(args)), []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        run()
        moments.append(time.perf_counter() - start)
    return median(moments[2:])


def in_new_process(waiting: dict[str, str], args: argparse.Namespace) -> float:
    """`timed_steps` of a process in which OpenMP finds these variables of `WAITING` as it is loaded."""
    environment = {key: value for key, value in os.environ.items() if key not in WAITING} | waiting
    code = (
        "import argparse, json, sys, torch; from lib.experiments import speed;"  # torch first: `lib` sets the policy
        "print(speed.timed_steps(argparse.Namespace(**json.loads(sys.argv[1]))))"
    )
    argv = [sys.executable, "-c", code, json.dumps(vars(args), default=str)]
    return float(subprocess.run(argv, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout)


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Within it `n` processes do nothing, as fast as they can; they end with this one, however it ends."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy(args: argparse.Namespace) -> None:
    """A training step whose threads wait for one another as OpenMP lets them by default over one whose threads wait as
    ours do (see lib/__init__.py), on the quiet machine, and beside as many busy processes as there are cores.
    """
    policies = {"OpenMP's own waiting": {}, "ours": {key: os.environ[key] for key in WAITING if key in os.environ}}
    ours = " ".join(f"{key}={value}" for key, value in policies["ours"].items())
    print(f"{args.threads} threads, {_n_cores()} cores; ours: {ours}")
    for where, n in (("quiet", 0), ("busy", _n_cores())):
        sides = {f"{where}, {name}": partial(in_new_process, policy, args) for name, policy in policies.items()}
        with busy_processes(n):
            seconds = interleave(sides, args.repeats)
        show_ratios(seconds, " / ".join(sides))
        show_ms(f"{where}, ours", seconds[f"{where}, ours"])


POSITIVE = number(int, 1)
FLAGS = {
    "repeats": {"type": POSITIVE, "help": "how often each side is measured"},
    "threads": {"type": POSITIVE, "help": "of torch and ITK"},
    "device": {"help": "auto, cpu, cuda, cuda:N or mps"},
    "data": {**one_of(DATASETS), "help": "the data set"},
    "data_path": {"help": "its folder"},
    "cache_path": {"help": "folder for preprocessed volumes"},
    "patch_size": {"type": POSITIVE, "nargs": "+", "help": "voxels; None: the data set's"},
    "fms_init": {"type": POSITIVE, "help": "filters of the first level"},
    "levels": {"type": number(int, 3), "help": "of the network"},
    "batch_size": {"type": POSITIVE, "help": "patches per step"},
    "batches": {"type": POSITIVE, "help": "of an epoch; None: all of it"},
    "num_workers": {"type": number(int, 0), "help": "processes"},
    "volumes": {"type": POSITIVE, "help": "in each repeat"},
    "images": {"type": POSITIVE, "help": "of the test set"},
    "label": {"type": Path, "help": "a label file; None: one of the phantom's"},
    "no_medpy": {"action": "store_true", "help": "it takes minutes, and gigabytes"},
    "steps": {"type": POSITIVE, "help": "that a process times"},
}
SMALL = {"patch_size": (96, 96), "fms_init": 16, "levels": 5, "batch_size": 6}
LARGE = {"patch_size": (128, 128), "fms_init": 32, "levels": 5, "batch_size": 10}
COMMANDS = {  # their flags with the defaults, beside those of all
    step: {"repeats": 10, **SMALL},
    epoch: {"repeats": 3, **LARGE, "batches": None, "num_workers": 1},
    data: {"repeats": 5, "volumes": 10},
    predict: {"repeats": 3, "fms_init": 16, "levels": 5, "images": 1},
    evaluate: {"repeats": 3, "label": None, "no_medpy": False},
    busy: {"repeats": 5, **SMALL, "threads": _n_cores(), "steps": 10},
}
OF_ALL = {"threads": 1, "device": "cpu", "data": "phantom", "data_path": None, "cache_path": "data/preprocessed"}


def measure(argv: list[str] | None) -> None:
    parser = Parser(
        "python -m lib.experiments.speed",
        description="How fast the parts are, as ratios of two things that are measured in turn. Every line gives the "
        "median and the range over the repeats. CPU seconds are counted where there is one thread, the wall clock's "
        "elsewhere, and by busy.",
        epilog="`python -m lib.experiments.speed step --help` lists the arguments of step, and so on.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for run, own in COMMANDS.items():
        about = {"help": run.__doc__, "description": run.__doc__}
        command = commands.add_parser(run.__name__, **about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        defaults = {**OF_ALL, "patch_size": None, **own}
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

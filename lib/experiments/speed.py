"""How fast the parts are, as ratios of two things measured in turn: `python -m lib.experiments.speed step`.

`COMMANDS` says what there is to measure.
"""

import argparse
import copy
import itertools
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
from pathlib import Path
from statistics import median

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
import torchio as tio
from medpy.metric import binary
from torch import Tensor, nn

from lib.checkpoint import TrainingState, save_model
from lib.data import DATASETS
from lib.data.augmentation import augmentation
from lib.data.loading import Loader, _n_cores
from lib.data.nifti import read, read_geometry, voxels_by_nibabel, write
from lib.data.preprocessing import preprocess, read_channels
from lib.evaluation import Rules, evaluate_pair
from lib.inference import default_batch_size, predict_volume
from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models.nnUNet import ConvBlock, nnUNet
from lib.models.Sauron import Measured, Sauron
from lib.models.size import summary
from lib.pruning.surgery import prune
from lib.system.cli import Parser, number, run_script
from lib.system.device import find_device
from lib.system.process import keep_freed_memory
from lib.trainer import compute_loss, train_epoch

ABOUT = """\
How fast the parts are, as ratios of two things that are measured in turn. Every line gives the median and the range
over the repeats. CPU seconds are counted where there is one thread, the wall clock's elsewhere, and by busy.
"""
COMMANDS = {
    "step": "a training step of Sauron, and of Sauron as its formulas are written, over that of nnUNet",
    "epoch": "an epoch with a tenth of the FLOPs over one with all of them, and the share of it spent waiting for data",
    "data": "augmented patches from torchio's own chain over ours",
    "predict": "predict.py with a tenth of the FLOPs over all of them; our way to predict over a loop of one patch at "
    "a time",
    "evaluate": "metrics by medpy on the whole volumes over ours, and ours over reading the files; peak memory",
    "busy": "a training step whose threads wait for one another as OpenMP lets them by default over one whose threads "
    "wait as ours do (see lib/__init__.py), on the quiet machine, and beside as many busy "
    "processes as there are cores",
}
ROOT = Path(__file__).resolve().parents[2]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how threads of OpenMP wait
SHARE = 0.1  # of the FLOPs that a pruned network keeps


# --- the formulas as they are written ---------------------------------------------------------------------------------


def with_torchs_norm(model: nnUNet) -> nnUNet:
    """`model` with torch's own instance norm, as the published network has it."""
    norm = nn.InstanceNorm2d if model.dim == "2D" else nn.InstanceNorm3d
    for module in model.modules():
        if isinstance(module, ConvBlock):
            module.seq[1] = norm(module.seq[0].out_channels)
    return model


class LiteralSauron(Sauron):
    """Sauron with min-max and differences of full-size maps, and delta_prune in every forward pass."""

    def forward(self, x: Tensor, delta_opt: bool = True, delta_prune: bool = True) -> Measured:
        measured = Measured([], {}, {})
        for name, h in self.feature_maps(x):
            if name.startswith("dec_Sequential"):
                measured.outputs.insert(0, h)
            else:
                measured.delta_opt[name] = literal_delta_opt(h)
                measured.delta_prune[name] = literal_delta_prune(h)
        return measured


def literal_delta_opt(h: Tensor) -> Tensor:
    spatial = tuple(range(2, h.ndim))
    low, high = h.amin(spatial, keepdim=True), h.amax(spatial, keepdim=True)
    pooled = _pool((h - low) / (high - low))
    return (pooled[:, :1] - pooled[:, 1:]).square().mean(spatial).sqrt()


def literal_delta_prune(h: Tensor) -> tuple[Tensor, int]:
    r, pooled = int(torch.randint(h.shape[1], (1,))), _pool(h)
    distance = (pooled[:, r : r + 1] - pooled).square().mean(tuple(range(2, h.ndim))).sqrt()
    return (distance / distance.amax(1, keepdim=True)).mean(0), r


def _pool(h: Tensor) -> Tensor:
    return (F.avg_pool2d if h.ndim == 4 else F.avg_pool3d)(h, 2)


def torchio_chain(dim: str) -> tio.Compose:
    """The augmentation with torchio's own elastic deformation."""
    chain = augmentation(dim)
    elastic = tio.RandomElasticDeformation(7, max_displacement=7.5, locked_borders=2, p=0.3, copy=False)
    chain.transforms = [elastic if t.name == elastic.name else t for t in chain.transforms]
    return chain


class OutputsOnly(LiteralSauron):
    """LiteralSauron as it is called to predict: what it measures is thrown away."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x).outputs


PREDICTIONS = {  # the network of each way to predict
    "ours": nnUNet,
    "one patch at a time": nnUNet,
    "one patch at a time, literal Sauron": OutputsOnly,
}


def timed_prediction(side: str, args: argparse.Namespace, volumes: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """Seconds, and the labels of all voxels of preprocessed volumes (1, X, Y, Z); for a process of its own."""
    torch.set_num_threads(args.threads)
    ours = side == "ours"
    if ours and args.device.type == "cpu":
        keep_freed_memory()
    model = build(PREDICTIONS[side], args)
    model = model.eval() if ours else with_torchs_norm(model).eval()
    batch_size = default_batch_size(model.dim, args.device) if ours else 1
    start = clock(args.device)
    labels = [predict_volume(model, torch.from_numpy(v), args.patch_size, True, batch_size).argmax(0) for v in volumes]
    return clock(args.device) - start, torch.cat([volume.flatten() for volume in labels]).byte().numpy()


def medpy_metrics(prediction: Path, truth: Path) -> list[list[float]]:
    """[[Dice, HD, HD95] of each foreground class], on full volumes of floats."""
    p, t = (voxels_by_nibabel(path).astype(float) for path in (prediction, truth))
    spacing_mm = read_geometry(truth).spacing_mm
    results = []
    for label in range(1, int(t.max()) + 1):
        masks = p == label, t == label
        results.append([binary.dc(*masks), binary.hd(*masks, spacing_mm), binary.hd95(*masks, spacing_mm)])
    return results


# --- measuring --------------------------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """CPU seconds of this process and its finished children, or the wall clock's: see above."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "cpu" and torch.get_num_threads() == 1:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime
    return time.perf_counter()


def interleave(sides: dict[str, Callable[[], object]], args: argparse.Namespace, warm_up: bool = True) -> dict:
    """{name: [seconds of each repeat]}, the sides in turn."""
    seconds = {name: [] for name in sides}
    for repeat in range(-warm_up, args.repeats):
        for name, side in sides.items():
            start = clock(args.device)
            side()
            if repeat >= 0:
                seconds[name].append(clock(args.device) - start)
    return seconds


def show(what: str, values: list[float], unit: str = "") -> None:
    print(f"{what:<58}{median(values):>9.3f}{unit}  ({min(values):.3f} - {max(values):.3f})", flush=True)


def show_ratio(a: str, b: str, seconds: dict[str, list[float]]) -> None:
    show(f"{a} / {b}", [x / y for x, y in zip(seconds[a], seconds[b], strict=True)])


def build(kind: type[nnUNet], args: argparse.Namespace) -> nnUNet:
    """A network of the flags' size with the same random weights whatever its kind."""
    dataset = DATASETS[args.data]
    torch.manual_seed(0)
    model = kind(dataset.modalities, dataset.n_classes, args.fms_init, args.levels, dim=dataset.dim)
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


def dataset_of(args: argparse.Namespace, **settings) -> Loader:
    return Loader(DATASETS[args.data], args.data_path, args.cache_path, patch_size=args.patch_size, **settings)


# --- the figures ------------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    images, labels = _made_up_batch(args)
    distances = DS_CrossEntropyDiceLoss_Distance()
    found, literal = (_gradients(build(kind, args), distances, images, labels) for kind in (Sauron, LiteralSauron))
    print(f"loss: ours {found[0]:.7f}, literal {literal[0]:.7f}; largest relative difference of a gradient: ", end="")
    print(f"{max(float((a - b).norm() / b.norm()) for a, b in zip(found[1], literal[1], strict=True)):.1e}")

    sides = {
        "nnUNet": _trainer(build(nnUNet, args), DS_CrossEntropyDiceLoss(), images, labels),
        "Sauron": _trainer(build(Sauron, args), distances, images, labels),
        "literal Sauron": _trainer(build(LiteralSauron, args), distances, images, labels),
        "convolutions alone": convolutions_alone(build(nnUNet, args), images),
    }
    seconds = interleave(sides, args)
    show_ratio("Sauron", "nnUNet", seconds)
    show_ratio("literal Sauron", "nnUNet", seconds)
    show_ratio("convolutions alone", "nnUNet", seconds)
    show_ratio("convolutions alone", "Sauron", seconds)
    show("Sauron", [1000 * s for s in seconds["Sauron"]], " ms")


def _made_up_batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(args.batch_size, 1, *args.patch_size, device=args.device)
    labels = torch.randint(DATASETS[args.data].n_classes, (args.batch_size, *args.patch_size), device=args.device)
    return images, labels


def _trainer(model: nnUNet, criterion: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """A training step on this batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=1e-5)

    def train_step() -> None:
        loss, _ = compute_loss(model, criterion, images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return train_step


def _gradients(model: nnUNet, criterion: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, list[Tensor]]:
    """The loss, and the gradients of the convolutions' weights (those of most biases are 0 but for rounding)."""
    loss, _ = compute_loss(model, criterion, images, labels)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.ndim > 1]


def convolutions_alone(model: nnUNet, images: Tensor) -> Callable[[], None]:
    """Forward and backward pass of the network's convolutions and nothing else."""
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            del module[1:]

    def run() -> None:
        outputs = model(images)
        torch.autograd.backward(outputs, outputs)

    return run


class Watched:
    """The first batches of an epoch of a data set, and the seconds that were spent waiting for them."""

    def __init__(self, data: Loader, n_batches: int | None):
        self.data, self.n = data, min(n_batches or sys.maxsize, data.n_train_batches())
        self.waited = self.waited_first = 0.0

    def n_train_batches(self) -> int:
        return self.n

    def train_batches(self, epoch: int) -> Iterator[dict]:
        batches = self.data.train_batches(epoch)
        for i in range(self.n):
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - start
            self.waited += waited
            self.waited_first = waited if i == 0 else self.waited_first
            yield batch


def epoch(args: argparse.Namespace) -> None:
    if args.device.type == "cpu":
        keep_freed_memory()  # as train.py
    data = Watched(dataset_of(args, batch_size=args.batch_size, num_workers=args.num_workers), args.batches)
    large = build(Sauron, args)
    networks = {"whole network": large, "small network": cut_down(large, args)}
    criterion, numbers = DS_CrossEntropyDiceLoss_Distance(), itertools.count(1)
    seconds = {name: [] for name in networks}
    waiting, after_first = ({name: [] for name in networks} for _ in range(2))
    for _ in range(args.repeats):
        for name, model in networks.items():
            state = TrainingState(model, torch.optim.Adam(model.parameters(), lr=1e-4), Path(), print)
            data.waited, start = 0.0, time.perf_counter()
            train_epoch(state, criterion, data, next(numbers), 0, True, args.device)
            seconds[name].append(time.perf_counter() - start)
            waiting[name].append(100 * data.waited / seconds[name][-1])
            rest = seconds[name][-1] - data.waited_first
            after_first[name].append(100 * (data.waited - data.waited_first) / rest)
    print(f"{data.n} batches of {args.batch_size}, {args.num_workers} worker processes (wall clock)")
    show_ratio("small network", "whole network", seconds)
    for name in networks:
        show(f"waiting for data, {name}", waiting[name], "%")
        show(f"waiting for data, {name}, after the first batch", after_first[name], "%")


def data(args: argparse.Namespace) -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(args.threads)
    dataset = dataset_of(args)
    dataset.prepare(["train"])
    n, n_patches, difference = min(args.volumes, len(dataset.ids["train"])), 0, 0.0
    seconds = {"torchio's chain": [], "ours": []}
    for repeat in range(args.repeats):  # every repeat draws anew, the same for both sides
        ours, theirs = (dataset.augmented(repeat) for _ in range(2))
        theirs.augmentation = torchio_chain(dataset.dataset.dim)
        times = dict.fromkeys(seconds, 0.0)
        for i in range(n):
            images = []
            for name, volumes in zip(seconds, (theirs, ours), strict=True):
                start = clock(args.device)
                images.append(volumes[i]["image"])
                times[name] += clock(args.device) - start
            difference = max(difference, np.abs(images[0] - images[1]).max())
            n_patches += len(images[0])
        for name, total in times.items():
            seconds[name].append(total)
    print(f"{n_patches} patches of {dataset.patch_size}; largest difference of a voxel: {difference:.1e}")
    show_ratio("torchio's chain", "ours", seconds)
    show("ours, patches per second", [n_patches / args.repeats / s for s in seconds["ours"]])


def predict(args: argparse.Namespace) -> None:
    large = build(nnUNet, args).eval()
    small = cut_down(large, args)
    dataset = dataset_of(args)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for file in dataset.files("test")[: args.images]:
            (images / file.image.name).symlink_to(file.image.resolve())

        def command(model: nnUNet, name: str) -> Callable[[], object]:
            save_model(Path(folder, name), model)
            argv = ["--data", args.data, "--input", images, "--output", Path(folder, f"out-{name}"), "--overwrite"]
            argv += ["--model_state", Path(folder, name), "--device", str(args.device)]
            argv += ["--patch_size", *map(str, args.patch_size)]
            return lambda: subprocess.run([sys.executable, ROOT / "predict.py", *argv], check=True, capture_output=True)

        sides = {
            "predict.py, small network": command(small, "small"),
            "predict.py, whole network": command(large, "whole"),
        }
        show_ratio(*sides, interleave(sides, args, warm_up=False))
        paths = sorted(path.resolve() for path in images.iterdir())
    recipe = dataset.dataset.preprocessing
    volumes = [preprocess(read_channels(path, recipe)[0], recipe)[0].numpy() for path in paths]
    seconds, labels = {side: [] for side in PREDICTIONS}, {}
    with ExitStack() as stack:  # how memory is allocated belongs to the process
        spawn = multiprocessing.get_context("spawn")
        processes = {side: stack.enter_context(ProcessPoolExecutor(1, spawn)) for side in PREDICTIONS}
        for _ in range(args.repeats):
            for side, process in processes.items():
                taken, labels[side] = process.submit(timed_prediction, side, args, volumes).result()
                seconds[side].append(taken)
    differs = max(int((labels["ours"] != other).sum()) for other in labels.values())
    print(f"voxels whose label differs: {differs} of {len(labels['ours'])}")
    show_ratio("ours", "one patch at a time", seconds)
    show_ratio("ours", "one patch at a time, literal Sauron", seconds)


def evaluate(args: argparse.Namespace) -> None:
    truth = args.label or Loader(DATASETS["phantom"], args.data_path, args.cache_path).files("test")[0].label
    with tempfile.TemporaryDirectory() as folder:
        prediction, original = Path(folder, "prediction.nii.gz"), read(truth)
        labels = original.array
        n_classes = int(labels.max()) + 1
        write(prediction, np.roll(labels, (1, 1, 1), (0, 1, 2)), original.header)
        pair = (prediction, truth)
        code = (
            "import sys; from lib.evaluation import Rules, evaluate_pair;"
            "evaluate_pair(sys.argv[1], sys.argv[2], Rules(int(sys.argv[3])));"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )  # getrusage would tell the peak of this process too
        argv = [sys.executable, "-c", code, *map(str, pair), str(n_classes)]
        peak = int(subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024
        volume = labels.nbytes / 2**20
        print(f"{labels.shape} voxels of {labels.dtype}")
        print(
            f"peak memory: {peak:.0f} MiB, which is {peak - 3 * volume:.0f} MiB + 3 label volumes of {volume:.0f} MiB"
        )
        del labels, original
        sides = {
            "medpy": lambda: medpy_metrics(*pair),
            "ours": lambda: evaluate_pair(*pair, Rules(n_classes)),
            "reading with nibabel": lambda: [voxels_by_nibabel(path) for path in pair],
        }
        if args.no_medpy:
            del sides["medpy"]
        else:
            found, expected = sides["ours"](), sides["medpy"]()
            ours = np.array([found[metric][1:] for metric in ("dice", "HD", "HD95")]).T
            print(f"largest difference from medpy: {np.abs(ours - expected).max():.1e}")
        seconds = interleave(sides, args, warm_up=args.no_medpy)
        if not args.no_medpy:
            show_ratio("medpy", "ours", seconds)
        show_ratio("ours", "reading with nibabel", seconds)
        show("ours", [1000 * s for s in seconds["ours"]], " ms")


def timed_steps(args: argparse.Namespace) -> float:
    """Seconds of a training step of Sauron, by the wall clock: the median of `args.steps`, after two more."""
    images, labels = _made_up_batch(args)
    step, seconds = _trainer(build(Sauron, args), DS_CrossEntropyDiceLoss_Distance(), images, labels), []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def in_new_process(waiting: dict[str, str], args: argparse.Namespace) -> float:
    """`timed_steps` of a process in which OpenMP finds these variables of `WAITING` as it is loaded."""
    environment = {key: value for key, value in os.environ.items() if key not in WAITING} | waiting
    code = (
        "import sys, torch; from lib.experiments import speed;"  # torch first: `lib` would set the policy
        "speed.main([*sys.argv[1:], '--child'])"
    )
    argv = [sys.executable, "-c", code, "busy", "--device", str(args.device), "--data", args.data]
    for key in ("threads", "fms_init", "levels", "batch_size", "steps", "patch_size"):
        value = getattr(args, key)
        argv += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
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
    if args.child:
        print(timed_steps(args))
        return
    policies = {"OpenMP's own waiting": {}, "ours": {key: os.environ[key] for key in WAITING if key in os.environ}}
    ours = " ".join(f"{key}={value}" for key, value in policies["ours"].items())
    print(f"{args.threads} threads, {_n_cores()} cores; ours: {ours}")
    for where, n in (("quiet", 0), ("busy", _n_cores())):
        seconds = {f"{where}, {name}": [] for name in policies}
        with busy_processes(n):
            for _ in range(args.repeats):
                for name, policy in policies.items():
                    seconds[f"{where}, {name}"].append(in_new_process(policy, args))
        own, ours = seconds
        show_ratio(own, ours, seconds)
        show(ours, [1000 * s for s in seconds[ours]], " ms")


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Measure as `argv` says; returns the exit code: 0, or 2 after one line about bad input."""
    positive = number(int, 1)
    parser = Parser(
        "python -m lib.experiments.speed",
        description=ABOUT,
        epilog="`python -m lib.experiments.speed step --help` lists the arguments of step, and so on.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    defaults = {  # filters of the first level, levels, patch, batch, repeats
        "step": (step, 16, 5, (96, 96), 6, 10),
        "epoch": (epoch, 32, 5, (128, 128), 10, 3),
        "data": (data, None, None, None, None, 5),
        "predict": (predict, 16, 5, None, None, 3),
        "evaluate": (evaluate, None, None, None, None, 3),
        "busy": (busy, 16, 5, (96, 96), 6, 5),
    }
    for name, (function, fms_init, levels, patch_size, batch_size, repeats) in defaults.items():
        about = {"help": COMMANDS[name], "description": COMMANDS[name]}
        command = commands.add_parser(name, **about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = command.add_argument
        command.set_defaults(run=function)
        add("--repeats", type=positive, default=repeats, help="how often each side is measured")
        threads = _n_cores() if name == "busy" else 1
        add("--threads", type=positive, default=threads, help="of torch and ITK")
        add("--device", default="cpu", help="auto, cpu, cuda, cuda:N or mps")
        add("--data", default="phantom", choices=sorted(DATASETS), help="the data set")
        add("--data_path", help="its folder")
        add("--cache_path", default="data/preprocessed", help="folder for preprocessed volumes")
        add("--patch_size", type=positive, nargs="+", default=patch_size, help="voxels; None: the data set's")
        if fms_init:
            add("--fms_init", type=positive, default=fms_init, help="filters of the first level")
            add("--levels", type=number(int, 3), default=levels, help="of the network")
        if batch_size:
            add("--batch_size", type=positive, default=batch_size, help="patches per step")
    commands.choices["epoch"].add_argument("--batches", type=positive, help="of an epoch; None: all of it")
    commands.choices["epoch"].add_argument("--num_workers", type=number(int, 0), default=1, help="processes")
    commands.choices["data"].add_argument("--volumes", type=positive, default=10, help="in each repeat")
    commands.choices["predict"].add_argument("--images", type=positive, default=1, help="of the test set")
    commands.choices["evaluate"].add_argument("--label", type=Path, help="a label file; None: one of the phantom's")
    commands.choices["evaluate"].add_argument("--no_medpy", action="store_true", help="it takes minutes, and gigabytes")
    commands.choices["busy"].add_argument("--steps", type=positive, default=10, help="that a process times")
    commands.choices["busy"].add_argument("--child", action="store_true", help=argparse.SUPPRESS)

    def run() -> None:
        args = parser.parse_args(argv)
        args.device = find_device(args.device)
        args.patch_size = tuple(args.patch_size or DATASETS[args.data].patch_size)
        torch.set_num_threads(args.threads)
        args.run(args)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())

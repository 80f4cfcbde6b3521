"""What `speed` measures with: turns and clocks, networks and steps of the flags' sizes, and processes of their own."""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import conv_flop_count

from lib.checkpoint import save_model
from lib.data import DATASETS
from lib.data.loading import Loader
from lib.experiments import baselines
from lib.export import describe, to_onnx
from lib.inference import Predictor
from lib.loss import DS_CrossEntropyDiceLoss_Distance
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.models.size import summary
from lib.pruning.surgery import prune
from lib.runs import settings_of_model
from lib.settings import Settings
from lib.system.files import write_json
from lib.system.process import keep_freed_memory
from lib.trainer import compute_loss

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


def timed(side: Callable[[], object], device: torch.device, wall_clock: bool = False) -> Callable[[], float]:
    """`side` as a function that gives the seconds it took: CPU seconds of this process and its finished children where
    there is one thread, the wall clock's elsewhere, or if it is asked for."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if device.type == "cpu" and torch.get_num_threads() == 1 and not wall_clock:
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


def as_run(folder: Path, model: nnUNet, args: argparse.Namespace) -> Path:
    """A run folder with this model alone; returns the model's path."""
    settings = Settings.of({key: getattr(args, key) for key in ("data", "fms_init", "levels", "patch_size")})
    (folder / "models").mkdir(parents=True)
    write_json(folder / "config.json", settings.as_dict())
    save_model(folder / "models" / "model-1", model)
    return folder / "models" / "model-1"


def exported(path: Path, model: nnUNet) -> onnx.ModelProto:
    """A model RUN/models/model-E, exported and not checked."""
    return to_onnx(model, describe(path, model, settings_of_model(path), "out.onnx"))


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


def step_flops(model: nnUNet, images: Tensor) -> int:
    """FLOPs of the convolutions of a training step: forward, and as many for the gradients of the maps and for those of
    the weights. The image needs no gradient."""
    size = tuple(images.shape[2:])
    first = conv_flop_count((1, *images.shape[1:]), model.blocks()[0].conv.weight.shape, (1, 1, *size))
    return len(images) * (3 * summary(model, size)["flops"] - first)


def multiplication(n: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A multiplication of two n x n matrices of float32, and its FLOPs."""
    torch.manual_seed(2)
    a, b = torch.randn(2, n, n, device=device)
    return lambda: torch.mm(a, b), 2 * n**3


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
    predictor = Predictor(model, args.patch_size, batch_size=None if ours else 1)

    def predict_all() -> None:
        for volume in volumes:
            labels.append(predictor.volume(volume).argmax(0).ravel())

    return timed(predict_all, args.device)(), np.concatenate(labels).astype(np.uint8)


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
    code = (  # torch first: `lib` would set the policy
        "import argparse, json, sys, torch; from lib.experiments import speed_parts;"
        "print(speed_parts.timed_steps(argparse.Namespace(**json.loads(sys.argv[1]))))"
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


def peak_mib(prediction: Path, truth: Path, n_classes: int) -> float:
    """The most memory that our evaluation of a pair takes, in a process of its own."""
    code = (
        "import sys; from lib.evaluation import Rules, evaluate_pair;"
        "evaluate_pair(sys.argv[1], sys.argv[2], Rules(int(sys.argv[3])));"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )  # getrusage would tell the peak of this process too
    argv = [sys.executable, "-c", code, prediction, truth, str(n_classes)]
    return int(subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1024

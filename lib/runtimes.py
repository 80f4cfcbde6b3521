"""What computes an exported model: OpenVINO or ONNX Runtime. Without torch; each is imported when it is used."""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib.network import Network
from lib.onnx_file import IMAGE, OnnxFile
from lib.system.error import InputError
from lib.system.process import n_cores

RUNTIMES = ("openvino", "onnxruntime")  # the faster one on CPUs first
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class OnnxNetwork(Network):
    """An exported model in a runtime, on a device ("cpu" or "cuda")."""

    file: OnnxFile
    runtime: str
    device: str
    compute: Callable[[np.ndarray], np.ndarray]

    modalities = property(lambda self: self.file.modalities)
    n_classes = property(lambda self: self.file.n_classes)
    dim = property(lambda self: self.file.dim)
    divisor = property(lambda self: self.file.divisor)

    def usual_batch(self, patch_size: tuple[int, ...]) -> int:
        """All mirrorings of a patch in 2D; as `Network` in 3D, where more need memory."""
        return 4 if len(patch_size) == 2 else 2

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """As `Network`. Raises InputError where the runtime fails."""
        try:
            return self.compute(np.ascontiguousarray(patches, np.float32))
        except MemoryError:
            raise
        except Exception as error:  # the runtimes raise many types
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> InputError:
        return failed(self.file, self.runtime, error)


def installed() -> tuple[str, ...]:
    """The runtimes that can be imported here."""
    return tuple(name for name in RUNTIMES if importlib.util.find_spec(name) is not None)


def open_network(
    file: OnnxFile, runtime: str = "auto", device: str = "auto", threads: int | None = None
) -> OnnxNetwork:
    """An exported model, ready to compute. runtime: "auto" takes the fastest that is installed. device: "auto" takes
    CUDA where ONNX Runtime is asked for and can use it, else the CPU. threads: None for all cores, or $OMP_NUM_THREADS.

    Raises InputError where the runtime or the device is not here, or cannot compute this file.
    """
    here = installed()
    name = next(iter(here), RUNTIMES[0]) if runtime == "auto" else runtime
    if name not in here:
        raise InputError(f"--runtime {runtime}: {name} is not installed here; pip install {name}")
    if device not in DEVICES:
        raise InputError(f"--device {device}: an exported model is computed on {', '.join(DEVICES)}")
    opened = {"openvino": _in_openvino, "onnxruntime": _in_onnxruntime}[name]
    try:
        found, compute = opened(file, device, threads or _n_threads())
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the runtimes raise many types
        raise failed(file, name, error) from error
    return OnnxNetwork(file, name, found, compute)


def failed(file: OnnxFile, runtime: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{file.path}: {runtime} cannot compute it ({reason}); try another --runtime")


def _n_threads() -> int:
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else n_cores()


def _in_openvino(file: OnnxFile, device: str, threads: int) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    import openvino

    if device == "cuda":
        raise InputError("--device cuda: OpenVINO does not compute there; give --runtime onnxruntime")
    core = openvino.Core()
    how = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # a CPU that has bfloat16 would take it
    }
    if place := _cache_folder():
        how["CACHE_DIR"] = str(place)
    model = core.read_model(file.data, b"")
    request = core.compile_model(model, "CPU", how).create_infer_request()

    def compute(patches: np.ndarray) -> np.ndarray:
        request.infer({0: patches}, share_inputs=True)
        return request.get_output_tensor(0).data.copy()

    return "cpu", compute


def _in_onnxruntime(file: OnnxFile, device: str, threads: int) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    import onnxruntime

    on_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not on_cuda:
        raise InputError("--device cuda: this ONNX Runtime cannot use it; pip install onnxruntime-gpu, or give cpu")
    providers = ["CUDAExecutionProvider"] * (on_cuda and device != "cpu") + ["CPUExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would burn the others' time
    session = onnxruntime.InferenceSession(file.data, options, providers)
    found = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"
    if device == "cuda" and found == "cpu":
        raise InputError("--device cuda: ONNX Runtime finds no GPU that it can use; give cpu")

    def compute(patches: np.ndarray) -> np.ndarray:
        return session.run(None, {IMAGE: patches})[0]

    return found, compute


def _cache_folder() -> Path | None:
    """Where compiled models are kept, for this user alone; None where there is no such place."""
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA")
    elif sys.platform == "darwin":
        root = "~/Library/Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(root).expanduser() / "sauron"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError, TypeError):  # read-only, no home, no such variable
        return None

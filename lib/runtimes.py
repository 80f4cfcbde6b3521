"""The programs that run an exported model: OpenVINO and ONNX Runtime. Without torch, and without onnx.

What was checked is what they run: the bytes of the `OnnxFile`. OpenVINO's cache of compiled models is left alone: it
saves a tenth of a second, and a damaged one changes predictions without a word.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from lib.network import Network
from lib.onnx_file import IMAGE, PROBABILITIES, OnnxFile
from lib.system.error import InputError
from lib.system.process import kept_signal_stack, n_cores

CUDA = "CUDAExecutionProvider"  # ONNX Runtime's name of it

Compute = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class OnnxNetwork(Network):
    """An exported model, opened by a runtime."""

    file: OnnxFile
    runtime: str  # one of RUNTIMES
    compute: Compute

    modalities = property(lambda self: self.file.modalities)
    n_classes = property(lambda self: self.file.n_classes)
    dim = property(lambda self: self.file.dim)
    divisor = property(lambda self: self.file.divisor)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Softmax maps (B, n_classes, *patch) float32 of patches (B, modalities, *patch) float32, of any B and size
        that fit. Raises InputError where the runtime fails."""
        patches = np.ascontiguousarray(patches, np.float32)
        size, divisor = patches.shape[2:], self.divisor
        if patches.shape[1] != self.modalities or len(size) != len(divisor):
            raise ValueError(f"patches {patches.shape} do not fit {self.modalities} channels and {self.dim}")
        if any(n % d or n == 0 for n, d in zip(size, divisor, strict=True)):
            raise ValueError(f"the size {size} is not a multiple of {' x '.join(map(str, divisor))}")
        try:
            return self.compute(patches)
        except Exception as error:  # each runtime has types of its own
            sizes = " x ".join(map(str, patches.shape))
            raise _failed(self.file, self.runtime, f"cannot compute patches {sizes}", error) from error


def open_network(
    file: OnnxFile, runtime: str = "auto", threads: int | None = None, device: str = "auto"
) -> OnnxNetwork:
    """Open an exported model by a runtime; "auto" is the fastest that is installed, or for CUDA, ONNX Runtime. threads:
    how many to use, by default $OMP_NUM_THREADS, or else one for each core. device: "auto" is CUDA where the runtime
    can use it, or the CPU.

    Raises InputError if the runtime is not known or not installed, cannot open the model, or not on this device.
    """
    if device not in DEVICES:
        raise InputError(f"--device {device}: an exported model is computed on {', '.join(DEVICES)}; give one of them")
    if device == "cuda" and runtime == "auto":
        runtime = "onnxruntime"
    found = installed_runtimes()
    if runtime != "auto" and runtime not in RUNTIMES:
        raise InputError(f"--runtime {runtime}: is unknown; give auto, {' or '.join(RUNTIMES)}")
    if not found if runtime == "auto" else runtime not in found:
        name = RUNTIMES[0] if runtime == "auto" else runtime
        what = f"none of {', '.join(RUNTIMES)} is" if runtime == "auto" else "it is not"
        other = f", or give --runtime {found[0]}" if found else ""
        raise InputError(f"--runtime {runtime}: {what} installed; run `pip install {name}`{other}")
    chosen = found[0] if runtime == "auto" else runtime
    try:
        return OnnxNetwork(file, chosen, OPENERS[chosen](file.data, threads or usual_threads(), device))
    except InputError:
        raise
    except Exception as error:
        raise _failed(file, chosen, "cannot open it", error) from error


def installed_runtimes() -> tuple[str, ...]:
    """Those that are installed, the fastest first."""
    return tuple(name for name in RUNTIMES if find_spec(name))


def usual_threads() -> int:
    """$OMP_NUM_THREADS, or the number of cores that this process may use."""
    given = re.match(r"\s*([1-9][0-9]{0,3})\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(given[1]) if given else n_cores()


def _failed(file: OnnxFile, runtime: str, what: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    others = " or ".join(name for name in RUNTIMES if name != runtime)
    return InputError(f"{file.path}: {runtime} {what} ({reason}); try --runtime {others}")


def _openvino(data: bytes, threads: int, device: str) -> Compute:
    import openvino

    if device == "cuda":
        raise InputError("--device cuda: OpenVINO computes on the CPU; give --runtime onnxruntime, or another device")
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # or else a CPU that has bfloat16 would compute in it
    }
    model, requests = core.read_model(model=data), {}

    def compute(patches: np.ndarray) -> np.ndarray:
        shape = patches.shape
        if shape not in requests:  # fixed sizes are a tenth faster than free ones; a volume has two: the last batch's
            model.reshape({IMAGE: list(shape)})
            with kept_signal_stack():  # OpenVINO takes another, which it frees, also while it is in use
                requests[shape] = core.compile_model(model, "CPU", settings).create_infer_request()
        requests[shape].infer({IMAGE: patches}, share_inputs=True)
        return requests[shape].get_tensor(PROBABILITIES).data.copy()  # the next call writes into the same memory

    return compute


def _onnxruntime(data: bytes, threads: int, device: str) -> Compute:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors alone, which are exceptions as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave the cores alone
    providers = [("CPUExecutionProvider", {})]
    if device != "cpu" and CUDA in onnxruntime.get_available_providers():
        providers.insert(0, (CUDA, {"use_tf32": "0"}))
    session = onnxruntime.InferenceSession(data, options, providers=providers)
    if device == "cuda" and CUDA not in session.get_providers():
        raise InputError("--device cuda: this ONNX Runtime cannot use it; pip install onnxruntime-gpu, or give cpu")
    return lambda patches: session.run([PROBABILITIES], {IMAGE: patches})[0]


OPENERS: dict[str, Callable[[bytes, int, str], Compute]] = {"openvino": _openvino, "onnxruntime": _onnxruntime}
DEVICES = ("auto", "cpu", "cuda")
RUNTIMES = tuple(OPENERS)  # the fastest first

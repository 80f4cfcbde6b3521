"""The programs that run exported models."""

import os
import subprocess
import sys
from pathlib import Path

import exported
import numpy as np
import onnxruntime
import pytest
import torch

import lib.runtimes
from lib.inference import Predictor
from lib.onnx_file import read_onnx_file
from lib.runtimes import RUNTIMES, installed_runtimes, open_network, usual_threads
from lib.system.error import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["2D", "3D"])
def model(request, tmp_path_factory):
    """(the network of torch, its file)"""
    path = tmp_path_factory.mktemp("exported") / "Bär 1.onnx"
    return exported.write_exported(path, request.param), read_onnx_file(path)


def test_the_pinned_runtimes_are_installed():
    assert installed_runtimes() == RUNTIMES == ("openvino", "onnxruntime")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_they_agree_with_torch_for_any_batch_and_size(model, runtime):
    torch_model, file = model
    network = open_network(file, runtime, threads=1)
    assert (network.runtime, network.dim, network.divisor) == (runtime, torch_model.dim, torch_model.divisor)
    assert (network.modalities, network.n_classes) == (torch_model.modalities, torch_model.n_classes)
    rng, kept = np.random.default_rng(0), []
    for batch, times in ((2, 2), (3, 1), (1, 3), (2, 2)):
        size = [times * n for n in file.patch_size]
        patches = rng.normal(1, 3, (batch, file.modalities, *size)).astype(np.float32)
        with torch.inference_mode():
            expected = torch_model(torch.from_numpy(patches))[0].numpy()
        maps = network(patches)
        assert maps.dtype == np.float32 and maps.flags.c_contiguous
        np.testing.assert_allclose(maps, expected, atol=2e-5)
        assert (maps.argmax(1) == expected.argmax(1)).mean() > 0.9999
        kept.append((maps, maps.copy()))
    assert all(np.array_equal(maps, copy) for maps, copy in kept)  # what was given is not written into again


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_any_order_in_memory_is_taken(model, runtime):
    _, file = model
    network = open_network(file, runtime, threads=1)
    patches = np.random.default_rng(0).normal(size=(2, file.modalities, *file.patch_size)).astype(np.float32)
    flipped = np.flip(patches, (2, 3))
    np.testing.assert_array_equal(network(flipped), network(flipped.copy()))
    assert np.array_equal(network(np.asfortranarray(patches)), network(patches))


def test_a_predictor_applies_them(model):
    torch_model, file = model
    volume = np.random.default_rng(0).normal(size=(file.modalities, 18, 26, 9)).astype(np.float32)
    expected = Predictor(torch_model, file.patch_size).volume(volume)
    for runtime in RUNTIMES:
        found = Predictor(open_network(file, runtime, threads=1), file.patch_size).volume(volume)
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_patches_that_do_not_fit(model):
    _, file = model
    network = open_network(file, threads=1)
    with pytest.raises(ValueError, match="do not fit"):
        network(np.zeros((1, 9, *file.patch_size), np.float32))
    with pytest.raises(ValueError, match="do not fit"):
        network(np.zeros((1, file.modalities, 8), np.float32))
    with pytest.raises(ValueError, match="is not a multiple"):
        network(np.zeros((1, file.modalities, *[n + 1 for n in file.patch_size]), np.float32))


def test_auto_is_the_fastest_that_is_installed(model, monkeypatch):
    _, file = model
    assert open_network(file, threads=1).runtime == "openvino"
    there = lib.runtimes.find_spec
    monkeypatch.setattr(lib.runtimes, "find_spec", lambda name: None if name == "openvino" else there(name))
    assert open_network(file, threads=1).runtime == "onnxruntime"
    with pytest.raises(InputError) as error:
        open_network(file, "openvino")
    assert str(error.value) == (
        "--runtime openvino: it is not installed; run `pip install openvino`, or give --runtime onnxruntime"
    )
    monkeypatch.setattr(lib.runtimes, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        open_network(file)
    assert str(error.value) == (
        "--runtime auto: none of openvino, onnxruntime is installed; run `pip install openvino`"
    )
    with pytest.raises(InputError, match="--runtime tensorrt: is unknown; give auto, openvino or onnxruntime"):
        open_network(file, "tensorrt")


def test_a_runtime_that_fails_is_one_line(model, monkeypatch):
    _, file = model

    def fails(*_):
        raise RuntimeError("a long\n  reason")

    monkeypatch.setitem(lib.runtimes.OPENERS, "openvino", lambda data, threads, device: fails)
    network = open_network(file, "openvino")
    with pytest.raises(InputError) as error:
        network(np.zeros((1, file.modalities, *file.patch_size), np.float32))
    assert str(error.value).startswith(f"{file.path}: openvino cannot compute patches 1 x ")
    assert str(error.value).endswith(" (a long reason); try --runtime onnxruntime")
    monkeypatch.setitem(lib.runtimes.OPENERS, "openvino", fails)
    with pytest.raises(InputError) as error:
        open_network(file, "openvino")
    assert str(error.value) == f"{file.path}: openvino cannot open it (a long reason); try --runtime onnxruntime"


@pytest.mark.parametrize(("given", "n"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("0", None), ("many", None), ("", None)])
def test_the_threads_are_those_of_openmp_or_all_cores(monkeypatch, given, n):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(lib.runtimes, "n_cores", lambda: 7)
    assert usual_threads() == (n or 7)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert usual_threads() == 7


def test_the_threads_reach_the_runtime(model, monkeypatch):
    _, file = model
    seen = []
    monkeypatch.setitem(lib.runtimes.OPENERS, "openvino", lambda data, threads, device: seen.append((data, threads)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    open_network(file, "openvino")
    open_network(file, "openvino", threads=5)
    assert seen == [(file.data, 3), (file.data, 5)]  # the very bytes that were checked


def run_without_torch(file, runtime, code):
    """A process where neither torch nor onnx is, even if installed: it opens a `network`, computes `patches`, and then
    runs `code`."""
    opened = (
        "import os, signal, sys, numpy as np\n"
        "sys.modules.update(dict.fromkeys(['torch', 'torchio', 'onnx']))\n"
        "from lib.onnx_file import read_onnx_file; from lib.runtimes import open_network\n"
        "file = read_onnx_file(sys.argv[1]); network = open_network(file, sys.argv[2], threads=1)\n"
        "patches = np.ones((1, file.modalities, *file.patch_size), np.float32); maps = network(patches)\n"
    )
    argv = [sys.executable, "-c", opened + code, str(file.path), runtime]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_signal_after_networks_were_let_go_is_handled(model, runtime):
    """The older one goes first: with OpenVINO, signals would then be handled on a stack that is no more."""
    code = (
        "signal.signal(signal.SIGINT, lambda *_: print('handled'))\n"
        "other = open_network(file, sys.argv[2], threads=1); other(patches)\n"
        "del network; del other\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = run_without_torch(model[1], runtime, code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_they_need_no_torch_and_say_nothing(model, runtime):
    done = run_without_torch(model[1], runtime, "assert np.isfinite(maps).all()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_devices_that_are_not_there_are_refused(model):
    _, file = model
    with pytest.raises(InputError, match="^--device mps: an exported model is computed on auto, cpu, cuda; give one"):
        open_network(file, device="mps")
    with pytest.raises(InputError, match="^--device cuda: OpenVINO computes on the CPU; give --runtime onnxruntime"):
        open_network(file, "openvino", device="cuda")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        for runtime in ("auto", "onnxruntime"):
            with pytest.raises(InputError, match="^--device cuda: this ONNX Runtime cannot use it"):
                open_network(file, runtime, device="cuda")


def test_models_of_one_shape_and_other_weights_are_not_taken_for_one_another(tmp_path):
    patches = np.random.default_rng(0).normal(size=(1, 1, 16, 24)).astype(np.float32)
    maps = []
    for seed in (1, 2, 1, 2):
        exported.write_exported(tmp_path / f"{seed}.onnx", "2D", seed)
        maps.append(open_network(read_onnx_file(tmp_path / f"{seed}.onnx"))(patches))
    np.testing.assert_array_equal(maps[0], maps[2])
    np.testing.assert_array_equal(maps[1], maps[3])
    assert np.abs(maps[0] - maps[1]).max() > 0.01

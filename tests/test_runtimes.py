"""OpenVINO and ONNX Runtime compute what torch computes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exporting import exported, make_run, own_settings
from raw_data import write_raw

from lib import runtimes
from lib.export import export
from lib.models import load_model
from lib.onnx_file import OnnxFile, read_onnx_file
from lib.runtimes import RUNTIMES, installed, open_network
from lib.system.error import InputError
from lib.torch_network import TorchNetwork

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=["2D", "3D", "own"])
def model(request, tmp_path_factory):
    """(torch's network, the exported file) of a pruned network."""
    folder = tmp_path_factory.mktemp(request.param)
    given = {}
    if request.param == "3D":
        given = {"data": "kits", "data_path": str(folder / "gone"), "patch_size": (8, 12, 16)}
    if request.param == "own":
        given = own_settings(write_raw(folder / "Dataset003_Own", n=5, shape=(20, 24, 9), spacing=(1.0, 1.2, 4.0)))
    path = make_run(folder / "run", **given)
    export(path, folder / "out.onnx", lambda line: None)
    return TorchNetwork(load_model(path)), read_onnx_file(folder / "out.onnx")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_batches_and_patches_of_any_size_give_torchs_softmax_maps(model, runtime):
    torchs, file = model
    network = open_network(file, runtime, "cpu")
    assert (network.runtime, network.device, network.dim) == (runtime, "cpu", torchs.dim)
    assert (network.modalities, network.n_classes, network.divisor) == (
        torchs.modalities,
        torchs.n_classes,
        torchs.divisor,
    )
    rng = np.random.default_rng(0)
    for batch, times in ((1, 1), (3, 1), (2, 2), (1, 1)):
        size = [times * n for n in file.patch_size]
        patches = rng.normal(size=(batch, network.modalities, *size)).astype(np.float32)
        found, expected = network(patches), torchs(patches)
        assert found.dtype == np.float32 and found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_was_returned_stays(model, runtime):
    """Whatever is computed next, and however the patches lie in memory."""
    torchs, file = model
    network, rng = open_network(file, runtime, "cpu"), np.random.default_rng(0)
    first, second = rng.normal(size=(2, 1, network.modalities, *file.patch_size)).astype(np.float32)
    mirrored = np.flip(second, 2)
    a = network(first)
    kept = a.copy()
    np.testing.assert_allclose(network(mirrored), torchs(np.ascontiguousarray(mirrored)), atol=1e-4)
    np.testing.assert_array_equal(a, kept)


def test_mirrorings_are_averaged_as_by_torch(model):
    torchs, file = model
    axes = range(2, 2 + len(file.patch_size))
    mirrorings = [m for n in range(len(file.patch_size) + 1) for m in itertools.combinations(axes, n)]
    patches = np.random.default_rng(0).normal(size=(2, torchs.modalities, *file.patch_size)).astype(np.float32)
    expected = torchs.mean(patches, mirrorings, 3)
    for runtime in RUNTIMES:
        np.testing.assert_allclose(open_network(file, runtime).mean(patches, mirrorings, 5), expected, atol=1e-4)


def test_models_of_one_shape_and_other_weights_are_not_taken_for_one_another(tmp_path, monkeypatch):
    """Though compiled ones are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = [exported(tmp_path, f"{seed}.onnx", seed=seed) for seed in (1, 2)]
    patches = np.random.default_rng(0).normal(size=(1, 1, 16, 24)).astype(np.float32)
    maps = [open_network(read_onnx_file(path), "openvino")(patches) for path in (*paths, *paths)]
    np.testing.assert_array_equal(maps[0], maps[2])
    np.testing.assert_array_equal(maps[1], maps[3])
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    for path, expected in zip(paths, maps, strict=False):
        np.testing.assert_allclose(open_network(read_onnx_file(path), "onnxruntime")(patches), expected, atol=1e-4)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    network = open_network(read_onnx_file(exported(tmp_path)), "openvino")
    assert network(np.zeros((1, 1, 16, 24), np.float32)).shape == (1, 4, 16, 24)


def test_the_fastest_that_is_installed_is_taken(tmp_path, monkeypatch):
    file = read_onnx_file(exported(tmp_path))
    assert installed() == RUNTIMES and open_network(file).runtime == "openvino"
    monkeypatch.setattr(runtimes, "installed", lambda: ("onnxruntime",))
    assert open_network(file).runtime == "onnxruntime"
    with pytest.raises(InputError, match="^--runtime openvino: openvino is not installed here; pip install openvino$"):
        open_network(file, "openvino")
    monkeypatch.setattr(runtimes, "installed", lambda: ())
    with pytest.raises(InputError, match="pip install openvino$"):
        open_network(file)


def test_devices_that_are_not_there_are_refused(tmp_path):
    file = read_onnx_file(exported(tmp_path))
    with pytest.raises(InputError, match="^--device mps: an exported model is computed on auto, cpu, cuda$"):
        open_network(file, device="mps")
    with pytest.raises(InputError, match="--runtime onnxruntime"):
        open_network(file, "openvino", "cuda")
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(InputError, match="^--device cuda: this ONNX Runtime cannot use it"):
            open_network(file, "onnxruntime", "cuda")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_a_runtime_cannot_read_or_compute_is_one_line(tmp_path, runtime):
    file = read_onnx_file(exported(tmp_path))
    broken = OnnxFile(file.path, file.data[:200], file.sha256, file.metadata, file.graph)
    with pytest.raises(
        InputError, match=f"model.onnx: {runtime} cannot compute it .*; try another --runtime"
    ) as caught:
        open_network(broken, runtime)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=f"{runtime} cannot compute it"):
        open_network(file, runtime)(np.zeros((1, 7, 16, 24), np.float32))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_nothing_of_a_runtime_is_on_the_screen(tmp_path, runtime):
    exported(tmp_path)
    code = (
        "import numpy as np\nfrom lib.onnx_file import read_onnx_file\nfrom lib.runtimes import open_network\n"
        f"open_network(read_onnx_file({str(tmp_path / 'model.onnx')!r}), {runtime!r})(np.zeros((1, 1, 16, 24), 'f4'))"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")

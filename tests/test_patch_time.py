"""The time of a patch."""

import time
from importlib.util import find_spec

import numpy as np
import pytest

from lib.experiments import patch_time
from lib.experiments.patch_time import ROUNDS, WARM_UP, patch_milliseconds
from lib.models import nnUNet
from lib.torch_network import TorchNetwork

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs pip install openvino")


def test_all_networks_take_turns_and_the_first_rounds_do_not_count(monkeypatch):
    """With a clock that only what is computed moves on."""
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def sides(model):
        def compute(factor, patches):
            assert patches.shape == (1, 2, 8, 16) and patches.dtype == np.float32
            n = sum(name == (model.name, factor) for name in calls)
            calls.append((model.name, factor))
            now[0] += factor * model.name * (100 if n < WARM_UP else 1 + 0.001 * n)

        return {"torch": lambda patches: compute(1, patches), "openvino": lambda patches: compute(0.5, patches)}

    class Model:
        modalities = 2

        def __init__(self, name):
            self.name = name

    monkeypatch.setattr(patch_time, "_sides", sides)
    found = patch_milliseconds([Model(1), Model(4)], (8, 16))
    middle = 1000 + WARM_UP + ROUNDS // 2
    assert found[0] == pytest.approx({"torch": middle, "openvino": middle / 2})
    assert found[1] == pytest.approx({"torch": 4 * middle, "openvino": 2 * middle})
    assert calls == [(1, 1), (1, 0.5), (4, 1), (4, 0.5)] * (WARM_UP + ROUNDS)


@needs_openvino
@pytest.mark.parametrize(("dim", "size"), [("2D", (16, 24)), ("3D", (8, 16, 8))])
def test_both_sides_compute_the_same_maps(dim, size):
    model = nnUNet(2, 3, 4, 3, dim=dim)
    model.initialize()
    sides = patch_time._sides(model.eval())
    assert list(sides) == ["torch", "openvino"] and isinstance(sides["torch"], TorchNetwork)
    patches = np.random.default_rng(0).normal(size=(1, 2, *size)).astype(np.float32)
    assert np.abs(sides["torch"](patches) - sides["openvino"](patches)).max() < 1e-4
    assert all(ms > 0 for ms in patch_milliseconds([model], size)[0].values())


def test_without_openvino_torch_alone_is_timed(monkeypatch):
    monkeypatch.setattr(patch_time, "find_spec", lambda name: None)
    model = nnUNet(1, 2, 2, 3)
    model.initialize()
    assert [*patch_milliseconds([model.eval()], (8, 8))[0]] == ["torch"]

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.models import Sauron, nnUNet
from lib.models.size import milliseconds, resized, summary


@pytest.mark.parametrize(("dim", "size"), [("2D", (16, 24)), ("3D", (8, 16, 24))])
def test_flops_are_those_of_torchs_counter(dim, size):
    whole = nnUNet(2, 3, 4, 4, dim=dim)
    widths = {block.name: 1 + i % 3 for i, block in enumerate(whole.blocks()) if not block.head}
    for model in (whole, resized(whole, widths, "cpu")):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 2, *size))
        assert summary(model, size)["flops"] == counter.get_total_flops() > 0


def test_flops_agree_with_a_hand_count():
    conv = nnUNet(3, 2, 5, 3).encoder[0].seq[0]
    with FlopCounterMode(display=False) as counter:
        conv(torch.zeros(1, 3, 8, 6))
    assert counter.get_total_flops() == 2 * (8 * 6) * 5 * 3 * 9  # 2 per multiply-add
    small, large = nnUNet(1, 2, 2, 3), nnUNet(1, 2, 4, 3)
    assert summary(small, (8, 8))["flops"] < summary(large, (8, 8))["flops"] == summary(large, (16, 8))["flops"] // 2
    assert summary(large, (8, 8))["parameters"] == sum(p.numel() for p in large.parameters())
    assert summary(large, (8, 8))["filters"] == 4 + 4 + 8 + 8 + 16 + 16 + 3 * 8 + 3 * 4


def test_flops_with_a_stride_and_a_kernel_per_axis():
    shape = {"strides": [(1, 1, 1), (1, 2, 2), (3, 2, 1)], "kernels": [(1, 3, 3), (3, 5, 3), (3, 1, 7)]}
    whole = Sauron(2, 3, 4, 3, dim="3D", **shape)
    half = resized(whole, {block.name: block.out_filters // 2 for block in whole.blocks() if not block.head}, "cpu")
    assert (half.strides, half.kernels, half.dim) == (whole.strides, whole.kernels, "3D")
    for model in (whole, half):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 2, 6, 8, 16))
        assert summary(model, (6, 8, 16))["flops"] == counter.get_total_flops() > 0


def test_milliseconds_leave_the_model_as_it_is():
    model = nnUNet(1, 2, 2, 3)
    before = copy.deepcopy(model.state_dict())
    assert 0 < milliseconds(model, (16, 8), n=3) < 10_000
    assert model.training and all(map(torch.equal, before.values(), model.state_dict().values()))

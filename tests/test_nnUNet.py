import numpy as np
import pytest
import torch

from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance, cross_entropy, dice_loss
from lib.models import Sauron, nnUNet
from lib.models.size import count_filters


def test_the_published_acdc_network():
    model = nnUNet(modalities=1, n_classes=4, fms_init=48, levels=7)
    out = count_filters(model)["out"]
    assert [out[f"enc_ConvBlock_{k}"] for k in range(1, 15)] == [48, 48, 96, 96, 192, 192, 384, 384] + [480] * 6
    assert [out[f"dec_ConvTranspose2d_{k}"] for k in range(1, 7)] == [480, 480, 384, 192, 96, 48]
    assert [out[f"dec_Sequential_{k}"] for k in range(1, 6)] == [4] * 5
    inputs = count_filters(model)["in"]
    assert inputs["enc_ConvBlock_1"] == 1
    assert inputs["dec_ConvBlock_11"] == 96  # skip 48 + up 48
    assert inputs["dec_Sequential_1"] == 480
    keys = list(model.state_dict())
    assert keys[:2] == ["encoder.0.seq.0.weight", "encoder.0.seq.0.bias"]
    assert {"decoder.0.weight", "decoder.1.seq.0.weight", "decoder.17.seq.0.bias", "last.4.0.bias"} <= set(keys)
    assert not any("norm" in key or "running" in key for key in keys)


@pytest.mark.parametrize(("dim", "size"), [("2D", (16, 24)), ("3D", (16, 8, 8))])
def test_outputs_run_from_full_resolution_downwards(dim, size):
    model = nnUNet(2, 3, 4, 4, dim=dim)
    outputs = model(torch.randn(2, 2, *size))
    assert [tuple(p.shape) for p in outputs] == [(2, 3, *size), (2, 3, *(s // 2 for s in size))]
    for p in outputs:
        torch.testing.assert_close(p.sum(1), torch.ones_like(p[:, 0]))


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        nnUNet(1, 2, 2, 3)(torch.zeros(1, 1, 8, 10))


def test_first_level_computes_what_the_figure_says():
    model = nnUNet(1, 2, 2, 3)
    model.initialize()
    x = torch.randn(1, 1, 8, 8)
    fms = model.forward_saveFMs(x)
    conv = torch.nn.functional.conv2d(x, model.encoder[0].seq[0].weight, model.encoder[0].seq[0].bias, padding=1)
    normed = (conv - conv.mean((2, 3), keepdim=True)) / (conv.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(fms["enc_ConvBlock_1"], torch.where(normed > 0, normed, 0.01 * normed))
    assert list(fms) == [block.name for block in model.blocks()]
    assert fms["dec_Sequential_1"].equal(model(x)[0])


@pytest.mark.parametrize("network", [nnUNet, Sauron])
def test_the_published_keywords(network):
    published = {"modalities": 2, "n_classes": 3, "fms_init": 4, "levels": 4, "normLayer": torch.nn.BatchNorm2d}
    model = network(**published, fms_max=10, dim="2D", filters={})
    assert [block.out_filters for block in model.blocks()][:8] == [4, 4, 8, 8, 10, 10, 10, 10]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert list(model.state_dict()) == list(network(2, 3, 4, 4, "any norm", 10, "2D", {}).state_dict())
    assert network(1, 4, 4, 3, None, 480, "3D").dim == "3D"
    default = network(1, 4)
    assert [block.out_filters for block in default.blocks()][:10:2] == [48, 96, 192, 384, 480]
    assert (default.levels, default.dim) == (5, "2D")
    counted = count_filters(model)
    again = network(**published, filters={key: {n: np.int64(v) for n, v in counted[key].items()} for key in counted})
    assert count_filters(again) == counted
    assert {type(n) for n in count_filters(again)["out"].values()} == {int}


FLAT = {
    "strides": [(1, 1, 1), (1, 2, 2), (1, 2, 2), (3, 2, 1)],
    "kernels": [(1, 3, 3), (1, 3, 5), (3, 3, 3), (3, 1, 5)],
}


def test_a_stride_and_a_kernel_per_axis_and_level():
    torch.manual_seed(0)
    model = nnUNet(1, 2, 2, 4, dim="3D", **FLAT)
    model.initialize()
    assert model.divisor == (3, 8, 4)
    maps = model.forward_saveFMs(torch.randn(1, 1, 6, 16, 8))
    sizes = [(6, 16, 8), (6, 8, 4), (6, 4, 2), (2, 2, 2)]  # of the levels
    for k in range(8):
        assert maps[f"enc_ConvBlock_{k + 1}"].shape[2:] == sizes[k // 2]
        assert model.encoder[k].seq[0].kernel_size == FLAT["kernels"][k // 2]
    for stage, level in ((1, 2), (2, 1), (3, 0)):
        up, *blocks = model.decoder[3 * stage - 3 : 3 * stage]
        assert up.kernel_size == up.stride == FLAT["strides"][level + 1]
        assert {block.seq[0].kernel_size for block in blocks} == {FLAT["kernels"][level]}
        names = f"dec_ConvTranspose3d_{stage}", f"dec_ConvBlock_{2 * stage - 1}", f"dec_ConvBlock_{2 * stage}"
        assert {maps[name].shape[2:] for name in names} == {sizes[level]}
    conv = model.encoder[2].seq[0]
    h = torch.nn.functional.conv3d(maps["enc_ConvBlock_2"], conv.weight, conv.bias, (1, 2, 2), (0, 1, 2))
    expected = torch.nn.functional.leaky_relu(torch.nn.functional.instance_norm(h), 0.01)
    torch.testing.assert_close(maps["enc_ConvBlock_3"], expected)


def test_heads_stand_at_the_sizes_of_their_levels_and_so_do_the_targets():
    torch.manual_seed(0)
    model = Sauron(1, 3, 2, 4, dim="3D", **FLAT)
    model.initialize()
    x, labels = torch.randn(2, 1, 6, 16, 8), torch.randint(0, 3, (2, 6, 16, 8))
    measured = model(x, delta_opt=True, delta_prune=True)
    assert [tuple(p.shape) for p in measured.outputs] == [(2, 3, 6, 16, 8), (2, 3, 6, 8, 4)]
    targets = labels, labels[:, :, ::2, ::2]
    expected = sum(cross_entropy(p, y) + dice_loss(p, y) for p, y in zip(measured.outputs, targets, strict=True))
    assert DS_CrossEntropyDiceLoss()(measured.outputs, labels).equal(expected)
    DS_CrossEntropyDiceLoss_Distance()(measured.outputs, labels, measured.delta_opt).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_none_means_kernels_of_3_and_strides_of_2(dim):
    axes = int(dim[0])
    written = {"strides": [[1] * axes, *[[2] * axes] * 3], "kernels": np.full((4, axes), 3)}
    models = []
    for given in ({}, {"strides": None, "kernels": None}, written):
        torch.manual_seed(0)
        models.append(nnUNet(1, 2, 2, 4, dim=dim, **given))
        models[-1].initialize()
        assert models[-1].divisor == (8,) * axes
    x = torch.randn(1, 1, *[16] * axes)
    for model in models[1:]:
        assert (model.strides, model.kernels) == (models[0].strides, models[0].kernels)
        assert list(model.state_dict()) == list(models[0].state_dict())
        assert all(map(torch.equal, model(x), models[0](x)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strides": [(2, 2), (2, 2), (2, 2)]}, r"first level's strides must be 1.*\(2, 2\)"),
        ({"strides": [(1, 1), (2, 2)]}, "strides must hold 2 whole numbers .* each of 3 levels"),
        ({"strides": [(1, 1, 1), (2, 2, 2), (2, 2, 2)]}, "strides must hold 2"),
        ({"strides": [(1, 1), (0, 2), (2, 2)]}, "strides must hold 2"),
        ({"strides": [(1, 1), (1.5, 2), (2, 2)]}, "strides must hold 2"),
        ({"strides": [1, 2, 2]}, "strides must hold 2"),
        ({"strides": []}, "strides must hold 2"),
        ({"strides": 2}, "strides must hold 2"),
        ({"kernels": [(3, 3)] * 4}, "kernels must hold 2"),
        ({"kernels": [(3, "3")] * 3}, "kernels must hold 2"),
        ({"kernels": [(3, 3), (-1, 3), (3, 3)]}, "kernels must hold 2"),
        ({"kernels": [(3, 3), (2, 3), (3, 3)]}, "kernels must be odd"),
    ],
)
def test_strides_and_kernels_that_no_network_has(given, words):
    with pytest.raises(ValueError, match=words):
        nnUNet(1, 2, 2, 3, **given)


@pytest.mark.parametrize("size", [(6, 16, 6), (4, 16, 8), (6, 16), (6, 12, 8)])
def test_sizes_must_be_multiples_of_the_strides_on_each_axis(size):
    with pytest.raises(ValueError, match=r"multiple of 3 x 8 x 4"):
        nnUNet(1, 2, 2, 4, dim="3D", **FLAT)(torch.zeros(1, 1, *size))

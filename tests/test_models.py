import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.distance import euc_norm
from lib.models import Sauron, architecture, load_model, nnUNet
from lib.models.filters import format_filters
from lib.models.nnUNet import Conv2d, InstanceNorm
from lib.models.size import count_filters, resized, summary
from lib.system.error import InputError


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


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (1, 2, 4, 6, 5)])
def test_instance_norm_and_its_gradient_equal_torchs(shape):
    x, weights = torch.randn(shape, dtype=torch.float64) * 3 + 5, torch.randn(shape, dtype=torch.float64)
    values, gradients = [], []
    for norm in (InstanceNorm(), torch.nn.functional.instance_norm):
        leaf = x.clone().requires_grad_()
        values.append(norm(leaf))
        (values[-1] * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


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


def test_sauron_and_nnunet_share_keys_and_outputs(tmp_path):
    torch.manual_seed(0)
    plain = nnUNet(1, 4, 4, 4)
    plain.initialize()
    torch.save(plain.state_dict(), tmp_path / "model-1")
    lines = []
    sauron = Sauron(modalities=1, n_classes=4, fms_init=4, levels=4)
    sauron.initialize(device="cpu", model_state=tmp_path / "model-1", log=lines.append, isSauron=True)
    x = torch.randn(2, 1, 16, 16)
    measured = sauron(x, delta_opt=True, delta_prune=True)
    for a, b, c in zip(plain(x), sauron(x), measured.outputs, strict=True):
        assert a.equal(b)
        assert a.equal(c)
    prunable = [block.name for block in plain.blocks() if not block.head]
    assert list(measured.delta_opt) == list(measured.delta_prune) == prunable
    fms = sauron.forward_saveFMs(x)
    torch.testing.assert_close(measured.delta_opt["dec_ConvTranspose2d_2"], euc_norm(fms["dec_ConvTranspose2d_2"]))
    assert "model-1" in lines[0]


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


def test_a_list_of_one_tensor_is_that_tensor():
    torch.manual_seed(0)
    model = Sauron(1, 4, 4, 3)
    model.initialize()
    x = torch.randn(2, 1, 16, 16)
    for network in (model, nnUNet(1, 4, 4, 3)):
        assert all(map(torch.equal, network([x]), network(x)))
        maps, expected = network.forward_saveFMs([x]), network.forward_saveFMs(x)
        assert list(maps) == list(expected) and all(map(torch.equal, maps.values(), expected.values()))
    measured, expected = ((torch.manual_seed(1), model(given, True, True))[1] for given in ([x], x))
    assert all(map(torch.equal, measured.outputs, expected.outputs))
    assert all(map(torch.equal, measured.delta_opt.values(), expected.delta_opt.values()))
    for (delta, r), (other, other_r) in zip(measured.delta_prune.values(), expected.delta_prune.values(), strict=True):
        assert r == other_r and torch.equal(delta, other)
    with pytest.raises(ValueError, match="one tensor, not a list of 2"):
        model([x, x])


def test_weights_start_from_he_normal():
    torch.manual_seed(0)
    model = nnUNet(1, 2, 32, 3)
    model.initialize()
    conv = model.encoder[3].seq[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_widths_are_read_off_a_file_and_checked_against_filter_files(tmp_path, dim):
    model = nnUNet(2, 3, 4, 4, dim=dim)
    names = [b.name for b in model.blocks() if not b.head]
    uneven = {name: 2 + i % 3 for i, name in enumerate(names)}
    model = nnUNet(2, 3, 4, 4, dim=dim, filters={"out": uneven})
    model.initialize()
    torch.save(model.state_dict(), tmp_path / "model-7")
    counted = count_filters(model)
    for key in ("in", "out"):
        (tmp_path / f"{key}_filters").write_text(format_filters([counted[key]]))
    files = {"in_filters": tmp_path / "in_filters", "out_filters": tmp_path / "out_filters"}
    loaded = load_model(tmp_path / "model-7", **files)
    assert not loaded.training
    assert count_filters(loaded) == counted
    assert (loaded.dim, loaded.levels, loaded.modalities, loaded.n_classes) == (dim, 4, 2, 3)
    (tmp_path / "out_filters").write_text(format_filters([counted["out"] | {"enc_ConvBlock_2": 9}]))
    with pytest.raises(InputError, match="enc_ConvBlock_2 has 9 filters.*3 in"):
        load_model(tmp_path / "model-7", **files)


def test_files_that_are_no_model_are_refused(tmp_path):
    (tmp_path / "garbage").write_bytes(b"not a model")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other")
    for name, reason in [("garbage", "cannot be read"), ("other", "no model of nnUNet"), ("none", "no such file")]:
        with pytest.raises(InputError, match=reason):
            load_model(tmp_path / name)
    other = nnUNet(1, 2, 4, 3)
    with pytest.raises(InputError, match="encoder.0.seq.0.weight has shape"):
        nnUNet(1, 2, 5, 3).load(other.state_dict(), "x")
    with pytest.raises(InputError, match="missing"):
        nnUNet(1, 2, 4, 4).load(other.state_dict(), "x")


def test_architecture_of_a_published_file():
    state = nnUNet(1, 4, 6, 5).state_dict()
    found = architecture(state, "x")
    assert (found["levels"], found["fms_init"], found["dim"], found["n_classes"]) == (5, 6, "2D", 4)


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


def test_few_filters_with_the_channels_last_compute_the_same():
    conv, plain = Conv2d(3, 5, 3, stride=2, padding=1), torch.nn.Conv2d(3, 5, 3, stride=2, padding=1)
    plain.load_state_dict(conv.state_dict())
    images = torch.randn(2, 3, 12, 10)
    results = []
    for module in (conv, plain):
        x = images.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        assert y.is_contiguous() and x.grad.is_contiguous()
        results.append([y, x.grad, module.weight.grad, module.bias.grad])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)

import pytest
import torch

from lib.distance import euc_norm
from lib.models import Sauron, nnUNet


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

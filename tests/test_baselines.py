"""The formulas as they are published agree with ours; `speed` compares how long they take."""

import pytest
import torch

from lib.distance import euc_norm, euc_rand
from lib.experiments.baselines import LiteralSauron, literal_delta_opt, literal_delta_prune, with_torchs_norm
from lib.models.nnUNet import nnUNet


@pytest.mark.parametrize("size", [(16, 8), (8, 4, 6)])
def test_the_literal_distances_are_ours(size):
    torch.manual_seed(1)
    h = torch.randn(2, 5, *size)
    torch.testing.assert_close(literal_delta_opt(h, 2), euc_norm(h, 2))
    torch.manual_seed(2)
    theirs, r = literal_delta_prune(h, 2)
    torch.manual_seed(2)
    ours, s = euc_rand(h, 2)
    assert r == s
    torch.testing.assert_close(theirs, ours)


def test_the_literal_network_measures_in_every_pass():
    torch.manual_seed(1)
    model, plain, x = LiteralSauron(1, 3, 2, 3), nnUNet(1, 3, 2, 3), torch.randn(1, 1, 16, 16)
    plain.load_state_dict(model.state_dict())
    outputs = model(x)
    assert all(a.equal(b) for a, b in zip(outputs, plain(x), strict=True))
    torch.manual_seed(3)
    model(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert not after.equal(torch.rand(1))  # delta_prune has drawn its reference maps
    measured = model(x, delta_opt=True)
    assert list(measured.delta_opt) == list(measured.delta_prune)
    assert list(measured.delta_opt) == [block.name for block in model.blocks() if not block.head]


def test_torchs_norm_changes_nothing_but_the_rounding():
    torch.manual_seed(1)
    model, x = nnUNet(1, 3, 4, 3), torch.randn(2, 1, 16, 16)
    expected = model(x)
    for found, output in zip(with_torchs_norm(model)(x), expected, strict=True):
        torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-5)

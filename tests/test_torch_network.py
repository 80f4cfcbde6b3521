"""A model of torch as a network in use."""

import itertools

import numpy as np
import pytest
import torch

from lib.models.nnUNet import nnUNet
from lib.network import Network
from lib.torch_network import TorchNetwork


@pytest.fixture(params=["2D", "3D"])
def network(request):
    torch.manual_seed(0)
    model = nnUNet(2, 3, 4, 3, dim=request.param)
    model.initialize()
    return TorchNetwork(model.eval())


def patches_of(network, n=2):
    return np.random.default_rng(0).normal(size=(n, 2, *(8, 12, 16)[: int(network.dim[0])])).astype(np.float32)


def test_it_is_what_the_model_is(network):
    model = network.model
    assert (network.modalities, network.n_classes, network.divisor) == (2, 3, model.divisor)
    patches = patches_of(network)
    with torch.inference_mode():
        expected = model(torch.from_numpy(patches))[0].numpy()
    found = network(patches)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(network(np.flip(patches, 2).copy()), network(np.flip(patches, 2)), atol=1e-6)
    assert (network.usual_batch((8, 8)), network.usual_batch((8, 8, 8))) == (2, 2)  # on the CPU


def test_its_mean_over_mirrorings_is_that_of_any_network(network):
    axes = range(2, 2 + int(network.dim[0]))
    mirrorings = [m for n in range(3) for m in itertools.combinations(axes, n)]
    patches = patches_of(network, 3)
    np.testing.assert_allclose(
        network.mean(patches, mirrorings, 2), Network.mean(network, patches, mirrorings, 2), atol=1e-6
    )


def test_a_trial_is_one_batch_in_the_precision_asked_for(network):
    seen = []
    network.model.register_forward_hook(lambda module, given, output: seen.append((given[0].shape, output[0].dtype)))
    patch = (8, 12, 16)[: int(network.dim[0])]
    trial = network.trial(patch, 2)
    for amp in (False, True):
        trial(amp)
    assert [shape for shape, _ in seen] == [(2, 2, *patch)] * 2 and seen[0][1] == torch.float32

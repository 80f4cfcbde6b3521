import pytest
import torch

from lib.models.layers import Conv2d, InstanceNorm


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

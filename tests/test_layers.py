import pytest
import torch

from lib.models.layers import Conv2d, Conv3d, InstanceNorm


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


@pytest.mark.parametrize(("ours", "torchs"), [(Conv2d, torch.nn.Conv2d), (Conv3d, torch.nn.Conv3d)])
@pytest.mark.parametrize(("filters", "relative"), [((3, 5), 0), ((17, 18), 1e-6), ((16, 17), 1e-6)])
@pytest.mark.parametrize("n", [1, 2])
def test_channels_last_compute_the_same(ours, torchs, filters, relative, n):
    conv, plain = ours(*filters, 3, stride=2, padding=1), torchs(*filters, 3, stride=2, padding=1)
    compare(conv, plain, torch.randn(n, filters[0], *(12, 10, 8)[: plain.weight.ndim - 2]), relative)


def compare(conv, plain, images, relative=1e-6):
    """Values and all gradients: to 1e-5, or to `relative` of the largest where that is more (a sum of many rounds)."""
    plain.load_state_dict(conv.state_dict())
    results = []
    for module in (conv, plain):
        x = images.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        assert y.is_contiguous() and x.grad.is_contiguous()
        results.append([y, x.grad, module.weight.grad, module.bias.grad])
        with torch.no_grad():
            results[-1].append(module(images))
    for ours, torchs in zip(*results, strict=True):
        atol = max(1e-5, relative * torchs.detach().abs().max().item())
        torch.testing.assert_close(ours, torchs, rtol=1.3e-6, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("filters", "kernel", "stride"), [((1, 8), 3, 1), ((8, 6), 3, (1, 2, 2)), ((20, 3), 1, 1), ((17, 20), 3, 1)]
)
def test_a_single_patch_in_inference_mode_is_computed_the_same(filters, kernel, stride, dtype):
    """Also where it is turned, and does not lie in memory as its shape says."""
    conv = Conv3d(*filters, kernel, stride, padding=kernel // 2).to(dtype)
    plain = torch.nn.Conv3d(*filters, kernel, stride, padding=kernel // 2).to(dtype)
    plain.load_state_dict(conv.state_dict())
    image = torch.randn(1, filters[0], 6, 12, 10, dtype=dtype)
    for x in (image, image.transpose(2, 4), image[:, :, ::2], image.flip(3)):
        with torch.inference_mode():
            ours = conv(x)
        with torch.no_grad():
            torch.testing.assert_close(ours, plain(x), rtol=1e-5, atol=1e-5)
        assert ours.dtype == dtype


@pytest.mark.parametrize("planes", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("kernel", [3, (1, 3, 3), 5])
@pytest.mark.parametrize("stride", [1, 2, (1, 2, 2), (3, 1, 1)])
def test_a_single_patch_that_trains_is_computed_by_halves(planes, kernel, stride):
    padding = tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2
    conv = Conv3d(4, 6, kernel, stride, padding)
    plain = torch.nn.Conv3d(4, 6, kernel, stride, padding)
    compare(conv, plain, torch.randn(1, 4, planes, 9, 10))


def test_a_single_patch_that_trains_is_not_left_to_the_slow_method():
    conv, x = Conv3d(8, 8, 3, padding=1), torch.randn(1, 8, 8, 12, 10, requires_grad=True)

    def called(forward):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            forward(x).sum().backward()
        return [event.key for event in profile.key_averages() if "conv" in event.key]

    assert not any("slow" in name for name in called(conv.forward))
    assert any("slow" in name for name in called(lambda x: torch.nn.Conv3d.forward(conv, x)))  # as torch has it


def test_a_single_patch_in_bfloat16():
    conv = Conv3d(4, 6, 3, padding=1)
    x = torch.randn(1, 4, 6, 8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            ours = conv(x)
        with torch.no_grad():
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, torch.nn.Conv3d.forward(conv, x))


def test_a_single_patch_of_a_compiled_network():
    conv, x = Conv3d(4, 6, 3, padding=1), torch.randn(1, 4, 6, 8, 10)
    compiled = torch.compile(conv, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-5, atol=1e-5)

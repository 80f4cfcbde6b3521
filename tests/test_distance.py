import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.distance import DISTANCES, euc_norm, euc_norm_deltaprunenorm, euc_norm_nonorm, euc_rand


def literal_euc_norm(h, sf=2):
    """The formula as written: full-size min-max, then pooling, map by map."""
    pool = F.avg_pool2d if h.ndim == 4 else F.avg_pool3d
    rows = []
    for image in h:
        n = [(m - m.min()) / (m.max() - m.min()) for m in image]
        pooled = [pool(m[None], sf)[0] for m in n]
        rows.append([math.sqrt(((pooled[0] - p) ** 2).mean().item()) for p in pooled[1:]])
    return torch.tensor(rows)


def test_euc_norm_by_hand():
    # 2 x 2 maps, pooled to one value: map 1 scales to [0, 1/3, 2/3, 1] (mean 1/2), map 2 to [0, 0, 0, 1] (mean 1/4).
    h = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]], [[5.0, 5.0], [5.0, 9.0]]]])
    assert euc_norm(h).tolist() == [[0.25]]


def test_euc_norm_nonorm_and_its_relative_form_by_hand():
    # pooled values 0, 3 and 4: distances to the first are 3 and 4.
    h = torch.tensor([0.0, 3.0, 4.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert euc_norm_nonorm(h).tolist() == [[3.0, 4.0]]
    assert euc_norm_deltaprunenorm(h).tolist() == [[0.75, 1.0]]


@pytest.mark.parametrize("shape", [(2, 5, 8, 12), (2, 4, 4, 6, 8), (1, 3, 7, 5)])
def test_euc_norm_equals_the_literal_formula_and_uses_every_axis(shape):
    h = torch.randn(shape)
    torch.testing.assert_close(euc_norm(h), literal_euc_norm(h), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    "h",
    [
        torch.zeros(2, 3, 4, 4),
        torch.full((2, 3, 4, 4), 7.0),
        torch.randn(1, 1, 4, 4).expand(2, 3, 4, 4),
        torch.randn(2, 1, 4, 4),
        torch.randn(2, 3, 2, 2, 2).expand(2, 3, 2, 2, 2) * 1e-30,
        torch.cat([torch.randn(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)], 1),
    ],
    ids=["zero", "constant", "identical", "single", "tiny", "some constant"],
)
def test_values_and_gradients_are_finite(name, h):
    h = h.clone().requires_grad_()
    delta = DISTANCES[name](h)
    assert delta.shape == (h.shape[0], h.shape[1] - 1)
    delta.sum().backward()
    assert torch.isfinite(delta).all()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 5, 7), (1, 2, 1, 4), (1, 3, 4, 3, 2)])
def test_gradient_equals_numerical_one(shape):
    h = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for distance in DISTANCES.values():
        assert torch.autograd.gradcheck(distance, (h,))


@pytest.mark.parametrize("shape", [(2, 5, 8, 12), (2, 4, 4, 6, 8), (1, 3, 7, 5)])
def test_gradient_equals_that_of_the_literal_formula(shape):
    h = torch.nn.functional.leaky_relu(torch.randn(shape), 0.01).requires_grad_()
    spatial = tuple(range(2, h.ndim))
    low, high = h.amin(spatial, keepdim=True), h.amax(spatial, keepdim=True)
    pooled = (F.avg_pool2d if h.ndim == 4 else F.avg_pool3d)((h - low) / (high - low), 2)
    literal = (pooled[:, :1] - pooled[:, 1:]).square().mean(spatial).sqrt()
    weight = torch.randn_like(literal)
    (expected,) = torch.autograd.grad((literal * weight).sum(), h)
    (found,) = torch.autograd.grad((euc_norm(h) * weight).sum(), h)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_euc_rand_by_hand():
    # maps of value 0, 1 and 4 in the first image, 0, 2 and 2 in the second; relative to the largest, then averaged
    values = torch.tensor([[0.0, 1.0, 4.0], [0.0, 2.0, 2.0]])
    h = values[:, :, None, None].expand(2, 3, 4, 4)
    expected = {0: [0, (1 / 4 + 1) / 2, 1], 1: [(1 / 3 + 1) / 2, 0, (1 + 0) / 2], 2: [1, (3 / 4 + 0) / 2, 0]}
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        delta, r = euc_rand(h)
        assert delta.tolist() == pytest.approx(expected[r])
        seen.add(r)
    assert seen == {0, 1, 2}


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_euc_rand_properties(batch, channels, seed):
    torch.manual_seed(seed)
    h = torch.randn(batch, channels, 6, 4)
    torch.manual_seed(seed)
    delta, r = euc_rand(h)
    assert delta.shape == (channels,)
    assert delta[r] == 0
    assert ((delta >= 0) & (delta <= 1)).all()
    torch.manual_seed(seed)
    torch.testing.assert_close(euc_rand(5 * h)[0], delta)  # the scale of a block does not matter


def test_euc_rand_of_identical_maps_is_zero():
    delta, _ = euc_rand(torch.ones(2, 4, 4, 4))
    assert delta.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("name", DISTANCES)
def test_bfloat16_maps_are_measured_in_float32(name):
    h = torch.randn(2, 4, 8, 8).bfloat16().requires_grad_()
    delta = DISTANCES[name](h)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta, DISTANCES[name](h.float()), rtol=0.02, atol=0.01)
    delta.sum().backward()
    assert h.grad.dtype == torch.bfloat16 and torch.isfinite(h.grad).all()


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("name", DISTANCES)
def test_an_axis_of_one_voxel_is_not_pooled_away(name, axis):
    """A flat volume is measured as the slice that it is, on the way back, too."""
    flat = torch.randn(2, 4, 8, 5, requires_grad=True)
    h = flat.detach().unsqueeze(axis).requires_grad_()
    found, expected = DISTANCES[name](h), DISTANCES[name](flat)
    torch.testing.assert_close(found, expected)
    (a,), (b,) = torch.autograd.grad(found.sum(), h), torch.autograd.grad(expected.sum(), flat)
    torch.testing.assert_close(a.squeeze(axis), b)


@pytest.mark.parametrize("name", DISTANCES)
def test_maps_of_one_voxel_have_finite_distances(name):
    h = torch.randn(2, 3, 1, 1, 1, requires_grad=True)
    delta = DISTANCES[name](h)
    delta.sum().backward()
    assert delta.isfinite().all() and h.grad.isfinite().all()
    assert euc_rand(h)[0].isfinite().all()

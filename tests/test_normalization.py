"""nnU-Net's crop and normalization, with numbers that nnU-Net itself gave."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lib.data.normalization import Normalization, nonzero, normalize, scheme_of


def inside(*shape):
    return np.ones(shape, bool)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("CT", "ct"),
        ("ct", "ct"),
        ("CT_art", "zscore"),
        ("noNorm", "nonorm"),
        ("zscore", "zscore"),
        ("Rescale_to_0_1", "rescale_to_0_1"),
        ("rgb_to_0_1", "rgb_to_0_1"),
        ("R", "zscore"),
        ("MRI", "zscore"),
        ("", "zscore"),
    ],
)
def test_the_whole_name_of_a_channel_decides(name, scheme):
    assert scheme_of(name) == scheme


def test_the_box_holds_all_channels():
    channels = np.zeros((2, 1, 7, 8), np.float32)
    channels[0, 0, 1:5, 2:6] = 1
    channels[0, 0, 2:4, 3:5] = 0  # a ring, closed in its slice
    channels[1, 0, 5, 6] = -3
    mask, box = nonzero(channels)
    assert box == (slice(0, 1), slice(1, 6), slice(2, 7))
    np.testing.assert_array_equal(mask, (channels != 0).any(0))  # in 3D the ring is open above and below


def test_a_hole_is_filled_unless_a_face_opens_it():
    shell = np.zeros((5, 6, 7), np.float32)
    shell[1:4, 1:4, 1:4] = 2
    shell[2, 2, 2] = 0
    assert nonzero(shell[None])[0].sum() == 27
    shell[1, 1, 2] = 0  # an edge: the hole is open to no face
    assert nonzero(shell[None])[0].sum() == 26
    shell[1, 2, 2] = 0
    assert nonzero(shell[None])[0].sum() == 24


def test_an_image_of_zeros_stays_whole():
    mask, box = nonzero(np.zeros((1, 2, 3, 4), np.float32))
    assert not mask.any() and box == (slice(0, 2), slice(0, 3), slice(0, 4))


@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 8)] * 3), st.floats(0, 0.9), st.integers(0, 99))
def test_agrees_with_scipys_filling_of_holes(shape, share, seed):
    channels = np.random.default_rng(seed).random((2, *shape)) < share
    mask, box = nonzero(channels)
    expected = ndimage.binary_fill_holes(channels.any(0))
    np.testing.assert_array_equal(mask, expected)
    assert mask[box].sum() == mask.sum()
    for axis in range(3 if mask.any() else 0):
        assert all(mask[box].take(end, axis).any() for end in (0, -1))


@pytest.mark.parametrize(
    ("normalization", "channel", "expected"),
    [
        (
            Normalization("ct", low=-79, high=304, mean=101, std=76.9),
            [-1000, -79, 0, 101, 304, 5000],
            [-2.340702, -2.340702, -1.313394, 0, 2.639792, 2.639792],
        ),
        (
            Normalization("zscore"),
            [0, 0, 1, 2, 3, 6],
            [-0.960769, -0.960769, -0.480384, 0, 0.480384, 1.921538],
        ),
        (Normalization("zscore"), [0.1] * 6, [0] * 6),
        (Normalization("nonorm"), [-3, 0, 1, 2, 3, 600], [-3, 0, 1, 2, 3, 600]),
        (Normalization("rescale_to_0_1"), [-2, 0, 1, 2, 3, 8], [0, 0.2, 0.3, 0.4, 0.5, 1]),
        (Normalization("rescale_to_0_1"), [7] * 6, [0] * 6),
        (Normalization("rgb_to_0_1"), [0, 51, 102, 153, 204, 255], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Normalization("ct", mean=5), [0] * 6, [-5] * 6),
    ],
)
def test_normalized_by_hand(normalization, channel, expected):
    channel = np.array(channel, np.float32).reshape(1, 2, 3)
    before = channel.copy()
    result = normalize(channel, normalization, inside(1, 2, 3))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
    np.testing.assert_array_equal(channel, before)


def test_a_masked_zscore_knows_and_changes_the_inside_only():
    mask = np.array([False, True, True, True, True, True]).reshape(1, 2, 3)
    channel = np.array([0, 0, 1, 2, 3, 6], np.float32).reshape(1, 2, 3)
    expected = [0, -1.165543, -0.679900, -0.194257, 0.291386, 1.748315]
    result = normalize(channel, Normalization("zscore", masked=True), mask)
    np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
    channel[0, 0, 0] = 50
    assert normalize(channel, Normalization("zscore", masked=True), mask)[0, 0, 0] == 50
    whole = normalize(channel, Normalization("zscore"), mask)
    assert abs(whole.mean()) < 1e-6 and whole.std() == pytest.approx(1)


@pytest.mark.parametrize("scheme", ["ct", "zscore", "rescale_to_0_1"])
def test_the_order_of_the_axes_does_not_matter(scheme):
    channel = np.random.default_rng(0).normal(1000, 3, (13, 17, 19)).astype(np.float32)
    recipe = Normalization(scheme, low=990, high=1005, mean=1000, std=2)
    turned = normalize(channel.transpose(2, 0, 1), recipe, inside(19, 13, 17))
    np.testing.assert_array_equal(turned, normalize(channel, recipe, inside(13, 17, 19)).transpose(2, 0, 1))

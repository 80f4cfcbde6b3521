"""Boxes and components of masks: by hand, and against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lib.data.components import box_of, components


def test_a_corner_joins_or_not():
    mask = np.zeros((3, 4, 5), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 1, 1] = mask[2, 3, 4] = True
    assert sorted(np.bincount(components(mask, corners=True)[mask])) == [0, 1, 3]
    assert sorted(np.bincount(components(mask, corners=False)[mask])) == [0, 1, 1, 2]
    assert not components(mask, corners=True)[~mask].any()


def test_the_box_of_a_mask():
    mask = np.zeros((3, 4, 5), bool)
    assert box_of(mask) is None
    mask[1, 3, 2] = mask[1, 0, 4] = True
    assert box_of(mask) == (slice(1, 2), slice(0, 4), slice(2, 5))
    assert box_of(np.ones((2, 1), bool)) == (slice(0, 2), slice(0, 1))


@pytest.mark.parametrize("corners", [False, True])
@settings(deadline=None, max_examples=60)
@given(st.tuples(*[st.integers(1, 8)] * 3), st.floats(0, 1), st.sampled_from("CFPT"), st.integers(0, 99))
def test_agree_with_scipys(corners, shape, share, layout, seed):
    mask = np.random.default_rng(seed).random(shape) < share
    if layout == "P":  # a part of an array
        mask = np.asarray(mask, order="F")[shape[0] // 2 :, :, : shape[2] // 2 + 1]
    elif layout == "T":  # turned
        mask = mask[::-1].transpose(1, 2, 0)
    else:
        mask = np.asarray(mask, order=layout)
    numbers = components(mask, corners)
    expected, n = ndimage.label(mask, np.ones((3, 3, 3)) if corners else None)
    assert numbers.shape == mask.shape and numbers.max() == n
    pairs = np.unique(np.stack([numbers.ravel(), expected.ravel()]), axis=1)  # which number goes with which
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]
    assert [box_of(mask)] == (ndimage.find_objects(mask.astype(np.uint8)) or [None])

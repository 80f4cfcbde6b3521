"""Slices and patches lie where they should."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data import patches

SIZES = st.tuples(*[st.integers(1, 12)] * 3)


@settings(deadline=None)
@given(SIZES, st.one_of(st.tuples(*[st.integers(1, 12)] * 2), SIZES), st.integers(0, 99))
def test_patches_lie_in_the_volume_and_the_grid_covers_it(size, patch_size, seed):
    volume = patches.fit(torch.ones(1, *size), patch_size)
    grid = patches.grid_starts(volume.shape[1:], patch_size)
    assert patches.cut(volume, patch_size, grid).shape == (len(grid), 1, *patch_size)
    whole = (*patch_size, 1)[:3]
    for start in grid:
        volume[(0, *map(slice, start, np.add(start, whole)))] = 0
    assert not volume.any()
    if len(patch_size) == 2:
        assert grid == [(0, 0, z) for z in range(size[2])]
    torch.manual_seed(seed)
    for start in patches.random_starts(volume.shape[1:], patch_size, 4):
        assert all(0 <= s <= n - p for s, n, p in zip(start, volume.shape[1:], whole, strict=True))


def test_random_patches_are_uniform():
    torch.manual_seed(0)
    starts = np.array(patches.random_starts((8, 5, 7), (8, 4, 4), 2000))
    assert (starts[:, 0] == 0).all()
    for axis, n in ((1, 2), (2, 4)):
        assert np.abs(np.bincount(starts[:, axis], minlength=n) / 2000 - 1 / n).max() < 0.05


def test_a_patch_smaller_than_the_slice_also_sees_what_lies_around_the_centre():
    volume = torch.arange(400 * 300 * 2).reshape(1, 400, 300, 2)
    seen = patches.field_of_view(volume, (320, 320), (64, 64))
    assert seen.shape == (1, 320, 300, 2)
    assert seen[0, 0, 0, 0] == volume[0, 40, 0, 0]  # the central 320 rows
    torch.manual_seed(0)
    starts = patches.centred_or_random_starts((320, 300, 2), (64, 64), 400)
    centred = [start for start in starts if start[:2] == (128, 118)]
    assert 150 < len(centred) < 250
    assert {start[2] for start in starts} == {0, 1}
    assert min(s[0] for s in starts) < 20
    assert max(s[0] for s in starts) > 236
    # the data set's own patch takes each slice as `fit` does: there is nothing to choose
    assert set(patches.centred_or_random_starts((320, 320, 1), (320, 320), 9)) == {(0, 0, 0)}
    for shape in ((400, 300, 2), (319, 450, 1), (20, 321, 3)):
        volume = torch.rand(1, *shape)
        assert patches.field_of_view(volume, (320, 320), (320, 320)).equal(patches.fit(volume, (320, 320)))

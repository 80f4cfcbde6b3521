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


# ---- foreground


def chosen(label, patch_size, n_classes, foreground, ignore=False):
    return patches.chosen_starts(label, patch_size, n_classes, ignore, foreground)


def holds(label, start, patch_size):
    whole = (*patch_size, 1)[:3]
    return label[tuple(slice(s, s + p) for s, p in zip(start, whole, strict=True))]


@given(SIZES, st.one_of(st.tuples(*[st.integers(1, 12)] * 2), SIZES), st.integers(0, 999))
def test_a_foreground_patch_lies_in_the_volume_and_shows_foreground(size, patch_size, seed):
    torch.manual_seed(seed)
    label = patches.padded(torch.randint(0, 3, size, dtype=torch.uint8), patch_size).numpy()
    for start in chosen(label, patch_size, 3, [True] * 4):
        part = holds(label, start, patch_size)
        assert part.shape == (*patch_size, 1)[:3] and min(start) >= 0
        assert part.any() or not label.any()


def test_the_class_is_uniform_and_then_the_voxel():
    """Of a class of two voxels and one of 27, each is met equally often, and so is each of its voxels."""
    label = np.zeros((9, 9, 20), np.uint8)
    label[1, 7, [3, 16]] = 1
    label[3:6, 3:6, 9:12] = 3  # class 2 is not there
    torch.manual_seed(0)
    starts = chosen(label, (1, 1, 1), 4, [True] * 2000)
    found = np.array([label[start] for start in starts])
    assert set(found) == {1, 3} and abs((found == 1).mean() - 0.5) < 0.04
    assert abs(np.mean([start[2] == 3 for start in starts if label[start] == 1]) - 0.5) < 0.05
    assert len({start for start in starts if label[start] == 3}) == 27


def test_a_foreground_patch_starts_half_its_size_before_the_voxel_unless_the_volume_ends():
    label = np.zeros((20, 20, 20), np.uint8)
    label[10, 1, 18] = 1
    assert chosen(label, (4, 4, 5), 2, [True]) == [(8, 0, 15)]
    assert chosen(label, (5, 20, 1), 2, [True]) == [(8, 0, 18)]
    assert chosen(label, (4, 4), 2, [True]) == [(8, 0, 18)]  # 2D: the slice of the voxel


def test_without_foreground_a_patch_lies_anywhere():
    label = np.zeros((8, 8, 8), np.uint8)
    torch.manual_seed(0)
    assert len(set(chosen(label, (4, 4, 4), 3, [True] * 200))) > 80
    label[0, 0, 0] = 2
    torch.manual_seed(0)
    starts = chosen(label, (4, 4, 4), 3, [False, True] * 200)
    assert set(starts[1::2]) == {(0, 0, 0)} and len(set(starts[::2])) > 80


def test_what_is_ignored_is_no_foreground_and_other_patches_lie_around_what_is_not():
    label = np.full((12, 12, 12), 2, np.uint8)  # of two classes
    label[5:7, 5:7, 2], label[6, 6, 9] = 0, 1
    starts = chosen(label, (1, 1, 1), 2, [False] * 300 + [True] * 20, ignore=True)
    assert {int(label[start]) for start in starts[:300]} == {0, 1} and len(set(starts[:300])) == 5
    assert set(starts[300:]) == {(6, 6, 9)}
    label[:] = 2
    assert len(set(chosen(label, (1, 1, 1), 2, [False, True] * 50, ignore=True))) > 50

"""Visits, batches and foreground of an epoch."""

import pytest
import torch

from lib.data import schedule


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_a_number_of_patches_each_volume_is_visited_once():
    assert sorted(schedule.visits([2, 5, 3], None, seeded())) == [0, 1, 2]


@pytest.mark.parametrize("n_patches", [1, 2, 9, 10, 11, 47])
def test_volumes_come_in_permutations_until_there_are_enough_patches(n_patches):
    sizes = [2, 5, 3]
    for seed in range(5):
        visits = schedule.visits(sizes, n_patches, seeded(seed))
        given = [sizes[volume] for volume in visits]
        assert sum(given) >= n_patches > sum(given[:-1])
        for start in range(0, len(visits), 3):
            permutation = visits[start : start + 3]
            assert len(set(permutation)) == len(permutation)
    assert len({tuple(schedule.visits(sizes, n_patches, seeded(seed))) for seed in range(20)}) > 1


def test_batches_mix_the_patches_of_a_queue_and_show_each_once():
    batches = schedule.batches([3, 4, 2, 5], 4, 2, seeded())
    assert [len(batch) for batch in batches] == [4, 4, 4, 2]
    assert sorted(sum(batches, [])) == list(range(14))
    assert set(batches[0]) <= set(range(7))  # the first two volumes
    assert batches[0] != sorted(batches[0])
    assert schedule.batches([4, 4], 4, 2, seeded()) == schedule.batches([4, 4], 4, 2, seeded())


@pytest.mark.parametrize(("size", "expected"), [(2, 1), (4, 1), (7, 2), (9, 3), (12, 4), (281, 93)])
def test_the_share_of_foreground_is_that_of_nnunet_in_every_batch(size, expected):
    batches = schedule.batches([5] * size, size, 16, seeded())
    assert len(batches) == 5
    shows = schedule.foreground(batches, 0.33, 5 * size)
    assert [sum(shows[number] for number in batch) for batch in batches] == [expected] * 5


def test_what_is_in_no_batch_and_a_share_of_0_show_no_foreground():
    assert schedule.foreground([[3, 0], [2, 1]], 0.5, 6) == [True, True, False, False, False, False]
    assert schedule.foreground([[0, 1, 2]], 0.0, 3) == [False] * 3
    assert schedule.foreground([[0, 1, 2]], 1.0, 3) == [True] * 3

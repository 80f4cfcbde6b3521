"""What a network in use is: softmax maps of patches, and their means over mirrorings."""

import numpy as np
import pytest

from lib.network import Network, check_patch_size
from lib.system.error import InputError


class Left(Network):
    """Says the voxel to the left (0 beyond the border), as one class; notes how many patches come at once."""

    modalities, n_classes, dim, divisor = 1, 1, "2D", (1, 1)

    def __init__(self):
        self.batches = []

    def __call__(self, patches):
        self.batches.append(len(patches))
        moved = np.zeros_like(patches)
        moved[..., 1:] = patches[..., :-1]
        return moved


def test_the_mean_over_mirrorings_by_hand():
    patches = np.arange(1, 4, dtype=np.float32).reshape(1, 1, 1, 3)  # 1 2 3
    network = Left()
    assert network.mean(patches, [()], 2).ravel().tolist() == [0, 1, 2]
    # flipped: 3 2 1 -> 0 3 2, and back: 2 3 0
    assert network.mean(patches, [(), (3,)], 2).ravel().tolist() == [1, 2, 1]


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 6), (4, [4, 2]), (100, [6])])
def test_no_more_patches_at_once_than_allowed(batch_size, batches):
    patches = np.random.default_rng(0).normal(size=(3, 1, 4, 5)).astype(np.float32)
    network = Left()
    found = network.mean(patches, [(), (3,)], batch_size)
    assert network.batches == batches
    np.testing.assert_array_equal(found, np.concatenate([Left().mean(one[None], [(), (3,)], 2) for one in patches]))


@pytest.mark.parametrize(("patch", "divisor"), [((16, 24), (4, 8)), ((8, 8, 8), (4, 2, 1))])
def test_patches_that_fit(patch, divisor):
    check_patch_size(patch, divisor)


@pytest.mark.parametrize(
    ("patch", "divisor"), [((16, 20), (4, 8)), ((16,), (4, 4)), ((4, 16), (4, 4)), ((8, 8, 8), (4, 4))]
)
def test_patches_that_do_not_fit(patch, divisor):
    with pytest.raises(
        InputError, match=f"--patch_size {' '.join(map(str, patch))}: this model needs {len(divisor)} num"
    ):
        check_patch_size(patch, divisor)

"""Networks of one width."""

import pytest

from lib.models import nnUNet
from lib.models.flat import flops_of_width, of_width, widest


def by_hand(width):
    """Two FLOPs for each multiply-add of 3 levels on 8 x 8 voxels, from one channel to two classes: the convolutions of
    the encoder, those of the decoder with its ways up, and the head."""
    encoder = 9 * 64 * (width + width**2) + 9 * 16 * 2 * width**2 + 9 * 4 * 2 * width**2
    decoder = (4 * 4 + 9 * 16 * 3) * width**2 + (16 * 4 + 9 * 64 * 3) * width**2
    return 2 * (encoder + decoder + 64 * 2 * width)


def test_every_block_has_one_width():
    model = nnUNet(1, 2, 4, 3)
    network = of_width(model, 7)
    assert {block.name: block.out_filters for block in network.blocks()} == {
        block.name: 2 if block.head else 7 for block in model.blocks()
    }
    assert [*network.state_dict()] == [*model.state_dict()]
    for width in (1, 2, 3, 10):
        assert flops_of_width(model, width, (8, 8)) == by_hand(width)


@pytest.mark.parametrize(
    ("max_flops", "width"),
    [(by_hand(3), 3), (by_hand(3) - 1, 2), (by_hand(4) - 0.5, 3), (by_hand(1), 1), (by_hand(1) - 1, None), (1e99, 9)],
)
def test_the_widest_that_is_allowed(max_flops, width):
    assert widest(nnUNet(1, 2, 4, 3), range(1, 10), max_flops, (8, 8)) == width


def test_none_of_no_widths():
    assert widest(nnUNet(1, 2, 4, 3), range(0), 1e99, (8, 8)) is None

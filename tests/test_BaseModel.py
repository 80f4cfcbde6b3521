import copy
import weakref

import pytest
import torch
from torch import nn

from lib.models import Sauron, nnUNet
from lib.models.BaseModel import IMAGE, BaseModel, Block


def test_weights_start_from_he_normal():
    torch.manual_seed(0)
    model = nnUNet(1, 2, 32, 3)
    model.initialize()
    conv = model.encoder[3].seq[0]
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert conv.bias.abs().max() == 0


@pytest.mark.parametrize("network", [nnUNet, Sauron])
def test_a_map_is_gone_once_its_last_consumer_has_run(network):
    model = network(1, 2, 2, 4)
    last = {parent: i for i, block in enumerate(model.blocks()) for parent in block.parents}
    maps = {}
    with torch.no_grad():
        for i, (block, output) in enumerate(model.run(torch.randn(1, 1, 16, 16))):
            maps[block.name] = weakref.ref(output)
            del output
            alive = {name for name, map_ in maps.items() if map_() is not None}
            assert alive == {block.name} | {name for name in maps if last.get(name, i) > i}
    assert i == len(model.blocks()) - 1


def test_a_copy_has_a_table_of_its_own():
    model = Sauron(1, 2, 2, 3)
    twin = copy.deepcopy(model)
    assert {block.module for block in twin.blocks()} <= set(twin.modules())
    assert not {block.module for block in twin.blocks()} & set(model.modules())
    assert {block.conv.weight for block in model.blocks()} <= set(model.parameters())


def test_the_table_alone_says_what_runs():
    class Small(BaseModel):
        def __init__(self):
            super().__init__()
            self.part = nn.ModuleList()
            for name, filters, parents in [("a", 1, (IMAGE,)), ("b", 2, ("a",)), ("c", 5, ("b", IMAGE, "a"))]:
                self.add(self.part, Block(name, nn.Conv2d(filters, 2, 1), parents))

    model = Small()
    model.initialize()
    assert list(model.state_dict())[-1] == "part.2.bias"
    assert [(block.in_filters, block.out_filters, block.transposed) for block in model.blocks()][2] == (5, 2, False)
    x = torch.randn(1, 1, 4, 4)
    a = model.part[0](x)
    b = model.part[1](a)
    maps = model.forward_saveFMs(x)
    assert list(maps) == ["a", "b", "c"]
    assert maps["c"].equal(model.part[2](torch.cat([b, x, a], 1)))

"""Networks of the FLOPs of another one."""

import copy
from collections import defaultdict

import pytest
import torch

from lib import checkpoint
from lib.experiments import benchmark_networks as networks
from lib.models import load_model, nnUNet
from lib.models.size import summary
from lib.pruning.surgery import prune

needs_torch_pruning = pytest.mark.skipif(
    networks.torch_pruning is None, reason=f"needs pip install {networks.TORCH_PRUNING}"
)


def literal_keep(model, n):
    """{block: filters that stay} when the n least important go: the formula of the docstring, written out."""
    blocks, scores = model.blocks(), defaultdict(list)
    widths = {"image": model.modalities} | {block.name: block.out_filters for block in blocks}
    for block in blocks:
        weight = block.conv.weight.detach()
        if block.transposed:
            weight = weight.transpose(0, 1)
        if not block.head:
            scores[block.name].append(weight.pow(2).flatten(1).sum(1))
        offset = 0
        for parent in block.parents:
            part = weight[:, offset : offset + widths[parent]].transpose(0, 1)
            scores[parent].append(part.pow(2).flatten(1).sum(1))
            offset += widths[parent]
    del scores["image"]
    ranking = []
    for name, layers in scores.items():
        score = torch.stack(layers).mean(0)
        ranking += sorted((s, name, c) for c, s in enumerate((score / score.mean()).tolist()))[:-1]
    gone = {(name, c) for _, name, c in sorted(ranking)[:n]}
    return {name: torch.tensor([c for c in range(widths[name]) if (name, c) not in gone]) for name in scores}


@needs_torch_pruning
@pytest.mark.parametrize(("dim", "patch_size"), [("2D", (64, 64)), ("3D", (16, 32, 16))])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.15])
def test_magnitude_pruning_hits_the_flops(dim, patch_size, share, tmp_path):
    torch.manual_seed(3)
    model = nnUNet(1, 4, 12, 4, dim=dim)
    model.initialize()
    before, copied = summary(model, patch_size), copy.deepcopy(model)
    target = int(share * before["flops"])
    networks.prune_by_magnitude(model, target, patch_size)
    checkpoint.save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    after = summary(loaded, patch_size)
    assert after["flops"] == pytest.approx(target, rel=0.02)
    assert (loaded.n_classes, loaded.modalities, loaded.levels) == (4, 1, 4)
    # our own surgery on the filters that the formula chooses gives the same weights
    prune(copied, None, literal_keep(copied, before["filters"] - after["filters"]))
    expected, found = copied.state_dict(), loaded.state_dict()
    assert list(expected) == list(found)
    assert all(value.equal(found[key]) for key, value in expected.items())


@needs_torch_pruning
def test_magnitude_pruning_keeps_a_filter_in_every_block():
    model = nnUNet(1, 4, 4, 3)
    model.initialize()
    networks.prune_by_magnitude(model, 0, (32, 32))
    assert [block.out_filters for block in model.blocks() if not block.head] == [1] * 12
    assert model(torch.zeros(1, 1, 32, 32))[0].shape == (1, 4, 32, 32)


@pytest.mark.parametrize(("flops", "size"), [(0, 1), (1, 1), (2, 1), (3, 2), (30, 5), (31, 6), (1000, 6)])
def test_the_nearest_size(flops, size):
    assert networks.nearest(range(1, 7), lambda n: n * n, flops) == size  # of 1, 4, 9, 16, 25 and 36


@needs_torch_pruning
def test_pruning_follows_the_strides_of_the_network():
    model = nnUNet(1, 4, 6, 3, strides=[(1, 1), (2, 1), (2, 2)])
    model.initialize()
    target = summary(model, (32, 32))["flops"] // 2
    networks.prune_by_magnitude(model, target, (32, 32))
    assert summary(model, (32, 32))["flops"] == pytest.approx(target, rel=0.1)
    assert model(torch.zeros(1, 1, 32, 32))[0].shape == (1, 4, 32, 32)

"""Taking turns, and the networks whose times are compared."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.experiments.speed_parts import Watched, build, cut_down, interleave, show_ratios, step_flops, timed
from lib.models.nnUNet import nnUNet
from lib.models.Sauron import Sauron
from lib.models.size import summary
from lib.system.error import InputError


def arguments(**other):
    sizes = {"data": "phantom", "fms_init": 8, "levels": 3, "patch_size": (32, 32)}
    return SimpleNamespace(**sizes | other, device=torch.device("cpu"))


def test_sides_take_turns_and_the_warm_up_does_not_count():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert interleave(sides, 2, warm_up=1) == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_a_timed_side_gives_seconds():
    assert 0 < timed(lambda: sum(range(100_000)), torch.device("cpu"))() < 60


def test_a_ratio_is_the_median_over_the_repeats(capsys):
    show_ratios({"ours": [1.0, 2.0, 4.0], "theirs": [2.0, 2.0, 2.0]}, "ours / theirs")
    assert capsys.readouterr().out.split() == ["ours", "/", "theirs", "1.000", "(0.500", "-", "2.000)"]


def test_networks_start_alike_and_the_small_one_has_a_tenth_of_the_flops(capsys):
    args = arguments()
    large, other = build(nnUNet, args), build(Sauron, args)
    assert all(a.equal(b) for a, b in zip(large.state_dict().values(), other.state_dict().values(), strict=True))
    small = cut_down(large, args)
    share = summary(small, (32, 32))["flops"] / summary(large, (32, 32))["flops"]
    assert 0.02 < share <= 0.1
    assert f"{100 * share:.1f}% of the FLOPs" in capsys.readouterr().out


def test_a_size_that_no_network_fits_is_refused():
    with pytest.raises(InputError, match="--patch_size 33 33"):
        build(nnUNet, arguments(patch_size=(33, 33)))


@pytest.mark.parametrize(("data", "size"), [("phantom", (32, 32)), ("phantom3d", (8, 16, 8))])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_has_the_flops_that_torch_counts(data, size, batch):
    model = build(nnUNet, arguments(data=data, patch_size=size))
    images = torch.randn(batch, model.modalities, *size)
    with FlopCounterMode(display=False) as counter:
        sum(output.square().sum() for output in model(images)).backward()
    counted = counter.get_total_flops()
    if batch == 2:
        assert counted == step_flops(model, images)
    assert step_flops(model, images) == batch * step_flops(model, images[:1]) <= counted


def test_watched_gives_the_first_batches_and_notes_each_wait():
    watched = Watched(SimpleNamespace(train_batches=lambda epoch: iter(range(10 * epoch, 10 * epoch + 9))), 3)
    assert (list(watched.train_batches(2)), watched.n_train_batches()) == ([20, 21, 22], 3)
    assert len(watched.waits) == 3 and min(watched.waits) >= 0

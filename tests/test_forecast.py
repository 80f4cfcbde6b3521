"""What a step says of a training."""

import copy
import time

import pytest
import torch

from lib import forecast as module
from lib.forecast import _duration, _kept_for_backward, _short, _size, forecast
from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models import Sauron, nnUNet


@pytest.fixture
def model():
    return Sauron(1, 3, 16, 3)


@pytest.fixture
def clock(monkeypatch):
    """A function that sets how many seconds the steps of the networks with so many first filters take."""

    def takes(seconds):
        now, taken = [0.0], []

        def trial(model, *_):
            width = model.blocks()[0].out_filters

            def step(amp):
                (torch.ones(1000, requires_grad=True) ** 2).sum().backward()  # something is kept
                taken.append((width, amp))
                now[0] += seconds[width][min(sum(w == width for w, _ in taken), len(seconds[width])) - 1]

            return step

        monkeypatch.setattr(module, "trial_step", trial)
        monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
        return taken

    return takes


@pytest.mark.parametrize("precision", [False, True])
def test_the_median_of_three_steps_after_one_tells_the_time(model, clock, precision):
    taken = clock({16: [1.5, 0.2, 0.1, 0.3]})
    epoch, whole = forecast(model, DS_CrossEntropyDiceLoss(), 2, (16, 16), 250, 60, amp=precision)
    assert taken == [(16, precision)] * 4
    assert epoch.startswith("an epoch takes about 50 s here; memory about ") and epoch.endswith("MB more than now")
    assert whole == "60 epochs: about 50 min (the steps alone, without loading and validation)"


def test_a_first_step_that_takes_long_is_the_only_one(model, clock):
    taken = clock({16: [30.0]})
    epoch, whole = forecast(model, DS_CrossEntropyDiceLoss(), 2, (16, 16), 250, 500)
    assert len(taken) == 1
    assert epoch.startswith("an epoch takes about 2.1 h here; memory") and whole.startswith("500 epochs: about 43 days")


def test_where_a_training_is_long_a_smaller_network_is_measured_too(model, clock):
    asked = []

    def smaller(n):
        asked.append(n)
        torch.rand(3)
        return Sauron(1, 3, n, 3)

    state = torch.get_rng_state()
    clock({16: [1.0], 8: [0.25]})
    epoch, whole = forecast(model, DS_CrossEntropyDiceLoss(), 2, (16, 16), 250, 500, smaller)
    assert epoch.startswith("an epoch takes about 4.2 min here; with --fms_init 8 about 62 s; memory")
    assert whole.startswith("500 epochs: about 35 h")
    epoch, _ = forecast(model, DS_CrossEntropyDiceLoss(), 2, (16, 16), 25, 50, smaller)
    assert asked == [8] and "--fms_init" not in epoch
    assert torch.equal(torch.get_rng_state(), state)


def test_a_forecast_leaves_no_trace_and_is_quick(model):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.eval()
    criterion = DS_CrossEntropyDiceLoss_Distance()
    forecast(model, criterion, 2, (16, 16), 10, 3)  # which loads torch's compiler, as the training would
    start = time.perf_counter()
    forecast(model, criterion, 2, (16, 16), 10, 3)
    assert time.perf_counter() - start < 2
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training


def test_what_is_kept_for_the_backward_pass_is_counted_once():
    x, w = torch.ones(1000), torch.ones(1000, requires_grad=True)
    with _kept_for_backward() as kept:
        y = x * w  # keeps x
        z = y.exp()  # keeps its result
        (z * z.view(1000)).sum()  # keeps it again, twice
    assert sorted(kept.values()) == [4000, 4000]


def test_memory_grows_with_the_batch_and_the_patch():
    sizes = [
        module._measured(nnUNet(1, 2, 4, 3), DS_CrossEntropyDiceLoss(), n, patch, False)[1]
        for n, patch in ((1, (32, 32)), (2, (32, 32)), (1, (64, 32)))
    ]
    weights = 16 * sum(parameter.numel() for parameter in nnUNet(1, 2, 4, 3).parameters())
    assert sizes[0] < sizes[1] and sizes[0] < sizes[2]
    # two blocks of 4 filters at full size in the encoder and two in the decoder, each kept before and after the norm
    assert sizes[0] - weights > 8 * 4 * 32 * 32 * 4


def test_three_axes_with_strides_of_their_own():
    network = nnUNet(1, 2, 4, 3, dim="3D", strides=[(1, 1, 1), (1, 2, 2), (1, 2, 2)], kernels=[(1, 3, 3)] * 3)
    epoch, _ = forecast(network, DS_CrossEntropyDiceLoss(), 2, (5, 16, 16), 2, 2)
    assert epoch.startswith("an epoch takes about ")


def test_in_words():
    assert [_duration(s) for s in (0.04, 89, 300, 5400, 47 * 3600, 4.2 * 86400, 300 * 86400)] == [
        "0.04 s",
        "89 s",
        "5 min",
        "1.5 h",
        "47 h",
        "4.2 days",
        "300 days",
    ]
    assert (_size(5.04e9), _size(3e5), _short(1234.5)) == ("5 GB", "0.3 MB", "1234")

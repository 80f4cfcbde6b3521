import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models import Sauron, load_model
from lib.models.filters import format_filters
from lib.models.size import count_filters, summary
from lib.pruning.surgery import prune
from lib.trainer import compute_loss

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=1e-3),
}


def make(dim, optimizer="adam", dtype=torch.float64):
    model = Sauron(1, 3, 4, 4, dim=dim).to(dtype)
    model.initialize()
    return model, OPTIMIZERS[optimizer](model.parameters())


def batch(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (16, 16) if dim == "2D" else (16, 16, 16)
    x = torch.randn(1, 1, *size, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (1, *size), generator=generator)


def zero_deleted(model, keep):
    """Hooks that zero the deleted maps after each block: the literal meaning of deletion for every consumer."""
    hooks = []
    for block in model.blocks():
        if block.name in keep:
            mask = torch.zeros(block.out_filters, dtype=torch.float64)
            mask[keep[block.name]] = 1
            module = next(m for m in [*model.encoder, *model.decoder] if block.conv in m.modules())

            def hook(_module, _inputs, output, mask=mask):
                return output * mask.reshape(1, -1, *[1] * (output.ndim - 2))

            hooks.append(module.register_forward_hook(hook))
    return hooks


def random_keep(model, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for block in model.blocks():
        if not block.head and torch.rand(1, generator=generator) < 0.8:
            kept = torch.rand(block.out_filters, generator=generator) < 0.7
            kept[0] = True
            keep[block.name] = kept.nonzero().flatten()
    return keep


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = DS_CrossEntropyDiceLoss()(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("dim", ["2D", "3D"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruning_equals_zeroed_maps_now_and_after_the_next_steps(dim, optimizer):
    torch.manual_seed(0)
    model, optim = make(dim, optimizer)
    for round_ in range(3):
        for i in range(2):
            step(model, optim, *batch(dim, 10 * round_ + i))
        reference = copy.deepcopy(model)
        ref_optim = OPTIMIZERS[optimizer](reference.parameters())
        ref_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
        keep = random_keep(model, round_)
        hooks = zero_deleted(reference, keep)
        prune(model, optim, keep)

        x, y = batch(dim, 99)
        for a, b in zip(model(x), reference(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        # the next two optimizer steps equal as well: the moments were cut along with the weights
        for i in range(2):
            x, y = batch(dim, 100 + i)
            a, b = step(model, optim, x, y), step(reference, ref_optim, x, y)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for hook in hooks:
            hook.remove()


def test_surgery_with_a_stride_and_a_kernel_per_axis(tmp_path):
    torch.manual_seed(0)
    strides, kernels = [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)], [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 5)]
    model = Sauron(1, 3, 4, 4, dim="3D", strides=strides, kernels=kernels).double()
    model.initialize()
    optim = OPTIMIZERS["adam"](model.parameters())
    x, y = torch.randn(1, 1, 4, 16, 16, dtype=torch.float64), torch.randint(0, 3, (1, 4, 16, 16))
    step(model, optim, x, y)
    reference = copy.deepcopy(model)
    ref_optim = OPTIMIZERS["adam"](reference.parameters())
    ref_optim.load_state_dict(copy.deepcopy(optim.state_dict()))
    keep = random_keep(model, 0)
    zero_deleted(reference, keep)
    prune(model, optim, keep)
    for _ in range(2):
        for a, b in zip(model(x), reference(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(step(model, optim, x, y), step(reference, ref_optim, x, y), rtol=1e-9, atol=1e-12)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert summary(model, (4, 16, 16))["flops"] == counter.get_total_flops()
    torch.save(model.state_dict(), tmp_path / "model-1")
    loaded = load_model(tmp_path / "model-1")
    assert count_filters(loaded) == count_filters(model)
    torch.testing.assert_close(loaded(x.float())[0], model.float()(x.float())[0])


@pytest.mark.parametrize(
    ("strides", "kernels", "patch"),
    [
        ([(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)], [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)], (5, 16, 16)),
        ([(1, 1, 1), (1, 2, 2), (1, 2, 2)], [(1, 3, 3)] * 3, (1, 16, 16)),
        ([(1, 1, 1), (2, 2, 2), (1, 2, 2)], [(3, 3, 3)] * 3, (2, 16, 16)),
    ],
    ids=["5 slices", "1 slice", "down to 1 slice"],
)
def test_flat_patches_train_are_pruned_and_counted(tmp_path, strides, kernels, patch):
    """With the distance term, deep supervision, and an axis that is never halved, or has one voxel."""
    torch.manual_seed(0)
    model = Sauron(2, 3, 4, len(strides), dim="3D", strides=strides, kernels=kernels)
    model.initialize()
    optim = OPTIMIZERS["adam"](model.parameters())
    x, y = torch.randn(2, 2, *patch), torch.randint(0, 4, (2, *patch))
    criterion, losses = DS_CrossEntropyDiceLoss_Distance(0.5, ignore=True), []
    for round_ in range(6):
        loss, measured = compute_loss(model, criterion, x, y, delta_prune=True)
        optim.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optim.step()
        losses.append(loss.item())
        assert [output.shape[2:] for output in measured.outputs][0] == patch
        assert all(delta.isfinite().all() for delta, _ in measured.delta_prune.values())
        if round_ == 2:
            prune(model, optim, random_keep(model, 0))
    assert losses[2] < losses[0] and losses[5] < losses[3]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x[:1])
    assert summary(model, patch)["flops"] == counter.get_total_flops()
    torch.save(model.state_dict(), tmp_path / "model-1")
    counted = count_filters(model)
    (tmp_path / "out_filters").write_text(format_filters([counted["out"]]))
    (tmp_path / "in_filters").write_text(format_filters([counted["in"]]))
    loaded = load_model(tmp_path / "model-1", "cpu", tmp_path / "in_filters", tmp_path / "out_filters")
    assert (loaded.strides, loaded.kernels) == (model.strides, model.kernels)
    torch.testing.assert_close(loaded(x)[0], model.eval()(x)[0])


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_every_consumer_and_parameter_group_follows(tmp_path, dim):
    model, _ = make(dim)
    encoder, rest = list(model.encoder.parameters()), [*model.decoder.parameters(), *model.last.parameters()]
    optim = torch.optim.Adam([{"params": encoder, "lr": 0.5}, {"params": rest, "lr": 0.25, "weight_decay": 0.125}])
    step(model, optim, *batch(dim, 0))
    up = f"dec_ConvTranspose{dim.lower()}_3"
    prune(model, optim, {"enc_ConvBlock_2": torch.tensor([1, 3]), up: torch.tensor([0])})
    counted = count_filters(model)
    assert counted["out"]["enc_ConvBlock_2"] == 2
    assert counted["in"]["enc_ConvBlock_3"] == 2  # a skip feeds two consumers: the next level ...
    assert counted["in"]["dec_ConvBlock_5"] == 2 + 1  # ... and the decoder, before the maps that come up
    assert counted["in"][up] == 8
    names = {id(p) for p in model.parameters()}
    for group, lr, size in zip(optim.param_groups, (0.5, 0.25), (len(encoder), len(rest)), strict=True):
        assert group["lr"] == lr
        assert len(group["params"]) == size
    assert {id(p) for group in optim.param_groups for p in group["params"]} == names
    assert {id(p) for p in optim.state} == names
    for p, values in optim.state.items():
        assert values["exp_avg"].shape == values["exp_avg_sq"].shape == p.shape
        assert values["step"] == 1
    torch.save(model.state_dict(), tmp_path / "model-1")
    x = batch(dim, 1)[0].float()
    torch.testing.assert_close(load_model(tmp_path / "model-1")(x)[0], model.float()(x)[0])


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_parts_that_nothing_feeds_stay_the_same_objects(dim):
    model, optim = make(dim)
    untouched = model.encoder[0].seq[0].weight
    prune(model, optim, {"dec_ConvBlock_6": torch.tensor([0, 2])})
    assert model.encoder[0].seq[0].weight is untouched
    assert model.last[1][0].weight.shape == (3, 2, *[1] * int(dim[0]))

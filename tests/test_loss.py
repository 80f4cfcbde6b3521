import math

import pytest
import torch
import torch.nn.functional as F

from lib.loss import (
    DS_CrossEntropyDiceLoss,
    DS_CrossEntropyDiceLoss_Distance,
    cross_entropy,
    dice_loss,
    resize_labels,
)


def test_cross_entropy_by_hand():
    # two voxels with p(true) = 1/2 and 1/4
    p = torch.tensor([[[[0.5, 0.75]], [[0.5, 0.25]]]])
    y = torch.tensor([[[0, 1]]])
    assert cross_entropy(p, y).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_dice_loss_by_hand():
    # class 0: sum(p y) = 0.5, sum(p) = 1.25, sum(y) = 1; class 1: 0.25, 0.75, 1
    p = torch.tensor([[[[0.5, 0.75]], [[0.5, 0.25]]]])
    y = torch.tensor([[[0, 1]]])
    assert dice_loss(p, y).item() == pytest.approx(1 - (1 / 2.25 + 0.5 / 1.75) / 2)


def test_dice_loss_of_a_class_that_is_nowhere_is_finite():
    p = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    y = torch.zeros(1, 1, 2, dtype=torch.int64)
    assert dice_loss(p, y).item() == pytest.approx(0.5)  # Dice 1 for the background, 0 for the absent class


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 4, 8, 4)])
def test_loss_equals_literal_formula(shape):
    labels = torch.randint(0, 3, shape)
    outputs = [
        torch.softmax(torch.randn(shape[0], 3, *(size // 2**k for size in shape[1:])), 1).requires_grad_()
        for k in range(2)
    ]
    expected = 0
    for k, p in enumerate(outputs):
        steps = (slice(None), *[slice(None, None, 2**k)] * (len(shape) - 1))
        y = F.one_hot(labels[steps], 3).movedim(-1, 1).float()
        ce = -(y * p.log()).sum(1).mean()
        axes = tuple(range(2, y.ndim))
        dice = 2 * (p * y).sum(axes) / (p.sum(axes) + y.sum(axes) + 1e-8)
        expected = expected + ce + 1 - dice.mean()
    loss = DS_CrossEntropyDiceLoss()(outputs, labels)
    torch.testing.assert_close(loss, expected)
    delta_opt = {"a": torch.tensor([[0.2, 0.4]]), "b": torch.empty(1, 0), "c": torch.tensor([[0.6]])}
    total = DS_CrossEntropyDiceLoss_Distance(0.5)(outputs, labels, delta_opt)
    assert (total - loss).item() == pytest.approx(0.5 * (0.3 + 0 + 0.6) / 3, abs=1e-6)


def test_targets_are_not_transposed_and_keep_every_second_voxel():
    labels = torch.arange(24).reshape(1, 4, 6)
    assert resize_labels(labels, torch.Size([2, 3])).tolist() == [[[0, 2, 4], [12, 14, 16]]]


def test_targets_follow_the_size_of_the_output_on_each_axis():
    labels = torch.arange(24).reshape(1, 4, 6)
    assert resize_labels(labels, torch.Size([4, 2])).tolist() == [[[0, 3], [6, 9], [12, 15], [18, 21]]]


def test_odd_sizes_follow_the_head():
    assert resize_labels(torch.arange(5).reshape(1, 1, 5).expand(1, 5, 5), torch.Size([3, 3])).shape == (1, 3, 3)


def test_gradients_are_finite_where_a_probability_is_zero():
    logits = torch.tensor([[200.0, -200.0]]).reshape(1, 2, 1, 1).expand(1, 2, 4, 4).clone().requires_grad_()
    loss = DS_CrossEntropyDiceLoss()([logits.softmax(1)], torch.ones(1, 4, 4, dtype=torch.int64))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


# ---- voxels that are ignored


def test_ignored_voxels_do_not_count_by_hand():
    # the second of two voxels has no class; class 0: sum(p y) = sum(p) = 0.5, sum(y) = 1; class 1: 0, 0.5, 0
    p = torch.tensor([[[[0.5, 0.75]], [[0.5, 0.25]]]])
    y = torch.tensor([[[0, 2]]])
    assert cross_entropy(p, y, ignore=True).item() == pytest.approx(math.log(2))
    assert dice_loss(p, y, ignore=True).item() == pytest.approx(1 - (2 / 3 + 0) / 2)


def test_the_cross_entropy_without_an_ignored_voxel_is_that_of_nnunet():
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 0, 0, 0], logits[0, 0, 1, 1], logits[0, 1, 0, 1], logits[0, 2, 1, 0] = 2, 1, 1, 3
    labels = torch.tensor([[[0, 1], [2, 0]], [[0, 0], [1, 1]]])
    assert cross_entropy(logits.softmax(1), labels, ignore=True).item() == pytest.approx(0.7289758)
    labels[0, 0, 0] = 3
    assert cross_entropy(logits.softmax(1), labels, ignore=True).item() == pytest.approx(0.3103243 + 0.4885702)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 4, 6, 8)])
def test_the_loss_is_that_of_the_voxels_that_count(shape):
    """Whatever stands at the others, which get no gradient at any head."""
    labels = torch.randint(0, 3, shape)
    logits = [torch.randn(shape[0], 3, *(size // 2**k for size in shape[1:])).requires_grad_() for k in range(2)]
    halves = [one.detach()[..., one.shape[-1] // 2 :] for one in logits]
    expected = DS_CrossEntropyDiceLoss()([half.softmax(1) for half in halves], labels[..., 4:])
    labels[..., :4] = 3
    loss = DS_CrossEntropyDiceLoss(ignore=True)([one.softmax(1) for one in logits], labels)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    for one in logits:
        ignored, counted = one.grad.chunk(2, -1)
        assert (ignored == 0).all() and (counted != 0).any()


def test_a_batch_in_which_nothing_counts_has_a_finite_loss():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = DS_CrossEntropyDiceLoss_Distance(0.5, ignore=True)(
        [logits.softmax(1)], torch.full((2, 4, 4), 3), {"a": torch.ones(2, 1)}
    )
    loss.backward()
    assert loss.item() == pytest.approx(1 + 0.5) and (logits.grad == 0).all()


def test_without_ignored_voxels_nothing_changes():
    p, y = torch.randn(2, 3, 8, 8).softmax(1), torch.randint(0, 3, (2, 8, 8))
    torch.testing.assert_close(DS_CrossEntropyDiceLoss(ignore=True)([p], y), DS_CrossEntropyDiceLoss()([p], y))


def test_targets_of_levels_that_do_not_halve_every_axis():
    labels = torch.arange(5 * 16 * 16).reshape(1, 5, 16, 16)
    assert resize_labels(labels, torch.Size([5, 8, 8])).equal(labels[:, :, ::2, ::2])
    assert resize_labels(labels[:, :1], torch.Size([1, 4, 16])).equal(labels[:, :1, ::4])

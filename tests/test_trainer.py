import copy
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from lib import checkpoint
from lib.build import build_optimizer
from lib.checkpoint import TrainingState
from lib.loss import DS_CrossEntropyDiceLoss, DS_CrossEntropyDiceLoss_Distance
from lib.models import Sauron, compile_model, nnUNet
from lib.pruning.rules import Rule
from lib.pruning.surgery import prune
from lib.settings import Settings
from lib.system.error import InputError
from lib.trainer import compute_loss, fit, overlap, poly_lr, validate

CPU = torch.device("cpu")


class TinyData:
    """Two batches an epoch, drawn from the epoch's number; one validation volume."""

    dataset, batch_size = SimpleNamespace(n_classes=2), 2

    def n_train_batches(self):
        return 2

    def train_batches(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(2):
            image = torch.randn(2, 1, 8, 8, generator=generator)
            yield {"image": image, "label": (image[:, 0] > 0).long(), "id": ["a", "b"]}

    def validation_volumes(self):
        image = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        yield {"image": image, "label": (image[:, 0] > 0).long(), "id": "v"}


class Watching(Rule):
    """Measures, and deletes nothing."""

    measures = True


def is_done_after_2(state):
    if state.epoch >= 2:
        state.rule.done = 2


def make_state(folder, epoch=0, kind=Sauron):
    (folder / "models").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    model = kind(1, 2, 2, 3)
    model.initialize()
    return TrainingState(model, torch.optim.Adam(model.parameters(), lr=1), folder, print, epoch, rule=Watching())


def run(state, callbacks=(), epochs=4, data=None, amp=False):
    settings = {"epochs": epochs, "lr": 1e-2, "val_interval": 2, "device": CPU, "amp": amp}
    fit(state, DS_CrossEntropyDiceLoss_Distance(0.5), data or TinyData(), callbacks, **settings)


def test_once_the_budget_is_met_the_segmentation_loss_alone_trains(tmp_path, monkeypatch):
    """In validation, too, and no distance is measured; the same after a resume."""
    seen, measure = [], compute_loss

    def recorded(model, criterion, images, labels, delta_prune=False, amp=False):
        seen.append((criterion.uses_distances, delta_prune, model.training))
        return measure(model, criterion, images, labels, delta_prune, amp)

    monkeypatch.setattr("lib.trainer.compute_loss", recorded)
    state = make_state(tmp_path)
    run(state, [is_done_after_2])
    rounds = {True: [(True, False, True), (True, True, True)], False: [(False, False, True)] * 2}
    validation = [(uses, False, False) for uses in (True, True, False, False)]  # two batches in epochs 2 and 4
    assert seen == [*rounds[True], *rounds[True], *validation[:2], *rounds[False], *rounds[False], *validation[2:]]
    assert state.delta_prune == {}
    seen.clear()
    state.epoch = 3
    run(state)
    assert seen == [*rounds[False], *validation[2:]]


def test_once_the_budget_is_met_the_learning_rate_starts_anew(tmp_path):
    """For the epochs that are left; a resume in their midst goes on with it."""
    state = make_state(tmp_path)
    run(state, [is_done_after_2], epochs=5)
    rates = [row["lr"] for row in state.rows]
    assert rates == pytest.approx([1e-2, 1e-2 * 0.8**0.9, 1e-2, 1e-2 * (2 / 3) ** 0.9, 1e-2 * (1 / 3) ** 0.9])
    assert state.optimizer.param_groups[0]["lr"] == rates[-1]
    del state.rows[3:]
    state.epoch = 3
    run(state, epochs=5)
    assert [row["lr"] for row in state.rows] == rates


def test_learning_rate_falls_to_zero_over_the_epochs():
    assert poly_lr(0.1, 1, 500) == 0.1
    assert poly_lr(0.1, 251, 500) == pytest.approx(0.1 * 0.5**0.9)
    assert poly_lr(0.1, 500, 500) == pytest.approx(0.1 * 0.002**0.9)


def test_epochs_validation_and_callbacks_come_in_order(tmp_path):
    state, seen = make_state(tmp_path), []
    run(
        state,
        [lambda s: seen.append(("first", s.epoch, len(s.delta_prune))), lambda s: seen.append(("second", s.epoch))],
    )
    assert seen == [x for e in range(1, 5) for x in (("first", e, 12), ("second", e))]
    assert [row["val_loss"] is None for row in state.rows] == [True, False, True, False]
    assert list(state.validation) == ["2", "4"]
    assert state.rows[-1]["train_loss"] < state.rows[0]["train_loss"]


def test_delta_prune_is_measured_in_the_last_batch_only(tmp_path, monkeypatch):
    state = make_state(tmp_path)
    calls = []
    measure = state.model.imp_fun
    monkeypatch.setattr(state.model, "imp_fun", lambda h, sf: calls.append(h.shape) or measure(h, sf))
    run(state, epochs=1)
    assert len(calls) == len(state.delta_prune) == 12


def test_a_stopped_and_continued_training_is_bit_for_bit_the_same(tmp_path):
    whole = make_state(tmp_path / "whole")
    run(whole)
    half = make_state(tmp_path / "half")

    def stop(state):
        checkpoint.save(state)
        if state.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(half, [stop])
    torch.manual_seed(12345)
    again = make_state(tmp_path / "again")
    again.model.initialize(model_state=tmp_path / "half" / "models" / "model-2")
    checkpoint.restore(again, checkpoint.read_training(tmp_path / "half" / "models" / "state-2"))
    run(again)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert a.equal(b)
    assert [r["train_loss"] for r in again.rows] == [r["train_loss"] for r in whole.rows]
    for name, (delta, r) in whole.delta_prune.items():
        assert delta.equal(again.delta_prune[name][0])
        assert r == again.delta_prune[name][1]


def test_loss_that_is_not_finite_names_the_subjects_and_keeps_the_weights(tmp_path):
    class Broken(TinyData):
        def train_batches(self, epoch):
            yield {"image": torch.full((2, 1, 8, 8), torch.nan), "label": torch.zeros(2, 8, 8).long(), "id": ["q", "p"]}

    state = make_state(tmp_path)
    before = copy.deepcopy(state.model.state_dict())
    with pytest.raises(InputError, match="nan in epoch 1, on images of p, q"):
        run(state, data=Broken())
    assert all(value.equal(before[key]) for key, value in state.model.state_dict().items())


def test_validation_dice_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            foreground = (x[:, :1] > 0).float().clamp(0.01, 0.99)
            return [torch.cat([1 - foreground, foreground], 1)]

    class Data(TinyData):
        def validation_volumes(self):
            image = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 2, 2)
            yield {"image": image, "label": torch.tensor([[[1, 0], [0, 0]]]), "id": "one"}
            yield {"image": -image.abs(), "label": torch.zeros(1, 2, 2).long(), "id": "empty"}

    loss, dice, scores = validate(Fixed(), DS_CrossEntropyDiceLoss(), Data(), CPU)
    assert scores == {"one": [0.8, 2 / 3], "empty": [1.0, None]}  # 2 TP / (predicted + true)
    assert dice == [pytest.approx(0.9), pytest.approx(2 / 3)]
    assert loss > 0


def test_overlap_counts():
    prediction, truth = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])
    assert overlap(prediction, truth, 3).tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 2]]


def test_overlap_leaves_out_what_is_ignored():
    prediction, truth = torch.tensor([0, 1, 1, 2, 2, 0]), torch.tensor([0, 1, 2, 2, 3, 3])
    assert overlap(prediction, truth, 3).tolist() == [[1, 1, 1], [1, 2, 1], [1, 1, 2]]


def test_a_training_with_ignored_voxels(tmp_path):
    """Also after a budget is met, and where a validation volume has nothing but them."""

    class Data(TinyData):
        def train_batches(self, epoch):
            for batch in super().train_batches(epoch):
                batch["label"][:, :4] = 2
                yield batch

        def validation_volumes(self):
            yield from super().validation_volumes()
            yield {"image": torch.randn(1, 1, 8, 8), "label": torch.full((1, 8, 8), 2), "id": "none"}

    state = make_state(tmp_path)
    settings = {"epochs": 4, "lr": 1e-2, "val_interval": 2, "device": CPU}
    fit(state, DS_CrossEntropyDiceLoss_Distance(0.5, ignore=True), Data(), [is_done_after_2], **settings)
    assert state.rows[-1]["train_loss"] < state.rows[0]["train_loss"]
    assert state.validation["4"]["dice"]["none"] == [None, None]


def test_lambda_changes_the_gradient_and_a_plain_network_needs_no_distances(tmp_path):
    batch = next(iter(TinyData().train_batches(1)))
    model = make_state(tmp_path).model
    plain, _ = compute_loss(model, DS_CrossEntropyDiceLoss(), batch["image"], batch["label"])
    total, measured = compute_loss(model, DS_CrossEntropyDiceLoss_Distance(0.5), batch["image"], batch["label"], True)
    mean = torch.stack([d.mean() for d in model(batch["image"], delta_opt=True).delta_opt.values()]).mean()
    torch.testing.assert_close(total, plain + 0.5 * mean)
    assert len(measured.delta_prune) == 12
    same = make_state(tmp_path, kind=nnUNet).model
    torch.testing.assert_close(compute_loss(same, DS_CrossEntropyDiceLoss(), batch["image"], batch["label"])[0], plain)


def test_optimizers_take_their_settings():
    model = nnUNet(1, 2, 2, 3)
    adam = build_optimizer(Settings.of({"data": "acdc", "lr": 0.5, "wd": 0.25}), model)
    assert (type(adam).__name__, adam.defaults["lr"], adam.defaults["weight_decay"]) == ("Adam", 0.5, 0.25)
    given = {"data": "acdc", "optim": "sgd", "lr": 0.5, "wd": 0.25, "momentum": 0.75, "nesterov": False}
    sgd = build_optimizer(Settings.of(given), model)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.75, False)


def test_amp_trains_and_is_near_to_float32(tmp_path):
    rows = []
    for amp in (False, True):
        state = make_state(tmp_path)
        run(state, amp=amp)
        rows.append(state.rows)
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    for plain, fast in zip(*rows, strict=True):
        assert fast["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05)
    assert rows[0] != rows[1]


def test_amp_continues_to_the_bit(tmp_path):
    whole = make_state(tmp_path / "a")
    run(whole, [checkpoint.save], epochs=2, amp=True)
    continued = make_state(tmp_path / "b")
    continued.model.load_state_dict(whole.model.state_dict())
    checkpoint.restore(continued, checkpoint.read_training(tmp_path / "a" / "models" / "state-2"))
    run(whole, epochs=4, amp=True)
    run(continued, epochs=4, amp=True)
    for a, b in zip(whole.model.parameters(), continued.model.parameters(), strict=True):
        assert torch.equal(a, b)


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler is here")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])])
def test_a_compiled_training_prunes_and_gives_the_same(tmp_path, monkeypatch, backend):
    """Losses, pruning and keys; what was compiled before the surgery is compiled anew, not left."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    states, n_graphs = [], []
    for compiled in (False, True):
        state = make_state(tmp_path / str(compiled))
        if compiled:
            compile_model(state.model, CPU)

        def halve(state):
            n_graphs.append(counters["stats"]["unique_graphs"])
            if state.epoch == 1:
                prune(state.model, state.optimizer, {"enc_ConvBlock_1": torch.tensor([1])})

        run(state, [halve], epochs=2)
        states.append(state)
    plain, compiled = states
    assert n_graphs[0] == n_graphs[1] < n_graphs[2] < n_graphs[3]
    for a, b in zip(plain.rows, compiled.rows, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
    assert compiled.rows[1]["val_loss"] == pytest.approx(plain.rows[1]["val_loss"], rel=1e-4)
    assert [r for _, r in compiled.delta_prune.values()] == [r for _, r in plain.delta_prune.values()]
    assert list(compiled.model.state_dict()) == list(plain.model.state_dict())


def test_where_nothing_can_be_compiled_a_line_says_so(monkeypatch):
    def fail(function):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(InputError, match=r"--compile: does not work here \(no compiler\); install"):
        compile_model(nnUNet(1, 2, 2, 3), CPU)

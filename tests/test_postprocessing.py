import json
from itertools import product

import numpy as np
import pytest

from lib.postprocessing import Decision, apply, count, decide, keep_largest, read_steps, write_decision
from lib.system.error import InputError

NAMES = ("background", "left", "right")


def cubes():
    """Two cubes of 4 x 4 x 4 side by side, of the labels 1 and 2, in (6, 12, 12)."""
    truth = np.zeros((6, 12, 12), np.uint8)
    truth[1:5, 1:5, 1:5] = 1
    truth[1:5, 1:5, 5:9] = 2
    return truth


def with_far_voxels(truth):
    predicted = truth.copy()
    predicted[5, 11, 0] = 1
    predicted[0, 11, 11] = 2
    return predicted


def decision_of(*cases, names=NAMES):
    return decide([count(predicted, truth, len(names)) for predicted, truth in cases], names)


def as_nnunet(cases, n_classes):
    """nnU-Net's procedure word by word: one pass over all cases for each step."""

    def means(cases):
        dice = np.full((len(cases), n_classes - 1), np.nan)
        for i, (predicted, truth) in enumerate(cases):
            for c in range(1, n_classes):
                p, t = (labels[truth != n_classes] == c for labels in (predicted, truth))
                if p.any() or t.any():
                    dice[i, c - 1] = 2 * np.sum(p & t) / (p.sum() + t.sum())
        return np.array([np.mean(d[~np.isnan(d)]) if not np.isnan(d).all() else np.nan for d in dice.T])

    steps, now = [], means(cases)
    for step in ("foreground", *(range(1, n_classes) if n_classes > 2 else ())):
        changed = [(keep_largest(predicted, step), truth) for predicted, truth in cases]
        then = means(changed)
        if step == "foreground":
            better = np.mean(then) > np.mean(now) and not (then < now).any()
        else:
            better = then[step - 1] > now[step - 1]
        if better:
            steps, cases, now = [*steps, step], changed, then
    return tuple(steps)


def test_the_largest_component_of_the_foreground_or_of_a_class():
    truth = cubes()
    predicted = with_far_voxels(truth)
    assert np.array_equal(keep_largest(predicted, "foreground"), truth)
    one, two = keep_largest(predicted, 1), keep_largest(predicted, 2)
    assert np.argwhere(one != predicted).tolist() == [[5, 11, 0]]
    assert np.argwhere(two != predicted).tolist() == [[0, 11, 11]]
    assert np.array_equal(apply(predicted, [1, 2]), truth)
    assert np.array_equal(predicted, with_far_voxels(truth))  # what was given stays


@pytest.mark.parametrize("order", "CF")
def test_nothing_is_copied_where_nothing_goes(order):
    truth = np.asarray(cubes(), order=order)
    for which in ("foreground", 1, 2, 7):
        assert keep_largest(truth, which) is truth
    assert apply(truth, ()) is truth and apply(np.zeros_like(truth), (1, "foreground")).max() == 0
    kept = keep_largest(np.asarray(with_far_voxels(truth), np.int16, order=order), "foreground")
    assert kept.dtype == np.int16 and np.array_equal(kept, truth) and np.isfortran(kept) == (order == "F")


def test_voxels_that_share_a_corner_are_connected():
    volume = np.zeros((4, 4, 4), np.uint8)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[3, 3, 3] = 1
    assert np.argwhere(keep_largest(volume, 1)).tolist() == [[0, 0, 0], [1, 1, 1]]
    flat = np.zeros((5, 5, 1), np.uint8)
    flat[0, 0] = flat[1, 1] = flat[4, 4] = 1
    assert np.argwhere(keep_largest(flat, 1)[..., 0]).tolist() == [[0, 0], [1, 1]]


def test_components_of_one_size_all_stay():
    line = np.array([1, 1, 0, 1, 1, 0, 1], np.uint8).reshape(-1, 1, 1)
    assert keep_largest(line, 1).ravel().tolist() == [1, 1, 0, 1, 1, 0, 0]


def test_a_step_that_raises_the_mean_of_the_foreground_is_kept():
    truth = cubes()
    decision = decision_of((with_far_voxels(truth), truth), (truth, truth))
    assert decision.steps == ("foreground",)
    first, *classes = decision.reasons
    assert first["dice"] == pytest.approx([0.9961240310077519, 1.0], abs=1e-15)
    assert first["why"] == "largest component of the foreground alone: kept (mean Dice 0.9961 -> 1.0000)"
    assert [(one["step"], one["kept"], one["dice"]) for one in classes] == [(1, False, [1, 1]), (2, False, [1, 1])]
    assert classes[0]["why"] == "largest component of left alone: not kept (mean Dice 1.0000 -> 1.0000)"


def test_the_foreground_stays_where_a_class_would_lose():
    truth = cubes()
    truth[1:3, 10:12, 10:12] = 2  # a part of its own
    decision = decision_of((with_far_voxels(truth), truth), (truth, truth))
    assert decision.steps == (1,)
    assert [one["kept"] for one in decision.reasons] == [False, True, False]


def test_a_mean_that_rises_does_not_outweigh_a_class_that_loses():
    truth = cubes()
    predicted = truth.copy()
    predicted[5, 9:, 0:4] = 1  # much that is wrong
    truth[5, 11, 11] = predicted[5, 11, 11] = 2  # little that is right
    decision = decision_of((predicted, truth))
    first = decision.reasons[0]
    assert first["dice"][1] > first["dice"][0] and decision.steps == (1,)
    assert first["why"].endswith(", but lower for right)")


def test_one_class_has_the_step_of_the_foreground_alone():
    truth = (cubes() > 0).astype(np.uint8)
    predicted = truth.copy()
    predicted[5, 11, 0] = 1
    decision = decision_of((predicted, truth), names=NAMES[:2])
    assert decision.steps == ("foreground",) and len(decision.reasons) == 1


def test_a_class_that_is_nowhere_gives_no_mean_and_one_that_is_removed_counts_no_more():
    truth, names = cubes(), (*NAMES, "nowhere")
    decision = decision_of((with_far_voxels(truth), truth), (truth, truth), names=names)
    assert decision.steps == (1, 2)
    assert decision.reasons[0]["dice"] == [None, None] and decision.reasons[3]["dice"] == [None, None]
    assert decision.reasons[0]["why"].endswith("not kept (no mean Dice, because a class is in no case)")
    json.dumps(decision, allow_nan=False)
    alone = np.where(truth == 1, truth, 0)  # label 2 is in neither the truth nor what the step leaves
    predicted = alone.copy()
    predicted[0, 11, 11] = 2
    assert decision_of((predicted, alone), (truth, truth)).steps == ("foreground",)
    assert decision_of((predicted, alone)).steps == ()  # class 2 has a mean of 0 before, and none then


def test_ignored_voxels_do_not_count_but_connect():
    truth = cubes()
    predicted = truth.copy()
    predicted[5, 9:, 0] = 1  # wrong, but ...
    truth[5, 9:, 0] = 3  # ... nobody knows
    assert decision_of((predicted, truth)).steps == ()
    assert count(predicted, truth, 3)[0, 0].tolist() == [[64, 0, 0], [64, 0, 0]]
    assert count(truth, truth * (truth < 3), 3)[0, 0].tolist() == [[64, 0, 0], [64, 0, 0]]


@pytest.mark.parametrize("n_classes", [2, 3, 4])
def test_the_steps_are_those_of_nnunets_procedure(n_classes):
    chosen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        cases = []
        for _ in range(rng.integers(1, 4)):
            truth = np.zeros((6, 10, 10), np.uint8)
            for c, start in product(range(1, n_classes), rng.integers(0, 7, 2)):
                if rng.random() < 0.6:
                    truth[rng.integers(4) :, start : start + 3, 3 * (c - 1) : 3 * c] = c
            predicted = truth.copy()
            for c in rng.integers(0, n_classes, rng.integers(0, 4)):
                x, y, z = rng.integers(0, (6, 9, 9))
                predicted[x, y : y + 2, z : z + 2] = c
            truth[rng.random(truth.shape) < 0.02] = n_classes
            cases.append((predicted, truth))
        names = [f"class {c}" for c in range(n_classes)]
        steps = decision_of(*cases, names=names).steps
        assert steps == as_nnunet(cases, n_classes)
        chosen.add(steps)
    assert len(chosen) > 2 or n_classes == 2


def test_empty_maps_and_memory_order():
    empty, truth = np.zeros((6, 12, 12), np.uint8), cubes()
    assert count(empty, empty, 3).tolist() == np.zeros((2, 2, 2, 3)).tolist()
    assert count(empty, truth, 3)[1, 1].tolist() == [[0, 0, 64], [0, 0, 64]]
    predicted = with_far_voxels(truth)
    fortran = count(np.asfortranarray(predicted), np.asfortranarray(truth), 3)
    assert np.array_equal(fortran, count(predicted, truth, 3))


# --- beside the model -------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "models" / "model-60"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return path


def test_steps_belong_to_the_model_that_they_were_decided_for(model, tmp_path):
    assert read_steps(model) == (None, None)
    write_decision(model, Decision(("foreground", 2), [{"step": 2}]))
    content = json.loads((tmp_path / "postprocessing.json").read_text())
    assert list(content) == ["model", "sha256", "steps", "reasons"] and content["steps"] == ["foreground", 2]
    assert read_steps(model) == (("foreground", 2), None)
    other = model.with_name("model-50")
    other.write_bytes(b"others")
    steps, line = read_steps(other)
    assert steps is None and line.endswith("postprocessing.json: decided for model-60, not applied to model-50")
    model.write_bytes(b"trained anew")
    assert read_steps(model)[1].endswith("decided for another model-60, not applied to model-60")
    write_decision(model, Decision((), []))
    assert read_steps(model) == ((), None) and read_steps(other) == (None, None)  # nothing that is not applied


def test_a_model_outside_a_run_has_no_steps(model, tmp_path):
    write_decision(model, Decision((1,), []))
    alone = tmp_path / "model-60"
    alone.write_bytes(model.read_bytes())
    assert read_steps(alone) == (None, None)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": "m", "sha256": 5, "steps": []}',
        '{"model": "m", "sha256": "0", "steps": ["background"]}',
        '{"model": "m", "sha256": "0", "steps": [0]}',
        '{"model": "m", "sha256": "0", "steps": [true]}',
        '{"model": "m", "sha256": "0", "steps": [1, 1]}',
        '{"model": "m", "sha256": "0", "steps": [[1]]}',
        '{"model": "m", "sha256": "0", "steps": "1"}',
        "[" * 100000,
        "\udcff",
    ],
)
def test_what_is_no_decision_is_refused_in_one_line(model, tmp_path, content):
    (tmp_path / "postprocessing.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"postprocessing.json: is broken .*; restore or delete it") as error:
        read_steps(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400

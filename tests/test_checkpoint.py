import hashlib
import json
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import checkpoint
from lib.checkpoint import TrainingState
from lib.models import Sauron
from lib.models.BaseModel import read_state
from lib.pruning.rules import Bounds, PaperRule, Threshold
from lib.settings import Settings
from lib.system.error import InputError


def rule_of(thresholds):
    rule = PaperRule(0.3, 15, 5, 0.02, Bounds((0, 9)))
    rule.thresholds = thresholds
    return rule


def make_state(folder, epoch=3):
    (folder / "models").mkdir(parents=True, exist_ok=True)
    model = Sauron(1, 2, 2, 3)
    model.initialize()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.randn(1, 1, 8, 8))[0].mean().backward()
    optimizer.step()
    rows = [{"epoch": 1, "train_loss": 0.5, "in_filters": {"b": 1, "a": 2}, "out_filters": {"b": 3, "a": 4}}]
    return TrainingState(model, optimizer, folder, print, epoch, rows, rule=rule_of({"a": Threshold(2, 1, 0, 4)}))


def test_round_trip_of_everything(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    drawn = torch.rand(3)
    other = make_state(tmp_path / "other", epoch=0)
    other.model.initialize(model_state=tmp_path / "models" / "model-3")
    checkpoint.restore(other, checkpoint.read_training(tmp_path / "models" / "state-3"))
    assert torch.rand(3).equal(drawn)  # the random state is that of the moment of saving
    assert (other.epoch, other.rows, other.rule.thresholds) == (3, state.rows, state.rule.thresholds)
    for a, b in zip(state.model.parameters(), other.model.parameters(), strict=True):
        assert a.equal(b)
        assert state.optimizer.state[a]["exp_avg"].equal(other.optimizer.state[b]["exp_avg"])


def test_the_two_newest_pairs_and_the_best_model_stay(tmp_path):
    state, models = make_state(tmp_path), tmp_path / "models"
    checkpoint.save(state)
    checkpoint.save_model(models / "model-best", state.model)
    for state.epoch in (4, 5):
        checkpoint.save(state)
    files = ["model-4", "model-5", "model-best", "state-4", "state-5"]
    assert sorted(p.name for p in models.iterdir()) == ["SHA256SUMS", *files]
    assert checkpoint.newest_epoch(tmp_path) == 5
    lines = [f"{hashlib.sha256((models / name).read_bytes()).hexdigest()}  {name}" for name in files]
    assert (models / "SHA256SUMS").read_text().splitlines() == lines


@pytest.mark.parametrize("damaged", ["model-5", "state-5"])
@pytest.mark.parametrize("kind", ["cut", "one flipped bit", "empty"])
def test_a_damaged_file_is_refused_and_the_newest_good_one_named(tmp_path, damaged, kind):
    state, models = make_state(tmp_path), tmp_path / "models"
    for state.epoch in (4, 5):
        checkpoint.save(state)
    path = models / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "one flipped bit": data}[kind])
    read = read_state if damaged == "model-5" else checkpoint.read_training
    with pytest.raises(InputError, match=f"{damaged}: is damaged.*newest good one is .*{damaged[:5]}-4$"):
        read(path)
    assert checkpoint.newest_epoch(tmp_path) == 4
    for path in models.glob("model-*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="epoch 5 is damaged, and there is no other"):
        checkpoint.newest_epoch(tmp_path)


def test_a_byte_order_mark_in_front_of_the_checksums_hides_none(tmp_path):
    state, sums = make_state(tmp_path), tmp_path / "models" / "SHA256SUMS"
    checkpoint.save(state)
    sums.write_text(sums.read_text(), encoding="utf-8-sig")
    assert checkpoint.newest_epoch(tmp_path) == 3
    path = tmp_path / "models" / "model-3"  # the first line
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(InputError, match="model-3: is damaged"):
        read_state(path)


def test_a_file_from_elsewhere_needs_no_checksum(tmp_path):
    state, models = make_state(tmp_path), tmp_path / "models"
    torch.save(checkpoint.state_dict(state.model), models / "model-9")
    assert list(read_state(models / "model-9")) == list(state.model.state_dict())


def test_while_a_file_is_replaced_both_the_old_and_the_new_one_are_good(tmp_path, monkeypatch):
    state, best = make_state(tmp_path), tmp_path / "models" / "model-best"
    checkpoint.save_model(best, state.model)
    state.model.initialize()

    def die(path, write):
        if path.name == "model-best":
            raise KeyboardInterrupt
        write_atomically(path, write)

    write_atomically = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_model(best, state.model)
    read_state(best)
    monkeypatch.undo()
    checkpoint.save_model(best, state.model)
    read_state(best)
    assert len((tmp_path / "models" / "SHA256SUMS").read_text().splitlines()) == 1


def test_a_model_without_its_state_does_not_count(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    checkpoint.save_model(tmp_path / "models" / "model-4", state.model)  # stopped between the two files
    assert checkpoint.newest_epoch(tmp_path) == 3
    assert checkpoint.newest_epoch(tmp_path / "nowhere") is None


def test_broken_state_files_are_refused(tmp_path):
    (tmp_path / "state-1").write_bytes(b"PK\x03\x04 garbage")
    torch.save({"something": 1}, tmp_path / "state-2")
    for name in ("state-1", "state-2", "state-3"):
        with pytest.raises(InputError, match=name):
            checkpoint.read_training(tmp_path / name)


def test_a_state_of_another_model_is_refused(tmp_path):
    state = make_state(tmp_path)
    checkpoint.save(state)
    content = checkpoint.read_training(tmp_path / "models" / "state-3")
    other = Sauron(1, 2, 3, 3)
    for optimizer in (torch.optim.Adam(other.parameters()), torch.optim.Adam(list(other.parameters())[:3])):
        with pytest.raises(InputError, match="state-3: .* give those of one epoch"):
            checkpoint.restore(TrainingState(other, optimizer, tmp_path, print), content)


OTHER = st.none() | st.integers(-1, 3) | st.floats() | st.text(max_size=3) | st.just(torch.zeros(3))
VALUES = st.recursive(OTHER, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2))


@settings(max_examples=60)
@given(key=st.sampled_from(sorted(checkpoint.STATE_TYPES)), value=VALUES)
def test_a_state_with_some_other_value_is_refused_or_restored(tmp_path, key, value):
    state = make_state(tmp_path)
    checkpoint.save(state)
    path = tmp_path / "models" / "state-9"
    torch.save(torch.load(tmp_path / "models" / "state-3", weights_only=True) | {key: value}, path)
    with suppress(InputError):
        checkpoint.restore(state, checkpoint.read_training(path))


def test_history_and_filter_files(tmp_path):
    state = make_state(tmp_path)
    state.validation = {"1": {"loss": 0.25, "dice": {"patient001_frame01": [1.0, None]}}}
    checkpoint.save_history(state)
    checkpoint.save_filters(state)
    assert json.loads((tmp_path / "history.json").read_text()) == {"epoch": [1], "train_loss": [0.5]}
    assert json.loads((tmp_path / "validation_scores.json").read_text())["1"]["loss"] == 0.25
    assert (tmp_path / "in_filters").read_text() == "a\tb\n2\t1\n"
    assert (tmp_path / "out_filters").read_text() == "a\tb\n4\t3\n"


def test_run_folders_are_numbered(tmp_path):
    settings = Settings.of({"data": "phantom", "output": str(tmp_path)})
    assert [checkpoint.new_run_folder(settings).name for _ in range(3)] == ["1", "2", "3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        checkpoint.new_run_folder(replace(settings, output=str(tmp_path / "file")))


# ---- the data that a run was trained on


CONTENT = {
    "train": {"a": {"image": "1", "label": "2"}, "b": {"image": "3", "label": "4"}},
    "validation": {"c": {"image": "5", "label": "6"}},
}


def edited(**parts):
    return {part: CONTENT[part] | parts.get(part, {}) for part in CONTENT}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (CONTENT, {}),
        (edited(train={"a": {"image": "1", "label": "9"}}), {"a": "has another ground truth"}),
        (edited(validation={"c": {"image": "9", "label": "9"}}), {"c": "has another image and ground truth"}),
        (edited(train={"d": {"image": "7", "label": "8"}}), {"d": "is new in the train set"}),
        (
            {"train": {"a": CONTENT["train"]["a"]}, "validation": CONTENT["validation"]},
            {"b": "is not in the train set"},
        ),
        (
            {"train": CONTENT["train"] | CONTENT["validation"], "validation": {}},
            {"c": "is not in the validation set"},
        ),
    ],
)
def test_changed_subjects_are_named(tmp_path, now, expected):
    assert checkpoint.changed_subjects(tmp_path, now) == {}  # a run of the time before it was noted
    checkpoint.write_json(tmp_path / "subjects.json", CONTENT)
    assert checkpoint.check_subjects(tmp_path, now, accept=True) == expected
    if expected:
        with pytest.raises(InputError, match=f"--resume .*: {next(iter(expected))} .*--accept_changed_data"):
            checkpoint.check_subjects(tmp_path, now, accept=False)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"train": [], "validation": {}}', '{"train": {"a": 3}, "validation": {}}']
)
def test_a_broken_note_of_the_subjects_is_one_line(tmp_path, text):
    (tmp_path / "subjects.json").write_text(text)
    with pytest.raises(InputError, match=r"subjects\.json: is broken"):
        checkpoint.changed_subjects(tmp_path, CONTENT)

"""Runs of the published code: predicted with, and gone on from."""

import json
import os
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from niftis import write_patients
from test_pickles import GOOD

import predict
import train
from lib import checkpoint, published
from lib.checkpoint import TrainingState, restore_published
from lib.models import Sauron, load_model, nnUNet
from lib.models.BaseModel import read_state
from lib.models.size import count_filters, summary
from lib.pruning.rules import Bounds, BudgetRule, PaperRule, Rule, Threshold, raise_threshold, tau
from lib.settings import Settings
from lib.system.error import InputError
from lib.utils import parseArguments, settings_of

CONFIG = {
    "data": {"name": "acdc17", "classes": {"0": "background"}, "dim": "2D", "modalities": 1},
    "optim": "Adam",
    "optim_params": {"lr": 0.002, "weight_decay": 1e-05},
    "loss": "DS_CrossEntropyDiceLoss_Distance",
    "architecture": {"modalities": 1, "n_classes": 4, "dist_fun": "euc_norm", "imp_fun": "euc_rand", "sf": 2}
    | {"fms_init": 4, "levels": 3, "dim": "2D", "filters": {}},
    "epochs": 500,
    "batch_size": 7,
    "val_interval": 2,
    "epoch_start": 1,
    "history": {"channels_history": {}, "val_loss_history": [], "tr_loss_history": []},
    "split": [0.75, 0.25],
    "seed_train": 6,
    "seed_data": 9,
    "callbacks": ["_end_epoch_prune"],
}


def write_run(folder, model, epochs=2, protocol=4, config=CONFIG, **changes):
    """The files of a published run of `model` after some epochs, with other histories where given."""
    (folder / "models").mkdir(parents=True)
    torch.save(model.state_dict(), folder / "models" / f"model-{epochs}")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    out = count_filters(model)["out"]
    histories = {
        "tr_loss_history": [np.float32(3 - 0.125 * epoch) for epoch in range(epochs)],
        "val_loss_history": [2.5 - 0.25 * k for k in range(epochs // 2)],
        "mod_thr": dict.fromkeys(out, 0.001),
        "mod_patience": dict.fromkeys(out, 0),
        "channels_history": {name: [n] * (epochs - 1) for name, n in out.items()} if epochs > 1 else {},
    }
    for name, history in (histories | changes).items():
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(history, protocol=protocol))
    return folder


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Sauron(1, 4, 4, 3)
    model.initialize()
    return model


# Pickles


class Payload:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_in_a_history_is_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    payloads = [
        Payload(os.mkdir, str(marker)),
        Payload(eval, f"open({str(marker)!r}, 'w')"),
        Payload(getattr, [], "sort"),
    ]
    for payload in payloads:
        (tmp_path / "mod_thr.pkl").write_bytes(pickle.dumps({"a": payload}, protocol=protocol))
        with pytest.raises(InputError, match=r"mod_thr.pkl: names '\w+ \w+'; a history holds lists"):
            published._read(tmp_path, "mod_thr", dict, lambda _: True)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [{1, 2}, 1j, np.zeros(2), np.complex64(1), np.str_("a"), np.datetime64(0, "s"), {(1, 2): 3}, b"a".join, Namespace()]
    + [np.dtype("O"), bytearray(2), type, Payload(Payload, 1), [Ellipsis], np.longdouble(1)],
)
def test_what_does_not_belong_in_a_history_is_refused(tmp_path, content):
    for name, history in (("mod_thr", {"a": content}), ("tr_loss_history", [content]), ("val_loss_history", content)):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(history))
        with pytest.raises(InputError, match=f"{name}.pkl: ") as refused:
            published._read(tmp_path, name, dict if name == "mod_thr" else list, published._is_number)
        assert "\n" not in str(refused.value)


BOMBS = {
    "a memo of 4 billion places": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a text of 2^60 bytes": b"\x80\x04\x8d" + (2**60).to_bytes(8, "little") + b"a.",
    "a bytearray of 2^40 bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"a.",
    "a deep list": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a deep key": b"\x80\x04})" + b"\x85" * 100_000 + b"K\x01s.",
    "a number of a million digits": b"L" + b"9" * 10**6 + b"L\n.",
    "a large file": b"\x80\x04" + b"0" * 2**23,
    "an extension": b"\x80\x04\x82\x01.",
    "an object from elsewhere": b"Pa\n.",
    "a call of a list": b"\x80\x04]]R.",
    "a state for a list": b"\x80\x04]K\x03X\x01\x00\x00\x00<\x86b.",
    "a short number": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8tRC\x02aatR.",
    "nothing": b"",
    "text": b"some text",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_absurd_files_are_refused_in_one_line(tmp_path, kind):
    (tmp_path / "mod_thr.pkl").write_bytes(BOMBS[kind])
    with pytest.raises(InputError, match="mod_thr.pkl: ") as refused:
        published._read(tmp_path, "mod_thr", dict, published._is_number)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_every_cut_of_a_history_is_refused(tmp_path):
    for good in GOOD:
        for n in range(len(good)):
            (tmp_path / "h.pkl").write_bytes(good[:n])
            with pytest.raises(InputError, match="h.pkl: is damaged"):
                published._read(tmp_path, "h", type(pickle.loads(good)), lambda _: True)


# Settings


def test_a_published_config_is_told_from_ours_and_from_a_damaged_one(tmp_path):
    assert published.read_config(tmp_path) is None
    for content, found in (
        (CONFIG, CONFIG),
        (Settings.of({"data": "phantom"}).as_dict(), None),
        ({"data": {}}, None),
        ({"data": ["name"]}, None),
        ([CONFIG], None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8-sig")
        assert published.read_config(tmp_path) == found
    for text in ("", "{", '{"data": {"name": ', "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        assert published.read_config(tmp_path) is None
        with pytest.raises(InputError, match="is no run folder"):
            Settings.read(tmp_path)


def test_a_published_run_is_no_run_to_resume(tmp_path, model):
    run = write_run(tmp_path / "run", model)
    with pytest.raises(InputError, match="run: is a run of the published code; go on with it by --history"):
        settings_of(parseArguments(["--resume", str(run)]))


def go_on(run, *more, epoch=2, data="acdc"):
    model = run / "models" / f"model-{epoch}"
    return ["--data", data, "--history", str(run), "--epoch_start", str(epoch), "--model_state", str(model), *more]


def config_of(run, *more, **kwargs):
    folder, settings, _ = settings_of(parseArguments(go_on(run, *more, **kwargs)))
    assert folder is None  # a new run
    return settings.as_dict()


def test_settings_are_those_of_the_run_but_for_flags(tmp_path, model):
    config = config_of(write_run(tmp_path / "run", model), "--lr", "0.5", "--patch_size", "32", "64")
    expected = {
        "data": "acdc",
        "model": "sauron",
        "fms_init": 4,
        "levels": 3,
        "optim": "adam",
        "lr": 0.5,
        "wd": 1e-5,
        "epochs": 500,
        "batch_size": 7,
        "val_interval": 2,
        "split": "0.75:0.25",
        "seed_train": 6,
        "seed_data": 9,
        "patch_size": [32, 64],
        "loss": "DS_CrossEntropyDiceLoss_Distance",
        "no_prune": False,
        "epoch_start": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_settings_of_other_published_runs(tmp_path, model):
    sgd = {"optim": "SGD", "optim_params": {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0}}
    config = config_of(write_run(tmp_path / "sgd", model, config=CONFIG | sgd | {"callbacks": []}))
    assert (config["optim"], config["momentum"], config["nesterov"], config["wd"]) == ("sgd", 0.5, True, 0)
    assert config["no_prune"]
    plain = {
        "architecture": CONFIG["architecture"] | {"dist_fun": "", "imp_fun": ""},
        "loss": "DS_CrossEntropyDiceLoss",
    }
    config = config_of(write_run(tmp_path / "nnunet", model, config=CONFIG | plain))
    assert (config["model"], config["loss"]) == ("nnunet", "DS_CrossEntropyDiceLoss")
    config = config_of(write_run(tmp_path / "lambda", model), "--lambda", "0")
    assert config["loss"] == "DS_CrossEntropyDiceLoss"


@pytest.mark.parametrize("known", [True, False])
def test_without_a_config_the_network_is_read_off_the_model_and_the_first_widths(tmp_path, model, known):
    names = [block.name for block in model.blocks() if not block.head]
    small = Sauron(1, 4, 4, 3, filters={"out": dict.fromkeys(names, 2)})
    widths = {name: [n, 2] for name, n in count_filters(model)["out"].items()} if known else {}
    config = config_of(write_run(tmp_path / "run", small, config=None, epochs=3, channels_history=widths), epoch=3)
    assert (config["fms_init"], config["levels"]) == (4 if known else 2, 3)
    assert config["seed_data"] == 42


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"name": "kits19"}}, "--data acdc: the run .* has 'kits19'"),
        ({"data": {"name": "rats"}}, "--data acdc: the run .* has 'rats'"),
        ({"batch_size": "many"}, "config.json: argument --batch_size: 'many' .*; give this flag yourself"),
        ({"optim_params": {"lr": -1}}, "config.json: argument --lr"),
        ({"optim": "Lamb"}, "config.json: argument --optim"),
        ({"optim_params": [1]}, "config.json: is damaged"),
        ({"architecture": "?"}, "config.json: is damaged"),
        ({"split": 3}, "config.json: is damaged"),
        ({"seed_data": [1, 2]}, "config.json: "),
    ],
)
def test_a_published_config_that_says_nonsense_is_refused(tmp_path, model, change, words):
    run = write_run(tmp_path / "run", model, config=CONFIG | change)
    with pytest.raises(InputError, match=words) as refused:
        settings_of(parseArguments(go_on(run)))
    assert "\n" not in str(refused.value)


def test_a_flag_stands_in_for_a_bad_setting(tmp_path, model):
    run = write_run(tmp_path / "run", model, config=CONFIG | {"batch_size": "many"})
    assert config_of(run, "--batch_size", "3")["batch_size"] == 3


# Histories


def test_losses_widths_and_what_is_not_known_of_past_epochs(tmp_path, model):
    before = {name: [n + 2, n + 1, n] for name, n in count_filters(model)["out"].items()}
    for name in ("late", "early"):  # the published code writes the widths before, or after, the newest epoch is in them
        widths = {block: counts[: 3 if name == "late" else 2] for block, counts in before.items()}
        run = write_run(tmp_path / name, model, epochs=3, channels_history=widths, val_loss_history=[np.float32(2.5)])
        history = published.read_history(run, 3, model)
        assert history.train_losses == [3.0, 2.875, 2.75]
        assert history.val_losses == {2: 2.5}
        assert [row["enc_ConvBlock_3"] for row in history.widths] == [10, 9, 8]
        assert len(history.notes) == 1


def test_the_models_widths_count_and_the_log_says_so(tmp_path, model):
    widths = {name: [9, 9] for name in count_filters(model)["out"]}
    history = published.read_history(write_run(tmp_path / "run", model, channels_history=widths), 2, model)
    assert history.widths[-1] == count_filters(model)["out"]
    assert "enc_ConvBlock_1 has 9 filters after epoch 2, but 4 in the model" in history.notes[1]


@pytest.mark.parametrize(
    ("interval", "n", "epochs"),
    [(1, 7, [1, 2, 3, 4, 5, 6, 7]), (2, 3, [2, 4, 6]), (3, 2, [3, 6]), (3, 1, [6]), (2, 0, []), (8, 0, [])]
    + [(None, 7, [1, 2, 3, 4, 5, 6, 7]), (None, 3, [2, 4, 6])],
)
def test_validation_losses_belong_to_the_multiples_of_the_interval(tmp_path, model, interval, n, epochs):
    losses = [float(k) for k in range(n)]
    config = None if interval is None else CONFIG | {"val_interval": interval}
    run = write_run(tmp_path / "run", model, epochs=7, val_loss_history=losses, config=config)
    found = published.read_history(run, 7, model).val_losses
    assert list(found) == epochs and list(found.values()) == losses


def test_a_published_run_that_was_continued_itself(tmp_path, model):
    """It trained epoch 2 twice: 4 losses, 3 epochs, and the widths of the first epoch 2 are lost. Or it began without
    a history: 2 losses of 5 epochs."""
    config = CONFIG | {"epoch_start": 2}
    widths = {name: [n + 2, n + 1] for name, n in OUT.items()}
    run = write_run(
        tmp_path / "twice", model, epochs=4, config=config, val_loss_history=[4.0, 3.0], channels_history=widths
    )
    history = published.read_history(run, 3, model)
    assert history.train_losses == [2.875, 2.75, 2.625] and history.val_losses == {2: 3.0}
    assert [row["enc_ConvBlock_1"] for row in history.widths] == [6, 5, 4]
    run = write_run(tmp_path / "late", model, epochs=2, config=config, val_loss_history=[4.0])
    history = published.read_history(run, 5, model)
    assert history.train_losses == [3.0, 2.875] and history.val_losses == {4: 4.0} and len(history.widths) == 2


def test_a_network_that_was_never_to_be_pruned_has_no_thresholds(tmp_path):
    plain = nnUNet(1, 4, 4, 3)
    run = write_run(tmp_path / "run", plain, epochs=3, mod_thr={}, mod_patience={}, channels_history={})
    history = published.read_history(run, 3, plain)
    assert history.widths == [count_filters(plain)["out"]] * 3 and history.taus == {}


OUT = count_filters(nnUNet(1, 4, 4, 3))["out"]
REFUSED = {
    "too few epochs": ({"tr_loss_history": [1.0]}, "--epoch_start 2: .*tr_loss_history.pkl has the losses of 1 epochs"),
    "too many epochs": ({"tr_loss_history": [1.0] * 3}, "--epoch_start 2: .*has the losses of 3 epochs"),
    "NaN": ({"tr_loss_history": [1.0, np.float32("nan")]}, "tr_loss_history.pkl: does not hold a list"),
    "infinite": ({"val_loss_history": [np.inf]}, "val_loss_history.pkl: does not hold a list"),
    "a huge number": ({"tr_loss_history": [1.0, 10**400]}, "tr_loss_history.pkl: does not hold a list"),
    "too many validations": ({"val_loss_history": [1.0, 2.0]}, "val_loss_history.pkl: has 2 losses, but of 2 epochs 1"),
    "no list": ({"tr_loss_history": {"a": 1.0}}, "tr_loss_history.pkl: does not hold a list"),
    "no dictionary": ({"mod_thr": [0.001]}, "mod_thr.pkl: does not hold a dict"),
    "a block is missing": ({"mod_thr": {"enc_ConvBlock_1": 0.001}}, "mod_thr.pkl: has no enc_ConvBlock_2"),
    "no patience": ({"mod_patience": {}}, "mod_patience.pkl: has no enc_ConvBlock_1"),
    "a threshold above 1": ({"mod_thr": dict.fromkeys(OUT, 1.5)}, "mod_thr.pkl: does not hold a dict"),
    "a patience below 0": ({"mod_patience": dict.fromkeys(OUT, -1)}, "mod_patience.pkl: does not hold a dict"),
    "half a patience": ({"mod_patience": dict.fromkeys(OUT, 0.5)}, "mod_patience.pkl: does not hold a dict"),
    "no widths": ({"channels_history": {}}, "channels_history.pkl: has not the blocks of the model"),
    "other epochs": ({"channels_history": dict.fromkeys(OUT, [4, 4, 4])}, "channels_history.pkl: has not the blocks"),
    "no filters": ({"channels_history": dict.fromkeys(OUT, [0])}, "channels_history.pkl: does not hold a dict"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_histories_that_do_not_fit_are_refused(tmp_path, model, kind):
    changes, words = REFUSED[kind]
    run = write_run(tmp_path / "run", model, **changes)
    with pytest.raises(InputError, match=words) as refused:
        published.read_history(run, 2, model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["tr_loss_history", "val_loss_history", "mod_thr", "mod_patience", "channels_history"])
def test_a_history_that_is_missing_is_named(tmp_path, model, name):
    run = write_run(tmp_path / "run", model)
    (run / f"{name}.pkl").unlink()
    with pytest.raises(InputError, match=f"{name}.pkl: cannot be read"):
        published.read_history(run, 2, model)


def papers_rule(tau_max=0.3, kappa=15):
    return PaperRule(tau_max, kappa, rho=5, mu=0.02, bounds=Bounds((0, 500)))


def restored(tmp_path, model, rule, **changes):
    run = write_run(tmp_path / "run", model, epochs=3, **changes)
    (tmp_path / "new" / "models").mkdir(parents=True)
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState(model, optimizer, tmp_path / "new", print, epoch=3, rule=rule)
    restore_published(state, published.read_history(run, 3, model), (32, 32))
    return state


def test_thresholds_patiences_and_what_was_lost(tmp_path, model):
    """The published values of tau are linspace(0.001, 0.3, 16): 0.001, 0.02093..., 0.04086..."""
    grid = np.linspace(0.001, 0.3, 16)
    changes = {
        "mod_thr": dict.fromkeys(OUT, 0.001) | {"enc_ConvBlock_3": grid[2], "enc_ConvBlock_4": grid[15]},
        "mod_patience": dict.fromkeys(OUT, 0) | {"enc_ConvBlock_3": np.int64(4)},
        "channels_history": {name: [n, n] for name, n in OUT.items()} | {"enc_ConvBlock_3": [11, 10]},
    }
    state = restored(tmp_path, model, papers_rule(), **changes)
    assert len(state.rule.thresholds) == 12  # no heads
    assert state.rule.thresholds["enc_ConvBlock_1"] == Threshold(0, 0, 0, 4)
    assert state.rule.thresholds["enc_ConvBlock_3"] == Threshold(2, 4, 2, 10)
    assert state.rule.thresholds["enc_ConvBlock_4"] == Threshold(15, 0, 0, 8)
    assert tau(state.rule.thresholds["enc_ConvBlock_3"], 0.3, 15) == pytest.approx(0.04086666666, abs=1e-9)


@pytest.mark.parametrize(("tau_max", "kappa", "after"), [(0.3, 15, 0.06080), (0.5, 5, 0.1008), (0.02, 4, 0.05)])
def test_a_threshold_keeps_its_value_and_climbs_to_the_next_one(tmp_path, model, tau_max, kappa, after):
    rule = papers_rule(tau_max, kappa)
    restored(tmp_path, model, rule, mod_thr=dict.fromkeys(OUT, 0.05))
    threshold = rule.thresholds["enc_ConvBlock_1"]
    assert tau(threshold, tau_max, kappa) == pytest.approx(0.05)
    raise_threshold(threshold, True, kappa, 5, 0.02)
    assert tau(threshold, tau_max, kappa) == pytest.approx(after)  # the first value above it, if there is one


@pytest.mark.parametrize(
    "make_rule", [papers_rule, lambda: BudgetRule(1000.0, None, Bounds((0, 500)), (32, 32), 10**6), Rule]
)
def test_the_rows_are_saved_and_come_back(tmp_path, model, make_rule):
    widths = {name: [n + 1, n + 1] for name, n in OUT.items()}
    state = restored(tmp_path, model, make_rule(), channels_history=widths)
    assert [row["epoch"] for row in state.rows] == [1, 2, 3]
    assert [row["train_loss"] for row in state.rows] == [3.0, 2.875, 2.75]
    assert [row["val_loss"] for row in state.rows] == [None, 2.5, None]
    assert [row["filters"] for row in state.rows] == [104, 104, 92]
    assert {key: state.rows[-1][key] for key in ("parameters", "flops")} == {
        key: summary(model, (32, 32))[key] for key in ("parameters", "flops")
    }
    assert ("tau" in state.rows[0]) == state.rule.measures
    checkpoint.save(state)
    checkpoint.save_history(state)
    checkpoint.save_filters(state)
    content = checkpoint.read_training(state.folder / "models" / "state-3")
    assert content["rows"] == state.rows
    again = TrainingState(model, state.optimizer, state.folder, print, rule=make_rule())
    checkpoint.restore(again, content)
    assert again.rule.state_dict() == state.rule.state_dict()
    assert again.rule.row() == state.rule.row()


# Whole scripts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A few patients (with CONFIG's seed 2 to train on, 1 to validate, 1 to test), and a published run."""
    folder = tmp_path_factory.mktemp("published")
    write_patients(folder / "data", (1, 2, 3, 5))
    torch.manual_seed(0)
    model = Sauron(1, 4, 4, 3, filters={"out": {"enc_ConvBlock_2": 3}})
    model.initialize()
    thresholds = {"mod_thr": dict.fromkeys(OUT, np.float64(0.02093333333333333)), "mod_patience": dict.fromkeys(OUT, 3)}
    write_run(folder / "run", model, val_loss_history=[2.25], **thresholds)
    return folder


def places(place, output):
    return ["--data_path", str(place / "data"), "--cache_path", str(place / "cache"), "--output", str(output)]


def test_a_training_goes_on_is_resumed_and_reported(place, tmp_path):
    before = {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()}
    small = ["--patch_size", "16", "16", "--num_workers", "0", "--device", "cpu"]
    assert train.main([*go_on(place / "run"), *places(place, tmp_path), *small, "--epochs", "3"]) == 0
    run = tmp_path / "unnamed" / "acdc" / "1"
    log = (run / "log.txt").read_text()
    assert "acdc: 2 train, 1 validation, 1 test" in log and "goes on after epoch 2 of" in log
    assert "epoch 3/3 | loss " in log and log.count("/3 | loss") == 1
    history = json.loads((run / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3]
    assert history["train_loss"][:2] == [3.0, 2.875] and history["val_loss"] == [None, 2.25, None]
    assert history["seconds"][:2] == history["lr"][:2] == [None, None]
    assert history["patience"][1:] == [dict.fromkeys(history["patience"][0], n) for n in (3, 2)]
    assert list(history["tau"][2].values()) == pytest.approx([0.02093333333333333] * 12)
    widths = count_filters(load_model(run / "models" / "model-3"))["out"]
    assert widths["enc_ConvBlock_2"] <= 3
    optimizer = checkpoint.read_training(run / "models" / "state-3")["optimizer"]
    steps = {values["step"].item() for values in optimizer["state"].values()}
    assert len(steps) == 1 and 0 < steps.pop() < 100  # those of one epoch: it is new
    assert len((run / "out_filters").read_text().splitlines()) == 1 + 3

    assert train.main(["--resume", str(run), "--epochs", "4"]) == 0
    history = json.loads((run / "history.json").read_text())
    assert history["epoch"] == [1, 2, 3, 4] and history["val_dice"][3] is not None
    assert "(known of 2 of 4 epochs)" in (run / "report.html").read_text()
    assert "Not drawn" not in (run / "report.html").read_text()
    assert {path: path.read_bytes() for path in (place / "run").rglob("*") if path.is_file()} == before


def test_predictions_are_those_of_a_folder_without_config(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    for source in (place, tmp_path):
        argv = ["--data", "acdc", "--input", str(place / "data" / "patient002"), "--device", "cpu"]
        model = str(source / "run" / "models" / "model-2")
        output = str(tmp_path / f"out{source == place}")
        assert predict.main([*argv, "--no_tta", "--model_state", model, "--output", output]) == 0
    with_config, without = (tmp_path / name / "patient002_frame01.nii.gz" for name in ("outTrue", "outFalse"))
    assert with_config.read_bytes() == without.read_bytes()


@pytest.mark.parametrize("name", ["mod_thr", "tr_loss_history"])
def test_a_bad_history_leaves_nothing(place, tmp_path, capsys, name):
    run = shutil.copytree(place / "run", tmp_path / "run")
    (run / f"{name}.pkl").write_bytes(pickle.dumps([Payload(os.mkdir, str(tmp_path / "ran"))]))
    assert train.main([*go_on(run), *places(place, tmp_path / "runs"), "--patch_size", "16", "16"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{name}.pkl: names " in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert read_state(run / "models" / "model-2")

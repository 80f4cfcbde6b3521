import json
from dataclasses import dataclass, replace

import pytest

from lib.data import DATASETS
from lib.settings import Settings
from lib.system.cli import flops_limit, flops_of, number, run_script
from lib.system.error import InputError
from lib.system.options import setting
from lib.utils import parseArguments, settings_of


def settings_from(*argv):
    return Settings.of(vars(parseArguments(["--data", *argv])))


def config_of(*argv):
    return settings_from(*argv).as_dict()


# Every flag of the published parseArguments, with a value that is not its default.
PUBLISHED = {
    "exp_name": "x",
    "data": "phantom",
    "split": "0.8:0.2",
    "device": "cpu",
    "model_state": "m",
    "in_filters": "i",
    "out_filters": "o",
    "loss": "DS_CrossEntropyDiceLoss",
    "epoch_start": 3,
    "epochs": 7,
    "batch_size": 3,
    "val_interval": 4,
    "optim": "sgd",
    "lr": 0.5,
    "wd": 0.25,
    "momentum": 0.75,
    "nesterov": False,
    "seed_train": 1,
    "seed_data": 2,
}


def test_every_published_flag_does_what_it_says():
    argv = [part for key, value in PUBLISHED.items() for part in (f"--{key}", str(value))]
    config = Settings.of(vars(parseArguments([*argv, "--history", "run"]))).as_dict()
    assert {key: config[key] for key in PUBLISHED} == PUBLISHED
    assert config["history"] == "run"


def test_defaults_of_acdc_are_the_published_ones():
    config = config_of("acdc")
    expected = {
        "split": "0.9:0.1",
        "seed_data": 42,
        "epochs": 500,
        "batch_size": 10,
        "val_interval": 2,
        "optim": "adam",
        "lr": 1e-3,
        "wd": 1e-5,
        "fms_init": 48,
        "levels": 7,
        "patch_size": [320, 320],
        "lambda_": 0.5,
        "dist_fun": "euc_norm",
        "imp_fun": "euc_rand",
        "tau_max": 0.3,
        "kappa": 15,
        "rho": 5,
        "mu": 0.02,
        "max_flops": "none",
        "max_ms": None,
        "min_filters": 2,
        "max_prune_fraction": None,
        "prune_between": ["0%", "100%"],
        "model": "sauron",
        "no_prune": False,
        "loss": "DS_CrossEntropyDiceLoss_Distance",
        "modalities": 1,
        "n_classes": 4,
        "dim": "2D",
    }
    assert {key: config[key] for key in expected} == expected
    json.dumps(config, allow_nan=False)


def test_the_old_name_means_the_same_data_set():
    assert config_of("acdc17")["data"] == "acdc"


@pytest.mark.parametrize(("given", "name"), [("Adam", "adam"), ("ADAM", "adam"), ("SGD", "sgd"), ("sgd", "sgd")])
def test_an_optimizer_in_any_case(given, name):
    assert config_of("acdc", "--optim", given)["optim"] == name


def test_epoch_1_without_a_model_is_a_fresh_start(tmp_path):
    assert config_of("acdc", "--epoch_start", "1") == config_of("acdc")
    config = config_of("acdc", "--epoch_start", "1", "--model_state", "m")
    assert (config["epoch_start"], config["model_state"]) == (1, "m")
    with pytest.raises(InputError, match="--history needs --model_state"):
        parseArguments(["--data", "acdc", "--epoch_start", "1", "--history", "run"])


@pytest.mark.parametrize("argv", [["--model", "nnunet"], ["--model", "flat"], ["--lambda", "0"]])
def test_without_distances_the_loss_has_none(argv):
    assert config_of("phantom", *argv)["loss"] == "DS_CrossEntropyDiceLoss"


def test_a_recipe_stands_for_flags_that_are_not_given(tmp_path):
    flags = "--max_flops 20% --prune_between 5% 40% --min_filters 8 --max_prune_fraction 0.15 --width_multiple 8"
    small = config_of("acdc", "--recipe", "small")
    assert small == config_of("acdc", *flags.split()) | {"recipe": "small"}
    assert config_of("acdc")["recipe"] == "none" and config_of("acdc", "--recipe", "none") == config_of("acdc")
    changed = config_of("acdc", "--recipe", "small", "--max_flops", "10%", "--width_multiple", "1")
    assert changed == small | {"max_flops": "10%", "width_multiple": 1}
    by_time = config_of("acdc", "--recipe", "small", "--max_ms", "50")  # one budget, not both
    assert by_time == small | {"max_flops": "none", "max_ms": 50}
    for config in (small, changed, by_time):  # and what a run folder says is what it was
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert Settings.read(tmp_path)[0].as_dict() == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nnunet", "--loss", "DS_CrossEntropyDiceLoss_Distance"], "--loss"),
        (["--patch_size", "64"], "needs 2 numbers"),
        (["--patch_size", "60", "64"], "60 is not"),
        (["--patch_size", "8", "64"], "at least 16"),
        (["--prune_between", "50%", "50%"], "--prune_between 50% 50%"),
        (["--epoch_start", "3"], "--epoch_start needs --model_state"),
        (["--optim", "sgd", "--momentum", "0", "--nesterov", "True"], "--nesterov"),
        (["--no_prune", "--max_flops", "20%"], "--max_flops: nothing is pruned with --no_prune"),
        (["--no_prune", "--recipe", "small"], "--recipe small: nothing is pruned with --no_prune; leave one"),
        (["--model", "flat", "--recipe", "small"], "--recipe small: nothing is pruned with --model flat"),
        (["--model", "nnunet", "--width_multiple", "8"], "--width_multiple 8: no width is chosen with --model nnunet"),
        (["--no_prune", "--width_multiple", "8"], "--width_multiple 8: no width is chosen with --no_prune"),
        (["--model", "nnunet", "--max_flops", "2G"], "--max_flops: nothing is pruned with --model nnunet"),
        (["--model", "nnunet", "--max_ms", "2"], "--max_ms: nothing is pruned with --model nnunet"),
        (["--model", "flat", "--max_ms", "2"], "--max_ms: nothing is pruned with --model flat"),
        (["--model", "flat", "--max_ms", "2", "--max_flops", "20%"], "--max_ms: nothing is pruned with --model flat"),
        (["--model", "flat", "--out_filters", "o"], "--out_filters: --model flat has one width"),
        (["--model", "flat", "--in_filters", "i"], "--in_filters: --model flat has one width"),
        (["--model", "flat", "--loss", "DS_CrossEntropyDiceLoss_Distance"], "needs --model sauron"),
    ],
)
def test_settings_that_do_not_fit_one_another(argv, message):
    with pytest.raises(InputError, match=message):
        config_of("phantom", *argv)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--data", "nothing"],
        ["--epochs", "0"],
        ["--epochs", "1.5"],
        ["--batch_size", "-1"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--lr", "inf"],
        ["--wd", "2"],
        ["--nesterov", "maybe"],
        ["--levels", "2"],
        ["--tau_max", "1.5"],
        ["--lambda", "-1"],
        ["--num_workers", "-1"],
        ["--prune_between", "10", "60%"],
        ["--prune_between", "10%", "101%"],
        *(
            ["--max_flops", text]
            for text in ("0%", "120%", "-1G", "nan", "G", "%", "", "0", "inf", "1e999", "2GG", "2X")
        ),
        *(["--max_ms", text] for text in ("0", "-1", "nan", "inf", "none")),
        *(["--min_filters", text] for text in ("0", "481", "1.5")),
        *(["--max_prune_fraction", text] for text in ("0", "1.1", "nan")),
    ],
)
def test_bad_values_end_with_exit_code_2_and_one_line(argv, capsys):
    argv = [*(["--data", "phantom"] if argv and "--data" not in argv else []), *argv]
    assert run_script(lambda: parseArguments(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: " in line


def test_help_states_every_default(capsys):
    with pytest.raises(SystemExit):
        parseArguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    rate = "first epoch; it falls to 0 as lr * (1 - e / epochs)^0.9, and once more after a budget is met"
    assert f"{rate} (default: 0.001 (acdc, kits, kits23)," in text
    assert "weight decay (default: 1e-05)" in text
    for name in ("acdc", "phantom"):
        assert str(DATASETS[name].defaults["epochs"]) + f" ({name}" in text


def test_a_continued_run_keeps_its_settings():
    saved = settings_from("phantom", "--lr", "0.5")
    given = vars(parseArguments(["--resume", "run", "--epochs", "99", "--lr", "0.5"]))
    assert saved.continued(given, "run") == replace(saved, epochs=99)
    with pytest.raises(InputError, match="--lr 0.25: the run run has 0.5"):
        saved.continued(vars(parseArguments(["--resume", "run", "--lr", "0.25"])), "run")


def test_a_continued_run_has_its_data_set_by_any_name():
    saved = settings_from("acdc")
    assert saved.continued({"data": "acdc17"}, "run") == saved
    with pytest.raises(InputError, match="--data kits: the run run has acdc"):
        saved.continued({"data": "kits19"}, "run")


@dataclass(frozen=True, kw_only=True)
class More(Settings):
    """One field, and nothing else, is a new flag."""

    warm_up: int = setting("training", "epochs of 90% of the learning rate", 3, type=number(int, 0, 9))


def test_a_new_flag_is_one_field(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parseArguments(["--help"], More)
    assert "--warm_up WARM_UP epochs of 90% of the learning rate (default: 3)" in " ".join(
        capsys.readouterr().out.split()
    )
    with pytest.raises(InputError, match="--warm_up: '10' is no whole number at least 0 and at most 9"):
        parseArguments(["--data", "acdc", "--warm_up", "10"], More)
    assert settings_of(parseArguments(["--data", "acdc"], More), More)[1].warm_up == 3
    _, new, _ = settings_of(parseArguments(["--data", "acdc", "--warm_up", "5"], More), More)
    (tmp_path / "config.json").write_text(json.dumps(new.as_dict()))
    assert json.loads((tmp_path / "config.json").read_text())["warm_up"] == 5

    resume = ["--resume", str(tmp_path)]
    assert settings_of(parseArguments(resume, More), More)[1] == new
    with pytest.raises(InputError, match="--warm_up 4: the run .* has 5"):
        settings_of(parseArguments([*resume, "--warm_up", "4"], More), More)
    (tmp_path / "config.json").write_text(json.dumps(new.as_dict() | {"warm_up": 99}))
    with pytest.raises(InputError, match="config.json: is damaged .*--warm_up"):
        More.read(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path, encoding):
    config = config_of("phantom", "--exp_name", "Größe")
    (tmp_path / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding=encoding)
    assert Settings.read(tmp_path) == (Settings.of(config), {})


def test_folders_that_are_no_run_are_refused(tmp_path):
    for content in (None, "{", "[]", '{"data": []}', "\xff"):
        if content is not None:
            (tmp_path / "config.json").write_text(content, encoding="latin1")
        with pytest.raises(InputError, match="no run folder"):
            Settings.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"data": "unknown"},
        {"lr": "0.5"},
        {"lr": float("nan")},
        {"epochs": True},
        {"patch_size": [64]},
        {"n_classes": 3},
        {"exp_name": "../../elsewhere"},
        {"data_path": "a\0b"},
        {"cache_path": ["a", "b"]},
    ],
)
def test_a_setting_that_no_flag_gives_is_refused(tmp_path, change):
    config = config_of("phantom", "--no_prune", "--patch_size", "32", "64")
    (tmp_path / "config.json").write_text(json.dumps(config | {"command": "any"}))
    assert Settings.read(tmp_path) == (Settings.of(config), {"command": "any"})
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match="config.json: is damaged"):
        Settings.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [("20%", 1000), ("100%", 5000), ("2.5%", 125), ("2G", 2e9), ("500M", 5e8), ("3K", 3e3), ("1T", 1e12), ("2e9", 2e9)]
    + [("none", None)],
)
def test_a_limit_of_flops(text, value):
    assert flops_limit(text) == text
    assert flops_of(text, unpruned=5000) == pytest.approx(value)


def test_who_has_a_budget():
    for argv, max_flops, moments in [
        (["phantom"], "25%", ["10%", "60%"]),
        (["phantom", "--max_flops", "none"], "none", ["0%", "80%"]),  # the paper's rule
        (["phantom", "--max_ms", "3"], "none", ["10%", "60%"]),
        (["phantom", "--no_prune"], "none", ["0%", "80%"]),
        (["phantom", "--model", "nnunet"], "none", ["0%", "80%"]),
        (["phantom", "--model", "flat"], "none", ["0%", "80%"]),
        (["acdc"], "none", ["0%", "100%"]),
        (["kits", "--max_flops", "2G"], "2G", ["10%", "60%"]),
        (["kits", "--max_flops", "2G", "--prune_between", "5%", "30%"], "2G", ["5%", "30%"]),
    ]:
        config = config_of(*argv)
        assert (config["max_flops"], config["prune_between"]) == (max_flops, moments), argv
        assert (config["min_filters"], config["max_prune_fraction"]) == (8 if argv[0] == "phantom" else 2, None)


@pytest.mark.parametrize(
    "argv",
    [
        ["phantom"],
        ["phantom", "--max_flops", "none"],
        ["acdc", "--max_flops", "2e9", "--max_ms", "0.5", "--min_filters", "3", "--max_prune_fraction", "0.15"],
        ["acdc", "--max_ms", "1e-3"],
        ["phantom", "--max_ms", "7", "--prune_between", "0%", "33.3%"],
    ],
)
def test_a_budget_survives_its_run_folder(tmp_path, argv):
    settings = settings_from(*argv)
    (tmp_path / "config.json").write_text(json.dumps(settings.as_dict()))
    assert Settings.read(tmp_path) == (settings, {})
    args = parseArguments(["--resume", str(tmp_path)])
    assert settings_of(args) == (tmp_path, settings, {})
    with pytest.raises(InputError, match="--max_flops 1%: the run"):
        settings_of(parseArguments(["--resume", str(tmp_path), "--max_flops", "1%"]))


@pytest.mark.parametrize("argv", [["--model", "flat", "--max_flops", "20%"], ["--model", "flat"]])
def test_a_flat_network_is_never_pruned(tmp_path, argv):
    settings = settings_from("phantom", *argv)
    assert not settings.prunes and not settings.has_budget  # which would be pruned to
    (tmp_path / "config.json").write_text(json.dumps(settings.as_dict()))
    assert Settings.read(tmp_path) == (settings, {})


@pytest.mark.parametrize("flag", ["--tau_max", "--kappa", "--rho", "--mu"])
def test_the_papers_rule_has_no_say_in_a_budget(flag):
    argv = ["--data", "phantom", flag, "1"]  # the phantom has a budget
    with pytest.raises(InputError, match=f"{flag}: has no meaning with a budget"):
        settings_of(parseArguments(argv))
    settings_of(parseArguments([*argv, "--max_flops", "none"]))


def test_a_run_of_the_time_before_budgets_has_none(tmp_path):
    config = {key: value for key, value in config_of("phantom", "--max_flops", "none").items() if key != "max_flops"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Settings.read(tmp_path)[0].as_dict() == config | {"max_flops": "none"}


@pytest.mark.parametrize(("data", "padded"), [("kits", True), ("phantom3d", True), ("acdc", False)])
def test_a_run_keeps_to_the_normalization_that_it_was_trained_with(tmp_path, data, padded):
    """Once, what a data set pads its volumes with had its part in their z-score."""
    config = config_of(data, "--max_flops", "none")
    assert config["padding_counts"] is False
    for older, counts in ((False, False), (True, padded)):
        there = {key: value for key, value in config.items() if not (older and key == "padding_counts")}
        (tmp_path / "config.json").write_text(json.dumps(there))
        settings, facts = Settings.read(tmp_path)
        assert settings.padding_counts == counts == settings.dataset.preprocessing.padding_counts
        assert facts == {} and settings.dataset.name == DATASETS[data].name
    (tmp_path / "config.json").write_text(json.dumps(config | {"padding_counts": 1}))
    with pytest.raises(InputError, match="config.json: is damaged .*padding_counts"):
        Settings.read(tmp_path)

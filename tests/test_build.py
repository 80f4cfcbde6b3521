import pytest

from lib.build import build_model, build_rule
from lib.pruning.rules import Bounds, BudgetRule, PaperRule, RandomRule, Rule
from lib.settings import Settings
from lib.utils import parseArguments


def rule_of(*argv):
    return build_rule(Settings.of(vars(parseArguments(["--data", *argv]))), unpruned_flops=1000, validates=True)


def test_the_papers_rule():
    rule = rule_of("acdc")
    assert type(rule) is PaperRule
    assert (rule.tau_max, rule.kappa, rule.rho, rule.mu, rule.validates) == (0.3, 15, 5, 0.02, True)
    assert rule.bounds == Bounds(between=(0, 500), min_filters=2, max_prune_fraction=1.0)


def test_a_budget():
    rule = rule_of("phantom")
    assert type(rule) is BudgetRule
    assert (rule.max_flops, rule.max_ms, rule.patch_size, rule.unpruned_flops) == (250, None, (64, 64), 1000)
    assert rule.bounds == Bounds(between=(6, 36), min_filters=8, max_prune_fraction=1.0)
    for epochs, between in ((1, (0, 1)), (7, (0, 5)), (100, (10, 60))):  # there is an epoch, and the last one sees 1
        assert rule_of("phantom", "--epochs", str(epochs)).bounds.between == between
    rule = rule_of("acdc", "--max_ms", "3", "--min_filters", "5", "--max_prune_fraction", "0.25")
    assert (rule.max_flops, rule.max_ms) == (None, 3)
    assert (rule.bounds.min_filters, rule.bounds.max_prune_fraction) == (5, 0.25)


@pytest.mark.parametrize("argv", [["phantom", "--no_prune"], ["acdc", "--model", "nnunet"]])
def test_nothing_is_pruned(argv):
    rule = rule_of(*argv)
    assert type(rule) is Rule and not rule.measures


@pytest.mark.parametrize(("argv", "kind"), [(["phantom"], BudgetRule), (["acdc"], PaperRule)])
def test_filters_at_random(argv, kind):
    rule = rule_of(*argv, "--imp_fun", "random")
    assert type(rule) is RandomRule and type(rule.rule) is kind and rule.measures
    settings = Settings.of({"data": argv[0], "imp_fun": "random", "fms_init": 2})
    assert build_model(settings).imp_fun == build_model(Settings.of({"data": argv[0], "fms_init": 2})).imp_fun

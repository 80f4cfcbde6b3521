import pytest

from lib.build import build_model, build_rule, build_unpruned
from lib.models.filters import format_filters
from lib.models.flat import flops_of_width
from lib.models.nnUNet import nnUNet
from lib.models.size import count_filters, summary
from lib.pruning.rules import Bounds, BudgetRule, PaperRule, RandomRule, Rule
from lib.settings import Settings
from lib.system.error import InputError
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
    for argv in (["phantom"], ["acdc"], ["acdc", "--imp_fun", "random"]):
        rule = rule_of(*argv, "--width_multiple", "8")
        assert getattr(rule, "rule", rule).bounds.multiple == 8


@pytest.mark.parametrize(
    "argv", [["phantom", "--no_prune"], ["acdc", "--model", "nnunet"], ["acdc", "--model", "flat"]]
)
def test_nothing_is_pruned(argv):
    rule = rule_of(*argv)
    assert type(rule) is Rule and not rule.measures


@pytest.mark.parametrize(("argv", "kind"), [(["phantom"], BudgetRule), (["acdc"], PaperRule)])
def test_filters_at_random(argv, kind):
    rule = rule_of(*argv, "--imp_fun", "random")
    assert type(rule) is RandomRule and type(rule.rule) is kind and rule.measures
    settings = Settings.of({"data": argv[0], "imp_fun": "random", "fms_init": 2})
    assert build_model(settings).imp_fun == build_model(Settings.of({"data": argv[0], "fms_init": 2})).imp_fun


SMALL = {"data": "phantom", "fms_init": 8, "levels": 3, "patch_size": (32, 32)}
FLAT = SMALL | {"model": "flat"}


def width_of(given):
    """The one width of the network's blocks but the heads."""
    model = build_model(Settings.of(given))
    assert type(model) is nnUNet
    (width,) = {block.out_filters for block in model.blocks() if not block.head}
    return width


def test_a_flat_network_is_the_widest_of_its_budget():
    unpruned = build_unpruned(Settings.of(FLAT))
    flops = summary(unpruned, (32, 32))["flops"]
    assert flops == summary(build_unpruned(Settings.of(SMALL)), (32, 32))["flops"]  # that of nnUNet
    for limit, most in (("20%", 0.2 * flops), ("100%", flops), ("5M", 5e6)):
        width = width_of(FLAT | {"max_flops": limit})
        assert flops_of_width(unpruned, width, (32, 32)) <= most < flops_of_width(unpruned, width + 1, (32, 32))
    assert width_of(FLAT | {"max_flops": "9T"}) == 480  # --fms_max
    assert width_of(FLAT | {"max_flops": "9T", "fms_max": 3}) == 3
    least = flops_of_width(unpruned, 1, (32, 32))
    assert width_of(FLAT | {"max_flops": str(least)}) == 1
    with pytest.raises(InputError, match=f"--max_flops 5K: a flat network has {least:,} FLOPs at least"):
        build_model(Settings.of(FLAT | {"max_flops": "5K"}))


def test_a_flat_network_without_a_budget():
    assert width_of(FLAT) == 8  # --fms_init, and not what the data set prunes to
    assert width_of(FLAT | {"fms_max": 5}) == 5


def test_a_flat_network_of_a_width_that_is_a_multiple():
    for limit in ("30%", "100%", "20M"):
        width = width_of(FLAT | {"max_flops": limit})
        assert width >= 4
        assert width_of(FLAT | {"max_flops": limit, "width_multiple": 4}) == width // 4 * 4
    assert width_of(FLAT | {"width_multiple": 5}) == 5  # of --fms_init 8
    with pytest.raises(InputError, match="--width_multiple 9: is more than --fms_init 8"):
        build_model(Settings.of(FLAT | {"width_multiple": 9}))
    with pytest.raises(InputError, match="--width_multiple 9: is more than --fms_max 3"):
        build_model(Settings.of(FLAT | {"width_multiple": 9, "fms_max": 3}))
    with pytest.raises(
        InputError, match="--max_flops 1%: a flat network has .* at least with --width_multiple 4; give"
    ):
        build_model(Settings.of(FLAT | {"max_flops": "1%", "width_multiple": 4}))


def test_a_flat_network_follows_strides_and_kernels():
    shape = {"strides": ("11", "21", "22"), "kernels": ("13", "33", "55")}
    model = build_model(Settings.of(FLAT | shape | {"max_flops": "30%"}))
    assert model.strides == ((1, 1), (2, 1), (2, 2)) and model.kernels == ((1, 3), (3, 3), (5, 5))


def test_a_flat_network_takes_no_other_weights():
    """Those of another width would be trained under its name."""
    model = build_model(Settings.of(FLAT), build_model(Settings.of(SMALL)).state_dict(), "model-1")
    assert model.blocks()[0].out_filters == model.blocks()[-2].out_filters == 8
    with pytest.raises(InputError, match="model-1: .* the network needs"):
        model.load(build_model(Settings.of(SMALL)).state_dict(), "model-1")


def test_what_sizes_are_compared_with_knows_no_filter_files(tmp_path):
    counted = count_filters(build_model(Settings.of(SMALL | {"fms_init": 3})))["out"]
    (tmp_path / "out").write_text(format_filters([counted]))
    settings = Settings.of(SMALL | {"out_filters": str(tmp_path / "out")})
    assert count_filters(build_model(settings))["out"] == counted
    assert count_filters(build_unpruned(settings)) == count_filters(build_model(Settings.of(SMALL)))

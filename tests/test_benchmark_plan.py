"""What a benchmark does: its partitions."""

from types import SimpleNamespace

import pytest

from lib.experiments.benchmark import parse_arguments
from lib.experiments.benchmark_plan import choose_partition, flags_of, make_plan
from lib.system.error import InputError
from lib.utils import parseArguments, settings_of


def test_the_partition_is_one_with_ground_truth():
    def data(**files):
        labels = {part: [SimpleNamespace(label=label) for label in files.get(part, [])] for part in DATA}
        return SimpleNamespace(dataset=SimpleNamespace(name="kits"), files=labels.get)

    DATA = ("test", "validation")  # noqa: N806
    assert choose_partition(data(test=["a"], validation=["b"])) == "test"
    assert choose_partition(data(test=[None], validation=["b"])) == "validation"
    with pytest.raises(InputError, match="--split"):
        choose_partition(data(test=[None]))


@pytest.mark.parametrize(
    "flags",
    [["--recipe", "small"], ["--width_multiple", "8", "--min_filters", "3", "--max_flops", "30%"]],
    ids=" ".join,
)
def test_flags_of_pruning_are_for_the_rows_that_prune(flags, tmp_path):
    places = ["--data_path", tmp_path / "data", "--cache_path", tmp_path / "cache", "--device", "cpu"]
    words = ["--data", "phantom", "--output", tmp_path / "out", "--", "--fms_init", "16", *places, *flags]
    plan = make_plan(parse_arguments([*map(str, words)]))
    assert plan.settings.width_multiple == 8 and plan.settings.recipe == ("small" if "small" in flags else "none")
    for row in plan.rows:
        settings = settings_of(parseArguments(["--data", "phantom", *flags_of(row, plan.flags)]))[1]
        assert settings.width_multiple == (1 if settings.model == "nnunet" else 8), row
        limit = "20%" if "small" in flags else "30%"
        assert settings.max_flops == ("none" if settings.model == "nnunet" else limit), row

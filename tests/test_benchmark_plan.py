"""What a benchmark does: its partitions."""

from types import SimpleNamespace

import pytest

from lib.experiments.benchmark_plan import choose_partition
from lib.system.error import InputError


def test_the_partition_is_one_with_ground_truth():
    def data(**files):
        labels = {part: [SimpleNamespace(label=label) for label in files.get(part, [])] for part in DATA}
        return SimpleNamespace(dataset=SimpleNamespace(name="kits"), files=labels.get)

    DATA = ("test", "validation")  # noqa: N806
    assert choose_partition(data(test=["a"], validation=["b"])) == "test"
    assert choose_partition(data(test=[None], validation=["b"])) == "validation"
    with pytest.raises(InputError, match="--split"):
        choose_partition(data(test=[None]))

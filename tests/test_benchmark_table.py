"""The arithmetic of the benchmark's table."""

from functools import partial
from types import SimpleNamespace

import pytest

from lib.data.BaseDataset import case_number
from lib.experiments import benchmark_table as table

paired = partial(table.paired_differences, patient_of=case_number)


def test_mean_and_standard_deviation():
    assert table.spread([0.8, 0.9, 1.0]) == pytest.approx({"mean": 0.9, "sd": 0.1})
    assert table.spread([2.0, None]) == {"mean": 2.0, "sd": None}
    assert table.spread([None]) == {"mean": None, "sd": None}


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5], 2 / 32),  # of 32 signs, these and their mirror image are the most extreme
        ([1, 2, 3, -4], 2 * 7 / 16),  # 7 of 16 have a negative rank sum of at most 4
        ([0, 0], None),
        ([], None),
    ],
)
def test_wilcoxon_by_hand(differences, p):
    assert table.wilcoxon_p([float(d) for d in differences]) == (None if p is None else pytest.approx(p))


def results(*dice):
    """As evaluate.py: Dice of two foreground classes by subject, and averages made up for the test."""
    subjects = {f"s{i}": {"dice": [1.0, *values]} for i, values in enumerate(dice)}
    return subjects | {"average": {"dice": [1.0, *dice[0]], "HD95": [None, 3.0, None]}, "n": {}}


def test_a_row_by_hand():
    seeds = [results([0.8, 0.6], [0.5, None]), results([0.6, 0.2], [None, None])]
    by_seed = {1: seeds[0], 2: seeds[1]}
    assert table.subject_dice(seeds) == pytest.approx({"s0": (0.7 + 0.4) / 2, "s1": 0.5})
    sizes = [
        {"parameters": 2e6, "flops": 4e9, "bytes": 8e6, "training_seconds": 90.0, "inference_seconds": 0.5},
        {"parameters": 1e6, "flops": 2e9, "bytes": 4e6, "training_seconds": 30.0, "inference_seconds": 0.1},
    ]
    dataset = SimpleNamespace(class_names=("background", "a", "b"), case_of=case_number)
    row = table.make_row("ours", by_seed, sizes, by_seed, dataset)
    assert row["seeds"] == [1, 2] and row["wilcoxon_p"] is None
    assert row["dice"]["a"] == pytest.approx({"mean": 0.7, "sd": 0.02**0.5})
    assert row["dice"]["mean foreground"] == pytest.approx({"mean": 0.55, "sd": 0.045**0.5})
    assert row["HD95"]["a"] == {"mean": 3.0, "sd": 0.0}
    assert row["HD95"]["b"] == {"mean": None, "sd": None}
    assert row["training_seconds"] == pytest.approx({"mean": 60.0, "sd": 1800**0.5})
    assert row["by_seed"]["flops"] == [4e9, 2e9]
    line = table.format_table([row], row | {"flops": {"mean": 12e9}}).splitlines()[2]
    assert line == (
        "| ours | 0.700 ± 0.141 | 0.400 ± 0.283 | 0.550 ± 0.212 | 3.00 ± 0.00 | - | 3.00 ± 0.00 | "
        "1.500 ± 0.707 (100%) | 3.000 ± 1.414 (25%) | 6.00 ± 2.83 | 1.0 ± 0.7 | 0.300 ± 0.283 | - | "
        "+0.000 [+0.000, +0.000] |"
    )


def test_milliseconds_stand_beside_the_flops():
    """Of the runtimes that were measured, with the share of the reference's."""
    sizes = {"parameters": 2e6, "flops": 1e9, "bytes": 8e6, "training_seconds": 90.0, "inference_seconds": 0.5}
    dataset = SimpleNamespace(class_names=("background", "a", "b"), case_of=case_number)
    by_seed, reference = {1: results([0.8, 0.6])}, {key: {"mean": 4e9} for key in sizes}
    for times, head, cells in [
        ({"torch_ms": 3.0, "openvino_ms": 2.0}, "torch, ms | OpenVINO, ms | ", "3.000 (75%) | 2.000 (20%) | "),
        ({"torch_ms": 3.0}, "torch, ms | ", "3.000 (75%) | "),
        ({}, "", ""),
    ]:
        row = table.make_row("ours", by_seed, [sizes | times], by_seed, dataset)
        compared = reference | {"torch_ms": {"mean": 4.0}, "openvino_ms": {"mean": 10.0}}
        first, _, line = table.format_table([row], compared).splitlines()
        assert f"| FLOPs, G | {head}file, MB |" in first and f"| 1.000 (25%) | {cells}8.00 |" in line


def images(*dice):
    """As evaluate.py, of one seed: patients of two images each."""
    return {f"p{i // 2 + 1}_{i % 2}": {"dice": [1.0, d]} for i, d in enumerate(dice)}


def test_differences_are_paired_by_patient():
    ours, theirs = {1: images(0.8, 0.6, 0.5, 0.7)}, {1: images(0.6, 0.6, 0.4, None)}
    differences = paired(ours, theirs)
    assert differences == pytest.approx([0.7 - 0.6, 0.6 - 0.4])
    found = table.mean_difference(differences)
    # t(0.975, 1) = 12.706, sd = 0.0707, so 12.706 * 0.05
    assert found == pytest.approx({"mean": 0.15, "low": 0.15 - 0.6353, "high": 0.15 + 0.6353, "n": 2}, abs=1e-4)
    assert table.format_difference(found) == "+0.150 [-0.485, +0.785]"
    one = paired({1: images(1, 1, None, None)}, {1: images(0.5, 1, 1, 1)})
    assert table.format_difference(table.mean_difference(one)) == "+0.250"


def test_p_counts_patients_not_images():
    differences = paired({1: images(*[0.9, 0.8] * 5)}, {1: images(*[0.1, 0.2] * 5)})
    assert len(differences) == 5
    assert table.wilcoxon_p(differences) == pytest.approx(2 / 32)


def test_only_common_seeds_are_compared():
    ours, theirs = {1: images(0.5, 0.5), 2: images(0.9, 0.9)}, {2: images(0.8, 0.8), 3: images(0.1, 0.1)}
    assert paired(ours, theirs) == pytest.approx([0.1])
    assert paired(ours, {3: images(0.1, 0.1)}) == []
    assert table.mean_difference([]) == {"mean": None, "low": None, "high": None, "n": 0}


def test_patients_are_told_by_the_data_set():
    """The ids of one's own data need no number."""
    ours, theirs = ({1: {"anna": {"dice": [1.0, a]}, "bert": {"dice": [1.0, b]}}} for a, b in ((0.8, 0.6), (0.6, 0.5)))
    assert table.paired_differences(ours, theirs, lambda subject: subject) == pytest.approx([0.2, 0.1])
    assert table.paired_differences(ours, theirs, len) == pytest.approx([0.15])  # one patient of two images

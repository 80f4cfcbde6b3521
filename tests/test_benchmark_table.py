"""The arithmetic of the benchmark's table."""

from functools import partial
from types import SimpleNamespace

import pytest

from lib.data.BaseDataset import case_number
from lib.experiments import benchmark_table as table

paired = partial(table.paired_differences, patient_of=case_number)
NO_FOLDS = dict.fromkeys(range(1, 10))


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
    assert table.patient_dice(seeds[0], str) == pytest.approx({"s0": 0.7, "s1": 0.5})
    assert table.patient_dice(seeds[1], str) == pytest.approx({"s0": 0.4})
    sizes = [
        {"parameters": 2e6, "flops": 4e9, "bytes": 8e6, "training_seconds": 90.0, "inference_seconds": 0.5},
        {"parameters": 1e6, "flops": 2e9, "bytes": 4e6, "training_seconds": 30.0, "inference_seconds": 0.1},
    ]
    dataset = SimpleNamespace(class_names=("background", "a", "b"), case_of=case_number)
    row = table.make_row("ours", by_seed, sizes, by_seed, dataset, NO_FOLDS)
    assert row["seeds"] == [1, 2] and row["wilcoxon_p"] is None
    found = row["dice_by_patient"]
    assert found["by_training"] == pytest.approx([0.6, 0.4]) and found["mean"] == pytest.approx(0.5)
    assert (found["n"], found["cases"]) == (2, 2)
    assert row["dice"]["a"] == pytest.approx({"mean": 0.7, "sd": 0.02**0.5})
    assert row["dice"]["mean foreground"] == pytest.approx({"mean": 0.55, "sd": 0.045**0.5})
    assert row["HD95"]["a"] == {"mean": 3.0, "sd": 0.0}
    assert row["HD95"]["b"] == {"mean": None, "sd": None}
    assert row["training_seconds"] == pytest.approx({"mean": 60.0, "sd": 1800**0.5})
    assert row["by_seed"]["flops"] == [4e9, 2e9]
    first = table.make_row("ours", {1: seeds[0]}, sizes[:1], by_seed, dataset, NO_FOLDS)
    assert table.format_table([first], row).splitlines()[2].endswith("| +0.000 [+0.000, +0.000] (one seed) |")
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
        row = table.make_row("ours", by_seed, [sizes | times], by_seed, dataset, NO_FOLDS)
        compared = reference | {"torch_ms": {"mean": 4.0}, "openvino_ms": {"mean": 10.0}}
        first, _, line = table.format_table([row], compared).splitlines()
        assert f"| FLOPs, G | {head}file, MB |" in first and f"| 1.000 (25%) | {cells}8.00 |" in line


def images(*dice):
    """As evaluate.py, of one seed: patients of two images each."""
    return {f"p{i // 2 + 1}_{i % 2}": {"dice": [1.0, d]} for i, d in enumerate(dice)}


def test_differences_are_paired_by_patient():
    """0.1 and 0.2. A bootstrap of two has the means 0.1, 0.15 and 0.2, a quarter, a half and a quarter of them."""
    ours, theirs = {1: images(0.8, 0.6, 0.5, 0.7)}, {1: images(0.6, 0.6, 0.4, None)}
    differences = paired(ours, theirs)
    assert list(differences) == [1] and differences[1] == pytest.approx({1: 0.7 - 0.6, 2: 0.6 - 0.4})
    found = table.over_seeds(differences, NO_FOLDS)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.15, 0.1, 0.2))
    assert (found["n"], found["cases"], found["t"]["low"]) == (1, 2, None)
    assert table.describe(found) == "+0.150 [+0.100, +0.200], 2 patients, one seed"
    one = table.over_seeds(paired({1: images(1, 1, None, None)}, {1: images(0.5, 1, 1, 1)}), NO_FOLDS)
    assert table.format_difference(one) == "+0.250"


def test_intervals_are_over_patients_and_seeds():
    """Both patients are better by 0.3 with one seed, and by 0.1 with the other: only the seeds vary. Student's: the
    standard deviation of both means is sqrt(0.02), so 12.706205 * sqrt(0.02) / sqrt(2) = 1.2706205."""
    ours, theirs = {1: images(*[0.9] * 4), 2: images(*[0.7] * 4)}, dict.fromkeys((1, 2), images(*[0.6] * 4))
    found = table.over_seeds(paired(ours, theirs), NO_FOLDS)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.2, 0.1, 0.3))
    assert (found["n"], found["cases"]) == (2, 2)
    assert (found["t"]["low"], found["t"]["high"]) == pytest.approx((0.2 - 1.2706205, 0.2 + 1.2706205), abs=1e-6)
    assert table.describe(found) == (
        "+0.200 [+0.100, +0.300], 2 patients, 2 seeds; Student's t over the seeds' means: [-1.071, +1.471]"
    )


def test_seeds_of_one_fold_share_their_patients():
    """Both seeds find the same for each of 9 patients. Of one fold, they add nothing, and the interval is that of one
    seed. Of two folds they are other patients, and it is narrower, by a factor of about sqrt(2)."""
    values = dict.fromkeys((1, 2), {patient: 0.01 * patient for patient in range(9)})
    one = table.over_seeds({1: values[1]}, {1: "0"})
    same, other = (table.over_seeds(values, {1: "0", 2: fold}) for fold in "01")
    widths = [found["high"] - found["low"] for found in (one, same, other)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert 0.6 * widths[0] < widths[2] < 0.9 * widths[0]  # not quite: the same seed may be drawn twice
    assert [found["mean"] for found in (one, same, other)] == pytest.approx([0.04] * 3)


def test_p_counts_patients_not_images():
    differences = paired({1: images(*[0.9, 0.8] * 5)}, {1: images(*[0.1, 0.2] * 5)})
    means = table.patient_means(differences)
    assert len(means) == 5
    assert table.wilcoxon_p(means) == pytest.approx(2 / 32)


def test_p_averages_over_the_seeds_that_have_a_patient():
    assert table.patient_means({1: {"a": 0.25, "b": 0.5}, 2: {"b": 1.0, "c": -1.0}}) == [0.25, 0.75, -1.0]


def test_only_common_seeds_are_compared():
    ours, theirs = {1: images(0.5, 0.5), 2: images(0.9, 0.9)}, {2: images(0.8, 0.8), 3: images(0.1, 0.1)}
    assert paired(ours, theirs) == {2: pytest.approx({1: 0.1})}
    assert paired(ours, {3: images(0.1, 0.1)}) == {}
    found = table.over_seeds({}, NO_FOLDS)
    assert (found["mean"], found["low"], found["high"], found["n"]) == (None, None, None, 0)
    assert table.describe(found) == "-, 0 patients, 0 seeds"


def test_patients_are_told_by_the_data_set():
    """The ids of one's own data need no number."""
    ours, theirs = ({1: {"anna": {"dice": [1.0, a]}, "bert": {"dice": [1.0, b]}}} for a, b in ((0.8, 0.6), (0.6, 0.5)))
    by_subject = table.paired_differences(ours, theirs, lambda subject: subject)
    assert by_subject == {1: pytest.approx({"anna": 0.2, "bert": 0.1})}
    assert table.paired_differences(ours, theirs, len) == {1: pytest.approx({4: 0.15})}  # one patient of two images


def test_notes_say_what_the_intervals_are_of():
    """Of the seeds, Student's stands below the table only where there are several."""
    seeds = {1: images(*[0.5] * 4), 2: images(*[0.7] * 4)}
    found, one = (table.over_seeds(paired(ours, seeds), NO_FOLDS) for ours in (seeds, {1: seeds[1]}))
    common = {"seeds": [1], "trained_on": ["a PC"]}
    rows = {
        "nnunet": common | {"row": "nnUNet", "difference": found},
        "sauron": common | {"row": "Sauron", "difference": found},
        "nnunet-flat": common | {"row": "flat", "difference": one, "sauron_minus_this": one},
    }
    given = ("data", "subjects", "partition", "patients", "patch", "place", "mirrored", "n_timed", "half", "rest")
    notes = table.format_notes(rows, dict.fromkeys(given, "x") | {"epochs": 4, "lr": 0.003})
    whole = " ".join(notes[0].split())
    assert "a 95% interval of a two-level bootstrap (10,000 resamples, percentiles)" in whole
    assert "With one seed the interval is over its patients alone" in whole
    assert [note for note in notes if " minus " in note] == [
        "Sauron minus nnUNet: +0.000 [+0.000, +0.000], 2 patients, 2 seeds; "
        "Student's t over the seeds' means: [+0.000, +0.000]",
        "Sauron minus flat: +0.000 [+0.000, +0.000], 2 patients, one seed",
    ]

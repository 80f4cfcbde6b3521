"""The fingerprint: what is drawn and measured, against numpy and against what nnU-Net measures."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data import fingerprint, images
from lib.data.fingerprint import Draws, draw, draws_per_case, measure, nonzero_box, statistics

HIPPOCAMPI = Path(__file__).resolve().parents[2] / "shared" / "Task04_Hippocampus"


def expanded(draws):
    return np.repeat(draws.values, draws.counts)


@pytest.mark.parametrize("n", [1, 5000, 2**20 + 7])
def test_the_draws_are_those_of_choice_one_channel_after_the_other(n):
    voxels = np.random.default_rng(0).normal(size=(2, 3001)).astype(np.float32).round(2)
    ours, theirs = np.random.RandomState(1234), np.random.RandomState(1234)
    for channel in voxels:
        drawn = draw(channel, n, ours)
        assert np.array_equal(expanded(drawn), np.sort(theirs.choice(channel, n, replace=True)))
        assert (np.diff(drawn.values) > 0).all() and drawn.values.dtype == np.float32


def test_draws_from_nothing_draw_nothing():
    random = np.random.RandomState(1234)
    assert len(draw(np.zeros(0, np.int16), 100, random).values) == 0
    assert random.randint(1000) == np.random.RandomState(1234).randint(1000)


@given(st.lists(st.tuples(st.integers(-3, 9), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 4))
def test_statistics_are_those_of_all_draws_together(pairs, n_cases):
    cases = [pairs[start::n_cases] for start in range(n_cases)]
    draws = [Draws(np.array([v for v, _ in c], "f4"), np.array([n for _, n in c], int)) for c in cases]
    pool = np.concatenate([expanded(one) for one in draws]).astype(float)
    low, median, high = np.percentile(pool, (0.5, 50, 99.5))
    assert statistics(draws) == pytest.approx(
        {
            "mean": pool.mean(),
            "median": median,
            "std": pool.std(),
            "min": pool.min(),
            "max": pool.max(),
            "percentile_00_5": low,
            "percentile_99_5": high,
        },
        abs=1e-12,
    )


def test_the_box_holds_what_some_channel_has():
    ring = np.zeros((1, 7, 8), np.int16)
    ring[0, 1:5, 2:6] = 1
    ring[0, 2:4, 3:5] = 0
    voxel = np.zeros((1, 7, 8), np.float32)
    voxel[0, 5, 6] = -1
    assert nonzero_box([ring, voxel]) == (slice(0, 1), slice(1, 6), slice(2, 7))
    assert nonzero_box([ring * 0]) == (slice(0, 1), slice(0, 7), slice(0, 8))


def test_a_case_is_measured_in_the_reverse_of_its_stored_order_and_within_the_crop():
    image, foreground = np.zeros((4, 5, 6), np.int16), np.zeros((4, 5, 6), bool)
    image[1:3, 1:5, 2:5] = np.arange(1, 25).reshape(2, 4, 3)
    foreground[1, 1:3, 2:4] = foreground[0, 0, 0] = True  # the last lies outside the crop
    case = measure([image], foreground, (1.0, 2.0, 3.0), 1000)
    assert (case.shape, case.spacing, case.relative_size) == ((3, 4, 2), (3.0, 2.0, 1.0), 24 / 120)
    voxels = image.T[(foreground & (image > 0)).T]
    assert np.array_equal(expanded(case.draws[0]), np.sort(np.random.RandomState(1234).choice(voxels, 1000)))
    both = measure([image, image + 1], foreground, (1.0, 2.0, 3.0), 1000)
    assert both.shape == (6, 5, 4) and both.draws[0].values[0] == 0  # the second channel has no 0


def test_cases_without_foreground_count_but_for_intensities():
    image = np.arange(1, 28, dtype=np.float32).reshape(3, 3, 3)
    foreground = np.zeros((3, 3, 3), bool)
    empty = measure([image], foreground, (1.0, 1.0, 1.0), 50)
    foreground[2, 1, 0] = True
    full = measure([image], foreground, (1.0, 1.0, 2.0), 50)
    found = fingerprint.fingerprint([empty, full])
    assert found.shapes == ((3, 3, 3),) * 2 and found.spacings == ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0))
    assert found.intensities[0]["mean"] == image[2, 1, 0] and found.intensities[0]["std"] == 0
    with pytest.raises(ValueError, match="no foreground"):
        fingerprint.fingerprint([empty])


@pytest.mark.skipif(not HIPPOCAMPI.is_dir(), reason="the hippocampi (../shared) are not here")
def test_the_hippocampi_have_the_fingerprint_that_nnunet_measures():
    paths = sorted((HIPPOCAMPI / "imagesTr").glob("[!.]*.nii.gz"))
    cases = []
    for path in paths:
        volume, label = images.read(path), images.read(HIPPOCAMPI / "labelsTr" / path.name)
        cases.append(measure([volume.array], label.array > 0, volume.geometry.spacing_mm, draws_per_case(len(paths))))
    found = fingerprint.fingerprint(cases)
    assert len(paths) == 200 and found.relative_size == 1.0 and set(found.spacings) == {(1.0, 1.0, 1.0)}
    assert found.shapes[:5] == ((35, 51, 35), (38, 52, 36), (34, 52, 35), (40, 47, 34), (40, 48, 36))
    sizes = np.array(found.shapes)
    assert [f(sizes, 0).tolist() for f in (np.min, np.median, np.max)] == [[24, 40, 32], [36, 50, 35], [47, 58, 43]]
    assert found.intensities[0] == pytest.approx(
        {
            "mean": 22131.045,
            "median": 361.76712,
            "std": 59159.176,
            "min": 0,
            "max": 486420.22,
            "percentile_00_5": 28.0,
            "percentile_99_5": 267369.22,
        },
        rel=1e-7,
    )

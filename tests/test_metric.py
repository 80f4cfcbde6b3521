"""The metrics against medpy and surface-distance, on numbers worked out by hand, on random and on real masks."""

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from medpy.metric import binary
from scipy import ndimage
from surface_distance import compute_surface_dice_at_tolerance, compute_surface_distances

from lib.metric import METRICS, label_metrics, mask_metrics

# surface-distance imports SciPy by its old names
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
SPACING_MM = (0.7, 1.3, 3.1)


def assert_agrees(prediction, truth, spacing_mm, tolerance_mm=1.64):
    """`mask_metrics` of two masks, neither of them empty, equals medpy's and surface-distance's to 1e-9."""
    ours = mask_metrics(prediction, truth, spacing_mm, tolerance_mm)
    surfaces = compute_surface_distances(truth, prediction, spacing_mm)
    reference = {
        "dice": binary.dc(prediction, truth),
        "HD": binary.hd(prediction, truth, spacing_mm),
        "HD95": binary.hd95(prediction, truth, spacing_mm),
        "ASSD": binary.assd(prediction, truth, spacing_mm),
        "surface_dice": compute_surface_dice_at_tolerance(surfaces, tolerance_mm),
        "TP": np.sum(prediction & truth),
        "TN": np.sum(~prediction & ~truth),
        "FP": np.sum(prediction & ~truth),
        "FN": np.sum(~prediction & truth),
    }
    assert ours == pytest.approx(reference, rel=1e-9, abs=1e-9)


masks = array_shapes(min_dims=3, max_dims=3, max_side=6).flatmap(lambda shape: st.tuples(*[arrays(bool, shape)] * 2))
spacings = st.tuples(*[st.sampled_from([0.5, 0.78200000524, 1.0, 1.5625, 3.0, 10.0])] * 3)


@settings(deadline=None, max_examples=150)
@given(masks, spacings, st.sampled_from([0.0, 1.0, 1.64, 3.0]))
def test_agrees_with_independent_libraries_on_arbitrary_masks(pair, spacing_mm, tolerance_mm):
    prediction, truth = pair
    if prediction.any() and truth.any():
        assert_agrees(prediction, truth, spacing_mm, tolerance_mm)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(40, 30, 12), (50, 40, 1), (1, 30, 30), (25, 1, 1)])
def test_agrees_on_blobs_that_touch_the_border(shape, order):
    smooth = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(2, *shape)), (0, 2, 2, 1))
    prediction, truth = (np.asarray(mask > np.quantile(mask, 0.6), order=order) for mask in smooth)
    assert_agrees(prediction, truth, SPACING_MM)


def test_numbers_worked_out_by_hand():
    truth = np.zeros((9, 9, 9), bool)
    prediction = truth.copy()
    truth[2:5, 3:6, 4] = True  # 9 voxels in one plane: all are surface
    prediction[2:5, 3:6, 5] = True  # the same, one slice on
    prediction[8, 4, 5] = True  # and one voxel 4 rows from it; 4 * 0.5 and 2 mm from the truth
    ours = mask_metrics(prediction, truth, (0.5, 1.0, 2.0), 1.0)
    far = math.hypot(4 * 0.5, 2.0)
    hd95 = np.percentile([2.0] * 18 + [far], 95)
    assd = (18 * 2.0 + far) / 19
    expected = {"dice": 0.0, "HD": far, "HD95": hd95, "ASSD": assd, "TP": 0, "TN": 710, "FP": 10, "FN": 9}
    assert {key: ours[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert 0 < ours["surface_dice"] < 1  # the planes share the corners between them


def test_tolerance_includes_its_end():
    truth = np.zeros((12, 8, 8), bool)
    truth[2:6, 2:6, 2:6] = True
    prediction = np.roll(truth, 1, axis=0)
    assert mask_metrics(prediction, truth, (1.5, 1, 1), 1.5)["surface_dice"] == 1.0
    assert mask_metrics(prediction, truth, (1.5, 1, 1), np.nextafter(1.5, 0))["surface_dice"] < 1.0


@given(arrays(np.uint8, (5, 4, 3), elements=st.integers(0, 2)))
def test_a_label_map_equals_itself(labels):
    ours = label_metrics(labels, labels, SPACING_MM, 3)
    for label in range(1, 3):
        present = (labels == label).any()
        assert [ours[key][label] for key in ("dice", "surface_dice")] == ([1.0, 1.0] if present else [None, None])
        assert [ours[key][label] for key in ("HD", "HD95", "ASSD")] == [0.0 if present else None] * 3
    assert sum(ours["TP"]) == labels.size and ours["FP"] == ours["FN"] == [0, 0, 0]


@settings(deadline=None)
@given(st.tuples(*[arrays(np.int16, (6, 5, 4), elements=st.sampled_from([0, 0, 0, 0, 1, 2]))] * 2))
def test_label_metrics_are_mask_metrics_of_each_class_in_any_larger_volume(pair):
    prediction, truth = pair
    ours = label_metrics(prediction, truth, SPACING_MM, 3)
    padded = label_metrics(np.pad(prediction, 3), np.pad(truth, 3), SPACING_MM, 3)
    assert tuple(ours) == METRICS
    for label in range(3):
        values = {key: ours[key][label] for key in METRICS}
        masks = mask_metrics(prediction == label, truth == label, SPACING_MM)
        if label == 0:
            masks |= dict.fromkeys(("HD", "HD95", "ASSD", "surface_dice"))
            assert padded["TP"][0] - ours["TP"][0] == 12 * 11 * 10 - 6 * 5 * 4
        else:
            assert all(padded[key][label] == ours[key][label] for key in METRICS if key != "TN")
        assert values == masks


@pytest.mark.parametrize(("in_prediction", "in_truth", "dice"), [(1, 0, 0.0), (0, 1, 0.0), (0, 0, None)])
def test_missing_classes(in_prediction, in_truth, dice):
    prediction, truth = np.zeros((2, 4, 4, 2), np.uint8)
    prediction[1, 1, 1], truth[2, 2, 1] = in_prediction, in_truth
    ours = label_metrics(prediction, truth, (1.0, 1.0, 1.0), 2)
    assert ours["dice"][1] == dice and ours["surface_dice"][1] == dice
    assert [ours[key][1] for key in ("HD", "HD95", "ASSD")] == [None] * 3
    assert ours["FP"][1] == in_prediction and ours["FN"][1] == in_truth


def perturbations(truth):
    """Masks that err as predictions do: moved, eroded, grown, with a hole or a slice missing."""
    yield "moved", np.roll(truth, (2, -3, 0), (0, 1, 2))
    yield "eroded", ndimage.binary_erosion(truth)
    yield "grown", ndimage.binary_dilation(truth, iterations=2)
    yield "far", np.roll(truth, (60, 50, 1), (0, 1, 2))
    without_slice = truth.copy()
    without_slice[:, :, truth.any(axis=(0, 1)).argmax()] = False
    yield "slice missing", without_slice


@pytest.mark.parametrize("name", ["patient002_frame01", "patient092_frame01"])
def test_agrees_on_real_hearts(name):
    path = SHARED / "acdc" / "training" / name.split("_")[0] / f"{name}_gt.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there: real ACDC masks are not part of the project")
    image = nib.load(path)
    labels = np.asarray(image.dataobj)
    spacing_mm = tuple(float(size) for size in image.header.get_zooms())
    for label in (1, 2, 3):
        for _, prediction in perturbations(labels == label):
            if prediction.any():
                assert_agrees(prediction, labels == label, spacing_mm)


def test_agrees_on_a_real_kidney():
    path = SHARED / "kits19" / "case_00021" / "segmentation.nii.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there: real KiTS masks are not part of the project")
    image = nib.load(path)
    truth = np.asarray(image.dataobj)[:, 100:400, 300:] > 0
    assert_agrees(np.roll(truth, (1, 4, -3), (0, 1, 2)), truth, tuple(float(size) for size in image.header.get_zooms()))

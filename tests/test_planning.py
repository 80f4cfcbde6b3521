import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.data.fingerprint import Fingerprint
from lib.data.planning import new_shape, plan, table, target_spacing, topology
from lib.system.error import InputError

CT = {"mean": 101.0, "median": 99.0, "std": 76.9, "min": -900.0, "max": 900.0}
CT |= {"percentile_00_5": -79.0, "percentile_99_5": 304.0}


def made(*cases, channels=1, relative=1.0):
    """A fingerprint of (shape, n, spacing) groups."""
    shapes = [shape for shape, n, _ in cases for _ in range(n)]
    spacings = [spacing for _, n, spacing in cases for _ in range(n)]
    return Fingerprint(tuple(shapes), tuple(spacings), relative, (CT,) * channels)


def words(rows):
    return " ".join("".join(map(str, row)) for row in rows)


# The hippocampi have a median shape of 36 x 50 x 35; then made-up data sets like ACDC (A1, A2), KiTS (K1, K3), BraTS
# (B), png slices (P), prostate (S), an array whose coarse axis is the last one (T).
CASES = {
    "H": (made(((36, 50, 35), 200, (1, 1, 1))), ["MRI"], 3),
    "A1": (made(((10, 216, 256), 160, (10, 1.5, 1.5)), ((18, 216, 256), 40, (5, 1.5, 1.5))), ["MR"], 4),
    "A2": (made(((10, 216, 256), 200, (10, 1.5, 1.5))), ["MR"], 4),
    "K1": (made(((107, 512, 512), 210, (3, 0.78125, 0.78125))), ["CT"], 3),
    "K3": (made(((100, 512, 512), 80, (4, 0.8, 0.8)), ((800, 512, 512), 20, (0.5, 0.8, 0.8))), ["CT"], 3),
    "B": (made(((140, 171, 137), 484, (1, 1, 1)), channels=4, relative=0.36), ["a", "b", "c", "d"], 4),
    "P": (made(((1, 512, 512), 100, (999, 1, 1)), channels=3), ["R", "G", "B"], 2),
    "S": (made(((20, 320, 320), 32, (3.6, 0.625, 0.625)), channels=2), ["T2", "ADC"], 3),
    "T": (made(((256, 256, 40), 50, (1, 1, 4))), ["MR"], 2),
}
# name, dim: patch, batch, strides, kernels, estimate
LITERALS = {
    ("H", "2D"): ((56, 40), 281, "11 22 22 22", "33 33 33 33", 651840),
    ("H", "3D"): ((40, 56, 40), 7, "111 222 222 222", "333 333 333 333", 19174400),
    ("A1", "2D"): ((224, 256), 56, "11 22 22 22 22 22", "33 33 33 33 33 33", 18063360),
    ("A1", "3D"): ((20, 224, 256), 4, "111 122 222 222 122 122", "133 333 333 333 333 333", 310481920),
    ("A2", "3D"): ((10, 224, 256), 7, "111 122 122 222 122 122", "133 133 333 333 333 333", 170562560),
    ("K1", "2D"): ((512, 512), 12, "11 22 22 22 22 22 22 22", "33 33 33 33 33 33 33 33", 82886656),
    ("K1", "3D"): ((40, 224, 224), 2, "111 122 222 222 222 122", "133 333 333 333 333 333", 539611520),
    ("K3", "3D"): ((128, 128, 128), 2, "111 222 222 222 222 222", "333 333 333 333 333 333", 452796416),
    ("B", "2D"): ((192, 160), 105, "11 22 22 22 22 22", "33 33 33 33 33 33", 9676800),
    ("B", "3D"): ((128, 128, 128), 2, "111 222 222 222 222 222", "333 333 333 333 333 333", 454893568),
    ("P", "2D"): ((512, 512), 5, "11 22 22 22 22 22 22 22", "33 33 33 33 33 33 33 33", 82624512),
    ("S", "2D"): ((320, 320), 32, "11 22 22 22 22 22 22", "33 33 33 33 33 33 33", 32332800),
    ("S", "3D"): ((20, 320, 256), 2, "111 122 122 222 222 122 122", "133 133 333 333 333 333 333", 483315200),
    ("T", "2D"): ((256, 256), 49, "11 22 22 22 22 22 22", "33 33 33 33 33 33 33", 20627456),
    ("T", "3D"): ((32, 224, 224), 2, "111 122 122 222 222 222", "133 133 333 333 333 333", 471478784),
}


def plan_of(name, memory_gb=8.0, n_training=None, **flags):
    fingerprint, channels, n_labels = CASES[name]
    n_training = n_training or len(fingerprint.shapes)
    return plan(fingerprint, channels, n_labels, n_training, given=flags, memory_gb=memory_gb)


@pytest.mark.parametrize(("name", "dim"), LITERALS)
def test_plans_are_those_of_nnunet(name, dim):
    found = plan_of(name, dim=dim)
    patch, batch, strides, kernels, estimate = LITERALS[name, dim]
    assert (found.patch_size, found.batch_size, found.estimate) == (patch, batch, estimate)
    assert (words(found.strides), words(found.kernels)) == (strides, kernels)
    most = 512 if dim == "2D" else 320
    assert found.widths == tuple(min(32 * 2**i, most) for i in range(found.levels)) and found.fms_max == most


def test_the_batch_depends_on_the_number_of_training_cases():
    assert plan_of("H", dim="2D", n_training=260).batch_size == 366
    assert plan_of("H", dim="3D", n_training=260).batch_size == 9


def test_spacing_and_axis_order_are_those_of_nnunet():
    assert plan_of("A1", dim="3D").spacing == (5, 1.5, 1.5)
    assert plan_of("A1", dim="2D").spacing == (None, 1.5, 1.5)
    assert plan_of("K3", dim="3D").spacing == pytest.approx((0.80001, 0.8, 0.8))
    turned = plan_of("T", dim="3D")
    assert (turned.transpose, turned.spacing) == ((2, 0, 1), (4, 1, 1))
    stays = target_spacing([(4, 0.8, 0.8)] * 3, [(200, 512, 512)] * 3)  # 600 is not below 512
    assert stays.tolist() == [4, 0.8, 0.8]
    assert new_shape((5, 10, 10), (1, 1, 1), (2, 4, 1)) == (2, 2, 10)  # 2.5 becomes 2, as Python rounds


def test_low_resolution_exists_for_large_volumes_alone():
    exist = {name: plan_of(name, dim="3D").lowres for name, dim in LITERALS if dim == "3D"}
    assert {name for name, low in exist.items() if low} == {"K1", "K3"}
    low = exist["K1"]
    assert low.topology.patch == (64, 192, 160) and (low.batch, low.estimate) == (2, 528522240)
    assert low.spacing == pytest.approx((3, 1.49696, 1.49696), abs=1e-5)
    assert words(low.topology.strides) == "111 122 222 222 222 222"
    low = exist["K3"]
    assert low.topology.patch == (128,) * 3 and low.spacing == pytest.approx((2.00009, 2.00006, 2.00006), abs=1e-5)
    assert plan_of("K1", dim="3D").batch_dice and not plan_of("H", dim="3D").batch_dice


def test_more_memory_gives_larger_plans():
    assert [plan_of("A1", 24, dim=dim).batch_size for dim in ("2D", "3D")] == [169, 10]
    large = plan_of("B", 24, dim="3D")
    assert (large.patch_size, large.batch_size) == ((160, 192, 160), 3)
    large = plan_of("K1", 24, dim="3D")
    assert (large.patch_size, large.levels, large.lowres) == ((64, 320, 256), 7, None)
    assert plan_of("H", 24, dim="3D").patch_size == (40, 56, 40) and plan_of("H", 24, dim="3D").batch_size == 7


def test_a_median_between_two_sizes_is_not_rounded():
    found = plan(made(((40, 56, 40), 10, (1, 1, 1)), ((41, 57, 41), 10, (1, 1, 1))), ["MR"], 3, 20)
    assert found.patch_size == (48, 64, 48)


def test_small_images_get_the_three_levels_that_the_network_needs():
    assert words(topology((1, 1, 1), (10, 10, 10)).strides) == "111 222"  # nnU-Net's own
    assert words(topology((1, 1, 1), (7, 7, 7)).strides) == "111"
    for n in (10, 7, 4):
        found = plan(made(((n, n, n), 20, (1, 1, 1))), ["MR"], 3, 20)
        assert found.levels == 3 and max(found.patch_size) // 4 > 1
        assert "this network needs 3" in table(found)


def test_z_score_is_taken_over_the_mask_where_the_crop_takes_much_away():
    assert [one.masked for one in plan_of("B").normalizations] == [True] * 4
    assert not any(one.masked for one in plan_of("B", crop=False).normalizations)
    assert [one.masked for one in plan_of("A1").normalizations] == [False]
    ct = plan_of("K1").normalizations[0]
    assert (ct.scheme, ct.low, ct.high, ct.mean, ct.std) == ("ct", -79, 304, 101, 76.9)


def test_slices_are_the_default_for_thick_ones():
    assert [name for name in CASES if plan_of(name).dim == "2D"] == ["A1", "A2", "P", "S", "T"]


def test_flags_take_the_place_of_what_is_planned():
    found = plan_of("H", spacing=(2, 0, 0), fms_init=16, batch_size=2)
    assert found.spacing == (2, 1, 1) and found.median_shape == (18, 50, 35)
    assert found.widths[:3] == (16, 32, 64) and found.batch_size == 2
    assert plan_of("H", patch_size=(32, 32, 32)).patch_size == (32, 32, 32)
    assert plan_of("H", levels=3).patch_size == (36, 52, 36)
    assert words(plan_of("H", strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2)]).strides) == "111 122 222"
    assert plan_of("K1", normalization=("zscore",)).normalizations[0].scheme == "zscore"
    assert plan_of("T", axes=(0, 1, 2), dim="3D").spacing == (1, 1, 4)
    assert "--spacing" in table(plan_of("H", spacing=(2, 0, 0)))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("P", {"dim": "3D"}, "--dim 3D: the images are single slices"),
        ("H", {"patch_size": (30, 32, 32)}, "--patch_size 30 32 32: must be a multiple of"),
        ("H", {"patch_size": (32, 32)}, "--patch_size: a 3D network needs 3 numbers"),
        ("H", {"levels": 9}, "--levels 9: a patch"),
        ("H", {"axes": (0, 0, 1)}, "--axes 0 0 1"),
        ("H", {"normalization": ("ct", "ct")}, "--normalization"),
        ("H", {"kernels": [(3, 3, 3)]}, "--kernels"),
    ],
)
def test_flags_that_do_not_fit_are_named(name, flags, message):
    with pytest.raises(InputError, match=message):
        plan_of(name, **flags)


def test_the_table_says_why():
    text = table(plan_of("A1", dim="3D"))
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "5 x 1.5 x 1.5 mm" in text and "6.7 times coarser (10 mm), so the 10th" in text
    assert "20 x 224 x 256" in text and "111 122 222 222 122 122" in text


SIZES, MM = st.tuples(*[st.integers(2, 300)] * 3), st.tuples(*[st.floats(0.3, 12)] * 3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(SIZES, MM), min_size=1, max_size=4), st.sampled_from(["2D", "3D"]), st.integers(2, 9))
def test_every_plan_is_a_network(cases, dim, n_labels):
    fingerprint = made(*((shape, 2, spacing) for shape, spacing in cases))
    try:
        found = plan(fingerprint, ["MR"], n_labels, 2 * len(cases), given={"dim": dim})
    except InputError as error:
        assert "single slices" in str(error)
        return
    divisor = [math.prod(axis) for axis in zip(*found.strides, strict=True)]
    assert all(n % d == 0 for n, d in zip(found.patch_size, divisor, strict=True)) and found.batch_size >= 2
    assert found.levels == len(found.kernels) == len(found.widths) >= 3 and set(found.strides[0]) == {1}
    assert max(n // d for n, d in zip(found.patch_size, divisor, strict=True)) > 1

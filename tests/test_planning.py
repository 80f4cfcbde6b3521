"""Planning: nnU-Net's literal numbers on made-up data sets, what flags set, and the table of reasons."""

import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.data.fingerprint import Fingerprint
from lib.data.normalization import Normalization
from lib.data.planning import configuration, low_resolution, new_shape, plan, table, target_spacing, topology
from lib.system.error import InputError

HIPPOCAMPUS = Path(__file__).resolve().parents[1].parent / "shared" / "Task04_Hippocampus"
INTENSITIES = {
    "mean": 101.0,
    "median": 104.0,
    "std": 76.9,
    "min": -900.0,
    "max": 3000.0,
    "percentile_00_5": -79.0,
    "percentile_99_5": 304.0,
}


def fingerprint(*groups, relative_size=1.0, channels=1):
    """Of groups of (shape, number of cases, spacing)."""
    cases = [(shape, tuple(map(float, spacing))) for shape, n, spacing in groups for _ in range(n)]
    shapes, spacings = zip(*cases, strict=True)
    return Fingerprint(shapes, spacings, relative_size, (INTENSITIES,) * channels)


def digits(text):
    """Rows of numbers: "111 122x2" is (1, 1, 1), (1, 2, 2), (1, 2, 2)."""
    pairs = (part.partition("x") for part in text.split())
    return tuple(tuple(map(int, row)) for row, _, n in pairs for _ in range(int(n or 1)))


DATA = {  # (fingerprint, channels, number of labels, number of training cases)
    "hippocampus": (fingerprint(((36, 50, 35), 200, (1, 1, 1))), ["MRI"], 3, 200),
    "published": (fingerprint(((36, 50, 35), 200, (1, 1, 1))), ["MRI"], 3, 260),
    "A1": (
        fingerprint(((10, 216, 256), 160, (10, 1.5, 1.5)), ((18, 216, 256), 40, (5, 1.5, 1.5))),
        ["cine MRI"],
        4,
        200,
    ),
    "A2": (fingerprint(((10, 216, 256), 200, (10, 1.5, 1.5))), ["cine MRI"], 4, 200),
    "K1": (fingerprint(((107, 512, 512), 210, (3, 0.78125, 0.78125))), ["CT"], 3, 210),
    "K3": (
        fingerprint(((100, 512, 512), 80, (4, 0.8, 0.8)), ((800, 512, 512), 20, (0.5, 0.8, 0.8))),
        ["CT"],
        3,
        100,
    ),
    "B": (
        fingerprint(((140, 171, 137), 484, (1, 1, 1)), relative_size=0.36, channels=4),
        ["FLAIR", "T1", "T1ce", "T2"],
        4,
        484,
    ),
    "P": (fingerprint(((1, 512, 512), 100, (999, 1, 1)), channels=3), ["R", "G", "B"], 2, 100),
    "S": (fingerprint(((20, 320, 320), 32, (3.6, 0.625, 0.625)), channels=2), ["T2", "ADC"], 3, 32),
    "T": (fingerprint(((256, 256, 40), 50, (1, 1, 4))), ["T2"], 2, 50),
    "Y": (fingerprint(((10, 10, 10), 20, (1, 1, 1))), ["T2"], 3, 20),
    "cube": (fingerprint(((7, 7, 7), 20, (1, 1, 1))), ["T2"], 3, 20),
}


def planned(name, memory_gb=8.0, **flags):
    return plan(*DATA[name], given=flags, memory_gb=memory_gb)


def refused(name, *words, **flags):
    """The message that such flags give; it is one line and holds the words."""
    with pytest.raises(InputError) as raised:
        planned(name, **flags)
    message = str(raised.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def reason(found, line):
    return next(why for name, _, why in found.reasons if name == line)


LITERALS = [  # as nnU-Net 2.5.2 plans it with 8 GB
    ("hippocampus", "2D", (1, 1), (56, 40), 281, "11 22x3", "33x4", 651840),
    ("hippocampus", "3D", (1, 1, 1), (40, 56, 40), 7, "111 222x3", "333x4", 19174400),
    ("published", "2D", (1, 1), (56, 40), 366, "11 22x3", "33x4", 651840),
    ("published", "3D", (1, 1, 1), (40, 56, 40), 9, "111 222x3", "333x4", 19174400),
    ("A1", "2D", (1.5, 1.5), (224, 256), 56, "11 22x5", "33x6", 18063360),
    ("A1", "3D", (5, 1.5, 1.5), (20, 224, 256), 4, "111 122 222x2 122x2", "133 333x5", 310481920),
    ("A2", "3D", (10, 1.5, 1.5), (10, 224, 256), 7, "111 122x2 222 122x2", "133x2 333x4", 170562560),
    ("K1", "2D", (0.78125, 0.78125), (512, 512), 12, "11 22x7", "33x8", 82886656),
    ("K1", "3D", (3, 0.78125, 0.78125), (40, 224, 224), 2, "111 122 222x3 122", "133 333x5", 539611520),
    ("K3", "3D", (0.80001, 0.8, 0.8), (128, 128, 128), 2, "111 222x5", "333x6", 452796416),
    ("B", "2D", (1, 1), (192, 160), 105, "11 22x5", "33x6", 9676800),
    ("B", "3D", (1, 1, 1), (128, 128, 128), 2, "111 222x5", "333x6", 454893568),
    ("P", "2D", (1, 1), (512, 512), 5, "11 22x7", "33x8", 82624512),
    ("S", "2D", (0.625, 0.625), (320, 320), 32, "11 22x6", "33x7", 32332800),
    ("S", "3D", (3.6, 0.625, 0.625), (20, 320, 256), 2, "111 122x2 222x2 122x2", "133x2 333x5", 483315200),
    ("T", "2D", (1, 1), (256, 256), 49, "11 22x6", "33x7", 20627456),
    ("T", "3D", (4, 1, 1), (32, 224, 224), 2, "111 122x2 222x3", "133x2 333x4", 471478784),
]


@pytest.mark.parametrize(("name", "dim", "spacing", "patch", "batch", "strides", "kernels", "estimate"), LITERALS)
def test_plans_are_those_of_nnunet(name, dim, spacing, patch, batch, strides, kernels, estimate):
    found = planned(name, dim=dim)
    assert (found.dim, found.patch_size, found.batch_size, found.estimate) == (dim, patch, batch, estimate)
    assert (found.strides, found.kernels) == (digits(strides), digits(kernels))
    assert found.levels == len(found.strides) == len(found.widths)
    widths = (32, 64, 128, 256, 512, 512, 512, 512) if dim == "2D" else (32, 64, 128, 256, 320, 320, 320)
    assert found.widths == widths[: found.levels]
    assert (found.fms_init, found.fms_max) == (32, 512 if dim == "2D" else 320)
    assert found.spacing[-len(spacing) :] == pytest.approx(spacing, abs=1e-9)
    assert len(found.spacing) == 3 and (found.spacing[0] is None) == (dim == "2D")
    assert found.transpose == ((2, 0, 1) if name == "T" else (0, 1, 2))
    assert found.batch_dice == (dim == "2D" or name in ("K1", "K3"))
    assert (found.lowres is not None) == (dim == "3D" and name in ("K1", "K3"))


@pytest.mark.parametrize(
    ("name", "spacing", "patch", "strides", "kernels", "estimate"),
    [
        ("K1", (3, 1.49696, 1.49696), (64, 192, 160), "111 122 222x4", "133 333x5", 528522240),
        ("K3", (2.00009, 2.00006, 2.00006), (128, 128, 128), "111 222x5", "333x6", 452796416),
    ],
)
def test_low_resolution_is_that_of_nnunet(name, spacing, patch, strides, kernels, estimate):
    low = planned(name, dim="3D").lowres
    assert low.spacing == pytest.approx(spacing, abs=1e-5)
    assert (low.topology.patch, low.batch, low.estimate) == (patch, 2, estimate)
    assert (low.topology.strides, low.topology.kernels) == (digits(strides), digits(kernels))


def test_more_memory():
    assert planned("A1", 24.0, dim="2D").batch_size == 169
    assert planned("A1", 24.0, dim="3D").batch_size == 10
    found = planned("B", 24.0, dim="3D")
    assert (found.patch_size, found.batch_size) == ((160, 192, 160), 3)
    found = planned("K1", 24.0, dim="3D")
    assert (found.patch_size, found.levels, found.lowres, found.batch_dice) == ((64, 320, 256), 7, None, False)
    for dim in ("2D", "3D"):
        small, large = planned("hippocampus", dim=dim), planned("hippocampus", 24.0, dim=dim)
        assert (small.patch_size, small.batch_size, small.strides) == (
            large.patch_size,
            large.batch_size,
            large.strides,
        )


def test_what_is_no_plan_of_ours():
    net = configuration((1, 1, 1), (10, 10, 10), 20 * 10**3, 3)
    assert (net.topology.patch, net.topology.strides, net.topology.kernels, net.estimate, net.batch) == (
        (10, 10, 10),
        digits("111 222"),
        digits("333x2"),
        179000,
        2,
    )
    assert low_resolution(net, 20, 3) is None
    net = configuration((1, 1, 1), (7, 7, 7), 20 * 7**3, 3)
    assert (net.topology.patch, net.topology.strides) == ((7, 7, 7), digits("111"))


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampi (../shared/Task04_Hippocampus) are not here")
def test_the_hippocampi():
    files = [path for path in sorted((HIPPOCAMPUS / "imagesTr").glob("*.nii.gz")) if not path.name.startswith(".")]
    headers = [nib.load(path).header for path in files]
    shapes = tuple(tuple(header.get_data_shape()[::-1]) for header in headers)
    spacings = tuple(tuple(float(mm) for mm in header.get_zooms()[::-1]) for header in headers)
    assert shapes[:2] == ((35, 51, 35), (38, 52, 36)) and len(files) == 200
    found = Fingerprint(shapes, spacings, 1.0, (INTENSITIES,))
    volume = plan(found, ["MRI"], 3, 200)
    assert (volume.dim, volume.patch_size, volume.batch_size) == ("3D", (40, 56, 40), 7)
    assert volume.median_shape == (36, 50, 35) and volume.patches_per_volume == 1
    slices = plan(found, ["MRI"], 3, 200, given={"dim": "2D"})
    assert (slices.patch_size, slices.batch_size, slices.spacing) == ((56, 40), 281, (None, 1, 1))
    assert slices.median_shape == (50, 35) and slices.patches_per_volume == round(36 * 50 * 35 / 56 / 40)


def test_target_spacing():
    for name, expected in (("K3", (0.80001, 0.8, 0.8)), ("A1", (5, 1.5, 1.5)), ("T", (1, 1, 4))):
        prints = DATA[name][0]
        assert target_spacing(np.array(prints.spacings), np.array(prints.shapes)) == pytest.approx(expected, abs=1e-9)
    many = np.array([(4, 0.8, 0.8), (1, 0.8, 0.8), (4, 0.8, 0.8)])
    assert tuple(target_spacing(many, np.array([(200, 512, 512)] * 3))) == (4, 0.8, 0.8)  # 600 is not below 512
    assert target_spacing(many, np.array([(170, 512, 512)] * 3))[0] == pytest.approx(1.6)  # 510 is: linear percentile


def test_new_shapes_are_rounded_as_python_does():
    assert new_shape((5, 7, 9), (1, 1, 1), (2, 2, 2)) == (2, 4, 4)  # 2.5, 3.5, 4.5
    assert new_shape((10, 216, 256), (10, 1.5, 1.5), (5, 1.5, 1.5)) == (20, 216, 256)


def test_half_a_voxel_of_the_median_counts():
    data = fingerprint(((40, 56, 40), 1, (1, 1, 1)), ((41, 57, 41), 1, (1, 1, 1)))
    found = plan(data, ["MRI"], 3, 2)
    assert (found.median_shape, found.patch_size) == ((40.5, 56.5, 40.5), (48, 64, 48))


def test_on_a_tie_the_last_axis_becomes_shorter():
    assert planned("S", dim="3D").patch_size == (20, 320, 256)


@pytest.mark.parametrize(
    ("name", "dim", "words"),
    [
        ("hippocampus", "3D", "no axis is more than 3 times coarser"),
        ("A1", "2D", "3.3 times as long across the slices, and there are few: 10, of 216"),
        ("A2", "2D", "6.7 times"),
        ("S", "2D", "20, of 320"),
        ("K1", "3D", "107 slices"),
        ("T", "3D", "40 slices"),
        ("P", "2D", "one slice"),
    ],
)
def test_the_number_of_axes(name, dim, words):
    found = planned(name)
    assert found.dim == dim and words in reason(found, "dim")


def test_one_slice_has_no_3d():
    refused("P", "--dim", "one slice", "2D", dim="3D")
    refused("P", "--patch_size", "one slice", patch_size=(8, 64, 64))


@pytest.mark.parametrize("dim", ["2D", "3D"])
@pytest.mark.parametrize(("name", "shape"), [("Y", 12), ("cube", 8)])
def test_a_network_has_three_levels(name, shape, dim):
    found = planned(name, dim=dim)
    axes = int(dim[0])
    assert (found.levels, found.patch_size, found.widths) == (3, (shape,) * axes, (32, 64, 128))
    assert found.strides == ((1,) * axes, (2,) * axes, (2,) * axes) and found.kernels == ((3,) * axes,) * 3
    assert f"nnU-Net's plan has {2 if name == 'Y' else 1}" in reason(found, "levels")


def test_the_smallest_image_keeps_more_than_one_voxel():
    for shape in ((2, 2, 2), (2, 3, 4), (4, 4, 4), (1, 2, 9)):
        found = plan(fingerprint((shape, 20, (1, 1, 1))), ["MRI"], 2, 20)
        deepest = [
            n // math.prod(steps) for n, steps in zip(found.patch_size, zip(*found.strides, strict=True), strict=True)
        ]
        assert found.levels == 3 and math.prod(deepest) > 1, shape
    coarse = plan(fingerprint(((10, 10, 10), 20, (10, 1, 1))), ["MRI"], 2, 20, given={"dim": "3D"})
    assert (coarse.patch_size, coarse.strides) == ((10, 12, 12), digits("111 122 122"))


def test_normalizations():
    found = planned("K1")
    assert found.normalizations == (Normalization("ct", low=-79.0, high=304.0, mean=101.0, std=76.9),)
    line = next(row for row in found.reasons if row[0] == "normalization")
    assert line[1] == "CT: ct, clip to [-79, 304], (x - 101) / 76.9" and "the channel's name" in line[2]
    assert planned("B").normalizations == (Normalization("zscore", masked=True),) * 4
    prints, *rest = DATA["B"]
    assert plan(replace(prints, relative_size=0.75), *rest).normalizations == (Normalization("zscore"),) * 4
    names = ["noNorm", "CT_art", "Rescale_to_0_1", "rgb_to_0_1"]
    schemes = [one.scheme for one in plan(prints, names, 4, 484).normalizations]
    assert schemes == ["nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"]


def test_flags_on_intensities():
    found = planned("B", normalization=("ct", "zscore", "nonorm", "zscore"), crop=False)
    assert [one.scheme for one in found.normalizations] == ["ct", "zscore", "nonorm", "zscore"]
    assert not found.crop and not any(one.masked for one in found.normalizations)  # no crop, no mask
    assert reason(found, "crop") == "--no_crop" and reason(found, "normalization").startswith("--normalization")
    assert planned("B").crop
    refused("B", "--normalization", "4 channels", normalization=("zscore",))
    refused("B", "--normalization", "rescale_to_0_1", normalization=("zscore", "zscore", "zscore", "CTA"))


def test_spacing_by_a_flag():
    found = planned("A1", dim="3D", spacing=(10, 0, None))
    assert found.spacing == (10, 1.5, 1.5) and found.median_shape == (10, 216, 256)
    assert "--spacing, where it is not 0; else the median" in reason(found, "spacing")
    assert found.patch_size == (10, 224, 256) and found.strides == planned("A2", dim="3D").strides
    found = planned("A1", spacing=(1.5, 1.5, 1.5))
    assert (found.dim, found.median_shape, reason(found, "spacing")) == ("3D", (67, 216, 256), "--spacing")
    assert planned("T", spacing=(5, 0, 0)).transpose == (0, 1, 2)  # now this is the coarsest axis
    refused("A1", "--spacing", "three axes", spacing=(1.5, 1.5))
    refused("A1", "--spacing", "0 for an axis", spacing=(-1, 1.5, 1.5))
    refused("A1", "--spacing", "smaller", spacing=(1000, 1.5, 1.5))


def test_axes_by_a_flag():
    found = planned("hippocampus", axes=(2, 0, 1))
    assert (found.transpose, found.median_shape, found.patch_size) == ((2, 0, 1), (35, 36, 50), (40, 40, 56))
    assert "--axes" in reason(found, "axis order")
    refused("hippocampus", "--axes 0 0 1", axes=(0, 0, 1))


def test_patch_by_a_flag():
    found = planned("hippocampus", patch_size=[32, 32, 16])
    assert (found.dim, found.patch_size, reason(found, "patch")) == ("3D", (32, 32, 16), "--patch_size")
    assert found.strides == topology((1, 1, 1), (32, 32, 16)).strides == digits("111 222x2 221")
    assert found.patches_per_volume == round(36 * 50 * 35 / 32 / 32 / 16)
    found = planned("hippocampus", patch_size=(32, 48))
    assert (found.dim, found.levels, reason(found, "dim")) == ("2D", 4, "--patch_size")
    message = refused("hippocampus", "--patch_size 100 96 96", patch_size=(100, 96, 96))
    assert "give 96 96 96 or 112 96 96" in message
    refused("hippocampus", "give 8 8 8 or 12 12 12", patch_size=(10, 10, 10))
    refused("hippocampus", "--patch_size 4 4 4", "too small for 3 levels", patch_size=(4, 4, 4))
    refused("hippocampus", "--patch_size: has 2 axes", "--dim", patch_size=(32, 32), dim="3D")
    refused("hippocampus", "--patch_size 0 32", patch_size=(0, 32))


def test_levels_by_a_flag():
    found = planned("hippocampus", levels=3)
    assert (found.patch_size, found.strides) == ((36, 52, 36), digits("111 222x2"))
    found = planned("hippocampus", levels=6)
    assert (found.patch_size, found.strides) == ((64, 64, 64), digits("111 222x5"))
    assert reason(found, "levels") == "--levels"
    refused("hippocampus", "--levels 2", "at least 3", levels=2)
    refused("hippocampus", "--levels 9", "has room for 6", levels=9)
    tiny = fingerprint(((2, 2, 2), 20, (1, 1, 1)))
    assert plan(tiny, ["MRI"], 2, 20, given={"levels": 3}).patch_size == (8, 8, 8)
    with pytest.raises(InputError, match="--levels 4: .* has room for 3"):
        plan(tiny, ["MRI"], 2, 20, given={"levels": 4})
    assert planned("hippocampus", levels=4, patch_size=(24, 24, 24)).levels == 4
    refused("hippocampus", "--patch_size 36 36 36", "give 32 32 32 or 48 48 48", levels=5, patch_size=(36, 36, 36))


def test_strides_and_kernels_by_flags():
    strides = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
    found = planned("hippocampus", strides=strides)
    assert (found.levels, found.strides, found.patch_size) == (4, digits("111 122 222 122"), (36, 56, 40))
    assert found.kernels == digits("333x4") and reason(found, "strides") == "--strides"
    kernels = [[1, 3, 3]] * 4
    found = planned("hippocampus", strides=strides, kernels=kernels)
    assert found.kernels == digits("133x4") and reason(found, "kernels") == "--kernels"
    assert planned("hippocampus", kernels=kernels).strides == digits("111 222x3")
    refused("hippocampus", "--strides", "--levels 5", strides=strides, levels=5)
    refused("hippocampus", "--strides", "3 levels", strides=strides[:2])
    refused("hippocampus", "--strides", "1s", strides=strides[1:])
    refused("hippocampus", "--strides", "3 whole numbers", strides=[*strides, [2, 2]])
    refused("hippocampus", "--strides", "one voxel", strides=[[1, 1, 1], *[[8, 8, 8]] * 2], patch_size=(64, 64, 64))
    refused("hippocampus", "--patch_size 32 36 32", "32 32 32 or 32 40 32", strides=strides, patch_size=(32, 36, 32))
    refused("hippocampus", "--kernels", "3 rows for 4 levels", kernels=kernels[1:])
    refused("hippocampus", "--kernels", "odd", kernels=[[2, 3, 3]] * 4)
    refused("hippocampus", "--kernels: has 2 axes", "--strides", strides=strides, kernels=[[3, 3]] * 4)


def test_widths_batch_and_memory_by_flags():
    found = planned("hippocampus", fms_init=8, fms_max=20, batch_size=3)
    assert (found.widths, found.batch_size) == ((8, 16, 20, 20), 3)
    assert reason(found, "widths") == "--fms_init and --fms_max" and reason(found, "batch") == "--batch_size"
    assert found.estimate < planned("hippocampus").estimate
    usual, large = planned("hippocampus"), planned("hippocampus", batch_size=14)
    assert usual.memory_gb == pytest.approx(8 * 19174400 / 560e6 * 7 / 2)
    assert large.memory_gb == pytest.approx(2 * usual.memory_gb)
    assert "more than --gpu_memory 8" in reason(planned("A1", dim="3D", batch_size=8), "GPU memory")
    for gb in (0, -1, math.inf, math.nan):
        with pytest.raises(InputError, match="--gpu_memory"):
            planned("hippocampus", gb)
    with pytest.raises(InputError, match="--gpu_memory 1e-07: holds no patch"):
        planned("hippocampus", 1e-7)


def test_none_is_not_given():
    assert planned("A1", dim=None, spacing=None, levels=None, crop=None) == planned("A1")


@pytest.mark.parametrize("name", DATA)
def test_the_table_fits_the_terminal(name):
    found = planned(name)
    lines = table(found).splitlines()
    assert max(map(len, lines)) <= 120 and all(line.count(" | ") == 2 for line in lines)
    names = [line.split(" | ")[0].strip() for line in lines]
    channels = ["normalization"] * len(found.normalizations)
    lowres = ["low resolution"] if found.dim == "3D" else []
    expected = ["dim", "axis order", "spacing", *channels, "crop", "patch", "levels", "strides", "kernels", "widths"]
    expected += ["batch", *lowres, "GPU memory", "patches of an epoch"]
    assert [name for name in names if name not in ("", "thick slices")] == expected


def test_what_the_table_says():
    text = " ".join(table(planned("A1", dim="3D")).replace("|", " ").split())
    assert "5 x 1.5 x 1.5 mm the median; one axis is 6.7 times coarser, so there the 10th percentile" in text
    assert "thick slices 10 mm apart become 5 mm in 160 of 200 cases each is taken from the nearest one" in text
    assert "patch 20 x 224 x 256 voxels the median shape of 20 x 216 x 256" in text
    assert "111 122 222 222 122 122" in text and "32 64 128 256 320 320" in text
    assert "batch 4 patches of 4 that --gpu_memory 8 holds and 10 that cover 5%" in text
    assert "thick slices" not in table(planned("A1")) and "thick slices" not in table(planned("A2", dim="3D"))
    assert "1.5 x 1.5 mm the median; slices stay as thick" in " ".join(table(planned("A1")).replace("|", " ").split())
    low = reason(planned("K1"), "low resolution")
    assert "7% of the median volume" in low and "3 x 1.49696 x 1.49696 mm, patch 64 x 192 x 160" in low
    assert "no finer than the others" in reason(planned("K3"), "spacing")


@st.composite
def data_sets(draw):
    groups = []
    for _ in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.integers(1, 600)) for _ in range(3))
        spacing = tuple(draw(st.floats(0.3, 12)) for _ in range(3))
        groups.append((shape, draw(st.integers(1, 4)), spacing))
    return fingerprint(*groups)


@settings(max_examples=150)
@given(data_sets(), st.sampled_from([None, "2D", "3D"]), st.integers(2, 60), st.sampled_from([0.5, 4.0, 8.0, 24.0]))
@example(fingerprint(((1, 1, 1), 1, (1, 1, 1))), "2D", 2, 8.0)
@example(fingerprint(((2, 600, 600), 1, (12, 0.3, 0.3))), "3D", 60, 0.5)
def test_any_plan_fits_the_network(data, dim, n_labels, memory_gb):
    try:
        found = plan(data, ["MRI"], n_labels, len(data.shapes), given={"dim": dim}, memory_gb=memory_gb)
    except InputError as error:
        assert "--dim" in str(error) or "--spacing" in str(error)
        return
    axes = int(found.dim[0])
    divisor = [math.prod(steps) for steps in zip(*found.strides, strict=True)]
    assert {len(row) for row in (*found.strides, *found.kernels, found.patch_size, found.median_shape)} == {axes}
    assert all(n >= 1 and n % d == 0 for n, d in zip(found.patch_size, divisor, strict=True))
    assert math.prod(found.patch_size) > math.prod(divisor)
    assert len(found.strides) == len(found.kernels) == len(found.widths) == found.levels >= 3
    assert set(found.strides[0]) == {1} and {1, 2} >= {n for row in found.strides for n in row}
    assert {1, 3} >= {n for row in found.kernels for n in row} and found.kernels[-1] == (3,) * axes
    assert found.batch_size >= 2 and found.patches_per_volume >= 1 and found.estimate > 0
    assert max(map(len, table(found).splitlines())) <= 120
    # The patch and the levels by flags are the same plan.
    again = {"dim": dim, "patch_size": found.patch_size, "strides": found.strides, "kernels": found.kernels}
    again = plan(data, ["MRI"], n_labels, len(data.shapes), given=again, memory_gb=memory_gb)
    assert (again.strides, again.kernels, again.batch_size) == (found.strides, found.kernels, found.batch_size)


@settings(max_examples=100)
@given(st.tuples(*[st.integers(1, 100)] * 3), st.tuples(*[st.floats(0.5, 5)] * 3))
def test_the_patches_that_are_suggested_fit(patch, spacing):
    flags = {"spacing": spacing, "axes": (0, 1, 2), "patch_size": patch}
    try:
        assert planned("hippocampus", **flags).patch_size == patch
    except InputError as error:
        if "; give 8 along an axis" in str(error):
            return
        sizes = str(error).partition("divide it by; give ")[2].split(" or ")
        for size in (tuple(map(int, text.split())) for text in sizes):
            assert planned("hippocampus", **flags | {"patch_size": size}).patch_size == size

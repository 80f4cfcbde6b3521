import numpy as np
import pytest
import torch
import torchio as tio

from lib.data import augmentation as module
from lib.data.augmentation import (
    RandomElasticDeformation,
    RandomTurn,
    augmentation,
    augmentation_of_plan,
    elastic_grid,
    turn,
    zscored,
)

pytestmark = pytest.mark.filterwarnings("ignore:The maximum displacement")  # 7.5 mm may fold volumes so small
SPACING = np.diag([1.25, 1.25, 8.0, 1.0])


def subject(image, label=None, affine=SPACING):
    label = torch.zeros_like(image, dtype=torch.uint8) if label is None else label
    return tio.Subject(
        image=tio.ScalarImage(tensor=image.clone(), affine=affine), label=tio.LabelMap(tensor=label, affine=affine)
    )


def only(chain: tio.Compose, *names: str) -> tio.Compose:
    """Those of its transforms that have these names, each of them certain to be applied."""
    chosen = [transform for transform in chain.transforms if transform.name in names]
    for transform in chosen:
        transform.probability = 1
    return tio.Compose(chosen, copy=False)


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_the_order(dim):
    names = [transform.name for transform in augmentation(dim).transforms]
    spatial_end = ["RandomGamma", "RandomFlip", "RandomElasticDeformation", "Lambda"]
    assert names == ["RandomAffine", "RandomAffine", *spatial_end]


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_without_the_last_zscore_all_else_is_as_with_it(dim):
    image = torch.rand(1, 8, 9, 7, generator=torch.Generator().manual_seed(0)) + 5
    for seed in range(6):
        results = []
        for final_zscore in (True, False):
            torch.manual_seed(seed)
            results.append(augmentation(dim, final_zscore)(subject(image)).image.data)
        assert torch.equal(results[0], zscored(results[1])) and results[1].mean() > 1


@pytest.mark.parametrize(("dim", "slice_axis", "n_flips"), [("2D", 2, 2), ("3D", 0, 3)])
def test_how_often_and_how_much(dim, slice_axis, n_flips):
    """Frequencies and ranges over 500 draws, from the parameters that torchio records."""
    chain, drawn, n = augmentation(dim), [], 500
    torch.manual_seed(0)
    for _ in range(n):
        drawn.extend(chain(subject(torch.rand(1, 6, 6, 6))).get_applied_transforms(image_interpolation="linear"))
    affines = [t for t in drawn if t.name == "Affine"]
    scaled = np.array([t.scales for t in affines if any(s != 1 for s in t.scales)])
    turned = np.array([t.degrees for t in affines if any(t.degrees)])
    gammas = np.log([t.gamma["image"][0] for t in drawn if t.name == "Gamma"])
    elastic = [t for t in drawn if t.name == "ElasticDeformation"]
    for events, p in ((scaled, 0.2), (turned, 0.2), (gammas, 0.3), (elastic, 0.3)):
        assert abs(len(events) / n - p) < 4 * np.sqrt(p * (1 - p) / n)
    in_plane = [axis for axis in range(3) if axis != slice_axis]
    assert (scaled[:, slice_axis] == 1).all() and (turned[:, in_plane] == 0).all()
    assert 0.85 <= scaled.min() < 0.88 and 1.22 < scaled.max() <= 1.25
    assert abs(np.corrcoef(scaled[:, in_plane].T)[0, 1]) < 0.3  # independent
    assert -180 <= turned.min() < -165 and 165 < turned.max() <= 180
    assert -0.3 <= gammas.min() < -0.27 and 0.47 < gammas.max() <= 0.5
    flips = np.array([[axis in t.axes for axis in range(3)] for t in drawn if t.name == "Flip"]).sum(0) / n
    assert np.abs(flips[in_plane] - 0.5).max() < 0.09
    assert (flips > 0).sum() == n_flips
    assert all(t.control_points.shape == (7, 7, 7, 3) and np.abs(t.control_points).max() <= 7.5 for t in elastic)
    assert all((t.control_points[:2] == 0).all() and (t.control_points[2] != 0).any() for t in elastic)


@pytest.mark.parametrize("shape", [(1, 9, 5), (9, 1, 5), (9, 8, 1), (1, 1, 6), (1, 1, 1)])
@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_axes_of_size_one(dim, shape):
    """Flips and deformations leave such an axis alone, and all others as they are without it."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    chain = augmentation(dim)
    for seed in range(12):
        torch.manual_seed(seed)
        result = chain(subject(image))
        assert result.image.shape == image.shape and torch.isfinite(result.image.data).all()
    flip = only(chain, "RandomFlip")
    for transform in flip.transforms:
        transform.flip_probability = 1
    axes = [axis + 1 for axis in ((0, 1) if dim == "2D" else (0, 1, 2))]
    assert torch.equal(flip(subject(image)).image.data, image.flip(axes))


@pytest.mark.parametrize("dim", ["2D", "3D"])
def test_labels_go_where_the_image_goes(dim):
    """An image that is its own label, and interpolated like one: after every spatial change they are the same."""
    label = torch.zeros(1, 40, 44, 40, dtype=torch.uint8)
    label[0, 8:25, 12:30, 6:34] = 1
    label[0, 20:33, 25:35, 10:30] = 3
    chain = only(augmentation(dim), "RandomAffine", "RandomFlip", "RandomElasticDeformation")
    assert [t.label_interpolation for t in chain.transforms if t.name != "RandomFlip"] == ["nearest"] * 3
    for transform in chain.transforms:
        transform.image_interpolation = "nearest"
    for seed in range(4):
        torch.manual_seed(seed)
        result = chain(subject(label.float(), label.clone(), np.diag([2.0, 1.5, 2.0, 1.0])))
        assert torch.equal(result.image.data, result.label.data.float())
        assert set(result.label.data.unique().tolist()) == {0, 1, 3}
        assert not torch.equal(result.label.data.byte(), label)


@pytest.mark.parametrize(("dim", "slice_axis", "spacing"), [("2D", 2, (1.25, 1.25, 8)), ("3D", 0, (3.2, 1.6, 1.6))])
def test_affine_changes_stay_in_their_slice(dim, slice_axis, spacing):
    """Slice k holds the value k + 1 everywhere: so it stays, but for the minimum from outside."""
    shape = [1, 1, 1]
    shape[slice_axis] = 5
    image = torch.arange(1.0, 6).reshape(1, *shape).expand(1, *(5 if n == 5 else 24 for n in shape))
    chain = only(augmentation(dim), "RandomAffine")
    for seed in range(5):
        torch.manual_seed(seed)
        slices = chain(subject(image.contiguous(), affine=np.diag([*spacing, 1.0]))).image.data[0].unbind(slice_axis)
        for k, values in enumerate(slices):
            assert torch.allclose(values[8:-8, 8:-8], torch.tensor(k + 1.0), atol=1e-4)
            assert values.min() >= 1 - 1e-4 and values.max() <= k + 1 + 1e-4


def test_gamma_keeps_the_sign_of_negative_values():
    image = torch.linspace(-2, 2, 27).reshape(1, 3, 3, 3)
    torch.manual_seed(1)
    changed = only(augmentation("2D"), "RandomGamma")(subject(image)).image.data
    assert torch.isfinite(changed).all() and torch.equal(changed.sign(), image.sign())
    assert not torch.allclose(changed, image)


@pytest.mark.parametrize("seed", range(6))
def test_what_comes_out_is_zscored(seed):
    torch.manual_seed(seed)
    image = augmentation("2D")(subject(5 + 3 * torch.randn(1, 24, 24, 8))).image.data
    assert image.dtype == torch.float32
    assert abs(float(image.mean())) < 1e-5 and float(image.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [
        ((40, 37, 10), (1.25, 1.25, 10)),
        ((18, 30, 22), (3.2, 1.6, 1.6)),
        ((30, 3, 2), (2, 3, 4)),
        ((40, 44, 1), (1, 2, 3)),
    ],
)
def test_the_deformation_equals_that_of_torchio(shape, spacing):
    """The same seed gives the same control points, and these the same image, its border and its labels included."""
    torch.manual_seed(3)
    image, label = torch.randn(1, *shape), torch.randint(0, 4, (1, *shape), dtype=torch.uint8)
    for seed in range(3):
        results = []
        for deformation in (tio.RandomElasticDeformation, RandomElasticDeformation):
            torch.manual_seed(seed)
            results.append(deformation()(subject(image, label, np.diag([*spacing, 1.0]))))
        expected, found = results
        torch.testing.assert_close(found.image.data, expected.image.data, rtol=0, atol=1e-4)
        assert (found.label.data != expected.label.data).float().mean() < 1e-3  # where rounding decides
        assert (expected.image.data - image).abs().max() > 0.1


def test_without_displacement_every_voxel_comes_from_itself():
    grid = elastic_grid(torch.zeros(7, 7, 7, 3), (6, 5, 4), (1.25, 1.25, 10))
    z, y, x = ((grid + 1) * torch.tensor([4, 5, 6]) / 2 - 0.5).unbind(-1)
    for axis, (found, size) in enumerate(zip((x, y, z), (6, 5, 4), strict=True)):
        own = torch.arange(size).reshape([-1 if i == axis else 1 for i in range(3)]).expand(6, 5, 4)
        torch.testing.assert_close(found, own.float(), rtol=0, atol=1e-4)


# Of planned 3D data


def drawn(monkeypatch, patch_size, n=600):
    """What `n` applications of the first transform draw: (n, 3) degrees and factors; those that do nothing left out."""
    calls = []
    monkeypatch.setattr(module, "turn", lambda subject, degrees, factors: calls.append((degrees, factors)))
    first = augmentation_of_plan(patch_size).transforms[0]
    assert isinstance(first, RandomTurn)
    torch.manual_seed(0)
    for _ in range(n):
        first(subject(torch.zeros(1, 2, 2, 2)))
    return np.array(calls).transpose(1, 0, 2)


def test_a_patch_of_about_equal_sides_turns_about_every_axis(monkeypatch):
    degrees, factors = drawn(monkeypatch, (40, 56, 40))
    turned, scaled = (degrees != 0).any(1), (factors != 1).any(1)
    for events, p in ((turned, 0.2), (scaled, 0.2), (turned & scaled, 0.04)):
        assert abs(events.sum() / 600 - p) < 4 * np.sqrt(p * (1 - p) / 600)
    assert np.abs(degrees).max() <= 30 and (degrees.max(0) > 25).all() and (degrees.min(0) < -25).all()
    assert (factors == factors[:, :1]).all() and 0.7 <= factors.min() < 0.73 and 1.36 < factors.max() <= 1.4
    assert 0.35 < (factors[scaled, 0] < 1).mean() < 0.65


@pytest.mark.parametrize(("patch_size", "flat"), [((16, 64, 64), True), ((64, 20, 64), True), ((16, 48, 48), False)])
def test_a_flat_patch_turns_in_its_plane(monkeypatch, patch_size, flat):
    degrees, factors = drawn(monkeypatch, patch_size)
    still = (degrees[:, 1:] == 0).all() and (factors[:, 0] == 1).all()
    assert still == flat and (np.abs(degrees[:, 0]).max() > 150) == flat
    assert (factors[:, 1] == factors[:, 2]).all()


@pytest.mark.parametrize(
    ("degrees", "factors", "to"),
    [
        ([90, 0, 0], [1, 1, 1], (10, -6, 12)),  # the second axis goes to the third
        ([0, 90, 0], [1, 1, 1], (6, 12, -10)),  # the third one to the first
        ([0, 0, 90], [1, 1, 1], (-12, 10, 6)),  # the first one to the second
        ([90, 90, 0], [1, 1, 1], (12, -6, -10)),  # one after the other
        ([0, 0, 0], [0.5, 1, 1.5], (5, 12, 9)),
        ([0, 0, 90], [0.5, 1, 1], (-12, 5, 6)),  # scaled first
    ],
)
def test_a_point_goes_where_it_should_in_mm(degrees, factors, to):
    spacing = np.array([1.0, 2.0, 3.0])
    shape = (41, 21, 15)
    mm = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    mm = np.stack(np.meshgrid(*mm, indexing="ij"))
    blob = np.exp(-((mm - np.reshape([10, 12, 6], (3, 1, 1, 1))) ** 2).sum(0) / 2 / 3**2)
    moved = subject(torch.tensor(blob, dtype=torch.float32)[None], affine=np.diag([*spacing, 1]))
    turn(moved, degrees, factors)
    blob = moved.image.data[0].numpy()
    np.testing.assert_allclose((mm * blob).sum((1, 2, 3)) / blob.sum(), to, atol=0.25)


def test_labels_turn_with_the_image_and_zeros_come_from_outside():
    label = torch.ones(1, 20, 24, 22, dtype=torch.uint8)
    label[0, 5:12, 7:20, 4:18] = 3
    for transform in ([30, -20, 10], [0.8] * 3), ([0, 0, 0], [1.4] * 3), ([45, 0, 0], [1] * 3):
        one = subject(label.float(), label, np.diag([2.0, 1.5, 2.0, 1.0]))
        turn(one, *transform)
        image, labels = one.image.data, one.label.data
        for value in (0, 3):  # an interpolated value is an extreme one only where all around it are
            sure = (image - value).abs() < 1e-3
            assert (labels[sure] == value).all() and (sure.any() or value == 0)
        assert set(labels.unique().tolist()) == ({1, 3} if max(transform[1]) > 1 else {0, 1, 3})
        assert labels.shape == label.shape


def test_what_is_not_turned_stays_to_the_bit():
    image = torch.rand(1, 6, 7, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    chain = augmentation_of_plan((32, 32, 32))
    assert [transform.name for transform in chain.transforms] == ["RandomTurn", "RandomGamma", "RandomFlip"]
    changed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        result = chain(subject(image, (image > 0).byte())).image.data
        changed += not torch.equal(result.flatten().sort().values, image.flatten().sort().values)
    assert 20 < changed < 45  # 1 - 0.8 * 0.8 * 0.7 = 55%

"""nnU-Net's resampling: by hand, against scipy, and slab by slab."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from lib.data import resampling
from lib.data.resampling import new_shape, resample_image, resample_label, resample_probabilities, separate_axis

SHAPES = st.tuples(*[st.integers(1, 9)] * 3)


def zoom(array, shape, order):
    """scipy's, as nnU-Net's resize is known to be, but for the clipping."""
    factors = [new / old for old, new in zip(array.shape, shape, strict=True)]
    return ndimage.zoom(array.astype(np.float64), factors, order=order, mode="nearest", grid_mode=True)


def softmax(logits):
    values = np.exp(logits - logits.max(0))
    return values / values.sum(0)


def slabs_of(volume, axis, n):
    """Of (K, X, Y, Z), along a spatial axis."""
    size = volume.shape[axis + 1]
    return (volume.take(range(i, min(i + n, size)), axis + 1) for i in range(0, size, n))


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "expected"),
    [
        ((10, 10, 10), (1, 2, 3), (2, 2, 2), (5, 10, 15)),
        ((5, 3, 7), (1, 1, 1), (2, 2, 2), (2, 2, 4)),  # halves become even
        ((1, 2, 3), (1, 1, 1), (9, 9, 9), (1, 1, 1)),
        ((35, 51, 35), (1, 1, 1), (1, 1, 1), (35, 51, 35)),
    ],
)
def test_the_new_shape(shape, spacing, target, expected):
    assert new_shape(shape, spacing, target) == expected
    assert all(type(n) is int for n in new_shape(np.array(shape), np.array(spacing), target))


@pytest.mark.parametrize(
    ("spacing", "target", "expected"),
    [
        ((3, 1, 1), (1, 1, 1), None),
        ((3.01, 1, 1), (1, 1, 1), 0),
        ((1, 3.01, 1), (1, 1, 1), 1),
        ((1, 1, 1), (1, 1, 5), 2),
        ((5, 1, 1), (1, 1, 9), 0),  # the first one decides
        ((0.24, 1.25, 1.25), (1, 1, 1), None),
        ((0.24, 1.25, 1.25), (9, 1, 1), None),
        ((999, 1, 1), (999, 2, 2), 0),
    ],
)
def test_which_axis_is_set_apart(spacing, target, expected):
    assert separate_axis(spacing, target) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(5, 9, [0, 0, 1, 1, 2, 3, 3, 4, 4]), (5, 4, [0, 1, 3, 4]), (4, 4, [0, 1, 2, 3]), (3, 1, [1]), (1, 3, [0, 0, 0])],
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_come_from_the_nearest_ones(old, new, expected, axis):
    """For images, labels and probabilities alike, where the planes themselves stay as they are."""
    numbers = np.moveaxis(np.broadcast_to(np.arange(old)[:, None, None], (old, 3, 2)), 0, axis)
    shape = tuple(new if at == axis else n for at, n in enumerate(numbers.shape))
    image = resample_image(numbers.astype(np.float32), shape, axis)
    label = resample_label(numbers.astype(np.int16), shape, axis)
    one_hot = (numbers == np.arange(old)[:, None, None, None]).astype(np.float32)
    slabs = [
        part for _, part in resample_probabilities(slabs_of(one_hot, axis, 2), axis, (numbers.shape, shape), axis, 3)
    ]
    for result in (image, label, np.concatenate(slabs, axis + 1).argmax(0)):
        assert result.shape == shape
        np.testing.assert_array_equal(
            result, np.moveaxis(np.broadcast_to(np.array(expected)[:, None, None], (new, 3, 2)), 0, axis)
        )


@settings(deadline=None, max_examples=60)
@given(SHAPES, SHAPES, st.integers(0, 99))
def test_images_are_cubic_and_keep_their_range(shape, new, seed):
    image = np.random.default_rng(seed).normal(0, 100, shape).astype(np.float32)
    result = resample_image(image, new, None)
    assert result.dtype == np.float32 and result.flags.c_contiguous
    expected = image if shape == new else zoom(image, new, 3).clip(image.min(), image.max())
    np.testing.assert_allclose(resample_image(image.astype(np.float64), new, None), expected, rtol=0, atol=1e-10)
    half_a_step = np.spacing(np.abs(expected).astype(np.float32)) / 2
    assert (np.abs(result - expected.astype(np.float64)) <= half_a_step + 1e-10).all()  # the nearest float32
    turned = resample_image(np.asfortranarray(image).transpose(1, 2, 0), (new[1], new[2], new[0]), None)
    np.testing.assert_allclose(turned.transpose(2, 0, 1), result, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [(90, 200), (200, 90), (33, 33), (1, 40), (150, 1)])
def test_long_axes_are_resampled_piece_by_piece(old, new, axis, monkeypatch):
    """As with scipy, and the same to the last bit whatever the pieces."""
    shape, wanted = (np.insert(others, axis, size) for size, others in ((old, (7, 6)), (new, (5, 9))))
    image = np.random.default_rng(0).normal(0, 1, shape)
    at_once = resample_image(image, tuple(wanted), None)
    monkeypatch.setattr(resampling, "PIECE", 300)
    np.testing.assert_array_equal(resample_image(image, tuple(wanted), None), at_once)
    expected = zoom(image, wanted, 3).clip(image.min(), image.max())
    np.testing.assert_allclose(at_once, expected, rtol=0, atol=1e-12)
    label = (image > 0.5) + (image > 1).astype(np.uint8)
    masks = np.stack([zoom(label == value, wanted, 1) for value in range(3)])
    result = resample_label(label, tuple(wanted), None)
    np.testing.assert_array_equal(np.take_along_axis(masks, result[None].astype(int), 0)[0], masks.max(0))


def test_a_large_image_is_never_held_several_times(monkeypatch):
    monkeypatch.setattr(resampling, "PIECE", 2**14)  # few of the image's voxels, as of a large one
    image = np.zeros((60, 80, 80), np.float32)
    tracemalloc.start()
    resample_image(image, (90, 120, 120), None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 8 * 120 * 120 * (60 + 90)  # bytes of the last step, from doubles to doubles


@settings(deadline=None, max_examples=40)
@given(SHAPES, SHAPES, st.integers(0, 2), st.integers(0, 99))
def test_an_axis_apart_leaves_the_planes_to_themselves(shape, new, axis, seed):
    """Each plane of the result is one of the input, resampled alone and in its own range."""
    image = np.random.default_rng(seed).normal(0, 100, shape).astype(np.float32)
    result = resample_image(image, new, axis)
    places = shape[axis] / new[axis] * (np.arange(new[axis]) + 0.5) - 0.5
    for k, source in enumerate(np.floor(places + 0.5).astype(int).clip(0, shape[axis] - 1)):
        plane = image.take(source, axis)
        expected = zoom(plane, np.delete(new, axis), 3).clip(plane.min(), plane.max())
        np.testing.assert_allclose(result.take(k, axis), expected, rtol=1e-6, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(SHAPES, SHAPES, st.integers(0, 99))
def test_a_label_is_the_most_likely_one_and_then_the_nearest(shape, new, seed):
    label = np.random.default_rng(seed).integers(-1, 4, shape).astype(np.int16)
    result = resample_label(label, new, None)
    assert result.dtype == np.int16 and result.shape == new
    values = np.unique(label)
    scores = np.stack([zoom(label == value, new, 1).clip(0, 1) for value in values])
    nearest = zoom(label, new, 0)
    chosen = np.take_along_axis(scores, np.searchsorted(values, result)[None], 0)[0]
    tied = scores == scores.max(0)
    np.testing.assert_array_equal(chosen, scores.max(0))
    nearest_is_tied = (tied & (values[:, None, None, None] == nearest)).any(0)
    np.testing.assert_array_equal(result[nearest_is_tied], nearest[nearest_is_tied])
    np.testing.assert_array_equal(result[~nearest_is_tied], values[tied.argmax(0)][~nearest_is_tied])


def test_labels_by_hand():
    """Halves: the nearest, which is the later. And three that meet: none has a half, and the largest wins."""
    assert resample_label(np.array([[[5, 7, 7, 2]]], np.uint8), (1, 1, 2), None).tolist() == [[[7, 2]]]
    corner = np.array([[0, 0], [1, 2]], np.uint8).reshape(1, 2, 2)
    assert resample_label(corner, (1, 1, 1), None).item() == 0
    block = np.array([[[3, 1], [1, 1]], [[2, 2], [2, 3]]], np.uint8)  # the nearest, 3, is none of the most likely
    assert resample_label(block, (1, 1, 1), None).item() == 1


@settings(deadline=None, max_examples=60)
@given(
    SHAPES, SHAPES, st.sampled_from([None, 0, 1, 2]), st.integers(0, 2), *[st.integers(1, 4)] * 2, st.integers(0, 99)
)
def test_slabs_are_the_softmax_of_the_interpolated_logits(shape, new, separate, axis, n_in, n_out, seed):
    """The same, to the last bit, whatever the slabs; and the same as of whole volumes, but for rounding."""
    logits = np.random.default_rng(seed).normal(0, 5, (3, *shape)).astype(np.float32)
    probabilities = softmax(logits)
    slices, parts = zip(
        *resample_probabilities(slabs_of(probabilities, axis, n_in), axis, (shape, new), separate, n_out), strict=True
    )
    assert [one.start for one in slices] == [0, *(one.stop for one in slices[:-1])] and slices[-1].stop == new[axis]
    result = np.concatenate(parts, axis + 1)
    assert result.dtype == np.float32 and result.shape == (3, *new)
    ((_, whole),) = resample_probabilities([probabilities], 0, (shape, new), separate, 99)
    np.testing.assert_array_equal(result, whole)
    if separate is None:
        expected = softmax(np.stack([zoom(one, new, 1) for one in logits]))
        np.testing.assert_allclose(result, expected, atol=2e-6)


def test_a_few_slabs_are_all_that_is_in_memory():
    old, new, n_read = (40, 50, 50), (80, 100, 100), []

    def source():
        for _ in range(old[0] // 4):
            n_read.append(4)
            yield np.full((3, 4, *old[1:]), 1 / 3, np.float32)

    tracemalloc.start()
    for slab, part in resample_probabilities(source(), 0, (old, new), None, 8):
        assert sum(n_read) <= slab.stop / 2 + 5 and part.shape == (3, slab.stop - slab.start, 100, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.5 * 4 * 3 * np.prod(new) and sum(n_read) == old[0]


def test_what_stays_comes_as_it_is():
    slab = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    (where, same), (after, other) = resample_probabilities([slab, slab], 0, ((6, 4, 5),) * 2, None, 1)
    assert same is slab and other is slab and (where, after) == (slice(0, 3), slice(3, 6))


def test_impossible_classes_stay_finite():
    one_hot = np.eye(2, dtype=np.float32)[:, :, None, None]
    ((_, part),) = resample_probabilities([one_hot], 0, ((2, 1, 1), (3, 1, 1)), None, 9)
    np.testing.assert_allclose(part[:, :, 0, 0], [[1, 0.5, 0], [0, 0.5, 1]], atol=1e-6)

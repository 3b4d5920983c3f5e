"""Random changes: where pixels go, that time steps go along, and that a key decides."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_dsr.data.augmentation import CHANGES, Augmentation, center_crop
from keras_dsr.data.parts import ArrayPart, DataSet

KEY = tf.constant([3, 4], tf.int64)


def noise(*shape):
    return np.random.default_rng(0).integers(1, 255, shape).astype("uint8")


def changed(x, *changes, key=KEY, mean=(0.0,), **settings):
    return Augmentation(changes, **settings).batch(tf.constant(x), key, mean).numpy()


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_a_crop_is_cut_anywhere_from_the_padded_input(padding):
    x = np.repeat(noise(1, 7, 9, 2), 1500, axis=0)
    padded = np.pad(x[0], [(padding, padding), (padding, padding), (0, 0)])
    places = [(row, column) for row in range(2 * padding + 1) for column in range(2 * padding + 1)]
    cuts = {padded[row : row + 7, column : column + 9].tobytes(): (row, column) for row, column in places}
    found = [cuts[one.tobytes()] for one in changed(x, "crop", padding=padding)]
    assert set(found) == set(places)
    counts = np.bincount([row * (2 * padding + 1) + column for row, column in found])
    expected = 1500 / len(places)
    assert np.square(counts - expected).sum() / expected < 2 * len(places)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_time_steps_of_an_input_change_alike(dtype):
    x = np.repeat(noise(40, 1, 8, 8, 2), 5, axis=1).astype(dtype)
    y = changed(x, "crop", "flip", "cutout", padding=2, cutout=3)
    assert y.dtype == dtype
    for step in range(1, 5):
        np.testing.assert_array_equal(y[:, step], y[:, 0])
    assert len({one.tobytes() for one in y - x}) > 30
    as_images = changed(x[:, 0], "crop", "flip", "cutout", padding=2, cutout=3)
    np.testing.assert_array_equal(y[:, 0], as_images)


@pytest.mark.parametrize("shape", [(400, 4, 5, 3), (400, 2, 4, 5, 3)])
def test_a_flip_turns_one_input_in_two_left_to_right(shape):
    x = noise(*shape)
    y = changed(x, "flip")
    flipped = (y == x[..., ::-1, :]).reshape(400, -1).all(1)
    same = (y == x).reshape(400, -1).all(1)
    assert (flipped ^ same).all()
    assert 150 < flipped.sum() < 250


def test_cutout_sets_one_square_to_the_mean():
    x = noise(2000, 8, 8, 3)
    y = changed(x, "cutout", cutout=3, mean=(0.4, 100.6, 300.0))
    gone = (y != x).any(-1)
    np.testing.assert_array_equal(y[gone], np.broadcast_to(np.array([0, 101, 255], "uint8"), y[gone].shape))
    corners = set()
    for one in (y == [0, 101, 255]).all(-1):
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        for places in (rows, columns):
            # Its middle is in the input; at the border a part of it is not.
            assert len(places) == 3 or (len(places) == 2 and (places[0] == 0 or places[-1] == 7))
        corners.add((rows[0], rows[-1], columns[0], columns[-1]))
    assert len(corners) == 64


def rectangle(y):
    """Where a part of a ramp comes from: begin and end of rows and columns, of what was resized."""
    row, column = y[..., 0].astype("float64"), y[..., 1].astype("float64")
    height, width = (
        (row[-1, 0] - row[0, 0]) * len(row) / (len(row) - 1),
        (column[0, -1] - column[0, 0]) * len(row) / (len(row) - 1),
    )
    return height, width, (row[0, 0] + row[-1, 0]) / 2, (column[0, 0] + column[0, -1]) / 2


def test_a_resized_crop_is_a_random_rectangle_brought_to_the_shape():
    rows, columns = np.mgrid[0:200, 0:300].astype("float32")
    x = tf.constant(np.stack([rows, columns], axis=-1))
    augmentation = Augmentation(("resized_crop",))
    one = tf.function(lambda key: augmentation.each(x, key, (16, 16, 2)))
    found = np.array([rectangle(one(tf.constant([5, n], tf.int64)).numpy()) for n in range(1000)])
    area, aspect = found[:, 0] * found[:, 1] / (200 * 300), found[:, 1] / found[:, 0]
    assert 0.07 < area.min() < 0.1
    assert area.max() > 0.75
    assert 0.72 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.37
    # As many wide as high ones: the logarithm is uniform. Those of large area that do not fit are drawn again.
    small = area < 0.3
    assert abs(np.log(aspect[small]).mean()) < 0.05
    assert np.quantile(area[small], 0.5) == pytest.approx(0.19, abs=0.02)
    # Middles are anywhere where the rectangle fits.
    for middle, extent, length in ((found[:, 2], found[:, 0], 199), (found[:, 3], found[:, 1], 299)):
        place = (middle - extent / 2 + 0.5) / (length + 1 - extent)
        assert place[extent < 0.8 * length].min() < 0.05
        assert place[extent < 0.8 * length].max() > 0.95
        assert place[extent < 0.8 * length].mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (1, 1), (3, 400)])
def test_where_no_rectangle_fits_the_largest_central_one_is_taken(shape):
    x = np.zeros((*shape, 3), "uint8")
    centre = x[(shape[0] - 1) // 2 : shape[0] // 2 + 1, (shape[1] - 1) // 2 : shape[1] // 2 + 1]
    centre += 9
    y = Augmentation(("resized_crop",)).each(tf.constant(x), KEY, (4, 4, 3))
    assert y.shape == (4, 4, 3)
    assert y.numpy().max() > 0


def test_a_resized_crop_of_frames_is_the_same_for_all_time_steps():
    x = np.repeat(noise(1, 20, 30, 2), 4, axis=0)
    y = Augmentation(("resized_crop",)).each(tf.constant(x), KEY, (4, 10, 12, 2)).numpy()
    assert y.dtype == "uint8"
    for step in range(1, 4):
        np.testing.assert_array_equal(y[step], y[0])


@pytest.mark.parametrize("given", [(60, 90), (90, 60), (64, 64), (20, 31), (300, 40)])
def test_the_centre_is_what_pillow_gives(given):
    x = noise(*given, 3)
    y = center_crop(tf.constant(x), 36, (32, 32, 3)).numpy()
    scale = 36 / min(given)
    height, width = (round(length * scale) for length in given)
    resized = Image.fromarray(x).resize((width, height), Image.Resampling.BILINEAR)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = np.array(resized)[top : top + 32, left : left + 32]
    assert y.dtype == "uint8"
    assert np.abs(y.astype(int) - expected).max() <= 1


def test_the_centre_keeps_proportions_for_inputs_that_are_not_square():
    rows, columns = np.mgrid[0:100, 0:100].astype("float32")
    y = center_crop(tf.constant(np.stack([rows, columns], axis=-1)), 20, (20, 40, 2)).numpy()
    per_pixel = np.diff(y[:, 20, 0])[2:-2].mean(), np.diff(y[10, :, 1])[2:-2].mean()
    assert per_pixel == pytest.approx((2.5, 2.5), abs=0.01)


def test_images_that_are_larger_than_the_input_get_the_central_crop_before_others_apply():
    x = noise(6, 30, 50, 3)
    part = ArrayPart(x, np.zeros(6, int))
    data = DataSet("large", part, part, part, 1, (16, 16, 3), (0.0,), (1.0,), ("a",), resize=18)
    centres = np.stack([center_crop(tf.constant(one), 18, (16, 16, 3)) for one in x])
    (evaluated, _), *_ = data.batches(data.test, 6)
    np.testing.assert_array_equal(evaluated, centres)
    (trained, _), *_ = data.training_batches(6, seed=0, augmentation=Augmentation(("flip",)))
    wanted = {one.tobytes() for one in centres} | {one[:, ::-1].tobytes() for one in centres}
    assert {one.astype("uint8").tobytes() for one in trained.numpy()} < wanted
    (cropped, _), *_ = data.training_batches(6, seed=0, augmentation=Augmentation(("crop",), padding=3))
    assert cropped.shape == (6, 16, 16, 3)


@pytest.mark.parametrize("change", CHANGES)
def test_a_key_decides(change):
    augmentation = Augmentation((change,), cutout=2)

    def apply(key):
        if change == "resized_crop":
            return augmentation.each(tf.constant(noise(9, 9, 3)), key, (8, 8, 3))
        return augmentation.batch(tf.constant(noise(20, 8, 8, 3)), key)

    once = apply(KEY).numpy()
    tf.random.set_seed(99)
    np.testing.assert_array_equal(apply(KEY), once)
    np.testing.assert_array_equal(tf.function(apply)(KEY), once)
    assert any((apply(tf.constant([3, n], tf.int64)).numpy() != once).any() for n in range(5, 8))
    assert any((apply(tf.constant([n, 4], tf.int64)).numpy() != once).any() for n in range(5, 8))


def test_nothing_happens_without_changes():
    x = tf.constant(noise(2, 8, 8, 3))
    np.testing.assert_array_equal(Augmentation().batch(x, KEY), x)
    np.testing.assert_array_equal(Augmentation().each(x[0], KEY, (8, 8, 3)), x[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"changes": ("rotate",)}, r"once at most. Received \('rotate',\)"),
        ({"changes": ("flip", "flip")}, r"Received \('flip', 'flip'\)"),
        ({"padding": 0}, "Received padding=0"),
        ({"cutout": -1}, "Received cutout=-1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)


@pytest.mark.parametrize(
    ("change", "shape", "message"),
    [
        ("crop", (5, 700), r"Received inputs of shape \(5, 700\); leave it out"),
        ("resized_crop", (5, 700), r"Received inputs of shape \(5, 700\); leave it out"),
        ("autoaugment", (4, 8, 8, 3), r"colour images .* Received inputs of shape \(4, 8, 8, 3\)"),
        ("autoaugment", (8, 8, 1), r"Received inputs of shape \(8, 8, 1\)"),
    ],
)
def test_inputs_that_it_does_not_work_on_are_refused(change, shape, message):
    part = ArrayPart(np.zeros((4, *shape), "uint8"), np.zeros(4, int))
    data = DataSet("other", part, part, part, 1, shape, (0.0,), (1.0,), ("a",))
    with pytest.raises(ValueError, match=message):
        data.training_batches(2, seed=0, augmentation=Augmentation((change,)))
    if change != "resized_crop":
        with pytest.raises(ValueError, match=message):
            Augmentation((change,)).batch(tf.zeros((4, *shape), tf.uint8), KEY)

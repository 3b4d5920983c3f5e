"""AutoAugment's operations against Pillow's, and its policy against the drawn operations one after another."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from keras_dsr.data import autoaugment
from keras_dsr.data.autoaugment import OPERATIONS, cifar_policy, operate

KEY = tf.constant([3, 4], tf.int64)
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def pictures(count, height=32, width=32):
    """Smooth blobs and noise, some of few levels, two without any contrast."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = np.sin(
        7 * rng.random((count, 1, 1, 3)) * rows[..., None] + 9 * rng.random((count, 1, 1, 3)) * columns[..., None]
    )
    x = 60 + 190 * rng.random((count, 1, 1, 1)) * (waves + rng.normal(0, 0.2, waves.shape))
    x = np.clip(x, 0, 255).astype("uint8")
    x[::7] = x[::7] // 64 * 64
    x[:2] = np.array([0, 200])[:, None, None, None]
    return x


def pillow(name, x, strength, sign):
    """The operation on one image by Pillow, with the values of the paper's Table 6."""
    image = Image.fromarray(x)
    height, width = x.shape[:2]
    value, factor = strength * sign, 0.1 + 1.8 * strength

    def affine(*matrix):
        return image.transform((width, height), Image.Transform.AFFINE, matrix)

    changed = {
        "shear_x": lambda: affine(1, 0.3 * value, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * value, 1, 0),
        "translate_x": lambda: affine(1, 0, 150 / 331 * width * value, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, 150 / 331 * height * value),
        "rotate": lambda: image.rotate(30 * value),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "invert": lambda: ImageOps.invert(image),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * strength),
        "posterize": lambda: ImageOps.posterize(image, round(8 - 4 * strength)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()
    return np.array(changed)


def agree(name, y, expected):
    """One grey level apart, or for geometric operations as good as all pixels the same: some lie between two."""
    distance = np.abs(y.astype(int) - expected)
    if name in GEOMETRIC:
        return (distance > 0).any(-1).mean() < 0.03
    return distance.max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name, size):
    x = pictures(80, *size)
    strength = (np.arange(80) % 10 / 9).astype("float32")
    sign = np.where(np.arange(80) // 10 % 2, 1.0, -1.0).astype("float32")
    y = operate(name, tf.constant(x), tf.constant(strength), tf.constant(sign)).numpy()
    assert y.dtype == "uint8"
    expected = np.stack([pillow(name, *one) for one in zip(x, strength.tolist(), sign.tolist(), strict=True)])
    assert agree(name, y, expected)
    assert (y != x).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_takes_no_images_too(name):
    assert operate(name, tf.zeros([0, 32, 32, 3], tf.uint8), tf.zeros([0]), tf.zeros([0])).shape == (0, 32, 32, 3)


def test_the_table_is_complete():
    table = autoaugment._SUB_POLICIES
    assert len(table) == 25
    for pair in table:
        for name, probability, magnitude in pair:
            assert name in OPERATIONS
            assert 0 <= probability <= 1
            assert magnitude in range(10)
    # As counted in the paper's Table 7.
    names = [name for pair in table for name, _, _ in pair]
    counts = {name: names.count(name) for name in OPERATIONS}
    assert counts == {
        "shear_x": 0,
        "shear_y": 2,
        "translate_x": 2,
        "translate_y": 5,
        "rotate": 1,
        "color": 5,
        "contrast": 2,
        "brightness": 4,
        "sharpness": 5,
        "invert": 3,
        "solarize": 4,
        "posterize": 1,
        "autocontrast": 7,
        "equalize": 9,
    }


def drawn(key, count):
    """What the policy draws, by its documented recipe: sub-policy, whether each operation happens, and its sign."""

    def uniform(number, *shape):
        own_key = tf.random.experimental.stateless_fold_in(key, tf.constant(number, tf.int64))
        return tf.random.stateless_uniform(shape, own_key).numpy()

    return (uniform(0, count) * 25).astype(int), uniform(1, count, 2), np.where(uniform(2, count, 2) < 0.5, 1, -1)


def test_the_policy_applies_both_operations_in_turn():
    count = 400
    x = pictures(count)
    y = cifar_policy(tf.constant(x), KEY).numpy()
    assert (y.shape, y.dtype) == (x.shape, "uint8")
    happened = 0
    chosen, chance, sign = drawn(KEY, count)
    for number in range(count):
        expected, names = x[number], []
        for turn, (name, probability, magnitude) in enumerate(autoaugment._SUB_POLICIES[chosen[number]]):
            if chance[number, turn] < probability:
                one = tf.constant([magnitude / 9]), tf.constant([float(sign[number, turn])])
                expected = operate(name, tf.constant(expected[None]), *one).numpy()[0]
                names.append(name)
        happened += len(names)
        np.testing.assert_array_equal(y[number], expected, str(names))
    mean = sum(probability for pair in autoaugment._SUB_POLICIES for _, probability, _ in pair) / 25
    assert happened / count == pytest.approx(mean, abs=0.12)
    assert np.bincount(chosen, minlength=25).min() > 3


def test_a_key_decides():
    x = tf.constant(pictures(64))
    compiled = tf.function(cifar_policy)
    once = cifar_policy(x, KEY).numpy()
    tf.random.set_seed(5)
    np.testing.assert_array_equal(compiled(x, KEY), once)
    assert (compiled(x, tf.constant([3, 5], tf.int64)).numpy() != once).any()


def test_images_of_a_batch_change_in_their_own_ways():
    y = cifar_policy(tf.constant(np.repeat(pictures(3)[2:], 200, axis=0)), KEY).numpy()
    assert len({one.tobytes() for one in y}) > 25


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8, 8, 1), "uint8", r"Received shape \(2, 8, 8, 1\) and dtype uint8"),
        ((2, 4, 8, 8, 3), "uint8", r"Received shape \(2, 4, 8, 8, 3\)"),
        ((2, 8, 8, 3), "float32", "dtype float32"),
    ],
)
def test_other_inputs_are_refused(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        cifar_policy(tf.zeros(shape, dtype), KEY)

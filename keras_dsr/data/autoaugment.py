"""AutoAugment: the 25 pairs of random changes that were found for CIFAR-10.

Each image of a batch draws one of the 25 sub-policies; each of its two operations happens with its probability and has
its magnitude, an integer M from 0 to 9 that stands for a value:

- shear_x, shear_y: by ±0.3 M/9, about the upper left corner
- translate_x, translate_y: by ±150/331 M/9 of the width or height
- rotate: by ±30° M/9, about the centre
- color, contrast, brightness, sharpness: d + f (image - d) with f = 0.1 + 1.8 M/9, where d is the image in grey, its
  mean grey level, black, or the image smoothed
- solarize: levels from 256 - 256 M/9 are inverted
- posterize: 8 - 4 M/9 bits of each level, rounded, are kept
- invert; autocontrast, which stretches each channel to 0..255; equalize, which flattens each channel's histogram

The sign of what has one is drawn. Geometric operations take the nearest pixel, and black from outside of the image; the
others change levels as Pillow does, whose operations the paper uses. The magnitudes of solarize and posterize are
strengths, as in the authors' released code, where the paper gives ranges only.

Reference: Cubuk, Zoph, Mané, Vasudevan and Le, "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019,
Tables 6 and 7 of the appendix.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Table 7: operation, probability, magnitude; of each of two operations.
_SUB_POLICIES = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)


def cifar_policy(x: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """One of the 25 sub-policies for each image.

    Args:
        x: Colour images (batch, height, width, 3), uint8.
        key: Two int64 that decide what happens.

    Returns:
        A tensor of the same shape and dtype.

    Raises:
        ValueError: if `x` is something else.
    """
    if x.shape.rank != 4 or x.shape[-1] != 3 or x.dtype != tf.uint8:
        raise ValueError(
            "AutoAugment's policy works on colour images (batch, height, width, 3), uint8. "
            f"Received shape {tuple(x.shape)} and dtype {x.dtype.name}."
        )
    shape = x.shape
    count = tf.shape(x)[0]

    def draw(number: int, shape: list) -> tf.Tensor:
        own_key = tf.random.experimental.stateless_fold_in(key, tf.constant(number, tf.int64))
        return tf.random.stateless_uniform(shape, own_key)

    chosen = tf.cast(draw(0, [count]) * len(_SUB_POLICIES), tf.int32)
    happens, positive = draw(1, [count, 2]), draw(2, [count, 2]) < 0.5
    for turn in range(2):
        names, probabilities, magnitudes = zip(*(pair[turn] for pair in _SUB_POLICIES), strict=True)
        present = sorted(set(names))
        operation = tf.gather(tf.constant([present.index(name) for name in names]), chosen)
        operation = tf.where(happens[:, turn] < tf.gather(tf.constant(probabilities), chosen), operation, -1)
        strength = tf.gather(tf.constant(magnitudes, tf.float32) / 9.0, chosen)
        sign = tf.where(positive[:, turn], 1.0, -1.0)
        # Each operation sees those images alone that drew it.
        for number, name in enumerate(present):
            rows = tf.where(operation == number)
            changed = operate(name, tf.gather_nd(x, rows), tf.gather_nd(strength, rows), tf.gather_nd(sign, rows))
            x = tf.tensor_scatter_nd_update(x, rows, changed)
    return tf.ensure_shape(x, shape)


def operate(name: str, x: tf.Tensor, strength: tf.Tensor, sign: tf.Tensor) -> tf.Tensor:
    """One operation on each image of a batch.

    Args:
        name: Its name, see above.
        x: Colour images (batch, height, width, 3), uint8.
        strength: M/9 of each image, from 0 to 1: float32 of shape (batch,).
        sign: 1 or -1 for each image, likewise; without effect where the value has no sign.

    Returns:
        A tensor of the same shape and dtype.
    """
    if name in _GEOMETRIC:
        return _transform(x, _GEOMETRIC[name], strength * sign)
    if name in _DEGENERATE:
        return _blend(_DEGENERATE[name](tf.cast(x, tf.int32)), x, 0.1 + 1.8 * strength)
    return _ON_LEVELS[name](x, strength[:, tf.newaxis, tf.newaxis, tf.newaxis])


def _rotation(value: tf.Tensor, height: int, width: int) -> tuple[tf.Tensor, ...]:
    cos, sin = tf.cos(value * (np.pi / 6)), tf.sin(value * (np.pi / 6))
    x, y = width / 2, height / 2
    return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos


# Where the pixel (x, y) comes from: a, b, c, d, e, f with x' = a x + b y + c and y' = d x + e y + f.
_GEOMETRIC = {
    "shear_x": lambda value, height, width: (1.0, 0.3 * value, 0.0, 0.0, 1.0, 0.0),
    "shear_y": lambda value, height, width: (1.0, 0.0, 0.0, 0.3 * value, 1.0, 0.0),
    "translate_x": lambda value, height, width: (1.0, 0.0, width * 150 / 331 * value, 0.0, 1.0, 0.0),
    "translate_y": lambda value, height, width: (1.0, 0.0, 0.0, 0.0, 1.0, height * 150 / 331 * value),
    "rotate": _rotation,
}


def _transform(x: tf.Tensor, source: Callable[..., tuple], value: tf.Tensor) -> tf.Tensor:
    a, b, c, d, e, f = (entry + tf.zeros_like(value) for entry in source(value, *x.shape[1:3]))
    # A pixel's place is its middle there, and its number in TensorFlow's operation.
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    nothing = tf.zeros_like(value)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=tf.stack([a, b, c, d, e, f, nothing, nothing], axis=1),
        output_shape=tf.constant(x.shape[1:3].as_list()),
        fill_value=0.0,
        interpolation="NEAREST",
    )


def _grey(x: tf.Tensor) -> tf.Tensor:
    """Rec. 601 luma in fixed point."""
    return (tf.reduce_sum(x * tf.constant([19595, 38470, 7471]), axis=-1, keepdims=True) + 2**15) // 2**16


def _mean_grey(x: tf.Tensor) -> tf.Tensor:
    return tf.floor(tf.reduce_mean(tf.cast(_grey(x), tf.float32), axis=(1, 2), keepdims=True) + 0.5)


def _smooth(x: tf.Tensor) -> tf.Tensor:
    """The mean of each pixel, five times, and its eight neighbours; pixels of the border as they are."""
    height, width = x.shape[1:3]
    around = sum(x[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    middle = (2 * (around + 4 * x[:, 1:-1, 1:-1]) + 13) // 26
    inside = np.zeros((height, width, 1), "bool")
    inside[1:-1, 1:-1] = True
    return tf.where(inside, tf.pad(middle, [[0, 0], [1, 1], [1, 1], [0, 0]]), x)


_DEGENERATE = {
    "color": _grey,
    "contrast": _mean_grey,
    "brightness": tf.zeros_like,
    "sharpness": _smooth,
}


def _blend(degenerate: tf.Tensor, x: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    degenerate, x = tf.cast(degenerate, tf.float32), tf.cast(x, tf.float32)
    blended = degenerate + factor[:, tf.newaxis, tf.newaxis, tf.newaxis] * (x - degenerate)
    return tf.cast(tf.clip_by_value(blended, 0.0, 255.0), tf.uint8)


def _solarize(x: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    return tf.where(tf.cast(x, tf.float32) < 256.0 * (1.0 - strength), x, 255 - x)


def _posterize(x: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    dropped = tf.cast(tf.round(4.0 * strength), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(x, dropped), dropped)


def _autocontrast(x: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    levels = tf.cast(x, tf.int32)
    low = tf.reduce_min(levels, axis=(1, 2), keepdims=True)
    span = tf.reduce_max(levels, axis=(1, 2), keepdims=True) - low
    return tf.where(span > 0, tf.cast((levels - low) * 255 // tf.maximum(span, 1), tf.uint8), x)


def _equalize(x: tf.Tensor, strength: tf.Tensor) -> tf.Tensor:
    shape = tf.shape(x)
    # One row for each channel of each image.
    rows = tf.reshape(tf.transpose(tf.cast(x, tf.int32), [0, 3, 1, 2]), [shape[0] * 3, shape[1] * shape[2]])
    places = rows + 256 * tf.range(shape[0] * 3)[:, tf.newaxis]
    histogram = tf.math.unsorted_segment_sum(tf.ones_like(places), places, 256 * 3 * shape[0])
    histogram = tf.reshape(histogram, [-1, 256])
    # Pixels of the highest level do not count.
    highest = tf.reduce_max(rows, axis=1)
    step = (shape[1] * shape[2] - tf.gather(histogram, highest, batch_dims=1)) // 255
    step = step[:, tf.newaxis]
    below = tf.cumsum(histogram, axis=1, exclusive=True)
    table = tf.minimum((below + step // 2) // tf.maximum(step, 1), 255)
    table = tf.where(step > 0, table, tf.range(256))
    flat = tf.gather(table, rows, batch_dims=1)
    return tf.cast(tf.transpose(tf.reshape(flat, [-1, 3, shape[1], shape[2]]), [0, 2, 3, 1]), tf.uint8)


_ON_LEVELS = {
    "invert": lambda x, strength: 255 - x,
    "solarize": _solarize,
    "posterize": _posterize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}

OPERATIONS = (*_GEOMETRIC, *_DEGENERATE, *_ON_LEVELS)
"""Names of all operations."""

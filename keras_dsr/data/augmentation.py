"""Random changes to training inputs, each drawn from a key: the same key, the same change.

An `Augmentation` is a frozen set of them, which works inside a `tf.data` pipeline on images (height, width, channels)
or event frames (time, height, width, channels), all time steps alike. What brings images to one size works on each, the
rest on whole batches, which is many times faster.
"""

from __future__ import annotations

import dataclasses

import tensorflow as tf

from keras_dsr.data.autoaugment import cifar_policy

# In the order in which they apply.
CHANGES = ("resized_crop", "crop", "flip", "autoaugment", "cutout")

# Of "resized_crop": part of the area, width over height, and how many rectangles are drawn until one fits.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which random changes training inputs go through.

    Args:
        changes: Names, of:
            "resized_crop": a random part, of 8 to 100 % of the area and 3:4 to 4:3, resized to the input's shape (usual
            for ImageNet);
            "crop": pad by `padding` zeros on each side, cut the input's own size out at random (the paper's for CIFAR,
            with 4);
            "flip": left to right, for one input in two;
            "autoaugment": one of AutoAugment's 25 sub-policies for CIFAR-10, see `keras_dsr.data.autoaugment`;
            "cutout": a square of `cutout` pixels, centred anywhere in the input, set to the mean.
            They apply in this order.
        padding: Pixels that "crop" pads.
        cutout: Length of the side of "cutout"'s square in pixels.

    Raises:
        ValueError: if a name is unknown or given twice, or a number of pixels is below 1.

    Reference: Meng et al., CVPR 2022, Appendix; Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, Section 6
    ("resized_crop"); Cubuk et al., "AutoAugment", CVPR 2019; DeVries and Taylor, "Improved Regularization of
    Convolutional Neural Networks with Cutout", 2017.
    """

    changes: tuple[str, ...] = ()
    padding: int = 4
    cutout: int = 16

    def __post_init__(self) -> None:
        unknown = [change for change in self.changes if change not in CHANGES]
        if unknown or len(set(self.changes)) != len(self.changes):
            raise ValueError(f"Augmentation takes each of {CHANGES} once at most. Received {self.changes!r}.")
        for name in ("padding", "cutout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a number of pixels, 1 or more. Received {name}={getattr(self, name)!r}.")

    @property
    def works_on_each(self) -> bool:
        """Whether `each` does anything to an input that already has its shape."""
        return "resized_crop" in self.changes

    def check(self, shape: tuple[int, ...]) -> None:
        """Whether inputs of this shape can go through it.

        Args:
            shape: Shape of one input.

        Raises:
            ValueError: if they cannot: inputs without height and width, or "autoaugment" for other than colour images.
        """
        if self.changes and len(shape) not in (3, 4):
            raise ValueError(
                "Augmentation works on images (height, width, channels) and on event frames (time, height, width, "
                f"channels). Received inputs of shape {tuple(shape)}; leave it out for them."
            )
        if "autoaugment" in self.changes and (len(shape) != 3 or shape[-1] != 3):
            raise ValueError(
                "'autoaugment' works on colour images (height, width, 3). "
                f"Received inputs of shape {tuple(shape)}; leave it out for them."
            )

    def each(self, x: tf.Tensor, key: tf.Tensor, shape: tuple[int, ...], resize: int | None = None) -> tf.Tensor:
        """One stored input, brought to the shape that all have.

        Args:
            x: An input of shape `shape`; or an image of another size.
            key: Two int64 that decide what happens.
            shape: Shape of the result.
            resize: For images of several sizes without "resized_crop": `center_crop`'s. `None` if `x` has its shape.

        Returns:
            A tensor of shape `shape`, in the dtype of `x`.
        """
        if "resized_crop" in self.changes:
            x = _resized_crop(x, key, shape)
        elif resize is not None:
            x = center_crop(x, resize, shape)
        return tf.ensure_shape(x, shape)

    def batch(self, x: tf.Tensor, key: tf.Tensor, mean: tuple[float, ...] = (0.0,)) -> tf.Tensor:
        """A batch of stored inputs, each changed in its own way.

        Args:
            x: Inputs of shape (batch, height, width, channels) or (batch, time, height, width, channels).
            key: Two int64 that decide what happens.
            mean: Mean of each channel, or of all, that "cutout" sets.

        Returns:
            A tensor of the same shape and dtype.

        Raises:
            ValueError: if inputs of this shape cannot go through it, see `check`.
        """
        self.check(tuple(x.shape[1:]))
        if "crop" in self.changes:
            x = _crop(x, _derive(key, 1), self.padding)
        if "flip" in self.changes:
            flipped = tf.random.stateless_uniform([tf.shape(x)[0]], _derive(key, 2)) < 0.5
            x = tf.where(_like(flipped, x), tf.reverse(x, [x.shape.rank - 2]), x)
        if "autoaugment" in self.changes:
            x = cifar_policy(x, _derive(key, 3))
        if "cutout" in self.changes:
            x = _cutout(x, _derive(key, 4), self.cutout, _as(tf.constant(mean, tf.float32), x.dtype))
        return x


def center_crop(x: tf.Tensor, resize: int, shape: tuple[int, ...]) -> tf.Tensor:
    """The centre of an image: what evaluation sees where training sees random parts.

    Args:
        x: An image (height, width, channels).
        resize: The image is resized, as it is in proportion, so that it just covers `shape` enlarged until its shorter
            side has this length.
        shape: Shape of the result, which is cut from the middle.

    Returns:
        A tensor of shape `shape`, in the dtype of `x`.
    """
    size = tf.cast(tf.shape(x)[:2], tf.float64)
    enlarged = tf.constant(shape[:2], tf.float64) * (resize / min(shape[:2]))
    size = tf.cast(tf.round(size * tf.reduce_max(enlarged / size)), tf.int32)
    resized = tf.image.resize(x, tf.maximum(size, shape[:2]), antialias=True)
    return tf.ensure_shape(_as(tf.image.resize_with_crop_or_pad(resized, *shape[:2]), x.dtype), shape)


def _derive(key: tf.Tensor, number: int) -> tf.Tensor:
    """A key for one of several draws."""
    return tf.random.experimental.stateless_fold_in(key, tf.constant(number, tf.int64))


def _as(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Floats, rounded and clipped to what `dtype` holds if it is one of integers."""
    return tf.saturate_cast(tf.round(x), dtype) if dtype.is_integer else tf.cast(x, dtype)


def _like(each: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """(batch,) -> (batch, 1, ...), of the rank of `x`."""
    return tf.reshape(each, [-1, *[1] * (x.shape.rank - 1)])


def _crop(x: tf.Tensor, key: tf.Tensor, padding: int) -> tf.Tensor:
    rank = x.shape.rank
    height, width = x.shape[-3:-1]
    padded = tf.pad(x, [*[[0, 0]] * (rank - 3), [padding, padding], [padding, padding], [0, 0]])
    offsets = tf.random.stateless_uniform([tf.shape(x)[0], 2], key, 0, 2 * padding + 1, tf.int32)
    cut = tf.gather(padded, offsets[:, :1] + tf.range(height), axis=rank - 3, batch_dims=1)
    cut = tf.gather(cut, offsets[:, 1:] + tf.range(width), axis=rank - 2, batch_dims=1)
    return tf.ensure_shape(cut, x.shape)


def _resized_crop(x: tf.Tensor, key: tf.Tensor, shape: tuple[int, ...]) -> tf.Tensor:
    """Of several random rectangles the first that lies in the input; the largest central one if none does."""
    whole = tf.cast(tf.shape(x)[-3:-1], tf.float32)
    low, high = tf.unstack(tf.math.log(_ASPECT))
    areas = tf.random.stateless_uniform([_ATTEMPTS], _derive(key, 1), *_AREA) * tf.reduce_prod(whole)
    aspects = tf.exp(tf.random.stateless_uniform([_ATTEMPTS], _derive(key, 2), low, high))
    drawn = tf.round(tf.sqrt(tf.stack([areas / aspects, areas * aspects], axis=1)))
    fits = tf.reduce_all((drawn >= 1) & (drawn <= whole), axis=1)
    largest = tf.minimum(whole, tf.round(tf.reverse(whole, [0]) * _ASPECT[1]))
    size = tf.where(tf.reduce_any(fits), drawn[tf.argmax(tf.cast(fits, tf.int32))], largest)
    where = tf.where(tf.reduce_any(fits), tf.random.stateless_uniform([2], _derive(key, 3)), 0.5)
    begin = tf.cast(tf.floor(where * (whole - size + 1)), tf.int32)
    end = begin + tf.cast(size, tf.int32)
    cut = x[..., begin[0] : end[0], begin[1] : end[1], :]
    return _as(tf.image.resize(cut, shape[-3:-1], antialias=True), x.dtype)


def _cutout(x: tf.Tensor, key: tf.Tensor, side: int, value: tf.Tensor) -> tf.Tensor:
    height, width = x.shape[-3:-1]
    centres = tf.random.stateless_uniform([tf.shape(x)[0], 2], key) * tf.constant([height, width], tf.float32)
    begin = tf.cast(centres, tf.int32) - side // 2

    def inside(begin: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        return (places >= begin[:, tf.newaxis]) & (places < begin[:, tf.newaxis] + side)

    rows, columns = inside(begin[:, 0], tf.range(height)), inside(begin[:, 1], tf.range(width))
    square = rows[:, :, tf.newaxis] & columns[:, tf.newaxis, :]
    square = square[..., tf.newaxis] if x.shape.rank == 4 else square[:, tf.newaxis, :, :, tf.newaxis]
    return tf.where(square, value, x)

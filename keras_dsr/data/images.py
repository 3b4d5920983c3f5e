"""Images: arrays in three parts, and batches of them.

The test part of a data set is for one look at the end. Validation, for every choice before, is cut from the training
part.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Part:
    """Images and their labels.

    Args:
        images: Floats of shape (count, height, width, channels), standardised with the training part's statistics.
        labels: Integers of shape (count,).
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set in three parts.

    Args:
        name: Its name.
        train: What training sees.
        validation: What choices see.
        test: What nothing sees but the final evaluation.
        classes: Number of classes.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.train.images.shape[1:]


def digits() -> ImageData:
    """The 1,797 real handwritten digits, 8x8 pixels, that scikit-learn carries: no download.

    360 images are for testing and 144 for validation, drawn once and for all with equal parts of each class; 1,293
    remain for training.

    Returns:
        The three parts, standardised to mean 0 and variance 1 of the training part.

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    raw = sklearn.datasets.load_digits()
    images, labels = raw.images[..., np.newaxis].astype("float32"), raw.target.astype("int32")

    def split(indices: np.ndarray, size: int) -> list[np.ndarray]:
        return sklearn.model_selection.train_test_split(
            indices, test_size=size, stratify=labels[indices], random_state=0
        )

    rest, test = split(np.arange(len(labels)), 360)
    train, validation = split(rest, 144)
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    parts = [Part(images[indices], labels[indices]) for indices in (train, validation, test)]
    return ImageData("digits", *parts, classes=10)


DATASETS = {"digits": digits}


def load(name: str) -> ImageData:
    """The data set of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in DATASETS:
        raise ValueError(f"A data set is one of {sorted(DATASETS)}. Received {name!r}.")
    return DATASETS[name]()


def training_batches(part: Part, batch_size: int, seed: int, shift: int = 0) -> tf.data.Dataset:
    """Batches for training, in another order each epoch.

    Args:
        part: Images and labels.
        batch_size: Images in a batch; what does not fill one waits for another epoch.
        seed: Seed of the order and the shifts.
        shift: Augmentation: each image moves by up to so many pixels each way, and its edge is filled with its darkest
            value. 0 for none.

    Raises:
        ValueError: if the batch size is not in 1..number of images, or `shift` is below 0.
    """
    if not 1 <= batch_size <= len(part):
        raise ValueError(f"batch_size must be from 1 to the {len(part)} images. Received batch_size={batch_size!r}.")
    if shift < 0:
        raise ValueError(f"shift is a number of pixels, 0 or more. Received shift={shift!r}.")
    height, width, channels = part.images.shape[1:]
    darkest = float(part.images.min())
    offsets = tf.random.Generator.from_seed(seed)

    def move(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        padded = tf.pad(image, [[shift, shift], [shift, shift], [0, 0]], constant_values=darkest)
        row, column = tf.unstack(offsets.uniform([2], 0, 2 * shift + 1, tf.int32))
        return tf.ensure_shape(padded[row : row + height, column : column + width], (height, width, channels)), label

    batches = tf.data.Dataset.from_tensor_slices((part.images, part.labels)).shuffle(len(part), seed=seed)
    if shift:
        batches = batches.map(move)
    return batches.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)

"""Data sets in three parts, and batches of them whose order resumes.

The test part of a data set is for one look at the end. Validation, for every choice before, is cut from the training
part. What training sees in epoch e depends on the seed and e alone, never on an iterator's state or the global seed: a
run that was killed goes on with the very batches that it would have seen.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sklearn.model_selection
import tensorflow as tf

from keras_dsr.data.augmentation import Augmentation

Prepare = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# In bytes: a larger array is not copied to TensorFlow but read batch by batch.
_IN_MEMORY = 2**30


class Part(abc.ABC):
    """Examples with their labels, in an order."""

    labels: np.ndarray | None = None
    """Integers of shape (count,); `None` if they are known only as the examples are read."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def batches(
        self,
        batch_size: int,
        prepare: Prepare | None = None,
        seed: tf.Tensor | None = None,
        drop_remainder: bool = False,
        own: range | None = None,
    ) -> tf.data.Dataset:
        """One pass over all examples, in batches.

        Args:
            batch_size: Examples in a batch.
            prepare: What brings one input, as it is stored, to the shape that all have; it is called with the input and
                its place in the pass, an int64. `None` if all have that shape.
            seed: An int64 scalar that decides the order, and nothing else does; `None` for the order in which they are
                stored.
            drop_remainder: Whether to leave out what does not fill a batch.
            own: The places of a batch whose examples are wanted, one after another; what would be costly to read or to
                prepare is zeros at all others. `None` for all.

        Returns:
            Pairs of inputs (batch, ...), in the dtype in which they are stored, and integer labels (batch,).
        """


def batched(
    examples: tf.data.Dataset,
    take: Callable[..., tuple[tf.Tensor, tf.Tensor]],
    batch_size: int,
    drop_remainder: bool,
    own: range | None,
) -> tf.data.Dataset:
    """Batches of inputs and labels that are taken one by one.

    Args:
        examples: A place in the pass, an int64, for each of them, and what else `take` gets.
        take: Gives an input and its label; all inputs have one shape, which is known.
        batch_size: Examples in a batch.
        drop_remainder: Whether to leave out what does not fill a batch.
        own: The places of a batch at which `take` is called; inputs and labels at others are zeros. `None` for all.

    Returns:
        Pairs of inputs (batch, ...) and labels (batch,).
    """
    taken = examples.map(take, num_parallel_calls=tf.data.AUTOTUNE)
    if own is not None:
        specs = taken.element_spec

        def take_own(place: tf.Tensor, *rest: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            def leave() -> tuple[tf.Tensor, ...]:
                return tuple(tf.zeros(spec.shape, spec.dtype) for spec in specs)

            of_batch = place % batch_size
            return tf.cond((own.start <= of_batch) & (of_batch < own.stop), lambda: take(place, *rest), leave)

        taken = examples.map(take_own, num_parallel_calls=tf.data.AUTOTUNE)
    return taken.batch(batch_size, drop_remainder=drop_remainder)


def order(count: int, seed: tf.Tensor | None) -> tf.Tensor:
    """The numbers of the examples in the order of a pass.

    Drawn at once, in 0.2 s for ImageNet: `tf.random.experimental.index_shuffle` does without the list, but the orders
    that it gives are not equally likely.

    Args:
        count: Number of examples.
        seed: An int64 scalar that decides the order; `None` for the order in which they are stored.

    Returns:
        int64 of shape (count,), each of 0..count-1 once.
    """
    if seed is None:
        return tf.range(count, dtype=tf.int64)
    key = tf.stack([seed, tf.zeros([], tf.int64)])
    drawn = tf.random.stateless_uniform([count], key, minval=None, maxval=None, dtype=tf.int64)
    return tf.cast(tf.argsort(drawn, stable=True), tf.int64)


class ArrayPart(Part):
    """Examples in an array.

    Args:
        x: Inputs, of shape (count, ...); may be a memory map, which is then read batch by batch.
        labels: Integers of shape (count,).

    Raises:
        ValueError: if there is not one integer label for each example.
    """

    def __init__(self, x: np.ndarray, labels: np.ndarray) -> None:
        labels = np.asarray(labels)
        if labels.shape != (len(x),) or not (np.issubdtype(labels.dtype, np.integer) or not labels.size):
            raise ValueError(
                f"Each example has one integer label. Received {len(x)} examples and labels of shape {labels.shape}, "
                f"dtype {labels.dtype}."
            )
        self.x = x
        self.labels = labels.astype("int32")
        stays = isinstance(x, np.memmap) or x.nbytes > _IN_MEMORY
        # Made here, outside of any pipeline, so that no graph carries a copy; and where pipelines run.
        with tf.device("CPU:0"):
            self._labels = tf.constant(self.labels)
            self._x = None if stays else tf.constant(x)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        prepare: Prepare | None = None,
        seed: tf.Tensor | None = None,
        drop_remainder: bool = False,
        own: range | None = None,
    ) -> tf.data.Dataset:
        in_order = order(len(self), seed)

        def take(places: tf.Tensor, own: range | None = None) -> tuple[tf.Tensor, tf.Tensor]:
            numbers = tf.gather(in_order, places)
            x = self._take(numbers) if own is None or self._x is not None else self._take_own(numbers, own)
            return x, tf.gather(self._labels, numbers)

        places = tf.data.Dataset.range(len(self))
        if prepare is None:  # whole batches at once, which is many times faster
            return places.batch(batch_size, drop_remainder=drop_remainder).map(
                lambda places: take(places, own), num_parallel_calls=tf.data.AUTOTUNE
            )

        def take_one(place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x, labels = take(place[tf.newaxis])
            return prepare(x[0], place), labels[0]

        return batched(places, take_one, batch_size, drop_remainder, own)

    def _take(self, numbers: tf.Tensor) -> tf.Tensor:
        if self._x is not None:
            return tf.gather(self._x, numbers)
        x = tf.numpy_function(lambda chosen: self.x[chosen], [numbers], self.x.dtype, stateful=False)
        return tf.ensure_shape(x, (numbers.shape[0], *self.x.shape[1:]))

    def _take_own(self, numbers: tf.Tensor, own: range) -> tf.Tensor:
        """Of a batch from the memory map the inputs at its own places, and zeros."""
        x = self._take(numbers[own.start : own.stop])
        before = tf.minimum(own.start, tf.size(numbers))
        zeros = [[before, tf.size(numbers) - before - tf.shape(x)[0]], *[[0, 0]] * (x.shape.rank - 1)]
        return tf.ensure_shape(tf.pad(x, zeros), (numbers.shape[0], *self.x.shape[1:]))


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set in three parts.

    Args:
        name: Its name.
        train: What training sees.
        validation: What choices see, cut from the training part; may be empty.
        test: What nothing sees but the final evaluation; may be empty.
        classes: Number of classes.
        input_shape: Shape of one input: (height, width, channels), or (time, ...) for event frames.
        mean: Mean of each channel, which is subtracted; in the unit of the stored inputs. One number stands for all
            channels.
        std: Standard deviation of each channel, by which is divided; likewise.
        class_names: Names of the classes, by label.
        resize: For images of several sizes, the length to which the shorter side is brought before the central crop of
            evaluation; `None` where all have `input_shape`.

    Raises:
        ValueError: if there is nothing to train on, a label is not in 0..classes-1, or names or statistics do not fit
            classes or channels.
    """

    name: str
    train: Part
    validation: Part
    test: Part
    classes: int
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    resize: int | None = None

    def __post_init__(self) -> None:
        if not len(self.train):
            raise ValueError(f"The training part of {self.name!r} has no examples.")
        if len(self.class_names) != self.classes:
            raise ValueError(
                f"Each class has a name. Received {self.classes} classes and {len(self.class_names)} names."
            )
        channels = self.input_shape[-1]
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, channels):
                raise ValueError(
                    f"{name} has one number, or one for each of the {channels} channels. "
                    f"Received {name}={getattr(self, name)!r}."
                )
        if not min(self.std) > 0:
            raise ValueError(f"A standard deviation is above 0. Received std={self.std!r}.")
        for name in ("train", "validation", "test"):
            labels = getattr(self, name).labels
            if labels is not None and labels.size and not 0 <= labels.min() <= labels.max() < self.classes:
                raise ValueError(
                    f"Labels are in 0..{self.classes - 1}. "
                    f"Those of {self.name!r}, part {name}, are in {labels.min()}..{labels.max()}."
                )

    def with_training_examples(self, count: int) -> DataSet:
        """The same data set with fewer training examples, with equal parts of each class; the same ones each time.

        Args:
            count: How many.

        Raises:
            ValueError: if there are not so many, a class would be left out, or the training part is not an array.
        """
        if not isinstance(self.train, ArrayPart):
            raise ValueError(
                f"A part of the training examples can be chosen only where they are in one array, and those of "
                f"{self.name!r} are not. Leave train_examples out. Received train_examples={count!r}."
            )
        if count == len(self.train):
            return self
        _, chosen = split(self.train.labels, count, "smaller training")
        return dataclasses.replace(self, train=ArrayPart(self.train.x[chosen], self.train.labels[chosen]))

    def standardize(self, x: tf.Tensor) -> tf.Tensor:
        """Stored inputs as float32, with mean 0 and standard deviation 1 a channel."""
        return (tf.cast(x, tf.float32) - tf.constant(self.mean, tf.float32)) / tf.constant(self.std, tf.float32)

    def training_batches(
        self,
        batch_size: int,
        *,
        seed: int,
        augmentation: Augmentation | None = None,
        epochs: int = 1,
        first_epoch: int = 0,
        own: range | None = None,
    ) -> tf.data.Dataset:
        """Batches for training, in another order each epoch, one epoch after another.

        What does not fill a batch waits for another epoch.

        Args:
            batch_size: Examples in a batch.
            seed: Seed of order and augmentation. An epoch's batches depend on it and the epoch's number alone.
            augmentation: Random changes, drawn anew for each example and epoch; `None` for none. Images of several
                sizes get the central crop of evaluation if "resized_crop" is not among them.
            epochs: How many epochs the run has in all.
            first_epoch: The number of the epoch to begin with, from 0: where a resumed run goes on.
            own: The places of each batch that this process uses, where several share it
                (`keras_dsr.distribution.base.Strategy.own`): nothing is decoded or read from a memory map for others,
                which hold anything. `None` for all.

        Returns:
            Pairs of standardised inputs (batch_size, ...), float32, and labels (batch_size,), int32:
            `self.steps(batch_size)` of them an epoch.

        Raises:
            ValueError: if the batch size is not in 1..number of training examples, the first epoch is not in 0..epochs,
                own places are not some of the batch's, or the augmentation does not work on inputs of this shape.
        """
        self.steps(batch_size)
        _check_own(own, batch_size)
        if not 0 <= first_epoch <= epochs:
            raise ValueError(
                f"first_epoch is from 0 to the {epochs} epochs of the run. Received first_epoch={first_epoch!r}."
            )
        augmentation = augmentation or Augmentation()
        augmentation.check(self.input_shape)
        seed = tf.constant(seed, tf.int64)

        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            # Keys of examples and of batches: each epoch has its own range of numbers.
            def prepare(x: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
                return augmentation.each(x, tf.stack([seed, epoch * 2**32 + place]), self.input_shape, self.resize)

            def finish(number: tf.Tensor, batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
                x, labels = batch
                return self._finish(augmentation.batch(x, tf.stack([~seed, epoch * 2**32 + number]), self.mean), labels)

            one_by_one = self.resize is not None or augmentation.works_on_each
            batches = self.train.batches(
                batch_size,
                prepare if one_by_one else None,
                # The factor keeps the orders of neighbouring seeds apart.
                seed * 1_000_003 + epoch,
                drop_remainder=True,
                own=own,
            )
            return batches.enumerate().map(finish, num_parallel_calls=tf.data.AUTOTUNE)

        return tf.data.Dataset.range(first_epoch, epochs).flat_map(one_epoch).prefetch(tf.data.AUTOTUNE)

    def steps(self, batch_size: int) -> int:
        """Number of training batches in an epoch.

        Raises:
            ValueError: if the batch size is not in 1..number of training examples.
        """
        if not 1 <= batch_size <= len(self.train):
            raise ValueError(
                f"batch_size must be from 1 to the {len(self.train)} training examples. "
                f"Received batch_size={batch_size!r}."
            )
        return len(self.train) // batch_size

    def batches(
        self, part: Part, batch_size: int, seed: int | None = None, own: range | None = None
    ) -> tf.data.Dataset:
        """Batches of a part as they are stored, for evaluation; the last may be smaller.

        Args:
            part: `validation`, `test`, or `train` without augmentation.
            batch_size: Examples in a batch.
            seed: Decides another order, such that the first batches are a sample of all; `None` for the order in which
                the examples are stored, often class by class.
            own: As in `training_batches`.

        Returns:
            Pairs of standardised inputs (batch, ...), float32, and labels (batch,), int32.

        Raises:
            ValueError: if the batch size is not 1 or more, or own places are not some of the batch's.
        """
        stored = self.stored_batches(part, batch_size, seed, own)
        return stored.map(self._finish, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    def stored_batches(
        self, part: Part, batch_size: int, seed: int | None = None, own: range | None = None
    ) -> tf.data.Dataset:
        """Batches as they are stored, without standardisation: what a client of a served network has.

        Args:
            part: `validation`, `test`, or `train` without augmentation.
            batch_size: Examples in a batch.
            seed: As in `batches`.
            own: As in `training_batches`.

        Returns:
            Pairs of inputs (batch, ...), in the dtype in which they are stored, and labels (batch,), int32.

        Raises:
            ValueError: if the batch size is not 1 or more, or own places are not some of the batch's.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more. Received batch_size={batch_size!r}.")
        _check_own(own, batch_size)

        def prepare(x: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
            return Augmentation().each(x, tf.zeros([2], tf.int64), self.input_shape, self.resize)

        def shaped(x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return tf.ensure_shape(x, (x.shape[0], *self.input_shape)), tf.cast(labels, tf.int32)

        key = None if seed is None else tf.constant(seed, tf.int64)
        return part.batches(batch_size, None if self.resize is None else prepare, key, own=own).map(shaped)

    def _finish(self, x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = tf.ensure_shape(x, (x.shape[0], *self.input_shape))
        return self.standardize(x), tf.cast(labels, tf.int32)


def _check_own(own: range | None, batch_size: int) -> None:
    if own is not None and not (own.step == 1 and 0 <= own.start < own.stop <= batch_size):
        raise ValueError(
            f"own places are a range within those of a batch, 0..{batch_size - 1}, such as "
            f"devices.own({batch_size}) gives for that size. Received own={own!r}."
        )


def padded(batches: tf.data.Dataset, count: int, batch_size: int) -> tf.data.Dataset:
    """Batches of one size, with weights such that losses and accuracies over all of them are those of the examples.

    The last batch is filled up with its last example, whose copies weigh nothing.

    Args:
        batches: Pairs of inputs and labels, of at most `batch_size` examples.
        count: Examples in all of them.
        batch_size: Examples in each batch that comes out.

    Returns:
        Triples of inputs, labels and weights.
    """
    # Keras divides the sum of weighted losses by the number of examples, those of no weight included.
    weight = math.ceil(count / batch_size) * batch_size / count

    def fill(x: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        size = tf.shape(x)[0]
        numbers = tf.minimum(tf.range(batch_size), size - 1)
        weights = tf.where(tf.range(batch_size) < size, weight, 0.0)
        return tf.gather(x, numbers), tf.gather(labels, numbers), weights

    return batches.map(fill, num_parallel_calls=tf.data.AUTOTUNE)


def split(labels: np.ndarray, size: int, what: str = "validation") -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples, cut in two with equal parts of each class; the same cut each time.

    Args:
        labels: Integers of shape (count,).
        size: Number of examples in the second part; 0 for none.
        what: What the second part is for, for the error.

    Returns:
        The numbers of the first part and of the second.

    Raises:
        ValueError: if a part would have fewer examples than there are classes.
    """
    if size == 0:
        return np.arange(len(labels)), np.arange(0)
    classes = len(np.unique(labels))
    if not classes <= size <= len(labels) - classes:
        raise ValueError(
            f"The {what} part must have at least one example of each of the {classes} classes and leave as many. "
            f"Received {size} of {len(labels)} examples."
        )
    first, second = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=size, stratify=labels, random_state=0
    )
    return first, second


def missing(name: str, looked: Sequence[Path | str], how: str) -> FileNotFoundError:
    """The error for a data set that is not there: where it was looked for, and how to get it."""
    places = ", ".join(str(place) for place in looked)
    return FileNotFoundError(f"The data set {name!r} is not at {places}. {how}")

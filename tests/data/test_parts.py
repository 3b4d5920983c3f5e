"""Parts of a data set, and batches whose order depends on the seed and the epoch alone."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from keras_dsr.data.augmentation import Augmentation
from keras_dsr.data.parts import ArrayPart, DataSet, order, split

COUNT = 50


def numbered(count=COUNT, size=6):
    """Images whose levels say which they are, and whose labels are 0, 1, 2, 0, ..."""
    x = np.zeros((count, size, size, 1), "uint8") + np.arange(count, dtype="uint8")[:, None, None, None]
    return ArrayPart(x, np.arange(count) % 3)


def data_set(train=None, **settings):
    defaults = {
        "name": "numbered",
        "train": numbered() if train is None else train,
        "validation": numbered(10),
        "test": numbered(7),
        "classes": 3,
        "input_shape": (6, 6, 1),
        "mean": (0.0,),
        "std": (1.0,),
        "class_names": ("a", "b", "c"),
    }
    return DataSet(**{**defaults, **settings})


def as_arrays(batches):
    return [(x.numpy(), labels.numpy()) for x, labels in batches]


def numbers(batches):
    """Which examples, from images that say so."""
    return np.concatenate([x.numpy()[:, 0, 0, 0] for x, _ in batches]).astype(int).tolist()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for (x, labels), (other, other_labels) in zip(batches, others, strict=True):
        np.testing.assert_array_equal(x, other)
        np.testing.assert_array_equal(labels, other_labels)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 4097])
def test_an_order_has_each_number_once(count):
    np.testing.assert_array_equal(order(count, None), np.arange(count))
    drawn = order(count, tf.constant(7, tf.int64))
    assert (drawn.shape, drawn.dtype) == ((count,), tf.int64)
    assert sorted(drawn.numpy().tolist()) == list(range(count))


def test_all_orders_are_equally_likely():
    counts = collections.Counter(tuple(order(4, tf.constant(seed, tf.int64)).numpy()) for seed in range(2400))
    assert len(counts) == 24
    # Chi-square of 23 degrees of freedom: above 50 in one of a thousand.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 50


def test_batches_of_a_part_are_in_the_order_in_which_they_are_stored():
    batches = as_arrays(numbered().batches(20))
    assert [len(labels) for _, labels in batches] == [20, 20, 10]
    assert [x.dtype for x, _ in batches] == ["uint8"] * 3
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), numbered().x)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), np.arange(COUNT) % 3)
    assert len(as_arrays(numbered().batches(20, drop_remainder=True))) == 2


def test_an_empty_part_has_no_batches():
    empty = ArrayPart(np.zeros((0, 6, 6, 1), "uint8"), [])
    assert len(empty) == 0
    assert as_arrays(empty.batches(4)) == []
    assert as_arrays(data_set().batches(empty, 4)) == []


def test_each_input_is_prepared_with_its_place():
    seed = tf.constant(3, tf.int64)
    plain = as_arrays(numbered().batches(20, None, seed))
    prepared = as_arrays(numbered().batches(20, lambda x, place: tf.cast(x, tf.int64) + 100 * place, seed))
    places = np.arange(COUNT).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(
        np.concatenate([x for x, _ in prepared]), np.concatenate([x for x, _ in plain]) + 100 * places
    )
    for (_, labels), (_, expected) in zip(prepared, plain, strict=True):
        np.testing.assert_array_equal(labels, expected)


def test_a_memory_map_gives_the_batches_of_an_array(tmp_path):
    part = numbered()
    np.save(tmp_path / "x.npy", part.x)
    mapped = ArrayPart(np.load(tmp_path / "x.npy", mmap_mode="r"), part.labels)
    augmentation = Augmentation(("crop", "flip"), padding=1)
    batches = data_set(part).training_batches(8, seed=0, augmentation=augmentation)
    from_map = data_set(mapped).training_batches(8, seed=0, augmentation=augmentation)
    assert from_map.element_spec == batches.element_spec
    assert_same(as_arrays(from_map), as_arrays(batches))
    assert_same(as_arrays(data_set().batches(mapped, 8)), as_arrays(data_set().batches(part, 8)))


@pytest.mark.parametrize("changes", [("flip",), ("resized_crop",)])
def test_a_process_gets_its_own_places_of_a_memory_map_and_zeros(tmp_path, changes):
    np.save(tmp_path / "x.npy", numbered().x + 1)
    mapped = ArrayPart(np.load(tmp_path / "x.npy", mmap_mode="r"), numbered().labels)
    data = data_set(mapped)

    def training(own=None):
        return as_arrays(data.training_batches(8, seed=0, augmentation=Augmentation(changes), own=own))

    for whole, shares in (
        (training(), [training(range(3)), training(range(3, 8))]),
        (
            as_arrays(data.batches(mapped, 8)),  # the last has 2
            [as_arrays(data.batches(mapped, 8, own=own)) for own in (range(3), range(3, 8))],
        ),
    ):
        assert len(whole) == len(shares[0]) == len(shares[1])
        for (x, labels), (first, first_labels), (second, second_labels) in zip(whole, *shares, strict=True):
            assert len(first) == len(second) == len(x)
            np.testing.assert_array_equal(np.concatenate([first[:3], second[3:]]), x)
            np.testing.assert_array_equal(np.concatenate([first_labels[:3], second_labels[3:]]), labels)
            for elsewhere in (first[3:], second[:3]):
                assert not len(elsewhere) or not np.ptp(elsewhere)  # a zero, standardised


@pytest.mark.parametrize("changes", [(), ("resized_crop",)])
def test_an_epoch_has_each_example_once_with_its_label(changes):
    data = data_set(numbered(48))
    batches = as_arrays(data.training_batches(8, seed=0, epochs=2, augmentation=Augmentation(changes)))
    assert data.steps(8) == 6
    assert len(batches) == 12
    for epoch in (batches[:6], batches[6:]):
        x = np.concatenate([x[:, 0, 0, 0] for x, _ in epoch]).astype(int)
        assert sorted(x.tolist()) == list(range(48))
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in epoch]), x % 3)


def test_what_does_not_fill_a_batch_is_another_example_each_epoch():
    data = data_set(numbered(10))
    left = set()
    for epoch in range(20):
        seen = numbers(data.training_batches(9, seed=0, first_epoch=epoch, epochs=epoch + 1))
        assert len(set(seen)) == 9
        left |= set(range(10)) - set(seen)
    assert len(left) > 5


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    data = data_set()
    orders = {}
    for seed in range(4):
        whole = numbers(data.training_batches(10, seed=seed, epochs=4))
        for epoch in range(4):
            orders[seed, epoch] = tuple(whole[50 * epoch : 50 * (epoch + 1)])
    assert len(set(orders.values())) == 16
    tf.random.set_seed(123)
    np.random.seed(123)  # noqa: NPY002
    other_process = dataclasses.replace(data, train=numbered())
    assert tuple(numbers(other_process.training_batches(10, seed=2, first_epoch=3, epochs=4))) == orders[2, 3]


@pytest.mark.parametrize("changes", [("crop", "flip", "cutout"), ("resized_crop", "flip")])
def test_a_resumed_run_sees_the_batches_of_an_unbroken_one(changes):
    augmentation = Augmentation(changes, padding=2, cutout=2)
    noise = np.random.default_rng(0).integers(0, 255, (COUNT, 6, 6, 1)).astype("uint8")
    data = data_set(ArrayPart(noise, np.arange(COUNT) % 3))
    unbroken = as_arrays(data.training_batches(8, seed=5, epochs=4, augmentation=augmentation))
    for first_epoch in (0, 1, 3, 4):
        tf.random.set_seed(first_epoch)
        resumed = data.training_batches(8, seed=5, epochs=4, augmentation=augmentation, first_epoch=first_epoch)
        assert_same(as_arrays(resumed), unbroken[6 * first_epoch :])
        assert_same(as_arrays(resumed), unbroken[6 * first_epoch :])


def test_changes_are_drawn_anew_for_each_example_and_epoch():
    same = np.zeros((COUNT, 6, 6, 1), "uint8")
    same[:, 2, 3] = 200
    data = data_set(ArrayPart(same, np.zeros(COUNT)[:].astype(int)))
    augmentation = Augmentation(("crop",), padding=2)
    batches = as_arrays(data.training_batches(25, seed=0, epochs=3, augmentation=augmentation))
    places = [[int(one.argmax()) for one in x] for x, _ in batches]
    assert len({tuple(batch) for batch in places}) == 6
    assert all(len(set(batch)) > 10 for batch in places)


def test_evaluation_sees_inputs_as_they_are_standardised():
    data = data_set(mean=(3.0,), std=(2.0,))
    batches = as_arrays(data.batches(data.test, 5))
    assert [len(labels) for _, labels in batches] == [5, 2]
    x, labels = batches[0]
    assert (x.dtype, labels.dtype) == ("float32", "int32")
    np.testing.assert_array_equal(x[:, 0, 0, 0], (np.arange(5) - 3) / 2)
    train = as_arrays(data.training_batches(50, seed=0))[0][0]
    np.testing.assert_allclose(np.sort(train[:, 0, 0, 0]), (np.arange(50) - 3) / 2)


def test_batches_as_they_are_stored_are_those_of_evaluation_before_they_are_standardised():
    data = data_set(mean=(3.0,), std=(2.0,))
    stored = as_arrays(data.stored_batches(data.test, 5, seed=1))
    assert [(x.dtype, labels.dtype) for x, labels in stored] == [("uint8", "int32")] * 2
    assert_same(
        [((x.astype("float32") - 3) / 2, labels) for x, labels in stored], as_arrays(data.batches(data.test, 5, 1))
    )


def test_batches_have_static_shapes():
    data = data_set()
    x, labels = data.training_batches(8, seed=0).element_spec
    assert (x.shape, x.dtype) == ((8, 6, 6, 1), tf.float32)
    assert (labels.shape, labels.dtype) == ((8,), tf.int32)
    assert data.batches(data.test, 8).element_spec[0].shape.as_list() == [None, 6, 6, 1]


def test_splits_are_disjoint_complete_stratified_and_the_same_each_time():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 40))
    rest, held_out = split(labels, 50)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held_out])), np.arange(200))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), [10] * 5)
    for part, again in zip((rest, held_out), split(labels, 50), strict=True):
        np.testing.assert_array_equal(part, again)
    rest, nothing = split(labels, 0)
    assert (len(rest), len(nothing)) == (200, 0)


@pytest.mark.parametrize("size", [4, 196, 200, -1])
def test_splits_without_a_class_are_refused(size):
    labels = np.repeat(np.arange(5), 40)
    with pytest.raises(ValueError, match=rf"validation part .* each of the 5 classes .* Received {size} of 200"):
        split(labels, size)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(4, int), r"Received 5 examples and labels of shape \(4,\)"),
        (np.zeros((5, 2), int), r"labels of shape \(5, 2\)"),
        (np.zeros(5), "dtype float64"),
    ],
)
def test_arrays_without_a_label_for_each_example_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        ArrayPart(np.zeros((5, 6, 6, 1), "uint8"), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"classes": 2, "class_names": ("a", "b")},
            r"Labels are in 0..1. Those of 'numbered', part train, are in 0..2",
        ),
        (
            {"test": ArrayPart(np.zeros((2, 6, 6, 1)), np.array([0, -1]))},
            r"Labels are in 0..2. .* part test, are in -1..0",
        ),
        ({"class_names": ("a", "b")}, "Received 3 classes and 2 names"),
        ({"mean": (0.0, 0.0)}, r"mean has one number, or one for each of the 1 channels. Received mean=\(0.0, 0.0\)"),
        ({"std": (0.0,)}, r"above 0. Received std=\(0.0,\)"),
        ({"train": numbered(0)}, "'numbered' has no examples"),
    ],
)
def test_data_sets_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        data_set(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to the 50 training examples. Received batch_size=0"),
        ({"batch_size": 51}, "Received batch_size=51"),
        ({"batch_size": 8, "first_epoch": -1}, "first_epoch is from 0 to the 1 epochs of the run"),
        ({"batch_size": 8, "epochs": 3, "first_epoch": 4}, "Received first_epoch=4"),
        ({"batch_size": 8, "augmentation": Augmentation(("autoaugment",))}, "'autoaugment' works on colour images"),
        ({"batch_size": 8, "own": range(8, 12)}, r"a batch, 0\.\.7, .* Received own=range\(8, 12\)"),
        ({"batch_size": 8, "own": range(0, 8, 2)}, r"Received own=range\(0, 8, 2\)"),
        ({"batch_size": 8, "own": range(4, 4)}, r"Received own=range\(4, 4\)"),
    ],
)
def test_bad_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data_set().training_batches(seed=0, **arguments)


def test_bad_evaluation_batches_are_refused():
    data = data_set()
    with pytest.raises(ValueError, match=r"1 or more\. Received batch_size=0"):
        data.batches(data.test, 0)
    with pytest.raises(ValueError, match=r"Received own=range\(0, 9\)"):
        data.batches(data.test, 8, own=range(9))


def test_inputs_of_another_shape_than_the_data_set_says_are_refused():
    with pytest.raises(ValueError, match=r"must be equal, but are 5 and 6"):
        data_set(input_shape=(5, 6, 1)).training_batches(8, seed=0)

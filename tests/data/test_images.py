"""The digits, their three parts, and the batches made of them."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.datasets

from keras_dsr.data import images


@pytest.fixture(scope="module")
def digits():
    return images.digits()


def test_the_parts_are_disjoint_and_complete(digits):
    raw = sklearn.datasets.load_digits().images
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1293, 144, 360]
    everything = np.concatenate([part.images[..., 0] for part in parts])
    deviation = raw.std() / everything.std()
    restored = np.round(everything * deviation + raw.mean() - everything.mean() * deviation).astype(int)
    assert sorted(map(bytes, restored.astype("uint8"))) == sorted(map(bytes, raw.astype("uint8")))


def test_the_parts_are_the_same_each_time_and_hold_all_classes(digits):
    again = images.digits()
    np.testing.assert_array_equal(digits.test.images, again.test.images)
    for part in (digits.train, digits.validation, digits.test):
        counts = np.bincount(part.labels, minlength=10)
        assert counts.min() > 0.8 * counts.max()


def test_statistics_come_from_the_training_part(digits):
    assert digits.train.images.mean() == pytest.approx(0, abs=1e-5)
    assert digits.train.images.std() == pytest.approx(1, abs=1e-5)
    assert digits.input_shape == (8, 8, 1)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"one of \['digits'\]. Received 'mnist'"):
        images.load("mnist")


def as_arrays(batches):
    pairs = [(x.numpy(), y.numpy()) for x, y in batches]
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def test_batches_hold_each_image_once_with_its_label(digits):
    part = images.Part(digits.train.images[:40], digits.train.labels[:40])
    x, y = as_arrays(images.training_batches(part, 10, seed=0))
    expected = sorted(zip(map(bytes, part.images), part.labels, strict=True))
    assert sorted(zip(map(bytes, x), y, strict=True)) == expected


def test_order_depends_on_the_seed_and_the_epoch(digits):
    part = images.Part(digits.train.images[:40], digits.train.labels[:40])
    batches = images.training_batches(part, 10, seed=0)
    first, second = as_arrays(batches)[0], as_arrays(batches)[0]
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, as_arrays(images.training_batches(part, 10, seed=0))[0])
    assert not np.array_equal(first, as_arrays(images.training_batches(part, 10, seed=1))[0])


def test_shifts_move_an_image_by_at_most_so_many_pixels():
    image = np.zeros((1, 8, 8, 1), "float32")
    image[0, 4, 4, 0] = 1.0
    part = images.Part(np.repeat(image, 64, axis=0), np.arange(64))
    x, _ = as_arrays(images.training_batches(part, 64, seed=0, shift=1))
    places = {tuple(np.argwhere(one[..., 0] == 1.0)[0]) for one in x}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert x.sum() == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be from 1 to the 40 images. Received batch_size=0"),
        ({"batch_size": 41}, "Received batch_size=41"),
        ({"batch_size": 8, "shift": -1}, "Received shift=-1"),
    ],
)
def test_bad_batches_are_refused(digits, arguments, message):
    part = images.Part(digits.train.images[:40], digits.train.labels[:40])
    with pytest.raises(ValueError, match=message):
        images.training_batches(part, seed=0, **arguments)

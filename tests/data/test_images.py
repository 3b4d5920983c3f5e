"""Digits, CIFAR, ImageNet and folders of images: what is in their parts, and what is refused."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import tensorflow as tf
from PIL import Image

from keras_dsr import data
from keras_dsr.data import images
from keras_dsr.data.augmentation import Augmentation


def as_arrays(batches):
    return [(x.numpy(), labels.numpy()) for x, labels in batches]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for (x, labels), (other, other_labels) in zip(batches, others, strict=True):
        np.testing.assert_array_equal(x, other)
        np.testing.assert_array_equal(labels, other_labels)


# Digits


def test_the_digits_are_disjoint_and_complete():
    digits = images.digits()
    raw = sklearn.datasets.load_digits()
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1293, 144, 360]
    found = [(x.tobytes(), int(label)) for part in parts for x, label in zip(part.x, part.labels, strict=True)]
    assert sorted(found) == sorted(
        (x.astype("uint8").tobytes(), int(label)) for x, label in zip(raw.images, raw.target, strict=True)
    )


def test_the_digits_parts_are_the_same_each_time_and_hold_all_classes():
    digits, again = images.digits(), images.digits()
    for name in ("train", "validation", "test"):
        part = getattr(digits, name)
        np.testing.assert_array_equal(part.x, getattr(again, name).x)
        counts = np.bincount(part.labels, minlength=10)
        assert counts.min() > 0.8 * counts.max()


def test_the_digits_statistics_come_from_the_training_part():
    digits = images.digits()
    x = digits.standardize(tf.constant(digits.train.x)).numpy()
    assert x.mean() == pytest.approx(0, abs=1e-5)
    assert x.std() == pytest.approx(1, abs=1e-5)
    assert digits.input_shape == (8, 8, 1)


# CIFAR


@pytest.fixture(scope="module")
def cifar_dir(unpacked):
    pytest.importorskip("tensorflow_datasets")
    prepared = os.environ.get("KERAS_DSR_DATA")
    if prepared and (Path(prepared) / "cifar10").is_dir():
        return Path(prepared)
    return unpacked("cifar10", "--to", "tfds")


def test_cifar_is_the_official_one(cifar_dir):
    cifar = images.cifar("cifar10", cifar_dir, validation=0.1)
    assert [len(part) for part in (cifar.train, cifar.validation, cifar.test)] == [45_000, 5_000, 10_000]
    assert cifar.class_names == (
        *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
    assert (cifar.classes, cifar.input_shape, cifar.resize) == (10, (32, 32, 3), None)
    for part, count in ((cifar.train, 4500), (cifar.validation, 500), (cifar.test, 1000)):
        assert part.x.dtype == "uint8"
        np.testing.assert_array_equal(np.bincount(part.labels), [count] * 10)
    # The published statistics are of all 50,000 training images; and their images, not ours, are in the test part.
    training = np.concatenate([cifar.train.x, cifar.validation.x])
    np.testing.assert_allclose(training.mean((0, 1, 2)) / 255, [0.49140, 0.48216, 0.44653], atol=1e-4)
    np.testing.assert_allclose(cifar.mean, training.mean((0, 1, 2)), atol=0.1)
    test = {one.tobytes() for one in cifar.test.x}
    assert len(test) == 10_000
    assert not test & {one.tobytes() for one in training}


@pytest.mark.parametrize("validation", [-1, 10.5, 9, 49_991, 60_000])
def test_validation_that_cannot_be_cut_from_cifar_is_refused(cifar_dir, validation):
    with pytest.raises(ValueError, match=f"Received validation={validation}"):
        images.cifar("cifar10", cifar_dir, validation=validation)


def test_cifar_that_is_not_there_says_how_to_get_it(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(FileNotFoundError, match=rf"'cifar100' is not at {tmp_path}.*160 MB.*download=True.*--data-dir"):
        images.cifar("cifar100", tmp_path)
    with pytest.raises(ValueError, match=r"one of .*'cifar10', 'cifar100'.* Received name='cifar'"):
        images.cifar("cifar", tmp_path)


def test_without_tensorflow_datasets_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-dsr\[data\]'"):
        images.cifar("cifar10")


# ImageNet: files in its format, with 40 training images in 5 files and 12 test images in 2


def photograph(number):
    """An image of its own size whose colour says which it is."""
    height, width = 230 + number % 7 * 10, 260 + number % 5 * 20
    return np.full((height, width, 3), [5 * number, 200 - 3 * number, 100], "uint8")


def which(x, of):
    """Which photographs standardised inputs are."""
    middle = x[:, 112, 112, 0] * of.std[0] + of.mean[0]
    return np.round(middle / 5).astype(int)


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core import registered

    folder = tmp_path_factory.mktemp("imagenet")
    names = tfds.builder("imagenet2012", data_dir=folder).info.features["label"].names
    with registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            name = "imagenet2012"
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=names),
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, _):
                return {"train": self._generate_examples(range(40)), "validation": self._generate_examples(range(12))}

            def _generate_examples(self, numbers):
                for number in numbers:
                    example = {"image": photograph(number), "label": 20 * number, "file_name": f"{number}.JPEG"}
                    yield number, example

    settings = tfds.download.DownloadConfig(num_shards=5)
    Imagenet2012(data_dir=folder).download_and_prepare(download_config=settings)
    return folder


def test_imagenets_parts_are_whole_files(imagenet_dir):
    imagenet = images.imagenet(imagenet_dir, validation=10)
    lengths = imagenet.train.lengths + imagenet.validation.lengths
    assert (len(imagenet.train.files), len(imagenet.validation.files)) == (3, 2)
    assert (len(imagenet.train), len(imagenet.validation), len(imagenet.test)) == (
        sum(lengths[:3]),
        sum(lengths[3:]),
        12,
    )
    for number, file in zip(("00003-of-00005", "00004-of-00005"), imagenet.validation.files, strict=True):
        assert file.endswith(number)
    assert (imagenet.classes, imagenet.input_shape, imagenet.resize) == (1000, (224, 224, 3), 256)
    assert imagenet.class_names[0] == "n01440764"
    np.testing.assert_allclose(imagenet.mean, [123.675, 116.28, 103.53])
    np.testing.assert_allclose(imagenet.std, [58.395, 57.12, 57.375])
    seen = {}
    for part in ("train", "validation", "test"):
        batches = as_arrays(imagenet.batches(getattr(imagenet, part), 8))
        found = np.concatenate([which(x, imagenet) for x, _ in batches])
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), 20 * found)
        assert len(set(found)) == len(found) == len(getattr(imagenet, part))
        seen[part] = set(found)
    assert seen["train"] | seen["validation"] == set(range(40))
    assert seen["test"] == set(range(12))


@pytest.mark.parametrize("changes", [("resized_crop", "flip"), ("flip",)])
def test_imagenets_order_depends_on_the_seed_and_the_epoch_alone(imagenet_dir, changes, monkeypatch):
    # So that the buffer does not hold all that there is.
    monkeypatch.setattr(images, "_WAITING", 6)
    monkeypatch.setattr(images, "_INTERLEAVED", 2)
    imagenet = images.imagenet(imagenet_dir, validation=0)
    settings = {"augmentation": Augmentation(changes), "seed": 3, "epochs": 3}
    unbroken = as_arrays(imagenet.training_batches(10, **settings))
    assert len(unbroken) == 12
    orders = []
    for epoch in (unbroken[:4], unbroken[4:8], unbroken[8:]):
        orders.append(tuple(np.concatenate([which(x, imagenet) for x, _ in epoch])))
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in epoch]), 20 * np.array(orders[-1]))
        assert sorted(orders[-1]) == list(range(40))
    assert len(set(orders)) == 3
    for first_epoch in (1, 2):
        tf.random.set_seed(first_epoch)
        again = images.imagenet(imagenet_dir, validation=0)
        assert_same(
            as_arrays(again.training_batches(10, first_epoch=first_epoch, **settings)), unbroken[4 * first_epoch :]
        )
    other = as_arrays(imagenet.training_batches(10, **{**settings, "seed": 4, "epochs": 1}))
    assert tuple(np.concatenate([which(x, imagenet) for x, _ in other])) not in orders


@pytest.mark.parametrize("changes", [("resized_crop", "flip"), ("flip",)])
def test_of_imagenet_a_process_decodes_its_own_places_alone(imagenet_dir, changes):
    imagenet = images.imagenet(imagenet_dir, validation=0)
    own = range(3, 7)
    decoded = []
    parse = imagenet.train._parse

    def counted(record):
        tf.numpy_function(lambda: decoded.append(1), [], [])
        return parse(record)

    settings = {"augmentation": Augmentation(changes), "seed": 3, "epochs": 2}
    whole = as_arrays(imagenet.training_batches(10, **settings))
    imagenet.train._parse = counted
    shared = as_arrays(imagenet.training_batches(10, own=own, **settings))
    assert len(decoded) == len(own) * len(whole) == 32
    for (x, labels), (own_x, own_labels) in zip(whole, shared, strict=True):
        assert own_x.shape == x.shape
        np.testing.assert_array_equal(own_x[3:7], x[3:7])
        np.testing.assert_array_equal(own_labels, np.where(np.isin(range(10), own), labels, 0))

    whole = as_arrays(imagenet.batches(imagenet.test, 10))
    shared = as_arrays(imagenet.batches(imagenet.test, 10, own=range(1, 3)))
    assert [len(x) for x, _ in shared] == [10, 2]
    np.testing.assert_array_equal(shared[0][0][1:3], whole[0][0][1:3])
    np.testing.assert_array_equal(shared[1][0][1:], whole[1][0][1:])
    assert list(shared[0][1]) == [0, *whole[0][1][1:3], *[0] * 7]
    assert list(shared[1][1]) == [0, whole[1][1][1]]


def test_bad_imagenets_are_refused(imagenet_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_img_train.tar \(138 GB\) .* by hand"):
        images.imagenet(tmp_path)
    with pytest.raises(ValueError, match=r"whole files and leaves at least one\. Received validation=35 of 40"):
        images.imagenet(imagenet_dir, validation=35)
    with pytest.raises(ValueError, match="Received validation=-1"):
        images.imagenet(imagenet_dir, validation=-1)
    with pytest.raises(ValueError, match="Received validation=10000 of 40 examples in 5 files"):
        images.imagenet(imagenet_dir)
    version = next((imagenet_dir / "imagenet2012").iterdir())
    copy = tmp_path / "imagenet2012" / version.name
    copy.mkdir(parents=True)
    for file in version.iterdir():
        if "00002-of" not in file.name:
            (copy / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files of 'train', such as .*00002-of-00005"):
        images.imagenet(tmp_path, validation=10)


# Folders


def save(path, number, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), [number, 2 * number % 256, 7], "uint8")).convert(mode).save(path)


def make(root, *parts, count=20, size=(8, 8), classes=("bee", "cow")):
    """Folders of PNG images whose red says which they are."""
    number = 0
    for part in parts:
        for name in classes:
            for _ in range(count):
                save(root / part / name / f"{number}.png", number, size)
                number += 1
    return root


def red(of, part):
    x = np.concatenate([x.numpy() for x, _ in of.batches(part, 16)] or [np.zeros((0, 1, 1, 1))])
    return np.round(x[:, 0, 0, 0] * of.std[0] + of.mean[0]).astype(int).tolist()


def test_a_folder_of_classes_is_split_by_class(tmp_path):
    folder = images.folder(make(tmp_path, "."))
    assert (folder.classes, folder.class_names, folder.input_shape) == (2, ("bee", "cow"), (8, 8, 3))
    assert folder.resize is None
    numbers = {part: red(folder, getattr(folder, part)) for part in ("train", "validation", "test")}
    assert [len(found) for found in numbers.values()] == [32, 4, 4]
    assert sorted(number for found in numbers.values() for number in found) == list(range(40))
    for part, found in numbers.items():
        labels = getattr(folder, part).labels
        np.testing.assert_array_equal(np.array(found) >= 20, labels == 1)
        assert np.bincount(labels)[0] == np.bincount(labels)[1]
    again = images.folder(tmp_path)
    assert {part: red(again, getattr(again, part)) for part in numbers} == numbers


@pytest.mark.parametrize("test", ["val", "test"])
def test_a_folder_says_what_is_for_testing(tmp_path, test):
    folder = images.folder(make(tmp_path, "train", test))
    assert sorted(red(folder, folder.test)) == list(range(40, 80))
    assert sorted(red(folder, folder.train) + red(folder, folder.validation)) == list(range(40))
    assert len(folder.validation) == 4
    eight = images.folder(tmp_path, validation=8)
    np.testing.assert_array_equal(np.bincount(eight.validation.labels), [4, 4])
    assert len(images.folder(tmp_path, validation=0.5).validation) == 20
    nothing = images.folder(tmp_path, validation=0)
    assert (len(nothing.train), len(nothing.validation), len(nothing.test)) == (40, 0, 40)


def test_a_folder_says_what_is_for_validation(tmp_path):
    folder = images.folder(make(tmp_path, "train", "val", "test", count=10))
    assert sorted(red(folder, folder.train)) == list(range(20))
    assert sorted(red(folder, folder.validation)) == list(range(20, 40))
    assert sorted(red(folder, folder.test)) == list(range(40, 60))
    with pytest.raises(ValueError, match=r"validation part is what is in .*val\. .* Received 4"):
        images.folder(tmp_path, validation=4)


def test_a_test_folder_without_labels_is_not_used(tmp_path):
    make(tmp_path, "train", "val")
    save(tmp_path / "test" / "1.png", 1)
    folder = images.folder(tmp_path)
    assert sorted(red(folder, folder.test)) == list(range(40, 80))


def test_images_within_folders_of_a_class_and_of_all_kinds_are_found(tmp_path):
    kinds = {"a.JPEG": "RGB", "b.jpg": "L", "c.png": "RGBA", "d.gif": "P", "e.bmp": "1", "f.webp": "RGB", "g.png": "LA"}
    for number, (name, mode) in enumerate(kinds.items()):
        save(tmp_path / "train" / "bee" / "images" / name, 10 * number, mode=mode)
        save(tmp_path / "val" / "bee" / name, 10 * number, mode=mode)
    (tmp_path / "val" / "bee" / "boxes.txt").write_text("no image")
    (tmp_path / "val" / "bee" / ".a.png").write_text("no image")
    folder = images.folder(tmp_path, validation=0)
    assert [path.name for path in folder.test.paths] == sorted(kinds)
    assert (len(folder.train), len(folder.test)) == (7, 7)
    (x, _), *_ = folder.test.batches(7)
    assert (x.shape, x.dtype) == ((7, 8, 8, 3), tf.uint8)
    grey = x.numpy()[1]
    assert (grey == grey[..., :1]).all()


def test_a_folders_statistics_are_measured_on_its_training_part(tmp_path):
    make(tmp_path, "train", "val", count=10)
    folder = images.folder(tmp_path, validation=0)
    level = np.arange(20)
    np.testing.assert_allclose(folder.mean, [level.mean(), 2 * level.mean(), 7])
    # Blue never changes.
    np.testing.assert_allclose(folder.std, [level.std(), 2 * level.std(), 1])


def test_images_of_several_sizes_are_brought_to_one(tmp_path):
    make(tmp_path, "train", "val", count=5)
    save(tmp_path / "train" / "bee" / "large.png", 99, (20, 30))
    with pytest.raises(ValueError, match=r"several sizes, from 8x8 to 20x30. Pass size"):
        images.folder(tmp_path)
    folder = images.folder(tmp_path, size=(14, 14), validation=0)
    assert (folder.input_shape, folder.resize) == ((14, 14, 3), 16)
    assert sorted(red(folder, folder.train)) == [*range(10), 99]
    for changes in ((), ("crop", "flip"), ("resized_crop",)):
        (x, _), *_ = folder.training_batches(11, seed=0, augmentation=Augmentation(changes))
        assert x.shape == (11, 14, 14, 3)
    assert images.folder(make(tmp_path / "alike", "."), size=(8, 8)).resize is None
    assert images.folder(tmp_path / "alike", size=(7, 7)).resize == 8


def test_a_folders_order_depends_on_the_seed_and_the_epoch_alone(tmp_path):
    folder = images.folder(make(tmp_path, "train", "val"), size=(7, 7), validation=0)
    settings = {"augmentation": Augmentation(("resized_crop", "flip")), "seed": 3, "epochs": 3}
    unbroken = as_arrays(folder.training_batches(10, **settings))
    for epoch in (unbroken[:4], unbroken[4:8], unbroken[8:]):
        seen = np.concatenate([x[:, 0, 0, 0] for x, _ in epoch]) * folder.std[0] + folder.mean[0]
        seen = np.round(seen).astype(int)
        assert sorted(seen) == list(range(40))
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in epoch]), seen >= 20)
    tf.random.set_seed(9)
    resumed = images.folder(tmp_path, size=(7, 7), validation=0).training_batches(10, first_epoch=2, **settings)
    assert_same(as_arrays(resumed), unbroken[8:])


def damage(root):
    """A JPEG that ends too early, one without an end of its head, and a file that is no image."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype("uint8")
    truncated, headless, no_image = (root / "cow" / name for name in ("truncated.jpg", "headless.png", "text.jpg"))
    Image.fromarray(noise).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-60])
    Image.fromarray(noise).save(headless)
    headless.write_bytes(headless.read_bytes()[:20])
    no_image.write_text("no image")
    return [truncated, headless, no_image]


def test_images_that_cannot_be_read_are_named(tmp_path):
    make(tmp_path / "train")
    make(tmp_path, "val", "train")
    truncated, headless, no_image = damage(tmp_path / "val")
    for path in (headless, no_image):
        with pytest.raises(images.ImageError, match=rf"{re.escape(str(path))}: the image cannot be read, it is trunc"):
            images.decode(path)
    with pytest.raises(images.ImageError, match=f"{headless}|{no_image}"):
        images.folder(tmp_path)
    headless.unlink()
    no_image.unlink()
    # Its head is whole, so that a pass finds it.
    folder = images.folder(tmp_path)
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{re.escape(str(truncated))}: the image cannot be read"):
        as_arrays(folder.batches(folder.test, 4))
    with pytest.raises(images.ImageError, match=re.escape(str(tmp_path / "none.png"))):
        images.decode(tmp_path / "none.png")
    # A process whose own places hold other files does not read it.
    place = folder.test.paths.index(truncated)
    own = range(1, 4) if place % 4 == 0 else range(place % 4)
    shared = as_arrays(folder.batches(folder.test, 4, own=own))
    for number, (path, label) in enumerate(zip(folder.test.paths, folder.test.labels, strict=True)):
        if number % 4 in own:
            x, labels = (each[number % 4] for each in shared[number // 4])
            np.testing.assert_array_equal(x, folder.standardize(images.decode(path)))
            assert labels == label


def test_images_that_cannot_be_read_are_left_out_with_a_warning_that_lists_them(tmp_path):
    make(tmp_path, "train", "val")
    bad = damage(tmp_path / "val") + damage(tmp_path / "train")
    with pytest.warns(UserWarning, match="6 images are left out") as caught:
        folder = images.folder(tmp_path, validation=0, skip_corrupt=True)
    for path in bad:
        assert f"{path}: the image cannot be read" in str(caught[0].message)
    assert (len(folder.train), len(folder.test)) == (40, 40)
    assert sorted(red(folder, folder.test)) == list(range(40, 80))


def test_a_class_of_which_nothing_can_be_read_is_refused(tmp_path):
    make(tmp_path, "train", "val")
    for path in (tmp_path / "val" / "bee").iterdir():
        path.write_text("no image")
    with (
        pytest.warns(UserWarning, match="20 images are left out"),
        pytest.raises(ValueError, match=r"The test part of .* has none of \['bee'\]"),
    ):
        images.folder(tmp_path, skip_corrupt=True)


def test_images_that_have_changed_since_are_named(tmp_path):
    folder = images.folder(make(tmp_path, "."))
    save(folder.test.paths[1], 0, (9, 8))
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=rf"{re.escape(str(folder.test.paths[1]))}: the image must have shape \(8, 8, 3\). It has \(9, 8, 3\)",
    ):
        as_arrays(folder.batches(folder.test, 4))


def test_images_of_16_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 40_000, "uint16")).save(tmp_path / "deep.png")
    with pytest.raises(images.ImageError, match=r"deep.png: images have 8 bits a channel. .* 'I;16'"):
        images.decode(tmp_path / "deep.png")


def empty(root):
    make(root, "train", "val")
    (root / "train" / "eel").mkdir()
    save(root / "val" / "eel" / "1.png", 1)


def lonely(root):
    make(root, ".")
    save(root / "eel" / "1.png", 1)


def apart(root):
    make(root, "train")
    make(root, "val", classes=("bee", "eel"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda root: None, "Each class has a folder of images. .* has no folders"),
        (empty, r"Each class has images \(.*\). .*train/eel has none"),
        (lonely, r"Class 'eel' has too few images"),
        (apart, r"folders of the same classes. They differ in \['cow', 'eel'\]"),
        (lambda root: make(root, "train"), "has a folder train and neither val nor test"),
        (lambda root: (root / "train").mkdir() or make(root, "val"), "train has no folders"),
    ],
)
def test_folders_that_do_not_fit_are_refused(tmp_path, build, message):
    build(tmp_path)
    with pytest.raises(ValueError, match=message):
        images.folder(tmp_path)


def test_bad_arguments_of_a_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'folder:{tmp_path}/no' is not at {tmp_path}/no"):
        images.folder(tmp_path / "no")
    make(tmp_path, "train", "val")
    for size in ((8,), (0, 8)):
        with pytest.raises(ValueError, match=re.escape(f"Received size={size}")):
            images.folder(tmp_path, size=size)
    for validation in (-1, 2.5):
        with pytest.raises(ValueError, match=f"Received validation={validation}"):
            images.folder(tmp_path, validation=validation)
    with pytest.raises(ValueError, match="Received 1 of 40"):
        images.folder(tmp_path, validation=1)


def test_tiny_imagenet(unpacked):
    root = unpacked("tiny_imagenet_20") / "tiny-imagenet-20"
    tiny = data.load(f"folder:{root}")
    assert (len(tiny.train), len(tiny.validation), len(tiny.test)) == (9000, 1000, 1000)
    assert (tiny.classes, tiny.input_shape, tiny.resize) == (20, (64, 64, 3), None)
    for part, count in ((tiny.train, 450), (tiny.validation, 50), (tiny.test, 50)):
        np.testing.assert_array_equal(np.bincount(part.labels), [count] * 20)
        assert all(
            path.name.startswith(tiny.class_names[label]) or "val" in path.name
            for path, label in zip(part.paths, part.labels, strict=True)
        )
    assert all(root / "val" in path.parents for path in tiny.test.paths)
    batches = as_arrays(tiny.batches(tiny.test, 256))
    x = np.concatenate([x for x, _ in batches])
    assert x.shape == (1000, 64, 64, 3)
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=0.15)
    np.testing.assert_allclose(x.std((0, 1, 2)), 1, atol=0.1)
    augmentation = Augmentation(("resized_crop", "flip"))
    x, labels = next(iter(tiny.training_batches(128, seed=0, augmentation=augmentation)))
    assert (x.shape, labels.shape) == ((128, 64, 64, 3), (128,))

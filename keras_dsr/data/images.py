"""Images: digits that need no download, CIFAR and ImageNet from tensorflow-datasets, and any folder of images."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import sklearn.datasets
import tensorflow as tf
from PIL import Image

from keras_dsr.data.parts import ArrayPart, DataSet, Part, Prepare, batched, missing, order, split

# Of the training part, as the paper's released code has them, in units of 0..255.
_CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# The usual evaluation: the shorter side to 256 pixels, of which the central 224 are seen.
_ENLARGED = 256 / 224

# How many files are read at a time, and how many records wait to be drawn from. A record of ImageNet has about 110 KB.
_INTERLEAVED = 16
_WAITING = 4096

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
# Part of each class of a folder of images that is for testing, and for validation, where the folder does not say.
_HELD_OUT = 0.1
# How many images of a folder are looked at for mean and standard deviation.
_SAMPLE = 2000
_THREADS = 16


class ImageError(ValueError):
    """An image file that cannot be used; the message names it."""


def digits() -> DataSet:
    """The 1,797 real handwritten digits, 8x8 pixels, that scikit-learn carries: no download.

    360 images are for testing and 144 for validation, drawn once and for all with equal parts of each class; 1,293
    remain for training.

    Returns:
        The three parts: images (8, 8, 1) of 0 to 16, uint8.

    Reference: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    raw = sklearn.datasets.load_digits()
    images, labels = raw.images[..., np.newaxis].astype("uint8"), raw.target.astype("int32")
    rest, test = split(labels, 360, "test")
    train, validation = (rest[part] for part in split(labels[rest], 144))
    seen = images[train].astype("float64")
    return DataSet(
        "digits",
        *(ArrayPart(images[numbers], labels[numbers]) for numbers in (train, validation, test)),
        classes=10,
        input_shape=(8, 8, 1),
        mean=(float(seen.mean()),),
        std=(float(seen.std()),),
        class_names=tuple("0123456789"),
    )


def cifar(
    name: str, data_dir: str | Path | None = None, validation: float | None = None, download: bool = False
) -> DataSet:
    """CIFAR-10 or CIFAR-100 from tensorflow-datasets: 50,000 training and 10,000 test images of 32x32 pixels.

    Args:
        name: "cifar10" or "cifar100".
        data_dir: Folder of tensorflow-datasets; `None` for its own default, `~/tensorflow_datasets`.
        validation: How many training images are set aside for validation, or what part of them if below 1, with equal
            parts of each class; `None` for 5,000.
        download: Whether to download and prepare the data if it is not there (160 MB).

    Returns:
        The three parts: images (32, 32, 3) of 0 to 255, uint8. Mean and standard deviation are those of the paper's
        released code.

    Raises:
        FileNotFoundError: if the data is not there.
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if the name is another, or that many images cannot be set aside.

    Reference: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
    """
    if name not in _CIFAR_STATISTICS:
        raise ValueError(f"name is one of {sorted(_CIFAR_STATISTICS)}. Received name={name!r}.")
    builder = _prepared(
        name,
        data_dir,
        download,
        "Prepare it once (a download of 160 MB) with download=True, on the command line --download, or name the folder "
        "of tensorflow-datasets that has it with data_dir, on the command line --data-dir.",
    )
    count, classes = builder.info.splits["train"].num_examples, builder.info.features["label"].num_classes
    size = _how_many(5000 if validation is None else validation, count)
    if size and not classes <= size <= count - classes:
        raise ValueError(
            f"Validation is 0 or at least one image of each of the {classes} classes, and leaves as many of {count}. "
            f"Received validation={validation!r}."
        )
    tfds = _tensorflow_datasets()
    arrays = {
        part: tfds.as_numpy(
            builder.as_dataset(split=part, batch_size=-1, read_config=tfds.ReadConfig(try_autocache=False))
        )
        for part in ("train", "test")
    }
    images, labels = arrays["train"]["image"], arrays["train"]["label"]
    rest, held_out = split(labels, size)
    mean, std = _CIFAR_STATISTICS[name]
    return DataSet(
        name,
        ArrayPart(images[rest], labels[rest]),
        ArrayPart(images[held_out], labels[held_out]),
        ArrayPart(arrays["test"]["image"], arrays["test"]["label"]),
        classes=classes,
        input_shape=(32, 32, 3),
        mean=tuple(255 * value for value in mean),
        std=tuple(255 * value for value in std),
        class_names=tuple(builder.info.features["label"].names),
    )


def imagenet(data_dir: str | Path | None = None, validation: float | None = None, download: bool = False) -> DataSet:
    """ImageNet-1k from tensorflow-datasets ("imagenet2012"), read from its files as it goes; never in memory.

    The 50,000 images of the official validation split are the test part: those of the official test split have no
    labels. For validation, whole files are set aside, the last of the training split. tensorflow-datasets has
    distributed the images over its files at random, so each is a sample of all classes.

    Args:
        data_dir: Folder of tensorflow-datasets; `None` for its own default, `~/tensorflow_datasets`.
        validation: How many training images are set aside for validation at least, or what part of them if below 1;
            `None` for 10,000 (8 of 1,024 files).
        download: Whether to prepare the data if it is not there, from the archives that are got by hand.

    Returns:
        The three parts: images of several sizes, of 0 to 255, uint8, for inputs (224, 224, 3).

    Raises:
        FileNotFoundError: if the data is not there, or files of it are missing.
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if the files are not TFRecords, or that many images cannot be set aside.

    Reference: Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
    """
    name = "imagenet2012"
    builder = _prepared(
        name,
        data_dir,
        download,
        "Download ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB) by hand from image-net.org "
        "into downloads/manual of the folder of tensorflow-datasets, and prepare it once with download=True, on the "
        "command line --download. Or name the folder that has it with data_dir, on the command line --data-dir.",
    )
    if builder.info.file_format.value != "tfrecord":
        raise ValueError(f"{builder.data_dir} must have TFRecord files. Received {builder.info.file_format.value}.")
    train, test = (_records(builder, part) for part in ("train", "validation"))
    label = builder.info.features["label"]
    mean, std = _IMAGENET_STATISTICS
    return DataSet(
        name,
        *train.cut(10_000 if validation is None else validation),
        test,
        classes=label.num_classes,
        input_shape=(224, 224, 3),
        mean=tuple(255 * value for value in mean),
        std=tuple(255 * value for value in std),
        class_names=tuple(label.names),
        resize=256,
    )


def folder(
    path: str | Path,
    size: tuple[int, int] | None = None,
    validation: float | None = None,
    skip_corrupt: bool = False,
) -> DataSet:
    """A folder of images, which are read and decoded as it goes.

    The images of a class are in a folder of the class's name, or in folders within (BMP, GIF, JPEG, PNG, PPM, WebP, by
    their suffix; other files are not looked at). The folders of the classes are in

    - `train`, `val` and `test` of PATH: the three parts. A `test` without folders of classes, such as ImageNet's, has
      no labels and is not used.
    - `train` and one of `val` and `test`: that one is the test part; validation is cut from the training part.
    - PATH itself: one in ten images of each class is for testing, and another for validation, drawn once and for all.

    Args:
        path: The folder.
        size: Height and width of the inputs; `None` for the images' own, if that is the same for all. Images of another
            size are resized: evaluation sees the centre, after the shorter side is brought to 256/224 of the input's.
        validation: How many training images are set aside for validation, or what part of them if below 1, with equal
            parts of each class; `None` for one in ten of each class, or what is in `val`.
        skip_corrupt: Whether to decode all images first, and leave out those that cannot be read, with a warning that
            lists them. Otherwise the first of them ends the loading, or the pass that comes to it, with an error.

    Returns:
        The three parts: colour images of 0 to 255, uint8; grey ones have three equal channels. Mean and standard
        deviation are measured on 2,000 images of the training part, spread evenly over it, as a folder may have any
        kind of images and ImageNet's statistics suit photographs alone.

    Raises:
        FileNotFoundError: if there is no such folder.
        ImageError: if an image cannot be read.
        ValueError: if there are no classes, a class has no images or the parts do not have the same classes; if the
            images are of several sizes and `size` does not say which is wanted; or if that many images cannot be set
            aside.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise missing(f"folder:{path}", [root], "It is a folder with one folder of images for each class.")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size is (height, width) in pixels, each 1 or more. Received size={size!r}.")
    class_names, listed = _listed(root, validation)
    sizes = _usable(listed, skip_corrupt)
    for part, files in listed.items():
        present = {label for _, label in files}
        absent = [name for label, name in enumerate(class_names) if label not in present]
        if absent and (part != "validation" or files):
            raise ValueError(f"Each class has images. The {part} part of {root} has none of {absent}.")

    alike = len(sizes) == 1
    if size is None:
        if not alike:
            least, most = min(sizes, key=np.prod), max(sizes, key=np.prod)
            raise ValueError(
                f"The images in {root} are of several sizes, from {least[0]}x{least[1]} to {most[0]}x{most[1]}. "
                "Pass size=(height, width) for the inputs."
            )
        size = next(iter(sizes))
    shape = (*next(iter(sizes)), 3) if alike else (None, None, 3)
    parts = {
        part: FilePart([path for path, _ in files], [label for _, label in files], shape)
        for part, files in listed.items()
    }
    mean, std = _statistics(parts["train"].paths)
    return DataSet(
        f"folder:{path}",
        **parts,
        classes=len(class_names),
        input_shape=(*size, 3),
        mean=mean,
        std=std,
        class_names=class_names,
        resize=None if sizes == {tuple(size)} else round(min(size) * _ENLARGED),
    )


class FilePart(Part):
    """Images in files, decoded as they are needed.

    Args:
        paths: The files.
        labels: Integers of shape (count,).
        shape: Shape of an image, (height, width, 3); `None` for what is not the same for all.
    """

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], shape: tuple[int | None, ...]) -> None:
        self.paths = tuple(paths)
        self.labels = np.array(labels, dtype="int32")
        self._shape = shape
        with tf.device("CPU:0"):
            self._paths = tf.constant([os.fsencode(path) for path in paths], tf.string)
            self._labels = tf.constant(self.labels)

    def __len__(self) -> int:
        return len(self.paths)

    def batches(
        self,
        batch_size: int,
        prepare: Prepare | None = None,
        seed: tf.Tensor | None = None,
        drop_remainder: bool = False,
        own: range | None = None,
    ) -> tf.data.Dataset:
        def read(encoded: bytes) -> np.ndarray:
            path = Path(os.fsdecode(encoded))
            image = decode(path)
            if any(wanted not in (None, given) for wanted, given in zip(self._shape, image.shape, strict=True)):
                raise ImageError(f"{path}: the image must have shape {self._shape}. It has {image.shape}.")
            return image

        in_order = order(len(self), seed)

        def take(place: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            number = in_order[place]
            x = tf.numpy_function(read, [tf.gather(self._paths, number)], tf.uint8, stateful=False)
            x = tf.ensure_shape(x, self._shape)
            return x if prepare is None else prepare(x, place), tf.gather(self._labels, number)

        return batched(tf.data.Dataset.range(len(self)), take, batch_size, drop_remainder, own)


class RecordPart(Part):
    """Images in TFRecord files of tensorflow-datasets.

    The order of a pass is that of the files, drawn at random; of what several of them have in turn; and of a buffer of
    4,096 records from which is drawn.

    Args:
        files: The files.
        lengths: How many records each has.
        parse: Gives image and label of a record.
    """

    def __init__(
        self,
        files: Sequence[str],
        lengths: Sequence[int],
        parse: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
    ) -> None:
        self.files = tuple(files)
        self.lengths = tuple(lengths)
        self._parse = parse
        with tf.device("CPU:0"):
            self._files = tf.constant(self.files, tf.string)

    def __len__(self) -> int:
        return sum(self.lengths)

    def cut(self, validation: float) -> tuple[RecordPart, RecordPart]:
        """This part without its last files, and the last files.

        Args:
            validation: How many examples those have at least, or what part of all if below 1; 0 for no files.

        Raises:
            ValueError: if no file would be left.
        """
        wanted = _how_many(validation, len(self))
        held_out = 0
        while sum(self.lengths[len(self.files) - held_out :]) < wanted and held_out < len(self.files):
            held_out += 1
        kept = len(self.files) - held_out
        if kept == 0:
            raise ValueError(
                f"Validation takes whole files and leaves at least one. Received validation={validation!r} of "
                f"{len(self)} examples in {len(self.files)} files."
            )
        return tuple(
            RecordPart(self.files[files], self.lengths[files], self._parse)
            for files in (slice(kept), slice(kept, None))
        )

    def batches(
        self,
        batch_size: int,
        prepare: Prepare | None = None,
        seed: tf.Tensor | None = None,
        drop_remainder: bool = False,
        own: range | None = None,
    ) -> tf.data.Dataset:
        def take(place: tf.Tensor, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            x, label = self._parse(record)
            return x if prepare is None else prepare(x, place), label

        records = tf.data.TFRecordDataset(self._files) if seed is None else self._shuffled(seed)
        return batched(records.enumerate(), take, batch_size, drop_remainder, own)

    def _shuffled(self, seed: tf.Tensor) -> tf.data.Dataset:
        files = tf.data.Dataset.from_tensor_slices(tf.gather(self._files, order(len(self.files), seed)))
        records = files.interleave(
            tf.data.TFRecordDataset,
            cycle_length=_INTERLEAVED,
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
        # `Dataset.shuffle` takes no tensor for a seed, and its order would depend on the global seed too.
        shuffled = tf.raw_ops.ShuffleDataset(
            input_dataset=tf.data.experimental.to_variant(records),
            buffer_size=_WAITING,
            seed=seed,
            seed2=1,  # two zeros would stand for any order
            output_types=[tf.string],
            output_shapes=[[]],
            reshuffle_each_iteration=False,
        )
        return tf.data.experimental.from_variant(shuffled, records.element_spec)


def decode(path: Path) -> np.ndarray:
    """The image in a file.

    Args:
        path: The file.

    Returns:
        Colours (height, width, 3), uint8; of an animation the first image.

    Raises:
        ImageError: if the file cannot be read, is truncated or corrupt, or has more than 8 bits a channel.
    """
    with _opened(path) as image:
        if "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file; errors name the file."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ImageError(
                    f"{path}: images have 8 bits a channel. This one has more, its mode is {image.mode!r}."
                )
            yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise errors of all kinds
        raise ImageError(
            f"{path}: the image cannot be read, it is truncated, corrupt or no image ({error})."
        ) from error


def _how_many(validation: float, count: int) -> int:
    """How many of `count` examples, from a number of them or a part of all."""
    how_many = validation * count if 0 < validation < 1 else validation
    if validation < 0 or (validation >= 1 and validation != int(validation)):
        raise ValueError(
            "validation is a number of training examples, 0 or more, or a part of them below 1. "
            f"Received validation={validation!r}."
        )
    return round(how_many)


def _tensorflow_datasets():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "CIFAR and ImageNet are read by tensorflow-datasets, which is not installed (or lacks "
            "importlib_resources). Install it with: pip install 'keras-dsr[data]'."
        ) from error
    return tensorflow_datasets


def _prepared(name: str, data_dir: str | Path | None, download: bool, how: str):
    """The builder of a data set that tensorflow-datasets has prepared."""
    tfds = _tensorflow_datasets()
    # Other paths may be addresses of a storage service, which a Path would change.
    if str(data_dir).startswith("~"):
        data_dir = Path(data_dir).expanduser()
    builder = tfds.builder(name, data_dir=data_dir)
    if download:
        try:
            builder.download_and_prepare()
        except AssertionError as error:  # archives that only their owner hands out
            raise missing(name, [builder.data_dir], f"{how} tensorflow-datasets says: {error}") from error
    if not builder.is_prepared():
        raise missing(name, [builder.data_dir], how)
    return builder


def _records(builder, part: str) -> RecordPart:
    """One split of a data set that tensorflow-datasets has prepared as TFRecords."""
    if part not in builder.info.splits:
        raise missing(builder.name, [builder.data_dir], f"The split {part!r} was not prepared.")
    info = builder.info.splits[part]
    there = set(tf.io.gfile.listdir(str(builder.data_dir)))
    absent = [name for name in info.filenames if name not in there]
    if absent:
        raise FileNotFoundError(f"{builder.data_dir} lacks {len(absent)} files of {part!r}, such as {absent[0]}.")
    features = builder.info.features

    def parse(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        example = features.deserialize_example(record)
        return example["image"], example["label"]

    return RecordPart([str(path) for path in info.filepaths], info.shard_lengths, parse)


Files = list[tuple[Path, int]]


def _listed(root: Path, validation: float | None) -> tuple[tuple[str, ...], dict[str, Files]]:
    """The names of the classes, and the files of each part with their labels."""
    train = root / "train"
    if not train.is_dir():
        class_names = _class_names(root)
        rest, test = _hold_out(_files(root, class_names), class_names, draw=0)
        return class_names, dict(
            zip(("train", "validation", "test"), (*_validation(rest, class_names, validation), test), strict=True)
        )
    class_names = _class_names(train)
    others = [place for place in (root / "val", root / "test") if place.is_dir()]
    if len(others) == 2 and not _folders(root / "test"):
        others.pop()
    if not others:
        raise ValueError(
            f"{root} has a folder train and neither val nor test. To cut the test part from the training part, "
            f"name {train} itself."
        )
    for place in others:
        if _class_names(place) != class_names:
            odd = sorted(set(_class_names(place)) ^ set(class_names))
            raise ValueError(f"{train} and {place} must have folders of the same classes. They differ in {odd}.")
    files = [_files(place, class_names) for place in (train, *others)]
    if len(others) == 1:
        files[:1] = _validation(files[0], class_names, validation)
    elif validation is not None:
        raise ValueError(
            f"The validation part is what is in {others[0]}. Leave validation out. Received {validation!r}."
        )
    return class_names, dict(zip(("train", "validation", "test"), files, strict=True))


def _folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_names(place: Path) -> tuple[str, ...]:
    names = tuple(_folders(place))
    if not names:
        raise ValueError(f"Each class has a folder of images. {place} has no folders.")
    return names


def _files(place: Path, class_names: Sequence[str]) -> Files:
    files = []
    for label, name in enumerate(class_names):
        found = sorted(
            path
            for path in (place / name).rglob("*")
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
        )
        if not found:
            raise ValueError(f"Each class has images ({', '.join(_SUFFIXES)}). {place / name} has none.")
        files += [(path, label) for path in found]
    return files


def _validation(files: Files, class_names: Sequence[str], validation: float | None) -> tuple[Files, Files]:
    """What remains for training, and what is set aside."""
    if validation is None:
        return _hold_out(files, class_names, draw=1)
    parts = split(np.array([label for _, label in files]), _how_many(validation, len(files)))
    return tuple([files[number] for number in numbers] for numbers in parts)


def _hold_out(files: Files, class_names: Sequence[str], draw: int) -> tuple[Files, Files]:
    """What remains of each class without one in ten, and those; at least one."""
    rest, held_out = [], []
    for label, name in enumerate(class_names):
        of_class = [file for file in files if file[1] == label]
        count = max(1, round(_HELD_OUT * len(of_class)))
        if count == len(of_class):
            raise ValueError(
                f"Class {name!r} has too few images: none would be left for training. It takes three, or two where the "
                "test part is given."
            )
        chosen = set(np.random.default_rng([draw, label]).permutation(len(of_class))[:count].tolist())
        for number, file in enumerate(of_class):
            (held_out if number in chosen else rest).append(file)
    return rest, held_out


def _usable(listed: dict[str, Files], skip_corrupt: bool) -> set[tuple[int, int]]:
    """The sizes of all images; those that cannot be read are taken out of the lists, or raise an error."""

    def look(file: tuple[Path, int]) -> tuple[int, int] | ImageError:
        try:
            if skip_corrupt:
                return decode(file[0]).shape[:2]
            with _opened(file[0]) as image:  # reads the head of the file alone
                return image.height, image.width
        except ImageError as error:
            if not skip_corrupt:
                raise
            return error

    sizes, errors = set(), []
    for part, files in listed.items():
        seen = list(_in_threads(look, files))
        errors += [str(one) for one in seen if isinstance(one, ImageError)]
        sizes |= {one for one in seen if not isinstance(one, ImageError)}
        listed[part] = [file for file, one in zip(files, seen, strict=True) if not isinstance(one, ImageError)]
    if errors:
        warnings.warn(f"{len(errors)} images are left out:\n" + "\n".join(errors), stacklevel=4)
    return sizes


def _statistics(paths: Sequence[Path]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, all images alike whatever their sizes."""
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _SAMPLE)).astype(int))

    def moments(number: int) -> np.ndarray:
        x = decode(paths[number]).astype("float64")
        return np.stack([x.mean((0, 1)), np.square(x).mean((0, 1))])

    mean, square = np.mean(list(_in_threads(moments, chosen)), axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    # What never changes is only shifted.
    return tuple(map(float, mean)), tuple(map(float, np.where(std > 1e-6, std, 1.0)))


def _in_threads(work: Callable, items: Sequence) -> Iterator:
    """`map` with threads: decoders let others run."""
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(work, items)

"""Data sets by name, split so that a choice never sees the test part.

- `keras_dsr.data.load`: any of them, by name
- `keras_dsr.data.images`: digits, CIFAR, ImageNet, folders of images
- `keras_dsr.data.events`: recordings of event cameras, as frames
- `keras_dsr.data.augmentation`: random changes to training inputs
- `keras_dsr.data.parts`: parts of a data set, and batches of them
"""

from __future__ import annotations

import difflib
import os
import types
from pathlib import Path

from keras_dsr.data import events, images
from keras_dsr.data.parts import DataSet

NAMES = types.MappingProxyType(
    {
        "digits": "scikit-learn's 1,797 handwritten digits, 8x8 pixels; no download",
        "cifar10": "60,000 photographs of 10 classes, 32x32 pixels; tensorflow-datasets",
        "cifar100": "60,000 photographs of 100 classes, 32x32 pixels; tensorflow-datasets",
        "imagenet2012": "1.3 million photographs of 1,000 classes, 224x224 pixels; tensorflow-datasets",
        "folder:PATH": "any folder of images, one folder a class",
        "digits_events": "scikit-learn's handwritten digits in front of a simulated event camera; no download",
        "dvs_cifar10": "10,000 recordings of photographs of 10 classes, 48x48 pixels",
        "nmnist": "70,000 recordings of handwritten digits, 34x34 pixels; tonic",
        "dvs_gesture": "1,341 recordings of 11 gestures, 128x128 pixels; tonic",
        "poker_dvs": "68 recordings of the 4 suits of cards, 35x35 pixels; tonic",
        "shd": "10,420 recordings of spoken digits in 2 languages, 700 channels; tonic",
        "events:PATH": "any folder of event recordings, one folder a class",
    }
)
"""The data sets that `load` knows, with a line about each."""

_ALIASES = types.MappingProxyType({"imagenet": "imagenet2012"})


def has_events(name: str) -> bool:
    """Whether a data set is one of recordings, whose events become as many frames as there are time steps."""
    kind = _ALIASES.get(name, name).partition(":")[0]
    return kind == "events" or kind in events.DATASETS.keys() - {"folder"}


def load(
    name: str,
    *,
    data_dir: str | Path | None = None,
    timesteps: int | None = None,
    slicing: str = "number",
    size: tuple[int, int] | None = None,
    sensor: tuple[int, int] | None = None,
    validation: float | None = None,
    cache_dir: str | Path | None = None,
    skip_corrupt: bool = False,
    download: bool = False,
) -> DataSet:
    """A data set by name, in three parts.

    Args:
        name: One of `NAMES`; "folder:PATH" and "events:PATH" with the path of a folder, see
            `keras_dsr.data.images.folder` and `keras_dsr.data.events.load`.
        data_dir: The folder that data sets are in: of tensorflow-datasets for CIFAR and ImageNet; `save_to` of tonic,
            or the folder of the one data set, for recordings. `None` for $KERAS_DSR_DATA, or if that is not set for the
            default of `keras_dsr.data.images` and `events`. Data sets that need no files take no notice.
        timesteps: Number N of frames that the events of a recording become. Images have no time, and take no notice of
            this, `slicing` and `cache_dir`.
        slicing: "number" for frames of equal numbers of events, "time" for frames of equal duration.
        size: Height and width of the inputs, for folders of images and for event frames; `None` for the images' or the
            data set's own.
        sensor: Height and width of the camera, for "events:PATH"; `None` if the recordings tell.
        validation: Part of the training examples that is set aside for validation, below 1, with equal parts of each
            class. For images it may be a number of them. `None` for the data set's default: 5,000 for CIFAR, 10,000 for
            ImageNet, one in ten for others; the parts of the digits, as images and as events, are fixed.
        cache_dir: Folder in which event frames are kept; `None` for the default of `keras_dsr.data.events.load`.
        skip_corrupt: Whether to leave out files of "folder:PATH" and of event data sets that cannot be read, with a
            warning that lists them, in place of an error.
        download: Whether the data set may be downloaded if it is not there.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: if the data set is not there; the message says how to get it.
        ImportError: if the package that reads it is not installed.
        ValueError: if there is no such data set, an argument is out of range, or the data set does not take it.

    Example:

    >>> from keras_dsr import data
    >>> digits = data.load("digits")
    >>> len(digits.train), len(digits.validation), len(digits.test), digits.input_shape
    (1293, 144, 360, (8, 8, 1))
    """
    kind, colon, path = name.partition(":")
    name = _ALIASES.get(name, name)
    if colon and kind in ("folder", "events"):
        if not path:
            raise ValueError(f"{name!r} lacks the path of a folder: {kind}:PATH.")
        if data_dir is not None:
            raise ValueError(f"{name!r} says where the data is. Leave data_dir out. Received data_dir={data_dir!r}.")
        data_dir = path
    elif name not in NAMES:
        near = difflib.get_close_matches(name, [*NAMES, *_ALIASES], n=2)
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"A data set is one of {', '.join(NAMES)}. Received {name!r}.{meant}")
    else:
        kind = name
        data_dir = data_dir or os.environ.get("KERAS_DSR_DATA") or None

    if skip_corrupt and kind != "folder" and (kind == "digits_events" or not has_events(name)):
        raise ValueError(
            f"{name!r} has no files of its own that could be left out. Leave skip_corrupt out. Received "
            "skip_corrupt=True."
        )
    if has_events(name):
        if timesteps is None:
            raise ValueError(f"{name!r} has events, which become frames. Pass timesteps, their number.")
        if validation is not None and not 0 <= validation < 1:
            raise ValueError(
                f"validation is a part of the recordings, from 0 to less than 1, for {name!r}. Received {validation!r}."
            )
        return events.load(
            "folder" if kind == "events" else kind,
            timesteps=timesteps,
            data_dir=data_dir,
            slicing=slicing,
            size=size,
            sensor=sensor,
            cache_dir=cache_dir,
            skip_corrupt=skip_corrupt,
            download=download,
            **({} if validation is None else {"validation": validation}),
        )
    if sensor is not None:
        raise ValueError(f"{name!r} has images and no sensor. Leave sensor out. Received sensor={sensor!r}.")
    if size is not None and kind != "folder":
        raise ValueError(f"The inputs of {name!r} have one size. Leave size out. Received size={size!r}.")
    if kind == "digits":
        if validation is not None:
            raise ValueError(f"The parts of 'digits' are fixed. Leave validation out. Received {validation!r}.")
        return images.digits()
    if kind == "folder":
        return images.folder(data_dir, size, validation, skip_corrupt)
    if kind == "imagenet2012":
        return images.imagenet(data_dir, validation, download)
    return images.cifar(kind, data_dir, validation, download)

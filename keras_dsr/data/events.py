"""Event data: recordings of event cameras and of an artificial cochlea, as frames of counts.

`load` finds the recordings of a data set, sums the events of each in N slices, and keeps the frames on disk, from where
they are mapped into memory. Nothing is downloaded unless it is asked for; "digits_events" needs no download at all.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dsr.data import frame_cache, images, recordings
from keras_dsr.data.parts import ArrayPart, DataSet, missing
from keras_dsr.data.recordings import RecordingError
from keras_dsr.data.saccades import Saccades

# Of the frames on disk. Raised when readers, integration or resizing change what the same recordings give.
_FORMAT = 2

# Part of each class that is for testing where a data set has no official test part.
_TEST = 0.1
_DEFAULT_VALIDATION = 0.1


@dataclasses.dataclass(frozen=True)
class Recording:
    """Where one recording is, and what it shows.

    Args:
        source: The file that it is in.
        label: Its class.
        entry: Its number in a file of several.
    """

    source: Path
    label: int
    entry: int | None = None

    def __str__(self) -> str:
        return str(self.source) if self.entry is None else f"{self.source}[{self.entry}]"


@dataclasses.dataclass(frozen=True)
class Found:
    """The recordings of a data set.

    Args:
        train: For training.
        test: For testing.
        class_names: Names of the classes, by label.
        shape: (height, width, 2) of the camera or (channels,); `None` if the recordings do not tell.
        read: Gives the events of a recording.
        root: The folder that they are in; `None` if they are in no file.
        validation: For validation, where the data set says so; else they are cut from `train`.
    """

    train: Sequence[Recording]
    test: Sequence[Recording]
    class_names: tuple[str, ...]
    shape: tuple[int, ...] | None
    read: Callable[[Recording], np.ndarray]
    root: Path | None
    validation: Sequence[Recording] | None = None


@dataclasses.dataclass(frozen=True)
class EventSet:
    """How one data set is found.

    Args:
        find: Finds the recordings in a folder.
        size: Height and width of the frames; `None` for the sensor's.
        tonic: The name of its class in tonic and of the folder that tonic keeps it in; `None` for none.
        needs: Files and folders that are in there when it is complete.
        prepare: How to get it.
    """

    find: Callable[[Path | None], Found]
    size: tuple[int, int] | None = None
    tonic: str | None = None
    needs: tuple[str, ...] = ()
    prepare: str = ""


def load(
    name: str,
    *,
    timesteps: int,
    data_dir: str | Path | None = None,
    slicing: str = "number",
    size: tuple[int, int] | None = None,
    sensor: tuple[int, int] | None = None,
    validation: float = _DEFAULT_VALIDATION,
    cache_dir: str | Path | None = None,
    skip_corrupt: bool = False,
    download: bool = False,
) -> DataSet:
    """A data set of events by name, as frames.

    Args:
        name: One of
            "digits_events": scikit-learn's 1,797 handwritten digits in front of a simulated camera of 16x16 pixels; no
            download; the parts are those of the images;
            "dvs_cifar10": 10,000 recordings of 128x128 pixels, as frames of 48x48. There is no official test part: the
            first 900 recordings of each class by number are for training and the last 100 for testing, as in the
            paper's released code;
            "nmnist": 60,000 and 10,000 recordings of 34x34 pixels;
            "dvs_gesture": 1,077 and 264 recordings of 128x128 pixels;
            "poker_dvs": 48 and 20 recordings of 35x35 pixels;
            "shd": 8,156 and 2,264 recordings of 700 channels of an artificial cochlea;
            "folder": recordings (see `keras_dsr.data.recordings.read`) in the folder `data_dir`, one folder a class, in
            folders `train` and `test` or else with one in ten of each class, drawn once and for all, for testing.
        timesteps: N, the number of frames.
        data_dir: The folder that the data set is in: `save_to` of tonic, or the folder that tonic makes there. `None`
            for `data` in $KERAS_DSR_CACHE or ~/.cache/keras_dsr.
        slicing: "number" for slices of equal numbers of events, the paper's; "time" for slices of equal duration.
        size: Height and width to which frames are resized; `None` for the data set's own: (48, 48) for "dvs_cifar10",
            not resized for all others. The interpolation is bilinear between pixel centres, without a filter: the
            released code's.
        sensor: Height and width of the camera, for "folder"; `None` if the recordings tell: 128x128 for `.aedat`, 34x34
            for `.bin`.
        validation: Part of each class of the training recordings that is set aside for validation, drawn once and for
            all; 0 to less than 1. The parts of "digits_events" are fixed.
        cache_dir: The folder in which the frames are kept; `None` for `frames` in $KERAS_DSR_CACHE or
            ~/.cache/keras_dsr. A recording that changes and other settings make other frames.
        skip_corrupt: Whether to leave out recordings that cannot be used, with a warning that lists them, instead of
            raising.
        download: Whether tonic may download the data set if it is not there.

    Returns:
        The three parts: frames (timesteps, height, width, 2), the numbers of OFF and of ON events, or (timesteps,
        channels). Unsigned integers; float32 where resized.

    Raises:
        FileNotFoundError: if the data set is not there.
        ImportError: if a package that reads it is not installed.
        RecordingError: if a recording is truncated or corrupt, of another sensor, or has fewer events than slices.
        ValueError: if an argument is not one of the above, or a class has no recordings.

    Reference: Meng et al., CVPR 2022, Section 5 and Appendix; Li et al., "CIFAR10-DVS: An Event-Stream Dataset for
    Object Classification", 2017; Orchard et al., "Converting Static Image Datasets to Spiking Neuromorphic Datasets
    Using Saccades", 2015; Amir et al., "A Low Power, Fully Event-Based Gesture Recognition System", CVPR 2017;
    Serrano-Gotarredona and Linares-Barranco, "Poker-DVS and MNIST-DVS", 2015; Cramer et al., "The Heidelberg Spiking
    Data Sets for the Systematic Evaluation of Spiking Neural Networks", 2020.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS)
        meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"An event data set is one of {sorted(DATASETS)}. Received {name!r}.{meant}")
    recordings.check_slices(timesteps, slicing)
    if not 0 <= validation < 1:
        raise ValueError(f"validation is a part of each class, from 0 to less than 1. Received {validation!r}.")
    if sensor is not None and name != "folder":
        raise ValueError(f"sensor is for 'folder'; the sensor of {name!r} is known. Received sensor={sensor!r}.")
    _check_size("sensor", sensor)
    _check_size("size", size)

    data_set = DATASETS[name]
    found = data_set.find(_root(name, data_set, data_dir, download))
    if sensor is not None:
        found = dataclasses.replace(found, shape=(*sensor, 2))
    if found.shape is None:
        raise ValueError(
            "The recordings do not tell the camera's size. Pass sensor=(height, width), in a recipe sensor=34,34."
        )
    if size is not None and len(found.shape) != 3:
        raise ValueError(f"The frames of {name!r} have no height and width to resize. Received size={size!r}.")
    size = data_set.size if size is None else tuple(size)
    if size == found.shape[:2]:
        size = None
    parts = _parts(name, found, validation)

    def frames(recording: Recording) -> np.ndarray:
        with recordings.naming(recording):
            counts = recordings.integrate(found.read(recording), timesteps, found.shape, slicing)
        return counts if size is None else _resize(counts, size)

    shape = (timesteps, *(size or found.shape[:2]), 2) if len(found.shape) == 3 else (timesteps, *found.shape)
    if found.root is None:
        arrays = _in_memory(parts, frames)
    else:
        key = _key(name, found, parts, timesteps, slicing, size, skip_corrupt)
        folder = Path(cache_dir).expanduser() if cache_dir is not None else frame_cache.home() / "frames"
        arrays = _on_disk(folder / f"{name}-{key}", found, parts, frames, shape, skip_corrupt)
    channels = 2 if len(found.shape) == 3 else 1
    return DataSet(
        name,
        *(ArrayPart(*array) for array in arrays),
        classes=len(found.class_names),
        input_shape=shape,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        class_names=found.class_names,
    )


def _check_size(name: str, size: tuple[int, int] | None) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"{name} is (height, width) in pixels, each 1 or more. Received {name}={size!r}.")


def _root(name: str, data_set: EventSet, data_dir: str | Path | None, download: bool) -> Path | None:
    """The folder that holds the data set."""
    given = None if data_dir is None else Path(data_dir).expanduser()
    if data_set.tonic is None:
        return given
    given = given or frame_cache.home() / "data"
    places = [given / data_set.tonic, given]

    def there() -> list[Path]:
        return [place for place in places if all((place / needed).exists() for needed in data_set.needs)]

    if download and not there():
        from_tonic = getattr(recordings.tonic().datasets, data_set.tonic)
        if "train" in inspect.signature(from_tonic).parameters:
            for train in (True, False):
                from_tonic(str(given), train=train)
        else:
            from_tonic(str(given))
    if not there():
        raise missing(name, places, f"It has {' and '.join(data_set.needs)}. {data_set.prepare}")
    return there()[0]


def _natural(path: Path) -> list[int | str]:
    """Sorts 10 after 9."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", path.name)]


def _folders(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."), key=_natural)


def _in_class_folders(folder: Path, class_names: Sequence[str], suffixes: Sequence[str]) -> list[Recording]:
    """The recordings in FOLDER/CLASS, in the order of their numbers."""
    found = []
    for label, class_name in enumerate(class_names):
        place = folder / class_name
        there = place.iterdir() if place.is_dir() else ()
        files = [path for path in there if path.suffix in suffixes and path.name[0] != "."]
        if not files:
            raise ValueError(f"Each class has a folder with recordings ({', '.join(suffixes)}). {place} has none.")
        found += [Recording(path, label) for path in sorted(files, key=_natural)]
    return found


def _read(recording: Recording) -> np.ndarray:
    # The caller names the recording.
    return recordings.READERS[recording.source.suffix](recording.source)


_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DVS128 = (128, 128, 2)


def _find_dvs_cifar10(root: Path) -> Found:
    suffix = ".aedat" if any((root / _CIFAR10[0]).glob("*.aedat")) else ".aedat4"
    train, test = [], []
    for recording_class in _by_class(_in_class_folders(root, _CIFAR10, [suffix])):
        held_out = _share(len(recording_class), _TEST)
        train += recording_class[:-held_out]
        test += recording_class[-held_out:]
    return Found(train, test, _CIFAR10, _DVS128, _read, root)


def _find_nmnist(root: Path) -> Found:
    names = tuple("0123456789")
    train, test = (_in_class_folders(root / part, names, [".bin"]) for part in ("Train", "Test"))
    return Found(train, test, names, (34, 34, 2), _read, root)


def _find_poker_dvs(root: Path) -> Found:
    names = ("cl", "he", "di", "sp")
    train, test = (_in_class_folders(root / part, names, [".npy"]) for part in ("pips_train", "pips_test"))
    return Found(train, test, names, (35, 35, 2), _read, root)


_GESTURES = (
    "Hand clapping",
    "Right hand wave",
    "Left hand wave",
    "Right arm cw",
    "Right arm ccw",
    "Left arm cw",
    "Left arm ccw",
    "Arm roll",
    "Air drums",
    "Air guitar",
    "Other gestures",
)


def _find_dvs_gesture(root: Path) -> Found:
    def files(part: str) -> list[Recording]:
        paths = [path for user in _folders(root / part) for path in sorted(user.glob("*.npy"), key=_natural)]
        odd = [str(path) for path in paths if not path.stem.isdigit()]
        if odd:
            raise ValueError(f"Recordings of gestures are called by their label, 0.npy to 10.npy. Received {odd[0]}.")
        return [Recording(path, int(path.stem)) for path in paths]

    def read(recording: Recording) -> np.ndarray:
        # tonic's conversion has milliseconds.
        return recordings.read_npy(recording.source, columns=("x", "y", "p", "t"), unit=1000)

    return Found(files("ibmGestureTrain"), files("ibmGestureTest"), _GESTURES, _DVS128, read, root)


def _find_shd(root: Path) -> Found:
    tonic = recordings.tonic()
    import h5py  # tonic's

    # tonic asks for the archives beside the files, and for a folder that is called as the class is.
    prepared = type(root.name, (tonic.datasets.SHD,), {"_check_exists": lambda self: True})
    parts, sets = {}, {}
    for train, file_name in ((True, "shd_train.h5"), (False, "shd_test.h5")):
        path = root / file_name
        try:
            with h5py.File(path) as file:
                labels = file["labels"][:]
                names = tuple(key.decode() for key in file["extra/keys"][:])
            sets[path] = prepared(str(root.parent), train=train)
        except (OSError, KeyError) as error:
            raise RecordingError(f"{path}: the file cannot be read, it is truncated or corrupt ({error}).") from error
        parts[train] = [Recording(path, int(label), entry) for entry, label in enumerate(labels)]

    def read(recording: Recording) -> np.ndarray:
        try:
            return sets[recording.source][recording.entry][0]
        except (OSError, ValueError) as error:
            raise RecordingError(f"the entry cannot be read, it is truncated or corrupt ({error}).") from error

    return Found(parts[True], parts[False], names, (700,), read, root)


def _find_digits_events(_: Path | None) -> Found:
    digits = images.digits()
    camera = Saccades()
    parts = {part: getattr(digits, part) for part in ("train", "validation", "test")}
    events = {part: camera.record(held.x[..., 0] / 16) for part, held in parts.items()}
    listed = {
        part: [Recording(Path(part), int(label), entry) for entry, label in enumerate(held.labels)]
        for part, held in parts.items()
    }
    return Found(
        **listed,
        class_names=digits.class_names,
        shape=(camera.sensor, camera.sensor, 2),
        read=lambda recording: events[str(recording.source)][recording.entry],
        root=None,
    )


# Of cameras that a format is of, as a rule.
_SENSORS = {".aedat": _DVS128, ".bin": (34, 34, 2)}


def _find_folder(root: Path | None) -> Found:
    if root is None:
        raise ValueError("'folder' is a folder of recordings. Pass it as data_dir.")
    suffixes = sorted(recordings.READERS)
    prepare = f"Name a folder that has a folder of recordings ({', '.join(suffixes)}) for each class."
    if not root.is_dir():
        raise missing("folder", [root], prepare)
    folders = _folders(root)
    official = {path.name.lower(): path for path in folders if path.name.lower() in ("train", "test")}
    if official and len(official) != len(folders):
        raise ValueError(
            f"A folder of recordings has folders train and test and no others, or one folder a class. {root} has "
            f"{[path.name for path in folders]}."
        )
    if len(official) == 1:
        raise ValueError(f"A folder of recordings has both train and test, or neither. {root} has {list(official)}.")
    names = {part: tuple(path.name for path in _folders(place)) for part, place in official.items()}
    if official:
        if names["train"] != names["test"]:
            raise ValueError(f"train and test have the same classes. In {root}, {names}.")
        class_names = names["train"]
    else:
        class_names = tuple(path.name for path in folders)
    if not class_names:
        raise missing("folder", [root], prepare)
    if official:
        train, test = (_in_class_folders(official[part], class_names, suffixes) for part in ("train", "test"))
    else:
        train, test = _hold_out(_in_class_folders(root, class_names, suffixes), _TEST, class_names, draw=1)
    shapes = {_SENSORS.get(recording.source.suffix) for recording in (*train, *test)}
    return Found(train, test, class_names, shapes.pop() if len(shapes) == 1 else None, _read, root)


DATASETS = {
    "digits_events": EventSet(_find_digits_events),
    "dvs_cifar10": EventSet(
        _find_dvs_cifar10,
        size=(48, 48),
        tonic="CIFAR10DVS",
        needs=("airplane", "truck"),
        prepare="Unpack the ten archives of https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671 there "
        "(AEDAT-2.0, several GB), or let tonic download its copy with download=True (AEDAT-4; pip install aedat).",
    ),
    "nmnist": EventSet(
        _find_nmnist,
        tonic="NMNIST",
        needs=("Train", "Test"),
        prepare="Let tonic download it with download=True (about 1.2 GB), or unpack train.zip and test.zip of "
        "https://www.garrickorchard.com/datasets/n-mnist there.",
    ),
    "dvs_gesture": EventSet(
        _find_dvs_gesture,
        tonic="DVSGesture",
        needs=("ibmGestureTrain", "ibmGestureTest"),
        prepare="Let tonic download it with download=True (about 3 GB), or unpack tonic's ibmGestureTrain.tar.gz and "
        "ibmGestureTest.tar.gz there.",
    ),
    "poker_dvs": EventSet(
        _find_poker_dvs,
        tonic="POKERDVS",
        needs=("pips_train", "pips_test"),
        prepare="Unpack the data set's pips_train.tar.gz and pips_test.tar.gz (1 MB) there.",
    ),
    "shd": EventSet(
        _find_shd,
        tonic="SHD",
        needs=("shd_train.h5", "shd_test.h5"),
        prepare="Let tonic download it with download=True (about 0.2 GB), or unpack shd_train.h5.zip and "
        "shd_test.h5.zip of https://zenkelab.org/datasets/ there.",
    ),
    "folder": EventSet(_find_folder),
}


def _by_class(listed: Sequence[Recording]) -> list[list[Recording]]:
    classes: dict[int, list[Recording]] = {}
    for recording in listed:
        classes.setdefault(recording.label, []).append(recording)
    return [classes[label] for label in sorted(classes)]


def _share(count: int, part: float) -> int:
    """How many of `count` recordings of a class are a part of it, one at least."""
    return max(1, round(count * part))


def _hold_out(
    listed: Sequence[Recording], part: float, class_names: Sequence[str], draw: int
) -> tuple[list[Recording], list[Recording]]:
    """Cuts a part of each class off, drawn at random: the same for the same draw each time.

    Returns:
        The rest and the part, both in the order of `listed`.

    Raises:
        ValueError: if nothing would be left of a class.
    """
    rest, held_out = [], []
    for of_class in _by_class(listed):
        label, size = of_class[0].label, _share(len(of_class), part)
        if size >= len(of_class):
            raise ValueError(
                f"Class {class_names[label]!r} has {len(of_class)} recordings, of which {size} are to be set aside: "
                "none would be left. Add recordings, or set fewer aside."
            )
        chosen = set(np.random.default_rng([draw, label]).permutation(len(of_class))[:size].tolist())
        for number, recording in enumerate(of_class):
            (held_out if number in chosen else rest).append(recording)
    return rest, held_out


def _parts(name: str, found: Found, validation: float) -> dict[str, Sequence[Recording]]:
    """The recordings of each part."""
    for part, listed in (("training", found.train), ("test", found.test)):
        _check_classes(found, part, listed)
    if found.validation is not None:
        if validation != _DEFAULT_VALIDATION:
            raise ValueError(f"The parts of {name!r} are fixed. Leave validation out. Received {validation!r}.")
        return {"train": found.train, "validation": found.validation, "test": found.test}
    train, held_out = _hold_out(found.train, validation, found.class_names, draw=0) if validation else (found.train, [])
    return {"train": train, "validation": held_out, "test": found.test}


def _check_classes(found: Found, part: str, listed: Sequence[Recording]) -> None:
    classes = len(found.class_names)
    for recording in listed:
        if not 0 <= recording.label < classes:
            raise ValueError(f"Labels are in 0..{classes - 1}. {recording} has {recording.label}.")
    present = {recording.label for recording in listed}
    absent = [class_name for label, class_name in enumerate(found.class_names) if label not in present]
    if absent:
        raise ValueError(f"Each class has recordings. The {part} part in {found.root} has none of {absent}.")


def _resize(counts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return tf.image.resize(counts.astype("float32"), size, "bilinear", antialias=False).numpy()


def _in_memory(
    parts: dict[str, Sequence[Recording]], frames: Callable[[Recording], np.ndarray]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for listed in parts.values():
        x = np.stack([frames(recording) for recording in listed])
        yield x.astype(frame_cache.smallest(x)), _labels(listed)


def _labels(listed: Sequence[Recording]) -> np.ndarray:
    return np.array([recording.label for recording in listed], dtype="int32")


def _key(
    name: str,
    found: Found,
    parts: dict[str, Sequence[Recording]],
    timesteps: int,
    slicing: str,
    size: tuple[int, int] | None,
    skip_corrupt: bool,
) -> str:
    """What the frames depend on, as a name: other recordings or settings, another name."""
    digest = hashlib.sha256()
    settings = [_FORMAT, name, found.class_names, found.shape, timesteps, slicing, size, skip_corrupt]
    digest.update(json.dumps(settings).encode())
    state = functools.cache(Path.stat)
    for part, listed in parts.items():
        for recording in listed:
            status = state(recording.source)
            place = recording.source.relative_to(found.root).as_posix()
            entry = [part, place, recording.entry, recording.label, status.st_size, status.st_mtime_ns]
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()[:32]


def _on_disk(
    folder: Path,
    found: Found,
    parts: dict[str, Sequence[Recording]],
    frames: Callable[[Recording], np.ndarray],
    shape: tuple[int, ...],
    skip_corrupt: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Frames and labels of each part, mapped from the files in `folder`, which are made if they are not there."""

    def build(beside: Path) -> None:
        kept: dict[str, list[Recording]] = {}
        skipped = []
        with frame_cache.FrameWriter(beside / "frames.npy", sum(map(len, parts.values())), shape) as writer:
            for part, listed in parts.items():
                kept[part] = []
                for recording in listed:
                    try:
                        one = frames(recording)
                    except RecordingError as error:
                        if not skip_corrupt:
                            raise
                        skipped.append(str(error))
                        continue
                    writer.append(one)
                    kept[part].append(recording)
            if skipped:
                for part, listed in (("training", kept["train"]), ("test", kept["test"])):
                    _check_classes(found, f"usable {part}", listed)
        np.savez(beside / "labels.npz", **{part: _labels(listed) for part, listed in kept.items()})
        (beside / "skipped.json").write_text(json.dumps(skipped), encoding="utf-8")

    frame_cache.whole_folder(folder, build)
    skipped = json.loads((folder / "skipped.json").read_text(encoding="utf-8"))
    if skipped:
        warnings.warn(f"{len(skipped)} recordings are left out:\n" + "\n".join(skipped), stacklevel=4)
    x = np.load(folder / "frames.npy", mmap_mode="r")
    start = 0
    with np.load(folder / "labels.npz") as labels:
        for part in parts:
            yield x[start : start + len(labels[part])], labels[part]
            start += len(labels[part])

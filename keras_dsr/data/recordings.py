"""Recordings of event cameras: files to events, events to frames.

Events are a structured array with one entry an event, in the order of the file: `t` time in microseconds, `x` column,
`y` row, `p` polarity, 0 for OFF (darker) and 1 for ON (brighter). Sensors without rows and polarity have `t` and `x`.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

SLICINGS = ("number", "time")

_FIELDS = ("t", "x", "y", "p")
# jAER's layout of a DVS128 address: polarity in bit 0, column in bits 1..7, row in bits 8..14. Bits 15 and 31 mark
# entries that no pixel sent, such as those of the synchronisation input.
_DVS128_ADDRESS = 0x7FFF
_DVS128_SPECIAL = 0x8000_8000


class RecordingError(ValueError):
    """A recording that cannot be used: truncated, corrupt, of another sensor, or too short."""


@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """Puts the name of the recording ahead of what is wrong with it."""
    try:
        yield
    except RecordingError as error:
        raise RecordingError(f"{where}: {error}") from error


def tonic():
    """The tonic package.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import tonic as package
        import tonic.datasets
        import tonic.io
    except ImportError as error:
        raise ImportError(
            "Recordings of event cameras are read by tonic, which is not installed. Install it with: "
            "pip install 'keras-dsr[data]'."
        ) from error
    return package


def read(path: Path) -> np.ndarray:
    """The events of a recording.

    Args:
        path: A file that ends in
            `.aedat`: AEDAT-2.0 of a DVS128 camera;
            `.aedat4`: AEDAT-4, through tonic and the package aedat;
            `.bin`: the ATIS format of N-MNIST, through tonic;
            `.npz`: arrays of one dimension, `t`, `x`, `y` and `p`;
            `.npy`: a structured array with the fields `t`, `x`, `y` and `p`, or an array of shape (events, 4) with
            these columns.

    Returns:
        Structured array of shape (events,) with the fields `t`, `x`, `y` and `p`.

    Raises:
        ImportError: if the format needs a package that is not installed.
        RecordingError: if the file is truncated or corrupt.
        ValueError: if no reader is known for the suffix.
    """
    if path.suffix not in READERS:
        raise ValueError(f"A recording ends in one of {sorted(READERS)}. Received {str(path)!r}.")
    with naming(path):
        return READERS[path.suffix](path)


def read_aedat2(path: Path) -> np.ndarray:
    """The events of an AEDAT-2.0 recording of a DVS128 camera.

    Comment lines that begin with `#`, then pairs of big-endian uint32, address and time. An address a means
    x = 127 - ((a & 0xFE) >> 1), y = (a & 0x7F00) >> 8, p = 1 - (a & 1). Times that pass 2^32 microseconds go on rising.

    Raises:
        RecordingError: if the file is truncated, or not of this format and camera.

    Reference: jAER, `net.sf.jaer.eventio` and `ch.unizh.ini.jaer.chip.retina.DVS128`.
    """
    data = path.read_bytes()
    if not data.startswith(b"#!AER-DAT2"):
        raise RecordingError(f"an AEDAT-2.0 file starts with '#!AER-DAT2.0'. Received {data[:16]!r}.")
    start = 0
    while data[start : start + 1] == b"#":
        end = data.find(b"\n", start)
        if end < 0:
            raise RecordingError("the file ends within its header.")
        start = end + 1
    if (len(data) - start) % 8:
        raise RecordingError(f"the file is truncated: an event has 8 bytes, {(len(data) - start) % 8} are left over.")
    address, time = np.frombuffer(data, ">u4", offset=start).reshape(-1, 2).astype("u4").T
    sent = (address & _DVS128_SPECIAL) == 0
    address, time = address[sent], time[sent]
    if np.any(address > _DVS128_ADDRESS):
        raise RecordingError(
            f"addresses of a DVS128 camera have 15 bits. Received {int(address.max()):#x}: another camera, or corrupt."
        )
    if time.size:
        # The counter has 32 bits: differences in 32 bits are right across its overflow.
        time = int(time[0]) + np.cumsum(np.diff(time, prepend=time[:1]).view("i4"), dtype="i8")
    return _events(t=time, x=127 - ((address & 0xFE) >> 1).astype("i8"), y=(address & 0x7F00) >> 8, p=1 - (address & 1))


def read_bin(path: Path) -> np.ndarray:
    """The events of an N-MNIST recording: 40 bits an event (x, y, polarity, 23 bits of time).

    Raises:
        ImportError: if tonic, which reads it, is not installed.
        RecordingError: if the file is truncated.

    Reference: Orchard et al., "Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades",
    Frontiers in Neuroscience, 2015.
    """
    reader = tonic().io.read_mnist_file
    left_over = path.stat().st_size % 5
    if left_over:
        raise RecordingError(f"the file is truncated: an event has 5 bytes, {left_over} are left over.")
    # tonic fills the fields in this order, whatever they are called.
    return reader(str(path), dtype=np.dtype([(field, np.int64) for field in "xytp"]))


def read_aedat4(path: Path) -> np.ndarray:
    """The events of an AEDAT-4 recording.

    Raises:
        ImportError: if tonic or aedat, which read it, are not installed.
        RecordingError: if the file is truncated or corrupt.
    """
    reader = tonic().io.read_aedat4
    try:
        events = reader(str(path))
    except ImportError as error:
        raise ImportError(
            "AEDAT-4 recordings are read by the package aedat, which is not installed. Install it with: "
            "pip install aedat."
        ) from error
    except (OSError, MemoryError):  # of the machine, not of the recording
        raise
    except Exception as error:  # tonic raises no kind of its own
        raise RecordingError(f"the file cannot be read: {error}.") from error
    return _events(**dict(zip(_FIELDS, (events[name] for name in events.dtype.names), strict=True)))


def read_npz(path: Path) -> np.ndarray:
    """The events in arrays `t`, `x`, `y` and `p` of a `.npz` file.

    Raises:
        RecordingError: if the file is truncated or corrupt, or lacks an array.
    """
    return _events(**_named(_load(path), "arrays"))


def read_npy(path: Path, columns: Sequence[str] = _FIELDS, unit: int = 1) -> np.ndarray:
    """The events in a `.npy` file: a structured array, or one column a field.

    Args:
        path: The file.
        columns: What the columns are, where the array has no field names.
        unit: Microseconds in a unit of time of the file.

    Raises:
        RecordingError: if the file is truncated or corrupt, or has other columns.
    """
    array = _load(path)
    if array.dtype.names is None:
        if array.ndim != 2 or array.shape[1] != len(columns):
            raise RecordingError(
                f"events are a structured array with the fields {_FIELDS}, or of shape (events, {len(columns)}) with "
                f"the columns {tuple(columns)}. Received shape {array.shape}, {array.dtype}."
            )
        events = _events(**dict(zip(columns, array.T, strict=True)))
    else:
        events = _events(**_named({name: array[name] for name in array.dtype.names}, "fields"))
    events["t"] *= unit
    return events


READERS = {
    ".aedat": read_aedat2,
    ".aedat4": read_aedat4,
    ".bin": read_bin,
    ".npy": read_npy,
    ".npz": read_npz,
}


def _load(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    # Opened here, for NumPy leaves a file open that it cannot read.
    with path.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise RecordingError(f"the file cannot be read, it is truncated or corrupt ({error}).") from error


def _named(found: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    absent = [field for field in _FIELDS if field not in found]
    if absent:
        raise RecordingError(f"events have the {what} {_FIELDS}. Missing: {absent}.")
    return {field: found[field] for field in _FIELDS}


def _events(**fields: np.ndarray) -> np.ndarray:
    """A structured array of these fields: whole numbers, but for times that the file has as floats."""
    lengths = {name: np.shape(values) for name, values in fields.items()}
    if len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise RecordingError(f"each event has one of each of {list(fields)}. Received shapes {lengths}.")
    for name, values in fields.items():
        # NaN is not equal to itself, so it is refused too.
        whole = values.dtype.kind in "biu" or (
            values.dtype.kind == "f" and (np.isfinite(values).all() if name == "t" else np.all(values % 1 == 0))
        )
        if not whole:
            raise RecordingError(f"{name} has values that are not {'finite' if name == 't' else 'whole'} numbers.")
    kinds = {name: "f8" if name == "t" and values.dtype.kind == "f" else "i8" for name, values in fields.items()}
    events = np.empty(len(next(iter(fields.values()))), dtype=list(kinds.items()))
    for name, values in fields.items():
        events[name] = values
    return events


def integrate(events: np.ndarray, timesteps: int, shape: Sequence[int], slicing: str = "number") -> np.ndarray:
    """Counts of the events in each of N slices of a recording; each event counts once.

    By number, slice j of M events has the events floor(M / N) j to floor(M / N) (j + 1) - 1, and the last slice the
    remainder as well: the paper's. By time, the slices are N equal parts of the time from the first event to the last.

    Args:
        events: Structured array of shape (events,) with the fields `t`, `x`, and for cameras `y` and `p`.
        timesteps: N, the number of slices; 1 or more.
        shape: (height, width, 2) of a camera, or (channels,).
        slicing: "number" or "time".

    Returns:
        Integers of shape (timesteps, *shape). Of the two polarities, OFF is first.

    Raises:
        RecordingError: if an event is outside of the sensor, or there are no events, or fewer than slices by number.
        ValueError: if `timesteps` or `slicing` is not one of the above.

    Reference: Meng et al., CVPR 2022, Appendix; the integration by number of Fang et al., ICCV 2021.
    """
    check_slices(timesteps, slicing)
    shape = tuple(shape)
    axes = ("y", "x", "p") if len(shape) == 3 else ("x",)
    count = len(events)
    needed = timesteps if slicing == "number" else 1
    if count < needed:
        raise RecordingError(f"{count} events are too few for {timesteps} slices by {slicing}: at least {needed}.")
    for axis, extent in zip(axes, shape, strict=True):
        low, high = int(events[axis].min()), int(events[axis].max())
        if low < 0 or high >= extent:
            raise RecordingError(
                f"events are outside of the sensor: {axis} must be in 0..{extent - 1}. Received {low}..{high}."
            )
    if slicing == "number":
        step = np.minimum(np.arange(count) // (count // timesteps), timesteps - 1)
    else:
        elapsed = events["t"] - events["t"].min()
        # The last event ends the last slice, which it would else fall behind.
        step = np.minimum(elapsed * timesteps // (elapsed.max() or 1), timesteps - 1).astype("i8")
    place = np.ravel_multi_index((step, *(events[axis].astype(np.intp) for axis in axes)), (timesteps, *shape))
    return np.bincount(place, minlength=timesteps * int(np.prod(shape))).reshape(timesteps, *shape)


def check_slices(timesteps: int, slicing: str) -> None:
    """Refuses numbers and kinds of slices that there are not.

    Raises:
        ValueError: if `timesteps` is below 1 or `slicing` unknown.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps is a number of slices, 1 or more. Received timesteps={timesteps!r}.")
    if slicing not in SLICINGS:
        raise ValueError(f"slicing is one of {SLICINGS}. Received slicing={slicing!r}.")

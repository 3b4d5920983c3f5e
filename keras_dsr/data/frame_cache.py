"""Frames on disk: built once, whole or not at all, and mapped into memory afterwards."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from keras_dsr.files import synchronize

# How many frames are held at once where a file is copied.
_CHUNK = 64


def home() -> Path:
    """The folder of all that can be made again: $KERAS_DSR_CACHE, or ~/.cache/keras_dsr."""
    return Path(os.environ.get("KERAS_DSR_CACHE") or Path.home() / ".cache" / "keras_dsr")


def whole_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills, from an earlier call or from this one.

    It is built beside its place and renamed when it is complete and on disk. Of several processes that build it at a
    time, the first to be complete wins, and all use what it made. A process that is killed leaves a folder
    `.building-*` that nobody takes for complete; it may be deleted.

    Args:
        folder: The folder.
        build: Writes the files into the folder that it is given. If it raises, nothing is left.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".building-{folder.name}-{uuid.uuid4().hex}")
    beside.mkdir()
    try:
        build(beside)
        for file in beside.iterdir():
            synchronize(file)
        synchronize(beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        else:
            synchronize(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


class FrameWriter:
    """Writes arrays of one shape one after another to a `.npy` file, whose dtype grows as they ask for it.

    Files are written, not mapped: a disk that is full raises an error, where a mapping would end the process.

    Args:
        path: The file to make.
        count: How many arrays there may be. Where fewer come, the rest of the file is a hole.
        shape: Their shape.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...]) -> None:
        self._path = path
        self._shape = (count, *shape)
        self._written = 0
        self._dtype: np.dtype | None = None

    def append(self, frames: np.ndarray) -> None:
        """Writes one array: as it is if it has floats, else in the smallest unsigned integers that hold all so far."""
        dtype = smallest(frames)
        if self._dtype is None:
            self._start(dtype)
        elif dtype.itemsize > self._dtype.itemsize:
            self._widen(dtype)
        self._file.write(frames.astype(self._dtype).tobytes())
        self._written += 1

    def _start(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._file = self._path.open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._start_of_data = self._file.tell()

    def _widen(self, dtype: np.dtype) -> None:
        self.close()
        narrow_path = self._path.with_name("narrow.npy")
        self._path.rename(narrow_path)
        narrow = np.load(narrow_path, mmap_mode="r")
        self._start(dtype)
        for start in range(0, self._written, _CHUNK):
            self._file.write(narrow[start : min(start + _CHUNK, self._written)].astype(dtype).tobytes())
        del narrow
        narrow_path.unlink()

    def close(self) -> None:
        """Ends the file."""
        if self._dtype is not None and not self._file.closed:
            self._file.truncate(self._start_of_data + int(np.prod(self._shape)) * self._dtype.itemsize)
            self._file.close()

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def smallest(frames: np.ndarray) -> np.dtype:
    """The dtype of floats, or the smallest unsigned integers that hold all of these counts."""
    return frames.dtype if frames.dtype.kind == "f" else np.min_scalar_type(int(frames.max(initial=0)))

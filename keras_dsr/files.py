"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames what was written there to `path`.

    A reader finds the old file or the new one, never a part. If the block raises, `path` is as it was and nothing is
    left beside it. The path to write to ends as `path` does, for writers that go by the suffix.

    Args:
        path: The file to make or replace. Its folder must exist.

    Yields:
        The path to write to.
    """
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        synchronize(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def remove_left_over(path: Path) -> None:
    """Removes what `replacing` left beside `path` of processes that were killed as they wrote. None may be writing."""
    pattern = re.compile(rf"\.\d+-{re.escape(path.name)}")
    for entry in path.parent.iterdir():
        if pattern.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """Gives a new hidden folder on the file system of `path`, for what is renamed to `path`, or into it, once whole.

    The folder is away at the end unless it was renamed itself. It is locked as long as this process lives, which is how
    those that killed processes left for the same `path` are told from those that are being written to; they are removed
    first.

    Args:
        path: The file or folder to be. The folder that it is in must exist.

    Yields:
        The hidden folder: beside `path`, or in it if it is where another file system is mounted.
    """
    home = path if path.is_mount() else path.parent
    pattern = re.compile(rf"\.{re.escape(path.name)}-exporting-[0-9a-f]+")
    for entry in home.iterdir():
        if pattern.fullmatch(entry.name):
            _remove_if_abandoned(entry)
    folder, lock = _locked_folder(home, f".{path.name}-exporting-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def digest(path: Path) -> str | None:
    """What tells the content of a file from another; `None` if there is no file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return None


def synchronize(path: Path) -> None:
    """Has the disk write down a file, or which files a folder has; Windows cannot be asked for the latter."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked_folder(home: Path, prefix: str) -> tuple[Path, int | None]:
    while True:
        folder = home / f"{prefix}{secrets.token_hex(8)}"
        folder.mkdir()
        if fcntl is None:
            return folder, None
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process held it for abandoned, as it was not locked yet
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    if fcntl is None:
        return
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # put in place or removed meanwhile
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)

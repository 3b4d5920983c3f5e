"""Versions: found in a model's folder, loaded, warmed up, switched to, unloaded; no request is dropped on the way.

A version is a folder with a whole number for a name; whatever else lies beside it is left alone. The newest is served.
It takes over only once it is loaded and warmed up, and the one before it goes once its last request is answered. A
version that fails to load is refused with its reason, is not tried again until its files change, and the one before it
goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from keras_dsr.serving.errors import Code, ServingError, short

_LOGGER = logging.getLogger("keras_dsr.serving")
_LARGEST_VERSION = 2**63 - 1

T = TypeVar("T")


class State(enum.IntEnum):
    """What becomes of a version, with the numbers of `ModelVersionStatus.State`."""

    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclasses.dataclass(frozen=True)
class VersionStatus:
    """How a version stands.

    Args:
        version: Its number.
        state: Loading, available, unloading, or ended: unloaded or failed.
        code: OK, or what failed.
        message: Why it failed.
    """

    version: int
    state: State
    code: Code = Code.OK
    message: str = ""


class _Version(Generic[T]):
    """A loaded version, and how many requests use it."""

    def __init__(self, number: int, model: T):
        self.number = number
        self.model: T | None = model
        self.leases = 0
        self.retired = False


class _Model(Generic[T]):
    """All versions of one model. Its owner holds the lock."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.folder = folder
        self.serving: dict[int, _Version[T]] = {}
        self.status: dict[int, VersionStatus] = {}
        self.refused: dict[int, frozenset] = {}


class Manager(Generic[T]):
    """Keeps models up to date with their folders.

    One thread looks at all folders in turn, and loads what is new.

    Args:
        folders: The folder of each model's versions, by the model's name.
        load: From a model's name and a version's folder to what is served; it warms it up too.
        poll: Seconds between two looks.
        latest: How many of the newest versions to serve.
    """

    def __init__(self, folders: Mapping[str, Path], load: Callable[[str, Path], T], *, poll: float, latest: int):
        self._models = {name: _Model[T](name, Path(folder)) for name, folder in folders.items()}
        self._load = load
        self._poll = poll
        self._latest = latest
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keras-dsr-versions", daemon=True)

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self._models)

    def start(self) -> None:
        """Loads what is there, then goes on looking in a thread."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """Looks no more, and loads nothing after what is being loaded. Versions stay as they are."""
        self._stopped.set()

    def join(self) -> None:
        """Waits until what is being loaded is loaded, after `stop`."""
        if self._thread.is_alive():
            self._thread.join()

    @contextlib.contextmanager
    def lease(self, name: str, version: int | None = None) -> Iterator[tuple[int, T]]:
        """Lends a version; it is not unloaded before it is given back.

        Args:
            name: The model's name.
            version: Its version; the newest if `None`.

        Yields:
            The version's number, and what `load` gave.

        Raises:
            ServingError: INVALID_ARGUMENT if there is no name; NOT_FOUND if there is no such model or version.
        """
        if not name:
            raise ServingError(Code.INVALID_ARGUMENT, "ModelSpec has no name specified.")
        held = self._acquire(name, version)
        try:
            yield held.number, held.model
        finally:
            with self._lock:
                held.leases -= 1
                if held.retired and not held.leases:
                    self._end(self._models[name], held)

    def status(self, name: str, version: int | None = None) -> list[VersionStatus]:
        """How a model's versions stand, the newest first.

        Args:
            name: The model's name.
            version: Only this version.

        Raises:
            ServingError: NOT_FOUND if there is no such model or version.
        """
        with self._lock:
            known = dict(self._models[name].status) if name in self._models else {}
        if version is not None:
            if version not in known:
                raise ServingError(Code.NOT_FOUND, f"Could not find version {version} of model {short(name)}.")
            return [known[version]]
        if not known:
            raise ServingError(
                Code.NOT_FOUND,
                f"Could not find any versions of model {short(name)}. This server has: {self._listed()}.",
            )
        return [known[number] for number in sorted(known, reverse=True)]

    def _acquire(self, name: str, version: int | None) -> _Version[T]:
        with self._lock:
            model = self._models.get(name)
            if model is None:
                raise ServingError(
                    Code.NOT_FOUND,
                    f"Servable not found for request: Latest({short(name)}). This server has: {self._listed()}.",
                )
            number = max(model.serving, default=None) if version is None else version
            held = model.serving.get(number)
            if held is None:
                wanted = f"Latest({name})" if version is None else f"Specific({name}, {version})"
                available = ", ".join(map(str, sorted(model.serving))) or "none"
                raise ServingError(
                    Code.NOT_FOUND, f"Servable not found for request: {wanted}. Available versions: {available}."
                )
            held.leases += 1
            return held

    def _listed(self) -> str:
        return ", ".join(self._models)

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll):
            self._look()

    def _look(self) -> None:
        for model in self._models.values():
            try:
                self._update(model)
            except Exception:  # of whatever kind, it must not end the thread, nor keep others from new versions
                _LOGGER.exception("%s: looking for versions failed, and will be tried again", model.name)

    def _update(self, model: _Model[T]) -> None:
        """Loads what is new, then lets go of what is old."""
        try:
            found = _versions(model.folder)
        except OSError as error:
            _LOGGER.warning("%s: its folder cannot be read, and its versions stay as they are: %s", model.name, error)
            return
        for number, fingerprint in list(model.refused.items()):
            if number not in found or _fingerprint(found[number]) != fingerprint:
                del model.refused[number]
        wanted: list[int] = []
        for number in sorted(found, reverse=True):
            if self._stopped.is_set():
                return
            if len(wanted) == self._latest:
                break
            if number in model.refused:
                continue
            if number in model.serving or self._add(model, number, found[number]):
                wanted.append(number)
        if wanted or not found:
            self._retire(model, keep=wanted)

    def _add(self, model: _Model[T], number: int, path: Path) -> bool:
        """Loads a version and serves it; whether that worked."""
        fingerprint = _fingerprint(path)  # before: what is written meanwhile is a change
        self._set(model, VersionStatus(number, State.LOADING))
        started = time.monotonic()
        try:
            loaded = self._load(model.name, path)
        except Exception as error:  # a damaged file may fail in any way, and must not end the thread
            model.refused[number] = fingerprint
            code = error.code if isinstance(error, ServingError) else _code_of(error)
            reason = error.message if isinstance(error, ServingError) else f"{type(error).__name__}: {error}"
            self._set(model, VersionStatus(number, State.END, code, reason))
            _LOGGER.error("%s: version %s is refused: %s", model.name, number, reason)
            return False
        with self._lock:
            model.serving[number] = _Version(number, loaded)
            model.status[number] = VersionStatus(number, State.AVAILABLE)
        _LOGGER.info("%s: version %s is served, after %.1f s", model.name, number, time.monotonic() - started)
        return True

    def _retire(self, model: _Model[T], keep: list[int]) -> None:
        with self._lock:
            for number in [number for number in model.serving if number not in keep]:
                held = model.serving.pop(number)
                held.retired = True
                model.status[number] = VersionStatus(number, State.UNLOADING)
                if not held.leases:
                    self._end(model, held)

    def _end(self, model: _Model[T], held: _Version[T]) -> None:
        """The lock is held: nobody uses the version, and nobody can ask for it."""
        held.model = None
        if held.number not in model.serving:
            model.status[held.number] = VersionStatus(held.number, State.END)
        _LOGGER.info("%s: version %s is unloaded", model.name, held.number)

    def _set(self, model: _Model[T], status: VersionStatus) -> None:
        with self._lock:
            model.status[status.version] = status


def _versions(folder: Path) -> dict[int, Path]:
    """The versions in a folder, by number."""
    found = {}
    for path in folder.iterdir():
        if path.name.isascii() and path.name.isdigit() and int(path.name) <= _LARGEST_VERSION and path.is_dir():
            found[int(path.name)] = path
    return found


def _fingerprint(path: Path) -> frozenset:
    """Changes when a file of a version does."""
    files = set()
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            try:
                stat = file.stat()
                files.add((str(file), stat.st_size, stat.st_mtime_ns))
            except OSError as error:  # it cannot be read, or is being removed
                files.add((str(file), error.errno))
    return frozenset(files)


def _code_of(error: Exception) -> Code:
    number = getattr(error, "error_code", None)  # TensorFlow's own errors
    if number is not None:
        return Code(number)
    return Code.NOT_FOUND if isinstance(error, FileNotFoundError) else Code.UNKNOWN

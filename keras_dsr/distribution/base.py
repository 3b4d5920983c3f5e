"""What a training asks of where it runs; by itself the answers of one device."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dsr
from keras_dsr.files import digest

if TYPE_CHECKING:
    import tensorflow as tf

# What the sums of two processes depend on, beside their processors: modules, as one comes in packages of several names.
_MODULES = {"tensorflow": ("keras", "numpy", "tensorflow"), "jax": ("keras", "numpy", "tensorflow", "jax", "jaxlib")}
# Within this time a network file system shows all machines what one of them wrote.
_SEEN_WITHIN_S = 60.0
# Of the texts that processes compare, how much they exchange.
TEXT_BYTES = 2**14


class Strategy:
    """Where a training runs: here, one device.

    Attributes:
        name: One of `keras_dsr.distribution.DEVICES`, or "one".
        replicas: Over how many parts a batch is spread.
        devices: How many devices take part, in all processes; more than `replicas` if several share a model.
        processes: How many processes take part.
        process: Which of them this is, from 0. The first one, the chief, writes the files.
    """

    name = "one"
    replicas = 1
    devices = 1
    processes = 1
    process = 0

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.process == 0

    @property
    def description(self) -> str:
        """The strategy in words."""
        return f"{self.name}, {self.devices} devices in {self.processes} processes"

    def facts(self) -> dict[str, Any]:
        """What a run must go on with, to come to the same weights."""
        return {"strategy": self.name, "replicas": self.replicas, "processes": self.processes}

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """In it models are built, compiled and trained. Outside of it they are of this process alone."""
        return contextlib.nullcontext()

    def prepare(self, model: keras.Model) -> keras.Model:
        """The model to compile and train in place of one that was built in `scope`, with the same layers.

        Under `tf.distribute` these are marked with how they run (`synchronized` of normalizations, which stands in
        their config, and `jit_compile` of neurons). For a model without marks, `keras_dsr.checkpoints.copy` the trained
        one into one that is built and compiled anew, outside of `scope`.

        Raises:
            ValueError: if the strategy cannot train such a model.
        """
        return model

    def jit_compile(self, wanted: bool | str) -> bool | str:
        """What `keras.Model.compile` gets as `jit_compile`."""
        return wanted

    def own(self, batch_size: int) -> range | None:
        """The places of a global batch that this process uses; `None` for all.

        Args:
            batch_size: Examples in a global batch.

        Raises:
            ValueError: if a batch cannot be spread evenly, see `check_batch_size`.
        """
        return None

    def training_batches(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        """What `fit` gets: of each global batch the parts of this process's replicas.

        Args:
            batches: Global batches, the same in each process at the places that are its own.
            batch_size: Examples in each.
        """
        return batches

    def evaluation_batches(self, batches: tf.data.Dataset, count: int, batch_size: int) -> tuple[Any, int | None]:
        """What `evaluate` gets, and how many steps a pass over it has; `None` to go on to its end.

        Args:
            batches: Global batches of one pass, the same in each process at the places that are its own; the last may
                be smaller.
            count: Examples in all of them.
            batch_size: Examples in each but the last; see `evaluation_batch_size`.
        """
        return batches, None

    def evaluation_batch_size(self, wanted: int) -> int:
        """A size near `wanted` that is spread evenly."""
        return max(wanted // self.replicas, 1) * self.replicas

    def check_batch_size(self, batch_size: int) -> None:
        """Makes sure that a batch can be spread evenly.

        Raises:
            ValueError: if it cannot.
        """
        if batch_size % self.replicas:
            near = max(batch_size // self.replicas, 1) * self.replicas
            raise ValueError(
                f"A batch is spread evenly over {self.replicas} replicas. Received batch_size={batch_size!r}; set it "
                f"to {near}, or another multiple of {self.replicas}."
            )

    def gather(self, text: str) -> list[str]:
        """A text of each process, in their order. All of them must call this, and wait here for one another."""
        return [text]

    def agree(self, what: str, text: str) -> None:
        """Makes sure that all processes have the same text, which says `what` they have.

        Raises:
            ValueError: if one has another.
        """
        self._compare(what, self.gather(text))

    def _compare(self, what: str, texts: list[str]) -> None:
        other = [process for process, text in enumerate(texts) if text != texts[0]]
        if other:
            raise ValueError(
                f"All processes must have the same {what}. The chief has {texts[0]}, process {other[0]} has "
                f"{texts[other[0]]}. Mend that and start all of them again."
            )

    def check_versions(self) -> None:
        """Makes sure that all processes have the same packages.

        Raises:
            ValueError: if one has another version of one.
        """
        mine = json.dumps(versions())
        every = [json.loads(text) for text in self.gather(mine)]
        differing = [name for name in every[0] if len({each.get(name) for each in every}) > 1]
        if differing:
            told = [
                f"process {i}: {', '.join(f'{name} {each[name]}' for name in differing)}"
                for i, each in enumerate(every)
            ]
            raise ValueError(
                f"All processes must have the same versions. Received {'; '.join(told)}. Install the same everywhere."
            )

    def on_chief(self, action: Callable[[], Any]) -> Any:
        """Has the chief do something that the others wait for.

        Returns:
            What it came to, in the chief; `None` elsewhere.

        Raises:
            ValueError: in the others, if the chief failed; there, the error itself.
        """
        result, told = self._tried(action if self.is_chief else None)
        if told[0]:
            raise ValueError(f"The chief failed: {told[0]}")
        return result

    def everyone(self, action: Callable[[], Any]) -> Any:
        """Has each process do something, and makes sure that all could.

        Returns:
            What it came to in this process.

        Raises:
            ValueError: if another process failed; in that one, the error itself.
        """
        result, told = self._tried(action)
        failed = [process for process, text in enumerate(told) if text]
        if failed:
            raise ValueError(f"Process {failed[0]} failed: {told[failed[0]]}")
        return result

    def _tried(self, action: Callable[[], Any] | None) -> tuple[Any, list[str]]:
        """What an action came to, and the error of each process, or ""; raises this one's."""
        error, result = None, None
        if action is not None:
            try:
                result = action()
            except Exception as raised:  # told to the others, then raised
                error = raised
        told = self.gather("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        return result, told

    def see(self, path: Path) -> bool:
        """Waits until all processes see a file as the chief does, which may have written it just now.

        A network file system may show it to others some seconds late.

        Returns:
            Whether there is such a file.

        Raises:
            FileNotFoundError: in all processes, if one does not see it, or sees another, after a minute.
        """
        mine = digest(path) or ""
        wanted = self.gather(mine)[0]
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while mine != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
            mine = digest(path) or ""
        found = self.gather(mine)
        other = [process for process, text in enumerate(found) if text != wanted]
        if other:
            theirs = "another" if found[other[0]] else "none"
            raise FileNotFoundError(
                f"All processes of a training need the same folder. The chief has {path if wanted else f'no {path}'}, "
                f"and process {other[0]} has {theirs if wanted else 'one'} there."
            )
        return bool(wanted)

    def lost(self, error: BaseException) -> bool:
        """Whether an error says that another process is gone."""
        return False


def versions() -> dict[str, str]:
    """The versions that all processes of a training must share, of the Keras backend and of what it runs with."""
    modules = _MODULES[keras.backend.backend()]
    return {
        "python": platform.python_version(),
        "keras_dsr": keras_dsr.__version__,
        **{name: importlib.import_module(name).__version__ for name in modules},
    }


def check_backend(path: Path, begun: str) -> None:
    """Makes sure that a run goes on with the Keras backend that it was begun with.

    Args:
        path: The run folder, or the file that says so, for the error.
        begun: The backend that it was begun with.

    Raises:
        ValueError: if this is another one.
    """
    if begun != keras.backend.backend():
        raise ValueError(
            f"{path} was begun with the Keras backend {begun!r} and goes on to the same weights only with it. Received "
            f"{keras.backend.backend()!r}; set KERAS_BACKEND={begun}."
        )


def check_devices(path: Path, begun: Mapping[str, Any], devices: Mapping[str, Any]) -> None:
    """Makes sure that a run goes on with the devices that it was begun on.

    Args:
        path: The run folder, or the file that says so, for the error.
        begun: What it was begun on, as `Strategy.facts` says.
        devices: What it is to go on with, likewise.

    Raises:
        ValueError: if they differ.
    """
    if begun != devices:
        names = {**begun, **devices}
        pairs = ", ".join(f"{name}={begun.get(name)!r} and received {devices.get(name)!r}" for name in names)
        raise ValueError(
            f"{path} was begun on other devices and goes on to the same weights only with as many. Expected {pairs}. "
            "Choose devices and replicas as they were, or name another folder."
        )


def as_row(text: str) -> np.ndarray:
    """A text as int32 of shape (TEXT_BYTES,), one number a byte, zeros behind: what collectives can carry.

    What is longer is cut off.
    """
    raw = np.frombuffer(text.encode()[:TEXT_BYTES], "uint8")
    return np.pad(raw.astype("int32"), (0, TEXT_BYTES - len(raw)))


def as_text(row: np.ndarray) -> str:
    """The text of a row that `as_row` made."""
    return bytes(row.astype("uint8")).rstrip(b"\0").decode(errors="replace")


def tell_waiting(process: int, processes: int, addresses: list[str]) -> None:
    """Says on standard error for what this process waits, as the engines wait without a word.

    Args:
        process: Which of the processes this is.
        processes: How many there are.
        addresses: Of all processes, or of the first one alone, where they meet.
    """
    if len(addresses) == processes:
        addresses = [address for number, address in enumerate(addresses) if number != process]
    if processes > 1:
        where = ", ".join(addresses)
        print(f"Process {process} of {processes} waits for the others: {where}", file=sys.stderr, flush=True)


def check_port(address: str, variable: str) -> None:
    """Makes sure that this process can listen at its address.

    Args:
        address: "host:port".
        variable: The environment variable that says so.

    Raises:
        ValueError: if it is no such address.
        OSError: if the port is taken.
    """
    port = check_address(address, variable)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # What a process that is gone left behind does not count, what another listens at does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            why = (
                "is taken by another process" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
            )
            raise OSError(
                f"Port {port} of {address!r}, where {variable} says that this process listens, {why}. Name a free port "
                f"there in the {variable} of every process, or end what listens at it."
            ) from error


def check_address(address: Any, variable: str) -> int:
    """The port of an address "host:port".

    Raises:
        ValueError: if it is no such address.
    """
    found = re.fullmatch(r"(?:[^:\s]+|\[[0-9a-fA-F:]+\]):(\d+)", address) if isinstance(address, str) else None
    if found is None or not 0 < int(found[1]) < 65536:
        raise ValueError(f"{variable} has addresses such as '10.0.0.1:2222'. Received {address!r}.")
    return int(found[1])


@contextlib.contextmanager
def as_known_error(strategy: Strategy) -> Iterator[None]:
    """Says in plain words that another process is gone.

    Raises:
        ConnectionError: if it is.
    """
    try:
        yield
    except Exception as error:
        if strategy.lost(error):
            raise ConnectionError(
                "Another process of this training is gone. End the others and start all of them again with the same "
                "folder: the run goes on from its last epoch, to the same weights."
            ) from error
        raise

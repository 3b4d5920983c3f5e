"""What a training asks of where it runs; by itself the answers of one device."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import platform
import re
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

import keras_dsr

if TYPE_CHECKING:
    import tensorflow as tf

# What the sums of two processes depend on, beside their processors.
_PACKAGES = ("keras", "tensorflow", "jax", "jaxlib", "numpy")
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
        """The model to compile and train in place of one that was built in `scope`, with the same layers."""
        return model

    def jit_compile(self, wanted: bool | str) -> bool | str:
        """What `keras.Model.compile` gets as `jit_compile`."""
        return wanted

    def training_batches(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        """What `fit` gets: of each global batch the parts of this process's replicas.

        Args:
            batches: Global batches, the same in each process.
            batch_size: Examples in each.
        """
        return batches

    def evaluation_batches(self, batches: tf.data.Dataset, count: int, batch_size: int) -> tuple[Any, int | None]:
        """What `evaluate` gets, and how many steps a pass over it has; `None` to go on to its end.

        Args:
            batches: Global batches of one pass, the same in each process; the last may be smaller.
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
        error, result = None, None
        if self.is_chief:
            try:
                result = action()
            except Exception as raised:  # told to the others, then raised
                error = raised
        told = self.gather("" if error is None else f"{type(error).__name__}: {error}")[0]
        if error is not None:
            raise error
        if told:
            raise ValueError(f"The chief failed: {told}")
        return result

    def lost(self, error: BaseException) -> bool:
        """Whether an error says that another process is gone."""
        return False


def versions() -> dict[str, str | None]:
    """The versions that all processes of a training must share; `None` for a package that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "keras_dsr": keras_dsr.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def as_row(text: str) -> np.ndarray:
    """A text as int32 of shape (TEXT_BYTES,), one number a byte, zeros behind: what collectives can carry.

    What is longer is cut off.
    """
    raw = np.frombuffer(text.encode()[:TEXT_BYTES], "uint8")
    return np.pad(raw.astype("int32"), (0, TEXT_BYTES - len(raw)))


def as_text(row: np.ndarray) -> str:
    """The text of a row that `as_row` made."""
    return bytes(row.astype("uint8")).rstrip(b"\0").decode(errors="replace")


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

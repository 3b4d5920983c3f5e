"""A client for TensorFlow Serving's API: this package's server, or the stock one."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from keras_dsr.serving.errors import Code, ServingError, needs_extra

T = TypeVar("T")
INIT_OP = "__saved_model_init_op"  # listed among the signatures, and is none
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between attempts; it doubles each time
_STATE = "next_"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for a prediction.

    Args:
        outputs: The outputs by name.
        version: The version that answered; `None` over REST, which does not say.
    """

    outputs: dict[str, np.ndarray]
    version: int | None


@dataclasses.dataclass(frozen=True)
class SignatureTypes:
    """The tensors of a signature.

    Args:
        inputs: NumPy types by name; `object` for strings.
        outputs: The same for what comes out.
    """

    inputs: Mapping[str, np.dtype]
    outputs: Mapping[str, np.dtype]


class Transport(Protocol):
    """How requests travel. Each method raises `ServingError`, with UNAVAILABLE if nothing answers."""

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], types: SignatureTypes, timeout: float
    ) -> Answer:
        """Runs a signature."""

    def metadata(self, timeout: float) -> dict[str, SignatureTypes]:
        """The model's signatures by name."""

    def status(self, timeout: float) -> dict[int, str]:
        """The states of the model's versions by number."""

    def close(self) -> None:
        """Lets go of connections."""


class Client:
    """Asks a server for predictions. Several threads may share one.

    Args:
        address: Host and port, such as "127.0.0.1:8500" for gRPC or "127.0.0.1:8501" for REST.
        model: The model's name.
        version: Its version; the newest if `None`.
        transport: "grpc" or "rest".
        timeout: Seconds for a call, its repetitions included. Over REST they bound each wait for the server: to
            connect, and for each piece of its answer; one that comes slowly may take longer as a whole.
        retries: How often a call is repeated if the server is not there, or says UNAVAILABLE. Requests change nothing
            on the server, so repeating them is safe.

    Raises:
        ImportError: if the extra `serve` is not installed.
        ValueError: if an argument is out of its range.

    Example:
        with Client("127.0.0.1:8500", "digits") as client:
            classes = client.predict(images)["class"]
    """

    def __init__(
        self,
        address: str,
        model: str,
        version: int | None = None,
        *,
        transport: str = "grpc",
        timeout: float = 30.0,
        retries: int = 3,
    ):
        if timeout <= 0:
            raise ValueError(f"timeout must be above 0 seconds. Received timeout={timeout}.")
        if retries < 0:
            raise ValueError(f"retries must be at least 0. Received retries={retries}.")
        self._transport = _transport(transport, address, model, version)
        self._timeout = timeout
        self._retries = retries
        self._types: dict[str, SignatureTypes] | None = None
        self._lock = threading.Lock()

    def predict(
        self, inputs: np.ndarray | Mapping[str, Any], signature: str = "serving_default"
    ) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            inputs: The signature's inputs by name, or the array itself if there is one. Numbers are cast to the
                signature's types as long as this keeps their kind, such as float64 to float32, and whole numbers to
                any whole type that holds them; others are sent as they are, for the server to refuse.
            signature: Its name.

        Returns:
            The outputs by name.

        Raises:
            ServingError: if whole numbers do not fit the signature's type, or the server refuses, fails, or does not
                answer in time.
        """
        return self.answer(inputs, signature).outputs

    def answer(self, inputs: np.ndarray | Mapping[str, Any], signature: str = "serving_default") -> Answer:
        """Runs a signature as `predict` does, and says which version answered."""

        def attempt(timeout: float) -> Answer:
            started = time.monotonic()
            types = self._signature(signature, timeout)
            arrays = _cast(inputs, signature, types)
            return self._transport.predict(signature, arrays, types, max(1e-3, timeout - time.monotonic() + started))

        try:
            return self._repeat(attempt)
        except ServingError:
            with self._lock:  # perhaps a new version takes other types
                self._types = None
            raise

    def signature(self, name: str) -> SignatureTypes:
        """The types of a signature's tensors, remembered from the last time.

        Raises:
            ServingError: if there is none of that name, or the server does not answer in time.
        """
        return self._repeat(lambda timeout: self._signature(name, timeout))

    def metadata(self) -> dict[str, SignatureTypes]:
        """The model's signatures by name, with the types of their tensors.

        Raises:
            ServingError: if the server refuses, fails, or does not answer in time.
        """
        return self._repeat(self._transport.metadata)

    def status(self) -> dict[int, str]:
        """The states of the model's versions, such as "AVAILABLE", by number; a failed one's with the reason.

        Raises:
            ServingError: if the server refuses, fails, or does not answer in time.
        """
        return self._repeat(self._transport.status)

    def stream(self, batch_size: int = 1) -> Stream:
        """Feeds a network one time step after another, through its signatures `initial_state` and `step`.

        Args:
            batch_size: How many streams go on side by side, as the rows of a batch.
        """
        return Stream(self, batch_size)

    def close(self) -> None:
        """Lets go of connections."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _signature(self, name: str, timeout: float) -> SignatureTypes:
        with self._lock:
            known = self._types
        if known is None or name not in known:  # not asked yet, or before a new version came
            known = self._transport.metadata(timeout)
            with self._lock:
                self._types = known
        if name not in known:
            raise ServingError(
                Code.FAILED_PRECONDITION, f"The model has no signature {name!r}. It has: {', '.join(sorted(known))}."
            )
        return known[name]

    def _repeat(self, attempt: Callable[[float], T]) -> T:
        deadline = time.monotonic() + self._timeout
        pause, left = _FIRST_PAUSE, self._retries
        while True:
            try:
                return attempt(max(1e-3, deadline - time.monotonic()))
            except ServingError as error:
                # Random, lest many clients that failed together come back together.
                wait = pause * random.uniform(0.5, 1.0)
                if error.code is not Code.UNAVAILABLE or not left or time.monotonic() + wait >= deadline:
                    raise
            time.sleep(wait)
            pause, left = min(2 * pause, _LONGEST_PAUSE), left - 1


class Stream:
    """Streams through a network whose state the client keeps; the server forgets everything between two steps.

    Args:
        client: Asks the server.
        batch_size: How many streams go on side by side.
    """

    def __init__(self, client: Client, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1. Received batch_size={batch_size}.")
        self._client = client
        self._batch_size = batch_size
        self._state: dict[str, np.ndarray] | None = None

    @property
    def state(self) -> dict[str, np.ndarray]:
        """What the network remembers, by name, each with the streams on dimension 0."""
        if self._state is None:
            self._state = self._initial()
        return dict(self._state)

    def step(self, frame: np.ndarray) -> dict[str, np.ndarray]:
        """Feeds the next time step of every stream.

        Args:
            frame: (batch, ...), a row for each stream.

        Returns:
            The outputs by name, without the state.

        Raises:
            ServingError: if the server refuses, fails, or does not answer in time; the streams are then where they
                were, and the step can be repeated. INVALID_ARGUMENT after a new version has come may mean that its
                state is of another form: `reset` then.
        """
        state = self.state
        types = self._client.signature("step")
        inputs = [name for name in types.inputs if name not in state]
        if len(inputs) != 1:
            raise ServingError(
                Code.FAILED_PRECONDITION,
                f"The signature 'step' must take one input besides the state. It takes {inputs} besides "
                f"{sorted(state)}.",
            )
        outputs = self._client.predict({inputs[0]: frame, **state}, "step")
        missing = [name for name in state if _STATE + name not in outputs]
        if missing:
            raise ServingError(Code.FAILED_PRECONDITION, f"The signature 'step' gives no {_STATE}... for {missing}.")
        self._state = {name: outputs.pop(_STATE + name) for name in state}
        return outputs

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Starts streams anew.

        Args:
            rows: Which of them; all if `None`.

        Raises:
            ServingError: if the server does not give the initial state.
        """
        if rows is None:
            self._state = None
            return
        fresh, state = self._initial(), self.state
        for name, array in state.items():
            state[name] = array.copy()
            state[name][list(rows)] = fresh[name][list(rows)]
        self._state = state

    def _initial(self) -> dict[str, np.ndarray]:
        return self._client.predict(np.arange(self._batch_size, dtype=np.int64), "initial_state")


def _transport(kind: str, address: str, model: str, version: int | None) -> Transport:
    if kind not in ("grpc", "rest"):
        raise ValueError(f"transport must be 'grpc' or 'rest'. Received transport={kind!r}.")
    try:
        if kind == "grpc":
            from keras_dsr.serving.grpc_transport import GrpcTransport

            return GrpcTransport(address, model, version)
        from keras_dsr.serving.rest_transport import RestTransport

        return RestTransport(address, model, version)
    except ModuleNotFoundError as error:
        raise needs_extra(error) from error


def _cast(inputs: np.ndarray | Mapping[str, Any], signature: str, types: SignatureTypes) -> dict[str, np.ndarray]:
    if not isinstance(inputs, Mapping):
        if len(types.inputs) != 1:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"{signature!r} takes {', '.join(types.inputs)}. Received one array; give a dict of arrays.",
            )
        inputs = {next(iter(types.inputs)): inputs}
    return {name: _as_type(name, np.asarray(value), types.inputs.get(name)) for name, value in inputs.items()}


def _as_type(name: str, array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """The array in the signature's type if that keeps the kind of its numbers; otherwise as it is."""
    if dtype is None or dtype.kind == "O":
        return array
    if array.size and array.dtype.kind in "iu" and dtype.kind in "iu":
        limits, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            takes = f"Input {name!r} takes {dtype}, from {limits.min} to {limits.max}."
            raise ServingError(Code.INVALID_ARGUMENT, f"{takes} Received values from {low} to {high}.")
        return array.astype(dtype, copy=False)
    return array.astype(dtype, copy=False) if np.can_cast(array.dtype, dtype, "same_kind") else array

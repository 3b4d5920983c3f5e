"""A request from a model's name to its outputs, the same for gRPC and REST."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_dsr.serving import saved_model
from keras_dsr.serving.batching import Batcher
from keras_dsr.serving.errors import Code, ServingError, short
from keras_dsr.serving.manager import Manager
from keras_dsr.serving.metrics import Metrics
from keras_dsr.serving.saved_model import DEFAULT_SIGNATURE, SavedModel, Signature


@dataclasses.dataclass(frozen=True)
class Served:
    """A version that is being served.

    Args:
        model: The SavedModel.
        batchers: What joins requests, for each signature whose tensors have a batch dimension.
    """

    model: SavedModel
    batchers: Mapping[str, Batcher]


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads versions for `Manager`.

    Args:
        metrics: Is told how long loading took, and the sizes of batches.
        max_batch_size: How many examples to join.
        batch_timeout: Seconds that a batch waits to be filled.
        max_queue: How many requests may wait for one signature.
        stopped: Once it is set, no request begins to run.
    """

    metrics: Metrics
    max_batch_size: int
    batch_timeout: float
    max_queue: int
    stopped: threading.Event

    def __call__(self, name: str, path: Path) -> Served:
        """Reads a version of the model of that name and warms it up."""
        started = time.perf_counter()
        model = saved_model.load(path)
        batchers = {
            signature.name: Batcher(
                signature.run,
                max_batch_size=self.max_batch_size,
                batch_timeout=self.batch_timeout,
                max_queue=self.max_queue,
                stopped=self.stopped,
                observe=lambda size: self.metrics.batch(name, size),
            )
            for signature in model.signatures.values()
            if signature.batched
        }
        self.metrics.loaded(name, time.perf_counter() - started)
        return Served(model, batchers)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What came out, and of what.

    Args:
        version: The version that answered.
        signature: The signature's name.
        outputs: Its outputs by name.
    """

    version: int
    signature: str
    outputs: dict[str, np.ndarray]


class Turns:
    """How many predictions there may be at one time.

    Args:
        most: As many.
    """

    def __init__(self, most: int):
        self._most = most
        self._free = threading.Semaphore(most)

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Counts a prediction while it is answered.

        Raises:
            ServingError: RESOURCE_EXHAUSTED if there are as many as may be.
        """
        if not self._free.acquire(blocking=False):
            raise ServingError(
                Code.RESOURCE_EXHAUSTED,
                f"{self._most} requests are being answered, which is as many as may be. Try again later.",
            )
        try:
            yield
        finally:
            self._free.release()


class Predictor:
    """Answers prediction requests.

    Args:
        models: The models.
        metrics: Is told how long signatures run.
        max_examples: How many examples a request may have.
        allow_non_finite: Whether NaN and infinity may be among the inputs.
    """

    def __init__(self, models: Manager[Served], metrics: Metrics, *, max_examples: int, allow_non_finite: bool):
        self._models = models
        self._metrics = metrics
        self._max_examples = max_examples
        self._allow_non_finite = allow_non_finite

    def predict(
        self,
        name: str,
        version: int | None,
        signature_name: str,
        read: Callable[[Signature], Mapping[str, np.ndarray]],
        *,
        output_filter: Sequence[str] = (),
        deadline: float | None = None,
    ) -> Prediction:
        """Runs a signature.

        Args:
            name: The model's name.
            version: Its version; the newest if `None`.
            signature_name: The signature; `serving_default` for "".
            read: Gives the request's inputs, as the signature takes them.
            output_filter: Names of the outputs to give; all if empty.
            deadline: Until when the request may wait for its turn, by `time.monotonic`.

        Raises:
            ServingError: with what the request did wrong, or the model.
        """
        with self._models.lease(name, version) as (number, served):
            signature = served.model.signature(signature_name)
            _check_filter(output_filter, signature)
            inputs = read(signature)
            signature.check(inputs, self._allow_non_finite)
            self._check_examples(inputs, signature)
            started = time.perf_counter()
            batcher = served.batchers.get(signature.name)
            outputs = signature.run(inputs) if batcher is None else batcher.submit(inputs, deadline)
            self._metrics.runtime(name, time.perf_counter() - started)
        if output_filter:
            outputs = {output: outputs[output] for output in output_filter}
        return Prediction(number, signature_name or DEFAULT_SIGNATURE, outputs)

    def _check_examples(self, inputs: Mapping[str, np.ndarray], signature: Signature) -> None:
        """Refuses large batches: a few bytes an example can become a large state."""
        for name, spec in signature.inputs.items():
            if spec.batched and len(inputs[name]) > self._max_examples:
                raise ServingError(
                    Code.INVALID_ARGUMENT,
                    f"A request may have {self._max_examples} examples. Received {len(inputs[name])} in {name!r}. Send "
                    "smaller batches, or start the server with a larger --max-examples.",
                )


def _check_filter(output_filter: Sequence[str], signature: Signature) -> None:
    for output in output_filter:
        if output not in signature.outputs:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"output tensor alias not found in signature: {short(output)}. {signature.name!r} gives "
                f"{', '.join(signature.outputs)}.",
            )
    if len(set(output_filter)) < len(output_filter):
        raise ServingError(Code.INVALID_ARGUMENT, f"duplicate output tensor alias in {short(list(output_filter))}.")

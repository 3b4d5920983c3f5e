"""Adding streams, and dropping parts of them."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_dsr import backend
from keras_dsr.layers.base import StreamLayer
from keras_dsr.stream import Stream


@keras.saving.register_keras_serializable(package="keras_dsr")
class Add(StreamLayer):
    """Adds two or more streams: the residual connection.

    Forward: the sum of the values at every step, and of the representations. Backward: the representations' alone.

    Input shape:
        A list of streams, all of the same shape: `Add()([a, b])`.

    Output shape:
        A `Stream` of that shape.

    Raises:
        ValueError: if there are fewer than two streams or their shapes differ.
        TypeError: if there is a tensor among them.

    Reference: Meng et al., CVPR 2022, Eq. 17.
    """

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, Stream) or not isinstance(inputs, (list, tuple)):
            raise ValueError(f"{self._title} expects a list of two or more streams. Received {type(inputs).__name__}.")
        return super().__call__([tuple(each) if isinstance(each, Stream) else each for each in inputs], **kwargs)

    def _streams(self, inputs: Any) -> list[Stream]:
        streams = [self._stream(each) for each in inputs]
        if len(streams) < 2:
            raise ValueError(f"{self._title} expects a list of two or more streams. Received {len(streams)}.")
        shapes = [tuple(each.values.shape) for each in streams]
        if any(not _same(shapes[0], shape) for shape in shapes[1:]):
            raise ValueError(
                f"{self._title} expects streams of one shape. Received values of shapes {shapes}; bring them to one "
                "shape, for example with a 1x1 convolution in a keras_dsr.layers.Synapse."
            )
        return streams

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def call(self, inputs: Any) -> Stream:
        streams = self._streams(inputs)
        values = self.infer_values(*(ops.stop_gradient(each.values) for each in streams))
        return Stream(values, self.infer_representation(*(each.representation for each in streams)))

    def infer_values(self, *values: Any) -> Any:
        return sum(values[1:], values[0])

    def infer_representation(self, *representations: Any) -> Any:
        return sum(representations[1:], representations[0])

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Stream:
        first = self._streams(inputs)[0]
        return self._symbolic(first.values.shape, first.representation.shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]


def _same(first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    return len(first) == len(second) and all(
        a == b or a is None or b is None for a, b in zip(first, second, strict=True)
    )


@keras.saving.register_keras_serializable(package="keras_dsr")
class Dropout(StreamLayer):
    """Drops features of a stream at random, in training, the same at all time steps.

    Forward: values and representation times one mask, which is 0 with probability `rate` and 1 / (1 - rate)
    otherwise, drawn anew for each sample. Backward: the representation's, times the mask. Which samples of a batch lose
    which features does not depend on the number of replicas that the batch is spread over.

    Args:
        rate: The probability to drop a feature, in [0, 1).
        seed: Seed of the mask's random numbers, or `None`.
        **kwargs: `name` and `dtype`, as every Keras layer has them.

    Input shape:
        A `Stream` with values (batch, time, ...) and representation (batch, ...).

    Output shape:
        A `Stream` of the same shape.

    Raises:
        ValueError: if `rate` is not in [0, 1).
        TypeError: if the input is a tensor and not a stream.
    """

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate, the probability to drop a feature, must be in [0, 1). Received rate={rate!r}.")
        self.rate = float(rate)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def call(self, inputs: Any, training: bool = False) -> Stream:
        values, representation = self._stream(inputs)
        values = ops.stop_gradient(values)
        if not training or self.rate == 0:
            return Stream(values, representation)
        mask = backend.draw(
            lambda ones: keras.random.dropout(ones, self.rate, seed=self.seed_generator), ops.ones_like(representation)
        )
        return Stream(values * ops.expand_dims(mask, 1), representation * mask)

    def infer_values(self, values: Any) -> Any:
        return values

    def infer_representation(self, representation: Any) -> Any:
        return representation

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}

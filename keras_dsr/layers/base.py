"""What every layer that takes or gives streams has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_dsr.stream import Stream, as_stream, is_stream


class StreamLayer(keras.layers.Layer):
    """A layer that can be called with a stream.

    Keras is handed the stream's two tensors as a plain tuple: that is what it records in a model's graph, saves, and
    calls the layer with when the model runs. Subclasses make a `Stream` of it again (`keras_dsr.stream.as_stream`).
    The output has the shape of the input unless a subclass says otherwise.
    """

    takes_tensors = False

    # What a layer does in inference to each half of a stream, the same at every time step, if that is all it does.
    infer_values: Callable[..., Any] | None = None
    infer_representation: Callable[..., Any] | None = None

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.takes_tensors and not is_stream(inputs):
            self._stream(inputs)  # raises, before Keras builds the layer for a wrong shape
        return super().__call__(tuple(inputs) if isinstance(inputs, Stream) else inputs, *args, **kwargs)

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} {self.name!r}"

    def _stream(self, inputs: Any) -> Stream:
        return as_stream(inputs, self._title)

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        stream = self._stream(inputs)
        return self._symbolic(stream.values.shape, stream.representation.shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def _symbolic(self, values_shape: Any, representation_shape: Any) -> Stream:
        return Stream(
            keras.KerasTensor(tuple(values_shape), dtype=self.compute_dtype),
            keras.KerasTensor(tuple(representation_shape), dtype=self.compute_dtype),
        )

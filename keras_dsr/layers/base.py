"""What every layer that takes or gives streams has in common."""

from __future__ import annotations

from typing import Any

import keras

from keras_dsr.stream import Stream, as_stream, is_stream


class StreamLayer(keras.layers.Layer):
    """A layer that can be called with a stream.

    Keras is handed the stream's two tensors as a plain tuple: that is what it records in a model's graph, saves,
    and calls the layer with when the model runs. Subclasses make a `Stream` of it again (`keras_dsr.stream.as_stream`).
    """

    takes_tensors = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and not self.takes_tensors and not is_stream(args[0]):
            self._stream(args[0])  # raises, before Keras builds the layer for a wrong shape
        args = tuple(tuple(arg) if isinstance(arg, Stream) else arg for arg in args)
        kwargs = {name: tuple(arg) if isinstance(arg, Stream) else arg for name, arg in kwargs.items()}
        return super().__call__(*args, **kwargs)

    @property
    def _title(self) -> str:
        return f"{type(self).__name__} {self.name!r}"

    def _stream(self, inputs: Any) -> Stream:
        return as_stream(inputs, self._title)

    def _symbolic(self, values_shape: Any, representation_shape: Any) -> Stream:
        return Stream(
            keras.KerasTensor(tuple(values_shape), dtype=self.compute_dtype),
            keras.KerasTensor(tuple(representation_shape), dtype=self.compute_dtype),
        )

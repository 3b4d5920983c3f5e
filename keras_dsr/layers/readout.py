"""Into a stream and out of it: `ToStream`, `ToTensor`, and the network's readout `SpikeRep`."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_dsr import backend
from keras_dsr import coding as codings
from keras_dsr.layers.base import StreamLayer
from keras_dsr.layers.neurons import check_timesteps
from keras_dsr.stream import Stream, check_float, is_stream, without_steps


@keras.saving.register_keras_serializable(package="keras_dsr")
class SpikeRep(StreamLayer):
    """The readout of a network: the spike representation r(x), one number for a train of spikes.

    Forward: of a stream its representation; of a tensor sum_n w_n x[n]. Backward: of a stream straight to the
    representation; of a tensor w_n to step n.

    Args:
        coding: The weights w_n, for tensors: "rate" (default), "weighted_rate", or a coding
            (`keras_dsr.RateCoding()`, `keras_dsr.WeightedRateCoding(tau, dt)`). A stream brings its own.
        **kwargs: `name` and `dtype`, as every Keras layer has them.

    Input shape:
        A `Stream`, or a tensor (batch, time, ...).

    Output shape:
        A tensor (batch, ...).

    Raises:
        ValueError: if `coding` is not a coding, or a tensor has no time axis.
        TypeError: if the input is not of floats.

    Example:

    >>> import numpy as np
    >>> float(SpikeRep()(np.array([[[0.0], [2.0], [0.0], [2.0]]], "float32"))[0, 0])
    1.0

    Reference: Meng et al., CVPR 2022, Section 3.2.
    """

    takes_tensors = True

    def __init__(self, coding: Any = "rate", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coding = codings.get(coding)

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def call(self, inputs: Any) -> Any:
        if is_stream(inputs):
            return self._stream(inputs).representation
        _check_time_axis(inputs, self._title)
        return self.coding.represent(inputs)

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        if is_stream(inputs):
            shape = self._stream(inputs).representation.shape
        else:
            _check_time_axis(inputs, self._title)
            shape = (inputs.shape[0], *inputs.shape[2:])
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        if isinstance(input_shape[0], (tuple, list)):
            return tuple(input_shape[1])
        return (input_shape[0], *input_shape[2:])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "coding": keras.saving.serialize_keras_object(self.coding)}


@keras.saving.register_keras_serializable(package="keras_dsr")
class ToStream(StreamLayer):
    """Makes a stream of a tensor with a time axis, such as the frames of an event camera.

    Forward: the values are the tensor, the representation is r(x). Backward: w_n to step n.

    Args:
        coding: The weights w_n: "rate" (default), "weighted_rate", or a coding. Use that of the neurons that follow:
            `keras_dsr.WeightedRateCoding(tau, dt)` for `LIFSpike(tau=tau, dt=dt)`.
        timesteps: `None` to take all time steps of the input; 0 for a stream of the representation alone, which
            makes an ordinary ANN of the network that follows; a number N to insist on N steps.
        **kwargs: `name` and `dtype`, as every Keras layer has them.

    Input shape:
        A tensor (batch, time, ...).

    Output shape:
        A `Stream` with values (batch, time, ...) and representation (batch, ...).

    Raises:
        ValueError: if the input has no time axis, or not `timesteps` steps.
        TypeError: if the input is not of floats.
    """

    takes_tensors = True

    def __init__(self, coding: Any = "rate", timesteps: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coding = codings.get(coding)
        self.timesteps = check_timesteps(timesteps)

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def _check(self, inputs: Any) -> None:
        if is_stream(inputs):
            raise TypeError(f"{self._title} expects a tensor (batch, time, ...). Received a stream already.")
        _check_time_axis(inputs, self._title)
        steps = inputs.shape[1]
        if self.timesteps and steps is not None and steps != self.timesteps:
            raise ValueError(
                f"{self._title} has timesteps={self.timesteps}, but its input has {steps} time steps: received shape "
                f"{tuple(inputs.shape)}. Cut the input into {self.timesteps} steps, or leave timesteps out."
            )

    def call(self, inputs: Any) -> Stream:
        self._check(inputs)
        representation = self.coding.represent(inputs)
        if self.timesteps == 0:
            return without_steps(representation)
        return Stream(ops.stop_gradient(inputs), representation)

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Stream:
        self._check(inputs)
        return self._symbolic(*self.compute_output_shape(tuple(inputs.shape)))

    def compute_output_shape(self, input_shape: Any) -> Any:
        batch, steps, *features = input_shape
        return (batch, steps if self.timesteps is None else self.timesteps, *features), (batch, *features)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "coding": keras.saving.serialize_keras_object(self.coding),
            "timesteps": self.timesteps,
        }


@keras.saving.register_keras_serializable(package="keras_dsr")
class ToTensor(StreamLayer):
    """Makes a plain tensor of a stream, for layers that want a time axis.

    Forward: the values. Backward: the cotangent, summed over time, goes to the representation.

    Args:
        **kwargs: `name` and `dtype`, as every Keras layer has them.

    Input shape:
        A `Stream` with values (batch, time, ...) and representation (batch, ...).

    Output shape:
        A tensor (batch, time, ...).

    Raises:
        ValueError: if the stream has zero time steps.
        TypeError: if the input is a tensor and not a stream.
    """

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def _steps(self, inputs: Any) -> Stream:
        stream = self._stream(inputs)
        if stream.timesteps == 0:
            raise ValueError(
                f"{self._title} received a stream of zero time steps, which has a representation alone (timesteps=0). "
                "Use keras_dsr.layers.SpikeRep() to get it."
            )
        return stream

    def call(self, inputs: Any) -> Any:
        values, representation = self._steps(inputs)
        return backend.carry(ops.stop_gradient(values), representation)

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        return keras.KerasTensor(self._steps(inputs).values.shape, dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return tuple(input_shape[0])


def _check_time_axis(inputs: Any, owner: str) -> None:
    check_float(inputs.dtype, owner)
    if len(inputs.shape) < 3 or inputs.shape[1] == 0:
        raise ValueError(
            f"{owner} expects (batch, time, ...) with at least one time step and one axis of features. "
            f"Received shape {tuple(inputs.shape)}."
        )

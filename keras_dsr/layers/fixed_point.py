"""What networks of exact sums begin with, and have in the place of normalization.

See `keras_dsr.export.exact` and `keras_dsr.export.integer`.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import backend
from keras_dsr.stream import check_float


@keras.saving.register_keras_serializable(package="keras_dsr")
class FixedPoint(keras.layers.Layer):
    """Rounds to whole multiples of a step, within limits.

    Forward: step round(clip(x, -limit, limit) / step), halves to the even multiple. Backward: that of the clip.

    Args:
        step: Distance of neighbouring numbers: a power of two, so that nothing else is rounded.
        limit: Largest absolute value: a whole multiple of the step, and at most 2^24 steps.
        **kwargs: `name` and `dtype`, as every Keras layer has them.

    Input shape:
        Any, of floats.

    Output shape:
        The same.

    Raises:
        ValueError: if `step` is no power of two, or `limit` no such multiple of it.
        TypeError: if the input is not of floats.

    Example:

    >>> import numpy as np
    >>> np.asarray(FixedPoint(step=0.25, limit=2.0)(np.array([0.3, -0.1, 7.0], "float32"))).tolist()
    [0.25, 0.0, 2.0]
    """

    def __init__(self, step: float, limit: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not (math.isfinite(step) and step > 0 and math.frexp(step)[0] == 0.5):
            raise ValueError(f"step is a power of two, such as 0.25. Received step={step!r}.")
        steps = limit / step
        if not (math.isfinite(steps) and 1 <= steps <= 2**24 and steps == int(steps)):
            raise ValueError(
                f"limit is a whole multiple of step, from 1 to 2^24 steps. Received step={step!r}, limit={limit!r}."
            )
        self.step = float(step)
        self.limit = float(limit)

    def build(self, input_shape: Any) -> None:
        """There is nothing to build."""

    def call(self, inputs: Any) -> Any:
        check_float(inputs.dtype, f"FixedPoint {self.name!r}")
        clipped = ops.clip(inputs, -self.limit, self.limit)
        # Rounding, + 0: no number is -0.
        rounded = ops.round(clipped / self.step) * self.step + 0.0
        return backend.carry(ops.stop_gradient(rounded), clipped)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "step": self.step, "limit": self.limit}


@keras.saving.register_keras_serializable(package="keras_dsr")
class Scale(keras.layers.Layer):
    """Normalization in inference, in its shortest form: gamma (x - mean) + beta, channel by channel.

    Each of the three operations is rounded on its own, in every runtime and under XLA: none is fused with another or
    multiplied into the kernel of the layer ahead. On a stream it stands in a `Synapse(Scale(), affine=True)`.

    Args:
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        (batch, ..., channels).

    Output shape:
        The same.

    Example:

    >>> import numpy as np
    >>> scale = Scale()
    >>> scale.build((None, 2))
    >>> scale.set_weights([np.array([2.0, 1.0]), np.array([0.5, 0.0]), np.array([0.0, 3.0])])  # gamma, mean, beta
    >>> np.asarray(scale(np.ones((1, 2), "float32"))).tolist()
    [[1.0, 4.0]]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1],)
        self.gamma = self.add_weight(name="gamma", shape=shape, initializer="ones")
        self.mean = self.add_weight(name="mean", shape=shape, initializer="zeros")
        self.beta = self.add_weight(name="beta", shape=shape, initializer="zeros")

    def call(self, inputs: Any, mask: Any = None) -> Any:
        # Masks are for statistics, and there are none: it takes one since normalizations do, in whose place it stands.
        # A maximum that changes no finite number keeps compilers and converters from joining what is around it.
        least = float(np.finfo("float16" if self.compute_dtype == "float16" else "float32").min)
        centred = ops.maximum(inputs - self.mean, least)
        return ops.maximum(centred * self.gamma, least) + self.beta

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


@keras.saving.register_keras_serializable(package="keras_dsr")
class Requantize(keras.layers.Layer):
    """Makes of sums of whole numbers whole numbers of few bits: round((x + bias) scale), channel by channel.

    Forward: step clip(round((x + bias) scale), -2^(bits - 1), 2^(bits - 1) - 1), halves to the even number; with 8 bits
    and a step of 1 what ONNX's QLinearConv does behind its sums. Backward: that of the clip. On a stream it stands in a
    `Synapse(Requantize(), affine=True)`: it is affine but for what it rounds.

    Args:
        bits: Of the whole numbers, from 2 to 24.
        step: What they are multiplied with: a power of two.
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        (batch, ..., channels).

    Output shape:
        The same.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> import numpy as np
    >>> requantize = Requantize()
    >>> requantize.build((None, 2))
    >>> requantize.set_weights([np.array([0.5, 0.25]), np.array([0.0, -2.0])])  # scale, bias
    >>> np.asarray(requantize(np.array([[3.0, 9.0]], "float32"))).tolist()
    [[2.0, 2.0]]
    """

    def __init__(self, bits: int = 8, step: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 24:
            raise ValueError(f"bits is a whole number from 2 to 24. Received bits={bits!r}.")
        if not (math.isfinite(step) and step > 0 and math.frexp(step)[0] == 0.5):
            raise ValueError(f"step is a power of two, such as 0.25. Received step={step!r}.")
        self.bits = bits
        self.step = float(step)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the largest whole number."""
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def build(self, input_shape: Any) -> None:
        shape = (input_shape[-1],)
        self.scale = self.add_weight(name="scale", shape=shape, initializer="ones")
        self.bias = self.add_weight(name="bias", shape=shape, initializer="zeros")

    def call(self, inputs: Any) -> Any:
        # A maximum that changes no finite number keeps converters from multiplying the scale into a kernel.
        summed = ops.maximum(inputs + self.bias, float(np.finfo("float32").min))
        clipped = ops.clip(summed * self.scale, *self.limits)
        whole = backend.carry(ops.stop_gradient(ops.round(clipped)), clipped)
        return whole if self.step == 1 else whole * self.step

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bits": self.bits, "step": self.step}

"""Affine layers with weights of few bits, trained by straight-through estimation.

Forward, a kernel w is rounded to whole multiples of one step for each output channel:

    q = round(w / step),  step = max|w| / (2^(bits - 1) - 1);  the layer computes with q step

Backward, rounding is taken for the identity. The weight that trains and is saved stays float; biases do too. Under
mixed precision the kernel that is rounded has half precision, which is coarser than the upper ones of 8 bits' levels.

Reference: Meng et al., CVPR 2022, Table 7 (8 and 4 bits); Bengio et al., "Estimating or Propagating Gradients Through
Stochastic Neurons for Conditional Computation", 2013, for the estimator.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_dsr import backend


def check_bits(bits: Any) -> int:
    """`bits`, if it is a whole number from 2 to 16; else a ValueError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise ValueError(f"bits, the width of a weight, is a whole number from 2 to 16. Received bits={bits!r}.")
    return bits


def quantize(kernel: Any, bits: int) -> tuple[Any, Any]:
    """A kernel as whole numbers and their step.

    Args:
        kernel: Floats of shape (..., outputs).
        bits: Width of the whole numbers, from 2 to 16.

    Returns:
        q, of the kernel's shape and dtype, whole numbers from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1; and the step of
        each output channel, of shape (outputs,), above 0. The quantized kernel is q step.

    Example:

    >>> import numpy as np
    >>> q, step = quantize(np.array([[0.6, 2.0], [-1.0, 0.4]], "float32"), bits=4)
    >>> np.asarray(q).astype(int).tolist()
    [[4, 7], [-7, 1]]
    """
    levels = 2 ** (bits - 1) - 1
    largest = ops.max(ops.abs(kernel), axis=tuple(range(len(kernel.shape) - 1)))
    step = ops.where(largest > 0, largest, ops.ones_like(largest)) / levels
    # The largest weight may come out a rounding beyond the last level.
    return ops.clip(ops.round(kernel / step), -levels, levels), step


def straight_through(kernel: Any, bits: int) -> Any:
    """The quantized kernel q step, with the gradient of `kernel`."""
    kernel = ops.convert_to_tensor(kernel)
    q, step = quantize(kernel, bits)
    return backend.carry(ops.stop_gradient(q * step), kernel)


@keras.saving.register_keras_serializable(package="keras_dsr")
class QuantizedConv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` whose kernel has few bits: see `keras_dsr.layers.quantized`.

    Args:
        filters: As in `keras.layers.Conv2D`.
        kernel_size: As in `keras.layers.Conv2D`.
        bits: Width of a weight, from 2 to 16.
        **kwargs: The other arguments of `keras.layers.Conv2D`.

    Raises:
        ValueError: if `bits` is out of range.
    """

    def __init__(self, filters: int, kernel_size: Any, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(filters, kernel_size, **kwargs)
        self.bits = check_bits(bits)

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, straight_through(kernel, self.bits))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bits": self.bits}


@keras.saving.register_keras_serializable(package="keras_dsr")
class QuantizedDense(keras.layers.Dense):
    """`keras.layers.Dense` whose kernel has few bits: see `keras_dsr.layers.quantized`.

    Args:
        units: As in `keras.layers.Dense`.
        bits: Width of a weight, from 2 to 16.
        **kwargs: The other arguments of `keras.layers.Dense`.

    Raises:
        ValueError: if `bits` is out of range.
    """

    def __init__(self, units: int, bits: int = 8, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.bits = check_bits(bits)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        outputs = ops.matmul(inputs, straight_through(self.kernel, self.bits))
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bits": self.bits}

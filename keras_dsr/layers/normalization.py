"""Batch normalization over batch and time."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_dsr import backend
from keras_dsr.layers.base import StreamLayer
from keras_dsr.stream import Stream, without_steps


@keras.saving.register_keras_serializable(package="keras_dsr")
class BatchNormalization(StreamLayer, keras.layers.BatchNormalization):
    """Normalizes currents with the statistics of batch and time together.

    Forward, with the mean mu and variance v of the values over batch, time and all axes but `axis` (in training; in
    inference the moving ones):

        values:          gamma (x[n] - mu) / sqrt(v + eps) + beta     at every step
        representation:  gamma (r - mu) / sqrt(v + eps) + beta        which is r of the values, as the map is affine

    Backward, on the representation alone: mu has the gradient of r's mean over the batch, v that of r's variance over
    the batch. In inference, or with `trainable=False`, both are constants.

    Weights, arguments and defaults are those of `keras.layers.BatchNormalization` (momentum 0.99, epsilon 0.001); the
    paper's networks have momentum 0.9 and epsilon 1e-5, and so has `keras_dsr.models`.

    Args:
        axis: The axis of the features (channels), counted without the time axis, as in (batch, ...).
        momentum: What the moving statistics keep of themselves in an update.
        epsilon: Added to the variance.
        center: Whether there is a beta.
        scale: Whether there is a gamma.
        beta_initializer: Initializer of beta.
        gamma_initializer: Initializer of gamma.
        moving_mean_initializer: Initializer of the moving mean.
        moving_variance_initializer: Initializer of the moving variance.
        beta_regularizer: Regularizer of beta, or `None`.
        gamma_regularizer: Regularizer of gamma, or `None`.
        beta_constraint: Constraint of beta, or `None`.
        gamma_constraint: Constraint of gamma, or `None`.
        synchronized: Whether all replicas of a `tf.distribute` strategy share their statistics. On JAX they do
            already, and it raises an error.
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        A `Stream` with values (batch, time, ...) and representation (batch, ...).

    Output shape:
        A `Stream` of the same shape.

    Raises:
        TypeError: if the input is a tensor and not a stream. For a static input ahead of the first neuron use
            `keras.layers.BatchNormalization`: its statistics are the same.

    Reference: Meng et al., CVPR 2022, Eq. 31.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise TypeError(f"axis is the number of one axis, the features'. Received axis={axis!r}.")
        if any(name.startswith("renorm") for name in kwargs):
            raise TypeError(
                "BatchNormalization over batch and time has no batch renormalization: the statistics are those of "
                f"Eq. 31. Received {sorted(kwargs)}; leave the renorm arguments out."
            )
        super().__init__(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            synchronized=synchronized,
            **kwargs,
        )

    def build(self, input_shape: Any) -> None:
        shape = tuple(input_shape[1])
        super().build(shape)
        self.input_spec = None  # it speaks of one tensor
        self._feature_axis = self.axis % len(shape)

    def call(self, inputs: Any, training: bool | None = None) -> Stream:
        values, representation = self._stream(inputs)
        if not (training and self.trainable):
            normalized = self.infer_representation(representation)
            if values.shape[1] == 0:
                return without_steps(normalized)
            return Stream(ops.stop_gradient(self.infer_values(ops.stop_gradient(values))), normalized)

        wide = ops.cast(representation, self._wide(representation))
        moments = ops.moments(wide, axes=self._all_but(self._feature_axis, wide), synchronized=self.synchronized)
        currents = None
        if values.shape[1] != 0:
            currents, *pooled = self._normalize_values(values, None)
            # The value is the simulation's, the gradient that of the representation's moments.
            moments = tuple(map(backend.carry, pooled, moments))
        self._update(self.moving_mean, moments[0])
        self._update(self.moving_variance, moments[1])
        normalized = self._normalize_representation(wide, moments)
        return without_steps(normalized) if currents is None else Stream(currents, normalized)

    def infer_values(self, values: Any) -> Any:
        return self._normalize_values(values, self._moving(self._wide(values)))[0]

    def infer_representation(self, representation: Any) -> Any:
        wide = ops.cast(representation, self._wide(representation))
        return self._normalize_representation(wide, self._moving(wide.dtype))

    @staticmethod
    def _wide(x: Any) -> str:
        return backend.wide(x.dtype)

    def _moving(self, dtype: Any) -> tuple[Any, Any]:
        return ops.cast(self.moving_mean, dtype), ops.cast(self.moving_variance, dtype)

    def _affine(self, dtype: Any) -> tuple[Any, Any]:
        """gamma and beta, or what stands for them."""
        gamma = ops.cast(self.gamma, dtype) if self.scale else ops.ones(self.moving_mean.shape, dtype)
        beta = ops.cast(self.beta, dtype) if self.center else ops.zeros(self.moving_mean.shape, dtype)
        return gamma, beta

    def _normalize_representation(self, wide: Any, moments: tuple[Any, Any]) -> Any:
        gamma, beta = self._affine(wide.dtype)
        normalized = ops.batch_normalization(
            wide, *moments, axis=self._feature_axis, offset=beta, scale=gamma, epsilon=self.epsilon
        )
        return ops.cast(normalized, self.compute_dtype)

    def _normalize_values(self, values: Any, moments: Any) -> tuple[Any, Any, Any]:
        """The normalized values, and the moments that they were normalized with: the given ones, or their own."""
        gamma, beta = (ops.stop_gradient(x) for x in self._affine(self._wide(values)))
        values = ops.stop_gradient(values)
        axis, last = self._feature_axis + 1, len(values.shape) - 1
        if moments is None and self.synchronized:
            moments = ops.moments(ops.cast(values, gamma.dtype), axes=self._all_but(axis, values), synchronized=True)
        if moments is not None:
            moments = tuple(ops.stop_gradient(x) for x in moments)
        values = ops.swapaxes(values, axis, last) if axis != last else values
        normalized, mean, variance = backend.batch_norm(values, gamma, beta, self.epsilon, moments)
        normalized = ops.swapaxes(normalized, axis, last) if axis != last else normalized
        return tuple(ops.stop_gradient(x) for x in (normalized, mean, variance))

    @staticmethod
    def _all_but(axis: int, x: Any) -> list[int]:
        return [each for each in range(len(x.shape)) if each != axis]

    def _update(self, moving: Any, statistic: Any) -> None:
        current = ops.cast(moving, statistic.dtype)
        moving.assign(current * self.momentum + ops.stop_gradient(statistic) * (1.0 - self.momentum))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        return {name: config[name] for name in config if not name.startswith("renorm")}

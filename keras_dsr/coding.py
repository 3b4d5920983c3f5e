"""Spike codings: how a train of spikes, or of currents, stands for one real number.

A coding weights the time steps n = 1..N with w_n that add up to 1, and represents x[1..N] by

    r(x) = sum_n w_n x[n].

Neurons whose output is coded so are, up to a bounded error, a clamp of what they receive. The clamp is what
training differentiates: see `keras_dsr.layers.IFSpike`.

- `RateCoding`, for integrate-and-fire neurons: w_n = 1 / N.
- `WeightedRateCoding`, for leaky integrate-and-fire neurons: w_n proportional to lambda^(N - n).

Reference: Meng et al., "Training High-Performance Low-Latency Spiking Neural Networks by Differentiation on
Spike Representation", CVPR 2022, Sections 3.2 and 4.1.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import backend


@dataclasses.dataclass(frozen=True)
class Coding(abc.ABC):
    """Weights that decay by one ratio from each time step to the one before; what all codings share.

    A subclass says the ratio, the bound, the clamp and what it clamps. Codings are immutable, compare by their
    arguments, and Keras serialises them.
    """

    @property
    @abc.abstractmethod
    def decay(self) -> float:
        """The ratio w_n / w_(n+1) of neighbouring weights, in (0, 1]."""

    @abc.abstractmethod
    def bound(self, threshold: Any) -> Any:
        """b, the largest representation that a neuron with this threshold can put out."""

    @abc.abstractmethod
    def clamp(self, representation: Any, threshold: Any) -> Any:
        """The neuron's output representation, as a function of its input's."""

    @abc.abstractmethod
    def unclamped(self, representation: Any) -> Any:
        """What the clamp bounds: the output representation of a neuron that no bound holds."""

    def rounded_clamp(self, representation: Any, threshold: Any, width: float) -> Any:
        """The clamp with rounded corners: the mean of `clamp` over logistic noise in its input.

        With x the unclamped representation, b the bound and s = width b, the noise's scale, through which no gradient
        passes,

            s log(1 + e^(x / s)) - s log(1 + e^((x - b) / s)).

        Its gradient is a logistic function at each corner: sigma(x / s) - sigma((x - b) / s) for x and
        sigma((x - b) / s) for b. Towards width 0 it is the clamp.

        Args:
            representation: r, of shape (batch, ...).
            threshold: V_th, a scalar.
            width: Width of the corners as a part of the bound, above 0.

        Returns:
            A tensor of the shape of `representation`.

        Raises:
            ValueError: if the width is not above 0.
        """
        if not width > 0:
            raise ValueError(
                f"Rounded corners have a width above 0; without it there is clamp. Received width={width!r}."
            )
        unclamped, bound = self.unclamped(representation), self.bound(threshold)
        scale = width * ops.stop_gradient(bound)
        return scale * (ops.softplus(unclamped / scale) - ops.softplus((unclamped - bound) / scale))

    def weights(self, timesteps: int) -> np.ndarray:
        """The weights w_1..w_N.

        Args:
            timesteps: N, at least 1.

        Returns:
            A float64 array of shape (N,) that adds up to 1.

        Raises:
            ValueError: if N is not a whole number of at least 1.
        """
        if isinstance(timesteps, bool) or not isinstance(timesteps, (int, np.integer)) or timesteps < 1:
            raise ValueError(f"A coding has weights for 1 or more time steps. Received timesteps={timesteps!r}.")
        weights = self.decay ** np.arange(timesteps - 1, -1, -1, dtype="float64")
        return weights / weights.sum()

    def represent(self, values: Any) -> Any:
        """r(x), the weighted mean over time.

        Args:
            values: x, floats of shape (batch, time, ...).

        Returns:
            A tensor of shape (batch, ...).

        Raises:
            ValueError: if there is no time axis.
        """
        if len(values.shape) < 2:
            raise ValueError(f"A coding represents (batch, time, ...) tensors. Received shape {tuple(values.shape)}.")
        if self.decay == 1.0:
            return ops.mean(values, axis=1)
        timesteps = values.shape[1]
        if timesteps is not None:
            weights = ops.convert_to_tensor(self.weights(timesteps), dtype=values.dtype)
        else:
            age = ops.flip(ops.arange(ops.shape(values)[1], dtype=backend.wide(values.dtype)))
            weights = ops.power(self.decay, age)
            weights = ops.cast(weights / ops.sum(weights), values.dtype)
        return ops.einsum("t,bt...->b...", weights, values)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this coding again."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Coding:
        """The coding that `get_config` described."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="keras_dsr")
@dataclasses.dataclass(frozen=True)
class RateCoding(Coding):
    """Rate coding, w_n = 1 / N: the mean over time. The coding of integrate-and-fire neurons.

    A neuron's output representation is `clamp(r, 0, V_th)` of its input representation r (Eq. 15).

    Example:

    >>> RateCoding().weights(4)
    array([0.25, 0.25, 0.25, 0.25])

    Reference: Meng et al., CVPR 2022, Section 3.2 and Eq. 15.
    """

    @property
    def decay(self) -> float:
        """The ratio w_n / w_(n+1): 1."""
        return 1.0

    def bound(self, threshold: Any) -> Any:
        """b = V_th: what a neuron that fires at each step puts out."""
        return threshold

    def unclamped(self, representation: Any) -> Any:
        """r itself."""
        return representation

    def clamp(self, representation: Any, threshold: Any) -> Any:
        """clamp(r, 0, V_th), Eq. 15.

        Backward: the representation has gradient 1 for 0 <= r <= V_th (both ends pass) and 0 elsewhere, the
        threshold 1 for r > V_th and 0 elsewhere (Eq. 19).
        """
        zero = ops.zeros_like(representation)
        return ops.where(representation > threshold, threshold, ops.where(representation < 0, zero, representation))


@keras.saving.register_keras_serializable(package="keras_dsr")
@dataclasses.dataclass(frozen=True)
class WeightedRateCoding(Coding):
    """Weighted rate coding, w_n proportional to lambda^(N - n): the coding of leaky neurons.

    lambda = exp(-dt / tau) is what the membrane potential keeps of itself in one time step, so the weights
    forget the past as fast as the neuron does. A neuron's output representation is
    `clamp(r / tau, 0, V_th / dt)` of its input representation r (Eq. 14).

    Args:
        tau: Membrane time constant, in the unit of `dt`; above 0. The paper's default is 1.
        dt: Length of a time step; above 0 and below `tau`. The paper's default is 0.05.

    Raises:
        ValueError: if `tau` or `dt` is out of range.

    Example:

    >>> WeightedRateCoding(tau=1.0, dt=0.5).weights(2).round(3)
    array([0.378, 0.622])

    Reference: Meng et al., CVPR 2022, Section 3.2 and Eq. 14.
    """

    tau: float = 1.0
    dt: float = 0.05

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau is a time constant above 0. Received tau={self.tau!r}.")
        if not (math.isfinite(self.dt) and self.dt > 0):
            raise ValueError(f"dt is the length of a time step, above 0. Received dt={self.dt!r}.")
        if self.dt >= self.tau:
            raise ValueError(
                f"dt must be smaller than tau, or a step outlasts the neuron's memory. "
                f"Received dt={self.dt!r}, tau={self.tau!r}."
            )

    @property
    def decay(self) -> float:
        """The ratio w_n / w_(n+1): lambda = exp(-dt / tau)."""
        return math.exp(-self.dt / self.tau)

    def bound(self, threshold: Any) -> Any:
        """b = V_th / dt: what a neuron that fires at each step puts out."""
        return threshold / self.dt

    def unclamped(self, representation: Any) -> Any:
        """r / tau."""
        return representation / self.tau

    def clamp(self, representation: Any, threshold: Any) -> Any:
        """clamp(r / tau, 0, V_th / dt), Eq. 14.

        Backward: the representation has gradient 1 / tau strictly inside the clamp and 0 at its ends and
        beyond; the threshold has gradient 1 / dt where the clamp is at its upper end (Eq. 19).
        """
        scaled = self.unclamped(representation)
        bound = self.bound(threshold)
        zero = ops.zeros_like(scaled)
        return ops.where(scaled >= bound, bound, ops.where(scaled <= 0, zero, scaled))


def get(identifier: Any) -> Coding:
    """The coding that `identifier` means.

    Args:
        identifier: A coding; `None` or `"rate"`, for `RateCoding()`; `"weighted_rate"`, for
            `WeightedRateCoding()` with the paper's tau and dt; or a coding serialised by Keras.

    Raises:
        ValueError: if it is none of these.
    """
    names = {None: RateCoding, "rate": RateCoding, "weighted_rate": WeightedRateCoding}
    if identifier is None or isinstance(identifier, str):
        if identifier in names:
            return names[identifier]()
    elif isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier))
    elif isinstance(identifier, Coding):
        return identifier
    raise ValueError(
        "A coding is 'rate', 'weighted_rate', keras_dsr.RateCoding() or keras_dsr.WeightedRateCoding(tau, dt). "
        f"Received {identifier!r}."
    )

"""Spiking neurons that train by differentiation on spike representation (DSR).

Forward, a neuron simulates: for n = 1..N, from V[0] = 0,

    U[n] = f(V[n-1], I[n]);   s[n] = H(U[n] - alpha V_th);   V[n] = U[n] - V_th s[n]               (Eq. 20)

with f(V, I) = V + I for `IFSpike` (Eq. 4) and lambda V + (1 - lambda) I for `LIFSpike` (Eq. 5). It puts out spikes that
carry their scale: V_th s[n], or V_th s[n] / dt.

Backward, it is the clamp that its representation follows (Eqs. 14 and 15): no gradient passes through time. With r the
representation of the current and b the clamp's bound, the gradient of the clamp reaches r where 0 <= r <= b, and the
threshold where r > b (Eq. 19). With `corner_width` the clamp's corners are rounded in that gradient.

A neuron works in three ways, by what it is called with:

- a `Stream` gives a `Stream`, the common case within a network;
- a static current (batch, ...) gives a `Stream` of `timesteps` steps, each with that current; this is how an image
  enters a network. With `timesteps=0` the stream is the representation alone, and the network that follows is an
  ordinary ANN with the same weights;
- a plain tensor (batch, time, ...) gives a plain tensor, so that anyone's own layers work between neurons. Its
  cotangent, summed over time, goes through the clamp and back to each step by the weight w_n of the step.

Reference: Meng et al., "Training High-Performance Low-Latency Spiking Neural Networks by Differentiation on Spike
Representation", CVPR 2022.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import keras
from keras import ops

from keras_dsr import backend
from keras_dsr.coding import Coding, RateCoding, WeightedRateCoding
from keras_dsr.constraints import LowerBound
from keras_dsr.layers.base import StreamLayer
from keras_dsr.stream import Stream, check_float, is_stream, without_steps

LOOPS = ("unrolled", "while")


def check_timesteps(timesteps: Any) -> int | None:
    """`timesteps` as `None` or an int of at least 0; raises a ValueError or TypeError otherwise."""
    meaning = "the number of time steps N >= 1, or 0 for the representation alone, or None if the input has a time axis"
    return _check_steps("timesteps", timesteps, 0, meaning)


def check_representation_steps(steps: Any) -> int | None:
    """`steps` as `None` or an int of at least 1; raises a ValueError or TypeError otherwise."""
    return _check_steps("representation_steps", steps, 1, "1 or more, or None")


def _check_steps(name: str, steps: Any, least: int, meaning: str) -> int | None:
    if steps is None:
        return None
    try:
        number = operator.index(steps)
    except TypeError:
        raise TypeError(f"{name} is a whole number of steps, or None. Received {name}={steps!r}.") from None
    if isinstance(steps, bool) or number < least:
        raise ValueError(f"{name} is {meaning}. Received {name}={steps!r}.")
    return number


class SpikingNeuron(StreamLayer):
    """What `IFSpike` and `LIFSpike` share: the threshold, the simulation and the clamp's gradient.

    A subclass sets `coding`, `scale` and the default of `threshold_gradient_scale`.
    """

    takes_tensors = True

    # Whether XLA compiles the simulation alone, on TensorFlow. `None`: with loop="while" in `fit`, `evaluate` and
    # `predict`, where it saves time and memory; elsewhere, as in what is exported, there may be no XLA. It is of where
    # a model runs, and no part of its config.
    jit_compile: bool | None = None

    coding: Coding
    scale: float

    def __init__(
        self,
        threshold: float,
        alpha: float,
        timesteps: int | None,
        trainable_threshold: bool,
        threshold_lower_bound: float,
        threshold_l2: float,
        threshold_gradient_scale: float,
        loop: str,
        representation_steps: int | None,
        corner_width: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (math.isfinite(threshold_lower_bound) and threshold_lower_bound > 0):
            raise ValueError(
                "threshold_lower_bound keeps the threshold above zero, so it must be above 0. "
                f"Received threshold_lower_bound={threshold_lower_bound!r}."
            )
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"The threshold V_th must be finite and above 0. Received threshold={threshold!r}.")
        if threshold < threshold_lower_bound:
            raise ValueError(
                "The initial threshold must not be below its lower bound. Received "
                f"threshold={threshold!r}, threshold_lower_bound={threshold_lower_bound!r}; lower the bound."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha, the firing level as a part of V_th, must be in [0, 1]. Received alpha={alpha!r}.")
        if not (math.isfinite(threshold_l2) and threshold_l2 >= 0):
            raise ValueError(f"threshold_l2 must be finite and not below 0. Received threshold_l2={threshold_l2!r}.")
        if not math.isfinite(threshold_gradient_scale):
            raise ValueError(f"threshold_gradient_scale must be finite. Received {threshold_gradient_scale!r}.")
        if not (math.isfinite(corner_width) and corner_width >= 0):
            raise ValueError(
                "corner_width, the width of the clamp's corners in the gradient as a part of V_th, must be finite and "
                f"not below 0. Received corner_width={corner_width!r}."
            )
        if loop not in LOOPS:
            raise ValueError(f"loop must be one of {LOOPS}. Received loop={loop!r}.")
        self.initial_threshold = float(threshold)
        self.alpha = float(alpha)
        self.timesteps = check_timesteps(timesteps)
        self.trainable_threshold = bool(trainable_threshold)
        self.threshold_lower_bound = float(threshold_lower_bound)
        self.threshold_l2 = float(threshold_l2)
        self.threshold_gradient_scale = float(threshold_gradient_scale)
        self.loop = loop
        self.representation_steps = check_representation_steps(representation_steps)
        self.corner_width = float(corner_width)

    def build(self, input_shape: Any) -> None:
        self.threshold = self.add_weight(
            name="threshold",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_threshold),
            regularizer=keras.regularizers.L2(self.threshold_l2) if self.threshold_l2 else None,
            constraint=LowerBound(self.threshold_lower_bound, owner=f"threshold of {self._title}"),
            trainable=self.trainable_threshold,
            # However coarse the layer's own precision: an update would be lost in half of it.
            dtype=backend.wide(self.variable_dtype),
            autocast=False,
        )

    def call(self, inputs: Any) -> Any:
        self._check(inputs)
        threshold = ops.convert_to_tensor(self.threshold)
        if is_stream(inputs):
            values, representation = inputs
            steps = values.shape[1]
        elif self.timesteps is None:
            values, representation, steps = inputs, self.coding.represent(inputs), inputs.shape[1]
        else:
            values, representation, steps = inputs, inputs, self.timesteps

        clamped = self._clamp(representation, threshold, self.corner_width if steps != 0 else 0.0)
        if steps == 0:
            return without_steps(self._quantized(representation, threshold, clamped))
        spikes, coded = backend.simulate(
            ops.stop_gradient(values),
            ops.stop_gradient(threshold),
            alpha=self.alpha,
            decay=self.coding.decay,
            scale=self.scale,
            timesteps=None if len(values.shape) > len(representation.shape) else steps,
            loop=self.loop,
            jit_compile=self._compiles_alone(),
        )
        spikes = ops.stop_gradient(spikes)
        if is_stream(inputs) or self.timesteps is not None:
            return Stream(spikes, backend.carry(ops.stop_gradient(coded), clamped))
        return backend.carry(spikes, clamped)

    def _compiles_alone(self) -> bool:
        if self.jit_compile is None:
            return self.loop == "while" and backend.in_keras_step()
        return self.jit_compile

    def _clamp(self, representation: Any, threshold: Any, corner_width: float) -> Any:
        """What the neuron's output representation is differentiated as; its value matters without steps alone."""
        dtype = backend.wide(representation.dtype, threshold.dtype)
        scaled = backend.carry(ops.stop_gradient(threshold), threshold * self.threshold_gradient_scale)
        clamp = functools.partial(self.coding.rounded_clamp, width=corner_width) if corner_width else self.coding.clamp
        return ops.cast(clamp(ops.cast(representation, dtype), ops.cast(scaled, dtype)), representation.dtype)

    def _quantized(self, representation: Any, threshold: Any, clamped: Any) -> Any:
        """Of a representation network: the clamp, or what a constant current gives after so many steps."""
        if self.representation_steps is None:
            return clamped
        coded = self._of_constant_current(ops.stop_gradient(representation), ops.stop_gradient(threshold))
        return backend.carry(ops.stop_gradient(coded), clamped)

    def _of_constant_current(self, current: Any, threshold: Any) -> Any:
        """What `representation_steps` steps of a current (batch, ...) come to."""
        _, coded = backend.simulate(
            current,
            threshold,
            alpha=self.alpha,
            decay=self.coding.decay,
            scale=self.scale,
            timesteps=self.representation_steps,
            # What it puts out at each step is not asked for, and so not computed; compiled alone by XLA, it would be.
            loop="unrolled",
        )
        return coded

    def _check(self, inputs: Any) -> None:
        if is_stream(inputs):
            steps = self._stream(inputs).timesteps
            if self.timesteps is not None and steps != self.timesteps:
                raise ValueError(
                    f"{self._title} has timesteps={self.timesteps}, but the stream that it received has {steps} time "
                    "steps. Leave timesteps out: only the neuron that makes the stream needs it."
                )
        else:
            check_float(inputs.dtype, self._title)
            if self.timesteps is None and len(inputs.shape) < 3:
                raise ValueError(
                    f"{self._title} expects (batch, time, ...) with at least one axis of features. Received shape "
                    f"{tuple(inputs.shape)}. For a static input pass timesteps=...; for one neuron add an axis of 1."
                )
            if self.timesteps is not None and len(inputs.shape) < 2:
                raise ValueError(
                    f"{self._title} with timesteps={self.timesteps} expects a static input (batch, ...). "
                    f"Received shape {tuple(inputs.shape)}."
                )
            steps = inputs.shape[1] if self.timesteps is None else self.timesteps
            if self.timesteps is None and steps == 0:
                raise ValueError(f"{self._title} expects at least one time step. Received shape {tuple(inputs.shape)}.")
        if steps is None and self.loop == "unrolled":
            raise ValueError(
                f"{self._title} unrolls its time loop and so must know the number of time steps. Received a time axis "
                "of unknown length; give it a fixed length, or pass loop='while' (TensorFlow)."
            )

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Any:
        self._check(inputs)
        if is_stream(inputs):
            return super().compute_output_spec(inputs)
        shape = tuple(inputs.shape)
        if self.timesteps is None:
            return keras.KerasTensor(shape, dtype=self.compute_dtype)
        return self._symbolic((shape[0], self.timesteps, *shape[1:]), shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        if self.timesteps is None or isinstance(input_shape[0], (tuple, list)):
            return input_shape
        return (input_shape[0], self.timesteps, *input_shape[1:]), tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "threshold": self.initial_threshold,
            "alpha": self.alpha,
            "timesteps": self.timesteps,
            "trainable_threshold": self.trainable_threshold,
            "threshold_lower_bound": self.threshold_lower_bound,
            "threshold_l2": self.threshold_l2,
            "threshold_gradient_scale": self.threshold_gradient_scale,
            "loop": self.loop,
            "representation_steps": self.representation_steps,
            "corner_width": self.corner_width,
        }


@keras.saving.register_keras_serializable(package="keras_dsr")
class IFSpike(SpikingNeuron):
    """Integrate-and-fire neurons, reset by subtraction, one per feature.

    Forward: U[n] = V[n-1] + I[n]; s[n] = H(U[n] - alpha V_th); V[n] = U[n] - V_th s[n]; output V_th s[n].

    Backward: the output's representation r(V_th s), its mean over time, has the gradient of clamp(r(I), 0, V_th), both
    ends included; the threshold's is multiplied by `threshold_gradient_scale`.

    Args:
        threshold: Initial V_th, in the unit of the input current; above 0. The paper's 6 suits N = 20 steps: a spike
            is worth V_th / N, so few steps want a smaller one.
        alpha: A neuron fires as its potential reaches alpha V_th; in [0, 1]. 0.5, the default, rounds where 1 rounds
            down, which makes the error of representation least (Eq. 21).
        timesteps: Number N of time steps to make of a static current; 0 for the representation alone; `None` if the
            input has a time axis. A plain tensor is static wherever `timesteps` is given, whatever its rank.
        trainable_threshold: Whether V_th, one scalar for the layer, trains.
        threshold_lower_bound: Least value of V_th, kept by a constraint; above 0.
        threshold_l2: L2 penalty on V_th: threshold_l2 V_th^2 is added to the loss. The default is half the paper's
            weight decay, 5e-4, which is the same thing for SGD; set 0 where the optimizer decays the weights.
        threshold_gradient_scale: Factor on the gradient of V_th. The paper's code has 1, and 0.001 for ImageNet.
        loop: The time loop: "while" (`tf.while_loop`, `lax.scan`), which needs least memory, compiles fastest and takes
            a time axis of any length; or "unrolled", all steps written out: a larger graph without a loop, on
            TensorFlow without XLA a little faster for some networks. Measure it for yours.
        representation_steps: In a representation network (a stream of zero steps), puts out what this many steps of a
            constant current give, instead of the clamp: with the quantization error of Eqs. 18 and 21, and the clamp's
            gradient. `None` for the clamp. Nothing else depends on it.
        corner_width: Width of the clamp's corners in the gradient, as a part of V_th. 0, the default, is the paper's
            gradient (Eq. 19). Above 0 the corners are rounded (`Coding.rounded_clamp`), as they are in what a neuron
            puts out on average when its current varies over time, as it does in deep networks; with few time steps
            that matters. What a neuron puts out does not depend on it, nor does a representation network. The recipe
            `cifar10-resnet20` has 0.15.
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        A `Stream`; or, with `timesteps`, a static current (batch, ...); or a current (batch, time, ...).

    Output shape:
        A `Stream` of the same shape; or one of `timesteps` steps; or a tensor of the same shape.

    Raises:
        ValueError: if an argument is out of range, the input has no time axis and `timesteps` is not given, or
            `timesteps` differs from the number of steps of the stream received.
        TypeError: if the input is not of floats.

    Example:

    >>> import numpy as np
    >>> current = np.full((1, 4, 1), 0.6, "float32")  # (batch, time, features)
    >>> spikes = IFSpike(threshold=1.0, alpha=1.0)(current)
    >>> [float(s) for s in spikes[0, :, 0]]
    [0.0, 1.0, 0.0, 1.0]

    Reference: Meng et al., CVPR 2022, Eqs. 4, 15, 19 and 20; defaults from its Table 5.
    """

    coding = RateCoding()
    scale = 1.0

    def __init__(
        self,
        threshold: float = 6.0,
        alpha: float = 0.5,
        timesteps: int | None = None,
        trainable_threshold: bool = True,
        threshold_lower_bound: float = 0.01,
        threshold_l2: float = 2.5e-4,
        threshold_gradient_scale: float = 1.0,
        loop: str = "while",
        representation_steps: int | None = None,
        corner_width: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            threshold=threshold,
            alpha=alpha,
            timesteps=timesteps,
            trainable_threshold=trainable_threshold,
            threshold_lower_bound=threshold_lower_bound,
            threshold_l2=threshold_l2,
            threshold_gradient_scale=threshold_gradient_scale,
            loop=loop,
            representation_steps=representation_steps,
            corner_width=corner_width,
            **kwargs,
        )

    def _of_constant_current(self, current: Any, threshold: Any) -> Any:
        # Where 0 <= I <= V_th, each reset leaves a potential in [(alpha - 1) V_th, alpha V_th), so that the number of
        # spikes is a floor: the simulation's, but for rounding where a potential comes to lie on the firing level.
        steps = self.representation_steps
        dtype = backend.wide(current.dtype)
        threshold = ops.cast(threshold, dtype)
        spikes = ops.floor(ops.cast(current, dtype) * (steps / threshold) + (1.0 - self.alpha))
        return ops.cast(ops.clip(spikes, 0.0, float(steps)) * (threshold / steps), current.dtype)


@keras.saving.register_keras_serializable(package="keras_dsr")
class LIFSpike(SpikingNeuron):
    """Leaky integrate-and-fire neurons, reset by subtraction, one per feature.

    Forward: U[n] = lambda V[n-1] + (1 - lambda) I[n], lambda = exp(-dt / tau); s[n] = H(U[n] - alpha V_th);
    V[n] = U[n] - V_th s[n]; output V_th s[n] / dt.

    Backward: the output's representation r(V_th s / dt), its weighted mean over time (`WeightedRateCoding`), has the
    gradient of clamp(r(I) / tau, 0, V_th / dt), strictly inside; the threshold's is multiplied by
    `threshold_gradient_scale`. The gradient that a plain (batch, time, ...) tensor gets follows the chain rule of Eqs.
    16 and 17: step n gets the part w_n.

    The stream that it receives must be coded by the same tau and dt, as other `LIFSpike` layers and
    `ToStream(WeightedRateCoding(tau, dt))` code it: a stream does not say how it is coded.

    Args:
        threshold: Initial V_th, in the unit of the input current; above 0.
        alpha: A neuron fires as its potential reaches alpha V_th; in [0, 1].
        tau: Membrane time constant, in the unit of `dt`; above 0.
        dt: Length of a time step; above 0 and below `tau`.
        timesteps: Number N of time steps to make of a static current; 0 for the representation alone; `None` if the
            input has a time axis. A plain tensor is static wherever `timesteps` is given, whatever its rank.
        trainable_threshold: Whether V_th, one scalar for the layer, trains.
        threshold_lower_bound: Least value of V_th, kept by a constraint; above 0.
        threshold_l2: L2 penalty on V_th: threshold_l2 V_th^2 is added to the loss. The default is half the paper's
            weight decay, 5e-4, which is the same thing for SGD; set 0 where the optimizer decays the weights.
        threshold_gradient_scale: Factor on the gradient of V_th; `None` for the paper's code's dt^2, which makes of
            the chain rule's 1 / dt a dt.
        loop: The time loop: "while" (`tf.while_loop`, `lax.scan`), which needs least memory, compiles fastest and takes
            a time axis of any length; or "unrolled", all steps written out: a larger graph without a loop, on
            TensorFlow without XLA a little faster for some networks. Measure it for yours.
        representation_steps: In a representation network (a stream of zero steps), puts out what this many steps of a
            constant current give, instead of the clamp: with the quantization error of Eqs. 18 and 21, and the clamp's
            gradient. `None` for the clamp. Nothing else depends on it.
        corner_width: Width of the clamp's corners in the gradient, as a part of V_th. 0, the default, is the paper's
            gradient (Eq. 19). Above 0 the corners are rounded (`Coding.rounded_clamp`), as they are in what a neuron
            puts out on average when its current varies over time, as it does in deep networks; with few time steps
            that matters. What a neuron puts out does not depend on it, nor does a representation network. The recipe
            `cifar10-resnet20` has 0.15.
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        A `Stream`; or, with `timesteps`, a static current (batch, ...); or a current (batch, time, ...).

    Output shape:
        A `Stream` of the same shape; or one of `timesteps` steps; or a tensor of the same shape.

    Raises:
        ValueError: if an argument is out of range, the input has no time axis and `timesteps` is not given, or
            `timesteps` differs from the number of steps of the stream received.
        TypeError: if the input is not of floats.

    Example:

    >>> import numpy as np
    >>> current = np.full((1, 4, 1), 1.0, "float32")  # (batch, time, features)
    >>> spikes = LIFSpike(threshold=0.5, alpha=1.0, tau=1.0, dt=0.5)(current)
    >>> [float(s) for s in spikes[0, :, 0]]
    [0.0, 1.0, 0.0, 1.0]

    Reference: Meng et al., CVPR 2022, Eqs. 5, 14, 19 and 20; defaults from its Table 5.
    """

    def __init__(
        self,
        threshold: float = 0.3,
        alpha: float = 0.3,
        tau: float = 1.0,
        dt: float = 0.05,
        timesteps: int | None = None,
        trainable_threshold: bool = True,
        threshold_lower_bound: float = 0.0005,
        threshold_l2: float = 2.5e-4,
        threshold_gradient_scale: float | None = None,
        loop: str = "while",
        representation_steps: int | None = None,
        corner_width: float = 0.0,
        **kwargs: Any,
    ) -> None:
        self.coding = WeightedRateCoding(tau=tau, dt=dt)
        super().__init__(
            threshold=threshold,
            alpha=alpha,
            timesteps=timesteps,
            trainable_threshold=trainable_threshold,
            threshold_lower_bound=threshold_lower_bound,
            threshold_l2=threshold_l2,
            threshold_gradient_scale=dt**2 if threshold_gradient_scale is None else threshold_gradient_scale,
            loop=loop,
            representation_steps=representation_steps,
            corner_width=corner_width,
            **kwargs,
        )
        self.tau = float(tau)
        self.dt = float(dt)
        self.scale = 1.0 / self.dt

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "tau": self.tau, "dt": self.dt}


def neurons_of(model: keras.Model) -> list[SpikingNeuron]:
    """The neuron layers of a model, in order, those within its layers and sub-models included."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, SpikingNeuron)]

"""The backend's operations on TensorFlow.

The time loop is unrolled or a `tf.while_loop` over a `TensorArray`: both export to SavedModel, ONNX and LiteRT.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from tensorflow.compiler.tf2xla.python import xla


@tf.custom_gradient
def carry(value: tf.Tensor, representation: tf.Tensor) -> tf.Tensor:
    """The value of `value`, the gradient of `representation`.

    Forward: value. Backward: the cotangent goes to `representation`; where `value` has a time axis that
    `representation` lacks, it is summed over time. `value` gets no gradient.

    Args:
        value: Tensor of shape (batch, time, ...), or of the shape of `representation`.
        representation: Tensor of shape (batch, ...).

    Returns:
        A tensor equal to `value`.
    """

    has_time = value.shape.rank > representation.shape.rank

    def gradient(cotangent: tf.Tensor) -> tuple[None, tf.Tensor]:
        return None, tf.reduce_sum(cotangent, axis=1) if has_time else cotangent

    return tf.identity(value), gradient


class _Neuron:
    """The arithmetic of one time step, the same in every loop: arguments as in `simulate`."""

    def __init__(self, threshold: tf.Tensor, alpha: float, decay: float, scale: float, dtype: tf.DType) -> None:
        self.dtype = dtype
        self.wide = dtype if dtype.size >= 4 else tf.float32
        self.threshold = tf.cast(threshold, self.wide)
        self.firing_level = alpha * self.threshold
        # 1 - lambda of the lambda that this precision has: the two add up to 1, as in the paper's code.
        self.gain = 1.0 if decay == 1.0 else 1.0 - float(self.wide.as_numpy_dtype(decay))
        self.unscaled = scale == 1.0
        self.spike = self.threshold if self.unscaled else self.threshold * scale

    def scaled(self, x: tf.Tensor, factor: float) -> tf.Tensor:
        """x factor, rounded before anything is added to it."""
        # Compilers fuse a product and the sum that it goes into, rounding once where we round twice: under XLA a LIF
        # network would not fire the spikes that it fires without. A maximum between the two, which changes no finite
        # number, keeps them apart.
        return x if factor == 1.0 else tf.maximum(x * factor, self.wide.min)

    def drive_of(self, current: tf.Tensor) -> tf.Tensor:
        """What a step's current adds to the potential."""
        return self.scaled(tf.cast(current, self.wide), self.gain)

    def fire(self, charged: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Of charged potentials: the potentials after the reset, 1 where a neuron fired, and its output."""
        fired = tf.cast(charged >= self.firing_level, self.wide)
        reset = self.threshold * fired
        output = reset if self.unscaled else self.spike * fired
        return charged - reset, fired, tf.cast(output, self.dtype)


def simulate(
    current: tf.Tensor,
    threshold: tf.Tensor,
    *,
    alpha: float,
    decay: float,
    scale: float,
    timesteps: int | None,
    loop: str,
    jit_compile: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Runs the neuron through time and counts its spikes. Nothing here has a gradient.

    For n = 1..N, from V[0] = 0 (Eqs. 4, 5 and 20):

        U[n] = decay V[n-1] + (1 - decay) I[n], or V[n-1] + I[n] if decay is 1;
        s[n] = H(U[n] - alpha V_th);  V[n] = U[n] - V_th s[n]

    Args:
        current: I, floats of shape (batch, time, ...); or (batch, ...) with `timesteps`, where each step gets
            the same.
        threshold: V_th, a float32 scalar.
        alpha: A neuron fires at alpha V_th.
        decay: lambda, what a step leaves of the potential: 1 for IF, exp(-dt / tau) for LIF.
        scale: A spike is worth V_th scale: 1 for IF, 1 / dt for LIF.
        timesteps: N, for a current without time axis; else `None`.
        loop: "unrolled", or "while".
        jit_compile: Whether XLA compiles this alone: for steps that it may not compile as a whole.

    Returns:
        The output V_th scale s[n], of shape (batch, time, ...), and its representation, of shape (batch, ...),
        weighted by decay^(N - n). Both have the dtype of `current`; potentials are float32 or wider.
    """
    run = _compiled_simulate if jit_compile else _simulate
    return run(
        current, threshold, alpha=alpha, decay=decay, scale=scale, timesteps=timesteps, loop=loop, in_place=jit_compile
    )


def _simulate(
    current: tf.Tensor,
    threshold: tf.Tensor,
    *,
    alpha: float,
    decay: float,
    scale: float,
    timesteps: int | None,
    loop: str,
    in_place: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """As `simulate`; with `in_place`, which needs XLA, the loop writes each step's output to where it stays."""
    static = timesteps is not None
    if not static:
        timesteps = current.shape[1]
    dtype = current.dtype
    neuron = _Neuron(threshold, alpha, decay, scale, dtype)
    drive_of, scaled, fire, wide, spike = neuron.drive_of, neuron.scaled, neuron.fire, neuron.wide, neuron.spike

    static_current = drive_of(current) if static else None

    if loop == "unrolled":
        drives = [static_current] * timesteps if static else [drive_of(x) for x in tf.unstack(current, axis=1)]
        potential, count, output = fire(drives[0])
        outputs = [output]
        for drive in drives[1:]:
            potential, fired, output = fire(scaled(potential, decay) + drive)
            count = scaled(count, decay) + fired
            outputs.append(output)
        values = tf.stack(outputs, axis=1)
        weight = sum(decay**n for n in range(timesteps))
        return values, tf.cast(count * (spike / weight), dtype)

    steps = timesteps if timesteps is not None else tf.shape(current)[1]
    start = tf.zeros_like(static_current) if static else tf.zeros_like(current[:, 0], dtype=wide)
    if in_place:
        shape = tf.shape(start)
        outputs = tf.zeros(tf.concat([shape[:1], [steps], shape[1:]], axis=0), dtype)

        def write(n, output, outputs):
            place = tf.one_hot(1, start.shape.rank + 1, dtype=tf.int32) * n
            return xla.dynamic_update_slice(outputs, output[:, tf.newaxis], place)
    else:
        outputs = tf.TensorArray(dtype, size=steps, element_shape=start.shape)

        def write(n, output, outputs):
            return outputs.write(n, output)

    def body(n, potential, count, weight, outputs):
        drive = static_current if static else drive_of(current[:, n])
        potential, fired, output = fire(scaled(potential, decay) + drive)
        return n + 1, potential, scaled(count, decay) + fired, scaled(weight, decay) + 1, write(n, output, outputs)

    _, _, count, weight, outputs = tf.while_loop(
        lambda n, *_: n < steps,
        body,
        (tf.constant(0), start, start, tf.zeros([], wide), outputs),
        maximum_iterations=timesteps,
        parallel_iterations=1,
    )
    if in_place:
        values = outputs
    else:
        stacked = outputs.stack()  # (time, batch, ...)
        values = tf.transpose(stacked, [1, 0, *range(2, stacked.shape.rank)])
    values.set_shape([start.shape[0], timesteps, *start.shape[1:]])
    return values, tf.cast(count * (spike / weight), dtype)


_compiled_simulate = tf.function(_simulate, jit_compile=True, autograph=False)


# The functions that Keras' `fit`, `evaluate` and `predict` (and `train_on_batch` and the like) compile.
_KERAS_STEPS = {"one_step_on_data", "one_step_on_data_distributed", "multi_step_on_data", "multi_step_on_iterator"}


def in_keras_step() -> bool:
    """Whether this is being traced for `fit`, `evaluate` or `predict`, and so will run in this process, and with XLA.

    Keras says so by the names of its functions only. Were they to change, the answer would be no, which is slower. Some
    builds of TensorFlow have no XLA, and none has it for Apple's GPUs.
    """
    if not tf.test.is_built_with_xla() or (platform.system() == "Darwin" and tf.config.list_physical_devices("GPU")):
        return False
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        if getattr(graph, "name", None) in _KERAS_STEPS:
            return True
        graph = getattr(graph, "outer_graph", None)
    return False


def step(
    current: tf.Tensor,
    potential: tf.Tensor,
    count: tf.Tensor,
    weight: tf.Tensor,
    threshold: tf.Tensor,
    *,
    alpha: float,
    decay: float,
    scale: float,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """One time step of `simulate`, with its state going in and out: as many of them as steps give the very same.

    Args:
        current: I[n], floats of shape (batch, ...).
        potential: V[n-1], float32 or wider, of shape (batch, ...); zeros at the start.
        count: Spikes so far, weighted by decay^(n - 1 - k) for the one of step k; like `potential`.
        weight: The sum of these weights, of shape (batch, 1, ...), as many steps may have gone by in each sample.
        threshold: As in `simulate`.
        alpha: As in `simulate`.
        decay: As in `simulate`.
        scale: As in `simulate`.

    Returns:
        The output V_th scale s[n] and the representation of all outputs so far, in the dtype of `current` and of
        shape (batch, ...); then the new potential, count and weight.
    """
    neuron = _Neuron(threshold, alpha, decay, scale, current.dtype)
    potential, fired, output = neuron.fire(neuron.scaled(potential, decay) + neuron.drive_of(current))
    count = neuron.scaled(count, decay) + fired
    weight = neuron.scaled(weight, decay) + 1
    return output, tf.cast(count * (neuron.spike / weight), current.dtype), potential, count, weight


def batch_norm(
    values: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    moments: tuple[tf.Tensor, tf.Tensor] | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Normalizes the last axis over all others, in one pass for the statistics and one for the values.

    gamma (x - mean) / sqrt(variance + epsilon) + beta. Not meant to be differentiated.

    Args:
        values: Floats of shape (..., features); half precision is summed up in float32.
        gamma: Shape (features,), float32 or wider.
        beta: Shape (features,), float32 or wider.
        epsilon: Added to the variance.
        moments: Mean and variance to use, each of shape (features,); `None` to take those of the values.

    Returns:
        The normalized values, in the dtype of `values`, and the mean and (biased) variance that were used.
    """
    if values.dtype == tf.float64:
        mean, variance = moments or tf.nn.moments(values, list(range(values.shape.rank - 1)))
        return tf.nn.batch_normalization(values, mean, variance, beta, gamma, epsilon), mean, variance
    flat = tf.reshape(values, (1, -1, 1, values.shape[-1]))
    mean, variance = moments or (tf.zeros([0]), tf.zeros([0]))
    normalized, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=flat,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        is_training=moments is None,
    )
    if moments is None:
        count = tf.cast(tf.shape(flat)[1], variance.dtype)
        variance *= tf.maximum(count - 1, 1) / count  # it comes out as the unbiased one
    return tf.reshape(normalized, tf.shape(values)), mean, variance


def check_finite(value: tf.Tensor, message: str) -> tf.Tensor:
    """`value`, if it is finite; else an InvalidArgumentError with `message`. XLA leaves the check out."""
    return tf.debugging.check_numerics(value, message)


def register_structure(cls: type) -> None:
    """Nothing to do: TensorFlow looks into dataclasses that have `__tf_flatten__`."""


def specs(
    function: Callable[[tf.Tensor], list[tf.Tensor]], shape: tuple[int, ...], dtype: str
) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each of the tensors that a function of one tensor gives, without running it.

    Args:
        function: What is asked.
        shape: Of what it would be called with.
        dtype: Of what it would be called with.
    """
    traced = tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec(shape, dtype))
    return [(tuple(x.shape), x.dtype.name) for x in traced.structured_outputs]


def draw(sample: Callable[[tf.Tensor], tf.Tensor], like: tf.Tensor) -> tf.Tensor:
    """Random numbers for a batch, such that the parts of a batch on several replicas get those of the whole.

    Replicas have the same seeds, so each draws for the whole batch and takes its own part.

    Args:
        sample: Draws, for a tensor of shape (batch, ...), numbers of the same shape.
        like: The part of the batch that this replica has; all parts are of one size.

    Returns:
        A tensor of the shape of `like`.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return sample(like)
    size, place = tf.shape(like)[0], tf.cast(context.replica_id_in_sync_group, tf.int32)
    drawn = sample(tf.concat([like] * context.num_replicas_in_sync, axis=0))
    return tf.ensure_shape(drawn[place * size : (place + 1) * size], like.shape)


def descend(
    variable: tf.Variable,
    velocity: keras.Variable,
    gradient: tf.Tensor,
    learning_rate: tf.Tensor,
    momentum: float,
    nesterov: bool,
) -> bool:
    """Takes a step of `keras.optimizers.SGD` with momentum in one pass over memory, if that can be.

    m <- momentum m - learning_rate g; w <- w + m, or with Nesterov's momentum w <- w + momentum m - learning_rate g.

    Args:
        variable: w.
        velocity: m, of the same shape and dtype.
        gradient: g, of the same shape.
        learning_rate: A scalar.
        momentum: What a velocity keeps of itself.
        nesterov: Whether the momentum is Nesterov's.

    Returns:
        Whether the step was taken: not under a strategy, whose variables are of several devices, and not with a
        gradient of some rows alone.
    """
    if tf.distribute.has_strategy() or not isinstance(gradient, tf.Tensor):
        return False
    tf.raw_ops.ResourceApplyKerasMomentum(
        var=variable.handle,
        accum=velocity.value.handle,
        lr=tf.cast(learning_rate, variable.dtype),
        grad=tf.cast(gradient, variable.dtype),
        momentum=tf.cast(momentum, variable.dtype),
        use_nesterov=nesterov,
    )
    return True


def to_numpy(value: tf.Variable | tf.Tensor) -> np.ndarray:
    """What a variable holds; of one that replicas share, what each of them has."""
    return np.asarray(value.numpy())  # a variable of replicas has no array interface

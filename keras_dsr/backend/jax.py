"""The backend's operations on JAX; `keras_dsr.backend.tensorflow` describes them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.experimental import multihost_utils


@jax.custom_vjp
def carry(value: jax.Array, representation: jax.Array) -> jax.Array:
    """The value of `value`, the gradient of `representation`: see `keras_dsr.backend.tensorflow.carry`."""
    return value


def _carry_forward(value, representation):
    # An empty array tells the backward pass how many axes the representation has; nothing else is kept.
    return value, jnp.empty((0,) * representation.ndim, representation.dtype)


def _carry_backward(like, cotangent):
    gradient = cotangent.sum(axis=1) if cotangent.ndim > like.ndim else cotangent
    return None, gradient.astype(like.dtype)


carry.defvjp(_carry_forward, _carry_backward)


class _Neuron:
    """The arithmetic of one time step, as `keras_dsr.backend.tensorflow` has it."""

    def __init__(self, threshold: jax.Array, alpha: float, decay: float, scale: float, dtype: jnp.dtype) -> None:
        self.dtype = dtype
        self.wide = jnp.promote_types(dtype, jnp.float32)
        self.threshold = threshold.astype(self.wide)
        self.firing_level = alpha * self.threshold
        self.gain = 1.0 if decay == 1.0 else 1.0 - float(self.wide.type(decay))
        self.spike = self.threshold * scale

    def scaled(self, x: jax.Array, factor: float) -> jax.Array:
        return x if factor == 1.0 else jnp.maximum(x * factor, jnp.finfo(self.wide).min)  # as on TensorFlow

    def drive_of(self, current: jax.Array) -> jax.Array:
        return self.scaled(current.astype(self.wide), self.gain)

    def fire(self, charged: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        fired = (charged >= self.firing_level).astype(self.wide)
        return charged - self.threshold * fired, fired, (self.spike * fired).astype(self.dtype)


def simulate(
    current: jax.Array,
    threshold: jax.Array,
    *,
    alpha: float,
    decay: float,
    scale: float,
    timesteps: int | None,
    loop: str,
    jit_compile: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the neuron through time and counts its spikes: see `keras_dsr.backend.tensorflow.simulate`.

    `jit_compile` has no effect: on JAX XLA compiles all there is.
    """
    static = timesteps is not None
    if not static:
        timesteps = current.shape[1]
    dtype = current.dtype
    neuron = _Neuron(threshold, alpha, decay, scale, dtype)
    drive_of, wide = neuron.drive_of, neuron.wide

    def advance(state, drive):
        potential, count = state
        potential, fired, output = neuron.fire(neuron.scaled(potential, decay) + drive)
        return (potential, neuron.scaled(count, decay) + fired), output

    if loop == "unrolled":
        drives = [drive_of(current)] * timesteps if static else [drive_of(current[:, n]) for n in range(timesteps)]
        state = (jnp.zeros_like(drives[0]), jnp.zeros_like(drives[0]))
        outputs = []
        for drive in drives:
            state, output = advance(state, drive)
            outputs.append(output)
        values = jnp.stack(outputs, axis=1)
    elif static:
        drive = drive_of(current)
        state = (jnp.zeros_like(drive), jnp.zeros_like(drive))
        state, outputs = jax.lax.scan(lambda state, _: advance(state, drive), state, length=timesteps)
        values = jnp.moveaxis(outputs, 0, 1)
    else:
        state = (jnp.zeros_like(current[:, 0], dtype=wide),) * 2
        state, outputs = jax.lax.scan(lambda state, x: advance(state, drive_of(x)), state, jnp.moveaxis(current, 1, 0))
        values = jnp.moveaxis(outputs, 0, 1)
    weight = sum(decay**n for n in range(timesteps))
    return values, (state[1] * (neuron.spike / weight)).astype(dtype)


def in_keras_step() -> bool:
    """See `keras_dsr.backend.tensorflow.in_keras_step`: no, as XLA compiles all there is anyway."""
    return False


def step(
    current: jax.Array,
    potential: jax.Array,
    count: jax.Array,
    weight: jax.Array,
    threshold: jax.Array,
    *,
    alpha: float,
    decay: float,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One time step, with its state going in and out: see `keras_dsr.backend.tensorflow.step`."""
    neuron = _Neuron(threshold, alpha, decay, scale, current.dtype)
    potential, fired, output = neuron.fire(neuron.scaled(potential, decay) + neuron.drive_of(current))
    count = neuron.scaled(count, decay) + fired
    weight = neuron.scaled(weight, decay) + 1
    return output, (count * (neuron.spike / weight)).astype(current.dtype), potential, count, weight


def batch_norm(
    values: jax.Array,
    gamma: jax.Array,
    beta: jax.Array,
    epsilon: float,
    moments: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes the last axis over all others: see `keras_dsr.backend.tensorflow.batch_norm`."""
    wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    axes = tuple(range(values.ndim - 1))
    mean, variance = moments or (wide.mean(axis=axes), wide.var(axis=axes))
    factor = jax.lax.rsqrt(variance + epsilon) * gamma
    return (wide * factor + (beta - mean * factor)).astype(values.dtype), mean, variance


def check_finite(value: jax.Array, message: str) -> jax.Array:
    """`value`, if it is finite; else a ValueError with `message`. A compiled step has no such check."""
    if not isinstance(value, jax.core.Tracer) and not jnp.isfinite(value).all():
        raise ValueError(message)
    return value


def register_structure(cls: type) -> None:
    """Makes a pytree of a class whose objects can be taken apart by `tuple` and made by `cls(*parts)`."""
    jax.tree_util.register_pytree_node(cls, lambda x: (tuple(x), None), lambda _, parts: cls(*parts))


def specs(
    function: Callable[[jax.Array], list[jax.Array]], shape: tuple[int, ...], dtype: str
) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of what a function gives, without running it: see `keras_dsr.backend.tensorflow.specs`."""
    return [(x.shape, x.dtype.name) for x in jax.eval_shape(function, jax.ShapeDtypeStruct(shape, dtype))]


def draw(sample: Callable[[jax.Array], jax.Array], like: jax.Array) -> jax.Array:
    """Random numbers for a batch: see `keras_dsr.backend.tensorflow.draw`. A step sees the whole batch here."""
    return sample(like)


def descend(
    variable: jax.Array,
    velocity: keras.Variable,
    gradient: jax.Array,
    learning_rate: jax.Array,
    momentum: float,
    nesterov: bool,
) -> bool:
    """See `keras_dsr.backend.tensorflow.descend`: never, as XLA makes one pass of Keras' own step."""
    return False


def to_numpy(value: jax.Array) -> np.ndarray:
    """What an array holds, parts that other processes have included, which must ask for it at the same time."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))

"""`carry`, `simulate`, `batch_norm` and `check_finite` on JAX; `keras_dsr.backend.tensorflow` describes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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


def simulate(
    current: jax.Array,
    threshold: jax.Array,
    *,
    alpha: float,
    decay: float,
    scale: float,
    timesteps: int | None,
    loop: str,
) -> tuple[jax.Array, jax.Array]:
    """Runs the neuron through time and counts its spikes: see `keras_dsr.backend.tensorflow.simulate`."""
    static = timesteps is not None
    if not static:
        timesteps = current.shape[1]
    dtype = current.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    threshold = threshold.astype(wide)
    spike = threshold * scale
    gain = 1.0 if decay == 1.0 else 1.0 - float(wide.type(decay))

    def scaled(x, factor):
        return x if factor == 1.0 else jnp.maximum(x * factor, jnp.finfo(wide).min)  # as on TensorFlow

    def drive_of(x):
        return scaled(x.astype(wide), gain)

    def step(state, drive):
        potential, count = state
        charged = scaled(potential, decay) + drive
        fired = (charged >= alpha * threshold).astype(wide)
        state = (charged - threshold * fired, scaled(count, decay) + fired)
        return state, (spike * fired).astype(dtype)

    if loop == "unrolled":
        drives = [drive_of(current)] * timesteps if static else [drive_of(current[:, n]) for n in range(timesteps)]
        state = (jnp.zeros_like(drives[0]), jnp.zeros_like(drives[0]))
        outputs = []
        for drive in drives:
            state, output = step(state, drive)
            outputs.append(output)
        values = jnp.stack(outputs, axis=1)
    elif static:
        drive = drive_of(current)
        state = (jnp.zeros_like(drive), jnp.zeros_like(drive))
        state, outputs = jax.lax.scan(lambda state, _: step(state, drive), state, length=timesteps)
        values = jnp.moveaxis(outputs, 0, 1)
    else:
        state = (jnp.zeros_like(current[:, 0], dtype=wide),) * 2
        state, outputs = jax.lax.scan(lambda state, x: step(state, drive_of(x)), state, jnp.moveaxis(current, 1, 0))
        values = jnp.moveaxis(outputs, 0, 1)
    weight = sum(decay**n for n in range(timesteps))
    return values, (state[1] * (spike / weight)).astype(dtype)


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

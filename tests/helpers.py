"""Gradients, probes and networks, the same way on both backends."""

from __future__ import annotations

import contextlib

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()

# Packages that some parts of the package need and others do without.
OPTIONAL = {
    "grpc",
    "httpx",
    "keras_tuner",
    "libtpu",
    "onnx",
    "onnxruntime",
    "openvino",
    "optuna",
    "prometheus_client",
    "ray",
    "starlette",
    "playwright",
    "tensorboard",
    "tensorflow_datasets",
    "tensorflow_serving",
    "tf2onnx",
    "tonic",
    "uvicorn",
}


def numpy(x) -> np.ndarray:
    """A tensor or variable; not by `convert_to_numpy`, whose copy of a variable NumPy 2 deprecates."""
    return np.asarray(x)


def wide_floats():
    """A context in which the backend has float64."""
    if BACKEND == "tensorflow":
        return contextlib.nullcontext()
    import jax

    # Older releases have it in `jax.experimental` alone. `hasattr`, since the object cannot be taken as true or false.
    context = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
    return context(True)


def vary(model):
    """Gives normalizations statistics such as training leaves."""
    rng = np.random.default_rng(5)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            size = layer.gamma.shape
            layer.gamma.assign(rng.normal(1, 0.3, size))
            layer.beta.assign(rng.normal(0.2, 0.3, size))
            layer.moving_mean.assign(rng.normal(0, 0.3, size))
            layer.moving_variance.assign(rng.uniform(0.2, 2, size))
    return model


def value_and_grads(function, *arrays, jit: bool = False):
    """function(*tensors) -> (scalar, auxiliary); gives them and the scalar's gradients, as NumPy arrays.

    Args:
        function: From tensors to a scalar, and any structure of tensors beside it.
        *arrays: What to differentiate by.
        jit: Whether XLA compiles the whole.
    """
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def run(*tensors):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value, auxiliary = function(*tensors)
            return value, auxiliary, tape.gradient(value, tensors, unconnected_gradients="zero")

        run = tf.function(run, jit_compile=True) if jit else run
        value, auxiliary, grads = run(*[tf.constant(a) for a in arrays])
    else:
        import jax

        run = jax.value_and_grad(function, argnums=tuple(range(len(arrays))), has_aux=True)
        run = jax.jit(run) if jit else run
        (value, auxiliary), grads = run(*[jax.numpy.asarray(a) for a in arrays])
    return keras.tree.map_structure(numpy, (value, auxiliary, list(grads)))


def cross_entropy(labels, logits):
    """Mean softmax cross-entropy of integer labels."""
    return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True))


def model_grads(model, x, loss, training: bool, jit: bool = False):
    """The loss, the output, the gradients of trainable weights by path, and the other weights after the call.

    Args:
        model: A built model.
        x: Its input.
        loss: From the output to a scalar tensor.
        training: As in `model(x, training=...)`.
        jit: Whether XLA compiles the whole.
    """
    trainable = [w.path for w in model.trainable_variables]
    others = [w.path for w in model.non_trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def run(x):
            with tf.GradientTape() as tape:
                output = model(x, training=training)
                value = loss(output)
            grads = tape.gradient(value, [w.value for w in model.trainable_variables], unconnected_gradients="zero")
            return value, output, grads

        run = tf.function(run, jit_compile=True) if jit else run
        value, output, grads = run(tf.constant(x))
        after = [w.numpy() for w in model.non_trainable_variables]
    else:
        import jax

        def objective(weights, state, x):
            output, state = model.stateless_call(weights, state, x, training=training)
            return loss(output), (output, state)

        run = jax.value_and_grad(objective, has_aux=True)
        run = jax.jit(run) if jit else run
        (value, (output, after)), grads = run(
            [w.value for w in model.trainable_variables], [w.value for w in model.non_trainable_variables], x
        )
    return (
        float(value),
        numpy(output),
        dict(zip(trainable, map(numpy, grads), strict=True)),
        dict(zip(others, map(np.asarray, after), strict=True)),
    )


def neuron_layers(model):
    """The neuron layers of a functional model, in order."""
    from keras_dsr.layers import SpikingNeuron

    return [layer for layer in model.layers if isinstance(layer, SpikingNeuron)]


def spike_trains(model, x, jit: bool = False):
    """Per neuron layer, by name, the spikes (batch, time, ...) that it puts out in inference."""
    probe = keras.Model(model.input, {layer.name: layer.output[0] for layer in neuron_layers(model)})
    if BACKEND == "tensorflow":
        import tensorflow as tf

        run = tf.function(lambda x: probe(x, training=False), jit_compile=True) if jit else probe
        return keras.tree.map_structure(numpy, run(tf.constant(x)))
    import jax

    def run(weights, state, x):
        return probe.stateless_call(weights, state, x, training=False)[0]

    run = jax.jit(run) if jit else run
    weights, state = ([w.value for w in ws] for ws in (probe.trainable_variables, probe.non_trainable_variables))
    return keras.tree.map_structure(numpy, run(weights, state, x))


def relative_error(received: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference, relative to that of what is expected."""
    return float(np.linalg.norm(received - expected) / max(np.linalg.norm(expected), 1e-30))


def cosine(received: np.ndarray, expected: np.ndarray) -> float:
    """The cosine of the angle between two arrays."""
    return float(
        np.vdot(received.astype("float64"), expected.astype("float64"))
        / (np.linalg.norm(received.astype("float64")) * np.linalg.norm(expected.astype("float64")))
    )


def compiled(function, jit: bool):
    """`function`, compiled by XLA if `jit` says so."""
    if not jit:
        return function
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    import jax

    return jax.jit(function)


def with_weights(variables, values, function, *args, **kwargs):
    """function(*args, **kwargs) with other values for some Keras variables: what weights are differentiated by."""
    with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
        return function(*args, **kwargs)


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 (or wider) numbers that `dtype` can hold."""
    return numpy(ops.cast(ops.cast(x, dtype), x.dtype.name))


def saved_and_loaded(model, folder):
    """The model, written to a `.keras` file and read again."""
    path = folder / "model.keras"
    model.save(path)
    return keras.saving.load_model(path)


def dyadics(shape, low: float, high: float, bits: int = 4, seed: int = 0) -> np.ndarray:
    """Random multiples of 2**-bits in [low, high]: their sums are exact in float32."""
    generator = np.random.default_rng(seed)
    return (generator.integers(round(low * 2**bits), round(high * 2**bits) + 1, shape) / 2**bits).astype("float32")

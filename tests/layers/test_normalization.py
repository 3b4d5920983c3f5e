"""BatchNormalization over batch and time: statistics, both halves, gradients, and the stock layer where they meet."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy, with_weights
from keras import ops

from keras_dsr import RateCoding, Stream, WeightedRateCoding, layers

JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
AXES = pytest.mark.parametrize("axis", [-1, 1], ids=["channels_last", "channels_first"])


def make_values(shape=(4, 3, 2, 5), seed=0):
    """(batch, time, ...) with a trend in time, so that pooled statistics are not those of the representation."""
    generator = np.random.default_rng(seed)
    trend = np.linspace(-1, 2, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    return (generator.normal(size=shape) * generator.uniform(0.5, 2, shape[-1]) + trend).astype("float32")


def make_stream(values, coding=RateCoding()):  # noqa: B008
    return Stream(ops.convert_to_tensor(values), coding.represent(ops.convert_to_tensor(values)))


def randomise(layer, seed=1):
    """Weights as after some training."""
    generator = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(generator.uniform(0.5, 1.5, weight.shape).astype("float32"))
    return {weight.path.rsplit("/")[-1]: numpy(weight).astype("float64") for weight in layer.weights}


def pooled(values, axis):
    """Mean and variance over batch and time, shaped to broadcast with (batch, time, ...)."""
    rank = values.ndim - 1
    axes = tuple(a for a in range(values.ndim) if a != axis % rank + 1)
    return values.mean(axes, dtype="float64", keepdims=True), values.var(axes, dtype="float64", keepdims=True)


def spread(vector, values, axis):
    shape = [1] * values.ndim
    shape[axis % (values.ndim - 1) + 1] = -1
    return vector.reshape(shape)


@AXES
@pytest.mark.parametrize("shape", [(6, 3, 4), (4, 3, 2, 5), (3, 2, 4, 3, 2)])
def test_training_normalizes_by_batch_and_time(shape, axis):
    values = make_values(shape)
    layer = layers.BatchNormalization(axis=axis, momentum=0.75, epsilon=1e-3)
    stream = make_stream(values)
    layer.build([values.shape, stream.representation.shape])
    weights = randomise(layer)
    out = layer(stream, training=True)

    mean, variance = pooled(values, axis)
    factor = spread(weights["gamma"], values, axis) / np.sqrt(variance + 1e-3)
    expected = (values - mean) * factor + spread(weights["beta"], values, axis)
    np.testing.assert_allclose(numpy(out.values), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(out.representation), expected.mean(axis=1), rtol=1e-4, atol=1e-5)
    for moving, statistic in (("moving_mean", mean), ("moving_variance", variance)):
        updated = 0.75 * weights[moving] + 0.25 * statistic.reshape(-1)
        np.testing.assert_allclose(numpy(getattr(layer, moving)), updated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["inference", "frozen"])
@AXES
def test_moving_statistics_where_nothing_trains(mode, axis):
    values = make_values()
    layer = layers.BatchNormalization(axis=axis)
    stream = make_stream(values)
    layer.build([values.shape, stream.representation.shape])
    weights = randomise(layer)
    layer.trainable = mode != "frozen"
    out = layer(stream, training=mode == "frozen")
    mean, variance, gamma, beta = (
        spread(weights[name], values, axis) for name in ("moving_mean", "moving_variance", "gamma", "beta")
    )
    expected = gamma * (values - mean) / np.sqrt(variance + 1e-3) + beta
    np.testing.assert_allclose(numpy(out.values), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(out.representation), expected.mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(numpy(layer.moving_mean), weights["moving_mean"].astype("float32"))
    np.testing.assert_array_equal(numpy(layer.moving_variance), weights["moving_variance"].astype("float32"))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("coding", [RateCoding(), WeightedRateCoding(1.0, 0.5)], ids=["rate", "weighted_rate"])
def test_representation_is_that_of_the_values(coding, training):
    out = layers.BatchNormalization()(make_stream(make_values(), coding), training=training)
    expected = numpy(coding.represent(out.values))
    np.testing.assert_allclose(numpy(out.representation), expected, rtol=1e-4, atol=1e-5)


def closed_form(values, representation, gamma, upstream, epsilon):
    """The gradients of sum(upstream * output representation), of features on the last axis, by hand.

    y = gamma (r - m) s + beta with s = (v + eps)^-1/2, where m has the gradient of mean(r), so d m / d r_i = 1 / n, and
    v that of var(r), so d v / d r_i = 2 (r_i - mean(r)) / n. d s / d v = -s^3 / 2.
    """
    axes = tuple(range(representation.ndim - 1))
    count = representation[..., 0].size
    mean, variance = (each.reshape(-1) for each in pooled(values, -1))
    s = 1 / np.sqrt(variance + epsilon)
    centred = representation - mean
    dgamma = (upstream * centred * s).sum(axes)
    dbeta = upstream.sum(axes)
    dv = gamma * (upstream * centred).sum(axes) * (-0.5) * s**3
    dm = -gamma * s * dbeta
    dr = gamma * s * upstream + dm / count + dv * 2 * (representation - representation.mean(axes)) / count
    return dr, dgamma, dbeta


def gradients(layer, values, representation, upstream, training, jit):
    """By the values, the representation, gamma and beta."""
    weights = [layer.gamma, layer.beta]

    def function(values, representation, *weight_values):
        out = with_weights(weights, weight_values, layer, Stream(values, representation), training=training)
        return ops.sum(out.representation * upstream) + 100.0 * ops.sum(out.values**2), ()

    return helpers.value_and_grads(function, values, representation, *[numpy(w) for w in weights], jit=jit)[2]


@JIT
@pytest.mark.parametrize("shape", [(6, 3, 4), (4, 3, 2, 5)])
def test_training_gradients_are_those_of_the_rule(shape, jit):
    values = make_values(shape)
    representation = values.mean(axis=1)
    upstream = np.random.default_rng(3).normal(size=representation.shape).astype("float32")
    layer = layers.BatchNormalization(epsilon=1e-3)
    layer.build([values.shape, representation.shape])
    weights = randomise(layer)
    received = gradients(layer, values, representation, upstream, training=True, jit=jit)
    np.testing.assert_array_equal(received[0], np.zeros_like(values))
    expected = closed_form(values.astype("float64"), representation, weights["gamma"], upstream, 1e-3)
    for one, other in zip(received[1:], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_rule_is_the_derivative_where_there_is_one_step():
    """The closed form, checked by finite differences: with N = 1 the rule is the derivative of the forward formula."""
    generator = np.random.default_rng(0)
    r = generator.normal(size=(5, 3))
    upstream = generator.normal(size=(5, 3))
    gamma = np.array([0.5, 1.0, 2.0])

    def loss(r):
        return np.sum(upstream * gamma * (r - r.mean(0)) / np.sqrt(r.var(0) + 1e-3))

    expected = np.zeros_like(r)
    for index in np.ndindex(r.shape):
        step = np.zeros_like(r)
        step[index] = 1e-6
        expected[index] = (loss(r + step) - loss(r - step)) / 2e-6
    dr, _, _ = closed_form(r[:, None], r, gamma, upstream, 1e-3)
    np.testing.assert_allclose(dr, expected, rtol=1e-5, atol=1e-7)


@JIT
def test_statistics_are_constants_in_inference(jit):
    values = make_values()
    representation = values.mean(axis=1)
    upstream = np.random.default_rng(3).normal(size=representation.shape).astype("float32")
    layer = layers.BatchNormalization()
    layer.build([values.shape, representation.shape])
    weights = randomise(layer)
    dvalues, dr, dgamma, dbeta = gradients(layer, values, representation, upstream, training=False, jit=jit)
    s = 1 / np.sqrt(weights["moving_variance"] + 1e-3)
    np.testing.assert_array_equal(dvalues, np.zeros_like(values))
    np.testing.assert_allclose(dr, weights["gamma"] * s * upstream, rtol=1e-5)
    centred = (representation - weights["moving_mean"]) * s
    np.testing.assert_allclose(dgamma, (upstream * centred).sum((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dbeta, upstream.sum((0, 1)), rtol=1e-4, atol=1e-5)


@AXES
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_no_time_steps_are_the_stock_layer(training, axis):
    x = make_values()[:, 0]
    upstream = np.random.default_rng(3).normal(size=x.shape).astype("float32")
    ours, stock = layers.BatchNormalization(axis=axis), keras.layers.BatchNormalization(axis=axis)
    empty = np.zeros((4, 0, 2, 5), "float32")
    ours.build([empty.shape, x.shape])
    stock.build(x.shape)
    randomise(ours)
    randomise(stock)

    def function_of(layer, wrap, unwrap):
        def function(x, gamma, beta):
            out = unwrap(with_weights([layer.gamma, layer.beta], [gamma, beta], layer, wrap(x), training=training))
            return ops.sum(out * upstream), out

        arrays = x, numpy(layer.gamma), numpy(layer.beta)
        _, out, grads = helpers.value_and_grads(function, *arrays)
        layer(wrap(ops.convert_to_tensor(x)), training=training)
        return out, *grads, numpy(layer.moving_mean), numpy(layer.moving_variance)

    received = function_of(ours, lambda x: Stream(ops.convert_to_tensor(empty), x), lambda out: out.representation)
    expected = function_of(stock, lambda x: x, lambda out: out)
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_values_are_those_of_the_stock_layer_on_batch_and_time(training):
    values = make_values()
    ours, stock = layers.BatchNormalization(), keras.layers.BatchNormalization()
    stock.build(values.shape)
    ours.build([values.shape, (4, 2, 5)])
    randomise(ours)
    stock.set_weights(ours.get_weights())
    received = ours(make_stream(values), training=training).values
    expected = stock(ops.convert_to_tensor(values), training=training)
    np.testing.assert_allclose(numpy(received), numpy(expected), rtol=1e-4, atol=1e-5)
    for one, other in zip(ours.weights, stock.weights, strict=True):
        np.testing.assert_allclose(numpy(one), numpy(other), rtol=1e-5, atol=1e-6)


def test_defaults_are_the_stock_layers():
    ours, stock = (
        layers.BatchNormalization(name="bn").get_config(),
        keras.layers.BatchNormalization(name="bn").get_config(),
    )
    assert ours == {name: value for name, value in stock.items() if not name.startswith("renorm")}


@pytest.mark.parametrize("without", ["center", "scale"])
def test_without_beta_or_gamma(without):
    values = make_values()
    layer = layers.BatchNormalization(**{without: False})
    out = layer(make_stream(values), training=True)
    assert len(layer.trainable_weights) == 1
    mean, variance = pooled(values, -1)
    np.testing.assert_allclose(numpy(out.values), (values - mean) / np.sqrt(variance + 1e-3), rtol=1e-4, atol=1e-5)


def test_config_round_trip():
    layer = layers.BatchNormalization(
        axis=1, momentum=0.5, epsilon=1e-4, center=False, gamma_regularizer="l2", gamma_initializer="zeros", name="bn"
    )
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == layer.get_config()
    assert (again.axis, again.momentum, again.epsilon, again.center, again.scale) == (1, 0.5, 1e-4, False, True)


def test_keras_file_round_trip(tmp_path):
    inputs = keras.Input((3, 2, 5))
    model = keras.Model(inputs, list(layers.BatchNormalization()(layers.ToStream()(inputs))))
    randomise(model)
    x = make_values()
    loaded = helpers.saved_and_loaded(model, tmp_path)
    for received, expected in zip(loaded(x), model(x), strict=True):
        np.testing.assert_array_equal(numpy(received), numpy(expected))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    values = make_values()
    layer = layers.BatchNormalization(dtype=policy)
    out = layer(make_stream(values), training=True)
    compute = policy.removeprefix("mixed_")
    assert [keras.backend.standardize_dtype(part.dtype) for part in out] == [compute, compute]
    assert {weight.dtype for weight in layer.weights} == {"float32"}
    mean, variance = pooled(values, -1)
    expected = (values - mean) / np.sqrt(variance + 1e-3)
    np.testing.assert_allclose(numpy(out.values).astype("float32"), expected, atol=0.05)


def test_float64_is_not_narrowed():
    # Spread so that a mean and a variance in float32 would be wrong by far more than the tolerance.
    values = make_values().astype("float64") + 1000.0
    with helpers.wide_floats():
        stream = Stream(ops.convert_to_tensor(values, "float64"), ops.convert_to_tensor(values.mean(axis=1), "float64"))
        layer = layers.BatchNormalization(epsilon=1e-5, dtype="float64")
        neurons = layers.IFSpike(0.25, dtype="float64")
        currents = layer(stream, training=True)
        spikes = neurons(currents)
        mean, variance = values.mean(axis=(0, 1, 2)), values.var(axis=(0, 1, 2))
        expected = (values - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(numpy(currents.values), expected, rtol=0, atol=1e-10)
        coded = (values.mean(axis=1) - mean) / np.sqrt(variance + 1e-5)
        np.testing.assert_allclose(numpy(currents.representation), coded, rtol=0, atol=1e-10)
        assert set(np.unique(numpy(spikes.values))) == {0.0, 0.25}
        assert {keras.backend.standardize_dtype(each.dtype) for each in (*currents, *spikes)} == {"float64"}
        assert neurons.threshold.dtype == layer.moving_mean.dtype == "float64"


def test_renorm_is_refused():
    with pytest.raises((TypeError, ValueError), match="renorm"):
        layers.BatchNormalization(renorm=True)


@pytest.mark.skipif(helpers.BACKEND != "jax", reason="TensorFlow has it")
def test_synchronized_on_jax_is_an_error():
    with pytest.raises(ValueError, match="synchronized"):
        layers.BatchNormalization(synchronized=True)


REPLICAS = """
import sys
import keras, numpy as np, tensorflow as tf
from keras_dsr import layers

replicas = int(sys.argv[1])
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
with strategy.scope():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 4))
    norm = layers.BatchNormalization(momentum=0.5, synchronized=True)
    x = layers.IFSpike(threshold=1.0)(norm(layers.ToStream()(inputs)))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    model.compile(keras.optimizers.SGD(0.5), "mean_squared_error", jit_compile=False)
generator = np.random.default_rng(0)
# The halves of the batch differ, so that each alone has other statistics than both.
x = generator.normal(size=(8, 3, 4)).astype("float32") + np.repeat([0.0, 3.0], 4).astype("float32")[:, None, None]
y = generator.normal(size=(8, 4)).astype("float32")
model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
np.savez(sys.argv[2], **{w.path.replace("/", "__"): w.numpy() for w in model.weights})
"""


@pytest.mark.tensorflow_only
def test_synchronized_replicas_share_their_statistics(tmp_path):
    """In a process of its own: virtual devices are set before TensorFlow starts."""
    weights = []
    for replicas in (1, 2):
        path = tmp_path / f"{replicas}.npz"
        done = subprocess.run(
            [sys.executable, "-c", REPLICAS, str(replicas), str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(dict(np.load(path)))
    one, two = weights
    assert one.keys() == two.keys()
    assert len(one) == 5
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_several_axes_are_refused():
    with pytest.raises(TypeError, match=r"Received axis=\[1, 2\]"):
        layers.BatchNormalization(axis=[1, 2])

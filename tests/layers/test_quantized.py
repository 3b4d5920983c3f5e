"""Weights of few bits against a NumPy oracle, and their straight-through gradient against the float layer's."""

from __future__ import annotations

import json

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy, with_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_dsr import Stream, layers, models
from keras_dsr.layers.quantized import quantize, straight_through

JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
BITS = (2, 3, 4, 8, 16)

# The quantized layer of some bits, the float layer of the same arguments, and the shape of one sample.
LAYERS = {
    "Conv2D": (
        lambda bits: layers.QuantizedConv2D(3, 3, bits=bits, strides=2, padding="same"),
        lambda: keras.layers.Conv2D(3, 3, strides=2, padding="same"),
        (6, 6, 2),
    ),
    "Conv2D_no_bias": (
        lambda bits: layers.QuantizedConv2D(4, (1, 3), bits, use_bias=False, groups=2),
        lambda: keras.layers.Conv2D(4, (1, 3), use_bias=False, groups=2),
        (4, 4, 2),
    ),
    "Conv2D_activation": (
        lambda bits: layers.QuantizedConv2D(3, 3, bits, activation="tanh"),
        lambda: keras.layers.Conv2D(3, 3, activation="tanh"),
        (5, 5, 1),
    ),
    "Dense": (lambda bits: layers.QuantizedDense(4, bits), lambda: keras.layers.Dense(4), (6,)),
    "Dense_2d": (
        lambda bits: layers.QuantizedDense(4, bits=bits, use_bias=False),
        lambda: keras.layers.Dense(4, use_bias=False),
        (3, 6),
    ),
    "Dense_activation": (
        lambda bits: layers.QuantizedDense(4, bits, activation="relu"),
        lambda: keras.layers.Dense(4, activation="relu"),
        (6,),
    ),
}
NAMES = pytest.mark.parametrize("name", LAYERS)


def oracle(kernel, bits):
    """q and step, one output channel at a time."""
    levels = 2 ** (bits - 1) - 1
    flat = kernel.reshape(-1, kernel.shape[-1])
    q, steps = np.zeros_like(flat), np.ones(flat.shape[1], kernel.dtype) / levels
    for channel in range(flat.shape[1]):
        largest = np.abs(flat[:, channel]).max()
        if largest:
            steps[channel] = largest / kernel.dtype.type(levels)
            q[:, channel] = np.rint(flat[:, channel] / steps[channel])
    return q.reshape(kernel.shape), steps


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def built(name, bits=4):
    """The quantized layer, the float layer with the weights that it computes with, and inputs."""
    make, stock, shape = LAYERS[name]
    layer, other = make(bits), stock()
    x = normal((5, *shape))
    layer(x), other(x)
    layer.set_weights([normal(w.shape, seed) for seed, w in enumerate(layer.weights)])
    kernel, *bias = layer.get_weights()
    q, step = oracle(kernel, bits)
    other.set_weights([q * step, *bias])
    return layer, other, x


def test_a_table_worked_by_hand():
    kernel = np.array([[0.5, -3.0, 0.0], [-1.0, 1.6, 0.0], [0.1, 1.4, 0.0]], "float32")
    q, step = quantize(kernel, 3)  # three levels on each side of 0
    np.testing.assert_allclose(numpy(step), [1 / 3, 1.0, 1 / 3], rtol=1e-6)
    np.testing.assert_array_equal(numpy(q), [[2, -3, 0], [-3, 2, 0], [0, 1, 0]])


@pytest.mark.parametrize("shape", [(7, 3), (3, 3, 2, 5), (1, 1)])
@pytest.mark.parametrize("bits", BITS)
@JIT
def test_whole_numbers_and_steps_are_the_oracles(jit, bits, shape):
    kernel = normal(shape)
    q, step = map(numpy, helpers.compiled(lambda k: quantize(k, bits), jit)(kernel))
    expected_q, expected_step = oracle(kernel, bits)
    np.testing.assert_allclose(step, expected_step, rtol=1e-6)
    # XLA may divide by multiplying with the reciprocal: a weight at the middle between two levels may go to either.
    halves = np.abs(np.abs(kernel / expected_step) % 1 - 0.5) < 1e-2
    np.testing.assert_array_equal(q[~halves], expected_q[~halves])
    assert np.abs(q - expected_q).max() <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 16), st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_no_weight_is_off_by_more_than_half_a_step(bits, seed, exponent):
    kernel = np.random.default_rng(seed).normal(size=(9, 4)).astype("float32") * np.float32(2.0**exponent)
    q, step = map(numpy, quantize(kernel, bits))
    levels = 2 ** (bits - 1) - 1
    assert np.abs(q).max() == levels
    assert (np.abs(q).max(axis=0) == levels).all()
    np.testing.assert_array_equal(q, np.rint(q))
    assert (np.abs(q * step - kernel).max(axis=0) <= 1.0001 * step / 2).all()


@pytest.mark.parametrize("bits", BITS)
def test_a_kernel_of_zeros_stays_one(bits):
    kernel = np.zeros((3, 2), "float32")
    kernel[:, 1] = [0.0, -1.0, 0.5]
    q, step = map(numpy, quantize(kernel, bits))
    np.testing.assert_array_equal(q[:, 0], 0)
    assert (step > 0).all()
    assert np.isfinite(numpy(straight_through(kernel, bits))).all()


@pytest.mark.parametrize("bits", BITS)
@JIT
def test_quantizing_twice_is_quantizing_once(jit, bits):
    once = numpy(helpers.compiled(lambda k: straight_through(k, bits), jit)(normal((5, 4))))
    np.testing.assert_allclose(numpy(straight_through(once, bits)), once, rtol=1e-6)


@JIT
def test_the_value_is_exactly_quantized_and_the_gradient_the_identity(jit):
    kernel, upstream = normal((5, 4)), normal((5, 4), seed=1)

    def run(k):
        q, step = quantize(k, 4)
        value = straight_through(k, 4)
        return ops.sum(value * upstream), (value, q * step)

    _, (value, expected), (gradient,) = helpers.value_and_grads(run, kernel, jit=jit)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, upstream)


@NAMES
@JIT
def test_outputs_and_gradients_are_those_of_the_float_layer_with_the_quantized_kernel(jit, name):
    layer, other, x = built(name, bits=3)
    upstream = normal(other(x).shape, seed=9)

    def run(each):
        def loss(inputs, *weights):
            out = with_weights(each.trainable_weights, weights, each, inputs)
            return ops.sum(out * upstream), out

        return helpers.value_and_grads(loss, x, *(numpy(w) for w in each.trainable_weights), jit=jit)

    _, received, received_gradients = run(layer)
    _, expected, expected_gradients = run(other)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)
    for one, another in zip(received_gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, another, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Conv2D", "Dense"])
def test_a_synapse_quantizes_every_step_and_the_representation(name):
    layer, other, _ = built(name)
    shape = LAYERS[name][2]
    values = normal((2, 3, *shape))
    out = layers.Synapse(layer)(Stream(ops.convert_to_tensor(values), ops.mean(values, axis=1)))
    for n in range(3):
        np.testing.assert_allclose(numpy(out.values)[:, n], numpy(other(values[:, n])), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(numpy(out.representation), numpy(other(values.mean(axis=1))), rtol=1e-4, atol=1e-5)


@NAMES
def test_more_bits_come_closer_to_the_float_layer(name):
    layer, other, x = built(name)
    other.set_weights(layer.get_weights())
    errors = []
    for bits in BITS:
        layer.bits = bits
        errors.append(np.abs(numpy(layer(x)) - numpy(other(x))).max())
    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 1e-3


@NAMES
def test_config_round_trip(name):
    layer, _, x = built(name, bits=5)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(layer)
    assert again.bits == 5
    assert again.get_config() == layer.get_config()
    again(x)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(numpy(again(x)), numpy(layer(x)))


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "in_synapses"])
def test_keras_file_round_trip_keeps_the_float_weights(wrapped, tmp_path):
    inputs = keras.Input((6, 6, 1))
    convolve, dense = layers.QuantizedConv2D(3, 3, bits=3), layers.QuantizedDense(2, bits=6)
    x = inputs
    if wrapped:
        x = layers.IFSpike(1.0, timesteps=2)(x)
        x = layers.Synapse(dense)(layers.Synapse(keras.layers.Flatten())(layers.Synapse(convolve)(x)))
        x = layers.SpikeRep()(x)
    else:
        x = dense(keras.layers.Flatten()(convolve(x)))
    model = keras.Model(inputs, x)
    loaded = helpers.saved_and_loaded(model, tmp_path)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    samples = normal((2, 6, 6, 1))
    for other in (loaded, clone):
        for received, expected in zip(other.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(received, expected)
        np.testing.assert_array_equal(numpy(other(samples)), numpy(model(samples)))
    kernel = model.get_weights()[0 if not wrapped else 1]
    assert len(np.unique(kernel)) == kernel.size


# The network, and how many convolutions it has.
MODELS = {
    "small_cnn": (lambda bits: models.small_cnn((4,), timesteps=2, weight_bits=bits), 1),
    "preact_resnet": (
        lambda bits: models.preact_resnet(20, timesteps=0, input_shape=(8, 8, 3), weight_bits=bits),
        21,
    ),
    "vgg": (lambda bits: models.vgg(5, input_shape=(2, 8, 8, 2), timesteps=0, weight_bits=bits), 4),
}


def kernels(model):
    """The layers of a model that compute with few bits, and their kernels."""
    inner = [layer.layer if isinstance(layer, layers.Synapse) else layer for layer in model.layers]
    return [each for each in inner if isinstance(each, (layers.QuantizedConv2D, layers.QuantizedDense))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "small_cnn" else pytest.mark.tensorflow_only) for name in MODELS]
)
def test_networks_of_four_bits_have_no_float_kernel(name):
    build, convolutions = MODELS[name]
    model, stock = build(4), build(None)
    found = kernels(model)
    assert [type(each) for each in found].count(layers.QuantizedConv2D) == convolutions
    assert [type(each) for each in found].count(layers.QuantizedDense) == 1
    assert {each.bits for each in found} == {4}
    assert sum(weight.path.endswith("kernel") for weight in model.weights) == len(found)
    assert not kernels(stock)
    assert [weight.path for weight in model.weights] == [weight.path for weight in stock.weights]


def test_a_fit_step_changes_the_float_weights():
    model = models.small_cnn((4, 4), layers.IFSpike(threshold=1.0), timesteps=2, weight_bits=4)
    before = model.get_weights()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(normal((16, 8, 8, 1)), np.arange(16) % 10, epochs=2, batch_size=8, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    for weight, old, new in zip(model.weights, before, model.get_weights(), strict=True):
        if weight.path.endswith("kernel"):
            assert (old != new).any(), weight.path


def test_with_timesteps_keeps_the_bits():
    spiking = models.small_cnn((4,), timesteps=2, weight_bits=3)
    ann = models.with_timesteps(spiking, 0)
    assert [each.bits for each in kernels(ann)] == [3, 3]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        layer = layers.QuantizedDense(3, bits=4)
        out = layer(normal((5, 6)))
    finally:
        keras.config.set_dtype_policy("float32")
    assert keras.backend.standardize_dtype(out.dtype) == policy.removeprefix("mixed_")
    assert layer.kernel.dtype == "float32"
    assert np.isfinite(numpy(ops.cast(out, "float32"))).all()


@pytest.mark.parametrize("bits", [1, 0, -4, 17, 8.0, "8", True, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda bits: layers.QuantizedConv2D(3, 3, bits=bits),
        lambda bits: layers.QuantizedDense(3, bits=bits),
        lambda bits: models.small_cnn((2,), weight_bits=bits if bits is not None else 1),
    ],
    ids=["QuantizedConv2D", "QuantizedDense", "small_cnn"],
)
def test_bits_out_of_range_are_refused(make, bits):
    with pytest.raises(ValueError, match=r"whole number from 2 to 16\. Received bits="):
        make(bits)

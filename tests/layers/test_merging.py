"""Add and Dropout on streams."""

from __future__ import annotations

import json

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from keras import ops

from keras_dsr import Stream, layers


def make_stream(shape=(2, 3, 4), seed=0):
    values = ops.convert_to_tensor(helpers.dyadics(shape, -1, 1, seed=seed))
    return Stream(values, ops.mean(values, axis=1))


@pytest.mark.parametrize("count", [2, 3])
def test_add_adds_both_halves(count):
    streams = [make_stream(seed=seed) for seed in range(count)]
    out = layers.Add()(streams)
    assert isinstance(out, Stream)
    np.testing.assert_array_equal(numpy(out.values), sum(numpy(each.values) for each in streams))
    expected = sum(numpy(each.representation).astype("float64") for each in streams)
    np.testing.assert_allclose(numpy(out.representation), expected, rtol=1e-6, atol=1e-7)


def test_add_gives_its_gradient_to_every_representation():
    def function(a_values, a, b_values, b):
        out = layers.Add()([Stream(a_values, a), Stream(b_values, b)])
        return ops.sum(out.representation * upstream) + ops.sum(out.values**2), ()

    upstream = helpers.dyadics((2, 4), -1, 1, seed=5)
    arrays = [numpy(part) for seed in (0, 1) for part in make_stream(seed=seed)]
    a_values, a, b_values, b = helpers.value_and_grads(function, *arrays)[2]
    np.testing.assert_array_equal(a, upstream)
    np.testing.assert_array_equal(b, upstream)
    np.testing.assert_array_equal(a_values, np.zeros((2, 3, 4)))
    np.testing.assert_array_equal(b_values, np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (lambda: make_stream(), ValueError, "expects a list of two or more streams. Received Stream"),
        (lambda: [make_stream()], ValueError, "expects a list of two or more streams. Received 1"),
        (list, ValueError, "expects a list of two or more streams"),
        (lambda: ops.zeros((2, 3)), ValueError, "expects a list of two or more streams"),
        (
            lambda: [make_stream((2, 3, 4)), make_stream((2, 3, 5))],
            ValueError,
            r"streams of one shape.*\(2, 3, 4\), \(2, 3, 5\).*1x1 convolution",
        ),
        (lambda: [make_stream((2, 3, 1)), make_stream((2, 3, 5))], ValueError, "streams of one shape"),
        (lambda: [make_stream((2, 3, 4)), make_stream((2, 2, 4))], ValueError, "streams of one shape"),
        (lambda: [make_stream((2, 3, 4)), make_stream((2, 3, 4, 4))], ValueError, "streams of one shape"),
        (lambda: [make_stream(), ops.zeros((2, 3, 4))], TypeError, "expects a stream. Received a tensor of shape"),
    ],
)
def test_add_refuses(inputs, error, message):
    with pytest.raises(error, match=message):
        layers.Add()(inputs())


def test_add_refuses_other_shapes_while_a_model_is_built():
    narrow, wide = (layers.ToStream()(keras.Input((3, width))) for width in (4, 5))
    with pytest.raises(ValueError, match=r"streams of one shape.*\(None, 3, 4\), \(None, 3, 5\)"):
        layers.Add()([narrow, wide])


def test_add_of_streams_without_steps():
    one = layers.IFSpike(threshold=1.0, timesteps=0)(np.full((2, 4), 0.25, "float32"))
    out = layers.Add()([one, one])
    assert out.timesteps == 0
    np.testing.assert_array_equal(numpy(out.representation), np.full((2, 4), 0.5))


def test_a_residual_model_round_trips(tmp_path):
    inputs = keras.Input((3, 4))
    stream = layers.ToStream()(inputs)
    branch = layers.Synapse(keras.layers.Dense(4))(layers.IFSpike(threshold=0.5)(stream))
    model = keras.Model(inputs, list(layers.Dropout(0.5, seed=3)(layers.Add()([stream, branch, stream]))))
    loaded = helpers.saved_and_loaded(model, tmp_path)
    x = helpers.dyadics((2, 3, 4), -1, 1)
    for received, expected in zip(loaded(x), model(x), strict=True):
        np.testing.assert_array_equal(numpy(received), numpy(expected))


def ones(shape=(64, 5, 20)):
    return Stream(ops.ones(shape), ops.ones((shape[0], *shape[2:])))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_one_mask_for_all_steps_and_both_halves(jit):
    layer = layers.Dropout(0.25, seed=0)
    if helpers.BACKEND == "jax" and jit:
        import jax

        layer.build(None)
        state = [w.value for w in layer.non_trainable_variables]
        call = jax.jit(lambda one: layer.stateless_call([], state, one, training=True)[0])
    else:
        call = helpers.compiled(lambda one: layer(one, training=True), jit)
    values, representation = map(numpy, call(ones()))
    assert set(np.unique(representation)) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_array_equal(values, np.repeat(representation[:, None], 5, axis=1))
    assert np.mean(representation == 0) == pytest.approx(0.25, abs=0.05)
    assert len(np.unique(representation, axis=0)) == 64  # a mask for each sample


def test_dropout_gradient_is_the_mask():
    layer = layers.Dropout(0.5, seed=0)

    def function(values, representation):
        out = layer(Stream(values, representation), training=True)
        return ops.sum(out.representation) + ops.sum(out.values), out.representation

    values, representation = map(numpy, ones((8, 3, 4)))
    _, mask, (by_values, by_representation) = helpers.value_and_grads(function, values, representation)
    np.testing.assert_array_equal(by_representation, mask)
    np.testing.assert_array_equal(by_values, np.zeros((8, 3, 4)))


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_dropout_of_nothing(rate, training):
    one = make_stream()
    out = layers.Dropout(rate)(one, training=training)
    np.testing.assert_array_equal(numpy(out.values), numpy(one.values))
    np.testing.assert_array_equal(numpy(out.representation), numpy(one.representation))


def test_dropout_seeds():
    def masks(seed):
        layer = layers.Dropout(0.5, seed=seed)
        return [numpy(layer(ones(), training=True).representation) for _ in range(2)]

    first, second = masks(7)
    assert (first != second).any()
    np.testing.assert_array_equal(masks(7)[0], first)
    assert (masks(8)[0] != first).any()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, float("nan")])
def test_dropout_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=rf"must be in \[0, 1\). Received rate={rate!r}"):
        layers.Dropout(rate)


def test_dropout_of_a_stream_without_steps():
    one = Stream(ops.ones((64, 0, 20)), ops.ones((64, 20)))
    out = layers.Dropout(0.5, seed=0)(one, training=True)
    assert tuple(out.values.shape) == (64, 0, 20)
    assert set(np.unique(numpy(out.representation))) == {0.0, 2.0}


def test_configs():
    layer = layers.Dropout(0.25, seed=3, name="drop")
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
    assert again.get_config() == layer.get_config()
    assert {"rate": 0.25, "seed": 3, "name": "drop"}.items() <= layer.get_config().items()
    assert layers.Add.from_config(layers.Add(name="sum").get_config()).name == "sum"

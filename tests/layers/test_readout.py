"""SpikeRep, ToStream and ToTensor: out of streams and into them."""

from __future__ import annotations

import json

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from keras import ops

from keras_dsr import RateCoding, Stream, WeightedRateCoding, layers

HALF = WeightedRateCoding(1.0, 0.5)
CODINGS = pytest.mark.parametrize("coding", [RateCoding(), HALF], ids=["rate", "weighted_rate"])


def frames(shape=(2, 3, 4), seed=0):
    return helpers.dyadics(shape, -1, 1, seed=seed)


@CODINGS
def test_spike_rep_of_a_tensor(coding):
    x = frames((2, 5, 4, 3))
    upstream = frames((2, 4, 3), seed=1)

    def function(x):
        out = layers.SpikeRep(coding)(x)
        return ops.sum(out * upstream), out

    _, out, (dx,) = helpers.value_and_grads(function, x)
    weights = coding.weights(5)
    np.testing.assert_allclose(out, np.einsum("t,bt...->b...", weights, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, np.einsum("t,b...->bt...", weights, upstream), rtol=1e-5, atol=1e-6)


@CODINGS
def test_spike_rep_of_a_stream_is_its_representation(coding):
    def function(values, representation):
        out = layers.SpikeRep(coding)(Stream(values, representation))
        return ops.sum(out * upstream), out

    representation, upstream = frames((2, 4), 3), frames((2, 4), 4)
    _, out, (dvalues, drepresentation) = helpers.value_and_grads(function, frames(), representation)
    np.testing.assert_array_equal(out, representation)
    np.testing.assert_array_equal(drepresentation, upstream)
    np.testing.assert_array_equal(dvalues, np.zeros((2, 3, 4)))


@pytest.mark.parametrize("timesteps", [None, 3])
@CODINGS
def test_to_stream(coding, timesteps):
    x = frames()
    out = layers.ToStream(coding, timesteps=timesteps)(x)
    np.testing.assert_array_equal(numpy(out.values), x)
    expected = np.einsum("t,bt...->b...", coding.weights(3), x)
    np.testing.assert_allclose(numpy(out.representation), expected, rtol=1e-5, atol=1e-6)


@CODINGS
def test_to_stream_without_steps(coding):
    x = frames()
    out = layers.ToStream(coding, timesteps=0)(x)
    assert tuple(out.values.shape) == (2, 0, 4)
    expected = np.einsum("t,bt...->b...", coding.weights(3), x)
    np.testing.assert_allclose(numpy(out.representation), expected, rtol=1e-5, atol=1e-6)
    symbolic = layers.ToStream(coding, timesteps=0)(keras.Input((3, 4)))
    assert [tuple(part.shape) for part in symbolic] == [(None, 0, 4), (None, 4)]


@pytest.mark.parametrize("timesteps", [None, 0])
@CODINGS
def test_to_stream_gives_every_step_its_weight(coding, timesteps):
    upstream = frames((2, 4), seed=1)

    def function(x):
        out = layers.ToStream(coding, timesteps=timesteps)(x)
        return ops.sum(out.representation * upstream) + ops.sum(out.values**2), ()

    _, _, (dx,) = helpers.value_and_grads(function, frames())
    np.testing.assert_allclose(dx, np.einsum("t,bf->btf", coding.weights(3), upstream), rtol=1e-5, atol=1e-6)


def test_to_tensor_sums_its_cotangent_over_time():
    upstream = frames((2, 3, 4), seed=1)

    def function(values, representation):
        out = layers.ToTensor()(Stream(values, representation))
        return ops.sum(out * upstream), out

    _, out, (dvalues, drepresentation) = helpers.value_and_grads(function, frames(), frames((2, 4)))
    np.testing.assert_array_equal(out, frames())
    np.testing.assert_array_equal(dvalues, np.zeros((2, 3, 4)))
    np.testing.assert_array_equal(drepresentation, upstream.sum(axis=1))


@CODINGS
def test_there_and_back(coding):
    """A tensor, a stream, a tensor: the same numbers, and each step gets its part of the summed cotangent."""
    upstream = frames((2, 3, 4), seed=1)

    def function(x):
        out = layers.ToTensor()(layers.ToStream(coding)(x))
        return ops.sum(out * upstream), out

    _, out, (dx,) = helpers.value_and_grads(function, frames())
    np.testing.assert_array_equal(out, frames())
    expected = np.einsum("t,bf->btf", coding.weights(3), upstream.sum(axis=1))
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda tensor: layers.ToStream(timesteps=4)(tensor(3, 4)),
            ValueError,
            r"has timesteps=4, but its input has 3 time steps.*Cut the input into 4 steps, or leave timesteps out",
        ),
        (lambda tensor: layers.ToStream()(tensor(4)), ValueError, r"expects \(batch, time, \.\.\.\).*Received shape"),
        (lambda tensor: layers.ToStream()(tensor(0, 4)), ValueError, "with at least one time step"),
        (lambda tensor: layers.ToStream()(layers.ToStream()(tensor(3, 4))), TypeError, "Received a stream already"),
        (lambda tensor: layers.SpikeRep()(tensor(4)), ValueError, r"expects \(batch, time, \.\.\.\).*Received shape"),
        (lambda tensor: layers.SpikeRep()(tensor(3, 4, dtype="int32")), TypeError, "expects floats.*int32"),
        (lambda tensor: layers.ToStream()(tensor(3, 4, dtype="int32")), TypeError, "expects floats.*int32"),
        (
            lambda tensor: layers.ToTensor()(layers.ToStream(timesteps=0)(tensor(3, 4))),
            ValueError,
            r"stream of zero time steps.*Use keras_dsr\.layers\.SpikeRep\(\)",
        ),
    ],
)
def test_refusals(call, error, message, symbolic):
    def tensor(*shape, dtype="float32"):
        return keras.Input(shape, dtype=dtype) if symbolic else ops.zeros((2, *shape), dtype)

    with pytest.raises(error, match=message):
        call(tensor)


@pytest.mark.parametrize("make", [layers.ToStream, layers.SpikeRep])
def test_unknown_coding(make):
    with pytest.raises(ValueError, match=r"A coding is 'rate', 'weighted_rate'.*Received 'rates'"):
        make("rates")


@pytest.mark.parametrize("timesteps", [-1, True])
def test_to_stream_timesteps_out_of_range(timesteps):
    with pytest.raises(ValueError, match=f"timesteps={timesteps}"):
        layers.ToStream(timesteps=timesteps)


def test_symbolic_shapes():
    stream = layers.ToStream()(keras.Input((3, 4, 5)))
    assert [tuple(part.shape) for part in stream] == [(None, 3, 4, 5), (None, 4, 5)]
    assert tuple(layers.SpikeRep()(stream).shape) == (None, 4, 5)
    assert tuple(layers.ToTensor()(stream).shape) == (None, 3, 4, 5)
    assert tuple(layers.SpikeRep()(keras.Input((3, 4, 5))).shape) == (None, 4, 5)
    assert layers.SpikeRep().compute_output_shape(((2, 3, 4), (2, 4))) == (2, 4)
    assert layers.SpikeRep().compute_output_shape((2, 3, 4)) == (2, 4)
    assert layers.ToTensor().compute_output_shape(((2, 3, 4), (2, 4))) == (2, 3, 4)
    assert layers.ToStream().compute_output_shape((2, 3, 4)) == ((2, 3, 4), (2, 4))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.SpikeRep(HALF, name="one"),
        lambda: layers.ToStream(HALF, timesteps=3, name="one"),
        lambda: layers.ToTensor(name="one"),
    ],
    ids=["SpikeRep", "ToStream", "ToTensor"],
)
def test_config_round_trip(layer):
    layer = layer()
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
    assert type(again) is type(layer)
    assert again.name == "one"
    assert getattr(again, "coding", HALF) == HALF
    assert getattr(again, "timesteps", 3) == 3


def test_keras_file_round_trip(tmp_path):
    inputs = keras.Input((3, 4))
    stream = layers.ToStream(HALF)(inputs)
    tensor = layers.ToTensor()(stream)
    model = keras.Model(inputs, [tensor, layers.SpikeRep(HALF)(tensor), layers.SpikeRep()(stream)])
    loaded = helpers.saved_and_loaded(model, tmp_path)
    for received, expected in zip(loaded(frames()), model(frames()), strict=True):
        np.testing.assert_array_equal(numpy(received), numpy(expected))

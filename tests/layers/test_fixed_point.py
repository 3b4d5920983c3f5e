"""Rounding to a grid, and normalization in three operations: values, gradients, saving, and what is no grid."""

from __future__ import annotations

import math

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dsr import layers

FLOATS = st.floats(-100, 100, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20), st.integers(-6, 2), st.integers(1, 100))
def test_values_are_the_nearest_on_the_grid(values, exponent, steps):
    x = np.array([values], "float32")
    step = 2.0**exponent
    got = numpy(layers.FixedPoint(step, steps * step)(x))
    assert np.array_equal(got, np.clip(np.rint(x / step), -steps, steps) * step)
    assert not np.signbit(got[got == 0]).any()


def test_frames_keep_their_shape():
    x = np.full((2, 3, 4, 4, 2), 0.4, "float32")
    got = numpy(layers.FixedPoint(0.25, 2.0)(x))
    assert got.shape == x.shape
    assert (got == 0.5).all()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradient_is_that_of_the_clip(jit):
    x = np.array([[0.3, -0.7, 5.0, -5.0]], "float32")
    layer = layers.FixedPoint(0.5, 2.0)
    value, _, (gradient,) = helpers.value_and_grads(lambda x: (keras.ops.sum(layer(x)), 0), x, jit=jit)
    assert value == 0.5 - 0.5 + 2.0 - 2.0
    assert gradient.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_a_model_with_it_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.FixedPoint(0.125, 4.0, name="grid")])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.array([[0.07, 3.99, -9.0]], "float32")
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.get_layer("grid").get_config()["limit"] == 4.0


@pytest.mark.parametrize("step", [0.3, 0.0, -0.5, math.nan, math.inf])
def test_steps_that_are_no_power_of_two_are_refused(step):
    with pytest.raises(ValueError, match=r"step is a power of two.*Received step="):
        layers.FixedPoint(step, 4.0)


@pytest.mark.parametrize("limit", [0.0, -1.0, 0.3, 2.0**24, math.nan, math.inf])
def test_limits_that_are_not_on_the_grid_are_refused(limit):
    with pytest.raises(ValueError, match="limit is a whole multiple of step, from 1 to"):
        layers.FixedPoint(0.5, limit)


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="FixedPoint 'grid' expects floats"):
        layers.FixedPoint(0.5, 4.0, name="grid")(np.zeros((1, 2), "int32"))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_each_operation_is_rounded_on_its_own(jit):
    rng = np.random.default_rng(0)
    x, gamma, mean, beta = rng.normal(size=(4, 300, 7)).astype("float32")
    scale = layers.Scale()
    scale.build((None, 7))
    scale.set_weights([gamma[0], mean[0], beta[0]])
    _, got, _ = helpers.value_and_grads(lambda x: (keras.ops.sum(scale(x)), scale(x)), x, jit=jit)
    assert np.array_equal(got, (x - mean[0]) * gamma[0] + beta[0])


def test_scales_of_streams_are_saved(tmp_path):
    inputs = keras.Input((4,))
    x = layers.Synapse(layers.Scale(name="inner"), affine=True, name="scale")(layers.IFSpike(timesteps=2)(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0)(x)))
    model.get_layer("scale").layer.gamma.assign([1.0, 0.5, -1.0, 2.0])
    model.save(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(3, 2, (5, 4)).astype("float32")
    assert np.array_equal(
        keras.models.load_model(tmp_path / "model.keras").predict(x, verbose=0), model.predict(x, verbose=0)
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5000, 5000), min_size=2, max_size=20), st.integers(2, 12), st.integers(-6, 3))
def test_sums_become_whole_numbers_of_few_bits(sums, bits, exponent):
    x = np.array(sums, "float32")[:, None] * np.ones((1, 2), "float32")
    layer = layers.Requantize(bits, 2.0**exponent)
    layer.build((None, 2))
    scale, bias = np.array([0.037, 2.5], "float32"), np.array([3.0, -7.0], "float32")
    layer.set_weights([scale, bias])
    whole = np.clip(np.rint((x + bias) * scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert np.array_equal(numpy(layer(x)), whole * np.float32(2.0**exponent))


def test_halves_become_even():
    layer = layers.Requantize()
    layer.build((None, 1))
    layer.set_weights([np.array([0.5]), np.array([0.0])])
    assert numpy(layer(np.array([[1.0], [3.0], [5.0], [-1.0], [-3.0]], "float32"))).ravel().tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradient_of_requantization_is_that_of_the_clip(jit):
    layer = layers.Requantize(bits=4, step=0.5)
    layer.build((None, 1))
    layer.set_weights([np.array([0.25]), np.array([1.0])])
    x = np.array([[3.0], [26.0], [50.0], [-50.0]], "float32")
    value, _, (gradient,) = helpers.value_and_grads(lambda x: (keras.ops.sum(layer(x)), 0), x, jit=jit)
    assert value == 0.5 * (1 + 7 + 7 - 8)
    assert gradient.ravel().tolist() == [0.125, 0.125, 0.0, 0.0]


def test_requantization_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((3,)), layers.Requantize(6, 0.25, name="requantize")])
    model.layers[0].set_weights([np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0])])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.array([[7.0, -90.0, 900.0]], "float32")
    assert np.array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert (loaded.layers[-1].bits, loaded.layers[-1].step) == (6, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits is a whole number from 2 to 24. Received bits=1"),
        ({"bits": 25}, "Received bits=25"),
        ({"bits": True}, "Received bits=True"),
        ({"bits": 8.0}, "Received bits=8.0"),
        ({"step": 0.3}, "step is a power of two, such as 0.25. Received step=0.3"),
        ({"step": 0.0}, "Received step=0.0"),
        ({"step": math.inf}, "Received step=inf"),
    ],
)
def test_requantization_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.Requantize(**arguments)

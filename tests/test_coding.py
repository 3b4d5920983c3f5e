"""Codings: their weights, representations and clamps, against numbers by hand and NumPy."""

from __future__ import annotations

import dataclasses
import json
import math

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from keras import ops

from keras_dsr import RateCoding, WeightedRateCoding, coding

HALF = WeightedRateCoding(tau=1.0, dt=math.log(2.0))  # lambda is 1 / 2
CODINGS = pytest.mark.parametrize(
    "one", [RateCoding(), WeightedRateCoding(), WeightedRateCoding(2.0, 0.5)], ids=["rate", "weighted", "weighted_2"]
)


@pytest.mark.parametrize(
    ("one", "timesteps", "expected"),
    [
        (RateCoding(), 1, [1.0]),
        (RateCoding(), 4, [0.25, 0.25, 0.25, 0.25]),
        (HALF, 1, [1.0]),
        (HALF, 3, [1 / 7, 2 / 7, 4 / 7]),
        (HALF, 5, [1 / 31, 2 / 31, 4 / 31, 8 / 31, 16 / 31]),
    ],
)
def test_weights_by_hand(one, timesteps, expected):
    np.testing.assert_allclose(one.weights(timesteps), expected, rtol=1e-12)


@pytest.mark.parametrize("timesteps", [1, 2, 7, 100, np.int64(3)])
@CODINGS
def test_weights_add_to_one_and_decay(one, timesteps):
    weights = one.weights(timesteps)
    assert weights.shape == (timesteps,)
    assert weights.dtype == np.float64
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(weights[:-1] / weights[1:], np.full(timesteps - 1, one.decay), rtol=1e-12)


def test_decay():
    assert RateCoding().decay == 1.0
    assert WeightedRateCoding(tau=2.0, dt=0.5).decay == pytest.approx(math.exp(-0.25))


@pytest.mark.parametrize("timesteps", [0, -1, 1.5, None, True])
@CODINGS
def test_weights_of_no_steps(one, timesteps):
    with pytest.raises(ValueError, match=f"1 or more time steps. Received timesteps={timesteps!r}"):
        one.weights(timesteps)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.tensorflow_only)])
@pytest.mark.parametrize("shape", [(3, 4), (2, 7, 5), (2, 3, 4, 4, 2)])
@CODINGS
def test_represent(one, shape, dtype):
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    received = one.represent(ops.convert_to_tensor(values))
    assert keras.backend.standardize_dtype(received.dtype) == dtype
    powers = one.decay ** np.arange(shape[1] - 1, -1, -1)
    expected = np.tensordot(powers / powers.sum(), values.astype("float64"), axes=(0, 1))
    tolerance = 1e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(numpy(received), expected, rtol=tolerance, atol=tolerance)


@CODINGS
def test_gradient_of_represent_is_the_weight(one):
    upstream = helpers.dyadics((2, 3), -1, 1)
    _, _, (gradient,) = helpers.value_and_grads(
        lambda x: (ops.sum(one.represent(x) * upstream), ()), np.ones((2, 5, 3), "float32")
    )
    np.testing.assert_allclose(gradient, one.weights(5)[None, :, None] * upstream[:, None], rtol=1e-5, atol=1e-7)


@pytest.mark.tensorflow_only
@CODINGS
def test_represent_an_unknown_number_of_steps(one):
    import tensorflow as tf

    represent = tf.function(one.represent, input_signature=[tf.TensorSpec((None, None, 3), tf.float32)])
    for steps in (1, 4, 9):
        values = np.random.default_rng(0).normal(size=(2, steps, 3)).astype("float32")
        expected = np.einsum("t,btf->bf", one.weights(steps), values)
        np.testing.assert_allclose(represent(tf.constant(values)), expected, rtol=1e-4, atol=1e-6)


def test_represent_needs_a_time_axis():
    with pytest.raises(ValueError, match=r"represents \(batch, time, ...\) tensors. Received shape \(3,\)"):
        RateCoding().represent(ops.zeros((3,)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("one", "representation", "expected", "dx", "dthreshold"),
    [
        # V_th = 2. Both ends pass, and the threshold has its gradient above its end alone.
        (RateCoding(), [-1, 0, 1, 2, 3], [0, 0, 1, 2, 2], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]),
        # V_th / dt = 4, r / tau: -0.5, 0, 1, 4, 5. The ends do not pass; the threshold has 1 / dt at its end and above.
        (
            WeightedRateCoding(tau=2.0, dt=0.5),
            [-1, 0, 2, 8, 10],
            [0, 0, 1, 4, 4],
            [0, 0, 0.5, 0, 0],
            [0, 0, 0, 2, 2],
        ),
    ],
    ids=["rate", "weighted"],
)
def test_clamp_by_hand(one, representation, expected, dx, dthreshold, jit):
    upstream = np.array([1, 2, 4, 8, 16], "float32")

    def function(representation, threshold):
        clamped = one.clamp(representation, threshold)
        return ops.sum(clamped * upstream), clamped

    _, clamped, (by_representation, by_threshold) = helpers.value_and_grads(
        function, np.array(representation, "float32"), np.float32(2.0), jit=jit
    )
    np.testing.assert_allclose(clamped, expected, rtol=1e-6)
    np.testing.assert_allclose(by_representation, upstream * dx, rtol=1e-6)
    np.testing.assert_allclose(by_threshold, np.sum(upstream * dthreshold), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("one", "slope", "bound"), [(RateCoding(), 1.0, 2.0), (WeightedRateCoding(tau=2.0, dt=0.5), 0.5, 4.0)]
)
def test_rounded_clamp(one, slope, bound, jit):
    """Against its formula and the formula's derivatives, in NumPy."""
    upstream = np.array([1, 2, 4, 8, 16, 32], "float32")
    representation = np.array([-9, -0.1, 0, 1, bound / slope, 40], "float32")

    def function(representation, threshold):
        rounded = one.rounded_clamp(representation, threshold, 0.125)
        return ops.sum(rounded * upstream), rounded

    _, rounded, (by_representation, by_threshold) = helpers.value_and_grads(
        function, representation, np.float32(2.0), jit=jit
    )
    x, width = representation.astype("float64") * slope, bound * 0.125
    expected = width * (np.logaddexp(0, x / width) - np.logaddexp(0, (x - bound) / width))
    low, high = (1 / (1 + np.exp(-each / width)) for each in (x, x - bound))
    np.testing.assert_allclose(rounded, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by_representation, upstream * slope * (low - high), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_threshold, np.sum(upstream * high) * bound / 2.0, rtol=1e-5)


def test_rounded_clamp_by_hand():
    """b = 2, s = 1/4: at 0 it is s log 2 and its slope a half, but for what the other corner, 8 s away, takes off."""

    def function(representation):
        rounded = RateCoding().rounded_clamp(representation, np.float32(2.0), 0.125)
        return ops.sum(rounded), rounded

    _, rounded, (gradient,) = helpers.value_and_grads(function, np.array([0, 1, 2], "float32"))
    np.testing.assert_allclose(rounded, [0.173203, 1.0, 1.826797], atol=1e-5)
    np.testing.assert_allclose(gradient, [0.499665, 0.964028, 0.499665], atol=1e-5)


@CODINGS
def test_rounded_corners_are_the_mean_over_logistic_noise(one):
    x = np.linspace(-3, 9, 13, dtype="float32")
    scale = 0.125 * one.bound(2.0)
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    noise = (scale * np.log(quantiles / (1 - quantiles))).astype("float32")
    # The noise is in what is clamped.
    back = x[:, None] + noise / helpers.numpy(one.unclamped(np.float32(1.0)))
    mean = helpers.numpy(one.clamp(back, np.float32(2.0))).mean(axis=1)
    np.testing.assert_allclose(helpers.numpy(one.rounded_clamp(x, np.float32(2.0), 0.125)), mean, atol=2e-3)


@pytest.mark.parametrize("width", [0.0, -0.1, float("nan")])
def test_corners_without_a_width_are_refused(width):
    with pytest.raises(ValueError, match="have a width above 0"):
        RateCoding().rounded_clamp(np.zeros(3, "float32"), np.float32(1.0), width)


@CODINGS
def test_narrow_corners_are_the_clamps(one):
    representation = np.linspace(-3, 9, 50, dtype="float32")
    threshold = np.float32(2.0)
    rounded = helpers.numpy(one.rounded_clamp(representation, threshold, 1e-4))
    np.testing.assert_allclose(rounded, helpers.numpy(one.clamp(representation, threshold)), atol=1e-3)


def test_bound():
    assert RateCoding().bound(3.0) == 3.0
    assert WeightedRateCoding(tau=2.0, dt=0.5).bound(3.0) == 6.0


@CODINGS
def test_keras_serialises_a_coding(one):
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(one)))
    assert keras.saving.deserialize_keras_object(config) == one
    assert coding.get(config) == one
    assert type(one).from_config(one.get_config()) == one


@pytest.mark.parametrize(
    ("identifier", "expected"),
    [
        (None, RateCoding()),
        ("rate", RateCoding()),
        ("weighted_rate", WeightedRateCoding(tau=1.0, dt=0.05)),
        (HALF, HALF),
    ],
)
def test_get(identifier, expected):
    assert coding.get(identifier) == expected


@pytest.mark.parametrize("identifier", ["rates", 3, RateCoding, object(), 0.5])
def test_get_of_something_else(identifier):
    with pytest.raises(ValueError, match=r"A coding is 'rate', 'weighted_rate', keras_dsr.RateCoding\(\).*Received"):
        coding.get(identifier)


@CODINGS
def test_codings_cannot_be_changed(one):
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.tau = 3.0
    assert isinstance(one, coding.Coding)
    assert len({one, type(one)(**one.get_config())}) == 1


@pytest.mark.parametrize(
    ("tau", "dt", "message"),
    [
        (0.0, 0.05, "tau is a time constant above 0. Received tau=0.0"),
        (math.nan, 0.05, "tau is a time constant above 0. Received tau=nan"),
        (math.inf, 0.05, "tau is a time constant above 0. Received tau=inf"),
        (1.0, 0.0, "dt is the length of a time step, above 0. Received dt=0.0"),
        (1.0, -0.5, "dt is the length of a time step, above 0. Received dt=-0.5"),
        (1.0, 1.0, "dt must be smaller than tau.*dt=1.0, tau=1.0"),
    ],
)
def test_time_constants_out_of_range(tau, dt, message):
    with pytest.raises(ValueError, match=message):
        WeightedRateCoding(tau=tau, dt=dt)

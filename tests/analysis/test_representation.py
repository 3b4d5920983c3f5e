"""Errors of representation: Eqs. 18 and 21, an oracle in NumPy, and the alpha that makes them least."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_dsr import RateCoding, WeightedRateCoding, analysis, layers, models
from keras_dsr.analysis import representation


def oracle(currents, coding, alpha, threshold):
    """r(output) after each step, step by step in float64: (batch, time, ...)."""
    decay, gain = coding.decay, 1.0 if coding.decay == 1 else 1 - coding.decay
    potential = np.zeros(currents[:, 0].shape)
    count, weight, found = 0.0, 0.0, []
    for step in range(currents.shape[1]):
        potential = decay * potential + gain * currents[:, step].astype("float64")
        fired = potential >= alpha * threshold
        potential = potential - threshold * fired
        count, weight = decay * count + fired, decay * weight + 1
        found.append(count / weight * coding.bound(threshold))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_staircase_of_if_neurons_is_the_papers(steps, alpha):
    # Off the ties: at (2 k + 1) / 1000 no multiple of 1 / N has its edge.
    found = representation.response(RateCoding(), steps, alpha, points=1502)
    edges = np.abs((steps * found.received + 1 - alpha) % 1 - 0.5) < 0.499
    stairs = np.clip(np.floor(steps * found.received + 1 - alpha), 0, steps) / steps
    assert edges.mean() > 0.9
    np.testing.assert_allclose(found.output[edges], stairs[edges], atol=1e-6)
    np.testing.assert_allclose(found.clamp, np.clip(found.received, 0, 1))
    assert found.mean_error == pytest.approx((alpha**2 + (1 - alpha) ** 2) / 2 / steps, rel=0.02)


def test_the_staircase_of_leaky_neurons():
    coding = WeightedRateCoding(tau=1.0, dt=0.2)
    found = representation.response(coding, 5, 0.3, points=301)
    currents = np.repeat(found.received[:, np.newaxis], 5, axis=1) * coding.tau / coding.dt
    expected = oracle(currents, coding, 0.3, 1.0)[:, -1] * coding.dt
    assert np.mean(np.abs(found.output - expected) < 1e-5) > 0.99  # but for ties that rounding decides
    assert found.output[0] == 0
    assert found.output[-1] == pytest.approx(1)


CASES = {
    "IF": (RateCoding(), lambda: models.small_cnn((4,), layers.IFSpike(threshold=0.5), timesteps=4)),
    "LIF": (
        WeightedRateCoding(1.0, 0.2),
        lambda: models.small_cnn((4,), layers.LIFSpike(threshold=0.2, dt=0.2), timesteps=4),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_are_those_of_an_oracle(name):
    coding, build = CASES[name]
    model = build()
    x = np.random.default_rng(0).normal(0.3, 1, (6, 8, 8, 1)).astype("float32")
    found = representation.errors(model, x, batch_size=4, alphas=(1.0,), threshold_factors=(0.5,))
    (recorded,) = analysis.trace_batches(model, x)
    assert list(found) == list(recorded)
    for layer, each in recorded.items():
        cases = [(steps, each.alpha, 1.0, found[layer].by_steps[steps - 1]) for steps in (1, 2, 4)]
        cases.append((4, 1.0, 1.0, found[layer].by_alpha[1.0]))
        cases.append((4, each.alpha, 0.5, found[layer].by_threshold[each.threshold * 0.5]))
        for steps, alpha, factor, errors in cases:
            threshold = each.threshold * factor
            bound = coding.bound(threshold)
            weights = coding.weights(steps)
            received = np.tensordot(weights, each.currents[:, :steps], axes=(0, 1))
            clamped = np.clip(received / getattr(coding, "tau", 1), 0, bound)
            put_out = oracle(each.currents[:, :steps], coding, alpha, threshold)[:, -1]
            constant = oracle(np.repeat(received[:, np.newaxis], steps, axis=1), coding, alpha, threshold)[:, -1]
            expected = (
                np.abs(constant - clamped).mean() / bound,
                np.abs(put_out - constant).mean() / bound,
                np.abs(put_out - clamped).mean() / bound,
                (put_out - clamped).mean() / bound,
            )
            received_errors = (errors.quantization, errors.deviation, errors.total, errors.bias)
            np.testing.assert_allclose(received_errors, expected, atol=2e-3)
            assert errors.saturated == pytest.approx((clamped >= bound).mean(), abs=2e-3)
        assert found[layer].final == found[layer].by_steps[-1]
        assert len(found[layer].by_steps) == 4
    first = next(iter(found.values()))
    # A static current is constant: all of its error is one of quantization, which more steps make smaller.
    assert all(errors.deviation < 1e-6 for errors in first.by_steps)
    assert first.final.quantization < first.by_steps[0].quantization
    assert first.by_alpha[1.0].quantization > first.final.quantization
    assert max(layer.final.deviation for layer in found.values()) > 0.01


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_measured_response_is_that_of_an_oracle(alpha):
    coding, build = CASES["IF"]
    model = build()
    x = np.random.default_rng(0).normal(0.3, 1, (6, 8, 8, 1)).astype("float32")
    found = representation.measured_response(model, x, alpha, bins=5, batch_size=4)
    (recorded,) = analysis.trace_batches(model, x)
    for name, each in recorded.items():
        put_out = oracle(each.currents, coding, alpha or each.alpha, each.threshold)[:, -1] / each.threshold
        received = each.currents.mean(axis=1) / each.threshold
        for number in range(5):
            low, high = -0.25 + 0.3 * number, 0.05 + 0.3 * number
            inside = (received >= low) & (received < high)
            assert found[name].count[number] == pytest.approx(inside.sum(), abs=2)
            if inside.sum() > 20:
                assert found[name].output[number] == pytest.approx(put_out[inside].mean(), abs=0.02)
                clamped = np.clip(received, 0, 1)[inside].mean()
                assert found[name].clamp[number] == pytest.approx(clamped, abs=0.02)
    with pytest.raises(ValueError, match=r"alpha.*in \[0, 1\].*2"):
        representation.measured_response(model, x, alpha=2)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 8, 10, 20])
def test_alpha_of_if_neurons_is_a_half(steps):
    found = representation.propose_alpha(steps)
    assert found.alpha == 0.5
    assert found.error == pytest.approx(1 / (4 * steps), rel=1e-3)  # of Eq. 21: the mean of |x| within half a stair


def test_alpha_of_leaky_neurons_is_the_least_of_an_oracle():
    coding = WeightedRateCoding(tau=1.0, dt=0.2)
    alphas = (0.2, 0.4, 0.6, 0.8)
    found = representation.propose_alpha(5, coding, alphas)
    parts = (np.arange(500) + 0.5) / 500
    currents = np.repeat(parts[:, np.newaxis], 5, axis=1) * coding.tau / coding.dt
    errors = [np.abs(oracle(currents, coding, alpha, 1.0)[:, -1] * coding.dt - parts).mean() for alpha in alphas]
    np.testing.assert_allclose(found.errors, errors, atol=2e-3)
    assert found.alpha == alphas[int(np.argmin(errors))]
    assert found.error == found.errors.min()


def test_the_papers_alpha_of_leaky_neurons_is_as_good_as_the_least():
    """Table 5: LIF neurons of tau = 1 and dt = 0.05 at N = 20 have alpha 0.3."""
    found = representation.propose_alpha(20, WeightedRateCoding(tau=1.0, dt=0.05))
    (paper,) = found.errors[found.alphas == 0.3]
    assert paper <= 1.02 * found.error
    (half,) = found.errors[found.alphas == 0.5]
    assert half > 1.1 * found.error


def test_alpha_for_what_a_layer_receives():
    """Where all inputs are 0.6 of a single step's spike, firing early is right; where all are 0.2 it is not."""
    assert representation.propose_alpha(1, alphas=(0.3, 0.9), received=np.full(9, 0.8)).alpha == 0.3
    assert representation.propose_alpha(1, alphas=(0.1, 0.9), received=np.full(9, 0.2)).alpha == 0.9


def test_bad_input():
    model = CASES["IF"][1]()
    x = np.ones((1, 8, 8, 1), "float32")
    for call, message in (
        (lambda: representation.errors(model, x, alphas=(1.5,)), r"alpha.*in \[0, 1\].*1.5"),
        (lambda: representation.errors(model, x, threshold_factors=(0.0,)), "Factors on V_th are finite and above 0"),
        (lambda: representation.errors(model, x[:0]), "received no samples"),
        (lambda: representation.errors(models.with_timesteps(model, 0), x), "representation network"),
        (lambda: representation.response(RateCoding(), 4, -0.1), r"alpha.*in \[0, 1\].*-0.1"),
        (lambda: representation.response(RateCoding(), 4, 0.5, points=1), "points is a whole number of at least 2"),
        (lambda: representation.measured_response(model, x, bins=0), "bins is a whole number of at least 1.*bins=0"),
        (lambda: representation.response(RateCoding(), 0, 0.5), "1 or more time steps. Received timesteps=0"),
        (lambda: representation.propose_alpha(0), "1 or more time steps. Received timesteps=0"),
        (lambda: representation.propose_alpha(4, alphas=()), r"alphas are one or more numbers in \[0, 1\]"),
        (lambda: representation.propose_alpha(4, received=np.full(3, 2.0)), "None of what is received"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match="has no spiking layers"):
        representation.errors(keras.Model(inputs, keras.layers.Dense(2)(inputs)), np.ones((1, 3), "float32"))

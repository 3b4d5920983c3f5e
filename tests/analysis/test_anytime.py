"""Answers after each step are those of networks with so many steps; what stops early is what the rule says."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import layers, models
from keras_dsr.analysis import anytime
from keras_dsr.analysis.anytime import EarlyExit

N = 4


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return models.small_cnn((4,), layers.IFSpike(threshold=0.3), timesteps=N)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(0.5, 1, (9, 8, 8, 1)).astype("float32")


@pytest.fixture(scope="module")
def outputs(model, x):
    return anytime.outputs_by_step(model, x, batch_size=4)


def test_each_step_is_a_network_of_so_many(model, x, outputs):
    assert outputs.shape == (9, N, 10)
    for steps in (1, N):
        shorter = models.with_timesteps(model, steps)
        np.testing.assert_allclose(outputs[:, steps - 1], shorter.predict(x, verbose=0), atol=1e-5)
    longer = anytime.outputs_by_step(model, x[:2], timesteps=N + 1)
    np.testing.assert_allclose(longer[:, :N], outputs[:2], atol=1e-5)


def test_accuracy_by_step_is_counted(outputs):
    labels = outputs[:, -1].argmax(axis=1)
    labels[:3] = (labels[:3] + 1) % 10
    found = anytime.accuracy_by_step(outputs, labels)
    assert found[-1] == pytest.approx(6 / 9)
    by_hand = [sum(outputs[i, n].argmax() == labels[i] for i in range(9)) / 9 for n in range(N)]
    np.testing.assert_allclose(found, by_hand)


def probable(*classes_and_confidences):
    """Logits of two classes with these probabilities of the best."""
    rows = []
    for best, confidence in classes_and_confidences:
        gap = np.log(confidence / (1 - confidence))
        rows.append([gap, 0.0] if best == 0 else [0.0, gap])
    return rows


BY_HAND = np.array(
    [
        probable((0, 0.95), (0, 0.95), (0, 0.95), (0, 0.95)),
        probable((0, 0.60), (1, 0.95), (1, 0.95), (1, 0.95)),
        probable((0, 0.95), (1, 0.95), (1, 0.60), (1, 0.95)),
        probable((0, 0.60), (0, 0.60), (0, 0.60), (0, 0.60)),
    ]
)


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (EarlyExit(0.9), [1, 2, 1, 4]),
        (EarlyExit(0.9, patience=2), [2, 3, 4, 4]),
        (EarlyExit(0.9, least_steps=3), [3, 3, 4, 4]),
        (EarlyExit(0.5), [1, 1, 1, 1]),
        (EarlyExit(1.0), [4, 4, 4, 4]),
        # Logits of log(19) = 2.94 count a quarter, a half, three quarters of themselves: 0.676, 0.813, 0.901.
        (EarlyExit(0.8, horizon=4), [2, 2, 2, 4]),
        (EarlyExit(0.9, horizon=4), [3, 3, 4, 4]),
        (EarlyExit(0.9, horizon=2), [2, 2, 2, 4]),
    ],
)
def test_the_rule_by_hand(rule, steps):
    assert rule.steps(BY_HAND).tolist() == steps


def test_the_trade_off_by_hand():
    points = anytime.trade_off(BY_HAND, np.array([0, 1, 1, 1]), confidences=(0.5, 0.9, 1.0), patience=(1,))
    assert [(p.rule.confidence, p.accuracy, p.mean_steps) for p in points] == [
        (0.5, 0.25, 1.0),
        (0.9, 0.5, 2.0),
        (1.0, 0.75, 4.0),
    ]
    own = anytime.trade_off(BY_HAND, np.array([0, 1, 1, 1]))
    met = [point.rule.confidence for point in own]
    assert (min(met), sorted(set(met))[-2], max(met)) == (pytest.approx(0.6), pytest.approx(0.95), 1.0)
    assert max(point.mean_steps for point in own) == 4.0
    assert min(point.mean_steps for point in own) == 1.0
    assert anytime.choose(points, 0.5).rule.confidence == 0.9
    with pytest.raises(ValueError, match=r"No rule has an accuracy of 0\.8: the best of 3 has 0\.75"):
        anytime.choose(points, 0.8)


def often_met(outputs) -> float:
    """A confidence that half of the samples have after two steps."""
    return float(np.median(anytime._confidence(outputs[:, 1])))


@pytest.mark.parametrize(("certain", "patience"), [(False, 1), (False, 2), (True, 1)])
def test_predict_stops_where_the_rule_says(model, x, outputs, certain, patience):
    rule = EarlyExit(1.0 if certain else often_met(outputs), patience)
    found = anytime.predict(model, x, rule, batch_size=5)
    expected = rule.steps(outputs)
    np.testing.assert_array_equal(found.steps, expected)
    np.testing.assert_allclose(found.outputs, outputs[np.arange(9), expected - 1], atol=1e-5)
    if rule.confidence < 1:
        assert 1 <= found.steps.min() < found.steps.max() <= N


def test_what_has_stopped_is_not_run_any_further():
    """A step that tells how many samples it ran, and one that is certain of sample n after n steps."""
    ran = []

    def step(frame, state):
        ran.append(len(frame))
        number = state["number"][0] + 1
        done = frame[:, 0] <= number
        logits = np.stack([np.where(done, 9.0, 0.0), np.zeros(len(frame))], axis=1)
        return {"logits": logits, "next_number": state["number"] + 1}

    def start(stream):
        return {"number": np.zeros(len(stream))}

    def served(frame, number):
        return step(np.asarray(frame), {"number": np.asarray(number)})

    x = np.repeat(np.arange(1, 9, dtype="float64")[:, np.newaxis, np.newaxis], 8, axis=1)
    found = anytime.predict_served(served, start, x, rule=EarlyExit(0.99))
    assert found.steps.tolist() == list(range(1, 9))
    assert ran == [8, 8, 8, 8, 4, 4, 2, 1]


@pytest.mark.tensorflow_only
def test_the_exported_step_signature_gives_the_same(model, x, outputs):
    from keras_dsr.export import Network

    signatures = Network(model).signatures(("step", "initial_state"))
    rule = EarlyExit(often_met(outputs))
    served = anytime.predict_served(signatures["step"], signatures["initial_state"], x, timesteps=N, rule=rule)
    here = anytime.predict(model, x, rule)
    assert here.steps.min() < here.steps.max()
    np.testing.assert_array_equal(served.steps, here.steps)
    np.testing.assert_allclose(served.outputs, here.outputs, atol=1e-5)


def test_frames():
    inputs = keras.Input((3, 5))
    stream = layers.IFSpike(threshold=0.5)(layers.Synapse(keras.layers.Dense(4))(layers.ToStream()(inputs)))
    model = keras.Model(inputs, layers.SpikeRep()(stream))
    frames = np.random.default_rng(0).normal(1, 1, (4, 3, 5)).astype("float32")
    outputs = anytime.outputs_by_step(model, frames)
    np.testing.assert_allclose(outputs[:, -1], model.predict(frames, verbose=0), atol=1e-5)
    found = anytime.predict(model, frames, EarlyExit(0.3))
    np.testing.assert_array_equal(found.steps, EarlyExit(0.3).steps(outputs))
    with pytest.raises(ValueError, match=r"A step takes a frame, and there are 3\. Received timesteps=4"):
        anytime.outputs_by_step(model, frames, timesteps=4)


def test_bad_input():
    for settings, message in (
        ({"confidence": 0.0}, r"confidence is a probability in \(0, 1\].*0.0"),
        ({"confidence": float("nan")}, "confidence is a probability"),
        ({"patience": 0}, "patience is a number of steps of at least 1"),
        ({"horizon": 0}, "horizon is a number of steps of at least 1"),
        ({"least_steps": 1.5}, "least_steps is a number of steps.*1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            EarlyExit(**settings)
    with pytest.raises(ValueError, match=r"shape \(4, 4, 2\) and labels of shape \(3,\)"):
        anytime.accuracy_by_step(BY_HAND, np.zeros(3, int))
    inputs = keras.Input((3,))
    plain = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    for call in (anytime.outputs_by_step, anytime.predict):
        with pytest.raises(ValueError, match="has no spiking layers"):
            call(plain, np.ones((2, 3), "float32"))
        spiking = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(timesteps=2)(inputs)))
        with pytest.raises(ValueError, match="received no samples"):
            call(spiking, np.ones((0, 3), "float32"))
    with pytest.raises(ValueError, match="received no samples"):
        anytime.predict_served(None, None, np.ones((0, 3, 2)))


def test_softmax_is_kerass(outputs):
    softmax = helpers.numpy(keras.ops.softmax(outputs[:, -1])).max(axis=1)
    np.testing.assert_allclose(anytime._confidence(outputs[:, -1]), softmax, rtol=1e-5)

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
    return models.small_cnn((3,), layers.IFSpike(threshold=0.3), timesteps=N, input_shape=(4, 4, 1))


@pytest.fixture(scope="module")
def runner(model):
    """Compiled once for all tests."""
    return anytime.StepRunner(model)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).normal(0.5, 1, (9, 4, 4, 1)).astype("float32")


@pytest.fixture(scope="module")
def outputs(runner, x):
    return runner.outputs(x, batch_size=4)


def test_each_step_is_a_network_of_so_many(model, runner, x, outputs):
    assert outputs.shape == (9, N, 10)
    for steps in (1, N):
        shorter = models.with_timesteps(model, steps)
        np.testing.assert_allclose(outputs[:, steps - 1], shorter.predict(x, verbose=0), atol=1e-5)
    longer = runner.outputs(x[:4], timesteps=N + 1)
    np.testing.assert_allclose(longer[:, :N], outputs[:4], atol=1e-5)
    assert longer.shape[1] == N + 1


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
def test_predict_stops_where_the_rule_says(runner, x, outputs, certain, patience):
    rule = EarlyExit(1.0 if certain else often_met(outputs), patience)
    found = runner.predict(x, rule, batch_size=5)
    expected = rule.steps(outputs)
    np.testing.assert_array_equal(found.steps, expected)
    np.testing.assert_allclose(found.outputs, outputs[np.arange(9), expected - 1], atol=1e-5)
    if rule.confidence < 1:
        assert 1 <= found.steps.min() < found.steps.max() <= N


def test_what_has_stopped_is_not_run_any_further():
    """A step that tells how many samples it ran, and one that is certain of sample n after n steps."""
    ran, streams = [], []

    def step(frame, state):
        ran.append(len(frame))
        number = state["number"][0] + 1
        done = frame[:, 0] <= number
        logits = np.stack([np.where(done, 9.0, 0.0), np.zeros(len(frame))], axis=1)
        return {"logits": logits, "next_number": state["number"] + 1}

    def start(stream):
        streams.extend(np.asarray(stream).tolist())
        return {"number": np.zeros(len(stream))}

    def served(frame, number):
        return step(np.asarray(frame), {"number": np.asarray(number)})

    x = np.repeat(np.arange(1, 9, dtype="float64")[:, np.newaxis, np.newaxis], 8, axis=1)
    found = anytime.predict_served(served, start, x, rule=EarlyExit(0.99))
    assert found.steps.tolist() == list(range(1, 9))
    assert ran == [8, 8, 8, 8, 4, 4, 2, 1]
    ran.clear()
    streams.clear()
    again = anytime.predict_served(served, start, x, rule=EarlyExit(0.99), batch_size=6)
    assert again.steps.tolist() == list(range(1, 9))
    assert (streams, ran[0], ran[6]) == ([0, 1, 2, 3, 4, 5, 6, 7], 6, 2)


@pytest.mark.tensorflow_only
def test_the_exported_step_signature_gives_the_same(model, runner, x, outputs):
    from keras_dsr.export import Network

    signatures = Network(model).signatures(("step", "initial_state"))
    rule = EarlyExit(often_met(outputs))
    served = anytime.predict_served(signatures["step"], signatures["initial_state"], x, timesteps=N, rule=rule)
    here = runner.predict(x, rule)
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


def leaky() -> keras.Model:
    """Leaky neurons on frames that are their currents."""
    inputs = keras.Input((6, 2))
    neuron = layers.LIFSpike(threshold=1.0, tau=1.0, dt=0.2, name="n")
    return keras.Model(inputs, layers.SpikeRep()(neuron(layers.ToStream(coding=neuron.coding)(inputs))))


@pytest.mark.parametrize("come", [1, 2, 4])
def test_the_horizon_is_what_would_be_if_nothing_came_any_more(come):
    """Outputs of leaky neurons after some steps, and at the last one behind frames of zeros."""
    model = leaky()
    decay = model.get_layer("n").coding.decay
    # What adds V_th (and for the second neuron next to nothing) at each step leaves no potential that fires later.
    frames = np.zeros((1, 6, 2), "float32")
    frames[:, :come, 0] = 1 / (1 - decay)
    outputs = anytime.outputs_by_step(model, frames)[0]
    rule = EarlyExit(horizon=6, decay=decay)
    assert outputs[come - 1, 0] > 0
    np.testing.assert_allclose(outputs[come - 1] * rule.part(come), outputs[-1], rtol=1e-5)
    assert rule.part(6) == rule.part(7) == EarlyExit().part(1) == 1
    assert EarlyExit(horizon=6).part(come) == pytest.approx(come / 6)


def test_the_horizon_of_another_coding_is_refused():
    model, frames = leaky(), np.ones((1, 6, 2), "float32")
    decay = anytime.StepRunner(model).decay
    assert decay == model.get_layer("n").coding.decay
    with pytest.raises(ValueError, match=r"decay is that of the coding .* 0\.818.*Received decay=1"):
        anytime.predict(model, frames, EarlyExit(horizon=6))
    found = anytime.predict(model, frames, EarlyExit(1.0, horizon=6, decay=decay))
    assert found.steps.tolist() == [6]
    (point, *_) = anytime.trade_off(np.ones((1, 6, 2)), np.zeros(1, int), horizon=6, decay=decay)
    assert point.rule.decay == decay


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_a_policy_in_force_changes_nothing(policy):
    """Potentials of a model of single precision are not rounded from step to step."""
    model = leaky()
    frames = np.random.default_rng(0).normal(3, 1, (50, 6, 2)).astype("float32")
    expected = model.predict(frames, verbose=0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        runner = anytime.StepRunner(model)
        outputs = runner.outputs(frames)
        _, state = runner._step(frames[:, 0], runner._start(50))
    finally:
        keras.config.set_dtype_policy(before)
    np.testing.assert_allclose(outputs[:, -1], expected, rtol=1e-6)
    drive = frames[:, 0] * (1 - runner.decay)
    np.testing.assert_allclose(state["potential_n"], drive - (drive >= model.get_layer("n").alpha), atol=1e-6)


def test_whole_numbers_are_taken_as_the_model_takes_them():
    inputs = keras.Input((2, 3, 1))
    flat = keras.layers.TimeDistributed(keras.layers.Flatten())(inputs)
    x = layers.IFSpike(threshold=2.0)(
        keras.layers.TimeDistributed(keras.layers.Dense(2, kernel_initializer="ones"))(flat)
    )
    model = keras.Model(inputs, layers.SpikeRep()(x))
    frames = np.random.default_rng(0).integers(0, 9, (4, 2, 3, 1), "uint8")
    expected = anytime.outputs_by_step(model, frames.astype("float32"))
    assert expected.any()
    for given in (frames, frames[..., 0]):
        np.testing.assert_array_equal(anytime.outputs_by_step(model, given), expected)


def test_bad_input(runner, x):
    for timesteps in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="timesteps is a number of steps of at least 1, or None"):
            runner.outputs(x, timesteps=timesteps)
        with pytest.raises(ValueError, match="timesteps is a number of steps of at least 1, or None"):
            anytime.predict_served(None, None, x, timesteps=timesteps)
    with pytest.raises(ValueError, match=r"batch_size is a number of samples of at least 1"):
        anytime.predict_served(None, None, x, batch_size=0)
    for settings, message in (
        ({"confidence": 0.0}, r"confidence is a probability in \(0, 1\].*0.0"),
        ({"confidence": float("nan")}, "confidence is a probability"),
        ({"patience": 0}, "patience is a number of steps of at least 1"),
        ({"horizon": 0}, "horizon is a number of steps of at least 1"),
        ({"decay": 0.0}, r"decay is what a coding keeps in a time step, in \(0, 1\].*0.0"),
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

"""What a trace says equals an independent count from raw spikes, and potentials are those of the simulation."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import analysis, layers, models
from keras_dsr.stepping import Stepper


def frames_model(**kwargs) -> keras.Model:
    """Leaky neurons on frames of events."""
    inputs = keras.Input((3, 4, 4, 2))
    neuron = layers.LIFSpike(threshold=0.05, tau=1.0, dt=0.2, name="first", **kwargs)
    x = neuron(layers.Synapse(keras.layers.Conv2D(3, 3))(layers.ToStream(coding=neuron.coding)(inputs)))
    x = layers.Synapse(keras.layers.Dense(4))(layers.Synapse(keras.layers.Flatten())(x))
    second = layers.LIFSpike(threshold=0.005, tau=1.0, dt=0.2, name="second")
    return keras.Model(inputs, layers.SpikeRep()(second(x)))


def plain_model() -> keras.Model:
    """A plain tensor between neurons."""
    inputs = keras.Input((5, 6))
    x = layers.IFSpike(threshold=0.5, name="first")(inputs)
    x = layers.IFSpike(threshold=0.4, alpha=1.0, name="second")(keras.layers.Dense(4)(x))
    return keras.Model(inputs, layers.SpikeRep()(x))


MODELS = {
    "static": (lambda: models.small_cnn((4, 6), layers.IFSpike(threshold=0.5), timesteps=5), (8, 8, 1)),
    "frames": (frames_model, (3, 4, 4, 2)),
    "plain": (plain_model, (5, 6)),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, shape = MODELS[request.param]
    return build(), np.random.default_rng(0).normal(0.5, 1, (10, *shape)).astype("float32")


def outputs_of(model, x):
    """What each neuron layer puts out at each step, by Keras alone."""
    found = {}
    for layer in helpers.neuron_layers(model):
        output = layer.output
        found[layer.name] = output[0] if isinstance(output, (list, tuple)) else output
    probe = keras.Model(model.input, found)
    return {name: helpers.numpy(value) for name, value in probe.predict(x, verbose=0).items()}


def represented(layer, values):
    """r(x), by hand."""
    weights = layer.coding.weights(values.shape[1])
    return np.tensordot(weights, values.astype("float64"), axes=(0, 1))


def test_a_trace_is_a_count_of_raw_spikes(case):
    model, x = case
    traced = analysis.trace(model, x, batch_size=4)
    raw = outputs_of(model, x)
    assert traced.samples == 10
    assert list(traced.layers) == [layer.name for layer in helpers.neuron_layers(model)]
    for name, values in raw.items():
        fired, layer = values != 0, traced.layers[name]
        assert 0 < fired.sum() < fired.size
        np.testing.assert_array_equal(layer.counts, fired.sum(axis=0))
        assert layer.firing_rate == pytest.approx(np.mean(fired), abs=1e-12)
        np.testing.assert_allclose(layer.rate_per_step, fired.mean(axis=(0, *range(2, fired.ndim))), atol=1e-12)
        np.testing.assert_allclose(layer.neuron_rates, fired.mean(axis=(0, 1)), atol=1e-12)
        assert layer.silent == pytest.approx(1 - fired.any(axis=(0, 1)).mean())
        assert layer.timesteps == fired.shape[1]
        assert layer.neurons == np.prod(fired.shape[2:])
    assert traced.spikes_per_sample == pytest.approx(sum((values != 0).sum() for values in raw.values()) / 10)


def test_half_precision_counts_each_spike():
    neuron = layers.IFSpike(threshold=1 / 3, dtype="bfloat16", timesteps=5, name="n")
    inputs = keras.Input((40,))
    model = keras.Model(inputs, layers.SpikeRep(dtype="bfloat16")(neuron(inputs)))
    x = np.random.default_rng(0).uniform(0, 0.5, (300, 40)).astype("float32")
    (recorded,) = analysis.trace_batches(model, x, 300)
    counts = analysis.trace(model, x, 300).layers["n"].counts
    assert counts.max() > 200
    np.testing.assert_array_equal(counts, recorded["n"].spikes.sum(axis=0))


@pytest.mark.tensorflow_only
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: models.vgg(5, classes=4, weights="poker_dvs", input_shape=(3, 35, 35, 2)), (3, 35, 35, 2)),
        (lambda: models.preact_resnet(20, weights="cifar10", timesteps=2, input_shape=(16, 16, 3)), (16, 16, 3)),
    ],
    ids=["vgg5", "preact_resnet20"],
)
def test_a_trace_of_a_trained_network_is_a_count_of_raw_spikes(build, shape):
    model = build()
    x = np.random.default_rng(0).normal(0.5, 1, (3, *shape)).astype("float32")
    traced = analysis.trace(model, x, batch_size=2)
    raw = helpers.spike_trains(model, x)
    assert list(traced.layers) == list(raw)
    for name, values in raw.items():
        np.testing.assert_array_equal(traced.layers[name].counts, (values != 0).sum(axis=0))
    assert sum(layer.spikes for layer in traced.layers.values()) > 1000


def test_a_recording_has_all_of_a_batch(case):
    model, x = case
    batches = list(analysis.trace_batches(model, x, batch_size=4))
    raw = outputs_of(model, x)
    errors = {name: layer for name, layer in analysis.trace(model, x, 4).layers.items()}
    for name, values in raw.items():
        layer = model.get_layer(name)
        recordings = [batch[name] for batch in batches]
        assert [len(each.spikes) for each in recordings] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([each.spikes for each in recordings]), values != 0)
        np.testing.assert_allclose(np.concatenate([each.output for each in recordings]), values, rtol=1e-6)
        gaps = []
        for each in recordings:
            assert each.currents.shape == each.spikes.shape == each.potentials.shape
            np.testing.assert_allclose(each.representation, represented(layer, each.output), atol=1e-5)
            np.testing.assert_allclose(each.received, represented(layer, each.currents), atol=1e-5)
            bound = each.threshold * each.scale
            slope = 1.0 if isinstance(layer, layers.IFSpike) else 1 / layer.tau
            np.testing.assert_allclose(each.clamp, np.clip(each.received * slope, 0, bound), atol=1e-5)
            gaps.append((each.representation - each.clamp) / bound)
        gaps = np.concatenate(gaps)
        assert errors[name].error == pytest.approx(gaps.mean(), abs=1e-6)
        assert errors[name].absolute_error == pytest.approx(np.abs(gaps).mean(), abs=1e-6)
        assert errors[name].largest_error == pytest.approx(np.abs(gaps).max(), abs=1e-6)


def test_potentials_are_those_that_a_step_by_step_run_keeps(case):
    model, x = case
    (recorded,) = analysis.trace_batches(model, x)
    stepper = Stepper(model)
    state = stepper.initial_state(len(x))
    steps = next(iter(recorded.values())).spikes.shape[1]
    kept = {name: [] for name in recorded}
    advance = helpers.compiled(lambda x, state: stepper(x, state).state, helpers.BACKEND == "jax")
    for step in range(steps):
        state = advance(x[:, step] if stepper.takes_frames else x, state)
        for name in recorded:
            kept[name].append(helpers.numpy(state[f"potential_{name}"]))
    for name, each in recorded.items():
        np.testing.assert_allclose(each.potentials, np.stack(kept[name], axis=1), atol=2e-5)


def test_potentials_by_hand():
    inputs = keras.Input((1,))
    neuron = layers.IFSpike(threshold=1.0, alpha=1.0, timesteps=4, name="n")
    model = keras.Model(inputs, layers.SpikeRep()(neuron(inputs)))
    (recorded,) = analysis.trace_batches(model, np.array([[0.75], [-0.5]], "float32"))
    each = recorded["n"]
    assert each.potentials[..., 0].tolist() == [[0.75, 0.5, 0.25, 0.0], [-0.5, -1.0, -1.5, -2.0]]
    assert each.spikes[..., 0].tolist() == [[False, True, True, True], [False] * 4]
    assert each.currents[..., 0].tolist() == [[0.75] * 4, [-0.5] * 4]
    assert each.representation[:, 0].tolist() == [0.75, 0.0]
    assert each.clamp[:, 0].tolist() == [0.75, 0.0]
    assert each.bound == 1.0


def test_one_batch_at_a_time_is_taken(case):
    """Nothing is read ahead, so memory does not grow with the data."""
    model, x = case
    taken = []

    def read():
        for start in range(0, 10, 2):
            taken.append(start)
            yield x[start : start + 2], np.zeros(2)

    for number, batch in enumerate(analysis.trace_batches(model, read()), start=1):
        assert len(taken) == number
        assert len(next(iter(batch.values())).spikes) == 2
    assert number == 5
    summed = analysis.trace(model, read())
    whole = analysis.trace(model, x)
    for name, layer in summed.layers.items():
        np.testing.assert_array_equal(layer.counts, whole.layers[name].counts)


def test_neurons_of_sub_models_have_both_names():
    model, x = MODELS["static"][0](), np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
    inputs = keras.Input((8, 8, 1))
    outer = keras.Model(inputs, keras.layers.Dense(2)(model(inputs)))
    inner = analysis.trace(model, x)
    traced = analysis.trace(outer, x)
    assert list(traced.layers) == [f"{model.name}_{name}" for name in inner.layers]
    for name, layer in inner.layers.items():
        np.testing.assert_array_equal(traced.layers[f"{model.name}_{name}"].counts, layer.counts)


def inside_of_a_layer():
    @keras.saving.register_keras_serializable("test_tracing")
    class Block(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.neuron = layers.IFSpike(timesteps=2)
            self.readout = layers.SpikeRep()

        def build(self, input_shape):
            self.neuron.build(input_shape)

        def call(self, x):
            return self.readout(self.neuron(x))

    inputs = keras.Input((3,))
    return keras.Model(inputs, Block()(inputs))


def used_twice():
    inputs = keras.Input((3,))
    neuron = layers.IFSpike(name="n")
    stream = layers.IFSpike(timesteps=2, name="first")(inputs)
    return keras.Model(inputs, layers.SpikeRep()(neuron(neuron(stream))))


def two_inputs():
    inputs = [keras.Input((3,)), keras.Input((3,))]
    stream = layers.IFSpike(timesteps=2)(keras.layers.add(inputs))
    return keras.Model(inputs, layers.SpikeRep()(stream))


def without_spikes():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Dense(2)(inputs))


X = np.ones((2, 3), "float32")
BAD = {
    "no spikes": (without_spikes, X, "has no spiking layers"),
    "no steps": (lambda: models.small_cnn((4,), timesteps=0), X, r"timesteps=0\): it has no spikes"),
    "inside": (inside_of_a_layer, X, "1 spiking layers .* are inside of layers that are no models"),
    "twice": (used_twice, X, "'n' of model .* runs more than once"),
    "two inputs": (two_inputs, X, "with one input can be looked into.*2 inputs"),
    "empty": (lambda: plain_model(), np.zeros((0, 5, 6), "float32"), "received no samples"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_is_wrong(name):
    build, x, message = BAD[name]
    model = build()
    with pytest.raises(ValueError, match=message):
        analysis.trace(model, x)
    with pytest.raises(ValueError, match=message):
        list(analysis.trace_batches(model, x))


def test_batches_of_other_lengths_and_sizes_are_refused():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(name="n")(layers.ToStream()(inputs))))
    with pytest.raises(ValueError, match=r"as many time steps.*\(5, 3\) after some in which it has \(4, 3\)"):
        analysis.trace(model, [np.ones((2, 4, 3), "float32"), np.ones((2, 5, 3), "float32")])
    with pytest.raises(ValueError, match=r"batch_size is a number of samples of at least 1\. Received batch_size=0"):
        analysis.trace(model, np.ones((2, 4, 3), "float32"), batch_size=0)

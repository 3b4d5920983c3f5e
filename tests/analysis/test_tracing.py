"""What a trace says equals an independent count from raw spikes, and potentials are those of the simulation."""

from __future__ import annotations

import dataclasses

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import analysis, data, layers, models
from keras_dsr.analysis import tracing
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
    "static": (lambda: models.small_cnn((3,), layers.IFSpike(threshold=0.5), 3, input_shape=(4, 4, 1)), (4, 4, 1)),
    "frames": (frames_model, (3, 4, 4, 2)),
    "plain": (plain_model, (5, 6)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its input, and what is found in it: made once, as each needs the model to be compiled."""

    model: keras.Model
    x: np.ndarray
    traced: analysis.Trace
    recorded: list[dict[str, analysis.Recording]]
    raw: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    build, shape = MODELS[request.param]
    keras.utils.set_random_seed(0)
    model, x = build(), np.random.default_rng(0).normal(0.5, 1, (10, *shape)).astype("float32")
    return Case(model, x, analysis.trace(model, x, 4), list(analysis.trace_batches(model, x, 4)), outputs_of(model, x))


def joined(recorded, name, what):
    """What all batches have."""
    return np.concatenate([getattr(batch[name], what) for batch in recorded])


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
    model, traced, raw = case.model, case.traced, case.raw
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
    fired, size = (sum(get(values) for values in raw.values()) for get in (np.count_nonzero, np.size))
    assert traced.firing_rate == pytest.approx(fired / size)
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


def real_examples(loaded) -> np.ndarray:
    return next(iter(loaded.batches(loaded.test, 3).as_numpy_iterator()))[0]


def trained_on_digits(unpacked, folder):
    pytest.importorskip("sklearn")
    loaded = data.load("digits")
    model = models.small_cnn((4,), layers.IFSpike(threshold=0.5), timesteps=4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    x, labels = next(iter(loaded.batches(loaded.train, 512, seed=0).as_numpy_iterator()))
    history = model.fit(x, labels, batch_size=32, epochs=3, verbose=0).history
    assert history["accuracy"][-1] > 0.5
    return model, real_examples(loaded)


def trained_on_nmnist(unpacked, folder):
    loaded = data.load("nmnist", data_dir=unpacked("nmnist"), timesteps=10, cache_dir=folder)
    return models.vgg(5, classes=10, input_shape=loaded.input_shape, weights="nmnist"), real_examples(loaded)


def trained_on_cifar(unpacked, folder):
    """On noise: unpacking its images takes minutes."""
    x = np.random.default_rng(0).normal(0, 1, (3, 16, 16, 3)).astype("float32")
    return models.preact_resnet(20, weights="cifar10", timesteps=2, input_shape=(16, 16, 3)), x


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("build", [trained_on_digits, trained_on_nmnist, trained_on_cifar])
def test_a_trace_of_a_trained_network_is_a_count_of_raw_spikes(build, unpacked, tmp_path):
    model, x = build(unpacked, tmp_path)
    traced = analysis.trace(model, x, batch_size=2)
    raw = helpers.spike_trains(model, x)
    assert list(traced.layers) == list(raw)
    for name, values in raw.items():
        np.testing.assert_array_equal(traced.layers[name].counts, (values != 0).sum(axis=0))
        assert traced.layers[name].spikes


def test_a_recording_has_all_of_a_batch(case):
    model, batches, raw, errors = case.model, case.recorded, case.raw, case.traced.layers
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
    model, x = case.model, case.x
    stepper = Stepper(model)
    state = stepper.initial_state(len(x))
    steps = next(iter(case.raw.values())).shape[1]
    kept = {name: [] for name in case.raw}
    advance = helpers.compiled(lambda x, state: stepper(x, state).state, helpers.BACKEND == "jax")
    for step in range(steps):
        state = advance(x[:, step] if stepper.takes_frames else x, state)
        for name in kept:
            kept[name].append(helpers.numpy(state[f"potential_{name}"]))
    for name, each in kept.items():
        np.testing.assert_allclose(joined(case.recorded, name, "potentials"), np.stack(each, axis=1), atol=2e-5)


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
    taken = []

    def read():
        for start in range(0, 10, 4):
            taken.append(start)
            yield case.x[start : start + 4], np.zeros(4)

    for number, batch in enumerate(analysis.trace_batches(case.model, read()), start=1):
        assert len(taken) == number
        assert len(next(iter(batch.values())).spikes) == min(4, 10 - taken[-1])
    assert number == 3
    taken.clear()
    drawn = iter(tracing.run(tracing.Probe(case.model, tracing._sums), read(), 4))
    next(drawn)
    assert taken == [0], "a trace takes no batch ahead either"


def test_a_trace_and_recordings_time_and_again(case):
    """What is compiled once takes other samples and other weights."""
    tracer, recorder = analysis.Tracer(case.model), analysis.Recorder(case.model)
    neuron = helpers.neuron_layers(case.model)[0]
    before = neuron.get_weights()
    for factor in (1.0, 1.5):
        neuron.set_weights([factor * value for value in before])
        traced, (recorded, *_) = tracer(case.x[:4], 4), recorder(case.x[:4], 4)
        for name, layer in traced.layers.items():
            np.testing.assert_array_equal(layer.counts, recorded[name].spikes.sum(axis=0))
        assert (traced.layers[neuron.name].spikes == case.recorded[0][neuron.name].spikes.sum()) == (factor == 1)
    neuron.set_weights(before)


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_a_policy_in_force_changes_nothing(policy):
    """A model of its own precision is looked into in that precision."""
    inputs = keras.Input((40,))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0, timesteps=5, name="n")(inputs)))
    # A part of a thousandth below what fires, which half precision rounds up to it.
    x = np.full((4, 40), 0.5 - 1e-5, "float32")
    x[:, ::2] = 0.5
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        counts = analysis.trace(model, x).layers["n"].counts
        (recorded,) = analysis.trace_batches(model, x)
    finally:
        keras.config.set_dtype_policy(before)
    raw = outputs_of(model, x)["n"] != 0
    np.testing.assert_array_equal(counts, raw.sum(axis=0))
    np.testing.assert_array_equal(recorded["n"].spikes.sum(axis=0), counts)
    np.testing.assert_array_equal(recorded["n"].currents[:, 0], x)
    assert counts[0].tolist() == [4, 0] * 20


def test_whole_numbers_are_taken_as_the_model_takes_them():
    """Images in bytes, and without an axis of one channel."""
    inputs = keras.Input((4, 4, 1))
    x = layers.IFSpike(threshold=200.0, timesteps=3, name="n")(keras.layers.Conv2D(2, 3)(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), "uint8")
    expected = analysis.trace(model, images.astype("float32")).layers["n"]
    assert expected.spikes > 0
    for given in (images, images[..., 0]):
        np.testing.assert_array_equal(analysis.trace(model, given).layers["n"].counts, expected.counts)


def test_neurons_of_sub_models_have_both_names():
    model, x = plain_model(), np.random.default_rng(0).normal(0.5, 1, (3, 5, 6)).astype("float32")
    inputs = keras.Input((5, 6))
    outer = keras.Model(inputs, keras.layers.Dense(2)(model(inputs)))
    inner = analysis.trace(model, x)
    traced = analysis.trace(outer, x)
    assert list(traced.layers) == [f"{model.name}_{name}" for name in inner.layers]
    for name, layer in inner.layers.items():
        assert layer.spikes
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

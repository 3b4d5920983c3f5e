"""Firing rates and spike trains equal a count from raw spikes."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import layers, models
from keras_dsr.analysis import firing


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return models.small_cnn((2, 3), layers.IFSpike(threshold=0.3), timesteps=3)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(size=(10, 8, 8, 1)).astype("float32")


def test_spike_trains_are_the_nonzero_outputs(model, x):
    trains = firing.spike_trains(model, x, batch_size=4)
    expected = helpers.spike_trains(model, x)
    assert list(trains) == ["neuron1", "neuron2", "head_neuron"]
    for name, train in trains.items():
        assert train.dtype == bool
        assert 0 < train.sum() < train.size
        np.testing.assert_array_equal(train, expected[name] != 0)


def counted(model, x):
    """Spikes per neuron and time step, of each layer, from the raw spikes."""
    return {name: np.count_nonzero(values) / values.size for name, values in helpers.spike_trains(model, x).items()}


@pytest.mark.parametrize("batch_size", [4, 64])
def test_firing_rates_are_counts_whatever_the_batch_size(model, x, batch_size):
    rates = firing.firing_rates(model, x, batch_size)
    assert list(rates) == ["neuron1", "neuron2", "head_neuron"]
    assert rates == pytest.approx(counted(model, x), abs=1e-12)


BATCHES = {
    "iterator": lambda x: iter([x[:4], x[4:8], x[8:]]),
    "with_labels": lambda x: ((x[start : start + 4], np.zeros(4)) for start in (0, 4, 8)),
    "growing": lambda x: [keras.ops.convert_to_tensor(x[:3]), keras.ops.convert_to_tensor(x[3:])],
    "one_empty": lambda x: [x[:4], x[:0], x[4:]],
}
# JAX compiles for each size: it gets the form in which tensors are its own.
ON_BOTH = {"growing"}


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(batches, id=name, marks=() if name in ON_BOTH else pytest.mark.tensorflow_only)
        for name, batches in BATCHES.items()
    ],
)
def test_batches_count_as_the_array_does(model, x, batches):
    assert firing.firing_rates(model, batches(x)) == pytest.approx(counted(model, x), abs=1e-12)
    trains, whole = firing.spike_trains(model, batches(x)), firing.spike_trains(model, x)
    for name, train in whole.items():
        np.testing.assert_array_equal(trains[name], train)


@pytest.mark.tensorflow_only
def test_a_pipelines_batches_count_as_the_array_does(model, x):
    import tensorflow as tf

    batches = tf.data.Dataset.from_tensor_slices((x, np.zeros(10))).batch(4)
    assert firing.firing_rates(model, batches) == pytest.approx(counted(model, x), abs=1e-12)
    assert firing.firing_rates(model, batches.as_numpy_iterator()) == pytest.approx(counted(model, x), abs=1e-12)


def test_rates_are_means_over_all_samples_not_over_batches(model, x):
    """A last batch that is short counts for less, and what fills it up for nothing."""
    loud = np.concatenate([x[:8], 50 * np.abs(x[8:])])
    assert firing.firing_rates(model, loud, batch_size=8) == pytest.approx(counted(model, loud), abs=1e-12)


def test_frames_of_leaky_neurons():
    neurons = layers.LIFSpike(threshold=0.3, name="neurons")
    inputs = keras.Input((3, 2, 2, 2))
    stream = layers.ToStream(coding=neurons.coding)(inputs)
    stream = layers.Synapse(keras.layers.Flatten())(stream)
    model = keras.Model(inputs, layers.SpikeRep()(neurons(stream)))
    frames = np.random.default_rng(0).poisson(1.0, (5, 3, 2, 2, 2)).astype("float32")
    rates = firing.firing_rates(model, frames, batch_size=2)
    assert rates == pytest.approx(counted(model, frames), abs=1e-12)
    assert 0 < rates["neurons"] < 1


def test_thresholds_are_those_of_the_layers():
    model = models.small_cnn((2, 3), layers.IFSpike(threshold=0.5), timesteps=3)
    model.get_layer("neuron2").threshold.assign(0.75)
    assert firing.thresholds(model) == {"neuron1": 0.5, "neuron2": 0.75, "head_neuron": 0.5}


def test_a_model_without_spikes_is_refused(model, x):
    with pytest.raises(ValueError, match=r"timesteps=0\): it has no spikes"):
        firing.firing_rates(models.with_timesteps(model, 0), x)
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="has no spiking layers"):
        firing.spike_trains(keras.Model(inputs, keras.layers.Dense(2)(inputs)), x)


def test_no_samples_are_refused(model, x):
    for nothing in (x[:0], [], iter([]), [x[:0]]):
        with pytest.raises(ValueError, match="received no samples"):
            firing.firing_rates(model, nothing)


def test_neurons_within_sub_models_are_found(model, x):
    inputs = keras.Input((8, 8, 1))
    outer = keras.Model(inputs, keras.layers.Dense(2)(model(inputs)))
    inner = {f"{model.name}_{name}": value for name, value in firing.thresholds(model).items()}
    assert firing.thresholds(outer) == inner
    expected = {f"{model.name}_{name}": rate for name, rate in counted(model, x).items()}
    assert firing.firing_rates(outer, x) == pytest.approx(expected, abs=1e-12)


def test_one_neuron_layer_is_enough():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0, timesteps=4, name="only")(inputs)))
    trains = firing.spike_trains(model, np.full((5, 3), 0.5, "float32"), batch_size=2)
    assert list(trains) == ["only"]
    np.testing.assert_array_equal(trains["only"], np.tile([[True], [False], [True], [False]], (5, 1, 3)))

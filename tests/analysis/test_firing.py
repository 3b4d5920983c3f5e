"""Firing rates and spike trains equal a count from raw spikes."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import layers, models
from keras_dsr.analysis import firing


@pytest.fixture
def model():
    return models.small_cnn((4, 6), layers.IFSpike(threshold=0.5), timesteps=5)


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


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_firing_rates_do_not_depend_on_the_batch_size(model, x, batch_size):
    rates = firing.firing_rates(model, x, batch_size)
    for name, values in helpers.spike_trains(model, x).items():
        assert rates[name] == pytest.approx(np.mean(values != 0), abs=1e-12)


def test_thresholds_are_those_of_the_layers(model):
    model.get_layer("neuron2").threshold.assign(0.75)
    assert firing.thresholds(model) == {"neuron1": 0.5, "neuron2": 0.75, "head_neuron": 0.5}


def test_a_model_without_spikes_is_refused(model, x):
    with pytest.raises(ValueError, match=r"timesteps=0\): it has no spikes"):
        firing.firing_rates(models.with_timesteps(model, 0), x)
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="has no spiking layers"):
        firing.spike_trains(keras.Model(inputs, keras.layers.Dense(2)(inputs)), x)


def test_no_samples_are_refused(model, x):
    with pytest.raises(ValueError, match="received no samples"):
        firing.firing_rates(model, x[:0])


def test_neurons_within_sub_models_are_found_or_refused(model, x):
    inputs = keras.Input((8, 8, 1))
    outer = keras.Model(inputs, keras.layers.Dense(2)(model(inputs)))
    assert firing.thresholds(outer) == firing.thresholds(model)
    with pytest.raises(ValueError, match="are inside of its sub-models"):
        firing.firing_rates(outer, x)


def test_one_neuron_layer_is_enough():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0, timesteps=4, name="only")(inputs)))
    trains = firing.spike_trains(model, np.full((5, 3), 0.5, "float32"), batch_size=2)
    assert list(trains) == ["only"]
    np.testing.assert_array_equal(trains["only"], np.tile([[True], [False], [True], [False]], (5, 1, 3)))

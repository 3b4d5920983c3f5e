"""Statistics of a spiking network: those of its simulation, and the same function of every input."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import numpy

from keras_dsr import layers, models
from keras_dsr.models import calibrate_normalization


def spiking(timesteps: int = 5, kind: str = "if") -> keras.Model:
    """A small network with statistics of a representation network: not those of its spikes."""
    neuron = {"if": layers.IFSpike(threshold=1.0), "lif": layers.LIFSpike(threshold=0.05)}[kind]
    model = models.small_cnn((4, 6), neuron, timesteps)
    generator = np.random.default_rng(2)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            for weight, low in ((layer.gamma, 0.5), (layer.moving_variance, 0.02)):
                weight.assign(generator.uniform(low, 1.5, weight.shape))
            for weight in (layer.beta, layer.moving_mean):
                weight.assign(generator.normal(0, 0.2, weight.shape))
    return model


def samples(count: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 8, 8, 1)).astype("float32")


def normalizations(model: keras.Model) -> list:
    return [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_moving_statistics_become_those_of_the_currents(kind):
    model, x = spiking(kind=kind), samples()
    outputs = {layer.name: layer.input[0] for layer in normalizations(model)}
    received = keras.Model(model.inputs, outputs).predict_on_batch(x)
    calibrate_normalization(model, [x[:8], (x[8:], np.zeros(16))])
    for layer in normalizations(model):
        currents = np.asarray(received[layer.name], "float64")
        axes = tuple(range(currents.ndim - 1))
        np.testing.assert_allclose(numpy(layer.moving_mean), currents.mean(axis=axes), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numpy(layer.moving_variance), currents.var(axis=axes), rtol=1e-4, atol=1e-6)


def test_what_the_network_computes_stays():
    model, x = spiking(), samples()
    representation = models.with_timesteps(model, 0)
    before = numpy(representation(x)), numpy(model(x))
    calibrate_normalization(model, [x])
    representation.set_weights(model.get_weights())
    np.testing.assert_allclose(numpy(representation(x)), before[0], atol=1e-4)
    # A rounding may move a spike to another step or flip one.
    assert np.mean(np.abs(numpy(model(x)) - before[1]) > 1e-4) < 0.02


def test_the_first_step_of_training_computes_what_inference_does():
    model, x = spiking(), samples()

    def distance() -> float:
        return float(np.mean(np.abs(numpy(model(x, training=True)) - numpy(model(x, training=False)))))

    weights = model.get_weights()
    far = distance()
    model.set_weights(weights)  # a call in training mode moves the statistics
    for layer in model.layers:
        if type(layer) is keras.layers.BatchNormalization:
            layer.trainable = False  # ahead of the first neuron nothing spikes, and nothing is calibrated
    calibrate_normalization(model, [x])
    assert distance() < 0.05 * far


def test_layers_ahead_of_the_first_neuron_and_representation_networks_stay():
    model, x = spiking(), samples()
    stock = next(layer for layer in model.layers if type(layer) is keras.layers.BatchNormalization)
    before = [numpy(weight).copy() for weight in stock.weights]
    calibrate_normalization(model, [x])
    for weight, expected in zip(stock.weights, before, strict=True):
        np.testing.assert_array_equal(numpy(weight), expected)
    representation = spiking(timesteps=0)
    before = representation.get_weights()
    calibrate_normalization(representation, [x])
    for received, expected in zip(representation.get_weights(), before, strict=True):
        np.testing.assert_array_equal(received, expected)


def test_nothing_to_calibrate_on_is_refused():
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibrate_normalization(spiking(), [])


@pytest.mark.parametrize("without", ["scale", "center"])
def test_a_normalization_that_cannot_make_up_for_it_is_refused(without):
    inputs = keras.Input((4,))
    stream = layers.BatchNormalization(name="bare", **{without: False})(layers.IFSpike(timesteps=2)(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike()(stream)))
    with pytest.raises(ValueError, match=f"BatchNormalization 'bare' has .*{without}=False"):
        calibrate_normalization(model, [np.zeros((2, 4), "float32")])

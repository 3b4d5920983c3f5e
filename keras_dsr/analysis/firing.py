"""Spike trains and firing rates of a model's neuron layers, without touching the model."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np

from keras_dsr.layers import SpikingNeuron
from keras_dsr.layers.neurons import neurons_of


def _probe(model: keras.Model) -> tuple[list[str], keras.Model]:
    """The names of the neuron layers, in order, and a model that puts out the spikes of each, by name."""
    outputs = {}
    for layer in model.layers:
        if isinstance(layer, SpikingNeuron):
            output = layer.output
            values = output[0] if isinstance(output, (list, tuple)) else output
            if values.shape[1] == 0:
                raise ValueError(
                    f"Model {model.name!r} is a representation network (timesteps=0): it has no spikes. Give it time "
                    "steps with keras_dsr.models.with_timesteps(model, N)."
                )
            outputs[layer.name] = values
    if not outputs and neurons_of(model):
        raise ValueError(
            f"The spiking layers of model {model.name!r} are inside of its sub-models or layers, where nothing reaches "
            "their spikes from outside. Run this on the sub-model that has them among its own layers."
        )
    if not outputs:
        raise ValueError(f"Model {model.name!r} has no spiking layers (IFSpike, LIFSpike) to look at.")
    return list(outputs), keras.Model(model.inputs, outputs)


def _batches(model: keras.Model, x: np.ndarray, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    if not len(x):
        raise ValueError("There is nothing to run the model on: received no samples.")
    names, probe = _probe(model)
    size = min(batch_size, len(x))
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        # A last batch that is short is filled up, so that the model compiles for one shape.
        filled = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        outputs = probe.predict_on_batch(filled)
        yield {name: np.asarray(outputs[name])[: len(batch)] for name in names}  # JAX sorted them by name


def spike_trains(model: keras.Model, x: np.ndarray, batch_size: int = 128) -> dict[str, np.ndarray]:
    """The spikes of each neuron layer, in inference.

    Args:
        model: A functional or Sequential model with spiking layers.
        x: Its input, of shape (batch, ...).
        batch_size: Samples that run at once.

    Returns:
        For each neuron layer, by name and in order, booleans of shape (batch, time, ...).

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    batches = [{name: values != 0 for name, values in batch.items()} for batch in _batches(model, x, batch_size)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def firing_rates(model: keras.Model, x: np.ndarray, batch_size: int = 128) -> dict[str, float]:
    """The firing rate of each neuron layer, in inference: spikes a neuron fires in a time step, from 0 to 1.

    Memory holds one batch of spikes at a time.

    Args:
        model: A functional or Sequential model with spiking layers.
        x: Its input, of shape (batch, ...).
        batch_size: Samples that run at once.

    Returns:
        For each neuron layer, by name and in order, its mean over samples, time steps and neurons.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    spikes: dict[str, int] = {}
    chances: dict[str, int] = {}
    for batch in _batches(model, x, batch_size):
        for name, values in batch.items():
            spikes[name] = spikes.get(name, 0) + int(np.count_nonzero(values))
            chances[name] = chances.get(name, 0) + values.size
    return {name: spikes[name] / chances[name] for name in spikes}


def thresholds(model: keras.Model) -> dict[str, float]:
    """The threshold V_th of each neuron layer, by name and in order."""
    return {layer.name: float(np.asarray(layer.threshold)) for layer in neurons_of(model)}

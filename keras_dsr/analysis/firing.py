"""Spike trains, firing rates and thresholds of a model's neuron layers, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_dsr import backend
from keras_dsr.analysis import tracing
from keras_dsr.layers import SpikingNeuron
from keras_dsr.layers.neurons import neurons_of


def spike_trains(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> dict[str, np.ndarray]:
    """The spikes of each neuron layer, in inference.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (batch, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        For each neuron layer, by name and in order, booleans of shape (batch, time, ...).

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    names = tracing.neurons_by_name(model)
    found = [
        {name: parts[f"{name}/fired"][:count] for name in names}
        for count, parts in tracing.run(tracing.Probe(model, _fired), x, batch_size)
    ]
    return {name: np.concatenate([batch[name] for batch in found]) for name in names}


def firing_rates(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> dict[str, float]:
    """The firing rate of each neuron layer, in inference: spikes a neuron fires in a time step, from 0 to 1.

    Spikes are counted where the model runs; memory holds one batch of them at a time.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (batch, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        For each neuron layer, by name and in order, its mean over samples, time steps and neurons.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    return tracing.trace(model, x, batch_size).firing_rates


def thresholds(model: keras.Model) -> dict[str, float]:
    """The threshold V_th of each neuron layer, in order and by the names that traces have, with time steps or without.

    Args:
        model: Any model. A neuron layer that no graph reaches, within another layer, has its own name.

    Returns:
        V_th by name.
    """
    named = dict(tracing.reached_neurons(model))
    reached = set(map(id, named.values()))
    named |= {layer.name: layer for layer in neurons_of(model) if id(layer) not in reached}
    return {name: float(backend.to_numpy(layer.threshold.value)) for name, layer in named.items()}


def _fired(name: str, layer: Any, received: Any, output: Any, real: Any) -> dict[str, Any]:
    if not isinstance(layer, SpikingNeuron):
        return {}
    values = output if hasattr(output, "shape") else next(iter(output))
    return {"fired": values != 0}

"""Spike trains and firing rates of a model's neuron layers, without touching the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import backend
from keras_dsr.layers import SpikingNeuron
from keras_dsr.layers.neurons import neurons_of


def _spikes(model: keras.Model) -> dict[str, Any]:
    """For each neuron layer, by name and in order, the symbolic spikes that it puts out."""
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
    return outputs


def _batches(x: np.ndarray | Iterable[Any], batch_size: int) -> Iterator[np.ndarray]:
    """Batches of an array, or of what already comes in batches."""
    if hasattr(x, "shape"):
        yield from (x[start : start + batch_size] for start in range(0, len(x), batch_size))
    else:
        yield from (np.asarray(each[0] if isinstance(each, (list, tuple)) else each) for each in x)


def _run(
    model: keras.Model, outputs: dict[str, Any], x: np.ndarray | Iterable[Any], batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """What the model puts out under each name, batch by batch."""
    probe = keras.Model(model.inputs, outputs)
    size = None
    for batch in _batches(x, batch_size):
        if not len(batch):
            continue
        size = size or len(batch)
        # A last batch that is short is filled up, so that the model compiles for one shape.
        filled = np.concatenate([batch, np.repeat(batch[-1:], max(size - len(batch), 0), axis=0)])
        results = probe.predict_on_batch(filled)
        yield {name: np.asarray(results[name])[: len(batch)] for name in outputs}  # JAX sorted them by name
    if size is None:
        raise ValueError("There is nothing to run the model on: received no samples.")


def spike_trains(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> dict[str, np.ndarray]:
    """The spikes of each neuron layer, in inference.

    Args:
        model: A functional or Sequential model with spiking layers.
        x: Its input, of shape (batch, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        For each neuron layer, by name and in order, booleans of shape (batch, time, ...).

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    spikes = {name: values != 0 for name, values in _spikes(model).items()}
    batches = list(_run(model, spikes, x, batch_size))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in spikes}


def firing_rates(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> dict[str, float]:
    """The firing rate of each neuron layer, in inference: spikes a neuron fires in a time step, from 0 to 1.

    Spikes are counted where the model runs; memory holds one batch of them at a time.

    Args:
        model: A functional or Sequential model with spiking layers.
        x: Its input, of shape (batch, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        For each neuron layer, by name and in order, its mean over samples, time steps and neurons.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or `x` is empty.
    """
    outputs = {}
    for name, values in _spikes(model).items():
        axes = tuple(range(1, len(values.shape)))
        fired = values != 0
        outputs[f"{name}/spikes"] = ops.sum(ops.cast(fired, "int32"), axis=axes)
        outputs[f"{name}/chances"] = ops.sum(ops.cast(ops.ones_like(fired), "int32"), axis=axes)
    totals = dict.fromkeys(outputs, 0)
    for batch in _run(model, outputs, x, batch_size):
        for name, counts in batch.items():
            totals[name] += int(counts.sum(dtype="int64"))
    return {name: totals[f"{name}/spikes"] / totals[f"{name}/chances"] for name in _spikes(model)}


def thresholds(model: keras.Model) -> dict[str, float]:
    """The threshold V_th of each neuron layer, by name and in order."""
    return {layer.name: float(backend.to_numpy(layer.threshold.value)) for layer in neurons_of(model)}

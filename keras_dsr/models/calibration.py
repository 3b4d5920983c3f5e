"""The step between a trained representation network and its spiking form: thresholds, and normalization statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr.layers import BatchNormalization, SpikingNeuron
from keras_dsr.layers.neurons import neurons_of


class _Quantile:
    """A quantile of a stream of numbers of at least 0, in bounded memory.

    Numbers are counted in bins of equal width; where one is beyond the last bin, neighbouring bins are merged, so that
    the width doubles. What comes out is exact to one bin, 1 / 4096 of the range or less.
    """

    _BINS = 8192

    def __init__(self) -> None:
        self.counts = np.zeros(self._BINS, "int64")
        self.limit = 2.0**-20
        self.largest = 0.0

    def add(self, values: np.ndarray) -> None:
        self.largest = max(self.largest, float(values.max()))
        while self.largest > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(self._BINS // 2, "int64")])
            self.limit *= 2
        numbers = np.minimum((values.ravel() * (self._BINS / self.limit)).astype("int64"), self._BINS - 1)
        self.counts += np.bincount(numbers, minlength=self._BINS)

    def at(self, percentile: float) -> float:
        if percentile == 100:
            return self.largest
        reached = np.cumsum(self.counts) >= percentile / 100 * self.counts.sum()
        return min((int(np.argmax(reached)) + 1) * self.limit / self._BINS, self.largest)


def calibrate_thresholds(
    model: keras.Model, batches: Iterable[Any], percentile: float = 99.9
) -> dict[str, tuple[float, float]]:
    """Sets each neuron layer's threshold to a percentile of what the representation network puts into it.

    Spikes are worth V_th / N (IF): a threshold above all activations wastes steps on values that never occur, one far
    below cuts activations off. The paper's ImageNet training takes thresholds from the trained ANN so (its text: the
    maximum; its released code: the 99.9th percentile).

    Args:
        model: A functional or Sequential representation network (timesteps=0), trained.
        batches: Batches of inputs, or of (inputs, labels); passed over once, in bounded memory.
        percentile: In (0, 100]; of all activations of the layer, those at zero included. 100 is the maximum.

    Returns:
        For each neuron layer, by name and in order, its threshold before and after. A layer whose activations are all
        zero keeps its threshold; none goes below its lower bound.

    Raises:
        ValueError: if the percentile is out of range, the model has time steps or no neuron layers among its own, the
            batches are empty, or an activation is not finite.

    Reference: Meng et al., CVPR 2022, Appendix (hybrid training on ImageNet).
    """
    if not (math.isfinite(percentile) and 0 < percentile <= 100):
        raise ValueError(f"percentile must be in (0, 100]. Received percentile={percentile!r}.")
    layers = [layer for layer in model.layers if isinstance(layer, SpikingNeuron)]
    if not layers or len(layers) != len(neurons_of(model)):
        raise ValueError(
            "calibrate_thresholds reads what the neuron layers of a model receive, which must be among its own layers. "
            f"Model {model.name!r} has {len(layers)} of its {len(neurons_of(model))} neuron layers there."
        )
    inputs: dict[str, Any] = {}
    for layer in layers:
        if layer.output[0].shape[1] != 0:
            raise ValueError(
                f"Thresholds are calibrated on the representation network. Model {model.name!r} has time steps; "
                "convert it first with keras_dsr.models.with_timesteps(model, 0)."
            )
        received = layer.input
        # A stream's second part is the representation.
        inputs[layer.name] = received[1] if isinstance(received, (list, tuple)) else received
    probe = keras.Model(model.inputs, inputs)

    quantiles = {layer.name: _Quantile() for layer in layers}
    for _, outputs in _outputs(probe, batches):
        for layer in layers:
            values = np.asarray(outputs[layer.name], dtype="float32")
            if not np.isfinite(values).all():
                raise ValueError(f"The activations that {layer.name!r} receives are not all finite numbers.")
            # What the neuron would make of them with no upper limit, in the unit of its threshold.
            quantiles[layer.name].add(np.asarray(layer.coding.clamp(values, 1e30)) / layer.coding.bound(1.0))

    changed = {}
    for layer in layers:
        before = float(np.asarray(layer.threshold))
        quantile = quantiles[layer.name]
        after = max(quantile.at(percentile), layer.threshold_lower_bound) if quantile.largest else before
        layer.threshold.assign(after)
        changed[layer.name] = (before, after)
    return changed


def calibrate_normalization(model: keras.Model, batches: Iterable[Any]) -> None:
    """Gives batch normalization the statistics of a spiking network, without changing what the network computes.

    Between neurons, variance is pooled over batch and time (Eq. 31), and spikes vary over time far more than what they
    stand for varies over the batch. A representation network knows only the latter, so that its weights, used with
    spikes, are right in inference but divided by quite another variance in the first update of training. Here each
    layer's moving mean mu and variance v become those of the simulation, and gamma and beta are changed so that
    gamma (x - mu) / sqrt(v + eps) + beta stays the same function of x.

    Args:
        model: A functional or Sequential model with time steps and the weights of its representation network.
        batches: Batches of inputs, or of (inputs, labels); passed over once, in bounded memory.

    Raises:
        ValueError: if the batches are empty, or a layer has no scale or center to change.
    """
    layers = [layer for layer in model.layers if isinstance(layer, BatchNormalization)]
    layers = [layer for layer in layers if layer.input[0].shape[1] != 0]
    moments: dict[str, Any] = {}
    for layer in layers:
        if not (layer.scale and layer.center):
            raise ValueError(
                "Statistics can be changed only where scale and center make up for it. BatchNormalization "
                f"{layer.name!r} has scale={layer.scale}, center={layer.center}."
            )
        values = ops.cast(layer.input[0], "float32")
        axes = [axis for axis in range(len(values.shape)) if axis != layer.axis % (len(values.shape) - 1) + 1]
        moments[f"{layer.name}/mean"] = ops.mean(values, axis=axes)
        moments[f"{layer.name}/square"] = ops.mean(ops.square(values), axis=axes)
    if not layers:
        return
    totals = dict.fromkeys(moments, 0.0)
    seen = 0
    for count, outputs in _outputs(keras.Model(model.inputs, moments), batches):
        for name in totals:
            totals[name] = totals[name] + count * np.asarray(outputs[name], dtype="float64")
        seen += count
    for layer in layers:
        mean = totals[f"{layer.name}/mean"] / seen
        variance = np.maximum(totals[f"{layer.name}/square"] / seen - mean**2, 0.0)
        gamma, beta, old_mean, old_variance = (
            np.asarray(weight.value, dtype="float64")
            for weight in (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
        )
        slope = gamma / np.sqrt(old_variance + layer.epsilon)
        layer.gamma.assign(slope * np.sqrt(variance + layer.epsilon))
        layer.beta.assign(beta + slope * (mean - old_mean))
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(variance)


def _outputs(probe: keras.Model, batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each batch its size and what the model puts out; a ValueError if there is none."""
    seen = 0
    for batch in batches:
        x = np.asarray(batch[0] if isinstance(batch, (list, tuple)) else batch)
        if len(x):
            seen += len(x)
            yield len(x), probe.predict_on_batch(x)
    if not seen:
        raise ValueError("There is nothing to calibrate on: received no batches.")

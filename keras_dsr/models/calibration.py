"""Thresholds from activations: the step between a trained representation network and its spiking form."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_dsr.layers import SpikingNeuron
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
    seen = 0
    for batch in batches:
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        outputs = probe.predict_on_batch(np.asarray(x))
        for layer in layers:
            values = np.asarray(outputs[layer.name], dtype="float32")
            if not np.isfinite(values).all():
                raise ValueError(f"The activations that {layer.name!r} receives are not all finite numbers.")
            # What the neuron would make of them with no upper limit, in the unit of its threshold.
            quantiles[layer.name].add(np.asarray(layer.coding.clamp(values, 1e30)) / layer.coding.bound(1.0))
        seen += len(x)
    if not seen:
        raise ValueError("There is nothing to calibrate on: received no batches.")

    changed = {}
    for layer in layers:
        before = float(np.asarray(layer.threshold))
        quantile = quantiles[layer.name]
        after = max(quantile.at(percentile), layer.threshold_lower_bound) if quantile.largest else before
        layer.threshold.assign(after)
        changed[layer.name] = (before, after)
    return changed

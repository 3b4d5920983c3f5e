"""Keras callbacks for the training of spiking networks."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from keras_dsr.constraints import not_finite
from keras_dsr.layers.neurons import neurons_of


class CheckThresholds(keras.callbacks.Callback):
    """Stops training with an error that names the layer, as soon as a threshold is NaN or infinite.

    A threshold that is no number makes its layer's spikes none, and so the loss. The thresholds are therefore looked at
    after each epoch, and after a batch only if its loss is not finite.

    Raises:
        ValueError: from `fit`, if a threshold is NaN or infinite.
    """

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not math.isfinite(float((logs or {}).get("loss", 0.0))):
            self._check()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check()

    def _check(self) -> None:
        for layer in neurons_of(self.model):
            if not math.isfinite(float(np.asarray(layer.threshold))):
                raise ValueError(not_finite(f"threshold of {type(layer).__name__} {layer.name!r}"))

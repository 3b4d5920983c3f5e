"""Training that stops where numbers are no longer finite."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from keras_dsr import backend
from keras_dsr.constraints import not_finite
from keras_dsr.layers.neurons import neurons_of


class CheckFinite(keras.callbacks.Callback):
    """Stops training with an error that names the layer, as soon as a loss, threshold or weight is NaN or infinite.

    Weights are looked at after each epoch, ahead of callbacks that come later and may save them, and after a batch only
    if its loss is not finite. Thresholds are first: one that is no number makes its layer's spikes none, and so the
    loss.

    Raises:
        ValueError: from `fit`, if a loss, threshold or weight is NaN or infinite.
    """

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if math.isfinite(float((logs or {}).get("loss", 0.0))):
            return
        self._check_weights(f"at batch {batch}")
        raise ValueError(
            f"The loss is not a finite number at batch {batch}, though all weights are: look for NaN in the data, or "
            "for labels out of range."
        )

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._check_weights(f"at the end of epoch {epoch + 1}")

    def _check_weights(self, when: str) -> None:
        model = self.model
        for layer in neurons_of(model):
            if not math.isfinite(float(backend.to_numpy(layer.threshold.value))):
                raise ValueError(not_finite(f"threshold of {type(layer).__name__} {layer.name!r}"))
        for layer in model._flatten_layers(include_self=False, recursive=True):
            for weight in layer._trainable_variables + layer._non_trainable_variables:
                if not np.isfinite(backend.to_numpy(weight.value)).all():
                    raise ValueError(
                        f"Weights of layer {layer.name!r} ({weight.path}) are no longer finite numbers {when}. Lower "
                        "the learning rate, clip the gradients with clipnorm, or look for NaN in the data."
                    )

"""Keras callbacks for the training of spiking networks.

- `Checkpoint`: a `fit` that is killed goes on to the same weights
- `CheckFinite`: stops at a NaN and names the layer
- on the way: `FiringRate` and `ThresholdHistory`, which logs show, and `SpikeHistograms`, for TensorBoard
"""

from keras_dsr.callbacks.checkpoint import Checkpoint
from keras_dsr.callbacks.finite import CheckFinite
from keras_dsr.callbacks.recording import FiringRate, SpikeHistograms, ThresholdHistory

__all__ = [
    "CheckFinite",
    "Checkpoint",
    "FiringRate",
    "SpikeHistograms",
    "ThresholdHistory",
]

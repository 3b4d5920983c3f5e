"""Spiking neural networks in Keras 3, trained by Differentiation on Spike Representation with `model.fit`.

- `keras_dsr.layers`: `IFSpike`, `LIFSpike`, `SpikeRep`, `Synapse`, `BatchNormalization`, `Add`, `Dropout`, `ToStream`,
  `ToTensor`
- `keras_dsr.models`: `preact_resnet`, `vgg`, `small_cnn`; `with_timesteps`, which changes a model's number of steps;
  `calibrate_thresholds` and `calibrate_normalization`, which make a trained ANN ready for spikes
- `keras_dsr.RateCoding`, `keras_dsr.WeightedRateCoding`: what a train of spikes stands for
- `keras_dsr.Stream`: what travels between layers
- `keras_dsr.callbacks`: `Checkpoint`, with which a killed `fit` goes on to the same weights; `CheckFinite`,
  `FiringRate`, `ThresholdHistory`, `SpikeHistograms`
- `keras_dsr.analysis`: what happens inside: traces, energy, errors of representation, answers before the last step
- `keras_dsr.optimizers`: `SGD`, with the paper's weight decay
- `keras_dsr.training`: `train`, and `strategy` for several devices
- the command line, `keras-dsr`: `train`, `resume`, `tune`, `evaluate`, `report`, `recipes`, `pack`, `compare`,
  `check-tpu`

Reference: Meng et al., "Training High-Performance Low-Latency Spiking Neural Networks by Differentiation on Spike
Representation", CVPR 2022.
"""

from keras_dsr import callbacks, layers, models, optimizers
from keras_dsr.coding import RateCoding, WeightedRateCoding
from keras_dsr.stream import Stream

__version__ = "0.1.0"

__all__ = ["RateCoding", "Stream", "WeightedRateCoding", "__version__", "callbacks", "layers", "models", "optimizers"]

"""Keras layers for spiking networks: neurons, what connects them, and what goes in and out.

- neurons: `IFSpike`, `LIFSpike`
- between them, on streams: `Synapse` (any affine Keras layer), `BatchNormalization`, `Add`, `Dropout`
- weights of few bits: `QuantizedConv2D`, `QuantizedDense`, for a `Synapse` or on their own
- in and out: `ToStream`, `ToTensor`, and the readout `SpikeRep`
- in networks whose sums are exact (`keras_dsr.export.exact`, `keras_dsr.export.integer`): `FixedPoint`, `Scale`,
  `Requantize`
"""

from keras_dsr.layers.fixed_point import FixedPoint, Requantize, Scale
from keras_dsr.layers.merging import Add, Dropout
from keras_dsr.layers.neurons import IFSpike, LIFSpike, SpikingNeuron
from keras_dsr.layers.normalization import BatchNormalization
from keras_dsr.layers.quantized import QuantizedConv2D, QuantizedDense
from keras_dsr.layers.readout import SpikeRep, ToStream, ToTensor
from keras_dsr.layers.synapse import Synapse

__all__ = [
    "Add",
    "BatchNormalization",
    "Dropout",
    "FixedPoint",
    "IFSpike",
    "LIFSpike",
    "QuantizedConv2D",
    "QuantizedDense",
    "Requantize",
    "Scale",
    "SpikeRep",
    "SpikingNeuron",
    "Synapse",
    "ToStream",
    "ToTensor",
]

"""What the networks are built from: one way to write a layer for a static tensor and for a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_dsr import layers
from keras_dsr.layers.neurons import SpikingNeuron, check_timesteps
from keras_dsr.layers.quantized import check_bits
from keras_dsr.stream import Stream

# PyTorch's defaults, which the paper's networks have: Keras counts momentum the other way round.
MOMENTUM = 0.9
EPSILON = 1e-5

NEURONS: dict[str, type[SpikingNeuron]] = {"if": layers.IFSpike, "lif": layers.LIFSpike}


class Builder:
    """Makes the layers of a network, in the form that their input wants: stock on a tensor, wrapped on a stream.

    Args:
        neuron: "if", "lif", or a neuron layer, whose arguments all neurons of the network get.
        timesteps: N for networks that start from a static input; `None` if the input has a time axis.
        weight_bits: Bits of the weights of convolutions and dense layers; `None` for floats.
    """

    def __init__(self, neuron: str | SpikingNeuron, timesteps: int | None, weight_bits: int | None = None) -> None:
        if isinstance(neuron, str) and neuron in NEURONS:
            neuron = NEURONS[neuron]()
        if not isinstance(neuron, SpikingNeuron):
            raise ValueError(
                f"neuron is one of {sorted(NEURONS)}, or a layer such as keras_dsr.layers.IFSpike(threshold=1.0). "
                f"Received neuron={neuron!r}."
            )
        if neuron.timesteps is not None:
            raise ValueError(
                "The number of time steps is the network's, not the neuron's. Received a neuron with "
                f"timesteps={neuron.timesteps!r}; give it to the network instead."
            )
        self.prototype = neuron
        self.timesteps = check_timesteps(timesteps)
        self.weight_bits = None if weight_bits is None else check_bits(weight_bits)

    @property
    def coding(self) -> Any:
        """The coding of the network's neurons."""
        return self.prototype.coding

    def neuron(self, x: Any, name: str) -> Stream:
        """A neuron layer; it makes the stream if `x` is static."""
        config = {**self.prototype.get_config(), "name": name}
        config["timesteps"] = None if isinstance(x, Stream) else self.timesteps
        return type(self.prototype).from_config(config)(x)

    def affine(self, x: Any, layer: keras.layers.Layer) -> Any:
        """An affine layer."""
        return layers.Synapse(layer)(x) if isinstance(x, Stream) else layer(x)

    def normalize(self, x: Any, name: str) -> Any:
        """Batch normalization."""
        kind = layers.BatchNormalization if isinstance(x, Stream) else keras.layers.BatchNormalization
        return kind(momentum=MOMENTUM, epsilon=EPSILON, name=name)(x)

    def drop(self, x: Any, rate: float, name: str) -> Any:
        """Dropout, or nothing for a rate of 0."""
        if not rate:
            return x
        return (layers.Dropout if isinstance(x, Stream) else keras.layers.Dropout)(rate, name=name)(x)

    def convolve(self, x: Any, channels: int, name: str, size: int = 3, stride: int = 1, bias: bool = True) -> Any:
        """A square convolution that pads size // 2 on every side, as the paper's networks do at any stride."""
        padding = "same"
        if stride > 1 and size > 1:  # "same" would pad unevenly
            x = self.affine(x, keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad"))
            padding = "valid"
        settings = {"strides": stride, "padding": padding, "use_bias": bias, "name": name}
        if self.weight_bits is None:
            return self.affine(x, keras.layers.Conv2D(channels, size, **settings))
        return self.affine(x, layers.QuantizedConv2D(channels, size, bits=self.weight_bits, **settings))

    def classify(self, x: Any, classes: int) -> Any:
        """The head of all networks: dense, normalization, neurons, spike representation."""
        if self.weight_bits is None:
            x = self.affine(x, keras.layers.Dense(classes, name="head_dense"))
        else:
            x = self.affine(x, layers.QuantizedDense(classes, bits=self.weight_bits, name="head_dense"))
        x = self.normalize(x, "head_bn")
        x = self.neuron(x, "head_neuron")
        return layers.SpikeRep(name="logits")(x)


def check_image_network(timesteps: int | None, input_shape: Sequence[int | None]) -> None:
    """Raises a ValueError unless a network for images knows its time steps and its input is an image."""
    if timesteps is None:
        raise ValueError("An image has no time axis, so timesteps must be a number. Received timesteps=None.")
    if len(input_shape) != 3:
        raise ValueError(f"input_shape is (height, width, channels). Received input_shape={input_shape!r}.")


def check_head(classes: int, dropout: float) -> None:
    """Raises a ValueError unless there are classes to tell apart and the dropout rate is one."""
    if classes < 2:
        raise ValueError(f"A classifier tells 2 or more classes apart. Received classes={classes!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a rate in [0, 1). Received dropout={dropout!r}.")

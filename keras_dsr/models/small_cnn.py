"""A small convolutional network for small images: the one that a first run trains."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.models.common import Builder, check_head, check_image_network


def small_cnn(
    widths: Sequence[int] = (32, 64),
    neuron: str | SpikingNeuron = "if",
    timesteps: int = 8,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (8, 8, 1),
    dropout: float = 0.0,
    weight_bits: int | None = None,
    name: str = "small_cnn",
) -> keras.Model:
    """A small spiking convolutional network.

    Convolution - BatchNorm - neurons for each width, with average pooling by 2 between; then dense - BatchNorm -
    neurons - spike representation, which is the logits.

    Args:
        widths: Channels of the convolutions.
        neuron: "if" or "lif", with the paper's defaults; or a neuron layer, whose arguments all neurons get.
        timesteps: Number N of time steps; 0 for the representation network, an ANN with the same weights.
        classes: Number of classes.
        input_shape: Height, width and channels of the image.
        dropout: Rate of the dropout ahead of the dense layer.
        weight_bits: Bits of the weights of convolutions and dense layers, trained by straight-through estimation (the
            paper's Table 7 has 8 and 4); `None` for floats.
        name: Name of the model.

    Returns:
        A functional `keras.Model` from images (batch, height, width, channels) to logits (batch, classes).

    Raises:
        ValueError: if an argument is not one of those named above.
    """
    if not widths:
        raise ValueError("widths names the channels of at least one convolution. Received an empty sequence.")
    check_image_network(timesteps, input_shape)
    check_head(classes, dropout)
    build = Builder(neuron, timesteps, weight_bits)

    x = inputs = keras.Input(input_shape, name="image")
    for index, width in enumerate(widths, start=1):
        if index > 1:
            x = build.affine(x, keras.layers.AveragePooling2D(2, name=f"pool{index - 1}"))
        x = build.convolve(x, width, f"conv{index}", bias=False)
        x = build.normalize(x, f"bn{index}")
        x = build.neuron(x, f"neuron{index}")
    x = build.affine(x, keras.layers.Flatten(name="flatten"))
    x = build.drop(x, dropout, "dropout")
    return keras.Model(inputs, build.classify(x, classes), name=name)

"""Pre-activation residual networks: the paper's networks for images."""

from __future__ import annotations

from pathlib import Path

import keras

from keras_dsr import layers
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.models import presets
from keras_dsr.models.common import Builder, check_head, check_image_network
from keras_dsr.stream import Stream

# depth -> blocks in each stage, channels in each stage
_STAGES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    18: ((2, 2, 2, 2), (64, 128, 256, 512)),
    20: ((3, 3, 3), (16, 32, 64)),
    32: ((5, 5, 5), (16, 32, 64)),
    44: ((7, 7, 7), (16, 32, 64)),
    56: ((9, 9, 9), (16, 32, 64)),
    110: ((18, 18, 18), (16, 32, 64)),
}
DEPTHS = tuple(_STAGES)


def preact_resnet(
    depth: int = 18,
    neuron: str | SpikingNeuron = "if",
    timesteps: int | None = None,
    classes: int = 10,
    input_shape: tuple[int | None, int | None, int] = (32, 32, 3),
    dropout: float = 0.0,
    stem: str = "cifar",
    weight_bits: int | None = None,
    weights: str | Path | None = None,
    name: str | None = None,
) -> keras.Model:
    """A spiking pre-activation ResNet for images.

    A block is BatchNorm - neuron - conv - BatchNorm - neuron - conv, and its shortcut starts behind the first neuron:
    an identity shortcut carries spikes. The head is BatchNorm - neuron - average pooling - neuron - dense - BatchNorm
    - neuron - spike representation, which is the logits.

    Args:
        depth: 18 (four stages of 64 to 512 channels), or 20, 32, 44, 56 or 110 (three stages of 16 to 64, Table 4).
        neuron: "if" or "lif", with the paper's defaults; or a neuron layer, whose arguments all neurons get, such as
            `keras_dsr.layers.IFSpike(threshold=1.0)`.
        timesteps: Number N of time steps; 0 for the representation network, an ANN with the same weights. `None` for
            20, or for the number that the `weights` were trained with.
        classes: Number of classes.
        input_shape: Height, width and channels of the image.
        dropout: Rate of the dropout ahead of the dense layer.
        stem: "cifar", one 3x3 convolution; or "imagenet", a 7x7 convolution of stride 2 and 3x3 average pooling of
            stride 2.
        weight_bits: Bits of the weights of convolutions and dense layers, trained by straight-through estimation (the
            paper's Table 7 has 8 and 4); `None` for floats.
        weights: Trained weights: the data set of a preset that comes with the package (`keras_dsr.models.presets.names`
            lists them), or the path of a preset's card. `None` for random ones.
        name: Name of the model.

    Returns:
        A functional `keras.Model` from images (batch, height, width, channels) to logits (batch, classes).

    Raises:
        ValueError: if an argument is not one of those named above, or weights do not fit the network or their hash.

    Example:

    >>> model = preact_resnet(depth=20, neuron="lif", timesteps=4)
    >>> model.output_shape
    (None, 10)

    Reference: Meng et al., CVPR 2022, Section 5 and Table 4.
    """
    if depth not in list(_STAGES):
        raise ValueError(f"depth is one of {sorted(_STAGES)}. Received depth={depth!r}.")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"stem is 'cifar' or 'imagenet'. Received stem={stem!r}.")
    if weights is not None:
        neuron, timesteps, weight_bits = presets.settings(
            f"preact_resnet{depth}", weights, neuron, timesteps, classes, weight_bits, stem
        )
    timesteps = 20 if timesteps is None else timesteps
    check_image_network(timesteps, input_shape)
    check_head(classes, dropout)
    build = Builder(neuron, timesteps, weight_bits)
    blocks, channels = _STAGES[depth]

    inputs = keras.Input(input_shape, name="image")
    if stem == "cifar":
        x = build.convolve(inputs, channels[0], "stem_conv", bias=False)
    else:
        x = build.convolve(inputs, channels[0], "stem_conv", size=7, stride=2, bias=False)
        x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
        x = keras.layers.AveragePooling2D(3, strides=2, name="stem_pool")(x)
    for stage, (count, width) in enumerate(zip(blocks, channels, strict=True), start=1):
        for block in range(1, count + 1):
            x = _block(build, x, width, stride=2 if stage > 1 and block == 1 else 1, name=f"stage{stage}_block{block}")
    x = build.normalize(x, "final_bn")
    x = build.neuron(x, "final_neuron")
    x = build.affine(x, keras.layers.GlobalAveragePooling2D(name="pool"))
    x = build.neuron(x, "pool_neuron")
    x = build.drop(x, dropout, "dropout")
    model = keras.Model(inputs, build.classify(x, classes), name=name or f"preact_resnet{depth}")
    if weights is not None:
        presets.load(model, f"preact_resnet{depth}", weights)
    return model


def _block(build: Builder, x: keras.KerasTensor | Stream, width: int, stride: int, name: str) -> Stream:
    inner = x.representation if isinstance(x, Stream) else x
    channels = inner.shape[-1]
    x = build.normalize(x, f"{name}_bn1")
    x = build.neuron(x, f"{name}_neuron1")
    shortcut = x
    if stride != 1 or channels != width:
        shortcut = build.convolve(x, width, f"{name}_shortcut", size=1, stride=stride)
    x = build.convolve(x, width, f"{name}_conv1", stride=stride)
    x = build.normalize(x, f"{name}_bn2")
    x = build.neuron(x, f"{name}_neuron2")
    x = build.convolve(x, width, f"{name}_conv2")
    return layers.Add(name=f"{name}_add")([x, shortcut])

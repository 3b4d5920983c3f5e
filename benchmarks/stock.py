"""The networks of `keras_dsr.models` of stock Keras layers: as ANNs, or with per-step autodiff.

Without time steps the neurons are ReLU. With them they are ours on plain tensors, between stock layers that run at
every time step and are differentiated as they are; so is Keras' own BatchNormalization, over batch and time. Layers
have the names that they have in `keras_dsr.models`, so that weights can go from one to the other: `weights_of`.
"""

from __future__ import annotations

from typing import Any

import keras
from per_step import EachStep

from keras_dsr import layers
from keras_dsr.models.preact_resnet import _STAGES as STAGES
from keras_dsr.models.vgg import _GROUPS as GROUPS


class _Build:
    """Makes layers for an image, or for a (batch, time, ...) tensor."""

    def __init__(self, timesteps: int | None, neuron: layers.SpikingNeuron, steps: bool = False) -> None:
        self.timesteps, self.prototype, self.steps = timesteps, neuron, steps

    def affine(self, layer: keras.layers.Layer, x: Any) -> Any:
        return EachStep(layer, name=f"{layer.name}_each")(x) if self.steps else layer(x)

    def neuron(self, x: Any, name: str) -> Any:
        if self.timesteps is None:
            return keras.layers.ReLU(name=name)(x)
        static, self.steps = not self.steps, True
        config = {**self.prototype.get_config(), "name": name, "timesteps": self.timesteps if static else None}
        x = type(self.prototype).from_config(config)(x)
        return layers.ToTensor()(x) if static else x

    @staticmethod
    def norm(x: Any, name: str) -> Any:  # over all axes but the channels: batch and time together
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)(x)

    def conv(self, x: Any, width: int, name: str, size: int = 3, stride: int = 1, bias: bool = True) -> Any:
        padding = "same"
        if stride > 1 and size > 1:
            x = self.affine(keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad"), x)
            padding = "valid"
        layer = keras.layers.Conv2D(width, size, strides=stride, padding=padding, use_bias=bias, name=name)
        return self.affine(layer, x)

    def classify(self, x: Any, classes: int) -> Any:
        x = self.neuron(
            self.norm(self.affine(keras.layers.Dense(classes, name="head_dense"), x), "head_bn"), "head_neuron"
        )
        return x if self.timesteps is None else layers.SpikeRep(name="logits")(x)


def preact_resnet(
    depth: int,
    timesteps: int | None,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    neuron: layers.SpikingNeuron | None = None,
) -> keras.Model:
    """A PreAct-ResNet, from images; with ReLU if `timesteps` is `None`."""
    build = _Build(timesteps, neuron or layers.IFSpike())
    blocks, widths = STAGES[depth]
    inputs = keras.Input(input_shape)
    x = build.conv(inputs, widths[0], "stem_conv", bias=False)
    channels = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        for block in range(1, count + 1):
            name, stride = f"stage{stage}_block{block}", 2 if stage > 1 and block == 1 else 1
            x = shortcut = build.neuron(build.norm(x, f"{name}_bn1"), f"{name}_neuron1")
            if stride == 2 or channels != width:
                shortcut = build.conv(x, width, f"{name}_shortcut", size=1, stride=stride)
            x = build.conv(x, width, f"{name}_conv1", stride=stride)
            x = build.neuron(build.norm(x, f"{name}_bn2"), f"{name}_neuron2")
            x = keras.layers.Add(name=f"{name}_add")([build.conv(x, width, f"{name}_conv2"), shortcut])
            channels = width
    x = build.neuron(build.norm(x, "final_bn"), "final_neuron")
    x = build.neuron(build.affine(keras.layers.GlobalAveragePooling2D(name="pool"), x), "pool_neuron")
    return keras.Model(inputs, build.classify(x, classes))


def vgg(
    depth: int,
    timesteps: int | None,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (48, 48, 2),
    neuron: layers.SpikingNeuron | None = None,
) -> keras.Model:
    """A VGG, from frames (batch, time, height, width, channels); with ReLU, from one image, if there are no steps."""
    build = _Build(timesteps, neuron or layers.IFSpike(), steps=timesteps is not None)
    x = inputs = keras.Input(input_shape if timesteps is None else (timesteps, *input_shape))
    for group, widths in enumerate(GROUPS[depth], start=1):
        for index, width in enumerate(widths, start=1):
            name = f"group{group}_{index}"
            x = build.conv(x, width, f"{name}_conv")
            x = build.neuron(build.norm(x, f"{name}_bn"), f"{name}_neuron")
        x = build.affine(keras.layers.AveragePooling2D(2, name=f"group{group}_pool"), x)
    return keras.Model(inputs, build.classify(build.affine(keras.layers.Flatten(name="flatten"), x), classes))


def weights_of(model: keras.Model) -> dict[str, Any]:
    """A model's weights by the name of their layer and their own, such as "stage1_block1_conv1/kernel"."""
    return {"/".join(weight.path.split("/")[-2:]): weight for weight in model.weights}

"""VGG for event cameras: the paper's VGG-11, and a small one."""

from __future__ import annotations

from pathlib import Path

import keras

from keras_dsr import layers
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.models import presets
from keras_dsr.models.common import Builder, check_head

# Channels of the convolutions; average pooling by 2 follows each group.
_GROUPS: dict[int, tuple[tuple[int, ...], ...]] = {
    5: ((32,), (64,), (128, 128)),
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
}
DEPTHS = tuple(_GROUPS)


def vgg(
    depth: int = 11,
    neuron: str | SpikingNeuron = "if",
    timesteps: int | None = None,
    classes: int = 10,
    input_shape: tuple[int | None, int | None, int | None, int] = (20, 48, 48, 2),
    dropout: float = 0.0,
    weight_bits: int | None = None,
    weights: str | Path | None = None,
    name: str | None = None,
) -> keras.Model:
    """A spiking VGG for frames of events.

    Convolutions, each followed by BatchNorm and neurons, in groups with average pooling after each; then dense -
    BatchNorm - neurons - spike representation, which is the logits.

    Args:
        depth: 11, the paper's, of eight convolutions in five groups; or 5, a small one of four in three groups.
        neuron: "if" or "lif", with the paper's defaults; or a neuron layer, whose arguments all neurons get, such as
            `keras_dsr.layers.IFSpike(threshold=1.0)`.
        timesteps: `None` to simulate each frame of the input; 0 for the representation network, an ANN with the same
            weights that runs once on the frames' representation.
        classes: Number of classes.
        input_shape: Time, height, width and polarities of the frames; at least 32 high and wide for depth 11, 8 for 5.
        dropout: Rate of the dropout ahead of the dense layer.
        weight_bits: Bits of the weights of convolutions and dense layers, trained by straight-through estimation (the
            paper's Table 7 has 8 and 4); `None` for floats.
        weights: Trained weights: the data set of a preset that comes with the package, such as "nmnist" for depth 5; or
            the path of a preset's card, see `keras_dsr.models.presets`. `None` for random ones.
        name: Name of the model.

    Returns:
        A functional `keras.Model` from frames (batch, time, height, width, polarities) to logits (batch, classes).

    Raises:
        ValueError: if an argument is not one of those named above, or weights do not fit the network or their hash.

    Reference: Meng et al., CVPR 2022, Section 5 and Appendix.
    """
    if depth not in list(_GROUPS):
        raise ValueError(f"depth is one of {sorted(_GROUPS)}. Received depth={depth!r}.")
    if len(input_shape) != 4:
        raise ValueError(
            f"input_shape is (time, height, width, polarities): events come in frames. Received {input_shape!r}."
        )
    check_head(classes, dropout)
    if weights is not None:
        # The number of steps is that of the frames, whatever the weights were trained with.
        neuron, _, weight_bits = presets.settings(f"vgg{depth}", weights, neuron, timesteps, classes, weight_bits)
    build = Builder(neuron, None, weight_bits)

    inputs = keras.Input(input_shape, name="frames")
    x = layers.ToStream(coding=build.coding, timesteps=timesteps, name="to_stream")(inputs)
    for group, widths in enumerate(_GROUPS[depth], start=1):
        for index, width in enumerate(widths, start=1):
            name_ = f"group{group}_{index}"
            x = build.convolve(x, width, f"{name_}_conv")
            x = build.normalize(x, f"{name_}_bn")
            x = build.neuron(x, f"{name_}_neuron")
        x = build.affine(x, keras.layers.AveragePooling2D(2, name=f"group{group}_pool"))
    x = build.affine(x, keras.layers.Flatten(name="flatten"))
    x = build.drop(x, dropout, "dropout")
    model = keras.Model(inputs, build.classify(x, classes), name=name or f"vgg{depth}")
    if weights is not None:
        presets.load(model, f"vgg{depth}", weights)
    return model

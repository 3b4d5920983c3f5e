"""What per-step autodiff needs: stock layers at every time step of a plain tensor, differentiated as they are."""

from __future__ import annotations

import keras


@keras.saving.register_keras_serializable("benchmark")
class EachStep(keras.layers.Wrapper):
    """A layer on batch and time folded into one axis, differentiated as it is."""

    def build(self, input_shape):
        self.layer.build((None, *input_shape[2:]))
        self.built = True

    def compute_output_shape(self, input_shape):
        return (*input_shape[:2], *self.layer.compute_output_shape((None, *input_shape[2:]))[1:])

    def call(self, inputs):
        output = self.layer(keras.ops.reshape(inputs, (-1, *inputs.shape[2:])))
        return keras.ops.reshape(output, (-1, *inputs.shape[1:2], *output.shape[1:]))


def small_cnn(widths, neuron, timesteps, classes, input_shape) -> keras.Model:
    """`keras_dsr.models.small_cnn` in plain tensors: the same weights in the same order, gradients at every step."""
    from keras_dsr import layers

    def normalize(x):  # over all axes but the channels: batch and time together
        return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def fire(x, static=False):
        config = {**neuron.get_config(), "timesteps": timesteps if static else None}
        config.pop("name")
        x = type(neuron).from_config(config)(x)
        return layers.ToTensor()(x) if static else x

    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(widths[0], 3, padding="same", use_bias=False)(inputs)
    x = fire(normalize(x), static=True)
    for width in widths[1:]:
        x = EachStep(keras.layers.AveragePooling2D(2))(x)
        x = EachStep(keras.layers.Conv2D(width, 3, padding="same", use_bias=False))(x)
        x = fire(normalize(x))
    x = EachStep(keras.layers.Flatten())(x)
    x = EachStep(keras.layers.Dense(classes))(x)
    return keras.Model(inputs, layers.SpikeRep()(fire(normalize(x))))

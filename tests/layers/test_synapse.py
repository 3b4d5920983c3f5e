"""Synapses against the layer that they wrap, at every step and on the representation."""

from __future__ import annotations

import json

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy, with_weights
from keras import ops

from keras_dsr import RateCoding, Stream, WeightedRateCoding, layers
from keras_dsr.layers.synapse import AFFINE_LAYERS

L = keras.layers


def padded_convolution():
    return keras.Sequential([L.ZeroPadding2D(1), L.Conv2D(3, 3, strides=2)])


# name: the layer, and the shape of one sample
CASES = {
    "Dense": (lambda: L.Dense(3), (5,)),
    "Dense_2d": (lambda: L.Dense(3, use_bias=False), (4, 5)),
    "EinsumDense": (lambda: L.EinsumDense("abc,cd->abd", output_shape=(4, 3), bias_axes="d"), (4, 5)),
    "Conv1D": (lambda: L.Conv1D(3, 3, padding="same"), (6, 2)),
    "Conv2D": (lambda: L.Conv2D(3, 3, strides=2), (7, 7, 2)),
    "Conv2D_groups": (lambda: L.Conv2D(4, 3, groups=2, padding="same", dilation_rate=2), (6, 6, 2)),
    "Conv3D": (lambda: L.Conv3D(2, 2), (3, 4, 3, 2)),
    "Conv1DTranspose": (lambda: L.Conv1DTranspose(3, 3, strides=2), (5, 2)),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(3, 3, strides=2, padding="same"), (4, 4, 2)),
    "Conv3DTranspose": (lambda: L.Conv3DTranspose(2, 2), (3, 3, 3, 2)),
    "DepthwiseConv1D": (lambda: L.DepthwiseConv1D(3), (6, 2)),
    "DepthwiseConv2D": (lambda: L.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 2)),
    "SeparableConv1D": (lambda: L.SeparableConv1D(3, 3), (6, 2)),
    "SeparableConv2D": (lambda: L.SeparableConv2D(3, 3), (6, 6, 2)),
    "AveragePooling1D": (lambda: L.AveragePooling1D(2), (6, 2)),
    "AveragePooling2D": (lambda: L.AveragePooling2D(3, strides=2, padding="same"), (7, 7, 2)),
    "AveragePooling3D": (lambda: L.AveragePooling3D(2), (4, 4, 4, 2)),
    "GlobalAveragePooling1D": (lambda: L.GlobalAveragePooling1D(), (6, 2)),
    "GlobalAveragePooling2D": (lambda: L.GlobalAveragePooling2D(keepdims=True), (4, 4, 2)),
    "GlobalAveragePooling3D": (lambda: L.GlobalAveragePooling3D(), (3, 3, 3, 2)),
    "ZeroPadding1D": (lambda: L.ZeroPadding1D(1), (6, 2)),
    "ZeroPadding2D": (lambda: L.ZeroPadding2D(((1, 0), (2, 1))), (4, 4, 2)),
    "ZeroPadding3D": (lambda: L.ZeroPadding3D(1), (3, 3, 3, 2)),
    "Cropping1D": (lambda: L.Cropping1D(1), (6, 2)),
    "Cropping2D": (lambda: L.Cropping2D(1), (5, 5, 2)),
    "Cropping3D": (lambda: L.Cropping3D(1), (4, 4, 4, 2)),
    "UpSampling1D": (lambda: L.UpSampling1D(2), (3, 2)),
    "UpSampling2D": (lambda: L.UpSampling2D(2, interpolation="bilinear"), (3, 3, 2)),
    "UpSampling3D": (lambda: L.UpSampling3D(2), (2, 2, 2, 2)),
    "Flatten": (lambda: L.Flatten(), (3, 4, 2)),
    "Reshape": (lambda: L.Reshape((4, -1)), (8, 3)),
    "Permute": (lambda: L.Permute((2, 1)), (4, 3)),
    "Identity": (lambda: L.Identity(), (4, 3)),
    "QuantizedConv2D": (lambda: layers.QuantizedConv2D(3, 3, bits=4), (5, 5, 2)),
    "QuantizedDense": (lambda: layers.QuantizedDense(3, bits=4), (5,)),
    "Sequential": (padded_convolution, (6, 6, 2)),
}


def test_every_affine_layer_is_tested():
    assert {layer.__name__ for layer in AFFINE_LAYERS} <= set(CASES)


def make_stream(shape, steps=3, batch=2, coding=RateCoding()):  # noqa: B008
    values = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(batch, steps, *shape)).astype("float32"))
    return Stream(values, coding.represent(values))


def bias_up(layer):
    """Weights that are all different, biases too."""
    generator = np.random.default_rng(1)
    for weight in layer.weights:
        weight.assign(generator.normal(size=weight.shape).astype("float32") * 0.5)


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_representation(case):
    make, shape = CASES[case]
    layer, coding = make(), WeightedRateCoding(tau=1.0, dt=0.5)
    stream = make_stream(shape, coding=coding)
    synapse = layers.Synapse(layer)
    synapse(stream)
    bias_up(layer)
    out = synapse(stream)
    for n in range(3):
        np.testing.assert_allclose(
            numpy(out.values)[:, n], numpy(layer(stream.values[:, n])), rtol=1e-5, atol=1e-5, err_msg=f"step {n}"
        )
    np.testing.assert_allclose(numpy(out.representation), numpy(coding.represent(out.values)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_symbolic_shapes_are_the_real_ones(case):
    make, shape = CASES[case]
    synapse = layers.Synapse(make())
    symbolic = synapse(layers.ToStream()(keras.Input((3, *shape), batch_size=2)))
    real = synapse(make_stream(shape))
    assert [tuple(part.shape) for part in symbolic] == [tuple(part.shape) for part in real]
    shapes = synapse.compute_output_shape(((2, 3, *shape), (2, *shape)))
    assert [tuple(each) for each in shapes] == [tuple(part.shape) for part in real]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", ["Dense", "EinsumDense", "Conv2D", "Conv2DTranspose", "SeparableConv2D", "Sequential"])
def test_gradients_are_those_of_the_representation(case, jit):
    make, shape = CASES[case]
    layer = make()
    stream = make_stream(shape)
    synapse = layers.Synapse(layer)
    upstream = np.random.default_rng(2).normal(size=synapse(stream).representation.shape).astype("float32")
    weights = layer.trainable_weights
    arrays = [numpy(w) for w in weights]

    def whole(values, representation, *weight_values):
        out = with_weights(weights, weight_values, synapse, Stream(values, representation))
        return ops.sum(out.representation * upstream) + 100.0 * ops.sum(out.values**2), ()

    def alone(representation, *weight_values):
        return ops.sum(with_weights(weights, weight_values, layer, representation) * upstream), ()

    representation = numpy(stream.representation)
    _, _, received = helpers.value_and_grads(whole, numpy(stream.values), representation, *arrays, jit=jit)
    _, _, expected = helpers.value_and_grads(alone, representation, *arrays, jit=jit)
    np.testing.assert_array_equal(received[0], np.zeros(stream.values.shape))
    for one, other in zip(received[1:], expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.Activation("relu"), "wraps an affine layer.*Activation.*a neuron, keras_dsr.layers.IFSpike"),
        (lambda: L.ReLU(), "wraps an affine layer.*ReLU.*a neuron"),
        (lambda: L.MaxPooling2D(), "wraps an affine layer.*MaxPooling2D.*AveragePooling2D"),
        (lambda: L.Dropout(0.5), "Dropout.*keras_dsr.layers.Dropout, which keeps one mask"),
        (lambda: L.BatchNormalization(), "keras_dsr.layers.BatchNormalization, which pools batch and time"),
        (
            lambda: L.LayerNormalization(),
            "LayerNormalization.*If it is affine all the same, pass affine=True",
        ),
        (lambda: L.Dense(3, activation="relu"), "without activation.*Dense.*activation='relu'.*put a neuron after"),
        (lambda: L.Conv2D(3, 3, activity_regularizer="l2"), "cannot honour an activity regularizer.*leave it out"),
        (lambda: keras.Sequential([L.Dense(3), L.ReLU()]), "Received ReLU"),
        (lambda: layers.IFSpike(), "Received IFSpike"),
    ],
)
def test_what_is_not_affine(make, message):
    with pytest.raises(ValueError, match=message):
        layers.Synapse(make())


def test_what_is_no_layer():
    with pytest.raises(TypeError, match=r"wraps a Keras layer\. Received 'Dense'"):
        layers.Synapse("Dense")


def test_linear_activation_is_none():
    assert layers.Synapse(L.Dense(3, activation="linear")).layer.units == 3


@keras.saving.register_keras_serializable(package="tests")
class Halved(keras.layers.Layer):
    """A layer of one's own, affine."""

    def build(self, input_shape):
        self.offset = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, x):
        return x / 2 + self.offset

    def compute_output_shape(self, input_shape):
        return input_shape


def test_a_layer_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match=r"Received Halved.*pass affine=True"):
        layers.Synapse(Halved())
    stream = make_stream((4,))
    out = layers.Synapse(Halved(), affine=True)(stream)
    np.testing.assert_allclose(numpy(out.values), numpy(stream.values) / 2 + 1, rtol=1e-6)
    inputs = keras.Input((3, 4))
    model = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(Halved(), affine=True)(layers.ToStream()(inputs))))
    x = numpy(stream.values)
    np.testing.assert_array_equal(numpy(helpers.saved_and_loaded(model, tmp_path)(x)), numpy(model(x)))


def test_vouching_does_not_allow_an_activation():
    with pytest.raises(ValueError, match="without activation"):
        layers.Synapse(L.Dense(3, activation="relu"), affine=True)


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    make, shape = CASES[case]
    synapse = layers.Synapse(make(), name="some_synapse")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(synapse)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.name == "some_synapse"
    assert again.affine is False
    assert type(again.layer) is type(synapse.layer)
    assert again.layer.get_config() == synapse.layer.get_config()
    stream = make_stream(shape)
    synapse(stream), again(stream)
    again.set_weights(synapse.get_weights())
    np.testing.assert_array_equal(numpy(again(stream).values), numpy(synapse(stream).values))


@pytest.mark.parametrize("case", ["Dense", "Conv2D", "SeparableConv2D", "EinsumDense", "Sequential", "Permute"])
def test_keras_file_round_trip(case, tmp_path):
    make, shape = CASES[case]
    inputs = keras.Input((3, *shape))
    synapse = layers.Synapse(make())
    model = keras.Model(inputs, list(synapse(layers.ToStream()(inputs))))
    bias_up(synapse.layer)
    loaded = helpers.saved_and_loaded(model, tmp_path)
    x = numpy(make_stream(shape).values)
    for received, expected in zip(loaded(x), model(x), strict=True):
        np.testing.assert_array_equal(numpy(received), numpy(expected))


@pytest.mark.parametrize("case", ["Dense", "Conv2D", "Flatten", "GlobalAveragePooling2D", "Sequential"])
def test_no_time_steps(case):
    make, shape = CASES[case]
    layer = make()
    x = np.random.default_rng(0).uniform(0, 0.9, (2, *shape)).astype("float32")
    out = layers.Synapse(layer)(layers.IFSpike(threshold=1.0, timesteps=0)(x))
    np.testing.assert_allclose(numpy(out.representation), numpy(layer(x)), rtol=1e-6)
    assert tuple(out.values.shape) == (2, 0, *out.representation.shape[1:])


def test_names_after_the_layer():
    synapse = layers.Synapse(L.Dense(3, name="fc"))
    assert synapse.name == "fc_synapse"
    synapse(make_stream((4,)))
    assert sorted(weight.path for weight in synapse.weights) == ["fc_synapse/fc/bias", "fc_synapse/fc/kernel"]


@pytest.mark.tensorflow_only
def test_unknown_number_of_steps_and_size():
    inputs = keras.Input((None, None, None, 2))
    synapse = layers.Synapse(L.Conv2D(3, 3, padding="same"))
    out = synapse(layers.ToStream()(inputs))
    assert tuple(out.values.shape) == (None, None, None, None, 3)
    model = keras.Model(inputs, list(out))
    for steps, size in ((1, 4), (3, 5)):
        x = np.random.default_rng(0).normal(size=(2, steps, size, size, 2)).astype("float32")
        values, representation = model.predict(x, verbose=0)
        for n in range(steps):
            np.testing.assert_allclose(values[:, n], numpy(synapse.layer(x[:, n])), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(representation, values.mean(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        synapse = layers.Synapse(L.Dense(3))
        out = synapse(make_stream((4,)))
    finally:
        keras.config.set_dtype_policy("float32")
    compute = policy.removeprefix("mixed_")
    assert [keras.backend.standardize_dtype(part.dtype) for part in out] == [compute, compute]
    assert {weight.dtype for weight in synapse.weights} == {"float32"}


def test_frozen_layers_do_not_train():
    synapse = layers.Synapse(L.Dense(3), trainable=False)
    synapse(make_stream((4,)))
    assert synapse.trainable_weights == []
    assert len(synapse.non_trainable_weights) == 2


def test_vouching_does_not_make_dropout_affine():
    with pytest.raises(ValueError, match=r"keras_dsr\.layers\.Dropout"):
        layers.Synapse(keras.layers.Dropout(0.5), affine=True)

"""Networks with time folded into the batch, and thresholds into weights, against Keras: spike by spike."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import layers

pytestmark = pytest.mark.tensorflow_only
tf = pytest.importorskip("tensorflow")
pytest.importorskip("keras_dsr.export.folding")
from keras_dsr.export.folding import FoldedNetwork  # noqa: E402
from keras_dsr.export.functions import Network  # noqa: E402

FOLD = pytest.mark.parametrize("fold", [False, True], ids=["as_it_is", "folded"])
LOOP = pytest.mark.parametrize("loop", [False, True], ids=["unrolled", "loop"])

# Affine layers, and the shape of what they take.
AFFINE = {
    "Dense": (lambda: keras.layers.Dense(5), (6,)),
    "Dense_2d": (lambda: keras.layers.Dense(5, use_bias=False), (3, 6)),
    "EinsumDense": (lambda: keras.layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"), (3, 6)),
    "Conv1D": (lambda: keras.layers.Conv1D(4, 3, strides=2), (8, 3)),
    "Conv2D": (lambda: keras.layers.Conv2D(4, 3, padding="same", dilation_rate=2), (6, 6, 2)),
    "Conv2D_groups": (lambda: keras.layers.Conv2D(4, 3, groups=2, use_bias=False), (5, 5, 2)),
    "Conv3D": (lambda: keras.layers.Conv3D(3, 2), (3, 3, 3, 2)),
    "Conv1DTranspose": (lambda: keras.layers.Conv1DTranspose(3, 2, strides=2), (4, 2)),
    "Conv2DTranspose": (lambda: keras.layers.Conv2DTranspose(3, 2, strides=2), (3, 3, 2)),
    "Conv3DTranspose": (lambda: keras.layers.Conv3DTranspose(2, 2), (2, 2, 2, 2)),
    "DepthwiseConv1D": (lambda: keras.layers.DepthwiseConv1D(3), (6, 3)),
    "DepthwiseConv2D": (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 2)),
    "SeparableConv1D": (lambda: keras.layers.SeparableConv1D(4, 3), (6, 3)),
    "SeparableConv2D": (lambda: keras.layers.SeparableConv2D(4, 3), (5, 5, 2)),
    "AveragePooling1D": (lambda: keras.layers.AveragePooling1D(2), (6, 3)),
    "AveragePooling2D": (lambda: keras.layers.AveragePooling2D(2), (6, 6, 2)),
    "AveragePooling3D": (lambda: keras.layers.AveragePooling3D(2), (4, 4, 4, 2)),
    "GlobalAveragePooling1D": (lambda: keras.layers.GlobalAveragePooling1D(), (4, 3)),
    "GlobalAveragePooling2D": (lambda: keras.layers.GlobalAveragePooling2D(), (4, 4, 2)),
    "GlobalAveragePooling3D": (lambda: keras.layers.GlobalAveragePooling3D(), (2, 2, 2, 2)),
    "ZeroPadding1D": (lambda: keras.layers.ZeroPadding1D(1), (4, 3)),
    "ZeroPadding2D": (lambda: keras.layers.ZeroPadding2D(1), (4, 4, 2)),
    "ZeroPadding3D": (lambda: keras.layers.ZeroPadding3D(1), (2, 2, 2, 2)),
    "Cropping1D": (lambda: keras.layers.Cropping1D(1), (5, 3)),
    "Cropping2D": (lambda: keras.layers.Cropping2D(1), (5, 5, 2)),
    "Cropping3D": (lambda: keras.layers.Cropping3D(1), (3, 3, 3, 2)),
    "UpSampling1D": (lambda: keras.layers.UpSampling1D(2), (4, 3)),
    "UpSampling2D": (lambda: keras.layers.UpSampling2D(2, interpolation="bilinear"), (4, 4, 2)),
    "UpSampling3D": (lambda: keras.layers.UpSampling3D(2), (2, 2, 2, 2)),
    "Flatten": (lambda: keras.layers.Flatten(), (4, 3)),
    "Reshape": (lambda: keras.layers.Reshape((2, 6)), (4, 3)),
    "Permute": (lambda: keras.layers.Permute((2, 1)), (4, 3)),
    "Identity": (lambda: keras.layers.Identity(), (4, 3)),
    "QuantizedDense": (lambda: layers.QuantizedDense(5, bits=4), (6,)),
    "QuantizedConv2D": (lambda: layers.QuantizedConv2D(4, 3, bits=8), (5, 5, 2)),
    "Sequential": (
        lambda: keras.Sequential([keras.layers.ZeroPadding2D(1), keras.layers.Conv2D(3, 3), keras.layers.Conv2D(2, 1)]),
        (4, 4, 2),
    ),
    "own": (lambda: Doubled(), (4, 3)),
}


class Doubled(keras.layers.Layer):
    """Anyone's own affine layer."""

    def call(self, x):
        return 2 * x + 0.25

    def compute_output_shape(self, input_shape):
        return input_shape


def dyadic_weights(model):
    """Weights whose sums and products are exact, but for thresholds, which are powers of two."""
    for seed, weight in enumerate(model.weights):
        if "threshold" not in weight.path and "moving" not in weight.path:
            weight.assign(helpers.dyadics(weight.shape, -1, 1, seed=seed))


def single(build, shape):
    """Neurons, an affine layer, neurons."""
    inputs = keras.Input(shape)
    x = layers.IFSpike(timesteps=3, threshold=0.5, name="first")(inputs)
    x = layers.Synapse(build(), affine=True)(x)
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.25, name="second")(x)))
    dyadic_weights(model)
    return model, helpers.dyadics((4, *shape), -1, 1)


def step_by_step(network, x):
    """The answer after the last of three steps, and the spikes of all."""
    state = {name: np.zeros((len(x), *shape), dtype) for name, (shape, dtype) in network.state.items()}
    trains = {}
    for n in range(3):
        frame = x[:, n] if network.stepper.takes_frames else x
        answer, spikes = network.step_traced({network.step_input_name: frame, **state})
        state = {name: answer[f"next_{name}"] for name in state}
        for name, value in spikes.items():
            trains.setdefault(name, []).append(helpers.numpy(value))
    answer = {name: value for name, value in answer.items() if not name.startswith("next_")}
    return answer, {name: np.stack(train, axis=1) for name, train in trains.items()}


def compare(model, x, tolerance=1e-6, steps=True, **settings):
    """Compares answers and, place by place, what spikes are worth."""
    expected, trains = Network(model, classifier=False).run_traced(tf.constant(x))
    network = FoldedNetwork(model, classifier=False, **settings)
    runs = [network.run_traced(tf.constant(x))]
    if steps and not network.loop:
        runs.append(step_by_step(network, x))
    for answer, spikes in runs:
        assert list(spikes) == list(trains) == network.neurons
        for name, train in trains.items():
            received = helpers.numpy(spikes[name])
            if network.fold_thresholds:
                assert set(np.unique(received)) <= {0, 1}
                received = received * np.float32(network.worth[name])
            np.testing.assert_array_equal(received, helpers.numpy(train), err_msg=name)
            assert received.any(), f"{name} never fires"
        assert list(answer) == list(expected)
        received, output = (helpers.numpy(each["output"]) for each in (answer, expected))
        np.testing.assert_allclose(received, output, rtol=0, atol=tolerance)


@FOLD
@pytest.mark.parametrize("name", AFFINE)
def test_affine_layers(name, fold):
    model, x = single(*AFFINE[name])
    compare(model, x, steps=name in ("Dense", "Conv2D"), fold_thresholds=fold)


def residual(second):
    """Streams with spikes of one worth, or two, that meet; then what wants them multiplied out."""
    inputs = keras.Input((4, 4, 2))
    a = layers.IFSpike(timesteps=3, threshold=0.5, name="one")(inputs)
    b = layers.IFSpike(threshold=second, name="two")(layers.Synapse(keras.layers.Conv2D(2, 3, padding="same"))(a))
    x = layers.Dropout(0.5)(layers.Add()([a, b]))
    x = layers.Synapse(keras.layers.AveragePooling2D(2))(x)
    x = layers.IFSpike(threshold=0.25, name="pooled")(x)
    x = layers.BatchNormalization(epsilon=0.0, name="bn")(x)
    x = layers.IFSpike(threshold=0.25, name="normalized")(x)
    x = layers.ToTensor()(layers.Synapse(keras.layers.Flatten())(x))
    x = keras.layers.Dense(3)(x)
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.5, name="last")(x)))
    dyadic_weights(model)
    return model, helpers.dyadics((5, 4, 4, 2), -1, 1)


@LOOP
@FOLD
@pytest.mark.parametrize("second", [0.5, 0.25])
def test_streams_that_meet(second, fold, loop):
    model, x = residual(second)
    compare(model, x, fold_thresholds=fold, loop=loop)


@LOOP
@FOLD
@pytest.mark.parametrize("neuron", ["if", "lif"])
def test_frames_and_thresholds_that_are_no_powers_of_two(neuron, fold, loop):
    kind = layers.IFSpike if neuron == "if" else layers.LIFSpike
    inputs = keras.Input((3, 6, 6, 2))
    x = layers.ToStream(coding=kind().coding)(inputs)
    for index, threshold in enumerate((0.3, 0.7), start=1):
        threshold = threshold if neuron == "if" else threshold / 20
        x = layers.Synapse(keras.layers.Conv2D(8, 3, padding="same", kernel_initializer="he_normal"))(x)
        x = kind(threshold=threshold, name=f"neuron{index}")(x)
    x = layers.Synapse(keras.layers.Dense(3))(layers.Synapse(keras.layers.GlobalAveragePooling2D())(x))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    x = np.random.default_rng(0).normal(size=(8, 3, 6, 6, 2)).astype("float32")
    compare(model, x, fold_thresholds=fold, loop=loop)


@LOOP
def test_mixed_precision(loop):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, x = residual(0.25)
    finally:
        keras.config.set_dtype_policy("float32")
    compare(model, x, fold_thresholds=True, loop=loop)


@pytest.mark.parametrize(("policy", "tolerance"), [("float32", 1e-6), ("mixed_bfloat16", 0.02)])
def test_a_readout_of_frames_step_by_step(policy, tolerance):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((3, 4))
        x = layers.LIFSpike(threshold=0.05)(keras.layers.Dense(6)(inputs))
        model = keras.Model(inputs, layers.SpikeRep("weighted_rate")(keras.layers.Dense(2)(x)))
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.random.default_rng(0).normal(size=(4, 3, 4)).astype("float32")
    compare(model, x, tolerance, fold_thresholds=True)


def test_inner_representations_are_not_computed():
    """A network costs its simulation, not a second pass on representations."""
    model, x = single(*AFFINE["Conv2D"])
    for settings in ({}, {"loop": True}, {"fold_thresholds": True}):
        network = FoldedNetwork(model, classifier=False, **settings)
        function = tf.function(network.run_traced, autograph=False).get_concrete_function(tf.constant(x))
        kinds = [operation.type for operation in function.graph.get_operations()]
        assert kinds.count("Conv2D") == 1


def test_layers_of_others_that_take_streams():
    class Halved(layers.base.StreamLayer):
        def build(self, input_shape):
            pass

        def call(self, inputs):
            values, representation = self._stream(inputs)
            return values * 0.5, representation * 0.5

    inputs = keras.Input((4,))
    x = layers.IFSpike(timesteps=3, threshold=0.5, name="first")(inputs)
    x = layers.Synapse(keras.layers.Dense(3))(Halved()(x))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.125, name="second")(x)))
    x = helpers.dyadics((6, 4), -1, 1)
    compare(model, x, steps=False, fold_thresholds=True)

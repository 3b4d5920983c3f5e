"""The paper's networks: their sizes, their representation networks, what they refuse, one step of training."""

from __future__ import annotations

import itertools
import math

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy

import keras_dsr
from keras_dsr import layers, models

KIND = pytest.mark.parametrize("kind", ["if", "lif"])

# depth: neuron layers (two a block, two or three in the head), parameters
RESNETS = {
    18: (19, 11.2e6),
    20: (21, 0.27e6),
    32: (33, 0.47e6),
    44: (45, 0.66e6),
    56: (57, 0.85e6),
    110: (111, 1.73e6),
}


def images(shape=(4, 8, 8, 1), seed=0):
    return np.random.default_rng(seed).uniform(0, 1, shape).astype("float32")


def randomise(model, seed=0):
    """Statistics and thresholds as after some training, so that no layer is silent."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.path.endswith(("moving_mean", "beta")):
            weight.assign(generator.normal(0, 0.1, weight.shape))
        elif weight.path.endswith(("moving_variance", "gamma")):
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
        elif weight.path.endswith("threshold"):
            # The clamp ends at 1 for either kind, so that neither is silent.
            weight.assign(1.0 if any(isinstance(layer, layers.IFSpike) for layer in model.layers) else 0.05)
    return model


def only_public_layers(model):
    public = {getattr(layers, name) for name in layers.__all__}
    for layer in model.layers:
        stock = type(layer).__module__.startswith("keras.src.")
        if not (stock or type(layer) in public):
            return False
    return True


# Deeper networks differ in their sizes alone, which are the same on JAX.
DEEPER = [(32, "lif"), (44, "if"), (56, "lif"), (110, "if")]


@pytest.mark.parametrize(
    ("depth", "kind"),
    [(18, "if"), (20, "if"), (20, "lif"), *(pytest.param(*each, marks=pytest.mark.tensorflow_only) for each in DEEPER)],
)
def test_preact_resnets(depth, kind):
    model = models.preact_resnet(depth, kind, timesteps=2)
    neurons, parameters = RESNETS[depth]
    found = helpers.neuron_layers(model)
    assert len(found) == neurons
    assert {type(layer) for layer in found} == {{"if": layers.IFSpike, "lif": layers.LIFSpike}[kind]}
    assert [layer.name for layer in found if layer.timesteps is not None] == ["stage1_block1_neuron1"]
    assert model.count_params() == pytest.approx(parameters, rel=0.03)
    assert model.input_shape == (None, 32, 32, 3)
    assert model.output_shape == (None, 10)
    assert only_public_layers(model)


def test_imagenet_stem():
    model = models.preact_resnet(18, timesteps=1, classes=5, input_shape=(64, 64, 3), stem="imagenet")
    assert model.output_shape == (None, 5)
    assert only_public_layers(model)
    # Stem and pooling take 64 to 16, the stages to 2.
    assert tuple(model.get_layer("stem_pool").output.shape) == (None, 16, 16, 64)
    assert tuple(model.get_layer("final_neuron").output[1].shape) == (None, 2, 2, 512)


@KIND
def test_vgg(kind):
    model = models.vgg(11, kind, input_shape=(2, 32, 32, 2), classes=7)
    assert len(helpers.neuron_layers(model)) == 9
    assert model.count_params() == pytest.approx(9.2e6, rel=0.03)
    assert model.output_shape == (None, 7)
    assert only_public_layers(model)
    assert model.get_layer("to_stream").coding == helpers.neuron_layers(model)[0].coding


@KIND
def test_small_cnn(kind):
    model = models.small_cnn((4, 8, 8), kind, timesteps=3, classes=5, input_shape=(16, 16, 2))
    assert len(helpers.neuron_layers(model)) == 4
    assert model.output_shape == (None, 5)
    assert only_public_layers(model)


def test_neurons_take_the_prototypes_arguments():
    prototype = layers.LIFSpike(threshold=0.7, alpha=0.6, tau=3.0, dt=0.25, trainable_threshold=False, loop="while")
    model = models.small_cnn((4,), prototype, timesteps=3)
    unnamed = {key: value for key, value in prototype.get_config().items() if key not in ("name", "timesteps")}
    first, *others = helpers.neuron_layers(model)
    for layer in (first, *others):
        assert unnamed.items() <= layer.get_config().items()
    assert first.timesteps == 3
    assert [layer.timesteps for layer in others] == [None]


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda rate: models.preact_resnet(20, timesteps=2, dropout=rate, input_shape=(8, 8, 3)), layers.Dropout),
        (lambda rate: models.vgg(input_shape=(2, 32, 32, 2), dropout=rate), layers.Dropout),
        (lambda rate: models.small_cnn((4,), dropout=rate), layers.Dropout),
    ],
    ids=["preact_resnet", "vgg", "small_cnn"],
)
def test_dropout(build, kind):
    assert [layer.rate for layer in build(0.25).layers if isinstance(layer, kind)] == [0.25]
    assert not any(isinstance(layer, kind) for layer in build(0.0).layers)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: models.preact_resnet(19), ValueError, r"depth is one of \[18, 20, 32, 44, 56, 110\].*depth=19"),
        (lambda: models.preact_resnet(20, "relu"), ValueError, r"neuron is one of \['if', 'lif'\].*neuron='relu'"),
        (lambda: models.preact_resnet(20, keras.layers.ReLU()), ValueError, "neuron is one of.*ReLU"),
        (lambda: models.preact_resnet(20, stem="tiny"), ValueError, "stem is 'cifar' or 'imagenet'.*stem='tiny'"),
        (lambda: models.preact_resnet(20, classes=1), ValueError, "2 or more classes.*classes=1"),
        (lambda: models.preact_resnet(20, dropout=1.0), ValueError, r"dropout is a rate in \[0, 1\).*dropout=1.0"),
        (lambda: models.preact_resnet(20, timesteps=-1), ValueError, "number of time steps N >= 1.*timesteps=-1"),
        (lambda: models.preact_resnet(20, timesteps=1.5), TypeError, "whole number of steps.*timesteps=1.5"),
        (lambda: models.preact_resnet(20, input_shape=(32, 32)), ValueError, r"input_shape is \(height, width, ch"),
        (lambda: models.vgg(12), ValueError, r"depth is one of \[5, 11\].*depth=12"),
        (
            lambda: models.vgg(input_shape=(48, 48, 2)),
            ValueError,
            r"input_shape is \(time, height, width, polarities\)",
        ),
        (lambda: models.vgg(input_shape=(4, 32, 32, 2), timesteps=3), ValueError, "timesteps=3, but its input has 4"),
        (lambda: models.vgg(neuron="LIF"), ValueError, "neuron is one of.*'LIF'"),
        (lambda: models.small_cnn(()), ValueError, "at least one convolution"),
        (lambda: models.small_cnn(timesteps=None), ValueError, "timesteps must be a number"),
        (lambda: models.small_cnn(classes=0), ValueError, "2 or more classes"),
        (lambda: models.with_timesteps(models.small_cnn((2,)), -1), ValueError, "timesteps=-1"),
        (lambda: models.with_timesteps(models.small_cnn((2,)), None), ValueError, "timesteps=None"),
        (
            lambda: models.with_timesteps(models.small_cnn((2,)), 2, 4),
            ValueError,
            "timesteps=2, representation_steps=4",
        ),
        (lambda: models.with_timesteps(models.small_cnn((2,)), 0, 0), ValueError, "representation_steps=0"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_with_timesteps_needs_a_layer_that_makes_a_stream():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match="No layer of model 'plain' makes a stream"):
        models.with_timesteps(model, 4)


@pytest.mark.parametrize(
    "build",
    [
        lambda kind: models.small_cnn((4, 4), kind, timesteps=4),
        lambda kind: models.preact_resnet(20, kind, timesteps=2, input_shape=(8, 8, 3)),
        lambda kind: models.vgg(11, kind, input_shape=(2, 32, 32, 2)),
    ],
    ids=["small_cnn", "preact_resnet", "vgg"],
)
@KIND
def test_with_timesteps_keeps_the_weights_in_their_order(build, kind):
    spiking = randomise(build(kind))
    ann = models.with_timesteps(spiking, 0)
    assert [w.path.split("/")[-2:] for w in ann.weights] == [w.path.split("/")[-2:] for w in spiking.weights]
    for one, other in zip(ann.weights, spiking.weights, strict=True):
        np.testing.assert_array_equal(numpy(one), numpy(other))
        assert one is not other


@KIND
def test_weights_go_both_ways(kind):
    """An ANN trains, its weights go to the spiking network, as `set_weights` or by another `with_timesteps`."""
    spiking = randomise(models.small_cnn((4, 4), kind, timesteps=2))
    ann = models.with_timesteps(spiking, 0)
    for weight in ann.trainable_variables:
        weight.assign(weight * 1.5)
    x = images()
    before = numpy(spiking(x))
    spiking.set_weights(ann.get_weights())
    after = numpy(spiking(x))
    assert (after != before).any()
    np.testing.assert_array_equal(numpy(models.with_timesteps(ann, 2)(x)), after)


def test_a_quantized_representation_network_is_the_spiking_one_up_to_the_first_uneven_spikes():
    spiking = models.small_cnn((4,), layers.IFSpike(threshold=0.5), timesteps=4, input_shape=(8, 8, 1))
    quantized = models.with_timesteps(spiking, 0, representation_steps=4)
    x = np.random.default_rng(0).normal(0, 2, (3, 8, 8, 1)).astype("float32")
    first = [keras.Model(m.input, m.get_layer("neuron1").output[1])(x) for m in (spiking, quantized)]
    np.testing.assert_allclose(numpy(first[1]), numpy(first[0]), atol=1e-6)  # its current is constant
    assert not np.allclose(numpy(quantized(x)), numpy(models.with_timesteps(spiking, 0)(x)))
    again = models.with_timesteps(quantized, 4)
    np.testing.assert_array_equal(numpy(again(x)), numpy(spiking(x)))
    assert again.get_layer("neuron1").representation_steps is None


def test_with_timesteps_keeps_the_paths_of_the_weights():
    spiking = models.small_cnn((4, 4), timesteps=4)
    ann = models.with_timesteps(spiking, 0)
    assert [w.path for w in ann.weights] == [w.path for w in spiking.weights]


@KIND
def test_no_time_steps_are_an_ann_of_clamps(kind):
    """small_cnn by stock layers alone; tau is 1 and V_th / dt is 1."""
    model = randomise(models.with_timesteps(models.small_cnn((4, 6), kind, timesteps=4, classes=3), 0))

    def clamp(x):
        return keras.ops.clip(x, 0.0, 1.0)

    x = inputs = keras.Input((8, 8, 1))
    for index in (1, 2):
        if index == 2:
            x = keras.layers.AveragePooling2D(2)(x)
        x = keras.layers.Conv2D(4 if index == 1 else 6, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        x = keras.layers.Lambda(clamp)(x)
    x = keras.layers.Dense(3)(keras.layers.Flatten()(x))
    x = keras.layers.Lambda(clamp)(keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x))
    stock = keras.Model(inputs, x)
    stock.set_weights([numpy(w) for w in model.weights if not w.path.endswith("threshold")])
    for training in (False, True):
        received, expected = model(images(), training=training), stock(images(), training=training)
        np.testing.assert_allclose(numpy(received), numpy(expected), rtol=1e-4, atol=1e-5)


def test_more_steps_come_closer_to_the_representation_network():
    spiking = randomise(models.small_cnn((8,), layers.IFSpike(threshold=1.0, loop="while"), timesteps=4))
    x = images((16, 8, 8, 1))
    ann = numpy(models.with_timesteps(spiking, 0)(x))
    assert ann.std() > 0.1
    errors = [np.abs(numpy(models.with_timesteps(spiking, n)(x)) - ann).mean() for n in (2, 8, 32, 128)]
    assert all(fine < coarse for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.1 * errors[0]


def fit(model, x, classes):
    before = [numpy(v).copy() for v in model.trainable_variables]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss, jit_compile=False if helpers.BACKEND == "tensorflow" else "auto")
    history = model.fit(x, np.arange(len(x)) % classes, batch_size=len(x), verbose=0)
    assert math.isfinite(history.history["loss"][0])
    changed = {v.path for v, old in zip(model.trainable_variables, before, strict=True) if (numpy(v) != old).any()}
    return {v.path for v in model.trainable_variables if v.path.endswith("kernel")} <= changed


def test_fit_step_of_preact_resnet():
    model = models.preact_resnet(20, layers.IFSpike(threshold=1.0), timesteps=2, input_shape=(16, 16, 3))
    assert fit(model, images((4, 16, 16, 3)), 10)


def test_fit_step_of_vgg():
    model = models.vgg(11, layers.IFSpike(threshold=1.0), input_shape=(2, 32, 32, 2))
    assert fit(model, images((2, 2, 32, 32, 2)), 10)


def test_fit_step_of_a_representation_network():
    model = models.preact_resnet(20, layers.LIFSpike(), timesteps=0, input_shape=(16, 16, 3))
    assert fit(model, images((4, 16, 16, 3)), 10)


@KIND
def test_keras_file_round_trip(kind, tmp_path):
    model = randomise(models.preact_resnet(20, kind, timesteps=2, input_shape=(8, 8, 3), dropout=0.25))
    x = images((2, 8, 8, 3))
    loaded = helpers.saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert keras_dsr.models.with_timesteps(loaded, 0).count_params() == model.count_params()


def test_the_number_of_time_steps_is_the_networks():
    with pytest.raises(ValueError, match="Received a neuron with timesteps=4"):
        models.small_cnn(neuron=layers.IFSpike(timesteps=4), timesteps=2)


def test_without_a_number_of_steps_a_residual_network_has_the_papers():
    assert models.preact_resnet(20, input_shape=(8, 8, 3)).get_layer("stage1_block1_neuron1").timesteps == 20


@pytest.mark.skipif(helpers.BACKEND != "jax", reason="reads programs of JAX")
@pytest.mark.parametrize("neuron", ["if", "lif"])
def test_nothing_that_a_backward_pass_keeps_or_computes_has_a_time_axis(neuron):
    """Of a residual network. Its forward pass has many such arrays, and so has the backward pass of a plain tensor."""
    import jax

    steps = 7  # no other axis has this length, nor twice that, which is batch x time

    def outputs(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.shape for variable in equation.outvars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda each: hasattr(each, "jaxpr")):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from outputs(getattr(inner, "jaxpr", inner))

    def timed(shapes):
        return [shape for shape in shapes if {steps, 2 * steps} & set(shape)]

    def programs(loss, *arguments):
        forward = jax.make_jaxpr(loss)(*arguments)
        backward = jax.make_jaxpr(jax.vjp(loss, *arguments)[1])(np.float32(1))
        return timed(outputs(forward.jaxpr)), timed(
            [*outputs(backward.jaxpr), *(kept.shape for kept in backward.consts)]
        )

    model = models.preact_resnet(20, neuron, timesteps=steps, classes=3, input_shape=(8, 8, 3))
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    others = [variable.value for variable in model.non_trainable_variables]

    def loss(weights):
        return model.stateless_call(weights, others, x, training=True)[0].sum()

    forward, backward = programs(loss, [variable.value for variable in model.trainable_variables])
    assert len(forward) > 20
    assert backward == []

    layer = layers.IFSpike() if neuron == "if" else layers.LIFSpike()
    layer.build((2, steps, 3))
    forward, backward = programs(lambda x: layer(x).sum(), np.ones((2, steps, 3), "float32"))
    assert forward
    assert backward

"""N single steps give what one run of the whole gives."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import BACKEND, compiled, dyadics, numpy
from keras import ops

from keras_dsr import backend, layers, models
from keras_dsr.coding import WeightedRateCoding
from keras_dsr.stepping import Stepper, StepResult
from keras_dsr.stream import Stream


def run(stepper, x, steps, state=None):
    """The result of the last of `steps` steps, and the spikes of all."""

    def step(inputs, state):
        result = stepper(inputs, state)
        return result.output, result.spikes, result.state

    step = compiled(step, BACKEND == "jax")  # which takes minutes operation by operation
    state = stepper.initial_state(len(x)) if state is None else state
    spikes = []
    for n in range(steps):
        output, trains, state = step(x[:, n] if stepper.takes_frames else x, state)
        spikes.append({name: numpy(trains[name]) for name in stepper_names(stepper)})
    return StepResult(output, trains, state), {n: np.stack([each[n] for each in spikes], axis=1) for n in spikes[0]}


def answer(model, x):
    """What the whole model gives."""
    return numpy(compiled(lambda x: model(x, training=False), BACKEND == "jax")(x))


def stepper_names(stepper):
    """Names of the neuron layers, in order: what a compiled step gives is in another."""
    return [name.removeprefix("potential_") for name in stepper.state if name.startswith("potential_")]


def residual(neuron) -> keras.Model:
    """Frames, a residual connection, dropout, a dense layer after the last neuron."""
    inputs = keras.Input((None, 6, 6, 2), name="frames")
    x = layers.ToStream(coding=neuron().coding)(inputs)
    x = layers.Synapse(keras.layers.Conv2D(4, 3, padding="same"))(x)
    first = x = neuron(name="n1")(layers.BatchNormalization()(x))
    x = layers.Synapse(keras.layers.Conv2D(4, 3, padding="same"))(x)
    x = layers.Dropout(0.5)(layers.Add()([x, first]))
    x = neuron(name="n2")(x)
    x = layers.Synapse(keras.layers.Flatten())(layers.Synapse(keras.layers.AveragePooling2D(2))(x))
    x = layers.Synapse(keras.layers.Dense(3))(x)
    return keras.Model(inputs, layers.SpikeRep()(x))


def plain() -> keras.Model:
    """Neurons on plain tensors, with another's layer between, and a readout of a plain tensor."""
    inputs = keras.Input((5, 6, 6, 2), name="frames")
    x = keras.layers.TimeDistributed(keras.layers.Conv2D(4, 3))(inputs)
    x = layers.IFSpike(threshold=0.5, name="n1")(x)
    x = keras.layers.TimeDistributed(keras.layers.Flatten())(x)
    x = keras.layers.Dense(3)(keras.layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.5, name="n2")(x)))


def nested() -> keras.Model:
    """A sub-model of streams between."""
    part_in = keras.Input((8, 8, 4))
    values = keras.Input((4, 8, 8, 4))
    x = layers.IFSpike(threshold=0.5, name="neuron")(Stream(values, part_in))
    part = keras.Model([values, part_in], tuple(x), name="part")
    image = keras.Input((8, 8, 1), name="image")
    x = layers.IFSpike(threshold=0.5, timesteps=4, name="neuron")(keras.layers.Conv2D(4, 3, padding="same")(image))
    x = Stream(*part(list(layers.Synapse(keras.layers.Conv2D(4, 3, padding="same"))(x))))
    x = layers.Synapse(keras.layers.Dense(3))(layers.Synapse(keras.layers.Flatten())(x))
    return keras.Model(image, layers.SpikeRep()(layers.IFSpike(threshold=0.5, name="head")(x)))


def lif(**kwargs):
    return layers.LIFSpike(threshold=0.05, tau=1.0, dt=0.1, **kwargs)


def integrate(**kwargs):
    return layers.IFSpike(threshold=0.5, **kwargs)


MODELS = {
    "static IF": (lambda: models.small_cnn((4, 6), integrate(), timesteps=5), (8, 8, 1)),
    "static LIF": (lambda: models.small_cnn((4, 6), lif(), timesteps=5), (8, 8, 1)),
    "unrolled": (lambda: models.small_cnn((4,), lif(loop="unrolled"), timesteps=3), (8, 8, 1)),
    "quantized": (lambda: models.small_cnn((4,), integrate(), timesteps=3, weight_bits=4), (8, 8, 1)),
    "vgg": (lambda: models.vgg(5, layers.IFSpike(threshold=0.02), input_shape=(5, 16, 16, 2)), (5, 16, 16, 2)),
    "residual IF": (lambda: residual(integrate), (5, 6, 6, 2)),
    "residual LIF": (lambda: residual(lif), (5, 6, 6, 2)),
    "preact_resnet": (lambda: models.preact_resnet(20, integrate(), timesteps=2, input_shape=(8, 8, 3)), (8, 8, 3)),
    "plain tensors": (plain, (5, 6, 6, 2)),
    "nested": (nested, (8, 8, 1)),
}


# What takes long to compile on JAX, and has no code there that the others do without.
ONE_BACKEND = {"unrolled", "quantized", "vgg", "preact_resnet"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.tensorflow_only if name in ONE_BACKEND else ()) for name in MODELS],
)
def test_steps_give_what_the_whole_gives(name):
    build, shape = MODELS[name]
    model = build()
    x = np.random.default_rng(0).normal(1, 2, (3, *shape)).astype("float32")
    stepper = Stepper(model)
    steps = stepper.timesteps or x.shape[1]
    result, spikes = run(stepper, x, steps)
    whole = answer(model, x)
    assert np.abs(whole).max() > 0, "something is put out"
    assert all(train.any() for train in spikes.values())
    assert np.abs(numpy(result.output) - whole).max() <= 1e-5


def test_steps_are_exact_where_numbers_are():
    neuron = layers.IFSpike(threshold=1.0)
    model = models.small_cnn((4, 4), neuron, timesteps=4)
    model.set_weights([dyadics(w.shape, -1, 1) if len(w.shape) > 1 else w for w in model.get_weights()])
    x = dyadics((2, 8, 8, 1), -2, 2)
    probe = keras.Model(model.input, [layer.output[0] for layer in model.layers if isinstance(layer, layers.IFSpike)])
    result, spikes = run(Stepper(model), x, 4)
    assert np.array_equal(numpy(result.output), answer(model, x))
    for stepped, whole in zip(spikes.values(), probe(x), strict=True):
        assert np.array_equal(stepped, numpy(whole))


def test_what_comes_out_after_n_steps_is_what_a_model_of_n_steps_puts_out():
    model = models.small_cnn((4,), integrate(), timesteps=6)
    x = np.random.default_rng(0).normal(1, 2, (3, 8, 8, 1)).astype("float32")
    result, _ = run(Stepper(model), x, 2)
    assert np.allclose(numpy(result.output), answer(models.with_timesteps(model, 2), x), atol=1e-6)


def test_samples_of_a_batch_may_be_at_different_steps():
    stepper = Stepper(residual(lif))
    x = np.random.default_rng(0).normal(1, 2, (2, 5, 6, 6, 2)).astype("float32")
    alone = [run(stepper, x[n : n + 1], 4 - n)[0] for n in range(2)]
    ahead, _ = run(stepper, x[:1, :1], 1)
    state = {
        name: ops.concatenate([ahead.state[name], fresh], axis=0) for name, fresh in stepper.initial_state(1).items()
    }
    for n in range(3):
        result = stepper(np.stack([x[0, n + 1], x[1, n]]), state)
        state = result.state
    for n in range(2):
        assert np.allclose(numpy(result.output)[n : n + 1], numpy(alone[n].output), atol=1e-6)


def test_only_what_the_readout_asks_for_is_kept_beside_potentials():
    stepper = Stepper(models.small_cnn((4, 6), timesteps=3))
    assert list(stepper.state) == [
        "potential_neuron1",
        "potential_neuron2",
        "potential_head_neuron",
        "count_head_neuron",
        "weight_head_neuron",
    ]
    assert stepper.state["potential_neuron1"] == ((8, 8, 4), "float32")
    assert stepper.state["weight_head_neuron"] == ((1,), "float32")


def test_readout_of_the_input_itself():
    inputs = keras.Input((4, 3))
    stream = layers.ToStream(WeightedRateCoding(1.0, 0.2))(inputs)
    spikes = layers.LIFSpike(threshold=0.1, dt=0.2, name="n")(stream)
    model = keras.Model(inputs, layers.SpikeRep()(layers.Add()([stream, spikes])))
    x = np.random.default_rng(0).normal(0, 1, (2, 4, 3)).astype("float32")
    result, _ = run(Stepper(model), x, 4)
    assert np.allclose(numpy(result.output), numpy(model(x)), atol=1e-6)


def test_half_precision_keeps_wide_potentials():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.small_cnn((4,), integrate(), timesteps=3)
    finally:
        keras.config.set_dtype_policy("float32")
    stepper = Stepper(model)
    assert stepper.state["potential_neuron1"][1] == "float32"
    x = dyadics((2, 8, 8, 1), -2, 2)
    result, _ = run(stepper, x, 3)
    assert np.allclose(numpy(ops.cast(result.output, "float32")), numpy(ops.cast(model(x), "float32")), atol=0.02)


def test_frames_of_neurons_that_insist_on_a_number_of_them():
    inputs = keras.Input((3, 4))
    x = layers.IFSpike(threshold=0.5, timesteps=3, name="n")(layers.ToStream()(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Dense(2))(x)))
    stepper = Stepper(model)
    assert (stepper.takes_frames, stepper.timesteps, stepper.input_shape) == (True, 3, (4,))
    x = np.random.default_rng(0).normal(1, 2, (2, 3, 4)).astype("float32")
    assert np.allclose(numpy(run(stepper, x, 3)[0].output), answer(model, x), atol=1e-6)


def test_a_source_may_know_the_number_of_frames():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike()(layers.ToStream(timesteps=3)(inputs))))
    stepper = Stepper(model)
    assert (stepper.takes_frames, stepper.timesteps) == (True, 3)


def test_half_precision_counts_beyond_what_it_can_count():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((None, 1))
        model = keras.Model(inputs, layers.SpikeRep(name="readout")(layers.IFSpike(threshold=1.0)(inputs)))
    finally:
        keras.config.set_dtype_policy("float32")
    stepper = Stepper(model)
    assert stepper.state["count_readout"] == ((1,), "float32")
    # As after 240 steps with a spike each; bfloat16 stops at 256.
    state = {
        name: ops.zeros_like(part) if name.startswith("potential_") else ops.full_like(part, 240)
        for name, part in stepper.initial_state(1).items()
    }
    result, _ = run(stepper, np.zeros((1, 60, 1), "float32"), 60, state)
    assert numpy(ops.cast(result.output, "float32")) == pytest.approx(0.8, abs=0.01)


def twice(what: str) -> keras.Model:
    """Something that has a state, in two places."""
    image = keras.Input((4,))
    stream = layers.IFSpike(threshold=0.5, timesteps=2, name="first")(image)
    if what == "layer":
        neuron = layers.IFSpike(threshold=0.5, name="shared")
        stream = neuron(layers.Synapse(keras.layers.Dense(4))(neuron(stream)))
    else:
        values, representation = keras.Input((2, 4)), keras.Input((4,))
        inner = layers.IFSpike(threshold=0.5, name="x")(Stream(values, representation))
        part = keras.Model([values, representation], tuple(inner), name="part")
        stream = Stream(*part(list(stream)))
        again = part if what == "sub-model" else layers.IFSpike(threshold=0.5, name="part_x")
        stream = again(list(stream)) if again is part else again(stream)
    return keras.Model(image, layers.SpikeRep()(Stream(*stream)))


@pytest.mark.parametrize("what", ["layer", "sub-model", "name"])
def test_a_state_is_for_one_place(what):
    with pytest.raises(ValueError, match=r"'potential_(shared|part_x)' comes twice.*Use a layer of its own"):
        Stepper(twice(what))


def test_specs_are_known_without_computing():
    def function(x):
        with pytest.raises((NotImplementedError, TypeError)):
            np.asarray(x)
        return [x[:, 0], ops.cast(ops.sum(x), "bfloat16")]

    assert backend.specs(function, (1, 2, 3), "float32") == [((1, 3), "float32"), ((), "bfloat16")]


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_steps_of_the_backend_are_its_simulation(decay):
    current = np.random.default_rng(0).normal(0.3, 1, (2, 6, 4)).astype("float32")
    threshold = ops.convert_to_tensor(np.float32(0.7))
    settings = {"alpha": 0.5, "decay": decay, "scale": 2.0}
    values, coded = backend.simulate(
        ops.convert_to_tensor(current), threshold, timesteps=None, loop="while", **settings
    )
    potential, count, weight = ops.zeros((2, 4)), ops.zeros((2, 4)), ops.zeros((2, 1))
    for n in range(6):
        output, representation, potential, count, weight = backend.step(
            ops.convert_to_tensor(current[:, n]), potential, count, weight, threshold, **settings
        )
        assert np.array_equal(numpy(output), numpy(values)[:, n])
    assert np.allclose(numpy(representation), numpy(coded), rtol=1e-6)


def test_bad_input():
    small = models.small_cnn((4,), timesteps=3)
    stepper = Stepper(small)
    with pytest.raises(ValueError, match=r"has the parts \['count_head_neuron'.*Received \['potential'\]"):
        stepper(np.zeros((1, 8, 8, 1)), {"potential": 0})
    with pytest.raises(ValueError, match=r"representation network \(timesteps=0\).*with_timesteps"):
        Stepper(models.with_timesteps(small, 0))
    with pytest.raises(ValueError, match="no spiking layers"):
        Stepper(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match=r"'sequential.*' is not a functional model"):
        Stepper(keras.Sequential([keras.layers.Dense(2)]))
    two = keras.Model(small.input, [small.output, small.output])
    with pytest.raises(ValueError, match="1 inputs and 2 outputs"):
        Stepper(two)
    inputs = keras.Input((5, None, None, 2))
    x = layers.Synapse(keras.layers.GlobalAveragePooling2D())(layers.IFSpike()(layers.ToStream()(inputs)))
    any_size = keras.Model(inputs, layers.SpikeRep()(x))
    with pytest.raises(ValueError, match=r"must have too.*\(None, 5, None, None, 2\)"):
        Stepper(any_size)


@keras.saving.register_keras_serializable(package="tests")
class HalvesStreams(keras.layers.Layer):
    """A layer of another's that takes and gives streams."""

    def call(self, inputs):
        values, representation = inputs
        return values * 0.5, representation * 0.5


def test_a_layer_of_anothers_that_takes_streams_is_named():
    image = keras.Input((8,))
    stream = layers.IFSpike(threshold=0.5, timesteps=3)(image)
    model = keras.Model(image, layers.SpikeRep()(HalvesStreams(name="mine")(list(stream))))
    with pytest.raises(ValueError, match="HalvesStreams 'mine' takes streams"):
        Stepper(model)

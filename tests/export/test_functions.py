"""A model as functions of named tensors."""

from __future__ import annotations

import dataclasses
import json

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import layers, models

pytestmark = pytest.mark.tensorflow_only
functions = pytest.importorskip("keras_dsr.export.functions")

NAMES = ["small_if", "small_lif", "vgg5", "frames", "own_layers", "nested"]


def arrays(tensors):
    return {name: np.asarray(value) for name, value in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_run_is_the_model(name, build):
    model, settings, x = build(name)
    network = functions.Network(model, **settings)
    answer = arrays(network.run(x))
    assert tuple(answer) == network.outputs
    prepared = (x.astype("float32") - 33) / 70 if x.dtype == "uint8" else x
    expected = helpers.numpy(model(prepared, training=False))
    np.testing.assert_allclose(answer[network.outputs[0]], expected, atol=1e-6)
    if network.classifier:
        np.testing.assert_array_equal(answer["class"], expected.argmax(1))
        np.testing.assert_allclose(answer["probabilities"].sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_trace_counts_the_spikes_and_leaves_the_answer_as_it_is(name, build):
    model, settings, x = build(name)
    network = functions.Network(model, **settings)
    answer, spikes = network.run_traced(x)
    traced = arrays(network.trace(x))
    first = network.outputs[0]
    np.testing.assert_array_equal(answer[first], network.run(x)[first])
    np.testing.assert_array_equal(traced[first], answer[first])
    assert list(spikes) == network.neurons
    assert set(traced) == {first} | {f"{layer}_{what}" for layer in network.neurons for what in ("spikes", "rate")}
    for layer, values in arrays(spikes).items():
        neuron = network.neuron_layers[layer]
        worth = helpers.numpy(neuron.threshold) * np.float32(neuron.scale)
        assert set(np.unique(values)) <= {np.float32(0), worth}
        fired = (values != 0).reshape(*values.shape[:2], -1)
        np.testing.assert_array_equal(traced[f"{layer}_spikes"], fired.sum(2))
        np.testing.assert_allclose(traced[f"{layer}_rate"], fired.mean((1, 2)), rtol=1e-6)
    assert any(traced[f"{layer}_spikes"].any() for layer in network.neurons)


@pytest.mark.parametrize("name", NAMES)
def test_steps_give_the_whole(name, build):
    model, settings, x = build(name)
    network = functions.Network(model, **settings)
    answer, spikes = network.run_traced(x)
    timesteps = next(iter(spikes.values())).shape[1]
    state = network.initial_state(np.zeros(len(x), "int64"))
    for n in range(timesteps):
        inputs = x[:, n] if network.stepper.takes_frames else x
        outputs, fired = network.step_traced({network.step_input_name: inputs, **state})
        for layer, values in fired.items():
            np.testing.assert_array_equal(values, spikes[layer][:, n], err_msg=f"{layer}, step {n + 1}")
        state = {part: outputs[f"next_{part}"] for part in network.state}
    for part in network.outputs:
        np.testing.assert_allclose(outputs[part], answer[part], atol=1e-6)


def test_signatures_have_names(build):
    model, settings, _ = build("frames")
    network = functions.Network(model, **settings)
    made = network.signatures()
    assert tuple(made) == functions.SIGNATURES
    assert set(made["serving_default"].structured_input_signature[1]) == {"frames"}
    assert set(made["step"].structured_input_signature[1]) == {"frame", *network.state}
    assert set(made["step"].structured_outputs) == {*network.outputs, *(f"next_{part}" for part in network.state)}
    assert set(made["initial_state"].structured_outputs) == set(network.state)
    assert network.step_specs(2)["frame"].shape == (2, 4, 4, 2)
    assert network.input_spec(2).shape == (2, 3, 4, 4, 2)
    with pytest.raises(ValueError, match=r"A signature is one of .*Received 'other'"):
        network.signatures(["other"])


def test_names_are_identifiers(build):
    network = functions.Network(build("nested")[0], classifier=False)
    assert network.neurons == ["inner_part_first_one", "second"]
    assert all(name.isidentifier() for name in (*network.neurons, *network.state, network.input_name))


@pytest.mark.parametrize(
    ("shape", "name"), [((4, 4, 1), "image"), ((6,), "input"), ((3, 6), "frames"), ((3, 4, 4, 1), "frames")]
)
def test_an_input_without_a_name_is_named_by_what_it_is(shape, name, tmp_path):
    inputs = keras.Input(shape)
    if name == "frames":
        x = layers.IFSpike(timesteps=3)(layers.ToStream()(inputs))  # insists on the steps that there are
    else:
        x = layers.IFSpike(timesteps=3)(inputs)
    model = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Flatten())(x)))
    for each in (model, helpers.saved_and_loaded(model, tmp_path), keras.models.clone_model(model)):
        network = functions.Network(each, classifier=False)
        assert network.input_name == name
        assert network.step_input_name == ("frame" if network.takes_frames else name)
        assert network.takes_frames == (name == "frames")


def test_augmentation_is_for_training():
    inputs = keras.Input((6, 6, 1), name="image")
    x = keras.layers.RandomTranslation(0.5, 0.5)(inputs)
    x = layers.IFSpike(timesteps=3, threshold=0.5)(keras.layers.Flatten()(x))
    network = functions.Network(keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Dense(3))(x))))
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 1)).astype("float32")
    expected = network.run(x)["logits"]
    np.testing.assert_array_equal(network.run_traced(x)[0]["logits"], expected)
    state = network.initial_state(np.zeros(4, "int64"))
    for _ in range(3):
        outputs = network.step({"image": x, **state})
        state = {part: outputs[f"next_{part}"] for part in network.state}
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-6)


def test_any_number_of_frames():
    inputs = keras.Input((None, 6), name="frames")
    x = layers.IFSpike(threshold=0.5)(layers.Synapse(keras.layers.Dense(4))(layers.ToStream()(inputs)))
    network = functions.Network(keras.Model(inputs, layers.SpikeRep()(x)))
    assert network.input_spec().shape.as_list() == [None, None, 6]
    assert network.input_spec(1, 9).shape == (1, 9, 6)
    run = network.signatures(["serving_default"])["serving_default"]
    x = np.random.default_rng(0).normal(size=(2, 9, 6)).astype("float32")
    np.testing.assert_allclose(run(frames=x)["logits"], network.run(x)["logits"], atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_answers_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = models.small_cnn(widths=(4,), neuron=layers.IFSpike(threshold=1.0), timesteps=2)
    finally:
        keras.config.set_dtype_policy("float32")
    network = functions.Network(model)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    answer = network.run(x)
    assert answer["logits"].dtype == "float32"
    state = network.initial_state(np.zeros(2, "int64"))
    for _ in range(2):
        outputs = network.step({"image": x, **state})
        state = {part: outputs[f"next_{part}"] for part in network.state}
    np.testing.assert_allclose(outputs["logits"], answer["logits"], atol=0.05)


class Mine(keras.Model):
    """A model that has no graph."""

    def call(self, inputs):
        return inputs


def test_what_cannot_be_exported_is_refused(monkeypatch, build):
    model = build("small_if")[0]
    with pytest.raises(ValueError, match="no spiking layers"):
        functions.Network(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    with pytest.raises(ValueError, match=r"'mine' is not a functional model.*keras\.Model\(inputs, outputs\)"):
        functions.Network(Mine(name="mine"))
    one, two = keras.Input((3,)), keras.Input((3,))
    with pytest.raises(ValueError, match="with 2 inputs and 1 outputs"):
        functions.Network(keras.Model([one, two], keras.layers.Add()([one, two])))
    spikes = layers.ToTensor()(layers.IFSpike(timesteps=3)(keras.layers.Dense(4)(one)))
    with pytest.raises(ValueError, match=r"puts out \(None, 3, 4\); pass classifier=False"):
        functions.Network(keras.Model(one, spikes))
    with pytest.raises(ValueError, match=r"numbers for 3 channels, and model 'small_cnn' takes 1"):
        functions.Network(model, functions.Preprocessing((1.0,) * 3, (1.0,) * 3))
    x = layers.IFSpike(timesteps=2, name="a-b")(keras.layers.Dense(4)(one))
    twice = keras.Model(one, layers.SpikeRep()(layers.IFSpike(name="a_b")(x)))
    with pytest.raises(ValueError, match=r"Twice there: \['a_b'\]"):
        functions.Network(twice)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"needs Keras on TensorFlow. It runs on 'jax'"):
        functions.Network(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": (1.0,), "std": (1.0, 2.0)}, "one mean and one std"),
        ({"mean": (), "std": ()}, "one mean and one std"),
        ({"mean": (1.0,), "std": (0.0,)}, "std is above 0"),
        ({"mean": (float("nan"),), "std": (1.0,)}, "are finite"),
        ({"mean": (1.0,), "std": (1.0,), "dtype": "unit8"}, "whole numbers or floats.*Received dtype='unit8'"),
        ({"mean": (1.0,), "std": (1.0,), "dtype": "string"}, "Received dtype='string'"),
    ],
)
def test_preprocessing_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        functions.Preprocessing(**settings)


@pytest.mark.parametrize(
    "numbers", [np.array([0.25, 0.5], "float32"), [np.float32(0.25), 0.5], np.array([[[0.25, 0.5]]]), (0.25, 0.5)]
)
def test_preprocessing_takes_any_numbers(numbers):
    made = functions.Preprocessing(numbers, numbers, np.uint8)
    assert made == functions.Preprocessing((0.25, 0.5), (0.25, 0.5))
    assert json.dumps(dataclasses.asdict(made)) == '{"mean": [0.25, 0.5], "std": [0.25, 0.5], "dtype": "uint8"}'
    assert functions.Preprocessing(np.float32(0.5), 2).mean == (0.5,)

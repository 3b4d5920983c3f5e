"""Trained weights: what is packed is what is loaded, and what comes with the package does what its card says."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import keras
import numpy as np
import pytest
from helpers import numpy

from keras_dsr import data, layers, models, recipes
from keras_dsr.models import presets
from keras_dsr.recipes import Recipe

SHAPE = (3, 8, 8, 2)
NEURON = {"threshold": 1.5, "alpha": 0.25, "threshold_l2": 0.0}


def trained() -> keras.Model:
    """A network whose weights are none that it would start with."""
    model = models.vgg(5, layers.IFSpike(**NEURON), classes=4, input_shape=SHAPE)
    generator = np.random.default_rng(1)
    model.set_weights([np.abs(generator.normal(size=w.shape)).astype("float32") + 0.1 for w in model.get_weights()])
    return model


def about(**changes) -> presets.Card:
    card = presets.Card(
        network="vgg5",
        version=3,
        neuron="if",
        neuron_settings=NEURON,
        timesteps=3,
        classes=("a", "b", "c", "d"),
        input_shape=SHAPE,
        mean=(0.0, 0.0),
        std=(1.0, 1.0),
        data="frames",
        test_accuracy=0.75,
        test_examples=8,
        validation_accuracy=None,
        firing_rates={"head_neuron": 0.25},
        recipe={"name": "own"},
        environment={},
    )
    return dataclasses.replace(card, **changes)


@pytest.fixture
def packed(tmp_path):
    """The model that was packed, and the path of its card."""
    model = trained()
    path = tmp_path / "own.json"
    presets.pack(model, about(), "epoch,loss\n1,2.0\n", path)
    return model, path


def test_what_is_packed_is_what_is_loaded(packed):
    model, path = packed
    loaded = models.vgg(5, classes=4, input_shape=SHAPE, weights=path)
    for received, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(received, expected)
    assert loaded.get_layer("head_neuron").alpha == 0.25
    x = np.random.default_rng(0).random((2, *SHAPE), dtype="float32")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


def test_a_preset_is_three_files_and_its_card_has_the_hash(packed):
    _, path = packed
    assert sorted(file.name for file in path.parent.iterdir()) == ["own.csv", "own.json", "own.npz"]
    card = json.loads(path.read_text())
    assert card["sha256"] == hashlib.sha256(path.with_suffix(".npz").read_bytes()).hexdigest()
    assert card["version"] == 3
    assert path.with_suffix(".csv").read_text().startswith("epoch")


def test_a_neuron_of_ones_own_replaces_the_cards(packed):
    _, path = packed
    model = models.vgg(5, layers.IFSpike(alpha=1.0), classes=4, input_shape=SHAPE, weights=path)
    assert model.get_layer("head_neuron").alpha == 1.0


def test_a_residual_network_runs_with_the_steps_it_was_trained_with_unless_told_otherwise(tmp_path):
    model = models.preact_resnet(20, timesteps=2, input_shape=(8, 8, 3))
    path = tmp_path / "own.json"
    card = about(network="preact_resnet20", timesteps=2, classes=tuple("abcdefghij"), neuron_settings={})
    presets.pack(model, card, "", path)

    def steps(**arguments):
        loaded = models.preact_resnet(20, input_shape=(8, 8, 3), weights=path, **arguments)
        return loaded.get_layer("stage1_block1_neuron1").timesteps

    assert (steps(), steps(timesteps=5), steps(timesteps=0)) == (2, 5, 0)


def test_weights_of_few_bits_come_with_their_bits(tmp_path):
    model = models.vgg(5, layers.IFSpike(**NEURON), classes=4, input_shape=SHAPE, weight_bits=4)
    path = tmp_path / "own.json"
    presets.pack(model, about(weight_bits=4), "", path)
    loaded = models.vgg(5, classes=4, input_shape=SHAPE, weights=path)
    assert loaded.get_layer("head_dense_synapse").layer.bits == 4
    x = np.random.default_rng(0).random((2, *SHAPE), dtype="float32")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


def test_another_stem_is_refused(tmp_path):
    model = models.preact_resnet(20, timesteps=2, input_shape=(32, 32, 3), stem="imagenet")
    path = tmp_path / "own.json"
    card = about(network="preact_resnet20", classes=tuple("abcdefghij"), neuron_settings={}, stem="imagenet")
    presets.pack(model, card, "", path)
    assert card.builder.endswith("stem='imagenet'")
    models.preact_resnet(20, weights=path, stem="imagenet")
    with pytest.raises(ValueError, match="own was trained with stem='imagenet'"):
        models.preact_resnet(20, weights=path)


def damage(path):
    file = path.with_suffix(".npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "arguments", "error", "message"),
    [
        (damage, {}, ValueError, r"own\.npz is damaged.*Expected sha256"),
        (lambda path: path.with_suffix(".npz").unlink(), {}, FileNotFoundError, r"no file .*own\.npz"),
        (None, {"classes": 5}, ValueError, "own has 4 classes. Received classes=5"),
        (None, {"neuron": "lif"}, ValueError, "own was trained with 'if' neurons. Received neuron='lif'"),
        (None, {"depth": 11, "input_shape": (3, 32, 32, 2)}, ValueError, "weights for vgg5. Received a network vgg11"),
        (None, {"input_shape": (3, 16, 16, 2)}, ValueError, "weights of other shapes"),
        (None, {"weight_bits": 4}, ValueError, "own was trained with weight_bits=None. Received weight_bits=4"),
        (lambda path: path.write_text("{"), {}, ValueError, r"own\.json is not the card of a preset, or is damaged"),
        (lambda path: path.write_text('{"network": "vgg5"}'), {}, ValueError, r"own\.json is not the card"),
    ],
)
def test_weights_that_do_not_fit_are_refused(packed, spoil, arguments, error, message):
    _, path = packed
    if spoil:
        spoil(path)
    with pytest.raises(error, match=message):
        models.vgg(**{"depth": 5, "classes": 4, "input_shape": SHAPE, "weights": path, **arguments})


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("mnist", ValueError, "no weights 'mnist' for vgg5.*NETWORK-DATA"),
        ("none/such.json", FileNotFoundError, "no card at none/such.json"),
    ],
)
def test_presets_that_are_not_there_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        models.vgg(5, weights=weights)


def test_a_card_is_a_json_file(tmp_path):
    with pytest.raises(ValueError, match=r"A card is a \.json file. Received .*own\.txt"):
        presets.pack(trained(), about(), "", tmp_path / "own.txt")
    assert list(tmp_path.iterdir()) == []


def test_these_presets_come_with_the_package():
    assert presets.names() == ["preact_resnet20-cifar10", "vgg5-nmnist", "vgg5-poker_dvs"]
    assert presets.names("vgg5-n") == ["vgg5-nmnist"]


@pytest.mark.parametrize("name", presets.names())
def test_presets_of_the_package_load_and_have_their_log(name):
    network, _, trained_on = name.partition("-")
    card, path = presets.card(network, trained_on)
    model = getattr(models, network.rstrip("0123456789"))(
        depth=int(network.lstrip("abcdefghijklmnopqrstuvwxyz_")),
        neuron=card.neuron,
        classes=len(card.classes),
        input_shape=card.input_shape,
        weights=trained_on,
    )
    assert model.output_shape == (None, len(card.classes))
    rows = path.with_suffix(".csv").read_text().splitlines()
    stages = ("epochs", "hybrid_epochs", "hybrid_quantized_epochs")
    assert len(rows) - 1 == sum(card.recipe.get(epochs, 0) for epochs in stages)
    assert 0.5 < card.test_accuracy <= 1


@pytest.mark.parametrize("name", presets.names())
def test_presets_are_what_their_recipes_train(name):
    """So that one line makes them again."""
    card, _ = presets.card(*name.split("-"))
    trained_by = Recipe.from_json(json.dumps(card.recipe))
    assert dataclasses.replace(trained_by, summary="") == dataclasses.replace(recipes.get(trained_by.name), summary="")


@pytest.mark.tensorflow_only
@pytest.mark.parametrize(
    ("archive", "name", "trained_on"), [("pokerdvs", "poker_dvs", "poker_dvs"), ("nmnist", "nmnist", "nmnist")]
)
def test_event_presets_are_as_good_as_their_cards_say(archive, name, trained_on, unpacked, tmp_path):
    card, _ = presets.card("vgg5", trained_on)
    loaded = data.load(name, data_dir=unpacked(archive), timesteps=card.timesteps, cache_dir=tmp_path)
    model = models.vgg(5, card.neuron, classes=len(card.classes), input_shape=loaded.input_shape, weights=trained_on)
    right = sum(
        int(np.sum(np.argmax(model.predict_on_batch(x), axis=-1) == labels))
        for x, labels in loaded.batches(loaded.test, 50).as_numpy_iterator()
    )
    assert right == round(card.test_accuracy * card.test_examples)


@pytest.mark.tensorflow_only
def test_the_cifar10_preset_is_as_good_as_its_card_says(unpacked):
    """The whole test part. On another machine a spike in millions may flip, and an image with it."""
    pytest.importorskip("tensorflow_datasets")
    card, _ = presets.card("preact_resnet20", "cifar10")
    loaded = data.load("cifar10", data_dir=unpacked("cifar10", "--to", "tfds"))
    model = models.preact_resnet(20, card.neuron, weights="cifar10")
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    found = model.evaluate(loaded.batches(loaded.test, 200), verbose=0, return_dict=True)["accuracy"]
    assert (len(loaded.test), card.test_examples) == (10_000, 10_000)
    assert found == pytest.approx(card.test_accuracy, abs=1e-3)

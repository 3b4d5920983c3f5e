"""Recipes are frozen, printable, and refuse what they do not know."""

from __future__ import annotations

import dataclasses
import json

import pytest

from keras_dsr import layers, recipes


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_recipes_survive_json(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipes.Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(("neuron", "kind"), [("if", layers.IFSpike), ("lif", layers.LIFSpike)])
def test_a_recipe_builds_its_network(neuron, kind):
    recipe = dataclasses.replace(recipes.get("digits"), neuron=neuron, timesteps=3, threshold=0.7, widths=(4, 5))
    model = recipe.build(classes=7, input_shape=(8, 8, 2))
    assert model.output_shape == (None, 7)
    neurons = [layer for layer in model.layers if isinstance(layer, layers.SpikingNeuron)]
    assert [type(layer) for layer in neurons] == [kind] * 3
    assert {layer.initial_threshold for layer in neurons} == {0.7}
    assert neurons[0].timesteps == 3


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("digits").epochs = 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"one of \[.*'digits'.*\]. Received 'cifar'"):
        recipes.get("cifar")


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("batch_size", 0), ("timesteps", -1), ("seed", -1), ("shift", -1), ("learning_rate", 0.0)],
)
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Received {field}={value}"):
        dataclasses.replace(recipes.get("digits"), **{field: value})


def test_a_recipe_file_with_other_settings_is_refused():
    settings = json.loads(recipes.get("digits").to_json())
    del settings["epochs"]
    settings["epoch"] = 3
    with pytest.raises(ValueError, match=r"Missing: \['epochs'\]. Unknown: \['epoch'\]"):
        recipes.Recipe.from_json(json.dumps(settings))


def test_an_unknown_neuron_is_refused():
    recipe = dataclasses.replace(recipes.get("digits"), neuron="izhikevich")
    with pytest.raises(ValueError, match="Received neuron='izhikevich'"):
        recipe.build(10, (8, 8, 1))

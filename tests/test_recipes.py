"""Recipes hold the paper's settings, build their networks, and refuse what they do not know."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from keras_dsr import data, layers, recipes
from keras_dsr.recipes import EXPERIMENTS, RECIPES, REPORTED, Recipe

DIGITS = recipes.get("digits")
CIFAR = sorted(name for name, recipe in RECIPES.items() if name.startswith(("cifar10-", "cifar100-")))
PAPERS_CIFAR = [name for name in CIFAR if name != "cifar10-resnet20"]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_json(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe
    assert hash(again) == hash(recipe)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_say_what_they_are(name):
    recipe = recipes.get(name)
    assert recipe.summary
    assert "\n" not in recipe.summary
    assert recipe.data in data.NAMES
    assert f"N = {recipe.timesteps}" in recipe.summary
    assert f" {recipe.neuron.upper()}" in recipe.summary


# Input shapes that are small, but as large as the networks' poolings need.
SHAPES = {"dvs_cifar10": (32, 32, 2), "imagenet2012": (64, 64, 3), "digits": (8, 8, 1), "nmnist": (16, 16, 2)}


def small(recipe):
    """The shape of a small input for a recipe."""
    if recipe.network == "vgg":
        return recipe.timesteps, *SHAPES.get(recipe.data, (8, 8, 2))
    return SHAPES.get(recipe.data, (8, 8, 3))


def shallow(name):
    recipe = recipes.get(name)
    return (recipe.depth <= 20 and name not in PAPERS_CIFAR) or name in EXPERIMENTS["table3"]


@pytest.mark.tensorflow_only  # JAX takes seconds for each, to the same end
@pytest.mark.parametrize("name", sorted(filter(shallow, RECIPES)))
def test_recipes_build_their_representation_network(name):
    recipe = recipes.get(name)
    model = recipe.build(7, small(recipe), timesteps=0)
    assert model.output_shape == (None, 7)
    neurons = [layer for layer in model.layers if isinstance(layer, layers.SpikingNeuron)]
    assert {type(layer) for layer in neurons} == {{"if": layers.IFSpike, "lif": layers.LIFSpike}[recipe.neuron]}
    for layer in neurons:
        assert layer.initial_threshold == recipe.threshold
        assert layer.alpha == recipe.alpha
        assert layer.trainable_threshold is recipe.train_threshold
        assert layer.threshold_l2 == 0.0


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("name", ["cifar10-if-depth32", "cifar10-lif-4bit"])
def test_a_few_of_the_others_build_too(name):
    recipe = recipes.get(name)
    model = recipe.build(10, (8, 8, 3), timesteps=0)
    neurons = [layer for layer in model.layers if isinstance(layer, layers.SpikingNeuron)]
    assert len(neurons) == recipe.depth + 1
    quantized = [layer.bits for layer in model.layers if isinstance(layer, layers.QuantizedConv2D)]
    assert set(quantized) == (set() if recipe.weight_bits is None else {recipe.weight_bits})


@pytest.mark.parametrize("name", ["digits", "digits-events"])
def test_recipes_build_with_their_time_steps(name):
    recipe = recipes.get(name)
    model = recipe.build(10, small(recipe))
    first = next(layer for layer in model.layers if isinstance(layer, layers.SpikingNeuron))
    assert first.output[0].shape[1] == recipe.timesteps == 8


@pytest.mark.parametrize(("neuron", "kind"), [("if", layers.IFSpike), ("lif", layers.LIFSpike)])
def test_settings_reach_the_network(neuron, kind):
    recipe = dataclasses.replace(
        DIGITS, neuron=neuron, timesteps=3, threshold=0.7, widths=(4, 5), alpha=0.6, tau=3.0, dt=0.25, dropout=0.25
    )
    model = dataclasses.replace(recipe, train_threshold=False, weight_bits=5).build(7, (8, 8, 2))
    assert model.output_shape == (None, 7)
    neurons = [layer for layer in model.layers if isinstance(layer, layers.SpikingNeuron)]
    assert [type(layer) for layer in neurons] == [kind] * 3
    assert {(layer.initial_threshold, layer.alpha, layer.trainable_threshold) for layer in neurons} == {
        (0.7, 0.6, False)
    }
    assert {layer.threshold_l2 for layer in neurons} == {0.0}
    assert dataclasses.replace(recipe, threshold_l2=1e-3).neuron_layer().threshold_l2 == 1e-3
    assert {layer.corner_width for layer in neurons} == {0.0}
    assert dataclasses.replace(recipe, corner_width=0.15).neuron_layer().corner_width == 0.15
    if neuron == "lif":
        assert {(layer.tau, layer.dt) for layer in neurons} == {(3.0, 0.25)}
    assert neurons[0].timesteps == 3
    assert [layer.rate for layer in model.layers if isinstance(layer, layers.Dropout)] == [0.25]
    assert model.get_layer("conv1").bits == 5


def test_the_threshold_gradient_scale_is_the_neurons_own_if_none_is_given():
    def scale(**settings):
        return dataclasses.replace(DIGITS, **settings).neuron_layer().threshold_gradient_scale

    assert scale() == 1.0
    assert scale(neuron="lif", dt=0.5) == 0.25
    assert scale(threshold_gradient_scale=0.001) == 0.001
    assert scale(neuron="lif", threshold_gradient_scale=0.0) == 0.0


@pytest.mark.parametrize("name", PAPERS_CIFAR)
def test_cifar_is_trained_as_in_the_paper(name):
    recipe = recipes.get(name)
    assert (recipe.batch_size, recipe.epochs) == (128, 200)
    assert (recipe.optimizer, recipe.momentum, recipe.weight_decay) == ("sgd", 0.9, 5e-4)
    assert recipe.learning_rate == (0.05 if recipe.timesteps == 5 else 0.1)
    assert recipe.warmup_steps == 400
    assert (recipe.augmentation, recipe.padding) == (("crop", "flip"), 4)
    assert recipe.network == "preact_resnet"
    assert recipe.stem == "cifar"
    assert recipe.dropout == 0
    assert recipe.hybrid_epochs == 0


@pytest.mark.parametrize("name", sorted({name for names in EXPERIMENTS.values() for name in names}))
def test_neurons_are_the_papers(name):
    recipe = recipes.get(name)
    assert recipe.alpha == (1.0 if "no-firing" in name else 0.5 if recipe.neuron == "if" else 0.3)
    if recipe.neuron == "if":
        assert recipe.threshold == (2.0 if name.endswith("fixed2") else 6.0)
        assert recipe.threshold_lower_bound == 0.01
    else:
        assert (recipe.threshold, recipe.threshold_lower_bound) == (0.3, 0.0005)
        assert (recipe.tau, recipe.dt) == (1.0, 0.05)
    assert recipe.train_threshold is ("fixed" not in name)


def test_thresholds_decay_once_by_the_optimizer():
    """The layers' own penalty is what decays thresholds for other optimizers."""
    assert layers.IFSpike().threshold_l2 > 0
    assert all(recipe.neuron_layer().threshold_l2 == 0 for recipe in RECIPES.values())


@pytest.mark.parametrize(("name", "neuron"), [("dvs-cifar10-if", "if"), ("dvs-cifar10-lif", "lif")])
def test_dvs_cifar10_is_trained_as_in_the_paper(name, neuron):
    recipe = recipes.get(name)
    assert (recipe.data, recipe.network, recipe.depth, recipe.neuron) == ("dvs_cifar10", "vgg", 11, neuron)
    assert (recipe.epochs, recipe.learning_rate, recipe.dropout, recipe.timesteps) == (300, 0.05, 0.1, 20)
    assert (recipe.augmentation, recipe.padding) == (("crop",), 4)
    assert (recipe.batch_size, recipe.weight_decay, recipe.momentum, recipe.warmup_steps) == (128, 5e-4, 0.9, 400)


def test_imagenet_is_trained_as_in_the_paper():
    recipe = recipes.get("imagenet-if")
    assert (recipe.network, recipe.depth, recipe.stem, recipe.timesteps) == ("preact_resnet", 18, "imagenet", 50)
    assert (recipe.optimizer, recipe.learning_rate, recipe.weight_decay) == ("adam", 1e-3, 0.0)
    assert recipe.hybrid_epochs > 0
    assert (recipe.hybrid_optimizer, recipe.hybrid_learning_rate, recipe.hybrid_weight_decay) == ("sgd", 0.1, 1e-4)
    assert recipe.threshold_gradient_scale == 0.001
    assert recipe.neuron_layer().threshold_gradient_scale == 0.001


def test_experiments_are_made_of_recipes():
    assert set(EXPERIMENTS) == {"table2", "figure3a", "figure3b", "table3", "table7"}
    for names in EXPERIMENTS.values():
        assert len(set(names)) == len(names)
        assert set(names) <= set(RECIPES)
    settings = {}
    for name, recipe in RECIPES.items():
        key = dataclasses.replace(recipe, name="", summary="")
        assert settings.setdefault(key, name) == name, f"{name} and {settings[key]} are the same"


def test_tables_and_figures_vary_what_they_say():
    def values(group, neuron, *fields):
        chosen = [recipes.get(name) for name in EXPERIMENTS[group]]
        return {tuple(getattr(each, field) for field in fields) for each in chosen if each.neuron == neuron}

    for neuron in ("if", "lif"):
        assert values("figure3a", neuron, "timesteps") == {(20,), (15,), (10,), (5,)}
        assert values("figure3b", neuron, "depth") == {(20,), (32,), (44,), (56,), (110,)}
        assert values("table7", neuron, "weight_bits") == {(None,), (8,), (4,)}
        assert {"cifar10", "cifar100", "dvs_cifar10"} <= {each for (each,) in values("table2", neuron, "data")}
    assert values("table3", "if", "alpha", "train_threshold", "threshold") == {
        (0.5, True, 6.0),
        (1.0, True, 6.0),
        (0.5, False, 6.0),
        (0.5, False, 2.0),
        (1.0, False, 6.0),
    }
    assert values("table3", "lif", "alpha") == set()


def test_a_variant_differs_in_what_its_experiment_is_about_only():
    free = {
        "figure3a": {"timesteps", "learning_rate"},
        "figure3b": {"depth"},
        "table3": {"alpha", "train_threshold", "threshold"},
        "table7": {"weight_bits"},
    }
    for group, allowed in free.items():
        for name in EXPERIMENTS[group]:
            recipe = recipes.get(name)
            base = recipes.get(f"cifar10-{recipe.neuron}")
            differing = {
                field.name
                for field in dataclasses.fields(Recipe)
                if getattr(recipe, field.name) != getattr(base, field.name)
            }
            assert differing <= allowed | {"name", "summary"}, name


def test_reported_accuracies_belong_to_recipes():
    assert set(REPORTED) == set(EXPERIMENTS["table2"])
    for name, reported in REPORTED.items():
        assert 50 < reported.accuracy < 100
        assert reported.deviation is None or 0 < reported.deviation < 1
        assert reported.source == "Table 2", name
    assert str(REPORTED["cifar10-if"]) == "95.24 ± 0.17 % (Table 2)"
    assert str(REPORTED["imagenet-if"]) == "67.74 % (Table 2)"


def test_a_training_has_the_stages_that_its_recipe_says():
    plain = recipes.get("cifar10-if-n5")
    assert plain.plans() == (recipes.Plan("spiking", 0, 5, None, 200, "sgd", 0.05, 5e-4, last=True),)
    representation = plain.with_settings({"timesteps": "0"})
    assert representation.plans() == (recipes.Plan("representation", 0, 0, None, 200, "sgd", 0.05, 5e-4, last=True),)
    settings = {"hybrid_epochs": "3", "hybrid_learning_rate": "0.3", "hybrid_weight_decay": "0.001", "epochs": "7"}
    hybrid = plain.with_settings(settings)
    first = recipes.Plan("representation", 0, 0, None, 3, "sgd", 0.3, 0.001)
    assert hybrid.plans() == (first, recipes.Plan("spiking", 1, 5, None, 7, "sgd", 0.05, 5e-4, last=True))
    quantized = hybrid.with_settings({"hybrid_quantized_epochs": "4", "hybrid_quantized_learning_rate": "0.02"})
    assert quantized.plans() == (
        first,
        recipes.Plan("quantized", 1, 0, 5, 4, "sgd", 0.02, 0.001),
        recipes.Plan("spiking", 2, 5, None, 7, "sgd", 0.05, 5e-4, last=True),
    )
    adam = hybrid.with_settings({"hybrid_optimizer": "adam", "hybrid_weight_decay": "0"})
    assert [plan.optimizer for plan in adam.plans()] == ["adam", "sgd"]


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipes.get("digits").epochs = 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar10", r"Did you mean 'cifar10-\w+'"),
        ("digit", "Did you mean 'digits'"),
        ("imagenet", "Did you mean 'imagenet-if'"),
        ("xyzzy", "There are: digits, .*, cifar10-if"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, hint):
    with pytest.raises(ValueError, match=rf"There is no recipe '{name}'\. {hint}"):
        recipes.get(name)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("4", "epochs", 4),
        ("4", "threshold", 4.0),
        ("1e-3", "learning_rate", 1e-3),
        ("true", "train_threshold", True),
        ("False", "train_threshold", False),
        ("lif", "neuron", "lif"),
        ("none", "weight_bits", None),
        ("4", "weight_bits", 4),
        ("0.001", "threshold_gradient_scale", 0.001),
        ("None", "threshold_gradient_scale", None),
        ("100", "validation", 100.0),
        ("0.25", "validation", 0.25),
        ("500", "train_examples", 500),
        ("crop,flip", "augmentation", ("crop", "flip")),
        ("crop", "augmentation", ("crop",)),
        ("", "augmentation", ()),
        ("8, 16,32", "widths", (8, 16, 32)),
        ("folder:/a=b,c", "data", "folder:/a=b,c"),
    ],
)
def test_settings_are_read_from_text_by_their_type(text, field, value):
    changed = DIGITS.with_settings({field: text})
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    assert dataclasses.replace(changed, **{field: getattr(DIGITS, field)}) == DIGITS


def test_several_settings_change_at_once_and_none_changes_nothing():
    changed = DIGITS.with_settings({"optimizer": "sgd", "weight_decay": "1e-4"})
    assert (changed.optimizer, changed.weight_decay) == ("sgd", 1e-4)
    assert DIGITS.with_settings({}) == DIGITS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treshold": "4"}, r"no setting 'treshold'\. Did you mean 'threshold'"),
        ({"lr": "4"}, r"no setting 'lr'\. "),
        ({"name": "other"}, "no setting 'name'"),
        ({"summary": "other"}, "no setting 'summary'"),
        ({"epochs": "4.5"}, r"epochs is a whole number\. Received epochs='4.5'"),
        ({"epochs": "none"}, "epochs is a whole number"),
        ({"threshold": "high"}, r"threshold is a number\. Received threshold='high'"),
        ({"train_threshold": "yes"}, r"train_threshold is true or false\. Received train_threshold='yes'"),
        ({"widths": "8,a"}, r"widths is a whole number\. Received widths='a'"),
        ({"weight_bits": "few"}, "weight_bits is a whole number"),
        ({"neuron": "izhikevich"}, r"neuron is one of \('if', 'lif'\)\. Received neuron='izhikevich'"),
        ({"weight_decay": "0.1"}, "weight_decay belongs to the optimizer 'sgd'"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DIGITS.with_settings(settings)


def test_words_become_settings():
    assert recipes.parse_settings(["threshold=4", " data = folder:/a=b "]) == {
        "threshold": "4",
        "data": "folder:/a=b",
    }
    with pytest.raises(ValueError, match=r"NAME=VALUE, such as threshold=4\. Received 'threshold'"):
        recipes.parse_settings(["threshold"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs must be 0 or more. Received epochs=-1"),
        ({"epochs": 0}, "A recipe trains for 1 epoch or more. Received epochs=0, hybrid_epochs=0"),
        ({"hybrid_epochs": -1}, "Received hybrid_epochs=-1"),
        ({"hybrid_quantized_epochs": -1}, "Received hybrid_quantized_epochs=-1"),
        ({"hybrid_quantized_epochs": 2}, "hybrid_quantized_epochs=2, hybrid_epochs=0; set hybrid_epochs too"),
        ({"hybrid_quantized_learning_rate": 0.0}, "Received hybrid_quantized_learning_rate=0"),
        ({"hybrid_epochs": 2, "timesteps": 0}, "needs time steps. Received hybrid_epochs=2, timesteps=0"),
        ({"batch_size": 0}, "batch_size must be 1 or more. Received batch_size=0"),
        ({"timesteps": -1}, "timesteps must be 0 or more. Received timesteps=-1"),
        ({"warmup_steps": -1}, "Received warmup_steps=-1"),
        ({"padding": -1}, "padding must be 1 or more. Received padding=-1"),
        ({"momentum": -0.1}, "Received momentum=-0.1"),
        ({"weight_decay": -1e-4}, "weight_decay must be 0 or more. Received weight_decay=-0.0001"),
        ({"weight_decay": math.nan}, "weight_decay must be 0 or more. Received weight_decay=nan"),
        ({"hybrid_weight_decay": -1.0}, "Received hybrid_weight_decay=-1.0"),
        ({"seed": -1}, "Received seed=-1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0. Received learning_rate=0.0"),
        ({"learning_rate": math.nan}, "Received learning_rate=nan"),
        ({"hybrid_learning_rate": 0.0}, "Received hybrid_learning_rate=0.0"),
        ({"validation": -1}, "validation must be 0 or more, or None. Received validation=-1"),
        ({"validation": 0, "selection": "best"}, "validation=0, selection='best'; set selection='last'"),
        ({"train_examples": 0}, "train_examples must be above 0. Received train_examples=0"),
        ({"hybrid_percentile": 0.0}, r"hybrid_percentile must be in \(0, 100\]. Received hybrid_percentile=0.0"),
        ({"hybrid_percentile": 101.0}, "Received hybrid_percentile=101.0"),
        ({"network": "resnet"}, "network is one of .*'preact_resnet'.*Received network='resnet'"),
        ({"neuron": "relu"}, "Received neuron='relu'"),
        ({"optimizer": "rmsprop"}, "Received optimizer='rmsprop'"),
        ({"hybrid_optimizer": "rmsprop"}, "Received hybrid_optimizer='rmsprop'"),
        ({"precision": "float16"}, "precision is one of .*'mixed_bfloat16'.*Received precision='float16'"),
        ({"selection": "first"}, "selection is one of .*Received selection='first'"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "Received optimizer='adam', weight_decay=0.1; set it to 0"),
        (
            {"hybrid_optimizer": "adam", "hybrid_weight_decay": 0.1},
            "Received hybrid_optimizer='adam', hybrid_weight_decay=0.1; set it to 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DIGITS, **settings)


def test_hybrid_training_may_end_with_the_calibration():
    assert dataclasses.replace(DIGITS, epochs=0, hybrid_epochs=1).epochs == 0


def test_neurons_out_of_range_are_refused_as_the_network_is_built():
    with pytest.raises(ValueError, match=r"alpha=1\.5"):
        dataclasses.replace(DIGITS, alpha=1.5).build(10, (8, 8, 1))
    with pytest.raises(ValueError, match=r"corner_width=-0\.1"):
        dataclasses.replace(DIGITS, corner_width=-0.1).build(10, (8, 8, 1))
    with pytest.raises(ValueError, match=r"threshold=0\.001, threshold_lower_bound=0\.01"):
        dataclasses.replace(DIGITS, threshold=0.001).neuron_layer()


def test_a_recipe_file_with_other_settings_is_refused():
    settings = json.loads(DIGITS.to_json())
    del settings["summary"]
    settings["epoch"] = 3
    with pytest.raises(ValueError, match=r"Missing: \['summary'\]\. Unknown: \['epoch'\]"):
        Recipe.from_json(json.dumps(settings))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"digits"', "3"])
def test_a_file_that_is_no_recipe_is_refused(text):
    with pytest.raises(ValueError, match="A recipe is a JSON object of settings"):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", "3", r"epochs is a whole number\. Received epochs='3'"),
        ("epochs", 2.5, r"epochs is a whole number\. Received epochs=2.5"),
        ("epochs", True, "epochs is a whole number"),
        ("threshold", None, "threshold is a number"),
        ("train_threshold", 1, r"train_threshold is true or false\. Received train_threshold=1"),
        ("neuron", 3, "neuron is a text"),
        ("widths", 3, "widths is a list"),
        ("widths", ["a"], "widths is a whole number"),
        ("weight_bits", 4.5, "weight_bits is a whole number"),
    ],
)
def test_a_recipe_file_with_values_of_other_types_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_json(json.dumps({**json.loads(DIGITS.to_json()), field: value}))


def test_whole_numbers_may_stand_for_numbers_in_a_file():
    recipe = Recipe.from_json(json.dumps({**json.loads(DIGITS.to_json()), "threshold": 4, "momentum": 0}))
    assert (type(recipe.threshold), type(recipe.momentum)) == (float, float)


def test_what_a_recipe_of_an_earlier_version_lacks_has_its_default():
    settings = json.loads(recipes.get("cifar10-if-n5").to_json())
    del settings["cutout"], settings["slicing"]
    assert recipes.Recipe.from_json(json.dumps(settings)) == recipes.get("cifar10-if-n5")

"""Search spaces: what can be written, what is refused, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from keras_dsr import recipes, tuning
from keras_dsr.tuning import Choice, Range
from keras_dsr.tuning import space as spaces

DIGITS = recipes.get("digits")
LIF = recipes.get("cifar10-lif")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("threshold=1:8", Range("threshold", 1.0, 8.0)),
        (" threshold = 1 : 8 : log ", Range("threshold", 1.0, 8.0, "log")),
        ("alpha", Range("alpha", 0.1, 0.9)),
        ("threshold", Range("threshold", 0.5, 8.0, "log")),
        ("learning_rate", Range("learning_rate", 2e-4, 2e-2, "log")),
        ("timesteps", Range("timesteps", 2, 8)),
        ("timesteps=2:6", Range("timesteps", 2, 6)),
        ("timesteps=2,4,8", Choice("timesteps", (2, 4, 8))),
        ("neuron=if,lif", Choice("neuron", ("if", "lif"))),
        ("weight_bits=none,8", Choice("weight_bits", (None, 8))),
        ("train_threshold=true,false", Choice("train_threshold", (True, False))),
        ("threshold_l2=0:0.1", Range("threshold_l2", 0.0, 0.1)),
    ],
)
def test_words_become_a_space(text, expected):
    assert tuning.parse(DIGITS, [text]) == (expected,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["treshold=1:2"], r"no setting 'treshold' to search\. Did you mean 'threshold'"),
        (["threshold=8:1"], r"finite low bound below a finite high one\. Received threshold=8\.0:1\.0"),
        (["threshold=1:1"], r"For one value only, set it in the recipe"),
        (["threshold=nan:1"], r"finite low bound"),
        (["threshold=1:inf"], r"finite low bound"),
        (["threshold=0:1:log"], r"bounds are above 0\. Received threshold=0\.0:1\.0:log"),
        (["threshold=1:8:cubic"], r"scale is one of .*'linear', 'log'.*'cubic'"),
        (["threshold=1:8:log:2"], r"NAME=LOW:HIGH:log\. Received 'threshold=1:8:log:2'"),
        (["threshold=1"], r"made of NAME=LOW:HIGH.*Received 'threshold=1'"),
        (["threshold=one:two"], r"threshold is a number\. Received threshold='one'"),
        (["timesteps=1.5:4"], r"timesteps is a whole number\. Received timesteps='1\.5'"),
        (["timesteps=2,2"], r"two or more different values"),
        (["alpha=0.5:1.5"], r"no neuron can have, such as alpha=1\.5\. alpha, .* must be in \[0, 1\]"),
        (["timesteps=0:8"], r"1 time step or more\. Received the bound timesteps=0"),
        (["timesteps=0,8"], r"1 time step or more\. Received the bound timesteps=0"),
        (["widths=4:16"], r"A range is of numbers, and widths is none"),
        (["dropout=0:2"], r"dropout must be in \[0, 1\)\. Received dropout=2\.0"),
        (["weight_bits=1,8"], r"from 2 to 16\. Received bits=1"),
        (["weight_bits=4:40"], r"from 2 to 16\. Received bits=40"),
        (["depth=18:56"], r"certain depths only\. Give them: depth=18,VALUE"),
        (["network=small_cnn,vgg"], r"depth of a 'vgg' is one of \(5, 11\)\. Received depth=18"),
        (["learning_rate=-1:1"], r"learning_rate must be above 0"),
        (["epochs=1:9"], r"All trials of a search share epochs"),
        (["seed=1:9"], r"All trials of a search share seed"),
        (["skip_corrupt=true,false"], r"All trials of a search share skip_corrupt"),
        (["corner_width=-0.1:0.2"], r"corner_width=-0\.1"),
        (["selection=best,last"], r"All trials of a search share selection"),
        (["neuron=if,lef"], r"neuron is one of"),
        (["tau=1:2"], r"tau is a setting of LIF neurons, and those of 'digits' are IF.*set neuron=lif"),
        (["alpha", "alpha=0.2:0.3"], r"in the space once\. Received 'alpha' 2 times"),
        (["threshold=0.1:1", "threshold_lower_bound=0.01:0.5"], r"threshold=0\.1, threshold_lower_bound=0\.5.*lower"),
        (["momentum"], r"There is a range to begin with for threshold, alpha.*momentum=LOW:HIGH"),
        (
            ["network=preact_resnet:vgg"],
            r"A range is of numbers, and network is none\. Give its values: network=VALUE,VALUE",
        ),
        ([], r"varies one setting or more"),
    ],
)
def test_what_is_no_space_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        tuning.parse(DIGITS, texts)


def test_bounds_are_looked_at_together():
    with pytest.raises(ValueError, match=r"dt=0\.2, tau=0\.1|tau=0\.1, dt=0\.2.*dt must be smaller than tau"):
        tuning.parse(LIF, ["dt=0.05:0.2", "tau=0.1:1"])
    tuning.parse(LIF, ["dt=0.05:0.09", "tau=0.1:1"])
    tuning.parse(DIGITS, ["neuron=if,lif", "tau=0.1:1"])


def test_values_of_a_network_are_its_own():
    with pytest.raises(ValueError, match=r"depth of a 'preact_resnet' is one of .*Received depth=19"):
        tuning.parse(LIF, ["depth=18,19"])
    assert tuning.parse(LIF, ["depth=18,20"])


def test_a_range_is_of_numbers():
    with pytest.raises(ValueError, match=r"A range is of numbers, and augmentation is none"):
        tuning.check(DIGITS, [Range("augmentation", 0, 1)])
    with pytest.raises(ValueError, match=r"timesteps is a whole number\. Received the bound 2\.5"):
        tuning.check(DIGITS, [Range("timesteps", 2.5, 4)])


def test_a_network_without_spikes_is_refused():
    ann = dataclasses.replace(DIGITS, timesteps=0)
    with pytest.raises(ValueError, match=r"for networks that spike\. Received 'digits' with timesteps=0"):
        tuning.parse(ann, ["alpha"])
    assert tuning.parse(ann, ["timesteps=1:4"])


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_has_ranges_to_begin_with(name):
    recipe = recipes.get(name)
    names = ["threshold", "alpha", "threshold_lower_bound", "threshold_l2", "learning_rate", "timesteps"]
    space = tuning.default_space(recipe, names + ["tau", "dt"] * (recipe.neuron == "lif"))
    tuning.check(recipe, space)
    # What the recipe has is among what is tried.
    for each in space:
        if each.name != "threshold_l2":
            assert each.low <= getattr(recipe, each.name) <= each.high


def test_settings_become_a_recipe_of_readable_numbers():
    recipe = spaces.apply(DIGITS, {"threshold": 1.23456789, "timesteps": 3.0, "weight_bits": None, "alpha": 1 / 3})
    assert (recipe.threshold, recipe.timesteps, recipe.alpha) == (1.23457, 3, 0.333333)
    assert type(recipe.timesteps) is int
    assert dataclasses.replace(recipe, threshold=2.0, timesteps=8, alpha=0.5) == DIGITS


def test_a_space_goes_through_json():
    texts = ["threshold=1:8:log", "timesteps=2:4", "weight_bits=none,8", "neuron=if,lif"]
    space = (*tuning.parse(DIGITS, texts), Choice("widths", ((4,), (4, 8))))
    assert spaces.from_fields(json.loads(json.dumps(spaces.to_fields(space)))) == space


def test_labels_stand_for_values():
    numbers = Choice("threshold", (1, 2.5))
    assert numbers.labels == [1.0, 2.5]
    assert numbers.of(2.4999999) == 2.5
    mixed = Choice("weight_bits", (None, 8))
    assert [mixed.of(label) for label in mixed.labels] == [None, 8]
    assert all(isinstance(label, str) for label in mixed.labels)

"""Experiments: recipes times seeds, a table and a figure, and going on where it was stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest

from keras_dsr import experiments, recipes, training

# Experiments are recipes times seeds, which is the same on JAX.
pytestmark = pytest.mark.tensorflow_only

FAST = {"epochs": "1", "timesteps": "2", "widths": "4"}


def test_small_forms_keep_what_an_experiment_is_about():
    for name in recipes.EXPERIMENTS["table3"] + recipes.EXPERIMENTS["table7"]:
        recipe = recipes.get(name)
        small = experiments.smoke(recipe)
        for setting in ("neuron", "timesteps", "threshold", "train_threshold", "alpha", "weight_bits"):
            assert getattr(small, setting) == getattr(recipe, setting), (name, setting)
        assert small.data == "digits"
    assert experiments.smoke(recipes.get("dvs-cifar10-lif")).data == "digits_events"
    assert experiments.smoke(recipes.get("cifar10-if-depth110")).depth == 110


@pytest.mark.parametrize("group", sorted(recipes.EXPERIMENTS))
def test_every_recipe_has_a_small_form_that_can_be_built(group):
    for recipe in experiments.select(group, {}, small=True):
        shape = (recipe.timesteps, 16, 16, 2) if recipe.network == "vgg" else (8, 8, 1)
        if recipe.depth <= 20 or recipe.network != "preact_resnet":
            assert recipe.build(10, shape, timesteps=0).output_shape == (None, 10)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Rows of two recipes and two seeds, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("table3")
    chosen = experiments.select("table3", FAST, ["cifar10-if", "cifar10-if-fixed"], small=True)
    return experiments.run(chosen, folder, seeds=2), folder


def test_each_recipe_and_seed_has_a_run(results):
    rows, folder = results
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        f"{name}-seed{seed}" for name in ("cifar10-if-fixed", "cifar10-if") for seed in (0, 1)
    ]
    for row in rows:
        assert len(row.accuracies) == len(row.firing_rates) == len(row.seconds) == 2
        assert row.mean == pytest.approx(sum(row.accuracies) / 2)
        assert row.deviation == pytest.approx(abs(row.accuracies[0] - row.accuracies[1]) / 2**0.5)
        assert row.reported is None  # the small form is not what the paper reports on


def test_finished_runs_are_read_and_not_run_again(results, monkeypatch):
    rows, folder = results
    monkeypatch.setattr(training, "_run_stage", None)
    again = experiments.run([dataclasses.replace(row.recipe) for row in rows], folder, seeds=2)
    assert [row.accuracies for row in again] == [row.accuracies for row in rows]


def test_results_are_a_table_a_picture_and_numbers(results, tmp_path):
    rows, _ = results
    experiments.write(rows, tmp_path, "A title", ["epochs=1", "widths=2"])
    assert "with `epochs=1 widths=2`" in (tmp_path / "results.md").read_text()
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# A title\n")
    assert f"{rows[0].mean:.2f} ± {rows[0].deviation:.2f}" in text
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert [tuple(row["accuracies"]) for row in numbers] == [row.accuracies for row in rows]


def test_the_papers_figure_stands_beside_its_own_recipe_alone():
    assert recipes.REPORTED["cifar10-if"].accuracy == 95.24
    row = experiments.Row(recipes.get("cifar10-if"), (95.0,), (0.1,), (1.0,), recipes.REPORTED["cifar10-if"])
    assert "95.24 ± 0.17 % (Table 2)" in experiments.table([row])
    assert row.deviation == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "--recipes", "cifar10"], "table3 has no recipe 'cifar10'. Did you mean 'cifar10-if'"),
        (["--smoke", "--set", "thresold=2"], "no setting 'thresold'. Did you mean 'threshold'"),
        (["--smoke", "--set", "threshold"], "--set takes NAME=VALUE"),
        (["--smoke", "--seeds", "0"], "1 or more seeds. Received seeds=0"),
    ],
)
def test_mistakes_end_with_a_message(arguments, message, tmp_path, capsys):
    assert experiments.main("table3", "A title", arguments=[*arguments, "--folder", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_recipes_of_one_name_are_refused(tmp_path):
    recipe = recipes.get("digits")
    with pytest.raises(ValueError, match="told apart by name"):
        experiments.run([recipe, dataclasses.replace(recipe, epochs=1)], tmp_path)


def test_the_command_line_writes_where_it_is_told(tmp_path, capsys):
    settings = [word for name, value in FAST.items() for word in ("--set", f"{name}={value}")]
    assert experiments.main("table3", "A title", ["cifar10-if"], ["--smoke", *settings, "--folder", str(tmp_path)]) == 0
    assert f"Written to {tmp_path}" in capsys.readouterr().out
    assert {"results.md", "results.json", "results.png", "cifar10-if-seed0"} == {p.name for p in tmp_path.iterdir()}

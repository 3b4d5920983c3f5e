"""A run folder from the command line, and back."""

from __future__ import annotations

import csv
import dataclasses
import json
import re

import keras
import numpy as np
import pytest

from keras_dsr import cli, recipes, training
from keras_dsr.data import images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs and two time steps."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "digits", "--epochs", "2", "--timesteps", "2", "--runs", str(runs)]) == 0
    (folder,) = runs.iterdir()
    return folder


def test_a_run_folder_holds_all_and_nothing_else(run):
    assert re.fullmatch(r"digits-\d{8}-\d{6}", run.name)
    expected = ["figure.png", "history.csv", "model.keras", "recipe.json", "summary.json"]
    assert sorted(file.name for file in run.iterdir()) == expected
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_history_has_a_row_an_epoch_and_a_column_a_threshold(run):
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    model = keras.models.load_model(run / "model.keras")
    for layer in ("neuron1", "neuron2", "neuron3", "head_neuron"):
        last = float(rows[-1][f"threshold_{layer}"])
        assert last != 2.0
        assert last == pytest.approx(float(model.get_layer(layer).threshold.numpy()))
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])


def test_the_summary_is_that_of_the_saved_model(run):
    summary = json.loads((run / "summary.json").read_text())
    data = images.digits()
    logits = keras.models.load_model(run / "model.keras").predict(data.test.images, verbose=0)
    assert summary["test_accuracy"] == pytest.approx(np.mean(logits.argmax(-1) == data.test.labels))
    assert summary["test_images"] == 360
    assert 0.5 < summary["test_accuracy"] <= 1
    assert summary["timesteps"] == 2
    assert all(0 < rate < 1 for rate in summary["firing_rates"].values())


def test_evaluate_finds_the_same(run, capsys):
    before = json.loads((run / "summary.json").read_text())
    after = training.evaluate(run)
    assert after.test_accuracy == before["test_accuracy"]
    assert after.firing_rates == before["firing_rates"]
    assert cli.main(["evaluate", str(run)]) == 0
    assert f"{after.test_accuracy:.2%} of 360 images" in capsys.readouterr().out


def test_a_representation_network_trains_too(tmp_path):
    arguments = ["train", "digits", "--epochs", "1", "--timesteps", "0", "--seed", "3", "--runs", str(tmp_path)]
    assert cli.main(arguments) == 0
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["firing_rates"] == {}
    assert json.loads((folder / "recipe.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "A recipe is one of"),
        (["train", "digits", "--epochs", "0"], "epochs must be 1 or more. Received epochs=0"),
        (["train", "digits", "--timesteps", "-1"], "timesteps must be 0 or more"),
        (["evaluate", "no/such/run"], "is not the folder of a finished run"),
    ],
)
def test_mistakes_end_with_a_message_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_second_get_two_folders(tmp_path):
    folders = {training.new_run_folder(recipes.get("digits"), tmp_path) for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)


def test_a_threshold_that_is_no_number_ends_training_with_its_layers_name(tmp_path):
    recipe = dataclasses.replace(recipes.get("digits"), learning_rate=float("inf"), epochs=1, timesteps=2)
    with pytest.raises(ValueError, match=r"^The threshold of IFSpike '\w+' is no longer a finite number"):
        training.train(recipe, tmp_path, verbose=0)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]

"""Run folders: what they hold, what is refused, what a comparison shows."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess

import keras
import numpy as np
import pytest

import keras_dsr
from keras_dsr import recipes, runs
from keras_dsr.runs import Stage, Summary

RECIPE = recipes.get("digits")
SUMMARY = Summary(
    test_accuracy=0.975,
    test_examples=360,
    validation_accuracy=0.98,
    epoch=3,
    firing_rates={"neuron1": 0.25, "head_neuron": 0.05},
    thresholds={"neuron1": 2.5, "head_neuron": 0.5},
    timesteps=8,
    seconds=12.4,
    seconds_saved=-3.5,
    stages=(Stage("representation", 0, 2, 2.4, 0.9, None), Stage("spiking", 8, 3, 10.0, 0.98, 0.85)),
)


def finished(folder, recipe=RECIPE, summary=SUMMARY):
    """A folder as of a finished run, with an empty model."""
    runs.open_folder(recipe, folder)
    (folder / "model.keras").touch()
    runs.write(folder / "summary.json", summary.to_json())
    return folder


@pytest.mark.parametrize(
    "summary",
    [
        SUMMARY,
        dataclasses.replace(SUMMARY, seconds_saved=None, validation_accuracy=None, stages=SUMMARY.stages[1:]),
        dataclasses.replace(SUMMARY, firing_rates={}, stages=()),
    ],
)
def test_summaries_survive_json(summary):
    assert Summary.from_json(summary.to_json()) == summary


def test_a_new_folder_is_made_and_says_its_recipe(tmp_path):
    folder = tmp_path / "a" / "b"
    runs.open_folder(RECIPE, folder)
    assert [file.name for file in folder.iterdir()] == ["recipe.json"]
    assert runs.recipe_of(folder) == RECIPE


def test_an_empty_folder_may_be_there_already(tmp_path):
    runs.open_folder(RECIPE, tmp_path)
    assert runs.recipe_of(tmp_path) == RECIPE


def test_the_folder_of_the_same_recipe_is_opened_again_with_all_that_is_in_it(tmp_path):
    runs.open_folder(RECIPE, tmp_path)
    (tmp_path / "checkpoint.npz").write_text("much")
    (tmp_path / "notes.txt").write_text("mine")
    runs.open_folder(dataclasses.replace(RECIPE), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.npz", "notes.txt", "recipe.json"]


def test_the_run_of_another_recipe_is_refused_by_what_differs(tmp_path):
    runs.open_folder(RECIPE, tmp_path)
    before = (tmp_path / "recipe.json").read_bytes()
    with pytest.raises(ValueError, match="is the run of another recipe") as caught:
        runs.open_folder(dataclasses.replace(RECIPE, seed=3, threshold=1.5), tmp_path)
    assert f"threshold={RECIPE.threshold} and received 1.5, seed=0 and received 3." in str(caught.value)
    assert "epochs" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert (tmp_path / "recipe.json").read_bytes() == before


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "summary.json"])
def test_a_folder_of_other_files_is_refused_and_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="has files in it but is not the folder of a run"):
        runs.open_folder(RECIPE, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_is_removed(tmp_path):
    runs.open_folder(RECIPE, tmp_path)
    for name in ("checkpoint.npz", "best.npz", "history.csv", "summary.json", "model.keras", "figure.png"):
        (tmp_path / f".4711-{name}").write_text("half a")
    for name in (".mine", ".a-note", ".2024-plans"):
        (tmp_path / name).write_text("mine")
    runs.open_folder(RECIPE, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".2024-plans", ".a-note", ".mine", "recipe.json"]


def test_a_run_that_was_killed_as_it_wrote_its_first_file_can_begin_again(tmp_path):
    (tmp_path / ".4711-recipe.json").write_text("{")
    runs.open_folder(RECIPE, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


def test_new_folders_of_one_second_have_names_of_their_own(tmp_path):
    folders = {runs.new_folder(RECIPE, tmp_path / "runs") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() and re.match(r"digits-\d{8}-\d{6}", folder.name) for folder in folders)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no recipe\.json"):
        runs.recipe_of(tmp_path)
    for name in ("recipe.json", "model.keras", "summary.json"):
        with pytest.raises(FileNotFoundError, match=rf"not the folder of a finished run: it has no {name}"):
            runs.summary_of(tmp_path)
        (tmp_path / name).touch()


def test_a_summary_is_read_back(tmp_path):
    assert runs.summary_of(finished(tmp_path)) == SUMMARY


def test_history_may_gain_columns(tmp_path):
    rows = [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-17, "val_loss": 2.0}, {"extra": "a,b", "epoch": 3}]
    path = tmp_path / "history.csv"
    runs.write_history(path, rows[:1])
    runs.write_history(path, rows)
    read = list(csv.DictReader(path.read_text().splitlines()))
    assert list(read[0]) == ["epoch", "loss", "val_loss", "extra"]
    assert [row["epoch"] for row in read] == ["1", "2", "3"]
    assert float(read[0]["loss"]) == 0.1 + 0.2
    assert [row["val_loss"] for row in read] == ["", "2.0", ""]
    assert read[2]["extra"] == "a,b"


def test_the_environment_says_where_a_run_was_made():
    environment = json.loads(runs.json_text(runs.environment()))
    assert environment["backend"] == keras.backend.backend()
    assert environment["versions"]["keras_dsr"] == keras_dsr.__version__
    assert environment["versions"]["keras"] == keras.__version__
    assert environment["versions"]["numpy"] == np.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", environment["started"])
    commit = environment["git_commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


@pytest.fixture
def installed_in(monkeypatch):
    """Has the package look as if it stood in another folder."""

    def move(folder):
        (folder / "__init__.py").touch()
        monkeypatch.setattr(keras_dsr, "__file__", str(folder / "__init__.py"))

    return move


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_git_commit_is_that_of_the_packages_checkout(tmp_path, installed_in):
    installed_in(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", "__init__.py")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert runs.environment()["git_commit"] == commit
    (tmp_path / "__init__.py").write_text("changed = True")
    assert runs.environment()["git_commit"] == f"{commit}-dirty"


def test_a_package_that_no_checkout_tracks_has_no_commit(tmp_path, installed_in, monkeypatch):
    """Such as one in a virtual environment, within some other project's checkout."""
    git(tmp_path, "init")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "first")
    installed_in(tmp_path)
    assert runs.environment()["git_commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.environment()["git_commit"] is None


def test_a_comparison_shows_what_differs_and_what_came_out(tmp_path):
    hybrid = dataclasses.replace(RECIPE, threshold=1.5, hybrid_epochs=2, summary="another")
    plain = dataclasses.replace(SUMMARY, seconds_saved=None, test_accuracy=0.5, validation_accuracy=None)
    one = finished(tmp_path / "one", RECIPE, plain)
    other = finished(tmp_path / "other", hybrid)
    heading, rows = runs.compare([one, other])
    assert heading == ["", str(one), str(other)]
    assert rows == [
        ["threshold", "2.0", "1.5"],
        ["hybrid_epochs", "0", "2"],
        ["state", "finished", "finished"],
        ["test accuracy", "50.00%", "97.50%"],
        ["validation accuracy", "-", "98.00%"],
        ["mean firing rate", "0.1500", "0.1500"],
        ["training time", "12 s", "12 s"],
        ["saved by hybrid training", "-", "-4 s"],
    ]


def test_a_comparison_shows_how_far_unfinished_runs_came(tmp_path):
    one = finished(tmp_path / "one", summary=dataclasses.replace(SUMMARY, firing_rates={}, seconds_saved=None))
    begun, under_way = tmp_path / "begun", tmp_path / "under_way"
    for folder in (begun, under_way):
        runs.open_folder(RECIPE, folder)
    runs.write_history(under_way / "history.csv", [{"epoch": 1}, {"epoch": 2}])
    _, rows = runs.compare([one, begun, under_way])
    assert rows[0] == ["state", "finished", "unfinished, 0 epochs", "unfinished, 2 epochs"]
    assert ["mean firing rate", "-", "-", "-"] in rows
    assert ["test accuracy", "97.50%", "-", "-"] in rows


def test_a_comparison_is_of_two_runs_or_more(tmp_path):
    folder = finished(tmp_path / "run")
    with pytest.raises(ValueError, match=r"compare takes two or more run folders\. Received 1"):
        runs.compare([folder])
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run"):
        runs.compare([folder, tmp_path])


def test_a_run_goes_on_with_the_backend_it_was_begun_with(tmp_path):
    runs.check_environment(tmp_path)
    path = tmp_path / "environment.json"
    begun = path.read_text()
    runs.check_environment(tmp_path)
    assert path.read_text() == begun
    path.write_text(begun.replace(f'"backend": "{keras.backend.backend()}"', '"backend": "another"'))
    with pytest.raises(ValueError, match=r"begun with the Keras backend 'another'.*set KERAS_BACKEND=another"):
        runs.check_environment(tmp_path)


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    refused = pytest.raises(BlockingIOError, match="being trained in by another process")
    with runs.locked(tmp_path), refused, runs.locked(tmp_path):
        pass
    with runs.locked(tmp_path):
        pass


def test_a_reworded_summary_does_not_make_another_recipe(tmp_path):
    recipe = recipes.get("digits")
    runs.open_folder(recipe, tmp_path)
    runs.open_folder(dataclasses.replace(recipe, summary="Said in other words"), tmp_path)

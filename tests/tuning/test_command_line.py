"""`keras-dsr tune`: what it makes of its words."""

from __future__ import annotations

import json

import pytest
from tuning.small import search

from keras_dsr import cli, recipes, tuning
from keras_dsr.recipes import Recipe
from keras_dsr.tuning import Choice, Range, results
from keras_dsr.tuning.search import Trial, open_folder, write_trial


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Searches that were asked for, with made-up results of two trials."""
    calls = []

    def tune(search, folder, **arguments):
        calls.append((search, folder, arguments))
        open_folder(search, folder)
        for number, accuracy in enumerate((0.9, 0.8)):
            settings = {"threshold": 1.0 + number, "alpha": 0.5}
            done = Trial(
                number=number,
                settings=settings,
                state="finished",
                validation_accuracy=accuracy,
                timesteps=8,
                firing_rate=0.125,
            )
            write_trial(folder, done)
        return results.write(search, folder, tuning.read_trials(folder))

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_recipe_alone_is_enough(asked, tmp_path, capsys):
    assert cli.main(["tune", "digits"]) == 0
    ((made, folder, arguments),) = asked
    assert made == tuning.Search(recipe=recipes.get("digits"), space=tuning.default_space(recipes.get("digits")))
    assert (made.trials, made.tuner) == (20, "bayesian")
    assert folder.as_posix() == "runs/digits-search"
    assert arguments == {"workers": 1, "data_dir": None, "address": None, "download": False}
    out = capsys.readouterr().out
    assert "90.00%" in out
    assert "80.00%" not in out
    assert "keras-dsr train runs/digits-search/best.json" in out
    best = Recipe.from_json((tmp_path / folder / "best.json").read_text())
    assert (best.name, best.threshold) == ("digits-tuned", 1.0)


def test_all_can_be_said(asked, tmp_path):
    recipe = tmp_path / "mine.json"
    recipe.write_text(json.dumps({"name": "mine", "summary": "Mine", "timesteps": 4}))
    words = f"tune {recipe} --epochs 3 --set batch_size=64 --space threshold=1:4:log --space timesteps=2,4 --trials 7"
    more = (
        f"--workers 3 --tuner random --seed 5 --folder {tmp_path / 'there'} --data-dir D --address host:8700 --download"
    )
    assert cli.main([*words.split(), *more.split()]) == 0
    ((made, folder, arguments),) = asked
    assert (made.recipe.name, made.recipe.epochs, made.recipe.batch_size) == ("mine", 3, 64)
    assert made.space == (Range("threshold", 1.0, 4.0, "log"), Choice("timesteps", (2, 4)))
    assert (made.trials, made.tuner, made.seed) == (7, "random", 5)
    assert folder == tmp_path / "there"
    assert arguments["download"]
    assert (arguments["workers"], arguments["address"], str(arguments["data_dir"])) == (3, "host:8700", "D")


def test_a_search_goes_on_from_its_folder(asked, tmp_path):
    made = search()
    open_folder(made, tmp_path / "there")
    assert cli.main(["tune", "--folder", str(tmp_path / "there"), "--trials", "9"]) == 0
    assert asked[0][0].trials == 9
    assert asked[0][0].space == made.space


def test_workers_join(monkeypatch, tmp_path):
    joined = []
    monkeypatch.setattr(tuning, "join", lambda *arguments, **named: joined.append((arguments, named)))
    assert cli.main(["tune", "--folder", str(tmp_path), "--join", "host:8700", "--workers", "4"]) == 0
    assert joined == [((tmp_path, "host:8700"), {"workers": 4, "data_dir": None})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tune", "tune takes a recipe, such as digits, or --folder"),
        ("tune digit", "There is no recipe 'digit'. Did you mean 'digits'"),
        ("tune digits --space treshold=1:2", "no setting 'treshold' to search. Did you mean 'threshold'"),
        ("tune digits --space threshold=4:1", "finite low bound below a finite high one"),
        ("tune digits --trials 0", "1 trial or more"),
        ("tune --folder nowhere", "nowhere is not the folder of a search"),
        ("tune --folder nowhere --epochs 3", "goes on with the settings that it has"),
        ("tune digits --join host:1", "pass --folder, and no recipe"),
        ("tune --join host:1", "pass --folder, and no recipe"),
        ("tune --folder a --join host:1 --trials 9 --space alpha", "Leave out --trials, --space."),
        ("tune --folder a --join host:1 --set batch_size=8 --epochs 3", "Leave out --set, --epochs."),
        ("tune --folder a --join host:1 --tuner random --seed 0", "Leave out --tuner, --seed."),
        ("tune --folder a --join host:1 --address a:1 --download", "Leave out --address, --download."),
    ],
)
def test_what_is_wrong_is_told(words, message, asked, capsys):
    assert cli.main(words.split()) == 1
    assert message in capsys.readouterr().err
    assert not asked


def test_what_was_stopped_can_go_on(monkeypatch, tmp_path, capsys):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", stop)
    assert cli.main(["tune", "digits", "--folder", str(tmp_path)]) == 130
    assert f"go on with: keras-dsr tune --folder {tmp_path}" in capsys.readouterr().err

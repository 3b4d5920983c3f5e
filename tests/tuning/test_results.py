"""What a search found, from records worked by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tuning.small import TINY, search

from keras_dsr import tuning
from keras_dsr.recipes import Recipe
from keras_dsr.tuning import Choice, results
from keras_dsr.tuning.search import Search, Trial, open_folder, write_trial


def trial(number, accuracy, timesteps, rate, state="finished", **settings):
    settings = {"threshold": 1.0 + number, "alpha": 0.5, **settings}
    return Trial(
        number=number,
        settings=settings,
        state=state,
        epochs=4,
        validation_accuracy=accuracy,
        timesteps=timesteps,
        firing_rate=rate,
    )


TRIALS = [
    trial(0, 0.90, 8, 0.10),  # none beats it
    trial(1, 0.95, 8, 0.20),  # none beats it: the most accurate that fires so little
    trial(2, 0.95, 8, 0.30),  # beaten by 1
    trial(3, 0.80, 2, 0.30),  # none beats it: the fewest steps
    trial(4, 0.80, 4, 0.30),  # beaten by 3
    trial(5, 0.99, 8, None, state="stopped"),
    Trial(number=6, settings={"threshold": 9.0, "alpha": 0.5}, state="failed", message="ValueError: nan | inf"),
    trial(7, 0.90, 8, 0.10),  # as good as 0, in all: neither beats the other
]


def test_the_best_is_the_most_accurate_that_fires_least():
    assert tuning.best(TRIALS).number == 1
    assert tuning.best([TRIALS[4], TRIALS[3]]).number == 3
    assert tuning.best([TRIALS[7], TRIALS[0]]).number == 0


def test_those_that_none_beats():
    assert [each.number for each in tuning.pareto(TRIALS)] == [1, 0, 7, 3]
    assert tuning.pareto(TRIALS[5:7]) == []


def test_without_a_finished_trial_the_failures_are_told():
    with pytest.raises(ValueError, match=r"No trial of 2 trained to its end\. 1 failed: ValueError: nan \| inf"):
        tuning.best(TRIALS[5:7])


def test_the_best_becomes_a_recipe():
    recipe = tuning.best_recipe(search(), TRIALS)
    assert (recipe.name, recipe.threshold, recipe.alpha) == ("digits-tuned", 2.0, 0.5)
    assert "threshold=2, alpha=0.5: best of 8 trials, 95.00% of the validation examples" in recipe.summary
    assert recipe.widths == TINY.widths
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_everything_is_written(tmp_path):
    recipe = results.write(search(), tmp_path, TRIALS)
    assert Recipe.from_json((tmp_path / "best.json").read_text()) == recipe
    fields = json.loads((tmp_path / "results.json").read_text())
    assert fields["pareto"] == [1, 0, 7, 3]
    assert [Trial(**each) for each in fields["trials"]] == TRIALS
    text = (tmp_path / "results.md").read_text()
    front, everything = text.split("## All trials")
    assert "8 trials (6 finished, 1 stopped, 1 failed)" in front
    assert "Best: trial 1, 95.00%, threshold=2, alpha=0.5." in front
    assert "| 3 | 4 | 0.5 | 2 | 0.3000 | 0.600 | 80.00% | 4 | finished |" in front
    assert front.count("| finished |") == 4
    assert "| 6 | 9 | 0.5 |  |  |  |  | 0 | failed: ValueError: nan / inf |" in everything
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_where_nothing_finished_the_table_is_written(tmp_path):
    with pytest.raises(ValueError, match="No trial of 2"):
        results.write(search(), tmp_path, TRIALS[5:7])
    assert "1 stopped, 1 failed" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    "texts",
    [("alpha",), ("alpha", "threshold=1:9:log"), ("alpha", "weight_bits=none,8"), ("alpha", "threshold", "timesteps")],
)
def test_every_kind_of_space_is_drawn(texts, tmp_path):
    trials = [
        trial(0, 0.90, 8, 0.10, weight_bits=None),
        trial(1, 0.95, 4, 0.20, weight_bits=8),
        Trial(number=2, settings={"alpha": 0.1, "threshold": 3.0, "weight_bits": 8, "timesteps": 2}, state="failed"),
    ]
    results.draw(tmp_path / "plot.png", search(space=texts), trials, ("defaults", 0.5))
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_settings_that_trials_lack_are_left_out(tmp_path, monkeypatch):
    """One that no trial has, altogether; one that a trial lacks, for that trial, on the map of both settings, too."""
    figure = []
    subplot = Figure.add_subplot

    def heard(self, *arguments, **named):
        figure.append(self)
        return subplot(self, *arguments, **named)

    monkeypatch.setattr(Figure, "add_subplot", heard)
    lacks = dataclasses.replace(trial(2, 0.80, 4, 0.2), settings={"threshold": 2.0})
    trials = [trial(0, 0.90, 4, 0.10), trial(1, 0.95, 4, 0.20), lacks]
    results.draw(tmp_path / "plot.png", search(space=("threshold=1:4:log", "dropout=0:0.5", "alpha")), trials)
    axes = [each for each in figure[-1].axes if each.get_title(loc="left")]  # and so no color bar
    assert [each.get_title(loc="left") for each in axes] == [
        "Accuracy over threshold",
        "Accuracy over alpha",
        "threshold and alpha",
        "Accuracy against firing rate",
    ]
    assert [len(each.collections[0].get_offsets()) for each in axes] == [3, 2, 2, 3]


def test_whole_numbers_have_no_fractions_between_them(tmp_path, monkeypatch):
    located = {}
    set_label = Axes.set_xlabel

    def heard(self, label, *arguments, **named):
        located[label] = self.xaxis
        return set_label(self, label, *arguments, **named)

    monkeypatch.setattr(Axes, "set_xlabel", heard)
    trials = [trial(0, 0.90, 4, 0.10, weight_bits=4), trial(1, 0.95, 4, 0.20, weight_bits=5)]
    results.draw(tmp_path / "plot.png", search(space=("weight_bits=4,5", "alpha")), trials)
    assert all(tick == round(tick) for tick in located["weight_bits"].get_ticklocs())
    assert any(tick != round(tick) for tick in located["alpha"].get_ticklocs())


def test_every_trial_is_drawn_over_every_setting(tmp_path, monkeypatch):
    """Settings that are none, and trials that failed after an epoch, too."""
    points = []
    scatter = Axes.scatter

    def counted(self, x, y, *arguments, **named):
        if named.get("marker") in ("o", "v", "x"):
            points.append((list(np.atleast_1d(x)), list(np.atleast_1d(y))))
        return scatter(self, x, y, *arguments, **named)

    monkeypatch.setattr(Axes, "scatter", counted)
    trials = [
        trial(0, 0.90, 8, 0.10, weight_bits=None),
        trial(1, 0.95, 4, 0.20, weight_bits=8),
        trial(2, 0.80, 4, None, state="stopped", weight_bits=None),
        trial(3, 0.70, 4, None, state="failed", weight_bits=None),
        trial(4, None, 4, None, state="failed", weight_bits=8),
    ]
    results.draw(tmp_path / "plot.png", search(space=("weight_bits=none,8",)), trials)
    over_bits = points[:3]  # finished, stopped, failed
    assert [x for x, _ in over_bits] == [["none", "8"], ["none"], ["none", "8"]]
    assert over_bits[2][1][0] == 0.70
    assert over_bits[2][1][1] < 0.70


def test_one_number_of_time_steps_is_not_drawn(tmp_path, monkeypatch):
    headings = []
    set_title = Axes.set_title

    def heard(self, label, *arguments, **named):
        headings.append(label)
        return set_title(self, label, *arguments, **named)

    monkeypatch.setattr(Axes, "set_title", heard)
    rate, steps = "Accuracy against firing rate", "Accuracy against time steps"
    unfinished = dataclasses.replace(trial(1, 0.80, 8, None, state="stopped"), settings={"timesteps": 8})
    for second, space, expected in (
        (trial(1, 0.80, 4, 0.20), ("alpha",), ["Accuracy over alpha", rate]),
        (trial(1, 0.80, 8, 0.20), ("alpha",), ["Accuracy over alpha", rate, steps]),
        (trial(1, 0.80, 8, 0.20), ("alpha", "timesteps"), ["Accuracy over alpha", rate, steps]),
        (unfinished, ("timesteps",), ["Accuracy over timesteps", rate]),
    ):
        headings.clear()
        results.draw(tmp_path / "plot.png", search(space=space), [trial(0, 0.90, 4, 0.10), second])
        assert headings == expected


def test_settings_of_several_values_stay_what_they_are(tmp_path):
    space = (Choice("widths", ((4,), (4, 8))),)
    made = Search(recipe=TINY, space=space, trials=1)
    open_folder(made, tmp_path)
    done = trial(0, 0.9, 2, 0.1)
    write_trial(tmp_path, dataclasses.replace(done, settings={"widths": (4, 8)}))
    recipe = results.write(made, tmp_path, tuning.read_trials(tmp_path))
    assert recipe.widths == (4, 8)
    assert Recipe.from_json((tmp_path / "best.json").read_text()) == recipe


def test_a_trial_in_a_line():
    assert results.line(TRIALS[1]) == (
        "trial 1, threshold=2, alpha=0.5: finished after 4 epochs, validation accuracy 95.00%, firing rate 0.200"
    )
    assert results.line(TRIALS[6]) == "trial 6, threshold=9, alpha=0.5: failed: ValueError: nan | inf"

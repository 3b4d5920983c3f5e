"""Trials with real training: what is recorded, that a killed one goes on, and that the test part stays out of it."""

from __future__ import annotations

import csv
import dataclasses

import pytest
from tuning.small import TINY, Killed, search

from keras_dsr import checkpoints, data, recipes, runs, training
from keras_dsr.data.parts import ArrayPart, DataSet
from keras_dsr.tuning import trials
from keras_dsr.tuning.search import Trial, open_folder, read_trial, run_folder, write_trial
from keras_dsr.tuning.trials import run_trial

SETTINGS = {"threshold": 1.0, "alpha": 0.5}
# JAX compiles each network for seconds: it gets the tests in which it could differ.
TENSORFLOW_ONLY = pytest.mark.tensorflow_only


def rows(folder, number=0):
    """The history of a trial, without what a clock said."""
    text = (run_folder(folder, number) / "history.csv").read_text()
    return [{n: value for n, value in row.items() if n != "seconds"} for row in csv.DictReader(text.splitlines())]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A search with one trial that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    made = search()
    open_folder(made, folder)
    return made, folder, run_trial(made, folder, 0, SETTINGS, worker="one")


def test_a_trial_is_recorded(unbroken):
    made, folder, trial = unbroken
    history = rows(folder)
    assert trial == read_trial(folder, 0)
    assert (trial.state, trial.epochs, trial.timesteps, trial.worker, trial.attempts) == ("finished", 4, 2, "one", 1)
    assert trial.settings == SETTINGS
    assert trial.validation_accuracy == float(history[-1]["val_accuracy"])
    assert 0 < trial.firing_rate < 1
    assert trial.thresholds == {
        name.removeprefix("threshold_"): float(value)
        for name, value in history[-1].items()
        if name.startswith("threshold_")
    }
    assert trial.seconds > 0
    assert runs.recipe_of(run_folder(folder, 0)) == made.trial_recipe(SETTINGS)


def test_an_ended_trial_is_not_trained_again(unbroken, monkeypatch):
    made, folder, trial = unbroken
    monkeypatch.setattr(training, "fit", None)
    assert run_trial(made, folder, 0, SETTINGS, worker="other") == trial


def test_the_run_is_finished_by_training_its_recipe(unbroken):
    """`best.json`, or a trial's folder, leads to the very network that was chosen."""
    made, folder, trial = unbroken
    before = rows(folder)
    summary = training.train(made.trial_recipe(SETTINGS), run_folder(folder, 0), verbose=0)
    assert rows(folder) == before
    assert summary.validation_accuracy == trial.validation_accuracy
    assert summary.test_examples == 360


@TENSORFLOW_ONLY
def test_the_test_part_is_not_touched(tmp_path, monkeypatch):
    stored = DataSet.stored_batches
    looked_at = []

    def watched(self, part, *arguments, **named):
        looked_at.append("test" if part is self.test else "other")
        return stored(self, part, *arguments, **named)

    monkeypatch.setattr(DataSet, "stored_batches", watched)
    trials._loaded.cache_clear()
    made = search()
    open_folder(made, tmp_path)
    trial = run_trial(made, tmp_path, 0, SETTINGS, worker="one")
    assert trial.state == "finished"
    assert looked_at
    assert "test" not in looked_at
    training.train(made.trial_recipe(SETTINGS), run_folder(tmp_path, 0), verbose=0)
    assert "test" in looked_at


@TENSORFLOW_ONLY
@pytest.mark.parametrize("selection", ["best", "last"])
def test_a_killed_trial_goes_on_to_the_same(selection, unbroken, tmp_path, monkeypatch):
    made, whole, expected = unbroken
    if selection == "best":
        made = search(recipe=dataclasses.replace(TINY, selection="best"))
    open_folder(made, tmp_path)
    save, calls = checkpoints.save, []

    def killing(path, *arguments):
        save(path, *arguments)
        if path.name == "checkpoint.npz":
            calls.append(path)
            if len(calls) == 2:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", killing)
        with pytest.raises(Killed):
            run_trial(made, tmp_path, 0, SETTINGS, worker="one")
    begun = read_trial(tmp_path, 0)
    assert (begun.state, begun.attempts) == ("running", 1)
    trial = run_trial(made, tmp_path, 0, SETTINGS, worker="one")
    assert rows(tmp_path) == rows(whole)
    assert (trial.state, trial.epochs, trial.attempts) == ("finished", 4, 1)
    accuracies = [float(row["val_accuracy"]) for row in rows(tmp_path)]
    assert trial.validation_accuracy == (max(accuracies) if selection == "best" else accuracies[-1])
    if selection == "last":
        assert trial.firing_rate == expected.firing_rate


@TENSORFLOW_ONLY
def test_a_trial_that_was_stopped_goes_on_in_another(unbroken, tmp_path):
    made, whole, expected = unbroken
    open_folder(made, tmp_path)
    first = run_trial(made, tmp_path, 3, SETTINGS, worker="one", until=1)
    assert (first.state, first.epochs) == ("stopped", 1)
    assert first.validation_accuracy == float(rows(whole)[0]["val_accuracy"])
    assert first.firing_rate is None
    last = run_trial(made, tmp_path, 5, SETTINGS, worker="other", until=4, parent=3)
    assert rows(tmp_path, 5) == rows(whole)
    assert len(rows(tmp_path, 3)) == 1
    assert dataclasses.replace(last, number=0, worker="one", seconds=expected.seconds, kept=0) == expected


@TENSORFLOW_ONLY
def test_hybrid_trials_are_stopped_in_their_last_stage(tmp_path):
    hybrid = dataclasses.replace(TINY, hybrid_epochs=2, hybrid_learning_rate=0.05, epochs=3)
    made = search(recipe=hybrid)
    open_folder(made, tmp_path)
    reported = []

    def report(epoch, accuracy):
        reported.append((epoch, accuracy))
        return epoch == 2

    trial = run_trial(made, tmp_path, 0, SETTINGS, worker="one", report=report)
    assert (trial.state, trial.epochs) == ("stopped", 2)
    assert [row["stage"] for row in rows(tmp_path)] == ["representation"] * 2 + ["spiking"] * 2
    assert [epoch for epoch, _ in reported] == [1, 2]
    assert trial.seconds == sum(row["seconds"] for row in trials._rows(run_folder(tmp_path, 0)))
    assert trial.validation_accuracy == reported[-1][1] == float(rows(tmp_path)[-1]["val_accuracy"])


def test_a_trial_that_diverges_is_failed(tmp_path):
    made = search(
        recipe=dataclasses.replace(TINY, optimizer="sgd", momentum=0.0), space=("learning_rate=0.01:1e30:log",)
    )
    open_folder(made, tmp_path)
    trial = run_trial(made, tmp_path, 0, {"learning_rate": 1e30}, worker="one")
    assert trial.state == "failed"
    assert "no longer" in trial.message
    assert trial == read_trial(tmp_path, 0)


def test_settings_that_no_network_has_are_a_failed_trial(opened, made_up):
    made, folder = opened()
    trial = run_trial(made, folder, 0, {"threshold": -1.0, "momentum": -1.0}, worker="one")
    assert trial.state == "failed"
    assert "momentum must be 0 or more" in trial.message
    assert not made_up.calls


def test_a_trial_at_which_processes_die_is_given_up(opened, made_up):
    made, folder = opened()

    def out_of_memory(recipe, epoch):
        if epoch == 2:
            raise Killed

    made_up.before_epoch = out_of_memory
    for attempt in range(1, trials.MOST_ATTEMPTS + 1):
        with pytest.raises(Killed):
            run_trial(made, folder, 0, SETTINGS, worker="one")
        # The first attempt came two epochs far; those after it did not get further.
        assert read_trial(folder, 0).attempts == max(1, attempt - 1)
    with pytest.raises(Killed):
        run_trial(made, folder, 0, SETTINGS, worker="one")
    trial = run_trial(made, folder, 0, SETTINGS, worker="one")
    assert trial.state == "failed"
    assert trial.message == "The process that trained it died 3 times in the same epoch."
    assert len(made_up.calls) == trials.MOST_ATTEMPTS + 1


@pytest.mark.parametrize("error", [OSError("no space left"), ImportError("no tonic")])
def test_what_would_meet_all_trials_ends_the_process(error, opened, made_up):
    made, folder = opened()

    def fail(recipe, epoch):
        raise error

    made_up.before_epoch = fail
    for _ in range(trials.MOST_ATTEMPTS + 2):
        with pytest.raises(type(error)):
            run_trial(made, folder, 0, SETTINGS, worker="one")
    assert (read_trial(folder, 0).state, read_trial(folder, 0).attempts) == ("running", 0)


def test_epochs_of_earlier_stages_count_as_well(opened, made_up, monkeypatch):
    """A hybrid training that dies once in each epoch gets on, though none of its last stage is kept yet."""
    made, folder = opened()
    kept = []
    monkeypatch.setattr(trials, "_rows", lambda path: list(kept))

    def die(recipe, epoch):
        kept.append({"stage": "representation", "val_accuracy": 0.1, "seconds": 1.0})
        raise Killed

    made_up.before_epoch = die
    for _ in range(trials.MOST_ATTEMPTS + 2):
        with pytest.raises(Killed):
            run_trial(made, folder, 0, SETTINGS, worker="one")
        trial = read_trial(folder, 0)
        assert (trial.attempts, trial.epochs) == (1, 0)


def test_a_trial_that_another_process_trains_is_waited_for(opened, made_up, monkeypatch):
    made, folder = opened()
    waited = []

    def wait(seconds):
        waited.append(seconds)
        write_trial(folder, Trial(number=0, settings=SETTINGS, state="finished", worker="other"))

    monkeypatch.setattr(trials.time, "sleep", wait)

    def taken(recipe, epoch):
        raise BlockingIOError("is being trained in by another process")

    made_up.before_epoch = taken
    assert run_trial(made, folder, 0, SETTINGS, worker="one").worker == "other"
    assert len(waited) == 1


def test_a_recipe_without_validation_is_refused(tmp_path):
    digits = data.load("digits")
    empty = dataclasses.replace(digits, validation=ArrayPart(digits.train.x[:0], digits.train.labels[:0]))
    with pytest.raises(ValueError, match=r"compared on validation examples, and 'digits' has none"):
        training.fit(TINY, tmp_path / "run", loaded=empty)


def test_the_data_set_is_loaded_once(monkeypatch):
    loads = []
    monkeypatch.setattr(training, "load", lambda recipe, data_dir: loads.append(recipe) or object())
    trials._loaded.cache_clear()
    one = trials._loaded(trials._data_of(TINY), None)
    assert trials._loaded(trials._data_of(dataclasses.replace(TINY, threshold=3.0, alpha=0.1)), None) is one
    assert trials._loaded(trials._data_of(dataclasses.replace(TINY, train_examples=80)), None) is not one
    assert len(loads) == 2
    # Images do not depend on the number of time steps; event frames do.
    assert trials._data_of(dataclasses.replace(TINY, timesteps=7)) == trials._data_of(TINY)
    events = recipes.get("digits-events")
    assert trials._data_of(dataclasses.replace(events, timesteps=7)) != trials._data_of(events)
    recipe = dataclasses.replace(events, sensor=(5, 6), skip_corrupt=True, size=(7, 8), slicing="time", validation=0.2)
    kept = trials._data_of(recipe)
    for name in ("data", "timesteps", "size", "slicing", "sensor", "skip_corrupt", "validation", "selection"):
        assert getattr(kept, name) == getattr(recipe, name)
    trials._loaded.cache_clear()

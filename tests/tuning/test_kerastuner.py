"""KerasTuner's tuners with our searches: what they draw, what is kept, and what failures and kills lead to.

What is ours relies on methods of KerasTuner's oracles that it does not document; where one of these tests fails after
an update of KerasTuner, look at `keras_dsr.tuning.kerastuner._Durable` first.
"""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import keras
import numpy as np
import pytest

keras_tuner = pytest.importorskip("keras_tuner")

from tuning.small import TINY, Killed, search  # noqa: E402

from keras_dsr import data, recipes, training, tuning  # noqa: E402
from keras_dsr.data.parts import ArrayPart  # noqa: E402
from keras_dsr.layers.neurons import neurons_of  # noqa: E402
from keras_dsr.tuning import kerastuner  # noqa: E402
from keras_dsr.tuning.search import hyperband_trials  # noqa: E402

TENSORFLOW_ONLY = pytest.mark.tensorflow_only


def tuner(made, folder):
    return kerastuner._SearchTuner(made, folder, None)


@pytest.mark.parametrize("name", ["random", "bayesian"])
def test_a_search_draws_as_many_trials_as_it_has(name, opened, made_up):
    made, folder = opened(
        tuner=name, trials=9, space=("threshold=0.5:8:log", "alpha", "timesteps=2:4", "neuron=if,lif")
    )
    tuner(made, folder).search()
    trials = tuning.read_trials(folder)
    assert [trial.number for trial in trials] == list(range(9))
    assert {trial.state for trial in trials} == {"finished"}
    for trial in trials:
        assert 0.5 <= trial.settings["threshold"] <= 8
        assert 0.1 <= trial.settings["alpha"] <= 0.9
        assert trial.settings["timesteps"] in (2, 3, 4)
        assert trial.settings["neuron"] in ("if", "lif")
        assert trial.validation_accuracy == pytest.approx(1 - abs(trial.settings["alpha"] - 0.5))
    assert len({trial.settings["threshold"] for trial in trials}) == 9


def test_the_seed_decides_what_is_drawn(tmp_path, made_up):
    drawn = []
    for place, seed in enumerate((0, 0, 1)):
        made = search(tuner="random", trials=3, seed=seed)
        tuning.search.open_folder(made, tmp_path / str(place))
        tuner(made, tmp_path / str(place)).search()
        drawn.append([trial.settings for trial in tuning.read_trials(tmp_path / str(place))])
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.filterwarnings("ignore:The optimal value found for dimension:UserWarning")
def test_bayesian_search_finds_the_maximum(opened, made_up):
    made, folder = opened(trials=10, space=("alpha=0.1:0.9",))
    tuner(made, folder).search()
    assert abs(tuning.best(tuning.read_trials(folder)).settings["alpha"] - 0.5) < 0.05


def test_hyperband_lets_the_best_go_on(opened, made_up):
    made, folder = opened(tuner="hyperband", trials=13, recipe=dataclasses.replace(TINY, epochs=9))
    tuner(made, folder).search()
    trials = tuning.read_trials(folder)
    assert len(trials) == 13
    assert [trial.epochs for trial in trials] == [1] * 9 + [3] * 3 + [9]
    assert trials[-1].state == "finished"
    assert all((trial.state == "finished") == (trial.epochs == 9) for trial in trials)
    # Nobody trained an epoch twice: those that went on began with what they had.
    by_settings = {}
    for name, epoch in made_up.trained:
        by_settings.setdefault(json.dumps(trials[int(name)].settings), []).append(epoch)
    assert any(len(epochs) > 1 for epochs in by_settings.values())
    assert all(epochs == list(range(len(epochs))) for epochs in by_settings.values())
    # The three of nine that went on are the three with the highest accuracy.
    ranked = sorted(trials[:9], key=lambda trial: -trial.validation_accuracy)
    gone_on = [json.dumps(trial.settings) for trial in trials[9:]]
    assert gone_on == [json.dumps(trial.settings) for trial in (*ranked[:3], ranked[0])]


@pytest.mark.parametrize("epochs", [2, 3, 4, 9, 10, 27, 30, 81, 200])
def test_hyperband_needs_as_many_trials_as_its_oracle_gives_before_a_full_one(epochs):
    least = hyperband_trials(epochs)
    made = search(tuner="hyperband", trials=least, recipe=dataclasses.replace(TINY, epochs=epochs))
    known = kerastuner.oracle(made)
    (bracket,) = known._brackets
    sizes = [known._get_size(bracket["bracket_num"], place) for place in range(len(bracket["rounds"]))]
    assert least == sum(sizes[:-1]) + 1


def test_hyperband_begins_no_bracket_with_the_trials_of_another(opened):
    """A worker that comes while others are at a round waits, where too few trials are left to begin something else."""
    made, folder = opened(tuner="hyperband", trials=13, recipe=dataclasses.replace(TINY, epochs=9))
    known = tuner(made, folder).oracle
    given = [known.create_trial(f"worker{number}") for number in range(9)]
    state = known._seed_state, known._current_bracket
    assert known.create_trial("late").status == "IDLE"
    assert (known._seed_state, known._current_bracket) == state
    known.max_trials = 100
    assert known.create_trial("late").status == "RUNNING"
    assert len({trial.trial_id for trial in given}) == 9


def test_hyperband_goes_on_with_as_many_rounds_as_its_trials_need(opened, made_up):
    made, folder = opened(tuner="hyperband", trials=13, recipe=dataclasses.replace(TINY, epochs=9))
    tuner(made, folder).search()
    more = dataclasses.replace(made, trials=1000)
    assert tuner(more, folder).oracle.hyperband_iterations == 1000


@pytest.mark.filterwarnings("ignore:The optimal value found for dimension:UserWarning")
def test_failures_are_recorded_and_the_search_goes_on(opened, made_up):
    made, folder = opened(tuner="bayesian", trials=12)

    def diverge(recipe, epoch):
        if len(made_up.calls) <= 7:
            raise ValueError("threshold of IFSpike 'neuron1' is no longer a finite number")

    made_up.before_epoch = diverge
    tuner(made, folder).search()
    trials = tuning.read_trials(folder)
    assert [trial.state for trial in trials] == ["failed"] * 7 + ["finished"] * 5
    assert "neuron1" in trials[0].message
    # What draws settings learns of them: nothing is known yet, so it is 0.
    known = tuner(made, folder).oracle
    scores = [trial.score for _, trial in sorted(known.trials.items())]
    assert scores == [0.0] * 7 + [trial.validation_accuracy for trial in trials[7:]]


@pytest.mark.filterwarnings("ignore:The optimal value found for dimension:UserWarning")
def test_a_bayesian_search_learns_where_trials_fail(opened, made_up):
    """All trials with a learning rate above 0.01 diverge; those below are the better the nearer they are to that."""
    made, folder = opened(trials=16, space=("learning_rate=1e-4:1:log",))

    def diverge(recipe, epoch):
        if recipe.learning_rate > 0.01:
            raise ValueError("loss is no longer a finite number")

    made_up.before_epoch = diverge
    made_up.accuracy = lambda recipe: 0.5 + 0.1 * np.log10(recipe.learning_rate / 1e-4)
    tuner(made, folder).search()
    trials = tuning.read_trials(folder)
    drawn = [trial.settings["learning_rate"] for trial in trials]
    assert len(set(drawn)) == len(drawn)
    assert [trial.state == "failed" for trial in trials] == [rate > 0.01 for rate in drawn]
    first, later = trials[:8], trials[8:]
    assert any(trial.state == "failed" for trial in first)
    assert sum(trial.state == "failed" for trial in later) <= len(later) // 2
    # The oracle knows them by the worst of those before.
    known = tuner(made, folder).oracle.trials
    for trial in trials:
        before = [each.validation_accuracy for each in trials[: trial.number] if each.state == "finished"]
        if trial.state == "failed":
            (score,) = [each.score for name, each in known.items() if int(name) == trial.number]
            assert score == min(before, default=0.0)


def test_a_point_that_was_drawn_before_is_drawn_at_random(opened, monkeypatch):
    made, folder = opened(space=("alpha=0.1:0.9",))
    known = tuner(made, folder).oracle
    first = known.create_trial("one").hyperparameters.values
    monkeypatch.setattr(
        keras_tuner.oracles.BayesianOptimizationOracle,
        "populate_space",
        lambda self, trial_id: {"status": "RUNNING", "values": dict(first)},
    )
    assert known.create_trial("other").hyperparameters.values != first


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_nothing_is_drawn_above_the_upper_bound(scale):
    hp = keras_tuner.HyperParameters()
    space = [tuning.Range("timesteps", 2, 8, scale), tuning.Range("threshold", 0.5, 8.0, scale)]
    kerastuner.declare(hp, space)
    for probability, expected in ((0.0, (2, 0.5)), (1.0, (8, 8.0))):
        hp.values = {each.name: each.prob_to_value(probability) for each in hp.space}
        drawn = kerastuner.declare(hp, space)
        assert (drawn["timesteps"], drawn["threshold"]) == pytest.approx(expected)


def test_a_chief_that_is_started_again_leaves_others_their_trials(opened):
    made, folder = opened()
    known = tuner(made, folder)
    for worker in ("worker0", "there", "gone"):
        known.oracle.create_trial(worker)
    known.save()
    tuning.search.beat_of(folder, "there").touch()
    again = tuner(made, folder).oracle
    assert {worker: trial.trial_id for worker, trial in again.ongoing_trials.items()} == {"there": "1"}
    assert sorted(again._retry_queue) == ["0", "2"]
    assert {again.create_trial(worker).trial_id for worker in ("worker0", "worker1", "there")} == {"0", "1", "2"}


def test_a_killed_search_goes_on_with_the_trial_it_was_at(opened, made_up):
    made, folder = opened(trials=5)

    def kill(recipe, epoch):
        if len(made_up.calls) == 3 and epoch == 2:
            raise Killed

    made_up.before_epoch = kill
    with pytest.raises(Killed):
        tuner(made, folder).search()
    before = tuning.read_trials(folder)
    made_up.before_epoch = lambda recipe, epoch: None
    tuner(made, folder).search()
    trials = tuning.read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 5
    assert trials[2].settings == before[2].settings
    assert made_up.calls == ["0000", "0001", "0002", "0002", "0003", "0004"]
    assert len(made_up.trained) == 5 * 4


@pytest.mark.filterwarnings("ignore:The use case of calling:DeprecationWarning")  # of one that is told once more
@pytest.mark.parametrize("write", range(1, 17))
def test_files_are_whole_wherever_a_kill_comes(write, opened, made_up, monkeypatch):
    """The process dies as it writes the n-th file, which is half written then."""
    made, folder = opened(tuner="random", trials=3)
    whole, times = Path.write_text, iter(range(1, 1000))

    def torn(self, text, *arguments, **named):
        if "engine" in self.parts and next(times) == write:
            whole(self, text[: len(text) // 2])
            raise Killed
        return whole(self, text, *arguments, **named)

    def begin():
        begun = tuner(made, folder)
        begun.save()  # as a chief does before it gives out trials
        begun.search()
        return begun

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", torn)
        with pytest.raises(Killed):
            begin()
    again = begin()
    trials = tuning.read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 3
    assert len(made_up.trained) == 3 * 4
    assert [trial.status for trial in again.oracle.trials.values()] == ["COMPLETED"] * 3


def test_what_would_meet_all_trials_ends_the_search(opened, made_up):
    made, folder = opened(trials=3)

    def full(recipe, epoch):
        raise OSError("No space left on device")

    made_up.before_epoch = full
    with pytest.raises(keras_tuner.errors.FatalError, match="No space left on device"):
        tuner(made, folder).search()


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"chief cannot listen at 127\.0\.0\.1:{port}: Address already in use.*another"
        ):
            kerastuner.check_free("127.0.0.1", port)
    kerastuner.check_free("127.0.0.1", port)


def test_a_worker_is_not_taken_for_the_chief(opened):
    made, folder = opened()
    with pytest.raises(ValueError, match=r"whoever has chief in its name\. Received 'chiefs-worker0'"):
        kerastuner.serve(made, folder, "chiefs-worker0", "127.0.0.1:1")


@pytest.fixture(scope="module")
def hypermodel():
    return tuning.DSRHyperModel(TINY, tuning.parse(TINY, ["threshold=1:4:log", "alpha", "timesteps=2,3"]))


@TENSORFLOW_ONLY
def test_a_hypermodel_builds_what_was_drawn(hypermodel):
    hp = keras_tuner.HyperParameters()
    hypermodel.build(hp)
    assert {each.name: type(each).__name__ for each in hp.space} == {
        "threshold": "Float",
        "alpha": "Float",
        "timesteps": "Choice",
    }
    hp.values = {"threshold": 3.25, "alpha": 0.75, "timesteps": 3}
    model = hypermodel.build(hp)
    layers = neurons_of(model)
    assert {(layer.initial_threshold, layer.alpha) for layer in layers} == {(3.25, 0.75)}
    assert layers[0].timesteps == 3
    again = hypermodel.build(hp)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@TENSORFLOW_ONLY
def test_a_hypermodel_of_event_frames_has_as_many_as_steps():
    events = recipes.get("digits-events")
    model = tuning.DSRHyperModel(events, tuning.parse(events, ["timesteps=2,4"]))
    hp = keras_tuner.HyperParameters()
    hp.values = {"timesteps": 4}
    assert model.build(hp).input_shape == (None, 4, *model._loaded.input_shape[1:])


@TENSORFLOW_ONLY
def test_a_hypermodel_trains_in_the_precision_of_the_recipe():
    recipe = dataclasses.replace(TINY, precision="mixed_bfloat16")
    hypermodel = tuning.DSRHyperModel(recipe)
    before = keras.config.dtype_policy()
    model = hypermodel.build(keras_tuner.HyperParameters())
    assert {layer.dtype_policy.name for layer in model.layers} >= {"mixed_bfloat16"}
    assert keras.config.dtype_policy() == before


@TENSORFLOW_ONLY
def test_a_hypermodel_that_diverges_is_a_failed_trial():
    recipe = dataclasses.replace(TINY, optimizer="sgd", momentum=0.0, learning_rate=1e30)
    hypermodel = tuning.DSRHyperModel(recipe)
    hp = keras_tuner.HyperParameters()
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="no longer"):
        hypermodel.fit(hp, hypermodel.build(hp), verbose=0)


@TENSORFLOW_ONLY
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_kerastuners_own_tuners_take_it(hypermodel, tmp_path):
    made = keras_tuner.Hyperband(
        hypermodel, "val_accuracy", max_epochs=2, factor=2, directory=tmp_path, project_name="own", seed=1
    )
    made.oracle.max_trials = 2
    made.search(verbose=0)
    trials = list(made.oracle.trials.values())
    assert [trial.status for trial in trials] == ["COMPLETED"] * 2
    assert all(0 <= trial.score <= 1 for trial in trials)
    assert isinstance(made.get_best_models()[0], keras.Model)


@TENSORFLOW_ONLY
def test_the_schedule_is_that_of_all_epochs(hypermodel):
    hp = keras_tuner.HyperParameters()
    model = hypermodel.build(hp)
    steps = 40 // 16
    history = hypermodel.fit(hp, model, epochs=3, initial_epoch=2, verbose=0)
    assert history.epoch == [2]
    assert int(model.optimizer.iterations) == 3 * steps
    # A cosine from the recipe's rate to 0 over four epochs.
    expected = TINY.learning_rate * (1 + np.cos(np.pi * 3 / 4)) / 2
    assert float(model.optimizer.learning_rate) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "space", "message"),
    [
        (
            dataclasses.replace(TINY, hybrid_epochs=2),
            None,
            r"trained in one stage\. Received hybrid_epochs=2.*keras-dsr",
        ),
        (TINY, [tuning.Range("tau", 1.0, 2.0)], r"tau is a setting of LIF neurons"),
    ],
)
def test_a_hypermodel_refuses_what_it_cannot_train(recipe, space, message):
    with pytest.raises(ValueError, match=message):
        tuning.DSRHyperModel(recipe, space)


def test_a_hypermodel_needs_validation_examples(monkeypatch):
    digits = data.load("digits")
    empty = dataclasses.replace(digits, validation=ArrayPart(digits.train.x[:0], digits.train.labels[:0]))
    monkeypatch.setattr(training, "load", lambda *arguments, **named: empty)
    with pytest.raises(ValueError, match=r"compared on validation examples, and 'digits' has none"):
        tuning.DSRHyperModel(TINY)

"""Optuna's workers: what they draw and prune, and what kills leave behind."""

from __future__ import annotations

import dataclasses

import pytest

optuna = pytest.importorskip("optuna")

from tuning.small import TINY, Killed  # noqa: E402

from keras_dsr import tuning  # noqa: E402
from keras_dsr.tuning import optuna_study  # noqa: E402

SPACE = ("threshold=0.5:8:log", "alpha", "timesteps=2:4", "weight_bits=none,8")


def study(folder):
    return optuna.load_study(study_name="search", storage=optuna_study._storage(folder))


def states(folder):
    return [trial.state.name for trial in study(folder).trials]


def test_a_search_draws_as_many_trials_as_it_has(opened, made_up):
    made, folder = opened(tuner="optuna", trials=8, space=SPACE)
    optuna_study.work(made, folder, "worker0")
    trials = tuning.read_trials(folder)
    assert [trial.number for trial in trials] == list(range(8))
    for trial in trials:
        assert 0.5 <= trial.settings["threshold"] <= 8
        assert trial.settings["timesteps"] in (2, 3, 4)
        assert trial.settings["weight_bits"] in (None, 8)
    told = {trial.user_attrs["number"]: trial.value for trial in study(folder).trials if trial.state.name == "COMPLETE"}
    assert told == {trial.number: trial.validation_accuracy for trial in trials if trial.state == "finished"}
    optuna_study.work(made, folder, "worker0")
    assert tuning.read_trials(folder) == trials


def test_what_is_worse_than_the_median_is_stopped(opened, made_up):
    made, folder = opened(tuner="optuna", trials=14, recipe=dataclasses.replace(TINY, epochs=6))
    optuna_study.work(made, folder, "worker0")
    trials = tuning.read_trials(folder)
    stopped = [trial for trial in trials if trial.state == "stopped"]
    assert stopped
    assert not {trial.number for trial in stopped} & set(range(5))  # the first have nothing to be compared with
    assert all(2 <= trial.epochs < 6 for trial in stopped)
    assert {trial.state for trial in trials} == {"stopped", "finished"}
    pruned = [trial.user_attrs["number"] for trial in study(folder).trials if trial.state.name == "PRUNED"]
    assert pruned == [trial.number for trial in stopped]
    # And is worse at its last epoch than half of those before it were then.
    for trial in stopped:
        others = sorted(1 - abs(each.settings["alpha"] - 0.5) for each in trials[: trial.number])
        assert 1 - abs(trial.settings["alpha"] - 0.5) < others[len(others) // 2]


def test_what_is_drawn_depends_on_the_seed_and_not_on_who_draws(tmp_path, made_up):
    from tuning.small import search

    drawn = []
    for place, (seed, workers) in enumerate([(0, ("one",)), (0, ("other",)), (7, ("one",))]):
        made = search(tuner="optuna", trials=3, seed=seed)
        tuning.search.open_folder(made, tmp_path / str(place))
        for worker in workers:
            optuna_study.work(made, tmp_path / str(place), worker)
        drawn.append([trial.settings for trial in tuning.read_trials(tmp_path / str(place))])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({str(settings) for settings in drawn[0]}) == 3


def test_a_failed_trial_is_failed_in_the_study_too(opened, made_up):
    made, folder = opened(tuner="optuna", trials=4)

    def diverge(recipe, epoch):
        if len(made_up.calls) == 2:
            raise ValueError("no longer finite")

    made_up.before_epoch = diverge
    optuna_study.work(made, folder, "worker0")
    assert [trial.state for trial in tuning.read_trials(folder)] == ["finished", "failed", "finished", "finished"]
    assert states(folder) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_killed_worker_goes_on_with_its_trial(opened, made_up):
    made, folder = opened(tuner="optuna", trials=3)

    def kill(recipe, epoch):
        if len(made_up.calls) == 2 and epoch == 2:
            raise Killed

    made_up.before_epoch = kill
    with pytest.raises(Killed):
        optuna_study.work(made, folder, "worker0")
    before = tuning.read_trials(folder)[1]
    # Another worker leaves it alone.
    optuna_study.work(made, folder, "worker1")
    assert [trial.state for trial in tuning.read_trials(folder)] == ["finished", "running", "finished"]
    optuna_study.work(made, folder, "worker0")
    after = tuning.read_trials(folder)[1]
    assert (after.state, after.settings, after.worker) == ("finished", before.settings, "worker0")
    # It is one trial to Optuna, too, with all that it reported before and after.
    assert states(folder) == ["COMPLETE"] * 3
    assert sorted(study(folder).trials[1].intermediate_values) == [1, 2, 3, 4]
    assert len(made_up.trained) == 3 * 4


@pytest.mark.parametrize("place", ["ask", "set_user_attr", "tell"])
def test_a_kill_between_record_and_study_loses_nothing(place, opened, made_up, monkeypatch):
    made, folder = opened(tuner="optuna", trials=3)
    owner = optuna.trial.Trial if place == "set_user_attr" else optuna.study.Study
    original, times = getattr(owner, place), iter(range(1, 1000))

    def killed(*arguments, **named):
        if next(times) == 2:
            raise Killed
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, killed)
        with pytest.raises(Killed):
            optuna_study.work(made, folder, "worker0")
    optuna_study.work(made, folder, "worker0")
    trials = tuning.read_trials(folder)
    assert [trial.state for trial in trials] == ["finished"] * 3
    told = {trial.user_attrs["number"]: trial.value for trial in study(folder).trials if trial.state.name == "COMPLETE"}
    assert told == {trial.number: trial.validation_accuracy for trial in trials}
    assert len(made_up.trained) == 3 * 4


def test_a_trial_whose_worker_does_not_come_back_is_told_to_the_study(opened, made_up, monkeypatch):
    made, folder = opened(tuner="optuna", trials=2)

    def killed(*arguments, **named):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "tell", killed)
        with pytest.raises(Killed):
            optuna_study.work(made, folder, "worker1")
    assert states(folder) == ["RUNNING"]
    optuna_study.mend(folder)
    assert states(folder) == ["COMPLETE"]
    optuna_study.work(made, folder, "worker0")
    assert states(folder) == ["COMPLETE"] * 2


def test_a_torn_journal_is_mended(opened, made_up):
    made, folder = opened(tuner="optuna", trials=2)
    optuna_study.work(made, folder, "worker0")
    journal = folder / "engine" / "optuna.log"
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    journal.with_name("optuna.log.lock").symlink_to(journal)
    optuna_study.mend(folder)
    assert journal.read_bytes() == whole
    made = dataclasses.replace(made, trials=3)
    optuna_study.work(made, folder, "worker0")
    assert states(folder) == ["COMPLETE"] * 3

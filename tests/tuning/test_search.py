"""The folder of a search: settings, records, and who takes which trial."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from tuning.small import TINY, search

from keras_dsr import tuning
from keras_dsr.tuning.search import Search, Trial, claim_trial, open_folder, read_trial, write_trial


def test_a_search_goes_through_json():
    made = search(space=("threshold=1:8:log", "timesteps=2,3", "weight_bits=none,8"), tuner="optuna", seed=3)
    assert Search.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": "grid"}, r"tuner is one of \('random', 'bayesian', 'hyperband', 'optuna'\)"),
        ({"trials": 0}, r"1 trial or more\. Received trials=0"),
        ({"seed": -1}, r"seed must be 0 or more"),
        (
            {"recipe": dataclasses.replace(TINY, epochs=1), "tuner": "hyperband"},
            r"after a few of their epochs.*epochs=1",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        search(**settings)


def test_a_folder_is_of_one_search(tmp_path):
    made = search()
    open_folder(made, tmp_path)
    reworded = dataclasses.replace(TINY, summary="In other words")
    open_folder(dataclasses.replace(made, recipe=reworded), tmp_path)
    open_folder(dataclasses.replace(made, trials=9), tmp_path)
    assert tuning.search_of(tmp_path).trials == 9
    for other in (dataclasses.replace(made, trials=9, tuner="random"), made):
        with pytest.raises(ValueError, match=r"folder of another search\. Expected (tuner='bayesian'|trials=9)"):
            open_folder(other, tmp_path)
    with pytest.raises(ValueError, match=r"Expected threshold=2\.0 and received 3\.0"):
        open_folder(search(recipe=dataclasses.replace(TINY, threshold=3.0), trials=9), tmp_path)


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not the folder of a search"):
        open_folder(search(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not the folder of a search: it has no search\.json"):
        tuning.search_of(tmp_path)


def test_records_are_read_in_order(opened):
    _, folder = opened()
    written = [Trial(number=number, settings={"alpha": number / 10}, thresholds={"a": 1.0}) for number in (2, 0, 10)]
    for trial in written:
        write_trial(folder, trial)
    (folder / "trials" / "0002").mkdir()
    assert tuning.read_trials(folder) == sorted(written, key=lambda trial: trial.number)
    assert read_trial(folder, 1) is None


def test_each_trial_is_taken_once(opened):
    _, folder = opened()
    taken = []

    def take(worker):
        while (trial := claim_trial(folder, worker, 40)) is not None:
            taken.append((trial.number, worker))
            write_trial(folder, dataclasses.replace(trial, state="finished"))

    threads = [threading.Thread(target=take, args=(f"worker{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for number, _ in taken) == list(range(40))
    assert {trial.number: trial.worker for trial in tuning.read_trials(folder)} == dict(taken)
    assert not [file for file in (folder / "trials").iterdir() if file.name.startswith(".")]


def test_the_trial_that_a_worker_was_at_comes_first(opened):
    _, folder = opened()
    assert claim_trial(folder, "one", 3).number == 0
    other = claim_trial(folder, "other", 3)
    assert other.number == 1
    assert claim_trial(folder, "other", 3) == other
    write_trial(folder, dataclasses.replace(other, state="failed"))
    assert claim_trial(folder, "other", 3).number == 2
    assert claim_trial(folder, "third", 3) is None

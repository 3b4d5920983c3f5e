"""The folder of a search: settings, records, and who takes which trial."""

from __future__ import annotations

import dataclasses
import json
import os
import threading

import keras
import pytest
from tuning.small import TINY, search

from keras_dsr import runs, tuning
from keras_dsr.tuning import search as search_module
from keras_dsr.tuning.search import Search, Trial, check_environment, claim_trial, open_folder, read_trial, write_trial


def test_a_search_goes_through_json():
    made = search(space=("threshold=1:8:log", "timesteps=2,3", "weight_bits=none,8"), tuner="optuna", seed=3)
    assert Search.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tuner": "grid"}, r"tuner is one of \('random', 'bayesian', 'hyperband', 'optuna'\)"),
        ({"trials": 0}, r"1 trial or more\. Received trials=0"),
        (
            {"recipe": dataclasses.replace(TINY, epochs=9), "tuner": "hyperband", "trials": 12},
            r"none of fewer than 13 trials to its end\. Received trials=12",
        ),
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


@pytest.mark.parametrize("what", ["keras_dsr", "keras", "keras-tuner", "backend"])
def test_other_versions_are_refused(what, opened):
    made, folder = opened()
    path = folder / "environment.json"
    fields = json.loads(path.read_text())
    (fields if what == "backend" else fields["versions"])[what] = "0.1"
    path.write_text(json.dumps(fields))
    message = rf"{folder} was begun with {what} 0\.1 and received (\d+\.|tensorflow|jax|None).*Install those here"
    for begin in (open_folder, check_environment):
        with pytest.raises(ValueError, match=message):
            begin(made, folder)
    fields["versions"]["optuna"] = "0.1"  # another tuner's
    (fields if what == "backend" else fields["versions"])[what] = {
        **runs.environment()["versions"],
        "backend": keras.backend.backend(),
        "keras-tuner": search_module.importlib.metadata.version("keras-tuner"),
    }[what]
    path.write_text(json.dumps(fields))
    open_folder(made, folder)


@pytest.mark.parametrize(
    ("text", "expected"), [("host:80", ("host", 80)), ("10.0.0.7:8700", ("10.0.0.7", 8700)), ("[::1]:80", ("::1", 80))]
)
def test_an_address_is_host_and_port(text, expected):
    assert search_module.split_address(text) == expected


def test_who_showed_no_life_for_long_is_not_heard_of(opened):
    _, folder = opened()
    assert not search_module.heard_of(folder, "one")
    beat = search_module.beat_of(folder, "one")
    beat.touch()
    assert search_module.heard_of(folder, "one")
    past = beat.stat().st_mtime - search_module.SILENT - 1
    os.utime(beat, (past, past))
    assert not search_module.heard_of(folder, "one")


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

"""What a search is, and its folder: the settings, and a record and a run folder for each trial.

The folder of a search holds `search.json`; for trial 7 the record `trials/0007.json` and the run folder `trials/0007`,
that of an unfinished run, as the test part is not looked at; `engine`, which is the tuner's own; `logs`, one a process;
and, at the end, `results.md`, `results.json`, `results.png` and `best.json`. Each file appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import keras_dsr
from keras_dsr import runs
from keras_dsr.recipes import Recipe
from keras_dsr.tuning import space as spaces
from keras_dsr.tuning.space import Parameter

KERAS_TUNERS = ("random", "bayesian", "hyperband")
TUNERS = (*KERAS_TUNERS, "optuna")
# What a round of Hyperband leaves of its trials: one in three, as in its paper and as KerasTuner's default.
HYPERBAND_FACTOR = 3
# Names of the workers that `keras-dsr tune` starts itself; other machines' are named after them.
OURS = re.compile(r"worker\d+")
# Seconds after which a worker that shows no life is taken for gone; each shows it every ten.
SILENT = 180
ENDED = ("finished", "stopped", "failed")
# A trial at which the process died so often in a row, say for want of memory, is recorded as failed.
MOST_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """The settings of a search.

    Args:
        recipe: What all trials have in common.
        space: What is varied, see `keras_dsr.tuning.parse`.
        tuner: "random", "bayesian" (a Gaussian process) or "hyperband" (many trials of few epochs, of which the best go
            on) of KerasTuner, or "optuna" (tree-structured Parzen estimator; trials that are worse than the median of
            those before are stopped).
        trials: How many, 1 or more. With Hyperband one that goes on with more epochs is a trial of its own.
        seed: Seed of the tuner. The trials' networks have the recipe's.

    Raises:
        ValueError: if the tuner is unknown, there is no trial, or too few for Hyperband to train one to its end, or
            the space does not pass `keras_dsr.tuning.check`.
    """

    recipe: Recipe
    space: tuple[Parameter, ...]
    tuner: str = "bayesian"
    trials: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tuner not in TUNERS:
            raise ValueError(f"tuner is one of {TUNERS}. Received tuner={self.tuner!r}.")
        if not self.trials >= 1:
            raise ValueError(f"A search has 1 trial or more. Received trials={self.trials!r}.")
        if not self.seed >= 0:
            raise ValueError(f"seed must be 0 or more. Received seed={self.seed!r}.")
        if self.tuner == "hyperband" and not self.recipe.epochs > 1:
            raise ValueError(
                f"Hyperband compares trials after a few of their epochs. Received epochs={self.recipe.epochs!r}; set "
                "more, or choose another tuner."
            )
        if self.tuner == "hyperband" and self.trials < (least := hyperband_trials(self.recipe.epochs)):
            raise ValueError(
                f"Hyperband with epochs={self.recipe.epochs!r} trains none of fewer than {least} trials to its end. "
                f"Received trials={self.trials!r}; set trials to {least} or more, lower epochs, or another tuner."
            )
        spaces.check(self.recipe, self.space)

    def trial_recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of a trial.

        Raises:
            ValueError: if a setting is out of its range.
        """
        return dataclasses.replace(spaces.apply(self.recipe, settings), name=f"{self.recipe.name}-tuned")

    def to_json(self) -> str:
        """The search as JSON, which `from_json` reads."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return runs.json_text(
            {**own, "recipe": json.loads(self.recipe.to_json()), "space": spaces.to_fields(self.space)}
        )

    @classmethod
    def from_json(cls, text: str) -> Search:
        """The search that `to_json` wrote."""
        fields = json.loads(text)
        recipe = Recipe.from_json(json.dumps(fields.pop("recipe")))
        return cls(recipe=recipe, space=spaces.from_fields(fields.pop("space")), **fields)


def hyperband_trials(epochs: int) -> int:
    """How many trials a search with Hyperband needs at least, so that one is trained to its end.

    Its first bracket is the one that stops most: a trial of all epochs comes after all of its shorter rounds.

    Args:
        epochs: Epochs of a full trial, 2 or more.

    Reference: Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 2018,
    Algorithm 1, with the sizes of rounds that KerasTuner gives them.
    """
    factor = HYPERBAND_FACTOR
    rounds = 0
    while factor**rounds <= epochs:
        rounds += 1
    last = math.ceil(1 + math.log(epochs, factor)) / rounds
    return sum(math.ceil(last * factor**place) for place in range(1, rounds)) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What is known of a trial.

    Args:
        number: Its number, from 0.
        settings: What the tuner drew; empty until it has.
        state: "running"; "finished", when it trained all epochs; "stopped", when the tuner thought the rest not worth
            it; or "failed".
        worker: Who trains it, or did.
        attempts: How often its training was begun without that an epoch came to its end in between.
        epochs: Epochs trained, of the last stage.
        kept: Epochs of all stages that were kept when its training was begun last.
        validation_accuracy: Of the epochs so far, by the recipe's selection; `None` if none came to its end.
        firing_rate: Spikes per neuron and time step on validation examples, the mean over neuron layers; `None` but for
            finished trials.
        timesteps: Number N of time steps.
        thresholds: V_th of each neuron layer, of finished trials.
        seconds: Wall time of the epochs, of all stages.
        message: Why it failed.
    """

    number: int
    settings: dict[str, Any]
    state: str = "running"
    worker: str = ""
    attempts: int = 0
    epochs: int = 0
    kept: int = 0
    validation_accuracy: float | None = None
    firing_rate: float | None = None
    timesteps: int | None = None
    thresholds: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""

    @property
    def told(self) -> str:
        """The settings as text."""
        return ", ".join(f"{name}={shown(value)}" for name, value in self.settings.items())

    @property
    def ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.state in ENDED

    @property
    def given_up(self) -> bool:
        """Whether it failed because the process that trained it died again and again, without an error of its own."""
        return self.state == "failed" and self.attempts > MOST_ATTEMPTS


def open_folder(search: Search, folder: Path) -> None:
    """Makes a folder ready for a search: a new one, or one in which this very search goes on, maybe with more trials.

    Raises:
        ValueError: if the folder is that of another search.
        FileExistsError: if the folder has files but is not that of a search.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "search.json").is_file():
        before = search_of(folder)
        same = dataclasses.replace(before, trials=search.trials)
        if _plain(same) != _plain(search) or search.trials < before.trials:
            raise ValueError(
                f"{folder} is the folder of another search. Expected {_differences(before, search)}. Name another "
                f"folder, or go on with the settings that it has: keras-dsr tune --folder {folder}."
            )
    elif any(folder.iterdir()):
        raise FileExistsError(f"{folder} has files in it but is not the folder of a search. Name another folder.")
    for name in ("trials", "engine", "logs"):
        (folder / name).mkdir(exist_ok=True)
    check_environment(search, folder)
    runs.write(folder / "search.json", search.to_json())


def check_environment(search: Search, folder: Path) -> None:
    """Writes down where a search is begun; later, and on other machines, makes sure that versions are the same.

    Raises:
        ValueError: if keras_dsr, Keras, the tuner or the backend is another: trials could not be compared, or the
            tuner's files not be read.
    """
    tuner = "keras-tuner" if search.tuner in KERAS_TUNERS else "optuna"
    try:
        installed = importlib.metadata.version(tuner)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    path = folder / "environment.json"
    if not path.is_file():
        begun = runs.environment()
        runs.write(path, runs.json_text({**begun, "versions": {**begun["versions"], tuner: installed}}))
        return
    before = json.loads(path.read_text())
    expected = {**before["versions"], "backend": before["backend"]}
    own = {
        "keras_dsr": keras_dsr.__version__,
        "keras": keras.__version__,
        tuner: installed,
        "backend": keras.backend.backend(),
    }
    differ = [
        f"{name} {expected.get(name)} and received {value}"
        for name, value in own.items()
        if value != expected.get(name)
    ]
    if differ:
        raise ValueError(
            f"All processes of a search have the same versions. {folder} was begun with {', '.join(differ)}. Install "
            "those here (KERAS_BACKEND sets the backend), or begin another search in a new folder."
        )


def search_of(folder: Path) -> Search:
    """The search of a folder.

    Raises:
        FileNotFoundError: if it is not the folder of a search.
    """
    path = folder / "search.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a search: it has no search.json. Begin one with keras-dsr tune RECIPE; "
            "machines that work on one search share its folder."
        )
    return Search.from_json(path.read_text())


def beat_of(folder: Path, worker: str) -> Path:
    """The file by which a process of a search shows that it lives: it is touched every few seconds."""
    return folder / "logs" / f"{worker}.beat"


def heard_of(folder: Path, worker: str) -> bool:
    """Whether a process of a search, maybe on another machine, showed life within the last `SILENT` seconds."""
    try:
        last = beat_of(folder, worker).stat().st_mtime
    except FileNotFoundError:
        return False
    # By the clock that stamps the files of this disk, which may be another machine's.
    now = folder / "logs" / "now"
    now.touch()
    return now.stat().st_mtime - last < SILENT


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; a host that is an IPv6 address has brackets there, and none in what is returned.

    Raises:
        ValueError: if it is none.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not (bare and colon and port.isdecimal() and 0 < int(port) < 2**16) or (":" in bare) != (host != bare):
        raise ValueError(f"An address is HOST:PORT, such as 192.168.0.7:8700 or [fd00::7]:8700. Received {address!r}.")
    return bare, int(port)


def run_folder(folder: Path, number: int) -> Path:
    """The run folder of a trial."""
    return folder / "trials" / f"{number:04d}"


def read_trial(folder: Path, number: int) -> Trial | None:
    """The record of a trial; `None` if there is none yet."""
    try:
        fields = json.loads(_record(folder, number).read_text())
    except FileNotFoundError:
        return None
    # Settings such as widths are tuples, and lists in JSON.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["settings"].items()}
    return Trial(**{**fields, "settings": settings})


def read_trials(folder: Path) -> list[Trial]:
    """The records of all trials so far, in order."""
    numbers = sorted(int(path.stem) for path in (folder / "trials").glob("[0-9]*.json"))
    return [trial for trial in (read_trial(folder, number) for number in numbers) if trial is not None]


def write_trial(folder: Path, trial: Trial) -> None:
    """Writes the record of a trial."""
    runs.write(_record(folder, trial.number), runs.json_text(dataclasses.asdict(trial)))


def claim_trial(folder: Path, worker: str, trials: int) -> Trial | None:
    """Takes the next trial that is not taken, among processes that do the same; `None` if all are.

    One that the worker had taken before it died comes first.
    """
    known = {trial.number: trial for trial in read_trials(folder)}
    for trial in known.values():
        if trial.worker == worker and not trial.ended:
            return trial
    for number in range(trials):
        if number in known:
            continue
        trial = Trial(number=number, settings={}, worker=worker)
        beside = folder / "trials" / f".{secrets.token_hex(8)}-claim"
        runs.write(beside, runs.json_text(dataclasses.asdict(trial)))  # on the disk ahead of its name
        try:
            os.link(beside, _record(folder, number))  # unlike a renaming, it fails where another was faster
        except FileExistsError:
            continue
        finally:
            beside.unlink()
        return trial
    return None


def shown(value: Any) -> str:
    """A setting's value for people; nothing for `None`."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _record(folder: Path, number: int) -> Path:
    return run_folder(folder, number).with_suffix(".json")


def _plain(search: Search) -> Search:
    return dataclasses.replace(search, recipe=dataclasses.replace(search.recipe, summary=""))


def _differences(one: Search, other: Search) -> str:
    def fields(search: Search) -> dict[str, Any]:
        own = {field.name: getattr(search, field.name) for field in dataclasses.fields(search)}
        return {**dataclasses.asdict(own.pop("recipe")), **own}

    before, after = fields(one), fields(other)
    return ", ".join(
        f"{name}={before[name]!r} and received {after[name]!r}"
        for name in before
        if name != "summary" and before[name] != after[name]
    )

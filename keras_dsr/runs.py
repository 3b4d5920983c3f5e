"""Run folders: what a training leaves behind, file by file.

A run folder holds `recipe.json`, `environment.json`, `checkpoint.npz` and `history.csv` from its first epoch on,
`best.npz` where the best epoch is the result, and `model.keras`, `summary.json` and `figure.png` once it is finished.
Where several processes train, `calibrated.npz` is there from the end of a hybrid training's first stage to its end.
Each file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

import keras_dsr
from keras_dsr.distribution.base import check_backend, check_devices
from keras_dsr.files import replacing
from keras_dsr.recipes import Recipe

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# What `replacing` leaves of a process that was killed as it wrote.
_LEFT_OVER = re.compile(r"\.\d+-.+\.(json|npz|csv|png|keras|html)")
# What runs were trained on that do not say so.
_ONE_DEVICE = types.MappingProxyType({"strategy": "one", "replicas": 1, "processes": 1})


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of a training took.

    Args:
        name: "representation", "quantized" or "spiking".
        timesteps: Number N of time steps; 0 for the representation network.
        epochs: Passes over the training part.
        seconds: Wall time, validation included.
        validation_accuracy: Of the stage's result, on the validation part; `None` if that is empty.
        calibrated_accuracy: For a stage that starts from calibrated thresholds: validation accuracy before its first
            update; else `None`.
    """

    name: str
    timesteps: int
    epochs: int
    seconds: float
    validation_accuracy: float | None
    calibrated_accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a run.

    Args:
        test_accuracy: Part of the test examples that the final network gets right, looked at once.
        test_examples: Their number.
        validation_accuracy: The same for the validation examples; `None` if there are none.
        epoch: Number of the epoch, from 1 and within the last stage, whose weights are the result.
        firing_rates: Spikes per neuron and time step on test examples, for each neuron layer.
        thresholds: V_th of each neuron layer.
        timesteps: Number N of time steps.
        seconds: Wall time of the training, of all epochs together, without the imports.
        seconds_saved: By hybrid training: what the epochs of the representation network would have taken with spikes,
            less what they took, quantized ones included; `None` for a training of one stage.
        stages: What each stage took.
    """

    test_accuracy: float
    test_examples: int
    validation_accuracy: float | None
    epoch: int
    firing_rates: dict[str, float]
    thresholds: dict[str, float]
    timesteps: int
    seconds: float
    seconds_saved: float | None
    stages: tuple[Stage, ...]

    def to_json(self) -> str:
        """The summary as JSON, which `from_json` reads."""
        return json_text(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """The summary that `to_json` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "stages": tuple(Stage(**stage) for stage in fields["stages"])})


def new_folder(recipe: Recipe, parent: Path) -> Path:
    """Makes a folder for a run, named by recipe and time, that did not exist before."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = parent / f"{recipe.name}-{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"There are too many runs of this second in {parent}.")


def discard(folder: Path) -> None:
    """Removes a run folder in which no epoch came to its end, with all that is in it."""
    if not (folder / "checkpoint.npz").is_file():
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes of this machine from training in the same folder; a killed process lets go of it.

    Raises:
        BlockingIOError: if another process is training in it.
    """
    if fcntl is None:  # not on this system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"{folder} is being trained in by another process. Wait for it, or name another folder."
            ) from error
        yield
    finally:
        os.close(descriptor)


def open_folder(recipe: Recipe, folder: Path) -> None:
    """Makes a run folder ready for a recipe: a new one, or one that this very recipe began.

    Raises:
        ValueError: if the folder is that of a run with other settings.
        FileExistsError: if the folder has files but is not that of a run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    if path.is_file():
        before = recipe_of(folder)
        if dataclasses.replace(before, summary=recipe.summary) != recipe:
            raise ValueError(
                f"{folder} is the run of another recipe. Expected {_differences(before, recipe)}. Name another folder, "
                "or go on with the settings that it has: keras-dsr resume."
            )
    elif any(not _LEFT_OVER.fullmatch(file.name) for file in folder.iterdir()):
        raise FileExistsError(f"{folder} has files in it but is not the folder of a run. Name another folder.")
    for file in folder.iterdir():
        if _LEFT_OVER.fullmatch(file.name):
            file.unlink()
    write(path, recipe.to_json())


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        FileNotFoundError: if it is not the folder of a run.
    """
    path = folder / "recipe.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: it has no recipe.json. Train one with keras-dsr train RECIPE."
        )
    return Recipe.from_json(path.read_text(encoding="utf-8"))


def summary_of(folder: Path) -> Summary:
    """The summary of a finished run.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run.
    """
    for name in ("recipe.json", "model.keras", "summary.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not the folder of a finished run: it has no {name}. "
                "Train one with keras-dsr train RECIPE, or finish this one with keras-dsr resume."
            )
    return Summary.from_json((folder / "summary.json").read_text(encoding="utf-8"))


def _differences(one: Recipe, other: Recipe) -> str:
    """The settings in which two recipes differ: of each its name, what `one` has, and what `other` has."""
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Recipe))
    return ", ".join(f"{name}={a!r} and received {b!r}" for name, a, b in pairs if a != b)


def environment() -> dict[str, Any]:
    """Where a run was made: packages, Python, Keras backend, machine, and the package's git commit if it has one."""
    versions = {"keras_dsr": keras_dsr.__version__, "keras": keras.__version__, "python": platform.python_version()}
    for package in ("tensorflow", "jax", "numpy", "tensorflow-datasets", "tonic"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "backend": keras.backend.backend(),
        "machine": f"{platform.system()} {platform.machine()}",
        "git_commit": _git_commit(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def check_environment(folder: Path, devices: Mapping[str, Any] = _ONE_DEVICE) -> None:
    """Writes down where a run is made, as it begins; later, makes sure that it goes on with the same.

    Args:
        folder: The run folder.
        devices: What it trains on, as `keras_dsr.distribution.Strategy.facts` says.

    Raises:
        ValueError: if the run was begun with another Keras backend, strategy or number of replicas or processes, whose
            sums are rounded in another order.
    """
    path = folder / "environment.json"
    if not path.is_file():
        write(path, json_text({**environment(), "devices": dict(devices)}))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    check_backend(folder, before["backend"])
    check_devices(folder, before.get("devices", _ONE_DEVICE), devices)


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from, "-dirty" behind it if files changed since."""
    source = Path(keras_dsr.__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=source, capture_output=True, check=False
        )
        if tracked.returncode:
            return None
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=source,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return None
    return described.stdout.strip() or None


def json_text(value: Any) -> str:
    """JSON as the files of a run folder have it."""
    return json.dumps(value, indent=2) + "\n"


def write(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_history(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of a history as CSV; a column that some rows lack is empty there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def compare(folders: Sequence[Path]) -> tuple[list[str], list[list[str]]]:
    """Runs side by side: the settings in which they differ, and what came out.

    Args:
        folders: Run folders, two or more. One that is not finished shows how far it came.

    Returns:
        The heading of a table, a column a run, and its rows; the first column names them.

    Raises:
        FileNotFoundError: if one is not the folder of a run.
        ValueError: if there are fewer than two.
    """
    if len(folders) < 2:
        raise ValueError(f"compare takes two or more run folders. Received {len(folders)}.")
    recipes = [dataclasses.asdict(recipe_of(folder)) for folder in folders]
    rows = [
        [name, *(str(recipe[name]) for recipe in recipes)]
        for name in recipes[0]
        if name != "summary" and len({repr(recipe[name]) for recipe in recipes}) > 1
    ]
    results = [_results(folder) for folder in folders]
    names = list(dict.fromkeys(name for result in results for name in result))
    rows += [[name, *(result.get(name, "-") for result in results)] for name in names]
    return ["", *(str(folder) for folder in folders)], rows


def _results(folder: Path) -> dict[str, str]:
    if not (folder / "summary.json").is_file():
        history = folder / "history.csv"
        epochs = len(history.read_text(encoding="utf-8").splitlines()) - 1 if history.is_file() else 0
        return {"state": f"unfinished, {epochs} epochs"}
    summary = summary_of(folder)
    rates = summary.firing_rates.values()
    return {
        "state": "finished",
        "test accuracy": f"{summary.test_accuracy:.2%}",
        "validation accuracy": "-" if summary.validation_accuracy is None else f"{summary.validation_accuracy:.2%}",
        "mean firing rate": f"{sum(rates) / len(rates):.4f}" if rates else "-",
        "training time": f"{summary.seconds:.0f} s",
        **({} if summary.seconds_saved is None else {"saved by hybrid training": f"{summary.seconds_saved:.0f} s"}),
    }

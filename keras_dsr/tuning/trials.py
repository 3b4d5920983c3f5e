"""Training one trial of a search, whichever tuner drew its settings, so that a killed one goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras

from keras_dsr import checkpoints, data, training
from keras_dsr.data.parts import DataSet
from keras_dsr.files import workspace
from keras_dsr.recipes import Recipe
from keras_dsr.tuning.search import MOST_ATTEMPTS, Search, Trial, read_trial, run_folder, write_trial


class _Stopped(Exception):
    """A trial trained as far as its tuner wants."""


class _Watch(keras.callbacks.Callback):
    """Ends a trial's training between two epochs, once the checkpoint of the first is written."""

    def __init__(self, epochs: int, until: int, report: Callable[[int, float], bool] | None) -> None:
        super().__init__()
        self.epochs = epochs
        self.until = until
        self.report = report

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        # Where the process died after its last epoch, but before that was recorded.
        if epoch >= self.until:
            raise _Stopped

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        stop = self.report is not None and self.report(epoch + 1, float((logs or {})["val_accuracy"]))
        if epoch + 1 < self.epochs and (stop or epoch + 1 >= self.until):
            raise _Stopped


def run_trial(
    search: Search,
    folder: Path,
    number: int,
    settings: Mapping[str, Any],
    *,
    worker: str,
    data_dir: Path | None = None,
    until: int | None = None,
    parent: int | None = None,
    report: Callable[[int, float], bool] | None = None,
) -> Trial:
    """Trains a trial, or what is left of it, and records what came out.

    Args:
        search: The search.
        folder: Its folder.
        number: The trial's number.
        settings: What the tuner drew for it.
        worker: Who trains it.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        until: Number of epochs after which it is to be stopped; `None` for all.
        parent: Number of an earlier trial with the same settings, which it goes on from.
        report: Called after each epoch with its number, from 1, and the validation accuracy; says whether to stop.

    Returns:
        The record, of a trial that ended. If it had before, nothing is trained.

    Raises:
        OSError: if files cannot be read or written. Like the next it would meet other trials too: it is no attempt at
            this one.
        ImportError: if a package for the data set is not installed.
    """
    path = run_folder(folder, number)
    earlier = read_trial(folder, number)
    begun = None
    while True:
        before = read_trial(folder, number)
        if before is not None and before.ended:
            return before
        try:
            recipe = search.trial_recipe(settings)
            # A parent that failed may have left nothing.
            if parent is not None and not path.exists() and run_folder(folder, parent).exists():
                _copy(run_folder(folder, parent), path)
            rows = _rows(path)
            attempts = earlier.attempts + 1 if earlier is not None and earlier.kept == len(rows) else 1
            begun = Trial(
                number=number,
                settings={name: getattr(recipe, name) for name in settings},
                worker=worker,
                attempts=attempts,
                epochs=len(_of_last_stage(rows, recipe)),
                kept=len(rows),
                timesteps=recipe.timesteps,
            )
            if attempts > MOST_ATTEMPTS:
                ended = _failed(begun, f"The process that trained it died {MOST_ATTEMPTS} times in the same epoch.")
            else:
                write_trial(folder, begun)
                watch = _Watch(recipe.epochs, recipe.epochs if until is None else until, report)
                ended = _train(recipe, path, begun, watch, data_dir)
        except BlockingIOError:  # whoever held it when the tuner gave it away once more is still at it
            time.sleep(1)
            continue
        except (OSError, ImportError):  # would meet all trials
            if begun is not None:
                with contextlib.suppress(OSError):
                    write_trial(folder, dataclasses.replace(begun, attempts=begun.attempts - 1))
            raise
        except Exception as error:  # whatever a trial comes to, the others go on
            ended = _failed(Trial(number=number, settings=dict(settings), worker=worker), _told(error))
        write_trial(folder, ended)
        return ended


def _train(recipe: Recipe, path: Path, begun: Trial, watch: _Watch, data_dir: Path | None) -> Trial:
    _forget()
    try:
        loaded = _loaded(_data_of(recipe), data_dir)
        fitted = training.fit(recipe, path, loaded=loaded, callbacks=[watch], verbose=0)
    except _Stopped:
        return _so_far(begun, recipe, path, "stopped")
    except (OSError, ImportError):
        raise
    except Exception as error:
        return _failed(_so_far(begun, recipe, path, "failed"), _told(error))
    rates = fitted.firing_rates.values()
    return dataclasses.replace(
        _so_far(begun, recipe, path, "finished"),
        validation_accuracy=fitted.validation_accuracy,
        firing_rate=statistics.mean(rates) if rates else None,
        thresholds=fitted.thresholds,
        seconds=fitted.seconds,
    )


def _forget() -> None:
    """Frees the memory of the trial before."""
    keras.backend.clear_session()
    gc.collect()


def _failed(trial: Trial, message: str) -> Trial:
    return dataclasses.replace(trial, state="failed", message=message)


def _told(error: Exception) -> str:
    """What an error says, without the stack that TensorFlow's errors carry."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}" if len(text) <= 500 else f"{type(error).__name__}: {text[:500]} ..."


def _so_far(trial: Trial, recipe: Recipe, path: Path, state: str) -> Trial:
    """What a trial's checkpoint says of it."""
    every = _rows(path)
    rows = _of_last_stage(every, recipe)
    accuracies = [row["val_accuracy"] for row in rows]
    chosen = None
    if accuracies:
        chosen = max(accuracies) if recipe.selection == "best" else accuracies[-1]
    return dataclasses.replace(
        trial,
        state=state,
        epochs=len(rows),
        validation_accuracy=chosen,
        seconds=sum(row["seconds"] for row in every),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    """The history of a trial, of all its stages."""
    checkpoint = path / "checkpoint.npz"
    return checkpoints.progress(checkpoint)["rows"] if checkpoint.is_file() else []


def _of_last_stage(rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    last = "spiking" if recipe.timesteps else "representation"
    return [row for row in rows if row["stage"] == last]


def _copy(source: Path, target: Path) -> None:
    """Copies a run folder, whole or not at all."""
    with workspace(target) as beside:
        shutil.copytree(source, beside, dirs_exist_ok=True)
        beside.rename(target)


def _data_of(recipe: Recipe) -> Recipe:
    """The recipe with those settings alone that decide its data set."""
    return Recipe(
        name="",
        summary="",
        data=recipe.data,
        timesteps=recipe.timesteps if data.has_events(recipe.data) else 0,
        size=recipe.size,
        slicing=recipe.slicing,
        sensor=recipe.sensor,
        skip_corrupt=recipe.skip_corrupt,
        validation=recipe.validation,
        train_examples=recipe.train_examples,
        selection=recipe.selection,
    )


@functools.lru_cache(maxsize=1)
def _loaded(recipe: Recipe, data_dir: Path | None) -> DataSet:
    return training.load(recipe, data_dir=data_dir)

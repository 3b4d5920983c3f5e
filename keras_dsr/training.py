"""From a recipe to a trained model in a run folder, and back from the folder to its accuracy.

A run folder holds `recipe.json`, `model.keras`, `history.csv`, `figure.png` and `summary.json`. Each file appears whole
or not at all.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import platform
import re
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dsr
from keras_dsr.analysis import figures, firing
from keras_dsr.callbacks import CheckThresholds
from keras_dsr.constraints import not_finite
from keras_dsr.data import images
from keras_dsr.files import replacing
from keras_dsr.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came out of a run.

    Args:
        test_accuracy: Part of the test images that the final network gets right, looked at once.
        test_images: Their number.
        validation_accuracy: The same for the validation images, after the last epoch.
        firing_rates: Spikes per neuron and time step on the test images, for each neuron layer.
        thresholds: V_th of each neuron layer.
        timesteps: Number N of time steps.
        seconds: Wall time of the training, without the imports.
        versions: Of the packages, Python and the Keras backend.
    """

    test_accuracy: float
    test_images: int
    validation_accuracy: float
    firing_rates: dict[str, float]
    thresholds: dict[str, float]
    timesteps: int
    seconds: float
    versions: dict[str, str]


class _ThresholdHistory(keras.callbacks.Callback):
    """Keeps each layer's threshold, before training and after each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.history: dict[str, list[float]] = {}

    def _keep(self) -> None:
        for name, value in firing.thresholds(self.model).items():
            self.history.setdefault(name, []).append(value)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._keep()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._keep()


def compile_model(model: keras.Model, recipe: Recipe, steps: int) -> None:
    """Compiles a model as its recipe says.

    Args:
        model: The model.
        recipe: The recipe.
        steps: Number of updates of the whole run, for the schedule of the learning rate.
    """
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(recipe.learning_rate, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def new_run_folder(recipe: Recipe, parent: Path) -> Path:
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


def train(recipe: Recipe, folder: Path, verbose: int | str = "auto") -> Summary:
    """Trains a recipe, evaluates it once on the test part, and fills the run folder.

    Args:
        recipe: What to train.
        folder: An existing folder for the results.
        verbose: As in `keras.Model.fit`.

    Returns:
        What came out of it.

    Raises:
        ValueError: if a threshold becomes NaN or infinite on the way.
    """
    keras.utils.set_random_seed(recipe.seed)
    _write(folder / "recipe.json", recipe.to_json())
    data = images.load(recipe.data)
    model = recipe.build(data.classes, data.input_shape)
    batches = images.training_batches(data.train, recipe.batch_size, recipe.seed, recipe.shift)
    compile_model(model, recipe, steps=recipe.epochs * len(batches))
    kept = _ThresholdHistory()
    started = time.perf_counter()
    try:
        history = model.fit(
            batches,
            validation_data=(data.validation.images, data.validation.labels),
            epochs=recipe.epochs,
            shuffle=False,  # the batches are, already
            callbacks=[CheckThresholds(), kept],
            verbose=verbose,
        ).history
    except Exception as error:
        # TensorFlow's own error class, with our message somewhere within.
        if found := re.search(not_finite("threshold of [^.]*?"), str(error)):
            raise ValueError(found[0]) from error
        raise
    seconds = time.perf_counter() - started

    with replacing(folder / "model.keras") as beside:
        model.save(beside)
    _write_history(folder / "history.csv", history, kept.history)
    summary = dataclasses.replace(
        _evaluate(model, recipe, data), validation_accuracy=history["val_accuracy"][-1], seconds=seconds
    )
    if recipe.timesteps:
        _draw(folder / "figure.png", model, recipe, data, history, kept.history, summary)
    _write(folder / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    return summary


def evaluate(folder: Path) -> Summary:
    """Loads a run's model and evaluates it on the test part again.

    Args:
        folder: A run folder that `train` filled.

    Returns:
        The summary, with this evaluation's accuracy and firing rates.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run.
    """
    for name in ("recipe.json", "model.keras", "summary.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is not the folder of a finished run: it has no {name}. "
                "Train one with keras-dsr train RECIPE."
            )
    recipe = Recipe.from_json((folder / "recipe.json").read_text())
    model = keras.models.load_model(folder / "model.keras")
    before = json.loads((folder / "summary.json").read_text())
    return dataclasses.replace(
        _evaluate(model, recipe, images.load(recipe.data)),
        validation_accuracy=before["validation_accuracy"],
        seconds=before["seconds"],
    )


def _evaluate(model: keras.Model, recipe: Recipe, data: images.ImageData) -> Summary:
    logits = model.predict(data.test.images, batch_size=128, verbose=0)
    return Summary(
        test_accuracy=float(np.mean(np.argmax(logits, axis=-1) == data.test.labels)),
        test_images=len(data.test),
        validation_accuracy=float("nan"),
        firing_rates=firing.firing_rates(model, data.test.images) if recipe.timesteps else {},
        thresholds=firing.thresholds(model),
        timesteps=recipe.timesteps,
        seconds=float("nan"),
        versions={
            "keras_dsr": keras_dsr.__version__,
            "keras": keras.__version__,
            "backend": keras.backend.backend(),
            "python": platform.python_version(),
        },
    )


def _draw(
    path: Path,
    model: keras.Model,
    recipe: Recipe,
    data: images.ImageData,
    history: dict[str, list[float]],
    kept: dict[str, list[float]],
    summary: Summary,
) -> None:
    image, label = data.test.images[0], int(data.test.labels[0])
    figures.training_run(
        path,
        title=f"{recipe.name}: test accuracy {summary.test_accuracy:.1%} with N = {recipe.timesteps} time steps",
        history=history,
        rates=summary.firing_rates,
        thresholds=kept,
        image=image,
        caption=f"A test image of class {label}",
        trains={name: train[0] for name, train in firing.spike_trains(model, image[np.newaxis]).items()},
    )


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text)


def _write_history(path: Path, history: dict[str, list[float]], thresholds: dict[str, list[float]]) -> None:
    columns: dict[str, list[float]] = {**history}
    columns |= {f"threshold_{name}": values[1:] for name, values in thresholds.items()}
    with replacing(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", *columns])
        for epoch, row in enumerate(zip(*columns.values(), strict=True), start=1):
            writer.writerow([epoch, *row])

"""From a recipe to a trained model in a run folder, and back from the folder to its accuracy.

A training has one stage, with spikes, or more (hybrid): the representation network first; then, from thresholds
calibrated on its activations, the same with quantized outputs, if the recipe says so, and the spiking one. After each
epoch a checkpoint holds all that the training needs to go on. What is in the folder: `keras_dsr.runs`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import checkpoints, data, models, runs
from keras_dsr.analysis import figures, firing
from keras_dsr.callbacks import CheckFinite, check_tensorboard
from keras_dsr.constraints import not_finite
from keras_dsr.data.augmentation import Augmentation
from keras_dsr.data.parts import DataSet, Part
from keras_dsr.files import replacing
from keras_dsr.models import presets
from keras_dsr.models.presets import Card
from keras_dsr.optimizers import SGD
from keras_dsr.recipes import Recipe
from keras_dsr.runs import Stage, Summary

# Enough: each gives thousands of activations to most layers, and as many as there are classes to the last.
_CALIBRATION_EXAMPLES = 2048
# Spike trains are a hundred times the size of their input; rates need no more test examples than this, drawn at random.
_RATE_EXAMPLES = 2000
# Compiling the representation network by XLA takes seconds and then saves a fifth of each step on a CPU.
_STEPS_WORTH_COMPILING = 1000


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One stage of a training, as its recipe wants it."""

    name: str
    number: int
    timesteps: int
    representation_steps: int | None
    epochs: int
    optimizer: str
    learning_rate: float
    weight_decay: float


def _plans(recipe: Recipe) -> list[_Plan]:
    spiking = "spiking" if recipe.timesteps else "representation"
    last = (recipe.epochs, recipe.optimizer, recipe.learning_rate, recipe.weight_decay)
    if not recipe.hybrid_epochs:
        return [_Plan(spiking, 0, recipe.timesteps, None, *last)]
    first = (recipe.hybrid_epochs, recipe.hybrid_optimizer, recipe.hybrid_learning_rate, recipe.hybrid_weight_decay)
    plans = [_Plan("representation", 0, 0, None, *first)]
    if recipe.hybrid_quantized_epochs:
        quantized = (recipe.hybrid_optimizer, recipe.hybrid_quantized_learning_rate, recipe.hybrid_weight_decay)
        plans.append(_Plan("quantized", 1, 0, recipe.timesteps, recipe.hybrid_quantized_epochs, *quantized))
    return [*plans, _Plan(spiking, len(plans), recipe.timesteps, None, *last)]


def compile_model(
    model: keras.Model,
    recipe: Recipe,
    steps: int,
    *,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    jit_compile: bool | str = "auto",
) -> None:
    """Compiles a model as its recipe says: optimizer, warm-up and cosine, cross-entropy of the logits.

    Args:
        model: The model.
        recipe: The recipe.
        steps: Number of updates of the whole training, for the schedule of the learning rate.
        optimizer: "sgd" or "adam", if not the recipe's.
        learning_rate: Largest learning rate, if not the recipe's.
        weight_decay: If not the recipe's.
        jit_compile: As in `keras.Model.compile`.
    """
    learning_rate = recipe.learning_rate if learning_rate is None else learning_rate
    weight_decay = recipe.weight_decay if weight_decay is None else weight_decay
    warmup = min(recipe.warmup_steps, steps // 5)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate,
        max(steps - warmup, 1),
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    if (recipe.optimizer if optimizer is None else optimizer) == "adam":
        chosen = keras.optimizers.Adam(schedule)
    else:
        chosen = SGD(schedule, momentum=recipe.momentum, coupled_weight_decay=weight_decay)
    model.compile(
        optimizer=chosen,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit_compile,
    )


class _Keeper(keras.callbacks.Callback):
    """Keeps the history and a checkpoint of each epoch, and the weights of the best one."""

    def __init__(self, folder: Path, plan: _Plan, state: dict[str, Any], keep_best: bool) -> None:
        super().__init__()
        self.folder = folder
        self.plan = plan
        self.state = state
        self.keep_best = keep_best
        self._started = 0.0

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._started = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        logs = {name: float(value) for name, value in (logs or {}).items()}
        self.state["rows"].append(
            {
                "stage": self.plan.name,
                "epoch": epoch + 1,
                **logs,
                "learning_rate": float(np.asarray(self.model.optimizer.learning_rate)),
                "seconds": time.perf_counter() - self._started,
                **{f"threshold_{name}": value for name, value in firing.thresholds(self.model).items()},
            }
        )
        self.state |= {"stage": self.plan.number, "epoch": epoch + 1}
        if self.keep_best and logs["val_accuracy"] >= self.state["best"][1]:
            self.state["best"] = [epoch + 1, logs["val_accuracy"]]
            # Before the checkpoint that speaks of it: killed in between, the epoch is run again and gives the same.
            checkpoints.save(self.folder / "best.npz", self.model, {"epoch": epoch + 1})
        # The checkpoint is last, so that nothing in the folder is older than what it speaks of.
        runs.write_history(self.folder / "history.csv", self.state["rows"])
        checkpoints.save(self.folder / "checkpoint.npz", self.model, self.state)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    tensorboard: bool = False,
    verbose: int | str = "auto",
) -> Summary:
    """Trains a recipe, evaluates it once on the test part, and fills the run folder.

    If the folder holds an unfinished run of this very recipe, it goes on from its last epoch, to the weights that an
    unbroken run would have had. A finished run is left as it is.

    Args:
        recipe: What to train.
        folder: A folder for the results; new, empty, or of a run of this recipe.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        download: Whether to download the data set if it is not there.
        tensorboard: Whether to write TensorBoard's logs to the folder's `tensorboard`.
        verbose: As in `keras.Model.fit`.

    Returns:
        What came out of it.

    Raises:
        ValueError: if a loss, weight or threshold becomes NaN or infinite on the way, or the folder is that of a run
            with other settings.
        FileNotFoundError: if the data set is not there.
        FileExistsError: if the folder has files but is not that of a run.
        BlockingIOError: if another process is training in the folder.
        ImportError: if TensorBoard's logs are asked for and the package is not installed.
    """
    if tensorboard:
        check_tensorboard()
    augmentation = Augmentation(recipe.augmentation, padding=recipe.padding, cutout=recipe.cutout)
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        runs.open_folder(recipe, folder)
        if (folder / "summary.json").is_file():
            return runs.summary_of(folder)
        loaded = load(recipe, data_dir=data_dir, download=download)
        runs.check_environment(folder)
        state: dict[str, Any] = {"rows": [], "stage": -1, "epoch": 0, "best": [0, -1.0], "calibrated": None}
        if (folder / "checkpoint.npz").is_file():
            state = checkpoints.progress(folder / "checkpoint.npz")

        model = None
        for plan in _plans(recipe):
            if plan.number < state["stage"]:
                continue
            weights = None if model is None else _calibrated(model, recipe, plan, loaded)
            model = None  # its memory is for the next stage
            model = _run_stage(recipe, plan, folder, loaded, augmentation, state, weights, tensorboard, verbose)
        return _finish(recipe, folder, loaded, state, model)


def load(recipe: Recipe, *, data_dir: Path | None = None, download: bool = False) -> DataSet:
    """The data set of a recipe, as `train` uses it.

    Args:
        recipe: The recipe.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        download: Whether to download the data set if it is not there.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it does not fit the recipe: it has no test part, or no validation part to choose an epoch by.
    """
    number = recipe.validation
    loaded = data.load(
        recipe.data,
        data_dir=data_dir,
        timesteps=recipe.timesteps or None,
        size=recipe.size or None,
        slicing=recipe.slicing,
        # At 1 and above it is a number of examples.
        validation=int(number) if number is not None and number >= 1 and number == int(number) else number,
        download=download,
    )
    if not len(loaded.test):
        raise ValueError(f"{recipe.data!r} has no test part, which the result is measured on.")
    if recipe.selection == "best" and not len(loaded.validation):
        raise ValueError(
            f"The best epoch is chosen on validation examples, and {recipe.data!r} has none with "
            f"validation={recipe.validation!r}. Set selection='last', or validation higher."
        )
    return loaded if recipe.train_examples is None else loaded.with_training_examples(recipe.train_examples)


def _calibrated(model: keras.Model, recipe: Recipe, plan: _Plan, loaded: DataSet) -> list[np.ndarray]:
    """Weights of a trained representation network, made ready for the stage that follows."""
    size = min(recipe.batch_size, 128)
    examples = loaded.training_batches(size, seed=recipe.seed).take(math.ceil(_CALIBRATION_EXAMPLES / size))
    if plan.number == 1:  # later, thresholds have been trained to what they are for
        models.calibrate_thresholds(model, examples.as_numpy_iterator(), recipe.hybrid_percentile)
    if not plan.timesteps:
        return model.get_weights()
    with _dtype_policy(recipe.precision):
        spiking = recipe.build(loaded.classes, loaded.input_shape)
    spiking.set_weights(model.get_weights())
    models.calibrate_normalization(spiking, examples.as_numpy_iterator())
    return spiking.get_weights()


def _run_stage(
    recipe: Recipe,
    plan: _Plan,
    folder: Path,
    loaded: DataSet,
    augmentation: Augmentation,
    state: dict[str, Any],
    weights: list[np.ndarray] | None,
    tensorboard: bool,
    verbose: int | str,
) -> keras.Model:
    """Trains one stage to its end and gives its model.

    Args:
        recipe: The recipe.
        plan: The stage.
        folder: The run folder.
        loaded: The data set.
        augmentation: Random changes to training inputs.
        state: How far the run came; goes on from there, and is changed.
        weights: What the stage before came to, calibrated, if this process ran it.
        tensorboard: Whether to write TensorBoard's logs.
        verbose: As in `keras.Model.fit`.
    """
    # Each stage draws its own numbers, whether or not this process ran the one before.
    keras.utils.set_random_seed(recipe.seed + 7919 * plan.number)
    with _dtype_policy(recipe.precision):
        model = recipe.build(loaded.classes, loaded.input_shape, plan.timesteps, plan.representation_steps)
    steps = loaded.steps(recipe.batch_size)
    # In bfloat16 it is slower with XLA than without.
    worth = plan.timesteps == 0 and recipe.precision == "float32" and steps * plan.epochs >= _STEPS_WORTH_COMPILING
    compile_model(
        model,
        recipe,
        steps * plan.epochs,
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate,
        weight_decay=plan.weight_decay,
        jit_compile=True if worth else "auto",
    )
    done = 0
    last = plan.number == len(_plans(recipe)) - 1
    if state["stage"] == plan.number:
        checkpoints.restore(folder / "checkpoint.npz", model)
        done = state["epoch"]
    elif weights is not None:
        model.set_weights(weights)
        if last:
            state["calibrated"] = _accuracy(model, loaded, loaded.validation)
        state["best"] = [0, -1.0]
    if not state["rows"]:
        state["initial_thresholds"] = firing.thresholds(model)

    callbacks: list[keras.callbacks.Callback] = [CheckFinite()]
    callbacks.append(_Keeper(folder, plan, state, keep_best=last and recipe.selection == "best"))
    if tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(folder / "tensorboard" / plan.name, write_graph=False))
    if done < plan.epochs:
        batches = loaded.training_batches(
            recipe.batch_size,
            seed=recipe.seed + 7919 * plan.number,
            augmentation=augmentation,
            epochs=plan.epochs,
            first_epoch=done,
        )
        try:
            model.fit(
                batches,
                validation_data=loaded.batches(loaded.validation, 128) if len(loaded.validation) else None,
                steps_per_epoch=steps,
                epochs=plan.epochs,
                initial_epoch=done,
                shuffle=False,  # the batches are, already
                callbacks=callbacks,
                verbose=verbose,
            )
        except Exception as error:
            # TensorFlow's own error class, with our message somewhere within.
            if found := re.search(not_finite("threshold of [^.]*?"), str(error)):
                raise ValueError(found[0]) from error
            if found := re.search(r"(?:ImageError|RecordingError): (.+)", str(error)):
                raise ValueError(found[1]) from error
            raise
    if last and (folder / "best.npz").is_file():
        checkpoints.restore(folder / "best.npz", model)
    return model


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """What layers made in the block compute in."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _accuracy(model: keras.Model, loaded: DataSet, part: Part) -> float | None:
    """Accuracy on a part; `None` if it is empty."""
    if not len(part):
        return None
    return float(model.evaluate(loaded.batches(part, 128), verbose=0, return_dict=True)["accuracy"])


def _finish(recipe: Recipe, folder: Path, loaded: DataSet, state: dict[str, Any], model: keras.Model) -> Summary:
    if recipe.precision != "float32":
        trained = model
        with _dtype_policy("float32"):
            model = recipe.build(loaded.classes, loaded.input_shape)
        compile_model(model, recipe, loaded.steps(recipe.batch_size) * recipe.epochs)
        checkpoints.copy(trained, model)
    with replacing(folder / "model.keras") as beside:
        model.save(beside)
    rows = state["rows"]
    stages = []
    for plan in _plans(recipe):
        mine = [row for row in rows if row["stage"] == plan.name]
        calibrated = state["calibrated"] if plan.number == len(_plans(recipe)) - 1 > 0 else None
        accuracies = [row.get("val_accuracy") for row in mine] or [calibrated]
        chosen = state["best"][1] if plan.number == len(_plans(recipe)) - 1 and state["best"][0] else accuracies[-1]
        seconds = sum(row["seconds"] for row in mine)
        stages.append(Stage(plan.name, plan.timesteps, len(mine), seconds, chosen, calibrated))
    saved = None
    if len(stages) > 1 and stages[-1].epochs:
        # By the median: the first epoch of a stage compiles.
        typical = statistics.median(row["seconds"] for row in rows if row["stage"] == stages[-1].name)
        saved = sum(stage.epochs * typical - stage.seconds for stage in stages[:-1])
    summary = Summary(
        test_accuracy=_accuracy(model, loaded, loaded.test),
        test_examples=len(loaded.test),
        validation_accuracy=stages[-1].validation_accuracy,
        epoch=state["best"][0] or stages[-1].epochs,
        firing_rates=_rates(model, recipe, loaded),
        thresholds=firing.thresholds(model),
        timesteps=recipe.timesteps,
        seconds=sum(stage.seconds for stage in stages),
        seconds_saved=saved,
        stages=tuple(stages),
    )
    if recipe.timesteps and rows:
        _draw(folder / "figure.png", model, recipe, loaded, state, summary)
    runs.write(folder / "summary.json", summary.to_json())
    return summary


def _rates(model: keras.Model, recipe: Recipe, loaded: DataSet) -> dict[str, float]:
    if not recipe.timesteps:
        return {}
    # In another order than that of the files, which may be class by class.
    batches = loaded.batches(loaded.test, 64, seed=0).take(math.ceil(_RATE_EXAMPLES / 64))
    return firing.firing_rates(model, batches.as_numpy_iterator())


def evaluate(folder: Path, *, data_dir: Path | None = None) -> Summary:
    """Loads a finished run's model and evaluates it on the test part again.

    Args:
        folder: A run folder that `train` filled.
        data_dir: Where the data set is, see `keras_dsr.data.load`.

    Returns:
        The summary, with this evaluation's accuracy and firing rates.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run, or the data set is not there.
    """
    before = runs.summary_of(folder)
    recipe = runs.recipe_of(folder)
    model = keras.models.load_model(folder / "model.keras")
    loaded = load(recipe, data_dir=data_dir)
    return dataclasses.replace(
        before,
        test_accuracy=_accuracy(model, loaded, loaded.test),
        firing_rates=_rates(model, recipe, loaded),
        thresholds=firing.thresholds(model),
    )


def pack(folder: Path, path: Path, *, data_dir: Path | None = None, version: int = 1) -> Card:
    """Packs a finished run's weights as a preset, with its card and history.

    Args:
        folder: A run folder that `train` filled.
        path: The card to write, a .json file; the other files stand beside it.
        data_dir: Where the data set is, for the names of its classes and its statistics.
        version: Version of the weights.

    Returns:
        The card.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run, or the data set is not there.
        ValueError: if the network is one that no preset is for, or `path` does not end in .json.
    """
    summary, recipe = runs.summary_of(folder), runs.recipe_of(folder)
    if recipe.network == "small_cnn":
        raise ValueError("Presets are for preact_resnet and vgg. Received a run with network='small_cnn'.")
    loaded = load(recipe, data_dir=data_dir)
    neuron = recipe.neuron_layer().get_config()
    dropped = ("name", "trainable", "dtype", "timesteps", "loop", "representation_steps")
    path.parent.mkdir(parents=True, exist_ok=True)
    card = Card(
        network=f"{recipe.network}{recipe.depth}",
        version=version,
        neuron=recipe.neuron,
        neuron_settings={name: value for name, value in neuron.items() if name not in dropped},
        timesteps=recipe.timesteps,
        classes=loaded.class_names,
        input_shape=loaded.input_shape,
        mean=loaded.mean,
        std=loaded.std,
        data=recipe.data,
        test_accuracy=summary.test_accuracy,
        test_examples=summary.test_examples,
        validation_accuracy=summary.validation_accuracy,
        firing_rates=summary.firing_rates,
        recipe=dataclasses.asdict(recipe),
        weight_bits=recipe.weight_bits,
        stem=recipe.stem,
        environment=json.loads((folder / "environment.json").read_text(encoding="utf-8")),
    )
    model = keras.models.load_model(folder / "model.keras")
    return presets.pack(model, card, (folder / "history.csv").read_text(encoding="utf-8"), path)


def _draw(
    path: Path, model: keras.Model, recipe: Recipe, loaded: DataSet, state: dict[str, Any], summary: Summary
) -> None:
    rows = state["rows"]
    x, labels = next(loaded.batches(loaded.test, 1).as_numpy_iterator())
    names = list(summary.thresholds)
    start = state["initial_thresholds"]
    figures.training_run(
        path,
        title=f"{recipe.name}: test accuracy {summary.test_accuracy:.1%} with N = {recipe.timesteps} time steps",
        history={name: [row[name] for row in rows] for name in ("accuracy", "val_accuracy") if name in rows[0]},
        stages=[(stage.name, stage.epochs) for stage in summary.stages if stage.epochs],
        rates=summary.firing_rates,
        thresholds={name: [start[name], *(row[f"threshold_{name}"] for row in rows)] for name in names},
        image=np.asarray(x[0] * loaded.std + loaded.mean),
        caption=f"A test example: {loaded.class_names[int(labels[0])]}",
        trains={name: train[0] for name, train in firing.spike_trains(model, x).items()},
    )

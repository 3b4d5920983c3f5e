"""From a recipe to a trained model in a run folder, and back from the folder to its accuracy.

A training has one stage, with spikes, or more (hybrid): the representation network first; then, from thresholds
calibrated on its activations, the same with quantized outputs, if the recipe says so, and the spiking one. After each
epoch a checkpoint holds all that the training needs to go on. What is in the folder: `keras_dsr.runs`. Where it runs,
on one device or many: `strategy`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import backend, checkpoints, data, models, runs
from keras_dsr.analysis import figures, firing
from keras_dsr.callbacks import CheckFinite
from keras_dsr.callbacks.recording import check_tensorboard
from keras_dsr.constraints import not_finite
from keras_dsr.data.augmentation import Augmentation
from keras_dsr.data.images import ImageError
from keras_dsr.data.parts import DataSet, Part
from keras_dsr.data.recordings import RecordingError
from keras_dsr.distribution import Strategy, as_known_error, strategy
from keras_dsr.files import replacing
from keras_dsr.models import presets
from keras_dsr.models.presets import Card
from keras_dsr.optimizers import SGD
from keras_dsr.recipes import Plan, Recipe, dtype_policy
from keras_dsr.runs import Stage, Summary

__all__ = [
    "Fitted",
    "compile_model",
    "evaluate",
    "fit",
    "fit_epochs",
    "load",
    "pack",
    "require_validation",
    "stages",
    "strategy",
    "train",
]

# Enough: each gives thousands of activations to most layers, and as many as there are classes to the last.
_CALIBRATION_EXAMPLES = 2048
# Spike trains are a hundred times the size of their input; rates need no more examples than this, drawn at random.
_RATE_EXAMPLES = 2000
# Of several processes: weights from one stage to the next.
_CALIBRATED = "calibrated.npz"
# After the message that names a file of a data set.
_IF_DAMAGED = "Mend it and go on, or train anew with skip_corrupt=true."
# Compiling the representation network by XLA takes seconds and then saves a fifth of each step on a CPU.
_STEPS_WORTH_COMPILING = 1000


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
        weighted_metrics=["accuracy"],  # batches of one size have examples that do not count
        jit_compile=jit_compile,
    )


class _Keeper(keras.callbacks.Callback):
    """Keeps the history and a checkpoint of each epoch, and the weights of the best one."""

    def __init__(self, folder: Path, plan: Plan, state: dict[str, Any], keep_best: bool, writes: bool) -> None:
        super().__init__()
        self.folder = folder
        self.writes = writes
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
                "learning_rate": float(backend.to_numpy(ops.convert_to_tensor(self.model.optimizer.learning_rate))),
                "seconds": time.perf_counter() - self._started,
                **{f"threshold_{name}": value for name, value in firing.thresholds(self.model).items()},
            }
        )
        self.state |= {"stage": self.plan.number, "epoch": epoch + 1}
        if self.keep_best and logs["val_accuracy"] >= self.state["best"][1]:
            self.state["best"] = [epoch + 1, logs["val_accuracy"]]
            # Before the checkpoint that speaks of it: killed in between, the epoch is run again and gives the same.
            checkpoints.save(self.folder / "best.npz", self.model, {"epoch": epoch + 1}, self.writes)
        # The checkpoint is last, so that nothing in the folder is older than what it speaks of.
        if self.writes:
            runs.write_history(self.folder / "history.csv", self.state["rows"])
        checkpoints.save(self.folder / "checkpoint.npz", self.model, self.state, self.writes)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    devices: Strategy | None = None,
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
        folder: A folder for the results; new, empty, or of a run of this recipe. Several processes name the same one,
            which all of them can read; the chief writes.
        devices: Where to train, of `strategy`; `None` for one device.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        download: Whether to download the data set if it is not there.
        tensorboard: Whether to write TensorBoard's logs to the folder's `tensorboard`.
        verbose: As in `keras.Model.fit`.

    Returns:
        What came out of it.

    Raises:
        ValueError: if a loss, weight or threshold becomes NaN or infinite on the way; the folder is that of a run with
            other settings, or on other devices; a batch cannot be spread evenly over the replicas; or processes
            differ in versions, recipe or data, or another one failed to load it.
        ConnectionError: if another process of the training is gone.
        FileNotFoundError: if the data set is not there, or processes do not see the same folder.
        FileExistsError: if the folder has files but is not that of a run.
        BlockingIOError: if another process is training in the folder.
        ImportError: if TensorBoard's logs are asked for and the package is not installed.
    """
    if tensorboard:
        check_tensorboard()
    devices = devices or strategy()
    devices.check_batch_size(recipe.batch_size)
    Augmentation(recipe.augmentation, padding=recipe.padding, cutout=recipe.cutout)  # refuses what there is not, early
    with contextlib.ExitStack() as held, as_known_error(devices):

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(runs.locked(folder))
            runs.open_folder(recipe, folder)

        devices.agree("recipe", recipe.to_json())
        devices.on_chief(begin)
        devices.see(folder / "recipe.json")
        if devices.see(folder / "summary.json"):
            return runs.summary_of(folder)
        begun = devices.see(folder / "checkpoint.npz")
        loaded = _load_everywhere(devices, lambda: load(recipe, data_dir=data_dir, download=download))
        model, state = _run_stages(recipe, folder, devices, loaded, begun, tensorboard, verbose)
        return _finish(recipe, folder, devices, loaded, state, model)


def _load_everywhere(devices: Strategy, action: Callable[[], DataSet]) -> DataSet:
    """The data set in all processes, which is the same in each.

    The chief is first, and alone: it may download, or keep frames, where the others look.

    Args:
        devices: Where to train.
        action: Loads the data set.

    Raises:
        ValueError: if another process failed, or has other data.
    """
    loaded = devices.on_chief(action)
    loaded = devices.everyone(lambda: loaded if devices.is_chief else action())
    devices.agree("data set", json.dumps(_about(loaded)))
    return loaded


def _about(loaded: DataSet) -> dict[str, Any]:
    """What two data sets have in common if they are the same, as far as labels and statistics tell."""
    labels = hashlib.sha256()
    parts = (loaded.train, loaded.validation, loaded.test)
    for part in parts:
        if part.labels is not None:
            labels.update(np.asarray(part.labels, "int64").tobytes())
    return {
        "examples": [len(part) for part in parts],
        "classes": loaded.classes,
        "input_shape": list(loaded.input_shape),
        "mean": [float(x) for x in loaded.mean],
        "std": [float(x) for x in loaded.std],
        "labels": labels.hexdigest(),
    }


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a training came to before the test part is looked at.

    Args:
        validation_accuracy: Part of the validation examples that the resulting network gets right.
        epoch: Number of the epoch, from 1 and within the last stage, whose weights are the result.
        firing_rates: Spikes per neuron and time step on validation examples, for each neuron layer.
        thresholds: V_th of each neuron layer.
        seconds: Wall time of all epochs together.
    """

    validation_accuracy: float
    epoch: int
    firing_rates: dict[str, float]
    thresholds: dict[str, float]
    seconds: float


def fit(
    recipe: Recipe,
    folder: Path,
    *,
    loaded: DataSet | None = None,
    data_dir: Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = "auto",
) -> Fitted:
    """Trains a recipe as `train` does, all but the end: the test part is not looked at.

    The folder is that of an unfinished run. `train` with the same recipe and folder finishes it.

    Args:
        recipe: What to train.
        folder: As in `train`.
        loaded: The data set, as `load` gives it for this recipe, if it is at hand.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        callbacks: Called in the last stage, at the end of an epoch once its checkpoint is written.
        verbose: As in `keras.Model.fit`.

    Raises:
        ValueError: if the recipe has no validation examples, or as in `train`.
        FileNotFoundError: if the data set is not there.
        FileExistsError: if the folder has files but is not that of a run.
        BlockingIOError: if another process is training in the folder.
    """
    Augmentation(recipe.augmentation, padding=recipe.padding, cutout=recipe.cutout)  # refuses what there is not, early
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        runs.open_folder(recipe, folder)
        loaded = load(recipe, data_dir=data_dir) if loaded is None else loaded
        require_validation(recipe, loaded)
        begun = (folder / "checkpoint.npz").is_file()
        model, state = _run_stages(recipe, folder, strategy(), loaded, begun, False, verbose, callbacks)
        rows = [row for row in state["rows"] if row["stage"] == recipe.plans()[-1].name]
        last = rows[-1]["val_accuracy"] if rows else state["calibrated"]
        return Fitted(
            validation_accuracy=state["best"][1] if state["best"][0] else last,
            epoch=state["best"][0] or len(rows),
            firing_rates=_rates(model, recipe, loaded, loaded.validation),
            thresholds=firing.thresholds(model),
            seconds=sum(row["seconds"] for row in state["rows"]),
        )


def _run_stages(
    recipe: Recipe,
    folder: Path,
    devices: Strategy,
    loaded: DataSet,
    begun: bool,
    tensorboard: bool,
    verbose: int | str,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> tuple[keras.Model, dict[str, Any]]:
    """Trains what is left of all stages, and gives the last one's model and how the training went.

    Args:
        recipe: The recipe.
        folder: The run folder.
        devices: Where to train.
        loaded: The data set.
        begun: Whether there is a checkpoint to go on from.
        tensorboard: Whether to write TensorBoard's logs.
        verbose: As in `keras.Model.fit`.
        callbacks: As in `fit`.
    """
    devices.on_chief(lambda: runs.check_environment(folder, devices.facts()))
    state: dict[str, Any] = {"rows": [], "stage": -1, "epoch": 0, "best": [0, -1.0], "calibrated": None}
    if begun:
        state = devices.everyone(lambda: checkpoints.progress(folder / "checkpoint.npz"))
        # The checkpoint says so itself: the folder's environment.json may be gone, or written anew.
        runs.check_devices(folder / "checkpoint.npz", state.get("devices", devices.facts()), devices.facts())
    state["devices"] = devices.facts()

    model = None
    for plan in recipe.plans():
        if plan.number < state["stage"]:
            continue
        weights = None if model is None else _calibrated_by_chief(devices, folder, model, recipe, plan, loaded)
        model = None  # its memory is for the next stage
        more = callbacks if plan.last else ()
        model = _run_stage(recipe, plan, folder, devices, loaded, state, weights, tensorboard, verbose, more)
    return model, state


def load(recipe: Recipe, *, data_dir: Path | None = None, download: bool = False) -> DataSet:
    """The data set of a recipe, as `train` uses it.

    Args:
        recipe: The recipe.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        download: Whether to download the data set if it is not there.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it does not fit the recipe: it has no test part, or no validation part to choose an epoch by; or
            if a file of it cannot be used, which the message names.
    """
    number = recipe.validation
    try:
        loaded = data.load(
            recipe.data,
            data_dir=data_dir,
            timesteps=recipe.timesteps or None,
            size=recipe.size or None,
            slicing=recipe.slicing,
            sensor=recipe.sensor or None,
            skip_corrupt=recipe.skip_corrupt,
            # At 1 and above it is a number of examples.
            validation=int(number) if number is not None and number >= 1 and number == int(number) else number,
            download=download,
        )
    except (ImageError, RecordingError) as error:
        raise ValueError(f"{error} {_IF_DAMAGED}") from error
    if not len(loaded.test):
        raise ValueError(f"{recipe.data!r} has no test part, which the result is measured on.")
    if recipe.selection == "best" and not len(loaded.validation):
        raise ValueError(
            f"The best epoch is chosen on validation examples, and {recipe.data!r} has none with "
            f"validation={recipe.validation!r}. Set selection='last', or validation higher."
        )
    return loaded if recipe.train_examples is None else loaded.with_training_examples(recipe.train_examples)


def require_validation(recipe: Recipe, loaded: DataSet) -> None:
    """Makes sure that settings of a recipe can be compared.

    Raises:
        ValueError: if the data set has no validation examples.
    """
    if not len(loaded.validation):
        raise ValueError(
            f"Settings are compared on validation examples, and {recipe.data!r} has none with "
            f"validation={recipe.validation!r}. Set validation higher."
        )


def _calibrated_by_chief(
    devices: Strategy, folder: Path, model: keras.Model, recipe: Recipe, plan: Plan, loaded: DataSet
) -> list[np.ndarray]:
    """What `_calibrated` gives, the same in all processes to the last bit, whatever processors they have.

    Args:
        devices: Where to train.
        folder: The run folder, through which the chief's weights come to the others.
        model: As for `_calibrated`.
        recipe: As for `_calibrated`.
        plan: As for `_calibrated`.
        loaded: As for `_calibrated`.
    """
    if devices.processes == 1:
        return _calibrated(model, recipe, plan, loaded)
    path = folder / _CALIBRATED

    def calibrate() -> None:
        weights = _calibrated(model, recipe, plan, loaded)
        with replacing(path) as beside:
            np.savez(beside, **{f"{number:06d}": weight for number, weight in enumerate(weights)})

    devices.on_chief(calibrate)
    devices.see(path)
    with np.load(path) as archive:
        return [archive[name] for name in sorted(archive)]


def _calibrated(model: keras.Model, recipe: Recipe, plan: Plan, loaded: DataSet) -> list[np.ndarray]:
    """Weights of a trained representation network, made ready for the stage that follows.

    Args:
        model: The network, of this process alone.
        recipe: The recipe.
        plan: The stage that follows.
        loaded: The data set.
    """
    size = min(recipe.batch_size, 128)
    examples = loaded.training_batches(size, seed=recipe.seed).take(math.ceil(_CALIBRATION_EXAMPLES / size))
    if plan.number == 1:  # later, thresholds have been trained to what they are for
        models.calibrate_thresholds(model, examples.as_numpy_iterator(), recipe.hybrid_percentile)
    if not plan.timesteps:
        return model.get_weights()
    with dtype_policy(recipe.precision):
        spiking = recipe.build(loaded.classes, loaded.input_shape)
    spiking.set_weights(model.get_weights())
    models.calibrate_normalization(spiking, examples.as_numpy_iterator())
    return spiking.get_weights()


def _run_stage(
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    devices: Strategy,
    loaded: DataSet,
    state: dict[str, Any],
    weights: list[np.ndarray] | None,
    tensorboard: bool,
    verbose: int | str,
    more: Sequence[keras.callbacks.Callback],
) -> keras.Model:
    """Trains one stage to its end and gives its model, which is of this process alone.

    Args:
        recipe: The recipe.
        plan: The stage.
        folder: The run folder.
        devices: Where to train.
        loaded: The data set.
        state: How far the run came; goes on from there, and is changed.
        weights: What the stage before came to, calibrated, if this process ran it.
        tensorboard: Whether to write TensorBoard's logs.
        verbose: As in `keras.Model.fit`.
        more: Callbacks that come after the one that writes the checkpoint.
    """
    # Each stage draws its own numbers, whether or not this process ran the one before.
    keras.utils.set_random_seed(recipe.seed + 7919 * plan.number)
    steps = loaded.steps(recipe.batch_size)

    # In bfloat16 it is slower with XLA than without.
    worth = plan.timesteps == 0 and recipe.precision == "float32" and steps * plan.epochs >= _STEPS_WORTH_COMPILING
    jit_compile = True if worth else "auto"
    with devices.scope():
        model = devices.prepare(_build(recipe, plan, loaded.classes, loaded.input_shape))
        _compile(model, recipe, plan, steps, devices.jit_compile(jit_compile))
        _fit(model, recipe, plan, folder, devices, loaded, state, weights, tensorboard, verbose, more)
        # After the last epoch the chief may still be at writing it.
        if plan.last and devices.see(folder / "best.npz"):
            checkpoints.restore(folder / "best.npz", model)
        if devices.name == "one":
            return model
        if plan.last and recipe.precision == "float32":  # else it is another network that comes out
            state["test_accuracy"] = _accuracy(model, loaded, loaded.test, devices)
    own = _build(recipe, plan, loaded.classes, loaded.input_shape)
    _compile(own, recipe, plan, steps, jit_compile)
    checkpoints.copy(model, own)
    return own


def stages(
    recipe: Recipe, classes: int, input_shape: tuple[int, ...], steps: int = 1
) -> Iterator[tuple[str, keras.Model]]:
    """The networks that `train` trains one after another, compiled as it compiles them.

    Args:
        recipe: The recipe.
        classes: Number of classes.
        input_shape: Shape of one input.
        steps: Updates in an epoch, for the schedule of the learning rate.

    Yields:
        Name of a stage, and its model.
    """
    for plan in recipe.plans():
        model = _build(recipe, plan, classes, input_shape)
        _compile(model, recipe, plan, steps, "auto")
        yield plan.name, model


def _build(recipe: Recipe, plan: Plan, classes: int, input_shape: tuple[int, ...]) -> keras.Model:
    with dtype_policy(recipe.precision):
        return recipe.build(classes, input_shape, plan.timesteps, plan.representation_steps)


def _compile(model: keras.Model, recipe: Recipe, plan: Plan, steps: int, jit_compile: bool | str) -> None:
    compile_model(
        model,
        recipe,
        steps * plan.epochs,
        optimizer=plan.optimizer,
        learning_rate=plan.learning_rate,
        weight_decay=plan.weight_decay,
        jit_compile=jit_compile,
    )


def _fit(
    model: keras.Model,
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    devices: Strategy,
    loaded: DataSet,
    state: dict[str, Any],
    weights: list[np.ndarray] | None,
    tensorboard: bool,
    verbose: int | str,
    more: Sequence[keras.callbacks.Callback],
) -> None:
    """Trains a compiled model from where the run is to the end of the stage; arguments as in `_run_stage`."""
    done = 0
    if state["stage"] == plan.number:
        checkpoints.restore(folder / "checkpoint.npz", model)
        done = state["epoch"]
    elif weights is not None:
        model.set_weights(weights)
        if plan.last:
            state["calibrated"] = _accuracy(model, loaded, loaded.validation, devices)
        state["best"] = [0, -1.0]
    if not state["rows"]:
        state["initial_thresholds"] = firing.thresholds(model)

    keep_best = plan.last and recipe.selection == "best"
    callbacks: list[keras.callbacks.Callback] = [_Keeper(folder, plan, state, keep_best, devices.is_chief)]
    if tensorboard and devices.is_chief:
        callbacks.append(keras.callbacks.TensorBoard(folder / "tensorboard" / plan.name, write_graph=False))
    callbacks.extend(more)
    if done < plan.epochs:
        fit_epochs(
            model,
            recipe,
            loaded,
            devices=devices,
            epochs=plan.epochs,
            first_epoch=done,
            seed=recipe.seed + 7919 * plan.number,
            callbacks=callbacks,
            verbose=verbose if devices.is_chief else 0,
        )


def fit_epochs(
    model: keras.Model,
    recipe: Recipe,
    loaded: DataSet,
    *,
    devices: Strategy | None = None,
    epochs: int,
    first_epoch: int = 0,
    seed: int,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: int | str = "auto",
) -> keras.callbacks.History:
    """Trains a compiled network on a recipe's batches, as long as all numbers are finite.

    Args:
        model: The network.
        recipe: Batch size and augmentation.
        loaded: The data set.
        devices: Where to train; `None` for one device.
        epochs: Number of the epoch to end with.
        first_epoch: Number of epochs that came before.
        seed: Seed of order and augmentation.
        callbacks: As in `keras.Model.fit`.
        verbose: As in `keras.Model.fit`.

    Raises:
        ValueError: if a loss, weight or threshold becomes NaN or infinite on the way, or a file of the data set cannot
            be decoded.
    """
    devices = devices or strategy()
    batches = loaded.training_batches(
        recipe.batch_size,
        seed=seed,
        augmentation=Augmentation(recipe.augmentation, padding=recipe.padding, cutout=recipe.cutout),
        epochs=epochs,
        first_epoch=first_epoch,
        own=devices.own(recipe.batch_size),
    )
    validation, validation_steps = None, None
    if len(loaded.validation):
        validation, validation_steps = _evaluation_batches(loaded, loaded.validation, devices)
    with _own_errors():
        return model.fit(
            devices.training_batches(batches, recipe.batch_size),
            validation_data=validation,
            validation_steps=validation_steps,
            steps_per_epoch=loaded.steps(recipe.batch_size),
            epochs=epochs,
            initial_epoch=first_epoch,
            shuffle=False,  # the batches are, already
            callbacks=[CheckFinite(), *callbacks],
            verbose=verbose,
        )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Our own errors where TensorFlow raises one of its own, with our message somewhere within.

    Raises:
        ValueError: if a threshold is not finite, or a file of the data set cannot be decoded.
    """
    try:
        yield
    except Exception as error:
        if found := re.search(not_finite("threshold of [^.]*?"), str(error)):
            raise ValueError(found[0]) from error
        if found := re.search(r"(?:ImageError|RecordingError): (.+)", str(error)):
            raise ValueError(f"{found[1]} {_IF_DAMAGED}") from error
        raise


def _evaluation_batches(loaded: DataSet, part: Part, devices: Strategy) -> tuple[Any, int | None]:
    """What `evaluate` gets of a part, and in how many steps; `None` to go on to its end."""
    size = devices.evaluation_batch_size(128)
    return devices.evaluation_batches(loaded.batches(part, size, own=devices.own(size)), len(part), size)


def _accuracy(model: keras.Model, loaded: DataSet, part: Part, devices: Strategy | None = None) -> float | None:
    """Accuracy on a part; `None` if it is empty."""
    if not len(part):
        return None
    batches, steps = _evaluation_batches(loaded, part, devices or strategy())
    with _own_errors():
        return float(model.evaluate(batches, steps=steps, verbose=0, return_dict=True)["accuracy"])


def _finish(
    recipe: Recipe, folder: Path, devices: Strategy, loaded: DataSet, state: dict[str, Any], model: keras.Model
) -> Summary:
    devices.on_chief(lambda: _write_results(recipe, folder, loaded, state, model))
    for name in ("model.keras", "summary.json"):
        devices.see(folder / name)
    return runs.summary_of(folder)


def _write_results(recipe: Recipe, folder: Path, loaded: DataSet, state: dict[str, Any], model: keras.Model) -> None:
    if recipe.precision != "float32":
        trained = model
        with dtype_policy("float32"):
            model = recipe.build(loaded.classes, loaded.input_shape)
        compile_model(model, recipe, loaded.steps(recipe.batch_size) * recipe.epochs)
        checkpoints.copy(trained, model)
    with replacing(folder / "model.keras") as beside:
        model.save(beside)
    rows = state["rows"]
    stages = []
    for plan in recipe.plans():
        mine = [row for row in rows if row["stage"] == plan.name]
        calibrated = state["calibrated"] if plan.last and plan.number else None
        accuracies = [row.get("val_accuracy") for row in mine] or [calibrated]
        chosen = state["best"][1] if plan.last and state["best"][0] else accuracies[-1]
        seconds = sum(row["seconds"] for row in mine)
        stages.append(Stage(plan.name, plan.timesteps, len(mine), seconds, chosen, calibrated))
    saved = None
    if len(stages) > 1 and stages[-1].epochs:
        # By the median: the first epoch of a stage compiles.
        typical = statistics.median(row["seconds"] for row in rows if row["stage"] == stages[-1].name)
        saved = sum(stage.epochs * typical - stage.seconds for stage in stages[:-1])
    accuracy = state.get("test_accuracy")
    summary = Summary(
        test_accuracy=_accuracy(model, loaded, loaded.test) if accuracy is None else accuracy,
        test_examples=len(loaded.test),
        validation_accuracy=stages[-1].validation_accuracy,
        epoch=state["best"][0] or stages[-1].epochs,
        firing_rates=_rates(model, recipe, loaded, loaded.test),
        thresholds=firing.thresholds(model),
        timesteps=recipe.timesteps,
        seconds=sum(stage.seconds for stage in stages),
        seconds_saved=saved,
        stages=tuple(stages),
    )
    if recipe.timesteps and rows:
        _draw(folder / "figure.png", model, recipe, loaded, state, summary)
    (folder / _CALIBRATED).unlink(missing_ok=True)
    runs.write(folder / "summary.json", summary.to_json())


def _rates(model: keras.Model, recipe: Recipe, loaded: DataSet, part: Part) -> dict[str, float]:
    if not recipe.timesteps:
        return {}
    # In another order than that of the files, which may be class by class.
    batches = loaded.batches(part, 64, seed=0).take(math.ceil(_RATE_EXAMPLES / 64))
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
        ValueError: if a file of the data set cannot be used, which the message names.
    """
    before = runs.summary_of(folder)
    recipe = runs.recipe_of(folder)
    model = keras.models.load_model(folder / "model.keras")
    loaded = load(recipe, data_dir=data_dir)
    return dataclasses.replace(
        before,
        test_accuracy=_accuracy(model, loaded, loaded.test),
        firing_rates=_rates(model, recipe, loaded, loaded.test),
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

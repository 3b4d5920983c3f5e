"""A `fit` that goes on where a kill ended it, to the same weights."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import backend, checkpoints
from keras_dsr.callbacks.finite import CheckFinite
from keras_dsr.callbacks.recording import FiringRate, SpikeHistograms, at_least_one
from keras_dsr.distribution import Strategy
from keras_dsr.distribution.base import check_backend, check_devices, versions
from keras_dsr.files import remove_left_over

# An epoch that no training comes to.
_BEYOND = 2**31 - 1
# Entries of a config that differ with what else the process made, or are drawn.
_NUMBERED = ("name", "seed", "keras_history", "input_layers", "output_layers")
# Characters of a setting that are kept; of what is longer, a digest too.
_LONG = 100


class Checkpoint(keras.callbacks.Callback):
    """Keeps all that a `fit` needs to go on, so that the same script, run again after a kill, ends with equal weights.

    In its file: weights, the optimizer's slots and iterations (and so the place in a schedule of the learning rate),
    seeds of dropout and augmentation layers, the state of the callbacks that it is given, metrics and their history,
    and the place in the data: epoch, and batch within it. It appears whole or not at all, and the one before is kept
    beside it. Weights are those of a run that was not killed, bit for bit where the device computes alike each time, as
    CPUs do.

    Data: begun with `initial_epoch=e`, `fit` must get the batches that epoch e had. A checkpoint within an epoch is
    gone on from by reading its batches up to there once more and leaving them out; callbacks that `fit` has beside this
    one see these steps. What does so: arrays with `shuffle=False`; a `tf.data.Dataset` whose every pass gives the same
    batches; a `keras.utils.PyDataset` that does, with `shuffle=False` and (on JAX) one worker; and where order and
    augmentation change from epoch to epoch, `keras_dsr.data.DataSet.training_batches(..., epochs=epochs,
    first_epoch=min(checkpoint.initial_epoch, epochs - 1))`, which has batches for Keras to look at when all epochs are
    done, too. What does not: `shuffle=True`, which is the default of `fit` for arrays and `PyDataset`; `tf.data` that
    is shuffled anew each pass; generators that do not begin again; and any with a `steps_per_epoch` other than one pass
    (or epoch of `training_batches`), as Keras goes on in the same pass then. `fit` does not tell its callbacks which of
    them it has, so this is the caller's to see to; a number of batches that differs is an error.

    Callbacks: give those whose state must go on as `callbacks`, not to `fit`: they are called as `fit` would call them,
    ahead of the writing. Keras's own are known (EarlyStopping, ReduceLROnPlateau, ModelCheckpoint, SwapEMAWeights,
    TensorBoard, CSVLogger, LearningRateScheduler, LambdaCallback, TerminateOnNaN), and those of `keras_dsr.callbacks`.
    One of your own has `get_state()`, of dicts with texts as keys, lists, numbers, texts, `None` and NumPy arrays, and
    `set_state(state)`, which is called after `on_train_begin`; within an epoch after `on_epoch_begin`, too. What a
    callback did outside of the process after the last checkpoint, such as a row in a log, is done once more.

    What it costs: writing the weights and the optimizer, at the end of each epoch and as often as `every` says. Of the
    logs of each batch Keras makes numbers, and so waits for it, as for every callback that looks at batches.

    Args:
        folder: Folder for `checkpoint.npz`, and `previous.npz`, the one before it; made if it is not there. Of several
            processes all name the same one, and the chief writes.
        every: "epoch", or a number of batches, after which a checkpoint is written within an epoch, too.
        callbacks: Callbacks to call and to keep the state of, in order.
        devices: Where `fit` trains, of `keras_dsr.training.strategy`; `None` for one device. All processes make their
            callback, and wait for one another there.

    Attributes:
        initial_epoch: The epoch to go on with, for `fit`; beyond all epochs if a callback had ended the training.
        initial_batch: How many batches of that epoch are done.

    Raises:
        ValueError: if `every` is neither; a callback is not known and has no `get_state` and `set_state`; the file in
            the folder is damaged, or not of this callback, or of other versions of packages, another Keras backend,
            other devices or numbers of processes, or other callbacks; from `fit`, if it is of another model or
            optimizer or, within an epoch, of other metrics, `fit` begins with another epoch, the data has another
            number of batches, the model is not built, or a callback's `get_state` gives something else.
        FileNotFoundError: if processes do not see the same folder.

    Example:
        checkpoint = Checkpoint("runs/mine", every=500, callbacks=[keras.callbacks.EarlyStopping(patience=3)])
        model.fit(x, y, shuffle=False, epochs=50, initial_epoch=checkpoint.initial_epoch, callbacks=[checkpoint])
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: str | int = "epoch",
        callbacks: Sequence[keras.callbacks.Callback] = (),
        devices: Strategy | None = None,
    ) -> None:
        super().__init__()
        if every != "epoch":
            if isinstance(every, str):
                raise ValueError(f"every is 'epoch', or a number of batches. Received every={every!r}.")
            at_least_one("every", every)
        self.every = every
        self.callbacks = tuple(callbacks)
        for callback in self.callbacks:
            _check_kept(callback)
        self.devices = devices or Strategy()
        folder = Path(folder)
        self.path, self.previous = folder / "checkpoint.npz", folder / "previous.npz"
        self.devices.on_chief(self._make_folder)
        self._read_from = next((path for path in (self.path, self.previous) if self.devices.see(path)), None)
        self._progress: dict[str, Any] | None = None
        if self._read_from is not None:
            self._progress = self.devices.everyone(self._read)
        self._skipping: _Skipping | None = None
        self._started = False

    def _make_folder(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_over(self.path)

    @property
    def initial_epoch(self) -> int:
        if self._progress is None:
            return 0
        return _BEYOND if self._progress["stopped"] else self._progress["epoch"]

    @property
    def initial_batch(self) -> int:
        return 0 if self._progress is None else self._progress["batch"]

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        for callback in self.callbacks:
            callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        super().set_params(params)
        for callback in self.callbacks:
            callback.set_params(params)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._started = False
        if self._skipping is not None:  # of a fit that an error ended
            self._skipping.end()
            self._skipping = None
        self._history: dict[str, list[Any]] = {}
        self._epochs: list[int] = []
        if not self.model.built:
            raise ValueError(
                f"A checkpoint is of a model with weights, and {self.model.name!r} has none yet. Give it an Input, or "
                "call it on a batch, ahead of fit."
            )
        if self._progress is None:
            self._tell("on_train_begin", logs)
            return
        progress = self._progress
        steps = self.params.get("steps")
        if None not in (steps, progress["steps"]) and steps != progress["steps"]:
            raise ValueError(
                f"{self._read_from} is of a training with {progress['steps']} batches an epoch. Received {steps}; give "
                "fit the same data and batch size, or name another folder."
            )
        self._check_same("model", _differing_layers(progress["layers"], _layers_of(self.model)))
        self._check_same("optimizer", _differences(progress["optimizer"], _optimizer_of(self.model)))
        self._tell("on_train_begin", logs)  # which may make files
        checkpoints.restore(self._read_from, self.model)
        self._set_states()
        self._history = {name: list(values) for name, values in progress["history"].items()}
        self._epochs = list(progress["epochs"])

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._epoch, self._done, self._since = epoch, 0, 0
        if self._started:
            self._tell("on_epoch_begin", epoch, logs)
            return
        self._started = True
        if epoch != self.initial_epoch:
            raise ValueError(f"{self._next()} Received {epoch}; call fit with initial_epoch=checkpoint.initial_epoch.")
        self._give_history()
        self._tell("on_epoch_begin", epoch, logs)
        if self.initial_batch:
            # A callback may have changed something, as it had when this epoch was begun.
            checkpoints.restore(self._read_from, self.model)
            self._set_states()
            self._skipping = _Skipping(self.model, self._progress["metrics"], self._check_same)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._skipping is not None:
            if batch < self.initial_batch:
                self._skipping.instead_of_a_step()
                return
            self._end_skipping()
        self._tell("on_train_batch_begin", batch, logs)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._skipping is not None:
            return
        self._tell("on_train_batch_end", batch, logs)
        self._since += batch + 1 - self._done
        self._done = batch + 1
        # With steps_per_execution, Keras counts the last ones up to its multiple.
        if self.every == "epoch" or self._since < self.every or self._done >= (self.params.get("steps") or math.inf):
            return
        self._since = 0
        model = self.model  # on JAX, Keras gives it the weights of now as it is asked for, which takes time
        if not model.stop_training:  # else the epoch ends here
            self._write(self._epoch, self._done, _metrics_of(model))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if self._skipping is not None:
            self._end_skipping()
        self._tell("on_epoch_end", epoch, logs)
        for name, value in (logs or {}).items():
            self._history.setdefault(name, []).append(value)
        self._epochs.append(epoch)
        self._write(epoch + 1, 0, None)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if not self._started:
            self._give_history()
        self._tell("on_train_end", logs)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._tell("on_test_begin", logs)

    def on_test_end(self, logs: dict[str, Any] | None = None) -> None:
        self._tell("on_test_end", logs)

    def on_test_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._tell("on_test_batch_begin", batch, logs)

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._tell("on_test_batch_end", batch, logs)

    def _tell(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _set_states(self) -> None:
        # Of their own, as callbacks may change what they get.
        for callback, (_, state) in zip(self.callbacks, copy.deepcopy(self._progress["callbacks"]), strict=True):
            _set_state(callback, state)

    def _next(self) -> str:
        """Which epoch is the next, in words."""
        if self._progress is None:
            return f"There is no checkpoint in {self.path.parent}: the training begins with epoch 0."
        if self._progress["stopped"]:
            return f"{self._read_from} is of a training that a callback ended: no epoch is left."
        return f"{self._read_from} is gone on from with epoch {self.initial_epoch}."

    def _give_history(self) -> None:
        """Has what `fit` gives back speak of all epochs."""
        history = self.model.history
        history.history = {name: list(values) for name, values in self._history.items()}
        history.epoch = list(self._epochs)

    def _end_skipping(self) -> None:
        skipped, self._skipping = self._skipping, None
        self._done = done = skipped.done
        # Of data whose length is not known, steps_per_execution may have counted more than its end had.
        missing = self.initial_batch - done
        at_end = skipped.ended and self.params.get("steps") is None and 0 < missing < self.model.steps_per_execution
        if missing and not at_end:
            raise ValueError(
                f"{self._read_from} is {self.initial_batch} batches into epoch {self._epoch}, and {done} could be left "
                "out: the data ended, or steps_per_execution does not divide them. Give fit the same data and compile "
                "the model as before, or name another folder."
            )

    def _write(self, epoch: int, batch: int, metrics: dict[str, Any] | None) -> None:
        progress = {
            "epoch": epoch,
            "batch": batch,
            "stopped": bool(self.model.stop_training),
            "steps": self.params.get("steps"),
            "metrics": metrics,
            "history": self._history,
            "epochs": self._epochs,
            "callbacks": [[type(callback).__name__, _get_state(callback)] for callback in self.callbacks],
            "layers": _layers_of(self.model),
            "optimizer": _optimizer_of(self.model),
            "backend": keras.backend.backend(),
            "packages": _packages(),
            "devices": self.devices.facts(),
        }
        checkpoints.save(self.path, self.model, progress, self.devices.is_chief, self.previous)
        # What the file has, though the training goes on.
        self._progress = copy.deepcopy(progress)
        self._read_from = self.path

    def _read(self) -> dict[str, Any]:
        """What the file says, if a training can go on from it here."""
        path = self._read_from
        try:
            progress = checkpoints.progress(path)
        except ValueError as error:
            if path == self.path and self.previous.is_file():
                raise ValueError(
                    f"{error} The one before it is {self.previous}: remove {path} to go on from there."
                ) from error
            raise
        if "packages" not in progress:
            raise ValueError(f"{path} is a checkpoint, but keras_dsr.callbacks.Checkpoint did not write it.")
        check_backend(path, progress["backend"])
        differing = _differences(progress["packages"], _packages())
        if differing:
            raise ValueError(
                f"{path} was written with other versions of packages, which may round sums otherwise. Expected "
                f"{differing}. Install those that it was begun with, or name another folder."
            )
        check_devices(path, progress["devices"], self.devices.facts())
        names = [type(callback).__name__ for callback in self.callbacks]
        begun = [name for name, _ in progress["callbacks"]]
        if names != begun:
            raise ValueError(
                f"{path} is of a training with the callbacks {begun}. Received {names}; give the same in the same "
                "order, or name another folder."
            )
        return progress

    def _check_same(self, what: str, differing: str) -> None:
        if differing:
            raise ValueError(
                f"{self._read_from} is of another {what}, and a training goes on to equal weights only with the same. "
                f"Expected {differing}. Go on with the {what} that it was begun with, or name another folder "
                "(keras_dsr.checkpoints.restore gives weights and optimizer alone, if they fit)."
            )


class _Skipping:
    """Has the steps of a `fit` do nothing but read their batches.

    It stands in for `model.train_function`, which `fit` asks for at each step, and for one step each time: an error on
    the way leaves the model as it was. One of another callback may come ahead of that step; what stands in then is
    taken away with `end`, and trains if another `fit` is first to ask for it.

    Args:
        model: A model that is about to train.
        metrics: Its metrics as they stand, of `_metrics_of`.
        check_same: Called with "set of metrics" and what differs from the model's, or "".

    Attributes:
        done: How many batches were read.
        ended: Whether the last step had fewer than it should have.
    """

    def __init__(self, model: keras.Model, metrics: dict[str, Any], check_same: Callable[[str, str], None]) -> None:
        self._model = model
        self._metrics = metrics
        self._check_same = check_same
        self.done, self.ended = 0, False
        self._own = model.train_function
        self._history = model.history  # each fit has one of its own
        self._logs: dict[str, Any] | None = None
        # On TensorFlow they are made with the first step (and never, if a model's own steps have no use for them), on
        # JAX they are away while steps run.
        if _has_metrics(model) or not metrics["built"]:
            self._set_metrics()

    def instead_of_a_step(self) -> None:
        """Has the step that comes next be left out."""
        self._model.train_function = self._step

    def end(self) -> None:
        """Has the model train again, if a step that was to be left out did not come."""
        if self._model.train_function == self._step:
            self._model.train_function = self._own

    def _set_metrics(self) -> None:
        kinds = [dict(enumerate(_kinds_of_metrics(self._model))), dict(enumerate(self._metrics["kinds"]))]
        self._check_same("set of metrics", _differences(*reversed(kinds)))
        for variable, value in zip(self._model.metrics_variables, self._metrics["values"], strict=True):
            variable.assign(value)
        self._logs = self._model.get_metrics_result()

    def _step(self, *arguments: Any) -> Any:
        self._model.train_function = self._own
        if self._model.history is not self._history:
            return self._own(*arguments)
        *state, iterator = arguments  # on JAX the state comes first, and goes back beside the logs
        batch = next(iterator)
        self.done += 1
        for _ in range(self._model.steps_per_execution - 1):
            following = next(iterator, None)
            if following is None:
                self.ended = True
                break
            batch = following
            self.done += 1
        if self._logs is None:
            self._model._symbolic_build(data_batch=batch)
            self._set_metrics()
        return (self._logs, *state) if state else self._logs


# What of Keras's callbacks changes as they are called; of their subclasses it may be more.
_KEPT: dict[type[keras.callbacks.Callback], tuple[str, ...]] = {
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_weights", "best_epoch"),
    keras.callbacks.ReduceLROnPlateau: ("best", "cooldown_counter", "wait"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch"),
    keras.callbacks.CSVLogger: (),
    keras.callbacks.LambdaCallback: (),
    keras.callbacks.LearningRateScheduler: (),
    keras.callbacks.TerminateOnNaN: (),
    CheckFinite: (),
    FiringRate: (),
    SpikeHistograms: (),
}


def _check_kept(callback: keras.callbacks.Callback) -> None:
    """Raises, if it is not known what of a callback to keep."""
    name = type(callback).__name__
    if not isinstance(callback, keras.callbacks.Callback):
        raise ValueError(f"callbacks are keras.callbacks.Callback. Received {callback!r}.")
    if isinstance(callback, keras.callbacks.CSVLogger) and not callback.append:
        raise ValueError("CSVLogger would begin its file anew where a training goes on: pass append=True to it.")
    if type(callback) not in _KEPT and not (hasattr(callback, "get_state") and hasattr(callback, "set_state")):
        raise ValueError(
            f"What {name} keeps would be lost: it has no get_state and set_state. Give it both (of {{}} if it keeps "
            "nothing), or pass it to fit beside the checkpoint."
        )


def _get_state(callback: keras.callbacks.Callback) -> Any:
    if type(callback) not in _KEPT:
        state = callback.get_state()
        _check_state(type(callback).__name__, state)
        return state
    return {name: _plain(getattr(callback, name)) for name in _KEPT[type(callback)]}


def _check_state(name: str, value: Any) -> None:
    """Raises, if the state of a callback would not come back from a file as it is."""
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ValueError(f"The state of {name} has dicts with texts as keys. Received {key!r} in get_state().")
            _check_state(name, each)
    elif isinstance(value, list):
        for each in value:
            _check_state(name, each)
    elif isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biufcSU" and not checkpoints.is_extension(value.dtype):
            raise ValueError(
                f"The state of {name} has NumPy arrays of numbers or texts. Received {value.dtype} in get_state()."
            )
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(
            f"The state of {name} is of dicts, lists, numbers, texts, None and NumPy arrays. Received {value!r}, of "
            f"{type(value).__name__}, in get_state()."
        )


def _set_state(callback: keras.callbacks.Callback, state: Any) -> None:
    if type(callback) not in _KEPT:
        callback.set_state(state)
        return
    for name, value in state.items():
        setattr(callback, name, value)


def _plain(value: Any) -> Any:
    """An attribute of a callback of Keras, with NumPy arrays in place of tensors."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value


def _packages() -> dict[str, str]:
    """The packages that sums depend on."""
    return {name: version for name, version in versions().items() if name != "python"}


def _layers_of(model: keras.Model) -> list[dict[str, Any]]:
    """What tells a model from another: for each layer its kind and settings; and its name, for errors."""
    found = []
    for layer in model._flatten_layers(include_self=False, recursive=True):
        settings = {}
        # A model's are its layers'; some of a user's own have none that can be had.
        if not isinstance(layer, keras.Model) and type(layer).get_config is not keras.layers.Layer.get_config:
            settings = _settings(layer.get_config())
        settings["dtype"] = layer.dtype_policy.name
        found.append({"kind": type(layer).__name__, "name": layer.name, "settings": settings})
    return found


def _optimizer_of(model: keras.Model) -> dict[str, str]:
    """Settings of an optimizer; its learning rate only if it is a schedule, as callbacks may change a number."""
    return {"kind": type(model.optimizer).__name__, **_settings(model.optimizer.get_config())}


def _metrics_of(model: keras.Model) -> dict[str, Any]:
    """Metrics as they stand within an epoch, and what tells them from others."""
    return {
        "built": _has_metrics(model),
        "kinds": _kinds_of_metrics(model),
        "values": [backend.to_numpy(variable.value) for variable in model.metrics_variables],
    }


def _has_metrics(model: keras.Model) -> bool:
    """Whether Keras has made the metrics that a model is compiled with."""
    return all(part is None or part.built for part in (model._compile_metrics, model._compile_loss))


def _kinds_of_metrics(model: keras.Model) -> list[str]:
    """For each variable of metrics what it is, without numbers that Keras gives to what has no name."""
    found = []
    for metric in model.metrics:
        for each in getattr(metric, "metrics", [metric]):
            kind = type(each).__name__
            name = "" if _stem(each.name).replace("_", "") == kind.lower() else f" {each.name!r}"
            found += [f"{kind}{name} {_stem(variable.name)} {list(variable.shape)}" for variable in each.variables]
    return found


def _stem(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _settings(config: Any, name: str = "") -> dict[str, str]:
    """What a config says, as texts by names such as "layer.config.units".

    Left out are: names, which Keras numbers by what else the process made, of the layers that a layer has in it, too;
    seeds, which some layers draw if they get none, and whose state is a variable; and a learning rate that is a number.
    """
    if isinstance(config, (list, tuple)) and _has_dict(config):
        config = {str(number): each for number, each in enumerate(config)}
    if not isinstance(config, dict):
        text = json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__)
        if len(text) > _LONG:
            text = f"{text[:_LONG]}... {hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return {name: text}
    found: dict[str, str] = {}
    for key, value in config.items():
        if key not in _NUMBERED and (key != "learning_rate" or isinstance(value, dict)):
            found |= _settings(value, f"{name}.{key}" if name else key)
    return found


def _has_dict(value: Any) -> bool:
    """Whether a config, or a list of a list, has entries by name."""
    return isinstance(value, dict) or (isinstance(value, (list, tuple)) and any(_has_dict(each) for each in value))


def _differences(expected: Mapping[str, Any], received: Mapping[str, Any]) -> str:
    """Some of what differs, and "" if nothing does."""
    names = [name for name in {**expected, **received} if received.get(name) != expected.get(name)]
    return ", ".join(f"{name}={expected.get(name)} and received {received.get(name)}" for name in names[:4])


def _differing_layers(expected: list[dict[str, Any]], received: list[dict[str, Any]]) -> str:
    """The first layer that differs and how, and "" if none does."""
    for number, (before, now) in enumerate(itertools.zip_longest(expected, received)):
        if before is None or now is None or before["kind"] != now["kind"]:
            kinds = [f"{each['kind']} {each['name']!r}" if each else "none" for each in (before, now)]
            return f"as layer {number} {kinds[0]} and received {kinds[1]}"
        differing = _differences(before["settings"], now["settings"])
        if differing:
            return f"of {now['kind']} {now['name']!r} {differing}"
    return ""

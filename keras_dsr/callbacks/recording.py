"""What neurons and thresholds do while a network trains."""

from __future__ import annotations

import os
from typing import Any

import keras
import numpy as np

from keras_dsr.analysis.firing import thresholds
from keras_dsr.analysis.tracing import Recorder, Tracer
from keras_dsr.layers.neurons import neurons_of


class FiringRate(keras.callbacks.Callback):
    """Puts the firing rates of all neuron layers on fixed samples into the logs of each epoch.

    `History`, `CSVLogger` and `TensorBoard` find them there, if they come later in the list of callbacks:
    `firing_rate`, over all neurons, and `firing_rate_LAYER`. Nothing is asked of the model between.

    What it costs: one inference of the samples an epoch, with spikes counted where the model runs; and compiling that
    once.

    Args:
        x: Samples to look at, of shape (samples, ...): some hundred of the validation part, say.
        batch_size: Samples that run at once.
        every: Number of epochs from one look to the next; the first looks too.

    Raises:
        ValueError: if there are no samples or `every` is below 1; from `fit`, if the model has no spiking layers or no
            time steps.
    """

    def __init__(self, x: Any, batch_size: int = 128, every: int = 1) -> None:
        super().__init__()
        self.x = _samples(x)
        self.batch_size = batch_size
        self.every = at_least_one("every", every)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._trace = Tracer(self.model)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is None or epoch % self.every:
            return
        traced = self._trace(self.x, self.batch_size)
        logs["firing_rate"] = traced.firing_rate
        logs.update({f"firing_rate_{name}": rate for name, rate in traced.firing_rates.items()})


class ThresholdHistory(keras.callbacks.Callback):
    """Keeps the threshold of every neuron layer, and puts it into the logs of each epoch as `threshold_LAYER`.

    What it costs: reading one number a layer.

    Args:
        every: Number of batches from one reading to the next; `None` to read at the end of epochs alone.

    Attributes:
        history: For each neuron layer, by name and in order, its thresholds: ahead of the first batch, then as they
            were read.

    Raises:
        ValueError: if `every` is below 1; from `fit`, if the model has no spiking layers.
    """

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        self.every = None if every is None else at_least_one("every", every)
        self.history: dict[str, list[float]] = {}
        self._batches = 0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if not neurons_of(self.model):
            raise ValueError(f"Model {self.model.name!r} has no spiking layers (IFSpike, LIFSpike) with a threshold.")
        if not self.history:
            self._read()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._batches += 1
        if self.every is not None and self._batches % self.every == 0:
            self._read()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        found = thresholds(self.model) if self.every is not None else self._read()
        if logs is not None:
            logs.update({f"threshold_{name}": value for name, value in found.items()})

    def get_state(self) -> dict[str, Any]:
        """What `Checkpoint` keeps of it."""
        return {"history": self.history, "batches": self._batches}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self.history = {name: list(values) for name, values in state["history"].items()}
        self._batches = state["batches"]

    def _read(self) -> dict[str, float]:
        found = thresholds(self.model)
        for name, value in found.items():
            self.history.setdefault(name, []).append(value)
        return found


class SpikeHistograms(keras.callbacks.Callback):
    """Writes for TensorBoard, an epoch: histograms of currents, potentials and firing rates of each neuron layer.

    `LAYER/current` has I[n] and `LAYER/potential` V[n] in units of V_th, of all neurons, steps and samples;
    `LAYER/firing_rate` the rates of single neurons; `LAYER/threshold` is V_th, a scalar.

    What it costs: an inference of the samples an epoch, which comes back with all currents and spikes, about 8 bytes
    for each neuron, step and sample: 16 samples are enough; and compiling that once.

    Args:
        log_dir: Folder for the logs, such as that of `keras.callbacks.TensorBoard`, or a folder in it.
        x: Samples to look at, of shape (samples, ...).
        every: Number of epochs from one look to the next; the first looks too.

    Raises:
        ValueError: if there are no samples or `every` is below 1; from `fit`, if the model has no spiking layers or no
            time steps.
        ImportError: if TensorFlow or TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | os.PathLike[str], x: Any, every: int = 1) -> None:
        super().__init__()
        check_tensorboard()
        import tensorflow as tf

        self.x = _samples(x)
        self.every = at_least_one("every", every)
        self._summary = tf.summary
        self._log_dir = os.fspath(log_dir)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._record = Recorder(self.model)  # raises, ahead of what a writer would leave
        self._writer = self._summary.create_file_writer(self._log_dir)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if epoch % self.every:
            return
        (recorded,) = self._record(self.x, len(self.x))
        with self._writer.as_default(epoch):
            for name, layer in recorded.items():
                self._summary.histogram(f"{name}/current", layer.currents / layer.threshold)
                self._summary.histogram(f"{name}/potential", layer.potentials / layer.threshold)
                self._summary.histogram(f"{name}/firing_rate", layer.spikes.mean(axis=(0, 1)))
                self._summary.scalar(f"{name}/threshold", layer.threshold)
        self._writer.flush()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises, if TensorBoard's logs cannot be written: Keras and TensorFlow fail late and unclearly without it.

    Raises:
        ImportError: if TensorFlow or TensorBoard is not installed.
    """
    try:
        import tensorboard  # noqa: F401
        import tensorflow as tf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "TensorBoard's logs need the packages tensorboard and tensorflow. Install them with: "
            "pip install 'keras-dsr[tensorboard]'."
        ) from error


def _samples(x: Any) -> np.ndarray:
    x = np.asarray(x)
    if not x.ndim or not len(x):
        raise ValueError(f"Samples to look at are an array (samples, ...) of at least one. Received shape {x.shape}.")
    return x


def at_least_one(name: str, value: int) -> int:
    """The value, which may be nothing but a whole number of at least 1.

    Raises:
        ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1. Received {name}={value!r}.")
    return value

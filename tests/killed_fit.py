"""A training by `model.fit` with a checkpoint, for tests that kill it; run as a script, on one device or several."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import sklearn.datasets

import keras_dsr
from keras_dsr import backend, distribution
from keras_dsr.callbacks import Checkpoint, ThresholdHistory
from keras_dsr.data.augmentation import Augmentation
from keras_dsr.data.parts import ArrayPart, DataSet

EPOCHS, BATCH, STEPS = 3, 16, 12


def data() -> tuple[np.ndarray, ...]:
    """Inputs and labels to train on, and to validate with."""
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    x, y = (x / 16).astype("float32").reshape(-1, 8, 8, 1), y.astype("int32")
    count = BATCH * STEPS
    return x[:count], y[:count], x[count : count + 96], y[count : count + 96]


def arrays(checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of `fit`: the same batches in each epoch."""
    x, y, *validation = data()
    return {"x": x, "y": y, "batch_size": BATCH, "shuffle": False, "validation_data": tuple(validation)}


def dataset(
    checkpoint: Checkpoint, devices: distribution.Strategy | None = None, epochs: int = EPOCHS
) -> dict[str, Any]:
    """Arguments of `fit`: order and augmentation change from epoch to epoch."""
    devices = devices or distribution.Strategy()
    x, y, *validation = data()
    parts = (ArrayPart(x, y), *[ArrayPart(*validation)] * 2)
    whole = DataSet("digits", *parts, 10, (8, 8, 1), (0.3,), (0.4,), tuple("0123456789"))
    batches = whole.training_batches(
        BATCH,
        seed=5,
        augmentation=Augmentation(("crop",), padding=1),
        epochs=epochs,
        first_epoch=min(checkpoint.initial_epoch, epochs - 1),
    )
    looks, steps = devices.evaluation_batches(whole.batches(whole.validation, BATCH), len(whole.validation), BATCH)
    return {
        "x": devices.training_batches(batches, BATCH),
        "steps_per_epoch": STEPS,
        "validation_data": looks,
        "validation_steps": steps,
        "shuffle": False,
    }


def network(
    units: int = 24, rate: float = 0.2, threshold: float = 1.0, dtype: str | None = None, more: bool = False
) -> keras.Model:
    """A dense network of IF neurons, with an augmentation layer and dropout.

    Args:
        units: Number of neurons.
        rate: Of dropout.
        threshold: V_th of all neurons.
        dtype: Policy of the first dense layer; `None` for the global one.
        more: Whether there is another layer at the end.
    """
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.RandomFlip("horizontal", seed=1)(inputs)
    x = keras.layers.Dense(units, dtype=dtype)(keras.layers.Flatten()(x))
    x = keras_dsr.layers.IFSpike(threshold=threshold, timesteps=4, name="if_spike")(x)
    x = keras_dsr.layers.Dropout(rate, seed=2)(x)
    outputs = keras_dsr.layers.SpikeRep()(keras_dsr.layers.Synapse(keras.layers.Dense(10))(x))
    if more:
        outputs = keras.layers.Activation("linear", name="more")(outputs)
    return keras.Model(inputs, outputs)


def compiled(model: keras.Model, learning_rate: Any = None, metrics: Any = ("accuracy",), **more: Any) -> keras.Model:
    """The model with Adam, and a schedule if there is no learning rate."""
    if learning_rate is None:
        learning_rate = keras.optimizers.schedules.CosineDecay(0.01, EPOCHS * STEPS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, weighted_metrics=metrics, **more)
    return model


class Told(keras.callbacks.Callback):
    """Says which steps are trained, and gives whoever kills the process the time to do so."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        print("STEP", batch, flush=True)
        time.sleep(0.02)


def main(folder: Path, name: str | None = None) -> None:
    """Trains in a folder; the chief writes weights, optimizer and history to `end.npz`.

    Args:
        folder: The folder.
        name: Of a strategy.
    """
    devices = distribution.strategy(name)
    checkpoint = Checkpoint(folder, every=3, callbacks=[ThresholdHistory(every=1), Told()], devices=devices)
    print("FROM", checkpoint.initial_epoch, checkpoint.initial_batch, flush=True)
    with devices.scope():
        model = compiled(devices.prepare(network()), jit_compile=devices.jit_compile("auto"))
        fed = arrays(checkpoint) if name is None else dataset(checkpoint, devices)
        history = model.fit(
            **fed, epochs=EPOCHS, verbose=0, initial_epoch=checkpoint.initial_epoch, callbacks=[checkpoint]
        )
        variables = [*model.variables, *model.optimizer.variables]
        found = {f"{number:03d}": backend.to_numpy(variable.value) for number, variable in enumerate(variables)}
    if devices.is_chief:
        np.savez(folder / "end.npz", **found, **{name: np.asarray(rows) for name, rows in history.history.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""One process of a training whose chief is slow at writing the best weights, and whose others calibrate inexactly.

Prints which file it took the best weights from. Run by `test_replicas.py`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import keras

from keras_dsr import checkpoints, recipes, training
from keras_dsr.files import digest


def main() -> None:
    name = "multiworker" if keras.backend.backend() == "tensorflow" else "jax-data-parallel"
    devices = training.strategy(name, replicas=2)
    folder = Path(sys.argv[1])
    save, restore, calibrated = checkpoints.save, checkpoints.restore, training._calibrated
    on_epoch_end = training._Keeper.on_epoch_end

    def better_each_time(self, epoch, logs=None):
        on_epoch_end(self, epoch, {**logs, "val_accuracy": 0.1 * epoch})

    def slow_save(path, model, progress, write=True):
        if path.name == "best.npz" and devices.is_chief:
            # Both take part in reading the weights: the chief is slow afterwards.
            save(path.with_name("early.npz"), model, progress)
            time.sleep(1.5)
            path.with_name("early.npz").replace(path)
        else:
            save(path, model, progress, write)

    def told_restore(path, model):
        if path.name == "best.npz":
            print("RESTORED", checkpoints.progress(path)["epoch"], digest(path), flush=True)
        restore(path, model)

    def inexact(*arguments):
        return [weight + devices.process * 1e-6 for weight in calibrated(*arguments)]

    checkpoints.save, checkpoints.restore, training._calibrated = slow_save, told_restore, inexact
    training._Keeper.on_epoch_end = better_each_time
    settings = ("epochs=2", "hybrid_epochs=1", "timesteps=2", "widths=4", "train_examples=320", "selection=best")
    recipe = recipes.get("digits").with_settings(recipes.parse_settings(list(settings)))
    summary = training.train(recipe, folder, devices=devices, verbose=0)
    print("EPOCH", summary.epoch, flush=True)


if __name__ == "__main__":
    main()

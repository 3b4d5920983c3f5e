"""PreAct-ResNet-18 on CIFAR-10 on JAX alone, for machines with a GPU and without TensorFlow.

    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if-n5
    KERAS_BACKEND=jax python benchmarks/cifar10_jax.py --npz cifar10.npz --recipe cifar10-if --epochs 30

The recipes are those of `keras_dsr.recipes`; data is a .npz file with x_train, y_train, x_test and y_test, uint8,
augmented by NumPy. 5,000 images are set aside for validation, which chooses the epoch; the test images are looked at
once. Called again, it goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import keras
import numpy as np
import sklearn.model_selection

from keras_dsr import checkpoints, recipes
from keras_dsr.callbacks import CheckFinite
from keras_dsr.files import replacing
from keras_dsr.optimizers import SGD

MEAN = 255 * np.array([0.4914, 0.4822, 0.4465], "float32")
STD = 255 * np.array([0.2023, 0.1994, 0.2010], "float32")


class Batches(keras.utils.PyDataset):
    """Cropped and flipped batches in an order that depends on the seed and the epoch alone."""

    def __init__(self, x: np.ndarray, y: np.ndarray, size: int, seed: int, epoch: int = 0) -> None:
        super().__init__(workers=2, use_multiprocessing=False, max_queue_size=8)
        self.x, self.y, self.size, self.seed, self.epoch = x, y, size, seed, epoch
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.x))

    def __len__(self) -> int:
        return len(self.x) // self.size

    def on_epoch_end(self) -> None:
        self.epoch += 1
        self._shuffle()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng([self.seed, self.epoch, index])
        chosen = self.order[index * self.size : (index + 1) * self.size]
        padded = np.pad(self.x[chosen], ((0, 0), (4, 4), (4, 4), (0, 0)))
        rows, columns = generator.integers(0, 9, (2, self.size))
        images = np.stack([p[r : r + 32, c : c + 32] for p, r, c in zip(padded, rows, columns, strict=True)])
        flipped = generator.random(self.size) < 0.5
        images[flipped] = images[flipped, :, ::-1]
        return standardized(images), self.y[chosen]


def standardized(images: np.ndarray) -> np.ndarray:
    return (images - MEAN) / STD


class Keep(keras.callbacks.Callback):
    """Writes a checkpoint and the history after each epoch, and the best weights."""

    def __init__(self, folder: Path, state: dict) -> None:
        super().__init__()
        self.folder, self.state = folder, state

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}}
        row["seconds"] = time.perf_counter() - self.started
        self.state["rows"].append(row)
        if row["val_accuracy"] >= self.state["best"]:
            self.state["best"] = row["val_accuracy"]
            checkpoints.save(self.folder / "best.npz", self.model, {"epoch": epoch + 1})
        checkpoints.save(self.folder / "checkpoint.npz", self.model, self.state)
        print(json.dumps(row), flush=True)


def main() -> None:
    """Trains, or goes on, and evaluates once at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npz", type=Path, required=True, help="the images")
    parser.add_argument("--recipe", default="cifar10-if-n5", help="a recipe on CIFAR-10")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--examples", type=int, help="fewer training images, to try it out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting")
    parser.add_argument("--folder", type=Path, default=Path("runs/cifar10-jax"))
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32")
    options = parser.parse_args()
    recipe = recipes.get(options.recipe).with_settings(recipes.parse_settings(options.set))
    if options.epochs:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)

    keras.config.set_dtype_policy(options.precision)
    keras.utils.set_random_seed(recipe.seed)
    with np.load(options.npz) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    y, y_test = y.ravel().astype("int32"), y_test.ravel().astype("int32")
    rest, held_out = sklearn.model_selection.train_test_split(
        np.arange(len(x)), test_size=5000, stratify=y, random_state=0
    )
    rest = rest[: options.examples]

    options.folder.mkdir(parents=True, exist_ok=True)
    model = recipe.build(10, (32, 32, 3))
    steps = len(rest) // recipe.batch_size * recipe.epochs
    warmup = min(recipe.warmup_steps, steps // 5)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=recipe.learning_rate, warmup_steps=warmup
    )
    model.compile(
        SGD(schedule, recipe.momentum, coupled_weight_decay=recipe.weight_decay),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    state = {"rows": [], "best": -1.0, "recipe": dataclasses.asdict(recipe)}
    checkpoint = options.folder / "checkpoint.npz"
    if checkpoint.is_file():
        before = checkpoints.progress(checkpoint)
        if before["recipe"] != json.loads(json.dumps(state["recipe"])):
            raise SystemExit(f"{options.folder} has a run with other settings; name another --folder.")
        state = before
        checkpoints.restore(checkpoint, model)
    done = len(state["rows"])
    batches = Batches(x[rest], y[rest], recipe.batch_size, recipe.seed, epoch=done)
    model.fit(
        batches,
        validation_data=(standardized(x[held_out]), y[held_out]),
        epochs=recipe.epochs,
        initial_epoch=done,
        callbacks=[CheckFinite(), Keep(options.folder, state)],
        verbose=0,
    )
    checkpoints.restore(options.folder / "best.npz", model)
    accuracy = model.evaluate(standardized(x_test), y_test, batch_size=250, verbose=0, return_dict=True)["accuracy"]
    result = {"test_accuracy": float(accuracy), "validation_accuracy": state["best"], **state}
    with replacing(options.folder / "result.json") as beside:
        beside.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{recipe.name}: test accuracy {accuracy:.2%}, validation accuracy {state['best']:.2%}")


if __name__ == "__main__":
    main()

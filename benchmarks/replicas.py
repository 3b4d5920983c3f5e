"""The same training on one device and on several: weights after 20 steps, side by side, and what a step takes.

    python benchmarks/replicas.py --data-dir DIR --precision float64  # PreAct-ResNet-20 on 640 images of CIFAR-10
    python benchmarks/replicas.py --small                # a small network on the digits

TensorFlow: one device, 2 mirrored CPU devices, 2 worker processes. JAX: one device, 2 CPU devices, 2 processes, both
also with the widest kernels shared. Each has the same seed, and the same global batches in the same order. What differs
is the order in which sums are rounded. Now and then that is enough for a neuron that is a rounding away from its
threshold to fire in one of them and not in another; from there on weights part, in a deep network by as much as they
move. In float64 the roundings are too small for that, so there it shows whether anything but rounding differs. How far
weights come from where they began stands beside the differences.

In float32, which is what networks train in, steps are timed in the same processes. 2 devices of one machine have no
more cores than one, so what they take longer is what spreading costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, markdown, write
from workers import Workers

# Name, engine, processes, what `strategy` gets.
CASES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("one device", "tensorflow", 1, {}),
    ("2 mirrored devices", "tensorflow", 1, {"devices": "mirrored", "replicas": 2}),
    ("2 worker processes", "tensorflow", 2, {"devices": "multiworker", "replicas": 2}),
    ("one device", "jax", 1, {}),
    ("2 devices", "jax", 1, {"devices": "jax-data-parallel", "replicas": 2}),
    ("2 processes", "jax", 2, {"devices": "jax-data-parallel", "replicas": 2}),
    ("2 devices share wide kernels", "jax", 1, {"devices": "jax-model-parallel", "replicas": 2, "wide": 32}),
    ("2 processes share wide kernels", "jax", 2, {"devices": "jax-model-parallel", "replicas": 2, "wide": 32}),
)
# SGD throughout: Adam divides a gradient by its own size, and so makes of a bias ahead of a normalization, whose
# gradient is nothing but rounding, steps as long as any.
FULL = {
    "network": "preact_resnet",
    "depth": "20",
    "timesteps": "4",
    "threshold": "1",
    "batch_size": "32",
    "learning_rate": "0.001",
    "train_examples": "640",
    "selection": "last",
}
SMALL = {
    "data": "digits",
    "network": "small_cnn",
    "widths": "16,32",
    "timesteps": "4",
    "threshold": "1",
    "dropout": "0.2",
    "batch_size": "32",
    "train_examples": "640",
    "selection": "last",
    "augmentation": "crop",
    "padding": "1",
}


def train(task: dict[str, Any]) -> None:
    """Trains in this process, which may be one of several, and writes weights and times to the task's folder.

    Args:
        task: "settings", "strategy", "data_dir", "folder" and "steps"; "precision", Keras' dtype policy; for tests
            also "every", after how many steps weights are written, a divisor of their number, and "threshold_l2", a
            penalty on thresholds, which recipes leave to the decay of weights.
    """
    import keras

    from keras_dsr import checkpoints, recipes, training
    from keras_dsr.data.augmentation import Augmentation
    from keras_dsr.layers.neurons import neurons_of

    every = task.get("every", task["steps"])

    class Keeper(keras.callbacks.Callback):
        def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
            self.keep(0)

        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            self.keep((epoch + 1) * every)

        def keep(self, steps: int) -> None:
            paths = [weight.path for weight in self.model.weights]
            path = Path(task["folder"]) / f"weights_{steps}.npz"
            checkpoints.save(path, self.model, {"paths": paths}, write=devices.is_chief)

    class Clock(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.at: list[float] = []

        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            self.at.append(time.perf_counter())

    keras.config.set_dtype_policy(task.get("precision", "float32"))
    if task.get("precision") == "float64" and keras.backend.backend() == "jax":
        widen_jax()
    devices = training.strategy(**task["strategy"])
    recipe = recipes.get("cifar10-if").with_settings(task["settings"])
    loaded = training.load(recipe, data_dir=None if task["data_dir"] is None else Path(task["data_dir"]))
    devices.check_batch_size(recipe.batch_size)
    batches = loaded.training_batches(
        recipe.batch_size,
        seed=recipe.seed,
        augmentation=Augmentation(recipe.augmentation, padding=recipe.padding, cutout=recipe.cutout),
        epochs=task["steps"],  # more than enough
    )
    clock = Clock()
    with devices.scope():
        keras.utils.set_random_seed(recipe.seed)
        model = devices.prepare(recipe.build(loaded.classes, loaded.input_shape))
        if "threshold_l2" in task:
            for neuron in neurons_of(model):
                neuron.threshold.regularizer = keras.regularizers.L2(task["threshold_l2"])
        training.compile_model(model, recipe, task["steps"], jit_compile=devices.jit_compile("auto"))
        model.fit(
            devices.training_batches(batches, recipe.batch_size),
            steps_per_epoch=every,
            epochs=task["steps"] // every,
            shuffle=False,
            callbacks=[clock, Keeper()],
            verbose=0,
        )
    if devices.is_chief:
        seconds = [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)][2:]
        (Path(task["folder"]) / "seconds.json").write_text(json.dumps(seconds))


def widen_jax() -> None:
    """Lets JAX, and Keras on it, compute in float64 throughout.

    Where tensors meet, Keras narrows float64 to float32 on JAX, in its own layers, and has no setting for that.
    """
    import jax
    import keras
    from keras.src.backend.common import dtypes

    jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx("float64")
    dtypes.BIT64_TO_BIT32_DTYPE.pop("float64", None)


def weights(folder: Path, steps: int) -> dict[str, np.ndarray]:
    """Weights of a model by their paths, without the optimizer's, after so many steps."""
    arrays = dict(np.load(folder / f"weights_{steps}.npz"))
    paths = json.loads(str(arrays.pop("progress")))["paths"]
    own = [array for name, array in arrays.items() if name.startswith("model/") and "seed_generator" not in name]
    kept = [path for path in paths if "seed_generator" not in path]
    return dict(zip(kept, own, strict=True))


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest absolute difference, over all weights and over some kinds of them."""
    if one.keys() != other.keys():
        raise SystemExit(f"the weights are not the same: {sorted(one.keys() ^ other.keys())}")
    worst = {name: float(np.abs(one[name].astype("float64") - other[name]).max()) for name in one}

    def of(*endings: str) -> float:
        return max((value for name, value in worst.items() if name.endswith(endings)), default=0.0)

    return {
        "weights": max(worst.values()),
        "trained": max(value for name, value in worst.items() if not name.endswith(("moving_mean", "moving_variance"))),
        "thresholds": of("threshold"),
        "statistics": of("moving_mean", "moving_variance"),
    }


def measure(case: tuple[str, str, int, dict[str, Any]], task: dict[str, Any], folder: Path, timeout: float) -> None:
    """Runs one case in processes of its own."""
    _, engine, count, strategy = case
    folder.mkdir(parents=True)
    task = {**task, "strategy": strategy, "folder": str(folder)}
    started = Workers([sys.executable, __file__, "--task", json.dumps(task)], engine, count, folder / "logs")
    if not started.wait(timeout):
        raise SystemExit(f"{case} failed:\n{started.told()}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="tensorflow-datasets' folder, with CIFAR-10")
    parser.add_argument("--small", action="store_true", help="a small network on the digits, which need no folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=["float32", "float64"], default="float32")
    parser.add_argument("--engine", choices=["tensorflow", "jax"], nargs="+", default=["tensorflow", "jax"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as keras-dsr train takes it")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that one case may take")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        train(json.loads(options.task))
        return

    from keras_dsr import recipes

    timed = options.precision == "float32"
    if timed and options.steps < 4:
        parser.error(f"the first three steps are not timed: --steps is at least 4. Received {options.steps}")
    settings = {**(SMALL if options.small else FULL), **recipes.parse_settings(options.set)}
    task = {"settings": settings, "data_dir": options.data_dir, "steps": options.steps}
    task["precision"] = options.precision
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, case in enumerate(case for case in CASES if case[1] in options.engine):
            name, engine, _, _ = case
            folder = Path(temporary) / str(number)
            measure(case, task, folder, options.timeout)
            if name == "one device":
                reference = weights(folder, options.steps)
            after = weights(folder, options.steps)
            row: dict[str, Any] = {"engine": engine, "case": name, **differences(reference, after)}
            row["came"] = differences(weights(folder, 0), after)["trained"]
            if timed:
                row["step_s"] = statistics.median(json.loads((folder / "seconds.json").read_text()))
                if name == "one device":
                    alone = row["step_s"]
                row["of_one_device"] = row["step_s"] / alone
            rows.append(row)
            print(row, flush=True)
    host = machine()
    recipe = recipes.get("cifar10-if").with_settings(settings)
    table = [
        f"{recipe.network}{recipe.depth if recipe.network != 'small_cnn' else ''} on {recipe.data}, IF, "
        f"N = {recipe.timesteps}, global batch {recipe.batch_size}, learning rate {recipe.learning_rate:g}, "
        f"{options.precision}: largest difference from one device after {options.steps} steps, and the farthest that "
        f"a trained weight came in them. "
        f"{host['cores']} cores of {host['processor']}, {host['date']}: "
        f"`{host['command']}`.",
        "",
        *markdown(
            [
                "",
                "",
                "all weights",
                "trained weights",
                "thresholds",
                "moving statistics",
                "a trained weight came",
                *(["step s (median)", "of one device"] if timed else []),
            ],
            [
                (
                    row["engine"],
                    row["case"],
                    *(f"{row[what]:.1e}" for what in ("weights", "trained", "thresholds", "statistics", "came")),
                    *((f"{row['step_s']:.3f}", f"{row['of_one_device']:.2f}") if timed else ()),
                )
                for row in rows
            ],
        ),
        "",
    ]
    name = f"replicas{'_small' if options.small else ''}{'_float64' if options.precision == 'float64' else ''}"
    write(name, {"machine": host, "options": {**vars(options), "data_dir": "DIR"}, "rows": rows}, "\n".join(table))
    print("\n".join(table))


if __name__ == "__main__":
    main()

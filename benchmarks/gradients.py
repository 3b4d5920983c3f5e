"""Does a gradient at the level of representations train as well as one that goes through every time step?

    python benchmarks/gradients.py --data-dir DIR         # DIR: tensorflow-datasets' folder, with CIFAR-10 prepared

One small convolutional IF network, trained on 10,000 images of CIFAR-10 (crop and flip) in both ways, from the same
initial weights, on the same batches, with the same learning rates, for several seeds in fresh processes. Accuracy is
that on the 5,000 validation images after the last epoch: no epoch is chosen, and the test images are not touched.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from measure import in_fresh_process, machine, write

WIDTHS, EXAMPLES, BATCH, LEARNING_RATE = (32, 64, 64), 10_000, 64, 0.05
WAYS = ("representation", "per step")


def measure(task: dict) -> dict:
    """Trains in one way with one seed in this process."""
    import dataclasses
    import time

    import keras
    from per_step import small_cnn

    from keras_dsr import models
    from keras_dsr.data import images
    from keras_dsr.data.augmentation import Augmentation
    from keras_dsr.data.parts import ArrayPart
    from keras_dsr.layers import IFSpike
    from keras_dsr.optimizers import SGD

    keras.utils.set_random_seed(task["seed"])
    cifar = images.cifar("cifar10", Path(task["data_dir"]))
    part = ArrayPart(cifar.train.x[:EXAMPLES], cifar.train.labels[:EXAMPLES])
    cifar = dataclasses.replace(cifar, train=part)
    neuron = IFSpike(threshold=task["threshold"], threshold_l2=0.0)
    arguments = {"neuron": neuron, "timesteps": task["timesteps"], "classes": 10, "input_shape": (32, 32, 3)}
    model = models.small_cnn(WIDTHS, **arguments)
    if task["way"] == "per step":
        other = small_cnn(WIDTHS, **arguments)
        other.set_weights(model.get_weights())
        model = other
    steps = cifar.steps(BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps * task["epochs"])
    model.compile(SGD(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    batches = cifar.training_batches(
        BATCH, seed=task["seed"], augmentation=Augmentation(("crop", "flip")), epochs=task["epochs"]
    )
    cpu, wall = time.process_time(), time.perf_counter()
    history = model.fit(batches, epochs=task["epochs"], steps_per_epoch=steps, verbose=0).history
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    evaluated = model.evaluate(cifar.batches(cifar.validation, 100), verbose=0, return_dict=True)
    return {"accuracy": evaluated["accuracy"], "training_accuracy": history["accuracy"], "cpu_s": cpu, "wall_s": wall}


def compare(options) -> None:
    """Trains in both ways with every seed and writes the table."""
    runs = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in WAYS if seed % 2 == 0 else reversed(WAYS):
            task = {
                "way": way,
                "seed": seed,
                "data_dir": str(options.data_dir),
                "timesteps": options.timesteps,
                "threshold": options.threshold,
                "epochs": options.epochs,
            }
            runs[way].append({"seed": seed, **in_fresh_process(__file__, task, "tensorflow")})
            print(f"seed {seed}, {way}: {runs[way][-1]}", flush=True)
    host = machine()
    lines = [
        f"A small convolutional IF network ({', '.join(map(str, WIDTHS))} channels), N = {options.timesteps}, V_th = "
        f"{options.threshold:g}, {EXAMPLES:,} CIFAR-10 images, {options.epochs} epochs, {options.seeds} seeds; "
        "validation accuracy after the last; TensorFlow, "
        f"{host['cores']} cores of {host['processor']}, {host['date']}.",
        "",
        "| gradient | accuracy, each seed | mean | standard deviation | CPU s, median |",
        "| --- | --- | --- | --- | --- |",
    ]
    means = {}
    for way in WAYS:
        accuracies = [100 * run["accuracy"] for run in runs[way]]
        means[way] = statistics.mean(accuracies)
        deviation = f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        lines.append(
            f"| {way} | {', '.join(f'{a:.2f}' for a in accuracies)} | {means[way]:.2f} | {deviation} | "
            f"{statistics.median(run['cpu_s'] for run in runs[way]):.0f} |"
        )
    pairs = [100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(*(runs[way] for way in WAYS), strict=True)]
    spent = {way: statistics.median(run["cpu_s"] for run in runs[way]) for way in WAYS}
    lines += [
        "",
        f"Representation less per step, seed by seed: {', '.join(f'{pair:+.2f}' for pair in pairs)} percentage "
        f"points. CPU seconds: {spent['representation'] / spent['per step']:.2f} of per step.",
        "",
    ]
    table = "\n".join(lines)
    write("gradients", {"machine": host, "options": {**vars(options), "data_dir": None}, "runs": runs}, table)
    print(table)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of tensorflow-datasets that has CIFAR-10")
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    elif options.data_dir is None:
        parser.error("--data-dir names the folder of tensorflow-datasets that has CIFAR-10")
    else:
        compare(options)


if __name__ == "__main__":
    main()

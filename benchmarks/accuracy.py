"""Time to accuracy: what a fixed number of CPU seconds buys on CIFAR-10, with and without hybrid training.

    python benchmarks/accuracy.py --data-dir DIR          # DIR: tensorflow-datasets' folder, with CIFAR-10 prepared
    python benchmarks/accuracy.py --data-dir DIR --network resnet20 --budget 3600

10,000 images of CIFAR-10, cropped and flipped, the same batches in the same order from the same initial weights:

- ours: with spikes from the first update
- ours, hybrid: first the representation network, an ANN; thresholds calibrated on it; the same with quantized outputs;
  then spikes, all within the one budget
- PyTorch DSR: with spikes, and a gradient at every time step

The clock counts all CPU seconds of training, tracing and calibration among them, but not those of looking at the 5,000
validation images on the way. The learning rate falls along a cosine to 0 at the end of each stage, whatever number of
updates a side has made by then. The test images are not touched. Results are written after each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import peers
from measure import RESULTS, in_fresh_process, in_turn, machine, markdown, rounds_of, use_cores, write
from steps import FORM_TIMEOUT, HERE, common, forms_to_try

WIDTHS = (32, 64, 64)
WAYS = ("ours", "ours, hybrid", "PyTorch DSR")
# Parts of the budget at whose end the representation network and its quantized form make room for the next stage.
HYBRID = (("representation", 0.4), ("quantized", 0.5), ("spikes", 1.0))
# Of the representation network, before thresholds are calibrated: so high that the clamp hardly ever cuts off.
OPEN_THRESHOLD = 6.0
CALIBRATION_BATCHES = 16


def build(network: str, timesteps: int, threshold: float, steps: int | None = None):
    """A network of ours for CIFAR-10; with `steps`, a representation network with quantized outputs."""
    from keras_dsr import layers, models

    neuron = layers.IFSpike(
        threshold=threshold, threshold_l2=0.0, trainable_threshold=steps is None, representation_steps=steps
    )
    if network == "small_cnn":
        return models.small_cnn(WIDTHS, neuron, timesteps, 10, (32, 32, 3))
    return models.preact_resnet(int(network.removeprefix("resnet")), neuron, timesteps, 10, (32, 32, 3))


def measure(task: dict) -> dict:
    """Trains in one of our ways in this process.

    Args:
        task: "way", "network", "timesteps", "threshold", "data" and "weights" (.npz files), "budget" in CPU seconds,
            "batch", "every" (CPU seconds between looks), "learning_rate", "weight_decay", "seed", "cores".
    """
    cores = use_cores(task["cores"])
    import budget
    import keras
    import stock

    from keras_dsr import models
    from keras_dsr.optimizers import SGD

    keras.utils.set_random_seed(task["seed"])
    data, weights = budget.load(task["data"]), budget.load(task["weights"])
    x_held_out, y_held_out = budget.standardized(data["x_held_out"], data), data["y_held_out"]
    clock = budget.Clock()
    examples = budget.batches(data, task["batch"], task["seed"])
    hybrid, network, timesteps = task["way"] == "ours, hybrid", task["network"], task["timesteps"]

    def stage(model, name: str, until: float) -> list[dict]:
        model.compile(
            SGD(0.0, coupled_weight_decay=task["weight_decay"]),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

        def step(x, y, learning_rate):
            model.optimizer.learning_rate = learning_rate
            model.train_on_batch(x, y)

        def accuracy():
            return model.evaluate(x_held_out, y_held_out, batch_size=250, verbose=0, return_dict=True)["accuracy"]

        until *= task["budget"]
        return budget.train(step, accuracy, examples, clock, until, task["every"], task["learning_rate"], name)

    model = build(network, 0 if hybrid else timesteps, OPEN_THRESHOLD if hybrid else task["threshold"])
    for name, weight in stock.weights_of(model).items():
        if not (hybrid and name.endswith("/threshold")):
            weight.assign(weights[name])
    if not hybrid:
        return {"rows": stage(model, "spikes", 1.0), "cores": cores}
    rows = []
    for name, until in HYBRID:
        if name == "quantized":
            models.calibrate_thresholds(model, (next(examples) for _ in range(CALIBRATION_BATCHES)))
            trained, model = model.get_weights(), build(network, 0, OPEN_THRESHOLD, timesteps)
            model.set_weights(trained)
        elif name == "spikes":
            trained, model = model.get_weights(), build(network, timesteps, OPEN_THRESHOLD)
            model.set_weights(trained)
            models.calibrate_normalization(model, (next(examples) for _ in range(CALIBRATION_BATCHES)))
        rows += stage(model, name, until)
    return {"rows": rows, "cores": cores}


def prepare(options, folder: Path) -> None:
    """Writes the images, and for each seed initial weights by name, for all sides to read."""
    import keras
    import numpy as np
    import stock

    from keras_dsr.data import images

    cifar = images.cifar("cifar10", options.data_dir)
    np.savez(
        folder / "data.npz",
        x=cifar.train.x[: options.examples],
        y=cifar.train.labels[: options.examples],
        x_held_out=cifar.validation.x[: options.held_out],
        y_held_out=cifar.validation.labels[: options.held_out],
        mean=np.array(cifar.mean, "float32"),
        std=np.array(cifar.std, "float32"),
    )
    for seed in range(options.seeds):
        keras.utils.set_random_seed(seed)
        model = build(options.network, options.timesteps, options.threshold)
        np.savez(folder / f"{seed}.npz", **{name: np.asarray(w) for name, w in stock.weights_of(model).items()})


def fastest_form(options) -> str:
    """The form of PyTorch that takes fewest CPU seconds for a training step of this network."""
    task = {
        "network": options.network,
        "kind": "dsr",
        "mode": "train",
        "timesteps": options.timesteps,
        "batch": options.batch,
        "shape": (32, 32, 3),
        "widths": WIDTHS,
        "repeats": 5,
        "cores": options.cores,
    }

    def run(form: str) -> dict:
        task["form"] = form
        return in_fresh_process(HERE / "torch_step.py", task, "torch", python=peers.python(), timeout=FORM_TIMEOUT)

    runs, failures = in_turn(forms_to_try(False), run, rounds=1)
    rounds_of(runs, failures)
    return min(runs, key=lambda form: runs[form][0]["cpu_s"])


def compare(options) -> None:
    """Trains in all ways with every seed; writes table and plot."""
    ways = [way for way in options.ways if options.peers or way != "PyTorch DSR"]
    host = machine(options.cores)
    if options.peers:
        host["peers"] = peers.versions()
    form = fastest_form(options) if "PyTorch DSR" in ways else None
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, Path(folder))

        def run(key: tuple[str, int]) -> dict:
            way, seed = key
            task = {
                "way": way,
                "seed": seed,
                "data": f"{folder}/data.npz",
                "weights": f"{folder}/{seed}.npz",
                "widths": WIDTHS,
                "form": form,
                **{
                    name: getattr(options, name)
                    for name in (
                        *("network", "timesteps", "threshold", "budget", "batch", "every"),
                        *("learning_rate", "weight_decay", "cores"),
                    )
                },
            }
            if way == "PyTorch DSR":
                return in_fresh_process(HERE / "torch_accuracy.py", task, "torch", python=peers.python())
            return in_fresh_process(__file__, task, "tensorflow")

        runs, failures, table = {}, {}, ""
        for seed in range(options.seeds):
            found, failed = in_turn([(way, seed) for way in (ways if seed % 2 == 0 else ways[::-1])], run, rounds=1)
            runs |= found
            failures |= failed
            rounds_of(runs, failures)
            table = write_results(options, ways, host, form, runs, failures)
    print(table)


def write_results(options, ways, host, form, runs, failures) -> str:
    """Writes what was measured so far, with its plot, and gives the table."""
    import budget

    seeds = len({seed for _, seed in (*runs, *failures)})
    title = "a small convolutional network" if options.network == "small_cnn" else f"PreAct-{options.network}"
    lines = [
        f"`{host['command']}`: {title}, IF, N = {options.timesteps}, V_th = {options.threshold:g}, "
        f"{options.examples:,} images of CIFAR-10, {options.budget:g} CPU seconds, {seeds} seeds; accuracy on "
        f"{options.held_out:,} validation images; {host['cores']} cores of {host['processor']}, {host['date']}.",
        "",
    ]
    cells, rows = [], []
    for way in ways:
        own = [(seed, run["rows"]) for (name, seed), (run,) in runs.items() if name == way]
        rows += [{"way": way, "seed": seed, "rows": each} for seed, each in own]
        if not own:
            continue
        last = [100 * each[-1]["accuracy"] for _, each in own]
        reached = []
        for level in options.levels:
            seconds = [budget.seconds_to(each, level / 100) for _, each in own]
            # The median over seeds stands for a way only if all of them came there.
            reached.append(f"{statistics.median(seconds):.0f}" if None not in seconds else "not by all")
        stages = dict.fromkeys(row["stage"] for row in own[0][1])
        updates = sum(max(row["updates"] for row in own[0][1] if row["stage"] == stage) for stage in stages)
        deviation = f" ± {statistics.stdev(last):.2f}" if len(last) > 1 else ""
        cells.append([way, f"{statistics.mean(last):.2f}{deviation}", ", ".join(f"{a:.2f}" for a in last), updates])
        cells[-1] += reached
    header = ["", "accuracy at the end, %", "each seed", "updates (first seed)"]
    header += [f"CPU s to {level:g} %" for level in options.levels]
    lines += [*markdown(header, cells), ""]
    lines += [f"{way}, seed {seed} failed: {why}\n" for (way, seed), why in failures.items()]
    table = "\n".join(lines)
    results = {
        "machine": host,
        "options": {**vars(options), "data_dir": None},
        "form": form,
        "runs": rows,
        "failures": {f"{way}, seed {seed}": why for (way, seed), why in failures.items()},
    }
    write(f"{options.prefix}accuracy", results, table)
    plot(rows, options, RESULTS / f"{options.prefix}accuracy.png")
    return table


def plot(runs: list[dict], options, path: Path) -> None:
    """Draws validation accuracy over CPU seconds."""
    import plots

    figure = plots.figure("Accuracy over CPU seconds", 8, 4.8)
    axes = figure.add_subplot()
    labelled: set[str] = set()
    for run in runs:
        for stage in dict.fromkeys(row["stage"] for row in run["rows"]):
            own = [row for row in run["rows"] if row["stage"] == stage]
            spikes = stage == "spikes"
            label = run["way"] if spikes else "hybrid, while still an ANN"
            axes.plot(
                [row["cpu_s"] for row in own],
                [100 * row["accuracy"] for row in own],
                color=plots.COLORS[run["way"]],
                linestyle="-" if spikes else ":",
                marker="o",
                markersize=3,
                label=label if label not in labelled else None,
            )
            labelled.add(label)
    axes.set_xlim(0, options.budget * 1.02)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    plots.panel(
        axes,
        f"{options.network}, N = {options.timesteps}, {options.examples:,} images of CIFAR-10",
        "CPU seconds of training",
        "validation accuracy, %",
    )
    plots.save(figure, path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-dir", type=Path, help="folder of tensorflow-datasets that has CIFAR-10")
    made.add_argument("--network", choices=["small_cnn", "resnet18", "resnet20"], default="small_cnn", help="which")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the sides")
    made.add_argument("--timesteps", type=int, default=4, help="number N of time steps")
    made.add_argument("--threshold", type=float, default=1.0, help="initial threshold, but of hybrid training")
    made.add_argument("--budget", type=float, default=300.0, help="CPU seconds of each training")
    made.add_argument("--seeds", type=int, default=3, help="trainings of each side")
    made.add_argument("--examples", type=int, default=10_000, help="images to train with")
    made.add_argument("--held-out", type=int, default=5_000, help="images of validation")
    made.add_argument("--batch", type=int, default=64, help="images in a batch")
    made.add_argument("--every", type=float, default=15.0, help="CPU seconds from one look at validation to the next")
    made.add_argument("--learning-rate", type=float, default=0.05, help="the largest, of all sides")
    made.add_argument("--weight-decay", type=float, default=5e-4, help="of all weights, on all sides")
    made.add_argument("--levels", type=float, nargs="+", default=[30.0, 40.0, 50.0], help="accuracies in per cent")
    made.add_argument("--task", help=argparse.SUPPRESS)
    common(made)
    return made


if __name__ == "__main__":
    options = parser().parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    elif options.data_dir is None:
        parser().error("--data-dir names the folder of tensorflow-datasets that has CIFAR-10")
    else:
        compare(options)

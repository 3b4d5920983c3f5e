"""How many examples each input pipeline gives in a second, against how many a training step takes.

    python benchmarks/data_throughput.py --cifar10 DIR --folder DIR --nmnist DIR --poker-dvs DIR

DIR is the `data_dir` of `keras_dsr.data.load`, and for --folder a folder of 64x64 images such as Tiny-ImageNet. What is
not given is left out. Each figure is of a fresh process, all of one run. A pipeline that gives fewer examples than the
step takes holds it up; on a CPU both share the cores, and what counts is the pipeline's part of the processor time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time

from measure import in_fresh_process, machine, median_of, timed, write

# Name -> data set, augmentation, batch size, and the networks that take its batches.
PIPELINES = {
    "digits, crop": ("digits", ("crop",), 32, ("small_cnn-n8",)),
    "CIFAR-10": ("cifar10", (), 128, ("resnet20-rep", "resnet20-n6")),
    "CIFAR-10, crop, flip": ("cifar10", ("crop", "flip"), 128, ("resnet20-rep", "resnet20-n6")),
    "CIFAR-10, crop, flip, AutoAugment": (
        *("cifar10", ("crop", "flip", "autoaugment"), 128),
        ("resnet20-rep", "resnet20-n6"),
    ),
    "CIFAR-10, crop, flip, cutout": ("cifar10", ("crop", "flip", "cutout"), 128, ("resnet20-rep", "resnet20-n6")),
    "folder of JPEG 64x64, resized crop, flip": (
        *("folder", ("resized_crop", "flip"), 128),
        ("resnet20-64-rep",),
    ),
    "N-MNIST from the cache, crop": ("nmnist", ("crop",), 32, ("vgg11-34-n10",)),
    "POKER-DVS from the cache, crop": ("poker_dvs", ("crop",), 32, ("vgg11-35-n10",)),
}
FRAMES = 10
# Network -> what it is called, batch size.
NETWORKS = {
    "small_cnn-n8": ("small CNN, N = 8", 32),
    "resnet20-rep": ("PreAct-ResNet-20, representation", 128),
    "resnet20-n6": ("PreAct-ResNet-20, N = 6", 128),
    "resnet20-64-rep": ("PreAct-ResNet-20 at 64x64, representation", 128),
    "vgg11-34-n10": (f"VGG-11 at 34x34, N = {FRAMES}", 32),
    "vgg11-35-n10": (f"VGG-11 at 35x35, N = {FRAMES}", 32),
}
INTEGRATED = ("nmnist", "poker_dvs")


def load(name: str, data_dir: str | None, cache_dir: str | None):
    """The data set of a task."""
    from keras_dsr import data

    if name == "folder":
        return data.load(f"folder:{data_dir}")
    return data.load(name, data_dir=data_dir, timesteps=FRAMES, cache_dir=cache_dir)


def measure_pipeline(task: dict) -> dict[str, float]:
    """Seconds for one example, of a pipeline that runs on."""
    from keras_dsr.data.augmentation import Augmentation

    name, changes, batch_size, _ = PIPELINES[task["pipeline"]]
    data_set = load(name, task["data_dir"], task["cache_dir"])
    batches = iter(
        data_set.training_batches(batch_size, seed=0, augmentation=Augmentation(tuple(changes)), epochs=10**6)
    )
    count = max(1, task["examples"] // batch_size)

    def some():
        for _ in range(count):
            next(batches)

    result = timed(some, task["repeats"])
    return {key: value / (count * batch_size) for key, value in result.items() if key in ("wall_s", "cpu_s")}


def measure_network(task: dict) -> dict[str, float]:
    """Seconds for one example, of a training step."""
    import keras
    import numpy as np

    from keras_dsr import models

    keras.utils.set_random_seed(0)
    model = {
        "small_cnn-n8": lambda: models.small_cnn((32, 64, 64), timesteps=8, input_shape=(8, 8, 1)),
        "resnet20-rep": lambda: models.preact_resnet(20, timesteps=0),
        "resnet20-n6": lambda: models.preact_resnet(20, timesteps=6),
        "resnet20-64-rep": lambda: models.preact_resnet(20, timesteps=0, input_shape=(64, 64, 3)),
        "vgg11-34-n10": lambda: models.vgg(11, input_shape=(FRAMES, 34, 34, 2)),
        "vgg11-35-n10": lambda: models.vgg(11, input_shape=(FRAMES, 35, 35, 2)),
    }[task["network"]]()
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    batch_size = NETWORKS[task["network"]][1]
    x = np.random.default_rng(0).random((batch_size, *model.input_shape[1:]), dtype="float32")
    y = np.arange(batch_size) % 10
    result = timed(lambda: model.train_on_batch(x, y), task["repeats"])
    return {key: value / batch_size for key, value in result.items() if key in ("wall_s", "cpu_s")}


def measure_integration(task: dict) -> dict[str, float]:
    """Seconds for one recording, of reading events and summing them in frames; and to find frames that are there."""
    import keras_dsr.data  # noqa: F401  # which takes seconds that are not the recordings'

    with tempfile.TemporaryDirectory() as cache_dir:
        seconds = []
        for _ in range(2):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            data_set = load(task["integrate"], task["data_dir"], cache_dir)
            seconds.append((time.perf_counter() - wall_start, time.process_time() - cpu_start))
    count = len(data_set.train) + len(data_set.validation) + len(data_set.test)
    return {"wall_s": seconds[0][0] / count, "cpu_s": seconds[0][1] / count, "again_s": seconds[1][0], "count": count}


def measure(task: dict) -> dict[str, float]:
    """Measures one task in this process."""
    if "pipeline" in task:
        return measure_pipeline(task)
    return measure_network(task) if "network" in task else measure_integration(task)


def compare(options) -> None:
    """Measures all that there is data for, and writes the table."""
    folders = {"cifar10": options.cifar10, "folder": options.folder}
    folders |= {"nmnist": options.nmnist, "poker_dvs": options.poker_dvs}
    pipelines = {}
    for name, (data_set, *rest) in PIPELINES.items():
        if data_set != "digits" and folders[data_set] is None:
            print(f"{name}: left out, --{data_set.replace('_', '-')} is not given")
        else:
            pipelines[name] = (data_set, *rest)
    networks = sorted({network for *_, of_pipeline in pipelines.values() for network in of_pipeline})

    with tempfile.TemporaryDirectory() as cache_dir:

        def run(task: dict, label: str) -> dict[str, float]:
            runs = []
            for _ in range(options.rounds):
                runs.append(in_fresh_process(__file__, task, "tensorflow"))
                print(f"{label}: {runs[-1]}", flush=True)
            return median_of(runs)

        steps = {
            network: run({"network": network, "repeats": options.repeats}, NETWORKS[network][0]) for network in networks
        }
        given = {}
        for name, (data_set, *_) in pipelines.items():
            task = {"pipeline": name, "data_dir": folders.get(data_set), "cache_dir": cache_dir}
            given[name] = run({**task, "repeats": options.repeats, "examples": options.examples}, name)
        integrated = {
            data_set: run({"integrate": data_set, "data_dir": folders[data_set]}, f"{data_set}, integration")
            for data_set in INTEGRATED
            if folders[data_set] is not None
        }

    host = machine()
    lines = [
        f"{host['cores']} cores of {host['processor']}, {host['date']}{options.note and ', ' + options.note}; "
        f"medians of {options.rounds} fresh processes.",
        "",
        "| pipeline | batch | examples/s | network | step takes examples/s | pipeline : step | pipeline's CPU time |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (_, _, batch_size, of_pipeline) in pipelines.items():
        for network in of_pipeline:
            pipeline, step = given[name], steps[network]
            part = pipeline["cpu_s"] / (pipeline["cpu_s"] + step["cpu_s"])
            lines.append(
                f"| {name} | {batch_size} | {1 / pipeline['wall_s']:,.0f} | {NETWORKS[network][0]} | "
                f"{1 / step['wall_s']:,.1f} | {step['wall_s'] / pipeline['wall_s']:,.0f} | {part:.1%} |"
            )
    lines.append("")
    if integrated:
        lines += [
            f"Events to {FRAMES} frames, done once and kept:",
            "",
            "| data set | recordings | recordings/s | seconds to find the kept ones |",
            "| --- | --- | --- | --- |",
        ]
        for name, m in integrated.items():
            lines.append(f"| {name} | {m['count']:.0f} | {1 / m['wall_s']:,.0f} | {m['again_s']:.2f} |")
        lines.append("")
    table = "\n".join(lines)
    results = {
        "machine": host,
        "note": options.note,
        "settings": {name: getattr(options, name) for name in ("rounds", "repeats", "examples")},
        "seconds_per_example": {"pipelines": given, "steps": steps, "integration": integrated},
    }
    write("data_throughput", results, table)
    print(table)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar10", "folder", "nmnist", "poker-dvs"):
        parser.add_argument(f"--{name}", metavar="DIR")
    parser.add_argument("--examples", type=int, default=4096, help="examples in a timed call of a pipeline")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each figure")
    parser.add_argument("--note", default="", help="what else is to be said of the machine")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    else:
        compare(options)


if __name__ == "__main__":
    main()

"""Where the seconds and the bytes of a training step go.

    python benchmarks/profile_step.py                                  # PreAct-ResNet-18 and 20, N = 5 and 20
    python benchmarks/profile_step.py --networks vgg11 --timesteps 10

The seconds are those of TensorFlow's operations, of which XLA compiles the neurons alone, as its profiler records them,
by what they are for; those that run at once count each. Beside them the rate at which convolutions multiply and add, as
a part of the rate of a large product of matrices in the same process. The bytes are what XLA says of the same step on
JAX: of one training step and of the ANN's, how much memory it works in.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from measure import in_fresh_process, machine, markdown, timed, use_cores, write
from steps import SHAPES, TITLES

KINDS = (
    "convolutions, forward",
    "convolutions, backward",
    "neurons",
    "normalization",
    "the rest",
)
# Of the square matrices that tell the machine's rate: far larger than its caches, and still less than a second.
CEILING_SIZE = 2048
# What XLA's runs are called, of which a training step without `jit_compile` has none but the neurons'.
XLA_RUN = "CpuExecutable::ExecuteAsyncOnStream"


def kind_of(event: str, neurons: set[str], norms: set[str]) -> str | None:
    """What an operation is for, of `KINDS`; `None` for an event that is none.

    Args:
        event: The profiler's name of it, PATH:OPERATION, or `XLA_RUN`.
        neurons: Names of the neuron layers.
        norms: Names of the normalization layers.
    """
    if event == XLA_RUN:
        return "neurons"
    path, colon, operation = event.rpartition(":")
    if not colon or "/" not in path:
        return None
    if operation in ("While", "StatelessWhile", "If", "PartitionedCall", "StatefulPartitionedCall"):
        return None  # what runs within is recorded for itself
    backward = path.startswith("gradient_tape/") or "/gradient_tape/" in path
    if "Conv2D" in operation or "MatMul" in operation:
        return f"convolutions, {'backward' if backward or 'Backprop' in operation else 'forward'}"
    # A layer's second call in a graph has a name that ends in _1, and so on.
    parts = {name for part in path.split("/") for name in (part, part.rpartition("_")[0])}
    if "BatchNorm" in operation or parts & norms:
        return "normalization"
    return "neurons" if parts & neurons else "the rest"


def seconds_by_kind(folder: Path, neurons: set[str], norms: set[str]) -> dict[str, float]:
    """The seconds of all operations that a profile holds, by their kinds.

    Args:
        folder: Where `tf.profiler.experimental` wrote it.
        neurons: Names of the neuron layers.
        norms: Names of the normalization layers.

    Raises:
        RuntimeError: if there is no profile, or it holds no operation of neurons.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise RuntimeError("TensorFlow's profiler was to write an .xplane.pb file. There is none.")
    space = xplane_pb2.XSpace()
    space.ParseFromString(files[-1].read_bytes())
    spent: Counter[str] = Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                kind = kind_of(plane.event_metadata[event.metadata_id].name, neurons, norms)
                if kind is not None:
                    spent[kind] += event.duration_ps / 1e12
    if not spent["neurons"]:
        raise RuntimeError("TensorFlow's profiler was to record operations, neurons among them. It recorded none.")
    return {kind: spent[kind] for kind in KINDS}


def measure_seconds(task: dict[str, Any]) -> dict[str, Any]:
    """Profiles training steps of a network on TensorFlow, in this process.

    Args:
        task: "network", "timesteps", "shape", "batch", "repeats"; "cores" that it may use.
    """
    use_cores(task.get("cores"))
    import keras
    import tensorflow as tf
    from keras_step import training_call

    from keras_dsr.layers.neurons import neurons_of

    call, model = training_call(task, jit=False)
    whole = timed(call, task["repeats"])
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        for _ in range(task["repeats"]):
            call()
        tf.profiler.experimental.stop()
        norms = {layer.name for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)}
        spent = seconds_by_kind(Path(folder), {neuron.name for neuron in neurons_of(model)}, norms)
    a = tf.random.normal((CEILING_SIZE, CEILING_SIZE))
    product = timed(lambda: keras.ops.convert_to_numpy(tf.matmul(a, a)[0, 0]), 5)
    return {
        "seconds": {kind: seconds / task["repeats"] for kind, seconds in spent.items()},
        "wall_s": whole["wall_s"],
        "ceiling": 2.0 * CEILING_SIZE**3 / product["wall_s"],
    }


def measure_bytes(task: dict[str, Any]) -> dict[str, Any]:
    """What XLA says of a network's training step, and of its forward pass, on JAX, without running either.

    Args:
        task: As in `measure_seconds`, and "kind" as in `keras_step.network`.
    """
    use_cores(task.get("cores"))
    import jax
    import keras
    import numpy as np
    from keras_step import CLASSES, network

    model = network(task["network"], task["kind"], task["timesteps"], tuple(task["shape"]))
    x = np.zeros((task["batch"], *model.input_shape[1:]), "float32")
    y = np.arange(task["batch"]) % CLASSES
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weights = [w.value for w in model.trainable_variables]
    state = [w.value for w in model.non_trainable_variables]

    def forward(weights, state, x):
        return model.stateless_call(weights, state, x, training=True)

    def loss(weights, state, x, y):
        logits, state = forward(weights, state, x)
        return loss_of(y, logits), state

    asked = {
        "forward": jax.jit(forward).lower(weights, state, x),
        "training": jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(weights, state, x, y),
    }
    return {
        name: {
            "flops": float(lowered.cost_analysis()["flops"]),
            "temporary_bytes": int(lowered.compile().memory_analysis().temp_size_in_bytes),
        }
        for name, lowered in asked.items()
    }


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process does: `measure_seconds` or `measure_bytes`, as "what" says."""
    return {"seconds": measure_seconds, "bytes": measure_bytes}[task["what"]](task)


def compare(options: argparse.Namespace) -> None:
    """Profiles all networks and writes the tables."""
    results, seconds, memory = [], [], []
    for name in options.networks:
        for steps in options.timesteps:
            shape = next(shape for kind, shape in SHAPES.items() if name.startswith(kind))
            task = {"network": name, "timesteps": steps, "shape": shape, "batch": options.batch}
            task |= {"repeats": options.repeats, "cores": options.cores}

            def run(what: str, kind: str, backend: str, task: dict[str, Any] = task) -> dict[str, Any]:
                ours = kind == "dsr"
                asked = task | {"what": what, "kind": kind, "timesteps": task["timesteps"] if ours else None}
                return in_fresh_process(__file__, asked, backend)

            profile, said, ann = (
                run("seconds", "dsr", "tensorflow"),
                run("bytes", "dsr", "jax"),
                run("bytes", "ann", "jax"),
            )
            rate = said["forward"]["flops"] / profile["seconds"]["convolutions, forward"]
            whole = sum(profile["seconds"].values())
            results.append({**task, "profile": profile, "xla": said, "xla_ann": ann, "rate": rate})
            title = TITLES.get(name, name)
            shares = [f"{profile['seconds'][kind] / whole:.0%}" for kind in KINDS]
            seconds.append([title, steps, f"{whole:.2f}", *shares, f"{rate / profile['ceiling']:.0%}"])
            row = [said["forward"]["temporary_bytes"], said["training"]["temporary_bytes"]]
            row.append(ann["training"]["temporary_bytes"])
            memory.append([title, steps, *(f"{size / 2**20:.0f}" for size in row)])
            print(seconds[-1], memory[-1], flush=True)
    host = machine(options.cores)
    where = f"{host['cores']} cores of {host['processor']}, {host['date']}; `{host['command']}`."
    lines = [
        f"A training step, IF, batch {options.batch}, float32, {where}",
        "",
        "Seconds of TensorFlow's operations, of which XLA compiles the neurons alone, by what they are for; \"of the "
        'ceiling" is the rate of the forward convolutions, as a part of that of a product of matrices.',
        "",
        *markdown(["network", "N", "seconds", *KINDS, "of the ceiling"], seconds),
        "",
        "Working memory in MB that XLA reserves on JAX, weights and batch not counted.",
        "",
        *markdown(["network", "N", "forward", "training step", "training step of the ANN"], memory),
        "",
    ]
    table = "\n".join(lines)
    write(f"{options.prefix}profile", {"machine": host, "results": results}, table)
    print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--networks", nargs="+", default=["resnet18", "resnet20"], help="resnet18, resnet20, vgg11")
    made.add_argument("--timesteps", nargs="+", type=int, default=[5, 20], help="numbers N of time steps")
    made.add_argument("--batch", type=int, default=8, help="examples in a batch")
    made.add_argument("--repeats", type=int, default=3, help="profiled steps")
    made.add_argument("--cores", type=int, help="how many cores to use; all, if not given")
    made.add_argument("--prefix", default="", help="what the names of the results start with")
    made.add_argument("--task", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    chosen = parser().parse_args()
    if chosen.task:
        print(json.dumps(measure(json.loads(chosen.task))))
    else:
        compare(chosen)

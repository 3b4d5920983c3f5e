"""What a spiking network costs in ONNX Runtime when its convolutions are computed in whole numbers.

    python benchmarks/integer_inference.py                 # the table, a few minutes
    python benchmarks/integer_inference.py --network preact_resnet20 --batches 1 8 32

Compared, in one process, in turn, on as many threads as asked for:

- ANN: the float32 network of the same shape with ReLU, as ONNX Runtime optimizes it
- float: the spiking network in float32, unrolled, thresholds folded
- whole numbers: `keras_dsr.export.integer_copy` of it, unrolled, with QLinearConv

Networks are not trained: weights are random, normalizations have the statistics of random images, so that all layers
fire. Before anything is timed the file of whole numbers is compared with the copy in Keras, spike by spike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from measure import machine, write

NETWORKS = ("preact_resnet18", "preact_resnet20", "vgg11")
FORMS = ("ANN", "float", "whole numbers")


def network(name: str, timesteps: int, count: int):
    """A spiking network that fires, and inputs for it."""
    import keras
    import numpy as np

    from keras_dsr import layers, models

    keras.utils.set_random_seed(0)
    neuron = layers.IFSpike(threshold=1.0)
    if name == "vgg11":
        model = models.vgg(11, neuron, input_shape=(timesteps, 48, 48, 2))
        x = np.random.default_rng(0).poisson(0.3, (count, timesteps, 48, 48, 2)).astype("float32")
    else:
        model = models.preact_resnet(int(name.removeprefix("preact_resnet")), neuron, timesteps)
        x = np.random.default_rng(0).normal(size=(count, 32, 32, 3)).astype("float32")
    for _ in range(20):  # moving statistics
        model(x[:32], training=True)
    return model, x


def ann_of(model):
    """The network of the same shape with ReLU, of stock layers, for inputs without a time axis."""
    import keras

    from keras_dsr import graph, layers

    def stand_in(_, layer):
        def call(inputs, **kwargs):
            x = inputs[0] if isinstance(inputs, (list, tuple)) and type(layer) is not layers.Add else inputs
            stream = x is not inputs or type(layer) is layers.Add
            if isinstance(layer, layers.SpikingNeuron):
                y = keras.layers.ReLU()(x)
                return [y, None]
            if type(layer) is layers.ToStream:
                return [x, None]
            if type(layer) is layers.SpikeRep:
                return x
            if type(layer) is layers.Add:
                return [keras.layers.Add()([each[0] for each in inputs]), None]
            inner = layer.layer if type(layer) is layers.Synapse else layer
            kind = keras.layers.BatchNormalization if type(layer) is layers.BatchNormalization else type(inner)
            config = {key: value for key, value in inner.get_config().items() if key != "name"}
            y = kind.from_config(config)(x)
            return [y, None] if stream else y

        return call

    shape = model.inputs[0].shape
    inputs = keras.Input(shape[2:] if len(shape) == 5 else shape[1:])
    return keras.Model(inputs, graph.walk(model, inputs, stand_in))


def session(path: Path, threads: int):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def files_of(name: str, timesteps: int, count: int, folder: Path):
    """The ONNX files to compare, by form, inputs for each, and what the file of whole numbers was proven by."""
    import tensorflow as tf
    import tf2onnx

    from keras_dsr.export import Grid, export_onnx, integer_copy, report_of

    model, x = network(name, timesteps, count)
    ann = ann_of(model)
    spec = [tf.TensorSpec([None, *ann.inputs[0].shape[1:]], tf.float32, name="image")]
    tf2onnx.convert.from_function(
        tf.function(lambda image: ann(image, training=False)), spec, opset=18, output_path=str(folder / "ann.onnx")
    )
    export_onnx(model, folder / "float.onnx", fold_thresholds=True, verify=False)
    copy = integer_copy(model, Grid.of(x))
    export_onnx(copy, folder / "whole.onnx", examples=x[:8], flip_budget=0)
    row = next(each for each in report_of(folder / "whole.onnx").rows if each.required)
    files = {"ANN": folder / "ann.onnx", "float": folder / "float.onnx", "whole numbers": folder / "whole.onnx"}
    return files, x, row


def measure(name: str, timesteps: int, batches, repeats: int, threads: int) -> dict:
    """CPU and wall seconds of each form and batch size, medians over rounds in which the forms take turns."""
    with tempfile.TemporaryDirectory() as folder:
        files, x, row = files_of(name, timesteps, max(32, *batches), Path(folder))
        sessions = {form: session(path, threads) for form, path in files.items()}
        inputs = {form: each.get_inputs()[0] for form, each in sessions.items()}
        found = {}
        for batch in batches:
            given = {}
            for form, each in inputs.items():
                data = x[:batch, 0] if form == "ANN" and x.ndim == 5 else x[:batch]
                given[form] = {each.name: data}
            times: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
            for round_ in range(repeats + 2):
                for form in FORMS if round_ % 2 else reversed(FORMS):
                    wall, cpu = time.perf_counter(), time.process_time()
                    sessions[form].run(None, given[form])
                    if round_ >= 2:
                        times[form].append((time.perf_counter() - wall, time.process_time() - cpu))
            found[batch] = {
                form: {
                    "wall_s": statistics.median(each[0] for each in taken),
                    "cpu_s": statistics.median(each[1] for each in taken),
                }
                for form, taken in times.items()
            }
        sizes = {form: path.stat().st_size for form, path in files.items()}
    return {"batches": found, "bytes": sizes, "flipped": row.flipped, "spikes": row.spikes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--timesteps", type=int, default=4)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", default="integer_inference", help="name of the files in benchmarks/results")
    options = parser.parse_args()

    host = machine(options.threads)
    results = {}
    lines = [
        "# Spiking networks in whole numbers, in ONNX Runtime",
        "",
        f"N = {options.timesteps}, {options.threads} thread(s) on {host['processor']}, {host['date']}; CPU "
        f"milliseconds of a run, medians of {options.repeats}; in brackets, of the ANN's.",
        "",
        "| network | batch | ANN | float | whole numbers | flipped spikes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in options.network:
        found = results[name] = measure(name, options.timesteps, options.batches, options.repeats, options.threads)
        for batch, times in found["batches"].items():
            cpu = {form: 1000 * times[form]["cpu_s"] for form in FORMS}
            cells = [f"{cpu['ANN']:.1f}"]
            cells += [f"{cpu[form]:.1f} ({cpu[form] / cpu['ANN']:.2f})" for form in FORMS[1:]]
            flips = f"{found['flipped']} of {found['spikes']:,}"
            lines.append(f"| {name} | {batch} | {' | '.join(cells)} | {flips} |")
            print(lines[-1], flush=True)
    settings = {key: value for key, value in vars(options).items() if key != "results"}
    write(options.results, {"machine": host, "settings": settings, "results": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

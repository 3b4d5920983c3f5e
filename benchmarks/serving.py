"""Latency and throughput of one network in every form in which it runs: Keras, SavedModel, ONNX, through the server.

    python benchmarks/serving.py                        # the digits' network and a PreAct-ResNet-20
    python benchmarks/serving.py --network digits --calls 500

All forms run in one process, in turn, call by call, so that what else happens on the machine meets all alike; the
server has a process of its own. Latency is that of a whole call with arrays in and arrays out. "of SavedModel" is the
ratio of medians; the CPU seconds are this process's, so the server's own are not among them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, write

NETWORKS = ("digits", "preact_resnet20")
BATCHES = (1, 8, 32)
TITLES = {
    "keras": "Keras `predict`",
    "saved_model": "SavedModel, TensorFlow's C API",
    "unrolled": "ONNX Runtime, unrolled",
    "loop": "ONNX Runtime, Loop",
    "openvino": "OpenVINO, unrolled",
    "grpc": "server, gRPC",
    "rest": "server, REST",
}


def network(name: str) -> tuple[Any, np.ndarray]:
    """A model, with thresholds at which it fires, and inputs as clients send them."""
    import keras

    from keras_dsr import models
    from keras_dsr.layers import IFSpike

    keras.utils.set_random_seed(0)
    if name == "digits":
        model = models.small_cnn((32, 64, 64), IFSpike(threshold=2.0), timesteps=8)
    else:
        model = models.preact_resnet(20, IFSpike(threshold=1.0), timesteps=4)
    images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), *model.input_shape[1:]), "uint8")
    return model, images


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """A server in another process; gives its addresses for gRPC and REST."""
    command = [
        sys.executable,
        "-m",
        "keras_dsr.cli",
        "serve",
        f"network={folder}",
        "--grpc-port",
        "0",
        "--rest-port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"gRPC (\S+), REST http://([^/]+)/", process.stdout.readline())
            if found is None:
                raise RuntimeError("the server did not start")
            yield found[1], found[2]
        finally:
            process.terminate()


def forms(model: Any, images: np.ndarray, folder: Path, stack: contextlib.ExitStack) -> dict[str, Callable[..., Any]]:
    """What runs the network, by name: from a batch of images to logits."""
    from keras_dsr.export import Preprocessing, c_api, export_onnx, export_saved_model, runtimes
    from keras_dsr.serving import Client

    channels = images.shape[-1]
    settings = {"preprocessing": Preprocessing((127.5,) * channels, (64.0,) * channels), "examples": images}
    version = export_saved_model(model, folder / "network", **settings)
    files = {
        form: export_onnx(model, folder / "network" / f"{form}.onnx", form=form, **settings)
        for form in ("unrolled", "loop")
    }
    session = stack.enter_context(c_api.Session(version))
    onnx = {form: runtimes.OnnxRuntime(path) for form, path in files.items()}
    found = {
        "keras": lambda x: model.predict_on_batch(settings["preprocessing"](x)),
        "saved_model": lambda x: session.run("serving_default", {"image": x})["logits"],
        **{form: lambda x, runtime=runtime: runtime.run({"image": x})["logits"] for form, runtime in onnx.items()},
    }
    try:
        openvino = runtimes.OpenVino(files["unrolled"])
        found["openvino"] = lambda x: openvino.run({"image": x})["logits"]
    except ImportError as error:
        print(f"left out: {error}")
    grpc, rest = stack.enter_context(serving(folder / "network"))
    clients = {
        "grpc": stack.enter_context(Client(grpc, "network")),
        "rest": stack.enter_context(Client(rest, "network", transport="rest")),
    }
    return {**found, **{kind: lambda x, c=client: c.predict(x)["logits"] for kind, client in clients.items()}}


def measure(run: dict[str, Callable[..., Any]], images: np.ndarray, calls: int) -> dict[str, dict[str, float]]:
    """Latencies of each form at one batch size, taken in turn."""
    answers = {name: np.asarray(call(images)) for name, call in run.items()}
    for name, logits in answers.items():  # a form that answers something else is not worth its time
        if not np.array_equal(logits.argmax(1), answers["keras"].argmax(1)):
            raise RuntimeError(f"{name} does not answer as Keras does")
    for call in run.values():
        for _ in range(3):
            call(images)
    wall: dict[str, list[float]] = {name: [] for name in run}
    cpu: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(calls):
        for name, call in run.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            call(images)
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    base = statistics.median(wall["saved_model"])
    base_cpu = statistics.median(cpu["saved_model"])
    return {
        name: {
            "p50_ms": 1e3 * statistics.median(wall[name]),
            "p99_ms": 1e3 * float(np.quantile(wall[name], 0.99)),
            "examples_per_s": len(images) / statistics.median(wall[name]),
            "of_saved_model": statistics.median(wall[name]) / base,
            "cpu_of_saved_model": statistics.median(cpu[name]) / base_cpu,
        }
        for name in run
    }


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    about = results["machine"]
    lines = [
        "# Serving: latency and throughput",
        "",
        f"`python benchmarks/serving.py --network {' '.join(results['networks'])} --calls {results['calls']}`, "
        f"{about['cores']} cores of {about['processor']}, {about['date']}; medians over the calls of one run, all "
        "forms in turn. A larger batch has so many times fewer calls, at least 20: its p99 is about its slowest call.",
    ]
    for name, batches in results["networks"].items():
        lines += [
            "",
            f"## {name}",
            "",
            "| form | batch | p50 ms | p99 ms | images/s | of SavedModel | CPU, of SavedModel |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for batch, forms_ in batches.items():
            for form, row in forms_.items():
                server = form in ("grpc", "rest")
                lines.append(
                    f"| {TITLES[form]} | {batch} | {row['p50_ms']:.2f} | {row['p99_ms']:.2f} | "
                    f"{row['examples_per_s']:.0f} | {row['of_saved_model']:.2f} | "
                    f"{'' if server else format(row['cpu_of_saved_model'], '.2f')} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--calls", type=int, default=200, help="timed calls of each form and batch size")
    options = parser.parse_args()

    results: dict[str, Any] = {"machine": machine(), "calls": options.calls, "networks": {}}
    for name in options.network:
        model, images = network(name)
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            run = forms(model, images, Path(folder), stack)
            results["networks"][name] = {
                str(batch): measure(
                    run, images[:batch], options.calls if batch == 1 else max(options.calls // batch, 20)
                )
                for batch in BATCHES
            }
    text = table(results)
    print(text)
    write("serving", results, text)


if __name__ == "__main__":
    main()

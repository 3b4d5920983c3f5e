"""Asks a server for predictions while its model changes, and counts what fails.

    python benchmarks/serving_load.py                  # 60 seconds, 8 clients
    python benchmarks/serving_load.py --seconds 6 --no-write

Before the load, one client alone measures what the server adds to the call of the signature. Then half of the clients
ask over gRPC and half over REST, each time for 1 to 4 images of 28x28, while versions 1 to 3 are published one after
another, a damaged version 4 is dropped in, and SIGTERM comes under load. Every answer must be right for a version that
is served, and no client may be answered by an older version than before. Versions 1 to 3 scale their logits so that an
answer shows which one gave it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from measure import machine, write

from keras_dsr.serving import Client, Code, ServingError

NAME = "digits"
VERSIONS, BROKEN = (1, 2, 3), 4
SERVE = """
import sys
from keras_dsr import serving

serving.run({"digits": sys.argv[1]}, serving.Settings(grpc_port=0, rest_port=0, poll=0.2))
"""


@dataclasses.dataclass
class Tally:
    """What one client saw."""

    latencies: list[float] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    answered_by: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refused_at_the_end: int = 0


def make_versions(folder: Path) -> None:
    """Writes versions 1 to 3 of a small convolutional network, and a damaged one."""
    import tensorflow as tf

    tf.random.set_seed(0)
    kernel, dense = tf.random.normal((3, 3, 1, 8)) / 3, tf.random.normal((14 * 14 * 8, 10)) / 40

    class Network(tf.Module):
        def __init__(self, version):
            super().__init__()
            self.kernel, self.dense = tf.Variable(kernel), tf.Variable(dense * version)

        @tf.function(input_signature=[tf.TensorSpec((None, 28, 28, 1), tf.float32, name="image")])
        def serve(self, image):
            features = tf.nn.relu(tf.nn.conv2d(image, self.kernel, 2, "SAME"))
            logits = tf.reshape(features, (-1, 14 * 14 * 8)) @ self.dense
            return {"logits": logits, "probabilities": tf.nn.softmax(logits), "class": tf.argmax(logits, -1)}

    for version in VERSIONS:
        network = Network(version)
        tf.saved_model.save(network, str(folder / str(version)), signatures={"serving_default": network.serve})
    shutil.copytree(folder / "1", folder / str(BROKEN))
    (folder / str(BROKEN) / "variables" / "variables.data-00000-of-00001").write_bytes(b"damaged")


def publish(version: Path, base: Path) -> None:
    """Puts a version into the served folder as a whole."""
    beside = base / f".{version.name}-being-written"
    shutil.copytree(version, beside)
    beside.rename(base / version.name)


def overhead(version: Path, address: str, images: np.ndarray) -> dict[str, float]:
    """Medians in milliseconds for one image: the signature called here, and through the server over gRPC."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(version))
    signature = loaded.signatures["serving_default"]
    image = images[:1]

    def directly():
        return {name: tensor.numpy() for name, tensor in signature(image=tf.constant(image)).items()}

    with Client(address, NAME) as client:
        medians = {}
        for name, call in (("direct_ms", directly), ("grpc_ms", lambda: client.predict(image))):
            for _ in range(50):
                call()
            times = []
            for _ in range(500):
                started = time.perf_counter()
                call()
                times.append(time.perf_counter() - started)
            medians[name] = statistics.median(times) * 1e3
    return {**medians, "overhead_ms": medians["grpc_ms"] - medians["direct_ms"]}


def ask(client: Client, images: np.ndarray, expected: np.ndarray, tally: Tally, seed: int, stopping: threading.Event):
    """Asks until the server is told to stop and refuses."""
    random = np.random.default_rng(seed)
    newest = 0
    while True:
        first = random.integers(0, len(images) - 4)
        rows = slice(first, first + random.integers(1, 5))
        started = time.perf_counter()
        try:
            logits = client.predict(images[rows])["logits"]
        except ServingError as error:
            if stopping.is_set() and error.code is Code.UNAVAILABLE:
                tally.refused_at_the_end += 1
                return
            tally.failed.append(str(error))
            continue
        tally.latencies.append(time.perf_counter() - started)
        version = next((v for v in VERSIONS if np.allclose(logits, v * expected[rows], rtol=1e-4, atol=1e-4)), None)
        if version is None or version < newest:
            tally.wrong.append(f"version {version} after {newest}: {logits[0, :3]}")
        else:
            newest = version
            tally.answered_by[version] += 1


def wait_for(client: Client, version: int, state: str) -> str:
    """Until a version has a state; the server has 30 seconds."""
    deadline = time.monotonic() + 30
    while not (status := client.status().get(version, "")).startswith(state):
        if time.monotonic() > deadline:
            raise SystemExit(f"version {version} is {status or 'not there'}, not {state}")
        time.sleep(0.1)
    return status


def load(seconds: float, clients: int, folder: Path) -> tuple[dict, list[Tally]]:
    versions, base = folder / "versions", folder / "base"
    base.mkdir()
    make_versions(versions)
    publish(versions / "1", base)
    images = np.random.default_rng(0).random((64, 28, 28, 1), "float32")
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    stopping = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as process:
        try:
            grpc, rest = re.match(r"\S+ gRPC (\S+), REST http://([^/]+)/", process.stdout.readline()).groups()
            with Client(grpc, NAME) as watcher:
                results = overhead(versions / "1", grpc, images)
                print(", ".join(f"{name} {value:.2f}" for name, value in results.items()))
                expected = watcher.predict(images)["logits"]
                tallies = [Tally() for _ in range(clients)]
                askers = [
                    Client(grpc if number % 2 else rest, NAME, transport="grpc" if number % 2 else "rest", retries=0)
                    for number in range(clients)
                ]
                threads = [
                    threading.Thread(target=ask, args=(asker, images, expected, tally, number, stopping), daemon=True)
                    for number, (asker, tally) in enumerate(zip(askers, tallies, strict=True))
                ]
                for thread in threads:
                    thread.start()
                for version in (2, 3, BROKEN):
                    time.sleep(seconds / 4)
                    publish(versions / str(version), base)
                    status = wait_for(watcher, version, "END" if version == BROKEN else "AVAILABLE")
                    print(f"version {version}: {status[:120]}")
                time.sleep(seconds / 4)
                if watcher.status()[3] != "AVAILABLE":
                    raise SystemExit(f"version 3 is not served any more: {watcher.status()}")
            stopping.set()
            process.send_signal(signal.SIGTERM)
            for thread in threads:
                thread.join()
            for asker in askers:
                asker.close()
            results["exit_status"] = process.wait(60)
        finally:
            stopping.set()  # after a failure, too, so that the threads end
            process.kill()
    return results, tallies


def run(seconds: float, clients: int) -> dict[str, Any]:
    """The load, from an empty folder to SIGTERM, and what came of it."""
    with tempfile.TemporaryDirectory() as temporary:
        results, tallies = load(seconds, clients, Path(temporary))
    latencies = sorted(each for tally in tallies for each in tally.latencies)
    answered_by = sum((tally.answered_by for tally in tallies), collections.Counter())
    return {
        **results,
        "seconds": seconds,
        "clients": clients,
        "requests": len(latencies),
        "failed": [each for tally in tallies for each in tally.failed],
        "wrong": [each for tally in tallies for each in tally.wrong],
        "answered_by_version": {str(version): answered_by[version] for version in VERSIONS},
        "refused_after_sigterm": sum(tally.refused_at_the_end for tally in tallies),
        **{f"p{part}_ms": latencies[len(latencies) * part // 100] * 1e3 for part in (50, 90, 99)},
        "max_ms": latencies[-1] * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--no-write", action="store_true", help="print the result only")
    options = parser.parse_args()
    results = run(options.seconds, options.clients)
    failed, wrong, answered_by = results["failed"], results["wrong"], results["answered_by_version"]
    said = (
        f"{options.clients} clients for {options.seconds:g} s: {results['requests']} requests, {len(failed)} failed, "
        f"{len(wrong)} wrong; answered by {', '.join(f'version {name}: {n}' for name, n in answered_by.items())}; the "
        f"damaged version {BROKEN} refused; exit status {results['exit_status']} after SIGTERM.\n"
        f"Latency under load: p50 {results['p50_ms']:.1f} ms, p90 {results['p90_ms']:.1f} ms, "
        f"p99 {results['p99_ms']:.1f} ms, at most {results['max_ms']:.0f} ms.\n"
        f"One client, one 28x28 image, p50: {results['direct_ms']:.2f} ms for the signature itself, "
        f"{results['grpc_ms']:.2f} ms over gRPC; the server adds {results['overhead_ms']:.2f} ms.\n"
    )
    if not options.no_write:
        write("serving_load", {**results, "machine": machine()}, said)
    print(said, end="")
    for each in (*failed[:5], *wrong[:5]):
        print(each)
    if failed or wrong or results["exit_status"] or not all(answered_by.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

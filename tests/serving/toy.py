"""A small SavedModel, and servers of it: this package's, and TensorFlow Serving's own where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_dsr.serving import Client, Server, Settings

NAME = "toy"


def module(version: int):
    """A model whose answers say which version gave them."""
    spec = tf.TensorSpec

    class Toy(tf.Module):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(float(version))

        @tf.function(input_signature=[spec((None, 4, 4, 1), tf.float32, name="image")])
        def classify(self, image):
            logits = self.scale * tf.reduce_sum(image, axis=(1, 2, 3))[:, None] * tf.constant([1.0, -1.0, 0.5])
            return {"logits": logits, "probabilities": tf.nn.softmax(logits), "class": tf.argmax(logits, axis=-1)}

        @tf.function(
            input_signature=[
                spec((None, 3), tf.float32, name="frame"),
                spec((None, 3), tf.float32, name="potential_if"),
                spec((None,), tf.int32, name="count_if"),
            ]
        )
        def step(self, frame, potential_if, count_if):
            potential = potential_if + frame
            return {
                "logits": self.scale * potential,
                "next_potential_if": potential,
                "next_count_if": count_if + 1,
            }

        @tf.function(input_signature=[spec((None,), tf.int64, name="stream")])
        def initial_state(self, stream):
            batch = tf.shape(stream)[0]
            return {"potential_if": tf.zeros((batch, 3)), "count_if": tf.zeros((batch,), tf.int32)}

        @tf.function(input_signature=[spec((None, 2), tf.uint8, name="pixels")])
        def pixels(self, pixels):
            return {"sum": tf.reduce_sum(tf.cast(pixels, tf.int32), axis=1)}

        @tf.function(input_signature=[spec((None,), tf.string, name="text")])
        def text(self, text):
            return {"text": text, "text_bytes": text}

        @tf.function(input_signature=[spec((), tf.float32, name="x")])
        def scalar(self, x):
            return {"y": 2.0 * x}

        @tf.function(input_signature=[spec((None,), tf.int32, name="x")])
        def positive(self, x):
            with tf.control_dependencies([tf.debugging.assert_positive(x, message="x must be positive")]):
                return {"x": tf.identity(x)}

        @tf.function(input_signature=[spec((None,), tf.int32, name="turns")])
        def slow(self, turns):
            matrix = tf.eye(256)
            for _ in tf.range(tf.reduce_max(turns)):
                matrix = tf.linalg.matmul(matrix, matrix)
            return {"turns": turns + tf.cast(matrix[0, 1], tf.int32)}

        @tf.function(input_signature=[spec((None, 2), tf.float32, name="x")])
        def inverse(self, x):
            return {"y": 1.0 / x}

        @tf.function(input_signature=[spec((None, None), tf.float32, name="x")])
        def loose(self, x):
            return {"y": tf.reduce_sum(x, axis=1)}

    toy = Toy()
    signatures = {
        name: getattr(toy, name)
        for name in ("step", "initial_state", "pixels", "text", "scalar", "positive", "slow", "inverse", "loose")
    }
    return toy, {"serving_default": toy.classify, **signatures}


def logits(image: np.ndarray, version: int = 1) -> np.ndarray:
    """What version `version` answers."""
    return version * image.sum(axis=(1, 2, 3))[:, None] * np.array([1.0, -1.0, 0.5], "float32")


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that runs.

    Args:
        grpc: Host and port of gRPC.
        rest: Host and port of REST.
        base: The folder of the toy model's versions.
        ours: Whether it is this package's.
    """

    grpc: str
    rest: str
    base: Path
    ours: bool

    def url(self, path: str = "") -> str:
        return f"http://{self.rest}/v1/models/{NAME}{path}"


def stock_server() -> str | None:
    """TensorFlow Serving's binary, if there is one."""
    return os.environ.get("TF_MODEL_SERVER") or shutil.which("tensorflow_model_server")


@contextlib.contextmanager
def start_ours(base: Path, **settings) -> Iterator[Running]:
    options = {"grpc_port": 0, "rest_port": 0, "poll": 0.1, **settings}
    with Server({NAME: base}, Settings(**options)) as server:
        yield Running(server.grpc_address, server.rest_address, base, ours=True)


@contextlib.contextmanager
def start_stock(base: Path) -> Iterator[Running]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        grpc_port, rest_port = (each.getsockname()[1] for each in sockets)
    command = [
        stock_server(),
        f"--port={grpc_port}",
        f"--rest_api_port={rest_port}",
        f"--model_name={NAME}",
        f"--model_base_path={base}",
        "--file_system_poll_wait_seconds=1",
        "--max_num_load_retries=0",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            running = Running(f"127.0.0.1:{grpc_port}", f"127.0.0.1:{rest_port}", base, ours=False)
            with Client(running.grpc, NAME, timeout=60, retries=100) as client:
                client.status()
            yield running
        finally:
            process.terminate()

"""The toy model's versions, and servers of them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from serving import toy


@pytest.fixture(scope="session")
def versions(tmp_path_factory) -> dict[int, Path]:
    """Versions 1 to 3 of the toy model; version 9 is damaged."""
    folder = tmp_path_factory.mktemp("versions")
    for version in (1, 2, 3):
        module, signatures = toy.module(version)
        tf.saved_model.save(module, str(folder / str(version)), signatures=signatures)
    broken = folder / "9"
    shutil.copytree(folder / "1", broken)
    (broken / "variables" / "variables.data-00000-of-00001").write_bytes(b"")
    return {int(path.name): path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def publish():
    """Puts a version into a folder as the export does: written beside, then renamed."""

    def put(version: Path, base: Path, number: int | None = None) -> None:
        beside = base / f".{version.name}-being-written"
        shutil.copytree(version, beside)
        beside.rename(base / str(number or version.name))

    return put


@pytest.fixture(params=["ours", "tensorflow_model_server"], scope="session")
def kind(request) -> str:
    """Which server to test; skips the stock one where it is not installed."""
    if request.param != "ours" and toy.stock_server() is None:
        pytest.skip("tensorflow_model_server is neither on PATH nor in $TF_MODEL_SERVER")
    return request.param


@pytest.fixture(scope="session")
def server(kind, versions, publish, tmp_path_factory) -> Iterator[toy.Running]:
    """A server of version 1 that tests may ask, but not change."""
    base = tmp_path_factory.mktemp("base")
    publish(versions[1], base)
    with toy.start_ours(base) if kind == "ours" else toy.start_stock(base) as running:
        yield running


@pytest.fixture
def fresh(kind, versions, publish, tmp_path) -> Iterator[toy.Running]:
    """A server of version 1 for one test, whose folder it may change."""
    publish(versions[1], tmp_path)
    with toy.start_ours(tmp_path) if kind == "ours" else toy.start_stock(tmp_path) as running:
        yield running


@pytest.fixture
def ours(versions, publish, tmp_path):
    """Starts this package's server with given settings on version 1."""
    publish(versions[1], tmp_path)
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(toy.start_ours(tmp_path, **settings))


@pytest.fixture(scope="session")
def until():
    """Waits until something holds; fails after 30 seconds."""

    def wait(holds, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it did not come to hold"
            time.sleep(0.05)

    return wait


@pytest.fixture
def image() -> np.ndarray:
    """A batch of two images."""
    return np.arange(32, dtype="float32").reshape(2, 4, 4, 1) / 8

"""What all tests share: the golden values, where they are at hand, and one seed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import pytest

# Reference numbers and real data that developers of the project keep beside it.
SHARED = Path(os.environ.get("KERAS_DSR_SHARED", Path(__file__).resolve().parents[2] / "shared"))
DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(free_memory=False)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of golden values; skips the test where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"the reference implementation's golden values are not at {folder}; set KERAS_DSR_SHARED")
    return folder


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Callable[..., Path]:
    """Unpacks real data by name and options, once a session, and gives its folder; skips the test if it is absent."""
    folders: dict[tuple[str, ...], Path] = {}

    def unpack(*what: str) -> Path:
        script = SHARED / "data" / "unpack.py"
        if not script.is_file():
            pytest.skip(f"real data is not at {script.parent}; set KERAS_DSR_SHARED")
        if what not in folders:
            folder = tmp_path_factory.mktemp(what[0])
            subprocess.run([sys.executable, str(script), *what, "--out", str(folder)], check=True, capture_output=True)
            folders[what] = folder
        return folders[what]

    return unpack


def pytest_collection_modifyitems(items):
    if keras.backend.backend() == "tensorflow":
        return
    skip = pytest.mark.skip(reason="needs the TensorFlow backend")
    same = pytest.mark.skip(reason="data pipelines do not depend on the Keras backend; tested with TensorFlow's")
    for item in items:
        if "tensorflow_only" in item.keywords:
            item.add_marker(skip)
        elif DATA in item.path.parents:
            item.add_marker(same)

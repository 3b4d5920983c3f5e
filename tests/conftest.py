"""What all tests share: the golden values, where they are at hand, and one seed."""

from __future__ import annotations

import os
from pathlib import Path

import keras
import pytest

# Reference numbers and real data that developers of the project keep beside it.
SHARED = Path(os.environ.get("KERAS_DSR_SHARED", Path(__file__).resolve().parents[2] / "shared"))


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


def pytest_collection_modifyitems(items):
    if keras.backend.backend() == "tensorflow":
        return
    skip = pytest.mark.skip(reason="needs the TensorFlow backend")
    for item in items:
        if "tensorflow_only" in item.keywords:
            item.add_marker(skip)

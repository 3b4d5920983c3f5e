"""A training process is killed, with no chance to tidy up, and goes on to the very weights of an unbroken run."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_and_resume.py"

pytestmark = [
    pytest.mark.tensorflow_only,
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the benchmarks are not beside the tests"),
]


@pytest.fixture
def script(monkeypatch):
    """The benchmark that does the same ten times, with fewer epochs."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    fewer = ("epochs=2", "hybrid_epochs=2", "hybrid_quantized_epochs=1", "widths=4", "train_examples=320")
    monkeypatch.setattr(module, "SETTINGS", (*module.SETTINGS, *fewer))
    return module


def killed_after(script, folder, epochs, delay):
    """Trains until so many epochs are kept, and kills the process a moment later; whether it still ran."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    process = subprocess.Popen(
        script.command(folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            if (folder / "history.csv").is_file() and len(script.history(folder)) >= epochs:
                time.sleep(delay)
                break
            time.sleep(0.005)
        return process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_a_run_that_is_killed_four_times_ends_as_one_that_was_not(script, tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finished, _ = script.run(unbroken, "tensorflow")
    assert finished
    rows = script.history(unbroken)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("representation", "1"),
        ("representation", "2"),
        ("quantized", "1"),
        ("spiking", "1"),
        ("spiking", "2"),
    ]
    for epochs in (1, 2, 3, 4):
        # In the midst of the next epoch, between the stages, as a file is written.
        delay = random.SystemRandom().uniform(0, 0.3)
        print(f"killed {delay:.3f} s after epoch {epochs}")
        assert killed_after(script, broken, epochs, delay)
        assert script.history(broken)[:epochs] == rows[:epochs]
    finished, _ = script.run(broken, "tensorflow")
    assert finished
    assert script.history(broken) == rows
    assert script.weights(broken) == script.weights(unbroken)
    assert {file.name for file in broken.iterdir()} == {file.name for file in unbroken.iterdir()}

"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


# What the scripts of the paper's experiments need beside their names: the smallest of what they do.
SMALL = ("--smoke", "--set", "epochs=1", "--set", "timesteps=2")
ARGUMENTS = {
    "figure3.py": ("a", *SMALL, "--recipes", "cifar10-if-n10", "cifar10-if-n5"),
    "table2.py": (*SMALL, "--recipes", "cifar10-lif", "dvs-cifar10-if"),
    "table3.py": (*SMALL, "--recipes", "cifar10-if-no-firing", "cifar10-if-fixed"),
    "table7.py": (*SMALL, "--recipes", "cifar10-if-4bit"),
    "train_on_ray.py": ("--folder", "run", "--set", "epochs=1", "--set", "widths=4", "--set", "timesteps=2"),
    "tune_threshold_alpha.py": ("--smoke", "--workers", "1"),
}
NEEDS = {"train_on_ray.py": "ray", "tune_threshold_alpha.py": "keras_tuner"}


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_examples(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *ARGUMENTS.get(name, ())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if name == "figure2.py":
        (table,) = tmp_path.rglob("figure2.md")
        assert "| " in table.read_text()
        assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    if "--recipes" in ARGUMENTS.get(name, ()):
        (results,) = tmp_path.glob("runs/*/results.md")
        assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        assert results.read_text().count("\n| cifar10") + results.read_text().count("\n| dvs") == len(
            ARGUMENTS[name][ARGUMENTS[name].index("--recipes") + 1 :]
        )

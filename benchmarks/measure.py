"""Measuring one thing in a fresh process: CPU and wall seconds of a call, and the process's peak memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def timed(call: Callable[[], Any], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Medians over `repeats` calls, the time of the first call ever, and the peak memory of the process.

    Args:
        call: What to time; it must not return before its work is done.
        repeats: Number of timed calls.
        warmup: Calls before, the first of which compiles.
    """
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    for _ in range(warmup - 1):
        call()
    wall, cpu = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "first_s": first,
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_fresh_process(script: str, task: dict[str, Any], backend: str) -> dict[str, float]:
    """Runs `python SCRIPT --task JSON` and reads the JSON on its last line.

    Raises:
        RuntimeError: if the process fails, with what it printed.
    """
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, script, "--task", json.dumps(task)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each measure over runs."""
    return {measure: statistics.median(run[measure] for run in runs) for measure in runs[0]}


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions of what is installed, date."""
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("keras", "tensorflow", "jax", "numpy", "onnxruntime", "openvino")
    installed = [name for name in packages if importlib.util.find_spec(name)]
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in installed},
        "date": datetime.date.today().isoformat(),
    }


def write(name: str, results: dict[str, Any], table: str) -> None:
    """Writes results/NAME.json and results/NAME.md, whole or not at all."""
    from keras_dsr.files import replacing

    RESULTS.mkdir(exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=2) + "\n"), ("md", table)):
        with replacing(RESULTS / f"{name}.{suffix}") as beside:
            beside.write_text(text)

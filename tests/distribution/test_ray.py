"""Ray starts a training again that lost a process, and it goes on from its checkpoint to the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_on_ray.py"
# So long that no training ends before the kill.
SETTINGS = ("epochs=8", "timesteps=2", "widths=4", "train_examples=320", "selection=best", "dropout=0.2")


def waiting(told: str) -> list[dict[int, int]]:
    """For each start of both processes, in order, the operating system's number of each, as Ray names it."""
    found = [(int(of), int(pid)) for pid, of in re.findall(r"pid=(\d+).*?Process (\d) of 2 waits", told)]
    starts: list[dict[int, int]] = []
    for of, pid in dict.fromkeys(found):  # Ray may show a line twice
        if not starts or of in starts[-1]:
            starts.append({})
        starts[-1][of] = pid
    return starts


# Which process is killed: a worker on one backend, the chief, whom the others find by its address, on the other.
LOST = {"tensorflow": 1, "jax": 0}


def test_ray_goes_on_after_a_kill_to_the_same_weights(benchmark, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'keras-dsr[ray]'")
    kill = benchmark("kill_workers")
    kill.whole(tmp_path / "unbroken", helpers.BACKEND, 300, SETTINGS)

    broken, log = tmp_path / "broken", tmp_path / "ray.log"
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    environment = {**os.environ, "KERAS_BACKEND": helpers.BACKEND, "RAY_DEDUP_LOGS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, EXAMPLE, "--folder", broken, "--backend", helpers.BACKEND, *words]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, cwd=tmp_path)
    try:
        deadline = time.monotonic() + 600
        while not ((broken / "history.csv").is_file() and len(kill.history(broken)) >= 1):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        while not ((begun := waiting(log.read_text())) and len(begun[0]) == 2):  # Ray shows lines some time later
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.01)
        os.kill(begun[0][LOST[helpers.BACKEND]], signal.SIGKILL)
        kept = len(kill.history(broken))
        assert process.wait(600) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()  # Ray ends what it started
            process.wait(60)

    starts = waiting(log.read_text())
    assert len(begun) == 1
    assert kept < 8
    assert len(starts) >= 2, log.read_text()[-3000:]
    assert not {*starts[0].values()} & {*starts[-1].values()}
    kill.compare(tmp_path / "unbroken", broken)

"""A `fit` of several processes of which one is killed, within an epoch, goes on to the same weights."""

from __future__ import annotations

import random
import sys
import time

import helpers
import killed_fit
import numpy as np

DEVICES = {"tensorflow": "multiworker", "jax": "jax-data-parallel"}


def test_a_fit_of_two_processes_goes_on_after_a_kill_of_the_chief(benchmark, tmp_path):
    """The chief writes, and may be killed as it does."""
    workers = benchmark("workers")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"

    def start(folder):
        command = [sys.executable, killed_fit.__file__, str(folder), DEVICES[helpers.BACKEND]]
        return workers.Workers(command, helpers.BACKEND, 2, tmp_path / f"{folder.name}-logs-{time.monotonic()}")

    def steps(started):
        return started.logs[0].read_text().count("STEP")

    whole = start(unbroken)
    assert whole.wait(300), whole.told()
    killed = start(broken)
    after = random.SystemRandom().randint(4, 2 * killed_fit.STEPS)
    deadline = time.monotonic() + 300
    while killed.running and steps(killed) < after and time.monotonic() < deadline:
        time.sleep(0.001)
    print(f"killed after {steps(killed)} steps")
    assert killed.running, killed.told()
    killed.kill([0])
    killed.wait(patience=5)
    assert not (broken / "end.npz").exists()

    again = start(broken)
    assert again.wait(300), again.told()
    assert (broken / "checkpoint.npz").exists()
    assert 0 < steps(again) <= killed_fit.EPOCHS * killed_fit.STEPS - (after - 1) // 3 * 3
    with np.load(unbroken / "end.npz") as expected, np.load(broken / "end.npz") as found:
        assert set(found) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)

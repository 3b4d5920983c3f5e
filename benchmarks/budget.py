"""Training for a budget of CPU seconds, the same on every side: batches, clock and learning rate.

The interpreters of other libraries import this file: it needs NumPy alone.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


def load(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def standardized(images: np.ndarray, data: dict[str, np.ndarray]) -> np.ndarray:
    """Images as the network gets them."""
    return ((images - data["mean"]) / data["std"]).astype("float32")


def batches(data: dict[str, np.ndarray], size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cropped and flipped batches without end, in an order that depends on the seed alone."""
    generator = np.random.default_rng(seed)
    x, y = data["x"], data["y"]
    height, width = x.shape[1:3]
    while True:
        order = generator.permutation(len(x))
        for start in range(0, len(x) - size + 1, size):
            chosen = order[start : start + size]
            padded = np.pad(x[chosen], ((0, 0), (4, 4), (4, 4), (0, 0)))
            rows, columns = generator.integers(0, 9, (2, size))
            crops = zip(padded, rows, columns, strict=True)
            images = np.stack([each[r : r + height, c : c + width] for each, r, c in crops])
            flipped = generator.random(size) < 0.5
            images[flipped] = images[flipped, :, ::-1]
            yield standardized(images, data), y[chosen]


class Clock:
    """CPU seconds of this process from now on, without those in which it is paused."""

    def __init__(self) -> None:
        self._start, self._paused = time.process_time(), 0.0

    def spent(self) -> float:
        """Seconds so far."""
        return time.process_time() - self._start - self._paused

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens within."""
        start = time.process_time()
        yield
        self._paused += time.process_time() - start


def cosine(learning_rate: float, progress: float) -> float:
    """The learning rate at a part of the way from 0 to 1: it falls to 0 along a cosine."""
    return learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def train(
    step: Callable[[np.ndarray, np.ndarray, float], None],
    accuracy: Callable[[], float],
    examples: Iterator[tuple[np.ndarray, np.ndarray]],
    clock: Clock,
    until: float,
    every: float,
    learning_rate: float,
    stage: str,
) -> list[dict]:
    """Trains until the clock says so, and looks at validation accuracy on the way, off the clock.

    Args:
        step: Makes an update: inputs, labels, learning rate.
        accuracy: Gives the accuracy on the validation examples.
        examples: The batches.
        clock: The clock.
        until: Its reading at which this stage ends.
        every: CPU seconds from one look to the next, so that all sides are looked at equally often; there is one at the
            end, too.
        learning_rate: The largest.
        stage: What the rows are to call this.

    Returns:
        A row for each look: stage, CPU seconds, updates of this stage, accuracy.
    """
    start, rows, updates = clock.spent(), [], 0
    due = start + every

    def look(spent: float) -> None:
        with clock.paused():
            rows.append({"stage": stage, "cpu_s": spent, "updates": updates, "accuracy": accuracy()})

    while (spent := clock.spent()) < until:
        if spent >= due:
            look(spent)
            due = spent + every
        step(*next(examples), cosine(learning_rate, (spent - start) / (until - start)))
        updates += 1
    look(spent)
    return rows


def seconds_to(rows: list[dict], level: float) -> float | None:
    """CPU seconds at the first look that saw an accuracy of at least `level`; `None` if none did.

    Looks at a representation network do not count: what is asked for is a spiking network.
    """
    return next((row["cpu_s"] for row in rows if row["stage"] == "spikes" and row["accuracy"] >= level), None)

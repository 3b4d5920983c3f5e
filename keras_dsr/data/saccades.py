"""Event streams made from images, as a camera records them that moves in front of a still picture."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Saccades:
    """A simulated event camera on N-MNIST's three saccades.

    The camera sees the image moving along a triangle: down and to the right, up and to the right, back to the left.
    A pixel follows the logarithm of its brightness, L = log(darkness + brightness), from the start of the movement.
    Each time that L has changed by the pixel's threshold since its last event, it sends an event: ON if L rose, OFF if
    it fell.

    Args:
        sensor: Height and width in pixels, the same.
        image: Height and width of the image on the sensor in pixels; it moves by `sensor - image` pixels.
        duration: Duration of one saccade in microseconds. N-MNIST's is about 100 ms.
        steps: Number of moments in a saccade at which the brightness is looked at.
        darkness: Brightness of black, where white is 1: the range of L is log((1 + darkness) / darkness).
        threshold: Change of L that sends an event.
        mismatch: Standard deviation of the pixels' thresholds, as a part of `threshold`; a few percent in real sensors.
        seed: Seed of the thresholds and of the times within a step.

    Reference: Orchard et al., "Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades",
    Frontiers in Neuroscience, 2015; Lichtsteiner et al., "A 128x128 120 dB 15 us Latency Asynchronous Temporal Contrast
    Vision Sensor", JSSC, 2008, for the pixel and its mismatch.
    """

    sensor: int = 16
    image: int = 12
    duration: int = 100_000
    steps: int = 20
    darkness: float = 0.1
    threshold: float = 0.3
    mismatch: float = 0.03
    seed: int = 0

    def record(self, images: np.ndarray) -> list[np.ndarray]:
        """The events of one recording of each image.

        Args:
            images: Brightness from 0 to 1, of shape (count, height, width).

        Returns:
            For each image, a structured array of shape (events,) with the fields `t` (microseconds), `x`, `y` and `p`
            (0 for OFF, 1 for ON), in the order of time.
        """
        random = np.random.default_rng(self.seed)
        thresholds = self.threshold * random.normal(1, self.mismatch, (self.sensor, self.sensor))
        path = self._path()
        level = self._see(images, path[0])
        step_time = self.duration / self.steps
        found = []
        for step, place in enumerate(path[1:]):
            change = (self._see(images, place) - level) / thresholds
            sent = np.trunc(change).astype(int)
            level += sent * thresholds
            which, row, column = np.nonzero(sent)
            times = np.abs(sent[which, row, column])
            which, row, column, polarity = (
                np.repeat(values, times) for values in (which, row, column, sent[which, row, column] > 0)
            )
            time = ((step + random.random(which.size)) * step_time).astype(int)
            found.append(np.stack([which, time, column, row, polarity]))
        which, time, column, row, polarity = np.concatenate(found, axis=1)
        order = np.lexsort((time, which))
        events = np.empty(order.size, dtype=[(name, "i8") for name in "txyp"])
        for name, values in zip("txyp", (time, column, row, polarity), strict=True):
            events[name] = values[order]
        return np.split(events, np.cumsum(np.bincount(which, minlength=len(images)))[:-1])

    def _path(self) -> np.ndarray:
        """Row and column of the image's corner at each moment."""
        free = self.sensor - self.image
        corners = free * np.array([[0, 0], [1, 0.5], [0, 1], [0, 0]])
        part = np.linspace(0, 1, self.steps + 1)[1:, np.newaxis]
        legs = [start + part * (end - start) for start, end in itertools.pairwise(corners)]
        return np.concatenate([corners[:1], *legs])

    def _see(self, images: np.ndarray, place: np.ndarray) -> np.ndarray:
        """The logarithm of the brightness at each pixel of the sensor, of shape (count, sensor, sensor)."""
        rows, columns = (
            self._interpolation(size, offset) for size, offset in zip(images.shape[1:], place, strict=True)
        )
        return np.log(self.darkness + rows @ images @ columns.T)

    def _interpolation(self, size: int, offset: float) -> np.ndarray:
        """Bilinear weights (sensor, size) of an axis of the image whose border is at `offset`, black outside."""
        seen = (np.arange(self.sensor) + 0.5 - offset) * size / self.image - 0.5
        return np.maximum(0, 1 - np.abs(seen[:, np.newaxis] - np.arange(size)))

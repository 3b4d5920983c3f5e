"""Prometheus metrics, under TensorFlow Serving's names so that its dashboards fit. Times are in microseconds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from keras_dsr.serving.errors import Code

_MICROSECONDS = tuple(10 * 2**power for power in range(21))  # 10 us to 10 s
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class _RequestCount(Collector):
    """A counter without the suffix `_total` that the client library would add to TensorFlow Serving's name."""

    name = ":tensorflow:serving:request_count"

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, model: str, status: str) -> None:
        with self._lock:
            self._counts[model, status] += 1

    def collect(self) -> Iterator[Metric]:
        metric = Metric(self.name, "Requests by model and status.", "unknown")
        with self._lock:
            counts = dict(self._counts)
        for (model, status), count in counts.items():
            metric.add_sample(self.name, {"model_name": model, "status": status}, count)
        yield metric


class Metrics:
    """The metrics of one server.

    Args:
        models: The names to count by. Requests for others are counted as "unknown", so that nobody can add series.
    """

    def __init__(self, models: list[str]):
        self._models = frozenset(models)
        self._registry = CollectorRegistry()
        self._requests = _RequestCount()
        self._registry.register(self._requests)
        self._request_latency = Histogram(
            ":tensorflow:serving:request_latency",
            "From a request read to its answer ready.",
            ("model_name", "API", "entrypoint"),
            buckets=_MICROSECONDS,
            registry=self._registry,
        )
        self._runtime_latency = Histogram(
            ":tensorflow:serving:runtime_latency",
            "Of this, waiting in the queue and running the signature.",
            ("model_name", "API", "runtime"),
            buckets=_MICROSECONDS,
            registry=self._registry,
        )
        self._batch_size = Histogram(
            ":tensorflow:serving:batching_session:processed_batch_size",
            "Examples that ran together.",
            ("model_name",),
            buckets=_SIZES,
            registry=self._registry,
        )
        self._load_latency = Gauge(
            ":tensorflow:cc:saved_model:load_latency",
            "Reading and warming up the version loaded last.",
            ("model_name",),
            registry=self._registry,
        )

    def request(self, model: str, api: str, entrypoint: str, code: Code, seconds: float) -> None:
        """Counts a request, with its answer's status and how long it took."""
        model = model if model in self._models else "unknown"
        self._requests.add(model, code.name)
        self._request_latency.labels(model, api, entrypoint).observe(seconds * 1e6)

    def runtime(self, model: str, seconds: float) -> None:
        """Counts a run of a signature, with its time in the queue."""
        self._runtime_latency.labels(model, "Predict", "TF2").observe(seconds * 1e6)

    def batch(self, model: str, size: int) -> None:
        """Counts examples that ran together."""
        self._batch_size.labels(model).observe(size)

    def loaded(self, model: str, seconds: float) -> None:
        """Notes how long a version took to load."""
        self._load_latency.labels(model).set(seconds * 1e6)

    def page(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self._registry)

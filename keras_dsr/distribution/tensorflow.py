"""Strategies on TensorFlow: `tf.distribute` under `keras.Model.fit`."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_dsr import graph
from keras_dsr.data.parts import padded
from keras_dsr.distribution import base
from keras_dsr.layers.neurons import neurons_of


def make(devices: str, replicas: int | None, synchronized: bool, jit_compile: bool | str) -> base.Strategy:
    """The strategy of a name; arguments as in `keras_dsr.distribution.strategy`."""
    if devices == "mirrored":
        return _Distributed(
            devices, tf.distribute.MirroredStrategy(_local_devices(replicas)), synchronized, jit_compile
        )
    if devices == "tpu":
        return _Distributed(devices, _tpu(), synchronized, jit_compile)
    task, workers = _tf_config()
    base.check_port(workers[task], "TF_CONFIG")
    base.tell_waiting(task, len(workers), workers)
    engine = tf.distribute.MultiWorkerMirroredStrategy()
    if engine.extended._num_workers != len(workers):
        raise ValueError(f"TF_CONFIG names {len(workers)} workers, and {engine.extended._num_workers} take part.")
    return _MultiWorker(devices, engine, synchronized, jit_compile, len(workers), task)


class _Distributed(base.Strategy):
    """A strategy of `tf.distribute`.

    Args:
        name: One of `keras_dsr.distribution.DEVICES`.
        engine: The strategy itself.
        synchronized: As in `keras_dsr.distribution.strategy`.
        jit_compile: As in `keras_dsr.distribution.strategy`.
        processes: How many processes take part.
        process: Which of them this is.
    """

    def __init__(
        self,
        name: str,
        engine: tf.distribute.Strategy,
        synchronized: bool,
        jit_compile: bool | str,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.name = name
        self.engine = engine
        self.synchronized = synchronized
        self.replicas = self.devices = engine.num_replicas_in_sync
        self.processes, self.process = processes, process
        # As the layers come, which is in Keras' own steps; on TPUs XLA has the whole step.
        self.compiles_spikes = False if name == "tpu" else None if jit_compile == "auto" else bool(jit_compile)

    @property
    def description(self) -> str:
        return f"{super().description}; of this process {', '.join(self.engine.extended.worker_devices)}"

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "synchronized": self.synchronized}

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return self.engine.scope()

    def prepare(self, model: keras.Model) -> keras.Model:
        for layer in model._flatten_layers():
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = self.synchronized
        for layer in neurons_of(model):
            layer.jit_compile = self.compiles_spikes
        return model

    def jit_compile(self, wanted: bool | str) -> bool | str:
        return False  # Keras fails to compile a step that is run under a strategy

    def own(self, batch_size: int) -> range | None:
        self.check_batch_size(batch_size)
        if self.processes == 1:
            return None
        each = batch_size // self.processes
        return range(self.process * each, (self.process + 1) * each)

    def training_batches(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        return self._parts(batches, batch_size)

    def evaluation_batches(self, batches: tf.data.Dataset, count: int, batch_size: int) -> tuple[Any, int | None]:
        # Steps are given, so Keras goes on where it was: round and round.
        return self._parts(padded(batches, count, batch_size).repeat(), batch_size), math.ceil(count / batch_size)

    def _parts(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        """Each batch in parts, of which the replica of number k gets the k-th."""
        own = self.own(batch_size)
        first, last = (0, batch_size) if own is None else (own.start, own.stop)
        here = self.replicas // self.processes

        def split(*batch: tf.Tensor) -> tuple[tf.Tensor, ...]:
            whole = (tf.ensure_shape(x, (batch_size, *x.shape[1:])) for x in batch)
            return tuple(tf.reshape(x[first:last], (here, (last - first) // here, *x.shape[1:])) for x in whole)

        parts = batches.map(split).unbatch().prefetch(2 * here)
        return self.engine.distribute_datasets_from_function(lambda context: parts)


class _MultiWorker(_Distributed):
    """`MultiWorkerMirroredStrategy`: one process a worker."""

    def prepare(self, model: keras.Model) -> keras.Model:
        graph.functional(model)  # raises, if it is none
        model = super().prepare(model)
        return MultiWorkerModel(model.input, model.output, name=model.name)

    def gather(self, text: str) -> list[str]:
        results = self._gather(tf.constant(base.as_row(text)[np.newaxis]))
        rows = np.asarray(self.engine.experimental_local_results(results)[0])
        return [base.as_text(row) for row in rows[:: self.replicas // self.processes]]

    @functools.cached_property
    def _gather(self) -> Any:
        """From a row of each process to the rows of all replicas, (replicas, length)."""

        def of_replica(row: tf.Tensor) -> tf.Tensor:
            # A copy, which stands on the replica's device.
            return tf.distribute.get_replica_context().all_gather(tf.identity(row), axis=0)

        @tf.function(input_signature=[tf.TensorSpec((1, base.TEXT_BYTES), tf.int32)], autograph=False)
        def gather(row: tf.Tensor) -> Any:
            return self.engine.run(of_replica, args=(row,))

        return gather

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)) or (
            isinstance(error, tf.errors.InternalError) and "ollective" in str(error)
        )


class MultiWorkerModel(keras.Model):
    """A model that `fit` can train under `MultiWorkerMirroredStrategy`; stock Keras 3 fails there (keras#20585).

    It builds its metrics from the part of a batch that this process has, where Keras would reduce the parts of all
    processes to one and fails, and gives logs an axis, along which Keras takes their mean over replicas.
    """

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is not None:
            for _, _, batches in iterator:
                data_batch = keras.tree.map_structure(self._first, next(batches))
                break
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def _first(self, value: Any) -> tf.Tensor:
        return self.distribute_strategy.experimental_local_results(value)[0]

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """As Keras's, with logs of shape (1,)."""
        return {name: ops.reshape(value, (1,)) for name, value in super().train_step(data).items()}

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """As Keras's, with logs of shape (1,)."""
        return {name: ops.reshape(value, (1,)) for name, value in super().test_step(data).items()}


def _local_devices(replicas: int | None) -> list[str] | None:
    """Names of the devices to mirror on; `None` for those that TensorFlow finds. Makes CPU devices where needed."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus or replicas is None:
        return None
    cpu = tf.config.list_physical_devices("CPU")[0]
    made = tf.config.get_logical_device_configuration(cpu)
    if replicas > 1 and (made is None or len(made) < replicas):
        try:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        except RuntimeError as error:
            raise ValueError(
                f"{replicas} CPU devices cannot be made any more, as TensorFlow runs already. Ask for the strategy "
                "before anything else of TensorFlow is used in the process."
            ) from error
    return [f"CPU:{number}" for number in range(replicas)]


def _tpu() -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=os.environ.get("TPU_NAME", "local"))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            "No TPU was found. devices='tpu' on TensorFlow needs a TPU virtual machine with the package "
            "tensorflow-tpu, or one that TPU_NAME names; JAX (KERAS_BACKEND=jax) needs jax[tpu]. TensorFlow says: "
            f"{error}"
        ) from error


def _tf_config() -> tuple[int, list[str]]:
    """Which worker this process is, and the addresses of all, the chief first, as the variable TF_CONFIG says.

    Raises:
        ValueError: if it is not set or wrong.
    """
    example = '{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]}, "task": {"type": "worker", "index": 0}}'
    text = os.environ.get("TF_CONFIG", "")
    if not text:
        raise ValueError(f"devices='multiworker' needs the environment variable TF_CONFIG in each process: {example}.")
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        kind, index = task["type"], int(task["index"])
        counts = {name: list(addresses) for name, addresses in cluster.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"TF_CONFIG is JSON with cluster and task, such as {example}. Received {text!r} ({error})."
        ) from error
    if not counts or not set(counts) <= {"chief", "worker"} or len(counts.get("chief", ())) > 1:
        raise ValueError(
            f"The cluster of TF_CONFIG has workers and at most one chief, no parameter servers. Received {cluster!r}."
        )
    workers = [*counts.get("chief", ()), *counts.get("worker", ())]
    for address in workers:
        base.check_address(address, "TF_CONFIG")
    if len(set(workers)) < len(workers):
        raise ValueError(f"Each worker of TF_CONFIG has an address of its own. Received {workers!r}.")
    if kind not in counts or not 0 <= index < len(counts[kind]):
        raise ValueError(
            f"The task of TF_CONFIG is one of its cluster, {cluster!r}. Received type {kind!r}, index {index!r}."
        )
    return index + (len(counts.get("chief", ())) if kind == "worker" else 0), workers

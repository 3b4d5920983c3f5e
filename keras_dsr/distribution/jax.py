"""Strategies on JAX: `keras.distribution`, in one process or several."""

from __future__ import annotations

import contextlib
import math
import os
from typing import TYPE_CHECKING, Any

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_dsr.data.parts import padded
from keras_dsr.distribution import base

if TYPE_CHECKING:
    import tensorflow as tf

_VARIABLES = ("KERAS_DISTRIBUTION_JOB_ADDRESSES", "KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID")


def make(devices: str, replicas: int | None, model_shards: int, wide: int) -> base.Strategy:
    """The strategy of a name; arguments as in `keras_dsr.distribution.strategy`."""
    processes = _initialize(replicas)
    found = jax.devices()
    if devices == "tpu" and found[0].platform != "tpu":
        raise ValueError(
            f"No TPU was found: JAX has {found[0].platform} devices. Install jax[tpu] on a TPU virtual machine, or "
            "choose jax-data-parallel. keras-dsr check-tpu compiles for TPUs without one."
        )
    if processes is not None and jax.process_count() != processes:
        raise ValueError(f"{_VARIABLES[1]} says {processes} processes, and {jax.process_count()} take part.")
    names = keras.distribution.list_devices()
    if devices != "jax-model-parallel":
        return _Distributed(devices, keras.distribution.DataParallel(devices=names, auto_shard_dataset=False))
    if model_shards < 2 or len(names) % model_shards:
        raise ValueError(
            f"model_shards is 2 or more and divides the number of devices, {len(names)}. "
            f"Received model_shards={model_shards!r}."
        )
    shared, several = len(names) // model_shards, jax.process_count()
    if shared % several and several % shared:
        raise ValueError(
            f"Each process has whole replicas, or each replica has whole processes. Received {several} processes and "
            f"{shared} replicas ({len(names)} devices, model_shards={model_shards}); change one of them."
        )
    mesh = keras.distribution.DeviceMesh((len(names) // model_shards, model_shards), ("batch", "model"), names)
    return _Distributed(devices, _WideKernels(mesh, wide))


class _WideKernels(keras.distribution.ModelParallel):
    """Cuts wide kernels along their output features; all other variables are whole on each device.

    Args:
        mesh: Devices, with the axes "batch" and "model".
        wide: The least number of output features that makes a kernel wide.
    """

    def __init__(self, mesh: keras.distribution.DeviceMesh, wide: int) -> None:
        layout_map = keras.distribution.LayoutMap(mesh)
        super().__init__(layout_map=layout_map, batch_dim_name="batch", auto_shard_dataset=False)
        self.wide = wide
        self.shards = mesh.shape[1]
        self.widest = 0
        self.cut: list[str] = []

    def get_variable_layout(self, variable: Any) -> Any:
        # The optimizer's variables come with the layout of the weights that they belong to.
        if getattr(variable, "_layout", None) is not None or variable.path.rsplit("/", 1)[-1] != "kernel":
            return super().get_variable_layout(variable)
        features = variable.shape[-1]
        self.widest = max(self.widest, features)
        if features < self.wide or features % self.shards:
            return super().get_variable_layout(variable)
        self.cut.append(variable.path)
        axes = [*[None] * (len(variable.shape) - 1), "model"]
        return keras.distribution.TensorLayout(axes, self.device_mesh)


class _Distributed(base.Strategy):
    """A `keras.distribution.Distribution`.

    Args:
        name: One of `keras_dsr.distribution.DEVICES`.
        engine: The distribution itself.
    """

    def __init__(self, name: str, engine: keras.distribution.DataParallel | _WideKernels) -> None:
        self.name = name
        self.engine = engine
        self.devices = engine.device_mesh.devices.size
        self.replicas = engine.num_model_replicas
        self.processes, self.process = jax.process_count(), jax.process_index()

    @property
    def description(self) -> str:
        return f"{super().description}; {', '.join(map(str, jax.devices()))}"

    def facts(self) -> dict[str, Any]:
        facts = {**super().facts(), "devices": self.devices}
        return facts | ({"wide": self.engine.wide} if isinstance(self.engine, _WideKernels) else {})

    @contextlib.contextmanager
    def scope(self) -> Any:
        with self.engine.scope():
            yield self.engine

    def prepare(self, model: keras.Model) -> keras.Model:
        if isinstance(self.engine, _WideKernels) and not self.engine.cut:
            raise ValueError(
                f"No kernel has {self.engine.wide} output features or more, in a number that {self.engine.shards} "
                f"divides: nothing would be shared. The widest has {self.engine.widest}; pass a lower `wide`, or "
                "choose jax-data-parallel."
            )
        return model

    def own(self, batch_size: int) -> range | None:
        self.check_batch_size(batch_size)
        if self.processes == 1 or self.replicas == 1:
            return None
        each = batch_size // min(self.processes, self.replicas)
        first = self.engine.data_shard_id * each
        return range(first, first + each)

    def training_batches(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        return self._part(batches, batch_size)

    def evaluation_batches(self, batches: tf.data.Dataset, count: int, batch_size: int) -> tuple[Any, int | None]:
        return self._part(padded(batches, count, batch_size).repeat(), batch_size), math.ceil(count / batch_size)

    def _part(self, batches: tf.data.Dataset, batch_size: int) -> Any:
        """Of each batch the part of this process; Keras spreads it over the devices."""
        own = self.own(batch_size)
        if own is None:
            return batches
        return batches.map(lambda *batch: tuple(x[own.start : own.stop] for x in batch))

    def gather(self, text: str) -> list[str]:
        if self.processes == 1:
            return [text]
        rows = multihost_utils.process_allgather(base.as_row(text))
        return [base.as_text(np.asarray(row)) for row in rows]

    def lost(self, error: BaseException) -> bool:
        if self.processes == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
            return False
        signs = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "onnection", "Gloo", "heartbeat")
        return any(sign in str(error) for sign in signs)


def _initialize(replicas: int | None) -> int | None:
    """Joins the other processes, if the environment names them, and gives their number; `None` if it does not.

    Raises:
        ValueError: if the environment is wrong, or JAX runs already.
        OSError: if the port of the first process is taken.
    """
    addresses, number, process = (os.environ.get(name) for name in _VARIABLES)
    count = None
    if any(value is not None for value in (addresses, number, process)):
        count, index = _checked(addresses, number, process)
        if not jax.distributed.is_initialized():
            if index == 0:
                base.check_port(addresses.split(",")[0], _VARIABLES[0])
            _make_cpu_devices(None if replicas is None else replicas // count)
            base.tell_waiting(index, count, addresses.split(","))
            try:
                keras.distribution.initialize()
            except RuntimeError as error:
                if any(sign in str(error) for sign in ("DEADLINE_EXCEEDED", "UNAVAILABLE")):
                    raise ConnectionError(
                        f"The other {count - 1} processes were not met at {addresses} in time: {error} Start all of "
                        "them within a few minutes, and see to it that they reach that address."
                    ) from error
                raise ValueError(
                    f"This process cannot join the other {count - 1}: {error} Ask for the strategy before anything "
                    "else of JAX is used in the process."
                ) from error
    else:
        _make_cpu_devices(replicas)
    return count


def _checked(addresses: str | None, number: str | None, process: str | None) -> tuple[int, int]:
    received = ", ".join(f"{n}={v!r}" for n, v in zip(_VARIABLES, (addresses, number, process), strict=True))
    wrong = ValueError(
        "Several processes are named by three variables: addresses 'host:port' with commas between (or the first one "
        f"alone), their number, and which of them this is, from 0. Received {received}."
    )
    if not addresses or not (number or "").isdigit() or not (process or "").isdigit():
        raise wrong
    count, index, every = int(number), int(process), addresses.split(",")
    if count < 1 or index >= count or len(every) not in (1, count):
        raise wrong
    for address in every:
        base.check_address(address, _VARIABLES[0])
    return count, index


def _make_cpu_devices(replicas: int | None) -> None:
    """Makes so many CPU devices, which JAX then has if there are no others."""
    if replicas is None or replicas < 2 or jax.config.jax_num_cpu_devices == replicas:
        return
    # If JAX runs already it refuses, or takes no notice: then the number of devices tells.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", replicas)

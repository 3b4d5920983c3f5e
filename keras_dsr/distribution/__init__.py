"""Where a training runs: on one device, on several, in one process or in many.

`strategy(devices)` gives a `Strategy`, which `keras_dsr.training.train` takes. A training has the same global batches
in the same order on any number of replicas, each of which works on its part of a batch; normalization takes the
statistics of all parts, gradients (thresholds' included) are summed, losses are averaged over the whole batch, dropout
draws for the whole batch. So weights do not depend on the number of replicas, but for the order in which sums are
rounded.

Each backend brings the engine that is there for it: `tf.distribute` on TensorFlow, `keras.distribution` on JAX.
"""

from __future__ import annotations

import types

import keras

from keras_dsr.distribution.base import Strategy, as_known_error

DEVICES = types.MappingProxyType(
    {
        "mirrored": "TensorFlow: the GPUs of this machine (or CPU devices, where there is none)",
        "multiworker": "TensorFlow: one process a machine, named by TF_CONFIG",
        "tpu": "TensorFlow or JAX: the TPU of this machine, or the one that TPU_NAME names",
        "jax-data-parallel": "JAX: all devices of all processes, each with all weights",
        "jax-model-parallel": "JAX: the same, but groups of devices share the kernels of the widest layers",
    }
)
"""What `strategy` knows, with a line about each."""

_TENSORFLOW = ("mirrored", "multiworker", "tpu")
_JAX = ("tpu", "jax-data-parallel", "jax-model-parallel")


def strategy(
    devices: str | None = None,
    *,
    replicas: int | None = None,
    synchronized: bool = True,
    jit_compile: bool | str = "auto",
    model_shards: int = 2,
    wide: int = 512,
) -> Strategy:
    """Where a training runs. Ask for it before anything else of TensorFlow or JAX is used in the process.

    With "multiworker" this process is the worker that the environment variable TF_CONFIG says. With "jax-..." it is one
    of several if KERAS_DISTRIBUTION_JOB_ADDRESSES, _NUM_PROCESSES and _PROCESS_ID say so, as
    `keras.distribution.initialize` reads them, or if that was called before. This call then waits for the others, and
    makes sure that all have the same versions.

    Args:
        devices: One of `DEVICES`; `None` for the one device that Keras takes by itself.
        replicas: How many replicas there must be, over all processes. Where there is no GPU or TPU, so many CPU devices
            are made; but not for "multiworker", which has one CPU in each process. `None` for as many as there are
            devices.
        synchronized: Whether normalization takes its statistics over all replicas. On JAX it always does.
        jit_compile: Under `tf.distribute` XLA cannot compile a whole training step: whether it compiles the simulation
            of each neuron layer by itself; "auto" in `fit`, `evaluate` and `predict`, as it is without a strategy. TPUs
            and JAX compile all there is.
        model_shards: For "jax-model-parallel", over how many devices a wide kernel is cut; a divisor of their number.
        wide: For "jax-model-parallel", the least number of output features that makes a kernel wide.

    Returns:
        The strategy.

    Raises:
        ValueError: if the Keras backend has no such strategy, there are not so many replicas, TF_CONFIG or the
            variables of `keras.distribution.initialize` are wrong, or the processes have other versions.
        OSError: if the port of this process is taken.
        ConnectionError: if other processes do not come, or are gone at once.
    """
    backend = keras.backend.backend()
    if devices is None:
        if replicas not in (None, 1):
            raise ValueError(
                f"Several replicas need a strategy. Received replicas={replicas!r}, devices=None; devices is one of "
                f"{', '.join(DEVICES)}."
            )
        return Strategy()
    if devices not in DEVICES:
        raise ValueError(f"devices is one of {', '.join(DEVICES)}. Received devices={devices!r}.")
    known = _TENSORFLOW if backend == "tensorflow" else _JAX
    if devices not in known:
        other = "jax" if backend == "tensorflow" else "tensorflow"
        raise ValueError(
            f"The Keras backend {backend!r} has no strategy {devices!r}: it would train on one device. Choose one of "
            f"{', '.join(known)}, or set KERAS_BACKEND={other}."
        )
    if replicas is not None and (isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 1):
        raise ValueError(f"replicas is their number, 1 or more. Received replicas={replicas!r}.")
    if jit_compile not in (True, False, "auto"):
        raise ValueError(f"jit_compile is True, False or 'auto'. Received jit_compile={jit_compile!r}.")
    if backend == "tensorflow":
        from keras_dsr.distribution import tensorflow

        made = tensorflow.make(devices, replicas, synchronized, jit_compile)
    else:
        from keras_dsr.distribution import jax

        if not synchronized or jit_compile is False:
            raise ValueError(
                "On JAX normalization is over all replicas and XLA compiles all there is. Received "
                f"synchronized={synchronized!r}, jit_compile={jit_compile!r}; leave them out."
            )
        made = jax.make(devices, replicas, model_shards, wide)
    if replicas is not None and made.devices != replicas:
        raise ValueError(
            f"{replicas} replicas were asked for, and there are {made.devices}: {made.description}. Correct replicas, "
            "or see to it that all devices are visible and all processes are started. Without GPUs each process of "
            "'multiworker' has one CPU."
        )
    with as_known_error(made):  # what all of them do together first
        made.check_versions()
    return made


__all__ = ["DEVICES", "Strategy", "as_known_error", "strategy"]

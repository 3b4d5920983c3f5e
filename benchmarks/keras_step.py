"""A training step or an inference in Keras, measured in this process: what `steps` and `scaling` start.

python benchmarks/keras_step.py --task '{"network": "resnet18", "kind": "dsr", "mode": "train", "timesteps": 5,
    "batch": 8, "shape": [32, 32, 3], "repeats": 3}'
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

from measure import timed, use_cores

CLASSES = 10


def network(name: str, kind: str, timesteps: int | None, shape: tuple[int, int, int]):
    """A network by its name.

    Args:
        name: "resnet18", "resnet20" and so on, or "vgg11".
        kind: "dsr", ours; or "ann", stock layers with ReLU.
        timesteps: Number N of time steps; nothing for "ann".
        shape: Height, width and channels of an image, or of a frame.
    """
    import stock

    from keras_dsr import models

    if name.startswith("resnet"):
        depth = int(name.removeprefix("resnet"))
        if kind == "ann":
            return stock.preact_resnet(depth, None, CLASSES, shape)
        return models.preact_resnet(depth, timesteps=timesteps, classes=CLASSES, input_shape=shape)
    depth = int(name.removeprefix("vgg"))
    if kind == "ann":
        return stock.vgg(depth, None, CLASSES, shape)
    return models.vgg(depth, classes=CLASSES, input_shape=(timesteps, *shape))


def forward_of(model, training: bool, jit: bool, x) -> Callable[[], object]:
    """The compiled forward pass on `x`, as a call that returns when it is done.

    In training mode it is a function of its own, whose neurons are compiled as in Keras' training steps.
    """
    import keras

    from keras_dsr.layers.neurons import neurons_of

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not training:
            model.compile(jit_compile=jit)
            x = tf.constant(x)
            return lambda: model.predict_on_batch(x)
        for neuron in neurons_of(model):
            neuron.jit_compile = True
        run = tf.function(lambda x: model(x, training=training), jit_compile=jit)
        x = tf.constant(x)
        return lambda: run(x).numpy()
    import jax

    weights = [w.value for w in model.trainable_variables]
    state = [w.value for w in model.non_trainable_variables]
    run = jax.jit(lambda w, s, x: model.stateless_call(w, s, x, training=training))
    x = jax.numpy.asarray(x)
    return lambda: jax.block_until_ready(run(weights, state, x))


def training_call(task: dict, jit: bool) -> tuple[Callable[[], object], object]:
    """A training step on a random batch, as a call that returns when it is done, and the model.

    Args:
        task: As in `measure`; "kind" is "dsr" if it is left out.
        jit: Whether XLA compiles it.
    """
    import keras
    import numpy as np

    from keras_dsr.optimizers import SGD

    model = network(task["network"], task.get("kind", "dsr"), task["timesteps"], tuple(task["shape"]))
    x = np.random.default_rng(0).random((task["batch"], *model.input_shape[1:]), dtype="float32")
    y = np.arange(task["batch"]) % CLASSES
    ours = task.get("kind", "dsr") == "dsr"
    model.compile(
        SGD(0.01, 0.9, coupled_weight_decay=0.0) if ours else keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )

    def call():
        loss = float(model.train_on_batch(x, y))
        if not math.isfinite(loss):
            raise RuntimeError(f"The loss is finite. Received {loss}.")

    return call, model


def measure(task: dict) -> dict:
    """Measures one network.

    Args:
        task: "network", "kind", "timesteps" and "shape" as in `network`; "mode" ("train"; "forward", its forward pass
            in training mode; or "inference"), "batch", "repeats", "warmup"; "jit", whether XLA compiles it, on
            TensorFlow; "precision", Keras' dtype policy; "cores" that it may use.
    """
    cores = use_cores(task.get("cores"))
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(task.get("precision", "float32"))
    jit = task.get("jit", False) or keras.backend.backend() == "jax"
    started = time.perf_counter()
    if task["mode"] == "train":
        call, model = training_call(task, jit)
    else:
        model = network(task["network"], task["kind"], task["timesteps"], tuple(task["shape"]))
        x = np.random.default_rng(0).random((task["batch"], *model.input_shape[1:]), dtype="float32")
        call = forward_of(model, task["mode"] == "forward", jit, x)

    result = {"build_s": time.perf_counter() - started, **timed(call, task["repeats"], task.get("warmup", 2))}
    thresholds = [w for w in model.trainable_weights if w.path.endswith("/threshold")]
    return {
        **result,
        "parameters": sum(int(np.prod(w.shape)) for w in model.trainable_weights) - len(thresholds),
        "cores": cores,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    print(json.dumps(measure(json.loads(parser.parse_args().task))))

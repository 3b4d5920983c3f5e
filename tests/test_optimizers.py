"""SGD whose weight decay is part of the gradient, against PyTorch's formula written in NumPy."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy

import keras_dsr
from keras_dsr import models
from keras_dsr.layers import IFSpike
from keras_dsr.optimizers import SGD

SHAPES = ((3, 4), (4,), ())
RATES = (0.1, 0.05, 0.02, 0.01, 0.2, 0.3)


def pytorch(weights, gradients, rates, momentum, nesterov, decay):
    """torch.optim.SGD, over the steps of `gradients`."""
    weights = [w.astype("float64") for w in weights]
    velocities = [np.zeros_like(w) for w in weights]
    for rate, step in zip(rates, gradients, strict=True):
        for index, gradient in enumerate(step):
            g = gradient + decay * weights[index]
            # Keras puts the rate into the velocity, PyTorch before it: one and the same while the rate stands still.
            velocities[index] = momentum * velocities[index] + rate * g
            weights[index] = weights[index] - (
                momentum * velocities[index] + rate * g if nesterov else velocities[index]
            )
    return weights


def random(seed, steps=6):
    generator = np.random.default_rng(seed)
    weights = [generator.normal(size=shape).astype("float32") for shape in SHAPES]
    return weights, [[generator.normal(size=shape).astype("float32") for shape in SHAPES] for _ in range(steps)]


def apply(optimizer, weights, gradients):
    variables = [keras.Variable(w) for w in weights]
    for step in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in step], variables)
    return [numpy(v) for v in variables]


@pytest.mark.parametrize("decay", [0.0, 5e-4, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_pytorchs(momentum, nesterov, decay):
    weights, gradients = random(0)
    received = apply(SGD(0.1, momentum, nesterov, decay), weights, gradients)
    expected = pytorch(weights, gradients, [0.1] * len(gradients), momentum, nesterov, decay)
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture
def taken(monkeypatch):
    """Whether each step of each weight was taken in one pass, in order."""
    found = []
    descend = keras_dsr.backend.descend

    def spy(*arguments):
        found.append(descend(*arguments))
        return found[-1]

    monkeypatch.setattr(keras_dsr.backend, "descend", spy)
    return found


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_one_pass_takes_the_step_that_keras_takes(nesterov, dtype, taken):
    weights, gradients = random(4)
    weights = [w.astype(dtype) for w in weights]
    received = apply(SGD(0.1, 0.9, nesterov, 0.0), weights, gradients)
    assert taken == [True] * len(SHAPES) * len(gradients)
    expected = apply(keras.optimizers.SGD(0.1, 0.9, nesterov), weights, gradients)
    close = {"float32": 1e-6, "bfloat16": 0.03}[dtype]  # what is rounded once there is rounded twice here
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one.astype("float32"), other.astype("float32"), rtol=close, atol=close)


def trained(optimizer, kind="dense", **compiled):
    """Weights of a small model after some steps of `fit`."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).integers(0, 5, (12, 3)).astype("int32" if kind == "embedding" else "float32")
    first = keras.layers.Embedding(9, 4) if kind == "embedding" else keras.layers.Dense(4)
    model = keras.Sequential([keras.Input((3,), dtype=x.dtype), first, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(optimizer, "mean_squared_error", **compiled)
    model.fit(x, np.ones((12, 1)), batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("how", ["graph", "xla", "scaled", "accumulated", "averaged", "embedding", "replicas"])
def test_one_pass_trains_as_keras_does(how, taken):
    import tensorflow as tf

    settings = {"accumulated": {"gradient_accumulation_steps": 2}, "averaged": {"use_ema": True, "ema_momentum": 0.5}}

    def weights(kind, *more):
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope() if how == "replicas" else contextlib.nullcontext():
            optimizer = kind(0.01, 0.9, True, *more, **settings.get(how, {}))
            if how == "scaled":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)
            return trained(optimizer, "embedding" if how == "embedding" else "dense", jit_compile=how == "xla")

    found = weights(SGD, 0.0)
    # Not of a gradient of some rows, nor under a strategy.
    assert set(taken) == {"embedding": {False, True}, "replicas": {False}}.get(how, {True})
    for one, other in zip(found, weights(keras.optimizers.SGD), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_schedule_sets_the_rate_of_each_step():
    weights, gradients = random(1)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1, 2, 3, 4], list(RATES))
    received = apply(SGD(schedule, 0.9, coupled_weight_decay=0.1), weights, gradients)
    for one, other in zip(received, pytorch(weights, gradients, RATES, 0.9, False, 0.1), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_kerass_own_weight_decay_is_another():
    weights, gradients = random(2)
    coupled = apply(SGD(0.1, 0.9, coupled_weight_decay=0.1), weights, gradients)
    decoupled = apply(keras.optimizers.SGD(0.1, 0.9, weight_decay=0.1), weights, gradients)
    assert np.abs(coupled[0] - decoupled[0]).max() > 1e-2


def test_defaults_are_the_papers():
    optimizer = SGD()
    assert optimizer.momentum == 0.9
    assert optimizer.coupled_weight_decay == 5e-4
    assert optimizer.weight_decay is None


def test_all_trainable_weights_decay_and_no_others():
    """Thresholds, biases and normalization too: where the data asks for nothing, w becomes (1 - rate decay) w."""
    model = models.small_cnn((3,), IFSpike(threshold=2.0, threshold_l2=0.0), timesteps=2, classes=2)
    for weight in model.trainable_variables:
        weight.assign(np.ones(weight.shape))
    frozen = [numpy(w).copy() for w in model.non_trainable_variables]
    optimizer = SGD(0.5, 0.0, coupled_weight_decay=0.2)
    optimizer.apply([keras.ops.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
    names = {weight.name for weight in model.trainable_variables}
    assert names == {"kernel", "bias", "gamma", "beta", "threshold"}
    for weight in model.trainable_variables:
        np.testing.assert_allclose(numpy(weight), np.full(weight.shape, 0.9), rtol=1e-6, err_msg=weight.path)
    for weight, before in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(numpy(weight), before)


def test_decay_is_not_scaled_with_the_loss():
    weights, gradients = random(3)
    scaled = [[1024 * g for g in step] for step in gradients]
    received = apply(SGD(0.1, coupled_weight_decay=0.1, loss_scale_factor=1024.0), weights, scaled)
    for one, other in zip(received, apply(SGD(0.1, coupled_weight_decay=0.1), weights, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_clipping_leaves_the_decay_alone():
    """As in PyTorch, where gradients are clipped before the optimizer sees them."""
    weights, gradients = random(4)
    clipped = [[np.clip(g, -0.01, 0.01) for g in step] for step in gradients]
    received = apply(SGD(0.1, coupled_weight_decay=0.1, clipvalue=0.01), weights, gradients)
    for one, other in zip(received, apply(SGD(0.1, coupled_weight_decay=0.1), weights, clipped), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_are_one_step():
    weights, gradients = random(5, steps=4)
    means = [[(a + b) / 2 for a, b in zip(*gradients[i : i + 2], strict=True)] for i in (0, 2)]
    received = apply(SGD(0.1, coupled_weight_decay=0.1, gradient_accumulation_steps=2), weights, gradients)
    for one, other in zip(received, apply(SGD(0.1, coupled_weight_decay=0.1), weights, means), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
def test_a_weight_without_gradient_stays():
    used, unused = keras.Variable(np.ones(2, "float32")), keras.Variable(np.ones(2, "float32"))
    optimizer = SGD(0.1, 0.0, coupled_weight_decay=0.5)
    optimizer.apply([keras.ops.zeros(2), None], [used, unused])
    np.testing.assert_allclose(numpy(used), 0.95)
    np.testing.assert_array_equal(numpy(unused), 1.0)


def test_a_lower_bound_holds_against_the_decay():
    model = models.small_cnn((3,), IFSpike(threshold=0.5, threshold_lower_bound=0.49), timesteps=2, classes=2)
    optimizer = SGD(0.5, coupled_weight_decay=1.0)
    optimizer.apply([keras.ops.zeros(w.shape) for w in model.trainable_variables], model.trainable_variables)
    assert float(numpy(model.get_layer("neuron1").threshold)) == np.float32(0.49)


@pytest.mark.skipif(helpers.BACKEND != "jax", reason="TensorFlow has no stateless optimizers")
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_stateless_steps_are_the_same(jit):
    weights, gradients = random(6)
    optimizer = SGD(0.1, coupled_weight_decay=0.1)
    variables = [keras.Variable(w) for w in weights]
    optimizer.build(variables)
    state, values = [v.value for v in optimizer.variables], [v.value for v in variables]
    step = helpers.compiled(optimizer.stateless_apply, jit)
    for grads in gradients:
        values, state = step(state, grads, values)
    for one, other in zip(values, pytorch(weights, gradients, [0.1] * len(gradients), 0.9, False, 0.1), strict=True):
        np.testing.assert_allclose(numpy(one), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "jit"])
def test_fit_descends_the_loss_with_the_decay_in_it(jit_compile):
    """For plain SGD, coupled decay is the gradient of decay / 2 |w|^2, which Keras can have in the loss."""
    x = np.random.default_rng(0).normal(size=(12, 5)).astype("float32")
    y = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")

    def trained(optimizer, regularizer):
        inputs = keras.Input((5,))
        dense = keras.layers.Dense(3, kernel_regularizer=regularizer, bias_regularizer=regularizer)
        model = keras.Model(inputs, dense(inputs))
        dense.set_weights([np.linspace(-1, 1, 15).reshape(5, 3), np.linspace(0, 1, 3)])
        model.compile(optimizer, "mean_squared_error", jit_compile=jit_compile)
        model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
        return dense.get_weights()

    received = trained(SGD(0.1, 0.9, coupled_weight_decay=0.2), None)
    expected = trained(keras.optimizers.SGD(0.1, 0.9), keras.regularizers.L2(0.1))
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_config_round_trip():
    optimizer = SGD(0.3, 0.8, True, 0.01, clipnorm=1.0, name="sgd_of_ours")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert type(again) is SGD
    assert again.get_config() == optimizer.get_config()
    assert (again.momentum, again.nesterov, again.coupled_weight_decay, again.clipnorm) == (0.8, True, 0.01, 1.0)


def test_keras_file_round_trip_goes_on_where_it_was(tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile(SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)), "mean_squared_error")
    x, y = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    model.fit(x, y, batch_size=4, verbose=0)
    loaded = helpers.saved_and_loaded(model, tmp_path)
    assert type(loaded.optimizer) is SGD
    for each in (model, loaded):
        each.fit(x, y, batch_size=4, verbose=0)
    for one, other in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_package_alone_is_enough_to_load_a_file():
    assert "optimizers" in keras_dsr.__all__


@pytest.mark.tensorflow_only
def test_decay_does_not_grow_with_the_replicas():
    script = """
import numpy as np, tensorflow as tf, keras
from keras_dsr.optimizers import SGD
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones", use_bias=False)])
    model.compile(SGD(0.1, 0.0, coupled_weight_decay=0.5), "mean_squared_error", jit_compile=False)
model.fit(np.zeros((4, 1), "float32"), np.zeros((4, 1), "float32"), batch_size=4, verbose=0)
print(float(model.get_weights()[0][0, 0]))
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.strip().splitlines()[-1]) == pytest.approx(0.95)


@pytest.mark.parametrize("decay", [-1e-4, float("nan"), float("inf")])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=f"finite and not below 0. Received coupled_weight_decay={decay}"):
        SGD(coupled_weight_decay=decay)


def test_sparse_gradients_decay_all_rows():
    inputs = keras.Input((1,), dtype="int32")
    embedding = keras.layers.Embedding(3, 2, embeddings_initializer="ones")
    model = keras.Model(inputs, keras.layers.Flatten()(embedding(inputs)))
    model.compile(SGD(0.1, 0.0, coupled_weight_decay=0.5), "mean_squared_error", jit_compile=False)
    model.fit(np.array([[0]]), np.ones((1, 2)), verbose=0)
    np.testing.assert_allclose(embedding.get_weights()[0], 0.95, rtol=1e-6)

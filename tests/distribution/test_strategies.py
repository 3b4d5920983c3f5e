"""What a strategy is asked for and what it answers, as far as one device and one process can tell."""

from __future__ import annotations

import dataclasses
import inspect
import json
import socket

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import distribution, layers, recipes, runs, training
from keras_dsr.callbacks import CheckFinite
from keras_dsr.data.parts import padded
from keras_dsr.distribution import base

ON_TENSORFLOW = helpers.BACKEND == "tensorflow"
JAX_ONLY = pytest.mark.skipif(ON_TENSORFLOW, reason="needs the JAX backend")
TENSORFLOW_ONLY = pytest.mark.tensorflow_only
ADDRESSES, NUMBER, PROCESS = (f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"))


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("TF_CONFIG", ADDRESSES, NUMBER, PROCESS):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    """A port that something listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


class Three(base.Strategy):
    """Three processes, of which this is one; what the others say is made up."""

    name, replicas, devices, processes = "mirrored", 3, 3, 3

    def __init__(self, process=0, others=None):
        self.process = process
        self.others = others

    def gather(self, text):
        texts = [text] * 3 if self.others is None else list(self.others)
        texts[self.process] = text
        return texts


def test_one_device_is_the_default():
    devices = training.strategy()
    assert (devices.name, devices.replicas, devices.processes, devices.is_chief) == ("one", 1, 1, True)
    assert devices.gather("this") == ["this"]
    assert devices.on_chief(lambda: 3) == 3
    devices.check_batch_size(7)
    assert not devices.lost(RuntimeError("UNAVAILABLE"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": "all"}, "devices is one of mirrored, multiworker, tpu, .*devices='all'"),
        ({"replicas": 2}, "Several replicas need a strategy.*replicas=2"),
        ({"devices": "tpu", "replicas": 0}, "replicas is their number, 1 or more.*replicas=0"),
        ({"devices": "tpu", "replicas": True}, "replicas is their number"),
        ({"devices": "tpu", "jit_compile": "yes"}, "jit_compile is True, False or 'auto'.*'yes'"),
        ({"devices": "tpu"}, "No TPU was found"),
    ],
)
def test_a_strategy_that_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        training.strategy(**arguments)


def test_a_strategy_of_the_other_backend_is_an_error():
    """Keras takes no notice of `keras.distribution` on TensorFlow, and trains on one device."""
    names = ("jax-data-parallel", "jax-model-parallel") if ON_TENSORFLOW else ("mirrored", "multiworker")
    other = "jax" if ON_TENSORFLOW else "tensorflow"
    for name in names:
        with pytest.raises(ValueError, match=f"has no strategy '{name}': it would train on one.*KERAS_BACKEND={other}"):
            training.strategy(name)


def test_the_number_of_replicas_is_asserted():
    name = "mirrored" if ON_TENSORFLOW else "jax-data-parallel"
    here = training.strategy(name).replicas
    with pytest.raises(ValueError, match=r"9 (replicas were asked for, and there are|CPU devices cannot be made)"):
        training.strategy(name, replicas=9)
    assert here < 9


def test_a_batch_that_does_not_divide_is_an_error_before_anything_else(tmp_path):
    recipe = dataclasses.replace(recipes.get("digits"), batch_size=32)
    with pytest.raises(ValueError, match=r"evenly over 3 replicas\. Received batch_size=32; set it to 30"):
        training.train(recipe, tmp_path / "run", devices=Three())
    assert not (tmp_path / "run").exists()


def test_processes_must_agree():
    Three().agree("recipe", "a")
    with pytest.raises(ValueError, match=r"the same recipe\. The chief has a, process 2 has b"):
        Three(0, ["a", "a", "b"]).agree("recipe", "a")


def test_processes_with_other_versions_are_named():
    mine = base.versions()
    Three().check_versions()
    other = json.dumps({**mine, "numpy": "1.0"})
    with pytest.raises(ValueError, match=rf"process 0: numpy {mine['numpy']}; process 1: numpy 1\.0; process 2"):
        Three(0, [json.dumps(mine), other, json.dumps(mine)]).check_versions()


def test_the_chiefs_failure_is_everyones():
    def fail():
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        Three(0).on_chief(fail)
    with pytest.raises(ValueError, match="The chief failed: OSError: the disk is full"):
        Three(1, ["OSError: the disk is full", "", ""]).on_chief(fail)
    assert Three(1).on_chief(fail) is None


def test_a_process_that_is_gone_is_told():
    class Lost(Three):
        def lost(self, error):
            return isinstance(error, TimeoutError)

    told = pytest.raises(ConnectionError, match=r"is gone\. End the others and start all of them again")
    with told, distribution.as_known_error(Lost()):
        raise TimeoutError
    with pytest.raises(ValueError, match="mine"), distribution.as_known_error(Lost()):
        raise ValueError("mine")


def test_texts_travel_as_numbers():
    text = "Kräfte, 1 ≠ 2"
    assert base.as_text(base.as_row(text)) == text
    assert len(base.as_row("x" * 10**6)) == base.TEXT_BYTES


TF_CONFIGS = {
    "not_set": ("", "needs the environment variable TF_CONFIG in each process"),
    "no_json": ("{", "TF_CONFIG is JSON with cluster and task"),
    "no_task": ('{"cluster": {"worker": ["a:1"]}}', "TF_CONFIG is JSON with cluster and task"),
    "parameter_server": (
        '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
        "no parameter servers",
    ),
    "no_port": (
        '{"cluster": {"worker": ["a", "b:1"]}, "task": {"type": "worker", "index": 0}}',
        "addresses such as '10.0.0.1:2222'. Received 'a'",
    ),
    "high_port": (
        '{"cluster": {"worker": ["a:70000"]}, "task": {"type": "worker", "index": 0}}',
        "addresses such as .*Received 'a:70000'",
    ),
    "twice": (
        '{"cluster": {"worker": ["a:1", "a:1"]}, "task": {"type": "worker", "index": 0}}',
        "an address of its own",
    ),
    "index": (
        '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
        "one of its cluster.*index 2",
    ),
    "kind": ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', "type 'chief'"),
}


@TENSORFLOW_ONLY
@pytest.mark.parametrize("case", TF_CONFIGS)
def test_a_wrong_tf_config_is_an_error_before_anything_waits(case, monkeypatch):
    text, message = TF_CONFIGS[case]
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ValueError, match=message):
        training.strategy("multiworker")


@TENSORFLOW_ONLY
def test_a_taken_port_is_an_error_before_anything_waits(monkeypatch, port):
    cluster = {"worker": [f"127.0.0.1:{port}", "127.0.0.1:1"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0}}))
    with pytest.raises(OSError, match=rf"Port {port} of .* is taken by another process\. Name a free port"):
        training.strategy("multiworker")


@JAX_ONLY
@pytest.mark.parametrize(
    "values",
    [
        ("a:1", "2", None),
        ("a:1,b:1,c:1", "2", "0"),
        ("a:1", "2", "2"),
        ("a:1", "two", "0"),
        (None, "2", "0"),
    ],
)
def test_wrong_variables_are_an_error_before_anything_waits(values, monkeypatch):
    for name, value in zip((ADDRESSES, NUMBER, PROCESS), values, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"Several processes are named by three variables.*Received KERAS_DISTRIBU"):
        training.strategy("jax-data-parallel")


@JAX_ONLY
def test_a_coordinators_taken_port_is_an_error_before_anything_waits(monkeypatch, port):
    for name, value in zip((ADDRESSES, NUMBER, PROCESS), (f"127.0.0.1:{port}", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=rf"Port {port} of .* is taken by another process"):
        training.strategy("jax-data-parallel")


@JAX_ONLY
def test_what_jax_has_no_choice_of():
    for wrong in ({"synchronized": False}, {"jit_compile": False}):
        with pytest.raises(ValueError, match="On JAX normalization is over all replicas"):
            training.strategy("jax-data-parallel", **wrong)
    with pytest.raises(ValueError, match=r"model_shards is 2 or more and divides.*model_shards=1"):
        training.strategy("jax-model-parallel", model_shards=1)


def test_a_run_goes_on_with_as_many_devices_as_it_was_begun_with(tmp_path):
    runs.check_environment(tmp_path, Three().facts())
    runs.check_environment(tmp_path, Three().facts())
    with pytest.raises(ValueError, match=r"begun on other devices.*replicas=3 and received 1"):
        runs.check_environment(tmp_path)


def test_filled_up_batches_weigh_what_their_examples_do():
    import tensorflow as tf

    x, labels = np.arange(20.0, dtype="float32").reshape(10, 2), np.arange(10) % 3
    batches = padded(tf.data.Dataset.from_tensor_slices((x, labels)).batch(4), 10, 4)
    assert [tuple(each.shape) for each in batches.element_spec] == [(4, 2), (4,), (4,)]
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, kernel_initializer="random_normal")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=["accuracy"])
    expected = model.evaluate(x, labels, batch_size=10, verbose=0, return_dict=True)
    found = model.evaluate(batches, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)


@TENSORFLOW_ONLY
def test_normalization_and_spikes_are_told_of_the_strategy():
    for synchronized, jit_compile in ((True, True), (False, False)):
        devices = training.strategy("mirrored", synchronized=synchronized, jit_compile=jit_compile)
        model = devices.prepare(recipes.get("digits").build(10, (8, 8, 1)))
        norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        neurons = helpers.neuron_layers(model)
        assert {type(norm) for norm in norms} == {keras.layers.BatchNormalization, layers.BatchNormalization}
        assert {norm.synchronized for norm in norms} == {synchronized}
        assert {neuron.jit_compile for neuron in neurons} == {jit_compile}
        assert devices.jit_compile(True) is False


@TENSORFLOW_ONLY
@pytest.mark.parametrize("kind", [layers.IFSpike, layers.LIFSpike])
@pytest.mark.parametrize("loop", ["while", "unrolled"])
def test_spikes_compiled_by_themselves_are_the_same(kind, loop):
    x = np.random.default_rng(0).normal(0.5, 1.0, (4, 6, 5)).astype("float32")
    plain, compiled = (kind(threshold=0.7, loop=loop) for _ in range(2))
    compiled.jit_compile = True

    def run(layer):
        return helpers.value_and_grads(lambda x: (keras.ops.sum(layer(x) ** 2), layer(x)), x)

    (_, spikes, (gradient,)), (_, same, (same_gradient,)) = run(plain), run(compiled)
    assert 0 < (spikes != 0).mean() < 1
    np.testing.assert_array_equal(same, spikes)
    np.testing.assert_array_equal(same_gradient, gradient)


@TENSORFLOW_ONLY
def test_keras_still_has_what_several_workers_need():
    """If this fails, Keras has changed: look whether its `fit` works under MultiWorkerMirroredStrategy by itself (then
    `MultiWorkerModel` can go, and `test_replicas.py` tells), or make `MultiWorkerModel` override what is there now."""
    from keras_dsr.distribution.tensorflow import MultiWorkerModel

    stock = keras.Model._maybe_symbolic_build
    assert list(inspect.signature(stock).parameters) == ["self", "iterator", "data_batch"]
    assert MultiWorkerModel._maybe_symbolic_build is not stock
    assert "data_batch" in inspect.signature(keras.Model._symbolic_build).parameters
    # The two faults that it is there for.
    assert '"MEAN"' in inspect.getsource(stock)
    from keras.src.backend.tensorflow import trainer

    assert 'strategy.reduce("MEAN", v, axis=0)' in inspect.getsource(trainer.reduce_per_replica)


def test_a_mirrored_run_of_one_replica_is_one_devices(tmp_path):
    """All of a training on several devices but for the devices: stages, selection, evaluation, result."""
    recipe = dataclasses.replace(
        recipes.get("digits"),
        widths=(4,),
        timesteps=2,
        epochs=2,
        batch_size=16,
        train_examples=40,
        selection="best",
        hybrid_epochs=1,
    )
    name = "mirrored" if ON_TENSORFLOW else "jax-data-parallel"
    one = training.train(recipe, tmp_path / "one", verbose=0)
    two = training.train(recipe, tmp_path / "two", devices=training.strategy(name), verbose=0)
    assert two.test_accuracy == pytest.approx(one.test_accuracy, abs=1e-6)
    weights = [keras.models.load_model(tmp_path / run / "model.keras").get_weights() for run in ("one", "two")]
    for mine, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-4)
    (tmp_path / "two" / "summary.json").unlink()
    with pytest.raises(ValueError, match="begun on other devices"):
        training.train(recipe, tmp_path / "two", verbose=0)


def test_nan_is_found_on_several_devices():
    devices = training.strategy("mirrored" if ON_TENSORFLOW else "jax-data-parallel")
    with devices.scope():
        model = devices.prepare(keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="last")]))
        model.layers[0].bias.assign([0.0, np.nan, 0.0])
        callback = CheckFinite()
        callback.set_model(model)
        with pytest.raises(ValueError, match="Weights of layer 'last'"):
            callback.on_epoch_end(0)

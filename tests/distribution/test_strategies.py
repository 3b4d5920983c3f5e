"""What a strategy is asked for and what it answers, as far as one device and one process can tell."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import socket
import sys
import types

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import checkpoints, data, distribution, files, layers, recipes, runs, training
from keras_dsr.callbacks import CheckFinite
from keras_dsr.data.parts import batched, padded
from keras_dsr.distribution import base
from keras_dsr.export.functions import Network

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


def test_the_number_of_replicas_is_asserted(monkeypatch):
    name = "mirrored" if ON_TENSORFLOW else "jax-data-parallel"
    here = training.strategy(name).replicas
    assert here < 9
    if ON_TENSORFLOW:
        with pytest.raises(ValueError, match="9 CPU devices cannot be made any more"):
            training.strategy(name, replicas=9)
        # As where there are GPUs: TensorFlow takes those that it finds.
        monkeypatch.setattr("keras_dsr.distribution.tensorflow._local_devices", lambda replicas: None)
    with pytest.raises(ValueError, match=f"9 replicas were asked for, and there are {here}: "):
        training.strategy(name, replicas=9)


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
    # Of what runs, in whatever package it came.
    assert mine[helpers.BACKEND] == sys.modules[helpers.BACKEND].__version__
    assert ("jax" in mine) == (not ON_TENSORFLOW)
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


def test_what_fails_in_one_process_fails_in_all():
    def fail():
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        Three(1).everyone(fail)
    with pytest.raises(ValueError, match="Process 2 failed: OSError: no disk"):
        Three(0, ["", "", "OSError: no disk"]).everyone(lambda: 3)
    assert Three(1).everyone(lambda: 3) == 3


def test_a_file_that_the_chief_has_written_is_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("new")
    new = files.digest(path)
    path.write_text("old")

    def later(_):
        path.write_text("new")

    monkeypatch.setattr("time.sleep", later)
    assert Three(1, [new, "", new]).see(path)
    assert path.read_text() == "new"
    monkeypatch.undo()
    monkeypatch.setattr(base, "_SEEN_WITHIN_S", 0.0)
    with pytest.raises(FileNotFoundError, match=r"the same folder\. The chief has .*file, and process 2 has another"):
        Three(1, [new, "", "other"]).see(path)
    with pytest.raises(FileNotFoundError, match=r"The chief has .*file, and process 1 has none there"):
        Three(1, [new, "", new]).see(tmp_path / "nothing" / "file")
    with pytest.raises(FileNotFoundError, match=r"The chief has no .*file, and process 1 has one there"):
        Three(1, ["", "", ""]).see(path)
    assert not Three(1, ["", "", ""]).see(tmp_path / "nothing")


def test_processes_with_other_data_are_told():
    loaded = data.load("digits")
    devices = Three(1)
    assert training._load_everywhere(devices, lambda: loaded) is loaded
    other = dataclasses.replace(loaded, mean=(0.0,))
    fewer = loaded.with_training_examples(100)
    turned = dataclasses.replace(loaded, test=data.parts.ArrayPart(loaded.test.x, loaded.test.labels[::-1]))
    mine = training._about(loaded)
    assert mine == training._about(data.load("digits"))
    for different in (other, fewer, turned):
        assert training._about(different) != mine

    class Apart(Three):
        def agree(self, what, text):
            self._compare(what, [text, json.dumps(training._about(fewer)), text])

    with pytest.raises(ValueError, match=r"the same data set\. The chief has .*1293.*process 1 has .*100"):
        training._load_everywhere(Apart(), lambda: loaded)


def test_a_process_that_is_gone_at_once_is_told(monkeypatch):
    """It may be gone before the first thing that all do together has come to an end."""

    class Lost(Three):
        def check_versions(self):
            raise TimeoutError

        def lost(self, error):
            return isinstance(error, TimeoutError)

    engine = "tensorflow" if ON_TENSORFLOW else "jax"
    monkeypatch.setattr(f"keras_dsr.distribution.{engine}.make", lambda *_: Lost(), raising=True)
    with pytest.raises(ConnectionError, match="is gone"):
        training.strategy("tpu")


def test_whom_a_process_waits_for_is_told(capsys):
    base.tell_waiting(0, 1, ["a:1"])
    assert capsys.readouterr().err == ""
    base.tell_waiting(1, 3, ["a:1", "b:1", "c:1"])
    assert capsys.readouterr().err == "Process 1 of 3 waits for the others: a:1, c:1\n"
    base.tell_waiting(1, 2, ["a:1"])
    assert capsys.readouterr().err == "Process 1 of 2 waits for the others: a:1\n"


@JAX_ONLY
def test_processes_that_do_not_come_are_told(monkeypatch):
    def fail():
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    for name, value in zip((ADDRESSES, NUMBER, PROCESS), ("127.0.0.1:1234", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(keras.distribution, "initialize", fail)
    with pytest.raises(ConnectionError, match=r"The other 1 processes were not met at 127\.0\.0\.1:1234 in time"):
        training.strategy("jax-data-parallel")


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


@JAX_ONLY
def test_replicas_that_would_be_cut_in_halves_are_an_error(monkeypatch):
    import jax

    monkeypatch.setattr(keras.distribution, "list_devices", lambda: [f"cpu:{number}" for number in range(6)])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"Received 2 processes and 3 replicas \(6 devices, model_shards=2\)"):
        training.strategy("jax-model-parallel", model_shards=2)


def test_a_run_goes_on_with_as_many_devices_as_it_was_begun_with(tmp_path):
    runs.check_environment(tmp_path, Three().facts())
    runs.check_environment(tmp_path, Three().facts())
    with pytest.raises(ValueError, match=r"begun on other devices.*replicas=3 and received 1"):
        runs.check_environment(tmp_path)


def several(process):
    """One of 3 processes with 6 replicas, without the others."""
    if keras.backend.backend() == "tensorflow":
        from keras_dsr.distribution import tensorflow as engines

        engine = types.SimpleNamespace(
            num_replicas_in_sync=6, distribute_datasets_from_function=lambda make: make(None)
        )
        return engines._Distributed("multiworker", engine, True, "auto", 3, process)
    from keras_dsr.distribution import jax as engines

    engine = keras.distribution.DataParallel(auto_shard_dataset=False)
    devices = engines._Distributed("jax-data-parallel", engine)
    devices.replicas, devices.processes = 6, 3
    devices.engine = types.SimpleNamespace(data_shard_id=process)
    return devices


def test_processes_share_the_places_of_a_batch():
    import tensorflow as tf

    assert training.strategy().own(12) is None
    assert [several(process).own(12) for process in range(3)] == [range(4), range(4, 8), range(8, 12)]
    trained, evaluated = [], []
    for process in range(3):
        devices, seen = several(process), []

        def take(number, seen=seen):
            seen.append(number)
            return np.float32(number + 1), number

        def batches(count, drop_remainder, take=take, devices=devices):
            def one(number):
                x, label = tf.numpy_function(take, [number], (tf.float32, tf.int64))
                return tf.ensure_shape(x, ()), tf.ensure_shape(label, ())

            return batched(tf.data.Dataset.range(count), one, 12, drop_remainder, devices.own(12))

        for x, labels in devices.training_batches(batches(24, True), 12).as_numpy_iterator():
            np.testing.assert_array_equal(x, labels + 1)
            trained.extend(labels)
        # All that it has taken is its own, and all of that came.
        assert len(seen) == 8
        parts, steps = devices.evaluation_batches(batches(20, False), 20, 12)  # the last batch has 8
        assert steps == 2
        for x, labels, weights in parts.take(steps * (2 if helpers.BACKEND == "tensorflow" else 1)).as_numpy_iterator():
            np.testing.assert_array_equal(x[weights > 0], labels[weights > 0] + 1)
            evaluated.extend(labels[weights > 0])
    for size in (13, 2):
        with pytest.raises(ValueError, match=rf"evenly over 6 replicas\. Received batch_size={size}; set it to "):
            several(0).own(size)
        with pytest.raises(ValueError, match=rf"Received batch_size={size}"):
            several(0).training_batches(tf.data.Dataset.range(26).batch(size), size)
    assert sorted(trained) == list(range(24))
    assert sorted(evaluated) == list(range(20))


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
    for synchronized, jit_compile, told in ((True, True, True), (False, False, False), (True, "auto", None)):
        devices = training.strategy("mirrored", synchronized=synchronized, jit_compile=jit_compile)
        model = devices.prepare(recipes.get("digits").build(10, (8, 8, 1)))
        norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
        neurons = helpers.neuron_layers(model)
        assert {type(norm) for norm in norms} == {keras.layers.BatchNormalization, layers.BatchNormalization}
        assert {norm.synchronized for norm in norms} == {synchronized}
        assert {neuron.jit_compile for neuron in neurons} == {told}
        assert devices.jit_compile(True) is False


@TENSORFLOW_ONLY
def test_an_export_has_no_marks_of_a_strategy():
    model = recipes.get("digits").build(10, (8, 8, 1))
    assert Network(model).model is model
    devices = training.strategy("mirrored", jit_compile=True)
    prepared = devices.prepare(model)
    assert all(neuron.jit_compile for neuron in helpers.neuron_layers(prepared))
    network = Network(prepared)
    neurons = helpers.neuron_layers(network.model)
    assert len(neurons) == len(helpers.neuron_layers(prepared)) > 0
    assert not any(neuron.jit_compile for neuron in neurons)
    assert all(neuron.jit_compile for neuron in helpers.neuron_layers(prepared))  # the user's are as they were
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(network.model(x), prepared(x))


@TENSORFLOW_ONLY
def test_several_workers_need_a_model_with_a_graph():
    from keras_dsr.distribution.tensorflow import _MultiWorker

    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="is not a functional model"):
        _MultiWorker.prepare(object.__new__(_MultiWorker), Own())


def test_what_a_run_must_go_on_with(tmp_path):
    name = "mirrored" if ON_TENSORFLOW else "jax-data-parallel"
    facts = training.strategy(name).facts()
    assert (facts["strategy"], facts["processes"]) == (name, 1)
    if ON_TENSORFLOW:
        assert facts["synchronized"] is True
        other = training.strategy(name, synchronized=False).facts()
        with pytest.raises(ValueError, match="synchronized=True and received False"):
            runs.check_devices(tmp_path, facts, other)
    runs.check_devices(tmp_path, facts, training.strategy(name).facts())


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
    from keras.src.backend.tensorflow import trainer

    for faulty in (stock, trainer.reduce_per_replica):
        assert re.search(r"\.reduce\(\s*['\"]MEAN['\"]", inspect.getsource(faulty)), faulty


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
    told = checkpoints.progress(tmp_path / "two" / "checkpoint.npz")["devices"]
    assert told == training.strategy(name).facts()
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

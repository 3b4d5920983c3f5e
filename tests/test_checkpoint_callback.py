"""A `fit` that was killed goes on, with its callbacks, to the very weights of one that was not."""

from __future__ import annotations

import functools
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import killed_fit
import numpy as np
import pytest
from killed_fit import BATCH, EPOCHS, STEPS, arrays, compiled, data, dataset, network

from keras_dsr import checkpoints, distribution, runs
from keras_dsr.callbacks import CheckFinite, Checkpoint, FiringRate, SpikeHistograms, ThresholdHistory
from keras_dsr.callbacks import checkpoint as implementation

SCRIPT = Path(killed_fit.__file__)


class Killed(Exception):
    """What ends a `fit` here, with no chance to tidy up what is in the folder."""


class KillAt(keras.callbacks.Callback):
    """Ends a `fit` after a batch of an epoch; after the epoch if there is no batch."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.place = (epoch, batch)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.place:
            raise Killed

    def on_epoch_end(self, epoch, logs=None):
        if (epoch, None) == self.place:
            raise Killed


class Counter(keras.callbacks.Callback):
    """A callback of somebody's own, with all that a state may have in it."""

    def __init__(self):
        super().__init__()
        self.state = {"batches": [], "mean": np.zeros(2), "name": "counter", "best": None, "tests": 0}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def on_train_batch_end(self, batch, logs=None):
        self.state["batches"].append(batch)
        self.state["mean"] = self.state["mean"] * 0.5 + np.float32(logs["loss"])

    def on_test_batch_begin(self, batch, logs=None):
        self.state["tests"] += 1


def values(model):
    return {name: np.array(variable.value) for name, variable in checkpoints._variables(model).items()}


def same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))


class Batches(keras.utils.PyDataset):
    """Batches by number."""

    def __init__(self, x, y):
        super().__init__()  # on JAX several workers of Keras 3.15 do not keep the order
        self.x, self.y = x, y

    def __len__(self):
        return STEPS

    def __getitem__(self, number):
        part = slice(number * BATCH, (number + 1) * BATCH)
        return self.x[part], self.y[part]


def by_number(checkpoint):
    x, y, *validation = data()
    return {"x": Batches(x, y), "shuffle": False, "validation_data": tuple(validation)}


def shuffled(checkpoint):
    """One order, the same in each pass."""
    import tensorflow as tf

    x, y, *validation = data()
    batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=1, reshuffle_each_iteration=False)
    return {"x": batches.batch(BATCH), "shuffle": False, "validation_data": tuple(validation)}


def fit(
    folder, *beside, every=4, of=(), feed=arrays, epochs=EPOCHS, optimizer=None, steps=1, learning_rate=None, **changes
):
    """Trains a new model in a folder; gives it, and the history."""
    model = compiled(network(**changes), learning_rate, steps_per_execution=steps)
    if optimizer is not None:
        model.compile(optimizer, "sparse_categorical_crossentropy")
    checkpoint = Checkpoint(folder, every=every, callbacks=of)
    fed = feed(checkpoint)
    told = model.fit(
        **fed, epochs=epochs, initial_epoch=checkpoint.initial_epoch, callbacks=[checkpoint, *beside], verbose=0
    )
    return model, told


def kept():
    """Callbacks that decide what becomes of the weights, and some that only look on; the rate is halved on the way."""
    return [
        keras.callbacks.EarlyStopping("loss", patience=30, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=10.0, cooldown=1),
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        ThresholdHistory(every=1),
        Counter(),
    ]


@pytest.mark.parametrize(
    ("feed", "places"),
    [
        (arrays, [(0, 2), (0, 9), (1, None), (2, 11)]),
        (dataset, [(1, 6)]),
        (by_number, [(2, 9)]),
        (shuffled, [(1, 9)]),
    ],
    ids=["arrays", "data_set", "py_dataset", "tf_data"],
)
def test_a_fit_that_is_broken_off_anywhere_ends_as_one_that_was_not(feed, places, tmp_path):
    unbroken = kept()
    model, history = fit(tmp_path / "unbroken", of=unbroken, feed=feed, learning_rate=0.02)
    for place in places:
        with pytest.raises(Killed):
            fit(tmp_path / "broken", KillAt(*place), of=kept(), feed=feed, learning_rate=0.02)
    broken = kept()
    other, told = fit(tmp_path / "broken", of=broken, feed=feed, learning_rate=0.02)
    same(values(other), values(model))
    assert told.history == history.history
    assert told.epoch == history.epoch == list(range(EPOCHS))
    assert min(history.history["learning_rate"]) < 0.01  # it was reduced, and the reduction lasted
    same(broken[-1].state, unbroken[-1].state)
    assert broken[-1].state["batches"] == [*range(STEPS)] * EPOCHS
    assert broken[-2].history == unbroken[-2].history
    for name in ("best", "best_epoch", "wait"):
        assert getattr(broken[0], name) == getattr(unbroken[0], name)
    for mine, theirs in zip(broken[0].best_weights, unbroken[0].best_weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_schedule_goes_on_where_it_was(tmp_path):
    model, _ = fit(tmp_path / "unbroken")
    with pytest.raises(Killed):
        fit(tmp_path / "broken", KillAt(1, 9))
    checkpoint = Checkpoint(tmp_path / "broken")
    assert (checkpoint.initial_epoch, checkpoint.initial_batch) == (1, 8)
    other, _ = fit(tmp_path / "broken")
    same(values(other), values(model))
    assert int(other.optimizer.iterations.value) == EPOCHS * STEPS


def test_several_steps_at_once(tmp_path):
    model, _ = fit(tmp_path / "unbroken", every=5, epochs=2, steps=4)
    with pytest.raises(Killed):
        fit(tmp_path / "broken", KillAt(1, 11), every=5, epochs=2, steps=4)
    assert Checkpoint(tmp_path / "broken").initial_batch == 8
    with pytest.raises(ValueError, match=r"is 8 batches into epoch 1, and 9 could be left out.*steps_per_execution"):
        fit(tmp_path / "broken", every=5, epochs=2, steps=3)
    other, _ = fit(tmp_path / "broken", every=5, epochs=2, steps=4)
    same(values(other), values(model))


def unknown_length(checkpoint):
    """As `shuffled`, of which Keras does not know how many batches an epoch has."""
    fed = shuffled(checkpoint)
    return {**fed, "x": fed["x"].filter(lambda *_: True)}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize(("feed", "batch"), [(arrays, 10), (unknown_length, 15)], ids=["arrays", "unknown_length"])
def test_several_steps_at_once_that_do_not_divide_an_epoch(feed, batch, tmp_path):
    """12 batches in steps of 5, killed after the last, which Keras counts up to 15."""
    model, _ = fit(tmp_path / "unbroken", every=5, epochs=2, steps=5, feed=feed)
    with pytest.raises(Killed):
        fit(tmp_path / "broken", KillAt(0, 14), every=5, epochs=2, steps=5, feed=feed)
    checkpoint = Checkpoint(tmp_path / "broken")
    assert (checkpoint.initial_epoch, checkpoint.initial_batch) == (0, batch)
    other, _ = fit(tmp_path / "broken", every=5, epochs=2, steps=5, feed=feed)
    same(values(other), values(model))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("steps", [3, 5])
def test_an_epoch_of_unknown_length_that_ends_beyond_the_checkpoint_is_refused(steps, tmp_path):
    """5 batches in steps of 4, killed after the first 4; another number at once comes to the end and leaves out 5."""

    def five(checkpoint):
        fed = unknown_length(checkpoint)
        return {**fed, "x": fed["x"].take(5)}

    with pytest.raises(Killed):
        fit(tmp_path, KillAt(0, 3), epochs=1, steps=4, feed=five)
    assert Checkpoint(tmp_path).initial_batch == 4
    with pytest.raises(ValueError, match=r"is 4 batches into epoch 0, and 5 could be left out.*steps_per_execution"):
        fit(tmp_path, epochs=1, steps=steps, feed=five)


def test_an_error_as_batches_are_left_out_leaves_the_model_to_train(tmp_path):
    class Broken(Batches):
        def __getitem__(self, number):
            if number == 5:
                raise OSError("The disk is away")
            return super().__getitem__(number)

    expected, _ = fit(tmp_path / "unbroken", feed=by_number, epochs=2)
    with pytest.raises(Killed):
        fit(tmp_path / "broken", KillAt(1, 9), feed=by_number, epochs=2)
    model, checkpoint = compiled(network()), Checkpoint(tmp_path / "broken", every=4)
    assert (checkpoint.initial_epoch, checkpoint.initial_batch) == (1, 8)
    arguments = {"epochs": 2, "initial_epoch": 1, "callbacks": [checkpoint], "verbose": 0}
    x, y, *_ = data()
    with pytest.raises(Exception, match="The disk is away"):
        model.fit(Broken(x, y), shuffle=False, **arguments)
    model.fit(**by_number(checkpoint), **arguments)
    same(values(model), values(expected))


def test_a_training_in_bfloat16_goes_on_alike(tmp_path):
    """Weights, slots of the optimizer, and what a callback keeps of them."""
    keras.config.set_dtype_policy("bfloat16")

    def run(name, *beside):
        of = [keras.callbacks.EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True), Counter()]
        of[1].state["mean"] = np.zeros(2, "bfloat16")
        return *fit(tmp_path / name, *beside, of=of, epochs=2), of

    model, history, unbroken = run("unbroken")
    for place in ((0, 6), (1, 9)):
        with pytest.raises(Killed):
            run("broken", KillAt(*place))
    other, told, broken = run("broken")
    assert "bfloat16" in {value.dtype.name for value in values(model).values()}
    same(values(other), values(model))
    assert told.history == history.history
    same(broken[1].state, unbroken[1].state)
    assert broken[0].best_weights[0].dtype == unbroken[0].best_weights[0].dtype == "bfloat16"
    for mine, theirs in zip(broken[0].best_weights, unbroken[0].best_weights, strict=True):
        np.testing.assert_array_equal(mine, theirs)


class Broken(keras.callbacks.Callback):
    """A callback that stands beside a checkpoint and has an error, once."""

    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            self.batch = None
            raise OSError("The disk is away")


def test_an_error_of_another_callback_as_batches_are_left_out_leaves_the_model_to_train(tmp_path):
    """By the same callback, by a new one, and without any."""
    expected, _ = fit(tmp_path / "unbroken", epochs=2)
    with pytest.raises(Killed):
        fit(tmp_path / "broken", KillAt(1, 9), epochs=2)
    model, first = compiled(network()), Checkpoint(tmp_path / "broken", every=100)
    assert (first.initial_epoch, first.initial_batch) == (1, 8)

    def go_on(checkpoint, *beside):
        fed = {**arrays(checkpoint), "epochs": 2, "initial_epoch": 1, "callbacks": [checkpoint, *beside], "verbose": 0}
        model.fit(**fed)

    def break_off(checkpoint):
        with pytest.raises(OSError, match="The disk is away"):
            go_on(checkpoint, Broken(2))

    shutil.copytree(tmp_path / "broken", tmp_path / "copy")
    break_off(first)
    go_on(first)
    same(values(model), values(expected))
    break_off(Checkpoint(tmp_path / "copy", every=100))
    break_off(again := Checkpoint(tmp_path / "copy", every=100))
    go_on(again)
    same(values(model), values(expected))
    shutil.copyfile(tmp_path / "copy" / "previous.npz", tmp_path / "copy" / "checkpoint.npz")
    break_off(Checkpoint(tmp_path / "copy"))
    before = int(model.optimizer.iterations.value)
    model.fit(**arrays(None), verbose=0)
    assert int(model.optimizer.iterations.value) == before + STEPS


def test_weights_that_a_callback_swaps_are_swapped_back(tmp_path):
    def run(name, *beside):
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        return fit(tmp_path / name, *beside, of=[swap], optimizer=keras.optimizers.Adam(0.01, use_ema=True))

    model, _ = run("unbroken")
    for place in ((0, None), (1, 7)):
        with pytest.raises(Killed):
            run("broken", KillAt(*place))
    other, _ = run("broken")
    same(values(other), values(model))


@pytest.mark.parametrize("feed", [arrays, dataset])
def test_a_fit_that_came_to_its_end_is_not_gone_on_with(feed, tmp_path):
    first = Counter()
    model, history = fit(tmp_path, of=[first], feed=feed)
    again, last = fit(tmp_path, of=[second := Counter()], feed=feed)
    same(values(again), values(model))
    assert last.history == history.history
    assert len(second.state["batches"]) == EPOCHS * STEPS
    more = arrays if feed is arrays else functools.partial(dataset, epochs=EPOCHS + 1)
    longer, _ = fit(tmp_path, of=[third := Counter()], feed=more, epochs=EPOCHS + 1)
    assert len(third.state["batches"]) == (EPOCHS + 1) * STEPS
    assert int(longer.optimizer.iterations.value) == (EPOCHS + 1) * STEPS


@pytest.mark.parametrize("feed", [arrays, dataset])
def test_a_fit_that_was_stopped_stays_so(feed, tmp_path):
    def stop():
        return [keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)]

    model, history = fit(tmp_path, of=stop(), feed=feed)
    assert history.epoch == [0, 1]
    again, last = fit(tmp_path, of=stop(), feed=feed)
    same(values(again), values(model))
    assert last.epoch == [0, 1]


def test_one_checkpoint_serves_one_fit_after_another(tmp_path):
    model, _ = fit(tmp_path / "at_once")
    other = compiled(network())
    checkpoint = Checkpoint(tmp_path / "in_turn", every=4)
    for epochs in (1, EPOCHS):
        fed = arrays(checkpoint)
        other.fit(**fed, epochs=epochs, initial_epoch=checkpoint.initial_epoch, callbacks=[checkpoint], verbose=0)
    same(values(other), values(model))


def test_best_models_of_before_stay_the_best(tmp_path):
    def best(folder):
        return [keras.callbacks.ModelCheckpoint(folder / "best.keras", "loss", save_best_only=True, mode="max")]

    with pytest.raises(Killed):
        fit(tmp_path, KillAt(0), of=best(tmp_path))
    written = (tmp_path / "best.keras").read_bytes()
    _, history = fit(tmp_path, of=(of := best(tmp_path)))
    assert of[0].best == max(history.history["loss"]) == history.history["loss"][0]
    assert (tmp_path / "best.keras").read_bytes() == written


def test_keras_still_has_what_is_kept_of_its_callbacks(tmp_path):
    """If this fails, Keras has changed: look what they keep now, and change `keras_dsr.callbacks.checkpoint._KEPT`."""
    arguments = {
        keras.callbacks.ModelCheckpoint: (tmp_path / "a.keras",),
        keras.callbacks.CSVLogger: (tmp_path / "a.csv",),
        keras.callbacks.TensorBoard: (tmp_path,),
        keras.callbacks.LearningRateScheduler: (abs,),
        FiringRate: (np.ones((1, 2)),),
        SpikeHistograms: (tmp_path, np.ones((1, 2))),
    }
    changing = {"best": None, "wait": 0}
    for kind, names in implementation._KEPT.items():
        if kind in (keras.callbacks.TensorBoard, SpikeHistograms):
            pytest.importorskip("tensorboard")
        callback = kind(*arguments.get(kind, ()))
        callback.set_model(compiled(network()))
        if names:
            callback.on_train_begin()
        for name in names:
            assert hasattr(callback, name), f"{kind.__name__}.{name}"
        # What begins as these do and is not in the table may have to be.
        missing = {name for name in changing if name in vars(callback)} - set(names)
        assert not missing, f"{kind.__name__} has {missing}"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with a checkpoint within an epoch, and the one before."""
    folder = tmp_path_factory.mktemp("begun")
    keras.utils.set_random_seed(0)
    with pytest.raises(Killed):
        fit(folder, KillAt(1, 9), of=[ThresholdHistory(every=1)])
    return {name: (folder / name).read_bytes() for name in ("checkpoint.npz", "previous.npz")}


@pytest.fixture
def folder(begun, tmp_path):
    """A copy of it."""
    for name, content in begun.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_file_is_an_error_that_names_the_one_before(part, folder):
    path = folder / "checkpoint.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(
        ValueError, match=r"is not a checkpoint, or is damaged.*one before it is .*previous\.npz: remove"
    ):
        Checkpoint(folder, callbacks=[ThresholdHistory()])
    path.unlink()
    checkpoint = Checkpoint(folder, callbacks=[ThresholdHistory()])
    assert (checkpoint.initial_epoch, checkpoint.initial_batch) == (1, 4)
    other, _ = fit(folder, of=[ThresholdHistory()])
    model, _ = fit(folder / "unbroken", of=[ThresholdHistory()])
    same(values(other), values(model))


def test_a_write_that_fails_leaves_what_there_was(folder, monkeypatch):
    """And the same callback goes on from there, once there is space."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    history = ThresholdHistory(every=1)
    model, checkpoint = compiled(network()), Checkpoint(folder, every=4, callbacks=[history])

    def go_on():
        epoch = checkpoint.initial_epoch
        fed = {**arrays(checkpoint), "epochs": EPOCHS, "initial_epoch": epoch, "callbacks": [checkpoint]}
        return model.fit(**fed, verbose=0)

    def full(file, **arrays):
        file.write(b"the beginning")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        go_on()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (checkpoint.initial_epoch, checkpoint.initial_batch) == (1, 8)
    monkeypatch.undo()
    told = go_on()
    unbroken = ThresholdHistory(every=1)
    expected, history_of_all = fit(folder / "unbroken", of=[unbroken])
    same(values(model), values(expected))
    assert told.history == history_of_all.history
    assert history.history == unbroken.history


def test_a_kill_between_two_renames_leaves_the_one_before(folder, monkeypatch):
    replace = Path.replace

    def killed(self, target):
        if self.name.startswith("."):
            raise Killed
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Killed):
        fit(folder, of=[ThresholdHistory()])
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["previous.npz"]
    assert Checkpoint(folder, callbacks=[ThresholdHistory()]).initial_batch == 8


def test_what_killed_processes_left_of_a_file_is_removed(folder):
    for name in (".123-checkpoint.npz", ".123-other.npz", "other-checkpoint.npz"):
        (folder / name).write_bytes(b"the beginning")
    assert Checkpoint(folder, callbacks=[ThresholdHistory()]).initial_batch == 8
    left = {path.name for path in folder.iterdir()}
    assert left == {"checkpoint.npz", "previous.npz", ".123-other.npz", "other-checkpoint.npz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": 25}, r"is of another model.*Expected of Dense 'dense\w*' units=24 and received 25\. Go on"),
        ({"threshold": 0.9}, r"is of another model.*Expected of IFSpike 'if_spike' .*=1\.0 and received 0\.9"),
        ({"rate": 0.3}, r"is of another model.*Expected of Dropout 'dropout\w*' rate=0\.2 and received 0\.3"),
        ({"more": True}, r"is of another model.*Expected as layer \d+ .* and received Activation 'more'"),
        (
            {"dtype": "mixed_bfloat16"},
            r"is of another model.*Expected of \w+ '.*' dtype=float32 and received mixed_bfloat16",
        ),
        ({"learning_rate": 0.01}, r"is of another optimizer.*learning_rate\.class_name=.* and received None"),
        (
            {"learning_rate": keras.optimizers.schedules.CosineDecay(0.02, 60)},
            r"is of another optimizer.*learning_rate\.config\.initial_learning_rate=0\.01 and received 0\.02",
        ),
    ],
    ids=["shape", "threshold", "dropout", "layer", "precision", "no_schedule", "schedule"],
)
def test_another_model_or_optimizer_is_refused_and_left_alone(changes, message, folder):
    """And its callbacks have not begun, which may make files."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        fit(folder, of=[history := ThresholdHistory()], **changes)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not history.history


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, r"\d=\w+ 'accuracy' total \[\] and received None"),
        (("accuracy", "sparse_categorical_crossentropy"), r"\d=None and received SparseCategoricalCrossentropy total"),
        ((keras.metrics.SparseTopKCategoricalAccuracy(3, name="top"),), r"'accuracy' total.* received .* 'top' total"),
    ],
    ids=["none", "more", "others"],
)
def test_other_metrics_within_an_epoch_are_refused(metrics, message, folder):
    model, checkpoint = compiled(network(), metrics=metrics), Checkpoint(folder, callbacks=[ThresholdHistory()])
    with pytest.raises(ValueError, match=rf"is of another set of metrics.*Expected .*{message}"):
        model.fit(**arrays(checkpoint), epochs=2, initial_epoch=1, callbacks=[checkpoint], verbose=0)


def test_metrics_that_keras_numbers_are_the_same(tmp_path):
    """An epoch goes on with them as they stood."""

    class Hits(keras.metrics.SparseCategoricalAccuracy):
        def __init__(self):
            super().__init__(name=None)
            self.unnamed = self.add_variable((), "zeros")

    def go_on(name, *beside):
        checkpoint = Checkpoint(tmp_path / name, every=4)
        model = compiled(network(), metrics=[hits := Hits()])
        fed = {**arrays(checkpoint), "initial_epoch": checkpoint.initial_epoch, "callbacks": [checkpoint, *beside]}
        return hits.name, [*model.fit(**fed, epochs=1, verbose=0).history.values()]

    _, expected = go_on("unbroken")
    with pytest.raises(Killed):
        go_on("broken", KillAt(0, 5))
    name, found = go_on("broken")
    assert found == expected
    assert name.startswith("hits_")


def test_a_model_within_a_layer_that_keras_numbers_is_the_same(tmp_path):
    """Its config has names beside those called so."""

    def go_on(name, *beside, units=6):
        keras.utils.set_random_seed(3)
        inputs = keras.Input((8, 1))
        flat = keras.layers.Flatten()(inputs)
        hidden = keras.layers.Add()([keras.layers.Dense(units)(flat), keras.layers.Dense(units)(flat)])
        rows = keras.layers.TimeDistributed(keras.Model(inputs, hidden))
        parts = [keras.Input((8, 8, 1)), rows, keras.layers.Flatten(), keras.layers.Dense(10)]
        model, checkpoint = compiled(keras.Sequential(parts)), Checkpoint(tmp_path / name, every=4)
        fed = {**arrays(checkpoint), "initial_epoch": checkpoint.initial_epoch, "callbacks": [checkpoint, *beside]}
        model.fit(**fed, epochs=1, verbose=0)
        return model

    expected = go_on("unbroken")
    with pytest.raises(Killed):
        go_on("broken", KillAt(0, 5))
    with pytest.raises(ValueError, match=r"is of another model.*TimeDistributed.*units=6 and received 7"):
        go_on("broken", units=7)
    found = values(go_on("broken"))
    for name, value in values(expected).items():  # TensorFlow rounds two builds of this one in a process otherwise
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_layers_that_draw_their_seeds_go_on_with_those_of_the_file(tmp_path):
    """Nobody sets a seed here."""
    seeds = []

    def go_on(folder, *beside):
        moved, cropped = keras.layers.RandomTranslation(0.1, 0.1), keras.layers.RandomCrop(8, 8)
        seeds.append(cropped.get_config()["seed"])
        parts = [keras.Input((8, 8, 1)), moved, cropped, keras.layers.Flatten(), keras.layers.Dense(10)]
        model, checkpoint = compiled(keras.Sequential(parts)), Checkpoint(folder, every=4)
        fed = {**arrays(checkpoint), "initial_epoch": checkpoint.initial_epoch, "callbacks": [checkpoint, *beside]}
        model.fit(**fed, epochs=2, verbose=0)
        return model

    with pytest.raises(Killed):
        go_on(tmp_path / "one", KillAt(0, 5))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    same(values(go_on(tmp_path / "one")), values(go_on(tmp_path / "two")))
    assert len(set(seeds)) == 3


def test_other_data_is_refused(folder):
    def fewer(checkpoint):
        return {**arrays(checkpoint), "batch_size": 2 * BATCH}

    with pytest.raises(ValueError, match=r"of a training with 12 batches an epoch\. Received 6"):
        fit(folder, of=[ThresholdHistory()], feed=fewer)

    def ends(checkpoint):
        x, y, *_ = data()
        return {"x": ((x[:BATCH], y[:BATCH]) for _ in range(5)), "steps_per_epoch": STEPS, "shuffle": False}

    with pytest.warns(UserWarning, match="ran out of data"), pytest.raises(ValueError, match="5 could be left out"):
        fit(folder, of=[ThresholdHistory()], feed=ends)


@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_that_is_not_the_next_is_refused(epoch, folder):
    checkpoint = Checkpoint(folder, callbacks=[ThresholdHistory()])
    model = compiled(network())
    with pytest.raises(ValueError, match=rf"is gone on from with epoch 1\. Received {epoch}; call.*initial_epoch="):
        model.fit(**arrays(checkpoint), epochs=3, initial_epoch=epoch, callbacks=[checkpoint], verbose=0)


def test_an_epoch_is_refused_where_there_is_no_checkpoint_or_no_epoch_left(tmp_path):
    def begin(epoch, **more):
        model = compiled(network())
        checkpoint = Checkpoint(tmp_path, **more)
        model.fit(**arrays(checkpoint), epochs=6, initial_epoch=epoch, callbacks=[checkpoint], verbose=0)

    with pytest.raises(ValueError, match=r"There is no checkpoint in .*begins with epoch 0\. Received 5; call"):
        begin(5)
    stop = {"callbacks": [keras.callbacks.EarlyStopping("loss", baseline=0.0, patience=1)]}
    begin(0, **stop)
    with pytest.raises(ValueError, match=r"training that a callback ended: no epoch is left\. Received 1; call"):
        begin(1, **stop)


def test_other_places_versions_and_callbacks_are_refused(folder, monkeypatch):
    class Three(distribution.Strategy):
        name, replicas, devices = "three", 3, 3

    of = [ThresholdHistory()]
    with pytest.raises(ValueError, match=r"begun on other devices.*replicas=1 and received 3"):
        Checkpoint(folder, callbacks=of, devices=Three())
    with pytest.raises(ValueError, match=r"with the callbacks \['ThresholdHistory'\]\. Received \['CheckFinite'"):
        Checkpoint(folder, callbacks=[CheckFinite(), *of])
    backend = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]
    monkeypatch.setattr(runs.keras.backend, "backend", lambda: backend)
    with pytest.raises(ValueError, match=r"begun with the Keras backend.*set KERAS_BACKEND="):
        Checkpoint(folder, callbacks=of)
    monkeypatch.undo()
    versions = implementation.versions
    monkeypatch.setattr(implementation, "versions", lambda: {**versions(), "keras": "4.0.0"})
    with pytest.raises(ValueError, match=r"other versions of packages.*Expected keras=3\.\S+ and received 4\.0\.0\."):
        Checkpoint(folder, callbacks=of)
    monkeypatch.setattr(implementation, "versions", lambda: {**versions(), "python": "3.99"})
    assert Checkpoint(folder, callbacks=of).initial_epoch == 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"best": {1: 0.5}}, r"The state of Counter has dicts with texts as keys\. Received 1 in get_state"),
        ([(1, 2)], r"The state of Counter is of dicts, lists.*Received \(1, 2\), of tuple"),
        ({"seen": [{3}]}, r"The state of Counter is of dicts, lists.*Received \{3\}, of set"),
        (np.array([None]), r"The state of Counter has NumPy arrays of numbers or texts\. Received object"),
    ],
    ids=["keys", "tuple", "set", "objects"],
)
@pytest.mark.parametrize("chief", [True, False])
def test_a_state_that_would_not_come_back_is_refused_in_every_process(state, message, chief, tmp_path):
    counter = Counter()
    checkpoint = Checkpoint(tmp_path, callbacks=[counter], devices=distribution.Strategy())
    checkpoint.devices.process = int(not chief)
    model = compiled(network())
    model.history = keras.callbacks.History()
    checkpoint.set_model(model)
    checkpoint.set_params({"steps": 1})
    checkpoint.on_train_begin()
    checkpoint.on_epoch_begin(0)
    counter.state = state
    with pytest.raises(ValueError, match=message):
        checkpoint.on_epoch_end(0, {})
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_hand_is_refused(tmp_path):
    checkpoints.save(tmp_path / "checkpoint.npz", compiled(network()), {"rows": []})
    with pytest.raises(ValueError, match=r"is a checkpoint, but keras_dsr\.callbacks\.Checkpoint did not write it"):
        Checkpoint(tmp_path)


def test_bad_arguments(tmp_path):
    class Own(keras.callbacks.EarlyStopping):
        pass

    for arguments, message in (
        ({"every": "batch"}, r"every is 'epoch', or a number of batches\. Received every='batch'"),
        ({"every": 0}, "every is a whole number of at least 1"),
        ({"callbacks": [Own()]}, "What Own keeps would be lost.*get_state and set_state"),
        ({"callbacks": ["early"]}, r"callbacks are keras\.callbacks\.Callback\. Received 'early'"),
        ({"callbacks": [keras.callbacks.CSVLogger("a.csv")]}, r"CSVLogger would begin its file anew.*append=True"),
    ):
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path, **arguments)


def run(folder, kill_after=None, delay=0.0):
    """Runs the script; kills it so many steps on, and a moment. Where it began, and how many steps it told of."""
    command = [sys.executable, SCRIPT, folder]
    start, steps = None, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            for line in process.stdout:
                if line.startswith("FROM"):
                    start = tuple(map(int, line.split()[1:]))
                steps += line.startswith("STEP")
                if steps == kill_after:
                    time.sleep(delay)
                    process.kill()
                    break
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()
    assert process.returncode == (0 if kill_after is None else -signal.SIGKILL)
    return start, steps


def test_a_process_that_is_killed_twice_at_random_ends_as_one_that_was_not(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert run(unbroken) == ((0, 0), EPOCHS * STEPS)
    moments = random.SystemRandom()
    done = 0
    for _ in range(2):
        steps, delay = moments.randint(4, 12), moments.uniform(0, 0.05)
        print(f"killed {delay:.3f} s after {steps} steps")
        (epoch, batch), _ = run(broken, steps, delay)
        assert epoch * STEPS + batch >= done
        done = epoch * STEPS + batch + steps - 3
    start, steps = run(broken)
    assert start[0] * STEPS + start[1] >= done > 0
    assert steps == (EPOCHS - start[0]) * STEPS - start[1]
    assert {path.name for path in broken.iterdir()} == {"checkpoint.npz", "previous.npz", "end.npz"}
    with np.load(unbroken / "end.npz") as expected, np.load(broken / "end.npz") as found:
        same(dict(found), dict(expected))

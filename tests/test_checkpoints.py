"""A checkpoint gives back all that it was given, and says what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dsr import checkpoints, models
from keras_dsr.checkpoints import progress, restore, save
from keras_dsr.layers import IFSpike
from keras_dsr.optimizers import SGD

X = np.random.default_rng(0).normal(size=(24, 8, 8, 1)).astype("float32")
Y = np.arange(24) % 3


def network(timesteps=2, optimizer=None, widths=(4,), dropout=0.5):
    model = models.small_cnn(widths, IFSpike(threshold=1.0), timesteps=timesteps, classes=3, dropout=dropout)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 30)
    model.compile(
        SGD(schedule) if optimizer is None else optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def fit(model, epochs=1):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def all_values(model):
    return {name: np.array(variable.value) for name, variable in checkpoints._variables(model).items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A checkpoint of a model that trained for an epoch, and the model."""
    model = network()
    fit(model)
    path = tmp_path_factory.mktemp("first") / "checkpoint.npz"
    save(path, model, {"epoch": 1, "rows": [{"loss": 0.1, "name": "a"}]})
    return path, model


@pytest.fixture
def written(first, tmp_path):
    """A copy of that checkpoint, and the model with its values."""
    path, model = first
    restore(path, model)
    return Path(shutil.copy(path, tmp_path)), model


@pytest.mark.parametrize("make", [None, lambda: keras.optimizers.Adam(1e-3)], ids=["sgd", "adam"])
def test_a_fresh_model_gets_every_value_back_and_trains_on_alike(make, tmp_path):
    """Statistics of normalization, momenta, the number of steps and the state of dropout among them."""
    model = network(optimizer=make and make())
    fit(model)
    path = tmp_path / "checkpoint.npz"
    save(path, model, {})
    saved = all_values(model)
    fit(model)

    keras.utils.set_random_seed(99)
    other = network(optimizer=make and make())
    fit(other, epochs=2)
    restore(path, other)
    restored = all_values(other)
    assert list(restored) == list(saved)
    kinds = {name.rsplit("/", 1)[-1] for name in saved}
    assert {"kernel", "threshold", "gamma", "moving_mean", "moving_variance", "seed_generator_state"} <= kinds
    for name, value in saved.items():
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(restored[name], value, err_msg=name)
    fit(other)
    for name, value in all_values(model).items():
        np.testing.assert_array_equal(all_values(other)[name], value, err_msg=name)


def test_a_model_of_another_precision_gets_every_value():
    model = network()
    fit(model)
    keras.config.set_dtype_policy("mixed_bfloat16")
    other = network()
    checkpoints.copy(model, other)
    for name, value in all_values(model).items():
        np.testing.assert_array_equal(all_values(other)[name], value, err_msg=name)


def test_dtypes_that_files_of_numpy_do_not_know_come_back(tmp_path, monkeypatch):
    """Those of files that were written without their names, too."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, dtype="bfloat16")])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    saved = all_values(model)
    kept = {"best": [saved["model/0/kernel"]], "scalar": np.ones((), "bfloat16"), "small": np.ones(3, "float8_e5m2")}
    save(tmp_path / "named.npz", model, kept)
    monkeypatch.setattr(checkpoints, "_as_bytes", lambda arrays: arrays)
    kept_then = {name: kept[name] for name in ("best", "scalar")}
    save(tmp_path / "unnamed.npz", model, kept_then)
    for name, expected in (("named", kept), ("unnamed", kept_then)):
        for variable in model.variables:
            variable.assign(np.zeros(variable.shape))
        restore(tmp_path / f"{name}.npz", model)
        for key, value in all_values(model).items():
            assert value.dtype == saved[key].dtype
            np.testing.assert_array_equal(value, saved[key], err_msg=key)
        found = progress(tmp_path / f"{name}.npz")
        assert {key: np.asarray(value).dtype for key, value in found.items()} == {
            key: np.asarray(value).dtype for key, value in expected.items()
        }
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)


def test_a_model_that_never_trained_can_be_saved_and_restored(tmp_path, written):
    path, model = written
    fresh = network()
    save(tmp_path / "fresh.npz", fresh, {})
    restore(path, fresh)
    for name, value in all_values(model).items():
        np.testing.assert_array_equal(all_values(fresh)[name], value, err_msg=name)
    restore(tmp_path / "fresh.npz", model)
    assert int(model.optimizer.iterations.value) == 0


def test_progress_is_what_it_was(written):
    path, _ = written
    assert progress(path) == {"epoch": 1, "rows": [{"loss": 0.1, "name": "a"}]}


def test_metrics_are_not_in_it(written):
    path, model = written
    restore(path, model)
    assert len(np.load(path).files) == len(checkpoints._variables(model)) + 1
    counted = [name for name in np.load(path).files if name.rsplit("/", 1)[-1] in ("total", "count")]
    assert counted == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: network(widths=(5,)),
        lambda: network(widths=(4, 4)),
        lambda: network(dropout=0.0),
        lambda: network(optimizer=keras.optimizers.Adam(1e-3)),
        lambda: network(optimizer=keras.optimizers.SGD(0.1)),
    ],
    ids=["other_width", "more_layers", "no_dropout", "adam", "no_momentum"],
)
def test_another_model_or_optimizer_is_refused_and_left_alone(make, written):
    path, _ = written
    other = make()
    before = all_values(other)
    with pytest.raises(ValueError, match=r"checkpoint\.npz is the checkpoint of another model or optimizer.*differs"):
        restore(path, other)
    for name, value in all_values(other).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_its_name(part, written):
    path, model = written
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    for read in (lambda: progress(path), lambda: restore(path, model)):
        with pytest.raises(ValueError, match=r"checkpoint\.npz is not a checkpoint, or is damaged"):
            read()


def test_a_flipped_bit_is_noticed(written):
    path, model = written
    damaged = bytearray(path.read_bytes())
    place = damaged.index(np.asarray(model.get_layer("conv1").kernel.value).tobytes())
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.npz is not a checkpoint, or is damaged"):
        restore(path, model)


def test_other_files_are_refused_by_name(tmp_path, written):
    _, model = written
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npz").write_text("once upon a time")
    for name in ("array.npy", "arrays.npz", "objects.npy", "text.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a checkpoint"):
            restore(tmp_path / name, model)
    with pytest.raises(FileNotFoundError, match=r"missing\.npz"):
        restore(tmp_path / "missing.npz", model)


def test_a_write_that_fails_leaves_the_old_file_whole(written, monkeypatch):
    path, model = written
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"the beginning")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, model, {"epoch": 2})
    assert path.read_bytes() == before
    assert progress(path)["epoch"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_progress_that_json_cannot_hold_leaves_the_old_file_whole(written):
    path, model = written
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(path, model, {"when": object()})
    assert progress(path)["epoch"] == 1
    assert list(path.parent.iterdir()) == [path]


def test_what_else_the_process_made_does_not_matter(written):
    """Keras numbers seeds and unnamed layers by what there was before, which another process need not have had."""
    path, _ = written
    for _ in range(2):
        keras.layers.Dropout(0.5), keras.layers.Dense(3)
        restore(path, network())
    keras.backend.clear_session(free_memory=False)
    restore(path, network())

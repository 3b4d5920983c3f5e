"""Runs from the command line and back; runs that are stopped anywhere and go on to the very same weights."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys

import keras
import numpy as np
import pytest
from helpers import numpy
from PIL import Image

import keras_dsr
from keras_dsr import checkpoints, cli, layers, models, recipes, runs, training
from keras_dsr.data import images
from keras_dsr.recipes import Recipe

DIGITS = recipes.get("digits")
# JAX compiles each network for seconds: it gets the tests in which it could differ.
TENSORFLOW_ONLY = pytest.mark.tensorflow_only

# Two stages of two epochs of two steps, with dropout and augmentation.
TINY = dataclasses.replace(
    DIGITS,
    widths=(4,),
    timesteps=2,
    dropout=0.3,
    epochs=2,
    batch_size=16,
    train_examples=40,
    selection="best",
    hybrid_epochs=2,
    hybrid_learning_rate=0.05,
)


def history(folder):
    """The rows of a run's history, without what a clock said."""
    rows = csv.DictReader((folder / "history.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs and two time steps."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "digits", "--epochs", "2", "--timesteps", "2", "--runs", str(folder)]) == 0
    (folder,) = folder.iterdir()
    return folder


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """An unbroken run of `TINY`."""
    folder = tmp_path_factory.mktemp("hybrid") / "run"
    training.train(TINY, folder, verbose=0)
    return folder


def test_a_run_folder_holds_all_and_nothing_else(run):
    assert re.fullmatch(r"digits-\d{8}-\d{6}", run.name)
    assert sorted(file.name for file in run.iterdir()) == [
        "checkpoint.npz",
        "environment.json",
        "figure.png",
        "history.csv",
        "model.keras",
        "recipe.json",
        "summary.json",
    ]
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert runs.recipe_of(run) == dataclasses.replace(DIGITS, epochs=2, timesteps=2)
    assert json.loads((run / "environment.json").read_text())["backend"] == keras.backend.backend()


def test_the_history_has_a_row_an_epoch_and_a_column_a_threshold(run):
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert [(row["stage"], row["epoch"]) for row in rows] == [("spiking", "1"), ("spiking", "2")]
    model = keras.models.load_model(run / "model.keras")
    for layer in ("neuron1", "neuron2", "neuron3", "head_neuron"):
        last = float(rows[-1][f"threshold_{layer}"])
        assert last != 2.0
        assert last == float(np.asarray(model.get_layer(layer).threshold))
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    assert all(float(row["seconds"]) > 0 for row in rows)
    # A cosine from 2e-3 to 0: at its middle after the first epoch.
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-3, 0.0], abs=1e-6)


def test_the_summary_is_that_of_the_saved_model(run):
    summary = runs.summary_of(run)
    data = images.digits()
    x = np.concatenate([np.asarray(x) for x, _ in data.batches(data.test, 360)])
    logits = keras.models.load_model(run / "model.keras").predict(x, verbose=0)
    assert summary.test_accuracy == pytest.approx(np.mean(logits.argmax(-1) == data.test.labels))
    assert summary.test_examples == 360
    assert 0.5 < summary.test_accuracy <= 1
    assert summary.timesteps == 2
    assert all(0 < rate < 1 for rate in summary.firing_rates.values())
    rows = history(run)
    assert summary.validation_accuracy == float(rows[-1]["val_accuracy"])
    assert summary.epoch == 2
    assert summary.thresholds == {
        name: float(rows[-1][f"threshold_{name}"]) for name in ("neuron1", "neuron2", "neuron3", "head_neuron")
    }
    assert [(stage.name, stage.epochs, stage.calibrated_accuracy) for stage in summary.stages] == [("spiking", 2, None)]
    assert summary.seconds_saved is None


@TENSORFLOW_ONLY
def test_evaluate_finds_the_same(run, capsys):
    before = runs.summary_of(run)
    after = training.evaluate(run)
    assert after.test_accuracy == before.test_accuracy
    assert after.firing_rates == before.firing_rates
    assert cli.main(["evaluate", str(run)]) == 0
    assert f"{after.test_accuracy:.2%} of 360 examples" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(run, monkeypatch, capsys):
    files = {file.name: file.read_bytes() for file in run.iterdir()}
    monkeypatch.setattr(training, "_run_stage", None)
    assert cli.main(["resume", str(run)]) == 0
    assert f"{runs.summary_of(run).test_accuracy:.2%} of 360 examples" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in run.iterdir()} == files


@TENSORFLOW_ONLY
def test_a_representation_network_trains_too(tmp_path):
    settings = [f"--set={each}" for each in ("widths=4", "train_examples=40", "optimizer=sgd", "weight_decay=5e-4")]
    arguments = ["train", "digits", "--epochs", "1", "--timesteps", "0", "--seed", "3", "--runs", str(tmp_path)]
    assert cli.main([*arguments, *settings]) == 0
    (folder,) = tmp_path.iterdir()
    summary = runs.summary_of(folder)
    assert summary.firing_rates == {}
    assert [stage.name for stage in summary.stages] == ["representation"]
    assert runs.recipe_of(folder).seed == 3
    assert not (folder / "figure.png").exists()
    optimizer = keras.models.load_model(folder / "model.keras").optimizer
    assert type(optimizer) is keras_dsr.optimizers.SGD
    assert optimizer.coupled_weight_decay == 5e-4


@TENSORFLOW_ONLY
def test_events_train_from_a_recipe_file(tmp_path, capsys):
    recipe = dataclasses.replace(
        recipes.get("digits-events"), epochs=1, timesteps=2, train_examples=64, batch_size=32, threshold=0.5
    )
    (tmp_path / "mine.json").write_text(recipe.to_json())
    folder = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "mine.json"), "--folder", str(folder)]) == 0
    summary = runs.summary_of(folder)
    assert summary.timesteps == 2
    assert len(summary.firing_rates) == 5
    assert runs.recipe_of(folder) == recipe
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "Written to" in capsys.readouterr().out


def test_hybrid_training_goes_from_calibrated_thresholds_on_with_spikes(hybrid):
    summary = runs.summary_of(hybrid)
    rows = history(hybrid)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("representation", "1"),
        ("representation", "2"),
        ("spiking", "1"),
        ("spiking", "2"),
    ]
    first, last = summary.stages
    assert (first.name, first.timesteps, first.epochs) == ("representation", 0, 2)
    assert (last.name, last.timesteps, last.epochs) == ("spiking", 2, 2)
    assert first.calibrated_accuracy is None
    assert 0 <= last.calibrated_accuracy <= 1
    assert first.validation_accuracy == float(rows[1]["val_accuracy"])
    assert last.validation_accuracy == max(float(row["val_accuracy"]) for row in rows[2:])
    assert summary.seconds == pytest.approx(first.seconds + last.seconds)
    assert summary.seconds_saved == pytest.approx(2 * last.seconds / 2 - first.seconds)
    # From SGD at 0.05 to Adam at 2e-3, each along a cosine of its own.
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.025, 0.0, 1e-3, 0.0], abs=1e-6)
    assert (hybrid / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (hybrid / "best.npz").exists()


@TENSORFLOW_ONLY  # what JAX computes there is tested with the layers
def test_quantized_passes_come_between(tmp_path, monkeypatch):
    built = []
    build = Recipe.build

    def watched(self, *arguments):
        built.append(build(self, *arguments))
        return built[-1]

    monkeypatch.setattr(Recipe, "build", watched)
    summary = training.train(dataclasses.replace(TINY, hybrid_quantized_epochs=1, epochs=1), tmp_path, verbose=0)
    rows = history(tmp_path)
    assert [row["stage"] for row in rows] == ["representation", "representation", "quantized", "spiking"]
    assert [(stage.name, stage.timesteps, stage.epochs) for stage in summary.stages] == [
        ("representation", 0, 2),
        ("quantized", 0, 1),
        ("spiking", 2, 1),
    ]
    assert [stage.calibrated_accuracy is None for stage in summary.stages] == [True, True, False]
    first, quantized, *_, last = built
    assert first.get_layer("neuron1").representation_steps is None
    assert quantized.get_layer("neuron1").representation_steps == 2
    assert last.get_layer("neuron1").representation_steps is None
    saved = 3 * summary.stages[2].seconds - summary.stages[0].seconds - summary.stages[1].seconds
    assert summary.seconds_saved == pytest.approx(saved)
    # Thresholds are calibrated for the quantized passes, stay, and go on training with spikes.
    before, calibrated, after = (float(row["threshold_neuron1"]) for row in rows[1:4])
    assert before != calibrated != after
    assert [model.get_layer("neuron1").threshold.trainable for model in (first, quantized, last)] == [True, False, True]
    with pytest.raises(ValueError, match="hybrid_quantized_epochs"):
        training.train(TINY, tmp_path, verbose=0)


@TENSORFLOW_ONLY  # whether a variable trains is Keras' own on JAX too
def test_calibrated_thresholds_can_stay(tmp_path):
    recipe = dataclasses.replace(TINY, hybrid_train_threshold=False)
    training.train(recipe, tmp_path, verbose=0)
    rows = history(tmp_path)
    assert [row["stage"] for row in rows] == ["representation", "representation", "spiking", "spiking"]
    first, second, *spiking = (float(row["threshold_neuron1"]) for row in rows)
    assert first != second != spiking[0]
    assert spiking[0] == spiking[1]
    assert keras.models.load_model(tmp_path / "model.keras").get_layer("neuron1").threshold.trainable is False


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A recipe with quantized passes, and the folder of a run that nothing stopped."""
    recipe = dataclasses.replace(TINY, hybrid_epochs=1, hybrid_quantized_epochs=2, epochs=1)
    folder = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_resumes_nothing(patch)
        training.train(recipe, folder, verbose=0)
    return recipe, folder


@TENSORFLOW_ONLY
@pytest.mark.parametrize("number", [2, 3])
def test_a_run_that_was_stopped_around_quantized_passes_ends_as_if_it_had_not_been(
    number, tmp_path, monkeypatch, quick, quantized
):
    recipe, unbroken = quantized
    save, calls = checkpoints.save, []

    def stop(path, *arguments):
        save(path, *arguments)
        calls.append(path)
        if path.name == "checkpoint.npz" and len(calls) >= number:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            training.train(recipe, tmp_path, verbose=0)
    training.train(recipe, tmp_path, verbose=0)
    assert_equal_runs(tmp_path, unbroken)


def leave_out_what_resumes_nothing(monkeypatch):
    """Leaves out figures and firing rates, which have no part in what a run resumes."""
    monkeypatch.setattr(training, "_draw", lambda *arguments: None)
    monkeypatch.setattr(training, "_rates", lambda *arguments: {})


@pytest.fixture
def quick(monkeypatch):
    leave_out_what_resumes_nothing(monkeypatch)


class Stopped(BaseException):
    """What stops a run in these tests."""


def stop_at(monkeypatch, where, count):
    """Stops training at the `count`-th time that it comes to a place."""
    times = iter(range(1, 10**6))

    def stopping(function, before):
        def call(*arguments, **named):
            stop = next(times) == count
            if stop and before:
                raise Stopped
            result = function(*arguments, **named)
            if stop:
                raise Stopped
            return result

        return call

    owner, name, before = where
    monkeypatch.setattr(owner, name, stopping(getattr(owner, name), before))


AFTER_EPOCH = (training._Keeper, "on_epoch_end", False)
BEFORE_CHECKPOINT = (checkpoints, "save", True)
WITHIN_EPOCH = (training._Keeper, "on_train_batch_end", False)

# Checkpoints are written four times, and "best.npz" ahead of some in the second stage.
PLACES = {
    "within_the_first_stage": (AFTER_EPOCH, 1),
    "between_the_stages": (AFTER_EPOCH, 2),
    "before_the_first_checkpoint_of_the_second_stage": (BEFORE_CHECKPOINT, 4),
    "within_the_last_epoch": (WITHIN_EPOCH, 8),
}


def arrays(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files if name != "progress"}


def assert_equal_runs(one, other):
    assert history(one) == history(other)
    for name in ("checkpoint.npz", "best.npz"):
        assert (one / name).is_file() == (other / name).is_file()
        if (one / name).is_file():
            received, expected = arrays(one / name), arrays(other / name)
            assert received.keys() == expected.keys()
            for each, value in expected.items():
                np.testing.assert_array_equal(received[each], value, err_msg=f"{name}: {each}")
    received, expected = runs.summary_of(one), runs.summary_of(other)
    for name in ("test_accuracy", "validation_accuracy", "epoch", "thresholds"):
        assert getattr(received, name) == getattr(expected, name)


@pytest.mark.parametrize(
    "place",
    [pytest.param(place, marks=[] if place == "within_the_last_epoch" else TENSORFLOW_ONLY) for place in PLACES],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(place, hybrid, tmp_path, monkeypatch, quick):
    with monkeypatch.context() as patch:
        stop_at(patch, *PLACES[place])
        with pytest.raises(Stopped):
            training.train(TINY, tmp_path, verbose=0)
    assert not (tmp_path / "summary.json").exists()
    keras.layers.Dropout(0.5)  # names and seeds that the process has beside
    training.train(TINY, tmp_path, verbose=0)
    assert_equal_runs(tmp_path, hybrid)


@TENSORFLOW_ONLY
def test_the_history_is_whole_even_if_the_last_checkpoint_was_the_last_thing_done(tmp_path, monkeypatch, quick):
    recipe = dataclasses.replace(TINY, epochs=1, hybrid_epochs=0, selection="last")
    with monkeypatch.context() as patch:
        stop_at(patch, (checkpoints, "save", False), 1)
        with pytest.raises(Stopped):
            training.train(recipe, tmp_path, verbose=0)
    training.train(recipe, tmp_path, verbose=0)
    assert [row["epoch"] for row in history(tmp_path)] == ["1"]


@TENSORFLOW_ONLY
def test_the_best_epoch_or_the_last_is_the_result(tmp_path, monkeypatch, quick):
    """Of three epochs the second is best, by an accuracy that is made up; of equals it is the later one."""
    recipe = dataclasses.replace(TINY, epochs=4, hybrid_epochs=0)
    original = training._Keeper.on_epoch_end

    def made_up(self, epoch, logs=None):
        original(self, epoch, {**logs, "val_accuracy": (0.3, 0.7, 0.7, 0.5)[epoch]})

    monkeypatch.setattr(training._Keeper, "on_epoch_end", made_up)
    weights = {}
    for selection in ("best", "last"):
        folder = tmp_path / selection
        summary = training.train(dataclasses.replace(recipe, selection=selection), folder, verbose=0)
        assert summary.epoch == {"best": 3, "last": 4}[selection]
        assert summary.validation_accuracy == {"best": 0.7, "last": 0.5}[selection]
        assert (folder / "best.npz").exists() is (selection == "best")
        weights[selection] = keras.models.load_model(folder / "model.keras").get_weights()
    assert any((one != other).any() for one, other in zip(weights["best"], weights["last"], strict=True))
    assert checkpoints.progress(tmp_path / "best" / "best.npz") == {"epoch": 3}


@TENSORFLOW_ONLY
def test_calibration_may_be_all_that_there_is_of_the_second_stage(tmp_path, quick):
    recipe = dataclasses.replace(TINY, epochs=0, hybrid_epochs=1)
    summary = training.train(recipe, tmp_path, verbose=0)
    assert [stage.epochs for stage in summary.stages] == [1, 0]
    assert summary.validation_accuracy == summary.stages[1].calibrated_accuracy
    assert summary.epoch == 0
    assert summary.seconds_saved is None
    assert summary.timesteps == 2


@TENSORFLOW_ONLY
def test_training_in_bfloat16_gives_a_float32_network(tmp_path, monkeypatch, quick):
    """Every stage trains in bfloat16, what is kept and measured is float32, and the process is left as it was."""
    trained = []
    fit = keras.Model.fit

    def spy(self, *arguments, **named):
        trained.append({layer.compute_dtype for layer in self.layers if layer.weights})
        return fit(self, *arguments, **named)

    monkeypatch.setattr(keras.Model, "fit", spy)
    recipe = dataclasses.replace(TINY, precision="mixed_bfloat16", hybrid_quantized_epochs=1)
    summary = training.train(recipe, tmp_path, verbose=0)
    assert trained == [{"bfloat16"}] * 3
    assert keras.config.dtype_policy().name == "float32"

    model = keras.models.load_model(tmp_path / "model.keras")
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}
    with np.load(tmp_path / "best.npz") as best:
        kept = [best[name] for name in best.files if name.startswith("model/") and "seed" not in name]
    for received, expected in zip(model.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(received, expected)
    assert int(numpy(model.optimizer.iterations)) == 2 * summary.epoch  # and it can train on
    data = images.digits()
    x = np.concatenate([np.asarray(x) for x, _ in data.batches(data.test, 360)])
    logits = model.predict(x, verbose=0)
    assert summary.test_accuracy == pytest.approx(np.mean(logits.argmax(-1) == data.test.labels))


@TENSORFLOW_ONLY
def test_a_run_without_validation_has_no_such_accuracy(tmp_path, monkeypatch):
    loaded = images.digits()
    empty = dataclasses.replace(loaded, validation=type(loaded.train)(loaded.train.x[:0], loaded.train.labels[:0]))
    monkeypatch.setattr(training.data, "load", lambda *arguments, **named: empty)
    recipe = dataclasses.replace(TINY, validation=0, selection="last", epochs=0, hybrid_epochs=1)
    summary = training.train(recipe, tmp_path, verbose=0)
    assert summary.validation_accuracy is None
    assert [stage.validation_accuracy for stage in summary.stages] == [None, None]
    assert [stage.calibrated_accuracy for stage in summary.stages] == [None, None]
    assert (tmp_path / "figure.png").exists()


def test_another_recipe_is_not_trained_in_the_same_folder(hybrid):
    with pytest.raises(ValueError, match="epochs=2 and received 3"):
        training.train(dataclasses.replace(TINY, epochs=3), hybrid, verbose=0)


def test_a_recipe_decides_optimizer_and_schedule():
    model = models.small_cnn((2,), timesteps=0)
    training.compile_model(model, dataclasses.replace(TINY, optimizer="adam", weight_decay=0.0), steps=100)
    assert type(model.optimizer) is keras.optimizers.Adam
    recipe = dataclasses.replace(TINY, optimizer="sgd", weight_decay=0.01, momentum=0.8, learning_rate=0.5)
    training.compile_model(model, dataclasses.replace(recipe, warmup_steps=10), steps=100)
    optimizer = model.optimizer
    assert (type(optimizer), optimizer.momentum, optimizer.coupled_weight_decay) == (
        keras_dsr.optimizers.SGD,
        0.8,
        0.01,
    )
    schedule = optimizer._learning_rate
    rates = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.25, 0.0], abs=1e-6)
    training.compile_model(model, dataclasses.replace(recipe, warmup_steps=400), steps=100)
    schedule = model.optimizer._learning_rate
    assert float(schedule(20)) == pytest.approx(0.5)  # a fifth of all is the most


@pytest.fixture
def of_images(tmp_path):
    """A folder of images, and one of its test images, whose end is missing."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for name in ("bee", "cow"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype="uint8")
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.png")
    damaged = tmp_path / "val" / "cow" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    return tmp_path, damaged


def test_a_damaged_test_image_is_named_and_left_out_only_if_asked(of_images, tmp_path, capsys):
    folder, damaged = of_images
    settings = ["threshold=1", "widths=2", "batch_size=4", "timesteps=2", "hybrid_epochs=0", "train_examples=none"]
    train = ["train", "digits", "--epochs", "1", "--set", f"data=folder:{folder}", "--set", "selection=last"]
    train += [word for setting in settings for word in ("--set", setting)]
    assert cli.main([*train, "--folder", str(tmp_path / "one")]) == 1
    error = capsys.readouterr().err
    assert f"keras-dsr: {damaged}: the image cannot be read" in error
    assert "train anew with skip_corrupt=true" in error
    assert "Traceback" not in error
    with pytest.warns(UserWarning, match=re.escape(str(damaged))):
        assert cli.main([*train, "--set", "skip_corrupt=true", "--folder", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "summary.json").read_text())["test_examples"] == 5


def test_recordings_that_do_not_tell_their_sensor_train(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_DSR_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("bee", "cow"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            events = {"t": np.arange(40), "x": rng.integers(0, 9, 40), "y": rng.integers(0, 8, 40)}
            np.savez(tmp_path / "data" / name / f"{number}.npz", **events, p=rng.integers(0, 2, 40))
    settings = ["batch_size=4", "timesteps=2", "selection=last"]
    train = ["train", "digits-events", "--epochs", "1", "--set", f"data=events:{tmp_path / 'data'}"]
    train += [word for setting in settings for word in ("--set", setting)]
    assert cli.main([*train, "--folder", str(tmp_path / "one")]) == 1
    assert "in a recipe sensor=34,34" in capsys.readouterr().err
    assert cli.main([*train, "--set", "sensor=8,9", "--folder", str(tmp_path / "other")]) == 0
    assert keras.models.load_model(tmp_path / "other" / "model.keras").input_shape == (None, 2, 8, 9, 2)

    damaged = tmp_path / "data" / "cow" / "3.npz"
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert cli.main([*train, "--set", "sensor=8,9", "--folder", str(tmp_path / "third")]) == 1
    error = capsys.readouterr().err
    assert str(damaged) in error
    assert "train anew with skip_corrupt=true" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "There is no recipe 'nothing'. There are: digits"),
        (["train", "digit"], "Did you mean 'digits'"),
        (["train", "missing.json"], "No such file or directory: 'missing.json'"),
        (["train", "digits", "--epochs", "0"], "A recipe trains for 1 epoch or more"),
        (["train", "digits", "--timesteps", "-1"], "timesteps must be 0 or more"),
        (["train", "digits", "--epochs", "many"], "epochs is a whole number. Received epochs='many'"),
        (["train", "digits", "--set", "treshold=4"], "no setting 'treshold'. Did you mean 'threshold'"),
        (["train", "digits", "--set", "threshold"], "--set takes NAME=VALUE"),
        (["train", "digits", "--set", "neuron=relu"], "neuron is one of ('if', 'lif')"),
        (["train", "digits", "--set", "data=digit"], "Did you mean 'digits'"),
        (["train", "digits", "--set", "alpha=2"], "alpha=2.0"),
        (["train", "digits", "--set", "corner_width=-1"], "corner_width=-1.0"),
        (["train", "digits", "--set", "sensor=9"], "sensor is height and width, such as 32,32. Received sensor=(9,)"),
        (["train", "digits", "--set", "skip_corrupt=true"], "'digits' has no files of its own"),
        (["train", "cifar10-if", "--data-dir", "nowhere"], "nowhere"),
        (["resume", "no/such/run"], "is not the folder of a run"),
        (["evaluate", "no/such/run"], "is not the folder of a finished run"),
        (["recipes", "cifar10"], "Did you mean 'cifar10-if'"),
        (["compare", "one"], "two or more run folders. Received 1"),
        (["compare", "one", "two"], "one is not the folder of a run"),
    ],
)
def test_mistakes_end_with_a_message_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERAS_DSR_DATA", raising=False)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("keras-dsr: ")
    assert message in error
    assert "Traceback" not in error
    assert [path for path in tmp_path.rglob("*") if path != tmp_path / "runs"] == []


def test_recipes_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in recipes.RECIPES:
        assert name in listed
    assert re.search(
        r"cifar10-if +│ PreAct-ResNet-18 on CIFAR-10, IF, N = 20 +│ table2, figure3a, .* 95.24 ± 0.17 %", listed
    )


def test_a_recipe_is_printed_as_a_file_that_trains(capsys):
    assert cli.main(["recipes", "dvs-cifar10-lif"]) == 0
    assert recipes.Recipe.from_json(capsys.readouterr().out) == recipes.get("dvs-cifar10-lif")


def test_runs_are_compared(run, hybrid, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["compare", str(run), str(hybrid)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"widths +│ \(32, 64, 64\) +│ \(4,\)", shown)
    assert re.search(r"state +│ finished +│ finished", shown)
    assert f"{runs.summary_of(run).test_accuracy:.2%}" in shown


@TENSORFLOW_ONLY
def test_a_stopped_run_says_how_to_go_on_and_does(hybrid, tmp_path, monkeypatch, capsys, quick):
    (tmp_path / "tiny.json").write_text(TINY.to_json())
    folder = tmp_path / "run"
    arguments = ["train", str(tmp_path / "tiny.json"), "--folder", str(folder), "--verbose", "0"]
    with monkeypatch.context() as patch:
        stop_at(patch, AFTER_EPOCH, 3)
        with pytest.raises(Stopped):
            cli.main(arguments)
    assert f"go on with: keras-dsr resume {folder}" in capsys.readouterr().err
    assert cli.main(["train", str(tmp_path / "tiny.json"), "--folder", str(folder), "--set", "seed=1"]) == 1
    assert "seed=0 and received 1" in capsys.readouterr().err
    assert cli.main(["resume", str(folder), "--verbose", "0"]) == 0
    assert_equal_runs(folder, hybrid)
    one, other = (keras.models.load_model(each / "model.keras").get_weights() for each in (folder, hybrid))
    for received, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(received, expected)


@TENSORFLOW_ONLY
def test_a_run_that_never_began_leaves_no_folder_but_one_that_did_stays(tmp_path, monkeypatch, quick):
    arguments = ["train", "digits", "--epochs", "2", "--runs", str(tmp_path), "--verbose", "0"]
    small = ["--set", "widths=4", "--set", "train_examples=40", "--set", "timesteps=2"]
    for place, left in (((WITHIN_EPOCH, 1), 0), ((AFTER_EPOCH, 1), 1)):
        with monkeypatch.context() as patch:
            stop_at(patch, *place)
            with pytest.raises(Stopped):
                cli.main([*arguments, *small])
        assert len(list(tmp_path.iterdir())) == left


def test_ctrl_c_is_no_error(tmp_path, monkeypatch, capsys):
    def interrupted(recipe, folder, **named):
        runs.open_folder(recipe, folder)
        (folder / "checkpoint.npz").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert cli.main(["train", "digits", "--folder", str(tmp_path)]) == 130
    assert capsys.readouterr().err == f"keras-dsr: stopped; go on with: keras-dsr resume {tmp_path}\n"


def test_tensorboards_logs_need_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-dsr\[tensorboard\]'"):
        training.train(TINY, tmp_path / "run", tensorboard=True, verbose=0)
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", "digits", "--tensorboard", "--runs", str(tmp_path)]) == 1
    assert "keras-dsr[tensorboard]" in capsys.readouterr().err


@TENSORFLOW_ONLY
def test_tensorboards_logs_are_written_a_folder_a_stage(tmp_path, monkeypatch, quick):
    asked = []

    class Logs(keras.callbacks.Callback):
        def __init__(self, folder, **named):
            super().__init__()
            asked.append(folder.relative_to(tmp_path).as_posix())

    monkeypatch.setitem(sys.modules, "tensorboard", json)
    monkeypatch.setattr(keras.callbacks, "TensorBoard", Logs)
    training.train(dataclasses.replace(TINY, epochs=0, hybrid_epochs=1), tmp_path, tensorboard=True, verbose=0)
    assert asked == ["tensorboard/representation", "tensorboard/spiking"]


@pytest.mark.parametrize("timesteps", [0, 2])
def test_a_threshold_that_is_no_number_ends_training_with_its_layers_name(timesteps, tmp_path):
    recipe = dataclasses.replace(
        TINY, learning_rate=float("inf"), epochs=1, timesteps=timesteps, hybrid_epochs=0, selection="last"
    )
    with pytest.raises(ValueError, match=r"^The threshold of IFSpike '\w+' is no longer a finite number"):
        training.train(recipe, tmp_path, verbose=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.json", "recipe.json"]


def test_a_nan_in_the_data_ends_training_before_a_checkpoint(tmp_path, monkeypatch):
    loaded = images.digits()
    x = loaded.train.x.astype("float32")
    x[:] = np.nan
    poisoned = dataclasses.replace(loaded, train=type(loaded.train)(x, loaded.train.labels))
    monkeypatch.setattr(training.data, "load", lambda *arguments, **named: poisoned)
    with pytest.raises(ValueError, match="look for NaN in the data"):
        training.train(TINY, tmp_path, verbose=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.json", "recipe.json"]


def dense(**named):
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(2, name="first")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="second")(hidden))
    model.compile(keras.optimizers.SGD(**named), "mean_squared_error")
    return model


def fit(model, x, y):
    callbacks = [keras_dsr.callbacks.CheckFinite()]
    model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)


def test_weights_that_are_no_numbers_are_named_at_the_batch_where_the_loss_shows_it():
    x = np.ones((8, 3), "float32")
    with pytest.raises(
        ValueError, match=r"Weights of layer 'first' \(first/kernel\).* at batch 1\. Lower the learning"
    ):
        fit(dense(learning_rate=float("inf")), x, np.zeros((8, 1), "float32"))


def test_weights_that_are_no_numbers_after_the_last_batch_are_found_at_the_end_of_the_epoch():
    """The loss of that batch was still one."""
    model = dense(learning_rate=0.1)
    callback = keras_dsr.callbacks.CheckFinite()
    callback.set_model(model)
    callback.on_epoch_end(0)
    model.get_layer("second").kernel.assign(np.full((2, 1), np.inf))
    with pytest.raises(ValueError, match=r"Weights of layer 'second' \(second/kernel\).* at the end of epoch 3"):
        callback.on_epoch_end(2)
    with pytest.raises(ValueError, match="layer 'second'"):
        callback.on_train_batch_end(0, {"loss": float("nan")})


def test_the_callback_sees_the_weights_of_this_very_batch():
    """JAX keeps weights out of the model for as long as an epoch lasts, unless a callback asks for them."""
    seen = []

    class Look(keras_dsr.callbacks.CheckFinite):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, {"loss": float("nan")} if batch == 2 else logs)

        def _check_weights(self, when):
            seen.append((when, float(np.asarray(self.model.get_layer("second").bias.value)[0])))
            super()._check_weights(when)

    model = dense(learning_rate=0.25, momentum=0.0)
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    with pytest.raises(
        ValueError, match=r"not a finite number at batch 2, though all weights are: look for NaN in the"
    ):
        model.fit(np.zeros((8, 3)), np.ones((8, 1)), batch_size=2, shuffle=False, verbose=0, callbacks=[Look()])
    # The bias goes half the way to 1 in each step.
    assert seen == [("at batch 2", 0.875)]


def test_a_loss_that_is_no_number_beside_weights_that_are_points_to_the_data():
    model = dense(learning_rate=0.1)
    callback = keras_dsr.callbacks.CheckFinite()
    callback.set_model(model)
    for loss in (float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"at batch 7, though all weights are: look for NaN in the data, or for lab"
        ):
            callback.on_train_batch_end(7, {"loss": loss})
    callback.on_train_batch_end(7, {"loss": 1.0})
    callback.on_train_batch_end(7, None)


def test_weights_within_wrappers_are_named():
    synapse = layers.Synapse(keras.layers.Dense(2, name="inner"))
    model = keras.Sequential([keras.Input((3,)), layers.IFSpike(timesteps=2), synapse, layers.SpikeRep()])
    synapse.layer.kernel.assign(np.full((3, 2), np.nan))
    callback = keras_dsr.callbacks.CheckFinite()
    callback.set_model(model)
    with pytest.raises(ValueError, match=r"layer 'inner' \(.*inner_synapse/inner/kernel\)"):
        callback.on_epoch_end(0)

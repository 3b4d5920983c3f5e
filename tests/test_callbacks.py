"""What callbacks log is what the trained model does."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_dsr import analysis, callbacks, layers, models

NAMES = ("neuron1", "head_neuron")


def fit(*chosen, epochs=2):
    """Trains a small network; gives it, its history and its data."""
    model = models.small_cnn((3,), layers.IFSpike(threshold=0.5), timesteps=3, input_shape=(6, 6, 1))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(0.5, 1, (8, 6, 6, 1)).astype("float32")
    history = model.fit(x, np.arange(8), batch_size=4, epochs=epochs, verbose=0, callbacks=list(chosen)).history
    return model, history, x


def test_firing_rates_of_each_epoch():
    x = np.random.default_rng(1).normal(0.5, 1, (6, 6, 6, 1)).astype("float32")
    model, history, _ = fit(callbacks.FiringRate(x, batch_size=4))
    traced = analysis.trace(model, x)
    for name in NAMES:
        assert len(history[f"firing_rate_{name}"]) == 2
        assert history[f"firing_rate_{name}"][-1] == pytest.approx(traced.layers[name].firing_rate)
    spikes = sum(layer.spikes for layer in traced.layers.values())
    chances = sum(layer.counts.size * 6 for layer in traced.layers.values())
    assert history["firing_rate"][-1] == pytest.approx(spikes / chances)
    assert history["firing_rate"][0] != history["firing_rate"][1], "weights change in between"


def test_thresholds_of_each_epoch_and_batch():
    model, history, _ = fit(kept := callbacks.ThresholdHistory(), each := callbacks.ThresholdHistory(every=1))
    for name in NAMES:
        now = float(np.asarray(model.get_layer(name).threshold))
        assert kept.history[name][0] == 0.5
        assert kept.history[name][1:] == history[f"threshold_{name}"]
        assert kept.history[name][-1] == now
        assert len(each.history[name]) == 1 + 4
        assert each.history[name][0] == 0.5
        assert each.history[name][2::2] == kept.history[name][1:]


def test_histograms_are_written(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    x = np.random.default_rng(1).normal(0.5, 1, (4, 6, 6, 1)).astype("float32")
    model, _, _ = fit(callbacks.SpikeHistograms(tmp_path, x, every=2), epochs=3)
    found = event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    names = {f"{name}/{what}" for name in NAMES for what in ("current", "potential", "firing_rate", "threshold")}
    assert set(found.Tags()["tensors"]) == names
    (recorded,) = analysis.trace_batches(model, x)
    for name in NAMES:
        for what, count in (
            ("current", recorded[name].currents.size),
            ("firing_rate", recorded[name].spikes[0, 0].size),
        ):
            events = found.Tensors(f"{name}/{what}")
            assert [event.step for event in events] == [0, 2]
            histogram = keras.ops.convert_to_numpy(events[-1].tensor_proto.float_val or _content(events[-1]))
            assert np.reshape(histogram, (-1, 3))[:, 2].sum() == count


def _content(event):
    return np.frombuffer(event.tensor_proto.tensor_content, "float64")


def test_histograms_refuse_a_model_ahead_of_training(tmp_path):
    pytest.importorskip("tensorboard")
    inputs = keras.Input((3,))
    plain = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    plain.compile("sgd", "mse")
    histograms = callbacks.SpikeHistograms(tmp_path / "logs", np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match="has no spiking layers"):
        plain.fit(np.ones((2, 3)), np.zeros((2, 2)), verbose=0, callbacks=[histograms])
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("timesteps", [0, 2])
def test_thresholds_have_the_names_of_traces(timesteps):
    inner = models.small_cnn((2,), timesteps=timesteps, input_shape=(4, 4, 1), name="inner")
    inputs = keras.Input((4, 4, 1))
    outer = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    history = callbacks.ThresholdHistory()
    history.set_model(outer)
    history.on_train_begin()
    assert list(history.history) == [f"inner_{name}" for name in NAMES]
    if timesteps:
        assert list(history.history) == list(analysis.trace(outer, np.ones((1, 4, 4, 1), "float32")).layers)


def test_bad_input(tmp_path):
    x = np.ones((2, 6, 6, 1), "float32")
    for call, message in (
        (lambda: callbacks.FiringRate(x[:0]), r"at least one\. Received shape \(0, 6, 6, 1\)"),
        (lambda: callbacks.FiringRate(x, every=0), "every is a whole number of at least 1.*every=0"),
        (lambda: callbacks.ThresholdHistory(every=1.5), "every is a whole number.*1.5"),
        (lambda: callbacks.SpikeHistograms(tmp_path, x, every=0), "every is a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    inputs = keras.Input((6, 6, 1))
    plain = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    plain.compile("sgd", "mse")
    for callback in (callbacks.FiringRate(x), callbacks.ThresholdHistory()):
        with pytest.raises(ValueError, match="has no spiking layers"):
            plain.fit(x, np.zeros((2, 2)), verbose=0, callbacks=[callback])

"""Thresholds from activations, against NumPy's percentiles of what the neurons receive."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_dsr import layers, models
from keras_dsr.models import calibrate_thresholds
from keras_dsr.models.calibration import _Quantile

PERCENTILES = (0.5, 10.0, 50.0, 90.0, 99.0, 99.9)


def quantile_of(parts):
    found = _Quantile()
    for part in parts:
        found.add(part)
    return found


def check(found, numbers):
    """Each percentile is exact to one bin, and the maximum is exact."""
    largest = numbers.max()
    assert found.at(100) == largest
    for percentile in PERCENTILES:
        received = found.at(percentile)
        expected = np.quantile(numbers, percentile / 100, method="inverted_cdf")
        # No bin is wider than 1 / 4096 of the range; it is the upper end of the bin that comes out.
        assert expected <= received * (1 + 1e-6)
        assert received <= expected + largest / 4096 + 2.0**-32


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.floats(-25, 60)), min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_percentiles_of_a_stream_are_numpys_to_one_bin(parts, seed):
    """Ranges from 2^-25 to 2^60, growing and shrinking from batch to batch."""
    generator = np.random.default_rng(seed)
    arrays = [generator.uniform(0, 1, count).astype("float32") * np.float32(2.0**power) for count, power in parts]
    check(quantile_of(arrays), np.concatenate(arrays))


def test_percentiles_of_a_long_skewed_stream():
    generator = np.random.default_rng(0)
    arrays = [np.maximum(generator.lognormal(0.1 * n, 1, (50, 40)) - 1, 0).astype("float32") for n in range(20)]
    check(quantile_of(arrays), np.concatenate([array.ravel() for array in arrays]))


def test_order_does_not_matter():
    generator = np.random.default_rng(1)
    arrays = [generator.uniform(0, 2.0**n, 100).astype("float32") for n in range(10)]
    one, other = quantile_of(arrays), quantile_of(arrays[::-1])
    assert one.limit == other.limit
    np.testing.assert_array_equal(one.counts, other.counts)


def test_memory_does_not_grow_with_the_stream():
    found = _Quantile()
    for n in range(60):
        found.add(np.full(10, 2.0**n, "float32"))
    assert found.counts.nbytes == 8192 * 8
    assert found.counts.sum() == 600


@pytest.mark.parametrize("value", [0.0, 2.0**-30, 1.0, 7.0, 1e20])
def test_one_number_again_and_again(value):
    found = quantile_of([np.full(10, value, "float32")])
    for percentile in (1e-9, 50.0, 99.9, 100):
        assert found.at(percentile) == pytest.approx(value, rel=1 / 4096, abs=2.0**-32)


NEURONS = {
    "if": layers.IFSpike(threshold=1.0),
    "lif": layers.LIFSpike(threshold=0.3, tau=2.0, dt=0.25),
}
KIND = pytest.mark.parametrize("kind", NEURONS)


def trained(kind, timesteps=0, widths=(4, 6)):
    """A representation network whose weights are as after some training."""
    model = models.small_cnn(widths, NEURONS[kind], timesteps=timesteps, classes=3)
    generator = np.random.default_rng(0)
    for weight in model.weights:
        if weight.path.endswith(("beta", "moving_mean")):
            weight.assign(generator.normal(0, 0.3, weight.shape))
        elif weight.path.endswith(("gamma", "moving_variance")):
            weight.assign(generator.uniform(0.5, 1.5, weight.shape))
        elif weight.path.endswith("kernel"):
            weight.assign(generator.normal(0, 1, weight.shape) / np.sqrt(np.prod(weight.shape[:-1])))
    return model


def samples(count=50, shape=(8, 8, 1), seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


def received_by_neurons(model, x):
    """What each neuron layer receives in inference, by name; of streams the representation."""
    inputs = {}
    for layer in helpers.neuron_layers(model):
        given_ = layer.input
        inputs[layer.name] = given_[1] if isinstance(given_, (list, tuple)) else given_
    results = keras.Model(model.inputs, inputs).predict(x, verbose=0)
    return {name: np.asarray(results[name], "float64") for name in inputs}


def in_unit_of_threshold(kind, currents):
    """A threshold of V_th clamps max(r, 0) at V_th; of LIF neurons r / tau at V_th / dt."""
    if kind == "if":
        return np.maximum(currents, 0)
    return np.maximum(currents, 0) / NEURONS["lif"].tau * NEURONS["lif"].dt


@pytest.mark.parametrize("percentile", [60.0, 100.0])
@KIND
def test_thresholds_are_percentiles_of_the_activations(kind, percentile):
    """Of those beneath the thresholds before: each layer is looked at as the layers ahead of it were."""
    model = trained(kind)
    x = samples()
    before = {layer.name: float(numpy(layer.threshold)) for layer in helpers.neuron_layers(model)}
    currents = received_by_neurons(model, x)
    changed = calibrate_thresholds(model, [x[:20], x[20:40], x[40:]], percentile)
    assert list(changed) == ["neuron1", "neuron2", "head_neuron"]
    for layer in helpers.neuron_layers(model):
        activations = in_unit_of_threshold(kind, currents[layer.name])
        assert activations.max() > 0
        expected = max(np.quantile(activations, percentile / 100, method="inverted_cdf"), layer.threshold_lower_bound)
        was, now = changed[layer.name]
        assert was == before[layer.name]
        assert now == pytest.approx(expected, rel=1e-5, abs=activations.max() / 4096 if percentile < 100 else 0)
        assert float(numpy(layer.threshold)) == pytest.approx(now, rel=1e-6)


@KIND
def test_the_clamp_at_the_maximum_cuts_nothing_off(kind):
    """Beneath thresholds that were high enough, the network computes the same after a calibration to the maximum."""
    model = trained(kind)
    for layer in helpers.neuron_layers(model):
        layer.threshold.assign(1e4)
    x = samples()
    before = model.predict(x, verbose=0)
    changed = calibrate_thresholds(model, [x], percentile=100)
    assert all(now < 100 for _, now in changed.values())
    np.testing.assert_allclose(model.predict(x, verbose=0), before, rtol=1e-5, atol=1e-6)


@KIND
def test_a_second_calibration_changes_nothing(kind):
    model = trained(kind)
    for layer in helpers.neuron_layers(model):
        layer.threshold.assign(1e4)
    calibrate_thresholds(model, [samples()], percentile=100)
    for was, now in calibrate_thresholds(model, [samples()], percentile=100).values():
        assert now == pytest.approx(was, rel=1e-5)


def test_a_calibrated_network_spikes_like_its_representation():
    model = trained("if")
    x = samples()
    for layer in helpers.neuron_layers(model):
        layer.threshold.assign(1e4)
    calibrate_thresholds(model, [x], percentile=100)
    ann = model.predict(x, verbose=0)
    spiking = [models.with_timesteps(model, steps).predict(x, verbose=0) for steps in (8, 64)]
    errors = [np.abs(each - ann).mean() / np.abs(ann).mean() for each in spiking]
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.2


def test_other_weights_stay():
    model = trained("if")
    before = {weight.path: numpy(weight).copy() for weight in model.weights}
    calibrate_thresholds(model, [samples()])
    for weight in model.weights:
        assert weight.path.endswith("threshold") or (numpy(weight) == before[weight.path]).all()


def test_batches_come_as_arrays_or_with_labels_and_are_passed_over_once():
    x = samples(20)
    results = []
    for batches in (
        [x[:10], x[10:]],
        iter([(x[:10], np.zeros(10)), [x[10:], np.zeros(10)]]),
        (keras.ops.convert_to_tensor(part) for part in (x[:10], x[10:])),
    ):
        results.append(calibrate_thresholds(trained("if"), batches))
    assert results[0] == results[1] == results[2]


@KIND
def test_a_dead_layer_keeps_its_threshold(kind):
    model = trained(kind)
    model.get_layer("bn2").set_weights([np.zeros(6), np.full(6, -1.0), np.zeros(6), np.ones(6)])
    before = float(numpy(model.get_layer("neuron2").threshold))
    changed = calibrate_thresholds(model, [samples()])
    assert changed["neuron2"] == (before, before)
    assert changed["neuron1"][1] != changed["neuron1"][0]


def test_no_threshold_goes_below_its_bound():
    model = models.small_cnn((4,), layers.IFSpike(threshold=1.0, threshold_lower_bound=0.25), timesteps=0)
    model.get_layer("bn1").set_weights([np.full(4, 1e-3), np.zeros(4), np.zeros(4), np.ones(4)])
    assert calibrate_thresholds(model, [samples()])["neuron1"][1] == 0.25
    assert float(numpy(model.get_layer("neuron1").threshold)) == 0.25


def test_a_threshold_that_does_not_train_is_calibrated_too():
    neuron = layers.IFSpike(threshold=1.0, trainable_threshold=False)
    model = models.small_cnn((4,), neuron, timesteps=0)
    changed = calibrate_thresholds(model, [samples()])
    assert all(was == 1.0 != now for was, now in changed.values())


@pytest.mark.parametrize("kind", ["if", pytest.param("lif", marks=pytest.mark.tensorflow_only)])
def test_frames_of_events(kind):
    model = models.vgg(5, NEURONS[kind], input_shape=(3, 8, 8, 2), classes=3, timesteps=0)
    x = samples(6, (3, 8, 8, 2))
    currents = received_by_neurons(model, x)
    changed = calibrate_thresholds(model, [x], percentile=100)
    assert list(changed) == [layer.name for layer in helpers.neuron_layers(model)]
    for name, (_, now) in changed.items():
        largest = in_unit_of_threshold(kind, currents[name]).max()
        assert now == pytest.approx(max(largest, model.get_layer(name).threshold_lower_bound), rel=1e-5)
    spiking = models.vgg(5, NEURONS[kind], input_shape=(3, 8, 8, 2), classes=3)
    spiking.set_weights(model.get_weights())
    assert np.isfinite(spiking.predict(x, verbose=0)).all()


def test_a_sequential_model():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(5), layers.IFSpike(threshold=1.0, timesteps=0, name="only")]
    )
    x = samples(10, (4,))
    currents = received_by_neurons(model, x)["only"]
    changed = calibrate_thresholds(model, [x], percentile=100)
    assert changed == {"only": (1.0, pytest.approx(currents.max(), rel=1e-5))}


@pytest.mark.parametrize("percentile", [0, -1.0, 100.1, float("nan"), float("inf")])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ValueError, match=rf"percentile must be in \(0, 100\]. Received percentile={percentile}"):
        calibrate_thresholds(trained("if"), [samples()], percentile)


def test_a_model_with_time_steps_is_refused():
    with pytest.raises(ValueError, match=r"Model 'small_cnn' has time steps; .*with_timesteps\(model, 0\)"):
        calibrate_thresholds(trained("if", timesteps=4), [samples()])


def test_neurons_out_of_reach_are_refused():
    inputs = keras.Input((8, 8, 1))
    outer = keras.Model(inputs, trained("if")(inputs), name="outer")
    with pytest.raises(ValueError, match=r"Model 'outer' has 0 of its 3 neuron layers there"):
        calibrate_thresholds(outer, [samples()])
    plain = keras.Model(inputs, keras.layers.Flatten()(inputs), name="plain")
    with pytest.raises(ValueError, match=r"Model 'plain' has 0 of its 0 neuron layers there"):
        calibrate_thresholds(plain, [samples()])


@pytest.mark.parametrize("batches", [[], [np.zeros((0, 8, 8, 1), "float32")]], ids=["none", "empty"])
def test_nothing_to_calibrate_on_is_refused(batches):
    model = trained("if")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"nothing to calibrate on: received no batches"):
        calibrate_thresholds(model, batches)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_activations_that_are_no_numbers_are_refused(poison):
    model = trained("if")
    x = samples()
    x[3, 0, 0] = poison
    with pytest.raises(ValueError, match=r"activations that 'neuron1' receives are not all finite"):
        calibrate_thresholds(model, [x])
    assert float(numpy(model.get_layer("neuron1").threshold)) == 1.0

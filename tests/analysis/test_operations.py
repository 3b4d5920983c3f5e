"""Synaptic operations equal brute force: every connection of every spike, one by one."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest
from keras import layers as stock

from keras_dsr import analysis, layers, models
from keras_dsr.analysis import operations


def connections(layer, shape) -> np.ndarray:
    """The outputs that each input reaches, one input at a time: by a copy of the layer whose weights are all 1."""
    config = {**layer.get_config(), "name": f"{layer.name}_ones"}
    for name in ("kernel_initializer", "depthwise_initializer"):
        if name in config:
            config[name] = "ones"
    if "use_bias" in config:
        config["use_bias"] = False
    ones = type(layer).from_config(config)
    one_by_one = np.eye(int(np.prod(shape)), dtype="float32").reshape(-1, *shape)
    reached = helpers.numpy(ones(one_by_one)) != 0
    return reached.reshape(len(one_by_one), -1).sum(axis=1).reshape(shape)


LAYERS = {
    "dense": (stock.Dense(5), (3,)),
    "dense on channels": (stock.Dense(5), (2, 3)),
    "einsum": (stock.EinsumDense("abc,cd->abd", output_shape=(None, 5)), (2, 3)),
    "einsum heads": (stock.EinsumDense("ab,bcd->acd", output_shape=(2, 4)), (3,)),
    "conv1d": (stock.Conv1D(3, 3, strides=2, padding="same"), (7, 2)),
    "causal": (stock.Conv1D(3, 3, dilation_rate=2, padding="causal"), (7, 2)),
    "valid": (stock.Conv2D(3, (3, 2), strides=(2, 1)), (6, 5, 2)),
    "same": (stock.Conv2D(3, 3, padding="same"), (5, 4, 2)),
    "same, stride 2, even": (stock.Conv2D(3, 3, strides=2, padding="same"), (6, 6, 2)),
    "dilated": (stock.Conv2D(2, 3, dilation_rate=2, padding="same"), (6, 5, 2)),
    "groups": (stock.Conv2D(4, 3, groups=2, padding="same"), (4, 4, 4)),
    "conv3d": (stock.Conv3D(2, 2), (3, 3, 3, 2)),
    "transposed": (stock.Conv2DTranspose(3, 3, strides=2, padding="same"), (3, 4, 2)),
    "transposed, valid": (stock.Conv1DTranspose(3, 3, strides=2), (4, 2)),
    "depthwise": (stock.DepthwiseConv2D(3, depth_multiplier=2, padding="same"), (4, 4, 3)),
    "pool": (stock.AveragePooling2D(2), (5, 4, 2)),
    "pool, same": (stock.AveragePooling2D(3, strides=2, padding="same"), (5, 4, 2)),
    "global pool": (stock.GlobalAveragePooling2D(), (3, 3, 2)),
    "few bits": (layers.QuantizedConv2D(3, 3, padding="same"), (4, 4, 2)),
}
# JAX on a CPU has no convolution of groups.
SLOW_ON_JAX = {"groups", "conv3d"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.tensorflow_only if name in SLOW_ON_JAX else ()) for name in LAYERS]
)
def test_fan_out_is_what_each_input_reaches(name):
    layer, shape = LAYERS[name]
    found = operations.fan_out(layer, shape)
    assert found.shape == shape
    np.testing.assert_array_equal(found, connections(layer, shape))


def brute_force(values, layer):
    """Operations of a sample: each input that is not 0, at each step, each connection."""
    reach = connections(layer, values.shape[2:])
    steps = (step for sample in values for step in sample)
    return sum(int(reach[tuple(place)]) for step in steps for place in np.argwhere(step)) / len(values)


def network() -> keras.Model:
    """Spikes into a convolution, means of spikes into a dense layer in a Sequential, and a static stem."""
    inputs = keras.Input((6, 6, 2))
    x = stock.Conv2D(4, 3, padding="same", name="stem")(inputs)
    x = layers.IFSpike(threshold=0.3, timesteps=4, name="first")(x)
    x = layers.Synapse(stock.Conv2D(5, 3, strides=2, padding="same"), name="conv")(x)
    x = layers.IFSpike(threshold=0.3, name="second")(layers.BatchNormalization()(x))
    head = keras.Sequential([stock.AveragePooling2D(3, name="pool"), stock.Flatten(), stock.Dense(3, name="dense")])
    x = layers.Synapse(head, name="head")(x)
    return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.3, name="last")(x)))


def test_operations_are_those_of_brute_force():
    model = helpers.vary(network())
    x = np.random.default_rng(0).normal(size=(5, 6, 6, 2)).astype("float32")
    counted = analysis.count_operations(model, x, batch_size=2)
    trains = helpers.spike_trains(model, x)

    conv, dense = model.get_layer("conv").layer, model.get_layer("head").layer.layers[2]
    # Each spike in a window is one for the layer behind.
    pooled = (trains["second"] != 0).reshape(5, 4, 1, 3, 1, 3, 5).sum(axis=(3, 5)).reshape(5, 4, -1)
    reach = connections(dense, (5,))
    expected = {
        "conv": ("spikes", brute_force(trains["first"], conv)),
        "dense": ("spikes", sum(int(n) * int(reach[i]) for x in pooled for v in x for i, n in enumerate(v)) / 5),
    }
    stem = int(connections(model.get_layer("stem"), (6, 6, 2)).sum())
    found = {layer.name: (layer.fed_by, layer.operations) for layer in counted.layers}
    assert list(found) == ["stem", "conv", "dense"]
    assert found.pop("stem") == ("values", stem)
    assert found == {name: (fed_by, pytest.approx(number)) for name, (fed_by, number) in expected.items()}
    assert pooled.max() > 1
    assert counted.synops == pytest.approx(sum(number for _, number in expected.values()))
    assert counted.synops > 0
    assert counted.multiplications == stem
    assert counted.macs == stem + connections(conv, (6, 6, 4)).sum() + 5 * 3
    assert {n.name: (n.neurons, n.updates, n.leaky) for n in counted.neurons} == {
        "first": (144, 576, False),
        "second": (45, 180, False),
        "last": (3, 12, False),
    }
    assert counted.spikes == pytest.approx(sum((train != 0).sum() for train in trains.values()) / 5)
    assert {layer.name: layer.weights for layer in counted.layers}["conv"] == 3 * 3 * 4 * 5
    assert {layer.name: (layer.inputs, layer.outputs) for layer in counted.layers}["conv"] == (144, 45)
    assert counted.uncounted == ()


def test_leaky_neurons_shortcuts_padding_and_pools_ahead_of_neurons():
    inputs = keras.Input((5, 5, 2))
    lif = dict(threshold=0.02, dt=0.2)
    first = layers.LIFSpike(**lif, timesteps=3, name="first")(inputs)
    few_bits = layers.QuantizedConv2D(2, 3, padding="same")
    x = layers.Synapse(few_bits, name="few_bits")(layers.Dropout(0.5)(first))
    x = layers.LIFSpike(**lif, name="second")(layers.Add(name="add")([x, first]))
    strided = stock.Conv2D(2, 3, strides=2, name="strided")
    head = keras.Sequential([keras.Sequential([stock.ZeroPadding2D(1), strided]), layers.Scale(name="scaled")])
    x = layers.LIFSpike(**lif, name="third")(layers.Synapse(head, affine=True, name="head")(x))
    x = layers.Synapse(stock.AveragePooling2D(2, strides=1), name="pool")(x)
    model = keras.Model(inputs, layers.SpikeRep()(layers.LIFSpike(**lif, name="last")(x)))
    x = np.random.default_rng(0).normal(0.1, 0.2, (3, 5, 5, 2)).astype("float32")
    counted = analysis.count_operations(model, x)
    trains = helpers.spike_trains(model, x)
    same = stock.Conv2D(2, 3, strides=2, padding="same")
    expected = {
        "few_bits": brute_force(trains["first"], few_bits),
        "add": np.count_nonzero(trains["first"]) / 3,
        "strided": brute_force(trains["second"], same),  # pads 5 by 1 on each side
        "pool": brute_force(trains["third"], stock.AveragePooling2D(2, strides=1)),
    }
    found = {layer.name: layer for layer in counted.layers}
    assert {name: layer.operations for name, layer in found.items()} == pytest.approx(expected)
    assert {layer.fed_by for layer in counted.layers} == {"spikes"}
    assert found["strided"].connections == connections(same, (5, 5, 2)).sum()
    assert (found["add"].weights, found["add"].connections, found["pool"].weights) == (0, 50, 0)
    assert counted.macs == found["few_bits"].connections + found["strided"].connections
    assert counted.uncounted == ("scaled",)
    assert all(neuron.leaky for neuron in counted.neurons)


def head_of(*parts) -> keras.Model:
    inputs = keras.Input((4, 4, 2))
    x = layers.IFSpike(threshold=0.5, timesteps=3, name="first")(inputs)
    x = layers.Synapse(keras.Sequential(list(parts)), name="head")(x)
    return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike()(x)))


EQUAL = {
    "padding ahead of valid": (
        lambda: head_of(stock.ZeroPadding2D(1), stock.Conv2D(3, 3, name="last")),
        lambda: head_of(stock.Conv2D(3, 3, padding="same", name="last")),
    ),
    "a pool of all places": (
        lambda: head_of(stock.GlobalAveragePooling2D(), stock.Dense(3, name="last")),
        lambda: head_of(stock.AveragePooling2D(4), stock.Flatten(), stock.Dense(3, name="last")),
    ),
    "pools that fit": (
        lambda: head_of(stock.AveragePooling2D(2, padding="same"), stock.Flatten(), stock.Dense(3, name="last")),
        lambda: head_of(stock.AveragePooling2D(2), stock.Flatten(), stock.Dense(3, name="last")),
    ),
    # Of windows that are cut off at the border, spikes are counted too.
    "pools that are cut off": (
        lambda: head_of(stock.AveragePooling2D(3, padding="same"), stock.Flatten(), stock.Dense(3, name="last")),
        lambda: head_of(stock.AveragePooling2D(4), stock.Flatten(), stock.Dense(3, name="last")),
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_heads_that_do_the_same_count_the_same(name):
    x = np.random.default_rng(0).normal(0.3, 0.5, (3, 4, 4, 2)).astype("float32")
    one, other = (analysis.count_operations(build(), x).layers for build in EQUAL[name])
    assert len(one) == len(other) == 1
    assert one[0].fed_by == other[0].fed_by == "spikes"
    assert one[0].operations == pytest.approx(other[0].operations)
    assert one[0].operations > 0
    if "cut off" not in name:
        assert one[0].connections == other[0].connections


@pytest.mark.parametrize(
    ("make", "title"),
    [
        (stock.Flatten, "Flatten"),
        (lambda: stock.Reshape((4, 3)), "Reshape"),
        (lambda: stock.Permute((2, 1)), "Permute"),
        (lambda: stock.Conv1D(2, 2), "Conv1D"),
        (stock.GlobalAveragePooling1D, "GlobalAveragePooling1D"),
        (lambda: stock.EinsumDense("abc,bd->adc", output_shape=(2, 4)), "EinsumDense"),
    ],
)
def test_what_mixes_time_steps_is_refused(make, title):
    inputs = keras.Input((3, 4))
    x = layers.IFSpike(name="first")(inputs)
    x = make()(x)
    x = stock.Reshape((-1, 4))(x) if len(x.shape) == 2 else x
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(name="second")(x)))
    with pytest.raises(ValueError, match=rf"operations of {title} .* cannot be counted.*mixes them"):
        analysis.count_operations(model, np.ones((1, 3, 4), "float32"))


def test_whole_numbers_are_counted():
    model, x = head_of(stock.Flatten(), stock.Dense(3, name="last")), np.eye(4, dtype="uint8")[np.newaxis, ..., None]
    x = np.repeat(x, 2, axis=-1)
    counted = analysis.count_operations(model, x)
    assert counted.synops == 8 * 3 * 3  # eight ones, at each of three steps, to three neurons
    assert counted == analysis.count_operations(model, x.astype("float32"))


def test_frames_and_plain_tensors():
    inputs = keras.Input((3, 4))
    x = stock.TimeDistributed(stock.Dense(5, name="inner"), name="each")(inputs)
    x = layers.IFSpike(threshold=0.5, name="first")(x)
    x = layers.IFSpike(threshold=0.5, name="second")(stock.Dense(2, name="plain")(x))
    x = stock.EinsumDense("abc,cd->abd", output_shape=(None, 3), name="einsum")(x)
    x = layers.IFSpike(threshold=0.5, name="third")(x)
    model = keras.Model(inputs, layers.SpikeRep()(x))
    frames = np.random.default_rng(0).poisson(0.5, (6, 3, 4)).astype("float32")
    counted = {layer.name: layer for layer in analysis.count_operations(model, frames).layers}
    assert (counted["each"].fed_by, counted["each"].connections) == ("values", 20)
    assert counted["each"].operations == pytest.approx((frames != 0).sum() * 5 / 6)
    traced = analysis.trace(model, frames).layers
    assert counted["einsum"].operations == pytest.approx(traced["second"].spikes * 3 / 6)
    assert (counted["einsum"].connections, counted["einsum"].outputs) == (6, 3)
    fired = traced["first"].spikes
    assert fired > 0
    assert (counted["plain"].fed_by, counted["plain"].connections) == ("spikes", 10)
    assert counted["plain"].operations == pytest.approx(fired * 2 / 6)


@pytest.mark.tensorflow_only
def test_the_papers_networks_are_counted_whole():
    model = models.preact_resnet(20, layers.IFSpike(threshold=1.0), timesteps=2, input_shape=(8, 8, 3))
    counted = analysis.count_operations(model, np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32"))
    weights = sum(np.prod(w.shape) for w in model.trainable_weights if w.path.endswith("kernel"))
    assert sum(layer.weights for layer in counted.layers) == weights
    assert [layer.name for layer in counted.layers if layer.fed_by == "values"] == ["stem_conv"]
    assert len(counted.neurons) == 21
    assert counted.uncounted == ()


def test_what_cannot_be_counted_is_said():
    inputs = keras.Input((4, 4, 2))
    stream = layers.IFSpike(timesteps=2)(inputs)
    separable = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(stock.SeparableConv2D(3, 3))(stream)))
    x = np.ones((1, 4, 4, 2), "float32")
    with pytest.raises(ValueError, match=r"connections of SeparableConv2D .* cannot be counted"):
        analysis.count_operations(separable, x)
    scaled = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(layers.Scale(), affine=True, name="own")(stream)))
    assert analysis.count_operations(scaled, x).uncounted == ("own",)
    with pytest.raises(ValueError, match="has no spiking layers"):
        analysis.count_operations(keras.Model(inputs, stock.Dense(2)(inputs)), x)
    with pytest.raises(ValueError, match="received no samples"):
        analysis.count_operations(scaled, x[:0])

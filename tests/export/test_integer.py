"""Networks of whole numbers: what is in them, what they give in every form, and which networks cannot be such."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import numpy, vary

from keras_dsr import layers, models
from keras_dsr.layers.neurons import neurons_of
from keras_dsr.layers.quantized import quantize

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")
from keras_dsr.export import (  # noqa: E402
    Grid,
    OnnxRuntime,
    export_onnx,
    export_saved_model,
    integer,
    integer_copy,
    report_of,
    verify,
)

KERNELS = (keras.layers.Dense, keras.layers.Conv2D)


def resnet():
    """With identity and other shortcuts, normalizations behind sums, and a pool between neurons."""
    keras.utils.set_random_seed(0)
    model = models.preact_resnet(20, layers.IFSpike(threshold=0.7), timesteps=3, input_shape=(8, 8, 3))
    return model, {}, np.random.default_rng(5).normal(size=(6, 8, 8, 3)).astype("float32")


def bare():
    """Neurons right behind kernels, with and without bias, and right behind the input."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 2), name="image")
    x = layers.IFSpike(timesteps=4, threshold=0.9, name="first")(inputs)
    x = layers.Synapse(keras.layers.Conv2D(4, 3, name="conv1"))(x)
    x = layers.IFSpike(threshold=0.3, alpha=0.7, name="second")(x)
    x = layers.Synapse(keras.layers.AveragePooling2D(2, name="pool"))(x)
    x = layers.Synapse(keras.layers.Conv2D(5, 2, use_bias=False, name="conv2"))(x)
    x = layers.IFSpike(threshold=0.3, name="third")(x)
    x = layers.Synapse(keras.layers.Dense(3, name="dense"))(layers.Synapse(keras.layers.Flatten(name="flat"))(x))
    model = keras.Model(inputs, layers.SpikeRep(name="logits")(layers.IFSpike(threshold=0.4, name="last")(x)))
    model.get_layer("conv1_synapse").layer.bias.assign(np.random.default_rng(1).normal(0, 0.1, 4))
    return model, {}, np.random.default_rng(6).normal(size=(6, 8, 8, 2)).astype("float32")


OWN = {"resnet": resnet, "bare": bare}
NETWORKS = ("small_if", "vgg5", "frames", *OWN)
# Convolutions of spikes, which become QLinearConv: all but those of inputs.
CONVOLUTIONS = {"small_if": 1, "vgg5": 3, "frames": 0, "resnet": 20, "bare": 2}


@pytest.fixture(scope="module")
def copy_of(build):
    """By name: a network, its copy of whole numbers, the settings of its export, and inputs as clients send them."""
    done = {}

    def make(name):
        if name not in done:
            model, settings, x = OWN[name]() if name in OWN else build(name)
            model = vary(model)
            prepared = np.asarray(settings.get("preprocessing", np.asarray)(x))
            done[name] = model, integer_copy(model, Grid.of(prepared)), settings, x
        return done[name]

    return make


@pytest.fixture(scope="module")
def file_of(copy_of, tmp_path_factory):
    """The ONNX file of a copy, proven on its inputs."""
    done = {}

    def make(name, **changes):
        key = (name, *changes.items())
        if key not in done:
            _, copy, settings, x = copy_of(name)
            path = tmp_path_factory.mktemp("integer") / f"{name}.onnx"
            done[key] = export_onnx(copy, path, examples=x, flip_budget=0, **settings, **changes)
        return done[key]

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_all_is_whole_numbers_between_neurons(name, copy_of, monkeypatch):
    """What kernels take, weights, sums, currents and thresholds, as the copy computes with them."""
    _, copy, settings, x = copy_of(name)
    prepared = np.asarray(settings.get("preprocessing", np.asarray)(x))
    seen = {}
    for layer in copy._flatten_layers():
        if isinstance(layer, (*KERNELS, layers.Requantize)):

            def call(inputs, layer=layer, before=layer.call):
                seen[layer.name] = layer, numpy(inputs), numpy(before(inputs))
                return seen[layer.name][2]

            monkeypatch.setattr(layer, "call", call)
    copy(prepared)
    kernels = 0
    for layer, taken, given in seen.values():
        if isinstance(layer, layers.Requantize):
            whole = given / layer.step
            assert np.array_equal(whole, np.rint(whole))
            assert layer.limits[0] <= whole.min() <= whole.max() <= layer.limits[1]
            assert np.unique(given).size > 2
            continue
        assert not layer.use_bias
        if "stem" in layer.name or (layer.name == "conv1" and name == "small_if"):
            continue  # static
        kernels += 1
        unit = 1.0 if taken.max() == np.rint(taken.max()) and (taken % 1 == 0).all() else 0.25
        unit = max(unit, np.abs(taken)[taken != 0].min())
        whole = layer.kernel.numpy() * unit
        assert np.array_equal(whole, np.rint(whole))
        assert 64 <= np.abs(whole).max() <= 127
        assert np.array_equal(given, np.rint(given))
    assert kernels >= CONVOLUTIONS[name] + 1  # the dense layer
    for neuron in neurons_of(copy):
        assert np.log2(float(neuron.threshold)) in integer._RESOLUTIONS


@pytest.mark.parametrize("name", NETWORKS)
def test_firing_rates_stay_about_what_they_were(name, copy_of):
    from keras_dsr.analysis import firing

    model, copy, settings, x = copy_of(name)
    prepared = np.asarray(settings.get("preprocessing", np.asarray)(x))
    before, after = (firing.firing_rates(each, [(prepared, None)]) for each in (model, copy))
    assert list(before) == list(after)
    assert all(0 < rate < 1 for rate in list(after.values())[:1])
    for layer, rate in before.items():
        assert after[layer] == pytest.approx(rate, rel=0.25, abs=0.02), layer


@pytest.mark.parametrize("name", NETWORKS)
def test_not_one_spike_differs(name, file_of, copy_of, tmp_path):
    """ONNX Runtime with whole numbers, and the SavedModel, against Keras."""
    path = file_of(name)
    (row,) = (row for row in report_of(path).rows if row.required)
    assert (row.bit_equal, row.flipped) == (True, 0)
    assert row.spikes > 0
    _, copy, settings, x = copy_of(name)
    if name in ("small_if", "bare"):
        version = export_saved_model(copy, tmp_path / "saved", examples=x, flip_budget=0, **settings)
        assert report_of(version).passed


@pytest.mark.parametrize("name", NETWORKS)
def test_convolutions_of_spikes_are_of_whole_numbers_in_the_file(name, file_of):
    graph = onnx.load(file_of(name)).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QLinearConv") == CONVOLUTIONS[name]
    types = {x.name: x.data_type for x in graph.initializer}
    for node in graph.node:
        if node.op_type == "QLinearConv":
            assert types[node.input[3]] == onnx.TensorProto.INT8
            assert types[node.input[8]] == onnx.TensorProto.INT32
    # Of the tensors that are split into steps none is in floats, but for a current that has no kernel.
    if name == "resnet":
        made = {output: node.op_type for node in graph.node for output in node.output}
        assert {made[node.input[0]] for node in graph.node if node.op_type == "Split"} <= {
            "QLinearConv",
            "ReduceMean",
            "MatMul",
            "Round",
        }


@pytest.mark.parametrize("form", ["unrolled", "step"])
@pytest.mark.parametrize("integers", [True, False])
def test_integers_are_a_matter_of_the_file_alone(form, integers, file_of):
    """The same spikes and answers with and without them; floats run in OpenVINO too."""
    path = file_of("resnet", form=form, integers=integers)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QLinearConv") == (20 if integers else 0)
    report = report_of(path)
    assert all(row.flipped == 0 for row in report.rows if row.required or not integers)


def test_folded_thresholds_change_nothing(file_of, copy_of):
    _, _, _, x = copy_of("bare")
    answers = [OnnxRuntime(file_of("bare", **changes)).run({"image": x}) for changes in ({}, {"fold_thresholds": True})]
    np.testing.assert_array_equal(answers[0]["logits"], answers[1]["logits"])
    assert [node.op_type for node in onnx.load(file_of("bare", fold_thresholds=True)).graph.node].count(
        "QLinearConv"
    ) == CONVOLUTIONS["bare"]


def test_a_loop_stays_in_floats(file_of):
    path = file_of("resnet", form="loop")
    assert not [node for node in onnx.load(path).graph.node if node.op_type == "QLinearConv"]


def test_any_batch_size(file_of, copy_of):
    _, copy, _, x = copy_of("resnet")
    runtime = OnnxRuntime(file_of("resnet"))
    for batch in (1, 2, 5):
        np.testing.assert_array_equal(
            runtime.run({"image": x[:batch]})["logits"], copy.predict(x[:batch], verbose=0, batch_size=batch)
        )


def test_currents_by_hand():
    """One neuron layer behind one kernel: every number of it."""
    inputs = keras.Input((1, 1, 2), name="image")
    x = layers.IFSpike(timesteps=2, threshold=1.0, name="first")(inputs)
    x = layers.Synapse(keras.layers.Conv2D(1, 1, name="conv"))(x)
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.5, name="second")(x)))
    model.get_layer("conv_synapse").layer.set_weights([np.array([0.5, -0.25]).reshape(1, 1, 2, 1), np.array([0.125])])
    copy = integer_copy(model, Grid(1 / 8, 2.0))
    weights = {layer.name: layer.get_weights() for layer in copy._flatten_layers() if layer.weights}
    steps = float(copy.get_layer("second").threshold)
    # A unit of the current is 0.5 / steps; the largest weight, 0.5, is `steps` units, or 127 steps of the kernel.
    np.testing.assert_array_equal(
        weights["conv"][0].ravel() * 2 ** np.log2(copy.get_layer("first").threshold), [127, -64]
    )
    scale, bias = weights["conv_requantize"]
    assert scale == pytest.approx(steps / 127, rel=1e-6)
    assert bias == np.rint(0.125 / 0.5 * steps / scale)
    # The first input is 1 and fires in both steps, the second does not: 0.5 + 0.125 a step, more than V_th = 0.5.
    assert copy.predict(np.array([[[[1.0, 0.0]]]]), verbose=0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("mean", "deviation", "limit"),
    [(0.0, 1.0, 1.0), (0.5, 2.0, 3.0), (-4.0, 0.5, 3.0), (2.0, 0.0, 1.5), (100.0, 1.0, 10.0), (0.0, 1.0, 60.0)],
)
def test_mean_square_of_what_clipping_takes_off(mean, deviation, limit):
    x = np.random.default_rng(0).normal(mean, deviation, 400_000)
    expected = np.mean((x - np.clip(x, -limit, limit)) ** 2)
    assert integer._clipped(np.array([mean]), np.array([deviation]), limit)[0] == pytest.approx(
        expected, rel=0.03, abs=1e-6
    )


def normalized(gamma, beta, mean, variance, scale=True, center=True):
    """Two kernels and spikes that add up to a normalized current; all of it by hand in `currents`."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((4, 4, 3))
    spikes = layers.IFSpike(timesteps=5, threshold=1.0, name="first")(inputs)
    parts = [layers.Synapse(keras.layers.Conv2D(3, 3, padding="same", name=each))(spikes) for each in ("one", "two")]
    x = layers.BatchNormalization(scale=scale, center=center, name="norm")(layers.Add()([*parts, spikes]))
    x = layers.IFSpike(threshold=0.8, name="second")(x)
    model = keras.Model(inputs, layers.SpikeRep()(x))
    weights = {"gamma": gamma, "beta": beta, "moving_mean": mean, "moving_variance": variance}
    for variable in model.get_layer("norm").weights:
        variable.assign(weights[variable.name])
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": [1.0, 1.0, 1.0], "beta": [0.0, 0.0, 0.0], "mean": [0.0, 0.0, 0.0], "variance": [1.0, 1.0, 1.0]},
        {"gamma": [-1.3, 0.7, -0.2], "beta": [0.3, -0.4, 0.1], "mean": [0.5, -0.5, 0.2], "variance": [0.3, 2.0, 1.0]},
        {"gamma": [0.0, 1e-30, 1.0], "beta": [0.3, -0.4, 0.1], "mean": [0.5, -0.5, 0.2], "variance": [0.3, 2.0, 1.0]},
        {"gamma": [1e-3, 1.0, 1.0], "beta": [0.9, -0.9, 0.5], "mean": [3.0, -3.0, 0.0], "variance": [1.0, 1.0, 1.0]},
        {"gamma": [1.0] * 3, "beta": [0.0] * 3, "mean": [0.2, -0.2, 0.1], "variance": [0.5] * 3, "scale": False},
        {"gamma": [0.9] * 3, "beta": [0.0] * 3, "mean": [0.2, -0.2, 0.1], "variance": [0.5] * 3, "center": False},
    ],
)
def test_currents_are_those_of_the_trained_network_but_for_rounding(settings):
    """Against NumPy: what goes into the second neurons, in their own units, from the spikes of the first."""
    model = normalized(**settings)
    copy = integer_copy(model, Grid(1 / 64, 2.0))
    x = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 3)).astype("float32")
    first, second = copy.get_layer("first"), copy.get_layer("second")
    probe = keras.Model(copy.inputs, [first.output[0], second.input[0]])
    spikes, current = (np.asarray(each, "float64") for each in probe.predict(x, verbose=0))
    spikes = spikes / float(first.threshold)
    assert set(np.unique(spikes)) == {0, 1}

    folded = spikes.reshape(-1, 4, 4, 3)
    padded = np.pad(folded, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = folded.copy()
    for name in ("one", "two"):
        kernel, bias = (np.asarray(each, "float64") for each in model.get_layer(f"{name}_synapse").layer.weights)
        expected += np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias
    mean, variance = np.array(settings["mean"]), np.array(settings["variance"])
    expected = (expected - mean) / np.sqrt(variance + 1e-3)
    expected = expected * settings["gamma"] if settings.get("scale", True) else expected
    expected = expected + settings["beta"] if settings.get("center", True) else expected
    steps = float(second.threshold)
    off = np.abs(current.reshape(expected.shape) / steps * 0.8 - expected)
    # Three terms, each rounded by half a step; and weights, of up to 27 inputs each, by half of 1/127 of the largest.
    largest = max(np.abs(model.get_layer(f"{name}_synapse").layer.kernel.numpy()).max() for name in ("one", "two"))
    factor = np.abs(np.array(settings["gamma"]) if settings.get("scale", True) else 1) / np.sqrt(variance + 1e-3)
    assert (off <= 1.5 * 0.8 / steps + 2 * 27 * factor * largest / 254 + 1e-3).all()
    assert np.abs(expected).max() > 0.5


def test_layers_between_and_behind(tmp_path):
    """Sequential synapses, dropout, upsampling, cropping, pools, sub-models; answers that go on; a dict as output."""
    keras.utils.set_random_seed(0)
    inner_inputs = keras.Input((10, 10, 2))
    spikes = layers.IFSpike(timesteps=3, threshold=0.5, name="neuron")(inner_inputs)
    inner = keras.Model(inner_inputs, layers.Dropout(0.2)(spikes), name="inner")
    inputs = keras.Input((10, 10, 2), name="image")
    parts = [keras.layers.Cropping2D(2), keras.layers.UpSampling2D(2), keras.layers.Conv2D(3, 5, name="conv")]
    x = layers.Synapse(keras.Sequential(parts, name="parts"))(inner(inputs))
    x = layers.IFSpike(threshold=0.4, name="neuron")(x)
    x = layers.Synapse(keras.layers.GlobalAveragePooling2D())(layers.Synapse(keras.layers.AveragePooling2D(2))(x))
    x = layers.Synapse(keras.layers.Dense(4, name="conv"), name="named_alike")(x)
    answer = layers.SpikeRep()(layers.IFSpike(threshold=0.06, name="last")(x))
    own = keras.layers.Dense(4, name="own")
    model = keras.Model(inputs, {"logits": own(own(answer / 2.0))})
    x = np.random.default_rng(0).normal(size=(16, 10, 10, 2)).astype("float32")
    copy = integer_copy(model, Grid.of(x))
    answers, expected = (each.predict(x, verbose=0)["logits"] for each in (copy, model))
    assert np.unique(expected[:, 0]).size > 1
    assert np.corrcoef(answers.ravel(), expected.ravel())[0, 1] > 0.9
    assert [each.name for each in copy.layers if isinstance(each, layers.IFSpike)] == ["inner_neuron", "neuron", "last"]
    single = keras.Model(copy.inputs, copy.output["logits"])
    assert report_of(export_onnx(single, tmp_path / "own.onnx", examples=x, flip_budget=0)).exportable


def test_frames_without_normalization_keep_their_resolution():
    """The grid's limit is no current that comes: counts go to 40, and hardly any is above 1."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 6, 6, 2), name="frames")
    x = layers.Synapse(keras.layers.Conv2D(8, 3, name="conv"))(layers.ToStream()(inputs))
    x = layers.IFSpike(threshold=6.0, name="first")(x)
    x = layers.Synapse(keras.layers.Dense(2))(layers.Synapse(keras.layers.Flatten())(x))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0)(x)))
    assert float(integer_copy(model, Grid(1.0, 128.0)).get_layer("first").threshold) >= 32


def test_weights_of_a_network_of_few_bits_are_taken_as_they_are():
    keras.utils.set_random_seed(0)
    model = models.small_cnn((4, 8), timesteps=2, weight_bits=8)
    gamma = np.array([1.0, -0.5, 2.0, -3.0, 0.1, -0.1, 1.0, 1.0])
    model.get_layer("bn2").gamma.assign(gamma)
    copy = integer_copy(model, Grid(1 / 16, 8.0))
    trained = model.get_layer("conv2_synapse").layer
    q, _ = (np.asarray(x) for x in quantize(trained.kernel, 8))
    spike = float(copy.get_layer("neuron1").threshold)
    pooled = copy.get_layer("conv2_synapse").layer.kernel.numpy() * spike / 4
    np.testing.assert_array_equal(pooled, q * np.sign(gamma))


def refused(name):
    if name == "lif":
        return models.small_cnn((4,), "lif", timesteps=2)
    if name == "representation":
        return models.small_cnn((4,), timesteps=0)
    inputs = keras.Input((8, 8, 2))
    x = layers.IFSpike(timesteps=2)(inputs)
    if name == "two kernels":
        x = layers.Synapse(keras.layers.Dense(3, name="second"))(layers.Synapse(keras.layers.Conv2D(3, 1))(x))
    if name == "pool of nine":
        x = layers.Synapse(keras.layers.AveragePooling2D(3, name="pool"))(x)
    if name == "other layer":
        x = layers.Synapse(keras.layers.DepthwiseConv2D(1, name="depthwise"))(x)
    if name == "no answer":
        return keras.Model(inputs, layers.ToTensor()(layers.IFSpike()(x)))
    if name == "spikes":
        return keras.Model(inputs, x.values)
    if name == "opposite kernels":
        parts = [layers.Synapse(keras.layers.Conv2D(1, 1, name=each))(x) for each in ("plus", "minus")]
        return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.01, name="last")(layers.Add()(parts))))
    if name == "wide input":
        inputs = keras.Input((784,))
        x = layers.IFSpike(timesteps=4)(keras.layers.Dense(10, name="wide")(inputs))
    if name == "sums used twice":
        current = layers.Synapse(keras.layers.Conv2D(2, 1, name="conv"))(x)
        x = layers.Add()([layers.Synapse(keras.layers.Conv2D(2, 1))(layers.IFSpike()(current)), current])
    if name == "neurons behind the answer":
        return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(timesteps=2, name="behind")(layers.SpikeRep()(x))))
    if name == "representation alone":
        return keras.Model(inputs, keras.layers.Dense(2)(x.representation))
    if name == "values alone":
        return keras.Model(inputs, keras.layers.Flatten()(x.values))
    if name == "two answers":
        return keras.Model(inputs, [layers.SpikeRep()(x)] * 2, name="two")
    return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(name="last")(x)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lif", r"cannot be whole numbers: layer 'neuron1' \(LIFSpike\).*use IF neurons"),
        ("representation", r"timesteps=0.*with_timesteps\(model, N\)"),
        ("two kernels", r"layer 'second.*\(Dense\) takes the sums of a kernel, or several terms; put neurons between"),
        ("pool of nine", "averages over 9 places, which is no power of two"),
        ("other layer", r"layer 'depthwise.*\(DepthwiseConv2D\) is none that is known"),
        ("no answer", r"layer 'to_tensor.*\(ToTensor\) is none that is known to give whole numbers"),
        ("spikes", "ends without keras_dsr.layers.SpikeRep"),
        ("opposite kernels", r"layer 'last' \(IFSpike\) has a threshold, 0.01, far below what its current"),
        ("wide input", r"layer 'wide' \(Dense\) has sums that leave its largest weight in some channel fewer than 8"),
        ("sums used twice", r"layer 'conv' \(Conv2D\) has sums that go to two places"),
        ("neurons behind the answer", r"layer 'behind' \(IFSpike\) takes what spikes stand for"),
        ("representation alone", "takes half a stream, its values or its representation alone"),
        ("values alone", "takes half a stream, its values or its representation alone"),
        ("two answers", "Received 'two' with 2"),
    ],
)
def test_networks_that_cannot_be_whole_numbers(name, message):
    with pytest.raises(ValueError, match=message):
        integer_copy(refused(name), Grid(2.0**-12, 2.0) if name == "wide input" else Grid(1 / 8, 4.0))


def test_copies_are_not_copied_again(copy_of):
    _, copy, _, x = copy_of("bare")
    with pytest.raises(ValueError, match="is an exact copy already"):
        integer_copy(copy, Grid.of(x))


def test_a_copy_is_saved_and_loaded(copy_of, tmp_path):
    _, copy, _, x = copy_of("resnet")
    copy.save(tmp_path / "copy.keras")
    loaded = keras.models.load_model(tmp_path / "copy.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), copy.predict(x, verbose=0))
    assert verify(loaded, x, onnx=[export_onnx(loaded, tmp_path / "copy.onnx", examples=x)], flip_budget=0).exportable

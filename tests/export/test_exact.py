"""Networks whose sums are exact: that they are, what it takes off the weights, and which networks cannot be."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from helpers import numpy, vary
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keras_dsr import layers, models
from keras_dsr.layers.neurons import neurons_of
from keras_dsr.layers.quantized import quantize

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")
tf = pytest.importorskip("tensorflow")
from keras_dsr.export import (  # noqa: E402
    Grid,
    Preprocessing,
    exact,
    exact_copy,
    export_onnx,
    export_saved_model,
    largest_sums,
    verify,
)

GRID = Grid(1 / 64, 8.0)
KERNELS = (keras.layers.Dense, keras.layers.Conv2D)


def resnet():
    """With identity and other shortcuts, a normalization behind sums, and a pool between neurons."""
    keras.utils.set_random_seed(0)
    model = models.preact_resnet(20, layers.IFSpike(threshold=0.7), timesteps=3, input_shape=(8, 8, 3))
    return model, {}, np.random.default_rng(5).normal(size=(6, 8, 8, 3)).astype("float32")


def lif_alone():
    """LIF neurons right behind kernels without bias, and behind a pool."""
    keras.utils.set_random_seed(0)
    neuron = {"threshold": 0.1, "dt": 0.3}
    inputs = keras.Input((8, 8, 2), name="image")
    x = keras.layers.Conv2D(4, 3, use_bias=False, name="stem")(inputs)
    x = layers.LIFSpike(timesteps=3, name="first", **neuron)(x)
    x = layers.Synapse(keras.layers.AveragePooling2D(2, name="pool"))(x)
    x = layers.LIFSpike(name="second", **neuron)(x)
    x = layers.Synapse(keras.layers.Conv2D(4, 2, use_bias=False, name="conv"))(x)
    x = layers.LIFSpike(name="third", **neuron)(x)
    x = layers.Synapse(keras.layers.Dense(3, name="dense"))(layers.Synapse(keras.layers.Flatten(name="flat"))(x))
    model = keras.Model(inputs, layers.SpikeRep(name="logits")(layers.LIFSpike(name="last", **neuron)(x)))
    return model, {}, np.random.default_rng(6).normal(size=(6, 8, 8, 2)).astype("float32")


OWN = {"resnet": resnet, "lif_alone": lif_alone}
NETWORKS = ("small_if", "small_lif", "vgg5", "frames", "nested", *OWN)


@pytest.fixture(scope="module")
def copy_of(build):
    """By name: a network, its exact copy, the settings of its export, and inputs as clients send them."""
    done = {}

    def make(name, varied=True):
        if (name, varied) not in done:
            model, settings, x = OWN[name]() if name in OWN else build(name)
            model = vary(model) if varied else model
            prepare = settings.get("preprocessing", np.asarray)
            done[name, varied] = model, exact_copy(model, Grid.of(prepare(x))), settings, x
        return done[name, varied]

    return make


@pytest.mark.parametrize("name", NETWORKS)
def test_no_sum_can_have_more_than_24_bits(name, copy_of):
    _, copy, _, _ = copy_of(name)
    sums = largest_sums(copy)
    kernels = [layer for layer in copy._flatten_layers() if isinstance(layer, KERNELS)]
    assert len(sums) >= len(kernels)
    assert max(sums.values()) <= 24
    # No more is taken off than has to be, where a kernel's own sums are the limit.
    assert max(sums.values()) > 23


def inputs_and_outputs(model, x):
    """For each kernel layer what it takes and gives, (batch, ...), time folded into the batch."""
    seen = []
    for layer in model._flatten_layers():
        if isinstance(layer, KERNELS):
            call = layer.call

            def watch(inputs, *args, layer=layer, call=call, **kwargs):
                outputs = call(inputs, *args, **kwargs)
                seen.append((layer, numpy(inputs), numpy(outputs)))
                return outputs

            layer.call = watch
    try:
        model(x, training=False)
    finally:
        for layer in model._flatten_layers():
            if isinstance(layer, KERNELS):
                del layer.call
    return seen


def in_float64(layer, x):
    """What a kernel layer gives, every sum with 53 bits."""
    weights = [numpy(each).astype("float64") for each in layer.get_weights()]
    if isinstance(layer, keras.layers.Dense):
        return x.astype("float64") @ weights[0] + sum(weights[1:])
    sums = tf.nn.conv2d(x.astype("float64"), weights[0], list(layer.strides), layer.padding.upper())
    return numpy(sums) + sum(weights[1:])


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_are_those_of_twice_the_bits(name, copy_of):
    model, copy, settings, x = copy_of(name)
    x = numpy(settings["preprocessing"](x)) if "preprocessing" in settings else x
    found = values_alone(inputs_and_outputs(copy, x))
    assert {layer.name for layer, _, _ in found} == {
        layer.name for layer in copy._flatten_layers() if isinstance(layer, KERNELS)
    }
    for layer, inputs, outputs in found:
        assert np.array_equal(outputs, in_float64(layer, inputs)), layer.name
    rounded = [
        not np.array_equal(outputs, in_float64(layer, inputs))
        for layer, inputs, outputs in values_alone(inputs_and_outputs(model, x))
    ]
    assert any(rounded), "the network itself rounds"


def values_alone(found):
    """Without representations, which go through the same kernels and may be rounded, as nothing fires on them."""
    rows = {}
    for layer, inputs, _ in found:
        rows[layer.name] = max(len(inputs), rows.get(layer.name, 0))
    return [each for each in found if len(each[1]) == rows[each[0].name]]


@pytest.mark.parametrize("name", NETWORKS)
def test_it_stays_close_to_the_network(name, copy_of):
    model, copy, _, _ = copy_of(name)
    assert copy.name == model.name
    assert copy.output_shape == model.output_shape
    assert copy.inputs[0].name == model.inputs[0].name
    for mine, other in zip(neurons_of(copy), neurons_of(model), strict=True):
        assert float(mine.threshold) == pytest.approx(float(other.threshold), rel=1 / 256)
    mine, other = ([each for each in m._flatten_layers() if isinstance(each, KERNELS)] for m in (copy, model))
    for new, old in zip(mine, other, strict=True):
        largest = np.abs(old.kernel).max()
        np.testing.assert_allclose(new.kernel, old.kernel, atol=largest / 32, rtol=0)


FILES = [
    ("small_if", "unrolled", False, True),
    ("small_if", "unrolled", False, False),
    ("small_lif", "loop", True, True),
    ("small_lif", "step", False, True),
    ("small_lif", "step", False, False),
    ("vgg5", "step", False, True),
    ("vgg5", "step", True, False),
    ("frames", "unrolled", True, True),
    ("frames", "unrolled", False, False),
    ("nested", "loop", False, True),
    ("resnet", "unrolled", False, True),
    ("resnet", "loop", True, True),
    ("resnet", "step", False, False),
    ("lif_alone", "unrolled", True, True),
    ("lif_alone", "step", False, True),
    ("lif_alone", "step", True, True),
]


@pytest.mark.parametrize(("name", "form", "fold", "varied"), FILES)
def test_not_a_spike_differs_in_onnx_runtime(name, form, fold, varied, copy_of, tmp_path):
    _, copy, settings, x = copy_of(name, varied)
    path = tmp_path / "exact.onnx"
    export_onnx(copy, path, form=form, fold_thresholds=fold, verify=False, **settings)
    report = verify(copy, x, onnx=[path], flip_budget=0, **settings)
    rows = [row for row in report.rows if row.required]
    assert rows
    for row in rows:
        assert row.passed, row.reason
        assert (row.flipped, row.compared) == (0, len(x))
    # And its kernels are the copy's: what follows a layer was not multiplied into it.
    found = kernels_of(path)
    worth = [np.float32(each.threshold) * np.float32(each.scale) for each in neurons_of(copy)] if fold else []
    for layer in copy._flatten_layers():
        if isinstance(layer, KERNELS):
            kernel = numpy(layer.kernel)
            turned = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel
            wanted = [each * factor for each in (turned, kernel.T) for factor in (np.float32(1), *worth)]
            assert any(np.array_equal(each, other) for each in found for other in wanted), layer.name


def kernels_of(path):
    """The weights of convolutions and matrix products in an ONNX file, and all else that is as large."""
    graph = onnx.load(path).graph
    return [onnx.numpy_helper.to_array(each) for each in graph.initializer if len(each.dims) in (2, 4)]


def test_a_saved_model_of_it(copy_of, tmp_path):
    _, copy, settings, x = copy_of("small_if")
    version = export_saved_model(copy, tmp_path / "exact", examples=x, flip_budget=0, **settings)
    assert verify(copy, x, saved_model=version, flip_budget=0, **settings).passed


def test_it_is_saved_and_proven_again(copy_of, tmp_path):
    _, copy, _, x = copy_of("frames")
    copy.save(tmp_path / "exact.keras")
    loaded = keras.models.load_model(tmp_path / "exact.keras")
    assert largest_sums(loaded) == largest_sums(copy)
    assert np.array_equal(loaded.predict(x, verbose=0), copy.predict(x, verbose=0))


def test_the_network_itself_is_left_as_it_is(build):
    model, _, _ = build("frames")
    before = model.get_weights()
    exact_copy(model, GRID)
    assert all(np.array_equal(*each) for each in zip(before, model.get_weights(), strict=True))
    assert model.get_layer("first").input is not None  # raises, if it were called twice
    with pytest.raises(ValueError, match="is ahead of the FixedPoint layer"):
        largest_sums(model)


def test_a_copy_of_a_copy_is_refused(copy_of):
    _, copy, _, _ = copy_of("nested")
    with pytest.raises(
        ValueError, match=r"is an exact copy already.*'fixed_point' \(FixedPoint\). Pass the model that"
    ):
        exact_copy(copy, GRID)


def test_kernels_of_few_bits_have_the_values_that_they_compute_with():
    model = models.small_cnn((4, 6), layers.IFSpike(1.0), timesteps=2, weight_bits=4)
    copy = exact_copy(model, GRID)
    few = [each for each in model._flatten_layers() if hasattr(each, "bits")]
    mine = [each for each in copy._flatten_layers() if type(each) in KERNELS]
    assert [each.name for each in few] == [each.name for each in mine] == ["conv1", "conv2", "head_dense"]
    for quantized, layer in zip(few, mine, strict=True):
        q, step = (numpy(each) for each in quantize(quantized.kernel, 4))
        np.testing.assert_allclose(layer.kernel, q * step, atol=np.abs(step).max() / 64)


@pytest.mark.parametrize(
    ("dt", "threshold"), [(0.05, 0.3), (0.03, 0.123), (0.7, 2.9), (0.3, 0.26), (0.7, 0.15), (0.03, 0.51)]
)
@pytest.mark.parametrize("bits", [8, 6, 5, 4])
def test_spikes_are_worth_few_bits(dt, threshold, bits):
    neuron = layers.LIFSpike(threshold=threshold, dt=dt)
    keras.Sequential([keras.Input((3, 2)), neuron])
    exact._round_worth(neuron, bits)
    worth = np.float32(neuron.threshold) * np.float32(neuron.scale)
    assert (worth * 2.0 ** -np.floor(np.log2(worth)) * 2 ** (bits - 1)) % 1 == 0
    assert float(neuron.threshold) == pytest.approx(threshold, rel=3 / 2**bits)


def test_spikes_are_worth_fewer_bits_where_many_inputs_meet():
    """As in VGG-11: 512 channels, averaged over four places ahead of a 3x3 kernel."""
    generator = np.random.default_rng(0)
    inputs = keras.Input((2, 4, 4, 2))
    x = layers.IFSpike(0.73, name="first")(layers.ToStream()(inputs))
    x = layers.Synapse(keras.layers.Conv2D(512, 1, use_bias=False))(x)
    x = layers.IFSpike(0.73, name="wide")(x)
    x = layers.Synapse(keras.layers.AveragePooling2D(2))(x)
    x = layers.Synapse(keras.layers.Conv2D(4, 3, padding="same", use_bias=False), name="meeting")(x)
    x = layers.IFSpike(0.73, name="last")(x)
    model = keras.Model(inputs, layers.SpikeRep()(x))
    kernel = model.get_layer("meeting").layer.kernel
    # Most weights of a trained kernel are far below its largest ones; here hardly any is.
    kernel.assign(generator.uniform(-1, 1, kernel.shape) / 64)
    copy = exact_copy(model, GRID)
    assert max(largest_sums(copy).values()) <= 24
    worth = numpy(copy.get_layer("wide").threshold) * 64
    assert worth % 1 == 0  # 6 bits or fewer, of 0.73
    assert (worth / 64) == pytest.approx(0.73, rel=1 / 16)


def test_channels_that_are_dead_or_all_zero():
    model = vary(resnet()[0])
    conv, bn = model.get_layer("stage1_block1_conv1_synapse").layer, model.get_layer("stage1_block1_bn2")
    conv.kernel.assign(numpy(conv.kernel) * np.r_[0.0, np.ones(15)])
    gamma = numpy(bn.gamma).copy()
    gamma[1:4] = 0, 1e-20, -1e-30
    bn.gamma.assign(gamma)
    copy = exact_copy(model, GRID)
    scale = copy.get_layer("stage1_block1_bn2").layer
    mine_gamma, mean, beta = (numpy(each) for each in scale.get_weights())
    constant = numpy(bn.beta) - gamma * numpy(bn.moving_mean) / np.sqrt(numpy(bn.moving_variance) + 1e-5)
    # The first has no current but this constant, and the others none that is not next to 0.
    assert mine_gamma[1:4].tolist() == [0, 0, 0]
    np.testing.assert_allclose(beta[1:4], constant[1:4], rtol=1e-6)
    np.testing.assert_allclose(beta[0] - mine_gamma[0] * mean[0], constant[0], rtol=1e-4)
    np.testing.assert_allclose(-mine_gamma[4:] * mean[4:], constant[4:], rtol=1e-4)
    assert (beta[4:] == 0).all()


def test_a_kernel_that_is_off_its_grid_is_found(copy_of):
    _, copy, _, _ = copy_of("frames")
    copy = keras.models.clone_model(copy)
    copy.set_weights(copy_of("frames")[1].get_weights())
    kernel = copy.get_layer("dense_synapse").layer.kernel
    value = numpy(kernel).copy()
    value[0, 0] = 2.0**-30
    kernel.assign(value)
    with pytest.raises(
        ValueError, match=r"are not exact: those of layer 'dense_synapse' may have \d\d\.\d bits, and 24"
    ):
        largest_sums(copy)


def test_a_beta_behind_a_product_is_found(copy_of):
    copy = keras.models.clone_model(copy_of("frames")[1])
    copy.set_weights(copy_of("frames")[1].get_weights())
    copy.get_layer("bn").layer.beta.assign(np.full(3, 0.1))
    with pytest.raises(ValueError, match=r"layer 'bn' \(Scale\) adds a beta to a product"):
        largest_sums(copy)


def test_weights_that_are_no_numbers(copy_of):
    model, copy, _, _ = copy_of("frames")
    for each, function in ((model, lambda broken: exact_copy(broken, GRID)), (copy, largest_sums)):
        broken = keras.models.clone_model(each)
        broken.set_weights(each.get_weights())
        broken.get_layer("dense_synapse").layer.bias.assign(np.full(5, np.nan))
        with pytest.raises(ValueError, match=r"Layer 'dense.*' of model 'frames' has weights that are not finite"):
            function(broken)


def network(*between, shape=(8, 8, 2)):
    """Layers between two layers of neurons."""
    inputs = keras.Input(shape)
    x = layers.IFSpike(timesteps=2, name="first")(inputs)
    for layer in between:
        x = layer(x)
    return keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(name="last")(x)))


synapse = layers.Synapse


REFUSED = {
    "two_kernels": (
        [synapse(keras.layers.Conv2D(2, 3, name="one")), synapse(keras.layers.Conv2D(2, 3, name="two"))],
        "layer 'two_synapse' .Conv2D. multiplies sums of other kernels; put neurons between",
    ),
    "kernel_behind_normalization": (
        [layers.BatchNormalization(), synapse(keras.layers.Conv2D(2, 3, name="conv"))],
        "layer 'conv_synapse' .Conv2D. takes numbers that are on no grid",
    ),
    "pool_of_nine": (
        [synapse(keras.layers.AveragePooling2D(3, name="pool"))],
        "layer 'pool_synapse' .AveragePooling2D. averages over 9 places, which is no power of two",
    ),
    "pool_at_edges": (
        [synapse(keras.layers.AveragePooling2D(2, strides=1, padding="same", name="pool"))],
        "averages over fewer places at the edges",
    ),
    "channels_first": (
        [synapse(keras.layers.AveragePooling2D(2, data_format="channels_first", name="pool"))],
        "has channels first",
    ),
    "no_gamma": ([layers.BatchNormalization(scale=False, name="bn")], r"layer 'bn' .* without gamma; build it with"),
    "other_axis": ([layers.BatchNormalization(axis=1, name="bn")], "normalizes over another axis than the last"),
    "einsum": ([synapse(keras.layers.EinsumDense("abcd,de->abce", (None, None, 3), name="e"))], "is none whose"),
    "unknown": (
        [synapse(keras.layers.Conv2DTranspose(2, 3, name="up"))],
        "layer 'up_synapse' .Conv2DTranspose. is none whose sums are known",
    ),
    "bilinear": (
        [synapse(keras.layers.UpSampling2D(2, interpolation="bilinear", name="up"))],
        "is none whose sums are known",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_that_cannot_be_exact(name):
    between, why = REFUSED[name]
    between = [type(layer).from_config(layer.get_config()) for layer in between]
    with pytest.raises(ValueError, match=rf"(?s)cannot be exact: .*{why}"):
        exact_copy(network(*between), GRID)


def refused(inputs, outputs, why):
    with pytest.raises(ValueError, match=why):
        exact_copy(keras.Model(inputs, outputs), GRID)


def test_streams_that_are_on_no_grid_cannot_be_added():
    inputs = keras.Input((4,))
    x = layers.IFSpike(timesteps=2)(inputs)
    x = layers.Add(name="add")([x, layers.BatchNormalization()(x)])
    refused(inputs, layers.SpikeRep()(layers.IFSpike()(x)), r"layer 'add' \(Add\) takes numbers that are on no grid")


def test_what_spikes_stand_for_is_not_taken_for_spikes():
    inputs = keras.Input((4,))
    x = layers.IFSpike(timesteps=3)(inputs)
    x = layers.IFSpike(timesteps=3, name="again")(keras.layers.Dense(2)(x.representation))
    refused(inputs, layers.SpikeRep()(x), r"layer 'again' \(IFSpike\) takes what spikes stand for")


def test_networks_without_time_steps():
    model = models.small_cnn((2,), timesteps=0)
    with pytest.raises(ValueError, match=r"timesteps=0\), which has no spikes; give it time steps"):
        exact_copy(model, GRID)
    inputs = keras.Input((3, 4))
    x = layers.IFSpike()(layers.ToStream(timesteps=0)(inputs))
    refused(inputs, layers.SpikeRep()(x), r"\(ToStream\) makes a representation network")


def test_values_of_a_stream_are_a_tensor_with_a_time_axis():
    inputs = keras.Input((4,))
    x = layers.IFSpike(timesteps=3)(inputs)
    x = keras.layers.GlobalAveragePooling1D(name="over_time")(x.values)
    x = layers.SpikeRep()(layers.IFSpike(timesteps=3)(keras.layers.Dense(2)(x)))
    refused(inputs, x, r"layer 'over_time' \(GlobalAveragePooling1D\) averages over 3 places")


def test_places_are_counted_behind_plain_tensors():
    inputs = keras.Input((2, 4, 4, 3))
    x = layers.IFSpike(name="plain")(layers.ToTensor()(layers.IFSpike()(layers.ToStream()(inputs))))
    x = layers.Synapse(keras.layers.GlobalAveragePooling2D(name="pool"))(layers.ToStream()(x))
    copy = exact_copy(keras.Model(inputs, layers.SpikeRep()(layers.IFSpike()(x))), GRID)
    # A spike is worth 6, which is 3 times a power of two; its mean over 16 places has 4 bits more.
    assert largest_sums(copy)["pool_synapse"] == pytest.approx(np.log2(3) + 4)


def test_a_normalization_that_is_used_twice():
    inputs = keras.Input((4,))
    bn = layers.BatchNormalization(name="bn")
    x = layers.IFSpike()(bn(layers.IFSpike(timesteps=2)(inputs)))
    refused(inputs, layers.SpikeRep()(layers.IFSpike()(bn(x))), r"layer 'bn.*' \(Scale\) is used twice")


def test_a_normalization_of_spikes_with_a_gamma_next_to_0():
    inputs = keras.Input((4,))
    bn = layers.BatchNormalization(name="bn")
    x = layers.IFSpike()(bn(layers.IFSpike(timesteps=2, threshold=1.0)(inputs)))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    bn.beta.assign(np.ones(4))
    bn.gamma.assign([1e-7, 1e-8, 1.0, 1e-3])
    gamma, _, beta = exact_copy(model, GRID).get_layer("bn").layer.get_weights()
    assert (gamma == 0).tolist() == [False, True, False, False]
    assert beta.tolist() == [0, 1, 0, 0]


def test_a_channel_of_hardly_any_weight():
    inputs = keras.Input((4,))
    dense = keras.layers.Dense(3, name="dense")
    x = layers.SpikeRep()(layers.IFSpike(timesteps=2)(dense(inputs)))
    model = keras.Model(inputs, x)
    dense.kernel.assign(numpy(dense.kernel) * [1, 1e-36, 1e-3])
    kernel = numpy(exact_copy(model, GRID).get_layer("dense").kernel)
    assert np.abs(kernel[:, 1]).max() < 1e-35
    for channel in (0, 2):
        expected = numpy(dense.kernel)[:, channel]
        np.testing.assert_allclose(kernel[:, channel], expected, atol=np.abs(expected).max() / 1000)


def test_operations_of_keras():
    inputs = keras.Input((4,))
    x = layers.SpikeRep()(layers.IFSpike(timesteps=2)(keras.layers.Dense(3, name="dense")(inputs)))
    assert list(largest_sums(exact_copy(keras.Model(inputs, keras.ops.softmax(2.0 * x)), GRID))) == ["dense"]
    x = layers.SpikeRep()(layers.IFSpike(timesteps=2)(keras.ops.sin(inputs)))
    refused(inputs, x, r"\(Sin\) is none whose sums are known")


def test_a_model_with_a_loss_of_ones_own():
    model = models.small_cnn((2,), timesteps=2)
    model.compile(loss=lambda labels, logits: keras.ops.mean(logits))
    assert not exact_copy(model, GRID).compiled


def test_a_kernel_that_is_used_twice():
    inputs = keras.Input((4,))
    dense = layers.Synapse(keras.layers.Dense(4, name="dense"))
    x = layers.IFSpike()(dense(layers.IFSpike(timesteps=2)(inputs)))
    x = layers.IFSpike()(dense(x))
    refused(inputs, layers.SpikeRep()(x), r"layer 'dense_synapse' \(Dense\) is used twice; use a layer of its own")


def test_stock_layers_between_neurons():
    inputs = keras.Input((4,))
    x = keras.layers.Add(name="plus")([inputs, inputs])
    refused(inputs, layers.SpikeRep()(layers.IFSpike(timesteps=2)(x)), r"layer 'plus' \(Add\) is none whose sums")


def test_models_of_other_inputs():
    one, other = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    x = layers.IFSpike(timesteps=2)(keras.layers.Concatenate()([one, other]))
    refused([one, other], layers.SpikeRep()(x), "with one input can be made exact. Received .* with 2")
    whole = keras.Input((4,), dtype="int32")
    x = layers.IFSpike(timesteps=2)(keras.layers.Rescaling(1.0)(whole))
    refused(whole, layers.SpikeRep()(x), "takes int32: build it for float32")


def test_a_static_layer_with_an_activation_is_refused():
    inputs = keras.Input((4,))
    x = layers.IFSpike(timesteps=2)(keras.layers.Dense(3, activation="relu", name="dense")(inputs))
    refused(inputs, layers.SpikeRep()(x), r"layer 'dense' \(Dense\) has an activation")


def test_what_is_behind_the_readout_may_be_rounded():
    inputs = keras.Input((4,))
    x = layers.SpikeRep()(layers.IFSpike(timesteps=2)(keras.layers.Dense(3, name="dense")(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax", name="behind")(x))
    assert list(largest_sums(exact_copy(model, GRID))) == ["dense"]


def test_layers_that_move_numbers_about():
    between = [
        synapse(keras.layers.ZeroPadding2D(1)),
        synapse(keras.layers.Cropping2D(1)),
        synapse(keras.layers.UpSampling2D(2)),
        layers.Dropout(0.5),
        synapse(
            keras.Sequential([keras.layers.AveragePooling2D(2), keras.layers.DepthwiseConv2D(3, depth_multiplier=2)])
        ),
        layers.BatchNormalization(),
    ]
    model = vary(network(*between))
    copy = exact_copy(model, Grid(1 / 64, 16.0))
    x = np.random.default_rng(0).normal(3, 2, (4, 8, 8, 2)).astype("float32")
    got, expected = copy.predict(x, verbose=0), model.predict(x, verbose=0)
    assert len(np.unique(expected)) > 1
    assert np.mean(np.isclose(got, expected, rtol=1 / 128)) > 0.98


def test_channels_that_are_no_longer_told_apart():
    between = [
        synapse(keras.layers.Conv2D(8, 3, name="conv")),
        synapse(keras.layers.Flatten()),
        layers.BatchNormalization(name="bn"),
    ]
    model = vary(network(*between))
    # Of one place the mean is far larger than all sums.
    model.get_layer("bn").moving_mean.assign(np.r_[1e4, np.zeros(6 * 6 * 8 - 1)])
    sums = largest_sums(exact_copy(model, GRID))
    assert sums["bn"] > sums["conv_synapse"]


def test_sums_that_meet_behind_a_pool_are_coarsened():
    inputs = keras.Input((8, 8, 2))
    x = layers.IFSpike(threshold=1.0, timesteps=2)(inputs)
    large = layers.Synapse(keras.layers.Conv2D(2, 4, strides=4, kernel_initializer="ones", name="large"))(x)
    small = layers.Synapse(keras.layers.Conv2D(2, 1, name="small"))(x)
    small = layers.Synapse(keras.layers.AveragePooling2D(4, name="pool"))(small)
    x = layers.IFSpike()(layers.Add(name="add")([large, small]))
    copy = exact_copy(keras.Model(inputs, layers.SpikeRep()(x)), GRID)
    assert 22 < largest_sums(copy)["add"] <= 24


def test_sums_of_too_many_inputs_are_refused():
    inputs = keras.Input((4096,))
    x = layers.IFSpike(timesteps=2)(keras.layers.Dense(2, name="dense")(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    assert exact_copy(model, Grid(2.0**-6, 1.0)).name == model.name
    with pytest.raises(ValueError, match=r"layer 'dense' leave its largest weight in some channel fewer than 8 steps"):
        exact_copy(model, Grid(2.0**-14, 1.0))


def test_other_precisions_are_refused():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = models.small_cnn((2,), timesteps=2)
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match="computes in float16: build the model with the dtype policy 'float32'"):
        exact_copy(model, GRID)


def test_grids_of_inputs():
    counts = np.array([[0, 3, 7, 1]], "float32")
    assert Grid.of(counts) == Grid(1.0, 16.0)
    assert Grid.of(counts / 16) == Grid(1 / 16, 1.0)
    assert Grid.of(np.array([0.1, -2.3])) == Grid(8 / 4096, 8.0)
    assert Grid.of(np.array([0.1, -2.3]), bits=8) == Grid(8 / 256, 8.0)
    assert Grid.of(np.array([4.0, 8.0])) == Grid(1.0, 16.0)


@pytest.mark.parametrize("x", [np.zeros((2, 2)), np.zeros((0, 3)), np.array([1.0, np.nan]), np.array([np.inf])])
def test_inputs_that_make_no_grid(x):
    with pytest.raises(ValueError, match="inputs that are finite and not all zero"):
        Grid.of(x)


def test_bytes_end_at_the_same_step_however_std_is_divided_by():
    # With these, a byte is halfway between two steps of 2^-13 of the limit.
    preprocessing = Preprocessing((119.421,), (62.679,))
    every = np.arange(256, dtype="uint8")[:, None]
    divided = numpy(preprocessing(every))
    multiplied = (every - np.float32(119.421)) * (np.float32(1) / np.float32(62.679))
    found = Grid.of_bytes(preprocessing, 1)
    naive = Grid(found.limit * 2.0**-13, found.limit)
    steps = [[np.rint(x / grid.step) for x in (divided, multiplied)] for grid in (naive, found)]
    assert not np.array_equal(*steps[0])
    assert np.array_equal(*steps[1])
    assert np.abs(divided).max() <= found.limit < 2 * np.abs(divided).max()


@pytest.mark.parametrize("bits", [0, 21, 3.0, True])
def test_bits_of_a_grid(bits):
    with pytest.raises(ValueError, match="bits is a whole number from 1 to 20"):
        Grid.of(np.ones(3), bits=bits)


@settings(max_examples=200, deadline=None)
@given(arrays("float32", (5, 3), elements=st.floats(-1e6, 1e6, width=32)))
def test_exponents(values):
    found = exact._exponents(values)
    for column, exponent in zip(values.T.astype("float64"), found, strict=True):
        if not column.any():
            assert exponent == exact._OF_ZERO
            continue
        units = np.ldexp(column, -int(exponent))
        assert (units == np.rint(units)).all()
        assert (units % 2 != 0).any(), "and no larger one does"

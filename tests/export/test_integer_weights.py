"""Weights of 8 and 4 bits: as whole numbers in ONNX files, and what rounding costs on real data."""

from __future__ import annotations

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from sklearn.datasets import load_digits

from keras_dsr import data, layers, models
from keras_dsr.layers.quantized import quantize
from keras_dsr.models import presets

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")
pytest.importorskip("tensorflow")
from keras_dsr.export import OnnxRuntime, passes, verify  # noqa: E402
from keras_dsr.export.onnx import export_onnx  # noqa: E402
from keras_dsr.export.weights import Kernels, quantized_copy, store_as_integers  # noqa: E402

BITS = pytest.mark.parametrize("bits", [8, 4])


def digits():
    """Images of (8, 8, 1) in [-1, 1] and labels: the training part and the test part."""
    bunch = load_digits()
    x = (bunch.images[..., None] / 8 - 1).astype("float32")
    return (x[:1400], bunch.target[:1400]), (x[1400:], bunch.target[1400:])


@pytest.fixture(scope="module")
def trained():
    """The digits network after a few epochs."""
    keras.utils.set_random_seed(0)
    model = models.small_cnn(widths=(16, 32), neuron=layers.IFSpike(threshold=1.0), timesteps=4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    (x, labels), _ = digits()
    model.fit(x, labels, batch_size=64, epochs=6, verbose=0)
    return model


def accuracy(predicted, labels):
    return float(np.mean(np.asarray(predicted) == labels))


def integers(path):
    """For each kernel of whole numbers, outputs first: the operator that takes it, the numbers, and the steps."""
    graph = onnx.load(path).graph
    values = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    users = {name: node for node in graph.node for name in node.input}
    found = []
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            assert [each.i for each in node.attribute if each.name == "axis"] == [0]
            user = users[node.output[0]]
            user = users[user.output[0]] if user.op_type == "Transpose" else user
            found.append((user.op_type, *(values[name] for name in node.input)))
    return found


@BITS
def test_digits_before_and_after(bits, trained, tmp_path):
    _, (x, labels) = digits()
    before = accuracy(np.argmax(trained.predict(x, verbose=0), axis=1), labels)
    rounded = quantized_copy(trained, bits)
    path = export_onnx(trained, tmp_path / "digits.onnx", weight_bits=bits, verify=False)
    # Weights that are trained here differ from one processor to another, and may let some potential meet a threshold.
    report = verify(rounded, x, onnx=[path], flip_budget=1e-3)
    assert report.passed, [row.reason for row in report.rows]
    predicted = OnnxRuntime(path).run({"image": x})["class"]
    np.testing.assert_array_equal(predicted, np.argmax(rounded.predict(x, verbose=0), axis=1))
    after = accuracy(predicted, labels)
    print(f"\ndigits, {bits} bits: {before:.4f} before, {after:.4f} after")
    assert before > 0.9
    assert after > before - (0.01 if bits == 8 else 0.1)


def test_nmnist_before_and_after(unpacked, tmp_path):
    card, _ = presets.card("vgg5", "nmnist")
    loaded = data.load("nmnist", data_dir=unpacked("nmnist"), timesteps=card.timesteps, cache_dir=tmp_path)
    parts = list(loaded.batches(loaded.test, 50).as_numpy_iterator())
    x, labels = (np.concatenate(each) for each in zip(*parts, strict=True))
    model = models.vgg(5, card.neuron, classes=10, input_shape=loaded.input_shape, weights="nmnist")
    path = export_onnx(model, tmp_path / "float.onnx", verify=False)
    runtime = OnnxRuntime(path)
    before = accuracy(np.concatenate([runtime.run({"frames": part})["class"] for part, _ in parts]), labels)
    assert before == pytest.approx(card.test_accuracy)
    for bits in (8, 4):
        smaller = export_onnx(model, tmp_path / f"{bits}.onnx", weight_bits=bits, examples=x[:4])
        runtime = OnnxRuntime(smaller)
        after = accuracy(np.concatenate([runtime.run({"frames": part})["class"] for part, _ in parts]), labels)
        print(f"\nN-MNIST, {bits} bits: {before:.3f} before, {after:.3f} after")
        assert after >= before - 0.05
        assert smaller.stat().st_size < 0.3 * path.stat().st_size


@BITS
def test_kernels_are_those_of_the_float_simulation(bits, trained, tmp_path):
    path = export_onnx(trained, tmp_path / "digits.onnx", weight_bits=bits, verify=False)
    found = integers(path)
    assert [kind for kind, *_ in found] == ["Conv", "Conv", "MatMul"]
    assert passes.metadata_of(onnx.load(path))["keras_dsr.weight_bits"] == str(bits)
    kernels = [numpy(weight) for weight in trained.weights if weight.path.endswith("kernel")]
    for (kind, whole, step), kernel in zip(found, kernels, strict=True):
        q, expected = (numpy(each) for each in quantize(kernel, bits))
        assert whole.dtype == np.int8
        assert np.abs(whole).max() == 2 ** (bits - 1) - 1
        np.testing.assert_array_equal(whole, q.transpose(3, 2, 0, 1) if kind == "Conv" else q.T)
        np.testing.assert_allclose(step, expected, rtol=1e-6)


def test_runtimes_do_not_round_what_comes_in(tmp_path):
    """ONNX Runtime has a faster MatMul of dequantized weights, which does."""
    inputs = keras.Input((200,))
    currents = keras.layers.Dense(16, use_bias=False)(inputs)
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(timesteps=64, threshold=0.5)(currents)))
    x = np.random.default_rng(0).normal(size=(8, 200)).astype("float32")
    path = export_onnx(model, tmp_path / "wide.onnx", weight_bits=8, verify=False)
    proto = onnx.load(path)
    taken = next(node.output[0] for node in proto.graph.node if node.op_type in ("MatMul", "Gemm"))
    proto.graph.output.append(onnx.ValueInfoProto(name=taken))
    received = onnxruntime.InferenceSession(proto.SerializeToString()).run([taken], {proto.graph.input[0].name: x})[0]
    q, step = (numpy(each).astype("float64") for each in quantize(numpy(model.layers[1].kernel), 8))
    np.testing.assert_allclose(received, x @ (q * step), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["unrolled", "loop", "step"])
def test_networks_that_were_trained_with_few_bits(form, tmp_path):
    """Their layers are quantized already; folded thresholds go into the steps."""
    model = models.vgg(5, layers.IFSpike(threshold=0.3), input_shape=(2, 8, 8, 2), weight_bits=4)
    for weight in model.weights:
        if weight.path.endswith("gamma"):
            weight.assign(np.random.default_rng(0).normal(size=weight.shape) + 0.5)
    x = np.random.default_rng(0).poisson(2.0, (3, 2, 8, 8, 2)).astype("float32")
    path = export_onnx(
        model, tmp_path / "four.onnx", form=form, weight_bits=4, fold_thresholds=True, examples=x, verify=False
    )
    report = verify(model, x, onnx=[path], flip_budget=0)
    assert report.passed, [row.reason for row in report.rows]
    assert len(integers(path)) == 5
    for _, whole, step in integers(path):
        assert np.abs(whole).max() == 7
        assert (step > 0).all()


def test_networks_of_few_bits_as_floats(tmp_path):
    model = models.small_cnn((4,), layers.IFSpike(1.0), timesteps=2, weight_bits=4)
    path = export_onnx(model, tmp_path / "floats.onnx", examples=helpers.dyadics((4, 8, 8, 1), -2, 2))
    assert integers(path) == []


def with_a_head(head) -> keras.Model:
    """A network whose readout is of an affine layer, of which representations are asked for."""
    inputs = keras.Input((6,))
    x = layers.IFSpike(0.5, timesteps=4)(keras.layers.Dense(8)(inputs))
    return keras.Model(inputs, layers.SpikeRep()(layers.Synapse(head)(x)))


@pytest.mark.parametrize("weight_bits", [8, None])
@pytest.mark.parametrize("head", [keras.layers.Dense, layers.QuantizedDense])
def test_representations_go_through_rounded_kernels(head, weight_bits, tmp_path):
    path = export_onnx(
        with_a_head(head(3, name="head")),
        tmp_path / "head.onnx",
        weight_bits=weight_bits,
        fold_thresholds=True,
        examples=np.random.default_rng(0).normal(0, 2, (8, 6)).astype("float32"),
    )
    assert len(integers(path)) == (2 if weight_bits else 0)


@pytest.mark.parametrize("second", ["identity", "zeros"])
def test_kernels_of_the_same_shape(second, tmp_path):
    """Those with the same numbers too, which the converter keeps once; and zeros, which are any numbers times 0."""
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, kernel_initializer="identity" if second == "identity" else "he_normal")(inputs)
    x = layers.IFSpike(0.5, timesteps=4)(x)
    x = layers.Synapse(keras.layers.Dense(4, kernel_initializer=second, bias_initializer="ones"))(x)
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(0.5)(x)))
    x = helpers.dyadics((8, 4), -1, 1)
    path = export_onnx(model, tmp_path / "same.onnx", weight_bits=8, examples=x, verify=False)
    expected = numpy(quantized_copy(model, 8)(x))
    np.testing.assert_allclose(OnnxRuntime(path).run({"input": x})["logits"], expected, atol=1e-6)
    assert all((step > 0).all() for *_, step in integers(path))


@pytest.mark.parametrize(("own", "weight_bits"), [(None, 8), (4, None)])
def test_few_bits_under_mixed_precision_are_refused(own, weight_bits, tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = models.small_cnn((2,), layers.IFSpike(1.0), timesteps=2, weight_bits=own)
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match=r"'conv1' of model 'small_cnn' computes in float16.*dtype policy 'float32'"):
        export_onnx(model, tmp_path / "mixed.onnx", weight_bits=weight_bits, verify=False)


def test_a_copy_has_the_same_weights_and_other_layers():
    inner = keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Conv2D(2, 3), layers.IFSpike(1.0, timesteps=2)])
    inputs = keras.Input((6, 6, 1))
    x = layers.Synapse(keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(4)]))(inner(inputs))
    x = layers.Synapse(layers.QuantizedDense(3, bits=4))(layers.IFSpike(0.5)(x))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    copy = quantized_copy(model, 4)
    for received, expected in zip(copy.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(received, expected)
    kinds = [type(layer).__name__ for layer in copy._flatten_layers()]
    assert kinds.count("QuantizedConv2D") == 1
    assert kinds.count("QuantizedDense") == 2
    assert "Conv2D" not in kinds
    assert "Dense" not in kinds
    assert [layer.name for layer in copy.layers[1:]] == [layer.name for layer in model.layers[1:]]


def test_copies_that_cannot_be():
    with pytest.raises(ValueError, match=r"'conv1' .* has weights of 4 bits. Received bits=8; pass 4"):
        quantized_copy(models.small_cnn((2,), timesteps=2, weight_bits=4), 8)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(1.0, timesteps=2)(inputs)), name="bare")
    with pytest.raises(ValueError, match="'bare' has no Conv2D and no Dense layers"):
        quantized_copy(model, 8)
    with pytest.raises(ValueError, match=r"whole number from 2 to 16. Received bits=1"):
        quantized_copy(models.small_cnn((2,), timesteps=2), 1)


def test_a_kernel_that_is_not_in_the_graph_is_named():
    kernels = Kernels()
    dense = keras.layers.Dense(2, name="lost")
    dense.build((None, 3))
    kernels.add(dense, 8)
    kernels.round(dense, numpy(dense.kernel), np.float32(1))
    with pytest.raises(ValueError, match=r"cannot be exported as whole numbers: \['lost'\]"):
        store_as_integers(onnx.ModelProto(), kernels)

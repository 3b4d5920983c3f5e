"""ONNX files in ONNX Runtime and OpenVINO."""

from __future__ import annotations

import sys

import keras
import numpy as np
import pytest

from keras_dsr import layers

pytestmark = pytest.mark.tensorflow_only
pytest.importorskip("onnx")
runtimes = pytest.importorskip("keras_dsr.export.runtimes")

KINDS = {"onnxruntime": "OnnxRuntime", "openvino": "OpenVino"}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(request.param)
    return getattr(runtimes, KINDS[request.param])


@pytest.fixture
def model():
    """Two layers of neurons, with weights to work by hand."""
    inputs = keras.Input((1,), name="image")
    x = layers.IFSpike(timesteps=3, threshold=0.5, name="first")(keras.layers.Dense(2)(inputs))
    x = layers.IFSpike(threshold=0.5, name="second")(layers.Synapse(keras.layers.Dense(1))(x))
    model = keras.Model(inputs, layers.SpikeRep()(x))
    values = iter([[[0.25, -1.0]], [0.0, 0.0], [[1.0], [1.0]], [0.0]])
    for weight in model.trainable_variables:
        if "threshold" not in weight.path:
            weight.assign(next(values))
    return model


def test_a_table_worked_by_hand(kind, model, write_onnx, tmp_path):
    """Current 0.25 fires at 0.25, from -0.25 + 0.25 = 0 not, and at 0.25 again; each spike of 0.5 makes one more."""
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "unrolled"))
    x = np.array([[1.0], [0.0]], "float32")
    answer, spikes = runtime.traced({"image": x})
    np.testing.assert_array_equal(spikes["first"][0], [[0.5, 0], [0, 0], [0.5, 0]])
    np.testing.assert_array_equal(spikes["second"][0], [[0.5], [0], [0.5]])
    assert not spikes["first"][1].any()
    np.testing.assert_allclose(answer["logits"], [[1 / 3], [0]], rtol=1e-6)
    plain = runtime.run({"image": x})
    assert list(plain) == list(answer) == ["logits", "probabilities", "class"]
    for name, value in plain.items():
        np.testing.assert_array_equal(value, answer[name])
        assert value.dtype == ("int64" if name == "class" else "float32")
    assert list(runtime.run({"image": x}, outputs=["class"])) == ["class"]


def test_one_step(kind, model, write_onnx, tmp_path):
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "step"))
    state = {name: np.zeros((1, *tensor.shape[1:]), tensor.dtype) for name, tensor in runtime.inputs.items()}
    outputs, spikes = runtime.traced({**state, "image": np.ones((1, 1), "float32")})
    np.testing.assert_array_equal(spikes["first"], [[0.5, 0]])
    np.testing.assert_array_equal(outputs["next_potential_first"], [[-0.25, -1]])
    np.testing.assert_array_equal(outputs["logits"], [[0.5]])


def test_what_the_file_says(kind, model, write_onnx, tmp_path):
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "unrolled"))
    assert runtime.inputs == {"image": runtimes.Tensor((None, 1), "float32")}
    assert runtime.outputs == ("logits", "probabilities", "class")
    assert runtime.neurons == ("first", "second")
    assert runtime.metadata["keras_dsr.form"] == "unrolled"
    assert runtime.name.startswith(("ONNX Runtime 1.", "OpenVINO 20"))


def test_bad_input(kind, model, write_onnx, tmp_path):
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "unrolled"))
    with pytest.raises(ValueError, match=r"model.onnx takes the inputs \['image'\]. Received \['picture'\]"):
        runtime.run({"picture": np.ones((1, 1), "float32")})
    with pytest.raises(ValueError, match=r"'image' as float32. Received float64"):
        runtime.traced({"image": np.ones((1, 1))})
    with pytest.raises(ValueError, match=r"of shape \(None, 1\). Received shape \(1, 2\)"):
        runtime.run({"image": np.ones((1, 2), "float32")})
    with pytest.raises(ValueError, match=r"has the outputs .* Received \['spikes/first'\]"):
        runtime.run({"image": np.ones((1, 1), "float32")}, outputs=["spikes/first"])
    with pytest.raises(FileNotFoundError, match=r"no ONNX file at .*other.onnx"):
        kind(tmp_path / "other.onnx")


@pytest.mark.parametrize("kept", [0, 1 / 2, 1], ids=["empty", "half", "other"])
def test_damaged_files_are_refused(kept, kind, model, write_onnx, tmp_path):
    path = write_onnx(model, tmp_path / "model.onnx", "unrolled")
    content = path.read_bytes()
    path.write_bytes(b"no ONNX at all" if kept == 1 else content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"model.onnx is not an ONNX file that can be run, or is damaged: .*xport it"):
        kind(path)


def test_files_without_our_names(kind, model, write_onnx, tmp_path):
    x = {"image": np.ones((1, 1), "float32")}
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "unrolled", metadata={}))
    assert runtime.run(x)["class"] == [0]
    with pytest.raises(ValueError, match=r"does not say in its metadata \(keras_dsr.neurons\)"):
        runtime.traced(x)
    runtime = kind(write_onnx(model, tmp_path / "model.onnx", "unrolled", metadata={"keras_dsr.neurons": '["first"]'}))
    with pytest.raises(ValueError, match=r"does not say in its metadata \(keras_dsr.trace\)"):
        runtime.traced(x)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_without_a_package_the_error_names_the_extra(package, model, write_onnx, tmp_path, monkeypatch):
    path = write_onnx(model, tmp_path / "model.onnx", "unrolled")
    monkeypatch.setitem(sys.modules, package, None)
    kind = runtimes.OpenVino if package == "openvino" else runtimes.OnnxRuntime
    extra = "openvino" if package == "openvino" else "export"
    with pytest.raises(ImportError, match=rf"package {package}. Install it with: pip install 'keras-dsr\[{extra}\]'"):
        kind(path)
    assert runtimes.openvino_is_installed() is (package != "openvino" and "openvino" in sys.modules)

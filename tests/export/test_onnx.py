"""ONNX files in every form against Keras; what they are called, what they say, and what is not left behind."""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import pytest
from helpers import numpy

import keras_dsr
from keras_dsr import layers, models

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("tf2onnx")
tf = pytest.importorskip("tensorflow")
from keras_dsr.export import (  # noqa: E402
    OnnxRuntime,
    Preprocessing,
    VerificationError,
    passes,
    quantized_copy,
    report_of,
    verify,
)
from keras_dsr.export import onnx as onnx_export  # noqa: E402
from keras_dsr.export.onnx import export_onnx  # noqa: E402

CLASSIFIER = ["logits", "probabilities", "class"]
# Network, form, and whether thresholds are folded.
FILES = [
    ("small_if", "unrolled", False),
    ("small_if", "loop", True),
    ("small_if", "step", True),
    ("small_lif", "unrolled", True),
    ("small_lif", "step", False),
    ("vgg5", "unrolled", False),
    ("frames", "loop", False),
    ("frames", "step", False),
    ("own_layers", "unrolled", True),
    ("own_layers", "loop", False),
    ("nested", "unrolled", False),
    ("nested", "step", True),
]


@pytest.fixture(scope="module")
def file_of(tmp_path_factory, build):
    """By network, form and folding: the model, settings of its export, inputs, and the file, not yet verified."""
    done = {}

    def make(name, form, fold=False):
        if (name, form, fold) not in done:
            model, settings, x = build(name)
            path = tmp_path_factory.mktemp(name) / f"{form}.onnx"
            about = {"data": "noise"}
            export_onnx(model, path, form=form, fold_thresholds=fold, about=about, verify=False, **settings)
            done[name, form, fold] = model, settings, x, path
        return done[name, form, fold]

    return make


def kinds(graph):
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize(("name", "form", "fold"), FILES)
def test_not_a_spike_differs(name, form, fold, file_of):
    model, settings, x, path = file_of(name, form, fold)
    report = verify(model, x, onnx=[path], flip_budget=0, **settings)
    assert report.passed, [row.reason for row in report.rows]
    for row in report.rows:
        assert (row.form, row.flipped, row.examples) == (form, 0, len(x))
        assert row.spikes > 0
        assert row.max_difference <= 1e-6
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    outputs = CLASSIFIER if settings.get("classifier", True) else ["output"]
    assert [each.name for each in proto.graph.output][: len(outputs)] == outputs
    assert ("Scan" in kinds(proto.graph)) == (form == "loop")
    assert "Loop" not in kinds(proto.graph)
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    if fold:
        _, spikes = OnnxRuntime(path).traced(first_step(path, x) if form == "step" else {inputs(path)[0]: x})
        assert {value for train in spikes.values() for value in np.unique(train)} == {0, 1}
        assert json.loads(passes.metadata_of(proto)["keras_dsr.worth"]).keys() == spikes.keys()


def inputs(path):
    return [value.name for value in onnx.load(path).graph.input]


def first_step(path, x):
    name, *state = inputs(path)
    runtime = OnnxRuntime(path)
    zeros = {each: np.zeros((len(x), *runtime.inputs[each].shape[1:]), "float32") for each in state}
    return {name: x[:, 0] if len(x.shape) > len(runtime.inputs[name].shape) else x, **zeros}


def test_the_graph_has_what_the_answer_needs_and_no_more(file_of):
    *_, path = file_of("small_if", "unrolled")
    graph = onnx.load(path).graph
    found = kinds(graph)
    assert [found.count(kind) for kind in ("Conv", "MatMul", "AveragePool")] == [2, 1, 1]
    # One ahead of Flatten, which takes channels last.
    assert found.count("Transpose") == 1
    assert found.count("BatchNormalization") == 0
    assert found.count("GreaterOrEqual") == 3 * 4
    assert [value.name for value in graph.input] == ["image"]
    assert not any(name.startswith("spikes/") for node in graph.node for name in node.output)


def test_folded_thresholds_leave_nothing_between_spikes_and_weights(file_of):
    *_, path = file_of("small_lif", "unrolled", True)
    nodes = {name: node for node in onnx.load(path).graph.node for name in node.output}
    taken = [node for node in nodes.values() if node.op_type in ("AveragePool", "MatMul")]
    assert len(taken) == 2
    for node in taken:
        source = nodes[node.input[0]]
        while source.op_type in ("Reshape", "Transpose"):
            source = nodes[source.input[0]]
        assert source.op_type == "Concat"
        assert {nodes[name].op_type for name in source.input} == {"Cast"}


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch(batch, file_of):
    for form, fold in (("unrolled", False), ("loop", True)):
        model, settings, x, path = file_of("small_if", form, fold)
        prepared = settings["preprocessing"](x[:batch])
        answer = OnnxRuntime(path).run({"image": x[:batch]})
        np.testing.assert_allclose(answer["logits"], numpy(model(prepared)), atol=1e-6)
        np.testing.assert_array_equal(answer["class"], np.argmax(answer["logits"], axis=1))
        np.testing.assert_allclose(answer["probabilities"].sum(axis=1), 1, rtol=1e-6)


def test_any_number_of_frames(file_of):
    model, _, x, path = file_of("frames", "loop")
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[1].dim_param == "time"
    for steps, batch in ((1, 2), (3, 5), (8, 3)):
        frames = np.random.default_rng(steps).poisson(1.0, (batch, steps, *x.shape[2:])).astype("float32")
        other = keras.models.clone_model(model, input_tensors=keras.Input((steps, *x.shape[2:]), name="frames"))
        other.set_weights(model.get_weights())
        report = verify(other, frames, onnx=[path], flip_budget=0)
        assert report.passed, [row.reason for row in report.rows]


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", ["small_lif", "frames"])
def test_streams_whose_samples_are_at_different_steps(name, batch, file_of):
    model, _, x, path = file_of(name, "step")
    x = np.concatenate([x, x])[:batch]
    runtime = OnnxRuntime(path)
    step_input, *parts = runtime.inputs
    frames = step_input == "frame"
    timesteps = x.shape[1] if frames else model.get_layer("neuron1").timesteps
    state = {part: np.zeros((batch, *runtime.inputs[part].shape[1:]), "float32") for part in parts}
    done = np.zeros(batch, int)
    generator = np.random.default_rng(0)
    logits = np.zeros((batch, model.output_shape[1]), "float32")
    while (done < timesteps).any():
        rows = np.flatnonzero((done < timesteps) & (generator.random(batch) < 0.6))
        if not len(rows):
            continue
        current = x[rows, done[rows]] if frames else x[rows]
        answer = runtime.run({step_input: current, **{part: value[rows] for part, value in state.items()}})
        for part in parts:
            state[part][rows] = answer[f"next_{part}"]
        logits[rows] = answer["logits"]
        done[rows] += 1
    np.testing.assert_allclose(logits, numpy(model(x)), atol=1e-6)


def test_what_a_file_says(file_of):
    model, *_, path = file_of("small_if", "step", True)
    proto = onnx.load(path)
    metadata = passes.metadata_of(proto)
    assert metadata["keras_dsr.form"] == "step"
    assert metadata["keras_dsr.version"] == keras_dsr.__version__
    assert json.loads(metadata["keras_dsr.neurons"]) == ["neuron1", "neuron2", "head_neuron"]
    assert json.loads(metadata["keras_dsr.state"]) == inputs(path)[1:]
    assert {f"next_{part}" for part in inputs(path)[1:]} < {value.name for value in proto.graph.output}
    assert json.loads(metadata["keras_dsr.preprocessing"]) == {"mean": [33.0], "std": [70.0], "dtype": "uint8"}
    assert json.loads(metadata["keras_dsr.worth"]) == {"neuron1": 1.0, "neuron2": 1.0, "head_neuron": 1.0}
    assert "keras_dsr.weight_bits" not in metadata
    assert metadata["keras_dsr.timesteps"] == "4"
    card = json.loads(metadata["keras_dsr.card"])
    assert card["about"] == {"data": "noise"}
    assert (card["name"], card["timesteps"], card["input"]) == (model.name, 4, "static")
    assert card["parameters"] == model.count_params()
    assert card["neurons"][0] == {"layer": "neuron1", "type": "IFSpike", "threshold": 1.0, "alpha": 0.5}
    assert {"keras", "keras_dsr", "tf2onnx", "onnx"} <= card["versions"].keys()
    assert (proto.producer_name, proto.producer_version) == ("keras_dsr", keras_dsr.__version__)
    assert "one time step" in proto.doc_string
    assert proto.graph.name == model.name
    *_, whole = file_of("small_if", "unrolled")
    assert passes.metadata_of(onnx.load(whole))["keras_dsr.timesteps"] == "4"


def frames_of(steps, insist=None):
    inputs = keras.Input((steps, 3), name="frames")
    x = layers.ToStream(timesteps=insist)(inputs)
    x = layers.IFSpike(0.5)(layers.Synapse(keras.layers.Dense(4))(x))
    return keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Dense(2))(x)))


def test_a_number_of_frames_to_fix(tmp_path):
    path = export_onnx(frames_of(None), tmp_path / "fixed.onnx", timesteps=2)
    assert OnnxRuntime(path).inputs["frames"].shape == (None, 2, 3)
    assert passes.metadata_of(onnx.load(path))["keras_dsr.timesteps"] == "2"


def test_a_loop_over_frames_of_a_network_that_insists_on_their_number(tmp_path):
    path = export_onnx(frames_of(3, insist=3), tmp_path / "loop.onnx", form="loop", opset=15)
    assert OnnxRuntime(path).inputs["frames"].shape == (None, 3, 3)
    assert onnx.load(path).opset_import[0].version == 15


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: frames_of(None), {}, "takes any number of frames.*pass timesteps"),
        (lambda: frames_of(3), {"timesteps": 4}, "has 3 time steps. Received timesteps=4"),
        (lambda: models.small_cnn((2,), timesteps=3), {"timesteps": 4}, "has 3 time steps. Received timesteps=4"),
        (lambda: frames_of(3), {"timesteps": 3, "form": "step"}, "'step' has one time step. Received timesteps=3"),
        (lambda: frames_of(None), {"timesteps": 0}, "at least 1. Received timesteps=0"),
        (lambda: frames_of(None), {"timesteps": 2.5}, "at least 1. Received timesteps=2.5"),
        (lambda: models.small_cnn((2,), timesteps=0), {}, "representation network"),
        (lambda: frames_of(3), {"form": "rolled"}, "form is one of.*Received form='rolled'"),
        (lambda: frames_of(3), {"weight_bits": 3}, "8 or 4, or None for floats. Received weight_bits=3"),
        (lambda: frames_of(3), {"opset": 19}, "from 15 to 18. Received opset=19"),
        (lambda: frames_of(3), {"about": {"accuracy": float("nan")}}, "`about` goes on the card"),
        (lambda: frames_of(3), {"flip_budget": float("nan")}, "from 0 to 1. Received .*flip_budget=nan"),
        (lambda: frames_of(3), {"examples": np.zeros((2, 4, 3), "float32")}, r"Received float32 of shape \(2, 4, 3\)"),
    ],
)
def test_bad_input(make, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(make(), tmp_path / "model.onnx", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64", "mixed_float16"])
def test_precision(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = models.small_cnn((2,), layers.IFSpike(1.0), timesteps=2)
    finally:
        keras.config.set_dtype_policy("float32")
    if policy == "mixed_float16":
        assert OnnxRuntime(export_onnx(model, tmp_path / "half.onnx", verify=False)).outputs[0] == "logits"
        return
    with pytest.raises(ValueError, match=r"Layer .* computes in (bfloat16|float64): build the model with"):
        export_onnx(model, tmp_path / "model.onnx")


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .onnx. Received '.*model.pb'"):
        export_onnx(frames_of(3), tmp_path / "model.pb")
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent to write model.onnx"):
        export_onnx(frames_of(3), tmp_path / "absent" / "model.onnx")


@pytest.mark.parametrize("package", ["onnx", "tf2onnx", "onnxruntime"])
def test_missing_packages_are_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}.*pip install 'keras-dsr\[export\]'"):
        export_onnx(frames_of(3), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_does_not_have_is_named(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Bessel(keras.layers.Layer):
        def call(self, x):
            return tf.math.bessel_i0e(x)

    inputs = keras.Input((3,), name="current")
    x = layers.IFSpike(0.5, timesteps=2)(Bessel()(inputs))
    model = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Dense(2))(x)))
    with pytest.raises(ValueError, match=r"operations that ONNX files cannot have: \['BesselI0e'\]"):
        export_onnx(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_does_other_than_keras_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the one before")
    converted = onnx_export._converted

    def spoiled(*args):
        proto = converted(*args)
        for initializer in proto.graph.initializer:
            value = onnx.numpy_helper.to_array(initializer)
            if value.shape == (3, 4):
                initializer.CopyFrom(onnx.numpy_helper.from_array(value + np.float32(0.5), initializer.name))
        return proto

    monkeypatch.setattr(onnx_export, "_converted", spoiled)
    with pytest.raises(VerificationError, match=r"First: 'unrolled' of model.onnx in .* spikes are flipped") as caught:
        export_onnx(frames_of(3), path)
    assert not caught.value.report.passed
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]
    export_onnx(frames_of(3), path, verify=False)
    assert onnx.load(path).graph.output[0].name == "logits"


def test_a_file_keeps_what_it_was_verified_by(tmp_path):
    """Here by random inputs, which are as clients send them."""
    model = models.small_cnn((2,), layers.IFSpike(1.0), timesteps=2)
    preprocessing = Preprocessing((0.0,), (16.0,))
    path = export_onnx(
        model, tmp_path / "bytes.onnx", preprocessing=preprocessing, batch_size=3, tolerance=1e-4, flip_budget=1e-3
    )
    assert OnnxRuntime(path).inputs["image"].dtype == "uint8"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bytes.onnx"]
    report = report_of(path.rename(tmp_path / "renamed.onnx"))
    assert report.random
    assert (report.tolerance, report.flip_budget) == (1e-4, 1e-3)
    assert (report.rows[0].file, report.rows[0].passed) == ("renamed.onnx", True)
    assert {row.examples for row in report.rows} == {4}


def test_a_file_of_few_bits_is_compared_with_the_copy_that_has_them(file_of, tmp_path):
    model, settings, x, floats = file_of("small_if", "unrolled")
    path = export_onnx(model, tmp_path / "four.onnx", weight_bits=4, verify=False, **settings)
    report = verify(model, x, onnx=[floats, path], flip_budget=0, **settings)
    assert report.passed, [row.reason for row in report.rows]
    assert {(row.file, row.reference) for row in report.rows} == {("unrolled.onnx", ""), ("four.onnx", "4-bit copy")}
    # The copy is what the file does, and the network itself does another thing.
    prepared = settings["preprocessing"](x)
    answer = OnnxRuntime(path).run({"image": x})["logits"]
    np.testing.assert_allclose(answer, numpy(quantized_copy(model, 4)(prepared)), atol=1e-6)
    assert np.abs(answer - numpy(model(prepared))).max() > 0.1


# Network, and the forms of its files with whether thresholds are folded.
GOLDEN = [
    ("vgg11_if", {"loop": True, "step": False}),
    ("preact_resnet18_if", {"unrolled": True}),
]


@pytest.mark.parametrize(("name", "forms"), GOLDEN)
def test_golden_networks(name, forms, golden, tmp_path):
    """Networks whose sums are exact: the spikes are those of the reference implementation, each of them."""
    network = golden(name)
    model, arrays, x = network.model, network.arrays, network.x
    paths = [
        export_onnx(model, tmp_path / f"{form}.onnx", form=form, fold_thresholds=fold, verify=False)
        for form, fold in forms.items()
    ]
    report = verify(model, x, onnx=paths, flip_budget=0)
    assert report.passed, [row.reason for row in report.rows]
    for row in report.rows:
        assert (row.flipped, row.compared) == (0, len(x))
        assert row.max_difference <= 1e-6
    assert not report.silent
    answer, spikes = OnnxRuntime(paths[0]).traced({inputs(paths[0])[0]: x})
    for expected, layer in zip(arrays["eval_spike_counts_per_step"], network.layers, strict=True):
        fired = spikes[layer] != 0
        np.testing.assert_array_equal(fired.sum(axis=(0, *range(2, fired.ndim))), expected, err_msg=layer)
    np.testing.assert_allclose(answer["logits"], arrays["eval_output"], rtol=1e-5, atol=1e-5)

"""Exported forms against Keras: what passes, and what must not."""

from __future__ import annotations

import io
import json

import keras
import numpy as np
import pytest
from rich.console import Console

from keras_dsr import layers

pytestmark = pytest.mark.tensorflow_only
pytest.importorskip("tensorflow")
from keras_dsr.export import Network, Report, Row, VerificationError, runtimes, verify  # noqa: E402

NAMES = ["small_if", "small_lif", "vgg5", "frames", "own_layers", "nested"]
FORMS = ["serving_default", "trace", "step", "step, interleaved"]


def neurons(model):
    return Network(model, classifier=False).neuron_layers


def printed(report):
    file = io.StringIO()
    Console(width=300, file=file).print(report.table())
    return file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_give_what_keras_gives(name, exported, tmp_path):
    one = exported(name)
    report = verify(one.model, one.x, saved_model=one.version, **one.settings, batch_size=4)
    assert report.passed
    assert [row.form for row in report.rows] == FORMS
    for row in report.rows:
        assert (row.examples, row.reason, row.file) == (len(one.x), "", f"{name}/1")
        assert row.runtime.startswith("TensorFlow 2.")
        assert row.seconds > 0
    whole, trace, *steps = report.rows
    assert whole.bit_equal
    assert trace.count_differences == 0
    for row in steps:
        assert row.flipped == row.count_differences == 0
        assert row.spikes > 0
    assert whole.top1_agreement == (1.0 if one.settings.get("classifier", True) else None)
    report.write(tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["passed"]
    assert [row["form"] for row in told["rows"]] == FORMS
    assert "passed" in printed(report)


@pytest.mark.parametrize("batch", [1, 7])
def test_streams_of_any_batch(batch, exported):
    one = exported("frames")
    x = np.concatenate([one.x, one.x[::-1]])[:batch]
    report = verify(one.model, x, saved_model=one.version)
    assert report.passed
    # One stream alone cannot be at different steps.
    assert [row.form for row in report.rows] == FORMS[: 3 if batch == 1 else 4]
    assert [row.form for row in verify(one.model, x[:1], saved_model=one.version, streams=False).rows] == FORMS[:3]


@pytest.mark.parametrize("name", ["small_if", "frames"])
def test_a_changed_threshold_is_found(name, exported, build):
    one = exported(name)
    model, settings, x = build(name)
    layer, neuron = list(neurons(model).items())[1]
    neuron.threshold.assign(neuron.threshold * 0.7)
    report = verify(model, x, saved_model=one.version, flip_budget=0, **settings)
    assert not report.passed
    for row in report.rows[1:]:
        assert not row.passed
        assert row.count_differences > 0
        assert f"in layer {layer!r}" in row.reason
    with pytest.raises(
        VerificationError, match=rf"exported forms of model .* of {name}/1 in TensorFlow .*, C API"
    ) as error:
        raise VerificationError(report)
    assert error.value.report is report
    assert "failed: " in printed(report)


def test_the_first_flipped_spike_is_named(exported, build, monkeypatch):
    """One spike too many in one step of one example, told by the potential alone."""
    from keras_dsr.export import c_api

    one = exported("frames")
    original = c_api.Session.run
    calls = []

    def run(self, signature, tensors):
        outputs = original(self, signature, tensors)
        if signature == "step":
            calls.append(signature)
            if len(calls) == 2:
                outputs["next_potential_second"][3, 1] -= 1.0
        return outputs

    monkeypatch.setattr(c_api.Session, "run", run)
    report = verify(one.model, one.x, saved_model=one.version, streams=False, flip_budget=0)
    *passed, step = report.rows
    assert all(row.passed for row in passed)
    assert step.flipped >= 1
    assert not step.passed
    assert "spikes are flipped, and at most 0 may be: first at step 2 in layer 'second' (example 3)" in step.reason


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("logits", lambda x: np.nextafter(x, np.inf), "logits are not equal to the bit"),
        ("logits", lambda x: np.full_like(x, np.nan), "logits are not equal to the bit"),
        (
            "probabilities",
            lambda x: x * 0.9,
            "probabilities of examples with the same spikes differ by more than 1e-05",
        ),
        ("class", lambda x: (x + 1) % 5, "the class of examples with the same spikes differs, first of example 0"),
        ("class", lambda x: x + 100, "the class of examples with the same spikes differs, first of example 0"),
    ],
)
def test_a_wrong_answer_is_found(part, change, reason, exported, monkeypatch):
    from keras_dsr.export import c_api

    one = exported("frames")
    original = c_api.Session.run

    def run(self, signature, tensors):
        outputs = original(self, signature, tensors)
        if signature == "serving_default":
            outputs[part] = change(outputs[part])
        return outputs

    monkeypatch.setattr(c_api.Session, "run", run)
    whole, *others = verify(one.model, one.x, saved_model=one.version, streams=False).rows
    assert not whole.passed
    assert reason in whole.reason
    assert all(row.passed for row in others)


def test_answers_that_are_not_finite_are_told():
    row = Row("trace", "a", "b", 1, False, None, None, None, 1, None, 0.0, False, "[why]")
    report = Report("m", (row,), ("quiet",), 1e-5, 1e-6)
    assert json.loads(report.to_json())["rows"][0]["max_difference"] is None
    text = printed(report)
    assert "not finite" in text
    assert "[why]" in text
    assert "Never fired on these inputs: quiet" in text


def test_silent_layers_are_told(exported):
    one = exported("frames")
    report = verify(one.model, np.zeros_like(one.x), saved_model=one.version)
    assert report.passed
    assert "second" in report.silent
    assert verify(one.model, one.x, saved_model=one.version).silent == ()


def test_bad_input(exported, tmp_path):
    one = exported("frames")
    with pytest.raises(ValueError, match="nothing to compare: pass the folder of a SavedModel"):
        verify(one.model, one.x)
    with pytest.raises(ValueError, match=r"compared on float32 inputs of shape .* Received float64 of shape"):
        verify(one.model, one.x.astype("float64"), saved_model=one.version)
    with pytest.raises(ValueError, match=r"at least one. Received float32 of shape \(0, 3, 4, 4, 2\)"):
        verify(one.model, one.x[:0], saved_model=one.version)
    with pytest.raises(ValueError, match=r"Received float32 of shape \(5, 2, 4, 4, 2\)"):
        verify(one.model, one.x[:, 1:], saved_model=one.version)
    with pytest.raises(ValueError, match="Received batch_size=0, tolerance=1e-05"):
        verify(one.model, one.x, saved_model=one.version, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no SavedModel"):
        verify(one.model, one.x, saved_model=tmp_path)
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        verify(one.model, one.x, onnx=[tmp_path / "a.onnx"])
    small = exported("small_if")
    with pytest.raises(ValueError, match="is not of model 'frames': its signatures have other inputs or outputs"):
        verify(one.model, one.x, saved_model=small.version)
    with pytest.raises(ValueError, match="brings its own preprocessing"):
        verify(Network(small.model, **small.settings), small.x, saved_model=small.version, **small.settings)


@pytest.fixture
def by_hand():
    """A network of two layers of IF neurons, and the weights that it has, all of few bits."""
    pytest.importorskip("onnx")
    inputs = keras.Input((4,), name="image")
    x = layers.IFSpike(timesteps=3, threshold=0.5, name="first")(keras.layers.Dense(6, name="dense1")(inputs))
    x = layers.IFSpike(threshold=0.5, name="second")(layers.Synapse(keras.layers.Dense(5), name="dense2")(x))
    model = keras.Model(inputs, layers.SpikeRep()(x), name="by_hand")
    generator = np.random.default_rng(0)
    for weight in model.trainable_variables:
        if "threshold" not in weight.path:
            weight.assign(generator.integers(-16, 17, weight.shape) / 16)
    x = (generator.integers(-16, 17, (5, 4)) / 16).astype("float32")
    return model, x


@pytest.mark.parametrize("fixed", [None, 2], ids=["any_batch", "batches_of_2"])
@pytest.mark.parametrize("form", ["unrolled", "step"])
def test_onnx_files_give_what_keras_gives(form, fixed, by_hand, write_onnx, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = by_hand
    path = write_onnx(model, tmp_path / "model.onnx", form, batch=fixed)
    report = verify(model, x, onnx=[path], batch_size=4)
    assert report.passed, report
    assert len(report.rows) == 1 + runtimes.openvino_is_installed()
    for row in report.rows:
        assert (row.form, row.file, row.examples, row.flipped) == (form, "model.onnx", 5, 0)
        assert row.spikes == 5 * 3 * (6 + 5)
        assert row.bit_equal
        assert row.top1_agreement == 1
    assert report.silent == ()


@pytest.mark.parametrize("form", ["unrolled", "step"])
def test_an_onnx_file_with_another_threshold_is_found(form, by_hand, write_onnx, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = by_hand
    path = write_onnx(model, tmp_path / "model.onnx", form, threshold=0.25)
    report = verify(model, x, onnx=[path])
    assert not any(row.passed for row in report.rows)
    assert all("first at step 1 in layer 'first'" in row.reason for row in report.rows)


def test_a_flip_that_only_the_answer_tells_counts(by_hand, write_onnx, tmp_path, monkeypatch):
    """The file that is served may be optimised in another way than the one that shows its spikes."""
    pytest.importorskip("onnxruntime")
    model, x = by_hand
    original = runtimes.Runtime.run

    def run(self, tensors, outputs=None):
        results = original(self, tensors, outputs)
        results["logits"] = results["logits"].copy()
        results["logits"][1, 2] += 1 / 6
        return results

    monkeypatch.setattr(runtimes.Runtime, "run", run)
    path = write_onnx(model, tmp_path / "model.onnx", "unrolled")
    assert all(row.passed and row.flipped == 1 for row in verify(model, x, onnx=[path]).rows)
    for row in verify(model, x, onnx=[path], flip_budget=0).rows:
        assert row.reason.startswith("1 of 165 spikes are flipped, and at most 0 may be: 1 only seen in the answers")


def test_onnx_files_of_others_are_refused(by_hand, write_onnx, tmp_path, build):
    pytest.importorskip("onnxruntime")
    model, x = by_hand
    path = write_onnx(model, tmp_path / "model.onnx", "unrolled", metadata={})
    with pytest.raises(ValueError, match=r"does not say in its metadata \(keras_dsr.form\)"):
        verify(model, x, onnx=[path])
    path = write_onnx(model, tmp_path / "model.onnx", "unrolled")
    other, settings, images = build("small_if")
    with pytest.raises(ValueError, match=r"is not of model 'small_cnn': its neuron layers are \['first', 'second'\]"):
        verify(other, images, onnx=[path], **settings)

"""Exported forms against Keras: what passes, and what must not."""

from __future__ import annotations

import dataclasses
import io
import json
import types

import keras
import numpy as np
import pytest
from rich.console import Console

from keras_dsr import layers

pytestmark = pytest.mark.tensorflow_only
pytest.importorskip("tensorflow")
from keras_dsr.export import (  # noqa: E402
    Network,
    OnnxRuntime,
    Report,
    Row,
    VerificationError,
    report_of,
    runtimes,
    verification,
    verify,
)

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
    """By what was found as they were exported."""
    one = exported(name)
    report = report_of(one.version)
    assert report.passed
    assert [row.form for row in report.rows] == FORMS
    for row in report.rows:
        assert (row.examples, row.compared, row.reason, row.file) == (len(one.x), len(one.x), "", f"{name}/1")
        assert (row.required, row.reference) == (True, "")
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


def a_row(**changes):
    passed = {
        "form": "trace",
        "file": "a",
        "runtime": "b",
        "reference": "",
        "required": True,
        "examples": 1,
        "compared": 1,
        "bit_equal": True,
        "max_difference": 0.0,
        "flipped": None,
        "spikes": None,
        "unseen": None,
        "count_differences": 0,
        "top1_agreement": None,
        "seconds": 0.0,
        "passed": True,
        "reason": "",
    }
    return Row(**{**passed, **changes})


def test_answers_that_are_not_finite_are_told():
    row = a_row(bit_equal=False, max_difference=None, count_differences=1, passed=False, reason="[why]")
    report = Report("m", (row,), ("quiet",), 1e-5, 1e-6)
    assert json.loads(report.to_json())["rows"][0]["max_difference"] is None
    text = printed(report)
    assert "not finite" in text
    assert "[why]" in text
    assert "Never fired on these inputs: quiet" in text


def test_what_nothing_stands_and_falls_with_is_told_and_no_more():
    failed = a_row(form="loop", runtime="OpenVINO", required=False, passed=False, reason="it is off")
    report = Report("m", (failed, a_row()), (), 1e-5, 1e-6)
    assert report.exportable
    assert not report.passed
    assert "failed, not required" in printed(report)
    worse = Report("m", (failed, a_row(passed=False, reason="counts differ")), (), 1e-5, 1e-6)
    assert not worse.exportable
    assert str(VerificationError(worse)).endswith("First: 'trace' of a in b: counts differ")
    assert str(VerificationError(dataclasses.replace(worse, random=True))).endswith("examples=... or --data-dir")


def test_silent_layers_are_told(exported, build):
    one = exported("frames")
    model, _, x = build("frames")
    neurons(model)["second"].threshold.assign(1e6)
    report = verify(model, x, saved_model=one.version, flip_budget=1)
    assert report.silent == ("second",)
    assert "Never fired on these inputs: second" in printed(report)
    assert verify(one.model, one.x, saved_model=one.version).silent == ()


def test_inputs_on_which_nothing_fires_prove_nothing(exported):
    one = exported("frames")
    with pytest.raises(ValueError, match=r"No neuron of model 'frames' fired on the 5 inputs.*real inputs: examples="):
        verify(one.model, np.zeros_like(one.x), saved_model=one.version)


def judged(examples, *, flipped=0, unseen=0, flip_budget=1e-6):
    """The verdict on a file that has one spike too many in so many examples, and a wrong answer in so many others."""
    network = types.SimpleNamespace(outputs=("logits",), classifier=False)
    tally = verification._Tally(verification._Form(network, "unrolled", "a.onnx", "runtime"), 1e-5)
    logits, fired = np.zeros((examples, 3), "float32"), np.zeros((examples, 2, 100), bool)
    answer, spikes = logits.copy(), fired.copy()
    answer[:unseen] += 1
    spikes[examples - flipped :, 0, 0] = True
    received = verification._Result({"logits": answer}, {"neuron": spikes}, traced={"logits": logits})
    tally.add(verification._Result({"logits": logits}, {"neuron": fired}), received, 0)
    return tally.row(flip_budget)


def test_wrong_answers_are_excused_in_one_example_of_a_hundred():
    row = judged(10, unseen=1)
    assert (row.passed, row.flipped, row.unseen, row.compared) == (True, 0, 1, 9)
    assert judged(300, unseen=3).passed
    # A budget that grows with the places where a spike could be must not excuse them.
    for examples, unseen, allowed in ((10, 10, 1), (10, 2, 1), (300, 4, 3)):
        reason = judged(examples, unseen=unseen, flip_budget=1.0).reason
        assert reason.startswith(f"{unseen} of {examples} examples have a wrong answer though their spikes")
        assert reason.endswith(f"at most {allowed} may")
    assert judged(10, unseen=1, flip_budget=0).reason.endswith("at most 0 may")


def test_half_of_the_answers_must_be_compared():
    row = judged(10, flipped=5, flip_budget=1.0)
    assert (row.passed, row.flipped, row.compared) == (True, 5, 5)
    row = judged(10, flipped=6, flip_budget=1.0)
    assert not row.passed
    assert row.reason.startswith("only 4 of 10 examples have the same spikes")
    assert row.reason.endswith("at least half must: first at step 1 in layer 'neuron' (example 4)")
    assert not judged(1, flipped=1, flip_budget=1.0).passed


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
    spoiled = one.x.copy()
    spoiled[3:, 0, 0, 0, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"finite inputs. Received NaN or infinity in 2 of 5, first in number 3"):
        verify(one.model, spoiled, saved_model=one.version)
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


@pytest.mark.parametrize("form", ["unrolled", "step"])
def test_onnx_files_give_what_keras_gives(form, by_hand, write_onnx, tmp_path):
    pytest.importorskip("onnxruntime")
    model, x = by_hand
    path = write_onnx(model, tmp_path / "model.onnx", form)
    report = verify(model, x, onnx=[str(path)], batch_size=4)
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
    for row in verify(model, x, onnx=[path]).rows:
        assert (row.passed, row.flipped, row.unseen, row.compared) == (True, 0, 1, 4)


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
    renamed = keras.models.clone_model(model, input_tensors=keras.Input((4,), name="picture"))
    with pytest.raises(ValueError, match=r"its inputs \['image'\], and the model's are .* and \['picture'\]"):
        verify(renamed, x, onnx=[path])


class Unlike(OnnxRuntime):
    """A runtime that gives what no other does."""

    def __init__(self, path):
        super().__init__(path)
        self.name = "OpenVINO 0"

    def run(self, tensors, outputs=None):
        return {name: value + 1 for name, value in super().run(tensors, outputs).items()}

    def traced(self, tensors):
        return self.run(tensors), super().traced(tensors)[1]


class Failing(Unlike):
    """A runtime that cannot run the file."""

    def run(self, tensors, outputs=None):
        raise RuntimeError("no such operation")


class NotLoading(Unlike):
    """A runtime that cannot load the file."""

    def __init__(self, path):
        raise RuntimeError("no such operation")


@pytest.mark.parametrize("kind", [Unlike, Failing, NotLoading])
def test_openvino_fails_alone(kind, by_hand, write_onnx, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(verification, "OpenVino", kind)
    monkeypatch.setattr(verification, "openvino_is_installed", lambda: True)
    model, x = by_hand
    report = verify(model, x, onnx=[write_onnx(model, tmp_path / "model.onnx", "unrolled")])
    first, second = report.rows
    assert (first.passed, first.required) == (True, True)
    assert (second.passed, second.required) == (False, False)
    assert ("differ" if kind is Unlike else "it cannot run the file: no such operation") in second.reason
    assert report.exportable
    assert not report.passed
    assert "failed, not required" in printed(report)


def test_what_has_no_report(exported, by_hand, write_onnx, tmp_path):
    model, _ = by_hand
    with pytest.raises(ValueError, match=r"no report in its metadata \(keras_dsr.verification\).*verify=False"):
        report_of(write_onnx(model, tmp_path / "model.onnx", "unrolled"))
    with pytest.raises(FileNotFoundError, match="no version of a SavedModel with a card"):
        report_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        report_of(tmp_path / "other.onnx")
    card = tmp_path / "assets.extra" / "card.json"
    card.parent.mkdir()
    for damaged in ("{", "{}", '{"verification": {"rows": [{"form": 1}], "silent": []}}'):
        card.write_text(damaged)
        with pytest.raises(ValueError, match=r"cannot be read, it is damaged or of another version.*Export it again"):
            report_of(tmp_path)

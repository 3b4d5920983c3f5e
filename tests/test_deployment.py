"""From a run folder or a preset to what is served."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dsr import cli, data, deployment, export, recipes, training
from keras_dsr.models import presets

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a small network, trained for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    settings = {"epochs": "1", "widths": "4,8", "timesteps": "4", "train_examples": "320"}
    training.train(recipes.get("digits").with_settings(settings), folder, verbose=0)
    return folder


@pytest.fixture(scope="module")
def deployed(run, tmp_path_factory):
    given = deployment.source(run, examples=16)
    base = tmp_path_factory.mktemp("savedmodels")
    return given, base, deployment.deploy(given, base, onnx=("unrolled", "step"))


def test_a_run_is_exported_with_all_that_is_known_of_it(deployed):
    _, base, exported = deployed
    assert exported.saved_model == base / "digits" / "1"
    assert exported.onnx == (base / "digits" / "1.onnx", base / "digits" / "1-step.onnx")
    card = json.loads((exported.saved_model / "assets.extra" / "card.json").read_text())
    about = card["about"]
    assert about["data"] == "digits"
    assert about["test_examples"] == 360
    assert about["recipe"]["timesteps"] == 4
    assert set(about["firing_rates"]) == {"neuron1", "neuron2", "head_neuron"}
    assert card["verification"]["passed"]
    assert sorted({row["examples"] for row in card["verification"]["rows"]}) == [16]
    assert [report.rows[0].file for report in exported.reports] == ["digits/1", "1.onnx", "1-step.onnx"]
    assert all(report.passed and not report.random for report in exported.reports)
    left = {"batching.config", "digits", "docker-compose.yml", "models.config", "monitoring.config"}
    assert {entry.name for entry in base.iterdir()} == left
    assert {entry.name for entry in (base / "digits").iterdir()} == {"1", "1.onnx", "1-step.onnx", "1-request.json"}


def test_clients_send_images_as_they_are_stored(deployed):
    given, _, exported = deployed
    assert given.examples.dtype == "uint8"
    assert given.examples.shape == (16, 8, 8, 1)
    standardised = given.preprocessing(given.examples)
    x, _ = next(data.load("digits").batches(data.load("digits").test, 16, seed=0).as_numpy_iterator())
    assert np.array_equal(np.asarray(standardised), x)
    request = json.loads(exported.request.read_text())
    assert np.array_equal(np.array(request["instances"], "uint8"), given.examples[:1])


def test_the_usage_that_is_printed_runs(deployed, monkeypatch, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    given, base, exported = deployed
    lines = exported.usage.splitlines()
    assert lines[0] == f"keras-dsr serve {base / 'digits'}"
    assert f"curl -d @{exported.request} http://127.0.0.1:8501/v1/models/digits:predict" in lines
    exec("\n".join(lines[lines.index("# ONNX Runtime, in Python:") + 1 :]), {})
    session = onnxruntime.InferenceSession(str(exported.onnx[0]))
    expected, probabilities = session.run(["class", "probabilities"], {"image": given.examples[:1]})
    assert capsys.readouterr().out == f"{[expected, probabilities]}\n"


def test_usage_of_paths_with_spaces_and_of_files_that_give_whole_answers():
    folder = Path("saved models/digits")
    files = (folder / "1-step-8bit.onnx", folder / "1-loop-8bit.onnx")
    exported = deployment.Exported(folder / "1", files, folder / "1-request.json", "image", "uint8")
    assert exported.usage.startswith("keras-dsr serve 'saved models/digits'\n")
    assert "curl -d '@saved models/digits/1-request.json' http" in exported.usage
    assert "InferenceSession('saved models/digits/1-loop-8bit.onnx')" in exported.usage
    assert "onnxruntime" not in dataclasses.replace(exported, onnx=files[:1]).usage


def test_an_export_is_compared_again_with_the_files_of_its_version(deployed):
    given, base, _ = deployed
    report = deployment.verify(given, base / "digits")
    assert report.passed
    assert {row.file for row in report.rows} == {"digits/1", "1.onnx", "1-step.onnx"}


def test_an_export_is_found_from_its_own_folder(deployed, tmp_path, monkeypatch):
    given, *_ = deployed
    for name in ("saved_model.pb", "1.onnx", "1-loop-8bit.onnx", "1-step.onnx", "11.onnx", "1-mine.onnx"):
        path = tmp_path / "digits" / ("1" if name == "saved_model.pb" else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    compared = {}
    monkeypatch.setattr(export, "verify", lambda *_, **settings: compared.update(settings))
    monkeypatch.chdir(tmp_path / "digits" / "1")
    deployment.verify(given, Path())
    assert compared["saved_model"] == tmp_path / "digits" / "1"
    assert [path.name for path in compared["onnx"]] == ["1-loop-8bit.onnx", "1-step.onnx", "1.onnx"]


@pytest.mark.parametrize("part", ["export_onnx", "export_saved_model"])
def test_nothing_is_published_before_all_is_proven(part, deployed, tmp_path, monkeypatch):
    given, *_ = deployed
    original = export.export_onnx

    def failing(*_, **__):
        assert not (tmp_path / "digits").exists()
        raise ValueError("it differs")

    def writing(model, path, **settings):
        return original(model, path, **{**settings, "verify": False})

    monkeypatch.setattr(export, "export_onnx", writing)
    monkeypatch.setattr(export, part, failing)
    with pytest.raises(ValueError, match="it differs"):
        deployment.deploy(given, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arithmetic", ["exact", "integer"])
def test_a_copy_that_no_runtime_rounds_otherwise_is_exported_and_found_again(arithmetic, deployed, tmp_path):
    given, *_ = deployed
    exported = deployment.deploy(given, tmp_path, arithmetic=arithmetic, flip_budget=1.0)
    about = json.loads((exported.saved_model / "assets.extra" / "card.json").read_text())["about"]
    assert about["data"] == "digits"
    assert about["trained"]["test_examples"] == 360
    assert "test_accuracy" not in about
    exact = about["arithmetic"]
    assert exact["kind"] == arithmetic
    largest = (255 - given.preprocessing.mean[0]) / given.preprocessing.std[0]
    assert largest <= exact["input_limit"] < 2 * largest
    assert exact["input_step"] == exact["input_limit"] / 8192
    assert 20 < exact["largest_sum_bits"] <= 24
    assert exact["examples"] == 16
    assert all(report.flip_budget == 0 and report.exportable for report in exported.reports)
    make = {"exact": export.exact_copy, "integer": export.integer_copy}[arithmetic]
    copy = make(given.model, export.Grid(exact["input_step"], exact["input_limit"]))
    x = np.asarray(given.preprocessing(given.examples))
    classes = [model.predict(x, verbose=0).argmax(-1) for model in (copy, given.model)]
    assert exact["same_class_as_trained"] == np.mean(classes[0] == classes[1]) > 0.5
    logits = export.OnnxRuntime(exported.onnx[0]).run({"image": given.examples})["logits"]
    np.testing.assert_allclose(logits, copy.predict(x, verbose=0), atol=1e-6)
    # What is there is compared with the copy again, not with the trained network.
    report = deployment.verify(given, tmp_path / "digits")
    assert report.exportable
    assert report.flip_budget == 0
    kernels = [
        layer.get_weights()[0] for model in (copy, given.model) for layer in model.layers if layer.name == "conv1"
    ]
    assert not np.array_equal(*kernels)


def test_what_cannot_be_deployed_is_refused_at_once(deployed, tmp_path, monkeypatch):
    given, *_ = deployed
    with pytest.raises(ValueError, match=r"for ONNX files, and none is to be written.*weight_bits=8"):
        deployment.deploy(given, tmp_path, onnx=(), weight_bits=8)
    with pytest.raises(ValueError, match="for ONNX files, and none is to be written"):
        deployment.deploy(given, tmp_path, onnx=(), fold_thresholds=True)
    with pytest.raises(ValueError, match="arithmetic='exact', weight_bits=8; leave one out"):
        deployment.deploy(given, tmp_path, arithmetic="exact", weight_bits=8)
    with pytest.raises(
        ValueError, match=r"made for real inputs, and the data set of digits is not at hand.*--data-dir"
    ):
        deployment.deploy(dataclasses.replace(given, examples=None), tmp_path, arithmetic="integer")
    with pytest.raises(ValueError, match=r"arithmetic is one of \('float', 'exact', 'integer'\).*Received .*'whole'"):
        deployment.deploy(given, tmp_path, arithmetic="whole")
    with pytest.raises(ValueError, match="Received the name '7'"):
        deployment.deploy(dataclasses.replace(given, name="7"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told_before_it_is_trained(tmp_path, monkeypatch, capsys):
    recipe = recipes.get("digits")
    deployment.check(recipe)
    with pytest.raises(ValueError, match=r"trains a representation network \(timesteps=0\).*timesteps=N"):
        deployment.check(dataclasses.replace(recipe, timesteps=0))
    with pytest.raises(ValueError, match="Received the name 'two words'"):
        deployment.check(dataclasses.replace(recipe, name="two words"))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else name)
        with pytest.raises(ImportError, match=r"needs the packages tf2onnx. Install .*keras-dsr\[export\]"):
            deployment.check(recipe)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert cli.main(["train", "digits", "--runs", str(tmp_path / "runs"), "--export", str(tmp_path)]) == 1
    assert "Export needs Keras on TensorFlow. It runs on 'jax'" in capsys.readouterr().err
    assert list((tmp_path / "runs").iterdir()) == []


def test_another_network_is_not_what_was_exported(deployed, run):
    _, base, _ = deployed
    other = deployment.source(run, examples=16)
    neuron = other.model.get_layer("neuron2")
    neuron.threshold.assign(neuron.threshold * 0.5)
    report = deployment.verify(other, base / "digits")
    assert not report.passed
    assert any("neuron2" in row.reason for row in report.rows)


@pytest.mark.parametrize("name", ["vgg5-nmnist", "vgg5-poker_dvs"])
def test_presets_have_all_that_an_export_wants_but_examples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_DSR_DATA", str(tmp_path))
    given = deployment.source(name)
    assert given.name == name
    assert given.preprocessing is None, "frames of events are counts"
    assert given.examples is None
    assert given.about["preset"]["sha256"] == presets.card("vgg5", name.partition("-")[2])[0].sha256
    assert given.model.output_shape == (None, len(given.about["classes"]))
    network, _, weights = name.partition("-")
    _, path = presets.card(network, weights)
    with np.load(path.with_suffix(".npz")) as archive:
        for received, expected in zip(given.model.get_weights(), archive.values(), strict=True):
            assert np.array_equal(received, expected)
    with pytest.raises(ValueError, match=rf"data set of {name} is not at hand.*--data-dir"):
        deployment.verify(given, None)
    with pytest.raises(FileNotFoundError, match="is not at"):
        deployment.source(name, data_dir=tmp_path)


def test_presets_take_examples_from_the_default_place(unpacked, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_DSR_DATA", str(unpacked("pokerdvs")))
    monkeypatch.setenv("KERAS_DSR_CACHE", str(tmp_path))
    given = deployment.source("vgg5-poker_dvs", examples=3)
    assert given.examples.shape == (3, *given.model.input_shape[1:])
    assert given.examples.any()


def test_what_is_neither_a_run_nor_a_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'nothing' is neither a run folder nor a preset.*vgg5-nmnist"):
        deployment.source("nothing")
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json"):
        deployment.source(tmp_path)
    with pytest.raises(ValueError, match=r"at least 1\. Received examples=0"):
        deployment.source("vgg5-nmnist", examples=0)


def test_a_folder_without_versions_is_refused(deployed, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder named by a number"):
        deployment.verify(deployed[0], tmp_path)


def test_the_command_line_exports_and_verifies(run, tmp_path, capsys):
    base = tmp_path / "savedmodels"
    arguments = ["--to", str(base), "--name", "eight", "--onnx", "loop", "--weight-bits", "8", "--examples", "8"]
    assert cli.main(["export", str(run), *arguments, "--flip-budget", "1e-4"]) == 0
    printed = capsys.readouterr().out
    assert "verified against Keras on 8 real inputs" in printed
    assert "1-loop-8bit.onnx" in printed
    assert "exported forms against Keras, 8 inputs" in printed
    assert "random" not in printed
    assert export.report_of(base / "eight" / "1").flip_budget == 1e-4
    report = tmp_path / "report.json"
    arguments = ["verify", str(base / "eight"), str(run), "--examples", "8", "--report", str(report)]
    assert cli.main(arguments) == 0
    told = json.loads(report.read_text())
    assert told["passed"]
    assert {(row["file"], row["reference"]) for row in told["rows"]} == {
        ("eight/1", ""),
        ("1-loop-8bit.onnx", "8-bit copy"),
    }
    assert "bit-equal" in capsys.readouterr().out


def test_exact_exports_that_cannot_be_compared_again(deployed, tmp_path):
    given, *_ = deployed
    exported = deployment.deploy(given, tmp_path, arithmetic="exact", onnx=())
    path = exported.saved_model / "assets.extra" / "card.json"
    card = json.loads(path.read_text())
    card["about"]["arithmetic"]["sha256"] = "0" * 64
    path.write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"exact copy of another network, or by a keras_dsr that rounds otherwise \("):
        deployment.verify(given, tmp_path / "digits")
    unknown = {**card, "about": {"arithmetic": {**card["about"]["arithmetic"], "kind": "whole"}}}
    other = {**card, "about": {"arithmetic": {**card["about"]["arithmetic"], "input_step": "fine"}}}
    for damaged in (
        "{",
        "{}",
        "[]",
        json.dumps({**card, "about": {"arithmetic": True}}),
        *map(json.dumps, (other, unknown)),
    ):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"card\.json is damaged .*Export the version again"):
            deployment.verify(given, tmp_path / "digits")


def test_the_command_line_exports_an_exact_network(run, tmp_path, capsys):
    arguments = ["--to", str(tmp_path), "--onnx", "none", "--examples", "8", "--arithmetic", "exact"]
    assert cli.main(["export", str(run), *arguments]) == 0
    assert export.report_of(tmp_path / "digits" / "1").flip_budget == 0
    assert cli.main(["verify", str(tmp_path / "digits"), str(run), "--examples", "8", "--flip-budget", "0"]) == 0
    assert cli.main(["export", str(run), "--to", str(tmp_path), "--arithmetic", "exact", "--weight-bits", "8"]) == 1
    assert "arithmetic='exact', weight_bits=8" in capsys.readouterr().err


def test_the_command_line_says_no_to_an_export_that_differs(run, deployed, tmp_path, capsys):
    _, base, exported = deployed
    other = shutil.copytree(run, tmp_path / "digits")
    model = keras.models.load_model(other / "model.keras")
    neuron = model.get_layer("neuron2")
    neuron.threshold.assign(neuron.threshold * 0.5)
    model.save(other / "model.keras")
    files = ["--onnx", str(exported.onnx[0]), "--onnx", str(exported.onnx[1])]
    assert cli.main(["verify", str(base / "digits" / "1"), *files, str(other), "--examples", "8"]) == 1
    assert "does not do as" in capsys.readouterr().err


def test_the_command_line_tells_why_export_cannot_run(run, tmp_path, monkeypatch, capsys):
    def deploy(*_, **__):
        raise RuntimeError("Export needs Keras on TensorFlow.")

    monkeypatch.setattr(deployment, "deploy", deploy)
    assert cli.main(["export", str(run), "--to", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "keras-dsr: Export needs Keras on TensorFlow.\n"
    assert cli.main(["export", str(run), "--to", str(tmp_path), "--examples", "-1"]) == 1
    assert "Received examples=-1" in capsys.readouterr().err


def test_unknown_forms_of_onnx_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--onnx", "rolled"])
    assert "expected some of unrolled, loop, step" in capsys.readouterr().err

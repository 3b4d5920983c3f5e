"""From a run folder or a preset to what is served."""

from __future__ import annotations

import json

import numpy as np
import pytest

from keras_dsr import cli, data, deployment, recipes, training
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
    expected = session.run(["class"], {"image": given.examples[:1]})
    assert str(expected[0][0]) in capsys.readouterr().out


def test_an_export_is_compared_again_with_the_files_of_its_version(deployed):
    given, base, exported = deployed
    report = deployment.verify(given, base / "digits")
    assert report.passed
    assert {row.file for row in report.rows} == {"digits/1", "1.onnx", "1-step.onnx"}
    assert deployment.verify(given, exported.saved_model, [exported.onnx[0]]).passed


def test_another_network_is_not_what_was_exported(deployed, run):
    _, base, _ = deployed
    other = deployment.source(run, examples=16)
    neuron = other.model.get_layer("neuron2")
    neuron.threshold.assign(neuron.threshold * 0.5)
    report = deployment.verify(other, base / "digits")
    assert not report.passed
    assert any("neuron2" in row.reason for row in report.rows)


@pytest.mark.parametrize("name", ["vgg5-nmnist", "vgg5-poker_dvs"])
def test_presets_have_all_that_an_export_wants_but_examples(name):
    given = deployment.source(name)
    assert given.name == name
    assert given.preprocessing is None, "frames of events are counts"
    assert given.examples is None
    assert given.about["preset"]["sha256"] == presets.card("vgg5", name.partition("-")[2])[0].sha256
    assert given.model.output_shape == (None, len(given.about["classes"]))
    with pytest.raises(ValueError, match="takes real inputs"):
        deployment.verify(given, None)


def test_what_is_neither_a_run_nor_a_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'nothing' is neither a run folder nor a preset.*vgg5-nmnist"):
        deployment.source("nothing")
    with pytest.raises(FileNotFoundError, match=r"no recipe\.json"):
        deployment.source(tmp_path)


def test_a_folder_without_versions_is_refused(deployed, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder named by a number"):
        deployment.verify(deployed[0], tmp_path)


def test_the_command_line_exports_and_verifies(run, tmp_path, capsys):
    base = tmp_path / "savedmodels"
    assert cli.main(["export", str(run), "--to", str(base), "--onnx", "loop", "--examples", "8"]) == 0
    printed = capsys.readouterr().out
    assert "verified against Keras" in printed
    assert "1-loop.onnx" in printed
    report = tmp_path / "report.json"
    arguments = ["verify", str(base / "digits"), str(run), "--examples", "8", "--report", str(report)]
    assert cli.main(arguments) == 0
    assert json.loads(report.read_text())["passed"]
    assert "bit-equal" in capsys.readouterr().out


def test_the_command_line_says_no_to_an_export_that_differs(run, deployed, tmp_path, capsys):
    _, base, _ = deployed
    other = tmp_path / "digits"
    settings = {"epochs": "1", "widths": "4,8", "timesteps": "4", "train_examples": "320", "seed": "1"}
    training.train(recipes.get("digits").with_settings(settings), other, verbose=0)
    assert cli.main(["verify", str(base / "digits" / "1"), str(other), "--examples", "8"]) == 1
    assert "does not do as" in capsys.readouterr().err


def test_unknown_forms_of_onnx_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        cli.main(["export", str(run), "--onnx", "rolled"])
    assert "expected some of unrolled, loop, step" in capsys.readouterr().err

"""Versions for TensorFlow Serving: whole, verified, never overwritten."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dsr import layers, models
from keras_dsr.files import workspace
from keras_dsr.stream import Stream

pytestmark = pytest.mark.tensorflow_only
tf = pytest.importorskip("tensorflow")
pytest.importorskip("tensorflow_serving")
from keras_dsr.export import (  # noqa: E402
    Session,
    VerificationError,
    c_api,
    card,
    export_saved_model,
    report_of,
    tf_serving,
)
from keras_dsr.export import saved_model as module  # noqa: E402

SERVING_FILES = {"batching.config", "docker-compose.yml", "models.config", "monitoring.config"}


def tiny(threshold: float = 0.5) -> keras.Model:
    """The smallest network: an export takes a second."""
    inputs = keras.Input((3,), name="x")
    x = layers.IFSpike(timesteps=2, threshold=threshold, name="neuron")(keras.layers.Dense(4, name="dense")(inputs))
    return keras.Model(inputs, layers.SpikeRep(name="readout")(x), name="tiny")


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_version_has_all_that_it_needs(exported):
    one = exported("small_if")
    assert one.version.name == "1"
    assert {path for path in entries(one.version) if (one.version / path).is_file()} == {
        "saved_model.pb",
        "fingerprint.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
        tf_serving.WARM_UP,
        "assets.extra/card.json",
        "assets.extra/README.md",
    }
    assert {path.name for path in one.version.parents[1].iterdir()} == SERVING_FILES | {"small_if"}
    mask = os.umask(0)
    os.umask(mask)
    for path in (one.version, *one.version.rglob("*")):  # the server may run as another user
        readable = (stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH) & ~mask
        assert path.stat().st_mode & readable == readable


def test_the_card_says_what_it_is(exported):
    one = exported("small_if")
    told = json.loads((one.version / "assets.extra/card.json").read_text())
    assert (told["name"], told["model"], told["timesteps"], told["input"]) == ("small_if", "small_cnn", 4, "static")
    assert told["preprocessing"] == {"mean": [33.0], "std": [70.0], "dtype": "uint8"}
    assert told["parameters"] == one.model.count_params()
    assert told["neurons"][0] == {"layer": "neuron1", "type": "IFSpike", "threshold": 1.0, "alpha": 0.5}
    assert list(told["signatures"]) == ["serving_default", "step", "initial_state", "trace"]
    assert told["signatures"]["serving_default"] == {
        "inputs": {"image": {"dtype": "uint8", "shape": [None, 8, 8, 1]}},
        "outputs": {
            "class": {"dtype": "int64", "shape": [None]},
            "logits": {"dtype": "float32", "shape": [None, 10]},
            "probabilities": {"dtype": "float32", "shape": [None, 10]},
        },
    }
    assert told["verification"]["passed"]
    assert not told["verification"]["random"]
    assert {row["file"] for row in told["verification"]["rows"]} == {"small_if"}
    report = report_of(one.version)
    assert report.passed
    assert [row.file for row in report.rows] == ["small_if/1"] * 4
    assert [row.examples for row in report.rows] == [len(one.x)] * 4
    assert told["files"]["saved_model.pb"] == card.sha256(one.version / "saved_model.pb")
    assert set(told["files"]) == {
        path for path in entries(one.version) if (one.version / path).is_file() and not path.endswith((".json", ".md"))
    }
    assert {"keras", "keras_dsr", "numpy", "tensorflow"} == set(told["versions"])
    text = (one.version / "assets.extra/README.md").read_text()
    assert text.startswith("# small_if\n")
    assert "Clients send uint8; the network itself subtracts the mean 33 and divides by 70." in text
    assert "| neuron1 | IFSpike | 1.0 | 0.5 |  |  |" in text
    lif = json.loads((exported("small_lif").version / "assets.extra/card.json").read_text())["neurons"][0]
    assert (lif["threshold"], lif["tau"], lif["dt"]) == (0.1, 1.0, 0.3)


@pytest.mark.parametrize("name", ["small_if", "frames"])
def test_warm_up_requests_are_requests(name, exported):
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    one = exported(name)
    seen = []
    with Session(one.version) as session:
        for record in tf.data.TFRecordDataset(str(one.version / tf_serving.WARM_UP)):
            request = PredictionLog.FromString(record.numpy()).predict_log.request
            inputs = {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
            session.run(request.model_spec.signature_name, inputs)
            seen.append((request.model_spec.name, request.model_spec.signature_name, len(next(iter(inputs.values())))))
    signatures = ("serving_default", "step", "initial_state", "trace")
    assert seen == [*((name, signature, 1) for signature in signatures), (name, "serving_default", len(one.x))]


@pytest.mark.parametrize("name", ["preact_resnet18_if", "vgg11_if"])
def test_golden_networks_have_every_spike(name, golden, tmp_path):
    """All numbers are dyadic, so that sums are exact in any order: not one spike may differ."""
    network = golden(name)
    model, arrays, x = network.model, network.arrays, network.x
    version = export_saved_model(model, tmp_path / name, examples=x[:2])
    told = json.loads((version / "assets.extra/card.json").read_text())["verification"]
    assert [row["form"] for row in told["rows"]] == ["serving_default", "trace", "step", "step, interleaved"]
    for row in told["rows"]:
        assert row["bit_equal"]
        assert not row["flipped"]
        assert not row["count_differences"]
    assert told["silent"] == []
    with Session(version) as session:
        traced = session.run("trace", {told_input(version): x})
    for layer, expected in zip(network.layers, arrays["eval_spike_counts_per_step"], strict=True):
        np.testing.assert_array_equal(traced[f"{layer}_spikes"].sum(0), expected, err_msg=layer)
    np.testing.assert_allclose(traced["logits"], arrays["eval_output"], rtol=1e-5, atol=1e-5)


def told_input(version: Path) -> str:
    return next(iter(c_api.signatures(version)["serving_default"].inputs))


def test_versions_count_up_and_are_never_overwritten(tmp_path):
    base = tmp_path / "models" / "tiny"
    about = {"accuracy": 0.5, "data": "none"}
    one = export_saved_model(tiny(), base, about=about)
    before = {path: (one / path).read_bytes() for path in entries(one) if (one / path).is_file()}
    (base / "7").mkdir()
    (base / "9").write_text("not a version")
    two = export_saved_model(tiny(0.25), base, signatures=["serving_default"])
    assert (one.name, two.name) == ("1", "10")
    assert {path: (one / path).read_bytes() for path in before} == before
    assert list(c_api.signatures(two)) == ["serving_default"]
    assert not list((base / "7").iterdir())
    text = (one / "assets.extra/README.md").read_text()
    assert "- accuracy: 0.5\n- data: none\n" in text
    assert "The examples were random ones" in text
    assert report_of(one).random


def test_two_exports_that_want_the_same_number(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_serving, "versions", lambda base: [])
    base = tmp_path / "tiny"
    for number in (1, 2, 3):
        folder = tmp_path / f".new{number}"
        folder.mkdir()
        (folder / "file").write_text(str(number))
        assert module._place(folder, base) == base / str(number)
    assert [(base / str(number) / "file").read_text() for number in (1, 2, 3)] == ["1", "2", "3"]


def test_a_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    def rename(self, target):
        raise OSError(errno.EROFS, "read-only")

    folder = tmp_path / ".new"
    folder.mkdir()
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="read-only"):
        module._place(folder, tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_a_version_that_differs_leaves_nothing(tmp_path, monkeypatch):
    original = Session.run

    def run(self, signature, tensors):
        outputs = original(self, signature, tensors)
        if signature == "trace":
            outputs["neuron_spikes"] += 1
        return outputs

    monkeypatch.setattr(Session, "run", run)
    with pytest.raises(VerificationError, match=r"First: 'trace' of tiny in TensorFlow .*, C API.* in layer 'neuron'"):
        export_saved_model(tiny(), tmp_path / "tiny")
    assert entries(tmp_path) == set()


def test_a_full_disk_leaves_nothing(tmp_path):
    version = export_saved_model(tiny(), tmp_path / "tiny", signatures=["serving_default"])
    before = entries(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((version / "saved_model.pb").stat().st_size - 1, hard))
    try:
        with pytest.raises(Exception, match="too large"):
            export_saved_model(tiny(), tmp_path / "tiny", signatures=["serving_default"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == before


EXPORT_AND_WAIT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_saved_model as tests
original = tests.module._synchronize
def wait(folder):
    original(folder)
    print("ready", flush=True)
    sys.stdin.readline()
tests.module._synchronize = wait
tests.export_saved_model(tests.tiny(), sys.argv[2], signatures=["serving_default"])
"""


def test_a_killed_export_leaves_the_served_folder_as_it_was(tmp_path):
    """Killed with all written but the rename. What it left is removed by the next export, but not while it lives."""
    base = tmp_path / "tiny"
    command = [sys.executable, "-c", EXPORT_AND_WAIT, str(Path(__file__).parent), str(base)]
    environment = {**os.environ, "PYTHONPATH": str(Path(layers.__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".tiny-exporting-")
        assert (left / "saved_model.pb").is_file()
        assert export_saved_model(tiny(), base, signatures=["serving_default"]).name == "1"
        before = entries(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert entries(tmp_path) == before
    with workspace(base) as living:
        assert export_saved_model(tiny(), base, signatures=["serving_default"]).name == "2"
        assert living.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == SERVING_FILES | {"tiny"}
    assert {path.name for path in base.iterdir()} == {"1", "2"}


def test_models_that_cannot_run_step_by_step_are_told_how(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Mine(layers.base.StreamLayer):
        def build(self, input_shape):
            """There is nothing to build."""

        def call(self, inputs):
            values, representation = inputs
            return Stream(values * 2, representation * 2)

    inputs = keras.Input((3,))
    x = Mine(name="mine")(layers.IFSpike(timesteps=2, threshold=0.5)(keras.layers.Dense(4)(inputs)))
    model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=0.5)(x)))
    with pytest.raises(ValueError, match=r"Mine 'mine' takes streams .*signatures=\('serving_default', 'trace'\)"):
        export_saved_model(model, tmp_path / "mine")
    version = export_saved_model(model, tmp_path / "mine", signatures=("serving_default", "trace"))
    assert list(c_api.signatures(version)) == ["serving_default", "trace"]


def test_a_link_to_another_place_gets_its_versions_there(tmp_path):
    """What is renamed must be on the file system that it is renamed on."""
    (tmp_path / "elsewhere/store").mkdir(parents=True)
    (tmp_path / "served").mkdir()
    (tmp_path / "served/tiny").symlink_to(tmp_path / "elsewhere/store")
    original = Path.rename

    def rename(self, target):
        assert self.parent == tmp_path / "elsewhere", "another disk, for all that is known"
        return original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        version = export_saved_model(tiny(), tmp_path / "served/tiny", signatures=["serving_default"])
    assert version == tmp_path / "served/tiny/1"
    assert (tmp_path / "elsewhere/store/1/saved_model.pb").is_file()
    assert json.loads((version / card.CARD).read_text())["name"] == "tiny"
    assert 'base_path: "/models/tiny"' in (tmp_path / "served/models.config").read_text()


def test_bad_input(tmp_path, monkeypatch):
    model = tiny()
    with pytest.raises(ValueError, match=r"'small_cnn' is a representation network.*with_timesteps"):
        export_saved_model(models.small_cnn((2,), timesteps=0), tmp_path / "ann")
    with pytest.raises(ValueError, match=r"The model's folder has the model's name.*Received the name '1'"):
        export_saved_model(model, tmp_path / "tiny" / "1")
    with pytest.raises(ValueError, match="The model's folder"):
        export_saved_model(model, tmp_path / "two words")
    with pytest.raises(ValueError, match=r"with 'serving_default', which clients call. Received \('trace',\)"):
        export_saved_model(model, tmp_path / "tiny", signatures=["trace"])
    with pytest.raises(ValueError, match=r"signatures are some of .* Received \['other'\]"):
        export_saved_model(model, tmp_path / "tiny", signatures=["serving_default", "other"])
    with pytest.raises(ValueError, match=r"compared on float32 inputs of shape \(None, 3\), at least one. Received"):
        export_saved_model(model, tmp_path / "tiny", examples=np.zeros((2, 4), "float32"))
    with pytest.raises(ValueError, match="`about` goes on the card, and so must be of what JSON has"):
        export_saved_model(model, tmp_path / "tiny", about={"model": model})
    with pytest.raises(ValueError, match="`about` goes on the card"):
        export_saved_model(model, tmp_path / "tiny", about={"accuracy": float("nan")})
    (tmp_path / "models.config").write_text("{ no")
    with pytest.raises(ValueError, match=r"models.config is not a configuration that TensorFlow Serving reads"):
        export_saved_model(model, tmp_path / "tiny")
    (tmp_path / "models.config").unlink()
    monkeypatch.setitem(sys.modules, "tensorflow_serving.config.model_server_config_pb2", None)
    with pytest.raises(
        ImportError, match=r"tensorflow-serving-api. Install it with: pip install 'keras-dsr\[export\]'"
    ):
        export_saved_model(model, tmp_path / "tiny")
    assert entries(tmp_path) == set()


def test_inputs_of_any_size_need_examples(tmp_path):
    inputs = keras.Input((2, None, 3))
    x = layers.IFSpike(timesteps=2, threshold=0.5)(keras.layers.Dense(4)(inputs))
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(layers.SpikeRep()(x)), name="any")
    signatures = ("serving_default", "trace")
    with pytest.raises(ValueError, match=r"'any' takes inputs of any size, \(4, 2, None, 3\): pass examples"):
        export_saved_model(model, tmp_path / "any", signatures=signatures)
    x = np.random.default_rng(0).normal(size=(2, 2, 5, 3)).astype("float32")
    assert export_saved_model(model, tmp_path / "any", signatures=signatures, examples=x).is_dir()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    try:
        model = tiny()
    finally:
        keras.config.set_dtype_policy("float32")
    version = export_saved_model(model, tmp_path / policy)
    assert c_api.signatures(version)["step"].inputs["potential_neuron"].dtype == "float32"


class TestServingFiles:
    """The folder that `docker compose up` runs in."""

    def models(self, folder: Path) -> list[tuple[str, str]]:
        config = tf_serving._read(folder / "models.config").model_config_list.config
        return [(entry.name, entry.base_path) for entry in config]

    def version(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "saved_model.pb").touch()

    def test_models_are_added(self, tmp_path):
        for name in ("b/1", "a/12", ".hidden/1", "empty/notes"):
            self.version(tmp_path / name)
        (tmp_path / "dates/2026").mkdir(parents=True)
        tf_serving.serve(tmp_path)
        assert self.models(tmp_path) == [("a", "/models/a"), ("b", "/models/b")]
        (tmp_path / "empty/notes").rename(tmp_path / "empty/1")
        tf_serving.serve(tmp_path)
        assert self.models(tmp_path) == [("a", "/models/a"), ("b", "/models/b"), ("empty", "/models/empty")]

    def test_what_was_changed_stays(self, tmp_path):
        self.version(tmp_path / "a/1")
        mine = 'model_config_list { config { name: "a" base_path: "/elsewhere" model_platform: "tensorflow" } }'
        (tmp_path / "models.config").write_text(mine)
        (tmp_path / "docker-compose.yml").write_text("mine")
        tf_serving.serve(tmp_path)
        assert (tmp_path / "models.config").read_text() == mine
        assert (tmp_path / "docker-compose.yml").read_text() == "mine"
        self.version(tmp_path / "b/1")
        tf_serving.serve(tmp_path)
        assert self.models(tmp_path) == [("a", "/elsewhere"), ("b", "/models/b")]

    def test_another_process_that_writes_last(self, tmp_path, monkeypatch):
        """It read models.config before ours was written: ours looks again, and adds what it misses."""
        self.version(tmp_path / "a/1")
        self.version(tmp_path / "b/1")
        original = tf_serving._add_models
        calls = []

        def add(folder):
            result = original(folder)
            calls.append(result)
            if len(calls) == 1:
                (folder / "models.config").write_text(
                    'model_config_list { config { name: "b" base_path: "/models/b" model_platform: "tensorflow" } }'
                )
            return result

        monkeypatch.setattr(tf_serving, "_add_models", add)
        tf_serving.serve(tmp_path)
        assert calls == [True, True, False]
        assert sorted(self.models(tmp_path)) == [("a", "/models/a"), ("b", "/models/b")]

    def test_what_docker_runs_is_there(self, tmp_path):
        tf_serving.serve(tmp_path)
        compose = (tmp_path / "docker-compose.yml").read_text()
        for name in ("batching.config", "monitoring.config"):
            assert f"/models/{name}" in compose
            assert (tmp_path / name).is_file()
        assert "--model_config_file=/models/models.config" in compose
        assert not (tmp_path / "models.config").exists()

    def test_another_kind_of_configuration_is_refused(self, tmp_path):
        (tmp_path / "models.config").write_text("custom_model_config { }")
        with pytest.raises(ValueError, match="has no model_config_list"):
            tf_serving.check_config(tmp_path)

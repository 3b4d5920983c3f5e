"""New versions and broken ones under requests, warm-up, start and stop."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from serving import toy
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from keras_dsr import cli
from keras_dsr.serving import Client, Code, Server, ServingError, Settings, model_folders

pytestmark = pytest.mark.tensorflow_only

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_versions_change_and_no_request_fails(fresh, versions, publish, until, image):
    """Requests all the while: each answer is of a version that was there, and never of an older one than before."""
    answered, failures, stopped = [], [], threading.Event()

    def ask():
        with Client(fresh.grpc, toy.NAME, retries=0) as client:
            newest = 0
            while not stopped.is_set():
                try:
                    answer = client.answer(image)
                except ServingError as error:
                    failures.append(error)
                    continue
                scale = 3 if answer.version == 10 else answer.version
                if answer.version < newest or not np.allclose(
                    answer.outputs["logits"], toy.logits(image, scale), rtol=1e-5
                ):
                    failures.append(answer)
                newest = answer.version
                answered.append(newest)
                time.sleep(0.005)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        with Client(fresh.rest, toy.NAME, transport="rest") as client:
            until(lambda: 1 in answered)
            publish(versions[2], fresh.base)
            until(lambda: client.status().get(2) == "AVAILABLE" and client.status()[1] == "END")
            publish(versions[9], fresh.base)
            until(lambda: client.status().get(9, "").startswith("END: "))
            status = client.status()
            assert status[2] == "AVAILABLE"
            assert len(status[9]) > len("END: "), "the reason is said"
            np.testing.assert_allclose(client.predict(image)["logits"], toy.logits(image, 2), rtol=1e-6)
            publish(versions[3], fresh.base, number=10)  # above the broken one
            until(lambda: client.status().get(10) == "AVAILABLE" and 10 in answered)
            np.testing.assert_allclose(client.predict(image)["logits"], toy.logits(image, 3), rtol=1e-6)
            with pytest.raises(ServingError) as error, Client(fresh.grpc, toy.NAME, 1) as old:
                old.predict(image)
            assert error.value.code is Code.NOT_FOUND
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert {1, 2, 10} == set(answered)


def test_a_stream_goes_on_in_a_new_version(fresh, versions, publish, until):
    with Client(fresh.grpc, toy.NAME) as client:
        stream = client.stream()
        stream.step(np.ones((1, 3)))
        publish(versions[2], fresh.base)
        until(lambda: client.status().get(2) == "AVAILABLE")
        np.testing.assert_allclose(stream.step(np.ones((1, 3)))["logits"], 2 * 2)


class TestWarmUp:
    def write(self, version: Path, image, signature="serving_default"):
        request = predict_pb2.PredictRequest()
        request.model_spec.signature_name = signature
        request.inputs["image"].CopyFrom(tf.make_tensor_proto(image))
        log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
        (version / "assets.extra").mkdir()
        with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
            writer.write(log.SerializeToString())

    @pytest.mark.parametrize("works", [True, False])
    def test_it_runs_before_the_version_is_served(
        self, fresh, versions, publish, until, tmp_path_factory, image, works
    ):
        if not fresh.ours and not works:
            pytest.skip("what a stock server makes of it depends on the model")
        version = tmp_path_factory.mktemp("warm") / "2"
        shutil.copytree(versions[2], version)
        self.write(version, image if works else image[:, :3])
        publish(version, fresh.base)
        with Client(fresh.grpc, toy.NAME) as client:
            if works:
                until(lambda: client.status().get(2) == "AVAILABLE")
            else:
                until(lambda: client.status().get(2, "").startswith("END: Input 'image' takes float32"))
                assert client.status()[1] == "AVAILABLE"

    def test_other_logs_are_refused(self, versions, tmp_path):
        version = tmp_path / "1"
        shutil.copytree(versions[1], version)
        (version / "assets.extra").mkdir()
        with tf.io.TFRecordWriter(str(version / "assets.extra" / "tf_serving_warmup_requests")) as writer:
            writer.write(prediction_log_pb2.PredictionLog(classify_log={}).SerializeToString())
        with toy.start_ours(tmp_path) as running, Client(running.grpc, toy.NAME) as client:
            assert "request 1 is a classify_log. Write predict_log only." in client.status()[1]


class TestStart:
    def test_a_port_that_is_taken(self, versions, publish, tmp_path):
        publish(versions[1], tmp_path)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(OSError, match=f"gRPC cannot listen at 127.0.0.1:{port}: .*--grpc-port"):
                Server({"toy": tmp_path}, Settings(grpc_port=port, rest_port=0)).start()
            with pytest.raises(OSError, match=f"REST cannot listen at 127.0.0.1:{port}: .*--rest-port"):
                Server({"toy": tmp_path}, Settings(grpc_port=0, rest_port=port)).start()

    def test_two_servers_do_not_share_a_port(self, ours, tmp_path):
        port = int(ours().grpc.split(":")[1])
        with pytest.raises(OSError, match="gRPC cannot listen"):
            Server({"toy": tmp_path}, Settings(grpc_port=port, rest_port=0)).start()

    def test_ports_are_given_back_where_it_fails(self, versions, publish, tmp_path, monkeypatch):
        publish(versions[1], tmp_path)

        def stop_here(self):
            raise KeyboardInterrupt

        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
            grpc_port, rest_port = (each.getsockname()[1] for each in sockets)
        ports = {"grpc_port": grpc_port, "rest_port": rest_port}
        with monkeypatch.context() as patch:
            patch.setattr("keras_dsr.serving.manager.Manager.start", stop_here)
            with pytest.raises(KeyboardInterrupt):
                Server({"toy": tmp_path}, Settings(**ports)).start()
        with toy.start_ours(tmp_path, **ports) as running, Client(running.grpc, toy.NAME) as client:
            assert client.status() == {1: "AVAILABLE"}

    def test_it_has_addresses_once_it_was_started(self, tmp_path):
        server = Server({"toy": tmp_path}, Settings(grpc_port=0, rest_port=0))
        with pytest.raises(RuntimeError, match="once it was started"):
            server.grpc_address  # noqa: B018 - a property
        server.stop()

    def test_it_starts_once(self, tmp_path):
        server = Server({"toy": tmp_path}, Settings(grpc_port=0, rest_port=0))
        with server, pytest.raises(RuntimeError, match="A server starts once"):
            server.start()

    def test_folders(self, versions, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"'toy' should be in .*missing, which is"):
            Server({"toy": tmp_path / "missing"})
        with pytest.raises(ValueError, match="is one version"):
            Server({"toy": versions[1]})
        with pytest.raises(ValueError, match="no spaces, slashes and colons"):
            Server({"a/b": tmp_path})
        with pytest.raises(ValueError, match="There is no model to serve"):
            Server({})

    def test_words(self, tmp_path):
        assert model_folders([f"{tmp_path}/", f"other={tmp_path}"]) == {tmp_path.name: tmp_path, "other": tmp_path}
        folder = tmp_path / "lr=0.1"
        assert model_folders([str(folder), f"small={folder}"]) == {"lr=0.1": folder, "small": folder}
        with pytest.raises(ValueError, match="Two models are called 'a'"):
            model_folders(["a=x", "a=y"])

    @pytest.mark.parametrize(("settings", "says"), [
        ({"grpc_port": 70000}, "grpc_port must be a port"),
        ({"grpc_port": 9000, "rest_port": 9000}, "a port each"),
        ({"max_queue": 0}, "max_queue must be at least 1"),
        ({"max_examples": 0}, "max_examples must be at least 1"),
        ({"max_request_bytes": 2**31}, "max_request_bytes must be below 2 GiB"),
        ({"poll": 0}, "poll must be a time above 0"),
        ({"grace": -1}, "grace must be a time in seconds"),
    ])  # fmt: skip
    def test_settings(self, settings, says):
        with pytest.raises(ValueError, match=says):
            Settings(**settings)

    def test_command_line(self, monkeypatch, capsys):
        got = []
        monkeypatch.setattr("keras_dsr.serving.run", lambda models, settings: got.append((models, settings)))
        words = ["serve", "small=models/a=b", "--max-examples", "7", "--max-request-mb"]
        assert cli.main([*words, "2"]) == 0
        assert got == [({"small": Path("models/a=b")}, Settings(max_examples=7, max_request_bytes=2 * 2**20))]
        assert cli.main([*words, "2048"]) == 1
        assert "keras-dsr: max_request_bytes must be below 2 GiB" in capsys.readouterr().err

    def test_a_base_without_versions_waits_for_one(self, versions, publish, tmp_path, until, image):
        with toy.start_ours(tmp_path) as running, Client(running.grpc, toy.NAME) as client:
            with pytest.raises(ServingError, match="Could not find any versions"):
                client.status()
            publish(versions[1], tmp_path)

            def served():
                try:
                    return client.status() == {1: "AVAILABLE"}
                except ServingError:
                    return False

            until(served)
            client.predict(image)

    def test_files_that_are_no_model(self, tmp_path):
        (tmp_path / "1").mkdir()
        (tmp_path / "2").mkdir()
        (tmp_path / "2" / "saved_model.pb").write_bytes(b"\xff\xff")
        with toy.start_ours(tmp_path) as running, Client(running.grpc, toy.NAME) as client:
            status = client.status()
        assert re.match("END: FileNotFoundError: .* holds no saved_model.pb", status[1])
        assert status[2].startswith("END: ")


def under_way(server) -> int:
    """Number of requests that hold a version of a server of this process."""
    return sum(version.leases for model in server._models._models.values() for version in model.serving.values())


@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_stopping_lets_requests_end(versions, publish, until, tmp_path, transport):
    """What runs comes to its end, and what comes later is refused."""
    publish(versions[1], tmp_path)
    server = Server({toy.NAME: tmp_path}, Settings(grpc_port=0, rest_port=0))
    server.start()
    address = getattr(server, f"{transport}_address")
    with (
        Client(address, toy.NAME, transport=transport, retries=0, timeout=120) as client,
        ThreadPoolExecutor(2) as threads,
    ):
        client.predict(np.array([1], "int32"), "slow")
        seconds = []
        for _ in range(3):
            started = time.monotonic()
            client.predict(np.array([50], "int32"), "slow")
            seconds.append(time.monotonic() - started)
        # Three seconds or more: a machine that is busy as well only takes longer.
        turns = np.array([50 * 3 / min(seconds)], "int32")
        asked = threads.submit(client.predict, turns, "slow")
        until(lambda: under_way(server))
        stopped = threads.submit(server.stop)
        with Client(address, toy.NAME, transport=transport, retries=0, timeout=5) as late:

            def refused():
                try:
                    late.status()
                except ServingError as error:
                    return error.code is Code.UNAVAILABLE
                return False

            until(refused)
        assert not asked.done(), "it was under way as the server refused others"
        assert asked.result(120)["turns"].tolist() == turns.tolist()
        stopped.result(60)


class TestSignals:
    SERVE = "import sys; from keras_dsr import serving; serving.run({'toy': sys.argv[1]}, serving.Settings(grpc_port=0,"
    SERVE += " rest_port=0, grace=float(sys.argv[2])))"

    @contextlib.contextmanager
    def busy(self, base, grace):
        """A process that serves, with a request that takes minutes."""
        command = [sys.executable, "-c", self.SERVE, str(base), str(grace)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
            ThreadPoolExecutor(1) as threads,
        ):
            try:
                address = re.match("toy: gRPC ([^,]+), REST", process.stdout.readline())[1]
                with Client(address, toy.NAME, retries=0, timeout=600) as client:
                    client.predict(np.array([1], "int32"), "slow")
                    asked = threads.submit(client.predict, np.array([10**7], "int32"), "slow")
                    time.sleep(1)
                    process.send_signal(signal.SIGTERM)
                    assert process.stdout.readline().startswith("Stopping")
                    yield process
                    with pytest.raises(ServingError) as error:
                        asked.result(60)
                    assert error.value.code is Code.UNAVAILABLE
            finally:
                process.kill()

    def test_what_does_not_end_within_the_grace_is_cut_off(self, versions, publish, tmp_path):
        publish(versions[1], tmp_path)
        with self.busy(tmp_path, grace=0.5) as process:
            assert process.wait(30) == 0
            assert process.stdout.read() == "What has not come to its end within 0.5 seconds is cut off.\n"

    def test_a_second_one_ends_the_process_at_once(self, versions, publish, tmp_path):
        publish(versions[1], tmp_path)
        with self.busy(tmp_path, grace=600) as process:
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == -signal.SIGINT


def test_load(monkeypatch):
    """The benchmark's minute in short: a server of its own that gets new versions, a broken one and SIGTERM."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results = importlib.import_module("serving_load").run(seconds=6, clients=8)
    assert results["requests"] > 50
    assert (results["failed"], results["wrong"]) == ([], [])
    assert results["exit_status"] == 0
    assert all(results["answered_by_version"].values())

"""`Client` and `Stream`, over gRPC and REST, against either server."""

from __future__ import annotations

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from serving import toy

import keras_dsr.serving
from keras_dsr.serving import Client, Code, ServingError

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture(params=["grpc", "rest"])
def transport(request):
    return request.param


@pytest.fixture
def client(server, transport):
    with Client(getattr(server, transport), toy.NAME, transport=transport) as client:
        yield client


def test_predict(client, image):
    outputs = client.predict(image)
    np.testing.assert_allclose(outputs["logits"], toy.logits(image), rtol=1e-6)
    assert outputs["logits"].dtype == np.float32
    assert outputs["class"].dtype == np.int64
    assert set(outputs) == {"logits", "probabilities", "class"}


def test_a_single_output_keeps_its_name(client):
    outputs = client.predict(np.array([[1, 2], [200, 100]], "uint8"), "pixels")
    assert outputs["sum"].tolist() == [3, 300]
    assert outputs["sum"].dtype == np.int32


def test_types_are_cast_where_that_keeps_their_kind(client, image):
    np.testing.assert_allclose(client.predict(image.astype("float64"))["logits"], toy.logits(image), rtol=1e-6)
    np.testing.assert_allclose(client.predict({"image": image.tolist()})["logits"], toy.logits(image), rtol=1e-6)
    with pytest.raises(ServingError) as error:
        client.predict(np.array([[0.5, 1.5]]), "pixels")
    assert error.value.code is Code.INVALID_ARGUMENT


def test_whole_numbers_are_cast_where_they_fit(client):
    assert client.predict([[1, 2], [200, 100]], "pixels")["sum"].tolist() == [3, 300]
    with pytest.raises(ServingError, match=r"takes uint8, from 0 to 255\. Received values from -1 to 300") as error:
        client.predict(np.array([[300, -1]]), "pixels")
    assert error.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(ServingError, match=r"takes int32, .* Received values from 4294967297 to"):
        client.predict(np.array([2**32 + 1], "uint64"), "positive")


def test_strings_and_scalars(client):
    text = np.array([b"spike", b"\xff"], dtype=object)
    assert client.predict(text, "text")["text_bytes"].tolist() == text.tolist()
    assert client.predict(np.float32(1.5), "scalar")["y"] == 3.0


def test_numbers_that_are_not_finite_come_back(client):
    assert client.predict(np.zeros((1, 2), "float32"), "inverse")["y"].tolist() == [[np.inf, np.inf]]


def test_metadata_and_status(client):
    step = client.metadata()["step"]
    assert step.inputs == {"count_if": np.int32, "frame": np.float32, "potential_if": np.float32}
    assert step.outputs["logits"] == np.float32
    assert client.status() == {1: "AVAILABLE"}


def test_version(server, transport, image):
    with Client(getattr(server, transport), toy.NAME, 1, transport=transport) as client:
        client.predict(image)
        assert client.answer(image).version == (1 if transport == "grpc" else None)
    with (
        Client(getattr(server, transport), toy.NAME, 7, transport=transport) as client,
        pytest.raises(ServingError, match=r"Specific\(toy, 7\)") as error,
    ):
        client.predict(image)
    assert error.value.code is Code.NOT_FOUND


def test_errors(client, image):
    with pytest.raises(ServingError, match=r"no signature 'nothing'\. It has: .*serving_default"):
        client.predict(image, "nothing")
    with pytest.raises(ServingError, match="takes count_if, frame, potential_if"):
        client.predict(image, "step")
    with pytest.raises(ServingError) as error:
        client.predict({"picture": image})
    assert error.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(ValueError, match="Received transport='http'"):
        Client("127.0.0.1:1", toy.NAME, transport="http")
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Client("127.0.0.1:1", toy.NAME, timeout=0)
    with pytest.raises(ValueError, match="retries must be at least 0"):
        Client("127.0.0.1:1", toy.NAME, retries=-1)


class TestStream:
    def test_the_state_goes_on(self, client):
        stream = client.stream()
        frames = np.arange(12, dtype="float32").reshape(4, 1, 3)
        for number, frame in enumerate(frames, start=1):
            outputs = stream.step(frame)
            assert list(outputs) == ["logits"]
            np.testing.assert_allclose(outputs["logits"], frames[:number].sum(axis=0))
        assert stream.state["count_if"].tolist() == [4]

    def test_several_streams(self, client):
        """Three at once, one of which starts anew, give what each gives alone."""
        frames = np.random.default_rng(0).random((5, 3, 3), "float32")
        together = client.stream(batch_size=3)
        alone = [client.stream() for _ in range(3)]
        for number, frame in enumerate(frames):
            if number == 2:
                together.reset(rows=[1])
                alone[1].reset()
            outputs = together.step(frame)["logits"]
            for row, stream in enumerate(alone):
                np.testing.assert_allclose(
                    outputs[row : row + 1], stream.step(frame[row : row + 1])["logits"], rtol=1e-6
                )
        assert together.state["count_if"].tolist() == [5, 3, 5]

    def test_a_step_that_fails_can_be_repeated(self, client):
        stream = client.stream(batch_size=2)
        stream.step(np.ones((2, 3)))
        with pytest.raises(ServingError) as error:
            stream.step(np.ones((3, 3)))
        assert error.value.code is Code.INVALID_ARGUMENT
        np.testing.assert_allclose(stream.step(np.ones((2, 3)))["logits"], 2)

    def test_bad_arguments(self, client):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            client.stream(batch_size=0)


class Flaky:
    """Fails a few times, then answers."""

    def __init__(self, failures, code=Code.UNAVAILABLE):
        self.failures, self.code, self.calls = failures, code, 0

    def status(self, timeout):
        self.calls += 1
        if self.calls <= self.failures:
            raise ServingError(self.code, "not now")
        return {1: "AVAILABLE"}

    def close(self):
        pass


class TestRetries:
    @pytest.mark.parametrize(("failures", "retries", "code", "calls"), [
        (2, 3, Code.UNAVAILABLE, 3),
        (2, 1, Code.UNAVAILABLE, None),
        (1, 0, Code.UNAVAILABLE, None),
        (1, 3, Code.INVALID_ARGUMENT, None),
        (1, 3, Code.DEADLINE_EXCEEDED, None),
    ])  # fmt: skip
    def test_only_what_may_help(self, failures, retries, code, calls):
        client = Client("127.0.0.1:1", toy.NAME, retries=retries)
        client.close()
        client._transport = Flaky(failures, code)
        if calls is None:
            with pytest.raises(ServingError, match="not now"):
                client.status()
            assert client._transport.calls == 1 + (retries if code is Code.UNAVAILABLE else 0)
        else:
            assert client.status() == {1: "AVAILABLE"}
            assert client._transport.calls == calls

    def test_within_the_timeout(self):
        client = Client("127.0.0.1:1", toy.NAME, retries=1000, timeout=0.5)
        client.close()
        client._transport = Flaky(1000)
        with pytest.raises(ServingError, match="not now"):
            client.status()
        assert 1 < client._transport.calls < 1000, "pauses grow, so that few calls fit into half a second"

    def test_nobody_there(self, transport):
        with (
            Client("127.0.0.1:1", toy.NAME, transport=transport, retries=1, timeout=5) as client,
            pytest.raises(ServingError) as error,
        ):
            client.status()
        assert error.value.code is Code.UNAVAILABLE

    def test_a_server_that_comes(self):
        """gRPC by itself would connect again only after a second."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(address, toy.NAME, retries=0) as client:
            with pytest.raises(ServingError) as error:
                client.status()
            assert error.value.code is Code.UNAVAILABLE
            server = grpc.server(ThreadPoolExecutor(1))
            server.add_insecure_port(address)
            server.start()
            time.sleep(0.4)
            with pytest.raises(ServingError) as error:
                client.status()
            server.stop(None)
        assert error.value.code is Code.UNIMPLEMENTED, "it answers, though it has no such service"

    def test_no_answer_in_time(self, server, transport):
        with Client(getattr(server, transport), toy.NAME, transport=transport) as client:
            client.metadata()
            client._timeout = 0.1
            with pytest.raises(ServingError) as error:
                client.predict(np.array([4000], "int32"), "slow")
        assert error.value.code is Code.DEADLINE_EXCEEDED


def test_a_proxy_is_not_asked(server, transport, monkeypatch):
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Client(getattr(server, transport), toy.NAME, transport=transport) as client:
        assert client.status() == {1: "AVAILABLE"}


def test_without_the_extra(monkeypatch, tmp_path, transport):
    monkeypatch.setitem(sys.modules, f"keras_dsr.serving.{transport}_transport", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-dsr\[serve\]'"):
        Client("127.0.0.1:1", toy.NAME, transport=transport)
    monkeypatch.setitem(sys.modules, "keras_dsr.serving.metrics", None)
    monkeypatch.delattr(keras_dsr.serving, "metrics", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'keras-dsr\[serve\]'"):
        keras_dsr.serving.Server({toy.NAME: tmp_path})


def test_threads_share_a_client(client, image):
    failed = []

    def ask(scale):
        for _ in range(10):
            got = client.predict(scale * image)["logits"]
            if not np.allclose(got, toy.logits(scale * image), rtol=1e-5):
                failed.append(got)

    threads = [threading.Thread(target=ask, args=(scale,)) for scale in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed

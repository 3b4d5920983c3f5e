"""What clients get wrong: the status that TensorFlow Serving gives, and a message that says what to send."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from serving.toy import NAME
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_dsr.serving import Client, Code

pytestmark = pytest.mark.tensorflow_only

IMAGE = np.zeros((2, 4, 4, 1), "float32")
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
FAILED = grpc.StatusCode.FAILED_PRECONDITION


def request(name=NAME, signature="", version=None, label=None, outputs=(), **inputs) -> predict_pb2.PredictRequest:
    message = predict_pb2.PredictRequest(output_filter=outputs)
    message.model_spec.name = name
    message.model_spec.signature_name = signature
    if version is not None:
        message.model_spec.version.value = version
    if label is not None:
        message.model_spec.version_label = label
    for key, value in inputs.items():
        message.inputs[key].CopyFrom(value if isinstance(value, TensorProto) else tf.make_tensor_proto(value))
    return message


def tensor(shape=(2, 4, 4, 1), dtype=tf.float32, **fields):
    proto = TensorProto(dtype=dtype.as_datatype_enum, **fields)
    for size in shape:
        proto.tensor_shape.dim.add().size = size
    return proto


def step(**changes):
    inputs = {
        "frame": np.zeros((2, 3), "float32"),
        "potential_if": np.zeros((2, 3), "float32"),
        "count_if": np.zeros((2,), "int32"),
    }
    return request(signature="step", **{**inputs, **changes})


# name: (request, code, what the message says, whether TensorFlow Serving itself refuses it).
GRPC = {
    "dtype": (request(image=IMAGE.astype("float64")), INVALID, r"takes float32 \(\?, 4, 4, 1\). .*float64", True),
    "dtype_string": (request(image=np.array([b"x"], object)), INVALID, "takes float32.*Received string", True),
    "dtype_unknown": (request(image=tensor(dtype=tf.resource)), INVALID, "takes float32", True),
    "rank": (request(image=IMAGE[0]), INVALID, r"takes float32 \(\?, 4, 4, 1\)\. Received shape \(4, 4, 1\)", False),
    "shape": (request(image=IMAGE[:, :3]), INVALID, r"takes .*\(\?, 4, 4, 1\)\. Received shape \(2, 3, 4, 1\)", False),
    "scalar": (request(image=np.float32(1)), INVALID, r"Received shape \(\)", True),
    "name": (request(picture=IMAGE), INVALID, "takes image float32.*extra: .'picture'.*required: .'image'", True),
    "no_inputs": (request(), INVALID, "Missing but required: .'image'", True),
    "extra_input": (request(image=IMAGE, more=IMAGE), INVALID, "Sent extra: .'more'", True),
    "missing_state": (request(signature="step", frame=IMAGE), INVALID, "required: .'count_if', 'potential_if'", True),
    "nan": (request(image=np.full_like(IMAGE, np.nan)), INVALID, r"finite numbers.*at \[0\]\[0\]\[0\]\[0\]", False),
    "infinity": (request(image=np.full_like(IMAGE, np.inf)), INVALID, "takes finite numbers", False),
    "empty_batch": (request(image=IMAGE[:0]), INVALID, r"\(0, 4, 4, 1\), which is empty: send at least 1", False),
    "empty_dimension": (request(signature="loose", x=np.zeros((1, 0), "float32")), INVALID, "is empty: send", False),
    "examples": (
        request(signature="initial_state", stream=tensor((1025,), tf.int64, int64_val=[7])),
        INVALID,
        "may have 1024 examples. Received 1025 in 'stream'. Send smaller batches, or .*--max-examples",
        False,
    ),
    "range": (
        request(signature="pixels", pixels=tensor((1, 2), tf.uint8, int_val=[300, 1])),
        INVALID,
        r"takes uint8 \(\?, 2\). Received shape \(1, 2\) with values that do not fit it: .*300",
        False,
    ),
    "state_of_another_batch": (
        step(potential_if=np.zeros((3, 3), "float32")),
        INVALID,
        "same batch size.*frame 2, potential_if 3",
        True,
    ),
    "state_of_another_type": (step(count_if=np.zeros((2,), "int64")), INVALID, "'count_if' takes int32", True),
    "model": (request(name="nothing", image=IMAGE), NOT_FOUND, r"Latest\(nothing\).*This server has: toy", True),
    "model_empty": (request(name="", image=IMAGE), INVALID, "no name", True),
    "version": (request(version=7, image=IMAGE), NOT_FOUND, r"Specific\(toy, 7\).*Available versions: 1", True),
    "version_negative": (request(version=-1, image=IMAGE), NOT_FOUND, "Available versions: 1", True),
    "label": (request(label="stable", image=IMAGE), INVALID, "Unrecognized servable version label: stable", True),
    "signature": (request(signature="nothing", image=IMAGE), FAILED, '"nothing" not found.*has: .*step', True),
    "signature_long": (request(signature="é" * 5000, image=IMAGE), FAILED, r'"é+\.\.\." not found.*has: .*step', True),
    "name_long": (request(**{"é" * 5000: IMAGE}), INVALID, "extra: .'é+.*required: .'image'", True),
    "output": (request(outputs=["nothing"], image=IMAGE), INVALID, "not found in signature: nothing.*logits", True),
    "output_twice": (request(outputs=["class", "class"], image=IMAGE), INVALID, "duplicate output", True),
    "no_model_spec": (predict_pb2.PredictRequest(), INVALID, "Missing ModelSpec", True),
    "too_many_values": (request(image=tensor((1, 4, 4, 1), float_val=[0.0] * 17)), INVALID, "do not fit it", True),
    "cut_content": (request(image=tensor(tensor_content=b"123")), INVALID, "values that do not fit it", True),
    "negative_size": (request(image=tensor((-2, 4, 4, 1))), INVALID, "does not say its whole shape", True),
    "inside_the_graph": (request(signature="positive", x=np.array([-1], "int32")), INVALID, "x must be positive", True),
}  # fmt: skip


@pytest.mark.parametrize("case", GRPC)
def test_grpc(server, case):
    message, code, says, everywhere = GRPC[case]
    if not server.ours and not everywhere:
        pytest.skip("only this package's server refuses it before the model does")
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as error:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(message, 30)
    assert error.value.code() is code
    if server.ours:
        assert re.search(says, error.value.details()), error.value.details()


def test_grpc_metadata_and_status(server):
    with grpc.insecure_channel(server.grpc) as channel:
        predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        metadata = get_model_metadata_pb2.GetModelMetadataRequest()
        with pytest.raises(grpc.RpcError, match="Missing ModelSpec") as error:
            predictions.GetModelMetadata(metadata, 30)
        assert error.value.code() is INVALID
        metadata.model_spec.SetInParent()
        metadata.metadata_field.append("signature_def")
        with pytest.raises(grpc.RpcError, match="no name specified") as error:
            predictions.GetModelMetadata(metadata, 30)
        assert error.value.code() is INVALID
        metadata.ClearField("metadata_field")
        metadata.model_spec.name = NAME
        with pytest.raises(grpc.RpcError, match="at least one metadata_field") as error:
            predictions.GetModelMetadata(metadata, 30)
        assert error.value.code() is INVALID
        status = get_model_status_pb2.GetModelStatusRequest()
        with pytest.raises(grpc.RpcError, match="Missing ModelSpec") as error:
            models.GetModelStatus(status, 30)
        assert error.value.code() is INVALID
        status.model_spec.name = "nothing"
        with pytest.raises(grpc.RpcError, match="Could not find any versions of model nothing") as error:
            models.GetModelStatus(status, 30)
        assert error.value.code() is NOT_FOUND
        status.model_spec.name = NAME
        status.model_spec.version.value = 7
        with pytest.raises(grpc.RpcError, match="Could not find version 7 of model toy") as error:
            models.GetModelStatus(status, 30)
        assert error.value.code() is NOT_FOUND


def test_grpc_malformed_message(server):
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        with pytest.raises(grpc.RpcError) as error:
            call(b"\xff\xff\xff", timeout=30)
    assert error.value.code() is grpc.StatusCode.INTERNAL
    if server.ours:
        assert "not a tensorflow.serving.PredictRequest" in error.value.details()


@pytest.mark.parametrize("message", [
    request(image=tensor((2**40, 4, 4, 1), float_val=[1.0])),
    request(signature="text", text=tensor((100_000,), tf.string, string_val=[b"x" * 1000])),
])  # fmt: skip
def test_one_value_that_stands_for_too_many(server, message):
    """A few bytes must not become gigabytes."""
    if not server.ours:
        pytest.skip("TensorFlow Serving makes the tensor")
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError, match="at most") as error:
        prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(message, 30)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


ROWS = IMAGE.tolist()
STEP = {"frame": [0, 0, 0], "potential_if": [0, 0, 0], "count_if": 0}
# name: (method, path, body, status, what the message says, whether TensorFlow Serving itself refuses it).
REST = {
    "no_json": ("POST", ":predict", b"spikes", 400, "JSON Parse error", True),
    "empty": ("POST", ":predict", b"", 400, "JSON Parse error: The document is empty", True),
    "cut_json": ("POST", ":predict", b'{"instances": [[1', 400, "JSON Parse error", True),
    "no_utf8": ("POST", ":predict", b'{"instances": "\xff"}', 400, "JSON Parse error", True),
    "no_object": ("POST", ":predict", [1, 2], 400, r'object, \{"instances".*type Array', True),
    "nested_deep": ("POST", ":predict", b'{"instances": ' + b"[" * 200_000, 400, "nested too deep", False),
    "long_number": ("POST", ":predict", b'{"instances": ' + b"9" * 5000 + b"}", 400, "JSON Parse error", False),
    "neither_key": ("POST", ":predict", {}, 400, "'inputs' and 'instances'", True),
    "both_keys": ("POST", ":predict", {"inputs": ROWS, "instances": ROWS}, 400, "one of the keys", True),
    "instances_no_list": ("POST", ":predict", {"instances": 1}, 400, "an array of at least one", True),
    "no_instances": ("POST", ":predict", {"instances": []}, 400, "at least one example", True),
    "empty_inputs": ("POST", ":predict", {"inputs": []}, 400, r"Received shape \(0,\)", False),
    "null": ("POST", ":predict", {"instances": [None]}, 400, r"Received Null at \[0\]", True),
    "string": ("POST", ":predict", {"instances": [[[["x"]]]]}, 400, r"float32.*String at \[0\]\[0\]\[0\]\[0\]", True),
    "boolean": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[True, 1]]}, 400, "Received Bool", True),
    "ragged": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[1, 2], [3]]}, 400, "one length", True),
    "mixed": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[1, 2], 3]}, 400, "one length", True),
    "object": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[1, {}]]}, 400, "Received Object", True),
    "shape": ("POST", ":predict", {"instances": [[1, 2]]}, 400, r"Received shape \(1, 2\)", False),
    "fraction": ("POST", ":predict", {"signature_name": "pixels", "inputs": [[1.5, 2]]}, 400, "takes uint8", True),
    "range": ("POST", ":predict", {"signature_name": "pixels", "inputs": [[256, 2]]}, 400, "out of its range", False),
    "overflow": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[1e300, 1]]}, 400, "out of its", True),
    "inexact": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[2**60, 1]]}, 400, "exactly", True),
    "huge": ("POST", ":predict", {"signature_name": "inverse", "inputs": [[10**400, 1]]}, 400, "±16777215", False),
    "empty_dimension": ("POST", ":predict", {"signature_name": "loose", "inputs": [[]]}, 400, "is empty: send", False),
    "examples": ("POST", ":predict", {"signature_name": "initial_state", "inputs": [7] * 1025}, 400, "1024", False),
    "nan": ("POST", ":predict", b'{"signature_name": "inverse", "inputs": [[NaN, 1]]}', 400, "takes finite", False),
    "names": ("POST", ":predict", {"instances": [{"picture": ROWS[0]}]}, 400, "keys image.*picture", True),
    "names_long": ("POST", ":predict", {"instances": [{"x" * 9000: 1}]}, 400, r"'x+\.\.\. at item 0", True),
    "names_differ": ("POST", ":predict", {"instances": [{"image": ROWS[0]}, 1]}, 400, "Number at item 1", True),
    "plain_for_several": ("POST", ":predict", {"signature_name": "step", "instances": [1]}, 400, "count_if", True),
    "column_missing": ("POST", ":predict", {"signature_name": "step", "inputs": {"frame": 1}}, 400, "keys count", True),
    "no_base64": ("POST", ":predict", {"signature_name": "text", "inputs": [{"b64": "%"}]}, 400, "base64", True),
    "state_of_another_batch": (
        "POST",
        ":predict",
        {
            "signature_name": "step",
            "inputs": {"frame": [[0, 0, 0]] * 2, "potential_if": [[0, 0, 0]] * 3, "count_if": [0, 0]},
        },
        400,
        "same batch size",
        True,
    ),
    "signature": ("POST", ":predict", {"signature_name": "nothing", "instances": ROWS}, 400, "not found", True),
    "signature_type": ("POST", ":predict", {"signature_name": 1, "instances": ROWS}, 400, "must be a string", True),
    "version": ("POST", "/versions/7:predict", {"instances": ROWS}, 404, r"Specific\(toy, 7\)", True),
    "version_too_large": ("POST", f"/versions/{2**63}:predict", {"instances": ROWS}, 400, "to numeric", True),
    "version_word": ("POST", "/versions/x:predict", {"instances": ROWS}, 400, "Malformed request", True),
    "label": ("POST", "/labels/stable:predict", {"instances": ROWS}, 400, "version label: stable", True),
    "verb": ("POST", ":guess", {"instances": ROWS}, 400, "Malformed request: POST .*:predict", True),
    "no_verb": ("POST", "", {"instances": ROWS}, 400, "Malformed request: POST", True),
    "method": ("GET", ":predict", None, 400, "Malformed request: GET", True),
    "put": ("PUT", ":predict", {"instances": ROWS}, 400, "Malformed request: PUT", False),
    "classify": ("POST", ":classify", {"examples": [{}]}, 501, "classify is not offered", False),
    "status_of_no_version": ("GET", "/versions/7", None, 404, "Could not find version 7 of model toy", True),
    "metadata_of_no_version": ("GET", "/versions/7/metadata", None, 404, r"Specific\(toy, 7\)", True),
    "inside_the_graph": ("POST", ":predict", {"signature_name": "positive", "inputs": [-1]}, 400, "positive", True),
    "gzip": ("POST", ":predict", {"instances": ROWS}, 501, "Content-Encoding: gzip", False),
}  # fmt: skip


@pytest.mark.parametrize("case", REST)
def test_rest(server, case):
    method, path, body, status, says, everywhere = REST[case]
    if not server.ours and not everywhere:
        pytest.skip("only this package's server refuses it, or so")
    content = body if isinstance(body, bytes) or body is None else json.dumps(body)
    headers = {"content-encoding": "gzip"} if case == "gzip" else {}
    answer = httpx.request(method, server.url(path), content=content, headers=headers, timeout=30)
    assert answer.status_code == status, answer.text
    said = answer.json()
    assert list(said) == ["error"]
    if server.ours:
        assert re.search(says, said["error"]), said["error"]


@pytest.mark.parametrize("path", ["/v1/models/nothing", "/v1/models/nothing/metadata", "/v1/models/nothing/versions/1"])
def test_rest_unknown_model(server, path):
    answer = httpx.get(f"http://{server.rest}{path}")
    assert answer.status_code == 404
    assert "nothing" in answer.json()["error"]


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 400), ("/v1/model", 400), ("/v2", 404), ("/", 404)])
def test_rest_other_paths(ours, path, status):
    answer = httpx.get(f"http://{ours().rest}{path}")
    assert answer.status_code == status
    assert "/v1/models/NAME" in answer.json()["error"]


def test_rest_other_methods(ours):
    answer = httpx.post(f"http://{ours().rest}/monitoring/prometheus/metrics")
    assert answer.status_code == 405
    assert answer.json()["error"].startswith("Method Not Allowed")


class TestLimits:
    def test_rest_body(self, ours):
        server = ours(max_request_bytes=10_000)
        answer = httpx.post(server.url(":predict"), content=b" " * 10_001)
        assert answer.status_code == 413
        assert "may have 10000 bytes. Received 10001 bytes. Send smaller batches" in answer.json()["error"]

    def test_rest_body_of_unknown_length(self, ours):
        """It is refused while it comes, before it was sent to its end."""
        server = ours(max_request_bytes=10_000)
        host, port = server.rest.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(3):
                connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")

    def test_rest_body_that_does_not_come(self, ours):
        server = ours(rest_timeout=0.3)
        host, port = server.rest.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1")
            assert connection.recv(4096).startswith(b"HTTP/1.1 504")

    def test_grpc_message(self, ours):
        server = ours(max_request_bytes=10_000)
        big = request(image=np.zeros((200, 4, 4, 1), "float32"))
        with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError, match="larger than") as error:
            prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(big, 30)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_inputs_together(self, ours):
        """Each is below the limit."""
        server = ours(max_request_bytes=10_000)
        rows = tensor((400, 3), float_val=[1.0])
        message = step(frame=rows, potential_if=rows, count_if=tensor((400,), tf.int32, int_val=[1]))
        with (
            grpc.insecure_channel(server.grpc) as channel,
            pytest.raises(grpc.RpcError, match="at most 10000") as error,
        ):
            prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(message, 30)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    def test_rest_bodies_at_once(self, ours, until):
        """Four of the largest are held; once one is gone there is room for another."""
        server = ours(max_request_bytes=10_000)
        host, port = server.rest.split(":")
        head = b"POST /v1/models/toy:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n"
        body = json.dumps({"instances": ROWS})
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
                connection.sendall(head + b" " * 9990)
            until(lambda: httpx.post(server.url(":predict"), content=body).status_code == 429)
            answer = httpx.post(server.url(":predict"), content=body)
            assert "have 40000 bytes, which is as many as may be. Try again later" in answer.json()["error"]
        until(lambda: httpx.post(server.url(":predict"), content=body).status_code == 200)

    def busy(self, server, turns):
        """Requests that take long, one after another."""
        with grpc.insecure_channel(server.grpc) as channel:
            message = request(signature="slow", turns=np.array([turns], "int32"))
            return prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(message, 60)

    def outcomes(self, server, turns, count):
        def one(_):
            try:
                self.busy(server, turns)
            except grpc.RpcError as error:
                return error.code(), error.details()
            return grpc.StatusCode.OK, ""

        with ThreadPoolExecutor(count) as threads:
            return list(threads.map(one, range(count)))

    def test_queue(self, ours):
        got = self.outcomes(ours(max_queue=1, max_batch_size=1), 400, 6)
        codes = [code for code, _ in got]
        assert grpc.StatusCode.OK in codes
        assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert any("queue to which this task was submitted is full" in details for _, details in got)

    def test_requests_at_once(self, ours):
        got = self.outcomes(ours(max_requests=2), 400, 6)
        assert {code for code, _ in got} == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}

    @pytest.mark.parametrize("transport", ["grpc", "rest"])
    def test_status_and_metadata_are_answered_meanwhile(self, ours, until, transport):
        server = ours(max_requests=1, max_batch_size=1)
        with (
            Client(getattr(server, transport), NAME, transport=transport, retries=0, timeout=120) as client,
            ThreadPoolExecutor(2) as threads,
        ):
            asked = [threads.submit(client.predict, np.array([4000], "int32"), "slow") for _ in range(2)]
            until(lambda: any(each.done() for each in asked))
            refused, running = sorted(asked, key=lambda each: not each.done())
            assert refused.exception().code is Code.RESOURCE_EXHAUSTED
            assert client.status() == {1: "AVAILABLE"}
            assert "slow" in client.metadata()
            assert not running.done(), "it ran all the while"
            assert running.result(120)["turns"].tolist() == [4000]

    @pytest.mark.parametrize(
        ("limits", "refusal"), [({"max_requests": 2, "max_queue": 8}, 429), ({"max_requests": 99, "max_queue": 1}, 503)]
    )
    def test_rest_requests_at_once_and_queue(self, ours, limits, refusal):
        """One runs and one waits; which limit refuses the others depends on which is met first."""
        server = ours(max_batch_size=1, **limits)
        body = json.dumps({"signature_name": "slow", "inputs": [4000]})

        def one(_):
            answer = httpx.post(server.url(":predict"), content=body, timeout=60)
            return answer.status_code, answer.text

        with ThreadPoolExecutor(8) as threads:
            got = list(threads.map(one, range(8)))
        assert {status for status, _ in got} == {200, refusal}
        assert all("Try again later" in text for status, text in got if status != 200)

    def test_deadline(self, ours):
        server = ours(max_batch_size=1, rest_timeout=0.2)
        running = threading.Thread(target=self.busy, args=(server, 2000))
        running.start()
        time.sleep(0.2)
        body = json.dumps({"signature_name": "slow", "inputs": [1]})
        answer = httpx.post(server.url(":predict"), content=body, timeout=30)
        running.join()
        assert answer.status_code == 504
        assert "deadline passed before the request had its turn" in answer.json()["error"]


def test_not_finite_where_it_is_allowed(ours):
    server = ours(allow_non_finite=True)
    body = b'{"signature_name": "inverse", "inputs": [[Infinity, NaN]]}'
    answer = httpx.post(server.url(":predict"), content=body)
    assert answer.status_code == 200
    assert answer.text == '{"outputs":[[0.0,NaN]]}'

"""Anything at all may come: each request is answered, with an error that says why, and the server goes on."""

from __future__ import annotations

import json

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import toy
from tensorflow.core.framework import types_pb2
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis import predict_pb2

pytestmark = pytest.mark.tensorflow_only

fuzz = settings(
    max_examples=700,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SIGNATURES = [
    "",
    "serving_default",
    "step",
    "initial_state",
    "pixels",
    "text",
    "scalar",
    "positive",
    "inverse",
    "loose",
]
INPUTS = ["image", "frame", "potential_if", "count_if", "stream", "pixels", "text", "x", "b64"]
REFUSALS = {400, 404, 413, 429, 501}
CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 255, 256, 10**400, -(10**400)])
leaves = st.none() | st.booleans() | numbers | st.text(max_size=3)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INPUTS), inner, max_size=3),
    max_leaves=12,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "signature_name": st.sampled_from(SIGNATURES) | values,
        "instances": values | st.lists(st.lists(numbers, max_size=3), max_size=3),
        "inputs": values | st.lists(st.lists(numbers, min_size=2, max_size=2), max_size=3),
    },
)
bodies = documents.map(lambda document: json.dumps(document).encode()) | values.map(
    lambda value: json.dumps(value).encode()
)


@st.composite
def damaged(draw):
    """A body of which a piece was cut out or replaced."""
    body = draw(bodies)
    start = draw(st.integers(0, len(body)))
    return body[:start] + draw(st.binary(max_size=4)) + body[start + draw(st.integers(0, 8)) :]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=f"http://{server.rest}", timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def call(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel.unary_unary("/tensorflow.serving.PredictionService/Predict")


@pytest.fixture(autouse=True)
def _still_there(server, image):
    """After everything, the server answers, and rightly."""
    yield
    from keras_dsr.serving import Client

    for transport in ("grpc", "rest"):
        with Client(getattr(server, transport), toy.NAME, transport=transport) as client:
            np.testing.assert_allclose(client.predict(image)["logits"], toy.logits(image), rtol=1e-6)


@fuzz
@given(body=bodies | damaged() | st.binary(max_size=40))
def test_rest_bodies(http, server, body):
    answer = http.post(f"/v1/models/{toy.NAME}:predict", content=body)
    said = json.loads(answer.content)
    if answer.status_code == 200:
        assert said.keys() <= {"predictions", "outputs"}
    elif server.ours:
        assert answer.status_code in REFUSALS, (answer.status_code, said)
        assert list(said) == ["error"]
        assert said["error"]


segments = st.sampled_from(["v1", "models", toy.NAME, "versions", "labels", "1", "2", "metadata", "%00", "..", ""])
tails = st.sampled_from(["", ":predict", ":classify", ":", "?x=1", ":predict/", "/metadata"])
paths = st.lists(segments | st.text("abc%:/é", max_size=3), max_size=6).map("/".join)


@settings(fuzz, max_examples=300)
@given(method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "BREW"]), path=paths, tail=tails)
def test_rest_paths(http, server, method, path, tail):
    answer = http.request(method, f"/v1/models/{path}{tail}", content=b"{}" if method != "GET" else None)
    assert answer.status_code < 500 or answer.status_code == 501
    if server.ours and answer.status_code != 200 and method != "HEAD":
        assert list(answer.json()) == ["error"]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from([1, 1, 3, 4, 7, 9, *types_pb2.DataType.values()]))
    proto = TensorProto(dtype=dtype)
    for size in draw(st.lists(st.integers(-1, 4) | st.sampled_from([2**31, 2**62]), max_size=5)):
        proto.tensor_shape.dim.add().size = size
    proto.tensor_shape.unknown_rank = draw(st.booleans()) and draw(st.booleans())
    proto.tensor_content = draw(st.sampled_from([b"", b"\0", b"\0" * 64, b"\xff" * 128]))
    proto.float_val.extend(draw(st.lists(st.floats(width=32), max_size=4)))
    proto.int_val.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4)))
    proto.string_val.extend(draw(st.lists(st.binary(max_size=4), max_size=2)))
    return proto


right = st.sampled_from(
    [
        ("image", np.zeros((1, 4, 4, 1), "float32")),
        ("frame", np.zeros((2, 3), "float32")),
        ("potential_if", np.zeros((2, 3), "float32")),
        ("count_if", np.zeros((2,), "int32")),
        ("x", np.ones((2, 2), "float32")),
        ("pixels", np.zeros((3, 2), "uint8")),
    ]
).map(lambda pair: (pair[0], tf.make_tensor_proto(pair[1])))


@st.composite
def messages(draw):
    message = predict_pb2.PredictRequest(output_filter=draw(st.lists(st.sampled_from(["class", "y", "z"]), max_size=2)))
    message.model_spec.name = draw(st.sampled_from([toy.NAME, toy.NAME, toy.NAME, "", "other", "\0"]))
    message.model_spec.signature_name = draw(st.sampled_from([*SIGNATURES, "other"]))
    if draw(st.booleans()):
        message.model_spec.version.value = draw(st.sampled_from([1, 1, 0, -1, 2**63 - 1]))
    named = st.tuples(st.sampled_from(INPUTS) | st.text(max_size=2), tensors())
    for name, tensor in draw(st.lists(named | right, max_size=4)):
        message.inputs[name].CopyFrom(tensor)
    return message.SerializeToString()


def refusal(call, message) -> grpc.RpcError | None:
    """The error that answers a message, if one does."""
    try:
        predict_pb2.PredictResponse.FromString(call(message, timeout=30))
    except grpc.RpcError as error:
        return error
    return None


@fuzz
@given(message=messages())
def test_grpc_messages(call, server, message):
    error = refusal(call, message)
    if error is not None and server.ours:
        assert error.code() in CODES, (error.code(), error.details())
        assert error.details()


@settings(fuzz, max_examples=300)
@given(message=st.binary(max_size=60))
def test_grpc_bytes(call, server, message):
    error = refusal(call, message)
    if error is not None and server.ours:
        malformed = error.code() is grpc.StatusCode.INTERNAL and "is not a tensorflow.serving" in error.details()
        assert malformed or error.code() in CODES, (error.code(), error.details())

"""What TensorFlow Serving's API answers, over gRPC and REST, to clients from outside."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from serving.toy import NAME, logits
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

pytestmark = pytest.mark.tensorflow_only


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.grpc) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def request(signature="", version=None, **inputs) -> predict_pb2.PredictRequest:
    message = predict_pb2.PredictRequest()
    message.model_spec.name = NAME
    message.model_spec.signature_name = signature
    if version is not None:
        message.model_spec.version.value = version
    for name, array in inputs.items():
        message.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return message


def post(server, body, path=":predict"):
    return httpx.post(server.url(path), content=body if isinstance(body, bytes) else json.dumps(body), timeout=30)


class TestGrpc:
    def test_predict(self, stub, image):
        response = stub.Predict(request(image=image), 30)
        assert response.model_spec.name == NAME
        assert response.model_spec.version.value == 1
        assert response.model_spec.signature_name == "serving_default"
        outputs = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
        np.testing.assert_allclose(outputs["logits"], logits(image), rtol=1e-6)
        assert outputs["class"].dtype == np.int64
        assert outputs["class"].tolist() == [0, 0]
        np.testing.assert_allclose(outputs["probabilities"].sum(axis=1), 1, rtol=1e-6)

    def test_small_outputs_are_in_the_typed_field(self, stub, image):
        response = stub.Predict(request(image=image), 30)
        np.testing.assert_allclose(response.outputs["logits"].float_val, logits(image).ravel(), rtol=1e-6)

    def test_values_in_the_typed_field_and_one_for_all(self, stub):
        message = request()
        tensor = message.inputs["image"]
        tensor.dtype = tf.float32.as_datatype_enum
        for size in (2, 4, 4, 1):
            tensor.tensor_shape.dim.add().size = size
        tensor.float_val.append(0.5)
        got = tf.make_ndarray(stub.Predict(message, 30).outputs["logits"])
        np.testing.assert_allclose(got, logits(np.full((2, 4, 4, 1), 0.5, "float32")))

    def test_version_and_signature(self, stub):
        response = stub.Predict(request("pixels", version=1, pixels=np.array([[1, 2], [200, 100]], "uint8")), 30)
        assert tf.make_ndarray(response.outputs["sum"]).tolist() == [3, 300]
        assert response.model_spec.signature_name == "pixels"

    def test_output_filter(self, stub, image):
        message = request(image=image)
        message.output_filter.append("class")
        assert list(stub.Predict(message, 30).outputs) == ["class"]

    def test_without_a_batch_dimension(self, stub):
        response = stub.Predict(request("scalar", x=np.float32(1.5)), 30)
        assert tf.make_ndarray(response.outputs["y"]) == 3.0

    def test_strings(self, stub):
        response = stub.Predict(request("text", text=np.array([b"spike", b"\xff\x00"], dtype=object)), 30)
        assert tf.make_ndarray(response.outputs["text"]).tolist() == [b"spike", b"\xff\x00"]

    def test_metadata(self, stub):
        message = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        message.model_spec.name = NAME
        response = stub.GetModelMetadata(message, 30)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        assert response.metadata["signature_def"].Unpack(signatures)
        assert response.model_spec.version.value == 1
        step = signatures.signature_def["step"]
        assert {"frame", "potential_if", "count_if"} == set(step.inputs)
        assert [dim.size for dim in step.inputs["frame"].tensor_shape.dim] == [-1, 3]

    def test_status(self, server):
        message = get_model_status_pb2.GetModelStatusRequest()
        message.model_spec.name = NAME
        with grpc.insecure_channel(server.grpc) as channel:
            (status,) = (
                model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(message, 30).model_version_status
            )
        assert status.version == 1
        assert status.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE
        assert status.status.error_code == 0

    def test_classify_is_not_offered(self, server, stub):
        if not server.ours:
            pytest.skip("TensorFlow Serving has it")
        message = classification_pb2.ClassificationRequest()
        message.model_spec.name = NAME
        with pytest.raises(grpc.RpcError, match="Classify is not offered here") as error:
            stub.Classify(message, 30)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


class TestRest:
    def test_rows(self, server, image):
        answer = post(server, {"instances": image.tolist()}).json()
        assert list(answer) == ["predictions"]
        first, _ = answer["predictions"]
        assert set(first) == {"logits", "probabilities", "class"}
        np.testing.assert_allclose([row["logits"] for row in answer["predictions"]], logits(image), rtol=1e-6)
        assert [row["class"] for row in answer["predictions"]] == [0, 0]

    def test_rows_by_name(self, server, image):
        answer = post(server, {"instances": [{"image": each} for each in image.tolist()]}).json()
        np.testing.assert_allclose([row["logits"] for row in answer["predictions"]], logits(image), rtol=1e-6)

    @pytest.mark.parametrize("named", [False, True])
    def test_columns(self, server, image, named):
        inputs = {"image": image.tolist()} if named else image.tolist()
        answer = post(server, {"inputs": inputs, "signature_name": "serving_default"}).json()
        np.testing.assert_allclose(answer["outputs"]["logits"], logits(image), rtol=1e-6)

    def test_the_name_of_a_single_output_is_left_out(self, server):
        body = {"signature_name": "pixels", "instances": [[1, 2], [200, 100]]}
        assert post(server, body).json() == {"predictions": [3, 300]}
        assert post(server, {"signature_name": "pixels", "inputs": [[1, 2]]}).json() == {"outputs": [3]}

    def test_several_inputs(self, server):
        row = {"frame": [1, 2, 3], "potential_if": [0.5, 0, 0], "count_if": 4}
        answer = post(server, {"signature_name": "step", "instances": [row, row]}).json()
        assert answer["predictions"][1] == {
            "logits": [1.5, 2.0, 3.0],
            "next_potential_if": [1.5, 2.0, 3.0],
            "next_count_if": 5,
        }

    def test_bytes(self, server):
        encoded = {"b64": base64.b64encode(b"\xff\x00").decode()}
        body = {"signature_name": "text", "instances": ["spike", {"b64": base64.b64encode(b"b64").decode()}]}
        answer = post(server, body).json()["predictions"]
        assert answer[0] == {"text": "spike", "text_bytes": {"b64": base64.b64encode(b"spike").decode()}}
        assert answer[1]["text"] == "b64"
        answer = post(server, {"signature_name": "text", "inputs": [encoded]})
        assert answer.status_code == 200
        if server.ours:
            assert answer.json()["outputs"]["text"] == [encoded]

    def test_scalar(self, server):
        assert post(server, {"signature_name": "scalar", "inputs": 1.5}).json() == {"outputs": 3.0}

    def test_numbers_that_json_does_not_have(self, server):
        answer = post(server, {"signature_name": "inverse", "inputs": [[0.0, -0.0]]})
        assert b"Infinity" in answer.content
        assert json.loads(answer.content) == {"outputs": [[float("inf"), -float("inf")]]}

    def test_floats_are_written_as_short_as_they_can(self, server):
        answer = post(server, {"signature_name": "inverse", "inputs": [[10.0, 3.0]]})
        assert b"0.1," in answer.content
        assert np.float32(answer.json()["outputs"][0][1]) == np.float32(1 / 3)

    def test_version(self, server, image):
        assert post(server, {"instances": image.tolist()}, "/versions/1:predict").status_code == 200

    def test_status(self, server):
        version = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        assert httpx.get(server.url()).json() == {"model_version_status": [version]}
        assert httpx.get(server.url("/versions/1")).json() == {"model_version_status": [version]}

    def test_metadata(self, server):
        answer = httpx.get(server.url("/metadata")).json()
        assert answer["model_spec"] == {"name": NAME, "signature_name": "", "version": "1"}
        info = answer["metadata"]["signature_def"]["signature_def"]["serving_default"]["inputs"]["image"]
        assert info["dtype"] == "DT_FLOAT"
        assert [dim["size"] for dim in info["tensor_shape"]["dim"]] == ["-1", "4", "4", "1"]

    def test_metrics(self, server, image):
        if not server.ours:
            pytest.skip("TensorFlow Serving shows them where a monitoring config says so")
        post(server, {"instances": image.tolist()})
        httpx.post(f"http://{server.rest}/v1/models/intruder:predict", content=b"{}")
        page = httpx.get(f"http://{server.rest}/monitoring/prometheus/metrics").text
        assert ':tensorflow:serving:request_count{model_name="toy",status="OK"}' in page
        assert ':tensorflow:serving:request_count{model_name="unknown",status="NOT_FOUND"}' in page
        assert ':tensorflow:serving:request_latency_count{API="Predict",entrypoint="REST",model_name="toy"}' in page
        assert ":tensorflow:serving:runtime_latency_bucket" in page
        assert "intruder" not in page


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server, image):
    body = json.dumps({"instances": image.tolist()})
    answer = subprocess.run(
        ["curl", "--silent", "--fail", "-d", body, server.url(":predict")], check=True, capture_output=True, timeout=30
    )
    got = [row["logits"] for row in json.loads(answer.stdout)["predictions"]]
    np.testing.assert_allclose(got, logits(image), rtol=1e-6)


@pytest.fixture
def ovmsclient():
    return pytest.importorskip("ovmsclient", reason="ovmsclient is not installed", exc_type=ImportError)


class TestOvmsClient:
    """A client of the same API, made for OpenVINO Model Server."""

    def test_grpc(self, server, ovmsclient, image):
        client = ovmsclient.make_grpc_client(server.grpc)
        outputs = client.predict({"image": image}, NAME, model_version=1)
        np.testing.assert_allclose(outputs["logits"], logits(image), rtol=1e-6)
        assert client.get_model_status(NAME, model_version=1)[1]["state"] == "AVAILABLE"
        assert client.get_model_metadata(NAME, model_version=1)["inputs"]["image"]["shape"] == [-1, 4, 4, 1]
        with pytest.raises(Exception, match="Servable not found"):
            client.predict({"image": image}, "nothing", model_version=1)

    def test_rest(self, server, ovmsclient, image):
        client = ovmsclient.make_http_client(server.rest)
        outputs = client.predict({"image": image}, NAME, model_version=1)
        np.testing.assert_allclose(outputs["logits"], logits(image), rtol=1e-6)
        assert client.get_model_status(NAME, model_version=1)[1]["state"] == "AVAILABLE"

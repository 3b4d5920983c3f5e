"""`Client` over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from keras_dsr.serving.client import INIT_OP, Answer, SignatureTypes
from keras_dsr.serving.errors import Code, ServingError
from keras_dsr.serving.tensors import TensorSpec

T = TypeVar("T")


class GrpcTransport:
    """Sends requests over gRPC.

    Args:
        address: Host and port.
        model: The model's name.
        version: Its version; the newest if `None`.
    """

    def __init__(self, address: str, model: str, version: int | None):
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A server on the loopback is not behind a proxy that the environment names.
            ("grpc.enable_http_proxy", 0),
            # By itself gRPC connects again after a second at the earliest: `Client` would repeat its calls for nothing.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        self._channel = grpc.insecure_channel(address, options)
        self._predictions = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._spec = model_pb2.ModelSpec(name=model)
        if version is not None:
            self._spec.version.value = version

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], types: SignatureTypes, timeout: float
    ) -> Answer:
        """Runs a signature."""
        request = predict_pb2.PredictRequest(model_spec=self._spec)
        request.model_spec.signature_name = signature
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
        response = _call(lambda: self._predictions.Predict(request, timeout))
        outputs = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
        return Answer(outputs, response.model_spec.version.value)

    def metadata(self, timeout: float) -> dict[str, SignatureTypes]:
        """The model's signatures by name."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=self._spec, metadata_field=["signature_def"]
        )
        response = _call(lambda: self._predictions.GetModelMetadata(request, timeout))
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return {
            name: SignatureTypes(_types(signature.inputs), _types(signature.outputs))
            for name, signature in signatures.signature_def.items()
            if name != INIT_OP
        }

    def status(self, timeout: float) -> dict[int, str]:
        """The states of the model's versions by number."""
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=self._spec)
        response = _call(lambda: self._models.GetModelStatus(request, timeout))
        names = get_model_status_pb2.ModelVersionStatus.State
        return {
            each.version: names.Name(each.state)
            + (f": {each.status.error_message}" if each.status.error_message else "")
            for each in response.model_version_status
        }

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()


def _types(infos: Mapping) -> dict[str, np.dtype]:
    return {
        name: np.dtype(TensorSpec.from_info(name, info).dtype.as_numpy_dtype) for name, info in sorted(infos.items())
    }


def _call(call: Callable[[], T]) -> T:
    try:
        return call()
    except grpc.RpcError as error:
        code = Code(error.code().value[0])
        if code is Code.CANCELLED:  # not by this client: the server stops, and had not taken the request yet
            code = Code.UNAVAILABLE
        raise ServingError(code, error.details() or "") from error

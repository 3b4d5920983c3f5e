"""TensorFlow Serving's gRPC services: PredictionService and ModelService."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from keras_dsr.serving.errors import Code, ServingError, short
from keras_dsr.serving.manager import Manager, VersionStatus
from keras_dsr.serving.metrics import Metrics
from keras_dsr.serving.predict import Predictor, Served, Turns
from keras_dsr.serving.saved_model import Signature
from keras_dsr.serving.tensors import from_protos, to_proto

_LOGGER = logging.getLogger("keras_dsr.serving")
_CODES = {code.value[0]: code for code in grpc.StatusCode}
SIGNATURE_DEF = "signature_def"

Request = TypeVar("Request", bound=Message)


class Services:
    """The handlers of both services, for `grpc.Server.add_generic_rpc_handlers`.

    Args:
        predictor: Answers predictions.
        models: The models.
        metrics: Is told of every request.
        max_requests: How many predictions there may be at one time.
        max_request_bytes: How large a request's inputs may be together once they are arrays.
    """

    def __init__(
        self,
        predictor: Predictor,
        models: Manager[Served],
        metrics: Metrics,
        *,
        max_requests: int,
        max_request_bytes: int,
    ):
        self._predictor = predictor
        self._models = models
        self._metrics = metrics
        self._turns = Turns(max_requests)
        self._max_request_bytes = max_request_bytes

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """One handler for each service."""
        prediction = {
            "Predict": self._handler("Predict", predict_pb2.PredictRequest, self.predict),
            "GetModelMetadata": self._handler(
                "GetModelMetadata", get_model_metadata_pb2.GetModelMetadataRequest, self.metadata
            ),
            **{name: _unimplemented(name) for name in ("Classify", "Regress", "MultiInference")},
        }
        model = {
            "GetModelStatus": self._handler("GetModelStatus", get_model_status_pb2.GetModelStatusRequest, self.status),
            "HandleReloadConfigRequest": _unimplemented("HandleReloadConfigRequest"),
        }
        return (
            grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", prediction),
            grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", model),
        )

    def predict(
        self, request: predict_pb2.PredictRequest, deadline: float | None = None
    ) -> predict_pb2.PredictResponse:
        """PredictionService.Predict."""
        if not request.HasField("model_spec"):
            raise ServingError(Code.INVALID_ARGUMENT, "Missing ModelSpec")

        def read(signature: Signature) -> dict:
            signature.check_names(request.inputs)
            return from_protos(request.inputs, signature.inputs, self._max_request_bytes)

        spec = request.model_spec
        with self._turns.take():
            prediction = self._predictor.predict(
                spec.name,
                _version(spec),
                spec.signature_name,
                read,
                output_filter=list(request.output_filter),
                deadline=deadline,
            )
        response = predict_pb2.PredictResponse()
        response.model_spec.name = spec.name
        response.model_spec.version.value = prediction.version
        response.model_spec.signature_name = prediction.signature
        for name, array in prediction.outputs.items():
            response.outputs[name].CopyFrom(to_proto(array))
        return response

    def metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, deadline: float | None = None
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """PredictionService.GetModelMetadata, of which there is the field `signature_def`."""
        if not request.HasField("model_spec"):
            raise ServingError(Code.INVALID_ARGUMENT, "Missing ModelSpec")
        if not request.metadata_field or set(request.metadata_field) != {SIGNATURE_DEF}:
            raise ServingError(
                Code.INVALID_ARGUMENT,
                "GetModelMetadataRequest must specify at least one metadata_field, which must be 'signature_def'. "
                f"Received {short(list(request.metadata_field))}.",
            )
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._models.lease(request.model_spec.name, _version(request.model_spec)) as (number, served):
            signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=served.model.signature_defs)
            response.model_spec.name = request.model_spec.name
            response.model_spec.version.value = number
            response.metadata[SIGNATURE_DEF].Pack(signatures)
        return response

    def status(
        self, request: get_model_status_pb2.GetModelStatusRequest, deadline: float | None = None
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """ModelService.GetModelStatus."""
        if not request.HasField("model_spec"):
            raise ServingError(Code.INVALID_ARGUMENT, "Missing ModelSpec")
        versions = self._models.status(request.model_spec.name, _version(request.model_spec))
        return get_model_status_pb2.GetModelStatusResponse(model_version_status=[_status(each) for each in versions])

    def _handler(
        self, api: str, kind: type[Request], answer: Callable[[Request, float | None], Message]
    ) -> grpc.RpcMethodHandler:
        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            started = time.perf_counter()
            remaining = context.time_remaining()
            deadline = None if remaining is None else time.monotonic() + remaining
            model, code, message = "", Code.OK, ""
            try:
                request = kind.FromString(data)
                model = request.model_spec.name
                response = answer(request, deadline).SerializeToString()
            except DecodeError as error:
                # The code that gRPC itself answers, in C++ and in Python.
                code, message = Code.INTERNAL, f"The message is not a tensorflow.serving.{kind.__name__}: {error}."
            except ServingError as error:
                code, message = error.code, error.message
            except Exception:
                _LOGGER.exception("%s failed", api)
                code, message = Code.INTERNAL, "The server failed at this request; its log says how."
            self._metrics.request(model, api, "GRPC", code, time.perf_counter() - started)
            if code is not Code.OK:
                context.abort(_CODES[code], message)
            return response

        return grpc.unary_unary_rpc_method_handler(handle)


def _version(spec: model_pb2.ModelSpec) -> int | None:
    """The version that a request asks for."""
    choice = spec.WhichOneof("version_choice")
    if choice == "version_label":
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"Unrecognized servable version label: {short(spec.version_label)}. This server has no labels; send a "
            "version.",
        )
    return spec.version.value if choice == "version" else None


def _status(status: VersionStatus) -> get_model_status_pb2.ModelVersionStatus:
    message = get_model_status_pb2.ModelVersionStatus(version=status.version, state=int(status.state))
    message.status.error_code = int(status.code)
    message.status.error_message = status.message
    return message


def _unimplemented(name: str) -> grpc.RpcMethodHandler:
    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not offered here. Send Predict.")

    return grpc.unary_unary_rpc_method_handler(handle)

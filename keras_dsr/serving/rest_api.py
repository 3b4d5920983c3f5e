"""TensorFlow Serving's REST API, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from http import HTTPStatus

from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

from keras_dsr.serving import json_tensors
from keras_dsr.serving.errors import Code, ServingError, short
from keras_dsr.serving.grpc_api import SIGNATURE_DEF, Services
from keras_dsr.serving.metrics import Metrics
from keras_dsr.serving.predict import Predictor, Turns

_LOGGER = logging.getLogger("keras_dsr.serving")
_VERSION = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_PREDICT = re.compile(rf"/v1/models/(?P<name>[^/:]+){_VERSION}:(?P<verb>classify|regress|predict)", re.ASCII | re.I)
_LOOK = re.compile(rf"/v1/models(?:/(?P<name>[^/:]+))?{_VERSION}(?P<metadata>/metadata)?", re.ASCII | re.I)
_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_BODIES = 4  # how many of the largest bodies may be held at one time, or as many bytes of smaller ones
METRICS_PATH = "/monitoring/prometheus/metrics"


class _TooLarge(ServingError):
    """A body over the limit, for which HTTP has a status of its own."""


@dataclasses.dataclass
class RestApi:
    """The REST API of a server.

    Args:
        predictor: Answers predictions.
        services: Answers what gRPC and REST have in common.
        metrics: Is told of every request, and shown.
        executor: Whose threads predictions run in.
        max_requests: How many predictions there may be at one time.
        max_request_bytes: How large a body may be. All that are held may have four times as many.
        timeout: Seconds that a request may take to arrive and wait for its turn.
    """

    predictor: Predictor
    services: Services
    metrics: Metrics
    executor: Executor
    max_requests: int
    max_request_bytes: int
    timeout: float

    def __post_init__(self):
        self._turns = Turns(self.max_requests)
        self._held = 0  # bytes of bodies

    def application(self) -> Starlette:
        """The ASGI application."""
        application = Starlette(
            routes=[
                Route("/v1/{path:path}", self._answer, methods=_METHODS),
                Route(METRICS_PATH, self._show_metrics, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_failure},
        )
        application.router.redirect_slashes = False
        return application

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain")

    async def _answer(self, request: Request) -> Response:
        started = time.perf_counter()
        deadline = time.monotonic() + self.timeout
        path = request.scope["path"]
        posted = _PREDICT.fullmatch(path) if request.method == "POST" else None
        asked = _LOOK.fullmatch(path) if request.method in ("GET", "HEAD") else None
        found = posted or asked
        api = "Malformed"
        code, status, body = Code.OK, 200, b""
        try:
            if found is None:
                raise ServingError(
                    Code.INVALID_ARGUMENT,
                    f"Malformed request: {short(request.method)} {short(path)}. POST to "
                    "/v1/models/NAME[/versions/N]:predict, or GET /v1/models/NAME[/versions/N][/metadata].",
                )
            version = _version(found)
            if posted:
                api = posted["verb"].capitalize()
                with self._turns.take():
                    async with self._body(request) as data:
                        body = await asyncio.get_running_loop().run_in_executor(
                            self.executor, self._predict, posted, version, data, deadline
                        )
            elif asked["name"] is None:
                raise ServingError(Code.INVALID_ARGUMENT, "Missing model name in request. GET /v1/models/NAME.")
            else:
                api = "GetModelMetadata" if asked["metadata"] else "GetModelStatus"
                look = self._metadata if asked["metadata"] else self._status
                body = await asyncio.to_thread(look, asked["name"], version)  # even while all of the executor is busy
        except ServingError as error:
            code, status = error.code, error.code.http
            if isinstance(error, _TooLarge):
                status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE.value
            return _failure(status, error.message)
        except TimeoutError:
            code = Code.DEADLINE_EXCEEDED
            return _failure(code.http, f"The request's body did not arrive within {self.timeout:g} seconds.")
        except ClientDisconnect:
            code = Code.CANCELLED
            return _failure(code.http, "The client went away.")
        except Exception:
            _LOGGER.exception("%s failed", path)
            code = Code.INTERNAL
            return _failure(code.http, "The server failed at this request; its log says how.")
        finally:
            name = found["name"] if found and found["name"] else ""
            self.metrics.request(name, api, "REST", code, time.perf_counter() - started)
        return Response(body, media_type="application/json")

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, whose bytes count as held until it was made use of. No more of it is read than may be."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ServingError(
                Code.UNIMPLEMENTED, f"Send the body as it is. Received Content-Encoding: {short(encoding)}."
            )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self.max_request_bytes:
            raise self._too_large(f"{short(announced)} bytes")
        body, counted, most = bytearray(), 0, _BODIES * self.max_request_bytes
        try:
            async with asyncio.timeout(self.timeout):
                async for part in request.stream():
                    counted += len(part)
                    self._held += len(part)
                    if counted > self.max_request_bytes:
                        raise self._too_large("more")
                    if self._held > most:
                        raise ServingError(
                            Code.RESOURCE_EXHAUSTED,
                            f"The requests that are being answered have {most} bytes, which is as many as may be. Try "
                            "again later.",
                        )
                    body += part
            yield body
        finally:
            self._held -= counted

    def _too_large(self, received: str) -> _TooLarge:
        return _TooLarge(
            Code.RESOURCE_EXHAUSTED,
            f"A body may have {self.max_request_bytes} bytes. Received {received}. Send smaller batches, or use gRPC.",
        )

    def _predict(self, found: re.Match, version: int | None, data: bytearray, deadline: float) -> bytes:
        if found["verb"].lower() != "predict":
            raise ServingError(Code.UNIMPLEMENTED, f"{found['verb']} is not offered here. POST to :predict.")
        document = json_tensors.parse(data)
        prediction = self.predictor.predict(
            found["name"],
            version,
            json_tensors.signature_name(document),
            lambda signature: json_tensors.read(document, signature),
            deadline=deadline,
        )
        return json_tensors.write(document, prediction.outputs)

    def _status(self, name: str, version: int | None) -> bytes:
        request = get_model_status_pb2.GetModelStatusRequest()
        _fill(request.model_spec, name, version)
        return _dump(_plain(self.services.status(request)))

    def _metadata(self, name: str, version: int | None) -> bytes:
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=[SIGNATURE_DEF])
        _fill(request.model_spec, name, version)
        response = self.services.metadata(request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[SIGNATURE_DEF].Unpack(signatures)
        metadata = {SIGNATURE_DEF: _plain(signatures)}
        return _dump({"model_spec": _plain(response.model_spec), "metadata": metadata})


def _version(found: re.Match) -> int | None:
    if found["label"] is not None:
        raise ServingError(
            Code.INVALID_ARGUMENT,
            f"Unrecognized servable version label: {short(found['label'])}. This server has no labels; ask for "
            "/versions/N.",
        )
    if found["version"] is None:
        return None
    if len(found["version"]) > 19 or int(found["version"]) >= 2**63:
        raise ServingError(Code.INVALID_ARGUMENT, f"Failed to convert version: {short(found['version'])} to numeric.")
    return int(found["version"])


def _fill(spec, name: str, version: int | None) -> None:
    spec.name = name
    if version is not None:
        spec.version.value = version


def _plain(message) -> dict:
    return json_format.MessageToDict(
        message, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
    )


def _dump(answer: dict) -> bytes:
    return json.dumps(answer, indent=1).encode()


def _failure(status: int, message: str) -> Response:
    return Response(_dump({"error": message}), status, media_type="application/json")


async def _http_failure(request: Request, error: Exception) -> Response:
    """What the router says of other paths and methods, as JSON."""
    asked = f"{short(request.method)} {short(request.scope['path'])}"
    said = f"{error.detail}: {asked}. Ask for /v1/models/NAME or {METRICS_PATH}."
    return Response(_dump({"error": said}), error.status_code, headers=error.headers, media_type="application/json")

"""`Client` over REST."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from keras_dsr.serving.client import INIT_OP, Answer, SignatureTypes
from keras_dsr.serving.errors import Code, ServingError


class RestTransport:
    """Sends requests over REST.

    Args:
        address: Host and port, with or without `http://`.
        model: The model's name.
        version: Its version; the newest if `None`.
    """

    def __init__(self, address: str, model: str, version: int | None):
        base = address if "://" in address else f"http://{address}"
        self._url = f"{base}/v1/models/{model}" + ("" if version is None else f"/versions/{version}")
        # A server on the loopback is not behind a proxy that the environment names.
        self._http = httpx.Client(trust_env=False)

    def predict(
        self, signature: str, inputs: Mapping[str, np.ndarray], types: SignatureTypes, timeout: float
    ) -> Answer:
        """Runs a signature. JSON has no types: outputs get those of the signature."""
        body = {"signature_name": signature, "inputs": {name: _plain(array) for name, array in inputs.items()}}
        outputs = self._call("POST", f"{self._url}:predict", timeout, json.dumps(body))["outputs"]
        if len(types.outputs) == 1:
            outputs = {next(iter(types.outputs)): outputs}
        arrays = {name: _array(value, types.outputs.get(name)) for name, value in outputs.items()}
        return Answer(arrays, None)

    def metadata(self, timeout: float) -> dict[str, SignatureTypes]:
        """The model's signatures by name."""
        signatures = self._call("GET", f"{self._url}/metadata", timeout)["metadata"]["signature_def"]["signature_def"]
        return {
            name: SignatureTypes(_types(signature["inputs"]), _types(signature["outputs"]))
            for name, signature in signatures.items()
            if name != INIT_OP
        }

    def status(self, timeout: float) -> dict[int, str]:
        """The states of the model's versions by number."""
        versions = self._call("GET", self._url, timeout)["model_version_status"]
        return {
            int(each["version"]): each["state"]
            + (f": {each['status']['error_message']}" if each["status"]["error_message"] else "")
            for each in versions
        }

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _call(self, method: str, url: str, timeout: float, body: str | None = None) -> Any:
        try:
            response = self._http.request(method, url, content=body, timeout=timeout)
        except httpx.TimeoutException as error:
            raise ServingError(Code.DEADLINE_EXCEEDED, f"No answer from {url} within {timeout:.3g} seconds.") from error
        except httpx.TransportError as error:
            raise ServingError(Code.UNAVAILABLE, f"No answer from {url}: {error}.") from error
        try:
            answer = response.json()
        except ValueError as error:
            code = Code.from_http(response.status_code)
            raise ServingError(
                Code.UNKNOWN if code is Code.OK else code, f"{url} answered {response.status_code}, which is not JSON."
            ) from error
        if response.status_code != 200:
            said = answer.get("error") if isinstance(answer, dict) else None
            raise ServingError(Code.from_http(response.status_code), said or f"HTTP status {response.status_code}")
        return answer


def _types(infos: Mapping[str, Mapping]) -> dict[str, np.dtype]:
    return {
        name: np.dtype(tf.as_dtype(types_pb2.DataType.Value(info["dtype"])).as_numpy_dtype)
        for name, info in sorted(infos.items())
    }


def _plain(array: np.ndarray) -> Any:
    """An array as JSON has it."""
    return _encode(array.tolist()) if array.dtype.kind in "OSU" else array.tolist()


def _encode(value: Any) -> Any:
    if isinstance(value, list):
        return [_encode(each) for each in value]
    return {"b64": base64.b64encode(value if isinstance(value, bytes) else str(value).encode()).decode()}


def _array(value: Any, dtype: np.dtype | None) -> np.ndarray:
    """An array from JSON, of the type that the signature gives it."""
    return np.array(_decode(value) if dtype is not None and dtype.kind == "O" else value, dtype=dtype)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(each) for each in value]
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else value.encode()

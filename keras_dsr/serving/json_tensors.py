"""TensorFlow Serving's JSON: requests to arrays, arrays to answers.

A request is `{"instances": [...]}`, one entry an example, or `{"inputs": ...}`, whole tensors; the answer has
`predictions` or `outputs` in the same order. Bytes are written `{"b64": "..."}`. NaN, Infinity and -Infinity are
numbers here, as in TensorFlow Serving.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from keras_dsr.serving.errors import Code, ServingError, short
from keras_dsr.serving.saved_model import Signature
from keras_dsr.serving.tensors import TensorSpec

_JSON_NAMES = {dict: "Object", list: "Array", str: "String", bool: "Bool", int: "Number", float: "Number"}


def parse(body: bytes | bytearray) -> dict[str, Any]:
    """The object in a request's body.

    Raises:
        ServingError: if it is not JSON, or no object.
    """
    if not body:
        raise _invalid("JSON Parse error: The document is empty.")
    try:
        document = json.loads(body)
    except RecursionError as error:
        raise _invalid("JSON Parse error: arrays are nested too deep.") from error
    except ValueError as error:  # malformed JSON, malformed UTF-8, a number of more digits than Python reads
        raise _invalid(f"JSON Parse error: {error}.") from error
    if not isinstance(document, dict):
        raise _invalid(f'A request is an object, {{"instances": [...]}}. Received JSON of type {_kind(document)}.')
    return document


def signature_name(document: dict[str, Any]) -> str:
    """The signature that a request asks for; "" if it names none."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _invalid(f"'signature_name' must be a string. Received {_kind(name)}.")
    return name


def read(document: dict[str, Any], signature: Signature) -> dict[str, np.ndarray]:
    """The inputs in a request.

    Args:
        document: What `parse` gave.
        signature: What they are for.

    Raises:
        ServingError: if they are not what the signature takes.
    """
    if ("instances" in document) == ("inputs" in document):
        raise _invalid("A request has one of the keys 'inputs' and 'instances'. Received both, or none.")
    if "instances" in document:
        return _read_instances(document["instances"], signature)
    return _read_inputs(document["inputs"], signature)


def write(document: dict[str, Any], outputs: Mapping[str, np.ndarray]) -> bytes:
    """The answer to a request, in the format that it was in. The name of a single output is left out.

    Raises:
        ServingError: if outputs cannot be told apart by example, which the row format must, or are of a type that JSON
            lacks.
    """
    if not outputs:
        raise _invalid("The signature has no outputs, so there is nothing to answer.")
    columns = {name: _to_json(name, array) for name, array in outputs.items()}
    if "inputs" in document:
        return _dump({"outputs": columns if len(columns) > 1 else next(iter(columns.values()))})
    if len({array.shape[:1] for array in outputs.values()}) > 1 or any(not array.ndim for array in outputs.values()):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in outputs.items())
        raise _invalid(f"Outputs have no common batch dimension ({shapes}). Send 'inputs' instead of 'instances'.")
    if len(columns) == 1:
        return _dump({"predictions": next(iter(columns.values()))})
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return _dump({"predictions": rows})


def _read_instances(instances: Any, signature: Signature) -> dict[str, np.ndarray]:
    if not isinstance(instances, list) or not instances:
        raise _invalid("'instances' must be an array of at least one example.")
    specs = signature.inputs
    if _is_object(instances[0]):
        columns: dict[str, list] = {name: [] for name in specs}
        for number, instance in enumerate(instances):
            if not _is_object(instance) or instance.keys() != specs.keys():
                received = f"the keys {short(sorted(instance))}" if _is_object(instance) else _kind(instance)
                raise _invalid(
                    f"Each of 'instances' must be an object with the keys {', '.join(specs)}. Received {received} at "
                    f"item {number}."
                )
            for name, value in instance.items():
                columns[name].append(value)
    elif len(specs) == 1:
        columns = {next(iter(specs)): instances}
    else:
        raise _invalid(f"'instances' must be objects with the keys {', '.join(specs)}. Received a plain list.")
    return {name: to_array(values, specs[name]) for name, values in columns.items()}


def _read_inputs(inputs: Any, signature: Signature) -> dict[str, np.ndarray]:
    specs = signature.inputs
    if not _is_object(inputs):
        if len(specs) != 1:
            raise _invalid(f"'inputs' must be an object with the keys {', '.join(specs)}. Received {_kind(inputs)}.")
        inputs = {next(iter(specs)): inputs}
    if inputs.keys() != specs.keys():
        raise _invalid(f"'inputs' must have the keys {', '.join(specs)}. Received the keys {short(sorted(inputs))}.")
    return {name: to_array(value, specs[name]) for name, value in inputs.items()}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not _is_bytes(value)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"} and isinstance(value["b64"], str)


def to_array(value: Any, spec: TensorSpec) -> np.ndarray:
    """The array of nested lists of numbers, booleans or strings.

    Raises:
        ServingError: if a value is not of the type, not exact in it, or the lists are ragged.
    """
    if spec.dtype.is_floating:
        allowed = {int, float}
    elif spec.dtype.is_integer:
        allowed = {int}
    elif spec.dtype == tf.bool:
        allowed = {bool}
    elif spec.dtype == tf.string:
        allowed = {str, dict}
    else:
        raise ServingError(Code.UNIMPLEMENTED, f"Input {spec.name!r} takes {spec}, which JSON has no way to write.")
    boxed = np.array(value, dtype=object)
    flat = boxed.ravel().tolist()
    if set(map(type, flat)) - allowed:
        wrong = next(number for number, leaf in enumerate(flat) if type(leaf) not in allowed)
        place = "".join(f"[{index}]" for index in np.unravel_index(wrong, boxed.shape)) if boxed.ndim else "the top"
        ragged = ": lists of one level must have one length, and hold values or lists, not both"
        raise _invalid(
            f"Input {spec.name!r} takes {spec}. Received {_kind(flat[wrong])} at {place}"
            f"{ragged if type(flat[wrong]) is list else ''}."
        )
    if spec.dtype == tf.string:
        strings = np.empty(len(flat), dtype=object)
        strings[:] = [_bytes(leaf, spec) for leaf in flat]
        return strings.reshape(boxed.shape)
    _check_exact(flat, spec)
    try:
        with np.errstate(over="raise"):
            return boxed.astype(spec.dtype.as_numpy_dtype)
    except (OverflowError, FloatingPointError) as error:
        raise _invalid(f"Input {spec.name!r} takes {spec}. Received a number that is out of its range.") from error


def _check_exact(flat: list, spec: TensorSpec) -> None:
    """Refuses whole numbers that a float would round, as TensorFlow Serving does."""
    if spec.dtype.is_floating:
        largest = 2 ** (ml_dtypes.finfo(spec.dtype.as_numpy_dtype).nmant + 1) - 1
        if any(type(leaf) is int and abs(leaf) > largest for leaf in flat):
            raise _invalid(
                f"Input {spec.name!r} takes {spec}. Received a whole number beyond ±{largest}, which it may not hold "
                "exactly; write it with a decimal point to have it rounded."
            )


def _bytes(leaf: Any, spec: TensorSpec) -> bytes:
    if isinstance(leaf, str):
        return leaf.encode("utf-8", "surrogatepass")
    if _is_bytes(leaf):
        try:
            return base64.b64decode(leaf["b64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _invalid(f"Input {spec.name!r}: {{'b64': ...}} does not hold base64: {error}.") from error
    raise _invalid(f"Input {spec.name!r} takes strings or {{'b64': ...}}. Received an object of another form.")


def _to_json(name: str, array: np.ndarray) -> Any:
    if array.dtype == object:
        texts = [_string(value, as_bytes=name.endswith("_bytes")) for value in array.ravel().tolist()]
        boxed = np.empty(len(texts), dtype=object)
        boxed[:] = texts
        return boxed.reshape(array.shape).tolist()
    if array.dtype.kind not in "biuf":
        raise ServingError(
            Code.UNIMPLEMENTED, f"Output {name!r} is {array.dtype}, which JSON has no way to write. Ask over gRPC."
        )
    if array.dtype.kind == "f" and array.dtype != np.float64:
        # The shortest decimal that names the float32; as a double it would be written with 17 digits.
        return array.astype("U").astype(np.float64).tolist()
    return array.tolist()


def _string(value: bytes, as_bytes: bool) -> Any:
    if not as_bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass  # base64 keeps it
    return {"b64": base64.b64encode(value).decode()}


def _dump(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


def _kind(value: Any) -> str:
    return "Null" if value is None else _JSON_NAMES[type(value)]


def _invalid(message: str) -> ServingError:
    return ServingError(Code.INVALID_ARGUMENT, message)

"""Arrays and TensorFlow's tensor messages, and what a signature says of a tensor."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo

from keras_dsr.serving.errors import Code, ServingError, short

# Where TensorFlow Serving puts the values. Many clients read `outputs["logits"].float_val` themselves.
_FIELDS = types.MappingProxyType(
    {
        tf.float32: "float_val",
        tf.float64: "double_val",
        tf.int8: "int_val",
        tf.int16: "int_val",
        tf.int32: "int_val",
        tf.uint8: "int_val",
        tf.uint16: "int_val",
        tf.int64: "int64_val",
        tf.uint32: "uint32_val",
        tf.uint64: "uint64_val",
        tf.bool: "bool_val",
        tf.string: "string_val",
    }
)
_SMALL = 4096  # values; above, the bytes are sent as they are, which is many times as fast


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a signature says of an input or output.

    Args:
        name: Its name in the signature.
        dtype: Its type.
        shape: Its dimensions, `None` for those of any size; `None` if it may have any rank.
    """

    name: str
    dtype: tf.DType
    shape: tuple[int | None, ...] | None

    @classmethod
    def from_info(cls, name: str, info: TensorInfo) -> TensorSpec:
        """The spec that the signature of a SavedModel holds."""
        shape = None
        if not info.tensor_shape.unknown_rank:
            shape = tuple(None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim)
        return cls(name, tf.as_dtype(info.dtype), shape)

    @property
    def batched(self) -> bool:
        """Whether dimension 0 may have any size."""
        return bool(self.shape) and self.shape[0] is None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of that shape fits."""
        return self.shape is None or (
            len(shape) == len(self.shape)
            and all(size is None or size == given for size, given in zip(self.shape, shape, strict=True))
        )

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses a shape that does not fit, or holds nothing.

        Raises:
            ServingError: with what fits.
        """
        received = f"Input {self.name!r} takes {self}. Received shape {short(shape)}"
        if not self.takes(shape):
            raise ServingError(Code.INVALID_ARGUMENT, f"{received}.")
        if 0 in shape and 0 not in (self.shape or ()):
            raise ServingError(Code.INVALID_ARGUMENT, f"{received}, which is empty: send at least 1 of each dimension.")

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype.name} of any shape"
        return f"{self.dtype.name} {_text(self.shape)}"


def _text(shape: tuple[int | None, ...]) -> str:
    sizes = ["?" if size is None else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def from_protos(
    protos: Mapping[str, TensorProto], specs: Mapping[str, TensorSpec], max_bytes: int
) -> dict[str, np.ndarray]:
    """The arrays in a request's tensors.

    Args:
        protos: The tensors by name.
        specs: What the signature takes, by the same names.
        max_bytes: How large the arrays may be together: one value in a message may stand for any number of equal ones.

    Raises:
        ServingError: if one is of another type or shape, or malformed, or all are too large.
    """
    size, arrays = 0, {}
    for name, spec in specs.items():
        shape = _check(protos[name], spec)
        size += _bytes(protos[name], shape, spec)
        if size > max_bytes:
            raise ServingError(
                Code.RESOURCE_EXHAUSTED,
                f"This server takes at most {max_bytes} bytes in the inputs of a request. Received {size} up to "
                f"{name!r} of shape {short(shape)}. Send smaller batches.",
            )
        arrays[name] = _array(protos[name], shape, spec)
    return arrays


def _check(proto: TensorProto, spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a tensor, before anything is made of it; refuses one that does not fit."""
    expected = f"Input {spec.name!r} takes {spec}."
    if proto.dtype != spec.dtype.as_datatype_enum:
        raise ServingError(Code.INVALID_ARGUMENT, f"{expected} Received {_type_name(proto.dtype)}.")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise ServingError(Code.INVALID_ARGUMENT, f"{expected} Received a tensor that does not say its whole shape.")
    spec.check(shape)
    return shape


def _bytes(proto: TensorProto, shape: tuple[int, ...], spec: TensorSpec) -> int:
    """How large the array of a tensor is."""
    count = math.prod(shape)
    size = count * spec.dtype.size
    texts = proto.string_val
    if texts:
        size += sum(map(len, texts)) + max(0, count - len(texts)) * len(texts[-1])  # the last stands for all after it
    return size


def _array(proto: TensorProto, shape: tuple[int, ...], spec: TensorSpec) -> np.ndarray:
    try:
        return tf.make_ndarray(proto)
    except (OverflowError, TypeError, ValueError) as error:
        received = f"Received shape {short(shape)} with values that do not fit it: {error}"
        raise ServingError(Code.INVALID_ARGUMENT, f"Input {spec.name!r} takes {spec}. {received}") from error


def to_proto(array: np.ndarray) -> TensorProto:
    """The tensor message of an output."""
    dtype = tf.string if array.dtype == object else tf.as_dtype(array.dtype)
    field = _FIELDS.get(dtype)
    if field is None or array.size > _SMALL:
        return tf.make_tensor_proto(array, dtype=dtype)
    proto = TensorProto(dtype=dtype.as_datatype_enum)
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    getattr(proto, field).extend(array.ravel().tolist())
    return proto


def _type_name(enum: int) -> str:
    try:
        return tf.as_dtype(enum).name
    except TypeError:
        return f"type number {enum}"

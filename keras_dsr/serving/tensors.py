"""Arrays and TensorFlow's tensor messages, and what a signature says of a tensor."""

from __future__ import annotations

import dataclasses
import math
import types

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo

from keras_dsr.serving.errors import Code, ServingError

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

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype.name} of any shape"
        return f"{self.dtype.name} {_text(self.shape)}"


def _text(shape: tuple[int | None, ...]) -> str:
    sizes = ["?" if size is None else str(size) for size in shape]
    return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"


def from_proto(proto: TensorProto, spec: TensorSpec, max_bytes: int) -> np.ndarray:
    """The array in a request's tensor.

    Args:
        proto: The tensor.
        spec: What the signature takes.
        max_bytes: How large the array may be: one value in a message may stand for any number of equal ones.

    Raises:
        ServingError: if it is of another type, malformed, or too large.
    """
    expected = f"Input {spec.name!r} takes {spec}."
    if proto.dtype != spec.dtype.as_datatype_enum:
        raise ServingError(Code.INVALID_ARGUMENT, f"{expected} Received {_type_name(proto.dtype)}.")
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise ServingError(Code.INVALID_ARGUMENT, f"{expected} Received a tensor that does not say its whole shape.")
    size = math.prod(shape) * spec.dtype.size
    if size > max_bytes:
        raise ServingError(
            Code.RESOURCE_EXHAUSTED,
            f"{expected} Received shape {_text(shape)}, which is {size} bytes. "
            f"This server takes at most {max_bytes}; send smaller batches.",
        )
    try:
        return tf.make_ndarray(proto)
    except (TypeError, ValueError) as error:
        raise ServingError(
            Code.INVALID_ARGUMENT, f"{expected} Received shape {_text(shape)} with values that do not fill it: {error}"
        ) from error


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

"""Tensors of rare types, what is refused before anything is made of it, and errors as they travel."""

from __future__ import annotations

import pickle
from urllib.parse import quote

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework.tensor_pb2 import TensorProto

from keras_dsr.export.tf_serving import WARM_UP
from keras_dsr.serving import Code, ServingError, json_tensors, saved_model
from keras_dsr.serving.tensors import TensorSpec, from_protos

pytestmark = pytest.mark.tensorflow_only


def test_bfloat16_in_json():
    spec = TensorSpec("x", tf.bfloat16, (None,))
    array = json_tensors.to_array([0.5, 255], spec)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype("float32").tolist() == [0.5, 255]
    with pytest.raises(ServingError, match="beyond ±255, which it may not hold exactly"):
        json_tensors.to_array([257], spec)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, "complex64"])
def test_outputs_that_json_cannot_write(dtype):
    with pytest.raises(ServingError, match=f"Output 'y' is {np.dtype(dtype)}, which JSON has no way") as error:
        json_tensors.write({"inputs": [1]}, {"y": np.ones(2, dtype)})
    assert error.value.code is Code.UNIMPLEMENTED


def test_the_shape_is_looked_at_before_an_array_is_made(monkeypatch):
    monkeypatch.setattr(tf, "make_ndarray", lambda proto: pytest.fail("it was made"))
    proto = TensorProto(dtype=tf.float32.as_datatype_enum, float_val=[1.0])
    proto.tensor_shape.dim.add().size = 10**6
    with pytest.raises(ServingError, match=r"takes float32 \(\?, 3\)\. Received shape \(1000000,\)") as error:
        from_protos({"x": proto}, {"x": TensorSpec("x", tf.float32, (None, 3))}, max_bytes=2**31)
    assert error.value.code is Code.INVALID_ARGUMENT


def test_a_dimension_of_0_where_the_model_wants_it():
    TensorSpec("x", tf.float32, (None, 0)).check((2, 0))


@pytest.mark.parametrize("letter", ["x", "é", "%", "\U0001f40d", "\ud800"])
def test_messages_are_cut_to_what_grpc_sends(letter):
    message = ServingError(Code.UNKNOWN, 10_000 * letter).message
    assert 5000 < len(quote(message, errors="replace")) < 6010
    assert message.endswith("...")
    assert ServingError(Code.UNKNOWN, 100 * letter).message == 100 * letter


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(ServingError(Code.NOT_FOUND, "no model")))
    assert (error.code, error.message, str(error)) == (Code.NOT_FOUND, "no model", "NOT_FOUND: no model")


def test_the_warm_up_is_where_the_export_writes_it():
    assert saved_model._WARMUP.as_posix() == WARM_UP

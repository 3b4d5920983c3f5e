"""A SavedModel in the C++ loader and session that TensorFlow Serving runs, called by TensorFlow's C API.

`tf.saved_model.load` is another program: it rebuilds Python objects. What is loaded here is the graph of the tag
`serve`, variables restored, optimised by Grappler, without XLA and on the CPU, as TensorFlow Serving has it.

Reference: `tensorflow/c/c_api.h`, https://www.tensorflow.org/install/lang_c.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

from keras_dsr.export.tensors import Tensor, check_inputs

_POINTER = ctypes.c_void_p


class _Output(ctypes.Structure):
    """TF_Output: one of an operation's results."""

    _fields_ = (("operation", _POINTER), ("index", ctypes.c_int))


# Name, result and arguments of each function.
_FUNCTIONS = (
    ("TF_NewStatus", _POINTER, ()),
    ("TF_DeleteStatus", None, (_POINTER,)),
    ("TF_GetCode", ctypes.c_int, (_POINTER,)),
    ("TF_Message", ctypes.c_char_p, (_POINTER,)),
    ("TF_NewGraph", _POINTER, ()),
    ("TF_DeleteGraph", None, (_POINTER,)),
    ("TF_GraphOperationByName", _POINTER, (_POINTER, ctypes.c_char_p)),
    ("TF_NewSessionOptions", _POINTER, ()),
    ("TF_DeleteSessionOptions", None, (_POINTER,)),
    ("TF_SetConfig", None, (_POINTER, ctypes.c_char_p, ctypes.c_size_t, _POINTER)),
    (
        "TF_LoadSessionFromSavedModel",
        _POINTER,
        (
            _POINTER,
            _POINTER,
            ctypes.c_char_p,
            ctypes.POINTER(ctypes.c_char_p),
            ctypes.c_int,
            _POINTER,
            _POINTER,
            _POINTER,
        ),
    ),
    ("TF_CloseSession", None, (_POINTER, _POINTER)),
    ("TF_DeleteSession", None, (_POINTER, _POINTER)),
    (
        "TF_SessionRun",
        None,
        (
            _POINTER,
            _POINTER,
            ctypes.POINTER(_Output),
            ctypes.POINTER(_POINTER),
            ctypes.c_int,
            ctypes.POINTER(_Output),
            ctypes.POINTER(_POINTER),
            ctypes.c_int,
            ctypes.POINTER(_POINTER),
            ctypes.c_int,
            _POINTER,
            _POINTER,
        ),
    ),
    (
        "TF_AllocateTensor",
        _POINTER,
        (ctypes.c_int, ctypes.POINTER(ctypes.c_int64), ctypes.c_int, ctypes.c_size_t),
    ),
    ("TF_DeleteTensor", None, (_POINTER,)),
    ("TF_TensorData", _POINTER, (_POINTER,)),
    ("TF_TensorByteSize", ctypes.c_size_t, (_POINTER,)),
    ("TF_TensorType", ctypes.c_int, (_POINTER,)),
    ("TF_NumDims", ctypes.c_int, (_POINTER,)),
    ("TF_Dim", ctypes.c_int64, (_POINTER, ctypes.c_int)),
)


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tf.sysconfig.get_lib())
    name = "libtensorflow_cc.2.dylib" if sys.platform == "darwin" else "libtensorflow_cc.so.2"
    try:
        library = ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise RuntimeError(
            f"TensorFlow's C API is not in this installation of TensorFlow {tf.__version__} ({error}). The wheels for "
            "Linux and macOS have it."
        ) from error
    for function, result, arguments in _FUNCTIONS:
        entry = getattr(library, function)
        entry.restype, entry.argtypes = result, arguments
    return library


class _Status:
    """TF_Status, as a context: what went wrong in it is raised at its end."""

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> Any:
        self.pointer = _library().TF_NewStatus()
        return self.pointer

    def __exit__(self, kind: Any, *_: Any) -> None:
        code = _library().TF_GetCode(self.pointer)
        message = (_library().TF_Message(self.pointer) or b"").decode(errors="replace")
        _library().TF_DeleteStatus(self.pointer)
        if kind is None and code:
            raise RuntimeError(f"TensorFlow failed to {self.doing}: {message.strip()}.")


@dataclasses.dataclass(frozen=True)
class Signature:
    """A function of a SavedModel.

    Args:
        inputs: By name.
        outputs: By name.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class Session:
    """A loaded SavedModel. Free it with `close`, or use it as a context.

    Args:
        folder: The folder of one version, with saved_model.pb in it.

    Raises:
        FileNotFoundError: if there is no SavedModel.
        ValueError: if it is damaged, or not for serving.
        RuntimeError: if TensorFlow has no C API here.

    Example:

        with Session(Path("savedmodels/digits/1")) as session:
            answer = session.run("serving_default", {"image": images})
            print(answer["logits"])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._session: Any = None
        self._lock = threading.Lock()
        self._definitions = _definitions(self.folder)
        self._signatures = _signatures(self._definitions)
        library = _library()
        # Results to the bit must not depend on whether this machine has an accelerator.
        config = config_pb2.ConfigProto(device_count={"GPU": 0}).SerializeToString()
        tags = (ctypes.c_char_p * 1)(b"serve")
        self._graph = library.TF_NewGraph()
        options = library.TF_NewSessionOptions()
        try:
            with _Status("set the session's options") as status:
                library.TF_SetConfig(options, config, len(config), status)
            with _Status(f"load the SavedModel {self.folder}") as status:
                path = os.fsencode(self.folder)
                self._session = library.TF_LoadSessionFromSavedModel(
                    options, None, path, tags, 1, self._graph, None, status
                )
        except RuntimeError as error:
            self.close()
            raise ValueError(
                f"{error} It is damaged, or was written by another version of TensorFlow: export it again."
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            library.TF_DeleteSessionOptions(options)

    @property
    def signatures(self) -> Mapping[str, Signature]:
        """The functions of the SavedModel, by name."""
        return self._signatures

    def run(self, signature: str, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Calls a signature; several threads may at once.

        Args:
            signature: Its name.
            tensors: Its inputs by name, of the dtypes that it states.

        Returns:
            All its outputs, by name.

        Raises:
            ValueError: if there is no such signature, or the inputs are not those that it takes.
            RuntimeError: if TensorFlow fails to run it, or the session is closed.
        """
        if self._session is None:
            raise RuntimeError(f"The session of {self.folder} is closed. Make another with Session(folder).")
        if signature not in self._signatures:
            raise ValueError(
                f"{self.folder} has the signatures {', '.join(sorted(self._signatures))}. Received {signature!r}."
            )
        expected = self._signatures[signature]
        strings = [
            name for part in (expected.inputs, expected.outputs) for name, t in part.items() if t.dtype == "string"
        ]
        if strings:
            raise ValueError(f"{signature!r} has tensors of strings, which are not passed here: {strings}.")
        arrays = check_inputs(f"Signature {signature!r}", expected.inputs, tensors)
        definition = self._definitions[signature]
        names = sorted(definition.outputs)
        library = _library()
        inputs = (_Output * len(arrays))(*(self._place(definition.inputs[name].name) for name in arrays))
        outputs = (_Output * len(names))(*(self._place(definition.outputs[name].name) for name in names))
        values = (_POINTER * len(arrays))()
        results = (_POINTER * len(names))()
        try:
            for index, array in enumerate(arrays.values()):
                values[index] = _to_tensor(array)
            with _Status(f"run {signature!r} of {self.folder}") as status:
                library.TF_SessionRun(
                    self._session,
                    None,
                    inputs,
                    values,
                    len(arrays),
                    outputs,
                    results,
                    len(names),
                    None,
                    0,
                    None,
                    status,
                )
            return {name: _to_array(results[index]) for index, name in enumerate(names)}
        finally:
            for pointer in (*values, *results):
                if pointer:
                    library.TF_DeleteTensor(pointer)

    def close(self) -> None:
        """Frees all that was loaded. It must not be running."""
        library = _library()
        with self._lock:
            session, self._session = self._session, None
            graph, self._graph = self._graph, None
        if session is not None:
            with _Status("close the session") as status:
                library.TF_CloseSession(session, status)
            with _Status("free the session") as status:
                library.TF_DeleteSession(session, status)
        if graph is not None:
            library.TF_DeleteGraph(graph)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _place(self, tensor: str) -> _Output:
        operation, _, index = tensor.partition(":")
        pointer = _library().TF_GraphOperationByName(self._graph, operation.encode())
        if not pointer:
            raise RuntimeError(f"The graph of {self.folder} has no operation {operation!r}, which a signature names.")
        return _Output(pointer, int(index or 0))


def signatures(folder: str | os.PathLike[str]) -> Mapping[str, Signature]:
    """The functions of a SavedModel, by name, without loading it.

    Raises:
        FileNotFoundError: if there is no SavedModel.
        ValueError: if its saved_model.pb is damaged.
    """
    return _signatures(_definitions(Path(folder)))


def _definitions(folder: Path) -> Mapping[str, Any]:
    """Of the graph with the tag `serve`, by name, without those that are TensorFlow's own."""
    path = folder / "saved_model.pb"
    if not path.is_file():
        raise FileNotFoundError(f"There is no SavedModel in {folder}: it has no saved_model.pb.")
    try:
        graphs = saved_model_pb2.SavedModel.FromString(path.read_bytes()).meta_graphs
    except DecodeError as error:
        raise ValueError(f"{path} is not the graph of a SavedModel, or is damaged: {error}.") from error
    for graph in graphs:
        if set(graph.meta_info_def.tags) == {"serve"}:
            return {name: graph.signature_def[name] for name in graph.signature_def if not name.startswith("__")}
    raise ValueError(f"{path} has no graph with the tag 'serve' alone, which is what TensorFlow Serving loads.")


def _signatures(definitions: Mapping[str, Any]) -> dict[str, Signature]:
    return {name: Signature(_tensors(x.inputs), _tensors(x.outputs)) for name, x in sorted(definitions.items())}


def _tensors(infos: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {}
    for name, info in sorted(infos.items()):
        sizes = tuple(None if dim.size < 0 else dim.size for dim in info.tensor_shape.dim)
        shape = None if info.tensor_shape.unknown_rank else sizes
        tensors[name] = Tensor(shape, tf.dtypes.as_dtype(info.dtype).name)
    return tensors


def _to_tensor(array: np.ndarray) -> Any:
    library = _library()
    dims = (ctypes.c_int64 * array.ndim)(*array.shape)
    pointer = library.TF_AllocateTensor(
        tf.dtypes.as_dtype(array.dtype).as_datatype_enum, dims, array.ndim, array.nbytes
    )
    if not pointer:
        raise MemoryError(f"TensorFlow has no memory for a tensor of {array.nbytes} bytes.")
    if array.nbytes:
        ctypes.memmove(library.TF_TensorData(pointer), array.ctypes.data, array.nbytes)
    return pointer


def _to_array(pointer: Any) -> np.ndarray:
    library = _library()
    shape = tuple(library.TF_Dim(pointer, axis) for axis in range(library.TF_NumDims(pointer)))
    dtype = tf.dtypes.as_dtype(library.TF_TensorType(pointer))
    array = np.empty(shape, dtype.as_numpy_dtype)
    expected = math.prod(shape) * array.itemsize
    if library.TF_TensorByteSize(pointer) != expected:
        raise RuntimeError(f"TensorFlow gave a tensor of {dtype.name} {shape} that has not {expected} bytes.")
    if expected:
        ctypes.memmove(array.ctypes.data, library.TF_TensorData(pointer), expected)
    return array

"""ONNX files in the runtimes that people serve them with: ONNX Runtime, and OpenVINO where it is installed.

Our files keep what makes the spikes of their neurons readable out of the graph, so that it costs nothing; `traced` puts
it back in.
"""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from keras_dsr.export import passes
from keras_dsr.export.tensors import Tensor, check_inputs


def read(path: str | os.PathLike[str]) -> Any:
    """The ModelProto of an ONNX file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ONNX file, or is damaged.
        ImportError: if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise _needs_extra("onnx", error) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no ONNX file at {path}.")
    try:
        model = onnx.load(path)
    except DecodeError as error:
        raise _damaged(path, error) from error
    if not model.graph.node:
        raise _damaged(path, "it has no nodes")
    return model


class Runtime(abc.ABC):
    """What `OnnxRuntime` and `OpenVino` share: what the file says of itself, and the model with its spikes.

    Args:
        path: The ONNX file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ONNX file, or is damaged.
        ImportError: if the runtime is not installed; the error says how to install it.
    """

    name: str
    """The runtime's name and version."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        model = read(self.path)
        weights = {initializer.name for initializer in model.graph.initializer}
        self.inputs: Mapping[str, Tensor] = {x.name: _tensor(x) for x in model.graph.input if x.name not in weights}
        self.outputs: tuple[str, ...] = tuple(x.name for x in model.graph.output)
        self.metadata: Mapping[str, str] = passes.metadata_of(model)
        self._plain = self._load(self.path)
        self._traced: Any = None

    @property
    def neurons(self) -> tuple[str, ...]:
        """Names of the neuron layers, in the order in which they run; raises a ValueError if the file has none."""
        try:
            return tuple(json.loads(self.metadata["keras_dsr.neurons"]))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.path} does not say in its metadata (keras_dsr.neurons) which neuron layers it has: it was not "
                "written by keras_dsr.export."
            ) from error

    def run(self, tensors: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Runs the file.

        Args:
            tensors: Its inputs by name, of the dtypes that it states.
            outputs: Names of the outputs that are wanted; `None` for all.

        Returns:
            The outputs, by name.

        Raises:
            ValueError: if there is no such output, or the inputs are not those that it takes.
        """
        unknown = sorted(set(outputs or ()) - set(self.outputs))
        if unknown:
            raise ValueError(f"{self.path} has the outputs {list(self.outputs)}. Received {unknown}.")
        return self._call(self._plain, self._checked(tensors), tuple(outputs or self.outputs))

    def traced(self, tensors: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Runs the file with the spikes of its neurons as outputs too.

        Args:
            tensors: As in `run`.

        Returns:
            The outputs, by name; and for each neuron layer, by name and in order, what it put out: 0, or the worth of
            a spike, of shape (batch, time, ...), or (batch, ...) if the file runs one time step.

        Raises:
            ValueError: as `run`, and if the file has no neuron layers.
        """
        arrays = self._checked(tensors)
        names = (*self.outputs, *(f"{passes.SPIKES}{layer}" for layer in self.neurons))
        if self._traced is None:
            self._traced = self._load(passes.with_spikes(read(self.path)).SerializeToString())
        results = self._call(self._traced, arrays, names)
        return (
            {name: results[name] for name in self.outputs},
            {layer: results[f"{passes.SPIKES}{layer}"] for layer in self.neurons},
        )

    def _checked(self, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return check_inputs(str(self.path.name), self.inputs, tensors)

    @abc.abstractmethod
    def _load(self, model: Path | bytes) -> Any:
        """The model, ready to run; sets `name`."""

    @abc.abstractmethod
    def _call(self, loaded: Any, arrays: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs what `_load` gave."""


class OnnxRuntime(Runtime):
    """An ONNX file in ONNX Runtime, on the CPU."""

    def _load(self, model: Path | bytes) -> Any:
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as errors
        except ImportError as error:
            raise _needs_extra("onnxruntime", error) from error
        self.name = f"ONNX Runtime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        source = model if isinstance(model, bytes) else str(model)
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented) as error:
            raise _damaged(self.path, error) from error

    def _call(self, loaded: Any, arrays: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        return dict(zip(outputs, loaded.run(list(outputs), arrays), strict=True))


class OpenVino(Runtime):
    """An ONNX file in OpenVINO, on the CPU, in float32; its own default on many CPUs is bfloat16."""

    def _load(self, model: Path | bytes) -> Any:
        try:
            import openvino
        except ImportError as error:
            raise _needs_extra("openvino", error, "openvino") from error
        self.name = f"OpenVINO {openvino.__version__.split('-')[0]}"
        core = openvino.Core()
        read = core.read_model(model if isinstance(model, bytes) else str(model))
        return core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def _call(self, loaded: Any, arrays: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        results = loaded(arrays, share_inputs=False, share_outputs=False)
        by_name = {name: results[output] for output in loaded.outputs for name in output.get_names()}
        return {name: np.array(by_name[name]) for name in outputs}


def openvino_is_installed() -> bool:
    """Whether `OpenVino` can be used here."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def _tensor(info: Any) -> Tensor:
    import onnx

    tensor = info.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    if not tensor.HasField("shape"):
        return Tensor(None, dtype)
    sizes = (dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return Tensor(tuple(sizes), dtype)


def _damaged(path: Any, error: object) -> ValueError:
    why = str(error).rstrip(".")
    return ValueError(f"{path} is not an ONNX file that can be run, or is damaged: {why}. Export it again.")


def _needs_extra(package: str, error: ImportError, extra: str = "export") -> ImportError:
    return ImportError(
        f"Running ONNX files needs the package {package}. Install it with: pip install 'keras-dsr[{extra}]' ({error})."
    )

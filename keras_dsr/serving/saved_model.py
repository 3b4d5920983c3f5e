"""One version of a model: a SavedModel, its signatures, its warm-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from keras_dsr.serving.errors import Code, ServingError, short
from keras_dsr.serving.tensors import TensorSpec, from_protos

DEFAULT_SIGNATURE = "serving_default"
_WARMUP = Path("assets.extra", "tf_serving_warmup_requests")
_MOST_WARMUP_REQUESTS = 1000  # TensorFlow Serving's limit


@dataclasses.dataclass(frozen=True)
class Signature:
    """One function of a SavedModel.

    Args:
        name: Its name.
        inputs: What it takes, by name.
        outputs: What it gives, by name.
        run: From arrays to arrays, by name. Raises `ServingError` with TensorFlow's own code and reason.
    """

    name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]

    @property
    def batched(self) -> bool:
        """Whether dimension 0 of every input and output is a batch of any size."""
        specs = [*self.inputs.values(), *self.outputs.values()]
        return bool(self.inputs) and all(spec.batched for spec in specs)

    def check(self, inputs: Mapping[str, np.ndarray], allow_non_finite: bool = False) -> None:
        """Refuses inputs that the function cannot make sense of.

        Args:
            inputs: Arrays of the right types.
            allow_non_finite: Whether NaN and infinity may be among them.

        Raises:
            ServingError: if a name is missing or unknown, a rank or size is wrong or 0, the batch size is not the
                same for all, or a number is not finite.
        """
        self.check_names(inputs)
        for name, spec in self.inputs.items():
            array = inputs[name]
            spec.check(array.shape)
            if spec.dtype.is_floating and not allow_non_finite and not np.isfinite(array).all():
                raise ServingError(
                    Code.INVALID_ARGUMENT,
                    f"Input {name!r} takes finite numbers. Received NaN or infinity at {_first_non_finite(array)}.",
                )
        if self.batched and len({array.shape[0] for array in inputs.values()}) > 1:
            sizes = ", ".join(f"{name} {array.shape[0]}" for name, array in inputs.items())
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"All inputs must have the same batch size, dimension 0. Received {sizes}.",
            )

    def check_names(self, names: Mapping[str, object]) -> None:
        """Refuses names that are missing or unknown.

        Raises:
            ServingError: if there are some, with what the signature takes.
        """
        if names.keys() != self.inputs.keys():
            takes = ", ".join(f"{name} {spec}" for name, spec in self.inputs.items())
            raise ServingError(
                Code.INVALID_ARGUMENT,
                f"input size does not match signature: {self.name!r} takes {takes}. Sent extra: "
                f"{short(sorted(names.keys() - self.inputs.keys()))}. Missing but required: "
                f"{sorted(self.inputs.keys() - names.keys())}.",
            )


def _first_non_finite(array: np.ndarray) -> str:
    return "".join(f"[{index}]" for index in np.argwhere(~np.isfinite(array))[0]) or "the scalar"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A SavedModel in memory.

    Args:
        path: Where it was read from.
        signatures: Its functions by name.
        signature_defs: What the file says of them, for `GetModelMetadata`.
        loaded: What TensorFlow gave; the functions' variables live as long as it does.
    """

    path: Path
    signatures: Mapping[str, Signature]
    signature_defs: Mapping[str, SignatureDef]
    loaded: object

    def signature(self, name: str) -> Signature:
        """A signature by name; `serving_default` for "".

        Raises:
            ServingError: FAILED_PRECONDITION, as in TensorFlow Serving, if there is none of that name.
        """
        found = self.signatures.get(name or DEFAULT_SIGNATURE)
        if found is None:
            raise ServingError(
                Code.FAILED_PRECONDITION,
                f'Serving signature key "{short(name or DEFAULT_SIGNATURE)}" not found. '
                f"The model has: {', '.join(self.signatures)}.",
            )
        return found


def load(path: Path) -> SavedModel:
    """Reads a SavedModel and runs its warm-up requests.

    Args:
        path: The folder of the version. A SavedModel is a program: load only those whose maker you trust.

    Raises:
        FileNotFoundError: if there is no SavedModel.
        ValueError: if it has no signatures, or no graph with the tag `serve`.
        ServingError: if a warm-up request fails.
        Exception: whatever TensorFlow raises for a file that is damaged.
    """
    file = path / "saved_model.pb"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no saved_model.pb. Write versions with keras_dsr.export.")
    contents = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    graphs = [graph for graph in contents.meta_graphs if "serve" in graph.meta_info_def.tags]
    if not graphs:
        raise ValueError(f"{path} has no graph with the tag 'serve'.")
    definitions = dict(graphs[0].signature_def)
    loaded = tf.saved_model.load(str(path), tags=["serve"])
    signatures = {
        name: Signature(
            name=name,
            inputs={key: TensorSpec.from_info(key, info) for key, info in sorted(definitions[name].inputs.items())},
            outputs={key: TensorSpec.from_info(key, info) for key, info in sorted(definitions[name].outputs.items())},
            run=_runner(function),
        )
        for name, function in loaded.signatures.items()
    }
    if not signatures:
        raise ValueError(f"{path} has no signatures. Save it with signatures={{'serving_default': ...}}.")
    model = SavedModel(path, signatures, definitions, loaded)
    _warm_up(model)
    return model


def _runner(function: Callable) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            outputs = function(**{name: tf.constant(array) for name, array in inputs.items()})
            return {name: tensor.numpy() for name, tensor in outputs.items()}
        except tf.errors.OpError as error:
            raise ServingError(Code(error.error_code), _reason(error)) from error

    return run


def _reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message without where in the Python source the operation was made."""
    return error.message.rpartition("<stack traces unavailable>\n")[2].strip()


def _warm_up(model: SavedModel) -> None:
    from tensorflow_serving.apis import prediction_log_pb2

    file = model.path / _WARMUP
    if not file.is_file():
        return
    for number, record in enumerate(tf.data.TFRecordDataset([str(file)]), start=1):
        if number > _MOST_WARMUP_REQUESTS:
            raise ValueError(f"{file} has more than {_MOST_WARMUP_REQUESTS} requests. Write fewer.")
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        if log.WhichOneof("log_type") != "predict_log":
            raise ValueError(f"{file}: request {number} is a {log.WhichOneof('log_type')}. Write predict_log only.")
        request = log.predict_log.request
        signature = model.signature(request.model_spec.signature_name)
        signature.check_names(request.inputs)
        inputs = from_protos(request.inputs, signature.inputs, max_bytes=2**31)
        signature.check(inputs, allow_non_finite=True)
        signature.run(inputs)

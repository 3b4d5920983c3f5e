"""ONNX files: a network in one of three forms, proven in ONNX Runtime before it gets its name.

- "unrolled": all time steps written out, no loop in the file, which any runtime takes; any batch size, a fixed number
  of steps.
- "loop": neurons loop over time steps; any batch size, and any number of frames where the network takes frames. About
  as fast, in a graph that does not grow with the steps.
- "step": one time step, with the state as inputs and outputs, for streams of events.

Inputs and outputs are called as in the SavedModel: see `keras_dsr.export.functions`. The spikes of each neuron layer
can be had of every file: `keras_dsr.export.OnnxRuntime(path).traced(inputs)`.

Metadata, by keys that start with `keras_dsr.`: `form`; `version`, of this package; `neurons`, the layers in their
order; `timesteps`, where it is fixed, of a step file too: after so many steps its answer is that of the whole; `state`,
its parts' names; `preprocessing`; `worth` of a spike in each layer, where thresholds are folded; `weight_bits`; `card`,
see `keras_dsr.export.card`; `verification`, see `keras_dsr.export.report`; `trace`, see `keras_dsr.export.passes`;
`integer_convolutions`, how many convolutions are computed in whole numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_dsr
from keras_dsr.export import card, passes, verification
from keras_dsr.export.folding import FoldedNetwork
from keras_dsr.export.functions import FORMS, Network, Preprocessing
from keras_dsr.export.passes import SPIKES
from keras_dsr.export.report import METADATA, VerificationError
from keras_dsr.export.weights import BITS, quantized_copy, store_as_integers
from keras_dsr.export.whole_numbers import INTEGER_CONVOLUTIONS, compute_in_integers
from keras_dsr.files import synchronize, workspace
from keras_dsr.layers import Requantize

OPSETS = range(15, 19)
"""Versions of ONNX's operators that the converter writes."""


def export_onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    form: str = "unrolled",
    timesteps: int | None = None,
    preprocessing: Preprocessing | None = None,
    classifier: bool = True,
    fold_thresholds: bool = False,
    weight_bits: int | None = None,
    integers: bool = True,
    examples: Any = None,
    about: Mapping[str, Any] | None = None,
    verify: bool = True,
    batch_size: int = 32,
    tolerance: float = 1e-5,
    flip_budget: float = 1e-6,
    opset: int = 18,
) -> Path:
    """Writes a model as an ONNX file.

    Args:
        model: A functional or Sequential model with one input and one output, on TensorFlow.
        path: The file to write; ends in .onnx. Its folder must exist. A file that is there is replaced, once the new
            one is proven.
        form: "unrolled", "loop" or "step".
        timesteps: Number of frames, where the model takes any: "unrolled" needs it then, and "loop" takes no other.
        preprocessing: What makes the model's input of what clients send; `None` if they send the model's input.
        classifier: Whether the output is logits; if not, it is given as it is, as `output`.
        fold_thresholds: Whether neurons put out 0 and 1, and the weights that follow have what a spike is worth in
            them.
        weight_bits: 8 or 4: kernels of Conv2D and Dense layers become whole numbers of so many bits, held in int8.
            Float kernels are rounded: the file then does as `quantized_copy(model, weight_bits)` does. `None` for
            floats.
        integers: Whether convolutions of spikes are computed in whole numbers, by QLinearConv, where the network is one
            of whole numbers (`keras_dsr.export.integer_copy`) and the form has no loop. Not one spike depends on it.
        examples: Inputs as clients send them (n, ...) to verify the file with; `None` for random ones. Real ones tell
            more, as neurons may not fire on noise.
        about: What only the caller knows, such as data, recipe and accuracy, as JSON has it; goes into the card.
        verify: Whether the file is compared with Keras, answers and spikes, before it gets its name. It must pass in
            ONNX Runtime; what OpenVINO makes of it, where that is installed, goes into the report, which the file keeps
            (`keras_dsr.export.report_of`).
        batch_size: Number of examples that run at once when they are compared.
        tolerance: As in `verify`.
        flip_budget: As in `verify`.
        opset: Version of ONNX's operators, from 15 to 18.

    Returns:
        The path.

    Raises:
        VerificationError: if the file does not give what Keras gives. Nothing is left behind.
        ValueError: if an argument is not one of those above, or the model cannot be exported in this form.
        FileNotFoundError: if there is no such folder.
        RuntimeError: if Keras does not run on TensorFlow.
        ImportError: if a package is missing; the error says how to install it.

    Example:

    >>> import tempfile
    >>> from keras_dsr import models
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(models.small_cnn(timesteps=4), f"{folder}/digits.onnx").name
    'digits.onnx'
    """
    path = Path(path)
    _check(path, form, weight_bits, opset)
    if weight_bits is not None and any(isinstance(each, Requantize) for each in model._flatten_layers()):
        raise ValueError(
            f"Model {model.name!r} is one of whole numbers, with weights of 8 bits. Received "
            f"weight_bits={weight_bits}; leave it out."
        )
    onnx = _imported("onnx")
    about = card.plain(about or {})
    _check_dtypes(model)
    network = Network(model, preprocessing, classifier)
    number = _frames(network, form, timesteps)
    random = examples is None
    if verify:
        examples = verification.random_examples(network, number) if random else examples
        examples = verification.check_examples(network, examples)

    exact = model if weight_bits is None else quantized_copy(model, weight_bits)
    folded = FoldedNetwork(exact, preprocessing, classifier, loop=form == "loop", fold_thresholds=fold_thresholds)
    proto = _converted(folded, form, number, opset)
    _tidy(proto, folded, form, integers)
    if weight_bits is not None:
        store_as_integers(proto, folded.kernels)
    _describe(proto, network, folded, form, number, weight_bits, about)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"Model {model.name!r} does not become a valid ONNX file: {error}") from error
    with workspace(path.parent.resolve() / path.name) as folder:
        beside = folder / path.name
        onnx.save(proto, beside)
        if verify:
            report = verification.verify(
                network, examples, onnx=[beside], batch_size=batch_size, tolerance=tolerance, flip_budget=flip_budget
            )
            report = dataclasses.replace(report, random=random)
            if not report.exportable:
                raise VerificationError(report)
            proto.metadata_props.add(key=METADATA, value=report.to_json())
            onnx.save(proto, beside)
        synchronize(beside)
        beside.replace(path)
    return path


def _check(path: Path, form: str, weight_bits: Any, opset: Any) -> None:
    if form not in FORMS:
        raise ValueError(f"form is one of {FORMS}. Received form={form!r}.")
    if weight_bits not in (None, *BITS):
        raise ValueError(f"weight_bits is 8 or 4, or None for floats. Received weight_bits={weight_bits!r}.")
    if opset not in OPSETS:
        raise ValueError(f"opset is a number from {OPSETS[0]} to {OPSETS[-1]}. Received opset={opset!r}.")
    if path.suffix != ".onnx":
        raise ValueError(f"The name of an ONNX file ends in .onnx. Received {str(path)!r}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs the package {name}. Install it with: pip install 'keras-dsr[export]' ({error})."
        ) from error


def _frames(network: Network, form: str, timesteps: int | None) -> int | None:
    """The number of time steps of the whole, as the file has it; `None` for any."""
    model = network.model
    own = network.own_timesteps()
    if form == "step":
        if timesteps is not None:
            raise ValueError(f"The form 'step' has one time step. Received timesteps={timesteps!r}; leave it out.")
        return own
    known = own if own is not None else model.inputs[0].shape[1]
    if timesteps is not None and (isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1):
        raise ValueError(f"timesteps is a number of frames of at least 1. Received timesteps={timesteps!r}.")
    if timesteps is not None and known not in (None, timesteps):
        raise ValueError(
            f"Model {model.name!r} has {known} time steps. Received timesteps={timesteps}; leave it out, or export "
            "another model: keras_dsr.models.with_timesteps, or one built for that many frames."
        )
    if form == "unrolled" and known is None and timesteps is None:
        raise ValueError(
            f"Model {model.name!r} takes any number of frames, and the form 'unrolled' has a fixed one: pass "
            "timesteps=..., or form='loop'."
        )
    # A loop takes any number of frames unless a layer insists on one, whatever the model was built for.
    return timesteps or (known if form == "unrolled" or own is not None else None)


def _check_dtypes(model: keras.Model) -> None:
    for layer in model._flatten_layers(include_self=False):
        if layer.compute_dtype in ("bfloat16", "float64"):
            raise ValueError(
                f"ONNX files are in float32, or in float16 where layers are. Layer {layer.name!r} of model "
                f"{model.name!r} computes in {layer.compute_dtype}: build the model with the dtype policy 'float32', "
                "and set its weights."
            )


def _converted(network: FoldedNetwork, form: str, number: int | None, opset: int) -> Any:
    """The ONNX ModelProto of a function that gives the answer and all spikes."""
    tf2onnx = _imported("tf2onnx")
    if form == "step":
        specs = network.step_specs()
        run = network.step_traced
    else:
        spec = network.input_spec()
        shape = spec.shape.as_list()
        if network.takes_frames:
            shape[1] = number
        specs = {network.input_name: tf.TensorSpec(shape, spec.dtype, name=network.input_name)}

        def run(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
            return network.run_traced(tensors[network.input_name])

    def call(*tensors: Any) -> dict[str, Any]:
        answer, spikes = run(dict(zip(specs, tensors, strict=True)))
        return {**answer, **{f"{SPIKES}{name}": value for name, value in spikes.items()}}

    with _errors_of_converter() as errors:
        function = tf.function(call, autograph=False)
        proto, _ = tf2onnx.convert.from_function(function, list(specs.values()), opset=opset)
    if errors:
        operations = sorted(set(re.findall(r"Tensorflow op \[[^:\]]*: (\w+)\]", "\n".join(errors))))
        named = f"it has operations that ONNX files cannot have: {operations}" if operations else "; ".join(errors)
        raise ValueError(f"Model {network.model.name!r} cannot be converted to ONNX: {named}.")
    return proto


@contextlib.contextmanager
def _errors_of_converter() -> Iterator[list[str]]:
    """Gathers what the converter logs as errors, and keeps it from printing: it goes on after errors."""
    errors: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    logger = logging.getLogger("tf2onnx")
    handler = Handler(logging.ERROR)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield errors
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _tidy(proto: Any, network: FoldedNetwork, form: str, integers: bool) -> None:
    """Outputs in their order, sizes by name, and nothing in the graph that the answer does not need."""
    graph = proto.graph
    answer = [*network.outputs, *(f"next_{name}" for name in (network.state if form == "step" else ()))]
    spikes = [f"{SPIKES}{name}" for name in network.neurons]
    outputs = {each.name: each for each in graph.output}
    ordered = [outputs[name] for name in (*answer, *spikes)]
    copies = [type(each).FromString(each.SerializeToString()) for each in ordered]
    del graph.output[:]
    graph.output.extend(copies)
    passes.scan_neurons(proto)
    passes.sink_transposes(proto)
    number = compute_in_integers(proto) if integers else 0
    proto.metadata_props.add(key=f"keras_dsr.{INTEGER_CONVOLUTIONS}", value=str(number))
    passes.set_aside(proto, network.neurons)
    for value in (*graph.input, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        if sizes:
            sizes[0].dim_param = "batch"
    if form == "loop" and network.takes_frames:
        time = graph.input[0].type.tensor_type.shape.dim[1]
        if not time.HasField("dim_value"):
            time.dim_param = "time"


def _describe(
    proto: Any,
    network: Network,
    folded: FoldedNetwork,
    form: str,
    number: int | None,
    weight_bits: int | None,
    about: Mapping[str, Any],
) -> None:
    """What the file says of itself."""
    proto.producer_name = "keras_dsr"
    proto.producer_version = keras_dsr.__version__
    proto.graph.name = network.model.name
    what = {
        "unrolled": "all time steps written out",
        "loop": "a loop over time steps",
        "step": "one time step, with the state as inputs and outputs",
    }[form]
    proto.doc_string = (
        f"Spiking network {network.model.name!r} of keras_dsr: {what}. "
        "What is known of it is in the metadata keras_dsr.card."
    )
    preprocessing = network.preprocessing
    entries = {
        "form": form,
        "version": keras_dsr.__version__,
        "timesteps": number,
        "state": list(network.state) if form == "step" else None,
        "preprocessing": None if preprocessing is None else dataclasses.asdict(preprocessing),
        "worth": folded.worth if folded.fold_thresholds else None,
        "weight_bits": weight_bits,
        "card": card.make(network.model.name, network, about, number, packages=("onnx", "tf2onnx")),
    }
    for key, value in entries.items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            proto.metadata_props.add(key=f"keras_dsr.{key}", value=text)

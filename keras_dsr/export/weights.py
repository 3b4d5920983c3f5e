"""Kernels of few bits, for files whose weights are whole numbers.

A kernel is rounded as the layers of `keras_dsr.layers.quantized` round it, to q step with one step for each output
channel. `quantized_copy` makes of a model with float kernels one whose layers do so. In an ONNX file each q is an int8
tensor, 4-bit ones too, outputs first, and a DequantizeLinear node makes of it what Conv or MatMul takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dsr.layers.quantized import QuantizedConv2D, QuantizedDense, check_bits, quantize
from keras_dsr.layers.synapse import Synapse

BITS = (8, 4)
"""Widths of weights that can be exported as whole numbers; the paper's Table 7 has these."""

_PAIRS: tuple[tuple[type[keras.layers.Layer], type[keras.layers.Layer]], ...] = (
    (keras.layers.Conv2D, QuantizedConv2D),
    (keras.layers.Dense, QuantizedDense),
)


def quantized_copy(model: keras.Model, bits: int) -> keras.Model:
    """The same model with few-bit kernels in its Conv2D and Dense layers, and a copy of its weights.

    The kernels keep their floats, and are rounded whenever the layers compute: evaluate the copy to see what rounding
    costs, or train it further. Kernels of other layers, and biases, stay as they are.

    Args:
        model: A functional or Sequential model. Layers that are quantized already must have as many bits.
        bits: Width of a weight, from 2 to 16.

    Returns:
        A new, uncompiled model, in which `QuantizedConv2D` and `QuantizedDense` stand for Conv2D and Dense.

    Raises:
        ValueError: if no layer of the model can be quantized, or one is already, to other bits.

    Example:

    >>> from keras_dsr import models
    >>> copy = quantized_copy(models.small_cnn(timesteps=2), bits=4)
    >>> copy.get_layer("conv1").bits
    4
    """
    check_bits(bits)
    quantized_kinds = dict(_PAIRS)
    found = []

    def convert(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        kind = quantized_kinds.get(type(layer))
        if kind is not None:
            found.append(layer.name)
            return kind.from_config({**layer.get_config(), "bits": bits})
        if isinstance(layer, tuple(quantized_kinds.values())):
            if layer.bits != bits:
                raise ValueError(
                    f"Layer {layer.name!r} of model {model.name!r} has weights of {layer.bits} bits. Received "
                    f"bits={bits}; pass {layer.bits}, or build the model with weight_bits=None."
                )
            found.append(layer.name)
        return None

    copy = _cloned(model, convert)
    if not found:
        raise ValueError(f"Model {model.name!r} has no Conv2D and no Dense layers, whose kernels can be quantized.")
    return copy


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel (..., outputs) that is rounded.

    Args:
        layer: The layer's name.
        q: Whole numbers, int8 or wider.
        step: That they are to be multiplied with, for each output channel, with all that is folded into the kernel.
    """

    layer: str
    q: np.ndarray
    step: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """What the layer computes with."""
        return self.q.astype(self.step.dtype) * self.step


class Kernels:
    """Which layers' kernels are rounded, and what they were rounded to."""

    def __init__(self) -> None:
        self._bits: dict[int, tuple[keras.layers.Layer, int]] = {}
        self.rounded: list[Kernel] = []

    def add(self, layer: keras.layers.Layer, bits: int) -> None:
        """Says that this layer's kernel is to be rounded."""
        self._bits[id(layer)] = layer, bits

    def bits(self, layer: Any) -> int | None:
        """To how many bits this layer's kernel is rounded; `None` if it is not."""
        return self._bits[id(layer)][1] if id(layer) in self._bits else None

    def round(self, layer: keras.layers.Layer, kernel: np.ndarray, factor: np.floating) -> np.ndarray:
        """What the layer computes with: its kernel, rounded and then multiplied by a factor."""
        bits = self.bits(layer)
        with tf.init_scope():  # with numbers, though a graph be traced
            q, step = (np.asarray(x) for x in quantize(kernel, bits))
        rounded = Kernel(layer.name, q.astype("int8" if bits <= 8 else "int16"), step * factor)
        self.rounded.append(rounded)
        return rounded.values


def with_stock_layers(model: keras.Model) -> tuple[keras.Model, Kernels]:
    """A copy of a model with stock layers in the place of quantized ones, and which of them are to be rounded.

    Raises:
        ValueError: if a quantized layer computes in another precision than float32.
    """
    kernels = Kernels()
    stock_kinds = {quantized: kind for kind, quantized in _PAIRS}

    def convert(layer: keras.layers.Layer) -> keras.layers.Layer | None:
        kind = stock_kinds.get(type(layer))
        if kind is None:
            return None
        if layer.compute_dtype != "float32":
            raise ValueError(
                f"Kernels of few bits are exported where layers compute in float32. Layer {layer.name!r} of model "
                f"{model.name!r} computes in {layer.compute_dtype}, in which Keras rounds its kernel to other numbers: "
                "build the model with the dtype policy 'float32', and set its weights."
            )
        config = layer.get_config()
        stock = kind.from_config({key: value for key, value in config.items() if key != "bits"})
        kernels.add(stock, layer.bits)
        return stock

    if not any(isinstance(layer, tuple(stock_kinds)) for layer in model._flatten_layers()):
        return model, kernels
    return _cloned(model, convert), kernels


def _cloned(model: keras.Model, convert: Callable[[Any], Any]) -> keras.Model:
    """A copy of a model with other layers in place of those for which `convert` gives one, in synapses too."""

    def clone(layer: Any) -> Any:
        converted = convert(layer)
        if converted is not None:
            return converted
        config = layer.get_config()
        if isinstance(layer, Synapse):
            config.pop("layer")
            return type(layer)(clone(layer.layer), **config)
        if isinstance(layer, keras.Sequential):
            return keras.Sequential([clone(each) for each in layer.layers], name=layer.name)
        return type(layer).from_config(config)

    new = keras.models.clone_model(model, clone_function=clone, recursive=True)
    new.set_weights(model.get_weights())
    return new


def store_as_integers(model: Any, kernels: Kernels) -> None:
    """Replaces float kernels in an ONNX graph by their whole numbers, and a DequantizeLinear node each.

    The converter may have multiplied what follows a layer into its kernel: a normalization's factor for each output
    channel. It goes into the steps here.

    Args:
        model: An ONNX ModelProto, changed in place.
        kernels: What layers' kernels were rounded to.

    Raises:
        ValueError: if a kernel is not found in the graph.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    floats = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    missing = {kernel.layer for kernel in kernels.rounded}
    nodes: list[Any] = []
    tensors: dict[str, list[Any]] = {}
    for user in graph.node:
        name = user.input[1] if user.op_type in ("Conv", "MatMul", "Gemm") else ""
        if name in tensors or name not in floats:
            continue
        turned = user.op_type != "Conv" and not any(each.name == "transB" and each.i for each in user.attribute)
        found = floats[name].T if turned else floats[name]
        # Layers whose kernels have the same whole numbers may share an initializer.
        same = [
            (kernel, step)
            for kernel in kernels.rounded
            if (step := _step_of(found, _outputs_first(kernel.q))) is not None
        ]
        missing -= {kernel.layer for kernel, _ in same}
        if not same:
            continue
        kernel, step = same[0]
        # Steps are above 0; what was multiplied in may be 0 or below.
        q = _outputs_first(kernel.q)
        q = q * np.sign(step).reshape(-1, *[1] * (q.ndim - 1))
        whole = numpy_helper.from_array(np.ascontiguousarray(q.astype(kernel.q.dtype)), f"{name}_q")
        steps = numpy_helper.from_array(np.where(step == 0, 1, np.abs(step)).astype("float32"), f"{name}_step")
        tensors[name] = [whole, steps]
        made = f"{name}_turned" if turned else name
        inputs = [whole.name, steps.name]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [made], name=f"{name}_dq", axis=0))
        if turned:
            # ONNX Runtime would round what comes in, too, if a MatMul took dequantized weights as they are.
            nodes.append(helper.make_node("Transpose", [made], [name], name=f"{name}_turn", perm=[1, 0]))
    if missing:
        raise ValueError(f"The kernels of these layers cannot be exported as whole numbers: {sorted(missing)}.")
    kept = [x for x in graph.initializer if x.name not in tensors]
    for field, values in (
        (graph.initializer, [*kept, *(x for pair in tensors.values() for x in pair)]),
        (graph.node, [*nodes, *graph.node]),
    ):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)


def _outputs_first(q: np.ndarray) -> np.ndarray:
    """A kernel (..., inputs, outputs) as ONNX's Conv and Gemm have it: (outputs, inputs, ...)."""
    return q.transpose(q.ndim - 1, q.ndim - 2, *range(q.ndim - 2))


def _step_of(kernel: np.ndarray, q: np.ndarray) -> np.ndarray | None:
    """The step of each output channel, the first axis, that makes the kernel of whole numbers; `None` if none does."""
    if kernel.shape != q.shape:
        return None
    flat, whole = (x.astype("float64").reshape(len(q), -1) for x in (kernel, q))
    # Where q is largest the quotient is most exact.
    largest = np.argmax(np.abs(whole), axis=1)[:, None]
    top = np.take_along_axis(whole, largest, axis=1)[:, 0]
    step = np.take_along_axis(flat, largest, axis=1)[:, 0] / np.where(top == 0, 1, top)
    step = step.astype("float32").astype("float64")
    off = np.abs(flat - whole * step[:, None]).max(axis=1)
    return step if (off <= 1e-6 * np.abs(flat).max(axis=1)).all() else None

"""A network as ONNX computes it: time folded into the batch and, if asked for, thresholds folded into weights.

In Keras the values of a stream are (batch, time, ...). Here their time steps stand one after another in the first axis,
(time * batch, ...), in which a time step is a piece of memory of its own, and a convolution takes all of them with
nothing to move. Of representations only those are computed that something asks for: the readout's.

With thresholds folded, neurons put out 0 and 1. What a spike is worth goes with the stream, through pooling, padding
and the like, into the kernel of the next affine layer:

    W (V_th s) = (V_th W) s

Streams that meet in an `Add` with spikes of different worth, and what goes to a normalization or to neurons, are
multiplied out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_dsr import backend, graph
from keras_dsr.coding import Coding
from keras_dsr.export import passes
from keras_dsr.export.functions import Network, Preprocessing, identifier
from keras_dsr.export.weights import with_stock_layers
from keras_dsr.layers import Add, BatchNormalization, SpikeRep, Synapse, ToStream, ToTensor
from keras_dsr.layers.base import StreamLayer
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.layers.quantized import QuantizedConv2D, QuantizedDense
from keras_dsr.layers.synapse import AFFINE_LAYERS

# The weight that a factor of the input can be multiplied into.
_KERNELS: dict[type[keras.layers.Layer], str] = {
    layers.Dense: "kernel",
    layers.EinsumDense: "kernel",
    layers.Conv1D: "kernel",
    layers.Conv2D: "kernel",
    layers.Conv3D: "kernel",
    layers.Conv1DTranspose: "kernel",
    layers.Conv2DTranspose: "kernel",
    layers.Conv3DTranspose: "kernel",
    layers.DepthwiseConv1D: "kernel",
    layers.DepthwiseConv2D: "kernel",
    layers.SeparableConv1D: "depthwise_kernel",
    layers.SeparableConv2D: "depthwise_kernel",
}
# What a factor passes through: affine layers without weights, of which each output is a weighted mean of inputs, or 0.
_LINEAR = tuple(kind for kind in AFFINE_LAYERS if kind not in (*_KERNELS, QuantizedConv2D, QuantizedDense))


@dataclasses.dataclass(frozen=True)
class Steps:
    """The values of a stream.

    Args:
        folded: (time * batch, ...), time step by time step.
        number: Of time steps; a scalar tensor where it is known at run time alone.
        worth: What is still to be multiplied with; `None` for nothing.
    """

    folded: tf.Tensor
    number: Any
    worth: np.floating | None = None

    def __call__(self) -> tf.Tensor:
        """(batch, time, ...), as Keras has it."""
        return _swapped(_stacked(self.whole(), self.number))

    def whole(self) -> tf.Tensor:
        """`folded`, multiplied out."""
        return self.folded if self.worth is None else self.folded * tf.constant(self.worth, self.folded.dtype)


class FoldedNetwork(Network):
    """`Network`, whose functions compute the same in the way of this module.

    Args:
        model: As for `Network`.
        preprocessing: As for `Network`.
        classifier: As for `Network`.
        loop: Whether neurons loop over time steps, of any number; else the steps are written out.
        fold_thresholds: Whether neurons put out 0 and 1.

    Raises:
        ValueError: as `Network` does.
    """

    def __init__(
        self,
        model: keras.Model,
        preprocessing: Preprocessing | None = None,
        classifier: bool = True,
        *,
        loop: bool = False,
        fold_thresholds: bool = False,
    ) -> None:
        model, self.kernels = with_stock_layers(model)
        super().__init__(model, preprocessing, classifier)
        self.loop = loop
        self.fold_thresholds = fold_thresholds
        self.worth: dict[str, float] = {}

    def run_traced(self, x: Any) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """The answer, and the spikes of each neuron layer (batch, time, ...), by name."""
        walk = _Walk(self, None)
        return self._answer(walk(self._prepared(x))), walk.spikes

    def step_traced(self, tensors: Mapping[str, Any]) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """What `step` gives, and the spikes of each neuron layer in this step (batch, ...), by name."""
        walk = _Walk(self, tensors)
        x = self._prepared(tensors[self.step_input_name])
        answer = self._answer(walk(tf.expand_dims(x, 1) if self.stepper.takes_frames else x))
        return {**answer, **{f"next_{name}": walk.after[name] for name in self.state}}, walk.spikes


class _Neuron:
    """The arithmetic of a neuron layer.

    Args:
        neuron: The layer.
        dtype: Of its current.
        binary: Whether it puts out 0 and 1, instead of what a spike is worth.
    """

    def __init__(self, neuron: SpikingNeuron, dtype: tf.DType, binary: bool) -> None:
        self.binary = binary
        self.coding = neuron.coding
        self.wide = _wide(dtype)
        self._threshold = _constant(neuron.threshold)
        self._settings = {"alpha": neuron.alpha, "decay": neuron.coding.decay, "scale": neuron.scale}
        self.worth = self._threshold.astype(self.wide.as_numpy_dtype) * self.wide.as_numpy_dtype(neuron.scale)

    def step(self, current: Any, potential: Any) -> tuple[Any, Any, Any]:
        """One time step: what is put out, 1 where a neuron fired, and the potential after."""
        if self._settings["decay"] != 1:
            # As in `_Walk._stock`: else what a current is multiplied with here would go into the layer ahead.
            current = tf.maximum(current, current.dtype.min)
        zero = tf.zeros([], self.wide)
        # A count that starts anew at each step is 1 where a neuron fired.
        output, _, potential, fired, _ = backend.step(
            current, potential, zero, zero, tf.constant(self._threshold), **self._settings
        )
        return tf.cast(fired, output.dtype) if self.binary else output, fired, potential


class _Walk:
    """One way through the model.

    Between layers go tensors, and in the place of a stream's two parts two functions without arguments, which give
    them as Keras has them: `Steps`, and a representation that is computed when it is asked for.

    Args:
        network: What is walked.
        before: Where the walk is one time step: the state, by name. `None` for a whole run.
    """

    def __init__(self, network: FoldedNetwork, before: Mapping[str, Any] | None) -> None:
        self.network = network
        self.before = before
        self.after: dict[str, Any] = {}
        self.spikes: dict[str, Any] = {}

    def __call__(self, x: Any) -> tf.Tensor:
        """The model's output."""
        output = graph.walk(self.network.model, x, self._replace)
        return _tensor(output[0] if isinstance(output, (list, tuple)) else output)

    def _replace(self, name: str, layer: Any) -> Callable[..., Any]:
        if isinstance(layer, SpikingNeuron):
            return lambda inputs, **_: self._neuron(identifier(name), layer, inputs)
        if isinstance(layer, ToStream):
            return lambda inputs, **_: self._source(identifier(name), layer, inputs)
        if isinstance(layer, SpikeRep):
            return lambda inputs, **_: self._readout(identifier(name), layer, inputs)
        if isinstance(layer, ToTensor):
            return lambda inputs, **_: _tensor(inputs[0])
        if isinstance(layer, StreamLayer) and layer.infer_representation is not None:
            return lambda inputs, **_: self._apply(layer, inputs)
        return lambda *args, **kwargs: self._stock(layer, args, kwargs)

    def _neuron(self, name: str, neuron: SpikingNeuron, inputs: Any) -> Any:
        stream = isinstance(inputs, (list, tuple))
        if stream or neuron.timesteps is None:
            source = self._steps(inputs[0] if stream else inputs)
            current, number = source.whole(), source.number
        else:
            source, current = None, _tensor(inputs)
            number = 1 if self.before is not None else neuron.timesteps
        current = tf.cast(current, neuron.compute_dtype)
        one = _Neuron(neuron, current.dtype, self.network.fold_thresholds)
        run = self._looped if self.network.loop else self._unrolled
        folded, coded = run(name, one, current, number, static=source is None)
        self.network.worth[name] = float(one.worth)
        self.spikes[name] = folded if self.before is not None else Steps(folded, number)()
        values = Steps(folded, number, one.worth if one.binary else None)
        return [values, coded] if stream or source is None else values()

    def _unrolled(self, name: str, one: _Neuron, current: Any, number: int, static: bool) -> tuple[Any, Any]:
        """What neurons put out, (time * batch, ...), step after step; and a function that gives its representation."""
        currents = [current] * number if static else tf.split(current, number, axis=0)
        potential = tf.zeros([], one.wide) if self.before is None else self.before[f"potential_{name}"]
        outputs, spikes = [], []
        for each in currents:
            output, fired, potential = one.step(each, potential)
            outputs.append(output)
            spikes.append(fired)
        self.after[f"potential_{name}"] = potential

        def coded() -> Any:
            return tf.cast(self._mean(name, one.coding, spikes, tf.constant(one.worth)), current.dtype)

        return _joined(outputs), coded

    def _looped(self, _: str, one: _Neuron, current: Any, number: Any, static: bool) -> tuple[Any, Any]:
        """The same by a loop over the steps."""
        if static:
            stacked = tf.broadcast_to(current[None], tf.concat([[number], tf.shape(current)], axis=0))
        else:
            stacked = _stacked(current, number)
        start = tf.zeros_like(stacked[0], dtype=one.wide)
        currents = tf.TensorArray(stacked.dtype, size=number, element_shape=start.shape).unstack(stacked)
        outputs = tf.TensorArray(stacked.dtype, size=number, element_shape=start.shape)

        def body(n: Any, potential: Any, outputs: Any) -> tuple[Any, Any, Any]:
            output, _, potential = one.step(currents.read(n), potential)
            return n + 1, potential, outputs.write(n, output)

        # In the form that `passes.scan_neurons` looks for.
        _, _, outputs = tf.while_loop(
            lambda n, *_: n < number, body, (tf.constant(0), start, outputs), parallel_iterations=1, name=passes.LOOP
        )
        made = outputs.stack()

        def coded() -> Any:
            mean = one.coding.represent(_swapped(tf.cast(made, one.wide)))
            return tf.cast(mean * tf.constant(one.worth) if one.binary else mean, current.dtype)

        return _reshaped(made, [-1], 2), coded

    def _steps(self, values: Any) -> Steps:
        """A stream's values, or a tensor (batch, time, ...), as `Steps`."""
        if isinstance(values, Steps):
            return values
        values = _tensor(values)
        number = values.shape[1]
        if number is not None and not self.network.loop:
            return Steps(_joined(tf.unstack(values, axis=1)), number)
        return Steps(_reshaped(_swapped(values), [-1], 2), tf.shape(values)[1] if number is None else number)

    def _mean(self, name: str, coding: Coding, items: Sequence[Any], worth: Any = 1.0) -> Any:
        """r of all steps so far, of which these are the last."""
        count, weight = (0.0, 0.0) if self.before is None else (self.before[f"{p}_{name}"] for p in ("count", "weight"))
        for x in items:
            count, weight = count * coding.decay + x, weight * coding.decay + 1
        self.after[f"count_{name}"], self.after[f"weight_{name}"] = count, weight
        return count * (worth / weight)

    def _represent(self, name: str, coding: Coding, values: Any) -> Any:
        """r of a tensor (batch, time, ...), with the steps before it."""
        if self.before is None:
            return coding.represent(values)
        return tf.cast(self._mean(name, coding, [tf.cast(values[:, 0], _wide(values.dtype))]), values.dtype)

    def _source(self, name: str, layer: ToStream, inputs: Any) -> Any:
        values = tf.cast(_tensor(inputs), layer.compute_dtype)
        return [self._steps(values), lambda: self._represent(name, layer.coding, values)]

    def _readout(self, name: str, layer: SpikeRep, inputs: Any) -> Any:
        if isinstance(inputs, (list, tuple)):
            return _tensor(inputs[1])
        return self._represent(name, layer.coding, tf.cast(_tensor(inputs), layer.compute_dtype))

    def _apply(self, layer: StreamLayer, inputs: Any) -> Any:
        pairs = inputs if isinstance(inputs[0], (list, tuple)) else [inputs]  # a list of streams, or one
        values = self._values(layer, [self._steps(pair[0]) for pair in pairs])

        def represented() -> Any:
            parts = [_tensor(pair[1]) for pair in pairs]
            if isinstance(layer, Synapse):
                return self._affine(layer.layer, parts[0], None)[0]
            return layer.infer_representation(*parts)

        return [values, represented]

    def _values(self, layer: StreamLayer, values: Sequence[Steps]) -> Steps:
        first = values[0]
        if isinstance(layer, Synapse):
            folded, worth = self._affine(layer.layer, first.folded, first.worth)
            return Steps(folded, first.number, worth)
        if isinstance(layer, Add) and all(each.worth == first.worth for each in values):
            return Steps(layer.infer_values(*(each.folded for each in values)), first.number, first.worth)
        if isinstance(layer, BatchNormalization):
            return Steps(_normalized(layer, first.whole()), first.number)
        return Steps(layer.infer_representation(*(each.whole() for each in values)), first.number)

    def _affine(self, layer: keras.layers.Layer, x: Any, worth: Any) -> tuple[Any, Any]:
        """An affine layer of x worth: its output, and what that is still to be multiplied with."""
        if isinstance(layer, keras.Sequential):
            for part in layer.layers:
                x, worth = self._affine(part, x, worth)
            return x, worth
        if type(layer) in _LINEAR:
            return layer(x), worth
        leaf = _KERNELS.get(type(layer))
        weight = next((each for each in layer.weights if each.name == leaf), None)
        bits = self.network.kernels.bits(layer)
        if weight is None or (worth is None and bits is None):
            return layer(x if worth is None else x * tf.constant(worth, x.dtype)), None
        kernel = _constant(weight)
        factor = kernel.dtype.type(1 if worth is None else worth)
        kernel = kernel * factor if bits is None else self.network.kernels.round(layer, kernel, factor)
        with keras.StatelessScope(state_mapping=[(weight, tf.constant(kernel))]):
            return layer(x), None

    def _stock(self, layer: Any, args: Any, kwargs: Any) -> Any:
        if self.network.kernels.bits(layer) is not None:
            return self._affine(layer, _tensor(args[0]), None)[0]
        args, kwargs = keras.tree.map_structure(_tensor, (args, kwargs))
        if isinstance(layer, layers.BatchNormalization) and args:
            # A maximum that changes no finite number keeps the converter from multiplying the layer into the kernel of
            # the one ahead, which would round otherwise than Keras.
            args = (tf.maximum(args[0], args[0].dtype.min), *args[1:])
        return layer(*args, **kwargs)


def _tensor(x: Any) -> Any:
    """What goes between layers, as Keras has it."""
    return x() if callable(x) else x


def _constant(variable: keras.Variable) -> np.ndarray:
    with tf.init_scope():
        return np.array(tf.convert_to_tensor(variable))


def _wide(dtype: tf.DType) -> tf.DType:
    """The dtype to sum up in: float32, or wider."""
    return dtype if dtype.size >= 4 else tf.float32


def _joined(steps: Sequence[tf.Tensor]) -> tf.Tensor:
    return steps[0] if len(steps) == 1 else tf.concat(steps, axis=0)


def _stacked(folded: tf.Tensor, number: Any) -> tf.Tensor:
    """(time * batch, ...) -> (time, batch, ...)."""
    return _reshaped(folded, [number, -1], 1)


def _reshaped(x: tf.Tensor, first: list[Any], skipped: int) -> tf.Tensor:
    """Other first axes in the place of so many."""
    features = x.shape[skipped:]
    rest = tf.shape(x)[skipped:] if None in features.as_list() else features.as_list()
    return tf.reshape(x, tf.concat([first, rest], axis=0))


def _swapped(x: tf.Tensor) -> tf.Tensor:
    return tf.transpose(x, [1, 0, *range(2, x.shape.rank)])


def _normalized(layer: BatchNormalization, x: tf.Tensor) -> tf.Tensor:
    """In the order in which Keras computes it, which the converter does not multiply into the layer ahead.

    Potentials stay as close to Keras's as sums allow, and kernels of whole numbers keep their steps.
    """
    if layer.axis not in (-1, x.shape.rank - 1):
        return layer.infer_representation(x)
    wide = _wide(x.dtype)
    factor = tf.math.rsqrt(tf.cast(layer.moving_variance, wide) + layer.epsilon)
    if layer.scale:
        factor *= tf.cast(layer.gamma, wide)
    x = (tf.cast(x, wide) - tf.cast(layer.moving_mean, wide)) * factor
    return tf.cast(x + tf.cast(layer.beta, wide) if layer.center else x, layer.compute_dtype)

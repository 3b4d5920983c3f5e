"""Networks of whole numbers: weights and currents of 8 bits, spikes of one, which processors compute fastest.

A spike is there or not, so a convolution of spikes with weights of 8 bits is a sum of whole numbers. `integer_copy`
brings a trained network to that. What stands between two neuron layers, kernel, normalization, sum and the worth of a
spike, is one affine map, which becomes

    q = round(K a / w)             kernel: a joins all that is multiplied in, w is one step for each output channel
    I = clip(round(w (sum q s + b)), -128, 127)          current: with s = 0 or 1, in units of V_th / 2^j

with neurons that fire as before, at a threshold of 2^j. Sums of kernels, currents and potentials are whole numbers far
below 2^24, so float32 has them exactly, in whatever order: the copy, a Keras model, gives the same spikes in any
runtime. j, how finely currents are told apart, is chosen for each neuron layer between 3 and 7, such that what rounding
and clipping change is least, for currents of the mean and deviation that normalization gives them. A static current,
ahead of the first neurons, is computed once, and has 16 bits.

ONNX files of such a copy have QLinearConv in place of Conv wherever spikes come in (`keras_dsr.export.passes`).

Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018; weights of 8 bits for DSR: Meng et al., CVPR 2022, Table 7.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_dsr import graph
from keras_dsr.export.exact import (
    BITS,
    GLOBAL_POOLS,
    MOVES,
    POOLS,
    SHUFFLES,
    Grid,
    check_model,
    largest_sums,
    refusal,
)
from keras_dsr.export.weights import with_stock_layers
from keras_dsr.layers import (
    Add,
    BatchNormalization,
    Dropout,
    FixedPoint,
    IFSpike,
    Requantize,
    SpikeRep,
    SpikingNeuron,
    Synapse,
    ToStream,
)
from keras_dsr.stream import Stream

WEIGHT_LEVELS = 127
"""Largest absolute value of a weight."""
_CURRENT_LEVELS = 127
_RESOLUTIONS = range(3, 8)
_STATIC_BITS = 16  # of a static current, which is computed once, in float32
_STATIC_FINENESS = 12  # its steps in a threshold, as a power of two
_BIAS_LEVELS = 2**20
_RATE = 0.2  # of spikes, where no normalization says how large currents are

_KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)


def integer_copy(model: keras.Model, grid: Grid) -> keras.Model:
    """The same network in whole numbers: weights and currents of 8 bits.

    Its spikes are not those of the model itself: evaluate it, as any Keras model, to see what rounding costs. Export it
    with a `flip_budget` of 0; the ONNX file computes its convolutions in whole numbers.

    Args:
        model: A functional or Sequential model with one input and time steps, in float32, of Conv1D to Conv3D and Dense
            layers (few-bit ones too), average pooling of spikes over powers of two, normalization over the last axis,
            and IF neurons, with neurons between any two kernels.
        grid: Of the input: see `keras_dsr.export.exact.Grid`.

    Returns:
        A new, uncompiled model with the same neuron layers, whose thresholds are powers of two. Its first layer rounds
        the input; its last one multiplies the answer, which is that of the model again.

    Raises:
        ValueError: if the network has other layers; the error names the layer.

    Example:

    >>> from keras_dsr import models
    >>> copy = integer_copy(models.small_cnn(timesteps=4), Grid(step=1 / 16, limit=16.0))
    >>> float(copy.get_layer("neuron1").threshold) in (8, 16, 32, 64, 128)
    True
    """
    check_model(model)
    stock, kernels = with_stock_layers(model)
    for layer in stock._flatten_layers():
        if kernels.bits(layer) is not None:
            layer.kernel.assign(kernels.round(layer, np.asarray(layer.kernel), np.float32(1)))
    walk = _Walk(stock)
    inputs = keras.Input(batch_shape=stock.inputs[0].shape, dtype="float32", name=stock.inputs[0].name)
    rounded = FixedPoint(grid.step, grid.limit, name="fixed_point", dtype="float32")(inputs)
    answer = graph.walk(stock, _Whole(rounded, grid.step, grid.limit / grid.step, 1.0), walk.replace)
    if not isinstance(answer, _Answer):
        raise ValueError(
            f"Model {model.name!r} cannot be made of whole numbers: it ends without keras_dsr.layers.SpikeRep, which "
            "makes of spikes what they stand for."
        )
    copy = keras.Model(inputs, answer.tensor, name=model.name)
    for layer, weights in walk.weights:
        layer.set_weights(weights)
    largest_sums(copy)  # raises, if a sum is not exact
    return copy


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A tensor of whole numbers, in units.

    Args:
        tensor: Of the copy: static, or a stream.
        unit: What the numbers are whole multiples of, a power of two.
        most: The largest absolute value, in units.
        real: What a 1 stands for in the trained network.
    """

    tensor: Any
    unit: float
    most: float
    real: float

    @property
    def static(self) -> bool:
        return not isinstance(self.tensor, Stream)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """(batch, ...), without time."""
        return tuple((self.tensor if self.static else self.tensor.representation).shape)

    def through(self, layer: keras.layers.Layer, **changes: Any) -> _Whole:
        """What a layer makes of it, at each time step."""
        made = layer(self.tensor) if self.static else Synapse(layer, dtype="float32")(self.tensor)
        return dataclasses.replace(self, tensor=made, **changes)


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One of the terms that a current is the sum of.

    Args:
        source: The numbers that it comes from.
        layer: The layer with its kernel, or `None` for the numbers themselves.
        kernel: (..., channels).
        gain: What it is multiplied with, for each channel.
    """

    source: _Whole
    layer: keras.layers.Layer | None
    kernel: np.ndarray | None
    gain: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Current:
    """What goes into neurons, in the trained network's numbers: the sum of branches, and an offset for each channel.

    Args:
        branches: The terms.
        offset: Of each channel.
        deviation: Standard deviation of each channel, where normalization says so; the offset is its mean then.
    """

    branches: tuple[_Branch, ...]
    offset: np.ndarray
    deviation: np.ndarray | None = None
    mean: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What spikes stand for, (batch, ...)."""

    tensor: Any


_REPRESENTATION = "representation"
"""In place of a stream's second half, which the copy's own layers make."""


class _Walk:
    """One way through the model, on which the copy is built."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.weights: list[tuple[keras.layers.Layer, list[np.ndarray]]] = []
        self._seen: set[int] = set()

    def replace(self, name: str, layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs.get("inputs")
            stream = isinstance(inputs, (list, tuple))
            if type(layer) is Add and stream:
                return [self._sum([each[0] for each in inputs]), _REPRESENTATION]
            x = inputs[0] if stream else inputs
            if isinstance(x, _Answer):
                return self._answered(layer, x)
            if isinstance(layer, SpikingNeuron):
                return [self._fire(name, layer, x), _REPRESENTATION]
            if type(layer) is SpikeRep and isinstance(x, _Whole):
                return self._read(layer, x)
            if type(layer) is ToStream and isinstance(x, _Whole):
                new = ToStream.from_config({**layer.get_config(), "dtype": "float32"})
                return [dataclasses.replace(x, tensor=new(x.tensor)), _REPRESENTATION]
            found = self._affine(name, layer.layer if type(layer) is Synapse else layer, x)
            return [found, _REPRESENTATION] if stream else found

        return call

    def _refuse(self, name: str, layer: Any, why: str) -> ValueError:
        return refusal(self.model, name, layer, why, "be whole numbers")

    def _answered(self, layer: Any, x: _Answer) -> _Answer:
        new = type(layer).from_config(layer.get_config())
        made = new(x.tensor)
        if isinstance(layer, keras.Layer) and layer.weights:
            self.weights.append((new, layer.get_weights()))
        return _Answer(made)

    def _read(self, layer: SpikeRep, x: _Whole) -> _Answer:
        answer = SpikeRep.from_config(layer.get_config())(x.tensor)
        return _Answer(layers.Rescaling(x.real, name=f"{layer.name}_scale", dtype="float32")(answer))

    def _affine(self, name: str, layer: Any, x: Any) -> Any:
        kind = type(layer)
        if isinstance(layer, keras.Sequential):
            for part in layer.layers:
                x = self._affine(f"{name}/{part.name}", part, x)
            return x
        if kind in (Dropout, layers.Dropout):
            return x
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise self._refuse(name, layer, "has channels first")
        if kind in (BatchNormalization, layers.BatchNormalization):
            return self._normalized(name, layer, self._as_current(x))
        if not isinstance(x, _Whole):
            raise self._refuse(name, layer, "takes the sums of a kernel; put neurons between")
        if kind in _KERNELS:
            return self._multiplied(name, layer, x)
        if kind in (*MOVES, *SHUFFLES) and getattr(layer, "interpolation", "nearest") == "nearest":
            return x.through(self._copied(layer))
        if kind in (*POOLS, *GLOBAL_POOLS):
            return self._pooled(name, layer, x)
        raise self._refuse(name, layer, "is none that is known to give whole numbers")

    @staticmethod
    def _copied(layer: Any, **changes: Any) -> Any:
        return type(layer).from_config({**layer.get_config(), "dtype": "float32", **changes})

    def _multiplied(self, name: str, layer: Any, x: _Whole) -> _Current:
        if layer.activation is not keras.activations.linear:
            raise self._refuse(name, layer, "has an activation; put neurons behind it instead")
        if id(layer) in self._seen:
            raise self._refuse(name, layer, "is used twice; use a layer of its own in each place")
        self._seen.add(id(layer))
        kernel = np.asarray(layer.kernel, "float64")
        channels = kernel.shape[-1]
        offset = np.asarray(layer.bias, "float64") if layer.use_bias else np.zeros(channels)
        return _Current((_Branch(x, layer, kernel, np.ones(channels)),), offset)

    def _pooled(self, name: str, layer: Any, x: _Whole) -> _Whole:
        sizes = x.shape[1:-1] if isinstance(layer, GLOBAL_POOLS) else layer.pool_size
        if None in sizes:
            raise self._refuse(name, layer, "averages over a number of places that is not fixed; fix the input's size")
        places = math.prod(sizes)
        if places & (places - 1):
            raise self._refuse(
                name, layer, f"averages over {places} places, which is no power of two; use 2 or 4 on a side"
            )
        if getattr(layer, "padding", "valid") != "valid":
            raise self._refuse(name, layer, "averages over fewer places at the edges; use padding='valid'")
        return x.through(self._copied(layer), unit=x.unit / places, most=x.most * places)

    def _as_current(self, x: Any) -> _Current:
        if isinstance(x, _Current):
            return x
        channels = x.shape[-1]
        return _Current((_Branch(x, None, None, np.ones(channels)),), np.zeros(channels))

    def _normalized(self, name: str, layer: Any, x: _Current) -> _Current:
        channels = len(x.offset)
        if layer.axis not in (-1, len(x.branches[0].source.shape) - 1):
            raise self._refuse(name, layer, "normalizes over another axis than the last; build it with axis=-1")
        values = {each.name: np.asarray(each, "float64") for each in layer.weights}
        gamma = values.get("gamma", np.ones(channels))
        beta = values.get("beta", np.zeros(channels))
        mean, variance = values["moving_mean"], values["moving_variance"]
        factor = gamma / np.sqrt(variance + layer.epsilon)
        branches = tuple(dataclasses.replace(each, gain=each.gain * factor) for each in x.branches)
        deviation = np.abs(factor) * np.sqrt(variance)
        return _Current(branches, (x.offset - mean) * factor + beta, deviation, beta)

    def _sum(self, parts: Sequence[Any]) -> _Current:
        currents = [self._as_current(each) for each in parts]
        branches = tuple(branch for each in currents for branch in each.branches)
        return _Current(branches, sum(each.offset for each in currents))

    def _fire(self, name: str, neuron: SpikingNeuron, x: Any) -> _Whole:
        if type(neuron) is not IFSpike:
            raise self._refuse(name, neuron, "has potentials that are no whole numbers; use IF neurons")
        if neuron.timesteps == 0:
            raise self._refuse(
                name,
                neuron,
                "makes a representation network (timesteps=0), which has no spikes; give it time steps with "
                "keras_dsr.models.with_timesteps(model, N)",
            )
        x = self._as_current(x)
        threshold = float(np.asarray(neuron.threshold))
        resolution = _resolution(x, threshold)
        unit = threshold / 2**resolution
        # One of the terms has the offset: a kernel's, whose sums have room for it.
        first = next((i for i, each in enumerate(x.branches) if each.layer is not None), 0)
        terms = []
        for number, branch in enumerate(x.branches):
            offset = x.offset / unit if number == first else np.zeros_like(x.offset)
            label = neuron.name if branch.layer is None else branch.layer.name
            label = f"{label}_{number}" if branch.layer is None and len(x.branches) > 1 else label
            terms.append(self._term(branch, unit, offset, resolution, label))
        if len(terms) > 1:
            terms = [Add(name=f"{neuron.name}_sum", dtype="float32")(terms)]
        new = IFSpike.from_config({**neuron.get_config(), "dtype": "float32"})
        spikes = new(terms[0])
        weights = [np.float32(2**resolution) if each.name == "threshold" else each.numpy() for each in neuron.weights]
        self.weights.append((new, weights))
        return _Whole(spikes, 2.0**resolution, 1.0, unit)

    def _term(self, branch: _Branch, unit: float, offset: np.ndarray, resolution: int, label: str) -> Any:
        """A branch as whole numbers, in the copy."""
        source, gain = branch.source, branch.gain * branch.source.real / unit
        step = 2.0 ** (resolution - _STATIC_FINENESS) if source.static else 1.0
        bits = _STATIC_BITS if source.static else 8
        summed = source
        if branch.layer is None:
            scale = np.where(gain < 0, -1, 1) * np.maximum(np.abs(gain), np.abs(offset) / _BIAS_LEVELS)
            bias = offset / np.where(scale == 0, 1, scale)
            scale = scale / step
        else:
            kernel = branch.kernel * gain
            if source.static:
                kernel, bias = _exact_kernel(kernel, offset, source)
                scale = np.full(len(offset), 1 / step)
            else:
                kernel, scale = _whole_kernel(kernel * source.unit, offset)
                bias = np.rint(offset / scale)
                kernel = kernel / source.unit
            layer = self._copied(branch.layer, use_bias=False)
            summed = source.through(layer)
            self.weights.append((layer, [kernel]))
        requantize = Requantize(bits, step, name=f"{label}_requantize", dtype="float32")
        if source.static:
            made = requantize(summed.tensor)
        else:
            made = Synapse(requantize, affine=True, dtype="float32")(summed.tensor)
        self.weights.append((requantize, [scale, bias]))
        return made


def _whole_kernel(kernel: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel as whole numbers and, for each channel, a float32 step."""
    largest = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(axis=0)
    step = np.maximum(largest / WEIGHT_LEVELS, np.abs(offset) / _BIAS_LEVELS)
    step = np.where(step > 0, step, 1).astype("float32").astype("float64")
    return np.clip(np.rint(kernel / step), -WEIGHT_LEVELS, WEIGHT_LEVELS), step


def _exact_kernel(kernel: np.ndarray, offset: np.ndarray, source: _Whole) -> tuple[np.ndarray, np.ndarray]:
    """A kernel, and offsets, on the finest grid on which its sums are exact in float32."""
    largest = np.abs(kernel).reshape(-1, kernel.shape[-1]).sum(axis=0) * source.most * source.unit + np.abs(offset)
    # One bit is for what rounding adds.
    exponent = np.ceil(np.log2(np.maximum(largest, 1e-30))).astype(int) + 1 - BITS
    inputs = int(math.log2(source.unit))
    rounded = np.ldexp(np.rint(np.ldexp(kernel, inputs - exponent)), exponent - inputs)
    return rounded, np.ldexp(np.rint(np.ldexp(offset, -exponent)), exponent)


def _resolution(current: _Current, threshold: float) -> int:
    """j: the steps in a threshold, as a power of two, with which the terms of a current change least."""
    terms = []
    for branch in current.branches:
        gain = branch.gain * branch.source.real / threshold
        if branch.source.static:
            continue
        if branch.layer is None:
            terms.append((gain * branch.source.most * branch.source.unit, np.zeros_like(gain)))
        elif current.deviation is not None:
            terms.append((current.mean / threshold, current.deviation / threshold))
        else:
            squares = np.square(branch.kernel * gain * branch.source.unit).reshape(-1, len(gain)).sum(axis=0)
            spread = math.sqrt(_RATE * (1 - _RATE)) if branch.source.most <= 1 else branch.source.most / 4
            terms.append((current.offset / threshold, np.sqrt(squares) * spread))

    def error(resolution: int) -> float:
        steps = 2.0**-resolution
        limit = _CURRENT_LEVELS * steps
        return sum(float(np.sum(steps**2 / 12 + _clipped(*term, limit))) for term in terms)

    return min(reversed(_RESOLUTIONS), key=error)


def _clipped(mean: np.ndarray, deviation: np.ndarray, limit: float) -> np.ndarray:
    """Mean square of what clipping to +-limit takes off normally distributed numbers."""
    found = np.zeros_like(mean)
    for sign in (-1, 1):
        over = sign * mean - limit
        z = -over / np.maximum(deviation, 1e-12)
        tail = 0.5 * np.vectorize(math.erfc, otypes=[float])(z / math.sqrt(2))
        density = np.exp(-np.square(np.clip(z, -30, 30)) / 2) / math.sqrt(2 * math.pi)
        spread = np.square(deviation) * ((1 + np.square(np.clip(z, -30, 30))) * tail - np.clip(z, -30, 30) * density)
        found += np.where(deviation > 1e-12, np.maximum(spread, 0), np.square(np.maximum(over, 0)))
    return found

"""Networks of whole numbers: weights and currents of 8 bits, spikes of one.

A spike is there or not, so a convolution of spikes with weights of 8 bits is a sum of whole numbers. `integer_copy`
brings a trained network to that. What stands between two neuron layers, kernel, normalization, sum and the worth of a
spike, is one affine map, which becomes

    q = round(K a / w)             kernel: a joins all that is multiplied in, w is one step for each output channel
    I = clip(round(w (sum q s + b)), -128, 127)          current: with s = 0 or 1, in units of V_th / 2^j

with neurons that fire as before, at a threshold of 2^j; where several kernels, or a kernel and spikes, add up to a
current, each of them is rounded so. Sums of kernels are whole numbers of at most 24 bits, so float32 has them exactly,
in whatever order: the copy, a Keras model, gives the same spikes in any runtime that computes in float32. j, how
finely currents are told apart, is chosen for each neuron layer between 3 and 6, such that what rounding and clipping
change is least, for currents of the mean and deviation that normalization gives them, or weights. A static current,
ahead of the first neurons, is computed once, and has 16 bits, the last of which is worth V_th / 2^12.

ONNX files of such a copy have QLinearConv in place of Conv where spikes come in, but for loops: see
`keras_dsr.export.whole_numbers`.

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
    places_of,
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

_WEIGHT_LEVELS = 127  # largest absolute value of a weight
_LEAST_LEVELS = 8
_CURRENT_BITS = 8
_CURRENT_LEVELS = 127
_RESOLUTIONS = range(3, 7)
_STATIC_BITS = 16  # of a static current, which is computed once, in float32
_STATIC_FINENESS = 12  # its steps in a threshold, as a power of two
_BIAS_LEVELS = 2**20  # largest offset of a sum, in steps of its kernel
_RATE = 0.2  # of spikes, where no normalization says how large currents are
_PART_OF_LIMIT = 1 / 16  # of the grid's limit, which inputs deviate by
_MOST_CLIPPED = 0.25  # mean square of what may be clipped off currents, in squares of V_th
_SMALLEST = 2.0**-100  # step of a kernel, below which a channel is dead

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
    >>> float(copy.get_layer("neuron1").threshold) in (8, 16, 32, 64)
    True
    """
    check_model(model)
    if len(model.outputs) != 1:
        raise ValueError(
            f"A model with one output can be made of whole numbers. Received {model.name!r} with {len(model.outputs)}."
        )
    stock, kernels = with_stock_layers(model)
    for layer in stock._flatten_layers():
        if kernels.bits(layer) is not None:
            layer.kernel.assign(kernels.round(layer, np.asarray(layer.kernel), np.float32(1)))
    walk = _Walk(stock)
    structure = graph.functional(model).output
    inputs = keras.Input(batch_shape=stock.inputs[0].shape, dtype="float32", name=stock.inputs[0].name)
    rounded = FixedPoint(grid.step, grid.limit, name="fixed_point", dtype="float32")(inputs)
    answer = graph.walk(stock, _Whole(rounded, grid.step, grid.limit / grid.step, 1.0, given=True), walk.replace)
    answer = keras.tree.flatten(answer)[0]
    if not isinstance(answer, _Answer):
        raise ValueError(
            f"Model {model.name!r} cannot be made of whole numbers: it ends without keras_dsr.layers.SpikeRep, which "
            "makes of spikes what they stand for."
        )
    copy = keras.Model(inputs, keras.tree.map_structure(lambda _: answer.tensor, structure), name=model.name)
    if tuple(copy.outputs[0].shape) != tuple(model.outputs[0].shape):
        raise ValueError(
            f"Model {model.name!r} cannot be made of whole numbers: the copy's answers would be of shape "
            f"{copy.output_shape}, and not {tuple(model.outputs[0].shape)}. Are there layers between its neurons that "
            "take half a stream?"
        )
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
        given: Whether it is the network's input, whose numbers hardly ever come near the largest.
    """

    tensor: Any
    unit: float
    most: float
    real: float
    given: bool = False

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
        name: What the layer is called in the copy.
    """

    source: _Whole
    layer: keras.layers.Layer | None
    kernel: np.ndarray | None
    gain: np.ndarray
    name: str

    def mean(self) -> np.ndarray:
        """About what it is on average, where spikes come at the usual rate."""
        rate = 0.0 if self.source.given else self.source.most * self.source.unit * self.source.real * _RATE
        summed = 1.0 if self.kernel is None else self.kernel.reshape(-1, len(self.gain)).sum(axis=0)
        return summed * self.gain * rate

    def deviation(self) -> np.ndarray:
        """About how far it is from that, likewise."""
        part = _PART_OF_LIMIT if self.source.given else math.sqrt(_RATE * (1 - _RATE))
        spread = self.source.most * self.source.unit * self.source.real * part
        squares = 1.0 if self.kernel is None else np.square(self.kernel.reshape(-1, len(self.gain))).sum(axis=0)
        return np.sqrt(squares) * np.abs(self.gain) * spread


@dataclasses.dataclass(frozen=True)
class _Current:
    """What goes into neurons, in the trained network's numbers: the sum of branches, and an offset for each channel.

    Args:
        branches: The terms.
        offset: Of each channel.
        deviation: Standard deviation of each channel, where normalization says so.
        mean: Mean of each channel, likewise.
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
        self._made: set[int] = set()
        self._behind: dict[int, keras.layers.Layer] = {}
        self._names: dict[str, int] = {}

    def replace(self, name: str, layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = keras.tree.flatten((args, kwargs))
            if any(isinstance(x, _Answer) for x in given):
                return self._answered(name, layer, args, kwargs)
            inputs = args[0] if args else kwargs.get("inputs")
            stream = isinstance(inputs, (list, tuple))
            if type(layer) is Add and stream:
                return [self._sum(name, layer, [each[0] for each in inputs]), _REPRESENTATION]
            x = inputs[0] if stream else inputs
            half = isinstance(x, _Whole) and not x.static and not stream
            if x is _REPRESENTATION or half:
                raise self._refuse(name, layer, "takes half a stream, its values or its representation alone")
            if isinstance(layer, SpikingNeuron):
                return [self._fire(name, layer, x, stream), _REPRESENTATION]
            if type(layer) is SpikeRep and isinstance(x, _Whole) and stream:
                return self._read(layer, x)
            if type(layer) is ToStream and isinstance(x, _Whole) and layer.timesteps != 0:
                new = ToStream.from_config({**layer.get_config(), "dtype": "float32"})
                return [dataclasses.replace(x, tensor=new(x.tensor)), _REPRESENTATION]
            prefix = name.removesuffix(layer.name)
            found = self._affine(name, layer.layer if type(layer) is Synapse else layer, x, prefix)
            return [found, _REPRESENTATION] if stream else found

        return call

    def _refuse(self, name: str, layer: Any, why: str) -> ValueError:
        return refusal(self.model, name, layer, why, "be whole numbers")

    def _answered(self, name: str, layer: Any, args: Any, kwargs: Any) -> _Answer:
        """A layer or operation behind the readout, as it is."""
        if isinstance(layer, (SpikingNeuron, ToStream, Add)):
            raise self._refuse(name, layer, "takes what spikes stand for, which is no whole number")

        def tensor(x: Any) -> Any:
            if isinstance(x, (_Whole, _Current)) or x is _REPRESENTATION:
                raise self._refuse(name, layer, "takes spikes, or currents, beside what they stand for")
            return x.tensor if isinstance(x, _Answer) else x

        args, kwargs = keras.tree.map_structure(tensor, (args, kwargs))
        if not isinstance(layer, keras.Layer):
            return _Answer(type(layer).from_config(layer.get_config())(*args, **kwargs))
        if id(layer) not in self._behind:
            self._behind[id(layer)] = type(layer).from_config({**layer.get_config(), "name": self._named(name)})
        new = self._behind[id(layer)]
        made = new(*args, **kwargs)
        self.weights.append((new, layer.get_weights()))
        return _Answer(made)

    def _read(self, layer: SpikeRep, x: _Whole) -> _Answer:
        answer = SpikeRep.from_config(layer.get_config())(x.tensor)
        return _Answer(layers.Rescaling(x.real, name=f"{layer.name}_scale", dtype="float32")(answer))

    def _affine(self, name: str, layer: Any, x: Any, prefix: str) -> Any:
        kind = type(layer)
        if isinstance(layer, keras.Sequential):
            for part in layer.layers:
                x = self._affine(f"{name}/{part.name}", part, x, f"{prefix}{layer.name}_")
            return x
        if kind in (Dropout, layers.Dropout):
            return x
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise self._refuse(name, layer, "has channels first")
        if kind in (BatchNormalization, layers.BatchNormalization):
            return self._normalized(name, layer, self._as_current(x))
        if not isinstance(x, _Whole):
            raise self._refuse(name, layer, "takes the sums of a kernel, or several terms; put neurons between")
        if kind in _KERNELS:
            return self._multiplied(name, layer, x, f"{prefix}{layer.name}")
        if kind in (*MOVES, *SHUFFLES) and getattr(layer, "interpolation", "nearest") == "nearest":
            return x.through(self._copied(layer, name=self._named(f"{prefix}{layer.name}")))
        if kind in (*POOLS, *GLOBAL_POOLS):
            return self._pooled(name, layer, x, f"{prefix}{layer.name}")
        raise self._refuse(name, layer, "is none that is known to give whole numbers")

    def _named(self, name: str) -> str:
        """The name, with a number if there is such a layer already."""
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"

    @staticmethod
    def _copied(layer: Any, **changes: Any) -> Any:
        return type(layer).from_config({**layer.get_config(), "dtype": "float32", **changes})

    def _multiplied(self, name: str, layer: Any, x: _Whole, new_name: str) -> _Current:
        if layer.activation is not keras.activations.linear:
            raise self._refuse(name, layer, "has an activation; put neurons behind it instead")
        if id(layer) in self._seen:
            raise self._refuse(name, layer, "is used twice; use a layer of its own in each place")
        self._seen.add(id(layer))
        kernel = np.asarray(layer.kernel, "float64")
        channels = kernel.shape[-1]
        offset = np.asarray(layer.bias, "float64") if layer.use_bias else np.zeros(channels)
        return _Current((_Branch(x, layer, kernel, np.ones(channels), new_name),), offset)

    def _pooled(self, name: str, layer: Any, x: _Whole, new_name: str) -> _Whole:
        places = places_of(layer, x.shape, lambda why: self._refuse(name, layer, why))
        copied = self._copied(layer, name=self._named(new_name))
        return x.through(copied, unit=x.unit / places, most=x.most * places)

    def _as_current(self, x: Any) -> _Current:
        if isinstance(x, _Current):
            return x
        channels = x.shape[-1]
        return _Current((_Branch(x, None, None, np.ones(channels), ""),), np.zeros(channels))

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

    def _sum(self, name: str, layer: Add, parts: Sequence[Any]) -> _Current:
        for each in parts:
            if not isinstance(each, (_Current, _Whole)):
                raise self._refuse(name, layer, "takes half a stream, its values or its representation alone")
        currents = [self._as_current(each) for each in parts]
        branches = tuple(branch for each in currents for branch in each.branches)
        return _Current(branches, sum(each.offset for each in currents))

    def _fire(self, name: str, neuron: SpikingNeuron, x: Any, stream: bool) -> _Whole:
        if type(neuron) is not IFSpike:
            raise self._refuse(name, neuron, "has potentials that are no whole numbers; use IF neurons")
        if neuron.timesteps == 0:
            raise self._refuse(
                name,
                neuron,
                "makes a representation network (timesteps=0), which has no spikes; give it time steps with "
                "keras_dsr.models.with_timesteps(model, N)",
            )
        if not stream and neuron.timesteps is None:
            raise self._refuse(
                name, neuron, "takes a plain tensor (batch, time, ...); begin with keras_dsr.layers.ToStream"
            )
        if id(neuron) in self._seen:
            raise self._refuse(name, neuron, "is used twice; use neurons of their own in each place")
        self._seen.add(id(neuron))
        x = self._as_current(x)
        threshold = float(np.asarray(neuron.threshold))
        offsets = _offsets(x)
        resolution, clipped = _resolution(x, offsets, threshold)
        if clipped > _MOST_CLIPPED:
            raise self._refuse(
                name,
                neuron,
                f"has a threshold, {threshold:.3g}, far below what its current is the sum of: currents of 8 bits end "
                "at 16 thresholds. Put a normalization ahead of it, or train with a higher threshold",
            )
        unit = threshold / 2**resolution
        terms = []
        for number, (branch, offset) in enumerate(zip(x.branches, offsets, strict=True)):
            if branch.layer is not None and id(branch.layer) in self._made:
                raise self._refuse(
                    branch.name, branch.layer, "has sums that go to two places; give each a kernel of its own"
                )
            self._made |= {id(branch.layer)} if branch.layer is not None else set()
            label = branch.name or (f"{name}_{number}" if len(x.branches) > 1 else name)
            terms.append(self._term(branch, unit, offset / unit, resolution, self._named(label)))
        if len(terms) > 1:
            terms = [Add(name=f"{name}_sum", dtype="float32")(terms)]
        new = IFSpike.from_config({**neuron.get_config(), "dtype": "float32", "name": name})
        spikes = new(terms[0])
        self.weights.append((new, [np.float32(2**resolution)]))
        return _Whole(spikes, 2.0**resolution, 1.0, unit)

    def _term(self, branch: _Branch, unit: float, offset: np.ndarray, resolution: int, label: str) -> Any:
        """A branch as whole numbers, in the copy."""
        source, gain = branch.source, branch.gain * branch.source.real / unit
        step = 2.0 ** (resolution - _STATIC_FINENESS) if source.static else 1.0
        summed = source
        if branch.layer is None:
            # Where nearly nothing but the offset is left, it still is multiplied with what is.
            least = np.abs(offset) / _BIAS_LEVELS / max(1.0, source.most * source.unit)
            scale = np.where(gain < 0, -1, 1) * np.maximum(np.abs(gain), least)
            scale = np.where(scale == 0, 1e-30, scale)
            bias, scale = offset / scale, scale / step
        else:
            kernel = branch.kernel * gain
            if source.static:
                kernel, bias = self._exact_kernel(branch, kernel, offset)
                scale = np.full(len(offset), 1 / step)
            else:
                kernel, scale = self._whole_kernel(branch, kernel * source.unit, offset)
                bias = np.rint(offset / scale)
                kernel = kernel / source.unit
            layer = self._copied(branch.layer, use_bias=False, name=label)
            summed = source.through(layer)
            self.weights.append((layer, [kernel]))
        bits = _STATIC_BITS if source.static else _CURRENT_BITS
        requantize = Requantize(bits, step, name=f"{label}_requantize", dtype="float32")
        if source.static:
            made = requantize(summed.tensor)
        else:
            made = Synapse(requantize, affine=True, dtype="float32")(summed.tensor)
        self.weights.append((requantize, [scale, bias]))
        return made

    def _whole_kernel(self, branch: _Branch, kernel: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A kernel as whole numbers and, for each channel, a float32 step."""
        flat = np.abs(kernel).reshape(-1, kernel.shape[-1])
        # Spikes leave room for 8 bits in any kernel; frames, which are larger, need not.
        levels = min(_WEIGHT_LEVELS, int((2**BITS - 2 * _BIAS_LEVELS) / (len(flat) * branch.source.most)))
        if levels < _LEAST_LEVELS:
            raise self._refuse(
                branch.name,
                branch.layer,
                f"has sums of {len(flat)} inputs of up to {branch.source.most:.0f} steps, which leave its weights "
                f"fewer than {_LEAST_LEVELS} steps; use a coarser grid for the input",
            )
        step = np.maximum(flat.max(axis=0) / levels, np.abs(offset) / _BIAS_LEVELS)
        step = np.where(step > _SMALLEST, step, 1).astype("float32").astype("float64")
        return np.clip(np.rint(kernel / step), -levels, levels), step

    def _exact_kernel(self, branch: _Branch, kernel: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A kernel of the input, and offsets, on the finest grid on which its sums are exact in float32."""
        source = branch.source
        inputs, limit = int(math.log2(source.unit)), source.most * source.unit

        def largest(weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
            return np.abs(weights).reshape(-1, weights.shape[-1]).sum(axis=0) * limit + np.abs(biases)

        exponent = np.ceil(np.log2(np.maximum(largest(kernel, offset), _SMALLEST))).astype(int) - BITS
        while True:
            rounded = np.ldexp(np.rint(np.ldexp(kernel, inputs - exponent)), exponent - inputs)
            bias = np.ldexp(np.rint(np.ldexp(offset, -exponent)), exponent)
            over = largest(rounded, bias) > np.ldexp(1.0, exponent + BITS)
            if not over.any():
                break
            exponent = exponent + over
        flat, off = (np.abs(each).reshape(-1, kernel.shape[-1]) for each in (kernel, rounded - kernel))
        # It hardly matters beside an offset that is far larger.
        matters = off.sum(axis=0) * limit > largest(kernel, offset) / 2**8
        if ((off.max(axis=0) > flat.max(axis=0) / (2 * _LEAST_LEVELS)) & matters).any():
            raise self._refuse(
                branch.name,
                branch.layer,
                f"has sums that leave its largest weight in some channel fewer than {_LEAST_LEVELS} steps. Fewer "
                "inputs have to meet in one sum, or on a coarser grid",
            )
        return rounded, bias


def _offsets(current: _Current) -> list[np.ndarray]:
    """An offset for each term, which add up to the current's, such that kernels give what is in the middle."""
    found = [np.zeros_like(current.offset) for _ in current.branches]
    kernels = [number for number, each in enumerate(current.branches) if each.layer is not None]
    if len(kernels) < 2:
        found[kernels[0] if kernels else 0] = current.offset
        return found
    means = [each.mean() for each in current.branches]
    middle = (current.offset + sum(means[number] for number in kernels)) / len(kernels)
    for number in kernels:
        found[number] = middle - means[number]
    return found


def _resolution(current: _Current, offsets: Sequence[np.ndarray], threshold: float) -> tuple[int, float]:
    """j, the steps in a threshold as a power of two, with which terms change least; what is clipped off them then.

    That is the mean square over the channels of the worst term, in squares of the threshold.
    """
    kernels = sum(each.layer is not None for each in current.branches)
    terms = []
    for branch, offset in zip(current.branches, offsets, strict=True):
        if branch.source.static:
            continue
        if branch.layer is None:
            most = branch.gain * branch.source.real * branch.source.most * branch.source.unit
            extreme = np.where(np.abs(offset) > np.abs(offset + most), offset, offset + most)
            terms.append((extreme / threshold, np.zeros_like(extreme)))
        elif current.deviation is not None and kernels == 1:
            terms.append((current.mean / threshold, current.deviation / threshold))
        else:
            terms.append(((offset + branch.mean()) / threshold, branch.deviation() / threshold))

    def clipped(resolution: int) -> list[np.ndarray]:
        return [_clipped(*term, _CURRENT_LEVELS * 2.0**-resolution) for term in terms]

    def error(resolution: int) -> float:
        return sum(float(np.sum(4.0**-resolution / 12 + each)) for each in clipped(resolution))

    best = min(reversed(_RESOLUTIONS), key=error)
    spikes = [not each.source.given for each in current.branches if not each.source.static]
    worst = [float(each.mean()) for each, ours in zip(clipped(best), spikes, strict=True) if ours]
    return best, max(worst, default=0.0)


def _clipped(mean: np.ndarray, deviation: np.ndarray, limit: float) -> np.ndarray:
    """Mean square of what clipping to +-limit takes off normally distributed numbers."""
    found = np.zeros_like(mean)
    for sign in (-1, 1):
        over = sign * mean - limit
        z = -over / np.maximum(deviation, 1e-12)
        tail = 0.5 * np.vectorize(math.erfc, otypes=[float])(z / math.sqrt(2))
        density = np.exp(-np.square(np.clip(z, -30, 30)) / 2) / math.sqrt(2 * math.pi)
        spread = np.square(deviation) * ((1 + np.square(z)) * tail - z * density)
        found += np.where(deviation > 1e-12, np.maximum(spread, 0), np.square(np.maximum(over, 0)))
    return found

"""Networks that compute the same in TensorFlow and ONNX Runtime, because none of their sums is ever rounded.

Float32 has 24 bits. Runtimes add up a convolution's products in orders of their own, and round after each addition; a
potential that ends next to its threshold then falls to the other side, and that one spike sets off others. Where all
numbers of a sum are whole multiples of one power of two, its grid, and no part of the sum can be beyond 2^24 of them,
nothing is rounded, whatever the order. `exact_copy` brings a trained network to that:

- the input is rounded to a grid (`keras_dsr.layers.FixedPoint`);
- a spike is worth a number of 8 bits, or of fewer where so many inputs meet that weights would be left with too few;
- kernels and biases are rounded, for each output channel to the finest grid whose largest possible sum, all inputs at
  their most, has 24 bits, so that the more inputs meet, the fewer bits a weight has;
- normalization becomes gamma (x - mean), with the mean on a grid and beta folded into it (`keras_dsr.layers.Scale`).

What is left are operations on single numbers, each rounded as IEEE 754 says, in an order that is the same everywhere:
the product with gamma, and what neurons do. This holds where float32 is multiplied and added as such: in TensorFlow and
ONNX Runtime on the CPU. It does not where a runtime computes convolutions in another way (TF32, which GPUs take unless
told otherwise; Winograd's; bfloat16) or fuses a product with the sum that follows (OpenVINO). What is ahead of the
`FixedPoint` layer, a preprocessing, may round otherwise unless its result is next to halfway between two steps:
`Grid.of_bytes` finds a grid where no byte's is.

`largest_sums` proves a network: it takes weights as they are, and derives what the largest sums can be.

Reference: Goldberg, "What Every Computer Scientist Should Know About Floating-Point Arithmetic", ACM Computing Surveys
23(1), 1991.
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
from keras_dsr.export.functions import Preprocessing
from keras_dsr.export.weights import with_stock_layers
from keras_dsr.layers import (
    Add,
    BatchNormalization,
    Dropout,
    FixedPoint,
    Requantize,
    Scale,
    SpikeRep,
    Synapse,
    ToStream,
    ToTensor,
)
from keras_dsr.layers.neurons import SpikingNeuron, neurons_of

BITS = 24
"""Of a float32 number: whole numbers up to 2^24 are exact."""
_SMALLEST = -126  # exponent of float32's smallest number that all runtimes keep
_WORTH_BITS = (8, 6, 5, 4)  # of a spike, in the order in which they are tried
_LEAST_STEPS = 8  # that the largest weight of a channel is rounded to: 4 bits, with the sign
_ROUNDS = 64
_OF_ZERO = 900  # zero is a whole multiple of everything

_KERNELS = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
POOLS = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
GLOBAL_POOLS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
# Each number of the output is one of the input, or 0, and channels stay what they are.
MOVES = (
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    layers.Identity,
)
SHUFFLES = (layers.Flatten, layers.Reshape, layers.Permute)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a network's input is rounded to: see `keras_dsr.layers.FixedPoint`.

    Args:
        step: A power of two.
        limit: Largest absolute value, a whole multiple of it.
    """

    step: float
    limit: float

    @classmethod
    def of(cls, x: Any, bits: int = 12) -> Grid:
        """A grid for inputs like these.

        Args:
            x: Inputs of the network, after the preprocessing: floats, not all zero.
            bits: Steps from 0 to the limit, as a power of two, at most 20. If the inputs are on a coarser grid already,
                it is that; counts of events are whole numbers, so their step is 1.

        Returns:
            The grid; its limit is two to four times the largest of the inputs.

        Raises:
            ValueError: if there are no inputs, one is not finite, or all are zero.
        """
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 20:
            raise ValueError(f"bits is a whole number from 1 to 20. Received bits={bits!r}.")
        x = np.asarray(x, "float64")
        largest = float(np.abs(x).max()) if x.size else 0.0
        if not (math.isfinite(largest) and largest > 0):
            raise ValueError(
                f"A grid is found of inputs that are finite and not all zero. Received {x.size} numbers, the largest "
                f"{largest}."
            )
        limit = 2.0 ** (math.ceil(math.log2(largest)) + 1)
        own = min(int(_exponents(x.reshape(-1, 1))[0]), 0)
        return cls(max(limit * 2.0**-bits, min(2.0**own, limit)), limit)

    @classmethod
    def of_bytes(cls, preprocessing: Preprocessing, channels: int) -> Grid:
        """A grid for images of bytes, on which all runtimes put each of the 256 to the same place.

        Args:
            preprocessing: From bytes to the network's input.
            channels: Of the images.

        Returns:
            The grid, of 13 bits up to a limit that no byte is beyond; or of 12, 14 or 11 bits.

        Raises:
            ValueError: if on each of these grids some byte ends halfway between two steps, where a division by std and
                a multiplication with 1 / std, which some runtimes make of it, may be rounded to different ones.
        """
        every = np.repeat(np.arange(256, dtype="uint8")[:, None], channels, axis=1)
        divided = np.asarray(preprocessing(every))
        mean, std = (np.asarray(each, "float32") for each in (preprocessing.mean, preprocessing.std))
        multiplied = (every.astype("float32") - mean) * (np.float32(1) / std)
        limit = cls.of(divided).limit / 2
        for bits in (13, 12, 14, 11):
            step = limit * 2.0**-bits
            if np.array_equal(np.rint(divided / step), np.rint(multiplied / step)):
                return cls(step, limit)
        raise ValueError(
            "Some byte ends halfway between two steps of every grid, where runtimes round in different ways. Change "
            f"mean or std a little. Received {preprocessing}."
        )


def exact_copy(model: keras.Model, grid: Grid) -> keras.Model:
    """The same network with weights rounded such that TensorFlow and ONNX Runtime compute the same, to the spike.

    Its spikes are not those of the model itself, whose weights it has to the bits that are left: evaluate it, as any
    Keras model, to see what rounding costs, and export it with a `flip_budget` of 0.

    Args:
        model: A functional or Sequential model with one input and time steps, in float32, of Conv1D to Conv3D,
            DepthwiseConv1D and 2D and Dense layers (few-bit ones too), average pooling over powers of two,
            normalization over the last axis, and neurons. Sums end in a normalization or in neurons: two kernels with
            nothing between them cannot be exact.
        grid: Of the input.

    Returns:
        A new, uncompiled model, whose first layer rounds the input. Few-bit layers have become float ones, and
        normalizations `keras_dsr.layers.Scale`.

    Raises:
        ValueError: if the network has other layers, or more inputs meet in a sum than leave 4 bits a weight; the error
            names the layer.

    Example:

    >>> from keras_dsr import models
    >>> copy = exact_copy(models.small_cnn(timesteps=4), Grid(step=1 / 16, limit=16.0))
    >>> max(largest_sums(copy).values()) <= 24
    True
    """
    check_model(model)
    plain = _without_normalization(model)
    for bits in _WORTH_BITS:
        copy = _on_grid(plain, grid)
        try:
            _settle(copy, bits)
            break
        except _TooFewBits:
            if bits == _WORTH_BITS[-1]:
                raise
    largest_sums(copy)  # raises, if anything above is wrong
    return copy


class _TooFewBits(ValueError):
    """Too few bits are left for the weights of a kernel; or no spike can be worth a number of so few."""


def _settle(copy: keras.Model, bits: int) -> None:
    """Rounds the weights of a model such that its sums are exact, with spikes that are worth numbers of so many bits.

    Raises:
        _TooFewBits: if too little would be left of a kernel, or no threshold gives a spike such a worth.
        ValueError: if the network has layers whose sums cannot be exact.
    """
    settling = _Settling()
    for neuron in neurons_of(copy):
        _round_worth(neuron, bits)
    for _ in range(_ROUNDS):
        settling.again = False
        _Walk(copy, settling).run()
        if not settling.again:
            break
    settling.check(copy)


def largest_sums(model: keras.Model) -> dict[str, float]:
    """Proves that a network's sums are exact in float32, from its weights alone.

    Args:
        model: A model that `exact_copy` made, or one like it: its first layer is a `keras_dsr.layers.FixedPoint`.

    Returns:
        For each layer that sums up, by name and in order, how many bits the largest sum has that any input can lead to;
        at most 24. It is log2 of that sum in units of the grid, so it need not be whole.

    Raises:
        ValueError: if a sum can have more, or what it adds up is on no grid; the error names the layer.
    """
    _check_layers(model)
    walk = _Walk(model, None)
    walk.run()
    return walk.bits


def check_model(model: keras.Model) -> None:
    """Raises a ValueError unless a model has one input, a graph, finite weights, all in float32, and is no copy yet."""
    graph.functional(model)  # raises, if it is none
    _check_layers(model)
    if len(model.inputs) != 1:
        raise ValueError(f"A model with one input can be made exact. Received {model.name!r} with {len(model.inputs)}.")
    dtype = keras.backend.standardize_dtype(model.inputs[0].dtype)
    if dtype != "float32":
        raise ValueError(
            f"The input of an exact network is rounded from float32. Model {model.name!r} takes {dtype}: build it for "
            "float32, and cast what it gets."
        )
    for layer in model._flatten_layers():
        if isinstance(layer, (FixedPoint, Requantize, Scale)):
            raise ValueError(
                f"Model {model.name!r} is an exact copy already, or a part of one: it has the layer {layer.name!r} "
                f"({type(layer).__name__}). Pass the model that it was made of."
            )


def _check_layers(model: keras.Model) -> None:
    for layer in model._flatten_layers(include_self=False):
        if layer.compute_dtype != "float32":
            raise ValueError(
                f"Sums are exact in float32. Layer {layer.name!r} of model {model.name!r} computes in "
                f"{layer.compute_dtype}: build the model with the dtype policy 'float32', and set its weights."
            )
        if not all(np.isfinite(weight).all() for weight in layer.get_weights()):
            raise ValueError(f"Layer {layer.name!r} of model {model.name!r} has weights that are not finite.")


def _without_normalization(model: keras.Model) -> keras.Model:
    """A copy of stock layers, with the values that few-bit ones compute with, and normalizations as `Scale`."""
    stock, kernels = with_stock_layers(model)
    source = graph.functional(stock)
    stock = keras.Model(source.input, source.output, name=model.name)  # which is not compiled, nor are its clones
    pairs: list[tuple[Any, Any]] = []
    ranks = {
        id(layer): len((inputs[1] if isinstance(layer, BatchNormalization) else inputs).shape)
        for _, layer, inputs in graph.calls(stock)
        if isinstance(layer, layers.BatchNormalization)
    }

    def clone(layer: Any) -> Any:
        if type(layer) is BatchNormalization:
            scale = Scale(name=f"{layer.name}_scale", dtype="float32")
            new: Any = Synapse(scale, affine=True, name=layer.name, dtype="float32")
        elif type(layer) is layers.BatchNormalization:
            new = scale = Scale(name=layer.name, dtype="float32")
        else:
            new = type(layer).from_config(layer.get_config())
            if isinstance(layer, keras.Layer):  # and not an operation such as keras.ops.softmax
                pairs.append((layer, new))
            return new
        if not layer.scale or layer.axis not in (-1, ranks[id(layer)] - 1):
            raise refusal(
                model,
                layer.name,
                layer,
                "normalizes over another axis than the last, or without gamma; build it with scale=True and axis=-1",
            )
        pairs.append((layer, scale))
        return new

    copy = keras.models.clone_model(stock, clone_function=clone, recursive=True)
    for old, new in pairs:
        if isinstance(new, Scale):
            _set_scale(old, new)
        else:
            new.set_weights(old.get_weights())
        for inner, rounded in zip(_inner(old), _inner(new), strict=True):
            if kernels.bits(inner) is not None:
                rounded.kernel.assign(kernels.round(inner, np.asarray(inner.kernel), np.float32(1)))
    return copy


def _inner(layer: Any) -> list[Any]:
    """A layer, or those within a synapse."""
    if isinstance(layer, Synapse):
        return _inner(layer.layer)
    return [each for part in layer.layers for each in _inner(part)] if isinstance(layer, keras.Sequential) else [layer]


def _set_scale(old: keras.layers.BatchNormalization, scale: Scale) -> None:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta, with another gamma."""
    values = {each.name: np.asarray(each, "float64") for each in old.weights}
    gamma = values["gamma"] / np.sqrt(values["moving_variance"] + old.epsilon)
    scale.set_weights([gamma, values["moving_mean"], values.get("beta", np.zeros_like(gamma))])


def _on_grid(model: keras.Model, grid: Grid) -> keras.Model:
    """A copy behind a layer that rounds the input."""
    source = graph.functional(model)
    old = source.inputs[0]
    inputs = keras.Input(batch_shape=old.shape, dtype=old.dtype, name=old.name)
    rounded = FixedPoint(grid.step, grid.limit, name="fixed_point", dtype="float32")(inputs)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = keras.tree.map_structure(lambda x: rounded if x is inputs else x, (args, kwargs))
        return layer(*args, **kwargs)

    # Keras hands back a single tensor as the model has it: in a list, or not.
    given = keras.tree.map_structure(lambda _: inputs, source.input)
    found = keras.models.clone_model(
        source,
        input_tensors=given,
        clone_function=lambda layer: type(layer).from_config(layer.get_config()),
        call_function=call,
    )
    found = keras.Model(found.input, found.output, name=model.name)
    found.set_weights(model.get_weights())
    return found


def _round_worth(neuron: SpikingNeuron, bits: int) -> None:
    """Gives a neuron layer a threshold of which a spike's worth has so many bits."""
    scale = np.float32(neuron.scale)
    mantissa, exponent = math.frexp(np.float32(neuron.threshold) * scale)
    nearest = round(mantissa * 2**bits)
    # Not every number is a threshold's product with the scale, as it is rounded; one of the nearest is.
    away = max(2 ** (bits - 5), 1)
    for whole in sorted(range(nearest - away, nearest + away + 1), key=lambda number: abs(number - nearest)):
        wanted = np.float32(math.ldexp(whole, exponent - bits))
        first = np.float32(wanted / scale)
        for each in (first, *(np.nextafter(first, np.float32(toward)) for toward in (0.0, math.inf))):
            if each * scale == wanted:
                neuron.threshold.assign(each)
                return
    raise _TooFewBits(
        f"A spike of {neuron.name!r}, V_th / dt, cannot be worth a number of {bits} bits near "
        f"{mantissa * 2.0**exponent}: its scale is {neuron.scale}. Use a dt such as 0.05."
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """A kernel whose sums are in other numbers.

    Args:
        kernel: Its layer's `id`.
        finer: By how many bits the grid has become finer since, as pools make it.
        apart: Whether channels are still the kernel's.
    """

    kernel: int
    finer: int = 0
    apart: bool = True


@dataclasses.dataclass(frozen=True)
class _Exact:
    """Numbers on a grid: what can be said of a tensor of them, whatever the input.

    Args:
        shape: As Keras has it: (batch, time, ...) in a stream.
        exponent: All are whole multiples of 2^exponent: a scalar, or one for each channel (the last axis).
        bound: Largest absolute value, of as many.
        sources: Kernels that these are sums of.
    """

    shape: tuple[int | None, ...]
    exponent: np.ndarray
    bound: np.ndarray
    sources: frozenset[_Source] = frozenset()

    def joined(self, shape: Any) -> _Exact:
        """The same with channels no longer told apart."""
        sources = frozenset(dataclasses.replace(each, apart=False) for each in self.sources)
        return _Exact(tuple(shape), self.exponent.min(), self.bound.max(), sources)

    @property
    def bits(self) -> np.ndarray:
        """Of the largest number, in units of the grid."""
        return np.log2(np.maximum(self.bound, 1e-300)) - self.exponent


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """In place of `_Exact`: numbers that are computed one by one of exact ones, and so the same everywhere."""

    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class _Input:
    """In place of `_Exact`: the model's input, of any numbers."""

    shape: tuple[int | None, ...]


_ANSWER = "answer"
"""In place of `_Exact`: what spikes stand for, which no neuron may see."""


class _Settling:
    """Finds the grids: rounds kernels, and coarsens those whose sums, or what is added to them, turn out too large."""

    def __init__(self) -> None:
        self.again = False
        self._layers: dict[int, tuple[str, keras.layers.Layer]] = {}
        self._originals: dict[int, list[np.ndarray]] = {}
        self._least: dict[int, np.ndarray] = {}  # exponents of each kernel's outputs, by channel
        self._inputs: dict[int, float] = {}  # the largest that a kernel is multiplied with
        self._totals: dict[int, np.ndarray] = {}  # the largest sum that its sums become a part of, by channel

    def kernel(self, name: str, layer: keras.layers.Layer, x: _Exact) -> None:
        """Rounds a kernel, and its bias, to the finest grid that is fine."""
        key = id(layer)
        kernel, *bias = self._originals.setdefault(key, _weights(layer))
        inputs, bound = x.exponent.min(), float(x.bound.max())
        self._layers[key], self._inputs[key] = (name, layer), bound

        def outputs(weights: np.ndarray, biases: list[np.ndarray]) -> np.ndarray:
            products = np.abs(weights).reshape(-1, _channels(layer)).sum(axis=0) * bound
            return products + sum(np.abs(each) for each in biases)

        largest = outputs(kernel, bias)
        exponent = np.ceil(np.log2(np.maximum(largest, 1e-300))).astype(int) - BITS
        exponent = np.where(largest > 0, exponent, _OF_ZERO)
        exponent = np.maximum(exponent, self._least.get(key, _SMALLEST + max(0, int(inputs))))
        shape = kernel.shape[-2:] if isinstance(layer, _DEPTHWISE) else kernel.shape[-1:]
        while True:
            rounded = _rounded(kernel, (exponent - inputs).reshape(shape))
            biases = [_rounded(each, exponent) for each in bias]
            # Rounding may have made a sum larger than the room that it has.
            over = outputs(rounded, biases) > np.ldexp(1.0, exponent + BITS)
            if not over.any():
                break
            exponent = exponent + over
        self._least[key] = exponent
        for variable, value in zip(layer.weights, (rounded, *biases), strict=True):
            variable.assign(value)

    def scale(self, layer: Scale, x: _Exact) -> None:
        """gamma (x - mean) + beta as gamma (x - mean), with the mean on a grid; as beta where gamma is next to 0."""
        gamma, mean, beta = self._originals.setdefault(id(layer), _weights(layer))
        constant = beta - gamma * mean
        live = np.abs(gamma) * x.bound > 2.0**-BITS * np.abs(constant)
        mean = np.where(live, -constant / np.where(live, gamma, 1), 0)
        if not x.sources:  # whose grid can be made no coarser
            live &= x.bound + np.abs(mean) < np.ldexp(1.0, BITS + x.exponent)
            mean = np.where(live, mean, 0)
        room = np.ceil(np.log2(np.maximum(x.bound + np.abs(mean), 1e-300))).astype(int) - BITS
        # One bit more, for what rounding up adds.
        layer.set_weights([np.where(live, gamma, 0), _rounded(mean, room + 1), np.where(live, 0, constant)])

    def note(self, found: _Exact) -> None:
        """What sums of kernels came to."""
        for source in found.sources:
            total = found.bound if source.apart else found.bound.max()
            self._totals[source.kernel] = np.maximum(total, self._totals.get(source.kernel, 0.0))

    def coarsen(self, found: _Exact) -> None:
        """Takes bits off kernels whose grids are too fine for a sum that they are a part of, for each channel."""
        over = found.bits > BITS
        wanted = found.exponent + np.ceil(np.maximum(found.bits - BITS, 0)).astype(int)
        for source in found.sources:
            least = self._least[source.kernel]
            needed = np.where(over, wanted + source.finer, -_OF_ZERO)
            coarser = np.maximum(least, needed if source.apart else needed.max())
            self.again |= bool((coarser > least).any())
            self._least[source.kernel] = coarser

    def check(self, model: keras.Model) -> None:
        """Raises a ValueError if too little is left of a kernel."""
        for key, (name, layer) in self._layers.items():
            before = self._originals[key][0].reshape(-1, _channels(layer))
            largest = np.abs(before).max(axis=0)
            off = np.abs(_of_channels(layer) - before).max(axis=0)
            # It hardly matters beside far larger numbers: another kernel's, or a mean where gamma is next to 0.
            sums = off * len(before) * self._inputs[key]
            matters = (sums > self._totals[key] / 2**8) & (sums > 2.0 ** (_SMALLEST + BITS))
            if ((off > largest / (2 * _LEAST_STEPS)) & matters).any():
                raise _TooFewBits(
                    f"The sums of model {model.name!r} cannot be exact: those of layer {name!r} leave its largest "
                    f"weight in some channel fewer than {_LEAST_STEPS} steps. Fewer inputs have to meet in one sum: "
                    "use fewer channels, or a coarser grid for the input."
                )


def refusal(model: keras.Model, name: str, layer: Any, why: str, what: str = "be exact") -> ValueError:
    """That a layer keeps a model's sums from being what they should be."""
    return ValueError(f"The sums of model {model.name!r} cannot {what}: layer {name!r} ({type(layer).__name__}) {why}.")


def places_of(layer: Any, shape: Sequence[int | None], refuse: Callable[[str], Exception]) -> int:
    """How many places an average pool averages over: a power of two, else the average is rounded.

    Args:
        layer: The pool.
        shape: Of its input, (batch, ..., channels).
        refuse: From why it cannot be to the error that is raised then.
    """
    sizes = shape[1:-1] if isinstance(layer, GLOBAL_POOLS) else layer.pool_size
    if None in sizes:
        raise refuse("averages over a number of places that is not fixed; fix the input's size")
    places = math.prod(sizes)
    if places & (places - 1):
        raise refuse(f"averages over {places} places, which is no power of two; use 2 or 4 on a side")
    if getattr(layer, "padding", "valid") != "valid":
        raise refuse("averages over fewer places at the edges; use padding='valid'")
    return places


class _Walk:
    """One way through a model with what can be said of its numbers in their place.

    Args:
        model: What is walked.
        settling: What rounds weights on the way; `None` to take them as they are, and raise if a sum is not exact.
    """

    def __init__(self, model: keras.Model, settling: _Settling | None) -> None:
        self.model = model
        self.settling = settling
        self.bits: dict[str, float] = {}
        self._seen: set[int] = set()

    def run(self) -> None:
        graph.walk(self.model, _Input(tuple(self.model.inputs[0].shape)), self._replace)

    def _replace(self, name: str, layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inputs = args[0] if args else kwargs.get("inputs")
            stream = isinstance(inputs, (list, tuple))
            if type(layer) is Add and stream:
                return [self._sum(name, layer, [each[0] for each in inputs]), _ANSWER]
            first = inputs[0] if stream else inputs
            if isinstance(layer, SpikingNeuron):
                found = self._spikes(name, layer, first, stream)
                return [found, _ANSWER] if stream or layer.timesteps is not None else found
            if type(layer) is SpikeRep or any(x is _ANSWER for x in (first, *args, *kwargs.values())):
                return _ANSWER
            if type(layer) is ToTensor:
                return _Rounded(first.shape)  # whose axes are others
            if type(layer) is ToStream:
                return [self._streamed(name, layer, first), _ANSWER]
            if type(layer) is Synapse:
                return [self._each_step(name, layer.layer, first), _ANSWER]
            found = self._apply(name, layer, first)
            return [found, _ANSWER] if stream else found

        return call

    def _refuse(self, name: str, layer: Any, why: str) -> ValueError:
        return refusal(self.model, name, layer, why)

    def _off_grid(self, name: str, layer: Any, x: Any) -> ValueError:
        if isinstance(x, _Input):
            return self._refuse(
                name,
                layer,
                "is ahead of the FixedPoint layer that puts the input on a grid; exact_copy makes a model"
                " that begins with one",
            )
        return self._refuse(
            name, layer, "takes numbers that are on no grid, such as those behind a normalization; put neurons between"
        )

    def _steps(self, name: str, layer: Any) -> None:
        if layer.timesteps == 0:
            raise self._refuse(
                name,
                layer,
                "makes a representation network (timesteps=0), which has no spikes; give it time steps with "
                "keras_dsr.models.with_timesteps(model, N)",
            )

    def _streamed(self, name: str, layer: ToStream, x: Any) -> Any:
        self._steps(name, layer)
        if not isinstance(x, (_Exact, _Rounded)):
            raise self._off_grid(name, layer, x)
        return x

    def _spikes(self, name: str, neuron: SpikingNeuron, x: Any, stream: bool) -> _Exact:
        self._steps(name, neuron)
        if x is _ANSWER:
            raise self._refuse(name, neuron, "takes what spikes stand for, which is rounded; give it the spikes")
        if not isinstance(x, (_Exact, _Rounded)):
            raise self._off_grid(name, neuron, x)
        worth = np.float32(neuron.threshold) * np.float32(neuron.scale)
        shape = x.shape if stream or neuron.timesteps is None else (x.shape[0], neuron.timesteps, *x.shape[1:])
        return _Exact(shape, _exponents(np.reshape(worth, (1, 1)))[0], np.array(float(worth)))

    def _sum(self, name: str, layer: Add, parts: list[Any]) -> _Exact:
        for each in parts:
            if not isinstance(each, _Exact):
                raise self._off_grid(name, layer, each)
        exponent = np.minimum.reduce(np.broadcast_arrays(*(each.exponent for each in parts)))
        bound = sum(each.bound for each in parts)
        sources = frozenset().union(*(each.sources for each in parts))
        return self._checked(name, _Exact(parts[0].shape, exponent, bound, sources))

    def _each_step(self, name: str, layer: keras.layers.Layer, x: Any) -> Any:
        """What a synapse does: its layer sees no time axis."""
        if not isinstance(x, (_Exact, _Rounded)):
            raise self._off_grid(name, layer, x)
        batch, time, *features = x.shape
        found = self._affine(name, layer, dataclasses.replace(x, shape=(batch, *features)))
        return dataclasses.replace(found, shape=(batch, time, *found.shape[1:]))

    def _affine(self, name: str, layer: keras.layers.Layer, x: Any) -> Any:
        if isinstance(layer, keras.Sequential):
            for part in layer.layers:
                x = self._affine(f"{name}/{part.name}", part, x)
            return x
        return self._apply(name, layer, x)

    def _apply(self, name: str, layer: Any, x: Any) -> Any:
        kind = type(layer)
        if kind is FixedPoint and isinstance(x, (_Input, _Rounded)):
            return _Exact(x.shape, np.array(math.frexp(layer.step)[1] - 1), np.array(layer.limit))
        if kind in (Dropout, layers.Dropout) and not isinstance(x, _Input):
            return x
        if not isinstance(x, _Exact):
            raise self._off_grid(name, layer, x)
        if getattr(layer, "data_format", "channels_last") != "channels_last":
            raise self._refuse(name, layer, "has channels first")
        if kind is Scale:
            return self._scaled(name, layer, x)
        if kind is Requantize:
            return self._requantized(name, layer, x)
        if kind in (*_KERNELS, *_DEPTHWISE):
            return self._multiplied(name, layer, x)
        if kind in (*POOLS, *GLOBAL_POOLS):
            return self._pooled(name, layer, x)
        if kind in MOVES and getattr(layer, "interpolation", "nearest") == "nearest":
            return dataclasses.replace(x, shape=tuple(layer.compute_output_shape(x.shape)))
        if kind in SHUFFLES:
            return x.joined(layer.compute_output_shape(x.shape))
        raise self._refuse(name, layer, "is none whose sums are known")

    def _multiplied(self, name: str, layer: Any, x: _Exact) -> _Exact:
        if layer.activation is not keras.activations.linear:
            raise self._refuse(name, layer, "has an activation; put neurons behind it instead")
        if x.sources:
            raise self._refuse(name, layer, "multiplies sums of other kernels; put neurons between")
        if id(layer) in self._seen:
            raise self._refuse(name, layer, "is used twice; use a layer of its own in each place")
        self._seen.add(id(layer))
        if self.settling is not None:
            self.settling.kernel(name, layer, x)
        weights = _of_channels(layer)
        exponent = x.exponent.min() + _exponents(weights)
        bound = np.abs(weights).sum(axis=0) * x.bound.max()
        if layer.use_bias:
            bias = np.asarray(layer.bias, "float64")
            exponent = np.minimum(exponent, _exponents(bias[None]))
            bound = bound + np.abs(bias)
        shape = tuple(layer.compute_output_shape(x.shape))
        return self._checked(name, _Exact(shape, exponent, bound, frozenset([_Source(id(layer))])))

    def _pooled(self, name: str, layer: Any, x: _Exact) -> _Exact:
        places = places_of(layer, x.shape, lambda why: self._refuse(name, layer, why))
        finer = int(math.log2(places))
        sources = frozenset(dataclasses.replace(each, finer=each.finer + finer) for each in x.sources)
        shape = tuple(layer.compute_output_shape(x.shape))
        return self._checked(name, _Exact(shape, x.exponent - finer, x.bound, sources))

    def _scaled(self, name: str, layer: Scale, x: _Exact) -> _Rounded:
        if id(layer) in self._seen:
            raise self._refuse(name, layer, "is used twice; use a normalization of its own in each place")
        self._seen.add(id(layer))
        if self.settling is not None:
            self.settling.scale(layer, x)
        gamma, mean, beta = _weights(layer)
        if ((gamma != 0) & (beta != 0)).any():
            raise self._refuse(name, layer, "adds a beta to a product, which runtimes may round in different ways")
        exponent = np.minimum(x.exponent, _exponents(mean[None]))
        self._checked(name, _Exact(x.shape, exponent, x.bound + np.abs(mean), x.sources))
        return _Rounded(x.shape)

    def _requantized(self, name: str, layer: Requantize, x: _Exact) -> _Exact:
        _, bias = _weights(layer)
        if x.sources:  # else each number is computed by itself
            exponent = np.minimum(x.exponent, _exponents(bias[None]))
            self._checked(name, _Exact(x.shape, exponent, x.bound + np.abs(bias), x.sources))
        return _Exact(x.shape, np.array(math.frexp(layer.step)[1] - 1), np.array(-layer.limits[0] * layer.step))

    def _checked(self, name: str, found: _Exact) -> _Exact:
        """Notes the bits of a sum. Where they are too many, kernels are coarsened, or it raises."""
        most = float(np.max(found.bits))
        self.bits[name] = most
        if self.settling is not None:
            self.settling.note(found)
            if found.sources:
                self.settling.coarsen(found)
                return found
        if not most <= BITS:
            raise ValueError(
                f"The sums of model {self.model.name!r} are not exact: those of layer {name!r} may have {most:.1f} "
                f"bits, and {BITS} are exact."
            )
        if found.exponent.min() < _SMALLEST:
            raise ValueError(
                f"The sums of model {self.model.name!r} are not exact: those of layer {name!r} have parts below "
                f"2^{_SMALLEST}, which some runtimes take for 0."
            )
        return found


def _weights(layer: keras.layers.Layer) -> list[np.ndarray]:
    return [np.asarray(each, "float64") for each in layer.get_weights()]


def _channels(layer: keras.layers.Layer) -> int:
    """How many outputs a kernel has."""
    shape = layer.kernel.shape
    return shape[-2] * shape[-1] if isinstance(layer, _DEPTHWISE) else shape[-1]


def _of_channels(layer: keras.layers.Layer) -> np.ndarray:
    """A kernel as (weights of an output channel, channels)."""
    return np.asarray(layer.kernel, "float64").reshape(-1, _channels(layer))


def _rounded(values: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """To whole multiples of 2^exponent, along the last axes."""
    return np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)


def _exponents(values: np.ndarray) -> np.ndarray:
    """For each column of (n, columns) the largest whole number e such that all in it are whole multiples of 2^e."""
    mantissa, exponent = np.frexp(np.asarray(values, "float64"))
    whole = np.abs(np.ldexp(mantissa, 53)).astype("int64")
    lowest = np.log2(np.where(whole == 0, 1, whole & -whole)).astype(int)
    return np.where(whole == 0, _OF_ZERO, exponent.astype(int) - 53 + lowest).min(axis=0)

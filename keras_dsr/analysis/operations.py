"""How many operations a spiking network does for a sample, and the ANN of the same shape: SynOps and MACs.

A synaptic operation (SynOp) is what one spike makes one connection do: add a weight to what a neuron receives. It is
counted from real spikes: for each input of a layer that is not 0 at a time step, the connections that it really has,
those into the padding of a convolution left out. What averages spikes adds each of them once, and hands all of them on:
the layer behind adds its weight, divided by the size of the window, for each. A connection of the ANN of the same shape
is a multiply-accumulate (MAC), once a sample.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_dsr import graph
from keras_dsr.analysis import tracing
from keras_dsr.layers import Dropout, SpikeRep, Synapse, ToStream, ToTensor
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.stepping import takes_frames

# What hands its input on as it is, elsewhere or not at all: a spike stays one, and nothing is computed.
_ROUTING = (
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.Identity,
    layers.InputLayer,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    layers.Dropout,
    Dropout,
    ToStream,
    ToTensor,
)
_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_POOLS = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
_GLOBAL_POOLS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
# Normalization is folded into weights, or done once for a static input.
_WITHOUT_CONNECTIONS = (SpikingNeuron, layers.BatchNormalization, layers.Normalization, layers.Rescaling)
_UNCOUNTED = (layers.SeparableConv1D, layers.SeparableConv2D)


@dataclasses.dataclass(frozen=True)
class LayerOperations:
    """What a layer of connections does for a sample, on average.

    Args:
        name: Its name.
        fed_by: "spikes", so that an operation is an addition; or "values" (images, numbers of events, sums of streams),
            so that it is a multiplication and an addition.
        connections: Number of connections: the MACs of the ANN of the same shape.
        operations: Operations of the spiking network for a sample, at all time steps. Of a static input all
            connections, once; else those of inputs that are not 0.
        weights: Number of weights that the connections share.
        inputs: Number of inputs.
        outputs: Number of outputs.
    """

    name: str
    fed_by: str
    connections: int
    operations: float
    weights: int
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class NeuronOperations:
    """What a neuron layer does for a sample, on average.

    Args:
        name: Its name.
        neurons: Number of neurons.
        updates: Potentials that are updated: neurons x time steps.
        spikes: Spikes that are fired.
        leaky: Whether an update multiplies (LIF), or only adds (IF).
    """

    name: str
    neurons: int
    updates: int
    spikes: float
    leaky: bool


@dataclasses.dataclass(frozen=True)
class Operations:
    """What a network does for a sample, on average over a data set.

    Args:
        samples: Number of samples that were counted.
        timesteps: Number N of time steps.
        layers: Layers of connections, in the order in which they run.
        neurons: Neuron layers, in that order.
        uncounted: Names of layers that have weights of a kind that is not counted.
    """

    samples: int
    timesteps: int
    layers: tuple[LayerOperations, ...]
    neurons: tuple[NeuronOperations, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def synops(self) -> float:
        """Synaptic operations of a sample: operations of layers that are fed by spikes."""
        return sum(layer.operations for layer in self.layers if layer.fed_by == "spikes")

    @property
    def multiplications(self) -> float:
        """Operations of a sample in layers that are fed by values."""
        return sum(layer.operations for layer in self.layers if layer.fed_by == "values")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the ANN of the same shape, for a sample."""
        return sum(layer.connections for layer in self.layers)

    @property
    def spikes(self) -> float:
        """Spikes of a sample, of all neuron layers."""
        return sum(layer.spikes for layer in self.neurons)


def count_operations(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> Operations:
    """Runs a model over a data set and counts what its layers have to do.

    Counted are dense layers, convolutions (transposed and depthwise too) and average pooling, in synapses, on static
    inputs and in `TimeDistributed`. Normalization is not, since it can be folded into weights; what only moves numbers
    (padding, flattening, copying) is not; nor are additions of streams, of which each spike's is in the receiving
    neuron.

    Args:
        model: A functional or Sequential model with spiking layers and one input, of fixed sizes.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        Counts, for a sample.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, a layer of connections is of a kind that cannot
            be counted, or `x` is empty.

    Example:

    >>> import numpy as np
    >>> from keras_dsr.layers import IFSpike
    >>> inputs = keras.Input((2,))
    >>> spikes = IFSpike(threshold=1.0, timesteps=4)(inputs)  # 0.5 fires twice in 4 steps, 1.0 each time
    >>> model = keras.Model(inputs, SpikeRep()(IFSpike()(Synapse(layers.Dense(3))(spikes))))
    >>> counted = count_operations(model, np.array([[0.5, 1.0]], "float32"))
    >>> counted.synops, counted.macs
    (18.0, 6)
    """
    neurons = tracing.neurons_by_name(model)
    plan = _plan(model)
    totals: dict[str, np.ndarray] = {}
    samples = 0

    def collect(name: str, layer: Any, received: Any, output: Any, real: Any) -> dict[str, Any]:
        if name in neurons:
            values = output if hasattr(output, "shape") else next(iter(output))
            return {"spikes": tracing.spikes_over_batch(layer, values, real)}
        if name not in plan:
            return {}
        x = received[0] if isinstance(received, (list, tuple)) else received
        found = {}
        parts = plan[name]
        for number, part in enumerate(parts):
            found[f"{number}"] = _count(x, part.source, neurons, real)
            if number + 1 < len(parts):
                x = _each_step(part.layer, x, part.timed)
        return found

    for count, found in tracing.run(tracing.Probe(model, collect), x, batch_size):
        samples += count
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value.astype("int64")

    counted = []
    for name, parts in plan.items():
        for number, part in enumerate(parts):
            events = totals[f"{name}/{number}"]
            shape = events.shape[1:] if part.timed else events.shape
            reach = fan_out(part.layer, shape) if not _routes(part.layer) else None
            if reach is None:
                continue
            connections = int(reach.sum())
            done = float((events * reach).sum()) / samples if part.timed else float(connections)
            outputs = math.prod(part.layer.compute_output_shape((1, *shape))[1:])
            kernels = sum(math.prod(weight.shape) for weight in part.layer.weights if weight.name != "bias")
            title = part.layer.name if len(parts) > 1 else name
            counted.append(LayerOperations(title, part.fed_by, connections, done, kernels, math.prod(shape), outputs))
    fired = {name: totals[f"{name}/spikes"] for name in neurons}
    steps = len(next(iter(fired.values())))
    return Operations(
        samples=samples,
        timesteps=steps,
        layers=tuple(counted),
        neurons=tuple(
            NeuronOperations(
                name=name,
                neurons=math.prod(fired[name].shape[1:]),
                updates=fired[name].size,
                spikes=float(fired[name].sum()) / samples,
                leaky=neuron.coding.decay != 1.0,
            )
            for name, neuron in neurons.items()
        ),
        uncounted=tuple(
            name
            for name, layer, _ in graph.calls(model)
            if name not in plan and getattr(layer, "weights", None) and not isinstance(layer, _WITHOUT_CONNECTIONS)
        ),
    )


def fan_out(layer: keras.layers.Layer, input_shape: tuple[int, ...]) -> np.ndarray:
    """How many connections each input of a layer has.

    Args:
        layer: A dense layer, a convolution or an average pooling.
        input_shape: Shape of one input, without batch and time.

    Returns:
        int64 of that shape.

    Raises:
        ValueError: if the layer is of another kind.

    Example:

    >>> fan_out(layers.Conv1D(2, 3, padding="same"), (4, 1))[:, 0].tolist()
    [4, 6, 6, 4]
    """
    if isinstance(layer, layers.Dense):
        return np.full(input_shape, layer.units, "int64")
    if isinstance(layer, layers.EinsumDense):
        received, kernel, put_out = re.fullmatch(r"(.+),(.+)->(.+)", layer.equation.replace("...", "")).groups()
        full = layer.compute_output_shape((1, *input_shape))
        size = dict(zip(reversed(put_out), reversed(full), strict=False))
        made = math.prod(size[letter] for letter in kernel if letter in put_out and letter not in received)
        return np.full(input_shape, made, "int64")
    if isinstance(layer, _GLOBAL_POOLS):
        return np.ones(input_shape, "int64")
    first = layer.data_format == "channels_first" if hasattr(layer, "data_format") else False
    places = input_shape[1:] if first else input_shape[:-1]
    channels = input_shape[0] if first else input_shape[-1]
    rank = len(places)
    if isinstance(layer, _TRANSPOSED):  # before the convolutions, of which they are a kind
        if layer.output_padding is not None:
            raise ValueError(f"{_title(layer)} has output_padding, with which its connections cannot be counted.")
        full = layer.compute_output_shape((1, *input_shape))[1:]
        sizes = full[1:] if first else full[:-1]
        axes = zip(places, sizes, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
        reach = [_spread(size, out, *rest, layer.padding) for size, out, *rest in axes]
        each = layer.filters
    elif isinstance(layer, (*_CONVOLUTIONS, *_DEPTHWISE)):
        axes = zip(places, layer.kernel_size, layer.strides, layer.dilation_rate, strict=True)
        reach = [_reach(*axis, layer.padding) for axis in axes]
        each = layer.depth_multiplier if isinstance(layer, _DEPTHWISE) else layer.filters // layer.groups
    elif isinstance(layer, _POOLS):
        axes = zip(places, layer.pool_size, layer.strides, strict=True)
        reach = [_reach(size, pool, stride, 1, layer.padding) for size, pool, stride in axes]
        each = 1
    else:
        raise ValueError(
            f"The connections of {_title(layer)} cannot be counted: that is done for dense layers, convolutions but "
            "separable ones, and average pooling."
        )
    product = reach[0]
    for axis in range(1, rank):
        product = np.multiply.outer(product, reach[axis])
    every = np.repeat(product[..., np.newaxis] * each, channels, axis=-1)
    return np.moveaxis(every, -1, 0) if first else every


def _reach(size: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """Along one axis, how many outputs each input takes part in."""
    extent = dilation * (kernel - 1) + 1
    before = _before(size, extent, stride, padding)
    after = {"same": extent, "causal": 0, "valid": 0}[padding]
    outputs = -(-size // stride) if padding == "same" else (size + before + after - extent) // stride + 1
    found = np.zeros(size, "int64")
    for output in range(outputs):
        taken = output * stride - before + dilation * np.arange(kernel)
        found[taken[(taken >= 0) & (taken < size)]] += 1
    return found


def _spread(size: int, outputs: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """Along one axis of a transposed convolution, how many outputs each input adds to."""
    before = _before(outputs, dilation * (kernel - 1) + 1, stride, padding)
    reached = np.arange(size)[:, np.newaxis] * stride - before + dilation * np.arange(kernel)
    return ((reached >= 0) & (reached < outputs)).sum(axis=1)


def _before(size: int, extent: int, stride: int, padding: str) -> int:
    """How many zeros a convolution has ahead of its input."""
    if padding == "same":
        return max((-(-size // stride) - 1) * stride + extent - size, 0) // 2
    return extent - 1 if padding == "causal" else 0


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a tensor is made of.

    Args:
        timed: Whether it has a time axis.
        neuron: Name of the neuron layer whose spikes it is; `None` for other values.
        window: Of how many spikes each of its numbers is the mean.
    """

    timed: bool
    neuron: str | None = None
    window: int = 1


@dataclasses.dataclass(frozen=True)
class _Part:
    """A layer whose connections are counted, or that stands between such in a synapse.

    Args:
        layer: The layer, as it sees one time step.
        source: What its input is made of.
    """

    layer: keras.layers.Layer
    source: _Source

    @property
    def fed_by(self) -> str:
        return "values" if self.source.neuron is None else "spikes"

    @property
    def timed(self) -> bool:
        return self.source.timed


def _plan(model: keras.Model) -> dict[str, tuple[_Part, ...]]:
    """The layers of a model whose inputs are to be counted, by the name of the layer that they stand in."""
    plan: dict[str, tuple[_Part, ...]] = {}

    def note(name: str, layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            received = [each for each in keras.tree.flatten((args, kwargs)) if isinstance(each, _Source)]
            put_out = _through(name, layer, received, plan)
            return [put_out] * len(keras.tree.flatten(layer.output))

        return call

    # What goes through the graph tells of each tensor what it is made of.
    graph.walk(model, _Source(takes_frames(model)), note)
    return plan


def _through(name: str, layer: Any, received: list[_Source], plan: dict[str, tuple[_Part, ...]]) -> _Source:
    timed = any(each.timed for each in received)
    if isinstance(layer, SpikingNeuron):
        return _Source(True, name)
    if isinstance(layer, SpikeRep):
        return _Source(False)
    inner = layer.layer if isinstance(layer, (Synapse, layers.TimeDistributed)) else layer
    source = received[0] if len(set(received)) == 1 else _Source(timed)
    parts = []
    for part in inner.layers if isinstance(inner, keras.Sequential) else [inner]:
        parts.append(_Part(part, source))
        source = _behind(part, source)
    if any(_counts(part.layer) for part in parts):
        if name in plan:
            raise ValueError(
                f"Layer {name!r} runs more than once in the model, so its operations have no one name. Use a layer of "
                "its own for each place."
            )
        plan[name] = tuple(parts)
    return source


def _behind(layer: Any, source: _Source) -> _Source:
    if _routes(layer):
        return source
    if source.neuron is not None and isinstance(layer, _POOLS) and layer.padding == "valid":
        return dataclasses.replace(source, window=source.window * math.prod(layer.pool_size))
    return _Source(source.timed)


def _count(x: Any, source: _Source, neurons: dict[str, SpikingNeuron], real: Any) -> Any:
    """What each place of a tensor (batch, ...) brings about, over the batch: spikes, or numbers that are not 0."""
    if source.neuron is None:
        return tracing.count_over_batch(x, real)
    if source.window == 1:
        return tracing.spikes_over_batch(neurons[source.neuron], x, real)
    neuron = neurons[source.neuron]
    worth = ops.cast(neuron.threshold, "float32") * (neuron.scale / source.window)
    return ops.tensordot(real, ops.round(ops.cast(x, "float32") / worth), axes=1)


def _counts(layer: Any) -> bool:
    if isinstance(layer, _UNCOUNTED):
        fan_out(layer, (1, 1, 1))  # raises, saying which can be
    known = (layers.Dense, layers.EinsumDense, *_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_POOLS, *_GLOBAL_POOLS)
    return isinstance(layer, known)


def _routes(layer: Any) -> bool:
    return isinstance(layer, _ROUTING) and getattr(layer, "interpolation", "nearest") == "nearest"


def _each_step(layer: keras.layers.Layer, x: Any, timed: bool) -> Any:
    if not timed:
        return layer(x)
    folded = layer(ops.reshape(x, (-1, *x.shape[2:])))
    return ops.reshape(folded, (-1, x.shape[1], *folded.shape[1:]))


def _title(layer: keras.layers.Layer) -> str:
    return f"{type(layer).__name__} {layer.name!r}"

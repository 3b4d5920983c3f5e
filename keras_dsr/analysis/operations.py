"""How many operations a spiking network does for a sample, and the ANN of the same shape: SynOps and MACs.

A synaptic operation (SynOp) is what one spike makes one connection do: add a weight to what a neuron receives. It is
counted from real spikes: for each input of a layer that is not 0 at a time step, the connections that it really has,
those into padding left out. Average pooling is folded into the layer behind, which adds its weight, divided by the size
of the window, for each spike in it. Only where a neuron or an `Add` comes next is there no such layer: there each spike
is an addition of its own; and so is each that a shortcut without weights brings to an `Add`. A connection of the ANN of
the same shape is a multiply-accumulate (MAC), once a sample; of a pool or a shortcut, where these count, an addition.
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
from keras_dsr.layers import Add, Dropout, SpikeRep, Synapse, ToStream, ToTensor
from keras_dsr.layers.base import StreamLayer
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
_PADDING = (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)
_MOVING = tuple(
    kind
    for kind in _ROUTING
    if kind not in (layers.Identity, layers.InputLayer, layers.Dropout, Dropout, ToStream, ToTensor)
)
_SUMS = (Add, layers.Add)
_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_POOLS = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
_GLOBAL_POOLS = (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
_ALL_POOLS = (*_POOLS, *_GLOBAL_POOLS)
# Folded into weights, or done once for a static input.
_NORMALIZATIONS = (layers.BatchNormalization, layers.Normalization, layers.Rescaling)
_WITHOUT_CONNECTIONS = (SpikingNeuron, *_NORMALIZATIONS)
_UNCOUNTED = (layers.SeparableConv1D, layers.SeparableConv2D)


@dataclasses.dataclass(frozen=True)
class LayerOperations:
    """What a layer of connections does for a sample, on average.

    Args:
        name: Its name.
        fed_by: "spikes", so that an operation is an addition; or "values" (images, numbers of events, sums of streams),
            so that it is a multiplication and an addition.
        connections: Number of connections: the MACs of the ANN of the same shape, or its additions if there are no
            weights.
        operations: Operations of the spiking network for a sample, at all time steps. Of a static input all
            connections, once; else those of inputs that are not 0.
        weights: Number of weights that the connections share; 0 for pools and shortcuts, which only add.
        inputs: Number of inputs that have connections.
        outputs: Number of outputs.
        static: Whether it runs once a sample, on what is the same at each step.
    """

    name: str
    fed_by: str
    connections: int
    operations: float
    weights: int
    inputs: int
    outputs: int
    static: bool = False


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
        uncounted: Names of layers, and of parts of a Sequential, that have weights of a kind that is not counted.
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
        return sum(layer.connections for layer in self.layers if layer.weights)

    @property
    def spikes(self) -> float:
        """Spikes of a sample, of all neuron layers."""
        return sum(layer.spikes for layer in self.neurons)


def count_operations(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> Operations:
    """Runs a model over a data set and counts what its layers have to do.

    Counted are dense layers and convolutions (transposed and depthwise too), in synapses, on static inputs and in
    `TimeDistributed`; average pooling ahead of a neuron or an `Add`; and spikes that a shortcut without weights brings
    to an `Add`. Normalization is not, since it can be folded into weights, as other pooling is; what only moves numbers
    (padding, flattening, copying) is not; nor are additions of streams that layers have made, of which each spike's is
    in that layer.

    Args:
        model: A functional or Sequential model with spiking layers and one input, of fixed sizes.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        Counts, for a sample.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, a layer of connections is of a kind that cannot
            be counted, or mixes time steps, or `x` is empty.

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
    plan, uncounted = _plan(model)
    totals: dict[str, np.ndarray] = {}
    samples = 0

    def collect(name: str, layer: Any, received: Any, output: Any, real: Any) -> dict[str, Any]:
        if name in neurons:
            values = output if hasattr(output, "shape") else next(iter(output))
            return {"spikes": tracing.spikes_over_batch(layer, values, real)}
        if name not in plan:
            return {}
        tensors = keras.tree.flatten(received)
        if isinstance(layer, _SUMS):
            return {f"{n}": _count(tensors[p.place], p.source, neurons, real) for n, p in enumerate(plan[name])}
        x, found, parts = tensors[0], {}, plan[name]
        for number, part in enumerate(parts):
            if part.counted:
                found[f"{number}"] = _count(x, part.source, neurons, real)
            if any(later.counted for later in parts[number + 1 :]):
                x = _each_step(part, x)
        return found

    for count, found in tracing.run(tracing.Probe(model, collect), x, batch_size):
        samples += count
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value.astype("int64")

    counted = []
    for name, parts in plan.items():
        for number, part in enumerate(parts):
            if not part.counted:
                continue
            events = totals[f"{name}/{number}"]
            shape = events.shape[1:] if part.timed else events.shape
            reach = part.reach(shape)
            connections = int(reach.sum())
            done = float((events * reach).sum()) / samples if part.timed else float(connections)
            if isinstance(part.layer, _SUMS):
                title, outputs = name, math.prod(shape)
            else:
                title = part.layer.name if len(parts) > 1 else name
                skipped = () if part.stepwise else (1,)
                outputs = math.prod(part.layer.compute_output_shape((1, *skipped, *shape))[1 + len(skipped) :])
            counted.append(
                LayerOperations(
                    name=title,
                    fed_by=part.fed_by,
                    connections=connections,
                    operations=done,
                    weights=sum(math.prod(weight.shape) for weight in part.layer.weights if weight.name != "bias"),
                    inputs=int(np.count_nonzero(reach)),
                    outputs=outputs,
                    static=not part.timed,
                )
            )
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
        uncounted=uncounted,
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
        received, kernel, put_out = _letters(layer)
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


def _letters(layer: layers.EinsumDense) -> tuple[str, str, str]:
    """Of an equation, the axes of what is received, of the kernel and of what is put out; without "..."."""
    return re.fullmatch(r"(.+),(.+)->(.+)", layer.equation.replace("...", "")).groups()


def _reach(size: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """Along one axis, how many outputs each input takes part in."""
    return _taken(size, kernel, stride, dilation, padding).sum(axis=0)


def _taken(size: int, kernel: int, stride: int, dilation: int, padding: str) -> np.ndarray:
    """Along one axis, whether each output takes each input: int64 of shape (outputs, inputs)."""
    extent = dilation * (kernel - 1) + 1
    before = _before(size, extent, stride, padding)
    outputs = -(-size // stride) if padding == "same" else (size + before - extent) // stride + 1
    distance = np.arange(size) + before - stride * np.arange(outputs)[:, np.newaxis]
    return ((distance >= 0) & (distance < extent) & (distance % dilation == 0)).astype("int64")


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Source:
    """What a tensor is made of.

    Args:
        timed: Whether it has a time axis.
        shape: Its shape, without batch and time.
        neuron: Name of the neuron layer whose spikes it is; `None` for other values.
        window: Of how many spikes each of its numbers is the mean, of its shape; `None` for 1.
        real: 1 where it is not padding, and 0 where it is, of its shape; `None` for 1.
        pools: Average pooling that it comes from, with no connections between: parts of the plan.
    """

    timed: bool
    shape: tuple[int, ...]
    neuron: str | None = None
    window: np.ndarray | None = None
    real: np.ndarray | None = None
    pools: tuple[_Part, ...] = ()


@dataclasses.dataclass(eq=False)
class _Part:
    """A layer whose connections are counted, or that stands between such in a synapse.

    Args:
        layer: The layer.
        source: What its input is made of.
        stepwise: Whether it sees one time step at a time, or all as one tensor.
        place: Which of the tensors that its layer receives its input is.
        counted: Whether its operations are.
    """

    layer: keras.layers.Layer
    source: _Source
    stepwise: bool = True
    place: int = 0
    counted: bool = False

    @property
    def fed_by(self) -> str:
        return "values" if self.source.neuron is None else "spikes"

    @property
    def timed(self) -> bool:
        return self.source.timed

    def reach(self, shape: tuple[int, ...]) -> np.ndarray:
        """Of each input at a time step, how many connections it has; none, if it is padding."""
        if isinstance(self.layer, _SUMS):
            found = np.ones(shape, "int64")
        elif self.stepwise:
            found = fan_out(self.layer, shape)
        else:  # one tensor, of which a step is as good as another
            found = fan_out(self.layer, (1, *shape))[0]
        return found if self.source.real is None else found * self.source.real


def _plan(model: keras.Model) -> tuple[dict[str, tuple[_Part, ...]], tuple[str, ...]]:
    """The layers whose inputs are to be counted, by the name of the layer that they stand in; and what is uncounted."""
    plan: dict[str, tuple[_Part, ...]] = {}
    uncounted: dict[str, None] = {}

    def note(name: str, layer: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            received = [each for each in keras.tree.flatten((args, kwargs)) if isinstance(each, _Source)]
            outputs = keras.tree.flatten(layer.output)
            put_out = _through(name, layer, received, tuple(outputs[0].shape), plan, uncounted)
            return [put_out] * len(outputs)

        return call

    # What goes through the graph tells of each tensor what it is made of.
    timed = takes_frames(model)
    graph.walk(model, _Source(timed, tuple(model.inputs[0].shape)[2 if timed else 1 :]), note)
    return plan, tuple(uncounted)


def _through(
    name: str,
    layer: Any,
    received: list[_Source],
    output: tuple[int | None, ...],
    plan: dict[str, tuple[_Part, ...]],
    uncounted: dict[str, None],
) -> _Source:
    source = received[0]
    timed = any(each.timed for each in received)
    if isinstance(layer, SpikeRep):
        return _Source(False, output[1:])
    if isinstance(layer, (SpikingNeuron, *_SUMS)) or len({id(each) for each in received}) > 1:
        for pool in (pool for each in received for pool in each.pools):
            pool.counted = True
    if isinstance(layer, SpikingNeuron):
        return _Source(True, output[2:], name)
    if isinstance(layer, _SUMS):
        # A spike that comes here with no weight on its way is added to what the neuron behind receives. The others'
        # additions were those of weights. Streams are pairs, of which the first is what there is at each step.
        pair = 2 if isinstance(layer, StreamLayer) else 1
        places = range(0, len(received), pair)
        parts = [_Part(layer, received[n], place=n, counted=True) for n in places if _adds_spikes(received[n])]
        if parts:
            _note(name, parts, plan)
        return _Source(timed, output[1 + timed :])
    if len({id(each) for each in received}) > 1:
        return _Source(timed, output[1 + timed :])
    if isinstance(layer, ToStream):  # which makes time steps, or finds them
        return dataclasses.replace(source, timed=True)
    stepwise = not source.timed or isinstance(layer, (StreamLayer, layers.TimeDistributed))
    if not stepwise:
        _check_keeps_time(layer, output)
    inner = layer.layer if isinstance(layer, (Synapse, layers.TimeDistributed)) else layer
    within, parts = _flat(inner), []
    many = len(within) > 1
    for part in within:
        made = _Part(part, source, stepwise, counted=_counts(part) and not isinstance(part, _ALL_POOLS))
        parts.append(made)
        source = _behind(made, None if many else output[1 + timed :])
        if not _counts(part) and getattr(part, "weights", None) and not isinstance(part, _WITHOUT_CONNECTIONS):
            uncounted[part.name if many else name] = None
    if any(_counts(part.layer) for part in parts):
        _note(name, parts, plan)
    return source


def _note(name: str, parts: list[_Part], plan: dict[str, tuple[_Part, ...]]) -> None:
    if name in plan:
        raise ValueError(
            f"Layer {name!r} runs more than once in the model, so its operations have no one name. Use a layer of "
            "its own for each place."
        )
    plan[name] = tuple(parts)


def _flat(layer: Any) -> list[Any]:
    """The layers of a Sequential model, and of those in it; or a layer alone."""
    return [part for each in layer.layers for part in _flat(each)] if isinstance(layer, keras.Sequential) else [layer]


def _adds_spikes(source: _Source) -> bool:
    """Whether spikes come with no weight, nor a pool, which has counted them, on their way."""
    return source.neuron is not None and not source.pools


def _behind(part: _Part, shape: tuple[int, ...] | None) -> _Source:
    """What a layer makes of its source; `shape` is that of its output, where it is known."""
    layer, source = part.layer, part.source
    if shape is None:
        shape = tuple(layer.compute_output_shape((1, *source.shape))[1:])
    if _routes(layer):
        if isinstance(layer, (ToTensor, Dropout, layers.InputLayer)):
            return source
        window = None if source.window is None else np.maximum(_routed(layer, source.window), 1)
        real = source.real
        if real is not None or isinstance(layer, _PADDING):
            real = _routed(layer, np.ones(source.shape, "int64") if real is None else real)
        return dataclasses.replace(source, shape=shape, window=window, real=real)
    if isinstance(layer, _ALL_POOLS):
        pools = (*source.pools, part)
        # Means of means are means of spikes if all are of as many.
        if source.neuron is None or (source.window is not None and np.ptp(source.window)):
            return _Source(source.timed, shape, pools=pools)
        before = 1 if source.window is None else int(source.window.flat[0])
        return _Source(source.timed, shape, source.neuron, before * _window(layer, source.shape), pools=pools)
    folded = isinstance(layer, _NORMALIZATIONS)
    return _Source(source.timed, shape, pools=source.pools if folded else ())


def _routed(layer: Any, x: np.ndarray) -> np.ndarray:
    """An array of a time step's shape, moved as a layer moves what it receives."""
    return np.asarray(layer(ops.convert_to_tensor(x[np.newaxis].astype("float32"))))[0].round().astype("int64")


def _window(layer: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Of how many places each output of an average pooling is the mean: padding is none."""
    first = layer.data_format == "channels_first"
    places, channels = (shape[1:], shape[0]) if first else (shape[:-1], shape[-1])
    if isinstance(layer, _GLOBAL_POOLS):
        full = layer.compute_output_shape((1, *shape))[1:]
        return np.full(full, math.prod(places), "int64")
    found = np.ones((), "int64")
    for size, pool, stride in zip(places, layer.pool_size, layer.strides, strict=True):
        found = np.multiply.outer(found, _taken(size, pool, stride, 1, layer.padding).sum(axis=1))
    every = np.repeat(found[..., np.newaxis], channels, axis=-1)
    return np.moveaxis(every, -1, 0) if first else every


def _check_keeps_time(layer: Any, output: tuple[int | None, ...]) -> None:
    """Raises, if a layer that receives one tensor of all time steps makes something of several."""
    if isinstance(layer, layers.EinsumDense):
        received, kernel, put_out = _letters(layer)
        free = "..." in layer.equation or (received[1] not in kernel and put_out[1:2] == received[1])
        mixes = not free
    else:
        known = (*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_ALL_POOLS, *_UNCOUNTED)
        mixes = isinstance(layer, (*known, *_MOVING))
        rank = len(keras.tree.flatten(layer.input)[0].shape)
        mixes = mixes or len(output) != rank
    if mixes:
        raise ValueError(
            f"The operations of {_title(layer)} cannot be counted: it takes all time steps as one tensor and mixes "
            "them. What takes one step at a time is a Synapse, on streams, or keras.layers.TimeDistributed."
        )


def _count(x: Any, source: _Source, neurons: dict[str, SpikingNeuron], real: Any) -> Any:
    """What each place of a tensor (batch, ...) brings about, over the batch: spikes, or numbers that are not 0."""
    if source.neuron is None:
        return tracing.count_over_batch(x, real)
    if source.window is None:
        return tracing.spikes_over_batch(neurons[source.neuron], x, real)
    neuron = neurons[source.neuron]
    worth = ops.cast(neuron.threshold, "float32") * neuron.scale / source.window.astype("float32")
    return ops.tensordot(real, ops.round(ops.cast(x, "float32") / worth), axes=1)


def _counts(layer: Any) -> bool:
    if isinstance(layer, _UNCOUNTED):
        fan_out(layer, (1, 1, 1))  # raises, saying which can be
    known = (layers.Dense, layers.EinsumDense, *_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_ALL_POOLS)
    return isinstance(layer, known)


def _routes(layer: Any) -> bool:
    return isinstance(layer, _ROUTING) and getattr(layer, "interpolation", "nearest") == "nearest"


def _each_step(part: _Part, x: Any) -> Any:
    if not part.timed or not part.stepwise:
        return part.layer(x)
    folded = part.layer(ops.reshape(x, (-1, *x.shape[2:])))
    return ops.reshape(folded, (-1, x.shape[1], *folded.shape[1:]))


def _title(layer: keras.layers.Layer) -> str:
    return f"{type(layer).__name__} {layer.name!r}"

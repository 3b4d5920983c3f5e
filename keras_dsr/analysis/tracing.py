"""What every neuron layer of a model does, on real data, without touching the model.

- `trace`: a whole data set, summed up in bounded memory: firing rates, and the representation put out against the clamp
- `trace_batches`: batch after batch, everything: currents, potentials, spikes, representations

Both run the model's own layers, called as the model calls them, in inference. Neurons of sub-models are found too; a
layer within a sub-model has the sub-model's name, and "_", before its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import graph
from keras_dsr.coding import Coding
from keras_dsr.layers import ToStream
from keras_dsr.layers.neurons import SpikingNeuron, neurons_of


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """What one neuron layer did on a data set.

    Args:
        threshold: V_th, in the unit of the current.
        alpha: It fires at alpha V_th.
        bound: The largest representation that it can put out: V_th (IF), V_th / dt (LIF).
        samples: Number of samples.
        counts: Spikes of each neuron at each time step, added up over the samples: int64 of shape (time, ...).
        error: Mean over samples and neurons of r(output) - clamp(r(I)), as a part of `bound`.
        absolute_error: Mean of its absolute value, as a part of `bound`.
        largest_error: Its largest absolute value, as a part of `bound`.
    """

    threshold: float
    alpha: float
    bound: float
    samples: int
    counts: np.ndarray
    error: float
    absolute_error: float
    largest_error: float

    @property
    def timesteps(self) -> int:
        """The number N of time steps."""
        return len(self.counts)

    @property
    def neurons(self) -> int:
        """The number of neurons."""
        return int(np.prod(self.counts.shape[1:]))

    @property
    def spikes(self) -> int:
        """Number of spikes, over all samples, steps and neurons."""
        return int(self.counts.sum())

    @property
    def firing_rate(self) -> float:
        """Spikes that a neuron fires in a time step, from 0 to 1: mean over samples, steps and neurons."""
        return self.spikes / (self.samples * self.counts.size)

    @property
    def rate_per_step(self) -> np.ndarray:
        """The firing rate at each time step, float64 of shape (time,)."""
        return self.counts.reshape(self.timesteps, -1).mean(axis=1) / self.samples

    @property
    def neuron_rates(self) -> np.ndarray:
        """The firing rate of each neuron, float64 of the shape of one sample's neurons."""
        return self.counts.mean(axis=0) / self.samples

    @property
    def silent(self) -> float:
        """The part of the neurons that never fired, on no sample."""
        return float((self.counts.sum(axis=0) == 0).mean())


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a model's neuron layers did on a data set.

    Args:
        samples: Number of samples.
        layers: A `LayerTrace` for each neuron layer, by name and in the order in which they run.
    """

    samples: int
    layers: dict[str, LayerTrace]

    @property
    def firing_rates(self) -> dict[str, float]:
        """The firing rate of each neuron layer, by name."""
        return {name: layer.firing_rate for name, layer in self.layers.items()}

    @property
    def firing_rate(self) -> float:
        """Spikes that a neuron fires in a time step, from 0 to 1: mean over samples, steps and all neurons."""
        return self.spikes_per_sample / sum(layer.counts.size for layer in self.layers.values())

    @property
    def spikes_per_sample(self) -> float:
        """Spikes of all layers together that one sample brings about."""
        return sum(layer.spikes for layer in self.layers.values()) / self.samples


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one neuron layer did on a batch, in full.

    Args:
        currents: I[n], float32 of shape (batch, time, ...).
        output: What it put out at each step: 0, or the worth of a spike; float32 of shape (batch, time, ...).
        representation: r(output), float32 of shape (batch, ...).
        received: r(I), float32 of shape (batch, ...).
        threshold: V_th.
        alpha: It fires at alpha V_th.
        coding: What a train of its spikes stands for.
        scale: A spike is worth V_th times this.
    """

    currents: np.ndarray
    output: np.ndarray
    representation: np.ndarray
    received: np.ndarray
    threshold: float
    alpha: float
    coding: Coding
    scale: float

    @property
    def spikes(self) -> np.ndarray:
        """s[n]: booleans of shape (batch, time, ...)."""
        return self.output != 0

    @property
    def potentials(self) -> np.ndarray:
        """V[n], the membrane potentials after the reset (Eq. 20): float32 of shape (batch, time, ...).

        Computed from currents and spikes, in the order and precision in which the neuron computed them.
        """
        one, decay = np.float32(1), np.float32(self.coding.decay)
        gain = one if decay == 1 else one - decay
        potential = np.zeros_like(self.currents[:, 0])
        potentials = np.empty_like(self.currents)
        spikes = self.spikes
        for step in range(self.currents.shape[1]):
            drive = self.currents[:, step] * gain
            potential = potential * decay + drive - np.float32(self.threshold) * spikes[:, step]
            potentials[:, step] = potential
        return potentials

    @property
    def clamp(self) -> np.ndarray:
        """clamp(r(I)), what the representation stands beside (Eqs. 14 and 15): float32 of shape (batch, ...)."""
        return np.asarray(self.coding.clamp(self.received, np.float32(self.threshold)))

    @property
    def bound(self) -> float:
        """The largest representation that the layer can put out."""
        return float(self.coding.bound(self.threshold))


class Probe(keras.Model):
    """A model with other outputs: what `collect` makes of what each layer receives and puts out.

    Args:
        model: The model that is looked into.
        collect: For each call of a layer, from its name, the layer, what it received, what it put out, and a float32
            tensor (batch,) of 1, or 0 for a sample that fills up the batch, to tensors by name.

    Raises:
        ValueError: if the model has several inputs.
    """

    def __init__(self, model: keras.Model, collect: Callable[..., dict[str, Any]]) -> None:
        if len(model.inputs) != 1:
            raise ValueError(
                f"A model with one input can be looked into. Received {model.name!r} with {len(model.inputs)} inputs."
            )
        # What goes in is the model's own matter: a policy that is in force here would round it.
        super().__init__(name="probe", dtype="float32", autocast=False)
        self.model = model
        self.collect = collect

    def build(self, input_shape: Any = None) -> None:
        """There is nothing to build."""
        self.built = True

    def call(self, inputs: Any) -> dict[str, Any]:
        x, real = inputs
        found: dict[str, Any] = {}

        def watch(name: str, layer: Any) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                output = layer(*args, **kwargs)
                kept = self.collect(name, layer, args[0] if args else None, output, real)
                found.update({f"{name}/{part}": value for part, value in kept.items()})
                return output

            return call

        graph.walk(self.model, graph.standardized(self.model, x), watch)
        return found


class Tracer:
    """Traces of one model, time and again: it is compiled once, where `trace` compiles it with each call.

    Args:
        model: A functional or Sequential model with spiking layers and one input. Its weights may change in between.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or a layer runs more than once in it.
    """

    def __init__(self, model: keras.Model) -> None:
        self._neurons = neurons_by_name(model)
        self._probe = Probe(model, _sums)

    def __call__(self, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> Trace:
        """As `trace`."""
        totals: dict[str, Any] = {}
        samples = 0
        for count, parts in run(self._probe, x, batch_size):
            samples += count
            for name, value in parts.items():
                if name.endswith("/largest"):
                    totals[name] = max(totals.get(name, 0.0), float(value[:count].max()))
                elif name.endswith("/counts"):
                    before = totals.get(name, 0)
                    if samples != count and before.shape != value.shape:
                        raise ValueError(
                            "All batches of a trace have as many time steps and neurons. Received a batch in which "
                            f"{name.removesuffix('/counts')!r} has {value.shape} after some in which it has "
                            f"{before.shape}."
                        )
                    totals[name] = before + value.astype("int64")
                else:
                    totals[name] = totals.get(name, 0.0) + float(value[:count].sum(dtype="float64"))
        layers = {}
        for name, neuron in self._neurons.items():
            threshold = float(np.asarray(neuron.threshold))
            bound = float(neuron.coding.bound(threshold))
            layers[name] = LayerTrace(
                threshold=threshold,
                alpha=neuron.alpha,
                bound=bound,
                samples=samples,
                counts=totals[f"{name}/counts"],
                error=totals[f"{name}/error"] / samples / bound,
                absolute_error=totals[f"{name}/absolute"] / samples / bound,
                largest_error=totals[f"{name}/largest"] / bound,
            )
        return Trace(samples, layers)


def trace(model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128) -> Trace:
    """Runs a model over a data set and sums up what its neuron layers do.

    Spikes are counted where the model runs, and memory holds one batch of them at a time, however large the data set.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Returns:
        The sums.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, a layer runs more than once in it, its batches
            have different numbers of time steps, or `x` is empty.

    Example:

    >>> import numpy as np
    >>> from keras_dsr import layers
    >>> inputs = keras.Input((3,))
    >>> model = keras.Model(inputs, layers.SpikeRep()(layers.IFSpike(threshold=1.0, timesteps=4, name="n")(inputs)))
    >>> layer = trace(model, np.full((5, 3), 0.5, "float32")).layers["n"]
    >>> layer.firing_rate, layer.rate_per_step.tolist()
    (0.5, [1.0, 0.0, 1.0, 0.0])

    Reference: Meng et al., CVPR 2022, Eqs. 14, 15 and 20.
    """
    return Tracer(model)(x, batch_size)


class Recorder:
    """Recordings of one model, time and again: it is compiled once, where `trace_batches` compiles it with each call.

    Args:
        model: A functional or Sequential model with spiking layers and one input. Its weights may change in between.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, or a layer runs more than once in it.
    """

    def __init__(self, model: keras.Model) -> None:
        self._neurons = neurons_by_name(model)
        self._probe = Probe(model, _everything)

    def __call__(self, x: np.ndarray | Iterable[Any], batch_size: int = 32) -> Iterator[dict[str, Recording]]:
        """As `trace_batches`."""
        for count, parts in run(self._probe, x, batch_size):
            recordings = {}
            for name, neuron in self._neurons.items():
                kept = {part: parts[f"{name}/{part}"][:count] for part in ("output", "representation", "received")}
                current = parts[f"{name}/currents"][:count]
                if current.ndim < kept["output"].ndim:  # the same at each step
                    current = np.repeat(current[:, np.newaxis], kept["output"].shape[1], axis=1)
                recordings[name] = Recording(
                    currents=current,
                    threshold=float(np.asarray(neuron.threshold)),
                    alpha=neuron.alpha,
                    coding=neuron.coding,
                    scale=neuron.scale,
                    **kept,
                )
            yield recordings


def trace_batches(
    model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 32
) -> Iterator[dict[str, Recording]]:
    """Everything that a model's neuron layers do, batch after batch.

    A batch takes memory for the currents and spikes of all layers at all steps, about 2 x 4 bytes a neuron, step and
    sample; what came before it is not kept.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Yields:
        A `Recording` for each neuron layer, by name and in the order in which they run.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, a layer runs more than once in it, or `x` is
            empty.
    """
    yield from Recorder(model)(x, batch_size)


def neurons_by_name(model: keras.Model) -> dict[str, SpikingNeuron]:
    """A model's neuron layers, by the names that they have here and in the order in which they run.

    Raises:
        ValueError: if the model has none, none that can be reached, or no time steps, or a layer runs more than once.
    """
    found: dict[str, SpikingNeuron] = {}
    graph.functional(model)  # raises, if it is none
    for name, layer in reached_neurons(model):
        if name in found:
            raise ValueError(
                f"The neuron layer {name!r} of model {model.name!r} runs more than once, so what it does has no one "
                "name. Use a layer of its own for each place, with its own name."
            )
        found[name] = layer
    inside = neurons_of(model)
    if len(inside) > len(found):
        raise ValueError(
            f"{len(inside) - len(found)} spiking layers of model {model.name!r} are inside of layers that are no "
            "models, where nothing reaches their spikes from outside. Make those layers functional keras.Models."
        )
    if not found:
        raise ValueError(f"Model {model.name!r} has no spiking layers (IFSpike, LIFSpike) to look at.")
    makers = [*inside, *(layer for layer in model._flatten_layers() if isinstance(layer, ToStream))]
    if any(layer.timesteps == 0 for layer in makers):
        raise ValueError(
            f"Model {model.name!r} is a representation network (timesteps=0): it has no spikes. Give it time steps "
            "with keras_dsr.models.with_timesteps(model, N)."
        )
    return found


def reached_neurons(model: keras.Model) -> list[tuple[str, SpikingNeuron]]:
    """Neuron layers that a model's graph runs, with the names that they have here, time steps or not; none without one.

    Args:
        model: Any model.
    """
    try:
        graph.functional(model)
    except ValueError:
        return []
    return [(name, layer) for name, layer, _ in graph.calls(model) if isinstance(layer, SpikingNeuron)]


def run(probe: Probe, x: np.ndarray | Iterable[Any], batch_size: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """What a probe collects, batch by batch.

    Args:
        probe: The probe. It compiles once, however often it is run.
        x: The model's input, or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.

    Yields:
        The number of samples, and what was collected, named "layer/part"; tensors (batch, ...) are filled up.

    Raises:
        ValueError: if there are no samples.
    """
    for count, batch in full_batches(x, batch_size):
        real = (np.arange(len(batch)) < count).astype("float32")
        results = probe.predict_on_batch((batch, real))
        yield count, {name: np.asarray(value) for name, value in results.items()}


def full_batches(x: np.ndarray | Iterable[Any], batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Batches as `batches` gives them, a short one filled up to the size of the first: a model compiles for one shape.

    Args:
        x: An array (samples, ...); or batches, or (batch, labels).
        batch_size: Samples of a batch, of an array.

    Yields:
        The number of samples, and these, filled up with the last one.

    Raises:
        ValueError: if there are no samples, or `batch_size` is below 1.
    """
    size = None
    for batch in batches(x, batch_size):
        if not len(batch):
            continue
        size = size or len(batch)
        missing = max(size - len(batch), 0)
        yield len(batch), np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
    if size is None:
        raise ValueError("There is nothing to run the model on: received no samples.")


def batches(x: np.ndarray | Iterable[Any], batch_size: int) -> Iterator[np.ndarray]:
    """Batches of an array, or of what already comes in batches.

    Args:
        x: An array (samples, ...); or batches, or (batch, labels).
        batch_size: Samples of a batch, of an array.

    Raises:
        ValueError: if `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is a number of samples of at least 1. Received batch_size={batch_size!r}.")
    if hasattr(x, "shape"):
        yield from (np.asarray(x[start : start + batch_size]) for start in range(0, len(x), batch_size))
    else:
        yield from (np.asarray(each[0] if isinstance(each, (list, tuple)) else each) for each in x)


def halves(neuron: SpikingNeuron, received: Any, output: Any) -> tuple[Any, Any, Any, Any]:
    """Of a call of a neuron layer: currents and their representation, outputs and theirs.

    Currents are (batch, ...), without time, where they are the same at each step. Their representation is taken of
    themselves and not from the stream: inference leaves that half of a stream out, a network of its own.
    """
    current = received[0] if isinstance(received, (list, tuple)) else received
    static = current is received and neuron.timesteps is not None
    coded = ops.cast(current, "float32")
    coded = coded if static else neuron.coding.represent(coded)
    if hasattr(output, "shape"):
        return current, coded, output, neuron.coding.represent(ops.cast(output, "float32"))
    values, representation = output
    return current, coded, values, representation


def count_over_batch(values: Any, real: Any) -> Any:
    """How many samples are not 0, place by place: float32 of the shape of one sample, exact up to 2^24 samples.

    Args:
        values: Tensor of shape (batch, ...).
        real: 1, or 0 for samples that do not count; float32 of shape (batch,).
    """
    return ops.tensordot(real, ops.cast(values != 0, "float32"), axes=1)


def spikes_over_batch(neuron: SpikingNeuron, values: Any, real: Any) -> Any:
    """How many samples have a spike, place by place: float32 of the shape of one sample.

    Outputs are added up and divided by what a spike is worth, which reads them once: a third of what it takes to ask of
    each whether it is 0. In half precision, where a spike's worth is rounded, each is asked.

    Args:
        neuron: The layer that put them out.
        values: Tensor of shape (batch, ...).
        real: 1, or 0 for samples that do not count; float32 of shape (batch,).
    """
    if keras.backend.standardize_dtype(values.dtype) != "float32":
        return count_over_batch(values, real)
    return ops.round(ops.tensordot(real, values, axes=1) / (ops.cast(neuron.threshold, "float32") * neuron.scale))


def _sums(name: str, layer: Any, received: Any, output: Any, real: Any) -> dict[str, Any]:
    if not isinstance(layer, SpikingNeuron):
        return {}
    _, coded, values, representation = halves(layer, received, output)
    threshold = ops.cast(layer.threshold, "float32")
    # The clamp's value, in fewer operations than with its gradient.
    slope = getattr(layer.coding, "tau", 1.0)
    coded = ops.cast(coded, "float32")
    clamped = ops.clip(coded if slope == 1 else coded / slope, 0.0, layer.coding.bound(threshold))
    error = ops.cast(representation, "float32") - clamped
    axes = tuple(range(1, len(error.shape)))
    return {
        "counts": spikes_over_batch(layer, values, real),
        "error": ops.mean(error, axis=axes),
        "absolute": ops.mean(ops.abs(error), axis=axes),
        "largest": ops.max(ops.abs(error), axis=axes),
    }


def _everything(name: str, layer: Any, received: Any, output: Any, real: Any) -> dict[str, Any]:
    if not isinstance(layer, SpikingNeuron):
        return {}
    parts = zip(("currents", "received", "output", "representation"), halves(layer, received, output), strict=True)
    return {part: ops.cast(value, "float32") for part, value in parts}

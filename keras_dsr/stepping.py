"""A model, one time step at a time.

A model called on its whole input runs through all time steps at once. `Stepper` runs the same layers, with the same
weights, for a single step: membrane potentials go in and come out, and beside them what the readout needs to say what
the spikes so far stand for. N calls give what one call of the whole gives. It is how event streams are served as they
arrive, and how one sees a network's answer after each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import ops

from keras_dsr import backend, graph
from keras_dsr.layers import SpikeRep, ToStream, ToTensor
from keras_dsr.layers.base import StreamLayer
from keras_dsr.layers.neurons import SpikingNeuron, neurons_of

State = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one time step gives.

    Args:
        output: The model's output for all steps so far, of shape (batch, ...).
        spikes: For each neuron layer, by name and in order, what it put out in this step: 0, or the worth of a spike;
            of shape (batch, ...).
        state: What the next step starts from.
    """

    output: Any
    spikes: dict[str, Any]
    state: dict[str, Any]


class Stepper:
    """Runs a model step by step.

    Args:
        model: A functional or Sequential model with one input and one output, made of this package's layers and, on
            static tensors and on single time steps, any Keras layers. A layer that mixes time steps gives something
            else than in the whole model.

    Attributes:
        takes_frames: Whether it runs on one frame after another, or on a static input.
        timesteps: Number of time steps of the whole model; `None` for any.

    Raises:
        ValueError: if the model has no spiking layers, or no time steps; or a size other than batch and time is not
            fixed; or a layer of another's takes streams; or one that has a state is used twice.

    Example:

    >>> import keras, numpy as np
    >>> from keras_dsr import models
    >>> model = models.small_cnn(widths=(4,), timesteps=3)
    >>> image = np.ones((2, 8, 8, 1), "float32")
    >>> stepper = Stepper(model)
    >>> state = stepper.initial_state(2)
    >>> for _ in range(3):
    ...     result = stepper(image, state)
    ...     state = result.state
    >>> bool(np.allclose(result.output, model(image), atol=1e-6))
    True
    """

    def __init__(self, model: keras.Model) -> None:
        graph.functional(model)  # raises, if it is none
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ValueError(
                "A model runs step by step if it has one input and one output. Received model "
                f"{model.name!r} with {len(model.inputs)} inputs and {len(model.outputs)} outputs."
            )
        self.model = model
        self.takes_frames = takes_frames(model)
        self.timesteps = _timesteps(model)
        shape = tuple(model.inputs[0].shape)[2 if self.takes_frames else 1 :]
        if None in shape:
            raise ValueError(
                f"A state has fixed sizes, so the input must have too. Model {model.name!r} takes "
                f"{tuple(model.inputs[0].shape)}; build it with every size given but those of batch and time."
            )
        self.input_shape: tuple[int, ...] = shape
        self._coded: frozenset[str] | None = None
        # One step of nothing, for what it takes along.
        first = _Moment(None, None)

        def found(inputs: Any) -> list[Any]:
            self._run(inputs, first)
            return list(first.found().values())

        like = backend.specs(found, (1, *shape), keras.backend.standardize_dtype(model.inputs[0].dtype))
        self._coded = frozenset(first.coded)
        self._like = {name: (size[1:], dtype) for name, (size, dtype) in zip(first.found(), like, strict=True)}

    @property
    def state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """For each part of the state, by name and in order, the shape of one sample's and its dtype."""
        return dict(self._like)

    def initial_state(self, batch_size: Any) -> dict[str, Any]:
        """The state ahead of the first step: zeros.

        Args:
            batch_size: Number of samples, as a number or a scalar tensor.
        """
        return {name: ops.zeros((batch_size, *shape), dtype) for name, (shape, dtype) in self._like.items()}

    def __call__(self, inputs: Any, state: State) -> StepResult:
        """Runs one time step.

        Args:
            inputs: The static input, the same at each step, or one frame; of shape (batch, ...).
            state: What the step before gave, or `initial_state`; samples need not have gone the same number of steps.

        Raises:
            ValueError: if parts of the state are missing or not known.
        """
        if set(state) != set(self._like):
            raise ValueError(
                f"The state of model {self.model.name!r} has the parts {sorted(self._like)}. Received {sorted(state)}; "
                "start from initial_state(batch_size)."
            )
        moment = _Moment(state, self._coded)
        output = self._run(inputs, moment)
        return StepResult(output, moment.spikes, {name: moment.after[name] for name in self._like})

    def _run(self, inputs: Any, moment: _Moment) -> Any:
        inputs = ops.convert_to_tensor(inputs)
        output = graph.walk(self.model, ops.expand_dims(inputs, 1) if self.takes_frames else inputs, moment.replace)
        return output if not isinstance(output, (list, tuple)) else output[0]


def takes_frames(model: keras.Model) -> bool:
    """Whether a model's input has a time axis; if not, a neuron makes time steps of what is static.

    Args:
        model: A functional or Sequential model.
    """
    return not any(
        isinstance(layer, SpikingNeuron) and layer.timesteps is not None and not _is_pair(inputs)
        for _, layer, inputs in graph.calls(model)
    )


def _timesteps(model: keras.Model) -> int | None:
    """A model's number of time steps, where it is known."""
    neurons = neurons_of(model)
    if not neurons:
        raise ValueError(f"Model {model.name!r} has no spiking layers (IFSpike, LIFSpike): it has no time steps.")
    sources = [layer for layer in model._flatten_layers() if isinstance(layer, ToStream)]
    steps = {layer.timesteps for layer in (*neurons, *sources)} - {None}
    if 0 in steps:
        raise ValueError(
            f"Model {model.name!r} is a representation network (timesteps=0): it has no time steps. Give it some with "
            "keras_dsr.models.with_timesteps(model, N)."
        )
    if len(steps) > 1:
        raise ValueError(f"The layers of model {model.name!r} have different numbers of time steps: {sorted(steps)}.")
    return next(iter(steps), model.inputs[0].shape[1])


class _Moment:
    """One time step on its way through the model.

    Between layers go plain tensors, with a time axis of one step where the model has one; or streams, as pairs of such
    a tensor and a function that says what all steps so far stand for, which only the readout wants to know.

    Args:
        before: The state; `None` ahead of the first step.
        coded: Names of the layers whose representation the readout asks for; `None` while that is not known.
    """

    def __init__(self, before: State | None, coded: frozenset[str] | None) -> None:
        self.before = before
        self.after: dict[str, Any] = {}
        self.spikes: dict[str, Any] = {}
        self.known = coded
        self.coded: set[str] = set()

    def found(self) -> dict[str, Any]:
        """The parts of the state that are needed, after a first step."""
        return {
            name: x
            for name, x in self.after.items()
            if name.startswith("potential_") or name.split("_", 1)[1] in self.coded
        }

    def replace(self, name: str, layer: Any) -> Callable[..., Any]:
        """What is called in the place of a layer."""
        if isinstance(layer, SpikingNeuron):
            return lambda inputs, **_: self._neuron(name, layer, inputs)
        if isinstance(layer, ToStream):
            return lambda inputs, **_: self._source(name, layer, inputs)
        if isinstance(layer, SpikeRep):
            return lambda inputs, **_: self._readout(name, layer, inputs)
        if isinstance(layer, ToTensor):
            return lambda inputs, **_: _current(inputs)
        if isinstance(layer, StreamLayer) and layer.infer_values is not None:
            return lambda inputs, **_: _apply(layer, inputs)
        return lambda *args, **kwargs: _stock(name, layer, args, kwargs)

    def _previous(self, name: str, shape: tuple[int, ...], like: Any, dtype: str) -> Any:
        if self.before is not None and name in self.before:
            return self.before[name]
        return ops.zeros((ops.shape(like)[0], *shape), dtype)

    def _neuron(self, name: str, neuron: SpikingNeuron, inputs: Any) -> Any:
        plain = not _is_pair(inputs)
        static = plain and neuron.timesteps is not None
        current = inputs if static else _current(inputs)[:, 0]
        current = ops.cast(current, neuron.compute_dtype)
        wide = backend.wide(current.dtype)
        features = tuple(current.shape[1:])
        output, representation, potential, count, weight = backend.step(
            current,
            self._previous(f"potential_{name}", features, current, wide),
            self._previous(f"count_{name}", features, current, wide),
            self._previous(f"weight_{name}", (1,) * len(features), current, wide),
            ops.convert_to_tensor(neuron.threshold),
            alpha=neuron.alpha,
            decay=neuron.coding.decay,
            scale=neuron.scale,
        )
        self._keep(f"potential_{name}", potential)
        self._code(name, count, weight)
        self.spikes[name] = output
        output = ops.expand_dims(output, 1)
        return output if plain and not static else [output, self._asked(name, representation)]

    def _source(self, name: str, layer: ToStream, inputs: Any) -> Any:
        frame = ops.cast(inputs, layer.compute_dtype)
        return [frame, self._asked(name, self._mean(name, layer.coding.decay, frame[:, 0]))]

    def _readout(self, name: str, layer: SpikeRep, inputs: Any) -> Any:
        if _is_pair(inputs):
            return inputs[1]()
        self.coded.add(name)
        return self._mean(name, layer.coding.decay, ops.cast(inputs, layer.compute_dtype)[:, 0])

    def _mean(self, name: str, decay: float, x: Any) -> Any:
        """r of all steps so far, for tensors that are no spikes."""
        features = tuple(x.shape[1:])
        # In half precision a sum would soon be too large for what is added to it.
        wide = backend.wide(x.dtype)
        total = self._previous(f"count_{name}", features, x, wide) * decay + ops.cast(x, wide)
        weight = self._previous(f"weight_{name}", (1,) * len(features), x, wide) * decay + 1
        self._code(name, total, weight)
        return ops.cast(total / weight, x.dtype)

    def _code(self, name: str, count: Any, weight: Any) -> None:
        if self.known is None or name in self.known:
            self._keep(f"count_{name}", count)
            self._keep(f"weight_{name}", weight)

    def _keep(self, part: str, value: Any) -> None:
        if part in self.after:
            raise ValueError(
                f"A layer has one state, so it can run once in a time step. The state {part!r} comes twice: the layer "
                "or its sub-model is used twice, or two layers have this name. Use a layer of its own for each place, "
                "with its own name."
            )
        self.after[part] = value

    def _asked(self, name: str, representation: Any) -> Callable[[], Any]:
        def ask() -> Any:
            self.coded.add(name)
            return representation

        return ask


def _is_pair(inputs: Any) -> bool:
    return isinstance(inputs, (list, tuple))


def _current(inputs: Any) -> Any:
    """The tensor with a time axis of one step."""
    return inputs[0] if _is_pair(inputs) else inputs


def _apply(layer: StreamLayer, inputs: Any) -> Any:
    pairs = [inputs] if callable(inputs[1]) else inputs  # one stream, or a list of them
    values = layer.infer_values(*(pair[0] for pair in pairs))
    return [values, lambda: layer.infer_representation(*(pair[1]() for pair in pairs))]


def _stock(name: str, layer: Any, args: Any, kwargs: Any) -> Any:
    if any(callable(x) for x in keras.tree.flatten((args, kwargs)) if not hasattr(x, "dtype")):
        raise ValueError(
            f"{type(layer).__name__} {name!r} takes streams and is not a layer of keras_dsr, so it cannot run step by "
            "step. Make it of keras_dsr.layers in a functional keras.Model."
        )
    return layer(*args, **kwargs)

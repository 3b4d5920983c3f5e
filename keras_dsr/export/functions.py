"""What is exported of a model: functions of named tensors, the same for every format.

- `serving_default`: the input to the answer, through all time steps;
- `trace`: the same, with the spikes of each neuron layer counted;
- `step`: one time step and a state to the answer so far and the state after it;
- `initial_state`: the state ahead of the first step.

An answer of a classifier is `logits`, `probabilities` and `class`. The state's parts are inputs of `step` by their
names, and outputs by the names with `next_` before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dsr import graph
from keras_dsr.layers import ToStream
from keras_dsr.layers.neurons import SpikingNeuron, neurons_of
from keras_dsr.stepping import Stepper, takes_frames

SIGNATURES = ("serving_default", "step", "initial_state", "trace")
FORMS = ("unrolled", "loop", "step")
"""Forms of ONNX files: see `keras_dsr.export.onnx`."""

# What Keras calls an input that was given no name, before and after the model was saved.
_UNNAMED = re.compile(r"(keras_tensor|input_layer)(_\d+)?")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Makes of what a client has what the model was trained on: (x - mean) / std, channel by channel.

    Args:
        mean: To subtract, for each channel (the last axis), or one number for all; a sequence or an array.
        std: To divide by; above 0.
        dtype: What clients send: "uint8" for images of bytes, or another type of whole numbers or floats.

    Raises:
        ValueError: if the numbers do not fit each other, are not finite, or one of `std` is not above 0; or there is
            no such type.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            # Whatever kind of array they come in: cards and metadata are JSON.
            numbers = np.ravel(np.asarray(getattr(self, name), "float64"))
            object.__setattr__(self, name, tuple(numbers.tolist()))
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"There is one mean and one std a channel. Received mean={self.mean}, std={self.std}.")
        if not all(math.isfinite(x) for x in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError(f"mean and std are finite, and std is above 0. Received mean={self.mean}, std={self.std}.")
        try:
            dtype = tf.dtypes.as_dtype(self.dtype)
        except TypeError:
            dtype = None
        if dtype is None or not (dtype.is_integer or dtype.is_floating):
            raise ValueError(
                "dtype is the name of a type of whole numbers or floats, such as 'uint8' or 'float32'. Received "
                f"dtype={self.dtype!r}."
            )
        object.__setattr__(self, "dtype", dtype.name)

    def __call__(self, x: Any) -> tf.Tensor:
        """The normalised input, float32."""
        x = tf.cast(x, tf.float32)
        return (x - tf.constant(self.mean, tf.float32)) / tf.constant(self.std, tf.float32)


class Network:
    """A model as it is exported.

    Args:
        model: A functional or Sequential model with one input and one output, on TensorFlow.
        preprocessing: What makes the model's input of what clients send; `None` if they send the model's input.
        classifier: Whether the output is logits (batch, classes); if not, it is given as it is, as `output`.

    Raises:
        ValueError: if the model cannot be exported; the error says why.
        RuntimeError: if Keras does not run on TensorFlow.
    """

    def __init__(self, model: keras.Model, preprocessing: Preprocessing | None = None, classifier: bool = True) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"Export needs Keras on TensorFlow. It runs on {keras.backend.backend()!r}: save the model as .keras, "
                "and load it for export where KERAS_BACKEND=tensorflow."
            )
        graph.functional(model)  # raises, if it is none
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ValueError(
                f"A model with one input and one output can be exported. Received {model.name!r} with "
                f"{len(model.inputs)} inputs and {len(model.outputs)} outputs."
            )
        shape = tuple(model.outputs[0].shape)
        if classifier and (len(shape) != 2 or shape[1] is None):
            raise ValueError(
                f"A classifier's output is logits (batch, classes). Model {model.name!r} puts out {shape}; pass "
                "classifier=False to export it as it is."
            )
        channels = model.inputs[0].shape[-1]
        if preprocessing is not None and len(preprocessing.mean) not in (1, channels):
            raise ValueError(
                f"Preprocessing has numbers for {len(preprocessing.mean)} channels, and model {model.name!r} takes "
                f"{channels}."
            )
        if any(neuron.jit_compile for neuron in neurons_of(model)):
            # A strategy's mark, under which it was trained: what is exported must run without XLA too.
            model = _unmarked(model)
        self.model = model
        self.preprocessing = preprocessing
        self.classifier = classifier
        self._stepper: Stepper | None = None
        _check_names(self.neurons)

    @property
    def stepper(self) -> Stepper:
        """The model, step by step; raises a ValueError if it cannot run so."""
        if self._stepper is None:
            self._stepper = Stepper(self.model)
        return self._stepper

    @property
    def neurons(self) -> list[str]:
        """Names of the neuron layers, in the order in which they run."""
        return [name for name, _ in self._neurons()]

    @property
    def neuron_layers(self) -> dict[str, SpikingNeuron]:
        """The neuron layers, by name and in the order in which they run."""
        return dict(self._neurons())

    def _neurons(self) -> list[tuple[str, SpikingNeuron]]:
        calls = graph.calls(self.model)
        return [(identifier(name), layer) for name, layer, _ in calls if isinstance(layer, SpikingNeuron)]

    def own_timesteps(self) -> int | None:
        """The number N of time steps that the network insists on; `None` if the frames of its input say how many.

        Raises:
            ValueError: if it is a representation network, which has none.
        """
        sources = (layer for layer in self.model._flatten_layers() if isinstance(layer, ToStream))
        makers = (*self.neuron_layers.values(), *sources)
        found = next((layer.timesteps for layer in makers if layer.timesteps is not None), None)
        if found == 0:
            raise ValueError(
                f"Model {self.model.name!r} is a representation network (timesteps=0), which has no spikes. Give it "
                "time steps with keras_dsr.models.with_timesteps(model, N)."
            )
        return found

    @functools.cached_property
    def takes_frames(self) -> bool:
        """Whether the input has a time axis, of frames; if not, it is static."""
        return takes_frames(self.model)

    @property
    def input_name(self) -> str:
        """What the input is called; without a name of its own `frames` or, if it is static, `image` or `input`."""
        tensor = self.model.inputs[0]
        if not _UNNAMED.fullmatch(tensor.name):
            return identifier(tensor.name)
        if self.takes_frames:
            return "frames"
        return "image" if len(tensor.shape) == 4 else "input"

    @property
    def input_dtype(self) -> str:
        """What clients send."""
        if self.preprocessing is not None:
            return self.preprocessing.dtype
        return keras.backend.standardize_dtype(self.model.inputs[0].dtype)

    @property
    def step_input_name(self) -> str:
        """What the input of one time step is called."""
        return "frame" if self.takes_frames else self.input_name

    @property
    def state(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one sample's, and dtype, of each part of the state, by name and in order."""
        return {identifier(name): spec for name, spec in self.stepper.state.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the answer's parts."""
        return ("logits", "probabilities", "class") if self.classifier else ("output",)

    def input_spec(self, batch: int | None = None, timesteps: int | None = None) -> tf.TensorSpec:
        """The input of a whole run.

        Args:
            batch: Fixed batch size, if any.
            timesteps: Fixed number of frames, where the model takes any.
        """
        shape = list(self.model.inputs[0].shape)
        shape[0] = batch
        if timesteps is not None and shape[1] is None:
            shape[1] = timesteps
        return tf.TensorSpec(shape, self.input_dtype, name=self.input_name)

    def step_specs(self, batch: int | None = None) -> dict[str, tf.TensorSpec]:
        """The inputs of one time step, by name."""
        inputs = tf.TensorSpec([batch, *self.stepper.input_shape], self.input_dtype, name=self.step_input_name)
        parts = {name: tf.TensorSpec([batch, *shape], dtype, name=name) for name, (shape, dtype) in self.state.items()}
        return {self.step_input_name: inputs, **parts}

    def run(self, x: Any) -> dict[str, tf.Tensor]:
        """`serving_default`: the answer, by name."""
        return self._answer(self.model(self._prepared(x), training=False))

    def run_traced(self, x: Any) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """The answer, and the spikes of each neuron layer (batch, time, ...), scale included, by name."""
        spikes = {}

        def watch(name: str, layer: Any) -> Callable[..., Any]:
            if not isinstance(layer, SpikingNeuron):
                return layer

            def call(*args: Any, **kwargs: Any) -> Any:
                output = layer(*args, **kwargs)
                spikes[identifier(name)] = output if tf.is_tensor(output) else next(iter(output))
                return output

            return call

        # The model's own layers, called as the model calls them: the answer is that of `run`.
        output = graph.walk(self.model, self._prepared(x), watch)
        return self._answer(output), spikes

    def trace(self, x: Any) -> dict[str, tf.Tensor]:
        """`trace`: logits; for each neuron layer its spikes, int32 (batch, time), and rate, float32 (batch,)."""
        answer, spikes = self.run_traced(x)
        traced = {self.outputs[0]: answer[self.outputs[0]]}
        for name, values in spikes.items():
            fired = tf.cast(values != 0, tf.int32)
            counts = tf.reduce_sum(tf.reshape(fired, [tf.shape(fired)[0], tf.shape(fired)[1], -1]), axis=2)
            neurons = tf.reduce_prod(tf.shape(fired)[2:])
            traced[f"{name}_spikes"] = counts
            traced[f"{name}_rate"] = tf.reduce_mean(tf.cast(counts, tf.float32), axis=1) / tf.cast(neurons, tf.float32)
        return traced

    def step(self, tensors: dict[str, Any]) -> dict[str, tf.Tensor]:
        """`step`: from one time step's input and the state, by name, to the answer and the next state."""
        return self.step_traced(tensors)[0]

    def step_traced(self, tensors: dict[str, Any]) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """What `step` gives, and the spikes of each neuron layer in this step (batch, ...), scale included, by name."""
        parts = {name: tensors[identifier(name)] for name in self.stepper.state}
        result = self.stepper(self._prepared(tensors[self.step_input_name]), parts)
        after = {f"next_{identifier(name)}": value for name, value in result.state.items()}
        spikes = {identifier(name): value for name, value in result.spikes.items()}
        return {**self._answer(result.output), **after}, spikes

    def initial_state(self, stream: Any) -> dict[str, tf.Tensor]:
        """`initial_state`: zeros for as many streams as there are numbers in `stream`, whatever they are."""
        state = self.stepper.initial_state(tf.shape(stream)[0])
        return {identifier(name): value for name, value in state.items()}

    def signatures(self, names: Sequence[str] = SIGNATURES) -> dict[str, Any]:
        """Concrete TensorFlow functions with named inputs and outputs.

        Args:
            names: Those of `SIGNATURES` that are wanted.

        Raises:
            ValueError: if a name is not known, or the model cannot run step by step and that is asked for.
        """
        whole = {self.input_name: self.input_spec()}
        made = {}
        for name in names:
            if name == "serving_default":
                made[name] = named(lambda tensors: self.run(tensors[self.input_name]), whole)
            elif name == "trace":
                made[name] = named(lambda tensors: self.trace(tensors[self.input_name]), whole)
            elif name == "step":
                made[name] = named(self.step, self.step_specs())
            elif name == "initial_state":
                spec = {"stream": tf.TensorSpec([None], tf.int64, name="stream")}
                made[name] = named(lambda tensors: self.initial_state(tensors["stream"]), spec)
            else:
                raise ValueError(f"A signature is one of {SIGNATURES}. Received {name!r}.")
        return made

    def _prepared(self, x: Any) -> Any:
        return x if self.preprocessing is None else self.preprocessing(x)

    def _answer(self, output: Any) -> dict[str, tf.Tensor]:
        output = output[0] if isinstance(output, (list, tuple)) else output
        output = tf.cast(output, tf.float32)
        if not self.classifier:
            return {"output": output}
        return {"logits": output, "probabilities": tf.nn.softmax(output), "class": tf.argmax(output, axis=-1)}


def _unmarked(model: keras.Model) -> keras.Model:
    """A copy of a model, as its config says: whether XLA compiles spikes alone is no part of that."""
    copy = keras.models.clone_model(
        model, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
    )
    copy.set_weights(model.get_weights())
    return copy


def named(function: Callable[[dict[str, Any]], dict[str, Any]], specs: dict[str, tf.TensorSpec]) -> Any:
    """A concrete function whose inputs are called as in `specs`, and its outputs as `function` calls them."""

    def run(**tensors: Any) -> dict[str, Any]:
        return function(tensors)

    return tf.function(run, autograph=False).get_concrete_function(**specs)


def identifier(name: str) -> str:
    """A layer's name as servers and runtimes take it."""
    return re.sub(r"\W", "_", name)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("The model has no spiking layers (IFSpike, LIFSpike).")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Neuron layers must have different names, in letters, digits and '_'. Twice there: {twice}.")

"""Answers before the last time step: accuracy after each step, and a rule that says when to stop.

A spiking network has an answer after every time step: what the spikes so far stand for. One run of N steps gives the
answers of N networks with 1 to N steps (Figure 3a), and a sample whose answer is certain early need not run on.

- `outputs_by_step`, `accuracy_by_step`: the answers after each step, from one model
- `EarlyExit`: the rule; `trade_off` shows what it costs in accuracy and saves in steps, and `choose` takes one
- `predict`: a model's answers, each sample stopped where the rule says; `predict_served` the same of anything that runs
  a single step, such as the signature `step` of an export
- `StepRunner`: `outputs_by_step` and `predict` of one model time and again, compiled once

Reference: Meng et al., CVPR 2022, Figure 3a (one network for each number of steps there, one for all here).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_dsr import graph
from keras_dsr.analysis import tracing
from keras_dsr.coding import RateCoding
from keras_dsr.layers import SpikeRep, ToStream
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.stepping import Stepper

# Of an export's `step`: what is an answer, and what the next step starts from.
_ANSWERS = ("logits", "output")


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """Stops a sample once its answer is certain.

    A sample stops at the first step at which the softmax of its outputs gives its best class `confidence` or more, and
    has so, for the same class, for `patience` steps in a row; but not before `least_steps`. What has not stopped runs
    to the last step.

    After few steps outputs are coarse: a single spike at the first is worth V_th, as much as N of them at the last.
    With `horizon` N, outputs after n steps count as what they would be at step N if nothing came any more: n / N of
    themselves for rate coding, lambda^(N - n) (1 - lambda^n) / (1 - lambda^N) for weighted rate coding. So confidence
    grows with the spikes that have come.

    Args:
        confidence: In (0, 1]. Choose it by `trade_off` on validation examples: as no output is larger than the last
            neurons' V_th (V_th / dt), some confidences are never reached.
        patience: Number of steps in a row, at least 1.
        least_steps: Number of steps that every sample runs for, at least 1.
        horizon: Number N of time steps of the whole run; `None` to take outputs as they are.
        decay: Of the coding that outputs are in, for `horizon`: 1 for IF neurons, lambda = exp(-dt / tau) for LIF;
            `coding.decay` of the last neurons.

    Raises:
        ValueError: if an argument is out of range.
    """

    confidence: float = 0.9
    patience: int = 1
    least_steps: int = 1
    horizon: int | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay is what a coding keeps in a time step, in (0, 1]. Received decay={self.decay!r}.")
        if not (math.isfinite(self.confidence) and 0 < self.confidence <= 1):
            raise ValueError(f"confidence is a probability in (0, 1]. Received confidence={self.confidence!r}.")
        for name in ("patience", "least_steps", "horizon"):
            value = getattr(self, name)
            if name == "horizon" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a number of steps of at least 1. Received {name}={value!r}.")

    def part(self, number: int) -> float:
        """What part of themselves outputs after `number` steps count; 1 without a horizon, and beyond it."""
        if self.horizon is None or number >= self.horizon:
            return 1.0
        weights = self.decay ** np.arange(self.horizon - 1, -1, -1, dtype="float64")
        return float(weights[:number].sum() / weights.sum())

    def start(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """What the rule remembers of `count` samples ahead of their first step."""
        return np.full(count, -1, "int64"), np.zeros(count, "int64")

    def step(
        self, outputs: np.ndarray, number: int, memory: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which samples stop after a step.

        Args:
            outputs: Logits after the step, of shape (samples, classes).
            number: Number of the step, from 1.
            memory: What the step before gave, or `start`.

        Returns:
            Booleans (samples,), and what the rule remembers.
        """
        best = outputs.argmax(axis=1)
        certain = _confidence(outputs * self.part(number)) >= self.confidence
        before, in_row = memory
        in_row = np.where(certain, np.where(best == before, in_row, 0) + 1, 0)
        return (in_row >= self.patience) & (number >= self.least_steps), (best, in_row)

    def steps(self, outputs: np.ndarray) -> np.ndarray:
        """At which step each sample stops, of outputs after every step.

        Args:
            outputs: Logits of shape (samples, time, classes).

        Returns:
            Numbers from 1 to N, int64 of shape (samples,).
        """
        count, last = outputs.shape[:2]
        stopped = np.full(count, last, "int64")
        running, memory = np.ones(count, bool), self.start(count)
        for number in range(1, last + 1):
            stops, memory = self.step(outputs[:, number - 1], number, memory)
            stopped[running & stops] = number
            running &= ~stops
        return stopped


@dataclasses.dataclass(frozen=True)
class Point:
    """What a rule does on a data set.

    Args:
        rule: The rule.
        accuracy: Part of the samples that are right.
        mean_steps: Time steps that a sample runs for, on average.
    """

    rule: EarlyExit
    accuracy: float
    mean_steps: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of samples that stopped at different steps.

    Args:
        outputs: Logits where each stopped, of shape (samples, classes).
        steps: The steps that each ran for, int64 of shape (samples,).
    """

    outputs: np.ndarray
    steps: np.ndarray


class _Step(keras.Model):
    """One time step of a model, with state in and out, in the form that Keras compiles."""

    def __init__(self, stepper: Stepper) -> None:
        # As a policy in force would round potentials and counts at each step.
        super().__init__(name="step", dtype="float32", autocast=False)
        self.model = stepper.model
        self.stepper = stepper

    def build(self, input_shape: Any = None) -> None:
        """There is nothing to build."""
        self.built = True

    def call(self, inputs: Any) -> Any:
        x = inputs["input"]
        if self.stepper.takes_frames:
            x = graph.standardized(self.model, keras.ops.expand_dims(x, 1))[:, 0]
        else:
            x = graph.standardized(self.model, x)
        result = self.stepper(x, {name: inputs[f"state/{name}"] for name in self.stepper.state})
        return {"output": result.output, **{f"state/{name}": value for name, value in result.state.items()}}


class StepRunner:
    """A model run step by step, time and again: it is compiled once for each batch size.

    Args:
        model: A functional or Sequential model with spiking layers, as `keras_dsr.stepping.Stepper` takes it. Its
            weights may change in between.

    Attributes:
        decay: Of the coding that the model's outputs are in; what `EarlyExit` takes, with a horizon.

    Raises:
        ValueError: if the model cannot run step by step.
    """

    def __init__(self, model: keras.Model) -> None:
        self.stepper = Stepper(model)
        self.decay = _decay(model)
        self._compiled = _Step(self.stepper)

    def outputs(self, x: np.ndarray | Iterable[Any], batch_size: int = 128, timesteps: int | None = None) -> np.ndarray:
        """As `outputs_by_step`."""
        found = []
        for count, batch in tracing.full_batches(x, batch_size):
            state, outputs = self._start(len(batch)), []
            for number in range(self._steps(batch, timesteps)):
                output, state = self._step(batch[:, number] if self.stepper.takes_frames else batch, state)
                outputs.append(output[:count])
            found.append(np.stack(outputs, axis=1))
        return np.concatenate(found).astype("float32")

    def predict(self, x: np.ndarray | Iterable[Any], rule: EarlyExit = EarlyExit(), batch_size: int = 128) -> Answers:
        """As `predict`."""
        if rule.horizon is not None and not math.isclose(rule.decay, self.decay):
            raise ValueError(
                f"With a horizon, decay is that of the coding that outputs are in: {self.decay:g} in model "
                f"{self.stepper.model.name!r}. Received decay={rule.decay:g}."
            )
        frames = self.stepper.takes_frames
        found = [
            _run(self._step, batch, self._start(len(batch)), frames, self._steps(batch, None), rule)
            for batch in tracing.batches(x, batch_size)
            if len(batch)
        ]
        if not found:
            raise ValueError("There is nothing to run the model on: received no samples.")
        return _joined(found)

    def _step(self, x: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        parts = {f"state/{name}": state[name] for name in self.stepper.state}
        results = self._compiled.predict_on_batch({"input": x, **parts})
        return np.asarray(results["output"]), {name: np.asarray(results[f"state/{name}"]) for name in state}

    def _start(self, count: int) -> dict[str, np.ndarray]:
        return {name: np.zeros((count, *shape), dtype) for name, (shape, dtype) in self.stepper.state.items()}

    def _steps(self, x: np.ndarray, timesteps: int | None) -> int:
        _check_timesteps(timesteps)
        if not self.stepper.takes_frames:
            return self.stepper.timesteps if timesteps is None else timesteps
        if timesteps is not None and timesteps > x.shape[1]:
            raise ValueError(f"A step takes a frame, and there are {x.shape[1]}. Received timesteps={timesteps!r}.")
        return x.shape[1] if timesteps is None else timesteps


def outputs_by_step(
    model: keras.Model, x: np.ndarray | Iterable[Any], batch_size: int = 128, timesteps: int | None = None
) -> np.ndarray:
    """A model's outputs after each time step.

    It compiles the model; `StepRunner(model)` does so once for many calls.

    Args:
        model: A functional or Sequential model with spiking layers, as `keras_dsr.stepping.Stepper` takes it.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        batch_size: Samples that run at once, of an array.
        timesteps: Number of steps, at least 1; `None` for as many as the model, or its input, has. More are possible
            for a model that is fed with static input.

    Returns:
        float32 of shape (samples, time, ...).

    Raises:
        ValueError: if the model cannot run step by step, `timesteps` is below 1, there are fewer frames than steps, or
            `x` is empty.
    """
    return StepRunner(model).outputs(x, batch_size, timesteps)


def accuracy_by_step(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy after each time step.

    Args:
        outputs: What `outputs_by_step` gave, of shape (samples, time, classes).
        labels: Integers of shape (samples,).

    Returns:
        float64 of shape (time,).

    Raises:
        ValueError: if there is not one label a sample.
    """
    return (_checked(outputs, labels)[0].argmax(axis=2) == np.asarray(labels)[:, np.newaxis]).mean(axis=0)


def trade_off(
    outputs: np.ndarray,
    labels: np.ndarray,
    confidences: Sequence[float] | None = None,
    patience: Sequence[int] = (1, 2),
    least_steps: int = 1,
    horizon: int | None = None,
    decay: float = 1.0,
) -> list[Point]:
    """Accuracy and steps of early exit, for many rules, from one run.

    Args:
        outputs: What `outputs_by_step` gave, of shape (samples, time, classes).
        labels: Integers of shape (samples,).
        confidences: Of the rules; `None` for 20 that the outputs have, from the least to the largest, evenly among the
            samples, and 1, at which next to nothing stops: how certain a network can be depends on its last threshold
            and its number of steps.
        patience: Of the rules.
        least_steps: Of the rules.
        horizon: Of the rules.
        decay: Of the rules.

    Returns:
        A point for each rule, by patience, then by confidence.

    Raises:
        ValueError: if there is not one label a sample, or a rule's argument is out of range.
    """
    outputs, labels = _checked(outputs, labels)
    right = outputs.argmax(axis=2) == labels[:, np.newaxis]
    if confidences is None:
        like = EarlyExit(horizon=horizon, decay=decay)
        parts = np.array([like.part(number) for number in range(1, outputs.shape[1] + 1)])
        every = _confidence((outputs * parts[:, np.newaxis]).reshape(-1, outputs.shape[2]))
        confidences = np.unique([*np.quantile(every, np.linspace(0, 1, 20)), 1.0]).tolist()
    points = []
    for each in patience:
        for confidence in confidences:
            rule = EarlyExit(confidence, each, least_steps, horizon, decay)
            steps = rule.steps(outputs)
            accuracy = right[np.arange(len(right)), steps - 1].mean()
            points.append(Point(rule, float(accuracy), float(steps.mean())))
    return points


def choose(points: Sequence[Point], accuracy: float) -> Point:
    """The rule of fewest steps among those with an accuracy.

    Args:
        points: What `trade_off` gave, on validation examples: what is chosen on the test part flatters itself.
        accuracy: The least that is wanted, from 0 to 1.

    Returns:
        The point; of several of as few steps, the most accurate.

    Raises:
        ValueError: if no rule has it.
    """
    enough = [point for point in points if point.accuracy >= accuracy]
    if not enough:
        best = max((point.accuracy for point in points), default=math.nan)
        raise ValueError(f"No rule has an accuracy of {accuracy:g}: the best of {len(points)} has {best:g}.")
    return min(enough, key=lambda point: (point.mean_steps, -point.accuracy))


def predict(
    model: keras.Model, x: np.ndarray | Iterable[Any], rule: EarlyExit = EarlyExit(), batch_size: int = 128
) -> Answers:
    """A classifier's answers, each sample stopped where the rule says.

    What has stopped is taken out of the batch, so that it costs nothing further. Batches shrink by halves, so that the
    model is compiled for few sizes; `StepRunner(model)` keeps these for many calls.

    Args:
        model: A functional or Sequential classifier, as `keras_dsr.stepping.Stepper` takes it.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        rule: When to stop.
        batch_size: Samples that run at once, of an array.

    Returns:
        The outputs where each sample stopped, and the steps that it ran for.

    Raises:
        ValueError: if the model cannot run step by step, the rule has a horizon and not the decay of the model's coding
            (`StepRunner.decay`), or `x` is empty.
    """
    return StepRunner(model).predict(x, rule, batch_size)


def predict_served(
    step: Callable[..., Mapping[str, Any]],
    initial_state: Callable[..., Mapping[str, Any]],
    x: np.ndarray,
    timesteps: int | None = None,
    rule: EarlyExit = EarlyExit(),
    input_name: str | None = None,
    batch_size: int = 128,
) -> Answers:
    """The same of an exported network, by its signatures `step` and `initial_state`.

    Args:
        step: From named arrays, the input of a step and the state, to named arrays, the answer and the state after it
            (`next_...`): `tf.saved_model.load(path).signatures["step"]`, say; or a function around a client of a
            server.
        initial_state: From `stream`, an int64 array (samples,), to the state by name.
        x: Frames (samples, time, ...); or with `timesteps` a static input (samples, ...).
        timesteps: Number of steps for a static input, at least 1; `None` for frames.
        rule: When to stop.
        input_name: What the input of `step` is called: `None` for "frame", or "image" for a static input.
        batch_size: Samples that run at once.

    Returns:
        The outputs where each sample stopped, and the steps that it ran for.

    Raises:
        ValueError: if `step` gives neither logits nor an output, an argument is out of range, or there are no samples.

    Example:

        network = tf.saved_model.load("savedmodels/nmnist/1")
        answers = predict_served(network.signatures["step"], network.signatures["initial_state"], frames)
    """
    if not len(x):
        raise ValueError("There is nothing to run the network on: received no samples.")
    _check_timesteps(timesteps)
    frames = timesteps is None
    name = input_name or ("frame" if frames else "image")

    def each(frame: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        results = step(**{name: _like(frame)}, **{part: _like(value) for part, value in state.items()})
        answer = next((results[part] for part in _ANSWERS if part in results), None)
        if answer is None:
            raise ValueError(f"step gives {' or '.join(_ANSWERS)}. Received {sorted(results)}.")
        after = {part: np.asarray(results[f"next_{part}"]) for part in state}
        return np.asarray(answer), after

    found, first = [], 0
    for batch in tracing.batches(np.asarray(x), batch_size):
        started = initial_state(stream=_like(np.arange(first, first + len(batch))))
        state = {part: np.asarray(value) for part, value in started.items()}
        found.append(_run(each, batch, state, frames, batch.shape[1] if frames else timesteps, rule))
        first += len(batch)
    return _joined(found)


Each = Callable[[np.ndarray, dict[str, Any]], tuple[np.ndarray, dict[str, np.ndarray]]]


def _run(each: Each, x: np.ndarray, state: dict[str, Any], frames: bool, last: int, rule: EarlyExit) -> Answers:
    """Steps of a batch that loses the samples that stop."""
    count = len(x)
    outputs: np.ndarray | None = None
    steps = np.full(count, last, "int64")
    alive = np.arange(count)  # the samples that run, in the order of the batch's rows
    memory = rule.start(count)
    for number in range(1, last + 1):
        output, state = each(x[:, number - 1] if frames else x, state)
        output = output[: len(alive)]
        if outputs is None:
            outputs = np.empty((count, *output.shape[1:]), output.dtype)
        outputs[alive] = output
        stops, memory = rule.step(output, number, memory)
        steps[alive[stops]] = number
        keep = np.flatnonzero(~stops)
        if not len(keep) or number == last:
            break
        alive, memory = alive[keep], tuple(part[keep] for part in memory)
        # Rows of samples that have stopped stay until half of all can go; the last one's then fill up the rest.
        size = len(x)
        while size >= 2 * len(keep):
            size = -(-size // 2)
        rows = np.concatenate([keep, np.full(size - len(keep), keep[-1])])
        x, state = x[rows], {part: np.asarray(value)[rows] for part, value in state.items()}
    return Answers(outputs, steps)


def _joined(found: Sequence[Answers]) -> Answers:
    return Answers(np.concatenate([each.outputs for each in found]), np.concatenate([each.steps for each in found]))


def _decay(model: keras.Model) -> float:
    """Of the coding that the last readout speaks: that of the neurons whose stream it reads, or its own."""
    coding = RateCoding()
    neuron = coding
    for _, layer, inputs in graph.calls(model):
        if isinstance(layer, (SpikingNeuron, ToStream)):
            neuron = layer.coding
        elif isinstance(layer, SpikeRep):
            coding = neuron if isinstance(inputs, (list, tuple)) else layer.coding
    return coding.decay


def _check_timesteps(timesteps: int | None) -> None:
    if timesteps is None:
        return
    if isinstance(timesteps, bool) or not isinstance(timesteps, (int, np.integer)) or timesteps < 1:
        raise ValueError(f"timesteps is a number of steps of at least 1, or None. Received timesteps={timesteps!r}.")


def _confidence(outputs: np.ndarray) -> np.ndarray:
    """The softmax's largest probability."""
    outputs = outputs.astype("float64")
    return 1 / np.exp(outputs - outputs.max(axis=1, keepdims=True)).sum(axis=1)


def _checked(outputs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    outputs, labels = np.asarray(outputs), np.asarray(labels)
    if outputs.ndim != 3 or labels.shape != (len(outputs),) or not len(outputs):
        raise ValueError(
            "Outputs are (samples, time, classes), with a label for each of one or more samples. Received outputs of "
            f"shape {outputs.shape} and labels of shape {labels.shape}."
        )
    return outputs, labels


def _like(x: np.ndarray) -> Any:
    """An array as signatures of TensorFlow take it, and clients too."""
    return keras.ops.convert_to_tensor(x) if keras.backend.backend() == "tensorflow" else x

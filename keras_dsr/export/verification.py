"""Whether an exported network gives what the Keras model gives: answers and, spike by spike, what its neurons do.

`verify` runs inputs through the model in Keras, and through each exported form in the runtime that serves it:

- a SavedModel, loaded by TensorFlow's C API: `serving_default`, whose answers must be equal to the bit; `trace`, whose
  counts must be equal; `step`, all samples in step with each other, and again with samples of a batch at different
  steps, as a server batches streams;
- ONNX files, in ONNX Runtime and, where installed and able to read them, OpenVINO. A file of few-bit weights is
  compared with `quantized_copy(model, bits)`.

Another order of summation may lift a potential over the threshold, or not: a spike is flipped, and all that follows may
change. So at most `flip_budget` of all spikes (batch x time x neurons) may be flipped, and samples without a flipped
spike must have the same answers within `tolerance`. At least half of the samples must be such, and at least one neuron
must fire, or nothing would be proven.

A runtime may optimise a file in another way where it shows its spikes. A sample whose answer is right there alone has a
flipped spike that nobody sees: one in a hundred may be so (at least one), none where `flip_budget` is 0.

All of it runs on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dsr.export.c_api import Session
from keras_dsr.export.functions import FORMS, Network, Preprocessing
from keras_dsr.export.report import Report, Row
from keras_dsr.export.runtimes import OnnxRuntime, OpenVino, Runtime, openvino_is_installed
from keras_dsr.export.weights import quantized_copy
from keras_dsr.export.whole_numbers import INTEGER_CONVOLUTIONS

_APART = 4  # so many different steps at most that the samples of a batch are at
_UNSEEN = 100  # in one of so many examples a flipped spike may be seen in the answer alone
_RANDOM_EXAMPLES = 4
_RANDOM_STEPS = 8  # where a model takes any number of frames


def verify(
    model: keras.Model | Network,
    x: Any,
    *,
    saved_model: str | os.PathLike[str] | None = None,
    onnx: Sequence[str | os.PathLike[str]] = (),
    preprocessing: Preprocessing | None = None,
    classifier: bool = True,
    batch_size: int = 32,
    tolerance: float = 1e-5,
    flip_budget: float = 1e-6,
    streams: bool = True,
) -> Report:
    """Compares exported forms of a model with the model in Keras, batch by batch.

    Args:
        model: The model, or the network that was made of it; this one brings its own preprocessing and classifier.
        x: Inputs as clients send them, ahead of the preprocessing: static (n, ...), or frames (n, time, ...).
        saved_model: Folder of one version of a SavedModel; each of its signatures that the network has is compared.
        onnx: ONNX files that `keras_dsr.export` wrote. Those of few-bit weights are compared with the copy of the model
            that has such weights.
        preprocessing: As the forms were exported with.
        classifier: As the forms were exported with.
        batch_size: Number of inputs that run at once; at least 1.
        tolerance: Largest absolute difference of answers where no spike is flipped.
        flip_budget: Part of all spikes (batch x time x neurons) of a form that may be flipped, rounded up to a whole
            number of spikes.
        streams: Whether the SavedModel's `step` is run with samples at different steps too.

    Returns:
        The report. It does not raise where a form fails; `VerificationError(report)` is for that.

    Raises:
        ValueError: if there is nothing to compare, the inputs are not what the network takes or let no neuron fire, or
            a file is damaged or of another network.
        FileNotFoundError: if a file is not there.
        ImportError: if a runtime is not installed; the error names the extra.
    """
    network = model if isinstance(model, Network) else Network(model, preprocessing, classifier)
    if isinstance(model, Network) and preprocessing is not None:
        raise ValueError("A Network brings its own preprocessing. Pass the Keras model, or leave preprocessing out.")
    if not (batch_size >= 1 and tolerance >= 0 and 0 <= flip_budget <= 1):
        raise ValueError(
            "batch_size is at least 1, tolerance not below 0, and flip_budget a part, from 0 to 1. Received "
            f"batch_size={batch_size}, tolerance={tolerance}, flip_budget={flip_budget}."
        )
    network.own_timesteps()  # raises, if it has none
    x = check_examples(network, x)
    with contextlib.ExitStack() as stack, tf.device("CPU"):
        forms: list[_Form] = []
        if saved_model is not None:
            session = stack.enter_context(Session(saved_model))
            _check_signatures(network, session)
            forms += _saved_model_forms(network, session, streams and len(x) > 1)
        for path in onnx:
            forms += _onnx_forms(network, Path(path))
        if not forms:
            raise ValueError(
                "There is nothing to compare: pass the folder of a SavedModel as saved_model, or ONNX files as onnx."
            )
        tallies = [_Tally(form, tolerance) for form in forms]
        networks = dict.fromkeys(form.network for form in forms)
        fired: set[str] = set()
        for start in range(0, len(x), batch_size):
            batch = x[start : start + batch_size]
            references = {each: _reference(each, batch) for each in networks}
            fired |= {name for each in references.values() for name, spikes in each.fired.items() if spikes.any()}
            for form, tally in zip(forms, tallies, strict=True):
                if form.failure:
                    continue
                reference = references[form.network]
                with form.guarded():
                    tally.add(reference, form.run(batch, reference.timesteps), start)
    if not fired:
        raise ValueError(
            f"No neuron of model {network.model.name!r} fired on the {len(x)} inputs, so that they prove nothing. Pass "
            "real inputs: examples=... in Python, --data-dir on the command line."
        )
    silent = tuple(name for name in network.neurons if name not in fired)
    rows = tuple(tally.row(flip_budget) for tally in tallies)
    return Report(network.model.name, rows, silent, tolerance, flip_budget)


Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Result:
    """What one form gave for a batch.

    Args:
        answer: By name.
        fired: Where spikes are, bool (batch, time, ...), for each neuron layer; `None` if it does not tell.
        counts: Number of spikes (batch, time), for each neuron layer, if it tells these alone.
        traced: The answer of the run that told `fired`, where that is another: with spikes as outputs a runtime
            optimises less.
    """

    answer: Arrays
    fired: Arrays | None = None
    counts: Arrays | None = None
    traced: Arrays | None = None

    @property
    def timesteps(self) -> int:
        return next(iter(self.fired.values())).shape[1]


class _Form:
    """One exported form in one runtime, and how long it ran.

    Args:
        network: What it is compared with.
        title: What it is called.
        file: Name of its file.
        runtime: Name and version.
        exact: Whether its answers must be equal to the bit.
        required: As in `Row`.
        reference: As in `Row`.
    """

    def __init__(
        self,
        network: Network,
        title: str,
        file: str,
        runtime: str,
        exact: bool = False,
        required: bool = True,
        reference: str = "",
    ) -> None:
        self.network, self.title, self.file, self.runtime = network, title, file, runtime
        self.exact, self.required, self.reference = exact, required, reference
        self.seconds = 0.0
        self.failure = ""
        self.run: Callable[[np.ndarray, int], _Result]

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return call

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Makes an error of a runtime that nothing stands and falls with a failure of this form alone."""
        try:
            yield
        except RuntimeError as error:
            if self.required:
                raise
            self.failure = f"it cannot run the file: {str(error).strip()}"


def check_examples(network: Network, x: Any) -> np.ndarray:
    """Examples as an array; raises a ValueError if they are not what clients send to the network."""
    x = np.asarray(x)
    spec = network.input_spec()
    if x.dtype.name != spec.dtype.name or not spec.shape.is_compatible_with(x.shape) or not len(x):
        raise ValueError(
            f"Model {network.model.name!r} is compared on {spec.dtype.name} inputs of shape {tuple(spec.shape)}, at "
            f"least one. Received {x.dtype.name} of shape {x.shape}."
        )
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"Model {network.model.name!r} is compared on finite inputs. Received NaN or infinity in "
            f"{np.sum(~finite)} of {len(x)}, first in number {np.argmin(finite)}; leave those out."
        )
    return x


def random_examples(network: Network, timesteps: int | None = None) -> np.ndarray:
    """A few random inputs as clients send them, for want of real ones; neurons may not fire on them.

    Args:
        network: What is to be exported.
        timesteps: Number of frames, where the model takes any.
    """
    spec = network.input_spec(_RANDOM_EXAMPLES, timesteps or _RANDOM_STEPS)
    if not spec.shape.is_fully_defined():
        raise ValueError(
            f"Model {network.model.name!r} takes inputs of any size, {tuple(spec.shape)}: pass examples to verify the "
            "export with."
        )
    generator = np.random.default_rng(0)
    if spec.dtype.is_floating:
        return generator.normal(size=spec.shape).astype(spec.dtype.as_numpy_dtype)
    highest = min(spec.dtype.max, 255)
    return generator.integers(0, highest, spec.shape, endpoint=True).astype(spec.dtype.as_numpy_dtype)


def _reference(network: Network, x: np.ndarray) -> _Result:
    answer = network.run(tf.constant(x))
    _, spikes = network.run_traced(tf.constant(x))
    return _Result(
        {name: np.asarray(value) for name, value in answer.items()},
        {name: np.asarray(tf.not_equal(value, 0)) for name, value in spikes.items()},
    )


def _check_signatures(network: Network, session: Session) -> None:
    known = session.signatures
    expected = {"serving_default": {network.input_name}, "trace": {network.input_name}, "initial_state": {"stream"}}
    if "step" in known:
        expected["step"] = {network.step_input_name, *network.state}
    spikes = {f"{name}_spikes" for name in network.neurons}
    others = [name for name in expected if name in known and set(known[name].inputs) != expected[name]]
    if others or ("trace" in known and not spikes <= set(known["trace"].outputs)):
        raise ValueError(
            f"{session.folder} is not of model {network.model.name!r}: its signatures have other inputs or outputs."
        )


def _saved_model_forms(network: Network, session: Session, interleaved: bool) -> Iterator[_Form]:
    runtime = f"TensorFlow {tf.__version__}, C API"
    file = f"{session.folder.absolute().parent.name}/{session.folder.name}"

    if "serving_default" in session.signatures:
        whole = _Form(network, "serving_default", file, runtime, exact=True)
        run_whole = whole.timed(session.run)
        whole.run = lambda x, _: _Result(run_whole("serving_default", {network.input_name: x}))
        yield whole

    if "trace" in session.signatures:
        trace = _Form(network, "trace", file, runtime)
        run_trace = trace.timed(session.run)

        def traced(x: np.ndarray, _: int) -> _Result:
            outputs = run_trace("trace", {network.input_name: x})
            counts = {name: outputs[f"{name}_spikes"] for name in network.neurons}
            return _Result({network.outputs[0]: outputs[network.outputs[0]]}, counts=counts)

        trace.run = traced
        yield trace

    if "step" in session.signatures:
        yield _step_form(session, _Form(network, "step", file, runtime), 1)
        if interleaved:
            yield _step_form(session, _Form(network, "step, interleaved", file, runtime), _APART)


def _step_form(session: Session, form: _Form, apart: int) -> _Form:
    network = form.network
    call = form.timed(session.run)
    thresholds = {name: float(layer.threshold) for name, layer in network.neuron_layers.items()}

    def step(tensors: Arrays) -> tuple[Arrays, Arrays]:
        outputs = call("step", tensors)
        return outputs, _fired(network, thresholds, tensors, outputs)

    def run(x: np.ndarray, timesteps: int) -> _Result:
        if "initial_state" in session.signatures:
            state = call("initial_state", {"stream": np.arange(len(x), dtype="int64")})
        else:
            state = _zeros(network, len(x))
        return _stream(network, step, state, x, timesteps, apart)

    form.run = run
    return form


def _fired(network: Network, thresholds: Mapping[str, float], tensors: Arrays, outputs: Arrays) -> Arrays:
    """Where spikes are in a step that does not put them out: its potentials tell.

    Keras takes the same step from the same state. A spike lowers the potential by V_th, so where the two potentials are
    more than half of that apart, one has a spike that the other has not.
    """
    expected, spikes = network.step_traced({name: tf.constant(value) for name, value in tensors.items()})
    fired = {}
    for name, value in spikes.items():
        part = f"next_potential_{name}"
        flipped = np.abs(outputs[part] - np.asarray(expected[part])) > thresholds[name] / 2
        fired[name] = np.asarray(tf.not_equal(value, 0)) ^ flipped
    return fired


def _onnx_forms(network: Network, path: Path) -> Iterator[_Form]:
    runtime = OnnxRuntime(path)
    title = runtime.metadata.get("keras_dsr.form", "")
    if title not in FORMS:
        raise ValueError(
            f"{path} does not say in its metadata (keras_dsr.form) what it runs, 'unrolled', 'loop' or 'step': it "
            "was not written by keras_dsr.export."
        )
    bits = json.loads(runtime.metadata.get("keras_dsr.weight_bits", "null"))
    reference = ""
    if bits is not None:
        reference = f"{bits}-bit copy"
        network = Network(quantized_copy(network.model, bits), network.preprocessing, network.classifier)
    expected = {network.step_input_name, *network.state} if title == "step" else {network.input_name}
    if runtime.neurons != tuple(network.neurons) or set(runtime.inputs) != expected:
        raise ValueError(
            f"{path} is not of model {network.model.name!r}: its neuron layers are {list(runtime.neurons)} and its "
            f"inputs {sorted(runtime.inputs)}, and the model's are {network.neurons} and {sorted(expected)}."
        )
    run = _onnx_step if title == "step" else _onnx_whole
    form = _Form(network, title, path.name, runtime.name, reference=reference)
    form.run = run(runtime, form)
    yield form
    # OpenVINO does not read convolutions of whole numbers with a scale for each channel.
    if openvino_is_installed() and runtime.metadata.get(f"keras_dsr.{INTEGER_CONVOLUTIONS}", "0") == "0":
        form = _Form(network, title, path.name, "OpenVINO", required=False, reference=reference)
        with form.guarded():
            runtime = OpenVino(path)
            form.runtime, form.run = runtime.name, run(runtime, form)
        yield form


def _onnx_whole(runtime: Runtime, form: _Form) -> Callable[[np.ndarray, int], _Result]:
    name, plain = form.network.input_name, form.timed(runtime.run)

    def run(x: np.ndarray, _: int) -> _Result:
        answer = plain({name: x})
        other, spikes = runtime.traced({name: x})
        return _Result(answer, {name: value != 0 for name, value in spikes.items()}, traced=other)

    return run


def _onnx_step(runtime: Runtime, form: _Form) -> Callable[[np.ndarray, int], _Result]:
    network, plain = form.network, form.timed(runtime.run)

    def step(tensors: Arrays) -> tuple[Arrays, Arrays]:
        outputs, spikes = runtime.traced(tensors)
        return outputs, {name: value != 0 for name, value in spikes.items()}

    def run(x: np.ndarray, timesteps: int) -> _Result:
        start = _zeros(network, len(x))
        answer = _stream(network, lambda tensors: (plain(tensors), {}), start, x, timesteps, 1).answer
        other = _stream(network, step, start, x, timesteps, 1)
        return _Result(answer, other.fired, traced=other.answer)

    return run


def _zeros(network: Network, batch: int) -> Arrays:
    return {name: np.zeros((batch, *shape), dtype) for name, (shape, dtype) in network.state.items()}


def _stream(
    network: Network,
    step: Callable[[Arrays], tuple[Arrays, Arrays]],
    state: Arrays,
    x: np.ndarray,
    timesteps: int,
    apart: int,
) -> _Result:
    """Runs samples step by step.

    Args:
        step: From the inputs of a step to its outputs, and where spikes are in it.
        state: The state ahead of the first step.
        x: The inputs of the whole run.
        timesteps: Number N of time steps of each sample.
        apart: Number of different steps that the samples of a batch may be at; 1 for all in step.
    """
    state = {name: value.copy() for name, value in state.items()}
    starts = np.arange(len(x)) % min(apart, timesteps)
    answer: Arrays = {}
    fired: Arrays = {}
    for tick in range(timesteps + starts.max()):
        rows = np.flatnonzero((starts <= tick) & (tick < starts + timesteps))
        steps = tick - starts[rows]
        inputs = x[rows, steps] if network.takes_frames else x[rows]
        outputs, spikes = step({network.step_input_name: inputs, **{name: part[rows] for name, part in state.items()}})
        for name in state:
            state[name][rows] = outputs[f"next_{name}"]
        for name in network.outputs:
            if name not in answer:
                answer[name] = np.zeros((len(x), *outputs[name].shape[1:]), outputs[name].dtype)
            answer[name][rows] = outputs[name]
        for name, value in spikes.items():
            if name not in fired:
                fired[name] = np.zeros((len(x), timesteps, *value.shape[1:]), bool)
            fired[name][rows, steps] = value
    return _Result(answer, fired)


def _difference(received: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest absolute difference within each sample; NaN if one is not finite."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(received.astype("float64") - expected.astype("float64"))
    return difference.reshape(len(difference), -1).max(axis=1, initial=0)


class _Tally:
    """What was found of one form so far."""

    def __init__(self, form: _Form, tolerance: float) -> None:
        self.form, self.network, self.tolerance = form, form.network, tolerance
        self.examples = self.compared = self.agreeing = 0
        self.bit_equal = True
        self.difference = 0.0
        self.flipped: int | None = None
        self.spikes: int | None = None
        self.count_differences: int | None = None
        self.unseen: int | None = None
        self.first = ""
        self.wrong = ""

    def add(self, expected: _Result, received: _Result, start: int) -> None:
        """Takes in a batch, whose first example has the number `start`."""
        self.examples += len(next(iter(expected.answer.values())))
        touched = self._compare_spikes(expected, received, start)
        if received.traced is not None:
            name = self.network.outputs[0]
            right = _difference(received.answer[name], expected.answer[name]) <= self.tolerance
            right_traced = _difference(received.traced[name], expected.answer[name]) <= self.tolerance
            # No spike is flipped in the run that shows them, so one must be in the other run.
            unseen = ~touched & ~right & right_traced
            self.unseen = (self.unseen or 0) + int(unseen.sum())
            touched |= unseen
        self.compared += int(np.sum(~touched))
        self._compare_answers(expected.answer, received.answer, ~touched, start)

    def _compare_spikes(self, expected: _Result, received: _Result, start: int) -> np.ndarray:
        """Which samples (batch,) have other spikes."""
        names = list(expected.fired)
        if received.fired is not None:
            off = {name: expected.fired[name] != received.fired[name] for name in names}
            self.flipped = (self.flipped or 0) + sum(int(flips.sum()) for flips in off.values())
            self.spikes = (self.spikes or 0) + sum(flips.size for flips in off.values())
            counts = {name: _counts(received.fired[name]) for name in names}
            steps = [flips.reshape(*flips.shape[:2], -1).any(axis=2) for flips in off.values()]
        elif received.counts is not None:
            counts = received.counts
            steps = [counts[name] != _counts(expected.fired[name]) for name in names]
        else:
            return np.zeros(len(next(iter(expected.answer.values()))), bool)
        apart = (np.abs(counts[name].astype("int64") - _counts(expected.fired[name])) for name in names)
        self.count_differences = (self.count_differences or 0) + sum(int(values.sum()) for values in apart)
        differ = np.stack(steps)  # (layer, batch, time)
        touched = differ.any(axis=(0, 2))
        if touched.any() and not self.first:
            example = int(np.argmax(touched))
            step = int(np.argmax(differ[:, example].any(axis=0)))
            layer = names[int(np.argmax(differ[:, example, step]))]
            self.first = f"first at step {step + 1} in layer {layer!r} (example {start + example})"
        return touched

    def _compare_answers(self, expected: Arrays, received: Arrays, untouched: np.ndarray, start: int) -> None:
        name = self.network.outputs[0]
        self.bit_equal &= np.array_equal(expected[name], received[name], equal_nan=True)
        self.difference = float(np.maximum(self.difference, _difference(received[name], expected[name]).max()))
        for part in (part for part in expected if part in received and part != "class"):
            same = (received[part] == expected[part]).reshape(len(untouched), -1).all(axis=1)
            difference = _difference(received[part], expected[part])
            # A flipped spike excuses another number, but not one that is none.
            far = ~same & ((untouched & ~(difference <= self.tolerance)) | ~np.isfinite(difference))
            if far.any():
                self._note(
                    f"{part} of examples with the same spikes differ by more than {self.tolerance:g}", far, start
                )
        if "class" in expected and "class" in received:
            self.agreeing += int((expected["class"] == received["class"]).sum())
            logits, classes = expected[name], received["class"].astype("int64")
            known = np.clip(classes, 0, logits.shape[1] - 1)
            # Of logits as good as equal, either may be the largest.
            best = logits[np.arange(len(logits)), known] >= logits.max(axis=1) - 2 * self.tolerance
            far = untouched & ~((classes == expected["class"]) | (best & (known == classes)))
            if far.any():
                self._note("the class of examples with the same spikes differs", far, start)

    def _note(self, what: str, where: np.ndarray, start: int) -> None:
        self.wrong = self.wrong or f"{what}, first of example {start + int(np.argmax(where))}"

    def row(self, flip_budget: float) -> Row:
        """The verdict."""
        form = self.form
        reason = form.failure or self._reason(flip_budget)
        classifier = self.network.classifier and form.title != "trace" and self.examples
        return Row(
            form=form.title,
            file=form.file,
            runtime=form.runtime,
            reference=form.reference,
            required=form.required,
            examples=self.examples,
            compared=self.compared,
            bit_equal=self.bit_equal and not form.failure,
            max_difference=self.difference if math.isfinite(self.difference) and not form.failure else None,
            flipped=self.flipped,
            spikes=self.spikes,
            unseen=self.unseen,
            count_differences=self.count_differences,
            top1_agreement=self.agreeing / self.examples if classifier else None,
            seconds=round(form.seconds, 3),
            passed=not reason,
            reason=reason,
        )

    def _reason(self, flip_budget: float) -> str:
        """Why it failed; empty if it did not."""
        flips = math.ceil(flip_budget * (self.spikes or 0))
        unseen = max(1, self.examples // _UNSEEN) if flip_budget else 0
        if self.flipped is None and self.count_differences:
            return f"counts of spikes differ by {self.count_differences:,}, {self.first}"
        if (self.flipped or 0) > flips:
            return f"{self.flipped:,} of {self.spikes:,} spikes are flipped, and at most {flips:,} may be: {self.first}"
        if (self.unseen or 0) > unseen:
            return (
                f"{self.unseen:,} of {self.examples:,} examples have a wrong answer though their spikes, where they "
                f"are shown, are right, and at most {unseen:,} may"
            )
        if self.form.exact and not self.bit_equal:
            return f"{self.network.outputs[0]} are not equal to the bit: they differ by up to {self.difference:.3g}"
        if self.wrong:
            return self.wrong
        if 2 * self.compared < self.examples:
            return (
                f"only {self.compared:,} of {self.examples:,} examples have the same spikes, so that their answers "
                f"can be compared, and at least half must: {self.first}"
            )
        return ""


def _counts(fired: np.ndarray) -> np.ndarray:
    return fired.reshape(*fired.shape[:2], -1).sum(axis=2)

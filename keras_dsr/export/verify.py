"""Whether an exported network gives what the Keras model gives: answers and, spike by spike, what its neurons do.

`verify` runs inputs through the model in Keras, and through each exported form in the runtime that serves it:

- a SavedModel, loaded by TensorFlow's C API: `serving_default`, whose answers must be equal to the bit; `trace`, whose
  counts must be equal; `step`, all samples in step with each other, and again with samples of a batch at different
  steps, as a server batches streams;
- ONNX files, in ONNX Runtime and, where installed, OpenVINO.

Another order of summation may lift a potential over the threshold, or not: a spike is flipped, and all that follows may
change. So at most `flip_budget` of all spikes (batch x time x neurons) may be flipped, and samples without a flipped
spike must have the same answers within `tolerance`. All of it runs on the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from keras_dsr.export.c_api import Session
from keras_dsr.export.functions import Network, Preprocessing
from keras_dsr.export.runtimes import OnnxRuntime, OpenVino, Runtime, openvino_is_installed
from keras_dsr.files import replacing

_APART = 4  # so many different steps at most that the samples of a batch are at


@dataclasses.dataclass(frozen=True)
class Row:
    """How one exported form compares with Keras.

    Args:
        form: What ran: `serving_default`, `trace`, `step` or `step, interleaved` of a SavedModel; `unrolled`, `loop` or
            `step`, as an ONNX file calls itself.
        file: Name and version of the SavedModel, as its folders are called; or name of the ONNX file.
        runtime: Name and version of what ran it.
        examples: Number of inputs.
        bit_equal: Whether all logits (or outputs) are equal to the bit.
        max_difference: Largest absolute difference of a logit (or output), flipped spikes or not; `None` if one is not
            a finite number.
        flipped: Spikes that are there in one and not in the other; `None` where the form gives none to compare.
        spikes: Places where a spike could be: batch x time x neurons.
        count_differences: Sum over examples, layers and steps of how much the counts of spikes differ; `None` where the
            form gives no counts.
        top1_agreement: Part of the examples whose class is the same; `None` if the network is no classifier.
        seconds: That it ran, with what runtimes prepare at the first call.
        passed: The verdict.
        reason: Why it failed; empty if it passed.
    """

    form: str
    file: str
    runtime: str
    examples: int
    bit_equal: bool
    max_difference: float | None
    flipped: int | None
    spikes: int | None
    count_differences: int | None
    top1_agreement: float | None
    seconds: float
    passed: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        model: Name of the model.
        rows: One for each form and runtime.
        silent: Neuron layers that never fired in Keras on the inputs, so that little is known of what follows them.
        tolerance: As it was asked for.
        flip_budget: As it was asked for.
    """

    model: str
    rows: tuple[Row, ...]
    silent: tuple[str, ...]
    tolerance: float
    flip_budget: float

    @property
    def passed(self) -> bool:
        """Whether every form passed."""
        return all(row.passed for row in self.rows)

    def to_json(self) -> str:
        """The report as JSON, with `passed`."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Writes the JSON to a file, whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(self.to_json(), encoding="utf-8")

    def table(self) -> Table:
        """The report to print with rich."""
        examples = max((row.examples for row in self.rows), default=0)
        table = Table(title=f"{escape(self.model)}: exported forms against Keras, {examples} examples", box=SIMPLE)
        notes = [f"{row.file} {row.form} in {row.runtime} failed: {row.reason}" for row in self.rows if not row.passed]
        if self.silent:
            notes.append(f"Never fired on these inputs: {', '.join(self.silent)}")
        table.caption = escape("\n".join(notes)) or None
        for column in ("Form", "Runtime"):
            table.add_column(column, overflow="fold")
        for column in ("Answers", "Flipped spikes", "Top-1", "s"):
            table.add_column(column, justify="right", overflow="fold")
        table.add_column("Verdict", overflow="fold")
        for row in self.rows:
            difference = "not finite" if row.max_difference is None else f"{row.max_difference:.1e}"
            if row.flipped is not None:
                spikes = f"{row.flipped:,} of {row.spikes:,}"
            else:
                spikes = {None: "", 0: "counts equal"}.get(row.count_differences, f"counts {row.count_differences} off")
            table.add_row(
                escape(f"{row.file} {row.form}"),
                row.runtime,
                "bit-equal" if row.bit_equal else difference,
                spikes,
                "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
                f"{row.seconds:.1f}",
                "[green]passed[/green]" if row.passed else "[red]failed[/red]",
            )
        return table


class VerificationError(ValueError):
    """An exported form does not give what Keras gives.

    Args:
        report: All that was compared.
    """

    def __init__(self, report: Report) -> None:
        failed = [row for row in report.rows if not row.passed]
        first = failed[0]
        super().__init__(
            f"{len(failed)} of {len(report.rows)} exported forms of model {report.model!r} do not give what Keras "
            f"gives. First: {first.form!r} of {first.file} in {first.runtime}: {first.reason}"
        )
        self.report = report


def verify(
    model: keras.Model | Network,
    x: Any,
    *,
    saved_model: Path | None = None,
    onnx: Sequence[Path] = (),
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
        onnx: ONNX files that `keras_dsr.export` wrote.
        preprocessing: As the forms were exported with.
        classifier: As the forms were exported with.
        batch_size: Number of inputs that run at once; at least 1.
        tolerance: Largest absolute difference of answers where no spike is flipped.
        flip_budget: Part of all spikes of a form that may be flipped, rounded up to a whole number of spikes.
        streams: Whether the SavedModel's `step` is run with samples at different steps too.

    Returns:
        The report. It does not raise where a form fails; `VerificationError(report)` is for that.

    Raises:
        ValueError: if there is nothing to compare, or the inputs are not what the network takes.
        FileNotFoundError: if a file is not there.
        ImportError: if a runtime is not installed; the error names the extra.
    """
    network = model if isinstance(model, Network) else Network(model, preprocessing, classifier)
    if isinstance(model, Network) and preprocessing is not None:
        raise ValueError("A Network brings its own preprocessing. Pass the Keras model, or leave preprocessing out.")
    if batch_size < 1 or tolerance < 0 or flip_budget < 0:
        raise ValueError(
            "batch_size is at least 1, and tolerance and flip_budget are not below 0. Received "
            f"batch_size={batch_size}, tolerance={tolerance}, flip_budget={flip_budget}."
        )
    x = check_examples(network, x)
    with contextlib.ExitStack() as stack, tf.device("CPU"):
        forms: list[_Form] = []
        if saved_model is not None:
            session = stack.enter_context(Session(saved_model))
            _check_signatures(network, session)
            forms += _saved_model_forms(network, session, streams and len(x) > 1)
        for path in onnx:
            forms += _onnx_forms(network, path)
        if not forms:
            raise ValueError(
                "There is nothing to compare: pass the folder of a SavedModel as saved_model, or ONNX files as onnx."
            )
        tallies = [_Tally(network, tolerance) for _ in forms]
        silent = dict.fromkeys(network.neurons, True)
        for start in range(0, len(x), batch_size):
            batch = x[start : start + batch_size]
            reference = _reference(network, batch)
            silent = {name: silent[name] and not fired.any() for name, fired in reference.fired.items()}
            for form, tally in zip(forms, tallies, strict=True):
                tally.add(reference, form.run(batch, reference.timesteps), start)
        rows = tuple(tally.row(form, flip_budget) for form, tally in zip(forms, tallies, strict=True))
    return Report(network.model.name, rows, tuple(filter(silent.get, silent)), tolerance, flip_budget)


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
        title: What it is called.
        file: Name of its file.
        runtime: Name and version.
        exact: Whether its answers must be equal to the bit.
    """

    def __init__(self, title: str, file: str, runtime: str, exact: bool = False) -> None:
        self.title, self.file, self.runtime, self.exact = title, file, runtime, exact
        self.seconds = 0.0
        self.run: Callable[[np.ndarray, int], _Result]

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return call


def check_examples(network: Network, x: Any) -> np.ndarray:
    """Examples as an array; raises a ValueError if they are not what clients send to the network."""
    x = np.asarray(x)
    spec = network.input_spec()
    if x.dtype.name != spec.dtype.name or not spec.shape.is_compatible_with(x.shape) or not len(x):
        raise ValueError(
            f"Model {network.model.name!r} is compared on {spec.dtype.name} inputs of shape {tuple(spec.shape)}, at "
            f"least one. Received {x.dtype.name} of shape {x.shape}."
        )
    return x


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
        whole = _Form("serving_default", file, runtime, exact=True)
        run_whole = whole.timed(session.run)
        whole.run = lambda x, _: _Result(run_whole("serving_default", {network.input_name: x}))
        yield whole

    if "trace" in session.signatures:
        trace = _Form("trace", file, runtime)
        run_trace = trace.timed(session.run)

        def traced(x: np.ndarray, _: int) -> _Result:
            outputs = run_trace("trace", {network.input_name: x})
            counts = {name: outputs[f"{name}_spikes"] for name in network.neurons}
            return _Result({network.outputs[0]: outputs[network.outputs[0]]}, counts=counts)

        trace.run = traced
        yield trace

    if "step" in session.signatures:
        yield _step_form(network, session, _Form("step", file, runtime), 1)
        if interleaved:
            yield _step_form(network, session, _Form("step, interleaved", file, runtime), _APART)


def _step_form(network: Network, session: Session, form: _Form, apart: int) -> _Form:
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
    kinds: list[type[Runtime]] = [OnnxRuntime]
    if openvino_is_installed():
        kinds.append(OpenVino)
    for kind in kinds:
        runtime = kind(path)
        title = runtime.metadata.get("keras_dsr.form", "")
        if title not in ("unrolled", "loop", "step"):
            raise ValueError(
                f"{path} does not say in its metadata (keras_dsr.form) what it runs, 'unrolled', 'loop' or 'step': it "
                "was not written by keras_dsr.export."
            )
        if runtime.neurons != tuple(network.neurons):
            raise ValueError(
                f"{path} is not of model {network.model.name!r}: its neuron layers are {list(runtime.neurons)}, and "
                f"the model's {network.neurons}."
            )
        form = _Form(title, path.name, runtime.name)
        form.run = (_onnx_step if title == "step" else _onnx_whole)(network, runtime, form)
        yield form


def _onnx_whole(network: Network, runtime: Runtime, form: _Form) -> Callable[[np.ndarray, int], _Result]:
    size = runtime.inputs[network.input_name].shape[0]
    plain = _in_batches(form.timed(runtime.run), size)
    traced = _in_batches(runtime.traced, size)

    def run(x: np.ndarray, _: int) -> _Result:
        answer = plain({network.input_name: x})
        other, spikes = traced({network.input_name: x})
        return _Result(answer, {name: value != 0 for name, value in spikes.items()}, traced=other)

    return run


def _onnx_step(network: Network, runtime: Runtime, form: _Form) -> Callable[[np.ndarray, int], _Result]:
    size = runtime.inputs[network.step_input_name].shape[0]
    plain = _in_batches(form.timed(runtime.run), size)
    traced = _in_batches(runtime.traced, size)

    def step(tensors: Arrays) -> tuple[Arrays, Arrays]:
        outputs, spikes = traced(tensors)
        return outputs, {name: value != 0 for name, value in spikes.items()}

    def run(x: np.ndarray, timesteps: int) -> _Result:
        start = _zeros(network, len(x))
        answer = _stream(network, lambda tensors: (plain(tensors), {}), start, x, timesteps, 1).answer
        other = _stream(network, step, start, x, timesteps, 1)
        return _Result(answer, other.fired, traced=other.answer)

    return run


def _in_batches(function: Callable[[Arrays], Any], size: int | None) -> Callable[[Arrays], Any]:
    """`function` for a file that may have been exported for batches of one size."""
    if size is None:
        return function

    def run(tensors: Arrays) -> Any:
        length = len(next(iter(tensors.values())))
        parts = []
        for start in range(0, length, size):
            rows = np.minimum(np.arange(start, start + size), length - 1)  # the last one fills up the last batch
            parts.append(function({name: value[rows] for name, value in tensors.items()}))
        return keras.tree.map_structure(lambda *values: np.concatenate(values)[:length], *parts)

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
        inputs = x[rows, steps] if network.stepper.takes_frames else x[rows]
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

    def __init__(self, network: Network, tolerance: float) -> None:
        self.network, self.tolerance = network, tolerance
        self.examples = self.agreeing = 0
        self.bit_equal = True
        self.difference = 0.0
        self.flipped: int | None = None
        self.spikes: int | None = None
        self.count_differences: int | None = None
        self.unseen = 0
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
            self.unseen += int(unseen.sum())
            touched |= unseen
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

    def row(self, form: _Form, flip_budget: float) -> Row:
        """The verdict."""
        finite = math.isfinite(self.difference)
        reason = ""
        allowed = math.ceil(flip_budget * self.spikes) if self.spikes is not None else 0
        flipped = (self.flipped or 0) + self.unseen
        if self.flipped is None and self.count_differences:
            reason = f"counts of spikes differ by {self.count_differences:,}, {self.first}"
        elif flipped > allowed:
            unseen = f"{self.unseen:,} only seen in the answers" if self.unseen else ""
            where = ", ".join(filter(None, (self.first, unseen)))
            reason = f"{flipped:,} of {self.spikes:,} spikes are flipped, and at most {allowed:,} may be: {where}"
        elif form.exact and not self.bit_equal:
            reason = f"{self.network.outputs[0]} are not equal to the bit: they differ by up to {self.difference:.3g}"
        elif self.wrong:
            reason = self.wrong
        classifier = self.network.classifier and form.title != "trace"
        return Row(
            form=form.title,
            file=form.file,
            runtime=form.runtime,
            examples=self.examples,
            bit_equal=self.bit_equal,
            max_difference=self.difference if finite else None,
            flipped=None if self.flipped is None else flipped,
            spikes=self.spikes,
            count_differences=self.count_differences,
            top1_agreement=self.agreeing / self.examples if classifier else None,
            seconds=round(form.seconds, 3),
            passed=not reason,
            reason=reason,
        )


def _counts(fired: np.ndarray) -> np.ndarray:
    return fired.reshape(*fired.shape[:2], -1).sum(axis=2)

"""A run, or a preset, as one HTML page, and the same figures as JSON: what `keras-dsr report RUN` writes.

The page needs no network and no other file. A section that lacks what it needs, in a run that is not finished or whose
data set is not at hand, says so, and the others are there.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import runs, training
from keras_dsr.analysis import anytime, charts, energy, figures, page, representation, tracing
from keras_dsr.analysis.operations import Operations, count_operations
from keras_dsr.analysis.page import Section
from keras_dsr.data.parts import DataSet
from keras_dsr.models import presets
from keras_dsr.recipes import Recipe

# Errors simulate each batch anew for every number of steps.
_ERROR_EXAMPLES = 64
# More lines than this are not told apart.
_MOST_LINES = 6
_BATCH = 64
# What tells the JSON of a report from other files.
_MARK = {"written_by": "keras-dsr report"}


@dataclasses.dataclass(frozen=True)
class Written:
    """What a report is.

    Args:
        html: The page.
        json: Its figures.
        missing: For each section that has nothing to show, its title and why.
    """

    html: Path
    json: Path
    missing: dict[str, str]


class _Missing(Exception):
    """What a section needs is not there; the message says what, and what to do."""


@contextlib.contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """What goes wrong with a file's content is that it is damaged, and a lack."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, zipfile.BadZipFile) as error:
        raise _Missing(f"{name} is damaged, or not {what}: {error}") from error


@contextlib.contextmanager
def _looking(what: str) -> Iterator[None]:
    """What cannot be done with the model, or its data, is a lack."""
    import tensorflow as tf

    try:
        yield
    except (ValueError, OSError, tf.errors.OpError) as error:
        raise _Missing(f"{what} {error}") from error


class _Network(abc.ABC):
    """A trained network, as far as it has come, and what it does on test examples.

    Args:
        recipe: What it is trained by.
        data_dir: Where the data set is.
        examples: How many test examples to look at.
    """

    def __init__(self, recipe: Recipe, data_dir: Path | None, examples: int) -> None:
        self.recipe = recipe
        self.examples = examples
        self._data_dir = data_dir
        self._kept: dict[str, Any] = {}

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What the page is headed by."""

    @abc.abstractmethod
    def history(self) -> Path:
        """The history of the training, a CSV file."""

    @abc.abstractmethod
    def results(self) -> dict[str, Any]:
        """What came out: accuracies, number of test examples, and seconds if they are known."""

    @abc.abstractmethod
    def environment(self) -> dict[str, Any] | None:
        """Where it was trained, if that is known."""

    @abc.abstractmethod
    def load(self) -> keras.Model:
        """The model."""

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Made at most once; what is missing is missing each time."""
        if name not in self._kept:
            try:
                self._kept[name] = make()
            except _Missing as missing:
                self._kept[name] = missing
        if isinstance(self._kept[name], _Missing):
            raise self._kept[name]
        return self._kept[name]

    @property
    def rows(self) -> list[dict[str, str]]:
        def read() -> list[dict[str, str]]:
            path = self.history()
            with _reading("history.csv", "the history of a run"), path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if not rows:
                raise _Missing("The history of the run, history.csv, has no epoch.")
            if "stage" not in rows[0]:
                raise _Missing("history.csv is damaged, or not the history of a run: it has no column 'stage'.")
            return rows

        return self._once("rows", read)

    @property
    def model(self) -> keras.Model:
        def load() -> keras.Model:
            if not self.recipe.timesteps:
                raise _Missing("It is a representation network (timesteps=0), which has no spikes.")
            return self.load()

        return self._once("model", load)

    @property
    def data(self) -> DataSet:
        def load() -> DataSet:
            try:
                return training.load(self.recipe, data_dir=self._data_dir)
            except (OSError, ImportError, ValueError) as error:
                raise _Missing(f"The data set {self.recipe.data!r} is not at hand. {error}") from error

        return self._once("data", load)

    @property
    def test(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels of test examples, in random order."""

        def take() -> tuple[np.ndarray, np.ndarray]:
            batches = self.data.batches(self.data.test, _BATCH, seed=0).take(math.ceil(self.examples / _BATCH))
            with _looking(f"The data set {self.recipe.data!r} cannot be read."):
                found = list(batches.as_numpy_iterator())
            if not found:
                raise _Missing(f"The data set {self.recipe.data!r} has no test examples.")
            x, labels = (np.concatenate(each)[: self.examples] for each in zip(*found, strict=True))
            return x, labels

        return self._once("test", take)

    @property
    def trace(self) -> tracing.Trace:
        return self._seen("trace", lambda: tracing.trace(self.model, self.test[0], _BATCH))

    @property
    def recording(self) -> dict[str, tracing.Recording]:
        """One example in full."""
        return self._seen("recording", lambda: next(iter(tracing.trace_batches(self.model, self.test[0][:1]))))

    @property
    def outputs(self) -> np.ndarray:
        return self._seen("outputs", lambda: anytime.outputs_by_step(self.model, self.test[0], _BATCH))

    @property
    def operations(self) -> Operations:
        return self._seen("operations", lambda: count_operations(self.model, self.test[0], _BATCH))

    def _seen(self, name: str, make: Callable[[], Any]) -> Any:
        def look() -> Any:
            with _looking("This network cannot be looked into so."):
                return make()

        return self._once(name, look)


class _Run(_Network):
    """A run folder, finished or not."""

    def __init__(self, folder: Path, data_dir: Path | None, examples: int) -> None:
        super().__init__(runs.recipe_of(folder), data_dir, examples)
        self.folder = folder

    @property
    def title(self) -> str:
        return f"{self.recipe.name}: report of a run"

    def history(self) -> Path:
        return self._file("history.csv")

    def results(self) -> dict[str, Any]:
        path = self._file("summary.json")
        with _reading("summary.json", "the summary of a run"):
            return dataclasses.asdict(runs.Summary.from_json(path.read_text(encoding="utf-8")))

    def environment(self) -> dict[str, Any] | None:
        path = self.folder / "environment.json"
        with _reading("environment.json", "the environment of a run"):
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def load(self) -> keras.Model:
        path = self._file("model.keras")
        with _reading("model.keras", "a model"):
            return keras.models.load_model(path)

    def _file(self, name: str) -> Path:
        path = self.folder / name
        if not path.is_file():
            raise _Missing(
                f"The run folder has no {name}. A run that is not finished goes on with: keras-dsr resume {self.folder}"
            )
        return path


class _Preset(_Network):
    """A preset that comes with the package."""

    def __init__(self, name: str, data_dir: Path | None, examples: int) -> None:
        self.network, _, self.weights = name.partition("-")
        self.card, self.path = presets.card(self.network, self.weights)
        super().__init__(Recipe.from_json(json.dumps(self.card.recipe)), data_dir, examples)

    @property
    def title(self) -> str:
        return f"{self.path.stem}: report of a preset"

    def history(self) -> Path:
        return self.path.with_suffix(".csv")

    def results(self) -> dict[str, Any]:
        card = self.card
        found = ("test_accuracy", "test_examples", "validation_accuracy", "firing_rates")
        return {name: getattr(card, name) for name in found}

    def environment(self) -> dict[str, Any] | None:
        return self.card.environment

    def load(self) -> keras.Model:
        model = self.recipe.build(len(self.card.classes), self.card.input_shape)
        presets.load(model, self.network, self.weights)
        return model


def write(what: str | Path, *, data_dir: Path | None = None, examples: int = 1000, to: Path | None = None) -> Written:
    """Writes the report of a run, or of a preset.

    Args:
        what: A run folder, finished or not; or a preset's name, NETWORK-DATA.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        examples: How many test examples to look at, in random order; at least 1.
        to: The page, an .html file; the JSON stands beside it. `None` for `report.html` in the run folder; of a preset
            `NAME-report.html` here.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if `what` is neither the folder of a run nor a preset.
        ValueError: if `examples` is below 1, `to` does not end in .html, or the JSON would take the place of another
            file than a report's.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"examples is a number of test examples of at least 1. Received examples={examples!r}.")
    preset = str(what) in presets.names() and not Path(what).is_dir()
    own = Path(f"{what}-report.html") if preset else Path(what) / "report.html"
    path = own if to is None else Path(to)
    if path.suffix != ".html":
        raise ValueError(f"A report is an .html file. Received {path}.")
    beside = path.with_suffix(".json")
    if beside.exists() and not _is_report(beside):
        raise ValueError(
            f"The figures of a report stand beside its page, in {beside}, which exists and is not a report's. Give the "
            "page another name."
        )
    run = _Preset(str(what), data_dir, examples) if preset else _Run(Path(what), data_dir, examples)
    recipe = run.recipe
    found: dict[str, Any] = {**_MARK, "recipe": dataclasses.asdict(recipe)}
    sections, lacking = [], {}
    for key, title, make in _SECTIONS:
        try:
            body, found[key] = make(run)
        except _Missing as missing:
            body, found[key] = page.missing(str(missing)), {"missing": str(missing)}
            lacking[title] = str(missing)
        sections.append(Section(key, title, body))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write(path, page.page(run.title, recipe.summary, sections))
    runs.write(beside, runs.json_text(_plain(found)))
    return Written(path, beside, lacking)


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and _MARK.items() <= found.items()


def _overview(run: _Network) -> tuple[str, Any]:
    recipe = run.recipe
    network = {"preact_resnet": f"PreAct-ResNet-{recipe.depth}", "vgg": f"VGG-{recipe.depth}"}.get(
        recipe.network, recipe.network
    )
    shown = [
        ("data", recipe.data),
        ("network", network),
        ("neurons", recipe.neuron.upper()),
        ("N", str(recipe.timesteps)),
    ]
    found: dict[str, Any] = {}
    note = ""
    try:
        summary = run.results()
        with _reading("summary.json", "the summary of a run"):
            before = [("test accuracy", f"{summary['test_accuracy']:.1%}")]
            if summary["validation_accuracy"] is not None:
                before.append(("validation accuracy", f"{summary['validation_accuracy']:.1%}"))
            behind = [("training", _duration(summary["seconds"]))] if "seconds" in summary else []
            note = page.paragraph(f"The test accuracy is of {summary['test_examples']:,} examples.")
        shown = [*before, *shown, *behind]
        found["summary"] = summary
    except _Missing as missing:
        note = page.missing(str(missing))
    try:
        environment = run.environment()
        if environment is not None:
            with _reading("environment.json", "the environment of a run"):
                versions, started = environment["versions"], environment["started"][:10]
                known = (name for name in ("keras_dsr", "keras", "tensorflow") if name in versions)
                told = ", ".join(f"{name} {versions[name]}" for name in known)
            note += page.paragraph(f"Trained with {told}; seed {recipe.seed}; begun {started}.")
            found["environment"] = environment
    except _Missing as missing:
        note += page.missing(str(missing))
    return page.numbers(shown) + note, found


def _training(run: _Network) -> tuple[str, Any]:
    rows = run.rows
    epochs = list(range(1, len(rows) + 1))
    columns = {name: _column(rows, name) for name in ("accuracy", "val_accuracy", "loss", "val_loss", "learning_rate")}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    marks = _stages(rows)
    titles = {"accuracy": "training", "val_accuracy": "validation", "loss": "training", "val_loss": "validation"}

    def chart(names: Sequence[str], what: str) -> str:
        series = {titles[name]: _present(epochs, columns[name]) for name in names if name in columns}
        last = ", ".join(f"{title} {y[-1]:.3g}" for title, (_, y) in series.items())
        alt = f"{what} over {len(rows)} epochs; after the last: {last}."
        return page.figure(
            what, charts.lines(series, alt, "epoch", what.lower(), marks=marks, whole=True), _spoken(marks)
        )

    body = page.cards(chart(("accuracy", "val_accuracy"), "Accuracy"), chart(("loss", "val_loss"), "Loss"))
    return body, {"epochs": epochs, "stages": [row["stage"] for row in rows], **columns}


def _thresholds(run: _Network) -> tuple[str, Any]:
    rows = run.rows
    names = [name for name in rows[0] if name.startswith("threshold_")]
    if not names:
        raise _Missing("The history of the run, history.csv, has no thresholds.")
    columns = {name.removeprefix("threshold_"): _column(rows, name) for name in names}
    epochs = list(range(1, len(rows) + 1))
    shown = charts.spread(list(columns), _MOST_LINES)
    series = {name: _present(epochs, values) for name, values in columns.items()}
    low, high = (pick(series, key=lambda name: series[name][1][-1]) for pick in (min, max))
    alt = (
        f"Threshold of {len(series)} neuron layers over {len(rows)} epochs; after the last from "
        f"{series[low][1][-1]:.2f} ({low}) to {series[high][1][-1]:.2f} ({high})."
    )
    marks = _stages(rows)
    faint = [name for name in series if name not in shown]
    ordered = {name: series[name] for name in (*faint, *shown)}
    svg = charts.lines(ordered, alt, "epoch", "threshold V_th", marks=marks, faint=faint, whole=True, height=3.4)
    note = f"{len(shown)} of {len(series)} layers are named; the others are in the background. " if faint else ""
    return page.cards(page.figure("Threshold of each neuron layer", svg, note + _spoken(marks))), columns


def _confusion(run: _Network) -> tuple[str, Any]:
    labels, names = run.test[1], run.data.class_names
    answers = run.outputs[:, -1].argmax(axis=1)
    counts = np.zeros((len(names), len(names)), "int64")
    np.add.at(counts, (labels, answers), 1)
    right = float((answers == labels).mean())
    wrong = sorted(((int(counts[i, j]), names[i], names[j]) for i, j in np.argwhere(counts) if i != j), reverse=True)[
        :10
    ]
    body = page.paragraph(
        f"{right:.1%} of {len(labels):,} test examples are right after all {run.outputs.shape[1]} steps."
    )
    if len(names) <= 20:
        body += page.matrix(names, counts, "Number of test examples. Empty: none.")
    if wrong:
        body += page.table(
            ("true class", "answered", "examples"), [(a, b, str(n)) for n, a, b in wrong], "Most frequent mistakes"
        )
    return body, {"classes": list(names), "counts": counts, "accuracy": right, "examples": len(labels)}


def _firing(run: _Network) -> tuple[str, Any]:
    trace = run.trace
    rates = trace.firing_rates
    most, least = max(rates, key=rates.get), min(rates, key=rates.get)
    alt = (
        f"Firing rate of {len(rates)} neuron layers, from {rates[least]:.3f} ({least}) to {rates[most]:.3f} ({most}) "
        "spikes per neuron and time step."
    )
    bars = charts.bars({name: {"rate": rate} for name, rate in rates.items()}, alt, "spikes per neuron and time step")
    shown = charts.spread(list(rates), _MOST_LINES)
    steps = {name: (range(1, trace.layers[name].timesteps + 1), trace.layers[name].rate_per_step) for name in shown}
    over = charts.lines(
        steps,
        f"Firing rate at each of {trace.layers[most].timesteps} time steps, of {', '.join(shown)}.",
        "time step",
        "firing rate",
        whole=True,
    )
    silent = sum(layer.silent * layer.neurons for layer in trace.layers.values())
    neurons = sum(layer.neurons for layer in trace.layers.values())
    body = page.paragraph(
        f"A test example brings about {trace.spikes_per_sample:,.0f} spikes: {trace.firing_rate:.3f} a "
        f"neuron and time step. Of {neurons:,} neurons {silent:,.0f} never fire on {trace.samples:,} examples."
    )
    body += page.cards(
        page.figure(
            "Firing rate of each neuron layer", bars, "In the order in which layers run (the paper's Figure 4)."
        ),
        page.figure("Firing rate at each time step", over),
    )
    found = {
        name: {
            "firing_rate": layer.firing_rate,
            "rate_per_step": layer.rate_per_step,
            "neurons": layer.neurons,
            "spikes": layer.spikes,
            "silent": layer.silent,
        }
        for name, layer in trace.layers.items()
    }
    return body, {"samples": trace.samples, "spikes_per_sample": trace.spikes_per_sample, "layers": found}


def _errors(run: _Network) -> tuple[str, Any]:
    coding = run.recipe.neuron_layer().coding
    alpha, steps = run.recipe.alpha, run.trace.layers[next(iter(run.trace.layers))].timesteps
    alphas = tuple(sorted({alpha, *(round(0.1 * n, 1) for n in range(11))}))
    factors = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
    x = run.test[0][:_ERROR_EXAMPLES]
    with _looking("This network cannot be looked into so."):
        found = representation.errors(run.model, x, 16, alphas, factors)
    proposal = representation.propose_alpha(steps, coding)
    kinds = {"quantization e_q": "quantization", "deviation e_d": "deviation", "both": "total"}

    def mean(pick: Callable[[representation.LayerErrors], representation.Errors], what: str) -> float:
        return float(np.mean([getattr(pick(layer), what) for layer in found.values()]))

    by_layer = charts.bars(
        {name: {kind: getattr(layer.final, what) for kind, what in kinds.items()} for name, layer in found.items()},
        f"Mean absolute errors of {len(found)} neuron layers after {steps} steps, as parts of the largest output; "
        f"means over layers: quantization {mean(lambda each: each.final, 'quantization'):.3f}, deviation "
        f"{mean(lambda each: each.final, 'deviation'):.3f}.",
        "part of the largest output",
        stacked=False,
    )
    numbers = range(1, steps + 1)
    by_steps = {
        kind: (numbers, [mean(lambda each, n=n: each.by_steps[n - 1], what) for n in numbers])
        for kind, what in kinds.items()
    }
    by_alpha = {
        kind: (alphas, [mean(lambda each, a=a: each.by_alpha[a], what) for a in alphas]) for kind, what in kinds.items()
    }
    by_threshold = {
        kind: (
            factors,
            [mean(lambda each, i=i: list(each.by_threshold.values())[i], what) for i in range(len(factors))],
        )
        for kind, what in kinds.items()
    }
    with_firing = representation.response(coding, steps, alpha)
    without = representation.response(coding, steps, 1.0)
    stairs = {
        "clamp": (with_firing.received, with_firing.clamp),
        f"alpha = {alpha:g}": (with_firing.received, with_firing.output),
    }
    if alpha != 1:
        stairs["alpha = 1 (without the firing mechanism)"] = (without.received, without.output)
    staircase = charts.lines(
        stairs,
        f"Output of constant currents at N = {steps}, stairs beside the clamp; mean error {with_firing.mean_error:.4f} "
        f"with alpha = {alpha:g}, {without.mean_error:.4f} with alpha = 1.",
        "r(I), part of what brings the largest output",
        "r(output)",
        height=3.2,
    )
    real = {
        name: _over_layers(representation.measured_response(run.model, x, each, batch_size=16))
        for name, each in ((f"alpha = {alpha:g}", None), ("alpha = 1 (without the firing mechanism)", 1.0))
        if each != alpha
    }
    middles, _, clamped = next(iter(real.values()))
    measured = {"clamp": (middles, clamped), **{name: (where, output) for name, (where, output, _) in real.items()}}
    unit = "mean error over layers"
    body = page.paragraph(
        f"How far r(output) is from the clamp of r(I), on {len(x)} test examples, as part of the largest output: the "
        "quantization error is that of a constant current, the deviation error is what uneven currents add. Of "
        f"constant currents the alpha of least error at N = {steps} is {proposal.alpha:g} ({proposal.error:.4f}); the "
        f"run has {alpha:g}."
    )
    body += page.cards(
        page.figure("Errors of each layer", by_layer, f"After N = {steps} steps; mean absolute values."),
        page.figure(
            "Errors and number of steps",
            charts.lines(
                by_steps, f"Mean errors after 1 to {steps} steps; both together from {by_steps['both'][1][0]:.3f} to "
                f"{by_steps['both'][1][-1]:.3f}.", "time steps N", unit, whole=True,
            ),
            "Of the same network with so many steps.",
        ),
        page.figure(
            "Errors and alpha",
            charts.lines(
                by_alpha, f"Mean errors for alpha from 0 to 1; both together least at "
                f"{alphas[int(np.argmin(by_alpha['both'][1]))]:g}.", "alpha", unit, marks={"this run": alpha},
            ),
            "Had a layer another alpha, and its currents stayed the same.",
        ),
        page.figure(
            "Errors and thresholds",
            charts.lines(
                by_threshold, f"Mean errors for thresholds from {factors[0]:g} to {factors[-1]:g} times the run's.",
                "V_th, multiple of the layer's", unit, marks={"this run": 1.0},
            ),
            "Had a layer another V_th, and its currents stayed the same; against that V_th's own clamp, so that what a "
            "lower one cuts off is no error here.",
        ),
        page.figure("Constant currents", staircase, "The paper's Figure 2, for this N and these neurons."),
        page.figure(
            "Currents of this network",
            charts.lines(
                measured, f"Mean output of all {len(found)} neuron layers for what they receive, beside the clamp, "
                "with and without the firing mechanism.",
                "r(I), part of what brings the largest output", "mean r(output)", height=3.2,
            ),
            "The same of real data: means over all neurons and examples that receive as much.",
        ),
    )  # fmt: skip
    return body, {
        "examples": len(x),
        "layers": {name: dataclasses.asdict(layer) for name, layer in found.items()},
        "proposed_alpha": {"alpha": proposal.alpha, "error": proposal.error},
        "response": {
            "alpha": alpha,
            "received": with_firing.received,
            "output": with_firing.output,
            "output_alpha_1": without.output,
            "clamp": with_firing.clamp,
        },
        "measured_response": {name: {"received": x, "output": y} for name, (x, y) in measured.items()},
    }


def _over_layers(
    responses: Mapping[str, representation.MeasuredResponse],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The response of all layers together, each neuron and sample alike: received, output and clamp."""
    count = np.sum([each.count for each in responses.values()], axis=0)
    output, clamped = (
        np.nansum([getattr(each, what) * each.count for each in responses.values()], axis=0)
        for what in ("output", "clamp")
    )
    there = count > 0
    middles = next(iter(responses.values())).received
    return middles[there], output[there] / count[there], clamped[there] / count[there]


def _anytime(run: _Network) -> tuple[str, Any]:
    outputs, labels = run.outputs, run.test[1]
    accuracies = anytime.accuracy_by_step(outputs, labels)
    last = outputs.shape[1]
    decay = run.recipe.neuron_layer().coding.decay
    kinds = {
        "certain": anytime.trade_off(outputs, labels, patience=(1,)),
        "certain twice in a row": anytime.trade_off(outputs, labels, patience=(2,)),
        "by spikes so far": anytime.trade_off(outputs, labels, patience=(1,), horizon=last, decay=decay),
    }
    points = [point for each in kinds.values() for point in each]
    steps = range(1, len(accuracies) + 1)
    over = charts.lines(
        {"accuracy": (steps, accuracies)},
        f"Accuracy after 1 to {len(accuracies)} steps: {', '.join(f'{each:.3f}' for each in accuracies)}.",
        "time steps",
        "accuracy",
        whole=True,
    )
    series = {name: ([p.mean_steps for p in each], [p.accuracy for p in each]) for name, each in kinds.items()}
    series["all samples as long"] = (steps, accuracies)
    enough = [point for point in points if point.accuracy >= accuracies[-1] - 0.01]
    told = "No rule of early exit is within one percentage point of the accuracy of all steps."
    if enough:
        chosen = anytime.choose(enough, 0.0)
        told = (
            f"Within one percentage point of the accuracy of all {len(accuracies)} steps, the fewest are "
            f"{chosen.mean_steps:.2f} on average: confidence {chosen.rule.confidence:.3g}, {chosen.rule.patience} in a "
            f"row, horizon {chosen.rule.horizon} (chosen on these very examples; choose yours on validation examples)."
        )
    least = min(points, key=lambda point: point.mean_steps)
    alt = (
        f"Accuracy against mean steps of early exit, from {least.accuracy:.3f} with {least.mean_steps:.2f} steps; "
        f"{accuracies[-1]:.3f} with all {len(accuracies)}."
    )
    body = page.cards(
        page.figure(
            "Accuracy after each step", over, f"One network, {len(labels):,} test examples (the paper's Figure 3a)."
        ),
        page.figure(
            "Early exit",
            charts.points(series, alt, "mean steps", "accuracy"),
            "A sample stops once the softmax of its outputs is certain; each point is another confidence. By spikes so "
            "far: outputs after n of N steps count as what they would be at step N if nothing came any more.",
        ),
    )
    body += page.paragraph(told)
    return body, {
        "examples": len(labels),
        "accuracy_by_step": accuracies,
        "early_exit": [
            {**dataclasses.asdict(p.rule), "accuracy": p.accuracy, "mean_steps": p.mean_steps} for p in points
        ],
    }


def _energy(run: _Network) -> tuple[str, Any]:
    operations = run.operations
    estimates = [
        energy.estimate(operations, name, memory)
        for name, hardware in energy.HARDWARE.items()
        for memory in ((False, True) if hardware.bits is not None else (False,))
    ]
    rows = []
    for each in estimates:
        how = (
            "with memory traffic"
            if each.with_memory
            else "memory in the figures"
            if each.hardware.bits is None
            else "operations alone"
        )
        rows.append(
            (each.hardware.name, how, *(_joules(number) for number in (each.joules, each.ann, each.ann_int8)),
             f"{each.joules / each.ann:.2f}", f"{each.joules / each.ann_int8:.2f}")
        )  # fmt: skip
    heading = ("hardware", "counted", "spiking network", "ANN, float32", "ANN, int8", "of float32", "of int8")
    body = page.paragraph(
        f"For one sample: {operations.synops:,.0f} synaptic operations and {operations.multiplications:,.0f} "
        f"multiplications in layers that are fed by values, against {operations.macs:,} multiply-accumulates of the "
        "ANN of the same shape."
    )
    body += page.table(
        heading,
        rows,
        "Estimated energy of one sample; the ANN is at 45 nm on every line, with memory "
        "where the spiking network's is in",
    )
    body += page.table(
        ("layer", "fed by", "connections", "operations"),
        [(each.name, each.fed_by, f"{each.connections:,}", f"{each.operations:,.0f}") for each in operations.layers],
        "Operations of one sample",
    )
    said = dict.fromkeys(sentence for each in estimates for sentence in each.assumptions)
    body += "<h3>What these figures rest on</h3>" + page.bullets(list(said))
    return body, {
        "operations": dataclasses.asdict(operations),
        "synops": operations.synops,
        "macs": operations.macs,
        "estimates": [
            {
                "hardware": each.hardware.name,
                "source": each.hardware.source,
                "with_memory": each.with_memory,
                "joules": each.joules,
                "ann_joules": each.ann,
                "ann_int8_joules": each.ann_int8,
                "layers": [dataclasses.asdict(layer) for layer in each.layers],
                "assumptions": each.assumptions,
            }
            for each in estimates
        ],
    }


def _spikes(run: _Network) -> tuple[str, Any]:
    recording = run.recording
    label = run.data.class_names[int(run.test[1][0])]
    answer = run.data.class_names[int(run.outputs[0, -1].argmax())]
    trains = {name: each.spikes[0].reshape(each.spikes.shape[1], -1) for name, each in recording.items()}
    shown = {name: trains[name] for name in charts.spread(list(trains), 5)}
    total = sum(int(train.sum()) for train in trains.values())
    steps = len(next(iter(trains.values())))
    alt = f"Spikes of {', '.join(shown)} over {steps} time steps, a row a neuron; {total:,} in all layers."
    pictures = [
        page.figure("Spikes", charts.raster(shown, alt), f"A mark is a spike. {total:,} in all {len(trains)} layers.")
    ]
    x = run.test[0][0] * np.asarray(run.data.std, "float32") + np.asarray(run.data.mean, "float32")
    if x.ndim == 3:
        pictures.insert(
            0,
            page.figure(
                "The example",
                page.image((255 * figures.picture(x)).round().astype("uint8"), f"A test example: {label}."),
            ),
        )
    body = page.paragraph(f"One test example: {label}; answered: {answer}.") + page.cards(*pictures)
    spikes = {name: [[int(n) for n in np.flatnonzero(step)] for step in train] for name, train in shown.items()}
    return body, {"true": label, "answered": answer, "spikes": spikes}


def _events(run: _Network) -> tuple[str, Any]:
    label = run.data.class_names[int(run.test[1][0])]
    x = run.test[0][0]
    if x.ndim == 4:
        x = x * np.asarray(run.data.std, "float32") + np.asarray(run.data.mean, "float32")
        on, off = x[..., -1], x[..., 0] if x.shape[-1] > 1 else np.zeros_like(x[..., 0])
        what = "Events of a test recording"
        caption = "Its frames, as the network sees them: on in orange, off in blue."
        counts = x.sum(axis=(1, 2, 3))
    else:
        name, first = next(iter(run.recording.items()))
        spikes = first.spikes[0].astype("float32")
        maps = spikes if spikes.ndim == 4 else spikes.reshape(len(spikes), 1, -1, 1)
        on, off = maps.sum(axis=-1), np.zeros(maps.shape[:3], "float32")
        what = f"Events that {name} makes of a test example"
        caption = "The image is static; what the first neuron layer sends on at each step, summed over channels."
        counts = spikes.reshape(len(spikes), -1).sum(axis=1)
    largest = max(float(on.max()), float(off.max()), 1e-9)
    frames = []
    for step in range(len(on)):
        strength = np.maximum(on[step], off[step]) / largest
        alpha = np.where(strength > 0, 0.25 + 0.75 * strength, 0)
        color = np.where((on[step] >= off[step])[..., np.newaxis], (217, 115, 13), (42, 111, 214))
        frames.append(np.concatenate([color, 255 * alpha[..., np.newaxis]], axis=-1).round().astype("uint8"))
    film = page.film(frames, f"{what} ({label})")
    return page.cards(page.figure(what, film, caption)), {"true": label, "events_per_step": counts}


_SECTIONS: tuple[tuple[str, str, Callable[[_Network], tuple[str, Any]]], ...] = (
    ("overview", "Overview", _overview),
    ("training", "Training", _training),
    ("thresholds", "Thresholds", _thresholds),
    ("confusion", "Confusion matrix", _confusion),
    ("firing", "Firing rates", _firing),
    ("errors", "Representation error", _errors),
    ("anytime", "Accuracy against steps", _anytime),
    ("energy", "Energy", _energy),
    ("spikes", "Spikes of one example", _spikes),
    ("events", "Event stream", _events),
)


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[float | None]:
    with _reading("history.csv", "the history of a run"):
        return [float(row[name]) if row.get(name) else None for row in rows]


def _present(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _stages(rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Where each stage but the first begins, by name."""
    stages = [row.get("stage", "") for row in rows]
    return {stage: place + 0.5 for place, stage in enumerate(stages) if place and stage != stages[place - 1]}


def _spoken(marks: Mapping[str, float]) -> str:
    return f"Dotted: where the stages {', '.join(marks)} begin." if marks else ""


def _joules(joules: float) -> str:
    for factor, unit in ((1e3, "mJ"), (1e6, "µJ"), (1e9, "nJ")):
        if joules * factor >= 1:
            return f"{joules * factor:,.3g} {unit}"
    return f"{joules * 1e12:,.3g} pJ"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> Any:
    """What JSON has in place of arrays, tuples and numbers of NumPy; what is no finite number is null."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, range)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

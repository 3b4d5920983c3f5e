"""What `verify` found: a row for each exported form, to print, to write, and kept in what was exported."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from keras_dsr.export import card, passes, runtimes
from keras_dsr.files import replacing

METADATA = "keras_dsr.verification"
"""Where in an ONNX file's metadata its report is; a SavedModel has it on its card, as `verification`."""


@dataclasses.dataclass(frozen=True)
class Row:
    """How one exported form compares with Keras.

    Args:
        form: What ran: `serving_default`, `trace`, `step` or `step, interleaved` of a SavedModel; `unrolled`, `loop` or
            `step`, as an ONNX file calls itself.
        file: Name and version of the SavedModel, as its folders are called; or name of the ONNX file.
        runtime: Name and version of what ran it.
        reference: What it was compared with, where that is not the model itself: "8-bit copy" or "4-bit copy".
        required: Whether an export stands and falls with it; not so in OpenVINO.
        examples: Number of inputs.
        compared: How many of them have the same spikes as in Keras, so that their answers must be the same too.
        bit_equal: Whether all logits (or outputs) are equal to the bit.
        max_difference: Largest absolute difference of a logit (or output), flipped spikes or not; `None` if one is not
            a finite number.
        flipped: Spikes that are there in one and not in the other; `None` where the form gives none to compare.
        spikes: Places where a spike could be: batch x time x neurons.
        unseen: Inputs whose answer is right where the spikes are shown, and wrong where they are not, which must come
            of a spike that is flipped there alone; `None` where the spikes come with the answer.
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
    reference: str
    required: bool
    examples: int
    compared: int
    bit_equal: bool
    max_difference: float | None
    flipped: int | None
    spikes: int | None
    unseen: int | None
    count_differences: int | None
    top1_agreement: float | None
    seconds: float
    passed: bool
    reason: str

    @property
    def answers(self) -> str:
        """In words how the answers compare."""
        if self.bit_equal:
            return "bit-equal"
        return "not finite" if self.max_difference is None else f"{self.max_difference:.0e} off"

    @property
    def spikes_found(self) -> str:
        """In words how the spikes compare."""
        if self.flipped is not None:
            unseen = f", {self.unseen:,} unseen" if self.unseen else ""
            return f"{self.flipped:,} of {self.spikes:,}{unseen}"
        return {None: "", 0: "counts equal"}.get(self.count_differences, f"counts {self.count_differences} off")

    @property
    def verdict(self) -> str:
        """In words whether it passed."""
        if self.passed:
            return "passed"
        return "failed" if self.required else "failed, not required"


@dataclasses.dataclass(frozen=True)
class Report:
    """What `verify` found.

    Args:
        model: Name of the model.
        rows: One for each form and runtime.
        silent: Neuron layers that never fired in Keras on the inputs, so that little is known of what follows them.
        tolerance: As it was asked for.
        flip_budget: As it was asked for.
        random: Whether the inputs were random ones, as an export was given none.
    """

    model: str
    rows: tuple[Row, ...]
    silent: tuple[str, ...]
    tolerance: float
    flip_budget: float
    random: bool = False

    @property
    def passed(self) -> bool:
        """Whether every form passed in every runtime."""
        return all(row.passed for row in self.rows)

    @property
    def exportable(self) -> bool:
        """Whether every form passed in the runtimes that an export stands and falls with."""
        return all(row.passed for row in self.rows if row.required)

    def of(self, file: str) -> Report:
        """The same report of a file that was renamed."""
        return dataclasses.replace(self, rows=tuple(dataclasses.replace(row, file=file) for row in self.rows))

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
        inputs = f"{examples} random inputs" if self.random else f"{examples} inputs"
        title = f"{escape(self.model)}: exported forms against Keras, {inputs}"
        table = Table(title=title, box=SIMPLE, show_edge=False, pad_edge=False)  # fits into 80 columns
        notes = [f"{row.file} {row.form} in {row.runtime} failed: {row.reason}" for row in self.rows if not row.passed]
        if self.silent:
            notes.append(f"Never fired on these inputs: {', '.join(self.silent)}")
        table.caption = escape("\n".join(notes)) or None
        table.add_column("Form", overflow="fold", min_width=11)
        table.add_column("Runtime", overflow="fold", min_width=10)
        table.add_column("Answers", justify="right", no_wrap=True)
        table.add_column("Flipped spikes", justify="right", overflow="fold")
        for column in ("Compared", "Top-1"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("Verdict", overflow="fold", min_width=8)
        for row in self.rows:
            against = f", against {row.reference}" if row.reference else ""
            table.add_row(
                escape(f"{row.file} {row.form}{against}"),
                row.runtime,
                row.answers,
                row.spikes_found,
                f"{row.compared:,}",
                "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
                f"[{'green' if row.passed else 'red'}]{row.verdict}",
            )
        return table


class VerificationError(ValueError):
    """An exported form does not give what Keras gives.

    Args:
        report: All that was compared.
    """

    def __init__(self, report: Report) -> None:
        failed = [row for row in report.rows if not row.passed]
        first = min(failed, key=lambda row: not row.required)
        advice = ". The inputs were random ones: pass real ones, as examples=... or --data-dir" if report.random else ""
        super().__init__(
            f"{len(failed)} of {len(report.rows)} exported forms of model {report.model!r} do not give what Keras "
            f"gives. First: {first.form!r} of {first.file} in {first.runtime}: {first.reason}{advice}"
        )
        self.report = report


def report_of(path: str | os.PathLike[str]) -> Report:
    """How an export was verified before it got its name; the report is kept in it.

    Args:
        path: An ONNX file, or the folder of a SavedModel's version.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it has no report that can be read.
    """
    path = Path(path).absolute()
    if path.suffix == ".onnx":
        kept, file = passes.metadata_of(runtimes.read(path)).get(METADATA), path.name
    else:
        written, file = path / card.CARD, f"{path.parent.name}/{path.name}"
        if not written.is_file():
            raise FileNotFoundError(f"There is no version of a SavedModel with a card in {path}: no file {card.CARD}.")
        kept = written.read_text(encoding="utf-8")
    if kept is None:
        raise ValueError(f"{path} has no report in its metadata ({METADATA}): it was exported with verify=False.")
    try:
        fields = json.loads(kept)
        return _report(fields if path.suffix == ".onnx" else fields["verification"]).of(file)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The report of {path} cannot be read, it is damaged or of another version of keras_dsr ({error!r}). "
            "Export it again."
        ) from error


def _report(fields: Mapping[str, Any]) -> Report:
    known = {name: value for name, value in fields.items() if name != "passed"}
    rows = tuple(Row(**row) for row in fields["rows"])
    return Report(**{**known, "rows": rows, "silent": tuple(fields["silent"])})

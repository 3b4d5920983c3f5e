"""The card of an exported model: what it is, what it takes and gives, and what was checked, for programs and people."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import keras_dsr
from keras_dsr.export.c_api import Signature
from keras_dsr.export.functions import Network
from keras_dsr.export.verify import Report

FOLDER = "assets.extra"
"""Where in a version of a SavedModel its card is: `card.json`, and `README.md` for people."""


def make(
    name: str,
    network: Network,
    signatures: Mapping[str, Signature],
    files: Mapping[str, str],
    report: Report,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The card, of what JSON has.

    Args:
        name: The model's name.
        network: What was exported.
        signatures: As the exported model has them.
        files: sha256 of each file, by its path in the version's folder.
        report: What was verified.
        about: What only the caller knows, such as recipe, data, accuracy and firing rates; goes in as it is.
    """
    neurons = []
    for layer_name, layer in network.neuron_layers.items():
        settings = {key: value for key, value in layer.get_config().items() if key in ("alpha", "tau", "dt")}
        # The shortest decimal number that is this float32.
        threshold = float(str(np.float32(layer.threshold)))
        neurons.append({"layer": layer_name, "type": type(layer).__name__, "threshold": threshold, **settings})
    preprocessing = network.preprocessing
    steps = {layer.timesteps for layer in network.neuron_layers.values()} - {None}
    return {
        "name": name,
        "model": network.model.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timesteps": next(iter(steps), None) or network.model.inputs[0].shape[1],
        "input": "static" if steps else "frames",
        "preprocessing": None
        if preprocessing is None
        else {"mean": preprocessing.mean, "std": preprocessing.std, "dtype": preprocessing.dtype},
        "parameters": int(network.model.count_params()),
        "neurons": neurons,
        "signatures": {
            title: {
                "inputs": {key: {"dtype": x.dtype, "shape": x.shape} for key, x in signature.inputs.items()},
                "outputs": {key: {"dtype": x.dtype, "shape": x.shape} for key, x in signature.outputs.items()},
            }
            for title, signature in signatures.items()
        },
        "about": dict(about),
        "verification": json.loads(report.to_json()),
        "versions": {
            "keras_dsr": keras_dsr.__version__,
            **{package: importlib.metadata.version(package) for package in ("keras", "tensorflow", "numpy")},
        },
        "files": dict(sorted(files.items())),
    }


def write(version: Path, card: Mapping[str, Any]) -> None:
    """Writes `card.json` and `README.md` into a version's folder."""
    folder = version / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card), encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _readme(card: Mapping[str, Any]) -> str:
    steps = card["timesteps"]
    what = "one static input" if card["input"] == "static" else "frames"
    lines = [
        f"# {card['name']}",
        "",
        f"A spiking neural network ({card['model']}) that takes {what} and runs "
        f"{'any number of' if steps is None else steps} time steps, with {card['parameters']:,} parameters. Exported "
        f"by keras_dsr {card['versions']['keras_dsr']} on {card['created']}; `card.json` has all of this for programs.",
        "",
    ]
    if card["preprocessing"] is not None:
        lines += [
            f"Clients send {card['preprocessing']['dtype']}; the network itself subtracts the mean "
            f"{_numbers(card['preprocessing']['mean'])} and divides by {_numbers(card['preprocessing']['std'])}.",
            "",
        ]
    if card["about"]:
        lines += ["## About", ""]
        lines += [f"- {key}: {_short(value)}" for key, value in card["about"].items()]
        lines += [""]
    lines += ["## Signatures", "", "| signature | takes | gives |", "| --- | --- | --- |"]
    for name, signature in card["signatures"].items():
        lines.append(f"| `{name}` | {_tensors(signature['inputs'])} | {_tensors(signature['outputs'])} |")
    if "step" in card["signatures"]:
        lines += [
            "",
            "To run step by step: `initial_state` with one number a stream gives the state; `step` takes it with an "
            "input, and gives the answer so far and, by the same names after `next_`, the state of the next step.",
        ]
    lines += [
        "",
        "## Neurons",
        "",
        "| layer | type | threshold | alpha | tau | dt |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for neuron in card["neurons"]:
        row = (neuron.get(key, "") for key in ("layer", "type", "threshold", "alpha", "tau", "dt"))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        "## Verified against Keras",
        "",
        "| form | runtime | examples | answers | flipped spikes | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in card["verification"]["rows"]:
        answers = "bit-equal" if row["bit_equal"] else f"differ by up to {row['max_difference']:.1e}"
        flipped = "" if row["flipped"] is None else f"{row['flipped']:,} of {row['spikes']:,}"
        verdict = "passed" if row["passed"] else f"failed: {row['reason']}"
        lines.append(f"| {row['form']} | {row['runtime']} | {row['examples']} | {answers} | {flipped} | {verdict} |")
    if card["verification"]["silent"]:
        lines += ["", f"Never fired on these examples: {', '.join(card['verification']['silent'])}."]
    return "\n".join(lines) + "\n"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tensors(tensors: Mapping[str, Any]) -> str:
    parts = []
    for name, tensor in tensors.items():
        sizes = (
            "any"
            if tensor["shape"] is None
            else ", ".join("?" if size is None else str(size) for size in tensor["shape"])
        )
        parts.append(f"`{name}` {tensor['dtype']} ({sizes})")
    return "<br>".join(parts)

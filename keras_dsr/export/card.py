"""The card of an exported model: what it is, what it takes and gives, and what was checked, for programs and people."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import keras_dsr
from keras_dsr.export.c_api import Signature
from keras_dsr.export.functions import Network

CARD = "assets.extra/card.json"
"""Where in a version of a SavedModel its card is; beside it is `README.md` for people."""


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller says of a model, as JSON has it; raises a ValueError if JSON does not have it."""
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`about` goes on the card, and so must be of what JSON has: {error}.") from error


def make(
    name: str,
    network: Network,
    about: Mapping[str, Any],
    timesteps: int | None = None,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """What any exported form of a model says of it, of what JSON has.

    Args:
        name: The model's name.
        network: What was exported.
        about: What only the caller knows, such as recipe, data, accuracy and firing rates; goes in as it is.
        timesteps: Number N of time steps, if the form has fixed another than the model.
        packages: Those whose versions matter, beside Keras, TensorFlow and NumPy.
    """
    neurons = []
    for layer_name, layer in network.neuron_layers.items():
        settings = {key: value for key, value in layer.get_config().items() if key in ("alpha", "tau", "dt")}
        # The shortest decimal number that is this float32.
        threshold = float(str(np.float32(layer.threshold)))
        neurons.append({"layer": layer_name, "type": type(layer).__name__, "threshold": threshold, **settings})
    preprocessing = network.preprocessing
    return {
        "name": name,
        "model": network.model.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "timesteps": timesteps or network.own_timesteps() or network.model.inputs[0].shape[1],
        "input": "frames" if network.takes_frames else "static",
        "preprocessing": None
        if preprocessing is None
        else {"mean": preprocessing.mean, "std": preprocessing.std, "dtype": preprocessing.dtype},
        "parameters": int(network.model.count_params()),
        "neurons": neurons,
        "about": plain(about),
        "versions": {
            "keras_dsr": keras_dsr.__version__,
            **{each: importlib.metadata.version(each) for each in ("keras", "tensorflow", "numpy", *packages)},
        },
    }


def described(signatures: Mapping[str, Signature]) -> dict[str, Any]:
    """The signatures of a SavedModel, of what JSON has."""
    return {
        title: {
            "inputs": {key: {"dtype": x.dtype, "shape": x.shape} for key, x in signature.inputs.items()},
            "outputs": {key: {"dtype": x.dtype, "shape": x.shape} for key, x in signature.outputs.items()},
        }
        for title, signature in signatures.items()
    }


def write(version: Path, card: Mapping[str, Any]) -> None:
    """Writes `card.json` and `README.md` into a version's folder.

    Args:
        version: The folder of a SavedModel.
        card: What `make` gives and, beside, `signatures`, `verification`, and `files` with the sha256 of each.
    """
    path = version / CARD
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    path.with_name("README.md").write_text(_readme(card), encoding="utf-8")


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
        verdict = "passed" if row["passed"] else "failed"
        lines.append(f"| {row['form']} | {row['runtime']} | {row['examples']} | {answers} | {flipped} | {verdict} |")
    if card["verification"]["random"]:
        lines += ["", "The examples were random ones: no real ones were given."]
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

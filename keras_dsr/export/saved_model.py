"""A model as a version that TensorFlow Serving serves: written beside, verified there, and only then put in place.

A version is a SavedModel with the signatures of `keras_dsr.export.functions`, warm-up requests, and a card. A server
that watches the folder never sees a version that is half written, or that does not give what Keras gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dsr.export import c_api, card, tf_serving
from keras_dsr.export.functions import SIGNATURES, Network, Preprocessing
from keras_dsr.export.report import VerificationError
from keras_dsr.export.verification import check_examples, random_examples, verify
from keras_dsr.files import synchronize, workspace

_WARM_UP_BATCH = 8


def export_saved_model(
    model: keras.Model,
    base: str | os.PathLike[str],
    *,
    preprocessing: Preprocessing | None = None,
    classifier: bool = True,
    signatures: Sequence[str] = SIGNATURES,
    examples: Any = None,
    about: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    tolerance: float = 1e-5,
    flip_budget: float = 1e-6,
) -> Path:
    """Writes the next version of a model, for TensorFlow Serving.

    The version appears whole, and only if it gives what Keras gives (see `keras_dsr.export.verification`). Variables
    stay variables: as constants, TensorFlow would fold BatchNorm into kernels, and sums would be rounded in another
    way.

    Args:
        model: A functional or Sequential model with one input and one output, on TensorFlow.
        base: The model's folder, such as `savedmodels/digits`; its name is the model's. Versions are numbered in it.
            It may be a link, or where a disk is mounted. In the folder around it are the files that TensorFlow Serving
            is started with (`keras_dsr.export.tf_serving`).
        preprocessing: What makes the model's input of what clients send; `None` if they send the model's input.
        classifier: Whether the output is logits (batch, classes); if not, it is given as it is, as `output`.
        signatures: Which of `SIGNATURES` to export; `serving_default` at least.
        examples: Inputs as clients send them, to verify the export with, of which the first few become warm-up
            requests: static (n, ...), or frames (n, time, ...). `None` for random ones, which may leave neurons silent.
        about: What to put on the card, of what JSON has: recipe, data, accuracy, firing rates.
        batch_size: Number of examples that run at once when they are compared.
        tolerance: As in `verify`.
        flip_budget: As in `verify`.

    Returns:
        The folder of the new version.

    Raises:
        ValueError: if the model, or an argument, cannot be exported; the error says why.
        VerificationError: if what was exported does not give what Keras gives. Nothing is left of it.
        ImportError: if tensorflow-serving-api is not installed.
        RuntimeError: if Keras does not run on TensorFlow, or TensorFlow has no C API here.

    Example:

        path = export_saved_model(model, "savedmodels/digits", examples=images, about={"accuracy": 0.98})
    """
    if sys.platform == "win32":
        raise RuntimeError("Export verifies by TensorFlow's C API, which TensorFlow has for Linux and macOS alone.")
    base = Path(base).absolute()
    check_base(base)
    about = card.plain(about or {})
    if "serving_default" not in signatures or len(set(signatures)) != len(signatures):
        raise ValueError(
            f"signatures are some of {SIGNATURES}, each once, with 'serving_default', which clients call. Received "
            f"{tuple(signatures)}."
        )
    unknown = sorted(set(signatures) - set(SIGNATURES))
    if unknown:
        raise ValueError(f"signatures are some of {SIGNATURES}. Received {unknown}.")
    network = Network(model, preprocessing, classifier)
    network.own_timesteps()  # raises, if it has none
    if {"step", "initial_state"} & set(signatures):
        _check_steps(network)
    random = examples is None
    examples = check_examples(network, random_examples(network) if random else examples)
    base.parent.mkdir(parents=True, exist_ok=True)
    home = base.resolve()  # the workspace must be on the file system that it is renamed on
    with workspace(home) as folder:
        _save(network, signatures, folder)
        requests = _warm_up_requests(network, signatures, examples[:_WARM_UP_BATCH])
        tf_serving.write_warm_up(folder, base.name, requests)
        report = verify(
            network,
            examples,
            saved_model=folder,
            batch_size=batch_size,
            tolerance=tolerance,
            flip_budget=flip_budget,
        )
        report = dataclasses.replace(report.of(base.name), random=random)
        if not report.exportable:
            raise VerificationError(report)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        hashes = {name: card.sha256(path) for name, path in files.items()}
        known = c_api.signatures(folder)
        written = {
            **card.make(base.name, network, about),
            "signatures": card.described({name: known[name] for name in signatures}),
            "verification": json.loads(report.to_json()),
            "files": dict(sorted(hashes.items())),
        }
        card.write(folder, written)
        _synchronize(folder)
        number = _place(folder, home).name
    tf_serving.serve(base.parent)
    return base / number


def check_base(base: Path) -> None:
    """Raises an error if versions of a model cannot be put into this folder.

    Raises:
        ValueError: if it has no name that a model can have, or the configuration beside it is damaged.
        ImportError: if tensorflow-serving-api is not installed.
    """
    check_name(base.name)
    tf_serving.check_config(base.parent)


def check_name(name: str) -> None:
    """Raises a ValueError if this is no name that a served model can have."""
    if name.isdecimal() or not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        raise ValueError(
            "The model's folder has the model's name, of letters, digits, '_', '.' and '-', and no number alone, for "
            f"such are the versions within it: savedmodels/NAME. Received the name {name!r}."
        )


def _check_steps(network: Network) -> None:
    try:
        network.stepper  # noqa: B018
    except ValueError as error:
        raise ValueError(
            f"{error} Or export the model without the signatures that need single steps: "
            "signatures=('serving_default', 'trace')."
        ) from error


def _save(network: Network, names: Sequence[str], folder: Path) -> None:
    functions = network.signatures(names)
    module = tf.Module()
    variables = {id(variable): variable for function in functions.values() for variable in function.graph.variables}
    module.variables_of_the_model = list(variables.values())
    # Nobody trains a served model, and the gradients of the neurons' functions would be traced once more.
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, str(folder), signatures=functions, options=options)


def _warm_up_requests(
    network: Network, signatures: Sequence[str], examples: np.ndarray
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Each signature with one example, as most requests are, and the one that answers with a few too."""
    one = examples[:1]
    for name in signatures:
        if name == "initial_state":
            yield name, {"stream": np.zeros(1, "int64")}
        elif name == "step":
            state = {key: np.zeros((1, *shape), dtype) for key, (shape, dtype) in network.state.items()}
            yield name, {network.step_input_name: one[:, 0] if network.takes_frames else one, **state}
        else:
            yield name, {network.input_name: one}
    if len(examples) > 1:
        yield "serving_default", {network.input_name: examples}


def _synchronize(folder: Path) -> None:
    """Has the disk write down a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        synchronize(path)


def _place(folder: Path, base: Path) -> Path:
    """Renames a folder to the model's next version; of two processes that want the same number, one takes the next."""
    base.mkdir(exist_ok=True)
    number = max(tf_serving.versions(base), default=0) + 1
    while True:
        version = base / str(number)
        try:
            folder.rename(version)  # which fails if there is something in `version`
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                with contextlib.suppress(OSError):
                    base.rmdir()  # if it was made just now
                raise
            number += 1
        else:
            break
    synchronize(base)
    synchronize(base.parent)
    return version

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
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_dsr.export import c_api, card, tf_serving
from keras_dsr.export.functions import SIGNATURES, Network, Preprocessing
from keras_dsr.export.verify import VerificationError, check_examples, verify

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_WARM_UP_BATCH = 8
_RANDOM_EXAMPLES = 4
_RANDOM_STEPS = 8  # where a model takes any number of frames


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

    The version appears whole, and only if it gives what Keras gives (see `keras_dsr.export.verify`). Variables stay
    variables: as constants, TensorFlow would fold BatchNorm into kernels, and sums would be rounded in another way.

    Args:
        model: A functional or Sequential model with one input and one output, on TensorFlow.
        base: The model's folder, such as `savedmodels/digits`; its name is the model's. Versions are numbered in it.
            In the folder around it are the files that TensorFlow Serving is started with
            (`keras_dsr.export.tf_serving`).
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
    if fcntl is None:
        raise RuntimeError("Export verifies by TensorFlow's C API, which TensorFlow has for Linux and macOS alone.")
    base = Path(base).absolute()
    _check_name(base)
    about = _plain(about or {})
    if "serving_default" not in signatures or len(set(signatures)) != len(signatures):
        raise ValueError(
            f"signatures are some of {SIGNATURES}, each once, with 'serving_default', which clients call. Received "
            f"{tuple(signatures)}."
        )
    unknown = sorted(set(signatures) - set(SIGNATURES))
    if unknown:
        raise ValueError(f"signatures are some of {SIGNATURES}. Received {unknown}.")
    network = Network(model, preprocessing, classifier)
    if {"step", "initial_state"} & set(signatures):
        _check_steps(network)
    examples = check_examples(network, _random_examples(network) if examples is None else examples)
    base.parent.mkdir(parents=True, exist_ok=True)
    tf_serving.check_config(base.parent)
    with _workspace(base) as folder:
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
        report = dataclasses.replace(report, rows=tuple(dataclasses.replace(x, file=base.name) for x in report.rows))
        if not report.passed:
            raise VerificationError(report)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        hashes = {name: card.sha256(path) for name, path in files.items()}
        known = c_api.signatures(folder)
        described = {name: known[name] for name in signatures}
        card.write(folder, card.make(base.name, network, described, hashes, report, about))
        _synchronize(folder)
        version = _place(folder, base)
    tf_serving.serve(base.parent)
    return version


def _check_name(base: Path) -> None:
    if base.name.isdecimal() or not re.fullmatch(r"\w[\w.-]*", base.name, re.ASCII):
        raise ValueError(
            "The model's folder has the model's name, of letters, digits, '_', '.' and '-', and no number alone, for "
            f"such are the versions within it: savedmodels/NAME. Received {str(base)!r}."
        )


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(about), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`about` goes on the card, and so must be of what JSON has: {error}.") from error


def _check_steps(network: Network) -> None:
    try:
        network.stepper  # noqa: B018
    except ValueError as error:
        raise ValueError(
            f"{error} Or export the model without the signatures that need single steps: "
            "signatures=('serving_default', 'trace')."
        ) from error


def _random_examples(network: Network) -> np.ndarray:
    spec = network.input_spec(_RANDOM_EXAMPLES, _RANDOM_STEPS)
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
    """Each signature with one example, as most requests are, and with a few."""
    for batch in {1: examples[:1], len(examples): examples}.values():
        for name in signatures:
            if name == "initial_state":
                yield name, {"stream": np.arange(len(batch), dtype="int64")}
            elif name == "step":
                inputs = batch[:, 0] if network.stepper.takes_frames else batch
                state = {key: np.zeros((len(batch), *shape), dtype) for key, (shape, dtype) in network.state.items()}
                yield name, {network.step_input_name: inputs, **state}
            else:
                yield name, {network.input_name: batch}


@contextlib.contextmanager
def _workspace(base: Path) -> Iterator[Path]:
    """A new folder beside the model's, on the same file system; away at the end unless it was renamed.

    It is locked as long as this process lives, which is how those of processes that were killed are told from those
    that are being written to; they are removed first.
    """
    pattern = re.compile(rf"\.{re.escape(base.name)}-exporting-[0-9a-f]+")
    for entry in base.parent.iterdir():
        if pattern.fullmatch(entry.name):
            _remove_if_abandoned(entry)
    while True:
        folder = base.with_name(f".{base.name}-exporting-{secrets.token_hex(8)}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else another process held it for abandoned
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # put in place or removed meanwhile
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _synchronize(folder: Path) -> None:
    """Has the disk write down a folder and all that is in it."""
    for path in (*folder.rglob("*"), folder):
        _synchronize_one(path)


def _synchronize_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    _synchronize_one(base)
    _synchronize_one(base.parent)
    return version

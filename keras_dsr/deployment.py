"""From a finished run, or a preset, to what servers and runtimes load: a SavedModel version and ONNX files.

Both are proven on real examples before they get their names: see `keras_dsr.export`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import export, models, runs, training
from keras_dsr.data.parts import DataSet
from keras_dsr.export import Preprocessing, Report, tf_serving
from keras_dsr.export.functions import Network
from keras_dsr.files import replacing
from keras_dsr.models import presets
from keras_dsr.recipes import Recipe

_NETWORKS = {"preact_resnet": models.preact_resnet, "vgg": models.vgg}


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained network with all that its export wants to know.

    Args:
        name: What its folder is called.
        model: The network.
        preprocessing: From what clients send to the network's input; `None` if they send the input.
        about: For the model card: what it was trained on, and what came out.
        examples: Real inputs as clients send them, of shape (count, ...); `None` if none are at hand.
    """

    name: str
    model: keras.Model
    preprocessing: Preprocessing | None
    about: dict[str, Any]
    examples: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Args:
        saved_model: The folder of the SavedModel's version.
        onnx: The ONNX files.
        request: A request with a real input, for REST, if there was one.
        input_name: What the input is called.
        dtype: What clients send.
    """

    saved_model: Path
    onnx: tuple[Path, ...]
    request: Path | None
    input_name: str
    dtype: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """The SavedModel's folder and the ONNX files."""
        return (self.saved_model, *self.onnx)

    @property
    def usage(self) -> str:
        """Commands that use what was written, for a shell in the folder where this process runs."""
        base = self.saved_model.parent
        lines = [f"keras-dsr serve {base}"]
        if self.request is not None:
            url = f"http://127.0.0.1:8501/v1/models/{base.name}:predict"
            lines += ["", "# then, from another shell:", f"curl -d @{self.request} {url}"]
            if self.onnx:
                lines += [
                    "",
                    "# ONNX Runtime, in Python:",
                    "import json, numpy, onnxruntime, pathlib",
                    f"request = json.loads(pathlib.Path({str(self.request)!r}).read_text())",
                    f"x = numpy.array(request['instances'], {self.dtype!r})",
                    f"session = onnxruntime.InferenceSession({str(self.onnx[0])!r})",
                    f"print(session.run(['class', 'probabilities'], {{{self.input_name!r}: x}}))",
                ]
        return "\n".join(lines)


def source(what: str | Path, *, data_dir: Path | None = None, examples: int = 256) -> Source:
    """The network of a run folder, or of a preset.

    Args:
        what: A run folder that `keras_dsr.training.train` filled; or a preset's name, NETWORK-DATA.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        examples: How many real inputs to take along, from the test part in random order.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run, or its data set is not there.
        ValueError: if there is neither such a folder nor such a preset.
    """
    if Path(what).is_dir():
        return _of_run(Path(what), data_dir, examples)
    if str(what) in presets.names():
        return _of_preset(str(what), data_dir, examples)
    known = ", ".join(presets.names())
    raise ValueError(f"{str(what)!r} is neither a run folder nor a preset. Presets: {known}.")


def _of_run(folder: Path, data_dir: Path | None, examples: int) -> Source:
    summary, recipe = runs.summary_of(folder), runs.recipe_of(folder)
    model = keras.models.load_model(folder / "model.keras")
    loaded = training.load(recipe, data_dir=data_dir)
    about = {
        "data": recipe.data,
        "classes": list(loaded.class_names),
        "test_accuracy": summary.test_accuracy,
        "test_examples": summary.test_examples,
        "validation_accuracy": summary.validation_accuracy,
        "firing_rates": summary.firing_rates,
        "recipe": dataclasses.asdict(recipe),
        "training": json.loads((folder / "environment.json").read_text()),
    }
    preprocessing = _preprocessing(loaded.input_shape, loaded.mean, loaded.std)
    return Source(recipe.name, model, preprocessing, about, _examples(loaded, preprocessing, examples))


def _of_preset(name: str, data_dir: Path | None, examples: int) -> Source:
    network, _, weights = name.partition("-")
    card, _ = presets.card(network, weights)
    kind, depth = re.fullmatch(r"([a-z_]+?)(\d+)", network).groups()
    model = _NETWORKS[kind](
        int(depth), card.neuron, classes=len(card.classes), input_shape=card.input_shape, weights=weights
    )
    about = {
        "data": card.data,
        "classes": list(card.classes),
        "test_accuracy": card.test_accuracy,
        "test_examples": card.test_examples,
        "validation_accuracy": card.validation_accuracy,
        "firing_rates": card.firing_rates,
        "recipe": card.recipe,
        "training": card.environment,
        "preset": {"name": name, "version": card.version, "sha256": card.sha256},
    }
    preprocessing = _preprocessing(card.input_shape, card.mean, card.std)
    found = None
    if data_dir is not None:
        recipe = Recipe.from_json(json.dumps(card.recipe))
        found = _examples(training.load(recipe, data_dir=data_dir), preprocessing, examples)
    return Source(name, model, preprocessing, about, found)


def _preprocessing(input_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Preprocessing | None:
    """Clients send images as bytes; frames of events as counts, which the network takes as they are."""
    if len(input_shape) != 3 and set(mean) == {0.0} and set(std) == {1.0}:
        return None
    return Preprocessing(tuple(mean), tuple(std), "uint8" if len(input_shape) == 3 else "float32")


def _examples(loaded: DataSet, preprocessing: Preprocessing | None, count: int) -> np.ndarray:
    batches = loaded.stored_batches(loaded.test, min(count, 64), seed=0)
    found = np.concatenate([x for x, _ in batches.take(math.ceil(count / 64)).as_numpy_iterator()])[:count]
    return found.astype("float32" if preprocessing is None else preprocessing.dtype)


def deploy(
    given: Source,
    base: Path,
    *,
    onnx: Sequence[str] = ("unrolled",),
    fold_thresholds: bool = False,
    weight_bits: int | None = None,
) -> Exported:
    """Exports a network, proves that what was exported does as the network does, and only then gives it its names.

    Args:
        given: The network.
        base: The folder of all models, such as `savedmodels`. In it a folder of the network's name gets the next
            version, a SavedModel, and beside that ONNX files and a request of the version's number.
        onnx: Forms of ONNX files to write: "unrolled", "loop", "step"; none for no file.
        fold_thresholds: As in `keras_dsr.export.export_onnx`.
        weight_bits: As in `keras_dsr.export.export_onnx`.

    Returns:
        What was written.

    Raises:
        keras_dsr.export.VerificationError: if something exported differs from the network. It is not kept.
        ValueError: if the network cannot be exported.
        ImportError: if a package of the extra `export` is not installed.
    """
    folder = base / given.name
    placed = export.export_saved_model(
        given.model, folder, preprocessing=given.preprocessing, examples=given.examples, about=given.about
    )
    version = folder / placed.name
    files = []
    for form in onnx:
        suffix = "" if form == "unrolled" else f"-{form}"
        files.append(
            export.export_onnx(
                given.model,
                folder / f"{version.name}{suffix}.onnx",
                form=form,
                preprocessing=given.preprocessing,
                fold_thresholds=fold_thresholds,
                weight_bits=weight_bits,
                examples=given.examples,
                about=given.about,
            )
        )
    request = None
    if given.examples is not None:
        request = folder / f"{version.name}-request.json"
        with replacing(request) as beside:
            beside.write_text(json.dumps({"instances": given.examples[:1].tolist()}) + "\n", encoding="utf-8")
    network = Network(given.model, given.preprocessing)
    return Exported(version, tuple(files), request, network.input_name, network.input_dtype)


def verify(given: Source, folder: Path, onnx: Sequence[Path] = ()) -> Report:
    """Compares a network with what was exported of it, again.

    Args:
        given: The network, with examples.
        folder: The folder of a SavedModel's version; or of all versions, for the newest.
        onnx: ONNX files; if there are none, those beside the version that have its number.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: if there is no version in the folder.
        ValueError: if there are no examples.
    """
    if given.examples is None:
        raise ValueError("To verify takes real inputs. Say where the data set is, with data_dir.")
    if not (folder / "saved_model.pb").is_file():
        versions = tf_serving.versions(folder)
        if not versions:
            raise FileNotFoundError(f"There is no version of a SavedModel in {folder}: no folder named by a number.")
        folder = folder / str(versions[-1])
    beside = [path for path in folder.parent.glob("*.onnx") if re.fullmatch(rf"{folder.name}(-\w+)?", path.stem)]
    return export.verify(
        given.model,
        given.examples,
        saved_model=folder,
        onnx=tuple(onnx) or tuple(sorted(beside)),
        preprocessing=given.preprocessing,
    )

"""From a finished run, or a preset, to what servers and runtimes load: a SavedModel version and ONNX files.

All are proven before any gets its name, on real examples where these are at hand: see `keras_dsr.export`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_dsr
from keras_dsr import export, runs, training
from keras_dsr.data.parts import DataSet
from keras_dsr.export import Grid, Network, Preprocessing, Report, saved_model, tf_serving
from keras_dsr.export import card as cards
from keras_dsr.files import workspace
from keras_dsr.models import presets
from keras_dsr.recipes import Recipe

ARITHMETICS = ("float", "exact", "integer")
"""In what a network can be exported: as it was trained, or as a copy that no runtime rounds otherwise."""

_COPY = "arithmetic"  # on the card of such a copy
_OF_TRAINED = ("test_accuracy", "test_examples", "validation_accuracy", "firing_rates", "preset")
_PACKAGES = ("onnx", "onnxruntime", "tensorflow_serving", "tf2onnx")


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
    def reports(self) -> tuple[Report, ...]:
        """What each of these was verified by."""
        return tuple(export.report_of(path) for path in self.paths)

    @property
    def usage(self) -> str:
        """Commands that use what was written, for a shell in the folder where this process runs."""
        base = self.saved_model.parent
        lines = [f"keras-dsr serve {shlex.quote(str(base))}"]
        if self.request is not None:
            url = f"http://127.0.0.1:8501/v1/models/{base.name}:predict"
            lines += ["", "# then, from another shell:", f"curl -d {shlex.quote(f'@{self.request}')} {url}"]
            whole = [path for path in self.onnx if not re.search("-step(-|$)", path.stem)]
            if whole:
                lines += [
                    "",
                    "# ONNX Runtime, in Python:",
                    "import json, numpy, onnxruntime, pathlib",
                    f"request = json.loads(pathlib.Path({str(self.request)!r}).read_text())",
                    f"x = numpy.array(request['instances'], {self.dtype!r})",
                    f"session = onnxruntime.InferenceSession({str(whole[0])!r})",
                    f"print(session.run(['class', 'probabilities'], {{{self.input_name!r}: x}}))",
                ]
        return "\n".join(lines)


def source(what: str | Path, *, data_dir: Path | None = None, examples: int = 256) -> Source:
    """The network of a run folder, or of a preset.

    Args:
        what: A run folder that `keras_dsr.training.train` filled; or a preset's name, NETWORK-DATA.
        data_dir: Where the data set is, see `keras_dsr.data.load`. A preset goes without if it is `None` and the data
            set is not in the default place.
        examples: How many real inputs to take along, at least 1, from the test part in random order.

    Raises:
        FileNotFoundError: if the folder lacks a file of a finished run, or the data set is not there.
        ValueError: if there is neither such a folder nor such a preset, or `examples` is below 1.
    """
    if examples < 1:
        raise ValueError(f"examples is a number of inputs of at least 1. Received examples={examples}.")
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
        "training": json.loads((folder / "environment.json").read_text(encoding="utf-8")),
    }
    preprocessing = _preprocessing(loaded.input_shape, loaded.mean, loaded.std)
    return Source(recipe.name, model, preprocessing, about, _examples(loaded, preprocessing, examples))


def _of_preset(name: str, data_dir: Path | None, examples: int) -> Source:
    network, _, weights = name.partition("-")
    card, _ = presets.card(network, weights)
    recipe = Recipe.from_json(json.dumps(card.recipe))
    model = recipe.build(len(card.classes), card.input_shape)
    presets.load(model, network, weights)
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
    try:
        found = _examples(training.load(recipe, data_dir=data_dir), preprocessing, examples)
    except (FileNotFoundError, ImportError):
        if data_dir is not None:
            raise
        found = None
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


def check(recipe: Recipe) -> None:
    """Raises an error if what a recipe trains could not be exported here: better before the training than after it.

    Raises:
        ValueError: if its result is a representation network, or its name is none that a served model can have.
        RuntimeError: if Keras does not run on TensorFlow.
        ImportError: if a package of the extra `export` is not installed.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"Export needs Keras on TensorFlow. It runs on {keras.backend.backend()!r}: set KERAS_BACKEND=tensorflow, "
            "or train without --export, and run keras-dsr export where Keras runs on TensorFlow."
        )
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Export needs the packages {', '.join(missing)}. Install them with: pip install 'keras-dsr[export]'."
        )
    if not recipe.timesteps:
        raise ValueError(
            f"Recipe {recipe.name!r} trains a representation network (timesteps=0), which has no spikes to export. "
            "Train it with timesteps=N, or without --export."
        )
    saved_model.check_name(recipe.name)


def deploy(
    given: Source,
    base: Path,
    *,
    onnx: Sequence[str] = ("unrolled",),
    fold_thresholds: bool = False,
    weight_bits: int | None = None,
    arithmetic: str = "float",
    flip_budget: float = 1e-6,
) -> Exported:
    """Exports a network, proves that all that was exported does as the network does, and only then gives it its names.

    Args:
        given: The network.
        base: The folder of all models, such as `savedmodels`. In it a folder of the network's name gets the next
            version, a SavedModel, and beside that ONNX files and a request of the version's number.
        onnx: Forms of ONNX files to write: "unrolled", "loop", "step"; none for no file.
        fold_thresholds: As in `keras_dsr.export.export_onnx`.
        weight_bits: As in `keras_dsr.export.export_onnx`; such files have it in their names.
        arithmetic: "float" for the network as it is; "exact" or "integer" for `keras_dsr.export.exact_copy` or
            `keras_dsr.export.integer_copy` of it in its place, on a grid for all bytes, or for inputs like the
            examples. Then not one spike may be flipped, whatever `flip_budget` says.
        flip_budget: As in `keras_dsr.export.verify`.

    Returns:
        What was written.

    Raises:
        keras_dsr.export.VerificationError: if something exported differs from the network. Nothing is kept.
        ValueError: if the network cannot be exported, or there is no such copy of it.
        ImportError: if a package of the extra `export` is not installed.
    """
    if not onnx and (fold_thresholds or weight_bits is not None):
        raise ValueError(
            "Folded thresholds and weights of few bits are for ONNX files, and none is to be written. Received "
            f"onnx=(), fold_thresholds={fold_thresholds}, weight_bits={weight_bits}; name a form, such as 'unrolled'."
        )
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic is one of {ARITHMETICS}. Received arithmetic={arithmetic!r}.")
    if arithmetic != "float" and weight_bits is not None:
        raise ValueError(
            "Exact networks have kernels of as many bits as their sums allow, and those of whole numbers have 8. "
            f"Received arithmetic={arithmetic!r}, weight_bits={weight_bits}; leave one out."
        )
    folder = base / given.name
    saved_model.check_base(folder)
    if arithmetic != "float":
        given, flip_budget = copied(given, arithmetic), 0.0
    settings = {
        "preprocessing": given.preprocessing,
        "examples": given.examples,
        "about": given.about,
        "flip_budget": flip_budget,
    }
    base.mkdir(parents=True, exist_ok=True)
    with workspace(folder.resolve()) as hidden:
        made: dict[str, Path] = {}
        for form in onnx:
            suffix = _suffix(form, weight_bits)
            made[f"{suffix}.onnx"] = export.export_onnx(
                given.model,
                hidden / f"{given.name}{suffix}.onnx",
                form=form,
                fold_thresholds=fold_thresholds,
                weight_bits=weight_bits,
                **settings,
            )
        if given.examples is not None:
            made["-request.json"] = hidden / "request.json"
            request = json.dumps({"instances": given.examples[:1].tolist()}) + "\n"
            made["-request.json"].write_text(request, encoding="utf-8")
        version = folder / export.export_saved_model(given.model, folder, **settings).name
        placed = {end: path.replace(folder / f"{version.name}{end}") for end, path in made.items()}
    network = Network(given.model, given.preprocessing)
    files = tuple(path for end, path in placed.items() if end.endswith(".onnx"))
    return Exported(version, files, placed.get("-request.json"), network.input_name, network.input_dtype)


def _copy(model: keras.Model, grid: Grid, arithmetic: str) -> keras.Model:
    return {"exact": export.exact_copy, "integer": export.integer_copy}[arithmetic](model, grid)


def copied(given: Source, arithmetic: str) -> Source:
    """What `deploy` exports in the place of a network: its copy with exact sums, or of whole numbers.

    Args:
        given: The network, with examples.
        arithmetic: "exact" or "integer".

    Returns:
        The copy; what it was made with, and how often it gives the network's class, is in `about["arithmetic"]`.

    Raises:
        ValueError: if there are no examples, or the network has no such copy.
    """
    if given.examples is None:
        raise ValueError(
            f"Such a copy of a network is made for real inputs, and the data set of {given.name} is not at hand. Say "
            "where it is: data_dir=... in Python, --data-dir on the command line."
        )
    prepared = given.examples if given.preprocessing is None else np.asarray(given.preprocessing(given.examples))
    if given.preprocessing is not None and given.preprocessing.dtype == "uint8":
        grid = Grid.of_bytes(given.preprocessing, prepared.shape[-1])
    else:
        grid = Grid.of(prepared)
    model = _copy(given.model, grid, arithmetic)
    answers = [np.argmax(each.predict(prepared, batch_size=32, verbose=0), axis=-1) for each in (given.model, model)]
    copy = {
        "kind": arithmetic,
        "input_step": grid.step,
        "input_limit": grid.limit,
        "largest_sum_bits": max(export.largest_sums(model).values()),
        "same_class_as_trained": float(np.mean(answers[0] == answers[1])),
        "examples": len(prepared),
        "sha256": _sha256(model),
    }
    # What was found of the trained network is not said of this one.
    about = {key: value for key, value in given.about.items() if key not in _OF_TRAINED}
    trained = {key: given.about[key] for key in _OF_TRAINED if key in given.about}
    return dataclasses.replace(given, model=model, about={**about, "trained": trained, _COPY: copy})


def _sha256(model: keras.Model) -> str:
    """Of a model's weights."""
    found = hashlib.sha256()
    for weight in model.get_weights():
        found.update(np.ascontiguousarray(weight).tobytes())
    return found.hexdigest()


def _as_exported(given: Source, version: Path) -> tuple[Source, bool]:
    """The network that a version was exported of, and whether that is a copy of it, which its card says."""
    path = version / cards.CARD
    if not path.is_file():
        return given, False
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        copy = written["about"].get(_COPY)
        if copy is None:
            return given, False
        grid = Grid(float(copy["input_step"]), float(copy["input_limit"]))
        kind, sha256, maker = copy["kind"], copy["sha256"], written["versions"]["keras_dsr"]
        if kind not in ARITHMETICS[1:]:
            raise ValueError(f"arithmetic of kind {kind!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The card {path} is damaged ({error!r}). Export the version again.") from error
    model = _copy(given.model, grid, kind)
    if _sha256(model) != sha256:
        raise ValueError(
            f"{version} was exported as the {kind} copy of another network, or by a keras_dsr that rounds otherwise "
            f"({maker}; this is {keras_dsr.__version__}). Export it again."
        )
    return dataclasses.replace(given, model=model), True


def _suffix(form: str, weight_bits: int | None) -> str:
    """What the name of an ONNX file has after the version's number."""
    bits = "" if weight_bits is None else f"-{weight_bits}bit"
    return bits if form == "unrolled" else f"-{form}{bits}"


def verify(given: Source, folder: Path, onnx: Sequence[Path] = (), *, flip_budget: float = 1e-6) -> Report:
    """Compares a network with what was exported of it, again: with a copy of it, where that was exported.

    Args:
        given: The network, with examples.
        folder: The folder of a SavedModel's version; or of all versions, for the newest.
        onnx: ONNX files; if there are none, those beside the version that have its number.
        flip_budget: As in `keras_dsr.export.verify`; of such a copy no spike may be flipped.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: if there is no version in the folder.
        ValueError: if there are no examples, the version's card is damaged, or the copy of the network is not the
            one that was exported.
    """
    if given.examples is None:
        raise ValueError(
            f"To verify takes real inputs, and the data set of {given.name} is not at hand. Say where it is: "
            "data_dir=... in Python, --data-dir on the command line."
        )
    folder = folder.resolve()
    if not (folder / "saved_model.pb").is_file():
        versions = tf_serving.versions(folder)
        if not versions:
            raise FileNotFoundError(f"There is no version of a SavedModel in {folder}: no folder named by a number.")
        folder = folder / str(versions[-1])
    given, is_copy = _as_exported(given, folder)
    named = re.compile(rf"{re.escape(folder.name)}(-loop|-step)?(-\d+bit)?")
    beside = sorted(path for path in folder.parent.glob("*.onnx") if named.fullmatch(path.stem))
    return export.verify(
        given.model,
        given.examples,
        saved_model=folder,
        onnx=tuple(onnx) or beside,
        preprocessing=given.preprocessing,
        flip_budget=0.0 if is_copy else flip_budget,
    )

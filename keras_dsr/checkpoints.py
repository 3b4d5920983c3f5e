"""One file with all that a training needs to go on: weights, optimizer, seeds, and how far it came.

`save` and `restore` are exact: a run that was killed and goes on from its last epoch ends with the weights of a run
that was not. The file appears whole or not at all.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import backend
from keras_dsr.files import replacing, synchronize

# Names of arrays of the progress begin so.
_BESIDE = "progress/"
# Of the array that says which arrays are of a dtype that NumPy's files do not know.
_DTYPES = "progress.dtypes"


def _variables(model: keras.Model) -> dict[str, Any]:
    """All variables of a compiled model by a name each: weights, seeds of dropout, the optimizer's; not metrics'.

    Their paths will not do: Keras numbers what has no name, seeds among it, by what else the process made before.
    """
    metrics = {id(variable) for variable in model.metrics_variables}
    found = [variable for variable in model.variables if id(variable) not in metrics]
    model.optimizer.build(model.trainable_variables)
    named = {f"model/{number}/{variable.name}": variable for number, variable in enumerate(found)}
    return named | {f"optimizer/{number}": variable for number, variable in enumerate(model.optimizer.variables)}


def save(
    path: Path, model: keras.Model, progress: dict[str, Any], write: bool = True, previous: Path | None = None
) -> None:
    """Writes a checkpoint.

    Args:
        path: The file; it is replaced as a whole.
        model: A built and compiled model.
        progress: What else to keep, as JSON can hold it; it may have NumPy arrays in it.
        write: Whether this process writes it. Of several processes that train a model together all call this, as each
            may have a part of the weights, and one writes.
        previous: Where the file that was at `path` goes. A process that is killed as the new one takes its place may
            leave `previous` alone. `None` not to keep it.
    """
    arrays = {name: backend.to_numpy(variable.value) for name, variable in _variables(model).items()}
    if not write:
        return
    plain = json.dumps(_without_arrays(progress, arrays))
    arrays = _as_bytes(arrays)
    with replacing(path) as beside:
        with beside.open("wb") as file:
            np.savez(file, progress=np.asarray(plain), **arrays)
        if previous is not None and path.is_file():
            synchronize(beside)
            path.replace(previous)
    synchronize(path.parent)


def _without_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The same with names in place of arrays, which are put beside those that are there."""
    if isinstance(value, dict):
        return {name: _without_arrays(each, arrays) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_arrays(each, arrays) for each in value]
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    name = f"{_BESIDE}{len(arrays)}"
    arrays[name] = np.asarray(value)
    return {_BESIDE: name}


def _with_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `_without_arrays` was given."""
    if isinstance(value, dict):
        if list(value) == [_BESIDE]:
            return arrays[value[_BESIDE]]
        return {name: _with_arrays(each, arrays) for name, each in value.items()}
    return [_with_arrays(each, arrays) for each in value] if isinstance(value, list) else value


def is_extension(dtype: np.dtype) -> bool:
    """Whether a dtype is of another package than NumPy, as bfloat16 is."""
    return dtype.isbuiltin == 2


def _as_bytes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays that NumPy's files can hold; if dtypes of other packages are among them, with the names of these."""
    dtypes = {name: array.dtype.name for name, array in arrays.items() if is_extension(array.dtype)}
    if not dtypes:
        return arrays
    plain = {name: arrays[name].view(f"V{arrays[name].itemsize}") for name in dtypes}
    return arrays | plain | {_DTYPES: np.asarray(json.dumps(dtypes))}


def _from_bytes(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What `_as_bytes` was given; of files that were written without names, too."""
    # bfloat16 is the only one of two bytes.
    dtypes = {name: "bfloat16" for name, array in arrays.items() if array.dtype == "V2"}
    if _DTYPES in arrays:
        dtypes |= json.loads(str(arrays.pop(_DTYPES)))
    return arrays | {name: arrays[name].view(dtype) for name, dtype in dtypes.items()}


def progress(path: Path) -> dict[str, Any]:
    """What `save` was given as progress.

    Raises:
        ValueError: if the file is no checkpoint.
    """
    arrays = _read(path)
    return _with_arrays(json.loads(str(arrays["progress"])), arrays)


def restore(path: Path, model: keras.Model) -> None:
    """Gives a model and its optimizer the values of a checkpoint.

    Args:
        path: A file that `save` wrote.
        model: A built and compiled model of the same kind.

    Raises:
        ValueError: if the file is no checkpoint, or one of another model or optimizer.
    """
    variables = _variables(model)
    arrays = _read(path)
    expected = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: array.shape for name, array in arrays.items() if not name.startswith("progress")}
    if found != expected:
        differing = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise ValueError(
            f"{path} is the checkpoint of another model or optimizer. Received {len(found)} arrays where the model "
            f"has {len(expected)} variables; among what differs: {differing}."
        )
    for name, variable in variables.items():
        variable.assign(arrays[name])


def copy(source: keras.Model, target: keras.Model) -> None:
    """Gives a model and its optimizer the values of another.

    Args:
        source: The model that has them, built and compiled; it may be spread over devices.
        target: The one that gets them: of the same kind, though it may compute in another precision.
    """
    for theirs, own in zip(_variables(source).values(), _variables(target).values(), strict=True):
        own.assign(backend.to_numpy(theirs.value))


def _read(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint; a ValueError if the file is none, or is damaged anywhere."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = _from_bytes(dict(archive))
    except (zipfile.BadZipFile, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint, or is damaged: {error}.") from error
    if "progress" not in arrays:
        raise ValueError(f"{path} is not a checkpoint: it does not say how far a training came.")
    return arrays

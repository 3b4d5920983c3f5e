"""The examples in docstrings run, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import helpers
import keras
import pytest

import keras_dsr
import keras_dsr.analysis
import keras_dsr.callbacks

OTHER_BACKEND = {"jax": "keras_dsr.backend.tensorflow", "tensorflow": "keras_dsr.backend.jax"}[helpers.BACKEND]
MODULES = sorted(
    found.name
    for found in pkgutil.walk_packages(keras_dsr.__path__, "keras_dsr.")
    if found.name != OTHER_BACKEND and not found.name.endswith("__main__")
)


def load(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in helpers.OPTIONAL:
            raise
        pytest.skip(f"{name} needs an optional package: {error}")


def public_names():
    names = {"keras": keras, "keras_dsr": keras_dsr}
    for module in (keras_dsr.models, keras_dsr.layers, keras_dsr):
        names |= {name: getattr(module, name) for name in module.__all__ if not name.startswith("__")}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith("keras_dsr.export") and helpers.BACKEND != "tensorflow":
        pytest.skip("export runs on TensorFlow alone")
    module = load(name)
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(verbose=False)
    output = []
    for example in finder.find(module, module.__name__, globs={**public_names(), **vars(module)}):
        runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    count = sum(len(test.examples) for name in MODULES for test in finder.find(load(name), name))
    assert count >= 15


@pytest.mark.parametrize("name", ["keras_dsr", "keras_dsr.layers", "keras_dsr.models", "keras_dsr.analysis"])
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        if not public.startswith("__"):
            assert inspect.getdoc(getattr(module, public)), public


def functions_and_classes():
    for module in (keras_dsr.analysis, keras_dsr.callbacks):
        names = getattr(module, "__all__", [n for n, each in vars(module).items() if inspect.isclass(each)])
        for name in names:
            found = getattr(module, name)
            if callable(found) and not name.startswith("_") and found.__module__.startswith(module.__name__):
                yield pytest.param(found, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("found", list(functions_and_classes()))
def test_what_is_taken_and_given_is_described(found):
    described = inspect.getdoc(found)
    assert described
    for name in inspect.signature(found).parameters:
        assert f"{name}:" in described, f"{found.__name__} does not describe {name}"
    if inspect.isfunction(found):
        assert "Returns:" in described or "Yields:" in described


@pytest.mark.parametrize("make", [getattr(keras_dsr.layers, name) for name in keras_dsr.layers.__all__])
def test_arguments_are_described(make):
    described = inspect.getdoc(make)
    for name, parameter in inspect.signature(make.__init__).parameters.items():
        if name == "self" or make is keras_dsr.layers.SpikingNeuron or make.__init__ is keras.layers.Layer.__init__:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        assert f"{name}:" in described, f"{make.__name__} does not describe {name}"

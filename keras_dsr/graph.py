"""Walking a functional model: what its layers are called with, those of sub-models too.

Keras has no public way to run a model's graph with something else in place of its layers, so this is the one place
that uses its private one (`Functional._run_through_graph`, which `keras.models.clone_model` is made of).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

Call = Callable[..., Any]


def walk(model: keras.Model, inputs: Any, replace: Callable[[str, Any], Call], prefix: str = "") -> Any:
    """Runs a model's graph with another function in place of each of its layers and operations.

    Args:
        model: A functional or Sequential model.
        inputs: What stands for its inputs; need not be tensors.
        replace: From the name of a layer and the layer itself to the function that is called in its place, with what
            the layer would be called with. A layer within a sub-model has the sub-model's name, and "_", before its
            own. For sub-models themselves it is not asked.
        prefix: Put before all names.

    Returns:
        What stands for the model's outputs.

    Raises:
        ValueError: if the model has no graph.
    """

    def function(operation: Any) -> Call:
        if isinstance(operation, (keras.Sequential, keras.Model)):
            return lambda inputs, **_: walk(operation, inputs, replace, f"{prefix}{operation.name}_")
        return replace(f"{prefix}{operation.name}", operation)

    return _functional(model)._run_through_graph(inputs, operation_fn=function)


def _functional(model: keras.Model) -> Any:
    if isinstance(model, keras.Sequential) and model.built:
        model = model._functional
    if not hasattr(model, "_run_through_graph"):
        raise ValueError(
            f"Model {model.name!r} is not a functional model, or a Sequential one that is built: its layers cannot be "
            "told apart. Make one with keras.Model(inputs, outputs)."
        )
    return model

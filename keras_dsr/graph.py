"""Walking a functional model: what its layers are called with, those of sub-models too.

Keras has no public way to run a model's graph with something else in place of its layers, so this is the one place
that uses its private one (`Functional._run_through_graph`, which `keras.models.clone_model` is made of).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

Call = Callable[..., Any]


def walk(model: keras.Model, inputs: Any, replace: Callable[[str, Any], Call], prefix: str = "") -> Any:
    """Runs a model's graph, in inference, with another function in place of each of its layers and operations.

    Args:
        model: A functional or Sequential model.
        inputs: What stands for its inputs; need not be tensors.
        replace: From the name of a layer and the layer itself to the function that is called in its place, with what
            the layer would be called with: `training=False` too, for layers. A layer within a sub-model has the
            sub-model's name, and "_", before its own. For sub-models themselves it is not asked.
        prefix: Put before all names.

    Returns:
        What stands for the model's outputs.

    Raises:
        ValueError: if the model has no graph.
    """

    def function(operation: Any) -> Call:
        if isinstance(operation, (keras.Sequential, keras.Model)):
            return lambda inputs, **_: walk(operation, inputs, replace, f"{prefix}{operation.name}_")
        call = replace(f"{prefix}{operation.name}", operation)
        if not isinstance(operation, keras.Layer):
            return call
        # As model(inputs, training=False) does, whatever the graph says: some layers train unless they are told.
        return lambda *args, **kwargs: call(*args, **{**kwargs, "training": False})

    return functional(model)._run_through_graph(inputs, operation_fn=function)


def calls(model: keras.Model) -> list[tuple[str, Any, Any]]:
    """The layers and operations of a model, those of sub-models too, in the order in which they run.

    Args:
        model: A functional or Sequential model.

    Returns:
        For each call the name, as `walk` has it; the layer or operation; and its first argument, in symbolic tensors.

    Raises:
        ValueError: if the model has no graph.
    """
    found = []

    def note(name: str, operation: Any) -> Call:
        def call(inputs: Any = None, *_: Any, **__: Any) -> Any:
            found.append((name, operation, inputs))
            return operation.output

        return call

    walk(model, functional(model).inputs, note)
    return found


def standardized(model: keras.Model, x: Any) -> Any:
    """A model's input as the model makes it of what it is given: of its own dtype, and with a last axis of one.

    `walk` begins behind this. Keras does it in calls of a functional model, and not of its graph.

    Args:
        model: A functional or Sequential model with one input.
        x: What it is given, such as images in whole numbers.
    """
    like = functional(model).inputs[0]
    x = ops.cast(x, like.dtype)
    rank, wanted = len(x.shape), len(like.shape)
    if rank == wanted - 1 and like.shape[-1] == 1:
        return ops.expand_dims(x, -1)
    return ops.squeeze(x, -1) if rank == wanted + 1 and x.shape[-1] == 1 else x


def functional(model: keras.Model) -> Any:
    """The functional model that has a model's graph: itself, or what a Sequential one is made of.

    Raises:
        ValueError: if the model has no graph.
    """
    found = model._functional if isinstance(model, keras.Sequential) and model.built else model
    if not hasattr(found, "_run_through_graph"):
        raise ValueError(
            f"Model {model.name!r} is not a functional model, or a Sequential one that is built: its layers cannot be "
            "told apart. Make one with keras.Model(inputs, outputs)."
        )
    return found

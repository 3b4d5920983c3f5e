"""Changing the number of time steps of a model."""

from __future__ import annotations

from typing import Any

import keras

from keras_dsr.layers import SpikingNeuron, ToStream
from keras_dsr.layers.neurons import check_representation_steps, check_timesteps


def with_timesteps(model: keras.Model, timesteps: int, representation_steps: int | None = None) -> keras.Model:
    """The same model with another number of time steps, and a copy of its weights.

    All layers that make a stream get the new number: neurons on a static input, and `ToStream`. With 0 the result is
    the representation network: an ordinary ANN of clamps, one pass, with the same weights in the same order. So a
    network can train as an ANN first and go on with spikes (the paper's hybrid training), or run with more or fewer
    steps than it trained with.

    Args:
        model: A functional or Sequential model.
        timesteps: Number N of time steps; 0 for the representation network. A model on frames (batch, time, ...) has
            as many steps as its input: for it, only 0 and that number make sense.
        representation_steps: With `timesteps` 0: each neuron puts out what so many steps of a constant current give,
            and not the clamp itself. It is still one pass, and its error is all of the spiking network's but that of
            spikes which come unevenly. `None` for the clamp.

    Returns:
        A new, uncompiled model. Its weights are copies.

    Raises:
        ValueError: if no layer of the model makes a stream, `timesteps` is below 0, or `representation_steps` is given
            beside time steps or is below 1.

    Example:

    >>> snn = small_cnn(timesteps=8)
    >>> ann = with_timesteps(snn, 0)
    >>> len(ann.weights) == len(snn.weights)
    True

    Reference: Meng et al., CVPR 2022, Appendix (hybrid training on ImageNet).
    """
    if check_timesteps(timesteps) is None:
        raise ValueError("timesteps is the number of time steps, or 0. Received timesteps=None.")
    if check_representation_steps(representation_steps) is not None and timesteps:
        raise ValueError(
            "representation_steps is for a representation network, timesteps=0. Received "
            f"timesteps={timesteps!r}, representation_steps={representation_steps!r}."
        )
    changed = []

    def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
        config: dict[str, Any] = layer.get_config()
        if isinstance(layer, ToStream) or (isinstance(layer, SpikingNeuron) and layer.timesteps is not None):
            changed.append(layer.name)
            config["timesteps"] = timesteps
        if isinstance(layer, SpikingNeuron):
            config["representation_steps"] = representation_steps
        return type(layer).from_config(config)

    new = keras.models.clone_model(model, clone_function=clone, recursive=True)
    if not changed:
        raise ValueError(
            f"No layer of model {model.name!r} makes a stream: with_timesteps changes neurons with timesteps=... and "
            "ToStream layers."
        )
    new.set_weights(model.get_weights())
    return new

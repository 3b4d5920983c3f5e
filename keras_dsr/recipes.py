"""Recipes: everything that decides a training run, as frozen, printable settings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import keras

from keras_dsr import models
from keras_dsr.models.common import NEURONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run.

    Args:
        name: What the command line calls it.
        summary: One line about it.
        data: Name of the data set, see `keras_dsr.data.images`.
        widths: Channels of the convolutions of `keras_dsr.models.small_cnn`.
        neuron: "if" or "lif".
        timesteps: Number N of time steps; 0 trains the representation network.
        threshold: Initial threshold V_th of each neuron layer.
        alpha: Neurons fire at alpha V_th.
        dropout: Rate of the dropout ahead of the dense layer.
        epochs: Passes over the training part.
        batch_size: Images in a batch.
        learning_rate: Initial learning rate of Adam; it falls to 0 along a cosine.
        shift: Augmentation: pixels by which an image may move.
        seed: Seed of weights, order, augmentation and dropout.

    Raises:
        ValueError: if a number is out of range.
    """

    name: str
    summary: str
    data: str
    widths: tuple[int, ...]
    neuron: str
    timesteps: int
    threshold: float
    alpha: float
    dropout: float
    epochs: int
    batch_size: int
    learning_rate: float
    shift: int
    seed: int

    def __post_init__(self) -> None:
        for field, least in (("epochs", 1), ("batch_size", 1), ("timesteps", 0), ("seed", 0), ("shift", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be {least} or more. Received {field}={getattr(self, field)!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0. Received learning_rate={self.learning_rate!r}.")

    def build(self, classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
        """The recipe's network, not yet compiled.

        Args:
            classes: Number of classes.
            input_shape: Height, width and channels of an image.
        """
        if self.neuron not in NEURONS:
            raise ValueError(f"neuron is one of {sorted(NEURONS)}. Received neuron={self.neuron!r}.")
        return models.small_cnn(
            widths=self.widths,
            neuron=NEURONS[self.neuron](threshold=self.threshold, alpha=self.alpha),
            timesteps=self.timesteps,
            classes=classes,
            input_shape=input_shape,
            dropout=self.dropout,
            name=self.name,
        )

    def to_json(self) -> str:
        """The recipe as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: if settings are missing or unknown.
        """
        settings: dict[str, Any] = json.loads(text)
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(settings) != fields:
            raise ValueError(
                f"A recipe has the settings {sorted(fields)}. "
                f"Missing: {sorted(fields - set(settings))}. Unknown: {sorted(set(settings) - fields)}."
            )
        return cls(**{**settings, "widths": tuple(settings["widths"])})


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="digits",
            summary="A small convolutional IF network on scikit-learn's 8x8 handwritten digits",
            data="digits",
            widths=(32, 64, 64),
            neuron="if",
            timesteps=8,
            threshold=2.0,
            alpha=0.5,
            dropout=0.2,
            epochs=30,
            batch_size=32,
            learning_rate=2e-3,
            shift=1,
            seed=0,
        ),
    )
}


def get(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: if there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"A recipe is one of {sorted(RECIPES)}. Received {name!r}.")
    return RECIPES[name]

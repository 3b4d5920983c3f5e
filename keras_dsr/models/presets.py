"""Trained weights: packed with a card that says where they come from, and checked as they are loaded.

A preset is three files: `NAME.json`, the card; `NAME.npz`, the weights, whose sha256 the card states; `NAME.csv`, the
history of the training. Those that come with the package need no network. `keras-dsr pack RUN CARD` makes one of a run
of your own, which the networks of `keras_dsr.models` take by the path of its card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr.files import replacing
from keras_dsr.layers.neurons import SpikingNeuron
from keras_dsr.models.common import NEURONS

FOLDER = Path(__file__).parent / "weights"
"""Where the package keeps its presets, by names of the form NETWORK-DATA."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What is to be known about trained weights.

    Args:
        network: Name and depth of the network, such as "preact_resnet20".
        version: Counts up when the weights of this name are trained anew.
        neuron: "if" or "lif".
        neuron_settings: Arguments of the neuron layers.
        timesteps: Number N of time steps that the network was trained with.
        classes: Names of the classes, by label.
        input_shape: Shape of one input, as the network was trained.
        mean: Of each channel, to subtract from inputs as the data set stores them (images: 0 to 255).
        std: Of each channel, to divide by.
        data: Name of the data set.
        test_accuracy: On the data set's test part.
        test_examples: Their number.
        validation_accuracy: On examples set aside from the training part; `None` if none were.
        firing_rates: Spikes per neuron and time step on test examples, for each neuron layer.
        recipe: All settings of the training.
        environment: Versions, machine and commit of the training.
        weight_bits: Bits of a weight; `None` for floats.
        stem: First layers of a PreAct-ResNet: "cifar" or "imagenet".
        sha256: Of the file of weights.
    """

    network: str
    version: int
    neuron: str
    neuron_settings: dict[str, Any]
    timesteps: int
    classes: tuple[str, ...]
    input_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    test_accuracy: float
    test_examples: int
    validation_accuracy: float | None
    firing_rates: dict[str, float]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    weight_bits: int | None = None
    stem: str = "cifar"
    sha256: str = ""

    @property
    def builder(self) -> str:
        """The call that builds the network, but for the weights and the closing bracket."""
        name, depth = re.fullmatch(r"([a-z_]+?)(\d+)", self.network).groups()
        call = f"keras_dsr.models.{name}(depth={depth}, neuron={self.neuron!r}, classes={len(self.classes)}"
        stem = f", stem={self.stem!r}" if self.stem != "cifar" else ""
        return f"{call}, input_shape={self.input_shape}{stem}"


def names(network: str = "") -> list[str]:
    """The presets that come with the package, of one network or of all, as "NETWORK-DATA"."""
    return sorted(path.stem for path in FOLDER.glob(f"{network}*.json"))


def card(network: str, weights: str | Path) -> tuple[Card, Path]:
    """The card of a preset.

    Args:
        network: Name and depth of the network, such as "preact_resnet20".
        weights: The data set that a preset of the package was trained on, such as "cifar10"; or the path of a card.

    Returns:
        The card, and the path of its file.

    Raises:
        ValueError: if there is no such preset, or it is one of another network.
        FileNotFoundError: if a path was given and there is no card.
    """
    path = Path(weights)
    if path.suffix != ".json":
        path = FOLDER / f"{network}-{weights}.json"
        if not path.is_file():
            known = ", ".join(names()) or "none"
            raise ValueError(
                f"There are no weights {str(weights)!r} for {network}. Those that come with the package, as "
                f"NETWORK-DATA: {known}. Weights of your own are named by the path of their card, a .json file."
            )
    elif not path.is_file():
        raise FileNotFoundError(f"There is no card at {path}. keras-dsr pack RUN CARD makes one.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        found = Card(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the card of a preset, or is damaged: {error}.") from error
    if found.network != network:
        raise ValueError(f"{path} has weights for {found.network}. Received a network {network}.")
    return found, path


def settings(
    network: str,
    weights: str | Path,
    neuron: str | SpikingNeuron,
    timesteps: int | None,
    classes: int,
    weight_bits: int | None,
    stem: str = "cifar",
) -> tuple[str | SpikingNeuron, int, int | None]:
    """Neuron, number of time steps and bits of a weight of a network that is to get a preset's weights.

    Args:
        network: Name and depth of the network.
        weights: The preset.
        neuron: What the network was asked to have; "if" and "lif" mean the preset's own neurons, if they are such.
        timesteps: What the network was asked to have; `None` means the preset's own number.
        classes: Number of classes of the network.
        weight_bits: What the network was asked to have; `None` means the preset's own.
        stem: First layers of the network.

    Raises:
        ValueError: if the preset has other neurons, another number of classes, weights of other bits or another stem.
    """
    found, path = card(network, weights)
    asked = neuron if isinstance(neuron, str) else next((k for k, v in NEURONS.items() if type(neuron) is v), None)
    if asked != found.neuron:
        raise ValueError(f"{path.stem} was trained with {found.neuron!r} neurons. Received neuron={neuron!r}.")
    if classes != len(found.classes):
        raise ValueError(f"{path.stem} has {len(found.classes)} classes. Received classes={classes!r}.")
    if weight_bits not in (None, found.weight_bits):
        raise ValueError(
            f"{path.stem} was trained with weight_bits={found.weight_bits}. Received weight_bits={weight_bits!r}."
        )
    if stem != found.stem:
        raise ValueError(f"{path.stem} was trained with stem={found.stem!r}. Received stem={stem!r}.")
    if isinstance(neuron, str):
        neuron = NEURONS[neuron](**found.neuron_settings)
    return neuron, found.timesteps if timesteps is None else timesteps, found.weight_bits


def load(model: keras.Model, network: str, weights: str | Path) -> None:
    """Gives a model the weights of a preset.

    Raises:
        ValueError: if the file of weights is not the one that the card speaks of, or has other weights than the model.
        FileNotFoundError: if it is not there.
    """
    found, path = card(network, weights)
    file = path.with_suffix(".npz")
    if not file.is_file():
        raise FileNotFoundError(f"The weights that {path.name} speaks of are not there: no file {file}.")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != found.sha256:
        raise ValueError(
            f"{file} is damaged or not the file that its card speaks of. Expected sha256 {found.sha256}, received "
            f"{digest}. Install the package again, or fetch the file again."
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = list(archive.values())
    expected = [tuple(weight.shape) for weight in model.weights]
    if [array.shape for array in arrays] != expected:
        raise ValueError(
            f"{file} has {len(arrays)} weights of other shapes than the {len(expected)} of model {model.name!r}; its "
            f"inputs are {found.input_shape}."
        )
    model.set_weights(arrays)


def pack(model: keras.Model, about: Card, history: str, path: Path) -> Card:
    """Writes a preset: the card last, so that there is none without its weights.

    Args:
        model: The trained model.
        about: Its card, without sha256.
        history: The history of its training, as CSV.
        path: Path of the card, ending in .json; the other files stand beside it. Its folder must exist.

    Returns:
        The card, with sha256.

    Raises:
        ValueError: if the path does not end in .json.
    """
    if path.suffix != ".json":
        raise ValueError(f"A card is a .json file. Received {path}.")
    arrays: Mapping[str, np.ndarray] = {
        f"{number:04d}/{weight.path}": np.asarray(weight.value) for number, weight in enumerate(model.weights)
    }
    with replacing(path.with_suffix(".npz")) as beside:
        with beside.open("wb") as file:
            np.savez(file, **arrays)
        digest = hashlib.sha256(beside.read_bytes()).hexdigest()
    with replacing(path.with_suffix(".csv")) as beside:
        beside.write_text(history, encoding="utf-8")
    complete = dataclasses.replace(about, sha256=digest)
    with replacing(path) as beside:
        beside.write_text(json.dumps(dataclasses.asdict(complete), indent=2) + "\n", encoding="utf-8")
    return complete

"""Recipes: everything that decides a training run, as frozen, printable settings.

`RECIPES` has the paper's settings and a few of our own by name, `EXPERIMENTS` the groups that its tables and figures
are, `REPORTED` the accuracies that the paper states for them.

Reference: Meng et al., "Training High-Performance Low-Latency Spiking Neural Networks by Differentiation on Spike
Representation", CVPR 2022, Section 5 and Appendix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from keras_dsr import models
from keras_dsr.layers import SpikingNeuron
from keras_dsr.layers.quantized import check_bits
from keras_dsr.models.common import NEURONS
from keras_dsr.models.preact_resnet import DEPTHS as PREACT_RESNET_DEPTHS
from keras_dsr.models.vgg import DEPTHS as VGG_DEPTHS

NETWORKS = ("preact_resnet", "vgg", "small_cnn")
OPTIMIZERS = ("sgd", "adam")
SELECTIONS = ("best", "last")
PRECISIONS = ("float32", "mixed_bfloat16")
STEMS = ("cifar", "imagenet")
_DEPTHS = {"preact_resnet": PREACT_RESNET_DEPTHS, "vgg": VGG_DEPTHS}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One stage of a training; the last one's network is the result.

    Args:
        name: "representation", "quantized" or "spiking".
        number: Of the stage, from 0.
        timesteps: Number of time steps of its network; 0 for the representation network.
        representation_steps: As in the neuron layers.
        epochs: Passes over the training part.
        optimizer: "sgd" or "adam".
        learning_rate: Largest learning rate; it falls to 0 along a cosine.
        weight_decay: Factor on every weight that joins its gradient (SGD only).
        last: Whether it is the last.
    """

    name: str
    number: int
    timesteps: int
    representation_steps: int | None
    epochs: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    last: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a training run. Defaults are the paper's for CIFAR-10 with IF neurons.

    Args:
        name: What the command line calls it.
        summary: One line about it.
        data: Name of the data set, see `keras_dsr.data`.
        network: "preact_resnet", "vgg" or "small_cnn", see `keras_dsr.models`.
        depth: Depth of a PreAct-ResNet or VGG.
        widths: Channels of the convolutions of a "small_cnn".
        stem: First layers of a PreAct-ResNet: "cifar" or "imagenet".
        neuron: "if" or "lif".
        timesteps: Number N of time steps, of event frames too; 0 trains the representation network.
        threshold: Initial threshold V_th of each neuron layer.
        train_threshold: Whether thresholds train; see `hybrid_train_threshold` too.
        threshold_lower_bound: Least value of a threshold.
        threshold_gradient_scale: Factor on a threshold's gradient; `None` for the neuron's default.
        threshold_l2: L2 regularization of thresholds: the loss gets this times the sum of their squares. It is beside
            `weight_decay`, which is for all weights.
        corner_width: Width of the corners of the neurons' clamp in the gradient, as a part of V_th; 0 for the paper's
            gradient.
        alpha: Neurons fire at alpha V_th. 1 is the plain neuron, without the paper's firing mechanism.
        tau: Membrane time constant of LIF neurons, in the unit of `dt`.
        dt: Length of a time step of LIF neurons.
        weight_bits: Bits of a weight; `None` for floats.
        precision: What training computes in: "float32", or "mixed_bfloat16", for processors that have bfloat16
            (weights, membrane potentials and statistics stay float32). The trained network is float32 either
            way.
        dropout: Rate of the dropout ahead of the dense layer.
        epochs: Passes over the training part, with spikes.
        batch_size: Examples in a batch.
        optimizer: "sgd" or "adam".
        learning_rate: Largest learning rate of the training with spikes; it falls to 0 along a cosine.
        momentum: Momentum of SGD.
        weight_decay: Factor on every weight, thresholds included, that joins its gradient (SGD only).
        warmup_steps: Updates over which the learning rate of each stage rises from 0; at most a fifth of all of them.
        augmentation: Random changes to training inputs, see `keras_dsr.data.augmentation.Augmentation`.
        padding: Pixels that the augmentation "crop" pads.
        cutout: Side of the square that the augmentation "cutout" blanks, in pixels.
        size: Height and width of the inputs, for folders of images and for event frames; none for the data set's own.
        slicing: Event frames of equal "number" of events or of equal "time".
        sensor: Height and width of the camera, for folders of event recordings that do not tell it; none for all else.
        skip_corrupt: Whether images of a folder, or recordings, that cannot be read are left out, with a warning that
            lists them; if not, the first one ends the training.
        validation: How many training images are set aside for validation, or which part of the recordings, 0 for none;
            `None` for the data set's default.
        train_examples: How many training examples are used, with equal parts of each class; `None` for all.
        selection: Which weights are the result: of the epoch that is "best" on the validation part, or of the "last".
        hybrid_epochs: Passes over the training part as representation network, before thresholds are calibrated on its
            activations and training goes on with spikes; 0 for none.
        hybrid_optimizer: Optimizer of those passes, "sgd" or "adam".
        hybrid_learning_rate: Largest learning rate of those passes.
        hybrid_weight_decay: Weight decay of those passes (SGD only).
        hybrid_percentile: Of the activations, which becomes the threshold; 100 for the maximum.
        hybrid_train_threshold: Whether thresholds, once calibrated, train with spikes; if not, they stay.
        hybrid_quantized_epochs: Passes after that, still as representation network, in which neurons put out what
            `timesteps` steps of a constant current give: weights learn to live with the quantization error (Eqs. 18 and
            21), and with thresholds that stay as they were calibrated, at the cost of an ANN. 0 for none.
        hybrid_quantized_learning_rate: Largest learning rate of those passes; optimizer and weight decay are those of
            the passes before.
        seed: Seed of weights, order, augmentation and dropout.

    Raises:
        ValueError: if a setting is out of range.
    """

    name: str
    summary: str
    data: str = "cifar10"
    network: str = "preact_resnet"
    depth: int = 18
    widths: tuple[int, ...] = ()
    stem: str = "cifar"
    neuron: str = "if"
    timesteps: int = 20
    threshold: float = 6.0
    train_threshold: bool = True
    threshold_lower_bound: float = 0.01
    threshold_gradient_scale: float | None = None
    threshold_l2: float = 0.0
    corner_width: float = 0.0
    alpha: float = 0.5
    tau: float = 1.0
    dt: float = 0.05
    weight_bits: int | None = None
    precision: str = "float32"
    dropout: float = 0.0
    epochs: int = 200
    batch_size: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_steps: int = 400
    augmentation: tuple[str, ...] = ("crop", "flip")
    padding: int = 4
    cutout: int = 16
    size: tuple[int, ...] = ()
    slicing: str = "number"
    sensor: tuple[int, ...] = ()
    skip_corrupt: bool = False
    validation: float | None = None
    train_examples: int | None = None
    selection: str = "best"
    hybrid_epochs: int = 0
    hybrid_optimizer: str = "sgd"
    hybrid_learning_rate: float = 0.1
    hybrid_weight_decay: float = 5e-4
    hybrid_percentile: float = 99.9
    hybrid_train_threshold: bool = True
    hybrid_quantized_epochs: int = 0
    hybrid_quantized_learning_rate: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.validation is not None and not self.validation >= 0:
            raise ValueError(f"validation must be 0 or more, or None. Received validation={self.validation!r}.")
        for field in ("size", "sensor"):
            if len(getattr(self, field)) not in (0, 2):
                raise ValueError(
                    f"{field} is height and width, such as 32,32. Received {field}={getattr(self, field)!r}."
                )
        if self.validation == 0 and self.selection == "best":
            raise ValueError(
                "The best epoch is chosen on validation examples. Received validation=0, selection='best'; set "
                "selection='last'."
            )
        for field, least in (
            ("epochs", 0),
            ("hybrid_epochs", 0),
            ("hybrid_quantized_epochs", 0),
            ("batch_size", 1),
            ("timesteps", 0),
            ("warmup_steps", 0),
            ("padding", 1),
            ("cutout", 1),
            ("momentum", 0),
            ("weight_decay", 0),
            ("hybrid_weight_decay", 0),
            ("seed", 0),
        ):
            if not getattr(self, field) >= least:
                raise ValueError(f"{field} must be {least} or more. Received {field}={getattr(self, field)!r}.")
        if not self.epochs + self.hybrid_epochs:
            raise ValueError("A recipe trains for 1 epoch or more. Received epochs=0, hybrid_epochs=0.")
        for field in ("learning_rate", "hybrid_learning_rate", "hybrid_quantized_learning_rate", "train_examples"):
            if getattr(self, field) is not None and not getattr(self, field) > 0:
                raise ValueError(f"{field} must be above 0. Received {field}={getattr(self, field)!r}.")
        if not 0 < self.hybrid_percentile <= 100:
            raise ValueError(
                f"hybrid_percentile must be in (0, 100]. Received hybrid_percentile={self.hybrid_percentile!r}."
            )
        for field, choices in (
            ("network", NETWORKS),
            ("neuron", tuple(NEURONS)),
            ("optimizer", OPTIMIZERS),
            ("hybrid_optimizer", OPTIMIZERS),
            ("selection", SELECTIONS),
            ("precision", PRECISIONS),
            ("stem", STEMS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is one of {choices}. Received {field}={getattr(self, field)!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1). Received dropout={self.dropout!r}.")
        if self.weight_bits is not None:
            check_bits(self.weight_bits)
        if self.network in _DEPTHS and self.depth not in _DEPTHS[self.network]:
            raise ValueError(
                f"depth of a {self.network!r} is one of {_DEPTHS[self.network]}. Received depth={self.depth!r}."
            )
        if self.network == "small_cnn" and not (self.widths and all(width > 0 for width in self.widths)):
            raise ValueError(
                f"widths of a 'small_cnn' are the channels of one convolution or more. Received widths={self.widths!r}."
            )
        if self.hybrid_epochs and not self.timesteps:
            raise ValueError(
                "Hybrid training goes on with spikes, so it needs time steps. Received "
                f"hybrid_epochs={self.hybrid_epochs!r}, timesteps=0; a representation network alone has only epochs."
            )
        if self.hybrid_quantized_epochs and not self.hybrid_epochs:
            raise ValueError(
                "Thresholds for quantized passes come from a trained representation network. Received "
                f"hybrid_quantized_epochs={self.hybrid_quantized_epochs!r}, hybrid_epochs=0; set hybrid_epochs too."
            )
        for prefix in ("", "hybrid_"):
            if getattr(self, f"{prefix}optimizer") == "adam" and getattr(self, f"{prefix}weight_decay"):
                raise ValueError(
                    f"{prefix}weight_decay belongs to the optimizer 'sgd'. Received {prefix}optimizer='adam', "
                    f"{prefix}weight_decay={getattr(self, f'{prefix}weight_decay')!r}; set it to 0."
                )

    def plans(self) -> tuple[Plan, ...]:
        """The stages of its training, one after another: the spiking one alone, or those of hybrid training first."""
        spiking = "spiking" if self.timesteps else "representation"
        own = (self.epochs, self.optimizer, self.learning_rate, self.weight_decay)
        if not self.hybrid_epochs:
            return (Plan(spiking, 0, self.timesteps, None, *own, last=True),)
        first = (self.hybrid_epochs, self.hybrid_optimizer, self.hybrid_learning_rate, self.hybrid_weight_decay)
        plans = [Plan("representation", 0, 0, None, *first)]
        if self.hybrid_quantized_epochs:
            quantized = (self.hybrid_optimizer, self.hybrid_quantized_learning_rate, self.hybrid_weight_decay)
            plans.append(Plan("quantized", 1, 0, self.timesteps, self.hybrid_quantized_epochs, *quantized))
        return (*plans, Plan(spiking, len(plans), self.timesteps, None, *own, last=True))

    def neuron_layer(self, timesteps: int | None = None, representation_steps: int | None = None) -> SpikingNeuron:
        """A neuron layer with this recipe's settings, which `keras_dsr.models` give to all neurons of a network.

        Args:
            timesteps: Number of time steps of the network, if not the recipe's: 0 for the representation network. The
                layer does not have it itself: its network gives it to the neuron that makes the stream.
            representation_steps: As in the layer. Thresholds do not train then: they would grow to what suits a
                constant current, and the larger a spike, the more it matters when it comes.

        Raises:
            ValueError: if a setting is out of range.
        """
        spiking = self.timesteps if timesteps is None else timesteps
        stay = representation_steps is not None or (self.hybrid_epochs and spiking and not self.hybrid_train_threshold)
        settings: dict[str, Any] = {
            "threshold": self.threshold,
            "alpha": self.alpha,
            "trainable_threshold": self.train_threshold and not stay,
            "threshold_lower_bound": self.threshold_lower_bound,
            # 0 where nothing else is said, as SGD decays thresholds as it does all weights.
            "threshold_l2": self.threshold_l2,
            "representation_steps": representation_steps,
            "corner_width": self.corner_width,
        }
        if self.threshold_gradient_scale is not None:
            settings["threshold_gradient_scale"] = self.threshold_gradient_scale
        if self.neuron == "lif":
            settings |= {"tau": self.tau, "dt": self.dt}
        return NEURONS[self.neuron](**settings)

    def build(
        self,
        classes: int,
        input_shape: tuple[int, ...],
        timesteps: int | None = None,
        representation_steps: int | None = None,
    ) -> keras.Model:
        """The recipe's network, not yet compiled.

        Args:
            classes: Number of classes.
            input_shape: Height, width and channels of an image; of event frames time first.
            timesteps: Number of time steps, if not the recipe's: 0 for the representation network.
            representation_steps: As in the neuron layers.

        Raises:
            ValueError: if the network cannot be built so.
        """
        timesteps = self.timesteps if timesteps is None else timesteps
        common: dict[str, Any] = {
            "neuron": self.neuron_layer(timesteps, representation_steps),
            "classes": classes,
            "input_shape": input_shape,
            "dropout": self.dropout,
            "weight_bits": self.weight_bits,
        }
        if self.network == "vgg":
            return models.vgg(self.depth, timesteps=timesteps, **common)
        if self.network == "small_cnn":
            return models.small_cnn(self.widths, timesteps=timesteps, **common)
        return models.preact_resnet(self.depth, timesteps=timesteps, stem=self.stem, **common)

    def to_json(self) -> str:
        """The recipe as JSON, which `from_json` reads."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: if settings are missing, unknown, or not of their type.
        """
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"A recipe is a JSON object of settings. What was received is no JSON: {error}."
            ) from error
        if not isinstance(settings, dict):
            raise ValueError(f"A recipe is a JSON object of settings. Received {settings!r}.")
        kinds = typing.get_type_hints(cls)
        # What a recipe of an earlier version lacks has its default.
        needed = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        if not needed <= settings.keys() <= kinds.keys():
            raise ValueError(
                f"A recipe has the settings {sorted(kinds)}. "
                f"Missing: {sorted(needed - settings.keys())}. Unknown: {sorted(settings.keys() - kinds)}."
            )
        return cls(**{name: _typed(name, value, kinds[name]) for name, value in settings.items()})

    def with_settings(self, texts: Mapping[str, str]) -> Recipe:
        """The recipe with some settings changed, each given as text: what a command line has.

        Args:
            texts: Name of a setting to its value: "4", "0.5", "true", "none", or "crop,flip" for several.

        Returns:
            A new recipe.

        Raises:
            ValueError: if there is no such setting (the nearest names are suggested), or the text is not of its type.

        Example:

        >>> from keras_dsr import recipes
        >>> recipes.get("digits").with_settings({"threshold": "4", "augmentation": "crop"}).threshold
        4.0
        """
        kinds = typing.get_type_hints(type(self))
        changed = {}
        for name, text in texts.items():
            if name not in kinds or name in ("name", "summary"):
                settable = [each for each in kinds if each not in ("name", "summary")]
                raise ValueError(f"A recipe has no setting {name!r}. {suggestion(name, settable)}")
            changed[name] = _parse(name, text, kinds[name])
        return dataclasses.replace(self, **changed)


@contextlib.contextmanager
def dtype_policy(name: str) -> Iterator[None]:
    """What layers made in the block compute in.

    Args:
        name: Of `PRECISIONS`.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _without_none(kind: types.UnionType) -> Any:
    return next(each for each in typing.get_args(kind) if each is not type(None))


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A setting's value from JSON, which must be of its declared type; whole numbers are numbers too."""
    if isinstance(kind, types.UnionType):
        return None if value is None else _typed(name, value, _without_none(kind))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} is a list. Received {name}={value!r}.")
        return tuple(_typed(name, each, typing.get_args(kind)[0]) for each in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {_KINDS[kind]}. Received {name}={value!r}.")
    return value


def _parse(name: str, text: str, kind: Any) -> Any:
    """A setting's value from text, by its declared type."""
    if isinstance(kind, types.UnionType):
        return None if text.lower() == "none" else _parse(name, text, _without_none(kind))
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(_parse(name, each.strip(), element) for each in text.split(",") if each.strip())
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name} is {_KINDS[kind]}. Received {name}={text!r}.") from None


def parse_settings(texts: Iterable[str]) -> dict[str, str]:
    """Settings from words of the form NAME=VALUE, for `Recipe.with_settings`.

    Raises:
        ValueError: if a word has no equals sign.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, such as threshold=4. Received {text!r}.")
        settings[name.strip()] = value.strip()
    return settings


def suggestion(name: str, known: Iterable[str]) -> str:
    """The names nearest to one that is unknown, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are: {', '.join(known)}."


@dataclasses.dataclass(frozen=True)
class Reported:
    """An accuracy that the paper states.

    Args:
        accuracy: Test accuracy in per cent.
        deviation: Its standard deviation over runs in percentage points; `None` where none is stated.
        source: Where it stands.
    """

    accuracy: float
    deviation: float | None
    source: str

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.accuracy:.2f}{spread} % ({self.source})"


_LIF = {"neuron": "lif", "threshold": 0.3, "threshold_lower_bound": 5e-4, "alpha": 0.3}
_DVS = {
    "data": "dvs_cifar10",
    "network": "vgg",
    "depth": 11,
    "dropout": 0.1,
    "epochs": 300,
    "learning_rate": 0.05,
    "augmentation": ("crop",),
}


def _paper() -> dict[str, list[Recipe]]:
    """The paper's experiments: for each table or figure its recipes."""
    base = Recipe(name="cifar10-if", summary="PreAct-ResNet-18 on CIFAR-10, IF, N = 20")
    lif = dataclasses.replace(base, name="cifar10-lif", summary="PreAct-ResNet-18 on CIFAR-10, LIF, N = 20", **_LIF)

    def vary(recipe: Recipe, suffix: str, summary: str, **settings: Any) -> Recipe:
        return dataclasses.replace(recipe, name=f"{recipe.name}-{suffix}", summary=summary, **settings)

    both = (base, lif)
    return {
        "table2": [
            *both,
            dataclasses.replace(
                base, name="cifar100-if", data="cifar100", summary=base.summary.replace("-10,", "-100,")
            ),
            dataclasses.replace(
                lif, name="cifar100-lif", data="cifar100", summary=lif.summary.replace("-10,", "-100,")
            ),
            dataclasses.replace(
                base,
                name="imagenet-if",
                summary="PreAct-ResNet-18 on ImageNet-1k, IF, N = 50, hybrid training",
                data="imagenet2012",
                stem="imagenet",
                timesteps=50,
                threshold_gradient_scale=0.001,
                epochs=90,
                batch_size=144,
                optimizer="adam",
                learning_rate=0.001,
                weight_decay=0.0,
                warmup_steps=5000,
                augmentation=("resized_crop", "flip"),
                hybrid_epochs=90,
                hybrid_learning_rate=0.1,
                hybrid_weight_decay=1e-4,
            ),
            Recipe(name="dvs-cifar10-if", summary="VGG-11 on DVS-CIFAR10, IF, N = 20", **_DVS),
            Recipe(name="dvs-cifar10-lif", summary="VGG-11 on DVS-CIFAR10, LIF, N = 20", **_DVS, **_LIF),
        ],
        "figure3a": [
            *both,
            *(
                vary(
                    recipe,
                    f"n{steps}",
                    recipe.summary.replace("N = 20", f"N = {steps}"),
                    timesteps=steps,
                    learning_rate=0.05 if steps == 5 else 0.1,
                )
                for recipe in both
                for steps in (15, 10, 5)
            ),
        ],
        "figure3b": [
            vary(recipe, f"depth{depth}", recipe.summary.replace("ResNet-18", f"ResNet-{depth}"), depth=depth)
            for recipe in both
            for depth in (20, 32, 44, 56, 110)
        ],
        "table3": [
            base,
            vary(base, "no-firing", f"{base.summary}, alpha = 1: without the firing mechanism", alpha=1.0),
            vary(
                base, "fixed", f"{base.summary}, V_th = 6 for good: without threshold training", train_threshold=False
            ),
            vary(
                base,
                "fixed2",
                f"{base.summary}, V_th = 2 for good: without threshold training",
                train_threshold=False,
                threshold=2.0,
            ),
            vary(
                base,
                "no-firing-fixed",
                f"{base.summary}, alpha = 1 and V_th = 6 for good: without either",
                alpha=1.0,
                train_threshold=False,
            ),
        ],
        "table7": [
            *both,
            *(
                vary(recipe, f"{bits}bit", f"{recipe.summary}, {bits}-bit weights", weight_bits=bits)
                for recipe in both
                for bits in (8, 4)
            ),
        ],
    }


# What small networks on small data train with.
_SMALL = {
    "optimizer": "adam",
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "augmentation": ("crop",),
    "selection": "last",
}

_OURS = (
    Recipe(
        name="digits",
        summary="A small convolutional IF network on scikit-learn's 8x8 handwritten digits, N = 8",
        data="digits",
        network="small_cnn",
        widths=(32, 64, 64),
        timesteps=8,
        threshold=2.0,
        dropout=0.2,
        epochs=30,
        batch_size=32,
        **_SMALL,
        padding=1,
    ),
    Recipe(
        name="digits-events",
        summary="A small VGG on event streams simulated from the digits, IF, N = 8",
        data="digits_events",
        network="vgg",
        depth=5,
        timesteps=8,
        threshold=1.0,
        epochs=15,
        batch_size=32,
        **_SMALL,
        padding=2,
    ),
    Recipe(
        name="cifar10-resnet20",
        summary="PreAct-ResNet-20 on CIFAR-10, IF, N = 6, hybrid training: three hours on a CPU",
        depth=20,
        timesteps=6,
        corner_width=0.15,
        precision="mixed_bfloat16",
        epochs=12,
        learning_rate=0.02,
        warmup_steps=100,
        hybrid_epochs=10,
        hybrid_percentile=95.0,
        hybrid_quantized_epochs=40,
    ),
    Recipe(
        name="nmnist",
        summary="A small VGG on N-MNIST, IF, N = 10, hybrid training",
        data="nmnist",
        network="vgg",
        depth=5,
        timesteps=10,
        dropout=0.5,
        epochs=10,
        batch_size=32,
        learning_rate=0.01,
        augmentation=("crop",),
        selection="last",
        hybrid_epochs=80,
        hybrid_weight_decay=2e-3,
        hybrid_percentile=99.5,
    ),
    Recipe(
        name="poker-dvs",
        summary="A small VGG on POKER-DVS, IF, N = 10",
        data="poker_dvs",
        network="vgg",
        depth=5,
        timesteps=10,
        threshold=1.0,
        dropout=0.1,
        epochs=60,
        batch_size=8,
        **{**_SMALL, "learning_rate": 1e-3},
        padding=3,
    ),
)

EXPERIMENTS: dict[str, tuple[str, ...]] = {
    group: tuple(recipe.name for recipe in recipes) for group, recipes in _paper().items()
}
RECIPES: dict[str, Recipe] = {recipe.name: recipe for group in (_OURS, *_paper().values()) for recipe in group}
# Only what could be checked against a second source; the paper's figures are plots, and are not read off here.
REPORTED: dict[str, Reported] = {
    "cifar10-if": Reported(95.24, 0.17, "Table 2"),
    "cifar10-lif": Reported(95.40, 0.15, "Table 2"),
    "cifar100-if": Reported(78.20, 0.13, "Table 2"),
    "cifar100-lif": Reported(78.50, 0.12, "Table 2"),
    "imagenet-if": Reported(67.74, None, "Table 2"),
    "dvs-cifar10-if": Reported(75.03, 0.39, "Table 2"),
    "dvs-cifar10-lif": Reported(77.27, 0.24, "Table 2"),
}


def get(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        ValueError: if there is none; the nearest names are suggested.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}. {suggestion(name, RECIPES)}")
    return RECIPES[name]

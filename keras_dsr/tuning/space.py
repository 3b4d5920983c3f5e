"""What a search varies: settings of a recipe, each with a range or a choice of values, whatever tuner draws them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_dsr.recipes import Recipe, suggestion

SCALES = ("linear", "log")
# What all trials share: otherwise their validation accuracies could not be compared, or they are not the recipe's.
SHARED = (
    "name",
    "summary",
    "data",
    "size",
    "slicing",
    "sensor",
    "skip_corrupt",
    "validation",
    "train_examples",
    "selection",
    "epochs",
    "hybrid_epochs",
    "hybrid_quantized_epochs",
    "seed",
)
# What a neuron layer checks, some of it together.
_NEURON = (
    "neuron",
    "threshold",
    "alpha",
    "threshold_lower_bound",
    "threshold_l2",
    "threshold_gradient_scale",
    "corner_width",
)
_LIF = ("tau", "dt")
# Tuners draw as many digits as a float has. With fewer a recipe is easier to read, and is the same after KerasTuner's
# protocol, which has floats of 32 bits; a bound with more digits may be passed by half of the last that is kept.
_DIGITS = 6


@dataclasses.dataclass(frozen=True)
class Range:
    """A setting that is drawn between two bounds, both included.

    Args:
        name: The recipe's setting, a number; see `keras_dsr.recipes.Recipe`.
        low: Least value.
        high: Largest value.
        scale: "linear", or "log" for a setting whose magnitude is sought.

    Raises:
        ValueError: if the bounds are not finite or the wrong way round, or the scale is unknown or does not fit them.
    """

    name: str
    low: float
    high: float
    scale: str = "linear"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"A range has a finite low bound below a finite high one. Received {self.name}={self.low!r}:"
                f"{self.high!r}. For one value only, set it in the recipe."
            )
        if self.scale not in SCALES:
            raise ValueError(f"scale is one of {SCALES}. Received scale={self.scale!r} for {self.name}.")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(
                f"On a logarithmic scale bounds are above 0. Received {self.name}={self.low!r}:{self.high!r}:log."
            )

    @property
    def ends(self) -> tuple[float, float]:
        """Both bounds."""
        return self.low, self.high


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting that is one of several values.

    Args:
        name: The recipe's setting; see `keras_dsr.recipes.Recipe`.
        values: Its values, two or more.

    Raises:
        ValueError: if there are not two different values.
    """

    name: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        if len(set(self.values)) < 2 or len(set(self.values)) < len(self.values):
            raise ValueError(
                f"A choice is between two or more different values. Received {self.name}={self.values!r}. For one "
                "value only, set it in the recipe."
            )

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    @property
    def labels(self) -> list[Any]:
        """What stands for each value in a tuner, which knows numbers of one type and texts."""
        if not self._numbers:
            return [str(value) for value in self.values]
        return [value if is_whole(self.name) else float(value) for value in self.values]

    def of(self, label: Any) -> Any:
        """The value that a label stands for; numbers may have been rounded on their way."""
        if self._numbers:
            return min(self.values, key=lambda value: abs(value - label))
        return dict(zip(self.labels, self.values, strict=True))[label]

    @property
    def _numbers(self) -> bool:
        return all(type(value) in (int, float) for value in self.values)


Parameter = Range | Choice


def default_range(recipe: Recipe, name: str) -> Range:
    """Where to look for a setting that decides a DSR network's accuracy, around what the recipe has.

    Args:
        recipe: The recipe.
        name: "threshold", "alpha", "threshold_lower_bound", "threshold_l2", "learning_rate", "timesteps", or, for LIF
            neurons, "tau" or "dt".

    Raises:
        ValueError: if the setting is another one, for which there is no such range.
    """
    value = getattr(recipe, name, None)
    ranges = {
        "threshold": lambda: Range(name, max(value / 4, recipe.threshold_lower_bound), value * 4, "log"),
        "alpha": lambda: Range(name, min(0.1, value), max(0.9, value)),
        "threshold_lower_bound": lambda: Range(name, value / 10, min(value * 10, recipe.threshold / 4), "log"),
        "threshold_l2": lambda: Range(name, 1e-6, 1e-2, "log"),
        "learning_rate": lambda: Range(name, value / 10, value * 10, "log"),
        "timesteps": lambda: Range(name, max(1, value // 4), max(2, value)),
        "tau": lambda: Range(name, max(value / 4, 5 * recipe.dt), value * 4, "log"),
        "dt": lambda: Range(name, value / 4, min(value * 4, recipe.tau / 5), "log"),
    }
    if name not in ranges:
        raise ValueError(
            f"There is a range to begin with for {', '.join(ranges)}. Received {name!r}; give its bounds, such as "
            f"{name}=LOW:HIGH."
        )
    return _rounded(recipe, ranges[name]())


def default_space(recipe: Recipe, names: Sequence[str] = ("threshold", "alpha")) -> tuple[Range, ...]:
    """The ranges that a search has if nothing else is said.

    Args:
        recipe: The recipe.
        names: The settings, see `default_range`.

    Example:

    >>> from keras_dsr import recipes, tuning
    >>> tuning.default_space(recipes.get("cifar10-if"))
    (Range(name='threshold', low=1.5, high=24.0, scale='log'), Range(name='alpha', low=0.1, high=0.9, scale='linear'))
    """
    return tuple(default_range(recipe, name) for name in names)


def parse(recipe: Recipe, texts: Iterable[str]) -> tuple[Parameter, ...]:
    """A search space from words, as a command line has them.

    Args:
        recipe: The recipe that is searched around.
        texts: "NAME=LOW:HIGH", "NAME=LOW:HIGH:log", "NAME=VALUE,VALUE,...", or "NAME" for `default_range`.

    Raises:
        ValueError: if a word is of no such form, or the space does not pass `check`.

    Example:

    >>> from keras_dsr import recipes, tuning
    >>> tuning.parse(recipes.get("digits"), ["threshold=1:8:log", "timesteps=4,8"])
    (Range(name='threshold', low=1.0, high=8.0, scale='log'), Choice(name='timesteps', values=(4, 8)))
    """
    space: list[Parameter] = []
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        _check_name(recipe, name)
        if not equals:
            space.append(default_range(recipe, name))
        elif ":" in values:
            _check_number(name)
            low, high, *scale = (part.strip() for part in values.split(":"))
            if len(scale) > 1:
                raise ValueError(f"A range is NAME=LOW:HIGH or NAME=LOW:HIGH:log. Received {text!r}.")
            space.append(Range(name, _value(recipe, name, low), _value(recipe, name, high), *scale))
        elif "," in values:
            space.append(Choice(name, tuple(_value(recipe, name, each.strip()) for each in values.split(","))))
        else:
            raise ValueError(
                f"A search space is made of NAME=LOW:HIGH, NAME=LOW:HIGH:log, NAME=VALUE,VALUE,... or NAME alone. "
                f"Received {text!r}."
            )
    check(recipe, space)
    return tuple(space)


def check(recipe: Recipe, space: Sequence[Parameter]) -> None:
    """Makes sure that every point of a space is a recipe, before a trial finds that it is none.

    Raises:
        ValueError: if there is no such setting, all trials share it, it is there twice or has no effect, or a bound is
            out of its range, alone or beside others'.
    """
    if not space:
        raise ValueError("A search varies one setting or more. Received an empty space.")
    names = [parameter.name for parameter in space]
    for name in names:
        _check_name(recipe, name)
        if names.count(name) > 1:
            raise ValueError(f"A setting is in the space once. Received {name!r} {names.count(name)} times.")
    if recipe.neuron != "lif" and "neuron" not in names:
        for name in names:
            if name in _LIF:
                raise ValueError(
                    f"{name} is a setting of LIF neurons, and those of {recipe.name!r} are IF. Leave it out, or set "
                    "neuron=lif."
                )
    if not recipe.timesteps and "timesteps" not in names:
        raise ValueError(f"A search is for networks that spike. Received {recipe.name!r} with timesteps=0.")
    for parameter in space:
        if isinstance(parameter, Range):
            _check_number(parameter.name)
        for value in parameter.ends:
            if isinstance(parameter, Range) and parameter.name == "depth":
                raise ValueError(f"Networks have certain depths only. Give them: depth={value},VALUE,...")
            if isinstance(parameter, Range) and is_whole(parameter.name) and value != int(value):
                raise ValueError(f"{parameter.name} is a whole number. Received the bound {value!r}.")
            if parameter.name == "timesteps" and value < 1:
                raise ValueError(
                    f"Trials are networks that spike, with 1 time step or more. Received the bound timesteps={value!r}."
                )
            apply(recipe, {parameter.name: value})
    together = [parameter for parameter in space if parameter.name in (*_NEURON, *_LIF)]
    for values in itertools.product(*(parameter.ends for parameter in together)):
        settings = {parameter.name: value for parameter, value in zip(together, values, strict=True)}
        try:
            apply(recipe, settings).neuron_layer()
        except ValueError as error:
            told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise ValueError(f"The space has settings that no neuron can have, such as {told}. {error}") from error


def apply(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with the settings that a tuner drew; numbers are rounded to six digits.

    Args:
        recipe: The recipe.
        settings: Values by name, in the recipe's units.

    Raises:
        ValueError: if a setting is out of its range.
    """
    changed = {}
    for name, value in settings.items():
        if is_whole(name) and isinstance(value, float):
            value = int(value)
        changed[name] = float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
    return dataclasses.replace(recipe, **changed)


def is_whole(name: str) -> bool:
    """Whether a setting's values are whole numbers."""
    return int in _kinds(name)


def to_fields(space: Iterable[Parameter]) -> list[dict[str, Any]]:
    """A space as JSON can hold it, for `from_fields`."""
    return [dataclasses.asdict(parameter) for parameter in space]


def from_fields(fields: Iterable[Mapping[str, Any]]) -> tuple[Parameter, ...]:
    """The space that `to_fields` gave, from JSON, where tuples became lists."""
    return tuple(
        Choice(each["name"], tuple(tuple(v) if isinstance(v, list) else v for v in each["values"]))
        if "values" in each
        else Range(**each)
        for each in fields
    )


@functools.cache
def _kinds(name: str) -> frozenset[Any]:
    """The types that a setting of a recipe may have."""
    kind = typing.get_type_hints(Recipe)[name]
    if typing.get_origin(kind) is tuple:
        return frozenset((kind,))
    return frozenset((kind, *typing.get_args(kind)))


def _check_name(recipe: Recipe, name: str) -> None:
    settable = [field.name for field in dataclasses.fields(recipe) if field.name not in SHARED]
    if name in SHARED:
        raise ValueError(f"All trials of a search share {name}. Set it in the recipe, or search {', '.join(settable)}.")
    if name not in settable:
        raise ValueError(f"A recipe has no setting {name!r} to search. {suggestion(name, settable)}")


def _check_number(name: str) -> None:
    if not {int, float} & _kinds(name):
        raise ValueError(f"A range is of numbers, and {name} is none. Give its values: {name}=VALUE,VALUE,...")


def _value(recipe: Recipe, name: str, text: str) -> Any:
    return getattr(recipe.with_settings({name: text}), name)


def _rounded(recipe: Recipe, found: Range) -> Range:
    """Bounds as `apply` makes them, so that none is out of its range by a rounding."""
    low, high = (getattr(apply(recipe, {found.name: value}), found.name) for value in found.ends)
    return dataclasses.replace(found, low=low, high=high)

"""Search for the settings of a recipe that give the best network: threshold, alpha, time steps, and others.

- `keras_dsr.tuning.space`: what is varied, for any tuner: `Range`, `Choice`, `default_space`, `parse`
- `keras_dsr.tuning.search`: `Search`, its folder, its trials
- `keras_dsr.tuning.processes`: `tune`, which runs a search with several processes, and `join`
- `keras_dsr.tuning.results`: the best trial's recipe, and accuracy against time steps and firing rate
- `keras_dsr.tuning.kerastuner`, `keras_dsr.tuning.optuna_study`: the tuners
- `DSRHyperModel`: a recipe for KerasTuner's own tuners

Tuners are installed by `pip install 'keras-dsr[tuning]'`.
"""

from __future__ import annotations

from typing import Any

from keras_dsr.tuning.processes import join, require, tune
from keras_dsr.tuning.results import best, best_recipe, pareto
from keras_dsr.tuning.search import Search, Trial, read_trials, search_of
from keras_dsr.tuning.space import Choice, Range, check, default_space, parse

__all__ = [
    "Choice",
    "DSRHyperModel",
    "Range",
    "Search",
    "Trial",
    "best",
    "best_recipe",
    "check",
    "default_space",
    "join",
    "pareto",
    "parse",
    "read_trials",
    "search_of",
    "tune",
]


def __getattr__(name: str) -> Any:
    # It is a KerasTuner class, and KerasTuner is optional.
    if name == "DSRHyperModel":
        require("bayesian")
        from keras_dsr.tuning.kerastuner import DSRHyperModel

        return DSRHyperModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

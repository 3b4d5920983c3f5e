"""What a search found: the best trial as a recipe, and accuracy against time steps and firing rate."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_dsr import runs
from keras_dsr.analysis import figures
from keras_dsr.recipes import Recipe
from keras_dsr.tuning.search import Search, Trial, shown
from keras_dsr.tuning.space import Parameter, Range


def best(trials: Sequence[Trial]) -> Trial:
    """The finished trial with the highest validation accuracy; of equal ones, that which fires least.

    Args:
        trials: Records of a search.

    Raises:
        ValueError: if no trial is finished, with why those failed that did.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        reasons = Counter(trial.message for trial in trials if trial.state == "failed")
        why = "".join(f" {count} failed: {message}" for message, count in reasons.most_common(3))
        raise ValueError(f"No trial of {len(trials)} trained to its end.{why}")
    return max(finished, key=lambda trial: (trial.validation_accuracy, -_spikes(trial), -trial.number))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials that none beats: in accuracy, number of time steps and firing rate together.

    A trial is beaten by one that is at least as good in all three, and better in one.

    Args:
        trials: Records of a search.

    Returns:
        They, the most accurate first.
    """
    finished = [trial for trial in trials if trial.state == "finished"]
    aims = {trial.number: (-trial.validation_accuracy, trial.timesteps, trial.firing_rate) for trial in finished}

    def beaten(trial: Trial) -> bool:
        own = aims[trial.number]
        return any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in aims.values())

    return sorted((trial for trial in finished if not beaten(trial)), key=lambda trial: aims[trial.number])


def best_recipe(search: Search, trials: Sequence[Trial]) -> Recipe:
    """The recipe of the best trial, which `keras_dsr.training.train` takes.

    Raises:
        ValueError: if no trial is finished.
    """
    found = best(trials)
    summary = (
        f"{search.recipe.summary}; {found.told}: best of {len(trials)} trials, "
        f"{found.validation_accuracy:.2%} of the validation examples"
    )
    return dataclasses.replace(search.trial_recipe(found.settings), summary=summary)


def table(search: Search, trials: Sequence[Trial], title: str = "") -> str:
    """The search as Markdown: the trials that none beats, and all trials.

    Args:
        search: The search.
        trials: Its trials so far.
        title: Heading; empty for one with the recipe's name.
    """
    counts = Counter(trial.state for trial in trials)
    told = ", ".join(
        f"{counts[state]} {state}" for state in ("finished", "stopped", "failed", "running") if counts[state]
    )
    lines = [f"# {title or f'Search around {search.recipe.name}'}", ""]
    lines += [f"{search.tuner}, {len(trials)} trials ({told}). Accuracies are those of the validation part.", ""]
    front = pareto(trials)
    if front:
        chosen = best(trials)
        lines += [f"Best: trial {chosen.number}, {chosen.validation_accuracy:.2%}, {chosen.told}.", ""]
        lines += [
            "## Accuracy against time steps and firing rate: trials that none beats",
            "",
            *_rows(search, front),
            "",
        ]
    lines += ["## All trials", "", *_rows(search, trials), ""]
    return "\n".join(lines)


def write(search: Search, folder: Path, trials: Sequence[Trial]) -> Recipe:
    """Writes `results.md`, `results.json`, `results.png` and `best.json` to the folder of a search.

    Returns:
        The recipe in `best.json`.

    Raises:
        ValueError: if no trial is finished; the tables are written then, too.
    """
    runs.write(folder / "results.md", table(search, trials))
    front = [trial.number for trial in pareto(trials)]
    fields = {"trials": [dataclasses.asdict(trial) for trial in trials], "pareto": front}
    runs.write(folder / "results.json", runs.json_text(fields))
    recipe = best_recipe(search, trials)
    draw(folder / "results.png", search, trials)
    runs.write(folder / "best.json", recipe.to_json())
    return recipe


def draw(path: Path, search: Search, trials: Sequence[Trial], reference: tuple[str, float] | None = None) -> None:
    """Draws the search.

    Args:
        path: The PNG file to write; it appears whole or not at all.
        search: The search.
        trials: Its trials, one of them finished.
        reference: Name and validation accuracy of something to compare with; `None` for nothing.
    """
    ended = [trial for trial in trials if trial.ended]
    found = best(trials)
    front = {trial.number for trial in pareto(trials)}
    figures.search(
        path,
        title=f"{search.recipe.name}: {len(ended)} trials, best validation accuracy {found.validation_accuracy:.1%}",
        settings={
            parameter.name: (
                [_drawn(parameter, trial) for trial in ended],
                isinstance(parameter, Range) and parameter.scale == "log",
            )
            for parameter in search.space
        },
        accuracies=[trial.validation_accuracy for trial in ended],
        states=[trial.state for trial in ended],
        timesteps=[trial.timesteps for trial in ended],
        rates=[trial.firing_rate for trial in ended],
        front=[trial.number in front for trial in ended],
        best=ended.index(found),
        reference=reference,
    )


def _drawn(parameter: Parameter, trial: Trial) -> Any:
    """A setting as an axis can have it: a number, a text, or `None` where the trial does not have it."""
    if parameter.name not in trial.settings:
        return None
    value = trial.settings[parameter.name]
    if isinstance(parameter, Range) or all(type(each) in (int, float) for each in parameter.values):
        return value
    return str(value).lower()


def line(trial: Trial) -> str:
    """A trial in a line."""
    head = f"trial {trial.number}, {trial.told}: {trial.state}"
    if trial.state == "failed":
        return f"{head}: {trial.message}"
    if trial.validation_accuracy is None:
        return head
    rate = "" if trial.firing_rate is None else f", firing rate {trial.firing_rate:.3f}"
    return f"{head} after {trial.epochs} epochs, validation accuracy {trial.validation_accuracy:.2%}{rate}"


def _rows(search: Search, trials: Sequence[Trial]) -> list[str]:
    names = [parameter.name for parameter in search.space if parameter.name != "timesteps"]  # it is the column N
    columns = ["trial", *names, "N", "firing rate", "spikes per neuron", "validation accuracy", "epochs", "state"]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for trial in trials:
        rate = trial.firing_rate
        cells = [
            trial.number,
            *(shown(trial.settings.get(name)) for name in names),
            shown(trial.timesteps),
            "" if rate is None else f"{rate:.4f}",
            "" if rate is None else f"{_spikes(trial):.3f}",
            "" if trial.validation_accuracy is None else f"{trial.validation_accuracy:.2%}",
            trial.epochs,
            f"{trial.state}: {trial.message}" if trial.message else trial.state,
        ]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return lines


def _spikes(trial: Trial) -> float:
    """Spikes that a neuron fires for one example."""
    return (trial.timesteps or 0) * (trial.firing_rate or 0.0)

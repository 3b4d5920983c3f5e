"""The paper's experiments as one command each: every recipe of a table or figure, for several seeds, into one table.

    python examples/table2.py --data-dir DATA --seeds 3
    python examples/table2.py --smoke            # a minute: small networks on the digits

Runs that are finished are not run again, and unfinished ones go on, so the same command continues what was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
from rich.console import Console
from rich.markdown import Markdown

from keras_dsr import recipes, runs, training
from keras_dsr.analysis import figures
from keras_dsr.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe's results over seeds.

    Args:
        recipe: The recipe; its seed is that of the first run.
        accuracies: Test accuracy of each run, in per cent.
        firing_rates: Mean firing rate over the neuron layers, of each run.
        seconds: Training time of each run.
        reported: What the paper states for the recipe; `None` if it does not, or the recipe was changed.
    """

    recipe: Recipe
    accuracies: tuple[float, ...]
    firing_rates: tuple[float, ...]
    seconds: tuple[float, ...]
    reported: recipes.Reported | None

    @property
    def mean(self) -> float:
        """Mean test accuracy in per cent."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation of the test accuracy in percentage points; 0 for one run."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def smoke(recipe: Recipe) -> Recipe:
    """A small form of a recipe that trains within seconds on the embedded digits, with the same kind of neurons.

    What stays: neuron, thresholds, alpha, bits, number of time steps. What changes: data, network, epochs, batch size,
    and the settings that go with them. Where a PreAct-ResNet's depth is other than 18 it stays, with 2 time steps and
    thresholds of 1; a VGG becomes the small one with 8 time steps at most.
    """
    events = recipe.network == "vgg"
    deep = recipe.network == "preact_resnet" and recipe.depth != 18
    if deep:
        network = {"network": "preact_resnet", "timesteps": min(recipe.timesteps, 2), "threshold": 1.0, "epochs": 1}
    elif events:
        network = {"network": "vgg", "depth": 5, "timesteps": min(recipe.timesteps, 8), "epochs": 1}
    else:
        network = {"network": "small_cnn", "widths": (16, 32), "stem": "cifar", "epochs": 4}
    return dataclasses.replace(
        recipe,
        summary=f"{recipe.summary}, in small form",
        data="digits_events" if events else "digits",
        validation=None,
        train_examples=None,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.1,
        weight_decay=5e-4,
        warmup_steps=20,
        augmentation=("crop",),
        padding=1,
        threshold_gradient_scale=None,
        hybrid_epochs=min(recipe.hybrid_epochs, 2),
        hybrid_quantized_epochs=min(recipe.hybrid_quantized_epochs, 1),
        **network,
    )


def run(
    chosen: Sequence[Recipe],
    folder: Path,
    *,
    seeds: int = 1,
    data_dir: Path | None = None,
    download: bool = False,
    verbose: int | str = 0,
    after_each: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Trains recipes, each with several seeds, and gathers what came out.

    Args:
        chosen: The recipes.
        folder: Holds a run folder for each recipe and seed; finished ones are only read, unfinished ones go on.
        seeds: How many runs of each recipe, with seeds from the recipe's own upwards.
        data_dir: Where the data sets are, see `keras_dsr.data.load`.
        download: Whether to download a data set that is not there.
        verbose: As in `keras.Model.fit`.
        after_each: Called with the rows so far whenever a recipe is finished.

    Returns:
        A row for each recipe.

    Raises:
        ValueError: if `seeds` is below 1, two recipes have one name, or a run in the folder has other settings.
    """
    if seeds < 1:
        raise ValueError(f"An experiment has 1 or more seeds. Received seeds={seeds!r}.")
    if len({recipe.name for recipe in chosen}) != len(chosen):
        raise ValueError(f"Recipes are told apart by name. Received {[recipe.name for recipe in chosen]}.")
    # Each data set once, ahead of days of training: one that is missing is known now.
    for one in {(each.data, each.timesteps, each.validation): each for each in chosen}.values():
        training.load(one, data_dir=data_dir, download=download)
    rows: list[Row] = []
    for recipe in chosen:
        summaries = []
        for seed in range(recipe.seed, recipe.seed + seeds):
            one = dataclasses.replace(recipe, seed=seed)
            where = folder / f"{recipe.name}-seed{seed}"
            summaries.append(training.train(one, where, data_dir=data_dir, download=download, verbose=verbose))
            print(f"{recipe.name}, seed {seed}: {summaries[-1].test_accuracy:.2%}", flush=True)
            keras.backend.clear_session()
            gc.collect()
        rows.append(
            Row(
                recipe,
                tuple(100 * summary.test_accuracy for summary in summaries),
                tuple(statistics.mean(summary.firing_rates.values() or [0.0]) for summary in summaries),
                tuple(summary.seconds for summary in summaries),
                recipes.REPORTED.get(recipe.name) if recipes.RECIPES.get(recipe.name) == recipe else None,
            )
        )
        if after_each is not None:
            after_each(rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of results, the paper's figures beside them."""
    lines = [
        "| recipe | what | test accuracy % | each seed | the paper | mean firing rate | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = f" ± {row.deviation:.2f}" if len(row.accuracies) > 1 else ""
        lines.append(
            f"| {row.recipe.name} | {row.recipe.summary} | {row.mean:.2f}{spread} | "
            f"{', '.join(f'{accuracy:.2f}' for accuracy in row.accuracies)} | {row.reported or ''} | "
            f"{statistics.mean(row.firing_rates):.4f} | {statistics.median(row.seconds):.0f} |"
        )
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], folder: Path, title: str, changed: Sequence[str] = ()) -> None:
    """Writes `results.md`, `results.json` and `results.png` to a folder, each whole or not at all.

    Args:
        rows: What came out.
        folder: Where to write.
        title: For table and figure.
        changed: Settings that all recipes had instead of their own, as NAME=VALUE: recipes' summaries do not know them.
    """
    note = f"All recipes with `{' '.join(changed)}`, whatever else they are called here.\n\n" if changed else ""
    runs.write(folder / "results.md", f"# {title}\n\n{note}{table(rows)}")
    runs.write(folder / "results.json", runs.json_text([dataclasses.asdict(row) for row in rows]))
    figures.accuracies(
        folder / "results.png",
        title,
        names=[row.recipe.name for row in rows],
        measured=[row.accuracies for row in rows],
        reported=[None if row.reported is None else row.reported.accuracy for row in rows],
    )


def select(group: str, settings: Mapping[str, str], names: Sequence[str] = (), small: bool = False) -> list[Recipe]:
    """The recipes of an experiment, changed as asked.

    Args:
        group: A name in `keras_dsr.recipes.EXPERIMENTS`.
        settings: Settings to change in all of them, as texts, see `Recipe.with_settings`.
        names: Which of them; all, if empty.
        small: Whether to take the small form that a minute is enough for.

    Raises:
        ValueError: if the group has no recipe of a name, or a setting is unknown or out of range.
    """
    known = recipes.EXPERIMENTS[group]
    for name in names:
        if name not in known:
            raise ValueError(f"{group} has no recipe {name!r}. {recipes.suggestion(name, known)}")
    chosen = [recipes.get(name) for name in known if not names or name in names]
    if small:
        chosen = [smoke(recipe) for recipe in chosen]
    return [recipe.with_settings(settings) for recipe in chosen]


def main(group: str, title: str, smoke_names: Sequence[str] = (), arguments: Sequence[str] | None = None) -> int:
    """The command line of an experiment's script.

    Args:
        group: A name in `keras_dsr.recipes.EXPERIMENTS`.
        title: What the table shows, for its heading.
        smoke_names: The recipes that `--smoke` runs, if not all.
        arguments: The words after the script's name; those of the process if `None`.

    Returns:
        The exit status: 0, or 1 after an error that the user can mend, which is printed.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--smoke", action="store_true", help="small networks on the digits: a minute, no download")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each recipe (default: 1)")
    parser.add_argument("--recipes", nargs="+", default=[], help="which of the recipes (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting in all")
    parser.add_argument("--data-dir", type=Path, help="where the data sets are (default: $KERAS_DSR_DATA)")
    parser.add_argument("--download", action="store_true", help="download a data set that is not there")
    parser.add_argument("--folder", type=Path, help=f"where results go (default: runs/{group}, runs/{group}-smoke)")
    parser.add_argument(
        "--verbose", type=int, default=None, help="2 for a line an epoch (default: a bar; none in smoke)"
    )
    options = parser.parse_args(arguments)
    folder = options.folder or Path("runs") / (f"{group}-smoke" if options.smoke else group)
    verbose = options.verbose if options.verbose is not None else (0 if options.smoke else "auto")
    try:
        names = options.recipes or (smoke_names if options.smoke else [])
        chosen = select(group, recipes.parse_settings(options.set), names, options.smoke)
        heading = f"{title} (small form on the digits)" if options.smoke else title
        rows = run(
            chosen,
            folder,
            seeds=options.seeds,
            data_dir=options.data_dir,
            download=options.download,
            verbose=verbose,
            after_each=lambda finished: write(finished, folder, heading, options.set),
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"{group}: {error}", file=sys.stderr)
        return 1
    Console().print(Markdown(table(rows)))
    print(f"Written to {folder}: results.md, results.json, results.png, and a folder for each run.")
    return 0

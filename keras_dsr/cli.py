"""The command line: `keras-dsr train RECIPE` and `keras-dsr evaluate RUN`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from keras_dsr import recipes, training


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-dsr", description="Train spiking neural networks by Differentiation on Spike Representation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a recipe", description="Train a recipe into a new run folder.")
    train.add_argument("recipe", help="name of the recipe, such as digits")
    train.add_argument("--epochs", type=int, help="passes over the training images")
    train.add_argument("--timesteps", type=int, help="number of time steps N")
    train.add_argument("--seed", type=int, help="seed of everything random")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: runs)")
    evaluate = commands.add_parser("evaluate", help="evaluate a run", description="Evaluate a run's model once more.")
    evaluate.add_argument("run", type=Path, help="a run folder, such as runs/digits-20260101-120000")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `keras-dsr`; those of the process if `None`.

    Returns:
        The exit status: 0, or 1 after an error that the user can mend, which is printed.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "train":
            overrides = {name: getattr(options, name) for name in ("epochs", "timesteps", "seed")}
            overrides = {name: value for name, value in overrides.items() if value is not None}
            recipe = dataclasses.replace(recipes.get(options.recipe), **overrides)
            folder = training.new_run_folder(recipe, options.runs)
            summary = training.train(recipe, folder)
        else:
            folder = options.run
            summary = training.evaluate(folder)
    except (ValueError, OSError) as error:
        print(f"keras-dsr: {error}", file=sys.stderr)
        return 1
    _report(summary, folder, trained=options.command == "train")
    return 0


def _report(summary: training.Summary, folder: Path, trained: bool) -> None:
    table = Table(title=f"{folder}", title_justify="left", show_header=False)
    table.add_row("test accuracy", f"{summary.test_accuracy:.2%} of {summary.test_images} images")
    table.add_row("validation accuracy", f"{summary.validation_accuracy:.2%}")
    table.add_row("time steps N", str(summary.timesteps))
    for name, rate in summary.firing_rates.items():
        table.add_row(f"{name}", f"firing rate {rate:.3f}, threshold {summary.thresholds[name]:.2f}")
    table.add_row("training time", f"{summary.seconds:.1f} s")
    console = Console()
    console.print(table)
    if trained:
        files = [name for name in ("model.keras", "history.csv", "figure.png") if (folder / name).exists()]
        console.print(f"Written to {folder}: {', '.join(files)}. Look at it again with", soft_wrap=True)
        console.print(f"  keras-dsr evaluate {folder}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())

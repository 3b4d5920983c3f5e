"""Search for the threshold and alpha of a recipe, with several processes, and train the best.

    python examples/tune_threshold_alpha.py                       # 20 trials on the digits, 2 workers: minutes
    python examples/tune_threshold_alpha.py --smoke               # small networks, 4 trials
    python examples/tune_threshold_alpha.py --recipe cifar10-if --data-dir DATA --tuner optuna --epochs 20

Trials choose on the validation part; the test part is looked at once, by the best one's network, at the end. What was
stopped goes on where it was. `keras-dsr tune digits --workers 2` does the same; results: a table, a plot, a recipe.
"""

import argparse
from pathlib import Path

from keras_dsr import recipes, training, tuning
from keras_dsr.tuning import Range

SMALL = {"widths": "4,8", "timesteps": "2", "epochs": "3", "train_examples": "320"}


def main() -> None:
    """Searches, and trains the best recipe in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--epochs", default="10", help="of each trial (default: 10)")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tuner", default="bayesian", help="random, bayesian, hyperband or optuna")
    parser.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
    parser.add_argument("--folder", type=Path, default=Path("runs/threshold-alpha"), help="where results go")
    parser.add_argument("--smoke", action="store_true", help="small networks, a few trials")
    options = parser.parse_args()

    recipe = recipes.get(options.recipe).with_settings({"epochs": options.epochs, **(SMALL if options.smoke else {})})
    # Around what the recipe has: a factor of four for the threshold, and all that makes sense for alpha.
    space = (
        Range("threshold", recipe.threshold / 4, recipe.threshold * 4, scale="log"),
        Range("alpha", 0.1, 0.9),
    )
    trials = 4 if options.smoke else options.trials
    search = tuning.Search(recipe=recipe, space=space, tuner=options.tuner, trials=trials)
    best = tuning.tune(search, options.folder, workers=options.workers, data_dir=options.data_dir)
    print(f"best: threshold {best.threshold:.3g}, alpha {best.alpha:.3g}; {options.folder / 'best.json'}")

    summary = training.train(best, options.folder / "best", data_dir=options.data_dir, verbose=0)
    print(f"test accuracy {summary.test_accuracy:.2%}, validation accuracy {summary.validation_accuracy:.2%}")
    print(f"Table and plot: {options.folder / 'results.md'}, {options.folder / 'results.png'}")


if __name__ == "__main__":
    main()

"""A search for threshold, alpha and number of time steps on the digits, in which a worker is killed on the way.

    python benchmarks/search.py                    # 20 trials of 10 epochs, 2 workers, on 2 cores
    python benchmarks/search.py --set timesteps=3 --space threshold=0.5:8:log --space alpha=0.1:0.9 --name search_n3

When a third of the trials are done, one worker gets SIGKILL in the midst of a trial; nothing may be lost. The best
trial, chosen on the validation part, is compared with the paper's defaults (V_th = 6, alpha = 0.5, N as in the recipe),
trained for as many epochs: on the validation part with the seed of the search, and on the test part, at which the
search did not look, for several seeds that it did not train with. Verdicts say whether the search took at most 10
minutes, whether its best network has at least the defaults' mean test accuracy, and whether its alpha is near 0.5.
The second line searches for threshold and alpha alone, at N = 3.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import statistics
import tempfile
import threading
import time
from pathlib import Path

import measure
from measure import machine, markdown, write

PAPER = {"threshold": "6", "alpha": "0.5"}
MINUTES = 10
# How far from the paper's alpha is near: an eighth of the range from 0 to 1 to each side.
NEAR = 0.125


def processes_of(folder: Path, name: str) -> list[int]:
    """The process ids of a worker of the search in a folder, by what /proc says of their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if "keras_dsr.tuning" in words and str(folder) in words and name in words:
            found.append(int(path.parent.name))
    return found


class Killer(threading.Thread):
    """Kills a worker once so many trials have ended and it is past the first epoch of another."""

    def __init__(self, folder: Path, name: str, after: int) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.name_of_worker = name
        self.after = after
        self.killed: dict[str, int] | None = None

    def run(self) -> None:
        from keras_dsr import tuning
        from keras_dsr.tuning.search import run_folder

        while self.killed is None:
            time.sleep(0.1)
            trials = tuning.read_trials(self.folder)
            if sum(trial.ended for trial in trials) < self.after:
                continue
            for trial in trials:
                history = run_folder(self.folder, trial.number) / "history.csv"
                if trial.worker == self.name_of_worker and not trial.ended and history.is_file():
                    epochs = len(history.read_text().splitlines()) - 1
                    for process in processes_of(self.folder, self.name_of_worker):
                        os.kill(process, signal.SIGKILL)
                        self.killed = {"trial": trial.number, "epochs": epochs}


def test_accuracies(recipe, folder: Path, seeds: int) -> list[float]:
    """Test accuracy of a recipe with each of several seeds."""
    from keras_dsr import training

    found = []
    for seed in range(recipe.seed + 1, recipe.seed + 1 + seeds):  # the search has chosen for the recipe's own
        one = dataclasses.replace(recipe, seed=seed)
        found.append(training.train(one, folder / f"seed{seed}", verbose=0).test_accuracy)
    return found


def verdicts(seconds: float, best: list[float], defaults: list[float], recipe) -> list[list[str]]:
    """What the search has to show, row by row: what, its limit, what was measured, and whether it is met."""
    behind = statistics.mean(defaults) - statistics.mean(best)
    rows = [
        ["minutes that the search took", MINUTES, seconds / 60, f"{seconds / 60:.1f}"],
        ["mean test accuracy behind the defaults', in points", 0, 100 * behind, f"{100 * behind:.2f}"],
    ]
    if recipe.neuron == "if":
        away = abs(recipe.alpha - 0.5)
        rows.append(["distance of alpha from 0.5", NEAR, away, f"{away:.3f}"])
    return [[what, f"at most {limit}", shown, measure.at_most(value, limit)] for what, limit, value, shown in rows]


def main() -> None:
    """Reads the command line, searches, compares, and writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", default="10")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison on the test part")
    parser.add_argument("--tuner", default="bayesian")
    parser.add_argument("--space", action="append", metavar="NAME=LOW:HIGH[:log]", help="as in keras-dsr tune")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as in keras-dsr tune")
    parser.add_argument("--name", default="search", help="name of the files in benchmarks/results")
    parser.add_argument("--folder", type=Path, help="where the search is kept (default: nowhere)")
    parser.add_argument("--cores", type=int, default=2, help="cores that all processes together use (default: 2)")
    options = parser.parse_args()
    measure.use_cores(options.cores)

    with tempfile.TemporaryDirectory() as temporary:
        results, table = search(options, options.folder or Path(temporary) / "search", Path(temporary))
    write(options.name, results, table)
    print(table)


def search(options: argparse.Namespace, folder: Path, scratch: Path) -> tuple[dict, str]:
    """Searches and compares; the plot is written, what else is to be written is returned."""
    from keras_dsr import recipes, training, tuning
    from keras_dsr.tuning import results

    recipe = recipes.get("digits").with_settings({"epochs": options.epochs, **recipes.parse_settings(options.set)})
    space = tuning.parse(recipe, options.space or ["threshold=0.5:8:log", "alpha=0.1:0.9", "timesteps=2:8"])
    wanted = tuning.Search(recipe=recipe, space=space, tuner=options.tuner, trials=options.trials)
    killer = Killer(folder, f"worker{options.workers - 1}", after=options.trials // 3)
    killer.start()
    lines: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    started = time.perf_counter()
    best = tuning.tune(wanted, folder, workers=options.workers, told=told)
    seconds = time.perf_counter() - started
    trials = tuning.read_trials(folder)
    chosen = tuning.best(trials)
    if killer.killed is None:
        raise SystemExit("no worker was killed: the search was over before it could be")
    survivor = trials[killer.killed["trial"]]
    if len(trials) != options.trials or not all(trial.ended for trial in trials) or survivor.state == "failed":
        raise SystemExit(f"something was lost: {len(trials)} trials, {survivor}")

    paper = recipe.with_settings(PAPER)
    reference = training.fit(paper, scratch / "paper", verbose=0)
    tested = {
        "best of the search": test_accuracies(best, scratch / "best", options.seeds),
        "the paper's defaults": test_accuracies(paper, scratch / "defaults", options.seeds),
    }
    results.draw(
        measure.RESULTS / f"{options.name}.png", wanted, trials, ("the paper's defaults", reference.validation_accuracy)
    )
    host = machine(options.cores)
    finished = [trial for trial in trials if trial.state == "finished"]
    top = sorted(finished, key=lambda trial: -trial.validation_accuracy)[:5]
    validation = {
        "best of the search": chosen.validation_accuracy,
        "the paper's defaults": reference.validation_accuracy,
    }
    kept = f"{killer.killed['epochs']} of its {recipe.epochs} epochs"
    text = [
        f"`{recipe.name}`, {recipe.epochs} epochs a trial; {options.tuner}, {options.trials} trials, {options.workers} "
        f"workers; TensorFlow, {host['cores']} cores of {host['processor']}, {host['date']}. The search took "
        f"{seconds / 60:.1f} minutes, start-up included.",
        "",
        f"SIGKILL to a worker in trial {survivor.number}, after {kept}: it came back and the trial is {survivor.state} "
        f"with {survivor.epochs} epochs. {len(finished)} trials finished, "
        f"{sum(trial.state == 'stopped' for trial in trials)} were stopped, "
        f"{sum(trial.state == 'failed' for trial in trials)} failed.",
        "",
    ]
    rows = []
    for name, one in (("best of the search", best), ("the paper's defaults", paper)):
        spread = f" ± {100 * statistics.stdev(tested[name]):.2f}" if options.seeds > 1 else ""
        settings = f"V_th = {one.threshold:.3g}, alpha = {one.alpha:.3g}, N = {one.timesteps}"
        rows.append([name, settings, f"{validation[name]:.2%}", f"{100 * statistics.mean(tested[name]):.2f}{spread} %"])
    text += markdown(["", "settings", "validation accuracy", f"test accuracy, {options.seeds} other seeds"], rows)
    examples = len(training.load(recipe).validation)
    text += [
        "",
        f"The best is the maximum of {len(finished)} accuracies on the same {examples} validation examples, and too "
        "high by that choice; the comparison is on the test part.",
        "",
    ]
    found = verdicts(seconds, tested["best of the search"], tested["the paper's defaults"], best)
    text += markdown(["what", "limit", "measured", "verdict"], found)
    alphas = ", ".join(f"{trial.settings.get('alpha', recipe.alpha):.2f}" for trial in top)
    text += ["", f"alpha of the five best trials: {alphas}.", ""]
    text += [
        results.table(wanted, trials, "The search"),
        f"![Accuracy over settings, firing rate and time steps]({options.name}.png)",
        "",
    ]
    fields = {
        "machine": host,
        "seconds": seconds,
        "killed": killer.killed,
        "validation": validation,
        "test": tested,
        "verdicts": found,
        "trials": [{**dataclasses.asdict(trial), "message": measure.brief(trial.message)} for trial in trials],
        "said": [measure.brief(line) for line in lines],
    }
    return fields, "\n".join(text)


if __name__ == "__main__":
    main()

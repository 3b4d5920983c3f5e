"""The command line, `keras-dsr`: train, resume, tune, evaluate, report, recipes, pack, compare, export, verify,
check-tpu, serve.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from keras_dsr import deployment, recipes, report, runs, serving, training, tuning
from keras_dsr.distribution import DEVICES, Strategy
from keras_dsr.export import FORMS
from keras_dsr.recipes import Recipe
from keras_dsr.tuning.search import TUNERS


def _onnx_forms(text: str) -> tuple[str, ...]:
    forms = () if text == "none" else tuple(text.split(","))
    if not set(forms) <= set(FORMS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(FORMS)}, or none; received {text!r}")
    return forms


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-dsr", description="Train spiking neural networks by Differentiation on Spike Representation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a recipe", description="Train a recipe into a run folder.")
    train.add_argument("recipe", help="name of the recipe, such as digits, or a recipe.json; see keras-dsr recipes")
    train.add_argument("--epochs", help="passes over the training examples")
    train.add_argument("--timesteps", help="number of time steps N")
    train.add_argument("--seed", help="seed of everything random")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the recipe, such as threshold=4; may be given several times",
    )
    train.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go (default: runs)")
    train.add_argument("--folder", type=Path, help="the run folder itself; an unfinished run in it goes on")
    resume = commands.add_parser("resume", help="go on with a run", description="Go on with an unfinished run.")
    resume.add_argument("run", type=Path, help="a run folder, such as runs/digits-20260101-120000")
    for each in (train, resume):
        each.add_argument(
            "--export", type=Path, metavar="FOLDER", help="export the result too, as keras-dsr export does"
        )
        each.add_argument(
            "--devices", choices=tuple(DEVICES), help="where to train, on several devices (default: one device)"
        )
        each.add_argument("--replicas", type=int, help="how many there must be; of CPU devices, how many are made")
        each.add_argument("--download", action="store_true", help="download the data set if it is not there")
        each.add_argument("--tensorboard", action="store_true", help="write TensorBoard's logs to the run folder")
        each.add_argument("--verbose", type=int, default=None, help="2 for one line an epoch, 0 for none")
    evaluate = commands.add_parser("evaluate", help="evaluate a run", description="Evaluate a run's model once more.")
    evaluate.add_argument("run", type=Path, help="a run folder, such as runs/digits-20260101-120000")
    tune = commands.add_parser(
        "tune",
        help="search for the best settings of a recipe",
        description="Train a recipe with many settings, and write the best as a recipe that train takes. The same "
        "command goes on with what was stopped. Settings are chosen on the validation part.",
    )
    tune.add_argument("recipe", nargs="?", help="name of the recipe, or a recipe.json; may be left out with --folder")
    tune.add_argument("--epochs", help="passes over the training examples, of each trial")
    tune.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the recipe in all trials"
    )
    tune.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH[:log]",
        help="a setting to vary, or NAME=VALUE,VALUE,..., or NAME alone for a range around the recipe's; may be given "
        "several times (default: threshold and alpha)",
    )
    tune.add_argument("--trials", type=int, help="how many (default: 20)")
    tune.add_argument("--workers", type=int, default=1, help="processes that train trials (default: 1)")
    tune.add_argument("--tuner", choices=TUNERS, help="who draws settings (default: bayesian)")
    tune.add_argument("--seed", type=int, help="seed of the tuner (default: 0)")
    tune.add_argument("--download", action="store_true", help="download the data set if it is not there")
    tune.add_argument("--folder", type=Path, help="folder of the search (default: runs/RECIPE-search)")
    tune.add_argument(
        "--address", metavar="HOST:PORT", help="where the chief listens, for workers of other machines (default: none)"
    )
    tune.add_argument(
        "--join", metavar="HOST:PORT", help="only add workers to the search in --folder, whose chief listens there"
    )
    reporting = commands.add_parser(
        "report",
        help="write a run's report",
        description="Write one HTML page about a run, and its figures as JSON: training, firing rates, errors, energy.",
    )
    reporting.add_argument("run", help="a run folder, such as runs/digits-20260101-120000; or a preset")
    reporting.add_argument("--to", type=Path, metavar="FILE", help="the page (default: report.html in the run folder)")
    reporting.add_argument("--examples", type=int, default=1000, help="test examples to look at (default: 1000)")
    for each in (train, resume, evaluate, tune, reporting):
        each.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
    listing = commands.add_parser(
        "recipes", help="list recipes", description="List all recipes, or print the settings of one."
    )
    listing.add_argument("recipe", nargs="?", help="print this one's settings")
    pack = commands.add_parser(
        "pack", help="pack a run's weights", description="Pack a finished run's weights, card and history as a preset."
    )
    pack.add_argument("run", type=Path, help="a run folder")
    pack.add_argument("card", type=Path, help="the card to write, a .json file; weights and history go beside it")
    pack.add_argument("--version", type=int, default=1, help="version of the weights (default: 1)")
    pack.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
    compare = commands.add_parser(
        "compare", help="compare runs", description="Show the settings in which runs differ, and what came out."
    )
    compare.add_argument("runs", type=Path, nargs="+", help="two or more run folders")
    export = commands.add_parser(
        "export",
        help="export a run for TensorFlow Serving and ONNX",
        description="Write a run, or a preset, as the next version of a SavedModel and as ONNX, proven to do the same.",
    )
    export.add_argument(
        "--to", type=Path, default=Path("savedmodels"), help="folder of all models (default: savedmodels)"
    )
    export.add_argument("--name", help="what it is served as (default: the recipe's name, or the preset's)")
    export.add_argument(
        "--onnx",
        type=_onnx_forms,
        default=("unrolled",),
        metavar="FORMS",
        help=f"which of {', '.join(FORMS)} to write, with commas between, or none (default: unrolled)",
    )
    export.add_argument("--fold-thresholds", action="store_true", help="ONNX whose spikes are 0 and 1")
    export.add_argument("--weight-bits", type=int, choices=(8, 4), help="ONNX whose weights are whole numbers")
    export.add_argument(
        "--arithmetic",
        choices=deployment.ARITHMETICS,
        default="float",
        help="exact: rounded so that ONNX Runtime fires each spike as Keras does; integer: so, and with convolutions "
        "of 8-bit weights; no flip is allowed then (default: float)",
    )
    verify = commands.add_parser(
        "verify",
        help="compare an export with its network",
        description="Run real inputs through a run's, or a preset's, network and what was exported of it, and compare.",
    )
    verify.add_argument("exported", type=Path, help="a SavedModel, such as savedmodels/digits or savedmodels/digits/1")
    verify.add_argument(
        "--onnx",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an ONNX file; may be given several times (default: those of the version)",
    )
    verify.add_argument("--report", type=Path, help="write the report to this .json file")
    for each in (export, verify):
        each.add_argument("network", help="a run folder, such as runs/digits-20260101-120000; or a preset")
        each.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
        each.add_argument("--examples", type=int, default=256, help="how many real inputs to compare (default: 256)")
        each.add_argument(
            "--flip-budget",
            type=float,
            default=1e-6,
            metavar="PART",
            help="which part of the places where a spike could be may differ (default: 1e-6)",
        )
    check_tpu = commands.add_parser(
        "check-tpu",
        help="compile a recipe's training for TPUs, without one",
        description="Compile a recipe's training step ahead of time for the TPUs of a topology, on a machine without "
        "one: shapes that are not fixed, operations that do not compile, exchanges between replicas. Needs "
        "KERAS_BACKEND=jax.",
    )
    check_tpu.add_argument("recipe", help="name of the recipe, or a recipe.json")
    check_tpu.add_argument("--topology", default="v5e:2x2", help="generation and shape (default: v5e:2x2, 4 cores)")
    check_tpu.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
    check_tpu.add_argument("--report", type=Path, help="write the findings to this .json file")
    check_tpu.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting of the recipe, such as batch_size=256; may be given several times",
    )
    serve = commands.add_parser(
        "serve",
        help="serve exported models, for development",
        description="Serve SavedModels by TensorFlow Serving's API, for development, until SIGTERM or Ctrl-C.",
    )
    serve.add_argument("models", nargs="+", help="folders of versions, such as savedmodels/digits, or NAME=FOLDER")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    serve.add_argument("--grpc-port", type=int, default=8500, help="port of gRPC, 0 for any (default: 8500)")
    serve.add_argument("--rest-port", type=int, default=8501, help="port of REST, 0 for any (default: 8501)")
    serve.add_argument("--max-batch-size", type=int, default=32, help="examples to join to one run (default: 32)")
    serve.add_argument("--max-examples", type=int, default=1024, help="most examples of a request (default: 1024)")
    serve.add_argument("--max-request-mb", type=int, default=64, help="largest request in MiB (default: 64)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `keras-dsr`; those of the process if `None`.

    Returns:
        The exit status: 0; 1 after an error that the user can mend, which is printed; 130 if stopped by Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except (ValueError, OSError, ImportError) as error:
        print(f"keras-dsr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options, ("epochs", "timesteps", "seed"))
    devices = training.strategy(options.devices, replicas=options.replicas)
    if devices.processes > 1 and options.folder is None:
        raise ValueError("Several processes train into one folder, which all of them can read: name it with --folder.")
    folder = options.folder or runs.new_folder(recipe, options.runs)
    try:
        _run(recipe, folder, devices, options)
    except BaseException:
        if options.folder is None:
            runs.discard(folder)
        raise


def _recipe(options: argparse.Namespace, names: Sequence[str]) -> Recipe:
    """The recipe that was named, with the settings that were given by `--set` and by options of their own."""
    given = Path(options.recipe)
    recipe = (
        Recipe.from_json(given.read_text(encoding="utf-8")) if given.suffix == ".json" else recipes.get(options.recipe)
    )
    changes = recipes.parse_settings(options.set)
    for name in names:
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    return recipe.with_settings(changes)


def _resume(options: argparse.Namespace) -> None:
    devices = training.strategy(options.devices, replicas=options.replicas)
    _run(runs.recipe_of(options.run), options.run, devices, options)


def _run(recipe: Recipe, folder: Path, devices: Strategy, options: argparse.Namespace) -> None:
    if options.export is not None:
        with _told():
            deployment.check(recipe)
    before = _written(folder)
    try:
        summary = training.train(
            recipe,
            folder,
            devices=devices,
            data_dir=options.data_dir,
            download=options.download,
            tensorboard=options.tensorboard,
            verbose="auto" if options.verbose is None else options.verbose,
        )
    except BaseException:
        if _written(folder) != before:
            print(f"keras-dsr: stopped; go on with: keras-dsr resume {folder}", file=sys.stderr)
        raise
    if not devices.is_chief:
        return
    _report(summary, folder)
    if options.export is not None:
        _deploy(deployment.source(folder, data_dir=options.data_dir), options.export)
    files = [name for name in ("model.keras", "history.csv", "figure.png") if (folder / name).exists()]
    console = Console()
    console.print(f"Written to {folder}: {', '.join(files)}. Look at it again with", soft_wrap=True)
    console.print(f"  keras-dsr evaluate {folder}", soft_wrap=True)


def _written(folder: Path) -> float:
    """When the folder's last checkpoint was written; 0 if there is none."""
    path = folder / "checkpoint.npz"
    return path.stat().st_mtime if path.exists() else 0.0


def _evaluate(options: argparse.Namespace) -> None:
    _report(training.evaluate(options.run, data_dir=options.data_dir), options.run)


def _write_report(options: argparse.Namespace) -> None:
    written = report.write(options.run, data_dir=options.data_dir, examples=options.examples, to=options.to)
    for title, why in written.missing.items():
        print(f"keras-dsr: {title} is left out. {why}", file=sys.stderr)
    print(f"Written: {written.html}, and its figures in {written.json}")


def _report(summary: runs.Summary, folder: Path) -> None:
    table = Table(title=f"{folder}", title_justify="left", show_header=False)
    table.add_row("test accuracy", f"{summary.test_accuracy:.2%} of {summary.test_examples} examples")
    table.add_row("validation accuracy", f"{_percent(summary.validation_accuracy)}, epoch {summary.epoch}")
    table.add_row("time steps N", str(summary.timesteps))
    for name, rate in summary.firing_rates.items():
        table.add_row(f"{name}", f"firing rate {rate:.3f}, threshold {summary.thresholds[name]:.2f}")
    for stage in summary.stages:
        accuracy = _percent(stage.validation_accuracy)
        each = f"{stage.seconds:.1f} s for {stage.epochs} epochs, validation accuracy {accuracy}"
        if stage.calibrated_accuracy is not None:
            each += f"; {_percent(stage.calibrated_accuracy)} right after calibration"
        table.add_row(f"{stage.name} training", each)
    if summary.seconds_saved is not None:
        table.add_row("saved by hybrid training", f"{summary.seconds_saved:.1f} s against as many epochs with spikes")
    Console().print(table)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2%}"


def _tune(options: argparse.Namespace) -> None:
    if options.join is not None:
        if options.recipe is not None or options.folder is None:
            raise ValueError("--join takes what to train from the folder of the search: pass --folder, and no recipe.")
        names = ("trials", "space", "set", "epochs", "tuner", "seed", "address", "download")
        # 0 is a seed that was given.
        given = [f"--{name}" for name in names if getattr(options, name) or type(getattr(options, name)) is int]
        if given:
            raise ValueError(f"--join takes all settings from the folder of the search. Leave out {', '.join(given)}.")
        tuning.join(options.folder, options.join, workers=options.workers, data_dir=options.data_dir)
        return
    if options.recipe is None:
        if options.folder is None:
            raise ValueError("tune takes a recipe, such as digits, or --folder of a search that is to go on.")
        if options.set or options.epochs or options.space or options.tuner or options.seed is not None:
            raise ValueError("A search goes on with the settings that it has. Leave them out, or pass the recipe too.")
        search = tuning.search_of(options.folder)
        folder = options.folder
    else:
        recipe = _recipe(options, ("epochs",))
        space = tuning.parse(recipe, options.space) if options.space else tuning.default_space(recipe)
        given = {name: getattr(options, name) for name in ("tuner", "seed") if getattr(options, name) is not None}
        search = tuning.Search(recipe=recipe, space=space, **given)
        folder = options.folder or Path("runs") / f"{recipe.name}-search"
    if options.trials is not None:
        search = dataclasses.replace(search, trials=options.trials)
    try:
        tuning.tune(
            search,
            folder,
            workers=options.workers,
            data_dir=options.data_dir,
            address=options.address,
            download=options.download,
        )
    except KeyboardInterrupt:
        print(f"keras-dsr: stopped; go on with: keras-dsr tune --folder {folder}", file=sys.stderr)
        raise
    trials = tuning.read_trials(folder)
    title = "Trials that none beats in accuracy, time steps and firing rate"
    table = Table("trial", "settings", "N", "firing rate", "validation accuracy", title=title, title_justify="left")
    for trial in tuning.pareto(trials):
        rate, accuracy = f"{trial.firing_rate:.4f}", _percent(trial.validation_accuracy)
        table.add_row(str(trial.number), trial.told, str(trial.timesteps), rate, accuracy)
    console = Console()
    console.print(table)
    console.print(f"Written to {folder}: best.json, results.md, results.json, results.png.", soft_wrap=True)
    console.print("Train the best, and evaluate it once on the test part, with", soft_wrap=True)
    console.print(f"  keras-dsr train {folder / 'best.json'}", soft_wrap=True)


def _recipes(options: argparse.Namespace) -> None:
    if options.recipe is not None:
        print(recipes.get(options.recipe).to_json(), end="")
        return
    table = Table("recipe", "what", "experiments", "the paper reports", title="Recipes", title_justify="left")
    for name, recipe in recipes.RECIPES.items():
        groups = ", ".join(group for group, names in recipes.EXPERIMENTS.items() if name in names)
        reported = recipes.REPORTED.get(name)
        table.add_row(name, recipe.summary, groups, "" if reported is None else str(reported))
    Console().print(table)


def _pack(options: argparse.Namespace) -> None:
    card = training.pack(options.run, options.card, data_dir=options.data_dir, version=options.version)
    print(f"Written: {options.card}, with weights and history beside it. Use them so:")
    print(f"  {card.builder}, weights={str(options.card)!r})")


def _compare(options: argparse.Namespace) -> None:
    heading, rows = runs.compare(options.runs)
    table = Table(*heading)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _export(options: argparse.Namespace) -> None:
    given = deployment.source(options.network, data_dir=options.data_dir, examples=options.examples)
    if options.name is not None:
        given = dataclasses.replace(given, name=options.name)
    _deploy(
        given,
        options.to,
        onnx=options.onnx,
        fold_thresholds=options.fold_thresholds,
        weight_bits=options.weight_bits,
        arithmetic=options.arithmetic,
        flip_budget=options.flip_budget,
    )


def _deploy(given: deployment.Source, base: Path, **settings: Any) -> None:
    with _told():
        exported = deployment.deploy(given, base, **settings)
    console = Console()
    for proof in exported.reports:
        console.print(proof.table())
    inputs = "random inputs, as the data set is not at hand (pass --data-dir for real ones)"
    if given.examples is not None:
        inputs = f"{len(given.examples)} real inputs"
    paths = ", ".join(map(str, exported.paths))
    console.print(f"Exported, and verified against Keras on {inputs}: {paths}", soft_wrap=True)
    print(f"\n{exported.usage}\n")


def _verify(options: argparse.Namespace) -> None:
    given = deployment.source(options.network, data_dir=options.data_dir, examples=options.examples)
    with _told():
        proof = deployment.verify(given, options.exported, options.onnx, flip_budget=options.flip_budget)
    Console().print(proof.table())
    if options.report is not None:
        proof.write(options.report)
    if not proof.passed:
        raise ValueError(f"{options.exported} does not do as {options.network} does.")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Has `main` tell, like other errors, why export cannot run here: Keras on JAX, a TensorFlow without a C API."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _check_tpu(options: argparse.Namespace) -> None:
    try:
        from keras_dsr import tpu
    except ModuleNotFoundError as error:
        raise ImportError("Compiling for TPUs needs JAX and libtpu: pip install 'keras-dsr[tpu]'.") from error
    import jax

    if not jax.config.jax_platforms:
        # This process is here for nothing else. Without it JAX looks for the TPU that libtpu belongs to.
        jax.config.update("jax_platforms", "cpu")
    recipe = _recipe(options, ())
    findings = []
    for finding in tpu.check(recipe, topology=options.topology, data_dir=options.data_dir):
        print("\n".join(finding.lines()), flush=True)
        findings.append(finding)
    if options.report is not None:
        tpu.write(options.report, findings)
    if not all(finding.ready for finding in findings):
        raise ValueError(f"{recipe.name} is not ready for {options.topology}.")


def _serve(options: argparse.Namespace) -> None:
    settings = serving.Settings(
        host=options.host,
        grpc_port=options.grpc_port,
        rest_port=options.rest_port,
        max_batch_size=options.max_batch_size,
        max_examples=options.max_examples,
        max_request_bytes=options.max_request_mb * 2**20,
    )
    serving.run(serving.model_folders(options.models), settings)


_COMMANDS = {
    "train": _train,
    "resume": _resume,
    "tune": _tune,
    "evaluate": _evaluate,
    "report": _write_report,
    "recipes": _recipes,
    "pack": _pack,
    "compare": _compare,
    "export": _export,
    "verify": _verify,
    "check-tpu": _check_tpu,
    "serve": _serve,
}

if __name__ == "__main__":
    sys.exit(main())

"""Whether what is exported does as the network in Keras does, on real inputs: every form, spike by spike.

    python benchmarks/export_proof.py --images DATA --events DATA
    python benchmarks/export_proof.py --network digits --examples 64
    python benchmarks/export_proof.py --arithmetic exact --images DATA --events DATA
    python benchmarks/export_proof.py --network vgg11-if --add --events DATA    # beside the results that are there

Each network is exported as a SavedModel and as ONNX in its three forms, and `keras_dsr.export.verify` compares all of
them with Keras on the same inputs: those of the test part, and of the training part where that has too few.

The digits' network is trained whole, and presets are as they ship. PreAct-ResNet-18 and VGG-11 are trained only until
they fire on what they see (`--updates` updates of the representation network, then calibrated thresholds): the proof
asks that numbers are equal, not that they are good.

With `--arithmetic` exact or integer it is `keras_dsr.export.exact_copy` or `integer_copy` of each that is exported,
and not one spike may be flipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, machine, write


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to prove.

    Args:
        recipe: What it is made by; or the name of a preset.
        settings: That differ from the recipe's.
        data: Which folder its data set is in: "images" or "events"; `None` if it needs none.
    """

    recipe: str
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    data: str | None = None


_FRAMES = {"depth": "11", "widths": "", "size": "48,48", "timesteps": "5"}
CASES = {
    "digits": Case("digits"),
    "preact_resnet18-if": Case("cifar10-if-n5", data="images"),
    "preact_resnet18-lif": Case("cifar10-lif-n5", data="images"),
    "vgg11-if": Case("nmnist", _FRAMES, "events"),
    "vgg11-lif": Case("nmnist", {**_FRAMES, "neuron": "lif"}, "events"),
    "vgg5-nmnist": Case("vgg5-nmnist", data="events"),
    "preact_resnet20-cifar10": Case("preact_resnet20-cifar10", data="images"),
}
FORMS = ("unrolled", "loop", "step")


def network(case: Case, folders: dict[str, Path | None], count: int, updates: int) -> tuple[Any, Any, np.ndarray]:
    """A model, what makes its inputs of those that clients send, and such inputs."""
    import keras

    from keras_dsr import deployment, models, recipes, training
    from keras_dsr.export import Preprocessing

    data_dir = folders.get(case.data)
    if case.recipe not in recipes.RECIPES:
        given = deployment.source(case.recipe, data_dir=data_dir, examples=count)
        return given.model, given.preprocessing, given.examples

    recipe = recipes.get(case.recipe).with_settings(case.settings)
    keras.utils.set_random_seed(0)
    loaded = training.load(recipe, data_dir=data_dir)
    if case.data is None:
        with tempfile.TemporaryDirectory() as folder:
            training.train(recipe, Path(folder) / "run", verbose=0)
            model = keras.models.load_model(Path(folder) / "run" / "model.keras")
    else:
        batches = loaded.training_batches(64, seed=0, epochs=1).take(updates)
        representation = recipe.build(loaded.classes, loaded.input_shape, timesteps=0)
        training.compile_model(representation, recipe, updates)
        representation.fit(batches, verbose=0)
        models.calibrate_thresholds(representation, batches.take(4).as_numpy_iterator(), 99)
        model = recipe.build(loaded.classes, loaded.input_shape)
        model.set_weights(representation.get_weights())
    parts = [loaded.stored_batches(part, 32, seed=0) for part in (loaded.test, loaded.train)]
    # One batch more than they fill: the last one of the test part may be short.
    batches = parts[0].concatenate(parts[1]).take(-(-count // 32) + 1)
    x = np.concatenate([x for x, _ in batches.as_numpy_iterator()])[:count]
    images = x.ndim == 4
    preprocessing = Preprocessing(loaded.mean, loaded.std, "uint8") if images else None
    return model, preprocessing, x.astype("uint8" if images else "float32")


def copied(arithmetic: str, model: Any, preprocessing: Any, x: np.ndarray) -> tuple[Any, float]:
    """A copy that no runtime rounds otherwise, and the part of the inputs to which both give the same class."""
    from keras_dsr import deployment

    copy = deployment.copied(deployment.Source(model.name, model, preprocessing, {}, x), arithmetic)
    return copy.model, copy.about["arithmetic"]["same_class_as_trained"]


def prove(model: Any, preprocessing: Any, x: np.ndarray, batch_size: int, flip_budget: float) -> Any:
    """The report on everything that can be exported of a model."""
    from keras_dsr.export import export_onnx, export_saved_model, verify

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        version = export_saved_model(
            model, folder / "network", preprocessing=preprocessing, examples=x[:2], flip_budget=flip_budget
        )
        files = [
            export_onnx(model, folder / f"{form}.onnx", form=form, preprocessing=preprocessing, verify=False)
            for form in FORMS
        ]
        return verify(
            model,
            x,
            saved_model=version,
            onnx=files,
            preprocessing=preprocessing,
            batch_size=batch_size,
            flip_budget=flip_budget,
        )


def table(results: dict[str, Any], reports: dict[str, Any]) -> str:
    """The results in Markdown."""
    about = results["machine"]
    lines = [
        "# Exported networks against Keras",
        "",
        f"`{results['command']}`, {about['cores']} cores of {about['processor']}, {about['date']}.",
        "",
        "| network | inputs | form | runtime | logits | flipped spikes | same class | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, report in reports.items():
        for row in report.rows:
            agreement = "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}"
            lines.append(
                f"| {name} | {row.examples} | {row.form} | {row.runtime} | {row.answers} | {row.spikes_found} | "
                f"{agreement} | {row.verdict}{row.reason and ': '}{row.reason} |"
            )
    silent = ", ".join(f"{layer} of {name}" for name, report in reports.items() for layer in report.silent)
    lines += ["", f"Neuron layers that never fired: {silent or 'none'}."]
    same = [f"{name} {each['same_class']:.1%}" for name, each in results["networks"].items() if "same_class" in each]
    if same:
        lines += ["", f"Inputs to which the copy gives the class that its network gives: {', '.join(same)}."]
    return "\n".join(lines) + "\n"


def add_earlier(name: str, results: dict[str, Any], reports: dict[str, Any]) -> None:
    """Takes the networks of an earlier run into `results` and `reports`.

    Raises:
        ValueError: if that run was of another machine or other versions.
    """
    from keras_dsr.export.report import Report, Row

    earlier = json.loads((RESULTS / f"{name}.json").read_text())
    about = ("processor", "cores", "python", "versions")
    differ = [each for each in about if earlier["machine"][each] != results["machine"][each]]
    if differ:
        raise ValueError(f"--add is for results of the same machine and versions. These differ: {', '.join(differ)}.")
    commands = earlier["command"].split("; ")
    results["command"] = "; ".join(dict.fromkeys([*commands, results["command"] + " --add"]))
    results["networks"] = earlier["networks"]
    for network, kept in earlier["networks"].items():
        fields = {field.name: kept[field.name] for field in dataclasses.fields(Report)}
        rows = tuple(Row(**row) for row in fields.pop("rows"))
        reports[network] = Report(**{**fields, "rows": rows, "silent": tuple(fields["silent"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--images", type=Path, help="where CIFAR-10 is (default: $KERAS_DSR_DATA)")
    parser.add_argument("--events", type=Path, help="where N-MNIST is (default: $KERAS_DSR_DATA)")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8, help="larger ones take many GB for ResNet-18")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--arithmetic", choices=("float", "exact", "integer"), default="float")
    parser.add_argument("--add", action="store_true", help="keep the other networks of an earlier run of this machine")
    options = parser.parse_args()

    copy = options.arithmetic != "float"
    results: dict[str, Any] = {
        "machine": machine(),
        "command": f"python benchmarks/export_proof.py --network {' '.join(options.network)} "
        f"--examples {options.examples}{f' --arithmetic {options.arithmetic}' if copy else ''}",
        "networks": {},
    }
    name_of_results = f"export_proof_{options.arithmetic}" if copy else "export_proof"
    reports: dict[str, Any] = {}
    if options.add:
        add_earlier(name_of_results, results, reports)
    folders = {"images": options.images, "events": options.events}
    for name in options.network:
        started = time.perf_counter()
        model, preprocessing, x = network(CASES[name], folders, options.examples, options.updates)
        same = {}
        if copy:
            model, same["same_class"] = copied(options.arithmetic, model, preprocessing, x)
        report = prove(model, preprocessing, x, options.batch_size, 0.0 if copy else 1e-6)
        reports[name] = report
        results["networks"][name] = {**dataclasses.asdict(report), **same}
        print(f"{name}: {'passed' if report.passed else 'FAILED'} in {time.perf_counter() - started:.0f} s", flush=True)
        text = table(results, reports)
        # After each, since they take minutes.
        write(name_of_results, results, text)
    print(text)


if __name__ == "__main__":
    main()

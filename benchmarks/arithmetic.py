"""What exact sums and whole numbers cost: test accuracy of the presets as trained, and as copies.

    python benchmarks/arithmetic.py --images DATA --events DATA

Each preset is evaluated in Keras on all of its test part, three times: as it is, as `keras_dsr.export.exact_copy`, and
as `keras_dsr.export.integer_copy`, on the grids that `keras-dsr export` takes.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from measure import machine, markdown, write


def right(name: str, data_dir: Path | None) -> tuple[dict[str, int], int]:
    """How many of a preset's test examples have the right class, by arithmetic; and how many there are."""
    import keras

    from keras_dsr import deployment, training
    from keras_dsr.recipes import Recipe

    given = deployment.source(name, data_dir=data_dir)
    loaded = training.load(Recipe.from_json(json.dumps(given.about["recipe"])), data_dir=data_dir)
    found = {}
    for arithmetic in deployment.ARITHMETICS:
        model = (given if arithmetic == "float" else deployment.copied(given, arithmetic)).model
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        accuracy = model.evaluate(loaded.batches(loaded.test, 128), verbose=0, return_dict=True)["accuracy"]
        found[arithmetic] = round(accuracy * len(loaded.test))
    return found, len(loaded.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", help="which of them (default: all)")
    parser.add_argument("--images", type=Path, help="where CIFAR-10 is (default: $KERAS_DSR_DATA)")
    parser.add_argument("--events", type=Path, help="where N-MNIST and POKER-DVS are (default: $KERAS_DSR_DATA)")
    options = parser.parse_args()

    from keras_dsr import deployment
    from keras_dsr.models import presets

    about = machine()
    results, rows = {}, []
    for name in options.preset or presets.names():
        found, count = right(name, options.images if name.endswith("cifar10") else options.events)
        results[name] = {**found, "examples": count}
        rows.append([name, *(f"{number} ({number / count:.2%})" for number in found.values()), count])
        print(rows[-1], flush=True)
    lines = [
        "# Presets in three arithmetics: right answers of the test part",
        "",
        f"`{about['command']}`, {about['cores']} cores of {about['processor']}, {about['date']}.",
        "",
        *markdown(["preset", *deployment.ARITHMETICS, "test examples"], rows),
    ]
    write("arithmetic", {"machine": about, "results": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

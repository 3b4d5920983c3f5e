"""Kills a training at random moments, resumes it each time, and compares what comes out with an unbroken run.

    python benchmarks/kill_and_resume.py --kills 10    # three stages on the digits, with dropout
    python benchmarks/kill_and_resume.py --jax

The process gets SIGKILL, so nothing of it has a chance to tidy up. Afterwards every weight of the two models, the
history (but for the seconds) and the test accuracy must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine, write

SETTINGS = (
    "epochs=3",
    "hybrid_epochs=2",
    "hybrid_quantized_epochs=2",
    "hybrid_optimizer=sgd",
    "hybrid_learning_rate=0.05",
    "selection=best",
    "timesteps=4",
)


def command(folder: Path) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [
        sys.executable,
        "-m",
        "keras_dsr.cli",
        "train",
        "digits",
        *settings,
        "--folder",
        str(folder),
        "--verbose",
        "0",
    ]


def run(folder: Path, backend: str, kill_after: float | None = None) -> tuple[bool, float]:
    """Runs the training in a process; whether it came to its end, and how long it ran."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    started = time.perf_counter()
    process = subprocess.Popen(
        command(folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"the training failed:\n{errors}")
    return True, time.perf_counter() - started


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's history, without what a clock said."""
    with (folder / "history.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def kept(folder: Path) -> int:
    """How many epochs a run would not have to train again."""
    from keras_dsr import checkpoints

    path = folder / "checkpoint.npz"
    return len(checkpoints.progress(path)["rows"]) if path.is_file() else 0


def result(folder: Path) -> dict:
    """A run's summary, without what a clock said."""
    summary = json.loads((folder / "summary.json").read_text())
    stages = [{name: value for name, value in stage.items() if name != "seconds"} for stage in summary["stages"]]
    return {name: value for name, value in summary.items() if "seconds" not in name} | {"stages": stages}


def weights(folder: Path) -> list[bytes]:
    """Every weight of a run's model, as bytes."""
    import keras

    import keras_dsr  # noqa: F401 - registers the layers

    return [weight.tobytes() for weight in keras.models.load_model(folder / "model.keras").get_weights()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--jax", action="store_true", help="on JAX instead of TensorFlow")
    options = parser.parse_args()
    backend = "jax" if options.jax else "tensorflow"
    moments = random.Random(options.seed)

    with tempfile.TemporaryDirectory() as temporary:
        unbroken, broken = Path(temporary) / "unbroken", Path(temporary) / "broken"
        _, seconds = run(unbroken, backend)
        print(f"unbroken: {seconds:.1f} s")
        kills, resumes_at = 0, []
        finished = False
        while not finished:
            # Anywhere in a run: as it starts, between epochs, in the midst of one, as a file is written.
            after = moments.uniform(0.05, 1.0) * seconds if kills < options.kills else None
            finished, lasted = run(broken, backend, after)
            if not finished:
                kills += 1
                epochs = kept(broken)
                resumes_at.append(epochs)
                print(f"kill {kills} after {lasted:.1f} s: {epochs} epochs kept")
            elif kills < options.kills:
                # It came to its end before the last kill: from the start once more, for the kills that are left.
                compare(unbroken, broken)
                for file in broken.iterdir():
                    file.unlink()
                finished = False
        compare(unbroken, broken)
    results = {"kills": kills, "epochs_kept_at_each": resumes_at, "unbroken_s": seconds, "machine": machine()}
    said = (
        f"{kills} SIGKILLs at random moments; epochs kept at each: {resumes_at}; weights, history and summary equal.\n"
    )
    write(f"kill_and_resume_{backend}", results, said)
    print(said, end="")


def compare(unbroken: Path, broken: Path) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if history(unbroken) != history(broken):
        raise SystemExit("the histories differ")
    if weights(unbroken) != weights(broken):
        raise SystemExit("the weights differ")
    if result(unbroken) != result(broken):
        raise SystemExit("the summaries differ")


if __name__ == "__main__":
    main()

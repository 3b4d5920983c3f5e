"""Trains a recipe on several processes that Ray starts, on this machine or on the machines of a Ray cluster.

    pip install 'keras-dsr[ray]'
    python examples/train_on_ray.py                                  # 2 processes here, a small network, a few epochs
    python examples/train_on_ray.py --recipe cifar10-if --workers 8 --gpus --folder /shared/runs/cifar10 \
        --data-dir /shared/data --address auto

Ray names the processes to one another and watches them. If one is lost it ends the others and starts all again, which
go on from the last epoch in the run folder, to the weights of a run that nothing happened to. All machines must see
that folder, and the data.

Without Ray: start the same command on every machine, with TF_CONFIG (TensorFlow) or the variables of
keras.distribution.initialize (JAX) saying which process it is. See docs/distribution.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

SMALL = {"widths": "8,16", "timesteps": "4", "epochs": "3", "train_examples": "640"}


def train_worker(task: dict[str, Any]) -> None:
    """What each process does; it begins in the same way after a failure."""
    # Ray's trainer says so in TF_CONFIG, and sets a variable that belongs to the Keras that TensorFlow once had.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ["KERAS_BACKEND"] = task["backend"]
    config = json.loads(os.environ["TF_CONFIG"])
    addresses = config["cluster"]["worker"]
    if task["backend"] == "jax":
        del os.environ["TF_CONFIG"]
        os.environ["KERAS_DISTRIBUTION_JOB_ADDRESSES"] = addresses[0]
        os.environ["KERAS_DISTRIBUTION_NUM_PROCESSES"] = str(len(addresses))
        os.environ["KERAS_DISTRIBUTION_PROCESS_ID"] = str(config["task"]["index"])

    from keras_dsr import training
    from keras_dsr.recipes import Recipe

    devices = training.strategy("jax-data-parallel" if task["backend"] == "jax" else "multiworker")
    data_dir = None if task["data_dir"] is None else Path(task["data_dir"])
    training.train(
        Recipe.from_json(task["recipe"]), Path(task["folder"]), devices=devices, data_dir=data_dir, verbose=2
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="name of a recipe (default: digits, made small)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as keras-dsr train takes it")
    parser.add_argument("--folder", type=Path, default=Path("runs/ray"), help="the run folder; a run in it goes on")
    parser.add_argument("--data-dir", type=Path, help="where the data set is, on every machine")
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    parser.add_argument("--gpus", action="store_true", help="one GPU for each process")
    parser.add_argument(
        "--backend", choices=["tensorflow", "jax"], default=os.environ.get("KERAS_BACKEND", "tensorflow")
    )
    parser.add_argument("--address", help="of a Ray cluster, such as auto (default: this machine)")
    parser.add_argument("--max-failures", type=int, default=3, help="how often to start again (default: 3)")
    options = parser.parse_args()

    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.tensorflow import TensorflowTrainer
    except ImportError as error:
        raise SystemExit("This example needs Ray: pip install 'keras-dsr[ray]'.") from error

    from keras_dsr import recipes, runs

    recipe = recipes.get(options.recipe or "digits")
    changes = {} if options.recipe else SMALL
    recipe = recipe.with_settings({**changes, **recipes.parse_settings(options.set)})
    folder = options.folder.resolve()
    task = {
        "recipe": recipe.to_json(),
        "folder": str(folder),
        "data_dir": None if options.data_dir is None else str(options.data_dir.resolve()),
        "backend": options.backend,
    }
    ray.init(address=options.address, include_dashboard=False if options.address is None else None)
    with tempfile.TemporaryDirectory() as own:  # what Ray writes of its own; our files are in the run folder
        TensorflowTrainer(
            train_worker,
            train_loop_config=task,
            scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
            run_config=RunConfig(
                storage_path=str(folder.parent) if options.address else own,
                name=f"{folder.name}-ray",
                failure_config=FailureConfig(max_failures=options.max_failures),
            ),
        ).fit()
    ray.shutdown()
    summary = runs.summary_of(folder)
    print(f"{recipe.name} on {options.workers} processes: {summary.test_accuracy:.1%} right, in {folder}")


if __name__ == "__main__":
    main()

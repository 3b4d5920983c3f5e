"""Kills processes of a training on several of them, starts all again each time, and compares with an unbroken run.

    python benchmarks/kill_workers.py --kills 5                  # TensorFlow: 2 workers
    python benchmarks/kill_workers.py --kills 5 --engine jax     # JAX: 2 processes

The worker, the chief, and all of them get SIGKILL in turn, at random steps, so many times each. Those that are left
are ended, as a scheduler does, and all are started again with the same folder. Afterwards every weight, the history
(but for the seconds) and the test accuracy must be equal to the unbroken run's, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from kill_and_resume import compare, history, kept
from measure import machine, markdown, write
from workers import Workers

SETTINGS = ("epochs=3", "hybrid_epochs=2", "timesteps=3", "widths=4,8", "train_examples=640", "selection=best")
HYBRID = ("hybrid_optimizer=sgd", "hybrid_learning_rate=0.05")
STARTS = 3  # as many tries, if a port is lost
ROLES = {"worker": [1], "chief": [0], "all": [0, 1]}
DEVICES = {"tensorflow": "multiworker", "jax": "jax-data-parallel"}


def start(folder: Path, engine: str, settings: tuple[str, ...] = (*SETTINGS, *HYBRID)) -> Workers:
    """Starts the two processes of a training."""
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "keras_dsr.cli", "train", "digits", *words, "--folder", str(folder)]
    command += ["--devices", DEVICES[engine], "--replicas", "2", "--verbose", "2"]
    return Workers(command, engine, 2, folder.with_name(folder.name + "-logs"))


def whole(folder: Path, engine: str, timeout: float, settings: tuple[str, ...] = (*SETTINGS, *HYBRID)) -> float:
    """Trains to the end, and gives the seconds from the first step to the last checkpoint."""
    for _ in range(STARTS):
        started = start(folder, engine, settings)
        ended_well = started.wait(timeout)
        if ended_well or not lost_port(started):
            break
    if not ended_well:
        raise SystemExit(f"the training failed:\n{started.told()}")
    return (folder / "checkpoint.npz").stat().st_mtime - (folder / "environment.json").stat().st_mtime


def lost_port(started: Workers) -> bool:
    """Whether another program of the machine took a port between the search for it and the start."""
    return "is taken by another process" in started.told()


def killed(
    folder: Path,
    engine: str,
    role: str,
    after: float,
    timeout: float,
    settings: tuple[str, ...] = (*SETTINGS, *HYBRID),
    patience: float = 5.0,
    epochs: int = 0,
) -> tuple[bool, Workers]:
    """Trains, and kills those of a role so many seconds after it has begun, or after an epoch.

    Args:
        folder: The run folder.
        engine: "tensorflow" or "jax".
        role: One of `ROLES`.
        after: Seconds from there to the kill.
        timeout: Seconds that all may take.
        settings: Of the recipe.
        patience: Seconds that those that are left get to end by themselves.
        epochs: How many must be in the history before; 0 for the beginning of the first that is run.

    Returns:
        Whether all still ran then, and the processes, which have ended.
    """
    for _ in range(STARTS):
        ran, started = _killed(folder, engine, role, after, timeout, settings, patience, epochs)
        if not lost_port(started):
            break
    return ran, started


def _killed(
    folder: Path,
    engine: str,
    role: str,
    after: float,
    timeout: float,
    settings: tuple[str, ...],
    patience: float,
    epochs: int,
) -> tuple[bool, Workers]:
    deadline = time.monotonic() + timeout
    started = start(folder, engine, settings)
    try:

        def begun() -> bool:
            if epochs:
                return (folder / "history.csv").is_file() and len(history(folder)) >= epochs
            return "Epoch " in started.logs[0].read_text()

        while started.running and time.monotonic() < deadline and not begun():
            time.sleep(0.01)
        moment = time.monotonic() + after
        while started.running and time.monotonic() < moment:
            time.sleep(0.005)
        ran = started.running
        started.kill(ROLES[role] if ran else None)
    finally:
        started.wait(timeout=patience)
    return ran, started


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=list(DEVICES), default="tensorflow")
    parser.add_argument("--kills", type=int, default=5, help="of each role")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one start may take")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        unbroken = Path(temporary) / "unbroken"
        seconds = whole(unbroken, options.engine, options.timeout)
        print(f"unbroken: {seconds:.1f} s of training", flush=True)
        for role in ROLES:
            broken, kills, resumes_at, rounds = Path(temporary) / role, 0, [], 0
            while kills < options.kills:
                rest = 1 - kept(broken) / kept(unbroken)
                after = moments.uniform(0, max(rest, 0.2)) * seconds
                hit = killed(broken, options.engine, role, after, options.timeout)[0]
                if hit and kept(broken) < kept(unbroken):  # else only the evaluation was left to be hit
                    kills += 1
                    resumes_at.append(kept(broken))
                    print(f"{role}: kill {kills}: {resumes_at[-1]} epochs kept", flush=True)
                if (broken / "summary.json").is_file():  # from the start once more, for the kills that are left
                    compare(unbroken, broken)
                    rounds += 1
                    for file in broken.iterdir():
                        file.unlink()
            whole(broken, options.engine, options.timeout)
            compare(unbroken, broken)
            rows.append({"role": role, "kills": kills, "epochs_kept_at_each": resumes_at, "runs": rounds + 1})
    host = machine()
    table = [
        f"{options.engine}, 2 processes, hybrid training with dropout on the digits, {host['date']}: "
        f"`{host['command']}`.",
        "After the last start weights, history and summary were equal, bit for bit, to those of an unbroken run.",
        "",
        *markdown(
            ["killed", "SIGKILLs", "epochs kept at each", "trainings to the end"],
            [(row["role"], row["kills"], row["epochs_kept_at_each"], row["runs"]) for row in rows],
        ),
        "",
    ]
    write(f"kill_workers_{options.engine}", {"machine": host, "rows": rows}, "\n".join(table))
    print("\n".join(table))


if __name__ == "__main__":
    main()

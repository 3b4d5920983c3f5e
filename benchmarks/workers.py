"""Starts the processes of a training on this machine, and ends the others once one is gone.

    python benchmarks/workers.py --engine tensorflow --count 2 -- train digits --folder runs/two --devices multiworker
    python benchmarks/workers.py --engine jax --count 2 -- train digits --folder runs/two --devices jax-data-parallel

What comes behind `--` are the words of `keras-dsr`. On several machines a scheduler does this: each process gets the
variables that are set here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def variables(engine: str, count: int) -> list[dict[str, str]]:
    """The environment variables that tell each of `count` processes which it is.

    Args:
        engine: "tensorflow" (TF_CONFIG) or "jax" (those of `keras.distribution.initialize`).
        count: Number of processes; 1 for none.
    """
    if count == 1:
        return [{}]
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    if engine == "tensorflow":
        return [
            {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})}
            for index in range(count)
        ]
    return [
        {
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": addresses[0],
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(count),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(index),
        }
        for index in range(count)
    ]


class Workers:
    """The processes of one training.

    Args:
        command: What each runs.
        engine: "tensorflow" or "jax", which is the Keras backend too.
        count: Number of processes.
        logs: A folder; what process i prints goes to `i.log` there.
        extra: Further environment variables.
    """

    def __init__(
        self, command: Sequence[str], engine: str, count: int, logs: Path, extra: Mapping[str, str] | None = None
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{index}.log" for index in range(count)]
        self.processes = []
        for own, log in zip(variables(engine, count), self.logs, strict=True):
            environment = {**os.environ, "KERAS_BACKEND": engine, "TF_CPP_MIN_LOG_LEVEL": "2", **own, **(extra or {})}
            with log.open("w") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

    @property
    def running(self) -> bool:
        """Whether no process has come to an end."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, which: Sequence[int] | None = None) -> None:
        """SIGKILL to some of the processes; to all of them if `None`."""
        for index in range(len(self.processes)) if which is None else which:
            self.processes[index].kill()

    def wait(self, timeout: float | None = None, patience: float = 60.0) -> bool:
        """Waits for all to end; whether all ended well.

        Args:
            timeout: Seconds after which all are killed.
            patience: Seconds that the others get to end by themselves, once one has failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            now = time.monotonic()
            if any(process.returncode for process in self.processes):
                deadline = min(deadline or now + patience, now + patience)
                patience = max(deadline - now, 0.0)
            if deadline is not None and now >= deadline:
                self.kill()
            time.sleep(0.05)
        return not any(process.returncode for process in self.processes)

    def told(self) -> str:
        """What the processes printed at last."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in self.logs)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["tensorflow", "jax"], default="tensorflow")
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"))
    parser.add_argument("words", nargs="+", help="the words of keras-dsr")
    options = parser.parse_args()
    workers = Workers(
        [sys.executable, "-m", "keras_dsr.cli", *options.words], options.engine, options.count, options.logs
    )
    try:
        ended_well = workers.wait()
    except KeyboardInterrupt:
        workers.kill()
        workers.wait()
        raise
    print(workers.told())
    sys.exit(0 if ended_well else 1)


if __name__ == "__main__":
    main()

"""The processes of a search: a chief and workers that are started again when they die.

KerasTuner's chief gives a worker's trial to nobody else but the worker of the same name, so one that died comes back
under its name, and its trial goes on from the last epoch. Without the chief workers would wait for ever: all are
started again with it. Processes end when the one that started them does, however that ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras_dsr
from keras_dsr import runs, training
from keras_dsr.recipes import Recipe
from keras_dsr.tuning import optuna_study, results
from keras_dsr.tuning.search import (
    KERAS_TUNERS,
    MOST_ATTEMPTS,
    OURS,
    SILENT,
    Search,
    Trial,
    beat_of,
    check_environment,
    heard_of,
    open_folder,
    read_trial,
    read_trials,
    run_folder,
    search_of,
    split_address,
    write_trial,
)

# Exit status of a process that met what all trials would meet; starting it again would not help. (EX_UNAVAILABLE of
# BSD's sysexits.h; Python, signals and KerasTuner use others.)
FAULT = 69
# So often in a row may a process die without that a trial ends or an epoch is trained: at three trials in a row.
_MOST_DEATHS = 3 * MOST_ATTEMPTS
# Seconds.
_LOOK_EVERY = 0.5
# How often a process shows that it lives; how long a worker puts up with a chief that does not answer; and how long one
# that is joined may take to start, of which the imports are tens of seconds.
_BEAT_EVERY = 10
_CHIEF_AWAY = 600
_CHIEF_STARTS = 120


def tune(
    search: Search,
    folder: Path,
    *,
    workers: int = 1,
    data_dir: Path | None = None,
    address: str | None = None,
    download: bool = False,
    told: Callable[[str], None] = print,
) -> Recipe:
    """Runs a search with processes of this machine, and writes what it found to its folder.

    If the folder holds this search, unfinished, it goes on. Trials choose by validation accuracy; the test part is not
    looked at. A trial that fails, say because a weight becomes NaN, is recorded so, and the others go on.

    Args:
        search: The search.
        folder: Its folder: new, empty, or of this search.
        workers: How many processes train trials, 1 or more. They share the cores of this machine evenly.
        data_dir: Where the data set is, see `keras_dsr.data.load`.
        address: HOST:PORT of this machine at which KerasTuner's chief listens, for workers of other machines (`join`);
            `None` for a port that only this machine reaches.
        download: Whether to download the data set if it is not there.
        told: Gets a line for each trial that ends and each process that dies.

    Returns:
        The best trial's recipe, which is in `best.json` too.

    Raises:
        ValueError: if no trial trained to its end, or the folder is that of another search, or of one that was begun
            with other versions of packages or another backend.
        FileExistsError: if the folder has files but is not that of a search.
        FileNotFoundError: if the data set is not there.
        BlockingIOError: if the search is run in this folder already.
        OSError: if the port is taken, processes die again and again, or one meets what all trials would, such as a full
            disk.
        ImportError: if the tuner is not installed.
    """
    _check(search, workers)
    if address is not None:
        if search.tuner not in KERAS_TUNERS:
            raise ValueError(
                f"Only KerasTuner has a chief that workers of other machines reach. Received address={address!r} with "
                f"tuner={search.tuner!r}; choose one of {KERAS_TUNERS}."
            )
        split_address(address)
    training.require_validation(search.recipe, training.load(search.recipe, data_dir=data_dir, download=download))
    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder):
        if address is not None:
            from keras_dsr.tuning import kerastuner

            kerastuner.check_free(*split_address(address))
        open_folder(search, folder)
        names = [f"worker{number}" for number in range(workers)]
        _take_up(folder, names)
        if sum(trial.ended for trial in read_trials(folder)) < search.trials:
            # They tell who joins that the search is over.
            for path in folder.glob("results.*"):
                path.unlink()
            _supervise(folder, names, data_dir, search.tuner in KERAS_TUNERS, address, told)
        trials = read_trials(folder)
        if len(trials) < search.trials:
            told(f"{len(trials)} of {search.trials} trials: the space has hardly any point left that was not tried")
        return results.write(search, folder, trials)


def join(
    folder: Path,
    address: str,
    *,
    workers: int = 1,
    data_dir: Path | None = None,
    told: Callable[[str], None] = print,
) -> None:
    """Adds workers of this machine to a search whose chief runs on another, until there are no more trials.

    Args:
        folder: The folder of the search, on a disk that both machines have.
        address: HOST:PORT at which the chief listens.
        workers: How many processes train trials here, 1 or more.
        data_dir: Where the data set is on this machine, see `keras_dsr.data.load`.
        told: As in `tune`.

    Raises:
        FileNotFoundError: if it is not the folder of a search.
        ValueError: if the search has no chief, or was begun with other versions than are installed here.
        OSError: if no chief answers at the address, processes die again and again, or one meets what all trials would.
        ImportError: if the tuner is not installed.
    """
    search = search_of(folder)
    _check(search, workers)
    check_environment(search, folder)
    split_address(address)
    if search.tuner not in KERAS_TUNERS:
        raise ValueError(f"The search in {folder} has no chief to join: its tuner is {search.tuner!r}.")

    def over() -> bool:
        # A chief that has ended tells nobody; results are written after it.
        return (folder / "results.md").is_file() and all(trial.ended for trial in read_trials(folder))

    if over():
        return
    with _names(folder, workers) as names:
        _wait_for_chief(address)
        _supervise(folder, names, data_dir, False, address, told, over)


def serve(folder: Path, worker: str, address: str | None, data_dir: Path | None) -> None:
    """Is one process of a search: what `python -m keras_dsr.tuning FOLDER --worker NAME` runs.

    Args:
        folder: The folder of the search.
        worker: "chief", or the name of the worker; one that died is to come back under the same.
        address: HOST:PORT at which the chief listens; `None` for Optuna, which has none.
        data_dir: Where the data set is, see `keras_dsr.data.load`.

    Raises:
        FileNotFoundError: if it is not the folder of a search.
        ValueError: if the address is missing, or versions are others than those that the search was begun with.
        OSError: in the chief, if the port is taken; in a worker, if files cannot be read or written.
        ImportError: if a package is not installed.
    """
    search = search_of(folder)
    check_environment(search, folder)
    _beat(folder, worker, None if worker == "chief" else address)
    if search.tuner not in KERAS_TUNERS:
        optuna_study.work(search, folder, worker, data_dir)
        return
    from keras_dsr.tuning import kerastuner

    if address is None:
        raise ValueError("A worker of KerasTuner needs the chief's address. Pass --chief HOST:PORT.")
    kerastuner.serve(search, folder, worker, address, data_dir)


def end_with(descriptor: int) -> None:
    """Ends this process as soon as the other end of a pipe is closed, as it is when the process there dies."""

    def wait() -> None:
        while os.read(descriptor, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def require(tuner: str) -> None:
    """Makes sure that a tuner is installed.

    Args:
        tuner: One of `keras_dsr.tuning.search.TUNERS`.

    Raises:
        ImportError: if it is not.
    """
    try:
        if tuner in KERAS_TUNERS:
            import grpc  # noqa: F401
            import keras_tuner  # noqa: F401
            import tensorboard  # noqa: F401 - KerasTuner fails late without it
        else:
            import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"A search with {tuner!r} needs packages that are not installed ({error}). Install them with: "
            "pip install 'keras-dsr[tuning]'."
        ) from error


def _check(search: Search, workers: int) -> None:
    if workers < 1:
        raise ValueError(f"A search has 1 worker or more. Received workers={workers!r}.")
    require(search.tuner)


def _reached(address: str) -> bool:
    """Whether somebody listens at an address."""
    try:
        socket.create_connection(split_address(address), timeout=5).close()
    except OSError:
        return False
    return True


def _wait_for_chief(address: str) -> None:
    deadline = time.monotonic() + _CHIEF_STARTS
    while not _reached(address):
        if time.monotonic() > deadline:
            raise OSError(
                f"No chief of a search answers at {address} within {_CHIEF_STARTS} s. Start it there with "
                "keras-dsr tune --address, on an address that this machine reaches; no firewall may be in between."
            )
        time.sleep(_LOOK_EVERY)


@contextlib.contextmanager
def _names(folder: Path, count: int) -> Iterator[list[str]]:
    """Names for this machine's workers: the same when it joins again, and nobody else's meanwhile."""
    machine = re.sub(r"[^\w.-]", "-", platform.node()).replace("chief", "machine")  # KerasTuner goes by that word
    names: list[str] = []
    with contextlib.ExitStack() as held:
        for number in itertools.count():
            name = f"{machine}-worker{number}"
            place = folder / "logs" / f"{name}.lock"
            place.touch()
            try:
                held.enter_context(runs.locked(place))
            except BlockingIOError:
                continue
            names.append(name)
            if len(names) == count:
                break
        yield names


def _beat(folder: Path, worker: str, address: str | None) -> None:
    """Shows as long as this process lives that it does, and ends it once its chief has been away for long.

    KerasTuner's workers wait an hour for a chief, and then for another.
    """
    path = beat_of(folder, worker)
    path.touch()

    def go_on() -> None:
        answered = time.monotonic()
        while True:
            time.sleep(_BEAT_EVERY)
            with contextlib.suppress(OSError):
                path.touch()
            if address is None or _reached(address):
                answered = time.monotonic()
            elif time.monotonic() - answered > _CHIEF_AWAY:
                print(f"{worker}: no chief has answered at {address} for {_CHIEF_AWAY} s", file=sys.stderr, flush=True)
                os._exit(FAULT)

    threading.Thread(target=go_on, daemon=True).start()


def _given_out(folder: Path) -> dict[str, Trial]:
    """The workers that KerasTuner's chief waits for, by their names, and their trials, maybe without a record yet."""
    path = folder / "engine" / "oracle.json"
    if not path.is_file():
        return {}
    found = {}
    for worker, name in json.loads(path.read_text())["ongoing_trials"].items():
        trial = read_trial(folder, int(name)) or Trial(number=int(name), settings={}, worker=worker)
        if not trial.ended:
            found[worker] = trial
    return found


def _take_up(folder: Path, names: list[str]) -> None:
    """Makes the trials that were being trained as a search was stopped ready to go on with these workers."""
    for path in (folder / "trials").glob(".*-claim"):  # of a process that was killed as it took a trial
        path.unlink()
    optuna_study.mend(folder)
    for place, trial in enumerate(_left(folder)):
        write_trial(folder, dataclasses.replace(trial, worker=names[place % len(names)]))
    _forgive(folder)


def _forgive(folder: Path) -> None:
    """Begins counting attempts anew where it was not the trial that ended the process; no worker may be at work."""
    for trial in _left(folder):
        write_trial(folder, dataclasses.replace(trial, attempts=0))


def _left(folder: Path) -> list[Trial]:
    """Unfinished trials of this machine's workers; others may be at theirs."""
    return [trial for trial in read_trials(folder) if not trial.ended and OURS.fullmatch(trial.worker)]


class _Process:
    """A process of a search, and how often it died in a row."""

    def __init__(self, name: str, folder: Path, data_dir: Path | None, cores: list[int] | None) -> None:
        self.name = name
        self.log = folder / "logs" / f"{name}.log"
        self.deaths = 0
        self._folder = folder
        self._data_dir = data_dir
        self._cores = cores
        self._running: subprocess.Popen[bytes] | None = None
        self._progress = _progress(folder, None if name == "chief" else name)

    def start(self, address: str | None) -> None:
        command = [sys.executable, "-m", "keras_dsr.tuning", str(self._folder), "--worker", self.name, "--supervised"]
        command += [] if address is None else ["--chief", address]
        command += [] if self._data_dir is None else ["--data-dir", str(self._data_dir)]
        environment = {
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # Workers may share a GPU, of which the first would take all.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **os.environ,
        }
        # The package that runs here, wherever that is from.
        paths = [str(Path(keras_dsr.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # gRPC asks proxies even for this machine, and the chief is on one's own network.
        local = "localhost,127.0.0.1" if address is None else f"localhost,127.0.0.1,{split_address(address)[0]}"
        environment["no_proxy"] = f"{os.environ['no_proxy']},{local}" if os.environ.get("no_proxy") else local
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        if self._cores is not None:
            # Before TensorFlow looks how many it has.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self._running.pid, self._cores)

    def status(self) -> int | None:
        """The exit status; `None` while it runs."""
        return self._running.poll()

    def stop(self) -> None:
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running.stdin.close()
            self._running = None

    def died(self) -> str:
        """Notes that it died, and says how.

        Raises:
            OSError: if it did so too often in a row, or because of something that would meet it again.
        """
        status = self.status()
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        before, self._progress = self._progress, _progress(self._folder, None if self.name == "chief" else self.name)
        self.deaths = 1 if before != self._progress else self.deaths + 1
        end = " ".join(self.log.read_text(errors="replace").strip().splitlines()[-1:])
        if status == FAULT:
            raise OSError(
                f"The search met what would meet all of its trials: {end} (all of it: {self.log}). Mend it, and go on "
                f"with: keras-dsr tune --folder {self._folder}."
            )
        if self.deaths >= _MOST_DEATHS:
            raise OSError(
                f"{self.name} of the search died {self.deaths} times in a row, last by {how}. {end} "
                f"(all of it: {self.log})"
            )
        return f"{self.name} died by {how}"


def _supervise(
    folder: Path,
    names: list[str],
    data_dir: Path | None,
    with_chief: bool,
    address: str | None,
    told: Callable[[str], None],
    over: Callable[[], bool] | None = None,
) -> None:
    """Runs processes until all workers have come to their end, or the search is over."""
    workers = [_Process(name, folder, data_dir, cores) for name, cores in zip(names, _shares(len(names)), strict=True)]
    chief = _Process("chief", folder, data_dir, None) if with_chief else None
    seen = {trial.number for trial in read_trials(folder) if trial.ended}

    def awaited() -> dict[str, Trial]:
        # Workers of other machines may have trials to end when those of this one have none left.
        return {} if chief is None or address is None else _given_out(folder)

    try:
        while True:
            there = _free_address() if chief is not None and address is None else address
            if chief is not None:
                chief.start(there)
            for worker in workers:
                worker.start(there)
            working = list(workers)
            while (working or awaited()) and (chief is None or chief.status() is None):
                time.sleep(_LOOK_EVERY)
                _tell(folder, seen, told)
                if over is not None and over():
                    return
                if not working and (gone := [name for name in awaited() if not heard_of(folder, name)]):
                    told(f"{', '.join(gone)} silent for {SILENT} s: what was being trained there is taken back")
                    break
                for worker in list(working):
                    if worker.status() is None:
                        continue
                    if worker.status() == 0:
                        working.remove(worker)
                        continue
                    if chief is not None and chief.status() is not None:
                        break  # and so will all, for want of a chief
                    told(f"{worker.died()}, and is started again")
                    worker.stop()
                    worker.start(there)
            _tell(folder, seen, told)
            # A chief ends when all trials have, maybe ahead of a worker that had just come back.
            if chief is None or chief.status() == 0 or not (working or awaited()):
                return
            if chief.status() is not None:
                told(f"{chief.died()}; all processes are started again")
            for each in (chief, *workers):
                each.stop()
            _forgive(folder)
    finally:
        for each in (*workers, chief):
            if each is not None:
                each.stop()


def _tell(folder: Path, seen: set[int], told: Callable[[str], None]) -> None:
    for trial in read_trials(folder):
        if trial.ended and trial.number not in seen:
            seen.add(trial.number)
            told(results.line(trial))


def _progress(folder: Path, worker: str | None) -> tuple[Any, ...]:
    """Something that changes whenever a worker, or any of them, ends a trial or trains an epoch.

    A trial that was given up is no progress: whatever killed the process may be at the next as well.
    """
    trials = [trial for trial in read_trials(folder) if worker in (None, trial.worker)]
    checkpoints = (run_folder(folder, trial.number) / "checkpoint.npz" for trial in trials)
    times = [path.stat().st_mtime_ns for path in checkpoints if path.is_file()]
    return sum(trial.ended and not trial.given_up for trial in trials), max(times, default=0)


def _shares(count: int) -> list[list[int] | None]:
    """The cores of this machine, shared evenly; `None` where there are too few, or the system cannot tell."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * count
    cores = sorted(os.sched_getaffinity(0))
    if count == 1 or len(cores) < count:
        return [None] * count
    return [cores[place * len(cores) // count : (place + 1) * len(cores) // count] for place in range(count)]


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"

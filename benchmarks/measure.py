"""Measuring one thing in a fresh process: CPU and wall seconds of a call, and the process's peak memory.

The interpreters of other libraries run this file too (see `peers`): at its top it needs the standard library alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def timed(call: Callable[[], Any], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Medians over `repeats` calls, the time of the first call ever, and the peak memory of the process.

    Args:
        call: What to time; it must not return before its work is done.
        repeats: Number of timed calls.
        warmup: Calls before, the first of which compiles.
    """
    started = time.perf_counter()
    call()
    first = time.perf_counter() - started
    for _ in range(warmup - 1):
        call()
    wall, cpu = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    return {
        "first_s": first,
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "peak_mb": peak_mb(),
    }


def peak_mb() -> float:
    """The largest resident size that this process has had, in MB.

    On Linux it is not getrusage's: there the size of the process that started this one counts, too. VmHWM begins anew
    with the program.
    """
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) / 1024
    import resource  # Windows has no such module

    # In bytes on macOS, in units of 1024 bytes elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(
    script: str | Path,
    task: dict[str, Any],
    backend: str,
    python: str | Path = sys.executable,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Runs `python SCRIPT --task JSON` and reads the JSON on its last line.

    Args:
        script: The file to run.
        task: What it is to measure.
        backend: Keras' backend there.
        python: The interpreter.
        timeout: Seconds after which it is stopped; `None` to wait for as long as it takes.

    Raises:
        RuntimeError: if the process cannot be started or fails, with what it printed; if its last line is not JSON; or
            if it takes longer than `timeout`.
    """
    environment = {
        "OMP_WAIT_POLICY": "passive",  # else PyTorch's threads spend CPU seconds on waiting for one another
        **os.environ,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [str(python), str(script), "--task", json.dumps(task)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{task} was stopped: it took more than {timeout:.0f} s") from None
    except OSError as error:
        raise RuntimeError(f"{task} was not started: {python}: {error.strerror}") from error
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-4000:]}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return json.loads(last)
    except json.JSONDecodeError as error:
        raise RuntimeError(f"{task} was to print JSON on its last line. It printed {last[-500:]!r}") from error


def allowed_cores(count: int | None = None) -> list[int]:
    """The first `count` of the cores that this process may use; all of them if it is `None`."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))[:count]
    return list(range(os.cpu_count() or 1))[:count]  # macOS and Windows cannot tell, nor keep a process to some


def use_cores(count: int | None) -> int:
    """Keeps this process to so many of the cores that it may use, and gives their number.

    TensorFlow, JAX and PyTorch all have as many threads as there are cores in this set, if it is made before they are
    imported: so each side of a comparison has the same.

    Args:
        count: The number; `None` for all.
    """
    if not hasattr(os, "sched_setaffinity"):
        return len(allowed_cores())
    chosen = allowed_cores(count)
    os.sched_setaffinity(0, set(chosen))
    return len(chosen)


def in_turn(
    names: Sequence[Any],
    run: Callable[[Any], dict[str, Any]],
    rounds: int,
    minutes: float | None = None,
    report: Callable[[dict[Any, list[dict[str, Any]]], dict[Any, str]], None] | None = None,
) -> tuple[dict[Any, list[dict[str, Any]]], dict[Any, str]]:
    """Measures all of `names` in each round, forwards and backwards by turns, so that a machine's drift favours none.

    Args:
        names: What to measure.
        run: Gives the measures of one. A RuntimeError is that one's failure alone, and the others go on.
        rounds: The number of rounds.
        minutes: No round is begun that would, at the pace so far, end after so many minutes; the first always is.
            `None` for no limit.
        report: Gets what this returns, as far as it is known, after each round: to write it, so that hours of measuring
            are not lost with the last of them, and to stop where going on is of no use.

    Returns:
        For each of `names` its measures, one from each round; and for those that failed, why, in a line (`brief`).
    """
    runs: dict[Any, list[dict[str, Any]]] = {name: [] for name in names}
    failures: dict[Any, str] = {}
    started = time.perf_counter()
    for round_ in range(rounds):
        spent = time.perf_counter() - started
        if minutes is not None and round_ and spent * (round_ + 1) / round_ > 60 * minutes:
            print(f"no more than {round_} of {rounds} rounds fit in {minutes:g} minutes", flush=True)
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            if name in failures:
                continue
            try:
                runs[name].append(run(name))
            except RuntimeError as error:
                failures[name] = brief(str(error))
                del runs[name]
                print(f"round {round_ + 1}: {name} failed: {error}", flush=True)
            else:
                print(f"round {round_ + 1}: {name}: {shown(runs[name][-1])}", flush=True)
        if report is not None:
            report(runs, failures)
    return runs, failures


def brief(why: str) -> str:
    """The last line of an error, where Python says what it is, without the folders of this machine."""
    last = (why.strip().splitlines() or [""])[-1]
    # From the root or the home folder to the last separator; what follows a word, a dot or a colon is no such path.
    return re.sub(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":,]+[/\\])+", "", last)


def rounds_of(runs: Mapping[Any, Sequence[Any]], failures: Mapping[Any, str]) -> int:
    """How many rounds the measures of `in_turn` are from.

    Raises:
        RuntimeError: if all failed, with why.
    """
    if not runs:
        told = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise RuntimeError(f"Nothing could be measured. {told}")
    return min(map(len, runs.values()))


def processes(rounds: int) -> str:
    """For tables: of how many processes a figure is the median."""
    return f"medians of {rounds} fresh processes" if rounds > 1 else "one fresh process"


def shown(measured: Mapping[str, Any]) -> str:
    """Measures in one line; lists of them are left out."""
    singles = {name: value for name, value in measured.items() if isinstance(value, (int, float, str))}
    return ", ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in singles.items())


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each measure over runs; of what is not a number, the first."""
    return {
        name: statistics.median(run[name] for run in runs) if isinstance(value, (int, float)) else value
        for name, value in runs[0].items()
    }


def line_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The line through points, by linear least squares.

    Returns:
        Its slope, its value at 0, and R^2: the part of the variance of `y` that it accounts for.

    Raises:
        ValueError: unless there are two different values of `x`.
    """
    if len(set(x)) < 2:
        raise ValueError(f"A line needs points at two or more places. Received x={list(x)!r}.")
    slope, intercept = statistics.linear_regression(x, y)
    mean = statistics.fmean(y)
    total = sum((value - mean) ** 2 for value in y)
    rest = sum((value - intercept - slope * place) ** 2 for place, value in zip(x, y, strict=True))
    return slope, intercept, 1 - rest / total if total else 1.0


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; `None` is an empty cell.

    Raises:
        ValueError: if a row has not as many cells as the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row has the {len(header)} cells of {list(header)!r}. Received {list(row)!r}.")
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines]


def at_most(value: float | None, limit: float) -> str:
    """Whether a measured value is within a limit: "met", "not met" or "not measured". It is compared unrounded."""
    if value is None:
        return "not measured"
    return "met" if value <= limit else "not met"


def command() -> str:
    """The command line that this process was started with, without the folders of this machine."""
    words, before = [], ""
    for word in sys.argv[1:]:
        option, equals, value = word.partition("=")
        named = (option if equals else before).endswith("-dir")
        is_folder = named or Path(value or word).is_absolute() or (value or word).startswith(("~/", "./", "../"))
        words.append(word if not is_folder else f"{option}=DIR" if equals else "DIR")
        before = word
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


PACKAGES = ("keras", "tensorflow", "jax", "numpy", "onnxruntime", "openvino", "torch", "spikingjelly")


def versions() -> dict[str, str]:
    """The versions of those packages that figures depend on and that this interpreter has."""
    return {name: version_of(name) for name in PACKAGES if importlib.util.find_spec(name)}


def version_of(name: str) -> str:
    """The version of an importable package; "unknown" where no distribution says so."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # A distribution of another name brings it, as tensorflow-cpu and onnxruntime-gpu do.
        names = importlib.metadata.packages_distributions().get(name)
        return importlib.metadata.version(names[0]) if names else "unknown"


def machine(cores: int | None = None) -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions of what is installed, date, and the command.

    Args:
        cores: How many cores were to be used, as in `use_cores`; `None` for all that this process may use.
    """
    model = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": model,
        "cores": len(allowed_cores(cores)),
        "python": platform.python_version(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "command": command(),
    }


def write(name: str, results: dict[str, Any], table: str) -> None:
    """Writes results/NAME.json and results/NAME.md, whole or not at all."""
    from keras_dsr.files import replacing

    (RESULTS / name).parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(results, indent=2) + "\n"), ("md", table)):
        with replacing(RESULTS / f"{name}.{suffix}") as beside:
            beside.write_text(text)

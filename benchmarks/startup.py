"""What it takes to start: importing the package, and the first training step, which compiles.

    python benchmarks/startup.py                   # a few minutes
    python benchmarks/startup.py --only imports    # half a minute

Each figure is of fresh processes, by turns. What `import keras_dsr` adds is timed in a process that has imported Keras
just before; beside it stands the difference between processes that import the one and the other, in which all noise of
importing Keras and its backend is, too. PyTorch's first step is of the network as it comes, in no form of memory or
compilation. Results are written after each of the two parts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time

import peers
from measure import in_fresh_process, in_turn, machine, markdown, median_of, processes, rounds_of, write
from steps import TITLES, VARIANTS, Case, common, measure

COMPILED = ("ours", "ours, XLA", "ours, JAX", "PyTorch DSR")


def measure_import(task: dict) -> dict:
    """Imports Keras and, if the task says so, keras_dsr, in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    import keras  # noqa: F401

    result = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    if task["import"] == "keras_dsr":
        before = set(sys.modules)
        added, added_cpu = time.perf_counter(), time.process_time()
        import keras_dsr  # noqa: F401

        result["added_s"] = time.perf_counter() - added
        result["added_cpu_s"] = time.process_time() - added_cpu
        packages = {name.partition(".")[0] for name in set(sys.modules) - before}
        result["brings"] = ", ".join(sorted(packages - sys.stdlib_module_names))
    return {**result, "all_s": time.perf_counter() - wall, "all_cpu_s": time.process_time() - cpu}


def compare(options) -> None:
    """Measures imports and first steps; writes the tables."""
    backends = [backend for backend in ("tensorflow", "jax") if backend in options.backends]
    host = machine(options.cores)
    lines = [f"`{host['command']}`: {host['cores']} cores of {host['processor']}, {host['date']}.", ""]
    results: dict = {"machine": host, "options": vars(options), "imports": [], "first_steps": [], "failures": {}}
    if "imports" in options.only:
        todo = [(what, backend) for backend in backends for what in ("keras", "keras_dsr")]
        runs, failures = in_turn(
            todo, lambda key: in_fresh_process(__file__, {"import": key[0]}, key[1]), options.rounds
        )
        if failures:
            raise RuntimeError(f"An import failed: {failures}")
        results["rounds"] = rounds = rounds_of(runs, failures)
        cells = []
        for backend in backends:
            plain, ours = median_of(runs["keras", backend]), median_of(runs["keras_dsr", backend])
            difference = ours["all_s"] - plain["all_s"]
            row = {"backend": backend, "keras_s": plain["all_s"], "difference_s": difference, **ours}
            results["imports"].append({**row, "runs": {name: runs[name, backend] for name in ("keras", "keras_dsr")}})
            cells.append(
                [
                    backend,
                    f"{plain['all_s']:.2f}",
                    f"{ours['added_s']:.3f}",
                    f"{ours['added_cpu_s']:.3f}",
                    f"{difference:+.3f}",
                    ours["brings"],
                ]
            )
        header = ["backend", "`import keras`, s", "`import keras_dsr` adds, s", "CPU s", "difference of processes, s"]
        lines += ["## Import", "", f"Figures are {processes(rounds)}.", ""]
        lines += [*markdown([*header, "packages that it brings in"], cells), ""]
        write(f"{options.prefix}startup", results, "\n".join(lines))
    if "first-steps" in options.only:
        names = [name for name in COMPILED if VARIANTS[name].backend in (*backends, *["torch"] * options.peers)]
        cases = [
            Case(network, "train", name, options.timesteps, options.batch)
            for network in options.networks
            for name in names
        ]
        runs, failures = in_turn(
            cases, lambda case: measure(case, {}, 1, options.cores), options.rounds, options.minutes
        )
        rounds = rounds_of(runs, failures)
        results |= {"failures": {str(case): why for case, why in failures.items()}, "first_steps_rounds": rounds}
        if options.peers:
            host["peers"] = peers.versions()
        cells = []
        for case, measured in runs.items():
            row = median_of(measured)
            results["first_steps"].append({**dataclasses.asdict(case), **row, "runs": measured})
            name = TITLES[case.network]
            cells.append([name, case.variant, f"{row['build_s']:.1f}", f"{row['first_s']:.1f}", f"{row['wall_s']:.2f}"])
        lines += [f"## First training step, N = {options.timesteps}, batch {options.batch}", ""]
        lines += [f"Wall seconds, {processes(rounds)}; PyTorch as it comes.", ""]
        lines += [*markdown(["network", "", "build, s", "first step, s", "third step, s"], cells), ""]
        lines += [f"{case} failed: {why}\n" for case, why in failures.items()]
        write(f"{options.prefix}startup", results, "\n".join(lines))
    print("\n".join(lines))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["imports", "first-steps"]
    made.add_argument("--only", nargs="+", choices=parts, default=parts, help="the part to measure; both, if not given")
    both = ["tensorflow", "jax"]
    made.add_argument("--backends", nargs="+", choices=both, default=both, help="of Keras")
    made.add_argument(
        "--networks", nargs="+", choices=list(TITLES), default=["resnet18", "resnet20"], help="of the first steps"
    )
    made.add_argument("--timesteps", type=int, default=20, help="number N of time steps")
    made.add_argument("--batch", type=int, default=8, help="images in a batch")
    made.add_argument("--rounds", type=int, default=5, help="processes for each figure")
    made.add_argument("--task", help=argparse.SUPPRESS)
    common(made)
    return made


if __name__ == "__main__":
    options = parser().parse_args()
    if options.task:
        print(json.dumps(measure_import(json.loads(options.task))))
    else:
        compare(options)

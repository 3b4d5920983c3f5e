"""All benchmarks against the peers, with one command.

    python benchmarks/suite.py                        # the quick form, under 10 minutes on 2 cores: `make bench`
    python benchmarks/suite.py --full --data-dir DIR  # hours: `make bench-full DATA_DIR=DIR`

The quick form measures what `summary` has targets for and no more: PreAct-ResNet-18 at N = 20, for the growth of memory
also at N = 40, and the import. The full one measures all: `steps`, `scaling`, `startup`, and with a data folder
`accuracy`. Each of these is a script of its own, with options. Results are in `benchmarks/results`, those of the quick
form with names that start with "quick_".
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import accuracy
import scaling
import startup
import steps
import summary

QUICK = "quick_"


def parts(options) -> list[tuple[str, object, list[str]]]:
    """Name, module and arguments of each benchmark to run."""
    everywhere = [] if options.peers else ["--no-peers"]
    if options.cores:
        everywhere += ["--cores", str(options.cores)]
    if not options.full:
        everywhere += ["--prefix", QUICK]
        small = ["--targets", "--networks", steps.NETWORK, "--timesteps", *map(str, steps.GROWTH_AT)]
        small += ["--forms-at", str(steps.TIMESTEPS), "--repeats", "3", "--rounds", "3", "--minutes", "7"]
        return [
            ("startup", startup, ["--only", "imports", "--backends", "tensorflow", "--rounds", "3", *everywhere]),
            # A minute or two is the contest of PyTorch's forms, which is not among these seven.
            ("steps", steps, [*small, *everywhere]),
        ]
    found = [
        ("startup", startup, everywhere),
        ("steps", steps, ["--compile", *everywhere]),
        ("scaling", scaling, everywhere),
    ]
    if options.data_dir is not None:
        found.append(("accuracy", accuracy, ["--data-dir", str(options.data_dir), *everywhere]))
    return found


def main() -> None:
    """Runs the benchmarks one after the other, then the summary."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--full", action="store_true", help="all of it, which takes hours")
    made.add_argument("--data-dir", type=Path, help="folder of tensorflow-datasets that has CIFAR-10")
    made.add_argument("--cores", type=int, help="how many cores each side may use; all, if not given")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="without PyTorch and SpikingJelly")
    options = made.parse_args()
    for name, module, arguments in parts(options):
        started = time.perf_counter()
        print(f"{name}: {' '.join(arguments)}", flush=True)
        module.compare(module.parser().parse_args(arguments))
        print(f"{name} took {(time.perf_counter() - started) / 60:.1f} minutes\n", flush=True)
    if options.full and options.data_dir is None:
        print("time to accuracy was left out: --data-dir is not given\n")
    summary.compare(summary.parser().parse_args([] if options.full else ["--prefix", QUICK]))


if __name__ == "__main__":
    main()

"""Compiles the training step of PreAct-ResNet-18 for TPUs, without one, and lists its collectives.

    pip install 'keras-dsr[tpu]'
    KERAS_BACKEND=jax python benchmarks/tpu_readiness.py --timesteps 5 20

For each number of time steps N: whether the step compiles, how long that takes, the memory that a core needs, and the
exchanges between replicas. If one stood in a loop over time steps, or their number grew with N, the step would not be
data-parallel as it is meant.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for the TPU that libtpu belongs to

from measure import machine, markdown, write


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-if")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[5, 20])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as keras-dsr train takes it")
    options = parser.parse_args()

    from keras_dsr import recipes, tpu

    host = machine()
    rows = []
    for steps in options.timesteps:
        changes = {**recipes.parse_settings(options.set), "timesteps": str(steps)}
        for finding in tpu.check(recipes.get(options.recipe).with_settings(changes), topology=options.topology):
            print("\n".join(finding.lines()), flush=True)
            rows.append((steps, finding))
    header = ["N", "ready", "compilation s", "MB a core", "collectives", "of them in loops", "exchanged arrays"]
    table = [
        f"{options.recipe}, global batch {rows[0][1].batch_size}, {rows[0][1].replicas} cores of {options.topology}, "
        f"compiled by libtpu on {host['processor']}, {host['date']}: `{host['command']}`.",
        "",
        *markdown(
            header,
            [
                (
                    steps,
                    "yes" if finding.ready else "no",
                    f"{finding.compile_s:.1f}",
                    None if finding.memory_mb is None else f"{finding.memory_mb:.0f}",
                    ", ".join(f"{count} {kind}" for kind, count in finding.counts.items()),
                    sum(each.in_loop for each in finding.collectives),
                    sum(each.shapes.count("[") for each in finding.collectives),
                )
                for steps, finding in rows
            ],
        ),
        "",
        f"The collectives for N = {rows[-1][0]}, in the program's order:",
        "",
        *markdown(
            ["kind", "what", "from"],
            [
                (each.kind, f"`{each.shapes[:120]}`", f"`{each.source.removeprefix('jit(<lambda>)/')}`")
                for each in rows[-1][1].collectives
            ],
        ),
        "",
    ]
    results = [
        {
            "timesteps": steps,
            "ready": finding.ready,
            "error": finding.error,
            "refused": finding.refused,
            "compile_s": finding.compile_s,
            "memory_mb": finding.memory_mb,
            "collectives": [vars(each) for each in finding.collectives],
        }
        for steps, finding in rows
    ]
    write("tpu_readiness", {"machine": host, "options": vars(options), "rows": results}, "\n".join(table))


if __name__ == "__main__":
    main()

"""What it costs to look inside: `keras_dsr.analysis.trace` over a data set, against plain inference of the same.

    python benchmarks/tracing_cost.py                      # PreAct-ResNet-20, 10,000 images, N = 6
    python benchmarks/tracing_cost.py --examples 256 --rounds 1

Inference is `predict_on_batch`, batch after batch; its outputs are let go. Each figure is of a fresh process that has
run its form's first batches, which compile, before the clock starts. Images are random and made batch by batch. The
weights are the preset's, so that neurons fire. Memory is the process's peak after all examples and after a quarter of
them, for tracing. The verdict is on wall time and on CPU time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from measure import (
    at_most,
    in_fresh_process,
    in_turn,
    machine,
    markdown,
    median_of,
    peak_mb,
    processes,
    rounds_of,
    write,
)

FORMS = ("inference", "trace")
# At most so many times the time of inference.
LIMIT = 1.3
# Growth of the peak that is noise of the allocator: a byte for each image and neuron would be 1,400 MB.
GROWTH_MB = 32.0


def images(examples: int, batch: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Batches of random images, one at a time."""
    generator = np.random.default_rng(0)
    for start in range(0, examples, batch):
        yield generator.standard_normal((min(batch, examples - start), *shape), dtype="float32")


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Runs a form over the examples: CPU and wall seconds, peak memory after a quarter of them and after all."""
    import keras

    from keras_dsr import analysis, models

    keras.utils.set_random_seed(0)
    shape, batch = (32, 32, 3), task["batch"]
    model = models.preact_resnet(20, timesteps=task["timesteps"], weights="cifar10")
    tracer = analysis.Tracer(model)

    def run(examples: int) -> None:
        if task["form"] == "trace":
            tracer(images(examples, batch, shape))
        else:
            for x in images(examples, batch, shape):
                model.predict_on_batch(x)

    run(2 * batch)
    quarter = max(task["examples"] // 4, 1)
    run(quarter)
    after_quarter = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    run(task["examples"])
    seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return {**seconds, "quarter_mb": after_quarter, "peak_mb": peak_mb()}


def compare(options: argparse.Namespace) -> None:
    """Measures both forms by turns, and writes the table."""
    settings = {name: getattr(options, name) for name in ("examples", "batch", "timesteps")}
    runs, failures = in_turn(
        FORMS,
        lambda form: in_fresh_process(__file__, {**settings, "form": form}, options.backend),
        options.rounds,
    )
    rounds = rounds_of(runs, failures)
    medians = {form: median_of(runs[form]) for form in runs}
    host = machine()
    rows = []
    for form, each in medians.items():
        of = [
            each[name] / medians["inference"][name] if "inference" in medians else None for name in ("wall_s", "cpu_s")
        ]
        cells = (each["wall_s"], each["cpu_s"], *of)
        rows.append(
            (
                form,
                *(None if c is None else f"{c:.2f}" for c in cells),
                f"{each['quarter_mb']:.0f}",
                f"{each['peak_mb']:.0f}",
            )
        )
    both = set(FORMS) <= set(medians)
    wall, cpu = (medians["trace"][s] / medians["inference"][s] if both else None for s in ("wall_s", "cpu_s"))
    growth = medians["trace"]["peak_mb"] - medians["trace"]["quarter_mb"] if "trace" in medians else None
    lines = [
        f"PreAct-ResNet-20, N = {options.timesteps}, {options.examples:,} images in batches of {options.batch}; "
        f"{host['cores']} cores of {host['processor']}, {options.backend}, {host['date']}; {processes(rounds)}.",
        "",
        *markdown(
            (
                "form",
                "wall s",
                "CPU s",
                "wall, of inference",
                "CPU, of inference",
                "peak MB, a quarter",
                "peak MB, all",
            ),
            rows,
        ),
        "",
        f"At most {LIMIT:g} times inference: wall time {at_most(wall, LIMIT)}, CPU time {at_most(cpu, LIMIT)}. Peak "
        f"memory of tracing grows from a quarter of the images to all by at most {GROWTH_MB:g} MB: "
        f"{at_most(growth, GROWTH_MB)}.",
        *(f"{form} failed: {why}" for form, why in failures.items()),
        "",
    ]
    table = "\n".join(lines)
    results = {"machine": host, "settings": {**settings, "backend": options.backend, "rounds": rounds}, "runs": runs}
    write(
        f"tracing_cost_{options.backend}", {**results, "ratio_wall": wall, "ratio_cpu": cpu, "growth_mb": growth}, table
    )
    print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--examples", type=int, default=10_000, help="images to run over")
    made.add_argument("--batch", type=int, default=128, help="images of a batch")
    made.add_argument("--timesteps", type=int, default=6, help="number of time steps N")
    made.add_argument("--rounds", type=int, default=2, help="processes for each figure")
    made.add_argument("--backend", default="tensorflow", choices=("tensorflow", "jax"), help="Keras' backend")
    made.add_argument("--task", help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Reads the command line."""
    options = parser().parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    else:
        compare(options)


if __name__ == "__main__":
    main()

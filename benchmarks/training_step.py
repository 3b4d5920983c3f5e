"""Time and memory of a training step of PreAct-ResNet-18, against what else it could cost.

    python benchmarks/training_step.py                # the table, a few minutes on 2 cores
    python benchmarks/training_step.py --compile      # what the loop forms and XLA cost, to compile and to run

Compared, each in fresh processes, in one run, in turn:

- ours: the network of `keras_dsr.models.preact_resnet`
- per step: the same network of stock Keras layers (its BatchNormalization too) and our neurons on plain tensors, where
  autodiff goes through every time step of every layer
- forward: our forward pass alone, in training mode
- ANN: the network of the same shape with ReLU, made of stock Keras layers
"""

from __future__ import annotations

import argparse
import json

from keras_step import forward_of
from measure import in_fresh_process, in_turn, machine, median_of, timed, write

CLASSES, SHAPE = 10, (32, 32, 3)


def measure(task: dict) -> dict[str, float]:
    """Measures one variant in this process."""
    import keras
    import numpy as np
    import stock

    from keras_dsr import layers, models

    keras.utils.set_random_seed(0)
    variant, timesteps, batch = task["variant"], task["timesteps"], task["batch"]
    if variant in ("ours", "forward"):
        neuron = layers.IFSpike(loop=task["loop"]) if "loop" in task else layers.IFSpike()
        model = models.preact_resnet(18, neuron, timesteps, CLASSES, SHAPE)
    else:
        model = stock.preact_resnet(18, timesteps if variant == "per step" else None, CLASSES, SHAPE)
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=task["jit"],
    )
    x = np.random.default_rng(0).random((batch, *SHAPE), dtype="float32")
    y = np.arange(batch) % CLASSES

    if variant == "forward":
        call = forward_of(model, True, task["jit"], x)
    else:

        def call():
            model.train_on_batch(x, y)

    return {**timed(call, task["repeats"]), "parameters": model.count_params()}


def compare(options) -> None:
    """Measures all variants in turn and writes the table."""
    tasks = [("ANN", None)] + [(v, n) for n in options.timesteps for v in ("ours", "per step", "forward")]

    def run(key: tuple[str, int | None]) -> dict:
        variant, timesteps = key
        task = {
            "variant": variant,
            "timesteps": timesteps,
            "batch": options.batch,
            "jit": options.backend == "jax",
            "repeats": options.repeats,
        }
        return in_fresh_process(__file__, task, options.backend)

    runs, failures = in_turn(tasks, run, options.rounds)
    if failures:
        raise RuntimeError(f"All are needed for the table. Failed: {failures}")
    median = {task: median_of(results) for task, results in runs.items()}

    least, most = min(options.timesteps), max(options.timesteps)
    growth = {v: median[v, most]["peak_mb"] - median[v, least]["peak_mb"] for v in ("ours", "per step", "forward")}
    host = machine()
    lines = [
        f"PreAct-ResNet-18, IF, batch {options.batch}, {options.backend}, {host['cores']} cores of "
        f"{host['processor']}, {host['date']}; medians of {options.rounds} fresh processes.",
        "",
        "| N | | CPU s | wall s | peak MB | CPU, of per step | CPU, of forward | CPU, of ANN |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, timesteps in tasks:
        m = median[variant, timesteps]
        ratios = ["", ""]
        if timesteps is not None:
            ratios = [f"{m['cpu_s'] / median[other, timesteps]['cpu_s']:.2f}" for other in ("per step", "forward")]
        ratios.append(f"{m['cpu_s'] / median['ANN', None]['cpu_s']:.1f}")
        lines.append(
            f"| {timesteps or ''} | {variant} | {m['cpu_s']:.2f} | {m['wall_s']:.2f} | {m['peak_mb']:.0f} | "
            + " | ".join(ratios)
            + " |"
        )
    lines += [
        "",
        f"Peak memory grows from N = {least} to {most} by {growth['ours']:.0f} MB (ours) and "
        f"{growth['per step']:.0f} MB (per step): {growth['ours'] / growth['per step']:.2f} of it.",
        "",
    ]
    table = "\n".join(lines)
    results = {
        "machine": host,
        "options": vars(options),
        "medians": [{"variant": v, "timesteps": n, **m} for (v, n), m in median.items()],
        "runs": [{"variant": v, "timesteps": n, "measured": r} for (v, n), r in runs.items()],
    }
    write(f"training_step_{options.backend}", results, table)
    print(table)


def compare_loops(options) -> None:
    """Measures the loop forms, with and without XLA."""
    timesteps = 20
    rows = []
    for loop in ("unrolled", "while"):
        for jit in (False, True) if options.backend == "tensorflow" else (True,):
            task = {"variant": "ours", "loop": loop, "jit": jit, "timesteps": timesteps, "batch": options.batch}
            runs = [
                in_fresh_process(__file__, {**task, "repeats": options.repeats}, options.backend)
                for _ in range(options.rounds)
            ]
            rows.append({"loop": loop, "xla": jit, **median_of(runs)})
            print(rows[-1], flush=True)
    host = machine()
    lines = [
        f"PreAct-ResNet-18, IF, N = {timesteps}, batch {options.batch}, {options.backend}, {host['cores']} cores of "
        f"{host['processor']}, {host['date']}; medians of {options.rounds} fresh processes.",
        "",
        "| loop | XLA | first call s | step CPU s | step wall s | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['loop']} | {'yes' if r['xla'] else 'no'} | {r['first_s']:.1f} | {r['cpu_s']:.2f} | "
            f"{r['wall_s']:.2f} | {r['peak_mb']:.0f} |"
            for r in rows
        ),
        "",
    ]
    table = "\n".join(lines)
    write(f"compile_{options.backend}", {"machine": host, "options": vars(options), "rows": rows}, table)
    print(table)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["tensorflow", "jax"], default="tensorflow")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[5, 20, 40])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps in a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    parser.add_argument("--compile", action="store_true", help="compare loop forms and XLA instead")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    elif options.compile:
        compare_loops(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()

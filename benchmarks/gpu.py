"""A training step on a GPU: ours on JAX against the plain PyTorch DSR and SpikingJelly, and against the GPU's ceiling.

    python benchmarks/gpu.py                   # PreAct-ResNet-18, batch 128, N = 5 and 20, fp32, TF32 and bfloat16
    python benchmarks/gpu.py --smoke           # the same in tiny form, on a CPU too; writes no results

TensorFlow takes no part, and need not be installed. PyTorch is that of the interpreter which `KERAS_DSR_PEER_PYTHON`
names, of the benchmarks' own environment, or of this one: the first that has CUDA. Where none has, PyTorch is left out,
with a word. It is first tried in several forms, in each precision at the largest N (channels last in memory or first,
each with torch.compile, too), and measured in the one that takes the fewest seconds.

Each figure is of a fresh process. Floating-point operations are counted by hand, from the shapes of convolutions and
dense layers, two for a multiplication with its addition (XLA's own count, where it gives one, is in the JSON file).
For F of an image in one forward pass, S of them in the stem, that is N (F - S) + 3 F - S for a step of ours, and
3 N (F - S) + 2 S with a gradient at every step. The ceiling is what a large matrix product and a large convolution
reach in the same precision, on the same GPU, in the same run. An epoch is as many steps as there are whole
batches in 50,000 images, on a batch that is on the GPU already: reading data is not in it. Results are written after
each round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import peers
from measure import (
    RESULTS,
    brief,
    in_fresh_process,
    in_turn,
    machine,
    markdown,
    median_of,
    processes,
    rounds_of,
    shown,
    timed,
    write,
)
from steps import FORM_TIMEOUT, HERE, VARIANTS, forms_to_try

PRECISIONS = ("float32", "tf32", "bfloat16")
SIDES = ("ours, JAX", "PyTorch DSR", "SpikingJelly BPTT", "SpikingJelly DSRIFNode")
CLASSES, EPOCH_IMAGES = 10, 50_000


def flops_of(model, first: str = "stem_conv") -> tuple[int, int]:
    """Floating-point operations of an ANN of stock layers on one image: in all, and those ahead of the first neuron."""
    import keras

    counts = {}
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            counts[layer.name] = 2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1])
    return sum(counts.values()), counts.get(first, 0)


def flops_of_step(side: str, every: int, stem: int, timesteps: int) -> int:
    """Floating-point operations of a training step on one image.

    Args:
        side: One of `SIDES`.
        every: Those of one forward pass of the ANN of the same shape.
        stem: Those of them that are ahead of the first neuron: once, whatever N, and without a gradient of the input.
        timesteps: Number N of time steps.
    """
    if side == "ours, JAX":
        return timesteps * (every - stem) + 3 * every - stem
    return 3 * timesteps * (every - stem) + 2 * stem


def use(precision: str) -> None:
    """Makes JAX and Keras compute in a precision, from here on."""
    import jax
    import keras

    named = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}
    jax.config.update("jax_default_matmul_precision", named[precision])
    if precision == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")


def measure_step(task: dict) -> dict:
    """Measures a training step of ours in this process."""
    import jax
    import keras
    import numpy as np
    import stock
    from keras import ops

    from keras_dsr import models

    use(task["precision"])
    keras.utils.set_random_seed(0)
    depth, shape, batch = int(task["network"].removeprefix("resnet")), tuple(task["shape"]), task["batch"]
    model = models.preact_resnet(depth, timesteps=task["timesteps"], classes=CLASSES, input_shape=shape)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    every, stem = flops_of(stock.preact_resnet(depth, None, CLASSES, shape))

    def objective(weights, state, x, y):
        logits, state, losses = model.stateless_call(weights, state, x, training=True, return_losses=True)
        loss = keras.losses.sparse_categorical_crossentropy(y, ops.cast(logits, "float32"), from_logits=True)
        return ops.mean(loss) + sum(losses), state

    def step(weights, state, slots, x, y):
        (loss, state), gradients = jax.value_and_grad(objective, has_aux=True)(weights, state, x, y)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, state, slots, loss

    held = [
        [w.value for w in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    ]
    x = jax.numpy.asarray(np.random.default_rng(0).random((batch, *shape), dtype="float32"))
    y = jax.numpy.arange(batch) % CLASSES
    started = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*held, x, y)
    compiled = lowered.compile()
    compile_s = time.perf_counter() - started

    def call():
        nonlocal held
        for _ in range(task["calls"]):
            *held, loss = compiled(*held, x, y)
        jax.block_until_ready(loss)

    result = {**timed(call, task["repeats"]), "compile_s": compile_s}
    result |= {name: result[name] / task["calls"] for name in ("wall_s", "cpu_s")}
    device = jax.devices()[0]
    memory = device.memory_stats()
    if memory:
        result["peak_mb"] = memory["peak_bytes_in_use"] / 2**20
    counted = flops_of_step("ours, JAX", every, stem, task["timesteps"]) * batch
    others = flops_of_step("PyTorch DSR", every, stem, task["timesteps"]) * batch
    xla = (lowered.cost_analysis() or {}).get("flops")
    return {
        **result,
        "flops": counted,
        "flops_every_step": others,
        "xla_flops": xla,
        "platform": device.platform,
        "device": device.device_kind,
    }


def measure_ceiling(task: dict) -> dict:
    """Measures how many floating-point operations a second a matrix product and a convolution reach."""
    import jax
    import jax.numpy as jnp

    use(task["precision"])
    dtype = jnp.bfloat16 if task["precision"] == "bfloat16" else jnp.float32
    size, images, side, channels = task["sizes"]
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    x = jax.random.normal(jax.random.key(1), (images, side, side, channels), dtype)
    kernel = jax.random.normal(jax.random.key(2), (3, 3, channels, channels), dtype)
    convolve = jax.jit(
        lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    works = {
        "matmul": (jax.jit(jnp.matmul), (a, a), 2 * size**3),
        "convolution": (convolve, (x, kernel), 2 * images * side**2 * 9 * channels**2),
    }
    result: dict = {"platform": jax.devices()[0].platform}
    for name, (function, inputs, flops) in works.items():

        def call(function=function, inputs=inputs):
            outputs = [function(*inputs) for _ in range(task["calls"])]
            jax.block_until_ready(outputs)

        result[name] = flops * task["calls"] / timed(call, task["repeats"])["wall_s"]
    return result


def measure(task: dict) -> dict:
    """Measures one task in this process."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # else the peak is all that there is
    # Keras imports TensorFlow to serialize a layer, wherever it is installed: here it is not.
    sys.modules["tensorflow"] = None
    return measure_ceiling(task) if "sizes" in task else measure_step(task)


def torch_python(cuda: bool) -> tuple[Path | None, str]:
    """The first interpreter whose PyTorch has CUDA, or has none, as asked for; where there is none, why."""
    told = []
    for python in peers.candidates():
        try:
            answer = peers.ask(python, "import torch; print(torch.cuda.is_available())")
        except RuntimeError as error:
            told.append(brief(str(error)))
            continue
        if (answer == "True") == cuda:
            return python, ""
        told.append(f"PyTorch of {python.name} has {'no ' if cuda else ''}CUDA")
    return None, "; ".join(told) or "it is not installed"


def torch_forms(sides: list[str], options, run) -> tuple[dict[tuple[str, str], str], list[dict]]:
    """For each side of PyTorch and precision, the form that takes the fewest seconds at the largest N.

    Args:
        sides: The sides.
        options: Numbers of time steps, precisions, and whether torch.compile is tried.
        run: Measures a side, N and a precision in a form.

    Returns:
        The words of the form by side and precision; and a row for each form that was tried.
    """
    best, rows, most = {}, [], max(options.timesteps)
    for side in sides:
        for precision in options.precisions:
            print(f"forms of PyTorch: {side}, {precision}", flush=True)
            runs, failures = in_turn(
                forms_to_try(options.compile),
                lambda form, side=side, precision=precision: run((side, most, precision), form, trial=True),
                rounds=1,
            )
            about = {"side": side, "precision": precision, "timesteps": most}
            own = [{**about, "form": form, **median_of(measured)} for form, measured in runs.items()]
            if own:
                best[side, precision] = min(own, key=lambda row: row["wall_s"])["form"]
            rows += own + [{**about, "form": form, "failed": why} for form, why in failures.items()]
    return best, rows


def compare(options) -> None:
    """Measures all, and writes the table."""
    if options.smoke:
        options.network, options.shape, options.batch, options.timesteps = "resnet20", [8, 8, 3], 2, [2]
        options.repeats = options.rounds = options.calls = 1
        options.sizes, options.compile = [64, 2, 8, 8], False
    base = {"repeats": options.repeats, "calls": options.calls}
    ceilings = {
        precision: in_fresh_process(__file__, {**base, "precision": precision, "sizes": options.sizes}, "jax")
        for precision in options.precisions
    }
    for precision, ceiling in ceilings.items():
        print(f"ceiling, {precision}: {shown(ceiling)}", flush=True)
    on_gpu = next(iter(ceilings.values()))["platform"] != "cpu"
    python, why = torch_python(on_gpu) if options.peers else (None, "--no-peers was given")
    sides = [side for side in options.sides if side == "ours, JAX" or python]
    notes = [f"PyTorch was left out: {why}."] if len(sides) < len(options.sides) else []

    def run(key: tuple[str, int, str], form: str | None = None, trial: bool = False) -> dict:
        side, timesteps, precision = key
        task = {
            **base,
            "network": options.network,
            "shape": options.shape,
            "batch": options.batch,
            "timesteps": timesteps,
            "precision": precision,
        }
        if side == "ours, JAX":
            return in_fresh_process(__file__, task, "jax")
        task |= {"kind": VARIANTS[side].kind, "mode": "train", "device": "cuda" if on_gpu else "cpu"}
        task["form"] = forms.get((side, precision), "") if form is None else form
        if trial:  # a few steps tell which form is the faster
            task |= {"repeats": 1, "calls": min(options.calls, 3)}
        timeout = FORM_TIMEOUT if trial else None
        measured = in_fresh_process(HERE / "torch_step.py", task, "torch", python=python, timeout=timeout)
        return {**measured, "platform": task["device"]}

    forms, form_rows = torch_forms([side for side in sides if side != "ours, JAX"], options, run)
    host = machine()
    if len(sides) > 1:
        host["peers"] = peers.versions(python)
    keys = [(side, n, precision) for n in options.timesteps for precision in options.precisions for side in sides]
    table = ""

    def report(runs, failures) -> None:
        nonlocal table
        rounds = rounds_of(runs, failures)
        rows = rows_of(runs, forms, options)
        host["device"] = next((row["device"] for row in rows if "device" in row), None)
        table = table_of(rows, ceilings, [*notes, *(f"{key} failed: {why}" for key, why in failures.items())])
        table = (
            f"`{host['command']}`: {options.network}, batch {options.batch}, {host['device']}, {host['date']}; "
            f"{processes(rounds)} for each figure.\n\n{table}"
        )
        if not options.smoke:
            results = {"machine": host, "options": vars(options), "rounds": rounds, "ceilings": ceilings, "rows": rows}
            results |= {"forms": form_rows, "notes": notes}
            results["runs"] = [{"key": key, "measured": measured} for key, measured in runs.items()]
            results["failures"] = {str(key): why for key, why in failures.items()}
            write("gpu", results, table)
            plot(rows, ceilings, host)

    in_turn(keys, run, options.rounds, report=report)
    print(table)


def rows_of(runs: dict, forms: dict[tuple[str, str], str], options) -> list[dict]:
    """A row for each side, N and precision, with all that a reader of it needs to know what was measured."""
    rows = []
    for (side, timesteps, precision), measured in runs.items():
        row = median_of([{name: value for name, value in run.items() if value is not None} for run in measured])
        ours = runs.get(("ours, JAX", timesteps, precision))
        if ours and side != "ours, JAX":
            row["flops"] = ours[0]["flops_every_step"]
        row |= {"side": side, "timesteps": timesteps, "precision": precision, "form": forms.get((side, precision))}
        row |= {"network": options.network, "shape": list(options.shape), "batch": options.batch}
        row["epoch_s"] = EPOCH_IMAGES // options.batch * row["wall_s"]
        rows.append(row)
    return rows


def table_of(rows: list[dict], ceilings: dict, notes: list[str]) -> str:
    """The Markdown tables."""
    cells = []
    for row in rows:
        ceiling = ceilings[row["precision"]]
        speed = row["flops"] / row["wall_s"] if "flops" in row else None
        ours = next(
            (
                r
                for r in rows
                if (r["side"], r["timesteps"], r["precision"]) == ("ours, JAX", row["timesteps"], row["precision"])
            ),
            None,
        )
        cells.append(
            [
                row["precision"],
                row["timesteps"],
                row["side"],
                {None: None, "": "as it comes"}.get(row["form"], row["form"]),
                f"{1000 * row['wall_s']:.2f}",
                f"{row['peak_mb']:.0f}",
                f"{row['epoch_s']:.1f}",
                f"{speed / 1e12:.3g}" if speed else None,
                f"{speed / ceiling['matmul']:.1%}" if speed else None,
                f"{speed / ceiling['convolution']:.1%}" if speed else None,
                f"{row['wall_s'] / ours['wall_s']:.2f}" if ours else None,
            ]
        )
    header = ["precision", "N", "", "form", "step ms", "peak MB", "epoch s", "TFLOP/s", "of matmul"]
    lines = [*markdown([*header, "of convolution", "time, of ours"], cells), "", "Ceilings, TFLOP/s:", ""]
    lines += markdown(
        ["precision", "matrix product", "convolution"],
        [[name, f"{c['matmul'] / 1e12:.3g}", f"{c['convolution'] / 1e12:.3g}"] for name, c in ceilings.items()],
    )
    return "\n".join([*lines, "", *notes, ""])


def plot(rows: list[dict], ceilings: dict, host: dict) -> None:
    """Draws seconds of an epoch, a panel a precision."""
    import plots

    figure = plots.figure(f"An epoch of CIFAR-10 on {host['device']}, {host['date']}", 4.2 * len(ceilings), 4)
    for column, precision in enumerate(ceilings, start=1):
        axes = figure.add_subplot(1, len(ceilings), column)
        own = [row for row in rows if row["precision"] == precision]
        names = [f"{row['side']}, N = {row['timesteps']}" for row in own]
        colors = [plots.COLORS[row["side"]] for row in own]
        axes.bar_label(axes.barh(names, [row["epoch_s"] for row in own], color=colors), fmt="%.1f", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        plots.panel(axes, precision, "seconds", "")
        axes.grid(axis="y", visible=False)
    plots.save(figure, RESULTS / "gpu.png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--network", choices=["resnet18", "resnet20"], default="resnet18", help="which")
    made.add_argument("--shape", type=int, nargs=3, default=[32, 32, 3], help="height, width, channels")
    made.add_argument("--batch", type=int, default=128, help="images in a batch")
    made.add_argument("--timesteps", type=int, nargs="+", default=[5, 20], help="numbers N of time steps")
    made.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="which; all, if not given"
    )
    made.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:3]), help="what is compared")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="without trying torch.compile")
    made.add_argument("--repeats", type=int, default=5, help="timed calls in a process")
    made.add_argument("--calls", type=int, default=10, help="steps in a timed call")
    made.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    made.add_argument(
        "--sizes",
        type=int,
        nargs=4,
        default=[8192, 512, 32, 256],
        help="side of the matrices; images, their side and channels of the convolution",
    )
    made.add_argument("--smoke", action="store_true", help="a tiny form that writes no results")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="without PyTorch and SpikingJelly")
    made.add_argument("--task", help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    options = parser().parse_args()
    if options.task:
        print(json.dumps(measure(json.loads(options.task))))
    else:
        compare(options)

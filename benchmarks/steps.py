"""A training step and an inference, ours against SpikingJelly, plain PyTorch and ANNs of the same shape.

    python benchmarks/steps.py                                  # all of it: hours on 2 cores
    python benchmarks/steps.py --networks resnet18 --timesteps 5 20 --variants ours "PyTorch DSR"

Compared, each in fresh processes, in one run, forwards and backwards by turns, with the same cores:

- ours: the network of `keras_dsr.models` on TensorFlow; with XLA; on JAX; in bfloat16, where all others have float32;
  and its forward pass alone, in training mode
- PyTorch DSR: the same method with a gradient at every time step, `torch_networks`
- SpikingJelly BPTT: `IFNode` in multi-step mode, reset by subtraction, its ATan surrogate
- SpikingJelly DSRIFNode
- ANN: the network of the same shape with ReLU, in Keras and in PyTorch; in inference also on batch x N images

First the forms of PyTorch are tried (memory with channels last or first; `--compile` for torch.compile, too), for each
network, mode and library at the largest N, and the rest is measured with the one that takes the fewest CPU seconds
there. All networks have the same trainable parameters, thresholds apart, or the benchmark stops after the first round.
Results are written after each round.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import peers
from measure import (
    RESULTS,
    in_fresh_process,
    in_turn,
    line_fit,
    machine,
    markdown,
    median_of,
    processes,
    rounds_of,
    write,
)

HERE = Path(__file__).resolve().parent
SHAPES = {"resnet": (32, 32, 3), "vgg": (48, 48, 2)}
TITLES = {"resnet18": "PreAct-ResNet-18", "resnet20": "PreAct-ResNet-20", "vgg11": "VGG-11"}
# A PyTorch form that takes longer than this to start does not come into question.
FORM_TIMEOUT = 900
FORM_REPEATS = 3
# What the targets of `summary` are for, and the two N between which the growth of peak memory is measured for them.
NETWORK, TIMESTEPS, BATCH = "resnet18", 20, 8
GROWTH_AT = (20, 40)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One side of the comparison.

    Args:
        kind: "dsr", "ann", "sj-bptt" or "sj-dsr".
        backend: Keras' backend, or "torch".
        jit: Whether XLA compiles it, on TensorFlow.
        precision: Keras' dtype policy.
        modes: In which it is measured.
    """

    kind: str
    backend: str
    jit: bool = False
    precision: str = "float32"
    modes: tuple[str, ...] = ("train", "inference")


VARIANTS = {
    "ours": Variant("dsr", "tensorflow"),
    "ours, XLA": Variant("dsr", "tensorflow", jit=True),
    "ours, JAX": Variant("dsr", "jax"),
    "ours, bfloat16": Variant("dsr", "tensorflow", precision="mixed_bfloat16"),
    "ours, forward": Variant("dsr", "tensorflow", modes=("train",)),
    "PyTorch DSR": Variant("dsr", "torch"),
    "SpikingJelly BPTT": Variant("sj-bptt", "torch"),
    "SpikingJelly DSRIFNode": Variant("sj-dsr", "torch"),
    "ANN, Keras": Variant("ann", "tensorflow"),
    "ANN, PyTorch": Variant("ann", "torch"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the tables: a network, a mode, a variant, N (nothing for an ANN) and the batch."""

    network: str
    mode: str
    variant: str
    timesteps: int | None
    batch: int

    def __str__(self) -> str:
        steps = "" if self.timesteps is None else f", N = {self.timesteps}"
        return f"{self.network}, {self.mode}, {self.variant}{steps}, batch {self.batch}"


def cases(networks: list[str], modes: list[str], variants: list[str], timesteps: list[int], batch: int) -> list[Case]:
    """All cells to measure, in an order in which neighbours are to be compared."""
    found = []
    for network in networks:
        for mode in modes:
            chosen = [name for name in variants if mode in VARIANTS[name].modes]
            ann = [name for name in chosen if VARIANTS[name].kind == "ann"]
            found += [Case(network, mode, name, None, batch) for name in ann]
            for steps in timesteps:
                found += [Case(network, mode, name, steps, batch) for name in chosen if name not in ann]
                if mode == "inference":  # as many images as the others simulate steps of
                    found += [Case(network, mode, name, None, batch * steps) for name in ann]
    return found


def has_target(case: Case) -> bool:
    """Whether a target of `summary` needs this cell."""
    if case.network != NETWORK:
        return False
    if case.mode == "inference":
        same = ("ANN, Keras", None, BATCH * TIMESTEPS)
        return (case.variant, case.timesteps, case.batch) in (("ours", TIMESTEPS, BATCH), same)
    at = {
        "ours": (TIMESTEPS, *GROWTH_AT),
        "PyTorch DSR": (TIMESTEPS, *GROWTH_AT),
        "ours, forward": (TIMESTEPS,),
        "SpikingJelly BPTT": (TIMESTEPS,),
    }
    return case.batch == BATCH and case.timesteps in at.get(case.variant, ())


def shape_of(network: str) -> tuple[int, int, int]:
    """Height, width and channels of what a network sees in one step."""
    return next(shape for start, shape in SHAPES.items() if network.startswith(start))


Forms = dict[tuple[str, str, str], str]


def measure(case: Case, forms: Forms, repeats: int, cores: int | None, timeout: float | None = None) -> dict:
    """Measures one cell in a fresh process.

    Args:
        case: The cell.
        forms: For each network, mode and variant in PyTorch, the words of its form; as it comes, where there is none.
        repeats: Timed calls.
        cores: How many cores each side may use; `None` for all.
        timeout: Seconds after which it is stopped.
    """
    variant = VARIANTS[case.variant]
    task = {
        "network": case.network,
        "kind": variant.kind,
        "mode": "forward" if case.variant == "ours, forward" else case.mode,
        "timesteps": case.timesteps,
        "batch": case.batch,
        "shape": shape_of(case.network),
        "repeats": repeats,
        "cores": cores,
    }
    if variant.backend != "torch":
        task |= {"jit": variant.jit, "precision": variant.precision}
        return in_fresh_process(HERE / "keras_step.py", task, variant.backend, timeout=timeout)
    task["form"] = forms.get((case.network, case.mode, case.variant), "")
    return in_fresh_process(HERE / "torch_step.py", task, "torch", python=peers.python(), timeout=timeout)


def forms_to_try(compiled: bool) -> list[str]:
    """The words of each form of PyTorch; with torch.compile, too, if `compiled`."""
    return ["", "channels_last", *(["compile", "channels_last compile"] if compiled else [])]


def contests(todo: list[Case], at: int | None = None) -> list[Case]:
    """Where PyTorch's forms are tried: for each network, mode and variant the cell with the most steps, then images.

    Args:
        todo: All cells.
        at: N to try them at instead, where there is such a cell.
    """
    found: dict[tuple[str, str, str], Case] = {}
    for case in todo:
        if VARIANTS[case.variant].backend == "torch":
            key = (case.network, case.mode, case.variant)
            size = (case.timesteps == at, case.timesteps or 0, case.batch)
            other = found.get(key)
            if other is None or size > (other.timesteps == at, other.timesteps or 0, other.batch):
                found[key] = case
    return list(found.values())


def fastest_forms(todo: list[Case], compiled: bool, repeats: int, cores: int | None) -> tuple[Forms, list[dict]]:
    """The form of PyTorch that takes fewest CPU seconds, for each of these cells.

    Args:
        todo: The cells, one of each network, mode and variant: `contests`.
        compiled: Whether torch.compile is tried.
        repeats: Timed calls, of which there are no more than `FORM_REPEATS`.
        cores: How many cores each side may use; `None` for all.

    Returns:
        The words of the form by network, mode and variant; and a row for each form that was tried. What does not run in
        any form has rows alone: its cells will say why.
    """
    best, rows = {}, []
    for case in todo:
        key = (case.network, case.mode, case.variant)

        def run(form: str, case: Case = case, key: tuple[str, str, str] = key) -> dict:
            return measure(case, {key: form}, min(repeats, FORM_REPEATS), cores, timeout=FORM_TIMEOUT)

        print(f"forms of PyTorch: {case}", flush=True)
        runs, failures = in_turn(forms_to_try(compiled), run, rounds=1)
        about = dataclasses.asdict(case)
        own = [{**about, "form": form, **median_of(measured)} for form, measured in runs.items()]
        if own:
            best[key] = min(own, key=lambda row: row["cpu_s"])["form"]
        rows += own + [{**about, "form": form, "failed": why} for form, why in failures.items()]
    return best, rows


def check_parameters(rows: list[dict]) -> None:
    """Raises a RuntimeError unless all networks of a name have as many trainable parameters, thresholds apart."""
    for network in {row["network"] for row in rows}:
        counts = {row["variant"]: int(row["parameters"]) for row in rows if row["network"] == network}
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"The networks {network} are not the same: trainable parameters {counts}.")


def compare(options) -> None:
    """Measures all cells in turn; writes table and plot."""
    variants = [v for v in options.variants if options.peers or VARIANTS[v].backend != "torch"]
    todo = cases(options.networks, options.modes, variants, options.timesteps, options.batch)
    if options.targets:
        todo = [case for case in todo if has_target(case)]
    host = machine(options.cores)
    if options.peers:
        host["peers"] = peers.versions()
    tried = contests(todo, options.forms_at)
    forms, form_rows = fastest_forms(tried, options.compile, options.repeats, options.cores)
    table = ""

    def report(runs, failures) -> None:
        nonlocal table
        rounds = rounds_of(runs, failures)
        rows = [{**dataclasses.asdict(case), **median_of(measured)} for case, measured in runs.items()]
        check_parameters(rows)
        table = table_of(rows, forms, form_rows, failures, host, rounds)
        results = {
            "machine": host,
            "options": vars(options),
            "rounds": rounds,
            "forms": form_rows,
            "rows": rows,
            "runs": [{**dataclasses.asdict(case), "measured": measured} for case, measured in runs.items()],
            "failures": {str(case): why for case, why in failures.items()},
        }
        write(f"{options.prefix}steps", results, table)
        plot(rows, RESULTS / f"{options.prefix}steps.png", host)

    def run(case: Case) -> dict:
        return measure(case, forms, options.repeats, options.cores)

    in_turn(todo, run, options.rounds, options.minutes, report)
    print(table)


def find(rows: list[dict], **wanted: Any) -> dict | None:
    """The row with these values, or nothing."""
    return next((row for row in rows if all(name in row and row[name] == wanted[name] for name in wanted)), None)


def ratio(row: dict, other: dict | None, what: str = "cpu_s") -> str | None:
    """How many times the other's a row's measure is, for a table."""
    return None if other is None else f"{row[what] / other[what]:.2f}"


def table_of(rows, forms, form_rows, failures, host, rounds) -> str:
    """The Markdown tables."""
    versions = {**host["versions"], **host.get("peers", {})}
    lines = [
        f"`{host['command']}`: {host['cores']} cores of {host['processor']}, {host['date']}; {processes(rounds)} "
        "for each figure. "
        + ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if name != "python")
        + ".",
        "",
    ]
    networks = dict.fromkeys(row["network"] for row in rows)
    for network in networks:
        for mode in dict.fromkeys(row["mode"] for row in rows):
            own = [row for row in rows if row["network"] == network and row["mode"] == mode]
            if not own:
                continue
            title = {"train": "a training step", "inference": "inference"}[mode]
            lines += [
                f"## {TITLES.get(network, network)}, {title}",
                "",
                f"{int(own[0]['parameters']):,} trainable parameters, thresholds apart, in each.",
                "",
            ]
            header = ["N", "batch", "", "CPU s", "wall s", "peak MB", "CPU, of PyTorch DSR", "wall, of PyTorch DSR"]
            header += ["CPU, of our forward" if mode == "train" else "CPU, of Keras' ANN on batch x N"]
            cells = []
            for row in own:
                base = {"network": network, "mode": mode, "batch": row["batch"], "timesteps": row["timesteps"]}
                dsr = find(rows, variant="PyTorch DSR", **base)
                if mode == "train":
                    # Of the same library, compiled as it is: it is the forward pass of no other variant.
                    is_its = row["variant"] in ("ours", "ours, forward")
                    last = ratio(row, find(rows, variant="ours, forward", **base)) if is_its else None
                else:
                    images = row["batch"] * (row["timesteps"] or 1)
                    same = {**base, "batch": images, "timesteps": None}
                    last = ratio(row, find(rows, variant="ANN, Keras", **same))
                cells.append(
                    [
                        row["timesteps"],
                        row["batch"],
                        row["variant"],
                        f"{row['cpu_s']:.3f}",
                        f"{row['wall_s']:.3f}",
                        f"{row['peak_mb']:.0f}",
                        ratio(row, dsr),
                        ratio(row, dsr, "wall_s"),
                        last,
                    ]
                )
            lines += [*markdown(header, cells), ""]
            growth = memory_growth(own)
            if growth:
                told = [f"{name} {slope:.1f} (from N = {at[0]} to {at[-1]})" for name, (slope, at) in growth.items()]
                lines += [f"Peak memory for each further time step, MB: {', '.join(told)}.", ""]
    if form_rows:
        lines += ["## Forms of PyTorch", "", "The one with the fewest CPU seconds is used above, at all N.", ""]
        body = [
            [
                TITLES.get(row["network"], row["network"]),
                {"train": "a training step", "inference": "inference"}[row["mode"]],
                row["variant"],
                row["timesteps"],
                row["batch"],
                row["form"] or "as it comes",
                f"{row['cpu_s']:.3f}" if "cpu_s" in row else "failed",
                f"{row['first_s']:.1f}" if "first_s" in row else None,
                "yes" if forms.get((row["network"], row["mode"], row["variant"])) == row["form"] else None,
            ]
            for row in form_rows
        ]
        header = ["network", "", "", "N", "batch", "form", "CPU s", "first call s", "used"]
        lines += [*markdown(header, body), ""]
    for case, why in failures.items():
        lines += [f"{case} failed: {why}", ""]
    return "\n".join(lines)


def memory_growth(rows: list[dict]) -> dict[str, tuple[float, list[int]]]:
    """How peak memory grows, of each variant that was measured at several N.

    Of N from 20 on alone, where there are two: below, the peak may be what does not grow with N, such as workspaces of
    compiling, so that a slope from there says too little.

    Returns:
        By variant MB for each further time step, and the N that the line was fitted at.
    """
    growth = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        peaks = {row["timesteps"]: row["peak_mb"] for row in rows if row["variant"] == variant and row["timesteps"]}
        high = [n for n in peaks if n >= min(GROWTH_AT)]
        at = sorted(high if len(high) > 1 else peaks)
        if len(at) > 1:
            growth[variant] = line_fit(at, [peaks[n] for n in at])[0], at
    return growth


def plot(rows: list[dict], path: Path, host: dict) -> None:
    """Draws seconds and memory over N, a row of panels a network."""
    import plots

    networks = list(dict.fromkeys(row["network"] for row in rows))
    panels = [(mode, name) for mode in ("train", "inference") for name in ("cpu_s", "wall_s", "peak_mb")]
    panels = [(mode, name) for mode, name in panels if any(row["mode"] == mode for row in rows)]
    panels = [each for each in panels if each not in (("train", "wall_s"), ("inference", "peak_mb"))]
    titles = {"train": "training step", "inference": "inference"}
    units = {"cpu_s": "CPU seconds", "wall_s": "wall seconds", "peak_mb": "peak memory, MB"}
    figure = plots.figure(
        f"{host['cores']} cores of {host['processor']}, {host['date']}", 4.4 * len(panels), 3.6 * len(networks) + 1
    )
    shown = {}
    for place, network in enumerate(networks):
        for column, (mode, name) in enumerate(panels):
            axes = figure.add_subplot(len(networks), len(panels), place * len(panels) + column + 1)
            own = [row for row in rows if row["network"] == network and row["mode"] == mode]
            for variant in dict.fromkeys(row["variant"] for row in own):
                style = {"color": plots.COLORS[variant], "label": variant}
                points = sorted((r["timesteps"], r[name]) for r in own if r["variant"] == variant and r["timesteps"])
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, **style)
                else:
                    row = min((r for r in own if r["variant"] == variant), key=lambda r: r["batch"])
                    axes.axhline(row[name], linestyle="--", linewidth=1, **style)
            numbers = sorted({row["timesteps"] for row in own if row["timesteps"]})
            if numbers:
                axes.set_xlim(0, 1.1 * max(numbers))
                axes.set_xticks(numbers)
            axes.set_ylim(0, 1.1 * max(row[name] for row in own))
            plots.panel(axes, f"{TITLES.get(network, network)}, {titles[mode]}", "time steps N", units[name])
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, loc="outside lower left", ncols=min(len(shown), 5), frameon=False, fontsize=9)
    plots.save(figure, path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ["train", "inference"]
    made.add_argument(
        "--networks", nargs="+", choices=list(TITLES), default=list(TITLES), help="which; all, if not given"
    )
    made.add_argument("--modes", nargs="+", choices=modes, default=modes, help="training steps, inferences, or both")
    made.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the sides")
    made.add_argument("--timesteps", type=int, nargs="+", default=[5, 10, 20, 40], help="numbers N of time steps")
    made.add_argument("--batch", type=int, default=8, help="images in a batch")
    made.add_argument("--targets", action="store_true", help="of all these only what the targets of the summary need")
    made.add_argument("--forms-at", type=int, help="N at which PyTorch's forms are tried; the largest, if not given")
    made.add_argument("--repeats", type=int, default=5, help="timed calls in a process")
    made.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    made.add_argument("--compile", action="store_true", help="try torch.compile, too, which takes minutes")
    common(made)
    return made


def common(made: argparse.ArgumentParser) -> None:
    """Adds the options that all benchmarks of the suite have."""
    made.add_argument("--minutes", type=float, help="begin no round that would end after so many minutes")
    made.add_argument("--cores", type=int, help="how many cores each side may use; all, if not given")
    made.add_argument("--no-peers", dest="peers", action="store_false", help="without PyTorch and SpikingJelly")
    made.add_argument("--prefix", default="", help="put before the names of the results")


if __name__ == "__main__":
    compare(parser().parse_args())

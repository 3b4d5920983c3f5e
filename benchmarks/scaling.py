"""How the cost of a training step grows with time steps, with depth and with the batch: fitted slopes.

    python benchmarks/scaling.py                             # an hour or two on 2 cores
    python benchmarks/scaling.py --axes depth --depth 20 56 110

For ours on TensorFlow and for the plain PyTorch DSR, each figure of fresh processes, forwards and backwards by turns.
The slope is that of the line through the medians by linear least squares, beside it R^2, how much of the variance the
line accounts for. PyTorch's forms are tried for each network at the largest N, as in `steps`. Results are written after
each round.
"""

from __future__ import annotations

import argparse
import dataclasses

import peers
from measure import RESULTS, in_turn, line_fit, machine, markdown, median_of, processes, rounds_of, write
from steps import Case, common, contests, fastest_forms, measure

AXES = {
    "timesteps": "one more time step",
    "depth": "one more layer",
    "batch": "one more image in the batch",
}
VARIANTS = ("ours", "PyTorch DSR")


def points(axis: str, options) -> list[tuple[int, str, int, int]]:
    """Where an axis is measured: its value, and network, N and batch there."""
    if axis == "timesteps":
        return [(n, options.network, n, options.batch_size) for n in options.timesteps]
    if axis == "depth":
        return [(depth, f"resnet{depth}", options.steps, options.batch_size) for depth in options.depth]
    return [(batch, options.network, options.steps, batch) for batch in options.batch]


def share(slope: float, other: float | None) -> str | None:
    """What part of the other's slope one is, for a table; nothing where the other's is not a growth."""
    return f"{slope / other:.3f}" if other and other > 0 else None


def compare(options) -> None:
    """Measures all points in turn; writes table and plot."""
    variants = [name for name in VARIANTS if options.peers or name == "ours"]
    places = {axis: points(axis, options) for axis in options.axes}
    # A case that two axes share is measured once.
    todo = list(
        dict.fromkeys(
            Case(network, "train", variant, steps, batch)
            for axis in places.values()
            for _, network, steps, batch in axis
            for variant in variants
        )
    )
    host = machine(options.cores)
    if options.peers:
        host["peers"] = peers.versions()
    forms, form_rows = fastest_forms(contests(todo), False, options.repeats, options.cores)
    table = ""

    def report(runs, failures) -> None:
        nonlocal table
        table = write_results(options, places, variants, host, form_rows, runs, failures)

    def run(case: Case) -> dict:
        return measure(case, forms, options.repeats, options.cores)

    in_turn(todo, run, options.rounds, options.minutes, report)
    print(table)


def write_results(options, places, variants, host, form_rows, runs, failures) -> str:
    """Fits the lines, writes all that was measured so far, and gives the table."""
    import plots

    rounds = rounds_of(runs, failures)
    medians = {case: median_of(measured) for case, measured in runs.items()}
    slopes, rows = [], []
    for axis, where in places.items():
        for variant in variants:
            own = [(x, medians.get(Case(network, "train", variant, n, b))) for x, network, n, b in where]
            own = [(x, median) for x, median in own if median]
            rows += [{"axis": axis, "variant": variant, "at": x, **median} for x, median in own]
            if len(own) > 1:
                x = [place for place, _ in own]
                fits = {name: line_fit(x, [median[name] for _, median in own]) for name in ("cpu_s", "peak_mb")}
                slopes.append({"axis": axis, "variant": variant, "at": x, **fits})

    lines = [
        f"`{host['command']}`: a training step, {host['cores']} cores of {host['processor']}, {host['date']}; "
        f"{processes(rounds)} for each point. Unless it is what varies: "
        f"{options.network}, N = {options.steps} (for the batch and the depth), batch {options.batch_size}.",
        "",
    ]
    cells = []
    for fit in slopes:
        (cpu, _, cpu_fits), (memory, _, memory_fits) = fit["cpu_s"], fit["peak_mb"]
        other = next((f for f in slopes if f["axis"] == fit["axis"] and f["variant"] == "PyTorch DSR"), None)
        cells.append(
            [
                AXES[fit["axis"]],
                ", ".join(map(str, fit["at"])),
                fit["variant"],
                f"{cpu:.4f}",
                f"{cpu_fits:.3f}",
                f"{memory:.2f}",
                f"{memory_fits:.3f}",
                *(share(fit[name][0], other and other[name][0]) for name in ("cpu_s", "peak_mb")),
            ]
        )
    header = ["", "measured at", "", "CPU s", "R^2", "peak MB", "R^2", "CPU, of PyTorch DSR", "MB, of PyTorch DSR"]
    lines += [*markdown(header, cells), ""]
    lines += [f"{case} failed: {why}\n" for case, why in failures.items()]
    table = "\n".join(lines)
    results = {
        "machine": host,
        "options": vars(options),
        "rounds": rounds,
        "forms": form_rows,
        "rows": rows,
        "slopes": slopes,
        "runs": [{**dataclasses.asdict(case), "measured": measured} for case, measured in runs.items()],
        "failures": {str(case): why for case, why in failures.items()},
    }
    write(f"{options.prefix}scaling", results, table)

    figure = plots.figure("Cost of a training step: points measured, lines fitted", 4.4 * len(places), 7)
    for column, axis in enumerate(places, start=1):
        for row, (name, unit) in enumerate((("cpu_s", "CPU seconds"), ("peak_mb", "peak memory, MB"))):
            axes = figure.add_subplot(2, len(places), row * len(places) + column)
            for variant in variants:
                own = [each for each in rows if each["axis"] == axis and each["variant"] == variant]
                style = {"color": plots.COLORS[variant]}
                axes.scatter([e["at"] for e in own], [e[name] for e in own], s=18, label=variant, **style)
                fit = next((f for f in slopes if f["axis"] == axis and f["variant"] == variant), None)
                if fit:
                    slope, start, _ = fit[name]
                    ends = [min(fit["at"]), max(fit["at"])]
                    axes.plot(ends, [start + slope * x for x in ends], **style)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False, fontsize=9)
            plots.panel(axes, "", {"timesteps": "time steps N"}.get(axis, axis), unit)
    plots.save(figure, RESULTS / f"{options.prefix}scaling.png")
    return table


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what varies")
    made.add_argument("--network", default="resnet18", help="where the depth does not vary")
    made.add_argument("--steps", type=int, default=10, help="N, where it does not vary")
    made.add_argument("--batch-size", type=int, default=8, help="the batch, where it does not vary")
    made.add_argument("--timesteps", type=int, nargs="+", default=[5, 10, 20, 40], help="values of N")
    made.add_argument("--depth", type=int, nargs="+", default=[20, 32, 44, 56, 110], help="depths of PreAct-ResNets")
    made.add_argument("--batch", type=int, nargs="+", default=[4, 8, 16, 32], help="sizes of the batch")
    made.add_argument("--repeats", type=int, default=3, help="timed calls in a process")
    made.add_argument("--rounds", type=int, default=2, help="processes for each figure")
    common(made)
    return made


if __name__ == "__main__":
    compare(parser().parse_args())

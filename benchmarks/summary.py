"""One table of what was measured against what was aimed at, from the results of the other benchmarks.

python benchmarks/summary.py                     # of the full form
python benchmarks/summary.py --prefix quick_     # of `make bench`
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from measure import RESULTS, at_most, machine, markdown, write
from steps import find, memory_growth

NETWORK, TIMESTEPS, BATCH = "resnet18", 20, 8


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that was aimed at.

    Args:
        what: What is measured.
        limit: It is met by this and by less.
        value: What was measured; `None` if nothing was.
        goal: The limit, as people say it.
    """

    what: str
    limit: float
    value: float | None
    goal: str

    @property
    def verdict(self) -> str:
        """ "met", "not met" or "not measured"."""
        return at_most(self.value, self.limit)


def over(row: dict | None, other: dict | None, measure: str = "cpu_s") -> float | None:
    """How many times the other's a row's measure is; `None` if one is missing."""
    return row[measure] / other[measure] if row and other else None


def of_steps(rows: list[dict]) -> list[Target]:
    """The targets for a training step and an inference on the CPU."""
    at = {"network": NETWORK, "timesteps": TIMESTEPS, "batch": BATCH}
    step = {name: find(rows, mode="train", variant=name, **at) for name in {row["variant"] for row in rows}}
    ours, forward = step.get("ours"), step.get("ours, forward")
    growth = memory_growth([row for row in rows if row["network"] == NETWORK and row["mode"] == "train"])
    grown = None
    if "ours" in growth and growth.get("PyTorch DSR", 0) > 0:
        grown = growth["ours"] / growth["PyTorch DSR"]
    inference = find(rows, mode="inference", variant="ours", **at)
    same = {**at, "timesteps": None, "batch": BATCH * TIMESTEPS}
    ann = find(rows, mode="inference", variant="ANN, Keras", **same)
    return [
        Target("a training step's CPU seconds, of PyTorch DSR's", 1 / 5, over(ours, step.get("PyTorch DSR")), "1/5"),
        Target(
            "a training step's CPU seconds, of SpikingJelly BPTT's",
            1 / 5,
            over(ours, step.get("SpikingJelly BPTT")),
            "1/5",
        ),
        Target("a training step's CPU seconds, of our own forward pass's", 1.2, over(ours, forward), "1.2"),
        Target("growth of peak memory with N, of PyTorch DSR's", 1 / 6, grown, "1/6"),
        Target(
            f"inference's CPU seconds, of Keras' ANN's on as many images as steps ({BATCH} x {TIMESTEPS})",
            1.1,
            over(inference, ann),
            "1.1",
        ),
    ]


def of_startup(results: dict | None) -> list[Target]:
    """The target for importing the package, on TensorFlow."""
    row = find(results["imports"], backend="tensorflow") if results else None
    return [Target("seconds that `import keras_dsr` adds to `import keras`", 0.3, row and row["added_s"], "0.3")]


def of_gpu(results: dict | None) -> list[Target]:
    """The targets on a GPU; none of them is measured where the results are a CPU's."""
    rows = [row for row in (results or {}).get("rows", []) if row["platform"] in ("gpu", "cuda")]
    targets = []
    for precision in ("float32", "tf32"):
        at = {"timesteps": 20, "precision": precision, "batch": 128}
        ours, other = (find(rows, side=side, **at) for side in ("ours, JAX", "PyTorch DSR"))
        targets.append(
            Target(f"GPU, {precision}, N = 20: an epoch, of PyTorch DSR's", 1 / 5, over(ours, other, "wall_s"), "1/5")
        )
    epochs = [row["epoch_s"] for row in rows if row["side"] == "ours, JAX" and row["timesteps"] == 20]
    targets.append(
        Target("GPU: seconds of an epoch, N = 20, in the fastest precision", 15.0, min(epochs, default=None), "15")
    )
    return targets


def table_of(targets: list[Target]) -> list[str]:
    """The lines of the Markdown table; values are not rounded to fewer digits than tell them from the limit."""
    cells = []
    for target in targets:
        shown = None
        if target.value is not None:
            digits = next(
                (n for n in range(3, 17) if at_most(float(f"{target.value:.{n}g}"), target.limit) == target.verdict), 17
            )
            shown = f"{target.value:.{digits}g}"
        cells.append([target.what, f"at most {target.goal}", shown, target.verdict])
    return markdown(["", "target", "measured", ""], cells)


def compare(options: Any) -> None:
    """Reads what was measured, and writes the table."""
    read = {}
    for name in ("steps", "startup", "gpu"):
        path = RESULTS / f"{options.prefix}{name}.json"
        read[name] = json.loads(path.read_text()) if path.is_file() else None
    targets = of_steps(read["steps"]["rows"] if read["steps"] else [])
    targets += [*of_startup(read["startup"]), *of_gpu(read["gpu"])]
    sources = [
        f"{name}: {result['machine']['date']}, {result['machine']['cores']} cores of {result['machine']['processor']}, "
        f"`{result['machine']['command']}`"
        for name, result in read.items()
        if result
    ]
    lines = [
        f"PreAct-ResNet-18, N = {TIMESTEPS}, batch {BATCH}, TensorFlow without XLA, unless it says otherwise.",
        "",
        *table_of(targets),
        "",
        *(f"- {source}" for source in sources),
        "",
    ]
    table = "\n".join(lines)
    rows = [{**dataclasses.asdict(target), "verdict": target.verdict} for target in targets]
    write(f"{options.prefix}summary", {"machine": machine(), "targets": rows}, table)
    print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--prefix", default="", help="what the names of the results start with")
    return made


if __name__ == "__main__":
    compare(parser().parse_args())

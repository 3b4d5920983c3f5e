"""One table of what was measured against what was aimed at, from the results of the other benchmarks.

python benchmarks/summary.py                     # of the full form
python benchmarks/summary.py --prefix quick_     # of `make bench`

The GPU's results and those of whole numbers are of scripts that have one form, so that theirs have no prefix.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from measure import RESULTS, at_most, machine, markdown, processes, write
from steps import BATCH, NETWORK, TIMESTEPS, find, memory_growth

# Where the targets on a GPU are, and those of inference in whole numbers.
GPU_AT = {"network": NETWORK, "shape": [32, 32, 3], "batch": 128, "timesteps": TIMESTEPS}
INTEGER_TIMESTEPS, INTEGER_AT = 4, ("preact_resnet18", "8")


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


def over(row: dict | None, other: dict | None, what: str = "cpu_s") -> float | None:
    """How many times the other's a row's measure is; `None` if one is missing."""
    return row[what] / other[what] if row and other else None


def of_steps(rows: list[dict]) -> list[Target]:
    """The targets for a training step and an inference on the CPU."""
    at = {"network": NETWORK, "timesteps": TIMESTEPS, "batch": BATCH}
    step = {name: find(rows, mode="train", variant=name, **at) for name in {row["variant"] for row in rows}}
    ours, forward = step.get("ours"), step.get("ours, forward")
    growth = memory_growth([row for row in rows if row["network"] == NETWORK and row["mode"] == "train"])
    grown, between = None, ""
    if "ours" in growth and "PyTorch DSR" in growth:
        (own, steps), (other, other_steps) = growth["ours"], growth["PyTorch DSR"]
        # What does not grow was drowned in noise: that is no measure of how much less it grows.
        if steps == other_steps and own > 0 and other > 0:
            grown, between = own / other, f" from {steps[0]} to {steps[-1]}"
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
        Target(f"growth of peak memory with N{between}, of PyTorch DSR's", 1 / 6, grown, "1/6"),
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
    """The targets on a GPU; none of them is measured where the results are a CPU's, or those of another network."""
    rows = [row for row in (results or {}).get("rows", []) if row["platform"] in ("gpu", "cuda")]
    targets = []
    for precision in ("float32", "tf32"):
        ours, other = (find(rows, side=side, precision=precision, **GPU_AT) for side in ("ours, JAX", "PyTorch DSR"))
        targets.append(
            Target(
                f"GPU, {precision}, batch 128: an epoch, of PyTorch DSR's", 1 / 5, over(ours, other, "wall_s"), "1/5"
            )
        )
    precisions = dict.fromkeys(row["precision"] for row in rows)
    ours = [find(rows, side="ours, JAX", precision=precision, **GPU_AT) for precision in precisions]
    epochs = [row["epoch_s"] for row in ours if row]
    targets.append(
        Target("GPU, batch 128: seconds of an epoch in the fastest precision", 15.0, min(epochs, default=None), "15")
    )
    return targets


def of_integers(results: dict | None) -> tuple[list[Target], list[dict]]:
    """The target for inference in whole numbers; and of each network and batch what it takes, of the float32 ANN's."""
    rows = []
    if results and results["settings"]["timesteps"] == INTEGER_TIMESTEPS:
        rows = [
            {"network": network, "batch": batch, "of_ann": over(forms["whole numbers"], forms["ANN"])}
            for network, measured in results["results"].items()
            for batch, forms in measured["batches"].items()
        ]
    network, batch = INTEGER_AT
    aimed = find(rows, network=network, batch=batch)
    what = f"ONNX Runtime, whole numbers of 8 bits, N = {INTEGER_TIMESTEPS}, batch {batch}: inference's CPU seconds, "
    return [Target(f"{what}of the float32 ANN's", 1.5, aimed and aimed["of_ann"], "1.5")], rows


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
    for name in ("steps", "startup", "gpu", "integer_inference"):
        prefix = options.prefix if name in ("steps", "startup") else ""
        path = RESULTS / f"{prefix}{name}.json"
        read[name] = json.loads(path.read_text()) if path.is_file() else None
    targets = of_steps(read["steps"]["rows"] if read["steps"] else [])
    integers, of_ann = of_integers(read["integer_inference"])
    targets += [*of_startup(read["startup"]), *of_gpu(read["gpu"]), *integers]
    sources = [source(name, result) for name, result in read.items() if result]
    if of_ann:
        told = [f"{row['network']}, batch {row['batch']}: {row['of_ann']:.2f}" for row in of_ann]
        sources.insert(0, f"whole numbers, of the float32 ANN's CPU seconds: {'; '.join(told)}")
    lines = [
        f"PreAct-ResNet-18, N = {TIMESTEPS}, batch {BATCH}, TensorFlow, whose XLA compiles the neurons alone, unless "
        "it says otherwise.",
        "",
        *table_of(targets),
        "",
        *(f"- {source}" for source in sources),
        "",
    ]
    table = "\n".join(lines)
    rows = [{**dataclasses.asdict(target), "verdict": target.verdict} for target in targets]
    write(f"{options.prefix}summary", {"machine": machine(), "targets": rows, "whole_numbers": of_ann}, table)
    print(table)


def source(name: str, results: dict) -> str:
    """Where figures are from: date, machine, command, and how many processes each is the median of."""
    host = results["machine"]
    where = host.get("device") or f"{host['cores']} cores of {host['processor']}"
    rounds = f", {processes(results['rounds'])} for each figure" if "rounds" in results else ""
    return f"{name}: {host['date']}, {where}{rounds}, `{host['command']}`"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--prefix", default="", help="what the names of the results start with")
    return made


if __name__ == "__main__":
    compare(parser().parse_args())

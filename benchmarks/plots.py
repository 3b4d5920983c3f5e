"""The look of the benchmarks' plots, that of the package's own figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.figure
from matplotlib.axes import Axes

INK, FAINT = "#22303c", "#d9dfe4"
# One color a side, in all plots.
COLORS = {
    "ours": "#0b6e99",
    "ours, XLA": "#5aa9c9",
    "ours, JAX": "#9065b0",
    "ours, bfloat16": "#2a9d8f",
    "ours, forward": "#787774",
    "ours, hybrid": "#448361",
    "PyTorch DSR": "#d9730d",
    "SpikingJelly BPTT": "#c14c8a",
    "SpikingJelly DSRIFNode": "#8f6b00",
    "ANN, Keras": "#22303c",
    "ANN, PyTorch": "#b0b7bd",
}


def figure(title: str, width: float, height: float) -> matplotlib.figure.Figure:
    """An empty figure with a heading."""
    made = matplotlib.figure.Figure(figsize=(width, height), layout="constrained", facecolor="white")
    made.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return made


def panel(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Gives a panel its title and the look of the others."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def save(made: matplotlib.figure.Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    from keras_dsr.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        made.savefig(beside, dpi=120)

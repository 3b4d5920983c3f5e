"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from keras_dsr.files import replacing

_INK, _FAINT = "#22303c", "#d9dfe4"
_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")


def _panel(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def training_run(
    path: Path,
    title: str,
    history: Mapping[str, Sequence[float]],
    rates: Mapping[str, float],
    thresholds: Mapping[str, Sequence[float]],
    image: np.ndarray,
    caption: str,
    trains: Mapping[str, np.ndarray],
) -> None:
    """Draws one picture of a run: training curves, thresholds, firing rates, and the spikes of one image.

    Args:
        path: The PNG file to write; it appears whole or not at all.
        title: Heading of the picture.
        history: For "accuracy" and "val_accuracy", a value for each epoch.
        rates: Firing rate of each neuron layer.
        thresholds: For each neuron layer its threshold before training and after each epoch.
        image: One image, of shape (height, width, channels).
        caption: What the image is.
        trains: For each neuron layer, the spikes of that image, booleans of shape (time, ...).
    """
    figure = matplotlib.figure.Figure(figsize=(12, 8.4), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.25))
    names = list(trains)
    color = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}

    axes = figure.add_subplot(grid[0, 0])
    epochs = np.arange(1, len(history["accuracy"]) + 1)
    axes.plot(epochs, history["accuracy"], color=_COLORS[-1], label="training (augmented, with dropout)")
    axes.plot(epochs, history["val_accuracy"], color=_COLORS[0], label="validation")
    axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(max(0.0, min(history["val_accuracy"]) - 0.12), 1.01)
    _panel(axes, "Accuracy", "epoch", "accuracy")

    axes = figure.add_subplot(grid[0, 1])
    for name, values in thresholds.items():
        axes.plot(np.arange(len(values)), values, color=color[name], label=name)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=9, loc="best")
    _panel(axes, "Thresholds", "epoch", "threshold $V_{th}$")

    axes = figure.add_subplot(grid[0, 2])
    bars = axes.barh(names, [rates[name] for name in names], color=[color[name] for name in names])
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(rates.values()) * 1.25 or 1.0)
    _panel(axes, "Firing rates on test images", "spikes per neuron and time step", "")
    axes.grid(axis="y", visible=False)

    below = grid[1, :].subgridspec(1, len(names) + 1)
    axes = figure.add_subplot(below[0])
    axes.imshow(image[..., 0], cmap="gray")
    axes.set_title(caption, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_axis_off()
    for index, name in enumerate(names, start=1):
        _raster(figure.add_subplot(below[index]), name, trains[name], color[name])
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)


def _raster(axes: Axes, name: str, train: np.ndarray, color: str, most: int = 64) -> None:
    """Spikes over time, a row a neuron; a layer of more than `most` neurons is thinned out evenly."""
    flat = np.asarray(train).reshape(len(train), -1)
    chosen = np.unique(np.linspace(0, flat.shape[1] - 1, min(most, flat.shape[1])).astype(int))
    axes.imshow(
        flat[:, chosen].T,
        cmap=ListedColormap(["white", color]),
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, len(flat) + 0.5, len(chosen) - 0.5, -0.5),
    )
    shown = f"all {len(chosen)}" if len(chosen) == flat.shape[1] else f"{len(chosen)} of {flat.shape[1]:,}"
    title = f"Spikes of {name}\n{shown} neurons"
    _panel(axes, title, "time step", "")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(chosen) <= 10:
        axes.set_yticks(range(len(chosen)))
    else:
        axes.set_yticks([])

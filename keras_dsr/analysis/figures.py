"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from keras_dsr.analysis import charts
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
    stages: Sequence[tuple[str, int]],
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
        history: For "accuracy" and, if there are validation examples, "val_accuracy" a value for each epoch.
        stages: Name and number of epochs of each stage of the training, in order.
        rates: Firing rate of each neuron layer.
        thresholds: For each neuron layer its threshold before training and after each epoch.
        image: One input: an image (height, width, channels), or event frames (time, height, width, polarities), which
            are shown as the sum of events, on above off.
        caption: What the image is.
        trains: For each neuron layer, the spikes of that image, booleans of shape (time, ...).
    """
    figure = matplotlib.figure.Figure(figsize=(12, 8.4), layout="constrained", facecolor="white")
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.25))
    names = list(trains)
    shown = charts.spread(names, _MOST)
    color = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(shown)}

    axes = figure.add_subplot(grid[0, 0])
    epochs = np.arange(1, len(history["accuracy"]) + 1)
    axes.plot(epochs, history["accuracy"], color=_COLORS[-1], label="training (augmented, with dropout)")
    held_out = history.get("val_accuracy")
    if held_out:
        axes.plot(epochs, held_out, color=_COLORS[0], label="validation")
    axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(max(0.0, min(held_out or history["accuracy"]) - 0.12), 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _panel(axes, "Accuracy", "epoch", "accuracy")

    thresholds_axes = figure.add_subplot(grid[0, 1])
    for name in names:
        values = thresholds[name]
        style = {"color": color[name], "label": name, "zorder": 3} if name in color else {"color": _FAINT}
        thresholds_axes.plot(np.arange(len(values)), values, **style)
    thresholds_axes.margins(y=0.15)
    thresholds_axes.legend(frameon=False, fontsize=9, loc="best")
    thresholds_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _panel(thresholds_axes, "Thresholds", "epoch", "threshold $V_{th}$")

    ends = np.cumsum([epochs for _, epochs in stages])
    for (name, _), end in zip(stages[1:], ends, strict=False):
        for each in (axes, thresholds_axes):
            each.axvline(end + 0.5, color=_INK, linewidth=0.8, linestyle=":")
            each.annotate(
                f"{name} from here",
                (end + 0.5, 0.98),
                xycoords=("data", "axes fraction"),
                xytext=(-4, 0),
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="top",
                fontsize=8,
                color=_INK,
            )

    axes = figure.add_subplot(grid[0, 2])
    bars = axes.barh(names, [rates[name] for name in names], color=[color.get(name, _COLORS[-1]) for name in names])
    small = {"fontsize": 9 if len(names) <= 12 else 6}
    axes.bar_label(bars, fmt="%.3f", padding=3, **small)
    axes.tick_params(axis="y", labelsize=small["fontsize"])
    axes.invert_yaxis()
    axes.set_xlim(0, max(rates.values()) * 1.25 or 1.0)
    _panel(axes, "Firing rates on test examples", "spikes per neuron and time step", "")
    axes.grid(axis="y", visible=False)

    below = grid[1, :].subgridspec(1, len(shown) + 1)
    axes = figure.add_subplot(below[0])
    axes.imshow(picture(image))
    axes.set_title(caption, loc="left", fontsize=11, fontweight="bold", color=_INK, wrap=True)
    axes.set_axis_off()
    for index, name in enumerate(shown, start=1):
        _raster(figure.add_subplot(below[index]), name, trains[name], color[name])
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)


def accuracies(
    path: Path,
    title: str,
    names: Sequence[str],
    measured: Sequence[Sequence[float]],
    reported: Sequence[float | None],
) -> None:
    """Draws the accuracies of several settings: the mean, every run, and what the paper reports.

    Args:
        path: The PNG file to write; it appears whole or not at all.
        title: Heading of the picture.
        names: Name of each setting.
        measured: Accuracies of each setting's runs, in per cent.
        reported: What the paper reports for each, in per cent, or `None`.
    """
    figure = matplotlib.figure.Figure(figsize=(9, 1.6 + 0.45 * len(names)), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    places = np.arange(len(names))
    means = [float(np.mean(values)) for values in measured]
    axes.barh(places, means, color=_COLORS[0], height=0.6, label="mean")
    runs_ = [(value, place) for place, values in zip(places, measured, strict=True) for value in values]
    axes.scatter(*zip(*runs_, strict=True), color=_INK, s=14, zorder=3, label="each run")
    stated = [(value, place) for place, value in zip(places, reported, strict=True) if value is not None]
    if stated:
        axes.scatter(*zip(*stated, strict=True), color=_COLORS[1], marker="D", s=30, zorder=4, label="the paper")
    everything = [*(value for value, _ in runs_), *(value for value, _ in stated)]
    low = max(0.0, min(everything) - max(2.0, 0.5 * (max(everything) - min(everything))))
    axes.set_xlim(low, min(100.0, max(everything) + 0.15 * (max(everything) - low)))
    for place, mean in zip(places, means, strict=True):
        axes.annotate(
            f"{mean:.2f}", (low, place), xytext=(5, 0), textcoords="offset points", va="center", color="white"
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    _panel(axes, "", "test accuracy in per cent (the axis does not start at 0)", "")
    axes.grid(axis="y", visible=False)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)


# More layers than this are not told apart by color, nor have room for their spikes side by side.
_MOST = 5


def picture(image: np.ndarray) -> np.ndarray:
    """An input as a picture: gray or in color, from the least to the largest value; of events ON in red, OFF in blue.

    Args:
        image: An image (height, width, channels), or event frames (time, height, width, polarities).

    Returns:
        Floats from 0 to 1 of shape (height, width, 3).
    """
    if image.ndim == 4:
        counts = image.sum(axis=0)
        off, on = (counts[..., channel] / max(counts.max(), 1e-9) for channel in (0, -1))
        return np.clip(1 - np.stack([off, np.maximum(on, off), on], axis=-1), 0, 1)
    colored = image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, axis=-1)
    return np.clip((colored - colored.min()) / max(np.ptp(colored), 1e-9), 0, 1)


def _raster(axes: Axes, name: str, train: np.ndarray, color: str, most: int = 64) -> None:
    """Spikes over time, a row a neuron; a layer of more than `most` neurons is thinned out evenly."""
    flat = np.asarray(train).reshape(len(train), -1)
    chosen = charts.thinned(flat.shape[1], most)
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
    # Long names have no room for more.
    title = f"{name if len(name) > 11 else f'Spikes of {name}'}\n{shown} neurons"
    _panel(axes, title, "time step", "")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(chosen) <= 10:
        axes.set_yticks(range(len(chosen)))
    else:
        axes.set_yticks([])

"""Pictures of a training run, and of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from keras_dsr.analysis import charts
from keras_dsr.files import replacing

_INK, _FAINT = "#22303c", "#d9dfe4"
_COLORS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774")


def _panel(axes: Axes, title: str, xlabel: str, ylabel: str, fontsize: float = 11) -> None:
    axes.set_title(title, loc="left", fontsize=fontsize, fontweight="bold", color=_INK)
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
    axes.plot(epochs, history["accuracy"], color=_COLORS[-1], label="training, mean of the epoch")
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
    # All headings alike, and the longest layer name has room: for 18 letters of 11 points in a sixth of the width.
    room = 18 * 6 / (len(shown) + 1)
    heading = 11 * min(1.0, room / max(map(len, shown)))
    for index, name in enumerate(shown, start=1):
        _raster(figure.add_subplot(below[index]), name, trains[name], color[name], heading)
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


def search(
    path: Path,
    title: str,
    settings: Mapping[str, tuple[Sequence[Any], bool]],
    accuracies: Sequence[float | None],
    states: Sequence[str],
    timesteps: Sequence[int | None],
    rates: Sequence[float | None],
    front: Sequence[bool],
    best: int,
    reference: tuple[str, float] | None = None,
) -> None:
    """Draws a search: accuracy over each setting, against the firing rate, and against the number of time steps.

    The last panel is left out where all finished trials have the same number. Trials of which nothing is known but that
    they failed are at the lower edge.

    Args:
        path: The PNG file to write; it appears whole or not at all.
        title: Heading of the picture.
        settings: For each setting that was varied its value in each trial, a number or a text, `None` where a trial has
            none; and whether its axis is logarithmic. A setting that no trial has is left out.
        accuracies: Validation accuracy of each trial; `None` where no epoch came to its end.
        states: Of each trial: "finished", "stopped" or "failed".
        timesteps: Number N of time steps of each trial.
        rates: Mean firing rate of each trial; `None` but for finished ones.
        front: Of each trial, whether none beats it in accuracy, time steps and firing rate together.
        best: Place of the best trial.
        reference: Name and accuracy of something to compare with; `None` for nothing.
    """
    settings = {
        name: (_on_axis(values), logarithmic)
        for name, (values, logarithmic) in settings.items()
        if any(value is not None for value in values)
    }
    finished = [place for place, rate in enumerate(rates) if rate is not None]
    against = [(rates, "Accuracy against firing rate", "spikes per neuron and time step")]
    several = len({timesteps[place] for place in finished}) > 1
    if several:
        against.append((timesteps, "Accuracy against time steps", "time steps N"))
        settings = {name: values for name, values in settings.items() if name != "timesteps"}  # that is its panel
    panels = len(settings) + len(against) + (len(settings) == 2)
    columns = min(3, panels) if panels != 4 else 2
    rows = -(-panels // columns)
    figure = matplotlib.figure.Figure(
        figsize=(4.3 * columns, 3.6 * rows + 0.9), layout="constrained", facecolor="white"
    )
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    places = iter(figure.add_gridspec(rows, columns))
    known = [place for place, accuracy in enumerate(accuracies) if accuracy is not None]
    found = [accuracies[place] for place in known] + ([reference[1]] if reference else [])
    low, high = min(found), max(found)
    margin = 0.06 * max(high - low, 0.02)
    bottom = low - 2 * margin

    def mark(axes: Axes, x: Sequence[Any], only: Sequence[int], ringed: bool) -> None:
        groups = (("finished", _COLORS[0], "o"), ("stopped", _COLORS[-1], "v"), ("failed", _COLORS[4], "x"))
        for state, color, marker in groups:
            chosen = [place for place in only if states[place] == state]
            y = [bottom if accuracies[place] is None else accuracies[place] for place in chosen]
            if chosen:
                axes.scatter([x[place] for place in chosen], y, s=34, color=color, marker=marker, label=state, zorder=3)
        ring = [place for place in only if ringed and front[place]]
        if ring:
            style = {"s": 120, "facecolors": "none", "edgecolors": _COLORS[1], "linewidths": 1.6, "zorder": 4}
            axes.scatter([x[p] for p in ring], [accuracies[p] for p in ring], label="none beats it", **style)
        if best in only:
            axes.scatter(
                x[best],
                accuracies[best],
                s=150,
                color=_COLORS[1],
                marker="*",
                label="best",
                zorder=5,
                edgecolors="white",
            )
        if reference is not None:
            axes.axhline(reference[1], color=_INK, linewidth=0.9, linestyle=":", label=reference[0], zorder=2)
        axes.set_ylim(bottom - margin, high + 2 * margin)

    handles: dict[str, Any] = {}
    everything = range(len(states))
    for name, (values, logarithmic) in settings.items():
        axes = figure.add_subplot(next(places))
        shown = [place for place in everything if values[place] is not None]
        mark(axes, values, shown, ringed=False)
        _scale(axes, "x", values, logarithmic)
        _panel(axes, f"Accuracy over {name}", name, "validation accuracy")
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if len(settings) == 2:
        _map(figure, figure.add_subplot(next(places)), settings, accuracies, known, best)
    for x, heading, label in against:
        axes = figure.add_subplot(next(places))
        mark(axes, x, finished, ringed=True)
        if x is timesteps:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        elif several:
            for place in (place for place in finished if front[place]):
                at = (rates[place], accuracies[place])
                style = {"textcoords": "offset points", "fontsize": 8, "color": _INK}
                axes.annotate(f"N = {timesteps[place]}", at, xytext=(8, 5), **style)
        _panel(axes, heading, label, "validation accuracy")
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=len(handles), frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, dpi=120)


def _scale(axes: Axes, which: str, values: Sequence[Any], logarithmic: bool) -> None:
    """Fits an axis to the values of a setting.

    A logarithmic axis has its numbers written out, since it may have no power of ten; one of whole numbers has no
    fractions between them.
    """
    axis = getattr(axes, f"{which}axis")
    if logarithmic:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    elif all(isinstance(value, int) for value in values if value is not None):
        axis.set_major_locator(MaxNLocator(integer=True))


def _on_axis(values: Sequence[Any]) -> list[Any]:
    """Values as an axis can have them: numbers, or else texts; `None` where there is none."""
    numbers = all(isinstance(value, (int, float)) for value in values if value is not None)
    return list(values) if numbers else [None if value is None else str(value) for value in values]


def _map(
    figure: matplotlib.figure.Figure,
    axes: Axes,
    settings: Mapping[str, tuple[Sequence[Any], bool]],
    accuracies: Sequence[float | None],
    known: Sequence[int],
    best: int,
) -> None:
    """Both settings of a search, and accuracy as color; without the trials that lack one of the settings."""
    (first, (x, x_logarithmic)), (second, (y, y_logarithmic)) = settings.items()
    known = [place for place in known if x[place] is not None and y[place] is not None]
    colored = axes.scatter(
        [x[place] for place in known],
        [y[place] for place in known],
        c=[accuracies[place] for place in known],
        cmap="viridis",
        s=60,
        zorder=3,
    )
    if best in known:
        axes.scatter(x[best], y[best], s=230, facecolors="none", edgecolors=_COLORS[1], linewidths=1.8, zorder=4)
    _scale(axes, "x", x, x_logarithmic)
    _scale(axes, "y", y, y_logarithmic)
    figure.colorbar(colored, ax=axes, label="validation accuracy")
    _panel(axes, f"{first} and {second}", first, second)


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


def _raster(axes: Axes, name: str, train: np.ndarray, color: str, heading: float, most: int = 64) -> None:
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
    _panel(axes, title, "time step", "", fontsize=heading)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(chosen) <= 10:
        axes.set_yticks(range(len(chosen)))
    else:
        axes.set_yticks([])

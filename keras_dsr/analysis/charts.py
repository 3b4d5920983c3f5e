"""Charts as SVG for a page: colours are the page's own, so that they follow its light and dark form.

Each function gives the text of one `<svg>` element, without an id that another could have too, and with a text
alternative. They are drawn 4.6 inches wide, so that their writing can be read on a phone without scaling.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

# Stand-ins that matplotlib draws in, and what the page calls the colour.
_INK, _GRID, _CARD = "#010203", "#010204", "#010205"
_SERIES = tuple(f"#0102{16 + index:02x}" for index in range(8))
_COLORS = {_INK: "var(--ink)", _GRID: "var(--grid)", _CARD: "var(--card)"} | {
    each: f"var(--c{i})" for i, each in enumerate(_SERIES, start=1)
}
_WIDTH = 4.6
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "keras_dsr",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    alt: str,
    xlabel: str,
    ylabel: str,
    *,
    marks: Mapping[str, float] | None = None,
    faint: Sequence[str] = (),
    whole: bool = False,
    height: float = 2.9,
) -> str:
    """Lines over a common axis.

    Args:
        series: Name to x and y.
        alt: What the chart shows, in words.
        xlabel: Of the axis.
        ylabel: Of the axis.
        marks: Names and places of vertical lines.
        faint: Names of series that stay in the background, without a place in the legend.
        whole: Whether x counts.
        height: In inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height)
        shown = [name for name in series if name not in faint]
        for name, (x, y) in series.items():
            if name in faint:
                axes.plot(x, y, color=_GRID, linewidth=1)
            else:
                color = _SERIES[shown.index(name) % len(_SERIES)]
                dash = ("-", "--", ":")[shown.index(name) // len(_SERIES) % 3]
                marker = "o" if len(x) == 1 else None
                axes.plot(x, y, color=color, linestyle=dash, marker=marker, label=name, linewidth=1.6)
        for name, place in (marks or {}).items():
            axes.axvline(place, color=_INK, linewidth=0.8, linestyle=":")
            axes.annotate(
                name, (place, 1), xycoords=("data", "axes fraction"), xytext=(-3, -3), textcoords="offset points",
                rotation=90, ha="right", va="top", fontsize=10,
                bbox={"facecolor": _CARD, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
        if whole:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes, xlabel, ylabel)
        if len(shown) > 1:
            _legend(figure, axes, len(shown))
        return _svg(figure, alt)


def bars(values: Mapping[str, Mapping[str, float]], alt: str, xlabel: str, *, stacked: bool = True) -> str:
    """Horizontal bars, one a row or several stacked.

    Args:
        values: Name of a row to the name and length of each of its parts.
        alt: What the chart shows, in words.
        xlabel: Of the axis.
        stacked: Whether parts stand behind one another; else below one another.
    """
    with matplotlib.rc_context(_STYLE):
        parts = list(dict.fromkeys(part for row in values.values() for part in row))
        each = 0.21 if stacked else 0.13 * len(parts) + 0.08
        figure, axes = _figure(0.9 + each * max(len(values), 3))
        places = np.arange(len(values), dtype="float64")
        start = np.zeros(len(values))
        for index, part in enumerate(parts):
            lengths = np.array([row.get(part, 0.0) for row in values.values()])
            size = 0.72 if stacked else 0.8 / len(parts)
            where = places if stacked else places + (index - (len(parts) - 1) / 2) * size
            axes.barh(where, lengths, size, left=start if stacked else 0, color=_SERIES[index], label=part)
            start = start + lengths
        axes.set_yticks(places, list(values), fontsize=10 if max(map(len, values)) < 16 else 9)
        axes.set_ylim(len(values) - 0.4, -0.6)
        _finish(axes, xlabel, "")
        axes.grid(axis="y", visible=False)
        if len(parts) > 1:
            _legend(figure, axes, len(parts))
        return _svg(figure, alt)


def points(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], alt: str, xlabel: str, ylabel: str) -> str:
    """Points joined by lines in their order: a trade-off.

    Args:
        series: Name to x and y.
        alt: What the chart shows, in words.
        xlabel: Of the axis.
        ylabel: Of the axis.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.9)
        for index, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, y, color=_SERIES[index], marker="os^D"[index % 4], markersize=4, linewidth=1.2, label=name)
        _finish(axes, xlabel, ylabel)
        if len(series) > 1:
            _legend(figure, axes, len(series))
        return _svg(figure, alt)


def raster(trains: Mapping[str, np.ndarray], alt: str, most: int = 48) -> str:
    """Spikes over time of some layers, a row a neuron; large layers are thinned out evenly.

    Args:
        trains: Name of a layer to booleans (time, neurons).
        alt: What the chart shows, in words.
        most: Neurons to show of a layer.
    """
    with matplotlib.rc_context(_STYLE):
        chosen = {name: train[:, thinned(train.shape[1], most)] for name, train in trains.items()}
        sizes = [max(train.shape[1], 8) for train in chosen.values()]
        figure = matplotlib.figure.Figure(
            figsize=(_WIDTH, 0.5 + 0.026 * sum(sizes) + 0.32 * len(sizes)), layout="constrained", facecolor="none"
        )
        grid = figure.subplots(len(chosen), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
        for index, (axes, (name, train)) in enumerate(zip(grid, chosen.items(), strict=True)):
            axes.set_facecolor("none")
            steps, neurons = np.nonzero(train)
            axes.barh(neurons, 0.86, 0.86, left=steps + 0.57, color=_SERIES[index % len(_SERIES)], linewidth=0)
            axes.set_ylim(train.shape[1] - 0.4, -0.6)
            axes.set_xlim(0.5, len(train) + 0.5)
            total = trains[name].shape[1]
            shown = f"all {total}" if total == train.shape[1] else f"{train.shape[1]} of {total:,}"
            axes.set_title(f"{name}, {shown} neurons", loc="left", fontsize=10)
            axes.set_yticks([])
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1].set_xlabel("time step")
        return _svg(figure, alt)


def _figure(height: float) -> tuple[matplotlib.figure.Figure, Axes]:
    figure = matplotlib.figure.Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="none")
    return figure, figure.add_subplot()


def _finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_facecolor("none")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: matplotlib.figure.Figure, axes: Axes, count: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 1 if longest > 24 else 2 if longest > 12 or count > 6 else 3
    figure.legend(handles, labels, loc="outside upper left", ncols=min(columns, count))


def _svg(figure: matplotlib.figure.Figure, alt: str) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for stand_in, name in _COLORS.items():
        text = text.replace(stand_in, name)
    text = text.replace("'DejaVu Sans', ", "").replace("xlink:href", "href")
    # Ids that nothing points at go; the others get a name that no other chart of the page has.
    wanted = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}-{m[1]}"' if m[1] in wanted else "", text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{own}-", text)
    size = re.search(r'viewBox="([^"]+)"', text)[1]
    start = f'<svg viewBox="{size}" role="img" aria-label="{html.escape(alt, quote=True)}" xmlns="http://www.w3.org/2000/svg">'
    return start + text[text.index(">") + 1 :].strip()


def thinned(count: int, most: int) -> np.ndarray:
    """`most` of the numbers from 0 to count - 1, evenly, both ends among them; all, if there are no more.

    Args:
        count: Of how many.
        most: How many, at the most.
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def spread(names: Sequence[Any], most: int) -> list[Any]:
    """`most` of the names, evenly, both ends among them; all, if there are no more.

    Args:
        names: In order.
        most: How many.
    """
    if len(names) <= most:
        return list(names)
    return [names[int(place)] for place in np.linspace(0, len(names) - 1, most).round()]

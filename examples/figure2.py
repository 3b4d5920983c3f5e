"""The paper's Figure 2: what an IF neuron puts out for a constant current, and how far that is from the clamp.

    python examples/figure2.py           # seconds; --smoke is the same

With alpha = 1 (Eq. 18) the neuron rounds down to multiples of V_th / N, with alpha = 0.5 (Eq. 21) to the nearest. Every
point is simulated by the layer itself, and checked against the equation. Results: a table and a figure.
"""

import argparse
from pathlib import Path

import matplotlib.figure
import numpy as np

from keras_dsr import runs
from keras_dsr.files import replacing
from keras_dsr.layers import IFSpike

THRESHOLD = 1.0


def simulated(current: np.ndarray, alpha: float, timesteps: int) -> np.ndarray:
    """The representation of the spikes that each constant current brings about."""
    stream = IFSpike(threshold=THRESHOLD, alpha=alpha, timesteps=timesteps)(current[np.newaxis])
    return np.asarray(stream.values)[0].mean(axis=0)


def equation(current: np.ndarray, alpha: float, timesteps: int) -> np.ndarray:
    """Eqs. 18 (alpha = 1) and 21 (alpha = 0.5): V_th / N times the number of spikes, 0 to N."""
    return THRESHOLD / timesteps * np.clip(np.floor(timesteps * current / THRESHOLD + 1 - alpha), 0, timesteps)


def main() -> None:
    """Simulates, checks, and writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="nothing is left out: it takes seconds anyway")
    parser.add_argument("--folder", type=Path, default=Path("runs/figure2"), help="where results go")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    # Multiples of a power of two, off the ties: sums are exact, so the equations hold to the last bit.
    current = (np.arange(-128, 640) * 2 + 1).astype("float32") / 1024
    clamp = np.clip(current, 0, THRESHOLD)
    figure = matplotlib.figure.Figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey="row")
    lines = ["| N | alpha | mean error | largest error inside the clamp |", "| --- | --- | --- | --- |"]
    for column, timesteps in enumerate((5, 10, 20)):
        for alpha, color in ((1.0, "#d9730d"), (0.5, "#0b6e99")):
            output = simulated(current, alpha, timesteps)
            np.testing.assert_allclose(output, equation(current, alpha, timesteps), atol=1e-6)
            error = output - clamp
            inside = (current >= 0) & (current <= THRESHOLD)
            lines.append(
                f"| {timesteps} | {alpha:g} | {np.abs(error)[inside].mean():.4f} | {np.abs(error)[inside].max():.4f} |"
            )
            grid[0, column].plot(current, output, color=color, label=f"alpha = {alpha:g}")
            grid[1, column].plot(current, error, color=color)
        grid[0, column].plot(current, clamp, color="#22303c", linewidth=0.8, linestyle="--", label="clamp")
        grid[0, column].set_title(f"N = {timesteps}", loc="left")
        grid[1, column].set_xlabel("current, in units of V_th")
    grid[0, 0].set_ylabel("r(output)")
    grid[1, 0].set_ylabel("r(output) - clamp")
    grid[0, 0].legend(frameon=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(folder / "figure2.png") as beside:
        figure.savefig(beside, dpi=120)
    table = "\n".join(lines) + "\n"
    runs.write(folder / "figure2.md", table)
    print(table)
    print(f"All {2 * 3 * current.size:,} points are those of Eqs. 18 and 21. Written to {folder}.")


if __name__ == "__main__":
    main()

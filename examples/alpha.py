"""The alpha of least quantization error, for IF and LIF neurons and several numbers of time steps.

    python examples/alpha.py             # seconds

For IF neurons it is 0.5 whatever N is (Eq. 21). For LIF neurons it depends on N, tau and dt; that of the paper's Table
5 (0.3 for N = 20, tau = 1, dt = 0.05) stands beside it. Result: a table.
"""

import argparse
from pathlib import Path

import numpy as np

from keras_dsr import RateCoding, WeightedRateCoding, runs
from keras_dsr.analysis import propose_alpha

TIMESTEPS = (5, 10, 15, 20)
TABLE_5 = {20: 0.3}


def main() -> None:
    """Computes, checks, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/alpha"), help="where the result goes")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    lines = [
        "| neurons | N | proposed alpha | its error | error of alpha 0.3 | of 0.5 | of 1 | the paper's alpha |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, coding in (("IF", RateCoding()), ("LIF", WeightedRateCoding(tau=1.0, dt=0.05))):
        for timesteps in TIMESTEPS:
            found = propose_alpha(timesteps, coding)
            others = [found.errors[np.argmin(np.abs(found.alphas - alpha))] for alpha in (0.3, 0.5, 1.0)]
            errors = " | ".join(f"{error:.4f}" for error in (found.error, *others))
            paper = 0.5 if name == "IF" else TABLE_5.get(timesteps, "")
            lines.append(f"| {name} | {timesteps} | {found.alpha:g} | {errors} | {paper} |")
            if name == "IF" and found.alpha != 0.5:
                raise RuntimeError(f"The alpha of IF neurons is 0.5. Found {found.alpha:g} for N = {timesteps}.")
    table = "\n".join(lines) + "\n"
    runs.write(folder / "alpha.md", table)
    print(table)
    print(f"Errors are mean absolute ones, as parts of the largest output. Written to {folder}.")


if __name__ == "__main__":
    main()

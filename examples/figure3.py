"""The paper's Figure 3: accuracy against the number of time steps (a) and against depth (b).

    python examples/figure3.py a --smoke                         # small networks on the digits, a minute
    python examples/figure3.py b --smoke
    python examples/figure3.py a --data-dir DATA --seeds 3       # the paper's settings: days on a GPU

What was stopped goes on where it was. Results: a table, a figure, and a folder for each run.
"""

import sys

from keras_dsr import experiments

PARTS = {
    "a": ("Figure 3a: fewer time steps", ("cifar10-if", "cifar10-if-n15", "cifar10-if-n10", "cifar10-if-n5")),
    "b": ("Figure 3b: deeper networks", ("cifar10-if-depth20", "cifar10-if-depth32")),
}

if __name__ == "__main__":
    if sys.argv[1:2] not in (["a"], ["b"]):
        sys.exit("Name the part of the figure: figure3.py a, or figure3.py b. Then --help tells the options.")
    title, smoke_names = PARTS[sys.argv[1]]
    sys.exit(experiments.main(f"figure3{sys.argv[1]}", title, smoke_names, sys.argv[2:]))

"""The paper's Table 2: the data sets, with IF and LIF neurons.

    python examples/table2.py --smoke                         # small networks on the digits, a minute
    python examples/table2.py --data-dir DATA --seeds 3       # the paper's settings: days on a GPU

What was stopped goes on where it was. Results: a table, a figure, and a folder for each run.
"""

import sys

from keras_dsr import experiments

# What a minute is enough for.
SMOKE = ("cifar10-if", "cifar10-lif", "dvs-cifar10-if", "dvs-cifar10-lif")

if __name__ == "__main__":
    sys.exit(experiments.main("table2", "Table 2: the data sets, with IF and LIF neurons", SMOKE))

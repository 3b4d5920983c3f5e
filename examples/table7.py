"""The paper's Table 7: weights of 8 and 4 bits.

    python examples/table7.py --smoke                         # small networks on the digits, a minute
    python examples/table7.py --data-dir DATA --seeds 3       # the paper's settings: days on a GPU

What was stopped goes on where it was. Results: a table, a figure, and a folder for each run.
"""

import sys

from keras_dsr import experiments

# What a minute is enough for.
SMOKE = ("cifar10-if", "cifar10-if-8bit", "cifar10-if-4bit")

if __name__ == "__main__":
    sys.exit(experiments.main("table7", "Table 7: weights of 8 and 4 bits", SMOKE))

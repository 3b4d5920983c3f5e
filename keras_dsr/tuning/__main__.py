"""One process of a search: `python -m keras_dsr.tuning FOLDER --worker NAME --chief HOST:PORT`.

`keras-dsr tune` starts such processes, and starts them again when they die. The name "chief" makes it the chief. Exit
status 69 says that something is wrong that all trials would meet, such as a data set that is not there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from keras_dsr.tuning import processes


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m keras_dsr.tuning", description=__doc__)
    parser.add_argument("folder", type=Path, help="the folder of the search, on a disk that all machines have")
    parser.add_argument("--worker", required=True, metavar="NAME", help="a name of its own, or chief")
    parser.add_argument("--chief", metavar="HOST:PORT", help="where KerasTuner's chief listens")
    parser.add_argument("--data-dir", type=Path, help="where the data set is (default: $KERAS_DSR_DATA)")
    parser.add_argument("--supervised", action="store_true", help="end when standard input is closed")
    options = parser.parse_args()
    if options.supervised:
        processes.end_with(sys.stdin.fileno())
    try:
        processes.serve(options.folder, options.worker, options.chief, options.data_dir)
    except (ValueError, OSError, ImportError) as error:
        print(f"{options.worker}: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(processes.FAULT)


if __name__ == "__main__":
    main()

"""The interpreter that has PyTorch and SpikingJelly: a virtual environment of its own, made on first use.

    python benchmarks/peers.py               # makes it, if it is not there, and says what is in it

The two never share a process with Keras, nor an environment with this package: neither side's requirements, threads or
memory touch the other's. `KERAS_DSR_PEER_PYTHON` names another interpreter that has both, for example one with a GPU
build of PyTorch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = ("torch==2.13.*", "spikingjelly==2.0.*", "numpy")
FOLDER = Path(__file__).resolve().parent / ".peers" / "venv"
_PYTHON = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# Written last: an environment without it was broken off on the way.
_FINISHED = FOLDER / "finished"


def found() -> Path | None:
    """The interpreter, if there is one already."""
    named = os.environ.get("KERAS_DSR_PEER_PYTHON")
    if named:
        return Path(named)
    return _PYTHON if _FINISHED.is_file() else None


def python() -> Path:
    """The interpreter; makes the environment first, if need be.

    Raises:
        RuntimeError: if it cannot be made, with what pip said.
    """
    there = found()
    if there is not None:
        return there
    print(f"making {FOLDER.parent.name}/{FOLDER.name} with {', '.join(REQUIREMENTS)}: once, some minutes", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    done = subprocess.run([_PYTHON, "-m", "pip", "install", "--quiet", *REQUIREMENTS], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"PyTorch and SpikingJelly could not be installed:\n{done.stderr[-2000:]}\nName an interpreter that has "
            "them in KERAS_DSR_PEER_PYTHON, or pass --no-peers to measure without them."
        )
    _FINISHED.write_text("")
    return _PYTHON


def versions() -> dict[str, str]:
    """The versions of what figures depend on in that interpreter, and its own."""
    script = (
        "import json, platform, sys; sys.path.insert(0, sys.argv[1]); import measure; "
        "print(json.dumps({'python': platform.python_version(), **measure.versions()}))"
    )
    command = [python(), "-c", script, str(Path(__file__).parent)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    try:
        print(python(), versions())
    except RuntimeError as error:
        sys.exit(str(error))

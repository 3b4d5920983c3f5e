"""The interpreter that has PyTorch and SpikingJelly: a virtual environment of its own, made on first use.

    python benchmarks/peers.py               # makes it, if it is not there, and says what is in it

It takes about 1.5 GB on disk, with PyTorch's build for CPUs; the build with CUDA, which pip
finds on Linux where PyTorch's own index cannot be reached, takes more.

The two never share a process with Keras, nor an environment with this package: neither side's requirements, threads or
memory touch the other's. `KERAS_DSR_PEER_PYTHON` names another interpreter that has both, for example one with a GPU
build of PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = ("torch==2.13.*", "spikingjelly==2.0.*", "numpy")
# On Linux PyPI has PyTorch with CUDA alone, gigabytes that a CPU has no use for. Builds for CPUs have a local version,
# which pip prefers. Where this index cannot be reached, pip warns and takes what it finds elsewhere.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# What of it comes from there: the other two are built against PyTorch. The rest comes without asking there.
FROM_CPU_INDEX = ("torch==2.13.*", "torchvision", "torchaudio")
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


def candidates() -> list[Path]:
    """All interpreters that may have PyTorch: the named one, that of the environment, and this one."""
    named = os.environ.get("KERAS_DSR_PEER_PYTHON")
    made = [Path(named)] if named else []
    made += [_PYTHON] if _FINISHED.is_file() else []
    return made + ([Path(sys.executable)] if importlib.util.find_spec("torch") else [])


def installs() -> list[list[str]]:
    """The arguments of pip, one call after the other."""
    plain = ["install", *REQUIREMENTS]
    if sys.platform == "darwin":
        return [plain]
    return [["install", "--extra-index-url", CPU_INDEX, *FROM_CPU_INDEX], plain]


def python() -> Path:
    """The interpreter; makes the environment first, if need be.

    Raises:
        RuntimeError: if it cannot be made, with what pip said.
    """
    there = found()
    if there is not None:
        return there
    print(f"making {FOLDER.parent.name}/{FOLDER.name} with {', '.join(REQUIREMENTS)}: once, some minutes", flush=True)
    # Interpreters that find their library beside themselves do not run as copies.
    venv.create(FOLDER, with_pip=True, clear=True, symlinks=os.name != "nt")
    for arguments in installs():
        done = subprocess.run([_PYTHON, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(
                f"PyTorch and SpikingJelly could not be installed:\n{done.stderr[-2000:]}\nName an interpreter that "
                "has them in KERAS_DSR_PEER_PYTHON, or measure without them: "
                "`.venv/bin/python benchmarks/suite.py --no-peers`."
            )
    _FINISHED.write_text("")
    return _PYTHON


def versions(interpreter: Path | None = None) -> dict[str, str]:
    """The versions of what figures depend on in an interpreter, and its own.

    Args:
        interpreter: Which; `None` for that of `python`.

    Raises:
        RuntimeError: if it cannot be asked.
    """
    script = (
        "import json, platform, sys; sys.path.insert(0, sys.argv[1]); import measure; "
        "print(json.dumps({'python': platform.python_version(), **measure.versions()}))"
    )
    return json.loads(ask(interpreter or python(), script, str(Path(__file__).parent)))


def ask(interpreter: Path, script: str, *arguments: str) -> str:
    """What a script prints on its last line in another interpreter.

    Raises:
        RuntimeError: if it cannot be started, fails, or prints nothing.
    """
    try:
        done = subprocess.run([interpreter, "-c", script, *arguments], capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{interpreter} cannot be started: {error.strerror}") from error
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{interpreter} does not answer: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    try:
        print(python(), versions())
    except RuntimeError as error:
        sys.exit(str(error))

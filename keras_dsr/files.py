"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames what was written there to `path`.

    A reader finds the old file or the new one, never a part. If the block raises, `path` is as it was and nothing is
    left beside it. The path to write to ends as `path` does, for writers that go by the suffix.

    Args:
        path: The file to make or replace. Its folder must exist.

    Yields:
        The path to write to.
    """
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)

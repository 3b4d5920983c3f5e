"""What an exported function says of its inputs and outputs, and whether arrays fit that: the same for every runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or an output.

    Args:
        shape: Its sizes, `None` where any will do; `None` altogether for any rank.
        dtype: Its dtype's name.
    """

    shape: tuple[int | None, ...] | None
    dtype: str

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits."""
        if self.shape is None:
            return True
        return len(self.shape) == len(shape) and all(
            size in (None, length) for size, length in zip(self.shape, shape, strict=True)
        )


def check_inputs(title: str, expected: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inputs as arrays that lie in memory row by row, in the machine's byte order.

    Args:
        title: What takes them, for the error.
        expected: What it takes, by name.
        tensors: What it is called with, by name.

    Raises:
        ValueError: if a name, a dtype or a shape is another, or inputs of any size have different numbers of samples.
    """
    if set(tensors) != set(expected):
        raise ValueError(f"{title} takes the inputs {sorted(expected)}. Received {sorted(tensors)}.")
    arrays = {}
    for name, tensor in expected.items():
        array = np.asarray(tensors[name], order="C")
        if array.dtype.name != tensor.dtype:
            raise ValueError(
                f"{title} takes {name!r} as {tensor.dtype}. Received {array.dtype.name}; convert it by "
                f"array.astype({tensor.dtype!r}) if its values allow that."
            )
        if not tensor.takes(array.shape):
            raise ValueError(f"{title} takes {name!r} of shape {tensor.shape}. Received shape {array.shape}.")
        arrays[name] = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    samples = {name: len(arrays[name]) for name, tensor in expected.items() if tensor.shape and tensor.shape[0] is None}
    if len(set(samples.values())) > 1:
        raise ValueError(
            f"{title} takes as many samples (the first axis) of each input. Received {samples}; a state has those of "
            "the inputs that it goes with."
        )
    return arrays

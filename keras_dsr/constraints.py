"""The constraint that keeps a firing threshold usable."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_dsr import backend


@keras.saving.register_keras_serializable(package="keras_dsr")
class LowerBound(keras.constraints.Constraint):
    """Keeps a weight at `minimum` or above: w <- max(w, minimum), after each update.

    The paper bounds thresholds from below, since a neuron whose threshold reaches zero fires at each step and
    never learns again. A weight that is no longer a finite number stops the training with an error that names its
    owner, where the backend can raise one from within a compiled step: on TensorFlow, but for XLA. Elsewhere
    `keras_dsr.callbacks.CheckFinite` does the same.

    Args:
        minimum: The lower bound, a float.
        owner: The name that an error gives the weight.

    Raises:
        tf.errors.InvalidArgumentError: on TensorFlow, if the weight is NaN or infinite.

    Reference: Meng et al., CVPR 2022, Section 4.3.
    """

    def __init__(self, minimum: float, owner: str = "weight") -> None:
        self.minimum = float(minimum)
        self.owner = owner

    def __call__(self, w: Any) -> Any:
        w = backend.check_finite(ops.convert_to_tensor(w), not_finite(self.owner))
        return ops.maximum(w, ops.cast(self.minimum, w.dtype))

    def get_config(self) -> dict[str, Any]:
        return {"minimum": self.minimum, "owner": self.owner}


def not_finite(owner: str) -> str:
    """The error message for a threshold that became NaN or infinite."""
    return (
        f"The {owner} is no longer a finite number after an update. Lower the learning rate, clip the gradients "
        "with clipnorm, or look for NaN in the data."
    )

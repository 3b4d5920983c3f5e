"""The optimizer that the paper trains with: SGD whose weight decay is part of the gradient."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_dsr import backend


@keras.saving.register_keras_serializable(package="keras_dsr")
class SGD(keras.optimizers.SGD):
    """SGD with momentum and coupled weight decay, as PyTorch has it.

    g <- g + weight_decay w for every trainable weight, thresholds, biases and normalization included; then stock SGD.
    (Under a schedule Keras multiplies the gradient by the rate as it enters the velocity, PyTorch the velocity as it is
    applied: the two agree while the rate does not change.)
    Keras's own `weight_decay` shrinks weights past the momentum (w <- w - learning_rate weight_decay w), which with a
    momentum of 0.9 is a tenth as strong; this one is what "weight decay 5e-4" means in the paper. Neurons should then
    have `threshold_l2=0`, or their thresholds decay twice.

    Args:
        learning_rate: A float or a schedule.
        momentum: In [0, 1]. The paper's is 0.9.
        nesterov: Whether the momentum is Nesterov's.
        coupled_weight_decay: The factor on w; 0 or more. The paper's is 5e-4.
        **kwargs: The other arguments of `keras.optimizers.SGD`.

    Raises:
        ValueError: if `coupled_weight_decay` is below 0 or not finite.

    Reference: Meng et al., CVPR 2022, Appendix; Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
    for the difference.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        coupled_weight_decay: float = 5e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, momentum=momentum, nesterov=nesterov, **kwargs)
        if not (math.isfinite(coupled_weight_decay) and coupled_weight_decay >= 0):
            raise ValueError(
                "coupled_weight_decay must be finite and not below 0. "
                f"Received coupled_weight_decay={coupled_weight_decay!r}."
            )
        self.coupled_weight_decay = float(coupled_weight_decay)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        # Here and not ahead of `apply`: gradients are unscaled, clipped and summed over replicas by now.
        if self.coupled_weight_decay:
            decay = ops.multiply(variable, ops.cast(self.coupled_weight_decay, variable.dtype))
            gradient = ops.add(ops.cast(gradient, variable.dtype), decay)
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            if backend.descend(variable, velocity, gradient, learning_rate, self.momentum, self.nesterov):
                return
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "coupled_weight_decay": self.coupled_weight_decay}

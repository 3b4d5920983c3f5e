"""What each Keras backend does in its own way.

- `carry(value, representation)`: the value of one tensor with the gradient of another.
- `simulate(current, threshold, ...)`: the time loop of an integrate-and-fire neuron.
- `step(current, potential, ...)`: one time step of it, whose state goes in and out.
- `batch_norm(values, ...)`: batch normalization of the simulation, which no gradient enters.
- `check_finite(value, message)`: an error from within a compiled step, where the backend has such.
- `descend(variable, velocity, ...)`: a step of SGD in one pass over memory, where the backend has such.
- `register_structure(cls)`: lets the backend look into objects of two tensors.
- `specs(function, shape, dtype)`: shapes and dtypes of what a function gives, which is not computed.
- `in_keras_step()`: whether Keras' `fit`, `evaluate` or `predict` is being traced, where the backend asks for that.
- `draw(sample, like)`: random numbers for a batch that may be spread over replicas.
- `to_numpy(value)`: what a variable holds that may be spread over devices and processes.

And `wide(dtypes)`: what sums, potentials and statistics are kept in.

Everything else in the package is written once, with `keras.ops`.
"""

from typing import Any

import keras

if keras.backend.backend() == "tensorflow":
    from keras_dsr.backend.tensorflow import (
        batch_norm,
        carry,
        check_finite,
        descend,
        draw,
        in_keras_step,
        register_structure,
        simulate,
        specs,
        step,
        to_numpy,
    )
elif keras.backend.backend() == "jax":
    from keras_dsr.backend.jax import (
        batch_norm,
        carry,
        check_finite,
        descend,
        draw,
        in_keras_step,
        register_structure,
        simulate,
        specs,
        step,
        to_numpy,
    )
else:
    raise ImportError(
        "keras_dsr runs on the Keras backends 'tensorflow' and 'jax'. "
        f"Received {keras.backend.backend()!r}; set KERAS_BACKEND before the first import of keras."
    )


def wide(*dtypes: Any) -> str:
    """The widest of some types of floats, and at least float32.

    Keras' own `result_type` narrows float64 to float32 on JAX, whether JAX has 64 bits enabled or not. So do some of
    its operations, `ops.mean` and `ops.floor` among them, and its layers that use them.

    Args:
        *dtypes: Names of types or what a tensor or variable has as its `dtype`.

    >>> wide("bfloat16"), wide("float16", "float64")
    ('float32', 'float64')
    """
    return "float64" if "float64" in map(keras.backend.standardize_dtype, dtypes) else "float32"


__all__ = [
    "batch_norm",
    "carry",
    "check_finite",
    "descend",
    "draw",
    "in_keras_step",
    "register_structure",
    "simulate",
    "specs",
    "step",
    "to_numpy",
    "wide",
]

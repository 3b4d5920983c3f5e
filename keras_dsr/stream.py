"""What travels between spiking layers: a simulation, and beside it what it stands for.

A `Stream` has two parts. `values`, (batch, time, ...), is the simulation: the spikes that neurons put out, or the
currents that synapses make of them. No gradient ever enters it. `representation`, (batch, ...), is r(values), one
number for a whole train of spikes; gradients live on it alone, so training sees an ordinary network of clamps, and
time is invisible to it.

A stream of zero time steps has only a representation: such is what layers with `timesteps=0` put out.

- tensor to stream: `keras_dsr.layers.ToStream`
- stream to tensor: `keras_dsr.layers.ToTensor` (every step) or `keras_dsr.layers.SpikeRep` (the representation)

Reference: Meng et al., CVPR 2022, Eqs. 16-17.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import keras
import optree
from keras import ops

from keras_dsr import backend

_CONVERSIONS = (
    "Wrap a stock layer that is affine, keras_dsr.layers.Synapse(layer); take the layer of this name from "
    "keras_dsr.layers (BatchNormalization, Dropout, Add); or convert the stream to a plain tensor first: "
    "keras_dsr.layers.ToTensor() for every time step, keras_dsr.layers.SpikeRep() for the representation."
)


@keras.saving.register_keras_serializable(package="keras_dsr")
@dataclasses.dataclass(frozen=True, repr=False)
class Stream:
    """The values of a simulation and their representation, as they travel between layers.

    Keras, TensorFlow and JAX look into it as into any structure of tensors, and `values, representation = stream`
    takes it apart. Layers of this package take and give it; a stock Keras layer refuses it with an error that names
    the conversions.

    Args:
        values: Spikes or currents, floats of shape (batch, time, ...). Has no gradient.
        representation: r(values), floats of shape (batch, ...). Has the gradient.
    """

    values: Any
    representation: Any

    @property
    def timesteps(self) -> int | None:
        """The number of time steps N; 0 if there is only a representation; `None` if known at run time alone."""
        return self.values.shape[1]

    def get_config(self) -> dict[str, Any]:
        """Its parts, for Keras to save a model in whose graph a stream stands as it is."""
        return {"values": self.values, "representation": self.representation}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Stream:
        """The stream that `get_config` described."""
        return cls(**{name: keras.saving.deserialize_keras_object(part) for name, part in config.items()})

    def __iter__(self) -> Iterator[Any]:
        return iter((self.values, self.representation))

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        if _called_by_stock_layer():
            raise self._misplaced()
        return 2

    def __repr__(self) -> str:
        return (
            f"<keras_dsr.Stream values={self.values!r} representation={self.representation!r}; "
            "for the layers of keras_dsr.layers, such as Synapse and Add, or to convert with its ToTensor or SpikeRep>"
        )

    def __add__(self, other: Any) -> Any:
        raise self._misplaced()

    __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __add__

    # Operations of TensorFlow and JAX ask these whether an object can become a tensor.
    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
        raise self._misplaced()

    def __jax_array__(self) -> Any:
        raise self._misplaced()

    def _misplaced(self) -> TypeError:
        return TypeError(f"A stream went where a tensor was expected. {_CONVERSIONS} Received {self!r}.")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A stream has no {name!r}: it has `values`, `representation` and `timesteps`. {_CONVERSIONS}"
        )

    def __tf_flatten__(self) -> tuple[tuple[()], tuple[Any, Any]]:
        return (), (self.values, self.representation)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[()], components: tuple[Any, Any]) -> Stream:
        return cls(*components)


def _called_by_stock_layer() -> bool:
    """Whether `Stream.__len__` was asked by a stock Keras layer that is being called with the stream.

    Keras asks for the length of a structure that a layer is called with before it builds the layer, and that is the one
    place where an error can say what to do instead, for all stock layers alike, eager or symbolic. Models and layers of
    others may take streams; should Keras stop asking, stock layers still raise Keras's own errors.
    """
    call_spec = sys._getframe(2)
    call = call_spec.f_back
    layer = call.f_locals.get("self") if call is not None else None
    return (
        isinstance(layer, keras.layers.Layer)
        and not isinstance(layer, keras.Model)
        and type(layer).__module__.partition(".")[0] == "keras"
    )


# Keras looks into structures by optree, under a name of its own.
optree.register_pytree_node(Stream, lambda s: (tuple(s), None), lambda _, parts: Stream(*parts), namespace="keras")
backend.register_structure(Stream)


def is_stream(inputs: Any) -> bool:
    """Whether a layer was called with a stream; a loaded model hands it over as a plain list or tuple of two."""
    return isinstance(inputs, (Stream, tuple, list))


def check_float(dtype: Any, owner: str) -> None:
    """Raises a TypeError unless `dtype` is a float."""
    if not keras.backend.is_float_dtype(dtype):
        raise TypeError(
            f"{owner} expects floats. Received dtype {keras.backend.standardize_dtype(dtype)}; "
            "cast the input first, for example with keras.ops.cast(x, 'float32')."
        )


def as_stream(inputs: Any, owner: str) -> Stream:
    """`inputs` as a checked `Stream`.

    Args:
        inputs: A stream, or a tuple or list of its two parts.
        owner: Who asks, for the error.

    Raises:
        ValueError: if the two parts do not fit each other.
        TypeError: if it is a tensor, or not of floats.
    """
    if not is_stream(inputs):
        raise TypeError(
            f"{owner} expects a stream. Received a tensor of shape {tuple(inputs.shape)}. Convert a (batch, time, "
            "...) tensor with keras_dsr.layers.ToStream(); for a static input use the stock Keras layer ahead of the "
            "first neuron, which makes a stream if it is given timesteps=..."
        )
    parts = tuple(inputs)
    if len(parts) != 2 or len(parts[0].shape) != len(parts[1].shape) + 1:
        raise ValueError(
            f"{owner} expects one stream: values (batch, time, ...) and representation (batch, ...). "
            f"Received shapes {[tuple(part.shape) for part in parts]}."
        )
    for part in parts:
        check_float(part.dtype, owner)
    return Stream(*parts)


def without_steps(representation: Any) -> Stream:
    """A stream of zero time steps around `representation`, which keeps its gradient."""
    return Stream(ops.stop_gradient(ops.expand_dims(representation, 1)[:, :0]), representation)


def fold(values: Any) -> Any:
    """(batch, time, ...) -> (batch * time, ...)."""
    features = tuple(values.shape[2:])
    if None in features:
        features = tuple(ops.shape(values)[2:])
    return ops.reshape(values, (-1, *features))


def unfold(folded: Any, values: Any) -> Any:
    """(batch * time, ...) -> (batch, time, ...), with batch and time as `values` has them."""
    features = tuple(folded.shape[1:])
    if None in features:
        features = tuple(ops.shape(folded)[1:])
    batch, timesteps = values.shape[:2]
    if timesteps is not None:
        return ops.reshape(folded, (-1, timesteps, *features))
    sizes = ops.shape(values)
    return ops.reshape(folded, (sizes[0] if batch is None else batch, sizes[1], *features))

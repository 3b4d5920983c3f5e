"""Synapses: affine maps from the spikes of one layer to the currents of the next."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from keras_dsr.layers.base import StreamLayer
from keras_dsr.layers.quantized import QuantizedConv2D, QuantizedDense
from keras_dsr.stream import Stream, fold, unfold, without_steps

AFFINE_LAYERS: tuple[type[keras.layers.Layer], ...] = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.SeparableConv1D,
    layers.SeparableConv2D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.Identity,
    QuantizedConv2D,
    QuantizedDense,
)

_INSTEAD = {
    layers.BatchNormalization: "keras_dsr.layers.BatchNormalization, which pools batch and time",
    layers.Dropout: "keras_dsr.layers.Dropout, which keeps one mask for all time steps",
    layers.MaxPooling1D: "keras.layers.AveragePooling1D",
    layers.MaxPooling2D: "keras.layers.AveragePooling2D",
    layers.MaxPooling3D: "keras.layers.AveragePooling3D",
    layers.GlobalMaxPooling1D: "keras.layers.GlobalAveragePooling1D",
    layers.GlobalMaxPooling2D: "keras.layers.GlobalAveragePooling2D",
    layers.GlobalMaxPooling3D: "keras.layers.GlobalAveragePooling3D",
    layers.Activation: "a neuron, keras_dsr.layers.IFSpike or LIFSpike",
    layers.ReLU: "a neuron, keras_dsr.layers.IFSpike or LIFSpike",
}


def _check_affine(layer: keras.layers.Layer, vouched: bool) -> None:
    if isinstance(layer, keras.Sequential):
        for part in layer.layers:
            _check_affine(part, vouched)
        return
    kind = type(layer)
    instead = next((text for base, text in _INSTEAD.items() if isinstance(layer, base)), None)
    if instead or (not vouched and kind not in AFFINE_LAYERS):
        hint = f"Use {instead}." if instead else "If it is affine all the same, pass affine=True."
        raise ValueError(
            "A synapse wraps an affine layer, since its representation must be the layer of the representation "
            f"(Eq. 17). Received {kind.__name__} {layer.name!r}. {hint}"
        )
    activation = getattr(layer, "activation", None)
    if activation is not None and activation is not keras.activations.linear:
        raise ValueError(
            f"A synapse wraps an affine layer, without activation. Received {kind.__name__} {layer.name!r} with "
            f"activation={keras.activations.serialize(activation)!r}; leave it out and put a neuron after the synapse."
        )
    if getattr(layer, "activity_regularizer", None) is not None:
        raise ValueError(
            f"A synapse cannot honour an activity regularizer. Received {kind.__name__} {layer.name!r} with one; "
            "leave it out."
        )


def _unbuilt(config: Any) -> Any:
    """A layer's config without the shapes it was built for: the synapse builds it, under its own name."""
    if isinstance(config, dict):
        return {k: _unbuilt(v) for k, v in config.items() if k not in ("build_config", "build_input_shape")}
    if isinstance(config, (list, tuple)):
        return type(config)(_unbuilt(each) for each in config)
    return config


@keras.saving.register_keras_serializable(package="keras_dsr")
class Synapse(StreamLayer):
    """Applies an affine Keras layer at every time step.

    Forward: I[n] = layer(x[n]) for every step, with batch and time folded into one axis; the representation is
    layer(r), which is r(I), as r is a weighted mean and the layer is affine (Eq. 17).

    Backward: the layer's own, on the representation alone: one pass, however many time steps there are.

    Args:
        layer: An affine Keras layer without activation: Dense, EinsumDense, convolutions (transposed, separable,
            depthwise too), average pooling, padding, cropping, upsampling, Flatten, Reshape, Permute; or a
            `keras.Sequential` of such. It sees one time step: its input is (batch, ...), without a time axis.
        affine: Whether you vouch that a layer which is not among these, such as one of your own, is affine
            (f(a x + b y) = a f(x) + b f(y) for a + b = 1).
        **kwargs: `name`, `dtype` and `trainable`, as every Keras layer has them.

    Input shape:
        A `Stream` with values (batch, time, ...) and representation (batch, ...).

    Output shape:
        A `Stream` of as many steps, with the features that the layer makes.

    Raises:
        ValueError: if the layer is not affine.
        TypeError: if the input is a tensor and not a stream.

    Example:

    >>> import keras
    >>> image = keras.Input((8, 8, 1))
    >>> stream = IFSpike(timesteps=4)(image)
    >>> currents = Synapse(keras.layers.Conv2D(16, 3, padding="same"))(stream)
    >>> currents.values.shape, currents.representation.shape
    ((None, 4, 8, 8, 16), (None, 8, 8, 16))

    Reference: Meng et al., CVPR 2022, Eq. 17.
    """

    def __init__(self, layer: keras.layers.Layer, affine: bool = False, **kwargs: Any) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(f"A synapse wraps a Keras layer. Received {layer!r}.")
        _check_affine(layer, vouched=affine)
        kwargs.setdefault("name", f"{layer.name}_synapse" if not layer.name.endswith("_synapse") else None)
        super().__init__(**kwargs)
        self.layer = layer
        self.affine = bool(affine)

    def build(self, input_shape: Any) -> None:
        if not self.layer.built:
            self.layer.build(tuple(input_shape[1]))

    def call(self, inputs: Any) -> Stream:
        values, representation = self._stream(inputs)
        mapped = self.infer_representation(representation)
        if values.shape[1] == 0:
            return without_steps(mapped)
        # The output, too, is cut off: else the kernel would get a gradient from every time step.
        return Stream(ops.stop_gradient(self.infer_values(ops.stop_gradient(values))), mapped)

    def infer_values(self, values: Any) -> Any:
        return unfold(self.layer(fold(values)), values)

    def infer_representation(self, representation: Any) -> Any:
        return self.layer(representation)

    def compute_output_spec(self, inputs: Any, **kwargs: Any) -> Stream:
        values, representation = self._stream(inputs)
        shape = tuple(self.layer.compute_output_shape(tuple(representation.shape)))
        return self._symbolic((shape[0], values.shape[1], *shape[1:]), shape)

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = tuple(self.layer.compute_output_shape(tuple(input_shape[1])))
        return (shape[0], input_shape[0][1], *shape[1:]), shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "layer": _unbuilt(keras.saving.serialize_keras_object(self.layer)),
            "affine": self.affine,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Synapse:
        config = dict(config)
        layer = keras.saving.deserialize_keras_object(config.pop("layer"))
        return cls(layer, **config)

"""Walking a functional model with something else in place of its layers."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_dsr import graph


def doubled() -> keras.Model:
    inputs = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Identity(name="within")], name="part")
    x = inner(keras.layers.Identity(name="first")(inputs))
    return keras.Model(inputs, keras.layers.Add(name="sum")([x, x]))


def test_layers_in_their_own_place_give_the_model():
    model = doubled()
    x = np.array([[1.0, 2.0, 3.0]], "float32")
    assert np.array_equal(np.asarray(graph.walk(model, x, lambda name, layer: layer)), 2 * x)


def test_layers_are_called_in_inference():
    """Those of image augmentation train unless they are told; so do layers that have such within."""

    class Mine(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.RandomTranslation(0.5, 0.5)

        def call(self, inputs):
            return self.inner(inputs)

    image = keras.Input((4, 4, 1))
    moved = Mine()(keras.layers.RandomTranslation(0.5, 0.5)(image))
    model = keras.Model(image, keras.layers.Dropout(0.5)(moved, training=True))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype("float32")
    assert np.array_equal(np.asarray(graph.walk(model, x, lambda name, layer: layer)), x)
    assert np.array_equal(np.asarray(model(x, training=False)), x)


def test_calls_are_in_order_with_what_layers_are_called_with():
    found = graph.calls(doubled())
    assert [name for name, *_ in found] == ["first", "part_within", "sum"]
    assert [layer.name for _, layer, _ in found] == ["first", "within", "sum"]
    inputs = [inputs for *_, inputs in found]
    assert inputs[0].shape == (None, 3)
    assert len(inputs[2]) == 2


def test_names_of_layers_within_sub_models_start_with_the_sub_models():
    names = []

    def replace(name, layer):
        names.append(name)
        return layer

    graph.walk(doubled(), np.zeros((1, 3), "float32"), replace)
    assert names == ["first", "part_within", "sum"]


def test_what_stands_for_tensors_need_not_be_tensors():
    def replace(name, layer):
        return lambda inputs, **_: " + ".join(inputs) if isinstance(inputs, list) else f"{name}({inputs})"

    assert graph.walk(doubled(), ["x"], replace) == "part_within(first(x)) + part_within(first(x))"


def test_a_model_without_a_graph_is_refused():
    class Mine(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match=r"'mine' is not a functional model.*keras\.Model\(inputs, outputs\)"):
        graph.walk(Mine(name="mine"), np.zeros((1, 3)), lambda name, layer: layer)


def test_a_sequential_model_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="that is built"):
        graph.walk(keras.Sequential([keras.layers.Dense(2)]), np.zeros((1, 3)), lambda name, layer: layer)


def test_keras_has_what_the_walk_is_made_of():
    """If this fails, Keras changed its private graph runner: rewrite `walk` for the new one, beside `clone_model`."""
    assert callable(doubled()._run_through_graph)
    assert callable(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])._functional._run_through_graph)

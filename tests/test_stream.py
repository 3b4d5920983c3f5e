"""Streams as they travel: into stock layers, which refuse them, into ours, and through compiled functions."""

from __future__ import annotations

import dataclasses

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy
from keras import ops

from keras_dsr import Stream, layers
from keras_dsr.stream import as_stream, fold, unfold, without_steps

CONVERSION = r"keras_dsr\.layers\.Synapse\(layer\).*ToTensor\(\).*SpikeRep\(\)"


def stream(symbolic=False, batch=2, steps=3, features=(4, 4, 2)):
    if symbolic:
        return layers.ToStream()(keras.Input((steps, *features)))
    values = helpers.dyadics((batch, steps, *features), -1, 1)
    return Stream(ops.convert_to_tensor(values), ops.convert_to_tensor(values.mean(axis=1)))


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: keras.layers.Conv2D(2, 3),
        lambda: keras.layers.Dense(2),
        lambda: keras.layers.Activation("relu"),
        lambda: keras.layers.BatchNormalization(),
        lambda: keras.layers.Flatten(),
        lambda: keras.layers.Dropout(0.5),
        lambda: keras.layers.Add(),
    ],
    ids=["Conv2D", "Dense", "Activation", "BatchNormalization", "Flatten", "Dropout", "Add"],
)
def test_stock_layers_refuse_a_stream(layer, symbolic):
    with pytest.raises(TypeError, match=rf"A stream went where a tensor was expected.*{CONVERSION}"):
        layer()(stream(symbolic))


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
def test_stock_operations_refuse_a_stream(symbolic):
    with pytest.raises((AttributeError, TypeError), match=CONVERSION):
        keras.ops.relu(stream(symbolic))


@pytest.mark.parametrize("name", ["shape", "dtype", "ndim"])
def test_a_stream_has_no_attributes_of_a_tensor(name):
    with pytest.raises(AttributeError, match=rf"A stream has no '{name}'.*{CONVERSION}"):
        getattr(stream(), name)


TAKERS = {
    "Synapse": lambda: layers.Synapse(keras.layers.Dense(2)),
    "BatchNormalization": layers.BatchNormalization,
    "Dropout": lambda: layers.Dropout(0.5),
    "ToTensor": layers.ToTensor,
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("taker", TAKERS)
def test_our_layers_refuse_a_tensor(taker, symbolic):
    tensor = keras.Input((3, 4)) if symbolic else ops.zeros((2, 3, 4))
    message = rf"{taker} '.*' expects a stream. Received a tensor of shape \(.*3, 4\).*keras_dsr\.layers\.ToStream\(\)"
    with pytest.raises(TypeError, match=message):
        TAKERS[taker]()(tensor)


def test_add_refuses_tensors():
    with pytest.raises(TypeError, match=r"Add '.*' expects a stream. Received a tensor of shape.*ToStream\(\)"):
        layers.Add()([ops.zeros((2, 3, 4)), ops.zeros((2, 3, 4))])


@pytest.mark.parametrize("taker", [*TAKERS, "IFSpike", "SpikeRep"])
@pytest.mark.parametrize(
    ("values", "representation"),
    [((2, 3, 4), (2,)), ((2, 3, 4), (2, 3, 4)), ((2, 3), (2, 3, 4))],
    ids=["too_few", "the_same", "swapped"],
)
def test_parts_that_do_not_fit(taker, values, representation):
    layer = {**TAKERS, "IFSpike": layers.IFSpike, "SpikeRep": layers.SpikeRep}[taker]()
    with pytest.raises(ValueError, match=r"expects one stream: values \(batch, time, \.\.\.\) and representation"):
        layer(Stream(ops.zeros(values), ops.zeros(representation)))


@pytest.mark.parametrize("taker", [*TAKERS, "IFSpike", "SpikeRep"])
def test_integer_parts(taker):
    layer = {**TAKERS, "IFSpike": layers.IFSpike, "SpikeRep": layers.SpikeRep}[taker]()
    with pytest.raises(TypeError, match=r"expects floats\. Received dtype int32; cast the input first"):
        layer(Stream(ops.zeros((2, 3, 4), "int32"), ops.zeros((2, 4), "int32")))


def test_taking_apart():
    one = stream()
    values, representation = one
    assert values is one.values
    assert representation is one.representation
    assert one.timesteps == 3
    assert bool(one)


def test_a_stream_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        stream().values = None


def test_keras_tree_looks_into_a_stream():
    one = stream()
    flat = keras.tree.flatten(one)
    assert flat[0] is one.values
    assert flat[1] is one.representation
    doubled = keras.tree.map_structure(lambda x: 2 * x, one)
    assert isinstance(doubled, Stream)
    np.testing.assert_array_equal(numpy(doubled.values), 2 * numpy(one.values))
    assert isinstance(keras.tree.pack_sequence_as(one, flat), Stream)


@pytest.mark.parametrize("jit", [False, True], ids=["plain", "jit"])
def test_through_a_compiled_function(jit):
    def double(one):
        assert isinstance(one, Stream)
        return Stream(2 * one.values, 3 * one.representation)

    one = stream()
    if helpers.BACKEND == "tensorflow":
        import tensorflow as tf

        out = tf.function(double, jit_compile=jit)(one)
    else:
        import jax

        out = (jax.jit(double) if jit else double)(one)
    assert isinstance(out, Stream)
    np.testing.assert_array_equal(numpy(out.values), 2 * numpy(one.values))
    np.testing.assert_array_equal(numpy(out.representation), 3 * numpy(one.representation))


@pytest.mark.skipif(helpers.BACKEND != "jax", reason="JAX transformations")
def test_through_jax_transformations():
    import jax

    one = stream()
    gradient = jax.grad(lambda s: (s.representation**2).sum())(one)
    np.testing.assert_array_equal(numpy(gradient.representation), 2 * numpy(one.representation))
    np.testing.assert_array_equal(numpy(gradient.values), np.zeros(one.values.shape))
    mapped = jax.vmap(lambda s: Stream(s.values + 1, s.representation))(one)
    np.testing.assert_array_equal(numpy(mapped.values), numpy(one.values) + 1)


def test_a_tuple_or_list_is_as_good():
    values, representation = stream(features=(4,))
    layer = layers.IFSpike(threshold=0.5)
    expected = numpy(layer(Stream(values, representation)).values)
    for pair in ((values, representation), [values, representation]):
        np.testing.assert_array_equal(numpy(layer(pair).values), expected)


def test_as_keyword_argument():
    one = stream(features=(4,))
    layer = layers.SpikeRep()
    np.testing.assert_array_equal(numpy(layer(inputs=one)), numpy(one.representation))


@pytest.mark.parametrize("features", [(), (5,), (4, 3, 2)])
def test_fold_and_unfold(features):
    values = helpers.dyadics((2, 3, *features), -1, 1)
    folded = numpy(fold(ops.convert_to_tensor(values)))
    np.testing.assert_array_equal(folded, values.reshape(6, *features))
    np.testing.assert_array_equal(numpy(unfold(ops.convert_to_tensor(folded), values)), values)


@pytest.mark.tensorflow_only
def test_fold_and_unfold_of_unknown_sizes():
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 2), tf.float32)])
    def there_and_back(values):
        return unfold(2 * fold(values), values)

    for shape in ((2, 3, 4, 2), (1, 1, 5, 2)):
        values = helpers.dyadics(shape, -1, 1)
        np.testing.assert_array_equal(there_and_back(tf.constant(values)), 2 * values)


def test_without_steps_keeps_the_gradient():
    def function(x):
        one = without_steps(x * 2)
        return ops.sum(one.representation) + ops.sum(one.values), one

    _, one, (gradient,) = helpers.value_and_grads(function, np.ones((2, 3), "float32"))
    assert one.values.shape == (2, 0, 3)
    np.testing.assert_array_equal(gradient, np.full((2, 3), 2.0))


def test_as_stream_names_its_owner():
    with pytest.raises(TypeError, match=r"^somebody expects a stream"):
        as_stream(np.zeros((2, 3)), "somebody")


@keras.saving.register_keras_serializable("test")
class ResidualBlock(keras.layers.Layer):
    """Someone's own layer that takes a stream and gives one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.synapse = layers.Synapse(keras.layers.Dense(3))
        self.neuron = layers.IFSpike(threshold=0.5)
        self.add = layers.Add()

    def build(self, input_shape):
        self.synapse.build(((None, 3, 3), (None, 3)))
        self.neuron.build(None)

    def call(self, stream):
        return self.add([self.neuron(self.synapse(stream)), stream])


class SubclassedModel(keras.Model):
    def __init__(self):
        super().__init__()
        self.parts = [layers.IFSpike(threshold=0.5, timesteps=3), ResidualBlock(), layers.SpikeRep()]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def functional_of_own_layers():
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.SpikeRep()(ResidualBlock()(layers.IFSpike(threshold=0.5, timesteps=3)(inputs))))


def nested_sequential():
    inner = keras.Sequential([layers.Synapse(keras.layers.Dense(3)), layers.IFSpike(threshold=0.5)])
    return keras.Sequential([keras.Input((3,)), layers.IFSpike(threshold=0.5, timesteps=3), inner, layers.SpikeRep()])


@pytest.mark.parametrize("make", [functional_of_own_layers, nested_sequential, SubclassedModel])
def test_layers_and_models_of_others_take_and_give_streams(make, tmp_path):
    model = make()
    x = np.random.default_rng(0).random((4, 3)).astype("float32")
    model.compile("sgd", "mse")
    before = model.predict(x, verbose=0)
    model.fit(x, np.zeros((4, 3)), verbose=0)
    after = model.predict(x, verbose=0)
    assert not np.array_equal(before, after)
    if make is not SubclassedModel:
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), after)


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("layer", [keras.layers.Add, keras.layers.Concatenate])
def test_stock_merge_layers_name_the_way(layer, symbolic):
    with pytest.raises(ValueError, match=r"for the layers of keras_dsr\.layers, such as Synapse and Add"):
        layer()([stream(symbolic), stream(symbolic)])


def test_arithmetic_on_a_stream_is_refused():
    with pytest.raises(TypeError, match="A stream went where a tensor was expected"):
        stream() + 1.0
    with pytest.raises(TypeError, match="A stream went where a tensor was expected"):
        2.0 * stream()


def test_a_stream_has_two_parts():
    assert len(stream()) == 2
    assert len(list(stream())) == 2


def test_streams_and_tensors_may_be_passed_by_keyword():
    synapse = layers.Synapse(keras.layers.Dense(2))
    with pytest.raises(TypeError, match="expects a stream"):
        synapse(inputs=np.ones((2, 3, 4), "float32"))
    assert isinstance(synapse(inputs=layers.IFSpike(timesteps=3)(np.ones((2, 4), "float32"))), Stream)

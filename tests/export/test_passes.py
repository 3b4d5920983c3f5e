"""What is done to ONNX graphs: the same numbers before and after, in fewer nodes."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
tf = pytest.importorskip("tensorflow")
passes = pytest.importorskip("keras_dsr.export.passes")

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def node(kind, inputs, outputs, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def model_of(nodes, outputs, **constants):
    """A model of an input x (batch, 3, 4, 5)."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [info("x", onnx.TensorProto.FLOAT, ["batch", 3, 4, 5])],
        [info(name, onnx.TensorProto.FLOAT, [None] * 4) for name in outputs.split()],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def run(model, batch=2, x=None):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(0).normal(size=(batch, 3, 4, 5)).astype("float32") if x is None else x
    return session.run(None, {session.get_inputs()[0].name: x})


def kinds(model):
    return [each.op_type for each in model.graph.node]


# Graphs from x to y, and what is left of them.
GRAPHS = {
    "a_pair_cancels": (
        [node("Transpose", "x", "a", perm=LAST), node("Transpose", "a", "b", perm=FIRST), node("Neg", "b", "y")],
        "Neg",
    ),
    "two_become_one": (
        [node("Transpose", "x", "a", perm=LAST), node("Transpose", "a", "b", perm=LAST), node("Neg", "b", "y")],
        "Transpose Neg",
    ),
    "one_after_another": (
        [
            node("Transpose", "x", "a", perm=LAST),
            node("Transpose", "a", "b", perm=FIRST),
            node("Transpose", "b", "c", perm=LAST),
            node("Relu", "c", "d"),
            node("Transpose", "d", "e", perm=FIRST),
            node("Add", "e b", "y"),
        ],
        "Relu Add",
    ),
    "element_by_element": (
        [
            node("Transpose", "x", "a", perm=LAST),
            node("GreaterOrEqual", "a half", "over"),
            node("Cast", "over", "fired", to=onnx.TensorProto.FLOAT),
            node("Mul", "half fired", "reset"),
            node("Transpose", "reset", "b", perm=FIRST),
            node("Sub", "x b", "y"),
        ],
        "GreaterOrEqual Cast Mul Sub",
    ),
    "of_two": (
        [
            node("Transpose", "x", "a", perm=LAST),
            node("Relu", "a", "b"),
            node("Add", "a b", "c"),
            node("Transpose", "c", "d", perm=FIRST),
            node("Neg", "d", "y"),
        ],
        "Relu Add Neg",
    ),
    "steps": (
        [
            node("Transpose", "x", "a", perm=LAST),
            node("Split", "a", "b c", axis=1, num_outputs=2),
            node("Concat", "c b", "d", axis=3),
            node("Transpose", "d", "e", perm=FIRST),
            node("Neg", "e", "y"),
        ],
        "Split Concat Neg",
    ),
    "constants_for_each_channel": (
        [
            node("Transpose", "x", "a", perm=LAST),
            node("Mul", "a channels", "b"),
            node("Sub", "rows b", "c"),
            node("Transpose", "c", "d", perm=FIRST),
            node("Neg", "d", "y"),
        ],
        "Mul Sub Neg",
    ),
    "another_layout_stays": (
        [node("Transpose", "x", "a", perm=[0, 1, 3, 2]), node("Neg", "a", "b"), node("Neg", "b", "y")],
        "Transpose Neg Neg",
    ),
    "an_output_stays": ([node("Transpose", "x", "a", perm=LAST), node("Relu", "a", "y")], "Transpose Relu"),
}
CONSTANTS = {
    "half": np.float32(0.5),
    "channels": np.arange(3, dtype="float32"),
    "rows": np.arange(4, dtype="float32").reshape(4, 1, 1),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_sinking_transposes_changes_no_number(name):
    nodes, left = GRAPHS[name]
    model = model_of(nodes, "y", **CONSTANTS)
    expected = run(model)
    passes.sink_transposes(model)
    assert sorted(kinds(model)) == sorted(left.split())
    for received, value in zip(run(model), expected, strict=True):
        np.testing.assert_array_equal(received, value)


def test_what_only_the_spikes_need_is_set_aside():
    nodes = [
        node("Relu", "x", "inner"),
        node("Transpose", "inner", "spikes/a", perm=LAST),
        node("Mul", "inner half", "spikes/b"),
        node("Neg", "spikes/b", "y"),
    ]
    model = model_of(nodes, "y spikes/a spikes/b", half=np.float32(0.5), unused=np.float32(1))
    y, a, b = run(model)
    passes.set_aside(model, ["a", "b"])
    assert kinds(model) == ["Relu", "Mul", "Neg"]
    assert [each.name for each in model.graph.output] == ["y"]
    assert [each.name for each in model.graph.initializer] == ["half"]
    assert passes.metadata_of(model)["keras_dsr.neurons"] == '["a", "b"]'
    np.testing.assert_array_equal(run(model)[0], y)
    for received, expected in zip(run(passes.with_spikes(model)), (y, a, b), strict=True):
        np.testing.assert_array_equal(received, expected)
    assert len(model.graph.node) == 3, "with_spikes gives a copy"


def test_a_model_of_anyone_has_no_spikes():
    with pytest.raises(ValueError, match=r"keras_dsr.trace.*not written by keras_dsr.export"):
        passes.with_spikes(model_of([node("Relu", "x", "y")], "y"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("static", [False, True])
def test_a_loop_over_neurons_becomes_a_scan(static, dtype):
    """Potentials are float32, whatever currents and spikes are."""
    tf2onnx = pytest.importorskip("tf2onnx")

    def neurons(x):
        start = tf.zeros_like(x[0])
        x = tf.cast(x, dtype)
        steps = 5 if static else tf.shape(x)[0]
        currents = tf.TensorArray(dtype, steps, element_shape=start.shape)
        currents = currents.unstack(tf.broadcast_to(x[:1], [5, *x.shape[1:]]) if static else x)
        outputs = tf.TensorArray(dtype, steps, element_shape=start.shape)

        def body(n, potential, outputs):
            potential = potential + tf.cast(currents.read(n), tf.float32)
            fired = tf.cast(potential >= 0.5, tf.float32)
            return n + 1, potential - fired, outputs.write(n, tf.cast(fired, dtype))

        loop = (tf.constant(0), start, outputs)
        return tf.while_loop(lambda n, *_: n < steps, body, loop, parallel_iterations=1, name=passes.LOOP)[2].stack()

    spec = tf.TensorSpec([1 if static else None, 2, 3], tf.float32, name="x")
    model, _ = tf2onnx.convert.from_function(tf.function(neurons, autograph=False), [spec], opset=18)
    assert "Loop" in kinds(model)
    x = np.random.default_rng(0).normal(size=(1 if static else 7, 2, 3)).astype("float32")
    (expected,) = run(model, x=x)
    passes.scan_neurons(model)
    assert "Loop" not in kinds(model)
    assert kinds(model).count("Scan") == 1
    np.testing.assert_array_equal(run(model, x=x)[0], expected)
    np.testing.assert_array_equal(expected, neurons(tf.constant(x)))

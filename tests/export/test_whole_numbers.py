"""Convolutions of whole numbers in ONNX graphs: the same numbers before and after, and what is left as it is."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow_only
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
whole_numbers = pytest.importorskip("keras_dsr.export.whole_numbers")

FLOAT = 1


def node(kind, inputs, outputs, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def model_of(nodes, outputs, constants):
    """A model of an input x (batch, 3, 6, 6)."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [info("x", FLOAT, ["batch", 3, 6, 6])],
        [info(name, FLOAT, [None] * 4) for name in outputs.split()],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)


def run(model, batch=4):
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = np.random.default_rng(0).normal(size=(batch, 3, 6, 6)).astype("float32")
    return session.run(None, {"x": x})


def network(**changes):
    """Spikes, a convolution and what makes 8 bits of it, as the converter writes them; or with changes."""
    weights = np.random.default_rng(1).integers(-127, 128, (2, 3, 3, 3)).astype("float32") / 16
    constants = {
        "level": np.float32(0.5),
        "worth": np.float32(16),
        "weights": weights,
        "bias": np.array([3.0, -50.0], "float32"),
        "least": np.float32(np.finfo("float32").min),
        # Halves too, sums beyond 8 bits, and a scale of which products are rounded.
        "scale": np.array([0.5, 0.7310], "float32").reshape(1, 2, 1, 1),
        "most": np.float32(127),
        "low": np.float32(-128),
        **changes.get("constants", {}),
    }
    nodes = [
        node("GreaterOrEqual", "x level", "fired"),
        node("Cast", "fired", "float", to=FLOAT),
        node("Mul", "worth float", "spikes"),
        *changes.get("between", [node("Identity", "spikes", "moved")]),
        node("Conv", "moved weights bias", "sums"),
        node("Max", "sums least", "a"),
        node("Mul", "a scale", "b"),
        node("Min", "b most", "c"),
        node("Max", "c low", "d"),
        node("Round", "d", "y"),
        *changes.get("behind", []),
    ]
    return model_of(nodes, changes.get("outputs", "y"), constants)


def kinds(model):
    return [each.op_type for each in model.graph.node]


def compared(model, number):
    """Runs a model, rewrites it, and runs it again."""
    before = run(model)
    assert whole_numbers.compute_in_integers(model) == number
    assert kinds(model).count("QLinearConv") == number
    for received, expected in zip(run(model), before, strict=True):
        np.testing.assert_array_equal(received, expected)
    return before


def test_a_convolution_of_spikes_gives_the_same_halves_and_limits_included():
    (y,) = compared(network(), 1)
    assert y.min() == -128
    assert y.max() == 127
    scaled = y[:, 0][np.abs(y[:, 0]) < 127]
    assert len(np.unique(scaled)) > 20


PAD = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "nothing": np.float32(0), "one": np.float32(1)}
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
SAME = {
    "padded": {"between": [node("Pad", "spikes pads nothing", "moved")], "constants": PAD},
    "turned": {"between": [node("Transpose", "spikes", "moved", perm=[0, 1, 3, 2])]},
    "joined": {"between": [node("Concat", "spikes spikes", "moved", axis=0)]},
    "pooled": {"between": [node("AveragePool", "spikes", "moved", **POOL)]},
    "used twice": {"behind": [node("Mul", "spikes worth", "z")], "outputs": "y z"},
}


@pytest.mark.parametrize("name", SAME)
def test_spikes_that_only_moved(name):
    changes = dict(SAME[name])
    if name == "pooled":  # in quarters
        weights = np.random.default_rng(1).integers(-31, 32, (2, 3, 3, 3)).astype("float32") / 4
        changes["constants"] = {"weights": weights}
    compared(network(**changes), 1)


WHOLE = np.random.default_rng(2).integers(-9, 10, (2, 3, 3, 3)).astype("float32")
BIG = np.full((2, 3, 3, 3), 8.0, "float32")  # 128 in units
LEFT = {
    "currents": {"between": [node("Mul", "spikes x", "moved")]},
    "sums with another user": {"behind": [node("Neg", "sums", "z")], "outputs": "y z"},
    "sums that are an output": {"outputs": "y sums"},
    "weights of 9 bits": {"constants": {"weights": BIG}},
    "weights that are not whole": {"constants": {"weights": BIG / 7}},
    "a bias that is not whole": {"constants": {"bias": np.array([0.5, 0.0], "float32")}},
    "a negative scale": {"constants": {"scale": np.full((1, 2, 1, 1), -0.5, "float32")}},
    "a scale by columns": {
        "constants": {
            "weights": np.ones((4, 3, 3, 3), "float32"),
            "bias": np.zeros(4, "float32"),
            "scale": np.full((1, 1, 1, 4), 0.5, "float32"),
        }
    },
    "other limits": {"constants": {"most": np.float32(100)}},
    "padding with ones": {"between": [node("Pad", "spikes pads one", "moved")], "constants": PAD},
    "padding of named axes": {
        "between": [node("Pad", "spikes two nothing axes", "moved")],
        "constants": {**PAD, "two": np.array([1, 1]), "axes": np.array([2])},
    },
    "spikes of two worths": {
        "between": [node("Mul", "spikes worth", "more"), node("Concat", "spikes more", "moved", axis=0)]
    },
    "a pool of nine": {
        "between": [node("AveragePool", "spikes", "moved", kernel_shape=[3, 3])],
        "constants": {"worth": np.float32(9), "weights": WHOLE},
    },
    "a padded pool": {
        "between": [node("AveragePool", "spikes", "moved", **POOL, pads=[1, 1, 1, 1])],
        "constants": {"weights": WHOLE / 4},
    },
    "a pool that rounds up": {
        "between": [node("AveragePool", "spikes", "moved", kernel_shape=[4, 4], strides=[1, 1], ceil_mode=1)],
        "constants": {"weights": WHOLE},
    },
    "a worth whose inverse is rounded": {
        "between": [node("AveragePool", "spikes", "moved", **POOL)],
        "constants": {"worth": np.float32(164), "weights": WHOLE},
    },
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_as_it_is(name):
    compared(network(**LEFT[name]), 0)


def test_steps_are_split_as_bytes_and_spikes_that_go_past_are_multiplied_once():
    """Two steps: spikes joined, convolved, made 8 bits of; added to spikes that are made 8 bits of; split again."""
    weights = np.random.default_rng(1).integers(-127, 128, (3, 3, 3, 3)).astype("float32") / 16
    constants = {
        "level": np.float32(0.5),
        "other": np.float32(-0.2),
        "worth": np.float32(16),
        "weights": weights,
        "bias": np.zeros(3, "float32"),
        "least": np.float32(np.finfo("float32").min),
        "most": np.float32(127),
        "low": np.float32(-128),
        "scale": np.full((1, 3, 1, 1), 0.01, "float32"),
        "past": np.array([0.3, -0.9, 100.0], "float32").reshape(1, 3, 1, 1),
    }
    nodes = []
    for step, level in enumerate(("level", "other")):
        nodes += [
            node("GreaterOrEqual", f"x {level}", f"fired{step}"),
            node("Cast", f"fired{step}", f"float{step}", to=FLOAT),
            node("Mul", f"float{step} worth", f"spikes{step}"),
        ]
    nodes += [
        node("Concat", "spikes0 spikes1", "joined", axis=0),
        node("Conv", "joined weights bias", "sums", pads=[1, 1, 1, 1]),
    ]
    for source, scale, last in (("sums", "scale", "current"), ("joined", "past", "passed")):
        nodes += [
            node("Max", f"{source} least", f"{last}a"),
            node("Mul", f"{last}a {scale}", f"{last}b"),
            node("Min", f"{last}b most", f"{last}c"),
            node("Max", f"{last}c low", f"{last}d"),
            node("Round", f"{last}d", last),
        ]
    nodes += [node("Add", "current passed", "total"), node("Split", "total", "p q", axis=0, num_outputs=2)]
    nodes += [node("Neg", "p", "y"), node("Neg", "q", "z")]
    model = model_of(nodes, "y z", constants)
    before = compared(model, 1)
    assert any((part < -127).any() for part in before), "spikes past the convolution are clipped"
    made = {output: each.op_type for each in model.graph.node for output in each.output}
    assert [made[each.input[0]] for each in model.graph.node if each.op_type == "Split"] == ["QLinearConv"]
    assert "Round" not in kinds(model)
    assert kinds(model).count("Max") == 0


def test_parts_that_are_not_split_as_they_were_joined():
    """Three rows and one become two and two."""
    nodes = [
        node("Split", "x sizes", "three one", axis=0),
        node("Concat", "three one", "joined", axis=0),
        node("Split", "joined", "p q", axis=0, num_outputs=2),
        node("Neg", "p", "y"),
        node("Neg", "q", "rest"),
        *network().graph.node[:-1],
        node("Round", "d", "z"),
    ]
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in network().graph.initializer}
    compared(model_of(nodes, "y rest z", {**constants, "sizes": np.array([3, 1])}), 1)

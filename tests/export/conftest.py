"""Networks to export, and files made of them once for all tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import golden_networks
import keras
import numpy as np
import pytest

from keras_dsr import layers, models


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model, inputs as clients send them, and the SavedModel's folder."""

    model: keras.Model
    settings: dict
    x: np.ndarray
    version: Path


def small_if():
    from keras_dsr.export import Preprocessing

    model = models.small_cnn(widths=(4, 8), neuron=layers.IFSpike(threshold=1.0), timesteps=4)
    x = np.random.default_rng(1).integers(0, 256, (7, 8, 8, 1), "uint8")
    return model, {"preprocessing": Preprocessing((33.0,), (70.0,))}, x


def small_lif():
    neuron = layers.LIFSpike(tau=1.0, dt=0.3, threshold=0.1)
    model = models.small_cnn(widths=(4, 8), neuron=neuron, timesteps=5, input_shape=(8, 8, 3))
    return model, {}, np.random.default_rng(2).normal(size=(7, 8, 8, 3)).astype("float32")


def vgg5():
    model = models.vgg(5, neuron=layers.IFSpike(threshold=0.2), input_shape=(2, 8, 8, 2))
    return model, {}, np.random.default_rng(3).poisson(1.0, (3, 2, 8, 8, 2)).astype("float32")


def frames():
    inputs = keras.Input((3, 4, 4, 2), name="frames")
    x = layers.Synapse(keras.layers.Conv2D(3, 3, padding="same", name="conv"))(layers.ToStream()(inputs))
    x = layers.IFSpike(threshold=1.0, name="first")(layers.BatchNormalization(name="bn")(x))
    x = layers.Synapse(keras.layers.Flatten(name="flatten"))(x)
    x = layers.IFSpike(threshold=0.5, name="second")(layers.Synapse(keras.layers.Dense(5, name="dense"))(x))
    model = keras.Model(inputs, layers.SpikeRep(name="readout")(x), name="frames")
    return model, {}, np.random.default_rng(3).poisson(1.0, (5, 3, 4, 4, 2)).astype("float32")


def own_layers():
    """Plain tensors between the neurons, as in examples/own_layers.py, with layers that see one step at a time."""
    inputs = keras.Input((4, 6))
    x = keras.layers.Dense(12)(inputs)
    x = layers.LIFSpike(threshold=0.05)(x)
    x = keras.layers.LayerNormalization()(keras.layers.Dense(12)(x))
    x = layers.LIFSpike(threshold=0.05)(x)
    model = keras.Model(inputs, layers.SpikeRep(coding="weighted_rate")(keras.layers.Dense(3)(x)))
    return model, {}, np.random.default_rng(4).normal(size=(7, 4, 6)).astype("float32")


def nested():
    """A Sequential model with a sub-model in it, names that are no identifiers, and an output that is no logits."""
    inner = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8), layers.IFSpike(timesteps=3, threshold=0.5, name="first-one")],
        name="inner-part",
    )
    model = keras.Sequential(
        [
            keras.Input((6,), name="current"),
            inner,
            layers.Synapse(keras.layers.Dense(4)),
            layers.IFSpike(threshold=0.5, name="second"),
            layers.SpikeRep(),
        ]
    )
    return model, {"classifier": False}, np.random.default_rng(5).normal(size=(7, 6)).astype("float32")


NETWORKS = {build.__name__: build for build in (small_if, small_lif, vgg5, frames, own_layers, nested)}


@pytest.fixture(scope="session")
def build() -> Callable[[str], tuple]:
    """By name: a network, the settings of its export, and inputs; always the same weights."""

    def make(name: str):
        keras.utils.set_random_seed(0)
        keras.backend.clear_session(free_memory=False)  # so that layers have the same names each time
        return NETWORKS[name]()

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory, build) -> Callable[[str], Exported]:
    """By name: a network that was exported."""
    from keras_dsr.export import export_saved_model

    done: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in done:
            model, settings, x = build(name)
            base = tmp_path_factory.mktemp("savedmodels") / name
            done[name] = Exported(model, settings, x, export_saved_model(model, base, examples=x, **settings))
        return done[name]

    return make


@pytest.fixture(scope="session")
def golden(golden_dir) -> Callable[[str], golden_networks.Network]:
    """By name: a golden network."""
    return functools.partial(golden_networks.network, golden_dir)


@pytest.fixture(scope="session")
def write_onnx() -> Callable[..., Path]:
    """Writes a network of dense layers and IF neurons as ONNX, operation by operation, as `keras_dsr.export` names it.

    Args:
        model: Dense - IFSpike (timesteps=3) - Synapse(Dense) - IFSpike - SpikeRep.
        path: Where to.
        form: "unrolled" or "step".
        threshold: Instead of the model's.
        metadata: Instead of what tells the form and the neurons.
    """
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from keras_dsr.export import passes

    def write(model, path, form, threshold=None, metadata=None):
        weights = [np.asarray(w) for w in model.trainable_variables if "threshold" not in w.path]
        kernels, biases = weights[::2], weights[1::2]
        worth = np.float32(0.5 if threshold is None else threshold)
        constants = {"worth": worth, "half": worth / 2, "zero": np.float32(0), "one": np.float32(1)}
        constants |= {"axis": np.array([1]), "steps": np.float32(3)}
        for index, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
            constants |= {f"kernel{index}": kernel, f"bias{index}": bias}
        nodes = []

        def node(kind, *inputs, output=None, **attributes):
            output = output or f"t{len(nodes)}"
            nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
            return output

        def fire(current, potential, spikes=None, after=None):
            potential = node("Add", potential, current)
            fired = node("Cast", node("GreaterOrEqual", potential, "half"), to=TensorProto.FLOAT)
            spikes = node("Mul", fired, "worth", output=spikes)
            return spikes, node("Sub", potential, spikes, output=after)

        def dense(index, x):
            return node("Gemm", x, f"kernel{index}", f"bias{index}")

        names, sizes = ("first", "second"), [len(bias) for bias in biases]
        inputs = {"image": (None, kernels[0].shape[0])}
        outputs = {
            "logits": (TensorProto.FLOAT, 2),
            "probabilities": (TensorProto.FLOAT, 2),
            "class": (TensorProto.INT64, 1),
        }
        if form == "step":
            state = dict(zip((f"potential_{name}" for name in names), ((None, size) for size in sizes), strict=True))
            state |= {"count_second": (None, sizes[1]), "weight_second": (None, 1)}
            inputs |= state
            outputs |= {f"next_{name}": (TensorProto.FLOAT, 2) for name in state}
            x = "image"
            for index, name in enumerate(names):
                x, _ = fire(dense(index, x), f"potential_{name}", f"spikes/{name}", f"next_potential_{name}")
            fired = node("Div", x, "worth")
            count = node("Add", "count_second", fired, output="next_count_second")
            weight = node("Add", "weight_second", "one", output="next_weight_second")
            node("Mul", count, node("Div", "worth", weight), output="logits")
        else:
            current, potentials, trains = dense(0, "image"), ["zero", "zero"], ([], [])
            for _ in range(3):
                x, potentials[0] = fire(current, potentials[0])
                trains[0].append(x)
                x, potentials[1] = fire(dense(1, x), potentials[1])
                trains[1].append(x)
            for name, train in zip(names, trains, strict=True):
                steps = [node("Unsqueeze", x, "axis") for x in train]
                node("Concat", *steps, output=f"spikes/{name}", axis=1)
            total = node("ReduceSum", node("Div", "spikes/second", "worth"), "axis", keepdims=0)
            node("Mul", total, node("Div", "worth", "steps"), output="logits")
        node("Softmax", "logits", output="probabilities", axis=1)
        node("ArgMax", "logits", output="class", axis=1, keepdims=0)

        def info(name, dtype, shape):
            return helper.make_tensor_value_info(name, dtype, ["batch" if size is None else size for size in shape])

        graph = helper.make_graph(
            nodes,
            "by_hand",
            [info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, dtype, [None] * rank) for name, (dtype, rank) in outputs.items()]
            + [onnx.ValueInfoProto(name=f"spikes/{name}") for name in names],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        helper.set_model_props(made, {"keras_dsr.form": form})
        passes.set_aside(made, names)
        if metadata is not None:
            helper.set_model_props(made, metadata)
        onnx.checker.check_model(made)
        onnx.save(made, path)
        return path

    return write

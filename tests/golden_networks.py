"""The networks and blocks of the paper's code that golden values are kept of, built here with the same parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_dsr import layers, models

NETWORKS = ["preact_resnet18_if", "preact_resnet18_lif", "vgg11_if", "vgg11_lif"]
BLOCKS = ["block_if_static", "block_if_events", "block_lif_static", "block_lif_events"]


def dyadic(shape, seed, scale, bits):
    values = np.random.RandomState(seed).randn(*shape) * scale
    return (np.round(values * 2.0**bits) / 2.0**bits).astype("float32")


def make_parameter(spec, setting):
    shape, seed = spec["shape"], spec["seed"]
    if spec["kind"] == "kernel":
        value = dyadic(shape, seed, 1 / math.sqrt(math.prod(shape[1:])), 8)
    elif spec["kind"] in ("bias_or_beta", "running_mean"):
        value = dyadic(shape, seed, 0.25, 6)
    elif spec["kind"] == "gamma":
        value = (2.0 ** np.random.RandomState(seed).randint(-1, 2, shape)).astype("float32")
    elif spec["kind"] == "running_var":
        value = np.full(shape, np.float32(1) - np.float32(1e-5), "float32")
    else:
        return np.float32(setting["Vth"])  # `values_sum` of the LIF networks' thresholds is that of the IF networks
    np.testing.assert_allclose(np.sum(value, dtype="float64"), spec["values_sum"], rtol=1e-5, atol=1e-5)
    return value


def neuron_of(case):
    setting = case["setting"]
    common = {"threshold": setting["Vth"], "alpha": setting["alpha"], "threshold_lower_bound": setting["Vth_bound"]}
    if case["neuron"] == "if":
        return layers.IFSpike(**common)
    return layers.LIFSpike(tau=setting["tau"], dt=setting["delta_t"], **common)


RESNET_NAMES = {
    "conv1": "stem_conv",
    "bn1": "final_bn",
    "relu1": "final_neuron",
    "relu2": "pool_neuron",
    "linear": "head_dense",
    "bn2": "head_bn",
    "relu3": "head_neuron",
}


def layer_name(golden: str) -> str:
    """What our network calls the layer that the golden network calls so."""
    block = re.fullmatch(r"layer(\d)\.(\d)\.(\w+)", golden)
    if block and not block[3].isdigit():
        part = block[3].replace("relu", "neuron")
        return f"stage{block[1]}_block{int(block[2]) + 1}_{part}"
    group = re.fullmatch(r"layer(\d)\.(\d)", golden)
    if group:
        index, kind = divmod(int(group[2]), 4)
        return f"group{group[1]}_{index + 1}_{('conv', 'bn', 'neuron')[kind]}"
    if golden.startswith("classifier"):
        return {"1": "head_dense", "2": "head_bn", "3": "head_neuron"}[golden.split(".")[1]]
    return RESNET_NAMES[golden]


LEAVES = {
    "bias": "bias",
    "Vth": "threshold",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def weight_name(golden: str, is_norm: bool) -> str:
    layer, leaf = golden.rsplit(".", 1)
    leaf = {"weight": "gamma", "bias": "beta"}.get(leaf, LEAVES.get(leaf)) if is_norm else LEAVES.get(leaf, "kernel")
    return f"{layer_name(layer)}/{leaf}"


def to_keras(value):
    """A PyTorch parameter in Keras's layout; the VGG's classifier summed over its 7x7 equal places."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2:
        if value.shape[1] == 25088:
            value = value.reshape(value.shape[0], 512, 49).sum(-1)
        return value.T
    return value


def to_golden(gradient, shape):
    """A gradient of ours in PyTorch's layout."""
    if gradient.ndim == 4:
        return gradient.transpose(3, 2, 0, 1)
    if gradient.ndim == 2:
        gradient = gradient.T
        if tuple(gradient.shape) != tuple(shape):
            gradient = np.repeat(gradient[:, :, None], 49, axis=2).reshape(shape)
    return gradient


def short(path: str) -> str:
    """Layer and weight of a path: without the synapse around the layer."""
    return "/".join(path.split("/")[-2:])


@dataclasses.dataclass(frozen=True)
class Network:
    """A golden network, built here.

    Args:
        model: Ours, with the golden parameters.
        case: What it is, of the .json file.
        arrays: Golden values, of the .npz file.
        x: Its input, channels last.
        names: What our model calls a golden parameter.
    """

    model: keras.Model
    case: dict[str, Any]
    arrays: dict[str, np.ndarray]
    x: np.ndarray
    names: dict[str, str]

    @property
    def layers(self) -> list[str]:
        """Our names of the neuron layers, in golden order."""
        return [layer_name(name) for name in self.case["neuron_layers"]]


@functools.cache
def network(folder: Path, name: str) -> Network:
    """One of `NETWORKS`, of the golden values in a folder; the same each time, so not to be changed."""
    case = json.loads((folder / f"{name}.json").read_text())
    arrays = dict(np.load(folder / f"{name}.npz"))
    if "resnet" in name:
        model = models.preact_resnet(18, neuron_of(case), case["timesteps"])
        x = arrays["x"].transpose(0, 2, 3, 1)
    else:
        x = arrays["x"].transpose(0, 1, 3, 4, 2)
        model = models.vgg(11, neuron_of(case), input_shape=x.shape[1:])
    weights = {short(w.path): w for w in model.weights}
    norms = {spec["name"].rsplit(".", 1)[0] for spec in case["parameters"] if spec["kind"] == "gamma"}
    names = {}
    for spec in case["parameters"]:
        names[spec["name"]] = weight_name(spec["name"], spec["name"].rsplit(".", 1)[0] in norms)
        weights.pop(names[spec["name"]]).assign(to_keras(make_parameter(spec, case["setting"])))
    assert not weights, f"no golden value for {sorted(weights)}"
    return Network(model, case, arrays, x.astype("float32"), names)

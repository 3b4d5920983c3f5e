"""The PyTorch networks that benchmarks compare with are the same networks, trained by the same per-step gradients."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers import cross_entropy, model_grads, relative_error, spike_trains

from keras_dsr import models
from keras_dsr.layers import IFSpike

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = Path(__file__).with_name("torch_peer.py")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not beside the tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def python():
    """The interpreter that has PyTorch."""
    import peers

    found = peers.candidates()
    if not found:
        pytest.skip("no PyTorch here: `python benchmarks/peers.py` makes an environment that has it")
    return found[0]


@pytest.fixture
def peer(tmp_path, python):
    """Asks a PyTorch network what it makes of inputs with given weights."""

    def ask(settings: dict, weights: dict, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        arrays = {f"weights/{name}": value for name, value in weights.items()}
        np.savez(tmp_path / "asked.npz", settings=json.dumps(settings), x=x, y=y, **arrays)
        done = subprocess.run([python, SCRIPT, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "answered.npz") as answered:
            return {name: answered[name] for name in answered.files}

    return ask


def with_random_weights(model: keras.Model) -> dict[str, np.ndarray]:
    """Gives a model weights that leave none of its parts idle, and returns them by name."""
    import stock

    generator = np.random.default_rng(5)
    for name, weight in stock.weights_of(model).items():
        noise = generator.standard_normal(weight.shape).astype("float32")
        if name.endswith(("/gamma", "/moving_variance")):
            weight.assign(np.exp(0.3 * noise))
        elif name.endswith(("/beta", "/moving_mean", "/bias")):
            weight.assign(0.3 * noise)
        elif name.endswith("/threshold"):
            weight.assign(np.exp(0.3 * noise))
    return {name: np.asarray(weight) for name, weight in stock.weights_of(model).items()}


def small_cnn(timesteps: int, shape: tuple[int, int, int]) -> tuple[keras.Model, keras.Model]:
    import per_step

    arguments = {"neuron": IFSpike(threshold_l2=0.0), "timesteps": timesteps, "classes": 10, "input_shape": shape}
    return models.small_cnn((4, 8), **arguments), per_step.small_cnn((4, 8), **arguments)


def resnet20(timesteps: int, shape: tuple[int, int, int]) -> tuple[keras.Model, keras.Model]:
    import stock

    neuron = IFSpike(threshold_l2=0.0)
    ours = models.preact_resnet(20, neuron, timesteps, 10, shape)
    return ours, stock.preact_resnet(20, timesteps, 10, shape, neuron)


@pytest.mark.parametrize("make", [small_cnn, resnet20])
def test_spikes_are_ours_and_gradients_those_of_every_step(make, peer):
    timesteps, shape = 4, (8, 8, 3)
    ours, each_step = make(timesteps, shape)
    weights = with_random_weights(ours)
    # Both have the same layers in the same order, but one of them has other names.
    assert [w.shape for w in each_step.weights] == [w.shape for w in ours.weights]
    each_step.set_weights(ours.get_weights())
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((3, *shape)).astype("float32"), np.array([1, 7, 4])
    settings = {"network": make.__name__, "kind": "dsr", "timesteps": timesteps, "shape": shape, "widths": (4, 8)}
    answered = peer(settings, weights, x, y)

    # Sums differ in their last bits: what keeps this from ever telling apart two right answers is the fixed seed.
    trains = spike_trains(ours, x)
    assert {f"spikes/{name}" for name in trains} == {name for name in answered if name.startswith("spikes/")}
    for name, train in trains.items():
        assert train.any(), name
        np.testing.assert_array_equal(answered[f"spikes/{name}"] > 0, train > 0, err_msg=name)
        np.testing.assert_allclose(answered[f"spikes/{name}"], train, rtol=1e-6, err_msg=name)

    _, logits, gradients, _ = model_grads(each_step, x, lambda logits: cross_entropy(y, logits), training=True)
    np.testing.assert_allclose(answered["logits"], logits, rtol=1e-5, atol=1e-6)
    names = ["/".join(w.path.split("/")[-2:]) for w in ours.trainable_variables]
    assert {f"gradients/{name}" for name in names} == {name for name in answered if name.startswith("gradients/")}
    for name, gradient in zip(names, gradients.values(), strict=True):
        assert np.any(gradient) or name.endswith(("/threshold", "/bias")), name
        # What a bias adds ahead of BatchNorm is taken off again: its gradient is nothing but rounding.
        if np.linalg.norm(gradient) > 1e-5:
            assert relative_error(answered[f"gradients/{name}"], gradient) < 1e-3, name
        else:
            assert np.linalg.norm(answered[f"gradients/{name}"]) < 1e-4, name
    count = sum(int(np.prod(w.shape)) for w in ours.trainable_weights if not w.path.endswith("/threshold"))
    assert int(answered["parameters"]) == count


@pytest.mark.parametrize(("name", "shape"), [("resnet20", (8, 8, 3)), ("vgg11", (32, 32, 2))])
def test_anns_are_the_same_network(name, shape, peer):
    import stock

    model = stock.vgg(11, None, 10, shape) if name == "vgg11" else stock.preact_resnet(20, None, 10, shape)
    weights = with_random_weights(model)
    generator = np.random.default_rng(2)
    x, y = generator.standard_normal((4, *shape)).astype("float32"), np.array([1, 7, 4, 0])
    answered = peer({"network": name, "kind": "ann", "timesteps": None, "shape": shape}, weights, x, y)
    _, logits, _, _ = model_grads(model, x, lambda logits: cross_entropy(y, logits), training=True)
    np.testing.assert_allclose(answered["logits"], logits, rtol=1e-3, atol=1e-4)
    count = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    ours = (
        models.preact_resnet(20, "if", 2, 10, shape) if name == "resnet20" else models.vgg(11, input_shape=(2, *shape))
    )
    thresholds = [w for w in ours.trainable_weights if w.path.endswith("/threshold")]
    assert int(answered["parameters"]) == count
    assert sum(int(np.prod(w.shape)) for w in ours.trainable_weights) - len(thresholds) == count


def test_a_step_is_measured_of_each_kind_in_each_mode(python, tmp_path):
    import peers

    kinds = ["dsr", "ann", "sj-bptt", "sj-dsr"]
    if peers.ask(python, "import importlib.util; print(importlib.util.find_spec('spikingjelly') is None)") == "True":
        kinds = kinds[:2]
    base = {"network": "resnet20", "batch": 2, "shape": [8, 8, 3], "repeats": 1, "warmup": 1}
    tasks = [
        {**base, "kind": kind, "mode": mode, "timesteps": None if kind == "ann" else 2, "form": form}
        for kind in kinds
        for mode, form in (("train", "channels_last"), ("inference", ""))
    ]
    # In one process: to import PyTorch takes longer than all of them.
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import torch_step; "
        "print(json.dumps([torch_step.measure(task) for task in json.loads(sys.argv[2])]))"
    )
    for task, measured in zip(tasks, json.loads(peers.ask(python, script, BENCHMARKS, json.dumps(tasks))), strict=True):
        assert measured["parameters"] == 273_070, task
        assert all(measured[name] > 0 for name in ("cpu_s", "wall_s", "first_s", "build_s", "peak_mb")), task
    if len(kinds) < 4:
        pytest.skip(f"no SpikingJelly in {python.name}: only {kinds} were measured")


def test_a_loss_that_is_not_finite_has_no_time(python):
    import peers

    task = {"network": "resnet20", "batch": 2, "shape": [8, 8, 3], "repeats": 1, "mode": "train", "kind": "ann"}
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import torch, torch_step; "
        "torch.rand = lambda shape, **_: torch.full(shape, float('nan')); "
        "torch_step.measure(json.loads(sys.argv[2]))"
    )
    with pytest.raises(RuntimeError, match="Received nan"):
        peers.ask(python, script, BENCHMARKS, json.dumps({**task, "timesteps": None}))


def test_pytorch_spends_a_budget(python, tmp_path):
    import accuracy
    import measure
    import stock

    widths = (4, 4)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 32, 32, 3)).astype("uint8")
    labels = (np.arange(24) % 10).astype("int64")
    moments = {"mean": np.full(3, 120, "float32"), "std": np.full(3, 60, "float32")}
    arrays = {"x": images[:16], "y": labels[:16], "x_held_out": images[16:], "y_held_out": labels[16:], **moments}
    np.savez(tmp_path / "data.npz", **arrays)
    model = models.small_cnn(widths, IFSpike(threshold=1.0, threshold_l2=0.0), 2, 10, (32, 32, 3))
    np.savez(tmp_path / "0.npz", **{name: np.asarray(weight) for name, weight in stock.weights_of(model).items()})
    task = {"network": "small_cnn", "timesteps": 2, "widths": widths, "seed": 0, "cores": None, "form": "channels_last"}
    task |= {"budget": 4.0, "batch": 8, "every": 0.3, "learning_rate": 0.05, "weight_decay": 5e-4}
    task |= {"data": str(tmp_path / "data.npz"), "weights": str(tmp_path / "0.npz")}
    script = accuracy.HERE / "torch_accuracy.py"
    rows = measure.in_fresh_process(script, task, "torch", python=python)["rows"]
    assert {row["stage"] for row in rows} == {"spikes"}
    assert rows[-1]["cpu_s"] >= 4.0
    assert rows[-1]["updates"] > 4
    assert all(0 <= row["accuracy"] <= 1 for row in rows)

"""What the benchmarks make of what they measure, and that they measure at all, in tiny form."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import keras
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """A benchmark by its name, with results in a folder of the test's."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not beside the tests")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["benchmarks/suite.py", "--data-dir", "/some/where"])

    def load(name: str):
        module = importlib.import_module(name)
        assert BENCHMARKS in Path(module.__file__).parents
        for each in (importlib.import_module("measure"), module):
            if hasattr(each, "RESULTS"):
                monkeypatch.setattr(each, "RESULTS", tmp_path)
        return module

    return load


@pytest.fixture
def no_processes(benchmark, monkeypatch):
    """Figures made up from the task, in place of those of fresh processes: linear in N, depth and batch."""
    asked = []

    def made_up(script, task, backend, python=None, timeout=None):
        asked.append((Path(script).name, task, backend))
        if "import" in task:
            added = {"added_s": 0.05, "added_cpu_s": 0.05, "brings": "keras_dsr"} if task["import"] != "keras" else {}
            return {"wall_s": 1.0, "cpu_s": 1.0, "all_s": 1.0 + 0.05 * bool(added), "all_cpu_s": 1.0, **added}
        if "budget" in task:
            looks = [
                {"stage": "spikes", "cpu_s": 10.0 * n, "updates": 100 * n, "accuracy": 0.15 * n} for n in (1, 2, 3)
            ]
            if task["way"] == "ours, hybrid":
                looks[0]["stage"] = "representation"
            return {"rows": looks, "cores": 2}
        each = {"dsr": 1.0, "ann": 1.0, "sj-bptt": 12.0, "sj-dsr": 4.0}[task["kind"]]
        if backend == "torch":
            each *= 10 if task.get("form") != "channels_last" else 6
        cpu = each * (task["timesteps"] or 1) * task["batch"] * (1.0 if task["mode"] != "train" else 1.1)
        memory = 100 + (5 if backend != "torch" else 50) * (task["timesteps"] or 1)
        return {
            "cpu_s": cpu,
            "wall_s": cpu / 2,
            "peak_mb": memory,
            "build_s": 1.0,
            "first_s": 2.0,
            "parameters": 100,
            "cores": 2,
        }

    for name in ("steps", "startup", "accuracy"):
        monkeypatch.setattr(benchmark(name), "in_fresh_process", made_up)
    peers = benchmark("peers")
    monkeypatch.setattr(peers, "python", lambda: Path("python"))
    monkeypatch.setattr(peers, "versions", lambda: {"torch": "0"})
    return asked


def test_a_line_is_found_again(benchmark):
    measure = benchmark("measure")
    slope, start, fits = measure.line_fit([1, 2, 5], [5.0, 7.0, 13.0])
    assert (slope, start, fits) == pytest.approx((2.0, 3.0, 1.0))
    # By hand: the mean is (2, 2), and of the variance 2 a half is on the line.
    assert measure.line_fit([1, 2, 3], [1.0, 3.0, 2.0]) == pytest.approx((0.5, 1.0, 0.25))
    assert measure.line_fit([1, 2], [4.0, 4.0]) == pytest.approx((0.0, 4.0, 1.0))
    with pytest.raises(ValueError, match="two or more places"):
        measure.line_fit([3, 3], [1.0, 2.0])


def test_tables_have_a_cell_for_each_column(benchmark):
    measure = benchmark("measure")
    assert measure.markdown(["N", ""], [[5, "x"], [None, 0.5]]) == [
        "| N |  |",
        "| --- | --- |",
        "| 5 | x |",
        "|  | 0.5 |",
    ]
    with pytest.raises(ValueError, match="2 cells"):
        measure.markdown(["N", ""], [[5]])


def test_nothing_is_rounded_into_a_pass(benchmark):
    measure, summary = benchmark("measure"), benchmark("summary")
    assert measure.at_most(0.2, 0.2) == "met"
    assert measure.at_most(0.2000001, 0.2) == "not met"
    assert measure.at_most(None, 0.2) == "not measured"
    # Nor does a table show a number from which the reader would conclude something else.
    rows = summary.table_of([summary.Target("cost", 0.2, value, "1/5") for value in (0.2000001, 0.12345, None)])
    assert rows[2:] == [
        "| cost | at most 1/5 | 0.2000001 | not met |",
        "| cost | at most 1/5 | 0.123 | met |",
        "| cost | at most 1/5 |  | not measured |",
    ]


def test_rounds_go_forwards_and_backwards_and_failures_stay_alone(benchmark):
    in_turn, asked = benchmark("measure").in_turn, []

    def run(name):
        asked.append(name)
        if name == "b":
            raise RuntimeError("broken")
        return {"cpu_s": float(len(asked))}

    runs, failures = in_turn(["a", "b", "c"], run, rounds=2)
    assert asked == ["a", "b", "c", "c", "a"]
    assert failures == {"b": "broken"}
    assert {name: len(measured) for name, measured in runs.items()} == {"a": 2, "c": 2}
    # A round that would not end in time is not begun, and the first always is.
    assert len(in_turn(["a"], run, rounds=3, minutes=0)[0]["a"]) == 1


def test_commands_do_not_name_folders_of_the_machine(benchmark):
    assert benchmark("measure").command() == "python benchmarks/suite.py --data-dir DIR"


def test_a_process_that_fails_says_why(benchmark, tmp_path):
    measure = benchmark("measure")
    script = tmp_path / "script.py"
    script.write_text("import json, sys; print('noise'); print(json.dumps({'task': json.loads(sys.argv[2])}))")
    assert measure.in_fresh_process(script, {"a": 1}, "jax") == {"task": {"a": 1}}
    script.write_text("raise ValueError('no such network')")
    with pytest.raises(RuntimeError, match="no such network"):
        measure.in_fresh_process(script, {}, "jax")
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="more than 0 s"):
        measure.in_fresh_process(script, {}, "jax", timeout=0.1)


@pytest.mark.parametrize("full", [False, True])
def test_the_suite_measures_tells_and_draws(full, no_processes, benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark("accuracy"), "prepare", lambda options, folder: None)
    for name in ("scaling", "summary"):
        benchmark(name)
    suite = benchmark("suite")
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/suite.py", *(["--full", "--data-dir", "/some/where"] if full else [])]
    )
    suite.main()
    names = ["steps", "startup", "summary", *(["scaling", "accuracy"] if full else [])]
    prefix = "" if full else "quick_"
    for name in names:
        table = (tmp_path / f"{prefix}{name}.md").read_text()
        assert "| --- |" in table
        assert "/some" not in table + (tmp_path / f"{prefix}{name}.json").read_text()
    for name in set(names) - {"startup", "summary"}:
        assert (tmp_path / f"{prefix}{name}.png").stat().st_size > 10_000
    targets = json.loads((tmp_path / f"{prefix}summary.json").read_text())["targets"]
    # 1.1 against 6.6 of PyTorch's better form, 79.2 of SpikingJelly's, 1.0 of the forward pass; 5 MB against 50.
    values = [target["value"] for target in targets]
    assert values[:6] == pytest.approx([1 / 6, 1 / 72, 1.1, 0.1, 1.0, 0.05])
    assert [target["verdict"] for target in targets[:6]] == ["met"] * 6
    assert {target["verdict"] for target in targets[6:]} == {"not measured"}
    asked = [task for _, task, backend in no_processes if backend == "torch" and task.get("repeats", 0) > 1]
    forms = {task["form"] for task in asked if task["timesteps"] == 20}
    assert forms == {"channels_last"}  # the contest's winner


def test_the_suite_runs_without_peers(no_processes, benchmark, monkeypatch, tmp_path):
    for name in ("scaling", "summary"):
        benchmark(name)
    suite = benchmark("suite")
    monkeypatch.setattr(sys, "argv", ["benchmarks/suite.py", "--no-peers"])
    suite.main()
    assert {backend for _, _, backend in no_processes} == {"tensorflow"}
    targets = json.loads((tmp_path / "quick_summary.json").read_text())["targets"]
    assert [target["verdict"] for target in targets[:3]] == ["not measured", "not measured", "met"]


def test_networks_that_differ_stop_the_benchmark(benchmark):
    steps = benchmark("steps")
    rows = [{"network": "resnet18", "variant": name, "parameters": n} for name, n in (("ours", 5), ("PyTorch DSR", 6))]
    with pytest.raises(RuntimeError, match="not the same"):
        steps.check_parameters(rows)
    steps.check_parameters(rows[:1])


def test_memory_growth_is_a_slope(benchmark):
    rows = [{"variant": "ours", "timesteps": n, "peak_mb": 100 + 3 * n} for n in (5, 10, 40)]
    rows.append({"variant": "ANN, Keras", "timesteps": None, "peak_mb": 90})
    assert benchmark("steps").memory_growth(rows) == {"ours": pytest.approx(3.0)}


@pytest.mark.parametrize("mode", ["train", "forward", "inference"])
def test_a_step_is_measured(mode, benchmark):
    task = {"network": "resnet20", "kind": "dsr", "mode": mode, "timesteps": 2, "batch": 2, "shape": [8, 8, 3]}
    measured = benchmark("keras_step").measure({**task, "repeats": 1, "warmup": 1})
    assert measured["parameters"] == 273_070
    assert all(measured[name] > 0 for name in ("cpu_s", "wall_s", "first_s", "build_s", "peak_mb"))


def test_our_networks_and_stock_ones_have_as_many_parameters(benchmark):
    """Built, not run: the large ones, too."""
    network = benchmark("keras_step").network

    def trainable(model):
        return sum(int(np.prod(w.shape)) for w in model.trainable_weights if not w.path.endswith("/threshold"))

    for name, shape in (("resnet18", (32, 32, 3)), ("vgg11", (48, 48, 2))):
        ours, ann = network(name, "dsr", 2, shape), network(name, "ann", None, shape)
        assert trainable(ours) == trainable(ann), name


class Counted:
    """A clock on which each look at it is a second."""

    def __init__(self):
        self.now = 0.0

    def spent(self):
        self.now += 1
        return self.now

    def paused(self):
        return contextlib.nullcontext()


@pytest.fixture
def cifar_like(tmp_path):
    """Files such as `accuracy` writes."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (24, 32, 32, 3)).astype("uint8")
    labels = (np.arange(24) % 10).astype("int64")
    statistics = {"mean": np.full(3, 120, "float32"), "std": np.full(3, 60, "float32")}
    arrays = {"x": images[:16], "y": labels[:16], "x_held_out": images[16:], "y_held_out": labels[16:], **statistics}
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("way", ["ours", "ours, hybrid"])
def test_a_budget_is_spent(way, benchmark, monkeypatch, tmp_path, cifar_like):
    accuracy, budget, stock = benchmark("accuracy"), benchmark("budget"), benchmark("stock")
    monkeypatch.setattr(accuracy, "WIDTHS", (4,))
    monkeypatch.setattr(accuracy, "CALIBRATION_BATCHES", 1)
    monkeypatch.setattr(budget, "Clock", Counted)
    model = accuracy.build("small_cnn", 2, 1.0)
    np.savez(tmp_path / "0.npz", **{name: np.asarray(weight) for name, weight in stock.weights_of(model).items()})
    settings = {"network": "small_cnn", "timesteps": 2, "threshold": 1.0, "seed": 0, "cores": None}
    settings |= {"budget": 20, "batch": 8, "every": 4, "learning_rate": 0.05, "weight_decay": 5e-4}
    rows = accuracy.measure({"way": way, "data": str(cifar_like), "weights": str(tmp_path / "0.npz"), **settings})[
        "rows"
    ]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    assert stages == (["spikes"] if way == "ours" else ["representation", "quantized", "spikes"])
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert [row["cpu_s"] for row in rows] == sorted(row["cpu_s"] for row in rows)
    assert max(row["updates"] for row in rows) > 4


def test_batches_are_the_same_on_every_side(benchmark, cifar_like):
    budget = benchmark("budget")
    data = budget.load(cifar_like)
    first, again = budget.batches(data, 8, seed=3), budget.batches(data, 8, seed=3)
    for _ in range(5):  # beyond the end of an epoch
        (x, y), (same_x, same_y) = next(first), next(again)
        assert x.shape == (8, 32, 32, 3)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, same_x)
        np.testing.assert_array_equal(y, same_y)
    assert not np.array_equal(next(budget.batches(data, 8, seed=4))[1], next(budget.batches(data, 8, seed=3))[1])


def test_learning_rate_and_levels(benchmark):
    budget = benchmark("budget")
    assert [budget.cosine(0.2, part) for part in (0, 0.5, 1, 2)] == pytest.approx([0.2, 0.1, 0.0, 0.0])
    rows = [
        {"stage": "representation", "cpu_s": 1.0, "accuracy": 0.9},
        {"stage": "spikes", "cpu_s": 2.0, "accuracy": 0.3},
        {"stage": "spikes", "cpu_s": 3.0, "accuracy": 0.5},
    ]
    assert budget.seconds_to(rows, 0.4) == 3.0
    assert budget.seconds_to(rows, 0.6) is None


def test_operations_are_counted(benchmark):
    if helpers.BACKEND != "jax":
        pytest.skip("the GPU benchmark runs on JAX alone")
    gpu = benchmark("gpu")
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem_conv")(inputs)
    x = keras.layers.Conv2D(5, 3, strides=2, padding="same")(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    stem = 2 * 9 * 3 * 4 * 64
    every = stem + 2 * 9 * 4 * 5 * 16 + 2 * 5 * 2
    assert gpu.flops_of(model) == (every, stem)
    # At N = 1 a step of ours is the simulation and an ANN's step.
    assert gpu.flops_of_step("ours, JAX", every, stem, 1) == (every - stem) + 3 * every - stem
    assert gpu.flops_of_step("PyTorch DSR", every, stem, 10) == 30 * (every - stem) + 2 * stem


def test_the_gpu_benchmark_runs_on_a_cpu(benchmark, tmp_path):
    if helpers.BACKEND != "jax":
        pytest.skip("the GPU benchmark runs on JAX alone")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--no-peers", "--precisions", "bfloat16"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "| bfloat16 | 2 | ours, JAX |" in done.stdout
    assert "failed" not in done.stdout


def test_options_have_help(benchmark):
    for name in ("steps", "scaling", "startup", "accuracy", "summary", "gpu"):
        if name == "gpu" and helpers.BACKEND != "jax":
            continue
        parser = benchmark(name).parser()
        assert isinstance(parser, argparse.ArgumentParser)
        assert parser.format_help().startswith("usage")

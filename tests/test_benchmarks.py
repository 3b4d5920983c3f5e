"""What the benchmarks make of what they measure, and that they measure at all, in tiny form."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import helpers
import keras
import numpy as np
import pytest

from keras_dsr import recipes
from keras_dsr.export.report import Report, Row

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
        # What has a time limit is a contest of forms.
        asked.append((Path(script).name, task, "contest" if timeout else backend))
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

    seen = []
    runs, failures = in_turn(["a", "b", "c"], run, rounds=2, report=lambda *now: seen.append(json.dumps(now)))
    assert asked == ["a", "b", "c", "c", "a"]
    assert seen[0] == json.dumps(({"a": [{"cpu_s": 1.0}], "c": [{"cpu_s": 3.0}]}, {"b": "broken"}))
    assert seen[1] == json.dumps((runs, failures))
    assert failures == {"b": "broken"}
    assert {name: len(measured) for name, measured in runs.items()} == {"a": 2, "c": 2}
    # A round that would not end in time is not begun, and the first always is.
    assert len(in_turn(["a"], run, rounds=3, minutes=0)[0]["a"]) == 1


def test_what_failed_in_all_is_said(benchmark):
    measure = benchmark("measure")
    assert measure.rounds_of({"a": [1, 2, 3], "b": [1, 2]}, {}) == 2
    with pytest.raises(RuntimeError, match=r"Nothing could be measured\. a: broken; b: no memory"):
        measure.rounds_of({}, {"a": "broken", "b": "no memory"})
    assert [measure.processes(n) for n in (1, 3)] == ["one fresh process", "medians of 3 fresh processes"]


def test_commands_do_not_name_folders_of_the_machine(benchmark, monkeypatch):
    command = benchmark("measure").command
    assert command() == "python benchmarks/suite.py --data-dir DIR"
    given = ["x.py", "--data-dir", "some/where", "--data-dir=some", "--out=/a/b", "../c", "--networks", "resnet18"]
    monkeypatch.setattr(sys, "argv", given)
    assert command() == "python benchmarks/x.py --data-dir DIR --data-dir=DIR --out=DIR DIR --networks resnet18"


def test_errors_do_not_name_folders_of_the_machine(benchmark):
    brief = benchmark("measure").brief
    assert brief("Traceback\n  File '/some/where/x.py'\nValueError: no such network\n") == "ValueError: no such network"
    assert brief("cannot read '/some/where/x.npz', see ~/notes/why.txt") == "cannot read 'x.npz', see why.txt"
    assert brief("C:\\some\\where\\x.npz is not there") == "x.npz is not there"
    kept = "1/5 and a/b/c of https://host/some/where/x, N/A"
    assert brief(kept) == kept
    assert brief("") == ""


def test_cores_are_those_used(benchmark, monkeypatch):
    measure = benchmark("measure")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 5}, raising=False)
    assert measure.allowed_cores(2) == [2, 5]
    assert [measure.machine(count)["cores"] for count in (None, 2, 9)] == [3, 2, 3]


def test_versions_of_distributions_with_other_names(benchmark, monkeypatch):
    measure = benchmark("measure")
    assert measure.versions()["keras"] == keras.__version__
    distributions = {"tensorflow": ["tensorflow-cpu"]}
    monkeypatch.setattr(measure.importlib.metadata, "packages_distributions", lambda: distributions)

    def version(name):
        if name != "tensorflow-cpu":
            raise measure.importlib.metadata.PackageNotFoundError(name)
        return "2.20"

    monkeypatch.setattr(measure.importlib.metadata, "version", version)
    assert [measure.version_of(name) for name in ("tensorflow", "numpy")] == ["2.20", "unknown"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="getrusage is all that there is here")
def test_peak_memory_is_not_that_of_who_asks(benchmark, tmp_path):
    measure = benchmark("measure")
    large = np.ones(300 * 2**17)  # 300 MB
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import measure; "
        "print(measure.json.dumps({'peak_mb': measure.peak_mb()}))"
    )
    assert measure.peak_mb() > large.nbytes / 2**20
    assert 1 < measure.in_fresh_process(script, {}, "jax")["peak_mb"] < 100


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
    script.write_text("print('noise')")
    with pytest.raises(RuntimeError, match="JSON on its last line"):
        measure.in_fresh_process(script, {}, "jax")
    script.write_text("")
    with pytest.raises(RuntimeError, match="It printed ''"):
        measure.in_fresh_process(script, {}, "jax")
    with pytest.raises(RuntimeError, match="was not started"):
        measure.in_fresh_process(script, {}, "jax", python=tmp_path / "python")


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
    assert "from 20 to 40" in targets[3]["what"]
    assert values[:6] == pytest.approx([1 / 6, 1 / 72, 1.1, 0.1, 1.0, 0.05])
    assert [target["verdict"] for target in targets[:6]] == ["met"] * 6
    assert {target["verdict"] for target in targets[6:]} == {"not measured"}
    assert "medians of 3 fresh processes" in (tmp_path / f"{prefix}summary.md").read_text()
    steps_ = json.loads((tmp_path / f"{prefix}steps.json").read_text())
    assert steps_["rounds"] == 3
    # PyTorch's forms are tried where they are used, at the largest N of each network and mode.
    tried = {
        (task["network"], task["mode"], task["kind"], task["timesteps"])
        for _, task, backend in no_processes
        if backend == "contest" and task["network"] in ("resnet18", "vgg11") and task["kind"] in ("dsr", "sj-bptt")
    }
    if full:
        places = [(network, mode) for network in ("resnet18", "vgg11") for mode in ("train", "inference")]
        assert tried == {(*place, kind, 40) for place in places for kind in ("dsr", "sj-bptt")}
    else:
        assert tried == {("resnet18", "train", kind, 20) for kind in ("dsr", "sj-bptt")}
    asked = [task for _, task, backend in no_processes if backend == "torch" and task.get("repeats", 0) > 1]
    assert {task["form"] for task in asked if "budget" not in task} == {"channels_last"}  # the contest's winner


def test_the_quick_form_measures_nothing_without_a_target(no_processes, benchmark):
    suite, steps = benchmark("suite"), benchmark("steps")
    benchmark("summary")
    options = argparse.Namespace(full=False, peers=True, cores=None, data_dir=None)
    arguments = next(given for name, _, given in suite.parts(options) if name == "steps")
    steps.compare(steps.parser().parse_args(arguments))
    asked = [task for _, task, backend in no_processes if backend != "contest"]
    kinds = {(task["kind"], task["mode"], task["timesteps"], task["batch"]) for task in asked}
    assert kinds == {
        ("dsr", "train", 20, 8),  # ours and PyTorch's, and so at N = 40
        ("dsr", "train", 40, 8),
        ("dsr", "forward", 20, 8),
        ("sj-bptt", "train", 20, 8),
        ("dsr", "inference", 20, 8),
        ("ann", "inference", None, 160),
    }
    assert len(asked) == 3 * 8


def test_results_are_written_after_each_round(no_processes, benchmark, monkeypatch):
    steps, written = benchmark("steps"), []
    monkeypatch.setattr(steps, "write", lambda name, results, table: written.append(results))
    monkeypatch.setattr(steps, "plot", lambda *_: None)
    arguments = ["--networks", "resnet18", "--modes", "train", "--variants", "ours", "PyTorch DSR", "--rounds", "2"]
    steps.compare(steps.parser().parse_args(arguments))
    assert [results["rounds"] for results in written] == [1, 2]


def test_networks_that_differ_stop_the_benchmark_after_a_round(no_processes, benchmark, monkeypatch):
    steps = benchmark("steps")
    made_up = steps.in_fresh_process

    def differ(script, task, backend, **others):
        return {**made_up(script, task, backend, **others), "parameters": 100 + (backend == "torch")}

    monkeypatch.setattr(steps, "in_fresh_process", differ)
    arguments = ["--networks", "resnet18", "--modes", "train", "--variants", "ours", "PyTorch DSR", "--rounds", "2"]
    with pytest.raises(RuntimeError, match="not the same"):
        steps.compare(steps.parser().parse_args(arguments))
    asked = [task for _, task, backend in no_processes if backend != "contest"]
    assert len(asked) == 2 * 4


def test_only_ours_is_held_against_our_forward_pass(no_processes, benchmark, tmp_path):
    steps = benchmark("steps")
    names = ["ours", "ours, XLA", "ours, JAX", "ours, forward", "PyTorch DSR"]
    arguments = [
        "--networks",
        "resnet18",
        "--modes",
        "train",
        "--timesteps",
        "5",
        "--rounds",
        "1",
        "--variants",
        *names,
    ]
    steps.compare(steps.parser().parse_args(arguments))
    lines = (tmp_path / "steps.md").read_text().partition("## Forms")[0].splitlines()
    last = {cells[3]: cells[-2] for line in lines if len(cells := [c.strip() for c in line.split("|")]) == 11}
    assert {name: last[name] for name in names} == {**dict.fromkeys(names, ""), "ours": "1.10", "ours, forward": "1.00"}


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
    growth = benchmark("steps").memory_growth
    assert growth(rows) == {"ours": (pytest.approx(3.0), [5, 10, 40])}
    # From 20 on, where there are two: at 5 something else is the peak.
    rows = [{"variant": "ours", "timesteps": n, "peak_mb": max(300, 200 + 10 * n)} for n in (5, 20, 40)]
    assert growth(rows) == {"ours": (pytest.approx(10.0), [20, 40])}


def test_memory_that_does_not_grow_is_not_measured(benchmark):
    summary = benchmark("summary")

    def target(ours, other):
        peaks = [("ours", ours), ("PyTorch DSR", other)]
        base = {"network": "resnet18", "mode": "train", "batch": 8, "cpu_s": 1.0}
        rows = [
            {**base, "variant": name, "timesteps": n, "peak_mb": 500 + slope * n}
            for name, slope in peaks
            for n in (20, 40)
        ]
        return next(each for each in summary.of_steps(rows) if "memory" in each.what)

    assert target(2, 20).value == pytest.approx(0.1)
    assert [target(*slopes).verdict for slopes in ((-1, 20), (0, 20), (2, 0))] == ["not measured"] * 3


def test_targets_on_a_gpu_are_of_one_network_and_batch(benchmark):
    summary = benchmark("summary")
    at = {"network": "resnet18", "shape": [32, 32, 3], "batch": 128, "timesteps": 20, "precision": "float32"}
    at |= {"platform": "gpu", "epoch_s": 14.0, "wall_s": 0.1}
    ours, other = {**at, "side": "ours, JAX"}, {**at, "side": "PyTorch DSR", "platform": "cuda", "wall_s": 0.6}

    def verdicts(*rows):
        return [target.verdict for target in summary.of_gpu({"rows": rows})]

    assert verdicts(ours, other) == ["met", "not measured", "met"]
    assert verdicts(ours, {**other, "wall_s": 0.4}) == ["not met", "not measured", "met"]
    fast = {**ours, "precision": "bfloat16", "epoch_s": 3.0}
    assert summary.of_gpu({"rows": [ours, fast]})[-1].value == 3.0
    others = [("network", "resnet20"), ("shape", [8, 8, 3]), ("batch", 64), ("timesteps", 5), ("platform", "cpu")]
    for name, value in others:
        assert verdicts({**ours, name: value}, {**other, name: value}) == ["not measured"] * 3, name
    without = {name: value for name, value in ours.items() if name != "network"}
    assert verdicts(without, other) == ["not measured"] * 3


def test_whole_numbers_have_a_target(benchmark, tmp_path):
    summary = benchmark("summary")

    def times(ann, whole):
        return {
            form: {"cpu_s": cpu, "wall_s": cpu}
            for form, cpu in (("ANN", ann), ("float", 9.0), ("whole numbers", whole))
        }

    measured = {"preact_resnet18": {"batches": {"1": times(1.0, 2.0), "8": times(8.0, 10.0)}}}
    measured["vgg11"] = {"batches": {"8": times(1.0, 3.0)}}
    host = {"date": "2026-01-01", "cores": 1, "processor": "some", "command": "python x.py"}
    results = {"machine": host, "settings": {"timesteps": 4, "threads": 1}, "results": measured}
    (target,), rows = summary.of_integers(results)
    assert (target.value, target.verdict) == (1.25, "met")
    assert [row["of_ann"] for row in rows] == [2.0, 1.25, 3.0]
    assert summary.of_integers(None)[0][0].verdict == "not measured"
    other = {**results, "settings": {"timesteps": 8}}
    assert summary.of_integers(other)[0][0].verdict == "not measured"
    # Their file has one name, whatever the form of the suite.
    (tmp_path / "integer_inference.json").write_text(json.dumps(results))
    summary.compare(summary.parser().parse_args(["--prefix", "quick_"]))
    table = (tmp_path / "quick_summary.md").read_text()
    assert "| at most 1.5 | 1.25 | met |" in table
    assert "preact_resnet18, batch 1: 2.00" in table


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("train", "float32"), ("train", "mixed_bfloat16"), ("forward", "float32"), ("inference", "float32")],
)
def test_a_step_is_measured(mode, precision, benchmark, request):
    request.addfinalizer(lambda: keras.config.set_dtype_policy("float32"))
    task = {"network": "resnet20", "kind": "dsr", "mode": mode, "timesteps": 2, "batch": 2, "shape": [8, 8, 3]}
    task["precision"] = precision
    measured = benchmark("keras_step").measure({**task, "repeats": 1, "warmup": 1})
    assert keras.config.dtype_policy().name == precision
    assert measured["parameters"] == 273_070
    assert all(measured[name] > 0 for name in ("cpu_s", "wall_s", "first_s", "build_s", "peak_mb"))


def test_proofs_are_added_to_earlier_ones(benchmark, tmp_path):
    proof = benchmark("export_proof")
    row = {field.name: None for field in dataclasses.fields(Row)}
    row |= {"form": "step", "runtime": "some", "examples": 2, "bit_equal": True, "passed": True, "reason": ""}
    report = Report("digits", (Row(**row),), ("neuron2",), 1e-5, 0.0)
    about = {"processor": "some", "cores": 2, "python": "3", "versions": {"keras": "3"}, "date": "2026-01-01"}
    earlier = {"machine": about, "command": "python one", "networks": {"digits": dataclasses.asdict(report)}}
    (tmp_path / "proof.json").write_text(json.dumps(earlier))
    results, reports = {"machine": dict(about), "command": "python two", "networks": {}}, {}
    proof.add_earlier("proof", results, reports)
    assert results["command"] == "python one; python two --add"
    assert reports == {"digits": report}
    assert "| digits | 2 | step | some | bit-equal |" in proof.table(results, reports)
    results["machine"]["versions"] = {"keras": "4"}
    with pytest.raises(ValueError, match=r"the same machine and versions\. These differ: versions"):
        proof.add_earlier("proof", results, reports)


def test_operations_have_kinds(benchmark):
    kind_of = benchmark("profile_step").kind_of
    kinds = {
        "net_1/conv1_synapse_1/conv1_1/BiasAdd:_MklNativeFusedConv2D": "convolutions, forward",
        "gradient_tape/net_1/conv1/convolution/Conv2DBackpropFilter:Conv2DBackpropFilter": "convolutions, backward",
        "gradient_tape/net_1/head_1/MatMul_1:MatMul": "convolutions, backward",
        "net_1/bn1_1/FusedBatchNormV3:FusedBatchNormV3": "normalization",
        "net_1/bn1_1/batchnorm/mul_1:Mul": "normalization",
        "gradient_tape/net_1/bn1_1/batchnorm/mul_1/Mul:Mul": "normalization",
        "CpuExecutable::ExecuteAsyncOnStream": "neurons",
        "net_1/neuron1_1/while/body/_12/net_1/neuron1_1/while/add:AddV2": "neurons",
        "net_1/neuron1/Cast:Cast": "neurons",
        "net_1/neuron11_1/Cast:Cast": "the rest",
        "net_1/neuron1_1/while:StatelessWhile": None,
        "ExecutorState::Process": None,
        "FunctionRun": None,
    }
    assert {event: kind_of(event, {"neuron1"}, {"bn1"}) for event in kinds} == kinds


@pytest.mark.tensorflow_only
def test_seconds_of_a_step_are_found_by_kind(benchmark, monkeypatch):
    profile = benchmark("profile_step")
    monkeypatch.setattr(profile, "CEILING_SIZE", 64)
    task = {"what": "seconds", "network": "resnet20", "timesteps": 2, "batch": 2, "shape": [8, 8, 3], "repeats": 1}
    measured = profile.measure(task)
    assert list(measured["seconds"]) == list(profile.KINDS)
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    assert measured["ceiling"] > 0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="asks XLA by JAX")
def test_working_memory_of_a_step_is_told(benchmark):
    task = {"what": "bytes", "network": "resnet20", "kind": "dsr", "batch": 2, "shape": [8, 8, 3]}
    few, many = (benchmark("profile_step").measure({**task, "timesteps": steps}) for steps in (2, 6))
    for told in (few, many):
        assert told["training"]["flops"] > told["forward"]["flops"] > 0
    assert many["forward"]["flops"] > 2 * few["forward"]["flops"]
    assert many["forward"]["temporary_bytes"] > few["forward"]["temporary_bytes"]


def test_a_profile_is_written(benchmark, monkeypatch, tmp_path):
    profile = benchmark("profile_step")

    def made_up(script, task, backend):
        if task["what"] == "seconds":
            assert backend == "tensorflow"
            seconds = dict(zip(profile.KINDS, (2.0, 1.0, 0.5, 0.25, 0.25), strict=True))
            return {"seconds": seconds, "wall_s": 4.0, "ceiling": 100.0}
        assert backend == "jax"
        size = (task["timesteps"] or 1) * 2**20
        return {"forward": {"flops": 80.0, "temporary_bytes": size}, "training": {"temporary_bytes": 2 * size}}

    monkeypatch.setattr(profile, "in_fresh_process", made_up)
    profile.compare(profile.parser().parse_args(["--networks", "resnet20", "--timesteps", "5"]))
    table = (tmp_path / "profile.md").read_text()
    assert "| PreAct-ResNet-20 | 5 | 4.00 | 50% | 25% | 12% | 6% | 6% | 40% |" in table
    assert "| PreAct-ResNet-20 | 5 | 5 | 10 | 2 |" in table
    assert json.loads((tmp_path / "profile.json").read_text())["results"][0]["rate"] == 40.0


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


def test_batches_depend_on_the_seed_alone(benchmark, cifar_like):
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


@pytest.fixture
def photographs(tmp_path):
    """A file such as CIFAR-10's, small, whose classes are brightnesses."""
    generator = np.random.default_rng(0)
    y = np.arange(300) % 10
    x = np.clip(25 * y[:, None, None, None] + generator.integers(0, 20, (300, 32, 32, 3)), 0, 255).astype("uint8")
    path = tmp_path / "small.npz"
    np.savez(path, x_train=x[:200], y_train=y[:200, None], x_test=x[200:], y_test=y[200:, None])
    return path


def small_recipe(**settings: str):
    settings = {
        "network": "small_cnn",
        "widths": "4",
        "timesteps": "2",
        "batch_size": "20",
        "validation": "50",
        **settings,
    }
    return recipes.get("cifar10-if-n5").with_settings(settings)


def without_seconds(outcome):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in outcome["rows"]]


def test_training_on_jax_alone_goes_on_and_is_evaluated_once(benchmark, photographs, tmp_path, monkeypatch):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    settings = {"threshold": "2", "augmentation": "cutout", "dropout": "0.2", "selection": "last"}
    recipe = small_recipe(**settings, hybrid_epochs="3", hybrid_quantized_epochs="1", epochs="3")
    images = cifar10.load(photographs, recipe)
    whole = cifar10.train_recipe(recipe, tmp_path / "whole", images)
    assert [row["stage"] for row in whole["rows"]] == 3 * ["representation"] + ["quantized"] + 3 * ["spiking"]
    assert whole["best"] == whole["rows"][-1]["val_accuracy"]

    # Checkpoints after epochs 2, 3; 1; 2, 3 of the stages. Killed after the first, and instead of the fifth.
    saves, save = [], cifar10.checkpoints.save

    def killed(*arguments):
        saves.append(arguments)
        if len(saves) != 5:
            save(*arguments)
        if len(saves) in (1, 5):
            raise KeyboardInterrupt

    monkeypatch.setattr(cifar10.checkpoints, "save", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            cifar10.train_recipe(recipe, tmp_path / "killed", images, keep=2)
    broken = cifar10.train_recipe(recipe, tmp_path / "killed", images, keep=2)
    assert len(saves) == 6
    assert without_seconds(broken) == without_seconds(whole)
    assert broken["test_accuracy"] == whole["test_accuracy"]
    assert {name: about["start"] for name, about in broken["stages"].items()} == {
        name: about["start"] for name, about in whole["stages"].items()
    }
    with np.load(tmp_path / "whole" / "weights.npz") as ours, np.load(tmp_path / "killed" / "weights.npz") as theirs:
        weights = [ours[name] for name in ours]
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)

    model = recipe.build(10, (32, 32, 3))
    model.set_weights(weights)
    x, y = (np.asarray(part) for part in (cifar10.standardized(images[2].x), images[2].y))
    right = float((model.predict(x, verbose=0).argmax(-1) == y).mean())
    assert whole["test_accuracy"] == pytest.approx(right)
    table = (tmp_path / "whole" / "result.md").read_text()
    assert f"{right:.2%} of 100 test images" in table
    assert "| quantized | 1 |" in table

    monkeypatch.setattr(cifar10, "accuracy_program", None)  # a finished run is not evaluated again
    again = cifar10.train_recipe(recipe, tmp_path / "whole", images)
    assert again == json.loads((tmp_path / "whole" / "result.json").read_text())
    others = (images[0], images[2], images[1])
    for changed in ({"minutes": [1.0, 1.0, 1.0]}, {"images": others}):
        with pytest.raises(ValueError, match="other settings or images"):
            cifar10.train_recipe(recipe, tmp_path / "killed", **{"images": images, **changed})


def test_a_last_stage_without_epochs_on_jax_alone(benchmark, photographs, tmp_path):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    recipe = small_recipe(epochs="0", hybrid_epochs="1")
    images = cifar10.load(photographs, recipe)
    outcome = cifar10.train_recipe(recipe, tmp_path, images)
    assert [row["stage"] for row in outcome["rows"]] == ["representation"]
    model = recipe.build(10, (32, 32, 3))
    with np.load(tmp_path / "weights.npz") as weights:
        model.set_weights([weights[name] for name in weights])
    classes = model.predict(np.asarray(cifar10.standardized(images[1].x)), verbose=0).argmax(-1)
    assert outcome["best"] == pytest.approx(float((classes == np.asarray(images[1].y)).mean()))


def test_weights_that_are_not_finite_are_not_kept_on_jax_alone(benchmark, photographs, tmp_path, monkeypatch):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    # The last update is one with no finite rate: the losses before it are finite, the weights after it are not.
    rates = cifar10.learning_rates
    monkeypatch.setattr(
        cifar10, "learning_rates", lambda *arguments: np.append(rates(*arguments)[:-1], np.float32(np.nan))
    )
    recipe = small_recipe(epochs="1")
    with pytest.raises(ValueError, match="is not finite after epoch 1"):
        cifar10.train_recipe(recipe, tmp_path / "run", cifar10.load(photographs, recipe))
    assert not list((tmp_path / "run").iterdir())


def test_a_stage_on_jax_alone_ends_when_its_time_is_over(benchmark, photographs, tmp_path, monkeypatch):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    recipe = small_recipe()
    images = cifar10.load(photographs, recipe)

    def progress(folder, minutes):
        clock = iter(np.arange(0.0, 1000.0, 5.0).tolist())  # an epoch takes 5 seconds of it
        monkeypatch.setattr(cifar10, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
        return [row["progress"] for row in cifar10.train_recipe(recipe, folder, images, minutes=minutes)["rows"]]

    assert progress(tmp_path / "half", [0.5]) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-5)
    assert progress(tmp_path / "less", [0.01]) == pytest.approx([0, 1.0], abs=1e-5)


def test_what_cannot_be_trained_on_jax_alone_is_refused(benchmark, photographs):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    for settings, minutes, keep, message in (
        ({"data": "cifar100"}, None, 1, "data='cifar100'"),
        ({"optimizer": "adam", "weight_decay": "0"}, None, 1, "'adam'"),
        ({"size": "48,48"}, None, 1, "size=\\(48, 48\\)"),
        ({"augmentation": "autoaugment"}, None, 1, "autoaugment"),
        ({}, [1.0, 2.0], 1, "minutes"),
        ({}, [0.0], 1, "minutes"),
        ({}, None, 0, "apart"),
    ):
        with pytest.raises(ValueError, match=message):
            cifar10.check(small_recipe(**settings), minutes, keep)
    for settings in ({"validation": "195"}, {"train_examples": "160"}, {"train_examples": "10"}):
        with pytest.raises(ValueError, match="one or more are for validation"):
            cifar10.load(photographs, small_recipe(**settings))
    fewer = cifar10.load(photographs, small_recipe(train_examples="100"))[0]
    assert np.bincount(fewer.y).tolist() == [10] * 10
    cifar10.check(small_recipe(), [1.0], 1)


def test_learning_rates_of_an_epoch_on_jax_alone(benchmark):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    cifar10 = benchmark("cifar10_jax")
    rates = cifar10.learning_rates(0.1, 4, 2, 4, 0.0, 0.5)
    assert rates == pytest.approx(0.1 * np.array([0.5, 0.75, 1, 1]) * (1 + np.cos(np.pi * np.arange(4) / 8)) / 2)


def test_changes_on_jax_alone(benchmark):
    if helpers.BACKEND != "jax":
        pytest.skip("cifar10_jax.py runs on JAX alone")
    import jax

    cifar10 = benchmark("cifar10_jax")
    x = np.asarray(cifar10.standardized(np.random.default_rng(0).integers(1, 256, (40, 32, 32, 3)).astype("uint8")))
    black = np.asarray(cifar10.standardized(np.zeros((32, 32, 3), "uint8")))

    def changed(change):
        recipe = recipes.get("cifar10-if").with_settings({"augmentation": change, "padding": "2", "cutout": "6"})
        return np.asarray(cifar10.changed(x, jax.random.key(1), recipe))

    flipped = [np.array_equal(new, old[:, ::-1]) for new, old in zip(changed("flip"), x, strict=True)]
    kept = [np.array_equal(new, old) for new, old in zip(changed("flip"), x, strict=True)]
    assert sum(flipped) + sum(kept) == 40
    assert 5 < sum(flipped) < 35
    offsets = set()
    for new, old in zip(changed("crop"), x, strict=True):
        padded = np.pad(old - black, ((2, 2), (2, 2), (0, 0))) + np.tile(black[:1, :1], (36, 36, 1))
        cuts = [padded[r : r + 32, c : c + 32] for r in range(5) for c in range(5)]
        (found,) = (number for number, cut in enumerate(cuts) if np.allclose(new, cut, atol=1e-5))
        offsets.add(found)
    assert len(offsets) > 10  # of 25
    for new, old in zip(changed("cutout"), x, strict=True):
        blank = (new == 0).all(-1)
        rows, columns = blank.any(1), blank.any(0)
        assert np.array_equal(blank, rows[:, None] & columns[None])
        assert 3 <= rows.sum() <= 6
        assert 3 <= columns.sum() <= 6
        np.testing.assert_array_equal(new[~blank], old[~blank])


def test_options_have_help(benchmark):
    for name in (
        "steps",
        "scaling",
        "startup",
        "accuracy",
        "summary",
        "tracing_cost",
        "profile_step",
        "gpu",
        "cifar10_jax",
    ):
        if name in ("gpu", "cifar10_jax") and helpers.BACKEND != "jax":
            continue
        for action in benchmark(name).parser()._actions:
            if "--task" not in action.option_strings:
                assert action.help not in (None, "", argparse.SUPPRESS), (name, action.option_strings)


def test_looks_are_so_many_seconds_apart(benchmark):
    budget, clock = benchmark("budget"), Counted()
    rows = budget.train(lambda *_: None, lambda: 0.5, iter([(0, 0)] * 100), clock, 40.0, 10, 0.1, "spikes")
    # A step is a second of this clock; the first reading, and the one ahead of each step, are among them.
    assert [row["cpu_s"] for row in rows] == [11.0, 21.0, 31.0, 40.0]
    assert [row["updates"] for row in rows] == [9, 19, 29, 38]


def test_forms_are_tried_where_there_are_most_steps(benchmark):
    steps = benchmark("steps")
    todo = steps.cases(["resnet18"], ["train", "inference"], ["ours", "PyTorch DSR", "ANN, PyTorch"], [5, 20, 40], 8)
    found = {(case.mode, case.variant): (case.timesteps, case.batch) for case in steps.contests(todo)}
    assert found == {
        ("train", "PyTorch DSR"): (40, 8),
        ("train", "ANN, PyTorch"): (None, 8),
        ("inference", "PyTorch DSR"): (40, 8),
        ("inference", "ANN, PyTorch"): (None, 320),
    }
    assert {case.timesteps for case in steps.contests(todo, at=20) if case.variant == "PyTorch DSR"} == {20}


def test_a_library_in_no_form_does_not_stop_the_others(no_processes, benchmark, monkeypatch, tmp_path):
    steps = benchmark("steps")
    made_up = steps.in_fresh_process

    def broken(script, task, backend, **others):
        if backend == "torch":
            raise RuntimeError("Traceback\nImportError: /some/where/lib.so")
        return made_up(script, task, backend, **others)

    monkeypatch.setattr(steps, "in_fresh_process", broken)
    names = ["--variants", "ours", "PyTorch DSR"]
    steps.compare(steps.parser().parse_args(["--networks", "resnet18", "--modes", "train", *names]))
    results = json.loads((tmp_path / "steps.json").read_text())
    assert set(results["failures"].values()) == {"ImportError: lib.so"}
    assert {row["failed"] for row in results["forms"]} == {"ImportError: lib.so"}
    with pytest.raises(RuntimeError, match=r"Nothing could be measured\. .*ImportError"):
        steps.compare(
            steps.parser().parse_args(["--networks", "resnet18", "--modes", "train", "--variants", "PyTorch DSR"])
        )


def test_the_peers_come_from_the_index_for_cpus_where_pypi_has_none(benchmark, monkeypatch):
    peers = benchmark("peers")
    for platform, calls in (("linux", 2), ("win32", 2), ("darwin", 1)):
        monkeypatch.setattr(sys, "platform", platform)
        found = peers.installs()
        assert len(found) == calls
        assert found[-1] == ["install", *peers.REQUIREMENTS]
        assert all("--extra-index-url" in arguments for arguments in found[:-1])


def test_all_interpreters_are_asked_for_cuda(benchmark, monkeypatch, tmp_path):
    if helpers.BACKEND != "jax":
        pytest.skip("the GPU benchmark runs on JAX alone")
    gpu, peers = benchmark("gpu"), benchmark("peers")
    answers = {"none": None, "cpu": "False", "cuda": "True"}

    def ask(python, script):
        if answers[python.name] is None:
            raise RuntimeError(f"{python} does not answer: Traceback\nModuleNotFoundError: torch")
        return answers[python.name]

    monkeypatch.setattr(peers, "ask", ask)
    monkeypatch.setattr(peers, "candidates", lambda: [tmp_path / name for name in answers])
    assert gpu.torch_python(True) == (tmp_path / "cuda", "")
    assert gpu.torch_python(False) == (tmp_path / "cpu", "")
    del answers["cuda"]
    assert gpu.torch_python(True) == (None, "ModuleNotFoundError: torch; PyTorch of cpu has no CUDA")
    answers.clear()
    assert gpu.torch_python(True) == (None, "it is not installed")


def test_an_interpreter_that_does_not_answer_is_no_crash(benchmark, tmp_path):
    ask = benchmark("peers").ask
    assert ask(Path(sys.executable), "print('noise'); print('yes')") == "yes"
    with pytest.raises(RuntimeError, match="cannot be started"):
        ask(tmp_path / "python", "print(1)")
    with pytest.raises(RuntimeError, match="does not answer"):
        ask(Path(sys.executable), "raise ValueError")


def test_a_form_is_chosen_for_each_precision(benchmark):
    if helpers.BACKEND != "jax":
        pytest.skip("the GPU benchmark runs on JAX alone")
    gpu = benchmark("gpu")
    options = argparse.Namespace(timesteps=[5, 20], precisions=["float32", "bfloat16"], compile=True)

    def run(key, form, trial):
        _, steps, precision = key
        assert (steps, trial) == (20, True)
        if form == "compile":
            raise RuntimeError("no compiler")
        fast = "channels_last" if precision == "float32" else "channels_last compile"
        return {"wall_s": 1.0 if form == fast else 2.0}

    forms, rows = gpu.torch_forms(["PyTorch DSR"], options, run)
    assert forms == {
        ("PyTorch DSR", "float32"): "channels_last",
        ("PyTorch DSR", "bfloat16"): "channels_last compile",
    }
    assert [row["failed"] for row in rows if row["form"] == "compile"] == ["no compiler"] * 2
    # Rows say what was measured: the verdicts depend on it.
    settings = argparse.Namespace(network="resnet18", shape=[32, 32, 3], batch=64)
    (row,) = gpu.rows_of({("PyTorch DSR", 20, "float32"): [{"wall_s": 0.5}]}, forms, settings)
    assert (row["network"], row["shape"], row["batch"], row["form"]) == ("resnet18", [32, 32, 3], 64, "channels_last")
    assert row["epoch_s"] == 781 * 0.5


def searched(folder, accuracies):
    """Records of a search: trials with made-up accuracies, alpha 0.1 apart."""
    from keras_dsr.tuning.search import Trial, open_folder, write_trial

    def tune(search, where, *, workers, told):
        open_folder(search, where)
        for number, accuracy in enumerate(accuracies):
            state = "failed" if accuracy is None else "finished"
            settings = {"threshold": 2.0, "alpha": 0.3 + number / 10, "timesteps": 4}
            values = {"validation_accuracy": accuracy, "firing_rate": 0.125, "timesteps": 4, "epochs": 3}
            write_trial(where, Trial(number=number, settings=settings, state=state, **(values if accuracy else {})))
            told(f"trial {number}")
        from keras_dsr import tuning

        return tuning.best_recipe(search, tuning.read_trials(where))

    return tune


@pytest.mark.parametrize(("accuracies", "lost"), [((0.90, 0.96, None, 0.95), False), ((0.90, 0.96), True)])
def test_a_search_is_compared_with_the_papers_defaults(accuracies, lost, benchmark, monkeypatch, tmp_path):
    from keras_dsr import training, tuning

    module = benchmark("search")
    trained = []

    def train(recipe, folder, verbose):
        trained.append((recipe.threshold, recipe.alpha, recipe.timesteps, recipe.seed))
        return argparse.Namespace(test_accuracy=0.97 + recipe.seed / 100 - (recipe.threshold == 6) / 10)

    class Killer:
        def __init__(self, folder, name, after):
            assert (name, after) == ("worker1", 1)
            self.killed = {"trial": 1, "epochs": 2}

        def start(self):
            pass

    monkeypatch.setattr(module, "Killer", Killer)
    monkeypatch.setattr(tuning, "tune", searched(tmp_path, accuracies))
    monkeypatch.setattr(training, "fit", lambda *arguments, **named: training.Fitted(0.91, 3, {}, {}, 1.0))
    monkeypatch.setattr(training, "train", train)
    options = argparse.Namespace(
        trials=4, workers=2, epochs="3", seeds=2, tuner="random", space=None, set=[], cores=2, name="found"
    )
    if lost:
        with pytest.raises(SystemExit, match="something was lost: 2 trials"):
            module.search(options, tmp_path / "search", tmp_path)
        return
    fields, table = module.search(options, tmp_path / "search", tmp_path)
    # With other seeds than that of the search.
    assert trained == [(2.0, 0.4, 4, 1), (2.0, 0.4, 4, 2), (6.0, 0.5, 8, 1), (6.0, 0.5, 8, 2)]
    assert "after 2 of its 3 epochs: it came back and the trial is finished with 3 epochs" in table
    assert "3 trials finished, 0 were stopped, 1 failed." in table
    assert "| best of the search | V_th = 2, alpha = 0.4, N = 4 | 96.00% | 98.50 ± 0.71 % |" in table
    assert "| the paper's defaults | V_th = 6, alpha = 0.5, N = 8 | 91.00% | 88.50 ± 0.71 % |" in table
    assert "alpha of the five best trials: 0.40, 0.60, 0.30." in table
    assert "The best is the maximum of 3 accuracies on the same 144 validation examples, and too high" in table
    assert "| mean test accuracy behind the defaults', in points | at most 0 | -10.00 | met |" in table
    assert (tmp_path / "found.png").is_file()
    assert json.loads(json.dumps(fields))["killed"] == {"trial": 1, "epochs": 2}


def test_a_search_has_verdicts(benchmark):
    module = benchmark("search")
    recipe = argparse.Namespace(neuron="if", alpha=0.45)
    assert [row[-1] for row in module.verdicts(599, [0.9, 0.9], [0.9, 0.9], recipe)] == ["met"] * 3
    recipe.alpha = 0.7
    assert [row[-1] for row in module.verdicts(601, [0.9, 0.8], [0.9, 0.9], recipe)] == ["not met"] * 3
    recipe.neuron = "lif"
    assert len(module.verdicts(1, [0.9], [0.9], recipe)) == 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_worker_is_killed_in_the_midst_of_a_trial(benchmark, tmp_path):
    from keras_dsr.tuning.search import Trial, run_folder, write_trial

    module = benchmark("search")
    (tmp_path / "trials").mkdir()
    code = "import time; time.sleep(60)"
    words = [sys.executable, "-S", "-c", code, "keras_dsr.tuning", str(tmp_path), "--worker"]
    with subprocess.Popen([*words, "worker0"]) as other, subprocess.Popen([*words, "worker1"]) as worker:
        try:
            write_trial(tmp_path, Trial(number=0, settings={}, worker="worker0", state="finished"))
            write_trial(tmp_path, Trial(number=1, settings={}, worker="worker1"))
            killer = module.Killer(tmp_path, "worker1", after=1)
            killer.start()
            killer.join(0.5)
            assert killer.is_alive()  # no epoch has come to its end
            run_folder(tmp_path, 1).mkdir()
            (run_folder(tmp_path, 1) / "history.csv").write_text("epoch\n1\n2\n")
            killer.join(30)
            assert killer.killed == {"trial": 1, "epochs": 2}
            assert worker.wait(10) == -9
            assert other.poll() is None
        finally:
            other.kill()
            worker.kill()


def test_tracing_has_a_verdict(benchmark, monkeypatch, tmp_path, capsys):
    cost = benchmark("tracing_cost")
    made_up = {
        "inference": {"wall_s": 5.0, "cpu_s": 10.0, "quarter_mb": 900.0, "peak_mb": 901.0},
        "trace": {"wall_s": 6.0, "cpu_s": 12.5, "quarter_mb": 950.0, "peak_mb": 955.0},
    }
    monkeypatch.setattr(cost, "in_fresh_process", lambda script, task, backend: dict(made_up[task["form"]]))
    cost.compare(cost.parser().parse_args(["--rounds", "1"]))
    table = (tmp_path / "tracing_cost_tensorflow.md").read_text()
    assert "| trace | 6.00 | 12.50 | 1.20 | 1.25 | 950 | 955 |" in table
    assert "times inference: wall time met, CPU time met." in table
    assert "32 MB: met." in table
    made_up["trace"] |= {"cpu_s": 13.1, "peak_mb": 1900.0}
    cost.compare(cost.parser().parse_args(["--rounds", "1"]))
    assert "times inference: wall time met, CPU time not met." in capsys.readouterr().out
    made_up["trace"] |= {"wall_s": 7.0}
    cost.compare(cost.parser().parse_args(["--rounds", "1"]))
    assert "times inference: wall time not met, CPU time not met." in capsys.readouterr().out
    results = json.loads((tmp_path / "tracing_cost_tensorflow.json").read_text())
    assert results["ratio_cpu"] == pytest.approx(1.31)
    assert results["growth_mb"] == pytest.approx(950.0)


@pytest.mark.tensorflow_only
@pytest.mark.parametrize("form", ["inference", "trace"])
def test_tracing_is_measured(form, benchmark, monkeypatch):
    from keras_dsr import layers, models

    small = models.small_cnn((4,), layers.IFSpike(threshold=0.5), timesteps=2, input_shape=(32, 32, 3))
    monkeypatch.setattr(models, "preact_resnet", lambda *_, **__: small)
    measured = benchmark("tracing_cost").measure({"form": form, "examples": 10, "batch": 4, "timesteps": 2})
    assert all(measured[name] > 0 for name in ("wall_s", "cpu_s"))
    assert measured["peak_mb"] >= measured["quarter_mb"] > 0

"""Real processes and devices: the weights of a training do not depend on how many there are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import helpers
import pytest

BRIEF, STEPS = 3, 9
L2 = 0.05  # of a size to be seen: at the thresholds' start its gradient is 0.1


def test_weights_do_not_depend_on_the_number_of_replicas(benchmark, tmp_path):
    """With dropout, augmentation, normalization, trained thresholds and their penalty, and weight decay.

    After 3 steps all that differs is how sums are rounded. Later a neuron may be a rounding away from its threshold,
    fire on one device and not on two, and so change weights by 1e-4. What a mistake changes is far more, as the last
    cases show: thresholds' gradients averaged over 2 replicas are halved, and so is a penalty that is spread over them.
    """
    replicas = benchmark("replicas")
    settings = {**replicas.SMALL, "widths": "4,8", "timesteps": "3", "batch_size": "16", "train_examples": "320"}
    task = {"settings": settings, "data_dir": None, "steps": STEPS, "every": BRIEF, "threshold_l2": L2}
    cases = [(case, task) for case in replicas.CASES if case[1] == helpers.BACKEND]
    halved = {"halved gradients": {**task, "settings": {**settings, "threshold_gradient_scale": "0.5"}}}
    halved["halved penalty"] = {**task, "threshold_l2": L2 / 2}
    cases += [((name, helpers.BACKEND, 1, {}), wrong) for name, wrong in halved.items()]
    if helpers.BACKEND == "tensorflow":
        plain = {"devices": "mirrored", "replicas": 2, "jit_compile": False}
        cases.append((("spikes without XLA", "tensorflow", 1, plain), task))
        apart = {"devices": "mirrored", "replicas": 2, "synchronized": False}
        cases.append((("normalization by each replica", "tensorflow", 1, apart), task))
    found = {}
    for number, ((name, engine, count, strategy), todo) in enumerate(cases):
        if "wide" in strategy:
            strategy = {**strategy, "wide": 8}
        folder = tmp_path / str(number)
        replicas.measure((name, engine, count, strategy), todo, folder, 300)
        found[name] = [replicas.weights(folder, steps) for steps in (BRIEF, STEPS)]
    one = found.pop("one device")
    thresholds = [name for name in one[1] if name.endswith("threshold")]
    assert len(thresholds) == 3

    def parted(other):
        """The largest difference after few and after all steps, and of thresholds in parts of how far they came."""
        of_all = [replicas.differences(*pair)["weights"] for pair in zip(one, other, strict=True)]
        return *of_all, max(abs(float(one[1][x] - other[1][x]) / float(one[1][x] - 1.0)) for x in thresholds)

    wrong = {name: parted(found.pop(name)) for name in (*halved, "normalization by each replica") if name in found}
    right = {name: parted(other) for name, other in found.items()}
    print(right, wrong)
    assert len(right) >= 2
    for name, (soon, late, of_way) in right.items():
        assert soon < 1e-5, name
        assert late < 1e-3, name
        assert of_way < 0.01, name
    for name in halved:
        assert wrong[name][0] > 1e-3, name
        assert wrong[name][2] > 0.05, name
    if helpers.BACKEND == "tensorflow":
        assert wrong["normalization by each replica"][1] > 1e-2


def test_all_processes_take_the_chiefs_best_weights_and_calibration(benchmark, tmp_path):
    """The chief is slow at writing the best epoch, which is the last; and the other calibrates to other last digits."""
    workers = benchmark("workers")
    command = [sys.executable, str(Path(__file__).with_name("slow_chief.py")), str(tmp_path / "run")]
    started = workers.Workers(command, helpers.BACKEND, 2, tmp_path / "logs")
    assert started.wait(200), started.told()
    chief, other = (re.findall(r"^(?:RESTORED|EPOCH) .*$", log.read_text(), re.M) for log in started.logs)
    assert len(chief) == 2
    assert chief == other
    assert chief[0].split()[1] == chief[1].split()[1] == "2"
    assert not (tmp_path / "run" / "calibrated.npz").exists()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a training that nothing happens to."""
    return tmp_path_factory.mktemp("kill") / "unbroken"


# So long that no training ends before the kill.
KILLED = ("epochs=8", "timesteps=2", "widths=4", "train_examples=640", "selection=best", "dropout=0.2")


@pytest.mark.tensorflow_only
@pytest.mark.parametrize(("role", "delay"), [("worker", 0.0), ("chief", 0.13), ("all", 0.27)])
def test_a_process_is_killed_and_all_go_on_to_the_same_weights(benchmark, tmp_path, unbroken, role, delay):
    """So many seconds after the first epoch. The benchmark does so five times for each role, and on JAX."""
    kill = benchmark("kill_workers")
    if not unbroken.exists():
        kill.whole(unbroken, "tensorflow", 300, KILLED)
    broken = tmp_path / "broken"
    ran, workers = kill.killed(broken, "tensorflow", role, delay, 300, KILLED, patience=60, epochs=1)
    assert ran, workers.told()
    assert not (broken / "summary.json").exists()
    if role != "all":
        # The other one ends by itself, and says why.
        (left,) = {0, 1} - set(kill.ROLES[role])
        assert workers.processes[left].returncode not in (0, -9), workers.told()
        assert "start all of them again" in workers.logs[left].read_text(), workers.told()
    kill.whole(broken, "tensorflow", 300, KILLED)
    kill.compare(unbroken, broken)

"""The processes of a search: killed, all of them or one, and nothing lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tuning.small import TINY, search

from keras_dsr import data, runs, training, tuning
from keras_dsr.data.parts import ArrayPart
from keras_dsr.recipes import Recipe
from keras_dsr.tuning import processes, trials
from keras_dsr.tuning.search import Trial, run_folder, search_of, write_trial

TENSORFLOW_ONLY = pytest.mark.tensorflow_only


def processes_of(folder, *names):
    """The ids of the running processes of a search, of some or all names."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "keras_dsr.tuning" in words and str(folder) in words and (not names or set(names) & set(words)):
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@TENSORFLOW_ONLY
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_worker_and_then_all_are_killed_and_nothing_is_lost(tmp_path, monkeypatch):
    pytest.importorskip("keras_tuner")
    folder = tmp_path / "search"
    settings = {"widths": "4", "timesteps": "2", "epochs": "4", "batch_size": "16", "train_examples": "160"}
    words = ["tune", "digits", *(f"--set={name}={value}" for name, value in settings.items())]
    command = [
        sys.executable,
        "-m",
        "keras_dsr.cli",
        *words,
        "--trials",
        "4",
        "--workers",
        "2",
        "--folder",
        str(folder),
    ]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    begun = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        at = {}

        def in_the_midst():
            """Whether worker1 is at a trial of which an epoch is kept; which, and with how many."""
            for trial in tuning.read_trials(folder):
                if trial.worker == "worker1" and not trial.ended:
                    history = run_folder(folder, trial.number) / "history.csv"
                    if history.is_file():
                        at[trial.number] = trial.settings
                        return True
            assert begun.poll() is None, begun.communicate()
            return False

        wait_for(in_the_midst)
        (worker,) = processes_of(folder, "worker1")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: processes_of(folder, "worker1") not in ([], [worker]))
        wait_for(lambda: any(trial.ended for trial in tuning.read_trials(folder)))
    finally:
        begun.kill()
    out, _ = begun.communicate()
    assert "worker1 died by signal SIGKILL, and is started again" in out
    # Whoever starts them need not tidy up.
    wait_for(lambda: not processes_of(folder), 60)

    before = tuning.read_trials(folder)
    lines = []
    recipe = tuning.tune(search_of(folder), folder, workers=2, told=lines.append)
    trials = tuning.read_trials(folder)
    assert [(trial.number, trial.state, trial.epochs) for trial in trials] == [(n, "finished", 4) for n in range(4)]
    for trial in before:
        assert trials[trial.number].settings == trial.settings
    for number, drawn in at.items():
        assert trials[number].settings == drawn
    assert not any("died" in line for line in lines)
    assert len(lines) == sum(not trial.ended for trial in before) + 4 - len(before)
    assert (
        Recipe.from_json((folder / "best.json").read_text()) == recipe == tuning.best_recipe(search_of(folder), trials)
    )
    assert not processes_of(folder)
    monkeypatch.setattr(processes, "_supervise", None)
    assert tuning.tune(search_of(folder), folder) == recipe


class Script:
    """Has processes of a search be small ones, each of which runs what `code` is for its name and its turn."""

    def __init__(self, monkeypatch, **code):
        self.code = code
        self.started = []
        self._popen = subprocess.Popen
        monkeypatch.setattr(processes.subprocess, "Popen", self.open)
        monkeypatch.setattr(processes, "_LOOK_EVERY", 0.01)

    def open(self, command, **settings):
        name = command[command.index("--worker") + 1]
        turn = self.started.count(name)
        self.started.append(name)
        code = self.code[name]
        code = code[min(turn, len(code) - 1)]
        return self._popen([sys.executable, "-S", "-c", f"import os, signal, sys, time\n{code}"], **settings)


DIE, WAIT, END = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)", "sys.exit(0)"


def supervise(folder, workers, chief=True):
    lines = []
    names = [f"worker{number}" for number in range(workers)]
    processes._supervise(folder, names, None, chief, None, lines.append)
    return lines


def test_a_worker_that_dies_comes_back_under_its_name(opened, monkeypatch):
    _, folder = opened()
    script = Script(monkeypatch, chief=[WAIT], worker0=[f"time.sleep(0.3); {END}"], worker1=[DIE, "sys.exit(3)", END])
    lines = supervise(folder, 2)
    assert lines == [
        "worker1 died by signal SIGKILL, and is started again",
        "worker1 died by exit status 3, and is started again",
    ]
    assert sorted(script.started) == ["chief", "worker0", "worker1", "worker1", "worker1"]


def test_with_the_chief_all_are_started_again(opened, monkeypatch):
    _, folder = opened()
    script = Script(monkeypatch, chief=[DIE, WAIT], worker0=[WAIT, END])
    assert supervise(folder, 1) == ["chief died by signal SIGKILL; all processes are started again"]
    assert script.started == ["chief", "worker0"] * 2


def test_trials_of_other_machines_are_waited_for(opened, monkeypatch):
    _, folder = opened()
    theirs = Trial(number=0, settings={}, worker="elsewhere")
    write_trial(folder, theirs)
    Script(monkeypatch, chief=[WAIT], worker0=[END])
    looks = iter(range(1000))

    def look():
        if next(looks) == 30:
            write_trial(folder, dataclasses.replace(theirs, state="finished"))
        return False

    processes._supervise(folder, ["worker0"], None, True, "127.0.0.1:8700", print, look)
    assert next(looks) > 30
    write_trial(folder, theirs)
    assert supervise(folder, 1) == []  # nobody can have joined


def test_a_chief_that_has_ended_is_the_end(opened, monkeypatch):
    _, folder = opened()
    Script(monkeypatch, chief=[END], worker0=[WAIT])
    assert supervise(folder, 1) == []


@pytest.mark.parametrize("name", ["worker0", "chief"])
def test_what_dies_again_and_again_is_an_error(name, opened, monkeypatch):
    _, folder = opened()
    (folder / "logs" / f"{name}.log").write_text("")
    fail = "print('it is the disk', file=sys.stderr); sys.exit(1)"
    Script(monkeypatch, **{"chief": [WAIT], "worker0": [WAIT], name: [fail]})
    with pytest.raises(
        OSError, match=rf"{name} of the search died 9 times in a row, last by exit status 1\. it is the disk"
    ):
        supervise(folder, 1)


def test_what_gets_on_in_between_may_die_often(opened, monkeypatch):
    _, folder = opened()
    epoch = f"open({str(run_folder(folder, 0) / 'checkpoint.npz')!r}, 'w').close(); time.sleep(0.05); {DIE}"
    run_folder(folder, 0).mkdir()
    write_trial(folder, Trial(number=0, settings={}, worker="worker0"))
    script = Script(monkeypatch, worker0=[epoch] * 12 + [END])
    assert len(supervise(folder, 1, chief=False)) == 12
    assert script.started == ["worker0"] * 13


def ending(folder, worker, attempts):
    """Code that records the next trial of a worker as failed, and dies."""
    first = Trial(number=0, settings={}, worker=worker, state="failed", attempts=attempts)
    text = json.dumps(dataclasses.asdict(first))
    parent = str(folder / "trials")
    return f"""
import json
number = len([name for name in os.listdir({parent!r}) if name.endswith('.json')])
record = json.loads({text!r}) | {{'number': number}}
beside = os.path.join({parent!r}, '.beside')
with open(beside, 'w') as file:
    json.dump(record, file)
os.rename(beside, os.path.join({parent!r}, f'{{number:04d}}.json'))
{DIE}
"""


def test_trials_that_are_given_up_are_no_progress(opened, monkeypatch):
    _, folder = opened()
    script = Script(monkeypatch, worker0=[ending(folder, "worker0", trials.MOST_ATTEMPTS + 1)])
    with pytest.raises(OSError, match=r"worker0 of the search died 9 times in a row, last by signal SIGKILL"):
        supervise(folder, 1, chief=False)
    assert len(script.started) == 9


def test_a_worker_is_not_saved_by_what_others_do(opened, monkeypatch):
    _, folder = opened()
    Script(monkeypatch, worker0=[ending(folder, "worker1", 1)])
    with pytest.raises(OSError, match=r"worker0 of the search died 9 times in a row"):
        supervise(folder, 1, chief=False)


def test_trials_that_fail_by_an_error_are_progress(opened, monkeypatch):
    _, folder = opened()
    Script(monkeypatch, worker0=[ending(folder, "worker0", 1)] * 12 + [END])
    assert len(supervise(folder, 1, chief=False)) == 12


def test_what_would_meet_all_trials_ends_the_search_at_once(opened, monkeypatch):
    _, folder = opened()
    code = f"print('worker0: OSError: No space left', file=sys.stderr); sys.exit({processes.FAULT})"
    script = Script(monkeypatch, chief=[WAIT], worker0=[code])
    with pytest.raises(
        OSError, match=r"would meet all of its trials: worker0: OSError: No space left .*keras-dsr tune --folder"
    ):
        supervise(folder, 1)
    assert script.started == ["chief", "worker0"]


@pytest.mark.parametrize("error", [OSError("No space left"), ImportError("no tonic"), ValueError("no such name")])
def test_a_process_says_by_its_status_that_all_trials_would_fail(error, monkeypatch, tmp_path, capsys):
    from keras_dsr.tuning import __main__ as one

    def fail(*arguments):
        raise error

    monkeypatch.setattr(processes, "serve", fail)
    monkeypatch.setattr(sys, "argv", ["tuning", str(tmp_path), "--worker", "worker0"])
    with pytest.raises(SystemExit) as ended:
        one.main()
    assert ended.value.code == processes.FAULT
    assert capsys.readouterr().err == f"worker0: {type(error).__name__}: {error}\n"


def test_the_death_of_the_chief_is_no_attempt_at_a_trial(opened, monkeypatch):
    _, folder = opened()
    write_trial(folder, Trial(number=0, settings={}, worker="worker0", attempts=2, kept=3))
    write_trial(folder, Trial(number=1, settings={}, worker="machine-worker0", attempts=2))
    Script(monkeypatch, chief=[DIE, WAIT], worker0=[WAIT, END])
    supervise(folder, 1)
    assert [(trial.attempts, trial.kept) for trial in tuning.read_trials(folder)] == [(0, 3), (2, 0)]


def test_trials_that_end_are_told(opened, monkeypatch):
    _, folder = opened()
    write_trial(folder, Trial(number=0, settings={"alpha": 0.25}, state="failed", message="ValueError: nan"))
    done = Trial(number=1, settings={"alpha": 0.5}, state="stopped", epochs=2, validation_accuracy=0.5)
    Script(monkeypatch, worker0=[f"time.sleep(0.1); {END}"])
    told = []
    processes._supervise(folder, ["worker0"], None, False, None, told.append, lambda: write_trial(folder, done))
    assert told == ["trial 1, alpha=0.5: stopped after 2 epochs, validation accuracy 50.00%"]


def test_an_interrupt_ends_all_processes(opened, monkeypatch):
    _, folder = opened()
    Script(monkeypatch, chief=[WAIT], worker0=[WAIT])
    kept = []
    start = processes._Process.start
    monkeypatch.setattr(processes._Process, "start", lambda self, address: kept.append(self) or start(self, address))

    def interrupt():
        running = [each._running for each in kept]
        kept[:] = running
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes._supervise(folder, ["worker0"], None, True, None, print, interrupt)
    assert [each.poll() for each in kept] == [-signal.SIGKILL] * 2


def test_processes_end_with_the_one_that_started_them():
    code = (
        "from keras_dsr.tuning import processes; import time; "
        "processes.end_with(0); print('up', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    with child:
        assert child.stdout.readline() == b"up\n"
        assert child.poll() is None
        child.stdin.close()
        assert child.wait(10) == 1


def test_trials_of_workers_that_are_gone_are_taken_up(opened):
    _, folder = opened(tuner="optuna")
    for number, worker in enumerate(["worker0", "worker1", "worker2"]):
        write_trial(folder, Trial(number=number, settings={"alpha": 0.5}, worker=worker, attempts=3, epochs=number))
    write_trial(folder, Trial(number=3, settings={}, state="finished", worker="worker2"))
    processes._take_up(folder, ["worker0", "worker1"])
    assert [(trial.worker, trial.attempts, trial.epochs) for trial in tuning.read_trials(folder)] == [
        ("worker0", 0, 0),
        ("worker1", 0, 1),
        ("worker0", 0, 2),
        ("worker2", 0, 0),
    ]


def test_cores_are_shared_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6}, raising=False)
    assert processes._shares(2) == [[0, 1], [2, 5, 6]]
    assert processes._shares(1) == [None]
    assert processes._shares(6) == [None] * 6


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({}, {"workers": 0}, ValueError, r"1 worker or more\. Received workers=0"),
        ({}, {"address": "8700"}, ValueError, r"HOST:PORT, such as .*Received '8700'"),
        ({}, {"address": "here:99999"}, ValueError, r"HOST:PORT"),
        ({}, {"address": "here:0"}, ValueError, r"HOST:PORT"),
        ({"tuner": "optuna"}, {"address": "0.0.0.0:8700"}, ValueError, r"Only KerasTuner has a chief.*tuner='optuna'"),
        (
            {"recipe": dataclasses.replace(TINY, data="folder:/nowhere", train_examples=None)},
            {},
            FileNotFoundError,
            "/nowhere",
        ),
    ],
)
def test_what_no_search_can_have_is_refused(settings, arguments, error, message, tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("keras_tuner")
    with pytest.raises(error, match=message):
        tuning.tune(search(**settings), tmp_path / "search", **arguments)
    assert not (tmp_path / "search").exists()


def test_a_search_needs_validation_examples(tmp_path, monkeypatch):
    pytest.importorskip("keras_tuner")
    digits = data.load("digits")
    empty = dataclasses.replace(digits, validation=ArrayPart(digits.train.x[:0], digits.train.labels[:0]))
    monkeypatch.setattr(training, "load", lambda *arguments, **named: empty)
    with pytest.raises(ValueError, match=r"compared on validation examples, and 'digits' has none"):
        tuning.tune(search(), tmp_path)


def test_a_missing_tuner_is_named(monkeypatch):
    for tuner, package in (("bayesian", "keras_tuner"), ("optuna", "optuna"), ("random", "tensorboard")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ImportError, match=rf"A search with '{tuner}' needs .*pip install 'keras-dsr\[tuning\]'"
            ):
                processes.require(tuner)


def test_a_search_is_run_once_at_a_time(tmp_path):
    pytest.importorskip("keras_tuner")
    with runs.locked(tmp_path), pytest.raises(BlockingIOError):
        tuning.tune(search(), tmp_path)


def test_others_join_what_has_a_chief(opened):
    pytest.importorskip("optuna")
    _, folder = opened(tuner="optuna")
    with pytest.raises(ValueError, match=r"has no chief to join: its tuner is 'optuna'"):
        tuning.join(folder, "host:8700")
    with pytest.raises(FileNotFoundError, match=r"no search\.json.*machines that work on one search share its folder"):
        tuning.join(folder / "elsewhere", "host:8700")


def test_joined_workers_end_with_the_search(opened, monkeypatch):
    pytest.importorskip("keras_tuner")
    _, folder = opened()
    write_trial(folder, Trial(number=0, settings={}, state="finished", validation_accuracy=0.5))
    monkeypatch.setattr(processes.platform, "node", lambda: "chief7")
    script = Script(monkeypatch)
    script.code = type("Any", (), {"__getitem__": lambda self, name: [WAIT]})()
    (folder / "results.md").touch()
    tuning.join(folder, "host:8700", workers=2)
    assert len(script.started) == 2
    assert len(set(script.started)) == 2
    assert not any("chief" in name for name in script.started)


@pytest.mark.parametrize("tuner", ["random", "optuna"])
def test_a_process_is_what_its_name_says(tuner, opened, monkeypatch):
    kerastuner = pytest.importorskip("keras_dsr.tuning.kerastuner")
    pytest.importorskip("optuna")
    made, folder = opened(tuner=tuner)
    served = []
    monkeypatch.setattr(kerastuner, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(processes.optuna_study, "work", lambda *arguments: served.append(arguments))
    processes.serve(folder, "worker0", "host:1", None)
    assert served == [(made, folder, "worker0", *(["host:1"] if tuner == "random" else []), None)]
    if tuner == "random":
        with pytest.raises(ValueError, match=r"needs the chief's address\. Pass --chief HOST:PORT"):
            processes.serve(folder, "worker0", None, None)

"""The processes of a search: killed, all of them or one, and nothing lost."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import socket
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
from keras_dsr.tuning import search as search_module
from keras_dsr.tuning.search import Trial, read_trial, run_folder, search_of, write_trial

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
    settings = {"widths": "4", "timesteps": "2", "epochs": "12", "batch_size": "16", "train_examples": "160"}
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
        # It was in the midst of it; whoever comes back takes seconds to import what it needs.
        assert not any(read_trial(folder, number).ended for number in at)
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
    assert [(trial.number, trial.state, trial.epochs) for trial in trials] == [(n, "finished", 12) for n in range(4)]
    for trial in trials:
        rows = csv.DictReader((run_folder(folder, trial.number) / "history.csv").read_text().splitlines())
        assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
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
        if "--worker" not in command:
            return self._popen(command, **settings)
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


def give_out(folder, **numbers):
    """Writes what KerasTuner's oracle keeps of the workers that it waits for."""
    (folder / "engine" / "oracle.json").write_text(json.dumps({"ongoing_trials": numbers}))


@pytest.fixture
def waiting(opened, monkeypatch):
    """A search whose own workers have come to their end, while another machine's is at trial 0."""
    _, folder = opened()
    give_out(folder, elsewhere="0")
    search_module.beat_of(folder, "elsewhere").touch()
    script = Script(monkeypatch, chief=[WAIT], worker0=[END])

    def run(each_look):
        looks, told = iter(range(1000)), []
        processes._supervise(
            folder, ["worker0"], None, True, "127.0.0.1:8700", told.append, lambda: each_look(next(looks))
        )
        return next(looks), told

    return folder, script, run


def test_a_trial_of_another_machine_is_waited_for_even_without_a_record(waiting):
    folder, script, run = waiting

    def look(number):
        if number == 30:
            write_trial(folder, Trial(number=0, settings={}, worker="elsewhere", state="finished"))
        return False

    looks, told = run(look)
    assert looks > 30
    assert len(told) == 1
    assert told[0].startswith("trial 0")
    assert script.started == ["chief", "worker0"]


def test_a_trial_of_a_silent_worker_is_taken_back(waiting, monkeypatch):
    folder, script, run = waiting
    beat = search_module.beat_of(folder, "elsewhere")

    def look(number):
        if number == 30:
            past = beat.stat().st_mtime - search_module.SILENT - 1
            os.utime(beat, (past, past))
        if len(script.started) == 4:  # the chief gives it to a worker of its own
            write_trial(folder, Trial(number=0, settings={}, worker="worker0", state="finished"))
        return False

    _, told = run(look)
    assert told[0] == "elsewhere silent for 180 s: what was being trained there is taken back"
    assert script.started == ["chief", "worker0"] * 2


def test_without_an_address_nobody_can_have_joined(opened, monkeypatch):
    _, folder = opened()
    give_out(folder, elsewhere="0")
    Script(monkeypatch, chief=[WAIT], worker0=[END])
    assert supervise(folder, 1) == []


def test_workers_have_the_same_names_when_they_join_again(opened, monkeypatch):
    _, folder = opened()
    monkeypatch.setattr(processes.platform, "node", lambda: "chief 7")
    with processes._names(folder, 2) as first:
        assert first == ["machine-7-worker0", "machine-7-worker1"]
        with processes._names(folder, 1) as second:
            assert second == ["machine-7-worker2"]
        with processes._names(folder, 1) as third:
            assert third == second
    with processes._names(folder, 2) as again:
        assert again == first


def test_a_worker_whose_chief_stays_away_ends(tmp_path):
    (tmp_path / "logs").mkdir()
    code = (
        "import pathlib, time; from keras_dsr.tuning import processes; "
        "processes._BEAT_EVERY, processes._CHIEF_AWAY = 0.05, 0.2; "
        f"processes._beat(pathlib.Path({str(tmp_path)!r}), 'worker0', '127.0.0.1:1'); time.sleep(60)"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == processes.FAULT
    assert "worker0: no chief has answered at 127.0.0.1:1 for 0.2 s" in ended.stderr
    assert search_module.heard_of(tmp_path, "worker0")


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
    assert sum("died" in line for line in supervise(folder, 1, chief=False)) == 12


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
    left = folder / "trials" / ".0123-claim"
    left.touch()
    processes._take_up(folder, ["worker0", "worker1"])
    assert not left.exists()
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
        ({}, {"address": "fd00::7:8700"}, ValueError, r"or \[fd00::7\]:8700\. Received 'fd00::7:8700'"),
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
    script = Script(monkeypatch)
    script.code = type("Any", (), {"__getitem__": lambda self, name: [WAIT]})()

    def reached(address):
        assert address == "host:8700"
        # Written by the chief's machine meanwhile.
        write_trial(folder, Trial(number=0, settings={}, state="finished", validation_accuracy=0.5))
        (folder / "results.md").touch()
        return True

    monkeypatch.setattr(processes, "_reached", reached)
    tuning.join(folder, "host:8700", workers=2)
    assert len(set(script.started)) == 2
    tuning.join(folder, "host:8700", workers=2)  # it is over
    assert len(script.started) == 2


def test_a_chief_that_nobody_reaches_is_an_error(opened, monkeypatch):
    pytest.importorskip("keras_tuner")
    _, folder = opened()
    monkeypatch.setattr(processes, "_CHIEF_STARTS", 0)
    with pytest.raises(OSError, match=r"No chief of a search answers at 127\.0\.0\.1:1 within 0 s"):
        tuning.join(folder, "127.0.0.1:1")


def test_results_of_an_earlier_end_are_not_taken_for_the_end(opened, monkeypatch):
    pytest.importorskip("keras_tuner")
    made, folder = opened(trials=1)
    settings = {"alpha": 0.5, "threshold": 1.0}
    write_trial(folder, Trial(number=0, settings=settings, state="finished", validation_accuracy=0.5, timesteps=2))
    tuning.tune(made, folder)
    assert (folder / "results.md").is_file()

    def supervise(*arguments):
        assert not list(folder.glob("results.*"))
        raise OSError("that is all")

    monkeypatch.setattr(processes, "_supervise", supervise)
    with pytest.raises(OSError, match="that is all"):
        tuning.tune(dataclasses.replace(made, trials=2), folder)


def test_a_space_that_is_used_up_is_told(tmp_path, monkeypatch):
    pytest.importorskip("keras_tuner")
    made = search(trials=3, space=("timesteps=1,2",))

    def supervise(folder, *arguments):
        for number in range(2):
            settings = {"timesteps": number + 1}
            ended = Trial(number=number, settings=settings, state="finished", validation_accuracy=0.5, firing_rate=0.1)
            write_trial(folder, dataclasses.replace(ended, timesteps=number + 1))

    monkeypatch.setattr(processes, "_supervise", supervise)
    told = []
    tuning.tune(made, tmp_path / "search", told=told.append)
    assert told == ["2 of 3 trials: the space has hardly any point left that was not tried"]


def test_a_taken_port_is_told_before_processes_start(tmp_path, monkeypatch):
    pytest.importorskip("keras_tuner")
    monkeypatch.setattr(processes, "_supervise", None)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        assert processes._reached(address)
        with pytest.raises(OSError, match=rf"chief cannot listen at {address}: Address already in use"):
            tuning.tune(search(), tmp_path / "search", address=address)


def test_proxies_are_not_asked_for_the_chief(opened, monkeypatch):
    _, folder = opened()
    seen = []
    monkeypatch.setenv("no_proxy", "internal")
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda command, **settings: seen.append(settings["env"]["no_proxy"])
    )
    processes._Process("worker0", folder, None, None).start("192.168.0.7:8700")
    assert seen == ["internal,localhost,127.0.0.1,192.168.0.7"]


@pytest.mark.parametrize("tuner", ["random", "optuna"])
def test_a_process_is_what_its_name_says(tuner, opened, monkeypatch):
    kerastuner = pytest.importorskip("keras_dsr.tuning.kerastuner")
    pytest.importorskip("optuna")
    made, folder = opened(tuner=tuner)
    served, beats = [], []
    monkeypatch.setattr(processes, "_beat", lambda *arguments: beats.append(arguments))
    monkeypatch.setattr(kerastuner, "serve", lambda *arguments: served.append(arguments))
    monkeypatch.setattr(processes.optuna_study, "work", lambda *arguments: served.append(arguments))
    processes.serve(folder, "worker0", "host:1", None)
    assert served == [(made, folder, "worker0", *(["host:1"] if tuner == "random" else []), None)]
    if tuner == "random":
        with pytest.raises(ValueError, match=r"needs the chief's address\. Pass --chief HOST:PORT"):
            processes.serve(folder, "worker0", None, None)

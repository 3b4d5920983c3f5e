"""Versions come, go and fail; the loader here is a stand-in."""

from __future__ import annotations

import shutil

import pytest

from keras_dsr.serving import manager as manager_module
from keras_dsr.serving.errors import Code, ServingError
from keras_dsr.serving.manager import Manager, State

pytestmark = pytest.mark.tensorflow_only


def put(base, number, text="fine"):
    folder = base / str(number)
    folder.mkdir()
    (folder / "saved_model.pb").write_text(text)


@pytest.fixture
def load():
    """Reads the file's text, and counts how often each version was read."""
    reads = []

    def read(name, path):
        reads.append(int(path.name))
        text = (path / "saved_model.pb").read_text()
        if text != "fine":
            raise ValueError(f"it says {text}")
        return text

    read.reads = reads
    return read


@pytest.fixture
def start(tmp_path, load):
    managers = []

    def make(**settings):
        manager = Manager({"m": tmp_path}, load, **{"poll": 0.02, "latest": 1, **settings})
        managers.append(manager)
        manager.start()
        return manager

    yield make
    for manager in managers:
        manager.stop()
        manager.join()


def states(manager):
    return {status.version: status.state for status in manager.status("m")}


def serves(manager):
    with manager.lease("m") as (number, _):
        return number


def test_the_newest_is_served_and_other_files_are_left_alone(tmp_path, start, load):
    for number in (2, 10, 9):
        put(tmp_path, number)
    for name in (".11-being-written", "tmp12", "-13", "14.0", "\u0661\u0665", "9" * 30):
        (tmp_path / name).mkdir()
    (tmp_path / "16").write_text("a file")
    manager = start()
    assert serves(manager) == 10
    assert load.reads == [10]
    assert states(manager) == {10: State.AVAILABLE}
    assert manager.status("m", 10)[0].code is Code.OK


def test_several_versions(tmp_path, start, until):
    for number in (1, 2, 3):
        put(tmp_path, number)
    manager = start(latest=2)
    assert states(manager) == {3: State.AVAILABLE, 2: State.AVAILABLE}
    with manager.lease("m", 2) as (number, _):
        assert number == 2
    put(tmp_path, 4)
    until(lambda: states(manager) == {4: State.AVAILABLE, 3: State.AVAILABLE, 2: State.END})


def test_a_version_in_use_stays(tmp_path, start, until):
    put(tmp_path, 1)
    manager = start()
    with manager.lease("m") as (number, loaded):
        put(tmp_path, 2)
        until(lambda: states(manager) == {2: State.AVAILABLE, 1: State.UNLOADING})
        assert serves(manager) == 2
        with pytest.raises(ServingError, match=r"Specific\(m, 1\)\. Available versions: 2"), manager.lease("m", 1):
            pass
        assert (number, loaded) == (1, "fine")
    assert states(manager) == {2: State.AVAILABLE, 1: State.END}


def test_a_broken_version_is_refused_once_and_read_again_when_it_changes(tmp_path, start, load, until):
    put(tmp_path, 1)
    manager = start()
    put(tmp_path, 2, "broken")
    until(lambda: states(manager).get(2) is State.END)
    status = manager.status("m", 2)[0]
    assert (status.code, status.message) == (Code.UNKNOWN, "ValueError: it says broken")
    assert serves(manager) == 1
    put(tmp_path, 3, "broken too")
    until(lambda: states(manager).get(3) is State.END)
    assert load.reads == [1, 2, 3]
    (tmp_path / "2" / "saved_model.pb").write_text("fine")
    until(lambda: states(manager) == {3: State.END, 2: State.AVAILABLE, 1: State.END})
    assert serves(manager) == 2
    assert load.reads == [1, 2, 3, 2]


def test_going_back(tmp_path, start, until):
    """The newest version is removed: the one before it is loaded, and only then does the newest go."""
    put(tmp_path, 1)
    put(tmp_path, 2)
    manager = start()
    shutil.rmtree(tmp_path / "2")
    until(lambda: serves(manager) == 1)
    until(lambda: states(manager) == {2: State.END, 1: State.AVAILABLE})


def test_nothing_left(tmp_path, start, until):
    put(tmp_path, 1)
    manager = start()
    shutil.rmtree(tmp_path / "1")
    until(lambda: states(manager) == {1: State.END})
    with pytest.raises(ServingError, match=r"Latest\(m\)\. Available versions: none") as error, manager.lease("m"):
        pass
    assert error.value.code is Code.NOT_FOUND


def test_a_folder_that_cannot_be_read_changes_nothing(tmp_path, start, load):
    base = tmp_path / "base"
    base.mkdir()
    put(base, 1)
    manager = Manager({"m": base}, load, poll=100, latest=1)
    manager.start()
    base.rename(tmp_path / "elsewhere")
    manager._update(manager._models["m"])
    assert serves(manager) == 1
    manager.stop()


def test_a_file_that_cannot_be_read(tmp_path, start, load, until):
    """Its version is refused as any other, and the thread goes on."""
    put(tmp_path, 1)
    manager = start()
    put(tmp_path, 2, "broken")
    (tmp_path / "2" / "loop").symlink_to("loop")
    until(lambda: states(manager).get(2) is State.END)
    (tmp_path / "2" / "saved_model.pb").write_text("fine")
    until(lambda: serves(manager) == 2)
    assert load.reads == [1, 2, 2]


def test_one_model_that_fails_keeps_no_other_from_its_versions(tmp_path, load, until, monkeypatch, caplog):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        put(tmp_path / name, 1)
    find = manager_module._versions

    def fail(folder):
        if folder.name == "a":
            raise RuntimeError("who would have thought")
        return find(folder)

    monkeypatch.setattr(manager_module, "_versions", fail)
    manager = Manager({name: tmp_path / name for name in ("a", "b")}, load, poll=0.02, latest=1)
    manager.start()
    assert manager.status("b")[0].state is State.AVAILABLE
    assert "a: looking for versions failed" in caplog.text
    put(tmp_path / "b", 2)
    until(lambda: len(manager.status("b")) == 2)
    monkeypatch.undo()
    until(lambda: manager._models["a"].status)
    manager.stop()
    manager.join()


def test_stopping_while_a_version_is_loaded_unloads_nothing(tmp_path):
    for number in (1, 2):
        put(tmp_path, number)
    manager = Manager({"m": tmp_path}, lambda name, path: path.name == "4" and manager.stop(), poll=100, latest=2)
    manager.start()
    for number in (3, 4):
        put(tmp_path, number)
    manager._update(manager._models["m"])
    assert states(manager) == dict.fromkeys((4, 2, 1), State.AVAILABLE)
    manager.join()


def test_unknown_models(tmp_path, start):
    manager = start()
    for ask in (lambda: manager.status("n"), lambda: manager.lease("n").__enter__()):
        with pytest.raises(ServingError, match="This server has: m") as error:
            ask()
        assert error.value.code is Code.NOT_FOUND
    with pytest.raises(ServingError, match="no name") as error, manager.lease(""):
        pass
    assert error.value.code is Code.INVALID_ARGUMENT
    with pytest.raises(ServingError, match="Could not find any versions of model m"):
        manager.status("m")

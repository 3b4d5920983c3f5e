"""Data sets by name: what reaches which loader, and what is refused."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
from PIL import Image

from keras_dsr import data
from keras_dsr.data import events, images


@pytest.fixture
def asked(monkeypatch):
    """What reaches the loaders, which load nothing."""
    calls = []
    for module, name in (
        (images, "cifar"),
        (images, "imagenet"),
        (images, "folder"),
        (events, "load"),
    ):
        monkeypatch.setattr(
            module, name, lambda *arguments, name=name, **named: calls.append((name, arguments, named)) or "loaded"
        )
    monkeypatch.delenv("KERAS_DSR_DATA", raising=False)
    return calls


def test_each_event_set_has_a_name():
    assert {name for name in events.DATASETS if name != "folder"} < set(data.NAMES)
    assert all(summary and "\n" not in summary for summary in data.NAMES.values())


def test_the_digits_need_nothing(tmp_path):
    digits = data.load("digits", data_dir=tmp_path, timesteps=7)
    assert digits.name == "digits"
    assert len(digits.train) == 1293


def test_a_folder_is_loaded_by_its_path(tmp_path):
    for name in ("bee", "cow"):
        (tmp_path / name).mkdir()
        for number in range(4):
            Image.fromarray(np.full((8, 8, 3), number, "uint8")).save(tmp_path / name / f"{number}.png")
    folder = data.load(f"folder:{tmp_path}")
    assert folder.name == f"folder:{tmp_path}"
    assert [len(part) for part in (folder.train, folder.validation, folder.test)] == [4, 2, 2]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cifar10", {}, ("cifar", ("cifar10", None, None, False), {})),
        (
            "cifar100",
            {"data_dir": "there", "validation": 100, "download": True},
            ("cifar", ("cifar100", "there", 100, True), {}),
        ),
        ("imagenet2012", {"data_dir": "there"}, ("imagenet", ("there", None, False), {})),
        ("imagenet", {"validation": 0}, ("imagenet", (None, 0, False), {})),
        (
            "folder:/a:b",
            {"size": (8, 9), "validation": 0.2, "skip_corrupt": True},
            ("folder", ("/a:b", (8, 9), 0.2, True), {}),
        ),
    ],
)
def test_image_sets_get_what_they_take(asked, name, arguments, expected):
    assert data.load(name, timesteps=20, **arguments) == "loaded"
    assert asked == [expected]


def test_event_sets_get_what_they_take(asked):
    assert data.load("nmnist", timesteps=10) == "loaded"
    given = {"slicing": "time", "size": (8, 9), "cache_dir": "kept", "skip_corrupt": True, "download": True}
    data.load("events:some/where", timesteps=5, sensor=(9, 9), validation=0.2, **given)
    nothing = {"slicing": "number", "size": None, "cache_dir": None, "skip_corrupt": False, "download": False}
    assert asked == [
        ("load", ("nmnist",), {"timesteps": 10, "data_dir": None, "sensor": None, **nothing}),
        (
            "load",
            ("folder",),
            {"timesteps": 5, "data_dir": "some/where", "sensor": (9, 9), "validation": 0.2, **given},
        ),
    ]


def test_an_environment_variable_says_where_data_sets_are(asked, monkeypatch):
    monkeypatch.setenv("KERAS_DSR_DATA", "elsewhere")
    data.load("cifar10")
    data.load("cifar10", data_dir="there")
    data.load("nmnist", timesteps=10)
    data.load("folder:here")
    assert [call[1][1] for call in asked[:2]] == ["elsewhere", "there"]
    assert asked[2][2]["data_dir"] == "elsewhere"
    assert asked[3][1][0] == "here"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar", {}, r"one of digits, cifar10, .*events:PATH. Received 'cifar'. Did you mean 'cifar10'"),
        ("mnist", {}, r"Received 'mnist'. Did you mean 'nmnist'"),
        ("imagent", {}, r"Did you mean .*'imagenet'"),
        ("folder", {}, r"Did you mean 'folder:PATH'"),
        ("events", {}, r"Did you mean .*'events:PATH'"),
        ("xyz", {}, r"Received 'xyz'\.$"),
        ("", {}, r"Received ''\.$"),
        ("folder:", {}, "lacks the path of a folder: folder:PATH"),
        ("events:", {}, "lacks the path of a folder: events:PATH"),
        ("folder:here", {"data_dir": "there"}, r"says where the data is. .* Received data_dir='there'"),
        ("nmnist", {}, "'nmnist' has events, which become frames. Pass timesteps"),
        ("events:here", {}, "Pass timesteps"),
        ("nmnist", {"timesteps": 5, "validation": 100}, "part of the recordings, .* for 'nmnist'. Received 100"),
        ("digits", {"validation": 100}, "parts of 'digits' are fixed. .* Received 100"),
        ("digits", {"size": (9, 9)}, r"inputs of 'digits' have one size. .* Received size=\(9, 9\)"),
        ("cifar10", {"size": (9, 9)}, r"Received size=\(9, 9\)"),
        ("digits", {"skip_corrupt": True}, "'digits' has no files of its own that could be left out"),
        ("digits_events", {"timesteps": 4, "skip_corrupt": True}, "'digits_events' has no files .*skip_corrupt=True"),
        ("cifar10", {"skip_corrupt": True}, "'cifar10' has no files of its own .* Leave skip_corrupt out"),
        ("folder:here", {"sensor": (9, 9)}, r"images and no sensor. .* Received sensor=\(9, 9\)"),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, **arguments)


def test_optional_packages_are_not_imported_for_what_does_not_need_them(monkeypatch):
    for package in ("tensorflow_datasets", "tonic"):
        monkeypatch.setitem(sys.modules, package, None)
    for module in [name for name in sys.modules if name.split(".")[:2] == ["keras_dsr", "data"]]:
        monkeypatch.delitem(sys.modules, module)
    again = importlib.import_module("keras_dsr.data")
    assert again is not data
    assert len(again.load("digits").test) == 360

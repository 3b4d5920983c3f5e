"""What the tests of searches share."""

from __future__ import annotations

import pytest
from tuning import small

from keras_dsr.tuning.search import open_folder


@pytest.fixture
def opened(tmp_path):
    """A search by its settings, with its folder."""

    def make(**settings):
        made = small.search(**settings)
        open_folder(made, tmp_path / "search")
        return made, tmp_path / "search"

    return make


@pytest.fixture
def made_up(monkeypatch):
    return small.MadeUp(monkeypatch)

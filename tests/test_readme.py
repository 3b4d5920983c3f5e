"""The README is finished, its links lead somewhere, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_dsr import analysis, layers, models

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "concepts",
            "training",
            "distribution",
            "tuning",
            "export",
            "serving",
            "performance",
            "analysis",
            "checkpoints",
        )
    ),
]
PAGES += ["CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_page_of_analysis_runs(tmp_path, monkeypatch):
    """Its snippets, one after another, on a small network; that of an export, which needs one, apart."""
    page = (ROOT / "docs" / "analysis.md").read_text()
    snippets = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "saved_model" not in each]
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    model = models.small_cnn((3,), layers.IFSpike(threshold=0.5), timesteps=3, input_shape=(4, 4, 1))
    x = np.random.default_rng(0).normal(0.5, 1, (6, 4, 4, 1)).astype("float32")
    names = {"model": model, "x": x, "x_validation": x, "labels": model.predict(x, verbose=0).argmax(axis=1)}
    for snippet in snippets:
        exec(compile(snippet, "analysis.md", "exec"), names)
    assert names["traced"].samples == 6
    assert len(names["answers"].steps) == 6
    for name in re.findall(r"analysis\.([a-zA-Z_]+)\(", page):
        assert name in analysis.__all__, name


def test_the_example_trains():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, keras.Model)
    x = np.random.default_rng(0).random((8, 28, 28, 1), dtype="float32")
    history = model.fit(x, np.arange(8) % 10, verbose=0).history
    assert np.isfinite(history["loss"][0])

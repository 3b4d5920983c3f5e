"""The README is finished, its links lead somewhere, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("concepts", "training", "export", "serving", "performance", "analysis")),
]
PAGES += ["CHANGELOG.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_example_trains():
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    model = names["model"]
    assert isinstance(model, keras.Model)
    x = np.random.default_rng(0).random((8, 28, 28, 1), dtype="float32")
    history = model.fit(x, np.arange(8) % 10, verbose=0).history
    assert np.isfinite(history["loss"][0])

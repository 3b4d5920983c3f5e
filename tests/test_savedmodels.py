"""The exported presets that are kept in `savedmodels/`: they are their presets', and give the same bits here too."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from keras_dsr import deployment
from keras_dsr.models import presets

pytestmark = pytest.mark.tensorflow_only
for package in ("onnx", "onnxruntime", "tensorflow_serving"):
    pytest.importorskip(package)

FOLDER = Path(__file__).resolve().parents[1] / "savedmodels"
if not FOLDER.is_dir():
    pytest.skip(f"no exported models at {FOLDER}", allow_module_level=True)


@pytest.mark.parametrize("name", presets.names())
def test_an_exported_preset_is_its_preset_to_the_bit(name):
    """On the real input that is kept beside it: in TensorFlow's C API and ONNX Runtime, against its copy in Keras."""
    given = deployment.source(name, data_dir=None)
    request = json.loads((FOLDER / name / "1-request.json").read_text())
    card = json.loads((FOLDER / name / "1" / "assets.extra" / "card.json").read_text())
    assert card["about"]["trained"]["preset"] == given.about["preset"], "export it again"
    dtype = "float32" if given.preprocessing is None else given.preprocessing.dtype
    examples = np.array(request["instances"], dtype)
    report = deployment.verify(dataclasses.replace(given, examples=examples), FOLDER / name / "1")
    assert report.flip_budget == 0
    required = [row for row in report.rows if row.required]
    assert {row.file for row in required} == {f"{name}/1", "1.onnx"}
    assert all(row.passed and row.bit_equal for row in required)

"""Whether arrays fit what a function takes."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow_only
tensors = pytest.importorskip("keras_dsr.export.tensors")

EXPECTED = {
    "image": tensors.Tensor((None, 3), "float32"),
    "potential": tensors.Tensor((None, 2), "float32"),
    "scale": tensors.Tensor((), "float32"),
    "anything": tensors.Tensor(None, "float32"),
    "fixed": tensors.Tensor((1, 2), "float32"),
}


def arrays(**others):
    return {
        "image": np.arange(15, dtype="float32").reshape(5, 3),
        "potential": np.zeros((5, 2), "float32"),
        "scale": np.float32(2),
        "anything": np.zeros((7, 1), "float32"),
        "fixed": np.zeros((1, 2), "float32"),
        **others,
    }


def test_arrays_lie_in_memory_row_by_row():
    image = np.arange(15, dtype="float32").reshape(3, 5).T
    received = tensors.check_inputs("step", EXPECTED, arrays(image=image))
    assert list(received) == list(EXPECTED)
    assert received["image"].flags.c_contiguous
    np.testing.assert_array_equal(received["image"], image)


@pytest.mark.parametrize("order", "<>")
def test_arrays_are_in_the_byte_order_of_the_machine(order):
    image = arrays()["image"]
    received = tensors.check_inputs("step", EXPECTED, arrays(image=image.astype(f"{order}f4")))["image"]
    assert received.dtype.isnative
    assert received.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            {"more": 1},
            r"^step takes the inputs \['anything', 'fixed', 'image', 'potential', 'scale'\]. Received .*more",
        ),
        ({"image": np.zeros((5, 3), "int64")}, r"takes 'image' as float32. Received int64; convert it by"),
        ({"image": np.zeros((5, 4), "float32")}, r"of shape \(None, 3\). Received shape \(5, 4\)"),
        (
            {"potential": np.zeros((1, 2), "float32")},
            r"as many samples .* of each input. Received {'image': 5, 'potential': 1}",
        ),
    ],
)
def test_what_does_not_fit_is_refused(others, message):
    with pytest.raises(ValueError, match=message):
        tensors.check_inputs("step", EXPECTED, arrays(**others))

"""SavedModels in TensorFlow's C API."""

from __future__ import annotations

import concurrent.futures
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow_only
tf = pytest.importorskip("tensorflow")
c_api = pytest.importorskip("keras_dsr.export.c_api")


class Sums(tf.Module):
    """A signature of each kind: several inputs and dtypes, a variable, a failure, strings."""

    def __init__(self):
        super().__init__()
        self.weight = tf.Variable([[2.0, 0.5], [1.0, -1.0]])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, "x"), tf.TensorSpec([], tf.int64, "n")])
    def product(self, x, n):
        return {"product": x @ self.weight, "sum": tf.cast(n, tf.float32) + tf.reduce_sum(x), "next": n + 1}

    @tf.function(input_signature=[tf.TensorSpec(None, tf.uint8, "x"), tf.TensorSpec([None], tf.bfloat16, "half")])
    def dtypes(self, x, half):
        return {"bool": x > 3, "half": half * 2, "int8": tf.cast(x, tf.int8), "double": tf.cast(x, tf.float64)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "x")])
    def failing(self, x):
        with tf.control_dependencies([tf.debugging.assert_positive(x, "must be positive")]):
            return {"y": tf.identity(x)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "x")])
    def strings(self, x):
        return {"y": tf.strings.length(x)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sums")
    module = Sums()
    signatures = {name: getattr(module, name) for name in ("product", "dtypes", "failing", "strings")}
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


@pytest.fixture(scope="module")
def session(folder):
    with c_api.Session(folder) as session:
        yield session


def test_signatures_say_what_they_take_and_give(session, folder):
    assert sorted(session.signatures) == ["dtypes", "failing", "product", "strings"]
    signature = session.signatures["product"]
    assert signature.inputs == {"n": c_api.Tensor((), "int64"), "x": c_api.Tensor((None, 2), "float32")}
    assert {name: tensor.dtype for name, tensor in signature.outputs.items()} == {
        "next": "int64",
        "product": "float32",
        "sum": "float32",
    }
    assert session.signatures["dtypes"].inputs["x"].shape is None
    assert c_api.signatures(folder) == session.signatures


def test_a_table_worked_by_hand(session):
    outputs = session.run("product", {"x": np.array([[1, 2], [3, 4], [0, 0]], "float32"), "n": np.int64(7)})
    np.testing.assert_array_equal(outputs["product"], [[4, -1.5], [10, -2.5], [0, 0]])
    assert outputs["sum"] == 17
    assert outputs["next"] == 8
    assert outputs["sum"].shape == ()


@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0, 2)])
def test_dtypes_and_shapes(session, shape):
    x = np.arange(np.prod(shape, dtype=int), dtype="uint8").reshape(shape)
    half = tf.constant([0.5, 3.0], tf.bfloat16).numpy()
    outputs = session.run("dtypes", {"x": x, "half": half})
    np.testing.assert_array_equal(outputs["bool"], x > 3)
    np.testing.assert_array_equal(outputs["half"].astype("float32"), [1, 6])
    np.testing.assert_array_equal(outputs["int8"], x)
    assert [outputs[name].dtype.name for name in ("bool", "half", "int8", "double")] == [
        "bool",
        "bfloat16",
        "int8",
        "float64",
    ]
    assert outputs["double"].shape == shape


def test_inputs_need_not_lie_in_order(session):
    x = np.arange(12, dtype="float32").reshape(2, 6).T[::2]
    expected = session.run("product", {"x": x.copy(), "n": np.int64(0)})["product"]
    np.testing.assert_array_equal(session.run("product", {"x": x, "n": np.int64(0)})["product"], expected)


@pytest.mark.parametrize(
    ("signature", "tensors", "message"),
    [
        ("other", {}, r"has the signatures dtypes, failing, product, strings. Received 'other'"),
        ("product", {"x": np.zeros((1, 2), "float32")}, r"takes the inputs \['n', 'x'\]. Received \['x'\]"),
        ("product", {"x": np.zeros((1, 2)), "n": np.int64(0)}, r"'x' as float32. Received float64; convert it"),
        ("product", {"x": np.zeros((1, 3), "float32"), "n": np.int64(0)}, r"\(None, 2\). Received shape \(1, 3\)"),
        ("product", {"x": np.zeros((2,), "float32"), "n": np.int64(0)}, r"\(None, 2\). Received shape \(2,\)"),
        ("strings", {"x": np.array(["a"])}, r"tensors of strings, which are not passed here: \['x'\]"),
    ],
)
def test_bad_input(session, signature, tensors, message):
    with pytest.raises(ValueError, match=message):
        session.run(signature, tensors)


def test_a_failure_in_the_graph_is_told_and_does_no_harm(session):
    with pytest.raises(RuntimeError, match=r"failed to run 'failing' of .*must be positive"):
        session.run("failing", {"x": np.array([1, -1], "int32")})
    np.testing.assert_array_equal(session.run("failing", {"x": np.array([1], "int32")})["y"], [1])


def test_many_threads_at_once(session):
    inputs = [np.full((3, 2), number, "float32") for number in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: session.run("product", {"x": x, "n": np.int64(0)})["product"], inputs))
    for x, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, x @ [[2.0, 0.5], [1.0, -1.0]])


def test_a_closed_session_is_closed(folder):
    session = c_api.Session(folder)
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="is closed"):
        session.run("product", {})


def test_what_is_no_saved_model(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no SavedModel in .*nothing"):
        c_api.Session(tmp_path / "nothing")
    (tmp_path / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match=r"saved_model.pb is not the graph of a SavedModel, or is damaged"):
        c_api.Session(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no graph with the tag 'serve'"):
        c_api.Session(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes((folder / "saved_model.pb").read_bytes())
    with c_api.Session(tmp_path) as session, pytest.raises(RuntimeError, match="failed to run 'product'"):
        session.run("product", {"x": np.zeros((1, 2), "float32"), "n": np.int64(0)})  # there are no variables


@pytest.mark.parametrize("kept", [0, 10])
def test_damaged_variables_are_refused(kept, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    variables = copy / "variables" / "variables.data-00000-of-00001"
    variables.write_bytes(variables.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"failed to load .*copy: (.|\n)* It is damaged, .*export it again"):
        c_api.Session(copy)


def test_without_the_library_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(tf.sysconfig, "get_lib", lambda: str(tmp_path))
    c_api._library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"C API is not in this installation of TensorFlow"):
            c_api._library()
    finally:
        c_api._library.cache_clear()

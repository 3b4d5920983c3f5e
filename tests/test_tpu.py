"""What is found of a training step before it sees a TPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys

import helpers
import keras
import pytest

from keras_dsr import cli, recipes

pytest.importorskip("jax")
from keras_dsr import tpu

JAX_ONLY = pytest.mark.skipif(helpers.BACKEND != "jax", reason="training steps are compiled for TPUs by JAX")
TINY = dataclasses.replace(recipes.get("digits"), widths=(4,), timesteps=2, batch_size=8)

# As XLA writes it: a data-parallel step whose loop over time steps exchanges something in each turn.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (x: f32[4]) -> f32[4] {
  %x = f32[4]{0:T(128)} parameter(0)
  ROOT %all-reduce.2 = f32[4]{0:T(128)} all-reduce(%x), to_apply=%add, metadata={op_name="jit(step)/while/psum"}
}

%body.1 (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state = (s32[], f32[4]) parameter(0)
  %y = f32[4]{0} get-tuple-element(%state), index=1
  ROOT %called = f32[4]{0} fusion(%y), kind=kLoop, calls=%inner
}

%condition.1 (state.1: (s32[], f32[4])) -> pred[] {
  %state.1 = (s32[], f32[4]) parameter(0)
  ROOT %less = pred[] constant(false)
}

ENTRY %main (p: f32[4], q: f32[2,3]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %q = f32[2,3]{1,0} parameter(1)
  %all-reduce-start.1 = (f32[4]{0}, /*index=1*/f32[2,3]{1,0}) all-reduce-start(%p, %q), to_apply=%add
  %all-reduce-done.1 = f32[4]{0} all-reduce-done(%all-reduce-start.1)
  %all-gather.7 = f32[8]{0} all-gather(%p), dimensions={0}, metadata={op_name="jit(step)/gather"}
  %loop = (s32[], f32[4]) while(%p), condition=%condition.1, body=%body.1
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_collectives_are_read_from_a_program():
    found = tpu.collectives_of(PROGRAM)
    assert sorted((each.kind, each.shapes, each.in_loop, each.source) for each in found) == [
        ("all-gather", "f32[8]", False, "jit(step)/gather"),
        ("all-reduce", "(f32[4], f32[2,3])", False, ""),
        ("all-reduce", "f32[4]", True, "jit(step)/while/psum"),
    ]


def finding(**changes):
    single = tpu.Collective("all-reduce", "f32[4]", False, "")
    return dataclasses.replace(tpu.Readiness("net", "v5e:2x2", 4, 8, (), (), None, (single,), 1.0, 2.0), **changes)


def test_what_counts_as_ready(tmp_path):
    assert finding().ready
    assert finding().lines()[-1].endswith("1 all-reduce; within loops over time steps: 0")
    looped = finding(collectives=(tpu.Collective("all-reduce", "f32[4]", True, ""),))
    for other in (looped, finding(dynamic=("output of layer 'x'",)), finding(error="no", refused=("eig(f32[2,2])",))):
        assert not other.ready
        assert other.lines()[0].endswith("not ready")
    tpu.write(tmp_path / "report.json", [finding(), looped])
    assert [row["ready"] for row in json.loads((tmp_path / "report.json").read_text())] == [True, False]


@pytest.mark.tensorflow_only
def test_on_tensorflow_it_says_what_to_set(capsys):
    with pytest.raises(ValueError, match=r"compiled for TPUs by JAX\. Set KERAS_BACKEND=jax"):
        tpu.check(TINY)
    assert cli.main(["check-tpu", "digits"]) == 1
    assert "Set KERAS_BACKEND=jax" in capsys.readouterr().err


@JAX_ONLY
def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-dsr\[tpu\]'"):
        tpu.check(TINY)
    with pytest.raises(ValueError, match="given together"):
        tpu.check(TINY, classes=10)


@pytest.fixture
def compiler():
    if helpers.BACKEND != "jax":
        pytest.skip("training steps are compiled for TPUs by JAX")
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPUs' compiler, libtpu, is not installed")


def test_a_step_compiles_and_exchanges_nothing_in_loops(compiler, tmp_path, capsys):
    path = tmp_path / "report.json"
    settings = [word for pair in ("widths=4", "batch_size=8") for word in ("--set", pair)]
    assert cli.main(["check-tpu", "digits", *settings, "--set", "timesteps=2", "--report", str(path)]) == 0
    assert "ready" in capsys.readouterr().out
    (two,) = json.loads(path.read_text())
    (more,) = tpu.check(dataclasses.replace(TINY, timesteps=5))
    assert two["replicas"] == more.replicas == 4
    assert more.ready
    assert more.memory_mb > 0
    # Statistics of two normalizations, forwards and backwards, and the gradients: as many whatever N is.
    kinds = [each["kind"] for each in two["collectives"]]
    assert kinds.count("all-reduce") >= 3
    assert sorted(kinds) == sorted(each.kind for each in more.collectives)


def classifier(hidden, shape=(4,)):
    inputs = keras.Input(shape)
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(hidden(inputs))))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def test_operations_that_do_not_compile_are_listed(compiler):
    import jax

    class Eigenvalues(keras.layers.Layer):
        def call(self, x):
            outer = jax.lax.stop_gradient(x[:, :, None] * x[:, None, :])
            return x + keras.ops.cast(keras.ops.real(jax.numpy.linalg.eigvals(outer)), "float32")

    found = tpu.check_model(classifier(Eigenvalues()), 8)
    assert not found.ready
    assert found.error
    assert [each.split("(")[0] for each in found.refused] == ["eig"]
    assert "refused: eig(" in "\n".join(found.lines())


@JAX_ONLY
def test_a_step_that_cannot_be_traced_is_a_finding():
    """That needs no compiler for TPUs."""
    import jax
    import numpy as np

    class Broken(keras.layers.Layer):
        def call(self, x):
            if x.shape[0] == 8:  # of the step, and of nothing before it
                raise RuntimeError("eight are too many")
            return x

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("batch",))
    found = tpu._check(classifier(Broken()), "broken", 8, "none", mesh, [])
    assert not found.ready
    assert "eight are too many" in found.error
    assert found.refused == ()


def test_shapes_that_are_not_fixed_are_listed(compiler):
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(inputs)))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = tpu.check_model(model, 8)
    assert not found.ready
    assert len(found.dynamic) == 1
    assert str((None, None, 4)) in found.dynamic[0]


def test_what_does_not_fit_a_topology(compiler):
    with pytest.raises(ValueError, match=r"evenly over the 4 cores of v5e:2x2\. Received batch_size=6"):
        tpu.check_model(classifier(keras.layers.Dense(2)), 6)
    with pytest.raises(ValueError, match="There is no TPU topology 'v5e:3'"):
        tpu.check(TINY, topology="v5e:3")

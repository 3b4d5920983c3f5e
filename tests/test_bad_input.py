"""What users get wrong, and what the error says of it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import helpers
import keras
import numpy as np
import pytest
from keras import ops

import keras_dsr
from keras_dsr import layers
from keras_dsr.layers import IFSpike, LIFSpike
from keras_dsr.stream import Stream


def zeros(*shape, dtype="float32"):
    return ops.zeros(shape, dtype)


def stream(steps=8):
    return Stream(zeros(2, steps, 4), zeros(2, 4))


ARGUMENTS = {
    "timesteps_negative": (lambda: IFSpike(timesteps=-1), ValueError, "number of time steps N >= 1.*timesteps=-1"),
    "timesteps_fraction": (lambda: IFSpike(timesteps=1.5), TypeError, "whole number of steps.*timesteps=1.5"),
    "timesteps_bool": (lambda: IFSpike(timesteps=True), ValueError, "timesteps=True"),
    "threshold_zero": (lambda: IFSpike(threshold=0.0), ValueError, "finite and above 0.*threshold=0.0"),
    "threshold_negative": (lambda: IFSpike(threshold=-1.0), ValueError, "finite and above 0.*threshold=-1.0"),
    "threshold_nan": (lambda: IFSpike(threshold=math.nan), ValueError, "finite and above 0.*threshold=nan"),
    "threshold_infinite": (lambda: LIFSpike(threshold=math.inf), ValueError, "finite and above 0.*threshold=inf"),
    "threshold_below_bound": (
        lambda: IFSpike(threshold=0.5, threshold_lower_bound=0.75),
        ValueError,
        "must not be below its lower bound.*threshold=0.5.*threshold_lower_bound=0.75.*lower the bound",
    ),
    "bound_zero": (lambda: IFSpike(threshold_lower_bound=0.0), ValueError, "above 0.*threshold_lower_bound=0.0"),
    "bound_nan": (lambda: IFSpike(threshold_lower_bound=math.nan), ValueError, "threshold_lower_bound=nan"),
    "alpha_low": (lambda: IFSpike(alpha=-0.1), ValueError, r"must be in \[0, 1\].*alpha=-0.1"),
    "alpha_high": (lambda: IFSpike(alpha=1.1), ValueError, r"must be in \[0, 1\].*alpha=1.1"),
    "alpha_nan": (lambda: LIFSpike(alpha=math.nan), ValueError, r"must be in \[0, 1\].*alpha=nan"),
    "tau_zero": (lambda: LIFSpike(tau=0), ValueError, "tau is a time constant above 0.*tau=0"),
    "tau_negative": (lambda: LIFSpike(tau=-1.0), ValueError, "tau is a time constant above 0.*tau=-1.0"),
    "dt_zero": (lambda: LIFSpike(dt=0.0), ValueError, "dt is the length of a time step.*dt=0.0"),
    "dt_as_tau": (lambda: LIFSpike(tau=1.0, dt=1.0), ValueError, "dt must be smaller than tau.*dt=1.0, tau=1.0"),
    "dt_above_tau": (lambda: LIFSpike(tau=0.5, dt=1.0), ValueError, "dt must be smaller than tau"),
    "l2_negative": (lambda: IFSpike(threshold_l2=-1.0), ValueError, "threshold_l2 must be finite and not below 0"),
    "gradient_scale_nan": (
        lambda: IFSpike(threshold_gradient_scale=math.nan),
        ValueError,
        "threshold_gradient_scale must be finite.*nan",
    ),
    "corner_negative": (lambda: LIFSpike(corner_width=-0.1), ValueError, "corner_width.*not below 0.*=-0.1"),
    "corner_nan": (lambda: IFSpike(corner_width=math.nan), ValueError, "corner_width.*must be finite.*=nan"),
    "loop": (lambda: IFSpike(loop="scan"), ValueError, "loop must be one of.*unrolled.*while.*'scan'"),
    "unknown_argument": (lambda: IFSpike(treshold=1.0), (TypeError, ValueError), "treshold"),
    "unknown_argument_lif": (lambda: LIFSpike(v_th=1.0), (TypeError, ValueError), "v_th"),
    "if_has_no_tau": (lambda: IFSpike(tau=1.0), (TypeError, ValueError), "tau"),
}

CALLS = {
    "if_on_a_vector": (
        lambda: IFSpike()(zeros(8)),
        ValueError,
        r"IFSpike 'if_spike' expects \(batch, time, \.\.\.\).*\(8,\).*For a static input pass timesteps",
    ),
    "if_without_timesteps": (
        lambda: IFSpike()(zeros(4, 5)),
        ValueError,
        r"expects \(batch, time, \.\.\.\).*\(4, 5\).*For a static input pass timesteps",
    ),
    "if_without_timesteps_symbolic": (
        lambda: IFSpike()(keras.Input((5,))),
        ValueError,
        r"\(None, 5\).*For a static input pass timesteps",
    ),
    "vector_with_timesteps": (
        lambda: IFSpike(timesteps=4)(zeros(8)),
        ValueError,
        r"with timesteps=4 expects a static input \(batch, \.\.\.\).*\(8,\)",
    ),
    "no_time_steps": (lambda: IFSpike()(zeros(4, 0, 5)), ValueError, r"at least one time step.*\(4, 0, 5\)"),
    "other_timesteps": (
        lambda: IFSpike(timesteps=4)(stream(8)),
        ValueError,
        "has timesteps=4, but the stream that it received has 8 time steps. Leave timesteps out",
    ),
    "integers": (
        lambda: IFSpike(timesteps=2)(zeros(4, 5, dtype="int32")),
        TypeError,
        "expects floats. Received dtype int32; cast the input first",
    ),
    "integers_in_time": (lambda: LIFSpike()(zeros(4, 3, 5, dtype="uint8")), TypeError, "expects floats.*uint8"),
    "integers_symbolic": (
        lambda: IFSpike()(keras.Input((3, 5), dtype="int32")),
        TypeError,
        "expects floats. Received dtype int32",
    ),
    "unrolled_unknown_time": (
        lambda: IFSpike(loop="unrolled")(keras.Input((None, 5))),
        ValueError,
        "unrolls its time loop and so must know.*loop='while'",
    ),
    "unrolled_unknown_time_of_a_stream": (
        lambda: LIFSpike(loop="unrolled")(layers.ToStream()(keras.Input((None, 5)))),
        ValueError,
        "unrolls its time loop and so must know.*loop='while'",
    ),
    "three_parts": (
        lambda: IFSpike()((zeros(2, 3, 4), zeros(2, 4), zeros(2, 4))),
        ValueError,
        "expects one stream",
    ),
}


@pytest.mark.parametrize("case", [*ARGUMENTS, *CALLS])
def test_error_says_what_is_wrong(case):
    call, error, message = {**ARGUMENTS, **CALLS}[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("make", [LIFSpike, IFSpike])
def test_range_ends_are_allowed(make):
    for alpha in (0, 1):
        assert make(alpha=alpha).alpha == alpha
    assert make(threshold=0.5, threshold_lower_bound=0.5).threshold_lower_bound == 0.5


def poisoned_model(jit_compile, callbacks=()):
    """Fits a model whose threshold gets a NaN gradient, from a NaN that the clamp lets through downstream."""
    inputs = keras.Input((4,))
    x = IFSpike(threshold=1.0, timesteps=2, name="poisoned")(inputs)
    model = keras.Model(inputs, layers.SpikeRep()(layers.Synapse(keras.layers.Dense(1))(x)))
    model.compile(keras.optimizers.SGD(0.1), "mean_squared_error", jit_compile=jit_compile)
    return model.fit(
        np.full((4, 4), 3.0, "float32"),
        np.full((4, 1), np.nan, "float32"),
        batch_size=4,
        verbose=0,
        callbacks=list(callbacks),
    )


@pytest.mark.tensorflow_only
def test_constraint_names_the_layer_of_a_nan_threshold():
    import tensorflow as tf

    with pytest.raises(tf.errors.InvalidArgumentError, match="threshold of IFSpike 'poisoned' is no longer a finite"):
        poisoned_model(jit_compile=False)


@pytest.mark.parametrize(
    "jit_compile",
    [pytest.param(False, marks=pytest.mark.skipif(helpers.BACKEND == "tensorflow", reason="above")), True],
)
def test_callback_names_the_layer_of_a_nan_threshold(jit_compile):
    with pytest.raises(ValueError, match=r"threshold of IFSpike 'poisoned' is no longer a finite.*learning rate"):
        poisoned_model(jit_compile, [keras_dsr.callbacks.CheckFinite()])


@pytest.mark.filterwarnings("error")
def test_callback_is_quiet_about_finite_thresholds():
    inputs = keras.Input((4,))
    outer = keras.Sequential(
        [keras.Input((4,)), keras.Model(inputs, layers.SpikeRep()(IFSpike(1.0, timesteps=2)(inputs)))]
    )
    outer.compile(keras.optimizers.SGD(0.1), "mean_squared_error")
    history = outer.fit(
        np.full((4, 4), 0.5, "float32"),
        np.zeros((4, 4), "float32"),
        verbose=0,
        callbacks=[keras_dsr.callbacks.CheckFinite()],
    )
    assert math.isfinite(history.history["loss"][0])


def test_callback_looks_into_sub_models():
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, layers.SpikeRep()(IFSpike(1.0, timesteps=2, name="inner")(inputs)))
    outer = keras.Sequential([keras.Input((4,)), inner])
    inner.get_layer("inner").threshold.assign(np.nan)
    callback = keras_dsr.callbacks.CheckFinite()
    callback.set_model(outer)
    with pytest.raises(ValueError, match="threshold of IFSpike 'inner'"):
        callback.on_epoch_end(0)


@pytest.mark.skipif(helpers.BACKEND == "tensorflow", reason="there it is an InvalidArgumentError")
def test_constraint_outside_of_a_compiled_step():
    with pytest.raises(ValueError, match="threshold of X is no longer a finite number"):
        keras_dsr.constraints.LowerBound(0.5, "threshold of X")(ops.array(np.inf))


@pytest.mark.parametrize("imports", ["", "import keras_dsr\n"], ids=["without", "with"])
def test_loading_needs_this_package_imported(imports, tmp_path):
    """Keras does not import the module that the file names; its error says so, and which class is missing."""
    model = keras_dsr.models.small_cnn(widths=(2,), timesteps=2, classes=2)
    model.save(tmp_path / "model.keras")
    x = np.full((1, 8, 8, 1), 0.5, "float32")
    script = (
        f"{imports}import keras, numpy\n"
        f"model = keras.saving.load_model({str(tmp_path / 'model.keras')!r})\n"
        "print(model.predict(numpy.full((1, 8, 8, 1), 0.5, 'float32'), verbose=0).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    )
    if not imports:
        assert done.returncode != 0
        assert re.search(
            r"Could not locate class 'IFSpike'.*imported.*keras_dsr\.layers\.neurons", done.stderr, re.DOTALL
        )
        return
    assert done.returncode == 0, done.stderr[-2000:]
    received = np.array(json.loads(done.stdout.strip().splitlines()[-1]))
    np.testing.assert_allclose(received, model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)

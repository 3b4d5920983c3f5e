"""IFSpike and LIFSpike: by hand, against the released code, against NumPy, as identities, as Keras layers."""

from __future__ import annotations

import itertools
import json
import math

import helpers
import keras
import numpy as np
import pytest
from helpers import numpy, with_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_dsr import backend, layers
from keras_dsr.stream import Stream

LN2 = math.log(2.0)
JIT = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
LOOP = pytest.mark.parametrize("loop", ["unrolled", "while"])
KIND = pytest.mark.parametrize("kind", ["if", "lif"])

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def neuron(kind, **kwargs):
    """A neuron whose threshold few steps reach."""
    if kind == "if":
        return layers.IFSpike(**{"threshold": 1.0, "alpha": 0.5, **kwargs})
    return layers.LIFSpike(**{"threshold": 0.5, "alpha": 0.75, "tau": 2.0, "dt": 0.5, **kwargs})


@LOOP
@JIT
@pytest.mark.parametrize(
    ("alpha", "fired"),
    [
        # U:  0.25 0.5 0.25 -0.25 1.25 2.25
        (0.5, [0, 1, 0, 0, 1, 1]),
        # U:  0.25 0.5 1.25 -0.25 1.25 2.25
        (1.0, [0, 0, 1, 0, 1, 1]),
        # U:  0.25 -0.5 -0.75 -1.25 -0.75 1.25 after the resets of alpha 0.25
        (0.25, [1, 0, 1, 0, 1, 1]),
    ],
)
def test_if_by_hand(alpha, fired, loop, jit):
    current = np.array([0.25, 0.25, 0.75, -0.5, 1.5, 2.0], "float32").reshape(1, 6, 1)
    layer = layers.IFSpike(threshold=1.0, alpha=alpha, loop=loop)
    layer.build(current.shape)
    spikes = helpers.compiled(layer, jit)(ops.convert_to_tensor(current))
    np.testing.assert_array_equal(numpy(spikes)[0, :, 0], fired)


def test_if_scales_its_spikes_by_the_threshold():
    # Threshold 2 sees currents twice as large as threshold 1.
    current = np.array([0.5, 0.5, 1.5, -1.0, 3.0, 4.0], "float32").reshape(1, 6, 1)
    spikes = layers.IFSpike(threshold=2.0, alpha=0.5)(current)
    np.testing.assert_array_equal(numpy(spikes)[0, :, 0], [0, 2, 0, 0, 2, 2])


@LOOP
@JIT
def test_lif_by_hand(loop, jit):
    # lambda = 1/2. U: 1 (a tie, fires) 0.5 1.75 0.875 2.4375; V: 0 0.5 0.75 0.875 1.4375.
    current = np.array([2.0, 1.0, 3.0, 1.0, 4.0], "float32").reshape(1, 5, 1)
    layer = layers.LIFSpike(threshold=1.0, alpha=1.0, tau=1.0, dt=LN2, loop=loop)
    stream = layers.ToStream(layer.coding)(current)
    layer.build([(1, 5, 1), (1, 1)])
    values, representation = helpers.compiled(layer, jit)(stream)
    np.testing.assert_allclose(numpy(values)[0, :, 0], np.array([1, 0, 1, 0, 1]) / LN2, rtol=1e-6)
    # Weights 1, 2, 4, 8, 16 of 31.
    np.testing.assert_allclose(numpy(representation), [[21 / 31 / LN2]], rtol=1e-6)


@JIT
@pytest.mark.parametrize(
    ("layer", "representation", "dx", "dthreshold"),
    [
        # Both ends of the clamp pass for IF: 0 <= r <= 1.
        (layers.IFSpike(threshold=1.0), [-1, 0, 0.5, 1, 2], [0, 1, 1, 1, 0], 1.0),
        # For LIF they do not: 0 < r / 2 < 1 / 0.5. The threshold: 1 / dt from 4 and from 5, times dt^2.
        (layers.LIFSpike(1.0, tau=2.0, dt=0.5), [-1, 0, 1, 4, 5], [0, 0, 0.5, 0, 0], 1.0),
        (layers.LIFSpike(1.0, tau=2.0, dt=0.5, threshold_gradient_scale=1.0), [-1, 0, 1, 4, 5], [0, 0, 0.5, 0, 0], 4.0),
    ],
    ids=["if", "lif", "lif_chain_rule"],
)
def test_gradient_by_hand(layer, representation, dx, dthreshold, jit):
    layer = layer.from_config(layer.get_config())
    representation = np.array([representation], "float32")
    values = np.repeat(representation[:, None], 3, axis=1)
    layer.build([values.shape, representation.shape])

    def function(threshold, values, representation):
        out = with_weights([layer.threshold], [threshold], layer, Stream(values, representation))
        return ops.sum(out.representation) + ops.sum(out.values), out

    _, _, grads = helpers.value_and_grads(function, np.float32(1.0), values, representation, jit=jit)
    np.testing.assert_allclose(grads[0], dthreshold, rtol=1e-6)
    np.testing.assert_array_equal(grads[1], np.zeros_like(values))
    np.testing.assert_allclose(grads[2], [dx], rtol=1e-6)


@pytest.fixture(scope="module")
def golden(golden_dir):
    cases = json.loads((golden_dir / "neurons.json").read_text())
    return {case["tag"]: case for case in cases}, dict(np.load(golden_dir / "neurons.npz"))


@JIT
@pytest.mark.parametrize("tag", [f"n{index}" for index in range(60)])
def test_released_neurons(tag, jit, golden):
    """All that must match; the released LIF weights a cotangent that varies over time twice, where ours follows the
    chain rule of Eqs. 16 and 17.
    """
    cases, arrays = golden
    assert set(cases) == {f"n{index}" for index in range(60)}
    case = cases[tag]
    x, upstream = arrays[f"{tag}__x"], arrays[f"{tag}__upstream"]
    common = {"threshold": case["threshold"], "alpha": case["alpha"], "threshold_lower_bound": 1e-4}
    if case["kind"] == "if":
        layer = layers.IFSpike(**common)
    else:
        layer = layers.LIFSpike(tau=case["tau"], dt=case["dt"], **common)
    layer.build(x.shape)

    def function(threshold, x):
        spikes = with_weights([layer.threshold], [threshold], layer, x)
        return ops.sum(spikes * upstream), (spikes, layers.SpikeRep(layer.coding)(spikes))

    _, (spikes, representation), (dthreshold, dx) = helpers.value_and_grads(
        function, np.float32(case["threshold"]), x, jit=jit
    )
    np.testing.assert_array_equal(spikes != 0, arrays[f"{tag}__spikes"] != 0)
    np.testing.assert_allclose(spikes, arrays[f"{tag}__spikes"], rtol=1e-6)
    np.testing.assert_allclose(representation, arrays[f"{tag}__rep"], rtol=1e-6, atol=1e-6)

    if case["kind"] == "if":
        np.testing.assert_allclose(dx, arrays[f"{tag}__dx"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dthreshold, arrays[f"{tag}__dthreshold"], rtol=1e-5, atol=1e-6)
        return
    if case["upstream"] == "uniform":
        np.testing.assert_allclose(dx.sum(axis=1), arrays[f"{tag}__dx"].sum(axis=1), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(dthreshold, arrays[f"{tag}__dthreshold"], rtol=1e-5, atol=1e-5)
    weights = np.exp(-case["dt"] / case["tau"]) ** np.arange(x.shape[1])[::-1]
    weights = (weights / weights.sum())[:, None]
    scaled = (x * weights).sum(axis=1) / case["tau"]
    bound = case["threshold"] / case["dt"]
    total = upstream.sum(axis=1, dtype="float64")
    inside = (scaled > 0) & (scaled < bound)
    np.testing.assert_allclose(dx, weights * (total * inside / case["tau"])[:, None], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(dthreshold, case["dt"] * total[scaled >= bound].sum(), rtol=1e-5, atol=1e-5)


class Oracle:
    """A neuron in NumPy, from the equations, with every rounding of the given precision."""

    def __init__(self, layer, kind, precision):
        self.kind = kind
        self.threshold = np.asarray(layer.initial_threshold, precision)
        self.alpha = np.asarray(layer.alpha, precision)
        self.precision = precision
        self.tau, self.dt = (1.0, 1.0) if kind == "if" else (layer.tau, layer.dt)

    def simulate(self, current):
        """Whether a neuron fires, (batch, time, ...), and the final potential."""
        decay = np.asarray(1.0 if self.kind == "if" else np.exp(-self.dt / self.tau), self.precision)
        gain = np.asarray(1.0, self.precision) if self.kind == "if" else np.asarray(1.0, self.precision) - decay
        potential = np.zeros_like(current[:, 0])
        fired = np.zeros(current.shape, bool)
        for n in range(current.shape[1]):
            potential = decay * potential + gain * current[:, n]
            fired[:, n] = potential >= self.alpha * self.threshold
            potential = potential - self.threshold * fired[:, n].astype(self.precision)
        return fired, potential

    def weights(self, timesteps):
        powers = np.exp(-self.dt / self.tau) ** np.arange(timesteps)[::-1] if self.kind == "lif" else np.ones(timesteps)
        return powers / powers.sum()

    def represent(self, values):
        return np.einsum("t,bt...->b...", self.weights(values.shape[1]), values.astype("float64"))

    def spike(self):
        return float(self.threshold) / self.dt

    def gradient(self, representation, upstream):
        """Of the clamp: by the representation and by the threshold (the layer's scale, dt^2 for LIF, included)."""
        scaled, bound = representation / self.tau, self.spike()
        if self.kind == "if":
            passes, above = (scaled >= 0) & (scaled <= bound), scaled > bound
        else:
            passes, above = (scaled > 0) & (scaled < bound), scaled >= bound
        return upstream * passes / self.tau, self.dt * np.sum(upstream * above)


def away_from_the_ends(oracle, representation):
    """Where rounding cannot move the representation over an end of the clamp."""
    scaled, bound = representation / oracle.tau, oracle.spike()
    return np.minimum(np.abs(scaled), np.abs(scaled - bound)) > 0.02 * bound


PRECISION = {
    "float32": ("float32", 1e-6),
    "float64": ("float64", 1e-7),  # the threshold's value is a float32's
    "bfloat16": ("bfloat16", 2**-6),
    "mixed_bfloat16": ("bfloat16", 2**-6),
    "mixed_float16": ("float16", 2**-9),
}
# form, time steps, dtype: streams most, since that is what networks are made of.
GRID = [
    *(("stream", timesteps, "float32") for timesteps in (1, 2, 5, 9)),
    *((form, timesteps, "float32") for form in ("tensor", "static") for timesteps in (1, 5)),
    *(("stream", 5, dtype) for dtype in ("bfloat16", "mixed_bfloat16", "mixed_float16")),
    pytest.param("stream", 5, "float64", marks=pytest.mark.tensorflow_only),
    ("tensor", 5, "mixed_bfloat16"),
]


@JIT
@LOOP
@pytest.mark.parametrize(("form", "timesteps", "dtype"), GRID)
@KIND
def test_against_numpy(kind, timesteps, dtype, form, loop, jit):
    layer = neuron(kind, dtype=dtype, loop=loop, timesteps=timesteps if form == "static" else None)
    compute, tolerance = PRECISION[dtype]
    wide = "float64" if dtype == "float64" else "float32"
    generator = np.random.default_rng(timesteps)
    bound = 1.0 if kind == "if" else 2.0
    shape = (4, 6) if form == "static" else (4, timesteps, 6)
    x = helpers.rounded((generator.standard_normal(shape) * 0.8 * bound + 0.5 * bound).astype(wide), compute)
    up_values = generator.integers(-4, 5, (4, timesteps, 6)).astype(wide) / 4
    up_representation = generator.integers(-8, 9, (4, 6)).astype(wide) / 4

    oracle = Oracle(layer, kind, wide)
    current = np.repeat(x[:, None], timesteps, axis=1) if form == "static" else x
    fired, _ = oracle.simulate(current)
    expected = fired * oracle.spike()
    representation = x if form == "static" else helpers.rounded(oracle.represent(x).astype(wide), compute)
    sure = away_from_the_ends(oracle, representation)
    assert sure.mean() > 0.7
    assert timesteps == 1 or 0.1 < fired.mean() < 0.9
    up_values, up_representation = up_values * sure[:, None], up_representation * sure

    layer.build([x.shape, representation.shape] if form == "stream" else x.shape)
    arrays = (x, representation) if form == "stream" else (x,)

    def function(threshold, *tensors):
        inputs = Stream(*tensors) if form == "stream" else tensors[0]
        out = with_weights([layer.threshold], [threshold], layer, inputs)
        if form == "tensor":
            return ops.sum(ops.cast(out, wide) * up_values), (out,)
        # The values count too: nothing may come back from them.
        loss = ops.sum(ops.cast(out.representation, wide) * up_representation)
        return loss + ops.sum(ops.cast(out.values, wide) * up_values), tuple(out)

    threshold = np.asarray(layer.initial_threshold, wide if dtype != "bfloat16" else "float32")
    _, outputs, grads = helpers.value_and_grads(function, threshold, *arrays, jit=jit)

    assert keras.backend.standardize_dtype(outputs[0].dtype) == compute
    spikes = outputs[0].astype(wide)
    np.testing.assert_array_equal(spikes != 0, fired)
    np.testing.assert_allclose(spikes, helpers.rounded(expected.astype(wide), compute), rtol=1e-6)
    if form != "tensor":
        np.testing.assert_allclose(
            outputs[1].astype(wide), oracle.represent(expected), rtol=tolerance, atol=tolerance * 0.1
        )

    upstream = up_values.sum(axis=1) if form == "tensor" else up_representation
    dx, dthreshold = oracle.gradient(representation, upstream)
    if form == "tensor":
        dx = dx[:, None] * oracle.weights(timesteps)[:, None]
    elif form == "stream":
        np.testing.assert_array_equal(grads[1], np.zeros_like(x))
    np.testing.assert_allclose(grads[-1].astype(wide), dx, rtol=tolerance, atol=tolerance * 0.1)
    np.testing.assert_allclose(grads[0], dthreshold, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 2), (2, 3, 2, 2, 2)])
@LOOP
@KIND
def test_static_current_is_the_same_current_at_every_step(kind, loop, shape):
    x = np.random.default_rng(0).normal(0.5, 1.0, shape).astype("float32")
    static = neuron(kind, timesteps=6, loop=loop)(x)
    repeated = np.repeat(x[:, None], 6, axis=1)
    stream = neuron(kind, loop=loop)(Stream(ops.convert_to_tensor(repeated), ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(numpy(static.values), numpy(stream.values))
    np.testing.assert_array_equal(numpy(static.representation), numpy(stream.representation))
    tensor = neuron(kind, loop=loop)(repeated)
    np.testing.assert_array_equal(numpy(static.values), numpy(tensor))


@KIND
def test_no_timesteps_give_the_clamp_alone(kind):
    x = np.linspace(-3, 9, 25, dtype="float32").reshape(5, 5)
    values, representation = neuron(kind, timesteps=0)(x)
    assert tuple(values.shape) == (5, 0, 5)
    bound, tau = (1.0, 1.0) if kind == "if" else (1.0, 2.0)
    np.testing.assert_allclose(numpy(representation), np.clip(x / tau, 0, bound), rtol=1e-6)


@KIND
def test_a_representation_network_of_so_many_steps_puts_out_what_a_constant_current_gives(kind):
    x = np.random.default_rng(0).normal(0.5, 1.0, (4, 5)).astype("float32")
    values, representation = neuron(kind, timesteps=0, representation_steps=6)(x)
    assert tuple(values.shape) == (4, 0, 5)
    expected = neuron(kind, timesteps=6)(x).representation
    np.testing.assert_allclose(numpy(representation), numpy(expected), rtol=1e-6)
    assert len(np.unique(numpy(representation))) > 2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_if_spikes_of_a_constant_current_are_counted_without_a_simulation(alpha, steps, monkeypatch):
    # 1/64 apart, the threshold a power of two and alpha of few bits: no rounding, and potentials on the firing level.
    alpha = round(alpha * 64) / 64
    x = np.arange(-256, 513, dtype="float32").reshape(1, -1) / 64
    expected = layers.IFSpike(threshold=4.0, alpha=alpha, timesteps=steps)(x).representation
    monkeypatch.setattr("keras_dsr.backend.simulate", None)
    _, found = layers.IFSpike(threshold=4.0, alpha=alpha, timesteps=0, representation_steps=steps)(x)
    np.testing.assert_allclose(numpy(found), numpy(expected), rtol=1e-6)
    assert len(np.unique(numpy(found))) == steps + 1


def test_quantized_outputs_by_hand():
    x = np.array([[-1.0, 0.0, 0.2, 0.3, 0.6, 1.0, 5.0]], "float32")
    _, representation = layers.IFSpike(threshold=1.0, timesteps=0, representation_steps=2)(x)
    np.testing.assert_array_equal(numpy(representation), [[0.0, 0.0, 0.0, 0.5, 0.5, 1.0, 1.0]])  # Eq. 21


@KIND
def test_quantized_outputs_have_the_gradient_of_the_clamp(kind):
    x = np.random.default_rng(0).normal(1.0, 3.0, (4, 5)).astype("float32")
    found = []
    for steps in (None, 3):
        layer = neuron(kind, timesteps=0, representation_steps=steps)
        layer.build((None, 5))
        value = layer.threshold.value

        def loss(x, threshold, layer=layer):
            out = with_weights([layer.threshold], [threshold], lambda: layer(x).representation)
            return ops.sum(out * ops.arange(1.0, 6.0)), ()

        found.append(helpers.value_and_grads(loss, x, np.asarray(value))[2])
    for clamped, quantized in zip(*found, strict=True):
        assert np.any(clamped)
        np.testing.assert_array_equal(quantized, clamped)


@KIND
@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (True, ValueError), (1.5, TypeError)])
def test_bad_representation_steps(kind, steps, error):
    with pytest.raises(error, match="representation_steps is"):
        neuron(kind, representation_steps=steps)


SIXTEENTHS = st.integers(-48, 48).map(lambda k: k / 16)
THRESHOLDS = st.sampled_from([0.25, 0.5, 1.0, 2.0])
ALPHAS = st.sampled_from([0.25, 0.5, 0.75, 1.0])


def currents(low, high, steps=8):
    """Four trains of dyadic currents, as an array (4, time, 1)."""
    return st.lists(
        st.lists(st.integers(round(16 * low), round(16 * high)), min_size=steps, max_size=steps), min_size=4, max_size=4
    ).map(lambda rows: (np.array(rows, "float32") / 16)[:, :, None])


@few
@given(current=currents(-3, 3), threshold=THRESHOLDS, alpha=ALPHAS, kind=st.sampled_from(["if", "lif"]))
def test_spikes_are_all_or_nothing(current, threshold, alpha, kind):
    layer = neuron(kind, threshold=threshold, alpha=alpha)
    scale = np.float32(threshold if kind == "if" else threshold / layer.dt)
    assert set(np.unique(numpy(layer(current)))) <= {np.float32(0), scale}


@few
@given(current=currents(-3, 3), threshold=THRESHOLDS, alpha=ALPHAS)
def test_if_loses_no_charge(current, threshold, alpha):
    """sum(I) = sum(V_th s) + V[N], exactly, with V recomputed in float64; and what the readout says is its mean."""
    layer = layers.IFSpike(threshold=threshold, alpha=alpha)
    values, representation = layer(layers.ToStream()(current))
    spikes = numpy(values).astype("float64")
    fired, potential = Oracle(layer, "if", "float64").simulate(current.astype("float64"))
    np.testing.assert_array_equal(spikes, fired * threshold)
    np.testing.assert_array_equal(current.astype("float64").sum(axis=1), spikes.sum(axis=1) + potential)
    np.testing.assert_array_equal(numpy(representation), spikes.mean(axis=1))


@few
@given(current=currents(-3, 3), threshold=THRESHOLDS, alpha=ALPHAS)
def test_lif_loses_what_leaks(current, threshold, alpha):
    """dt r(out) = (1 - lambda) r(I) - V[N] / sum(lambda^k)."""
    layer = neuron("lif", threshold=threshold, alpha=alpha)
    stream = layers.ToStream(layer.coding)(current)
    out = layer(stream)
    oracle = Oracle(layer, "lif", "float32")
    _, potential = oracle.simulate(current)
    decay = np.exp(-layer.dt / layer.tau)
    total = np.sum(decay ** np.arange(current.shape[1]))
    expected = (1 - decay) * oracle.represent(current) - potential / total
    np.testing.assert_allclose(layer.dt * numpy(out.representation), expected, rtol=1e-4, atol=1e-5)


@few
@given(
    rates=st.lists(SIXTEENTHS, min_size=6, max_size=6),
    threshold=THRESHOLDS,
    steps=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_constant_current_counts_by_eq_18(rates, threshold, steps):
    current = np.array([rates], "float32")
    out = layers.IFSpike(threshold=threshold, alpha=1.0, timesteps=steps)(current)
    expected = threshold / steps * np.clip(np.floor(steps * current / threshold), 0, steps)
    np.testing.assert_array_equal(numpy(out.representation), expected)


@few
@given(
    rates=st.lists(SIXTEENTHS, min_size=6, max_size=6),
    threshold=THRESHOLDS,
    steps=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_constant_current_rounds_by_eq_21(rates, threshold, steps):
    current = np.array([rates], "float32")
    out = layers.IFSpike(threshold=threshold, alpha=0.5, timesteps=steps)(current)
    expected = threshold / steps * np.clip(np.floor(steps * current / threshold + 0.5), 0, steps)
    np.testing.assert_array_equal(numpy(out.representation), expected)


@pytest.mark.parametrize(("alpha", "part"), [(1.0, 1.0), (0.5, 0.5)])
def test_if_converges_to_the_clamp(alpha, part):
    current = np.linspace(-0.5, 2.5, 385, dtype="float32")[None]  # multiples of 1 / 128
    clamp = np.clip(current, 0, 2)
    largest = []
    for steps in (1, 2, 4, 8, 16, 32, 64):
        out = layers.IFSpike(threshold=2.0, alpha=alpha, timesteps=steps, loop="while")(current)
        error = np.abs(numpy(out.representation) - clamp).max()
        assert error <= part * 2.0 / steps
        largest.append(error)
    assert largest[-1] < largest[0] / 20


@few
@given(current=currents(0, 1), alpha=st.sampled_from([0.5, 1.0]))
def test_representation_is_off_by_the_final_potential(current, alpha):
    """Currents in [0, V_th] cannot overflow, so r(I) - r(out) = V[N] / N, of at most alpha V_th / N."""
    layer = layers.IFSpike(threshold=1.0, alpha=alpha)
    values, representation = layer(layers.ToStream()(current))
    _, potential = Oracle(layer, "if", "float64").simulate(current.astype("float64"))
    error = current.mean(axis=1) - numpy(representation)
    np.testing.assert_array_equal(error, potential / current.shape[1])
    assert np.abs(error).max() <= alpha / current.shape[1]
    assert values.shape == current.shape


def test_lif_converges_to_the_clamp_as_steps_get_shorter():
    """With V_th / dt, the clamp's upper end, and N dt, the time simulated, held fixed."""
    generator = np.random.default_rng(0)
    current = generator.uniform(-0.5, 3.0, (1, 200)).astype("float32")
    errors = []
    for dt in (0.2, 0.1, 0.05, 0.025):
        layer = layers.LIFSpike(threshold=2.0 * dt, alpha=0.5, tau=1.0, dt=dt, timesteps=round(10 / dt), loop="while")
        out = numpy(layer(current).representation)
        errors.append(np.abs(out - np.clip(current, 0, 2)).max())
    for coarse, fine in itertools.pairwise(errors):
        assert fine < 0.7 * coarse
    assert errors[-1] < 0.06


@KIND
def test_permuting_the_batch_permutes_the_output(kind):
    x = np.random.default_rng(0).normal(0.5, 1.0, (5, 4, 3)).astype("float32")
    order = [3, 1, 4, 0, 2]
    layer = neuron(kind)
    np.testing.assert_array_equal(numpy(layer(x))[order], numpy(layer(x[order])))


@KIND
def test_two_calls_give_the_same(kind):
    x = np.random.default_rng(0).normal(0.5, 1.0, (3, 4, 3)).astype("float32")
    layer = neuron(kind)
    np.testing.assert_array_equal(numpy(layer(x)), numpy(layer(x)))


@pytest.mark.parametrize("current", [-1.0, 0.49, 0.5, 0.51, 3.0])
def test_one_step_is_a_comparison(current):
    out = layers.IFSpike(threshold=1.0, alpha=0.5)(np.full((1, 1, 1), current, "float32"))
    assert float(out[0, 0, 0]) == float(current >= 0.5)


@pytest.mark.parametrize("scale", [0.0, 0.25, 3.0])
@KIND
def test_threshold_gradient_scales(kind, scale):
    def gradient(scale):
        layer = neuron(kind, threshold_gradient_scale=scale)
        layer.build((2, 3, 4))
        x = np.full((2, 3, 4), 50.0, "float32")
        call = lambda threshold: (ops.sum(with_weights([layer.threshold], [threshold], layer, x)), ())  # noqa: E731
        return helpers.value_and_grads(call, np.float32(layer.initial_threshold))[2][0]

    # 8 neurons beyond the clamp, 3 steps of cotangent 1.
    assert gradient(1.0) == pytest.approx(24.0 if kind == "if" else 48.0)
    assert gradient(scale) == pytest.approx(scale * gradient(1.0))


@JIT
@pytest.mark.parametrize("style", ["stream", "tensor"])
@KIND
def test_rounded_corners_change_the_gradient_alone(kind, style, jit):
    rng = np.random.default_rng(3)
    values = rng.normal(0.5, 1.0, (4, 5, 6)).astype("float32")
    upstream = rng.normal(size=(4, 6)).astype("float32")
    coding = neuron(kind).coding
    weights = coding.weights(5).astype("float32")
    representation = np.einsum("t,btf->bf", weights, values).astype("float32")

    def run(**kwargs):
        layer = neuron(kind, threshold_gradient_scale=0.5, **kwargs)
        layer.build([values.shape, representation.shape] if style == "stream" else values.shape)

        def function(threshold, values, representation):
            given = Stream(values, representation) if style == "stream" else values
            out = with_weights([layer.threshold], [threshold], layer, given)
            put_out = out.representation if style == "stream" else layer.coding.represent(out)
            return ops.sum(put_out * upstream), out

        arrays = np.float32(layer.initial_threshold), values, representation
        return layer, *helpers.value_and_grads(function, *arrays, jit=jit)[1:]

    layer, sharp, sharp_gradients = run()
    layer, rounded, gradients = run(corner_width=0.2)
    for one, other in zip(keras.tree.flatten(sharp), keras.tree.flatten(rounded), strict=True):
        np.testing.assert_array_equal(one, other)
    x = representation / (1.0 if kind == "if" else layer.tau)
    bound = layer.initial_threshold * layer.scale
    low, high = (1 / (1 + np.exp(-each / (0.2 * bound))) for each in (x, x - bound))
    by_representation = upstream * (low - high) * (1.0 if kind == "if" else 1 / layer.tau)
    # Of a plain tensor the cotangent of step n is w_n of the upstream gradient, their sum the whole of it.
    expected = [0.5 * np.sum(upstream * high) * layer.scale, np.zeros_like(values), by_representation]
    if style == "tensor":
        expected[1:] = [np.einsum("t,bf->btf", weights, by_representation), np.zeros_like(representation)]
    for gradient, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=2e-5, atol=2e-6)
    assert abs(gradients[0] - sharp_gradients[0]) > 1e-3


@pytest.mark.parametrize("representation_steps", [None, 4])
@KIND
def test_a_representation_network_has_no_rounded_corners(kind, representation_steps):
    x = np.linspace(-1, 5, 12, dtype="float32").reshape(3, 4)

    def run(**kwargs):
        layer = neuron(kind, timesteps=0, representation_steps=representation_steps, **kwargs)
        layer.build(x.shape)

        def function(threshold, x):
            out = with_weights([layer.threshold], [threshold], layer, x).representation
            return ops.sum(ops.square(out)), out

        return helpers.value_and_grads(function, np.float32(layer.initial_threshold), x)

    for sharp, rounded in zip(*(keras.tree.flatten(run(corner_width=width)) for width in (0.0, 0.2)), strict=True):
        np.testing.assert_array_equal(sharp, rounded)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
@KIND
def test_rounded_corners_in_half_precision(kind, dtype):
    """They are computed in float32: in half precision the gradient at the upper corner would be wrong by far more."""
    layer = neuron(kind, timesteps=4, corner_width=0.1, dtype=dtype)
    x = ops.cast(np.linspace(-1, 3, 16, dtype="float32").reshape(4, 4), "bfloat16")
    layer.build(x.shape)

    def total(x):
        return ops.sum(ops.cast(layer(ops.cast(x, "bfloat16")).representation, "float32")), ()

    gradient = helpers.value_and_grads(total, numpy(ops.cast(x, "float32")))[2][0]
    bound, tau = (1.0, 1.0) if kind == "if" else (1.0, 2.0)
    x = numpy(ops.cast(x, "float32")) / tau
    low, high = (1 / (1 + np.exp(-each / (0.1 * bound))) for each in (x, x - bound))
    np.testing.assert_allclose(gradient, (low - high) / tau, rtol=1e-2, atol=1e-6)


def image_model(kind, **kwargs):
    inputs = keras.Input((6,))
    x = neuron(kind, timesteps=4, **kwargs)(keras.layers.Dense(8)(inputs))
    x = neuron(kind, **kwargs)(layers.Synapse(keras.layers.Dense(3))(x))
    return keras.Model(inputs, layers.SpikeRep()(x))


def frames_model(kind, **kwargs):
    neurons = neuron(kind, **kwargs), neuron(kind, **kwargs)
    return keras.Sequential(
        [keras.Input((4, 6)), neurons[0], keras.layers.Dense(3), neurons[1], layers.SpikeRep(neurons[1].coding)]
    )


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, kind="if", **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        self.dense = keras.layers.Dense(8)
        self.first = neuron(kind, timesteps=4)
        self.synapse = layers.Synapse(keras.layers.Dense(3))
        self.second = neuron(kind)
        self.readout = layers.SpikeRep()

    def call(self, x):
        return self.readout(self.second(self.synapse(self.first(self.dense(x)))))

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


MODELS = {
    "functional": (image_model, (5, 6)),
    "sequential": (frames_model, (5, 4, 6)),
    "subclassed": (Subclassed, (5, 6)),
}


STYLES = pytest.mark.parametrize(
    ("style", "kind"), [("functional", "if"), ("functional", "lif"), ("sequential", "lif"), ("subclassed", "if")]
)


def inputs_of(shape, seed=0):
    return np.random.default_rng(seed).normal(0.5, 1.0, shape).astype("float32")


@KIND
def test_config_round_trip(kind):
    layer = neuron(
        kind,
        threshold=0.75,
        alpha=0.25,
        timesteps=3,
        trainable_threshold=False,
        threshold_lower_bound=0.125,
        threshold_l2=0.5,
        threshold_gradient_scale=0.0625,
        loop="while",
        representation_steps=5,
        corner_width=0.125,
        name="some_neuron",
        dtype="mixed_bfloat16",
    )
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(layer))))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    expected = {
        "threshold": 0.75,
        "alpha": 0.25,
        "timesteps": 3,
        "trainable_threshold": False,
        "threshold_lower_bound": 0.125,
        "threshold_l2": 0.5,
        "threshold_gradient_scale": 0.0625,
        "loop": "while",
        "representation_steps": 5,
        "corner_width": 0.125,
        "name": "some_neuron",
    }
    if kind == "lif":
        expected |= {"tau": 2.0, "dt": 0.5}
    assert expected.items() <= layer.get_config().items()


@STYLES
def test_keras_file_round_trip(kind, style, tmp_path):
    make, shape = MODELS[style]
    model = make(kind)
    x = inputs_of(shape)
    model(x)
    for weight in model.trainable_variables:
        weight.assign(weight * 1.0625)
    loaded = helpers.saved_and_loaded(model, tmp_path)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert len(loaded.weights) == len(model.weights)


@pytest.mark.parametrize("style", ["functional", "sequential"])
@KIND
def test_clone_model(kind, style):
    make, shape = MODELS[style]
    model = make(kind)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = inputs_of(shape)
    np.testing.assert_array_equal(numpy(clone(x)), numpy(model(x)))


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({"run_eagerly": True}, id="eager"),
        pytest.param({"run_eagerly": False, "jit_compile": False}, id="graph"),
        pytest.param({"jit_compile": True}, id="jit"),
    ],
)
@STYLES
def test_fit_step(kind, style, mode):
    make, shape = MODELS[style]
    model = make(kind)
    x = inputs_of(shape)
    model(x)
    before = [numpy(v) for v in model.trainable_variables]
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True), **mode)
    history = model.fit(x, np.array([0, 1, 2, 1, 0]), batch_size=5, epochs=1, verbose=0)
    assert math.isfinite(history.history["loss"][0])
    changed = [not np.array_equal(old, numpy(new)) for old, new in zip(before, model.trainable_variables, strict=True)]
    assert all(changed), list(zip([v.path for v in model.trainable_variables], changed, strict=True))


@STYLES
def test_any_batch_size(kind, style):
    make, shape = MODELS[style]
    model = make(kind)
    x = inputs_of((7, *shape[1:]))
    in_threes = model.predict(x, batch_size=3, verbose=0)  # and one that is left over
    np.testing.assert_allclose(in_threes, numpy(model(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.tensorflow_only
@LOOP
@KIND
def test_unknown_batch_size_in_a_graph(kind, loop):
    import tensorflow as tf

    model = image_model(kind, loop=loop)
    call = tf.function(model, input_signature=[tf.TensorSpec((None, 6), tf.float32)])
    for size in (1, 4):
        x = inputs_of((size, 6))
        np.testing.assert_allclose(numpy(call(tf.constant(x))), numpy(model(x)), rtol=1e-6, atol=1e-6)


@pytest.mark.tensorflow_only
@KIND
def test_unknown_number_of_steps(kind):
    inputs = keras.Input((None, 3))
    layer = neuron(kind, loop="while")
    out = layer(layers.ToStream(layer.coding)(inputs))
    model = keras.Model(inputs, [out.values, out.representation, layer(inputs)])
    assert out.timesteps is None
    for steps in (1, 3, 8):
        x = inputs_of((2, steps, 3))
        stream = neuron(kind, loop="unrolled")(layers.ToStream(layer.coding)(x))
        values, representation, tensor = model.predict(x, verbose=0)
        np.testing.assert_array_equal(values, numpy(stream.values))
        np.testing.assert_array_equal(tensor, values)
        np.testing.assert_allclose(representation, numpy(stream.representation), rtol=1e-6)


@pytest.mark.tensorflow_only
@KIND
def test_gradient_with_an_unknown_number_of_steps(kind):
    import tensorflow as tf

    layer = neuron(kind, loop="while")
    layer.build((None, None, 3))

    @tf.function(input_signature=[tf.TensorSpec((None, None, 3), tf.float32)])
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(loss, [x, layer.threshold.value])

    fixed = neuron(kind, loop="unrolled")
    for steps in (2, 5):
        x = inputs_of((3, steps, 3))
        with tf.GradientTape() as tape:
            variable = tf.Variable(x)
            loss = tf.reduce_sum(fixed(variable) ** 2)
        expected = tape.gradient(loss, [variable, fixed.threshold.value])
        for received, wanted in zip(gradient(tf.constant(x)), expected, strict=True):
            np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@KIND
def test_mixed_precision_fit(kind, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = image_model(kind)
        x = inputs_of((5, 6))
        model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        history = model.fit(x, np.array([0, 1, 2, 1, 0]), batch_size=5, epochs=1, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    assert math.isfinite(history.history["loss"][0])
    for layer in helpers.neuron_layers(model):
        assert layer.threshold.dtype == "float32"
        assert numpy(layer.threshold) != np.float32(layer.initial_threshold)
    assert keras.backend.standardize_dtype(model(x).dtype) == policy.removeprefix("mixed_")


@KIND
def test_fixed_threshold(kind):
    layer = neuron(kind, trainable_threshold=False)
    layer.build((2, 3, 4))
    assert layer.trainable_weights == []
    assert len(layer.non_trainable_weights) == 1


@KIND
def test_one_scalar_threshold_per_layer(kind):
    layer = neuron(kind)
    layer.build((2, 3, 4, 5))
    (weight,) = layer.trainable_weights
    assert weight is layer.threshold
    assert tuple(weight.shape) == ()


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "jit"])
@KIND
def test_threshold_stays_at_its_bound(kind, jit):
    layer = neuron(kind, threshold_lower_bound=0.25)
    model = keras.Sequential([keras.Input((3, 4)), layer, layers.SpikeRep(layer.coding)])
    # Representations beyond the clamp, and a loss that grows with them.
    model.compile(keras.optimizers.SGD(100.0), "mean_squared_error", jit_compile=jit)
    model.fit(np.full((2, 3, 4), 20.0, "float32"), np.zeros((2, 4), "float32"), batch_size=2, verbose=0)
    assert float(numpy(layer.threshold)) == 0.25


@pytest.mark.parametrize("l2", [0.0, 0.25])
@KIND
def test_threshold_penalty(kind, l2):
    layer = neuron(kind, threshold_l2=l2)
    model = keras.Sequential([keras.Input((3, 4)), layer])
    layer.threshold.assign(3.0)
    assert [float(numpy(loss)) for loss in model.losses] == ([l2 * 9.0] if l2 else [])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (layers.IFSpike, {"threshold": 6.0, "alpha": 0.5, "threshold_lower_bound": 0.01, "threshold_l2": 2.5e-4}),
        (
            layers.LIFSpike,
            {
                "threshold": 0.3,
                "alpha": 0.3,
                "tau": 1.0,
                "dt": 0.05,
                "threshold_lower_bound": 5e-4,
                "threshold_l2": 2.5e-4,
            },
        ),
    ],
)
def test_defaults_are_the_papers(make, expected):
    assert expected.items() <= make().get_config().items()
    assert make().threshold_gradient_scale == pytest.approx(expected.get("dt", 1.0) ** 2)


@pytest.mark.parametrize("symbolic", [False, True], ids=["eager", "symbolic"])
@pytest.mark.parametrize("steps", [0, 1, 4])
@KIND
def test_shapes_of_a_static_input(kind, steps, symbolic):
    x = keras.Input((5, 2), batch_size=3) if symbolic else np.zeros((3, 5, 2), "float32")
    layer = neuron(kind, timesteps=steps)
    out = layer(x)
    assert isinstance(out, Stream)
    assert (tuple(out.values.shape), tuple(out.representation.shape)) == ((3, steps, 5, 2), (3, 5, 2))
    assert out.timesteps == steps
    assert layer.compute_output_shape((3, 5, 2)) == ((3, steps, 5, 2), (3, 5, 2))


@pytest.mark.tensorflow_only
@KIND
@pytest.mark.parametrize("loop", ["while", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_compiled_alone_neurons_fire_the_same_spikes(kind, loop, dtype):
    import tensorflow as tf

    x = np.random.default_rng(0).normal(0.6, 0.8, (3, 7, 4, 2)).astype("float32")
    for current, arguments in ((x, {}), (x[:, 0], {"timesteps": 7})):
        layer = neuron(kind, loop=loop, dtype=dtype, **arguments)
        expected = keras.tree.map_structure(numpy, tuple(layer(current)) if arguments else layer(current))
        assert np.any(keras.tree.flatten(expected)[0])
        layer.jit_compile = True

        def run(current, layer=layer, arguments=arguments):
            return tuple(layer(current)) if arguments else layer(current)

        # Of a batch whose size the graph does not know, too.
        anew = tf.function(run, input_signature=[tf.TensorSpec((None, *current.shape[1:]), "float32")])
        for found in (run(current), anew(current)):
            keras.tree.map_structure(lambda a, b: np.testing.assert_array_equal(numpy(a), b), found, expected)


@pytest.mark.tensorflow_only
def test_neurons_are_compiled_alone_in_the_steps_of_keras_only(tmp_path, monkeypatch):
    import tensorflow as tf

    compiled = []
    simulate = backend.simulate

    def spy(*arguments, jit_compile, **others):
        compiled.append(jit_compile)
        return simulate(*arguments, jit_compile=jit_compile, **others)

    monkeypatch.setattr(backend, "simulate", spy)
    x, y = np.random.default_rng(0).normal(0.5, 1.0, (6, 3, 5)).astype("float32"), np.zeros((6, 3, 5), "float32")

    def made(loop="while", alone=None, **arguments):
        inputs = keras.Input((3, 5))
        layer = layers.IFSpike(loop=loop)
        layer.jit_compile = alone
        model = keras.Model(inputs, layer(keras.layers.Dense(5, kernel_initializer="identity")(inputs)))
        model.compile(keras.optimizers.SGD(0.1), "mean_squared_error", **{"jit_compile": False, **arguments})
        return model

    def of(run):
        compiled.clear()
        run()
        return set(compiled)

    for options, expected in (
        ({}, True),
        ({"steps_per_execution": 2}, True),
        ({"jit_compile": True}, True),
        ({"loop": "unrolled"}, False),
        ({"run_eagerly": True}, False),
    ):
        for run in (
            lambda model: model.fit(x, y, batch_size=2, verbose=0),
            lambda model: model.evaluate(x, y, batch_size=2, verbose=0),
            lambda model: model.predict(x, batch_size=2, verbose=0),
        ):
            model = made(**options)
            assert of(lambda run=run, model=model: run(model)) == {expected}, options

    model = made()
    for run in (
        lambda: model.train_on_batch(x, y),
        lambda: model.test_on_batch(x, y),
        lambda: model.predict_on_batch(x),
    ):
        assert of(run) == {True}
    for run in (
        lambda: model(x),
        lambda: tf.function(model)(x),
        lambda: model.export(tmp_path / "exported", verbose=False),
        lambda: tf.saved_model.save(model, str(tmp_path / "saved")),
    ):
        assert of(run) == {False}

    with monkeypatch.context() as on_a_mac:
        on_a_mac.setattr("platform.system", lambda: "Darwin")
        assert of(lambda: made().predict(x, verbose=0)) == {True}
        on_a_mac.setattr(tf.config, "list_physical_devices", lambda kind=None: ["one"])
        assert of(lambda: made().predict(x, verbose=0)) == {False}
    with monkeypatch.context() as without_xla:
        without_xla.setattr(tf.test, "is_built_with_xla", lambda: False)
        assert of(lambda: made().predict(x, verbose=0)) == {False}

    plain = made(alone=False)
    for each in (model, plain):
        each.set_weights(made().get_weights())
        each.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    assert of(lambda: plain.predict(x, verbose=0)) == {False}
    np.testing.assert_array_equal(model.predict(x, verbose=0), plain.predict(x, verbose=0))

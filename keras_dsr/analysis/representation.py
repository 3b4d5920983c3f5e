"""How far a spiking neuron's output is from the clamp that training differentiates, and why.

The error of a layer, r(output) - clamp(r(I)), has two parts (Section 4.1):

- the quantization error e_q: what a constant current I = r(I) gives is off the clamp, as N spikes can say only so much;
- the deviation error e_d: real currents come unevenly, and a neuron that has fired early cannot take it back.

- `errors`: both, for every layer on real data, after each number of steps, and for other alpha and V_th
- `response`: what constant currents give (Figure 2), with and without the firing mechanism; `measured_response`: what
  the currents of a trained network give
- `propose_alpha`: the alpha of least quantization error

Reference: Meng et al., CVPR 2022, Section 4 and Figure 2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_dsr import backend
from keras_dsr.analysis import tracing
from keras_dsr.analysis.tracing import Recording
from keras_dsr.coding import Coding, RateCoding, WeightedRateCoding

# Constant currents a spike's worth apart, among which a mean error is taken: enough for alpha in steps of 0.01.
_POINTS = 256


@dataclasses.dataclass(frozen=True)
class Errors:
    """Mean absolute errors of a layer, as parts of the largest representation b that it can put out.

    Args:
        quantization: e_q, what constant currents give, less the clamp.
        deviation: e_d, what was put out, less what constant currents give.
        total: What was put out, less the clamp.
        bias: The mean of the total error with its sign.
        saturated: Part of the neurons whose clamp is at its upper end.
    """

    quantization: float
    deviation: float
    total: float
    bias: float
    saturated: float


@dataclasses.dataclass(frozen=True)
class LayerErrors:
    """Errors of a layer on real currents.

    Args:
        threshold: V_th.
        alpha: It fires at alpha V_th.
        by_steps: After 1, 2, ... N steps: the errors of the same network with so many steps.
        by_alpha: After N steps, had the layer another alpha, and its currents stayed the same.
        by_threshold: The same, had it another V_th; as parts of that V_th's b.
    """

    threshold: float
    alpha: float
    by_steps: tuple[Errors, ...]
    by_alpha: dict[float, Errors]
    by_threshold: dict[float, Errors]

    @property
    def final(self) -> Errors:
        """The errors after the last step."""
        return self.by_steps[-1]


@dataclasses.dataclass(frozen=True)
class Response:
    """What a neuron puts out for constant currents.

    Args:
        received: r(I) of each current, from below 0 to above the clamp, as a part of what brings the largest output.
        output: r(output), as a part of the largest representation b.
        clamp: The clamp, likewise.
    """

    received: np.ndarray
    output: np.ndarray
    clamp: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """The quantization error e_q."""
        return self.output - self.clamp

    @property
    def mean_error(self) -> float:
        """Mean absolute e_q of currents within the clamp."""
        inside = (self.received >= 0) & (self.received <= 1)
        return float(np.abs(self.error[inside]).mean())


@dataclasses.dataclass(frozen=True)
class MeasuredResponse:
    """What a layer puts out for what it really receives, in bins of the representation received.

    Args:
        received: The middle of each bin: r(I), as a part of what brings the largest output.
        output: Mean r(output) in the bin, as a part of the largest representation b; NaN where there is none.
        clamp: Mean clamp in the bin, likewise.
        count: How many neurons and samples are in the bin.
    """

    received: np.ndarray
    output: np.ndarray
    clamp: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Proposal:
    """An alpha of least quantization error.

    Args:
        alpha: The best of `alphas`.
        error: Its mean absolute quantization error, as a part of the largest representation b.
        alphas: What was tried.
        errors: The mean absolute error of each.
    """

    alpha: float
    error: float
    alphas: np.ndarray
    errors: np.ndarray


def errors(
    model: keras.Model,
    x: np.ndarray | Iterable[Any],
    batch_size: int = 32,
    alphas: Sequence[float] = (),
    threshold_factors: Sequence[float] = (),
) -> dict[str, LayerErrors]:
    """Quantization and deviation error of every neuron layer, on real data.

    A run of N steps is one of every smaller number, too: the errors after n steps are those of the network with n, on
    the first n frames if it takes frames.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels). Each batch is simulated anew
            for every number of steps, so some hundred samples are enough.
        batch_size: Samples that run at once, of an array.
        alphas: Other alpha to try, each in [0, 1].
        threshold_factors: Other V_th to try, as multiples of the layer's; above 0.

    Returns:
        For each neuron layer, by name and in order, its errors.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, an argument is out of range, or `x` is empty.

    Reference: Meng et al., CVPR 2022, Section 4.1.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha, the firing level as a part of V_th, is in [0, 1]. Received alphas={alphas!r}.")
    for factor in threshold_factors:
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"Factors on V_th are finite and above 0. Received {threshold_factors!r}.")
    sums: dict[str, dict[Any, np.ndarray]] = {}
    seen = {}
    for recordings in tracing.trace_batches(model, x, batch_size):
        for name, recording in recordings.items():
            seen[name] = recording
            mine = sums.setdefault(name, {})
            steps = recording.currents.shape[1]
            for number in range(1, steps + 1):
                _add(mine, ("steps", number), _sums(recording, number, recording.alpha, recording.threshold))
            for alpha in alphas:
                _add(mine, ("alpha", alpha), _sums(recording, steps, alpha, recording.threshold))
            for factor in threshold_factors:
                threshold = recording.threshold * factor
                _add(mine, ("threshold", factor), _sums(recording, steps, recording.alpha, threshold))
    found = {}
    for name, mine in sums.items():
        means = {key: Errors(*(float(value) for value in total[1:] / total[0])) for key, total in mine.items()}
        last = seen[name]
        found[name] = LayerErrors(
            threshold=last.threshold,
            alpha=last.alpha,
            by_steps=tuple(mean for (kind, _), mean in means.items() if kind == "steps"),
            by_alpha={value: mean for (kind, value), mean in means.items() if kind == "alpha"},
            by_threshold={value * last.threshold: mean for (kind, value), mean in means.items() if kind == "threshold"},
        )
    return found


def response(coding: Coding, timesteps: int, alpha: float, points: int = 1001) -> Response:
    """What constant currents give: the staircase of Figure 2.

    Args:
        coding: `RateCoding()` for IF neurons, `WeightedRateCoding(tau, dt)` for LIF.
        timesteps: N, at least 1.
        alpha: It fires at alpha V_th: 1 without the paper's firing mechanism, 0.5 or another with it.
        points: Number of currents, at least 2, evenly from -0.25 to 1.25 of what brings the largest output.

    Returns:
        What comes out of each current, beside the clamp.

    Raises:
        ValueError: if an argument is out of range.

    Example:

    >>> staircase = response(RateCoding(), timesteps=2, alpha=0.5, points=7)
    >>> staircase.received.round(2).tolist()
    [-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    >>> staircase.output.tolist()
    [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.0]

    Reference: Meng et al., CVPR 2022, Eqs. 18 and 21, Figure 2.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the firing level as a part of V_th, is in [0, 1]. Received alpha={alpha!r}.")
    coding.weights(timesteps)  # raises, if that is no number of steps
    _check_count("points", points, 2)
    received = np.linspace(-0.25, 1.25, points)
    output = _put_out(received * _full(coding), coding, alpha, 1.0, timesteps)
    return Response(received, output / coding.bound(1.0), np.clip(received, 0, 1))


def measured_response(
    model: keras.Model,
    x: np.ndarray | Iterable[Any],
    alpha: float | None = None,
    bins: int = 60,
    batch_size: int = 32,
) -> dict[str, MeasuredResponse]:
    """What the neuron layers of a trained network put out for what they receive: Figure 2 of real currents.

    Args:
        model: A functional or Sequential model with spiking layers and one input.
        x: Its input, of shape (samples, ...); or batches of it, or of (input, labels).
        alpha: What each layer would put out with another alpha, its currents as they are: 1 for without the firing
            mechanism. `None` for its own.
        bins: Number of bins, at least 1, evenly from -0.25 to 1.25 of what brings the largest output; what is beyond is
            left out.
        batch_size: Samples that run at once, of an array.

    Returns:
        For each neuron layer, by name and in order, what was measured.

    Raises:
        ValueError: if the model has no spiking layers or no time steps, an argument is out of range, or `x` is empty.

    Reference: Meng et al., CVPR 2022, Figure 2.
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the firing level as a part of V_th, is in [0, 1]. Received alpha={alpha!r}.")
    _check_count("bins", bins, 1)
    edges = np.linspace(-0.25, 1.25, bins + 1)
    sums: dict[str, np.ndarray] = {}
    for recordings in tracing.trace_batches(model, x, batch_size):
        for name, each in recordings.items():
            output = each.representation
            if alpha is not None and alpha != each.alpha:
                output = _put_out(each.currents, each.coding, alpha, each.threshold)
            parts = np.ravel(each.received) / (_full(each.coding) * each.threshold)
            totals = [
                np.histogram(parts, edges, weights=None if values is None else np.ravel(values) / each.bound)[0]
                for values in (None, output, each.clamp)
            ]
            sums[name] = sums.get(name, 0) + np.array(totals, "float64")
    middles = (edges[1:] + edges[:-1]) / 2
    found = {}
    for name, (count, output, clamped) in sums.items():
        there = np.where(count > 0, count, np.nan)
        found[name] = MeasuredResponse(middles, output / there, clamped / there, count.astype("int64"))
    return found


def propose_alpha(
    timesteps: int,
    coding: Coding | None = None,
    alphas: Sequence[float] | None = None,
    received: np.ndarray | None = None,
) -> Proposal:
    """The alpha of least mean absolute quantization error.

    Errors are of constant currents, evenly spread over the clamp's range; V_th makes no difference to them, as currents
    are in its unit.

    Args:
        timesteps: N, at least 1.
        coding: `RateCoding()`, the default, for IF neurons; `WeightedRateCoding(tau, dt)` for LIF.
        alphas: Those to try; `None` for 0, 0.01, ... 1.
        received: Representations r(I) to take in place of evenly spread ones, as parts of what brings the largest
            output: those of a trained layer, say. What is not within 0 and 1 is left out.

    Returns:
        The best; of several that are equally good, that which is nearest to 0.5.

    Raises:
        ValueError: if an argument is out of range, or nothing of `received` is within 0 and 1.

    Example:

    >>> propose_alpha(4).alpha
    0.5

    Reference: Meng et al., CVPR 2022, Section 4.2.
    """
    coding = RateCoding() if coding is None else coding
    coding.weights(timesteps)  # raises, if that is no number of steps
    tried = np.linspace(0, 1, 101).round(2) if alphas is None else np.asarray(alphas, "float64")
    if tried.ndim != 1 or not tried.size or not ((tried >= 0) & (tried <= 1)).all():
        raise ValueError(f"alphas are one or more numbers in [0, 1]. Received alphas={alphas!r}.")
    if received is None:
        count = timesteps * _POINTS
        parts = (np.arange(count) + 0.5) / count
    else:
        parts = np.ravel(np.asarray(received, "float64"))
        parts = parts[(parts >= 0) & (parts <= 1)]
        if not parts.size:
            raise ValueError("None of what is received is within 0 and 1, the range of the clamp.")
    currents = parts.astype("float32") * np.float32(_full(coding))
    found = np.empty(len(tried))
    for start in range(0, len(tried), 16):  # so that memory stays small
        some = tried[start : start + 16, np.newaxis].astype("float32")
        output = _put_out(np.tile(currents, (len(some), 1)), coding, some, 1.0, timesteps) / coding.bound(1.0)
        found[start : start + 16] = np.abs(output - parts).mean(axis=1)
    equal = np.flatnonzero(found <= found.min() * (1 + 1e-6))
    best = equal[np.argmin(np.abs(tried[equal] - 0.5))]
    return Proposal(float(tried[best]), float(found[best]), tried, found)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is a whole number of at least {least}. Received {name}={value!r}.")


def _full(coding: Coding) -> float:
    """The constant current of the clamp's upper end, of V_th = 1."""
    return float(coding.bound(1.0)) * (coding.tau if isinstance(coding, WeightedRateCoding) else 1.0)


def _put_out(currents: Any, coding: Coding, alpha: Any, threshold: float, timesteps: int | None = None) -> np.ndarray:
    """r(output) of currents (batch, time, ...); or of constant ones (batch, ...), with `timesteps`.

    `alpha` may differ along the first axis.
    """
    _, coded = backend.simulate(
        ops.convert_to_tensor(np.asarray(currents, "float32")),
        ops.convert_to_tensor(np.float32(threshold)),
        alpha=alpha,
        decay=coding.decay,
        scale=float(coding.bound(1.0)),
        timesteps=timesteps,
        loop="unrolled",
    )
    return np.asarray(coded)


def _sums(recording: Recording, steps: int, alpha: float, threshold: float) -> np.ndarray:
    """Number of neurons and samples; then sums over them of what `Errors` has, in its order."""
    coding = recording.coding
    weights = coding.weights(steps).astype("float32")
    bound = float(coding.bound(threshold))
    currents = recording.currents[:, :steps]
    received = np.einsum("t,bt...->b...", weights, currents)
    clamped = np.asarray(coding.clamp(received, np.float32(threshold)))
    if alpha == recording.alpha and threshold == recording.threshold:
        put_out = np.einsum("t,bt...->b...", weights, recording.output[:, :steps])
    else:
        put_out = _put_out(currents, coding, alpha, threshold)
    constant = _put_out(received, coding, alpha, threshold, steps)
    parts = [
        np.abs(constant - clamped) / bound,
        np.abs(put_out - constant) / bound,
        np.abs(put_out - clamped) / bound,
        (put_out - clamped) / bound,
        clamped >= bound,
    ]
    return np.array([received.size, *(part.sum(dtype="float64") for part in parts)])


def _add(sums: dict[Any, np.ndarray], key: Any, value: np.ndarray) -> None:
    sums[key] = sums.get(key, 0) + value

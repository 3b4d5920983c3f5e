"""Looking inside a spiking network.

- `trace`, `trace_batches`: what every neuron layer does on real data; `Tracer`, `Recorder` the same time and again;
  `keras_dsr.analysis.tracing`
- `count_operations`: synaptic operations, and the multiply-accumulates of the ANN of the same shape;
  `keras_dsr.analysis.operations`
- `estimate`: joules of these on named hardware; `keras_dsr.analysis.energy`
- `errors`, `response`, `measured_response`, `propose_alpha`: how far outputs are from the clamp, and why;
  `keras_dsr.analysis.representation`
- `outputs_by_step`, `accuracy_by_step`, `EarlyExit`, `trade_off`, `choose`, `predict`, `predict_served`, `StepRunner`:
  answers before the last time step; `keras_dsr.analysis.anytime`
- `keras_dsr.analysis.firing`: spike trains, firing rates and thresholds
- `keras_dsr.analysis.figures`: pictures of a training run
"""

from keras_dsr.analysis.anytime import (
    EarlyExit,
    StepRunner,
    accuracy_by_step,
    choose,
    outputs_by_step,
    predict,
    predict_served,
    trade_off,
)
from keras_dsr.analysis.energy import HARDWARE, Estimate, Hardware, estimate
from keras_dsr.analysis.operations import Operations, count_operations
from keras_dsr.analysis.representation import errors, measured_response, propose_alpha, response
from keras_dsr.analysis.tracing import LayerTrace, Recorder, Recording, Trace, Tracer, trace, trace_batches

__all__ = [
    "HARDWARE",
    "EarlyExit",
    "Estimate",
    "Hardware",
    "LayerTrace",
    "Operations",
    "Recorder",
    "Recording",
    "StepRunner",
    "Trace",
    "Tracer",
    "accuracy_by_step",
    "choose",
    "count_operations",
    "errors",
    "estimate",
    "measured_response",
    "outputs_by_step",
    "predict",
    "predict_served",
    "propose_alpha",
    "response",
    "trace",
    "trace_batches",
    "trade_off",
]

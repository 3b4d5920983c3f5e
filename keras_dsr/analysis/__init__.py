"""Looking inside a spiking network.

- `trace`, `Tracer`, `trace_batches`: what every neuron layer does on real data; `keras_dsr.analysis.tracing`
- `count_operations`: synaptic operations, and the multiply-accumulates of the ANN of the same shape;
  `keras_dsr.analysis.operations`
- `estimate`: joules of these on named hardware; `keras_dsr.analysis.energy`
- `errors`, `response`, `propose_alpha`: how far outputs are from the clamp, and why;
  `keras_dsr.analysis.representation`
- `EarlyExit`, `outputs_by_step`, `predict`: answers before the last time step; `keras_dsr.analysis.anytime`
- `keras_dsr.analysis.firing`: spike trains and firing rates
- `keras_dsr.analysis.figures`: pictures of a training run
"""

from keras_dsr.analysis.anytime import EarlyExit, outputs_by_step, predict
from keras_dsr.analysis.energy import HARDWARE, Estimate, Hardware, estimate
from keras_dsr.analysis.operations import Operations, count_operations
from keras_dsr.analysis.representation import errors, propose_alpha, response
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
    "Trace",
    "Tracer",
    "count_operations",
    "errors",
    "estimate",
    "outputs_by_step",
    "predict",
    "propose_alpha",
    "response",
    "trace",
    "trace_batches",
]

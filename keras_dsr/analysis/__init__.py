"""Looking inside a spiking network.

- `trace`, `trace_batches`: what every neuron layer does on real data; `keras_dsr.analysis.tracing`
- `keras_dsr.analysis.firing`: spike trains and firing rates
- `keras_dsr.analysis.figures`: pictures of a training run
"""

from keras_dsr.analysis.tracing import LayerTrace, Recording, Trace, trace, trace_batches

__all__ = ["LayerTrace", "Recording", "Trace", "trace", "trace_batches"]

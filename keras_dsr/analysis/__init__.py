"""Looking inside a spiking network.

- `keras_dsr.analysis.firing`: spike trains and firing rates
- `keras_dsr.analysis.figures`: pictures of a training run
"""

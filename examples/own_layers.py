"""Any layer of yours between spiking neurons: plain (batch, time, ...) tensors instead of streams.

A neuron that is called with a tensor gives a tensor, and gradients go through it as through its clamp. Here a recurrent
layer, which no synapse could wrap, stands between two layers of neurons.

    python examples/own_layers.py
"""

import keras
import numpy as np

from keras_dsr import layers

rng = np.random.default_rng(0)
labels = rng.integers(0, 2, 512)
frames = rng.random((512, 10, 16), dtype="float32")
frames[labels == 1] = np.sort(frames[labels == 1], axis=1)  # class 1 rises over time, which no time step shows alone

inputs = keras.Input((10, 16))  # time, features
x = keras.layers.Dense(32)(inputs)  # stock layers see the time axis
x = layers.LIFSpike(threshold=0.05)(x)
x = keras.layers.GRU(32, return_sequences=True)(x)
x = layers.LIFSpike(threshold=0.05)(x)
x = keras.layers.Dense(2)(x)
model = keras.Model(inputs, layers.SpikeRep(coding="weighted_rate")(x))

model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
model.fit(frames, labels, epochs=10, validation_split=0.25, verbose=2)
